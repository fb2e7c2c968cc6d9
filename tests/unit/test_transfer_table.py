"""The table behind GET /transfers: speed, eta, history, ids."""

import pytest

from ollamad.core.ids import NodeId
from ollamad.transfer.transfers import (
    MAX_ERROR,
    MAX_FINISHED,
    SPEED_WINDOW_S,
    Transfer,
    TransferTable,
)

NODE = NodeId("QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def steady(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000 + self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> TransferTable:
    return TransferTable(NODE, "k3x", wall=clock.wall, steady=clock.steady)


def view(table: TransferTable, id_: str) -> Transfer:
    found = table.get(id_)
    assert found is not None
    return found


def test_long_errors_are_cut(table: TransferTable) -> None:
    id_ = table.begin("llama2", "download")
    table.fail(id_, "x" * 100_000)
    assert len(view(table, id_).error) == MAX_ERROR


def test_a_transfer_from_beginning_to_end(table: TransferTable, clock: Clock) -> None:
    id_ = table.begin("llama2", "replication", bytes_total=1000)
    assert id_ == "QmYwAPJzv5CZ-k3x-1"
    first = view(table, id_)
    assert (first.status, first.progress, first.speed, first.eta) == ("pending", 0.0, 0.0, None)
    assert (first.model_name, first.type, first.node_id) == ("llama2", "replication", NODE)
    assert first.started_at == 1_700_000_100

    table.update(id_, bytes_done=0, peer_id="QmPeer")
    clock.now += 2
    table.update(id_, bytes_done=400)
    middle = view(table, id_)
    assert (middle.status, middle.progress, middle.peer_id) == ("active", 40.0, "QmPeer")
    assert (middle.speed, middle.eta) == (200.0, 3.0)

    clock.now += 2
    table.update(id_, bytes_done=1000, layers=(("sha256:a", 900), ("sha256:b", 100)))
    assert view(table, id_).layers == (("sha256:a", 900), ("sha256:b", 100))
    assert [transfer.layers for transfer in table.list()] == [()]
    table.complete(id_)
    last = view(table, id_)
    assert (last.status, last.progress, last.eta) == ("completed", 100.0, 0.0)
    assert (last.speed, last.finished_at) == (250.0, 1_700_000_104)


def test_speed_is_that_of_the_last_seconds(table: TransferTable, clock: Clock) -> None:
    id_ = table.begin("m", "download", bytes_total=10_000_000)
    done = 0
    table.update(id_, bytes_done=0)
    for step in range(200):  # 1000 bytes/s for ten seconds, then 100
        clock.now += 0.1
        done += 100 if step < 100 else 10
        table.update(id_, bytes_done=done)
        if step == 99:
            assert view(table, id_).speed == pytest.approx(1000, rel=0.01)
    assert view(table, id_).speed == pytest.approx(100, rel=0.01)


def test_a_stalled_transfer_slows_down_to_nothing(table: TransferTable, clock: Clock) -> None:
    id_ = table.begin("m", "download", bytes_total=1000)
    table.update(id_, bytes_done=0)
    clock.now += 1
    table.update(id_, bytes_done=500)
    clock.now += SPEED_WINDOW_S
    assert view(table, id_).speed == 0
    assert view(table, id_).eta is None


def test_bytes_of_an_earlier_run_are_progress_but_not_speed(
    table: TransferTable, clock: Clock
) -> None:
    id_ = table.begin("m", "download", bytes_total=1000)
    table.update(id_, bytes_done=900)
    clock.now += 1
    table.update(id_, bytes_done=950)
    assert (view(table, id_).progress, view(table, id_).speed) == (95.0, 50.0)
    clock.now += 1
    table.complete(id_)
    assert view(table, id_).speed == 25.0


def test_speed_counts_what_came_and_progress_what_is_verified(
    table: TransferTable, clock: Clock
) -> None:
    id_ = table.begin("m", "replication", bytes_total=1000)
    table.update(id_, bytes_done=0, received=0)
    clock.now += 1
    table.update(id_, bytes_done=0, received=400)
    assert (view(table, id_).progress, view(table, id_).speed) == (0.0, 400.0)


def test_a_total_may_be_unknown(table: TransferTable, clock: Clock) -> None:
    id_ = table.begin("m", "download")
    table.update(id_, bytes_done=0)
    clock.now += 1
    table.update(id_, bytes_done=500)
    assert (view(table, id_).progress, view(table, id_).eta) == (0.0, None)
    table.update(id_, bytes_done=500, bytes_total=2000)
    assert (view(table, id_).progress, view(table, id_).eta) == (25.0, 3.0)


def test_a_failure_keeps_its_reason_and_nothing_moves_it_again(table: TransferTable) -> None:
    id_ = table.begin("m", "download", bytes_total=10)
    table.update(id_, bytes_done=4)
    table.fail(id_, "the disk is full")
    table.update(id_, bytes_done=9)
    table.complete(id_)
    table.cancelled(id_)
    ended = view(table, id_)
    assert (ended.status, ended.error, ended.bytes_done) == ("failed", "the disk is full", 4)


def test_cancelling_calls_whoever_runs_it_once(table: TransferTable) -> None:
    calls: list[str] = []
    id_ = table.begin("m", "download", cancel=lambda: calls.append("cancel"))
    assert table.request_cancel(id_)
    table.cancelled(id_)
    assert not table.request_cancel(id_)
    assert (calls, view(table, id_).status) == (["cancel"], "cancelled")
    with pytest.raises(KeyError):
        table.request_cancel("no such id")


def test_history_is_bounded_and_running_transfers_are_never_forgotten(
    table: TransferTable,
) -> None:
    running = table.begin("running", "download")
    for number in range(MAX_FINISHED + 10):
        table.complete(table.begin(f"m{number}", "download"))
    listed = table.list()
    assert len(listed) == MAX_FINISHED + 1
    assert listed[0].model_name == f"m{MAX_FINISHED + 9}"
    assert listed[-1].id == running
    assert table.get("QmYwAPJzv5CZ-k3x-2") is None


def test_changes_are_told_but_not_each_block(clock: Clock) -> None:
    told: list[tuple[str, int]] = []
    table = TransferTable(
        NODE,
        "r",
        wall=clock.wall,
        steady=clock.steady,
        on_change=lambda transfer: told.append((transfer.status, transfer.bytes_done)),
    )
    id_ = table.begin("m", "download", bytes_total=100)
    for done in range(100):
        clock.now += 0.01
        table.update(id_, bytes_done=done)
    table.complete(id_)
    assert told == [
        ("pending", 0),
        ("active", 0),
        ("active", 25),
        ("active", 50),
        ("active", 75),
        ("completed", 100),
    ]
