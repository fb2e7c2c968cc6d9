"""What happened in the cluster, told by comparing what is with what was.

Every node knows the replicated state and hears every heartbeat, so each derives the same events
by itself, and a client hears of the whole cluster from whatever node it is connected to. Pure:
a `Picture` is one moment as one node sees it, and the events are what differs between two.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ollamad.core.ids import NodeId
from ollamad.core.state import Member, Model
from ollamad.core.transfers import Status, Transfer

ModelEventKind = Literal[
    "download_started",
    "download_progress",
    "download_completed",
    "download_failed",
    "model_replicated",
    "model_deleted",
    "model_loaded",
    "model_unloaded",
]
NodeEventKind = Literal[
    "node_online",
    "node_offline",
    "node_joined",
    "node_left",
    "node_draining",
    "node_undrained",
    "leader_changed",
]

NOBODY = NodeId("")


@dataclass(frozen=True, slots=True)
class Picture:
    """The cluster at one moment, as one node sees it. The mappings are copies: they stay."""

    members: Mapping[NodeId, Member]
    models: Mapping[str, Model]  # by name key
    online: frozenset[NodeId]
    loaded: frozenset[tuple[NodeId, str]]  # which node has which model in memory, by name
    leader: NodeId | None


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """Something happened to a node; `node_id` is empty when a leader was lost."""

    kind: NodeEventKind
    node_id: NodeId
    name: str = ""
    address: str = ""
    status: str = "offline"  # the node's status after it, as `GET /nodes` has it


@dataclass(frozen=True, slots=True)
class ModelEvent:
    """Something happened to a model. `node_id`: where; empty when it is everywhere."""

    kind: ModelEventKind
    model_name: str
    node_id: NodeId
    status: str
    transfer: Transfer | None = None  # of the downloads


def node_events(before: Picture, after: Picture) -> list[NodeEvent]:
    """Who came, went, is drained or leads. A node joins before it is online."""
    events = []

    def tell(kind: NodeEventKind, member: Member) -> None:
        status = "draining" if member.draining else "online"
        if member.id not in after.online or member.id not in after.members:
            status = "offline"
        events.append(NodeEvent(kind, member.id, member.name, member.api_address, status))

    for node_id, member in before.members.items():
        if node_id not in after.members:
            tell("node_left", member)
    for node_id, member in after.members.items():
        known = before.members.get(node_id)
        if known is None:
            tell("node_joined", member)
        was_online = known is not None and node_id in before.online
        if (node_id in after.online) != was_online:
            tell("node_offline" if was_online else "node_online", member)
        if member.draining != (known is not None and known.draining):
            tell("node_draining" if member.draining else "node_undrained", member)
    if after.leader != before.leader:
        leader = after.members.get(after.leader or NOBODY)
        if leader is not None:
            tell("leader_changed", leader)
        else:
            events.append(NodeEvent("leader_changed", after.leader or NOBODY))
    return events


def model_events(before: Picture, after: Picture) -> list[ModelEvent]:
    """Which copies of models there are more, which models are gone, loaded and unloaded."""
    events = []
    for key, model in before.models.items():
        if key not in after.models:
            events.append(ModelEvent("model_deleted", model.name, NOBODY, "deleted"))
    for key, model in after.models.items():
        known = before.models.get(key)
        # A replaced model is another one: what was a copy is none of it.
        had = known.confirmed if known is not None and known.digest == model.digest else ()
        events += [
            ModelEvent("model_replicated", model.name, node_id, "available")
            for node_id in model.confirmed
            if node_id not in had
        ]
    for node_id, name in sorted(after.loaded - before.loaded):
        events.append(ModelEvent("model_loaded", name, node_id, "loaded"))
    for node_id, name in sorted(before.loaded - after.loaded):
        events.append(ModelEvent("model_unloaded", name, node_id, "unloaded"))
    return events


_ENDED: dict[Status, ModelEventKind] = {
    "completed": "download_completed",
    "failed": "download_failed",
    "cancelled": "download_failed",
}
_STATUS = {"pending": "downloading", "active": "downloading"}


def transfer_events(
    before: Mapping[str, Transfer], after: Iterable[Transfer], *, since: float
) -> list[ModelEvent]:
    """How transfers went on. Of those that are new here, only what happened after `since` (Unix
    seconds) is told: the list also has those that ended long ago.

    A transfer that began and ended between two looks is told of as both.
    """
    events = []

    def tell(kind: ModelEventKind, transfer: Transfer) -> None:
        status = _STATUS.get(transfer.status, transfer.status)
        events.append(ModelEvent(kind, transfer.model_name, transfer.node_id, status, transfer))

    for transfer in sorted(after, key=lambda transfer: transfer.started_at):
        known = before.get(transfer.id)
        if known is None and transfer.started_at >= since:
            tell("download_started", transfer)
        ended = _ENDED.get(transfer.status)
        if ended is not None:
            is_news = known.finished_at is None if known else (transfer.finished_at or 0) >= since
            if is_news:
                tell(ended, transfer)
        elif known is not None and (
            (transfer.bytes_done, transfer.status) != (known.bytes_done, known.status)
        ):
            tell("download_progress", transfer)
    return events
