"""Reads SQLite's write-ahead log before SQLite does, to find what SQLite would drop silently.

SQLite takes the log over up to its first frame that is not valid, and forgets the rest. That is
right for a torn tail and wrong for a flipped bit in the middle, behind which there are
transactions that were synced and acknowledged.

The two can be told apart. A crash damages only the transaction that was being written, the last
one. A frame's checksum goes on from the frame before it, and a transaction is begun only after
the one before it was synced. So where a frame behind the damage goes on from a frame that ends a
transaction, that transaction was durable. Remains of an earlier round of the log have other salts,
and remains of a transaction that was rolled back do not go on from the end of another one. Whether
the last transaction of all is torn or damaged cannot be told here: see `witness.py`.

The layout is that of "The Write-Ahead Log" in SQLite's description of its file format. Of what is
in the pages this knows nothing; it hands out page 1, which holds the version of the tables.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

HEADER_SIZE = 32
FRAME_HEADER_SIZE = 24
LITTLE_MAGIC = 0x377F0682  # checksums are taken over little-endian words
BIG_MAGIC = 0x377F0683

Checksum = tuple[int, int]
ByteOrder = Literal["<", ">"]


@dataclass(frozen=True, slots=True)
class Wal:
    """What SQLite will make of a write-ahead log."""

    frames: int = 0  # that it will take over
    first_page: bytes | None = None  # page 1 as of the last of them, if it is among them
    damage: str = ""  # why it would drop what was synced; empty if it would not


def read_wal(path: Path) -> Wal:
    """Follow the write-ahead log at `path`, which may be missing. Nobody may be writing it.

    Raises:
      OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            header = _Header.parse(file.read(HEADER_SIZE))
            if header is not None:
                return _follow(file, header)
            # It is synced before the first frame, and too short to be torn.
            return Wal(damage="its header is corrupt" if file.read(1) else "")
    except FileNotFoundError:
        return Wal()


def checksum(data: bytes, seed: Checksum, order: ByteOrder) -> Checksum:
    """SQLite's checksum of `data`, a multiple of 8 bytes, going on from another one."""
    first, second = seed
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


@dataclass(frozen=True, slots=True)
class _Header:
    order: ByteOrder
    page_size: int
    salts: bytes
    checksum: Checksum

    @classmethod
    def parse(cls, data: bytes) -> "_Header | None":
        if len(data) < HEADER_SIZE:
            return None
        magic, _, page_size, _, salts, first, second = struct.unpack(">4I8s2I", data)
        if magic not in (LITTLE_MAGIC, BIG_MAGIC):
            return None
        order: ByteOrder = "<" if magic == LITTLE_MAGIC else ">"
        if checksum(data[:24], (0, 0), order) != (first, second):
            return None
        return cls(order, page_size, salts, (first, second))


@dataclass(frozen=True, slots=True)
class _Frame:
    page: int
    ends_transaction: bool
    salts: bytes
    checksum: Checksum
    covered: bytes  # by the checksum

    @classmethod
    def read(cls, file: BinaryIO, page_size: int) -> "_Frame | None":
        data = file.read(FRAME_HEADER_SIZE + page_size)
        if len(data) < FRAME_HEADER_SIZE + page_size:
            return None
        page, pages, salts, first, second = struct.unpack_from(">2I8s2I", data)
        covered = data[:8] + data[FRAME_HEADER_SIZE:]
        return cls(page, pages != 0, salts, (first, second), covered)

    def follows(self, seed: Checksum, order: ByteOrder) -> bool:
        return checksum(self.covered, seed, order) == self.checksum


def _follow(file: BinaryIO, header: _Header) -> Wal:
    seed = header.checksum
    number = taken = 0
    first_page: bytes | None = None  # as of the last transaction that was whole
    newest_first_page: bytes | None = None
    while (frame := _Frame.read(file, header.page_size)) is not None:
        number += 1
        is_next = frame.follows(seed, header.order)
        if not is_next or frame.salts != header.salts or frame.page == 0:
            if _was_synced(file, header, frame, seed):
                return Wal(taken, first_page, f"its frame {number} is corrupt")
            break
        seed = frame.checksum
        if frame.page == 1:
            newest_first_page = frame.covered[8:]
        if frame.ends_transaction:
            taken, first_page = number, newest_first_page
    return Wal(taken, first_page)


def _was_synced(file: BinaryIO, header: _Header, damaged: _Frame, seed: Checksum) -> bool:
    """Whether what follows the damaged frame shows that a transaction was lost with it."""
    order = header.order
    # The damage may be in the frame's own checksum or in its salts.
    seeds = [damaged.checksum, checksum(damaged.covered, seed, order)]
    counts = damaged.salts == header.salts or seeds[0] == seeds[1]
    ended = damaged.ends_transaction and counts
    while (frame := _Frame.read(file, header.page_size)) is not None:
        counts = frame.salts == header.salts
        if ended and counts and any(frame.follows(seed, order) for seed in seeds):
            return True
        ended, seeds = frame.ends_transaction and counts, [frame.checksum]
    return False
