"""Lets requests in as there is room for them, in a fair order; the others wait here.

Every node is an entry and has a queue of its own. Together they hold `max_waiting`: each knows
from the beats how many wait at the others, and refuses when all are as many. Beats are a second
old, so a burst at several nodes at once may exceed the bound by what came within that second; each
queue by itself never does. The slots are shared by who asks, not by who is the quickest to send
(`core.shares`).
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from ollamad.core.admission import (
    OUTPUT_WEIGHT,
    Asker,
    FairQueue,
    Place,
    QueuedRequest,
    Ticket,
    estimate_s,
    retry_after_s,
)
from ollamad.core.ids import NodeId
from ollamad.core.inference import Failed, InferenceError
from ollamad.core.presence import Beat
from ollamad.core.shares import Ledger, may_begin
from ollamad.core.state import Model

NOTICE_INTERVAL_S = 1.0  # how often who waits is told its place
POLL_S = 0.25  # room that other entry nodes gave back shows in beats only

# Of requests for a model that its nodes have room for, their slots, seconds that one takes.
Room = Callable[[Model], tuple[int, int, float]]


@dataclass(eq=False, slots=True)
class _Waiter:
    ticket: Ticket
    model: Model
    asker: Asker
    place: Place
    woken: trio.Event
    admitted: bool = False
    told: bool = False


class Admitted:
    """A request that was let in. `first_place` is where it stood, None if it did not wait."""

    def __init__(self, control: "AdmissionControl", ticket: Ticket, model: Model) -> None:
        self.first_place: Place | None = None
        self.waited_s = 0.0
        self._control = control
        self._ticket = ticket
        self._model = model
        self._is_placed = False

    def close(self) -> None:
        """It is over, however it ended; what it was charged for and did not get is given back."""
        self.placed()
        self._control.queue.refund(self._ticket)

    def placed(self) -> None:
        """It was sent to a node, and counts there from now on."""
        if not self._is_placed:
            self._is_placed = True
            self._control.give_back(self._model)

    def spent(self, prompt_tokens: float, output_tokens: int) -> None:
        """What it took in the end."""
        cost = prompt_tokens + OUTPUT_WEIGHT * output_tokens
        self._control.queue.settle(self._ticket, cost, output_tokens)


class AdmissionControl:
    """The queue of this entry node."""

    def __init__(
        self,
        *,
        room: Room,
        max_waiting: int,
        waiting_elsewhere: Callable[[], int] = lambda: 0,
        others: Callable[[], Iterable[NodeId]] = lambda: (),
    ) -> None:
        self.queue = FairQueue()
        self.ledger = Ledger(self.queue)
        self._others = others
        self._room = room
        self._max_waiting = max_waiting
        self._waiting_elsewhere = waiting_elsewhere
        self._waiters: dict[Ticket, _Waiter] = {}
        self._waiting_for: Counter[str] = Counter()  # by digest
        self._running: Counter[str] = Counter()  # let in, and not over
        self._reserved: Counter[str] = Counter()  # of them, those that are not sent anywhere yet

    @property
    def waiting(self) -> int:
        """Requests that wait at this node."""
        return len(self._waiters)

    def queued(self) -> tuple[QueuedRequest, ...]:
        """Everybody who waits at this node, first to last."""
        if not self._waiters:
            return ()
        self._update_places()
        now = trio.current_time()
        waiters = [self._waiters[ticket] for ticket in self.queue.order(now)]
        return tuple(
            QueuedRequest(
                waiter.ticket.name,
                waiter.model.name,
                waiter.place.position,
                waiter.place.estimate_s,
                round(now - waiter.ticket.entered_at, 1),
            )
            for waiter in waiters
        )

    @asynccontextmanager
    async def admitted(
        self,
        model: Model,
        asker: Asker,
        prompt_tokens: float,
        limit: int | None,
        *,
        has_waited: bool = False,
        name: str = "",
    ) -> AsyncIterator[Admitted]:
        """Wait for room; leaving the context gives it back. Cancelled, it leaves the queue.

        With `has_waited` it does not wait: it was let in before, by an entry node that died.

        Raises:
          InferenceError: QUEUE_FULL (503), or the deadline passed before there was room (408).
        """
        now = trio.current_time()
        ticket = Ticket(
            identity=asker.identity,
            model=model.digest,
            cost=self.queue.expected_cost(asker.identity, prompt_tokens, limit),
            priority=asker.priority,
            deadline=math.inf if asker.deadline_s is None else now + asker.deadline_s,
            entered_at=now,
            name=name,
        )
        admitted = Admitted(self, ticket, model)
        self.ledger.begin(ticket.identity, ticket.model)
        try:
            if has_waited or (not self._waiting_for[model.digest] and self._has_room(model)):
                self._let_in(ticket)
                self.queue.start(ticket)
            else:
                admitted.first_place = await self._wait(ticket, model, asker)
                admitted.waited_s = trio.current_time() - now
            try:
                yield admitted
            finally:
                admitted.close()
                _take(self._running, ticket.model)
        finally:
            self.ledger.end(ticket.identity, ticket.model)
            self.poke()

    def hear(self, node_id: NodeId, beat: Beat) -> None:
        """What another entry node tells of who asks there."""
        self.ledger.hear(node_id, beat.shares)
        self.poke()

    def give_back(self, model: Model) -> None:
        """A request that was let in counts elsewhere now, or is over."""
        _take(self._reserved, model.digest)

    def poke(self, *, takes_rest: bool = False) -> None:
        """There may be room: let in whoever's turn it is."""
        # Of each model once: with a full queue this is asked after every request and every beat.
        # By name as well, since copies of one model may be on different nodes.
        models = {waiter.model.name: waiter.model for waiter in self._waiters.values()}
        open_to = {
            name for name, model in models.items() if self._has_room(model, takes_rest=takes_rest)
        }
        now = trio.current_time()
        while open_to:
            ticket = self.queue.next(now, lambda one: self._waiters[one].model.name in open_to)
            if ticket is None:
                return
            waiter = self._waiters[ticket]
            self._forget(waiter)
            self._let_in(ticket)
            waiter.admitted = True
            waiter.woken.set()
            open_to.difference_update(
                [
                    name
                    for name in open_to
                    if models[name].digest == ticket.model
                    and not self._has_room(models[name], takes_rest=takes_rest)
                ]
            )

    async def run(self) -> None:
        """Look for room that others gave back, and tell who waits its place. Until cancelled."""
        told_at = -math.inf
        while True:
            await trio.sleep(POLL_S)
            self.ledger.keep_only(self._others)
            if not self._waiters:
                continue
            self.poke(takes_rest=True)
            if trio.current_time() - told_at >= NOTICE_INTERVAL_S:
                told_at = trio.current_time()
                self._update_places()
                for waiter in self._waiters.values():
                    waiter.told = False
                    waiter.woken.set()

    async def _wait(self, ticket: Ticket, model: Model, asker: Asker) -> Place:
        _, slots, service_s = self._room(model)
        elsewhere = self._waiting_elsewhere()
        if self.waiting + elsewhere >= self._max_waiting:
            raise InferenceError(
                _queue_full(retry_after_s(self.waiting + elsewhere, slots, service_s))
            )
        now = trio.current_time()
        self.queue.enter(ticket, now)
        waiter = _Waiter(ticket, model, asker, Place(0, 0, 0.0), trio.Event())
        self._waiters[ticket] = waiter
        self._waiting_for[model.digest] += 1
        self._update_places()
        first = waiter.place
        try:
            with trio.move_on_at(ticket.deadline):
                while not waiter.admitted:
                    if asker.on_wait is not None and not waiter.told:
                        waiter.told = True
                        await asker.on_wait(waiter.place)
                        continue  # it took a while
                    await waiter.woken.wait()
                    waiter.woken = trio.Event()
        except BaseException:
            if waiter.admitted:  # in the same moment
                self.give_back(model)
                _take(self._running, model.digest)
                self.queue.refund(ticket)
            raise
        finally:
            self._forget(waiter)
            if not waiter.admitted:
                self.queue.leave(ticket)
        if not waiter.admitted:
            raise InferenceError(deadline_passed(asker, "there was no room for the request"))
        return first

    def _has_room(self, model: Model, *, takes_rest: bool = False) -> bool:
        room, slots, _ = self._room(model)
        room -= self._reserved[model.digest]
        part = self.ledger.part(model.digest)
        return may_begin(room, slots, self._running[model.digest], part, takes_rest=takes_rest)

    def _let_in(self, ticket: Ticket) -> None:
        self._running[ticket.model] += 1
        self._reserved[ticket.model] += 1

    def _forget(self, waiter: _Waiter) -> None:
        if self._waiters.pop(waiter.ticket, None) is not None:
            _take(self._waiting_for, waiter.model.digest)

    def _update_places(self) -> None:
        position: Counter[str] = Counter()
        terms: dict[str, tuple[float, float]] = {}
        for ticket in self.queue.order(trio.current_time()):
            waiter = self._waiters[ticket]
            if ticket.model not in terms:
                _, slots, service_s = self._room(waiter.model)
                part = self.ledger.part(ticket.model)
                terms[ticket.model] = slots if part is None else slots * part, service_s
            position[ticket.model] += 1
            place = position[ticket.model]
            waiter.place = Place(
                place, len(self._waiters), round(estimate_s(place, *terms[ticket.model]), 1)
            )


def _take(counter: Counter[str], digest: str) -> None:
    counter[digest] -= 1
    if not counter[digest]:
        del counter[digest]


def deadline_passed(asker: Asker, what: str) -> Failed:
    """The failure of a request whose time to begin is over."""
    return Failed(
        "DEADLINE_PASSED",
        f"{what} within {asker.deadline_s:g} s; give it more time, or try again later",
        408,
    )


def _queue_full(retry_s: int) -> Failed:
    """In Ollama's words."""
    return Failed(
        "QUEUE_FULL",
        "server busy, please try again.  maximum pending requests exceeded",
        503,
        {"retry_after": retry_s},
    )
