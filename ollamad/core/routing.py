"""Where a request goes: the node that will say its first token soonest. Pure.

The rule is that of the published prefix-affinity schedulers, made fit for unequal hardware. The
predicted time to the first token of a node is

    wait + tokens of the prompt that its cache lacks / its measured rate of evaluation
    wait = prompt tokens before ours / rate + the queue for a slot + the load of the model

Nodes whose cache covers WARM of the prompt are preferred; if none does, all are compared. When the
best of them would take longer than the best other node by more than a bound, affinity is dropped
for this request. When even the chosen one has a queue of OVERLOAD_S, the shortest queue is taken.

A cluster may have a thousand nodes and a decision should take no longer than 100 µs, so nodes are
kept sorted: by classes of their rate and of their wait, each class a quarter wider than the one
before, as sets (bits of an integer) that a beat or a request changes by one bit. A decision looks
only into the lowest class of each rate that has a node in question, and compares a few nodes there
exactly. So what is chosen is at most a quarter of its wait worse than the best; and entry nodes
that decide at the same moment do not all take the same one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ollamad.core.prefix import PrefixIndex, Prompt, bits
from ollamad.core.speeds import PREFILL_RATE, SERVICE_S

Policy = Literal["prefix", "least-loaded", "round-robin", "random"]
POLICIES: tuple[Policy, ...] = ("prefix", "least-loaded", "round-robin", "random")

WARM = 0.8  # of the prompt: below, what is saved is less than what a queue costs
STICKY_BOUND_S = 2.0  # what affinity may cost in time to the first token
OVERLOAD_S = 10.0  # of waiting for a slot: then a cache saves little of it
# What another node costs beside this one: each token of the answer takes a way through two loops
# and TLS, some twentieth of its time; and predictions are not so exact that less would be a reason.
HOP_S = 0.1
HERE_FACTOR = 0.8
NO_ROOM_S = 30.0  # where a model that serves somebody would have to end first, or none helps
EVICTION_S = 1.0  # where an idle one would: it may be asked for again
CLASS_WIDTH = 1.25
SHORTEST_WAIT_S = 0.001
MAX_CLASS = 80  # a wait of twelve hours
MAX_LEVELS = 8  # of warmth that are told apart
COMPARED = 4  # nodes of a class that are compared exactly
# Requests that a node may be given beyond its slots, so that the next one is there already when
# one ends. More would be a queue that knows nothing of fairness.
BEYOND_SLOTS = 1
FEW = 12  # nodes that are compared one by one sooner than by their classes

Pick = Callable[[int], int]  # a number below that one, at random


def parse_policy(text: str) -> Policy:
    """The policy of that name.

    Raises:
      ValueError: there is none.
    """
    for policy in POLICIES:
        if policy == text:
            return policy
    raise ValueError(f"use one of {', '.join(POLICIES)}")


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a node that holds the model on disk."""

    willing: bool = True
    why_not: str = ""  # if it is not: offline, draining
    loaded: bool = True
    loading: bool = False  # a request that was sent there loads it now
    fits: bool = True  # in memory beside those that serve somebody, if it is not loaded
    evicts: bool = False  # it fits only when an idle one leaves
    slots: int = 1
    in_use: int = 0  # requests that have a slot or wait for one, those on their way included
    pending: float = 0.0  # tokens of prompts to be evaluated before ours
    prefill: float = PREFILL_RATE  # tokens a second
    service_s: float = SERVICE_S  # that a request holds a slot
    load_s: float = 0.0

    @property
    def queue_s(self) -> float:
        """Until a slot is free."""
        before = self.in_use + 1 - self.slots
        return before * self.service_s / self.slots if before > 0 else 0.0

    @property
    def wait_s(self) -> float:
        """Before the evaluation of another prompt begins."""
        wait = self.pending / self.prefill + self.queue_s
        if not self.loaded:
            # Who comes while it loads waits for the rest of that, and saves a second load.
            wait += self.load_s / 2 if self.loading else self.load_s
            if not self.loading:
                wait += NO_ROOM_S if not self.fits else EVICTION_S if self.evicts else 0.0
        return wait

    @property
    def is_able(self) -> bool:
        """Whether it would serve a request at all."""
        return self.willing and (self.loaded or self.loading or self.fits)

    @property
    def room(self) -> int:
        """Requests that may be sent there now."""
        return max(0, self.slots + BEYOND_SLOTS - self.in_use)


@dataclass(frozen=True, slots=True)
class Score:
    """How a node stands for a request."""

    number: int
    load: Load
    covered: float  # of the prompt, by its cache; 0 to 1
    uncached: float  # tokens that it would have to evaluate
    ttft_s: float  # predicted time to the first token


@dataclass(frozen=True, slots=True)
class Choice:
    """A node, and why."""

    score: Score
    why: str  # for people
    before: int = 0  # nodes that were tried before

    @property
    def number(self) -> int:
        return self.score.number


@dataclass(slots=True)
class _Rate:
    """The nodes whose rate is in one class, by the class of their wait."""

    best: float  # the upper end of the class, tokens a second
    waits: dict[int, int]  # class of wait -> nodes
    classes: int = 0  # which of them have nodes, as bits


class Fleet:
    """The nodes that hold one model, kept sorted."""

    def __init__(self, index: PrefixIndex, here: int = -1) -> None:
        self._index = index
        self._here = here  # this node's number
        self._loads: dict[int, Load] = {}
        self._waits: dict[int, float] = {}  # of the loads, at hand
        self._prefill: dict[int, float] = {}
        self._place: dict[int, tuple[int, int]] = {}  # class of rate and of wait
        self._rates: dict[int, _Rate] = {}
        self._willing = 0
        self._turn = -1  # whose it was, for round-robin
        # Of those that are able to serve, together:
        self.room = 0  # requests that may be sent to them
        self.slots = 0
        self._service_s = 0.0  # weighted by slots

    @property
    def loads(self) -> dict[int, Load]:
        """By number; for reading only."""
        return self._loads

    @property
    def service_s(self) -> float:
        """Seconds that a request holds a slot, on average."""
        return self._service_s / self.slots if self.slots else SERVICE_S

    def put(self, number: int, load: Load) -> None:
        """What is known of a node now."""
        before = self._loads.get(number)
        if before == load:
            return
        self._count(before, -1)
        self._count(load, 1)
        self._loads[number] = load
        self._waits[number] = wait_s = load.wait_s
        self._prefill[number] = load.prefill
        bit = 1 << number
        place = (_class_of(load.prefill), _class_of(wait_s / SHORTEST_WAIT_S))
        old = self._place.get(number)
        if old != place or not load.willing:
            self._take_out(number)
        if not load.willing:
            return
        self._willing |= bit
        if old != place or number not in self._place:
            rate = self._rates.get(place[0])
            if rate is None:
                rate = self._rates[place[0]] = _Rate(CLASS_WIDTH ** place[0], {})
            rate.waits[place[1]] = rate.waits.get(place[1], 0) | bit
            rate.classes |= 1 << place[1]
            self._place[number] = place

    def remove(self, number: int) -> None:
        """The node does not hold the model any more."""
        self._take_out(number)
        self._count(self._loads.pop(number, None), -1)
        self._waits.pop(number, None)
        self._prefill.pop(number, None)

    def choose(
        self,
        prompt: Prompt,
        tokens: float,
        policy: Policy,
        pick: Pick,
        *,
        bound_s: float = STICKY_BOUND_S,
        without: int = 0,
        looks: bool = False,
    ) -> Choice | None:
        """The node for a request whose prompt has about so many tokens; None if there is none.

        `without` are nodes that are out of the question, as bits. Who only `looks` sends nothing
        there, and takes nobody's turn.
        """
        willing = self._willing & ~without
        if not willing:
            return None
        match policy:
            case "prefix":
                return self._by_prefix(prompt, tokens, willing, bound_s, pick)
            case "least-loaded":
                best = self._best([(willing, 0)], Prompt(prompt.size), tokens, pick)
                assert best is not None
                return Choice(best, "the least predicted time, caches left aside")
            case "round-robin":
                later = willing >> (self._turn + 1) << (self._turn + 1)
                number = next(bits(later or willing))
                if not looks:
                    self._turn = number
                return Choice(self._score(number, prompt, tokens, 0), "its turn")
            case "random":
                number = _rotated(willing, pick)[0]
                return Choice(self._score(number, prompt, tokens, 0), "by chance")

    def table(self, prompt: Prompt, tokens: float, *, best: int | None = None) -> list[Score]:
        """Every node's score, best first and the unwilling last; `best` shows the first few."""
        everyone = 0
        for number in self._loads:
            everyone |= 1 << number
        scores = []
        for nodes, blocks in self._index.levels(prompt, everyone):
            scores += [self._score(number, prompt, tokens, blocks) for number in bits(nodes)]
        scores.sort(key=lambda score: (not score.load.willing, score.ttft_s, score.number))
        return scores[:best]

    def _by_prefix(
        self, prompt: Prompt, tokens: float, willing: int, bound_s: float, pick: Pick
    ) -> Choice:
        levels = self._index.levels(prompt, willing)
        if len(levels) > MAX_LEVELS:
            rest = 0
            for nodes, _ in levels[MAX_LEVELS - 1 :]:
                rest |= nodes
            levels[MAX_LEVELS - 1 :] = [(rest, levels[-1][1])]
        warm = [level for level in levels if prompt.covered(level[1]) >= WARM]
        cold = levels[len(warm) :]
        best_warm = self._best(warm, prompt, tokens, pick)
        best_cold = self._best(cold, prompt, tokens, pick)
        if best_warm is None:
            assert best_cold is not None
            chosen = Choice(best_cold, "no cache has most of the prompt: the least predicted time")
        elif best_cold is not None and best_warm.ttft_s > best_cold.ttft_s + bound_s:
            chosen = Choice(best_cold, "the nodes with the prompt in their cache are too busy")
        else:
            chosen = Choice(best_warm, "its cache has most of the prompt")
        if chosen.score.load.queue_s > OVERLOAD_S:
            shortest = self._best([(willing, 0)], Prompt(0), 0.0, pick)
            assert shortest is not None
            if shortest.number != chosen.number:
                blocks = next(b for nodes, b in levels if nodes >> shortest.number & 1)
                score = self._score(shortest.number, prompt, tokens, blocks)
                return Choice(score, "all are overloaded: the shortest queue")
        return chosen

    def _best(
        self, levels: Sequence[tuple[int, int]], prompt: Prompt, tokens: float, pick: Pick
    ) -> Score | None:
        """The node of these sets that would begin first, as far as the classes tell."""
        found, with_blocks, least = -1, 0, math.inf
        waits, rates, here = self._waits, self._prefill, self._here
        for nodes, blocks in levels:
            uncached = tokens * (1 - prompt.covered(blocks))
            if here >= 0 and nodes >> here & 1:
                cost = waits[here] + uncached / rates[here] - HOP_S
                if self._loads[here].loaded:  # else a second load would seem cheap
                    cost *= HERE_FACTOR
                if cost < least:
                    found, with_blocks, least = here, blocks, cost
            if nodes.bit_count() <= FEW:
                for number in _rotated(nodes, pick, FEW):
                    cost = waits[number] + uncached / rates[number]
                    if cost < least:
                        found, with_blocks, least = number, blocks, cost
                continue
            for rate in self._rates.values():
                bound_s = least - uncached / rate.best
                classes = rate.classes
                while classes:
                    lowest = classes & -classes
                    place = lowest.bit_length() - 1
                    if _STARTS[place] >= bound_s:
                        break  # neither this class nor a later one has a better one
                    there = rate.waits[place] & nodes
                    if there:
                        for number in _rotated(there, pick, COMPARED):
                            cost = waits[number] + uncached / rates[number]
                            if cost < least:
                                found, with_blocks, least = number, blocks, cost
                        break
                    classes ^= lowest
        return None if found < 0 else self._score(found, prompt, tokens, with_blocks)

    def _score(self, number: int, prompt: Prompt, tokens: float, blocks: int) -> Score:
        load = self._loads[number]
        covered = prompt.covered(blocks)
        uncached = tokens * (1 - covered)
        return Score(number, load, covered, uncached, load.wait_s + uncached / load.prefill)

    def _count(self, load: Load | None, sign: int) -> None:
        if load is not None and load.is_able:
            self.room += sign * load.room
            self.slots += sign * load.slots
            self._service_s += sign * load.slots * load.service_s

    def _take_out(self, number: int) -> None:
        bit = 1 << number
        self._willing &= ~bit
        place = self._place.pop(number, None)
        if place is None:
            return
        rate = self._rates[place[0]]
        left = rate.waits[place[1]] & ~bit
        if left:
            rate.waits[place[1]] = left
            return
        del rate.waits[place[1]]
        rate.classes ^= 1 << place[1]
        if not rate.classes:
            del self._rates[place[0]]


def _class_of(value: float) -> int:
    """0 below 1, then one more for each factor of CLASS_WIDTH; a rate of class n is below
    CLASS_WIDTH**n."""
    return 0 if value < 1 else min(MAX_CLASS, int(math.log(value) / _LOG_WIDTH) + 1)


_LOG_WIDTH = math.log(CLASS_WIDTH)
# The least wait of each class.
_STARTS = [0.0] + [SHORTEST_WAIT_S * CLASS_WIDTH**place for place in range(MAX_CLASS)]


def _rotated(nodes: int, pick: Pick, count: int = 1) -> list[int]:
    """Some of a set of nodes, from a random place on."""
    shift = pick(nodes.bit_length())
    found: list[int] = []
    later, earlier = nodes >> shift << shift, nodes & ((1 << shift) - 1)
    for part in (later, earlier):
        while part and len(found) < count:
            lowest = part & -part
            found.append(lowest.bit_length() - 1)
            part ^= lowest
    return found
