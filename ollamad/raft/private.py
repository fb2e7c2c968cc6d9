"""The one file that touches PySyncObj's private names.

PySyncObj mangles them (`_SyncObj__…`), so a subclass can override and read them, if it knows
the very version. `check_library` refuses another one, and a test looks up every such name.

What is replaced, at import, in the module `pysyncobj.syncobj`:

- `pickle`: every use raises. Nothing that reaches this node is ever unpickled.
- `createJournal`: hands back our journal, which travels in `conf.journalFile`.
- `createPoller`, `PIPE_NOTIFIER_ENABLED`: no file descriptors, no blocking poll.
- `Serializer`: snapshots are ours (see `_SnapshotSender` and `Core.install`).
- `monotonicTime`: the clock of whichever node runs just now, so that time can be virtual.
"""

import queue
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import pysyncobj.syncobj as stock
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from ollamad.core.ids import NodeId
from ollamad.raft.errors import SafetyViolation, WrongLibrary
from ollamad.raft.journal import Blob, Journal, LogEntry, Snapshot
from ollamad.wire.raftwire import (
    APPEND_BATCH_SIZE,
    MAX_ENTRIES,
    REGULAR,
    SNAPSHOT_CHUNK_SIZE,
    VoterChange,
    decode_change,
)

PINNED_VERSION = "0.3.17"
QUEUE_SIZE = 10_000  # proposals that wait for the next tick; more are told to come back
QUEUE_BYTES = 64 << 20  # of them, in all
SNAPSHOT_WINDOW = 8  # parts to one node without an answer: 2 MiB, 0.2 s at 100 Mbit/s
SNAPSHOT_RESEND_S = 2.0  # without an answer; then one part at a time, until there is one
BATCHES_PER_SEND = 4  # of entries to one node, 8 MiB; the rest with the next heartbeat

FOLLOWER = stock._RAFT_STATE.FOLLOWER
CANDIDATE = stock._RAFT_STATE.CANDIDATE
LEADER = stock._RAFT_STATE.LEADER

SUCCESS: int = FAIL_REASON.SUCCESS
DISCARDED: int = FAIL_REASON.DISCARDED
REQUEST_DENIED: int = FAIL_REASON.REQUEST_DENIED
QUEUE_FULL: int = FAIL_REASON.QUEUE_FULL
MISSING_LEADER: int = FAIL_REASON.MISSING_LEADER
NOT_LEADER: int = FAIL_REASON.NOT_LEADER
LEADER_CHANGED: int = FAIL_REASON.LEADER_CHANGED
UNKNOWN_OUTCOME: int = FAIL_REASON.UNKNOWN_OUTCOME

MAX_DOUBLINGS = 3  # of the range of election timeouts, after elections that nobody won

Callback = Callable[[Any, int], None]  # (result, one of FAIL_REASON)


@dataclass(frozen=True, slots=True)
class Timing:
    """Consensus timing in seconds, for a LAN. An election waits for more than three heartbeats."""

    heartbeat_s: float = 0.1
    election_min_s: float = 0.4
    election_max_s: float = 0.8

    @property
    def attempt_s(self) -> float:
        """How long to wait for one attempt of a proposal before it is sent once more."""
        return 2 * self.election_max_s


class Rules(Protocol):
    """What the library asks of the fence."""

    def apply(self, command: bytes, index: int) -> object: ...
    def may_change_voters(self, voters: frozenset[NodeId]) -> bool: ...


def check_library(version: str = stock.VERSION) -> None:
    """Refuse a PySyncObj that this package was not written for.

    Raises:
      WrongLibrary: with both versions and what to do.
    """
    if version != PINNED_VERSION:
        raise WrongLibrary(
            f"pysyncobj {version} is installed, but this program is made for {PINNED_VERSION} "
            f"only: pip install pysyncobj=={PINNED_VERSION}"
        )


class _NoPickle:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise RuntimeError(f"pysyncobj wanted pickle.{name}; the fence has a hole")


class _NoPoller:
    def poll(self, timeout: float) -> None:
        """Our transport calls `receive`; there is nothing to wait for."""


_clock: Callable[[], float] = time.monotonic


def set_clock(clock: Callable[[], float]) -> None:
    """Say whose clock the library reads until the next call."""
    global _clock
    _clock = clock


def _now() -> float:
    return _clock()


class StepClock:
    """A clock that stands still within `with`, so that all of one step happens at one time.

    The library reads its clock again for each comparison: what the fence looked at before a step
    would be out of date within it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._now: float | None = None

    def __call__(self) -> float:
        return self._clock() if self._now is None else self._now

    def __enter__(self) -> None:
        self._now = self._clock()

    def __exit__(self, *unused: object) -> None:
        self._now = None


class _ProposalQueue:
    """What waits for the next tick, under the names of the library's own queue."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[bytes, object]] = deque()
        self._size = 0

    def put_nowait(self, proposal: tuple[bytes, object]) -> None:
        size = self._size + len(proposal[0])
        if len(self._waiting) >= QUEUE_SIZE or size > QUEUE_BYTES:
            raise queue.Full
        self._waiting.append(proposal)
        self._size = size

    def get_nowait(self) -> tuple[bytes, object]:
        if not self._waiting:
            raise queue.Empty
        proposal = self._waiting.popleft()
        self._size -= len(proposal[0])
        return proposal


@dataclass(slots=True)
class _Transfer:
    """A snapshot on its way to one node."""

    blob: Blob
    index: int  # of the last entry that it includes
    answered_at: float
    sent: int = 0  # bytes
    held: int = 0  # bytes that the node said to hold
    window: int = SNAPSHOT_WINDOW  # parts

    def go_back(self) -> None:
        """Send again what was not answered, carefully: it may only be slow."""
        self.sent, self.window = self.held, 1


class _SnapshotSender:
    """Cuts the snapshot into parts for each node, and paces them by its answers.

    Links keep the order and lose nothing but when they break or are far too slow.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        self._transfers: dict[Node, _Transfer] = {}

    def next_part(self, node: Node) -> tuple[Blob, int] | None:
        """The next part as (snapshot, offset); None: later."""
        # One that is under way goes on, though there be a newer: else a busy log starves it.
        transfer = self._transfers.get(node)
        if transfer is None:
            blob = self._journal.snapshot_blob
            if blob is None:
                return None
            transfer = _Transfer(blob, self._journal.snapshot_index, self._clock())
            self._transfers[node] = transfer
        elif self._clock() - transfer.answered_at >= SNAPSHOT_RESEND_S:
            transfer.go_back()
            transfer.answered_at = self._clock()
        total, offset = len(transfer.blob.data), transfer.sent
        if offset >= total or offset - transfer.held >= transfer.window * SNAPSHOT_CHUNK_SIZE:
            return None
        transfer.sent = min(offset + SNAPSHOT_CHUNK_SIZE, total)
        return transfer.blob, offset

    def answered(self, node: Node, held: int) -> bool:
        """The node has so many bytes. Returns whether that is more than it had."""
        transfer = self._transfers.get(node)
        if transfer is None or held == transfer.held:
            return False
        if held >= len(transfer.blob.data):
            return False  # of another snapshot: who has the whole of this one says so otherwise
        is_more = held > transfer.held
        transfer.answered_at = self._clock()
        transfer.held = held
        if is_more:
            transfer.sent = max(transfer.sent, held)
            transfer.window = SNAPSHOT_WINDOW
        else:
            transfer.go_back()  # it has lost what it had
        return is_more

    def completed(self, node: Node, next_index: int) -> None:
        """The node holds all before that entry."""
        transfer = self._transfers.get(node)
        if transfer is not None and next_index > transfer.index:
            del self._transfers[node]

    def interrupted(self, node: Node) -> None:
        """The link broke; when it is back, go on with what the node has."""
        transfer = self._transfers.get(node)
        if transfer is not None:
            transfer.go_back()

    def forget_outdated(self, connected: set[Node]) -> None:
        """Let go the old snapshots that only nodes which are away were to get."""
        for node, transfer in list(self._transfers.items()):
            if node not in connected and transfer.blob is not self._journal.snapshot_blob:
                del self._transfers[node]

    def clear(self) -> None:
        self._transfers.clear()


stock.pickle = _NoPickle()
stock.createJournal = lambda journal: journal
stock.createPoller = lambda kind: _NoPoller()
stock.PIPE_NOTIFIER_ENABLED = False
stock.Serializer = lambda *unused: None
stock.monotonicTime = _now


class _MatchIndex(dict[Node, int]):
    """The last entry that each node is known to hold durably; an old answer does not lower it."""

    def __setitem__(self, node: Node, index: int) -> None:
        # The library sets 0 at the start of a term; else this only grows.
        super().__setitem__(node, max(index, self.get(node, 0)) if index else 0)


class Core(SyncObj):  # type: ignore[misc]
    """PySyncObj with its private parts replaced where they are unsafe."""

    def __init__(
        self,
        self_id: NodeId,
        journal: Journal,
        transport: Transport,
        rules: Rules,
        timing: Timing,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        set_clock(clock)
        self.clock = clock
        self.journal = journal
        self._rules = rules
        self._timing = timing
        self._rng = rng
        self._hand_over = (0, float("-inf"))  # the term in which it began, and its end
        self._heir_was_told = False
        self._may_campaign = False  # in this tick
        self.fruitless_elections = 0  # that this node began since it last knew of a leader
        conf = SyncObjConf(
            autoTick=False,
            appendEntriesUseBatch=True,  # the run loop sends as soon as there is something
            appendEntriesPeriod=timing.heartbeat_s,
            appendEntriesBatchSizeBytes=APPEND_BATCH_SIZE,
            raftMinTimeout=timing.election_min_s,
            raftMaxTimeout=timing.election_max_s,
            leaderFallbackTimeout=timing.election_max_s,
            connectionTimeout=timing.election_max_s,  # of its TCP transport; only checked
            commandsWaitLeader=False,
            dynamicMembershipChange=True,
            journalFile=journal,
            useFork=False,
        )
        voters = [Node(voter) for voter in journal.voters - {self_id}]
        super().__init__(Node(self_id), voters, conf, nodeClass=Node, transport=transport)
        self._fenced_transport = transport
        self._snapshots = _SnapshotSender(journal, clock)
        self._SyncObj__commandsQueue = _ProposalQueue()
        self._SyncObj__raftMatchIndex = _MatchIndex()
        for node in voters:
            self._SyncObj__raftNextIndex[node] = self.last_index() + 1
            self._SyncObj__raftMatchIndex[node] = 0
        # Ids of requests must not repeat after a restart: an old answer would be taken for new.
        self._SyncObj__commandsLocalCounter = rng.getrandbits(62)  # grows from there

    # Overrides of unsafe parts.

    def _SyncObj__doApplyCommand(self, command: bytes) -> object:
        if command[0] != REGULAR:
            return None
        return self._rules.apply(command[1:], self._SyncObj__raftLastApplied + 1)

    def _SyncObj__parseChangeClusterRequest(self, command: bytes) -> VoterChange | None:
        return decode_change(command)

    def _SyncObj__changeCluster(self, change: VoterChange) -> bool:
        if self.journal.voters != frozenset(change.base):
            return False  # made before another change, or sent twice
        return self._rules.may_change_voters(frozenset(map(NodeId, change.wanted)))

    def _SyncObj__doChangeCluster(self, voters: object, reverse: bool = False) -> bool:
        return True  # the voters follow from the log: see `use_voters`

    def _SyncObj__tryLogCompaction(self) -> None:
        pass  # the run loop calls `compact`

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        raise AssertionError("snapshots come through `install` only")

    def _SyncObj__getEntries(
        self, fromIDx: int | None, count: int | None = None, maxSizeBytes: int | None = None
    ) -> list[LogEntry]:
        # So a leader asks for the next entry to commit. The library counts its own node for every
        # entry in its log; what our disk lacks may travel (thesis, 10.2.1), but is not committed.
        if count == 1 and self.state() == LEADER and (fromIDx or 0) > self.journal.durable_index:
            return []
        entries: list[LogEntry] = super()._SyncObj__getEntries(fromIDx, count, maxSizeBytes)
        return entries

    def _SyncObj__connectedToAnyone(self) -> bool:
        # What the library asks last before it starts an election.
        return self._may_campaign and bool(super()._SyncObj__connectedToAnyone())

    def _SyncObj__setState(self, newState: int) -> None:
        if newState == CANDIDATE and not self._may_campaign:
            raise SafetyViolation("the library started an election by itself")
        super()._SyncObj__setState(newState)

    def _SyncObj__generateRaftTimeout(self) -> float:
        # Where the votes of an election take longer than the candidates' timeouts differ, they
        # split them again and again: with each one the timeouts differ more.
        least_s, most_s = self._timing.election_min_s, self._timing.election_max_s
        doublings = min(max(0, self.fruitless_elections - 1), MAX_DOUBLINGS)
        return self._rng.uniform(least_s, least_s + (most_s - least_s) * (1 << doublings))

    def _checkCommandsToApply(self) -> None:
        # The heir of a leader must have its whole log, and under load it never has (thesis, 3.10).
        # What waits here meanwhile is told to go to the next leader.
        if not self._is_handing_over():
            super()._checkCommandsToApply()

    def _SyncObj__deleteEntriesFrom(self, fromIDx: int) -> None:
        if fromIDx <= self.commit_index():
            raise SafetyViolation(f"asked to delete committed entry {fromIDx}")
        self.journal.deleteEntriesFrom(fromIDx - self.first_index())

    def _SyncObj__sendAppendEntries(self) -> None:
        # The library's own pickles entries above its batch size, and where a snapshot is not
        # ready it sends empty messages for a whole heartbeat without a pause.
        self._SyncObj__newAppendEntriesTime = self.clock() + self._timing.heartbeat_s
        connected = self._SyncObj__connectedNodes
        self._snapshots.forget_outdated(connected)
        for node in (self._SyncObj__otherNodes | self._SyncObj__readonlyNodes) & connected:
            if self._SyncObj__raftNextIndex[node] <= self.first_index():
                if not self._send_parts(node):
                    self._send_part(node, None)  # a heartbeat
            else:
                self._send_entries(node)

    def _send_parts(self, node: Node) -> bool:
        """Send as much of the snapshot as may be under way. Returns whether there was any."""
        part = self._snapshots.next_part(node)
        if part is None:
            return False
        while part is not None:
            self._send_part(node, part)
            part = self._snapshots.next_part(node)
        return True

    def _send_part(self, node: Node, part: tuple[Blob, int] | None) -> None:
        message = {"type": "append_entries", "term": self.term(), "commit_index": 0}
        self._fenced_transport.send(node, {**message, "serialized": part})

    def _send_entries(self, node: Node) -> None:
        sending = self._SyncObj__raftNextIndex
        for _ in range(BATCHES_PER_SEND):
            next_index = sending[node]
            entries = self._SyncObj__getEntries(next_index, MAX_ENTRIES, APPEND_BATCH_SIZE)
            message = {
                "type": "append_entries",
                "term": self.term(),
                "commit_index": self.commit_index(),
                "entries": entries,
                "prevLogIdx": next_index - 1,
                "prevLogTerm": self.journal.term_at(next_index - 1),
            }
            self._fenced_transport.send(node, message)
            if not entries:
                return
            sending[node] = entries[-1][1] + 1
            if sending[node] > self.last_index():
                return

    # Reads. Methods, because the library walks over its own attributes while it is half made.

    def state(self) -> int:
        return int(self._SyncObj__raftState)

    def term(self) -> int:
        return int(self._SyncObj__raftCurrentTerm)

    def leader_id(self) -> NodeId | None:
        leader = self._SyncObj__raftLeader
        return None if leader is None else NodeId(leader.id)

    def first_index(self) -> int:
        return self.journal[0][1]

    def last_index(self) -> int:
        return self.journal[-1][1]

    def commit_index(self) -> int:
        return int(self._SyncObj__raftCommitIndex)

    def applied_index(self) -> int:
        return int(self._SyncObj__raftLastApplied)

    def term_start_index(self) -> int:
        """Index of the no-op with which this node began as a leader."""
        return int(self._SyncObj__noopIDx or 0)

    def election_deadline(self) -> float:
        return float(self._SyncObj__raftElectionDeadline)

    def next_heartbeat(self) -> float:
        return float(self._SyncObj__newAppendEntriesTime)

    def transfer_in_progress(self) -> bool:
        return bool(self._SyncObj__transferInProgress)

    def has_other_voters(self) -> bool:
        return bool(self._SyncObj__otherNodes)

    def is_follower_of_mine(self, node_id: NodeId) -> bool:
        """Whether this node, as a leader, sends entries to that one."""
        return Node(node_id) in self._SyncObj__raftMatchIndex

    def match_index(self, node_id: NodeId) -> int:
        """The last entry that the node is known to hold durably, whatever our own disk holds."""
        return int(self._SyncObj__raftMatchIndex.get(Node(node_id), 0))

    def last_heard(self, node_id: NodeId) -> float:
        """When that node answered this leader last."""
        return float(self._SyncObj__lastResponseTime.get(Node(node_id), float("-inf")))

    def is_connected(self, node_id: NodeId) -> bool:
        return Node(node_id) in self._SyncObj__connectedNodes

    # Changes.

    def deliver(self, sender: NodeId, message: dict[str, Any]) -> None:
        """Hand a checked message to the library."""
        set_clock(self.clock)
        self._SyncObj__onMessageReceived(Node(sender), message)

    def deliver_ack(self, sender: NodeId, next_index: int, success: bool, reset: bool) -> None:
        """Take an answer in, without sending again what is still on its way."""
        sending = self._SyncObj__raftNextIndex
        node = Node(sender)
        before = sending[node]
        message = {
            "type": "next_node_idx",
            "next_node_idx": next_index,
            "reset": reset,
            "success": success,
        }
        self.deliver(sender, message)
        if success:
            self._snapshots.completed(node, next_index)
        if success and not reset:
            sending[node] = max(before, next_index)
        elif reset:
            # Of several messages on the way each is refused: the first refusal goes back furthest.
            sending[node] = min(before, next_index)

    def tick(self, may_campaign: bool = False) -> None:
        """Let the library do what is due; with `may_campaign` an election too, at once."""
        set_clock(self.clock)
        if may_campaign:
            self.call_election()
        self._may_campaign = may_campaign
        try:
            self.doTick(0.0)
        finally:
            self._may_campaign = False
        if self.state() != LEADER:
            self._snapshots.clear()

    def snapshot_answered(self, sender: NodeId, held: int) -> None:
        """That node has so many bytes of the snapshot: send it what comes next."""
        node = Node(sender)
        if self._snapshots.answered(node, held):
            self._send_parts(node)

    def apply_committed(self) -> None:
        """Bring the state machine up to the commit index without taking part in anything."""
        set_clock(self.clock)
        self._SyncObj__applyLogEntries()

    def send_appends(self) -> None:
        set_clock(self.clock)
        self._SyncObj__sendAppendEntries()

    def submit(self, command: bytes, callback: Callback) -> None:
        """Queue a command of any kind for the next tick."""
        set_clock(self.clock)
        self._applyCommand(command, callback)

    def begin_hand_over(self) -> None:
        """Add nothing to the log until another voter leads, or for one election timeout.

        After an attempt that failed the log stays open for as long before there is another.
        """
        term, until = self._hand_over
        if term != self.term() or self.clock() >= until + self._timing.election_min_s:
            self._hand_over = (self.term(), self.clock() + self._timing.election_min_s)
            self._heir_was_told = False

    def hand_over_if_due(self) -> None:
        """While handing over: once a voter has the whole log, tell it to lead."""
        set_clock(self.clock)
        if self._is_handing_over() and not self._heir_was_told:
            self.transferLeadership(callback=self._heir_answer)

    def _is_handing_over(self) -> bool:
        term, until = self._hand_over
        return self.state() == LEADER and self.term() == term and self.clock() < until

    def _heir_answer(self, result: object, error: int) -> None:
        self._heir_was_told = error == SUCCESS

    def forget(self, callback: Callback) -> None:
        """Nobody waits for that forwarded command any more."""
        waiting = self._SyncObj__commandsWaitingReply
        for request_id in [key for key, known in waiting.items() if known is callback]:
            del waiting[request_id]

    def connected(self, node_id: NodeId) -> None:
        node = Node(node_id)
        if node in self._SyncObj__otherNodes:
            self._SyncObj__onNodeConnected(node)
        else:
            self._SyncObj__onReadonlyNodeConnected(node)

    def disconnected(self, node_id: NodeId) -> None:
        node = Node(node_id)
        self._snapshots.interrupted(node)
        if node in self._SyncObj__otherNodes:
            self._SyncObj__onNodeDisconnected(node)
        else:
            self._SyncObj__onReadonlyNodeDisconnected(node)

    def use_voters(self, voters: Iterable[NodeId]) -> None:
        """Make these the voters; whoever is connected and no voter is fed as a learner."""
        set_clock(self.clock)
        wanted = {Node(voter) for voter in voters} - {self.selfNode}
        current = set(self._SyncObj__otherNodes)
        if wanted == current:
            return
        sending, held = self._SyncObj__raftNextIndex, self._SyncObj__raftMatchIndex
        progress = {node: (sending[node], held.get(node, 0)) for node in wanted if node in sending}
        self._SyncObj__readonlyNodes -= wanted
        self._SyncObj__updateClusterConfiguration(list(wanted))
        for node, (next_index, match_index) in progress.items():
            sending[node], held[node] = next_index, match_index
        for node in wanted - current:
            self._SyncObj__lastResponseTime[node] = self.clock()
        for node in (current - wanted) & self._SyncObj__connectedNodes:
            self._SyncObj__onReadonlyNodeConnected(node)

    def step_down(self, term: int) -> None:
        """Follow nobody, in that term if it is a later one."""
        set_clock(self.clock)
        if term > self.term():
            self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__setState(FOLLOWER)
        self.lose_leader()

    def lose_leader(self) -> None:
        """Nobody leads any more as far as this node knows; wait a while before an election."""
        set_clock(self.clock)
        self._SyncObj__raftLeader = None
        self._SyncObj__onLeaderChanged()
        self.postpone_election()

    def postpone_election(self) -> None:
        # A leadership that could not be taken over at once must not be taken later on.
        self._SyncObj__transferInProgress = False
        self._SyncObj__raftElectionDeadline = self.clock() + self._SyncObj__generateRaftTimeout()

    def call_election(self) -> None:
        """Let an election be due now."""
        self._SyncObj__raftElectionDeadline = float("-inf")

    def start_from(self, snapshot_index: int) -> None:
        """The state machine was restored to that entry."""
        self._SyncObj__raftLastApplied = snapshot_index
        self._SyncObj__raftCommitIndex = max(self.commit_index(), snapshot_index)

    def install(self, blob: Blob, snapshot: Snapshot) -> None:
        """Take over a snapshot whose state the state machine has already restored."""
        self.journal.install(blob, snapshot)
        self.start_from(snapshot.index)
        self.journal.setRaftCommitIndex(self.commit_index())
        waiting = self._SyncObj__commandsWaitingCommit
        for index in [index for index in waiting if index <= snapshot.index]:
            for _, callback in waiting.pop(index):
                callback(None, UNKNOWN_OUTCOME)
