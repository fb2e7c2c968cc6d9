"""Linearizable reads: who may confirm them, when, and what a deposed leader does with them."""

import pytest
import trio
from trio.testing import MockClock

from ollamad.raft import reads as reads_module
from ollamad.raft.errors import JournalFailed, NodeFailed, NoQuorum
from ollamad.raft.reads import NOT_NOW
from ollamad.wire.raftwire import (
    Ack,
    Append,
    AskRead,
    MalformedMessage,
    Message,
    Outdated,
    ReadAt,
    ReadProbe,
    ReadProof,
)
from tests.fakes.raft_cluster import Cluster
from tests.fakes.raft_solo import Solo

HEARTBEAT_S = 0.1


# One node, message by message.


def leading(voters: str = "abc") -> Solo:
    """A leader whose own first entry is committed."""
    solo = Solo(voters)
    solo.lead()
    last = solo.core.last_index()
    for voter in voters[1:]:
        solo.receive(voter, Ack(solo.core.term(), last + 1, True, False))
    solo.tick()
    solo.take()
    assert solo.core.commit_index() == last
    return solo


def begin(solo: Solo) -> list[int]:
    """Start a read; the list gets the index that it is given."""
    given: list[int] = []
    solo.reads.begin(given.append)
    return given


def probes(solo: Solo) -> list[tuple[str, Message]]:
    solo.reads.tick(HEARTBEAT_S)
    return [(to, message) for to, message in solo.take() if isinstance(message, ReadProbe)]


def test_a_read_waits_for_a_majority_that_was_asked_after_it() -> None:
    solo = leading("abcde")
    term = solo.core.term()
    given = begin(solo)
    assert probes(solo) == [(voter, ReadProbe(term, 1)) for voter in "bcde"]
    solo.receive("b", ReadProof(term, 1))
    assert given == []
    solo.receive("b", ReadProof(term, 1))  # the same voter again is one voter
    assert given == []
    solo.receive("c", ReadProof(term, 1))
    assert given == [solo.core.commit_index()]


def test_an_answer_to_an_earlier_round_proves_nothing_for_a_later_read() -> None:
    solo = leading()
    term = solo.core.term()
    first = begin(solo)
    probes(solo)
    second = begin(solo)  # after the probe left
    solo.receive("b", ReadProof(term, 1))
    assert first
    assert second == []
    assert probes(solo) == [("b", ReadProbe(term, 2)), ("c", ReadProbe(term, 2))]
    solo.receive("c", ReadProof(term, 1))  # late
    assert second == []
    solo.receive("c", ReadProof(term, 2))
    assert second


def test_a_later_round_serves_all_that_waited() -> None:
    solo = leading()
    reads = [begin(solo)]
    probes(solo)
    reads += [begin(solo), begin(solo)]
    probes(solo)
    solo.receive("b", ReadProof(solo.core.term(), 2))
    assert all(reads)


def test_reads_that_begin_together_share_a_round() -> None:
    solo = leading()
    begin(solo)
    begin(solo)
    assert len(probes(solo)) == 2
    assert probes(solo) == []


def test_lost_probes_are_sent_again_after_a_heartbeat() -> None:
    solo = leading()
    begin(solo)
    probes(solo)
    solo.now += HEARTBEAT_S / 2
    assert probes(solo) == []
    solo.now += HEARTBEAT_S
    assert probes(solo) == [("b", ReadProbe(solo.core.term(), 2)), ("c", ReadProbe(1, 2))]


def test_who_is_no_voter_confirms_nothing() -> None:
    solo = leading()
    given = begin(solo)
    probes(solo)
    solo.receive("x", ReadProof(solo.core.term(), 1))
    solo.receive("y", ReadProof(solo.core.term(), 1))
    assert given == []


def test_proofs_of_another_term_count_for_nothing() -> None:
    solo = leading()
    given = begin(solo)
    probes(solo)
    term = solo.core.term()
    solo.receive("b", ReadProof(term - 1, 1))
    solo.receive("c", ReadProof(term + 1, 1))
    assert given == []


def test_a_new_leader_confirms_only_after_an_entry_of_its_own_term() -> None:
    solo = Solo()
    solo.lead()
    assert begin(solo) == [NOT_NOW]


def test_a_leader_that_was_deposed_gives_no_index() -> None:
    solo = leading()
    given = begin(solo)
    probes(solo)
    term = solo.core.term()
    solo.receive("c", Outdated(term + 1))
    solo.receive("b", ReadProof(term, 1))
    assert given == []
    solo.reads.tick(HEARTBEAT_S)
    assert given == [NOT_NOW]


def test_rounds_of_an_earlier_leadership_are_forgotten() -> None:
    solo = leading()
    given = begin(solo)
    probes(solo)
    solo.receive("b", Outdated(solo.core.term() + 1))
    solo.lead()
    last = solo.core.last_index()
    solo.receive("b", Ack(solo.core.term(), last + 1, True, False))
    solo.tick()
    solo.take()
    again = begin(solo)
    assert given == [NOT_NOW]
    assert probes(solo)[0] == ("b", ReadProbe(solo.core.term(), 1))
    assert again == []


def test_a_cluster_of_one_needs_nobody() -> None:
    solo = Solo("a")
    solo.core.call_election()
    solo.tick()
    solo.sync()
    solo.tick()
    given = begin(solo)
    assert probes(solo) == []
    assert given == [solo.core.commit_index()]


def test_waiting_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module, "MAX_WAITING", 2)
    solo = leading()
    assert begin(solo) == []
    assert begin(solo) == []
    assert begin(solo) == [NOT_NOW]


def test_a_follower_asks_its_leader_and_takes_one_answer() -> None:
    solo = Solo(term=3)
    solo.receive("b", ReadProbe(3, 7))
    assert solo.take() == [("b", ReadProof(3, 7))]
    assert begin(solo) == [NOT_NOW]  # a probe makes no leader known to the library

    solo = Solo(term=3)
    follow(solo, "b", 3)
    given = begin(solo)
    [(to, ask)] = solo.take()
    assert to == "b"
    assert isinstance(ask, AskRead)
    solo.receive("b", ReadAt(ask.request_id + 1, 9))
    assert given == []
    solo.receive("b", ReadAt(ask.request_id, 9))
    solo.receive("b", ReadAt(ask.request_id, 10))
    assert given == [9]


def follow(solo: Solo, leader: str, term: int) -> None:
    solo.receive(leader, Append(term, 2, 2, 0))
    solo.sync()
    solo.take()
    assert solo.core.leader_id() == leader


def test_a_follower_does_not_answer_for_its_leader() -> None:
    solo = Solo(term=3)
    follow(solo, "b", 3)
    solo.receive("c", AskRead(5))
    assert solo.take() == [("c", ReadAt(5, NOT_NOW))]


def test_a_probe_of_an_old_term_is_told_the_new_one() -> None:
    solo = Solo(term=3)
    solo.receive("b", ReadProbe(2, 1))
    assert solo.take() == [("b", Outdated(3))]


def test_a_probe_of_a_later_term_is_proved_in_that_term() -> None:
    solo = Solo(term=3)
    solo.receive("b", ReadProbe(4, 1))
    assert solo.core.term() == 4
    assert solo.take() == [("b", ReadProof(4, 1))]


def test_two_leaders_of_one_term_are_noticed() -> None:
    solo = leading()
    with pytest.raises(MalformedMessage, match="claims to lead"):
        solo.receive("b", ReadProbe(solo.core.term(), 1))


# Whole nodes on virtual time.


async def test_a_read_on_any_node_sees_what_was_acknowledged_on_another(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    for number in range(30):
        await c["abc"[number % 3]].raft.propose(b"%d" % number, 5)
        reader = c["abc"[(number + 1) % 3]]
        index = await reader.raft.read_barrier(5)
        assert b"%d" % number in reader.ledger.commands
        assert index <= reader.raft.applied_index


async def test_without_the_barrier_a_follower_may_be_behind(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    leader = await c.leader()
    follower = next(host for host in c.hosts.values() if host is not leader)
    c.delay_s = 0.02
    await leader.raft.propose(b"x", 5)
    assert b"x" not in follower.ledger.commands  # why the barrier exists
    await follower.raft.read_barrier(5)
    assert b"x" in follower.ledger.commands


async def test_a_leader_that_is_cut_off_confirms_no_read(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    old = await c.leader()
    rest = "abc".replace(old.id, "")
    c.partition(old.id, rest)
    assert old.raft.is_leader  # it cannot know yet, and would answer with old data
    with pytest.raises(NoQuorum):
        await old.raft.read_barrier(5)
    new = await c.leader(rest)
    await new.raft.propose(b"later", 5)
    with pytest.raises(NoQuorum):
        await old.raft.read_barrier(0.3)
    c.heal()
    await old.raft.read_barrier(5)
    assert b"later" in old.ledger.commands


async def test_a_read_outlives_a_change_of_the_leader(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    leader = await c.leader()
    reader = next(host for host in c.hosts.values() if host is not leader)
    await leader.raft.propose(b"x", 5)
    await c.kill(leader.id)
    await reader.raft.read_barrier(10)
    assert b"x" in reader.ledger.commands
    assert await c.leader("abc".replace(leader.id, ""))


async def test_reads_write_nothing(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    await c.settled()
    before = [host.disk.syncs for host in c.hosts.values()]
    for host in c.hosts.values():
        await host.raft.read_barrier(5)
    assert [host.disk.syncs for host in c.hosts.values()] == before


async def test_a_read_on_a_node_that_failed_says_so(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    host = await c.start("a")
    await c.leader("a")
    host.disk.fail = True
    with pytest.raises((NodeFailed, JournalFailed)):
        await host.raft.propose(b"x", 5)
    with pytest.raises(NodeFailed):
        await host.raft.read_barrier(5)


async def test_how_old_the_state_is(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    leader = await c.leader()
    rest = "abc".replace(leader.id, "")
    for host in c.hosts.values():
        assert host.raft.silence_s < 2 * HEARTBEAT_S
    c.partition(rest[0], leader.id + rest[1])
    await trio.sleep(3)
    assert 2.8 < c[rest[0]].raft.silence_s < 3.2
    assert c[rest[1]].raft.silence_s < 2 * HEARTBEAT_S
    assert leader.raft.silence_s < 2 * HEARTBEAT_S  # one of two others is a majority with itself
    assert leader.raft.commit_index == leader.raft.applied_index


async def test_a_leader_that_stepped_down_knows_how_old_its_state_is(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    await c.founded("abc")
    leader = await c.leader()
    c.partition(leader.id, "abc".replace(leader.id, ""))
    await trio.sleep(3)
    assert not leader.raft.is_leader
    assert 2.8 < leader.raft.silence_s < 3.2


async def test_a_cluster_of_one_is_never_old(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    c = Cluster(nursery)
    host = await c.start("a")
    await c.leader("a")
    await trio.sleep(10)
    assert host.raft.silence_s == 0
