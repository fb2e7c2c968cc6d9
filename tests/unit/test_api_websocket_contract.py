"""Every message of the document's WebSocket, sent and received live, key by key, type by type."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import ollamad.api
from ollamad.api.app import ROUTES
from ollamad.api.openapi import document
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


# What the OpenAPI document says of the socket, held against what it does.

PROSE = document(ROUTES, {})["info"]["description"].partition("# WebSocket")[2]
OF_CODE = "".join(
    (Path(ollamad.api.__file__).parent / name).read_text() for name in ("feed.py", "websocket.py")
)


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    lines = PROSE[PROSE.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


SENT, HEARD = rows("| message | fields |\n"), rows("| message | fields | channels | when |")
CHANNELS = re.findall("`(\\w+)`", PROSE.partition("The channels are")[2].partition(".")[0])


def test_the_prose_names_the_messages_that_the_code_knows() -> None:
    told = {row[0].strip("`") for row in HEARD}
    assert told == set(re.findall(r'"type": "(\w+)"', OF_CODE))
    assert {row[0].strip("`") for row in SENT} == set(
        chain.from_iterable(
            re.findall(r'"(\w+)"', line) for line in re.findall(r"case (\"\w+\".*):", OF_CODE)
        )
    )
    assert {channel for row in HEARD for channel in re.findall(r"`(\w+)`", row[2])} == set(CHANNELS)
    codes = set(re.findall(r'_refuse\(\s*"(\w+)"', OF_CODE))
    [told_codes] = re.findall(r"whose `code` is (.*?), and", PROSE, flags=re.DOTALL)
    assert codes == set(re.split(r",\s|\sor\s", told_codes))


async def test_what_the_prose_lets_a_client_send_is_understood(quick: None) -> None:
    async with serving() as server, await server.open(role="admin") as socket:
        for name, fields in SENT:
            for channel in CHANNELS if fields == "channel" else [None]:
                kind = name.strip("`")
                about = {} if channel is None else {"channel": channel}
                await socket.send({"type": kind} | about)
                answer = await socket.receive_type("pong" if kind == "ping" else "subscription_ack")
                assert answer.get("channel") == channel
        await socket.send({"type": "hello"})
        assert (await socket.receive_type("error"))["code"] == "UNKNOWN_TYPE"


async def test_each_message_has_the_fields_of_the_prose(quick: None) -> None:
    """Every message that a test receives is held against the types that the prose is made of."""
    async with serving() as server, await server.open() as socket:
        for name in ("cluster_status", "metrics"):
            [row] = [row for row in HEARD if row[0] == f"`{name}`"]
            assert "on connect" in row[3]
        await socket.send({"type": "subscribe", "channel": "metrics"})
        server.world.clock.now += 5.0
        message = await socket.receive_type("metrics")
        [row] = [row for row in HEARD if row[0] == "`metrics`"]
        assert row[1] == "data {" + ", ".join(message["data"]) + "}, timestamp"
