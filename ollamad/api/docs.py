"""Handlers: the OpenAPI document, and the page that shows it, which needs no other host.

The page and its files are public as all static files are; the document it fetches is not.
"""

import functools
from importlib.resources import files
from typing import Any

import msgspec

from ollamad.api.asgi import Reply
from ollamad.api.calls import Call
from ollamad.api.openapi import document

_STATIC = files("ollamad.api") / "static"
# Nothing but this node's own files, so that a flaw in the page could talk to nobody.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def openapi(call: Call) -> Reply:
    return Reply(call.api.openapi())


async def page(call: Call) -> Reply:
    return _file("docs.html", b"text/html; charset=utf-8")


async def script(call: Call) -> Reply:
    return _file("docs.js", b"text/javascript; charset=utf-8")


async def style(call: Call) -> Reply:
    return _file("docs.css", b"text/css; charset=utf-8")


def encoded(routes: Any) -> bytes:
    """The document of these routes with its examples, as it is sent."""
    examples = msgspec.json.decode((_STATIC / "examples.json").read_bytes(), type=dict[str, Any])
    return msgspec.json.encode(document(routes, examples))


def _file(name: str, content_type: bytes) -> Reply:
    return Reply(
        _read(name), content_type=content_type, headers={"Content-Security-Policy": POLICY}
    )


@functools.cache
def _read(name: str) -> bytes:
    return (_STATIC / name).read_bytes()
