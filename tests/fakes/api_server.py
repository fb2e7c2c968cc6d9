"""The API over fakes on a port, and a client that speaks HTTP/1.1 piece by piece."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import trio

from ollamad.api.http import ConnectionLimits
from ollamad.api.serve import NO_LIMITS, open_listeners, serve_api
from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import World

SOON_S = 5.0  # what takes longer than this hangs


@dataclass
class Server:
    client: ApiClient
    port: int
    shutdown: trio.Event
    ended: trio.Event
    wires: list["Wire"] = field(default_factory=list)

    @property
    def world(self) -> World:
        return self.client.world

    async def all_done(self) -> None:
        """Wait until no request is in progress."""
        with trio.fail_after(SOON_S):
            while self.client.app.stats.snapshot().active:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)

    async def connect(self) -> "Wire":
        """A connection, which is closed at the end at the latest."""
        self.wires.append(Wire(await trio.open_tcp_stream("127.0.0.1", self.port)))
        return self.wires[-1]


class Wire:
    """One client connection, by h11."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.h11 = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> "Wire":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    async def send_head(self, method: str, path: str, **headers: str) -> None:
        shown = {"Host": "localhost"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = h11.Request(method=method, target=path, headers=list(shown.items()))
        await self.stream.send_all(self.h11.send(request) or b"")

    async def send_data(self, data: bytes) -> None:
        await self.stream.send_all(self.h11.send(h11.Data(data=data)) or b"")

    async def end(self) -> None:
        await self.stream.send_all(self.h11.send(h11.EndOfMessage()) or b"")

    async def event(self) -> Any:
        while True:
            event = self.h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.h11.receive_data(await self.stream.receive_some(65536))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = await self.event()
        assert isinstance(head, h11.Response), head
        body = b""
        while isinstance(event := await self.event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), event
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return head.status_code, headers, body

    async def post(self, path: str, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        headers = {"Content_Type": "application/json"} | headers
        await self.send_head("POST", path, Content_Length=str(len(data)), **headers)
        await self.send_data(data)
        await self.end()

    async def get(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        await self.send_head(method, path, **headers)
        await self.end()
        return await self.answer()


@asynccontextmanager
async def serving(
    graceful_timeout_s: float = 3.0,
    limits: ConnectionLimits = NO_LIMITS,
    host: str = "127.0.0.1",
) -> AsyncIterator[Server]:
    client = ApiClient()
    sockets = await open_listeners([f"{host}:0"])
    port = sockets[0].getsockname()[1]
    server = Server(client, port, trio.Event(), trio.Event())

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_api(
            client.app,
            sockets,
            server.shutdown,
            limits=limits,
            websockets=client.app.websockets,
            graceful_timeout_s=graceful_timeout_s,
            task_status=task_status,
        )
        server.ended.set()

    with trio.fail_after(4 * SOON_S):
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(run)
            assert urls == [f"http://{host}:{port}"]
            yield server
            for wire in server.wires:
                await trio.aclose_forcefully(wire.stream)
            server.shutdown.set()
