"""The doorman: limits on connections and handshakes, and that no error ever gets out."""

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ollamad.core.ids import NodeId
from ollamad.peers import doorman
from ollamad.peers.doorman import MAX_HANDSHAKES_PER_HOST, Doorman
from ollamad.peers.identity import make_ca
from ollamad.peers.tls import split_address
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.codec import MalformedMessage
from tests.fakes.tls_nodes import TlsNode, says, utc_now

CA = make_ca(utc_now())


class House:
    """A member behind a doorman; what it does with callers is up to the test."""

    def __init__(self, directory: Path) -> None:
        self.node = TlsNode(directory).enter(CA)
        self.doorman = Doorman(self.node.gate, self.serve)
        self.callers: list[tuple[NodeId | None, str]] = []
        self.error: Exception | None = None

    async def serve(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        self.callers.append((peer, host))
        data = await stream.receive_some(100)
        if self.error is not None:
            raise self.error
        await stream.send_all(data)

    async def open(self, nursery: trio.Nursery) -> str:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, self.doorman.accept, listeners)
        return f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "house")


@pytest.fixture
def caller(tmp_path: Path) -> TlsNode:
    return TlsNode(tmp_path / "caller").enter(CA)


async def idle(house: House) -> None:
    await wait_all_tasks_blocked(0.01)
    assert house.doorman._connections == 0
    assert not house.doorman._handshakes


async def test_members_and_strangers_are_handed_on(
    house: House, caller: TlsNode, nursery: trio.Nursery
) -> None:
    address = await house.open(nursery)
    assert await says(await caller.gate.dial(house.node.id, address))
    assert await says(await caller.gate.dial_stranger(address))
    assert house.callers == [(caller.id, "127.0.0.1"), (None, "127.0.0.1")]
    await idle(house)


@pytest.mark.parametrize(
    "error",
    [KeyError("bug"), OSError("x"), trio.ClosedResourceError(), MalformedMessage("x")],
)
async def test_no_error_of_a_connection_stops_the_others(
    house: House,
    caller: TlsNode,
    nursery: trio.Nursery,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    address = await house.open(nursery)
    house.error = error
    assert not await says(await caller.gate.dial(house.node.id, address))
    house.error = None
    assert await says(await caller.gate.dial(house.node.id, address))
    assert "a connection of 127.0.0.1" in caplog.text
    await idle(house)


async def test_who_left_is_sent_away(house: House, caller: TlsNode, nursery: trio.Nursery) -> None:
    address = await house.open(nursery)
    house.node.departed.add(caller.id)
    assert not await says(await caller.gate.dial(house.node.id, address))
    assert house.callers == []
    await idle(house)


async def test_connections_are_bounded(
    house: House, caller: TlsNode, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorman, "MAX_CONNECTIONS", 2)
    address = await house.open(nursery)
    streams = [await caller.gate.dial(house.node.id, address) for _ in range(2)]
    for _ in range(200):
        if house.doorman._connections == 2:
            break
        await trio.sleep(0.005)
    with pytest.raises(OSError):
        await caller.gate.dial(house.node.id, address)
    assert await says(streams.pop())
    await wait_all_tasks_blocked(0.01)
    assert await says(await caller.gate.dial(house.node.id, address))
    assert await says(streams.pop())
    await idle(house)


@pytest.mark.parametrize("per_host", [True, False])
async def test_the_oldest_silent_caller_gives_way(
    house: House,
    caller: TlsNode,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    per_host: bool,
) -> None:
    limit = 4
    monkeypatch.setattr(doorman, "MAX_HANDSHAKES_PER_HOST", limit if per_host else 1000)
    monkeypatch.setattr(doorman, "MAX_HANDSHAKES", 1000 if per_host else limit)
    address = await house.open(nursery)
    silent = [await trio.open_tcp_stream(*split_address(address)) for _ in range(limit)]
    for _ in range(200):
        if len(house.doorman._handshakes) == limit:
            break
        await trio.sleep(0.005)
    assert await says(await caller.gate.dial(house.node.id, address))
    with trio.fail_after(2):
        assert await silent[0].receive_some(1) == b""
    assert len(house.doorman._handshakes) == limit - 1
    for transport in silent:
        await trio.aclose_forcefully(transport)
    await idle(house)


@pytest.mark.parametrize("per_host", [True, False])
async def test_strangers_leave_room_for_members(
    house: House,
    caller: TlsNode,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    per_host: bool,
) -> None:
    limit = 3
    monkeypatch.setattr(doorman, "MAX_STRANGERS_PER_HOST", limit if per_host else 1000)
    monkeypatch.setattr(doorman, "MAX_STRANGERS", 1000 if per_host else limit)
    address = await house.open(nursery)
    strangers = [await caller.gate.dial_stranger(address) for _ in range(limit)]
    for _ in range(200):
        if len(house.callers) == limit:
            break
        await trio.sleep(0.005)
    assert not await says(await caller.gate.dial_stranger(address))
    assert "too many connections without a member's certificate" in caplog.text
    assert await says(await caller.gate.dial(house.node.id, address)), "members come in"
    assert await says(strangers.pop())
    assert await says(await caller.gate.dial_stranger(address)), "there is room again"
    for stream in strangers:
        await trio.aclose_forcefully(stream)
    await idle(house)
    assert not house.doorman._strangers


def test_one_host_cannot_fill_the_house() -> None:
    assert 2 * MAX_HANDSHAKES_PER_HOST < doorman.MAX_HANDSHAKES
    assert 2 * doorman.MAX_STRANGERS_PER_HOST < doorman.MAX_STRANGERS
    assert 2 * doorman.MAX_STRANGERS < doorman.MAX_CONNECTIONS
