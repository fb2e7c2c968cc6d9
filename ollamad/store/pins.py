"""Who needs which blobs now, so that nothing that is being made, read or named is freed.

A blob that no manifest names may be one that a pull has just brought and is about to name, one
that came before and that a create has just found here, or one that a model is loaded from. So
whoever works with blobs holds them, and whoever frees blobs does it in a sweep: what was held at
any time since the sweep began is left alone, since what the sweep knows of it may be old. And
what is being removed cannot be held before it is gone, so that nobody finds half of it.

Belongs to the event loop's thread; knows no disk.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

MAX_LEASES: Final = 10_000  # forgotten are the oldest; far more uploads than a node ever waits for


class Hold:
    """Blobs that one task needs; made by `Pins.hold`."""

    def __init__(self, pins: "Pins") -> None:
        self._pins = pins
        self.digests: list[str] = []

    async def add(self, *digests: str) -> None:
        """Hold these too, whether they are here or not. Waits while one is being removed."""
        for digest in digests:
            await self._pins.until_removed(digest)
            self._pins.take(digest)
            self.digests.append(digest)


class Sweep:
    """One round of freeing; made by `Pins.sweep`."""

    def __init__(self, pins: "Pins") -> None:
        self._pins = pins
        self.held: set[str] = set()  # at any time since it began

    @contextmanager
    def removing(self, digest: str) -> Iterator[bool]:
        """Whether the blob may be removed now; if so nobody gets a hold of it in the block."""
        if digest in self.held:
            yield False
            return
        with self._pins.no_holds(digest):
            yield True


class Pins:
    """All holds, leases and sweeps of a store. `clock` gives seconds, such as trio's."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._holds: Counter[str] = Counter()
        self._leases: dict[str, float] = {}  # digest -> until when
        self._sweeps: list[Sweep] = []
        self._removed: dict[str, trio.Event] = {}  # what is being removed now
        self._removers: Counter[str] = Counter()  # how many do that: sweeps may overlap

    @asynccontextmanager
    async def hold(self, *digests: str) -> AsyncIterator[Hold]:
        """Hold blobs for the time of the block."""
        hold = Hold(self)
        try:
            await hold.add(*digests)
            yield hold
        finally:
            for digest in hold.digests:
                self._holds[digest] -= 1
                if not self._holds[digest]:
                    del self._holds[digest]

    def lease(self, digest: str, seconds: float) -> None:
        """Hold a blob for so long: for somebody who has been told that it is here."""
        self._note(digest)
        self._leases.pop(digest, None)
        self._leases[digest] = self._clock() + seconds
        while len(self._leases) > MAX_LEASES:
            del self._leases[next(iter(self._leases))]

    def end_lease(self, digest: str) -> None:
        """Whoever it was for has used it, or has a hold."""
        self._leases.pop(digest, None)

    def is_held(self, digest: str) -> bool:
        return digest in self._holds or self._leases.get(digest, 0.0) > self._clock()

    @contextmanager
    def sweep(self) -> Iterator[Sweep]:
        """Begin to free: whatever is found out in the block is guarded against later holds."""
        now = self._clock()
        for digest in [digest for digest, until in self._leases.items() if until <= now]:
            del self._leases[digest]
        sweep = Sweep(self)
        sweep.held.update(self._holds, self._leases)
        self._sweeps.append(sweep)
        try:
            yield sweep
        finally:
            self._sweeps.remove(sweep)

    # For holds and sweeps.

    async def until_removed(self, digest: str) -> None:
        while (event := self._removed.get(digest)) is not None:
            await event.wait()

    def take(self, digest: str) -> None:
        self._holds[digest] += 1
        self._note(digest)

    @contextmanager
    def no_holds(self, digest: str) -> Iterator[None]:
        self._removed.setdefault(digest, trio.Event())
        self._removers[digest] += 1
        try:
            yield
        finally:
            self._removers[digest] -= 1
            if not self._removers[digest]:
                del self._removers[digest]
                self._removed.pop(digest).set()

    def _note(self, digest: str) -> None:
        for sweep in self._sweeps:
            sweep.held.add(digest)
