"""What the API needs from the rest of the daemon: narrow protocols, and the errors they raise.

The daemon implements them; this package imports none of the packages behind them. Every
`async` method may be cancelled at any await (the client went away, or a deadline passed) and
then leaves nothing half done that a repeat would not mend.
"""

import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
import trio

from ollamad.core.admission import ANYBODY, Asker, Place, QueuedRequest
from ollamad.core.commands import AnyCommand, Outcome
from ollamad.core.description import NO_CHANGES, Changes, Description
from ollamad.core.explanation import Explanation
from ollamad.core.ids import NodeId
from ollamad.core.inference import Embeddings, EmbedRequest, Event, GenerateRequest
from ollamad.core.placement import Whereabouts
from ollamad.core.presence import Presence
from ollamad.core.quota import Used
from ollamad.core.state import ApiKey, ClusterState, Model
from ollamad.core.transcripts import Resume
from ollamad.core.transfers import Transfer

Detail = str | int | float | bool | None | Sequence[str] | Mapping[str, str]

USUAL_RETRY_S = 2  # where nothing tells better: an election, a restart


class ServiceError(Exception):
    """A request that cannot be served; becomes the answer `{"error", "code", "details"}`.

    Args:
      status: the HTTP status.
      code: upper case, for programs.
      message: one sentence for people, with what to do about it.
      retry_after_s: seconds for the `Retry-After` header, which 429 and 503 have: else what
        `details.retry_after` says, else USUAL_RETRY_S.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Mapping[str, Detail] | None = None,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = dict(details or {})
        if retry_after_s is None and status in (429, 503):
            known = self.details.get("retry_after")
            retry_after_s = int(known) if isinstance(known, int | float) else USUAL_RETRY_S
        self.retry_after_s = retry_after_s


class NoQuorum(ServiceError):
    """The cluster cannot decide anything now: too few voters are reachable."""

    def __init__(self, message: str = "the cluster has no quorum; nothing can change now") -> None:
        super().__init__(503, "NO_QUORUM", message)


class Unavailable(ServiceError):
    """Something that is needed is away for now (a node, a replica, a free slot)."""

    def __init__(
        self, message: str, *, code: str = "UNAVAILABLE", retry_after_s: int | None = None
    ) -> None:
        super().__init__(503, code, message, retry_after_s=retry_after_s)


class IssuedToken(msgspec.Struct, frozen=True):
    """A join token as it is shown once."""

    token: str
    expires_at: float  # Unix seconds
    command: str  # what to type on the node that joins


class Consensus(msgspec.Struct, frozen=True):
    """How far this node is in the replicated log."""

    commit_index: int
    applied_index: int
    silence_s: float  # since the leader, or a majority, was heard: how old the state may be
    disk_full: bool = False  # it writes nothing, and so votes and acknowledges nothing
    disk_hangs: bool = False  # likewise


class Cluster(Protocol):
    """The replicated state, who leads, who is there; and ways to change the membership."""

    @property
    def state(self) -> ClusterState: ...
    @property
    def node_id(self) -> NodeId: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def has_quorum(self) -> bool: ...
    @property
    def quorum_lost_for_s(self) -> float:
        """Seconds since this node last knew of a quorum; 0 while there is one."""
        ...

    @property
    def term(self) -> int: ...
    def leader(self) -> NodeId | None: ...
    def voters(self) -> Sequence[NodeId]: ...
    def presence(self, node_id: NodeId) -> Presence: ...
    def consensus(self) -> Consensus: ...
    def changed(self) -> trio.Event:
        """Set when the state, or who is there, changes the next time."""
        ...

    @property
    def is_caught_up(self) -> bool:
        """Whether `state` is fit to judge by: not what the node knew when it was stopped."""
        ...

    def snapshot(self) -> tuple[int, bytes]:
        """The replicated state in bytes, and the index of the last entry that it includes."""
        ...

    async def read_barrier(self, timeout_s: float) -> None:
        """Wait until `state` includes all that any node acknowledged before this call.

        Raises:
          NoQuorum: no leader with a majority confirmed that in time.
        """
        ...

    async def propose(self, command: AnyCommand) -> Outcome:
        """Replicate a command and return its outcome.

        Raises:
          NoQuorum, Unavailable: the outcome is unknown or the command did not start.
        """
        ...

    async def make_join_token(self, ttl_s: float) -> IssuedToken: ...

    async def admit(self, node_id: NodeId, address: str) -> None:
        """Dial a node that waits with a join token, check that its key hashes to the id, let it in.

        Raises:
          ServiceError: it cannot be reached, is somebody else, or is a member already (409).
        """
        ...

    async def remove(
        self, node_id: NodeId, *, force: bool = False, timeout_s: float = 600.0
    ) -> None:
        """Take a member out (it drains and hands over first if it can).

        Raises:
          ServiceError: 409 for the last member or voter, and for one whose models would be lost,
            unless `force`; with the reason.
        """
        ...

    async def set_draining(self, node_id: NodeId, draining: bool) -> None: ...


class Library(Protocol):
    """The models' bytes: fetching, storing, deleting them anywhere in the cluster."""

    async def download(
        self,
        name: str,
        *,
        source: str | None = None,
        nodes: Sequence[NodeId] = (),
        replicas: int | None = None,
    ) -> str:
        """Start to fetch a model (or find the running transfer of it) and return its id at once.

        Raises:
          ServiceError: 400 for a source that is not understood, 404 when no source has it.
        """
        ...

    async def update(self, name: str) -> str | None:
        """Start to fetch what the model's origin has under this name by now, if that is another one
        than the cluster has; its transfer's id, or None.

        Raises:
          ServiceError: 404 when no source has it, 502 when this node cannot tell.
        """
        ...

    async def create(
        self,
        name: str,
        files: Mapping[str, str],
        changes: Changes = NO_CHANGES,
        *,
        replace: bool = False,
    ) -> Model:
        """Make a model of uploaded blobs (`files` maps file names to digests).

        Raises:
          ServiceError: 400 for a blob that is missing or no GGUF file, 409 for a name that
            another model has, unless it is to be replaced.
        """
        ...

    async def derive(self, name: str, base: str, changes: Changes = NO_CHANGES) -> Model:
        """Make a model of another one; without changes, a copy. Replaces one of that name.

        Raises:
          ServiceError: 503 when no node that holds the other one is online.
        """
        ...

    async def push(self, name: str, destination: str) -> str:
        """Start to send a model to a registry and return the transfer's id at once.

        Args:
          destination: a model name, with the registry's host unless that is Ollama's.

        Raises:
          ServiceError: 503 when no node that holds it is online.
        """
        ...

    async def describe(self, name: str) -> Description:
        """What the small blobs and the file of a model say.

        Raises:
          ServiceError: 503 when no node that holds it is online.
        """
        ...

    async def delete(self, name: str) -> None: ...

    async def ask_replicas(self, name: str, replicas: int) -> Model:
        """Have so many copies of a model in the cluster; 0: as many as by default."""
        ...

    def placement(self, model: Model) -> Whereabouts:
        """Why a model is where it is."""
        ...

    def sole_models(self, node_id: NodeId) -> Sequence[str]:
        """The models that only that node could serve."""
        ...

    def wanted_replicas(self) -> Mapping[str, int]:
        """How many copies of each model (by its name) there should be, but for hot ones."""
        ...

    async def transfers(self) -> Sequence[Transfer]:
        """All active and recent transfers of the cluster, newest first."""
        ...

    async def transfer(self, transfer_id: str) -> Transfer | None:
        """One transfer as it is now; None when its node has forgotten it, or is away."""
        ...

    async def cancel(self, transfer_id: str) -> None: ...

    async def has_blob(self, digest: str) -> bool: ...

    async def receive_blob(
        self, digest: str, chunks: AsyncIterator[bytes], size: int | None = None
    ) -> None:
        """Store a blob of this node under its digest, durably, when this returns.

        Args:
          size: in bytes, if it is told before, so that there is room for all of it from the start.

        Raises:
          ServiceError: 400 DIGEST_MISMATCH, 503 DISK_FULL.
        """
        ...

    def inference_ready(self, model: Model) -> bool:
        """Whether some online node can answer with this model now."""
        ...


class EventChannel(Protocol):
    """The events of one generation, as `trio.MemoryReceiveChannel` gives them."""

    async def receive(self) -> Event: ...
    def receive_nowait(self) -> Event: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """A generation that runs: who serves it, and its events up to `Finished` or `Failed`."""

    node_id: NodeId
    events: EventChannel
    explanation: Explanation | None = None  # of routing, if it was asked for
    first_place: Place | None = None  # in the queue, if it waited
    waited_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings, and who made them."""

    node_id: NodeId
    embeddings: Embeddings


class Inference(Protocol):
    """Answers of models, wherever in the cluster they run.

    Raises (on entering, or from `embed`):
      core.inference.InferenceError: with the status that the client should see.
    """

    def generate(
        self, request: GenerateRequest, asker: Asker = ANYBODY, resume: Resume | None = None
    ) -> AbstractAsyncContextManager[Generation]:
        """Leaving the context ends the generation, on whatever node it runs."""
        ...

    async def embed(self, request: EmbedRequest, asker: Asker = ANYBODY) -> Embedded: ...

    def explain(self, request: GenerateRequest) -> Explanation:
        """Where such a request would go now, and why."""
        ...

    def queue(self) -> Sequence[QueuedRequest]:
        """The requests that wait at this node to be let in, first to last."""
        ...

    def queued(self) -> int:
        """Requests that wait at this node, to be let in or for a slot of a runner."""
        ...


class KeyUsage(Protocol):
    """What API keys have used, in the whole cluster as far as this node knows."""

    def used(self, key: ApiKey) -> Used:
        """Of the key's period that runs now."""
        ...

    def count(self, key: ApiKey, *, requests: int = 0, tokens: int = 0) -> None: ...


class HostUsage(Protocol):
    """This host's load now, in percent 0-100."""

    def cpu_percent(self) -> float: ...
    def memory_percent(self) -> float: ...
    def network_percent(self) -> float: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Services:
    """Everything that the API consumes."""

    cluster: Cluster
    library: Library
    inference: Inference
    host: HostUsage
    keys: KeyUsage
    build_time: str = "unknown"  # RFC 3339
    git_commit: str = "unknown"
    platform: str = "unknown"  # such as linux/amd64
    engine_versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Told by `/version`, so that a member can find a node that waits to be let in.
    p2p_port: int = 0
    wall: Callable[[], float] = time.time  # Unix seconds
    monotonic: Callable[[], float] = time.monotonic  # seconds; for durations
