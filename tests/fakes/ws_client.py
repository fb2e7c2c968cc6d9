"""A WebSocket client for tests on trio: the protocol of the package `websockets`, on a stream."""

import json
from types import TracebackType
from typing import Any

import trio
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from ollamad.api.messages import DESCRIBED
from tests.fakes.api_client import matches

SOON_S = 5.0  # what takes longer than this hangs


class Refused(Exception):
    """The server answered the handshake with an error."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.status = response.status_code
        self.headers = response.headers
        self.json = json.loads(response.body or b"{}")


class SocketClient:
    """One connection; use as a context manager. `receive` gives messages, pings are answered."""

    def __init__(self, stream: trio.SocketStream, port: int, path: str) -> None:
        self.stream = stream
        self.protocol = ClientProtocol(parse_uri(f"ws://localhost:{port}{path}"))
        self.response: Response | None = None
        self.is_strict = True  # messages must be as the OpenAPI document says
        self._events: list[Any] = []

    @classmethod
    async def open(
        cls, port: int, path: str = "/ws", *, buffer: int = 0, **headers: str
    ) -> "SocketClient":
        """Connect to this host. `buffer`: bytes that the kernel takes for who does not read.

        Raises:
          Refused: the handshake was answered with an error.
        """
        connection = trio.socket.socket()
        if buffer:
            connection.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, buffer)
        await connection.connect(("127.0.0.1", port))
        client = cls(trio.SocketStream(connection), port, path)
        request = client.protocol.connect()
        for name, value in headers.items():
            request.headers[name.replace("_", "-")] = value
        client.protocol.send_request(request)
        await client.flush()
        with trio.fail_after(SOON_S):
            event = await client.event()
        assert isinstance(event, Response)
        client.response = event
        if client.protocol.handshake_exc is not None:
            await client.stream.aclose()
            raise Refused(event)
        return client

    async def __aenter__(self) -> "SocketClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await trio.aclose_forcefully(self.stream)

    async def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                await self.stream.send_all(data)
            else:
                await self.stream.send_eof()

    async def event(self) -> Any:
        """The next frame, or the response to the handshake; None at the end."""
        while True:
            self._events += self.protocol.events_received()
            await self.flush()
            if self._events:
                return self._events.pop(0)
            if self.protocol.state is State.CLOSED:
                return None
            data = await self.stream.receive_some(65536)
            if data:
                self.protocol.receive_data(bytes(data))
            else:
                self.protocol.receive_eof()

    async def send(self, message: Any) -> None:
        """Send JSON, or text as it is."""
        text = message if isinstance(message, str) else json.dumps(message)
        self.protocol.send_text(text.encode())
        await self.flush()

    async def receive(self, timeout_s: float = SOON_S) -> Any:
        """The next message.

        Raises:
          EOFError: the connection was closed; tells the code.
        """
        with trio.fail_after(timeout_s):
            while True:
                event = await self.event()
                if event is None:
                    raise EOFError(self.protocol.close_code)
                if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    message = json.loads(event.data)
                    if self.is_strict:
                        matches(message, *DESCRIBED)
                    return message

    async def receive_type(self, kind: str, **wanted: Any) -> Any:
        """The next message of a type, and with these values; others are passed over."""
        with trio.fail_after(SOON_S):
            while True:
                message = await self.receive()
                if message["type"] == kind and wanted.items() <= message.items():
                    return message

    async def closed(self) -> int | None:
        """Wait for the close, whatever comes before it; its code."""
        with trio.fail_after(SOON_S):
            while await self.event() is not None:
                pass
        return self.protocol.close_code

    async def subscribe(self, *channels: str) -> None:
        """Subscribe, and wait for the acknowledgements."""
        for channel in channels:
            await self.send({"type": "subscribe", "channel": channel})
            ack = await self.receive_type("subscription_ack")
            assert (ack["channel"], ack["status"]) == (channel, "subscribed")
