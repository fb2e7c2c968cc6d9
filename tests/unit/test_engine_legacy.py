"""The parts of ctransformers' server that need no library: stop strings, luck, what is refused."""

import argparse
from typing import Any

import msgspec
import pytest

from ollamad.core.inference import Chunk
from ollamad.engine import legacy_runner
from ollamad.engine.assembly import Assembler, Piece
from ollamad.engine.legacy_runner import Completion, Model, Refusal, _mixed, _overlap
from ollamad.engine.llama_client import CompletionEvent


class Spelling(Model):
    """A model of characters that says `text`; what it evaluates is noted."""

    def __init__(self, text: str = "", context_length: int = 32, template: str = "") -> None:
        self.context_length = context_length
        self.chat_template = template
        self._text = text
        self.evaluated: list[int] = []
        self.appended: list[int] = []

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        return [1] * add_special + [ord(character) for character in text]

    def spell(self, token: int) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return token == 0

    def evaluate(self, tokens: Any, progress: Any) -> int:
        self.evaluated = list(tokens)
        progress(len(tokens))
        return 0

    def append(self, token: int, keep: int) -> None:
        self.appended.append(token)

    def sample(self, options: dict[str, Any], seed: int) -> int:
        data = self._text.encode() + b"\0"
        return data[len(self.appended)]


def run(text: str, **question: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    told: list[dict[str, Any]] = []
    completion = Completion(Spelling(text), {"prompt": [1, 2], "stream": True} | question)
    last = completion.events(told.append)
    return [event for event in told if "prompt_progress" not in event], last


@pytest.mark.parametrize(
    ("text", "stop", "overlap"),
    [("abc", "cd", 1), ("abc", "bcd", 2), ("abc", "abc", 0), ("aab", "aabb", 3), ("x", "ab", 0)],
)
def test_how_much_may_be_the_beginning_of_a_stop_string(text: str, stop: str, overlap: int):
    assert _overlap(text, stop) == overlap


def test_text_is_held_back_while_a_stop_string_may_begin():
    told, last = run("ab<>c<s>d", stop=["<s>"])
    assert [event["content"] for event in told] == ["a", "b", "", "<>", "c", "", "", ""]
    assert [event["tokens_predicted"] for event in told] == list(range(1, 9))
    assert (last["stop_type"], last["tokens_evaluated"]) == ("word", 2)


def test_what_was_held_back_comes_with_the_end():
    told, last = run("ab<", stop=["<s>"])
    assert [event["content"] for event in told] == ["a", "b", "", "<"]
    assert told[-1]["tokens"] == [0]  # the end's own token, as llama-server tells it
    assert last["stop_type"] == "eos"


def test_the_earliest_stop_string_counts():
    told, _ = run("abcdef", stop=["de", "cdef", "bc"])
    assert "".join(event["content"] for event in told) == "a"


def test_an_answer_of_no_tokens():
    told, last = run("abc", n_predict=0)
    assert told == []
    assert (last["stop_type"], last["tokens_predicted"]) == ("limit", 0)


def test_a_character_in_pieces_is_told_when_it_is_whole():
    told, _ = run("\u20aca", n_predict=4)
    assert [event["content"] for event in told] == ["", "", "\u20ac", "a"]


class Pieces(Spelling):
    """A model whose tokens are these byte strings; the id behind them ends the answer."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__()
        self._pieces = pieces

    def spell(self, token: int) -> bytes:
        return self._pieces[token]

    def is_end(self, token: int) -> bool:
        return token == len(self._pieces)

    def sample(self, options: dict[str, Any], seed: int) -> int:
        return len(self.appended)


@pytest.mark.parametrize("limit", range(1, 10))
def test_what_is_told_is_the_text_of_exactly_its_tokens(limit: int):
    model = Pieces(b"a<", b"b\xe2", b"\x82\xac", b"c\xe2", b"\x82\xac<", b"s", b"d<", b"<")
    told: list[dict[str, Any]] = []
    question = {"prompt": [1], "stream": True, "stop": ["<s>"], "n_predict": limit}
    last = Completion(model, question).events(told.append)
    assembler, told_text, told_ids = Assembler(), "", list[int]()

    def check(pieces: list[Piece]) -> None:
        nonlocal told_text
        for piece in pieces:
            assert isinstance(piece, Chunk)
            told_text += piece.text
            told_ids.extend(piece.tokens)
            spelled = b"".join(map(model.spell, told_ids)).decode()
            assert told_text == spelled  # wherever the node dies, nothing is lost or said twice

    for event in told:
        if "prompt_progress" not in event:
            check(assembler.feed(msgspec.convert(event, CompletionEvent)))
    pieces, kept = assembler.finish(last["stop_type"])
    check(pieces)
    assert told_ids + kept == list(range(min(limit, 8)))


def test_a_whole_answer_has_what_was_held_back_at_its_limit():
    question = {"prompt": [1], "stop": ["<s>"], "n_predict": 2}
    last = Completion(Pieces(b"a", b"b<"), question).events(lambda _: None)
    assert last["content"] == "ab<"


def test_luck_depends_on_seed_and_position():
    numbers = [_mixed(seed, position) for seed in range(20) for position in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 << 31 for number in numbers)
    assert _mixed(7, 3) == _mixed(7, 3)
    assert _mixed(-1, 0) != _mixed(1, 0)


@pytest.mark.parametrize(
    "question",
    [
        {"grammar": "root ::= x"},
        {"json_schema": {"type": "object"}},
        {"n_probs": 3},
        {"min_p": 0.05},
        {"typical_p": 0.9},
        {"mirostat": 1},
        {"presence_penalty": 0.5},
        {"logit_bias": [[1, 2]]},
    ],
)
def test_what_the_library_lacks_is_refused_by_name(question: dict[str, Any]):
    with pytest.raises(Refusal, match=next(iter(question))):
        run("a", **question)


def test_what_asks_for_nothing_is_not_refused():
    neutral = {name: values[-1] for name, values in legacy_runner.UNSUPPORTED.items()}
    run("a", **neutral)


def test_prompts_that_are_empty_or_too_long():
    with pytest.raises(Refusal, match="empty"):
        run("a", prompt=[])
    with pytest.raises(Refusal) as caught:
        run("a", prompt=[1] * 32)
    error = caught.value.body["error"]
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (32, 32)


def test_chats_become_prompts():
    one = [{"role": "user", "content": "Hi"}]
    two = [{"role": "system", "content": "Be brief."}, *one]
    assert Spelling().render({"messages": one}) == "Hi"
    expected = "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n"
    assert Spelling().render({"messages": two}) == expected
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert Spelling(template=template).render({"messages": one}) == "[user] Hi"
    with pytest.raises(Refusal, match="no tools"):
        Spelling().render({"messages": one, "tools": [{}]})
    with pytest.raises(Refusal, match="no images"):
        Spelling().render({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_a_template_is_foreign_and_may_do_nothing():
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Refusal, match="unsafe"):
        Spelling(template=template).render({"messages": [{"role": "user", "content": "x"}]})


def test_adapters_and_projectors_are_refused_before_anything_is_loaded():
    arguments = argparse.Namespace(adapter=["/a"], projector="")
    with pytest.raises(ValueError, match="no adapters"):
        Model(arguments)
