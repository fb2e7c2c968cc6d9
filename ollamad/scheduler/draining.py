"""Answers that this node gives while it drains: they may end here for a while, then they move.

What is moved ends here with DRAINING, and the node that the client talks to goes on with it at
another holder (`relay.py`). An answer that nobody else could go on with stays.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from ollamad.core.ids import NodeId
from ollamad.core.inference import Event, Failed, GenerateRequest, InferenceError
from ollamad.core.presence import Presence
from ollamad.core.state import ClusterState, Model
from ollamad.scheduler.exchange import EventSource

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
DRAINING = Failed("DRAINING", "this node is draining", 503)


class Movable:
    """The events of this node's engine, until they are to go on elsewhere."""

    def __init__(self, model: Model, events: EventSource, *, may_move: bool) -> None:
        self.model = model
        self.may_move = may_move
        self._events = events
        self._moved = False
        self._scope = trio.CancelScope()

    async def receive(self) -> Event:
        if not self._moved:
            self._scope = trio.CancelScope()
            with self._scope:
                return await self._events.receive()
        raise InferenceError(DRAINING)

    def receive_nowait(self) -> Event:
        if self._moved:
            raise InferenceError(DRAINING)
        return self._events.receive_nowait()

    def move(self) -> None:
        """Have it end here."""
        self._moved = True
        self._scope.cancel()


class Draining:
    """This node's running answers, and what becomes of them when it drains for long."""

    def __init__(
        self,
        node_id: NodeId,
        *,
        state: Callable[[], ClusterState],
        presence: Callable[[NodeId], Presence],
        timeout_s: float,
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._presence = presence
        self._timeout_s = timeout_s
        self._running: set[Movable] = set()

    @contextmanager
    def running(
        self, model: Model, request: GenerateRequest, events: EventSource
    ) -> Iterator[Movable]:
        """An answer, while its context is open. Those that must not go on elsewhere stay."""
        movable = Movable(model, events, may_move=request.failover != "off")
        self._running.add(movable)
        try:
            yield movable
        finally:
            self._running.discard(movable)

    async def run(self) -> None:
        """Move answers away once this node has drained for the timeout; until cancelled."""
        since: float | None = None
        while True:
            member = self._state().members.get(self._node_id)
            if member is None or not member.draining:
                since = None
            elif since is None:
                since = trio.current_time()
            if since is not None and trio.current_time() - since >= self._timeout_s:
                self._move_all()
            await trio.sleep(CHECK_INTERVAL_S)

    def _move_all(self) -> None:
        for movable in [each for each in self._running if each.may_move]:
            if self._has_other_holder(movable.model.name):
                log.info("an answer of %s moves away: this node drains", movable.model.name)
                self._running.discard(movable)
                movable.move()

    def _has_other_holder(self, name: str) -> bool:
        state = self._state()
        model = state.find_model(name)
        return model is not None and any(
            node_id != self._node_id
            and node_id in state.members
            and not state.members[node_id].draining
            and self._presence(node_id).online
            for node_id in model.confirmed
        )
