"""Heartbeats of a few nodes on virtual time: coming, going, silence, goodbye."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from ollamad.core.ids import NodeId
from ollamad.core.presence import BEAT_INTERVAL_S, OFFLINE_AFTER_S, Beat, Usage
from ollamad.peers.heartbeat import ANSWER_TIMEOUT_S, MAX_PINGS_FOR, Heartbeats
from ollamad.peers.link import RemoteFailure, Stream
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
        self.clock_step_s = 0.0  # of the wall clock
        self.heartbeats = Heartbeats(
            mesh,
            peers=lambda: self.members - {node_id},
            own_beat=self.beat,
            on_change=lambda peer, online: self.changes.append((peer, online)),
        )

    def beat(self, *, leaving: bool = False) -> Beat:
        self.sent += 1
        wall = 1e6 + trio.current_time() + self.clock_step_s
        return Beat(wall, Usage(cpu=0.5), leaving=leaving)

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
    assert nodes[0].sent - before == pytest.approx(10, abs=1)
    assert len(nodes[0].changes) == 2
    assert len(world.net.dials) == 6, "each keeps its one link to each"


async def test_a_node_that_dies_is_offline_at_once_and_comes_back(
    world: World, autojump_clock: MockClock
) -> None:
    a, b, c = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(ONE_ROUND)
    b.members = set()
    world.net.down.add(B)
    died = trio.current_time()
    world.net.cut(B)
    await trio.sleep_until(died + 0.1)
    assert not a.sees(b)
    assert not c.sees(b)
    assert a.sees(c)
    assert a.changes[-1] == (B, False)
    world.net.down.clear()
    b.members = world.members
    await trio.sleep(ONE_ROUND)
    assert a.sees(b)
    assert a.changes[-1] == (B, True)


@pytest.mark.parametrize("nodes", [2, 3])
async def test_a_node_that_stops_in_the_middle_is_offline_within_three_seconds(
    world: World, autojump_clock: MockClock, nodes: int
) -> None:
    """As SIGSTOP and a pulled cable show: the connections stay, and nothing comes."""
    world.members = {A, B} if nodes == 2 else {A, B, C}
    a, b, *rest = [await world.start(node_id) for node_id in sorted(world.members)]
    await trio.sleep(10)
    stopped = trio.current_time()
    stop(world, b)
    await trio.sleep_until(stopped + 1.0)
    assert a.sees(b), "a second may be a pause"
    await trio.sleep_until(stopped + OFFLINE_AFTER_S)
    assert not a.sees(b)
    assert all(a.sees(other) for other in rest)


def stop(world: World, node: Node) -> None:
    """It answers nothing any more, and beats no more."""
    node.members = set()

    async def hang(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep_forever()

    for method in ("beat", "ping", "ping.for"):
        world.net.meshes[node.id].handle(method, hang)


async def test_a_node_that_answers_is_not_gone_however_silent(
    world: World, autojump_clock: MockClock
) -> None:
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(5)
    b.members = set()  # beats no more, but answers
    await trio.sleep(60)
    assert a.sees(b)
    assert a.changes == [(B, True)]


async def test_a_dead_connection_to_a_node_that_lives_is_made_anew(
    world: World, autojump_clock: MockClock
) -> None:
    """Others reach it, so not the node is in doubt but the way."""
    a, b, c = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(5)
    real = world.net.meshes[B]._handlers["ping"]
    deaf = {A}

    async def deaf_once(peer: NodeId, request: bytes, stream: Stream) -> None:
        if peer in deaf:
            deaf.discard(peer)
            await trio.sleep_forever()
        await real(peer, request, stream)

    world.net.meshes[B].handle("ping", deaf_once)
    dials = world.net.dials.count((A, B))
    b.members = {B, C}  # what it sends does not reach A
    await trio.sleep(5)
    assert a.sees(b)
    assert c.sees(b)
    assert world.net.dials.count((A, B)) == dials + 1


async def test_a_node_that_only_others_reach_is_offline_here(
    world: World, autojump_clock: MockClock
) -> None:
    a, b, c = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(5)
    real = world.net.meshes[B]._handlers["ping"]

    async def deaf(peer: NodeId, request: bytes, stream: Stream) -> None:
        if peer == A:
            await trio.sleep_forever()
        await real(peer, request, stream)

    world.net.meshes[B].handle("ping", deaf)
    b.members = {B, C}  # what it sends does not reach A either
    await trio.sleep(5)
    assert not a.sees(b)
    assert c.sees(b)


async def test_a_node_that_is_slow_but_beats_is_not_given_up(
    world: World, autojump_clock: MockClock
) -> None:
    """An overloaded machine: its answers take longer than a question waits."""
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(5)

    async def slow(peer: NodeId, request: bytes, stream: Stream) -> None:
        await trio.sleep(3)

    world.net.meshes[B].handle("ping", slow)
    dials = world.net.dials.count((A, B))
    for _ in range(3):
        assert await a.heartbeats.probe(B)
    assert a.sees(b)
    assert world.net.dials.count((A, B)) == dials, "its links, and what runs over them, stay"


async def test_questions_for_others_are_bounded_and_for_members_only(
    world: World, autojump_clock: MockClock
) -> None:
    a, b, _ = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(2)
    ask = world.net.meshes[A].call
    assert await ask(B, "ping.for", C, bool)
    assert not await ask(B, "ping.for", NodeId("stranger"), bool)
    b.heartbeats._pings_for = MAX_PINGS_FOR
    with pytest.raises(RemoteFailure, match="too many"):
        await ask(B, "ping.for", C, bool)
    assert a.sees(b)


async def test_a_large_cluster_gossips(world: World, autojump_clock: MockClock) -> None:
    ids = [NodeId(f"node-{number:02}-{'x' * 30}") for number in range(24)]
    world.members = set(ids)
    nodes = [await world.start(node_id) for node_id in ids]
    told: list[tuple[NodeId, float]] = []
    nodes[0].heartbeats.on_beat = lambda node_id, beat: told.append((node_id, trio.current_time()))
    await trio.sleep(10)
    for node in nodes:
        assert all(node.sees(other) for other in nodes if other is not node)
    # Each round tells eight; of the others it hears all the same.
    last = dict(told)
    assert set(last) == set(ids[1:])
    assert min(last.values()) > trio.current_time() - 4
    # One dies: all know, also those that had no link to it.
    dead = nodes[5]
    dead.members = set()
    world.net.down.add(dead.id)
    world.net.cut(dead.id)
    await trio.sleep(15)
    assert not any(node.sees(dead) for node in nodes if node is not dead)
    alive = [node for node in nodes if node is not dead]
    for node in alive:
        assert all(node.sees(other) for other in alive if other is not node)


async def test_a_clock_that_is_set_back_makes_nobody_old(
    world: World, autojump_clock: MockClock
) -> None:
    ids = [NodeId(f"node-{number:02}-{'x' * 30}") for number in range(24)]
    world.members = set(ids)
    first, *others = [await world.start(node_id) for node_id in ids]
    await trio.sleep(10)
    first.clock_step_s = -3600
    heard = dict.fromkeys((node.id for node in others), 0)
    for node in others:

        def note(node_id: NodeId, beat: Beat, by: NodeId = node.id) -> None:
            heard[by] += node_id == first.id

        node.heartbeats.on_beat = note
    await trio.sleep(20)
    # Each round tells eight of 23; the others hear all the same.
    assert min(heard.values()) >= 12


async def test_who_stood_still_himself_gives_up_nobody(
    world: World, autojump_clock: MockClock
) -> None:
    """As after SIGSTOP and SIGCONT: what the others said meanwhile is not read yet."""
    a, b, c = [await world.start(node_id) for node_id in (A, B, C)]
    await trio.sleep(10)
    autojump_clock.jump(30)
    await trio.sleep(5)
    assert all((node, False) not in a.changes for node in (B, C))
    assert a.sees(b)
    # It goes on to notice who is gone.
    world.net.down.add(C)
    stop(world, c)
    await trio.sleep(OFFLINE_AFTER_S + 1)
    assert not a.sees(c)


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


async def test_a_round_that_comes_before_the_last_one_began_harms_nothing(
    world: World, autojump_clock: MockClock
) -> None:
    """On a machine that stood still for a second, both are due at once (found by the soak)."""
    a, b = await world.start(A), await world.start(B)
    await trio.sleep(ONE_ROUND)
    nursery = a.heartbeats._nursery
    assert nursery is not None
    for _ in range(3):
        a.heartbeats._begin_round(nursery)
    await trio.sleep(ONE_ROUND)
    assert a.heartbeats._telling == {}
    assert b.sees(a)


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
    heard = list[NodeId]()
    c.heartbeats.on_beat = lambda node_id, beat: heard.append(node_id)
    await trio.sleep(3 * ONE_ROUND)
    assert heard == []
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
