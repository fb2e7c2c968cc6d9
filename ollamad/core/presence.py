"""Who is there: what heartbeats told, and what follows from their absence.

Pure: the clock is an argument. Times are monotonic seconds of this node, except `Beat.sent_at`
and what is shown to people, which are Unix seconds.
"""

from dataclasses import dataclass

import msgspec

from ollamad.core.ids import NodeId
from ollamad.core.inference import LoadedModel
from ollamad.core.measures import Demand
from ollamad.core.prefix import PrefixNews
from ollamad.core.speeds import Speed

BEAT_INTERVAL_S = 1.0
# Three missed beats: a pause of the garbage collector or a busy disk is shorter.
OFFLINE_AFTER_S = 3.2


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as NVML shows it; memory in bytes, utilisation 0 to 1."""

    name: str
    memory_total: int
    memory_used: int
    utilisation: float
    temperature_c: int = 0


class Usage(msgspec.Struct, frozen=True):
    """How busy a host is. Fractions are 0 to 1."""

    cpu: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    gpu: float = 0.0
    bandwidth: float = 0.0  # network bytes per second, both ways
    memory_available: int = 0  # bytes
    disk_free: int = 0  # bytes, where models are kept


class Beat(msgspec.Struct, frozen=True):
    """What a node tells every other node once a second."""

    sent_at: float
    usage: Usage
    loaded: tuple[LoadedModel, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    active_requests: int = 0
    started_at: float = 0.0
    leaving: bool = False  # it stops now, do not wait for its silence
    level: int = 1  # of the commands that it knows: see `core.commands.LEVEL`
    speeds: tuple[Speed, ...] = ()  # measured, of the models used last
    prefixes: PrefixNews = PrefixNews()  # which prompts its caches hold
    waiting: int = 0  # requests that wait there to be admitted
    demand: tuple[Demand, ...] = ()  # for models, by requests that came in there
    receive_rate: float = 0.0  # bytes/s of the last copies from peers; 0: not measured


@dataclass(frozen=True, slots=True)
class Presence:
    """What this node knows about another one (or itself)."""

    online: bool
    last_seen: float  # Unix seconds; 0 if never since this daemon started
    beat: Beat


@dataclass(slots=True)
class _Heard:
    at: float
    wall: float
    beat: Beat


class PresenceTable:
    """The last beat of every node, and who came and went."""

    def __init__(self) -> None:
        self._heard: dict[NodeId, _Heard] = {}
        self._online: set[NodeId] = set()

    def hear(self, node_id: NodeId, beat: Beat, now: float, wall: float) -> bool:
        """Note a beat; whether the node was offline before."""
        self._heard[node_id] = _Heard(now, wall, beat)
        if beat.leaving:
            self._online.discard(node_id)
            return False
        came = node_id not in self._online
        self._online.add(node_id)
        return came

    def sweep(self, now: float) -> list[NodeId]:
        """The nodes that fell silent since the last call; from now on they are offline."""
        silent = [n for n in self._online if now - self._heard[n].at > OFFLINE_AFTER_S]
        self._online.difference_update(silent)
        return silent

    def forget(self, node_id: NodeId) -> None:
        self._heard.pop(node_id, None)
        self._online.discard(node_id)

    def of(self, node_id: NodeId) -> Presence:
        """What is known of a node; offline and empty if it was never heard."""
        heard = self._heard.get(node_id)
        if heard is None:
            return Presence(False, 0.0, Beat(0.0, Usage()))
        return Presence(node_id in self._online, heard.wall, heard.beat)
