"""Small pieces of disk work that blobs, partial blobs and manifests share.

Everything here blocks and is called in the store's threads, except `SharedFile`, whose counting
belongs to the event loop's thread.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from ollamad.core.pieces import MIB
from ollamad.store.errors import InvalidDigest, StoreError, StoreFull

STEP_BYTES: Final = 8 * MIB  # one turn of a thread: some 20 ms of hashing, so cancelling is quick
HASH_BYTES: Final = 1 * MIB  # read for hashing at a time
TEMP_PREFIX: Final = ".ollamad-"  # temp files of ours; anything else in the store is not ours
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_BLOB_NAME: Final = re.compile(r"sha256-[0-9a-f]{64}")


def blob_name(digest: str) -> str:
    """The file name of a blob: `sha256-<hex>`.

    Raises:
      InvalidDigest: digests become paths, so nothing else passes.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidDigest(f"{digest[:80]!r} is not a digest (sha256:<64 hex digits>)")
    return digest.replace(":", "-")


def digest_of_name(name: str) -> str | None:
    """The digest that a file in `blobs/` is named after; None if it is not a blob."""
    return name.replace("-", ":") if _BLOB_NAME.fullmatch(name) else None


def temp_path(directory: Path) -> Path:
    return directory / f"{TEMP_PREFIX}{secrets.token_hex(8)}.tmp"


def fsync_directory(directory: Path) -> None:
    """Make renames and new names in that directory outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(directory: Path) -> None:
    """Have a directory, and those above it, so that they outlive a power cut."""
    missing = [d for d in (directory, *directory.parents) if not d.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_directory(made.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file so that a crash leaves either the old bytes or the new ones."""
    temp = temp_path(path.parent)
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise disk_error(error, len(data), path.parent) from error


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite that goes on after a short write."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def read_exactly(descriptor: int, length: int, offset: int) -> bytes:
    """pread that goes on after a short read; shorter only at the end of the file."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def hash_range(whole: "hashlib._Hash", descriptor: int, offset: int, length: int) -> None:
    """Hash so many bytes of a file, a little at a time.

    Raises:
      OSError: it cannot be read, or is shorter.
    """
    buffer = memoryview(bytearray(min(length, HASH_BYTES)))
    end = offset + length
    while offset < end:
        count = os.preadv(descriptor, [buffer[: end - offset]], offset)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was")
        whole.update(buffer[:count])
        offset += count


def free_bytes_of(directory: Path) -> tuple[int, int]:
    """Bytes that we may still write there, and bytes of the file system in all."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def disk_error(error: OSError, needed_bytes: int, directory: Path) -> StoreError:
    """Translate what the operating system says when a write fails."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(needed_bytes, free_bytes_of(directory)[0])
    return StoreError(f"the model store cannot be written: {error}")


class Space:
    """Promises of disk space, so that two transfers do not count on the same free bytes.

    `keep_free_bytes` are never promised: a full disk also stops the cluster's journal.
    """

    def __init__(self, directory: Path, keep_free_bytes: int) -> None:
        self._directory = directory
        self.keep_free_bytes = keep_free_bytes
        self.promised = 0
        self._reserved: dict[str, int] = {}  # part of `promised`, by the digest that it is for

    def promise(self, size: int, digest: str = "") -> None:
        """Set bytes aside, those first that are reserved for that blob; "" for none.

        Raises:
          StoreFull: there are not as many.
        """
        reserved = self._reserved.get(digest, 0)
        free = self.free_bytes() + reserved
        if size > free:
            raise StoreFull(size, max(0, free))
        self._reserved.pop(digest, None)
        self.promised += size - reserved

    def release(self, size: int) -> None:
        """Give a promise back, because the bytes are written or will not be."""
        self.promised -= size

    @contextlib.contextmanager
    def reserve(self, sizes: Mapping[str, int]) -> Iterator[None]:
        """Set bytes aside for several blobs that will come one after the other.

        Each blob's promise takes its part out of it; the rest is given back at the end.

        Raises:
          StoreFull: they do not all fit.
        """
        mine = {d: n for d, n in sizes.items() if d not in self._reserved}
        needed, free = sum(mine.values()), self.free_bytes()
        if needed > free:
            raise StoreFull(needed, max(0, free))
        self._reserved |= mine
        self.promised += needed
        try:
            yield
        finally:
            for digest in mine:
                self.promised -= self._reserved.pop(digest, 0)

    def free_bytes(self) -> int:
        """Bytes that are neither used, kept back nor promised; negative if there are too few."""
        return free_bytes_of(self._directory)[0] - self.keep_free_bytes - self.promised


class SharedFile:
    """A descriptor that closes when nobody is in the middle of using it.

    A thread that still reads must not find its descriptor closed and given to another file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._users = 0
        self._closing = False

    @contextlib.contextmanager
    def use(self) -> Iterator[int]:
        if self._closing:
            raise StoreError("the blob has been closed")
        self._users += 1
        try:
            yield self._descriptor
        finally:
            self._users -= 1
            self._close_if_unused()

    def close(self) -> None:
        """Idempotent."""
        if not self._closing:
            self._closing = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closing and self._users == 0:
            os.close(self._descriptor)
