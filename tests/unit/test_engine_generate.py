"""Requests become prompts, streams become events, faults become failures; with fake runners."""

import glob
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Message,
    Options,
)
from ollamad.engine.engine import Engine
from ollamad.engine.llama_client import LlamaClient
from ollamad.engine.prompt import shifted
from tests.fakes.fake_runner import BOS
from tests.fakes.runner_engines import events_of, fake_model, running_engine

DEADLINE_S = 20


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def client_of(runtime_dir: Path) -> LlamaClient:
    (path,) = glob.glob(str(runtime_dir / "*.sock"))  # noqa: PTH207
    return LlamaClient(Path(path))


async def failure_of(engine: Engine, spec: Any, request: GenerateRequest) -> Failed:
    last = (await events_of(engine, spec, request))[-1]
    assert isinstance(last, Failed)
    return last


async def finish_of(engine: Engine, spec: Any, request: GenerateRequest) -> Finished:
    last = (await events_of(engine, spec, request))[-1]
    assert isinstance(last, Finished)
    return last


async def test_a_completion_from_start_to_end(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, prompt="hi", options=Options(num_predict=3))
        *chunks, last = await events_of(engine, spec, request)
        assert chunks == [Chunk("a", (97,)), Chunk("b", (98,)), Chunk("c", (99,))]
        assert isinstance(last, Finished)
        assert last.reason == "length"
        assert last.context == (BOS, *ids_of("user:hi\n"), *ids_of("abc"))
        assert (last.prompt_eval_count, last.eval_count) == (len(last.context) - 3, 3)
        assert (last.prompt_eval_duration, last.eval_duration) == (1_500_000, 2_500_000)
        assert last.prompt_cached_count == 2
        assert 0 < last.load_duration < last.total_duration
        assert engine.loaded()[0].busy == 0


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ("abcdefghi", "abcdefghi"),  # room for one more
        ("abcdefghij", "abghij"),  # full: of the eight behind the first two, the older four go
        ("abcdefghijklm", "abghijklm"),
        ("abcdefghijklmn", "abklmn"),  # it was full twice
    ],
)
def test_what_a_full_context_has_left(ids: str, left: str):
    assert "".join(map(chr, shifted(ids_of(ids), 11, 2))) == left


@pytest.mark.parametrize(
    ("num_keep", "kept"), [(None, "<echo"), (100, "<echo12345"), (-1, "<echo12345")]
)
async def test_an_answer_longer_than_the_context_goes_on_elsewhere_too(
    tmp_path: Path, num_keep: int | None, kept: str
):
    """As it would have where it was: the older half of what is behind `num_keep` is gone."""
    spec = fake_model(tmp_path)
    options = Options(num_ctx=256, num_keep=num_keep)
    said = "".join(chr(200 + place) for place in range(300))
    request = GenerateRequest(
        spec.name, "echo12345", raw=True, options=options, resume=tuple(ids_of(said))
    )
    async with running_engine(tmp_path / "run") as engine:
        *chunks, last = await events_of(engine, spec, request)
        text = "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk))
        assert text.startswith(kept[1:])
        assert text.endswith(said[-100:])
        assert len(text) < 256
        assert len(text) > len(kept) + 100
        assert said[0] not in text
        assert isinstance(last, Finished)
        assert last.prompt_eval_count == 1 + len("echo12345")
        # Where it is not to go on without its beginning, it is at its end.
        whole = msgspec.structs.replace(request, shift=False)
        spent = msgspec.structs.replace(request, options=Options(num_ctx=1024, num_predict=300))
        for complete in (whole, spent):
            (end,) = await events_of(engine, spec, complete)
            assert isinstance(end, Finished)
            assert (end.reason, end.eval_count) == ("length", 0)
            assert end.prompt_eval_count == last.prompt_eval_count


@pytest.mark.parametrize("sentencepiece", [False, True])
async def test_an_answer_goes_on_behind_a_text(tmp_path: Path, sentencepiece: bool):
    """Its tokens nobody knows any more; they count, and are part of the context."""
    spellings = {"\n": [9, 10], "\nxyz": [9, 10, 120, 121, 122]} if sentencepiece else {}
    spec = fake_model(tmp_path, spellings=spellings)
    options = Options(num_predict=6)
    request = GenerateRequest(
        spec.name, "echo", options=options, resume=(33,), said="xyz", said_tokens=3
    )
    async with running_engine(tmp_path / "run") as engine:
        raw = msgspec.structs.replace(request, raw=True)
        *chunks, last = await events_of(engine, spec, raw)
        text = "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk))
        assert text == "echoxyz!"
        assert isinstance(last, Finished)
        assert last.prompt_eval_count == 1 + len("echo")
        *_, last = await events_of(engine, spec, msgspec.structs.replace(request, prompt="hi"))
        assert isinstance(last, Finished)
        assert last.eval_count == 6 - 3 - 1, "what is left of the limit"
        assert last.context == (BOS, *ids_of("user:hi\n"), *ids_of("xyz!"), *ids_of("ab"))


async def test_a_natural_end_is_a_stop(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, prompt="hi")
        assert (await finish_of(engine, spec, request)).reason == "stop"


@pytest.mark.parametrize(
    ("request_fields", "own_system", "prompt"),
    [
        ({"prompt": "hi"}, "be kind", "system:be kind\nuser:hi\n"),
        ({"prompt": "hi", "system": "be brief"}, "be kind", "system:be brief\nuser:hi\n"),
        ({"prompt": "hi", "system": ""}, "be kind", "user:hi\n"),
        ({"prompt": "hi", "raw": True}, "be kind", "hi"),
    ],
)
async def test_how_a_prompt_is_rendered(
    tmp_path: Path, request_fields: dict[str, Any], own_system: str, prompt: str
):
    spec = msgspec.structs.replace(fake_model(tmp_path), system=own_system)
    async with running_engine(tmp_path / "run") as engine:
        last = await finish_of(engine, spec, GenerateRequest(spec.name, **request_fields))
        assert last.prompt_eval_count == 1 + len(prompt)
        assert last.context == (
            () if "raw" in request_fields else (BOS, *ids_of(prompt), *ids_of("abcde"))
        )


async def test_context_goes_before_the_new_prompt_without_a_second_bos(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        first = await finish_of(engine, spec, GenerateRequest(spec.name, prompt="hi"))
        again = GenerateRequest(spec.name, prompt="more", context=first.context)
        second = await finish_of(engine, spec, again)
        assert second.context == (*first.context, *ids_of("user:more\n"), *ids_of("abcde"))


async def test_a_bos_in_the_text_is_not_doubled(tmp_path: Path):
    spec = fake_model(tmp_path, spellings={"<s>hi": [BOS, *ids_of("hi")]})
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, prompt="<s>hi", raw=True)
        assert (await finish_of(engine, spec, request)).prompt_eval_count == 3


async def test_a_long_chat_loses_its_oldest_messages(tmp_path: Path):
    spec = fake_model(tmp_path)
    turns = [Message("user", f"{number:02}") for number in range(20)]
    messages = (turns[0], Message("system", "rules"), *turns[1:])
    # 8 characters a turn, 13 for the system message, one BOS: 6 turns fit into 63.
    options = Options(num_ctx=64)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, messages=messages, options=options)
        last = await finish_of(engine, spec, request)
        assert last.prompt_eval_count == 1 + 13 + 6 * 8
        assert last.context == ()
        whole = msgspec.structs.replace(request, truncate=False)
        failure = await failure_of(engine, spec, whole)
        assert failure.code == "PROMPT_TOO_LONG"
        assert failure.details == {"prompt_tokens": 174, "context_length": 64}
        assert "174" in failure.message
        assert "64" in failure.message


async def test_a_chat_whose_last_message_is_too_long_is_refused(tmp_path: Path):
    spec = fake_model(tmp_path)
    messages = (Message("user", "hi"), Message("user", "x" * 100))
    options = Options(num_ctx=64)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, messages=messages, options=options)
        assert (await failure_of(engine, spec, request)).details["prompt_tokens"] == 107


async def test_a_prompt_of_exactly_the_context_leaves_no_room(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        options = Options(num_ctx=64)
        fits = GenerateRequest(spec.name, prompt="x" * 62, raw=True, options=options)
        assert (await finish_of(engine, spec, fits)).prompt_eval_count == 63
        full = msgspec.structs.replace(fits, prompt="x" * 63)
        assert (await failure_of(engine, spec, full)).code == "PROMPT_TOO_LONG"


async def test_an_empty_prompt_loads_and_unloads(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        (loaded,) = await events_of(engine, spec, GenerateRequest(spec.name))
        assert isinstance(loaded, Finished)
        assert loaded.reason == "load"
        assert loaded.load_duration > 0
        assert len(engine.loaded()) == 1
        (unloaded,) = await events_of(
            engine, spec, GenerateRequest(spec.name, messages=(), keep_alive_s=0)
        )
        assert isinstance(unloaded, Finished)
        assert unloaded.reason == "unload"
        assert engine.loaded() == ()


async def test_untold_tokens_are_looked_up(tmp_path: Path):
    script = [
        {"content": "🎉", "tokens": [30], "tokens_predicted": 3},
        {"content": "é", "tokens": [41], "tokens_predicted": 5},
        {"content": "x", "tokens": [120], "tokens_predicted": 6},
        {"stop": True, "stop_type": "limit", "tokens_predicted": 6},
    ]
    spellings = {"🎉": [28, 29, 30], "é": [99], "\né": [10, 40, 41]}
    spec = fake_model(tmp_path, script=script, spellings=spellings)
    async with running_engine(tmp_path / "run") as engine:
        *chunks, last = await events_of(engine, spec, GenerateRequest(spec.name, "script"))
        assert chunks == [Chunk("🎉", (28, 29, 30)), Chunk("é", (40, 41)), Chunk("x", (120,))]
        assert isinstance(last, Finished)
        assert last.context[-6:] == (28, 29, 30, 40, 41, 120)


async def test_a_spelling_that_cannot_be_known_is_the_tokenizers(tmp_path: Path):
    script = [
        {"content": "🎉", "tokens": [77], "tokens_predicted": 3},
        {"stop": True, "stop_type": "limit", "tokens_predicted": 3},
    ]
    spec = fake_model(tmp_path, script=script, spellings={"🎉": [28, 29, 30]})
    async with running_engine(tmp_path / "run") as engine:
        chunks = await events_of(engine, spec, GenerateRequest(spec.name, "script"))
        assert chunks[0] == Chunk("🎉", (28, 29, 30))


async def test_text_held_at_a_limit_is_given_back(tmp_path: Path):
    script = [
        {"content": "a", "tokens": [97], "tokens_predicted": 1},
        {"content": "", "tokens": [98], "tokens_predicted": 2},
        {"stop": True, "stop_type": "limit", "tokens_predicted": 2},
    ]
    spec = fake_model(tmp_path, script=script)
    async with running_engine(tmp_path / "run") as engine:
        *chunks, _ = await events_of(engine, spec, GenerateRequest(spec.name, "script"))
        assert chunks == [Chunk("a", (97,)), Chunk("b", (98,))]


async def test_leaving_early_stops_the_runners_work(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
            await events.receive()
            client = client_of(tmp_path / "run")
            assert [slot.is_processing for slot in await client.slots()].count(True) == 1
        assert engine.loaded()[0].busy == 0
        with trio.fail_after(DEADLINE_S):
            while any(slot.is_processing for slot in await client.slots()):  # noqa: ASYNC110
                await trio.sleep(0.001)
        client.close()


async def test_cancelling_in_mid_stream_leaves_clean_state(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        with trio.move_on_after(DEADLINE_S) as scope:
            async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
                async for _ in events:
                    scope.cancel()
        assert scope.cancelled_caught
        (loaded,) = engine.loaded()
        assert (loaded.busy, loaded.queued) == (0, 0)
        await finish_of(engine, spec, GenerateRequest(spec.name, "hi"))


async def test_requests_beyond_the_slots_wait_in_a_bounded_queue(tmp_path: Path):
    spec = fake_model(tmp_path)
    endless = GenerateRequest(spec.name, "endless")
    finished: list[Finished] = []
    async with running_engine(tmp_path / "run", num_parallel=1, max_queue=1) as engine:

        async def wait_in_line() -> None:
            finished.append(await finish_of(engine, spec, GenerateRequest(spec.name, "hi")))

        async with trio.open_nursery() as nursery, engine.generate(spec, endless) as events:
            await events.receive()
            nursery.start_soon(wait_in_line)
            await trio.testing.wait_all_tasks_blocked(0.01)
            (loaded,) = engine.loaded()
            assert (loaded.slots, loaded.busy, loaded.queued) == (1, 1, 1)
            failure = await failure_of(engine, spec, GenerateRequest(spec.name, "hi"))
            assert (failure.code, failure.status) == ("QUEUE_FULL", 503)
            assert not finished
        assert len(finished) == 1


async def test_a_slot_that_was_left_is_asked_for_when_the_runner_has_left_it_too(tmp_path: Path):
    spec = fake_model(tmp_path, lingers=3)
    async with running_engine(tmp_path / "run", num_parallel=1) as engine:
        for _ in range(2):
            async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
                assert isinstance(await events.receive(), Chunk)
        assert (await finish_of(engine, spec, GenerateRequest(spec.name, "hi"))).reason == "stop"


@pytest.fixture
async def occupied(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine whose only slot gives an endless answer."""
    spec = fake_model(tmp_path)
    async with (
        running_engine(tmp_path / "run", num_parallel=1) as engine,
        engine.generate(spec, GenerateRequest(spec.name, "endless")) as events,
    ):
        await events.receive()
        yield engine


async def test_who_only_counts_waits_for_no_slot(occupied: Engine, tmp_path: Path):
    spec = fake_model(tmp_path)
    asked = GenerateRequest(spec.name, "hi", only_counts=True)
    with trio.fail_after(5):
        counted = await finish_of(occupied, spec, asked)
    assert counted.prompt_eval_count == 1 + len("user:hi\n")
    assert counted.eval_count == 0


async def test_who_stops_waiting_leaves_the_queue(occupied: Engine, tmp_path: Path):
    spec = fake_model(tmp_path)
    with trio.move_on_after(0.05):
        await events_of(occupied, spec, GenerateRequest(spec.name, "endless"))
    assert occupied.loaded()[0].queued == 0


async def test_what_the_runner_refuses_is_the_clients_fault(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        failure = await failure_of(engine, spec, GenerateRequest(spec.name, "refuse"))
        assert failure == Failed("INVALID_REQUEST", "failed to parse grammar", 400)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"format": "yaml"}, "INVALID_FORMAT"),
        ({"format": "[1]"}, "INVALID_FORMAT"),
        ({"format": '{"type":"banana"}'}, "INVALID_FORMAT"),
        ({"options": Options(num_ctx=0)}, "INVALID_OPTION"),
        ({"options": Options(num_ctx=1 << 40)}, "INVALID_OPTION"),
        ({"options": Options(num_batch=0)}, "INVALID_OPTION"),
    ],
)
async def test_wrong_values_are_refused(tmp_path: Path, fields: dict[str, Any], code: str):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        failure = await failure_of(engine, spec, GenerateRequest(spec.name, "hi", **fields))
        assert (failure.code, failure.status) == (code, 400)


async def test_a_schema_that_the_runner_enforces_is_taken(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        for format_ in ("json", '{"type":"string"}', '{"type":"string"}'):
            request = GenerateRequest(spec.name, "hi", format=format_)
            assert (await finish_of(engine, spec, request)).eval_count == 5


@pytest.mark.parametrize(("slots", "tried_in"), [(2, 1), (1, 0)])
async def test_a_schema_is_tried_where_no_conversation_is_lost(
    tmp_path: Path, slots: int, tried_in: int
):
    spec = fake_model(tmp_path, tries_schemas_in=tried_in)
    async with running_engine(tmp_path / "run", num_parallel=slots) as engine:
        talk = GenerateRequest(spec.name, "where is the station? " * 20)
        await finish_of(engine, spec, talk)
        for format_ in ('{"type":"string"}', '{"type":"number"}'):
            asked = msgspec.structs.replace(talk, format=format_)
            assert (await finish_of(engine, spec, asked)).eval_count == 5


async def test_a_failed_load_is_an_event(tmp_path: Path):
    spec = fake_model(tmp_path, exit_code=3)
    async with running_engine(tmp_path / "run") as engine:
        failure = await failure_of(engine, spec, GenerateRequest(spec.name, "hi"))
        assert failure.code == "LOAD_FAILED"
        assert "exit code 3" in failure.message


async def test_an_error_inside_the_block_comes_out_as_it_is(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:

        async def fail_inside() -> None:
            async with engine.generate(spec, GenerateRequest(spec.name, "endless")) as events:
                await events.receive()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_inside()
        assert engine.loaded()[0].busy == 0


async def test_embeddings_come_in_order_of_the_inputs(tmp_path: Path):
    spec = fake_model(tmp_path)
    inputs = tuple("x" * length for length in range(1, 70))
    async with running_engine(tmp_path / "run") as engine:
        embeddings = await engine.embed(spec, EmbedRequest(spec.name, inputs))
        assert [vector[0] for vector in embeddings.vectors] == list(range(2, 71))  # with BOS
        assert embeddings.prompt_eval_count == sum(range(2, 71))
        assert 0 < embeddings.load_duration < embeddings.total_duration


async def test_embeddings_of_nothing_only_load(tmp_path: Path):
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        assert (await engine.embed(spec, EmbedRequest(spec.name, ()))).vectors == ()
        assert len(engine.loaded()) == 1


async def test_an_input_too_long_to_embed_is_cut_or_refused(tmp_path: Path):
    spec = fake_model(tmp_path)
    request = EmbedRequest(spec.name, ("x" * 100,), Options(num_batch=32))
    async with running_engine(tmp_path / "run") as engine:
        assert (await engine.embed(spec, request)).prompt_eval_count == 32
        with pytest.raises(InferenceError, match="101 tokens"):
            await engine.embed(spec, msgspec.structs.replace(request, truncate=False))
