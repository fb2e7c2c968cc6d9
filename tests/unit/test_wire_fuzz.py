"""Every decoder of other hosts' bytes: what must hold for any bytes, in some hundreds of tries.

The properties are those of `tests/fuzz/targets.py`, which `make fuzz` tries for minutes. Here are
besides: cut and continued messages, and the worst that a message can do to memory and time.
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.inference import EmbedRequest, GenerateRequest, Message
from ollamad.wire import pieces, raftwire
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.join import JoinRequest, open_sealed, seal_request
from ollamad.wire.mux import HEADER, MAX_MESSAGE, Hello, Kind, MuxConnection
from tests.fuzz.targets import (
    BINDING,
    RAFT_MESSAGES,
    REQUEST,
    SEEDS,
    TARGETS,
    TOKEN,
)

MIB = 1 << 20

Change = tuple[str, int, bytes]

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "cut", "repeat"]),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[Change]) -> bytes:
    """A message that was damaged under way."""
    for kind, position, piece in changes:
        at = position % (len(data) + 1)
        match kind:
            case "flip":
                data = data[:at] + bytes(piece[0] ^ b for b in data[at : at + 1]) + data[at + 1 :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "delete":
                data = data[:at] + data[at + len(piece) :]
            case "cut":
                data = data[:at]
            case _:
                data += data[at:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(st.binary(max_size=200)))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_good_messages_that_were_damaged(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[name]))
    TARGETS[name](changed(seed, data.draw(CHANGES)))


@pytest.mark.parametrize("name", TARGETS)
def test_good_messages_pass(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)


# Cut anywhere, or with something behind it, no message is taken for another.

WHOLE: list[tuple[str, bytes, Callable[[bytes], Any]]] = [
    *((f"raft {type(m).__name__}", raftwire.encode(m), raftwire.decode) for m in RAFT_MESSAGES),
    ("hello", encode(Hello(1, 1, "1.0")), lambda data: decode(data, Hello)),
    ("join request", encode(REQUEST), lambda data: decode(data, JoinRequest)),
    ("join frame", seal_request(REQUEST, TOKEN.key, BINDING), open_sealed),
    ("map", encode(pieces.Map(5, MIB, bytes(32))), pieces.decode_holder_message),
    ("get", encode(pieces.Request(300)), pieces.decode_fetcher_message),
]


@pytest.mark.parametrize(
    ("data", "read"), [(d, r) for _, d, r in WHOLE], ids=[name for name, _, _ in WHOLE]
)
def test_no_message_is_cut_or_continued(data: bytes, read: Callable[[bytes], Any]) -> None:
    read(data)
    for end in range(len(data)):
        with pytest.raises((MalformedMessage, raftwire.MalformedMessage)):
            read(data[:end])
    for more in (b"\0", b"\xc0", data):
        with pytest.raises((MalformedMessage, raftwire.MalformedMessage)):
            read(data + more)


# Memory and time: a message takes at most a small multiple of its length while it is decoded.

FACTOR = 16  # a pointer of 8 bytes for an element of 1 byte, twice while a list becomes a tuple
SMALL = 64 * 1024  # bytes that any call may take
TIME_LIMIT_S = 1.0  # of the processor, for 4 MiB; usually some milliseconds


def array(count: int, element: bytes, announced: int | None = None) -> bytes:
    return b"\xdd" + (announced or count).to_bytes(4, "big") + element * count


def after(key: str, value: bytes, **others: object) -> bytes:
    """A map of these entries and a last one, whose value is given in msgpack."""
    head = encode(others | {key: None})
    return head[:-1] + value


APPEND = b"\x96\xa6append\x05\x00\x00\x00"
RAFT_SIZE = raftwire.MAX_FRAME_SIZE
WORST: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "raft: nested": (raftwire.decode, b"\x91" * RAFT_SIZE),
    "raft: 800,000 entries": (
        raftwire.decode,
        APPEND + array((RAFT_SIZE - 20) // 5, b"\x92\x01\xc4\x01\x00"),
    ),
    "raft: the most entries": (
        raftwire.decode,
        APPEND + array(raftwire.MAX_ENTRIES, b"\x92\x01\xc4\x01\x00"),
    ),
    "raft: entries announced": (raftwire.decode, APPEND + array(1, b"\x92", 0xFFFFFFFF)),
    "raft: a tag of 4 MiB": (
        raftwire.decode,
        b"\x92\xdb" + (RAFT_SIZE - 10).to_bytes(4, "big") + b"a" * (RAFT_SIZE - 10),
    ),
    "bye: a code of 1 MiB": (
        pieces.decode_holder_message,
        b"\x92\xa3bye\xdb" + (MIB - 50).to_bytes(4, "big") + b"a" * (MIB - 50),
    ),
    "raft: a voter for every byte": (
        raftwire.decode_voters,
        bytes([raftwire.MEMBERSHIP]) + array(MIB, b"\xa0"),
    ),
    "raft: a base voter for every byte": (
        raftwire.decode_change,
        bytes([raftwire.VOTER_CHANGE]) + b"\x92" + array(MIB, b"\xa0"),
    ),
    "generate: a token for every byte": (
        lambda data: decode(data, GenerateRequest),
        after("context", array(MIB, b"\x01"), model="m"),
    ),
    "generate: messages": (
        lambda data: decode(data, GenerateRequest),
        after("messages", array(MIB // 16, encode(Message("", ""))), model="m"),
    ),
    "embed: a text for every byte": (
        lambda data: decode(data, EmbedRequest),
        after("inputs", array(MIB, b"\xa0"), model="m"),
    ),
    "hello: unknown fields": (
        lambda data: decode(data, Hello),
        after("z", array(MIB, b"\x90"), protocol=1, oldest=1, version="1"),
    ),
    "join: nested": (open_sealed, b"\x81\xa4body" + b"\x91" * MIB),
    "pieces: have everything": (
        pieces.decode_holder_message,
        b"\x92\xa4have" + array(MIB - 20, b"\x01"),
    ),
    "pieces: the most pieces": (
        pieces.decode_holder_message,
        b"\x92\xa4have" + array(pieces.MAX_PIECES, b"\x01"),
    ),
}


@pytest.mark.parametrize("case", WORST)
def test_no_message_takes_much_more_than_its_length(case: str) -> None:
    read, data = WORST[case]

    def attempt() -> None:
        try:
            read(data)
        except (MalformedMessage, raftwire.MalformedMessage) as error:
            assert len(str(error)) < 1000, "it ends in the log"  # noqa: PT017

    begun = time.process_time()
    attempt()
    assert time.process_time() - begun < TIME_LIMIT_S
    tracemalloc.start()
    try:
        attempt()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < FACTOR * len(data) + SMALL, f"{peak} bytes for {len(data)}"


def test_one_entry_too_many_is_refused() -> None:
    entry = b"\x92\x01\xc4\x01\x00"
    assert raftwire.decode(APPEND + array(raftwire.MAX_ENTRIES, entry))
    with pytest.raises(raftwire.MalformedMessage, match="length"):
        raftwire.decode(APPEND + array(raftwire.MAX_ENTRIES + 1, entry))


@pytest.mark.parametrize("size", [1, 100, 16384])
def test_a_frame_in_portions_costs_no_more_than_its_bytes(size: int) -> None:
    """Not the square of them: what arrived is not copied again with each portion."""
    frame = HEADER.pack(Kind.OPEN, 1, MAX_MESSAGE) + b"\x01x" + bytes(MAX_MESSAGE - 2)
    portions = min(len(frame) // size, 20_000)
    mux = MuxConnection(dialler=False, version="1")
    mux.receive_data(MuxConnection(dialler=True, version="1").hello())
    begun = time.process_time()
    mux.receive_data(frame[: len(frame) - portions * size])
    for start in range(len(frame) - portions * size, len(frame), size):
        mux.receive_data(frame[start : start + size])
    assert mux.open_streams == 1
    assert time.process_time() - begun < TIME_LIMIT_S
