"""How entry nodes share the slots of a cluster, so that it does not matter through which one asks.

Each entry node has a fair queue of its own (`core.admission`). Without more, a slot that is free
again goes to the node that notices first, which is the one whose request had it: who asks through
another node would wait for as long as the first has a queue. So beats tell who asks at each entry
node for which model, and what they got. From that each node knows its part: everybody who asks
counts as one, shared among the entry nodes that he asks through. Up to that part of the slots a
node may send whatever the beats say of room; beyond it, only where there is room. And what an
identity got through other nodes is charged to it here, too.

Pure. Beats are a second old, so that shares are right in the mean over a few seconds. Who asks is
told by four bytes of a hash; a collision makes two share one part.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from ollamad.core.admission import FairQueue
from ollamad.core.ids import NodeId
from ollamad.core.speeds import short_digest

NAME_SIZE = 4  # bytes
MAX_TOLD_NAMES = 32  # identities of a beat; of further ones only their number is told
MAX_TOLD_MODELS = 8
MAX_REMEMBERED = 128  # identities of another node whose tokens are remembered
MAX_BELIEVED = 10_000  # identities that a node can say to have beside those that it names
MAX_TOKENS = 1e9  # that an identity can have got in a second or two


class Asking(msgspec.Struct, frozen=True, array_like=True):
    """Who asks for one model at an entry node: requests that wait or are being answered."""

    model: str  # `short_digest`
    who: int  # of `Shares.names`, as bits
    more: int = 0  # others, who are not among them


class Shares(msgspec.Struct, frozen=True, array_like=True):
    """What a beat tells of who asks at a node: 400 bytes at most."""

    names: bytes = b""  # four each
    got: tuple[int, ...] = ()  # weighted tokens that each got since the node knows it
    models: tuple[Asking, ...] = ()

    def list_names(self) -> list[int]:
        """The names, without what is too much or no whole one."""
        ends = range(NAME_SIZE, len(self.names) + 1, NAME_SIZE)
        told = [int.from_bytes(self.names[end - NAME_SIZE : end], "little") for end in ends]
        return told[:MAX_TOLD_NAMES]


NOBODY = Shares()


def name_of(identity: str) -> int:
    """What stands for an identity in beats."""
    digest = hashlib.blake2b(identity.encode(), digest_size=NAME_SIZE).digest()
    return int.from_bytes(digest, "little")


class _Other:
    """What another entry node has told."""

    def __init__(self) -> None:
        self.told = NOBODY
        self.got: dict[int, int] = {}
        self.asking: dict[str, frozenset[int]] = {}
        self.more: dict[str, int] = {}


class Ledger:
    """Who asks at this entry node and at the others; `queue` is charged for what they told."""

    def __init__(self, queue: FairQueue) -> None:
        self._queue = queue
        # Of identities that asked here lately, the last at the end.
        self._names: dict[str, int] = {}
        self._asking: dict[str, Counter[str]] = {}  # by digest: requests of each identity
        self._others: dict[NodeId, _Other] = {}
        self._parts: dict[str, float | None] = {}  # by digest, until something changes

    def begin(self, identity: str, digest: str) -> None:
        """A request came in here."""
        name = self._names.pop(identity, None)
        self._names[identity] = name_of(identity) if name is None else name
        asking = self._asking.setdefault(digest, Counter())
        asking[identity] += 1
        if asking[identity] == 1:
            self._parts.pop(digest, None)
        if len(self._names) > MAX_REMEMBERED:
            now = self._who_asks()
            for old in [name for name in self._names if name not in now]:
                del self._names[old]
                if len(self._names) <= MAX_REMEMBERED // 2:
                    break

    def end(self, identity: str, digest: str) -> None:
        """A request that `begin` told of is answered or given up."""
        asking = self._asking[digest]
        asking[identity] -= 1
        if not asking[identity]:
            del asking[identity]
            self._parts.pop(digest, None)
        if not asking:
            del self._asking[digest]

    def told(self) -> Shares:
        """What a beat tells: who asks now, and who asked last."""
        now = self._who_asks()
        lately = [identity for identity in reversed(self._names) if identity not in now]
        shown = [*sorted(now, key=self._names.__getitem__), *lately][:MAX_TOLD_NAMES]
        if not shown:
            return NOBODY
        bits = {identity: 1 << place for place, identity in enumerate(shown)}
        models = [
            Asking(
                short_digest(digest),
                sum(bits.get(identity, 0) for identity in asking),
                sum(identity not in bits for identity in asking),
            )
            for digest, asking in self._asking.items()
        ]
        models.sort(key=lambda one: -(one.who.bit_count() + one.more))
        return Shares(
            b"".join(self._names[identity].to_bytes(NAME_SIZE, "little") for identity in shown),
            tuple(round(self._queue.got(identity)) for identity in shown),
            tuple(models[:MAX_TOLD_MODELS]),
        )

    def hear(self, node_id: NodeId, shares: Shares) -> None:
        """Another node has told."""
        if shares == NOBODY and node_id not in self._others:
            return
        other = self._others.setdefault(node_id, _Other())
        if shares is other.told:
            return  # a rumour, which tells nothing of this
        other.told = shares
        names = shares.list_names()
        here = {self._names[identity]: identity for identity in self._names}
        for name, got in zip(names, shares.got, strict=False):
            before = other.got.pop(name, got)  # of whom nothing is known begins now
            other.got[name] = got
            # Less than before: the node has forgotten it meanwhile, and begins anew.
            if name in here and before < got < before + MAX_TOKENS:
                self._queue.charge(here[name], got - before)
        while len(other.got) > MAX_REMEMBERED:
            del other.got[next(iter(other.got))]
        other.asking, other.more = {}, {}
        for told in shares.models[:MAX_TOLD_MODELS]:
            other.asking[told.model] = frozenset(
                name for place, name in enumerate(names) if told.who >> place & 1
            )
            other.more[told.model] = min(MAX_BELIEVED, max(0, told.more))
        self._parts.clear()

    def keep_only(self, nodes: Callable[[], Iterable[NodeId]]) -> None:
        """Only these nodes are there still; it is looked at only if any has told something."""
        gone = self._others.keys() - set(nodes()) if self._others else ()
        for node_id in gone:
            del self._others[node_id]
        if gone:
            self._parts.clear()

    def part(self, digest: str) -> float | None:
        """Which part of a model's slots is this node's, 0 to 1; None if nobody else asks for it."""
        if digest not in self._parts:
            self._parts[digest] = self._part(digest)
        return self._parts[digest]

    def _part(self, digest: str) -> float | None:
        model = short_digest(digest)
        others = [other for other in self._others.values() if other.asking.get(model)]
        more = sum(other.more.get(model, 0) for other in self._others.values())
        if not others and not more:
            return None
        here = {self._names[identity] for identity in self._asking.get(digest, ())}
        nodes = Counter(here)
        for other in others:
            nodes.update(other.asking[model])
        everybody = len(nodes) + more
        return math.fsum(1 / nodes[name] for name in here) / everybody if everybody else None

    def _who_asks(self) -> set[str]:
        return {identity for asking in self._asking.values() for identity in asking}


def may_begin(
    room: int, slots: int, running: int, part: float | None, *, takes_rest: bool = False
) -> bool:
    """Whether an entry node may send one more: there is room, or others took what is its part.

    Args:
      room: requests that may be sent, as far as this node knows.
      running: its own requests that are being answered.
      part: of the slots, see `Ledger.part`.
      takes_rest: also beyond its part, of what nobody has taken for a while.
    """
    if part is None:
        return room > 0
    if running < max(1, math.floor(slots * part)):
        return True
    return room > 0 and (takes_rest or running < math.ceil(slots * part))
