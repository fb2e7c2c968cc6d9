"""Which pieces the source of a blob shows to whom, so that each leaves it about once.

Super-seeding, as BitTorrent calls it: while several nodes fetch a blob that only its source has
whole, the source's link is what limits all of them. So it gives each piece to one node only, and
another one to the next; they pass them on to each other. BitTorrent's seeds have to guess what
the others have by now; here the fetchers of a cluster say so.

A piece that was shown to a node is *claimed* for it until it has it. When every piece has left the
source, every node may see everything, and the source is one holder among others; before that, a
second copy would only hold up a first one.

Pure: time (seconds of any steady clock) is an argument. Sets of pieces are ints: bit i is piece i.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from ollamad.core.pieces import MIB

CLAIM_BYTES = 4 * MIB  # claimed ahead for a node, so that it always has something to ask for
ALL_CLAIM_BYTES = 32 * MIB  # for all nodes together, if there are many
MIN_CLAIMS = 2  # pieces
# A claim lapses when its node is too slow, or does not want the piece: after so long, if the source
# has meanwhile sent twice as much as was claimed by all, or nothing at all.
CLAIM_S = 5.0


@dataclass(frozen=True, slots=True)
class _Claim:
    since: float
    sent: int  # pieces that the source had sent by then


@dataclass(slots=True)
class _Node:
    shown: int = 0  # may not be taken back
    got: int = 0  # it said so, or it was sent to it
    given: int = 0  # what was ever claimed for it; it may be the only one that got it
    claims: dict[int, "_Claim"] = field(default_factory=dict)  # of pieces that it has not got yet
    lapsed: bool = False  # it lost a claim, and got nothing since: no new ones


class Spread:
    """The nodes that fetch one blob of this source, by any key."""

    def __init__(self, piece_size: int, start: int) -> None:
        """Pieces are given out in ascending order from number `start`, then from 0."""
        self._piece_size = max(1, piece_size)
        self._start = start
        self._sent = 0  # pieces
        self._moved_at = 0.0  # when something of a piece was last sent
        self._nodes: dict[Hashable, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def joined(self, key: Hashable) -> None:
        self._nodes[key] = _Node()

    def left(self, key: Hashable) -> None:
        """That node is gone, with the pieces that only it had."""
        del self._nodes[key]

    def got(self, key: Hashable, bits: int) -> None:
        """That node has these pieces, from whomever."""
        node = self._nodes[key]
        if bits & ~node.got:
            node.lapsed = False
        node.got |= bits
        for index in [index for index in node.claims if bits >> index & 1]:
            del node.claims[index]

    def sent(self, key: Hashable, index: int, now: float) -> None:
        """The source has sent that node a piece."""
        self._sent += 1
        self._moved_at = now
        self.got(key, 1 << index)

    def moved(self, now: float) -> None:
        """The source has sent some of a piece."""
        self._moved_at = now

    def asked(self, key: Hashable, index: int, now: float) -> None:
        """That node asks for a piece, so it will have it soon."""
        node = self._nodes[key]
        node.given |= 1 << index
        if not node.got >> index & 1:
            node.claims.setdefault(index, _Claim(now, self._sent))

    def ended(self, key: Hashable, index: int) -> None:
        """A request ended without its piece: it was cancelled, say."""
        node = self._nodes[key]
        node.claims.pop(index, None)
        if not node.got >> index & 1:
            node.given &= ~(1 << index)

    def show(self, key: Hashable, have: int, now: float) -> int:
        """What that node may know of the pieces `have` that are here; grows from call to call."""
        node = self._nodes[key]
        self._lapse(now)
        out = held_back = 0
        for other_key, other in self._nodes.items():
            out |= other.given | other.got
            if other_key != key:
                for index in other.claims:
                    held_back |= 1 << index
        free = have & ~out
        while free and len(node.claims) < self._allowance() and not node.lapsed:
            index = self._next(free)
            free ^= 1 << index
            node.claims[index] = _Claim(now, self._sent)
            node.given |= 1 << index
            node.shown |= 1 << index
        if not free and not held_back:
            node.shown |= have
        return node.shown

    def _allowance(self) -> int:
        """Pieces that may be claimed for one node."""
        size = min(CLAIM_BYTES, ALL_CLAIM_BYTES // len(self._nodes))
        if len(self._nodes) == 1:
            size = 2 * CLAIM_BYTES  # nobody is held back
        return max(MIN_CLAIMS, size // self._piece_size)

    def _lapse(self, now: float) -> None:
        enough = 2 * len(self._nodes) * self._allowance()
        stuck = now - self._moved_at >= CLAIM_S
        for node in self._nodes.values():
            for index, claim in list(node.claims.items()):
                late = now - claim.since >= CLAIM_S
                if late and (stuck or self._sent - claim.sent >= enough):
                    del node.claims[index]
                    node.given &= ~(1 << index)
                    node.lapsed = True

    def _next(self, free: int) -> int:
        chosen = free >> self._start << self._start or free
        return (chosen & -chosen).bit_length() - 1
