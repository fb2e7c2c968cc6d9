"""Fakes of everything that the API consumes, scripted by the test that holds them."""

import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from ollamad.api.services import (
    Consensus,
    Embedded,
    Generation,
    IssuedToken,
    NoQuorum,
    ServiceError,
    Services,
)
from ollamad.core.admission import ANYBODY, Asker, Place, QueuedRequest
from ollamad.core.commands import AnyCommand, FoundCluster, Outcome, Proposal, SetDraining, apply
from ollamad.core.description import NO_CHANGES, Changes, Description
from ollamad.core.explanation import Explanation
from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.inference import (
    Chunk,
    Embeddings,
    EmbedRequest,
    Event,
    Finished,
    GenerateRequest,
    LoadedModel,
    Message,
)
from ollamad.core.placement import Verdict, Whereabouts
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.quota import Ledger, Used
from ollamad.core.state import (
    ApiKey,
    Capacity,
    CertificateAuthority,
    ClusterState,
    Layer,
    Member,
    Model,
    ModelDetails,
    User,
)
from ollamad.core.transcripts import Resume
from ollamad.core.transfers import Transfer

NOW = 1_705_312_800.0  # 2024-01-15T10:00:00Z
NODE_1 = node_id_of(b"1" * 32)
NODE_2 = node_id_of(b"2" * 32)
STRANGER = node_id_of(b"9" * 32)

# argon2id of "correct horse" with the least cost, so that tests spend no time on it.
PASSWORD = "correct horse"
PASSWORD_HASH = (
    "$argon2id$v=19$m=8,t=1,p=1$nr7VIzW2qzBo2d51wBtBmg$mss8Om11igONv/kwoyEA/nIRDXdpkJ7ok17bSfmucso"
)


class FakeClock:
    """Wall and monotonic time that stand still until a test moves them."""

    def __init__(self) -> None:
        self.now = NOW

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - NOW + 1000.0


def member(node_id: NodeId, name: str, **changes: Any) -> Member:
    plain = Member(
        id=node_id,
        name=name,
        api_address=f"{name}:8080",
        p2p_address=f"{name}:9000",
        raft_address=f"{name}:7000",
        capacity=Capacity(8, 32_000_000_000, 500_000_000_000, 1, 24_000_000_000),
        joined_at=NOW - 3600,
        version="0.1.0",
    )
    return msgspec.structs.replace(plain, **changes)


def model(name: str = "smollm2:135m", **changes: Any) -> Model:
    plain = Model(
        name=name,
        digest="sha256:" + hashlib.sha256(name.encode()).hexdigest(),
        manifest=b"{}",
        details=ModelDetails(
            family="llama",
            families=("llama",),
            parameter_size="134.52M",
            quantization_level="Q4_1",
            context_length=8192,
            embedding_length=576,
        ),
        layers=(Layer("application/vnd.ollama.image.model", "sha256:" + "a" * 64, 98_000, 1, "b"),),
        modified_at=NOW - 60,
        desired=(NODE_1, NODE_2),
        confirmed=(NODE_1, NODE_2),
    )
    return msgspec.structs.replace(plain, **changes)


class FakeCluster:
    """A founded cluster of two nodes, whose commands are applied at once."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.state = ClusterState()
        self.node_id = NODE_1
        self.is_leader = True
        self.has_quorum = True
        self.quorum_lost_for_s = 0.0
        self.term = 3
        self.presences: dict[NodeId, Presence] = {}
        self.proposed: list[AnyCommand] = []
        self.admitted: list[tuple[NodeId, str]] = []
        self.removed: list[NodeId] = []
        self.removals: list[tuple[NodeId, bool, float]] = []
        self.leader_id: NodeId | None = NODE_1
        self.silence_s = 0.042
        self.is_caught_up = True
        self.barriers = 0
        self.on_barrier: Callable[[], None] = lambda: None
        self.change = trio.Event()
        admin = User("admin", PASSWORD_HASH, "admin", NOW)
        authority = CertificateAuthority(b"", b"")
        founder = member(NODE_1, "node_001")
        self._apply(FoundCluster("c1", authority, b"k" * 32, founder, admin))
        self.state.members[NODE_2] = member(NODE_2, "node_002")
        for role in ("viewer", "inference", "operator"):
            self.state.users[role] = User(role, PASSWORD_HASH, role, NOW)
        loaded = LoadedModel("smollm2:135m", "sha256:x", 10, 0, 4096, NOW + 300, busy=1)
        usage = Usage(cpu=0.452, memory=0.67, disk=0.23, gpu=0.12, bandwidth=12.5)
        self.presences[NODE_1] = Presence(True, NOW, Beat(NOW, usage, loaded=(loaded,)))
        self.presences[NODE_2] = Presence(True, NOW - 1, Beat(NOW - 1, Usage()))
        self.state.models["smollm2:135m"] = model()

    def leader(self) -> NodeId | None:
        return self.leader_id

    def voters(self) -> Sequence[NodeId]:
        return list(self.state.members)

    def presence(self, node_id: NodeId) -> Presence:
        return self.presences.get(node_id, Presence(False, 0.0, Beat(0.0, Usage())))

    async def propose(self, command: AnyCommand) -> Outcome:
        await trio.lowlevel.checkpoint()
        if not self.has_quorum:
            raise NoQuorum
        self.proposed.append(command)
        return self._apply(command)

    def consensus(self) -> Consensus:
        return Consensus(commit_index=17, applied_index=17, silence_s=self.silence_s)

    def snapshot(self) -> tuple[int, bytes]:
        return 17, b"the state"

    def changed(self) -> trio.Event:
        return self.change

    def notify(self) -> None:
        """Something was changed by hand."""
        self.change.set()
        self.change = trio.Event()

    async def read_barrier(self, timeout_s: float) -> None:
        await trio.lowlevel.checkpoint()
        if not self.has_quorum:
            raise NoQuorum
        self.barriers += 1
        self.on_barrier()

    async def make_join_token(self, ttl_s: float) -> IssuedToken:
        return IssuedToken("tok", self._clock.wall() + ttl_s, "ollamad start --join tok@host:9000")

    async def admit(self, node_id: NodeId, address: str) -> None:
        self.admitted.append((node_id, address))

    async def remove(
        self, node_id: NodeId, *, force: bool = False, timeout_s: float = 600.0
    ) -> None:
        if len(self.state.members) == 1:
            raise ServiceError(409, "LAST_MEMBER", "the last node of a cluster cannot leave it")
        self.removed.append(node_id)
        self.removals.append((node_id, force, timeout_s))

    async def set_draining(self, node_id: NodeId, draining: bool) -> None:
        await self.propose(SetDraining(node_id, draining))

    def _apply(self, command: AnyCommand) -> Outcome:
        proposal = Proposal(f"p{len(self.proposed)}-{id(command)}", self._clock.wall(), command)
        outcome = apply(self.state, proposal)
        self.notify()
        return outcome


DESCRIPTION = Description(
    template="{% for m in messages %}{{ m.content }}{% endfor %}",
    system="Be brief.",
    parameters={"stop": ["<|a|>", "<|b|>"], "temperature": 0.5},
    messages=(Message("user", "hi"), Message("assistant", "hello")),
    licenses=("Apache License", "Second"),
    metadata={
        "general.architecture": "llama",
        "general.name": "Smol",
        "llama.context_length": 8192,
        "five": [1, 2, 3, 4, 5],
        "six": [1, 2, 3, 4, 5, 6],
        "tokenizer.chat_template": "x",
    },
    parameter_count=134_515_008,
)


class FakeLibrary:
    """Keeps uploads in memory and remembers what was asked of it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.ready = True
        self.has_news = False  # at the models' origins
        self.on_download: Callable[[], None] = lambda: None
        self.transfer_list: list[Transfer] = [
            Transfer(
                id="transfer_001",
                model_name="smollm2:135m",
                type="download",
                status="active",
                progress=45.2,
                node_id=NODE_1,
                peer_id=NODE_2,
                bytes_total=1000,
                bytes_done=452,
                speed=2415919.4,
                eta=120.0,
                error="",
                started_at=NOW,
                finished_at=None,
            )
        ]
        self.transfer_steps: list[Transfer | None] = [self.transfer_list[0]]
        self.description = DESCRIPTION
        self.sole: list[str] = []
        self.error: Exception | None = None
        self.on_chunk: Callable[[bytes], Any] | None = None

    async def download(
        self,
        name: str,
        *,
        source: str | None = None,
        nodes: Sequence[NodeId] = (),
        replicas: int | None = None,
    ) -> str:
        self._log("download", name, source, tuple(nodes), replicas)
        self.on_download()
        return "transfer_001"

    async def update(self, name: str) -> str | None:
        self._log("update", name)
        return "transfer_001" if self.has_news else None

    async def create(
        self,
        name: str,
        files: Mapping[str, str],
        changes: Changes = NO_CHANGES,
        *,
        replace: bool = False,
    ) -> Model:
        self._log("create", name, dict(files), *((changes, replace) if replace else ()))
        return model(name)

    async def derive(self, name: str, base: str, changes: Changes = NO_CHANGES) -> Model:
        self._log("derive", name, base, changes)
        return model(name)

    async def push(self, name: str, destination: str) -> str:
        self._log("push", name, destination)
        return "transfer_001"

    async def describe(self, name: str) -> Description:
        self._log("describe", name)
        return self.description

    async def delete(self, name: str) -> None:
        self._log("delete", name)

    async def ask_replicas(self, name: str, replicas: int) -> Model:
        self._log("ask_replicas", name, replicas)
        return model(name, replicas=replicas)

    def placement(self, model: Model) -> Whereabouts:
        verdict = Verdict(NODE_1, "holds", True, 1.5, "2 by default")
        return Whereabouts(2, "2 by default", (verdict,))

    def sole_models(self, node_id: NodeId) -> Sequence[str]:
        return self.sole

    def wanted_replicas(self) -> Mapping[str, int]:
        return {"smollm2:135m": 2}

    async def transfers(self) -> Sequence[Transfer]:
        if self.error:
            raise self.error
        return self.transfer_list

    async def transfer(self, transfer_id: str) -> Transfer | None:
        """What `transfer_steps` says next; the last one stays."""
        self._log("transfer", transfer_id)
        steps = self.transfer_steps
        return steps.pop(0) if len(steps) > 1 else steps[0]

    async def cancel(self, transfer_id: str) -> None:
        self._log("cancel", transfer_id)

    async def has_blob(self, digest: str) -> bool:
        return digest in self.blobs

    async def receive_blob(
        self, digest: str, chunks: AsyncIterator[bytes], size: int | None = None
    ) -> None:
        data = bytearray()
        self._log("receive_blob", digest, size)
        async for chunk in chunks:
            data += chunk
            if self.on_chunk is not None:
                await self.on_chunk(chunk)
        actual = "sha256:" + hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise ServiceError(
                400, "DIGEST_MISMATCH", f'digest mismatch, expected "{digest}", got "{actual}"'
            )
        self.blobs[digest] = bytes(data)

    def inference_ready(self, model: Model) -> bool:
        return self.ready

    def _log(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error:
            raise self.error


EXPLANATION = Explanation("prefix", "its cache has most of the prompt", 12)
Script = list[Event | Exception | trio.Event]


@dataclasses.dataclass
class FakeInference:
    """Plays `script`; an exception in it is raised, an Event of trio is waited for."""

    script: Script = dataclasses.field(default_factory=list)
    script_for: Callable[[], Script] | None = None  # makes the script of the next generation
    running: int = 0
    refusal: Exception | None = None  # raised on entering
    requests: list[GenerateRequest | EmbedRequest] = dataclasses.field(default_factory=list)
    entered: trio.Event = dataclasses.field(default_factory=trio.Event)
    left: trio.Event = dataclasses.field(default_factory=trio.Event)
    buffer: int = 8
    waiting: int = 0
    askers: list[Asker] = dataclasses.field(default_factory=list)
    resumes: list[Resume | None] = dataclasses.field(default_factory=list)
    queue_now: tuple[QueuedRequest, ...] = ()
    places: tuple[Place, ...] = ()  # where it stands while it waits
    explanation: Explanation = EXPLANATION

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, asker: Asker = ANYBODY, resume: Resume | None = None
    ) -> AsyncIterator[Generation]:
        self.requests.append(request)
        self.askers.append(asker)
        self.resumes.append(resume)
        for place in self.places:
            if asker.on_wait is not None:
                await asker.on_wait(place)
        if self.refusal is not None:
            raise self.refusal
        send, receive = trio.open_memory_channel[Event](self.buffer)
        self.entered.set()
        self.running += 1
        script = self.script if self.script_for is None else self.script_for()
        try:
            # A nursery, as a real one has: errors of the reader come out in a group.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._play, send, script)
                explanation = self.explanation if asker.wants_scores else None
                first = self.places[0] if self.places else None
                yield Generation(NODE_2, receive, explanation, first, 1.5 if first else 0.0)
                nursery.cancel_scope.cancel()
        finally:
            self.running -= 1
            self.left.set()

    def explain(self, request: GenerateRequest) -> Explanation:
        self.requests.append(request)
        return self.explanation

    async def embed(self, request: EmbedRequest, asker: Asker = ANYBODY) -> Embedded:
        self.requests.append(request)
        self.askers.append(asker)
        if self.refusal is not None:
            raise self.refusal
        vectors = tuple((float(i), 0.5, -0.25) for i, _ in enumerate(request.inputs))
        return Embedded(NODE_2, Embeddings(vectors, prompt_eval_count=4, total_duration=9))

    def queue(self) -> Sequence[QueuedRequest]:
        return self.queue_now

    def queued(self) -> int:
        return self.waiting

    async def _play(self, send: trio.MemorySendChannel[Event], script: Script) -> None:
        with send:  # not `async`: its checkpoint could swallow an error of the script
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, trio.Event):
                    await step.wait()
                else:
                    try:
                        send.send_nowait(step)  # a burst, as far as the buffer goes
                    except trio.WouldBlock:
                        await send.send(step)


class FakeHost:
    def cpu_percent(self) -> float:
        return 35.25

    def memory_percent(self) -> float:
        return 62.8

    def network_percent(self) -> float:
        return 18.5


FINISHED = Finished("stop", 1500, 500, 25, 200, 3, 800, context=(1, 2, 3), prompt_cached_count=5)
HELLO: list[Event] = [Chunk("Hel", (1,)), Chunk("lo", (2,)), Chunk(' "ü"\n', (3,)), FINISHED]


class FakeKeyUsage:
    """Counts of this node alone."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._ledger = Ledger(NODE_1)

    def used(self, key: ApiKey) -> Used:
        return self._ledger.used(key.id, key.period, self._clock.wall())

    def count(self, key: ApiKey, *, requests: int = 0, tokens: int = 0) -> None:
        now = self._clock.wall()
        self._ledger.add(key.id, key.period, now, requests=requests, tokens=tokens)


@dataclasses.dataclass
class World:
    """All fakes together, and the `Services` made of them."""

    clock: FakeClock
    cluster: FakeCluster
    library: FakeLibrary
    inference: FakeInference
    services: Services


def make_world() -> World:
    clock = FakeClock()
    cluster = FakeCluster(clock)
    library = FakeLibrary()
    inference = FakeInference(script=list(HELLO))
    services = Services(
        cluster=cluster,
        library=library,
        inference=inference,
        host=FakeHost(),
        keys=FakeKeyUsage(clock),
        build_time="2024-01-15T10:00:00Z",
        git_commit="abc123def456",
        platform="linux/amd64",
        engine_versions={"llama.cpp": "b1"},
        wall=clock.wall,
        monotonic=clock.monotonic,
    )
    return World(clock, cluster, library, inference, services)
