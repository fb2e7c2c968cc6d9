"""Fetches blobs from the nodes that hold them, piece by piece, from several at once.

One task manages a fetch and starts a session for each holder that may be used; the sessions
pull from one picker, so that a slow or lost holder only slows its own pieces. Pieces that were
verified are on the disk, and are never asked for again, not even after a kill -9.
"""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.piece_picker import STALL_S, HolderBook, PiecePicker, Randrange
from ollamad.core.pieces import PieceMap
from ollamad.core.state import Layer
from ollamad.transfer.ports import (
    FetchLane,
    Lanes,
    PartialBlob,
    Peers,
    Sink,
    Store,
    Stream,
    bits_of,
)
from ollamad.wire import pieces
from ollamad.wire.lane import EndCode, ProtocolViolation, RequestEnded
from ollamad.wire.pieces import FetcherSide

log = logging.getLogger(__name__)

MAX_SOURCES = 16  # holders used at once; more hardly add speed, and cost messages
RECHECK_S = 1.0  # how often new holders and stalls are looked at
KEEP_UP_S = 0.25  # how often what came is hashed and perhaps synced
GOT_INTERVAL_S = 0.1  # how late a holder that spreads learns what came
# Without a byte of a piece from anybody: long enough for a host to reboot.
GIVE_UP_AFTER_S = 120.0
# What may come without a piece being whole, in pieces, and still be progress: twice what is on its
# way if each holder is amid one. More, and pieces break off again and again.
MAX_BROKEN_OFF = 2 * MAX_SOURCES
MIN_RETRY_S = 1.0  # before a holder is asked again for a piece that it refused
SLOW_RETRY_S = 60.0  # before a holder is used again that was far slower than others
MAX_ROTTEN = 3  # times that a disk may lose pieces before a fetch fails


class FetchFailed(Exception):
    """The blob could not be fetched; the message says why, holder by holder."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is. All are bytes, but `holder`: who sent something last."""

    verified: int  # on the disk and right, those of earlier runs included
    received: int  # came in this run, wasted ones included
    total: int
    holder: NodeId | None


class _HolderGone(Exception):
    """The holder cannot be used now, which is no crime."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class _HolderLied(Exception):
    """The holder sent something wrong."""


class Fetcher:
    """Brings blobs into this node's store. One for the daemon: it remembers who lied.

    Args:
      corrupt: the error with which the store refuses a wrong piece.
      rotten: with which it says that its disk lost pieces, so that it is to be opened again.
      plain: lanes may be without encryption.
    """

    def __init__(
        self,
        peers: Peers,
        lanes: Lanes,
        store: Store,
        *,
        corrupt: type[Exception],
        rotten: type[Exception],
        plain: bool = False,
        randrange: Randrange = random.randrange,
    ) -> None:
        self.peers = peers
        self.lanes = lanes
        self.store = store
        self.corrupt = corrupt
        self.plain = plain
        self.randrange = randrange
        self.bans = HolderBook()
        self._rotten = rotten
        self._locks: dict[str, trio.Lock] = {}

    async def fetch_blob(
        self,
        layer: Layer,
        holders: Callable[[], Sequence[NodeId]],
        progress: Callable[[FetchProgress], None],
        *,
        authority: NodeId | None = None,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        """Have that blob in the store, whole and verified; returns at once if it is there.

        Args:
          layer: the blob as the replicated state knows it; a map that differs is a lie.
          holders: the nodes that may have (parts of) it, called again and again, so that nodes
            that come and go are seen. This node must not be among them.
          progress: called in the event loop after each piece, and every second.
          authority: the node that gets the blob from its origin now, when the state does not know
            it yet (`layer.pieces_root` is empty): its word counts for the hashes of pieces, and
            the blob's digest for the whole.
          give_up_after_s: seconds without a byte of a piece from anybody until it fails.

        A second fetch of the same blob waits for the first. If cancelled, the verified pieces
        stay for the next time.

        Raises:
          FetchFailed: no holder sent anything for so long.
          whatever the store raises (no room, disk failed, the whole blob's hash is wrong).
        """
        lock = self._locks.setdefault(layer.digest, trio.Lock())
        try:
            async with lock:
                for attempt in range(MAX_ROTTEN):
                    if await self.store.has_blob(layer.digest):
                        return
                    fetch = _Fetch(self, layer, holders, progress, authority)
                    try:
                        await fetch.run(give_up_after_s)
                    except self._rotten as error:
                        if attempt + 1 == MAX_ROTTEN:
                            raise
                        log.error("%s; they are fetched again", error)
                    else:
                        return
        finally:
            if not lock.locked():
                self._locks.pop(layer.digest, None)


@dataclass(slots=True, eq=False)
class _Session:
    """One exchange with one holder."""

    holder: NodeId
    side: FetcherSide
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    sinks: dict[int, Sink] = field(default_factory=dict)  # of open requests
    asked: trio.Event = field(default_factory=trio.Event)  # replaced when set: there are some
    woken: trio.Event = field(default_factory=trio.Event)  # replaced when set: perhaps more to ask
    unwanted: list[int] = field(default_factory=list)  # pieces to cancel
    spreads: bool = False  # it wants to hear what came
    told: int = 0  # pieces that it was told of
    told_at: float = 0.0
    counted: int = 0  # bytes of pieces that its lane received
    heard: int = 0  # see `FetchLane`


class _Fetch:
    """One run of a fetch."""

    def __init__(
        self,
        fetcher: Fetcher,
        layer: Layer,
        holders: Callable[[], Sequence[NodeId]],
        progress: Callable[[FetchProgress], None],
        authority: NodeId | None,
    ) -> None:
        self._fetcher = fetcher
        self._store = fetcher.store
        self._randrange = fetcher.randrange
        self._bans = fetcher.bans
        self._layer = layer
        self._candidates = holders
        self._progress = progress
        self._authority = authority
        self._book = HolderBook()
        self._sessions: dict[NodeId, _Session] = {}
        self._changed = trio.Event()  # replaced when set: see `_notify`
        self._adopting = trio.Lock()
        self._adopted = trio.Event()
        self._map: PieceMap | None = None
        self._blob: PartialBlob | None = None
        self._picker: PiecePicker | None = None
        self._failure: Exception | None = None
        self._verified = 0
        self._received = 0
        self._alive = trio.current_time()  # when bytes of pieces last came
        self._since_whole = 0  # bytes that came since a piece was whole

    async def run(self, give_up_after_s: float) -> None:
        try:
            if self._layer.size == 0:  # nobody has to be asked for nothing
                await self._adopt(PieceMap(0, self._layer.piece_size, b""))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_up)
                await self._manage(nursery, give_up_after_s)
                nursery.cancel_scope.cancel()
            if self._failure is not None:
                raise self._failure
            assert self._blob is not None
            await self._blob.finish()
        finally:
            if self._blob is not None:
                self._blob.close()

    async def _manage(self, nursery: trio.Nursery, give_up_after_s: float) -> None:
        while self._failure is None and not (self._picker is not None and self._picker.is_done):
            changed = self._changed
            now = trio.current_time()
            if now - self._alive >= give_up_after_s:
                self._failure = FetchFailed(self._explain(give_up_after_s))
                return
            self._start_sessions(nursery, now)
            with trio.move_on_after(min(self._next_look_s(now), give_up_after_s)):
                await changed.wait()

    def _start_sessions(self, nursery: trio.Nursery, now: float) -> None:
        usable = [
            holder
            for holder in self._candidates()
            if holder not in self._sessions
            and self._book.is_usable(holder, now)
            and self._bans.is_usable(holder, now)
        ]
        while usable and len(self._sessions) < MAX_SOURCES:
            if self._authority in usable:
                usable.remove(self._authority)
                holder = self._authority
            else:
                holder = usable.pop(self._randrange(len(usable)))
            growing = self._authority is not None
            plain = self._fetcher.plain
            side = FetcherSide(self._layer.digest, plain=plain, growing=growing)
            session = self._sessions[holder] = _Session(holder, side)
            nursery.start_soon(self._run_session, session)

    def _next_look_s(self, now: float) -> float:
        """Until a back-off ends. Those who begin together have nothing for each other at first."""
        ends = [self._book.usable_at(holder) - now for holder in self._candidates()]
        return min([RECHECK_S, *(end for end in ends if end > 0)])

    async def _keep_up(self) -> None:
        """Hash and sync what came, beside the fetching."""
        await self._adopted.wait()
        assert self._blob is not None
        while True:
            try:
                await self._blob.keep_up()
            except Exception as error:
                self._fail(error)
                return
            await trio.sleep(KEEP_UP_S)

    def _explain(self, waited_s: float) -> str:
        missing = self._layer.size - self._verified
        candidates, now = set(self._candidates()), trio.current_time()
        who = self._book.reasons()
        for holder, why in self._bans.reasons().items():
            if holder in candidates and self._bans.is_banned(holder, now):
                who[holder] = why
        reasons = "; ".join(f"{short(holder)}: {why}" for holder, why in sorted(who.items()))
        return (
            f"no node sent anything of {self._layer.digest} for {waited_s:g} s, {missing:,} of "
            f"{self._layer.size:,} bytes are missing ({reasons or 'no node is known to have it'}); "
            "what arrived is kept for the next attempt"
        )

    # One holder.

    async def _run_session(self, session: _Session) -> None:
        holder = session.holder
        reason, retry_after_s, lied = "it closed the exchange", 0.0, False
        try:
            with session.scope:
                await self._exchange(session)
        except* (ProtocolViolation, _HolderLied) as group:
            reason, lied = str(_first(group)), True
        except* _HolderGone as group:
            error = _first(group)
            reason = reason if lied else str(error)
            retry_after_s = error.retry_after_s if isinstance(error, _HolderGone) else 0.0
        except* (
            OSError,
            EOFError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
        ) as group:
            reason = reason if lied else str(_first(group)) or "the connection was lost"
        finally:
            # In here, since a cancelled fetch comes by as well.
            del self._sessions[holder]
            for index, sink in session.sinks.items():
                sink.close()
                if sink.is_new:  # it had settled, and nobody came to hear of it
                    self._settled(session, index, sink.length)
            if self._picker is not None:
                self._picker.left(holder)
            self._wake_all()  # what it owed is missing again
            self._notify()
        if lied:
            self._ban(holder, reason)
        else:
            self._book.failed(holder, reason, trio.current_time(), retry_after_s)

    async def _exchange(self, session: _Session) -> None:
        holder, side = session.holder, session.side
        peers, lanes = self._fetcher.peers, self._fetcher.lanes
        async with peers.open(holder, pieces.METHOD, side.opening(), bulk=True) as stream:
            with trio.move_on_after(STALL_S) as opening:
                known = await self._begin(session, stream)
            if opening.cancelled_caught:
                raise _HolderGone(f"it did not answer for {STALL_S:g} s")
            lane = await lanes.dial(holder, known.ticket, session.sinks, plain=known.plain)
            try:
                assert self._picker is not None
                session.spreads = known.spreads
                self._picker.joined(holder, known.bits, trio.current_time())
                async with trio.open_nursery() as inner:
                    inner.start_soon(self._ask, session, stream, lane)
                    inner.start_soon(self._collect, session, lane)
                    while (message := await stream.receive()) is not None:
                        self._hear(session, side.receive(message))
                    raise _HolderGone("it closed the exchange")
            finally:
                with trio.CancelScope(shield=True):
                    await lane.aclose()

    async def _begin(self, session: _Session, stream: Stream) -> pieces.PiecesKnown:
        """Learn what the holder has, and the piece map if nobody gave it so far."""
        side = session.side
        known: pieces.PiecesKnown | None = None
        bits = 0
        while known is None or self._picker is None:
            message = await stream.receive()
            if message is None:
                raise _HolderGone("it closed the exchange")
            match side.receive(message):
                case pieces.PiecesKnown() as known:
                    bits = known.bits
                    if self._picker is None:
                        if self._authority not in (None, session.holder):
                            await self._adopted.wait()
                        else:
                            await stream.send(side.request_map())
                case pieces.PiecesGained(more):
                    bits |= more
                case pieces.MapReceived(piece_map):
                    await self._adopt(piece_map)
                case pieces.HashesReceived(hashes):
                    self._learn(session, hashes)
                case pieces.Dismissed(code, reason, retry_after_s):
                    raise _HolderGone(reason or code, retry_after_s)
        assert self._map is not None
        if known.count != len(self._map):
            raise _HolderLied(f"it speaks of {known.count} pieces instead of {len(self._map)}")
        if session.holder == self._authority and not side.knows_map:
            await stream.send(side.request_map())  # for the hashes that are to come
        return pieces.PiecesKnown(
            known.count, bits, known.ticket, plain=known.plain, spreads=known.spreads
        )

    async def _adopt(self, piece_map: PieceMap) -> None:
        """Check a piece map and begin with it.

        Raises:
          _HolderLied: it is not the one that the cluster agreed on.
        """
        layer = self._layer
        problem = piece_map.problem()
        if problem is not None:
            raise _HolderLied(f"it sent a bad piece map: {problem}")
        root = piece_map.root() if layer.pieces_root else ""
        if (piece_map.size, piece_map.piece_size, root) != (
            layer.size,
            layer.piece_size,
            layer.pieces_root,
        ):
            raise _HolderLied("it sent the piece map of something else")
        async with self._adopting:
            if self._failure is not None:
                return
            if self._picker is not None:
                if self._authority is not None:
                    self._learn_map(piece_map)
                return
            try:
                self._blob = blob = await self._store.open_partial(layer.digest, piece_map)
            except Exception as error:
                self._fail(error)
                raise _HolderGone("the store failed") from None
            self._map = piece_map
            have = bits_of(blob.have)
            self._count_verified(have)
            known = None if self._authority is None else _bits(piece_map.known())
            self._picker = PiecePicker(
                len(piece_map), piece_map.piece_size, have, self._randrange, known=known
            )
            self._adopted.set()
            self._report(None)
            self._notify()

    def _learn_map(self, piece_map: PieceMap) -> None:
        self._learn_hashes({index: piece_map.hash_of(index) for index in piece_map.known()})

    def _learn(self, session: _Session, hashes: dict[int, bytes]) -> None:
        if session.holder == self._authority:
            self._learn_hashes(hashes)

    def _learn_hashes(self, hashes: dict[int, bytes]) -> None:
        if self._blob is None or self._picker is None:  # the fetch failed, and is about to end
            return
        try:
            self._blob.learn(hashes)
        except self._fetcher.corrupt as error:
            raise _HolderLied(str(error)) from None
        have = bits_of(self._blob.have)
        self._count_verified(have & ~self._picker.have)
        self._picker.learned(_bits(hashes), have)
        self._wake_all()
        self._notify()

    async def _ask(self, session: _Session, stream: Stream, lane: FetchLane) -> None:
        """Keep the holder's window full, and tell it what others have brought."""
        assert self._picker is not None
        picker, side, holder = self._picker, session.side, session.holder
        while True:
            session.woken = trio.Event()
            while session.unwanted:
                if message := side.cancel(session.unwanted.pop()):
                    await stream.send(message)
            news = await self._tell_what_came(session, stream)
            while (index := picker.pick(holder, trio.current_time())) is not None:
                session.sinks[index] = self._begin_piece(index)
                await stream.send(side.request(index))
                session.asked.set()
            with trio.move_on_after(GOT_INTERVAL_S if news else RECHECK_S):
                await session.woken.wait()
            now = trio.current_time()
            self._count(session, lane)
            if not lane.is_waiting and picker.is_stalled(holder, now):
                raise _HolderGone(f"it sent nothing for {STALL_S:g} s")
            if not lane.is_waiting and picker.is_slow(holder, now):
                raise _HolderGone("it is far slower than others", SLOW_RETRY_S)
            # An origin may have nothing for this node for a while, and then much.
            if picker.is_idle(holder, now) and (self._is_full() or not session.spreads):
                raise _HolderGone("it has nothing that is missing here")

    async def _tell_what_came(self, session: _Session, stream: Stream) -> bool:
        """Tell a holder that spreads; whether there is more to tell soon."""
        assert self._picker is not None
        new = self._picker.have & ~session.told if session.spreads else 0
        if not new:
            return False
        if trio.current_time() - session.told_at < GOT_INTERVAL_S:
            return True
        session.told |= new
        session.told_at = trio.current_time()
        await stream.send(session.side.got(new))
        return False

    def _begin_piece(self, index: int) -> Sink:
        assert self._blob is not None
        try:
            return self._blob.begin_piece(index)
        except Exception as error:
            self._fail(error)
            raise _HolderGone("the store failed") from None

    def _hear(self, session: _Session, event: pieces.FetcherEvent) -> None:
        """Act on what the holder said."""
        assert self._picker is not None
        match event:
            case pieces.PiecesGained(bits):
                self._picker.gained(session.holder, bits, trio.current_time())
                session.woken.set()
            case pieces.HashesReceived(hashes):
                self._learn(session, hashes)
            case pieces.MapReceived(piece_map):
                # Another holder's came first; of the authority it has what is new.
                if session.holder == self._authority and piece_map.problem() is None:
                    self._learn_map(piece_map)
            case pieces.Dismissed(code, reason, retry_after_s):
                raise _HolderGone(reason or code, retry_after_s)
            case pieces.PiecesKnown():  # pragma: no cover
                raise AssertionError("the protocol allows one bitmap")

    async def _collect(self, session: _Session, lane: FetchLane) -> None:
        """Take what comes over the lane."""
        assert self._picker is not None
        while True:
            session.asked = trio.Event()
            if not session.sinks:
                await session.asked.wait()
            try:
                ended = await lane.receive()
            except self._fetcher.corrupt as error:
                raise _HolderLied(str(error)) from None
            except (OSError, EOFError, ProtocolViolation, trio.BrokenResourceError):
                raise
            except Exception as error:
                self._fail(error)
                raise _HolderGone("the store failed") from None
            index = ended.index if isinstance(ended, RequestEnded) else ended
            self._count(session, lane)
            sink = session.sinks.pop(index)
            sink.close()
            session.side.ended(index)
            if isinstance(ended, RequestEnded):
                pause = max(MIN_RETRY_S, ended.retry_after_s)
                again_at = 0.0 if ended.code is EndCode.CANCELLED else trio.current_time() + pause
                self._picker.ended(session.holder, index, again_at)
                self._wake_all()  # the piece is missing again
            elif sink.is_new:
                self._settled(session, index, sink.length)
            else:
                self._picker.arrived(session.holder, index, sink.length, trio.current_time())
            session.woken.set()

    def _settled(self, session: _Session, index: int, size: int) -> None:
        """A piece is here, and right."""
        assert self._picker is not None
        self._verified += size
        self._since_whole = 0
        self._picker.arrived(session.holder, index, size, trio.current_time())
        self._book.succeeded(session.holder)
        for other in self._picker.asked_of(index):
            if other in self._sessions:
                self._sessions[other].unwanted.append(index)
                self._sessions[other].woken.set()
        if self._picker.is_done:
            self._notify()
        self._report(session.holder)

    # Bookkeeping.

    def _is_full(self) -> bool:
        """Whether no other holder can be used beside those that are."""
        return len(self._sessions) >= MAX_SOURCES

    def _count(self, session: _Session, lane: FetchLane) -> None:
        size, heard = lane.received - session.counted, lane.heard
        if heard != session.heard:
            session.heard = heard
            session.counted += size
            self._received += size
            now = trio.current_time()
            assert self._picker is not None
            self._picker.heard_of(session.holder, size, now)
            # A handshake or a refusal says that somebody is there, and is no progress.
            self._since_whole += size
            if size and self._since_whole <= MAX_BROKEN_OFF * self._layer.piece_size:
                self._alive = now
            self._report(session.holder)

    def _count_verified(self, bits: int) -> None:
        assert self._map is not None
        self._verified += sum(self._map.length_of(index) for index in pieces.indices_of(bits))

    def _report(self, holder: NodeId | None) -> None:
        self._progress(FetchProgress(self._verified, self._received, self._layer.size, holder))

    def _ban(self, holder: NodeId, reason: str) -> None:
        log.warning("%s is left alone for a while: %s", short(holder), reason)
        self._bans.banned(holder, reason, trio.current_time())

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._notify()

    def _wake_all(self) -> None:
        """There may be more to ask of every holder."""
        for session in self._sessions.values():
            session.woken.set()

    def _notify(self) -> None:
        """There may be something to do for the fetch as a whole."""
        self._changed.set()
        self._changed = trio.Event()


def _bits(indices: Iterable[int]) -> int:
    bits = 0
    for index in indices:
        bits |= 1 << index
    return bits


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
