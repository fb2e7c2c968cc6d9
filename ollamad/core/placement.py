"""Which nodes should hold which model, and why. Pure.

A decision looks at all nodes and one model: how many copies it should have, which of those that
are there count, and where the missing ones are cheapest. What is there stays where it is as long
as it can, and the decision on a cluster that followed the last one is the same again, so nothing
moves to and fro. Nothing is taken from anybody here: a node that is not named any more gives up
its copy only when all that are named have theirs (see `commands.ReleaseReplica`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

import msgspec

from ollamad.core.ids import NodeId
from ollamad.core.measures import Demand
from ollamad.core.state import Model

KEEP_FREE_BYTES = 1 << 30  # a disk that a model fills to the brim fails everything else
MEMORY_MARGIN = 64 << 20  # bytes a runner takes beside weights and cache
CONTEXT_TOKENS = 4096  # that a model must have room for in memory, to be of use on a node
ASSUMED_RECEIVE = 100e6  # bytes/s of nodes that never received anything: one gigabit
ASSUMED_LOAD = 500e6  # bytes/s of nodes that never loaded anything: a solid-state disk
# Copies that come to one node at a time because of a decision here. More would only make each of
# them later, and what is most urgent goes first.
MAX_COMING = 4
# Cooling needs that much less demand than heating, so that one copy does not come and go.
COOL_SHARE = 0.5
GB = 1e9


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide. `hot_load`: requests at once per copy that ask for one more."""

    default_replicas: int = 2
    automatic: bool = True  # else only what somebody asked for
    lost_after_s: float = 300.0  # a node that is away so long does not count any more
    hot_load: float = 2.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second that a node was seen to do; 0 if it was not seen yet."""

    receive: float = 0.0  # copies of models from its peers
    load: float = 0.0  # models into memory


@dataclass(frozen=True, slots=True)
class Site:
    """A node that may hold models, as its last heartbeat told it."""

    node_id: NodeId
    host: str  # nodes of one host are lost together
    online: bool
    draining: bool = False
    away_s: float = 0.0  # how long it has been offline or draining
    disk_free: int = 0  # bytes
    memory: int = 0  # bytes of the machine, GPUs included
    rates: Rates = field(default_factory=Rates)
    no_room: frozenset[str] = frozenset()  # models that it found no room for

    @property
    def available(self) -> bool:
        return self.online and not self.draining


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a decision depends on."""

    sites: Mapping[NodeId, Site]
    models: Mapping[str, Model]  # by name key
    demand: Mapping[str, Demand] = field(default_factory=dict)  # by name; of the whole cluster
    policy: Policy = Policy()


@dataclass(frozen=True, slots=True)
class Decision:
    """How many copies a model should have, and on which nodes."""

    want: int
    reason: str  # for that number
    desired: tuple[NodeId, ...]  # sorted


@dataclass(frozen=True, slots=True)
class Placement:
    """A change of a model's desired nodes."""

    model: Model
    desired: tuple[NodeId, ...]
    reason: str


class Verdict(msgspec.Struct, frozen=True):
    """Why a node has a model, or has it not."""

    node_id: NodeId
    state: str  # holds, fetching, waiting (to fetch), spare or none
    desired: bool
    score_s: float | None  # seconds until it could serve; None where it cannot have it
    reason: str


@dataclass(frozen=True, slots=True)
class Whereabouts:
    want: int
    reason: str
    nodes: tuple[Verdict, ...]  # the holders first, then the cheapest


class Ledger:
    """What each node holds, and what is on its way to it."""

    def __init__(self, view: View) -> None:
        self._held: dict[NodeId, set[str]] = {node_id: set() for node_id in view.sites}
        self.coming: Counter[NodeId] = Counter()  # copies
        self.coming_bytes: Counter[NodeId] = Counter()
        for model in view.models.values():
            for node_id in model.confirmed:
                if (held := self._held.get(node_id)) is not None:
                    held.update(layer.digest for layer in model.layers)
        for model in view.models.values():
            for node_id in model.desired:
                if node_id not in model.confirmed:
                    self.expect(node_id, model)
        known = view.sites.values()
        self._receive = _typical((s.rates.receive for s in known), ASSUMED_RECEIVE)
        self._load = _typical((s.rates.load for s in known), ASSUMED_LOAD)

    def expect(self, node_id: NodeId, model: Model) -> None:
        """A copy of that model is to come to the node."""
        self.coming[node_id] += 1
        self.coming_bytes[node_id] += self.missing(node_id, model)

    def missing(self, node_id: NodeId, model: Model) -> int:
        """Bytes of the model that the node has not; models may share layers."""
        held = self._held.get(node_id, set())
        return sum(layer.size for layer in model.layers if layer.digest not in held)

    def cost_s(self, site: Site, model: Model) -> float:
        """Seconds until the node could serve the model, behind what comes to it already."""
        missing = self.missing(site.node_id, model)
        queue = self.coming_bytes[site.node_id] if missing else 0
        receive = site.rates.receive or self._receive
        return (missing + queue) / receive + model.size / (site.rates.load or self._load)


def memory_needed(model: Model) -> int:
    """Bytes of memory that a model takes at least, to answer anything."""
    cache = CONTEXT_TOKENS * model.details.kv_bytes_per_token
    return model.size + cache + MEMORY_MARGIN


def plan(view: View, limit: int = 64) -> list[Placement]:
    """What should change now, the most urgent first: what no node could serve.

    Empty once the cluster is as it should be. At most `limit`; the rest is for the next time.
    """
    ledger = Ledger(view)
    placements: list[Placement] = []
    for _, model in sorted(view.models.items(), key=lambda item: _urgency(view, *item)):
        decision = decide(view, ledger, model)
        if decision.desired != model.desired:
            for node_id in set(decision.desired) - set(model.desired):
                ledger.expect(node_id, model)
            placements.append(Placement(model, decision.desired, decision.reason))
            if len(placements) == limit:
                break
    return placements


def decide(view: View, ledger: Ledger, model: Model) -> Decision:
    """Where one model should be."""
    live = [n for n in model.confirmed if n in view.sites and view.sites[n].available]
    pinned = [n for n in model.pinned if n in view.sites]
    counted = [n for n in {*model.desired, *pinned} if _counts(view, model, n, live)]
    want, reason = _want(view, model, counted)
    if not any(view.sites[n].online for n in model.confirmed if n in view.sites):
        return Decision(want, reason, model.desired)  # there is nobody to copy from

    def tier(node_id: NodeId) -> int:
        """What is best to keep: a copy that serves, then one that will, then one to come."""
        if node_id in pinned:
            return 0
        if node_id in live:
            return 1 if node_id in model.desired else 2
        if view.sites[node_id].available and not live:
            return 2
        if node_id in model.confirmed:
            return 3
        return 4 if view.sites[node_id].available else 5

    pool = {*counted, *live}
    chosen: list[NodeId] = []
    hosts: Counter[str] = Counter()

    def choose(node_id: NodeId) -> None:
        chosen.append(node_id)
        hosts[view.sites[node_id].host] += 1
        pool.discard(node_id)

    def choose_best(nodes: Iterable[NodeId]) -> None:
        choose(
            min(nodes, key=lambda n: (tier(n), hosts[view.sites[n].host], _roomiest(view.sites[n])))
        )

    while pool and len(chosen) < max(want, sum(n in counted for n in pinned)):
        choose_best(pool)
    short = want - len(chosen)
    if not any(view.sites[n].available for n in chosen):
        # Somebody must be there to serve it.
        if there := [n for n in pool if view.sites[n].available]:
            choose_best(there)
        else:
            short = max(1, short)
    if short > 0:
        others = [site for site in view.sites.values() if site.node_id not in chosen]
        fit = [site for site in others if _obstacle(ledger, model, site) is None]
        if not fit and not any(view.sites[n].available for n in chosen):
            # The only copy goes wherever it can be kept.
            fit = [
                site for site in others if _obstacle(ledger, model, site, keep_only=True) is None
            ]
            short = 1
        for _ in range(min(short, len(fit))):
            best = min(fit, key=lambda site: (hosts[site.host], _rank(ledger, model, site)))
            fit.remove(best)
            choose(best.node_id)
    # Nobody took the place of some that are away, so they are waited for.
    taken = {*counted, *chosen, *pinned}
    away = sorted(n for n in model.desired if n in view.sites and n not in taken)
    is_passive = not view.policy.automatic and not model.replicas
    total = max(want, len(counted) + len(away)) if is_passive else want
    return Decision(
        want, reason, tuple(sorted({*chosen, *pinned, *away[: max(0, total - len(chosen))]}))
    )


def sole_copies(view: View, node_id: NodeId) -> list[Model]:
    """The models that nobody could serve, and nobody could copy, without that node."""
    return [
        model
        for _, model in sorted(view.models.items())
        if node_id in model.confirmed
        and not any(
            n != node_id and n in view.sites and view.sites[n].available for n in model.confirmed
        )
    ]


def can_move(view: View, model: Model, node_id: NodeId) -> bool:
    """Whether another node can take the only copy, or is getting one."""
    decision = decide(view, Ledger(view), model)
    return any(n != node_id and view.sites[n].available for n in decision.desired)


def explain(view: View, model: Model) -> Whereabouts:
    """Why the model is where it is: one verdict for each node."""
    ledger = Ledger(view)
    decision = decide(view, ledger, model)
    verdicts = [_verdict(ledger, model, decision, site) for site in view.sites.values()]
    order = ("holds", "fetching", "waiting", "spare", "none")
    verdicts.sort(
        key=lambda v: (
            order.index(v.state),
            math.inf if v.score_s is None else v.score_s,
            v.node_id,
        )
    )
    return Whereabouts(decision.want, decision.reason, tuple(verdicts))


def base_count(policy: Policy, model: Model, sites: int) -> tuple[int, str]:
    """How many copies a model has without regard to demand, and why."""
    pins = len(model.pinned)
    if model.replicas:
        count, why = model.replicas, f"{model.replicas} asked for"
    elif policy.automatic:
        count = min(policy.default_replicas, sites)
        why = f"{count} by default"
        if count < policy.default_replicas:
            why = f"{count} of {policy.default_replicas} by default, for want of nodes"
    else:
        count, why = 1, "the first copy (automatic distribution is off)"
    if pins > count:
        count, why = pins, f"{pins} nodes asked for by name"
    return max(1, count), why


def _want(view: View, model: Model, counted: list[NodeId]) -> tuple[int, str]:
    base, reason = base_count(view.policy, model, len(view.sites))
    have = len(counted)
    if not view.policy.automatic:
        if not model.replicas and have > base:
            return have, "as many as there are (automatic distribution is off)"
        return base, reason
    demand = view.demand.get(model.name)
    recent, lasting = (demand.recent, demand.lasting) if demand else (0.0, 0.0)
    hot = view.policy.hot_load
    whole = set(counted) <= set(model.confirmed)  # a copy that still comes will help by itself
    if have >= base and whole and recent > hot * have:
        said = f"{recent:.1f} requests at once are over {hot:g} a copy"
        return have + 1, f"{reason}, {have + 1 - base} more: {said}"
    # So many stay as are needed to have less demand than what lets one go.
    needed = min(have, int(max(recent, lasting) / (COOL_SHARE * hot)) + 1)
    if needed > base:
        said = f"{max(recent, lasting):.1f} requests at once lately"
        return needed, f"{reason}, {needed - base} more: {said}"
    return base, reason


def _counts(view: View, model: Model, node_id: NodeId, live: list[NodeId]) -> bool:
    """Whether a node that should hold the model counts as one of the copies."""
    site = view.sites.get(node_id)
    if site is None:
        return False
    if site.available:
        refuses = model.name in site.no_room and node_id not in {*model.confirmed, *model.pinned}
        return not refuses
    if site.away_s > view.policy.lost_after_s:
        return False
    # It may be for a moment only, so nothing moves; but what nobody can serve does, at once.
    if site.draining:
        return bool(live) and node_id in model.confirmed
    return bool(live) or node_id in model.confirmed


def _obstacle(ledger: Ledger, model: Model, site: Site, *, keep_only: bool = False) -> str | None:
    """Why the node cannot get a copy now. `keep_only`: it need not be able to run it."""
    if not site.online:
        return "it is offline"
    if site.draining:
        return "it drains"
    missing = ledger.missing(site.node_id, model)
    room = site.disk_free - ledger.coming_bytes[site.node_id] - KEEP_FREE_BYTES
    if missing and model.name in site.no_room:
        return "it had no room for it"
    if missing > room:
        return (
            f"too little disk: {missing / GB:.1f} GB are missing there, and "
            f"{max(0, room) / GB:.1f} GB may be filled"
        )
    if memory_needed(model) > site.memory and not keep_only:
        return (
            f"too little memory: it needs {memory_needed(model) / GB:.1f} GB, and the node has "
            f"{site.memory / GB:.1f} GB"
        )
    if ledger.coming[site.node_id] >= MAX_COMING:
        return f"{ledger.coming[site.node_id]} other models are on their way to it"
    return None


def _rank(ledger: Ledger, model: Model, site: Site) -> tuple[int, int, NodeId]:
    """Cheapest first, in steps of a factor of two and no less than a second: measured rates are
    not finer than that, and the same node would get everything."""
    cost = round(math.log2(max(1.0, ledger.cost_s(site, model))))
    return (cost, ledger.coming_bytes[site.node_id] - site.disk_free, site.node_id)


def _roomiest(site: Site) -> tuple[int, NodeId]:
    return (-site.disk_free, site.node_id)


def _urgency(view: View, key: str, model: Model) -> tuple[int, int, str]:
    live = sum(n in view.sites and view.sites[n].available for n in model.confirmed)
    return (live, model.size, key)


def _verdict(ledger: Ledger, model: Model, decision: Decision, site: Site) -> Verdict:
    node_id = site.node_id
    holds, desired = node_id in model.confirmed, node_id in decision.desired
    named = "asked for by name" if node_id in model.pinned else decision.reason
    away = "" if site.online else "; it is offline"
    cost: float | None = round(ledger.cost_s(site, model), 3)
    if holds and site.draining:
        spare = "" if desired else ", and needs its copy no more"
        return Verdict(node_id, "holds", desired, None, f"it drains{spare}{away}")
    if holds and desired:
        return Verdict(node_id, "holds", True, cost, f"{named}{away}")
    if holds:
        return Verdict(node_id, "spare", False, cost, f"more than needed ({decision.reason}){away}")
    if desired and not site.online:
        return Verdict(node_id, "waiting", True, None, f"{named}; it fetches it when it is back")
    if desired:
        state = "fetching" if node_id in model.desired else "none"
        cheapest = "" if node_id in model.pinned else "; among the cheapest"
        return Verdict(node_id, state, True, cost, f"{named}{cheapest}")
    obstacle = _obstacle(ledger, model, site)
    if obstacle is not None:
        return Verdict(node_id, "none", False, None, obstacle)
    return Verdict(node_id, "none", False, cost, f"not needed ({decision.reason})")


def _typical(measured: Iterable[float], assumed: float) -> float:
    """What to take for a node that was not measured: the middle of those that were."""
    known = [value for value in measured if value > 0]
    return median(known) if known else assumed
