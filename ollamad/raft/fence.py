"""What stands between the network and PySyncObj, so that its known defects cannot be reached.

Every message is checked against the paper before the library sees it. Entries that are held
already are cut off, so that it truncates on a conflict only (§5.3); answers and votes of another
term, and a second vote of one voter, are dropped; an election needs a pre-vote (thesis, 9.6).
What leaves goes through `FencedTransport`.

Knows no socket, no disk and no time but what it is given. See `docs/consensus.md`.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from ollamad.core.ids import NodeId, short
from ollamad.raft.errors import JournalFailed, SafetyViolation
from ollamad.raft.journal import Blob, Journal, unpack_snapshot
from ollamad.raft.private import CANDIDATE, LEADER, Core, Timing
from ollamad.raft.reads import Reads
from ollamad.raft.transport import FencedTransport
from ollamad.wire.raftwire import (
    Ack,
    Append,
    AskRead,
    Forward,
    Install,
    MalformedMessage,
    Message,
    Outdated,
    Placed,
    PreVote,
    PreVoteRequest,
    ReadAt,
    ReadProbe,
    ReadProof,
    TakeOver,
    Vote,
    VoteRequest,
)

logger = logging.getLogger(__name__)

CATCH_UP_ENTRIES = 256  # how far behind a learner may be when it becomes a voter
FOUNDING_INDEX = 2  # of the entry that made the founder a voter: who holds it may vote


class Machine(Protocol):
    """The part of the state machine that the fence needs."""

    def restore(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Narrowed:
    """An Append cut to what is new here."""

    append: Append
    proved_index: int  # this node and the leader agree up to here, once it is carried out
    matches: bool  # whether the entry before the message's first is held
    resume_index: int = 0  # if it is not: where the leader should go on


def narrow(message: Append, journal: Journal, commit_index: int) -> Narrowed:
    """Cut what is held already off an Append, so that what is left starts at a real difference.

    The library deletes everything after `prev_index`, needed or not. Without entries left, the
    result points at the last entry held, after which there is nothing to delete.

    Raises:
      SafetyViolation: the leader contradicts an entry that is committed here.
    """
    first, last = journal[0][1], journal[-1][1]
    prev_index, prev_term, entries = message.prev_index, message.prev_term, message.entries
    proved = prev_index + len(entries)
    if prev_index < first:
        # The front of the log is in the snapshot: committed, so the leader has the same.
        skipped = min(first - prev_index, len(entries))
        if prev_index + skipped < first:
            return Narrowed(_heartbeat(message, journal, proved), proved, True)
        prev_index, prev_term, entries = first, entries[skipped - 1].term, entries[skipped:]
    if prev_index > last:
        return Narrowed(message, 0, False, last + 1)
    if journal.term_at(prev_index) != prev_term:
        _refuse_below(prev_index, commit_index)
        return Narrowed(message, 0, False, _start_of_term(prev_index, journal, commit_index))
    held = 0
    while held < len(entries) and journal.term_at(prev_index + held + 1) == entries[held].term:
        held += 1
    if held == len(entries):
        return Narrowed(_heartbeat(message, journal, proved), proved, True)
    prev_index, entries = prev_index + held, entries[held:]
    if prev_index < last:
        _refuse_below(prev_index + 1, commit_index)
    prev_term = journal.term_at(prev_index) or 0
    commit = min(message.commit_index, proved)
    return Narrowed(Append(message.term, commit, prev_index, prev_term, entries), proved, True)


def _heartbeat(message: Append, journal: Journal, proved: int) -> Append:
    _, last, last_term = journal[-1]
    return Append(message.term, min(message.commit_index, proved), last, last_term)


def _refuse_below(index: int, commit_index: int) -> None:
    if index <= commit_index:
        raise SafetyViolation(
            f"the leader has another entry {index}, which is committed here; one of the two "
            "lost a part of its disk"
        )


def _start_of_term(index: int, journal: Journal, commit_index: int) -> int:
    """The first entry of that entry's term, so that the leader goes back a term at a time."""
    term = journal.term_at(index)
    while index - 1 > commit_index and journal.term_at(index - 1) == term:
        index -= 1
    return index


class Fence:
    """One node's fence around its `Core`."""

    def __init__(
        self,
        core: Core,
        transport: FencedTransport,
        self_id: NodeId,
        machine: Machine,
        timing: Timing,
        reads: Reads,
    ) -> None:
        self._core = core
        self._journal = core.journal
        self._transport = transport
        self._self_id = self_id
        self._machine = machine
        self._timing = timing
        self._reads = reads
        self._leader_heard = float("-inf")
        self._majority_heard = float("-inf")  # while this node led
        self._votes: tuple[int, set[NodeId]] = (0, set())  # term, who voted for us in it
        # Term, and who answered us in it, when. The library takes its voters for heard at once.
        self._answers: tuple[int, dict[NodeId, float]] = (0, {})
        self._pre_votes: tuple[int, set[NodeId]] | None = None  # proposed term, who would
        self._won_pre_vote_for = 0  # the term in which a majority would vote for this node
        self._incoming: tuple[bytes, bytearray] | None = None  # sha256 and data of a snapshot
        self._refusal = (b"", "")  # sha256 of the snapshot that cannot be read here, and why
        self.should_transfer = False  # this leader was asked to remove itself
        transport.term = core.term

    # Messages that come in.

    def receive(self, sender: NodeId, message: Message) -> None:
        """Take in one message of an authenticated member.

        Raises:
          MalformedMessage: no correct node says this.
          SafetyViolation: this node must stop.
        """
        core = self._core
        match message:
            case Append():
                if self._from_leader(sender, message.term):
                    self._on_append(sender, message)
            case Install():
                if self._from_leader(sender, message.term):
                    self._on_install(sender, message)
            case Ack():
                self._on_ack(sender, message)
            case Outdated(term):
                if term > core.term():
                    core.step_down(term)
            case VoteRequest(term, last_index, last_term):
                if term > core.term():
                    core.step_down(term)
                if not self._journal.says_voters:
                    return  # as `_on_pre_vote_request`
                core.deliver(
                    sender,
                    {
                        "type": "request_vote",
                        "term": term,
                        "last_log_index": last_index,
                        "last_log_term": last_term,
                    },
                )
            case Vote():
                self._on_vote(sender, message)
            case PreVoteRequest():
                self._on_pre_vote_request(sender, message)
            case PreVote():
                self._on_pre_vote(sender, message)
            case TakeOver(term):
                if term == core.term() and self._may_lead():
                    core.deliver(sender, {"type": "timeout_now", "term": term})
            case Forward(request_id, command):
                core.deliver(
                    sender, {"type": "apply_command", "request_id": request_id, "command": command}
                )
            case Placed():
                self._on_placed(sender, message)
            case ReadProbe():
                if self._from_leader(sender, message.term):
                    if message.term > core.term():
                        core.step_down(message.term)
                    self._reads.on_probe(sender, message)
            case ReadProof():
                self._reads.on_proof(sender, message)
            case AskRead():
                self._reads.on_ask(sender, message)
            case ReadAt():
                self._reads.on_answer(message)

    def _from_leader(self, sender: NodeId, term: int) -> bool:
        core = self._core
        if term < core.term():
            self._transport.emit_synced(sender, Outdated(core.term()))
            return False
        if term == core.term() and core.state() == LEADER:
            raise MalformedMessage(f"{short(sender)} claims to lead term {term}, which is ours")
        known = core.leader_id()
        if term == core.term() and known not in (None, sender):
            raise MalformedMessage(f"{short(sender)} and {short(known or sender)} lead one term")
        self._leader_heard = core.clock()
        core.fruitless_elections = 0
        self._pre_votes = None
        self._won_pre_vote_for = 0
        return True

    def _on_append(self, sender: NodeId, message: Append) -> None:
        narrowed = narrow(message, self._journal, self._core.commit_index())
        append = narrowed.append
        if narrowed.matches:
            self._transport.proved = narrowed.proved_index
        else:
            self._transport.resume = narrowed.resume_index
        # Who brings a later commit index and nothing else had his answer to the entries themselves.
        # Each such message moves the index on, so that a plain heartbeat is answered always.
        self._transport.is_silent = (
            narrowed.matches
            and not message.entries
            and append.commit_index > self._core.commit_index()
        )
        index = append.prev_index
        try:
            self._core.deliver(
                sender,
                {
                    "type": "append_entries",
                    "term": append.term,
                    "commit_index": append.commit_index,
                    "prevLogIdx": append.prev_index,
                    "prevLogTerm": append.prev_term,
                    "entries": [
                        (entry.command, index + place, entry.term)
                        for place, entry in enumerate(append.entries, 1)
                    ],
                },
            )
        finally:
            self._transport.proved = self._transport.resume = None
            self._transport.is_silent = False

    def _on_install(self, sender: NodeId, message: Install) -> None:
        core = self._core
        # For the library a heartbeat without a commit index: a snapshot proves nothing about the
        # entries held, which the library would commit up to the leader's index.
        core.deliver(
            sender,
            {
                "type": "append_entries",
                "term": message.term,
                "commit_index": 0,
                "serialized": None,
            },
        )
        success, next_index, held = False, core.last_index() + 1, None
        if message.data:
            index = self._take_part(message)
            if index is not None:
                success, next_index = True, index + 1
            else:
                held = self._held_of(message.sha256)
        answer = Ack(core.term(), next_index, success, False, held)
        self._transport.emit_synced(sender, answer)

    def _take_part(self, message: Install) -> int | None:
        """Returns the index of the snapshot if all that it includes is here now."""
        core = self._core
        known = self._journal.snapshot_blob
        if known is not None and known.sha256 == message.sha256:
            return self._journal.snapshot_index  # the answer to the last part was lost
        blob = self._assemble(message)
        if blob is None:
            return None
        try:
            snapshot = unpack_snapshot(blob)
            is_news = snapshot.index > core.commit_index()
            if is_news:
                self._machine.restore(snapshot.state)
        except (JournalFailed, ValueError) as error:
            self._refuse_snapshot(message.sha256, str(error))
            return None
        if is_news:
            core.install(blob, snapshot)
            logger.info("took over the leader's snapshot at entry %d", snapshot.index)
        return snapshot.index

    def _refuse_snapshot(self, sha256: bytes, reason: str) -> None:
        """Take no part of it any more. The leader goes on trying, now and then."""
        if reason != self._refusal[1]:
            logger.error("this node cannot catch up by the leader's snapshot: %s", reason)
        self._refusal = sha256, reason

    def _held_of(self, sha256: bytes) -> int:
        if self._incoming is None or self._incoming[0] != sha256:
            return 0
        return len(self._incoming[1])

    def _assemble(self, message: Install) -> Blob | None:
        if message.sha256 == self._refusal[0]:
            return None
        if self._incoming is None or self._incoming[0] != message.sha256:
            if message.offset:
                return None
            self._incoming = (message.sha256, bytearray())
        sha256, data = self._incoming
        if message.offset > len(data):
            return None  # a part was lost; the leader will go on from what is here
        data += message.data[len(data) - message.offset :]
        if len(data) < message.total:
            return None
        self._incoming = None
        if hashlib.sha256(data).digest() != sha256:
            logger.error("a snapshot arrived that does not match its checksum; asking again")
            return None
        return Blob(bytes(data), sha256)

    def _on_ack(self, sender: NodeId, message: Ack) -> None:
        core = self._core
        if message.term > core.term():
            core.step_down(message.term)
        if message.term != core.term() or core.state() != LEADER:
            return
        if not core.is_follower_of_mine(sender):
            return
        end = core.last_index() + 1
        if message.next_index < 2 or (message.success and message.next_index > end):
            raise MalformedMessage(f"{short(sender)} answers about entry {message.next_index}")
        if self._answers[0] != message.term:
            self._answers = (message.term, {})
        self._answers[1][sender] = core.clock()
        core.deliver_ack(sender, min(message.next_index, end), message.success, message.reset)
        if message.snapshot_held is not None:
            core.snapshot_answered(sender, message.snapshot_held)

    def _on_vote(self, sender: NodeId, message: Vote) -> None:
        core = self._core
        if message.term != core.term() or core.state() != CANDIDATE:
            return
        term, voters = self._votes
        if term != message.term:
            voters = set()
            self._votes = (message.term, voters)
        if sender in voters or sender not in self._journal.voters:
            return
        voters.add(sender)
        core.deliver(sender, {"type": "response_vote", "term": message.term})

    def _on_placed(self, sender: NodeId, message: Placed) -> None:
        answer: dict[str, Any] = {
            "type": "apply_command_response",
            "request_id": message.request_id,
            "log_idx": message.index,
            "log_term": message.term,
        }
        if message.error:
            answer["error"] = message.error
        self._core.deliver(sender, answer)

    # Elections.

    def before_tick(self) -> bool:
        """Put a pre-vote before an election that is due.

        Returns:
          Whether the tick that follows at the same time may begin an election.
        """
        core = self._core
        now = core.clock()
        if core.state() == LEADER:
            self._majority_heard = now - self.silence_s()
            core.fruitless_elections = 0
            return False
        if now < core.election_deadline():
            return False
        if not self._may_lead():
            core.lose_leader()
            return False
        has_won = self._won_pre_vote_for == core.term() + 1
        if has_won or core.transfer_in_progress() or not core.has_other_voters():
            self._won_pre_vote_for = 0
            core.fruitless_elections += 1
            return True
        core.lose_leader()
        self._ask_pre_votes()
        return False

    def _ask_pre_votes(self) -> None:
        core = self._core
        proposed = core.term() + 1
        self._pre_votes = (proposed, set())
        _, last_index, last_term = self._journal[-1]
        request = PreVoteRequest(proposed, last_index, last_term)
        for voter in sorted(self._journal.voters - {self._self_id}):
            self._transport.emit_synced(voter, request)

    def _on_pre_vote_request(self, sender: NodeId, message: PreVoteRequest) -> None:
        core = self._core
        _, last_index, last_term = self._journal[-1]
        # A blank log would grant a vote to any log, also to one in which this node never was.
        # Nobody needs it: a learner is no voter before its log says who is (`caught_up`).
        granted = (
            self._journal.says_voters
            and message.proposed_term > core.term()
            and (message.last_term, message.last_index) >= (last_term, last_index)
            and core.state() != LEADER  # a leader without a majority steps down by itself
            and not self.leader_is_alive()
        )
        answer = PreVote(core.term(), message.proposed_term, granted)
        self._transport.emit_synced(sender, answer)

    def _on_pre_vote(self, sender: NodeId, message: PreVote) -> None:
        core = self._core
        if message.term > core.term():
            core.step_down(message.term)
            self._pre_votes = None
        if self._pre_votes is None or not message.granted or core.state() == LEADER:
            return
        proposed, voters = self._pre_votes
        if proposed != message.proposed_term or proposed != core.term() + 1:
            return
        if sender not in self._journal.voters:
            return
        voters.add(sender)
        if self._is_majority(voters | {self._self_id}):
            self._pre_votes = None
            self._won_pre_vote_for = proposed
            core.call_election()

    def leader_is_alive(self) -> bool:
        """Whether a leader spoke so lately that no follower's timeout can have passed."""
        sticky_s = self._timing.election_min_s - self._timing.heartbeat_s / 2
        return self._core.clock() - self._leader_heard < sticky_s

    # What the run loop and the users ask.

    def has_quorum(self) -> bool:
        """Whether this node was in touch with a majority, or its leader, within a timeout."""
        core = self._core
        since = core.clock() - self._timing.election_max_s
        if core.state() == LEADER:
            heard = {v for v in self._journal.voters if core.last_heard(v) > since}
            return self._is_majority(heard | {self._self_id})
        return core.leader_id() is not None and self._leader_heard > since

    def silence_s(self) -> float:
        """Seconds since this node was in touch with its leader, or, as one, with a majority.

        A leader that is cut off from the majority leads on for up to `election_max_s`, and who is
        cut off together with it hears it meanwhile.
        """
        core = self._core
        if core.state() != LEADER:
            return core.clock() - max(self._leader_heard, self._majority_heard)
        others = self._journal.voters - {self._self_id}
        heard = sorted((core.last_heard(voter) for voter in others), reverse=True)
        needed = len(self._journal.voters) // 2
        return core.clock() - heard[needed - 1] if needed else 0.0

    def may_change_voters(self, voters: frozenset[NodeId]) -> bool:
        """Whether this leader may put that membership entry into its log now."""
        core, journal = self._core, self._journal
        if len(voters ^ journal.voters) != 1:
            return False
        # Ongaro's correction of single-server changes: first an entry of our own term.
        if core.commit_index() < max(journal.membership_index, core.term_start_index()):
            return False
        # The entry itself is committed by the new voters: without a majority of them that is
        # there, nothing could ever be agreed on again.
        if not _is_majority(self._able_to_commit() | {self._self_id}, voters):
            return False
        if self._self_id not in voters:
            self.should_transfer = True  # the next leader will be asked again
            return False
        return all(self.caught_up(added) for added in voters - journal.voters)

    def _able_to_commit(self) -> set[NodeId]:
        """The nodes that answered this leader within a timeout, in its term, and are not behind."""
        core = self._core
        term, answers = self._answers
        since = core.clock() - self._timing.election_max_s
        return {
            node
            for node, at in answers.items()
            if term == core.term() and at > since and self._is_near_the_end(node)
        }

    def _is_near_the_end(self, node_id: NodeId) -> bool:
        core = self._core
        needed = max(FOUNDING_INDEX, core.last_index() - CATCH_UP_ENTRIES)
        return core.match_index(node_id) >= needed

    def caught_up(self, node_id: NodeId) -> bool:
        """Whether this leader's learner would not hold up commits as a voter."""
        core = self._core
        if core.state() != LEADER or not core.is_connected(node_id):
            return False
        alive = core.clock() - core.last_heard(node_id) < self._timing.election_max_s
        return alive and self._is_near_the_end(node_id)

    def _may_lead(self) -> bool:
        # Else it would commit nothing: a leader counts no entry that its disk lacks.
        return self._is_voter() and not self._journal.is_blocked

    def _is_voter(self) -> bool:
        return self._self_id in self._journal.voters

    def _is_majority(self, nodes: set[NodeId]) -> bool:
        return _is_majority(nodes, self._journal.voters)


def _is_majority(nodes: set[NodeId], voters: frozenset[NodeId]) -> bool:
    return 2 * len(nodes & voters) > len(voters)
