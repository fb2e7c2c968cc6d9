"""The piece protocol, sans-I/O: how one node asks another for the pieces of one blob.

One exchange is about one blob between the node that lacks pieces (the fetcher, who opens it)
and a holder. The messages are BitTorrent's, cut down to what a cluster of members needs: no
choking and no tit-for-tat, and every request is answered. What is said goes over the exchange;
the bytes of pieces come over a connection of their own, the lane (`wire/lane.py`), so that they
pass by the event loop of both nodes.

    fetcher                                      holder
      |  Want: versions, digest                ->  |   (the request that opens the exchange)
      |  <- Bitfield: what it has, a ticket        |   (or Bye: not here, busy)
      |  MapRequest                            ->  |   (only when the map is not known yet)
      |  <- Map                                    |
      |  (connects the lane with the ticket)   ->  |
      |  Request 7, Request 3, ...             ->  |
      |  <= Block 7 at 0, Block 7 at 256 KiB, ...  |   (on the lane)
      |  <- Have 12, 13                            |   (it is still fetching itself)
      |  Cancel 3                              ->  |   (another holder was quicker)
      |  <= Ended 3: cancelled                     |   (on the lane)
      |  Got 7                                 ->  |   (only to a holder that spreads)

The fetcher ends the exchange by closing its stream, the holder by a Bye with its reason. Every
Request ends on the lane in exactly one way: by the piece's last block, or by one Ended. A holder
answers in the order of the requests, and never mixes the blocks of two pieces.

This module knows neither files nor hashes: whether a piece is right is the store's business.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from ollamad.core.pieces import HASH_SIZE, MAX_PIECE_SIZE, PieceMap
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.lane import TICKET_SIZE, ProtocolViolation

METHOD = "pieces"  # the name under which holders serve the exchange
VERSION = 2  # raised when messages change meaning
# The oldest that this code still speaks. Version 1, in which blocks came over the exchange, was
# never released.
OLDEST_VERSION = 2

MAX_MESSAGE = 1 << 20  # bytes; what one message of an exchange may hold
MAX_PIECES = 30_000  # a map of them fits one message; 1.9 TB in pieces of 64 MiB
MAX_REQUESTS = 64  # open at once in one exchange; covers 10 Gbit/s at 50 ms with 1 MiB pieces
MAX_HASHES = 4096  # told at once
MAX_REASON = 500  # characters of a text for people
MAX_RETRY_AFTER_S = 3600.0  # longer means "not here"

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z", max_length=71)]
Ticket = Annotated[bytes, msgspec.Meta(min_length=TICKET_SIZE, max_length=TICKET_SIZE)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
RetryAfter = Annotated[float, msgspec.Meta(ge=0, le=MAX_RETRY_AFTER_S)]  # seconds


class Want(msgspec.Struct, frozen=True, array_like=True):
    """The request that opens an exchange: which blob, and the versions that the fetcher speaks."""

    oldest: int
    version: int
    digest: Digest
    plain: bool = False  # the fetcher's settings allow a lane without encryption
    growing: bool = False  # also if its piece map is only made while it comes


class MapRequest(msgspec.Struct, frozen=True, array_like=True, tag="map?"):
    """Send the piece map."""


class Request(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """Send that piece, after those asked for before."""

    index: Index


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """That piece is not wanted any more. Nothing happens if it was sent meanwhile."""

    index: Index


class Got(msgspec.Struct, frozen=True, array_like=True, tag="got"):
    """Pieces that the fetcher has, from whomever; told to holders that spread."""

    indices: Annotated[tuple[Index, ...], msgspec.Meta(max_length=MAX_PIECES)]


class Bitfield(msgspec.Struct, frozen=True, array_like=True, tag="bits"):
    """What the holder has: piece i is bit i % 8 (least significant first) of byte i // 8."""

    version: int  # the one that the holder chose
    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_PIECES)]
    bits: Annotated[bytes, msgspec.Meta(max_length=-(-MAX_PIECES // 8))]
    ticket: Ticket  # opens the lane, once
    plain: bool = False  # the lane is without encryption
    spreads: bool = False  # it shows its pieces bit by bit, and wants to hear Got


class Have(msgspec.Struct, frozen=True, array_like=True, tag="have"):
    """Pieces that the holder got since."""

    indices: Annotated[tuple[Index, ...], msgspec.Meta(max_length=MAX_PIECES)]


class Map(msgspec.Struct, frozen=True, array_like=True, tag="map"):
    """The piece map. The fetcher checks it against the root in the replicated state.

    Of a blob that grows, hashes that are not known yet are zeros.
    """

    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_PIECES * MAX_PIECE_SIZE)]
    piece_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECE_SIZE)]
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_PIECES * HASH_SIZE)]


class Hashes(msgspec.Struct, frozen=True, array_like=True, tag="hashes"):
    """Of a blob that grows: hashes that are known since. Before the Have of these pieces."""

    indices: Annotated[tuple[Index, ...], msgspec.Meta(max_length=MAX_HASHES)]
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_HASHES * HASH_SIZE)]


ByeCode = Literal["unknown_blob", "busy", "protocol"]


class Bye(msgspec.Struct, frozen=True, array_like=True, tag="bye"):
    """The holder ends the exchange; worth opening another after that time."""

    code: ByeCode
    reason: Reason = ""
    retry_after_s: RetryAfter = 0.0


FetcherMessage = MapRequest | Request | Cancel | Got
HolderMessage = Bitfield | Have | Map | Hashes | Bye


def decode_fetcher_message(data: bytes) -> FetcherMessage:
    """Read what a fetcher sent.

    Raises:
      MalformedMessage: it is no such message.
    """
    _check_length(data)
    message: FetcherMessage = decode(data, FetcherMessage)  # type: ignore[arg-type]
    return message


def decode_holder_message(data: bytes) -> HolderMessage:
    """Read what a holder sent.

    Raises:
      MalformedMessage: it is no such message.
    """
    _check_length(data)
    message: HolderMessage = decode(data, HolderMessage)  # type: ignore[arg-type]
    return message


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
    """The holder told at the start what it shows (bit i is piece i of `count`)."""

    count: int
    bits: int
    ticket: bytes  # opens the lane
    plain: bool  # whether that is without encryption
    spreads: bool  # whether it wants to hear what arrives here


@dataclass(frozen=True, slots=True)
class PiecesGained:
    """The holder got, or shows, more pieces."""

    bits: int


@dataclass(frozen=True, slots=True)
class MapReceived:
    """A piece map came, of which nothing was checked yet."""

    piece_map: PieceMap


@dataclass(frozen=True, slots=True)
class HashesReceived:
    """More of the map of a blob that grows; nothing was checked yet."""

    hashes: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The holder ended the exchange; worth opening another after that time (seconds)."""

    code: ByeCode
    reason: str
    retry_after_s: float


FetcherEvent = PiecesKnown | PiecesGained | MapReceived | HashesReceived | Dismissed


class FetcherSide:
    """What a fetcher may send and expect. Methods that send return the message's bytes."""

    def __init__(self, digest: str, *, plain: bool = False, growing: bool = False) -> None:
        self._want = Want(OLDEST_VERSION, VERSION, digest, plain, growing)
        self._count: int | None = None  # pieces, from the bitfield
        self._plain = False
        self._open: set[int] = set()  # requests
        self._cancelled: set[int] = set()  # of those
        self._map_requested = False  # and has not come
        self._map_asked = False  # ever
        self._map_came = False  # so that hashes have something to add to

    def opening(self) -> bytes:
        """The request that opens the exchange."""
        return encode(self._want)

    def request_map(self) -> bytes:
        self._map_requested = self._map_asked = True
        return encode(MapRequest())

    def request(self, index: int) -> bytes:
        """Ask for a piece; not while it is asked for already."""
        if index in self._open or len(self._open) >= MAX_REQUESTS:
            raise ValueError(f"piece {index} cannot be asked for now")
        self._open.add(index)
        return encode(Request(index))

    def cancel(self, index: int) -> bytes:
        """Stop a request; empty if it ended or was cancelled before."""
        if index not in self._open or index in self._cancelled:
            return b""
        self._cancelled.add(index)
        return encode(Cancel(index))

    def ended(self, index: int) -> None:
        """The lane brought the end of a request."""
        self._open.discard(index)
        self._cancelled.discard(index)

    def got(self, bits: int) -> bytes:
        """Tell a holder that spreads what is here; empty if there is nothing to tell."""
        return encode(Got(tuple(indices_of(bits)))) if bits else b""

    @property
    def knows_map(self) -> bool:
        """Whether the map was asked of this holder, so that it tells of new hashes."""
        return self._map_asked

    @property
    def open_requests(self) -> int:
        """Requests that have not ended, cancelled ones included."""
        return len(self._open)

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

    def _receive(self, message: HolderMessage) -> FetcherEvent:
        match message:
            case Bitfield():
                return self._begin(message)
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
                self._map_came = True
                return MapReceived(PieceMap(message.size, message.piece_size, message.hashes))
            case Hashes():
                return self._learn(message)
            case Bye():
                return Dismissed(message.code, message.reason, message.retry_after_s)

    def _begin(self, message: Bitfield) -> FetcherEvent:
        if self._count is not None:
            raise ProtocolViolation("a second bitmap")
        if not OLDEST_VERSION <= message.version <= VERSION:
            raise ProtocolViolation(f"the holder chose version {message.version}")
        if message.plain and not self._want.plain:
            raise ProtocolViolation("the holder wants to send without encryption")
        self._count = message.count
        bits = decode_bits(message.bits, message.count)
        return PiecesKnown(message.count, bits, message.ticket, message.plain, message.spreads)

    def _learn(self, message: Hashes) -> FetcherEvent:
        if not self._want.growing:
            raise ProtocolViolation("hashes that nobody asked for")
        if not self._map_came:
            raise ProtocolViolation("hashes before the map that they add to")
        if len(message.hashes) != len(message.indices) * HASH_SIZE:
            raise ProtocolViolation("there are not as many hashes as pieces")
        found = {}
        for place, index in enumerate(message.indices):
            self._check_index(index)
            found[index] = message.hashes[place * HASH_SIZE : (place + 1) * HASH_SIZE]
        return HashesReceived(found)

    def _check_index(self, index: int) -> None:
        if self._count is None or index >= self._count:
            raise ProtocolViolation(f"there is no piece {index}")


# The holder's side -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PieceRequested:
    """The fetcher asks for a piece."""

    index: int


@dataclass(frozen=True, slots=True)
class PieceCancelled:
    """The fetcher does not want a piece any more; nothing if it was not waiting."""

    index: int


@dataclass(frozen=True, slots=True)
class FetcherGot:
    """The fetcher has these pieces."""

    bits: int


@dataclass(frozen=True, slots=True)
class MapWanted:
    """The fetcher asks for the map."""


HolderEvent = PieceRequested | PieceCancelled | FetcherGot | MapWanted


class HolderSide:
    """What a holder may send and expect. Methods that send return the message's bytes.

    Take in what comes with `receive`; on the lane serve `next_request` again and again, and tell
    how each ended with `ended`. Before each block `is_wanted` says whether to go on.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._map_wanted = False
        self._queue: deque[int] = deque()
        self._cancelled: set[int] = set()  # of those in the queue, and of the one under way
        self._sending: int | None = None
        self._told = 0  # bits of the pieces that the fetcher was told of
        self._hashes_told: set[int] | None = None  # None before the map was sent

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
    def is_wanted(self) -> bool:
        """Whether the request that is being served was not cancelled. Safe in any thread."""
        return self._sending not in self._cancelled

    @property
    def knows_all(self) -> bool:
        """Whether the fetcher was told of every piece."""
        return self._told == (1 << self._count) - 1

    def bitfield(self, bits: int, ticket: bytes, *, plain: bool, spreads: bool) -> bytes:
        """What this holder shows: the first message."""
        self._told = bits
        packed = encode_bits(bits, self._count)
        return encode(Bitfield(VERSION, self._count, packed, ticket, plain, spreads))

    def have(self, bits: int) -> bytes:
        """Tell of the pieces in `bits` that the fetcher was not told of; empty if none is new."""
        new = bits & ~self._told
        if not new:
            return b""
        self._told |= bits
        return encode(Have(tuple(indices_of(new))))

    def map(self, piece_map: PieceMap) -> bytes:
        """The answer to a MapRequest; empty if there is none to answer."""
        if not self._map_wanted:
            return b""
        self._map_wanted = False
        self._hashes_told = set(piece_map.known())
        return encode(Map(piece_map.size, piece_map.piece_size, piece_map.hashes))

    def hashes(self, piece_map: PieceMap) -> bytes:
        """What is new in the map of a blob that grows; empty if nothing, or it was not asked."""
        if self._hashes_told is None or len(self._hashes_told) == self._count:
            return b""
        new = [index for index in piece_map.known() if index not in self._hashes_told]
        if not new:
            return b""
        del new[MAX_HASHES:]
        self._hashes_told.update(new)
        return encode(Hashes(tuple(new), b"".join(piece_map.hash_of(index) for index in new)))

    def next_request(self) -> int | None:
        """Begin with the oldest request; None if none waits."""
        if self._sending is not None:
            raise ValueError(f"piece {self._sending} is still on its way")
        if not self._queue:
            return None
        self._sending = self._queue.popleft()
        return self._sending

    def ended(self) -> None:
        """The request that was being served ended on the lane."""
        if self._sending is not None:
            self._cancelled.discard(self._sending)
        self._sending = None

    def receive(self, data: bytes) -> HolderEvent:
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
                return MapWanted()
            case Request(index):
                self._queue_request(index)
                return PieceRequested(index)
            case Cancel(index):
                if index == self._sending or index in self._queue:
                    self._cancelled.add(index)
                return PieceCancelled(index)
            case Got():
                bits = 0
                for index in message.indices:
                    self._check_index(index)
                    bits |= 1 << index
                return FetcherGot(bits)

    def _queue_request(self, index: int) -> None:
        self._check_index(index)
        if index == self._sending or index in self._queue:
            raise ProtocolViolation(f"piece {index} was asked for twice")
        if len(self._queue) >= MAX_REQUESTS:
            raise ProtocolViolation(f"more than {MAX_REQUESTS} requests at once")
        self._queue.append(index)

    def _check_index(self, index: int) -> None:
        if index >= self._count:
            raise ProtocolViolation(f"there is no piece {index}")


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
