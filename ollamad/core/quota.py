"""What API keys have used, counted on every node and added up without asking anybody.

Each node counts what it served itself, and tells the others; a key's use is the sum over the
nodes (a grow-only counter, by Shapiro et al.: merging takes the larger count, in any order and
any number of times). So no request waits for another node, and a quota can be exceeded by what
the others served since they last told (see `usage.py` for how long that is).

Counts belong to a window of the key's period, in UTC. A node whose clock is off begins its
windows as early or late as its clock is.
"""

from datetime import UTC, datetime

import msgspec

from ollamad.core.ids import NodeId

# Seconds; a month is the calendar's, and of what is used in total nothing ever returns.
PERIODS = {"minute": 60, "hour": 3600, "day": 86400, "month": None, "total": None}


class Used(msgspec.Struct, frozen=True, array_like=True):
    """What one node counted of a key in one window."""

    window: int  # when it began, Unix seconds
    requests: int = 0
    tokens: int = 0


class KeyCount(msgspec.Struct, frozen=True, array_like=True):
    key_id: str
    used: Used


class NodeCount(msgspec.Struct, frozen=True, array_like=True):
    """A count as nodes tell it each other."""

    node_id: NodeId
    key_id: str
    used: Used


def window_of(period: str, now: float) -> int:
    """When the window of that period began that holds the time `now`, in Unix seconds."""
    if period == "total":
        return 0
    if period == "month":
        return int(_month(now).timestamp())
    seconds = PERIODS.get(period) or 1
    return int(now // seconds) * seconds


def window_end(period: str, now: float) -> float | None:
    """When that window ends; None for `total`, which never does."""
    if period == "total":
        return None
    if period == "month":
        begin = _month(now)
        year, month = divmod(begin.year * 12 + begin.month, 12)
        return begin.replace(year=year, month=month + 1).timestamp()
    return window_of(period, now) + float(PERIODS.get(period) or 1)


def later(known: Used | None, told: Used) -> Used:
    """Two counts of the same node and key as one: the later window, or the larger counts."""
    if known is None or told.window > known.window:
        return told
    if told.window < known.window:
        return known
    return Used(told.window, max(known.requests, told.requests), max(known.tokens, told.tokens))


class Ledger:
    """All counts that this node knows: its own, and what the others told."""

    def __init__(self, node_id: NodeId) -> None:
        self._node_id = node_id
        self._counts: dict[str, dict[NodeId, Used]] = {}  # by key
        self._versions: dict[tuple[str, NodeId], int] = {}
        self.version = 0  # grows with each change

    def add(
        self, key_id: str, period: str, now: float, *, requests: int = 0, tokens: int = 0
    ) -> None:
        """Count what this node served."""
        window = window_of(period, now)
        known = self._counts.get(key_id, {}).get(self._node_id)
        if known is None or known.window < window:
            known = Used(window)
        # A clock that went back counts on in the newer window: the count never shrinks.
        counted = Used(known.window, known.requests + requests, known.tokens + tokens)
        self._put(key_id, self._node_id, counted)

    def used(self, key_id: str, period: str, now: float) -> Used:
        """What all nodes together have used of the window of now, as far as is known here."""
        window = window_of(period, now)
        counts = [c for c in self._counts.get(key_id, {}).values() if c.window >= window]
        return Used(window, sum(c.requests for c in counts), sum(c.tokens for c in counts))

    def merge(self, count: NodeCount) -> None:
        """Note what was told, by whom does not matter."""
        known = self._counts.get(count.key_id, {}).get(count.node_id)
        merged = later(known, count.used)
        if merged != known:
            self._put(count.key_id, count.node_id, merged)

    def changes(self, since: int, *, own: bool) -> list[NodeCount]:
        """The counts that changed after that version; `own`: only those of this node."""
        return [
            NodeCount(node_id, key_id, self._counts[key_id][node_id])
            for (key_id, node_id), version in self._versions.items()
            if version > since and (not own or node_id == self._node_id)
        ]

    def forget(self, key_id: str) -> None:
        """The key is gone."""
        for node_id in self._counts.pop(key_id, {}):
            del self._versions[key_id, node_id]

    def key_ids(self) -> list[str]:
        return list(self._counts)

    def _put(self, key_id: str, node_id: NodeId, used: Used) -> None:
        self.version += 1
        self._counts.setdefault(key_id, {})[node_id] = used
        self._versions[key_id, node_id] = self.version


def _month(now: float) -> datetime:
    moment = datetime.fromtimestamp(now, UTC)
    return moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
