"""Small files in which parts of the daemon remember something beyond a restart.

What is in memory counts; the file follows. So a disk that refuses costs what would be known after
a restart, which everybody who keeps a note can find out again, and not the daemon.
"""

import logging
from pathlib import Path
from typing import Generic, TypeVar

from ollamad.peers.identity import write_private
from ollamad.wire.codec import MalformedMessage, decode, encode

log = logging.getLogger(__name__)
T = TypeVar("T")


class Note(Generic[T]):
    """One file, of values of one type. Reading and writing block for a moment."""

    def __init__(self, path: Path, kind: type[T], empty: T) -> None:
        self._path = path
        self._kind = kind
        self._empty = empty
        self._unwritten: T | None = None

    def read(self) -> T:
        """What was written last; `empty` if nothing was, or it is damaged."""
        try:
            return decode(self._path.read_bytes(), self._kind)
        except FileNotFoundError:
            return self._empty
        except (OSError, MalformedMessage) as error:
            log.warning("%s cannot be read and begins anew: %s", self._path, error)
            return self._empty

    def write(self, value: T) -> None:
        """Replace it. If the disk refuses, `catch_up` tries again."""
        try:
            write_private(self._path, encode(value))
        except OSError as error:
            if self._unwritten is None:
                log.warning("%s cannot be written now: %s", self._path, error)
            self._unwritten = value
        else:
            self._unwritten = None

    def catch_up(self) -> None:
        """Write what the disk refused, if it did."""
        if self._unwritten is not None:
            self.write(self._unwritten)
