"""Ollama's API on fakes: exact shapes, statuses and texts, and what reaches the scheduler."""

import hashlib
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ollamad.api.app import ROUTES
from ollamad.api.dialects import error_body_for, native_error, ollama_error, openai_error
from ollamad.api.reference import DOCS
from ollamad.api.services import ServiceError
from ollamad.core.description import NO_CHANGES, Changes
from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Likelihood,
    LoadedModel,
    Message,
    Options,
    Thought,
    ToolCall,
)
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.transfers import Transfer
from tests.fakes.api_client import LOOPBACK, REMOTE, Answer, ApiClient
from tests.fakes.api_services import FINISHED, NODE_2, NOW, model

MODEL = "smollm2:135m"
FULL = "registry.ollama.ai/library/smollm2:135m"
STAMP = "2024-01-15T10:00:00.000000Z"
COUNTS = {
    "total_duration": 1500,
    "load_duration": 500,
    "prompt_eval_count": 25,
    "prompt_eval_duration": 200,
    "eval_count": 3,
    "eval_duration": 800,
}
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "134.52M",
    "quantization_level": "Q4_1",
}
MESSAGES = [{"role": "user", "content": "hi"}]
DIGEST = "sha256:" + "ab" * 32


async def ask(client: ApiClient, path: str, method: str = "POST", **body: Any) -> Answer:
    return await client.call(method, f"/api/{path}", {"model": MODEL} | body)


# Generate and chat


async def test_generate_streams_by_default() -> None:
    client = ApiClient()
    answer = await ask(client, "generate", prompt="hi")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["x-ollamad-node"] == NODE_2
    shared = {"model": MODEL, "created_at": STAMP}
    assert answer.lines == [
        *(shared | {"response": text, "done": False} for text in ("Hel", "lo", ' "ü"\n')),
        shared
        | {"response": "", "done": True, "done_reason": "stop", "context": [1, 2, 3]}
        | COUNTS,
    ]


async def test_generate_whole_names_the_model_as_it_was_asked_for() -> None:
    answer = await ask(ApiClient(), "generate", model="SMOLLM2:135M", prompt="hi", stream=False)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    expected = {
        "model": "SMOLLM2:135M",
        "created_at": STAMP,
        "response": 'Hello "ü"\n',
        "done": True,
        "done_reason": "stop",
        "context": [1, 2, 3],
    }
    assert answer.json == expected | COUNTS


async def test_chat() -> None:
    client = ApiClient()
    lines = (await ask(client, "chat", messages=MESSAGES)).lines
    shared = {"model": MODEL, "created_at": STAMP}
    assert lines == [
        *(
            shared | {"message": {"role": "assistant", "content": text}, "done": False}
            for text in ("Hel", "lo", ' "ü"\n')
        ),
        shared
        | {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
        | COUNTS,
    ]
    whole = (await ask(client, "chat", messages=MESSAGES, stream=False)).json
    assert whole["message"] == {"role": "assistant", "content": 'Hello "ü"\n'}
    assert client.world.inference.requests[0] == GenerateRequest(
        MODEL, messages=(Message("user", "hi"),)
    )


async def test_what_is_zero_is_left_out() -> None:
    client = ApiClient()
    client.world.inference.script = [Finished("stop", total_duration=7)]
    answer = await ask(client, "generate", prompt="hi", stream=False)
    assert set(answer.json) == {
        "model", "created_at", "response", "done", "done_reason", "total_duration"
    }  # fmt: skip


async def test_thoughts_and_tool_calls_have_their_fields() -> None:
    client = ApiClient()
    call = ToolCall("add", '{"a": 1, "b": [2]}', "call_12345678", 0)
    client.world.inference.script = [Thought("Hm."), Chunk("Yes", (1,)), call, FINISHED]
    shown = {
        "id": "call_12345678",
        "function": {"index": 0, "name": "add", "arguments": {"a": 1, "b": [2]}},
    }
    lines = (await ask(client, "chat", messages=MESSAGES)).lines
    assert [line["message"] for line in lines] == [
        {"role": "assistant", "content": "", "thinking": "Hm."},
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": "", "tool_calls": [shown]},
        {"role": "assistant", "content": ""},
    ]
    whole = (await ask(client, "chat", messages=MESSAGES, stream=False)).json
    assert whole["message"] == {
        "role": "assistant",
        "content": "Yes",
        "thinking": "Hm.",
        "tool_calls": [shown],
    }
    client.world.inference.script = [Thought("Hm."), Chunk("Yes", (1,)), FINISHED]
    first, *_ = (await ask(client, "generate", prompt="hi")).lines
    assert (first["response"], first["thinking"]) == ("", "Hm.")


async def test_everything_of_a_request_reaches_the_scheduler() -> None:
    client = ApiClient()
    await ask(
        client,
        "generate",
        prompt="hi",
        system="Be brief.",
        context=[5, 6],
        format={"type": "object"},
        keep_alive="1h30m",
        truncate=False,
        shift=True,
        options={
            "num_ctx": 4096.0, "seed": 42.9, "temperature": 1, "top_p": 0.5, "stop": ["a", "b"],
            "numa": True, "no_such_option": 1, "top_k": None,
        },
    )  # fmt: skip
    assert client.world.inference.requests == [
        GenerateRequest(
            MODEL,
            prompt="hi",
            system="Be brief.",
            context=(5, 6),
            format='{"type":"object"}',
            keep_alive_s=5400.0,
            truncate=False,
            options=Options(num_ctx=4096, seed=42, temperature=1.0, top_p=0.5, stop=("a", "b")),
        )
    ]


async def test_null_is_as_good_as_nothing() -> None:
    client = ApiClient()
    nothing: dict[str, Any] = dict.fromkeys(
        ("suffix", "system", "template", "context", "stream", "raw", "images", "options", "think",
         "truncate", "shift", "logprobs", "top_logprobs", "keep_alive", "format")
    )  # fmt: skip
    assert (await ask(client, "generate", prompt="hi", **nothing)).status == 200
    nothing["tools"] = None
    message = MESSAGES[0] | dict.fromkeys(("images", "tool_calls", "tool_name", "thinking"))
    assert (await ask(client, "chat", messages=[message], **nothing)).status == 200
    silent = {"role": "assistant", "content": None}
    assert (await ask(client, "chat", messages=[*MESSAGES, silent])).status == 200
    assert client.world.inference.requests == [
        GenerateRequest(MODEL, prompt="hi"),
        GenerateRequest(MODEL, messages=(Message("user", "hi"),)),
        GenerateRequest(MODEL, messages=(Message("user", "hi"), Message("assistant", ""))),
    ]


async def test_tools_and_their_history_reach_the_scheduler() -> None:
    client = ApiClient.of_model("completion", "tools")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "thinking": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_name": "add", "tool_call_id": "call_1", "content": "2"},
    ]
    await ask(client, "chat", messages=messages, tools=[tool])
    assert client.world.inference.requests == [
        GenerateRequest(
            MODEL,
            messages=(
                Message("user", "hi"),
                Message("assistant", "", "Hm", (ToolCall("add", '{"a":1}', "call_1", 0),)),
                Message("tool", "2", tool_name="add", tool_call_id="call_1"),
            ),
            tools=msgspec.json.encode([tool]).decode(),
        )
    ]


async def test_the_own_surface_takes_tools_and_thinking_too() -> None:
    client = ApiClient.of_model("completion", "tools", "thinking")
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    body = {"model": MODEL, "messages": messages, "tools": tools, "think": "low"}
    client.world.inference.script = [Thought("Hm."), ToolCall("add", "{}", "call_2"), FINISHED]
    answer = await client.call("POST", "/chat", body)
    assert answer.json["message"] == {
        "role": "assistant",
        "content": "",
        "thinking": "Hm.",
        "tool_calls": [{"id": "call_2", "function": {"index": 0, "name": "add", "arguments": {}}}],
    }
    await client.call("POST", "/generate", {"model": MODEL, "prompt": "x"})
    first, second = client.world.inference.requests
    assert isinstance(first, GenerateRequest)
    assert isinstance(second, GenerateRequest)
    assert first.messages == (
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(ToolCall("add", '{"a":1}'),)),
    )
    assert (first.tools, first.think, second.think) == (
        msgspec.json.encode(tools).decode(), "low", "on"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("think", "expected"), [(None, "on"), (True, "on"), (False, "off"), ("low", "low")]
)
async def test_a_model_that_can_think_does(think: Any, expected: str) -> None:
    client = ApiClient.of_model("completion", "thinking")
    await ask(client, "chat", messages=MESSAGES, think=think)
    await ask(client, "generate", prompt="hi", think=think)
    first, second = client.world.inference.requests
    assert isinstance(first, GenerateRequest)
    assert isinstance(second, GenerateRequest)
    assert (first.think, second.think) == (expected, expected)
    other = ApiClient()
    assert (await ask(other, "generate", prompt="hi", think=False)).status == 200
    assert other.world.inference.requests == [GenerateRequest(MODEL, prompt="hi")]


@pytest.mark.parametrize(
    ("path", "body", "seconds", "reason"),
    [
        ("generate", {}, None, "load"),
        ("generate", {"prompt": "", "keep_alive": 300}, 300.0, "load"),
        ("generate", {"keep_alive": -1}, -1.0, "load"),
        ("generate", {"keep_alive": 0}, 0.0, "unload"),
        ("chat", {}, None, "load"),
        ("chat", {"messages": [], "keep_alive": "0"}, 0.0, "unload"),
    ],
)
async def test_loading_and_unloading_is_one_object(
    path: str, body: dict[str, Any], seconds: float | None, reason: Any
) -> None:
    client = ApiClient()
    client.world.inference.script = [Finished(reason)]
    answer = await ask(client, path, stream=True, **body)
    assert answer.headers["content-type"].startswith("application/json")
    assert (answer.json["done"], answer.json["done_reason"]) == (True, reason)
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    assert request.only_loads
    assert request.keep_alive_s == seconds


async def test_a_body_needs_no_content_type() -> None:
    """As curl sends it with -d."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await ApiClient().call(
        "POST", "/api/generate", data=b'{"model":"smollm2:135m","prompt":"x"}', headers=headers
    )
    assert answer.status == 200


# Likelihoods and pictures

LIKELY = Likelihood(b"Hi", -0.5, (Likelihood(b"Hi", -0.5), Likelihood(b"Ho", -1.5)))
SHOWN = {
    "token": "Hi",
    "logprob": -0.5,
    "bytes": [72, 105],
    "top_logprobs": [
        {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
        {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]},
    ],
}


@pytest.mark.parametrize("path", ["generate", "chat"])
async def test_logprobs_stand_beside_what_was_said(path: str) -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("Hi", (1,), (LIKELY,)), Chunk("!", (2,)), FINISHED]
    body = {"prompt": "x"} if path == "generate" else {"messages": MESSAGES}
    body |= {"logprobs": True, "top_logprobs": 2}
    first, second, last = (await ask(client, path, **body)).lines
    assert first["logprobs"] == [SHOWN]
    assert "logprobs" not in second
    assert "logprobs" not in last
    whole = (await ask(client, path, stream=False, **body)).json
    assert whole["logprobs"] == [SHOWN]
    requests = client.world.inference.requests
    assert {each.logprobs for each in requests if isinstance(each, GenerateRequest)} == {2}
    await ask(client, path, **body | {"logprobs": False})
    last_asked = requests[-1]
    assert isinstance(last_asked, GenerateRequest)
    assert last_asked.logprobs == -1


async def test_pictures_texts_behind_and_templates_reach_the_engine() -> None:
    client = ApiClient.of_model("completion", "vision")
    await ask(client, "generate", prompt="x", images=["aW1n"], suffix="y", template="{{ .Prompt }}")
    await ask(client, "generate", prompt="x", raw=True, suffix="y", shift=False)
    await ask(client, "chat", messages=[MESSAGES[0] | {"images": ["aW1n"]}])
    first, second, third = client.world.inference.requests
    assert isinstance(first, GenerateRequest)
    assert (first.images, first.suffix, first.template) == ((b"img",), "y", "{{ .Prompt }}")
    assert isinstance(second, GenerateRequest)
    assert (second.suffix, second.shift) == ("", False)
    assert isinstance(third, GenerateRequest)
    assert third.messages is not None
    assert third.messages[0].images == (b"img",)
    answer = await ask(client, "generate", prompt="x", template="{{ if }}")
    assert (answer.status, "template cannot be used" in answer.json["error"]) == (400, True)
    answer = await ask(client, "generate", prompt="x", images=["?"])
    assert (answer.status, "base64" in answer.json["error"]) == (400, True)


# Errors


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("generate", {"model": "nope"}, 404, "model 'nope' not found"),
        ("generate", {"model": ""}, 404, "model '' not found"),
        ("generate", {"model": "a/../b"}, 404, "model 'a/../b' not found"),
        ("chat", {"model": "nope"}, 404, "model 'nope' not found"),
        ("chat", {"model": None}, 400, "model is required"),
        ("embed", {"model": "nope"}, 404, 'model "nope" not found, try pulling it first'),
        ("embeddings", {"model": "nope"}, 404, 'model "nope" not found, try pulling it first'),
        ("show", {"model": "nope"}, 404, "model 'nope' not found"),
        ("show", {"model": ""}, 400, "model is required"),
        ("pull", {"model": "a b"}, 400, "invalid model name"),
        ("push", {"model": "nope"}, 404, "model 'nope' not found"),
        ("create", {"model": "a/../b", "from": MODEL}, 400, "invalid model name"),
        ("create", {"model": "x"}, 400, "neither 'from' or 'files' was specified"),
        ("create", {"model": "x", "from": "a b"}, 400, "invalid model name"),
        (
            "generate",
            {"prompt": "x", "raw": True, "system": "y"},
            400,
            "raw mode does not support template, system, or context",
        ),
        ("generate", {"prompt": "x", "images": ["eA=="]}, 400, f"{FULL} does not support vision"),
        ("generate", {"prompt": "x", "think": True}, 400, f'"{MODEL}" does not support thinking'),
        (
            "chat",
            {"messages": MESSAGES, "think": "much"},
            400,
            'invalid think value: "much" (must be "high", "medium", "low", true, or false)',
        ),
        ("chat", {"messages": MESSAGES, "tools": [{}]}, 400, f"{FULL} does not support tools"),
        (
            "chat",
            {"messages": [MESSAGES[0] | {"images": ["eA=="]}]},
            400,
            f"{FULL} does not support vision",
        ),
        (
            "generate",
            {"prompt": "x", "top_logprobs": 21},
            400,
            "top_logprobs must be between 0 and 20",
        ),
        (
            "chat",
            {"messages": [{"role": "robot", "content": "x"}]},
            400,
            "invalid role: 'robot', must be one of system, user, assistant, tool",
        ),
        (
            "generate",
            {"prompt": "x", "options": {"num_ctx": "big"}},
            400,
            'option "num_ctx" must be of type integer',
        ),
        (
            "generate",
            {"prompt": "x", "options": {"temperature": True}},
            400,
            'option "temperature" must be of type float32',
        ),
        (
            "embed",
            {"input": "x", "options": {"stop": "x"}},
            400,
            'option "stop" must be of type array of strings',
        ),
        ("generate", {"prompt": 3}, 400, "prompt must be str | null, not int"),
    ],
)
async def test_errors(path: str, body: dict[str, Any], status: int, text: str) -> None:
    client = ApiClient()
    answer = await ask(client, path, **body)
    assert (answer.status, answer.json) == (status, {"error": text})
    assert client.world.inference.requests == []
    assert client.world.library.calls == []


@pytest.mark.parametrize("number", [1e300, -(1 << 31) - 1, 1 << 31])
async def test_numbers_that_the_engine_cannot_take_are_refused(number: float) -> None:
    answer = await ask(ApiClient(), "generate", prompt="x", options={"num_keep": number})
    assert answer.json == {"error": 'option "num_keep" is out of range'}


@pytest.mark.parametrize(
    ("seed", "taken"),
    [
        (2**32 - 2, 2**32 - 2),
        (2**32 - 1, 0),  # llama.cpp's word for any
        (2**53 - 1, 2**21 - 1),  # the greatest of JavaScript
        (-3, -1),
        (1_764_200_000_123_456_789, None),
        (42.0, 42),
    ],
)
async def test_a_seed_may_have_as_many_bits_as_it_likes(seed: float, taken: int | None) -> None:
    client = ApiClient()
    assert (await ask(client, "generate", prompt="x", options={"seed": seed})).lines
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    assert request.options.seed == (int(seed) % (2**32 - 1) if taken is None else taken)


@pytest.mark.parametrize(
    ("role", "taken"), [("User", "user"), ("SYSTEM", "system"), ("developer", "system")]
)
async def test_roles_are_read_as_ollama_reads_them(role: str, taken: str) -> None:
    client = ApiClient()
    messages = [{"role": role, "content": "hi"}]
    assert (await ask(client, "chat", messages=messages)).status == 200
    [request] = client.world.inference.requests
    assert isinstance(request, GenerateRequest)
    assert request.messages is not None
    assert [message.role for message in request.messages] == [taken]


@pytest.mark.parametrize(
    ("given", "count"), [("", 0), ([], 0), (["", ""], 2), (["", "a"], 2), ("a", 1)]
)
async def test_an_empty_text_alone_is_no_input(given: Any, count: int) -> None:
    answer = await ask(ApiClient(), "embed", input=given)
    assert len(answer.json["embeddings"]) == count


async def test_an_embedding_model_does_not_generate() -> None:
    client = ApiClient.of_model("embedding")
    assert (await ask(client, "generate", prompt="x")).json == {
        "error": f'"{MODEL}" does not support generate'
    }
    assert (await ask(client, "chat", messages=MESSAGES)).json == {
        "error": f'"{MODEL}" does not support chat'
    }
    assert (await ask(client, "generate")).status == 400  # it is loaded by what it can do
    assert client.world.inference.requests == []


async def test_an_embedding_model_is_unloaded_like_any() -> None:
    """`ollama stop` says it so."""
    client = ApiClient.of_model("embedding")
    client.world.inference.script = [Finished("unload")]
    for path, body in (("generate", {}), ("chat", {"messages": []})):
        answer = await ask(client, path, keep_alive=0, **body)
        assert (answer.status, answer.json["done_reason"]) == (200, "unload")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/api/v1/generate", "generate"), ("/api/v1/chat", "chat"), ("/v1/completions", "generate"),
        ("/v1/chat/completions", "chat"), ("/v1/responses", "chat"), ("/v1/messages", "chat"),
        ("/v1/messages/count_tokens", "chat"),
    ],
)  # fmt: skip
async def test_no_surface_asks_an_embedding_model_to_write(path: str, word: str) -> None:
    """Each node that holds it would fail to load it, and none of them is to blame."""
    client = ApiClient.of_model("embedding")
    example = DOCS[f"POST {path}"].example
    assert example is not None
    body = example | {"model": MODEL}
    answer = await client.call("POST", path.removeprefix("/api/v1"), body)
    assert answer.status == 400
    assert f'"{MODEL}" does not support {word}' in answer.data.decode().replace("\\", "")
    assert client.world.inference.requests == []


async def test_the_own_surface_loads_and_unloads_what_embeds() -> None:
    client = ApiClient.of_model("embedding")
    client.world.inference.script = [Finished("load")]
    for body in ({}, {"keep_alive": 0}):
        assert (await client.call("POST", "/generate", {"model": MODEL} | body)).status == 200


async def test_an_empty_body_and_bad_json() -> None:
    client = ApiClient()
    answer = await client.call("POST", "/api/generate")
    assert (answer.status, answer.json) == (400, {"error": "missing request body"})
    answer = await client.call("POST", "/api/chat", data=b"{")
    assert answer.status == 400
    assert set(answer.json) == {"error"}
    answer = await client.call("GET", "/api/nothing")
    assert (answer.status, answer.json) == (
        404,
        {"error": "there is no such route; GET /api/v1/openapi.json has them all"},
    )
    assert (await client.call("GET", "/api/generate")).status == 405


async def test_who_may_not_is_told_in_ollamas_shape() -> None:
    client = ApiClient()
    answer = await client.call("GET", "/api/tags", role=None)
    assert (answer.status, set(answer.json)) == (401, {"error"})
    answer = await client.call("POST", "/api/pull", {"model": "x"}, role=None, peer=LOOPBACK)
    assert (answer.status, set(answer.json)) == (403, {"error"})
    assert "operator" in answer.json["error"]


async def test_a_full_queue_and_a_failure_in_the_stream() -> None:
    client = ApiClient()
    busy = "server busy, please try again.  maximum pending requests exceeded"
    client.world.inference.refusal = InferenceError(Failed("QUEUE_FULL", busy, 503))
    answer = await ask(client, "generate", prompt="x")
    assert (answer.status, answer.json) == (503, {"error": busy})
    assert answer.headers["retry-after"]
    client.world.inference.refusal = None
    client.world.inference.script = [Chunk("a", (1,)), Failed("NODE_LOST", "it is gone", 503)]
    answer = await ask(client, "generate", prompt="x")
    assert answer.status == 200
    assert answer.lines[-1] == {"error": "it is gone"}


@pytest.mark.parametrize(
    ("path", "wording"),
    [
        ("/", native_error), ("/api/v1/models", native_error), ("/api/v1", native_error),
        ("/api", native_error), ("/api/tags", ollama_error), ("/api/v10", ollama_error),
        ("/v1/models", openai_error), ("/v1", openai_error), ("/v10", native_error),
    ],
)  # fmt: skip
def test_a_path_decides_how_errors_are_worded(path: str, wording: Any) -> None:
    assert error_body_for(path) is wording


# Embeddings


async def test_embed() -> None:
    client = ApiClient()
    answer = await ask(client, "embed", input=["a", "b"], truncate=False)
    assert answer.json == {
        "model": MODEL,
        "embeddings": [[0.0, 0.5, -0.25], [1.0, 0.5, -0.25]],
        "total_duration": 9,
        "prompt_eval_count": 4,
    }
    one = await ask(client, "embed", input="a")
    assert one.json["embeddings"] == [[0.0, 0.5, -0.25]]
    assert client.world.inference.requests == [
        EmbedRequest(MODEL, ("a", "b"), truncate=False),
        EmbedRequest(MODEL, ("a",)),
    ]


async def test_embeddings_are_shortened_to_length_one() -> None:
    answer = await ask(ApiClient(), "embed", input=["a", "b"], dimensions=2)
    [first, second] = answer.json["embeddings"]
    assert first == [0.0, 1.0]
    assert second == pytest.approx([1 / 1.25**0.5, 0.5 / 1.25**0.5])
    wide = await ask(ApiClient(), "embed", input="a", dimensions=99)
    assert wide.json["embeddings"] == [[0.0, 0.5, -0.25]]
    assert (await ask(ApiClient(), "embed", input="a", dimensions=-1)).status == 400


@pytest.mark.parametrize("given", [None, "", []])
async def test_nothing_to_embed_loads_the_model(given: Any) -> None:
    client = ApiClient()
    answer = await ask(client, "embed", input=given, keep_alive=60)
    assert answer.json == {"model": MODEL, "embeddings": []}
    assert (await ask(client, "embeddings", prompt=given or None)).json == {"embedding": []}
    first, second = client.world.inference.requests
    assert first == GenerateRequest(MODEL, keep_alive_s=60.0)
    assert second == GenerateRequest(MODEL)


async def test_the_older_embeddings() -> None:
    answer = await ask(ApiClient(), "embeddings", prompt="a")
    assert answer.json == {"embedding": [0.0, 0.5, -0.25]}


# Models


# Which release of Ollama had it first.
BROUGHT = {"/v1/responses": [0, 13, 4], "/v1/messages": [0, 14, 0]}  # (0.13.4: what Codex asks for)


async def test_version_and_root() -> None:
    client = ApiClient(role=None)
    answer = await client.call("GET", "/api/version")
    assert set(answer.json) == {"version", "ollamad"}
    told = [int(part) for part in answer.json["version"].split(".")]
    for route in ROUTES:
        assert told >= BROUGHT.get(route.path, []), "clients take it for too old"
    assert (await client.call("GET", "/")).data == b"Ollama is running"
    for path in ("/", "/api/version"):
        assert (await client.call("HEAD", path)).status == 200
    assert (await ApiClient().call("HEAD", "/api/tags")).status == 200


async def test_tags_newest_first() -> None:
    client = ApiClient()
    newer = model("newer", modified_at=NOW)
    client.world.cluster.state.models["newer:latest"] = newer
    first, second = (await client.call("GET", "/api/tags")).json["models"]
    assert first["name"] == "newer"
    assert second == {
        "name": MODEL,
        "model": MODEL,
        "modified_at": "2024-01-15T09:59:00Z",
        "size": 98_000,
        "digest": model().digest.removeprefix("sha256:"),
        "details": DETAILS,
        "capabilities": ["completion"],
    }


async def test_ps_is_of_all_nodes_that_are_there() -> None:
    client = ApiClient()
    cluster = client.world.cluster
    loaded = LoadedModel(MODEL, "sha256:y", 20, 5, 2048, 0)
    cluster.presences[NODE_2] = Presence(True, NOW, Beat(NOW, Usage(), loaded=(loaded,)))
    first, second = (await client.call("GET", "/api/ps")).json["models"]
    assert first == {
        "name": MODEL,
        "model": MODEL,
        "size": 10,
        "digest": "x",
        "details": DETAILS,
        "expires_at": "2024-01-15T10:05:00Z",
        "size_vram": 0,
        "engine": "",
        "context_length": 4096,
        "node": "node_001",
    }
    assert (second["node"], second["size_vram"]) == ("node_002", 5)
    assert second["expires_at"] == "2300-01-01T00:00:00Z"
    cluster.presences[NODE_2] = Presence(False, NOW, Beat(NOW, Usage(), loaded=(loaded,)))
    assert len((await client.call("GET", "/api/ps")).json["models"]) == 1


@pytest.mark.parametrize("field", ["model", "name"])
async def test_show(field: str) -> None:
    client = ApiClient()
    shown = (await client.call("POST", "/api/show", {field: MODEL})).json
    modelfile = shown.pop("modelfile")
    assert shown == {
        "license": "Apache License\nSecond",
        "parameters": 'stop                           "<|a|>"\n'
        'stop                           "<|b|>"\n'
        "temperature                    0.5",
        "template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
        ],
        "details": DETAILS,
        "model_info": {
            "general.architecture": "llama",
            "llama.context_length": 8192,
            "five": [1, 2, 3, 4, 5],
            "six": [],
            "general.parameter_count": 134_515_008,
        },
        "capabilities": ["completion"],
        "modified_at": "2024-01-15T09:59:00Z",
    }
    for line in (
        f"FROM {MODEL}",
        'SYSTEM """Be brief."""',
        'PARAMETER stop "<|a|>"',
        "PARAMETER temperature 0.5",
        "MESSAGE user hi",
        'LICENSE """Second"""',
    ):
        assert line in modelfile.splitlines()
    verbose = await client.call("POST", "/api/show", {"model": MODEL, "verbose": True})
    assert verbose.json["model_info"]["six"] == [1, 2, 3, 4, 5, 6]


async def test_delete_and_copy_answer_with_nothing() -> None:
    client = ApiClient()
    library = client.world.library
    answer = await ask(client, "delete", "DELETE")
    assert (answer.status, answer.data) == (200, b"")
    body = {"source": "SMOLLM2:135m", "destination": "Mine"}
    answer = await client.call("POST", "/api/copy", body)
    assert (answer.status, answer.data) == (200, b"")
    same = {"source": MODEL, "destination": "Smollm2:135M"}
    assert (await client.call("POST", "/api/copy", same)).status == 200
    assert library.calls == [("delete", MODEL), ("derive", "Mine:latest", MODEL, NO_CHANGES)]


@pytest.mark.parametrize(
    ("source", "destination", "status", "text"),
    [
        ("nope", "b", 404, 'model "nope" not found'),
        ("a b", "b", 400, 'source "a b" is invalid'),
        (MODEL, "", 400, 'destination "" is invalid'),
        (MODEL, "x/../y", 400, 'destination "x/../y" is invalid'),
    ],
)
async def test_copies_that_cannot_be(source: str, destination: str, status: int, text: str) -> None:
    client = ApiClient()
    body = {"source": source, "destination": destination}
    answer = await client.call("POST", "/api/copy", body)
    assert (answer.status, answer.json) == (status, {"error": text})
    assert client.world.library.calls == []


def transfer(status: Any, done: int, **changes: Any) -> Transfer:
    plain = ApiClient().world.library.transfer_list[0]
    return msgspec.structs.replace(
        plain, status=status, bytes_done=done, digest=DIGEST, model_name="new:latest", **changes
    )


def pulling(completed: int) -> dict[str, Any]:
    step = {"status": "pulling abababababab", "digest": DIGEST, "total": 1000}
    return step | ({"completed": completed} if completed else {})


async def test_pull_tells_the_transfers_progress(autojump_clock: trio.testing.MockClock) -> None:
    client = ApiClient()
    library = client.world.library
    library.transfer_steps = [
        transfer("pending", 0, bytes_total=0),
        transfer("active", 0),
        transfer("active", 400),
        transfer("active", 400),
        transfer("completed", 1000),
    ]
    client.world.cluster.state.models["new:latest"] = model("new:latest")
    library.ready = False
    answer = await ask(client, "pull", model="new")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.lines == [
        {"status": "pulling manifest"},
        pulling(0),
        pulling(400),
        pulling(1000),
        {"status": "verifying sha256 digest"},
        {"status": "writing manifest"},
        {"status": "success"},
    ]
    assert library.calls[0] == ("download", "new:latest", None, (), None)
    library.transfer_steps = [transfer("completed", 1000)]
    whole = await ask(client, "pull", model="new", stream=False)
    assert whole.json == {"status": "success"}
    assert whole.headers["content-type"].startswith("application/json")


async def test_pull_tells_what_speaks_against_the_model(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = ApiClient()
    client.world.library.transfer_steps = [transfer("completed", 1000, warning="no engine")]
    client.world.cluster.state.models["new:latest"] = model("new:latest")
    client.world.library.ready = False
    lines = (await ask(client, "pull", model="new")).lines
    assert lines[-2:] == [{"status": "warning: no engine"}, {"status": "success"}]


async def test_pull_tells_each_file_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    client = ApiClient()
    library = client.world.library
    layers = tuple(
        (f"sha256:{letter * 64}", size) for letter, size in zip("abc", (700, 0, 300), strict=True)
    )
    library.transfer_steps = [
        transfer("active", done, layers=layers) for done in (0, 500, 500, 700, 900)
    ] + [transfer("completed", 1000, layers=layers)]
    client.world.cluster.state.models["new:latest"] = model("new:latest")
    library.ready = False
    lines = (await ask(client, "pull", model="new")).lines
    moved = [(s["status"], s["total"], s.get("completed", 0)) for s in lines if "digest" in s]
    a, b, c = (f"pulling {letter * 12}" for letter in "abc")
    assert moved == [
        (a, 700, 0), (a, 700, 500), (a, 700, 700), (b, 0, 0), (c, 300, 0), (c, 300, 200),
        (c, 300, 300),
    ]  # fmt: skip
    assert {step["digest"] for step in lines if "digest" in step} == {d for d, _ in layers}


async def test_pull_of_what_is_here_fetches_nothing() -> None:
    client = ApiClient()
    digest = model().layers[0].digest
    lines = (await ask(client, "pull")).lines
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[1] == {
        "status": f"pulling {digest[7:19]}",
        "digest": digest,
        "total": 98_000,
        "completed": 98_000,
    }
    assert lines[-1] == {"status": "success"}
    assert client.world.library.calls == [("update", "smollm2:135m")]


async def test_pull_fetches_what_the_origin_has_by_now(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = ApiClient()
    client.world.library.has_news = True
    client.world.cluster.state.models["new:latest"] = model("new:latest")
    client.world.library.transfer_steps = [transfer("active", 400), transfer("completed", 1000)]
    lines = (await ask(client, "pull", model="new")).lines
    assert lines[:3] == [{"status": "pulling manifest"}, pulling(400), pulling(1000)]
    assert lines[-1] == {"status": "success"}
    assert client.world.library.calls[0] == ("update", "new:latest")


async def test_pull_where_nobody_can_tell_leaves_what_is_here() -> None:
    client = ApiClient()
    client.world.library.error = ServiceError(502, "ORIGIN_UNREACHABLE", "no way to example.org")
    lines = (await ask(client, "pull")).lines
    assert lines[0] == {"status": "pulling manifest"}
    warning = "warning: what is here stays, newer or not: no way to example.org"
    assert lines[-2:] == [{"status": warning}, {"status": "success"}]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_pull_that_fails(status: str, autojump_clock: trio.testing.MockClock) -> None:
    client = ApiClient()
    library = client.world.library
    library.transfer_steps = [transfer("active", 1), transfer(status, 1, error="disk full")]
    text = {"failed": "disk full", "cancelled": "the pull was cancelled"}[status]
    answer = await ask(client, "pull", model="new")
    assert (answer.status, answer.lines[-1]) == (200, {"error": text})
    library.transfer_steps = [transfer(status, 1, error="disk full")]
    answer = await ask(client, "pull", model="new", stream=False)
    assert (answer.status, answer.json) == (500, {"error": text})
    library.error = ServiceError(404, "UNKNOWN_SOURCE", "nobody has it")
    answer = await ask(client, "pull", model="new")
    assert (answer.status, answer.json) == (404, {"error": "nobody has it"})


async def test_pull_whose_node_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    """It has failed 10 s after the node was last heard of, not after the pull began."""
    client = ApiClient()
    steps = [transfer("active", 1)] * 100  # 20 s
    client.world.library.transfer_steps = [*steps, None]
    began = trio.current_time()
    answer = await ask(client, "pull", model="new")
    assert answer.lines[-1] == {"error": "the node that pulls the model does not answer"}
    assert trio.current_time() - began == pytest.approx(30, abs=1)


async def test_what_is_pulled_can_be_used_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Though another node has pulled it, and this one learns of it a moment later."""
    client = ApiClient()
    cluster = client.world.cluster
    client.world.library.transfer_steps = [transfer("completed", 1000)]

    async def catch_up(timeout_s: float) -> None:
        cluster.state.models["new:latest"] = model("new:latest")

    cluster.read_barrier = catch_up  # type: ignore[method-assign]
    assert (await ask(client, "pull", model="new")).lines[-1] == {"status": "success"}
    assert "new:latest" in cluster.state.models
    del cluster.state.models["new:latest"]
    cluster.read_barrier = ApiClient().world.cluster.read_barrier  # type: ignore[method-assign]
    assert set((await ask(client, "pull", model="new")).lines[-1]) == {"error"}


async def test_create_from_a_model() -> None:
    client = ApiClient()
    answer = await ask(
        client,
        "create",
        model="pirate",
        system="Arr.",
        parameters={"temperature": 1, "stop": ["x"], "seed": 10**400 + 7, "top_k": None},
        template="{% if x %}{% endif %}",
        license="Mine",
        messages=MESSAGES,
        **{"from": "SMOLLM2:135m"},
    )
    layer = model().layers[0].digest
    assert answer.lines == [
        {"status": f"using existing layer {layer}"},
        {"status": "writing manifest"},
        {"status": "success"},
    ]
    changes = Changes(
        template="{% if x %}{% endif %}",
        system="Arr.",
        parameters={"temperature": 1, "stop": ["x"], "seed": (10**400 + 7) % (2**32 - 1)},
        messages=(Message("user", "hi"),),
        licenses=("Mine",),
    )
    assert client.world.library.calls == [("derive", "pirate:latest", MODEL, changes)]


async def test_create_from_a_model_that_is_not_here_pulls_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = ApiClient()
    library, models = client.world.library, client.world.cluster.state.models
    library.transfer_steps = [transfer("active", 400), transfer("completed", 1000)]
    library.on_download = lambda: models.update({"new:latest": model("new:latest")})
    lines = (await ask(client, "create", model="x", **{"from": "new"})).lines
    assert lines[:3] == [{"status": "pulling manifest"}, pulling(400), pulling(1000)]
    assert lines[-1] == {"status": "success"}
    asked = [call[:2] for call in library.calls if call[0] != "transfer"]
    assert asked == [("download", "new:latest"), ("derive", "x:latest")]


async def test_create_from_a_model_that_nobody_has() -> None:
    client = ApiClient()
    client.world.library.error = ServiceError(404, "UNKNOWN_SOURCE", "nobody has it")
    answer = await ask(client, "create", model="x", **{"from": "nope"})
    assert (answer.status, answer.json) == (404, {"error": "nobody has it"})


async def test_create_from_files_replaces() -> None:
    client = ApiClient()
    files = {"m.gguf": DIGEST.replace(":", "-")}
    body = {"model": "own", "files": files, "license": ["a", "b"], "stream": False}
    answer = await client.call("POST", "/api/create", body)
    assert answer.json == {"status": "success"}
    changes = Changes(licenses=("a", "b"))
    expected = ("create", "own:latest", {"m.gguf": DIGEST}, changes, True)
    assert client.world.library.calls == [expected]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"template": "{{ if }}"}, "the template cannot be used: line 1"),
        ({"quantize": "q4_0"}, "quantize is not supported"),
        ({"adapters": {"a": "x"}}, "adapters.a must be sha256:"),
        ({"parameters": {"num_ctx": "x"}}, 'option "num_ctx" must be of type integer'),
        ({"files": {"a": "sha256:zz"}}, "files.a must be sha256:"),
    ],
)
async def test_create_refuses_what_it_cannot_do(body: dict[str, Any], text: str) -> None:
    client = ApiClient()
    answer = await ask(client, "create", model="x", **({"from": MODEL} | body))
    assert answer.status == 400
    assert text in answer.json["error"]
    assert client.world.library.calls == []


async def test_push_tells_its_progress(autojump_clock: trio.testing.MockClock) -> None:
    client = ApiClient()
    client.world.library.transfer_steps = [transfer("active", 400), transfer("completed", 1000)]
    answer = await ask(client, "push")
    step = {"status": "pushing abababababab", "digest": DIGEST, "total": 1000}
    assert answer.lines == [
        {"status": "retrieving manifest"},
        step | {"completed": 400},
        step | {"completed": 1000},
        {"status": "pushing manifest"},
        {"status": "success"},
    ]
    assert client.world.library.calls[0] == ("push", MODEL, MODEL)
    client.world.library.transfer_steps = [transfer("failed", 1, error="refuses access")]
    assert (await ask(client, "push")).lines[-1] == {"error": "refuses access"}


async def test_blobs() -> None:
    client = ApiClient()
    data = b"GGUF"
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    path = f"/api/blobs/{digest}"
    assert (await client.call("HEAD", path)).status == 404
    answer = await client.call("POST", path, data=data)
    assert (answer.status, answer.data) == (201, b"")
    assert (await client.call("HEAD", path)).status == 200
    assert (await client.call("POST", path, data=data)).status == 200
    wrong = await client.call("POST", f"/api/blobs/{DIGEST}", data=data)
    assert wrong.status == 400
    assert wrong.json == {"error": f'digest mismatch, expected "{DIGEST}", got "{digest}"'}
    assert (await client.call("POST", "/api/blobs/sha256:zz", data=data)).status == 400


# Web pages


async def test_origins() -> None:
    client = ApiClient(origins=("https://chat.example", "https://*.corp.example"))

    async def call(origin: str, method: str = "GET", **headers: str) -> Answer:
        sent = {"Origin": origin, **headers}
        return await client.call(method, "/api/tags", role=None, peer=LOOPBACK, headers=sent)

    for origin in (
        "http://localhost", "http://localhost:3000", "https://127.0.0.1:1", "app://x",
        "vscode-webview://abc", "https://chat.example", "https://a.corp.example",
    ):  # fmt: skip
        answer = await call(origin)
        assert answer.status == 200, origin
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin"
    for origin in (
        "https://evil.example", "https://chat.example.evil", "http://localhost.evil", "null",
        "https://chatXexample", "https://evil/https://chat.example",
    ):  # fmt: skip
        answer = await call(origin)
        assert answer.status == 401, origin
        assert "access-control-allow-origin" not in answer.headers
    asked = {"Access-Control-Request-Headers": "authorization,x-a"}
    preflight = await call("https://chat.example", "OPTIONS", **asked)
    assert (preflight.status, preflight.data) == (204, b"")
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-a"
    assert "DELETE" in preflight.headers["access-control-allow-methods"]
    assert (await call("https://evil.example", "OPTIONS")).status == 405
    # An allowed page somewhere else is no program on this host.
    sent = {"Origin": "https://chat.example"}
    far = await client.call("GET", "/api/tags", role=None, peer=REMOTE, headers=sent)
    assert far.status == 401
    assert far.headers["access-control-allow-origin"] == "https://chat.example"
