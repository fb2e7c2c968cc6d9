"""Which piece of a blob to ask of which holder next, and which holders to leave alone.

The rules are BitTorrent's: the first piece is a random one, so that nodes that start together
soon have different things to offer; then the rarest first, ties broken at random; and an end
game, in which a holder that has nothing else to do is asked for a piece that another one is
slow to send. How many pieces are asked of a holder ahead grows while that makes it send faster
(the bandwidth-delay product, found as BBR's start-up finds it).

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
GROWTH = 1.1  # a window is worth doubling while the rate grows by a tenth
END_GAME_COPIES = 2  # holders that send one piece at once; more is waste

STALL_S = 15.0  # a holder that owes pieces and says nothing for so long is left alone a while
IDLE_S = 20.0  # a holder that has had nothing to offer for so long makes room for another
BAN_S = 600.0  # after a piece or a map that was wrong: long enough to spare the link
FIRST_BACK_OFF_S = 0.25  # a daemon restarts in about a second
MAX_BACK_OFF_S = 10.0  # how long the return of a holder may go unnoticed


class RequestWindow:
    """How many pieces to keep asked for at one holder."""

    def __init__(self, piece_size: int) -> None:
        self._limit = max(MIN_WINDOW, min(MAX_WINDOW, MAX_WINDOW_BYTES // piece_size))
        self.size = MIN_WINDOW
        self._best_rate = 0.0
        self._since: float | None = None  # when the measured round began
        self._bytes = 0
        self._pieces = 0

    def piece_arrived(self, size: int, now: float) -> None:
        """Measure the rate over a window full of pieces, and grow while that helps."""
        if self._since is None:
            # The first piece only starts the clock: its delay is set-up and a cold disk.
            self._since = now
            return
        self._bytes += size
        self._pieces += 1
        elapsed = now - self._since
        if self._pieces < self.size or elapsed <= 0:
            return
        rate = self._bytes / elapsed
        if rate > GROWTH * self._best_rate:
            self.size = min(self._limit, self.size * 2)
        self._best_rate = max(rate, self._best_rate)
        self._since, self._bytes, self._pieces = now, 0, 0


@dataclass(slots=True)
class _Holder:
    bits: int
    window: RequestWindow
    asked: dict[int, float] = field(default_factory=dict)  # piece -> when; oldest first
    refused: dict[int, float] = field(default_factory=dict)  # piece -> when to ask again
    heard: float = 0.0  # when something last came of it


class PiecePicker:
    """The pieces of one blob that are missing, and who was asked for them.

    `have` are the verified pieces. A piece goes from missing to asked to received (it is being
    verified) to had; a failure at any point makes it missing again.
    """

    def __init__(self, count: int, piece_size: int, have: int, randrange: Randrange) -> None:
        self._count = count
        self._piece_size = piece_size
        self._all = (1 << count) - 1
        self._have = have & self._all
        self._received = 0
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

    def joined(self, holder: NodeId, bits: int, now: float) -> None:
        """A holder may be asked from now on; `bits` is what it has."""
        self._holders[holder] = _Holder(0, RequestWindow(self._piece_size), heard=now)
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
        offered = state.bits & ~self._have & ~self._received
        if state.refused:
            state.refused = {index: at for index, at in state.refused.items() if at > now}
            for index in state.refused:
                offered &= ~(1 << index)
        piece = self._rarest(offered & ~self._asked)
        if piece is None and not state.asked:
            piece = self._end_game(holder, offered)
        if piece is not None:
            if not state.asked:
                state.heard = now
            state.asked[piece] = now
            self._asked |= 1 << piece
        return piece

    def _rarest(self, pieces: int) -> int | None:
        if not pieces:
            return None
        if not (self._have | self._received | self._asked):
            return self._random_of(pieces)
        for level in self._by_availability[1:]:
            if rare := level & pieces:
                return self._random_of(rare)
        return None

    def _end_game(self, holder: NodeId, offered: int) -> int | None:
        """A piece that another holder was asked for last, so most likely has not begun with."""
        latest: tuple[float, int] | None = None
        for other, state in self._holders.items():
            for index, at in state.asked.items() if other != holder else ():
                if (
                    offered >> index & 1
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

    def heard_of(self, holder: NodeId, now: float) -> None:
        """A part of a piece came from that holder."""
        if state := self._holders.get(holder):
            state.heard = now

    def is_stalled(self, holder: NodeId, now: float) -> bool:
        """Whether that holder owes pieces and has been silent for too long."""
        state = self._holders[holder]
        return bool(state.asked) and now - state.heard >= STALL_S

    def is_idle(self, holder: NodeId, now: float) -> bool:
        """Whether nothing was to be asked of that holder for a long time."""
        state = self._holders[holder]
        return not state.asked and now - state.heard >= IDLE_S

    def received(self, holder: NodeId, index: int, size: int, now: float) -> bool:
        """A whole piece came. Whether it is worth verifying: False if it is had or verified now."""
        self._end_request(holder, index)
        if state := self._holders.get(holder):
            state.heard = now
            state.window.piece_arrived(size, now)
        if (self._have | self._received) >> index & 1:
            return False
        self._received |= 1 << index
        return True

    def verified(self, index: int) -> None:
        """That piece is right and stored. Requests to other holders (`asked_of`) are now waste."""
        self._received &= ~(1 << index)
        self._have |= 1 << index

    def failed(self, index: int) -> None:
        """That piece was received, but is wrong or could not be stored: it is missing again."""
        self._received &= ~(1 << index)

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
