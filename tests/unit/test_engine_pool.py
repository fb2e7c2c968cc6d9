"""Models come into memory, stay, make room, die and come back; all with fake runners."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import trio
import trio.testing

from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    GenerateRequest,
    InferenceError,
    Options,
)
from ollamad.engine.engine import Engine
from ollamad.engine.spec import EngineSettings, ModelSpec
from tests.fakes.runner_engines import (
    FAKE_RUNNER,
    PLENTY,
    events_of,
    fake_model,
    running_engine,
)

DEADLINE_S = 20
ROOM_FOR_ONE = 400 << 20  # bytes; a fake model is taken for 224 MiB


def runner_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children() if is_runner(child)]


def is_runner(process: psutil.Process) -> bool:
    try:
        return "tests.fakes.fake_runner" in process.cmdline()
    except psutil.Error:
        return False


def names(engine: Engine) -> list[str]:
    return [model.name for model in engine.loaded()]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the engine tells nobody
            await trio.sleep(0.005)


async def test_load_and_unload(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        await engine.load(spec, Options(num_ctx=64))
        (loaded,) = engine.loaded()
        assert (loaded.name, loaded.digest) == (spec.name, spec.digest)
        assert (loaded.context_length, loaded.slots, loaded.busy) == (64, 4, 0)
        assert loaded.size == engine.estimate(spec, Options(num_ctx=64))
        assert len(runner_pids()) == 1
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        assert await engine.unload("FAKE:latest")
        assert engine.loaded() == ()
        assert runner_pids() == []
        assert not await engine.unload("fake:latest")


async def test_the_engines_end_ends_its_runners_and_removes_their_sockets(tmp_path: Path):
    async with running_engine(tmp_path / "run") as engine:
        await engine.load(fake_model(tmp_path))
        assert len(list((tmp_path / "run").iterdir())) == 1
    assert runner_pids() == []
    assert list((tmp_path / "run").iterdir()) == []


async def test_sockets_of_an_unclean_end_are_cleared(tmp_path: Path):
    leftover = tmp_path / "runner-0123.sock"
    leftover.touch()
    async with running_engine(tmp_path):
        assert not leftover.exists()


async def test_a_runtime_directory_too_deep_for_sockets_is_refused(tmp_path: Path):
    deep = tmp_path / ("x" * 100)
    engine = Engine(EngineSettings(runtime_dir=deep), lambda: 0)
    with pytest.raises(ValueError, match="the system allows 107"):
        await engine.run()
    assert not deep.exists()


async def test_without_its_run_the_engine_says_so(tmp_path: Path):
    engine = Engine(EngineSettings(runtime_dir=tmp_path), lambda: 0)
    with pytest.raises(InferenceError, match="not running"):
        await engine.load(fake_model(tmp_path))


async def test_a_model_leaves_after_its_keep_alive(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 1.0
    async with running_engine(tmp_path / "run", keep_alive_s=60) as engine:
        await engine.load(fake_model(tmp_path))
        await engine.load(fake_model(tmp_path, "longer"), keep_alive_s=600)
        await engine.load(fake_model(tmp_path, "forever"), keep_alive_s=-1)
        assert engine.loaded()[2].expires_at == 0
        mock_clock.jump(61)
        await until(lambda: names(engine) == ["longer", "forever"])
        mock_clock.jump(600)
        await until(lambda: names(engine) == ["forever"])
        mock_clock.jump(1_000_000)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert names(engine) == ["forever"]


async def test_a_busy_model_outlives_its_keep_alive(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 1.0
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", keep_alive_s=60) as engine:
        request = GenerateRequest(spec.name, prompt="endless", keep_alive_s=0)
        async with engine.generate(spec, request) as events:
            assert isinstance(await events.receive(), Chunk)
            mock_clock.jump(1000)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert isinstance(await events.receive(), Chunk)
            assert engine.loaded()[0].busy == 1
        await until(lambda: names(engine) == [])


async def test_unloading_a_busy_model_waits_for_its_answer(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
            await events.receive()
            assert await engine.unload(spec.name)
            assert isinstance(await events.receive(), Chunk)
        await until(lambda: names(engine) == [])


async def test_text_and_embeddings_have_runners_of_their_own_but_are_one_model(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", max_loaded_models=2) as engine:
        assert engine.places == 2
        await engine.embed(spec, EmbedRequest(spec.name, ("hi",)))
        assert engine.places == 1
        (alone,) = engine.loaded()
        assert alone.context_length == 512
        await engine.load(spec)
        (both,) = engine.loaded()
        assert both.context_length == 4096
        assert both.size == alone.size + engine.estimate(spec)
        assert engine.places == 0
        assert len(runner_pids()) == 2
        assert await engine.unload(spec.name)
        assert runner_pids() == []


async def test_the_longest_unused_model_makes_room(tmp_path: Path):
    a, b, c = (fake_model(tmp_path, name) for name in "abc")
    async with running_engine(tmp_path / "run", max_loaded_models=2) as engine:
        await engine.load(a)
        await engine.load(b)
        await engine.load(a)
        await engine.load(c)
        assert sorted(names(engine)) == ["a", "c"]
        assert len(runner_pids()) == 2


async def test_an_idle_model_leaves_rather_than_a_busy_one_unused_for_longer(tmp_path: Path):
    a, b, c = (fake_model(tmp_path, name) for name in "abc")
    async with (
        running_engine(tmp_path / "run", max_loaded_models=2) as engine,
        engine.generate(a, GenerateRequest("a", "endless")) as events,
    ):
        await events.receive()
        await engine.load(b)
        with trio.fail_after(DEADLINE_S):
            await engine.load(c)
        assert names(engine) == ["a", "c"]


async def test_memory_makes_a_model_leave(tmp_path: Path):
    a, b = (fake_model(tmp_path, name) for name in "ab")
    async with running_engine(tmp_path / "run", lambda: ROOM_FOR_ONE) as engine:
        await engine.load(a)
        await engine.load(b)
        assert names(engine) == ["b"]


async def test_a_model_too_large_for_all_memory_evicts_nobody(tmp_path: Path):
    a, b = (fake_model(tmp_path, name) for name in "ab")
    async with running_engine(tmp_path / "run", lambda: ROOM_FOR_ONE) as engine:
        await engine.load(a)
        large = msgspec.structs.replace(b, size=2 * ROOM_FOR_ONE)
        with pytest.raises(InferenceError, match=r"b needs about 1\.0 GiB of memory") as caught:
            await engine.load(large)
        assert caught.value.failure.code == "INSUFFICIENT_MEMORY"
        assert caught.value.failure.status == 503
        assert names(engine) == ["a"]


async def test_who_needs_the_room_of_a_busy_model_waits_for_it(tmp_path: Path):
    a, b = (fake_model(tmp_path, name) for name in "ab")
    done: list[str] = []
    async with running_engine(tmp_path / "run", max_loaded_models=1) as engine:

        async def load_b() -> None:
            await engine.load(b)
            done.append("b")

        async with (
            trio.open_nursery() as nursery,
            engine.generate(a, GenerateRequest("a", "endless")) as events,
        ):
            await events.receive()
            nursery.start_soon(load_b)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not done
            assert names(engine) == ["a"]
        assert names(engine) == ["b"]


async def test_waiting_for_room_ends_with_the_request(tmp_path: Path):
    a, b = (fake_model(tmp_path, name) for name in "ab")
    async with (
        running_engine(tmp_path / "run", max_loaded_models=1) as engine,
        engine.generate(a, GenerateRequest("a", "endless")) as events,
    ):
        await events.receive()
        with trio.move_on_after(0.05) as scope:
            await engine.load(b)
        assert scope.cancelled_caught
        assert isinstance(await events.receive(), Chunk)
        async with engine.generate(a, GenerateRequest("a", "hi")) as others:
            assert isinstance(await others.receive(), Chunk)  # `a` takes requests as before


async def test_another_context_length_reloads(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        await engine.load(spec)
        first = runner_pids()
        await engine.load(spec, Options(num_ctx=64))
        assert engine.loaded()[0].context_length == 64
        assert len(runner_pids()) == 1
        assert runner_pids() != first


async def test_giving_up_on_a_reload_leaves_the_model_as_it_was(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with (
        running_engine(tmp_path / "run") as engine,
        engine.generate(spec, GenerateRequest(spec.name, "endless")) as events,
    ):
        await events.receive()
        before = runner_pids()
        with trio.move_on_after(0.05) as scope:
            await engine.load(spec, Options(num_ctx=64))
        assert scope.cancelled_caught
        assert isinstance(await events.receive(), Chunk)
        with trio.fail_after(DEADLINE_S):
            await engine.load(spec)
        assert runner_pids() == before


async def test_a_new_digest_reloads(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        await engine.load(spec)
        await engine.load(ModelSpec(spec.name, "sha256:new", spec.gguf_path, 1000, spec.details))
        assert [model.digest for model in engine.loaded()] == ["sha256:new"]


async def test_a_load_that_fails_tells_the_first_error(tmp_path: Path):
    words = "noise\n0.0 E gguf: bad magic\n0.0 E srv: giving up\n"
    spec = fake_model(tmp_path, exit_code=1, last_words=words)
    async with running_engine(tmp_path / "run") as engine:
        with trio.fail_after(DEADLINE_S), pytest.raises(InferenceError) as caught:
            await engine.load(spec)
        failure = caught.value.failure
        assert failure.code == "LOAD_FAILED"
        assert "exit code 1 (gguf: bad magic)" in failure.message
        assert failure.details["log"] == ["gguf: bad magic", "srv: giving up"]
        assert engine.loaded() == ()
        good = fake_model(tmp_path, "good")
        await engine.load(good)
        assert names(engine) == ["good"]


async def test_a_load_that_hangs_ends_at_its_deadline(tmp_path: Path):
    spec = fake_model(tmp_path, never_ready=True)
    async with running_engine(tmp_path / "run", load_timeout_s=0.5) as engine:
        with trio.fail_after(DEADLINE_S), pytest.raises(InferenceError, match=r"after 0\.5 s"):
            await engine.load(spec)
        await until(lambda: not runner_pids())


async def test_a_cancelled_load_leaves_nothing(tmp_path: Path):
    spec = fake_model(tmp_path, never_ready=True)
    async with running_engine(tmp_path / "run", max_loaded_models=2) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.load, spec)
            await until(lambda: bool(runner_pids()))
            assert engine.places == 1
            nursery.cancel_scope.cancel()
        assert runner_pids() == []
        assert engine.loaded() == ()
        assert engine.places == 2


async def test_a_load_goes_on_while_anybody_waits_for_it(tmp_path: Path):
    ready = tmp_path / "ready"
    spec = fake_model(tmp_path, ready_with=str(ready))
    async with running_engine(tmp_path / "run") as engine, trio.open_nursery() as nursery:
        first, second = trio.CancelScope(), trio.CancelScope()
        loaded = trio.Event()

        async def load(scope: trio.CancelScope) -> None:
            with scope:
                await engine.load(spec)
                loaded.set()

        nursery.start_soon(load, first)
        await until(lambda: bool(runner_pids()))
        nursery.start_soon(load, second)
        await trio.testing.wait_all_tasks_blocked(0.01)
        (pid,) = runner_pids()
        first.cancel()  # who began it goes away
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert runner_pids() == [pid]
        ready.touch()
        with trio.fail_after(DEADLINE_S):
            await loaded.wait()
        assert runner_pids() == [pid]
        await until(lambda: engine._pool._residents[("fake:latest", False)].pins == 0)
        await engine.unload(spec.name)

        ready.unlink()
        first, second = trio.CancelScope(), trio.CancelScope()
        nursery.start_soon(load, first)
        nursery.start_soon(load, second)
        await until(lambda: bool(runner_pids()))
        first.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        second.cancel()  # nobody is left
        await until(lambda: not runner_pids())


async def test_who_waits_for_a_load_hears_of_the_engines_end(tmp_path: Path):
    spec = fake_model(tmp_path, never_ready=True)
    async with trio.open_nursery() as nursery:

        async def load() -> None:
            with pytest.raises(InferenceError, match="is not running"):
                await engine.load(spec)

        with trio.fail_after(DEADLINE_S):
            async with running_engine(tmp_path / "run") as engine:
                nursery.start_soon(load)
                nursery.start_soon(load)
                await until(lambda: bool(runner_pids()))
    assert runner_pids() == []


async def test_a_runner_that_cannot_be_started(tmp_path: Path):
    command = (str(tmp_path / "missing"),)
    async with running_engine(tmp_path / "run", runner_command=command) as engine:
        with pytest.raises(InferenceError, match="cannot be started"):
            await engine.load(fake_model(tmp_path))


async def test_a_killed_runner_is_noticed_and_comes_back(tmp_path: Path):
    spec = fake_model(tmp_path)
    request = GenerateRequest(spec.name, prompt="endless")
    async with running_engine(tmp_path / "run") as engine:
        async with engine.generate(spec, request) as events:
            assert isinstance(await events.receive(), Chunk)
            (pid,) = runner_pids()
            os.kill(pid, signal.SIGKILL)
            with trio.fail_after(DEADLINE_S):
                *_, last = [event async for event in events]
        assert isinstance(last, Failed)
        assert last.code == "RUNNER_DIED"
        assert "memory runs out" in last.message
        await until(lambda: not engine.loaded())
        assert isinstance(
            (await events_of(engine, spec, GenerateRequest(spec.name, "hi")))[0], Chunk
        )


async def test_the_engines_end_is_no_crash(tmp_path: Path):
    spec = fake_model(tmp_path)
    engine = Engine(
        EngineSettings(runtime_dir=tmp_path, runner_command=FAKE_RUNNER), lambda: PLENTY
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        with trio.CancelScope(shield=True):
            async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
                await events.receive()
                nursery.cancel_scope.cancel()
                with trio.fail_after(DEADLINE_S):
                    *_, last = [event async for event in events]
    assert isinstance(last, Failed)
    assert "it was told to stop" in last.message


async def test_crashes_in_a_row_delay_the_restart(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 1.0
    spec = fake_model(tmp_path)
    crash = GenerateRequest(spec.name, prompt="crash")
    async with running_engine(tmp_path / "run", keep_alive_s=-1) as engine:

        async def crash_once() -> None:
            last = (await events_of(engine, spec, crash))[-1]
            assert isinstance(last, Failed)
            assert "exit code 9 (fake: out of luck)" in last.message
            await until(lambda: not engine.loaded())

        await crash_once()
        await crash_once()  # at once: one crash is forgiven
        crashed_at = trio.current_time()
        await crash_once()  # after half a second
        await engine.load(spec)  # after one
        assert trio.current_time() - crashed_at > 1.5
        assert (await events_of(engine, spec, GenerateRequest(spec.name, "hi")))[:1] == [
            Chunk("a", (97,))
        ]
        await crash_once()
        before = trio.current_time()
        mock_clock.rate = 0.1  # a slow machine does not look like a delay
        await engine.load(spec)  # at once: the good answer has cleared the record
        assert trio.current_time() - before < 0.5


async def test_too_many_requests_for_loads_are_refused(tmp_path: Path):
    spec = fake_model(tmp_path, never_ready=True)
    async with (
        running_engine(tmp_path / "run", max_queue=1, runner_command=FAKE_RUNNER) as engine,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(engine.load, spec)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(InferenceError, match="maximum pending requests exceeded") as caught:
            await engine.load(spec)
        assert caught.value.failure.status == 503
        nursery.cancel_scope.cancel()
