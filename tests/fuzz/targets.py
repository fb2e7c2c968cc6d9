"""What must hold for any bytes, one function a decoder; whoever calls them looks for bytes.

A target raises nothing but AssertionError, and that only for a bug. The first bytes of its input
choose among what the decoder can be asked, the rest is what it reads.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.inference import EmbedRequest, GenerateRequest
from ollamad.core.pieces import MIB
from ollamad.core.presence import Beat
from ollamad.core.state import Capacity
from ollamad.raft.links import FrameSplitter
from ollamad.wire import lane, pieces, raftwire
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.join import (
    SECRET_SIZE,
    InvalidToken,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Refusal,
    Sealed,
    Token,
    format_token,
    open_reply,
    open_request,
    open_sealed,
    parse_token,
    request_is_proved,
    seal_reply,
    seal_request,
)
from ollamad.wire.mux import (
    HEADER,
    MAX_MESSAGE,
    MAX_STREAMS,
    WINDOW,
    Event,
    Hello,
    Kind,
    MuxConnection,
    ProtocolError,
    Reset,
)

Target = Callable[[bytes], None]

BINDING = b"b" * 32
TOKEN = Token("0102030405ff", b"s" * SECRET_SIZE, b"c" * 32, 2**33)
REQUEST = JoinRequest(
    node_id=node_id_of(b"p" * 32),
    public_key=b"p" * 32,
    name="two",
    api_address=":8080",
    p2p_address=":9000",
    raft_address=":7000",
    capacity=Capacity(1, 2, 3),
    version="1",
    protocol=1,
    token_id=TOKEN.id,
    now=5.0,
)
REPLY = JoinReply("c1", b"ca", b"cert", (), (NodeId("Qm1"),))

# Every schema that is read of another node by `codec.decode`.
TYPES: list[Any] = [
    Hello,
    Reset,
    Sealed,
    JoinRequest,
    JoinReply,
    Refusal,
    Beat,
    GenerateRequest,
    EmbedRequest,
    pieces.Want,
    str,
    bool,
    type(None),
]


def codec(data: bytes) -> None:
    """A value of the type or MalformedMessage; a value survives the way out and in again."""
    type_ = TYPES[data[0] % len(TYPES)] if data else Hello
    try:
        value = decode(data[1:], type_)
    except MalformedMessage:
        return
    once = encode(value)
    assert encode(decode(once, type_)) == once  # bytes, since NaN is not equal to itself


def raft(data: bytes) -> None:
    """A message within its bounds or MalformedMessage."""
    try:
        message = raftwire.decode(data)
    except raftwire.MalformedMessage:
        return
    assert raftwire.decode(raftwire.encode(message)) == message
    match message:
        case raftwire.Append():
            assert len(message.entries) <= raftwire.MAX_ENTRIES
            for entry in message.entries:
                assert message.prev_term <= entry.term <= message.term
                assert entry.command[0] in (
                    raftwire.REGULAR,
                    raftwire.NO_OP,
                    raftwire.MEMBERSHIP,
                )
                voters = raftwire.decode_voters(entry.command)
                assert voters is None or 0 < len(voters) <= raftwire.MAX_VOTERS
        case raftwire.Install():
            assert message.offset + len(message.data) <= message.total


def voters(data: bytes) -> None:
    """A membership entry, which also comes from the disk, or the request for one."""
    if not data:
        return
    with contextlib.suppress(raftwire.MalformedMessage):
        found = raftwire.decode_voters(data)
        if found is not None:
            assert raftwire.decode_voters(raftwire.encode_voters(found)) == found
        change = raftwire.decode_change(data)
        if change is not None:
            assert 0 < len(change.wanted) <= raftwire.MAX_VOTERS
            assert raftwire.decode_voters(raftwire.log_entry(data)) == frozenset(change.wanted)


def splitter(data: bytes) -> None:
    """Frames come out the same whether their bytes come at once or one by one."""
    whole = _frames(iter([data]))
    single = _frames(_portions(data))
    assert single[1] == whole[1]
    # What stood before a bad length is lost when it comes in one read: the link ends anyway.
    assert whole[1] or single[0] == whole[0]


def _portions(data: bytes) -> Iterator[bytes]:
    """Byte by byte; a long input in some more at a time, since there are many to try."""
    size = 1 + len(data) // 256
    return (data[start : start + size] for start in range(0, len(data), size))


def _frames(parts: Iterator[bytes]) -> tuple[list[bytes], bool]:
    found, frames = FrameSplitter(), list[bytes]()
    try:
        for part in parts:
            frames += found.feed(part)
    except raftwire.MalformedMessage:
        return frames, True
    return frames, False


def mux(data: bytes) -> None:
    """ProtocolError or events, the same however the bytes come; nothing piles up."""
    role = data[0] if data else 0
    rest = _script(data[1:]) if role & 2 else data[1:]
    whole = _events(role & 1 == 1, iter([rest]))
    single = _events(role & 1 == 1, _portions(rest))
    assert whole[1] == single[1]
    assert whole[1] or whole[0] == single[0]


def _events(dialler: bool, parts: Iterator[bytes]) -> tuple[list[Event], str]:
    connection = MuxConnection(dialler=dialler, version="1")
    connection.receive_data(MuxConnection(dialler=not dialler, version="1").hello())
    if dialler:
        for number in range(3):
            connection.open("x", bytes(number))
    events = list[Event]()
    try:
        for part in parts:
            events += connection.receive_data(part)
            assert len(connection._buffer) < HEADER.size + MAX_MESSAGE
            assert connection.open_streams <= MAX_STREAMS
            for state in connection._streams.values():
                assert state.send_window <= WINDOW
                assert -HEADER.size - MAX_MESSAGE < state.receive_window <= WINDOW
    except ProtocolError as error:
        return events, str(error) or type(error).__name__
    return events, ""


def _script(data: bytes) -> bytes:
    """Frames with right headers, from three bytes each: kind, stream and the payload's length."""
    frames, position = bytearray(), 0
    while position + 3 <= len(data):
        kind, stream, length = data[position], data[position + 1] % 8, data[position + 2] % 32
        payload = data[position + 3 : position + 3 + length]
        if kind % 8 == Kind.OPEN:
            payload = b"\x01x" + payload
        frames += HEADER.pack(kind % 8, stream, len(payload)) + payload
        position += 3 + length
    return bytes(frames)


def join(data: bytes) -> None:
    """Nobody is let in by bytes that were not made with the key of the token."""
    mode, rest = data[0] % 4 if data else 0, data[1:]
    if mode == 0:
        with contextlib.suppress(MalformedMessage):
            _, sealed = open_sealed(rest)
            if request_is_proved(sealed, TOKEN.key, BINDING):
                assert rest == seal_request(REQUEST, TOKEN.key, BINDING)
    elif mode == 1:
        with contextlib.suppress(MalformedMessage):
            open_request(Sealed(rest, b""))
    elif mode == 2:
        try:
            reply = open_reply(rest, encode(REQUEST), TOKEN, BINDING)
        except JoinRefused:
            return
        assert reply == REPLY
    else:
        with contextlib.suppress(InvalidToken):
            text = rest.decode("utf-8", "replace")
            assert format_token(parse_token(text)) == text


def pieces_of(data: bytes) -> None:
    """Both sides: ProtocolViolation or an event; requests and answers stay bounded."""
    fetcher = pieces.FetcherSide("sha256:" + "0a" * 32, growing=bool(data[:1]) and data[0] > 127)
    holder = pieces.HolderSide(3)
    with contextlib.suppress(pieces.ProtocolViolation):
        pieces.HolderSide.open(data)
    fetcher.request_map()
    fetcher.request(2)
    fetcher.request(0)
    fetcher.cancel(0)
    position = 0
    with contextlib.suppress(pieces.ProtocolViolation):
        while position < len(data):  # a length, and a message of that length
            end = position + 1 + data[position]
            message = data[position + 1 : end]
            position = end
            fetcher.receive(message)
            assert fetcher.open_requests == 2
    position = 0
    with contextlib.suppress(pieces.ProtocolViolation):
        while position < len(data):
            end = position + 1 + data[position]
            event = holder.receive(data[position + 1 : end])
            position = end
            assert len(holder._queue) <= 3
            assert len(holder._cancelled) <= 4
            if isinstance(event, pieces.FetcherGot):
                assert event.bits < 8
            if data[0] & 1 and holder.next_request() is not None:
                holder.ended()


class _Asked:
    length = 600_000


def lane_of(data: bytes) -> None:
    """Preamble and frames: each piece comes from its start on and never beyond its end."""
    with contextlib.suppress(lane.ProtocolViolation):
        mode, ticket = lane.decode_preamble(data)
        assert lane.encode_preamble(mode, ticket) == data
    reader, filled = lane.LaneReader({index: _Asked() for index in range(4)}), [0] * 4
    with contextlib.suppress(lane.ProtocolViolation):
        for start in range(0, len(data) - lane.FRAME.size + 1, lane.FRAME.size):
            frame = reader.read(data[start : start + lane.FRAME.size])
            if isinstance(frame, lane.RequestEnded):
                filled[frame.index] = 0
                continue
            assert frame.offset == filled[frame.index]
            filled[frame.index] += frame.size
            assert 0 < frame.size <= lane.BLOCK_SIZE
            assert filled[frame.index] <= _Asked.length
            if frame.is_last:
                assert filled[frame.index] == _Asked.length
                filled[frame.index] = 0


TARGETS: dict[str, Target] = {
    "codec": codec,
    "raft": raft,
    "voters": voters,
    "splitter": splitter,
    "mux": mux,
    "join": join,
    "pieces": pieces_of,
    "lane": lane_of,
}


def _sized(*messages: bytes) -> bytes:
    return b"".join(bytes([len(message)]) + message for message in messages)


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


RAFT_MESSAGES: list[Any] = [
    raftwire.Append(3, 7, 8, 2, (raftwire.Entry(2, b"\0x"), raftwire.Entry(3, b"\1"))),
    raftwire.Append(3, 7, 8, 2, (raftwire.Entry(3, raftwire.encode_voters(frozenset("abc"))),)),  # type: ignore[arg-type]
    raftwire.Install(3, 0, 4, bytes(32), b"data"),
    raftwire.Ack(3, 9, True, False),
    raftwire.Outdated(4),
    raftwire.VoteRequest(3, 8, 2),
    raftwire.Vote(3),
    raftwire.PreVoteRequest(4, 8, 2),
    raftwire.PreVote(3, 4, True),
    raftwire.TakeOver(3),
    raftwire.Forward(1 << 62, b"\0x"),
    raftwire.Placed(5, 9, 3),
]

# Good inputs to begin from.
SEEDS: dict[str, list[bytes]] = {
    "codec": [
        bytes([TYPES.index(type(value))]) + encode(value)
        for value in (
            Hello(1, 1, "1.0"),
            Reset("CODE", "why"),
            Sealed(b"body", b"mac"),
            REQUEST,
            REPLY,
            Refusal("CODE", "why"),
            pieces.Want(2, 2, "sha256:" + "0a" * 32),
            "text",
        )
    ],
    "raft": [raftwire.encode(message) for message in RAFT_MESSAGES],
    "voters": [
        raftwire.encode_voters(frozenset({NodeId("a"), NodeId("b")})),
        raftwire.encode_change(frozenset({NodeId("a")}), frozenset({NodeId("a"), NodeId("b")})),
    ],
    "splitter": [_frame(b"one") + _frame(b"") + _frame(b"x" * 50), b"\xff\xff\xff\xff"],
    "mux": [
        b"\0" + HEADER.pack(Kind.OPEN, 1, 3) + b"\x01xy" + HEADER.pack(Kind.MESSAGE, 1, 1) + b"m",
        b"\1" + HEADER.pack(Kind.END, 1, 0) + HEADER.pack(Kind.CREDIT, 2, 4) + bytes(4),
        b"\2" + bytes([1, 1, 0, 2, 1, 2]) + b"ab" + bytes([3, 1, 0, 5, 1, 4, 0, 0, 0, 0]),
        b"\3" + bytes([2, 1, 1, 65, 4, 2, 3]) + encode(Reset("C", "m"))[:3],
    ],
    "join": [
        b"\0" + seal_request(REQUEST, TOKEN.key, BINDING),
        b"\1" + encode(REQUEST),
        b"\2" + seal_reply(REPLY, encode(REQUEST), TOKEN.key, BINDING),
        b"\2" + seal_reply(Refusal("A", "b"), encode(REQUEST), TOKEN.key, BINDING),
        b"\3" + format_token(TOKEN).encode(),
    ],
    "pieces": [
        _sized(
            encode(pieces.Bitfield(2, 3, b"\5", bytes(32), False, True)),
            encode(pieces.Have((1,))),
            encode(pieces.Hashes((1, 2), bytes(64))),
            encode(pieces.Map(5, MIB, bytes(32))),
            encode(pieces.Bye("busy", "later", 2.0)),
        ),
        _sized(
            encode(pieces.MapRequest()),
            encode(pieces.Request(2)),
            encode(pieces.Request(0)),
            encode(pieces.Cancel(0)),
            encode(pieces.Got((1, 2))),
        ),
        encode(pieces.Want(2, 2, "sha256:" + "0a" * 32)),
    ],
    "lane": [
        lane.encode_preamble(lane.Mode.PLAIN, bytes(32)),
        b"".join(
            lane.encode_block_head(1, at, min(lane.BLOCK_SIZE, _Asked.length - at))
            for at in range(0, _Asked.length, lane.BLOCK_SIZE)
        )
        + lane.encode_ended(2, lane.EndCode.MISSING, 1.0),
    ],
}
assert SEEDS.keys() == TARGETS.keys()
