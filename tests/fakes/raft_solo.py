"""One fenced core without a loop, a network or a disk: the test is all three."""

import random

from ollamad.core.ids import NodeId
from ollamad.raft.fence import Fence
from ollamad.raft.journal import Journal, LogEntry, Stored
from ollamad.raft.private import CANDIDATE, LEADER, Core, Timing
from ollamad.raft.reads import Reads
from ollamad.raft.transport import FencedTransport
from ollamad.wire.raftwire import (
    NO_OP,
    REGULAR,
    Message,
    PreVote,
    Vote,
    encode_voters,
)
from tests.fakes.raft_cluster import Ledger

NO_OP_COMMAND = bytes([NO_OP])


def command(text: str) -> bytes:
    """A regular log entry."""
    return bytes([REGULAR]) + text.encode()


class Solo:
    """Node `a` of the voters; `log` holds the terms of entries 3, 4, … after the founding two."""

    def __init__(self, voters: str = "abc", log: str = "", term: int | None = None) -> None:
        self.now = 100.0
        self.sent: list[tuple[NodeId, Message]] = []
        entries: list[LogEntry] = [
            (NO_OP_COMMAND, 1, 0),
            (encode_voters(frozenset(NodeId(v) for v in voters)), 2, 0),
        ]
        for index, digit in enumerate(log, 3):
            entries.append((command(f"{index}@{digit}"), index, int(digit)))
        self.journal = Journal(Stored(entries, term if term is not None else entries[-1][2]))
        self.transport = FencedTransport(self.journal, lambda to, m: self.sent.append((to, m)))
        self.ledger = Ledger()
        self.timing = Timing()
        self.core = Core(
            NodeId("a"),
            self.journal,
            self.transport,
            self,
            self.timing,
            lambda: self.now,
            random.Random(1),
        )
        me = NodeId("a")
        self.reads = Reads(self.core, self.transport, me, random.Random(1))
        self.fence = Fence(self.core, self.transport, me, self.ledger, self.timing, self.reads)
        self._others = sorted(set(voters) - {"a"})
        for voter in self._others:
            self.core.connected(NodeId(voter))

    def apply(self, entry: bytes, index: int) -> object:
        return self.ledger.apply(entry)

    def may_change_voters(self, voters: frozenset[NodeId]) -> bool:
        return self.fence.may_change_voters(voters)

    def receive(self, sender: str, message: Message) -> None:
        self.fence.receive(NodeId(sender), message)

    def sync(self) -> None:
        """The disk has caught up."""
        if self.journal.take() is not None:
            self.journal.synced()
            self.transport.release()

    def tick(self) -> None:
        self.core.tick(self.fence.before_tick())

    def wait_for_election(self) -> None:
        """Let the timeout pass."""
        self.now += 1.0
        self.tick()
        self.sync()

    def take(self) -> list[tuple[str, Message]]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return [(str(to), message) for to, message in sent]

    def campaign(self) -> None:
        """Become a candidate, with the consent of all others."""
        self.wait_for_election()
        term = self.core.term()
        for voter in self._others:
            self.receive(voter, PreVote(term, term + 1, True))
        self.tick()
        self.sync()
        assert self.core.state() == CANDIDATE

    def lead(self) -> None:
        """Become the leader by the votes of all others."""
        self.campaign()
        for voter in self._others:
            self.receive(voter, Vote(self.core.term()))
        assert self.core.state() == LEADER
        self.sync()
        self.take()

    def terms(self) -> str:
        """The terms of the entries from 3 on."""
        return "".join(str(term) for _, index, term in self.journal[0:] if index > 2)
