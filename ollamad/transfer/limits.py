"""How fast pieces may go and come, over all transfers together, and less while a model answers."""

import threading
import time
from collections.abc import Callable

from ollamad.core.pacing import Pacer

PORTION_S = 0.05  # of the limit; 64 exchanges have their turn within a few seconds
MIN_PORTION = 1024  # bytes; less would be headers mostly


class Limit:
    """One direction. Safe in any thread.

    Args:
      rate: bytes/s; None is no limit.
      rate_when_busy: the same while `is_busy` says so.
    """

    def __init__(
        self,
        rate: float | None = None,
        *,
        rate_when_busy: float | None = None,
        is_busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._rate_when_busy = rate_when_busy
        self._is_busy = is_busy
        self._clock = clock
        self._pacer = Pacer()
        self._lock = threading.Lock()

    def take(self, size: int) -> float:
        """Take that many bytes: seconds to wait for it."""
        rate = self._rate_now()
        with self._lock:
            return self._pacer.take(size, rate, self._clock())

    def portion(self, size: int) -> int:
        """So many of these bytes may be taken at once, so that all who share the limit soon may.

        Else, under a low limit, each of many would be silent for so long that it seemed dead.
        """
        rate = self._rate_now()
        return size if rate is None else min(size, max(MIN_PORTION, int(rate * PORTION_S)))

    def _rate_now(self) -> float | None:
        rates = [self._rate]
        if self._rate_when_busy is not None and self._is_busy():
            rates.append(self._rate_when_busy)
        return min((rate for rate in rates if rate is not None), default=None)
