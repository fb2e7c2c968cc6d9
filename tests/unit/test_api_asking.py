"""On what terms clients ask, what they are told while they wait, why a node, and resuming."""

from typing import Any

import pytest

from ollamad.core.admission import Place
from ollamad.core.explanation import Explanation, NodeScore
from ollamad.core.inference import Chunk, Failed, Finished, InferenceError, ToolCall
from ollamad.core.transcripts import MAX_ID_CHARS, Resume
from tests.fakes.api_client import Answer, ApiClient
from tests.fakes.api_services import HELLO, NODE_2

MODEL = "smollm2:135m"
HEADERS = {
    "X-Ollamad-Priority": "low",
    "X-Ollamad-Deadline": "2.5",
    "X-Ollamad-Explain": "true",
}
PATHS = ["/generate", "/chat", "/api/generate", "/api/chat", "/v1/chat/completions"]
PLACES = (Place(3, 7, 4.5), Place(1, 5, 1.2))


def scores(count: int) -> tuple[NodeScore, ...]:
    return tuple(
        NodeScore(
            f"Qm{n}",
            f"näme-{n}",
            n == 0,
            True,
            "",
            True,
            True,
            4,
            n,
            0,
            0.5,
            12,
            90.0,
            0.0,
            0.0,
            0.1,
        )
        for n in range(count)
    )


async def ask(
    client: ApiClient, path: str = "/generate", headers: Any = None, role: Any = "", **body: Any
) -> Answer:
    messages = [{"role": "user", "content": "hi"}]
    says = {"messages": messages} if "chat" in path else {"prompt": "hi"}
    sent = {"model": MODEL, "stream": False} | says | body
    return await client.call("POST", path, sent, headers=headers, role=role)


@pytest.mark.parametrize("path", PATHS)
async def test_every_surface_says_who_asks_and_on_what_terms(path: str) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    assert (await ask(client, path, HEADERS, role="inference")).status == 200
    [asker] = client.world.inference.askers
    assert (asker.identity, asker.priority, asker.deadline_s) == ("inference", -1, 2.5)
    assert asker.wants_scores


async def test_keys_of_one_name_are_callers_of_their_own() -> None:
    client = ApiClient()
    for _ in range(2):
        made = await client.call("POST", "/keys", {"name": "default", "role": "inference"})
        bearer = {"Authorization": f"Bearer {made.json['key']}"}
        body = {"model": MODEL, "prompt": "hi"}
        answer = await client.call("POST", "/generate", body, headers=bearer, role=None)
        assert answer.status == 200
    first, second = client.world.inference.askers
    assert first.identity != second.identity


async def test_embeddings_too() -> None:
    client = ApiClient()
    await client.call("POST", "/embeddings", {"model": MODEL, "prompt": "x"}, headers=HEADERS)
    [asker] = client.world.inference.askers
    assert (asker.identity, asker.deadline_s) == ("admin", 2.5)


@pytest.mark.parametrize(
    ("header", "value", "role", "status"),
    [
        ("X-Ollamad-Priority", "urgent", "admin", 400),
        ("X-Ollamad-Priority", "high", "inference", 403),
        ("X-Ollamad-Priority", "high", "operator", 200),
        ("X-Ollamad-Deadline", "soon", "admin", 400),
        ("X-Ollamad-Deadline", "0", "admin", 400),
        ("X-Ollamad-Deadline", "nan", "admin", 400),
        ("X-Ollamad-Deadline", "1e9", "admin", 400),
    ],
)
async def test_terms_that_make_no_sense_are_refused(
    header: str, value: str, role: str, status: int
) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    answer = await ask(client, headers={header: value}, role=role)
    assert answer.status == status
    if status != 200:
        assert header in answer.json["error"]
        assert client.world.inference.requests == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_scores_come_with_the_answer(path: str, stream: bool) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.explanation = Explanation("prefix", "why", 9, "Qm0", scores(100))
    plain = await ask(client, path, stream=stream)
    assert "x-ollamad-scores" not in plain.headers
    answer = await ask(client, path, HEADERS, stream=stream)
    header = answer.headers["x-ollamad-scores"]
    assert header.isascii()
    assert len(header) < 8000
    assert header.count('"node_id"') == 16
    assert "n\\u00e4me-0" in header
    if path in ("/generate", "/chat"):
        end = answer.lines[-1]
        assert end["routing"]["chosen"] == "Qm0"
        assert len(end["routing"]["scores"]) == 100
        assert "routing" not in plain.lines[-1]


async def test_who_waits_is_told_its_place_in_a_native_stream() -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    answer = await ask(client, stream=True)
    first, second, *_, last = answer.lines
    assert (first["status"], first["position"], first["waiting"]) == ("queued", 3, 7)
    assert (first["response"], first["done"], first["estimate_seconds"]) == ("", False, 4.5)
    assert second["position"] == 1
    assert last["done"]
    assert last["node_id"] == NODE_2
    assert "".join(line.get("response", "") for line in answer.lines) == 'Hello "ü"\n'


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
async def test_who_waits_with_a_client_of_ollama_reads_nothing_but_answers(path: str) -> None:
    """Its package reads every line as JSON, blank ones too."""
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    answer = await ask(client, path, stream=True)
    assert [line["done"] for line in answer.lines] == [False, False, False, True]
    assert all("status" not in line for line in answer.lines)


async def test_who_waits_is_told_its_place_in_comments_of_a_server_sent_stream() -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    answer = await ask(client, "/v1/chat/completions", stream=True)
    assert answer.data.startswith(b": queued, position 3, about 4 s\n\n: queued, position 1")
    assert answer.data.endswith(b"data: [DONE]\n\n")


TURN: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
EVENTS = {
    "/v1/chat/completions": TURN,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": TURN | {"max_tokens": 9},
}


@pytest.mark.parametrize("path", EVENTS)
async def test_what_came_too_late_for_the_headers_is_in_comments(path: str) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    body = EVENTS[path] | {"model": MODEL, "stream": True}
    late: list[str] = []
    calm: list[str] = []
    for comments in (late, calm):
        answer = await client.call("POST", path, body, headers=HEADERS)
        before_events = answer.data.decode().split("data:")[0].splitlines()
        comments += [line[2:] for line in before_events if line.startswith(": X-")]
        client.world.inference.places = ()
    told = dict(comment.split(": ", 1) for comment in late)
    assert told.pop("X-Ollamad-Scores").startswith("{")
    assert told == {
        "X-Ollamad-Node": NODE_2,
        "X-Ollamad-Queue-Position": "3",
        "X-Ollamad-Queue-Estimate": "4.5",
        "X-Ollamad-Queued": "1.500",
    }
    assert calm == []
    assert answer.headers["x-ollamad-node"] == NODE_2


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_tell_how_the_first_came_to_its_node(stream: bool) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    answer = await ask(client, "/v1/chat/completions", HEADERS, n=2, stream=stream)
    assert answer.headers["x-ollamad-node"] == NODE_2
    assert answer.headers["x-ollamad-queue-position"] == "3"
    assert "x-ollamad-scores" in answer.headers


@pytest.mark.parametrize("path", ["/api/generate", "/generate"])
async def test_who_waited_reads_it_in_the_headers(path: str) -> None:
    client = ApiClient()
    client.world.inference.script = list(HELLO)
    client.world.inference.places = PLACES
    answer = await ask(client, path, stream=path.startswith("/api"))
    assert answer.headers["x-ollamad-queue-position"] == "3"
    assert answer.headers["x-ollamad-queue-estimate"] == "4.5"
    assert answer.headers["x-ollamad-queued"] == "1.500"
    assert b"queued" not in answer.data, "Ollama's clients know no such line"


async def test_a_refusal_after_waiting_is_the_last_line() -> None:
    client = ApiClient()
    client.world.inference.places = PLACES
    client.world.inference.refusal = InferenceError(Failed("NO_REPLICA", "gone", 503))
    answer = await ask(client, stream=True)
    assert answer.status == 200
    assert answer.lines[-1] == {"error": "gone", "code": "NO_REPLICA", "details": {}}


@pytest.mark.parametrize("path", PATHS)
async def test_a_full_queue_says_when_to_come_back(path: str) -> None:
    client = ApiClient()
    text = "server busy, please try again.  maximum pending requests exceeded"
    failure = Failed("QUEUE_FULL", text, 503, {"retry_after": 17})
    client.world.inference.refusal = InferenceError(failure)
    answer = await ask(client, path)
    assert (answer.status, answer.headers["retry-after"]) == (503, "17")
    assert text in answer.data.decode()


# Explaining.


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hi", "system": "be brief"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "hi", "context": [1, 2]},
    ],
)
async def test_a_decision_is_explained_without_running_it(body: dict[str, Any]) -> None:
    client = ApiClient()
    client.world.inference.explanation = Explanation("prefix", "why", 9, "Qm0", scores(2))
    answer = await client.call("POST", "/explain", {"model": MODEL} | body, role="viewer")
    assert answer.status == 200
    assert answer.json["why"] == "why"
    assert [row["node"] for row in answer.json["scores"]] == ["näme-0", "näme-1"]
    [request] = client.world.inference.requests
    assert request.model == MODEL
    assert client.world.inference.askers == []


async def test_only_what_exists_is_explained() -> None:
    client = ApiClient()
    answer = await client.call("POST", "/explain", {"model": "nope", "prompt": "x"})
    assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")


# Resuming.


@pytest.mark.parametrize("path", ["/generate", "/chat"])
async def test_a_named_answer_counts_its_tokens(path: str) -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a", (1,)), Chunk("bc", (2, 3)), Finished("stop")]
    answer = await ask(client, path, stream=True, request_id="r1", resume_from=5, received="xyz")
    assert [line.get("token") for line in answer.lines] == [6, 8, None]
    assert client.world.inference.resumes == [Resume(5, "xyz")]
    assert client.world.inference.requests[0].request_id == "r1"  # type: ignore[union-attr]


async def test_nothing_is_counted_where_nobody_asked() -> None:
    client = ApiClient()
    client.world.inference.script = [Chunk("a", (1,)), Finished("stop")]
    answer = await ask(client, stream=True)
    assert all("token" not in line for line in answer.lines)
    assert client.world.inference.resumes == [None]


@pytest.mark.parametrize("unknown", [Chunk("b"), ToolCall("f")])
async def test_a_count_that_would_be_wrong_is_left_out(unknown: Any) -> None:
    client = ApiClient()
    client.world.inference.script = [
        Chunk("a", (1,)),
        unknown,
        Chunk("c", (3,)),
        Finished("stop"),
    ]
    answer = await ask(client, stream=True, request_id="r1")
    assert [line.get("token") for line in answer.lines] == [1, None, None, None]


@pytest.mark.parametrize(
    "body",
    [
        {"resume_from": 3},
        {"received": "x"},
        {"request_id": ""},
        {"request_id": "x" * (MAX_ID_CHARS + 1)},
        {"request_id": "x", "resume_from": -1},
    ],
)
async def test_a_resumption_that_makes_no_sense_is_refused(body: dict[str, Any]) -> None:
    client = ApiClient()
    answer = await ask(client, **body)
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert client.world.inference.requests == []
