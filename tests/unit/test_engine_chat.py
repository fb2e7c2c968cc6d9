"""Chats with tools and thoughts: what the runner is asked, and what becomes of its pieces."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import (
    Chunk,
    Failed,
    Finished,
    GenerateRequest,
    Likelihood,
    Message,
    Options,
    Output,
    Thought,
    ToolCall,
)
from ollamad.engine.chat import ChatAssembler
from ollamad.engine.llama_client import ChatEvent
from tests.fakes.runner_engines import events_of, fake_model, running_engine

TOOLS = '[{"type":"function","function":{"name":"add"}}]'
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    "timings": {"cache_n": 2, "prompt_ms": 1.5, "predicted_ms": 2.5},
}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


def piece(index: int, arguments: str, name: str = "") -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return delta(tool_calls=[{"index": index, "function": function}])


def told(*events: dict[str, Any]) -> list[Output]:
    """What an assembler tells, with the random part of ids taken off."""
    assembler = ChatAssembler()
    outputs = []
    for event in events:
        for output in assembler.feed(msgspec.convert(event, ChatEvent)):
            if isinstance(output, ToolCall):
                assert len(output.id) == len("call_") + 8
                output = msgspec.structs.replace(output, id="")
            outputs.append(output)
    return outputs


def test_text_thoughts_and_calls_are_told_apart() -> None:
    assert told(
        delta(role="assistant", content=None),
        delta(reasoning_content="Hm"),
        delta(content="Yes"),
        piece(0, "", "add"),
        piece(0, '{"a":'),
        piece(0, " 1}"),
        piece(1, '{"b": 2}', "sub"),
        delta("tool_calls"),
        USAGE,
    ) == [
        Thought("Hm"),
        Chunk("Yes"),
        ToolCall("add", '{"a": 1}', "", 0),
        ToolCall("sub", '{"b": 2}', "", 1),
    ]


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "x"])
def test_a_call_that_was_cut_off_is_none(arguments: str) -> None:
    assert told(piece(0, arguments, "add"), delta("length")) == []


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert told(piece(0, "", "now"), delta("tool_calls")) == [ToolCall("now", "{}", "", 0)]


async def test_a_chat_from_start_to_end(tmp_path: Path) -> None:
    chat = [
        {"prompt_progress": {"total": 5, "processed": 5}, "choices": []},
        delta(reasoning_content="Hm"),
        delta(content="Yes"),
        delta("stop"),
        USAGE,
    ]
    spec = fake_model(tmp_path, chat=chat)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, messages=(Message("user", "hi"),), think="on")
        first, second, last = await events_of(engine, spec, request)
        assert [first, second] == [Thought("Hm"), Chunk("Yes")]
        assert isinstance(last, Finished)
        assert (last.reason, last.context) == ("stop", ())
        assert (last.prompt_eval_count, last.eval_count, last.prompt_cached_count) == (7, 5, 2)
        assert (last.prompt_eval_duration, last.eval_duration) == (1_500_000, 2_500_000)
        assert 0 < last.load_duration < last.total_duration
        assert engine.loaded()[0].busy == 0


async def test_what_the_runner_is_asked(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(
        fake_model(tmp_path), system="Be kind.", messages=(Message("user", "before"),)
    )
    call = ToolCall("add", '{"a":1}', "call_1")
    request = GenerateRequest(
        spec.name,
        messages=(
            Message("user", "hi"),
            Message("assistant", "", thinking="Hm", tool_calls=(call,)),
            Message("tool", "2", tool_name="add", tool_call_id="call_1"),
        ),
        tools=TOOLS,
        tool_choice="required",
        think="low",
        format="json",
        options=Options(num_predict=9, temperature=0.5),
        default_seed=11,
    )
    async with running_engine(tmp_path / "run") as engine:
        chunk, _ = await events_of(engine, spec, request)
    assert isinstance(chunk, Chunk)
    asked = json.loads(chunk.text)
    assert asked["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "before"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a":1}'},
                }
            ],
        },
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "call_1"},
    ]
    assert asked["tools"] == json.loads(TOOLS)
    assert asked["tool_choice"] == "required"
    assert asked["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "low"}
    assert asked["json_schema"] == {"type": "object"}
    assert (asked["n_predict"], asked["temperature"], asked["seed"]) == (9, 0.5, 11)
    assert asked["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("think", "enabled"), [("on", True), ("off", False)])
async def test_a_prompt_is_a_chat_too_when_the_model_thinks(
    tmp_path: Path, think: str, enabled: bool
) -> None:
    spec = fake_model(tmp_path)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, prompt="hi", system="Brief.", think=think)
        chunk, _ = await events_of(engine, spec, request)
        assert isinstance(chunk, Chunk)
        asked = json.loads(chunk.text)
        assert asked["messages"] == [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": "hi"},
        ]
        assert asked["chat_template_kwargs"] == {"enable_thinking": enabled}
        assert "tools" not in asked
        # Raw prompts and old contexts have no template that could tell thoughts apart.
        for fields in ({"raw": True}, {"context": (1, 2)}):
            plain = msgspec.structs.replace(request, **fields)
            assert (await events_of(engine, spec, plain))[0] == Chunk("a", (97,))


async def test_a_long_chat_loses_its_oldest_messages(tmp_path: Path) -> None:
    spec = fake_model(tmp_path)
    turns = tuple(Message("user", f"{number:02}") for number in range(20))
    # 8 characters a turn, one BOS: 7 turns fit into 63.
    options = Options(num_ctx=64, num_predict=3)
    request = GenerateRequest(spec.name, messages=turns, tools=TOOLS, options=options)
    async with running_engine(tmp_path / "run") as engine:
        chunk, _ = await events_of(engine, spec, request)
        assert isinstance(chunk, Chunk)
        kept = [message["content"] for message in json.loads(chunk.text)["messages"]]
        assert kept == [f"{number:02}" for number in range(13, 20)]
        whole = msgspec.structs.replace(request, truncate=False)
        [failure] = await events_of(engine, spec, whole)
        assert isinstance(failure, Failed)
        assert failure.code == "PROMPT_TOO_LONG"


async def test_an_error_of_the_runner_ends_the_chat(tmp_path: Path) -> None:
    chat = [delta(content="a"), {"error": {"code": 500, "message": "out of luck"}}]
    spec = fake_model(tmp_path, chat=chat)
    async with running_engine(tmp_path / "run") as engine:
        request = GenerateRequest(spec.name, messages=(Message("user", "hi"),), tools=TOOLS)
        chunk, failure = await events_of(engine, spec, request)
        assert chunk == Chunk("a")
        assert isinstance(failure, Failed)
        assert failure.message == "out of luck"
        assert engine.loaded()[0].busy == 0


WHOLE = {
    "choices": [
        {
            "message": {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm",
                "tool_calls": [
                    {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}},
                    {"id": "y", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
                ],
            },
            "finish_reason": "tool_calls",
            "logprobs": {
                "content": [
                    {
                        "token": "a",
                        "bytes": [97],
                        "logprob": -0.5,
                        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}],
                    }
                ]
            },
        }
    ],
    "usage": USAGE["usage"],
    "timings": USAGE["timings"],
}


@pytest.mark.parametrize("text", [None, "Yes"])
async def test_calls_and_how_likely_they_were_come_whole(tmp_path: Path, text: str | None) -> None:
    """llama.cpp refuses to stream both."""
    whole = json.loads(json.dumps(WHOLE))
    whole["choices"][0]["message"]["content"] = text
    spec = fake_model(tmp_path, whole_chat=whole)
    async with running_engine(tmp_path) as engine:
        request = GenerateRequest(
            spec.name, messages=(Message("user", "hi"),), tools=TOOLS, logprobs=1
        )
        *outputs, end = await events_of(engine, spec, request)
    shown = [
        msgspec.structs.replace(one, id="") if isinstance(one, ToolCall) else one for one in outputs
    ]
    likely = Likelihood(b"a", -0.5, (Likelihood(b"a", -0.5),))
    assert shown == [
        Thought("Hm"),
        Chunk(text or "", logprobs=(likely,)),
        ToolCall("add", "{}", "", 0),
        ToolCall("sub", "{}", "", 1),
    ]
    assert isinstance(end, Finished)
    assert (end.reason, end.prompt_eval_count, end.eval_count) == ("stop", 7, 5)
