"""A disk that keeps what was written and loses what was not, and that fails in all known ways.

One `SimDisk` outlives the processes that use it; each process has its own `DiskHandle`, which a
crash makes void: what a dead process had begun to write is there as a whole or not at all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ollamad.raft import errors
from ollamad.raft.errors import JournalFailed
from ollamad.raft.journal import Batch, Blob, LogEntry, Stored
from tests.sim.plan import Crash
from tests.sim.world import World

if TYPE_CHECKING:
    from tests.sim.cluster import Life


@dataclass(frozen=True)
class LivingStored(Stored):
    """What is stored, and the process that reads it."""

    life: "Life | None" = None


DEVICE_ERROR = "the simulated device reports an I/O error"
SPIKE_SHARE = 0.02  # of the writes take ten times as long


class SimDisk:
    """What is stored, and how the disk behaves."""

    def __init__(self, world: World, name: str, sync_s: float) -> None:
        self.world = world
        self.rng = world.rng(f"disk {name}")
        self.entries: dict[int, LogEntry] = {}
        self.first = 0  # index of the first and the last entry; 0 without entries
        self.last = 0
        self.meta = Batch()
        self.snapshot: Blob | None = None
        self.usual_sync_s = sync_s
        self.sync_s = sync_s
        self.stalled_until = 0.0
        self.full_until = 0.0
        self.breaks_next = False
        self.writes = 0

    def store(self, entries: list[LogEntry]) -> None:
        """Begin with these entries."""
        self.entries = {entry[1]: entry for entry in entries}
        self.first, self.last = entries[0][1], entries[-1][1]

    def duration_s(self) -> float:
        spike = 10 if self.rng.random() < SPIKE_SHARE else 1
        done_at = max(self.world.now, self.stalled_until)
        return done_at - self.world.now + self.sync_s * self.rng.uniform(0.7, 1.5) * spike

    def holds(self, entry: LogEntry) -> bool:
        """Whether that entry is here, or a snapshot that covers its index."""
        return self.entries.get(entry[1]) == entry or self.first > entry[1]

    def write(self, batch: Batch) -> None:
        """Carry out a batch."""
        entries = self.entries
        if batch.drop_from is not None:
            for index in range(max(batch.drop_from, self.first), self.last + 1):
                del entries[index]
            self.last = min(self.last, batch.drop_from - 1)
        if batch.drop_below is not None:
            for index in range(self.first, min(batch.drop_below, self.last + 1)):
                del entries[index]
            self.first = max(self.first, batch.drop_below)
        if not entries:
            self.first = self.last = 0
        for entry in batch.add:
            index = entry[1]
            assert not entries or index == self.last + 1, f"entry {index} after {self.last}"
            self.first = self.first if entries else index
            entries[index] = entry
            self.last = index
        if batch.snapshot is not None:
            self.snapshot = batch.snapshot
        self.meta = batch
        self.writes += 1

    def stored(self, life: "Life") -> Stored:
        meta = self.meta
        entries = [self.entries[i] for i in range(self.first, self.last + 1)] if self.last else []
        return LivingStored(
            entries, meta.term, meta.voted_for, meta.commit_index, meta.hint, self.snapshot, life
        )


class DiskHandle:
    """The journal's `Store` of one process."""

    def __init__(self, disk: SimDisk, life: "Life") -> None:
        self._disk = disk
        self._life = life
        self._pending: Batch | None = None  # the device has it
        self._done = trio.Event()  # and now the process knows
        self.crash: tuple[Crash, int] | None = None  # when to die, after so many writes
        self._is_broken = False

    async def load(self) -> Stored:
        await trio.lowlevel.checkpoint()
        return self._disk.stored(self._life)

    async def commit(self, batch: Batch) -> None:
        """Write a batch; see `Store`."""
        life, disk = self._life, self._disk
        if life.is_dead:
            return
        assert self._pending is None, "two writes at a time"
        assert not self._is_broken, "a write after one that failed"
        if life.world.now < disk.full_until:
            await trio.lowlevel.checkpoint()
            life.count("disk full")
            raise errors.DiskFull("no space left on the simulated device")
        dies = None
        if self.crash is not None:
            how, writes = self.crash
            self.crash = (how, writes - 1)
            dies = how if writes <= 1 else None
        if dies is Crash.BEFORE_WRITE:
            life.crash("before a write")
            return
        self._pending, self._done = batch, trio.Event()
        life.world.after(disk.duration_s(), self._finish, batch, dies)
        await self._done.wait()
        if self._is_broken and not life.is_dead:
            raise JournalFailed(DEVICE_ERROR)

    def _finish(self, batch: Batch, dies: Crash | None) -> None:
        life, disk = self._life, self._disk
        if life.is_dead:
            return
        self._pending = None
        if disk.breaks_next:
            disk.breaks_next = False
            self._is_broken = True
            life.count("disk failed")
            life.note("disk failed")
            if disk.rng.random() < 0.5:
                disk.write(batch)
        else:
            disk.write(batch)
            if disk.last and disk.entries[disk.last][2] > batch.term:
                life.checker.violated(
                    "promises are durable",
                    f"{life.host.id} writes an entry of term {disk.entries[disk.last][2]} "
                    f"together with term {batch.term}",
                )
            if dies is not None:
                life.crash("after a write")
        life.wake(self._done.set)

    def process_died(self) -> None:
        """Decide what becomes of the write that is under way."""
        if self._pending is not None:
            if self._disk.rng.random() < 0.5:
                self._disk.write(self._pending)
            self._pending = None
        self._done.set()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
