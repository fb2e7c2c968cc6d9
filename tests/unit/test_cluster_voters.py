"""Who votes, in whole clusters on virtual time: real consensus under real cluster objects.

Faked are the network, the disks, and who is seen as online: whoever runs and is not cut off.
"""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ollamad.api.services import ServiceError
from ollamad.cluster import MAX_VOTERS, REPAIR_AFTER_S, Addresses, Cluster
from ollamad.core.commands import AddJoinToken, AdmitMember, AnyCommand, FoundCluster
from ollamad.core.ids import NodeId
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.state import CertificateAuthority, JoinToken, User
from ollamad.machine import Machine
from ollamad.raft.errors import ChangeRefused, RaftError
from ollamad.raft.journal import Journal
from ollamad.raft.private import LEADER, Timing
from ollamad.wire.raftwire import TakeOver, decode, decode_change
from tests.fakes.api_services import member
from tests.fakes.peer_net import PeerNet
from tests.fakes.raft_cluster import Cluster as RaftCluster
from tests.fakes.raft_cluster import Ledger

SETTLE_S = 10.0  # for a handful of changes, one each half second
NOWHERE = Addresses(("", 0), ("", 0), ("", 0))


class World:
    """Nodes named by letters, each with its consensus and its `Cluster`; `a` founds."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.raft = RaftCluster(nursery)
        self.raft.make_ledger = _machine
        self.net = PeerNet(nursery)
        self.clusters: dict[str, Cluster] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def found(self, names: str) -> None:
        await self.start("a")
        authority = CertificateAuthority(b"", b"")
        founder, admin = member(NodeId("a"), "a", joined_at=0.0), User("u", "h", "admin", 1.0)
        await self.require(FoundCluster("c1", authority, b"k", founder, admin))
        await self.require(AddJoinToken(JoinToken("t", b"k", 2.0**40)))
        for name in names[1:]:
            await self.admit(name)
        await trio.sleep(SETTLE_S)

    async def admit(self, name: str) -> None:
        joined = member(NodeId(name), name, joined_at=float(ord(name)))
        await self.require(AdmitMember(joined, "t"))
        await self.start(name)

    async def start(self, name: str) -> None:
        """Start a node, for the first time or again."""
        known = next((n for n in self.clusters if self.raft[n].node is not None), None)
        host = await self.raft.start(name, learner_of=known)
        self.net.down.discard(host.id)
        mesh = self.net.meshes.get(host.id) or await self.net.add(host.id)
        machine: Any = host.ledger
        cluster = self.clusters[name] = Cluster(
            identity=SimpleNamespace(node_id=host.id),  # type: ignore[arg-type]
            name=name,
            addresses=NOWHERE,
            capacity=member(host.id, name).capacity,
            gate=None,  # type: ignore[arg-type]
            mesh=mesh,
            raft=host.raft,
            machine=machine,
            own_beat=lambda: Beat(0.0, Usage()),
        )
        cluster.heartbeats.presence = (  # type: ignore[method-assign]
            lambda other: Presence(self.raft.hosts[other].node is not None, 0.0, Beat(0.0, Usage()))
        )
        scope = self.scopes[name] = trio.CancelScope()

        async def keep_voters() -> None:
            with scope:
                await cluster._keep_voters()

        self.nursery.start_soon(keep_voters)

    async def kill(self, name: str) -> None:
        self.scopes[name].cancel()
        self.net.down.add(NodeId(name))
        self.net.cut(NodeId(name))
        await self.raft.kill(name)

    async def require(self, command: AnyCommand) -> None:
        """Propose at whichever node takes it."""
        running = [n for n in self.clusters if self.raft[n].node is not None]
        await self.clusters[running[0]].require(command)

    async def leader(self) -> str:
        names = "".join(n for n in self.clusters if self.raft[n].node is not None)
        return str((await self.raft.leader(names)).id)

    async def voters(self) -> str:
        """The voters that the leader knows, in order."""
        return "".join(sorted(self.raft[await self.leader()].raft.voters))

    def every_list(self) -> list[frozenset[NodeId]]:
        """All lists of voters that any node ever knew."""
        return [status.voters for host in self.raft.hosts.values() for status in host.history]


def _machine() -> Ledger:
    machine: Any = Machine()
    return machine  # type: ignore[no-any-return]


@asynccontextmanager
async def world(names: str) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        made = World(nursery)
        await made.found(names)
        yield made
        nursery.cancel_scope.cancel()


async def test_five_of_seven_members_vote_and_never_a_sixth(autojump_clock: MockClock) -> None:
    async with world("abcdefg") as w:
        assert await w.voters() == "abcde", "who joined first"
        for gone in "bc":
            await w.kill(gone)
            await trio.sleep(REPAIR_AFTER_S + SETTLE_S)
            await w.start(gone)
            await trio.sleep(SETTLE_S)
        assert len(await w.voters()) == MAX_VOTERS
        assert max(len(voters) for voters in w.every_list()) == MAX_VOTERS


async def test_learners_are_not_counted(autojump_clock: MockClock) -> None:
    async with world("abcdefg") as w:
        voters = await w.voters()
        learner = next(n for n in "abcdefg" if n not in voters)
        for name in voters[2:]:
            await w.kill(name)
        await trio.sleep(3)
        # Four of seven nodes run, but two of five voters.
        assert [n for n in w.clusters if w.raft[n].node is not None and n in voters] == list("ab")
        assert not any(w.clusters[n].has_quorum for n in ("a", "b", learner))
        with pytest.raises(ServiceError):
            await w.clusters[learner].set_draining(NodeId("a"), True)
        await w.start(voters[2])
        await w.leader()
        assert w.clusters[learner].has_quorum


@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_a_spare_member_takes_the_place_of_a_dead_voter(
    autojump_clock: MockClock, role: str
) -> None:
    async with world("abcdef") as w:
        leader, voters = await w.leader(), await w.voters()
        assert voters == "abcde"
        gone = leader if role == "leader" else next(n for n in voters if n != leader)
        await w.kill(gone)
        await trio.sleep(REPAIR_AFTER_S - 5)
        assert await w.voters() == voters, "it may come back"
        await trio.sleep(5 + SETTLE_S)
        assert await w.voters() == "abcdef".replace(gone, "")
        await w.start(gone)
        await trio.sleep(SETTLE_S)
        assert await w.voters() == "abcdef".replace(gone, ""), "there are enough"


async def test_a_newcomer_takes_the_place_of_a_dead_voter_among_three(
    autojump_clock: MockClock,
) -> None:
    async with world("abc") as w:
        gone = "abc".replace(await w.leader(), "")[0]
        await w.kill(gone)
        await trio.sleep(REPAIR_AFTER_S + SETTLE_S)
        assert await w.voters() == "abc", "nobody could take its place"
        await w.admit("d")
        await trio.sleep(SETTLE_S)
        rest = "abcd".replace(gone, "")
        assert await w.voters() == rest
        # So the three survive the loss of one more.
        await w.kill(rest.replace(await w.leader(), "")[0])
        assert await w.leader()
        await w.start(gone)
        await trio.sleep(SETTLE_S)
        assert gone in await w.voters()


@pytest.mark.parametrize("asked", ["leader", "follower"])
async def test_a_leader_that_is_removed_hands_over_without_an_election_timeout(
    autojump_clock: MockClock, asked: str
) -> None:
    async with world("abc") as w:
        leader = await w.leader()
        follower = next(n for n in "abc" if n != leader)
        longest_s = 0.0
        ended = trio.Event()

        async def write() -> None:
            nonlocal longest_s
            while not ended.is_set():
                begun = trio.current_time()
                await w.clusters[follower].set_draining(NodeId(follower), False)
                longest_s = max(longest_s, trio.current_time() - begun)

        w.nursery.start_soon(write)
        await w.clusters[leader if asked == "leader" else follower].remove(NodeId(leader))
        ended.set()
        assert await w.voters() == "abc".replace(leader, "")
        assert await w.leader() != leader
        assert leader not in w.clusters[follower].state.members
        assert longest_s < Timing().election_min_s / 2


async def test_members_that_are_removed_at_once_go_one_after_the_other(
    autojump_clock: MockClock,
) -> None:
    async with world("abcdef") as w:
        async with trio.open_nursery() as removals:
            for asked, gone in (("a", "c"), ("b", "d"), ("c", "e")):
                removals.start_soon(w.clusters[asked].remove, NodeId(gone))
        await trio.sleep(SETTLE_S)
        assert await w.voters() == "abf"
        assert set(w.clusters["a"].state.members) == set("abf")
        assert_single_steps(w)


async def test_the_voters_change_one_at_a_time_whoever_asks(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        raft = RaftCluster(nursery)
        await raft.founded("abcde")
        for name in "fgh":
            await raft.start(name, learner_of="a")
        await trio.sleep(1)
        add = Journal.add
        changes = list[NodeId]()

        def watched(journal: Journal, command: bytes, idx: int, term: int) -> None:
            for host in raft.hosts.values():
                core = host.raft._core
                if decode_change(command) and core.journal is journal and core.state() == LEADER:
                    changes.append(host.id)
                    assert core.commit_index() >= journal.membership_index, "one is under way"
            add(journal, command, idx, term)

        monkeypatch.setattr(Journal, "add", watched)
        for host in raft.hosts.values():
            host.disk.sync_s = 0.005  # so that changes are under way for a while
        async with trio.open_nursery() as askers:
            for asked, gone, new in (("a", "b", "f"), ("c", "d", "g"), ("f", "e", "h")):
                askers.start_soon(raft[asked].raft.remove_voter, NodeId(gone), 20)
                askers.start_soon(raft[asked].raft.add_voter, NodeId(new), 20)
        leader = await raft.leader()
        assert leader.raft.voters == set("acfgh")
        assert len(changes) == 6
        history = [status.voters for status in leader.history if status.voters]
        steps = [len(one ^ other) for one, other in itertools.pairwise(history)]
        assert set(steps) <= {0, 1}
        nursery.cancel_scope.cancel()


async def test_a_change_that_skips_a_step_is_refused(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        raft = RaftCluster(nursery)
        await raft.founded("abc")
        for name in "de":
            await raft.start(name, learner_of="a")
        await trio.sleep(1)
        leader = (await raft.leader()).raft
        assert leader.caught_up(NodeId("d"))
        for wanted in ("abcde", "a", "abc", "de"):
            assert not leader.may_change_voters(frozenset(map(NodeId, wanted)))
        assert leader.may_change_voters(frozenset(map(NodeId, "abcd")))
        nursery.cancel_scope.cancel()


async def test_a_learner_counts_only_when_it_has_caught_up(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blank voter would have to be fed a whole log before the next commit."""
    async with world("ab") as w:
        leader = await w.leader()
        w.raft.delay_s = 0.0
        joined = member(NodeId("c"), "c", joined_at=9.0)
        await w.require(AdmitMember(joined, "t"))
        await w.start("c")
        w.raft.cut |= {(NodeId(other), NodeId("c")) for other in "ab"}
        for _ in range(300):
            await w.clusters[leader].set_draining(NodeId("a"), False)
        assert not w.raft[leader].raft.caught_up(NodeId("c"))
        with pytest.raises((ChangeRefused, RaftError)):
            await w.raft[leader].raft.add_voter(NodeId("c"), 1)
        await trio.sleep(SETTLE_S)
        assert await_voters(w) == {"ab"}
        w.raft.heal()
        await trio.sleep(SETTLE_S)
        assert await w.voters() == "abc"


def await_voters(w: World) -> set[str]:
    return {"".join(sorted(w.raft[n].raft.voters)) for n in "ab"}


def assert_single_steps(w: World) -> None:
    """Each node saw the voters change by one at a time, but where a snapshot or a start came in."""
    for host in w.raft.hosts.values():
        lists = [status.voters for status in host.history if status.voters]
        assert all(len(one ^ other) <= 1 for one, other in itertools.pairwise(lists)), host.id


async def test_the_lead_moves_under_load(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        raft = RaftCluster(nursery)
        await raft.founded("abc")
        numbers = itertools.count()

        async def write(name: str) -> None:
            while True:
                await raft[name].raft.propose(b"%d" % next(numbers), 5)

        for name in "abc" * 5:
            nursery.start_soon(write, name)
        for _ in range(5):
            leader = await raft.leader()
            begun = trio.current_time()
            await leader.raft.transfer_leadership(1)
            await raft.leader()
            assert trio.current_time() - begun < Timing().election_min_s / 2
        nursery.cancel_scope.cancel()


async def test_an_heir_that_hears_nothing_holds_nobody_up_for_long(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        raft = RaftCluster(nursery)
        await raft.founded("abc")
        raft.spy = lambda source, to, frame: not isinstance(decode(frame), TakeOver)
        leader = (await raft.leader()).raft
        with pytest.raises(ChangeRefused):
            await leader.transfer_leadership(0.1)
        begun = trio.current_time()
        await leader.propose(b"x", 5)
        assert 0.1 < trio.current_time() - begun < Timing().election_min_s
        assert leader.is_leader
        nursery.cancel_scope.cancel()
