"""The journal: what is read is what was written, and what was synced is what survives."""

import sqlite3
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.raft.errors import JournalFailed, StateTooLarge
from ollamad.raft.journal import (
    COMPACTION_TAIL,
    COMPACTION_TAIL_BYTES,
    SNAPSHOT_FORMAT,
    Journal,
    Snapshot,
    Stored,
    pack_snapshot,
    unpack_snapshot,
)
from ollamad.raft.sqlite_store import FORMAT, SqliteStore
from ollamad.wire.raftwire import encode_voters
from tests.fakes.raft_cluster import MemoryDisk
from tests.fakes.raft_solo import command

A, B = NodeId("a"), NodeId("b")


def filled(count: int) -> Journal:
    journal = Journal(Stored())
    for index in range(1, count + 1):
        journal.add(command(str(index)), index, 1)
    return journal


async def write(journal: Journal, store: SqliteStore | MemoryDisk) -> None:
    batch = journal.take()
    assert batch is not None
    await store.commit(batch)
    journal.synced()


async def reopened(path: Path) -> Journal:
    store = SqliteStore(path)
    try:
        return Journal(await store.load())
    finally:
        await store.aclose()


async def test_all_that_was_synced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "raft.db"
    store = SqliteStore(path)
    journal = Journal(await store.load())
    assert len(journal) == 0
    journal.add(command("one"), 1, 0)
    journal.add(encode_voters(frozenset({A, B})), 2, 0)
    journal.add(command("three"), 3, 1)
    journal.setCurrentTerm(4, A)
    journal.setRaftCommitIndex(2)
    journal.set_hint(frozenset({B}))
    await write(journal, store)
    journal.add(command("not synced"), 4, 1)
    await store.aclose()
    again = await reopened(path)
    assert again[0:] == journal[0:3]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (4, A)
    assert again.getRaftCommitIndex() == 2
    assert again.voters == {A, B}
    assert again.durable_index == 3
    assert not again.dirty


async def test_sqlite_is_set_to_sync_every_commit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "raft.db")
    await store.load()
    connection = store._connection
    assert connection is not None
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.aclose()


def test_the_durable_index_follows_the_disk_not_the_log() -> None:
    journal = filled(3)
    assert journal.durable_index == 0
    assert journal.take() is not None
    journal.add(command("4"), 4, 1)
    journal.synced()
    assert (journal.durable_index, journal.dirty) == (3, True)


def test_what_is_cut_during_a_sync_is_not_durable_after_it() -> None:
    journal = filled(5)
    assert journal.take() is not None
    journal.deleteEntriesFrom(2)
    journal.add(command("other"), 3, 2)
    journal.synced()
    assert journal.durable_index == 2
    assert journal.take() is not None
    journal.synced()
    assert journal.durable_index == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 5)),
            st.tuples(st.just("cut"), st.integers(1, 8)),
            st.tuples(st.just("drop"), st.integers(1, 8)),
            st.tuples(st.just("renew"), st.integers(2, 9)),
            st.tuples(st.just("sync"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_any_order_of_changes_leaves_disk_and_memory_equal(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        path = Path(directory) / "raft.db"
        store = SqliteStore(path)
        journal = Journal(await store.load())
        journal.add(command("first"), 1, 0)
        term, committed = 1, 1
        for step, number in steps:
            last = journal[-1][1]
            match step:
                case "add":
                    for index in range(last + 1, last + 1 + number):
                        journal.add(command(f"{index}@{term}"), index, term)
                case "cut" if last - number >= committed:
                    journal.deleteEntriesFrom(len(journal) - number)
                    term += 1
                case "drop" if journal[0][1] + number < committed:
                    journal.deleteEntriesTo(number)
                case "renew":
                    snapshot = Snapshot(
                        SNAPSHOT_FORMAT,
                        (command("p"), last + number - 1, term),
                        (command("l"), last + number, term),
                        (A,),
                        b"",
                    )
                    journal.install(pack_snapshot(snapshot), snapshot)
                    committed = snapshot.index
                case "sync" if journal.dirty:
                    await write(journal, store)
        if journal.dirty:
            await write(journal, store)
        await store.aclose()
        again = await reopened(path)
        assert list(again[0:]) == list(journal[0:])
        assert journal.durable_index == journal[-1][1]
        assert again.voters == journal.voters

    with tempfile.TemporaryDirectory() as directory:
        trio.run(play)


async def test_compaction_keeps_a_tail_and_the_voters(tmp_path: Path) -> None:
    path = tmp_path / "raft.db"
    store = SqliteStore(path)
    journal = Journal(await store.load())
    journal.add(command("1"), 1, 0)
    journal.add(encode_voters(frozenset({A, B})), 2, 0)
    for index in range(3, 3001):
        journal.add(command(str(index)), index, 1)
    journal.setRaftCommitIndex(2500)
    journal.compact(b"state", 2500)
    await write(journal, store)
    await store.aclose()
    again = await reopened(path)
    assert again[0][1] == 2500 - COMPACTION_TAIL
    assert again[-1][1] == 3000
    assert again.voters == {A, B}
    assert again.snapshot_blob is not None
    assert unpack_snapshot(again.snapshot_blob).state == b"state"
    assert unpack_snapshot(again.snapshot_blob).index == 2500


def test_the_tail_that_compaction_keeps_is_bounded_in_bytes() -> None:
    def compacted(*sizes: int) -> int:
        """Compact after entries of these sizes and ten more; returns the first that is left."""
        journal = Journal(Stored())
        for index, size in enumerate((1, *sizes), 1):
            journal.add(command("x" * (size - 1)), index, 1)
        for index in range(len(sizes) + 2, len(sizes) + 12):
            journal.add(command("x"), index, 1)
        journal.compact(b"", len(sizes) + 1)
        return journal[0][1]

    mib = 1 << 20
    assert 8 * mib == COMPACTION_TAIL_BYTES
    assert compacted(*[mib] * 20) == 12  # ten: the two that must be, and eight
    assert compacted(*[mib] * 6) == 1
    assert compacted(9 * mib, mib, mib, 8 * mib, 9 * mib) == 3


def test_a_state_that_does_not_fit_into_a_snapshot_leaves_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ollamad.raft.journal.MAX_SNAPSHOT_SIZE", 1000)
    journal = filled(3000)
    with pytest.raises(StateTooLarge, match="limit is 1000"):
        journal.compact(bytes(1000), 2500)
    assert (journal[0][1], journal.snapshot_blob, journal.snapshot_index) == (1, None, 0)


# What must not be trusted.


async def spoil(path: Path, *statements: str) -> None:
    store = SqliteStore(path)
    journal = Journal(await store.load())
    for index in range(1, 6):
        journal.add(command(str(index)), index, 1)
    journal.setRaftCommitIndex(5)
    await write(journal, store)
    await store.aclose()
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("UPDATE entries SET command = x'0041' WHERE idx = 3", "entry 3 is corrupt"),
        ("UPDATE entries SET term = 2 WHERE idx = 3", "entry 3 is corrupt"),
        ("DELETE FROM entries WHERE idx = 3", "entry 3 is missing"),
        ("DELETE FROM entries WHERE idx = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE idx = 5", "the log should end with entry 5"),
        ("DELETE FROM entries", "the log should end with entry 5"),
        ("INSERT INTO entries VALUES (6, 1, 0, x'00')", "entry 6 is corrupt"),
        ("UPDATE entries SET command = 'text' WHERE idx = 3", "entry 3 is corrupt"),
        ("UPDATE entries SET term = 'text' WHERE idx = 3", "entry 3 is corrupt"),
        ("DELETE FROM head", "the term and the vote are missing"),
        ("UPDATE head SET data = data || x'00'", "the term and the vote are corrupt"),
        ("UPDATE head SET data = 0", "the term and the vote are corrupt"),
        ("UPDATE head SET data = x'80'", "the term and the vote are corrupt"),
        ("INSERT INTO snapshot VALUES (1, x'00', x'00')", "the snapshot is missing or corrupt"),
        ("DROP TABLE entries", "no such table: entries; take this node out"),
        (f"PRAGMA user_version = {FORMAT + 1}", f"has format {FORMAT + 1}.*newer version"),
    ],
)
async def test_a_spoilt_journal_is_refused(tmp_path: Path, statement: str, complaint: str) -> None:
    path = tmp_path / "raft.db"
    await spoil(path, statement)
    with pytest.raises(JournalFailed, match=complaint):
        await reopened(path)


async def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "raft.db"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(JournalFailed, match=r"raft\.db: not a journal; take this node"):
        await reopened(path)


async def test_a_second_user_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "raft.db")
    journal = Journal(await store.load())
    journal.add(command("1"), 1, 0)
    await write(journal, store)
    with pytest.raises(JournalFailed, match="it is locked, another process uses it"):
        await reopened(tmp_path / "raft.db")
    await store.aclose()


async def test_after_a_failed_write_nothing_more_is_written(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "raft.db")
    journal = Journal(await store.load())
    journal.add(command("1"), 1, 0)
    await write(journal, store)
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 1")
    store._connection.execute("PRAGMA query_only = 1")  # stands for a disk that fails
    journal.add(command("2"), 2, 0)
    batch = journal.take()
    assert batch is not None
    with pytest.raises(JournalFailed):
        await store.commit(batch)
    with pytest.raises(JournalFailed, match="closed"):
        await store.commit(batch)
