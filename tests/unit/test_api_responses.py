"""OpenAI's `/v1/responses` on fakes: the items, the numbered events, and what is refused."""

import json
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import (
    Chunk,
    Failed,
    GenerateRequest,
    Likelihood,
    Message,
    Options,
    Thought,
    ToolCall,
)
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import FINISHED, HELLO

MODEL = "smollm2:135m"
CALL = ToolCall("add", '{"a":1}', "call_1")
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}


async def respond(client: ApiClient, **body: Any) -> Answer:
    return await client.call("POST", "/v1/responses", {"model": MODEL, "input": "hi"} | body)


def asked(client: ApiClient) -> GenerateRequest:
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    return request


def events(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream; each one's name is its type, and they are numbered."""
    assert answer.headers["content-type"] == "text/event-stream"
    *blocks, rest = answer.data.decode().split("\n\n")
    assert rest == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    assert [body.pop("sequence_number") for body in found] == list(range(len(found)))
    return found


async def test_a_whole_response() -> None:
    body = (await respond(ApiClient(), instructions="Be brief.", metadata={"a": "b"})).json
    identifier = body.pop("id").removeprefix("resp_")
    assert body == {
        "object": "response",
        "created_at": 1_705_312_800,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "Be brief.",
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "model": MODEL,
        "output": [
            {
                "id": f"msg_{identifier}0",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [
                    {
                        "type": "output_text",
                        "text": 'Hello "ü"\n',
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 25,
            "input_tokens_details": {"cached_tokens": 5},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 28,
        },
        "user": None,
    }


async def test_what_a_response_asks_for() -> None:
    client = ApiClient.of_model("completion", "tools", "vision", "thinking")
    await respond(
        client,
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Rules"},
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What?"},
                    {"type": "input_image", "image_url": "data:image/png;base64,aW1n"},
                ],
            },
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "Hm"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I add"}],
            },
            {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a":1}'},
            {"type": "function_call", "call_id": "call_2", "name": "add", "arguments": ""},
            {"type": "function_call_output", "call_id": "call_1", "output": "2"},
            {
                "type": "function_call_output",
                "call_id": "call_2",
                "output": [{"type": "input_text", "text": "3"}],
            },
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "name": "add"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        reasoning={"effort": "low"},
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.25,
        truncation="auto",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        store=True,
        user="me",
    )
    function = {"name": "add", "parameters": {"type": "object"}}
    assert asked(client) == GenerateRequest(
        MODEL,
        messages=(
            Message("system", "Be brief."),
            Message("system", "Rules"),
            Message("user", "What?", images=(b"img",)),
            Message(
                "assistant",
                "I add",
                thinking="Hm",
                tool_calls=(
                    ToolCall("add", '{"a":1}', "call_1", 0),
                    ToolCall("add", "{}", "call_2", 1),
                ),
            ),
            Message("tool", "2", tool_call_id="call_1"),
            Message("tool", "3", tool_call_id="call_2"),
        ),
        tools=msgspec.json.encode([{"type": "function", "function": function}]).decode(),
        tool_choice="required",
        parallel_calls=False,
        format='{"type":"object"}',
        think="low",
        options=Options(num_predict=9, temperature=0.5, top_p=0.25),
        logprobs=2,
    )


async def test_defaults() -> None:
    client = ApiClient()
    await respond(client)
    assert asked(client) == GenerateRequest(
        MODEL,
        messages=(Message("user", "hi"),),
        options=Options(temperature=1.0, top_p=1.0),
        truncate=False,
    )


async def test_a_streamed_response() -> None:
    client = ApiClient()
    client.world.inference.script = [Thought("Hm"), Chunk("Hel"), Chunk("lo"), CALL, FINISHED]
    got = events(await respond(client, stream=True))
    assert [event["type"].removeprefix("response.") for event in got] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in got[2:-1]] == [0] * 6 + [1] * 7 + [2] * 4
    assert got[0]["response"]["status"] == "in_progress"
    assert got[2]["item"]["status"] == "in_progress"
    assert (got[10]["delta"], got[12]["text"]) == ("Hel", "Hello")
    assert got[10]["item_id"] == got[14]["item"]["id"]
    assert (got[15]["item"]["arguments"], got[17]["arguments"]) == ("", '{"a":1}')
    assert got[18]["item"]["call_id"] == "call_1"
    last = got[-1]["response"]
    assert last["output"] == [got[7]["item"], got[14]["item"], got[18]["item"]]
    assert last["usage"]["total_tokens"] == 28
    # The same as when it is not streamed.
    whole = (await respond(client)).json
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    for streamed, plain in zip(last["output"], whole["output"], strict=True):
        assert streamed | {"id": ""} == plain | {"id": ""}


async def test_logprobs_are_told_twice() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("Hi", (1,), (Likelihood(b"Hi", -0.5),)), FINISHED]
    include = ["message.output_text.logprobs"]
    got = events(await respond(client, stream=True, include=include))
    shown = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}]
    told = [event["logprobs"] for event in got if event["type"].startswith("response.output_text")]
    assert told == [shown, shown]
    assert got[-1]["response"]["output"][0]["content"][0]["logprobs"] == shown


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_was_cut_off_is_incomplete(stream: bool) -> None:
    client = ApiClient()
    client.world.inference.script = [
        *HELLO[:-1],
        msgspec.structs.replace(FINISHED, reason="length"),
    ]
    answer = await respond(client, stream=stream)
    body = events(answer)[-1]["response"] if stream else answer.json
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_failure_in_the_middle() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a"), Failed("NODE_LOST", "gone", 503)]
    last = events(await respond(client, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "node_lost", "message": "gone"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0].type 'input_file'",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}
                ]
            },
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type 'item_reference'"),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "1"}]},
            "input[0].arguments",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "some"}, "truncation"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "x"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools[1].name"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "z"}},
            "tool_choice.function",
        ),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    ],
)
async def test_a_bad_field_is_named(body: dict[str, Any], param: str) -> None:
    client = ApiClient.of_model("completion", "tools", "vision", "thinking")
    answer = await respond(client, **body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert client.world.inference.requests == []


async def test_what_the_model_cannot_do() -> None:
    for body in (
        {"tools": [TOOL]},
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "data:;base64,aW1n"}],
                }
            ]
        },
    ):
        answer = await respond(ApiClient(), **body)
        assert (answer.status, answer.json["error"]["code"]) == (400, "not_supported")
