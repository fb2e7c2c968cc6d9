"""Answers that lose their node in the middle: on virtual time, with scripted engines."""

from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.ids import NodeId
from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.transcripts import Resume
from ollamad.scheduler.dispatch import SILENCE_S, WATCH_INTERVAL_S
from ollamad.scheduler.relay import MAX_BARREN_FAILURES, with_tried
from tests.fakes.engines import drain, refusal
from tests.fakes.peer_net import PeerNet
from tests.unit.test_scheduler_dispatch import ASK, NAME, A, B, C, World

TEXT = [Chunk(letter, (place,)) for place, letter in enumerate("abcdef", 1)]
DIED = Failed("RUNNER_DIED", "the runner was killed", 503)


@pytest.fixture
async def world(nursery: trio.Nursery) -> AsyncIterator[World]:
    world = World(PeerNet(nursery))
    await world.start()
    for node in (world.a, world.b, world.c):
        node.engine.script_for = writes_on
    yield world
    await wait_all_tasks_blocked()
    for node in (world.a, world.b, world.c):
        assert node.engine.running == 0
        assert not node.dispatcher._outstanding


def writes_on(request: GenerateRequest) -> list[Event | Exception]:
    """An engine that says a to f, from where the request stands."""
    rest = TEXT[len(request.resume) :]
    assert request.resume == tuple(range(1, len(request.resume) + 1))
    return [*rest, Finished("stop", eval_count=len(rest))]


def says(*events: Event | Exception) -> "list[Event | Exception]":
    return list(events)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def end_of(events: list[Event]) -> Finished:
    end = events[-1]
    assert isinstance(end, Finished), end
    return end


async def ask_and_cut(world: World, request: GenerateRequest = ASK, after: int = 2) -> list[Event]:
    """All events of an answer whose first node dies after so many of them."""
    world.b.engine.hang_after = after
    async with world.a.dispatcher.generate(request) as relay:
        events = [await relay.receive() for _ in range(after)]
        assert relay.node_id == B
        world.net.down.add(B)
        world.net.cut(B)
        events += await drain(relay)
        assert relay.node_id == C
    return events


@pytest.mark.parametrize("after", [1, 2, 5, 6])
async def test_an_answer_goes_on_where_its_node_died(world: World, after: int) -> None:
    events = await ask_and_cut(world, after=after)
    assert text_of(events) == "abcdef"
    end = end_of(events)
    assert end.eval_count == 6
    [move] = end.failovers
    assert (move.from_node, move.to_node, move.reason) == (B, C, "NODE_LOST")
    assert (move.mode, move.after_tokens) == ("continue", after)
    [request] = world.c.engine.requests
    tokens = tuple(range(1, after + 1))
    assert request == msgspec.structs.replace(ASK, resume=tokens, digest=world.model.digest)


async def test_a_replay_runs_the_request_again_with_the_same_seed(world: World) -> None:
    request = msgspec.structs.replace(ASK, failover="replay", default_seed=-1)
    events = await ask_and_cut(world, request, after=3)
    assert text_of(events) == "abcdef"
    assert end_of(events).failovers[0].mode == "replay"
    [first], [second] = world.b.engine.requests, world.c.engine.requests
    assert first == second
    assert isinstance(first, GenerateRequest)
    assert first.default_seed >= 0
    assert first.resume == ()


async def test_seeds_differ_between_requests(world: World) -> None:
    request = GenerateRequest(NAME, "hello")
    seeds = set()
    for _ in range(5):
        await world.ask(request)
        seeds.add(world.b.engine.requests[-1].default_seed)  # type: ignore[union-attr]
    assert len(seeds) == 5


async def test_a_replay_that_differs_ends_with_an_error_not_with_wrong_text(world: World) -> None:
    world.c.engine.script_for = lambda request: says(Chunk("aX", (1, 9)), Finished("stop"))
    events = await ask_and_cut(world, msgspec.structs.replace(ASK, failover="replay"))
    assert text_of(events) == "ab"
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "REPLAY_DIVERGED"


async def test_a_schema_is_replayed(world: World) -> None:
    events = await ask_and_cut(world, msgspec.structs.replace(ASK, format="json"))
    assert text_of(events) == "abcdef"
    assert end_of(events).failovers[0].mode == "replay"


async def test_the_setting_decides_where_the_request_says_nothing(world: World) -> None:
    world.a.dispatcher._failover = "off"
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        world.net.cut(B)
        event = await relay.receive()
    assert isinstance(event, Failed)
    assert event.code == "NODE_LOST"
    assert world.c.engine.requests == []


async def test_a_runner_that_died_is_followed_by_another_node(world: World) -> None:
    world.b.engine.script_for = lambda request: says(TEXT[0], DIED)
    events = (await world.ask())[1]
    assert text_of(events) == "abcdef"
    assert end_of(events).failovers[0].reason == "RUNNER_DIED"


async def test_an_answer_that_ends_without_its_last_word_goes_on(world: World) -> None:
    world.b.engine.script_for = lambda request: says(TEXT[0])
    assert text_of((await world.ask())[1]) == "abcdef"


async def test_a_failure_of_the_request_itself_is_told(world: World) -> None:
    broken = Failed("INVALID_REQUEST", "no", 400)
    world.b.engine.script_for = lambda request: says(TEXT[0], broken)
    assert (await world.ask())[1] == [TEXT[0], broken]
    assert world.c.engine.requests == []


async def test_a_failure_to_decode_may_be_of_one_machine(world: World) -> None:
    broken = Failed("ENGINE_ERROR", "no", 500)
    world.b.engine.script_for = lambda request: says(TEXT[0], broken)
    events = (await world.ask())[1]
    assert text_of(events) == "abcdef"
    assert end_of(events).failovers[0].reason == "ENGINE_ERROR"
    world.c.engine.script_for = lambda request: says(Failed("ENGINE_ERROR", "nor here", 500))
    begun = trio.current_time()
    told = with_tried(broken, (B, C))
    assert (await world.ask())[1] == [TEXT[0], told], "nobody else is left, and it is told"
    assert trio.current_time() - begun < 5
    world.b.engine.script_for = lambda request: says(broken)
    failure = await world.fails()
    assert (failure.code, failure.details["nodes_tried"]) == ("ENGINE_ERROR", [B, C])


TOO_LONG = refusal("PROMPT_TOO_LONG", 400)


async def test_a_node_whose_context_is_smaller_is_passed_over(world: World) -> None:
    world.hold(A, B, C)
    world.a.engine.refuse = TOO_LONG
    events = await ask_and_cut(world)
    assert text_of(events) == "abcdef"
    assert len(world.a.engine.requests) == 1, "this node is asked first"


async def test_a_node_with_a_smaller_context_is_no_reason_not_to_wait(
    world: World, autojump_clock: MockClock
) -> None:
    world.c.engine.refuse = TOO_LONG
    world.b.engine.script_for = lambda request: (
        writes_on(request) if request.resume else says(TEXT[0], DIED)
    )
    assert text_of((await world.ask())[1]) == "abcdef"
    assert len(world.c.engine.requests) == 1, "it would say the same again"
    world.b.engine.script_for = lambda request: (
        says(refusal("NODE_LOST")) if request.resume else says(TEXT[0], DIED)
    )
    told = with_tried(DIED, (B, C))
    assert (await world.ask())[1] == [TEXT[0], told], "what it was lost by is told"


async def test_who_resumes_behind_a_text_is_asked_for_elsewhere_too(world: World) -> None:
    request = msgspec.structs.replace(ASK, request_id="r1")
    world.b.engine.refuse = TOO_LONG
    world.c.engine.script_for = lambda request: says(*TEXT[1:], Finished("stop"))
    async with world.a.dispatcher.generate(request, resume=Resume(1, "a")) as relay:
        assert text_of(await drain(relay)) == "bcdef"
    assert (await world.fails()).code == "PROMPT_TOO_LONG", "else it is too long for all"


async def test_the_local_runner_may_be_the_one_that_dies(world: World) -> None:
    world.hold(A, C)
    world.load(A)
    world.a.engine.script_for = lambda request: says(TEXT[0], InferenceError(DIED))
    node_id, events = await world.ask()
    assert node_id == A
    assert text_of(events) == "abcdef"
    assert world.a.engine.running == 0


async def test_several_nodes_may_be_lost_one_after_another(world: World) -> None:
    world.hold(A, B, C)

    def dies_soon(request: GenerateRequest) -> list[Event | Exception]:
        return [*writes_on(request)[:2], DIED]

    for node in (world.a, world.b, world.c):
        node.engine.script_for = dies_soon
    events = (await world.ask())[1]
    assert text_of(events) == "abcdef"
    moves = end_of(events).failovers
    assert [move.after_tokens for move in moves] == [2, 4, 6]
    assert [move.from_node for move in moves][1:] == [move.to_node for move in moves][:-1]


async def test_a_request_that_kills_each_runner_at_once_is_given_up(
    world: World, autojump_clock: MockClock
) -> None:
    for node in (world.b, world.c):
        node.engine.script_for = lambda request: (
            says(DIED) if request.resume else says(TEXT[0], DIED)
        )
    world.hold(A, B, C)
    world.a.engine.script_for = world.b.engine.script_for
    given_up((await world.ask())[1], {A, B, C})
    asked = [len(node.engine.requests) for node in (world.a, world.b, world.c)]
    assert sum(asked) == 1 + MAX_BARREN_FAILURES


def given_up(events: list[Event], tried: set[NodeId]) -> None:
    """The answer ended after its first bit, since it may kill runners."""
    first, failure = events
    assert first == TEXT[0]
    assert isinstance(failure, Failed)
    assert failure.code == DIED.code
    assert failure.message.startswith(f"{DIED.message}; given up after 3 failures in a row")
    assert tried_by(failure) == sorted(tried)


def tried_by(failure: Failed) -> list[str]:
    """The nodes that the client is told of, none of them twice."""
    told = failure.details["nodes_tried"]
    assert isinstance(told, list)
    return sorted(told)


async def test_a_replay_that_dies_at_the_same_place_each_time_is_given_up(world: World) -> None:
    for node in (world.b, world.c):
        node.engine.script_for = lambda request: says(TEXT[0], DIED)
    request = msgspec.structs.replace(ASK, failover="replay")
    with trio.fail_after(5):
        given_up((await world.ask(request))[1], {B, C})
    assert len(world.b.engine.requests) + len(world.c.engine.requests) == 4


async def test_with_nobody_else_it_waits_for_the_node_to_return(
    world: World, autojump_clock: MockClock
) -> None:
    world.hold(B)
    world.b.engine.hang_after = 2
    async with world.a.dispatcher.generate(ASK) as relay, trio.open_nursery() as nursery:
        events = [await relay.receive(), await relay.receive()]
        world.net.down.add(B)
        world.net.cut(B)
        world.b.engine.hang_after = None

        async def return_later() -> None:
            await trio.sleep(3)
            world.net.down.clear()

        nursery.start_soon(return_later)
        events += await drain(relay)
    assert text_of(events) == "abcdef"
    [move] = end_of(events).failovers
    assert move.to_node == B
    assert 3000 <= move.silence_ms <= 3500


async def test_with_nobody_for_long_the_loss_is_told(
    world: World, autojump_clock: MockClock
) -> None:
    world.hold(B)
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        world.net.down.add(B)
        world.net.cut(B)
        started = trio.current_time()
        event = await relay.receive()
    assert isinstance(event, Failed)
    assert event.code == "NODE_LOST"
    assert tried_by(event) == [B]
    assert 10 <= trio.current_time() - started < 11


async def test_a_node_that_refuses_is_passed_over(world: World) -> None:
    world.hold(A, B, C)
    world.a.engine.refuse = refusal("INSUFFICIENT_MEMORY")
    world.presences[A] = world.presence(online=False)
    events = await ask_and_cut(world)
    assert text_of(events) == "abcdef"


async def test_holders_that_came_later_are_asked_too(world: World) -> None:
    world.hold(B)
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        events = [await relay.receive()]
        world.hold(B, C)
        world.net.down.add(B)
        world.net.cut(B)
        events += await drain(relay)
    assert text_of(events) == "abcdef"


async def test_a_model_that_was_replaced_meanwhile_is_not_mixed_in(
    world: World, autojump_clock: MockClock
) -> None:
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        other = msgspec.structs.replace(world.model, digest="sha256:" + "0" * 64)
        world.state.models[NAME] = other
        world.net.cut(B)
        world.net.down.add(B)
        event = await relay.receive()
    assert isinstance(event, Failed), "the rest would be another model's"
    assert world.c.engine.requests == []


async def test_a_node_that_has_another_model_of_that_name_does_not_answer(world: World) -> None:
    other = msgspec.structs.replace(world.model, digest="sha256:" + "0" * 64)
    world.b.state = msgspec.structs.replace(world.state, models={NAME: other})
    assert (await world.ask())[0] == C
    assert world.b.engine.requests == []


async def test_what_can_be_taken_at_once_stops_at_a_loss(world: World) -> None:
    world.b.engine.together = True
    world.b.engine.script_for = lambda request: says(TEXT[0], TEXT[1], DIED)
    async with world.a.dispatcher.generate(ASK) as relay:
        await wait_all_tasks_blocked()
        events: list[Event] = [relay.receive_nowait(), relay.receive_nowait()]
        for _ in range(2):
            with pytest.raises(trio.WouldBlock):
                relay.receive_nowait()
        events += await drain(relay)
    assert text_of(events) == "abcdef"


@pytest.mark.parametrize("while_waiting", [False, True])
async def test_a_client_that_leaves_ends_all_of_it(world: World, while_waiting: bool) -> None:
    world.b.engine.hang_after = 1
    world.c.engine.hang_after = 1
    async with trio.open_nursery() as nursery:

        async def client() -> None:
            async with world.a.dispatcher.generate(ASK) as relay:
                await relay.receive()
                world.net.down.add(B)
                world.net.cut(B)
                if while_waiting:
                    world.net.down.add(C)
                    world.net.cut(C)
                await drain(relay)

        nursery.start_soon(client)
        await wait_all_tasks_blocked()
        assert world.c.engine.running == (0 if while_waiting else 1)
        nursery.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert world.c.engine.running == 0
    assert world.a.dispatcher.outstanding() == 0


async def test_the_abandoned_half_is_cancelled(world: World) -> None:
    """The link to the first node breaks, but the node lives."""
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(ASK) as relay:
        await relay.receive()
        assert world.b.engine.running == 1
        world.net.cut(B)
        events = await drain(relay)
        assert isinstance(events[-1], Finished)
        await wait_all_tasks_blocked()
        assert world.b.engine.running == 0


async def test_a_node_that_says_nothing_is_asked_whether_it_lives(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    asked: list[tuple[str, float]] = []

    async def probe(node_id: str) -> None:
        asked.append((node_id, trio.current_time() - begun))
        world.net.down.add(B)
        world.net.cut(B)  # what a probe does that finds nobody

    world.a.dispatcher._probe = probe
    nursery.start_soon(world.a.dispatcher.run)
    world.b.engine.hang_after = 2
    begun = trio.current_time()
    async with world.a.dispatcher.generate(ASK) as relay:
        events = await drain(relay)
    assert text_of(events) == "abcdef"
    [(node_id, after_s)] = asked
    assert node_id == B
    assert SILENCE_S <= after_s <= SILENCE_S + 2 * WATCH_INTERVAL_S
    nursery.cancel_scope.cancel()
