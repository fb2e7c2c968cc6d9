"""The piece protocol, sans-I/O: how one node asks another for the pieces of one blob.

One exchange is about one blob between the node that lacks pieces (the fetcher, who opens it)
and a holder. The messages are BitTorrent's, cut down to what a cluster of members needs: no
choking and no tit-for-tat, and a cancelled request is always answered.

    fetcher                                      holder
      |  Want: versions, digest                ->  |   (the request that opens the exchange)
      |  <- Bitfield: which pieces it has          |   (or Bye: not here, busy)
      |  MapRequest                            ->  |   (only when the map is not known yet)
      |  <- Map                                    |
      |  Request 7, Request 3, ...             ->  |
      |  <- Block 7 at 0, Block 7 at 256 KiB, ...  |
      |  <- Have 12, 13                            |   (it is still fetching itself)
      |  Cancel 3                              ->  |   (another holder was quicker)
      |  <- Reject 3: cancelled                    |

The fetcher ends the exchange by closing its stream, the holder by a Bye with its reason.
Every Request ends in exactly one way: the piece's last Block, or one Reject. A holder answers
in the order of the requests, and never mixes the blocks of two pieces; Have and Map may come in
between. Control messages are msgpack arrays; a block is a fixed header and raw bytes, told apart
by its first byte, so that a holder may hand the file's bytes to the kernel as they are.

This module knows neither files nor hashes: whether a piece is right is the store's business.
"""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from ollamad.core.pieces import HASH_SIZE, MAX_PIECE_SIZE, PieceMap
from ollamad.wire.codec import MalformedMessage, decode, encode

METHOD = "pieces"  # the name under which holders serve the exchange
VERSION = 1  # raised when messages change meaning
OLDEST_VERSION = 1  # the oldest that this code still speaks

BLOCK_SIZE = 256 * 1024  # bytes; a cancel takes effect after one, and headers cost nothing
MAX_MESSAGE = 1 << 20  # bytes; what one message of an exchange may hold
MAX_PIECES = 30_000  # a map of them fits one message; 1.9 TB in pieces of 64 MiB
MAX_REQUESTS = 64  # open at once in one exchange; covers 10 Gbit/s at 50 ms with 1 MiB pieces
MAX_REASON = 500  # characters of a text for people
MAX_RETRY_AFTER_S = 3600.0  # longer means "not here"

BLOCK_TAG = 0x00  # a msgpack array never starts with it
BLOCK_HEADER = struct.Struct("!BII")  # tag, piece, offset in the piece

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z", max_length=71)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
RetryAfter = Annotated[float, msgspec.Meta(ge=0, le=MAX_RETRY_AFTER_S)]  # seconds


class ProtocolViolation(Exception):
    """The peer sent what the protocol does not allow here; the exchange is over."""


class Want(msgspec.Struct, frozen=True, array_like=True):
    """The request that opens an exchange: which blob, and the versions that the fetcher speaks."""

    oldest: int
    version: int
    digest: Digest


class MapRequest(msgspec.Struct, frozen=True, array_like=True, tag="map?"):
    """Send the piece map."""


class Request(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """Send that piece, after those asked for before."""

    index: Index


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """That piece is not wanted any more. Nothing happens if it was sent meanwhile."""

    index: Index


class Bitfield(msgspec.Struct, frozen=True, array_like=True, tag="bits"):
    """What the holder has: piece i is bit i % 8 (least significant first) of byte i // 8."""

    version: int  # the one that the holder chose
    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_PIECES)]
    bits: Annotated[bytes, msgspec.Meta(max_length=-(-MAX_PIECES // 8))]


class Have(msgspec.Struct, frozen=True, array_like=True, tag="have"):
    """Pieces that the holder got since."""

    indices: Annotated[tuple[Index, ...], msgspec.Meta(max_length=MAX_PIECES)]


class Map(msgspec.Struct, frozen=True, array_like=True, tag="map"):
    """The piece map. The fetcher checks it against the root in the replicated state."""

    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_PIECES * MAX_PIECE_SIZE)]
    piece_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECE_SIZE)]
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_PIECES * HASH_SIZE)]


RejectCode = Literal["cancelled", "missing", "unreadable"]


class Reject(msgspec.Struct, frozen=True, array_like=True, tag="reject"):
    """The holder does not send (the rest of) that piece; worth asking again after that time."""

    index: Index
    code: RejectCode
    retry_after_s: RetryAfter = 0.0


ByeCode = Literal["unknown_blob", "busy", "protocol"]


class Bye(msgspec.Struct, frozen=True, array_like=True, tag="bye"):
    """The holder ends the exchange; worth opening another after that time."""

    code: ByeCode
    reason: Reason = ""
    retry_after_s: RetryAfter = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a piece, at that offset (bytes) in it."""

    index: int
    offset: int
    data: memoryview


FetcherMessage = MapRequest | Request | Cancel
HolderMessage = Bitfield | Have | Map | Reject | Bye


def encode_block(index: int, offset: int, data: bytes | memoryview) -> bytes:
    """The message for one block of at most BLOCK_SIZE bytes."""
    return b"".join((BLOCK_HEADER.pack(BLOCK_TAG, index, offset), data))


def decode_fetcher_message(data: bytes) -> FetcherMessage:
    """Read what a fetcher sent.

    Raises:
      MalformedMessage: it is no such message.
    """
    _check_length(data)
    message: FetcherMessage = decode(data, FetcherMessage)  # type: ignore[arg-type]
    return message


def decode_holder_message(data: bytes) -> HolderMessage | Block:
    """Read what a holder sent. A block refers to `data` without a copy.

    Raises:
      MalformedMessage: it is no such message.
    """
    _check_length(data)
    if data[0] != BLOCK_TAG:
        message: HolderMessage = decode(data, HolderMessage)  # type: ignore[arg-type]
        return message
    if not BLOCK_HEADER.size < len(data) <= BLOCK_HEADER.size + BLOCK_SIZE:
        raise MalformedMessage(f"a block message of {len(data)} bytes")
    _, index, offset = BLOCK_HEADER.unpack_from(data)
    return Block(index, offset, memoryview(data)[BLOCK_HEADER.size :])


def _check_length(data: bytes) -> None:
    if not 0 < len(data) <= MAX_MESSAGE:
        raise MalformedMessage(f"a message of {len(data)} bytes")


def encode_bits(bits: int, count: int) -> bytes:
    """The bytes of a have-bitmap; bit i of `bits` is piece i."""
    return bits.to_bytes(-(-count // 8), "little")


def decode_bits(data: bytes, count: int) -> int:
    """Read a have-bitmap.

    Raises:
      MalformedMessage: its length is not that of `count` pieces, or it names more pieces.
    """
    bits = int.from_bytes(data, "little")
    if len(data) != -(-count // 8) or bits >> count:
        raise MalformedMessage(f"a bitmap of {len(data)} bytes does not fit {count} pieces")
    return bits


# The fetcher's side ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PiecesKnown:
    """The holder told at the start what it has (bit i is piece i of `count`)."""

    count: int
    bits: int


@dataclass(frozen=True, slots=True)
class PiecesGained:
    """The holder got more pieces."""

    bits: int


@dataclass(frozen=True, slots=True)
class MapReceived:
    """A piece map came, of which nothing was checked yet."""

    piece_map: PieceMap


@dataclass(frozen=True, slots=True)
class BlockReceived:
    """A part of a piece came; `size` is its length in bytes."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class PieceReceived:
    """The last part of a piece came (`size` bytes), and here is the whole, unchecked."""

    index: int
    data: bytearray
    size: int


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request ended without its piece: rejected, or cancelled by this side."""

    index: int
    code: RejectCode
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The holder ended the exchange; worth opening another after that time (seconds)."""

    code: ByeCode
    reason: str
    retry_after_s: float


FetcherEvent = (
    PiecesKnown
    | PiecesGained
    | MapReceived
    | BlockReceived
    | PieceReceived
    | RequestEnded
    | Dismissed
)


class FetcherSide:
    """What a fetcher may send and expect. Methods that send return the message's bytes.

    It holds at most one piece in memory, the one that is arriving.
    """

    def __init__(self, digest: str) -> None:
        self._digest = digest
        self._count: int | None = None  # pieces, from the bitfield
        self._lengths: dict[int, int] = {}  # open requests -> bytes of the piece, oldest first
        self._cancelled: set[int] = set()  # of those
        self._arriving: int | None = None
        self._offset = 0
        self._piece = bytearray()
        self._map_requested = False

    def opening(self) -> bytes:
        """The request that opens the exchange."""
        return encode(Want(OLDEST_VERSION, VERSION, self._digest))

    def request_map(self) -> bytes:
        self._map_requested = True
        return encode(MapRequest())

    def request(self, index: int, length: int) -> bytes:
        """Ask for a piece of that many bytes; not while it is asked for already."""
        if index in self._lengths or len(self._lengths) >= MAX_REQUESTS:
            raise ValueError(f"piece {index} cannot be asked for now")
        self._lengths[index] = length
        return encode(Request(index))

    def cancel(self, index: int) -> bytes:
        """Stop a request; empty if it ended or was cancelled before."""
        if index not in self._lengths or index in self._cancelled:
            return b""
        self._cancelled.add(index)
        if index == self._arriving:
            self._piece = bytearray()
        return encode(Cancel(index))

    @property
    def open_requests(self) -> int:
        """Requests that have not ended, cancelled ones included."""
        return len(self._lengths)

    def is_open(self, index: int) -> bool:
        return index in self._lengths

    def receive(self, data: bytes) -> FetcherEvent:
        """Take one message of the holder.

        Raises:
          ProtocolViolation: the holder broke the protocol.
        """
        try:
            message = decode_holder_message(data)
            if self._count is None and not isinstance(message, Bitfield | Bye):
                raise ProtocolViolation("the holder did not begin with its bitmap")
            return self._receive(message)
        except MalformedMessage as error:
            raise ProtocolViolation(str(error)) from None

    def _receive(self, message: HolderMessage | Block) -> FetcherEvent:
        match message:
            case Block():
                return self._receive_block(message)
            case Bitfield():
                if self._count is not None:
                    raise ProtocolViolation("a second bitmap")
                if not OLDEST_VERSION <= message.version <= VERSION:
                    raise ProtocolViolation(f"the holder chose version {message.version}")
                self._count = message.count
                return PiecesKnown(message.count, decode_bits(message.bits, message.count))
            case Have():
                bits = 0
                for index in message.indices:
                    self._check_index(index)
                    bits |= 1 << index
                return PiecesGained(bits)
            case Map():
                if not self._map_requested:
                    raise ProtocolViolation("a map that nobody asked for")
                self._map_requested = False
                return MapReceived(PieceMap(message.size, message.piece_size, message.hashes))
            case Reject():
                if message.index not in self._lengths:
                    raise ProtocolViolation(f"piece {message.index} was rejected unasked")
                self._end_request(message.index)
                return RequestEnded(message.index, message.code, message.retry_after_s)
            case Bye():
                return Dismissed(message.code, message.reason, message.retry_after_s)

    def _receive_block(self, block: Block) -> FetcherEvent:
        length = self._lengths.get(block.index)
        if self._arriving is None and length is not None:
            self._arriving = block.index
            self._piece = bytearray() if block.index in self._cancelled else bytearray(length)
        end = block.offset + len(block.data)
        if (
            length is None
            or block.index != self._arriving
            or block.offset != self._offset
            or end > length
        ):
            raise ProtocolViolation(f"an unexpected block: piece {block.index} at {block.offset}")
        self._offset = end
        cancelled = block.index in self._cancelled
        if not cancelled:
            self._piece[block.offset : end] = block.data
        if end < length:
            return BlockReceived(block.index, len(block.data))
        piece = self._piece
        self._end_request(block.index)
        if cancelled:
            return RequestEnded(block.index, "cancelled", 0.0)
        return PieceReceived(block.index, piece, len(block.data))

    def _end_request(self, index: int) -> None:
        del self._lengths[index]
        self._cancelled.discard(index)
        if index == self._arriving:
            self._arriving = None
            self._offset = 0
            self._piece = bytearray()

    def _check_index(self, index: int) -> None:
        if self._count is None or index >= self._count:
            raise ProtocolViolation(f"there is no piece {index}")


# The holder's side -------------------------------------------------------------------------


class HolderSide:
    """What a holder may send and expect. Methods that send return the message's bytes.

    Take in what comes with `receive`; send `next_answer` until it is empty; then one piece at a
    time: `next_piece`, then `block` until the piece's end, or `reject`. Before each block
    `sending` says whether the piece is still wanted.
    """

    def __init__(self, piece_map: PieceMap) -> None:
        self._map = piece_map
        self._map_wanted = False
        self._queue: deque[int] = deque()
        self._cancelled: deque[int] = deque()  # taken from the queue, not yet rejected
        self._sending: int | None = None
        self._sending_wanted = False
        self._told = 0  # bits of the pieces that the fetcher was told of

    @staticmethod
    def open(request: bytes) -> Want:
        """Read the request that opens an exchange.

        Raises:
          ProtocolViolation: it is no such request, or of a version that is not spoken here.
        """
        try:
            want = decode(request, Want)
        except MalformedMessage as error:
            raise ProtocolViolation(str(error)) from None
        if want.version < OLDEST_VERSION or want.oldest > VERSION:
            raise ProtocolViolation(
                f"the fetcher speaks versions {want.oldest} to {want.version} of the piece "
                f"protocol, this node {OLDEST_VERSION} to {VERSION}"
            )
        return want

    @property
    def sending(self) -> bool:
        """Whether a piece is on its way and still wanted."""
        return self._sending is not None and self._sending_wanted

    @property
    def knows_all(self) -> bool:
        """Whether the fetcher was told that every piece is here."""
        return self._told == (1 << len(self._map)) - 1

    def bitfield(self, bits: int) -> bytes:
        """What this holder has: the first message."""
        self._told = bits
        count = len(self._map)
        return encode(Bitfield(VERSION, count, encode_bits(bits, count)))

    def have(self, bits: int) -> bytes:
        """Tell of the pieces in `bits` that the fetcher was not told of; empty if none is new."""
        new = bits & ~self._told
        if not new:
            return b""
        self._told |= bits
        return encode(Have(tuple(indices_of(new))))

    def next_answer(self) -> bytes:
        """The map or a rejection that is due, which need not wait for pieces; empty if none is."""
        if self._map_wanted:
            self._map_wanted = False
            return encode(Map(self._map.size, self._map.piece_size, self._map.hashes))
        if self._cancelled:
            return encode(Reject(self._cancelled.popleft(), "cancelled"))
        return b""

    def next_piece(self) -> int | None:
        """Begin with the oldest request; None if none waits."""
        if self._sending is not None:
            raise ValueError(f"piece {self._sending} is still on its way")
        if not self._queue:
            return None
        self._sending = self._queue.popleft()
        self._sending_wanted = True
        return self._sending

    def block(self, offset: int, data: bytes | memoryview) -> bytes:
        """The next block of the piece on its way; the one that reaches its end ends it."""
        index = self._sending
        if index is None:
            raise ValueError("no piece is on its way")
        if offset + len(data) == self._map.length_of(index):
            self._sending = None
        return encode_block(index, offset, data)

    def reject(self, code: RejectCode, retry_after_s: float = 0.0) -> bytes:
        """End the piece on its way without (the rest of) it."""
        index = self._sending
        if index is None:
            raise ValueError("no piece is on its way")
        self._sending = None
        return encode(Reject(index, code, retry_after_s))

    def receive(self, data: bytes) -> None:
        """Take one message of the fetcher.

        Raises:
          ProtocolViolation: the fetcher broke the protocol.
        """
        try:
            message = decode_fetcher_message(data)
        except MalformedMessage as error:
            raise ProtocolViolation(str(error)) from None
        match message:
            case MapRequest():
                if self._map_wanted:
                    raise ProtocolViolation("the map was asked for twice")
                self._map_wanted = True
            case Request(index):
                self._queue_request(index)
            case Cancel(index):
                if index == self._sending:
                    self._sending_wanted = False  # whoever sends the blocks sees it
                elif index in self._queue:
                    self._queue.remove(index)
                    self._cancelled.append(index)

    def _queue_request(self, index: int) -> None:
        if index >= len(self._map):
            raise ProtocolViolation(f"there is no piece {index}")
        if index == self._sending or index in self._queue or index in self._cancelled:
            raise ProtocolViolation(f"piece {index} was asked for twice")
        if len(self._queue) + len(self._cancelled) >= MAX_REQUESTS:
            raise ProtocolViolation(f"more than {MAX_REQUESTS} requests at once")
        self._queue.append(index)


def indices_of(bits: int) -> Sequence[int]:
    """The numbers of the set bits, ascending."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found


def encode_bye(code: ByeCode, reason: str = "", retry_after_s: float = 0.0) -> bytes:
    """The holder's message that ends an exchange."""
    return encode(Bye(code, reason[:MAX_REASON], retry_after_s))
