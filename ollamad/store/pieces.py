"""Reads the pieces of a blob for those who serve them, whether it is complete or still arriving."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ollamad.core.pieces import PieceMap
from ollamad.store.errors import PieceMissing, StoreError
from ollamad.store.files import SharedFile, read_exactly

T = TypeVar("T")
RunInThread = Callable[[Callable[[], T]], Awaitable[T]]


class PieceSource:
    """The pieces of one blob that can be read here; made by `ModelStore.open_piece_source`.

    `have` has one byte for each piece, 1 if it can be read. For a blob that is still arriving
    it grows by itself: it is the writer's own. Close it when done (not async, idempotent).
    """

    def __init__(
        self,
        digest: str,
        piece_map: PieceMap,
        have: bytearray,
        file: SharedFile,
        run_in_thread: RunInThread[bytes],
    ) -> None:
        self.digest = digest
        self.map = piece_map
        self.have = have
        self._file = file
        self._read_in_thread = run_in_thread

    async def read_piece(self, index: int) -> bytes:
        """The bytes of that piece, as they are on the disk: whoever receives them verifies.

        Raises:
          PieceMissing: it is not here (yet).
          StoreError: the source is closed, or the disk failed.
        """
        if not 0 <= index < len(self.map) or not self.have[index]:
            raise PieceMissing(f"piece {index} of {self.digest} is not here")
        length = self.map.length_of(index)
        offset = index * self.map.piece_size
        with self._file.use() as descriptor:
            try:
                data = await self._read_in_thread(lambda: read_exactly(descriptor, length, offset))
            except OSError as error:
                raise StoreError(f"{self.digest} cannot be read: {error}") from error
        if len(data) != length:
            raise StoreError(f"{self.digest} is shorter on the disk than it should be")
        return data

    def close(self) -> None:
        """Give the file back; a read that is under way still ends well."""
        self._file.close()
