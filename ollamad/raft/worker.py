"""A thread that works off one trio task's calls, where the handing over counts.

`trio.to_thread.run_sync` goes through a limiter, a copied context and a cache of threads, which
takes a third longer, and the journal pays that in every commit. Knows nothing of what it calls.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import trio

T = TypeVar("T")

_Call = tuple[Callable[[], None], trio.lowlevel.Task, trio.lowlevel.TrioToken]


class Worker:
    """A thread from the first call until `close`; calls are carried out in their order."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call | None] | None = None  # of the thread, if there is one

    async def run(self, function: Callable[[], T]) -> T:
        """Call it in the thread; returns and raises what it does.

        Cancellation waits for the end of the call, and is raised at the next checkpoint.
        """
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_work, args=(self._calls,), name="journal", daemon=True).start()
        results: list[T] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        self._calls.put((call, task, token))
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
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
        call, task, token = asked
        call()
        token.run_sync_soon(trio.lowlevel.reschedule, task)
