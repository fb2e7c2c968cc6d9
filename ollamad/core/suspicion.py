"""How sure one can be that a silent node is gone: phi-accrual failure detection. Pure.

After Hayashibara et al., "The phi accrual failure detector" (SRDS 2004), with Cassandra's
simplification for the tail: from the intervals between the signs of life so far follows how
likely a silence of this length is; phi is minus the logarithm of that. So a steady peer is
suspected soon, and one on a busy machine or behind gossip, whose signs come irregularly, later.

Suspicion is no verdict. It starts a question: this node asks the suspect, and has others ask it.
"""

import math
from collections import deque

WINDOW = 32  # intervals that are remembered: half a minute of beats
MIN_DEVIATION_S = 0.15  # a loop that is held up, a sync of the journal: everybody's
SUSPECT = 3.0  # once in a thousand intervals by chance: cheap to ask, so asked early
CONVICT = 8.0  # Cassandra's default, if nobody could be asked


class PhiAccrual:
    """The signs of life of one node. `expected_s` is the interval until some were seen."""

    def __init__(self, expected_s: float, now: float) -> None:
        self._intervals: deque[float] = deque([expected_s], maxlen=WINDOW)
        self._last = now

    def hear(self, now: float) -> None:
        """A sign of life."""
        # Two together, after a hold-up, tell nothing of how often signs come.
        if now - self._last > MIN_DEVIATION_S / 3:
            self._intervals.append(now - self._last)
        self._last = now

    def excuse(self, pause_s: float, now: float) -> None:
        """It could not be heard for so long, for who listens stood still itself."""
        self._last = min(now, self._last + pause_s)

    @property
    def last(self) -> float:
        """When the last sign of life came."""
        return self._last

    def phi(self, now: float) -> float:
        """How unlikely the silence is: 3 means one in a thousand."""
        mean = sum(self._intervals) / len(self._intervals)
        variance = sum((each - mean) ** 2 for each in self._intervals) / len(self._intervals)
        deviation = max(math.sqrt(variance), MIN_DEVIATION_S, mean / 8)
        excess = (now - self._last - mean) / deviation
        if excess <= 0:
            return 0.0
        # The logistic approximation of the normal distribution's tail (Bowling et al. 2009).
        exponent = excess * (1.5976 + 0.070566 * excess * excess)
        return (exponent + math.log1p(math.exp(-exponent))) / math.log(10)
