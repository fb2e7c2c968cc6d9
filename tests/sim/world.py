"""Virtual time: one clock that also carries out what the outside world does.

Nothing in a simulation waits for a socket, a thread or a real second. So whenever no task can
run, time may jump to whatever comes next: a deadline of trio's, or a callback of the world
(a frame arrives, a disk is done, a node crashes). The callbacks run here, between two steps of
trio's loop; that costs no task for each of them.

With the seed, everything is decided: the order in which trio runs its tasks too. The hash seed
of the process must be fixed as well (see `__main__`), because sets of strings are walked.
"""

import heapq
import itertools
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from trio._core import _run

START_S = 1000.0  # not 0, so that a time that somebody forgot to set is seen as such


class Stuck(Exception):
    """No task can run, no deadline is set and the world has nothing more to do."""


class World(trio.abc.Clock):
    """The clock of one simulation, its agenda and its log."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.seed = seed
        self.trace = trace  # whether frames are worth a line in the log
        self.now = START_S
        self.failure: BaseException | None = None  # the first thing that is not as it must be
        self.log: list[tuple[Any, ...]] = []  # time, who, what, details
        self._agenda: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._sequence = itertools.count()
        self._stopped: trio.Event | None = None
        self._is_over = False

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that one use does not shift another."""
        return random.Random(f"{self.seed} {purpose}")

    def at(self, time_s: float, what: Callable[..., object], *args: Any) -> None:
        """Call that at a time; in the order of these calls if at the same time."""
        heapq.heappush(self._agenda, (time_s, next(self._sequence), what, args))

    def after(self, delay_s: float, what: Callable[..., object], *args: Any) -> None:
        """Call that after so many seconds."""
        heapq.heappush(self._agenda, (self.now + delay_s, next(self._sequence), what, args))

    def note(self, who: str, what: str, *details: Any) -> None:
        """Add a line to the log."""
        self.log.append((self.now - START_S, who, what, *details))

    def fail(self, failure: BaseException) -> None:
        """End the run: this must not happen. The first one counts."""
        if self.failure is None:
            self.failure = failure
            self.note("world", "violation", str(failure))
            if self._stopped is not None:
                self._stopped.set()

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run until `main` returns or something fails; raises what failed."""

        async def until_stopped() -> None:
            self._stopped = trio.Event()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cancel_when_stopped, nursery.cancel_scope)
                    await main()
                    nursery.cancel_scope.cancel()
            finally:
                self._is_over = True

        _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
        _run._r.seed(self.seed)
        trio.run(until_stopped, clock=self)
        if self.failure is not None:
            raise self.failure

    async def _cancel_when_stopped(self, scope: trio.CancelScope) -> None:
        assert self._stopped is not None
        await self._stopped.wait()
        scope.cancel()

    # What trio asks of a clock.

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Trio asks when it has nothing to run: go on to what is next, never sleep."""
        if self._is_over:
            return 0  # trio winds up, with a socket of its own
        runnable = _run.GLOBAL_RUN_CONTEXT.runner.runq
        agenda = self._agenda
        while agenda and agenda[0][0] <= deadline:
            time_s, _, what, args = heapq.heappop(agenda)
            if time_s > self.now:
                self.now = time_s
            try:
                what(*args)
            except Exception as error:
                self.fail(error)
            if runnable:
                return 0
        if deadline == math.inf:
            tasks = sorted(task.name for task in _run.GLOBAL_RUN_CONTEXT.runner.tasks)
            raise Stuck(f"these wait for ever: {', '.join(tasks)}") from self.failure
        self.now = max(self.now, deadline)
        return 0
