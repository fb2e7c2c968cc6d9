"""What the runner is asked: templates of Ollama's kind, text to fill in, pictures; fake runners."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import Chunk, Event, Failed, Finished, GenerateRequest, Message, Options
from ollamad.engine.engine import Engine
from ollamad.engine.llama_client import LlamaClient
from ollamad.engine.spec import ModelSpec
from tests.fakes import ollama_templates as published
from tests.fakes.fake_runner import BOS, MARKER
from tests.fakes.runner_engines import events_of, fake_model, running_engine

ECHO = "echo {{ range .Messages }}{{ .Role }}={{ .Content }};{{ end }}"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with running_engine(tmp_path / "run") as engine:
        yield engine


async def run(engine: Engine, spec: ModelSpec, **fields: Any) -> list[Event]:
    return await events_of(engine, spec, GenerateRequest(spec.name, **fields))


def said(events: list[Event]) -> str:
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, Chunk))


def refused(events: list[Event]) -> tuple[int, str]:
    assert isinstance(events[-1], Failed)
    return events[-1].status, events[-1].message


async def test_a_template_of_the_model_or_of_the_request(engine: Engine, tmp_path: Path):
    spec = msgspec.structs.replace(fake_model(tmp_path), template=ECHO, system="Rules")
    chat = (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    assert said(await run(engine, spec, messages=chat)) == (
        "echo system=Rules;user=a\n\nb;assistant=c;"
    )
    assert said(await run(engine, spec, prompt="x")) == "echo system=Rules;user=x;"
    own = "echo {{ .System }}|{{ .Prompt }}|{{ .Response }}!"
    assert said(await run(engine, spec, prompt="x", template=own)) == "echo Rules|x|"
    assert said(await run(engine, spec, prompt="echo x", raw=True)) == "echo x"


async def test_a_long_chat_is_cut_with_such_a_template_too(engine: Engine, tmp_path: Path):
    spec = msgspec.structs.replace(fake_model(tmp_path), template=ECHO)
    turns = tuple(
        Message(("user", "assistant")[number % 2], f"{number:02}") for number in range(40)
    )
    options = msgspec.structs.replace(GenerateRequest("").options, num_ctx=64)
    text = said(await run(engine, spec, messages=turns, options=options))
    assert text.startswith("echo ")
    assert text.endswith("assistant=39;")
    assert len(text) < 64
    assert "user=36;" in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ if }}", "missing"),
        ("{{ .Prompt.X }}", "no field X"),
        ("{{ range 999999999 }}{{ end }}", "s"),
    ],
)
async def test_a_template_that_is_wrong(engine: Engine, tmp_path: Path, template: str, reason: str):
    spec = fake_model(tmp_path)
    status, message = refused(await run(engine, spec, prompt="x", template=template))
    assert status == 400
    assert reason in message
    # The model's own, if it cannot be read, is left aside.
    spec = msgspec.structs.replace(spec, template="{{ if }}")
    assert said(await run(engine, spec, prompt="x")) == "abcde"


async def test_tools_need_a_template_that_llama_cpp_knows(engine: Engine, tmp_path: Path):
    spec = msgspec.structs.replace(fake_model(tmp_path), template=ECHO)
    asked = json.loads(said(await run(engine, spec, prompt="x", tools="[]", think="on")))
    assert asked["messages"] == [{"role": "user", "content": "x"}]


async def test_filling_in_by_template_and_by_vocabulary(engine: Engine, tmp_path: Path):
    tokens = {"<fim_prefix>": [90001], "<fim_suffix>": [90002], "<fim_middle>": [90003]}
    spec = fake_model(tmp_path, "coder:latest", spellings=tokens)
    *_, end = await run(engine, spec, prompt="ab", suffix="cd")
    assert isinstance(end, Finished)
    assert end.context[:8] == (BOS, 90001, 97, 98, 90002, 99, 100, 90003)
    template = "echo {{ .Prompt }}_{{ .Suffix }}"
    with_template = msgspec.structs.replace(spec, template=template)
    assert said(await run(engine, with_template, prompt="ab", suffix="cd")) == "echo ab_cd"
    own = await run(engine, with_template, prompt="ab", suffix="cd", template=published.INFILL)
    *_, end = own
    assert isinstance(end, Finished)
    assert end.prompt_eval_count == 1 + len("<|fim_prefix|>ab<|fim_suffix|>cd<|fim_middle|>")
    plain = fake_model(tmp_path, "plain:latest")
    status, message = refused(await run(engine, plain, prompt="ab", suffix="cd"))
    assert status == 400
    assert message == "registry.ollama.ai/library/plain:latest does not support insert"


async def test_pictures_stand_where_they_were_sent(engine: Engine, tmp_path: Path):
    blind = msgspec.structs.replace(fake_model(tmp_path), template=ECHO)
    status, message = refused(await run(engine, blind, prompt="x", images=(b"1",)))
    assert status == 400
    assert message == "registry.ollama.ai/library/fake:latest does not support vision"
    spec = msgspec.structs.replace(blind, projector_path="unused")
    assert said(await run(engine, spec, prompt="x", images=(b"1", b"2"))) == "echo user=<1><2>x;"
    chat = (
        Message("user", "a", images=(b"1",)),
        Message("assistant", f"b{MARKER[:-1]}"),
        Message("user", "c", images=(b"2", b"3")),
    )
    text = said(await run(engine, spec, messages=chat))
    assert text == f"echo user=<1>a;assistant=b{MARKER[:-1]};user=<2><3>c;"
    assert said(await run(engine, spec, prompt="echo", raw=True, images=(b"1",))) == "abcde"
    context = tuple(map(ord, "echo "))
    *_, end = await run(engine, spec, prompt="x", images=(b"1",), context=context)
    assert isinstance(end, Finished)
    assert (end.context, end.prompt_eval_count) == ((), len("echo echo user=<1>x;"))
    # The rest of an answer begins behind what was said.
    resumed = await run(engine, spec, prompt="x", images=(b"1",), resume=(97, 98))
    assert said(resumed) == "echo user=<1>x;ab"
    # llama.cpp makes the prompt itself where it has to tell thoughts apart.
    asked = json.loads(said(await run(engine, spec, messages=chat[:1], think="on")))
    url = f"data:image/png;base64,{base64.b64encode(b'1').decode()}"
    assert asked["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "a"},
    ]


async def test_counting_does_not_answer(engine: Engine, tmp_path: Path):
    spec = fake_model(tmp_path)
    [end] = await run(engine, spec, messages=(Message("user", "hi"),), only_counts=True)
    assert isinstance(end, Finished)
    assert (end.reason, end.eval_count) == ("stop", 0)
    assert end.prompt_eval_count == 1 + len("user:hi\n")


async def test_a_chat_costs_one_question_before_it_is_answered(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = fake_model(tmp_path)
    await engine.load(spec)
    asked: list[str] = []
    plain = LlamaClient._ask

    async def noted(self: LlamaClient, target: str, *rest: Any) -> Any:
        asked.append(target)
        return await plain(self, target, *rest)

    monkeypatch.setattr(LlamaClient, "_ask", noted)
    hi = (Message("user", "hi"),)
    said(await run(engine, spec, messages=hi))
    # Once for the model: what its tokenizer begins with.
    assert asked == ["/apply-template", "/detokenize"]
    asked.clear()
    said(await run(engine, spec, messages=hi))
    said(await run(engine, spec, messages=hi, think="on"))
    said(await run(engine, spec, prompt="x", raw=True))
    assert asked == ["/apply-template"]


async def test_what_the_runner_finds_too_long_is_read_again(engine: Engine, tmp_path: Path):
    spec = msgspec.structs.replace(fake_model(tmp_path), template=ECHO)
    options = Options(num_ctx=256)
    turns = tuple(
        Message(("user", "assistant")[number % 2], f"{number:02}") for number in range(80)
    )
    text = said(await run(engine, spec, messages=turns, options=options))
    assert text.endswith("user=78;assistant=79;")
    assert 200 < len(text) < 255
    for fields in ({"messages": turns, "truncate": False}, {"prompt": "x" * 300, "raw": True}):
        events = await run(engine, spec, options=options, **fields)
        assert isinstance(events[-1], Failed)
        assert events[-1].code == "PROMPT_TOO_LONG"
        assert events[-1].details["context_length"] == 256
    # Where llama.cpp makes the prompt itself, the oldest messages go as well.
    asked = json.loads(said(await run(engine, spec, messages=turns, options=options, think="on")))
    assert len(asked["messages"]) < 40
    assert asked["messages"][-1]["content"] == "79"
