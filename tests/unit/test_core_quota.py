"""What keys have used: windows, and counts that add up the same in any order."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.core.quota import PERIODS, Ledger, NodeCount, Used, later, window_end, window_of

NOW = datetime(2024, 12, 31, 23, 59, 30, tzinfo=UTC).timestamp()
A, B = NodeId("QmA"), NodeId("QmB")


def at(*moment: int) -> float:
    return datetime(*moment, tzinfo=UTC).timestamp()  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("period", "begin", "end"),
    [
        ("minute", at(2024, 12, 31, 23, 59), at(2025, 1, 1)),
        ("hour", at(2024, 12, 31, 23), at(2025, 1, 1)),
        ("day", at(2024, 12, 31), at(2025, 1, 1)),
        ("month", at(2024, 12, 1), at(2025, 1, 1)),
        ("total", 0, None),
    ],
)
def test_windows_are_those_of_the_calendar(period: str, begin: float, end: float | None) -> None:
    assert (window_of(period, NOW), window_end(period, NOW)) == (begin, end)


@given(st.sampled_from([p for p in PERIODS if p != "total"]), st.floats(0, 4e9))
def test_windows_follow_each_other_without_a_gap(period: str, now: float) -> None:
    end = window_end(period, now)
    assert end is not None
    assert window_of(period, now) <= now < end
    assert window_of(period, end) == end


def test_a_window_that_is_over_counts_no_more() -> None:
    ledger = Ledger(A)
    ledger.add("k", "minute", 0.0, requests=2, tokens=7)
    assert ledger.used("k", "minute", 59.9) == Used(0, 2, 7)
    assert ledger.used("k", "minute", 60.0) == Used(60, 0, 0)
    ledger.add("k", "minute", 60.0, requests=1)
    ledger.add("k", "minute", 59.0, requests=1)  # the clock was set back
    assert ledger.used("k", "minute", 60.0) == Used(60, 2, 0)


def test_a_key_has_used_what_all_nodes_counted() -> None:
    here, there = Ledger(A), Ledger(B)
    here.add("k", "day", NOW, requests=1, tokens=10)
    there.add("k", "day", NOW, requests=2)
    there.add("other", "day", NOW, requests=9)
    for count in there.changes(0, own=True):
        here.merge(count)
        here.merge(count)  # told twice
    assert here.used("k", "day", NOW) == Used(window_of("day", NOW), 3, 10)


def test_what_changed_is_told_once() -> None:
    ledger = Ledger(A)
    ledger.add("k", "total", NOW, requests=1)
    ledger.merge(NodeCount(B, "k", Used(0, 5, 0)))
    seen = ledger.version
    assert len(ledger.changes(0, own=False)) == 2
    assert [c.node_id for c in ledger.changes(0, own=True)] == [A]
    assert ledger.changes(seen, own=False) == []
    ledger.merge(NodeCount(B, "k", Used(0, 4, 0)))  # older: no change
    assert ledger.changes(seen, own=False) == []
    ledger.add("k", "total", NOW, tokens=1)
    assert ledger.changes(seen, own=True) == [NodeCount(A, "k", Used(0, 1, 1))]
    ledger.forget("k")
    assert (ledger.changes(0, own=False), ledger.key_ids()) == ([], [])


def test_a_node_that_lost_its_counts_learns_them_from_others_and_counts_on() -> None:
    before, other, after = Ledger(A), Ledger(B), Ledger(A)
    before.add("k", "total", NOW, requests=4)
    for count in before.changes(0, own=True):
        other.merge(count)
    for count in other.changes(0, own=False):
        after.merge(count)
    after.add("k", "total", NOW, requests=1)
    assert after.used("k", "total", NOW).requests == 5


USES = st.builds(Used, st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))


@given(USES, USES, USES)
def test_merging_is_the_same_in_any_order_and_any_number_of_times(
    a: Used, b: Used, c: Used
) -> None:
    assert later(later(a, b), c) == later(a, later(b, c)) == later(later(c, a), b)
    assert later(a, a) == a
    assert later(a, b) == later(b, a)
