"""Serves the pieces of blobs to other nodes, also of blobs that are still arriving here.

Each exchange has a task that listens and one that sends. Nothing is shared between exchanges
but a bounded number of them, so that a peer that stops reading costs its own stream and the
one piece that waits for it, and is dropped after a while.
"""

import logging
from collections import Counter
from collections.abc import Callable

import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.pieces import MIB
from ollamad.transfer.ports import PieceSource, Shelf, Stream, bits_of
from ollamad.wire.pieces import (
    BLOCK_SIZE,
    HolderSide,
    ProtocolViolation,
    encode_bye,
)

log = logging.getLogger(__name__)

MAX_EXCHANGES = 64  # at once in all; beyond that the others are quicker
MAX_EXCHANGES_PER_PEER = 8  # blobs that one peer fetches at once
MAX_HELD_BYTES = 512 * MIB  # pieces in memory on their way out, one for each exchange
NEWS_INTERVAL_S = 0.2  # how late a peer learns of pieces that have just arrived here
SEND_TIMEOUT_S = 60.0  # for a peer to take one block; a live link does in milliseconds
BUSY_RETRY_S = 2.0
UNKNOWN_RETRY_S = 5.0  # the blob may be about to come
MISSING_RETRY_S = 1.0
UNREADABLE_RETRY_S = 60.0  # a broken disk does not heal at once


class PieceServer:
    """Answers exchanges of the method `wire.pieces.METHOD` with `handle`.

    `missing` is the error with which the shelf says that it does not have a blob.
    """

    def __init__(self, shelf: Shelf, *, missing: type[Exception]) -> None:
        self._shelf = shelf
        self._missing = missing
        self._exchanges: Counter[NodeId] = Counter()
        self._held_bytes = 0
        self.bytes_sent = 0  # of pieces, since the start

    async def handle(self, peer: NodeId, request: bytes, stream: Stream) -> None:
        """Serve one exchange until the peer ends it, breaks the protocol, or stops reading."""
        try:
            await self._handle(peer, request, stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError) as group:
            log.debug("pieces for %s: %s", short(peer), group.exceptions[0])  # nobody to tell

    async def _handle(self, peer: NodeId, request: bytes, stream: Stream) -> None:
        try:
            want = HolderSide.open(request)
        except ProtocolViolation as error:
            await stream.send(encode_bye("protocol", str(error)))
            return
        if (
            self._exchanges.total() >= MAX_EXCHANGES
            or self._exchanges[peer] >= MAX_EXCHANGES_PER_PEER
        ):
            await stream.send(encode_bye("busy", "it serves many others", BUSY_RETRY_S))
            return
        self._exchanges[peer] += 1
        try:
            try:
                source = await self._shelf.open_piece_source(want.digest)
            except self._missing:
                bye = encode_bye("unknown_blob", "it does not have the blob", UNKNOWN_RETRY_S)
                await stream.send(bye)
                return
            try:
                await self._serve_source(peer, source, stream)
            finally:
                source.close()
        finally:
            self._exchanges[peer] -= 1
            self._exchanges += Counter()  # forget peers with none

    async def _serve_source(self, peer: NodeId, source: PieceSource, stream: Stream) -> None:
        held = min(source.map.piece_size, source.map.size)
        if self._held_bytes and self._held_bytes + held > MAX_HELD_BYTES:
            await stream.send(encode_bye("busy", "its memory is in use", BUSY_RETRY_S))
            return
        self._held_bytes += held
        try:
            await _Exchange(peer, source, stream, self._count).run()
        finally:
            self._held_bytes -= held

    def _count(self, size: int) -> None:
        self.bytes_sent += size


class _Exchange:
    """One fetcher and one blob."""

    def __init__(
        self, peer: NodeId, source: PieceSource, stream: Stream, count: Callable[[int], None]
    ) -> None:
        self._peer = peer
        self._source = source
        self._stream = stream
        self._count = count
        self._side = HolderSide(source.map)
        self._changed = trio.Event()  # replaced when the sender looks at everything
        self._violation: ProtocolViolation | None = None

    async def run(self) -> None:
        await self._send(self._side.bitfield(bits_of(self._source.have)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, nursery.cancel_scope)
            await self._answer()
            nursery.cancel_scope.cancel()

    async def _listen(self, scope: trio.CancelScope) -> None:
        """Take what the fetcher says; a violation is left to `_answer`, which may still send."""
        while (message := await self._stream.receive()) is not None:
            try:
                self._side.receive(message)
            except ProtocolViolation as violation:
                self._violation = violation
                self._changed.set()
                return
            self._changed.set()
        scope.cancel()

    async def _answer(self) -> None:
        """Send until there is a violation; `_listen` cancels when the fetcher leaves."""
        while True:
            self._changed = trio.Event()
            await self._send_news()
            if self._violation is not None:
                log.warning("%s asks wrongly for pieces: %s", short(self._peer), self._violation)
                await self._send(encode_bye("protocol", str(self._violation)))
                return
            index = self._side.next_piece()
            if index is not None:
                await self._send_piece(index)
            elif self._side.knows_all:
                await self._changed.wait()
            else:
                with trio.move_on_after(NEWS_INTERVAL_S):
                    await self._changed.wait()

    async def _send_news(self) -> None:
        """Send answers that are due, and which pieces arrived here."""
        while message := self._side.next_answer():
            await self._send(message)
        if not self._side.knows_all and (message := self._side.have(bits_of(self._source.have))):
            await self._send(message)

    async def _send_piece(self, index: int) -> None:
        try:
            data = await self._source.read_piece(index)
        except Exception as error:  # whatever the store says, the fetcher asks somebody else
            if not self._source.have[index]:
                await self._send(self._side.reject("missing", MISSING_RETRY_S))
                return
            log.error("piece %d of a blob cannot be read: %s", index, error)
            await self._send(self._side.reject("unreadable", UNREADABLE_RETRY_S))
            return
        view = memoryview(data)
        for offset in range(0, len(view), BLOCK_SIZE):
            if offset and offset % MIB == 0:
                await self._send_news()
            if not self._side.sending:
                await self._send(self._side.reject("cancelled"))
                return
            block = view[offset : offset + BLOCK_SIZE]
            await self._send(self._side.block(offset, block))
            self._count(len(block))

    async def _send(self, message: bytes) -> None:
        with trio.move_on_after(SEND_TIMEOUT_S) as scope:
            await self._stream.send(message)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError(f"the peer took nothing for {SEND_TIMEOUT_S:g} s")
