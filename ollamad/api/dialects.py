"""The surfaces of the API, and how each of them words an error.

A request belongs to a surface by its path, also when there is no such route.
"""

from collections.abc import Callable
from typing import Any

from ollamad.api.services import ServiceError

ErrorBody = Callable[[ServiceError], dict[str, Any]]


def native_error(error: ServiceError) -> dict[str, Any]:
    """`/api/v1`: with a code for programs, and details."""
    return {"error": error.message, "code": error.code, "details": error.details}


def ollama_error(error: ServiceError) -> dict[str, Any]:
    """`/api`: as Ollama has it, one sentence."""
    return {"error": error.message}


def openai_error(error: ServiceError) -> dict[str, Any]:
    """`/v1`: OpenAI's shape, with Ollama's types."""
    kind = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
    field = error.details.get("field")
    return {
        "error": {
            "message": error.message,
            "type": kind.get(error.status, "api_error"),
            "param": field if isinstance(field, str) else None,
            "code": error.code.lower(),
        }
    }


def anthropic_error(error: ServiceError) -> dict[str, Any]:
    """`/v1/messages`: Anthropic's shape and types; the code is ours in lower case."""
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        415: "invalid_request_error",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
    kind = kinds.get(error.status, "api_error")
    described = {"type": kind, "message": error.message, "code": error.code.lower()}
    return {"type": "error", "error": described}


def error_body_for(path: str) -> ErrorBody:
    """The wording of errors for requests of that path."""
    match path.split("/", 3):
        case ["", "v1", "messages", *_]:
            return anthropic_error
        case ["", "v1", *_]:
            return openai_error
        case ["", "api", part, *_] if part != "v1":
            return ollama_error
        case _:
            return native_error
