"""The web pages of this node: the dashboard, and the page that shows the OpenAPI document.

Their files are a fixed table, read once at the start, so no path leads out of it. They are for
everybody, since they hold nothing secret: what a page shows it fetches with its visitor's own
credential, and it talks to this node only.

The dashboard reads, and chats. What changes the cluster is left to the command line, so there is
nothing here that a forged click could do; and the API knows its callers by a header that a page
of another site cannot send, or by the loopback rule, which looks at the page's origin.
"""

import dataclasses
import hashlib
from importlib.resources import files

from ollamad.api.asgi import Reply, Request
from ollamad.api.calls import Call, Handler

# Nothing but this node's own files, so that a flaw in a page could talk to nobody; also no form
# may be sent by the browser itself, which would write a password into an address. (The icon is a
# picture within the page.)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
}
DASHBOARD = "dashboard.html"
NAMES = (
    DASHBOARD, "dashboard.js", "node.js", "chat.js", "dashboard.css",
    "docs.html", "docs.js", "docs.css",
)  # fmt: skip
STATIC = files("ollamad.api") / "static"


@dataclasses.dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is served."""

    body: bytes
    content_type: bytes
    tag: str  # changes with the body: what an ETag has between its quotes


def _read(name: str) -> PageFile:
    body = (STATIC / name).read_bytes()
    suffix = name[name.rindex(".") :]
    return PageFile(body, TYPES[suffix], hashlib.sha256(body).hexdigest()[:32])


FILES = {name: _read(name) for name in NAMES}


def page_file(name: str) -> Handler:
    """A handler that answers with this file.

    Raises:
      KeyError: it is not in the table.
    """
    file = FILES[name]

    async def handler(call: Call) -> Reply:
        return _answer(call, file)

    return handler


async def root(call: Call) -> Reply:
    """The dashboard for browsers; for all others Ollama's sign of life, which they compare with
    what they expect."""
    if wants_page(call.request):
        reply = _answer(call, FILES[DASHBOARD])
        reply.headers["Vary"] = "Accept"
        return reply
    return Reply(b"Ollama is running", content_type=b"text/plain; charset=utf-8")


def wants_page(request: Request) -> bool:
    """Whether a page is asked for: HTML and nothing else, or as browsers do, who all name XHTML
    beside it. Java's own client names HTML first among others, whatever it asks for."""
    kinds = request.accept_mimetypes
    prefers_html = kinds.best_match(("text/plain", "text/html")) == "text/html"
    named = {kind.lower() for kind in kinds.values()}
    return prefers_html and (named == {"text/html"} or "application/xhtml+xml" in named)


def _answer(call: Call, file: PageFile) -> Reply:
    """The file, or 304 if the browser has it already. (hypercorn leaves out the body of a 304.)"""
    known = call.request.if_none_match.contains_weak(file.tag)
    headers = {
        "ETag": f'"{file.tag}"',
        # Kept, but asked for each time: after an upgrade the parts of a page must fit together.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
    }
    return Reply(file.body, 304 if known else 200, file.content_type, headers)
