"""GCRA: bursts, the long run, independence, bounded memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ratelimit import MAX_IDENTITIES, Allowance, RateLimit


@pytest.mark.parametrize("now", [0.0, 12345.678, 1e6 + 0.1, 99_999.9])
@pytest.mark.parametrize(("burst", "period_s"), [(1, 60.0), (3, 1.0), (7, 60.0), (100, 60.0)])
def test_exactly_the_burst_is_allowed_at_once(burst: int, period_s: float, now: float) -> None:
    limit = RateLimit(burst, period_s)
    assert [limit.allow("x", now) for _ in range(2 * burst)] == [True] * burst + [False] * burst


def test_after_a_burst_one_more_each_interval() -> None:
    limit = RateLimit(4, 8.0)
    assert all(limit.allow("x", 0.0) for _ in range(4))
    assert not limit.allow("x", 1.9)
    assert limit.allow("x", 2.0)
    assert not limit.allow("x", 2.0)
    assert limit.allow("x", 4.0)


def test_a_refusal_costs_nothing() -> None:
    limit = RateLimit(1, 10.0)
    assert limit.allow("x", 0.0)
    assert not any(limit.allow("x", t / 10) for t in range(99))
    assert limit.allow("x", 10.0)


def test_a_whole_period_of_rest_gives_the_whole_burst_back() -> None:
    limit = RateLimit(5, 60.0)
    for start in (0.0, 60.0, 200.0):
        assert sum(limit.allow("x", start) for _ in range(10)) == 5


def test_identities_do_not_share() -> None:
    limit = RateLimit(1, 60.0)
    assert limit.allow("a", 0.0)
    assert limit.allow("b", 0.0)
    assert not limit.allow("a", 0.0)


@given(st.lists(st.floats(0, 5), max_size=60), st.integers(1, 9))
def test_no_window_of_a_period_sees_more_than_two_bursts(gaps: list[float], burst: int) -> None:
    limit, now, allowed = RateLimit(burst, 10.0), 0.0, list[float]()
    for gap in gaps:
        now += gap
        if limit.allow("x", now):
            allowed.append(now)
    for start in allowed:
        assert sum(start <= t < start + 10.0 for t in allowed) <= 2 * burst
    if allowed:  # and in the long run the rate holds
        assert len(allowed) <= burst + 1 + (allowed[-1] - allowed[0]) * burst / 10.0


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    limit = RateLimit(1, 1e9)
    assert limit.allow("first", 0.0)
    for i in range(MAX_IDENTITIES - 1):
        assert limit.allow(i, 0.0)
    assert not limit.allow("first", 0.0)  # still known, and now the newest
    assert limit.allow("one more", 0.0)
    assert limit.allow(0, 0.0)  # the oldest was forgiven
    assert not limit.allow("first", 0.0)
    assert len(limit._arrival) == MAX_IDENTITIES


def test_looking_tells_what_is_left_and_costs_nothing() -> None:
    limit = RateLimit(4, 8.0)
    assert limit.look("x", 100.0) == Allowance(4, 4, 0.0, 0.0)
    for left in (3, 2, 1, 0):
        assert limit.allow("x", 100.0)
        for _ in range(3):
            assert limit.look("x", 100.0).remaining == left
    full = limit.look("x", 100.0)
    assert full.reset_s == 8.0
    assert full.wait_s == pytest.approx(2.0, abs=1e-5)
    assert limit.look("x", 101.0).wait_s == pytest.approx(1.0, abs=1e-5)
    assert limit.look("x", 102.0).remaining == 1
    assert limit.look("x", 200.0) == Allowance(4, 4, 0.0, 0.0)


@given(st.lists(st.floats(0, 3), max_size=30), st.integers(1, 7))
def test_looking_says_whether_the_next_is_allowed(gaps: list[float], burst: int) -> None:
    limit, now = RateLimit(burst, 10.0), 0.0
    for gap in gaps:
        now += gap
        seen = limit.look("x", now)
        assert limit.allow("x", now) == (seen.remaining > 0) == (seen.wait_s == 0)


def test_what_is_forgiven_is_forgotten() -> None:
    limit = RateLimit(1, 60.0)
    assert limit.allow("x", 0.0)
    limit.forgive("x")
    assert limit.allow("x", 0.0)
    limit.forgive("nobody")
