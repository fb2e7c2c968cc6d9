"""Fetches blobs from the nodes that hold them, piece by piece, from several at once.

One task manages a fetch and starts a session for each holder that may be used; the sessions
pull from one picker, so that a slow or lost holder only slows its own pieces. Pieces that were
verified are on the disk, and are never asked for again, not even after a kill -9.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.piece_picker import STALL_S, HolderBook, PiecePicker, Randrange
from ollamad.core.pieces import MIB, PieceMap
from ollamad.core.state import Layer
from ollamad.transfer.ports import PartialBlob, Peers, Store, Stream, bits_of
from ollamad.wire import pieces
from ollamad.wire.pieces import FetcherSide, ProtocolViolation

log = logging.getLogger(__name__)

MAX_SOURCES = 8  # holders used at once; more hardly add speed on one link, and cost memory
MAX_BUFFERED_BYTES = 512 * MIB  # pieces in memory, two for each holder, before fewer are used
WRITE_AHEAD_BYTES = 4 * MIB  # small pieces are written side by side, so that their syncs overlap
RECHECK_S = 1.0  # how often new holders, back-offs and stalls are looked at
GIVE_UP_AFTER_S = 120.0  # without a byte from anybody: long enough for a host to reboot
MIN_RETRY_S = 1.0  # before a holder is asked again for a piece that it refused


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

    `corrupt` is the error with which the store's `write_piece` refuses a wrong piece.
    """

    def __init__(
        self,
        peers: Peers,
        store: Store,
        *,
        corrupt: type[Exception],
        randrange: Randrange = random.randrange,
    ) -> None:
        self._peers = peers
        self._store = store
        self._corrupt = corrupt
        self._randrange = randrange
        self._bans = HolderBook()
        self._locks: dict[str, trio.Lock] = {}

    async def fetch_blob(
        self,
        layer: Layer,
        holders: Callable[[], Sequence[NodeId]],
        progress: Callable[[FetchProgress], None],
        *,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        """Have that blob in the store, whole and verified; returns at once if it is there.

        Args:
          layer: the blob as the replicated state knows it; a map that differs is a lie.
          holders: the nodes that may have (parts of) it, called again and again, so that nodes
            that come and go are seen. This node must not be among them.
          progress: called in the event loop after each block and each verified piece.
          give_up_after_s: seconds without a byte from anybody until it fails.

        A second fetch of the same blob waits for the first. If cancelled, the verified pieces
        stay for the next time.

        Raises:
          FetchFailed: no holder sent anything for so long.
          whatever the store raises (no room, disk failed, the whole blob's hash is wrong).
        """
        lock = self._locks.setdefault(layer.digest, trio.Lock())
        try:
            async with lock:
                if not await self._store.has_blob(layer.digest):
                    fetch = _Fetch(
                        self._peers,
                        self._store,
                        self._corrupt,
                        self._randrange,
                        self._bans,
                        layer,
                        holders,
                        progress,
                    )
                    await fetch.run(give_up_after_s)
        finally:
            if not lock.locked():
                self._locks.pop(layer.digest, None)


@dataclass(slots=True, eq=False)
class _Session:
    """One exchange with one holder."""

    holder: NodeId
    side: FetcherSide
    writing: trio.Semaphore  # a place for each piece that may be verified and written at once
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    unwanted: list[int] = field(default_factory=list)  # pieces to cancel
    waits_for_disk: bool = False


class _Fetch:
    """One run of a fetch."""

    def __init__(
        self,
        peers: Peers,
        store: Store,
        corrupt: type[Exception],
        randrange: Randrange,
        bans: HolderBook,
        layer: Layer,
        holders: Callable[[], Sequence[NodeId]],
        progress: Callable[[FetchProgress], None],
    ) -> None:
        self._peers = peers
        self._store = store
        self._corrupt = corrupt
        self._randrange = randrange
        self._bans = bans
        self._layer = layer
        self._candidates = holders
        self._progress = progress
        self._book = HolderBook()
        self._sessions: dict[NodeId, _Session] = {}
        self._changed = trio.Event()  # replaced when set: something to ask or to do differently
        self._adopting = trio.Lock()
        self._map: PieceMap | None = None
        self._blob: PartialBlob | None = None
        self._picker: PiecePicker | None = None
        self._failure: Exception | None = None
        self._verified = 0
        self._received = 0
        self._alive = trio.current_time()  # when bytes last came
        self._max_sources = max(
            1, min(MAX_SOURCES, MAX_BUFFERED_BYTES // (2 * max(1, layer.piece_size)))
        )

    async def run(self, give_up_after_s: float) -> None:
        try:
            if self._layer.size == 0:  # nobody has to be asked for nothing
                await self._adopt(PieceMap(0, self._layer.piece_size, b""))
            async with trio.open_nursery() as nursery:
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
            with trio.move_on_after(min(RECHECK_S, give_up_after_s)):
                await changed.wait()

    def _start_sessions(self, nursery: trio.Nursery, now: float) -> None:
        usable = [
            holder
            for holder in self._candidates()
            if holder not in self._sessions
            and self._book.is_usable(holder, now)
            and self._bans.is_usable(holder, now)
        ]
        while usable and len(self._sessions) < self._max_sources:
            holder = usable.pop(self._randrange(len(usable)))
            writers = max(1, WRITE_AHEAD_BYTES // self._layer.piece_size)
            side = FetcherSide(self._layer.digest)
            session = _Session(holder, side, trio.Semaphore(writers))
            self._sessions[holder] = session
            nursery.start_soon(self._run_session, session, nursery)

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

    async def _run_session(self, session: _Session, nursery: trio.Nursery) -> None:
        holder = session.holder
        reason, retry_after_s, lied = "it closed the exchange", 0.0, False
        try:
            with session.scope:
                await self._exchange(session, nursery)
        except* (ProtocolViolation, _HolderLied) as group:
            reason, lied = str(_first(group)), True
        except* _HolderGone as group:
            error = _first(group)
            reason = str(error)
            retry_after_s = error.retry_after_s if isinstance(error, _HolderGone) else 0.0
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            reason = str(_first(group)) or "the connection was lost"
        finally:
            # In here, since a cancelled fetch comes by as well.
            del self._sessions[holder]
            if self._picker is not None:
                self._picker.left(holder)
            self._notify()
        if lied:
            self._ban(holder, reason)
        else:
            self._book.failed(holder, reason, trio.current_time(), retry_after_s)

    async def _exchange(self, session: _Session, nursery: trio.Nursery) -> None:
        holder, side = session.holder, session.side
        async with self._peers.open(holder, pieces.METHOD, side.opening(), bulk=True) as stream:
            with trio.move_on_after(STALL_S) as opening:
                held = await self._begin(session, stream)
            if opening.cancelled_caught:
                raise _HolderGone(f"it did not answer for {STALL_S:g} s")
            assert self._picker is not None
            self._picker.joined(holder, held, trio.current_time())
            async with trio.open_nursery() as inner:
                inner.start_soon(self._ask, session, stream)
                while (message := await stream.receive()) is not None:
                    await self._take(session, side.receive(message), nursery)
                raise _HolderGone("it closed the exchange")

    async def _begin(self, session: _Session, stream: Stream) -> int:
        """Learn what the holder has, and the piece map if nobody gave it so far."""
        side = session.side
        held, count = 0, -1
        while count < 0 or self._picker is None:
            message = await stream.receive()
            if message is None:
                raise _HolderGone("it closed the exchange")
            match side.receive(message):
                case pieces.PiecesKnown(count, held):
                    if self._picker is None:
                        await stream.send(side.request_map())
                case pieces.PiecesGained(bits):
                    held |= bits
                case pieces.MapReceived(piece_map):
                    await self._adopt(piece_map)
                case pieces.Dismissed(code, reason, retry_after_s):
                    raise _HolderGone(reason or code, retry_after_s)
                case _:
                    raise ProtocolViolation("pieces that nobody asked for")
        assert self._map is not None
        if count != len(self._map):
            raise _HolderLied(f"it speaks of {count} pieces instead of {len(self._map)}")
        return held

    async def _adopt(self, piece_map: PieceMap) -> None:
        """Check a piece map and begin with it.

        Raises:
          _HolderLied: it is not the one that the cluster agreed on.
        """
        layer = self._layer
        problem = piece_map.problem()
        if problem is not None:
            raise _HolderLied(f"it sent a bad piece map: {problem}")
        if (piece_map.size, piece_map.piece_size, piece_map.root()) != (
            layer.size,
            layer.piece_size,
            layer.pieces_root,
        ):
            raise _HolderLied("it sent the piece map of something else")
        async with self._adopting:
            if self._picker is not None or self._failure is not None:
                return
            try:
                self._blob = blob = await self._store.open_partial(layer.digest, piece_map)
            except Exception as error:
                self._fail(error)
                raise _HolderGone("the store failed") from None
            self._map = piece_map
            have = bits_of(blob.have)
            self._verified = sum(piece_map.length_of(index) for index in pieces.indices_of(have))
            self._picker = PiecePicker(len(piece_map), piece_map.piece_size, have, self._randrange)
            self._report(None)
            self._notify()

    async def _ask(self, session: _Session, stream: Stream) -> None:
        """Keep the holder's window full, and cancel what others have brought."""
        assert self._picker is not None
        assert self._map is not None
        picker, side, holder = self._picker, session.side, session.holder
        while True:
            changed = self._changed
            while session.unwanted:
                if message := side.cancel(session.unwanted.pop()):
                    await stream.send(message)
            while (index := picker.pick(holder, trio.current_time())) is not None:
                await stream.send(side.request(index, self._map.length_of(index)))
            with trio.move_on_after(RECHECK_S):
                await changed.wait()
            now = trio.current_time()
            if not session.waits_for_disk and picker.is_stalled(holder, now):
                raise _HolderGone(f"it sent nothing for {STALL_S:g} s")
            if picker.is_idle(holder, now):
                raise _HolderGone("it has nothing that is missing here")

    async def _take(
        self, session: _Session, event: pieces.FetcherEvent, nursery: trio.Nursery
    ) -> None:
        """Act on what the holder sent."""
        assert self._picker is not None
        picker, holder = self._picker, session.holder
        match event:
            case pieces.BlockReceived(_, size):
                picker.heard_of(holder, trio.current_time())
                self._count(holder, size)
            case pieces.PieceReceived(index, data, size):
                self._count(holder, size)
                if picker.received(holder, index, len(data), trio.current_time()):
                    # While pieces are verified and written the next one arrives, no more.
                    session.waits_for_disk = True
                    await session.writing.acquire()
                    session.waits_for_disk = False
                    picker.heard_of(holder, trio.current_time())
                    nursery.start_soon(self._write, session, index, data)
                self._notify()
            case pieces.PiecesGained(bits):
                picker.gained(holder, bits, trio.current_time())
                self._notify()
            case pieces.RequestEnded(index, code, retry_after_s):
                pause = 0.0 if code == "cancelled" else max(MIN_RETRY_S, retry_after_s)
                picker.ended(holder, index, trio.current_time() + pause if pause else 0.0)
                self._notify()
            case pieces.Dismissed(code, reason, retry_after_s):
                raise _HolderGone(reason or code, retry_after_s)
            case pieces.MapReceived():
                pass  # another holder's came first
            case pieces.PiecesKnown():  # pragma: no cover
                raise AssertionError("the protocol allows one bitmap")

    async def _write(self, session: _Session, index: int, data: bytearray) -> None:
        """Verify and store a piece. Not a task of the session: a good piece outlives it."""
        assert self._blob is not None
        assert self._picker is not None
        assert self._map is not None
        try:
            await self._blob.write_piece(index, data)
        except self._corrupt as error:
            self._picker.failed(index)
            self._ban(session.holder, str(error))
            session.scope.cancel()
        except Exception as error:
            self._fail(error)
        else:
            self._verified += self._map.length_of(index)
            self._picker.verified(index)
            self._book.succeeded(session.holder)
            for other in self._picker.asked_of(index):
                self._sessions[other].unwanted.append(index)
            self._report(session.holder)
        finally:
            session.writing.release()
            self._notify()

    # Bookkeeping.

    def _count(self, holder: NodeId, size: int) -> None:
        self._received += size
        self._alive = trio.current_time()
        self._report(holder)

    def _report(self, holder: NodeId | None) -> None:
        self._progress(FetchProgress(self._verified, self._received, self._layer.size, holder))

    def _ban(self, holder: NodeId, reason: str) -> None:
        log.warning("%s is left alone for a while: %s", short(holder), reason)
        self._bans.banned(holder, reason, trio.current_time())

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception inside a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
