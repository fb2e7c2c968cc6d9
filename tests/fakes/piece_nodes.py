"""Nodes that exchange pieces in memory: streams with flow control, a network of them, a store.

The network can lose a node at any message, and the store counts what was written. With these
no thread and no socket is used, so that tests may run on virtual time.
"""

from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import PieceHasher, PieceMap
from ollamad.core.state import Layer

WINDOW = 1 << 20  # bytes under way in one direction, as on a real link

Handler = Callable[[NodeId, bytes, "MemoryStream"], Awaitable[None]]
Hook = Callable[[bytes], Awaitable[bytes]]


class NodeLost(trio.BrokenResourceError):
    """The other node is gone."""


class NodeUnreachable(OSError):
    """There is no way to that node."""


class MemoryStream:
    """One side of an exchange."""

    def __init__(self) -> None:
        self._inbox: deque[bytes] = deque()
        self._waiting = 0  # bytes in the inbox
        self._ended = False
        self._broken = False
        self._changed = trio.Event()
        self._other = self
        self.hook: Hook | None = None  # sees, changes or holds up what this side sends
        self.sent: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.hook is not None:
            data = await self.hook(data)
        other = self._other
        while not self._broken and other._waiting >= WINDOW:
            await self._changed.wait()
        if self._broken:
            raise NodeLost("the exchange is over")
        other._inbox.append(data)
        other._waiting += len(data)
        other._notify()

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._ended:
                return None
            if self._broken:
                raise NodeLost("the exchange is over")
            await self._changed.wait()
        data = self._inbox.popleft()
        self._waiting -= len(data)
        self._other._notify()
        return data

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._other._ended = True
        self._other._notify()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        for side in (self, self._other):
            side._broken = True
            side._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def stream_pair() -> tuple[MemoryStream, MemoryStream]:
    left, right = MemoryStream(), MemoryStream()
    left._other, right._other = right, left
    return left, right


class Network:
    """Fake nodes that reach each other. Handlers run in the given nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._handlers: dict[tuple[NodeId, str], Handler] = {}
        self._exchanges: dict[NodeId, set[tuple[trio.CancelScope, MemoryStream]]] = {}
        self.hooks: dict[NodeId, Hook] = {}  # on what that node's handlers send
        self.down: set[NodeId] = set()
        self.opened: Counter[NodeId] = Counter()

    def handle(self, node: NodeId, method: str, handler: Handler) -> None:
        self._handlers[node, method] = handler

    def kill(self, node: NodeId) -> None:
        """kill -9: its exchanges break, and it cannot be reached until `revive`."""
        self.down.add(node)
        for scope, stream in list(self._exchanges.get(node, ())):
            scope.cancel()
            stream.close()

    def revive(self, node: NodeId) -> None:
        self.down.discard(node)

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


class Missing(Exception):
    """There is no such blob."""


class Full(Exception):
    """There is no room."""


class MemorySource:
    """Pieces in memory."""

    def __init__(self, piece_map: PieceMap, data: bytearray, have: bytearray) -> None:
        self.map = piece_map
        self.data = data
        self.have = have
        self.closed = False

    async def read_piece(self, index: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.have[index]:
            raise Missing(f"piece {index}")
        start = index * self.map.piece_size
        return bytes(self.data[start : start + self.map.length_of(index)])

    def close(self) -> None:
        self.closed = True


class MemoryPartial(MemorySource):
    """A partial blob in memory; `writes` counts good pieces."""

    def __init__(self, store: "MemoryStore", digest: str, piece_map: PieceMap) -> None:
        super().__init__(piece_map, bytearray(piece_map.size), bytearray(len(piece_map)))
        self._store = store
        self._digest = digest

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool:
        await trio.lowlevel.checkpoint()
        if self._store.write_gate is not None:
            await self._store.write_gate.wait()
        hasher = PieceHasher(len(data))
        hasher.update(data)
        if hasher.finish()[0] != f"sha256:{self.map.hash_of(index).hex()}":
            self._store.refused += 1
            raise Corrupt(f"piece {index} has the wrong hash")
        if self._store.room is not None and len(data) > self._store.room:
            raise Full("no room")
        start = index * self.map.piece_size
        self.data[start : start + len(data)] = data
        self._store.writes[index] += 1
        new = not self.have[index]
        self.have[index] = 1
        return new

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()
        assert all(self.have)
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
        source = MemorySource(found.map, found.data, found.have)
        self.sources.append(source)
        return source


def layer_of(data: bytes) -> tuple[Layer, PieceMap]:
    hasher = PieceHasher(len(data))
    hasher.update(data)
    digest, piece_map = hasher.finish()
    media_type = "application/vnd.ollama.image.model"
    layer = Layer(media_type, digest, len(data), piece_map.piece_size, piece_map.root())
    return layer, piece_map
