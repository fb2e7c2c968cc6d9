"""A disk that hangs, an heir that is deaf, a loop that fails: the cluster goes on, a node ends."""

import itertools
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.raft import node as node_module
from ollamad.raft.errors import (
    ChangeRefused,
    JournalFailed,
    NodeFailed,
    NoQuorum,
    OutcomeUnknown,
    RaftError,
    SafetyViolation,
)
from ollamad.raft.journal import Batch
from ollamad.raft.node import SHUTDOWN_S
from ollamad.raft.private import CANDIDATE, FOLLOWER, StepClock, Timing
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.wire.raftwire import Ack, PreVote, TakeOver, Vote, VoteRequest, decode, encode
from tests.fakes.raft_cluster import Cluster, Host
from tests.fakes.raft_solo import Solo, command

TIMING = Timing()
P = ParamSpec("P")
T = TypeVar("T")


@pytest.fixture
async def cluster(nursery: trio.Nursery) -> Cluster:
    """Not started."""
    return Cluster(nursery)


def hang(host: Host) -> None:
    host.disk.stall = trio.Event()


def go_on(host: Host) -> None:
    assert host.disk.stall is not None
    host.disk.stall.set()
    host.disk.stall = None


def another(cluster: Cluster, host: Host) -> Host:
    return next(other for other in cluster.hosts.values() if other is not host)


async def write(host: Host, *texts: str) -> None:
    for text in texts:
        assert await host.raft.propose(text.encode(), 10) == b"done " + text.encode()


# A disk that hangs.


async def test_a_leader_whose_disk_hangs_makes_way(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await cluster.founded("abc")
    old = await cluster.leader()
    other = another(cluster, old)
    await write(other, "1")
    promised: list[object] = []

    def spy(source: NodeId, to: NodeId, frame: bytes) -> bool:
        if source == old.id and old.raft._journal.is_blocked:
            message = decode(frame)
            if isinstance(message, (Ack, PreVote, Vote, VoteRequest)):
                promised.append(message)
        return True

    cluster.spy = spy
    hang(old)
    began, seen = trio.current_time(), len(old.history)
    await write(other, "2")
    assert trio.current_time() - began < 4
    new = await cluster.leader()
    assert new is not old
    await write(old, "3")  # it still follows, and passes commands on
    assert old.ledger.commands == [b"1", b"2", b"3"]
    await trio.sleep(30)
    assert not any(status.is_leader for status in old.history[seen:])
    assert promised == []
    assert old.raft._transport._held == []
    assert old.raft.disk_hangs
    assert not old.raft.disk_full  # there may be space, after all
    (line,) = [line for line in caplog.messages if "disk" in line]
    assert "the disk has not written the journal for" in line
    go_on(old)
    await trio.sleep(1)
    assert not old.raft.disk_hangs
    lines = [line for line in caplog.messages if "disk" in line]
    assert [line.startswith("the disk writes the journal again") for line in lines] == [False, True]
    await cluster.settled()
    assert old.disk.entries.keys() == new.disk.entries.keys()
    await cluster.kill(new.id)
    await write(old, "4")  # its vote counts again, and it may lead


async def test_a_write_that_takes_long_but_ends_deposes_nobody(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    term = leader.raft.term
    leader.disk.sync_s = 0.9 * TIMING.election_max_s
    for number in range(5):
        await write(leader, f"{number}")
    assert (leader.raft.is_leader, leader.raft.term) == (True, term)


async def test_a_cluster_of_one_whose_disk_hangs_claims_nothing(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    host = await cluster.start("a")
    await write(host, "1")
    hang(host)
    with pytest.raises(OutcomeUnknown):
        await host.raft.propose(b"2", 5)
    assert not host.raft.is_leader
    assert not host.raft.has_quorum
    with pytest.raises(NoQuorum):
        await host.raft.propose(b"3", 5)
    go_on(host)
    await write(host, "4")
    assert host.ledger.commands == [b"1", b"2", b"4"]


async def test_memory_stays_bounded_while_the_disk_hangs(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 100)
    monkeypatch.setattr("ollamad.raft.journal.COMPACTION_TAIL", 10)
    await cluster.founded("abc")
    old = await cluster.leader()
    other = another(cluster, old)
    hang(old)
    await write(other, "first")
    for number in range(1000):
        await write(other, f"{number}")
        assert len(old.raft._journal) < 400
        assert len(old.raft._journal._batch.add) < 400
    assert len(old.ledger.commands) > 990
    go_on(old)
    await trio.sleep(2)
    await cluster.settled()


# The end of a node, and its failure.


async def test_a_node_ends_though_its_disk_hangs(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    host = await cluster.start("a")
    await write(host, "1")
    written = dict(host.disk.entries)
    stall = host.disk.stall = trio.Event()
    with pytest.raises(OutcomeUnknown):
        await host.raft.propose(b"2", 0.1)
    began = trio.current_time()
    assert host.scope is not None
    assert host.stopped is not None
    host.scope.cancel()
    await host.stopped.wait()
    assert trio.current_time() - began == pytest.approx(SHUTDOWN_S, abs=0.1)
    assert "it is abandoned" in caplog.text
    stall.set()
    await trio.testing.wait_all_tasks_blocked()
    assert host.disk.entries == written


async def test_a_node_ends_though_its_disk_hangs_at_the_last_words(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    host = await cluster.start("a")
    await write(host, "1")
    hang(host)
    began = trio.current_time()
    assert host.scope is not None
    assert host.stopped is not None
    host.scope.cancel()
    await host.stopped.wait()
    assert trio.current_time() - began == pytest.approx(SHUTDOWN_S, abs=0.1)
    assert "not closed in order" in caplog.text


async def test_a_write_that_was_abandoned_ends_before_the_file_is_free(tmp_path: Path) -> None:
    path = tmp_path / "raft.db"
    store = SqliteStore(path)
    await store.load()
    thread = await store._worker.run(threading.current_thread)
    gate = threading.Event()
    commit = store._commit

    def hanging(batch: Batch) -> None:
        gate.wait()
        commit(batch)

    store._commit = hanging  # type: ignore[method-assign]
    batch = Batch(add=[(command("x"), 1, 1)], term=1)
    with trio.move_on_after(0) as scope:
        await store.commit(batch)
    assert scope.cancelled_caught
    with trio.move_on_after(0) as scope:
        await store.aclose()
    assert scope.cancelled_caught
    successor = SqliteStore(path)
    with pytest.raises(JournalFailed, match="locked"):
        await successor.load()
    gate.set()
    await trio.to_thread.run_sync(thread.join, 10)
    assert not thread.is_alive()
    assert (await successor.load()).entries == batch.add
    await successor.aclose()


def break_down(*unused: object, **also_unused: object) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("where", ["_core.tick", "_announce", "_transport.release"])
async def test_a_bug_in_a_loop_stops_the_node_and_writes_nothing_more(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    await write(leader, "1")
    await trio.sleep(1)
    leader.raft._journal.setRaftCommitIndex(1)  # as a half-done step might leave it
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr(getattr(leader.raft, owner) if owner else leader.raft, name, break_down)
    with pytest.raises(NodeFailed, match="a bug"):
        await leader.raft.propose(b"2", 5)
    assert leader.stopped is not None
    await leader.stopped.wait()
    assert "ZeroDivisionError" in str(leader.error)
    if where != "_transport.release":  # which comes after a write
        assert leader.disk.meta.commit_index != 1


Wait = Callable[[Host], Awaitable[object]]
WAITS: list[Wait] = [
    lambda host: host.raft.propose(b"x", 30),
    lambda host: host.raft.read_barrier(30),
    lambda host: host.raft.transfer_leadership(30),
]


@pytest.mark.parametrize("how", ["stop", "disk", "bug"])
@pytest.mark.parametrize("wait", WAITS)
async def test_who_waits_for_a_node_that_ends_is_told_at_once(
    autojump_clock: MockClock,
    cluster: Cluster,
    wait: Wait,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    cluster.spy = lambda source, to, frame: False
    told_at = 0.0

    async def ask() -> None:
        nonlocal told_at
        with pytest.raises(NodeFailed):
            await wait(leader)
        told_at = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.2)  # it still leads
        ended_at = trio.current_time()
        if how == "stop":
            hang(leader)  # the last words take a while
            assert leader.scope is not None
            leader.scope.cancel()
        elif how == "disk":
            leader.raft._fail(JournalFailed("broken"))
        else:
            monkeypatch.setattr(leader.raft._core, "tick", break_down)
            leader.raft._wake.set()
    assert told_at == ended_at


# Handing over.


async def test_writes_go_on_while_an_heir_is_deaf(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    cluster.spy = lambda source, to, frame: not isinstance(decode(frame), TakeOver)

    async def hand_over() -> None:
        with pytest.raises(ChangeRefused):
            await leader.raft.transfer_leadership(4)

    async def leave() -> None:
        with pytest.raises(RaftError):
            await leader.raft.remove_voter(leader.id, 4)

    for attempt in (hand_over, leave):
        took_s: list[float] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt)
            ends_at = trio.current_time() + 4
            for number in itertools.count():
                began = trio.current_time()
                if began >= ends_at:
                    break
                await write(leader, f"{attempt.__name__} {number}")
                took_s.append(trio.current_time() - began)
                await trio.sleep(0.01)
        # About half of the time, in pauses of one timeout at most.
        assert max(took_s) < TIMING.election_min_s + TIMING.heartbeat_s
        assert len(took_s) > 4 / 2 / 0.01 / 2
        assert sum(one > TIMING.election_min_s / 2 for one in took_s) >= 3  # it tried again


async def test_an_heir_that_cannot_speak_does_not_take_over_later(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    term = leader.raft.term
    heir = another(cluster, leader)
    for host in cluster.hosts.values():
        heir.raft.peer_disconnected(host.id)
    heir.raft.receive(leader.id, encode(TakeOver(term)))
    await trio.sleep(0.05)
    assert not heir.raft._core.transfer_in_progress()
    for host in cluster.hosts.values():
        heir.raft.peer_connected(host.id)
    await trio.sleep(5)
    assert leader.raft.is_leader
    assert leader.raft.term == term


# One time for each step.


def test_a_clock_stands_still_within_a_step() -> None:
    ticks = itertools.count()
    clock = StepClock(lambda: float(next(ticks)))
    assert clock() == 0.0
    with clock:
        assert clock() == clock() == 1.0
    assert clock() == 2.0
    with pytest.raises(ZeroDivisionError), clock:
        break_down()
    assert clock() == 4.0


async def test_all_of_a_tick_and_of_a_delivery_happens_at_one_time(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    heard: list[set[float]] = []
    for host in cluster.hosts.values():
        host.raft._step._clock = restless()
        core, fence = host.raft._core, host.raft._fence
        for owner, name in ((fence, "before_tick"), (core, "tick"), (fence, "receive")):
            monkeypatch.setattr(owner, name, noting(core.clock, getattr(owner, name), heard))
    monkeypatch.setattr(leader.raft._step, "_clock", restless())
    await write(leader, "1")
    assert len(heard) > 10
    assert all(len(times) == 1 for times in heard)


def restless() -> Callable[[], float]:
    """A clock that goes on each time that it is read."""
    reads = itertools.count()
    return lambda: trio.current_time() + 1e-6 * next(reads)


def noting(
    clock: Callable[[], float], function: Callable[P, T], heard: list[set[float]]
) -> Callable[P, T]:
    """Note the time before and after each call."""

    def noted(*args: P.args, **kwargs: P.kwargs) -> T:
        before = clock()
        result = function(*args, **kwargs)
        heard.append({before, clock()})
        return result

    return noted


def test_a_deadline_that_passes_within_a_tick_starts_no_election() -> None:
    solo = Solo(log="1")
    may_campaign = solo.fence.before_tick()
    assert not may_campaign
    solo.now += 10
    solo.core.tick(may_campaign)
    assert (solo.core.state(), solo.core.term()) == (FOLLOWER, 1)


def test_the_library_cannot_make_itself_a_candidate() -> None:
    solo = Solo(log="1")
    with pytest.raises(SafetyViolation):
        solo.core._SyncObj__setState(CANDIDATE)
    assert solo.core.state() == FOLLOWER


# Elections that nobody wins.


async def test_timeouts_differ_more_after_each_election_that_nobody_won(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A vote takes longer than the timeouts differ: all are candidates each time, without it."""
    cluster = Cluster(nursery, timing=Timing(0.1, 0.4, 0.45))
    await cluster.founded("abcd")
    leader = await cluster.leader()
    cluster.delay_s = 0.06
    await cluster.kill(leader.id)
    rest = "".join(sorted(set("abcd") - set(leader.id)))
    started = trio.current_time()
    heir = await cluster.leader(rest)
    assert trio.current_time() - started < 8
    await write(heir, "1")
    # And as they were, once somebody leads.
    for name in rest:
        assert cluster[name].raft._core.fruitless_elections == 0
