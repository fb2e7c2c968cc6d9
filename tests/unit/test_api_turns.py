"""The line in which requests wait for their turn: who begins when, and who is not held up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from ollamad.api.turns import Turns

A, B = "192.0.2.1", "192.0.2.2"


@asynccontextmanager
async def moving(turns: Turns) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.run)
        yield nursery
        nursery.cancel_scope.cancel()


class Line:
    """Requests that wait, and the order in which they began."""

    def __init__(self, turns: Turns, nursery: trio.Nursery) -> None:
        self.turns = turns
        self.nursery = nursery
        self.begun: list[str] = []

    def ask(self, name: str, address: str, *, ahead: bool = False) -> None:
        self.nursery.start_soon(self._ask, name, address, ahead)

    async def _ask(self, name: str, address: str, ahead: bool) -> None:
        await self.turns.take(address, ahead=ahead)
        self.begun.append(name)


async def test_a_bounded_number_begins_in_each_pass() -> None:
    turns = Turns(per_pass=3)
    begun_in: list[int] = []
    passes = 0

    async def count_passes() -> None:
        nonlocal passes
        while True:
            await trio.lowlevel.checkpoint()
            passes += 1

    async def ask() -> None:
        await turns.take(A)
        begun_in.append(passes)

    async with moving(turns) as nursery, trio.open_nursery() as asking:
        nursery.start_soon(count_passes)
        for _ in range(60):
            asking.start_soon(ask)
    assert max(begun_in.count(number) for number in begun_in) <= 6  # a pass seen from two sides
    assert 10 <= begun_in[-1] - begun_in[0] <= 60


async def test_addresses_take_turns() -> None:
    turns = Turns(per_pass=2)
    async with moving(turns) as nursery:
        line = Line(turns, nursery)
        for number in range(500):
            line.ask(f"a{number}", A)
        await trio.lowlevel.checkpoint()
        line.ask("b", B)
        await trio.testing.wait_all_tasks_blocked()
        assert line.begun.index("b") < 20
        assert len(line.begun) == 501
        assert len(turns) == 0


async def test_who_waits_for_answers_is_not_behind_who_asks_ahead() -> None:
    turns = Turns(per_pass=2)
    async with moving(turns) as nursery:
        line = Line(turns, nursery)
        for number in range(500):
            line.ask(f"ahead{number}", A, ahead=True)
        await trio.lowlevel.checkpoint()
        for number in range(5):
            line.ask(f"polite{number}", A)
        await trio.testing.wait_all_tasks_blocked()
        assert max(line.begun.index(f"polite{number}") for number in range(5)) < 40
        assert len(line.begun) == 505  # and nobody starves


async def test_who_is_alone_waits_for_nobody() -> None:
    turns = Turns(per_pass=2)
    await turns.take(A)  # nobody moves the line
    await turns.take(A)
    async with moving(turns):
        for _ in range(100):
            with trio.fail_after(1):
                await turns.take(A)


async def test_who_leaves_the_line_takes_nobodys_turn() -> None:
    turns = Turns(per_pass=1)
    await turns.take(A)
    async with trio.open_nursery() as leaving:
        line = Line(turns, leaving)
        line.ask("gone", A)
        line.ask("gone", B)
        await trio.testing.wait_all_tasks_blocked()
        assert len(turns) == 2
        leaving.cancel_scope.cancel()
    assert len(turns) == 0
    async with moving(turns) as nursery:
        line = Line(turns, nursery)
        line.ask("here", A)
        await trio.testing.wait_all_tasks_blocked()
        assert line.begun == ["here"]
