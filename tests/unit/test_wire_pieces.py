"""The piece protocol: exact bytes, both state machines whole, and hostile input."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.pieces import MIB, PieceMap
from ollamad.wire import pieces
from ollamad.wire.codec import MalformedMessage, encode
from ollamad.wire.pieces import (
    BLOCK_SIZE,
    MAX_MESSAGE,
    MAX_PIECES,
    MAX_REQUESTS,
    FetcherSide,
    HolderSide,
    ProtocolViolation,
)

DIGEST = "sha256:" + "0a" * 32
MAP = PieceMap(2 * MIB + 5, MIB, bytes(range(96)))  # three pieces, the last of 5 bytes


@pytest.mark.parametrize(
    ("message", "hex_bytes"),
    [
        (pieces.Want(1, 1, DIGEST), "930101d947" + DIGEST.encode().hex()),
        (pieces.MapRequest(), "91a46d61703f"),
        (pieces.Request(300), "92a3676574cd012c"),
        (pieces.Cancel(7), "92a663616e63656c07"),
        (pieces.Bitfield(1, 10, b"\xff\x01"), "94a462697473010ac402ff01"),
        (pieces.Have((3, 4)), "92a468617665920304"),
        (pieces.Map(5, MIB, b"\xab" * 32), "94a36d617005ce00100000c420" + "ab" * 32),
        (
            pieces.Reject(3, "cancelled", 0.5),
            "94a672656a65637403a963616e63656c6c6564cb3fe0000000000000",
        ),
        (
            pieces.Bye("busy", "later", 2.0),
            "94a3627965a462757379a56c61746572cb4000000000000000",
        ),
    ],
)
def test_the_bytes_of_control_messages_never_change(message: Any, hex_bytes: str) -> None:
    assert encode(message).hex() == hex_bytes


def test_the_bytes_of_a_block_never_change() -> None:
    data = pieces.encode_block(258, BLOCK_SIZE, b"xyz")
    assert data.hex() == "00" + "00000102" + "00040000" + b"xyz".hex()
    block = pieces.decode_holder_message(data)
    assert isinstance(block, pieces.Block)
    assert (block.index, block.offset, bytes(block.data)) == (258, BLOCK_SIZE, b"xyz")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x00" * 9,  # a block without bytes
        b"\x00" * (9 + BLOCK_SIZE + 1),
        b"\xc0",
        b"\x91\xa4nope",
        encode(["get"]),
        encode(["get", -1]),
        encode(["get", MAX_PIECES]),
        encode(["get", "1"]),
        encode(["bits", 1, MAX_PIECES + 1, b""]),
        encode(["have", [MAX_PIECES]]),
        encode(["have", [0] * (MAX_PIECES + 1)]),
        encode(["map", -1, MIB, b""]),
        encode(["map", 1, 1 << 40, b""]),
        encode(["reject", 1, "whatever", 0.0]),
        encode(["reject", 1, "missing", -1.0]),
        encode(["reject", 1, "missing", float("nan")]),
        encode(["bye", "busy", "x" * 501, 0.0]),
        encode(["map", 1, MIB, b"x" * MAX_MESSAGE]),
    ],
)
def test_bad_messages_raise_the_named_error(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        pieces.decode_holder_message(data)
    with pytest.raises(MalformedMessage):
        pieces.decode_fetcher_message(data)


def test_each_side_refuses_the_messages_of_the_other() -> None:
    with pytest.raises(MalformedMessage):
        pieces.decode_fetcher_message(encode(pieces.Have((1,))))
    with pytest.raises(MalformedMessage):
        pieces.decode_holder_message(encode(pieces.Request(1)))


@pytest.mark.parametrize(
    "want",
    [
        b"",
        encode([1, 1]),
        encode([1, 1, "sha256:" + "0A" * 32]),
        encode([1, 1, DIGEST + "\n"]),
        encode([1, 1, "../../etc/passwd"]),
        encode([2, 3, DIGEST]),  # a later version only
        encode([0, 0, DIGEST]),  # one that is not spoken any more
    ],
)
def test_a_bad_opening_is_refused(want: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        HolderSide.open(want)


def test_an_opening_of_a_newer_node_that_still_speaks_version_one_is_taken() -> None:
    assert HolderSide.open(encode([1, 9, DIGEST, "a later field"])).digest == DIGEST


@pytest.mark.parametrize(
    ("bits", "count"), [(0, 0), (0b101, 3), (1 << 8, 9), ((1 << 500) - 1, 500)]
)
def test_bitmaps_survive_the_wire(bits: int, count: int) -> None:
    assert pieces.decode_bits(pieces.encode_bits(bits, count), count) == bits


@pytest.mark.parametrize(
    ("data", "count"), [(b"", 1), (b"\x00\x00", 8), (b"\x02", 1), (b"\x00", 0)]
)
def test_a_bitmap_that_does_not_fit_is_refused(data: bytes, count: int) -> None:
    with pytest.raises(MalformedMessage):
        pieces.decode_bits(data, count)


def begun(bits: int = 0b111) -> tuple[FetcherSide, HolderSide]:
    fetcher, holder = FetcherSide(DIGEST), HolderSide(MAP)
    assert HolderSide.open(fetcher.opening()).digest == DIGEST
    assert fetcher.receive(holder.bitfield(bits)) == pieces.PiecesKnown(3, bits)
    return fetcher, holder


def test_a_whole_exchange() -> None:
    fetcher, holder = begun(0b011)
    holder.receive(fetcher.request_map())
    assert fetcher.receive(holder.next_answer()) == pieces.MapReceived(MAP)
    assert holder.next_answer() == b""

    holder.receive(fetcher.request(1, MIB))
    holder.receive(fetcher.request(0, MIB))
    assert fetcher.open_requests == 2
    assert fetcher.receive(holder.have(0b111)) == pieces.PiecesGained(0b100)
    assert holder.have(0b111) == b""
    assert holder.knows_all

    assert holder.next_piece() == 1
    content = bytes(range(256)) * 4096
    for offset in range(0, MIB, BLOCK_SIZE):
        assert holder.sending
        event = fetcher.receive(holder.block(offset, content[offset : offset + BLOCK_SIZE]))
        if offset + BLOCK_SIZE < MIB:
            assert event == pieces.BlockReceived(1, BLOCK_SIZE)
    assert event == pieces.PieceReceived(1, bytearray(content), BLOCK_SIZE)
    assert not holder.sending
    assert fetcher.open_requests == 1


def test_a_request_is_cancelled_while_it_waits() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(0, MIB))
    holder.receive(fetcher.request(2, 5))
    holder.receive(fetcher.cancel(2))
    assert fetcher.cancel(2) == b""
    assert fetcher.receive(holder.next_answer()) == pieces.RequestEnded(2, "cancelled", 0.0)
    assert holder.next_piece() == 0
    assert not fetcher.is_open(2)
    assert fetcher.is_open(0)


def test_a_request_is_cancelled_in_the_middle_of_its_piece() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(0, MIB))
    holder.next_piece()
    fetcher.receive(holder.block(0, b"x" * BLOCK_SIZE))
    cancel = fetcher.cancel(0)
    under_way = holder.block(BLOCK_SIZE, b"x" * BLOCK_SIZE)
    assert fetcher.receive(under_way) == pieces.BlockReceived(0, BLOCK_SIZE)
    holder.receive(cancel)
    assert not holder.sending
    assert fetcher.receive(holder.reject("cancelled")) == pieces.RequestEnded(0, "cancelled", 0.0)
    # And the same piece may be asked for again.
    holder.receive(fetcher.request(0, MIB))
    holder.next_piece()
    assert fetcher.receive(holder.block(0, b"x")) == pieces.BlockReceived(0, 1)


def test_a_cancel_that_crosses_the_last_block_ends_the_request_once() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(2, 5))
    holder.next_piece()
    last = holder.block(0, b"12345")
    holder.receive(fetcher.cancel(2))
    assert fetcher.receive(last) == pieces.RequestEnded(2, "cancelled", 0.0)
    assert holder.next_answer() == b""
    assert holder.next_piece() is None
    holder.receive(fetcher.request(2, 5))
    assert holder.next_piece() == 2


def test_a_piece_that_was_cancelled_can_be_asked_for_again() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(2, 5))
    holder.receive(fetcher.cancel(2))
    assert isinstance(fetcher.receive(holder.next_answer()), pieces.RequestEnded)
    holder.receive(fetcher.request(2, 5))
    assert holder.next_piece() == 2
    assert fetcher.receive(holder.block(0, b"12345")) == pieces.PieceReceived(
        2, bytearray(b"12345"), 5
    )


def test_a_rejection_in_mid_piece_leaves_the_next_piece_whole() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(0, MIB))
    holder.receive(fetcher.request(2, 5))
    holder.next_piece()
    fetcher.receive(holder.block(0, b"x" * BLOCK_SIZE))
    assert fetcher.receive(holder.reject("unreadable", 60.0)) == pieces.RequestEnded(
        0, "unreadable", 60.0
    )
    holder.next_piece()
    assert fetcher.receive(holder.block(0, b"12345")) == pieces.PieceReceived(
        2, bytearray(b"12345"), 5
    )


def test_a_holder_says_goodbye_first_or_later() -> None:
    bye = pieces.encode_bye("busy", "y" * 900, 3.0)
    expected = pieces.Dismissed("busy", "y" * 500, 3.0)
    assert FetcherSide(DIGEST).receive(bye) == expected
    assert begun()[0].receive(bye) == expected


@pytest.mark.parametrize(
    "message",
    [
        pieces.encode_block(1, 0, b"x"),  # not asked for
        pieces.encode_block(0, 1, b"x"),  # not at its start
        pieces.encode_block(2, 0, b"123456"),  # longer than the piece
        encode(pieces.Reject(1, "missing")),
        encode(pieces.Map(5, MIB, b"")),  # not asked for
        encode(pieces.Bitfield(1, 3, b"\x07")),  # the second
        encode(pieces.Have((3,))),  # there are only three pieces
        b"\xc1",
    ],
)
def test_a_fetcher_names_what_a_holder_does_wrong(message: bytes) -> None:
    fetcher, _ = begun()
    fetcher.request(0, MIB)
    fetcher.request(2, 5)
    with pytest.raises(ProtocolViolation):
        fetcher.receive(message)


@pytest.mark.parametrize(
    "message",
    [
        encode(pieces.Have((0,))),
        encode(pieces.Bitfield(2, 3, b"\x07")),  # a version that was not offered
        encode(pieces.Bitfield(1, 3, b"\xff")),
        pieces.encode_block(0, 0, b"x"),
    ],
)
def test_a_holder_must_begin_with_a_bitmap(message: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        FetcherSide(DIGEST).receive(message)


def test_blocks_of_two_pieces_may_not_be_mixed() -> None:
    fetcher, _ = begun()
    fetcher.request(0, MIB)
    fetcher.request(1, MIB)
    fetcher.receive(pieces.encode_block(0, 0, b"x"))
    for offset in (0, 1):
        with pytest.raises(ProtocolViolation):
            fetcher.receive(pieces.encode_block(1, offset, b"x"))


def test_a_holder_refuses_what_a_fetcher_may_not_ask() -> None:
    _, holder = begun()
    request = encode(pieces.Request(0))
    holder.receive(request)
    for bad in (request, encode(pieces.Request(3)), b"\x00\x00"):
        with pytest.raises(ProtocolViolation):
            holder.receive(bad)
    holder.receive(encode(pieces.MapRequest()))
    with pytest.raises(ProtocolViolation):  # answers that nobody takes must not pile up
        holder.receive(encode(pieces.MapRequest()))


def test_requests_and_their_rejections_are_bounded() -> None:
    size = 200 * MIB
    holder = HolderSide(PieceMap(size, MIB, bytes(32 * 200)))
    for index in range(MAX_REQUESTS):
        holder.receive(encode(pieces.Request(index)))
        holder.receive(encode(pieces.Cancel(index)))
    with pytest.raises(ProtocolViolation):
        holder.receive(encode(pieces.Request(MAX_REQUESTS)))
    assert holder.next_answer()
    holder.receive(encode(pieces.Request(MAX_REQUESTS)))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise_the_named_error(data: bytes) -> None:
    for read in (pieces.decode_holder_message, pieces.decode_fetcher_message):
        with contextlib.suppress(MalformedMessage):
            read(data)
    with contextlib.suppress(ProtocolViolation):
        HolderSide.open(data)


_tags = st.sampled_from(["map?", "get", "cancel", "bits", "have", "map", "reject", "bye", "no"])
_values = st.one_of(
    st.integers(-2, 5), st.binary(max_size=100), st.text(max_size=5), st.lists(st.integers(0, 4))
)


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.builds(lambda tag, rest: encode([tag, *rest]), _tags, st.lists(_values, max_size=4)),
            st.builds(
                pieces.encode_block, st.integers(0, 3), st.integers(0, 9), st.binary(min_size=1)
            ),
        ),
        max_size=20,
    )
)
def test_both_sides_survive_any_sequence_of_almost_good_messages(messages: list[bytes]) -> None:
    fetcher, holder = begun()
    fetcher.request_map()
    fetcher.request(2, 5)
    for message in messages:
        for receive in (fetcher.receive, holder.receive):
            with contextlib.suppress(ProtocolViolation):
                receive(message)
