"""Remembers which transaction of the journal was acknowledged last, in a small file of its own.

SQLite cannot tell a last transaction that a crash tore from one that was synced, acknowledged, and
damaged or removed later, and it drops either. The witness can: it names the last transaction
whose sync returned, so a journal that ends before it has lost something. It is written after each
sync and not synced itself, as that would double the price of a commit. So it knows all after the
death of a process, and after a power cut it is right too, but may be some seconds old.

Its file also carries the lock that keeps a second process away from the journal.
"""

import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

ID_SIZE = 16  # bytes, random
_LAYOUT = struct.Struct(f">{ID_SIZE}sQ")
_CRC = struct.Struct(">I")
_SIZE = _LAYOUT.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Testimony:
    """The journal of that id has made the transactions up to that number durable."""

    journal_id: bytes
    sequence: int


class Witness:
    """The open file; locked until `close`.

    Raises:
      BlockingIOError: another process has it open.
      OSError: it cannot be opened or made.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self) -> Testimony | None:
        """What it says; None if that is nothing, or not readable."""
        data = os.pread(self._fd, _SIZE, 0)
        if len(data) < _SIZE or _CRC.unpack_from(data, _LAYOUT.size) != (_crc(data),):
            return None
        return Testimony(*_LAYOUT.unpack_from(data))

    def write(self, testimony: Testimony) -> None:
        """Say something else from now on. Takes no space but at the first time."""
        data = _LAYOUT.pack(testimony.journal_id, testimony.sequence)
        os.pwrite(self._fd, data + _CRC.pack(_crc(data)), 0)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _crc(data: bytes) -> int:
    return zlib.crc32(data[: _LAYOUT.size])
