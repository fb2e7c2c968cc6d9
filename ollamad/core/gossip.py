"""Whom a node tells how it is, and what it passes on of others. Pure.

In a small cluster everybody tells everybody. That costs each node as many beats a second as there
are others, so a larger one gossips: each second a node tells FANOUT others, in a random order that
begins anew when all had their turn (the randomised round-robin of SWIM), and passes on what it has
heard lately of others, each bit of news a few times (Demers et al. 1987; Cassandra finds failures
in the same way). So what a node sends and receives does not grow with the cluster; how old its
knowledge is does, slowly.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ollamad.core.ids import NodeId
from ollamad.core.presence import Beat, ModelLoad, Rumour
from ollamad.core.speeds import short_digest

FANOUT = 8
MAX_RUMOURS = 64  # in a beat: 3 KB
# How often one bit of news is passed on. With what the others do, everybody hears it.
RETOLD = 12
RUMOUR_ID_CHARS = 12  # of a node id, unique in any cluster
MAX_LOADS = 4  # models in memory that are told of a node


def rumour_of(node_id: NodeId, beat: Beat) -> Rumour:
    """What is passed on of a beat."""
    pending = {speed.model: speed.pending for speed in beat.speeds}
    return Rumour(
        node_id[:RUMOUR_ID_CHARS],
        beat.sent_at,
        tuple(
            ModelLoad(
                short_digest(one.digest),
                one.slots,
                one.busy,
                one.queued,
                pending.get(short_digest(one.digest), 0),
            )
            for one in beat.loaded[:MAX_LOADS]
        ),
        beat.waiting,
        beat.leaving,
    )


@dataclass(slots=True)
class _News:
    rumour: Rumour
    told: int = 0  # times


class Gossip:
    """One node's part in it. `shuffle` puts a list in a random order."""

    def __init__(self, shuffle: Callable[[list[NodeId]], None]) -> None:
        self._shuffle = shuffle
        self._turn: list[NodeId] = []
        self._news: dict[str, _News] = {}

    def next_round(self, peers: Collection[NodeId]) -> list[NodeId]:
        """Whom to tell now."""
        if len(peers) <= FANOUT:
            return list(peers)
        wanted = set(peers)
        self._turn = [node_id for node_id in self._turn if node_id in wanted]
        if len(self._turn) < FANOUT:
            late = sorted(wanted.difference(self._turn))
            self._shuffle(late)
            self._turn += late
        chosen, self._turn = self._turn[:FANOUT], self._turn[FANOUT:]
        return chosen

    def hear(self, rumour: Rumour) -> None:
        """There is news of a node."""
        known = self._news.get(rumour.node)
        if known is None or rumour.sent_at > known.rumour.sent_at:
            self._news[rumour.node] = _News(rumour)

    def pass_on(self, peers: Collection[NodeId], to: NodeId) -> tuple[Rumour, ...]:
        """What to tell a node of the others: what was told least, the newest first."""
        if len(peers) <= FANOUT:
            self._news.clear()
            return ()
        skipped = to[:RUMOUR_ID_CHARS]
        fresh = [
            news for node, news in self._news.items() if news.told < RETOLD and node != skipped
        ]
        fresh.sort(key=lambda news: (news.told, -news.rumour.sent_at))
        for news in fresh[:MAX_RUMOURS]:
            news.told += 1
        return tuple(news.rumour for news in fresh[:MAX_RUMOURS])

    def forget(self, node_id: NodeId) -> None:
        """It is no member any more."""
        self._news.pop(node_id[:RUMOUR_ID_CHARS], None)
