"""Every JSON example of the document, held against a live answer, key by key, type by type."""

import re
from typing import Any

import pytest

from ollamad.api.app import BASE, ROUTES
from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import NODE_1, PASSWORD, STRANGER
from tests.fakes.document import (
    DOCUMENT,
    differences,
    parse,
    read_examples,
    read_socket_examples,
)

# How to ask for each route of the document: path arguments, and a body where it shows none.
REQUESTS: dict[str, tuple[str, Any]] = {
    "GET /health": ("/health", None),
    "GET /version": ("/version", None),
    "GET /cluster/status": ("/cluster/status", None),
    "GET /nodes": ("/nodes", None),
    "GET /nodes/:id": (f"/nodes/{NODE_1}", None),
    "POST /nodes/:id/drain": (f"/nodes/{NODE_1}/drain", None),
    "POST /nodes/:id/undrain": (f"/nodes/{NODE_1}/undrain", None),
    "GET /models": ("/models", None),
    "GET /models/:name": ("/models/smollm2:135m", None),
    "POST /models/:name/download": ("/models/llama2:7b/download", None),
    "DELETE /models/:name": ("/models/smollm2:135m", None),
    "POST /distribution/auto-configure": ("/distribution/auto-configure", {}),
    "GET /transfers": ("/transfers", None),
    "GET /transfers/:id": ("/transfers/transfer_001", None),
    "GET /metrics": ("/metrics", None),
    "GET /cluster/leader": ("/cluster/leader", None),
    "POST /cluster/join": ("/cluster/join", {"node_id": STRANGER}),
    "POST /cluster/leave": ("/cluster/leave", {"node_id": NODE_1}),
    "POST /generate": ("/generate", {"model": "smollm2:135m"}),
    "POST /chat": ("/chat", {"model": "smollm2:135m"}),
    "POST /embeddings": ("/embeddings", {"model": "smollm2:135m"}),
}


EXAMPLES = read_examples()


def test_the_document_was_read() -> None:
    assert set(EXAMPLES) == set(REQUESTS)
    assert all("Response" in example for example in EXAMPLES.values())


def test_no_example_of_the_document_is_left_out() -> None:
    requests, rest = DOCUMENT.read_text().split("## WebSocket API")
    messages, errors = rest.split("## Error Handling")
    assert requests.count("```json") == sum(map(len, EXAMPLES.values()))
    # Those of the WebSocket are held by its own tests.
    assert messages.count("```json") == sum(map(len, read_socket_examples()))
    assert errors.count("```json") == 1  # the shape of errors, below


def test_differences_are_found() -> None:
    example = {"a": 1, "b": [{"c": "x"}], "d": True, "e": 1.5}
    assert differences(example, {"a": 2, "b": [{"c": ""}], "d": False, "e": 1, "f": 0}) == []
    broken: dict[str, Any] = {"a": 1.0, "b": [{"c": None}, {}], "d": 1}
    assert differences(example, broken) == [
        "$.a: 1.0 is no int",
        "$.b[0].c: None is no str",
        "$.b[1].c is missing",
        "$.d: 1 is no bool",
        "$.e is missing",
    ]


@pytest.mark.parametrize("route", sorted(REQUESTS))
async def test_answers_match_the_document(route: str) -> None:
    path, override = REQUESTS[route]
    body = EXAMPLES[route].get("Request Body")
    if body is not None:
        body |= override
    answer = await ApiClient().call(route.split()[0], path, body)
    assert answer.status == 200, answer.data
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert differences(EXAMPLES[route]["Response"], answer.json) == []


async def test_every_error_has_the_documents_shape() -> None:
    text = DOCUMENT.read_text()
    block = re.search(r"### Error Response Format\n\n```json\n(.*?)```", text, re.DOTALL)
    assert block is not None
    example = parse(block[1])
    client = ApiClient()
    for method, path in [("GET", "/nope"), ("PUT", "/nodes"), ("GET", "/nodes/nobody")]:
        answer = await client.call(method, path)
        assert set(answer.json) == set(example)
        assert isinstance(answer.json["details"], dict)
        assert answer.code == answer.code.upper()
    bare = await client.call("GET", "/nodes", role=None)
    assert (bare.status, set(bare.json)) == (401, set(example))


def test_every_route_of_the_document_is_in_the_table() -> None:
    table = {f"{route.method} {re.sub('<.*?>', ':x', route.path)}" for route in ROUTES}
    for route in REQUESTS:
        method, path = route.split()
        assert f"{method} {BASE}{re.sub(':[a-z]+', ':x', path)}" in table


async def test_login_has_the_shape_of_the_contract() -> None:
    body = {"username": "admin", "password": PASSWORD}
    answer = await ApiClient().call("POST", "/auth/login", body, role=None)
    example = {
        "token": "x",
        "refresh_token": "x",
        "expires_at": "2024-01-15T10:00:00Z",
        "user": {"id": "x", "username": "x", "role": "x"},
    }
    assert answer.status == 200
    assert differences(example, answer.json) == []


def test_the_page_on_the_api_names_every_route_with_its_role() -> None:
    page = (DOCUMENT.parents[1] / "api.md").read_text()
    table = page.partition("| role | routes |")[2].partition("\n\n")[0]
    told = {
        (route, cells[1].strip())
        for line in table.splitlines()[2:]
        if (cells := line.split("|"))
        for route in re.findall(r"`(\w+ /\S*)`", cells[2])
    }
    names = {"reference": "id", "transfer_id": "id", "key_id": "id", "username": "name"}
    table_of_app = {
        (
            re.sub(
                r"<(?:\w+:)?(\w+)>",
                lambda found: ":" + names.get(found[1], found[1]),
                f"{route.method} {route.path.removeprefix(BASE)}",
            ),
            route.role or "none",
        )
        for route in ROUTES
        if route.path == "/" or (route.path.startswith(f"{BASE}/") and "/docs/" not in route.path)
    }
    assert told == table_of_app
