"""What changes in a daemon that runs, and what waits for a restart."""

import logging
import os
import signal
import socket
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from ollamad import start
from ollamad.reload import Reloader
from ollamad.settings import ConfigError, Settings, walk


class Reading:
    """Settings that are read again, and those that were applied."""

    def __init__(self) -> None:
        self.now = Settings()
        self.error: Exception | None = None
        self.applied: list[Settings] = []
        self.reloader = Reloader(self.now, self._read, self.applied.append)

    def change(self, key: str, value: object) -> None:
        section, _, name = key.partition(".")
        part = msgspec.structs.replace(getattr(self.now, section), **{name: value})
        self.now = msgspec.structs.replace(self.now, **{section: part})

    def _read(self) -> Settings:
        if self.error is not None:
            raise self.error
        return self.now


@pytest.fixture
def reading(caplog: pytest.LogCaptureFixture) -> Reading:
    caplog.set_level(logging.INFO)
    return Reading()


def test_what_can_change_changes_and_is_told(
    reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    reading.change("rate_limits.general", 7)
    reading.change("log.level", "debug")
    reading.reloader.reload()
    assert reading.applied == [reading.now]
    assert sorted(caplog.messages) == [
        "log.level is debug now, after info",
        "rate_limits.general is 7 now, after 100",
    ]


def test_what_needs_a_restart_stays_and_holds_nothing_else_up(
    reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    reading.change("api.listen", "127.0.0.1:1")
    reading.change("models.replicas", 3)
    reading.reloader.reload()
    (applied,) = reading.applied
    assert applied.models.replicas == 3
    assert applied.api.listen == Settings().api.listen
    assert "api.listen has changed, which needs a restart: it stays as it was" in caplog.messages
    caplog.clear()
    reading.reloader.reload()  # it is still not what the daemon was started with
    assert caplog.messages == ["api.listen has changed, which needs a restart: it stays as it was"]


@pytest.mark.parametrize(
    "error",
    [ConfigError("config.yaml:3: there is no setting 'x'"), PermissionError("config.yaml: denied")],
)
def test_settings_that_cannot_be_read_change_nothing(
    reading: Reading, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    reading.error = error
    reading.reloader.reload()
    assert reading.applied == []
    assert caplog.messages == [f"the settings stay as they are: {error}"]


def test_nothing_changed_is_said_too(reading: Reading, caplog: pytest.LogCaptureFixture) -> None:
    reading.reloader.reload()
    assert caplog.messages == ["the settings were read again; nothing in the files has changed"]


async def test_a_reload_tells_systemd_that_it_is_over_but_not_that_a_start_is(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_active = False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start._watch_hangups, reading.reloader, lambda: is_active)
            for is_active in (False, True):
                await trio.testing.wait_all_tasks_blocked()
                os.kill(os.getpid(), signal.SIGHUP)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert len(reading.applied) == 1 + is_active
                if not is_active:
                    with pytest.raises(BlockingIOError):
                        manager.recv(4096)
            assert manager.recv(4096).startswith(b"RELOADING=1")
            assert manager.recv(4096) == b"READY=1"
            nursery.cancel_scope.cancel()


def test_no_secret_is_told() -> None:
    from ollamad.reload import RELOADABLE
    from ollamad.settings import SECRETS

    assert not [key for key, _ in walk(Settings()) if key in SECRETS and key.startswith(RELOADABLE)]
