"""A blob that arrives in pieces, and survives kill -9 and power cuts.

Two files beside the blobs: `sha256-<hex>.partial` has the bytes at their final places,
`sha256-<hex>.journal` the sizes, and one record for each piece that was synced, with its hash.
A record is written after its piece was synced, so a record that can be read is true. The journal
itself is not synced: a power cut then costs a few pieces that come again, never a wrong one.

From peers a blob comes with its piece map (`piece_map`): each piece is checked before it is
written. From an origin it comes without one (it is *growing*): what came is recorded with the
hash that it had, and the whole blob's digest says at the end whether it was right. The journal
is the same, so either goes on with what the other left: records count if the map agrees.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import trio

from ollamad.core.pieces import HASH_SIZE, PieceMap
from ollamad.store.errors import (
    DigestMismatch,
    PieceCorrupt,
    PieceMissing,
    StoreError,
)
from ollamad.store.files import (
    STEP_BYTES,
    SharedFile,
    Space,
    blob_name,
    disk_error,
    fsync_directory,
    read_exactly,
    write_all,
)
from ollamad.store.pieces import PieceSource

T = TypeVar("T")

PARTIAL_SUFFIX: Final = ".partial"
JOURNAL_SUFFIX: Final = ".journal"

_MAGIC: Final = b"ollamad partial 2\n"
_HEAD: Final = struct.Struct(">QII")  # size of the blob, size of a piece, crc32 of these
_RECORD: Final = struct.Struct(">I32sI")  # piece index + 1 (zeros are no record), sha256, crc32
MAX_JOURNAL_BYTES: Final = 64 << 20  # far longer than any: 40 bytes a piece, each perhaps twice
_CLEANUP_S: Final = 5.0  # for throwing away a file whose whole hash is wrong
_ABSENT: Final = bytes(HASH_SIZE)  # stands for the hash of a piece that has not come


class Disk(Protocol):
    """What a partial blob needs of its store."""

    space: Space

    async def in_thread(self, work: Callable[[], T]) -> T: ...


@dataclasses.dataclass(frozen=True, slots=True)
class PartialPaths:
    """Where a partial blob lives, and where it goes when it is complete."""

    blob: Path

    @property
    def data(self) -> Path:
        return self.blob.with_name(self.blob.name + PARTIAL_SUFFIX)

    @property
    def journal(self) -> Path:
        return self.blob.with_name(self.blob.name + JOURNAL_SUFFIX)

    def remove(self) -> None:
        for path in (self.data, self.journal):
            path.unlink(missing_ok=True)


class PartialBlob(PieceSource):
    """A blob in the making; made by `ModelStore.open_partial` or `open_growing`.

    `have[i]` is 1 when piece i is verified and synced; `have_count` and `have_bytes` add up.
    Pieces may be written and read by several tasks at once. Ends with `finish` or `close`;
    after `close` (or a crash) another `open_partial` goes on with the pieces that are here.
    While it is `growing`, `map` has the hashes of what came so far, zeros for the rest.
    """

    def __init__(
        self,
        digest: str,
        piece_map: PieceMap,
        opened: "OpenedPartial",
        paths: PartialPaths,
        disk: Disk,
        on_end: Callable[[], None],
        on_complete: Callable[[str, PieceMap], Awaitable[Any]],
        *,
        growing: bool = False,
        named: bool = True,
    ) -> None:
        super().__init__(digest, piece_map, opened.have, opened.data, disk.in_thread)
        self.growing = growing
        self._named = named
        self._hashes = bytearray(piece_map.hashes)
        self._paths = paths
        self._disk = disk
        self._journal = opened.journal
        self._on_end = on_end
        self._on_complete = on_complete
        self._ended = False
        self.have_count = sum(self.have)
        self._promised = opened.missing_bytes(piece_map)  # made by whoever opened it
        self.have_bytes = piece_map.size - self._promised

    @property
    def complete(self) -> bool:
        """Whether every piece is here, so that `finish` can be called."""
        return self.have_count == len(self.map)

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool:
        """Verify a piece, write and sync it, and only then believe in it.

        Returns whether it was new. If cancelled the piece is either there and counted or absent.

        Raises:
          PieceCorrupt: the bytes are not those of that piece, or there is no such piece.
          StoreFull: the disk is full; the pieces that are here stay good.
          StoreError: the disk failed, or the partial blob is closed.
        """
        if not 0 <= index < len(self.map):
            raise PieceCorrupt(f"{self.digest} has {len(self.map)} pieces, there is no {index}")
        if self.have[index]:
            return False
        if len(data) != self.map.length_of(index):
            raise PieceCorrupt(
                f"piece {index} of {self.digest} has {self.map.length_of(index):,} bytes, "
                f"not {len(data):,}"
            )
        with self._file.use() as descriptor, self._journal.use() as journal:
            got = await self._disk.in_thread(lambda: self._store(descriptor, journal, index, data))
        if self.have[index] or self._ended:  # another task brought the same piece meanwhile
            return False
        if self.growing:
            self._hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE] = got
            self.map = PieceMap(self.map.size, self.map.piece_size, bytes(self._hashes))
        self.have[index] = 1
        self.have_count += 1
        self.have_bytes += len(data)
        self._promised -= len(data)
        self._disk.space.release(len(data))
        return True

    async def finish(self, on_named: Callable[[str], Awaitable[None]] | None = None) -> str:
        """Check the whole blob's sha256 and make it a blob of the store; ends this object.

        Returns its digest, which a blob without a name (`open_growing`) has only now; `on_named`
        is told before it can be found under that. If cancelled, nothing has happened and it can
        be called again.

        Raises:
          PieceMissing: there are pieces to come.
          DigestMismatch: the pieces were those of the map, but the map was not that of the
            blob. Everything that was received is thrown away.
          StoreError: the disk failed.
        """
        if not self.complete:
            raise PieceMissing(
                f"{len(self.map) - self.have_count} pieces of {self.digest} are to come"
            )
        with self._file.use() as descriptor:
            got = await self._hash_all(descriptor)
            if self._named and got != self.digest:
                with trio.move_on_after(_CLEANUP_S, shield=True):
                    await self._throw_away()
                raise DigestMismatch(self.digest, got)
            if on_named is not None:
                await on_named(got)
            target = self._paths.blob.with_name(blob_name(got))
            await self._disk.in_thread(lambda: self._publish(descriptor, target))
        self.close()
        with trio.move_on_after(_CLEANUP_S, shield=True):
            await self._on_complete(got, self.map)
        return got

    def close(self) -> None:
        """Stop receiving and keep what is here for the next time. Idempotent, not async."""
        if self._ended:
            return
        self._ended = True
        self._file.close()
        self._journal.close()
        self._disk.space.release(self._promised)
        self._promised = 0
        self._on_end()

    async def _throw_away(self) -> None:
        self.have[:] = bytes(len(self.have))  # those who serve from it stop at once
        self.have_count = self.have_bytes = 0
        self.close()
        await self._disk.in_thread(self._paths.remove)

    async def _hash_all(self, descriptor: int) -> str:
        whole = hashlib.sha256()

        def step(offset: int) -> None:
            whole.update(read_exactly(descriptor, min(STEP_BYTES, self.map.size - offset), offset))

        for offset in range(0, self.map.size, STEP_BYTES):
            await self._disk.in_thread(functools.partial(step, offset))
        return f"sha256:{whole.hexdigest()}"

    def _store(self, descriptor: int, journal: int, index: int, data: bytes | bytearray) -> bytes:
        got = hashlib.sha256(data).digest()
        if not self.growing and got != self.map.hash_of(index):
            raise PieceCorrupt(f"piece {index} of {self.digest} has the wrong hash")
        try:
            write_all(descriptor, data, index * self.map.piece_size)
            os.fdatasync(descriptor)
            os.write(journal, _record(index, got))  # O_APPEND and 40 bytes: whole or absent
        except OSError as error:
            raise disk_error(error, len(data), self._paths.blob.parent) from error
        return got

    def _publish(self, descriptor: int, target: Path) -> None:
        try:
            os.fsync(descriptor)
            self._paths.data.rename(target)
            fsync_directory(target.parent)
            self._paths.journal.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.digest} cannot be completed: {error}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedPartial:
    """The open files of a partial blob and the pieces that its journal proves."""

    data: SharedFile
    journal: SharedFile
    have: bytearray
    hashes: bytes  # what the pieces that are here hash to, zeros for the rest

    def missing_bytes(self, piece_map: PieceMap) -> int:
        return sum(piece_map.length_of(i) for i, held in enumerate(self.have) if not held)

    def close(self) -> None:
        self.data.close()
        self.journal.close()


def open_partial_files(
    paths: PartialPaths, piece_map: PieceMap, *, growing: bool = False
) -> OpenedPartial:
    """Open or begin a partial blob. Blocks on the disk: call it in a thread.

    What came in other sizes is thrown away; a piece that the map does not confirm is not here.
    For a growing blob the map gives the sizes only, and every piece counts that was recorded.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    try:
        hashes = _recover(paths, piece_map)
        if hashes is None:
            paths.remove()
            hashes = {}
            write_journal(paths, piece_map, {})
            with open(paths.data, "xb"):
                pass
            fsync_directory(paths.blob.parent)
        have = bytearray(len(piece_map))
        for index, got in hashes.items():
            have[index] = growing or got == piece_map.hash_of(index)
        proved = b"".join(hashes[i] if have[i] else _ABSENT for i in range(len(piece_map)))
        with contextlib.ExitStack() as undo:
            data = os.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, data)
            journal = os.open(paths.journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            undo.pop_all()
        return OpenedPartial(SharedFile(data), SharedFile(journal), have, proved)
    except OSError as error:
        raise disk_error(error, piece_map.size, paths.blob.parent) from error


def write_journal(paths: PartialPaths, sizes: PieceMap, hashes: dict[int, bytes]) -> None:
    """Begin a journal that proves these pieces; synced. Blocks on the disk.

    Raises:
      OSError: the disk refused, or there is one.
    """
    with open(paths.journal, "xb") as file:
        file.write(_head(sizes) + b"".join(_record(i, got) for i, got in hashes.items()))
        file.flush()
        os.fsync(file.fileno())


def sizes_of_partial(paths: PartialPaths) -> int | None:
    """The size of the blob that a partial one is to become; None if it cannot be told."""
    try:
        with open(paths.journal, "rb") as file:
            head = file.read(len(_MAGIC) + _HEAD.size)
    except OSError:
        return None
    if len(head) < len(_MAGIC) + _HEAD.size or not head.startswith(_MAGIC):
        return None
    size: int = _HEAD.unpack_from(head, len(_MAGIC))[0]
    return size


def _recover(paths: PartialPaths, sizes: PieceMap) -> dict[int, bytes] | None:
    """The pieces that the journal proves, and their hashes; None if there is nothing to go on."""
    try:
        if paths.journal.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        journal = paths.journal.read_bytes()
        data_size = paths.data.stat().st_size
    except FileNotFoundError:
        return None
    head = _head(sizes)
    if not journal.startswith(head):
        return None
    hashes: dict[int, bytes] = {}
    proved = len(head)
    while proved + _RECORD.size <= len(journal):
        number, got, _ = _RECORD.unpack_from(journal, proved)
        index = number - 1
        if not 0 <= index < len(sizes):
            break
        if journal[proved : proved + _RECORD.size] != _record(index, got):
            break
        if index * sizes.piece_size + sizes.length_of(index) <= data_size:
            hashes[index] = got
        proved += _RECORD.size
    if proved < len(journal):  # torn by a power cut: what follows proves nothing
        os.truncate(paths.journal, proved)
    return hashes


def _head(sizes: PieceMap) -> bytes:
    numbers = struct.pack(">QI", sizes.size, sizes.piece_size)
    return _MAGIC + _HEAD.pack(sizes.size, sizes.piece_size, zlib.crc32(numbers))


def _record(index: int, got: bytes) -> bytes:
    number = index + 1
    return _RECORD.pack(number, got, zlib.crc32(number.to_bytes(4, "big") + got))
