"""Lanes: exact bytes, the order of frames, and hostile input."""

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.wire.lane import (
    BLOCK_SIZE,
    FRAME,
    MAX_RETRY_MS,
    Block,
    EndCode,
    LaneReader,
    Mode,
    ProtocolViolation,
    RequestEnded,
    decode_preamble,
    encode_block_head,
    encode_ended,
    encode_preamble,
)

TICKET = bytes(range(32))


@dataclass
class Asked:
    length: int


def reader(*lengths: int) -> LaneReader:
    return LaneReader({index: Asked(length) for index, length in enumerate(lengths)})


def test_the_bytes_never_change() -> None:
    assert encode_preamble(Mode.TLS, TICKET).hex() == "4f444c4e" + "01" + TICKET.hex()
    head = encode_block_head(258, BLOCK_SIZE, 3)
    assert head.hex() == "00" + "00000102" + "00040000" + "00000003"
    assert encode_ended(258, EndCode.MISSING, 1.5).hex() == "01000001020000000100000" + "5dc"


@pytest.mark.parametrize("mode", Mode)
def test_a_preamble_survives_the_wire(mode: Mode) -> None:
    assert decode_preamble(encode_preamble(mode, TICKET)) == (mode, TICKET)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode_preamble(Mode.TLS, TICKET)[:-1],
        encode_preamble(Mode.TLS, TICKET) + b"x",
        b"ODLN" + b"\x02" + TICKET,
        b"ODLM" + b"\x01" + TICKET,
    ],
)
def test_what_is_no_preamble_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_preamble(data)


def test_pieces_come_block_by_block_one_after_the_other() -> None:
    lane = reader(BLOCK_SIZE + 5, 7)
    assert lane.read(encode_block_head(0, 0, BLOCK_SIZE)) == Block(0, 0, BLOCK_SIZE, False)
    assert lane.read(encode_block_head(0, BLOCK_SIZE, 5)) == Block(0, BLOCK_SIZE, 5, True)
    assert lane.read(encode_block_head(1, 0, 7)) == Block(1, 0, 7, True)


def test_a_request_that_ends_early_leaves_the_next_piece_whole() -> None:
    lane = reader(BLOCK_SIZE + 5, 7)
    lane.read(encode_block_head(0, 0, BLOCK_SIZE))
    ended = RequestEnded(0, EndCode.CANCELLED, 0.0)
    assert lane.read(encode_ended(0, EndCode.CANCELLED)) == ended
    assert lane.read(encode_block_head(1, 0, 7)).index == 1
    assert lane.read(encode_ended(0, EndCode.UNREADABLE, 1e9)) == RequestEnded(
        0, EndCode.UNREADABLE, MAX_RETRY_MS / 1000
    )


@pytest.mark.parametrize(
    "head",
    [
        encode_block_head(2, 0, 1),  # not asked for
        encode_ended(2, EndCode.MISSING),
        encode_block_head(1, 0, 1),  # amid another piece
        encode_ended(1, EndCode.MISSING),
        encode_block_head(0, 0, 1),  # the same again
        encode_block_head(0, 101, 1),  # a gap
        encode_block_head(0, 100, 101),  # longer than the piece
        encode_block_head(0, 100, 0),
        FRAME.pack(2, 0, 100, 1),  # an unknown tag
        FRAME.pack(1, 0, 3, 1),  # an unknown way to end
        FRAME.pack(1, 0, 0, MAX_RETRY_MS + 1),
    ],
)
def test_what_a_holder_may_not_send_is_named(head: bytes) -> None:
    lane = reader(200, 200)
    lane.read(encode_block_head(0, 0, 100))
    with pytest.raises(ProtocolViolation):
        lane.read(head)


def test_a_block_is_not_longer_than_a_block() -> None:
    with pytest.raises(ProtocolViolation):
        reader(1 << 30).read(encode_block_head(0, 0, BLOCK_SIZE + 1))


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            FRAME.pack,
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from([0, 1, 2, 5, BLOCK_SIZE]),
            st.sampled_from([0, 1, 2, 5, BLOCK_SIZE, 1 << 31]),
        ),
        max_size=30,
    )
)
def test_any_frames_fill_pieces_in_order_or_are_refused(heads: list[bytes]) -> None:
    """Whatever comes, the caller writes each piece from its start on, and never beyond its end."""
    lengths = [BLOCK_SIZE + 6, 5, 6]
    lane, filled = reader(*lengths), [0, 0, 0]
    with contextlib.suppress(ProtocolViolation):
        for head in heads:
            frame = lane.read(head)
            if isinstance(frame, RequestEnded):
                filled[frame.index] = 0
                continue
            assert 0 < frame.size <= BLOCK_SIZE
            assert frame.offset == filled[frame.index]
            filled[frame.index] += frame.size
            assert filled[frame.index] <= lengths[frame.index]
            assert frame.is_last == (filled[frame.index] == lengths[frame.index])
            if frame.is_last:
                filled[frame.index] = 0
