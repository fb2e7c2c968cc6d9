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
    MAX_HASHES,
    MAX_MESSAGE,
    MAX_PIECES,
    MAX_REQUESTS,
    FetcherSide,
    HolderSide,
    ProtocolViolation,
)

DIGEST = "sha256:" + "0a" * 32
TICKET = bytes(range(32))
MAP = PieceMap(2 * MIB + 5, MIB, bytes(range(1, 97)))  # three pieces, the last of 5 bytes


@pytest.mark.parametrize(
    ("message", "hex_bytes"),
    [
        (pieces.Want(2, 2, DIGEST, True, True), "950202d947" + DIGEST.encode().hex() + "c3c3"),
        (pieces.MapRequest(), "91a46d61703f"),
        (pieces.Request(300), "92a3676574cd012c"),
        (pieces.Cancel(7), "92a663616e63656c07"),
        (pieces.Got((1, 2)), "92a3676f74920102"),
        (
            pieces.Bitfield(2, 10, b"\xff\x01", TICKET, False, True),
            "97a462697473020ac402ff01c420" + TICKET.hex() + "c2c3",
        ),
        (pieces.Have((3, 4)), "92a468617665920304"),
        (pieces.Map(5, MIB, b"\xab" * 32), "94a36d617005ce00100000c420" + "ab" * 32),
        (pieces.Hashes((3,), b"\xab" * 32), "93a66861736865739103c420" + "ab" * 32),
        (
            pieces.Bye("busy", "later", 2.0),
            "94a3627965a462757379a56c61746572cb4000000000000000",
        ),
    ],
)
def test_the_bytes_of_messages_never_change(message: Any, hex_bytes: str) -> None:
    assert encode(message).hex() == hex_bytes


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\xc0",
        b"\x91\xa4nope",
        encode(["get"]),
        encode(["get", -1]),
        encode(["get", MAX_PIECES]),
        encode(["get", "1"]),
        encode(["got", [MAX_PIECES]]),
        encode(["bits", 2, MAX_PIECES + 1, b"", TICKET]),
        encode(["bits", 2, 1, b"\1", TICKET[1:]]),
        encode(["bits", 2, 1, b"\1"]),
        encode(["have", [MAX_PIECES]]),
        encode(["have", [0] * (MAX_PIECES + 1)]),
        encode(["map", -1, MIB, b""]),
        encode(["map", 1, 1 << 40, b""]),
        encode(["hashes", [0] * (MAX_HASHES + 1), b""]),
        encode(["bye", "busy", "x" * 501, 0.0]),
        encode(["bye", "busy", "", -1.0]),
        encode(["bye", "busy", "", float("nan")]),
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
        encode([2, 2]),
        encode([2, 2, "sha256:" + "0A" * 32]),
        encode([2, 2, DIGEST + "\n"]),
        encode([2, 2, "../../etc/passwd"]),
        encode([3, 4, DIGEST]),  # a later version only
        encode([1, 1, DIGEST]),  # one that is not spoken any more
    ],
)
def test_a_bad_opening_is_refused(want: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        HolderSide.open(want)


def test_an_opening_of_a_newer_node_that_still_speaks_version_two_is_taken() -> None:
    want = HolderSide.open(encode([2, 9, DIGEST, False, False, "a later field"]))
    assert want.digest == DIGEST


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


def begun(bits: int = 0b111, *, growing: bool = False) -> tuple[FetcherSide, HolderSide]:
    fetcher, holder = FetcherSide(DIGEST, growing=growing), HolderSide(3)
    assert HolderSide.open(fetcher.opening()).digest == DIGEST
    known = pieces.PiecesKnown(3, bits, TICKET, plain=False, spreads=True)
    assert fetcher.receive(holder.bitfield(bits, TICKET, plain=False, spreads=True)) == known
    return fetcher, holder


def test_a_whole_exchange() -> None:
    fetcher, holder = begun(0b011)
    assert holder.map(MAP) == b""
    assert not fetcher.knows_map
    assert holder.receive(fetcher.request_map()) == pieces.MapWanted()
    assert fetcher.receive(holder.map(MAP)) == pieces.MapReceived(MAP)
    assert holder.map(MAP) == b""
    assert fetcher.knows_map

    assert holder.receive(fetcher.request(1)) == pieces.PieceRequested(1)
    assert holder.receive(fetcher.request(0)) == pieces.PieceRequested(0)
    assert fetcher.open_requests == 2
    assert fetcher.receive(holder.have(0b111)) == pieces.PiecesGained(0b100)
    assert holder.have(0b111) == b""
    assert holder.knows_all
    assert fetcher.got(0) == b""
    assert holder.receive(fetcher.got(0b101)) == pieces.FetcherGot(0b101)

    assert holder.next_request() == 1
    with pytest.raises(ValueError, match="on its way"):
        holder.next_request()
    assert holder.is_wanted
    holder.ended()
    fetcher.ended(1)
    assert fetcher.open_requests == 1
    assert holder.next_request() == 0
    holder.ended()
    assert holder.next_request() is None


def test_a_request_is_cancelled_while_it_waits_and_still_has_its_turn_to_end() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(0))
    holder.receive(fetcher.request(2))
    assert holder.receive(fetcher.cancel(2)) == pieces.PieceCancelled(2)
    assert fetcher.cancel(2) == b""
    assert holder.next_request() == 0
    assert holder.is_wanted
    holder.ended()
    assert holder.next_request() == 2
    assert not holder.is_wanted
    holder.ended()
    with pytest.raises(ValueError, match="cannot be asked"):
        fetcher.request(2)  # its end has not come yet
    fetcher.ended(2)
    holder.receive(fetcher.request(2))
    assert holder.next_request() == 2
    assert holder.is_wanted


def test_a_request_is_cancelled_while_it_is_served() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(0))
    assert holder.next_request() == 0
    assert holder.is_wanted
    holder.receive(fetcher.cancel(0))
    assert not holder.is_wanted
    holder.ended()
    assert holder.is_wanted


def test_a_cancel_that_comes_too_late_changes_nothing() -> None:
    fetcher, holder = begun()
    holder.receive(fetcher.request(2))
    holder.next_request()
    holder.ended()
    holder.receive(fetcher.cancel(2))
    fetcher.ended(2)
    holder.receive(fetcher.request(2))
    assert holder.next_request() == 2
    assert holder.is_wanted


def test_a_map_that_grows_is_told_bit_by_bit() -> None:
    one = PieceMap(MAP.size, MIB, MAP.hash_of(0) + bytes(64))
    two = PieceMap(MAP.size, MIB, bytes(32) + MAP.hash_of(1) + bytes(32))
    fetcher, holder = begun(0b001, growing=True)
    assert holder.hashes(MAP) == b""  # it did not ask
    holder.receive(fetcher.request_map())
    assert fetcher.receive(holder.map(one)) == pieces.MapReceived(one)
    assert holder.hashes(one) == b""
    assert fetcher.receive(holder.hashes(two)) == pieces.HashesReceived({1: MAP.hash_of(1)})
    assert fetcher.receive(holder.hashes(MAP)) == pieces.HashesReceived({2: MAP.hash_of(2)})
    assert holder.hashes(MAP) == b""


def test_hashes_are_told_in_messages_that_fit() -> None:
    count = MAX_HASHES + 3
    holder, fetcher = HolderSide(count), FetcherSide(DIGEST, growing=True)
    fetcher.receive(holder.bitfield(0, TICKET, plain=False, spreads=True))
    holder.receive(fetcher.request_map())
    fetcher.receive(holder.map(PieceMap(count * MIB, MIB, bytes(32 * count))))
    full = PieceMap(count * MIB, MIB, b"h" * 32 * count)
    told = []
    while message := holder.hashes(full):
        assert len(message) <= MAX_MESSAGE
        event = fetcher.receive(message)
        assert isinstance(event, pieces.HashesReceived)
        told += event.hashes
    assert told == list(range(count))


def test_a_holder_says_goodbye_first_or_later() -> None:
    bye = pieces.encode_bye("busy", "y" * 900, 3.0)
    expected = pieces.Dismissed("busy", "y" * 500, 3.0)
    assert FetcherSide(DIGEST).receive(bye) == expected
    assert begun()[0].receive(bye) == expected


@pytest.mark.parametrize(
    "message",
    [
        encode(pieces.Map(5, MIB, b"")),  # not asked for
        encode(pieces.Bitfield(2, 3, b"\x07", TICKET)),  # the second
        encode(pieces.Have((3,))),  # there are only three pieces
        encode(pieces.Hashes((1,), bytes(32))),  # the blob does not grow
        b"\xc1",
    ],
)
def test_a_fetcher_names_what_a_holder_does_wrong(message: bytes) -> None:
    fetcher, _ = begun()
    fetcher.request(0)
    with pytest.raises(ProtocolViolation):
        fetcher.receive(message)


@pytest.mark.parametrize(
    "message",
    [
        encode(pieces.Hashes((3,), bytes(32))),
        encode(pieces.Hashes((1,), bytes(31))),
        encode(pieces.Hashes((1, 2), bytes(32))),
    ],
)
def test_hashes_that_make_no_sense_are_refused(message: bytes) -> None:
    fetcher, holder = begun(growing=True)
    holder.receive(fetcher.request_map())
    fetcher.receive(holder.map(PieceMap(MAP.size, MIB, bytes(96))))
    with pytest.raises(ProtocolViolation):
        fetcher.receive(message)


def test_hashes_come_after_the_map_that_they_add_to() -> None:
    fetcher, _ = begun(growing=True)
    fetcher.request_map()
    with pytest.raises(ProtocolViolation, match="before the map"):
        fetcher.receive(encode(pieces.Hashes((1,), bytes(32))))


@pytest.mark.parametrize(
    "message",
    [
        encode(pieces.Have((0,))),
        encode(pieces.Bitfield(3, 3, b"\x07", TICKET)),  # a version that was not offered
        encode(pieces.Bitfield(2, 3, b"\xff", TICKET)),
        encode(pieces.Bitfield(2, 3, b"\x07", TICKET, plain=True)),  # nobody wanted that
    ],
)
def test_a_holder_must_begin_with_a_bitmap_that_fits(message: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        FetcherSide(DIGEST).receive(message)


def test_without_encryption_only_if_both_want_that() -> None:
    fetcher = FetcherSide(DIGEST, plain=True)
    assert HolderSide.open(fetcher.opening()).plain
    event = fetcher.receive(HolderSide(3).bitfield(0, TICKET, plain=True, spreads=False))
    assert event == pieces.PiecesKnown(3, 0, TICKET, plain=True, spreads=False)


def test_a_holder_refuses_what_a_fetcher_may_not_ask() -> None:
    _, holder = begun()
    request = encode(pieces.Request(0))
    holder.receive(request)
    for bad in (
        request,
        encode(pieces.Request(3)),
        encode(pieces.Got((3,))),
        b"\x00\x00",
    ):
        with pytest.raises(ProtocolViolation):
            holder.receive(bad)
    holder.receive(encode(pieces.MapRequest()))
    with pytest.raises(ProtocolViolation):  # answers that nobody takes must not pile up
        holder.receive(encode(pieces.MapRequest()))


def test_requests_are_bounded_cancelled_ones_included() -> None:
    holder = HolderSide(200)
    for index in range(MAX_REQUESTS):
        holder.receive(encode(pieces.Request(index)))
        holder.receive(encode(pieces.Cancel(index)))
    with pytest.raises(ProtocolViolation):
        holder.receive(encode(pieces.Request(MAX_REQUESTS)))
    holder.next_request()
    holder.ended()
    holder.receive(encode(pieces.Request(MAX_REQUESTS)))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_do_more_than_raise_the_named_error(data: bytes) -> None:
    for read in (pieces.decode_holder_message, pieces.decode_fetcher_message):
        with contextlib.suppress(MalformedMessage):
            read(data)
    with contextlib.suppress(ProtocolViolation):
        HolderSide.open(data)


_tags = st.sampled_from(
    ["map?", "get", "cancel", "got", "bits", "have", "map", "hashes", "bye", "no"]
)
_values = st.one_of(
    st.integers(-2, 5), st.binary(max_size=100), st.text(max_size=5), st.lists(st.integers(0, 4))
)


@settings(deadline=None)
@given(
    st.lists(
        st.builds(lambda tag, rest: encode([tag, *rest]), _tags, st.lists(_values, max_size=4)),
        max_size=20,
    )
)
def test_both_sides_survive_any_sequence_of_almost_good_messages(messages: list[bytes]) -> None:
    fetcher, holder = begun(growing=True)
    fetcher.request_map()
    fetcher.request(2)
    for message in messages:
        for receive in (fetcher.receive, holder.receive):
            with contextlib.suppress(ProtocolViolation):
                receive(message)
