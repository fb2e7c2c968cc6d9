"""Which prompts begin alike, and which nodes have such a beginning in their cache. Pure.

A prompt is cut into blocks, and each block is named by a hash of itself and all before it, so
that two prompts share a name exactly if they are the same up to the end of that block (block-
chained hashes, as in vLLM's automatic prefix caching). The blocks are of text, not of tokens: the
node that is asked has neither the model's tokenizer nor its template, and needs neither to see
that two requests begin alike.

Blocks grow with their place, so that the precision stays a part of the length and a prompt of any
size has few of them. Names are cut to 32 bits: a collision makes a node look warmer by one block
than it is, which costs a moment and no more.

Three parties use them. `PrefixCache` is what a node believes to hold; `PrefixNews` what it tells
in its beats, bounded; `PrefixIndex` what another node knows from that, and from where it has sent
requests itself.
"""

import bisect
import hashlib
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec

from ollamad.core.ids import NodeId
from ollamad.core.inference import GenerateRequest, Message

FIRST_BLOCK = 128  # bytes: some thirty tokens, about the least that is worth a way to another node
BLOCKS_PER_SIZE = 32  # then the size doubles: a block is at most a 32nd of what is before it
MAX_BLOCKS = 480  # 134 MB of prompt, more than a request may have

# A beat tells this many names at most, four bytes each: those that are new, and some of the others
# in turn, for nodes that missed a beat or came later.
MAX_NEW_TOLD = 128
TOLD_AGAIN = 32
RETELL_S = 2.5  # a name is new so long: two beats, of which one may be lost
MAX_HELD_BLOCKS = 4096  # that a node tells of; all of them are told again within two minutes

MAX_INDEX_BLOCKS = 200_000  # of all nodes, some 50 MB
MIN_NODE_BLOCKS = 128  # of one node, however many there are
# What this node has sent somewhere stays so long, whatever that node's beats say: they are older.
GRACE_S = 3.0


def _ends() -> tuple[int, ...]:
    ends, size = [0], FIRST_BLOCK
    while len(ends) <= MAX_BLOCKS:
        ends.append(ends[-1] + size)
        size <<= len(ends) % BLOCKS_PER_SIZE == 1
    return tuple(ends[1:])


ENDS = _ends()  # where each block ends, in bytes


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as far as routing knows it."""

    size: int  # bytes
    blocks: tuple[int, ...] = ()  # names of its whole blocks

    def covered(self, blocks: int) -> float:
        """Which part of the prompt so many of its blocks are, 0 to 1."""
        if blocks == len(self.blocks) and blocks:
            return 1.0  # what is behind the last whole block is not worth a distinction
        return ENDS[blocks - 1] / self.size if blocks else 0.0


def prompt_of(request: GenerateRequest, digest: str, answer: str | None = None) -> Prompt:
    """The prompt of a request to the model with that digest.

    With `answer`, what the cache holds when that was said: where a chat goes on.
    """
    running = hashlib.blake2b(digest.encode(), digest_size=8)
    parts = list(_parts(request))
    if answer is not None:
        parts += _message(Message("assistant", answer)) if request.messages else [answer.encode()]
    data = memoryview(b"".join(parts))
    blocks = []
    start = 0
    for end in ENDS[: bisect.bisect_right(ENDS, len(data))]:
        running.update(data[start:end])
        blocks.append(int.from_bytes(running.digest()[:4], "little"))
        start = end
    return Prompt(len(data), tuple(blocks))


def prompt_of_tokens(tokens: Sequence[int], digest: str) -> Prompt:
    """The prompt of a completion that goes on from these tokens (`context`), before its text."""
    return prompt_of(GenerateRequest("", context=tuple(tokens)), digest)


def prompt_after(
    request: GenerateRequest, digest: str, texts: Iterable[str], context: Sequence[int]
) -> Prompt:
    """What a cache holds when an answer has ended, as the next request will name it.

    `context`: the ids of all its tokens, if the client was told them.
    """
    if context:
        return prompt_of_tokens(context, digest)
    return prompt_of(request, digest, "".join(texts))


def _parts(request: GenerateRequest) -> Iterator[bytes]:
    """All that the prompt is made of, in the order in which templates put it."""
    if request.context:
        yield _packed(array("I", request.context))
        yield request.prompt.encode()
        return
    # Templates have the tools before the conversation.
    fixed = (request.template, request.suffix, request.tools, request.think, request.system or "")
    yield "\x00".join((*fixed, "")).encode()
    if request.messages is None:
        yield from map(_image, request.images)
        yield request.prompt.encode()
        return
    for message in request.messages:
        yield from _message(message)


def _message(message: Message) -> list[bytes]:
    calls = "".join(f"\x03{call.name}\x04{call.arguments}" for call in message.tool_calls)
    text = f"\x01{message.role}\x02{message.content}{calls}".encode()
    return [text, *map(_image, message.images)]


def _image(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def _packed(names: "array[int]") -> bytes:
    if sys.byteorder == "big":
        names = array("I", names)
        names.byteswap()
    return names.tobytes()


class PrefixNews(msgspec.Struct, frozen=True, array_like=True):
    """What a beat tells of a node's caches: at most 700 bytes."""

    count: int = 0  # names that it holds in all; negative: nothing is told of them
    names: bytes = b""  # some of them, the newest last; four bytes each, little-endian

    def blocks(self) -> list[int]:
        """The names."""
        names = array("I")
        names.frombytes(self.names[: len(self.names) // 4 * 4])
        if sys.byteorder == "big":
            names.byteswap()
        return names.tolist()


NOT_TOLD = PrefixNews(-1)


@dataclass(slots=True)
class _Sequence:
    blocks: tuple[int, ...]
    tokens: float


class PrefixCache:
    """What the runners of this node hold of earlier prompts, as far as it can be told from outside.

    llama.cpp keeps the last sequence of each slot, and what was pushed out of a slot in a cache of
    some bytes. A request goes to the slot whose sequence it goes on; else the oldest gives way.
    """

    def __init__(self) -> None:
        self._models: dict[str, list[_Sequence]] = {}  # the most recent first
        self._counts: dict[int, int] = {}  # in how many sequences a name is
        self._new: dict[int, float] = {}  # name -> when it came
        self._turn = 0  # which of the others are told next
        self._held: list[int] | None = None

    def hold(
        self, digest: str, prompt: Prompt, tokens: float, *, slots: int, room: float, now: float
    ) -> None:
        """A prompt was evaluated; `room` is the tokens of the cache beside the slots."""
        sequences = self._models.setdefault(digest, [])
        blocks = prompt.blocks
        kept: list[_Sequence] = []
        if blocks:
            self._count(blocks, 1, now)
            kept.append(_Sequence(blocks, tokens))
        for sequence in sequences:
            # What it goes on is the same sequence, grown.
            keeps = sequence.blocks != blocks[: len(sequence.blocks)]
            if keeps and len(kept) >= max(1, slots):
                room -= sequence.tokens
                keeps = room >= 0
            if keeps:
                kept.append(sequence)
            else:
                self._count(sequence.blocks, -1, now)
        self._models[digest] = kept
        self._held = None

    def keep_only(self, digests: Iterable[str]) -> bool:
        """Only these models are in memory still; whether another one was held."""
        gone = self._models.keys() - set(digests)
        for digest in gone:
            for sequence in self._models.pop(digest):
                self._count(sequence.blocks, -1, 0.0)
            self._held = None
        return bool(gone)

    def _count(self, blocks: Sequence[int], sign: int, now: float) -> None:
        """So many sequences more, or fewer, have these blocks."""
        counts = self._counts
        for name in blocks:
            count = counts.get(name, 0) + sign
            if count:
                if sign > 0 and count == 1:
                    self._new.pop(name, None)
                    self._new[name] = now
                counts[name] = count
            else:
                del counts[name]

    def blocks(self) -> Sequence[int]:
        """The names of all that is held, of the most recent first."""
        return self._all_held()

    def covered(self, digest: str, prompt: Prompt) -> float:
        """Which part of a prompt is held, 0 to 1."""
        best = 0
        for sequence in self._models.get(digest, ()):
            best = max(best, _common(sequence.blocks, prompt.blocks))
        return prompt.covered(best)

    def news(self, now: float) -> PrefixNews:
        """What the next beat tells."""
        held = self._all_held()
        for name in [name for name, at in self._new.items() if now - at > RETELL_S]:
            del self._new[name]
        told = [name for name in self._new if name in self._counts][-MAX_NEW_TOLD:]
        again = []
        if len(held) > len(told):
            if self._turn >= len(held):
                self._turn = 0
            again = held[self._turn : self._turn + TOLD_AGAIN]
            self._turn += TOLD_AGAIN
        return PrefixNews(len(held), _packed(array("I", [*again, *told])))

    def _all_held(self) -> list[int]:
        """All names, of the most recent sequence first."""
        if self._held is None:
            names: dict[int, None] = {}
            for sequences in self._models.values():
                for sequence in sequences:
                    names.update(dict.fromkeys(sequence.blocks))
            self._held = list(names)[:MAX_HELD_BLOCKS]
        return self._held


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many blocks two prompts share; names are chained, so the last common one tells."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """Which nodes hold which blocks. Sets of nodes are bits of an integer, by their number."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # name -> the nodes
        self._held: dict[int, dict[int, float]] = {}  # number -> names, and when last told of

    def __len__(self) -> int:
        return len(self._holders)

    def tell(self, number: int, names: Iterable[int], now: float) -> None:
        """That node holds these."""
        held = self._held.setdefault(number, {})
        bit = 1 << number
        holders = self._holders
        for name in names:
            if held.pop(name, None) is None:
                holders[name] = holders.get(name, 0) | bit
            held[name] = now
        share = max(MIN_NODE_BLOCKS, MAX_INDEX_BLOCKS // len(self._held))
        self._trim(number, share, told_before=math.inf)

    def hear(self, number: int, news: PrefixNews, now: float) -> None:
        """What a node's beat told."""
        if news.count < 0:
            return
        self.tell(number, news.blocks(), now)
        # It holds no more than that; what it did not tell of for longest is gone.
        self._trim(number, news.count, told_before=now - GRACE_S)

    def forget(self, number: int) -> None:
        """That node is gone, or holds nothing any more."""
        for name in self._held.pop(number, ()):
            self._drop(name, 1 << number)

    def levels(self, prompt: Prompt, among: int) -> list[tuple[int, int]]:
        """The nodes of a set by how much of the prompt they hold: (nodes, blocks), most first.

        Those that hold nothing are the last.
        """
        found = []
        holders, here = self._holders, among
        for count, name in enumerate(prompt.blocks):
            deeper = holders.get(name, 0) & here
            if deeper != here:
                found.append((here ^ deeper, count))
                here = deeper
                if not here:
                    break
        if here:
            found.append((here, len(prompt.blocks)))
        found.reverse()
        return found

    def _trim(self, number: int, count: int, *, told_before: float) -> None:
        held = self._held[number]
        for name in list(islice(held, max(0, len(held) - count))):
            if held[name] < told_before:
                del held[name]
                self._drop(name, 1 << number)

    def _drop(self, name: int, bit: int) -> None:
        left = self._holders.get(name, 0) & ~bit
        if left:
            self._holders[name] = left
        else:
            self._holders.pop(name, None)


class Numbers:
    """Small numbers for nodes, so that sets of them are integers. A number is used again."""

    def __init__(self) -> None:
        self.of: dict[NodeId, int] = {}
        self.nodes: list[NodeId | None] = []

    def number(self, node_id: NodeId) -> int:
        """The node's number, given now if it has none."""
        found = self.of.get(node_id)
        if found is None:
            found = next((n for n, node in enumerate(self.nodes) if node is None), len(self.nodes))
            if found == len(self.nodes):
                self.nodes.append(None)
            self.nodes[found] = node_id
            self.of[node_id] = found
        return found

    def drop(self, node_id: NodeId) -> None:
        """The node is no member any more."""
        number = self.of.pop(node_id, None)
        if number is not None:
            self.nodes[number] = None


def bits(nodes: int) -> Iterator[int]:
    """The numbers in a set, lowest first."""
    while nodes:
        lowest = nodes & -nodes
        yield lowest.bit_length() - 1
        nodes ^= lowest
