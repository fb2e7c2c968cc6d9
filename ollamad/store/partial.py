"""A blob that arrives in pieces, and survives kill -9 and power cuts (`journal.py` says how).

From peers a blob comes with its piece map (`open_partial`): each piece is verified before anybody
believes in it. The map may come bit by bit, when the blob comes from a node that is getting it
from its origin; then a piece is written when its hash is known. From an origin a blob comes
without a map (it is *growing*): what came is recorded with the hash that it had, and the whole
blob's digest says at the end whether it was right. The journal is the same, so each goes on with
what the others left: records count if the map agrees.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import trio

from ollamad.core.pieces import HASH_SIZE, MIB, UNKNOWN, PieceMap
from ollamad.store.errors import (
    DigestMismatch,
    PieceCorrupt,
    PieceMissing,
    PiecesRotten,
    StoreError,
)
from ollamad.store.files import (
    STEP_BYTES,
    Space,
    blob_name,
    disk_error,
    fsync_directory,
    hash_range,
    write_all,
)
from ollamad.store.journal import OpenedPartial, PartialPaths, write_journal
from ollamad.store.pieces import PieceSource
from ollamad.store.sink import PieceSink, Place

T = TypeVar("T")

SYNC_EVERY_BYTES: Final = 64 * MIB  # what a power cut leaves in doubt, and the last sync has to do
_CLEANUP_S: Final = 5.0  # for throwing away a file whose whole hash is wrong


class Disk(Protocol):
    """What a partial blob needs of its store."""

    space: Space

    async def in_thread(self, work: Callable[[], T]) -> T: ...


class PartialBlob(PieceSource):
    """A blob in the making; made by `ModelStore.open_partial` or `open_growing`.

    `have[i]` is 1 when piece i is verified and written; `have_count` and `have_bytes` add up.
    Pieces may be written and read by several tasks at once. Ends with `finish` or `close`;
    after `close` (or a crash) another `open_partial` goes on with the pieces that are here.
    While it is `growing`, `map` has the hashes of what came so far, zeros for the rest.
    """

    def __init__(
        self,
        digest: str,
        piece_map: PieceMap,
        opened: OpenedPartial,
        paths: PartialPaths,
        disk: Disk,
        on_end: Callable[[], None],
        on_complete: Callable[[str, PieceMap], Awaitable[Any]],
        *,
        growing: bool = False,
        named: bool = True,
    ) -> None:
        have = bytearray(len(piece_map))
        super().__init__(digest, lambda: self._map, have, opened.data, is_origin=growing)
        self.growing = growing
        self.proved = not growing and len(piece_map.known()) == len(piece_map)
        self._named = named
        self._map = piece_map
        self._paths = paths
        self._disk = disk
        self._journal = opened.journal
        self._recorded = opened.hashes  # of an earlier run; those whose hashes are known count
        self._on_end = on_end
        self._on_complete = on_complete
        self._ended = False
        self._places: dict[int, Place] = {}
        self._unsynced = 0  # bytes
        self._whole = hashlib.sha256()
        self._hashed = 0  # bytes of the blob's beginning that are in `_whole`
        self._keeping_up = trio.Lock()
        self.have_count = self.have_bytes = 0
        self._promised = piece_map.size
        if growing:
            self._learn(self._recorded)
        self._count_recorded()
        # Whoever opened it promises what is left.

    @property
    def complete(self) -> bool:
        """Whether every piece is here, so that `finish` can be called."""
        return self.have_count == len(self.have)

    @property
    def missing_bytes(self) -> int:
        return self._promised

    def learn(self, hashes: Mapping[int, bytes]) -> None:
        """More of the map is known; pieces of an earlier run may count from now on.

        Raises:
          PieceCorrupt: there is no such piece, or its hash was another one.
        """
        for index, got in hashes.items():
            if not 0 <= index < len(self.have):
                raise PieceCorrupt(f"there is no piece {index} of {self.digest}")
            if self._map.hash_of(index) not in (UNKNOWN, got):
                raise PieceCorrupt(f"piece {index} of {self.digest} had another hash")
        before = self._promised
        self._learn(hashes)
        self._count_recorded()
        self._disk.space.release(before - self._promised)

    def begin_piece(self, index: int) -> PieceSink:
        """A place for a piece that comes in parts; close it in the end.

        Raises:
          PieceCorrupt: there is no such piece, or its hash is not known.
          StoreError: the partial blob is closed.
        """
        if not 0 <= index < len(self.have):
            raise PieceCorrupt(f"{self.digest} has {len(self.have)} pieces, there is no {index}")
        expected = None if self.growing else self._map.hash_of(index)
        if expected == UNKNOWN:
            raise PieceCorrupt(f"the hash of piece {index} of {self.digest} is not known")
        place = self._places.setdefault(index, Place())
        if self.have[index]:
            place.settled = self._map.hash_of(index)
        begin, directory = index * self._map.piece_size, self._paths.blob.parent
        with contextlib.ExitStack() as using:
            descriptor = using.enter_context(self._file.use())
            journal = using.enter_context(self._journal.file.use())
            release = using.pop_all()

        def put(offset: int, data: bytes | bytearray | memoryview) -> None:
            try:
                write_all(descriptor, data, begin + offset)
            except OSError as error:
                raise disk_error(error, len(data), directory) from error

        def record(got: bytes) -> None:
            try:
                self._journal.piece(journal, index, got)
            except OSError as error:
                raise disk_error(error, 0, directory) from error

        def on_close(sink: PieceSink) -> None:
            release.close()
            if place.settled is not None and not self._ended:
                sink.is_new = self._accept(index, place.settled)
            if not place.users:
                self._places.pop(index, None)

        return PieceSink(self.digest, index, self._map, place, put, record, expected, on_close)

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool:
        """Verify and write a piece that came whole; whether it was new.

        If cancelled the piece is either there and counted or absent.

        Raises:
          PieceCorrupt: the bytes are not those of that piece, or there is no such piece.
          StoreFull: the disk is full; the pieces that are here stay good.
          StoreError: the disk failed, or the partial blob is closed.
        """
        sink = self.begin_piece(index)
        try:
            if self.have[index]:
                return False

            def store() -> None:
                sink.write(data)
                sink.settle()

            await self._disk.in_thread(store)
        finally:
            sink.close()
        await self._sync_if_due()
        return sink.is_new

    async def keep_up(self) -> None:
        """Hash and sync what has come so far, so that `finish` has little left to do.

        Raises:
          StoreError: the disk failed.
        """
        async with self._keeping_up:
            await self._sync_if_due()
            await self._hash_on()

    async def finish(self, on_named: Callable[[str], Awaitable[None]] | None = None) -> str:
        """Check the whole blob's sha256 and make it a blob of the store; ends this object.

        Returns its digest, which a blob without a name (`open_growing`) has only now; `on_named`
        is told before it can be found under that. If cancelled, nothing has happened and it can
        be called again.

        Raises:
          PieceMissing: there are pieces to come.
          PiecesRotten: the disk lost some pieces after they were written. They count no more;
            open it again to go on.
          DigestMismatch: the pieces were those of the map, but the map was not that of the
            blob. Everything that was received is thrown away.
          StoreError: the disk failed.
        """
        if not self.complete:
            raise PieceMissing(
                f"{len(self.have) - self.have_count} pieces of {self.digest} are to come"
            )
        with self._file.use() as descriptor:
            async with self._keeping_up:
                await self._hash_on()
            got = f"sha256:{self._whole.hexdigest()}"
            if self._named and got != self.digest:
                await self._find_the_fault(descriptor)
                raise DigestMismatch(self.digest, got)
            if on_named is not None:
                await on_named(got)
            target = self._paths.blob.with_name(blob_name(got))
            await self._disk.in_thread(lambda: self._publish(descriptor, target))
        self.close()
        with trio.move_on_after(_CLEANUP_S, shield=True):
            await self._on_complete(got, self._map)
        return got

    def close(self) -> None:
        """Stop receiving and keep what is here for the next time. Idempotent, not async."""
        if self._ended:
            return
        self._ended = True
        self._file.close()
        self._journal.file.close()
        self._disk.space.release(self._promised)
        self._promised = 0
        self._on_end()

    # Counting.

    def _learn(self, hashes: Mapping[int, bytes]) -> None:
        known = bytearray(self._map.hashes)
        for index, got in hashes.items():
            known[index * HASH_SIZE : (index + 1) * HASH_SIZE] = got
        self._map = PieceMap(self._map.size, self._map.piece_size, bytes(known))

    def _count_recorded(self) -> None:
        for index, got in self._recorded.items():
            if not self.have[index] and self._map.hash_of(index) == got:
                self._count(index)

    def _count(self, index: int) -> None:
        size = self._map.length_of(index)
        self.have[index] = 1
        self.have_count += 1
        self.have_bytes += size
        self._promised -= size

    def _accept(self, index: int, got: bytes) -> bool:
        """A piece has settled; whether it was new."""
        if self.have[index]:
            return False
        if self.growing:
            self._learn({index: got})
        size = self._map.length_of(index)
        self._count(index)
        self._unsynced += size
        self._disk.space.release(size)
        return True

    # On the disk.

    async def _sync_if_due(self) -> None:
        if self._unsynced < SYNC_EVERY_BYTES:
            return
        self._unsynced = 0
        with self._file.use() as descriptor, self._journal.file.use() as journal:
            try:
                await self._disk.in_thread(lambda: self._journal.sync(journal, descriptor))
            except OSError as error:
                raise disk_error(error, 0, self._paths.blob.parent) from error

    async def _hash_on(self) -> None:
        """Hash the blob's beginning as far as it is here."""
        with self._file.use() as descriptor:
            while (end := self._contiguous()) > self._hashed:
                begin, whole = self._hashed, self._whole.copy()
                step = min(STEP_BYTES, end - begin)
                await self._in_thread(functools.partial(hash_range, whole, descriptor, begin, step))
                self._whole, self._hashed = whole, begin + step

    def _contiguous(self) -> int:
        missing = self.have.find(0, self._hashed // self._map.piece_size)
        return self._map.size if missing < 0 else missing * self._map.piece_size

    async def _find_the_fault(self, descriptor: int) -> None:
        """The whole is wrong: forget the pieces that are not what they were, or everything.

        Raises:
          PiecesRotten: it was some pieces.
        """
        sound: dict[int, bytes] = {}
        for index in range(len(self.have)):
            piece = hashlib.sha256()
            begin, length = index * self._map.piece_size, self._map.length_of(index)
            await self._in_thread(functools.partial(hash_range, piece, descriptor, begin, length))
            if piece.digest() == self._map.hash_of(index):
                sound[index] = piece.digest()
        rotten = len(self.have) - len(sound)
        with trio.move_on_after(_CLEANUP_S, shield=True):
            self.have[:] = bytes(len(self.have))  # those who serve from it stop at once
            self.have_count = self.have_bytes = 0
            self.close()
            if rotten:
                await self._in_thread(lambda: self._keep_only(descriptor, sound))
            else:
                await self._in_thread(self._paths.remove)
        if rotten:
            raise PiecesRotten(
                f"the disk lost {rotten} pieces of {self.digest} after they were written"
            )

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await self._disk.in_thread(work)
        except OSError as error:
            raise StoreError(f"{self.digest} cannot be read again: {error}") from error

    def _keep_only(self, descriptor: int, sound: dict[int, bytes]) -> None:
        os.fdatasync(descriptor)
        write_journal(self._paths, self._map, sound)

    def _publish(self, descriptor: int, target: Path) -> None:
        try:
            os.fsync(descriptor)
            self._paths.data.rename(target)
            fsync_directory(target.parent)
            self._paths.journal.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.digest} cannot be completed: {error}") from error
