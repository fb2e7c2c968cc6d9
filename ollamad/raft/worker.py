"""A thread that works off one trio task's calls, where the handing over counts.

`trio.to_thread.run_sync` goes through a limiter, a copied context and a cache of threads, which
takes a third longer, and the journal pays that in every commit. Knows nothing of what it calls.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

import trio

T = TypeVar("T")

# What to do in the thread, what then in the loop, and whose loop that is.
_Call = tuple[Callable[[], None], Callable[[], None], trio.lowlevel.TrioToken]


class Worker:
    """A thread from the first call until `close`; calls are carried out in their order."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call | None] | None = None  # of the thread, if there is one

    async def run(self, function: Callable[[], T]) -> T:
        """Call it in the thread; returns and raises what it does.

        Cancellation abandons the call: it is carried out all the same, before any later one, unless
        the process ends first, and nobody hears what became of it. Shield what must be known.
        """
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_work, args=(self._calls,), name="journal", daemon=True).start()
        results: list[T] = []
        errors: list[BaseException] = []
        is_abandoned = False

        def call() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        def report() -> None:
            if not is_abandoned:
                trio.lowlevel.reschedule(task)

        def abandon(_: object) -> trio.lowlevel.Abort:
            nonlocal is_abandoned
            is_abandoned = True
            return trio.lowlevel.Abort.SUCCEEDED

        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        self._calls.put((call, report, token))
        await trio.lowlevel.wait_task_rescheduled(abandon)
        if errors:
            raise errors.pop()
        return results.pop()

    def close(self) -> None:
        """Let the thread end after what was asked of it; a later call starts another."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _work(calls: "SimpleQueue[_Call | None]") -> None:
    while (asked := calls.get()) is not None:
        call, report, token = asked
        call()
        with suppress(trio.RunFinishedError):  # the last call was abandoned, and the loop with it
            token.run_sync_soon(report)
