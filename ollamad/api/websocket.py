"""One WebSocket: who may open it, what it asks for, and how it is written to.

It runs on the bare connection (`http.py` hands it over after the request's head), with wsproto
for the protocol, in one task that reads. It is written to from outside, without waiting: see
`hub.py`. Compression is not offered, since zlib's memory would be ten times the rest of an idle
socket's.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote

import msgspec
import trio
from werkzeug.datastructures import Headers
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, generate_accept_token

from ollamad.api.asgi import FIXED_HEADERS, new_request_id
from ollamad.api.auth import Identity
from ollamad.api.errors import as_service_error
from ollamad.api.http import Upgrade, whole_answer
from ollamad.api.hub import Hub, frame_of
from ollamad.api.limits import address_group, headers_of, too_many
from ollamad.api.messages import CHANNELS
from ollamad.api.outbox import Outbox
from ollamad.api.services import Cluster, ServiceError, Unavailable
from ollamad.core.ratelimit import Allowance
from ollamad.core.state import ApiKey

PATHS = ("/ws", "/api/v1/ws")
ADMIN_CHANNELS = ("logs",)

MAX_MESSAGE = 4096  # characters of a client's message; the longest that makes sense has fifty
READ_SIZE = 4096  # bytes; what a client can make us answer before others get their turn
# What a client may send, frames of any kind: the burst is all channels, several times.
EVENTS_PER_S, BURST = 20, 100
# The kernel's part of the buffers: a message or two of each kind. It does not count as ours, but
# it is memory of the host, and what is in it is old when it is read.
SEND_BUFFER = 64 << 10
BEHIND_S = 30.0  # a reader that has not caught up for so long is told to come again (1013)
# Reading a token takes some 50 us, so it is not done for every message; when users or sessions
# change, it is done for all (`distrust`).
CHECK_S = 30.0
CLOSE_S = 5.0  # for the client's part of a close, and for what is left to write before it

RETRY_S = 5
TRY_AGAIN_LATER = 1013
VERSION = "13"


class Identifier(Protocol):
    """Who a request comes from; see `auth.Auth.identify`."""

    def identify(self, headers: Any, peer: str, /) -> Identity | None: ...


class Greeter(Protocol):
    """What a session is told without having asked."""

    def greetings(self) -> Iterable[dict[str, Any]]: ...
    def on_subscribe(self, channel: str) -> Iterable[dict[str, Any]]: ...


class _Command(msgspec.Struct, frozen=True):
    type: str
    channel: str | None = None


def accept_head(headers: Headers, extra: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The answer to a request that is a WebSocket's.

    Raises:
      ServiceError: 400, it is none.
    """
    if headers.get("Sec-WebSocket-Version") != VERSION:
        raise ServiceError(
            400,
            "INVALID_HANDSHAKE",
            "this needs Sec-WebSocket-Version: 13",
            {"field": "Sec-WebSocket-Version"},
        )
    key = headers.get("Sec-WebSocket-Key", "")
    if len(key) != 24 or not key.endswith("=="):
        raise ServiceError(
            400,
            "INVALID_HANDSHAKE",
            "Sec-WebSocket-Key must be 16 bytes in base64",
            {"field": "Sec-WebSocket-Key"},
        )
    token = generate_accept_token(key.encode("latin-1"))
    lines = [b"upgrade: websocket", b"connection: Upgrade", b"sec-websocket-accept: " + token]
    lines += [b"%b: %b" % pair for pair in extra]
    return b"HTTP/1.1 101 Switching Protocols\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"


def credentials(headers: Headers, token: str | None) -> Headers:
    """The headers, with the query's token as if it were one; a header counts more."""
    if not token or headers.get("Authorization") is not None:
        return headers
    return Headers([*headers, ("Authorization", f"Bearer {token}")])


class Session:
    """An open socket. `run` is its life; `send` and `close` come from outside and never wait."""

    __slots__ = (
        "_auth",
        "_behind_since",
        "_caller",
        "_channels",
        "_check_at",
        "_closing",
        "_drained",
        "_greeter",
        "_headers",
        "_hub",
        "_outbox",
        "_paced_at",
        "_partial",
        "_peer",
        "_scope",
        "_socket",
        "_stream",
        "_text",
        "_writing",
        "_ws",
        "address",
        "last_sent",
    )

    def __init__(
        self,
        stream: trio.SocketStream,
        hub: Hub,
        greeter: Greeter,
        auth: Identifier,
        caller: Identity,
        *,
        headers: Headers,
        peer: str,
        address: str,
        trailing: bytes = b"",
    ) -> None:
        self.address = address
        self.last_sent = trio.current_time()
        self._stream = stream
        self._socket = stream.socket
        self._hub = hub
        self._greeter = greeter
        self._auth = auth
        self._caller = caller
        self._check_at = self.last_sent + CHECK_S
        # Only what says who it is: the rest of the request is not kept.
        kept = ("Authorization", "X-Api-Key", "Host", "Origin")
        self._headers = {k: v for k in kept if (v := headers.get(k)) is not None}
        self._peer = peer
        self._ws = Connection(ConnectionType.SERVER, trailing_data=trailing)
        self._text: list[str] = []  # parts of a message that is not whole yet
        self._channels: set[str] = set()
        self._paced_at = 0.0
        self._partial: bytes | memoryview = b""  # the rest of a frame that was begun
        self._outbox: Outbox | None = None  # most sockets never need one
        self._behind_since = 0.0
        self._writing = False
        self._drained: trio.Event | None = None
        self._closing = False
        self._scope = trio.CancelScope()

    async def run(self, head: bytes) -> None:
        """Accept with this head, greet, and answer until one side closes.

        The caller closes the stream.

        Cancellation: the socket is left as it is.
        """
        self._hub.enter(self)  # before anything is waited for: it counts from now on
        try:
            await self._stream.send_all(head)
            with self._scope:
                for message in self._greeter.greetings():
                    self.send(frame_of(message))
                await self._read()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client is gone
        finally:
            self._closing = True
            self._hub.leave(self)

    # From outside.

    def send(self, frame: bytes, key: str = "") -> None:
        """Write a frame now, or keep it for later. Never waits, never raises."""
        if not self._closing:
            self._put(frame, key)

    def check(self, now: float) -> None:
        """Close a socket that stays behind, or whose token does not count any more."""
        if self._closing:
            return
        if self._writing and now - self._behind_since >= BEHIND_S:
            assert self._outbox is not None
            self._outbox.drop_all()
            self.close(TRY_AGAIN_LATER, "too slow: messages were dropped; connect again")
            return
        if now < self._check_at:
            return
        self._check_at = now + CHECK_S
        try:
            caller = self._auth.identify(self._headers, self._peer)
        except Unavailable:
            return  # a moment without a cluster is no reason
        except ServiceError as error:
            self.close(CloseReason.POLICY_VIOLATION, error.message)
            return
        if caller is None or not caller.may("viewer"):
            self.close(CloseReason.POLICY_VIOLATION, "this token may not listen any more")
            return
        self._caller = caller
        for channel in ADMIN_CHANNELS:
            if channel in self._channels and not caller.may("admin"):
                self._unsubscribe(channel)

    def close(self, code: int, reason: str) -> None:
        """Begin to close: what waits is written, then the close; the client has CLOSE_S for it."""
        if self._closing:
            return
        try:
            # A reason has 123 bytes at most.
            frame = self._ws.send(CloseConnection(code=code, reason=reason[:120]))
        except LocalProtocolError:
            frame = b""  # the client was faster
        if frame:
            self._put(frame)
        self._closing = True
        self._scope.deadline = trio.current_time() + CLOSE_S

    def distrust(self) -> None:
        """See at the next check whether the token still counts."""
        self._check_at = 0.0

    # Writing.

    def _put(self, frame: bytes, key: str = "") -> None:
        if self._writing:
            assert self._outbox is not None
            self._outbox.put(frame, key)
            return
        rest = self._write(frame)
        if not rest:
            return
        self._partial = rest
        self._writing = True
        self._behind_since = trio.current_time()
        if self._outbox is None:
            self._outbox = Outbox(_dropped_notice)
        if self._hub.nursery is not None:
            self._hub.nursery.start_soon(self._write_out)

    def _write(self, data: bytes | memoryview) -> bytes | memoryview:
        """Write what fits into the kernel's buffer now; the rest."""
        try:
            # As send(2) would; the descriptor is -1 once the stream is closed.
            count = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return data
        except OSError:
            self._scope.cancel()  # the client is gone
            return b""
        self.last_sent = trio.current_time()
        return memoryview(data)[count:] if count < len(data) else b""

    async def _write_out(self) -> None:
        """Write all that waits, as fast as it is read; then end."""
        assert self._outbox is not None
        try:
            while True:
                if not self._partial:
                    if not self._outbox:
                        break
                    self._partial = self._outbox.pop()
                self._partial = self._write(self._partial)
                if self._partial:
                    await trio.lowlevel.wait_writable(self._socket)
        except (trio.ClosedResourceError, OSError, ValueError):
            pass  # its session has ended
        finally:
            self._writing = False
            if self._drained is not None:
                self._drained.set()

    async def _catch_up(self) -> None:
        """Wait until all is written: who does not read what it asked for may not ask more."""
        if self._writing:
            self._drained = trio.Event()
            await self._drained.wait()
            self._drained = None

    # Reading.

    async def _read(self) -> None:
        while True:
            for event in self._ws.events():
                await self._handle(event)
            if self._ws.state is ConnectionState.CLOSED:
                await self._catch_up()
                return
            data = await self._stream.receive_some(READ_SIZE)
            if not data:
                return
            self._ws.receive_data(bytes(data))

    async def _hear_out(self) -> None:
        """After an error of the protocol nothing means anything; but a close with unread bytes
        would overtake what was written."""
        await self._catch_up()
        await self._stream.send_eof()
        while await self._stream.receive_some(READ_SIZE):
            pass

    async def _pace(self) -> None:
        """Let no client ask for more than EVENTS_PER_S in the long run: it is read later."""
        now = trio.current_time()
        self._paced_at = max(self._paced_at, now - BURST / EVENTS_PER_S) + 1 / EVENTS_PER_S
        if self._paced_at > now:
            await trio.sleep(self._paced_at - now)

    async def _handle(self, event: Any) -> None:
        await self._pace()
        match event:
            case CloseConnection(code=code, reason=reason):
                if self._ws.state is ConnectionState.REMOTE_CLOSING:
                    self._put(self._ws.send(event.response()))
                    self._closing = True
                    self._scope.deadline = trio.current_time() + CLOSE_S
                elif self._ws.state is not ConnectionState.CLOSED:
                    # What came is no WebSocket: so wsproto says it.
                    self.close(code, reason or "")
                    await self._hear_out()
            case Ping():
                if not self._closing:
                    self._put(self._ws.send(event.response()))
                    await self._catch_up()
            case TextMessage(data=text, message_finished=finished):
                if text:
                    self._text.append(text)
                if sum(map(len, self._text)) > MAX_MESSAGE:
                    self.close(CloseReason.MESSAGE_TOO_BIG, f"at most {MAX_MESSAGE} characters")
                    self._text.clear()
                elif finished:
                    whole = "".join(self._text)
                    self._text.clear()
                    self._obey(whole)
                    await self._catch_up()
            case BytesMessage(message_finished=finished) if finished:
                self._refuse("INVALID_MESSAGE", "send text, with one JSON object a message")
                await self._catch_up()

    def _obey(self, text: str) -> None:
        try:
            command = msgspec.json.decode(text, type=_Command)
        except msgspec.ValidationError as error:
            self._refuse("INVALID_MESSAGE", f"{error}; send an object with type and channel")
            return
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            self._refuse("INVALID_JSON", "the message is not valid JSON")
            return
        match command.type:
            case "ping":
                self._answer({"type": "pong"})
            case "subscribe" | "unsubscribe":
                self._change(command)
            case unknown:
                self._refuse(
                    "UNKNOWN_TYPE",
                    f"there is no type {_short(unknown)}; use ping, subscribe or unsubscribe",
                )

    def _change(self, command: _Command) -> None:
        channel = command.channel
        if channel not in CHANNELS:
            self._refuse(
                "UNKNOWN_CHANNEL",
                f"there is no channel {_short(channel)}; the channels are {', '.join(CHANNELS)}",
            )
            return
        if command.type == "unsubscribe":
            self._unsubscribe(channel)
            return
        if channel in ADMIN_CHANNELS and not self._caller.may("admin"):
            self._refuse("FORBIDDEN", f"the channel {channel} needs the role admin")
            return
        self._channels.add(channel)
        self._hub.subscribe(self, channel)
        self._answer({"type": "subscription_ack", "channel": channel, "status": "subscribed"})
        for message in self._greeter.on_subscribe(channel):
            self._answer(message)

    def _unsubscribe(self, channel: str) -> None:
        self._channels.discard(channel)
        self._hub.unsubscribe(self, channel)
        self._answer({"type": "subscription_ack", "channel": channel, "status": "unsubscribed"})

    def _answer(self, message: dict[str, Any]) -> None:
        self.send(frame_of(message))

    def _refuse(self, code: str, message: str) -> None:
        self._answer({"type": "error", "error": message, "code": code})


def _short(text: str | None) -> str:
    return json.dumps(text if text is None or len(text) <= 40 else f"{text[:40]}…")


def _dropped_notice(count: int) -> bytes:
    return frame_of({"type": "dropped", "count": count})


class Sockets:
    """Takes over connections that ask for a WebSocket: refuses them, or runs their sessions."""

    def __init__(
        self,
        hub: Hub,
        greeter: Greeter,
        auth: Identifier,
        cluster: Cluster,
        spend_request: Callable[[ApiKey], None],
    ) -> None:
        self._hub = hub
        self._greeter = greeter
        self._auth = auth
        self._cluster = cluster
        self._spend_request = spend_request

    async def __call__(self, stream: trio.SocketStream, upgrade: Upgrade, host: str) -> None:
        request_id = new_request_id()
        allowance = self._allowance(address_group(host))
        headers = Headers(
            [(n.decode("latin-1"), v.decode("latin-1")) for n, v in upgrade.request.headers]
        )
        try:
            path, _, query = upgrade.request.target.decode("latin-1").partition("?")
            if unquote(path) not in PATHS:
                raise ServiceError(404, "NOT_FOUND", f"there is no WebSocket here, but at {PATHS}")
            headers = credentials(headers, parse_qs(query).get("token", [""])[0])
            caller = self._admit(headers, host)
            if self._hub.is_full(address_group(host)):
                raise _too_many(self._hub.limit, host)
            if caller.key is not None:
                self._spend_request(caller.key)
            told = (b"x-request-id", request_id.encode())
            head = accept_head(headers, (told, *allowance, *FIXED_HEADERS))
        except Exception as error:
            refusal = as_service_error(error, request_id)
            await stream.send_all(whole_answer(refusal, allowance, request_id=request_id))
            return
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        session = Session(
            stream,
            self._hub,
            self._greeter,
            self._auth,
            caller,
            headers=headers,
            peer=host,
            address=address_group(host),
            trailing=upgrade.trailing,
        )
        await session.run(head)

    def _allowance(self, address: str) -> tuple[tuple[bytes, bytes], ...]:
        """How many sockets this address may open beside the one that it asks for."""
        limit = self._hub.limit
        if not limit:
            return ()
        left = max(0, limit - 1 - self._hub.count(address))
        return headers_of(Allowance(limit, left, reset_s=0.0, wait_s=0.0))

    def close_all(self) -> None:
        self._hub.close_all(CloseReason.GOING_AWAY, "this node stops; connect to another one")

    def _admit(self, headers: Headers, host: str) -> Identity:
        if not self._cluster.is_caught_up:
            raise Unavailable(
                "this node has just started and asks the others what it missed; try again",
                code="NOT_READY",
                retry_after_s=1,
            )
        caller = self._auth.identify(headers, host)
        if caller is None:
            raise ServiceError(
                401,
                "UNAUTHORIZED",
                "send a token: ?token=TOKEN, or the header `Authorization: Bearer TOKEN`",
            )
        if not caller.may("viewer"):
            raise ServiceError(403, "FORBIDDEN", f"{caller.username} may not listen")
        return caller


def _too_many(limit: int, host: str) -> ServiceError:
    return too_many(
        "TOO_MANY_CONNECTIONS",
        f"{host} has {limit} WebSockets to this node already, which is the limit "
        "(rate_limits.websocket): one can subscribe to all channels",
        RETRY_S,
        limit=limit,
        address=host,
    )
