"""What the pool does when memory is short, a runner hangs or crashes, or there are GPUs.

With fake runners; those that hang are stopped for real.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio
import trio.testing

from ollamad.api.errors import as_service_error
from ollamad.core.inference import Chunk, Failed, GenerateRequest, InferenceError, Options
from ollamad.core.weights import Weights
from ollamad.engine import pool, process
from ollamad.engine.accelerators import can_offload
from ollamad.engine.engine import _groups
from ollamad.engine.llama_client import Awaited, RunnerGone
from ollamad.engine.memory import GPU_RESERVE_BYTES, MIB
from ollamad.engine.process import Runner
from ollamad.engine.spec import EngineSettings, ModelSpec, runner_config
from tests.fakes.runner_engines import events_of, fake_model, running_engine
from tests.unit.test_engine_pool import DEADLINE_S, names, runner_pids, until

STALL_S = 0.6


def argument(pid: int, name: str) -> str:
    line = psutil.Process(pid).cmdline()
    return line[line.index(name) + 1]


def retry_after_of(failure: Failed) -> int | None:
    """What the client is told by the header."""
    return as_service_error(InferenceError(failure), "r").retry_after_s


async def test_a_model_that_is_to_stay_for_ever_leaves_last(tmp_path: Path):
    a, b, c, d = (fake_model(tmp_path, name) for name in "abcd")
    async with running_engine(tmp_path / "run", max_loaded_models=2) as engine:
        await engine.load(a, keep_alive_s=-1)
        await events_of(engine, a, GenerateRequest("a", "hi"))  # which says nothing of it
        await engine.load(b)
        await engine.load(c)  # `a` is unused for longer, but was asked to stay
        assert names(engine) == ["a", "c"]
        await engine.load(c, keep_alive_s=-1)
        await engine.load(d)  # nobody else is there: the longest unused one
        assert sorted(names(engine)) == ["c", "d"]


async def test_a_model_gets_fewer_slots_where_memory_is_short(tmp_path: Path):
    spec = fake_model(tmp_path)
    details = msgspec.structs.replace(spec.details, kv_bytes_per_token=100 * MIB // 4096)
    spec = msgspec.structs.replace(spec, details=details)
    async with running_engine(tmp_path / "run", lambda: 450 * MIB, num_parallel=4) as engine:
        await engine.load(spec)
        (loaded,) = engine.loaded()
        assert (loaded.slots, argument(runner_pids()[0], "--parallel")) == (2, "2")
        before = runner_pids()
        await engine.load(spec)  # the same request finds it, and does not load it again
        assert runner_pids() == before
    async with running_engine(tmp_path / "run", lambda: 250 * MIB, num_parallel=4) as engine:
        with pytest.raises(InferenceError, match=r"fake:latest needs about 0\.3 GiB"):
            await engine.load(spec)


async def test_a_crashed_model_waits_without_holding_up_others(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 1.0
    bad, good = fake_model(tmp_path, "bad"), fake_model(tmp_path, "good")
    async with running_engine(tmp_path / "run", keep_alive_s=-1) as engine:

        async def crash() -> Failed:
            last = (await events_of(engine, bad, GenerateRequest("bad", "crash")))[-1]
            assert isinstance(last, Failed)
            await until(lambda: "bad" not in names(engine))
            return last

        for _ in range(3):
            await crash()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.load, bad)  # in a second
            await trio.testing.wait_all_tasks_blocked(0.01)
            begun = trio.current_time()
            mock_clock.rate = 0.1
            await engine.load(good)
            assert trio.current_time() - begun < 0.5
            mock_clock.rate = 1.0
        await crash()  # the fourth: a restart is due in two seconds
        mock_clock.jump(1)
        await crash()
        # Too long to wait for: another node may answer meanwhile.
        refused = (await events_of(engine, bad, GenerateRequest("bad", "hi")))[-1]
        assert isinstance(refused, Failed)
        assert (refused.code, refused.status) == ("RUNNER_DIED", 503)
        assert "has crashed 5 times in a row" in refused.message
        assert retry_after_of(refused) == refused.details["retry_after"] in (3, 4)
        mock_clock.jump(4)
        answer = await events_of(engine, bad, GenerateRequest("bad", "hi"))
        assert answer[:1] == [Chunk("a", (97,))]


async def test_a_runner_that_hangs_is_killed_and_its_requests_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process, "BUSY_PATIENCE", math.inf)  # it is not busy: that is the point
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine:
        async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
            assert isinstance(await events.receive(), Chunk)
            (pid,) = runner_pids()
            os.kill(pid, signal.SIGSTOP)
            with trio.fail_after(DEADLINE_S):
                *_, last = [event async for event in events]
        assert isinstance(last, Failed)
        assert last.code == "RUNNER_DIED"  # what the scheduler fails over for
        assert "it hung: no sign of life for" in last.message
        await until(lambda: not psutil.pid_exists(pid))
        answer = await events_of(engine, spec, GenerateRequest(spec.name, "hi"))
        assert answer[:1] == [Chunk("a", (97,))]


async def test_a_runner_that_hangs_before_its_first_token_is_killed_too(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine:
        await engine.load(spec)
        (pid,) = runner_pids()
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(DEADLINE_S):
            (last,) = await events_of(engine, spec, GenerateRequest(spec.name, "hi"))
        assert isinstance(last, Failed)
        assert (last.code, "it hung" in last.message) == ("RUNNER_DIED", True)


async def test_clients_that_give_up_do_not_hide_a_hang(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine:
        await engine.load(spec)
        (pid,) = runner_pids()
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def impatient() -> None:
                while True:
                    with trio.move_on_after(STALL_S / 3):
                        await events_of(engine, spec, GenerateRequest(spec.name, "hi"))

            nursery.start_soon(impatient)
            nursery.start_soon(events_of, engine, spec, GenerateRequest(spec.name, "hi"))
            await until(lambda: not psutil.pid_exists(pid))
            nursery.cancel_scope.cancel()


async def test_a_decode_loop_that_hangs_is_not_hidden_by_what_others_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process, "BUSY_PATIENCE", 2)  # those answers take CPU time
    spec = fake_model(tmp_path)
    async with (
        running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine,
        trio.open_nursery() as nursery,
    ):
        await engine.load(spec)
        (resident,) = engine._pool._residents.values()
        client = resident.runner.client

        async def count_tokens() -> None:
            while not resident.runner.over:
                with contextlib.suppress(RunnerGone):
                    await client.tokenize("a", add_special=True, parse_special=False)
                await trio.sleep(STALL_S / 10)

        nursery.start_soon(count_tokens)
        with trio.fail_after(DEADLINE_S):
            *_, last = await events_of(engine, spec, GenerateRequest(spec.name, "mute"))
        assert isinstance(last, Failed)
        assert "it hung: no sign of life for" in last.message


async def test_a_request_that_is_forgotten_is_given_up_alone(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with (
        running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine,
        trio.open_nursery() as nursery,
    ):

        async def listen() -> None:
            async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
                async for event in events:
                    assert isinstance(event, Chunk)

        nursery.start_soon(listen)
        await until(lambda: bool(runner_pids()))
        (pid,) = runner_pids()
        with trio.fail_after(DEADLINE_S):
            first, last = await events_of(engine, spec, GenerateRequest(spec.name, "mute"))
        assert isinstance(first, Chunk)
        assert isinstance(last, Failed)
        assert (last.code, "not this request" in last.message) == ("RUNNER_DIED", True)
        assert runner_pids() == [pid]
        assert engine.loaded()[0].busy == 1
        nursery.cancel_scope.cancel()


class Patient:
    """A connection that is given up."""

    def __init__(self) -> None:
        self.given_up_at = math.inf

    def abandon(self) -> None:
        self.given_up_at = min(self.given_up_at, trio.current_time())


@pytest.mark.parametrize(
    ("what", "works", "others", "given_up_s", "killed_s"),
    [
        ("next", True, True, 60, math.inf),
        # It may have to wait for the prompts of others.
        ("first", True, True, 600, math.inf),
        # Of an answer that comes whole nothing is heard, however well it goes.
        ("whole", True, True, math.inf, math.inf),
        # Alone: a batch may take long.
        ("next", True, False, math.inf, 600),
        ("first", True, False, math.inf, 600),
        ("whole", True, False, math.inf, math.inf),
        # A process that stands still is no riddle.
        ("next", False, False, math.inf, 60),
        ("first", False, False, math.inf, 60),
        ("whole", False, False, math.inf, 60),
    ],
)
async def test_how_long_a_silence_is_borne(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    what: Awaited,
    works: bool,
    others: bool,
    given_up_s: float,
    killed_s: float,
):
    spec = fake_model(tmp_path)
    config = runner_config(spec, Options(), EngineSettings(runtime_dir=tmp_path))
    runner = Runner(spec, config, (), tmp_path / "s", 300, 60)
    monkeypatch.setattr(process, "_vitals", lambda pid: works and trio.current_time())
    silent: Any = Patient()
    killed = math.inf
    begun = trio.current_time()

    async def others_hear() -> None:
        while others:
            other: Any = Patient()
            with runner.client.waits(other, "next"):
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others_hear)
        with runner.client.waits(silent, what), trio.move_on_after(5000) as scope:
            await runner._end_if_it_hangs(1)
        if not scope.cancelled_caught:
            killed = trio.current_time() - begun
        nursery.cancel_scope.cancel()
    look_s = process.MAX_STALL_LOOK_S
    for seen_s, expected_s in ((silent.given_up_at - begun, given_up_s), (killed, killed_s)):
        assert seen_s == expected_s or expected_s <= seen_s <= expected_s + look_s


async def test_a_client_that_reads_slowly_is_no_hang(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with (
        running_engine(tmp_path / "run", stall_timeout_s=STALL_S) as engine,
        engine.generate(spec, GenerateRequest(spec.name, "endless")) as events,
    ):
        assert isinstance(await events.receive(), Chunk)
        await trio.sleep(2 * STALL_S)
        for _ in range(1000):
            assert isinstance(await events.receive(), Chunk)


async def test_a_runner_that_works_and_says_nothing_has_more_time_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(process, "_vitals", lambda pid: (str(next(ticks)),))  # busy, always
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run", stall_timeout_s=STALL_S / 3) as engine:
        await engine.load(spec)
        begun = trio.current_time()
        with trio.fail_after(DEADLINE_S):
            _, last = await events_of(engine, spec, GenerateRequest(spec.name, "mute"))
        assert isinstance(last, Failed)
        assert trio.current_time() - begun > process.BUSY_PATIENCE * STALL_S / 3


async def test_a_model_that_loads_but_does_not_work_is_not_ready(tmp_path: Path):
    spec = fake_model(tmp_path, broken=True)
    async with running_engine(tmp_path / "run") as engine:
        with trio.fail_after(DEADLINE_S), pytest.raises(InferenceError) as caught:
            await engine.load(spec)
        assert caught.value.failure.code == "LOAD_FAILED"
        assert "was loaded, but does not work: it ended with exit code 9" in str(caught.value)
        assert engine.loaded() == ()


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("unknown model architecture: 'gemma9'", "does not know the architecture gemma9: it is"),
        ("missing tensor 'blk.0.attn_q.weight'", "stock llama.cpp refuses the file"),
        ("wrong number of tensors; expected 5, got 4", "stock llama.cpp refuses the file"),
        ("key not found in model: gptoss.block_count", "stock llama.cpp refuses the file"),
        ("out of memory", ""),
    ],
)
async def test_a_refusal_of_llama_cpp_is_explained(tmp_path: Path, words: str, meaning: str):
    spec = fake_model(tmp_path, exit_code=1, last_words=f"0.0 E load: {words}")
    async with running_engine(tmp_path / "run") as engine:
        with trio.fail_after(DEADLINE_S), pytest.raises(InferenceError) as caught:
            await engine.load(spec)
    message = str(caught.value)
    assert words in message
    assert meaning in message
    assert ("as GGUF from elsewhere" in message) is bool(meaning)


async def test_what_a_runner_took_is_remembered(tmp_path: Path):
    spec, record = fake_model(tmp_path), tmp_path / "memory.json"
    async with running_engine(tmp_path / "run", memory_record=record) as engine:
        before = engine.estimate(spec)
        await engine.load(spec)
        assert not record.exists()
        await events_of(engine, spec, GenerateRequest(spec.name, "hi"))
        assert engine.estimate(spec) != before
        (loaded,) = engine.loaded()
        assert loaded.size_used > 5 * MIB
        corrected = engine.estimate(spec)
    async with running_engine(tmp_path / "run", memory_record=record) as engine:
        assert engine.estimate(spec) == corrected


@dataclasses.dataclass
class FakeGpus:
    """NVML of a host with GPUs."""

    free: Sequence[int]
    used: int | None = 0
    asked: list[int] = dataclasses.field(default_factory=list)

    def free_vram(self) -> Sequence[int]:
        return self.free

    def vram_used(self, pid: int) -> int | None:
        self.asked.append(pid)
        return self.used


async def test_layers_go_on_gpus_and_what_is_there_is_told_as_the_driver_says(tmp_path: Path):
    weights = Weights(layer_bytes=(100 * MIB,) * 8, vocabulary=1000, width=64)
    spec = msgspec.structs.replace(fake_model(tmp_path), size=900 * MIB, weights=weights)
    gpus = FakeGpus([GPU_RESERVE_BYTES + 350 * MIB], used=333 * MIB)
    # Memory has no room for all of it, but for what is not on the GPU.
    memory = 900 * MIB
    async with running_engine(tmp_path / "run", lambda: memory, gpus) as engine:
        await engine.load(spec)
        for _ in range(3):
            (loaded,) = engine.loaded()
        (pid,) = runner_pids()
        assert argument(pid, "--gpu-layers") == "3"
        assert loaded.size_vram == 333 * MIB
        assert gpus.asked == [pid], "when it was loaded: who looks asks no driver"
        gpus.used = 335 * MIB
        await events_of(engine, spec, GenerateRequest(spec.name, "hi"))
        assert engine.loaded()[0].size_vram == 335 * MIB
        await engine.unload(spec.name)
        gpus.used = None  # a driver that does not tell: as planned
        await engine.load(spec)
        planned = engine.loaded()[0].size_vram
        assert 300 * MIB <= planned < 350 * MIB
        memory = 1500 * MIB
        await engine.load(spec, Options(num_gpu=1))
        assert argument(runner_pids()[0], "--gpu-layers") == "1"
        await engine.load(spec, Options(num_gpu=0))
        assert argument(runner_pids()[0], "--gpu-layers") == "0"
        assert engine.loaded()[0].size_vram == 0


async def test_room_is_left_for_the_batch_that_a_gpu_gets(tmp_path: Path):
    weights = Weights(layer_bytes=(100 * MIB,) * 8, vocabulary=100_000, width=64)
    spec = msgspec.structs.replace(fake_model(tmp_path), size=900 * MIB, weights=weights)
    gpus = FakeGpus([GPU_RESERVE_BYTES + 350 * MIB])
    async with running_engine(tmp_path / "run", accelerators=gpus) as engine:
        await engine.load(spec)
        # Scores of 512 tokens are 195 MiB; of 64, as on a CPU, 24 MiB.
        assert argument(runner_pids()[0], "--gpu-layers") == "1"
        await engine.load(spec, Options(num_batch=64))
        assert argument(runner_pids()[0], "--gpu-layers") == "3"


@pytest.mark.parametrize(("most", "fits"), [(3, 2), (0, 0)])
async def test_a_load_that_fails_is_tried_with_fewer_layers_on_gpus(
    tmp_path: Path, most: int, fits: int
):
    weights = Weights(layer_bytes=(100 * MIB,) * 8, vocabulary=1000, width=64)
    spec = msgspec.structs.replace(
        fake_model(tmp_path, most_layers=most), size=900 * MIB, weights=weights
    )
    gpus = FakeGpus([GPU_RESERVE_BYTES + 1000 * MIB])
    async with running_engine(tmp_path / "run", accelerators=gpus) as engine:
        for _ in range(2):  # each is planned anew: what else is on the GPU may have changed
            await engine.load(spec)
            assert argument(runner_pids()[0], "--gpu-layers") == str(fits)
            assert not engine._pool._crashes
            await engine.unload(spec.name)
        # What somebody asks for by number is tried as it is.
        with pytest.raises(InferenceError, match="could not be loaded"):
            await engine.load(spec, Options(num_gpu=9))


@pytest.mark.parametrize(
    ("words", "limit_s"),
    [("unknown model architecture: 'gemma9'", 300), ("cudaMalloc failed: out of memory", 0)],
)
async def test_a_load_that_fewer_layers_cannot_help_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str, limit_s: float
):
    caplog.set_level("INFO")
    weights = Weights(layer_bytes=(100 * MIB,) * 8, vocabulary=1000, width=64)
    spec = fake_model(tmp_path, exit_code=1, last_words=f"0.0 E load: {words}")
    spec = msgspec.structs.replace(spec, size=900 * MIB, weights=weights)
    gpus = FakeGpus([GPU_RESERVE_BYTES + 1000 * MIB])
    async with running_engine(
        tmp_path / "run", accelerators=gpus, load_timeout_s=limit_s
    ) as engine:
        with pytest.raises(InferenceError, match="could not be loaded"):
            await engine.load(spec)
    assert "is tried again" not in caplog.text


async def test_an_engine_that_cannot_use_the_gpu_keeps_everything_in_memory(tmp_path: Path):
    weights = Weights(layer_bytes=(100 * MIB,) * 8)
    spec = msgspec.structs.replace(fake_model(tmp_path), size=900 * MIB, weights=weights)
    script = tmp_path / "runner"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--list-devices*) echo "CPU: a processor"; exit;; esac\n'
        f'exec {sys.executable} -m tests.fakes.fake_runner "$@"\n'
    )
    script.chmod(0o755)
    gpus = FakeGpus([1 << 40])
    command = (str(script),)
    async with running_engine(
        tmp_path / "run", lambda: 1500 * MIB, gpus, runner_command=command
    ) as engine:
        assert engine.usable_vram([1 << 40, 1]) == (1 << 40) - GPU_RESERVE_BYTES
        await engine.load(spec)
        assert engine.loaded()[0].size_vram == 0
        assert engine.usable_vram([1 << 40, 1]) == 0
    async with running_engine(
        tmp_path / "run", lambda: 900 * MIB, gpus, runner_command=command
    ) as engine:
        with pytest.raises(InferenceError, match="of memory"):
            await engine.load(spec)


async def test_an_idle_model_makes_room_on_the_gpu(tmp_path: Path):
    weights = Weights(layer_bytes=(100 * MIB,) * 8, vocabulary=1000, width=64)
    a, b, c = (
        msgspec.structs.replace(fake_model(tmp_path, name), size=900 * MIB, weights=weights)
        for name in "abc"
    )

    class Gpus(FakeGpus):
        def free_vram(self) -> Sequence[int]:
            return [GPU_RESERVE_BYTES + (1000 - 1000 * len(runner_pids())) * MIB]

    async with running_engine(tmp_path / "run", accelerators=Gpus([])) as engine:
        await engine.load(a)
        await engine.load(b)
        assert names(engine) == ["b"]
        assert argument(runner_pids()[0], "--gpu-layers") == "9"
        async with engine.generate(b, GenerateRequest("b", "endless")) as events:
            await events.receive()
            await engine.load(c)  # beside a busy one there is none: in memory then
            assert names(engine) == ["b", "c"]
            assert {argument(pid, "--gpu-layers") for pid in runner_pids()} == {"9", "0"}


async def test_an_engine_that_does_not_tell_its_devices_is_asked_again(tmp_path: Path):
    assert await can_offload([str(tmp_path / "missing")]) is None
    assert await can_offload(["/bin/false"]) is None
    assert await can_offload(["/bin/echo", "Available devices:\n  (none)"]) is False
    assert await can_offload(["/bin/echo", "CPU: a processor"]) is False
    assert await can_offload(["/bin/echo", "Vulkan0: a GPU (8192 MiB)"]) is True
    # A runner ends when its standard input is closed, so it must not be.
    script = "from ollamad.engine.runner import _die_with_parent as f; f(); print('CUDA0: a GPU')"
    assert await can_offload([sys.executable, "-c", script]) is True


async def test_loads_that_fail_again_and_again_are_not_tried_each_time(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 1.0
    spec = fake_model(tmp_path, exit_code=1, last_words="0.0 E bad file")
    async with running_engine(tmp_path / "run") as engine:
        messages = []
        for _ in range(6):
            mock_clock.jump(1.5)
            with trio.fail_after(DEADLINE_S), pytest.raises(InferenceError) as caught:
                await engine.load(spec)
            assert caught.value.failure.code == "LOAD_FAILED"
            messages.append(caught.value.failure.message)
        assert all("exit code 1 (bad file)" in message for message in messages)
        assert "5 times in a row; it is started again in" in messages[-1]
        assert caught.value.failure.status == 503
        assert retry_after_of(caught.value.failure) in (3, 4)
        # Another file of that name, or other options, have a clean record.
        with pytest.raises(InferenceError) as again:
            await engine.load(spec, Options(num_ctx=64))
        assert "in a row" not in again.value.failure.message
        await engine.load(msgspec.structs.replace(fake_model(tmp_path), digest="sha256:new"))


async def test_requests_that_wait_for_one_load_do_not_each_repeat_its_failure(
    tmp_path: Path, mock_clock: trio.testing.MockClock
):
    mock_clock.rate = 5.0
    spec = fake_model(tmp_path, exit_code=1)
    refused: list[Failed] = []
    async with running_engine(tmp_path / "run") as engine:

        async def load() -> None:
            with pytest.raises(InferenceError) as caught:
                await engine.load(spec)
            refused.append(caught.value.failure)

        with trio.fail_after(10 * DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for _ in range(12):
                    nursery.start_soon(load)
        (crashes,) = engine._pool._crashes.values()
        assert crashes.in_a_row == 5, "the sixth would have to wait for longer than patience"
    assert len(refused) == 12
    assert sum("retry_after" in failure.details for failure in refused) == 12 - 5


async def test_a_model_that_is_never_idle_makes_room_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool, "ROOM_PATIENCE_S", 0.1)
    a, b = fake_model(tmp_path, "a"), fake_model(tmp_path, "b")
    done: list[str] = []

    async def load(spec: ModelSpec) -> None:
        await engine.load(spec)
        done.append(spec.name)

    async with running_engine(tmp_path / "run", max_loaded_models=1) as engine:
        async with (
            trio.open_nursery() as nursery,
            engine.generate(a, GenerateRequest("a", "endless")) as events,
        ):
            await events.receive()
            nursery.start_soon(load, b)
            await until(lambda: engine._pool._residents[("a", False)].retiring)
            nursery.start_soon(load, a)  # it would keep it busy for ever
            for _ in range(20):
                assert isinstance(await events.receive(), Chunk), "who is served stays so"
            assert not done
        assert done == ["b", "a"]
        assert names(engine) == ["a"]


async def test_a_model_that_is_being_ended_does_not_keep_the_loop_busy(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        await engine.load(spec)
        (resident,) = engine._pool._residents.values()
        resident.keep_alive_s = 0.0
        resident.retiring = True
        engine._pool._notify()
        trio.lowlevel.add_instrument(looks := Looks())
        await trio.sleep(0.05)
        trio.lowlevel.remove_instrument(looks)
        assert looks.steps < 30
        resident.retiring = False


class Looks(trio.abc.Instrument):
    """Counts the steps of tasks."""

    def __init__(self) -> None:
        self.steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1


def test_inputs_to_embed_are_asked_for_in_groups_of_bounded_size():
    assert list(_groups([])) == []
    assert [len(group) for group in _groups([[1]] * 70)] == [32, 32, 6]
    assert [len(group) for group in _groups([[1] * 5000] * 3)] == [1, 1, 1]
    assert [len(group) for group in _groups([[1] * 9000, [1], [1] * 1000, [1] * 1000])] == [1, 3]
    slowest = 35  # tokens a second, of a machine that reads them
    longest = max(sum(map(len, group)) for group in _groups([[1] * 500] * 64))
    assert longest / slowest < EngineSettings(runtime_dir=Path()).stall_timeout_s
