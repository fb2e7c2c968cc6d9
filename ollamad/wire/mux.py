"""Many exchanges over one connection between two nodes: a small multiplexer, sans-I/O.

In the family of yamux and SPDY: every frame names a stream, every stream has a credit window
of its own, so that a slow reader of one exchange does not hold up the others. Two things make
it smaller than those: only the node that dialled opens streams (the other direction has a
connection of its own), and a frame is a whole message, so that nobody reassembles.

    0        1                5                9
    +--------+----------------+----------------+---------------------
    | kind   | stream id      | payload length | payload
    +--------+----------------+----------------+---------------------

| kind    | payload | who sends it |
| ------- | ------- | --- |
| HELLO   | msgpack Hello; the first frame on a connection | both |
| OPEN    | 1 byte length, method name, request | dialler |
| MESSAGE | one message of the exchange | both |
| END     | empty: no more messages from this side | both |
| RESET   | msgpack Reset: the exchange is over, and why | both |
| CREDIT  | 4 bytes: that many more bytes may be sent on the stream | both |

Credit counts the headers of messages too: empty messages would be free otherwise, and a peer
could pile up any number of them.

A stream is forgotten when both sides ended or one reset it; late frames of forgotten streams
are dropped, since they may have been under way.
"""

import enum
import struct
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ollamad.wire.codec import MalformedMessage, decode, encode

PROTOCOL = 1  # raised when frames or methods change meaning
OLDEST_PROTOCOL = 1  # the oldest that this version still speaks

T = TypeVar("T")

HEADER = struct.Struct("!BII")
MAX_MESSAGE = 1 << 20  # bytes; a frame is read whole, so this bounds memory
WINDOW = 1 << 20  # bytes in flight a stream; covers 10 Gbit/s at 0.8 ms
MAX_STREAMS = 1024  # a connection; more at once is a bug or an attack
MAX_HELLO = 4096  # bytes
MAX_STREAM_ID = (1 << 32) - 1  # what the header holds; ids are never used again


class Kind(enum.IntEnum):
    HELLO = 0
    OPEN = 1
    MESSAGE = 2
    END = 3
    RESET = 4
    CREDIT = 5


class Departed(msgspec.Struct, frozen=True):
    """Word to a node that was removed from the cluster and does not know it."""

    at: float  # Unix seconds


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node speaks: protocol numbers from `oldest` to `protocol`, and its version.

    With `departed` it is the last frame too: the sender talks to members only.
    """

    protocol: int
    oldest: int
    version: str
    departed: Departed | None = None


class Reset(msgspec.Struct, frozen=True):
    code: str
    message: str


class ProtocolError(Exception):
    """The peer broke the protocol; the connection must be closed."""


class TooManyStreams(Exception):
    """This side has MAX_STREAMS exchanges open; the peer would close the connection at one more."""


class StreamIdsSpent(Exception):
    """The connection can open no more streams, ever; use another one."""


class TurnedAway(ProtocolError):
    """The peer says that this node is no member of the cluster any more."""

    def __init__(self, departed: Departed) -> None:
        super().__init__("it says that this node was removed from the cluster")
        self.departed = departed


class IncompatibleVersion(ProtocolError):
    """The peer speaks no protocol that this node speaks."""


@dataclass(frozen=True, slots=True)
class HelloReceived:
    hello: Hello


@dataclass(frozen=True, slots=True)
class StreamOpened:
    stream: int
    method: str
    request: bytes


@dataclass(frozen=True, slots=True)
class MessageReceived:
    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    stream: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    stream: int
    reset: Reset


@dataclass(frozen=True, slots=True)
class CreditReceived:
    stream: int


Event = HelloReceived | StreamOpened | MessageReceived | StreamEnded | StreamReset | CreditReceived


@dataclass(slots=True)
class _Stream:
    send_window: int = WINDOW
    receive_window: int = WINDOW  # what the peer may still send
    consumed: int = 0  # bytes read by our side and not yet given back as credit
    sent_end: bool = False
    got_end: bool = False


class MuxConnection:
    """The state of one side of a connection. Methods that send return the bytes to send."""

    def __init__(self, *, dialler: bool, version: str) -> None:
        self._dialler = dialler
        self._version = version
        self._buffer = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._last_stream = 0
        self._greeted = False

    def hello(self) -> bytes:
        """The frame that must be sent first."""
        return _frame(Kind.HELLO, 0, encode(Hello(PROTOCOL, OLDEST_PROTOCOL, self._version)))

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def is_spent(self) -> bool:
        """Whether every stream id was used."""
        return self._last_stream == MAX_STREAM_ID

    def open(self, method: str, request: bytes) -> tuple[int, bytes]:
        """Begin an exchange: its stream id and the bytes to send (dialler only).

        Raises:
          TooManyStreams: try again when an exchange has ended.
          StreamIdsSpent: try again on another connection.
        """
        assert self._dialler, "only the side that dialled opens streams"
        if self.is_spent:
            raise StreamIdsSpent(f"{MAX_STREAM_ID} exchanges were opened on this connection")
        if len(self._streams) >= MAX_STREAMS:
            raise TooManyStreams(f"{MAX_STREAMS} exchanges are open on this connection")
        name = method.encode("ascii")
        if len(name) + 1 + len(request) > MAX_MESSAGE:
            raise ValueError(f"a request of {len(request)} bytes is over {MAX_MESSAGE}")
        self._last_stream += 1
        self._streams[self._last_stream] = _Stream()
        payload = bytes([len(name)]) + name + request
        return self._last_stream, _frame(Kind.OPEN, self._last_stream, payload)

    def can_send(self, stream: int) -> bool:
        """Whether the peer gave credit for another message (of any size) on that stream."""
        state = self._streams.get(stream)
        return state is not None and state.send_window > 0

    def message(self, stream: int, data: bytes) -> bytes:
        """One message; call only while `can_send`."""
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(data)} bytes is over {MAX_MESSAGE}")
        state = self._streams[stream]
        assert not state.sent_end, "the stream was ended"
        state.send_window -= HEADER.size + len(data)
        return _frame(Kind.MESSAGE, stream, data)

    def end(self, stream: int) -> bytes:
        """No more messages from this side; nothing to send if that was said before."""
        state = self._streams.get(stream)
        if state is None or state.sent_end:
            return b""
        state.sent_end = True
        self._forget_if_over(stream, state)
        return _frame(Kind.END, stream, b"")

    def reset(self, stream: int, code: str, message: str) -> bytes:
        """End an exchange at once; nothing to send if it is over already."""
        if self._streams.pop(stream, None) is None:
            return b""
        return _frame(Kind.RESET, stream, encode(Reset(code, message[:1000])))

    def consumed(self, stream: int, size: int) -> bytes:
        """Our side has read a message of that many bytes: perhaps a credit frame to send."""
        state = self._streams.get(stream)
        if state is None or state.got_end:
            return b""
        state.consumed += HEADER.size + size
        if state.consumed < WINDOW // 2:
            return b""
        grant, state.consumed = state.consumed, 0
        state.receive_window += grant
        return _frame(Kind.CREDIT, stream, grant.to_bytes(4, "big"))

    def receive_data(self, data: bytes | bytearray) -> list[Event]:
        """Take bytes from the network.

        Raises:
          ProtocolError: the connection must be closed; IncompatibleVersion says that the
            peer is another version of this program.
        """
        self._buffer += data
        events: list[Event] = []
        position = 0
        while len(self._buffer) - position >= HEADER.size:
            kind, stream, length = HEADER.unpack_from(self._buffer, position)
            if length > (MAX_MESSAGE if self._greeted else MAX_HELLO):
                raise ProtocolError(f"a frame of {length} bytes is too long")
            start = position + HEADER.size
            if len(self._buffer) < start + length:
                break
            payload = bytes(memoryview(self._buffer)[start : start + length])
            position = start + length
            event = self._receive_frame(kind, stream, payload)
            if event is not None:
                events.append(event)
        del self._buffer[:position]
        return events

    def _receive_frame(self, kind: int, stream: int, payload: bytes) -> Event | None:
        if not self._greeted:
            return self._receive_hello(kind, payload)
        match kind:
            case Kind.OPEN:
                return self._receive_open(stream, payload)
            case Kind.MESSAGE:
                state = self._live(stream)
                if state is None:
                    return None
                # A message may overdraw the window once, so that it need not be cut.
                if state.got_end or state.receive_window <= 0:
                    raise ProtocolError("a message came after the end or without credit")
                state.receive_window -= HEADER.size + len(payload)
                return MessageReceived(stream, payload)
            case Kind.END:
                state = self._live(stream)
                if state is None:
                    return None
                state.got_end = True
                self._forget_if_over(stream, state)
                return StreamEnded(stream)
            case Kind.RESET:
                if self._live(stream) is None:
                    return None
                del self._streams[stream]
                return StreamReset(stream, _decode(payload, Reset))
            case Kind.CREDIT:
                state = self._live(stream)
                if len(payload) != 4:
                    raise ProtocolError("a credit frame must have 4 bytes")
                if state is None:
                    return None
                state.send_window += int.from_bytes(payload, "big")
                if state.send_window > WINDOW:
                    raise ProtocolError("more credit was given than was used")
                return CreditReceived(stream)
            case _:
                raise ProtocolError(f"unknown frame kind {kind}")

    def _receive_hello(self, kind: int, payload: bytes) -> Event:
        if kind != Kind.HELLO:
            raise ProtocolError("the first frame must be a hello")
        hello = _decode(payload, Hello)
        if hello.protocol < OLDEST_PROTOCOL or hello.oldest > PROTOCOL:
            raise IncompatibleVersion(
                f"the other node runs version {hello.version} (protocol {hello.oldest} to "
                f"{hello.protocol}), this one {self._version} ({OLDEST_PROTOCOL} to {PROTOCOL}); "
                "install the same version on both"
            )
        if hello.departed is not None and self._dialler:
            raise TurnedAway(hello.departed)
        self._greeted = True
        return HelloReceived(hello)

    def _receive_open(self, stream: int, payload: bytes) -> Event:
        if self._dialler or stream <= self._last_stream:
            raise ProtocolError(f"stream {stream} cannot be opened by this peer")
        if len(self._streams) >= MAX_STREAMS:
            raise ProtocolError(f"more than {MAX_STREAMS} streams at once")
        if not payload or len(payload) < 1 + payload[0]:
            raise ProtocolError("an open frame without a method")
        try:
            method = payload[1 : 1 + payload[0]].decode("ascii")
        except UnicodeDecodeError:
            raise ProtocolError("a method name must be ASCII") from None
        self._last_stream = stream
        self._streams[stream] = _Stream()
        return StreamOpened(stream, method, payload[1 + payload[0] :])

    def _live(self, stream: int) -> _Stream | None:
        state = self._streams.get(stream)
        if state is None and not 0 < stream <= self._last_stream:
            raise ProtocolError(f"stream {stream} was never opened")
        return state

    def _forget_if_over(self, stream: int, state: _Stream) -> None:
        if state.sent_end and state.got_end:
            del self._streams[stream]


def farewell(version: str, departed: Departed) -> bytes:
    """All that is said to a node that was removed and dials us."""
    return _frame(Kind.HELLO, 0, encode(Hello(PROTOCOL, OLDEST_PROTOCOL, version, departed)))


def _decode(payload: bytes, type_: type[T]) -> T:
    try:
        return decode(payload, type_)
    except MalformedMessage as error:
        raise ProtocolError(str(error)) from None


def _frame(kind: Kind, stream: int, payload: bytes) -> bytes:
    return HEADER.pack(kind, stream, len(payload)) + payload
