"""The OpenAPI document: whole, true, served; and the page that shows it, which asks nobody else."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from ollamad.api.app import BASE, ROUTES
from ollamad.api.openapi import document, key_of, template_of
from ollamad.api.reference import DOCS
from tests.fakes.api_client import LOOPBACK, ApiClient
from tests.fakes.api_examples import FILE, LEFT_OUT, ask, operations

EXAMPLES = json.loads(FILE.read_text())
DOCUMENT: Any = json.loads(msgspec.json.encode(document(ROUTES, EXAMPLES)))
OPERATIONS = [
    (path, method, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolve(reference: str) -> Any:
    found = DOCUMENT
    for key in reference.removeprefix("#/").split("/"):
        found = found[key]
    return found


def test_every_route_is_described_and_nothing_else() -> None:
    table = {key_of(route) for route in ROUTES}
    assert table - DOCS.keys() == set(), "describe these in reference.py"
    assert DOCS.keys() - table == set()
    told = {f"{method.upper()} {path}" for path, method, _ in OPERATIONS}
    assert told == {f"{route.method} {template_of(route.path)}" for route in ROUTES}


def test_every_route_of_our_own_has_types() -> None:
    for route in ROUTES:
        doc = DOCS[key_of(route)]
        untyped = [f"{BASE}/openapi.json", f"{BASE}/docs"]
        if route.path.startswith(f"{BASE}/") and not route.path.startswith(tuple(untyped)):
            assert doc.answers, key_of(route)
            assert all(doc.answers.values()) or route.method == "HEAD", key_of(route)


def test_the_document_holds_together() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    for reference in references(DOCUMENT):
        assert resolve(reference)
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(names)) == len(names)
    for path, _, operation in OPERATIONS:
        arguments = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert arguments == set(re.findall(r"{(\w+)}", path)), path
        assert {tag["name"] for tag in DOCUMENT["tags"]} >= set(operation["tags"])
        assert operation["summary"]
        assert any(status.startswith("2") for status in operation["responses"])
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.validator_for(schema | {"components": DOCUMENT["components"]})


def test_roles_and_errors_are_told() -> None:
    for route in ROUTES:
        operation = DOCUMENT["paths"][template_of(route.path)][route.method.lower()]
        assert operation["x-role"] == (route.role or "none")
        assert bool(operation["security"]) == (route.role is not None)
        statuses = set(operation["responses"])
        if route.role is not None:
            assert {"401", "403"} <= statuses
        if route.path.startswith(f"{BASE}/"):
            assert "429" in statuses
    schemes = DOCUMENT["components"]["securitySchemes"]
    assert DOCUMENT["paths"]["/v1/messages"]["post"]["security"] == [{n: []} for n in schemes]
    assert {scheme.get("name") for scheme in schemes.values()} == {None, "X-Api-Key"}
    wait = resolve("#/components/responses/Error429")["headers"]
    assert {"Retry-After", "RateLimit-Limit", "X-Request-Id"} <= set(wait)


@pytest.mark.parametrize("key", [key for key, doc in DOCS.items() if doc.body is not None])
def test_each_example_of_a_body_is_one(key: str) -> None:
    assert DOCS[key].example is not None
    msgspec.convert(DOCS[key].example, DOCS[key].body)


@pytest.mark.parametrize("operation", operations())
async def test_examples_are_answers_of_now(operation: str) -> None:
    """`python -m tests.fakes.api_examples` makes them anew."""
    kinds = DOCS[operation].answers
    example, now = EXAMPLES[operation], await ask(operation)
    kind = next(kind for status, kind in kinds.items() if status < 300)
    typed = msgspec.convert(example, kind)
    assert json.loads(msgspec.json.encode(typed)) == example
    assert paths_of(example) == paths_of(now)


def paths_of(node: Any, at: str = "$") -> set[str]:
    """Which keys there are; lists by their first item."""
    if isinstance(node, dict):
        return {at}.union(*(paths_of(value, f"{at}.{key}") for key, value in node.items()))
    if isinstance(node, list) and node:
        return paths_of(node[0], f"{at}[]")
    return {at}


def test_no_example_is_of_something_that_is_gone() -> None:
    assert EXAMPLES.keys() <= set(operations()) | LEFT_OUT.keys()


async def test_the_document_is_served_to_whoever_may_read() -> None:
    client = ApiClient()
    answer = await client.call("GET", "/openapi.json", role="viewer")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json == DOCUMENT
    assert (await client.call("GET", "/openapi.json", role=None)).status == 401
    local = await ApiClient(role=None).call("GET", "/openapi.json", peer=LOOPBACK)
    assert local.status == 200


async def test_the_page_is_public_and_needs_no_other_host() -> None:
    client = ApiClient()
    page = await client.call("GET", "/docs", role=None)
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    files = re.findall(r'(?:src|href)="([^"#]+)"', page.data.decode())
    assert sorted(files) == ["docs/docs.css", "docs/docs.js", "openapi.json"]
    for file in files:
        role = "viewer" if file == "openapi.json" else None
        part = await client.call("GET", f"/{file}", role=role)
        assert part.status == 200
        if role is None:
            assert b"//" not in part.data.replace(b"// ", b""), "no address of another host"
            assert b"innerHTML" not in part.data
            assert b"eval(" not in part.data
    for missing in ("/docs/", "/docs/../app.py", "/docs/%2e%2e/app.py", "/docs/examples.json"):
        assert (await client.call("GET", missing, role=None)).status == 404
