"""Which node of the cluster should bring a model in from its origin. Pure.

One node talks to the origin, and the others get the model from it. It should have room, be able
to get through to the origin, and have little else to do, since hashing and writing take time
from its answers. Who has the model of that name lacks least of its next version, and who is
pulling another tag of it may be getting the same weights. Who turns out not to get through, not to
be let in, or to have no room hands the pull to the next one; only who does not get through is
asked last for a while.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ollamad.core.ids import NodeId
from ollamad.core.placement import KEEP_FREE_BYTES

BUSY_CPU = 0.7  # of the whole machine; above, a pull would be felt
UNREACHABLE_S = 300.0  # a node that did not get through to an origin is asked last for so long


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could pull."""

    node_id: NodeId
    usable: bool  # online and not draining
    disk_free: int  # bytes
    cpu: float  # 0 to 1
    active_requests: int
    unreachable_for_s: float | None = None  # since it last failed to reach that origin
    holds: bool = False  # the model of that name, as it is now
    pulls_kin: bool = False  # another tag of it, which comes once for both where it is the same


def rank(
    candidates: Iterable[Candidate],
    *,
    size: int,
    asked: Collection[NodeId] = (),
    tried: Collection[NodeId] = (),
    here: NodeId | None = None,
) -> list[NodeId]:
    """The nodes that may pull, best first.

    Args:
      size: bytes of the model; 0 if it is not known yet: then whoever is first finds it out.
      asked: if not empty, nobody else.
      tried: those who have failed already.
      here: the node that the user asked, which is taken among equals.
    """
    fit = [
        each
        for each in candidates
        if each.usable and each.node_id not in tried and (not asked or each.node_id in asked)
    ]
    return [each.node_id for each in sorted(fit, key=lambda each: _cost(each, size, here))]


def _cost(
    each: Candidate, size: int, here: NodeId | None
) -> tuple[bool, bool, bool, int, bool, bool, int, str]:
    since = each.unreachable_for_s
    is_cut_off = since is not None and since < UNREACHABLE_S
    is_tight = each.disk_free - size < KEEP_FREE_BYTES
    load = each.active_requests + (1 if each.cpu > BUSY_CPU else 0)
    is_here = each.node_id == here
    return (
        is_cut_off,
        is_tight,
        not each.pulls_kin,
        load,
        not each.holds,
        not is_here,
        -each.disk_free,
        each.node_id,
    )
