"""Nodes that exchange pieces in memory: a network of them, and a store.

The network can lose a node at any message, and the store counts what was written. With these
no thread and no socket is used, so that tests may run on virtual time.
"""

import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import PieceHasher, PieceMap
from ollamad.core.state import Layer
from ollamad.store.pieces import Region
from tests.fakes.memory_lanes import LaneNet, MemoryLanes
from tests.fakes.memory_streams import Hook, MemoryStream, NodeLost, NodeUnreachable, stream_pair

Handler = Callable[[NodeId, bytes, MemoryStream], Awaitable[None]]


class Network:
    """Fake nodes that reach each other. Handlers run in the given nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._handlers: dict[tuple[NodeId, str], Handler] = {}
        self._exchanges: dict[NodeId, set[tuple[trio.CancelScope, MemoryStream]]] = {}
        self.hooks: dict[NodeId, Hook] = {}  # on what that node sends
        self.down: set[NodeId] = set()
        self.lanes = LaneNet()
        self.lanes.hooks, self.lanes.down = self.hooks, self.down
        self.opened: Counter[NodeId] = Counter()

    def handle(self, node: NodeId, method: str, handler: Handler) -> None:
        self._handlers[node, method] = handler

    def kill(self, node: NodeId) -> None:
        """kill -9: its exchanges break, and it cannot be reached until `revive`."""
        self.down.add(node)
        for scope, stream in list(self._exchanges.get(node, ())):
            scope.cancel()
            stream.close()
        self.lanes.kill(node)

    def revive(self, node: NodeId) -> None:
        self.down.discard(node)

    def lanes_of(self, node: NodeId) -> MemoryLanes:
        return self.lanes.lanes_of(node)

    def peers_of(self, node: NodeId) -> "NetworkPeers":
        return NetworkPeers(self, node)

    @asynccontextmanager
    async def exchange(
        self, caller: NodeId, node: NodeId, method: str, request: bytes
    ) -> AsyncIterator[MemoryStream]:
        await trio.lowlevel.checkpoint()
        if node in self.down or (node, method) not in self._handlers:
            raise NodeUnreachable(f"{node} is not there")
        self.opened[node] += 1
        ours, theirs = stream_pair()
        theirs.hook = self.hooks.get(node)
        self._nursery.start_soon(self._run, caller, node, method, request, theirs)
        try:
            yield ours
        finally:
            ours.close()

    async def _run(
        self, caller: NodeId, node: NodeId, method: str, request: bytes, stream: MemoryStream
    ) -> None:
        with trio.CancelScope() as scope:
            self._exchanges.setdefault(node, set()).add((scope, stream))
            try:
                await self._handlers[node, method](caller, request, stream)
                await stream.send_eof()
            except NodeLost:
                pass  # as the real links do: nobody is left to tell
            finally:
                self._exchanges[node].discard((scope, stream))


class NetworkPeers:
    """One node's way to the others."""

    def __init__(self, network: Network, node: NodeId) -> None:
        self._network = network
        self._node = node

    @asynccontextmanager
    async def open(
        self, node_id: NodeId, method: str, request: bytes, *, bulk: bool = False
    ) -> AsyncIterator[MemoryStream]:
        assert bulk, "pieces must not stand before tokens"
        async with self._network.exchange(self._node, node_id, method, request) as stream:
            yield stream


class Corrupt(Exception):
    """A piece is not what the map says."""


class Rotten(Exception):
    """The disk lost pieces."""


class Missing(Exception):
    """There is no such blob."""


class Unmapped(Exception):
    """Its map is not known."""


class Full(Exception):
    """There is no room."""


class MemorySource:
    """Pieces in memory."""

    def __init__(
        self, piece_map: PieceMap, data: bytearray, have: bytearray, *, is_origin: bool = True
    ) -> None:
        self.map = piece_map
        self.data = data
        self.have = have
        self.is_origin = is_origin
        self.closed = False

    @contextmanager
    def open_piece(self, index: int) -> Iterator[Region]:
        if not self.have[index]:
            raise Missing(f"piece {index}")
        start = index * self.map.piece_size
        data = self.data[start : start + self.map.length_of(index)]
        descriptor = os.memfd_create("piece")
        try:
            os.write(descriptor, data)
            yield Region(descriptor, 0, len(data))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        self.closed = True


class MemorySink:
    """One piece on its way in."""

    def __init__(self, partial: "MemoryPartial", index: int, gate: trio.Event | None) -> None:
        self.length = partial.map.length_of(index)
        self.is_new = False
        self.gate = gate
        self._partial = partial
        self._index = index
        self._data = bytearray()
        self._settled = False

    def write(self, data: bytes | memoryview) -> None:
        self._data += data

    def settle(self) -> None:
        self._partial.take(self._index, self._data)
        self._settled = True

    def close(self) -> None:
        if self._settled:
            self.is_new = not self._partial.have[self._index]
            self._partial.have[self._index] = 1


class MemoryPartial(MemorySource):
    """A partial blob in memory; `writes` counts good pieces."""

    def __init__(self, store: "MemoryStore", digest: str, piece_map: PieceMap) -> None:
        have = bytearray(len(piece_map))
        super().__init__(piece_map, bytearray(piece_map.size), have, is_origin=False)
        self._store = store
        self._digest = digest
        self._settled: set[int] = set()

    def learn(self, hashes: Mapping[int, bytes]) -> None:
        known = bytearray(self.map.hashes)
        for index, got in hashes.items():
            if self.map.hash_of(index) not in (got, bytes(32)):
                raise Corrupt(f"piece {index} had another hash")
            known[index * 32 : index * 32 + 32] = got
        self.map = PieceMap(self.map.size, self.map.piece_size, bytes(known))

    def begin_piece(self, index: int) -> MemorySink:
        return MemorySink(self, index, self._store.write_gate)

    def take(self, index: int, data: bytes | bytearray) -> None:
        if hashlib.sha256(data).digest() != self.map.hash_of(index):
            self._store.refused += 1
            raise Corrupt(f"piece {index} has the wrong hash")
        if self._store.room is not None and len(data) > self._store.room:
            raise Full("no room")
        if index in self._settled:  # the end game's second copy
            return
        self._settled.add(index)
        start = index * self.map.piece_size
        self.data[start : start + len(data)] = data
        self._store.writes[index] += 1

    def write_piece(self, index: int, data: bytes) -> None:
        """What a test puts in."""
        self.take(index, data)
        self.have[index] = 1

    async def keep_up(self) -> None:
        await trio.lowlevel.checkpoint()

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        assert all(self.have)
        if f"sha256:{hashlib.sha256(self.data).hexdigest()}" != self._digest:
            raise Corrupt("the whole is wrong")
        self._store.add(bytes(self.data))
        assert self._digest in self._store.blobs
        del self._store.partials[self._digest]


class MemoryStore:
    """A node's blobs. It outlives the node's daemon, as a disk does."""

    def __init__(self) -> None:
        self.blobs: dict[str, MemorySource] = {}
        self.partials: dict[str, MemoryPartial] = {}
        self.writes: Counter[int] = Counter()
        self.refused = 0
        self.room: int | None = None
        self.write_gate: trio.Event | None = None
        self.sources: list[MemorySource] = []

    def add(self, data: bytes) -> Layer:
        """Put a complete blob in: the layer that describes it."""
        layer, piece_map = layer_of(data)
        have = bytearray(b"\1" * len(piece_map))
        self.blobs[layer.digest] = MemorySource(piece_map, bytearray(data), have)
        return layer

    async def has_blob(self, digest: str) -> bool:
        await trio.lowlevel.checkpoint()
        return digest in self.blobs

    async def open_partial(self, digest: str, piece_map: PieceMap) -> MemoryPartial:
        await trio.lowlevel.checkpoint()
        found = self.partials.get(digest)
        if found is None:
            found = self.partials[digest] = MemoryPartial(self, digest, piece_map)
        found.closed = False
        return found

    async def open_piece_source(self, digest: str) -> MemorySource:
        await trio.lowlevel.checkpoint()
        found = self.blobs.get(digest) or self.partials.get(digest)
        if found is None:
            raise Missing(digest)
        source = MemorySource(found.map, found.data, found.have, is_origin=found.is_origin)
        self.sources.append(source)
        return source

    async def piece_map(self, digest: str) -> PieceMap:
        await trio.lowlevel.checkpoint()
        return self.blobs[digest].map

    async def open_growing_source(self, digest: str) -> MemorySource:
        await trio.lowlevel.checkpoint()
        found = self.partials.get(digest)
        return await self.open_piece_source(digest) if found is None else found


def layer_of(data: bytes) -> tuple[Layer, PieceMap]:
    hasher = PieceHasher(len(data))
    hasher.update(data)
    digest, piece_map = hasher.finish()
    media_type = "application/vnd.ollama.image.model"
    layer = Layer(media_type, digest, len(data), piece_map.piece_size, piece_map.root())
    return layer, piece_map
