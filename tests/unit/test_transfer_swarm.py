"""A swarm on ideal links in virtual time: how near to the limit, whatever machine plays it.

Each node has a link that carries so many bytes a second each way. One node has a file; the limit
for all to have it is size over rate, since each byte has to leave the source once and to reach
each node once. Everything is as in a file of 256 MiB on links of 100 Mbit/s, with bytes that are
256 times as large.
"""

import random
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB
from ollamad.core.spread import CLAIM_BYTES
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.server import PieceServer
from ollamad.wire import pieces
from ollamad.wire.lane import BLOCK_SIZE, BLOCK_TAG
from tests.fakes.piece_nodes import Corrupt, MemoryStore, Missing, Network, Rotten, Unmapped

SCALE = 256
PIECE = MIB // SCALE
RATE = 12.5e6 / SCALE  # bytes/s
GOAL = 1.1  # times the limit; 1.15 is wanted, with TCP's headers


class Direction:
    """One direction of a link: messages pass one after the other."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def carry(self, size: int) -> None:
        begin = max(self._free_at, trio.current_time())
        self._free_at = begin + size / RATE
        await trio.sleep_until(self._free_at)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollamad.core.pieces.MIN_PIECE_SIZE", PIECE)
    monkeypatch.setattr("ollamad.core.spread.CLAIM_BYTES", CLAIM_BYTES // SCALE)
    monkeypatch.setattr("tests.fakes.memory_lanes.BLOCK_SIZE", BLOCK_SIZE // SCALE)


async def spread(network: Network, nodes: int, count: int) -> tuple[float, float]:
    """Times the limit that it took, and times the file that left the source."""
    names = [NodeId(f"n{number}") for number in range(nodes + 1)]
    stores = {name: MemoryStore() for name in names}
    servers = {}
    layer = stores[names[0]].add(random.Random(1).randbytes(count * PIECE))
    for name in names:
        up = Direction()
        network.lanes.downlinks[name] = Direction().carry

        async def send(message: bytes, up: Direction = up) -> bytes:
            if message[0] == BLOCK_TAG:
                await up.carry(len(message))
            return message

        network.hooks[name] = send
        servers[name] = PieceServer(
            stores[name], network.lanes_of(name), missing=Missing, unmapped=Unmapped
        )
        network.handle(name, pieces.METHOD, servers[name].handle)

    async def fetch(name: NodeId) -> None:
        fetcher = Fetcher(
            network.peers_of(name),
            network.lanes_of(name),
            stores[name],
            corrupt=Corrupt,
            rotten=Rotten,
        )
        others = [other for other in names if other != name]
        await fetcher.fetch_blob(layer, lambda: others, lambda progress: None)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name in names[1:]:
            nursery.start_soon(fetch, name)
    elapsed = trio.current_time() - began
    for name in names[1:]:
        assert layer.digest in stores[name].blobs
    return elapsed / (layer.size / RATE), servers[names[0]].bytes_sent / layer.size


@pytest.mark.parametrize("nodes", [1, 4, 8, 16])
async def test_a_swarm_takes_about_as_long_as_one_node(
    network: Network, autojump_clock: trio.testing.MockClock, nodes: int
) -> None:
    ratio, left = await spread(network, nodes, 256)
    print(f"{nodes} nodes: {ratio:.2f} times the limit, {left:.2f} times the file left the source")
    assert ratio <= GOAL
    assert left < 1.1
