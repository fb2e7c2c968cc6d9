"""Heartbeats of a few nodes on virtual time: coming, going, silence, goodbye."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.core.presence import BEAT_INTERVAL_S, OFFLINE_AFTER_S, Beat, Usage
from ollamad.peers.heartbeat import ANSWER_TIMEOUT_S, Heartbeats
from ollamad.peers.link import Stream
from ollamad.peers.mesh import Mesh
from tests.fakes.peer_net import PeerNet

A, B, C = NodeId("A"), NodeId("B"), NodeId("C")
ONE_ROUND = BEAT_INTERVAL_S + 0.3


class Node:
    def __init__(self, node_id: NodeId, mesh: Mesh, members: set[NodeId]) -> None:
        self.id = node_id
        self.members = members
        self.changes: list[tuple[NodeId, bool]] = []
        self.sent = 0
        self.heartbeats = Heartbeats(
            mesh,
            peers=lambda: self.members - {node_id},
            own_beat=self.beat,
            on_change=lambda peer, online: self.changes.append((peer, online)),
        )

    def beat(self, *, leaving: bool = False) -> Beat:
        self.sent += 1
        return Beat(1.0, Usage(cpu=0.5), leaving=leaving)

    def sees(self, other: "Node") -> bool:
        return self.heartbeats.presence(other.id).online


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.net = PeerNet(nursery)
        self.nursery = nursery
        self.members = {A, B, C}

    async def start(self, node_id: NodeId) -> Node:
        node = Node(node_id, await self.net.add(node_id), self.members)
        await self.nursery.start(node.heartbeats.run)
        return node


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()


async def test_everybody_sees_everybody_once_a_second(
    world: World, autojump_clock: MockClock
) -> None:
    nodes = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(ONE_ROUND)
    for node in nodes:
        assert all(node.sees(other) for other in nodes if other is not node)
        assert sorted(node.changes) == [(n.id, True) for n in nodes if n is not node]
    presence = nodes[0].heartbeats.presence(B)
    assert presence.beat.usage.cpu == 0.5
    assert presence.last_seen > 0
    before = nodes[0].sent
    await trio.sleep(10 * BEAT_INTERVAL_S)
    assert nodes[0].sent - before == pytest.approx(20, abs=2)
    assert len(nodes[0].changes) == 2
    assert len(world.net.dials) == 6, "each keeps its one link to each"


async def test_a_node_that_dies_is_offline_after_three_beats_and_comes_back(
    world: World, autojump_clock: MockClock
) -> None:
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(ONE_ROUND)
    world.net.down.add(B)
    world.net.cut(B)
    b.members = set()
    died = trio.current_time()
    await trio.sleep_until(died + OFFLINE_AFTER_S - BEAT_INTERVAL_S)
    assert a.sees(b), "three missed beats may be a pause"
    await trio.sleep_until(died + OFFLINE_AFTER_S + BEAT_INTERVAL_S / 2)
    assert not a.sees(b)
    assert a.changes == [(B, True), (B, False)]
    world.net.down.clear()
    b.members = world.members
    await trio.sleep(ONE_ROUND)
    assert a.sees(b)
    assert a.changes == [(B, True), (B, False), (B, True)]


async def test_a_node_that_hangs_is_dropped_and_dialled_anew(
    world: World, autojump_clock: MockClock
) -> None:
    a = await world.start(A)
    mesh = await world.net.add(B)
    calls = list[float]()

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        calls.append(trio.current_time())
        await trio.sleep_forever()

    mesh.handle("beat", hang)
    await trio.sleep(ANSWER_TIMEOUT_S * 3 + 1)
    assert 3 <= len(calls) <= 4
    assert world.net.dials.count((A, B)) == len(calls)
    assert a.changes == []


async def test_one_node_that_hangs_does_not_slow_the_others(
    world: World, autojump_clock: MockClock
) -> None:
    a, b = await world.start(A), await world.start(B)
    await world.net.add(C)
    world.net.mute.add(C)
    await trio.sleep(10)
    assert a.sees(b)
    assert b.sees(a)
    assert a.changes == [(B, True)]


async def test_a_goodbye_counts_at_once(world: World, autojump_clock: MockClock) -> None:
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(ONE_ROUND)
    begun = trio.current_time()
    await b.heartbeats.farewell(b.beat(leaving=True))
    assert trio.current_time() - begun < 0.6
    assert not a.sees(b)
    assert a.changes == [(B, True), (B, False)]


async def test_a_goodbye_does_not_wait_for_who_hangs(
    world: World, autojump_clock: MockClock
) -> None:
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(ONE_ROUND)

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep_forever()

    world.net.meshes[B].handle("beat", hang)
    begun = trio.current_time()
    await a.heartbeats.farewell(a.beat(leaving=True))
    assert trio.current_time() - begun == pytest.approx(0.5)
    assert b.changes == [(A, True)]


async def test_members_come_and_go(world: World, autojump_clock: MockClock) -> None:
    world.members = {A, B}
    a, b = await world.start(A), await world.start(B)
    c = await world.start(C)
    a.members, b.members, c.members = ({A, B}, {A, B}, {A, B, C})
    await trio.sleep(ONE_ROUND)
    assert (A, C) not in world.net.dials
    a.members.add(C)
    await trio.sleep(ONE_ROUND)
    assert c.sees(a)
    a.members.discard(C)
    await trio.sleep(ONE_ROUND)
    assert C not in a.heartbeats._senders
    a.members.add(C)
    await trio.sleep(ONE_ROUND)
    assert a.sees(c)
    assert a.changes.count((C, True)) >= 1


async def test_a_refused_beat_harms_nothing(world: World, autojump_clock: MockClock) -> None:
    a = await world.start(A)
    mesh = await world.net.add(B)  # knows no beats yet
    await trio.sleep(5)
    assert a.changes == []
    b = Node(B, mesh, world.members)
    await trio.sleep(ONE_ROUND)
    assert b.sees(a)
    assert world.net.dials.count((A, B)) == 1
