"""Lanes in memory and in the event loop, so that tests of transfers may run on virtual time.

The frames are the real ones. `hooks` see, change or hold up what a node sends; each block with
its head is one message.
"""

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import trio

from ollamad.core.ids import NodeId
from ollamad.peers.bulk import ARRIVAL_TIMEOUT_S, SEND_TIMEOUT_S
from ollamad.transfer.ports import Region, Sink
from ollamad.wire.lane import (
    BLOCK_SIZE,
    FRAME,
    EndCode,
    LaneReader,
    RequestEnded,
    encode_block_head,
    encode_ended,
)
from tests.fakes.memory_streams import Hook, MemoryStream, NodeLost, NodeUnreachable, stream_pair


class LaneNet:
    """All lanes between the nodes of a test."""

    def __init__(self) -> None:
        self.hooks: dict[NodeId, Hook] = {}  # on what that node sends
        self.down: set[NodeId] = set()
        # What holds up what comes to a node: its link.
        self.downlinks: dict[NodeId, Callable[[int], Awaitable[None]]] = {}
        self.plain = 0  # lanes that were opened without encryption
        self._tickets: dict[bytes, MemoryTicket] = {}
        self._open: dict[NodeId, list[MemoryStream]] = {}

    def lanes_of(self, node: NodeId) -> "MemoryLanes":
        return MemoryLanes(self, node)

    def kill(self, node: NodeId) -> None:
        for stream in self._open.pop(node, []):
            stream.close()

    def connect(self, caller: NodeId, node: NodeId, token: bytes, *, plain: bool) -> MemoryStream:
        ticket = self._tickets.pop(token, None)
        if node in self.down or ticket is None or (ticket.peer, ticket.plain) != (caller, plain):
            raise NodeUnreachable(f"{node} takes no such lane")
        self.plain += plain
        ours, theirs = stream_pair()
        theirs.hook = self.hooks.get(node)
        for name in (caller, node):
            self._open.setdefault(name, []).append(ours)
        ticket.arrive(theirs)
        return ours

    @contextmanager
    def expect(self, peer: NodeId, *, plain: bool) -> Iterator["MemoryTicket"]:
        ticket = MemoryTicket(peer, plain=plain)
        self._tickets[ticket.token] = ticket
        try:
            yield ticket
        finally:
            self._tickets.pop(ticket.token, None)


class MemoryTicket:
    """A lane that a fetcher may open."""

    def __init__(self, peer: NodeId, *, plain: bool) -> None:
        self.token = os.urandom(32)
        self.peer = peer
        self.plain = plain
        self._arrived = trio.Event()
        self._stream: MemoryStream | None = None

    def arrive(self, stream: MemoryStream) -> None:
        self._stream = stream
        self._arrived.set()

    async def arrived(self) -> "MemorySendingLane":
        with trio.move_on_after(ARRIVAL_TIMEOUT_S):
            await self._arrived.wait()
        if self._stream is None:
            raise NodeUnreachable("it did not open its lane")
        return MemorySendingLane(self._stream)


class MemoryLanes:
    """One node's lanes."""

    def __init__(self, net: LaneNet, node: NodeId) -> None:
        self._net = net
        self._node = node

    async def dial(
        self, node_id: NodeId, token: bytes, sinks: Mapping[int, Sink], *, plain: bool
    ) -> "MemoryReceivingLane":
        await trio.lowlevel.checkpoint()
        return MemoryReceivingLane(
            self._net.connect(self._node, node_id, token, plain=plain), sinks
        )

    @contextmanager
    def expect(self, peer: NodeId, *, plain: bool) -> Iterator[MemoryTicket]:
        with self._net.expect(peer, plain=plain) as ticket:
            yield ticket


class MemorySendingLane:
    """The holder's end."""

    def __init__(self, stream: MemoryStream) -> None:
        self._stream = stream

    async def send_piece(
        self, index: int, region: Region, wanted: Callable[[], bool], sent: Callable[[int], None]
    ) -> EndCode | None:
        for offset in range(0, region.length, BLOCK_SIZE):
            if not wanted():
                await self._send(encode_ended(index, EndCode.CANCELLED))
                return EndCode.CANCELLED
            size = min(BLOCK_SIZE, region.length - offset)
            try:
                data = os.pread(region.descriptor, size, region.offset + offset)
            except OSError:
                return EndCode.UNREADABLE
            await self._send(encode_block_head(index, offset, size) + data)
            sent(size)
        return None

    async def end(self, ended: RequestEnded) -> None:
        await self._send(encode_ended(ended.index, ended.code, ended.retry_after_s))

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def _send(self, message: bytes) -> None:
        try:
            with trio.fail_after(SEND_TIMEOUT_S):
                await self._stream.send(message)
        except trio.TooSlowError:
            raise TimeoutError("the peer took nothing") from None
        except NodeLost as error:
            raise EOFError(str(error)) from None


class MemoryReceivingLane:
    """The fetcher's end. A sink with a `gate` waits for it, as for a slow disk."""

    def __init__(
        self,
        stream: MemoryStream,
        sinks: Mapping[int, Sink],
        downlink: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        self._stream = stream
        self._downlink = downlink
        self._sinks = sinks
        self._reader = LaneReader(sinks)
        self.received = 0
        self.heard = 1  # as after a handshake
        self.is_waiting = False

    async def receive(self) -> int | RequestEnded:
        while True:
            try:
                message = await self._stream.receive()
            except NodeLost as error:
                raise EOFError(str(error)) from None
            if message is None:
                raise EOFError("the other side closed the connection")
            self.heard += len(message)
            frame = self._reader.read(message[: FRAME.size])
            if isinstance(frame, RequestEnded):
                return frame
            if self._downlink is not None:
                await self._downlink(len(message))
            self.received += frame.size
            sink = self._sinks[frame.index]
            gate = getattr(sink, "gate", None)
            if gate is not None:
                self.is_waiting = True
                await gate.wait()
                self.is_waiting = False
            sink.write(memoryview(message)[FRAME.size :])
            if frame.is_last:
                sink.settle()
                return frame.index

    async def aclose(self) -> None:
        await self._stream.aclose()
