"""The messages of the WebSocket, as types: for the OpenAPI document, and held against every
message that is sent in the tests.

Times are Unix seconds. `DESCRIBED` says of each message when it is sent.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from ollamad.api.schemas import ClusterStatus, Time
from ollamad.core.admission import QueuedRequest
from ollamad.core.alerts import AlertKind, Level
from ollamad.core.events import ModelEventKind, NodeEventKind
from ollamad.core.transfers import TransferType

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType

Channel = Literal["metrics", "cluster", "models", "nodes", "transfers", "alerts", "queue", "logs"]
CHANNELS: tuple[str, ...] = get_args(Channel)


# From the client


class WsPing(msgspec.Struct, frozen=True):
    type: Literal["ping"]


class WsSubscribe(msgspec.Struct, frozen=True):
    type: Literal["subscribe"]
    channel: Channel


class WsUnsubscribe(msgspec.Struct, frozen=True):
    type: Literal["unsubscribe"]
    channel: Channel


# From the server


class WsPong(msgspec.Struct, frozen=True):
    type: Literal["pong"]


class WsAck(msgspec.Struct, frozen=True):
    type: Literal["subscription_ack"]
    channel: Channel
    status: Literal["subscribed", "unsubscribed"]


class WsError(msgspec.Struct, frozen=True):
    type: Literal["error"]
    error: str
    code: Literal["INVALID_JSON", "INVALID_MESSAGE", "UNKNOWN_TYPE", "UNKNOWN_CHANNEL", "FORBIDDEN"]


class WsDropped(msgspec.Struct, frozen=True):
    type: Literal["dropped"]
    count: int


class WsMetricsData(msgspec.Struct, frozen=True):
    """Percentages, and counts of the cluster."""

    cpu: float
    memory: float
    network: float
    nodes: int
    models: int
    peers: int
    nodes_online: int


class WsMetrics(msgspec.Struct, frozen=True):
    type: Literal["metrics"]
    data: WsMetricsData
    timestamp: int


class WsClusterStatus(msgspec.Struct, frozen=True):
    type: Literal["cluster_status"]
    data: ClusterStatus


class WsNodeData(msgspec.Struct, frozen=True):
    address: str
    status: str
    name: str


class WsNodeEvent(msgspec.Struct, frozen=True):
    type: Literal["node_event"]
    event_type: NodeEventKind
    node_id: str
    data: WsNodeData
    timestamp: int


class WsModelData(msgspec.Struct, frozen=True):
    """Of a transfer there is also how far it is; `speed` in bytes per second, `eta` in seconds."""

    node_id: str
    status: str
    transfer_id: str | Unset = UNSET
    type: TransferType | Unset = UNSET
    progress: float | Unset = UNSET
    speed: int | Unset = UNSET
    eta: int | Unset | None = UNSET
    bytes_done: int | Unset = UNSET
    bytes_total: int | Unset = UNSET
    peer_id: str | Unset = UNSET
    error: str | Unset = UNSET


class WsModelEvent(msgspec.Struct, frozen=True):
    type: Literal["model_event"]
    event_type: ModelEventKind
    model_name: str
    data: WsModelData
    timestamp: int


class WsAlert(msgspec.Struct, frozen=True):
    """`alert` says what, `subject` of which node or model."""

    type: Literal["alert"]
    level: Level
    message: str
    timestamp: int
    alert: AlertKind
    subject: str
    state: Literal["raised", "cleared"]


class WsQueueData(msgspec.Struct, frozen=True):
    waiting: int
    requests: Sequence[QueuedRequest]


class WsQueueStatus(msgspec.Struct, frozen=True):
    type: Literal["queue_status"]
    data: WsQueueData
    timestamp: int


class WsLogData(msgspec.Struct, frozen=True):
    """`dropped`: lines before it that came too fast."""

    level: str
    logger: str
    message: str
    time: Time
    dropped: int | Unset = UNSET


class WsLog(msgspec.Struct, frozen=True):
    type: Literal["log"]
    data: WsLogData
    timestamp: int


FROM_CLIENT = (WsPing, WsSubscribe, WsUnsubscribe)
# Of each message of the server the channels that bring it, and when.
DESCRIBED: dict[Any, tuple[tuple[str, ...], str]] = {
    WsClusterStatus: (("cluster",), "on connect, and when something in it changes"),
    WsMetrics: (("metrics",), "on connect, and every 5 s"),
    WsNodeEvent: (("nodes",), "at once; `leader_changed` also on `cluster`"),
    WsModelEvent: (("models", "transfers"), "at once; of transfers each second"),
    WsAlert: (("alerts",), "raised once and cleared once; on subscribing those that stand"),
    WsQueueStatus: (("queue",), "each second while requests wait at this node"),
    WsLog: (("logs",), "lines of this node's log; admins only"),
    WsPong: ((), "after `ping`"),
    WsAck: ((), "after `subscribe` and `unsubscribe`"),
    WsError: ((), "after what is not understood; the socket stays open"),
    WsDropped: ((), "after messages that were dropped, since they were not read in time"),
}


def tables() -> tuple[str, str]:
    """What a client sends, and what the server does, as tables in Markdown."""
    sent = [("message", "fields")]
    sent += [(f"`{_type_of(kind)}`", _fields(kind)) for kind in FROM_CLIENT]
    heard = [("message", "fields", "channels", "when")]
    for kind, (channels, when) in DESCRIBED.items():
        shown = ", ".join(f"`{channel}`" for channel in channels) or "-"
        heard.append((f"`{_type_of(kind)}`", _fields(kind), shown, when))
    return _table(sent), _table(heard)


def _type_of(kind: Any) -> str:
    [name] = get_args(kind.__annotations__["type"])
    return str(name)


def _fields(kind: Any) -> str:
    """The fields beside `type`; those of `data` in braces, those that may be absent with `?`."""
    shown = []
    for field in msgspec.structs.fields(kind):
        if field.name == "type" and not kind.__name__.endswith("Data"):
            continue
        name = field.name if field.required else f"{field.name}?"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            name += " {" + _fields(field.type) + "}"
        shown.append(name)
    return ", ".join(shown) or "-"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
