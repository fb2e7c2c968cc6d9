"""The journal's file on a disk without space: refused, not lost, and tried again later."""

import errno
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ollamad.core.ids import NodeId
from ollamad.raft import sqlite_store
from ollamad.raft.errors import DiskFull, JournalFailed
from ollamad.raft.journal import Batch, Journal
from ollamad.raft.sqlite_store import SqliteStore
from tests.fakes.raft_solo import command

DISK_SIZE = 16 << 20  # bytes
PAGE_SIZE = 4096


@pytest.fixture(autouse=True)
def no_room_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "WAL_SIZE", 0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a small file system."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=700", "tmpfs", str(root)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)


def fill(root: Path, but: int = 0) -> Path:
    """Leave no space but for some pages."""
    filler = root / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(64 * PAGE_SIZE)):
            pass
    free = shutil.disk_usage(root).free
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size + free - but * PAGE_SIZE)
    return filler


def batch(first: int, count: int = 1, size: int = 1) -> Batch:
    add = [(command(f"{i}" * size), i, 1) for i in range(first, first + count)]
    return Batch(add=add, term=2, voted_for=NodeId("a"))


async def last_entry(path: Path) -> int:
    store = SqliteStore(path)
    try:
        stored = await store.load()
    finally:
        await store.aclose()
    assert [index for _, index, _ in stored.entries] == list(range(1, len(stored.entries) + 1))
    return Journal(stored).durable_index


async def killed(path: Path, aside: Path) -> int:
    """What a start would find if the process had died now."""
    copy_journal(path, aside)
    return await last_entry(aside / path.name)


def copy_journal(path: Path, aside: Path) -> None:
    aside.mkdir()
    for file in path.parent.glob("raft.db*"):
        shutil.copy(file, aside)


# The space ends in any frame of the transaction, also after it began to spill.
@pytest.mark.parametrize(
    ("free", "pages"), [(0, 1), *((free, 12) for free in range(0, 13, 2)), (3, 700), (300, 700)]
)
async def test_a_full_disk_is_told_and_nothing_is_lost(
    disk: Path, tmp_path: Path, free: int, pages: int
) -> None:
    path = disk / "raft.db"
    store = SqliteStore(path)
    await store.load()
    await store.commit(batch(1, 5))
    filler = fill(disk, but=free)
    for attempt in range(3):
        with pytest.raises(DiskFull, match=r"raft\.db: no space is left on the disk$"):
            await store.commit(batch(6, pages, size=4000))
        assert await killed(path, tmp_path / f"{attempt}") == 5
    filler.unlink()
    await store.commit(batch(6, pages, size=4000))
    assert await killed(path, tmp_path / "after") == 5 + pages
    await store.commit(batch(6 + pages))
    assert await killed(path, tmp_path / "later") == 6 + pages
    await store.aclose()
    assert await last_entry(path) == 6 + pages


async def test_a_full_disk_at_the_end_loses_nothing(disk: Path) -> None:
    path = disk / "raft.db"
    store = SqliteStore(path)
    await store.load()
    await store.commit(batch(1, 100, size=1000))  # more than the database can take now
    filler = fill(disk)
    with pytest.raises(DiskFull):
        await store.commit(batch(101, 100, size=1000))
    await store.aclose()
    assert await last_entry(path) == 100
    filler.unlink()
    assert await last_entry(path) == 100


async def test_a_checkpoint_without_space_loses_nothing(disk: Path, tmp_path: Path) -> None:
    path = disk / "raft.db"
    store = SqliteStore(path)
    await store.load()
    assert store._connection is not None
    store._connection.execute("PRAGMA wal_autocheckpoint = 20")
    for number in range(10):
        await store.commit(batch(1 + 10 * number, 10, size=200))
    await store.commit(Batch(drop_from=1, term=2))
    await store.commit(batch(1, 4, size=200))
    # The log has room to be written over, the database has none to grow.
    size, last = path.stat().st_size, 4
    fill(disk)
    with suppress(DiskFull):
        while True:
            await store.commit(batch(last + 1, 4, size=1500))
            last += 4
    assert last > 4
    assert path.stat().st_size <= size + PAGE_SIZE
    assert await killed(path, tmp_path / "aside") == last
    (disk / "filler").unlink()
    await store.commit(batch(last + 1, 4, size=1500))
    assert path.stat().st_size > size + PAGE_SIZE  # now it went through
    await store.aclose()
    assert await last_entry(path) == last + 4


async def test_a_start_on_a_full_disk(disk: Path) -> None:
    path = disk / "raft.db"
    filler = fill(disk)
    with pytest.raises(JournalFailed, match=r"raft\.db: no space is left on the disk; free some"):
        await last_entry(path)
    filler.unlink()
    store = SqliteStore(path)
    await store.load()
    await store.commit(batch(1, 3))
    await store.aclose()
    # What is there can be read, and the node waits for space like one that runs.
    filler = fill(disk)
    store = SqliteStore(path)
    assert len((await store.load()).entries) == 3
    with pytest.raises(DiskFull):
        await store.commit(batch(4, 30, size=1000))
    filler.unlink()
    await store.commit(batch(4, 30, size=1000))
    await store.aclose()
    assert await last_entry(path) == 33


async def test_a_journal_of_its_largest_size_is_full_too(tmp_path: Path) -> None:
    """The same without a disk of its own."""
    path = tmp_path / "raft.db"
    store = SqliteStore(path)
    await store.load()
    await store.commit(batch(1))
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 10")
    for _ in range(3):
        with pytest.raises(DiskFull):
            await store.commit(batch(2, 30, size=1000))
    store._connection.execute("PRAGMA max_page_count = 1000000")
    await store.commit(batch(2, 30, size=1000))
    await store.aclose()
    assert await last_entry(path) == 31


@pytest.mark.parametrize(
    ("code", "found", "is_full"),
    [
        (sqlite3.SQLITE_FULL, None, True),
        (sqlite3.SQLITE_IOERR_WRITE, errno.EDQUOT, True),
        (sqlite3.SQLITE_IOERR_WRITE, errno.ENOSPC, True),
        (sqlite3.SQLITE_IOERR_WRITE, errno.EIO, False),
        (sqlite3.SQLITE_IOERR_WRITE, None, False),
        (sqlite3.SQLITE_IOERR_FSYNC, errno.ENOSPC, False),
        (sqlite3.SQLITE_IOERR, errno.ENOSPC, False),
        (sqlite3.SQLITE_NOMEM, errno.ENOSPC, False),
        (0, errno.ENOSPC, False),
    ],
)
async def test_only_a_lack_of_space_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, found: int | None, is_full: bool
) -> None:
    """After a failed sync, above all, nobody knows what is on disk."""
    store = SqliteStore(tmp_path / "raft.db")
    await store.load()
    await store.commit(batch(1))

    def fail(*unused: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        if code:
            error.sqlite_errorcode = code
        raise error

    def probe(path: Path, data: bytes) -> int:
        path.touch()
        if found is not None:
            raise OSError(found, "probe")
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_store, "_write", fail)
        patch.setattr(Path, "write_bytes", probe)
        with pytest.raises(DiskFull if is_full else JournalFailed):
            await store.commit(batch(2))
    if is_full:
        await store.commit(batch(2))
    else:
        with pytest.raises(JournalFailed, match="closed"):
            await store.commit(batch(2))
    await store.aclose()
    assert not (tmp_path / "raft.db-probe").exists()
    assert await last_entry(tmp_path / "raft.db") == 1 + is_full


async def test_what_would_leave_a_hole_is_not_written(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "raft.db")
    await store.load()
    await store.commit(batch(1, 3))
    with pytest.raises(JournalFailed, match="entry 5 cannot follow entry 3"):
        await store.commit(batch(5))
    await store.aclose()
    assert await last_entry(tmp_path / "raft.db") == 3
