"""What systemd is told, and how a service that cannot start keeps from hurrying."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ollamad import systemd
from ollamad.main import EXIT_HAS_LEFT


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        yield listener


def said(manager: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(manager.recv(4096).decode())
        except BlockingIOError:
            return messages


def environment(manager: socket.socket, **others: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **others}


@pytest.mark.parametrize(
    ("variables", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for another process
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_how_often_the_watchdog_is_fed(variables: dict[str, str], interval_s: float | None) -> None:
    assert systemd.watchdog_interval_s(variables) == interval_s


async def test_the_watchdog_is_fed_for_as_long_as_the_loop_turns(
    autojump_clock: MockClock, manager: socket.socket
) -> None:
    with trio.move_on_after(100):
        await systemd.feed_watchdog(environment(manager, WATCHDOG_USEC="20000000"))
    assert said(manager) == ["WATCHDOG=1"] * 10


async def test_without_a_watchdog_nothing_is_fed(manager: socket.socket) -> None:
    await systemd.feed_watchdog(environment(manager))
    assert said(manager) == []


async def test_a_status_is_told_when_it_changes(
    autojump_clock: MockClock, manager: socket.socket
) -> None:
    begun = trio.current_time()
    with trio.move_on_after(20):
        await systemd.keep_status(
            lambda: "early" if trio.current_time() - begun < 10 else "late", environment(manager)
        )
    assert said(manager) == ["STATUS=early", "STATUS=late"]


def test_each_failed_start_is_followed_by_a_longer_pause(
    manager: socket.socket, tmp_path: Path
) -> None:
    variables = environment(manager, INVOCATION_ID="1", RUNTIME_DIRECTORY=str(tmp_path))
    slept: list[float] = []
    for _ in range(9):
        systemd.pause_before_start(variables, slept.append)
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
    assert said(manager)[-1] == "STATUS=the last start failed; tried again in 60 s"
    systemd.forget_failures(variables)
    assert systemd.pause_before_start(variables, slept.append) == 0
    assert systemd.pause_before_start(variables, slept.append) == 1


async def test_a_daemon_that_was_ready_for_a_while_has_not_failed(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    variables = {"INVOCATION_ID": "1", "RUNTIME_DIRECTORY": str(tmp_path)}
    systemd.pause_before_start(variables, lambda _: None)
    with trio.move_on_after(systemd.STEADY_S / 2):
        await systemd.forget_failures_later(variables)
    assert systemd.pause_before_start(variables, lambda _: None) == 1, "ready, and then it died"
    await systemd.forget_failures_later(variables)
    assert systemd.pause_before_start(variables, lambda _: None) == 0


def test_who_stops_a_service_in_its_pause_does_not_wait_again(tmp_path: Path) -> None:
    variables = {"INVOCATION_ID": "1", "RUNTIME_DIRECTORY": str(tmp_path)}

    class Terminated(BaseException):
        """By SIGTERM."""

    def terminate(_: float) -> None:
        raise Terminated

    systemd.pause_before_start(variables, terminate)
    with pytest.raises(Terminated):
        systemd.pause_before_start(variables, terminate)
    assert systemd.pause_before_start(variables, terminate) == 0


def test_a_node_that_has_left_its_cluster_is_not_started_again_and_again() -> None:
    unit = (Path(__file__).parents[2] / "ollamad.service").read_text()
    assert f"\nRestartPreventExitStatus={EXIT_HAS_LEFT}\n" in unit


def test_outside_of_systemd_a_failure_is_told_at_once(tmp_path: Path) -> None:
    slept: list[float] = []
    for variables in ({}, {"RUNTIME_DIRECTORY": str(tmp_path)}, {"INVOCATION_ID": "1"}):
        assert systemd.pause_before_start(variables, slept.append) == 0
        assert systemd.pause_before_start(variables, slept.append) == 0
        systemd.forget_failures(variables)
    assert slept == []
    assert list(tmp_path.iterdir()) == []
