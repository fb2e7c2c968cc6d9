"""Fixtures for tests of `ollama-dist`: a fake API, and the program run against it.

A test module takes them as `cli, fake_api, home = cli_fixtures.cli, ...`.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ollama_dist.main import app
from tests.fakes.fake_api import FakeApi

WAIT_S = 30.0  # for a process on a busy machine

# Makes the terminal on stdin the controlling one, so that Ctrl-C becomes a signal.
_IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ollama_dist.main import main
main()
"""
_PROGRAM = "from ollama_dist.main import main; main()"


@pytest.fixture
def fake_api() -> Iterator[FakeApi]:
    """A daemon's API on a port of its own."""
    with FakeApi() as api:
        yield api


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no settings from outside."""
    for name in (
        "OLLAMA_DIST_TOKEN",
        "OLLAMA_HOST",
        "OLLAMAD_DATA_DIR",
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OLLAMA_DIST_DEBUG", "1")
    # Nothing listens at port 1: a test that forgets its fake talks to nobody.
    monkeypatch.setenv("OLLAMA_DIST_HOST", "http://127.0.0.1:1")
    return tmp_path


class Cli:
    """Runs `ollama-dist` in this process, against one host."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.app = app
        self.app = app
        self.runner = CliRunner()

    def __call__(self, *arguments: str, stdin: str | None = None) -> Result:
        """Run it with `--host` in front."""
        return self.bare("--host", self.url, *arguments, stdin=stdin)

    def bare(self, *arguments: str, stdin: str | None = None) -> Result:
        """Run it with just these arguments."""
        return self.runner.invoke(self.app, arguments, input=stdin)


@pytest.fixture
def cli(fake_api: FakeApi, home: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The program in this process, with nothing to wait for."""
    monkeypatch.setattr("ollama_dist.progress.pause", lambda seconds: None)
    return Cli(fake_api.url)


def ok(result: Result) -> str:
    """What a command that worked wrote to stdout."""
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    return result.stdout


def lines_with(text: str, *words: str) -> list[str]:
    """The lines that have all these words."""
    return [line for line in text.splitlines() if all(word in line for word in words)]


def start_piped(*arguments: str, **popen: Any) -> subprocess.Popen[str]:
    """Start the program as a process with pipes, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **popen,
    )


class Terminal:
    """The program on a pseudo terminal of 80 columns. Leaving the block ends it."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        self.seen = ""
        self._read_to = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"},
        )
        os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._master, text.encode())

    def expect(self, text: str) -> None:
        """Wait until `text` appears behind what was expected before."""
        deadline = time.monotonic() + WAIT_S
        while (found := self.seen.find(text, self._read_to)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"no {text!r} in {self.seen[self._read_to :]!r}")
        self._read_to = found + len(text)

    def interrupt(self) -> None:
        """Press Ctrl-C at the prompt, once the program waits for a key.

        Python's line editing sleeps through a signal that comes between its prompt and its
        wait; only a program is quick enough to hit those microseconds.
        """
        stat = Path(f"/proc/{self._process.pid}/stat")
        deadline = time.monotonic() + WAIT_S
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.type("\x03")

    def exit_code(self) -> int:
        """Wait for the end."""
        deadline = time.monotonic() + WAIT_S
        while self._read(deadline):
            pass
        return self._process.wait(WAIT_S)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
        data = b""
        # A terminal whose program has gone gives EIO.
        with contextlib.suppress(OSError):
            data = os.read(self._master, 65536) if ready else b""
        self.seen += data.decode(errors="replace")
        return bool(data)
