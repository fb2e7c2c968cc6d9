"""Streams between fake nodes: whole messages both ways, with flow control and hooks."""

from collections import deque
from collections.abc import Awaitable, Callable

import trio

WINDOW = 1 << 20  # bytes under way in one direction, as on a real link

Hook = Callable[[bytes], Awaitable[bytes]]


class NodeLost(trio.BrokenResourceError):
    """The other node is gone."""


class NodeUnreachable(OSError):
    """There is no way to that node."""


class MemoryStream:
    """One side of an exchange."""

    def __init__(self) -> None:
        self._inbox: deque[bytes] = deque()
        self._waiting = 0  # bytes in the inbox
        self._ended = False
        self._broken = False
        self._changed = trio.Event()
        self._other = self
        self.hook: Hook | None = None  # sees, changes or holds up what this side sends
        self.sent: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.hook is not None:
            data = await self.hook(data)
        other = self._other
        while not self._broken and other._waiting >= WINDOW:
            await self._changed.wait()
        if self._broken:
            raise NodeLost("the exchange is over")
        other._inbox.append(data)
        other._waiting += len(data)
        other._notify()

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._ended:
                return None
            if self._broken:
                raise NodeLost("the exchange is over")
            await self._changed.wait()
        data = self._inbox.popleft()
        self._waiting -= len(data)
        self._other._notify()
        return data

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._other._ended = True
        self._other._notify()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        for side in (self, self._other):
            side._broken = True
            side._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def stream_pair() -> tuple[MemoryStream, MemoryStream]:
    left, right = MemoryStream(), MemoryStream()
    left._other, right._other = right, left
    return left, right
