"""Processes that are told what to measure: one JSON object a line, one answer a line.

Knows nothing of consensus. A process that is told nothing more, because the other side is gone,
ends by itself.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMAND = bytes(200)  # about what a replicated command of a cluster has

Answer = dict[str, Any]


class Failed(Exception):
    """A process could not do what it was told; the message has its reason."""


class Remote:
    """One such process, seen from outside."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()  # it is ready

    def ask(self, task: str, **arguments: Any) -> Answer:
        """Have a task done.

        Raises:
          Failed: it said why not, or died.
        """
        self.tell(task, **arguments)
        return self.answer()

    def tell(self, task: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{self.process.args!r} is gone") from None

    def answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.process.args!r} ended with {self.process.wait()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def kill(self) -> None:
        kill(self.process)


def kill(process: "subprocess.Popen[Any]") -> None:
    """End a process with SIGKILL and wait for it; one that has ended already is fine."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(perform: Callable[..., Answer]) -> None:
    """Be such a process, with blocking calls: `perform(task, **arguments)`."""
    say({})
    for line in sys.stdin:
        try:
            say(perform(**json.loads(line)))
        except Exception as error:
            say({"error": repr(error)})


def say(answer: Answer) -> None:
    """Write one answer."""
    print(json.dumps(answer), flush=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
