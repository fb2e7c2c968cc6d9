"""One request's life: here or forwarded, tried elsewhere, failed in band, cancelled; counters."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.admission import Asker
from ollamad.core.ids import NodeId
from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    LoadedModel,
    Message,
    Options,
)
from ollamad.core.prefix import Prompt
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.routing import Choice
from ollamad.core.state import ClusterState, Model
from ollamad.peers.link import Stream
from ollamad.scheduler import exchange
from ollamad.scheduler.dispatch import Dispatcher
from ollamad.scheduler.exchange import EMBED, GENERATE, TRANSCRIPT
from ollamad.scheduler.relay import (
    MAX_LOST_AGAIN,
    PASSING,
    TRY_ELSEWHERE,
    WAIT_FOR_NODE_S,
    WAIT_STEP_S,
    Attempts,
)
from ollamad.wire.codec import encode
from tests.fakes.api_services import member, model
from tests.fakes.engines import ScriptedEngine, drain, refusal
from tests.fakes.peer_net import PeerNet

A, B, C = NodeId("A"), NodeId("B"), NodeId("C")
NAME = "smollm2:135m"
ASK = GenerateRequest(NAME, "hello", default_seed=7)
TOLD = msgspec.structs.replace(ASK, failover="off")  # a loss is told, not mended
EMBED_ASK = EmbedRequest(NAME, ("one", "two"))
DONE = [Chunk("Hi", (1,)), Finished("stop", eval_count=1)]


class Node:
    def __init__(self, world: "World", node_id: NodeId, mesh: Any) -> None:
        self.id = node_id
        self.engine = ScriptedEngine()
        self.state = world.state
        self.dispatcher = Dispatcher(
            node_id,
            state=lambda: self.state,
            presence=lambda other: world.presences[other],
            engine=self.engine,
            peers=mesh,
        )
        mesh.handle(GENERATE, self.dispatcher.serve_generate)
        mesh.handle(EMBED, self.dispatcher.serve_embed)
        mesh.handle(TRANSCRIPT, self.dispatcher.serve_transcript)


class World:
    """Three nodes with one state; the model is on B and C, in memory on B."""

    def __init__(self, net: PeerNet) -> None:
        self.net = net
        self.state = ClusterState(
            cluster_id="c1",
            members={n: member(n, n.lower()) for n in (A, B, C)},
            models={NAME: model(NAME, confirmed=(B, C), desired=(B, C))},
        )
        self.presences = {n: self.presence() for n in (A, B, C)}
        self.load(B)

    async def start(self) -> None:
        self.a, self.b, self.c = [Node(self, n, await self.net.add(n)) for n in (A, B, C)]

    def presence(self, *loaded: LoadedModel, online: bool = True) -> Presence:
        usage = Usage(memory_available=1 << 40)
        return Presence(online, 1.0, Beat(1.0, usage, loaded))

    def load(self, node_id: NodeId, **changes: Any) -> None:
        loaded = LoadedModel(NAME, self.model.digest, 10, 0, 4096, 0, slots=1)
        self.presences[node_id] = self.presence(msgspec.structs.replace(loaded, **changes))

    @property
    def model(self) -> Model:
        return self.state.models[NAME]

    def hold(self, *nodes: NodeId) -> None:
        self.state.models[NAME] = msgspec.structs.replace(self.model, confirmed=nodes)

    async def ask(self, request: GenerateRequest = ASK) -> tuple[NodeId, list[Any]]:
        async with self.a.dispatcher.generate(request) as serving:
            return serving.node_id, await drain(serving)

    async def fails(self, request: GenerateRequest = ASK) -> Failed:
        failure = await self.refused(request)
        assert self.a.dispatcher.outstanding() == 0
        return failure

    async def refused(self, request: GenerateRequest = ASK) -> Failed:
        with pytest.raises(InferenceError) as caught:
            await self.ask(request)
        return caught.value.failure


@pytest.fixture
async def world(nursery: trio.Nursery) -> AsyncIterator[World]:
    world = World(PeerNet(nursery))
    await world.start()
    yield world
    await wait_all_tasks_blocked()
    for node in (world.a, world.b, world.c):
        assert node.engine.running == 0
        assert node.dispatcher.outstanding() == 0
        assert not node.dispatcher._outstanding


async def test_a_local_answer(world: World) -> None:
    world.hold(A)
    assert await world.ask() == (A, DONE)
    assert world.net.dials == []


async def test_this_node_is_taken_before_others(world: World) -> None:
    world.hold(A, B)
    world.load(A)
    assert (await world.ask())[0] == A


async def test_a_forwarded_answer(world: World) -> None:
    request = GenerateRequest(NAME, messages=(Message("user", "é" * 10),), options=Options(seed=7))
    request = msgspec.structs.replace(request, default_seed=8, digest=world.model.digest)
    assert await world.ask(request) == (B, DONE)
    assert world.b.engine.requests == [request]
    assert world.a.engine.requests == world.c.engine.requests == []


@pytest.mark.parametrize("together", [False, True])
async def test_all_events_arrive_in_order_up_to_the_last(world: World, together: bool) -> None:
    chunks = [Chunk(str(i), (i,)) for i in range(200)]
    world.b.engine.script = [*chunks, Finished("length", eval_count=200)]
    world.b.engine.together = together
    assert await world.ask() == (B, [*chunks, Finished("length", eval_count=200)])


async def test_events_that_wait_are_taken_without_waiting(world: World) -> None:
    world.b.engine.script = [Chunk("a"), Chunk("b"), Finished("stop")]
    world.b.engine.together = True
    async with world.a.dispatcher.generate(ASK) as serving:
        got = [serving.receive_nowait()]
        await wait_all_tasks_blocked()
        got += [serving.receive_nowait(), serving.receive_nowait()]
        with pytest.raises(trio.WouldBlock):
            serving.receive_nowait()
    assert got == [Chunk("a"), Chunk("b"), Finished("stop")]


async def test_a_request_counts_while_it_runs(world: World) -> None:
    async with world.a.dispatcher.generate(ASK) as serving:
        assert world.a.dispatcher.outstanding() == 1
        assert await serving.receive() == DONE[0]
        assert world.a.dispatcher.outstanding() == 1
    assert world.a.dispatcher.outstanding() == 0


async def test_what_runs_there_already_counts_for_the_next(world: World) -> None:
    world.load(C)
    world.b.engine.hang_after = world.c.engine.hang_after = 1
    generate = world.a.dispatcher.generate
    async with generate(ASK) as first, generate(ASK) as second:
        assert {first.node_id, second.node_id} == {B, C}


# Elsewhere.


@pytest.mark.parametrize("code", sorted(TRY_ELSEWHERE))
@pytest.mark.parametrize("in_band", [False, True])
async def test_a_failure_before_the_first_event_is_tried_elsewhere(
    world: World, code: str, in_band: bool
) -> None:
    if in_band:
        world.b.engine.script = [Failed(code, "no", 503)]
    else:
        world.b.engine.refuse = refusal(code)
    assert await world.ask() == (C, DONE)


@pytest.mark.parametrize("code", sorted(TRY_ELSEWHERE))
async def test_a_local_failure_is_tried_elsewhere(world: World, code: str) -> None:
    world.hold(A, C)
    world.load(A)
    world.a.engine.refuse = refusal(code)
    assert await world.ask() == (C, DONE)


async def test_a_failure_that_all_would_share_is_told_at_once(world: World) -> None:
    world.b.engine.refuse = refusal("CONTEXT_TOO_LONG", 400)
    failure = await world.fails()
    assert (failure.code, failure.status) == ("CONTEXT_TOO_LONG", 400)
    assert world.c.engine.requests == []


async def test_when_all_fail_the_last_reason_and_who_was_tried_are_told(world: World) -> None:
    world.b.engine.refuse = world.c.engine.refuse = refusal("QUEUE_FULL")
    failure = await world.fails()
    assert (failure.code, failure.status) == ("QUEUE_FULL", 503)
    assert failure.details["nodes_tried"] == [B, C]


async def test_a_node_that_is_down(world: World, autojump_clock: MockClock) -> None:
    world.net.down.add(B)
    assert await world.ask() == (C, DONE)
    world.net.down.add(C)
    world.net.cut(C)
    await wait_all_tasks_blocked()
    failure = await world.fails()
    assert (failure.code, failure.status) == ("NODE_LOST", 503)


@pytest.mark.parametrize("code", sorted(PASSING))
async def test_with_nobody_else_the_same_node_is_asked_once_more(
    world: World, autojump_clock: MockClock, code: str
) -> None:
    """Its runner was killed, or its link broke: in a moment there is another one."""
    world.hold(B)
    world.b.engine.script_for = lambda request: (
        [Failed(code, "killed", 503)] if len(world.b.engine.requests) == 1 else DONE
    )
    assert await world.ask() == (B, DONE)
    world.b.engine.refuse_first = refusal(code)
    assert (await world.a.dispatcher.embed(EMBED_ASK))[0] == B


class Restarting:
    """The only holder, B, which dies with the first request and is back after three seconds."""

    def __init__(self, world: World, nursery: trio.Nursery, code: str = "NODE_LOST") -> None:
        self.world = world
        self.back_after_s = 3.0
        world.hold(B)
        world.b.engine.script_for = self._answer
        self._code = code
        self._nursery = nursery

    def _answer(self, request: GenerateRequest) -> list[Any]:
        if len(self.world.b.engine.requests) > 1:
            return DONE
        self._nursery.start_soon(self._restart)
        return [Failed(self._code, "killed", 503)]

    async def _restart(self) -> None:
        self.world.presences[B] = self.world.presence(online=False)
        await trio.sleep(self.back_after_s)
        members = self.world.state.members
        self.world.b.state = ClusterState(cluster_id="c1", members=members)
        self.world.load(B)
        await trio.sleep(0.7)  # only now it knows its models again
        self.world.b.state = self.world.state


@pytest.mark.parametrize("code", ["NODE_LOST", "STOPPED"])
async def test_an_only_holder_that_restarts_is_waited_for(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock, code: str
) -> None:
    Restarting(world, nursery, code)
    begun = trio.current_time()
    assert await world.ask() == (B, DONE)
    assert trio.current_time() - begun == pytest.approx(3.85, abs=WAIT_STEP_S)


async def test_who_waits_for_a_restart_may_go_away(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    Restarting(world, nursery)
    begun = trio.current_time()
    with trio.move_on_after(1):
        await world.ask()
    assert trio.current_time() - begun == 1
    assert world.a.dispatcher.outstanding() == 0


async def test_a_restart_that_takes_too_long_is_told(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    restarting = Restarting(world, nursery)
    restarting.back_after_s = 60.0
    begun = trio.current_time()
    failure = await world.fails()
    assert (failure.code, failure.details["nodes_tried"]) == ("NODE_LOST", [B])
    assert trio.current_time() - begun == pytest.approx(WAIT_FOR_NODE_S, abs=WAIT_STEP_S)
    world.b.engine.requests.clear()
    world.load(B)
    begun = trio.current_time()
    with pytest.raises(InferenceError) as caught:
        async with world.a.dispatcher.generate(ASK, Asker(deadline_s=4.0)):
            pytest.fail("it has not begun")
    assert caught.value.failure.code == "DEADLINE_PASSED"
    assert trio.current_time() - begun == pytest.approx(4.0)


@pytest.mark.parametrize("end", ["deleted", "replaced", "taken out", "refused elsewhere"])
async def test_a_restart_is_not_waited_for_in_vain(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock, end: str
) -> None:
    Restarting(world, nursery)
    models = world.state.models
    if end == "refused elsewhere":
        world.hold(B, C)
        world.c.engine.refuse = refusal("INSUFFICIENT_MEMORY")

    async def change() -> None:
        await trio.sleep(1)
        if end == "deleted":
            del models[NAME]
        elif end == "replaced":
            models[NAME] = msgspec.structs.replace(world.model, digest="sha256:new")
        else:
            world.hold()

    begun = trio.current_time()
    if end != "refused elsewhere":
        nursery.start_soon(change)
    failure = await world.fails()
    assert failure.code == ("INSUFFICIENT_MEMORY" if world.c.engine.refuse else "NODE_LOST")
    assert trio.current_time() - begun < 1.5


async def test_a_request_that_ends_its_node_again_and_again_is_given_up(
    world: World, autojump_clock: MockClock
) -> None:
    world.hold(B)
    world.b.engine.refuse = refusal("NODE_LOST")
    assert (await world.fails()).code == "NODE_LOST"
    assert len(world.b.engine.requests) == 1 + MAX_LOST_AGAIN


async def test_a_request_that_kills_every_runner_is_given_up_soon(
    world: World, autojump_clock: MockClock
) -> None:
    world.b.engine.refuse = world.c.engine.refuse = refusal("RUNNER_DIED")
    failure = await world.fails()
    assert failure.code == "RUNNER_DIED"
    assert failure.details["nodes_tried"] == [B, C]
    assert "3 failures in a row" in failure.message
    assert len(world.b.engine.requests) + len(world.c.engine.requests) == 3
    again_later = Failed("RUNNER_DIED", "it has crashed 3 times", 503, {"retry_after": 9})
    world.b.engine.refuse = world.c.engine.refuse = InferenceError(again_later)
    assert (await world.fails()).details["retry_after"] == 9
    assert len(world.b.engine.requests) + len(world.c.engine.requests) == 5


@pytest.mark.parametrize(
    ("code", "asked"), [("RUNNER_DIED", 3), ("ENGINE_ERROR", 3), ("NODE_LOST", 20)]
)
async def test_a_request_that_kills_runners_is_not_given_to_every_holder(
    world: World, code: str, asked: int
) -> None:
    holders = [NodeId(f"N{number}") for number in range(20)]

    class Nodes:
        def find_model(self, name: str) -> Model | None:
            return None  # so that none of them can come back

        def pick(
            self, model: Model, prompt: Prompt, without: Sequence[NodeId]
        ) -> tuple[NodeId, Choice] | None:
            left = [node_id for node_id in holders if node_id not in without]
            return (left[0], cast("Choice", None)) if left else None

        sending: Any = None
        open: Any = None

    attempts = Attempts(Nodes(), world.model, Prompt(5))

    async def fail_all() -> None:
        while True:
            node_id, _ = await attempts.next()
            attempts.failed(node_id, Failed(code, "gone", 503))

    with pytest.raises(InferenceError) as caught:
        await fail_all()
    failure = caught.value.failure
    assert failure.code == code
    assert failure.details["nodes_tried"] == holders[:asked]


async def test_an_answer_that_has_not_begun_in_time_is_given_up(
    world: World, autojump_clock: MockClock
) -> None:
    world.b.engine.hang_after = 0  # as while a large model is loaded
    asker = Asker(deadline_s=5.0)
    begun = trio.current_time()
    with pytest.raises(InferenceError) as caught:
        async with world.a.dispatcher.generate(ASK, asker):
            pytest.fail("it has not begun")
    assert (caught.value.failure.code, caught.value.failure.status) == ("DEADLINE_PASSED", 408)
    with pytest.raises(InferenceError, match="within 5 s"):
        await world.a.dispatcher.embed(EMBED_ASK, asker)
    assert trio.current_time() - begun == pytest.approx(10.0, abs=0.1)
    world.b.engine.hang_after = 1  # once it has begun it may take its time
    async with world.a.dispatcher.generate(ASK, asker) as relay:
        await trio.sleep(60)
        world.b.engine.hang_after = None
        assert await relay.receive() == DONE[0]


async def test_a_node_that_dies_before_the_first_event(world: World) -> None:
    world.b.engine.hang_after = 0
    async with trio.open_nursery() as nursery:

        async def cut() -> None:
            await wait_all_tasks_blocked()
            world.net.cut(B)

        nursery.start_soon(cut)
        assert await world.ask() == (C, DONE)


async def test_a_node_that_ends_without_a_word(world: World) -> None:
    world.b.engine.script = []
    assert await world.ask() == (C, DONE)


async def test_a_node_that_crashes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.b.engine.script = [KeyError("bug")]
    assert await world.ask() == (C, DONE)


async def test_a_node_that_talks_nonsense(world: World) -> None:
    async def nonsense(peer: NodeId, request: bytes, stream: Stream) -> None:
        await stream.send(b"\xff nonsense")

    world.net.meshes[B].handle(GENERATE, nonsense)
    world.net.meshes[B].handle(EMBED, nonsense)
    assert await world.ask() == (C, DONE)
    assert (await world.a.dispatcher.embed(EMBED_ASK))[0] == C


async def test_empty_batches_mean_nothing(world: World) -> None:
    async def odd(peer: NodeId, request: bytes, stream: Stream) -> None:
        for batch in ([], [Chunk("a")], [], [], [Finished("stop")]):
            await stream.send(encode(batch))

    world.net.meshes[B].handle(GENERATE, odd)
    async with world.a.dispatcher.generate(ASK) as serving:
        await wait_all_tasks_blocked()
        assert serving.receive_nowait() == Chunk("a")
        assert serving.receive_nowait() == Finished("stop")


async def test_a_node_whose_log_is_behind(world: World) -> None:
    world.b.state = ClusterState(cluster_id="c1", members=world.state.members)
    assert await world.ask() == (C, DONE)
    world.b.state = msgspec.structs.replace(
        world.state, models={NAME: msgspec.structs.replace(world.model, confirmed=(C,))}
    )
    assert await world.ask() == (C, DONE)
    assert (await world.a.dispatcher.embed(EMBED_ASK))[0] == C
    assert world.b.engine.requests == []


async def test_a_node_that_began_to_drain_meanwhile(world: World) -> None:
    members = {**world.state.members, B: member(B, "b", draining=True)}
    world.b.state = msgspec.structs.replace(world.state, members=members)
    assert await world.ask() == (C, DONE)


# Nobody.


async def test_an_unknown_model_with_the_nearest(world: World) -> None:
    failure = await world.fails(GenerateRequest("smolm2:135m"))
    assert (failure.code, failure.status) == ("MODEL_NOT_FOUND", 404)
    assert failure.details["suggestions"] == [NAME]
    assert f"did you mean {NAME}?" in failure.message
    failure = await world.fails(GenerateRequest("../x\0"))
    assert failure.code == "MODEL_NOT_FOUND"
    assert "pulling" in failure.message


async def test_a_model_that_no_node_holds_yet(world: World) -> None:
    world.hold()
    assert (await world.fails()).code == "NO_REPLICA"


async def test_all_holders_are_away_or_drain(world: World) -> None:
    world.presences[B] = world.presence(online=False)
    world.state.members[C] = member(C, "c", draining=True)
    failure = await world.fails()
    assert (failure.code, failure.details["holders"]) == ("NO_REPLICA", [B, C])
    world.hold(B, NodeId("gone"))
    assert (await world.fails()).code == "NO_REPLICA"


# In band.


async def test_a_node_that_dies_in_mid_answer_is_told_in_band(world: World) -> None:
    world.b.engine.hang_after = 1
    async with world.a.dispatcher.generate(TOLD) as serving:
        assert await serving.receive() == DONE[0]
        world.net.cut(B)
        event = await serving.receive()
    assert isinstance(event, Failed)
    assert (event.code, event.details["node_id"]) == ("NODE_LOST", B)
    assert world.c.engine.requests == [], "what was sent cannot be taken back"


@pytest.mark.parametrize("raised", [False, True])
async def test_a_failure_in_mid_answer_is_told_in_band(world: World, raised: bool) -> None:
    failure = Failed("RUNNER_DIED", "killed", 500)
    world.b.engine.script = [Chunk("a"), InferenceError(failure) if raised else failure]
    assert await world.ask(TOLD) == (B, [Chunk("a"), failure])


async def test_nonsense_in_mid_answer_is_told_in_band(world: World) -> None:
    async def nonsense(peer: NodeId, request: bytes, stream: Stream) -> None:
        await stream.send(encode([Chunk("a")]))
        await stream.send(b"\xff")
        await stream.send(b"\xff")

    world.net.meshes[B].handle(GENERATE, nonsense)
    async with world.a.dispatcher.generate(TOLD) as serving:
        assert await serving.receive() == Chunk("a")
        await wait_all_tasks_blocked()
        first, second = serving.receive_nowait(), await serving.receive()
    for event in (first, second):
        assert isinstance(event, Failed)
        assert event.code == "NODE_LOST"


# Cancelled.


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("here", [True, False])
async def test_a_client_that_goes_away_ends_the_generation_everywhere(
    world: World, after: int, here: bool
) -> None:
    world.hold(A if here else B)
    serving_node = world.a if here else world.b
    serving_node.engine.hang_after = after
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.ask)
        await wait_all_tasks_blocked()
        assert serving_node.engine.running == 1
        nursery.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert serving_node.engine.running == 0
    assert serving_node.engine.cancelled == 1
    serving_node.engine.hang_after = None
    assert (await world.ask())[1] == DONE


async def test_leaving_early_ends_the_generation_there(world: World) -> None:
    async with world.a.dispatcher.generate(ASK) as serving:
        await serving.receive()
    await wait_all_tasks_blocked()
    assert world.b.engine.running == 0


async def test_a_crash_of_the_caller_ends_the_generation_there(world: World) -> None:
    world.b.engine.hang_after = 1
    with pytest.raises(ZeroDivisionError):
        async with world.a.dispatcher.generate(ASK):
            raise ZeroDivisionError
    await wait_all_tasks_blocked()
    assert world.b.engine.cancelled == 1


# Embeddings.


async def test_embeddings_here_and_there(world: World) -> None:
    node_id, embeddings = await world.a.dispatcher.embed(EMBED_ASK)
    assert (node_id, embeddings.vectors) == (B, ((0.5, 0.25), (0.5, 0.25)))
    world.hold(A)
    assert (await world.a.dispatcher.embed(EMBED_ASK))[0] == A


async def test_embeddings_elsewhere_or_refused(world: World) -> None:
    for code in ("INSUFFICIENT_MEMORY", "ENGINE_ERROR"):
        world.b.engine.refuse = refusal(code)
        assert (await world.a.dispatcher.embed(EMBED_ASK))[0] == C
    world.c.engine.refuse = refusal("INPUT_TOO_LONG", 400)
    with pytest.raises(InferenceError, match="INPUT_TOO_LONG"):
        await world.a.dispatcher.embed(EMBED_ASK)
    world.net.down = {B, C}
    world.net.cut(B)
    world.net.cut(C)
    await wait_all_tasks_blocked()
    with pytest.raises(InferenceError) as caught:
        await world.a.dispatcher.embed(EMBED_ASK)
    assert caught.value.failure.code == "NODE_LOST"


# Sizes.


async def test_requests_and_answers_larger_than_a_message(world: World) -> None:
    request = GenerateRequest(NAME, "x" * 3_000_000, default_seed=7, digest=world.model.digest)
    assert await world.ask(request) == (B, DONE)
    assert world.b.engine.requests == [request]
    world.b.engine.vector = tuple(i / 7 for i in range(4000))
    inputs = tuple(f"{i}" * 1000 for i in range(100))
    _, embeddings = await world.a.dispatcher.embed(EmbedRequest(NAME, inputs))
    assert embeddings.vectors == (world.b.engine.vector,) * 100
    assert world.b.engine.requests[-1] == EmbedRequest(NAME, inputs)


async def flood(stream: Stream) -> None:
    for _ in range(1000):
        await stream.send(bytes(300_000))


async def test_a_request_beyond_all_bounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_WHOLE", 1_000_000)
    failure = await world.fails(GenerateRequest(NAME, "x" * 2_000_000))
    assert (failure.code, failure.status) == ("REQUEST_TOO_LARGE", 413)
    assert world.b.engine.requests == []
    async with world.net.meshes[A].open(B, GENERATE, b"") as stream:
        with pytest.raises(trio.BrokenResourceError):
            await flood(stream)
    assert world.b.engine.requests == []


@pytest.mark.parametrize("method", [GENERATE, EMBED])
async def test_a_request_that_is_nonsense(world: World, method: str) -> None:
    async with world.net.meshes[A].open(B, method, b"\xff") as stream:
        answer = await stream.receive()
    assert answer is not None
    assert b"MALFORMED" in answer


async def test_unloading_reaches_every_node_that_is_there(world: World) -> None:
    unload = msgspec.structs.replace(ASK, prompt="", keep_alive_s=0.0)
    for node in (world.b, world.c):
        node.engine.script = [Finished("unload")]
    assert (await world.ask(unload))[1] == [Finished("unload")]
    assert {len(node.engine.requests) > 0 for node in (world.b, world.c)} == {True}
    assert world.a.engine.requests == []
    world.presences[C] = world.presence(online=False)
    world.c.engine.requests.clear()
    world.b.engine.refuse = refusal("DRAINING")
    assert (await world.fails(unload)).code == "DRAINING"
    assert world.c.engine.requests == []


async def test_unloading_reaches_nodes_that_drain(world: World) -> None:
    unload = msgspec.structs.replace(ASK, prompt="", keep_alive_s=0.0)
    for node_id, node in ((B, world.b), (C, world.c)):
        node.engine.script = [Finished("unload")]
        world.state.members[node_id] = member(node_id, node_id.lower(), draining=True)
    assert (await world.ask(unload))[1] == [Finished("unload")]
    assert [len(node.engine.requests) for node in (world.b, world.c)] == [1, 1]
    load = msgspec.structs.replace(unload, keep_alive_s=60.0)
    assert (await world.fails(load)).code == "NO_REPLICA"


async def test_loading_reaches_one_node(world: World) -> None:
    load = msgspec.structs.replace(ASK, prompt="", keep_alive_s=60.0)
    await world.ask(load)
    assert len(world.b.engine.requests) == 1
    assert world.c.engine.requests == []
