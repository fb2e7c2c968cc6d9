"""Who asks at which entry node, and what follows for each: tables, and what beats may say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.admission import FairQueue, Ticket
from ollamad.core.ids import NodeId
from ollamad.core.shares import (
    MAX_REMEMBERED,
    MAX_TOLD_NAMES,
    NOBODY,
    Asking,
    Ledger,
    Shares,
    may_begin,
    name_of,
)
from ollamad.wire.codec import decode, encode

MODEL, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
B, C = NodeId("B"), NodeId("C")


def ledger(*identities: str, digest: str = MODEL) -> Ledger:
    """A node where these ask, each as often as it is named."""
    made = Ledger(FairQueue())
    for identity in identities:
        made.begin(identity, digest)
    return made


def pay(one: Ledger, identity: str, tokens: float) -> None:
    """A request of that identity is served and took so much."""
    ticket = Ticket(identity, MODEL, tokens)
    one._queue.start(ticket)
    one._queue.settle(ticket, tokens, 1)


@pytest.mark.parametrize(
    ("here", "there", "part"),
    [
        ("x", "y", 1 / 2),
        ("xxxxx", "y", 1 / 2),  # requests do not count, who asks does
        ("x", "yz", 1 / 3),
        ("xw", "y", 2 / 3),
        ("x", "xy", 1 / 4),  # x counts once, half here and half there
        ("x", "x", 1 / 2),
        ("", "y", 0.0),
        ("x", "", None),
    ],
)
def test_the_parts_of_two_entry_nodes(here: str, there: str, part: float | None) -> None:
    one, other = ledger(*here), ledger(*there)
    one.hear(B, other.told())
    assert one.part(MODEL) == (None if part is None else pytest.approx(part))
    assert one.part(OTHER) is None, "nobody asks for that"


@given(st.lists(st.text("vwxyz", max_size=5), min_size=2, max_size=4))
def test_all_parts_together_are_the_whole(asking: list[str]) -> None:
    nodes = [ledger(*identities) for identities in asking]
    told = [node.told() for node in nodes]
    for place, node in enumerate(nodes):
        for number, shares in enumerate(told):
            if number != place:
                node.hear(NodeId(str(number)), shares)
    if sum(map(bool, asking)) > 1:
        assert sum(node.part(MODEL) or 0.0 for node in nodes) == pytest.approx(1.0)


def test_who_is_gone_has_no_part() -> None:
    one, other = ledger("x"), ledger("y")
    one.hear(B, other.told())
    one.hear(C, other.told())
    assert one.part(MODEL) == pytest.approx(1 / 2)
    other.end("y", MODEL)
    one.hear(C, other.told())
    one.keep_only(lambda: [C])
    assert one.part(MODEL) is None
    one.end("x", MODEL)
    assert one.told().models == ()


def test_what_was_got_elsewhere_is_charged_here() -> None:
    one, other = ledger("x", "y"), ledger("x", "z")
    pay(one, "y", 0)
    one.hear(B, other.told())
    pay(other, "x", 300)
    pay(other, "z", 500)
    for _ in range(2):  # a beat that comes twice tells nothing new
        one.hear(B, other.told())
    assert one._queue.counter("x") == 300
    assert one._queue.counter("y") == 0
    assert one._queue.got("x") == 0, "it is not told again as got here"
    other.end("x", MODEL)  # it was served between two beats
    pay(other, "x", 10)
    one.hear(B, other.told())
    assert one._queue.counter("x") == 310


def test_a_node_that_begins_anew_charges_nobody_twice() -> None:
    one, other = ledger("x"), ledger("x")
    pay(other, "x", 300)
    one.hear(B, other.told())
    assert one._queue.counter("x") == 0, "what was before nobody knows"
    again = ledger("x")
    pay(again, "x", 100)
    one.hear(B, again.told())
    assert one._queue.counter("x") == 0
    pay(again, "x", 50)
    one.hear(B, again.told())
    assert one._queue.counter("x") == 50


def test_many_are_told_by_number() -> None:
    many = ledger(*(f"person {n}" for n in range(3 * MAX_TOLD_NAMES)))
    told = many.told()
    assert len(told.list_names()) == MAX_TOLD_NAMES
    assert len(encode(told)) < 420
    one = ledger("x")
    one.hear(B, decode(encode(told), Shares))
    assert one.part(MODEL) == pytest.approx(1 / (3 * MAX_TOLD_NAMES + 1))


def test_what_is_remembered_is_bounded() -> None:
    one = ledger("x")
    for number in range(2 * MAX_REMEMBERED):
        other = ledger(f"person {number}")
        one.hear(B, other.told())
        one.begin(f"{number}", MODEL)
        one.end(f"{number}", MODEL)
    one.begin("x", MODEL)
    assert len(one._others[B].got) == MAX_REMEMBERED
    assert len(one._names) <= MAX_REMEMBERED
    assert "x" in one._names, "it still asks"


@given(
    st.binary(max_size=200),
    st.lists(st.integers(), max_size=40),
    st.lists(st.tuples(st.just("aaaaaaaaaaaa"), st.integers(0, 2**64), st.integers()), max_size=12),
)
def test_whatever_a_beat_says_a_part_is_a_part(
    names: bytes, got: list[int], models: list[tuple[str, int, int]]
) -> None:
    one = ledger("x")
    for _ in range(2):
        one.hear(B, Shares(names, tuple(got), tuple(Asking(*told) for told in models)))
        part = one.part(MODEL)
        assert part is None or 0 < part <= 1
    assert one._queue.counter("x") == 0


def test_nobody_takes_no_room() -> None:
    assert ledger().told() is NOBODY
    one = ledger()
    one.hear(B, NOBODY)
    assert not one._others


def test_names_are_the_same_on_all_nodes() -> None:
    assert name_of("ada") == 0x17E8E7CA


@pytest.mark.parametrize(
    ("room", "running", "part", "begins", "with_rest"),
    [
        (1, 9, None, True, True),  # nobody else asks
        (0, 0, None, False, False),
        (0, 1, 0.5, True, True),  # of four slots two are ours, whoever has them now
        (0, 2, 0.5, False, False),
        (5, 2, 0.5, False, True),  # what others may still want is taken after a while
        (5, 1, 0.4, True, True),
        (5, 2, 0.4, False, True),
        (0, 0, 0.01, True, True),  # one at least
    ],
)
def test_whose_turn_a_slot_is(
    room: int, running: int, part: float | None, begins: bool, with_rest: bool
) -> None:
    assert may_begin(room, 4, running, part) is begins
    assert may_begin(room, 4, running, part, takes_rest=True) is with_rest
