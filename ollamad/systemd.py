"""The daemon under systemd: says how it is, feeds the watchdog, and is in no hurry to fail again.

The protocol is sd_notify: one datagram for each message, no library.
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import trio

STATUS_INTERVAL_S = 2.0  # between two looks at the status text
FIRST_PAUSE_S = 1.0  # after a start that failed; doubled each time up to
LONGEST_PAUSE_S = 60.0
STEADY_S = 300.0  # ready for so long, a start has not failed, whatever comes then
_WAIT = threading.Event().wait  # there is no event loop yet
FAILED_STARTS = "failed-starts"  # a file in the unit's runtime directory, kept over restarts


def notify(message: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send `READY=1` and the like; False where no service manager listens."""
    address = environment.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A manager that does not read must not hold the event loop up.
            sender.sendto(message.encode(), socket.MSG_DONTWAIT, address)
    except OSError:
        return False
    return True


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there goes to systemd's journal.

    The variable alone does not say so: children have it too, with their outputs elsewhere.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def watchdog_interval_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """How often the watchdog is to be fed: half of what the unit allows; None without one."""
    try:
        allowed_us = int(environment["WATCHDOG_USEC"])
        is_ours = int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except (KeyError, ValueError):
        return None
    return allowed_us / 2e6 if is_ours and allowed_us > 0 else None


async def feed_watchdog(environment: Mapping[str, str] = os.environ) -> None:
    """Tell systemd that the event loop turns, until cancelled; nothing where nobody asks.

    A task of the loop, not a thread: a thread would go on while the loop stands still.
    """
    interval_s = watchdog_interval_s(environment)
    while interval_s is not None:
        notify("WATCHDOG=1", environment)
        await trio.sleep(interval_s)


async def keep_status(
    status: Callable[[], str], environment: Mapping[str, str] = os.environ
) -> None:
    """Show what `status` says in `systemctl status`, whenever it says something else."""
    shown = None
    while environment.get("NOTIFY_SOCKET"):
        if (text := status()) != shown:
            shown = text
            notify(f"STATUS={text}", environment)
        await trio.sleep(STATUS_INTERVAL_S)


def pause_before_start(
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], object] = _WAIT,
) -> float:
    """Wait if the starts before this one have failed, longer each time, under systemd only.

    systemd starts the daemon again after `RestartSec`, always the same. (`RestartSteps` would do
    this, but systemd has it since version 254 only.) Each start counts as failed until
    `forget_failures`, so that it does not matter what ended it: an error, a signal, the watchdog.
    SIGTERM ends the pause and the process.

    Returns:
      Seconds that it waited.
    """
    try:
        file = _failed_starts(environment)
        failed = 0
        with suppress(OSError, ValueError):
            failed = int(file.read_text())
        # Whoever stops a service in its pause does not wait at the next start.
        file.unlink(missing_ok=True)
        pause_s = 0.0
        if failed > 0:
            pause_s = min(FIRST_PAUSE_S * 2 ** min(failed - 1, 16), LONGEST_PAUSE_S)
            notify(f"STATUS=the last start failed; tried again in {pause_s:.0f} s", environment)
            sleep(pause_s)
        file.write_text(str(failed + 1))
    except (OSError, KeyError):
        return 0.0
    return pause_s


def forget_failures(environment: Mapping[str, str] = os.environ) -> None:
    """What was started works, or has ended well: the next failure is a first one again."""
    with suppress(OSError, KeyError):
        _failed_starts(environment).unlink(missing_ok=True)


async def forget_failures_later(environment: Mapping[str, str] = os.environ) -> None:
    """The same, once a daemon that is ready has shown that it lives on; until cancelled."""
    await trio.sleep(STEADY_S)
    forget_failures(environment)


def _failed_starts(environment: Mapping[str, str]) -> Path:
    if not environment.get("INVOCATION_ID"):
        raise KeyError("not started by systemd")
    return Path(environment["RUNTIME_DIRECTORY"]) / FAILED_STARTS
