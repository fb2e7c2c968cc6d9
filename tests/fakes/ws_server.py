"""The API over fakes, on a port, with its WebSockets and what they are told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from ollamad.api import feed, hub
from ollamad.api.serve import open_listeners, serve_api
from tests.fakes.api_client import ApiClient
from tests.fakes.ws_client import SOON_S, Refused, SocketClient


class Server:
    """The API on a port, with its feed."""

    def __init__(self, client: ApiClient, port: int, shutdown: trio.Event) -> None:
        self.client = client
        self.world = client.world
        self.port = port
        self.shutdown = shutdown

    async def open(
        self, path: str = "/ws", role: str = "viewer", *, buffer: int = 0, **headers: str
    ) -> SocketClient:
        """A socket of that role, after its greetings."""
        token = self.client.token(role)
        socket = await SocketClient.open(
            self.port, path, buffer=buffer, Authorization=f"Bearer {token}", **headers
        )
        assert (await socket.receive())["type"] == "cluster_status"
        assert (await socket.receive())["type"] == "metrics"
        return socket

    async def refused(self, path: str = "/ws", **headers: str) -> Refused:
        with pytest.raises(Refused) as caught:
            await SocketClient.open(self.port, path, **headers)
        return caught.value


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Server]:
    client = ApiClient(**settings)
    sockets = await open_listeners(["127.0.0.1:0"])
    port = sockets[0].getsockname()[1]
    shutdown = trio.Event()
    with trio.fail_after(6 * SOON_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(client.app.api.hub.run)
            await nursery.start(client.app.feed.run)

            async def run(task_status: trio.TaskStatus[list[str]]) -> None:
                await serve_api(
                    client.app,
                    sockets,
                    shutdown,
                    websockets=client.app.websockets,
                    graceful_timeout_s=0.2,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel()

            await nursery.start(run)
            yield Server(client, port, shutdown)
            shutdown.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens every few seconds happens every few milliseconds."""
    monkeypatch.setattr(feed, "METRICS_INTERVAL_S", 0.02)
    monkeypatch.setattr(feed, "QUEUE_INTERVAL_S", 0.02)
    monkeypatch.setattr(feed, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(feed, "SETTLE_S", 0.0)
    monkeypatch.setattr(feed, "TRANSFERS_INTERVAL_S", 0.02)
    monkeypatch.setattr(hub, "TICK_S", 0.02)
