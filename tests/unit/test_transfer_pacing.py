"""Limits in bytes a second, how many pieces are sent side by side, and whose turn it is."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ollamad.core.ids import NodeId
from ollamad.core.pacing import BURST_S, Pacer, SlotTuner
from ollamad.core.piece_picker import STALL_S
from ollamad.core.pieces import MIB
from ollamad.store.pieces import Region
from ollamad.transfer.lanes import SendingLane
from ollamad.transfer.limits import Limit
from ollamad.transfer.turns import SLOT_S, Turns
from ollamad.wire.lane import BLOCK_SIZE, EndCode

A, B = NodeId("A"), NodeId("B")


def test_bytes_are_spread_over_time_with_a_small_burst() -> None:
    pacer, now, taken = Pacer(), 100.0, 0
    while now < 110:
        wait = pacer.take(1000, 50_000.0, now)
        taken += 1000
        now += wait
    assert taken == pytest.approx(50_000 * (10 + BURST_S), rel=0.01)


def test_time_that_passed_unused_is_not_saved_up() -> None:
    pacer = Pacer()
    pacer.take(1000, 1000.0, 0)
    assert pacer.take(100, 1000.0, 1000) == 0  # the burst
    assert pacer.take(1000, 1000.0, 1000) == pytest.approx(1)


def test_without_a_limit_nobody_waits_and_nothing_is_owed_later() -> None:
    pacer = Pacer()
    assert pacer.take(1 << 40, None, 5) == 0
    assert pacer.take(10, 1000.0, 5) == 0


def test_a_limit_is_lower_while_the_node_is_busy() -> None:
    busy = False
    now = 0.0
    limit = Limit(1000.0, rate_when_busy=10.0, is_busy=lambda: busy, clock=lambda: now)
    assert limit.take(1000) == pytest.approx(1 - BURST_S)
    now, busy = 10.0, True
    assert limit.take(1000) == pytest.approx(100 - BURST_S)
    busy, now = False, 1000.0
    only_when_busy = Limit(None, rate_when_busy=10.0, is_busy=lambda: busy, clock=lambda: now)
    assert only_when_busy.take(1000) == 0
    busy = True
    assert only_when_busy.take(1000) == pytest.approx(100 - BURST_S, rel=0.01)
    slow = Limit(5.0, rate_when_busy=10.0, is_busy=lambda: busy, clock=lambda: now)
    assert slow.take(1000) == pytest.approx(200 - BURST_S)


def test_a_low_limit_is_shared_out_in_small_portions() -> None:
    """Sixty-four who share it are each heard of long before they seem dead."""
    assert Limit().portion(MIB) == MIB
    assert Limit(1e9).portion(256 * 1024) == 256 * 1024
    assert Limit(1e9, rate_when_busy=1e6, is_busy=lambda: True).portion(MIB) == 50_000
    for rate in (20_000.0, 1e5, 1e6, 1e7):
        now = [0.0]
        limit = Limit(rate, clock=lambda now=now: now[0])  # type: ignore[misc]
        waits = [limit.take(limit.portion(256 * 1024)) for _ in range(64)]
        assert max(waits) < STALL_S / 3


class Sent:
    """A connection that notes the sizes of what is sent."""

    received = 0

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.paused = 0.0

    async def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def send_file(self, head: bytes, descriptor: int, offset: int, size: int) -> None:
        self.blocks.append(size)

    def pause(self, seconds: float) -> None:
        self.paused += seconds


@pytest.mark.parametrize(
    ("rate", "largest"), [(None, BLOCK_SIZE), (1e8, BLOCK_SIZE), (1e6, 50_000)]
)
async def test_a_lane_sends_no_more_at_once_than_its_limit_lets_it(
    tmp_path: Path, rate: float | None, largest: int
) -> None:
    path = tmp_path / "piece"
    path.write_bytes(bytes(MIB + 5))
    connection = Sent()
    with open(path, "rb") as file:  # noqa: ASYNC230 - a small one
        lane = SendingLane(connection, Limit(rate, clock=lambda: 0.0))  # type: ignore[arg-type]
        region = Region(file.fileno(), 0, MIB + 5)
        assert await lane.send_piece(0, region, lambda: True, lambda size: None) is None
    assert sum(connection.blocks) == MIB + 5
    assert max(connection.blocks) == largest


async def test_of_a_piece_that_cannot_be_read_nothing_is_sent(tmp_path: Path) -> None:
    """What was begun would have to be sent to its end."""
    path = tmp_path / "short"
    path.write_bytes(bytes(100_000))
    connection = Sent()
    with open(path, "rb") as file:  # noqa: ASYNC230 - a small one
        lane = SendingLane(connection, Limit())  # type: ignore[arg-type]
        region = Region(file.fileno(), 0, MIB)
        code = await lane.send_piece(0, region, lambda: True, lambda size: None)
    assert (code, connection.blocks) == (EndCode.UNREADABLE, [])


def test_a_limit_holds_over_all_threads_together() -> None:
    limit = Limit(1000.0, clock=lambda: 0.0)
    waits: list[float] = []

    def take() -> None:
        for _ in range(100):
            waits.append(limit.take(10))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(waits) == pytest.approx(4 - BURST_S)
    assert len({round(wait, 6) for wait in waits if wait}) == len([wait for wait in waits if wait])


def link(tuner: SlotTuner, seconds: float, rate_of: "object", begin: float = 0.0) -> float:
    """Send pieces for so long at a rate that depends on how many go side by side."""
    now = begin
    while now < begin + seconds:
        now += MIB / rate_of(tuner.slots)  # type: ignore[operator]
        tuner.waited()
        tuner.sent(MIB, now)
    return now


def test_few_pieces_go_side_by_side_when_that_fills_the_link() -> None:
    tuner = SlotTuner()
    now = link(tuner, 60, lambda slots: 12 * MIB)
    used: list[int] = []
    link(tuner, 60, lambda slots: used.append(slots) or 12 * MIB, now)
    assert sum(slots == SlotTuner.LEAST for slots in used) > 0.75 * len(used)


def test_more_go_side_by_side_to_receivers_that_are_slower_than_the_link() -> None:
    tuner = SlotTuner()
    link(tuner, 60, lambda slots: 10 * MIB * min(slots, 12))
    assert tuner.slots in (16, 32)


def test_nothing_is_changed_while_nobody_waits() -> None:
    tuner = SlotTuner()
    for second in range(100):
        tuner.sent(MIB, float(second))
    assert tuner.slots == SlotTuner.LEAST


async def test_peers_take_turns_whatever_each_asks_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    order: list[NodeId] = []

    async def send(peer: NodeId) -> None:
        async with turns.turn(peer):
            order.append(peer)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(send, A)
        await trio.sleep(0.005)
        for _ in range(5):
            nursery.start_soon(send, B)
    # The slots that were free went to A; from then on B gets every second one. Those of one moment
    # begin in any order.
    slots = SlotTuner.LEAST
    assert [order[begin : begin + slots].count(B) for begin in (0, slots, 2 * slots)] == [
        0,
        slots // 2,
        slots // 2,
    ]
    assert len(order) == 25


async def test_no_more_slots_are_taken_than_there_are_and_cancelling_gives_them_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    running = most = 0

    async def send(peer: NodeId, scope: trio.CancelScope) -> None:
        nonlocal running, most
        with scope:
            async with turns.turn(peer):
                running += 1
                most = max(most, running)
                try:
                    await trio.sleep(0.5)
                finally:
                    running -= 1

    scopes = [trio.CancelScope() for _ in range(9)]
    async with trio.open_nursery() as nursery:
        for number, scope in enumerate(scopes):
            nursery.start_soon(send, NodeId(str(number % 3)), scope)
        await trio.sleep(0.1)
        for scope in scopes[::2]:  # some that send, and some that wait
            scope.cancel()
        await trio.sleep(0.1)
        async with turns.turn(B):
            pass
    assert most == SlotTuner.LEAST
    assert trio.current_time() < 2


async def test_a_piece_that_takes_long_leaves_its_slot_to_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()

    async def crawl() -> None:
        async with turns.turn(A):
            await trio.sleep(100)

    async with trio.open_nursery() as nursery:
        for _ in range(SlotTuner.LEAST):
            nursery.start_soon(crawl)
        await trio.testing.wait_all_tasks_blocked()
        async with turns.turn(B):
            assert trio.current_time() == pytest.approx(SLOT_S, abs=SLOT_S)
