"""Which nodes should hold a model. Pure.

This version places a model when it comes in: on the node that brought it, then on those with the
most free disk. Moving replicas afterwards is the reconcile loop's part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ollamad.core.ids import NodeId

KEEP_FREE_BYTES = 1 << 30  # a disk that a model fills to the brim fails everything else


@dataclass(frozen=True, slots=True)
class Site:
    """A node that may be asked to hold a model."""

    node_id: NodeId
    usable: bool  # online and not draining
    disk_free: int  # bytes


def fits(site: Site, size: int) -> bool:
    """Whether a model of that many bytes should go there."""
    return site.usable and site.disk_free - size >= KEEP_FREE_BYTES


def place(
    sites: Iterable[Site], size: int, replicas: int, keep: Sequence[NodeId] = ()
) -> tuple[NodeId, ...]:
    """The nodes for `replicas` copies of a model of `size` bytes, sorted.

    Those of `keep` (they have it) count first. Fewer come back if fewer fit.
    """
    roomiest = sorted(
        (site for site in sites if fits(site, size) and site.node_id not in keep),
        key=lambda site: (-site.disk_free, site.node_id),
    )
    more = max(0, replicas - len(keep))
    return tuple(sorted([*keep, *(site.node_id for site in roomiest[:more])]))
