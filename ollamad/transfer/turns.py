"""Who sends a piece next: as few at once as fill the link, and one peer after the other.

A peer that asks for much, over many exchanges, so gets no more of the link than one that asks
for little.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ollamad.core.ids import NodeId
from ollamad.core.pacing import SlotTuner

# A piece that takes longer (a slow peer, or a large piece) leaves its slot to others and goes on.
SLOT_S = 1.0


class Turns:
    """Slots for sending. `tuner` says how many there are."""

    def __init__(self) -> None:
        self.tuner = SlotTuner()
        self._held: dict[Turn, float] = {}  # since when; oldest first
        self._waiting: dict[NodeId, deque[Turn]] = {}  # by peer, whose turn is next first

    @asynccontextmanager
    async def turn(self, peer: NodeId) -> AsyncIterator[None]:
        """Wait for a slot, and hold it in the block, but for no longer than SLOT_S."""
        turn = Turn()
        if self._waiting or not self._has_room():
            self.tuner.waited()
            await self._wait(peer, turn)
        else:
            self._held[turn] = trio.current_time()
        try:
            yield
        finally:
            self._release(turn)

    def sent(self, size: int) -> None:
        """A piece, or what was wanted of it, was sent."""
        self.tuner.sent(size, trio.current_time())

    async def _wait(self, peer: NodeId, turn: "Turn") -> None:
        self._waiting.setdefault(peer, deque()).append(turn)
        try:
            while not turn.begun.is_set():
                self._wake()  # there may be more slots than before
                with trio.move_on_after(SLOT_S / 4):
                    await turn.begun.wait()
        except trio.Cancelled:
            if turn.begun.is_set():
                self._release(turn)
            else:
                self._forget(peer, turn)
            raise

    def _release(self, turn: "Turn") -> None:
        self._held.pop(turn, None)
        self._wake()

    def _forget(self, peer: NodeId, turn: "Turn") -> None:
        self._waiting[peer].remove(turn)
        if not self._waiting[peer]:
            del self._waiting[peer]

    def _has_room(self) -> bool:
        late = trio.current_time() - SLOT_S
        for turn in [turn for turn, since in self._held.items() if since <= late]:
            del self._held[turn]
        return len(self._held) < self.tuner.slots

    def _wake(self) -> None:
        while self._waiting and self._has_room():
            peer = next(iter(self._waiting))
            turns = self._waiting.pop(peer)
            turn = turns.popleft()
            if turns:
                self._waiting[peer] = turns  # behind the others
            self._held[turn] = trio.current_time()
            turn.begun.set()


class Turn:
    """One piece's turn."""

    def __init__(self) -> None:
        self.begun = trio.Event()
