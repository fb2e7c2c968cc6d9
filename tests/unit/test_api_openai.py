"""OpenAI's API on fakes: exact shapes, the order of a stream, and what reaches the scheduler."""

import base64
import json
import struct
from typing import Any

import msgspec
import pytest
import trio

from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    Failover,
    GenerateRequest,
    InferenceError,
    Likelihood,
    Message,
    Options,
    Thought,
    ToolCall,
)
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import FINISHED, HELLO, NODE_1, NODE_2, model

MODEL = "smollm2:135m"
CREATED = 1_705_312_800
MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = {
    "prompt_tokens": 25,
    "completion_tokens": 3,
    "total_tokens": 28,
    "prompt_tokens_details": {"cached_tokens": 5},
}
WEB_IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
BAD = {"name": "f", "arguments": "[1]"}
BUSY = InferenceError(Failed("QUEUE_FULL", "busy", 503))
DEFAULTS = Options(temperature=1.0, top_p=1.0)


async def chat(client: ApiClient, **body: Any) -> Answer:
    path = "/v1/chat/completions"
    return await client.call("POST", path, {"model": MODEL, "messages": MESSAGES} | body)


async def complete(client: ApiClient, **body: Any) -> Answer:
    return await client.call("POST", "/v1/completions", {"model": MODEL, "prompt": "hi"} | body)


async def embed(client: ApiClient, **body: Any) -> Answer:
    return await client.call("POST", "/v1/embeddings", {"model": MODEL, "input": "hi"} | body)


def events(answer: Answer) -> list[Any]:
    """The events of a stream; the last is what ends it."""
    assert answer.headers["content-type"] == "text/event-stream"
    blocks = answer.data.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    texts = [block.removeprefix("data: ") for block in blocks]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def asked(client: ApiClient) -> GenerateRequest:
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    return request


# Chat.


async def test_a_whole_chat() -> None:
    answer = await chat(ApiClient())
    body = answer.json
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "created": CREATED,
        "model": MODEL,
        "system_fingerprint": "fp_ollamad",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": 'Hello "ü"\n'},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
    assert answer.headers["x-ollamad-node"] == NODE_2


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_streamed_chat(include_usage: bool) -> None:
    extra = {"stream_options": {"include_usage": True}} if include_usage else {}
    got = events(await chat(ApiClient(), stream=True, **extra))
    assert got.pop() == "[DONE]"
    identifier = got[0]["id"]
    shared = {
        "id": identifier,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
        "system_fingerprint": "fp_ollamad",
    } | ({"usage": None} if include_usage else {})
    if include_usage:
        assert got.pop() == shared | {"choices": [], "usage": USAGE}
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({"content": ' "ü"\n'}, None),
        ({}, "stop"),
    ]
    assert got == [
        shared | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in deltas
    ]


async def test_what_a_chat_asks_for() -> None:
    client = ApiClient()
    await chat(
        client,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "b"},
        ],
        max_completion_tokens=7,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        stop=["x", "y"],
        seed=3,
        frequency_penalty=0.5,
        presence_penalty=-1,
        user="me",
        n=1,
        logprobs=False,
    )
    assert asked(client) == GenerateRequest(
        MODEL,
        messages=(
            Message("system", "Be brief."),
            Message("user", "a"),
            Message("assistant", ""),
            Message("user", "b"),
        ),
        options=Options(
            num_predict=7,
            temperature=0,
            top_p=0.5,
            stop=("x", "y"),
            seed=3,
            frequency_penalty=0.5,
            presence_penalty=-1,
        ),
    )


async def test_defaults_are_openais_and_null_is_absent() -> None:
    client = ApiClient()
    await chat(client, temperature=None, top_p=None, stop=None, stream=None, tools=None, seed=None)
    assert asked(client) == GenerateRequest(
        MODEL, messages=(Message("user", "hi"),), options=DEFAULTS
    )


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, ""),
        ({"type": "text"}, ""),
        ({"type": "json_object"}, "json"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            '{"type":"object"}',
        ),
    ],
)
async def test_structured_output(response_format: Any, expected: str) -> None:
    client = ApiClient()
    await chat(client, response_format=response_format)
    assert asked(client).format == expected


async def test_thinking_and_tool_calls_have_their_places() -> None:
    client = ApiClient()
    client.world.inference.script = [
        Thought("hm"),
        ToolCall("f", '{"a":1}', "call_1"),
        ToolCall("g", "{}", "call_2", 1),
        FINISHED,
    ]
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    [choice] = (await chat(client)).json["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": calls,
        },
        "finish_reason": "tool_calls",
    }
    got = events(await chat(client, stream=True))
    choices = [event["choices"][0] for event in got[:-1]]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "reasoning": "hm"},
        {"tool_calls": [{"index": 0} | calls[0]]},
        {"tool_calls": [{"index": 1} | calls[1]]},
        {},
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_a_length_is_told() -> None:
    client = ApiClient()
    client.world.inference.script = [msgspec.structs.replace(FINISHED, reason="length")]
    got = events(await chat(client, stream=True))
    assert got[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant"},
        "finish_reason": "length",
    }


# Completions.


async def test_a_whole_completion_is_not_templated() -> None:
    client = ApiClient()
    body = (await complete(client, max_tokens=5)).json
    assert body.pop("id").startswith("cmpl-")
    assert body == {
        "object": "text_completion",
        "created": CREATED,
        "model": MODEL,
        "system_fingerprint": "fp_ollamad",
        "choices": [{"text": 'Hello "ü"\n', "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    assert asked(client) == GenerateRequest(
        MODEL, prompt="hi", raw=True, options=msgspec.structs.replace(DEFAULTS, num_predict=5)
    )


async def test_a_streamed_completion_with_echo() -> None:
    got = events(await complete(ApiClient(), stream=True, echo=True, prompt=["Oh, "]))
    assert got.pop() == "[DONE]"
    assert all(event["object"] == "text_completion" for event in got)
    assert [event["choices"][0]["text"] for event in got] == ["Oh, Hel", "lo", ' "ü"\n', ""]
    assert [event["choices"][0]["finish_reason"] for event in got] == [None, None, None, "stop"]


# Likelihoods, and several choices.

LIKELY = Likelihood(b"Hi", -0.5, (Likelihood(b"Hi", -0.5), Likelihood(b"\xc3", -1.5)))
SHOWN = {
    "token": "Hi",
    "logprob": -0.5,
    "bytes": [72, 105],
    "top_logprobs": [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [195]},
    ],
}


async def test_logprobs_of_a_chat() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("Hi", (1,), (LIKELY,)), Chunk("Hi", (1,)), FINISHED]
    [choice] = (await chat(client, logprobs=True, top_logprobs=2)).json["choices"]
    assert choice["logprobs"] == {"content": [SHOWN], "refusal": None}
    assert asked(client).logprobs == 2
    first, second, *_ = events(await chat(client, stream=True, logprobs=True))
    assert first["choices"][0]["logprobs"] == {"content": [SHOWN], "refusal": None}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Hi"}
    assert "logprobs" not in second["choices"][0]


async def test_logprobs_of_a_completion() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("Hi", (1,), (LIKELY,)), Chunk("Hi", (1,), (LIKELY,))]
    client.world.inference.script.append(FINISHED)
    [choice] = (await complete(client, logprobs=2)).json["choices"]
    assert choice["logprobs"] == {
        "tokens": ["Hi", "Hi"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"Hi": -0.5, "\ufffd": -1.5}] * 2,
        "text_offset": [0, 2],
    }
    offsets = [
        event["choices"][0]["logprobs"]["text_offset"]
        for event in events(await complete(client, stream=True, logprobs=2))[:2]
    ]
    assert offsets == [[0], [2]]


async def test_the_logit_bias_and_one_call_at_a_time() -> None:
    client = ApiClient()
    await chat(client, logit_bias={"5": -100, "17": 2.5}, parallel_tool_calls=False)
    assert asked(client).logit_bias == ((5, -100), (17, 2.5))
    assert not asked(client).parallel_calls


@pytest.mark.parametrize(
    ("seed", "taken"), [(None, {None}), (7, {7, 8, 9}), (-5, {-1}), (2**32 - 2, {2**32 - 2, 0, 1})]
)
async def test_several_choices(seed: int | None, taken: set[int | None]) -> None:
    client = ApiClient()
    body = (await chat(client, n=3, seed=seed)).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {'Hello "ü"\n'}
    # The prompt counts once.
    assert body["usage"]["prompt_tokens"] == 25
    assert body["usage"]["completion_tokens"] == 9
    requests = client.world.inference.requests
    seeds = {each.options.seed for each in requests if isinstance(each, GenerateRequest)}
    assert len(requests) == 3
    assert seeds == taken


async def test_the_nodes_of_several_choices_are_told_each_once() -> None:
    client = ApiClient()
    move = Failover(NODE_2, NODE_1, "NODE_LOST", "continue", 2, 240)
    moved = msgspec.structs.replace(FINISHED, failovers=(move,))
    scripts = iter([HELLO, [*HELLO[:-1], moved], HELLO])
    client.world.inference.script_for = lambda: next(scripts)
    answer = await chat(client, n=3)
    assert set(answer.headers["x-ollamad-node"].split(", ")) == {NODE_1, NODE_2}
    assert answer.headers["x-ollamad-failovers"] == "1"
    assert answer.json["failovers"] == [msgspec.to_builtins(move)]
    scripts = iter([HELLO, [*HELLO[:-1], moved], HELLO])
    got = events(await chat(client, n=3, stream=True))
    [told] = [each for each in got if "failovers" in each]
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["failovers"] == [msgspec.to_builtins(move)]


async def test_several_choices_are_streamed_side_by_side() -> None:
    got = events(await chat(ApiClient(), n=2, stream=True, stream_options={"include_usage": True}))
    assert got.pop() == "[DONE]"
    assert got.pop()["usage"]["completion_tokens"] == 6
    texts = {0: "", 1: ""}
    ends = []
    for each in got:
        [choice] = each["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert texts == {0: 'Hello "ü"\n', 1: 'Hello "ü"\n'}
    assert sorted(ends) == [0, 1]
    assert len({each["id"] for each in got}) == 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([5, 6], [((5, 6), "")]),
        ([[5, 6], [7]], [((5, 6), ""), ((7,), "")]),
        ([[5], "text"], [((5,), ""), ((), "text")]),
    ],
    ids=str,
)
async def test_a_prompt_may_be_token_ids(prompt: Any, expected: Any) -> None:
    client = ApiClient()
    answer = await complete(client, prompt=prompt)
    assert answer.status == 200
    requests = [each for each in client.world.inference.requests if each.model]
    # They run at once, in any order.
    assert sorted((each.context, each.prompt) for each in requests) == sorted(expected)
    assert all(each.raw and not each.only_loads for each in requests)


async def test_many_prompts_and_the_best_of_each() -> None:
    client = ApiClient()
    body = (await complete(client, prompt=["a", "b"], n=2, echo=True)).json
    texts = [choice["text"][0] for choice in body["choices"]]
    assert texts == ["a", "a", "b", "b"]
    assert body["usage"]["prompt_tokens"] == 50
    scripts = iter([-3.0, -1.0, -2.0])

    def said() -> list[Any]:
        logprob = next(scripts)
        return [Chunk(str(logprob), (1,), (Likelihood(b"x", logprob),)), FINISHED]

    client.world.inference.script_for = said
    body = (await complete(client, best_of=3, n=2)).json
    assert [choice["text"] for choice in body["choices"]] == ["-1.0", "-2.0"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choice_that_fails_ends_all(stream: bool) -> None:
    client = ApiClient()
    scripts: Any = iter(
        [[trio.Event()], [Chunk("a"), Failed("NODE_LOST", "gone", 503)] if stream else [BUSY]]
    )
    client.world.inference.script_for = lambda: next(scripts)
    answer = await chat(client, n=2, stream=stream)
    if stream:
        assert events(answer)[-1]["error"]["code"] == "node_lost"
    else:
        assert (answer.status, answer.json["error"]["code"]) == (503, "queue_full")
        assert answer.headers["retry-after"] == "2"
    assert client.world.inference.running == 0


async def test_a_certain_tool_is_forced_by_offering_no_other() -> None:
    client = ApiClient.of_model("completion", "tools")
    tools = [{"type": "function", "function": {"name": name}} for name in "abc"]
    forced = {"type": "function", "function": {"name": "b"}}
    await chat(client, tools=tools, tool_choice=forced)
    assert (json.loads(asked(client).tools), asked(client).tool_choice) == ([tools[1]], "required")
    allowed = {"mode": "auto", "tools": [tools[0], tools[2]]}
    client.world.inference.requests.clear()
    await chat(client, tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert json.loads(asked(client).tools) == [tools[0], tools[2]]
    assert asked(client).tool_choice == "auto"
    forced = {"type": "function", "function": {"name": "z"}}
    answer = await chat(client, tools=tools, tool_choice=forced)
    assert (answer.status, answer.json["error"]["param"]) == (400, "tool_choice.function")


async def test_pictures() -> None:
    client = ApiClient.of_model("completion", "vision")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aW1n"}}
    content = [picture, {"type": "text", "text": "What is it?"}]
    await chat(client, messages=[{"role": "user", "content": content}])
    assert asked(client).messages == (Message("user", "What is it?", images=(b"img",)),)
    answer = await chat(ApiClient(), messages=[{"role": "user", "content": content}])
    assert answer.status == 400
    assert "does not support vision" in answer.json["error"]["message"]


async def test_filling_in() -> None:
    client = ApiClient()
    await complete(client, prompt="def f(", suffix="return x")
    assert (asked(client).prompt, asked(client).suffix, asked(client).raw) == (
        "def f(",
        "return x",
        False,
    )


# Embeddings.


async def test_embeddings_as_numbers_and_as_base64() -> None:
    client = ApiClient()
    body = (await embed(client, input=["a", "b"])).json
    vectors = [[0.0, 0.5, -0.25], [1.0, 0.5, -0.25]]
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    assert client.world.inference.requests == [EmbedRequest(MODEL, ("a", "b"))]
    coded = (await embed(client, input=["a", "b"], encoding_format="base64")).json
    raw = base64.b64decode(coded["data"][1]["embedding"])
    assert list(struct.unpack("<3f", raw)) == vectors[1]


async def test_embeddings_can_be_shortened() -> None:
    body = (await embed(ApiClient(), input="a", dimensions=2)).json
    assert body["data"][0]["embedding"] == [0.0, 1.0]


# Models.


async def test_models() -> None:
    client = ApiClient()
    client.world.cluster.state.models["me/own:latest"] = model("me/own:latest", modified_at=9)
    described = {
        "id": MODEL,
        "object": "model",
        "created": CREATED - 60,
        "owned_by": "library",
        "type": "model",
        "display_name": MODEL,
        "created_at": "2024-01-15T09:59:00Z",
    }
    listed = (await client.call("GET", "/v1/models")).json
    assert listed["object"] == "list"
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (
        False,
        MODEL,
        "me/own:latest",
    )
    assert listed["data"][0] == described
    assert (listed["data"][1]["id"], listed["data"][1]["owned_by"]) == ("me/own:latest", "me")
    assert (await client.call("GET", f"/v1/models/{MODEL}")).json == described
    assert (await client.call("GET", "/v1/models/me/own")).json["id"] == "me/own:latest"
    client.world.cluster.state.models.clear()
    none = (await client.call("GET", "/v1/models")).json
    assert (none["data"], none["first_id"], none["last_id"]) == ([], None, None)


async def test_what_was_refused_before_is_part_of_the_conversation() -> None:
    client = ApiClient()
    parts = [{"type": "refusal", "refusal": "No."}]
    await chat(client, messages=[*MESSAGES, {"role": "assistant", "content": parts}, *MESSAGES])
    messages = asked(client).messages
    assert messages is not None
    assert messages[1].content == "No."


async def test_a_speaking_answer_is_refused() -> None:
    answer = await chat(ApiClient(), modalities=["text", "audio"], audio={"voice": "alloy"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "modalities 'audio'")
    assert (await chat(ApiClient(), modalities=["text"])).status == 200


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2, 3]], ["a", [1]]])
async def test_token_ids_have_no_embedding(given: Any) -> None:
    answer = await embed(ApiClient(), input=given)
    assert (answer.status, answer.json["error"]["param"]) == (400, "input")
    assert "check_embedding_ctx_length" in answer.json["error"]["message"]


# Errors.


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": "x"}, "messages"),
        ("chat/completions", {"messages": MESSAGES, "temperature": 3}, "temperature"),
        ("chat/completions", {"messages": MESSAGES, "top_p": -1}, "top_p"),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (
            "chat/completions",
            {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 0},
            "max_completion_tokens",
        ),
        ("chat/completions", {"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {"messages": MESSAGES, "stop": ["a"] * 5}, "stop"),
        ("chat/completions", {"messages": MESSAGES, "n": 0}, "n"),
        ("chat/completions", {"messages": MESSAGES, "n": 17}, "n"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"1": 101}}, "logit_bias"),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"the": 5}}, "logit_bias"),
        ("chat/completions", {"messages": MESSAGES, "presence_penalty": 3}, "presence_penalty"),
        ("chat/completions", {"messages": MESSAGES, "frequency_penalty": 3}, "frequency_penalty"),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "xml"}},
            "response_format.type",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": BAD}]}]},
            "messages[0].tool_calls",
        ),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": "maybe"}, "tool_choice"),
        (
            "chat/completions",
            {"messages": MESSAGES, "tool_choice": {"type": "function"}},
            "tool_choice.function",
        ),
        ("chat/completions", {"messages": MESSAGES, "reasoning_effort": "x"}, "reasoning_effort"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [WEB_IMAGE]}]},
            "messages[0].content[0].image_url",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type 'input_audio'",
        ),
        ("completions", {"prompt": ["a"] * 17}, "prompt"),
        ("completions", {"prompt": ["a", ""]}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [1, [2]]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt[0]"),
        ("completions", {"prompt": [1 << 31]}, "prompt[0]"),
        ("completions", {"prompt": [1.5]}, "prompt[0]"),
        ("completions", {"prompt": [True]}, "prompt[0]"),
        ("completions", {"prompt": [1, 2], "echo": True}, "echo with token ids"),
        ("completions", {"prompt": [1, 2], "suffix": "x"}, "suffix with token ids"),
        ("completions", {"prompt": "x", "best_of": 17}, "best_of"),
        ("completions", {"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
        ("completions", {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "logprobs": 1, "echo": True}, "echo with logprobs"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ["a", ""]}, "input"),
        ("embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ("embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
    ],
)
async def test_a_bad_field_is_named(path: str, body: dict[str, Any], param: str) -> None:
    client = ApiClient()
    answer = await client.call("POST", f"/v1/{path}", {"model": MODEL} | body)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split(" ")[0] in error["message"]
    assert client.world.inference.requests == []


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
async def test_an_unknown_model(path: str) -> None:
    body = {"model": "nope", "messages": MESSAGES, "prompt": "x", "input": "x"}
    answer = await ApiClient().call("POST", f"/v1/{path}", body)
    assert answer.status == 404
    assert answer.json["error"] == {
        "message": "model 'nope' not found",
        "type": "not_found_error",
        "param": None,
        "code": "model_not_found",
    }
    assert (await ApiClient().call("GET", "/v1/models/nope")).status == 404


async def test_tools_and_what_they_answered() -> None:
    client = ApiClient.of_model("completion", "tools")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    conversation = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "f"},
    ]
    answer = await chat(client, messages=conversation, tools=tools, tool_choice="required")
    assert answer.status == 200
    request = asked(client)
    assert json.loads(request.tools) == tools
    assert request.tool_choice == "required"
    assert request.messages == (
        Message("user", "go"),
        Message("assistant", "", tool_calls=(ToolCall("f", '{"a":1}', "call_1"),)),
        Message("tool", "42", tool_name="f", tool_call_id="call_1"),
    )


@pytest.mark.parametrize(
    ("effort", "think"), [(None, "on"), ("none", "off"), ("minimal", "low"), ("high", "high")]
)
async def test_the_effort_of_a_model_that_thinks(effort: str | None, think: str) -> None:
    client = ApiClient.of_model("completion", "thinking")
    await chat(client, reasoning_effort=effort)
    assert asked(client).think == think
    plain = ApiClient.of_model("completion")
    await chat(plain, reasoning_effort=effort)
    assert asked(plain).think == ""


async def test_tools_of_a_model_that_has_none() -> None:
    answer = await chat(ApiClient(), tools=[{"type": "function"}])
    assert answer.status == 400
    assert "does not support tools" in answer.json["error"]["message"]


async def test_no_token() -> None:
    answer = await ApiClient(role=None).call("POST", "/v1/chat/completions", {})
    assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")


async def test_no_node_can_answer() -> None:
    client = ApiClient()
    client.world.inference.refusal = InferenceError(Failed("NO_REPLICA", "all are away", 503))
    answer = await chat(client, stream=True)
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_replica")
    assert answer.headers["retry-after"] == "2"


async def test_a_failure_in_the_middle_ends_the_stream_with_an_error() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a"), Failed("NODE_LOST", "gone", 503)]
    got = events(await chat(client, stream=True))
    assert len(got) == 2
    assert got[1]["error"]["code"] == "node_lost"
