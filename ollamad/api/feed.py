"""What the WebSockets of this node are told: the cluster's events, alerts, metrics and log.

It looks at the cluster when its state or somebody's presence changes, and once a second for what
heartbeats tell; `core/events.py` and `core/alerts.py` say what that means. It asks the others for
their transfers only while somebody listens.
"""

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import trio

from ollamad.api.calls import Api, rfc3339
from ollamad.api.status import describe_cluster
from ollamad.core.admission import QueuedRequest
from ollamad.core.alerts import Alert, AlertBook, findings
from ollamad.core.events import (
    ModelEvent,
    NodeEvent,
    Picture,
    model_events,
    node_events,
    transfer_events,
)
from ollamad.core.transfers import Transfer

METRICS_INTERVAL_S = 5.0
LOOK_INTERVAL_S = 1.0  # heartbeats bring usage and loaded models so often
# Looks are at least so far apart: a burst of writes is one look, and its events are still prompt.
SETTLE_S = 0.05
TRANSFERS_INTERVAL_S = 1.0
QUEUE_INTERVAL_S = 1.0
# Lines of the log that wait to be told; more at once are dropped and counted.
MAX_LOG_LINES = 200


def queue_message(queue: Sequence[QueuedRequest], wall: int) -> dict[str, Any]:
    """Where each request that waits at this node stands."""
    requests = [msgspec.structs.asdict(request) for request in queue]
    data = {"waiting": len(requests), "requests": requests}
    return {"type": "queue_status", "timestamp": wall, "data": data}


class Feed:
    """Publishes to the hub what happens. `run` is its life."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._services = api.services
        self._hub = api.hub
        self._alerts = AlertBook()

    # What a session is told without having asked (`websocket.Greeter`).

    def greetings(self) -> Iterable[dict[str, Any]]:
        yield self._cluster_status()
        yield self._metrics()

    def on_subscribe(self, channel: str) -> Iterable[dict[str, Any]]:
        """An alert that was raised before somebody listened still stands."""
        if channel == "alerts":
            for alert in self._alerts.standing():
                yield alert_message(alert)

    # Tasks.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_metrics)
            nursery.start_soon(self._tell_transfers)
            nursery.start_soon(self._tell_log)
            nursery.start_soon(self._tell_queue)
            task_status.started()
            await self._tell_state()

    async def _tell_state(self) -> None:
        cluster = self._services.cluster
        before = self._picture()
        status = self._cluster_status()
        trust = self._trusted()
        while True:
            with trio.move_on_after(LOOK_INTERVAL_S):
                await cluster.changed().wait()
            await trio.sleep(SETTLE_S)
            after = self._picture()
            wall = int(self._services.wall())
            for node_event in node_events(before, after):
                leads = node_event.kind == "leader_changed"
                channels = ("nodes", "cluster") if leads else ("nodes",)
                await self._hub.publish(node_message(node_event, wall), *channels)
            for model_event in model_events(before, after):
                await self._hub.publish(model_message(model_event, wall), "models")
            before = after
            if (now_status := self._cluster_status()) != status:
                status = now_status
                await self._hub.publish(status, "cluster", key="cluster")
            if (now_trusted := self._trusted()) != trust:
                trust = now_trusted
                self._hub.distrust_all()
            await self._tell_alerts()

    async def _tell_alerts(self) -> None:
        cluster = self._services.cluster
        if not cluster.state.cluster_id:
            return
        found = findings(
            cluster.state,
            {node_id: cluster.presence(node_id) for node_id in cluster.state.members},
            has_quorum=cluster.has_quorum,
        )
        for alert in self._alerts.look(found, self._services.monotonic(), self._services.wall()):
            await self._hub.publish(alert_message(alert), "alerts")

    async def _tell_metrics(self) -> None:
        while True:
            await trio.sleep(METRICS_INTERVAL_S)
            if self._hub.wants("metrics"):
                await self._hub.publish(self._metrics(), "metrics", key="metrics")

    async def _tell_transfers(self) -> None:
        known: dict[str, Transfer] = {}
        since = math.inf
        while True:
            if not self._hub.wants("models", "transfers"):
                since = math.inf
                await self._hub.interest.wait()
                continue
            if since == math.inf:
                # Of what ended before anybody listened nothing is told.
                since, known = self._services.wall(), {}
            listed = await self._services.library.transfers()
            wall = int(self._services.wall())
            for event in transfer_events(known, listed, since=since):
                assert event.transfer is not None
                progress = event.kind == "download_progress"
                key = f"progress {event.transfer.id}" if progress else ""
                message = model_message(event, wall)
                await self._hub.publish(message, "models", "transfers", key=key)
            known = {transfer.id: transfer for transfer in listed}
            await trio.sleep(TRANSFERS_INTERVAL_S)

    async def _tell_queue(self) -> None:
        """Who waits at this node, every second, and once when nobody does any more."""
        told = 0
        while True:
            await trio.sleep(QUEUE_INTERVAL_S)
            if self._hub.wants("queue"):
                queue = self._services.inference.queue()
                if queue or told:
                    message = queue_message(queue, int(self._services.wall()))
                    await self._hub.publish(message, "queue", key="queue")
                told = len(queue)

    async def _tell_log(self) -> None:
        send, receive = trio.open_memory_channel[logging.LogRecord](MAX_LOG_LINES)
        tap = _Tap(send, wanted=lambda: self._hub.wants("logs"))
        logger = logging.getLogger("ollamad")
        logger.addHandler(tap)
        try:
            async for record in receive:
                await self._hub.publish(log_message(record, tap.take_dropped()), "logs")
        finally:
            logger.removeHandler(tap)

    # What there is to tell.

    def _picture(self) -> Picture:
        cluster = self._services.cluster
        state = cluster.state
        presences = {node_id: cluster.presence(node_id) for node_id in state.members}
        online = {node_id: one for node_id, one in presences.items() if one.online}
        return Picture(
            members=dict(state.members),
            models=dict(state.models),
            online=frozenset(online),
            # What a node that went had in memory is gone with it.
            loaded=frozenset(
                (node_id, loaded.name)
                for node_id, one in online.items()
                for loaded in one.beat.loaded
            ),
            leader=cluster.leader(),
        )

    def _trusted(self) -> tuple[Any, ...]:
        """Changes whenever a token may have lost what it was good for."""
        state = self._services.cluster.state
        last = next(reversed(state.revoked), "")
        return (dict(state.users), dict(state.api_keys), len(state.revoked), last)

    def _cluster_status(self) -> dict[str, Any]:
        return {"type": "cluster_status", "data": describe_cluster(self._api)}

    def _metrics(self) -> dict[str, Any]:
        services = self._services
        state, host = services.cluster.state, services.host
        online = [node_id for node_id in state.members if services.cluster.presence(node_id).online]
        return {
            "type": "metrics",
            "data": {
                "cpu": round(host.cpu_percent(), 2),
                "memory": round(host.memory_percent(), 2),
                "network": round(host.network_percent(), 2),
                "nodes": len(state.members),
                "models": len(state.models),
                "peers": len([one for one in online if one != services.cluster.node_id]),
                "nodes_online": len(online),
            },
            "timestamp": int(services.wall()),
        }


def node_message(event: NodeEvent, timestamp: int) -> dict[str, Any]:
    """A node's event in the document's shape."""
    return {
        "type": "node_event",
        "event_type": event.kind,
        "node_id": event.node_id,
        "data": {"address": event.address, "status": event.status, "name": event.name},
        "timestamp": timestamp,
    }


def model_message(event: ModelEvent, timestamp: int) -> dict[str, Any]:
    """A model's event in the document's shape; of a transfer with how far it is."""
    data: dict[str, Any] = {"node_id": event.node_id, "status": event.status}
    if (transfer := event.transfer) is not None:
        data |= {
            "transfer_id": transfer.id,
            "type": transfer.type,
            "progress": transfer.progress,
            "speed": round(transfer.speed),
            "eta": None if transfer.eta is None else round(transfer.eta),
            "bytes_done": transfer.bytes_done,
            "bytes_total": transfer.bytes_total,
            "peer_id": transfer.peer_id,
        }
        if transfer.error:
            data["error"] = transfer.error
    return {
        "type": "model_event",
        "event_type": event.kind,
        "model_name": event.model_name,
        "data": data,
        "timestamp": timestamp,
    }


def alert_message(alert: Alert) -> dict[str, Any]:
    """An alert in the document's shape, with what a program needs to tell them apart."""
    return {
        "type": "alert",
        "level": alert.level,
        "message": alert.message,
        "timestamp": int(alert.at),
        "alert": alert.kind,
        "subject": alert.subject,
        "state": "raised" if alert.raised else "cleared",
    }


def log_message(record: logging.LogRecord, dropped: int) -> dict[str, Any]:
    """A line of this node's log. `dropped`: lines before it that came too fast."""
    data: dict[str, Any] = {
        "level": record.levelname.lower(),
        "logger": record.name.removeprefix("ollamad."),
        "message": record.getMessage(),
        "time": rfc3339(record.created),
    }
    if dropped:
        data["dropped"] = dropped
    return {"type": "log", "data": data, "timestamp": int(record.created)}


class _Tap(logging.Handler):
    """Hands log lines to the loop while somebody wants them; those of other threads too."""

    def __init__(self, channel: trio.MemorySendChannel[logging.LogRecord], wanted: Any) -> None:
        super().__init__()
        self._channel = channel
        self._wanted = wanted
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not self._wanted():
            return
        if threading.get_ident() == self._thread:
            self._put(record)
        else:
            with suppress(trio.RunFinishedError):  # nobody is left who listens
                self._token.run_sync_soon(self._put, record)

    def take_dropped(self) -> int:
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _put(self, record: logging.LogRecord) -> None:
        # Nothing may be raised here: from another thread it would end the daemon.
        try:
            self._channel.send_nowait(record)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._dropped += 1
