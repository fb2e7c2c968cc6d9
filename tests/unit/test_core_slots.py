"""Which slot a prompt gets: conversations keep theirs, and none stays empty while two share one."""

import pytest

from ollamad.core.inference import GenerateRequest
from ollamad.core.prefix import Prompt, prompt_of, prompt_of_tokens
from ollamad.core.slots import Slots

SYSTEM = "You are the assistant of a small town. " * 20


def prompt(*texts: str) -> Prompt:
    return prompt_of(GenerateRequest("m", prompt="".join(texts)), "sha256:x")


def said(name: str, turns: int = 1) -> str:
    """A conversation behind the system prompt, as long as that after each turn."""
    return SYSTEM + "".join(f"{name} in turn {turn}. " * 60 for turn in range(turns))


def used(slots: Slots, *held: Prompt) -> list[int]:
    """The slots that these get one after the other."""
    found = []
    for each in held:
        found.append(slots.take(each))
        slots.give_back(found[-1], each)
    return found


def test_conversations_with_one_system_prompt_get_slots_of_their_own() -> None:
    slots = Slots(3)
    names = ["anna", "bert", "carl"]
    assert used(slots, *[prompt(said(name)) for name in names]) == [0, 1, 2]
    # Each goes on with its own, in any order, however long what is added is.
    for turns in (2, 5):
        again = [prompt(said(name, turns)) for name in reversed(names)]
        assert used(slots, *again) == [2, 1, 0]


def test_an_answer_that_is_made_anew_goes_on_with_its_conversation() -> None:
    slots = Slots(2)
    [first] = used(slots, prompt(said("anna", 8), "what it said"))
    assert used(slots, prompt(said("anna", 8))) == [first]


def test_a_prompt_that_is_asked_again_goes_where_it_was_read() -> None:
    """Also if its answer was longer than it, and is named by other means."""
    slots = Slots(2)
    asked = prompt(said("anna"))
    number = slots.take(asked)
    slots.give_back(number, asked, prompt_of_tokens(range(5000), "sha256:x"))
    assert used(slots, asked) == [number]
    number = slots.take(asked)
    slots.give_back(number, asked, prompt_of_tokens(range(5000), "sha256:x"))
    assert used(slots, prompt_of_tokens(range(6000), "sha256:x")) == [number]


def test_a_busy_slot_is_not_given_away() -> None:
    slots = Slots(2)
    first = slots.take(prompt(said("anna")))
    assert slots.take(prompt(said("anna"))) != first
    with pytest.raises(ValueError, match="empty"):
        slots.take(prompt("x"))


def test_without_an_empty_slot_the_longest_unused_conversation_leaves() -> None:
    slots = Slots(3)
    used(slots, *[prompt(said(name, 3)) for name in ("anna", "bert", "carl")])
    used(slots, prompt(said("anna", 4)))
    assert used(slots, prompt(said("dora"))) == [1]  # bert rested longest


def test_what_begins_alike_counts_for_more_than_rest() -> None:
    slots = Slots(2)
    tail = "where is the station? " * 20
    used(slots, prompt("of another kind. " * 400), prompt(SYSTEM, tail))
    # The system prompt's cache saves more than the younger one's little tail may cost.
    assert used(slots, prompt(SYSTEM, "who keeps the tower? " * 20)) == [1]


def test_what_comes_before_a_prompt_runs_where_least_is_lost() -> None:
    slots = Slots(3)
    anna, bert = prompt(said("anna", 2)), prompt(said("bert", 4))
    used(slots, anna, bert)
    own = slots.take(anna)
    assert slots.take_spare(own, anna) == 2, "an empty one"
    # There is none now: the conversation that goes on is shorter than the one that rests.
    assert slots.take_spare(own, anna) == own
    slots.give_back(own, anna)
    own = slots.take(bert)
    assert slots.take_spare(own, bert) == 0
    slots.give_back(0)
    assert used(slots, prompt(said("carl"))) == [0], "nothing is held there any more"


def test_what_the_prompt_loses_anyway_is_not_lost_by_what_comes_before() -> None:
    slots = Slots(2)
    used(slots, prompt(said("anna")), prompt(said("bert")))
    other = prompt("of another kind. " * 40)
    own = slots.take(other)
    assert slots.take_spare(own, other) == own


def test_a_slot_that_was_left_is_no_spare_one() -> None:
    slots = Slots(2)
    anna = prompt(said("anna"))
    used(slots, anna)
    left = slots.take(prompt("x"))
    slots.give_back(left, prompt("x"), left=True)
    assert slots.was_left(left)
    own = slots.take(anna)
    assert slots.take_spare(own, anna) == own
    # Who takes it knows; behind an answer that ended it is as any other.
    assert slots.take(prompt("x")) == left
    assert slots.was_left(left)
    slots.give_back(left, prompt("x"))
    assert not slots.was_left(left)


def test_short_prompts_leave_the_other_slots_empty() -> None:
    slots = Slots(2)
    assert used(slots, prompt("hi"), prompt("hello"), prompt("why")) == [0, 0, 0]
