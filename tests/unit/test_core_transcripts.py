"""Answers that are kept for a client whose entry node died."""

import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Likelihood,
    Options,
    Thought,
    ToolCall,
)
from ollamad.core.transcripts import (
    KEPT_S,
    MAX_BYTES,
    MAX_TRANSCRIPTS,
    Resume,
    Transcripts,
    fingerprint_of,
    seed_of,
    size_of,
)

ASK = GenerateRequest("m", "hello", request_id="r1", fingerprint="f")
EVENTS: list[Event] = [Chunk("a", (1,)), Chunk("bc", (2, 3)), Chunk("d", (4,)), Finished("stop")]


def named(number: int) -> GenerateRequest:
    return msgspec.structs.replace(ASK, request_id=f"r{number}")


def test_what_was_said_is_kept_for_a_minute_after_its_end() -> None:
    kept = Transcripts()
    transcript = kept.begin(ASK, 0.0)
    for event in EVENTS:
        kept.add(transcript, event)
    assert kept.find("r1", "f", 500.0) is transcript, "it still runs"
    kept.end(transcript, 500.0)
    found = kept.find("r1", "f", 500.0 + KEPT_S)
    assert found is transcript
    assert found.events == EVENTS
    assert kept.find("r1", "f", 500.1 + KEPT_S) is None
    assert kept._size == 0


def test_an_answer_that_is_made_again_ends_the_one_before_and_costs_no_room() -> None:
    kept = Transcripts()
    before = kept.begin(ASK, 0.0)
    kept.add(before, EVENTS[0])
    again = kept.begin(ASK, 1.0)
    assert before.is_taken
    assert not again.is_taken
    assert kept.find("r1", "f", 1.0) is again
    kept.end(before, 2.0)
    kept.end(again, 2.0)
    kept.find("r1", "f", 3.0 + KEPT_S)
    assert (len(kept), kept._size) == (0, 0)


def test_names_are_each_users_own() -> None:
    kept = Transcripts()
    ada, bob = [
        msgspec.structs.replace(ASK, fingerprint=fingerprint_of(ASK, who)) for who in ("ada", "bob")
    ]
    of_ada, of_bob = kept.begin(ada, 0.0), kept.begin(bob, 0.0)
    assert kept.find("r1", ada.fingerprint, 1.0) is of_ada
    assert kept.find("r1", bob.fingerprint, 1.0) is of_bob
    assert not of_ada.is_taken
    other = msgspec.structs.replace(ASK, prompt="another")
    assert kept.find("r1", fingerprint_of(other, "ada"), 1.0) is of_ada, "to be told apart"
    assert ada.fingerprint != fingerprint_of(other, "ada")


def test_a_failure_is_no_part_of_it() -> None:
    kept = Transcripts()
    transcript = kept.begin(ASK, 0.0)
    kept.add(transcript, EVENTS[0])
    kept.add(transcript, Failed("NODE_LOST", "gone"))
    assert transcript.events == EVENTS[:1]


def test_an_answer_that_goes_on_here_begins_with_what_was_said_elsewhere() -> None:
    kept = Transcripts()
    request = msgspec.structs.replace(ASK, resume=(1, 2, 3), resumed_text="abc")
    transcript = kept.begin(request, 0.0)
    kept.add(transcript, EVENTS[2])
    assert transcript.events == [Chunk("abc", (1, 2, 3)), EVENTS[2]]


def test_the_oldest_that_ended_give_way() -> None:
    kept = Transcripts()
    running = kept.begin(named(0), 0.0)
    for number in range(1, MAX_TRANSCRIPTS + 50):
        kept.end(kept.begin(named(number), 0.0), 0.0)
    assert len(kept) <= MAX_TRANSCRIPTS + 1
    assert kept.find("r0", "f", 0.0) is running
    assert kept.find("r1", "f", 0.0) is None
    assert kept.find(f"r{MAX_TRANSCRIPTS + 49}", "f", 0.0) is not None


def test_long_answers_give_way_by_their_size() -> None:
    kept = Transcripts()
    text = "x" * (MAX_BYTES // 10)
    for number in range(30):
        transcript = kept.begin(named(number), 0.0)
        kept.add(transcript, Chunk(text, (1,)))
        kept.end(transcript, 0.0)
    assert kept._size <= MAX_BYTES


def likely(others: int) -> Likelihood:
    return Likelihood(b"x" * 7, -1.0, tuple(Likelihood(b" the", -2.0) for _ in range(others)))


LARGE: dict[str, Callable[[int], Event]] = {
    "a short chunk": lambda n: Chunk(f" {n}", (1000 + n,)),
    "token ids": lambda n: Chunk("a", tuple(range(300, 1300))),
    "other letters": lambda n: Chunk("\u6c49" * (500 + n % 9), (1000 + n,)),
    "likelihoods": lambda n: Chunk("a", (1000 + n,), (likely(20),)),
    "a thought": lambda n: Thought("x" * (500 + n % 9)),
    "a call": lambda n: ToolCall("f", "x" * (500 + n % 9), f"call_{n}"),
    "a context": lambda n: Finished("stop", context=tuple(range(300, 4096))),
}


@pytest.mark.parametrize("kind", LARGE)
def test_all_of_what_is_kept_is_counted(kind: str) -> None:
    kept = Transcripts()
    transcript = kept.begin(ASK, 0.0)
    count = (1 << 20) // size_of(LARGE[kind](0))  # so many that what else is going on is little
    written = [msgspec.msgpack.encode(LARGE[kind](number)) for number in range(count)]
    decoder = msgspec.msgpack.Decoder(Event)
    tracemalloc.start()
    try:
        for data in written:  # as events come, with nothing in common
            kept.add(transcript, decoder.decode(data))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.9 * taken <= kept._size <= 1.7 * taken


def test_answers_that_run_are_bounded_too() -> None:
    kept = Transcripts()
    long, short = kept.begin(named(1), 0.0), kept.begin(named(2), 0.0)
    ended = kept.begin(named(3), 0.0)
    kept.add(ended, EVENTS[0])
    kept.end(ended, 0.0)
    kept.add(short, EVENTS[0])
    for _ in range(20):
        kept.add(long, Thought("x" * (MAX_BYTES // 10)))
        assert kept._size <= MAX_BYTES
    assert kept.find("r3", "f", 0.0) is None, "what has ended goes first"
    assert kept.find("r1", "f", 0.0) is None, "the one that takes the room"
    assert kept.find("r2", "f", 0.0) is short
    assert not long.is_taken, "it goes on, but it cannot be told again"
    assert long.events == []
    kept.end(long, 0.0)
    kept.end(short, 0.0)
    kept.find("", "", 1.0 + KEPT_S)
    assert (len(kept), kept._size) == (0, 0)


def test_a_request_is_the_same_whatever_node_it_comes_through() -> None:
    same = msgspec.structs.replace(
        ASK, failover="replay", resume=(1,), resumed_text="a", keep_alive_s=5.0, default_seed=9
    )
    assert fingerprint_of(same, "ada") == fingerprint_of(ASK, "ada")
    assert fingerprint_of(ASK, "bob") != fingerprint_of(ASK, "ada")
    for other in (
        msgspec.structs.replace(ASK, prompt="other"),
        msgspec.structs.replace(ASK, options=Options(seed=1)),
        msgspec.structs.replace(ASK, digest="sha256:other"),
    ):
        assert fingerprint_of(other, "ada") != fingerprint_of(ASK, "ada")


def test_seeds_follow_from_the_name() -> None:
    assert seed_of("r1") == seed_of("r1") != seed_of("r2")
    assert 0 <= seed_of("r1") < 1 << 31


@pytest.mark.parametrize(("position", "known"), [(0, 0), (1, 1), (3, 2), (4, 3)])
def test_where_a_client_stands(position: int, known: int) -> None:
    assert Resume(position).known(EVENTS) == known


@pytest.mark.parametrize(
    ("position", "events"),
    [(2, EVENTS), (9, EVENTS), (1, [Thought("hm"), *EVENTS])],
)
def test_where_no_client_can_stand(position: int, events: list[Event]) -> None:
    with pytest.raises(InferenceError) as caught:
        Resume(position).known(events)
    assert (caught.value.failure.code, caught.value.failure.status) == ("RESUME_MISMATCH", 409)
