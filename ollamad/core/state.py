"""The replicated state of a cluster: what every node agrees on.

Small, rarely changing, must never be lost. Values are frozen; `apply` (in `commands.py`)
replaces them in the state's dicts, so a value that somebody holds never changes under them.
Heartbeats, loaded models, queue depths and transfers are not in here: peers exchange those
directly.
"""

import hashlib
from collections.abc import Callable

import msgspec

from ollamad.core.ids import MIN_PREFIX_LENGTH, NodeId
from ollamad.core.names import InvalidName, parse_name
from ollamad.core.quota import Used

Role = str  # one of ROLES, weakest first
ROLES = ("viewer", "inference", "operator", "admin")


class Capacity(msgspec.Struct, frozen=True):
    """What a node's hardware has; sizes in bytes."""

    cpu_cores: int
    memory_bytes: int
    disk_bytes: int
    gpu_count: int = 0
    gpu_memory_bytes: int = 0


class Member(msgspec.Struct, frozen=True):
    """A node that the cluster let in. Addresses are `host:port`."""

    id: NodeId
    name: str
    api_address: str
    p2p_address: str
    raft_address: str
    capacity: Capacity
    joined_at: float  # Unix seconds
    version: str = ""
    draining: bool = False
    # The cluster was recovered without it. It stays for its name and its models, until the node
    # joins again, under another id, or is taken out.
    left_behind: bool = False


class ModelDetails(msgspec.Struct, frozen=True):
    """What the model's own file says about it (GGUF header), in Ollama's terms."""

    format: str = "gguf"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""  # "134.52M", "7B"
    quantization_level: str = ""  # "Q4_0"
    parent_model: str = ""
    context_length: int = 0  # tokens that the model was trained for
    embedding_length: int = 0  # width of its embeddings
    kv_bytes_per_token: int = 0  # f16 key and value cache, all layers
    capabilities: tuple[str, ...] = ("completion",)


class Layer(msgspec.Struct, frozen=True):
    """A blob of a model, and how it is cut into pieces for the transfer between peers."""

    media_type: str
    digest: str  # "sha256:<64 hex>"
    size: int  # bytes
    piece_size: int  # bytes
    pieces_root: str  # hex; see transfer/piecemap.py


class Model(msgspec.Struct, frozen=True):
    """A model of the cluster. `manifest` is kept byte for byte: its sha256 is the digest."""

    name: str  # shortest form with tag, as ModelName.__str__ gives it
    digest: str  # "sha256:<64 hex>" of the manifest's bytes
    manifest: bytes
    details: ModelDetails
    layers: tuple[Layer, ...]  # with the config blob
    modified_at: float  # Unix seconds
    desired: tuple[NodeId, ...] = ()  # nodes that should hold it, sorted
    confirmed: tuple[NodeId, ...] = ()  # nodes that hold it, verified, sorted
    replicas: int = 0  # copies that somebody asked for; 0: the cluster's default
    pinned: tuple[NodeId, ...] = ()  # nodes that somebody asked for by name, sorted

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.layers)


class User(msgspec.Struct, frozen=True):
    """Somebody who may sign in. `password_hash` is argon2id in PHC form."""

    username: str
    password_hash: str
    role: Role
    created_at: float
    # Another one with each password: a token that names an older one, or that of a user of the
    # same name who was deleted, is dead.
    generation: str = ""


class ApiKey(msgspec.Struct, frozen=True):
    """A token for a program, without a session. Its secret is kept by nobody but its owner."""

    id: str
    name: str  # for people
    secret_sha256: str  # hex; the secret is random and long, so a slow hash would add nothing
    role: Role
    created_at: float
    created_by: str  # a username
    expires_at: float | None = None  # Unix seconds
    request_quota: int | None = None  # requests in a period
    token_quota: int | None = None  # tokens in a period, of prompts and answers together
    period: str = "total"  # one of core.quota.PERIODS


class JoinToken(msgspec.Struct, frozen=True):
    """A token that lets nodes in until it expires. `key` is what proves the secret (HMAC)."""

    id: str
    key: bytes
    expires_at: float


class CertificateAuthority(msgspec.Struct, frozen=True):
    """The cluster's CA. Every member holds the key, so that any of them can admit a node."""

    certificate_pem: bytes
    private_key_pem: bytes


class Settings(msgspec.Struct, frozen=True):
    """Settings that hold for the whole cluster."""

    auto_distribution: bool = True


# Outcomes are remembered, so that a retried command applies once: the last RECENT_COMMANDS, and
# all that came within REMEMBER_S, which outlasts the longest retry (5 s) also on a slow network.
RECENT_COMMANDS = 4096
REMEMBER_S = 30.0
MAX_RECENT_COMMANDS = 1 << 18  # never more than these, about 15 MB: 10 s at 26,000 a second
SWEEP_SHARE = 16  # old ones are forgotten together, after one command for so many remembered


class ClusterState(msgspec.Struct):
    """Everything that goes through Raft. Only `commands.apply` changes it."""

    cluster_id: str = ""
    # When the cluster was recovered from the loss of its majority, 0 if never: Unix time in
    # nanoseconds, so fine that two nodes that recover at once do not take the same for theirs.
    # Nodes of different incarnations do not talk to each other: see docs/consensus.md.
    incarnation: int = 0
    ca: CertificateAuthority | None = None
    jwt_key: bytes = b""
    settings: Settings = Settings()
    members: dict[NodeId, Member] = {}
    # Ids of nodes that left or were removed, and when: their certificates are not accepted any
    # more, and they are not let in again. Some 60 bytes for each, kept for ever.
    departed: dict[NodeId, float] = {}
    models: dict[str, Model] = {}  # by ModelName.key
    users: dict[str, User] = {}
    api_keys: dict[str, ApiKey] = {}
    # What was used of each key, by the node that counted it; some seconds old: see core.quota.
    key_usage: dict[str, dict[NodeId, Used]] = {}
    join_tokens: dict[str, JoinToken] = {}
    revoked: dict[str, float] = {}  # token or session id -> when it would have expired anyway
    recent: dict[str, "Remembered"] = {}  # command id -> its outcome, oldest first
    recency: "Recency" = msgspec.field(default_factory=lambda: Recency())

    def remember(self, command_id: str, code: str, message: str, at: float) -> None:
        """Keep the outcome of a command that was proposed at `at`, and forget old ones."""
        recency = self.recency.after(at)
        self.recent[command_id] = Remembered(code, message, recency.now)
        # Together, because finding the oldest one costs a walk over those that were forgotten.
        if recency.unswept * SWEEP_SHARE >= max(len(self.recent), RECENT_COMMANDS):
            self._forget(recency.now)
            recency = Recency(recency.now, at, 0)
        self.recency = recency

    def _forget(self, now: float) -> None:
        count = len(self.recent)
        doomed = []
        for place, (command_id, known) in enumerate(self.recent.items()):
            # The last RECENT_COMMANDS are always young: see `Recency`.
            is_young = now - known.at <= REMEMBER_S
            if is_young and count - place <= MAX_RECENT_COMMANDS:
                break
            doomed.append(command_id)
        for command_id in doomed:
            del self.recent[command_id]

    def fingerprint(self) -> str:
        """A hash of everything, equal on nodes that applied the same commands."""
        ordered = msgspec.msgpack.Encoder(order="deterministic").encode(self)
        return hashlib.sha256(ordered).hexdigest()

    def find_model(self, name: str) -> Model | None:
        """The model of that name, compared as Ollama does; None for an unknown or bad name."""
        try:
            return self.models.get(parse_name(name).key)
        except InvalidName:
            return None

    def find_member(self, reference: str) -> Member | None:
        """The member with that id, that name, or that unique id prefix of 6 characters or more."""
        exact = self.members.get(NodeId(reference))
        if exact is not None:
            return exact
        if by_name := self._only(lambda member: member.name == reference):
            return by_name
        if len(reference) < MIN_PREFIX_LENGTH:
            return None
        return self._only(lambda member: member.id.startswith(reference))

    def _only(self, wanted: Callable[[Member], bool]) -> Member | None:
        found = [member for member in self.members.values() if wanted(member)]
        return found[0] if len(found) == 1 else None


class Remembered(msgspec.Struct, frozen=True):
    """The outcome of a command that was applied: rejected if `code` is not empty."""

    code: str = ""
    message: str = ""
    at: float = 0.0  # by `Recency.now`


class Recency(msgspec.Struct, frozen=True):
    """How time passes for what is remembered: a clock that is driven by those of the proposers.

    It goes on with the latest of them, but by a small step a command. So a clock that is hours
    ahead makes nobody forget, and holds time up until the next sweep only; and where a command
    comes now and then, RECENT_COMMANDS of them pass for REMEMBER_S, so that no more are kept.
    """

    now: float = 0.0  # seconds; only differences mean something
    latest: float = 0.0  # the latest time of a proposer since the last sweep
    unswept: int = 0  # commands since the last sweep

    def after(self, at: float) -> "Recency":
        """The clock after one more command, which was proposed at `at`."""
        # In this order, so that a time that is not a number counts as none.
        step = min(max(0.0, at - self.latest), REMEMBER_S / RECENT_COMMANDS)
        return Recency(self.now + step, max(self.latest, at), self.unswept + 1)
