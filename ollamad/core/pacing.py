"""Rate limits for bytes, by GCRA: who takes bytes is told how long to wait for it.

Pure: time (seconds of any steady clock) is an argument. One number of memory, no queue: whoever
waits waits in its own place.
"""

import math

BURST_S = 0.1  # this much of the rate may go at once; below, waits become too short to be kept


class Pacer:
    """Spreads bytes over time. The rate is an argument too, since it may change at any time."""

    def __init__(self) -> None:
        self._due = -math.inf  # when all bytes that were taken so far should have gone

    def take(self, size: int, rate: float | None, now: float) -> float:
        """Take that many bytes at `rate` (bytes/s; None is no limit): seconds to wait for it."""
        if rate is None:
            self._due = -math.inf
            return 0.0
        self._due = max(self._due, now - BURST_S) + size / rate
        return max(0.0, self._due - now)


class SlotTuner:
    """How many pieces to send side by side: as few as fill the link.

    One after the other, a piece is complete early, and whoever got it passes it on while the next
    one is sent; side by side, all of them are complete late. But one receiver alone may be slower
    than the link. So the number is doubled now and then, and kept if that sends clearly more.
    """

    LEAST, MOST = 4, 64  # with fewer, receivers that are busy with others leave the link idle
    GAIN = 1.25  # less is within what a busy machine does by itself
    ROUND_S = 0.5  # what is measured at once
    PROBE_S = 5.0  # between two attempts to send more side by side

    def __init__(self) -> None:
        self.slots = self.LEAST
        self._since: float | None = None
        self._bytes = 0
        self._finished = 0
        self._waited = False  # whether a piece had to wait for a slot in this round
        self._probing_from = 0  # slots before the attempt that is going on; 0 if none
        self._rate = 0.0  # at that number of slots
        self._probe_at = 0.0

    def waited(self) -> None:
        """A piece had to wait for a slot."""
        self._waited = True

    def sent(self, size: int, now: float) -> None:
        """A piece (or what was wanted of it) was sent."""
        if self._since is None:
            self._since = now
            return
        self._bytes += size
        self._finished += 1
        elapsed = now - self._since
        if elapsed < self.ROUND_S or self._finished < 2 * self.slots:
            return
        rate, waited = self._bytes / elapsed, self._waited
        self._since, self._bytes, self._finished, self._waited = now, 0, 0, False
        if self._probing_from:
            if rate < self.GAIN * self._rate:
                self.slots = self._probing_from
                self._probe_at = now + self.PROBE_S
            else:
                self._rate = rate
            self._probing_from = 0
        elif waited and (now >= self._probe_at or rate < self._rate / 2):
            self._rate = rate
            if self.slots < self.MOST:
                self._probing_from = self.slots
                self.slots = min(self.MOST, 2 * self.slots)
        else:
            self._rate = rate
