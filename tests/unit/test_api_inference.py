"""Generate, chat, embeddings: whole and streamed, and every way in which they end."""

from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ollamad.api.generation import MAX_COALESCED, Timestamps
from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    Failover,
    Finished,
    GenerateRequest,
    InferenceError,
    Message,
    Options,
)
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import FINISHED, HELLO, NODE_1, NODE_2

MODEL = "smollm2:135m"
STAMP = "2024-01-15T10:00:00.000000Z"
COUNTS = {
    "total_duration": 1500,
    "load_duration": 500,
    "prompt_eval_count": 25,
    "prompt_eval_duration": 200,
    "eval_count": 3,
    "eval_duration": 800,
    "prompt_cached_count": 5,
}
TOO_LONG = Failed("CONTEXT_EXCEEDED", "too long", 400, {"prompt_tokens": 9000, "limit": 4096})


async def generate(client: ApiClient, **body: Any) -> Answer:
    return await client.call("POST", "/generate", {"model": MODEL, "prompt": "hi"} | body)


async def chat(client: ApiClient, **body: Any) -> Answer:
    messages = [{"role": "user", "content": "hi"}]
    return await client.call("POST", "/chat", {"model": MODEL, "messages": messages} | body)


async def test_generate_whole() -> None:
    client = ApiClient()
    answer = await generate(client, model="SMOLLM2:135m", options={"seed": 1})
    assert (
        answer.json
        == {
            "model": MODEL,
            "created_at": STAMP,
            "response": 'Hello "ü"\n',
            "done": True,
            "done_reason": "stop",
            "context": [1, 2, 3],
        }
        | COUNTS
    )
    assert answer.headers["x-ollamad-node"] == NODE_2
    expected = GenerateRequest(MODEL, prompt="hi", options=Options(seed=1))
    assert client.world.inference.requests == [expected]
    assert client.world.inference.left.is_set()


async def test_generate_streamed() -> None:
    client = ApiClient()
    answer = await generate(client, stream=True)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["x-ollamad-node"] == NODE_2
    assert answer.headers["x-request-id"]
    shared = {"model": MODEL, "created_at": STAMP}
    assert answer.lines == [
        *(
            shared | {"response": text, "done": False}
            for text in ("Hel", "lo", ' "ü"\n')
        ),
        shared
        | {"response": "", "done": True, "done_reason": "stop", "context": [1, 2, 3]}
        | COUNTS,
    ]  # fmt: skip
    assert answer.data.endswith(b"}\n")


async def test_chat_whole_and_streamed() -> None:
    client = ApiClient()
    whole = (await chat(client)).json
    assert whole["message"] == {"role": "assistant", "content": 'Hello "ü"\n'}
    assert "context" not in whole
    lines = (await chat(client, stream=True)).lines
    assert [line["message"]["content"] for line in lines] == ["Hel", "lo", ' "ü"\n', ""]
    assert [line["done"] for line in lines] == [False, False, False, True]
    assert client.world.inference.requests[0] == GenerateRequest(
        MODEL, messages=(Message("user", "hi"),)
    )


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([("user", "hi")], [("system", "Be brief."), ("user", "hi")]),
        ([("system", "Be kind."), ("user", "hi")], [("system", "Be kind."), ("user", "hi")]),
        ([], []),
    ],
    ids=["in front", "one is there", "only loads"],
)
async def test_the_system_message_of_a_chat(
    messages: list[tuple[str, str]], read: list[tuple[str, str]]
) -> None:
    client = ApiClient()
    body = {"messages": [{"role": role, "content": text} for role, text in messages]}
    await chat(client, system="Be brief.", **body)
    if messages:  # where it would go is where it went
        await client.call("POST", "/explain", {"model": MODEL, "system": "Be brief."} | body)
    for request in client.world.inference.requests:
        assert isinstance(request, GenerateRequest)
        assert request.messages == tuple(Message(role, text) for role, text in read)
        assert request.system is None  # which is of a prompt, and would change the routing


async def test_an_empty_prompt_loads_the_model() -> None:
    client = ApiClient()
    client.world.inference.script = [Finished("load", load_duration=7)]
    for answer in (
        await generate(client, prompt=""),
        await generate(client, prompt="", stream=True),
        await chat(client, messages=[], stream=True),
    ):
        (line,) = answer.lines
        assert (line["done"], line["done_reason"], line["load_duration"]) == (True, "load", 7)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [generate, chat])
async def test_an_error_before_the_first_byte_has_its_status(stream: bool, ask: Any) -> None:
    client = ApiClient()
    client.world.inference.script = [TOO_LONG]
    answer = await ask(client, stream=stream)
    assert (answer.status, answer.json) == (
        400,
        {
            "error": "too long",
            "code": "CONTEXT_EXCEEDED",
            "details": {"prompt_tokens": 9000, "limit": 4096},
        },
    )
    assert answer.headers["content-type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize(
    ("failure", "wait"),
    [
        (Failed("NODE_LOST", "it is gone", 503), "2"),
        (Failed("RUNNER_DIED", "again", 503, {"retry_after": 30}), "30"),
    ],
)
async def test_an_answer_that_fails_behind_its_beginning_tells_when_to_ask_again(
    failure: Failed, wait: str
) -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a"), failure]
    answer = await generate(client)
    assert (answer.status, answer.code) == (503, failure.code)
    assert answer.headers["retry-after"] == wait


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_its_status(stream: bool) -> None:
    client = ApiClient()
    refusal = InferenceError(Failed("QUEUE_FULL", "server busy", 503))
    for error in (refusal, ExceptionGroup("tasks", [refusal])):
        client.world.inference.refusal = error
        answer = await generate(client, stream=stream)
        assert (answer.status, answer.code) == (503, "QUEUE_FULL")
        assert answer.headers["retry-after"]


async def test_an_error_in_mid_stream_is_the_last_line() -> None:
    client = ApiClient()
    lost = Failed("RUNNER_DIED", "the runner died", 500)
    client.world.inference.script = [Chunk("Hel"), lost, Chunk("never seen")]
    answer = await generate(client, stream=True)
    assert answer.status == 200
    assert answer.lines[0]["response"] == "Hel"
    [last] = answer.lines[1:]
    assert (last["error"], last["code"]) == ("the runner died", "RUNNER_DIED")
    whole = await generate(client)
    assert (whole.status, whole.code) == (500, "RUNNER_DIED")


async def test_a_generation_that_just_stops_is_an_error() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("Hel")]
    assert (await generate(client)).code == "GENERATION_LOST"
    last = (streamed := await generate(client, stream=True)).lines[-1]
    assert last["code"] == "GENERATION_LOST"
    assert last["details"] == {"request_id": streamed.headers["x-request-id"]}
    client.world.inference.script = []
    assert (await generate(client, stream=True)).status == 500


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}], ids=str)
@pytest.mark.parametrize("begun", [False, True])
async def test_a_500_can_be_found_in_the_log(
    how: dict[str, Any], begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = ApiClient()
    client.world.inference.script = [
        *([Chunk("Hel")] if begun else []),
        Failed("ENGINE_ERROR", "broken"),
    ]
    path = "/v1/completions" if "n" in how else "/generate"
    answer = await client.call("POST", path, {"model": MODEL, "prompt": "hi"} | how)
    id_ = answer.headers["x-request-id"]
    told = {record.getMessage() for record in caplog.records}
    assert told == {f"request {id_}: ENGINE_ERROR: broken"}
    if path == "/generate":
        assert answer.lines[-1]["details"] == {"request_id": id_}
        assert len(caplog.records) == 1


async def test_what_is_no_fault_of_the_node_is_not_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = ApiClient()
    for status in (400, 503):
        client.world.inference.script = [Failed("X", "no", status)]
        assert (await generate(client)).status == status
    assert caplog.records == []


async def test_a_bug_in_mid_stream_is_in_band_and_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = ApiClient()
    pause = trio.Event()
    client.world.inference.script = [Chunk("Hel"), pause, RuntimeError("secret")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_soon, pause)
        answer = await generate(client, stream=True)
    assert answer.status == 200
    assert answer.lines[0]["response"] == "Hel"
    last = answer.lines[-1]
    assert (last["code"], len(answer.lines)) == ("INTERNAL_ERROR", 2)
    assert b"secret" not in answer.data
    assert last["details"]["request_id"] == answer.headers["x-request-id"]
    assert any(last["details"]["request_id"] in r.getMessage() for r in caplog.records)


async def _set_soon(event: trio.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    event.set()


@pytest.mark.parametrize("count", [1, MAX_COALESCED - 1, MAX_COALESCED, MAX_COALESCED + 1, 1000])
async def test_every_chunk_stays_one_line_in_order(count: int) -> None:
    client = ApiClient()
    client.world.inference.buffer = 10_000
    client.world.inference.script = [*(Chunk(f"{i} ") for i in range(count)), FINISHED]
    answer = await generate(client, stream=True)
    assert [line["response"] for line in answer.lines] == [*(f"{i} " for i in range(count)), ""]


async def test_chunks_that_wait_go_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ApiClient()
    client.world.inference.buffer = 10_000
    client.world.inference.script = [*(Chunk("x") for _ in range(100)), FINISHED]
    sizes: list[int] = []
    request_class: Any = client.app.request_class
    send_body = request_class.send_body

    async def counted(self: Any, data: bytes, *, more: bool) -> None:
        sizes.append(data.count(b"\n"))
        await send_body(self, data, more=more)

    monkeypatch.setattr(request_class, "send_body", counted)
    await generate(client, stream=True)
    assert sum(sizes) == 101
    assert len(sizes) <= 4  # the first ones, two full loads, the end
    assert max(sizes) <= MAX_COALESCED


async def test_a_deadline_before_and_after_the_first_byte(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = ApiClient(inference_deadline_s=5.0)
    never = trio.Event()
    client.world.inference.script = [never]
    for stream in (False, True):
        answer = await generate(client, stream=stream)
        assert (answer.status, answer.code) == (408, "REQUEST_TIMEOUT")
    client.world.inference.script = [Chunk("Hel"), never]
    late = await generate(client, stream=True)
    assert (late.status, late.lines[-1]["code"]) == (200, "REQUEST_TIMEOUT")
    assert client.world.inference.left.is_set()
    client.world.inference.script = list(HELLO)
    assert (await generate(client)).status == 200


async def test_embeddings() -> None:
    client = ApiClient()
    body = {"model": MODEL, "prompt": "a", "keep_alive": "1m"}
    one = await client.call("POST", "/embeddings", body)
    assert one.json["embedding"] == [0.0, 0.5, -0.25]
    assert "embeddings" not in one.json
    assert one.json["prompt_eval_count"] == 4
    assert one.headers["x-ollamad-node"] == NODE_2
    two = await client.call("POST", "/embeddings", {"model": MODEL, "input": ["a", "b"]})
    assert two.json["embeddings"] == [[0.0, 0.5, -0.25], [1.0, 0.5, -0.25]]
    assert two.json["embedding"] == two.json["embeddings"][0]
    assert client.world.inference.requests == [
        EmbedRequest(MODEL, ("a",), keep_alive_s=60.0),
        EmbedRequest(MODEL, ("a", "b")),
    ]
    client.world.inference.refusal = InferenceError(Failed("NO_REPLICA", "none", 503))
    refused = await client.call("POST", "/embeddings", body)
    assert (refused.status, refused.code) == (503, "NO_REPLICA")
    client.world.inference.refusal = InferenceError(Failed("LOAD_FAILED", "broken"))
    broken = await client.call("POST", "/embeddings", body)
    assert (broken.status, broken.json["details"]) == (
        500, {"request_id": broken.headers["x-request-id"]}
    )  # fmt: skip


def test_timestamps_have_microseconds_and_follow_the_clock() -> None:
    now = 1_705_312_800.25
    stamps = Timestamps(lambda: now)
    assert stamps.now() == "2024-01-15T10:00:00.250000Z"
    now += 0.5
    assert stamps.now() == "2024-01-15T10:00:00.750000Z"
    now += 1
    assert stamps.now() == "2024-01-15T10:00:01.750000Z"


# Failover.

MOVE = Failover(NODE_1, NODE_2, "NODE_LOST", "continue", 17, 240)


@pytest.mark.parametrize("mode", ["continue", "replay", "off"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "hi"}),
        ("/chat", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_the_mode_of_failover_is_chosen_by_field_or_header(
    mode: str, path: str, body: dict[str, Any]
) -> None:
    for changes, headers in (
        ({"failover": mode}, {}),
        ({}, {"X-Ollamad-Failover": mode}),
        ({"failover": "replay"}, {"X-Ollamad-Failover": mode}),
    ):
        client = ApiClient()
        client.world.inference.script = list(HELLO)
        answer = await client.call("POST", path, {"model": MODEL} | body | changes, headers=headers)
        assert answer.status == 200
        [request] = client.world.inference.requests
        assert isinstance(request, GenerateRequest)
        assert request.failover == mode


@pytest.mark.parametrize("headers", [{}, {"X-Ollamad-Failover": "always"}])
async def test_an_unknown_mode_of_failover_is_refused(headers: dict[str, str]) -> None:
    client = ApiClient()
    body: dict[str, Any] = {"model": MODEL, "prompt": "hi"}
    if not headers:
        body["failover"] = "always"
    answer = await client.call("POST", "/generate", body, headers=headers)
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert "must be one of continue, replay, off" in answer.json["error"]
    assert client.world.inference.requests == []


TURN: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "hi"}),
        ("/chat", TURN),
        ("/api/generate", {"prompt": "hi"}),
        ("/api/chat", TURN),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", TURN),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", TURN | {"max_tokens": 9}),
    ],
)
async def test_the_end_tells_which_nodes_went_on(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    client = ApiClient()
    client.world.inference.script = [
        *HELLO[:-1],
        msgspec.structs.replace(FINISHED, failovers=(MOVE,)),
    ]
    answer = await client.call("POST", path, {"model": MODEL, "stream": stream} | body)
    parts = answer.parts if stream else [answer.json]
    if stream and path == "/v1/responses":
        parts = [part.get("response", {}) for part in parts]
    [last] = [part for part in parts if "failovers" in part]
    assert last["failovers"] == [
        {
            "from_node": NODE_1,
            "to_node": NODE_2,
            "reason": "NODE_LOST",
            "mode": "continue",
            "after_tokens": 17,
            "silence_ms": 240,
        }
    ]
    if not stream:
        assert answer.headers["x-ollamad-failovers"] == "1"
        assert answer.headers["x-ollamad-node"] == NODE_2
