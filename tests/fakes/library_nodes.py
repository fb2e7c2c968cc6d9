"""Nodes with real stores and transfers around one replicated state that applies at once."""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from ollamad.api.services import NoQuorum, ServiceError
from ollamad.cluster import Changes, HandOver
from ollamad.core.commands import AnyCommand, Outcome, Proposal, Rejected, apply
from ollamad.core.ids import NodeId
from ollamad.core.placement import Policy
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.state import ClusterState
from ollamad.core.transfers import Transfer
from ollamad.library import Library
from ollamad.peers.mesh import Mesh
from ollamad.reconcile import Reconciler
from ollamad.sources.base import Offer, Progress, Read, RemoteFile, Sent, Sink, SourceError, Target
from ollamad.store.errors import BlobMissing, PieceCorrupt, PieceMapMissing, PiecesRotten
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.server import PieceServer
from ollamad.transfer.transfers import TransferTable
from ollamad.wire.pieces import METHOD
from tests.fakes.api_services import member
from tests.fakes.peer_net import PeerNet


class SharedState:
    """What consensus would keep equal on all nodes."""

    def __init__(self) -> None:
        self.state = ClusterState(cluster_id="c1")
        self.changes: dict[NodeId, Changes] = {}
        self.offline: set[NodeId] = set()
        self.has_quorum = True
        self.leader: NodeId | None = None
        self.beats: dict[NodeId, Beat] = {}
        self.hold: trio.Event | None = None  # proposals wait for it before they are applied
        self.waiting = 0
        self.proposed: list[AnyCommand] = []
        # What nodes know that lack the latest, until they ask a majority.
        self.behind: dict[NodeId, ClusterState] = {}
        self.deaf: set[NodeId] = set()  # have heard of nobody, until they ask a majority
        self._count = 0

    def notify(self) -> None:
        for changes in self.changes.values():
            changes.notify()

    def apply(self, command: AnyCommand) -> Outcome:
        self._count += 1
        outcome = apply(self.state, Proposal(f"{self._count}", time.time(), command))
        self.notify()
        return outcome

    async def propose(self, command: AnyCommand) -> Outcome:
        self.waiting += 1
        try:
            await trio.lowlevel.checkpoint()
            if self.hold is not None:
                await self.hold.wait()
        finally:
            self.waiting -= 1
        if not self.has_quorum:
            raise NoQuorum
        self.proposed.append(command)
        return self.apply(command)


class LibraryCluster:
    """The part of `Cluster` that a library uses."""

    def __init__(self, shared: SharedState, node_id: NodeId, mesh: Mesh) -> None:
        self.node_id = node_id
        self.mesh = mesh
        self.changes = Changes()
        self.hand_over: HandOver
        self._shared = shared
        shared.changes[node_id] = self.changes
        self.propose = shared.propose
        self.disk_free = 1 << 40

    @property
    def is_leader(self) -> bool:
        return self._shared.leader == self.node_id

    @property
    def has_quorum(self) -> bool:
        return self._shared.has_quorum

    @property
    def state(self) -> ClusterState:
        return self._shared.behind.get(self.node_id, self._shared.state)

    async def require(self, command: AnyCommand) -> None:
        outcome = await self.propose(command)
        if isinstance(outcome, Rejected):
            raise ServiceError(409, outcome.code, outcome.message)

    async def read_barrier(self, timeout_s: float) -> None:
        await trio.lowlevel.checkpoint()
        if not self.has_quorum:
            raise NoQuorum
        self._shared.behind.pop(self.node_id, None)
        self._shared.deaf.discard(self.node_id)

    def leader(self) -> NodeId | None:
        """The first of those who are there."""
        if self.node_id in self._shared.deaf:
            return None
        return next(
            (node_id for node_id in sorted(self.state.members) if self.is_online(node_id)), None
        )

    def other_members(self) -> list[NodeId]:
        return [node_id for node_id in self.state.members if node_id != self.node_id]

    def is_online(self, node_id: NodeId) -> bool:
        if self.node_id in self._shared.deaf:
            return node_id == self.node_id
        return node_id not in self._shared.offline

    def beat(self, **told: Any) -> None:
        """Have this node tell all others so."""
        beat = Beat(1.0, Usage(disk_free=self.disk_free), **told)
        self._shared.beats[self.node_id] = beat

    @property
    def beats(self) -> dict[NodeId, Beat]:
        """What every node told last."""
        return self._shared.beats

    def presence(self, node_id: NodeId) -> Presence:
        usual = Beat(1.0, Usage(disk_free=self.disk_free))
        return Presence(self.is_online(node_id), 1.0, self.beats.get(node_id, usual))


class ScriptedSource:
    """One model file behind every reference: a `Source`, and what it opens."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.failure: SourceError | None = None
        self.gate: trio.Event | None = None  # the file waits for it
        self.digest = ""  # what the origin promises for it
        self.fetches = 0
        self.pushed: dict[str, dict[str, bytes]] = {}

    @asynccontextmanager
    async def open(self, reference: str) -> AsyncIterator["ScriptedSource"]:
        self.reference = reference
        yield self

    async def resolve(self) -> Offer:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        file = RemoteFile("https://x/tiny.gguf", None, self.digest)
        return Offer(self.reference, "tiny", weights=file, licence="MIT")

    def blob(self, digest: str, size: int) -> RemoteFile:
        raise NotImplementedError

    async def unpack(self, path: Path, sink: Sink[Any]) -> Any:
        raise NotImplementedError

    async def push(
        self,
        destination: str,
        manifest: bytes,
        blobs: Sequence[tuple[str, int]],
        read: Read,
        sent: Sent,
    ) -> None:
        self.pushed[destination] = {d: await read(d, 0, size) for d, size in blobs}
        sent(sum(size for _, size in blobs))

    async def stat(self, file: RemoteFile) -> RemoteFile:
        return msgspec.structs.replace(file, size=len(self.content))

    async def download(self, file: RemoteFile, target: Target, progress: Progress) -> None:
        self.fetches += 1
        size = target.map.piece_size
        for index in range(len(target.map)):
            progress(len(self.content) * (index + 1) // (len(target.map) + 1))
            if self.gate is not None and index == len(target.map) - 1:
                await self.gate.wait()
            if not target.have[index]:
                await target.write_piece(index, self.content[index * size : (index + 1) * size])


class LibraryNode:
    """A node's disk and library. `start` may be called again, as after a restart."""

    def __init__(
        self,
        shared: SharedState,
        net: PeerNet,
        node_id: NodeId,
        root: Path,
        content: bytes,
        *,
        ollama: Path | None = None,
        read_only: bool = False,
    ) -> None:
        self.id = node_id
        self.shared = shared
        self.source = ScriptedSource(content)
        self.ollama = ollama  # a directory of models that is adopted
        shelves = [ollama] if ollama is not None and read_only else []
        own = root / "models" if ollama is None or read_only else ollama
        self.store = ModelStore(own, keep_free_bytes=0, shelves=shelves)
        self.root = root
        self.unloaded: list[str] = []
        self._net = net
        self._scope, self._stopped = trio.CancelScope(), trio.Event()

    async def start(self, nursery: trio.Nursery) -> None:
        (self.root / "models").mkdir(parents=True, exist_ok=True)
        await self.store.prepare()
        mesh = await self._net.add(self.id)
        lanes = self._net.lanes.lanes_of(self.id)
        self.cluster = LibraryCluster(self.shared, self.id, mesh)
        self.table = TransferTable(
            self.id, secrets.token_hex(2), wall=time.time, steady=time.monotonic
        )
        self.reconciler = Reconciler(self.cluster, Policy())  # type: ignore[arg-type]
        self.cluster.hand_over = self.reconciler.hand_over
        self.library = Library(
            cluster=self.cluster,  # type: ignore[arg-type]
            store=self.store,
            fetcher=Fetcher(mesh, lanes, self.store, corrupt=PieceCorrupt, rotten=PiecesRotten),
            table=self.table,
            source=self.source,
            unload=self._unload,
            held_path=self.root / "held",
            brought_path=self.root / "brought",
            pulls_path=self.root / "pulls",
            adopted_path=None if self.ollama is None else self.root / "adopted",
            view=self.reconciler.view,
        )
        server = PieceServer(self.store, lanes, missing=BlobMissing, unmapped=PieceMapMissing)
        mesh.handle(METHOD, server.handle)
        self._scope, self._stopped = trio.CancelScope(), trio.Event()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with self._scope:
                async with trio.open_nursery() as inner:
                    await inner.start(server.run)
                    await inner.start(self.library.run)
                    await inner.start(self.reconciler.run)
                    task_status.started()
            self._stopped.set()

        await nursery.start(run)

    async def stop(self) -> None:
        self._scope.cancel()
        await self._stopped.wait()
        self._net.dead.add(self.id)
        self._net.cut(self.id)
        self.shared.offline.add(self.id)

    async def _unload(self, name: str) -> None:
        self.unloaded.append(name)

    async def holds(self, digests: set[str]) -> set[str]:
        return {digest for digest in digests if await self.store.has_blob(digest)}

    def transfer(self, transfer_id: str) -> Transfer:
        return next(t for t in self.table.list() if t.id == transfer_id)


def join(shared: SharedState, *nodes: NodeId) -> None:
    for node_id in nodes:
        shared.state.members[node_id] = member(node_id, node_id.lower())


async def until(shared: SharedState, condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait for the state or the tables to say so."""
    with trio.fail_after(timeout_s):
        for _ in range(int(timeout_s / 0.005)):
            if condition():
                return
            await trio.sleep(0.005)
    raise AssertionError("it never came true")
