"""Which piece is asked of whom: rarest first, random first, windows, end game, back-off."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.core.piece_picker import (
    BAN_S,
    FIRST_BACK_OFF_S,
    IDLE_S,
    MAX_BACK_OFF_S,
    MAX_WINDOW,
    MIN_WINDOW,
    STALL_S,
    HolderBook,
    PiecePicker,
    RequestWindow,
)
from ollamad.core.pieces import MIB

A, B, C = NodeId("A"), NodeId("B"), NodeId("C")


def picker(count: int, have: int = 0, *, start: int = 0) -> PiecePicker:
    return PiecePicker(count, MIB, have, lambda n: start % n)


def test_the_first_piece_is_random_even_if_others_are_rarer() -> None:
    for start in range(4):
        plan = picker(4, start=start)
        plan.joined(A, 0b1111, 0)
        plan.joined(B, 0b1110, 0)  # piece 0 is the rarest
        assert plan.pick(A, 0) == start


def test_then_the_rarest_come_first() -> None:
    plan = picker(4, have=0b1000)
    plan.joined(A, 0b0111, 0)
    plan.joined(B, 0b0101, 0)
    plan.joined(C, 0b0100, 0)
    assert [plan.pick(A, 0), plan.pick(A, 0)] == [1, 0]
    assert plan.pick(B, 0) == 2


def test_availability_follows_gains_and_losses() -> None:
    plan = picker(3, have=0b100)
    plan.joined(A, 0b011, 0)
    plan.joined(B, 0b010, 0)
    plan.joined(C, 0, 0)
    plan.left(B)
    plan.gained(C, 0b001, 0)
    assert plan.pick(A, 0) == 1  # now piece 0 is at two nodes, piece 1 at one


def test_a_piece_is_asked_of_one_holder_while_others_are_missing() -> None:
    plan = picker(4, start=3)
    plan.joined(A, 0b1111, 0)
    plan.joined(B, 0b1111, 0)
    asked = [plan.pick(A, 0), plan.pick(B, 0), plan.pick(A, 0), plan.pick(B, 0)]
    assert sorted(index for index in asked if index is not None) == [0, 1, 2, 3]


def test_a_holder_is_asked_only_for_what_it_has_and_is_missing() -> None:
    plan = picker(4, have=0b0001)
    plan.joined(A, 0b0011, 0)
    assert plan.pick(A, 0) == 1
    assert plan.pick(A, 0) is None


def test_pieces_of_a_lost_holder_are_missing_again() -> None:
    plan = picker(2)
    plan.joined(A, 0b11, 0)
    plan.joined(B, 0b11, 0)
    assert {plan.pick(A, 0), plan.pick(A, 0)} == {0, 1}
    plan.left(A)
    plan.left(A)
    assert {plan.pick(B, 0), plan.pick(B, 0)} == {0, 1}


def test_a_wrong_piece_is_missing_again_and_a_right_one_is_not() -> None:
    plan = picker(2)
    plan.joined(A, 0b11, 0)
    assert plan.pick(A, 0) == 0
    assert plan.received(A, 0, MIB, 1)
    plan.failed(0)
    assert plan.pick(A, 1) == 0
    assert plan.received(A, 0, MIB, 2)
    plan.verified(0)
    assert not plan.is_done
    assert plan.pick(A, 2) == 1
    plan.received(A, 1, MIB, 3)
    plan.verified(1)
    assert plan.is_done
    assert plan.pick(A, 3) is None


def test_the_end_game_asks_an_idle_holder_for_what_another_began_last() -> None:
    plan = picker(2)
    plan.joined(A, 0b11, 0)
    assert [plan.pick(A, 0.0), plan.pick(A, 1.0)] == [0, 1]
    plan.joined(B, 0b11, 2)
    plan.joined(C, 0b11, 2)
    assert plan.pick(B, 2) == 1
    assert plan.pick(B, 2) is None  # one at a time
    assert plan.pick(C, 2) == 0  # at most two copies of a piece
    assert plan.received(B, 1, MIB, 3)
    assert not plan.received(A, 1, MIB, 3)  # it came twice
    plan.verified(1)
    assert plan.asked_of(0) == [A, C]


def test_a_refused_piece_is_asked_elsewhere_and_later_again() -> None:
    plan = picker(1)
    plan.joined(A, 1, 0)
    plan.joined(B, 1, 0)
    assert plan.pick(A, 0) == 0
    plan.ended(A, 0, again_at=5)
    assert plan.pick(A, 4) is None
    assert plan.pick(B, 4) == 0
    plan.left(B)
    assert plan.pick(A, 5) == 0


def test_a_silent_holder_is_stalled_only_while_it_owes_something() -> None:
    plan = picker(1)
    plan.joined(A, 1, 0)
    assert not plan.is_stalled(A, 100)
    plan.pick(A, 100)
    assert not plan.is_stalled(A, 100 + STALL_S - 1)
    plan.heard_of(A, 110)
    assert not plan.is_stalled(A, 100 + STALL_S)
    assert plan.is_stalled(A, 110 + STALL_S)


def test_a_holder_with_nothing_to_offer_is_idle_after_a_while() -> None:
    plan = picker(2)
    plan.joined(A, 0, 0)
    assert not plan.is_idle(A, IDLE_S - 1)
    assert plan.is_idle(A, IDLE_S)
    plan.gained(A, 1, IDLE_S)
    assert not plan.is_idle(A, IDLE_S + 1)


def test_the_window_grows_while_that_makes_it_faster_and_no_further() -> None:
    fast = RequestWindow(MIB)
    now = 0.0
    for _ in range(200):  # the more is asked ahead, the faster it sends, up to 8 pieces
        now += 1 / min(fast.size, 8)
        fast.piece_arrived(MIB, now)
    assert fast.size == 16
    steady = RequestWindow(MIB)
    for second in range(200):
        steady.piece_arrived(MIB, float(second))
    assert steady.size == 2 * MIN_WINDOW


@pytest.mark.parametrize(("piece_size", "limit"), [(MIB, MAX_WINDOW), (16 * MIB, 4), (64 * MIB, 2)])
def test_the_window_is_bounded(piece_size: int, limit: int) -> None:
    window = RequestWindow(piece_size)
    now, step = 0.0, 1.0
    for _ in range(1000):
        step *= 0.9
        now += step
        window.piece_arrived(piece_size, now)
    assert window.size == limit


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**40 - 1), st.integers(0, 2**32))
def test_any_order_of_events_ends_with_every_piece(count: int, have: int, seed: int) -> None:
    """Holders come, go, fail and send, at random; nothing is lost or received for nothing."""
    rng = random.Random(seed)
    plan = PiecePicker(count, MIB, have, rng.randrange)
    asked: dict[NodeId, list[int]] = {}
    everything = (1 << count) - 1
    for step in range(20_000):
        if plan.is_done:
            break
        holder = rng.choice([A, B, C])
        if holder not in asked:
            asked[holder] = []
            plan.joined(holder, rng.getrandbits(count) | rng.getrandbits(count), step)
        elif rng.random() < 0.02:
            del asked[holder]
            plan.left(holder)
        elif asked[holder] and rng.random() < 0.5:
            index = asked[holder].pop(0)
            worth = plan.received(holder, index, MIB, step)
            assert worth != bool(plan.have >> index & 1)
            if worth:
                plan.failed(index) if rng.random() < 0.2 else plan.verified(index)
        elif (index := plan.pick(holder, step)) is not None:  # type: ignore[assignment]
            assert not plan.have >> index & 1
            assert index not in asked[holder]
            asked[holder].append(index)
            assert set(asked[holder]) <= {i for i in range(count) if holder in plan.asked_of(i)}
            assert len(plan.asked_of(index)) <= 2
    assert plan.have == everything


def test_back_off_doubles_up_to_a_limit_and_ends_with_success() -> None:
    book = HolderBook()
    assert book.is_usable(A, 0)
    book.failed(A, "no route", 0)
    assert not book.is_usable(A, FIRST_BACK_OFF_S * 0.9)
    assert book.is_usable(A, FIRST_BACK_OFF_S)
    for _ in range(50):
        book.failed(A, "no route", 10)
    assert not book.is_usable(A, 10 + MAX_BACK_OFF_S * 0.9)
    assert book.is_usable(A, 10 + MAX_BACK_OFF_S)
    assert book.reasons() == {A: "no route"}
    book.succeeded(A)
    book.failed(A, "no route", 20)
    assert book.is_usable(A, 20 + FIRST_BACK_OFF_S)


def test_a_holder_is_left_alone_as_long_as_it_asks() -> None:
    book = HolderBook()
    book.failed(A, "busy", 0, retry_after_s=60)
    assert not book.is_usable(A, 59)
    assert book.is_usable(A, 60)


def test_a_ban_outlasts_failures_and_successes() -> None:
    book = HolderBook()
    book.banned(A, "a wrong piece", 0)
    book.failed(A, "gone", 1)
    book.succeeded(A)
    assert not book.is_usable(A, BAN_S - 1)
    assert book.is_banned(A, BAN_S - 1)
    assert book.reasons() == {A: "a wrong piece"}
    assert book.is_usable(A, BAN_S)
    assert not book.is_banned(A, BAN_S)
