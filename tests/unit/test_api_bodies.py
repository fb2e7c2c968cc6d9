"""Request bodies: what is taken, and the error that names the field of what is not."""

import json
from typing import Any

import pytest

from ollamad.api.bodies import (
    FOR_EVER_S,
    ChatBody,
    EmbedBody,
    GenerateBody,
    decode_body,
    keep_alive_s,
)
from ollamad.api.services import ServiceError
from ollamad.core.inference import EmbedRequest, GenerateRequest, Message, Options
from tests.fakes.api_client import ApiClient

MODEL = "smollm2:135m"


async def refused(path: str, body: Any, **how: Any) -> tuple[int, str, str, str]:
    answer = await ApiClient().call("POST", path, body, **how)
    details = answer.json["details"]
    return answer.status, answer.code, details.get("field", ""), details.get("expected", "")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ([], "body"),
        ("text", "body"),
        ({"model": MODEL, "prompt": 1}, "prompt"),
        ({"model": MODEL, "stream": "yes"}, "stream"),
        ({"model": MODEL, "stream": 1}, "stream"),
        ({"model": MODEL, "raw": "no"}, "raw"),
        ({"model": MODEL, "raw": True, "system": "s"}, "raw"),
        ({"model": MODEL, "options": []}, "options"),
        ({"model": MODEL, "options": {"temperature": "hot"}}, "options.temperature"),
        ({"model": MODEL, "options": {"num_ctx": "1"}}, "options.num_ctx"),
        ({"model": MODEL, "options": {"num_ctx": True}}, "options.num_ctx"),
        ({"model": MODEL, "options": {"num_predict": 10**30}}, "options.num_predict"),
        ({"model": MODEL, "options": {"num_keep": -(2**31) - 1}}, "options.num_keep"),
        ({"model": MODEL, "options": {"stop": "x"}}, "options.stop"),
        ({"model": MODEL, "options": {"stop": ["x", 1]}}, "options.stop"),
        ({"model": MODEL, "context": [1, "2"]}, "context[1]"),
        ({"model": MODEL, "context": [-1]}, "context[0]"),
        ({"model": MODEL, "context": [2**40]}, "context[0]"),
        ({"model": MODEL, "format": "xml"}, "format"),
        ({"model": MODEL, "format": 3}, "format"),
        ({"model": MODEL, "keep_alive": "5"}, "keep_alive"),
        ({"model": MODEL, "keep_alive": "5 m"}, "keep_alive"),
        ({"model": MODEL, "keep_alive": "m"}, "keep_alive"),
        ({"model": MODEL, "keep_alive": ""}, "keep_alive"),
        ({"model": MODEL, "keep_alive": "٣m"}, "keep_alive"),
        ({"model": MODEL, "keep_alive": True}, "keep_alive"),
        ({"model": MODEL, "keep_alive": []}, "keep_alive"),
    ],
    ids=str,
)
async def test_a_bad_field_is_named(body: Any, field: str) -> None:
    status, code, named, expected = await refused("/generate", body)
    assert (status, code, named) == (400, "INVALID_REQUEST", field)
    assert expected or field == "raw"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ("hello", "messages[0]"),
    ],
    ids=str,
)
async def test_a_bad_message_is_named(message: Any, field: str) -> None:
    status, code, named, _ = await refused("/chat", {"model": MODEL, "messages": [message]})
    assert (status, code, named) == (400, "INVALID_REQUEST", field)


async def test_a_chat_needs_its_messages() -> None:
    assert (await refused("/chat", {"model": MODEL}))[2] == "messages"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"template": "{{ if }}"}, "template"),
        ("/generate", {"template": "{{ .A }}", "raw": True}, "raw"),
        ("/generate", {"images": ["x"]}, "images[0]"),
        ("/generate", {"images": ["", "eA=="]}, "images[0]"),
        ("/generate", {"top_logprobs": 21}, "top_logprobs"),
        ("/chat", {"top_logprobs": -1}, "top_logprobs"),
        (
            "/chat",
            {"messages": [{"role": "user", "images": ["eA==", "data:image/png;base64,eA=="]}]},
            "messages[0].images[1]",
        ),
    ],
    ids=str,
)
async def test_what_cannot_be_used_is_refused_by_name(
    path: str, body: dict[str, Any], field: str
) -> None:
    found = await refused(path, {"model": MODEL, "messages": []} | body)
    assert found[:3] == (400, "INVALID_REQUEST", field)


async def test_what_a_generation_may_bring_along() -> None:
    client = ApiClient.of_model("completion", "vision")
    body = {
        "model": MODEL,
        "prompt": "x",
        "suffix": "y",
        "template": "{{ .Prompt }}",
        "images": ["aW1n"],
        "logprobs": True,
        "top_logprobs": 3,
        "shift": False,
    }
    assert (await client.call("POST", "/generate", body)).status == 200
    assert client.world.inference.requests == [
        GenerateRequest(
            MODEL,
            prompt="x",
            suffix="y",
            template="{{ .Prompt }}",
            images=(b"img",),
            logprobs=3,
            shift=False,
        )
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"tools": [{"function": {"name": "f"}}]}, "does not support tools"),
        ({"messages": [{"role": "user", "images": ["eA=="]}]}, "does not support vision"),
        ({"think": True}, "does not support thinking"),
        ({"think": "low"}, "does not support thinking"),
    ],
    ids=str,
)
async def test_what_the_model_cannot_do_is_refused(body: dict[str, Any], text: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    answer = await ApiClient().call("POST", "/chat", {"model": MODEL, "messages": messages} | body)
    assert (answer.status, answer.code) == (400, "NOT_SUPPORTED")
    assert text in answer.json["error"]


async def test_a_way_to_think_that_is_none() -> None:
    found = await refused("/generate", {"model": MODEL, "prompt": "x", "think": "much"})
    assert found[:3] == (400, "INVALID_REQUEST", "think")


async def test_what_would_not_change_the_answer_is_ignored() -> None:
    body = {
        "model": MODEL,
        "prompt": "x",
        "suffix": "",
        "images": [],
        "tools": None,
        "think": False,
        "logprobs": False,
        "top_logprobs": 0,
        "unknown": {"a": 1},
        "options": {"unknown": "x", "temperature": 1},
    }
    client = ApiClient()
    assert (await client.call("POST", "/generate", body)).status == 200
    assert client.world.inference.requests == [
        GenerateRequest(MODEL, prompt="x", options=Options(temperature=1.0))
    ]


@pytest.mark.parametrize("path", ["/generate", "/api/generate"])
async def test_a_body_that_was_written_out_whole_says_no_more_than_its_values(path: str) -> None:
    nothing = ("stream", "raw", "suffix", "template", "system", "context", "images", "format")
    body = {"model": MODEL, "prompt": "x", "options": {"num_ctx": 4096.0, "top_k": None}}
    client = ApiClient()
    assert (await client.call("POST", path, body | dict.fromkeys(nothing))).status == 200
    expected = GenerateRequest(MODEL, prompt="x", options=Options(num_ctx=4096))
    assert client.world.inference.requests == [expected]
    assert (await client.call("POST", path, {"model": MODEL, "prompt": None})).status == 200


@pytest.mark.parametrize("path", ["/generate", "/api/generate", "/api/embed"])
async def test_numbers_of_any_length(path: str) -> None:
    client = ApiClient()
    shared = {"model": MODEL, "prompt": "x", "input": "x", "raw": True}
    for name, status in (("temperature", 400), ("num_ctx", 400), ("seed", 200)):
        answer = await client.call("POST", path, shared | {"options": {name: 10**400}})
        assert answer.status == status, answer.data
        assert status == 200 or f'"{name}" is out of range' in answer.json["error"]
    answer = await client.call(
        "POST", "/api/create", {"model": "x", "from": MODEL, "parameters": {"temperature": 10**400}}
    )
    assert answer.status == 400


@pytest.mark.parametrize("breaks", ["\n", "\r\n"])
async def test_a_picture_may_be_broken_into_lines(breaks: str) -> None:
    client = ApiClient.of_model("completion", "vision")
    for path in ("/generate", "/api/generate"):
        body = {"model": MODEL, "prompt": "x", "images": [f"aW{breaks}1n{breaks}"]}
        assert (await client.call("POST", path, body)).status == 200
    expected = GenerateRequest(MODEL, prompt="x", images=(b"img",))
    assert client.world.inference.requests == [expected, expected]


# Tools

FUNCTION = {"name": "f", "parameters": {"type": "object", "default": None}}
CHATS = ("/chat", "/api/chat", "/v1/chat/completions")


async def offer(client: ApiClient, path: str, *tools: Any) -> Any:
    messages = [{"role": "user", "content": "x"}]
    body = {"model": MODEL, "messages": messages, "input": "x", "tools": tools, "stream": False}
    return await client.call("POST", path, body)


@pytest.mark.parametrize("path", [*CHATS, "/v1/responses"])
async def test_a_tool_reaches_the_engine_without_nulls_but_those_of_its_schema(path: str) -> None:
    client = ApiClient.of_model("completion", "tools")
    function = FUNCTION | {"description": None, "strict": None}
    tool = function if path == "/v1/responses" else {"function": function}
    for more in ({}, {"type": None}, {"type": "function"}):
        assert (await offer(client, path, tool | more)).status == 200
    tools = [{"type": "function", "function": FUNCTION}]
    requests = client.world.inference.requests
    asked = [json.loads(each.tools) for each in requests if isinstance(each, GenerateRequest)]
    assert asked == [tools] * 3


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize(
    ("tool", "field"),
    [
        ({"type": "custom", "custom": {"name": "f"}}, "tools[1].type 'custom'"),
        ({"type": "function"}, "tools[1].function"),
        ({"type": "function", "function": {}}, "tools[1].function.name"),
        ({"type": "function", "function": FUNCTION | {"parameters": "x"}}, "parameters"),
    ],
    ids=str,
)
async def test_a_tool_that_is_no_function_is_named(path: str, tool: Any, field: str) -> None:
    client = ApiClient.of_model("completion", "tools")
    answer = await offer(client, path, {"type": "function", "function": FUNCTION}, tool)
    assert (answer.status, client.world.inference.requests) == (400, [])
    assert field in str(answer.json["error"])


def test_a_whole_generate_request() -> None:
    body = decode_body(
        b'{"model":"m","prompt":"p","system":"s","context":[1,2],"format":"json","stream":true,'
        b'"options":{"temperature":0,"stop":["a"],"seed":4294967294,"num_ctx":4096},'
        b'"keep_alive":"1h30m","truncate":false}',
        GenerateBody,
    )
    assert body.stream
    assert body.request() == GenerateRequest(
        "m",
        prompt="p",
        system="s",
        context=(1, 2),
        format="json",
        options=Options(temperature=0.0, stop=("a",), seed=4294967294, num_ctx=4096),
        keep_alive_s=5400.0,
        truncate=False,
    )


def test_a_schema_goes_on_as_json_text_in_its_own_order() -> None:
    body = decode_body(
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"format":{"z":1,"a":{"b":[]}}}',
        ChatBody,
    )
    request = body.request()
    assert request.format == '{"z":1,"a":{"b":[]}}'
    assert request.messages == (Message("user", "x"),)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (0, 0.0),
        (300, 300.0),
        (1.5, 1.5),
        (-1, FOR_EVER_S),
        (-0.5, FOR_EVER_S),
        ("0", 0.0),
        ("0s", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("+10s", 10.0),
        ("-1s", FOR_EVER_S),
        ("250ms", 0.25),
        ("100us", 0.0001),
        ("100µs", 0.0001),
        ("1000000000h", FOR_EVER_S),
        (1e300, FOR_EVER_S),
        (10**400, FOR_EVER_S),
    ],
)
def test_keep_alive_in_all_its_forms(given: Any, expected: float | None) -> None:
    assert keep_alive_s(given) == (None if expected is None else pytest.approx(expected))


def test_embeddings_take_a_prompt_or_inputs() -> None:
    def request(body: bytes) -> EmbedRequest:
        return decode_body(body, EmbedBody).request()

    assert request(b'{"model":"m","prompt":"a"}').inputs == ("a",)
    assert request(b'{"model":"m","input":"a"}').inputs == ("a",)
    assert request(b'{"model":"m","prompt":"x","input":["a","b"]}').inputs == ("a", "b")
    for bad, field in [
        (b'{"model":"m"}', "prompt"),
        (b'{"model":"m","prompt":""}', "prompt"),
        (b'{"model":"m","input":[]}', "input"),
        (b'{"model":"m","input":["a",""]}', "input"),
    ]:
        with pytest.raises(ServiceError) as caught:
            request(bad)
        assert caught.value.details["field"] == field


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b'{"model":"m",}',
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b'{"model":"m"} x',
        b"[" * 100_000,
        b'{"options":' * 50_000,
        b'{"model":"m","keep_alive":1e999}',
        b'{"format":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b',"model":"m"}',
    ],
    ids=lambda data: repr(data[:24]),
)
async def test_what_is_no_json_is_told_so(data: bytes) -> None:
    answer = await ApiClient().call("POST", "/generate", data=data)
    assert answer.status == 400, answer.data
    assert answer.code in ("INVALID_JSON", "INVALID_REQUEST")


async def test_an_empty_body_is_told_so() -> None:
    for data in (b"", b"  \n"):
        answer = await ApiClient().call("POST", "/generate", data=data)
        assert (answer.status, answer.json["error"]) == (400, "missing request body")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/x"])
async def test_another_content_type_is_415(kind: str) -> None:
    headers = {"Content-Type": kind}
    answer = await ApiClient().call("POST", "/generate", data=b'{"model":"m"}', headers=headers)
    assert (answer.status, answer.code) == (415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", None])
async def test_json_by_any_name_is_taken(kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    data = b'{"model":"smollm2:135m"}'
    answer = await ApiClient().call("POST", "/generate", data=data, headers=headers)
    assert answer.status == 200
