"""A request's way in and out of Quart: bounded bodies, the fixed headers, streamed answers.

Quart reads a body as fast as the network delivers it and has no way to let a handler decide
the status while it holds a resource over the whole stream. So this puts three pieces in its
place: a body that pushes back on the connection, a request that can send a stream itself, and
a connection that ties both to the client's presence: when the client goes away, the handler
is cancelled.
"""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest

from ollamad.api.services import ServiceError

if TYPE_CHECKING:
    from ollamad.api.app import ApiApp

BODY_HIGH_WATER = 1 << 20  # bytes held for a handler that is slower than the network
# Seconds that the rest of a refused body is read and dropped: a connection that is closed with
# unread bytes is reset, and the reset may overtake the answer that says why.
DRAIN_S = 1.0
# A body of which less comes in such a time is not on its way: a modem is quicker.
STALL_S = 60.0
STALL_BYTES = 64 << 10

ONLY_LOCAL = "only_local"  # in a connection's state: the listener is bound to loopback

# An answer may say another one of these itself.
FIXED_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
# An answer that a browser is made to show as a page does nothing; a page of our own says by its
# own policy what it needs, and gets PAGE_POLICY if it does not.
POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
PAGE_POLICY = (
    b"content-security-policy",
    b"object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
)


def new_request_id() -> str:
    """An id for a request, by which its answer and the log tell of it."""
    return secrets.token_hex(8)


def _stalled() -> ServiceError:
    return ServiceError(
        408, "REQUEST_TIMEOUT", f"less than {STALL_BYTES >> 10} KiB came in {STALL_S:.0f} s"
    )


class RequestBody:
    """The bytes of a body, in order, at most BODY_HIGH_WATER (and one message) at a time."""

    def __init__(self, expected_length: int | None, _max_length: int | None) -> None:
        self.expected_length = expected_length
        self._buffer = bytearray()
        self._complete = False
        self._discarding = False
        self._judged_at = trio.current_time()
        self._since_judged = 0  # bytes that came
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes.

        Raises:
          ServiceError: 408, too little came in the last STALL_S.
        """
        now = trio.current_time()
        if now >= self._judged_at + STALL_S:
            if self._since_judged < STALL_BYTES and not self._complete:
                raise _stalled()
            self._judged_at, self._since_judged = now, 0
        with trio.move_on_after(STALL_S) as patience:
            while not self._buffer and not self._complete:
                await self._readers.park()
        if patience.cancelled_caught:
            raise _stalled()
        if not self._buffer:
            raise StopAsyncIteration
        data = bytes(self._buffer)
        self._buffer.clear()
        self._writers.unpark_all()
        return data

    async def put(self, data: bytes) -> None:
        """Add bytes; waits while too many are unread, which stops the reading of the socket."""
        if not data or self._discarding:
            return
        self._buffer += data
        self._since_judged += len(data)
        self._readers.unpark_all()
        while len(self._buffer) >= BODY_HIGH_WATER:
            await self._writers.park()

    def set_complete(self) -> None:
        self._complete = True
        self._readers.unpark_all()

    @property
    def complete(self) -> bool:
        return self._complete

    def discard(self) -> None:
        """Drop what is here and what comes: nobody will read it."""
        self._discarding = True
        self._buffer.clear()
        self._writers.unpark_all()

    async def wait_complete(self) -> None:
        while not self._complete:
            await self._readers.park()


class Request(TrioRequest):
    """A request with its id, its start, and a way to stream the answer from the handler."""

    body_class = RequestBody  # type: ignore[assignment]
    body: RequestBody  # type: ignore[assignment]

    id: str
    asgi_send: ASGISendCallable
    clock: Callable[[], float]
    head_sent_at: float | None = None
    status_sent = 0
    ending = False  # the last bytes are being sent
    changed_by = ""  # who it is that wants something changed, if the request does
    cors_headers: tuple[tuple[bytes, bytes], ...] = ()
    limit_headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def only_local(self) -> bool:
        """Whether it came in at an address that is for this host's own programs."""
        return bool(self.scope.get("state", {}).get(ONLY_LOCAL))

    async def send_head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Send status and headers; the request's id and the fixed headers are added."""
        self.body.discard()
        self.head_sent_at = self.clock()
        self.status_sent = status
        await self.asgi_send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    *headers,
                    (b"x-request-id", self.id.encode()),
                    *self.cors_headers,
                    *self.limit_headers,
                    *_fixed(headers),
                ],
            }
        )

    async def send_body(self, data: bytes, *, more: bool) -> None:
        self.ending = not more
        await self.asgi_send({"type": "http.response.body", "body": data, "more_body": more})


def _fixed(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The fixed headers and the policy, without those that the answer has of its own."""
    known = dict(headers)
    is_page = known.get(b"content-type", b"").startswith(b"text/html")
    policy = PAGE_POLICY if is_page else POLICY
    return [each for each in (policy, *FIXED_HEADERS) if each[0] not in known]


@dataclasses.dataclass(slots=True)
class Reply:
    """A whole answer. (Quart's response object costs more than all the rest of a small one.)"""

    body: bytes
    status: int = 200
    content_type: bytes = b"application/json; charset=utf-8"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Connection(TrioASGIHTTPConnection):
    """Runs one request: its body comes in beside the handler, and ends it on a disconnect."""

    app: "ApiApp"

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        request: Any = self._create_request_from_scope(send)
        assert isinstance(request, Request)
        request.id = new_request_id()
        request.asgi_send = send
        request.clock = self.app.clock
        if (origin := request.headers.get("Origin")) is not None:
            request.cors_headers = self.app.origins.headers(origin)
        stats = self.app.stats
        begun = stats.begin()
        try:
            if self._is_plain_get():
                # Quick, bounded by the deadline, and nothing to read: no second task is worth it.
                request.body.set_complete()
                await self._answer(request)
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, nursery, request, receive)
                    await self._answer(request)
                    nursery.cancel_scope.cancel()
        finally:
            latency_s = (request.head_sent_at or self.app.clock()) - begun
            stats.end(latency_s, failed=request.status_sent >= 500)

    def _is_plain_get(self) -> bool:
        """Whether no body can come. (If one came, unread, the connection would get stuck.)"""
        scope = self.scope
        return (
            scope["method"] in ("GET", "HEAD")
            and scope["http_version"] in ("1.0", "1.1")  # HTTP/2 need not announce a body
            and not any(
                name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]
            )
        )

    async def _pump(
        self, nursery: trio.Nursery, request: Request, receive: ASGIReceiveCallable
    ) -> None:
        body = request.body
        while True:
            message: Any = await receive()
            if message["type"] == "http.request":
                await body.put(message.get("body", b""))
                if not message.get("more_body", False):
                    body.set_complete()
            elif message["type"] == "http.disconnect":
                # hypercorn also says so when it ends a connection behind a whole answer, from
                # within the send of the last bytes; that must go on to close the connection.
                if not request.ending:
                    nursery.cancel_scope.cancel()
                return

    async def _answer(self, request: Request) -> None:
        reply = await self.app.reply_to(request)
        if request.head_sent_at is not None:
            if reply is not None:  # a bug after the first byte; it is logged
                await request.send_body(b"", more=False)
            return
        assert reply is not None
        if not request.body.complete:
            request.body.discard()
            with trio.move_on_after(DRAIN_S):
                await request.body.wait_complete()
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(reply.body)),
        ]
        for name, value in reply.headers.items():
            headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))
        await request.send_head(reply.status, headers)
        await request.send_body(reply.body, more=False)
