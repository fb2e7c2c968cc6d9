"""Rate limits by GCRA (the generic cell rate algorithm): one number of memory per identity."""

from collections.abc import Hashable

MAX_IDENTITIES = 10_000  # remembered at once; the oldest are forgotten, which only forgives
ROUNDING_S = 1e-6  # sums of floats must not cost the last request of a burst


class RateLimit:
    """Allows `burst` at once and `burst` per `period_s` in the long run, per identity."""

    def __init__(self, burst: int, period_s: float) -> None:
        self._interval_s = period_s / burst
        self._period_s = period_s
        self._arrival: dict[Hashable, float] = {}  # theoretical arrival times

    def allow(self, identity: Hashable, now: float) -> bool:
        """Whether this identity may do it once more at time `now` (seconds, monotonic)."""
        due = max(self._arrival.pop(identity, now), now)
        allowed = due + self._interval_s - now <= self._period_s + ROUNDING_S
        self._arrival[identity] = due + self._interval_s if allowed else due
        if len(self._arrival) > MAX_IDENTITIES:
            del self._arrival[next(iter(self._arrival))]
        return allowed
