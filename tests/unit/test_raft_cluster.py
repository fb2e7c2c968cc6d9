"""Whole nodes on virtual time: elections, commits, crashes, partitions, membership."""

import builtins
import contextlib
import pickle
import random
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import msgspec
import pysyncobj.pickle
import pysyncobj.syncobj
import pytest
import trio
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.raft import node as node_module
from ollamad.raft.errors import (
    ApplyFailed,
    ChangeRefused,
    CommandTooLarge,
    JournalFailed,
    NodeFailed,
    NoQuorum,
    OutcomeUnknown,
    RaftError,
    SafetyViolation,
)
from ollamad.wire.raftwire import (
    MAX_COMMAND_SIZE,
    Ack,
    Append,
    Install,
    MalformedMessage,
    Placed,
    VoteRequest,
    decode,
    encode,
    encode_voters,
)
from tests.fakes.raft_cluster import Cluster, Host, MemoryDisk

Found = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def found(nursery: trio.Nursery) -> Found:
    """Makes a cluster of these nodes, named by letters; it ends with the test."""

    async def make(names: str = "abc", seed: int = 1) -> Cluster:
        made = Cluster(nursery, seed)
        if names:
            await made.founded(names)
        return made

    return make


def others(host: Host, names: str = "abc") -> str:
    return names.replace(host.id, "")


async def test_a_founder_leads_at_once_and_alone(autojump_clock: MockClock, found: Found) -> None:
    c = await found("")
    host = await c.start("a")
    started = trio.current_time()
    assert await host.raft.propose(b"x", 1) == b"done x"
    assert trio.current_time() - started < 0.1
    assert host.raft.is_leader
    assert host.raft.has_quorum
    assert host.raft.voters == {"a"}


async def test_any_node_takes_proposals_and_all_apply_them_in_one_order(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    async with trio.open_nursery() as nursery:
        for number in range(60):
            proposer = c["abc"[number % 3]].raft
            nursery.start_soon(proposer.propose, b"c%d" % number, 5)
    await c.settled()
    assert len(c["a"].ledger.commands) == 60


async def test_the_result_is_visible_on_the_node_that_proposed(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    for name in "abc":
        await c[name].raft.propose(name.encode(), 5)
        assert name.encode() in c[name].ledger.commands


async def test_nothing_is_pickled_or_unpickled(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, found: Found
) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, refuse)
        monkeypatch.setattr(pysyncobj.pickle, name, refuse)
    for name in ("_load", "_loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 100)
    monkeypatch.setattr("ollamad.raft.journal.COMPACTION_TAIL", 10)
    c = await found()
    leader = await c.leader()
    await c.kill(other := others(leader)[0])
    for number in range(300):
        await leader.raft.propose(b"%d" % number, 5)
    await leader.raft.propose(bytes(MAX_COMMAND_SIZE), 5)  # stock cuts and pickles large ones
    restarted = await c.start(other)
    await c.settled()
    assert restarted.ledger.restored == 1  # by the leader's snapshot
    await leader.raft.remove_voter(NodeId(other), 5)
    await c.kill(leader.id)
    await c.start(leader.id)
    await c.leader()


async def test_commands_have_a_limit(autojump_clock: MockClock, found: Found) -> None:
    c = await found("a")
    with pytest.raises(CommandTooLarge):
        await c["a"].raft.propose(bytes(MAX_COMMAND_SIZE + 1), 5)


# Crashes.


async def test_another_leads_after_a_crash_within_two_timeouts(
    autojump_clock: MockClock, found: Found
) -> None:
    for seed in range(5):
        c = await found(seed=seed)
        leader = await c.leader()
        await leader.raft.propose(b"before", 5)
        await c.kill(leader.id)
        killed = trio.current_time()
        proposer = c[others(leader)[0]].raft
        assert await proposer.propose(b"after", 5) == b"done after"
        assert trio.current_time() - killed < 2.0
        assert c[others(leader)[1]].raft.leader != leader.id
        await c.start(leader.id)
        await c.settled()
        assert c[leader.id].ledger.commands == [b"before", b"after"]


async def test_a_follower_notices_silence_at_its_deadline(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    follower = c[others(leader)[0]].raft
    rng = follower._core._rng = LongTimeouts()
    original = follower._tick
    ticked = trio.Event()

    def spied() -> float:
        ticked.set()
        return original()

    await trio.sleep(1)
    follower._tick = spied  # type: ignore[method-assign]
    await ticked.wait()  # now it sleeps, with a late deadline
    rng.are_short = True
    await trio.sleep(0.15)  # a heartbeat gave it an early one
    c.cut.add((leader.id, follower.id))
    await trio.sleep(c.timing.election_min_s + 0.01)
    assert follower.leader is None


class LongTimeouts(random.Random):
    are_short = False

    def uniform(self, a: float, b: float) -> float:
        return a if self.are_short else b


async def test_acknowledged_commands_survive_a_crash_of_all(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    for host in c.hosts.values():
        host.disk.sync_s = 0.002
    acknowledged: list[bytes] = []

    async def propose(number: int) -> None:
        command = b"%d" % number
        await c["abc"[number % 3]].raft.propose(command, 5)
        acknowledged.append(command)

    with trio.move_on_after(0.5):
        async with trio.open_nursery() as nursery:
            for number in range(10_000):
                nursery.start_soon(propose, number)
                await trio.sleep(0.0005)
    for name in "abc":
        await c.kill(name)
    for name in "abc":
        await c.start(name)
    await c.leader()
    await c["a"].raft.propose(b"last", 5)
    await c.settled()
    assert len(acknowledged) > 100
    assert set(acknowledged) <= set(c["a"].ledger.commands)


async def test_what_was_never_synced_is_lost_by_a_crash_and_was_never_acknowledged(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("a")
    host = c["a"]
    host.disk.stall = trio.Event()
    with pytest.raises(OutcomeUnknown):
        await host.raft.propose(b"x", 1)
    assert host.ledger.commands == []  # our own log is no majority before it is on disk
    await c.kill("a")
    await c.start("a")
    await c["a"].raft.propose(b"y", 5)
    assert c["a"].ledger.commands == [b"y"]


async def test_a_follower_with_a_slow_disk_does_not_vouch(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    for name in others(leader):
        c[name].disk.stall = trio.Event()
    with pytest.raises(OutcomeUnknown):
        await leader.raft.propose(b"x", 0.3)
    for name in others(leader):
        stall = c[name].disk.stall
        assert stall is not None
        stall.set()
        c[name].disk.stall = None
    assert await leader.raft.propose(b"x", 5) == b"done x"


async def test_a_leader_with_a_slow_disk_commits_as_soon_as_it_is_done(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    await trio.sleep(0.05)
    leader.disk.sync_s = 0.01
    began = trio.current_time()
    await leader.raft.propose(b"x", 5)
    assert 0.01 <= trio.current_time() - began < 0.015


async def test_a_clean_end_loses_nothing_and_the_state_is_there_before_the_quorum(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    for number in range(5):
        await c["a"].raft.propose(b"%d" % number, 5)
    await c.settled()
    for name in "abc":
        await c.stop(name)
    host = await c.start("b")
    assert len(host.ledger.commands) == 5
    assert not host.raft.has_quorum


async def test_an_end_in_the_middle_of_a_sync_leaves_no_hole(
    nursery: trio.Nursery, autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    await leader.raft.propose(b"before", 5)
    leader.disk.sync_s = 0.05
    for command in (b"being written", b"staged behind it"):
        nursery.start_soon(_try_to_propose, leader.raft, command)
        await trio.sleep(0.01)
    await c.stop(leader.id)
    again = await c.start(leader.id)
    await c.settled()
    assert b"staged behind it" in again.ledger.commands


async def _try_to_propose(node: node_module.RaftNode, command: bytes) -> None:
    with contextlib.suppress(RaftError):
        await node.propose(command, 1)


async def test_a_founder_that_restarts_does_not_lead_alone(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    for name in "abc":
        await c.kill(name)
    host = await c.start("a")
    assert host.raft.voters == {"a", "b", "c"}
    with pytest.raises(NoQuorum):
        await host.raft.propose(b"x", 5)
    assert host.raft.term <= 1
    assert host.raft.leader is None


async def test_a_failing_disk_stops_the_node_and_the_others_go_on(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    leader.disk.fail = True
    assert await c[others(leader)[0]].raft.propose(b"x", 5) == b"done x"
    assert isinstance(leader.error, JournalFailed)
    with pytest.raises(JournalFailed):
        await leader.raft.propose(b"y", 5)


async def test_a_contradiction_stops_the_node(autojump_clock: MockClock, found: Found) -> None:
    c = await found()
    leader = await c.leader()
    await leader.raft.propose(b"x", 5)
    await c.settled()
    follower = c[others(leader)[0]]
    wrong = Append(leader.raft.term, 0, leader.raft.applied_index, leader.raft.term - 1)
    follower.raft.receive(leader.id, node_module.encode(wrong))
    await trio.sleep(0.1)
    assert isinstance(follower.error, SafetyViolation)


# Partitions.


async def test_a_cut_off_leader_steps_down_and_its_proposals_are_not_lost_silently(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    rest = others(leader)
    c.partition(leader.id, rest)
    with pytest.raises(OutcomeUnknown):
        await leader.raft.propose(b"minority", 2)
    assert not leader.raft.is_leader
    assert not leader.raft.has_quorum
    with pytest.raises(NoQuorum):
        await leader.raft.propose(b"nobody", 2)
    assert await c[rest[0]].raft.propose(b"majority", 2) == b"done majority"
    c.heal()
    await c.leader()
    await c.settled()
    assert b"majority" in leader.ledger.commands
    assert b"minority" not in leader.ledger.commands


async def test_a_node_that_returns_does_not_depose_a_healthy_leader(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    away = others(leader)[0]
    term = leader.raft.term
    for _ in range(5):
        c.partition(away, others(c[away]))
        await trio.sleep(3)
        assert c[away].raft.leader is None
        c.heal()
        await trio.sleep(1)
        assert leader.raft.is_leader
        assert c[away].raft.term == leader.raft.term == term
        assert c[away].raft.has_quorum


async def test_one_way_cuts_do_not_depose_a_leader_that_a_majority_hears(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    deaf = others(leader)[0]
    c.cut.add((leader.id, NodeId(deaf)))
    await trio.sleep(10)
    assert leader.raft.is_leader
    assert leader.raft.term == 1


@pytest.mark.parametrize("seed", range(6))
async def test_a_bad_network_costs_time_and_nothing_else(
    seed: int, autojump_clock: MockClock, found: Found
) -> None:
    c = await found("abcde", seed=seed)
    c.jitter_s, c.loss = 0.02, 0.05
    rng = random.Random(seed)
    acknowledged: list[bytes] = []

    async def write(name: str) -> None:
        for number in range(40):
            command = b"%s%d" % (name.encode(), number)
            node = c[name].node
            if node is not None:
                try:
                    await node.propose(command, 4)
                    acknowledged.append(command)
                except RaftError:
                    pass
            await trio.sleep(rng.uniform(0, 0.2))

    async with trio.open_nursery() as nursery:
        for name in "abcde":
            nursery.start_soon(write, name)
        for _ in range(6):
            await trio.sleep(rng.uniform(0.2, 1.5))
            match rng.randrange(3):
                case 0:
                    names = rng.sample("abcde", 5)
                    c.partition("".join(names[:2]), "".join(names[2:]))
                    await trio.sleep(rng.uniform(0.2, 2))
                    c.heal()
                case 1:
                    await c.kill(name := rng.choice("abcde"))
                    await trio.sleep(rng.uniform(0, 1))
                    await c.start(name)
                case _:
                    for host in c.hosts.values():
                        host.disk.sync_s = rng.uniform(0, 0.05)
    c.jitter_s, c.loss = 0.0, 0.0
    await c.leader()
    await c["a"].raft.propose(b"last", 5)
    await c.settled()
    assert len(acknowledged) > 50
    assert set(acknowledged) <= set(c["a"].ledger.commands)
    leaders: dict[int, set[object]] = {}
    for host in c.hosts.values():
        for status in host.history:
            if status.is_leader:
                leaders.setdefault(status.term, set()).add(host.id)
    assert all(len(names) == 1 for names in leaders.values())


# Fences that only whole nodes show.


async def test_an_apply_that_raises_is_answered_once_and_wedges_nobody(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    calls: list[bytes] = []

    def explode(command: bytes) -> None:
        calls.append(command)
        if command == b"bad":
            raise ValueError("boom")

    for host in c.hosts.values():
        host.ledger.on_apply = explode
    for name in "abc":
        with pytest.raises(ApplyFailed, match="boom"):
            await c[name].raft.propose(b"bad", 5)
    assert await c["b"].raft.propose(b"good", 5) == b"done good"
    await c.settled()
    assert calls.count(b"bad") == 9


async def test_a_node_that_must_not_apply_a_command_stops_and_the_others_go_on(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    old = c[others(leader)[0]]

    def refuse(command: bytes) -> None:
        if command == b"new":
            raise NodeFailed("too new for this version")

    old.ledger.on_apply = refuse
    assert await leader.raft.propose(b"new", 5) == b"done new"
    assert old.stopped is not None
    await old.stopped.wait()
    assert isinstance(old.error, NodeFailed)
    assert b"new" not in old.ledger.commands
    assert await leader.raft.propose(b"more", 5) == b"done more"


async def test_an_observer_that_raises_is_only_logged(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()

    def explode(status: object) -> None:
        raise ValueError("boom")

    follower = c[others(leader)[0]]
    follower.raft._observer = explode
    await c.kill(leader.id)
    assert await follower.raft.propose(b"x", 5) == b"done x"
    assert "the observer of consensus raised" in caplog.text


async def test_a_cancelled_proposal_leaves_nothing_behind(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    follower = c[others(leader)[0]]
    c.spy = lambda source, to, frame: not isinstance(decode(frame), Placed)
    for number in range(5):
        with trio.move_on_after(0.1):
            await follower.raft.propose(b"%d" % number, 5)
    assert not follower.raft._core._SyncObj__commandsWaitingReply


async def test_a_lost_answer_is_asked_for_again_and_the_command_applies_once(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    follower = c[others(leader)[0]]
    lost: list[bytes] = []

    def lose_the_first(source: NodeId, to: NodeId, frame: bytes) -> bool:
        if isinstance(decode(frame), Placed) and not lost:
            lost.append(frame)
            return False
        return True

    c.spy = lose_the_first
    assert await follower.raft.propose(b"x", 5) == b"done x"
    await c.settled()
    assert leader.ledger.commands == [b"x"]


async def test_nobody_hears_of_a_term_that_may_begin_anew(
    autojump_clock: MockClock, found: Found
) -> None:
    """A voter alone that dies before its term is on its disk leads the same term once more: who was
    told of an entry of the first one would take another one for it."""
    c = await found("a")
    follower = await c.start("b", learner_of="a")
    await c["a"].raft.propose(b"start", 5)
    await c.settled()
    await c.kill("a")
    leader = c["a"]
    leader.disk.stall = trio.Event()
    await c.start("a")
    answers: list[bytes] = []

    async def ask() -> None:
        answers.append(await follower.raft.propose(b"x", 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.05)
        term = c["a"].raft._core.term()
        await c.kill("a")
        assert c["a"].disk.meta.term < term
        leader = await c.start("a")
        await leader.raft.propose(b"y", 5)
    assert answers == [b"done x"]
    await c.settled()
    assert c["b"].ledger.commands == [b"start", b"y", b"x"]


async def test_a_leader_has_a_change_of_the_voters_before_anybody_else(
    autojump_clock: MockClock, found: Found
) -> None:
    """Whom it removed uses the new list at once: it stands for no election, and with the longer log
    votes for nobody. If the leader dies without the change, it would need that vote."""
    c = await found("ab")
    leader = await c.leader()
    other = c[others(leader)[0]]
    await c.settled()
    leader.disk.stall = trio.Event()
    with contextlib.suppress(RaftError):
        await leader.raft.remove_voter(other.id, 0.3)
    assert leader.raft._journal.voters == {leader.id}
    assert other.raft._journal.voters == {leader.id, other.id}
    await c.kill(leader.id)
    await c.start(leader.id)
    await c.leader()
    await leader.raft.propose(b"x", 10)


async def test_voters_that_a_status_has_told_already_are_used_all_the_same(
    autojump_clock: MockClock, found: Found
) -> None:
    """A disk that fills up between the entry and the tick has the status told first."""
    c = await found("a")
    raft = c["a"].raft
    raft._journal.add(encode_voters(frozenset(map(NodeId, "ab"))), raft._core.last_index() + 1, 9)
    raft._notice()
    raft._tick()
    assert raft._core.has_other_voters()


async def test_malformed_frames_are_named_to_the_caller(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("a")
    with pytest.raises(MalformedMessage):
        c["a"].raft.receive(NodeId("b"), b"garbage")


async def test_no_thread_no_pipe_no_poll(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, found: Found
) -> None:
    import select
    import threading

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("the library opened something")

    monkeypatch.setattr("os.pipe", refuse)
    monkeypatch.setattr(select, "poll", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    c = await found()
    await c["b"].raft.propose(b"x", 5)


async def test_an_idle_cluster_is_quiet(autojump_clock: MockClock, found: Found) -> None:
    c = await found()
    await c.settled()
    ticks = 0
    for host in c.hosts.values():
        original = host.raft._tick

        def counted(original: Any = original) -> float:
            nonlocal ticks
            ticks += 1
            return float(original())

        host.raft._tick = counted  # type: ignore[method-assign]
    frames = c.frames
    syncs = sum(host.disk.syncs for host in c.hosts.values())
    await trio.sleep(100)
    assert c.frames - frames < 100 * 45  # two heartbeats and answers, ten times a second
    assert ticks < 100 * 20
    assert sum(host.disk.syncs for host in c.hosts.values()) == syncs


async def test_the_news_of_a_commit_travels_with_the_next_command(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    bare, full = 0, 0

    def spy(source: NodeId, to: NodeId, frame: bytes) -> bool:
        nonlocal bare, full
        message = decode(frame)
        if isinstance(message, Append):
            full += bool(message.entries)
            bare += not message.entries
        return True

    c.spy = spy
    for number in range(20):
        await leader.raft.propose(b"%d" % number, 5)
    assert full == 2 * 20
    assert bare == 0  # it took less time than a heartbeat
    await trio.sleep(0.01)
    assert bare == 2  # nothing followed, so the last commit travelled alone, and at once
    for name in others(leader):
        assert len(c[name].ledger.commands) == 20


async def test_a_mere_commit_is_not_answered(autojump_clock: MockClock, found: Found) -> None:
    c = await found()
    leader = await c.leader()
    acks = 0

    def spy(source: NodeId, to: NodeId, frame: bytes) -> bool:
        nonlocal acks
        acks += isinstance(decode(frame), Ack)
        return True

    await trio.sleep(0.01)
    c.spy = spy
    for number in range(20):
        await c[others(leader)[0]].raft.propose(b"%d" % number, 5)
        await trio.sleep(0.001)
    assert acks == 2 * 20
    await trio.sleep(0.2)
    assert acks >= 2 * 21  # heartbeats are


async def test_a_follower_ticks_once_for_a_commit(autojump_clock: MockClock, found: Found) -> None:
    c = await found()
    leader = await c.leader()
    follower = c[others(leader)[0]].raft
    original = follower._tick
    ticks = 0

    def counted() -> float:
        nonlocal ticks
        ticks += 1
        return original()

    follower._tick = counted  # type: ignore[method-assign]
    for number in range(50):
        await leader.raft.propose(b"%d" % number, 5)
    await trio.sleep(0.01)
    assert follower.applied_index == leader.raft.applied_index
    assert ticks <= 50 + 2


# Membership.


async def test_a_learner_follows_without_a_vote_until_it_is_made_a_voter(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("ab")
    await c["a"].raft.propose(b"x", 5)
    await c.start("c", learner_of="a")
    await trio.sleep(0.5)
    assert c["c"].ledger.commands == [b"x"]
    assert c["c"].raft.voters == {"a", "b"}
    leader = await c.leader("ab")
    c.partition(leader.id, "abc".replace(leader.id, ""))
    await trio.sleep(3)
    assert all(c[name].raft.leader is None for name in "abc")  # two of two voters are needed
    c.heal()
    await c.leader()
    await c["c"].raft.add_voter(NodeId("c"), 5)  # through any node
    assert c["c"].raft.voters == {"a", "b", "c"}
    await c.settled()
    leader = await c.leader()
    await c.kill(leader.id)
    await c[others(leader)[0]].raft.propose(b"y", 5)


async def test_a_learner_proposes_too(autojump_clock: MockClock, found: Found) -> None:
    c = await found("a")
    await c.start("b", learner_of="a")
    assert await c["b"].raft.propose(b"x", 5) == b"done x"


async def test_a_node_that_is_not_there_is_not_made_a_voter(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("ab")
    with pytest.raises(ChangeRefused):
        await c["b"].raft.add_voter(NodeId("z"), 2)
    assert c["a"].raft.voters == {"a", "b"}


async def test_a_removed_voter_becomes_a_learner_and_disturbs_nobody(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("abcd")
    leader = await c.leader()
    gone = others(leader, "abcd")[0]
    await c[gone].raft.remove_voter(NodeId(gone), 5)
    term = leader.raft.term
    await leader.raft.propose(b"x", 5)
    await trio.sleep(5)
    assert leader.raft.term == term
    assert c[gone].raft.voters == leader.raft.voters == set("abcd") - {gone}
    assert c[gone].ledger.commands == [b"x"]


async def test_a_leader_that_is_removed_hands_over_first(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    await c[others(leader)[0]].raft.remove_voter(leader.id, 5)
    heir = await c.leader(others(leader))
    assert heir is not leader
    assert heir.raft.voters == set("abc") - {leader.id}
    await heir.raft.propose(b"x", 5)


async def test_a_change_whose_answer_was_lost_does_not_undo_the_next_one(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    for name in "de":
        await c.start(name, learner_of="a")
    leader = await c.leader()
    asker = c[others(leader)[0]]
    lost = list[Placed]()

    def lose_one(source: NodeId, to: NodeId, frame: bytes) -> bool:
        message = decode(frame)
        if (source, to) != (leader.id, asker.id) or not isinstance(message, Placed) or lost:
            return True
        lost.append(message)
        return False

    c.spy = lose_one
    await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asker.raft.add_voter, NodeId("d"), 10)
        await trio.sleep(0.5)
        assert leader.raft.voters == set("abcd")
        await leader.raft.add_voter(NodeId("e"), 10)  # before the asker tries again
    assert lost
    await c.settled()
    assert leader.raft.voters == set("abcde")


async def test_a_blank_node_votes_for_nobody_whatever_an_old_log_says(
    autojump_clock: MockClock, found: Found
) -> None:
    """Two leave and begin again with blank logs; one that was cut off takes them for voters."""
    c = await found("abcde")
    leader = await c.leader()
    cut_off, *gone = others(leader, "abcde")[:3]
    rest = others(leader, "abcde")[3:] + leader.id
    c.partition(cut_off, others(c[cut_off], "abcde"))
    for name in gone:
        await leader.raft.remove_voter(NodeId(name), 10)
        await c.kill(name)
        c[name].disk = MemoryDisk()
    assert await leader.raft.propose(b"acknowledged", 5)
    assert c[cut_off].raft.voters == set("abcde")
    c.cut.clear()
    c.partition(rest, cut_off + "".join(gone))
    for name in gone:
        await c.start(name, learner_of=leader.id)
        c[cut_off].raft.peer_connected(NodeId(name))
    # Also one that skips the pre-vote is refused.
    vote = VoteRequest(99, 99, 99)
    c[gone[0]].raft.receive(NodeId(cut_off), encode(vote))
    await trio.sleep(5)
    assert c[gone[0]].raft.term == 99
    assert [c[name].raft.leader for name in (cut_off, *gone)] == [None] * 3
    assert all(host.disk.meta.voted_for is None for host in map(c.__getitem__, gone))
    c.heal()
    await c.leader()
    await c.settled()
    assert c[cut_off].ledger.commands == [b"acknowledged"]


async def test_two_nodes_shrink_to_one(autojump_clock: MockClock, found: Found) -> None:
    c = await found("ab")
    leader = await c.leader()
    await leader.raft.remove_voter(NodeId(others(leader, "ab")), 5)
    await c.kill(others(leader, "ab"))
    assert await leader.raft.propose(b"x", 5) == b"done x"
    with pytest.raises(ChangeRefused):
        await leader.raft.remove_voter(leader.id, 5)


async def test_what_arrives_during_the_last_write_is_not_half_written(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    leader = await c.leader()
    stopping, other = others(leader)
    c[stopping].disk.sync_s = 3.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(c.stop, stopping)
        await trio.sleep(0.1)
        await leader.raft.transfer_leadership(5)
        await c.leader(other + leader.id)
    disk = c[stopping].disk
    assert disk.entries[max(disk.entries)][2] <= disk.meta.term


async def test_of_two_removals_at_once_one_leaves_a_voter(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("ab")
    leader = await c.leader()
    outcomes = []

    async def remove(name: str) -> None:
        try:
            await leader.raft.remove_voter(NodeId(name), 5)
            outcomes.append("done")
        except ChangeRefused:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(remove, name)
    assert sorted(outcomes) == ["done", "refused"]
    assert len((await c.leader()).raft.voters) == 1


async def test_leadership_moves_without_a_gap(autojump_clock: MockClock, found: Found) -> None:
    c = await found()
    for _ in range(5):
        leader = await c.leader()
        started = trio.current_time()
        await leader.raft.transfer_leadership(5)
        await c.leader()
        assert trio.current_time() - started < 0.3
    await c["a"].raft.propose(b"x", 5)


async def test_a_transfer_without_an_heir_is_refused(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found("a")
    with pytest.raises(ChangeRefused):
        await c["a"].raft.transfer_leadership(2)


async def test_a_promotion_survives_the_leaders_crash_before_the_learner_knows(
    autojump_clock: MockClock, found: Found
) -> None:
    # The entry makes b a voter whose vote a needs, and b has not seen the entry.
    c = await found("a")
    await c.start("b", learner_of="a")
    await trio.sleep(0.5)
    assert c["a"].raft.caught_up(NodeId("b"))
    c.cut.add((NodeId("a"), NodeId("b")))
    with pytest.raises(OutcomeUnknown):
        await c["a"].raft.add_voter(NodeId("b"), 0.5)
    await c.kill("a")
    c.cut.clear()
    assert c["b"].raft.voters == {"a"}
    await c.start("a")
    assert c["a"].raft.voters == {"a", "b"}
    await c.leader()
    assert await c["b"].raft.propose(b"x", 5) == b"done x"


async def test_a_node_is_told_once_what_it_is(autojump_clock: MockClock, found: Found) -> None:
    c = await found("a")
    with pytest.raises(RaftError):
        c["a"].raft.bootstrap()
    with pytest.raises(RaftError):
        c["a"].raft.start_as_learner(frozenset({NodeId("b")}))


# Snapshots.


async def test_a_late_node_gets_a_snapshot_and_restarts_from_it(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, found: Found
) -> None:
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 100)
    monkeypatch.setattr("ollamad.raft.journal.COMPACTION_TAIL", 10)
    monkeypatch.setattr("ollamad.wire.raftwire.SNAPSHOT_CHUNK_SIZE", 100)
    monkeypatch.setattr("ollamad.raft.private.SNAPSHOT_CHUNK_SIZE", 100)
    monkeypatch.setattr("ollamad.raft.transport.SNAPSHOT_CHUNK_SIZE", 100)
    c = await found()
    parts = 0

    def lossy(source: NodeId, to: NodeId, frame: bytes) -> bool:
        nonlocal parts
        if isinstance(decode(frame), Install):
            parts += 1
            return parts != 7  # a part is lost; the transfer begins again
        return True

    c.spy = lossy
    leader = await c.leader()
    await c.kill(late := others(leader)[0])
    for number in range(500):
        await leader.raft.propose(b"command %d" % number, 5)
    host = await c.start(late)
    await c.settled()
    assert parts > 30
    assert host.ledger.restored == 1
    assert len(host.ledger.commands) == 500
    assert leader.raft._core.first_index() > 300
    await c.kill(late)
    host = await c.start(late)
    assert host.ledger.restored == 1  # from its own disk now
    await leader.raft.propose(b"more", 5)
    await c.settled()
    learner = await c.start("d", learner_of=leader.id)
    await c.settled()
    assert learner.raft.voters == {"a", "b", "c"}


@pytest.mark.parametrize("state_size", [0, 3_000_000])
async def test_a_snapshot_arrives_over_a_slow_link_and_heartbeats_with_it(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, found: Found, state_size: int
) -> None:
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 100)
    monkeypatch.setattr("ollamad.raft.journal.COMPACTION_TAIL", 10)
    c = await found()
    leader = await c.leader()
    await c.kill(late := others(leader)[0])
    for number in range(300):
        await leader.raft.propose(b"%d" % number + bytes(state_size // 300), 5)
    send, free_at, most = c._send, 0.0, 0.0

    def slow(source: NodeId, to: NodeId, frame: bytes) -> None:
        """1 MB/s from the leader to that node, which queues up to 3 MB."""
        nonlocal free_at, most
        if (source, to) == (leader.id, late):
            free_at = max(free_at, trio.current_time()) + len(frame) / 1e6
            c.delay_s = free_at - trio.current_time()
            most = max(most, c.delay_s)
            if c.delay_s > 3.0:
                return
        send(source, to, frame)
        c.delay_s = 0.0002

    monkeypatch.setattr(c, "_send", slow)
    terms = {host.raft.term for host in c.hosts.values() if host.node is not None}
    began = trio.current_time()
    host = await c.start(late)
    await c.settled()
    assert host.ledger.restored == 1
    assert trio.current_time() - began < 2 * state_size / 1e6 + 2
    assert most < 2.6, "what is not acknowledged is bounded"
    assert {host.raft.term for host in c.hosts.values()} == terms


async def test_a_state_that_is_too_large_for_a_snapshot_stops_nobody(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    found: Found,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ollamad.raft.journal.MAX_SNAPSHOT_SIZE", 20_000)
    monkeypatch.setattr("ollamad.raft.journal.COMPACTION_TAIL", 10)
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 100)
    c = await found("a")
    host = c["a"]
    for number in range(400):
        await host.raft.propose(b"%d" % number + bytes(100), 5)
    assert host.error is None
    journal = host.raft._journal
    first = journal.snapshot_index
    assert 0 < first < 200, "the old snapshot stays"
    assert len(journal) > 200
    attempts, snapshot = 0, host.ledger.snapshot

    def counted() -> bytes:
        nonlocal attempts
        attempts += 1
        return snapshot()

    monkeypatch.setattr(host.ledger, "snapshot", counted)
    assert host.raft.state_too_large
    await trio.sleep(300)
    assert 4 <= attempts <= 5
    assert journal.snapshot_index == first
    (complaint,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert "limit is 20000" in complaint
    host.ledger.commands = [b"little"]
    await trio.sleep(61)
    assert journal.snapshot_index > 400
    assert not host.raft.state_too_large
    await c.stop("a")
    host = await c.start("a")
    assert host.ledger.commands[0] == b"little"


async def test_large_entries_are_compacted_however_few_they_are(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, found: Found
) -> None:
    c = await found("a")
    host = c["a"]
    monkeypatch.setattr(type(host.ledger), "snapshot", lambda self: b"all")
    for number in range(100):
        await host.raft.propose(b"%d" % number + bytes(1_000_000), 5)
    journal = host.raft._journal
    assert journal.snapshot_index >= 64
    assert journal.bytes_size < 50e6


async def test_a_message_of_a_newer_kind_is_ignored_and_told_once(
    autojump_clock: MockClock, found: Found, caplog: pytest.LogCaptureFixture
) -> None:
    c = await found()
    leader = await c.leader()
    for number in range(3):
        leader.raft.receive(NodeId("b"), msgspec.msgpack.encode((f"kind{number}", 1)))
    assert [r.message for r in caplog.records if "kind" in r.message] == [
        "a message of kind 'kind0' of b is ignored: it is newer"
    ]
    await leader.raft.propose(b"x", 5)


async def test_messages_carry_terms_and_a_vote_request_follows_a_pre_vote(
    autojump_clock: MockClock, found: Found
) -> None:
    c = await found()
    seen: list[object] = []
    c.spy = lambda source, to, frame: seen.append(decode(frame)) is None
    leader = await c.leader()
    await c.kill(leader.id)
    await c.leader(others(leader))
    assert all(m.term >= 1 for m in seen if isinstance(m, Ack))
    requests = [type(m).__name__ for m in seen]
    assert requests.index("PreVote") < requests.index(VoteRequest.__name__)
