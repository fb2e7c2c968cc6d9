"""What this package needs of others: streams to other nodes, and the store of blobs.

The daemon hands in objects that fit. Errors are part of it: a stream that is gone raises
`trio.BrokenResourceError`, a node that cannot be reached an `OSError`. The store raises errors
of its own; the two that matter here are given to `Fetcher` and `PieceServer` as classes.
"""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ollamad.core.ids import NodeId
from ollamad.core.pieces import PieceMap


class Stream(Protocol):
    """One exchange with another node: whole messages both ways, with flow control."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes | None: ...


class Peers(Protocol):
    """Ways to other nodes."""

    def open(
        self, node_id: NodeId, method: str, request: bytes, *, bulk: bool = False
    ) -> AbstractAsyncContextManager[Stream]: ...


class PieceSource(Protocol):
    """The readable pieces of one blob. `have[i]` is 1 if piece i can be read; it may grow."""

    @property
    def map(self) -> PieceMap: ...

    @property
    def have(self) -> bytearray: ...

    async def read_piece(self, index: int) -> bytes: ...

    def close(self) -> None: ...


class PartialBlob(PieceSource, Protocol):
    """A blob in the making. What is in it survives `close` and a crash."""

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool:
        """Verify, write and sync a piece; whether it was new."""

    async def finish(self) -> object:
        """Check the whole blob's hash and publish it."""


class Store(Protocol):
    """The blobs of this node."""

    async def has_blob(self, digest: str) -> bool: ...

    async def open_partial(self, digest: str, piece_map: PieceMap) -> PartialBlob:
        """Begin a partial blob, or go on with what an earlier run left."""


class Shelf(Protocol):
    """Where the server finds blobs, complete or still arriving."""

    async def open_piece_source(self, digest: str) -> PieceSource: ...


_DIGITS = bytes([ord("0")]) + bytes([ord("1")]) * 255


def bits_of(have: bytearray) -> int:
    """A have-map of one byte a piece as an int: bit i is piece i."""
    return int(b"0" + have[::-1].translate(_DIGITS), 2)
