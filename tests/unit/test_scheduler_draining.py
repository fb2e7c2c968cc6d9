"""A node that drains: its answers may end there for a while, then they move; virtual time."""

from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.ids import NodeId
from ollamad.core.inference import GenerateRequest, InferenceError
from ollamad.core.measures import DemandMeter
from ollamad.core.presence import Beat, Usage
from ollamad.scheduler.dispatch import USUAL_DRAIN_TIMEOUT_S, Dispatcher
from tests.fakes.engines import drain
from tests.fakes.peer_net import PeerNet
from tests.unit.test_scheduler_dispatch import ASK, EMBED_ASK, NAME, A, B, C, Node, World
from tests.unit.test_scheduler_failover import end_of, text_of, writes_on

TIMEOUT_S = USUAL_DRAIN_TIMEOUT_S


@pytest.fixture
async def world(nursery: trio.Nursery) -> AsyncIterator[World]:
    world = World(PeerNet(nursery))
    await world.start()
    for node in (world.a, world.b, world.c):
        node.engine.script_for = writes_on
        nursery.start_soon(node.dispatcher._draining.run)
    yield world
    await wait_all_tasks_blocked()
    for node in (world.a, world.b, world.c):
        assert not node.dispatcher._draining._running


def set_draining(world: World, node_id: NodeId, draining: bool = True) -> None:
    members = world.state.members
    members[node_id] = msgspec.structs.replace(members[node_id], draining=draining)


async def slow_answer(world: World, request: GenerateRequest = ASK) -> list[str]:
    """An answer that comes to a stop on B, which drains meanwhile; what moved where."""
    world.b.engine.hang_after = 2
    begun = trio.current_time()
    async with world.a.dispatcher.generate(request) as relay:
        events = [await relay.receive() for _ in range(2)]
        assert relay.node_id == B
        set_draining(world, B)
        events += await drain(relay)
    assert text_of(events) == "abcdef"
    waited_s = trio.current_time() - begun
    assert TIMEOUT_S <= waited_s < TIMEOUT_S + 2, "it had its time to end there"
    return [f"{move.from_node}{move.to_node} {move.reason}" for move in end_of(events).failovers]


@pytest.mark.parametrize("entry", [A, B])
async def test_an_answer_moves_away_when_its_time_is_over(
    world: World, autojump_clock: MockClock, entry: NodeId
) -> None:
    """From wherever it came to the draining node, also from itself."""
    if entry == B:
        world.a = world.b
    assert await slow_answer(world) == ["BC DRAINING"]
    assert world.b.engine.cancelled == 1


async def test_an_answer_that_ends_in_time_stays(world: World, autojump_clock: MockClock) -> None:
    async with world.a.dispatcher.generate(ASK) as relay:
        first = await relay.receive()
        set_draining(world, B)
        await trio.sleep(TIMEOUT_S - 1)
        events = [first, *await drain(relay)]
    assert text_of(events) == "abcdef"
    assert end_of(events).failovers == ()


async def test_an_answer_stays_where_nobody_else_can_go_on(
    world: World, autojump_clock: MockClock
) -> None:
    world.hold(B)
    world.b.engine.hang_after = 2
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        set_draining(world, B)
        await trio.sleep(3 * TIMEOUT_S)
        assert world.b.engine.running == 1
        # Its copy has come to C, and there is nothing that keeps it.
        world.hold(B, C)
        events = await drain(relay)
    assert end_of(events).failovers[0].to_node == C


@pytest.mark.parametrize("other", ["offline", "draining"])
async def test_a_holder_that_is_away_or_drains_too_is_none(
    world: World, autojump_clock: MockClock, other: str
) -> None:
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        set_draining(world, B)
        if other == "draining":
            set_draining(world, C)
        else:
            world.presences[C] = world.presence(online=False)
        await trio.sleep(3 * TIMEOUT_S)
        assert world.b.engine.running == 1


@pytest.mark.parametrize("where", ["request", "setting"])
async def test_an_answer_that_must_not_go_on_elsewhere_stays(
    world: World, autojump_clock: MockClock, where: str
) -> None:
    request = ASK
    if where == "request":
        request = msgspec.structs.replace(ASK, failover="off")
    else:
        world.a.dispatcher._failover = "off"
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(request) as relay:
        await relay.receive()
        set_draining(world, B)
        await trio.sleep(3 * TIMEOUT_S)
        assert world.b.engine.running == 1


async def test_who_is_undrained_starts_anew(world: World, autojump_clock: MockClock) -> None:
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        for _ in range(3):
            set_draining(world, B)
            await trio.sleep(0.7 * TIMEOUT_S)
            set_draining(world, B, False)
            await trio.sleep(1)
        assert world.b.engine.running == 1


async def test_events_that_wait_are_not_taken_once_it_moves(
    world: World, autojump_clock: MockClock
) -> None:
    world.b.engine.together = True
    async with world.b.dispatcher.generate(ASK) as relay:
        assert relay.node_id == B
        [movable] = world.b.dispatcher._draining._running
        movable.receive_nowait()
        movable.move()
        for receive in (movable.receive_nowait,):
            with pytest.raises(InferenceError) as caught:
                receive()
            assert caught.value.failure.code == "DRAINING"
        with pytest.raises(InferenceError):
            await movable.receive()
        world.b.dispatcher._draining._running.clear()


async def test_every_request_is_counted_as_demand_where_it_came_in(
    world: World, autojump_clock: MockClock
) -> None:
    meters = {}
    for node in (world.a, world.b):
        meters[node.id] = meter = DemandMeter(1, 100)
        node.dispatcher._demand = meter
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        await trio.sleep(20)
        [told] = meters[A].read(trio.current_time())
        assert (told.model, told.recent) == (NAME, 1.0)
        assert meters[B].read(trio.current_time()) == (), "it was forwarded there"
        # To load or unload it is no demand.
        async with world.a.dispatcher.generate(GenerateRequest(NAME)) as loading:
            await loading.receive()
            await trio.sleep(20)
            [told] = meters[A].read(trio.current_time())
            assert told.recent == 1.0
    world.b.engine.hang_after = 0
    with trio.move_on_after(20):
        await world.a.dispatcher.embed(EMBED_ASK)
    [told] = meters[A].read(trio.current_time())
    assert told.recent == pytest.approx(1.0, abs=0.01)
    await trio.sleep(50)
    [told] = meters[A].read(trio.current_time())
    assert told.recent == 0.0


async def test_a_node_that_has_left_may_still_beat_and_answer(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.a.dispatcher.generate(ASK) as relay:
        assert relay.node_id == B
        first = await relay.receive()
        del world.state.members[B]
        world.a.dispatcher.hear(B, Beat(2.0, Usage(), leaving=True))
        assert text_of([first, *await drain(relay)]) == "abcdef"


async def test_a_dispatcher_runs_its_draining(
    world: World, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node: Node = world.b
    assert isinstance(node.dispatcher, Dispatcher)
    await nursery.start(node.dispatcher.run)
    await wait_all_tasks_blocked()
    assert await slow_answer(world) == ["BC DRAINING"]
