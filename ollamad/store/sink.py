"""One piece on its way to the disk, in parts of any length, so that it is never in memory whole.

The parts are written to their final place before the piece is verified; nobody believes in them
until then. In the end game a piece may come twice at once: the one that began first is written as
it comes, the other is kept in memory. Whichever settles first counts, and after that nothing is
written to the piece's place any more, not even by who is in the middle of it.
"""

import hashlib
import threading
from collections.abc import Callable

from ollamad.core.pieces import PieceMap
from ollamad.store.errors import PieceCorrupt


class Place:
    """Where a piece goes; shared by all of its sinks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.settled: bytes | None = None  # its hash, once it is verified and recorded
        self.users = 0
        self.has_writer = False


class PieceSink:
    """Made by `PartialBlob.begin_piece`. `write` and `settle` block: call them in a thread.

    Call `close` in the event loop when the thread is done with it, settled or not.
    """

    def __init__(
        self,
        digest: str,
        index: int,
        piece_map: PieceMap,
        place: Place,
        put: Callable[[int, bytes | bytearray | memoryview], None],
        record: Callable[[bytes], None],
        expected: bytes | None,
        on_close: Callable[["PieceSink"], None],
    ) -> None:
        self.index = index
        self.length = piece_map.length_of(index)  # bytes
        self._digest = digest
        self._place = place
        self._put = put
        self._record = record
        self._expected = expected
        self._on_close = on_close
        self._hash = hashlib.sha256()
        self._written = 0
        self._kept = bytearray() if place.has_writer else None
        if self._kept is None:
            place.has_writer = True
        place.users += 1
        self._closed = False
        self.is_new = False  # after `close`: whether it brought what was not here

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next part of the piece.

        Raises:
          PieceCorrupt: that is more than the piece has.
          StoreFull, StoreError: the disk refused.
        """
        offset = self._written
        self._written += len(data)
        if self._written > self.length:
            raise self._wrong_length()
        self._hash.update(data)
        if self._kept is not None:
            self._kept += data
            return
        with self._place.lock:
            if self._place.settled is None:
                self._put(offset, data)

    def settle(self) -> None:
        """Verify and record the piece, all of which was written.

        Raises:
          PieceCorrupt: the bytes are not those of that piece.
          StoreFull, StoreError: the disk refused.
        """
        if self._written != self.length:
            raise self._wrong_length()
        got = self._hash.digest()
        if self._expected is not None and got != self._expected:
            raise PieceCorrupt(f"piece {self.index} of {self._digest} has the wrong hash")
        with self._place.lock:
            if self._place.settled is None:
                if self._kept is not None:
                    self._put(0, self._kept)
                self._record(got)
                self._place.settled = got

    def close(self) -> None:
        """Give the place back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._place.users -= 1
        if self._kept is None:
            self._place.has_writer = False
        self._on_close(self)

    def _wrong_length(self) -> PieceCorrupt:
        return PieceCorrupt(
            f"piece {self.index} of {self._digest} has {self.length:,} bytes, not {self._written:,}"
        )
