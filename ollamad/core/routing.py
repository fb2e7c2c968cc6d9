"""Where a request goes: the nodes that can answer, best first. Pure.

The rule of this version: a node that has the model loaded, the fewest waiting requests first and
this node before others; else a node where it fits in memory, the roomiest first. Nodes that drain
or are silent get nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ollamad.core.ids import NodeId
from ollamad.core.inference import LoadedModel


@dataclass(frozen=True, slots=True)
class NodeView:
    """What is known of a node that holds the model on disk."""

    node_id: NodeId
    is_self: bool
    online: bool
    draining: bool
    loaded: LoadedModel | None  # this model in its memory
    outstanding: int  # requests for this model that we have sent there and that still run
    memory_free: int  # bytes: available, and what idle models there would give back


def route(nodes: Iterable[NodeView], needed_bytes: int) -> list[NodeId]:
    """The nodes to try, best first; empty if none is online and willing."""
    willing = [node for node in nodes if node.online and not node.draining]
    return [node.node_id for node in sorted(willing, key=lambda node: _cost(node, needed_bytes))]


def _cost(node: NodeView, needed_bytes: int) -> tuple[int, int, bool, int, NodeId]:
    if node.loaded is not None:
        # Beats are a second old, so what we have sent there ourselves may not show yet.
        in_use = max(node.loaded.busy + node.loaded.queued, node.outstanding)
        waiting = max(0, in_use + 1 - node.loaded.slots)
        return (0, waiting, not node.is_self, in_use, node.node_id)
    fits = node.memory_free >= needed_bytes
    # Several first requests at once should load the model once: stay with the node chosen first.
    loading = node.outstanding > 0
    tier = 1 if fits else 2
    return (tier, 0 if loading else 1, not node.is_self, -node.memory_free, node.node_id)
