"""Every message of the document's WebSocket, sent and received live, key by key, type by type."""

from typing import Any

import pytest

from ollamad.core.commands import SetDraining
from ollamad.core.presence import Beat, Presence, Usage
from tests.fakes import ws_server
from tests.fakes.api_services import NODE_1, NODE_2, NOW
from tests.fakes.document import differences, read_socket_examples
from tests.fakes.ws_client import SocketClient
from tests.fakes.ws_server import serving

quick = ws_server.quick

OF_CLIENT, OF_SERVER = read_socket_examples()


def test_the_document_was_read() -> None:
    assert list(OF_CLIENT) == ["Ping", "Subscribe to Channel", "Unsubscribe from Channel"]
    assert list(OF_SERVER) == [
        "Pong",
        "Real-time Metrics",
        "Cluster Status",
        "Model Events",
        "Node Events",
        "Alerts",
        "Subscription Acknowledgment",
    ]


async def test_the_messages_of_the_client_are_understood(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        await socket.send(OF_CLIENT["Ping"])
        assert await socket.receive() == OF_SERVER["Pong"]
        await socket.send(OF_CLIENT["Subscribe to Channel"])
        assert await socket.receive() == OF_SERVER["Subscription Acknowledgment"]
        await socket.send(OF_CLIENT["Unsubscribe from Channel"])
        ack = await socket.receive_type("subscription_ack")
        assert ack == OF_SERVER["Subscription Acknowledgment"] | {"status": "unsubscribed"}


@pytest.mark.parametrize("heading", list(OF_SERVER))
async def test_the_messages_of_the_server_match_the_document(quick: None, heading: str) -> None:
    example: dict[str, Any] = OF_SERVER[heading]
    async with serving() as server, await SocketClient.open(server.port) as socket:
        greeting = await socket.receive()
        assert differences(OF_SERVER["Cluster Status"], greeting) == []
        greeting = await socket.receive()
        assert differences(OF_SERVER["Real-time Metrics"], greeting) == []
        await socket.send({"type": "ping"})
        for channel in ("metrics", "cluster", "models", "nodes", "alerts"):
            await socket.send({"type": "subscribe", "channel": channel})
        cluster = server.world.cluster
        usage = Usage(memory=0.99, disk_free=10**12)
        cluster.presences[NODE_1] = Presence(True, NOW, Beat(NOW, usage))
        await cluster.propose(SetDraining(NODE_2, True))
        cluster.leader_id = NODE_2
        seen = 0
        while seen < (2 if example["type"] == "alert" else 1):  # raised, and cleared
            message = await socket.receive()
            server.world.clock.now += 5.0
            if message["type"] == example["type"]:
                assert differences(example, message) == []
                assert type(message.get("timestamp", 0)) is int
                seen += 1
            if example["type"] == "pong":
                await socket.send({"type": "ping"})
            if example["type"] == "model_event":
                cluster.state.models.clear()
                cluster.notify()
            if message["type"] == "alert":
                usage = Usage(memory=0.1, disk_free=10**12)
                cluster.presences[NODE_1] = Presence(True, NOW, Beat(NOW, usage))
