"""The table of active and recent transfers of this node, behind `GET /transfers`.

Data and arithmetic: whoever moves bytes tells it, and both clocks are arguments. It knows
neither peers nor files.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ollamad.core.ids import NodeId, short
from ollamad.core.transfers import Status, Transfer, TransferType

MAX_FINISHED = 200  # transfers remembered after their end; a page of history
MAX_ERROR = 2000  # characters of an error; lists of transfers go to every node
SPEED_WINDOW_S = 5.0  # speed is the mean over so long: calm, and yet follows the link
SPEED_SAMPLE_S = 0.25  # samples closer together tell nothing


@dataclass(slots=True)
class _Entry:
    id: str
    model_name: str
    type: TransferType
    bytes_total: int
    started_at: float
    begun: float  # steady clock
    digest: str
    cancel: Callable[[], None] | None
    status: Status = "pending"
    peer_id: str = ""
    bytes_done: int = 0
    received: int = 0  # bytes that came, wasted ones too; speed is made of it
    received_before: int = 0  # of these, what the first update told
    error: str = ""
    warning: str = ""
    finished_at: float | None = None
    final_speed: float = 0.0
    samples: deque[tuple[float, int]] = field(default_factory=deque)
    layers: tuple[tuple[str, int], ...] = ()


class TransferTable:
    """All transfers into this node: those under way, and the last MAX_FINISHED.

    Ids are `<start of the node id>-<run>-<number>`: give each run of the daemon another `run`
    (a few random characters), and ids are unique in the cluster. `wall` gives Unix seconds,
    `steady` seconds of a clock that never jumps. `on_change` is called with the transfer after
    it began, changed its status, or moved on (at most every SPEED_SAMPLE_S).
    """

    def __init__(
        self,
        node_id: NodeId,
        run: str,
        *,
        wall: Callable[[], float],
        steady: Callable[[], float],
        on_change: Callable[[Transfer], None] | None = None,
    ) -> None:
        self._node_id = node_id
        self._prefix = f"{short(node_id)}-{run}"
        self._wall = wall
        self._steady = steady
        self._on_change = on_change
        self._number = 0
        self._entries: dict[str, _Entry] = {}  # oldest first
        self._finished: deque[str] = deque()

    def begin(
        self,
        model_name: str,
        type_: TransferType,
        *,
        bytes_total: int = 0,
        digest: str = "",
        cancel: Callable[[], None] | None = None,
    ) -> str:
        """Add a pending transfer: its id. `cancel` is what `request_cancel` calls."""
        self._number += 1
        id_ = f"{self._prefix}-{self._number}"
        self._entries[id_] = _Entry(
            id_, model_name, type_, bytes_total, self._wall(), self._steady(), digest, cancel
        )
        self._changed(self._entries[id_])
        return id_

    def update(
        self,
        id_: str,
        *,
        bytes_done: int,
        received: int | None = None,
        bytes_total: int | None = None,
        peer_id: str | None = None,
        digest: str | None = None,
        layers: tuple[tuple[str, int], ...] | None = None,
    ) -> None:
        """Bytes moved: the transfer is active. Nothing happens if it is finished.

        Args:
          bytes_done: bytes of the whole transfer that are here and verified, those of earlier
            runs included.
          received: bytes that came, wasted ones included, for the speed; by default
            `bytes_done`. What the first update says was there before.
          bytes_total, peer_id, digest, layers: replace what was known.

        Raises:
          KeyError: there is no such transfer.
        """
        entry = self._entries[id_]
        if entry.finished_at is not None:
            return
        moved = entry.status == "pending"
        entry.status = "active"
        entry.bytes_done = bytes_done
        entry.received = bytes_done if received is None else received
        if bytes_total is not None:
            entry.bytes_total = bytes_total
        if peer_id is not None:
            entry.peer_id = peer_id
        if digest is not None:
            entry.digest = digest
        if layers is not None:
            entry.layers = layers
        now = self._steady()
        if not entry.samples:
            entry.begun, entry.received_before = now, entry.received
        if not entry.samples or now - entry.samples[-1][0] >= SPEED_SAMPLE_S:
            entry.samples.append((now, entry.received))
            self._forget_old_samples(entry, now)
            moved = True
        if moved:
            self._changed(entry)

    def complete(self, id_: str, warning: str = "") -> None:
        """It is here, whole and verified; `warning` is what speaks against using it."""
        entry = self._entries[id_]
        if entry.finished_at is None:
            entry.warning = warning
            entry.bytes_total = entry.bytes_done = max(entry.bytes_total, entry.bytes_done)
        self._finish(id_, "completed", "")

    def fail(self, id_: str, error: str) -> None:
        """It ended without success; `error` says why, and what to do."""
        self._finish(id_, "failed", error[:MAX_ERROR])

    def cancelled(self, id_: str) -> None:
        """Somebody stopped it."""
        self._finish(id_, "cancelled", "")

    def request_cancel(self, id_: str) -> bool:
        """Have it stopped; False if it is finished or cannot be stopped.

        Raises:
          KeyError: there is no such transfer.
        """
        entry = self._entries[id_]
        if entry.finished_at is not None or entry.cancel is None:
            return False
        entry.cancel()
        return True

    def get(self, id_: str) -> Transfer | None:
        entry = self._entries.get(id_)
        return None if entry is None else self._view(entry, layers=entry.layers)

    def list(self) -> list[Transfer]:
        """All of them, newest first, without their layers: a list of many goes to every node."""
        return [self._view(entry) for entry in reversed(self._entries.values())]

    def _finish(self, id_: str, status: Status, error: str) -> None:
        entry = self._entries[id_]
        if entry.finished_at is not None:
            return
        elapsed = self._steady() - entry.begun
        moved = entry.received - entry.received_before
        entry.final_speed = moved / elapsed if elapsed > 0 else 0.0
        entry.status = status
        entry.error = error
        entry.finished_at = self._wall()
        entry.cancel = None
        entry.samples.clear()
        self._finished.append(id_)
        while len(self._finished) > MAX_FINISHED:
            del self._entries[self._finished.popleft()]
        self._changed(entry)

    def _changed(self, entry: _Entry) -> None:
        if self._on_change is not None:
            self._on_change(self._view(entry))

    def _forget_old_samples(self, entry: _Entry, now: float) -> None:
        # The newest sample at or before the window's start stays: the mean begins there.
        while len(entry.samples) > 1 and entry.samples[1][0] <= now - SPEED_WINDOW_S:
            entry.samples.popleft()

    def _speed(self, entry: _Entry) -> float:
        if entry.finished_at is not None:
            return entry.final_speed
        if not entry.samples:
            return 0.0
        now = self._steady()
        self._forget_old_samples(entry, now)
        since, received = entry.samples[0]
        elapsed = now - since
        return (entry.received - received) / elapsed if elapsed > 0 else 0.0

    def _view(self, entry: _Entry, *, layers: tuple[tuple[str, int], ...] = ()) -> Transfer:
        speed = self._speed(entry)
        left = entry.bytes_total - entry.bytes_done
        done = entry.status == "completed"
        if entry.bytes_total:
            progress = min(100.0, 100.0 * entry.bytes_done / entry.bytes_total)
        else:
            progress = 100.0 if done else 0.0
        known = entry.status == "active" and speed > 0 and entry.bytes_total > 0
        return Transfer(
            id=entry.id,
            model_name=entry.model_name,
            type=entry.type,
            status=entry.status,
            progress=round(progress, 2),
            speed=round(speed, 1),
            eta=0.0 if done else round(max(0, left) / speed, 1) if known else None,
            peer_id=entry.peer_id,
            node_id=self._node_id,
            bytes_done=entry.bytes_done,
            bytes_total=entry.bytes_total,
            error=entry.error,
            started_at=entry.started_at,
            finished_at=entry.finished_at,
            digest=entry.digest,
            warning=entry.warning,
            layers=layers,
        )
