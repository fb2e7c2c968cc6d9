"""Keeps every model where it should be: the loop around `core.placement`.

Every node looks at the cluster in the same way, so that any of them can explain it; only the
leader changes anything. It names the nodes that should hold a model, and says on what it decided,
so that a decision that came too late is refused. The nodes do the rest by themselves (`share.py`).
"""

import dataclasses
import logging
from collections import defaultdict
from statistics import median

import trio

from ollamad.api.services import ServiceError
from ollamad.cluster import Cluster
from ollamad.core.commands import PlaceReplicas, Rejected
from ollamad.core.gossip import FANOUT
from ollamad.core.ids import NodeId, short
from ollamad.core.measures import Demand
from ollamad.core.placement import (
    Policy,
    Rates,
    Site,
    View,
    can_move,
    plan,
    sole_copies,
)
from ollamad.core.presence import BEAT_INTERVAL_S, Beat
from ollamad.core.speeds import short_digest
from ollamad.core.state import Member, Model

log = logging.getLogger(__name__)

INTERVAL_S = 1.0  # how often everything is looked at when nothing is told
BURST_S = 0.1  # changes come together
# A new leader may not have heard everybody yet: three heartbeats, and as long as it takes until
# everybody had its turn in a cluster that gossips.
SETTLE_S = 3.0
STREAMS_POLL_S = 0.25
BEAT_WAIT_S = 1.5  # until what a node tells of itself is of after it began to drain
DRAIN_MARGIN_S = 5.0  # for streams to move after the timeout
FAULT_PAUSE_S = 30.0  # after a bug showed itself
IN_THREAD = 5_000  # models times nodes: from there on a plan takes longer than the loop may


class Reconciler:
    """Where models are and should be.

    Args:
      policy: as this node's settings have it; `automatic` is replaced by the cluster's.
      drain_timeout_s: how long a node that drains may keep its streams.
    """

    def __init__(self, cluster: Cluster, policy: Policy, *, drain_timeout_s: float = 60.0) -> None:
        self._cluster = cluster
        self._drain_timeout_s = drain_timeout_s
        self.policy = policy
        self._away_since: dict[NodeId, float] = {}
        self._leads_since: float | None = None
        self._said = ""
        self._thread = trio.CapacityLimiter(1)

    def view(self) -> View:
        """The cluster as this node knows it now."""
        state = self._cluster.state
        sizes = {short_digest(model.digest): model.size for model in state.models.values()}
        sites: dict[NodeId, Site] = {}
        demand: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        now = trio.current_time()
        for node_id, member in state.members.items():
            presence = self._cluster.presence(node_id)
            sites[node_id] = self._site(member, presence.online, presence.beat, sizes, now)
            for told in presence.beat.demand if presence.online else ():
                recent, lasting = demand[told.model]
                demand[told.model] = (recent + told.recent, lasting + told.lasting)
        for node_id in self._away_since.keys() - sites.keys():
            del self._away_since[node_id]
        automatic = state.settings.auto_distribution
        return View(
            sites,
            dict(state.models),
            {name: Demand(name, *means) for name, means in demand.items()},
            dataclasses.replace(self.policy, automatic=automatic),
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at the cluster all the time and, while leading, change it; until cancelled."""
        task_status.started()
        while True:
            changed = self._cluster.changes.next()
            try:
                view = self.view()
                if self._may_decide():
                    await self._follow(view)
            except Exception:
                # It would end this daemon, and the next leader's, for models that can wait.
                log.exception("placing models failed; the next try is in %.0f s", FAULT_PAUSE_S)
                await trio.sleep(FAULT_PAUSE_S)
            with trio.move_on_after(INTERVAL_S):
                await changed.wait()
            await trio.sleep(BURST_S)

    async def hand_over(self, node_id: NodeId, timeout_s: float) -> None:
        """Wait until a draining node is the only one for no model and serves nobody.

        The leader moves the copies, the node its streams.

        Raises:
          ServiceError: 409 with what would be lost; at once where nobody can take it.
        """
        with trio.move_on_after(timeout_s):
            while True:
                changed = self._cluster.changes.next()
                if not self._cluster.is_online(node_id):
                    self._check_loss(node_id)
                    return
                view = self.view()
                sole = sole_copies(view, node_id)
                if not sole:
                    with trio.move_on_after(self._drain_timeout_s + DRAIN_MARGIN_S):
                        await self._until_idle(node_id)
                    return
                if stuck := [model for model in sole if not can_move(view, model, node_id)]:
                    raise self._would_lose(stuck, "no other node can take it now")
                with trio.move_on_after(INTERVAL_S):
                    await changed.wait()
        view = self.view()
        if sole := sole_copies(view, node_id):
            late = f"that was not copied within {timeout_s:.0f} s"
            raise self._would_lose(sole, late, "HAND_OVER_TIMEOUT")

    # Inside.

    def _check_loss(self, node_id: NodeId) -> None:
        models = self._cluster.state.models.values()
        if lost := [model for model in models if model.confirmed == (node_id,)]:
            raise self._would_lose(lost, "it is offline: start it and try again, or do without")

    def _site(
        self, member: Member, online: bool, beat: Beat, sizes: dict[str, int], now: float
    ) -> Site:
        if online and not member.draining:
            self._away_since.pop(member.id, None)
        loads = [sizes[s.model] / s.load_s for s in beat.speeds if s.load_s and s.model in sizes]
        capacity = member.capacity
        return Site(
            node_id=member.id,
            host=member.p2p_address.rpartition(":")[0],
            online=online,
            draining=member.draining,
            away_s=(
                0.0
                if online and not member.draining
                else now - self._away_since.setdefault(member.id, now)
            ),
            disk_free=beat.usage.disk_free,
            memory=capacity.memory_bytes + capacity.gpu_memory_bytes,
            no_room=frozenset(beat.no_room),
            rates=Rates(beat.receive_rate, median(loads) if loads else 0.0),
        )

    def _may_decide(self) -> bool:
        now = trio.current_time()
        if not (self._cluster.is_leader and self._cluster.has_quorum):
            self._leads_since = None
            return False
        if self._leads_since is None:
            self._leads_since = now
        turns = len(self._cluster.state.members) / FANOUT
        return now - self._leads_since >= max(SETTLE_S, turns * BEAT_INTERVAL_S)

    async def _follow(self, view: View) -> None:
        if len(view.models) * len(view.sites) > IN_THREAD:
            placements = await trio.to_thread.run_sync(plan, view, limiter=self._thread)
        else:
            placements = plan(view)
        for placement in placements:
            model = placement.model
            command = PlaceReplicas(model.name, model.digest, model.desired, placement.desired)
            try:
                outcome = await self._cluster.propose(command)
            except ServiceError as error:
                self._say(f"placing {model.name}: {error}")
                return
            if isinstance(outcome, Rejected):
                log.debug("placing %s: %s", model.name, outcome.message)
                continue
            log.info(
                "%s should be on %s instead of %s: %s",
                model.name,
                self._names(placement.desired),
                self._names(model.desired) or "no node",
                placement.reason,
            )
        self._said = ""

    def _say(self, text: str) -> None:
        """Once, however often it is tried."""
        if text != self._said:
            log.info("%s", text)
        self._said = text

    def _names(self, nodes: tuple[NodeId, ...]) -> str:
        members = self._cluster.state.members
        return ", ".join(members[n].name if n in members else short(n) for n in nodes)

    async def _until_idle(self, node_id: NodeId) -> None:
        """Wait until a node that drains runs no answer and is waited for by no client."""
        await trio.sleep(BEAT_WAIT_S)
        while True:
            presence = self._cluster.presence(node_id)
            beat = presence.beat
            running = sum(loaded.busy + loaded.queued for loaded in beat.loaded)
            if not presence.online or not (running or beat.active_requests):
                return
            await trio.sleep(STREAMS_POLL_S)

    def _would_lose(
        self, models: list[Model], why: str, code: str = "SOLE_REPLICA"
    ) -> ServiceError:
        names = ", ".join(model.name for model in models)
        size = sum(model.size for model in models)
        return ServiceError(
            409,
            code,
            f"only that node holds {names} ({size / 1e9:.1f} GB), and {why}; free disk on "
            "another node, start one, or delete what is not needed. With `force` it leaves "
            "nevertheless, and the cluster loses them",
            {"models": [model.name for model in models], "size": size},
        )
