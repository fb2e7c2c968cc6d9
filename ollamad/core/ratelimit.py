"""Rate limits by GCRA (the generic cell rate algorithm): one number of memory per identity."""

import dataclasses
from collections.abc import Hashable

MAX_IDENTITIES = 10_000  # remembered at once; the oldest are forgotten, which only forgives
ROUNDING_S = 1e-6  # sums of floats must not cost the last request of a burst


@dataclasses.dataclass(frozen=True, slots=True)
class Allowance:
    """What an identity may do now; times in seconds from now."""

    limit: int  # at once, and in each period
    remaining: int  # at once, now
    reset_s: float  # until all of it is there again
    wait_s: float  # until one more is allowed; 0 if it is now


class RateLimit:
    """Allows `burst` at once and `burst` per `period_s` in the long run, per identity."""

    def __init__(self, burst: int, period_s: float) -> None:
        self._burst = burst
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

    def look(self, identity: Hashable, now: float) -> Allowance:
        """What this identity may do, without doing it."""
        debt_s = max(self._arrival.get(identity, now) - now, 0.0)
        room_s = self._period_s + ROUNDING_S - debt_s
        return Allowance(
            limit=self._burst,
            remaining=max(0, int(room_s / self._interval_s)),
            reset_s=debt_s,
            wait_s=max(0.0, self._interval_s - room_s),
        )

    def forgive(self, identity: Hashable) -> None:
        """Forget what this identity did."""
        self._arrival.pop(identity, None)
