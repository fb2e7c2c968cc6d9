"""How much a model is wanted, and how fast copies come: means over time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.measures import MAX_TOLD, Demand, DemandMeter, Rate
from ollamad.wire.codec import encode

M = "m:latest"


def test_a_rate_is_of_the_last_few_measurements() -> None:
    rate = Rate()
    assert rate.value == 0
    rate.note(10_000_000, 0.1)
    assert rate.value == 1e8
    for _ in range(12):
        rate.note(10_000_000, 1.0)
    assert rate.value == pytest.approx(1e7, rel=0.2)
    before = rate.value
    rate.note(999_999, 1e-6)  # a small file tells of latency
    rate.note(10_000_000, 0.0)
    assert rate.value == before


def test_steady_demand_is_its_number_of_requests() -> None:
    meter = DemandMeter(30, 600)
    for _ in range(3):
        meter.begin(M, 100.0)
    [told] = meter.read(130.0)
    assert told.recent == pytest.approx(3 * (1 - math.exp(-1)), abs=0.01)
    assert told.lasting == pytest.approx(3 * (1 - math.exp(-30 / 600)), abs=0.01)
    assert meter.read(9999.0) == (Demand(M, 3.0, 3.0),)


def test_short_requests_count_for_the_time_that_they_take() -> None:
    meter = DemandMeter(30, 600)
    for second in range(600):  # half a second of each
        meter.begin(M, second)
        meter.end(M, second + 0.5)
    [told] = meter.read(600.0)
    assert told.recent == pytest.approx(0.5, abs=0.02)


def test_what_is_over_fades_and_is_forgotten() -> None:
    meter = DemandMeter(30, 600)
    meter.begin(M, 0.0)
    meter.end(M, 3000.0)
    [told] = meter.read(3120.0)
    assert told.recent < 0.05
    assert told.lasting == pytest.approx(math.exp(-0.2), abs=0.02)
    assert meter.read(9000.0) == ()
    assert meter._asked == {}


def test_the_most_wanted_are_told_and_no_more() -> None:
    meter = DemandMeter(30, 600)
    for number in range(3 * MAX_TOLD):
        for _ in range(number):
            meter.begin(f"m{number}:latest", 0.0)
    told = meter.read(60.0)
    assert len(told) == MAX_TOLD
    assert told[0].model == f"m{3 * MAX_TOLD - 1}:latest"
    assert len(encode(told)) < 5000


@given(
    st.lists(st.tuples(st.floats(0, 50), st.booleans()), max_size=40),
    st.floats(1, 100),
    st.floats(1, 1000),
)
def test_a_mean_is_never_below_none_nor_above_the_most(
    steps: list[tuple[float, bool]], recent_s: float, lasting_s: float
) -> None:
    meter, now, count, most = DemandMeter(recent_s, lasting_s), 0.0, 0, 0
    for wait, begins in steps:
        now += wait
        if begins or not count:
            meter.begin(M, now)
            count += 1
        else:
            meter.end(M, now)
            count -= 1
        most = max(most, count)
        for told in meter.read(now):
            assert -0.001 <= told.recent <= most + 0.001
            assert -0.001 <= told.lasting <= most + 0.001


def test_a_clock_that_stands_still_changes_nothing() -> None:
    meter = DemandMeter(30, 600)
    meter.begin(M, 5.0)
    meter.begin(M, 4.0)  # it never goes back, but if it did
    meter.end(M, 5.0)
    assert meter.read(5.0) == (Demand(M, 0.0, 0.0),)
