"""The multiplexer without I/O: exact bytes, illegal frames, fuzz, and a model of its credit."""

import contextlib
from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.mux import (
    HEADER,
    MAX_HELLO,
    MAX_MESSAGE,
    MAX_STREAM_ID,
    MAX_STREAMS,
    OLDEST_PROTOCOL,
    PROTOCOL,
    WINDOW,
    CreditReceived,
    Event,
    Hello,
    HelloReceived,
    IncompatibleVersion,
    Kind,
    MessageReceived,
    MuxConnection,
    ProtocolError,
    Reset,
    StreamEnded,
    StreamIdsSpent,
    StreamOpened,
    StreamReset,
    TooManyStreams,
)


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, stream, len(payload)) + payload


HELLO = frame(Kind.HELLO, 0, encode(Hello(PROTOCOL, OLDEST_PROTOCOL, "1.0")))
OPEN_1 = frame(Kind.OPEN, 1, b"\x04echorequest")


def pair() -> tuple[MuxConnection, MuxConnection]:
    """A dialler and an acceptor that have greeted each other."""
    dialler = MuxConnection(dialler=True, version="1.0")
    acceptor = MuxConnection(dialler=False, version="1.0")
    acceptor.receive_data(dialler.hello())
    dialler.receive_data(acceptor.hello())
    return dialler, acceptor


def greeted(*, dialler: bool) -> MuxConnection:
    return pair()[0 if dialler else 1]


def test_the_bytes_of_every_frame_never_change() -> None:
    dialler, acceptor = pair()
    assert dialler.hello().hex() == "00" + "00000000" + "0000001f" + (
        "83a870726f746f636f6c01a66f6c6465737401a776657273696f6ea3312e30"
    )
    stream, opened = dialler.open("echo", b"request")
    assert (stream, opened) == (1, OPEN_1)
    acceptor.receive_data(opened)
    assert dialler.message(1, b"abc").hex() == "02" + "00000001" + "00000003" + "616263"
    assert dialler.end(1).hex() == "03" + "00000001" + "00000000"
    reset = acceptor.reset(1, "GONE", "why")
    assert reset == frame(Kind.RESET, 1, encode(Reset("GONE", "why")))


def test_a_conversation_reads_as_a_script() -> None:
    dialler, acceptor = pair()
    stream, data = dialler.open("echo", b"request")
    assert acceptor.receive_data(data) == [StreamOpened(1, "echo", b"request")]
    data = acceptor.message(1, b"one") + acceptor.message(1, b"") + acceptor.end(1)
    assert dialler.receive_data(data) == [
        MessageReceived(1, b"one"),
        MessageReceived(1, b""),
        StreamEnded(1),
    ]
    assert acceptor.end(1) == b"", "said before"
    assert acceptor.receive_data(dialler.end(stream)) == [StreamEnded(1)]
    assert dialler.open_streams == acceptor.open_streams == 0
    assert dialler.end(1) == dialler.reset(1, "X", "") == dialler.consumed(1, 5) == b""
    assert not dialler.can_send(1)


SCRIPT = b"".join(
    [
        HELLO,
        OPEN_1,
        frame(Kind.OPEN, 7, b"\x01x"),
        frame(Kind.MESSAGE, 1, b"hello"),
        frame(Kind.CREDIT, 1, b"\0\0\0\0"),
        frame(Kind.MESSAGE, 7, b""),
        frame(Kind.END, 1),
        frame(Kind.RESET, 7, encode(Reset("C", "m"))),
        frame(Kind.MESSAGE, 7, b"late"),
    ]
)
SCRIPT_EVENTS: list[Event] = [
    HelloReceived(Hello(PROTOCOL, OLDEST_PROTOCOL, "1.0")),
    StreamOpened(1, "echo", b"request"),
    StreamOpened(7, "x", b""),
    MessageReceived(1, b"hello"),
    CreditReceived(1),
    MessageReceived(7, b""),
    StreamEnded(1),
    StreamReset(7, Reset("C", "m")),
]


def test_read_whole() -> None:
    assert MuxConnection(dialler=False, version="1").receive_data(SCRIPT) == SCRIPT_EVENTS


def test_read_byte_by_byte() -> None:
    mux, events = MuxConnection(dialler=False, version="1"), list[Event]()
    for position in range(len(SCRIPT)):
        events += mux.receive_data(SCRIPT[position : position + 1])
    assert events == SCRIPT_EVENTS


def test_read_with_trailing_data() -> None:
    mux = MuxConnection(dialler=False, version="1")
    assert mux.receive_data(SCRIPT + frame(Kind.END, 1)[:8]) == SCRIPT_EVENTS
    assert mux.receive_data(b"") == []
    assert mux.receive_data(frame(Kind.END, 1)[8:]) == [StreamEnded(1)]


@given(st.lists(st.integers(1, 40)))
def test_read_in_any_portions(sizes: list[int]) -> None:
    mux, events, rest = MuxConnection(dialler=False, version="1"), list[Event](), SCRIPT
    for size in [*sizes, len(SCRIPT)]:
        events += mux.receive_data(rest[:size])
        rest = rest[size:]
    assert events == SCRIPT_EVENTS


@pytest.mark.parametrize(
    ("dialler", "data"),
    [
        (False, frame(Kind.HELLO, 0, encode(Hello(1, 1, "1")))),  # a second hello
        (False, frame(6, 1)),
        (False, frame(255, 0)),
        (False, frame(Kind.MESSAGE, 1, b"x")),  # never opened
        (False, frame(Kind.END, 1)),
        (False, frame(Kind.CREDIT, 1, b"\0\0\0\1")),
        (False, frame(Kind.RESET, 1, encode(Reset("", "")))),
        (False, frame(Kind.OPEN, 0, b"\x01x")),
        (False, frame(Kind.OPEN, 1)),  # no method
        (False, frame(Kind.OPEN, 1, b"\x05abc")),  # a method that is cut off
        (False, frame(Kind.OPEN, 1, b"\x01\xff")),  # not ASCII
        (False, OPEN_1 + OPEN_1),
        (False, frame(Kind.OPEN, 5, b"\x01x") + frame(Kind.OPEN, 4, b"\x01x")),
        (False, OPEN_1 + frame(Kind.END, 2)),
        (False, OPEN_1 + frame(Kind.MESSAGE, 0, b"x")),
        (False, OPEN_1 + frame(Kind.CREDIT, 1, b"\0\0\1")),
        (False, OPEN_1 + frame(Kind.CREDIT, 1, b"\0\0\0\0\1")),
        (False, OPEN_1 + frame(Kind.CREDIT, 1, b"\0\0\0\1")),  # more than was used
        (False, OPEN_1 + frame(Kind.CREDIT, 1, b"\xff\xff\xff\xff")),
        (False, OPEN_1 + frame(Kind.END, 1) + frame(Kind.MESSAGE, 1, b"x")),
        (False, OPEN_1 + frame(Kind.RESET, 1, b"junk")),
        (False, OPEN_1 + frame(Kind.RESET, 1, b"")),
        (False, OPEN_1 + frame(Kind.RESET, 1, b"\x82\xa4code\xa1\xff\xa7message\xa1x")),
        (False, HEADER.pack(Kind.MESSAGE, 1, MAX_MESSAGE + 1)),
        (False, HEADER.pack(Kind.MESSAGE, 1, 0xFFFFFFFF)),
        (True, frame(Kind.OPEN, 1, b"\x01x")),  # only the dialler opens
        (True, frame(Kind.OPEN, 0xFFFFFFFF, b"\x01x")),
    ],
)
def test_illegal_frames_end_the_connection(dialler: bool, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        greeted(dialler=dialler).receive_data(data)


@pytest.mark.parametrize(
    "data",
    [
        OPEN_1,
        frame(Kind.HELLO, 0, b"junk"),
        frame(Kind.HELLO, 0, b""),
        frame(Kind.HELLO, 0, b"\x83\xa8protocol\x01\xa6oldest\x01\xa7version\xa1\xff"),
        HEADER.pack(Kind.HELLO, 0, MAX_HELLO + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03",
    ],
)
def test_who_does_not_greet_is_cut_off(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        MuxConnection(dialler=False, version="1").receive_data(data)


@pytest.mark.parametrize(
    ("protocol", "oldest", "welcome"),
    [
        (PROTOCOL, OLDEST_PROTOCOL, True),
        (PROTOCOL + 5, PROTOCOL, True),  # newer, but still speaks ours
        (PROTOCOL + 5, PROTOCOL + 1, False),
        (OLDEST_PROTOCOL - 1, OLDEST_PROTOCOL - 1, False),
        (-1, -1, False),
    ],
)
def test_versions(protocol: int, oldest: int, welcome: bool) -> None:
    mux = MuxConnection(dialler=True, version="mine")
    data = frame(Kind.HELLO, 0, encode(Hello(protocol, oldest, "theirs")))
    if welcome:
        assert mux.receive_data(data) == [HelloReceived(Hello(protocol, oldest, "theirs"))]
    else:
        with pytest.raises(IncompatibleVersion, match=r"theirs.*mine"):
            mux.receive_data(data)


def test_the_number_of_streams_is_bounded_on_both_sides() -> None:
    dialler, acceptor = pair()
    for _ in range(MAX_STREAMS):
        stream, data = dialler.open("x", b"")
        acceptor.receive_data(data)
    with pytest.raises(TooManyStreams):
        dialler.open("x", b"")
    acceptor.receive_data(dialler.reset(stream, "DONE", ""))
    _, data = dialler.open("x", b"")
    assert acceptor.receive_data(data) == [StreamOpened(MAX_STREAMS + 1, "x", b"")]
    with pytest.raises(ProtocolError, match="at once"):
        acceptor.receive_data(frame(Kind.OPEN, MAX_STREAMS + 2, b"\x01x"))


def test_stream_ids_are_used_up_and_never_begin_again() -> None:
    dialler, acceptor = pair()
    dialler._last_stream = acceptor._last_stream = MAX_STREAM_ID - 1
    assert not dialler.is_spent
    stream, data = dialler.open("x", b"")
    assert acceptor.receive_data(data) == [StreamOpened(MAX_STREAM_ID, "x", b"")]
    assert dialler.is_spent
    for _ in range(2):
        with pytest.raises(StreamIdsSpent):
            dialler.open("x", b"")
    # The last exchange goes on to its end.
    assert acceptor.receive_data(dialler.message(stream, b"m")) == [MessageReceived(stream, b"m")]
    dialler.receive_data(acceptor.end(stream))
    acceptor.receive_data(dialler.end(stream))
    assert dialler.open_streams == acceptor.open_streams == 0
    with pytest.raises(ProtocolError):
        acceptor.receive_data(frame(Kind.OPEN, 1, b"\x01x"))


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    dialler, acceptor = pair()
    with pytest.raises(ValueError, match="over"):
        dialler.open("x", bytes(MAX_MESSAGE))
    assert dialler.open_streams == 0
    stream, data = dialler.open("x", bytes(MAX_MESSAGE - 2))
    assert len(acceptor.receive_data(data)) == 1
    with pytest.raises(ValueError, match="over"):
        dialler.message(stream, bytes(MAX_MESSAGE + 1))
    assert len(acceptor.receive_data(dialler.message(stream, bytes(MAX_MESSAGE)))) == 1


def test_a_long_reason_is_cut() -> None:
    dialler, acceptor = pair()
    acceptor.receive_data(dialler.open("x", b"")[1])
    [event] = dialler.receive_data(acceptor.reset(1, "INTERNAL", "x" * 10_000_000))
    assert isinstance(event, StreamReset)
    assert len(event.reset.message) == 1000


# Credit.


def test_a_message_may_overdraw_once_and_no_more() -> None:
    dialler, acceptor = pair()
    acceptor.receive_data(dialler.open("x", b"")[1])
    small = bytes(WINDOW - 2 * HEADER.size - 1)
    acceptor.receive_data(dialler.message(1, small))
    assert dialler.can_send(1)
    acceptor.receive_data(dialler.message(1, bytes(MAX_MESSAGE)))  # overdraws
    assert not dialler.can_send(1)
    with pytest.raises(ProtocolError, match="without credit"):
        acceptor.receive_data(frame(Kind.MESSAGE, 1, b""))


def test_empty_messages_cost_credit_too() -> None:
    acceptor = greeted(dialler=False)
    acceptor.receive_data(OPEN_1)
    most = -(-WINDOW // HEADER.size)
    acceptor.receive_data(frame(Kind.MESSAGE, 1) * most)
    with pytest.raises(ProtocolError, match="without credit"):
        acceptor.receive_data(frame(Kind.MESSAGE, 1))


def test_credit_comes_back_when_half_was_read() -> None:
    dialler, acceptor = pair()
    acceptor.receive_data(dialler.open("x", b"")[1])
    size = WINDOW // 4 - HEADER.size
    for _ in range(4):
        acceptor.receive_data(dialler.message(1, bytes(size)))
    assert not dialler.can_send(1)
    assert acceptor.consumed(1, size) == b""
    credit = acceptor.consumed(1, size)
    assert credit == frame(Kind.CREDIT, 1, (WINDOW // 2).to_bytes(4, "big"))
    assert dialler.receive_data(credit) == [CreditReceived(1)]
    assert dialler.can_send(1)


def test_who_has_ended_gets_no_credit() -> None:
    dialler, acceptor = pair()
    acceptor.receive_data(dialler.open("x", b"")[1])
    acceptor.receive_data(dialler.message(1, bytes(MAX_MESSAGE)) + dialler.end(1))
    assert acceptor.consumed(1, MAX_MESSAGE) == b""


@pytest.mark.parametrize(
    "late",
    [
        frame(Kind.MESSAGE, 1, b"x"),
        frame(Kind.END, 1),
        frame(Kind.CREDIT, 1, b"\0\0\0\1"),
        frame(Kind.RESET, 1, encode(Reset("", ""))),
    ],
)
def test_late_frames_of_a_stream_that_is_over_are_dropped(late: bytes) -> None:
    acceptor = greeted(dialler=False)
    acceptor.receive_data(OPEN_1)
    acceptor.reset(1, "X", "")
    assert acceptor.receive_data(late) == []


# Fuzz.


def feed(mux: MuxConnection, data: bytes, sizes: list[int]) -> None:
    """Feed in portions; nothing but ProtocolError may come out, and nothing may pile up."""
    with contextlib.suppress(ProtocolError):
        while data:
            size = sizes.pop() if sizes else len(data)
            mux.receive_data(data[:size])
            data = data[size:]
            assert len(mux._buffer) < HEADER.size + MAX_MESSAGE
            assert mux.open_streams <= MAX_STREAMS


SIZES = st.lists(st.integers(1, 50), max_size=20)


@given(st.binary(max_size=300), SIZES, st.booleans(), st.booleans())
def test_random_bytes(data: bytes, sizes: list[int], dialler: bool, hello: bool) -> None:
    mux = greeted(dialler=dialler) if hello else MuxConnection(dialler=dialler, version="1")
    feed(mux, data, sizes)


KINDS = st.integers(0, 7)
STREAMS = st.sampled_from([0, 1, 2, 3, 7, 0xFFFFFFFF])
PAYLOADS = st.one_of(
    st.binary(max_size=12),
    st.just(encode(Reset("C", "m"))),
    st.just(b"\x01x"),
    st.just(b"\0\0\0\1"),
)


@settings(max_examples=200)
@given(st.lists(st.builds(frame, KINDS, STREAMS, PAYLOADS), max_size=12), SIZES, st.booleans())
def test_frames_in_any_order(frames: list[bytes], sizes: list[int], dialler: bool) -> None:
    feed(greeted(dialler=dialler), b"".join(frames), sizes)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, len(SCRIPT) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SCRIPT)),
    SIZES,
)
def test_a_valid_conversation_that_was_damaged(
    changes: list[tuple[int, int]], cut: int, sizes: list[int]
) -> None:
    data = bytearray(SCRIPT)
    for position, value in changes:
        data[position] = value
    feed(MuxConnection(dialler=False, version="1"), bytes(data[:cut] + data[cut + 1 :]), sizes)


def test_a_frame_that_never_ends_takes_no_more_than_its_size() -> None:
    mux = greeted(dialler=False)
    mux.receive_data(HEADER.pack(Kind.OPEN, 1, MAX_MESSAGE))
    for _ in range(15):
        mux.receive_data(bytes(1 << 16))
    assert len(mux._buffer) == HEADER.size + 15 * (1 << 16)
    with pytest.raises(ProtocolError):  # it ends, and has no method
        mux.receive_data(bytes(1 << 17))


class Shape(msgspec.Struct, frozen=True):
    text: str
    numbers: list[int]
    any: Any = None


@given(st.binary(max_size=100))
def test_the_codec_lets_nothing_out_but_malformed_message(data: bytes) -> None:
    for type_ in (Shape, Hello, str, list[Shape], dict[str, int], bytes, float):
        with contextlib.suppress(MalformedMessage):
            decode(data, type_)


@pytest.mark.parametrize(
    ("data", "type_"),
    [
        (b"", str),
        (b"\xa1\xff", str),  # not UTF-8
        (b"\x81\xa4text\xa1\xff", Shape),
        (b"\xdd\xff\xff\xff\xff", list[int]),  # four billion, announced only
        (b"\xdf\xff\xff\xff\xff", dict[str, int]),
        (b"\xc6\xff\xff\xff\xff", bytes),
        (b"\x91" * 100_000, list),
        (b"\x01\x01", int),  # trailing data
        (b"\xc1", int),
    ],
)
def test_malformed_messages(data: bytes, type_: type[Any]) -> None:
    with pytest.raises(MalformedMessage):
        decode(data, type_)


# A model of two connected sides: whatever they do, in whatever portions the bytes arrive, no
# side breaks the protocol, no message is lost, changed or reordered, and no credit leaks.


class Side:
    def __init__(self, *, dialler: bool) -> None:
        self.mux = MuxConnection(dialler=dialler, version="1")
        self.wire = bytearray(self.mux.hello())  # to the other side, under way
        self.sent: dict[int, deque[bytes]] = {}  # what the other side has not seen yet
        self.inbox: dict[int, deque[int]] = {}  # sizes that were received and not read
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.peer_ended: set[int] = set()
        self.known: set[int] = set()


SIZES_OF_MESSAGES = st.sampled_from([0, 1, 9, 1000, WINDOW // 4, WINDOW // 2, MAX_MESSAGE])
SIDES = st.sampled_from([0, 1])


class TwoSides(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize()
    def greet(self) -> None:
        self.sides = (Side(dialler=True), Side(dialler=False))
        self.count = 0

    @rule(target=streams)
    def open(self) -> int:
        dialler = self.sides[0]
        stream, data = dialler.mux.open("m", b"r%d" % self.count)
        self.count += 1
        dialler.wire += data
        dialler.known.add(stream)
        for side in self.sides:
            side.sent[stream], side.inbox[stream] = deque(), deque()
        return stream

    @rule(stream=streams, which=SIDES, size=SIZES_OF_MESSAGES)
    def send(self, stream: int, which: int, size: int) -> None:
        side = self.sides[which]
        if stream in side.ended or not side.mux.can_send(stream):
            return
        data = stream.to_bytes(2, "big").ljust(size, b"x")[:size]
        side.wire += side.mux.message(stream, data)
        side.sent[stream].append(data)

    @rule(which=SIDES, portion=st.sampled_from([1, 8, 9, 10, 100, 70_000, 10_000_000]))
    def deliver(self, which: int, portion: int) -> None:
        sender, receiver = self.sides[which], self.sides[1 - which]
        data = bytes(sender.wire[:portion])
        del sender.wire[: len(data)]
        for event in receiver.mux.receive_data(data):
            match event:
                case StreamOpened(stream, "m", _):
                    receiver.known.add(stream)
                case MessageReceived(stream, message):
                    assert stream in receiver.known
                    assert stream not in receiver.peer_ended
                    assert sender.sent[stream].popleft() == message
                    receiver.inbox[stream].append(len(message))
                case StreamEnded(stream):
                    assert not sender.sent[stream]
                    receiver.peer_ended.add(stream)
                case StreamReset(stream, reset):
                    assert stream in sender.reset
                    assert reset.code == "R"
                    receiver.reset.add(stream)
                case HelloReceived() | CreditReceived():
                    pass
                case _:
                    raise AssertionError(event)

    @rule(stream=streams, which=SIDES)
    def read(self, stream: int, which: int) -> None:
        side = self.sides[which]
        if side.inbox[stream]:
            side.wire += side.mux.consumed(stream, side.inbox[stream].popleft())

    @rule(stream=streams, which=SIDES)
    def end(self, stream: int, which: int) -> None:
        side = self.sides[which]
        if stream in side.known:
            side.wire += side.mux.end(stream)
            side.ended.add(stream)

    @rule(stream=consumes(streams), which=SIDES)
    def reset_(self, stream: int, which: int) -> None:
        side = self.sides[which]
        if stream in side.known:
            data = side.mux.reset(stream, "R", "reason")
            if data:
                side.reset.add(stream)
            side.wire += data

    @precondition(lambda self: self.count)
    @rule()
    def settle(self) -> None:
        """Everything arrives and is read: then no credit is missing anywhere."""
        while any(side.wire or any(side.inbox.values()) for side in self.sides):
            for which in (0, 1):
                self.deliver(which, 10_000_000)
                for stream, sizes in self.sides[1 - which].inbox.items():
                    while sizes:
                        self.read(stream, 1 - which)
        one, other = self.sides
        assert set(one.mux._streams) == set(other.mux._streams)
        for stream, state in one.mux._streams.items():
            peer = other.mux._streams[stream]
            for sender, receiver in ((state, peer), (peer, state)):
                assert sender.send_window == receiver.receive_window
                if not sender.sent_end:
                    assert receiver.receive_window + receiver.consumed == WINDOW
                    assert sender.send_window > 0
            assert not (state.sent_end and state.got_end)

    @invariant()
    def what_one_side_can_make_the_other_keep_is_bounded(self) -> None:
        for side in getattr(self, "sides", ()):
            for stream, sizes in side.inbox.items():
                if stream not in side.reset:
                    assert sum(sizes) + HEADER.size * len(sizes) <= WINDOW + MAX_MESSAGE + 9

    def teardown(self) -> None:
        if getattr(self, "count", 0):
            self.settle()


TestTwoSides = TwoSides.TestCase
TestTwoSides.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
