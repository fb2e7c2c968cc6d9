"""The OpenAPI 3.1 document, made of the route table, `reference.py` and the types of the bodies."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec

import ollamad
from ollamad.api import schemas
from ollamad.api.reference import BASE, DOCS, LINES, TAGS, WEBSOCKET, Doc
from ollamad.core.state import Role

REF = "#/components/schemas/{name}"
_ARGUMENT = re.compile(r"<(?:(\w+):)?(\w+)>")

_ERROR_TEXT = {
    400: "Malformed or invalid. `details.field` names the field.",
    401: "No token, or a bad one.",
    403: "The caller's role is too low.",
    404: "There is no such thing.",
    408: "The deadline passed.",
    409: "A conflict with the state of the cluster.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests, or a quota of the API key is used up.",
    500: "A bug. `details.request_id` is in the node's log.",
    503: "The cluster cannot do it now: no quorum, no replica, a full queue.",
}
_ARGUMENTS = {
    "reference": (
        "A node's id, a unique prefix of it (6 characters or more), or its name.",
        "node-1",
    ),
    "name": ("A model's name; it may hold slashes, as they are or as %2F.", "smollm2:135m"),
    "digest": ("`sha256:` and 64 hex digits.", "sha256:" + "fe938a13" * 8),
    "transfer_id": ("A transfer's id.", "transfer_001"),
    "username": ("A username.", "eve"),
    "key_id": ("An API key's id.", "0123456789ab"),
}
_HEADERS = {
    "X-Request-Id": ("The request's id; the node's log has it, too.", {"type": "string"}),
    "RateLimit-Limit": ("Requests a minute.", {"type": "integer"}),
    "RateLimit-Remaining": ("Requests that may be made at once, now.", {"type": "integer"}),
    "RateLimit-Reset": ("Seconds until all of them are there again.", {"type": "integer"}),
    "Retry-After": ("Seconds to wait.", {"type": "integer"}),
}
_INFERENCE_HEADERS = {
    "X-Ollamad-Failover": (
        "How the answer goes on when its node is lost.",
        ["continue", "replay", "off"],
    ),
    "X-Ollamad-Priority": ("`high` needs the role operator.", ["low", "normal", "high"]),
}

_INFO = """\
Ollama Distributed: daemons on many hosts that are one big Ollama. Any node answers any request.

Send `Authorization: Bearer TOKEN`, with a token of `/auth/login` or an API key. Programs on the
same host need none for what `auth.loopback_role` allows (inference). Roles contain each other:
viewer, inference, operator, admin; each operation says which it needs.

Every error of `/api/v1` is `{"error","code","details"}`; the other surfaces have the shapes of
their protocols. Every answer has `X-Request-Id`; those of `/api/v1` have `RateLimit-Limit`,
`RateLimit-Remaining` and `RateLimit-Reset`, and 429 has `Retry-After`.

# WebSocket

"""


class RouteRow(Protocol):
    """What of a row of the route table is told."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def role(self) -> Role | None: ...
    @property
    def bounded(self) -> bool: ...


def document(routes: Iterable[RouteRow], examples: Mapping[str, Any]) -> dict[str, Any]:
    """The whole document; `examples` are answers by operation (`GET /api/v1/nodes`)."""
    rows = [(route, DOCS.get(key_of(route), Doc("Other", route.path))) for route in routes]
    kinds = [schemas.ErrorAnswer]
    for _, doc in rows:
        kinds += [kind for kind in (doc.body, *doc.answers.values()) if kind not in (None, *kinds)]
    refs, components = msgspec.json.schema_components(kinds, ref_template=REF)
    schema_of = dict(zip(kinds, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route, doc in rows:
        operation = _operation(route, doc, schema_of, examples.get(key_of(route)))
        paths.setdefault(template_of(route.path), {})[route.method.lower()] = operation
    used = {doc.tag for _, doc in rows}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ollama Distributed",
            "version": ollamad.__version__,
            "description": _INFO + WEBSOCKET,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "This node"}],
        "tags": [{"name": n, "description": text} for n, text in TAGS.items() if n in used],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": _error_responses(schema_of[schemas.ErrorAnswer]),
            "headers": {
                name: {"description": text, "schema": schema}
                for name, (text, schema) in _HEADERS.items()
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An access token (JWT) of `/auth/login`, or an API key.",
                }
            },
        },
    }


def key_of(route: RouteRow) -> str:
    return f"{route.method} {route.path}"


def template_of(path: str) -> str:
    """The path as OpenAPI writes it: `/models/{name}`."""
    return _ARGUMENT.sub(r"{\2}", path)


def _operation(
    route: RouteRow, doc: Doc, schema_of: Mapping[Any, Any], example: Any
) -> dict[str, Any]:
    is_native = route.path.startswith(f"{BASE}/")
    role = route.role
    description = [doc.text] if doc.text else []
    description.append(f"Role: {role}." if role else "Needs no token.")
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "tags": [doc.tag],
        "summary": doc.summary,
        "description": " ".join(description),
        "parameters": _parameters(route, doc),
        "responses": _responses(route, doc, schema_of, example, is_native=is_native),
        "security": [{"bearer": []}] if role else [],
        "x-role": role or "none",
    }
    if doc.raw_body:
        schema = {"type": "string", "format": "binary"}
        content: dict[str, Any] = {"application/octet-stream": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    elif doc.body is not None:
        media: dict[str, Any] = {"schema": schema_of[doc.body]}
        if doc.example is not None:
            media["example"] = doc.example
        operation["requestBody"] = {
            "required": not doc.optional_body,
            "content": {"application/json": media},
        }
    return operation


def _parameters(route: RouteRow, doc: Doc) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _, name in _ARGUMENT.findall(route.path):
        text, example = _ARGUMENTS.get(name, ("", "x"))
        found.append(
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": text,
                "schema": {"type": "string", "minLength": 1},
                "example": example,
            }
        )
    if route.method == "GET" and route.role is not None and route.bounded:
        text = "Have a majority confirm first that nothing newer is missing."
        schema = {"type": "string", "enum": ["true", "false"], "default": "false"}
        found.append({"name": "consistent", "in": "query", "description": text, "schema": schema})
    if doc.stream and route.role == "inference":
        for name, (text, values) in _INFERENCE_HEADERS.items():
            schema = {"type": "string", "enum": values}
            found.append({"name": name, "in": "header", "description": text, "schema": schema})
    return found


def _responses(
    route: RouteRow, doc: Doc, schema_of: Mapping[Any, Any], example: Any, *, is_native: bool
) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    headers = _headers(is_native=is_native)
    for status, kind in (doc.answers or {200: None}).items():
        response: dict[str, Any] = {
            "description": _TEXT_OF_SUCCESS.get(status, "The node cannot serve."),
            "headers": headers,
        }
        content: dict[str, Any] = {}
        if doc.content != "application/json":
            content[doc.content] = {"schema": {"type": "string"}}
        elif kind is not None:
            content["application/json"] = {"schema": schema_of[kind]}
            if example is not None and status < 300:
                content["application/json"]["example"] = example
        if doc.stream and status == 200:
            content.setdefault("application/json", {"schema": {"type": "object"}})
            # Lines are text to a client; the parts of an event stream are parsed before.
            content[doc.stream] = {"schema": {"type": "string"} if doc.stream == LINES else {}}
        if content:
            response["content"] = content
        responses[str(status)] = response
    for status in _error_statuses(route, doc, is_native=is_native):
        name = f"{'Error' if is_native else 'Foreign'}{status}"
        responses.setdefault(str(status), {"$ref": f"#/components/responses/{name}"})
    return responses


def _error_responses(error_schema: dict[str, Any]) -> dict[str, Any]:
    """The errors of our own surface, and those of the others, whose shapes are their protocols'."""
    responses = {}
    for name, schema, is_native in (
        ("Error", error_schema, True),
        ("Foreign", {"type": "object"}, False),
    ):
        for status, text in _ERROR_TEXT.items():
            headers = _headers(is_native=is_native)
            if status in (429, 503):
                headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
            responses[f"{name}{status}"] = {
                "description": text,
                "headers": headers,
                "content": {"application/json": {"schema": schema}},
            }
    return responses


_TEXT_OF_SUCCESS = {200: "Done.", 201: "Made."}


def _error_statuses(route: RouteRow, doc: Doc, *, is_native: bool) -> list[int]:
    statuses = {500, *doc.errors}
    if route.role is not None:
        statuses |= {401, 403, 429, 503}
    if is_native:
        statuses |= {429, 503}
    if route.bounded:
        statuses.add(408)
    if "<" in route.path:
        statuses |= {400, 404}
    if doc.body is not None:
        statuses |= {400, 408, 413, 415}
    if route.method == "GET" and route.role is not None:
        statuses.add(400)  # ?consistent=…
    if route.method != "GET" and route.role is not None:
        statuses.add(400)
    return sorted(statuses)


def _headers(*, is_native: bool) -> dict[str, Any]:
    names = [name for name in _HEADERS if is_native or not name.startswith("RateLimit")]
    return {
        name: {"$ref": f"#/components/headers/{name}"} for name in names if name != "Retry-After"
    }


def _operation_id(route: RouteRow) -> str:
    words = re.sub(r"[^a-zA-Z0-9]+", "_", template_of(route.path).removeprefix(BASE)).strip("_")
    surface = "" if route.path.startswith(("/api/", "/v1/")) else "root_"
    return f"{route.method.lower()}_{surface}{words}".rstrip("_")
