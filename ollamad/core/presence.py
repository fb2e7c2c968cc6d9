"""Who is there: what heartbeats told, and what follows from their absence.

Silence makes a node suspect by phi-accrual (`core.suspicion`); who keeps the table then asks it,
and has others ask. A node that nobody reaches is offline, and so is one that was silent for
OFFLINE_AFTER_S and improbably long, whoever could be asked.

Pure: the clock is an argument. Times are monotonic seconds of this node, except `Beat.sent_at`
and what is shown to people, which are Unix seconds.
"""

import math
from dataclasses import dataclass

import msgspec

from ollamad.core.ids import NodeId
from ollamad.core.inference import LoadedModel
from ollamad.core.measures import Demand
from ollamad.core.prefix import NOT_TOLD, PrefixNews
from ollamad.core.shares import NOBODY, Shares
from ollamad.core.speeds import Speed, short_digest
from ollamad.core.suspicion import CONVICT, SUSPECT, PhiAccrual

BEAT_INTERVAL_S = 1.0
# Three missed beats: a pause of the garbage collector or a busy disk is shorter.
OFFLINE_AFTER_S = 3.2
# A node that does not answer from here is not brought back by what others tell of it so long: the
# way from here may be cut.
UNREACHED_S = 30.0


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


class ModelLoad(msgspec.Struct, frozen=True, array_like=True):
    """How busy a model in memory is, in few bytes."""

    model: str  # `short_digest`
    slots: int
    busy: int
    queued: int
    pending: int = 0  # tokens of prompts


class Rumour(msgspec.Struct, frozen=True, array_like=True):
    """What a node passes on of another one's beat: a sign of life, and what routing needs."""

    node: str  # the first RUMOUR_ID_CHARS of its id
    sent_at: float  # of the beat
    loads: tuple[ModelLoad, ...] = ()
    waiting: int = 0
    leaving: bool = False


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
    no_room: tuple[str, ...] = ()  # models that it should hold and found no room for
    heard: tuple[Rumour, ...] = ()  # of others, in clusters where not all tell all (core.gossip)
    shares: Shares = NOBODY  # who asks there, and what they got
    # Models that can be loaded there before another one has to leave; None: it does not tell.
    places: int | None = None
    vram_free: int = 0  # bytes on GPUs that a model can have there


@dataclass(frozen=True, slots=True)
class Presence:
    """What this node knows about another one (or itself)."""

    online: bool
    last_seen: float  # Unix seconds; 0 if never since this daemon started
    beat: Beat


@dataclass(slots=True)
class _Heard:
    wall: float
    beat: Beat
    signs: PhiAccrual
    unreached_until: float = 0.0


class PresenceTable:
    """The last beat of every node, and who came and went."""

    def __init__(self) -> None:
        self._heard: dict[NodeId, _Heard] = {}
        self._online: set[NodeId] = set()

    def hear(self, node_id: NodeId, beat: Beat, now: float, wall: float) -> bool:
        """Note a beat; whether the node was offline before."""
        heard = self._heard.get(node_id)
        if heard is None or node_id not in self._online:
            # What it did before it was away says nothing of how steadily it beats now.
            self._heard[node_id] = _Heard(wall, beat, PhiAccrual(BEAT_INTERVAL_S, now))
        else:
            heard.wall, heard.beat, heard.unreached_until = wall, beat, 0.0
            heard.signs.hear(now)
        return self._note(node_id, beat.leaving)

    def hear_of(self, node_id: NodeId, rumour: Rumour, now: float, wall: float) -> bool | None:
        """Note what another node tells of one; None if it is no news, else as `hear`."""
        heard = self._heard.get(node_id)
        if heard is None:
            beat = Beat(0.0, Usage())
            heard = self._heard[node_id] = _Heard(wall, beat, PhiAccrual(BEAT_INTERVAL_S, now))
        elif rumour.sent_at <= heard.beat.sent_at or now < heard.unreached_until:
            return None
        heard.wall, heard.beat = wall, _told(heard.beat, rumour)
        heard.signs.hear(now)
        return self._note(node_id, rumour.leaving)

    def reached(self, node_id: NodeId, now: float) -> None:
        """It has answered a question."""
        if node_id in self._online:
            self._heard[node_id].signs.hear(now)

    def excuse(self, pause_s: float, now: float) -> None:
        """This node stood still for so long; that it heard nobody meanwhile says nothing."""
        for heard in self._heard.values():
            heard.signs.excuse(pause_s, now)

    def silence_s(self, node_id: NodeId, now: float) -> float:
        """Since its last sign of life."""
        heard = self._heard.get(node_id)
        return now - heard.signs.last if heard is not None else math.inf

    def suspects(self, now: float) -> list[NodeId]:
        """The nodes that are silent for longer than is likely."""
        return [n for n in self._online if self._heard[n].signs.phi(now) > SUSPECT]

    def sweep(self, now: float) -> list[NodeId]:
        """The nodes that fell silent since the last call; from now on they are offline."""
        silent = [
            node_id
            for node_id in self._online
            if now - (signs := self._heard[node_id].signs).last > OFFLINE_AFTER_S
            and signs.phi(now) > CONVICT
        ]
        self._online.difference_update(silent)
        return silent

    def convict(self, node_id: NodeId, now: float) -> bool:
        """It cannot be reached from here; whether that is news."""
        if node_id not in self._online:
            return False
        self._online.discard(node_id)
        self._heard[node_id].unreached_until = now + UNREACHED_S
        return True

    def forget(self, node_id: NodeId) -> None:
        self._heard.pop(node_id, None)
        self._online.discard(node_id)

    def of(self, node_id: NodeId) -> Presence:
        """What is known of a node; offline and empty if it was never heard."""
        heard = self._heard.get(node_id)
        if heard is None:
            return Presence(False, 0.0, Beat(0.0, Usage()))
        return Presence(node_id in self._online, heard.wall, heard.beat)

    def _note(self, node_id: NodeId, leaving: bool) -> bool:
        if leaving:
            self._online.discard(node_id)
            return False
        came = node_id not in self._online
        self._online.add(node_id)
        return came


def _told(beat: Beat, rumour: Rumour) -> Beat:
    """A beat brought up to date by a rumour; what that does not tell stays."""
    known = {short_digest(one.digest): one for one in beat.loaded}
    loaded = []
    for load in rumour.loads:
        # Of a model that was loaded since its last beat the rest is told with the next one.
        base = known.get(load.model) or LoadedModel(load.model, load.model, 0, 0, 0, 0.0)
        loaded.append(
            msgspec.structs.replace(base, slots=load.slots, busy=load.busy, queued=load.queued)
        )
    pending = {load.model: load.pending for load in rumour.loads}
    speeds = {speed.model: speed for speed in beat.speeds}
    for model in pending.keys() - speeds.keys():
        speeds[model] = Speed(model)
    return msgspec.structs.replace(
        beat,
        sent_at=rumour.sent_at,
        loaded=tuple(loaded),
        speeds=tuple(
            msgspec.structs.replace(speed, pending=pending.get(speed.model, 0))
            for speed in speeds.values()
        ),
        prefixes=NOT_TOLD,
        waiting=rumour.waiting,
        # Who asks is told by the node itself only; that nobody waits any more is known sooner.
        shares=beat.shares if rumour.waiting else NOBODY,
        leaving=rumour.leaving,
    )
