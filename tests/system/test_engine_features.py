"""What a request may ask beyond plain text, with the real model: pictures, likelihoods, templates.

No trained projector can be had here. One of random numbers does: llama.cpp runs it like any other,
so all of the way from a PNG to other text is real, but what the text says.
"""

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Likelihood,
    Message,
    Options,
)
from ollamad.core.state import ModelDetails
from ollamad.engine.engine import Engine
from ollamad.engine.spec import ModelSpec
from tests.fakes import ollama_templates as published
from tests.fakes.projector_files import PATCHES, png, write_projector
from tests.fakes.runner_engines import REAL_RUNNER, events_of, running_engine

pytestmark = [pytest.mark.model, pytest.mark.system]

WIDTH = 576  # of SmolLM2's embeddings
GREEDY = Options(temperature=0, num_predict=8, num_thread=1)
CAPITAL = "The capital of France is"
RED, BLUE = png(255, 0, 0), png(0, 0, 255)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    with trio.fail_after(300):
        async with running_engine(
            tmp_path / "run", runner_command=REAL_RUNNER, context_length=1024, num_parallel=2
        ) as engine:
            yield engine


@pytest.fixture
def spec(smollm2_path: Path) -> ModelSpec:
    details = ModelDetails(context_length=8192, embedding_length=WIDTH)
    size = smollm2_path.stat().st_size
    return ModelSpec("smollm2:latest", "sha256:smollm2", str(smollm2_path), size, details)


async def run(engine: Engine, spec: ModelSpec, **fields: Any) -> list[Event]:
    request = GenerateRequest(spec.name, **{"options": GREEDY} | fields)
    return await events_of(engine, spec, request)


def text_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, Chunk))


def likelihoods(events: list[Event]) -> list[Likelihood]:
    assert isinstance(events[-1], Finished), events[-1]
    return [each for event in events if isinstance(event, Chunk) for each in event.logprobs]


def failure(events: list[Event]) -> Failed:
    assert isinstance(events[-1], Failed), events
    return events[-1]


async def test_pictures_are_seen(engine: Engine, spec: ModelSpec, tmp_path: Path):
    projector = str(write_projector(tmp_path / "mmproj.gguf", WIDTH))
    seeing = msgspec.structs.replace(spec, projector_path=projector)

    async def said(*images: bytes, **fields: Any) -> tuple[str, Finished]:
        events = await run(engine, seeing, prompt="What is it?", images=images, **fields)
        end = events[-1]
        assert isinstance(end, Finished), end
        return text_of(events), end

    red, red_end = await said(RED)
    blue, _ = await said(BLUE)
    again, _ = await said(RED)
    none, none_end = await said()
    assert red == again
    assert len({red, blue, none}) == 3
    assert red_end.prompt_eval_count == none_end.prompt_eval_count + PATCHES
    _, both_end = await said(RED, BLUE)
    assert both_end.prompt_eval_count == none_end.prompt_eval_count + 2 * PATCHES
    # A context of token ids cannot hold a picture.
    assert none_end.context
    assert red_end.context == ()
    # In a chat, each picture stands in its own message.
    chat = [Message("user", "What is it?", images=(RED,)), Message("assistant", "Red.")]
    asked = (*chat, Message("user", "And this?", images=(BLUE,)))
    other = (*chat, Message("user", "And this?", images=(RED,)))
    for think in ("", "off"):  # with thoughts to be told apart, llama.cpp makes the prompt itself
        first, second, again_first = [
            likelihoods(await run(engine, seeing, messages=each, logprobs=0, think=think))
            for each in (asked, other, asked)
        ]
        assert first == again_first
        assert first != second
    raw, raw_end = await said(RED, raw=True)
    assert raw
    assert raw_end.prompt_eval_count < red_end.prompt_eval_count
    # The rest of an answer, as another node would go on with it.
    events = await run(engine, seeing, prompt="What is it?", images=(RED,))
    ids = [id_ for event in events if isinstance(event, Chunk) for id_ in event.tokens]
    rest = await run(engine, seeing, prompt="What is it?", images=(RED,), resume=tuple(ids[:3]))
    assert len(text_of(rest)) > 0
    bad = await run(engine, seeing, prompt="x", images=(b"no picture",))
    assert failure(bad).status == 400


async def test_a_model_without_a_projector_sees_nothing(engine: Engine, spec: ModelSpec):
    failed = failure(await run(engine, spec, prompt="What is it?", images=(RED,)))
    assert (failed.status, failed.code) == (400, "NOT_SUPPORTED")
    assert failed.message == "registry.ollama.ai/library/smollm2:latest does not support vision"


async def test_how_likely_each_token_was(engine: Engine, spec: ModelSpec):
    events = await run(engine, spec, prompt=CAPITAL, raw=True, logprobs=3)
    likely = likelihoods(events)
    assert b"".join(each.token for each in likely).decode() == text_of(events)
    assert len(likely) == 8
    for each in likely:
        assert len(each.others) == 3
        assert each.others[0] == Likelihood(each.token, each.logprob)  # greedy
        assert all(-50 < other.logprob <= 0 for other in each.others)
        assert sum(math.exp(other.logprob) for other in each.others) <= 1.001
    alone = await run(engine, spec, prompt=CAPITAL, raw=True, logprobs=0)
    first = alone[0]
    assert isinstance(first, Chunk)
    assert first.logprobs == (Likelihood(likely[0].token, likely[0].logprob),)
    chat = await run(engine, spec, messages=(Message("user", "Hi"),), think="off", logprobs=2)
    told = likelihoods(chat)
    assert b"".join(each.token for each in told).decode() == text_of(chat)


async def test_a_token_that_is_banned_does_not_come(engine: Engine, spec: ModelSpec):
    plain = await run(engine, spec, prompt=CAPITAL, raw=True)
    first = plain[0]
    assert isinstance(first, Chunk)
    banned = await run(
        engine, spec, prompt=CAPITAL, raw=True, logit_bias=((first.tokens[0], -100.0),)
    )
    assert isinstance(banned[0], Chunk)
    assert banned[0].tokens != first.tokens


async def test_a_template_of_ollamas_kind_says_what_the_files_own_says(
    engine: Engine, spec: ModelSpec
):
    messages = (Message("system", "Be brief."), Message("user", "What is the capital of France?"))
    plain = await run(engine, spec, messages=messages)
    chatml = msgspec.structs.replace(spec, template=published.CHATML)
    with_template = await run(engine, chatml, messages=messages)
    assert text_of(with_template) == text_of(plain)
    ends = plain[-1], with_template[-1]
    counts = [end.prompt_eval_count for end in ends if isinstance(end, Finished)]
    assert counts[0] == counts[1]
    # The request's own one goes before.
    bare = await run(engine, chatml, prompt=CAPITAL, template="{{ .Prompt }}")
    raw = await run(engine, chatml, prompt=CAPITAL, raw=True)
    assert text_of(bare) == text_of(raw)
    assert "Paris" in text_of(bare)
    failed = failure(await run(engine, chatml, prompt="x", template="{{ .Prompt.Missing }}"))
    assert (failed.status, failed.code) == (400, "INVALID_TEMPLATE")
    # One that cannot be read is left aside.
    broken = msgspec.structs.replace(spec, template="{{ if }}")
    assert text_of(await run(engine, broken, messages=messages)) == text_of(plain)


async def test_filling_in_needs_a_template_or_a_vocabulary_for_it(engine: Engine, spec: ModelSpec):
    failed = failure(await run(engine, spec, prompt="def f(", suffix="return x"))
    assert failed.message == "registry.ollama.ai/library/smollm2:latest does not support insert"
    code = msgspec.structs.replace(spec, template=published.INFILL)
    assert text_of(await run(engine, code, prompt="def f(", suffix="return x"))


async def test_an_answer_without_shift_ends_where_the_context_does(engine: Engine, spec: ModelSpec):
    options = Options(temperature=0, num_ctx=64, num_thread=1, num_predict=100)
    fields: dict[str, Any] = {"prompt": CAPITAL, "raw": True, "options": options}
    *_, end = await run(engine, spec, shift=False, **fields)
    assert isinstance(end, Finished)
    assert end.reason == "length"
    assert end.prompt_eval_count + end.eval_count == 64
    *_, shifted = await run(engine, spec, **fields)
    assert isinstance(shifted, Finished)
    assert shifted.eval_count == 100


async def test_counting_and_the_stop_that_came(engine: Engine, spec: ModelSpec):
    [counted] = await run(engine, spec, prompt=CAPITAL, only_counts=True)
    *_, end = await run(engine, spec, prompt=CAPITAL)
    assert isinstance(counted, Finished)
    assert isinstance(end, Finished)
    assert counted.prompt_eval_count == end.prompt_eval_count > 10
    options = msgspec.structs.replace(GREEDY, stop=("Paris", "never"))
    *_, stopped = await run(engine, spec, prompt=CAPITAL, raw=True, options=options)
    assert isinstance(stopped, Finished)
    assert (stopped.reason, stopped.stop_text) == ("stop", "Paris")


async def test_conversations_with_one_system_prompt_keep_their_caches(
    engine: Engine, spec: ModelSpec
):
    system = Message("system", "You keep the lighthouse of a small town. " * 12)
    talks = {name: [system] for name in ("Anna", "Bert")}
    read = 0
    for turn in range(3):
        for name, messages in talks.items():
            asked = f"{name} asks for the {turn}. time: how far does the light reach? " * 4
            messages.append(Message("user", asked))
            events = await run(engine, spec, messages=tuple(messages))
            messages.append(Message("assistant", text_of(events)))
            end = events[-1]
            assert isinstance(end, Finished)
            if turn:
                # All but what is new, and what the template puts around it.
                assert end.prompt_eval_count - end.prompt_cached_count < 110, (turn, name)
            read += end.prompt_eval_count
    assert read > 6 * 200
