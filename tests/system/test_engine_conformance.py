"""Every engine keeps the same promises: one suite over all of them.

The models are tiny and made here (`tiny_llama`, `ggml_files`), so what is right is known: the
greedy answer by numpy, the text of a parrot by its maker. llama-server is the real program, from
a wheel of the development dependencies.
"""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
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
from ollamad.core.weights import CTRANSFORMERS, LLAMA_SERVER, XLLAMACPP
from ollamad.engine.engine import Engine
from ollamad.engine.llama_client import LlamaClient
from ollamad.engine.spec import ModelSpec
from ollamad.store.details import details_of, facts_of
from ollamad.store.weights import read_weights
from tests.fakes import chat_templates, ggml_files
from tests.fakes.ggml_files import ggml_bytes
from tests.fakes.llama_program import llama_server
from tests.fakes.runner_engines import REAL_RUNNER, events_of, running_engine
from tests.fakes.tiny_llama import BOS, FIRST_BYTE, TOKENS, TinyLlama, ids_of, parrot, random_llama

pytestmark = pytest.mark.system

DEADLINE_S = 60  # for anything at all, on a busy machine
CONTEXT = 128
LENGTH = 24  # tokens of an answer
GREEDY = Options(temperature=0, num_predict=LENGTH)
# As those of Mistral and Gemma have it; and one that stumbles.
ALTERNATING = """\
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}
{%- endif %}{{ message.content }}
{%- endfor %}"""
STUMBLING = ALTERNATING.replace("raise_exception('Conversation roles must alternate')", "1 | odd")
GPT_OSS = "{#- <|channel|> -#}"  # by this llama.cpp knows a family that it has code of its own for
TOOLS = '[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]'
PROMPT = "the be"
PROMPT_IDS = [BOS, TOKENS.index("\u2581the"), TOKENS.index("\u2581be")]
ROUND = b"abcdefghijklmnopqrstuvw"  # what the GPT-2 says behind an x, again and again


@dataclasses.dataclass(frozen=True)
class Kind:
    """An engine and the kind of file that it is given."""

    engine: str
    version: int  # of GGUF; 0: a GPT-2 from before
    by_parameter: bool = False  # chosen by the model's parameter, not by the file

    def __str__(self) -> str:
        return f"{self.engine}-{f'gguf{self.version}' if self.version else 'ggml'}"


LLAMAS = [
    Kind(XLLAMACPP, 3),
    Kind(XLLAMACPP, 2),
    Kind(LLAMA_SERVER, 3),
    Kind(CTRANSFORMERS, 1),
    Kind(CTRANSFORMERS, 2, by_parameter=True),
]
ALL = [*LLAMAS, Kind(CTRANSFORMERS, 0)]


@pytest.fixture
async def engine(tmp_path: Path, kind: Kind) -> AsyncIterator[Engine]:
    settings: dict[str, Any] = {"runner_command": REAL_RUNNER, "context_length": CONTEXT}
    if kind.engine == LLAMA_SERVER:
        settings["llama_server"] = str(llama_server())
    with trio.fail_after(DEADLINE_S):
        async with running_engine(tmp_path / "run", threads=1, **settings) as engine:
            yield engine


def spec_of(path: Path, data: bytes, kind: Kind) -> ModelSpec:
    """The model as a node knows it: by the header of its file, whose name says nothing."""
    path.write_bytes(data)
    facts = facts_of(read_weights(path))
    options = Options(engine=kind.engine) if kind.by_parameter else Options()
    return ModelSpec(
        name=f"{path.name}:latest",
        digest=f"sha256:{path.name}",
        gguf_path=str(path),
        size=len(data),
        details=details_of(facts),
        options=options,
        weights=facts.weights,
    )


def llama_spec(tmp_path: Path, kind: Kind, model: TinyLlama) -> ModelSpec:
    return spec_of(tmp_path / "model", model.gguf(kind.version), kind)


def parrot_spec(tmp_path: Path, kind: Kind, text: str) -> tuple[ModelSpec, list[int]]:
    """A model that says this text, and the tokens that it says it with: letters, or bytes."""
    if kind.version:
        ids = ids_of(text)
        return llama_spec(tmp_path, kind, parrot(ids)), ids
    ids = list(text.encode())
    return spec_of(tmp_path / "model", ggml_bytes("gpt2", ids), kind), ids


class Endless(NamedTuple):
    """A model whose answers have no end, with what it says to a prompt when it is greedy."""

    spec: ModelSpec
    prompt: str
    prompt_count: int  # its tokens
    expected: list[int]  # the first ones of the answer


def endless(tmp_path: Path, kind: Kind) -> Endless:
    if not kind.version:
        data = ggml_bytes("gpt2", ROUND, ends=False)
        spec = spec_of(tmp_path / "model", data, kind)
        return Endless(spec, "x", 1, [*ROUND, *ROUND][:LENGTH])
    model = random_llama()
    expected, margin = model.greedy(PROMPT_IDS, LENGTH)
    assert margin > 0.1  # else rounding would decide
    return Endless(llama_spec(tmp_path, kind, model), PROMPT, len(PROMPT_IDS), expected)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def tokens_of(events: list[Event]) -> list[int]:
    return [id_ for event in events if isinstance(event, Chunk) for id_ in event.tokens]


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


async def ask(engine: Engine, spec: ModelSpec, **fields: Any) -> list[Event]:
    return await events_of(engine, spec, GenerateRequest(spec.name, raw=True, **fields))


async def ask_and_go_on(engine: Engine, spec: ModelSpec, **fields: Any) -> list[Event]:
    """The answer; whose rest, from behind each part of it, must be what another node says.

    Behind a part there may be half a character, or a stop string that has begun: tokens that the
    node that was lost had written, and could not tell.
    """
    *parts, end = events = await ask(engine, spec, **fields)
    assert isinstance(end, Finished), end
    for count in range(1, len(parts) + 1):
        ids = tokens_of(parts[:count])
        rest = await ask(engine, spec, resume=tuple(ids), **fields)
        assert text_of(parts[:count]) + text_of(rest) == text_of(parts)
        assert ids + tokens_of(rest) == tokens_of(parts)
        assert end_of(rest).reason == end.reason
    return events


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_greedy_answers_are_those_of_the_reference(
    engine: Engine, kind: Kind, tmp_path: Path
):
    spec, prompt, prompt_count, expected = endless(tmp_path, kind)
    events = await ask(engine, spec, prompt=prompt, options=GREEDY)
    assert tokens_of(events) == expected
    end = end_of(events)
    assert (end.reason, end.eval_count, end.prompt_eval_count) == ("length", LENGTH, prompt_count)
    assert min(end.eval_duration, end.prompt_eval_duration, end.load_duration) > 0
    (loaded,) = engine.loaded()
    assert loaded.engine == kind.engine
    why = f"GGUF version {kind.version}, llama" if kind.version else "gpt2"
    assert ("parameter engine" if kind.by_parameter else why) in loaded.engine_reason
    # The answer goes on elsewhere from any token: with its prompt and what was said of it.
    resumed = await ask(engine, spec, prompt=prompt, options=GREEDY, resume=tuple(expected[:10]))
    assert tokens_of(resumed) == expected[10:]


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_stop_strings_end_an_answer_also_across_tokens_and_nodes(
    engine: Engine, kind: Kind, tmp_path: Path
):
    spec, ids = parrot_spec(tmp_path, kind, "Stopher,biz!")
    options = Options(temperature=0, stop=("er,",))
    events = await ask_and_go_on(engine, spec, prompt="x", options=options)
    assert text_of(events) == "Stoph"
    assert tokens_of(events) == ids[:5]
    assert end_of(events).reason == "stop"
    # What begins like a stop string, and is none, is said all the same.
    options = Options(temperature=0, stop=("herb", "bit", "!!"))
    events = await ask_and_go_on(engine, spec, prompt="x", options=options)
    assert text_of(events) == "Stopher,biz!"
    assert tokens_of(events) == ids
    # Also where the answer ends in the middle of it.
    options = Options(temperature=0, stop=("her,bizarre",), num_predict=7)
    events = await ask_and_go_on(engine, spec, prompt="x", options=options)
    assert (text_of(events), end_of(events).reason) == ("Stopher", "length")
    assert tokens_of(events) == ids[:7]


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_characters_that_are_split_over_tokens_come_whole_also_across_nodes(
    engine: Engine, kind: Kind, tmp_path: Path
):
    text = "5\u20ac,f\u00fc\U0001f999"
    spec, ids = parrot_spec(tmp_path, kind, text)
    assert len(ids) > len(text) + 4
    events = await ask_and_go_on(engine, spec, prompt="x", options=Options(temperature=0))
    assert text_of(events) == text, events
    assert tokens_of(events) == ids
    assert all("\ufffd" not in event.text for event in events if isinstance(event, Chunk))
    options = Options(temperature=0, stop=("\u00fc",))
    events = await ask_and_go_on(engine, spec, prompt="x", options=options)
    assert text_of(events) == "5\u20ac,f"


@pytest.mark.parametrize("kind", [Kind(XLLAMACPP, 3), Kind(LLAMA_SERVER, 3)], ids=str)
async def test_a_model_that_says_what_is_no_text_is_loaded_all_the_same(
    engine: Engine, kind: Kind, tmp_path: Path
):
    # Behind an `a`, which a model is tried with when it was loaded, comes half a character.
    ids = [TOKENS.index("a"), FIRST_BYTE + 0x82, TOKENS.index("b")]
    spec = llama_spec(tmp_path, kind, parrot(ids))
    events = await ask(engine, spec, prompt="x", options=Options(temperature=0))
    assert len(engine.loaded()) == 1
    if kind.engine == XLLAMACPP:
        assert (text_of(events), tokens_of(events)) == ("a\ufffdb", ids)
    else:
        failed = events[-1]
        assert isinstance(failed, Failed)
        assert failed.code == "ENGINE_ERROR"
        assert "no UTF-8" in failed.message


@pytest.mark.parametrize("kind", LLAMAS, ids=str)
async def test_a_prompt_may_have_more_tokens_than_characters(
    engine: Engine, kind: Kind, tmp_path: Path
):
    spec, ids = parrot_spec(tmp_path, kind, "ok!")
    events = await ask(engine, spec, prompt="\U0001f999" * 25 + "x", options=Options(temperature=0))
    assert tokens_of(events) == ids
    assert end_of(events).prompt_eval_count == 1 + 1 + 4 * 25 + 1  # BOS, the space in front


@pytest.mark.parametrize("kind", [Kind(XLLAMACPP, 3), Kind(LLAMA_SERVER, 3)], ids=str)
@pytest.mark.parametrize("family", ["", GPT_OSS])
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ALTERNATING, "Conversation roles must alternate"),
        (STUMBLING, "Unknown (built-in) filter 'odd' for type Integer"),
    ],
    ids=["refuses", "stumbles"],
)
async def test_what_a_template_says_of_a_conversation_that_it_does_not_take(
    engine: Engine, kind: Kind, family: str, template: str, said: str, tmp_path: Path
):
    data = parrot(ids_of("ok!")).gguf(3, **{"tokenizer.chat_template": family + template})
    spec = spec_of(tmp_path / "model", data, kind)
    turns = (Message("user", "a"), Message("user", "x"))
    for fields in ({}, {"think": "on"}, {"tools": TOOLS}, {"tools": TOOLS, "logprobs": 0}):
        [failed] = await events_of(
            engine, spec, GenerateRequest(spec.name, messages=turns, **fields)
        )
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (400, "INVALID_REQUEST")
        message = "the model's template does not take this conversation: "
        assert failed.message == message + said


@pytest.mark.parametrize("kind", [Kind(XLLAMACPP, 3), Kind(LLAMA_SERVER, 3)], ids=str)
@pytest.mark.parametrize("family", ["", GPT_OSS])
async def test_a_tool_whose_schema_is_none_is_the_clients_fault(
    engine: Engine, kind: Kind, family: str, tmp_path: Path
):
    data = parrot(ids_of("ok!")).gguf(
        3, **{"tokenizer.chat_template": family + chat_templates.TOOLS}
    )
    spec = spec_of(tmp_path / "model", data, kind)
    tools = TOOLS.replace('"object"', '"banana"')
    messages = (Message("user", "x"),)
    request = GenerateRequest(spec.name, messages=messages, tools=tools, tool_choice="required")
    [failed] = await events_of(engine, spec, request)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (400, "INVALID_REQUEST")
    assert "banana" in failed.message


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_a_seed_makes_luck_repeatable(engine: Engine, kind: Kind, tmp_path: Path):
    spec, prompt, *_ = endless(tmp_path, kind)

    async def answer(seed: int, *resume: int) -> list[int]:
        options = Options(temperature=1.5, num_predict=LENGTH, seed=seed, top_k=0, top_p=1.0)
        return tokens_of(await ask(engine, spec, prompt=prompt, options=options, resume=resume))

    first = await answer(1)
    assert await answer(1) == first
    others = [await answer(seed) for seed in range(2, 6)]
    assert all(other != first for other in others)
    assert len(set(map(tuple, others))) == len(others)
    if kind.engine == CTRANSFORMERS:  # its luck is that of the place, so it goes on elsewhere, too
        assert await answer(1, *first[:10]) == first[10:]


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_leaving_an_answer_ends_the_work_on_it(engine: Engine, kind: Kind, tmp_path: Path):
    spec, prompt, _, expected = endless(tmp_path, kind)
    options = Options(temperature=0, num_ctx=CONTEXT)
    request = GenerateRequest(spec.name, prompt=prompt, raw=True, options=options)
    async with engine.generate(spec, request) as events:
        for _ in range(5):
            assert isinstance(await events.receive(), Chunk)
    (path,) = (tmp_path / "run").glob("*.sock")
    client = LlamaClient(path)
    with trio.fail_after(2):
        while any(slot.is_processing for slot in await client.slots()):  # noqa: ASYNC110
            await trio.sleep(0.01)
    client.close()
    assert engine.loaded()[0].busy == 0
    assert tokens_of(await ask(engine, spec, prompt=prompt, options=GREEDY)) == expected


@pytest.mark.parametrize("kind", ALL, ids=str)
async def test_a_full_context(engine: Engine, kind: Kind, tmp_path: Path):
    data = random_llama().gguf(kind.version) if kind.version else ggml_bytes("gpt2")
    if not kind.version:
        # Its end is likely after anything; it has to be told to go on.
        data = ggml_bytes("gpt2", [ord("a")])
    spec = spec_of(tmp_path / "model", data, kind)
    context = 48
    small = Options(num_ctx=context, temperature=0, num_predict=100, num_keep=4)
    events = await ask(engine, spec, prompt="a" * 60, options=small)
    assert isinstance(events[-1], Failed)
    assert (events[-1].code, events[-1].status) == ("PROMPT_TOO_LONG", 400)
    assert events[-1].details["context_length"] == context
    if not kind.version:
        return
    # An answer goes on beyond the context, without its oldest part.
    events = await ask(engine, spec, prompt=PROMPT, options=small)
    assert (end_of(events).reason, len(tokens_of(events))) == ("length", 100)
    expected, _ = random_llama().greedy(PROMPT_IDS, 24)
    assert tokens_of(events)[:24] == expected


@pytest.mark.parametrize("kind", LLAMAS, ids=str)
async def test_embeddings_are_those_of_the_reference(engine: Engine, kind: Kind, tmp_path: Path):
    model = random_llama()
    spec = llama_spec(tmp_path, kind, model)
    answer = await engine.embed(spec, EmbedRequest(spec.name, (PROMPT, "be")))
    assert answer.prompt_eval_count == 5
    expected = [model.embedding(PROMPT_IDS), model.embedding([BOS, TOKENS.index("\u2581be")])]
    assert np.allclose(np.array(answer.vectors), np.array(expected), atol=2e-3)
    assert np.allclose(np.linalg.norm(answer.vectors, axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("kind", [Kind(XLLAMACPP, 3), Kind(LLAMA_SERVER, 3)], ids=str)
async def test_adapters_change_the_weights(engine: Engine, kind: Kind, tmp_path: Path):
    model = random_llama()
    adapted, data = model.adapted()
    (tmp_path / "adapter").write_bytes(data)
    spec = llama_spec(tmp_path, kind, model)
    spec = msgspec.structs.replace(spec, adapter_paths=(str(tmp_path / "adapter"),))
    expected, margin = adapted.greedy(PROMPT_IDS, 12)
    assert margin > 0.1
    assert expected != model.greedy(PROMPT_IDS, 12)[0]
    options = Options(temperature=0, num_predict=12)
    assert tokens_of(await ask(engine, spec, prompt=PROMPT, options=options)) == expected


@pytest.mark.parametrize("kind", [Kind(CTRANSFORMERS, 0)], ids=str)
async def test_what_an_engine_cannot_do_is_refused_with_the_reason(
    engine: Engine, kind: Kind, tmp_path: Path
):
    spec, _ = parrot_spec(tmp_path, kind, "abc")
    with pytest.raises(InferenceError, match="makes no embeddings with a gpt2 model") as caught:
        await engine.embed(spec, EmbedRequest(spec.name, ("x",)))
    assert caught.value.failure.code == "LOAD_FAILED"
    for fields, reason in (
        ({"format": "json"}, "json_schema"),
        ({"options": Options(mirostat=2)}, "mirostat"),
        ({"options": Options(min_p=0.1)}, "min_p"),
        ({"prompt": "a\0b"}, "NUL"),
    ):
        events = await ask(engine, spec, **({"prompt": "x"} | fields))
        assert isinstance(events[-1], Failed)
        assert (events[-1].code, events[-1].status) == ("INVALID_REQUEST", 400)
        assert reason in events[-1].message
    assert text_of(await ask(engine, spec, prompt="x", options=Options(temperature=0))) == "abc"


@pytest.mark.parametrize(
    "architecture", [name for name in ggml_files.NUMBERS if name not in ("falcon", "mpt")]
)
async def test_files_from_before_gguf_run_as_what_they_are(tmp_path: Path, architecture: str):
    data = ggml_bytes(architecture, b"Good!"[2:])
    spec = spec_of(tmp_path / "model.gguf", data, Kind(CTRANSFORMERS, 0))
    async with running_engine(tmp_path / "run", threads=1, runner_command=REAL_RUNNER) as engine:
        with trio.fail_after(DEADLINE_S):
            options = Options(temperature=0, num_predict=3)
            events = await ask(engine, spec, prompt="x", options=options)
        assert text_of(events) == "od!"
        assert architecture in engine.loaded()[0].engine_reason
