"""Work that is begun by a call and goes on in the background, for as long as its owner runs."""

import trio


class Background:
    """Has a nursery while `run` does, and none before and after.

    What ends in the middle of the owner's end must not begin anything more: a nursery that is
    being cancelled would take it and fail. So `_nursery` is gone first.
    """

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    def _resume(self) -> None:
        """Begin what is to go on from the last time; for those that have such."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what is begun meanwhile, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._resume()
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
