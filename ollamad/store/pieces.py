"""Reads the pieces of a blob for those who serve them, whether it is complete or still arriving."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from ollamad.core.pieces import PieceMap
from ollamad.store.errors import PieceMissing
from ollamad.store.files import SharedFile


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """Where the bytes of a piece are: in an open file, from an offset on."""

    descriptor: int
    offset: int
    length: int


class PieceSource:
    """The pieces of one blob that can be read here; made by `ModelStore.open_piece_source`.

    `have` has one byte for each piece, 1 if it can be read. For a blob that is still arriving
    it grows by itself, as does the `map` of a blob that grows: they are the writer's own.
    `is_origin` says that this node has them not from peers, so that others may have none of them.
    Close it when done (not async, idempotent).
    """

    def __init__(
        self,
        digest: str,
        map_now: Callable[[], PieceMap],
        have: bytearray,
        file: SharedFile,
        *,
        is_origin: bool,
    ) -> None:
        self.digest = digest
        self.have = have
        self.is_origin = is_origin
        self._map_now = map_now
        self._file = file

    @property
    def map(self) -> PieceMap:
        return self._map_now()

    @contextlib.contextmanager
    def open_piece(self, index: int) -> Iterator[Region]:
        """The bytes of that piece, as they are on the disk: whoever receives them verifies.

        They can be read within the block, in any thread, also after `close`.

        Raises:
          PieceMissing: it is not here (yet).
          StoreError: the source is closed.
        """
        piece_map = self.map
        if not 0 <= index < len(piece_map) or not self.have[index]:
            raise PieceMissing(f"piece {index} of {self.digest} is not here")
        with self._file.use() as descriptor:
            yield Region(descriptor, index * piece_map.piece_size, piece_map.length_of(index))

    def close(self) -> None:
        """Give the file back; a read that is under way still ends well."""
        self._file.close()
