"""What API keys have used, told from node to node and recorded."""

import pytest
import trio
from trio.testing import MockClock

from ollamad.api.services import NoQuorum
from ollamad.core.commands import AddKey, AnyCommand, Outcome, Proposal, RecordUsage, apply
from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.quota import Used
from ollamad.core.state import ApiKey, ClusterState
from ollamad.usage import RECORD_INTERVAL_S, TELL_INTERVAL_S, KeyUsage
from tests.fakes.peer_net import PeerNet

A, B = node_id_of(b"A" * 32), node_id_of(b"B" * 32)
KEY = ApiKey("k1", "agent", "", "inference", 0.0, "admin", request_quota=10)


class FakeCluster:
    """One node's view of a cluster whose state all share."""

    def __init__(self, node_id: NodeId, state: ClusterState) -> None:
        self.node_id = node_id
        self.state = state
        self.online = True
        self.life = 1.0
        self.has_quorum = True
        self.proposed: list[AnyCommand] = []

    def other_members(self) -> list[NodeId]:
        return [node_id for node_id in (A, B) if node_id != self.node_id]

    def is_online(self, node_id: NodeId) -> bool:
        return self.online

    def presence(self, node_id: NodeId) -> Presence:
        return Presence(self.online, 0.0, Beat(0.0, Usage(), started_at=self.life))

    async def propose(self, command: AnyCommand) -> Outcome:
        await trio.lowlevel.checkpoint()
        if not self.has_quorum:
            raise NoQuorum
        self.proposed.append(command)
        proposal = Proposal(f"{self.node_id}{len(self.proposed)}", 0.0, command)
        return apply(self.state, proposal)


class Pair:
    """Two nodes that count."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.net = PeerNet(nursery)
        self.state = ClusterState(cluster_id="c1")
        self.clusters: dict[NodeId, FakeCluster] = {}

    async def add(self, node_id: NodeId) -> KeyUsage:
        mesh = await self.net.add(node_id)
        cluster = self.clusters[node_id] = FakeCluster(node_id, self.state)
        await cluster.propose(AddKey(KEY))
        usage = KeyUsage(cluster, mesh, wall=lambda: 0.0)  # type: ignore[arg-type]
        await self.nursery.start(usage.run)
        return usage


@pytest.fixture
async def pair(nursery: trio.Nursery) -> Pair:
    return Pair(nursery)


def requests(usage: KeyUsage) -> int:
    return usage.used(KEY).requests


async def test_what_one_node_counts_the_other_knows_within_a_second(
    pair: Pair, autojump_clock: MockClock
) -> None:
    one, other = await pair.add(A), await pair.add(B)
    one.count(KEY, requests=3, tokens=40)
    other.count(KEY, requests=1)
    await trio.sleep(2 * TELL_INTERVAL_S)
    assert one.used(KEY) == other.used(KEY) == Used(0, 4, 40)


async def test_nothing_is_told_while_nothing_happens(pair: Pair, autojump_clock: MockClock) -> None:
    one, _ = await pair.add(A), await pair.add(B)
    one.count(KEY, requests=1)
    await trio.sleep(5)
    calls: list[object] = []
    mesh = pair.net.meshes[A]
    mesh.call = lambda *args: calls.append(args)  # type: ignore[method-assign,assignment,return-value]
    await trio.sleep(60)
    assert calls == []


async def test_nodes_that_are_cut_off_count_on_and_agree_later(
    pair: Pair, autojump_clock: MockClock
) -> None:
    one, other = await pair.add(A), await pair.add(B)
    pair.net.down = {A, B}
    pair.net.cut(A)
    one.count(KEY, requests=5)
    other.count(KEY, requests=6)
    await trio.sleep(RECORD_INTERVAL_S / 2)
    assert (requests(one), requests(other)) == (5, 6)
    pair.net.down = set()
    await trio.sleep(2 * TELL_INTERVAL_S)
    assert (requests(one), requests(other)) == (11, 11)


async def test_a_node_that_was_killed_learns_its_own_counts_from_the_other(
    pair: Pair, autojump_clock: MockClock
) -> None:
    one, other = await pair.add(A), await pair.add(B)
    one.count(KEY, requests=3)
    await trio.sleep(2 * TELL_INTERVAL_S)
    again = KeyUsage(pair.clusters[A], pair.net.meshes[A], wall=lambda: 0.0)  # type: ignore[arg-type]
    pair.clusters[B].life = 2.0  # its heartbeats say that it started anew
    await trio.sleep(2 * TELL_INTERVAL_S)
    again.count(KEY, requests=1)
    assert requests(again) == 4
    assert requests(other) == 3


async def test_counts_are_recorded_and_read_back(pair: Pair, autojump_clock: MockClock) -> None:
    one = await pair.add(A)
    one.count(KEY, requests=2, tokens=9)
    await trio.sleep(RECORD_INTERVAL_S + 1)
    assert pair.state.key_usage == {"k1": {A: Used(0, 2, 9)}}
    proposed = len(pair.clusters[A].proposed)
    await trio.sleep(5 * RECORD_INTERVAL_S)
    assert len(pair.clusters[A].proposed) == proposed, "nothing new, nothing recorded"
    one.count(KEY, requests=1)
    await one.record()
    assert pair.state.key_usage["k1"][A].requests == 3
    later = await pair.add(B)
    assert later.used(KEY) == Used(0, 3, 9)


async def test_without_a_quorum_it_is_recorded_later(pair: Pair, autojump_clock: MockClock) -> None:
    one = await pair.add(A)
    pair.clusters[A].has_quorum = False
    one.count(KEY, requests=2)
    await trio.sleep(RECORD_INTERVAL_S + 1)
    assert pair.state.key_usage == {}
    pair.clusters[A].has_quorum = True
    await trio.sleep(RECORD_INTERVAL_S)
    assert pair.state.key_usage["k1"][A].requests == 2


async def test_keys_that_are_gone_are_forgotten_and_new_ones_waited_for(
    pair: Pair, autojump_clock: MockClock
) -> None:
    one = await pair.add(A)
    del pair.state.api_keys["k1"]
    one.count(KEY, requests=2)  # of a request that was under way
    await trio.sleep(RECORD_INTERVAL_S + 1)
    assert requests(one) == 2
    await trio.sleep(RECORD_INTERVAL_S)
    assert requests(one) == 0
    assert not any(isinstance(c, RecordUsage) for c in pair.clusters[A].proposed)
