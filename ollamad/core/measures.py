"""What heartbeats tell for placement: how much a model is wanted, how fast copies come. Pure.

Both are exponentially weighted means, so that a few numbers stand for any length of time.
"""

import math
from dataclasses import dataclass

import msgspec

MAX_TOLD = 64  # models of one heartbeat, the most wanted first: 3 KB
NEGLIGIBLE = 0.005  # requests at once; less than that is none
SMALL_BYTES = 1_000_000  # what is smaller tells of latency, not of a rate
WEIGHT = 0.3  # of the newest measurement of a rate: the last few count


class Demand(msgspec.Struct, frozen=True):
    """How many requests for a model run or wait at once, in the mean."""

    model: str
    recent: float  # over the time that makes a model hot
    lasting: float  # over the longer one that lets it cool


class Rate:
    """Bytes a second of the last few measurements."""

    def __init__(self) -> None:
        self.value = 0.0  # 0: never measured

    def note(self, size_bytes: float, took_s: float) -> None:
        """Something of that size took so long."""
        if size_bytes < SMALL_BYTES or took_s <= 0:
            return
        seen = size_bytes / took_s
        self.value += (seen - self.value) * (WEIGHT if self.value else 1.0)


@dataclass(slots=True)
class _Asked:
    at: float
    count: int = 0  # requests now
    recent: float = 0.0
    lasting: float = 0.0


class DemandMeter:
    """The mean number of requests at once, for each model that is asked for on this node.

    Args:
      recent_s, lasting_s: the time constants of both means, in seconds.
    """

    def __init__(self, recent_s: float, lasting_s: float) -> None:
        self.recent_s = recent_s
        self.lasting_s = lasting_s
        self._asked: dict[str, _Asked] = {}

    def begin(self, model: str, now: float) -> None:
        """A request came. `now` is in seconds of a clock that never jumps."""
        self._advance(self._asked.setdefault(model, _Asked(now)), now).count += 1

    def end(self, model: str, now: float) -> None:
        """A request that `begin` told of is answered or given up."""
        self._advance(self._asked[model], now).count -= 1

    def read(self, now: float) -> tuple[Demand, ...]:
        """The models that are wanted, the most wanted first; at most MAX_TOLD."""
        for model, asked in list(self._asked.items()):
            self._advance(asked, now)
            if not asked.count and max(asked.recent, asked.lasting) < NEGLIGIBLE:
                del self._asked[model]
        told = (
            Demand(model, round(asked.recent, 3), round(asked.lasting, 3))
            for model, asked in self._asked.items()
        )
        return tuple(sorted(told, key=lambda d: (-max(d.recent, d.lasting), d.model))[:MAX_TOLD])

    def _advance(self, asked: _Asked, now: float) -> _Asked:
        elapsed = max(0.0, now - asked.at)
        for mean, constant_s in (("recent", self.recent_s), ("lasting", self.lasting_s)):
            gap = getattr(asked, mean) - asked.count
            setattr(asked, mean, asked.count + gap * math.exp(-elapsed / constant_s))
        asked.at = max(asked.at, now)
        return asked
