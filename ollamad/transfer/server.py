"""Serves the pieces of blobs to other nodes, also of blobs that are still arriving here.

Each exchange has tasks of its own: one listens, one tells what is new, one sends pieces over the
exchange's lane. What exchanges share is the link: they take turns (`turns.py`). The nodes that
fetch a blob of which this node is the origin share a `Spread`, which shows each of them other
pieces, so that they have something to give to each other.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.piece_picker import Randrange
from ollamad.core.spread import Spread
from ollamad.transfer.ports import (
    Lanes,
    LaneTicket,
    PieceSource,
    ServeLane,
    Shelf,
    Stream,
    bits_of,
)
from ollamad.transfer.turns import Turns
from ollamad.wire import pieces
from ollamad.wire.lane import EndCode, ProtocolViolation, RequestEnded
from ollamad.wire.pieces import HolderSide, encode_bye

log = logging.getLogger(__name__)

MAX_EXCHANGES = 64  # at once in all; beyond that the others are quicker
MAX_EXCHANGES_PER_PEER = 8  # blobs that one peer fetches at once
NEWS_INTERVAL_S = 0.2  # how late a peer learns of pieces that have just arrived here
TELL_TIMEOUT_S = 60.0  # for a peer to take a message; a live link does in milliseconds
BUSY_RETRY_S = 2.0
MAPPING_RETRY_S = 5.0  # a large blob takes minutes
# What could not be read, or has rotten, is as it was if it is read again at once.
UNMAPPABLE_RETRY_S = 3600.0
MISSING_RETRY_S = 1.0
UNREADABLE_RETRY_S = 60.0  # a broken disk does not heal at once


class PieceServer:
    """Answers exchanges of the method `wire.pieces.METHOD` with `handle`.

    Args:
      missing: the error with which the shelf says that it does not have a blob.
      unmapped: with which it says that the blob is to be read for its map first, which `run` does.
      plain: lanes are without encryption, to fetchers that want that, too.
    """

    def __init__(
        self,
        shelf: Shelf,
        lanes: Lanes,
        *,
        missing: type[Exception],
        unmapped: type[Exception],
        plain: bool = False,
        randrange: Randrange = random.randrange,
    ) -> None:
        self._shelf = shelf
        self._lanes = lanes
        self._missing = missing
        self._unmapped = unmapped
        self._plain = plain
        self._randrange = randrange
        self._exchanges: Counter[NodeId] = Counter()
        self._spreads: dict[str, _Spreading] = {}
        self._mapping: set[str] = set()  # digests of blobs that are read for their maps
        self._nursery: trio.Nursery | None = None
        self.turns = Turns()
        self.bytes_sent = 0  # of pieces, since the start

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make piece maps that are missing; until cancelled. All else is done without it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # an exchange that is ending must not begin anything more

    async def handle(self, peer: NodeId, request: bytes, stream: Stream) -> None:
        """Serve one exchange until the peer ends it, breaks the protocol, or stops reading."""
        try:
            await self._handle(peer, request, stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError, EOFError) as group:
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
                find = self._shelf.open_growing_source if want.growing else None
                source = await (find or self._shelf.open_piece_source)(want.digest)
            except self._missing:
                # It may be about to come, where several nodes begin to fetch at the same time; the
                # fetcher asks again after longer and longer pauses.
                await stream.send(encode_bye("unknown_blob", "it does not have the blob"))
                return
            except self._unmapped:
                self._begin_mapping(want.digest)
                await stream.send(
                    encode_bye("busy", "it reads the blob for its piece map", MAPPING_RETRY_S)
                )
                return
            try:
                await self._serve(peer, want, source, stream)
            finally:
                source.close()
        finally:
            self._exchanges[peer] -= 1
            self._exchanges += Counter()  # forget peers with none

    def _begin_mapping(self, digest: str) -> None:
        """Make a map once, whoever asks meanwhile: none of them waits for as long as it takes."""
        if self._nursery is not None and digest not in self._mapping:
            self._mapping.add(digest)
            self._nursery.start_soon(self._map, digest)

    async def _map(self, digest: str) -> None:
        try:
            await self._shelf.piece_map(digest)
        except Exception as error:  # whatever it is, it ends this and not the daemon
            log.error("%s cannot be served: %s", digest, error)
            await trio.sleep(UNMAPPABLE_RETRY_S)
        finally:
            self._mapping.discard(digest)

    async def _serve(
        self, peer: NodeId, want: pieces.Want, source: PieceSource, stream: Stream
    ) -> None:
        plain = self._plain and want.plain
        with self._spreading(want.digest, source) as spreading:
            exchange = _Exchange(self, peer, source, stream, spreading)
            with self._lanes.expect(peer, plain=plain) as ticket:
                await exchange.run(ticket, plain=plain)

    @contextmanager
    def _spreading(self, digest: str, source: PieceSource) -> Iterator["_Spreading | None"]:
        if not source.is_origin:
            yield None
            return
        spreading = self._spreads.get(digest)
        if spreading is None:
            start = self._randrange(max(1, len(source.have)))
            spreading = self._spreads[digest] = _Spreading(Spread(source.map.piece_size, start))
        try:
            yield spreading
        finally:
            if not len(spreading.spread):
                self._spreads.pop(digest, None)


class _Spreading:
    """The spread of one blob, and the exchanges that are to look at it again."""

    def __init__(self, spread: Spread) -> None:
        self.spread = spread
        self.exchanges: set[_Exchange] = set()

    def changed(self) -> None:
        for exchange in self.exchanges:
            exchange.notify()


class _Exchange:
    """One fetcher and one blob."""

    def __init__(
        self,
        server: PieceServer,
        peer: NodeId,
        source: PieceSource,
        stream: Stream,
        spreading: _Spreading | None,
    ) -> None:
        self._server = server
        self._peer = peer
        self._source = source
        self._stream = stream
        self._spreading = spreading
        self._side = HolderSide(len(source.have))
        self._news = trio.Event()  # replaced when set: there may be something to tell
        self._asked = trio.Event()  # replaced when set: there may be something to send
        self._sent = 0  # bytes of pieces
        self._seen = 0  # of these, when that was last looked at

    def notify(self) -> None:
        self._news.set()

    async def run(self, ticket: LaneTicket, *, plain: bool) -> None:
        if self._spreading is not None:
            self._spreading.spread.joined(self)
            self._spreading.exchanges.add(self)
        try:
            spreads = self._spreading is not None
            shown = self._shown()
            await self._tell(self._side.bitfield(shown, ticket.token, plain=plain, spreads=spreads))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_news)
                nursery.start_soon(self._send_pieces, ticket)
                try:
                    await self._listen()
                except ProtocolViolation as violation:
                    log.warning("%s asks wrongly for pieces: %s", short(self._peer), violation)
                    await self._tell(encode_bye("protocol", str(violation)))
                nursery.cancel_scope.cancel()
        finally:
            if self._spreading is not None:
                self._spreading.exchanges.discard(self)
                self._spreading.spread.left(self)
                self._spreading.changed()

    def _shown(self) -> int:
        """What the fetcher may know of now."""
        have = bits_of(self._source.have)
        if self._spreading is None:
            return have
        now, spreading = trio.current_time(), self._spreading
        if self._sent != self._seen:
            self._seen = self._sent
            spreading.spread.moved(now)
        return spreading.spread.show(self, have, now)

    async def _listen(self) -> None:
        """Take what the fetcher says, until it leaves.

        Raises:
          ProtocolViolation: it broke the protocol.
        """
        spread = None if self._spreading is None else self._spreading.spread
        while (message := await self._stream.receive()) is not None:
            match self._side.receive(message):
                case pieces.PieceRequested(index):
                    if spread is not None:
                        spread.asked(self, index, trio.current_time())
                    self._asked.set()
                case pieces.FetcherGot(bits):
                    if spread is not None:
                        spread.got(self, bits)
                        self._news.set()
                case pieces.MapWanted():
                    self._news.set()
                case pieces.PieceCancelled():
                    pass

    async def _tell_news(self) -> None:
        """Tell the map, and which pieces arrived here or may be known now."""
        side = self._side
        while True:
            self._news = trio.Event()
            piece_map = self._source.map
            for message in (side.map(piece_map), side.hashes(piece_map), side.have(self._shown())):
                if message:
                    await self._tell(message)
            if side.knows_all:
                await self._news.wait()
            else:
                with trio.move_on_after(NEWS_INTERVAL_S):
                    await self._news.wait()

    async def _send_pieces(self, ticket: LaneTicket) -> None:
        lane = await ticket.arrived()
        try:
            while True:
                self._asked = trio.Event()
                while (index := self._side.next_request()) is not None:
                    was_sent = await self._answer(lane, index)
                    self._side.ended()
                    if self._spreading is not None:
                        if was_sent:
                            self._spreading.spread.sent(self, index, trio.current_time())
                        else:
                            self._spreading.spread.ended(self, index)
                        self._spreading.changed()
                await self._asked.wait()
        finally:
            with trio.CancelScope(shield=True):
                await lane.aclose()

    async def _answer(self, lane: ServeLane, index: int) -> bool:
        """Answer one request; whether by its piece."""
        if not self._source.have[index]:
            await lane.end(RequestEnded(index, EndCode.MISSING, MISSING_RETRY_S))
            return False
        turns = self._server.turns
        async with turns.turn(self._peer):
            before = self._sent
            with self._source.open_piece(index) as region:
                code = await lane.send_piece(index, region, self._is_wanted, self._count)
            turns.sent(self._sent - before)
        if code is EndCode.UNREADABLE:
            log.error("piece %d of a blob cannot be read; the disk may be failing", index)
            retry = RequestEnded(index, EndCode.UNREADABLE, UNREADABLE_RETRY_S)
            await lane.end(retry)
        return code is None

    def _is_wanted(self) -> bool:
        return self._side.is_wanted

    def _count(self, size: int) -> None:
        self._sent += size
        self._server.bytes_sent += size

    async def _tell(self, message: bytes) -> None:
        with trio.move_on_after(TELL_TIMEOUT_S) as scope:
            await self._stream.send(message)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError(f"the peer took nothing for {TELL_TIMEOUT_S:g} s")
