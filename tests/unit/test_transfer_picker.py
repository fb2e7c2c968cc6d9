"""Which piece is asked of whom: rarest first, random first, windows, end game, back-off."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.core.piece_picker import (
    BAN_S,
    END_GAME_BYTES,
    END_GAME_WAIT_S,
    FIRST_BACK_OFF_S,
    IDLE_S,
    MAX_BACK_OFF_S,
    MAX_WINDOW,
    MIN_WINDOW,
    SLOW_S,
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


def test_one_holder_alone_is_asked_in_order() -> None:
    """So the whole is hashed while it comes, and not all of it at the end."""
    plan = picker(6, have=0b1001, start=3)
    plan.joined(A, 0b111111, 0)
    assert [plan.pick(A, 0), plan.pick(A, 0)] == [1, 2]
    plan.joined(B, 0b111111, 0)
    assert plan.pick(B, 0) == 4  # at random again


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


def test_what_arrived_is_not_asked_for_again() -> None:
    plan = picker(2)
    plan.joined(A, 0b11, 0)
    assert plan.pick(A, 0) == 0
    plan.arrived(A, 0, MIB, 1)
    assert not plan.is_done
    assert plan.pick(A, 2) == 1
    plan.arrived(A, 1, MIB, 3)
    assert plan.is_done
    assert plan.pick(A, 3) is None


def test_a_piece_whose_hash_is_not_known_is_not_asked_for() -> None:
    plan = PiecePicker(3, MIB, 0, lambda n: 0, known=0b001)
    plan.joined(A, 0b111, 0)
    assert [plan.pick(A, 0), plan.pick(A, 0)] == [0, None]
    plan.learned(0b110, 0b010)  # and one of them was here from an earlier run
    assert [plan.pick(A, 0), plan.pick(A, 0)] == [2, None]


def test_the_end_game_asks_an_idle_holder_for_what_another_was_asked_last() -> None:
    plan = picker(2)
    plan.joined(A, 0b11, 0)
    assert [plan.pick(A, 0.0), plan.pick(A, 1.0)] == [0, 1]
    plan.joined(B, 0b11, 2)
    plan.joined(C, 0b11, 2)
    soon = 1 + END_GAME_WAIT_S
    assert plan.pick(B, soon) == 1
    assert plan.pick(B, soon) is None  # one at a time
    assert plan.pick(C, soon) == 0  # at most two copies of a piece
    plan.arrived(B, 1, MIB, 3)
    plan.arrived(A, 1, MIB, 3)  # it came twice
    assert plan.asked_of(0) == [A, C]


def test_there_is_no_end_game_while_a_piece_was_asked_of_nobody() -> None:
    """Its place on the link belongs to that piece, even if no holder of it is here yet."""
    plan = picker(3)
    plan.joined(A, 0b011, 0)
    assert {plan.pick(A, 0), plan.pick(A, 0)} == {0, 1}
    plan.joined(B, 0b011, 0)
    assert plan.pick(B, 100) is None
    plan.joined(C, 0b100, 100)
    assert plan.pick(C, 100) == 2
    assert plan.pick(B, 100) is not None


def test_a_piece_that_was_just_asked_for_is_waited_for() -> None:
    plan = picker(1)
    plan.joined(A, 1, 0)
    plan.joined(B, 1, 0)
    plan.pick(A, 0)
    assert plan.pick(B, END_GAME_WAIT_S * 0.9) is None
    assert plan.pick(B, END_GAME_WAIT_S) == 0


def test_second_copies_are_bounded_in_memory() -> None:
    plan = PiecePicker(4, END_GAME_BYTES // 2, 0, lambda n: 0)
    plan.joined(A, 0b1111, 0)
    for holder in (A, B, C, NodeId("D"), NodeId("E")):
        plan.joined(holder, 0b1111, 0)
    assert [plan.pick(A, 0), plan.pick(A, 0)] == [0, 1]
    assert [plan.pick(B, 0), plan.pick(B, 0)] == [2, 3]
    copies = [plan.pick(holder, 10) for holder in (C, NodeId("D"), NodeId("E"))]
    assert [copy is None for copy in copies] == [False, False, True]


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
    plan.heard_of(A, 1000, 110)
    assert not plan.is_stalled(A, 100 + STALL_S)
    assert plan.is_stalled(A, 110 + STALL_S)


def test_a_holder_with_nothing_to_offer_is_idle_after_a_while() -> None:
    plan = picker(2)
    plan.joined(A, 0, 0)
    assert not plan.is_idle(A, IDLE_S - 1)
    assert plan.is_idle(A, IDLE_S)
    plan.gained(A, 1, IDLE_S)
    assert not plan.is_idle(A, IDLE_S + 1)


def rates(plan: PiecePicker, seconds: int, shares: dict[NodeId, int]) -> None:
    """Holders send so many pieces a second; those of a window are asked for again and again."""
    for second in range(seconds):
        for holder, share in shares.items():
            for part in range(share):
                now = second + part / share
                index = plan.pick(holder, now)
                assert index is not None
                plan.heard_of(holder, MIB, now)
                plan.arrived(holder, index, MIB, now + 0.5 / share)


def test_a_holder_that_is_far_slower_than_others_is_left_if_they_have_what_it_owes() -> None:
    plan = picker(2000)
    for holder in (A, B):
        plan.joined(holder, (1 << 2000) - 1, 0)
    plan.pick(B, 0)
    rates(plan, 12, {A: 50})
    plan.heard_of(B, MIB, 11)  # it sends, but little
    assert not plan.is_slow(B, SLOW_S - 1)
    assert plan.is_slow(B, 12)
    assert not plan.is_slow(B, 13)  # measured anew
    assert not plan.is_slow(A, 12)


def test_a_slow_holder_is_kept_if_nobody_else_has_its_piece_or_is_much_faster() -> None:
    for held, share, kept in ((1 << 1999, 50, True), (0, 1, True), (0, 50, False)):
        plan = picker(2000, start=1999)
        plan.joined(A, ((1 << 2000) - 1) & ~held, 0)
        plan.joined(B, (1 << 2000) - 1, 0)
        assert plan.pick(B, 0) == 1999
        rates(plan, 12, {A: share})
        plan.heard_of(B, MIB, 11)
        assert plan.is_slow(B, 12) != kept


def test_the_window_covers_what_comes_in_a_quarter_of_a_second() -> None:
    for rate, expected in ((1, 2), (20, 6), (40, 11), (1000, MAX_WINDOW)):
        window = RequestWindow(MIB)
        window.asked(0)
        for count in range(1, 50):
            window.piece_arrived(MIB, count / rate)
        assert window.size in (expected, expected - 1), rate
        assert window.rate == pytest.approx(rate * MIB)


def test_the_window_finds_the_bandwidth_delay_product_of_a_long_link() -> None:
    """20 ms there and back, 100 pieces a second: two at a time would be enough, one not."""
    window, delay, spacing = RequestWindow(MIB), 0.08, 0.01
    due: list[float] = []
    now = 0.0
    window.asked(now)
    for _ in range(300):
        while len(due) < window.size:
            due.append(max(now + delay, due[-1] + spacing if due else 0.0))
        now = due.pop(0)
        window.piece_arrived(MIB, now)
    assert window.size >= delay / spacing + 1
    assert window.rate == pytest.approx(MIB / spacing, rel=0.05)


def test_a_window_follows_a_holder_that_becomes_slow() -> None:
    window = RequestWindow(MIB)
    window.asked(0)
    for count in range(1, 100):
        window.piece_arrived(MIB, count / 100)
    assert window.size > 20
    for count in range(10):
        window.piece_arrived(MIB, 2.0 + count)
    assert window.size == MIN_WINDOW


def test_a_pause_in_which_nothing_was_owed_does_not_count() -> None:
    window = RequestWindow(MIB)
    window.asked(0)
    window.piece_arrived(MIB, 0.01)
    window.asked(100)
    window.piece_arrived(MIB, 100.01)
    assert window.rate == pytest.approx(100 * MIB)


@pytest.mark.parametrize(("piece_size", "limit"), [(MIB, MAX_WINDOW), (16 * MIB, 4), (64 * MIB, 2)])
def test_the_window_is_bounded(piece_size: int, limit: int) -> None:
    window = RequestWindow(piece_size)
    window.asked(0)
    for count in range(1, 1000):
        window.piece_arrived(piece_size, count * 1e-5)
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
            if rng.random() < 0.2:
                plan.ended(holder, index)
            else:
                plan.arrived(holder, index, MIB, step)
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
