"""A model on its way to a node: what `GET /transfers` shows, also between nodes."""

from typing import Literal

import msgspec

from ollamad.core.ids import NodeId

# From an origin; from a peer; to a registry.
TransferType = Literal["download", "replication", "upload"]
Status = Literal["pending", "active", "completed", "failed", "cancelled"]


class Transfer(msgspec.Struct, frozen=True):
    """A transfer as it stands now; the keys of the API. Times are Unix seconds."""

    id: str
    model_name: str
    type: TransferType
    status: Status
    progress: float  # 0 to 100
    speed: float  # bytes/s over the last seconds; over the whole time once it is finished
    eta: float | None  # seconds; None when unknown
    peer_id: str  # the node that sends, "" for an origin
    node_id: NodeId  # the node that receives
    bytes_done: int  # verified
    bytes_total: int  # 0 when unknown
    error: str
    started_at: float
    finished_at: float | None
    digest: str = ""  # "sha256:…" of the model, or of the file that it comes in; "" if unknown
    warning: str = ""  # of a completed one: what speaks against using the model
    # Digests and sizes of its files, which move one after the other; () in lists, or if unknown.
    layers: tuple[tuple[str, int], ...] = ()
