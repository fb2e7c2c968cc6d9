"""Who is let in and who waits, on virtual time: places, shares, deadlines, leaving."""

import itertools
import math
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.admission import OUTPUT_WEIGHT, Asker, Place
from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    LoadedModel,
    Options,
    Output,
    Thought,
    ToolCall,
)
from ollamad.core.prefix import prompt_of
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.routing import BEYOND_SLOTS
from ollamad.core.speeds import Speed, short_digest
from ollamad.core.state import Model
from ollamad.core.transcripts import Resume
from tests.fakes.engines import drain
from tests.fakes.peer_net import PeerNet
from tests.unit.test_scheduler_dispatch import ASK, DONE, EMBED_ASK, NAME, A, B, C, Node, World

ROOM = 1 + BEYOND_SLOTS  # of the one node that has the model here


@pytest.fixture
async def world(nursery: trio.Nursery) -> AsyncIterator[World]:
    world = World(PeerNet(nursery))
    await world.start()
    world.hold(B)
    nursery.start_soon(world.a.dispatcher.run)
    yield world
    await wait_all_tasks_blocked()
    control = world.a.dispatcher.admission
    assert control.waiting == 0
    assert len(control.queue) == 0
    assert not control._reserved
    assert not control._running
    assert not control._waiting_for
    assert world.a.dispatcher.outstanding() == 0
    nursery.cancel_scope.cancel()


class Client:
    """A request of somebody that runs until it is told to end."""

    def __init__(
        self, world: World, nursery: trio.Nursery, identity: str = "", **how: float
    ) -> None:
        self.identity = identity
        self.places: list[Place] = []
        self.running = trio.Event()
        self.failure = ""
        self.scope = trio.CancelScope()
        self._end = trio.Event()
        self._world = world
        self._asker = Asker(identity, on_wait=self._wait, **how)  # type: ignore[arg-type]
        nursery.start_soon(self._run)

    async def _wait(self, place: Place) -> None:
        self.places.append(place)

    async def _run(self) -> None:
        with self.scope:
            try:
                async with self._world.a.dispatcher.generate(ASK, self._asker):
                    self.running.set()
                    await self._end.wait()
            except InferenceError as error:
                self.failure = error.failure.code

    async def end(self) -> None:
        self._end.set()
        await wait_all_tasks_blocked()

    @property
    def is_running(self) -> bool:
        return self.running.is_set()


async def clients(world: World, nursery: trio.Nursery, *identities: str) -> list[Client]:
    made = []
    for identity in identities:
        made.append(Client(world, nursery, identity))
        await wait_all_tasks_blocked()
    return made


@pytest.fixture(autouse=True)
def hang(world: World) -> None:
    world.b.engine.hang_after = 1


async def test_there_is_room_for_the_slots_and_one_more(
    world: World, nursery: trio.Nursery
) -> None:
    made = await clients(world, nursery, *"a" * (ROOM + 2))
    assert [each.is_running for each in made] == [True] * ROOM + [False] * 2
    assert [each.places[0].position for each in made[ROOM:]] == [1, 2]
    assert made[-1].places[0].estimate_s == 2 * made[ROOM].places[0].estimate_s > 0
    assert world.a.dispatcher.admission.waiting == 2
    await made[0].end()
    assert [each.is_running for each in made] == [True] * (ROOM + 1) + [False]
    for each in made:
        await each.end()
    assert all(each.is_running for each in made)


@pytest.mark.parametrize("said", [Chunk("a", (1,)), Chunk("a"), Thought("a"), ToolCall("f")])
async def test_an_answer_that_was_cut_is_charged_for_what_came(world: World, said: Output) -> None:
    world.b.engine.script = [said]
    async with world.a.dispatcher.generate(ASK, Asker("a")) as relay:
        assert await relay.receive() == said
    control = world.a.dispatcher.admission
    prompt = world.a.dispatcher.router.prompt(ASK, world.model)
    read = world.a.dispatcher.router.tokens(prompt, world.model)
    assert control.queue.got("a") == pytest.approx(read + OUTPUT_WEIGHT)


async def test_shares_are_fair_between_identities(world: World, nursery: trio.Nursery) -> None:
    running = await clients(world, nursery, *"a" * ROOM)
    waiting = await clients(world, nursery, *"aaaabb")
    order = ""
    while running:
        await running.pop(0).end()  # the one that runs for longest
        for each in [one for one in waiting if one.is_running]:
            order += each.identity
            running.append(each)
            waiting.remove(each)
    assert order[:4].count("b") == 2, "who asked for little is not held up by who asked for much"


async def test_who_goes_away_leaves_the_queue_at_once(world: World, nursery: trio.Nursery) -> None:
    made = await clients(world, nursery, *"a" * (ROOM + 3))
    made[ROOM].scope.cancel()
    await wait_all_tasks_blocked()
    assert world.a.dispatcher.admission.waiting == 2
    await made[0].end()
    assert made[ROOM + 1].is_running
    for each in made:
        await each.end()


async def test_who_goes_away_in_the_moment_of_being_let_in_takes_nothing_along(
    world: World, nursery: trio.Nursery
) -> None:
    made = await clients(world, nursery, *"a" * (ROOM + 1))
    control = world.a.dispatcher.admission
    room, control._room = control._room, lambda model: (9, 1, 1.0)
    control.poke()
    made[ROOM].scope.cancel()
    await wait_all_tasks_blocked()
    assert not made[ROOM].is_running
    assert sum(control._running.values()) == ROOM
    control._room = room
    for each in made:
        await each.end()


async def test_places_are_told_anew_while_the_queue_moves(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = await clients(world, nursery, *"a" * (ROOM + 2))
    last = made[-1]
    await trio.sleep(2.5)
    assert [place.position for place in last.places] == [2] * len(last.places)
    assert 3 <= len(last.places) <= 4
    await made[0].end()
    await trio.sleep(1.5)
    assert last.places[-1].position == 1
    for each in made:
        await each.end()


async def test_everybody_who_waits_is_listed(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    control = world.a.dispatcher.admission
    assert control.queued() == ()
    made = await clients(world, nursery, *"a" * (ROOM + 2))
    await trio.sleep(2)
    first, second = control.queued()
    assert (first.model, first.position, second.position) == (NAME, 1, 2)
    assert first.waited_seconds == pytest.approx(2.0, abs=0.1)
    assert second.estimate_seconds > 0
    for each in made:
        await each.end()
    assert control.queued() == ()


async def test_a_deadline_ends_the_wait(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    made = await clients(world, nursery, *"a" * ROOM)
    begun = trio.current_time()
    late = Client(world, nursery, "a", deadline_s=2.0)
    await trio.sleep(2.1)
    assert late.failure == "DEADLINE_PASSED"
    assert trio.current_time() - begun < 2.2
    for each in made:
        await each.end()


async def test_priorities_go_first(world: World, nursery: trio.Nursery) -> None:
    made = await clients(world, nursery, *"a" * ROOM)
    low = Client(world, nursery, "a", priority=-1)
    await wait_all_tasks_blocked()
    high = Client(world, nursery, "a", priority=1)
    await wait_all_tasks_blocked()
    await made[0].end()
    assert (high.is_running, low.is_running) == (True, False)
    for each in [*made, high, low]:
        await each.end()


NOW = 3600.0  # Unix time


@pytest.mark.parametrize(
    ("other", "order"),
    [
        (Presence(True, NOW, Beat(NOW, Usage(), started_at=1.0)), ["first", "resumed"]),
        (Presence(True, NOW, Beat(NOW, Usage())), ["first", "resumed"]),  # when it began: unknown
        (Presence(False, 0.0, Beat(0.0, Usage())), ["first", "resumed"]),  # never seen
        (Presence(False, NOW - 61, Beat(NOW - 61, Usage())), ["first", "resumed"]),
        (Presence(False, NOW - 50, Beat(NOW - 50, Usage())), ["resumed", "first"]),
        (Presence(True, NOW, Beat(NOW, Usage(), started_at=NOW - 5)), ["resumed", "first"]),
    ],
)
async def test_who_says_that_he_was_let_in_before_is_believed_after_a_loss_only(
    world: World, nursery: trio.Nursery, other: Presence, order: list[str]
) -> None:
    """Else every request could say so, and go before those of others."""
    world.presences[A] = Presence(True, NOW, Beat(NOW, Usage()))
    world.presences[C] = other
    running = await clients(world, nursery, *"a" * ROOM)

    async def ask(name: str, resume: Resume) -> None:
        request = msgspec.structs.replace(ASK, request_id=name)
        async with world.a.dispatcher.generate(request, Asker("b"), resume):
            pass

    async with trio.open_nursery() as asking:
        asking.start_soon(ask, "first", Resume(0))
        await wait_all_tasks_blocked()
        asking.start_soon(ask, "resumed", Resume(1, "a"))
        await wait_all_tasks_blocked()
        assert [one.request_id for one in world.a.dispatcher.admission.queued()] == order
        asking.cancel_scope.cancel()
    for each in running:
        await each.end()


async def test_a_full_queue_refuses_and_says_when_to_come_back(
    world: World, nursery: trio.Nursery
) -> None:
    world.a.dispatcher.admission._max_waiting = 2
    made = await clients(world, nursery, *"a" * (ROOM + 2))
    failure = await world.refused()
    assert (failure.code, failure.status) == ("QUEUE_FULL", 503)
    assert failure.message.startswith("server busy, please try again.")
    retry_s = failure.details["retry_after"]
    assert isinstance(retry_s, int)
    assert 1 <= retry_s <= 600
    with pytest.raises(InferenceError, match="server busy"):
        await world.a.dispatcher.embed(EMBED_ASK)
    for each in made:
        await each.end()


async def test_what_waits_at_other_entry_nodes_counts(world: World, nursery: trio.Nursery) -> None:
    world.a.dispatcher.admission._max_waiting = 3
    world.presences[C] = telling(world.presence(), waiting=2)
    made = await clients(world, nursery, *"a" * (ROOM + 1))
    assert (await world.refused()).code == "QUEUE_FULL"
    for each in made:
        await each.end()


def telling(presence: Presence, **fields: object) -> Presence:
    """That presence with something else in its beat."""
    return Presence(True, 1.0, msgspec.structs.replace(presence.beat, **fields))


async def test_room_that_others_gave_back_is_found_in_beats(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    world.load(B, busy=5)
    [waiting] = await clients(world, nursery, "a")
    assert not waiting.is_running
    world.load(B, busy=0)
    world.a.dispatcher.hear(B, Beat(2.0, Usage()))
    await wait_all_tasks_blocked()
    assert waiting.is_running
    await waiting.end()


async def test_with_a_full_queue_the_room_of_each_model_is_looked_at_once(
    world: World, nursery: trio.Nursery
) -> None:
    other = msgspec.structs.replace(world.model, name="other", digest="sha256:other")
    world.state.models["other"] = other
    made = await clients(world, nursery, *"a" * (ROOM + 9))
    control = world.a.dispatcher.admission
    room, asked = {NAME: 0, "other": 0}, list[str]()

    def look(model: Model) -> tuple[int, int, float]:
        asked.append(model.name)
        return room[model.name], 1, 1.0

    before, control._room = control._room, look
    async with trio.open_nursery() as waiting:

        async def wait() -> None:
            async with control.admitted(other, Asker("b"), 1.0, 1):
                await trio.sleep_forever()

        for _ in range(9):
            waiting.start_soon(wait)
        await wait_all_tasks_blocked()
        asked.clear()
        control.poke()
        assert sorted(asked) == ["other", NAME]
        room["other"] = 2
        control.poke()
        assert asked[2:].count(NAME) == 1
        assert control._running["sha256:other"] == 2
        waiting.cancel_scope.cancel()
    control._room = before
    for each in made:
        await each.end()


async def test_copies_of_one_model_may_have_room_on_different_nodes(
    world: World, nursery: trio.Nursery
) -> None:
    alias = msgspec.structs.replace(world.model, name="alias")
    world.state.models["alias"] = alias
    made = await clients(world, nursery, *"a" * (ROOM + 1))
    control = world.a.dispatcher.admission
    room = {NAME: 0, "alias": 0}
    before, control._room = control._room, lambda model: (room[model.name], 1, 1.0)
    entered = list[str]()
    async with trio.open_nursery() as waiting:

        async def wait(model: Model) -> None:
            async with control.admitted(model, Asker("b"), 1.0, 1):
                entered.append(model.name)
                await trio.sleep_forever()

        for model in (alias, world.model):  # whoever came last does not speak for both
            waiting.start_soon(wait, model)
            await wait_all_tasks_blocked()
        room["alias"] = ROOM + 2
        control.poke()
        await wait_all_tasks_blocked()
        assert entered == ["alias"]
        waiting.cancel_scope.cancel()
    control._room = before
    for each in made:
        await each.end()


async def test_where_nobody_could_serve_nobody_waits(world: World) -> None:
    world.presences[B] = world.presence(online=False)
    assert (await world.refused()).code == "NO_REPLICA"


async def test_who_waits_learns_of_new_holders(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    running = await clients(world, nursery, *"a" * ROOM)
    waiting = await clients(world, nursery, *"bcd")
    world.c.engine.hang_after = 1
    world.hold(C)  # a copy was made, and the only holder is lost
    world.presences[B] = world.presence(online=False)
    await trio.sleep(1)
    assert not any(each.failure for each in waiting)
    assert all(each.is_running for each in waiting)
    assert world.c.engine.running == 3
    for each in [*running, *waiting]:
        await each.end()


async def test_a_request_that_was_let_in_learns_of_new_holders(world: World) -> None:
    """It was tried at the only one, and a copy was made meanwhile."""

    def refuse(request: GenerateRequest) -> list[Event | Exception]:
        world.hold(B, C)
        return [Failed("LOAD_FAILED", "no", 500)]

    world.b.engine.script_for = refuse
    world.b.engine.hang_after = None
    assert (await world.ask())[0] == C


@pytest.mark.parametrize("asked", [{"prompt": ""}, {"only_counts": True}], ids=str)
async def test_what_generates_nothing_waits_for_nobody(
    world: World, nursery: trio.Nursery, asked: dict[str, Any]
) -> None:
    made = await clients(world, nursery, *"a" * ROOM)
    world.b.engine.hang_after = None
    world.b.engine.script = [Finished("load")]
    assert (await world.ask(msgspec.structs.replace(ASK, **asked)))[1] == [Finished("load")]
    for each in made:
        await each.end()


# Routing as a request meets it.


def turn(*texts: str) -> GenerateRequest:
    return msgspec.structs.replace(ASK, prompt="".join(texts))


async def test_a_conversation_stays_where_its_cache_is(world: World) -> None:
    world.hold(B, C)
    world.load(B, slots=4)
    world.load(C, slots=4)
    for node in (world.b, world.c):
        node.engine.hang_after = None
    history = "x" * 2000
    first = (await world.ask(turn(history)))[0]
    for _ in range(6):
        history += "y" * 300
        assert (await world.ask(turn(history)))[0] == first
    homes = {(await world.ask(turn(letter * 3000)))[0] for letter in "abcdefghijklmnopqrst"}
    assert homes == {B, C}, "others are free to go elsewhere"


async def test_beats_tell_other_entry_nodes_of_caches(world: World) -> None:
    world.hold(B, C)
    world.load(B, slots=4)
    world.load(C, slots=4)
    world.b.engine.hang_after = world.c.engine.hang_after = None
    history = "x" * 4000
    home = (await world.ask(turn(history)))[0]
    server = world.b if home == B else world.c
    news = server.dispatcher.router.news(world.presences[home].beat.loaded)
    assert news.count >= 20
    other = world.c if home == B else world.b
    beat = msgspec.structs.replace(world.presences[home].beat, sent_at=9.0, prefixes=news)
    other.dispatcher.hear(home, beat)
    row = next(row for row in other.dispatcher.explain(turn(history)).scores if row.node_id == home)
    assert row.cached == 1.0
    assert row.chosen


async def test_the_answer_is_part_of_what_a_chat_finds_again(world: World) -> None:
    world.hold(B)
    world.b.engine.hang_after = None
    world.b.engine.script = [Chunk("answer " * 100, (1,)), Finished("stop", eval_count=1)]
    await world.ask(turn("x" * 2000))
    prompt = prompt_of(turn("x" * 2000, "answer " * 100), world.model.digest)
    cache = world.b.dispatcher.router._cache
    assert cache.covered(world.model.digest, prompt) == 1.0


async def test_explaining_runs_nothing_and_tells_everybody(world: World) -> None:
    world.hold(A, B, C)
    world.presences[C] = world.presence(online=False)
    told = world.a.dispatcher.explain(ASK)
    assert {row.node_id: row.why_not for row in told.scores} == {A: "", B: "", C: "offline"}
    assert told.chosen == B
    assert world.b.engine.requests == []
    with pytest.raises(InferenceError):
        world.a.dispatcher.explain(msgspec.structs.replace(ASK, model="nope"))


async def test_explaining_takes_nobodys_turn(world: World) -> None:
    world.hold(B, C)
    router = world.a.dispatcher.router
    router.policy = "round-robin"
    prompt = router.prompt(ASK, world.model)
    turns = []
    for _ in range(3):
        told = world.a.dispatcher.explain(ASK)
        choice = router.choose(world.model, prompt)
        assert choice is not None
        turns.append(router.node(choice))
        assert told.chosen == turns[-1]
    assert turns == [B, C, B]


@pytest.mark.parametrize(
    ("busy", "here", "expected"),
    [
        # What serves somebody would have to end first; what is idle may be wanted again.
        (1, {"places": 0}, C),
        (0, {"places": 0}, C),
        (1, {"places": 1}, A),
        # A node of an earlier version does not tell.
        (1, {}, A),
        # Weights lie on GPUs as well.
        (1, {"places": 1, "usage": Usage(memory_available=1 << 20)}, C),
        (1, {"places": 1, "usage": Usage(memory_available=1 << 20), "vram_free": 1 << 34}, A),
        # In all there is room, but an idle one has it now.
        (0, {"places": 1, "usage": Usage(memory_available=1 << 20)}, C),
    ],
)
async def test_a_model_is_loaded_where_nobody_has_to_leave(
    world: World, busy: int, here: dict[str, object], expected: str
) -> None:
    world.hold(A, C)
    other = LoadedModel("other", "sha256:other", 1 << 34, 0, 4096, 0, slots=4, busy=busy)
    world.presences[A] = telling(world.presence(other), **here)
    world.presences[C] = telling(world.presence(), places=3)
    assert world.a.dispatcher.explain(ASK).chosen == expected
    # Where there is nobody else it is taken as it is.
    world.hold(A)
    assert world.a.dispatcher.explain(ASK).chosen == A


async def test_the_scores_of_the_decision_come_on_request(world: World) -> None:
    world.b.engine.hang_after = None
    async with world.a.dispatcher.generate(ASK, Asker(wants_scores=True)) as relay:
        assert relay.explanation is not None
        assert relay.explanation.chosen == relay.node_id == B
        await drain(relay)
    async with world.a.dispatcher.generate(ASK) as relay:
        assert relay.explanation is None
        assert await drain(relay) == DONE


async def test_measured_speeds_are_told_and_believed(world: World) -> None:
    world.b.engine.hang_after = None
    world.b.engine.script = [
        Chunk("a", (1,)),
        Finished(
            "stop",
            prompt_eval_count=1000,
            prompt_eval_duration=2_000_000_000,
            eval_count=100,
            eval_duration=4_000_000_000,
        ),
    ]
    await world.ask(turn("x" * 3000))
    [speed] = world.b.dispatcher.router.speeds()
    assert (speed.prefill, speed.decode, speed.service_s) == (500.0, 25.0, 6.0)
    assert speed.bytes_per_token == pytest.approx(3.0, abs=0.05)
    world.presences[B] = telling(world.presences[B], sent_at=7.0, speeds=(speed,))
    told = world.a.dispatcher.explain(turn("x" * 3000))
    assert told.scores[0].prefill_rate == 500.0
    assert told.prompt_tokens == pytest.approx(1000, abs=10)


async def test_what_is_on_its_way_counts_until_its_prompt_was_read(world: World) -> None:
    router, model = world.a.dispatcher.router, world.model

    def pending() -> int:
        return world.a.dispatcher.explain(turn("y")).scores[0].pending_tokens

    prompt = router.prompt(turn("x" * 4000), model)
    with router.sending(B, model, prompt) as first:
        with router.sending(B, model, prompt, 0.5):
            assert pending() == pytest.approx(1500, abs=10)
        assert pending() == pytest.approx(1000, abs=10), "given up before its first token"
        first.begun()
        assert pending() == 0
    assert router._sent == {}


@pytest.mark.parametrize("odd", [0.0, -5.0, math.nan, math.inf])
async def test_odd_figures_of_a_beat_spoil_no_decision(world: World, odd: float) -> None:
    world.b.engine.hang_after = None
    speed = Speed(short_digest(world.model.digest), -7, odd, odd, odd, odd, odd)
    world.presences[B] = telling(world.presences[B], sent_at=7.0, speeds=(speed,))
    assert (await world.ask())[0] == B


# Several entry nodes.

SLOTS = 4
SHORT = msgspec.structs.replace(ASK, options=Options(num_predict=1))
SERVED_S = 1.0  # by one of them


class Served:
    """Two entry nodes, A and C, whose requests B serves; beats tell once a second."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.ended: list[str] = []  # by whom they were asked
        self._begun: list[trio.Event] = []  # at B, in their order
        self._tell(1)
        nursery.start_soon(self._serve)
        nursery.start_soon(self._beat)

    def ask(self, entry: Node, identity: str, count: int) -> None:
        for _ in range(count):
            self.nursery.start_soon(self._ask, entry, identity)

    async def _ask(self, entry: Node, identity: str) -> None:
        async with entry.dispatcher.generate(SHORT, Asker(identity)) as relay:
            served = trio.Event()
            self._begun.append(served)
            await served.wait()
            await relay.aclose()
            self.ended.append(identity)

    async def _serve(self) -> None:
        while True:
            await trio.sleep(SERVED_S / SLOTS)
            if self._begun:
                self._begun.pop(0).set()

    async def _beat(self) -> None:
        await trio.sleep(SERVED_S / SLOTS / 2)  # beats see slots in use, not the moment between
        for now in itertools.count(2):
            await trio.sleep(1)
            self._tell(now)

    def _tell(self, now: float) -> None:
        running = self.world.b.engine.running
        loaded = LoadedModel(NAME, self.world.model.digest, 10, 0, 4096, 0, SLOTS)
        busy = min(SLOTS, running)
        loaded = msgspec.structs.replace(loaded, busy=busy, queued=running - busy)
        told = {B: Beat(now, Usage(), (loaded,))}
        for node in (self.world.a, self.world.c):
            control = node.dispatcher.admission
            shares = control.ledger.told()
            told[node.id] = Beat(now, Usage(), waiting=control.waiting, shares=shares)
        for node_id, beat in told.items():
            self.world.presences[node_id] = Presence(True, now, beat)
        for node in (self.world.a, self.world.c):
            for node_id, beat in told.items():
                if node_id != node.id:
                    node.dispatcher.hear(node_id, beat)


@pytest.fixture
async def served(world: World, nursery: trio.Nursery) -> AsyncIterator[Served]:
    nursery.start_soon(world.c.dispatcher.run)
    world.b.engine.hang_after = 1
    async with trio.open_nursery() as others:
        yield Served(world, others)
        others.cancel_scope.cancel()


async def test_who_asks_elsewhere_does_not_wait_for_the_queue_of_another_node(
    world: World, served: Served, autojump_clock: MockClock
) -> None:
    served.ask(world.a, "ada", 50)
    await trio.sleep(3)
    served.ask(world.c, "bob", 1)
    await trio.sleep(4)
    assert "bob" in served.ended


async def test_slots_are_shared_by_who_asks_not_by_where(
    world: World, served: Served, autojump_clock: MockClock
) -> None:
    served.ask(world.a, "ada", 40)
    served.ask(world.c, "bob", 30)
    served.ask(world.c, "cay", 30)
    await trio.sleep(14)
    counts = Counter(served.ended)
    assert len(served.ended) >= 50, "no slot stands idle for it"
    assert all(counts[name] >= 14 for name in ("ada", "bob", "cay")), counts


async def test_who_asks_at_two_nodes_gets_no_more(
    world: World, served: Served, autojump_clock: MockClock
) -> None:
    served.ask(world.a, "ada", 90)
    served.ask(world.c, "ada", 80)
    served.ask(world.c, "bob", 80)
    await trio.sleep(28)
    counts = Counter(served.ended)
    assert len(served.ended) >= 104
    assert abs(counts["ada"] - counts["bob"]) < 16, counts
