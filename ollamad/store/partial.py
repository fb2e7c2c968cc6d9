"""A blob that arrives in pieces from other nodes, and survives kill -9 and power cuts.

Two files beside the blobs: `sha256-<hex>.partial` has the bytes at their final places,
`sha256-<hex>.journal` the piece map and one record for each piece that is verified and synced.
A record is written after its piece was synced, so a record that can be read is true. The journal
itself is not synced: a power cut then costs a few pieces that come again, never a wrong one.
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

import msgspec
import trio

from ollamad.core.pieces import PieceMap
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
    disk_error,
    fsync_directory,
    read_exactly,
    write_all,
)
from ollamad.store.pieces import PieceSource

T = TypeVar("T")

PARTIAL_SUFFIX: Final = ".partial"
JOURNAL_SUFFIX: Final = ".journal"

_MAGIC: Final = b"ollamad partial 1\n"
_HEAD: Final = struct.Struct(">II")  # length and crc32 of the piece map that follows
_RECORD: Final = struct.Struct(">II")  # piece index + 1 (zeros are no record), crc32 of that
MAX_JOURNAL_BYTES: Final = 64 << 20  # a map of 40 bytes a piece is this long at 100 TB
_CLEANUP_S: Final = 5.0  # for throwing away a file whose whole hash is wrong


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
    """A blob in the making; made by `ModelStore.open_partial`.

    `have[i]` is 1 when piece i is verified and synced; `have_count` and `have_bytes` add up.
    Pieces may be written and read by several tasks at once. Ends with `finish` or `close`;
    after `close` (or a crash) another `open_partial` goes on with the pieces that are here.
    """

    def __init__(
        self,
        digest: str,
        piece_map: PieceMap,
        opened: "OpenedPartial",
        paths: PartialPaths,
        disk: Disk,
        on_end: Callable[[], None],
        on_complete: Callable[[], Awaitable[Any]],
    ) -> None:
        super().__init__(digest, piece_map, opened.have, opened.data, disk.in_thread)
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
            await self._disk.in_thread(lambda: self._store(descriptor, journal, index, data))
        if self.have[index] or self._ended:  # another task brought the same piece meanwhile
            return False
        self.have[index] = 1
        self.have_count += 1
        self.have_bytes += len(data)
        self._promised -= len(data)
        self._disk.space.release(len(data))
        return True

    async def finish(self) -> None:
        """Check the whole blob's sha256 and make it a blob of the store; ends this object.

        If cancelled, nothing has happened and it can be called again.

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
            if got != self.digest:
                with trio.move_on_after(_CLEANUP_S, shield=True):
                    await self._throw_away()
                raise DigestMismatch(self.digest, got)
            await self._disk.in_thread(lambda: self._publish(descriptor))
        self.close()
        with trio.move_on_after(_CLEANUP_S, shield=True):
            await self._on_complete()

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

    def _store(self, descriptor: int, journal: int, index: int, data: bytes | bytearray) -> None:
        if hashlib.sha256(data).digest() != self.map.hash_of(index):
            raise PieceCorrupt(f"piece {index} of {self.digest} has the wrong hash")
        try:
            write_all(descriptor, data, index * self.map.piece_size)
            os.fdatasync(descriptor)
            os.write(journal, _record(index))  # O_APPEND and 8 bytes: whole or absent
        except OSError as error:
            raise disk_error(error, len(data), self._paths.blob.parent) from error

    def _publish(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
            self._paths.data.rename(self._paths.blob)
            fsync_directory(self._paths.blob.parent)
            self._paths.journal.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self.digest} cannot be completed: {error}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedPartial:
    """The open files of a partial blob and the pieces that its journal proves."""

    data: SharedFile
    journal: SharedFile
    have: bytearray

    def missing_bytes(self, piece_map: PieceMap) -> int:
        return sum(piece_map.length_of(i) for i, held in enumerate(self.have) if not held)

    def close(self) -> None:
        self.data.close()
        self.journal.close()


def open_partial_files(paths: PartialPaths, piece_map: PieceMap) -> OpenedPartial:
    """Open or begin a partial blob. Blocks on the disk: call it in a thread.

    What another piece map left behind is thrown away.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    try:
        have = _recover(paths, piece_map)
        if have is None:
            paths.remove()
            have = bytearray(len(piece_map))
            _begin(paths, piece_map)
        with contextlib.ExitStack() as undo:
            data = os.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, data)
            journal = os.open(paths.journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            undo.pop_all()
        return OpenedPartial(SharedFile(data), SharedFile(journal), have)
    except OSError as error:
        raise disk_error(error, piece_map.size, paths.blob.parent) from error


def _begin(paths: PartialPaths, piece_map: PieceMap) -> None:
    body = msgspec.msgpack.encode(piece_map)
    with open(paths.journal, "xb") as file:
        file.write(_MAGIC + _HEAD.pack(len(body), zlib.crc32(body)) + body)
        file.flush()
        os.fsync(file.fileno())
    with open(paths.data, "xb"):
        pass
    fsync_directory(paths.blob.parent)


def _recover(paths: PartialPaths, piece_map: PieceMap) -> bytearray | None:
    """The pieces that the journal proves; None if there is nothing to go on with."""
    try:
        if paths.journal.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        journal = paths.journal.read_bytes()
        data_size = paths.data.stat().st_size
    except FileNotFoundError:
        return None
    start = len(_MAGIC) + _HEAD.size
    if not journal.startswith(_MAGIC) or len(journal) < start:
        return None
    length, check = _HEAD.unpack_from(journal, len(_MAGIC))
    body = journal[start : start + length]
    if zlib.crc32(body) != check or msgspec.msgpack.encode(piece_map) != body:
        return None
    have = bytearray(len(piece_map))
    records = journal[start + length :]
    proved = 0
    while proved + _RECORD.size <= len(records):
        index = _RECORD.unpack_from(records, proved)[0] - 1
        if not 0 <= index < len(piece_map):
            break
        if records[proved : proved + _RECORD.size] != _record(index):
            break
        if index * piece_map.piece_size + piece_map.length_of(index) <= data_size:
            have[index] = 1
        proved += _RECORD.size
    if proved < len(records):  # torn by a power cut: what follows proves nothing
        os.truncate(paths.journal, start + length + proved)
    return have


def _record(index: int) -> bytes:
    number = index + 1
    return _RECORD.pack(number, zlib.crc32(number.to_bytes(4, "big")))
