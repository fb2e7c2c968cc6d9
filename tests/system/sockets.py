"""A WebSocket to a real node, by the package `websockets`: what it hears, with patience."""

import json
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.system.harness import WAIT_S, Node


class Listener:
    """A socket whose messages are kept, in a thread. Use as a context manager."""

    def __init__(self, node: Node, *channels: str, token: str | None = None) -> None:
        token = node.admin_token() if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._stack = ExitStack()
        self.socket: ClientConnection = self._stack.enter_context(
            connect(f"ws://{node.address}/ws", additional_headers=headers, proxy=None)
        )
        self.heard: list[Any] = []
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        for channel in channels:
            self.send(type="subscribe", channel=channel)
            self.wait("subscription_ack", channel=channel, status="subscribed")

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._thread.join(WAIT_S)

    def send(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def wait(self, kind: str, *, timeout_s: float = WAIT_S, **wanted: Any) -> Any:
        """The first message of a type, now or later, that has these values at its top level.

        Raises:
          AssertionError: none came in time; tells what did.
        """
        deadline = time.monotonic() + timeout_s
        looked = 0
        with self._more:
            while True:
                for message in self.heard[looked:]:
                    if message["type"] == kind and wanted.items() <= message.items():
                        return message
                looked = len(self.heard)
                if not self._more.wait(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"no {kind} with {wanted} among {self.heard}")

    def all(self, kind: str, **wanted: Any) -> list[Any]:
        """All messages of a type so far with these values."""
        with self._more:
            return [m for m in self.heard if m["type"] == kind and wanted.items() <= m.items()]

    def closed(self, timeout_s: float = WAIT_S) -> int | None:
        """Wait for the other side's close; its code."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it is still open"
        return self.socket.protocol.close_code

    def _listen(self) -> None:
        try:
            for text in self.socket:
                with self._more:
                    self.heard.append(json.loads(text))
                    self._more.notify_all()
        except ConnectionClosed:
            pass
