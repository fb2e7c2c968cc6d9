"""What the API measures of itself: requests, their rate, latency and failures.

Counts stand for the life of the process; rates and averages are taken over a sliding window
of one-second buckets. No clock of its own: the time is passed in.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from itertools import accumulate

import msgspec

WINDOW_S = 60  # long enough to smooth, short enough to show what happens now
# Upper bounds of latencies that are counted together, in seconds; from a read to a long answer.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Measured(msgspec.Struct, frozen=True):
    """A snapshot. Latency and rates cover the last WINDOW_S seconds (less after a start)."""

    total: int  # begun since the start
    completed: int  # ended well
    failed: int  # ended badly
    active: int
    per_second: float  # ended
    average_latency_ms: float
    error_percent: float


class RequestStats:
    """Counts requests from `begin` to `end`. One event loop only; not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._born = clock()
        self._total = 0
        self._completed = 0
        self._failed = 0
        self.tokens = 0  # of prompts and answers, since the start
        self.latency_sum_s = 0.0
        self._histogram = [0] * (len(BUCKETS_S) + 1)
        # Newest last: [second, ended, failed, seconds of latency]
        self._buckets: deque[list[float]] = deque(maxlen=WINDOW_S + 1)

    def begin(self) -> float:
        """Count a request that begins; returns its start, for `end`."""
        self._total += 1
        return self._clock()

    def end(self, latency_s: float, *, failed: bool) -> None:
        """Count a request that ended."""
        self.latency_sum_s += latency_s
        self._histogram[bisect_left(BUCKETS_S, latency_s)] += 1
        second = int(self._clock())
        if not self._buckets or self._buckets[-1][0] != second:
            self._buckets.append([second, 0, 0, 0.0])
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[3] += latency_s
        if failed:
            self._failed += 1
            bucket[2] += 1
        else:
            self._completed += 1

    def latency_buckets(self) -> list[tuple[str, int]]:
        """How many requests since the start took at most so many seconds, as Prometheus has it."""
        bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
        return list(zip(bounds, accumulate(self._histogram), strict=True))

    def snapshot(self) -> Measured:
        now = self._clock()
        recent = [bucket for bucket in self._buckets if bucket[0] > now - WINDOW_S]
        ended = sum(bucket[1] for bucket in recent)
        # A young process has no whole window behind it; a second is the least to divide by.
        span = min(float(WINDOW_S), max(1.0, now - self._born))
        return Measured(
            total=self._total,
            completed=self._completed,
            failed=self._failed,
            active=self._total - self._completed - self._failed,
            per_second=ended / span,
            average_latency_ms=1000 * sum(bucket[3] for bucket in recent) / ended if ended else 0.0,
            error_percent=100 * sum(bucket[2] for bucket in recent) / ended if ended else 0.0,
        )
