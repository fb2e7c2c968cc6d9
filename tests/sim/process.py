"""One process of a daemon: the real node, with a checker that looks over its shoulder.

The node's classes are the product's own; the subclasses here only watch, and stand still while
the process is stopped by a signal.
"""

import math
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from ollamad.core.ids import NodeId
from ollamad.machine import Machine
from ollamad.raft import Links, RaftError, RaftNode
from ollamad.raft.journal import Blob, Journal, Snapshot, Stored
from ollamad.raft.private import CANDIDATE, LEADER
from ollamad.wire.raftwire import (
    VOTER_CHANGE,
    Ack,
    AskRead,
    Forward,
    MalformedMessage,
    Placed,
    PreVote,
    TakeOver,
    Vote,
    VoteRequest,
    decode,
)
from tests.sim.checks import Checker, Log
from tests.sim.disk import DiskHandle, LivingStored
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster, Host

T = TypeVar("T")


QUORUM_S = 0.2  # beyond an election timeout, as a leader looks with each heartbeat
STEP_S = 1e-5  # what a step takes at least: without it, time could stand still


class WatchedJournal(Journal):
    """A journal that tells the checker what becomes of its log."""

    def __init__(self, stored: Stored) -> None:
        assert isinstance(stored, LivingStored)
        assert stored.life is not None
        self.life = stored.life
        self.checker = stored.life.checker
        self.log = stored.life.log
        self.checker.log_opened(self.log, stored.entries)
        super().__init__(stored)

    def add(self, command: bytes, idx: int, term: int) -> None:
        if command[0] == VOTER_CHANGE:
            self._check_change()
        super().add(command, idx, term)
        self.checker.appended(self.log, self._entries[-1])

    def _check_change(self) -> None:
        """A leader changes the voters only when the last change and its own term are committed."""
        core = self.life.node._core
        commit = core.commit_index()
        if core.state() == LEADER and (
            commit < self.membership_index or self.term_at(commit) != core.term()
        ):
            self.checker.violated(
                "one change at a time",
                f"{self.log.host} changes the voters in term {core.term()} when {commit} is "
                f"committed, of term {self.term_at(commit)}, and the last change is "
                f"{self.membership_index}",
            )

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom < len(self._entries):
            self.checker.cut(self.log, self._entries[entryFrom][1])
            self.life.count("logs truncated")
        super().deleteEntriesFrom(entryFrom)

    def deleteEntriesTo(self, entryTo: int) -> None:
        super().deleteEntriesTo(entryTo)
        if entryTo > 0:
            applied = self.life.node.applied_index
            self.checker.compacted(self.log, self._entries[0][1], applied)

    def compact(self, state: bytes, applied: int) -> None:
        self.checker.snapshot(self.log, applied, state)
        self.life.count("snapshots made")
        super().compact(state, applied)

    def clear(self) -> None:
        super().clear()
        self.log.hashes = []

    def install(self, blob: Blob, snapshot: Snapshot) -> None:
        before = Log(self.log.host, self.log.first, self.log.hashes)
        super().install(blob, snapshot)
        self.checker.installed(self.log, before, snapshot.index)
        self.checker.snapshot(self.log, snapshot.index, snapshot.state)
        self.life.count("snapshots installed")
        self.life.note("installs a snapshot", snapshot.index)


class WatchedNode(RaftNode):
    """A node that is looked at after each of its steps."""

    def __init__(self, life: "Life", *args: Any, **kwargs: Any) -> None:
        self.life = life
        self.heard: dict[NodeId, float] = {}  # when a frame of each came last
        self._electorate: tuple[int, frozenset[NodeId], float] = (0, frozenset(), 0.0)
        self._candidacy: tuple[int, frozenset[NodeId]] = (0, frozenset())
        super().__init__(*args, **kwargs)

    def receive(self, sender: NodeId, frame: bytes) -> None:
        life = self.life
        if life.world.trace:
            life.note(f"  from {sender}", decode(frame))
        self.heard[sender] = life.host.clock()
        try:
            super().receive(sender, frame)
        except MalformedMessage as error:
            if not life.is_dead:
                life.checker.violated("messages make sense", f"{life.host.id}: {error}")
        self.observe()
        if frame[1:5] == _ACK and self._core.state() == LEADER and not life.is_dead:
            life.checker.counted(life.log, sender, self._core.match_index(sender))

    def _tick(self) -> float:
        if self.life.is_still:
            return math.inf
        idle_s = super()._tick()
        self.observe()
        if self._core.state() == LEADER:
            self._check_quorum()
        return max(idle_s / self.life.host.clock.rate, STEP_S)

    def _check_quorum(self) -> None:
        """A leader that hears no majority must not go on (Raft thesis, 6.2)."""
        now, voters, term = self.life.host.clock(), self._journal.voters, self._core.term()
        if self._electorate[:2] != (term, voters):
            self._electorate = (term, voters, now)
        since = now - self.life.cluster.scenario.timing.election_max_s - QUORUM_S
        if self._electorate[2] > since:
            return
        heard = [v for v in voters if v == self.id or self.heard.get(v, 0.0) >= since]
        if 2 * len(heard) <= len(voters):
            self.life.checker.violated(
                "leaders without a majority step down",
                f"{self.id} leads term {term} and has heard of {heard} since {now - since:g} s",
            )

    def apply(self, command: bytes, index: int) -> object:
        life = self.life
        outcome = super().apply(command, index)
        if not life.is_dead:
            assert isinstance(outcome, bytes), outcome
            life.checker.applies(life.log, index, command, outcome)
        return outcome

    def stood_before(self, term: int) -> frozenset[NodeId]:
        """The voters when it became a candidate in that term; its request leaves after the sync."""
        return self._candidacy[1] if self._candidacy[0] == term else self._journal.voters

    def observe(self) -> None:
        life, core = self.life, self._core
        if life.is_dead:
            return  # what it decides now nobody will know
        log, term, commit = life.log, core.term(), core.commit_index()
        if core.state() == CANDIDATE and self._candidacy[0] != term:
            self._candidacy = term, self._journal.voters
        leads = core.state() == LEADER
        if term != log.term:
            life.note("enters term", term)
        if leads and log.led_term != term:
            life.note("LEADS term", term, log.first, log.last)
            life.count("leaders")
        electors = self._journal.voters if leads else None
        if commit != log.commit:
            life.note("commits", log.commit + 1, commit)
            if electors is not None:
                entry = self._journal[commit - core.first_index()]
                holders = life.cluster.holders(entry, electors)
                life.checker.led_to_commit(log, commit, electors, holders)
        life.checker.observe(log, term, commit, core.applied_index(), electors)


class Clock:
    """A host's clock, which may be fast or slow, and moves on while it is being read."""

    def __init__(self, world: World, offset_s: float, creep_s: float = 0.0) -> None:
        self._world = world
        self._creep_s = creep_s
        self._since = world.now
        self._then = world.now + offset_s
        self.rate = 1.0

    def __call__(self) -> float:
        self._then += self._creep_s
        return self._then + (self._world.now - self._since) * self.rate

    def set_rate(self, rate: float) -> None:
        self._then, self._since = self(), self._world.now
        self.rate = rate


class Gone(Exception):
    """The process died before it answered."""


class Life:
    """One process: from a start to a crash, a failure or a stop in good order."""

    def __init__(self, host: "Host", cluster: "Cluster") -> None:
        self.host = host
        self.cluster = cluster
        self.world = cluster.world
        self.checker: Checker = cluster.checker
        self.log = Log(host.id)
        self.machine = Machine()
        self.disk = DiskHandle(host.disk, self)
        self.scope = trio.CancelScope()
        self.is_dead = False
        self.is_running = False
        self.frames_to_death: int | None = None
        self.told: set[NodeId] = set()  # the peers that it believes to be connected
        self.links: Links | None = None
        self.nursery: trio.Nursery | None = None
        self._calls: set[trio.CancelScope] = set()
        self.node = WatchedNode(
            self,
            host.id,
            self.disk,
            self.machine,
            self.send,
            timing=cluster.scenario.timing,
            clock=host.clock,
            rng=random.Random(host.rng.getrandbits(64)),
        )

    @property
    def is_still(self) -> bool:
        """Whether nothing in this process moves: it is dead or stopped by a signal."""
        return self.is_dead or self.host.pauses > 0

    def note(self, what: str, *details: object) -> None:
        self.world.note(self.host.id, what, *details)

    def count(self, what: str) -> None:
        self.cluster.counts[what] += 1

    def send(self, to: NodeId, frame: bytes) -> None:
        """What the node sends; checked for what it promises."""
        if self.is_still:
            return
        if self.world.trace:
            self.note(f"  to {to}", decode(frame))
        if frame[1:5] in _PROMISES:
            self._check_promise(to, frame)
        if self.links is not None:
            self.links.send(to, frame)
        else:
            self.cluster.network.send(self.host.id, to, frame)
        if self.frames_to_death is not None:
            self.frames_to_death -= 1
            if self.frames_to_death <= 0:
                self.crash("at a send")

    def _check_promise(self, to: NodeId, frame: bytes) -> None:
        host, disk, checker = self.host, self.host.disk, self.checker
        match decode(frame):
            case Ack(term, next_index, success, _):
                # Once a later term is on disk, the entries may be gone again rightly.
                kept = disk.last >= next_index - 1 or not success
                kept = disk.meta.term > term or (disk.meta.term == term and kept)
                if success:
                    checker.answered(self.log, term, next_index - 1)
            case Vote(term):
                _, last_index, last_term = self.node._journal[-1]
                checker.votes_by_log(self.log, term, to, (last_term, last_index))
                checker.voted(host.id, term, to)
                kept = disk.meta.term > term or (disk.meta.term, disk.meta.voted_for) == (term, to)
            case (Forward() | AskRead()) as request:
                checker.asked(self.log, type(request).__name__, request.request_id)
                return
            case PreVote(_, proposed_term, granted):
                if granted:
                    checker.would_vote(host.id, proposed_term, to)
                return
            case TakeOver(term):
                checker.hands_over(to, term)
                return
            case VoteRequest(term, last_index, last_term):
                voters = self.node.stood_before(term)
                checker.stands(host.id, term, voters, (last_term, last_index))
                checker.voted(host.id, term, host.id)
                kept = disk.meta.term >= term
            case Placed(_, _, term, error):
                # Index and term name an entry, for ever: the term must not begin anew.
                kept = bool(error) or disk.meta.term >= term
            case _:
                return
        checker.told_term(host.id, term)
        if not kept:
            checker.violated("promises are durable", f"{host.id} says {decode(frame)} too early")

    def wake(self, what: Callable[..., object], *args: object) -> None:
        """Do that now, or when the process goes on after its pause."""
        if self.is_dead:
            return
        if self.host.pauses or self.host.inbox:
            self.host.inbox.append((self, what, args))
        else:
            what(*args)

    async def call(self, what: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a client's request inside this process.

        Raises:
          Gone: the process died before the client had its answer.
        """
        if not self.is_running or self.is_dead:
            raise Gone
        error: Exception | None = None
        result: T
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                result = await what(*args)
            except RaftError as refusal:
                error = refusal
            while self.host.pauses and not self.is_dead:
                await self.host.resumed.wait()
            self._calls.discard(scope)
            if not self.is_dead:
                if error is not None:
                    raise error
                return result
        raise Gone

    def crash(self, why: str) -> None:
        """The process dies at once; what it had not synced is lost."""
        if self.is_dead:
            return
        self.count(f"crash {why}")
        self.end(f"CRASHES {why}")
        self.disk.process_died()
        self.scope.cancel()

    def end(self, what: str) -> None:
        """From here on nothing that it does is seen."""
        self.is_dead = True
        self.note(what)
        for scope in self._calls:
            scope.cancel()
        self.cluster.process_ended(self)


# How frames begin that promise something: an array's length, then these.
_ACK = b"\xa3ack"
_PROMISES = {
    _ACK,
    b"\xa4vot",
    b"\xa5vot",
    b"\xa7pre",
    b"\xa8tak",
    b"\xa6pla",
    b"\xa7for",
    b"\xa5rea",
}
