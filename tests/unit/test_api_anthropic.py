"""Anthropic's API on fakes: the blocks, the order of a stream's events, and what is refused."""

import json
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import (
    Chunk,
    Failed,
    GenerateRequest,
    InferenceError,
    Message,
    Options,
    Thought,
    ToolCall,
)
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import FINISHED, HELLO, NODE_2

MODEL = "smollm2:135m"
MESSAGES = [{"role": "user", "content": "hi"}]
CALL = ToolCall("add", '{"a":1}', "call_1")
TOOL = {"name": "add", "description": "Adds", "input_schema": {"type": "object"}}
USAGE = {
    "input_tokens": 20,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 5,
    "output_tokens": 3,
}


async def create(client: ApiClient, **body: Any) -> Answer:
    whole = {"model": MODEL, "messages": MESSAGES, "max_tokens": 9} | body
    return await client.call("POST", "/v1/messages", whole)


def asked(client: ApiClient) -> GenerateRequest:
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    return request


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WANTED = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize("body", [{"output_config": {"format": WANTED}}, {"output_format": WANTED}])
async def test_a_form_of_the_answer_is_kept_to(body: dict[str, Any]) -> None:
    client = ApiClient()
    assert (await create(client, **body)).status == 200
    assert json.loads(asked(client).format) == SCHEMA


@pytest.mark.parametrize(
    "wanted", [{"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "schema": {}}]
)
async def test_a_form_that_is_none_is_refused(wanted: dict[str, Any]) -> None:
    answer = await create(ApiClient(), output_config={"format": wanted})
    assert answer.status == 400
    assert "output_config.format" in answer.json["error"]["message"]


def events(answer: Answer) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "text/event-stream"
    *blocks, rest = answer.data.decode().split("\n\n")
    assert rest == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


async def test_a_whole_message() -> None:
    answer = await create(ApiClient())
    body = answer.json
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": 'Hello "ü"\n'}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": USAGE,
    }
    assert answer.headers["x-ollamad-node"] == NODE_2


async def test_what_a_message_asks_for() -> None:
    client = ApiClient.of_model("completion", "tools", "vision", "thinking")
    picture = {"type": "image", "source": {"type": "base64", "media_type": "x", "data": "aW1n"}}
    await create(
        client,
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        messages=[
            {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I add"},
                    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "2"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_2",
                        "content": [{"type": "text", "text": "3"}, picture],
                    },
                    {"type": "text", "text": "Go on"},
                ],
            },
        ],
        tools=[TOOL, TOOL | {"name": "sub", "type": "custom"}],
        tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        stop_sequences=["x"],
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        metadata={"user_id": "me"},
    )
    function = {"name": "add", "description": "Adds", "parameters": {"type": "object"}}
    assert asked(client) == GenerateRequest(
        MODEL,
        messages=(
            Message("system", "Be\n\nbrief."),
            Message("user", "What?", images=(b"img",)),
            Message(
                "assistant",
                "I add",
                thinking="Hm",
                tool_calls=(ToolCall("add", '{"a":1}', "call_1"),),
            ),
            Message("tool", "2", tool_call_id="call_1"),
            Message("tool", "3", tool_call_id="call_2"),
            Message("user", "Go on", images=(b"img",)),
        ),
        tools=msgspec.json.encode([{"type": "function", "function": function}]).decode(),
        tool_choice="required",
        parallel_calls=False,
        think="on",
        options=Options(num_predict=9, temperature=0.5, top_p=0.25, top_k=7, stop=("x",)),
    )


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none"), (None, "")]
)
async def test_the_choice_of_tools(choice: str | None, expected: str) -> None:
    client = ApiClient.of_model("completion", "tools")
    await create(client, tools=[TOOL], tool_choice=choice and {"type": choice})
    assert asked(client).tool_choice == expected


async def test_a_model_thinks_when_it_is_asked_to() -> None:
    for thinking, mode in (
        (None, "off"),
        ({"type": "adaptive"}, "on"),
        ({"type": "disabled"}, "off"),
    ):
        client = ApiClient.of_model("completion", "thinking")
        await create(client, thinking=thinking)
        assert asked(client).think == mode
    client = ApiClient()
    await create(client, thinking={"type": "enabled", "budget_tokens": 1024})
    assert asked(client).think == ""


async def test_a_streamed_message() -> None:
    client = ApiClient()
    client.world.inference.script = [Thought("Hm"), Chunk("Hel"), Chunk("lo"), CALL, FINISHED]
    got = events(await create(client, stream=True))
    identifier = got[0]["message"].pop("id")
    assert identifier.startswith("msg_")
    assert got == [
        {
            "type": "message_start",
            "message": {
                "type": "message",
                "role": "assistant",
                "model": MODEL,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 0, "output_tokens": 0},
            },
        },
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        delta(0, "thinking_delta", thinking="Hm"),
        delta(0, "signature_delta", signature=""),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "content_block_start",
            "index": 1,
            "content_block": {"type": "text", "text": ""},
        },
        delta(1, "text_delta", text="Hel"),
        delta(1, "text_delta", text="lo"),
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": "call_1", "name": "add", "input": {}},
        },
        delta(2, "input_json_delta", partial_json='{"a":1}'),
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": USAGE,
        },
        {"type": "message_stop"},
    ]
    whole = (await create(client)).json
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
    ]
    assert whole["stop_reason"] == "tool_use"


def delta(index: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind} | fields}


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        ({"reason": "length"}, "max_tokens", None),
        ({"stop_text": "###"}, "stop_sequence", "###"),
        ({}, "end_turn", None),
    ],
)
async def test_why_it_stopped(end: dict[str, Any], reason: str, sequence: str | None) -> None:
    client = ApiClient()
    client.world.inference.script = [*HELLO[:-1], msgspec.structs.replace(FINISHED, **end)]
    body = (await create(client)).json
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


async def test_counting() -> None:
    client = ApiClient()
    body = {"model": MODEL, "messages": MESSAGES, "system": "Be brief."}
    answer = await client.call("POST", "/v1/messages/count_tokens", body)
    assert (answer.status, answer.json) == (200, {"input_tokens": 25})
    request = asked(client)
    assert request.only_counts
    assert request.options.num_predict == 1
    client.world.inference.script = [Failed("PROMPT_TOO_LONG", "too long", 400)]
    answer = await client.call("POST", "/v1/messages/count_tokens", body)
    assert answer.json["error"]["message"] == "too long"


async def test_a_failure_in_the_middle() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a"), Failed("NODE_LOST", "gone", 503)]
    assert events(await create(client, stream=True))[-1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "gone", "code": "node_lost"},
    }


async def test_no_node_can_answer() -> None:
    client = ApiClient()
    client.world.inference.refusal = InferenceError(Failed("NO_REPLICA", "all are away", 503))
    answer = await create(client, stream=True)
    assert (answer.status, answer.json["error"]["type"]) == (503, "overloaded_error")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages.0.content.0",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "messages.0.content.0",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "source": {"type": "url", "url": "http://x"}}
                        ],
                    }
                ]
            },
            "messages.0.content.0.source",
        ),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"tools": [TOOL | {"type": "web_search_20250305"}]}, "tools.0.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "z"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
    ],
)
async def test_a_bad_field_is_named(body: dict[str, Any], field: str) -> None:
    client = ApiClient.of_model("completion", "tools", "vision", "thinking")
    answer = await create(client, **body)
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert field in answer.json["error"]["message"]
    assert client.world.inference.requests == []


async def test_who_asks_and_for_what() -> None:
    client = ApiClient(role=None)
    answer = await create(client)
    assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1}
    for role, status in (("inference", 200), ("viewer", 403)):
        headers = {"X-Api-Key": client.token(role)}
        answer = await client.call("POST", "/v1/messages", body, headers=headers)
        assert answer.status == status
    assert answer.json["error"]["type"] == "permission_error"
    answer = await client.call("POST", "/v1/messages", body, headers={"X-Api-Key": "wrong"})
    assert answer.status == 401
    answer = await create(ApiClient(), model="nope")
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
