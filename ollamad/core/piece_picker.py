"""Which piece of a blob to ask of which holder next, and which holders to leave alone.

The rules are BitTorrent's: the first piece is a random one, so that nodes that start together
soon have different things to offer; then the rarest first, ties broken at random; and an end
game, in which a holder that has nothing else to do is asked for a piece that another one is
slow to send. Where there is one holder only, all is asked for in order. How many pieces are asked
of a holder ahead follows from its rate (the bandwidth-delay product).

Pure: time (seconds of any steady clock) and randomness are arguments. Pieces are numbered, and
sets of pieces are ints: bit i is piece i, which makes the rarest pieces of a holder a few
operations on words, whatever the number of pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB

Randrange = Callable[[int], int]  # a number from 0 up to, without, the argument

MIN_WINDOW = 2  # pieces: one on its way and one waiting, so that the holder never idles
MAX_WINDOW = 32  # pieces; more only delay the others, and the holder's queue is bounded
MAX_WINDOW_BYTES = 64 * MIB  # 10 Gbit/s at 50 ms; larger pieces need no deep queue
AHEAD_S = 0.25  # what a holder sends in this time is asked for ahead
SMOOTHING = 0.3  # weight of the newest piece in a holder's rate
END_GAME_COPIES = 2  # holders that send one piece at once; more is waste
END_GAME_WAIT_S = 1.0  # a piece that was asked for later is most likely on its way
END_GAME_BYTES = 64 * MIB  # of second copies, which are kept in memory

STALL_S = 15.0  # a holder that owes pieces and says nothing for so long is left alone a while
SLOW_S = 10.0  # a holder that is far slower than others for so long makes room, too
SLOW_SHARE = 0.04  # of the rate of the fastest; with 25 equal fetchers a source is not slow
IDLE_S = 20.0  # a holder that has had nothing to offer for so long makes room for another
BAN_S = 600.0  # after a piece or a map that was wrong: long enough to spare the link
FIRST_BACK_OFF_S = 0.25  # a daemon restarts in about a second
MAX_BACK_OFF_S = 10.0  # how long the return of a holder may go unnoticed


class RequestWindow:
    """How many pieces to keep asked for at one holder: what it sends within AHEAD_S.

    That covers the way there and back of any link that a cluster has (the bandwidth-delay
    product), and is no more, since what waits at a slow holder cannot be asked of another. While
    the window limits the rate, the rate that it allows lets it grow.
    """

    def __init__(self, piece_size: int) -> None:
        self._piece_size = piece_size
        self._limit = max(MIN_WINDOW, min(MAX_WINDOW, MAX_WINDOW_BYTES // piece_size))
        self.size = MIN_WINDOW
        self.rate = 0.0  # bytes/s while it owed something
        self._last: float | None = None  # when it began to owe, or sent the last piece

    def asked(self, now: float) -> None:
        """It owes something from now on, after it owed nothing."""
        self._last = now

    def piece_arrived(self, size: int, now: float) -> None:
        """Measure how long the piece took since the one before."""
        since, self._last = self._last, now
        if since is None:
            return
        # In seconds for a byte, since those are what adds up: a burst out of a buffer must not
        # count as much as the wait before it.
        took = max(now - since, 1e-6) / max(size, 1)
        before = 1 / self.rate if self.rate else took
        self.rate = 1 / (before + SMOOTHING * (took - before))
        ahead = int(self.rate * AHEAD_S / self._piece_size) + 1
        self.size = max(MIN_WINDOW, min(self._limit, ahead))


@dataclass(slots=True)
class _Holder:
    bits: int
    window: RequestWindow
    asked: dict[int, float] = field(default_factory=dict)  # piece -> when; oldest first
    refused: dict[int, float] = field(default_factory=dict)  # piece -> when to ask again
    heard: float = 0.0  # when something last came of it
    measured_since: float = 0.0  # when it began to owe, or the last measurement of SLOW_S ended
    measured: int = 0  # bytes that came since


class PiecePicker:
    """The pieces of one blob that are missing, and who was asked for them.

    `have` are the pieces that are here. A piece goes from missing to asked to had; a failure makes
    it missing again. Only pieces whose hashes are `known` are asked for; by default all.
    """

    def __init__(
        self,
        count: int,
        piece_size: int,
        have: int,
        randrange: Randrange,
        *,
        known: int | None = None,
    ) -> None:
        self._count = count
        self._piece_size = piece_size
        self._all = (1 << count) - 1
        self._have = have & self._all
        self._known = self._all if known is None else known
        self._asked = 0  # the union of what holders are asked for
        self._randrange = randrange
        self._holders: dict[NodeId, _Holder] = {}
        # Entry n: the pieces that exactly n holders have.
        self._by_availability: list[int] = [self._all]

    @property
    def have(self) -> int:
        return self._have

    @property
    def is_done(self) -> bool:
        return self._have == self._all

    def learned(self, known: int, have: int) -> None:
        """More hashes are known, and perhaps more pieces were found here."""
        self._known |= known
        self._have |= have

    def joined(self, holder: NodeId, bits: int, now: float) -> None:
        """A holder may be asked from now on; `bits` is what it has."""
        window = RequestWindow(self._piece_size)
        self._holders[holder] = _Holder(0, window, heard=now, measured_since=now)
        self.gained(holder, bits, now)

    def gained(self, holder: NodeId, bits: int, now: float) -> None:
        """That holder got more pieces."""
        state = self._holders[holder]
        state.heard = max(state.heard, now)
        new = bits & self._all & ~state.bits
        state.bits |= new
        levels = self._by_availability
        levels.append(0)
        for level in range(len(levels) - 2, -1, -1):
            moved = levels[level] & new
            levels[level] ^= moved
            levels[level + 1] |= moved
        if not levels[-1]:
            levels.pop()

    def left(self, holder: NodeId) -> None:
        """That holder is gone; what it was asked for is missing again. Harmless twice."""
        state = self._holders.pop(holder, None)
        if state is None:
            return
        levels = self._by_availability
        for level in range(1, len(levels)):
            moved = levels[level] & state.bits
            levels[level] ^= moved
            levels[level - 1] |= moved
        while len(levels) > 1 and not levels[-1]:
            levels.pop()
        self._recount_asked()

    def pick(self, holder: NodeId, now: float) -> int | None:
        """The piece to ask of that holder now; None: nothing, or its window is full."""
        state = self._holders[holder]
        if len(state.asked) >= state.window.size:
            return None
        offered = state.bits & self._known & ~self._have
        if state.refused:
            state.refused = {index: at for index, at in state.refused.items() if at > now}
            for index in state.refused:
                offered &= ~(1 << index)
        piece = self._rarest(offered & ~self._asked)
        if piece is None and not state.asked:
            piece = self._end_game(holder, offered, now)
        if piece is not None:
            if not state.asked:
                state.heard = state.measured_since = now
                state.measured = 0
                state.window.asked(now)
            state.asked[piece] = now
            self._asked |= 1 << piece
        return piece

    def _rarest(self, pieces: int) -> int | None:
        if not pieces:
            return None
        if len(self._holders) == 1:
            # There is nobody to share with. In order, the whole can be hashed while it comes.
            return (pieces & -pieces).bit_length() - 1
        if not (self._have | self._asked):
            return self._random_of(pieces)
        for level in self._by_availability[1:]:
            if rare := level & pieces:
                return self._random_of(rare)
        return None

    def _end_game(self, holder: NodeId, offered: int, now: float) -> int | None:
        """A piece that another holder was asked for last, so most likely has not begun with.

        Only when every missing piece was asked for: before that, twice is a waste of the link.
        """
        if self._all & ~self._have & ~self._asked:
            return None
        twice = sum(len(state.asked) for state in self._holders.values()) - self._asked.bit_count()
        if twice and (twice + 1) * self._piece_size > END_GAME_BYTES:
            return None
        latest: tuple[float, int] | None = None
        for other, state in self._holders.items():
            for index, at in state.asked.items() if other != holder else ():
                if (
                    offered >> index & 1
                    and now - at >= END_GAME_WAIT_S
                    and (latest is None or (at, index) > latest)
                    and len(self.asked_of(index)) < END_GAME_COPIES
                ):
                    latest = (at, index)
        return None if latest is None else latest[1]

    def _random_of(self, pieces: int) -> int:
        """One of the set bits: the first at or above a random place, else the lowest."""
        above = pieces >> (start := self._randrange(self._count)) << start
        chosen = above or pieces
        return (chosen & -chosen).bit_length() - 1

    def asked_of(self, index: int) -> list[NodeId]:
        """The holders that are asked for that piece now."""
        return [holder for holder, state in self._holders.items() if index in state.asked]

    def heard_of(self, holder: NodeId, size: int, now: float) -> None:
        """So many bytes of pieces came from that holder."""
        if state := self._holders.get(holder):
            state.heard = now
            state.measured += size

    def is_stalled(self, holder: NodeId, now: float) -> bool:
        """Whether that holder owes pieces and has been silent for too long."""
        state = self._holders[holder]
        return bool(state.asked) and now - state.heard >= STALL_S

    def is_slow(self, holder: NodeId, now: float) -> bool:
        """Whether that holder was far slower than another for SLOW_S, and others have what it owes.

        Asked now and then; each call after SLOW_S begins to measure anew.
        """
        state = self._holders[holder]
        elapsed = now - state.measured_since
        if not state.asked or elapsed < SLOW_S:
            return False
        rate = state.measured / elapsed
        state.measured_since, state.measured = now, 0
        others = [other for name, other in self._holders.items() if name != holder]
        fastest = max((other.window.rate for other in others), default=0.0)
        return rate < SLOW_SHARE * fastest and all(
            any(other.bits >> index & 1 for other in others) for index in state.asked
        )

    def is_idle(self, holder: NodeId, now: float) -> bool:
        """Whether nothing was to be asked of that holder for a long time."""
        state = self._holders[holder]
        return not state.asked and now - state.heard >= IDLE_S

    def arrived(self, holder: NodeId, index: int, size: int, now: float) -> None:
        """A whole piece is here, and right. Requests to others (`asked_of`) are now waste."""
        self._end_request(holder, index)
        if state := self._holders.get(holder):
            state.heard = now
            state.window.piece_arrived(size, now)
        self._have |= 1 << index

    def ended(self, holder: NodeId, index: int, again_at: float = 0.0) -> None:
        """A request ended without its piece; that holder is not asked for it before that time."""
        self._end_request(holder, index)
        if again_at and (state := self._holders.get(holder)):
            state.refused[index] = again_at

    def _end_request(self, holder: NodeId, index: int) -> None:
        if state := self._holders.get(holder):
            state.asked.pop(index, None)
        self._recount_asked()

    def _recount_asked(self) -> None:
        self._asked = 0
        for state in self._holders.values():
            for index in state.asked:
                self._asked |= 1 << index


@dataclass(slots=True)
class _Record:
    failures: int = 0
    usable_at: float = 0.0
    banned: bool = False
    reason: str = ""


class HolderBook:
    """Which holders to leave alone, until when, and why."""

    def __init__(self) -> None:
        self._records: dict[NodeId, _Record] = {}

    def is_usable(self, holder: NodeId, now: float) -> bool:
        record = self._records.get(holder)
        return record is None or now >= record.usable_at

    def usable_at(self, holder: NodeId) -> float:
        """From when on it may be used."""
        record = self._records.get(holder)
        return float("-inf") if record is None else record.usable_at

    def is_banned(self, holder: NodeId, now: float) -> bool:
        record = self._records.get(holder)
        return record is not None and record.banned and now < record.usable_at

    def failed(self, holder: NodeId, reason: str, now: float, retry_after_s: float = 0.0) -> None:
        """It could not be used: try again later, after twice the time of the last failure."""
        record = self._records.setdefault(holder, _Record())
        if record.banned and now < record.usable_at:
            return
        pause = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(record.failures, 16))
        record.failures += 1
        record.usable_at = now + max(pause, retry_after_s)
        record.banned = False
        record.reason = reason

    def banned(self, holder: NodeId, reason: str, now: float) -> None:
        """It sent something wrong, so nothing is asked of it for BAN_S."""
        self._records[holder] = _Record(1, now + BAN_S, True, reason)

    def succeeded(self, holder: NodeId) -> None:
        """It sent a piece that is right: earlier failures count no more. Not a pardon."""
        record = self._records.get(holder)
        if record is not None and not record.banned:
            del self._records[holder]

    def reasons(self) -> dict[NodeId, str]:
        """Why holders were left alone, for error messages."""
        return {holder: record.reason for holder, record in self._records.items()}
