"""Finds blobs whose bytes are not what they were, and takes them out of service.

Disks lose bits without saying so. A blob is read slowly, from the disk rather than from memory,
and hashed. If it is rotten, the pieces of it that are still right stay as a partial blob, so that
only the others need to come again; without a piece map that can be trusted it is put aside as
`sha256-<hex>.rotten`. A file on a shelf is never touched: an empty file of that name in our own
directory says that it does not count, and a good copy then lands there.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from ollamad.core.pieces import PieceMap
from ollamad.store.blobs import ROTTEN_SUFFIX, BlobStore
from ollamad.store.errors import StoreError
from ollamad.store.files import STEP_BYTES, fsync_directory, read_exactly
from ollamad.store.journal import PartialPaths, write_journal

log = logging.getLogger(__name__)

DEFAULT_RATE: Final = 20_000_000  # bytes/s: a tenth of what a slow disk reads


@dataclass(frozen=True, slots=True)
class Rot:
    """What is wrong with a blob."""

    size: int
    sound: dict[int, bytes]  # pieces that are right, and their hashes
    pieces: PieceMap | None  # None: nobody can tell which pieces are wrong

    @property
    def bad_bytes(self) -> int:
        if self.pieces is None:
            return self.size
        return self.size - sum(self.pieces.length_of(index) for index in self.sound)


class Scrubber:
    """Reads blobs of a store at `rate` bytes a second; `sleep` and `clock` are for tests."""

    def __init__(
        self,
        store: BlobStore,
        rate: float = DEFAULT_RATE,
        *,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._store = store
        self._rate = rate
        self._clock = clock

    async def check(
        self, digest: str, pieces_root: str = "", *, forgive_unreadable: bool = True
    ) -> Rot | None:
        """Read a blob; None if all of it is right. A map with that root is trusted.

        What is wrong is read once more: a cable or memory may have been at fault.

        Args:
          forgive_unreadable: what cannot be read is no rot, but an error.

        Raises:
          BlobMissing: it is not here. StoreError, OSError: it cannot be read.
        """
        rot = await self._read(digest, pieces_root, forgive_unreadable)
        if rot is None:
            return None
        again = await self._read(digest, pieces_root, forgive_unreadable)
        if again is not None and again.pieces is rot.pieces:
            again.sound.update(rot.sound)
        return again

    async def _read(self, digest: str, pieces_root: str, forgive_unreadable: bool) -> Rot | None:
        path = await self._store.find_blob(digest)
        known = await self._store.known_map(digest)
        size = await self._store.blob_size(digest)
        usable = known is not None and known.size == size and known.root() == pieces_root
        pieces = known if usable else None
        step = STEP_BYTES if pieces is None else pieces.piece_size
        whole = hashlib.sha256()
        sound: dict[int, bytes] = {}
        descriptor = await self._store.in_thread(
            functools.partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        )
        try:
            for index, offset in enumerate(range(0, size, step)):
                began = self._clock()
                length = min(step, size - offset)
                reading = functools.partial(
                    _hash, descriptor, offset, length, whole, forgive_unreadable
                )
                got = await self._store.in_thread(reading)
                if pieces is not None and got == pieces.hash_of(index):
                    sound[index] = got
                await trio.sleep(max(0.0, step / self._rate - (self._clock() - began)))
        finally:
            os.close(descriptor)
        if f"sha256:{whole.hexdigest()}" == digest:
            return None
        return Rot(size, sound, pieces)

    async def quarantine(self, digest: str, rot: Rot) -> None:
        """Take a rotten blob out of service; what is right of it stays for its repair.

        Raises:
          StoreError: the disk refused.
        """
        await self._store.in_thread(functools.partial(self._quarantine, digest, rot))

    def _quarantine(self, digest: str, rot: Rot) -> None:
        blob = self._store.blob_path(digest)
        aside = blob.with_name(blob.name + ROTTEN_SUFFIX)
        try:
            if not blob.exists():
                if any((shelf / "blobs" / blob.name).exists() for shelf in self._store.shelves):
                    aside.touch()
            elif rot.pieces is None or not rot.sound:
                blob.rename(aside)
            else:
                paths = PartialPaths(blob)
                paths.remove()
                # A crash in between leaves a journal without bytes, which the next start removes.
                write_journal(paths, rot.pieces, rot.sound)
                blob.rename(paths.data)
            fsync_directory(blob.parent)
        except OSError as error:
            raise StoreError(f"{digest} is rotten and cannot be put aside: {error}") from error


def discard_rotten(store: BlobStore, age_s: float, now: float) -> list[Path]:
    """Remove what was put aside long ago, or is here again. Blocks on the disk.

    Marks for shelves stay: without them the rotten file would count again.
    """
    removed = []
    for path in store.blobs.glob(f"*{ROTTEN_SUFFIX}"):
        status = path.stat()
        is_replaced = path.with_name(path.name.removesuffix(ROTTEN_SUFFIX)).exists()
        if status.st_size and (is_replaced or now - status.st_mtime >= age_s):
            path.unlink()
            removed.append(path)
    return removed


def _hash(
    descriptor: int,
    offset: int,
    length: int,
    whole: "hashlib._Hash",
    forgive_unreadable: bool,
) -> bytes:
    """Hash a part of a file as it is on the disk, not as memory has it."""
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    piece = hashlib.sha256()
    for at in range(offset, offset + length, STEP_BYTES):
        try:
            data = read_exactly(descriptor, min(STEP_BYTES, offset + length - at), at)
        except OSError:
            if forgive_unreadable:
                raise
            data = b""  # a sector that can never be read is as good as a wrong one
        piece.update(data)
        whole.update(data)
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    return piece.digest()
