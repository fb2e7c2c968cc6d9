"""From the command line to a running daemon and back: the directory, the clock, signals, exits.

Whatever ends a daemon and is to be expected becomes one line and an exit code.
"""

import datetime
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from ollamad import logs, systemd
from ollamad.admission import Invitation, choose_identity, forget_cluster, parse_invitation
from ollamad.api.serve import CannotListen
from ollamad.api.services import ServiceError
from ollamad.daemon import Daemon
from ollamad.datadir import DataDir, DataDirError, check_owner
from ollamad.errors import HasLeft, StartError
from ollamad.peers.identity import IdentityError
from ollamad.raft.errors import RaftError
from ollamad.reload import Reloader
from ollamad.settings import Settings, is_root
from ollamad.store.errors import StoreError

log = logging.getLogger(__name__)

EXPECTED = (StartError, CannotListen, RaftError, StoreError, ServiceError)


def run(
    settings: Settings, data_dir: Path, join: str | None, reread: Callable[[], Settings]
) -> None:
    """Run a daemon until it is told to stop.

    Args:
      reread: gives the settings anew, for SIGHUP; raises ConfigError.

    Raises:
      HasLeft: this node was taken out of its cluster, and is to join none.
      StartError: it cannot start, or had to give up.
    """
    logs.set_up(settings.log.level, settings.log.format, to_journal=systemd.is_journal(sys.stderr))
    os.umask(0o077)  # the journal holds the cluster's keys
    # A shell's soft limit (1024) is soon used up by clients, and then no peer gets in either.
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    invitation = parse_invitation(join) if join else None
    if is_root():  # others may share the directory by their group, or cannot write there anyway
        check_owner(data_dir)
    try:
        with DataDir(data_dir) as directory:
            directory.check_whole()
            trio.run(partial(_run, settings, directory, invitation, reread))
    except HasLeft:
        raise
    except (DataDirError, IdentityError, *EXPECTED) as error:
        raise StartError(str(error)) from None
    except BaseExceptionGroup as group:
        _explain(group)


async def _run(
    settings: Settings,
    directory: DataDir,
    invitation: Invitation | None,
    reread: Callable[[], Settings],
) -> None:
    identity = await choose_identity(settings, directory, invitation)
    if identity.is_member:
        identity.check_validity(datetime.datetime.now(datetime.UTC))
    daemon = await Daemon.build(settings, directory, identity)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, daemon.stop)
        reloader = Reloader(settings, reread, daemon.reconfigure)
        nursery.start_soon(_watch_hangups, reloader, lambda: daemon.is_active)
        await daemon.run(invitation)
        nursery.cancel_scope.cancel()
    if daemon.departed:
        # First: the identity that is moved last keeps it from counting before all is aside.
        directory.departed.touch()
        forget_cluster(directory)


async def _watch_signals(stop: Callable[[], None]) -> None:
    """SIGTERM and Ctrl-C stop in order; the second one at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            stop()
            break
        async for _ in signals:
            os._exit(1)  # whoever asks twice does not want to wait for anything


async def _watch_hangups(reloader: Reloader, is_active: Callable[[], bool]) -> None:
    """SIGHUP reads the settings again."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            if not is_active():  # READY=1 would say that it has started
                reloader.reload()
                continue
            systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            reloader.reload()
            systemd.notify("READY=1")


def _explain(group: BaseExceptionGroup[BaseException]) -> None:
    """Turn what ended the daemon into one line, if it is something expected."""
    expected = group.subgroup(EXPECTED)
    rest = group.split(EXPECTED)[1]
    if expected is None or rest is not None:
        raise group
    error: BaseException = expected
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise StartError(str(error)) from None
