"""One daemon's part in consensus: runs the fenced library inside the trio loop.

Two loops: `_tick_loop` runs the library whenever something happened or a timer is due, and
`_sync_loop` makes the journal durable, many changes at a time, and then lets go the messages
that waited for it. There is no other thread than the store's.
"""

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from ollamad.core.ids import NodeId, short
from ollamad.raft import private
from ollamad.raft.errors import (
    ApplyFailed,
    ChangeRefused,
    CommandTooLarge,
    DiskFull,
    JournalFailed,
    NodeFailed,
    NoQuorum,
    OutcomeUnknown,
    RaftError,
    StateTooLarge,
)
from ollamad.raft.fence import Fence
from ollamad.raft.journal import Batch, Journal, Store, unpack_snapshot
from ollamad.raft.private import FOLLOWER, LEADER, Core, StepClock, Timing
from ollamad.raft.reads import NOT_NOW, Reads
from ollamad.raft.recovery import LogEnd
from ollamad.raft.transport import FencedTransport
from ollamad.wire.raftwire import (
    MAX_COMMAND_SIZE,
    MAX_VOTERS,
    REGULAR,
    Ack,
    Append,
    Install,
    MalformedMessage,
    Message,
    ReadAt,
    ReadProbe,
    ReadProof,
    UnknownMessage,
    decode,
    encode,
    encode_change,
    encode_voters,
)

logger = logging.getLogger(__name__)

COMPACT_ENTRIES = 4096  # new entries that make a snapshot worth while
COMPACT_BYTES = 16 << 20  # or that many bytes of them
COMPACT_RETRY_S = 60.0  # after the state was too large; an attempt may hold the loop for a second
MIN_COMPACT_ENTRIES = 64  # but never fewer entries than that, however large
RETRY_MIN_S = 0.01  # pause between two attempts of a proposal, at random up to
RETRY_MAX_S = 0.05
FULL_DISK_RETRY_S = 1.0  # soon enough for whoever frees space, and no load on a full disk
SHUTDOWN_S = 5.0  # for the last write and the closing of the journal
TIMER_GRAIN_S = 0.001  # the library's heartbeat is due only after its time

# Answers after which a command is certain not to happen through that attempt.
_DEFINITE_REFUSALS = {
    private.QUEUE_FULL,
    private.MISSING_LEADER,
    private.NOT_LEADER,
    private.DISCARDED,
    private.REQUEST_DENIED,
}


class StateMachine(Protocol):
    """What is replicated. Called in the trio loop, so each call must be short."""

    def apply(self, command: bytes) -> bytes:
        """Carry out a committed command; deterministic. It raises NodeFailed or nothing."""

    def snapshot(self) -> bytes:
        """The whole state."""

    def restore(self, data: bytes) -> None:
        """Replace the whole state by that of a `snapshot`.

        Raises:
          ValueError: it is not one that this version understands; nothing has changed.
        """


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """This node's view at one moment. `leader` may be out of date; see `has_quorum`."""

    leader: NodeId | None
    is_leader: bool
    term: int
    voters: frozenset[NodeId]


@dataclass(slots=True, eq=False)
class _Attempt:
    done: trio.Event = field(default_factory=trio.Event)
    result: object = None
    error: int = private.UNKNOWN_OUTCOME

    def finish(self, result: object, error: int) -> None:
        self.result, self.error = result, error
        self.done.set()


class RaftNode:
    """A member of the consensus: `open`, then `bootstrap` or `start_as_learner`, then `run`.

    Args:
      self_id: this node.
      store: where the journal is kept; `run` closes it.
      machine: what committed commands are applied to.
      send: takes a frame for a node; must not block or raise, and may drop the frame.
      observer: is told of a new leader, role, term or list of voters.
      clock: monotonic seconds; trio's by default, so that tests can use virtual time.
      rng: for election timeouts and pauses.
    """

    def __init__(
        self,
        self_id: NodeId,
        store: Store,
        machine: StateMachine,
        send: Callable[[NodeId, bytes], None],
        *,
        timing: Timing | None = None,
        observer: Callable[[RaftStatus], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
        rng: random.Random | None = None,
    ) -> None:
        private.check_library()
        self.id = self_id
        self._store = store
        self._machine = machine
        self._send = send
        self._timing = timing or Timing()
        self._observer = observer
        self._clock = clock
        self._step = StepClock(clock)
        self._rng = rng or random.Random()
        self._is_open = False
        self._failure: NodeFailed | None = None
        self._wake = trio.Event()  # for the tick loop
        self._dirty = trio.Event()  # for the sync loop
        self._unwritten: Batch | None = None  # taken from the journal, not durable yet
        self._writing: trio.CancelScope | None = None  # of the write that is under way
        self._writing_since = math.inf
        self._end_at = math.inf  # when the last write is abandoned
        self._disk_full = False
        self._attempts: set[_Attempt] = set()  # that somebody waits for
        self._changed = trio.Event()  # replaced at each change of the status
        self._progress = trio.Event()  # replaced whenever more entries are applied
        self._progressed_to = 0
        self._status = RaftStatus(None, False, 0, frozenset())
        self._used_voters = frozenset[NodeId]()  # what the library was told last
        self._met_newer_kind = False  # and said so
        self._compact_after = float("-inf")  # not before that time
        self._state_too_large = False
        self._announced = (0, 0)  # last index and commit index that the followers were sent

    # Start and end.

    async def open(self) -> bool:
        """Read the journal and bring the state machine up to the last known commit.

        Returns:
          Whether this node knows its cluster. If not, `bootstrap` or `start_as_learner` is due.

        Raises:
          JournalFailed: the journal is corrupt, newer, locked or unreadable; it says which.
        """
        stored = await self._store.load()
        journal = Journal(stored)
        transport = FencedTransport(journal, lambda to, message: self._send(to, encode(message)))
        core = Core(self.id, journal, transport, self, self._timing, self._step, self._rng)
        reads = Reads(core, transport, self.id, self._rng)
        fence = Fence(core, transport, self.id, self._machine, self._timing, reads)
        self._core, self._fence, self._journal, self._transport = core, fence, journal, transport
        self._reads = reads
        self._is_open = True
        if journal.snapshot_blob is not None:
            snapshot = unpack_snapshot(journal.snapshot_blob)
            try:
                self._machine.restore(snapshot.state)
            except ValueError as error:
                raise JournalFailed(f"the snapshot of the journal: {error}") from None
            core.start_from(snapshot.index)
        core.apply_committed()
        self._notice()
        return bool(journal.voters)

    def bootstrap(self) -> None:
        """Found a cluster of this node alone. Only after an `open` that knew no cluster."""
        self._require_blank()
        self._journal.add(encode_voters(frozenset({self.id})), self._core.last_index() + 1, 0)
        self._new_voters()

    def start_as_learner(self, voters: frozenset[NodeId]) -> None:
        """Follow a cluster whose voters are those, until its log says otherwise."""
        self._require_blank()
        self._journal.set_hint(voters - {self.id})
        self._new_voters()

    async def persist(self) -> None:
        """Make durable how `bootstrap` or `start_as_learner` began the journal, before `run`."""
        batch = self._journal.take()
        if batch is not None:
            await self._store.commit(batch)
            self._journal.synced()

    def _require_blank(self) -> None:
        if not self._is_open or self._journal.voters:
            raise RaftError("this node has not been opened, or knows its cluster already")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; then write what is left and close the journal.

        A disk that does not answer for `SHUTDOWN_S` then is left alone. The file stays locked until
        the write that hangs has ended, at the latest with this process.

        Raises:
          NodeFailed: the disk failed, or another node contradicts what is committed here. This
            node must not go on without somebody looking at it.
        """
        try:
            if not self._is_open or not self._journal.voters:
                raise RaftError("neither bootstrap nor start_as_learner was called")
            if self.voters == {self.id}:
                self._core.call_election()  # nobody else could lead, so why wait
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sync_loop)
                task_status.started()
                try:
                    await self._tick_loop()
                finally:
                    self._end_soon()
                nursery.cancel_scope.cancel()
            assert self._failure is not None
            raise self._failure
        finally:
            self._end_soon()
            with trio.CancelScope(deadline=self._end_at, shield=True) as scope:
                if self._failure is None and self._is_open and self._journal.voters:
                    await self._write_last_words()
                await self._store.aclose()
            if scope.cancelled_caught:
                logger.error("the disk does not answer; the journal is not closed in order")

    def _end_soon(self) -> None:
        """From now on there are `SHUTDOWN_S` for all that is to be written."""
        self._end_at = min(self._end_at, trio.current_time() + SHUTDOWN_S)
        if self._writing is not None:
            self._writing.deadline = self._end_at

    # The network's side.

    def receive(self, sender: NodeId, frame: bytes) -> None:
        """Take in a frame of an authenticated member.

        Raises:
          MalformedMessage: the frame breaks the protocol; close the link that brought it.
        """
        try:
            message = decode(frame)
        except UnknownMessage as error:
            if not self._met_newer_kind:
                self._met_newer_kind = True
                logger.warning("%s of %s is ignored: it is newer", error, short(sender))
            return
        if self._failure is not None:
            return
        core, journal = self._core, self._journal
        before = (core.state(), core.term(), core.leader_id())
        generation = journal.generation
        try:
            with self._step:
                self._fence.receive(sender, message)
        except NodeFailed as error:
            self._fail(error)
            return
        except MalformedMessage:
            raise
        except Exception as error:
            self._fail_by_a_bug(f"{type(message).__name__} of {short(sender)}", error)
            return
        if journal.generation != generation:
            self._dirty.set()
        self._note_progress()
        after = (core.state(), core.term(), core.leader_id())
        if self._calls_for_tick(message) or before != after:
            self._wake.set()

    def _calls_for_tick(self, message: Message) -> bool:
        core = self._core
        match message:
            case Append() | Install():
                # Heartbeats, most of what arrives, only move the deadline on.
                return core.commit_index() > core.applied_index() or bool(self._new_voters())
            case Ack(_, next_index, success, reset):
                return reset or (success and next_index - 1 > core.commit_index())
            case ReadAt() | ReadProbe() | ReadProof():
                return False
            case _:
                return True

    def peer_connected(self, node_id: NodeId) -> None:
        """Frames for that node now leave. Voter or not follows from the log."""
        if node_id != self.id:
            self._core.connected(node_id)
            self._wake.set()

    def peer_disconnected(self, node_id: NodeId) -> None:
        """Frames for that node do not leave any more."""
        if node_id != self.id:
            self._core.disconnected(node_id)
            self._wake.set()

    # What the daemon reads.

    @property
    def leader(self) -> NodeId | None:
        """The leader that this node follows, itself included; possibly deposed by now."""
        return self._status.leader

    @property
    def is_leader(self) -> bool:
        return self._status.is_leader

    @property
    def term(self) -> int:
        return self._status.term

    @property
    def voters(self) -> frozenset[NodeId]:
        """The voters by this node's log."""
        return self._status.voters

    @property
    def status(self) -> RaftStatus:
        return self._status

    @property
    def has_quorum(self) -> bool:
        """Whether a majority (for the leader) or the leader was heard within the timeout."""
        return self._is_open and self._fence.has_quorum()

    @property
    def silence_s(self) -> float:
        """How old the local state may be: seconds since the leader (or a majority) was heard.

        The state includes all that was acknowledged before that moment, but for what is on its
        way, with one exception: a leader that is cut off leads on for up to `election_max_s`, so
        a node that is cut off together with it may say up to that much too little. Infinite
        before the first contact.
        """
        return self._fence.silence_s() if self._is_open else math.inf

    @property
    def commit_index(self) -> int:
        """Index of the last entry that this node knows to be committed."""
        return self._core.commit_index()

    @property
    def log_end(self) -> LogEnd:
        """How far this node's log goes, committed or not."""
        _, index, term = self._journal[-1]
        return LogEnd(term, index)

    @property
    def disk_full(self) -> bool:
        """Whether there is no space for this node's journal; so it neither votes nor leads."""
        return self._disk_full

    @property
    def disk_hangs(self) -> bool:
        """Whether the disk has not taken the journal for so long that this node stands aside."""
        return self._is_open and self._journal.is_blocked and not self._disk_full

    @property
    def state_too_large(self) -> bool:
        """Whether the state was beyond the limit of a snapshot when one was due last."""
        return self._state_too_large

    @property
    def applied_index(self) -> int:
        """Index of the last entry that the state machine includes."""
        return self._core.applied_index()

    def caught_up(self, node_id: NodeId) -> bool:
        """Whether `add_voter` would accept that learner; only the leader knows, else False."""
        return self._is_open and self._fence.caught_up(node_id)

    async def wait_changed(self) -> RaftStatus:
        """Wait for the next change of the status."""
        await self._changed.wait()
        return self._status

    # What the daemon asks for.

    async def propose(self, command: bytes, timeout_s: float) -> bytes:
        """Have a command applied on all nodes, through whichever node leads.

        The same bytes may be proposed several times on the way, so they need an id that `apply`
        remembers.

        Returns:
          What `apply` returned on this node.

        Raises:
          NoQuorum: it did not happen and will not.
          OutcomeUnknown: it may have happened or may still happen. The same is true when this
            call is cancelled.
          ApplyFailed: the state machine raised.
          CommandTooLarge: the command is over the limit.
          NodeFailed: this node has stopped.
        """
        if len(command) > MAX_COMMAND_SIZE:
            raise CommandTooLarge(f"{len(command)} bytes; the limit is {MAX_COMMAND_SIZE}")
        result = await self._submit(bytes([REGULAR]) + command, timeout_s)
        if isinstance(result, ApplyFailed):
            raise result
        assert isinstance(result, bytes)
        return result

    async def read_barrier(self, timeout_s: float) -> int:
        """Wait until the local state includes all that was acknowledged before this call.

        A read of the state machine that follows without an await between is linearizable.

        Returns:
          The index that was waited for.

        Raises:
          NoQuorum: no leader with a majority confirmed an index in time.
          NodeFailed: this node has stopped.
        """
        with trio.move_on_after(max(0.0, timeout_s)):
            while True:
                while self.leader is None and self._failure is None:
                    await self._changed.wait()
                index = await self._read_index()
                while self.applied_index < index and self._failure is None:
                    await self._progress.wait()
                self._require_running()
                if index != NOT_NOW:
                    return index
                await trio.sleep(self._rng.uniform(RETRY_MIN_S, RETRY_MAX_S))
        raise NoQuorum(f"no leader with a majority confirmed a read within {timeout_s:g} s")

    async def _read_index(self) -> int:
        """One attempt to learn the index that a read must wait for; NOT_NOW if it failed."""
        attempt = _Attempt()
        request_id = self._reads.begin(lambda index: attempt.finish(index, private.SUCCESS))
        self._wake.set()
        try:
            await self._wait_for(attempt)
        finally:
            if request_id is not None:
                self._reads.forget(request_id)
        return attempt.result if isinstance(attempt.result, int) else NOT_NOW

    async def add_voter(self, node_id: NodeId, timeout_s: float) -> None:
        """Make a learner that has caught up a voter.

        Raises:
          ChangeRefused: it has not caught up, another change is under way, there are enough, or
            too few of the voters are there to agree on anything afterwards.
          NoQuorum, OutcomeUnknown, NodeFailed: as `propose`.
        """
        await self._change_voters(node_id, True, timeout_s)

    async def remove_voter(self, node_id: NodeId, timeout_s: float) -> None:
        """Make a voter a learner. A leader that is to go hands over first.

        Raises:
          ChangeRefused: it is the last voter, another change is under way, or too few of those
            that remain are there to agree on anything afterwards.
          NoQuorum, OutcomeUnknown, NodeFailed: as `propose`.
        """
        await self._change_voters(node_id, False, timeout_s)

    async def _change_voters(self, node_id: NodeId, adding: bool, timeout_s: float) -> None:
        deadline = self._clock() + timeout_s
        while True:
            # One change at a time: this one starts from what the log says now.
            voters = self._journal.voters
            if (node_id in voters) == adding and not self._change_is_open():
                return
            wanted = voters | {node_id} if adding else voters - {node_id}
            if not wanted:
                raise ChangeRefused("the last voter cannot be removed")
            if len(wanted) > MAX_VOTERS:
                raise ChangeRefused(f"there are {len(voters)} voters, more are of no use")
            remaining_s = deadline - self._clock()
            try:
                change = encode_change(voters, wanted)
                await self._submit(change, remaining_s, refusal_is_final=True)
            except ChangeRefused:
                # Never in step: two leaders that are to go would hand over to each other for ever.
                pause_s = self._timing.heartbeat_s * self._rng.uniform(1, 2)
                if self._clock() + pause_s >= deadline:
                    raise
                await trio.sleep(pause_s)

    def _change_is_open(self) -> bool:
        return self._core.commit_index() < self._journal.membership_index

    async def transfer_leadership(self, timeout_s: float) -> None:
        """If this node leads, have another voter lead; returns once this node does not.

        Raises:
          ChangeRefused: nobody else could take over in time.
          NodeFailed: this node has stopped.
        """
        with trio.move_on_after(timeout_s):
            while self.is_leader:
                self._require_running()
                self._core.begin_hand_over()
                self._wake.set()
                with trio.move_on_after(self._timing.election_min_s):
                    await self._changed.wait()
        if self.is_leader:
            raise ChangeRefused("no other voter is connected and up to date")

    async def _submit(
        self, entry: bytes, timeout_s: float, *, refusal_is_final: bool = False
    ) -> object:
        may_happen = False
        with trio.move_on_after(max(0.0, timeout_s)):
            while True:
                while self.leader is None and self._failure is None:
                    await self._changed.wait()
                self._require_running()
                attempt = _Attempt()
                callback = attempt.finish
                certain_before, may_happen = not may_happen, True
                self._core.submit(entry, callback)
                self._wake.set()
                try:
                    await self._wait_for(attempt)
                finally:
                    self._core.forget(callback)
                if attempt.done.is_set():
                    if attempt.error == private.SUCCESS:
                        return attempt.result
                    if attempt.error in _DEFINITE_REFUSALS:
                        may_happen = not certain_before
                    if attempt.error == private.REQUEST_DENIED and refusal_is_final:
                        raise ChangeRefused(
                            "another change of the voters is under way, the node is not connected "
                            "and up to date, or too few of the voters that remained are there"
                        )
                self._require_running()
                await trio.sleep(self._rng.uniform(RETRY_MIN_S, RETRY_MAX_S))
        if may_happen:
            raise OutcomeUnknown(f"no answer within {timeout_s:g} s; it may still happen")
        raise NoQuorum(f"no leader with a majority within {timeout_s:g} s")

    def _require_running(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _wait_for(self, attempt: _Attempt) -> None:
        """Until it is done, or for as long as one attempt may take, or until this node fails."""
        self._attempts.add(attempt)
        try:
            with trio.move_on_after(self._timing.attempt_s):
                await attempt.done.wait()
        finally:
            self._attempts.discard(attempt)

    # The fence's side (`private.Rules`).

    def apply(self, command: bytes, index: int) -> object:
        """Apply one entry, once, whatever it raises."""
        try:
            return self._machine.apply(command)
        except NodeFailed:
            raise
        except (MemoryError, RecursionError) as error:
            # These depend on the node: going on would let it differ from the others.
            raise NodeFailed(f"entry {index} could not be applied: {error!r}") from error
        except Exception as error:
            logger.exception("applying entry %d raised; the state machine must not", index)
            return ApplyFailed(f"entry {index}: {error!r}")

    def may_change_voters(self, voters: frozenset[NodeId]) -> bool:
        return self._fence.may_change_voters(voters)

    # The loops.

    async def _tick_loop(self) -> None:
        try:
            await self._tick_until_failure()
        except NodeFailed as error:
            self._fail(error)
        except Exception as error:
            self._fail_by_a_bug("a tick", error)

    async def _tick_until_failure(self) -> None:
        has_yielded = False
        while self._failure is None:
            self._wake = trio.Event()
            idle_s = self._tick()
            if self._commit_is_news() and not has_yielded:
                # Who waited for this commit goes first: if he has another command right away, one
                # message to each follower carries both.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                has_yielded = self._wake.is_set()
                if has_yielded:
                    continue
            has_yielded = False
            if self._commit_is_news():
                self._announce()
            with trio.move_on_after(max(0.0, idle_s)):
                await self._wake.wait()

    async def _sync_loop(self) -> None:
        try:
            await self._sync_until_failure()
        except NodeFailed as error:
            self._fail(error)
        except Exception as error:
            self._fail_by_a_bug("a write", error)

    async def _sync_until_failure(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty = trio.Event()
            while (batch := self._journal.take()) is not None:
                self._unwritten = batch
                await self._write(batch)
                self._unwritten = None
                self._journal.synced()
                self._transport.release()
                if self._may_commit_now():
                    self._wake.set()

    def _may_commit_now(self) -> bool:
        """Whether our own log, durable up to here, may be what a commit waited for."""
        core = self._core
        if core.state() == LEADER:
            others = self._journal.voters - {self.id}
            committed = core.commit_index()
            return not others or any(core.match_index(other) > committed for other in others)
        return not core.has_other_voters()

    async def _write(self, batch: Batch) -> None:
        """Make a batch durable, however long there is no space for it."""
        began = self._clock()
        while True:
            try:
                await self._write_once(batch)
            except DiskFull as error:
                if not self._disk_full:
                    self._disk_full = True
                    self._stand_aside(f"{error}", "there is; free some, it need not be restarted")
                await trio.sleep(FULL_DISK_RETRY_S)
            else:
                break
        if self._journal.is_blocked:
            what = "there is space for" if self._disk_full else "the disk writes"
            self._journal.is_blocked = self._disk_full = False
            logger.warning("%s the journal again, after %.0f s", what, self._clock() - began)

    async def _write_once(self, batch: Batch) -> None:
        # A batch that was taken and not written would leave a hole in the log, so that a
        # cancellation waits; but not for ever, should the disk hang.
        self._writing_since = self._clock()
        try:
            with trio.CancelScope(deadline=self._end_at, shield=True) as self._writing:
                await self._store.commit(batch)
            if self._writing.cancelled_caught:
                raise JournalFailed("the last write to the journal hangs; it is abandoned")
        finally:
            self._writing, self._writing_since = None, math.inf

    def _stand_aside_if_the_disk_hangs(self) -> None:
        hanging_s = self._clock() - self._writing_since
        if hanging_s > self._timing.election_max_s and not self._journal.is_blocked:
            # Heartbeats would go on, and keep the others from electing one that can commit.
            self._stand_aside(
                f"the disk has not written the journal for {hanging_s:.1f} s", "it does"
            )

    def _stand_aside(self, reason: str, until: str) -> None:
        """Lead no more, and promise nothing, until the disk takes the journal again."""
        logger.error(
            "%s: this node follows, but neither votes nor leads nor counts for a majority until %s",
            reason,
            until,
        )
        self._journal.is_blocked = True
        self._transport.forget_held()
        if self._core.state() != FOLLOWER:
            self._core.step_down(self._core.term())
        self._notice()
        self._wake.set()

    async def _write_last_words(self) -> None:
        """Keep what was decided, in order, if the disk has space for it."""
        # What still arrives would get into the batch while it is being written.
        self._end(NodeFailed("this node was stopped"))
        try:
            if self._unwritten is not None:
                await self._store.commit(self._unwritten)
            await self._store.commit(self._journal.last_words())
        except DiskFull as error:
            logger.warning("%s: what nobody was promised is not kept", error)

    def _tick(self) -> float:
        """Let the library do what is due; returns seconds until something else is."""
        core = self._core
        self._new_voters()
        self._stand_aside_if_the_disk_hangs()
        with self._step:
            self._take_step()
        if core.state() == LEADER:
            return core.next_heartbeat() - self._clock() + TIMER_GRAIN_S
        # A message that moves the deadline puts it at least that far away, and need not wake us.
        return min(core.election_deadline() - self._clock(), self._timing.election_min_s)

    def _take_step(self) -> None:
        core, journal, fence = self._core, self._journal, self._fence
        core.tick(may_campaign=fence.before_tick())
        self._new_voters()
        self._note_progress()
        self._reads.tick(self._timing.heartbeat_s)
        if core.state() == LEADER:
            if core.last_index() != self._announced[0]:
                self._announce()
            if fence.should_transfer:
                fence.should_transfer = False
                core.begin_hand_over()
            core.hand_over_if_due()
        elif core.election_deadline() <= core.clock():
            core.postpone_election()  # it could not start one: nobody is connected
        self._compact()
        if journal.dirty:
            self._dirty.set()
        self._notice()

    def _commit_is_news(self) -> bool:
        core = self._core
        return core.state() == LEADER and core.commit_index() != self._announced[1]

    def _announce(self) -> None:
        """Send the followers the entries and the commit index that they do not know."""
        self._core.send_appends()
        self._announced = (self._core.last_index(), self._core.commit_index())

    def _note_progress(self) -> None:
        applied = self._core.applied_index()
        if applied != self._progressed_to:
            self._progressed_to = applied
            self._progress.set()
            self._progress = trio.Event()

    def _new_voters(self) -> bool:
        """Make the library's voters those of the log. Returns whether they changed."""
        voters = self._journal.voters
        if voters == self._used_voters:
            return False
        self._used_voters = voters
        self._core.use_voters(voters)
        self._notice()
        return True

    def _compact(self) -> None:
        core, journal = self._core, self._journal
        applied = core.applied_index()
        new = applied - max(core.first_index(), journal.snapshot_index)
        is_worth_while = new >= COMPACT_ENTRIES or (
            new >= MIN_COMPACT_ENTRIES and journal.bytes_size >= COMPACT_BYTES
        )
        if not is_worth_while or self._clock() < self._compact_after:
            return
        try:
            journal.compact(self._machine.snapshot(), applied)
        except StateTooLarge as error:
            self._compact_after = self._clock() + COMPACT_RETRY_S
            if not self._state_too_large:
                logger.error(
                    "%s: the journal grows until it is smaller, and nobody new can catch up; "
                    "delete what the cluster does not need",
                    error,
                )
            self._state_too_large = True
        else:
            self._state_too_large = False

    def _notice(self) -> None:
        core = self._core
        status = RaftStatus(
            core.leader_id(), core.state() == LEADER, core.term(), self._journal.voters
        )
        if status == self._status:
            return
        if status.leader != self._status.leader:
            leader = "nobody" if status.leader is None else short(status.leader)
            logger.info("%s leads in term %d", leader, status.term)
        self._status = status
        self._changed.set()
        self._changed = trio.Event()
        if self._observer is not None:
            try:
                self._observer(status)
            except Exception:
                logger.exception("the observer of consensus raised")

    def _fail(self, error: NodeFailed) -> None:
        logger.critical("consensus stopped: %s", error)
        self._end(error)

    def _fail_by_a_bug(self, doing: str, error: Exception) -> None:
        """Stop for an error that nobody foresaw: nobody knows how much was carried out."""
        logger.error("%s raised", doing, exc_info=error)
        self._fail(NodeFailed(f"{doing}: {error!r}"))

    def _end(self, error: NodeFailed) -> None:
        """Take part in nothing any more, and tell all who wait."""
        self._failure = self._failure or error
        self._changed.set()
        self._changed = trio.Event()
        self._progress.set()
        self._wake.set()
        for attempt in self._attempts:
            attempt.done.set()
