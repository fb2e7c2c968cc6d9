"""Formats: what older versions wrote is read, what newer ones wrote is refused and left alone."""

import re
import shutil
import sqlite3
from pathlib import Path

import msgspec
import pytest

from ollamad.core.state import ClusterState, Settings
from ollamad.machine import STATE_FORMAT, Machine
from ollamad.raft.errors import JournalFailed
from ollamad.raft.journal import (
    SNAPSHOT_FORMAT,
    Blob,
    Journal,
    Snapshot,
    pack_snapshot,
    unpack_snapshot,
)
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import FORMAT, SqliteStore
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.raftwire import SNAPSHOT_CHUNK_SIZE, Ack, Install
from tests.data.make_raft_journal import A, B, C, state
from tests.fakes.raft_cluster import Ledger, MemoryDisk
from tests.fakes.raft_solo import Solo

DATA = Path(__file__).parent.parent / "data"
FILES = ("raft.db", "raft.db-wal")


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name in FILES}


async def start(path: Path) -> tuple[Machine, Journal]:
    """What a daemon finds there."""
    machine, store = Machine(), SqliteStore(path)
    try:
        node = RaftNode(A, store, machine, lambda *_: None)
        await node.open()
        return machine, node._journal
    finally:
        await store.aclose()


# The journal.


@pytest.mark.parametrize(("ending", "last"), [("closed", 42), ("killed", 42)])
async def test_a_journal_of_format_1_is_read_and_brought_up_to_date(
    tmp_path: Path, ending: str, last: int
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(DATA / "raft-format-1" / ending, directory)
    path = directory / "raft.db"
    for _ in range(2):
        machine, journal = await start(path)
        assert (journal[0][1], journal[-1][1]) == (1, last)
        assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (7, B)
        assert journal.getRaftCommitIndex() == 38
        assert journal.voters == {A, B, C}
        assert journal.snapshot_index == 36
        assert machine.state == state()
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT,)
        connection.close()


async def test_a_damaged_journal_of_format_1_is_refused(tmp_path: Path) -> None:
    for statement, complaint in (
        ("UPDATE entries SET command = x'00' WHERE idx = 20", "entry 20 is corrupt"),
        ("DELETE FROM entries WHERE idx = 20", "entry 20 is missing"),
        ("DELETE FROM meta", "the term and the vote are missing"),
        ("UPDATE meta SET term = 'seven'", "the term and the vote are corrupt"),
        ("DELETE FROM snapshot; DELETE FROM entries WHERE idx < 5", "does not start at the begin"),
    ):
        directory = tmp_path / complaint
        shutil.copytree(DATA / "raft-format-1" / "closed", directory)
        connection = sqlite3.connect(directory / "raft.db")
        connection.executescript(statement)
        connection.close()
        with pytest.raises(JournalFailed, match=complaint):
            await start(directory / "raft.db")


@pytest.mark.parametrize("ending", ["closed", "killed"])
async def test_a_journal_of_a_newer_format_is_refused_and_left_alone(
    tmp_path: Path, ending: str
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(DATA / "raft-format-1" / ending, directory)
    path = directory / "raft.db"
    await start(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    aside = tmp_path / "aside"
    aside.mkdir()
    if ending == "killed":  # the newer format is told only by the write-ahead log
        for name in FILES:
            shutil.copy(directory / name, aside)
    connection.close()
    if ending == "closed":
        shutil.copy(path, aside)
    before = content(aside)
    assert ("raft.db-wal" in before) == (ending == "killed")
    complaint = f"has format {FORMAT + 1}, this version reads up to {FORMAT}; start the newer"
    with pytest.raises(JournalFailed, match=complaint):
        await start(aside / "raft.db")
    assert content(aside) == before


# The snapshot around the state.


def test_a_snapshot_of_a_newer_format_is_refused() -> None:
    newer = Snapshot(SNAPSHOT_FORMAT + 1, (b"\0", 1, 1), (b"\0", 2, 1), (A,), b"")
    with pytest.raises(JournalFailed, match="start the newer version"):
        unpack_snapshot(pack_snapshot(newer))


def test_a_damaged_snapshot_is_refused() -> None:
    blob = pack_snapshot(Snapshot(SNAPSHOT_FORMAT, (b"\0", 1, 1), (b"\0", 2, 1), (A,), b"x"))
    with pytest.raises(JournalFailed, match="checksum"):
        unpack_snapshot(Blob(blob.data[:-1] + b"?", blob.sha256))


class Picky(Ledger):
    """A state machine that understands no snapshot."""

    def restore(self, data: bytes) -> None:
        raise MalformedMessage("the state has format 9")


def snapshot_of(entry: int) -> Blob:
    before = (b"\0", entry - 1, 1)
    return pack_snapshot(Snapshot(SNAPSHOT_FORMAT, before, (b"\0", entry, 1), (A,), b"state"))


async def test_a_start_with_a_state_that_is_not_understood_is_refused() -> None:
    disk = MemoryDisk()
    disk.entries = {1: (b"\0", 1, 1), 2: (b"\0", 2, 1)}
    disk.meta.term, disk.snapshot = 1, snapshot_of(2)
    node = RaftNode(A, disk, Picky(), lambda *_: None)
    with pytest.raises(JournalFailed, match="the snapshot of the journal: the state has format 9"):
        await node.open()


def test_a_leaders_snapshot_that_is_not_understood_changes_nothing_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    solo = Solo(log="11")
    solo.fence._machine = Picky()
    before = solo.terms()
    for entry in (50, 50, 60):  # the leader tries again, also with a later one
        blob = snapshot_of(entry)
        assert len(blob.data) < SNAPSHOT_CHUNK_SIZE
        solo.receive("b", Install(1, 0, len(blob.data), blob.sha256, blob.data))
        assert solo.take() == [("b", Ack(1, 5, False, False, 0))]
    # What was refused is not even put together again.
    solo.receive("b", Install(1, 0, len(blob.data), blob.sha256, blob.data[:5]))
    assert solo.take() == [("b", Ack(1, 5, False, False, 0))]
    assert solo.terms() == before
    assert solo.core.applied_index() < 50
    complaints = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(complaints) == 1
    assert "leader's snapshot: the state has format 9" in complaints[0]


# The state.


def test_a_state_survives_a_snapshot() -> None:
    machine, other = Machine(), Machine()
    machine.state = state()
    other.restore(machine.snapshot())
    assert other.state == machine.state
    assert other.state.fingerprint() == machine.state.fingerprint()


def test_a_snapshot_says_its_format() -> None:
    assert decode(Machine().snapshot(), dict[str, object])["format"] == STATE_FORMAT


def test_a_state_of_a_version_without_a_format_is_read() -> None:
    machine = Machine()
    machine.restore(encode(state()))
    assert machine.state == state()


def test_versions_without_a_format_read_what_this_one_writes() -> None:
    machine = Machine()
    machine.state = state()
    assert decode(machine.snapshot(), ClusterState) == state()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not a valid"),
        (b"\x80", "not a whole state, it lacks ca, cluster_id, departed, join_tokens, jwt_key"),
        (b"\x90", "not a valid"),
        (encode({"format": 1}), "not a whole state"),
        (encode({"format": STATE_FORMAT + 1}), f"has format {STATE_FORMAT + 1}; this version"),
        (encode({"format": "1"}), "not a valid int"),
        (encode({**msgspec.structs.asdict(state()), "users": 5}), "not a valid ClusterState"),
        (
            encode({**msgspec.structs.asdict(state()), "quotas": {}, "pets": {}}),
            "has format 1 with pets, quotas; this version reads up to format .*start the newer",
        ),
        (encode(state())[:-1], "not a valid"),
    ],
)
def test_what_is_not_a_whole_state_is_refused(data: bytes, complaint: str) -> None:
    changes: list[None] = []
    machine = Machine(lambda: changes.append(None))
    machine.state.settings = Settings(auto_distribution=False)
    with pytest.raises(MalformedMessage, match=complaint):
        machine.restore(data)
    assert machine.state == ClusterState(settings=Settings(auto_distribution=False))
    assert changes == []


async def test_a_state_that_lacks_any_field_of_the_first_version_is_refused(
    tmp_path: Path,
) -> None:
    shutil.copy(DATA / "raft-format-1" / "closed" / "raft.db", tmp_path)
    _, journal = await start(tmp_path / "raft.db")
    assert journal.snapshot_blob is not None
    first = decode(unpack_snapshot(journal.snapshot_blob).state, dict[str, msgspec.Raw])
    assert "format" not in first
    for name in first:
        data = encode({key: value for key, value in first.items() if key != name})
        with pytest.raises(MalformedMessage, match=re.escape(f"it lacks {name}")):
            Machine().restore(data)
