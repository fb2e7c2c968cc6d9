"""The engine with a real model: what llama.cpp does is what the engine promises."""

import dataclasses
import glob
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio

from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Message,
    Options,
)
from ollamad.core.state import ModelDetails
from ollamad.engine import check
from ollamad.engine.engine import Engine
from ollamad.engine.llama_client import LlamaClient
from ollamad.engine.spec import ModelSpec
from tests.fakes.runner_engines import REAL_RUNNER, events_of, running_engine
from tests.fakes.tiny_llama import random_llama

pytestmark = [pytest.mark.model, pytest.mark.system]

DEADLINE_S = 60  # for anything at all, on a busy machine
WIDTH = 576  # of SmolLM2's embeddings
KV_BYTES = 30 * 2 * 3 * 64 * 2  # layers, key and value, heads, width, f16
GREEDY = Options(temperature=0, num_predict=24)


async def test_a_file_is_checked_without_its_weights(tmp_path: Path, smollm2_path: Path) -> None:
    """By the real llama.cpp: files that are right, of an unknown kind, damaged, or Ollama's own."""
    llama = random_llama()
    missing = {k: v for k, v in llama.weights.items() if k != "blk.1.ffn_up.weight"}
    more = llama.weights | {"v.blk.0.ln1.weight": llama.weights["output_norm.weight"]}
    unknown = tmp_path / "unknown"
    unknown.write_bytes(llama.gguf().replace(b"llama", b"lxxma"))
    for path, words in (
        (smollm2_path, ""),
        (llama.write(tmp_path / "good"), ""),
        (unknown, "does not know the architecture lxxma"),
        (dataclasses.replace(llama, weights=missing).write(tmp_path / "missing"), "'blk.1.ffn_up"),
        (dataclasses.replace(llama, weights=more).write(tmp_path / "more"), "need its own patches"),
    ):
        reason = await check.refusal(REAL_RUNNER, str(path), tmp_path / "s.sock")
        assert (words in reason) if words else (reason == ""), reason
    assert not (tmp_path / "s.sock").exists()


@pytest.fixture
def spec(smollm2_path: Path) -> ModelSpec:
    details = ModelDetails(context_length=8192, embedding_length=WIDTH, kv_bytes_per_token=KV_BYTES)
    size = smollm2_path.stat().st_size
    return ModelSpec(
        "smollm2:latest",
        "sha256:smollm2",
        str(smollm2_path),
        size,
        details,
        # Two threads wait for each other; beside other tests one is faster.
        options=Options(num_thread=1),
    )


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    with trio.fail_after(5 * DEADLINE_S):
        async with running_engine(
            tmp_path / "run", runner_command=REAL_RUNNER, context_length=1024
        ) as engine:
            yield engine


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def ids_of(events: list[Event]) -> list[int]:
    return [id_ for event in events if isinstance(event, Chunk) for id_ in event.tokens]


def finish(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


def client_of(tmp_path: Path) -> LlamaClient:
    (path,) = glob.glob(str(tmp_path / "run" / "*.sock"))  # noqa: PTH207
    return LlamaClient(Path(path))


def runner_pid() -> int:
    (child,) = [
        child for child in psutil.Process().children() if "ollamad.engine.runner" in child.cmdline()
    ]
    return child.pid


async def run(engine: Engine, spec: ModelSpec, **fields: Any) -> list[Event]:
    return await events_of(engine, spec, GenerateRequest(spec.name, **fields))


async def test_greedy_text_is_reproducible_and_told_token_by_token(
    engine: Engine, spec: ModelSpec, tmp_path: Path
):
    # Long enough for a slot to be known by it.
    question = "What is the capital of France? " * 8
    fields = {"prompt": question, "options": GREEDY}
    first = await run(engine, spec, **fields)
    second = await run(engine, spec, **fields)
    assert len(text_of(first)) > 20
    assert text_of(second) == text_of(first)
    assert ids_of(second) == ids_of(first)
    client = client_of(tmp_path)
    assert await client.detokenize(ids_of(first)) == text_of(first)
    client.close()
    end = finish(first)
    ended_by_itself = end.reason == "stop"
    assert end.eval_count == len(ids_of(first)) + ended_by_itself
    assert end.context[-len(ids_of(first)) :] == tuple(ids_of(first))
    assert end.prompt_eval_count == len(end.context) - len(ids_of(first))
    assert min(end.prompt_eval_duration, end.eval_duration, end.load_duration) > 0
    assert end.total_duration > end.load_duration + end.eval_duration
    assert finish(second).prompt_cached_count > 0
    assert finish(second).load_duration < end.load_duration / 10


async def test_the_same_seed_gives_the_same_text_and_another_one_another(
    engine: Engine, spec: ModelSpec
):
    async def tell(seed: int) -> str:
        options = Options(seed=seed, temperature=1.2, num_predict=24)
        return text_of(await run(engine, spec, prompt="Tell me a story.", options=options))

    await tell(7)  # from here on the prompt's evaluation is cached for all alike
    assert await tell(7) == await tell(7)
    assert await tell(7) != await tell(8)


async def test_num_predict_bounds_the_answer(engine: Engine, spec: ModelSpec):
    options = Options(temperature=0, num_predict=5)
    events = await run(engine, spec, prompt="Count to a hundred.", options=options)
    assert finish(events).reason == "length"
    assert finish(events).eval_count == len(ids_of(events)) == 5


async def test_stop_strings_across_tokens_never_leak(engine: Engine, spec: ModelSpec):
    counting = {"prompt": "1 2 3 4 5 6 7 8", "raw": True}
    free = await run(engine, spec, **counting, options=GREEDY)
    assert text_of(free).startswith(" 9 10 11 12")
    assert finish(free).context == ()

    options = msgspec.structs.replace(GREEDY, stop=("11 1", "never"))
    stopped = await run(engine, spec, **counting, options=options)
    assert text_of(stopped) == " 9 10 "
    assert finish(stopped).reason == "stop"
    assert ids_of(stopped) == ids_of(free)[: len(ids_of(stopped))]

    # What only looked like a stop string comes out whole, at the limit too.
    options = msgspec.structs.replace(GREEDY, num_predict=10, stop=("11 1x",))
    fooled = await run(engine, spec, **counting, options=options)
    assert text_of(free).startswith(text_of(fooled))
    assert ids_of(fooled) == ids_of(free)[:10]


async def test_characters_of_several_tokens_come_whole(
    engine: Engine, spec: ModelSpec, tmp_path: Path
):
    options = msgspec.structs.replace(GREEDY, num_predict=60)
    prompt = "Repeat exactly: 😀🎉🦄中文 ok"
    events = await run(engine, spec, prompt=prompt, options=options)
    assert "🎉" in text_of(events)
    assert "\ufffd" not in text_of(events)
    client = client_of(tmp_path)
    assert await client.detokenize(ids_of(events)) == text_of(events)
    client.close()
    # The limit may cut a character: its tokens make no text and are not told.
    assert finish(events).eval_count - len(ids_of(events)) in range(4)


async def test_a_limit_inside_a_character_gives_no_broken_text(engine: Engine, spec: ModelSpec):
    options = msgspec.structs.replace(GREEDY, num_predict=2)
    prompt = "🎉 🎉🎉🎉🎉🎉🎉"
    events = await run(engine, spec, prompt=prompt, raw=True, options=options)
    assert finish(events).eval_count == 2
    assert text_of(events) == ""
    assert ids_of(events) == []


async def test_a_json_schema_shapes_the_answer(engine: Engine, spec: ModelSpec):
    schema = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'
    options = Options(temperature=0, num_predict=60)
    for format_, keys in ((schema, {"n"}), ("json", None)):
        events = await run(
            engine, spec, prompt="Give a number as JSON.", format=format_, options=options
        )
        if finish(events).reason == "stop":
            answer = msgspec.json.decode(text_of(events))
            assert isinstance(answer, dict)
            assert keys is None or set(answer) == keys
        else:
            assert text_of(events).lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema",
    ['{"$ref":"#/nowhere"}', '{"type":"banana"}', '{"not":{"type":"string"}}', '{"pattern":"("}'],
)
async def test_a_schema_that_cannot_be_enforced_is_refused(
    engine: Engine, spec: ModelSpec, schema: str
):
    (failed,) = await run(engine, spec, prompt="x", format=schema, options=GREEDY)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.status) == ("INVALID_FORMAT", 400)


async def test_a_conversation_as_a_chat_and_by_context(engine: Engine, spec: ModelSpec):
    chat = (Message("user", "My name is Ada."), Message("assistant", "Hello Ada!"))
    asked = (*chat, Message("user", "What is my name?"))
    events = await run(engine, spec, messages=asked, options=GREEDY)
    assert finish(events).context == ()

    first = finish(await run(engine, spec, prompt="My name is Ada.", options=GREEDY))
    second = finish(await run(engine, spec, prompt="What?", context=first.context, options=GREEDY))
    assert second.context[: len(first.context)] == first.context
    assert second.prompt_cached_count >= len(first.context) - 2


async def test_a_chat_too_long_keeps_system_and_last(engine: Engine, spec: ModelSpec):
    filler = [Message("user", "The weather is fine today. " * 20) for _ in range(10)]
    messages = (Message("system", "Be brief."), *filler, Message("user", "Say hello."))
    options = msgspec.structs.replace(GREEDY, num_ctx=512)
    events = await run(engine, spec, messages=messages, options=options)
    assert 300 < finish(events).prompt_eval_count < 512
    failed = await run(engine, spec, messages=messages, truncate=False, options=options)
    assert isinstance(failed[-1], Failed)
    assert failed[-1].code == "PROMPT_TOO_LONG"
    assert failed[-1].details["context_length"] == 512


async def test_an_answer_goes_on_beyond_the_context(engine: Engine, spec: ModelSpec):
    options = Options(temperature=0, num_ctx=256, num_predict=400)
    numbers = " ".join(str(number) for number in range(1, 60))
    events = await run(engine, spec, prompt=numbers, raw=True, options=options)
    assert finish(events).prompt_eval_count + finish(events).eval_count > 256
    assert engine.loaded()[0].context_length == 256


@pytest.mark.parametrize("in_the_prompt", [False, True])
async def test_leaving_frees_the_slot_within_a_second(
    engine: Engine, spec: ModelSpec, tmp_path: Path, in_the_prompt: bool
):
    prompt = "The weather is fine today. " * 140 if in_the_prompt else "1 2 3"
    request = GenerateRequest(spec.name, prompt, raw=True, options=Options(num_predict=1000))
    await engine.load(spec)
    client = client_of(tmp_path)
    limit_s = 1.0
    if in_the_prompt:
        # llama.cpp reads a batch of 512 tokens to its end; how long that takes now is measured now.
        begun = time.perf_counter()
        await run(
            engine,
            spec,
            prompt="It rains a lot here. " * 85,
            raw=True,
            options=Options(num_predict=1),
        )
        limit_s += time.perf_counter() - begun
    async with engine.generate(spec, request) as events:
        if in_the_prompt:
            with trio.move_on_after(0.3) as scope:
                await events.receive()
            assert scope.cancelled_caught
            left = time.perf_counter()
        else:
            assert isinstance(await events.receive(), Chunk)
            assert any(slot.is_processing for slot in await client.slots())
            left = time.perf_counter()
    while any(slot.is_processing for slot in await client.slots()):  # noqa: ASYNC110
        await trio.sleep(0.005)
    assert time.perf_counter() - left < limit_s
    client.close()


async def test_four_streams_at_once_do_not_mix(engine: Engine, spec: ModelSpec):
    prompts = [" ".join(str(100 * k + n) for n in range(1, 13)) for k in (1, 3, 5, 7)]
    options = Options(temperature=0, num_predict=40)
    texts: dict[str, str] = {}
    busiest = 0

    async def one(prompt: str) -> None:
        nonlocal busiest
        parts = []
        request = GenerateRequest(spec.name, prompt=prompt, raw=True, options=options)
        async with engine.generate(spec, request) as events:
            async for event in events:
                assert not isinstance(event, Failed)
                busiest = max(busiest, engine.loaded()[0].busy)
                parts.append(event)
        texts[prompt] = text_of(parts)

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    assert busiest == 4
    for prompt in prompts:
        hundreds = prompt[0]
        assert texts[prompt].split()[:3] == [f"{hundreds}{n}" for n in (13, 14, 15)]


async def test_embeddings(engine: Engine, spec: ModelSpec):
    inputs = ("The cat sits on the mat.", "A cat is sitting on a mat.", "Stock prices fell.")
    answer = await engine.embed(spec, EmbedRequest(spec.name, inputs))
    assert [len(vector) for vector in answer.vectors] == [WIDTH] * 3
    for vector in answer.vectors:
        assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-4)
    near, far = (
        sum(a * b for a, b in zip(answer.vectors[0], other, strict=True))
        for other in answer.vectors[1:]
    )
    assert near > far
    assert answer.prompt_eval_count > 10
    # The same runner goes on generating.
    assert finish(await run(engine, spec, prompt="Hi", options=GREEDY)).eval_count > 0
    long = EmbedRequest(spec.name, ("word " * 2000,))
    assert (await engine.embed(spec, long)).prompt_eval_count == 512


async def test_a_killed_runner_fails_its_stream_and_comes_back(engine: Engine, spec: ModelSpec):
    request = GenerateRequest(spec.name, prompt="Count to 1000: 1 2 3", raw=True)
    async with engine.generate(spec, request) as events:
        assert isinstance(await events.receive(), Chunk)
        os.kill(runner_pid(), signal.SIGKILL)
        with trio.fail_after(5):
            *_, last = [event async for event in events]
    assert isinstance(last, Failed)
    assert last.code == "RUNNER_DIED"
    assert finish(await run(engine, spec, prompt="Hi", options=GREEDY)).eval_count > 0


@pytest.mark.parametrize("content", [b"not a model", b"GGUF" + bytes(64)])
async def test_a_file_that_is_no_model_fails_quickly_and_clearly(
    engine: Engine, tmp_path: Path, content: bytes
):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    spec = ModelSpec("bad:latest", "sha256:bad", str(path), len(content))
    with trio.fail_after(10), pytest.raises(InferenceError, match=r"bad:latest.*gguf") as caught:
        await engine.load(spec)
    assert caught.value.failure.code == "LOAD_FAILED"
    assert caught.value.failure.details["log"]


async def test_a_cut_model_fails_quickly_and_clearly(
    engine: Engine, spec: ModelSpec, tmp_path: Path
):
    path = tmp_path / "cut.gguf"
    with open(spec.gguf_path, "rb") as whole:  # noqa: ASYNC230
        path.write_bytes(whole.read(50_000_000))
    with trio.fail_after(10), pytest.raises(InferenceError, match="could not be loaded"):
        await engine.load(msgspec.structs.replace(spec, gguf_path=str(path)))


async def test_the_estimate_covers_what_the_runner_takes(engine: Engine, spec: ModelSpec):
    await run(engine, spec, prompt="The weather is fine today. " * 100, options=GREEDY)
    resident = psutil.Process(runner_pid()).memory_info().rss
    assert resident < engine.estimate(spec) < 3 * resident


def test_a_runner_dies_with_its_daemon(spec: ModelSpec, tmp_path: Path):
    """Whenever the daemon is killed: while the model loads, and long after."""
    daemon = textwrap.dedent(
        f"""
        import subprocess, sys, time
        runner = subprocess.Popen(
            {[*REAL_RUNNER, "--socket", str(tmp_path / "s.sock"), "--model", spec.gguf_path]}
            + "--ctx 512 --parallel 1 --threads 1".split(),
            stdin=subprocess.PIPE, start_new_session=True,
        )
        print(runner.pid, flush=True)
        time.sleep(600)
        """
    )
    for seconds in (0.1, 0.3, 0.5, 3):
        (tmp_path / "s.sock").unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE) as parent:
            try:
                assert parent.stdout is not None
                runner = psutil.Process(int(parent.stdout.readline()))
                time.sleep(seconds)
                assert is_alive(runner)
            finally:
                parent.kill()
        deadline = time.monotonic() + 5
        while is_alive(runner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(runner)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_an_interrupt_from_the_terminal_does_not_reach_the_runner(
    engine: Engine, spec: ModelSpec
):
    await engine.load(spec)
    pid = runner_pid()
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGINT)
    assert finish(await run(engine, spec, prompt="Hi", options=GREEDY)).eval_count > 0
    assert runner_pid() == pid


async def test_the_runner_is_the_first_to_go_when_memory_runs_out(engine: Engine, spec: ModelSpec):
    await engine.load(spec)
    score = Path(f"/proc/{runner_pid()}/oom_score_adj").read_text()  # noqa: ASYNC240
    assert int(score) >= 500
