"""Lanes over bulk connections: the bytes of pieces from disk to disk, in threads.

A thread works on one piece at a time and then reports to the event loop; in between it holds a
block (256 KiB), whatever the size of the piece.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ollamad.core.ids import NodeId
from ollamad.transfer.limits import Limit
from ollamad.transfer.ports import BulkPeers, Connection, Region, Sink, Ticket
from ollamad.wire.lane import (
    BLOCK_SIZE,
    FRAME,
    EndCode,
    LaneReader,
    RequestEnded,
    encode_block_head,
    encode_ended,
)


class BulkLanes:
    """Lanes to and from other nodes, within limits that all of them share."""

    def __init__(
        self, peers: BulkPeers, *, upload: Limit | None = None, download: Limit | None = None
    ) -> None:
        self._peers = peers
        self._upload = upload or Limit()
        self._download = download or Limit()

    async def dial(
        self, node_id: NodeId, token: bytes, sinks: Mapping[int, Sink], *, plain: bool
    ) -> "ReceivingLane":
        connection = await self._peers.dial(node_id, token, plain=plain)
        return ReceivingLane(connection, sinks, self._download)

    @contextmanager
    def expect(self, peer: NodeId, *, plain: bool) -> Iterator["ExpectedLane"]:
        with self._peers.expect(peer, plain=plain) as ticket:
            yield ExpectedLane(ticket, self._upload)


class ExpectedLane:
    """A lane that a fetcher may open."""

    def __init__(self, ticket: Ticket, limit: Limit) -> None:
        self.token = ticket.token
        self._ticket = ticket
        self._limit = limit

    async def arrived(self) -> "SendingLane":
        return SendingLane(await self._ticket.arrived(), self._limit)


class _Lane:
    def __init__(self, connection: Connection, limit: Limit) -> None:
        self._connection = connection
        self._limit = limit

    async def aclose(self) -> None:
        """End it at once; nothing may be under way on it."""
        self._connection.shut()
        self._connection.close()

    def _pace(self, size: int) -> None:
        if pause := self._limit.take(size):
            self._connection.pause(pause)


class SendingLane(_Lane):
    """The holder's end."""

    async def send_piece(
        self, index: int, region: Region, wanted: Callable[[], bool], sent: Callable[[int], None]
    ) -> EndCode | None:
        connection, descriptor = self._connection, region.descriptor

        def work() -> EndCode | None:
            if not _is_readable(region):
                return EndCode.UNREADABLE
            offset = 0
            while offset < region.length:
                if not wanted():
                    connection.send(encode_ended(index, EndCode.CANCELLED))
                    return EndCode.CANCELLED
                size = self._limit.portion(min(BLOCK_SIZE, region.length - offset))
                self._pace(size)
                head = encode_block_head(index, offset, size)
                connection.send_file(head, descriptor, region.offset + offset, size)
                sent(size)
                offset += size
            return None

        return await connection.run(work)

    async def end(self, ended: RequestEnded) -> None:
        frame = encode_ended(ended.index, ended.code, ended.retry_after_s)
        await self._connection.run(lambda: self._connection.send(frame))


class ReceivingLane(_Lane):
    """The fetcher's end. `sinks` has the sink of each open request; cancelled ones, too."""

    def __init__(self, connection: Connection, sinks: Mapping[int, Sink], limit: Limit) -> None:
        super().__init__(connection, limit)
        self._sinks = sinks
        self._reader = LaneReader(sinks)
        self._head = bytearray(FRAME.size)
        self._block = memoryview(bytearray(BLOCK_SIZE))
        self.received = 0
        self.is_waiting = False

    @property
    def heard(self) -> int:
        return self._connection.received

    async def receive(self) -> int | RequestEnded:
        return await self._connection.run(self._receive)

    def _receive(self) -> int | RequestEnded:
        while True:
            self._connection.receive_into(memoryview(self._head))
            frame = self._reader.read(self._head)
            if isinstance(frame, RequestEnded):
                return frame
            data = self._block[: frame.size]
            self._connection.receive_into(data)
            self.received += frame.size
            sink = self._sinks[frame.index]
            self.is_waiting = True
            sink.write(data)
            if frame.is_last:
                sink.settle()
            self._pace(frame.size)
            self.is_waiting = False
            if frame.is_last:
                return frame.index


def _is_readable(region: Region) -> bool:
    """Whether its beginning and its end can be read: what is promised must then be sent."""
    try:
        last = region.offset + region.length - 1
        return all(os.pread(region.descriptor, 1, at) for at in (region.offset, last))
    except OSError:
        return False
