"""What crashes and rot do to the journal's files: all that was acknowledged is read, or none.

Crashes leave a last transaction that was not acknowledged torn in any way, and it is dropped. Rot
is anything else, and stops the start with instructions. The files are made by a store that stays
open, as `kill -9` would leave them.
"""

import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from ollamad.core.ids import NodeId
from ollamad.raft import sqlite_store
from ollamad.raft.errors import JournalFailed
from ollamad.raft.journal import JOIN_AGAIN, Batch, Journal, Snapshot, pack_snapshot
from ollamad.raft.sqlite_store import WAL_SIZE, SqliteStore
from ollamad.raft.wal import FRAME_HEADER_SIZE, HEADER_SIZE, read_wal
from tests.fakes.raft_solo import command

PAGE_SIZE = 4096
FRAME_SIZE = FRAME_HEADER_SIZE + PAGE_SIZE
SECTOR_SIZE = 512
A = NodeId("a")


@dataclass(frozen=True)
class Files:
    """The content of the journal's files, and the last entry that was acknowledged by then."""

    db: bytes
    wal: bytes
    witness: bytes
    acknowledged: int

    @classmethod
    def read(cls, path: Path, acknowledged: int) -> "Files":
        def content(ending: str) -> bytes:
            with suppress(FileNotFoundError):
                return Path(f"{path}{ending}").read_bytes()
            return b""

        wal = content("-wal").rstrip(b"\0")  # the store makes it longer than it is used
        if wal:
            wal += bytes((HEADER_SIZE - len(wal)) % FRAME_SIZE)
        return cls(content(""), wal, content("-witness"), acknowledged)

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        path = directory / "raft.db"
        for ending, data in (("", self.db), ("-wal", self.wal), ("-witness", self.witness)):
            file = Path(f"{path}{ending}")
            file.unlink(missing_ok=True)
            if data:
                file.write_bytes(data)
        Path(f"{path}-shm").unlink(missing_ok=True)
        return path


def batch(first: int, last: int, size: int = 1) -> Batch:
    """Entries whose content follows from their index."""
    add = [(command(f"{index}" * size), index, 1) for index in range(first, last + 1)]
    return Batch(add=add, term=3, voted_for=A, commit_index=1)


async def append(store: SqliteStore, first: int, last: int, size: int = 1) -> None:
    await store.commit(batch(first, last, size))


def load(path: Path) -> int | str:
    """The last entry that a start finds, all before it being there and right; or its complaint."""

    async def play() -> int | str:
        store = SqliteStore(path)
        try:
            stored = await store.load()
            journal = Journal(stored)
        except JournalFailed as error:
            return str(error)
        finally:
            await store.aclose()
        assert [e[1] for e in stored.entries] == list(range(1, len(stored.entries) + 1))
        for text, index, term in stored.entries:
            sizes = {len(command(f"{index}" * size)) for size in (1, 2000)}
            assert len(text) in sizes
            assert text[1:].startswith(f"{index}".encode())
            assert term == 1
        if stored.entries:
            assert (stored.term, stored.voted_for) == (3, A)
        return journal.durable_index

    return trio.run(play)


def refused(outcome: int | str) -> bool:
    """Whether it is a complaint; it must say what to do."""
    if isinstance(outcome, int):
        return False
    assert JOIN_AGAIN in outcome or "start the newer version" in outcome, outcome
    return True


@pytest.fixture(scope="module", autouse=True)
def no_room_in_advance() -> Iterator[None]:
    """Let a WAL end where its last frame ends, but for the test that is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_store, "WAL_SIZE", 0)
        yield


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """The files after each of some commits, of one and more entries, all in one WAL."""
    path = tmp_path_factory.mktemp("history") / "raft.db"
    steps: list[Files] = []

    async def play() -> None:
        store = SqliteStore(path)
        await store.load()
        last = 0
        for count, size in ((1, 1), (2, 1), (1, 2000), (4, 2000), (1, 1), (3, 2000), (1, 1)):
            await append(store, last + 1, last + count, size)
            last += count
            steps.append(Files.read(path, last))
        # Left open until its files were copied.
        await store.aclose()

    trio.run(play)
    return steps


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files after an orderly stop, with entries, a snapshot and free pages."""
    path = tmp_path_factory.mktemp("closed") / "raft.db"

    async def play() -> None:
        store = SqliteStore(path)
        await store.load()
        await append(store, 1, 30, 2000)
        await store.commit(Batch(drop_from=21, term=3, voted_for=A))
        state = random.Random(1).randbytes(20_000)
        blob = pack_snapshot(
            Snapshot(1, (command("1"), 1, 1), (command("2" * 2000), 2, 1), (A,), state)
        )
        await store.commit(Batch(snapshot=blob, term=3, voted_for=A))
        await store.aclose()

    trio.run(play)
    return Files.read(path, 20)


def dense(size: int, step: int = 499) -> list[int]:
    """Offsets: many, with all that are near a boundary of a frame."""
    edges = {0, 1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, size - 1}
    for start in range(HEADER_SIZE, size, FRAME_SIZE):
        edges |= {start - 1, start, start + 1, start + 8, start + FRAME_HEADER_SIZE}
    return sorted(offset for offset in edges | set(range(0, size, step)) if offset < size)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# The write-ahead log.


def test_a_journal_that_was_killed_is_whole(history: list[Files], tmp_path: Path) -> None:
    for files in history:
        assert load(files.write(tmp_path / "d")) == files.acknowledged


def test_a_wal_that_ends_early_is_noticed(history: list[Files], tmp_path: Path) -> None:
    whole = history[-1]
    for length in dense(len(whole.wal)):
        files = replace(whole, wal=whole.wal[:length])
        assert refused(load(files.write(tmp_path / "d"))), length


def test_of_a_wal_that_was_cut_by_a_crash_all_that_was_acknowledged_is_read(
    history: list[Files], tmp_path: Path
) -> None:
    for before, after in pairwise(history):
        for length in dense(len(after.wal), 1009):
            if length >= len(before.wal):
                files = replace(before, wal=after.wal[:length])
                assert load(files.write(tmp_path / "d")) == before.acknowledged


def test_of_a_transaction_that_a_crash_tore_within_the_zeros_nothing_is_read(
    history: list[Files], tmp_path: Path
) -> None:
    for before, after in pairwise(history):
        for length in dense(len(after.wal), 4001):
            if len(before.wal) <= length < len(after.wal):
                zeros = bytes(len(after.wal) - length + 3 * FRAME_SIZE)
                files = replace(before, wal=after.wal[:length] + zeros)
                outcome = load(files.write(tmp_path / "d"))
                assert outcome in (before.acknowledged, after.acknowledged), length
                is_torn = files.wal[: len(after.wal)] != after.wal
                assert outcome == (before if is_torn else after).acknowledged


def test_the_wal_has_its_full_length_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "WAL_SIZE", WAL_SIZE)
    path = tmp_path / "raft.db"
    wal = tmp_path / "raft.db-wal"

    async def play() -> None:
        store = SqliteStore(path)
        await store.load()
        assert wal.stat().st_size == WAL_SIZE
        for index in range(1, 701):  # two pages each: more than it has room for
            await append(store, index, index)
        assert wal.stat().st_size == WAL_SIZE
        await store.aclose()

    trio.run(play)
    assert load(path) == 700


def test_a_flipped_bit_in_the_wal_never_loses_what_was_acknowledged(
    history: list[Files], tmp_path: Path
) -> None:
    rng = random.Random(5)
    whole = history[-1]
    outcomes = []
    for _ in range(300):
        files = replace(whole, wal=flipped(whole.wal, rng.randrange(8 * len(whole.wal))))
        outcome = load(files.write(tmp_path / "d"))
        assert refused(outcome) or outcome == whole.acknowledged
        outcomes.append(refused(outcome))
    assert sum(outcomes) > 290  # what is not covered is two fields of the header


def test_a_flipped_bit_in_any_field_of_a_frame_is_noticed_without_the_witness(
    history: list[Files], tmp_path: Path
) -> None:
    """The witness may be old after a power cut, so the WAL must speak for itself."""
    whole = history[-1]
    last_transaction = (len(history[-2].wal) - HEADER_SIZE) // FRAME_SIZE
    one_before = (len(history[-3].wal) - HEADER_SIZE) // FRAME_SIZE
    path = tmp_path / "raft.db-wal"
    for frame in range(one_before):
        start = HEADER_SIZE + frame * FRAME_SIZE
        for offset in (*range(FRAME_HEADER_SIZE), 40, 2000, FRAME_SIZE - 1):
            for bit in (0, 2, 7):
                path.write_bytes(flipped(whole.wal, 8 * (start + offset) + bit))
                assert read_wal(path).damage == f"its frame {frame + 1} is corrupt"
    # The one before the last is lost only if the very mark of its end is gone.
    for frame in range(one_before, last_transaction):
        start = HEADER_SIZE + frame * FRAME_SIZE
        for offset in (*range(4), *range(8, FRAME_HEADER_SIZE), 40, 2000, FRAME_SIZE - 1):
            path.write_bytes(flipped(whole.wal, 8 * (start + offset)))
            assert read_wal(path).damage == f"its frame {frame + 1} is corrupt"


def test_a_wal_with_a_corrupt_header_is_refused(history: list[Files], tmp_path: Path) -> None:
    path = tmp_path / "raft.db-wal"
    for bit in range(8 * HEADER_SIZE):
        path.write_bytes(flipped(history[-1].wal, bit))
        assert read_wal(path).damage == "its header is corrupt"


def test_a_wal_that_only_began_is_empty(history: list[Files], tmp_path: Path) -> None:
    path = tmp_path / "raft.db-wal"
    for data in (b"", bytes(10), bytes(HEADER_SIZE), history[-1].wal[:HEADER_SIZE]):
        path.write_bytes(data)
        assert (read_wal(path).frames, read_wal(path).damage) == (0, "")


def test_what_is_refused_stays_as_it_is(history: list[Files], tmp_path: Path) -> None:
    wal = flipped(history[-1].wal, 8 * (HEADER_SIZE + 100))
    path = replace(history[-1], wal=wal, witness=b"").write(tmp_path / "d")
    assert refused(load(path))
    assert (path.read_bytes(), Path(f"{path}-wal").read_bytes()) == (history[-1].db, wal)
    assert refused(load(path))


def torn(before: bytes, after: bytes, rng: random.Random) -> bytes:
    """A file on its way from one content to the other, some sectors at a time in any order."""
    grown = before.ljust(len(after), b"\0")
    share = rng.choice((0.1, 0.5, 0.9))
    sectors = range(0, len(after), SECTOR_SIZE)
    kept = [(after if rng.random() < share else grown)[s : s + SECTOR_SIZE] for s in sectors]
    data = b"".join(kept)
    if len(before) < len(after) and rng.random() < 0.2:
        return data[: rng.randrange(len(before), len(after))]
    return data


def test_a_torn_last_transaction_is_dropped_silently(history: list[Files], tmp_path: Path) -> None:
    rng = random.Random(6)
    for _ in range(40):
        for before, after in pairwise(history):
            # The witness says what was acknowledged: all but the torn one.
            files = replace(before, wal=torn(before.wal, after.wal, rng))
            outcome = load(files.write(tmp_path / "d"))
            assert outcome in (before.acknowledged, after.acknowledged)


@pytest.fixture(scope="module")
def second_round(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """The files after commits into a WAL that was begun anew over remains of an earlier round.

    Among the remains are frames of a transaction that was rolled back.
    """
    path = tmp_path_factory.mktemp("second") / "raft.db"
    steps: list[Files] = []

    async def play() -> None:
        store = SqliteStore(path)
        await store.load()
        connection = store._connection
        assert connection is not None
        for index in range(1, 41):
            await append(store, index, index, 2000)
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        connection.execute("PRAGMA cache_size = 10")  # so that it spills before the commit
        await append(store, 41, 42)
        connection.execute("BEGIN IMMEDIATE")
        rows = ((i, bytes(3000)) for i in range(1000, 1025))
        connection.executemany("INSERT INTO entries VALUES (?, 1, 0, ?)", rows)
        connection.execute("ROLLBACK")
        last = 42
        steps.append(Files.read(path, last))
        for count, size in ((1, 1), (1, 1), (4, 2000), (1, 1), (2, 2000), (1, 1)):
            await append(store, last + 1, last + count, size)
            last += count
            steps.append(Files.read(path, last))
        await store.aclose()

    trio.run(play)
    return steps


def test_remains_in_the_wal_are_not_taken_for_damage(
    second_round: list[Files], tmp_path: Path
) -> None:
    frames = (len(second_round[0].wal) - HEADER_SIZE) // FRAME_SIZE
    path = second_round[0].write(tmp_path / "d")
    salts = [second_round[0].wal[HEADER_SIZE + n * FRAME_SIZE + 8 :][:8] for n in range(frames)]
    current = second_round[0].wal[16:24]
    assert salts[-1] != current  # of the earlier round
    assert salts.count(current) > read_wal(Path(f"{path}-wal")).frames + 5  # rolled back
    for files in second_round:
        assert load(files.write(tmp_path / "d")) == files.acknowledged


def test_a_torn_transaction_over_remains_is_dropped_silently(
    second_round: list[Files], tmp_path: Path
) -> None:
    rng = random.Random(7)
    for _ in range(40):
        for before, after in pairwise(second_round):
            files = replace(before, wal=torn(before.wal, after.wal, rng))
            outcome = load(files.write(tmp_path / "d"))
            assert outcome in (before.acknowledged, after.acknowledged)


def test_room_in_advance_changes_nothing(history: list[Files], tmp_path: Path) -> None:
    rng = random.Random(9)
    size = len(history[-1].wal) + 3 * FRAME_SIZE + 100
    for before, after in pairwise(history):
        files = replace(after, wal=after.wal.ljust(size, b"\0"))
        assert load(files.write(tmp_path / "d")) == after.acknowledged
        wal = torn(before.wal.ljust(size, b"\0"), after.wal.ljust(size, b"\0"), rng)
        outcome = load(replace(before, wal=wal).write(tmp_path / "d"))
        assert outcome in (before.acknowledged, after.acknowledged)
    wal = flipped(history[-1].wal, 8 * (HEADER_SIZE + 200)).ljust(size, b"\0")
    assert refused(load(replace(history[-1], wal=wal, witness=b"").write(tmp_path / "d")))


def test_a_wal_that_goes_missing_is_noticed(
    history: list[Files], second_round: list[Files], tmp_path: Path
) -> None:
    outcome = load(replace(second_round[-1], wal=b"").write(tmp_path / "d"))
    assert refused(outcome)
    assert "changes that were acknowledged are missing" in str(outcome)
    outcome = load(replace(history[-1], wal=b"").write(tmp_path / "d"))
    assert refused(outcome)
    assert "empty, but was not before" in str(outcome)  # nothing was in the database yet


def test_a_database_that_goes_missing_is_noticed(closed: Files, tmp_path: Path) -> None:
    outcome = load(replace(closed, db=b"").write(tmp_path / "d"))
    assert refused(outcome)
    assert "missing or empty, but was not before" in str(outcome)


def test_an_old_copy_of_the_database_is_noticed(history: list[Files], tmp_path: Path) -> None:
    old = replace(history[2], witness=history[-1].witness)
    assert refused(load(old.write(tmp_path / "d")))


def test_the_database_of_another_node_is_noticed(
    history: list[Files], closed: Files, tmp_path: Path
) -> None:
    assert refused(load(replace(history[-1], witness=closed.witness).write(tmp_path / "d")))


@pytest.mark.parametrize("witness", [b"", b"garbage", bytes(28)])
def test_without_a_witness_a_whole_journal_is_read(
    history: list[Files], tmp_path: Path, witness: bytes
) -> None:
    path = replace(history[-1], witness=witness).write(tmp_path / "d")
    assert load(path) == history[-1].acknowledged
    assert len(Path(f"{path}-witness").read_bytes()) == 28  # and there is one from now on


def test_an_old_witness_does_no_harm(history: list[Files], tmp_path: Path) -> None:
    files = replace(history[-1], witness=history[0].witness)
    assert load(files.write(tmp_path / "d")) == files.acknowledged


# The database.


def test_a_database_that_ends_early_is_refused(closed: Files, tmp_path: Path) -> None:
    assert not closed.wal
    assert load(closed.write(tmp_path / "d")) == closed.acknowledged
    lengths = {*range(120), *range(0, len(closed.db), 509), *range(0, len(closed.db), PAGE_SIZE)}
    for length in sorted(lengths):
        files = replace(closed, db=closed.db[:length])
        outcome = load(files.write(tmp_path / "d"))
        # The last page is a free one.
        assert refused(outcome) or (outcome == 20 and length > len(closed.db) - PAGE_SIZE), length


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_in_the_database_loses_nothing(
    closed: Files, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    noticed = 0
    for _ in range(150):
        # Half of them where SQLite keeps its own books: headers of the file and of pages.
        byte = rng.choice((rng.randrange(len(closed.db)), rng.randrange(100)))
        if rng.random() < 0.3:
            byte = byte // PAGE_SIZE * PAGE_SIZE + rng.randrange(64)
        files = replace(closed, db=flipped(closed.db, 8 * byte + rng.randrange(8)))
        outcome = load(files.write(tmp_path / "d"))
        if isinstance(outcome, str):
            noticed += 1
        else:
            assert outcome == closed.acknowledged
    assert noticed > 50  # what is unused may change


def test_damaged_blocks_of_the_database_lose_nothing(closed: Files, tmp_path: Path) -> None:
    blocks = range(0, len(closed.db), SECTOR_SIZE)
    for start in blocks:
        for fill in (bytes(SECTOR_SIZE), b"\xff" * SECTOR_SIZE):
            db = closed.db[:start] + fill + closed.db[start + SECTOR_SIZE :]
            outcome = load(replace(closed, db=db).write(tmp_path / "d"))
            assert isinstance(outcome, str) or outcome == closed.acknowledged


def test_a_used_page_among_the_free_ones_is_noticed(closed: Files, tmp_path: Path) -> None:
    """Everything can still be read, but the next writes would go over it."""
    free_list = slice(32, 36)
    assert int.from_bytes(closed.db[free_list]) > 2
    db = closed.db[: free_list.start] + (2).to_bytes(4) + closed.db[free_list.stop :]
    assert refused(load(replace(closed, db=db).write(tmp_path / "d")))


# A process that is killed.


def test_whatever_the_moment_of_a_kill_nothing_acknowledged_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "raft.db"
    rng = random.Random(8)
    last = 0
    for _ in range(60):
        pid, pipe = _start_committing(path, last, rng.getrandbits(32))
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(pipe, "rb") as reading:
            words = reading.read()
        acknowledged = int.from_bytes(words[-4:]) if words else last
        outcome = load(path)
        assert isinstance(outcome, int), outcome
        assert acknowledged <= outcome
        last = outcome
    assert last > 60


def _start_committing(path: Path, last: int, seed: int) -> tuple[int, int]:
    """A child that commits for ever; its process id, and where it says what is acknowledged."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            trio.run(_commit_for_ever, path, last, writing, seed)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


async def _commit_for_ever(path: Path, last: int, pipe: int, seed: int) -> None:
    rng = random.Random(seed)
    store = SqliteStore(path)
    await store.load()
    assert store._connection is not None
    store._connection.execute("PRAGMA wal_autocheckpoint = 40")
    while True:
        count = rng.choice((1, 1, 1, 5, 30))
        await append(store, last + 1, last + count, rng.choice((1, 2000)))
        last += count
        os.write(pipe, last.to_bytes(4))


def test_a_snapshot_that_was_exchanged_is_noticed(closed: Files, tmp_path: Path) -> None:
    path = closed.write(tmp_path / "d")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE snapshot SET data = x'00', sha256 = x'01'")
    connection.close()
    assert "the snapshot is missing or corrupt" in str(load(path))
