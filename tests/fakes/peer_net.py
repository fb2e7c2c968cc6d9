"""A network of meshes in memory: dials that can be refused, links that can be cut.

No socket and no thread is used, so that tests may run on virtual time.
"""

from typing import Any

import trio
import trio.testing

from ollamad.core.ids import NodeId
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import PeerUnreachable
from tests.fakes.memory_lanes import LaneNet

Ends = tuple[trio.StapledStream[Any, Any], trio.StapledStream[Any, Any]]


class PeerNet:
    """Meshes by id.

    `down` cannot be dialled, a node in `mute` accepts and never says a word, and one in `dead`
    neither dials nor is dialled, though its mesh runs on.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.meshes: dict[NodeId, Mesh] = {}
        self.down: set[NodeId] = set()
        self.mute: set[NodeId] = set()
        self.dead: set[NodeId] = set()
        self.dials: list[tuple[NodeId, NodeId]] = []
        self.dial_gate: trio.Event | None = None  # dials wait for it
        self.lanes = LaneNet()
        self._ends: list[tuple[NodeId, NodeId, Ends]] = []

    async def add(self, node_id: NodeId, *, version: str = "1.0") -> Mesh:
        """A mesh that runs."""
        mesh = Mesh(
            _MemoryGate(self, node_id),  # type: ignore[arg-type]
            version=version,
            address_of=lambda other: f"{other}:9000" if other in self.meshes else None,
        )
        self.meshes[node_id] = mesh
        self.dead.discard(node_id)
        await self._nursery.start(mesh.run)
        return mesh

    def cut(self, node_id: NodeId) -> None:
        """End all connections of a node, as when its process dies."""
        self.lanes.kill(node_id)
        for one, other, ends in self._ends:
            if node_id in (one, other):
                for end in ends:
                    end.receive_stream.put_eof()
        self._ends = [entry for entry in self._ends if node_id not in entry[:2]]

    async def dial(self, dialler: NodeId, target: NodeId) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dials.append((dialler, target))
        if self.dial_gate is not None:
            await self.dial_gate.wait()
        if target in self.down or not self.dead.isdisjoint((dialler, target)):
            raise PeerUnreachable(f"{target} refuses")
        ends = trio.testing.memory_stream_pair()
        self._ends.append((dialler, target, ends))
        if target not in self.mute:
            self._nursery.start_soon(self._serve, target, ends[1], dialler)
        return ends[0]

    async def _serve(self, target: NodeId, end: Any, dialler: NodeId) -> None:
        await self.meshes[target].serve_member(end, dialler)


class _MemoryGate:
    def __init__(self, net: PeerNet, own: NodeId) -> None:
        self._net = net
        self._own = own

    async def dial(self, node_id: NodeId, address: str) -> trio.abc.Stream:
        return await self._net.dial(self._own, node_id)
