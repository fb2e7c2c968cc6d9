"""Chunks carry exactly the tokens of their text, whatever llama.cpp's stream leaves out."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.inference import Chunk, Likelihood
from ollamad.engine.assembly import Assembler, Gap, Piece
from ollamad.engine.llama_client import CompletionEvent

EOG = 2


def event(content: str, token: int, count: int) -> CompletionEvent:
    return CompletionEvent(content=content, tokens=[token], tokens_predicted=count)


def assemble(events: list[CompletionEvent], stop_type: str) -> tuple[list[Piece], list[int]]:
    assembler = Assembler()
    pieces = [piece for item in events for piece in assembler.feed(item)]
    last, kept = assembler.finish(stop_type)
    return pieces + last, kept


def test_plain_tokens_pass_at_once():
    assembler = Assembler()
    assert assembler.feed(event("Hello", 10, 1)) == [Chunk("Hello", (10,))]
    assert assembler.feed(event(" you", 11, 2)) == [Chunk(" you", (11,))]
    assert assembler.finish("limit") == ([], [])


def test_an_end_of_generation_token_is_left_out():
    pieces, kept = assemble([event("a", 10, 1), event("", EOG, 2)], "eos")
    assert pieces == [Chunk("a", (10,))]
    assert kept == []


def test_tokens_held_for_a_stop_string_join_the_text_that_they_made():
    events = [event("", 10, 1), event("", 11, 2), event("11 x", 12, 3), event("y", 13, 4)]
    assert assemble(events, "limit")[0] == [Chunk("11 x", (10, 11, 12)), Chunk("y", (13,))]


def test_text_that_the_end_of_generation_lets_go_does_not_carry_its_id():
    events = [event("a", 10, 1), event("", 11, 2), event("1", EOG, 3)]
    assert assemble(events, "eos") == ([Chunk("a", (10,)), Chunk("1", (11,))], [])


def test_the_tokens_of_a_stop_string_are_not_told():
    events = [event("a", 10, 1), event("", 11, 2), event("", 12, 3)]
    assert assemble(events, "word") == ([Chunk("a", (10,))], [])


def test_a_limit_inside_a_possible_stop_string_gives_its_tokens_back():
    events = [event("a", 10, 1), event("", 11, 2), event("", 12, 3)]
    assert assemble(events, "limit") == ([Chunk("a", (10,))], [11, 12])


def test_untold_tokens_become_a_gap_at_once():
    assembler = Assembler()
    assert assembler.feed(event("🎉", 30, 3)) == [Gap("🎉", (None, None, 30))]
    assert assembler.feed(event("!", 31, 4)) == [Chunk("!", (31,))]


def test_untold_tokens_after_held_ones_keep_their_places():
    events = [event("", 10, 1), event("1🎉", 30, 4), event("!", 31, 5)]
    assert assemble(events, "limit")[0] == [Gap("1🎉", (10, None, None, 30)), Chunk("!", (31,))]


@pytest.mark.parametrize(
    ("candidate", "fits"),
    [([7, 8, 9], True), ([7, 5, 9], True), ([7, 8, 4], False), ([1, 8, 9], False), ([7, 9], False)],
)
def test_what_fits_a_gap(candidate: list[int], fits: bool):
    assert Gap("x", (7, None, 9)).fits(candidate) is fits


def as_llama_cpp_streams(
    tokens: list[tuple[int, bytes]], stops: list[str], ends: bool
) -> tuple[list[CompletionEvent], str, int]:
    """llama.cpp's `process_token` in short: events, the stop type, tokens that were used."""
    events: list[CompletionEvent] = []
    text = b""
    sent = 0
    encoded = [stop.encode() for stop in stops]
    for count, (token, spelled) in enumerate(tokens, 1):
        text += spelled
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        unsent = text[sent:]
        if any(stop in unsent for stop in encoded):
            return [*events, event("", token, count)], "word", count
        is_end = ends and count == len(tokens)
        partial = any(
            unsent.endswith(stop[:length]) for stop in encoded for length in range(1, len(stop))
        )
        content = "" if partial and not is_end else unsent.decode()
        sent += len(content.encode())
        events.append(event(content, token, count))
    return events, "eos" if ends else "limit", len(tokens)


@st.composite
def spelled_texts(draw: Any) -> list[tuple[int, bytes]]:
    """Tokens with ids of their own that spell a text, cut at any byte."""
    data = draw(st.text("ab1 é😀中", min_size=1, max_size=12)).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=len(data))))
    ends = [*[cut for cut in cuts if cut < len(data)], len(data)]
    parts = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [(100 + index, part) for index, part in enumerate(parts)]


@given(
    spelled_texts(), st.lists(st.text("ab1 ", min_size=1, max_size=3), max_size=2), st.booleans()
)
def test_every_token_is_told_once_in_order_with_its_own_text(
    tokens: list[tuple[int, bytes]], stops: list[str], ends: bool
):
    sequence = [*tokens, (EOG, b"")] if ends else tokens
    events, stop_type, used = as_llama_cpp_streams(sequence, stops, ends)
    pieces, kept = assemble(events, stop_type)
    spelled = dict(tokens)
    position = 0
    for piece in pieces:
        ids = piece.tokens if isinstance(piece, Chunk) else piece.ids
        own = tokens[position : position + len(ids)]
        assert all(told in (None, real) for told, (real, _) in zip(ids, own, strict=True))
        assert b"".join(part for _, part in own).decode() == piece.text
        position += len(ids)
    if stop_type != "word":
        assert kept == [id_ for id_, _ in tokens[position : position + len(kept)]]
        told = b"".join(piece.text.encode() for piece in pieces)
        told += "".join(spelled[id_].decode() for id_ in kept).encode()
        assert b"".join(part for _, part in tokens).startswith(told)
        position += len(kept)
        # Only a character that stayed incomplete may be missing, and what waited behind it.
        assert position == len(tokens) or not is_whole(tokens[position][1])
    else:
        assert used <= len(sequence)


def is_whole(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def likely(text: str, logprob: float = -1.0) -> dict[str, Any]:
    return {
        "bytes": list(text.encode()),
        "logprob": logprob,
        "top_logprobs": [
            {"bytes": list(text.encode()), "logprob": logprob},
            {"bytes": [195], "logprob": -2.0},
        ],
    }


def test_how_likely_tokens_were_comes_with_their_text():
    events: list[dict[str, Any]] = [
        {"content": "a", "tokens": [1], "tokens_predicted": 1, "probs": ["a"]},
        # Held back for a stop string, then told together.
        {"content": "", "tokens": [2], "tokens_predicted": 2, "probs": ["b"]},
        {"content": "bc", "tokens": [3], "tokens_predicted": 3, "probs": ["c"]},
        # Of a token that was not told, nothing is known.
        {"content": "é", "tokens": [5], "tokens_predicted": 5, "probs": ["d"]},
        # The token that ends it.
        {"content": "", "tokens": [9], "tokens_predicted": 6, "probs": ["</s>"]},
    ]
    assembler = Assembler(1)
    pieces = []
    for told in events:
        told["completion_probabilities"] = [likely(text) for text in told.pop("probs")]
        pieces += assembler.feed(msgspec.convert(told, CompletionEvent))
    rest, kept = assembler.finish("eos")
    pieces += rest

    def shown(text: str) -> Likelihood:
        return Likelihood(text.encode(), -1.0, (Likelihood(text.encode(), -1.0),))

    assert [(piece.text, piece.logprobs) for piece in pieces] == [
        ("a", (shown("a"),)),
        ("bc", (shown("b"), shown("c"))),
        ("é", (shown("d"),)),
    ]
    assert kept == []
