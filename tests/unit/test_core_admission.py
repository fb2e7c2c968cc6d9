"""The fair queue: shares, priorities, deadlines; with what must hold of any history."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.admission import (
    HIGHEST,
    LIFTED_AFTER_S,
    MAX_IDLE_COUNTERS,
    OUTPUT_WEIGHT,
    USUAL_OUTPUT,
    FairQueue,
    Ticket,
    estimate_s,
    retry_after_s,
)


def always(ticket: Ticket) -> bool:
    return True


def enter(queue: FairQueue, identity: str, now: float = 0.0, **fields: object) -> Ticket:
    ticket = Ticket(identity, "m", 100.0)
    for name, value in fields.items():
        setattr(ticket, name, value)
    queue.enter(ticket, now)
    return ticket


def served(queue: FairQueue, now: float = 0.0, room: Callable[[Ticket], bool] = always) -> str:
    names = ""
    while (ticket := queue.next(now, room)) is not None:
        names += ticket.identity
    return names


def test_first_come_first_served_within_an_identity() -> None:
    queue = FairQueue()
    tickets = [enter(queue, "a") for _ in range(3)]
    assert [queue.next(0.0, always) for _ in range(4)] == [*tickets, None]


def test_one_with_many_requests_does_not_hold_up_one_with_few() -> None:
    queue = FairQueue()
    for _ in range(6):
        enter(queue, "a")
    for _ in range(2):
        enter(queue, "b")
    assert served(queue) == "ababaaaa"


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = FairQueue()
    for _ in range(3):
        enter(queue, "a", cost=300.0)
    for _ in range(9):
        enter(queue, "b", cost=100.0)
    order = served(queue)
    assert order[:8].count("b") == 6
    assert order[:8].count("a") == 2


def test_what_a_request_took_in_the_end_counts() -> None:
    queue = FairQueue()
    for _ in range(4):
        enter(queue, "a")
        enter(queue, "b")
    for cost, output in ((1000.0, 450), (100.0, 40)):
        ticket = queue.next(0.0, always)
        assert ticket is not None
        queue.settle(ticket, cost, output)
    assert served(queue) == "bbbaaa"
    assert queue.expected_cost("a", 10, None) > queue.expected_cost("b", 10, None)


def test_what_came_to_nothing_is_given_back() -> None:
    queue = FairQueue()
    ticket = enter(queue, "a", cost=900.0)
    assert queue.next(0.0, always) is ticket
    queue.refund(ticket)
    queue.refund(ticket)
    assert queue.counter("a") == 0.0


def test_a_newcomer_is_not_charged_for_what_others_only_began() -> None:
    """Running requests are charged at once; who comes now is lifted to what is settled only."""
    queue = FairQueue()
    running = [enter(queue, "a", cost=500.0) for _ in range(2)]
    served(queue)
    for _ in range(3):
        enter(queue, "a")
        enter(queue, "b")
    for ticket in running:
        queue.settle(ticket, 10.0, 5)
    assert served(queue) == "bababa" or served(queue).startswith("b")


def test_who_was_idle_has_saved_nothing_up() -> None:
    queue = FairQueue()
    for identity in "b" + 10 * "a":  # b was here once, long ago
        ticket = enter(queue, identity)
        assert served(queue) == identity
        queue.settle(ticket, 100.0, 50)
    for _ in range(4):
        enter(queue, "a")
    for _ in range(4):
        enter(queue, "b")
    assert Counter(served(queue)[:4]) == {"a": 2, "b": 2}


def test_priorities_are_strict_until_somebody_waited_long() -> None:
    queue = FairQueue()
    enter(queue, "l", priority=-1)
    enter(queue, "n")
    enter(queue, "h", priority=1)
    assert served(queue) == "hnl"
    enter(queue, "l", priority=-1)
    later = 2 * LIFTED_AFTER_S + 1
    for _ in range(3):
        enter(queue, "h", now=later, priority=1)
    assert "l" in served(queue, now=later)[:2]


def test_nobody_is_lifted_above_the_highest() -> None:
    ticket = Ticket("a", "m", 1.0, priority=HIGHEST)
    assert ticket.class_at(1e9) == HIGHEST


def test_the_earliest_deadline_of_an_identity_is_first() -> None:
    queue = FairQueue()
    late, soon = enter(queue, "a", deadline=50.0), enter(queue, "a", deadline=10.0)
    enter(queue, "a")
    assert queue.order(0.0)[:2] == [soon, late]


def test_who_has_no_room_does_not_hold_up_the_others() -> None:
    queue = FairQueue()
    blocked = enter(queue, "a", model="full")
    other = enter(queue, "a", model="free")
    third = enter(queue, "b", model="free")
    ready: list[Ticket | None] = [
        queue.next(0.0, lambda ticket: ticket.model == "free") for _ in range(3)
    ]
    assert ready == [other, third, None] or ready == [third, other, None]
    assert queue.order(0.0) == [blocked]


def test_the_order_shown_is_the_order_served() -> None:
    queue = FairQueue()
    for identity, cost in (("a", 10.0), ("a", 500.0), ("b", 80.0), ("c", 1.0), ("a", 5.0)):
        enter(queue, identity, cost=cost)
    shown = queue.order(0.0)
    assert [queue.next(0.0, always) for _ in shown] == shown


def test_expected_costs_are_bounded_by_the_request() -> None:
    queue = FairQueue()
    assert queue.expected_cost("a", 10, None) == 10 + OUTPUT_WEIGHT * USUAL_OUTPUT
    assert queue.expected_cost("a", 10, 5) == 10 + OUTPUT_WEIGHT * 5
    assert queue.expected_cost("a", 10, -1) == 10 + OUTPUT_WEIGHT * USUAL_OUTPUT


def test_identities_that_come_once_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(5 * MAX_IDLE_COUNTERS):
        ticket = enter(queue, f"passer-by {number}", cost=1.0)
        served(queue)
        queue.settle(ticket, 2.0, 1)
    assert len(queue._accounts) <= MAX_IDLE_COUNTERS + 1


@pytest.mark.parametrize(
    ("waiting", "slots", "service_s", "expected"),
    [(0, 4, 2.0, 1), (512, 4, 2.0, 129), (512, 1, 60.0, 600), (9, 1, 1.0, 5)],
)
def test_retry_after_is_when_half_of_the_queue_is_gone(
    waiting: int, slots: int, service_s: float, expected: int
) -> None:
    assert retry_after_s(waiting, slots, service_s) == expected


def test_an_estimate_is_the_turns_before() -> None:
    assert estimate_s(8, 4, 2.0) == 4.0
    assert estimate_s(1, 0.5, 2.0) == 4.0, "of a slot that is shared with another entry node"
    assert estimate_s(1, 0, 2.0) < math.inf


steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from("abc"), st.floats(1, 500), st.integers(-1, 1)),
        st.tuples(st.just("next"), st.just(""), st.just(0.0), st.just(0)),
        st.tuples(st.just("leave"), st.just(""), st.just(0.0), st.integers(0, 20)),
    ),
    max_size=80,
)


@given(steps)
def test_nobody_is_lost_or_served_twice(history: list[tuple[str, str, float, int]]) -> None:
    queue = FairQueue()
    waiting: list[Ticket] = []
    for now, (what, identity, cost, number) in enumerate(history):
        match what:
            case "enter":
                waiting.append(enter(queue, identity, now=float(now), cost=cost, priority=number))
            case "next":
                shown = queue.order(float(now))
                ticket = queue.next(float(now), always)
                assert ticket is (shown[0] if shown else None)
                if ticket is not None:
                    waiting.remove(ticket)
            case _ if waiting:
                queue.leave(waiting.pop(number % len(waiting)))
        assert len(queue) == len(waiting)
        assert set(queue.order(float(now))) == set(waiting)


@given(
    st.lists(st.floats(1, 400), min_size=40, max_size=40),
    st.lists(st.floats(1, 400), min_size=40, max_size=40),
)
@settings(max_examples=50)
def test_two_that_always_wait_get_the_same(a: list[float], b: list[float]) -> None:
    """VTC's bound: while both wait, their services differ by at most one request each."""
    queue = FairQueue()
    for cost in a:
        enter(queue, "a", cost=cost)
    for cost in b:
        enter(queue, "b", cost=cost)
    got: Counter[str] = Counter()
    left = Counter(a=len(a), b=len(b))
    while left["a"] and left["b"]:
        ticket = queue.next(0.0, always)
        assert ticket is not None
        got[ticket.identity] += ticket.cost  # type: ignore[assignment]
        left[ticket.identity] -= 1
        assert abs(got["a"] - got["b"]) <= 400 + 1e-6
