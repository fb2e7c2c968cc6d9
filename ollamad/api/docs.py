"""Handler: the OpenAPI document. The page that shows it is in `pages.py`."""

from typing import Any

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.calls import Call
from ollamad.api.openapi import document
from ollamad.api.pages import STATIC


async def openapi(call: Call) -> Reply:
    return Reply(call.api.openapi())


def encoded(routes: Any) -> bytes:
    """The document of these routes with its examples, as it is sent."""
    examples = msgspec.json.decode((STATIC / "examples.json").read_bytes(), type=dict[str, Any])
    return msgspec.json.encode(document(routes, examples))
