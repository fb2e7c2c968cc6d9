"""The journal of a partial blob: which pieces of it are on the disk, and their hashes.

`sha256-<hex>.partial` has the bytes at their final places, `sha256-<hex>.journal` the sizes and a
record for each piece, appended when its bytes were written. What is written outlives the process
at once, but a power cut only when it is synced, which costs too much after each piece. So the
journal also says in which boot of the machine the records were written, and up to which of them
the bytes are synced: later records of an earlier boot are believed only once the bytes have been
read and have that hash. A power cut so costs a moment of reading; never a piece, and never truth.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import secrets
import struct
import threading
import zlib
from pathlib import Path
from typing import Final

from ollamad.core.pieces import PieceMap
from ollamad.store.files import (
    SharedFile,
    disk_error,
    fsync_directory,
    hash_range,
    write_atomically,
)

PARTIAL_SUFFIX: Final = ".partial"
JOURNAL_SUFFIX: Final = ".journal"

_MAGIC: Final = b"ollamad partial 3\n"
_HEAD: Final = struct.Struct(">QII")  # size of the blob, size of a piece, crc32 of these
_RECORD: Final = struct.Struct(">I32sI")  # number, 32 bytes, crc32 of these
# The numbers of records: a piece's index + 1 (zeros are no record) with its sha256, or
_BOOT: Final = (1 << 32) - 2  # with the boot in which the records that follow are written
_SYNCED: Final = (1 << 32) - 1  # with the count of pieces' records whose bytes are synced
MAX_JOURNAL_BYTES: Final = 64 << 20  # far longer than any: 40 bytes a piece, each perhaps twice
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


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


class Journal:
    """An open journal. `piece` and `sync` block, and may be called in any thread."""

    def __init__(self, descriptor: int, synced: int) -> None:
        self.file = SharedFile(descriptor)
        self._lock = threading.Lock()
        self._count = synced  # records of pieces
        self._synced = synced  # of these

    def piece(self, journal: int, index: int, got: bytes) -> None:
        """Record that a piece was written; `journal` is a descriptor of `file`.

        Raises:
          OSError: the disk refused.
        """
        with self._lock:
            _append(journal, _record(index + 1, got))
            self._count += 1

    def sync(self, journal: int, data: int) -> None:
        """Sync the bytes of all pieces that were recorded so far, and say so.

        Raises:
          OSError: the disk refused.
        """
        with self._lock:
            count = self._count
        if count > self._synced:
            os.fdatasync(data)
            with self._lock:
                _append(journal, _record(_SYNCED, count.to_bytes(32, "big")))
                self._synced = count


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedPartial:
    """The open files of a partial blob, and the hashes of the pieces that are on the disk."""

    data: SharedFile
    journal: Journal
    hashes: dict[int, bytes]

    def close(self) -> None:
        self.data.close()
        self.journal.file.close()


def open_partial_files(paths: PartialPaths, sizes: PieceMap) -> OpenedPartial:
    """Open or begin a partial blob. Blocks on the disk: call it in a thread.

    What came in other sizes is thrown away. Of the map only the sizes count.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    try:
        with contextlib.ExitStack() as undo:
            hashes = _recover(paths, sizes)
            if hashes is None:
                paths.remove()
                hashes = {}
                write_journal(paths, sizes, {})
                with open(paths.data, "xb"):
                    pass
                fsync_directory(paths.blob.parent)
            data = os.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, data)
            journal = os.open(paths.journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            undo.pop_all()
        return OpenedPartial(SharedFile(data), Journal(journal, len(hashes)), hashes)
    except OSError as error:
        raise disk_error(error, sizes.size, paths.blob.parent) from error


def write_journal(paths: PartialPaths, sizes: PieceMap, hashes: dict[int, bytes]) -> None:
    """Begin a journal of these pieces, whose bytes are synced. Blocks on the disk.

    It takes the place of the one that is there at once, so that a crash loses neither.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    records = [_record(index + 1, got) for index, got in hashes.items()]
    synced = _record(_SYNCED, len(hashes).to_bytes(32, "big"))
    content = _head(sizes) + b"".join(records) + synced + _record(_BOOT, boot_id())
    write_atomically(paths.journal, content)


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


@functools.cache
def boot_id() -> bytes:
    """32 bytes that are another ones after each boot of the machine."""
    try:
        return _BOOT_ID.read_text().strip().replace("-", "").encode()[:32].ljust(32, b"0")
    except OSError:  # then nothing that is not synced outlives the process
        return secrets.token_hex(16).encode()


def _recover(paths: PartialPaths, sizes: PieceMap) -> dict[int, bytes] | None:
    """The pieces that are on the disk, and their hashes; None if there is nothing to go on."""
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
    records: list[tuple[int, bytes]] = []
    synced, boot, read = 0, b"", len(head)
    while read + _RECORD.size <= len(journal):
        number, content, _ = _RECORD.unpack_from(journal, read)
        if journal[read : read + _RECORD.size] != _record(number, content):
            break
        if number == _BOOT:
            boot = content
        elif number == _SYNCED:
            synced = max(synced, min(len(records), int.from_bytes(content, "big")))
        elif 0 < number <= len(sizes):
            records.append((number - 1, content))
        else:
            break
        read += _RECORD.size
    doubtful = [] if boot == boot_id() else records[synced:]
    hashes = {
        index: got
        for index, got in records
        if index * sizes.piece_size + sizes.length_of(index) <= data_size
    }
    if doubtful or read < len(journal) or boot != boot_id() or len(hashes) < len(records):
        _check(paths, sizes, hashes, {index for index, _ in doubtful})
        write_journal(paths, sizes, hashes)
    return hashes


def _check(
    paths: PartialPaths, sizes: PieceMap, hashes: dict[int, bytes], doubtful: set[int]
) -> None:
    """Sync what is here, and forget of the doubtful pieces those that are not what they were."""
    descriptor = os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    try:
        for index in doubtful & hashes.keys():
            whole = hashlib.sha256()
            hash_range(whole, descriptor, index * sizes.piece_size, sizes.length_of(index))
            if whole.digest() != hashes[index]:
                del hashes[index]
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _head(sizes: PieceMap) -> bytes:
    numbers = struct.pack(">QI", sizes.size, sizes.piece_size)
    return _MAGIC + _HEAD.pack(sizes.size, sizes.piece_size, zlib.crc32(numbers))


def _append(journal: int, record: bytes) -> None:
    """Add a record, whole or not at all: nothing would be believed that follows half of one.

    Raises:
      OSError: the disk refused.
    """
    written = os.write(journal, record)
    if written < len(record):  # the disk became full within it
        os.ftruncate(journal, os.fstat(journal).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _record(number: int, content: bytes) -> bytes:
    return _RECORD.pack(number, content, zlib.crc32(number.to_bytes(4, "big") + content))
