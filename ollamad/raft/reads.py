"""Linearizable reads without a log entry: read index (Raft thesis, 6.4).

A leader notes its commit index and asks the voters whether they still follow it. When a majority,
asked after the read began, says so, no later leader can have committed anything before that
moment, and a state machine that has applied the noted index is current. A follower asks its
leader for such an index. No clock is involved, so none needs to be right.

Asks are numbered by rounds, and one round serves all reads that wait for it. Knows the core and
the way out, no event loop.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ollamad.core.ids import NodeId
from ollamad.raft.private import LEADER, Core
from ollamad.raft.transport import FencedTransport
from ollamad.wire.raftwire import AskRead, ReadAt, ReadProbe, ReadProof

MAX_WAITING = 10_000  # reads at one leader; more are told to ask again
NOT_NOW = 0  # instead of an index: ask again

Finish = Callable[[int], None]  # gets the index that must be applied, or NOT_NOW


@dataclass(frozen=True, slots=True)
class _Read:
    round: int  # confirmed by this round or a later one
    index: int
    finish: Finish


class Reads:
    """The reads of one node, and those that others asked it for while it leads."""

    def __init__(
        self, core: Core, transport: FencedTransport, self_id: NodeId, rng: random.Random
    ) -> None:
        self._core = core
        self._transport = transport
        self._self_id = self_id
        self._term = 0  # of the rounds below
        self._round = 0  # the last one that was sent
        self._sent_at = float("-inf")
        self._proofs: dict[NodeId, int] = {}  # the last round that each voter confirmed
        self._waiting: deque[_Read] = deque()  # rounds never go down
        self._asked: dict[int, Finish] = {}  # what the leader was asked, by request id
        # An answer to a former life must not be taken for one to this.
        self._next_id = rng.getrandbits(62)

    def begin(self, finish: Finish) -> int | None:
        """Start a read on this node.

        Returns:
          A number for `forget` when another node was asked.
        """
        core = self._core
        if core.state() == LEADER:
            self._begin_here(finish)
            return None
        leader = core.leader_id()
        if leader is None:
            finish(NOT_NOW)
            return None
        self._next_id += 1
        self._asked[self._next_id] = finish
        self._transport.emit(leader, AskRead(self._next_id), 0)
        return self._next_id

    def forget(self, request_id: int) -> None:
        """Nobody waits for that answer any more."""
        self._asked.pop(request_id, None)

    def _begin_here(self, finish: Finish) -> None:
        core = self._core
        # Before an entry of its own term is committed a leader does not know what is (§8).
        knows = core.commit_index() >= core.term_start_index()
        if not knows or len(self._waiting) >= MAX_WAITING:
            finish(NOT_NOW)
            return
        self._enter_term()
        self._waiting.append(_Read(self._round + 1, core.commit_index(), finish))

    def _enter_term(self) -> None:
        if self._term != self._core.term():
            self._refuse_all()
            self._term, self._round, self._proofs = self._core.term(), 0, {}

    def _refuse_all(self) -> None:
        refused, self._waiting = self._waiting, deque()
        for read in refused:
            read.finish(NOT_NOW)

    def tick(self, period_s: float) -> None:
        """Ask the voters on behalf of new reads, and again where no answer came in `period_s`."""
        if not self._waiting:
            return
        core = self._core
        if core.state() != LEADER or core.term() != self._term:
            self._refuse_all()
            return
        now = core.clock()
        if self._waiting[-1].round > self._round or now - self._sent_at >= period_s:
            self._round += 1
            self._sent_at = now
            for voter in sorted(core.journal.voters - {self._self_id}):
                self._transport.emit(voter, ReadProbe(self._term, self._round), 0)
            self._confirm()  # a cluster of one

    # Messages.

    def on_probe(self, sender: NodeId, message: ReadProbe) -> None:
        """A leader of this node's term, or of a later one, asks whether it still leads."""
        # Nothing durable is promised: what counts is that no later term was entered before.
        self._transport.emit(sender, ReadProof(message.term, message.round), 0)

    def on_proof(self, sender: NodeId, message: ReadProof) -> None:
        core = self._core
        if core.state() != LEADER or message.term != core.term() or message.term != self._term:
            return
        self._proofs[sender] = max(message.round, self._proofs.get(sender, 0))
        self._confirm()

    def _confirm(self) -> None:
        voters = self._core.journal.voters
        rounds = [self._round if v == self._self_id else self._proofs.get(v, 0) for v in voters]
        confirmed = sorted(rounds, reverse=True)[len(rounds) // 2]
        while self._waiting and self._waiting[0].round <= confirmed:
            read = self._waiting.popleft()
            read.finish(read.index)

    def on_ask(self, sender: NodeId, message: AskRead) -> None:
        def answer(index: int) -> None:
            self._transport.emit(sender, ReadAt(message.request_id, index), 0)

        if self._core.state() == LEADER:
            self._begin_here(answer)
        else:
            answer(NOT_NOW)

    def on_answer(self, message: ReadAt) -> None:
        finish = self._asked.pop(message.request_id, None)
        if finish is not None:
            finish(message.index)
