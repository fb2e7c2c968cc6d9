"""In which order requests begin, when there are more than can be answered at once.

trio runs every task that can go on once before it looks for news from the network. If a few
hundred connections had a request each in every such pass, a pass would take a good part of a
second, and whatever takes several of them (a connection that is accepted, a token on its way, a
heartbeat) many seconds. So only some requests begin in each pass. The others wait in lines, of
which each gets its turn: every address has one, and a second one for requests that were sent
ahead of the answer to the one before. Whoever waits for answers is not behind those who do not.
In a line the connections take turns by themselves, since none has more than one request there.
"""

from collections import OrderedDict

import trio

# One takes some 0.3 ms of the loop: a pass is a few milliseconds, and its overhead is small beside.
REQUESTS_PER_PASS = 8


class Turns:
    """The line. `run` is the task that moves it."""

    def __init__(self, per_pass: int = REQUESTS_PER_PASS) -> None:
        self._per_pass = per_pass
        self._free = per_pass
        self._lines: OrderedDict[tuple[str, bool], trio.lowlevel.ParkingLot] = OrderedDict()
        self._mover = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(line) for line in self._lines.values())

    async def take(self, address: str, *, ahead: bool = False) -> None:
        """Return when a request of that address may begin; `ahead`: it was not waited for.

        Cancellation: it has left the line.
        """
        if self._free and not self._lines:
            # Not renewed in every pass, but when it is used up: who is alone need not wake `run`.
            self._free -= 1
            return
        self._mover.unpark()
        await self._lines.setdefault((address, ahead), trio.lowlevel.ParkingLot()).park()

    async def run(self) -> None:
        """Let some begin in each pass, until cancelled."""
        while True:
            while not self._lines:
                await self._mover.park()
            await trio.lowlevel.checkpoint()  # the next pass
            self._free = self._per_pass
            while self._free and self._lines:
                key, line = self._lines.popitem(last=False)
                self._free -= len(line.unpark())  # nobody, if those who waited were cancelled
                if line:
                    self._lines[key] = line
