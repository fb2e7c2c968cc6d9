"""What the soak calls a leak (tests/soak/run.py), in two minutes and in thirty."""

import random
from collections.abc import Callable

import pytest

from tests.soak.run import ALLOWED, SAMPLE_EVERY_S, Found, Sample

USUAL = {"fds": 30, "tasks": 75, "threads": 4, "temp_files": 0}


def soak(seconds: float, rss_mb: Callable[[float], float], **leaked: int) -> Found:
    """A soak whose memory is `rss_mb` at each moment, and whose counts have grown by `leaked`."""
    times = [number * SAMPLE_EVERY_S for number in range(int(seconds / SAMPLE_EVERY_S))]
    samples = [Sample(at_s, rss_mb(at_s), **USUAL) for at_s in times]
    after = {name: count + leaked.get(name, 0) for name, count in USUAL.items()}
    return Found(seconds, samples, at_rest=[USUAL, after])


@pytest.mark.parametrize(("seconds", "mb_per_hour"), [(120, 400), (1800, 30)])
def test_a_slow_leak_of_memory_is_found(seconds: float, mb_per_hour: float) -> None:
    """20 MB in two minutes are 600 an hour."""
    rng = random.Random(1)
    found = soak(seconds, lambda at_s: 100 + mb_per_hour * at_s / 3600 + rng.choice((0, 0, 1, 20)))
    [leak] = found.leaks()
    assert leak.startswith("memory grows")
    assert found.growth()[0] == pytest.approx(mb_per_hour, rel=0.2)


@pytest.mark.parametrize("seconds", [120, 1800])
def test_memory_that_fills_steps_and_peaks_is_none(seconds: float) -> None:
    def takes(at_s: float) -> float:
        part = at_s / seconds
        return 100 + 40 * min(part, 0.5) + 8 * (part > 0.9) + 50 * (0.6 < part < 0.65)

    assert soak(seconds, takes).leaks() == []


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_left_at_rest_is_found(name: str) -> None:
    allowed = ALLOWED[name]
    assert soak(120, lambda _: 100.0, **{name: allowed}).leaks() == []
    [leak] = soak(120, lambda _: 100.0, **{name: allowed + 1}).leaks()
    assert leak.startswith(f"{name} at rest")
