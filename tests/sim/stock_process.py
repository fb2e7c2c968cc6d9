"""One process of stock PySyncObj in the simulation, and what is seen of its defects.

It is ticked like the library's own thread would do it: every 50 ms, after each message, and again
after an exception. It is looked at before and after each step; nothing that is found stops it.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from ollamad.core.ids import NodeId
from tests.sim.process import Clock
from tests.sim.stock_library import (
    SEND_S,
    BugInApplication,
    PageCache,
    Registers,
    StockJournal,
    clock,
    syncobj,
)

if TYPE_CHECKING:
    from tests.sim.stock_cluster import StockCluster

TICK_S = 0.05  # `autoTickPeriod`
LINGERS_S = 2.0  # its longest election timeout is 1.4 s: by now the others have another leader
HEALTHY_S = 0.3  # three heartbeats
UNANSWERED_S = 10.0
SETTLE_S = 60.0  # after all is healed, until the run ends all the same
FLOOD = 200  # messages without content to one node in one tick
STORM = 50_000  # messages in a run; usually there are 2,000, and rarely 10,000
COMPACT_ENTRIES = 40
EXPLODED, CALLED_BACK = "explodes", "its callback explodes"  # commands that show bugs


class Defect(Enum):
    """What a run can show."""

    CUTS_APPLIED = "an entry that was applied is cut off the log"
    UNDOES_MEMBERSHIP = "an applied change of the members is undone"
    STALE_REPLY = "an answer of an earlier term counts for what its sender does not hold"
    OVERCLAIMS = "a node does not hold what it confirmed to its leader, in the same term"
    COMMITS_ALONE = "an entry is committed that no majority holds"
    COUNTS_TWICE = "a node leads without the votes of a majority"
    TWO_LEADERS = "two nodes lead in one term"
    VOTES_TWICE = "a node votes for two in one term"
    FORGETS_TERM = "a node starts in an earlier term than it was in"
    DOES_NOT_START = "a node cannot read its journal"
    LOST = "an acknowledged command is gone"
    DIVERGED = "two nodes apply different commands at one place"
    UNPROVED = "a node commits another entry than its leader has"
    LINGERS = f"a node believes to lead, {LINGERS_S:g} s after it lost the majority"
    NOT_LINEARIZABLE = "clients see what no atomic object shows"
    STALE_READ = "the same, though nothing was lost or done twice: an old value from a leader"
    DEPOSES = "a leader that the majority hears is deposed"
    FAILED_YET_APPLIED = "a command is reported as failed, and is applied"
    UNANSWERED = f"a caller has no answer, {UNANSWERED_S:g} s after all is well again"
    WRONG_ANSWER = "a caller gets the answer to another command"
    APPLIED_TWICE = "a command is applied twice"
    FLOODS = f"over {FLOOD} empty messages to one node in one tick"
    STORM = "the nodes send messages to each other without a pause"
    RAISES = "the library raises an exception of its own"
    STUCK = f"no agreement {SETTLE_S:g} s after all is healed"
    RETRIED = "a method that raises is applied again and again, and all after it waits"
    CALLBACK_TWICE = "a command is applied twice because its callback raised"


@dataclass(frozen=True, slots=True)
class Sent:
    """A message as it travels: a copy, and who sent it in which term."""

    term: int
    is_proposal: bool
    data: bytes


class StockTransport(Transport):  # type: ignore[misc]
    """The library's side of the simulated network."""

    def __init__(self, process: "Process") -> None:
        super().__init__(None, None, [])
        self._process = process

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        return self._process.send(node.id, message)


class HostName(str):
    """The library walks over sets of nodes: their order must not depend on the hash seed."""

    __slots__ = ()

    def __hash__(self) -> int:
        return ord(self)


class Host:
    """A machine: what outlives its processes."""

    def __init__(self, cluster: "StockCluster", number: int) -> None:
        self.number = number
        self.id = NodeId(HostName(chr(ord("A") + number)))
        self.rng = cluster.world.rng(f"stock host {number}")
        self.clock = Clock(cluster.world, self.rng.uniform(0, 1000))
        self.pages = PageCache(lambda: cluster.world.now, cluster.world.rng(f"pages {number}"))
        self.dump_file = str(cluster.directory / f"{number}.dump")
        self.process: Process | None = None
        self.last_process: Process | None = None  # the same, or the one that died
        self.votes: dict[int, NodeId] = {}  # by term, what was sent
        self.told_term = 0
        self.downs = 0
        self.pauses = 0
        self.is_broken = False  # its journal cannot be read; nobody repairs it


class Process:
    """One life of a stock node, watched."""

    def __init__(self, cluster: "StockCluster", host: Host) -> None:
        self.cluster = cluster
        self.host = host
        self.is_dead = False
        self.waiting: dict[str, float] = {}  # since when, by command id
        self._inbox: list[Callable[[], object]] = []
        self._votes: dict[int, set[NodeId]] = {}
        self._heard_at: dict[NodeId, float] = {}
        self._quiet_since = cluster.world.now
        self._led_term = 0
        self._commit = 1
        self._empty_messages = 0
        self._ticks_soon = False
        self.transport = StockTransport(self)
        self.enter()
        conf = syncobj.SyncObjConf(
            autoTick=False,
            autoTickPeriod=TICK_S,
            appendEntriesUseBatch=cluster.uses_batch,
            dynamicMembershipChange=cluster.changes_members,
            journalFile=lambda: StockJournal(host.pages, self._on_cut),
            fullDumpFile=host.dump_file if cluster.compacts else None,
            logCompactionMinEntries=COMPACT_ENTRIES if cluster.compacts else 10**9,
            logCompactionMinTime=10**9,
            useFork=False,
        )
        members = [Node(other.id) for other in cluster.hosts if other is not host]
        self.obj = Registers(
            self._on_apply, Node(host.id), members, conf, nodeClass=Node, transport=self.transport
        )
        if self.obj.raftCurrentTerm < host.told_term:
            self.found(Defect.FORGETS_TERM, f"{self.obj.raftCurrentTerm} after {host.told_term}")

    # What the library is given.

    def enter(self) -> None:
        clock.enter(self.host.clock)

    def start(self) -> None:
        self._tick()

    def wake(self, what: Callable[..., object], *args: Any) -> None:
        """Do that now, or when the process goes on after a pause."""
        if self.is_dead:
            return
        if self.host.pauses:
            self._inbox.append(lambda: what(*args))
        else:
            self.enter()
            what(*args)

    def resume(self) -> None:
        self._quiet_since = self.cluster.world.now
        inbox, self._inbox = self._inbox, []
        for what in inbox:
            self.enter()
            what()

    def _tick(self) -> None:
        """Tick now and every period."""
        if self.is_dead:
            return
        self.cluster.world.after(TICK_S / self.host.clock.rate, self._tick)
        self._tick_once()

    def tick_soon(self) -> None:
        if not self._ticks_soon:
            self._ticks_soon = True
            self.cluster.world.after(0.0, self._tick_once)

    def _tick_once(self) -> None:
        self._ticks_soon = False
        if self.is_dead or self.host.pauses:
            return
        self._empty_messages = 0
        self._run(self.obj.doTick, 0.0)
        self.observe()

    def _run(self, what: Callable[..., object], *args: Any) -> None:
        self.enter()
        try:
            what(*args)
        except BugInApplication:
            pass
        except Exception as error:
            self.found(Defect.RAISES, f"{error!r} in {what.__name__}")

    def send(self, to: NodeId, message: dict[str, Any]) -> bool:
        clock.spend(SEND_S)
        host, term = self.host, self.obj.raftCurrentTerm
        host.told_term = max(host.told_term, term)
        match message["type"]:
            case "response_vote":
                self._votes_for(to)
            case "request_vote":
                self._votes_for(host.id)
            case "append_entries" if message.get("serialized", b"") is None:
                self._empty_messages += 1
                if self._empty_messages > FLOOD:
                    self.found(Defect.FLOODS, f"to {to}")
        sent = Sent(term, message["type"] == "apply_command", pickle.dumps(message))
        return self.cluster.send(host.id, to, sent)

    def _votes_for(self, candidate: NodeId) -> None:
        term = self.obj.raftCurrentTerm
        known = self.host.votes.setdefault(term, candidate)
        if known != candidate:
            self.found(Defect.VOTES_TWICE, f"{known} and {candidate} in term {term}")

    def receive(self, source: NodeId, sent: Sent) -> None:
        """A message arrives; it is looked at before and after the library sees it."""
        message = pickle.loads(sent.data)
        obj, now = self.obj, self.cluster.world.now
        leads, term = self.leads, obj.raftCurrentTerm
        matched = self.private("raftMatchIndex").get(Node(source), 0)
        commit = obj.raftCommitIndex
        contact = self._majority_contact()
        if message["type"] == "response_vote" and message["term"] == term:
            self._votes.setdefault(term, set()).add(source)
        self._run(self.transport._onMessageReceived, Node(source), message)
        match message["type"]:
            case "next_node_idx" if leads:
                self._heard_at[source] = now
                self._check_match(source, matched, sent.term)
            case "request_vote" if leads and not self.leads:
                if now - contact < HEALTHY_S and not self.cluster.transfers_lately():
                    self.found(Defect.DEPOSES, f"by {source}, in term {message['term']}")
            case "append_entries":
                self._check_commit(source, commit)
        self.observe()
        self.tick_soon()

    # What is looked at.

    def found(self, defect: Defect, details: str) -> None:
        self.cluster.found(defect, f"{self.host.id}: {details}")

    def private(self, name: str) -> Any:
        return getattr(self.obj, f"_SyncObj__{name}")

    @property
    def leads(self) -> bool:
        return self.obj._isLeader() and not self.is_dead

    def entry(self, index: int) -> tuple[bytes, int] | None:
        """Command and term; None if the log does not have it."""
        log = self.private("raftLog")
        place = index - self.first_index
        if 0 <= place < len(log):
            command, _, term = log[place]
            return command, term
        return None

    @property
    def first_index(self) -> int:
        log = self.private("raftLog")
        return log[0][1] if len(log) else 0  # it has been seen to empty its own log

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.private("raftLog")) - 1

    def holds(self, index: int, entry: tuple[bytes, int] | None) -> bool:
        """Whether the log has that entry, or has it in a snapshot."""
        return index < self.first_index or self.entry(index) == entry

    @property
    def voters(self) -> list[NodeId]:
        return [self.host.id, *sorted(node.id for node in self.obj.otherNodes)]

    def _majority_contact(self) -> float:
        """When this leader heard last from so many others that they are a majority with it."""
        voters = self.voters
        if len(voters) == 1:
            return self.cluster.world.now
        heard = sorted((self._heard_at.get(v, self._quiet_since) for v in voters[1:]), reverse=True)
        return max(heard[len(voters) // 2 - 1], self._quiet_since)

    def observe(self) -> None:
        """Look at the node after a step."""
        obj, now = self.obj, self.cluster.world.now
        if self.leads:
            term = obj.raftCurrentTerm
            if self._led_term != term:
                self._led_term = term
                self._quiet_since = now
                self._begins_to_lead(term)
            if now - self._majority_contact() > LINGERS_S:
                self.found(Defect.LINGERS, f"in term {term}")
        commit = obj.raftCommitIndex
        if commit > self._commit and self.leads and not self.cluster.had_power_cuts:
            for index in range(self._commit + 1, commit + 1):
                if (chosen := self.entry(index)) is not None:
                    self.cluster.chosen.setdefault(index, chosen)
            entry = self.entry(commit)
            lives = [(v, self.cluster.by_id[v].last_process) for v in self.voters]
            holders = [v for v, life in lives if life is not None and life.holds(commit, entry)]
            if 2 * len(holders) <= len(self.voters):
                self.found(Defect.COMMITS_ALONE, f"entry {commit}, held by {holders}")
        self._commit = commit

    def _begins_to_lead(self, term: int) -> None:
        votes = self._votes.get(term, set()) | {self.host.id}
        if 2 * len(votes) <= len(self.voters):
            self.found(Defect.COUNTS_TWICE, f"{sorted(votes)} of {self.voters}, in term {term}")
        known = self.cluster.leaders.setdefault(term, self.host.id)
        if known != self.host.id:
            self.found(Defect.TWO_LEADERS, f"and {known}, in term {term}")

    def _check_match(self, source: NodeId, before: int, sent_term: int) -> None:
        index = self.private("raftMatchIndex").get(Node(source), 0)
        if index <= before or self.cluster.had_power_cuts:
            return
        other = self.cluster.by_id[source].last_process
        if other is None or other.holds(index, self.entry(index)):
            return
        term = self.obj.raftCurrentTerm
        details = f"{source} up to {index}, sent in term {sent_term}"
        if sent_term < term:
            self.found(Defect.STALE_REPLY, details)
        elif other.obj.raftCurrentTerm == term:  # else a later leader may have overwritten it
            self.found(Defect.OVERCLAIMS, details)

    def _check_commit(self, source: NodeId, before: int) -> None:
        leader = self.cluster.by_id[source].process
        if leader is None or not leader.leads or self.cluster.had_power_cuts:
            return
        for index in range(before + 1, self.obj.raftCommitIndex + 1):
            mine = self.entry(index)
            theirs = leader.entry(index) or self.cluster.chosen.get(index)
            if None not in (mine, theirs) and mine != theirs:
                self.found(Defect.UNPROVED, f"entry {index} of {source}")

    def _on_cut(self, entries: list[Any]) -> None:
        applied = self.obj.raftLastApplied
        for command, index, _ in entries:
            if index <= applied:
                self.found(Defect.CUTS_APPLIED, f"entry {index} of {applied}")
                if command[0] == syncobj._COMMAND_TYPE.MEMBERSHIP:
                    self.found(Defect.UNDOES_MEMBERSHIP, f"entry {index} of {applied}")

    def _on_apply(self, command_id: str) -> None:
        cluster = self.cluster
        if command_id in (EXPLODED, CALLED_BACK):
            cluster.bugs.append((self.host.id, command_id))
            return
        index = self.obj.raftLastApplied + 1
        known = cluster.applied_at.setdefault(index, command_id)
        if known != command_id:
            self.found(Defect.DIVERGED, f"{known} and {command_id} at {index}")
        if command_id in self.obj.applied_ids:
            self.found(Defect.APPLIED_TWICE, f"{command_id} at {index}")
        if command_id in cluster.failed:
            self.found(Defect.FAILED_YET_APPLIED, f"{command_id}: {cluster.failed[command_id]}")
        cluster.applied.add(command_id)
