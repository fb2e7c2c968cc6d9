"""Lanes, sans-I/O: the connections that carry the bytes of pieces from a holder to a fetcher.

The fetcher connects to the holder's P2P port. What it sends first tells a lane from a TLS
handshake, and which exchange it belongs to:

     0                 4        5                                 37
    +-----------------+--------+---------------------------------+
    | "ODLN"          | mode   | ticket of the exchange          |
    +-----------------+--------+---------------------------------+

Mode 1 goes on with a TLS handshake, in which both sides show their certificates; mode 0 (both
nodes have `transfer.encryption: off`) goes on without. A ticket comes over the exchange, which is
always mutual TLS, and opens one lane, once. After that only the holder sends, frames of

     0        1                5                9               13
    +--------+----------------+----------------+----------------+---------------------
    | tag    | piece          | offset         | length         | bytes of a block
    +--------+----------------+----------------+----------------+---------------------

Tag 0 is a block: 1 to 262,144 bytes of the piece from the offset on. Tag 1 ends a request without
(the rest of) its piece; the offset's place holds a code, the length's place the time in
milliseconds after which it is worth asking again, and no bytes follow. Numbers are big-endian.
The bytes of a block stand as they are in the file, so that the kernel can send them.
"""

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

MAGIC = b"ODLN"  # no TLS record begins with it
TICKET_SIZE = 32  # bytes
PREAMBLE = struct.Struct("!4sB32s")
FRAME = struct.Struct("!BIII")
BLOCK_SIZE = 256 * 1024  # bytes; a cancel takes effect after one, and headers cost nothing
BLOCK_TAG, ENDED_TAG = 0, 1
MAX_RETRY_MS = 3_600_000


class ProtocolViolation(Exception):
    """The peer sent what the protocol does not allow here; the exchange is over."""


class Mode(enum.IntEnum):
    """How a lane goes on after its preamble."""

    PLAIN = 0
    TLS = 1


class EndCode(enum.IntEnum):
    """Why a request ended without its piece."""

    CANCELLED = 0
    MISSING = 1
    UNREADABLE = 2


@dataclass(frozen=True, slots=True)
class Block:
    """`size` bytes of a piece follow; `is_last` if they are its last."""

    index: int
    offset: int
    size: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request ended without its piece."""

    index: int
    code: EndCode
    retry_after_s: float


def encode_preamble(mode: Mode, ticket: bytes) -> bytes:
    return PREAMBLE.pack(MAGIC, mode, ticket)


def decode_preamble(data: bytes) -> tuple[Mode, bytes]:
    """The mode and the ticket of a lane that somebody opens.

    Raises:
      ProtocolViolation: it is no preamble.
    """
    if len(data) != PREAMBLE.size:
        raise ProtocolViolation(f"a preamble of {len(data)} bytes")
    magic, mode, ticket = PREAMBLE.unpack(data)
    if magic != MAGIC or mode not in (Mode.PLAIN, Mode.TLS):
        raise ProtocolViolation("no lane begins like that")
    return Mode(mode), ticket


def encode_block_head(index: int, offset: int, size: int) -> bytes:
    """What is sent before so many bytes of a piece."""
    return FRAME.pack(BLOCK_TAG, index, offset, size)


def encode_ended(index: int, code: EndCode, retry_after_s: float = 0.0) -> bytes:
    milliseconds = min(MAX_RETRY_MS, int(1000 * retry_after_s))
    return FRAME.pack(ENDED_TAG, index, code, milliseconds)


class Piece(Protocol):
    """A piece that is asked for."""

    @property
    def length(self) -> int: ...


class LaneReader:
    """Reads the heads of the frames that come over a lane.

    `asked` are the pieces that are asked for, with whatever knows their length in bytes; it is
    the caller's own and may change (in another thread, too): an entry is there from before its
    request is sent until `read` has returned the request's end.
    """

    def __init__(self, asked: Mapping[int, Piece]) -> None:
        self._asked = asked
        self._arriving: int | None = None
        self._offset = 0

    def read(self, head: bytes | bytearray) -> Block | RequestEnded:
        """Read one head (FRAME.size bytes).

        Raises:
          ProtocolViolation: the holder broke the protocol.
        """
        tag, index, offset, size = FRAME.unpack(head)
        piece = self._asked.get(index)
        if piece is None:
            raise ProtocolViolation(f"piece {index} came unasked")
        if self._arriving not in (None, index):
            raise ProtocolViolation(f"piece {index} came amid piece {self._arriving}")
        if tag == ENDED_TAG:
            if offset not in set(EndCode) or size > MAX_RETRY_MS:
                raise ProtocolViolation(f"piece {index} ended in an unknown way: {offset}, {size}")
            self._arriving, self._offset = None, 0
            return RequestEnded(index, EndCode(offset), size / 1000)
        end = offset + size
        if (
            tag != BLOCK_TAG
            or not 0 < size <= BLOCK_SIZE
            or offset != self._offset
            or end > piece.length
        ):
            raise ProtocolViolation(f"an unexpected block: {size} of piece {index} at {offset}")
        is_last = end == piece.length
        self._arriving, self._offset = (None, 0) if is_last else (index, end)
        return Block(index, offset, size, is_last)
