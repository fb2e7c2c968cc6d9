"""The counters behind /metrics."""

from ollamad.api.metrics import WINDOW_S, RequestStats


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_measured_is_zero() -> None:
    found = RequestStats(Clock()).snapshot()
    assert (found.total, found.active, found.per_second) == (0, 0, 0.0)
    assert (found.average_latency_ms, found.error_percent) == (0.0, 0.0)


def test_counts_rate_latency_and_errors() -> None:
    clock = Clock()
    stats = RequestStats(clock)
    clock.now += 10
    for i in range(20):
        stats.begin()
        stats.end(0.1 if i % 2 else 0.3, failed=i == 0)
    stats.begin()
    found = stats.snapshot()
    assert (found.total, found.completed, found.failed, found.active) == (21, 19, 1, 1)
    assert found.per_second == 2.0
    assert round(found.average_latency_ms) == 200
    assert found.error_percent == 5.0


def test_the_window_slides_and_the_counts_stay() -> None:
    clock = Clock()
    stats = RequestStats(clock)
    for _ in range(3 * WINDOW_S):
        stats.begin()
        stats.end(1.0, failed=True)
        clock.now += 1
    assert stats.snapshot().per_second == 59 / WINDOW_S  # the newest second has not begun
    clock.now += WINDOW_S
    found = stats.snapshot()
    assert (found.per_second, found.error_percent) == (0.0, 0.0)
    assert found.failed == 3 * WINDOW_S
