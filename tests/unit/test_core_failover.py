"""What a client has of an answer, and what another node has to add: both ways, every seam."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from ollamad.core.failover import Answer, Mode
from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Failover,
    Finished,
    GenerateRequest,
    Message,
    Thought,
    ToolCall,
)

ASK = GenerateRequest("m", "tell", default_seed=7)
MOVE = Failover("B", "C", "NODE_LOST", "continue", 2, 300)


def feed(answer: Answer, *events: Event) -> list[Event | None]:
    return [answer.take(event) for event in events]


def test_before_anything_was_sent_the_whole_request_is_asked_again() -> None:
    for mode in ("continue", "replay"):
        answer = Answer(ASK, mode)
        assert answer.resume() == ASK
        assert answer.take(Chunk("a", (1,))) == Chunk("a", (1,))


def test_a_continuation_is_given_exactly_the_tokens_that_were_sent() -> None:
    answer = Answer(ASK, "continue")
    feed(answer, Chunk("a", (1,)), Chunk("bc", (2, 3)))
    assert answer.resume().resume == (1, 2, 3)
    feed(answer, Chunk("d", (4,)))
    assert answer.resume().resume == (1, 2, 3, 4)  # lost again


def test_the_counts_of_a_continuation_are_those_of_the_whole_answer() -> None:
    answer = Answer(ASK, "continue")
    feed(answer, Chunk("a", (1,)), Chunk("b", (2,)))
    answer.resume()
    answer.failovers += (MOVE,)
    feed(answer, Chunk("c", (3,)))
    assert answer.take(Finished("stop", eval_count=1)) == Finished(
        "stop", eval_count=3, failovers=(MOVE,)
    )


def test_an_undisturbed_answer_is_passed_as_it_is() -> None:
    answer = Answer(ASK, "continue")
    events = [Chunk("a", (1,)), Thought("hm"), ToolCall("f"), Finished("stop", eval_count=1)]
    assert feed(answer, *events) == events


def test_a_replay_leaves_out_what_was_sent() -> None:
    answer = Answer(ASK, "replay")
    feed(answer, Chunk("Hel", (1,)), Chunk("lo", (2,)))
    assert answer.resume() == ASK
    answer.failovers += (MOVE,)
    assert feed(answer, Chunk("H", (5,)), Chunk("ell", (6,))) == [None, None]
    assert answer.take(Chunk("o wor", (7, 8))) == Chunk(" wor")
    assert answer.take(Chunk("ld", (9,))) == Chunk("ld", (9,))
    end = answer.take(Finished("stop", eval_count=5))
    assert end == Finished("stop", eval_count=5, failovers=(MOVE,))  # it made all of them


def test_a_replay_that_is_lost_begins_again_from_the_start() -> None:
    answer = Answer(ASK, "replay")
    feed(answer, Chunk("abc"))
    answer.resume()
    feed(answer, Chunk("ab"))
    answer.resume()
    assert feed(answer, Chunk("ab"), Chunk("cd")) == [None, Chunk("d")]
    answer.resume()
    assert feed(answer, Chunk("abcde")) == [Chunk("e")]


@pytest.mark.parametrize(
    "again",
    [
        [Chunk("abX")],
        [Chunk("a"), Chunk("X")],
        [Chunk("ab"), Finished("stop")],
        [Chunk("Xabc")],
    ],
)
def test_a_replay_that_says_something_else_ends_with_an_error(again: list[Event]) -> None:
    answer = Answer(ASK, "replay")
    feed(answer, Chunk("abc"))
    answer.resume()
    last = feed(answer, *again)[-1]
    assert isinstance(last, Failed)
    assert last.code == "REPLAY_DIVERGED"


@pytest.mark.parametrize(
    "asked",
    [
        GenerateRequest("m", "tell", format="json"),
        GenerateRequest("m", messages=(Message("user", "x"),), tools="[]"),
        GenerateRequest("m", messages=(Message("user", "x"),), think="on"),
    ],
)
def test_what_is_parsed_is_replayed(asked: GenerateRequest) -> None:
    answer = Answer(asked, "continue")
    feed(answer, Chunk("{", (1,)))
    assert answer.mode == "replay"
    assert answer.resume().resume == ()


@pytest.mark.parametrize("event", [Thought("hm"), ToolCall("f"), Chunk("a")])
def test_what_has_no_token_ids_is_replayed(event: Event) -> None:
    answer = Answer(ASK, "continue")
    assert answer.mode == "continue"
    feed(answer, event)
    assert answer.mode == "replay"


def test_thoughts_and_calls_are_not_sent_twice() -> None:
    answer = Answer(ASK, "continue")
    sent = [Thought("let me"), ToolCall("f", '{"a":1}', "id1")]
    feed(answer, *sent)
    answer.resume()
    again = [Thought("let "), Thought("me see"), ToolCall("f", '{"a":1}', "id2"), ToolCall("g")]
    assert feed(answer, *again) == [None, Thought(" see"), None, ToolCall("g")]


def test_a_replay_without_the_calls_that_were_made_diverged() -> None:
    answer = Answer(ASK, "replay")
    feed(answer, ToolCall("f"))
    answer.resume()
    assert isinstance(answer.take(Finished("stop")), Failed)


@pytest.mark.parametrize("again", [ToolCall("g", "{}"), ToolCall("f", '{"a":2}')])
def test_a_replay_that_calls_otherwise_diverged(again: ToolCall) -> None:
    answer = Answer(ASK, "replay")
    feed(answer, ToolCall("f", "{}"), ToolCall("f", '{"a":1}'))
    answer.resume()
    same, other = feed(answer, ToolCall("f", "{}", "another id"), again)
    assert same is None
    assert isinstance(other, Failed)
    assert other.code == "REPLAY_DIVERGED"


def test_what_has_no_token_ids_is_counted_about() -> None:
    answer = Answer(ASK, "replay")
    feed(answer, Thought("hm"), Chunk("a"), Chunk("bc", (2, 3)), ToolCall("f"))
    assert (answer.token_count, answer.written_count) == (2, 5)
    answer.resume()
    feed(answer, Thought("hm, so"), Chunk("abcd", (1, 2, 3, 4)))
    assert answer.written_count == 7, "only what is new"
    behind = Answer(ASK, "continue")
    behind.have("abc", 2)
    feed(behind, Chunk("d", (4,)))
    assert behind.written_count == 3


def test_behind_a_text_of_unknown_tokens() -> None:
    answer = Answer(ASK, "continue")
    answer.have("abc", 2)
    assert (answer.mode, answer.token_count) == ("continue", 2)
    request = answer.resume()
    assert (request.said, request.said_tokens, request.resume) == ("abc", 2, ())
    assert answer.take(Chunk("d", (4,))) == Chunk("d", (4,))
    again = answer.resume()
    assert (again.said, again.said_tokens, again.resume) == ("abc", 2, (4,))
    end = answer.take(Finished("stop", eval_count=5))
    assert isinstance(end, Finished)
    assert end.eval_count == 8
    with_state = Answer(msgspec.structs.replace(ASK, format="json"), "continue")
    with_state.have("abc", 2)
    assert with_state.resume().said == "", "a grammar's state no text tells"
    assert with_state.take(Chunk("abcd", (1, 2, 3))) == Chunk("d")


def test_off_stays_off() -> None:
    answer = Answer(ASK, "off")
    feed(answer, Chunk("a"))
    assert answer.mode == "off"


@given(
    texts=st.lists(st.text(max_size=4), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    mode=st.sampled_from(["continue", "replay"]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8),
)
def test_whatever_the_seams_the_client_gets_the_text_once(
    texts: list[str], cuts: list[int], mode: Mode, lengths: list[int]
) -> None:
    """Nodes that say the same, cut in any places, and for a replay chunked in any other way."""
    chunks = [Chunk(text, (place,)) for place, text in enumerate(texts)]
    whole = "".join(texts)
    answer = Answer(ASK, mode)
    got: list[Event | None] = []
    request, attempt = ASK, chunks
    for cut in cuts:
        got += feed(answer, *attempt[:cut])
        request = answer.resume()
        answer.failovers += (MOVE,)
        if mode == "replay":
            assert request.resume == ()
            attempt, rest = [], whole
            for length in lengths * (len(whole) + 1):
                attempt.append(Chunk(rest[:length], (0,)))
                rest = rest[length:]
        else:
            attempt = chunks[len(request.resume) :]
    got += feed(answer, *attempt, Finished("stop"))
    assert "".join(event.text for event in got if isinstance(event, Chunk)) == whole
    assert isinstance(got[-1], Finished)
