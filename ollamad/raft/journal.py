"""The log as PySyncObj reads it, and what of it is on disk.

Reads come from memory. Changes are staged at once and made durable together, by a `Store` that
the node's run loop awaits; `generation` counts the staged changes, `durable_generation` those
that survive a crash. Who sends a message waits for the generation that it speaks of.

The voters are what the log says (Raft thesis, chapter 4): the last membership entry, committed
or not, else those of the snapshot.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

import msgspec
from pysyncobj.journal import Journal as StockJournal

from ollamad.core.ids import NodeId
from ollamad.raft.errors import JournalFailed, StateTooLarge
from ollamad.wire.raftwire import (
    MAX_SNAPSHOT_SIZE,
    MalformedMessage,
    decode_voters,
    log_entry,
)

LogEntry = tuple[bytes, int, int]  # command with its kind, index, term: PySyncObj's own order

COMPACTION_TAIL = 1024  # entries kept before a snapshot, for followers that are a little late,
COMPACTION_TAIL_BYTES = 8 << 20  # but no more bytes of them; they are in memory
JOIN_AGAIN = (
    "take this node out of the cluster and let it join again with an empty data directory (the "
    "other nodes have all of it); for a cluster of one, restore a backup with `ollamad restore`"
)
SNAPSHOT_FORMAT = 1  # raise it when an older daemon could not read what this one writes


class Snapshot(msgspec.Struct, frozen=True):
    """The state after `entry`, with all that a log needs to go on from there."""

    format: int
    previous: LogEntry  # the entry before; PySyncObj keeps two at the front of a log
    entry: LogEntry
    voters: tuple[NodeId, ...]
    state: bytes  # of the state machine

    @property
    def index(self) -> int:
        """Index of the last entry that the state includes."""
        return self.entry[1]


_snapshot_decoder = msgspec.msgpack.Decoder(Snapshot)


@dataclass(frozen=True, slots=True)
class Blob:
    """An encoded snapshot and its hash, as it is stored and sent."""

    data: bytes
    sha256: bytes


def pack_snapshot(snapshot: Snapshot) -> Blob:
    """Encode a snapshot.

    Raises:
      StateTooLarge: no node would accept it.
    """
    data = msgspec.msgpack.encode(snapshot)
    if len(data) > MAX_SNAPSHOT_SIZE:
        raise StateTooLarge(f"the state has {len(data)} bytes; the limit is {MAX_SNAPSHOT_SIZE}")
    return Blob(data, hashlib.sha256(data).digest())


def unpack_snapshot(blob: Blob) -> Snapshot:
    """Check and decode a snapshot.

    Raises:
      JournalFailed: it is corrupt, or of a format that only a newer version reads.
    """
    if hashlib.sha256(blob.data).digest() != blob.sha256:
        raise JournalFailed("the snapshot does not match its checksum")
    try:
        head = msgspec.msgpack.decode(blob.data, type=_SnapshotHead)
        if head.format > SNAPSHOT_FORMAT:
            raise JournalFailed(
                f"the snapshot has format {head.format}, this version reads up to "
                f"{SNAPSHOT_FORMAT}; start the newer version that wrote it"
            )
        return _snapshot_decoder.decode(blob.data)
    except msgspec.DecodeError as error:
        raise JournalFailed(f"the snapshot cannot be read: {error}") from None


class _SnapshotHead(msgspec.Struct, frozen=True):
    format: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds. Without entries it is a new one."""

    entries: list[LogEntry] = field(default_factory=list)
    term: int = 0
    voted_for: NodeId | None = None
    commit_index: int = 1
    hint: tuple[NodeId, ...] = ()  # voters that a joiner was told, until its log says
    snapshot: Blob | None = None


@dataclass(slots=True)
class Batch:
    """Changes that become durable together, to be carried out in the order of the fields."""

    drop_from: int | None = None  # delete entries with this index and above,
    drop_below: int | None = None  # and below this one,
    add: list[LogEntry] = field(default_factory=list)  # then add
    snapshot: Blob | None = None
    term: int = 0
    voted_for: NodeId | None = None
    commit_index: int = 1
    hint: tuple[NodeId, ...] = ()


class Store(Protocol):
    """Where a journal is kept. One batch is written at a time."""

    async def load(self) -> Stored:
        """All that is stored. Raises JournalFailed if that cannot be trusted."""

    async def commit(self, batch: Batch) -> None:
        """Carry out the batch, whole or not at all; it is durable on return.

        Cancellation abandons a write: it may become durable later, and none may follow it.

        Raises:
          DiskFull: nothing was written; the same batch has to be tried again before any other.
          JournalFailed: nothing more may be written.
        """

    async def aclose(self) -> None:
        """Let go of the files."""


class Journal(StockJournal):  # type: ignore[misc]
    """A log in memory that stages its changes. See the module's docstring."""

    def __init__(self, stored: Stored) -> None:
        self._entries = stored.entries
        self._term = stored.term
        self._voted_for = stored.voted_for
        self._commit_index = stored.commit_index
        self._hint = stored.hint
        self.snapshot_blob = stored.snapshot
        self.snapshot_index = 0
        self._batch = Batch()
        self.generation = 0
        self.durable_generation = 0
        self.term_generation = 0  # the generation that holds the current term and vote
        self.is_blocked = False  # nothing becomes durable until the disk takes it again
        self._durable_index = stored.entries[-1][1] if stored.entries else 0
        self._in_flight: tuple[int, int] | None = None  # generation, last index
        self._base_voters: frozenset[NodeId] | None = None
        self._memberships: list[tuple[int, frozenset[NodeId]]] = []  # in the log, oldest first
        self.bytes_size = 0  # of the commands in memory
        self._adopt(stored)

    def _adopt(self, stored: Stored) -> None:
        entries = stored.entries
        for position, (command, index, _) in enumerate(entries):
            if index != entries[0][1] + position:
                raise JournalFailed(
                    f"entry {entries[0][1] + position} is missing from the journal; {JOIN_AGAIN}"
                )
            self._note(command, index)
        if stored.snapshot is not None:
            snapshot = unpack_snapshot(stored.snapshot)
            if self.term_at(snapshot.index) != snapshot.entry[2]:
                raise JournalFailed("the journal does not go on where its snapshot ends")
            self._base_voters = frozenset(snapshot.voters)
            self.snapshot_index = snapshot.index
        elif entries and entries[0][1] != 1:
            raise JournalFailed("the journal does not start at the beginning, and has no snapshot")
        if entries and not 1 <= self._commit_index <= entries[-1][1]:
            raise JournalFailed("the journal ends before its last committed entry")

    # What the run loop needs.

    @property
    def dirty(self) -> bool:
        """Whether some change is not durable."""
        return self.generation != self.durable_generation

    @property
    def durable_index(self) -> int:
        """Index of the last entry that is durable together with all before it."""
        return self._durable_index

    @property
    def voters(self) -> frozenset[NodeId]:
        """The voters that the log says, committed or not; the joiner's hint before that."""
        if self._memberships:
            return self._memberships[-1][1]
        return self._base_voters or frozenset(self._hint)

    @property
    def says_voters(self) -> bool:
        """Whether the log itself says who votes; a joiner's does not before its first entries."""
        return bool(self._memberships) or self._base_voters is not None

    @property
    def membership_index(self) -> int:
        """Index of the entry that set the voters; 0 when that is not in the log any more."""
        return self._memberships[-1][0] if self._memberships else 0

    def take(self) -> Batch | None:
        """The staged changes, for the store; None if there are none."""
        if self.generation == self.durable_generation:
            return None
        batch = self._fill_meta(self._batch)
        self._batch = Batch()
        self._in_flight = (self.generation, self._entries[-1][1] if self._entries else 0)
        return batch

    def synced(self) -> None:
        """The batch that was taken last is durable."""
        assert self._in_flight is not None
        self.durable_generation, self._durable_index = self._in_flight
        self._in_flight = None

    def last_words(self) -> Batch:
        """A batch for a clean end: it spares the next start what it need not learn again."""
        return self._fill_meta(self._batch)

    def _fill_meta(self, batch: Batch) -> Batch:
        batch.term, batch.voted_for = self._term, self._voted_for
        batch.commit_index, batch.hint = self._commit_index, self._hint
        return batch

    def set_hint(self, voters: frozenset[NodeId]) -> None:
        """Remember whom a joiner was told to be the voters."""
        self._hint = tuple(sorted(voters))
        self._stage()

    def voters_at(self, index: int) -> frozenset[NodeId]:
        """The voters that the log says up to that entry."""
        for at, voters in reversed(self._memberships):
            if at <= index:
                return voters
        return self._base_voters or frozenset(self._hint)

    def term_at(self, index: int) -> int | None:
        """The term of that entry; None if it is not in the log."""
        if not self._entries or not 0 <= index - self._entries[0][1] < len(self._entries):
            return None
        return self._entries[index - self._entries[0][1]][2]

    def compact(self, state: bytes, applied: int) -> None:
        """Put the state in the place of the entries up to `applied`, but for a tail.

        Raises:
          StateTooLarge: nothing has changed.
        """
        first = self._entries[0][1]
        previous, entry = self._entries[applied - first - 1 : applied - first + 1]
        snapshot = Snapshot(
            SNAPSHOT_FORMAT, previous, entry, tuple(sorted(self.voters_at(applied))), state
        )
        self.snapshot_blob = pack_snapshot(snapshot)
        self.snapshot_index = applied
        self._batch.snapshot = self.snapshot_blob
        self.deleteEntriesTo(self._start_of_tail(applied) - first)

    def _start_of_tail(self, applied: int) -> int:
        """Index of the first entry to keep: two at least, as PySyncObj wants."""
        first = self._entries[0][1]
        room = COMPACTION_TAIL_BYTES
        start = applied - 1
        while start > max(first, applied - COMPACTION_TAIL):
            room -= len(self._entries[start - 1 - first][0])
            if room < 0:
                break
            start -= 1
        return start

    def install(self, blob: Blob, snapshot: Snapshot) -> None:
        """Begin anew from another node's snapshot; keep what follows it if that fits (§7)."""
        if self.term_at(snapshot.index) == snapshot.entry[2]:
            kept = self._entries[snapshot.index - self._entries[0][1] + 1 :]
        else:
            kept = []
        self.clear()
        self._base_voters = frozenset(snapshot.voters)
        self.snapshot_blob = self._batch.snapshot = blob
        self.snapshot_index = snapshot.index
        for entry in (snapshot.previous, snapshot.entry, *kept):
            self.add(*entry)
        # The two entries are in the state already, and so are their voters.
        self._memberships = [m for m in self._memberships if m[0] > snapshot.index]

    # What PySyncObj calls, under its names.

    def add(self, command: bytes, idx: int, term: int) -> None:
        entry = (log_entry(command), idx, term)
        self._entries.append(entry)
        self._batch.add.append(entry)
        self._note(entry[0], idx)
        self._stage()

    def clear(self) -> None:
        if self._entries:
            self._cut(self._entries[0][1])
            self._entries = []
        self._memberships = []
        self.bytes_size = 0

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        doomed = self._entries[entryFrom:]
        if not doomed:
            return
        del self._entries[entryFrom:]
        index = doomed[0][1]
        self._cut(index)
        self.bytes_size -= sum(len(command) for command, _, _ in doomed)
        while self._memberships and self._memberships[-1][0] >= index:
            self._memberships.pop()

    def deleteEntriesTo(self, entryTo: int) -> None:
        if entryTo <= 0:
            return
        doomed, self._entries = self._entries[:entryTo], self._entries[entryTo:]
        first = self._entries[0][1]
        batch = self._batch
        batch.drop_below = first
        batch.add = [entry for entry in batch.add if entry[1] >= first]
        self.bytes_size -= sum(len(command) for command, _, _ in doomed)
        self._base_voters = self.voters_at(first)
        self._memberships = [m for m in self._memberships if m[0] > first]
        self._stage()

    @overload
    def __getitem__(self, item: int) -> LogEntry: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[LogEntry]: ...
    def __getitem__(self, item: int | slice) -> LogEntry | Sequence[LogEntry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def _destroy(self) -> None:
        pass

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        self._commit_index = raftCommitIndex  # goes to disk with the next batch: it is a hint

    def getRaftCommitIndex(self) -> int:
        return self._commit_index

    def setCurrentTerm(self, term: int, votedForNodeId: NodeId | None) -> None:
        if (term, votedForNodeId) != (self._term, self._voted_for):
            self._term, self._voted_for = term, votedForNodeId
            self._stage()
            self.term_generation = self.generation

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> NodeId | None:
        return self._voted_for

    def _stage(self) -> None:
        self.generation += 1

    def _cut(self, index: int) -> None:
        batch = self._batch
        batch.add = [entry for entry in batch.add if entry[1] < index]
        if batch.drop_from is None or index < batch.drop_from:
            batch.drop_from = index
        self._durable_index = min(self._durable_index, index - 1)
        if self._in_flight is not None:
            generation, last = self._in_flight
            self._in_flight = (generation, min(last, index - 1))
        self._stage()

    def _note(self, command: bytes, index: int) -> None:
        self.bytes_size += len(command)
        try:
            voters = decode_voters(command)
        except MalformedMessage as error:
            raise JournalFailed(f"entry {index} of the journal: {error}") from None
        if voters is not None:
            self._memberships.append((index, voters))
