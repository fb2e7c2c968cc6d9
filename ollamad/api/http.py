"""HTTP/1.1 on accepted connections: hypercorn's protocol, with bounds of our own around it.

hypercorn reads and writes the protocol (h11) and runs the app; whoever talks to it is bounded
here, where the socket is: how many connections there may be, for how long a request's head may be
on its way, how long a client may leave an answer unread. Written for hypercorn 0.18, of which it
uses `H11Protocol` in the place of its `TCPServer`, which has none of these bounds, takes a task
for the time of each idle connection, and speaks HTTP/2 to strangers without a word of it in the
settings: there a client may stop reading without its kernel telling.

A WebSocket leaves here after its head: it is handed over with its stream.
"""

import logging
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, LifespanState
from hypercorn.utils import parse_socket_addr

from ollamad.api.asgi import FIXED_HEADERS, ONLY_LOCAL, POLICY, new_request_id
from ollamad.api.calls import error_reply
from ollamad.api.dialects import error_body_for
from ollamad.api.limits import address_group, too_many
from ollamad.api.services import ServiceError
from ollamad.api.turns import Turns

READ_SIZE = 64 << 10
MAX_HEADERS = 100  # a browser sends twenty
MAX_REQUEST_LINE = 4096  # of which the path is read to answer in its clients' shape
# A head is a few hundred bytes in one packet; who takes longer sends it a byte at a time.
HEAD_TIMEOUT_S = 15.0
KEEP_ALIVE_S = 75.0  # idle connections of well-behaved clients live this long
# A client that took nothing of an answer for so long has stopped reading. (What it does not read
# of an answer that fits into the kernel's buffers is nobody's trouble.)
UNREAD_TIMEOUT_S = 20.0
# Connections that are refused at once, and read a little so that they see why. Beyond that they
# are closed without a word.
MAX_REFUSING = 64
REFUSING_S = 1.0
RETRY_S = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections there may be; 0 for any number. An IPv6 /64 is one address."""

    connections: int = 0
    per_address: int = 0


class Upgrade(Exception):
    """The connection is a WebSocket from here on; `trailing` came behind the head."""

    def __init__(self, request: h11.Request, trailing: bytes) -> None:
        self.request = request
        self.trailing = trailing


class SocketHandler(Protocol):
    """Who takes over connections that ask for a WebSocket."""

    async def __call__(self, stream: trio.SocketStream, upgrade: Upgrade, host: str) -> None:
        """Answer and serve it; the stream is closed afterwards."""
        ...

    def close_all(self) -> None:
        """Begin to close those that are open: the node stops."""
        ...


class Connections:
    """All connections of a node's API, and the rules for a new one."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        limits: ConnectionLimits,
        sockets: SocketHandler | None,
    ) -> None:
        self.app = app
        self.config = config
        self.context = WorkerContext(None)
        self.sockets = sockets
        self.turns = Turns()
        self._limits = limits
        self._open: dict[Connection, None] = {}
        self._of_address: Counter[str] = Counter()
        self._refusing = 0

    def __len__(self) -> int:
        return len(self._open)

    async def serve(self, stream: trio.SocketStream, only_local: bool) -> None:
        """The life of one accepted connection. Raises nothing: one must not end the others.

        `only_local`: its listener is bound to loopback.
        """
        try:
            peer = parse_socket_addr(stream.socket.family, stream.socket.getpeername())
            host = peer[0] if peer is not None else ""
            key = address_group(host)
            refusal = self._refusal(key, host)
            if refusal is not None:
                await self._refuse(stream, refusal)
                return
            connection = Connection(self, stream, peer, key, only_local)
            self._open[connection] = None
            self._of_address[key] += 1
            try:
                await connection.run()
            finally:
                del self._open[connection]
                self._of_address[key] -= 1
                if not self._of_address[key]:
                    del self._of_address[key]
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        except Exception:
            log.exception("a connection failed")
        finally:
            await trio.aclose_forcefully(stream)

    async def close_idle(self) -> None:
        """No requests are to come any more: what runs may end, what is idle is closed."""
        await self.context.terminated.set()
        if self.sockets is not None:
            self.sockets.close_all()
        for connection in tuple(self._open):
            connection.close_if_idle()

    def abort(self) -> None:
        """Cut what is left, also where a send waits for a client that has stopped reading."""
        for connection in tuple(self._open):
            connection.abort()

    def _refusal(self, key: str, host: str) -> ServiceError | None:
        limits = self._limits
        if 0 < limits.per_address <= self._of_address[key]:
            return too_many(
                "TOO_MANY_CONNECTIONS",
                f"{host} has {limits.per_address} connections to this node already, which is the "
                "limit (api.max_connections_per_address): use them again, or close some",
                RETRY_S,
                limit=limits.per_address,
                address=host,
            )
        if 0 < limits.connections <= len(self._open):
            return ServiceError(
                503,
                "TOO_MANY_CONNECTIONS",
                f"this node has {limits.connections} connections, which is its limit "
                "(api.max_connections): try another node, or later",
                {"limit": limits.connections},
                retry_after_s=RETRY_S,
            )
        return None

    async def _refuse(self, stream: trio.SocketStream, refusal: ServiceError) -> None:
        if self._refusing >= MAX_REFUSING:
            return
        self._refusing += 1
        try:
            with trio.move_on_after(REFUSING_S):
                await stream.send_all(whole_answer(refusal))
                await stream.send_eof()
                # What it sent is read, since a close with unread bytes would overtake the answer.
                while await stream.receive_some(READ_SIZE):
                    pass
        except trio.BrokenResourceError:
            pass
        finally:
            self._refusing -= 1


class Connection:
    """One connection: reads for the protocol, and writes what it says."""

    def __init__(
        self,
        all_: Connections,
        stream: trio.SocketStream,
        peer: tuple[str, int] | None,
        address: str,
        only_local: bool,
    ) -> None:
        self._all = all_
        self._stream = stream
        self._peer = peer
        self._address = address  # as limits count it
        self._state = ConnectionState(LifespanState({ONLY_LOCAL: only_local}))
        self._send_lock = trio.Lock()
        self._idle = True
        self._closed = False
        self._head_until: float | None = None  # when the head that is on its way must be whole
        self._patience = trio.CancelScope()

    async def run(self) -> None:
        """Serve requests until one side closes, or it becomes a WebSocket and that ends."""
        sockaddr = self._stream.socket.getsockname()
        server = parse_socket_addr(self._stream.socket.family, sockaddr)
        upgrade: Upgrade | None = None
        async with TaskGroup() as group:
            protocol = _Http(
                self._all.app,
                self._all.config,
                self._all.context,
                group,
                self._state,
                False,
                self._peer,
                server,
                self._on_event,
            )
            protocol.turns, protocol.address = self._all.turns, self._address
            self._protocol = protocol
            upgrade = await self._read(protocol)
            if upgrade is None:
                await protocol.handle(Closed())
                if protocol.refused:
                    await self._hear_out()
                await self._close()
        if upgrade is not None:
            if self._all.sockets is None:
                await self._send(whole_answer(ServiceError(404, "NOT_FOUND", "no WebSocket here")))
                return
            host = self._peer[0] if self._peer is not None else ""
            await self._all.sockets(self._stream, upgrade, host)

    async def _hear_out(self) -> None:
        """Read what still comes: a close with unread bytes would overtake the refusal."""
        with trio.move_on_after(REFUSING_S), suppress(trio.BrokenResourceError):
            await self._stream.send_eof()
            while await self._stream.receive_some(READ_SIZE):
                pass

    def close_if_idle(self) -> None:
        if self._idle:
            self._patience.cancel()

    def abort(self) -> None:
        with suppress(OSError):  # gone already
            self._stream.socket.shutdown(trio.socket.SHUT_RDWR)

    async def _read(self, protocol: "_Http") -> Upgrade | None:
        """Pass on what comes until the end, or until it is a WebSocket."""
        self._head_until = trio.current_time() + HEAD_TIMEOUT_S
        while True:
            try:
                with trio.CancelScope(deadline=self._deadline()) as self._patience:
                    data = await self._stream.receive_some(READ_SIZE)
                if self._patience.cancelled_caught:
                    if self._idle and protocol.head_begun:
                        await protocol.refuse(
                            ServiceError(408, "REQUEST_TIMEOUT", "the request's head took too long")
                        )
                    return None
                await protocol.handle(RawData(bytes(data)))
            except Upgrade as upgrade:
                return upgrade
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data or protocol.refused:
                return None
            if self._idle and protocol.head_begun:
                if self._head_until is None:
                    self._head_until = trio.current_time() + HEAD_TIMEOUT_S
            elif not self._idle:
                self._head_until = None

    def _deadline(self) -> float:
        if not self._idle:
            return float("inf")  # the app has its own deadlines
        return self._head_until or trio.current_time() + KEEP_ALIVE_S

    async def _on_event(self, event: Event) -> None:
        match event:
            case RawData(data=data):
                await self._send(data)
            case Closed():
                if not self._protocol.refused:
                    await self._close()
                await self._protocol.handle(Closed())
            case Updated(idle=idle):
                self._idle = idle
                if idle:
                    self._head_until = None
                    self._patience.deadline = self._deadline()
                else:
                    self._patience.deadline = float("inf")

    async def _send(self, data: bytes) -> None:
        """Write it all. A client that takes nothing for UNREAD_TIMEOUT_S is gone for us."""
        if not data or self._closed:
            return
        rest = memoryview(data)
        if not self._send_lock.locked():
            # Mostly the kernel takes it all at once: that saves two passes of the loop for each
            # token of a stream, which waits for its next one anyway.
            with suppress(OSError):  # if it is gone, that shows below
                rest = rest[os.write(self._stream.socket.fileno(), rest) :]
            if not rest:
                return
        async with self._send_lock:
            try:
                # Half an answer that is cancelled would be taken for a whole one.
                with trio.CancelScope(shield=True) as patience:
                    while rest:
                        patience.deadline = trio.current_time() + UNREAD_TIMEOUT_S
                        sent = await self._stream.socket.send(rest)
                        rest = rest[sent:]
                if not patience.cancelled_caught:
                    return
            except (OSError, trio.ClosedResourceError):
                pass
        self.abort()
        self._protocol.gone = True
        await self._protocol.handle(Closed())

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_eof()
        await self._stream.aclose()


class _Http(H11Protocol):
    """hypercorn's protocol without HTTP/2 and without its WebSocket; fewer writes."""

    connection: h11.Connection  # never its stand-in for a WebSocket
    turns: Turns
    address: str
    _ahead = False  # whether the next request was sent before the last one was answered
    _held = b""  # a head that goes out with its body
    refused = False
    gone = False  # the client; what it asked before is not to be answered any more

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            self._ahead = False
        await super().handle(event)

    @property
    def head_begun(self) -> bool:
        """Whether a part of a request's head is here."""
        return bool(self.connection.trailing_data[0])

    @property
    def _path_begun(self) -> str:
        """What the head asks for that is here in parts; empty if that is not known yet."""
        line = bytes(self.connection.trailing_data[0][:MAX_REQUEST_LINE]).partition(b"\r\n")[0]
        parts = line.split(b" ")
        return parts[1].decode("latin-1") if len(parts) == 3 else ""

    async def refuse(self, error: ServiceError, path: str = "") -> None:
        """Answer for a request that could not be read; the last word on this connection."""
        if self.refused:
            return
        self.refused = True
        await self.send(RawData(whole_answer(error, path=path or self._path_begun)))

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and event.status_code >= 200:
            data = self.connection.send(
                h11.Response(headers=self._headers_of(event), status_code=event.status_code)
            )
            # A whole answer says its length and comes at once; a stream's head must not wait.
            if any(name == b"content-length" for name, _ in event.headers):
                self._held = data or b""
                return
            await self.send(RawData(data or b""))
            return
        if self._held and isinstance(event, Body):
            data = self._held + (self.connection.send(h11.Data(data=event.data)) or b"")
            self._held = b""
            await self.send(RawData(data))
            return
        if self._held:
            data, self._held = self._held, b""
            await self.send(RawData(data))
        await super().stream_send(event)

    def _headers_of(self, event: Response) -> list[tuple[bytes, bytes]]:
        headers = [*event.headers, *self.config.response_headers("h11")]
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            headers.append((b"connection", b"close"))
        return headers

    async def _create_stream(self, request: h11.Request) -> None:
        await self.turns.take(self.address, ahead=self._ahead)
        self._ahead = True  # if one more is here already
        if self.gone:
            raise trio.BrokenResourceError("the client is gone, and left requests behind")
        if not request.http_version.startswith(b"1."):
            await self.refuse(
                ServiceError(505, "HTTP_VERSION_NOT_SUPPORTED", "this server speaks HTTP/1.1")
            )
            await self.send(Closed())
            return
        # (h11 bounds only heads that come in several reads.)
        size = sum(len(name) + len(value) for name, value in request.headers)
        most = self.config.h11_max_incomplete_size
        if len(request.headers) > MAX_HEADERS or size > most:
            await self.refuse(
                ServiceError(
                    431,
                    "REQUEST_HEADER_FIELDS_TOO_LARGE",
                    f"a request may have {MAX_HEADERS} headers with {most:,} bytes, this one has "
                    f"{len(request.headers)} with {size:,}",
                    {"limit": MAX_HEADERS, "limit_bytes": most},
                ),
                request.target.decode("latin-1"),
            )
            await self.send(Closed())
            return
        if _asks_for_websocket(request):
            raise Upgrade(request, self.connection.trailing_data[0])
        await super()._create_stream(request)

    async def _check_protocol(self, event: h11.Request) -> None:
        """HTTP/1.1 only: an upgrade to HTTP/2 is passed over, which the client may expect."""

    async def _send_error_response(self, status_code: int) -> None:
        phrase = HTTPStatus(status_code).phrase
        code = phrase.upper().replace(" ", "_")
        await self.refuse(ServiceError(status_code, code, f"{phrase.lower()}: this is no HTTP"))


def _asks_for_websocket(request: h11.Request) -> bool:
    found = {b"upgrade": b"", b"connection": b""}
    for name, value in request.headers:
        if name in found:
            found[name] += b"," + value.lower()
    return (
        request.method == b"GET"
        and b"websocket" in (part.strip() for part in found[b"upgrade"].split(b","))
        and b"upgrade" in (part.strip() for part in found[b"connection"].split(b","))
    )


def whole_answer(
    error: ServiceError,
    extra: tuple[tuple[bytes, bytes], ...] = (),
    *,
    path: str = "",
    request_id: str = "",
) -> bytes:
    """An error as the last answer of a connection that no app will see.

    `path`: what was asked for, if that is known: its clients have a shape for errors.
    `request_id`: one is made for what never became a request.
    """
    request_id = request_id or new_request_id()
    log.debug("request %s: %d %s: %s", request_id, error.status, error.code, error.message)
    reply = error_reply(error, error_body_for(path.partition("?")[0]))
    lines = [b"HTTP/1.1 %d %b" % (reply.status, HTTPStatus(reply.status).phrase.encode())]
    lines += [
        b"content-type: " + reply.content_type,
        b"content-length: %d" % len(reply.body),
        b"connection: close",
    ]
    lines += [f"{name.lower()}: {value}".encode("latin-1") for name, value in reply.headers.items()]
    told = (b"x-request-id", request_id.encode())
    lines += [b"%b: %b" % pair for pair in (told, *FIXED_HEADERS, POLICY, *extra)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + reply.body


__all__ = ["ConnectionLimits", "Connections", "SocketHandler", "Upgrade", "whole_answer"]
