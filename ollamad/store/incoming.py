"""Writes a blob that arrives as a stream, so that it appears complete or not at all."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

import trio

from ollamad.core.pieces import MIB, PieceHasher, PieceMap
from ollamad.store.errors import DigestMismatch, SizeMismatch, StoreError
from ollamad.store.files import (
    STEP_BYTES,
    Space,
    disk_error,
    fsync_directory,
    read_exactly,
    temp_path,
    write_all,
)
from ollamad.store.pins import Hold

T = TypeVar("T")
SYNC_EVERY_BYTES: Final = 64 * MIB  # so that the last sync of a large file is short
_CLEANUP_S: Final = 5.0  # to remove the temp file after a failure or a cancellation


class Disk(Protocol):
    """What an incoming blob needs of its store."""

    space: Space

    async def in_thread(self, work: Callable[[], T]) -> T: ...
    def blob_path(self, digest: str) -> Path: ...


class Incoming:
    """One blob on its way into a temp file: `async with` it, `add` bytes, `commit`.

    Without a commit the temp file is removed. `size` is None when it is not known before;
    `reserved` is the key of a reservation of its room, if there is one.
    """

    def __init__(self, disk: Disk, directory: Path, size: int | None, reserved: str = "") -> None:
        self._disk = disk
        self._reserved = reserved
        self._temp = temp_path(directory)
        self._size = size
        self._hasher = None if size is None else PieceHasher(size)
        self._whole = hashlib.sha256()  # used when the size is not known
        self._promised = 0
        self._descriptor = -1
        self._committed = False
        self._unsynced = 0
        self.received = 0  # bytes

    async def __aenter__(self) -> Self:
        self._promise(self._size or 0)
        try:
            self._descriptor = await self._disk.in_thread(self._create)
        except BaseException:
            self._release(self._promised)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release(self._promised)
        with trio.move_on_after(_CLEANUP_S, shield=True):
            await self._disk.in_thread(self._clean_up)

    async def add(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
          SizeMismatch: more came than announced.
          StoreFull, StoreError: the disk refused.
        """
        if self._size is None:
            self._promise(len(data))
        elif self.received + len(data) > self._size:
            raise SizeMismatch(self._size, self.received + len(data))
        await self._disk.in_thread(functools.partial(self._write, data))
        self.received += len(data)
        self._release(len(data))

    async def commit(
        self, expected_digest: str | None, hold: Hold | None = None
    ) -> tuple[str, PieceMap]:
        """Check and publish the blob, held from then on; returns its digest and piece map.

        Raises:
          SizeMismatch, DigestMismatch, StoreError: it is not published.
        """
        if self._size is not None and self.received != self._size:
            raise SizeMismatch(self._size, self.received)
        if self._hasher is None:
            got = f"sha256:{self._whole.hexdigest()}"
        else:
            got, piece_map = self._hasher.finish()
        if expected_digest is not None and got != expected_digest:
            raise DigestMismatch(expected_digest, got)
        if self._hasher is None:
            got, piece_map = await hash_pieces(self._disk, self._descriptor, self.received)
        if hold is not None:
            await hold.add(got)
        await self._disk.in_thread(functools.partial(self._publish, self._disk.blob_path(got)))
        return got, piece_map

    def _promise(self, size: int) -> None:
        self._disk.space.promise(size, self._reserved)
        self._promised += size

    def _release(self, size: int) -> None:
        self._disk.space.release(size)
        self._promised -= size

    def _create(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return os.open(self._temp, flags, 0o644)
        except OSError as error:
            raise disk_error(error, self._size or 0, self._temp.parent) from error

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._descriptor, data, self.received)
            self._unsynced += len(data)
            if self._unsynced >= SYNC_EVERY_BYTES:
                os.fdatasync(self._descriptor)
                self._unsynced = 0
        except OSError as error:
            raise disk_error(error, len(data), self._temp.parent) from error
        (self._whole if self._hasher is None else self._hasher).update(data)

    def _publish(self, target: Path) -> None:
        try:
            os.fsync(self._descriptor)
            self._temp.rename(target)
            self._committed = True
            fsync_directory(target.parent)
        except OSError as error:
            raise disk_error(error, self.received, target.parent) from error

    def _clean_up(self) -> None:
        os.close(self._descriptor)
        if not self._committed:
            with contextlib.suppress(OSError):  # `prepare` removes it at the next start
                self._temp.unlink()


async def hash_pieces(disk: Disk, descriptor: int, size: int) -> tuple[str, PieceMap]:
    """The digest and the piece map of an open file; cancellable within milliseconds.

    Raises:
      StoreError: the file cannot be read or is shorter.
    """
    hasher = PieceHasher(size)

    def step(offset: int) -> None:
        hasher.update(read_exactly(descriptor, min(STEP_BYTES, size - offset), offset))

    try:
        for offset in range(0, size, STEP_BYTES):
            await disk.in_thread(functools.partial(step, offset))
        return hasher.finish()
    except OSError as error:
        raise StoreError(f"a blob cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"a file became shorter while it was read: {error}") from error
