"""Who is served next when there is not room for all: a bounded queue with fair shares. Pure.

Fairness is that of the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024): each identity has a counter of what it got, in weighted tokens; the next
request is of the identity with the least. Who comes back after a pause is lifted to the others,
so that idling saves nothing up. A request is charged when it starts with what it will probably
cost, and the difference when it ends, so that many long answers at once are no way around it.

Priorities are strict, but who waits long is lifted by one class, so that nobody starves. Within
an identity and a class the earliest deadline is first, then who came first.
"""

import heapq
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import msgspec

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
HIGHEST = max(PRIORITIES.values())
LIFTED_AFTER_S = 30.0  # a class, for each such time of waiting
OUTPUT_WEIGHT = 2.0  # a token of an answer costs about twice one of a prompt (as in the paper)
MAX_IDLE_COUNTERS = 1024  # identities that are remembered though nothing of theirs waits
USUAL_OUTPUT = 256  # tokens, until an identity's answers have told


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the queue. `position` 1 is the next one for its model."""

    position: int
    waiting: int  # for any model, at this node
    estimate_s: float


class QueuedRequest(msgspec.Struct, frozen=True):
    """A request that waits, as everybody may see it."""

    request_id: str  # the client's own name for it; empty if it gave none
    model: str
    position: int  # 1: the next one for its model
    estimate_seconds: float
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and on what terms."""

    identity: str = ""
    priority: int = 0  # one of PRIORITIES
    deadline_s: float | None = None  # within which the answer must begin; None: whenever
    wants_scores: bool = False  # the table of routing, with the answer
    # Told when it has to wait, and then every second.
    on_wait: Callable[[Place], Awaitable[None]] | None = None


ANYBODY = Asker()


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits. Times are on the caller's monotonic clock."""

    identity: str
    model: str  # what it needs room for
    cost: float  # weighted tokens that it will probably take
    priority: int = 0
    deadline: float = math.inf  # when it must have begun
    entered_at: float = 0.0
    name: str = ""  # the client's own
    number: int = 0  # in the order of arrival
    counted: float = 0.0  # charged, and not settled yet

    def class_at(self, now: float) -> int:
        """Its priority, with what waiting has added."""
        return min(HIGHEST, self.priority + int((now - self.entered_at) / LIFTED_AFTER_S))


@dataclass(slots=True)
class _Account:
    counter: float = 0.0  # with what its running requests will probably take
    running: float = 0.0  # that
    got: float = 0.0  # of the counter, through this node and since it is known
    waiting: list[Ticket] = field(default_factory=list)
    usual_output: float = USUAL_OUTPUT

    @property
    def settled(self) -> float:
        """What it got for sure."""
        return self.counter - self.running


class FairQueue:
    """Requests that wait, and what each identity has got."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._numbers = 0
        self._level = 0.0  # whoever comes when nobody waits begins here

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def expected_cost(self, identity: str, prompt_tokens: float, limit: int | None) -> float:
        """What a request will probably take; `limit` is its own bound on the answer's tokens."""
        account = self._accounts.get(identity)
        output = account.usual_output if account is not None else float(USUAL_OUTPUT)
        if limit is not None and limit >= 0:
            output = min(output, limit)
        return prompt_tokens + OUTPUT_WEIGHT * output

    def enter(self, ticket: Ticket, now: float) -> None:
        """Begin to wait."""
        account = self._account(ticket.identity)
        if not account.waiting:
            active = [other.settled for other in self._accounts.values() if other.waiting]
            lift = min(active, default=self._level) - account.settled
            account.counter += max(0.0, lift)
        ticket.entered_at = now
        ticket.number = self._numbers
        self._numbers += 1
        account.waiting.append(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Wait no longer: the client went away, or the deadline passed."""
        account = self._accounts.get(ticket.identity)
        if account is not None and ticket in account.waiting:
            account.waiting.remove(ticket)

    def next(self, now: float, has_room: Callable[[Ticket], bool]) -> Ticket | None:
        """Whose turn it is, among those that there is room for; it waits no longer."""
        for ticket in self._in_turn(now, lambda ticket: not has_room(ticket)):
            self.leave(ticket)
            self.start(ticket)
            return ticket
        return None

    def start(self, ticket: Ticket) -> None:
        """Charge a request that begins."""
        account = self._account(ticket.identity)
        account.counter += ticket.cost
        account.running += ticket.cost
        ticket.counted = ticket.cost
        if len(self._accounts) > MAX_IDLE_COUNTERS:
            self._forget_idle()

    def settle(self, ticket: Ticket, cost: float, output_tokens: int) -> None:
        """A request has ended, and this is what it took."""
        self.refund(ticket)
        account = self._account(ticket.identity)
        account.counter += cost
        account.got += cost
        self._level = max(self._level, account.settled)
        account.usual_output += 0.1 * (output_tokens - account.usual_output)

    def charge(self, identity: str, cost: float) -> None:
        """That identity got as much elsewhere, of what all share."""
        account = self._account(identity)
        account.counter += cost
        self._level = max(self._level, account.settled)

    def refund(self, ticket: Ticket) -> None:
        """A request came to nothing, or what it was charged is replaced by what it took."""
        account = self._account(ticket.identity)
        account.counter -= ticket.counted
        account.running -= ticket.counted
        ticket.counted = 0.0

    def order(self, now: float) -> list[Ticket]:
        """All that wait, in the order in which they would be served if nobody else came."""
        return list(self._in_turn(now, lambda ticket: False))

    def counter(self, identity: str) -> float:
        """What that identity got, in weighted tokens."""
        account = self._accounts.get(identity)
        return account.counter if account is not None else self._level

    def got(self, identity: str) -> float:
        """What it got through this queue alone, since it is known here."""
        account = self._accounts.get(identity)
        return account.got if account is not None else 0.0

    def _in_turn(self, now: float, passes: Callable[[Ticket], bool]) -> Iterator[Ticket]:
        """The waiting in turn, but for those of which `passes` is true; they cost nothing."""
        heap: list[tuple[int, float, int, str, int]] = []
        queues: dict[str, list[Ticket]] = {}
        for identity, account in self._accounts.items():
            if account.waiting:
                queues[identity] = queue = sorted(
                    account.waiting, key=lambda t: (-t.class_at(now), t.deadline, t.number)
                )
                head = queue[0]
                heap.append((-head.class_at(now), account.counter, head.number, identity, 0))
        heapq.heapify(heap)
        while heap:
            _, counter, _, identity, place = heapq.heappop(heap)
            queue = queues[identity]
            ticket = queue[place]
            if not passes(ticket):
                yield ticket
                counter += ticket.cost
            if place + 1 < len(queue):
                head = queue[place + 1]
                heapq.heappush(
                    heap, (-head.class_at(now), counter, head.number, identity, place + 1)
                )

    def _account(self, identity: str) -> _Account:
        account = self._accounts.get(identity)
        if account is None:
            account = self._accounts[identity] = _Account(self._level)
        return account

    def _forget_idle(self) -> None:
        """Drop identities that would be lifted anyway when they come back."""
        for identity in [
            identity
            for identity, account in self._accounts.items()
            if not account.waiting and not account.running and account.counter <= self._level
        ]:
            del self._accounts[identity]


LEAST_PART = 0.01  # of a slot: a longer estimate would say nothing


def estimate_s(position: int, slots: float, service_s: float) -> float:
    """How long the request at that place (1 is the next) waits for one of so many slots.

    Less than one slot is a part of one that others have the rest of.
    """
    return position * service_s / max(LEAST_PART, slots)


def retry_after_s(waiting: int, slots: int, service_s: float) -> int:
    """When somebody who is refused now may find room: when half of the queue has gone."""
    return max(1, min(600, math.ceil(estimate_s(waiting // 2 + 1, slots, service_s))))
