"""What this package needs of others: streams to other nodes, lanes, and the store of blobs.

The daemon hands in objects that fit. Errors are part of it: a stream that is gone raises
`trio.BrokenResourceError`, a node that cannot be reached an `OSError`, a lane that is gone an
`OSError` or `EOFError`. The store raises errors of its own; those that matter here are given to
`Fetcher` and `PieceServer` as classes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol, TypeVar

from ollamad.core.ids import NodeId
from ollamad.core.pieces import PieceMap
from ollamad.wire.lane import EndCode, RequestEnded

T = TypeVar("T")


class Stream(Protocol):
    """One exchange with another node: whole messages both ways, with flow control."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes | None: ...


class Peers(Protocol):
    """Ways to other nodes."""

    def open(
        self, node_id: NodeId, method: str, request: bytes, *, bulk: bool = False
    ) -> AbstractAsyncContextManager[Stream]: ...


class Region(Protocol):
    """Where the bytes of a piece are: in an open file, from an offset on."""

    @property
    def descriptor(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class PieceSource(Protocol):
    """The readable pieces of one blob. `have[i]` is 1 if piece i can be read; it may grow."""

    @property
    def map(self) -> PieceMap: ...

    @property
    def have(self) -> bytearray: ...

    @property
    def is_origin(self) -> bool:
        """Whether this node has it not from peers, so that others may have nothing of it."""

    def open_piece(self, index: int) -> AbstractContextManager[Region]: ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Takes one piece in parts. `write` and `settle` block; `close` belongs to the event loop."""

    @property
    def length(self) -> int: ...

    @property
    def is_new(self) -> bool:
        """After `close`: whether it brought what was not here."""

    def write(self, data: memoryview) -> None: ...

    def settle(self) -> None:
        """Verify the piece; from now on it is believed."""

    def close(self) -> None: ...


class PartialBlob(Protocol):
    """A blob in the making. What is in it survives `close` and a crash."""

    @property
    def map(self) -> PieceMap: ...

    @property
    def have(self) -> bytearray: ...

    def learn(self, hashes: Mapping[int, bytes]) -> None: ...

    def begin_piece(self, index: int) -> Sink: ...

    async def keep_up(self) -> None:
        """Do what can be done before the end."""

    async def finish(self) -> object:
        """Check the whole blob's hash and publish it."""

    def close(self) -> None: ...


class Store(Protocol):
    """The blobs of this node."""

    async def has_blob(self, digest: str) -> bool: ...

    async def open_partial(self, digest: str, piece_map: PieceMap) -> PartialBlob:
        """Begin a partial blob, or go on with what an earlier run left."""


class Shelf(Protocol):
    """Where the server finds blobs, complete or still arriving."""

    async def open_piece_source(self, digest: str) -> PieceSource: ...

    async def open_growing_source(self, digest: str) -> PieceSource:
        """Also of a blob whose map is not complete."""

    async def piece_map(self, digest: str) -> PieceMap:
        """The map of a complete blob, made and kept if it is missing, which may take minutes."""


class FetchLane(Protocol):
    """The fetcher's end of a lane."""

    @property
    def received(self) -> int:
        """Bytes of pieces that came so far; grows in the middle of a piece, too."""

    @property
    def heard(self) -> int:
        """A number that grows whenever something comes, also in the middle of a block."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is this side that holds it up now: its disk or its limit."""

    async def receive(self) -> int | RequestEnded:
        """Wait for the end of a request: the piece that is here and settled, or why not.

        Raises:
          OSError, EOFError, ProtocolViolation, whatever the sinks raise.
        """

    async def aclose(self) -> None: ...


class ServeLane(Protocol):
    """The holder's end of a lane."""

    async def send_piece(
        self, index: int, region: Region, wanted: Callable[[], bool], sent: Callable[[int], None]
    ) -> EndCode | None:
        """Send a piece: None if it was sent.

        CANCELLED: it was not `wanted` any more, and its request was ended. UNREADABLE: it cannot
        be read; its request is still to be ended. `sent` is told, in any thread, of each block.
        """

    async def end(self, ended: RequestEnded) -> None:
        """End a request without its piece."""

    async def aclose(self) -> None: ...


class LaneTicket(Protocol):
    """A lane that a fetcher may open."""

    @property
    def token(self) -> bytes: ...

    async def arrived(self) -> ServeLane: ...


class Lanes(Protocol):
    """Ways for the bytes of pieces, beside the streams."""

    async def dial(
        self, node_id: NodeId, token: bytes, sinks: Mapping[int, Sink], *, plain: bool
    ) -> FetchLane:
        """Open the lane that a holder gave a ticket for. `sinks` has those of open requests."""

    def expect(self, peer: NodeId, *, plain: bool) -> AbstractContextManager[LaneTicket]: ...


class Connection(Protocol):
    """What a lane needs of its connection; all but `run`, `shut` and `close` block,
    and end when it is shut."""

    @property
    def received(self) -> int:
        """Bytes that came over the network; grows while others block."""

    async def run(self, work: Callable[[], T]) -> T: ...
    def send(self, data: bytes) -> None: ...
    def send_file(self, head: bytes, descriptor: int, offset: int, size: int) -> None: ...
    def receive_into(self, view: memoryview) -> None: ...
    def pause(self, seconds: float) -> None: ...
    def shut(self) -> None: ...
    def close(self) -> None: ...


class Ticket(Protocol):
    @property
    def token(self) -> bytes: ...

    async def arrived(self) -> Connection: ...


class BulkPeers(Protocol):
    """Connections for bulk to other nodes."""

    async def dial(self, node_id: NodeId, token: bytes, *, plain: bool) -> Connection: ...

    def expect(self, peer: NodeId, *, plain: bool) -> AbstractContextManager[Ticket]: ...


_DIGITS = bytes([ord("0")]) + bytes([ord("1")]) * 255


def bits_of(have: bytearray) -> int:
    """A have-map of one byte a piece as an int: bit i is piece i."""
    return int(b"0" + have[::-1].translate(_DIGITS), 2)
