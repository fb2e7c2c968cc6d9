"""A node whose disk is full stands aside: it follows, promises nothing, and recovers by itself."""

import logging

import pytest
import trio
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.raft import node as node_module
from ollamad.raft.errors import DiskFull, NoQuorum, OutcomeUnknown
from ollamad.raft.journal import COMPACTION_TAIL, Batch
from ollamad.raft.private import CANDIDATE, FOLLOWER
from ollamad.wire.raftwire import Ack, Append, PreVote, TakeOver, Vote, VoteRequest, decode
from tests.fakes.raft_cluster import Cluster, Host, MemoryDisk
from tests.fakes.raft_solo import Solo, command

PROMISES = (Ack, PreVote, Vote, VoteRequest)


class SmallDisk(MemoryDisk):
    """A disk that can be full; `tried` has the batches that it had no space for."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.tried: list[Batch] = []

    async def commit(self, batch: Batch) -> None:
        if self.full and not self.is_dead:
            await trio.lowlevel.checkpoint()
            self.tried.append(batch)
            raise DiskFull("/data: no space is left on the disk")
        await super().commit(batch)


@pytest.fixture
async def cluster(nursery: trio.Nursery) -> Cluster:
    """Not started; its disks are small ones."""
    cluster = Cluster(nursery)
    for name in "abc":
        cluster.hosts[NodeId(name)] = Host(NodeId(name), SmallDisk())
    return cluster


def fill(host: Host) -> SmallDisk:
    assert isinstance(host.disk, SmallDisk)
    host.disk.full = True
    return host.disk


def free(host: Host) -> None:
    assert isinstance(host.disk, SmallDisk)
    host.disk.full = False


async def write(host: Host, *texts: str, timeout_s: float = 20) -> None:
    for text in texts:
        assert await host.raft.propose(text.encode(), timeout_s) == b"done " + text.encode()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the nodes say about space."""
    return [line for line in caplog.messages if "space" in line]


async def test_a_leader_whose_disk_is_full_steps_down_at_once(
    autojump_clock: MockClock, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await cluster.founded("abc")
    old = await cluster.leader()
    b = next(host for host in cluster.hosts.values() if host is not old)
    await write(b, "1")
    disk = fill(old)
    seen = len(old.history)
    began = trio.current_time()
    await write(b, "2")
    assert trio.current_time() - began < 3
    new = await cluster.leader()
    assert new is not old
    assert old.raft.disk_full
    # It still takes commands, for the leader, and applies what the others commit.
    await write(old, "3")
    assert old.ledger.commands == [b"1", b"2", b"3"]
    await trio.sleep(30)
    assert not any(status.is_leader for status in old.history[seen:])
    assert 25 <= len(disk.tried) <= 35
    assert all(batch is disk.tried[0] for batch in disk.tried)
    (line,) = lines(caplog)
    assert "/data: no space is left on the disk: this node" in line
    free(old)
    await trio.sleep(3)
    assert not old.raft.disk_full
    assert len(lines(caplog)) == 2
    await cluster.settled()
    assert disk.entries.keys() == new.disk.entries.keys()
    assert old.raft._journal.durable_index == new.raft._journal.durable_index
    # It may lead again.
    await cluster.kill(new.id)
    await write(old, "4", timeout_s=30)


async def test_a_follower_whose_disk_is_full_promises_nothing_and_costs_nothing(
    autojump_clock: MockClock,
    cluster: Cluster,
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    follower, other = (host for host in cluster.hosts.values() if host is not leader)
    await write(leader, "before")
    term = leader.raft.term
    promised: list[object] = []

    def spy(source: NodeId, to: NodeId, frame: bytes) -> bool:
        if source == follower.id and follower.raft.disk_full:
            message = decode(frame)
            if isinstance(message, PROMISES):
                promised.append(message)
        return True

    cluster.spy = spy
    fill(follower)
    for number in range(20):
        await write(leader, f"l{number}")
        await write(follower, f"f{number}")
        await trio.sleep(0.5)
    assert promised == []
    assert follower.raft._transport._held == []
    assert (leader.raft.is_leader, leader.raft.term) == (True, term)
    # With the leader gone there is no majority, and the full one does not make one up.
    await cluster.kill(leader.id)
    with pytest.raises((NoQuorum, OutcomeUnknown)):
        await other.raft.propose(b"nobody", 5)
    assert promised == []
    free(follower)
    await write(other, "after")
    await cluster.settled(follower.id + other.id)
    assert set(follower.ledger.commands) - {b"nobody"} == {
        b"before",
        b"after",
        *(f"{who}{number}".encode() for number in range(20) for who in "lf"),
    }


async def test_when_most_disks_are_full_callers_are_told_and_space_is_all_that_is_needed(
    autojump_clock: MockClock,
    cluster: Cluster,
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    await write(leader, "1")
    full = [host for host in cluster.hosts.values() if host is not leader]
    for host in full:
        fill(host)
    with pytest.raises(OutcomeUnknown):
        await leader.raft.propose(b"2", 10)
    with pytest.raises(NoQuorum):
        await full[0].raft.propose(b"3", 10)
    assert [host.raft.disk_full for host in full] == [True, True]
    assert not any(host.raft.is_leader for host in cluster.hosts.values())
    terms = [host.raft.term for host in cluster.hosts.values()]
    await trio.sleep(60)
    assert [host.raft.term for host in cluster.hosts.values()] == terms  # nobody campaigns in vain
    for host in full:
        free(host)
    await write(leader, "4")
    await cluster.settled()
    for host in cluster.hosts.values():
        assert set(host.ledger.commands) in ({b"1", b"4"}, {b"1", b"2", b"4"})


async def test_a_cluster_of_one_waits_for_space(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    host = await cluster.start("a")
    await cluster.leader("a")
    await write(host, "1")
    fill(host)
    with pytest.raises(OutcomeUnknown):
        await host.raft.propose(b"2", 5)
    assert not host.raft.is_leader
    assert host.ledger.commands == [b"1"]
    with pytest.raises(NoQuorum):
        await host.raft.propose(b"3", 5)
    free(host)
    await write(host, "2", "4")
    assert host.ledger.commands == [b"1", b"2", b"4"]
    await cluster.kill("a")
    host = await cluster.start("a")
    await write(host, "5")
    assert host.ledger.commands == [b"1", b"2", b"4", b"5"]


async def test_a_full_disk_that_gets_space_at_the_end_has_no_hole(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    host = await cluster.start("a")
    await cluster.leader("a")
    await write(host, "1")
    disk = fill(host)
    for text in ("2", "3"):
        with pytest.raises((OutcomeUnknown, NoQuorum)):
            await host.raft.propose(text.encode(), 3)
    journal = host.raft._journal
    last = journal[-1][1] + 1
    assert last > max(disk.entries) + 1
    journal.add(command("4"), last, host.raft.term)  # staged behind what waits
    disk.full = False
    await cluster.stop("a")
    assert sorted(disk.entries) == list(range(1, last + 1))


@pytest.mark.parametrize("is_full", [True, False])
def test_a_node_whose_disk_is_full_takes_no_lead_over(is_full: bool) -> None:
    solo = Solo(log="1")
    solo.receive("b", Append(1, 3, 3, 1))
    solo.take()
    solo.journal.is_blocked = is_full
    solo.receive("b", TakeOver(1))
    solo.tick()
    assert solo.core.state() == (FOLLOWER if is_full else CANDIDATE)
    assert solo.core.term() == (1 if is_full else 2)


def test_a_node_whose_disk_is_full_asks_for_no_votes() -> None:
    solo = Solo(log="1")
    solo.journal.is_blocked = True
    solo.wait_for_election()
    assert solo.take() == []
    solo.journal.is_blocked = False
    solo.wait_for_election()
    assert len(solo.take()) == 2


async def test_a_node_ends_in_order_while_its_disk_is_full(
    autojump_clock: MockClock, cluster: Cluster
) -> None:
    await cluster.founded("abc")
    leader = await cluster.leader()
    follower = next(host for host in cluster.hosts.values() if host is not leader)
    await write(leader, "1")
    fill(follower)
    await write(leader, "2")
    await cluster.stop(follower.id)
    assert follower.error is None
    free(follower)
    await cluster.start(follower.id)
    await write(follower, "3")
    await cluster.settled()


async def test_memory_stays_bounded_while_the_disk_is_full(
    autojump_clock: MockClock, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "COMPACT_ENTRIES", 200)
    await cluster.founded("abc")
    leader = await cluster.leader()
    follower = next(host for host in cluster.hosts.values() if host is not leader)
    fill(follower)
    for number in range(3000):
        await write(leader, f"{number}")
        journal = follower.raft._journal
        assert len(journal) < COMPACTION_TAIL + 400
        assert len(journal._batch.add) < COMPACTION_TAIL + 400
    assert len(follower.ledger.commands) > 2990
    free(follower)
    await trio.sleep(2)
    await cluster.settled()
    await cluster.kill(follower.id)
    await cluster.start(follower.id)
    await cluster.settled()
    assert len(follower.ledger.commands) == 3000
