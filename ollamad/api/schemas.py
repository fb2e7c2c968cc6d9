"""What `/api/v1` answers, as types: the OpenAPI document is made of them, and so are the answers.

Times are RFC 3339 in UTC. Keys are those of docs/spec/api.md, and some more.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import msgspec

from ollamad.core.explanation import Explanation
from ollamad.core.inference import Failover
from ollamad.core.placement import Verdict
from ollamad.core.presence import Gpu
from ollamad.core.quota import PERIODS
from ollamad.core.state import ROLES
from ollamad.core.transfers import Status as TransferStatus
from ollamad.core.transfers import TransferType

# Text to Python; the values are told in the document only.
Period = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(PERIODS)})]
RoleName = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(ROLES)})]
Time = Annotated[
    str,
    msgspec.Meta(
        extra_json_schema={"format": "date-time"},
        pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$",
    ),
]


class Done(msgspec.Struct, frozen=True):
    """It was done."""

    message: str


class UserInfo(msgspec.Struct, frozen=True):
    """A user. `id` is the username."""

    id: str
    username: str
    role: RoleName
    created_at: Time


class UserList(msgspec.Struct, frozen=True):
    users: Sequence[UserInfo]


class OneUser(msgspec.Struct, frozen=True):
    user: UserInfo


class KeyUse(msgspec.Struct, frozen=True):
    """What a key has used in the period that runs."""

    requests: int
    tokens: int


class KeyInfo(msgspec.Struct, frozen=True):
    """An API key, without its secret."""

    id: str
    name: str
    role: RoleName
    created_at: Time
    created_by: str
    expires_at: Time | None
    expired: bool
    request_quota: int | None
    token_quota: int | None
    quota_period: Period
    used: KeyUse
    resets_at: Time | None  # when the period ends; null for `total`


class NewKeyInfo(KeyInfo, frozen=True, kw_only=True):
    """A new API key, whole. It is shown this once."""

    key: str

    @classmethod
    def of(cls, info: KeyInfo, key: str) -> Self:
        return cls(**msgspec.structs.asdict(info), key=key)


class KeyList(msgspec.Struct, frozen=True):
    keys: Sequence[KeyInfo]


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every error of `/api/v1`. `code` is for programs; `details` depend on it."""

    error: str
    code: Annotated[str, msgspec.Meta(pattern="^[A-Z][A-Z0-9_]*$")]
    details: dict[str, Any]


# Signing in


class SessionUser(msgspec.Struct, frozen=True):
    """Who a token belongs to. `id` is the username."""

    id: str
    username: str
    role: RoleName


class TokenAnswer(msgspec.Struct, frozen=True):
    """A pair of tokens. `expires_at` is when the access token ends."""

    token: str
    refresh_token: str
    expires_at: Time
    user: SessionUser


class Me(msgspec.Struct, frozen=True):
    user: SessionUser
    expires_at: Time | None


# The node and the cluster


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """`reason` and `code` are there when it is unhealthy."""

    status: Literal["healthy", "unhealthy"]
    timestamp: Time
    uptime: str
    reason: str | msgspec.UnsetType = msgspec.UNSET
    code: str | msgspec.UnsetType = msgspec.UNSET


class Version(msgspec.Struct, frozen=True):
    version: str
    build_time: str
    git_commit: str
    go_version: str
    platform: str
    api_version: str
    python_version: str
    engine_versions: dict[str, str]
    p2p_port: int


class ClusterStatus(msgspec.Struct, frozen=True):
    node_id: str
    is_leader: bool
    leader: str
    peers: int
    status: Literal["healthy", "degraded", "unhealthy"]
    cluster_id: str
    cluster_size: int
    nodes_online: int
    has_quorum: bool
    term: int
    voters: Sequence[str]
    leader_name: str


class Leader(msgspec.Struct, frozen=True):
    leader: str


class ConsensusInfo(msgspec.Struct, frozen=True):
    """Where a node is in the replicated log. `state_hash` is equal where `applied_index` is."""

    node_id: str
    leader: str
    is_leader: bool
    term: int
    voters: Sequence[str]
    has_quorum: bool
    commit_index: int
    applied_index: int
    state_hash: str
    state_age_ms: int | None
    disk_full: bool
    disk_hangs: bool


class Moved(msgspec.Struct, frozen=True):
    """A node joined or left."""

    message: str
    node_id: str


class JoinTokenAnswer(msgspec.Struct, frozen=True):
    token: str
    expires_at: Time
    command: str


class Distribution(msgspec.Struct, frozen=True):
    """Whether the cluster spreads models by itself."""

    enabled: bool


class Configured(msgspec.Struct, frozen=True):
    message: str
    status: str


class SchedulerStats(msgspec.Struct, frozen=True):
    total_requests: int
    completed_requests: int
    failed_requests: int
    queued_requests: int
    average_latency: float


class Metrics(msgspec.Struct, frozen=True):
    """Usage is in percent, latency in milliseconds."""

    node_id: str
    connected_peers: int
    is_leader: bool
    requests_processed: int
    models_loaded: int
    cluster_size: int
    scheduler_stats: SchedulerStats
    uptime: str
    status: Literal["healthy", "unhealthy"]
    cpu_usage: float
    memory_usage: float
    network_usage: float
    requests_per_second: float
    average_latency: int
    active_connections: int
    error_rate: float
    uptime_seconds: float


# Nodes


class NodeCapacity(msgspec.Struct, frozen=True):
    """`*_gb` are 10⁹ bytes, rounded."""

    cpu_cores: int
    memory_gb: int
    disk_gb: int
    gpu_count: int
    gpu_memory_gb: int
    memory_bytes: int
    disk_bytes: int
    gpu_memory_bytes: int


class NodeUsage(msgspec.Struct, frozen=True):
    """`*_usage` are fractions 0 to 1; `cpu` and `memory` percent; `bandwidth` bytes a second."""

    cpu_usage: float
    memory_usage: float
    disk_usage: float
    gpu_usage: float
    cpu: float
    memory: float
    bandwidth: float


class Loaded(msgspec.Struct, frozen=True):
    """A model in a node's memory; sizes in bytes. `expires_at` is null when it stays for ever."""

    name: str
    digest: str
    size: int
    size_vram: int
    context_length: int
    expires_at: Time | None
    slots: int
    busy: int
    queued: int
    engine: str  # what runs it; empty if the node does not say
    engine_reason: str
    size_used: int  # as it was last seen; 0 where that is not known


class DrainInfo(msgspec.Struct, frozen=True):
    """What a node that drains still waits for."""

    done: bool
    answers: int  # that run or wait there
    sole_models: Sequence[str]  # that only it could serve


class NodeInfo(msgspec.Struct, frozen=True):
    id: str
    name: str
    address: str
    status: Literal["online", "offline", "draining"]
    last_seen: Time
    models: Sequence[str]
    capacity: NodeCapacity
    usage: NodeUsage
    draining: bool
    drain: DrainInfo | None  # null: it does not drain
    is_leader: bool
    voter: bool
    version: str
    joined_at: Time
    p2p_address: str
    loaded: Sequence[Loaded]
    gpus: Sequence[Gpu]


class NodeList(msgspec.Struct, frozen=True):
    nodes: Sequence[NodeInfo]


class OneNode(msgspec.Struct, frozen=True):
    node: NodeInfo


# Models and transfers


class ModelDetailsInfo(msgspec.Struct, frozen=True):
    """What the model's own file says."""

    parent_model: str
    format: str
    family: str
    families: Sequence[str]
    parameter_size: str
    quantization_level: str
    context_length: int
    embedding_length: int
    capabilities: Sequence[str]


class ModelSummary(msgspec.Struct, frozen=True):
    """`size` in bytes; `replicas` are the ids of the nodes that hold it, verified."""

    name: str
    size: int
    digest: str
    modified_at: Time
    details: ModelDetailsInfo
    replicas: Sequence[str]
    replicas_wanted: int
    pinned: Sequence[str]  # nodes that were asked for by name


class LayerInfo(msgspec.Struct, frozen=True):
    media_type: str
    digest: str
    size: int


class PlacementInfo(msgspec.Struct, frozen=True):
    """Why a model is where it is."""

    reason: str
    nodes: Sequence[Verdict]


class EngineInfo(msgspec.Struct, frozen=True):
    """What runs a model, and why it."""

    name: str | None
    reason: str


class ModelInfo(ModelSummary, frozen=True):
    """A model with where it is and where it should be."""

    replicas_asked: int | None  # null: the cluster's default
    placement: PlacementInfo
    status: Literal["available", "unavailable", "downloading", "missing"]
    inference_ready: bool
    desired: Sequence[str]
    loaded_on: Sequence[str]
    layers: Sequence[LayerInfo]
    # Of `GET /models/:name` only; null while no node that holds it can be asked.
    engine: EngineInfo | msgspec.UnsetType | None = msgspec.UNSET
    # What it says of itself, there and if it does; else why nobody can be asked.
    license: str | msgspec.UnsetType = msgspec.UNSET
    modelfile: str | msgspec.UnsetType = msgspec.UNSET
    parameters: str | msgspec.UnsetType = msgspec.UNSET
    template: str | msgspec.UnsetType = msgspec.UNSET
    system: str | msgspec.UnsetType = msgspec.UNSET
    messages: Sequence[dict[str, str]] | msgspec.UnsetType = msgspec.UNSET
    renderer: str | msgspec.UnsetType = msgspec.UNSET
    parser: str | msgspec.UnsetType = msgspec.UNSET
    requires: str | msgspec.UnsetType = msgspec.UNSET
    model_info: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    description_error: str | msgspec.UnsetType = msgspec.UNSET


class ModelList(msgspec.Struct, frozen=True):
    models: Sequence[ModelSummary]


class OneModel(msgspec.Struct, frozen=True):
    model: ModelInfo


class ReplicasAnswer(msgspec.Struct, frozen=True):
    message: str
    model: ModelInfo


class Deleted(msgspec.Struct, frozen=True):
    message: str
    request_id: str
    node_id: str


class Download(msgspec.Struct, frozen=True):
    status: str
    model: str
    message: str
    transfer_id: str


class Upload(msgspec.Struct, frozen=True):
    status: str
    model: str
    message: str
    transfer_id: str
    destination: str


class Blob(msgspec.Struct, frozen=True):
    digest: str


class TransferInfo(msgspec.Struct, frozen=True):
    """`progress` 0 to 100, `speed` bytes a second, `eta` seconds or null when unknown."""

    id: str
    model_name: str
    type: TransferType
    status: TransferStatus
    progress: float
    speed: int
    eta: int | None
    peer_id: str
    node_id: str
    bytes_done: int
    bytes_total: int
    error: str
    warning: str  # of a completed one: what speaks against using the model
    started_at: Time
    finished_at: Time | None
    digest: str


class TransferList(msgspec.Struct, frozen=True):
    transfers: Sequence[TransferInfo]


class OneTransfer(msgspec.Struct, frozen=True):
    transfer: TransferInfo


class Cancelled(msgspec.Struct, frozen=True):
    message: str
    id: str


# Answers of models


class LikelyToken(msgspec.Struct, frozen=True):
    """A token and the logarithm of its probability; `bytes` where it is no text alone."""

    token: str
    logprob: float
    bytes: Sequence[int]
    top_logprobs: Sequence["LikelyToken"] | msgspec.UnsetType = msgspec.UNSET


class CalledFunction(msgspec.Struct, frozen=True):
    index: int
    name: str
    arguments: dict[str, Any]


class ToolCallInfo(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction


class AssistantMessage(msgspec.Struct, frozen=True):
    role: str
    content: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: Sequence[ToolCallInfo] | msgspec.UnsetType = msgspec.UNSET


class _Answer(msgspec.Struct, frozen=True):
    """Durations are nanoseconds; the counts are tokens."""

    model: str
    created_at: Time
    done: bool
    done_reason: str
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int
    prompt_cached_count: int
    failovers: Sequence[Failover] | msgspec.UnsetType = msgspec.UNSET
    routing: Explanation | msgspec.UnsetType = msgspec.UNSET
    node_id: str | msgspec.UnsetType = msgspec.UNSET  # of a stream that had to wait
    logprobs: Sequence[LikelyToken] | msgspec.UnsetType = msgspec.UNSET


class _Line(msgspec.Struct, frozen=True):
    """A line of a stream before the last. With `status: queued` it tells that the request waits."""

    model: str
    created_at: Time
    done: Literal[False]
    logprobs: Sequence[LikelyToken] | msgspec.UnsetType = msgspec.UNSET
    token: int | msgspec.UnsetType = msgspec.UNSET  # of a request with an id: how many there were
    status: Literal["queued"] | msgspec.UnsetType = msgspec.UNSET
    position: int | msgspec.UnsetType = msgspec.UNSET
    waiting: int | msgspec.UnsetType = msgspec.UNSET
    estimate_seconds: float | msgspec.UnsetType = msgspec.UNSET


class GenerateLine(_Line, frozen=True, kw_only=True):
    """A line of a stream before the last; with `status: queued` the request waits."""

    response: str
    thinking: str | msgspec.UnsetType = msgspec.UNSET


class ChatLine(_Line, frozen=True, kw_only=True):
    """A line of a stream before the last; with `status: queued` the request waits."""

    message: AssistantMessage


class GenerateAnswer(_Answer, frozen=True, kw_only=True):
    """A whole answer. Of a stream it is the last line; the others have `done: false`."""

    response: str
    context: Sequence[int]
    thinking: str | msgspec.UnsetType = msgspec.UNSET


class ChatAnswer(_Answer, frozen=True, kw_only=True):
    """A whole answer. Of a stream it is the last line; the others have `done: false`."""

    message: AssistantMessage


class EmbeddingsAnswer(msgspec.Struct, frozen=True):
    """`embedding` is the first vector; `embeddings` are all, where `input` was given."""

    model: str
    embedding: Sequence[float]
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    embeddings: Sequence[Sequence[float]] | msgspec.UnsetType = msgspec.UNSET
