"""A client whose entry node died asks another one for the rest of its answer."""

from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad.core.admission import Asker
from ollamad.core.inference import Chunk, Event, Failed, Finished, GenerateRequest, InferenceError
from ollamad.core.transcripts import KEPT_S, Resume
from ollamad.scheduler.relay import Relay
from tests.fakes.engines import drain
from tests.fakes.peer_net import PeerNet
from tests.unit.test_scheduler_dispatch import B, C, Node, World
from tests.unit.test_scheduler_failover import ASK, TEXT, end_of, text_of, writes_on

NAMED = msgspec.structs.replace(ASK, request_id="r1", default_seed=-1)
ADA = Asker("ada")


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
        assert node.dispatcher.outstanding() == 0


async def ask(
    node: Node,
    request: GenerateRequest = NAMED,
    *,
    resume: Resume | None = None,
    asker: Asker = ADA,
    only: int | None = None,
) -> tuple[Relay, list[Event]]:
    """The events of an answer, or the first few; then the client is gone."""
    async with node.dispatcher.generate(request, asker, resume) as relay:
        if only is None:
            return relay, await drain(relay)
        return relay, [await relay.receive() for _ in range(only)]


async def refusal(node: Node, request: GenerateRequest = NAMED, **how: object) -> Failed:
    with pytest.raises(InferenceError) as caught:
        await ask(node, request, **how)  # type: ignore[arg-type]
    return caught.value.failure


async def test_the_rest_comes_through_another_entry_node(world: World) -> None:
    """B serves, A is the entry and dies after three tokens; the client goes on at C."""
    world.b.engine.hang_after = 3
    await ask(world.a, only=3)
    world.b.engine.hang_after = None
    relay, events = await ask(world.c, resume=Resume(3))
    assert text_of(events) == "def"
    end = end_of(events)
    assert end.eval_count == 6
    assert end.failovers[0].reason == "ENTRY_LOST"
    assert relay.node_id == B, "who served has the prompt and the answer in its cache"
    assert world.c.engine.requests == []


async def test_what_the_client_lacks_of_what_was_said_is_told_again(world: World) -> None:
    world.b.engine.hang_after = 5
    await ask(world.a, only=5)
    world.b.engine.hang_after = None
    assert text_of((await ask(world.c, resume=Resume(2)))[1]) == "cdef"


async def test_a_client_whose_second_node_dies_too_asks_a_third_one(world: World) -> None:
    """B had said more than the client got, and goes on; before the client hears of it, C dies."""
    world.b.engine.hang_after = 4
    await ask(world.a, only=4)
    world.b.engine.hang_after = None
    await ask(world.c, resume=Resume(2, "ab"), only=0)
    assert text_of((await ask(world.a, resume=Resume(2, "ab")))[1]) == "cdef"


@pytest.mark.parametrize(
    ("resume", "parts"),
    [
        (Resume(2, "ab"), ["ab", "cd", "e"]),
        (Resume(4, "abcd"), ["abcd", "e"]),
        (Resume(0, ""), ["abcd", "e"]),
        (Resume(2), ["abcd", "e"]),  # nobody knows where that is
        (Resume(2, "ax"), ["abcd", "e"]),
        (Resume(9, "abcdefghi"), ["abcd", "e"]),
    ],
    ids=str,
)
def test_a_part_is_cut_where_the_clients_text_ends(resume: Resume, parts: list[str]) -> None:
    events = [Chunk("abcd", (1, 2, 3, 4)), Chunk("e", (5,))]
    cut = resume.cut(events)
    assert [event.text for event in cut if isinstance(event, Chunk)] == parts
    assert [id_ for event in cut if isinstance(event, Chunk) for id_ in event.tokens] == [
        *range(1, 6)
    ]


async def test_a_whole_answer_is_told_again_without_being_made_again(world: World) -> None:
    await ask(world.a)
    [made] = world.b.engine.requests
    for resume, text in (
        (None, "abcdef"),
        (Resume(0), "abcdef"),
        (Resume(4), "ef"),
        (Resume(6), ""),
    ):
        relay, events = await ask(world.c, resume=resume)
        assert text_of(events) == text
        assert end_of(events).reason == "stop"
        assert relay.node_id == B
    assert world.b.engine.requests == [made]
    assert world.c.engine.requests == []


async def test_a_generation_that_still_runs_is_ended_where_it_runs(world: World) -> None:
    """The client lost its connection; the entry node has not noticed yet."""
    world.b.engine.hang_after = 2
    async with world.a.dispatcher.generate(NAMED, ADA) as relay:
        first = [await relay.receive() for _ in range(2)]
        world.b.engine.hang_after = None
        keeper = world.b.dispatcher._keeper
        [transcript] = keeper._transcripts._kept.values()
        keeper.note(transcript, Chunk("c", (3,)))
        _, events = await ask(world.c, resume=Resume(2))
        assert text_of(first) + text_of(events) == "abcdef"
        # Its next token is its last: somebody else goes on.
        with pytest.raises(InferenceError) as caught:
            keeper.note(transcript, Chunk("d", (4,)))
        assert caught.value.failure.code == "RESUMED_ELSEWHERE"


async def lose(world: World, request: GenerateRequest) -> None:
    """B serves and dies after three tokens, and the entry node with it."""
    await ask(world.a, request, only=3)
    world.net.down.add(B)
    world.net.cut(B)
    world.presences[B] = world.presence(online=False)


async def test_when_the_serving_node_died_too_it_goes_on_behind_the_text(world: World) -> None:
    """As when the node that the client talks to serves as well, which is the usual case."""

    def writes_behind(request: GenerateRequest) -> list[Event | Exception]:
        assert request.said in ("", "abc")
        if not request.said:
            return writes_on(request)
        assert request.said_tokens == 3
        return [*TEXT[3 + len(request.resume) :], Finished("stop", eval_count=2)]

    for node in (world.b, world.c):
        node.engine.script_for = writes_behind
    await lose(world, NAMED)
    relay, events = await ask(world.c, resume=Resume(3, "abc"))
    assert text_of(events) == "def"
    assert relay.node_id == C
    end = end_of(events)
    assert (end.eval_count, end.failovers) == (3 + 2, ())
    [again] = world.c.engine.requests
    assert isinstance(again, GenerateRequest)
    assert (again.said, again.said_tokens, again.resume) == ("abc", 3, ())
    # And once more, from further on; nothing is kept of which nobody knows the tokens.
    assert len(world.c.dispatcher._keeper._transcripts) == 0
    assert text_of((await ask(world.c, resume=Resume(3, "abc")))[1]) == "def"


async def test_what_goes_on_behind_a_text_can_be_lost_once_more(world: World) -> None:
    def dies_at_five(request: GenerateRequest) -> list[Event | Exception]:
        rest = list(TEXT[request.said_tokens + len(request.resume) :])
        if request.resume:
            assert (request.said, request.resume) == ("abc", (4, 5))
            return [*rest, Finished("stop", eval_count=len(rest))]
        return [*rest[:2], Failed("RUNNER_DIED", "killed", 503)]

    for node in (world.b, world.c):
        node.engine.script_for = dies_at_five
    _, events = await ask(world.a, resume=Resume(3, "abc"))
    assert text_of(events) == "def"
    end = end_of(events)
    assert end.eval_count == 6
    assert (end.failovers[0].mode, end.failovers[0].after_tokens) == ("continue", 5)


@pytest.mark.parametrize("mode", ["replay", "off"])
async def test_a_replay_is_made_again_with_the_same_seed(world: World, mode: str) -> None:
    request = msgspec.structs.replace(NAMED, failover=mode)
    await lose(world, request)
    relay, events = await ask(world.c, request, resume=Resume(3, "abc"))
    assert text_of(events) == "def"
    assert relay.node_id == C
    first, again = world.b.engine.requests[0], world.c.engine.requests[0]
    assert isinstance(first, GenerateRequest)
    assert isinstance(again, GenerateRequest)
    assert first.default_seed == again.default_seed >= 0
    assert again.resume == ()


async def test_without_the_text_it_is_counted(world: World) -> None:
    await ask(world.a, only=3)
    world.hold(C)
    assert text_of((await ask(world.a, resume=Resume(3)))[1]) == "def"
    world.c.dispatcher._keeper._transcripts._kept.clear()
    world.c.engine.script_for = lambda request: [Chunk("abcd", (1, 2, 3, 4)), Finished("stop")]
    _, events = await ask(world.a, resume=Resume(3))
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "RESUME_MISMATCH"


async def test_what_is_made_again_and_differs_ends_with_an_error(world: World) -> None:
    world.hold(C)
    replayed = msgspec.structs.replace(NAMED, failover="replay")
    _, events = await ask(world.a, replayed, resume=Resume(3, "xyz"))
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "REPLAY_DIVERGED"


async def test_an_answer_that_moved_before_is_known_whole_where_it_went(world: World) -> None:
    """B died at two tokens, C went on; then the entry died, too."""
    world.hold(B, C)
    world.b.engine.hang_after = 2
    world.c.engine.hang_after = 2
    async with world.a.dispatcher.generate(NAMED, ADA) as relay:
        events = [await relay.receive() for _ in range(2)]
        world.net.down.add(B)
        world.net.cut(B)
        events += [await relay.receive() for _ in range(2)]
        assert relay.node_id == C
    assert text_of(events) == "abcd"
    world.presences[B] = world.presence(online=False)
    world.c.engine.hang_after = None
    assert text_of((await ask(world.c, resume=Resume(4)))[1]) == "ef"
    assert text_of((await ask(world.c, resume=Resume(0)))[1]) == "abcdef"


async def test_who_goes_on_does_not_wait_again(world: World) -> None:
    world.b.engine.hang_after = 3
    await ask(world.a, only=3)
    world.hold(B)
    world.load(B, busy=99)
    world.b.engine.hang_after = None
    with trio.fail_after(1):
        assert text_of((await ask(world.c, resume=Resume(3)))[1]) == "def"


async def test_a_name_belongs_to_one_request_of_one_identity(world: World) -> None:
    await ask(world.a)
    other = msgspec.structs.replace(NAMED, prompt="another")
    assert (await refusal(world.c, other)).code == "REQUEST_ID_TAKEN"
    assert (await refusal(world.c, other)).status == 409


async def test_nobody_takes_the_name_or_the_answer_of_another(world: World) -> None:
    """Names show in the queue's status, so others may know them."""
    world.b.engine.hang_after = 2
    async with world.a.dispatcher.generate(NAMED, ADA) as relay:
        first = [await relay.receive() for _ in range(2)]
        world.b.engine.hang_after = None
        assert text_of((await ask(world.c, asker=Asker("bob")))[1]) == "abcdef"
        assert len(world.b.engine.requests) == 2, "it is made anew"
        assert not any(t.is_taken for t in world.b.dispatcher._keeper._transcripts._kept.values())
    _, events = await ask(world.c, resume=Resume(2))
    assert text_of(first) + text_of(events) == "abcdef"


async def test_after_a_minute_it_is_forgotten(world: World, autojump_clock: MockClock) -> None:
    await ask(world.a)
    await trio.sleep(KEPT_S + 1)
    await ask(world.c)
    assert len(world.b.engine.requests) + len(world.c.engine.requests) == 2


async def test_where_no_part_ends_nothing_is_told(world: World) -> None:
    world.b.engine.script_for = lambda request: [Chunk("abc", (1, 2, 3)), Finished("stop")]
    await ask(world.a)
    assert (await refusal(world.c, resume=Resume(2))).code == "RESUME_MISMATCH"


@pytest.mark.parametrize("received", ["abcd", None])
async def test_who_has_more_than_was_made_again_goes_on_from_there(
    world: World, received: str | None
) -> None:
    """A node was lost after four tokens, and the entry when the next one had repeated two."""
    replayed = msgspec.structs.replace(NAMED, failover="replay")
    world.b.engine.hang_after = 2
    await ask(world.a, replayed, only=2)
    world.b.engine.hang_after = None
    assert text_of((await ask(world.c, replayed, resume=Resume(4, received)))[1]) == "ef"
    failure = await refusal(world.a, replayed, resume=Resume(7))
    assert failure.code == "RESUME_MISMATCH", "nobody has more than a whole answer"


async def test_a_node_that_does_not_answer_is_not_waited_for_long(
    world: World, autojump_clock: MockClock
) -> None:
    await ask(world.a, only=2)

    async def hang(peer: object, request: bytes, stream: object) -> None:
        await trio.sleep_forever()

    world.net.meshes[B].handle("infer.transcript", hang)
    begun = trio.current_time()
    replayed = msgspec.structs.replace(NAMED, failover="replay")
    assert text_of((await ask(world.c, replayed, resume=Resume(2, "ab")))[1]) == "cdef"
    assert trio.current_time() - begun < 2


async def test_requests_without_a_name_are_not_kept(world: World) -> None:
    await ask(world.a, msgspec.structs.replace(NAMED, request_id=""))
    assert len(world.b.dispatcher._keeper._transcripts) == 0
