"""The OpenAPI 3.1 document, made of the route table, `reference.py` and the types of the bodies."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec

import ollamad
from ollamad.api import schemas
from ollamad.api.anthropic_answers import AnthropicError
from ollamad.api.asking import MAX_DEADLINE_S
from ollamad.api.bodies import invalid
from ollamad.api.calls import MAX_JSON_BYTES
from ollamad.api.dialects import (
    ErrorBody,
    anthropic_error,
    error_body_for,
    native_error,
    ollama_error,
    openai_error,
)
from ollamad.api.messages import DESCRIBED, FROM_CLIENT
from ollamad.api.ollama_answers import OllamaError
from ollamad.api.openai_answers import OpenaiError
from ollamad.api.reference import BASE, DOCS, LINES, TAGS, WEBSOCKET, Doc
from ollamad.api.services import ServiceError
from ollamad.core.state import Role

REF = "#/components/schemas/{name}"
_ARGUMENT = re.compile(r"<(?:(\w+):)?(\w+)>")

# Of each status what it means, and an error that has it.
_ERRORS = {
    400: (
        "Malformed or invalid; the field is named.",
        invalid("prompt", "prompt must be str, not int", expected="str"),
    ),
    401: (
        "No token, or a bad one.",
        ServiceError(401, "UNAUTHORIZED", "send a token: the header `Authorization: Bearer TOKEN`"),
    ),
    403: (
        "The caller's role is too low. On Ollama's routes at an address for this host alone also: "
        "the `Host` is foreign, and there is no token.",
        ServiceError(
            403,
            "FORBIDDEN",
            "this needs the role operator; eve has viewer",
            {"required": "operator", "role": "viewer"},
        ),
    ),
    404: (
        "There is no such thing.",
        ServiceError(
            404,
            "MODEL_NOT_FOUND",
            "model 'smollm:135m' not found; did you mean smollm2:135m?",
            {"model": "smollm:135m", "suggestions": ["smollm2:135m"]},
        ),
    ),
    408: (
        "The deadline passed.",
        ServiceError(
            408, "REQUEST_TIMEOUT", "the request took longer than 60 s", {"limit_s": 60.0}
        ),
    ),
    409: (
        "A conflict with the state of the cluster.",
        ServiceError(409, "USER_EXISTS", "there is a user 'eve' already", {"username": "eve"}),
    ),
    413: (
        "The body is too large.",
        ServiceError(
            413,
            "BODY_TOO_LARGE",
            "the body is larger than 32 MiB",
            {"limit_bytes": MAX_JSON_BYTES},
        ),
    ),
    415: (
        "The body is not JSON.",
        ServiceError(
            415,
            "UNSUPPORTED_MEDIA_TYPE",
            "send JSON with Content-Type: application/json, not text/plain",
            {"content_type": "text/plain", "expected": "application/json"},
        ),
    ),
    429: (
        "Too many requests, or a quota of the API key is used up.",
        ServiceError(
            429,
            "RATE_LIMITED",
            "more than 100 of these requests in a minute; try again in 3 s",
            {"limit": 100, "retry_after": 3},
        ),
    ),
    500: (
        "The node failed; its log has it with the request's id.",
        ServiceError(
            500,
            "INTERNAL_ERROR",
            "a bug in this node; its log has the request's id",
            {"request_id": "0123456789abcdef"},
        ),
    ),
    503: (
        "The cluster cannot do it now: no quorum, no replica, a full queue.",
        ServiceError(
            503,
            "NO_QUORUM",
            "too few nodes can be reached to agree on anything",
            {"voters_missing": ["node-2", "node-3"]},
        ),
    ),
}
# The surfaces: how the name of an error's component begins, its type, its words.
_SURFACES: dict[ErrorBody, tuple[str, Any]] = {
    native_error: ("Error", schemas.ErrorAnswer),
    ollama_error: ("OllamaError", OllamaError),
    openai_error: ("OpenaiError", OpenaiError),
    anthropic_error: ("AnthropicError", AnthropicError),
}
ERROR_TYPES = {word: kind for word, (_, kind) in _SURFACES.items()}
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
    "X-Request-Id": (
        "The request's id, by which the node's log tells of changes and of what failed.",
        {"type": "string"},
    ),
    "RateLimit-Limit": ("Requests a minute.", {"type": "integer"}),
    "RateLimit-Remaining": ("Requests that may be made at once, now.", {"type": "integer"}),
    "RateLimit-Reset": ("Seconds until all of them are there again.", {"type": "integer"}),
    "Retry-After": ("Seconds to wait.", {"type": "integer"}),
}
_INFERENCE_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Ollamad-Failover": (
        "How the answer goes on when its node is lost.",
        {"type": "string", "enum": ["continue", "replay", "off"]},
    ),
    "X-Ollamad-Priority": (
        "`high` needs the role operator.",
        {"type": "string", "enum": ["low", "normal", "high"]},
    ),
    "X-Ollamad-Deadline": (
        "Seconds within which the answer must begin, or it is 408.",
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_DEADLINE_S},
    ),
    "X-Ollamad-Explain": (
        "With `true` the header `X-Ollamad-Scores` tells why the node was chosen.",
        {"type": "string"},
    ),
}

_INFO = """\
Ollama Distributed: daemons on many hosts that are one big Ollama. Any node answers any request.

Send `Authorization: Bearer TOKEN` (or `X-Api-Key: TOKEN`), with a token of `/auth/login` or an API
key. Programs on the same host need none for what `auth.loopback_role` allows (inference). Roles
contain each other: viewer, inference, operator, admin; each operation says which it needs.

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
    kinds = [kind for _, kind in _SURFACES.values()]
    for _, doc in rows:
        told = (doc.body, *doc.answers.values(), *doc.parts)
        kinds += [kind for kind in told if kind not in (None, *kinds)]
    kinds += [*FROM_CLIENT, *DESCRIBED]
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
            "responses": _error_responses(schema_of),
            "headers": {
                name: {"description": text, "schema": schema}
                for name, (text, schema) in _HEADERS.items()
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An access token (JWT) of `/auth/login`, or an API key.",
                },
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-Api-Key",
                    "description": "The same, as Anthropic's clients send it.",
                },
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
        "security": [{"bearer": []}, {"key": []}] if role else [],
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
        for name, (text, schema) in _INFERENCE_HEADERS.items():
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
            for each in filter(None, (doc.content, doc.also)):
                content[each] = {"schema": {"type": "string"}}
        elif kind is not None:
            content["application/json"] = {"schema": schema_of[kind]}
            if example is not None and status < 300:
                content["application/json"]["example"] = example
        if doc.stream and status == 200:
            content.setdefault("application/json", {"schema": {"type": "object"}})
            # Lines are text to a client; the parts of an event stream are parsed before.
            content[doc.stream] = {
                "schema": {"type": "string"} if doc.stream == LINES else {},
                "x-item-schema": {"anyOf": [schema_of[kind] for kind in doc.parts]},
            }
        if content:
            response["content"] = content
        responses[str(status)] = response
    for status in _error_statuses(route, doc, is_native=is_native):
        name = f"{_SURFACES[error_body_for(route.path)][0]}{status}"
        responses.setdefault(str(status), {"$ref": f"#/components/responses/{name}"})
    return responses


def _error_responses(schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """The errors of each surface, in its shape."""
    responses = {}
    for word, (name, kind) in _SURFACES.items():
        for status, (text, error) in _ERRORS.items():
            headers = _headers(is_native=word is native_error)
            if status in (429, 503):
                headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
            media = {"schema": schema_of[kind], "example": word(error)}
            responses[f"{name}{status}"] = {
                "description": text,
                "headers": headers,
                "content": {"application/json": media},
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
