"""Whole transfers over real sockets, threads and disks, with and without encryption."""

import datetime
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB
from ollamad.core.state import Layer
from ollamad.peers.identity import Identity, issue_certificate, make_ca
from ollamad.store.errors import DigestMismatch
from ollamad.store.models import ModelStore
from tests.system.harness import free_ports
from tests.system.swarm_node import SwarmNode, write_config

CONTENT = random.Random(11).randbytes(10 * MIB + 4321)


class Nodes:
    """Nodes in this process; the first has the file."""

    def __init__(self, nodes: Sequence[SwarmNode], layer: Layer) -> None:
        self.nodes = nodes
        self.layer = layer

    def __getitem__(self, number: int) -> SwarmNode:
        return self.nodes[number]

    def content(self, number: int) -> bytes:
        return self.nodes[number].store.blob_path(self.layer.digest).read_bytes()


MakeNodes = Callable[..., Awaitable[Nodes]]


@pytest.fixture
async def make_nodes(tmp_path: Path) -> AsyncIterator[MakeNodes]:
    async with trio.open_nursery() as nursery:

        async def make(
            plain: Sequence[bool], rate: float | None = None, upload: float | None = None
        ) -> Nodes:
            now = datetime.datetime.now(datetime.UTC)
            ca, addresses = make_ca(now), dict[NodeId, str]()
            for number, port in enumerate(free_ports(len(plain))):
                identity = Identity.load_or_create(tmp_path / str(number))
                pem = issue_certificate(ca, identity.public_key, now)
                identity.install(pem, ca.certificate_pem)
                addresses[identity.node_id] = f"127.0.0.1:{port}"
            store = ModelStore(tmp_path / "0" / "models", keep_free_bytes=0)
            await store.prepare()
            digest, pieces = await store.put_bytes(CONTENT)
            nodes = []
            for number, node_id in enumerate(addresses):
                write_config(
                    tmp_path / str(number),
                    id=node_id,
                    listen=addresses[node_id],
                    addresses=addresses,
                    plain=plain[number],
                    rate=rate,
                    upload=upload,
                )
                nodes.append(SwarmNode(tmp_path / str(number)))
                await nursery.start(nodes[-1].run)
            layer = Layer("m", digest, pieces.size, pieces.piece_size, pieces.root())
            return Nodes(nodes, layer)

        yield make
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "encrypted"])
async def test_a_file_spreads_to_several(make_nodes: MakeNodes, plain: bool) -> None:
    nodes = await make_nodes([plain] * 4, 4e6)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for node in nodes.nodes[1:]:
                nursery.start_soon(node.fetch, nodes.layer)
    for number in range(1, 4):
        assert nodes.content(number) == CONTENT
    assert sum(node.server.bytes_sent for node in nodes.nodes[1:]) > 0


async def test_lanes_are_encrypted_unless_both_sides_want_otherwise(
    make_nodes: MakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = await make_nodes([True, False, True])
    modes: list[bool] = []
    for node in nodes.nodes[1:]:
        dial = node.lanes.dial

        async def noting(*arguments: object, plain: bool, dial: object = dial) -> object:
            modes.append(plain)
            return await dial(*arguments, plain=plain)  # type: ignore[operator]

        monkeypatch.setattr(node.lanes, "dial", noting)
    with trio.fail_after(60):
        await nodes[1].fetch(nodes.layer)
        assert modes == [False]
        await nodes[2].fetch(nodes.layer)
    assert modes[1:].count(True) == 1  # with the first; with the second it is encrypted
    assert nodes.content(1) == nodes.content(2) == CONTENT


@pytest.mark.parametrize("side", ["rate", "upload"])
async def test_a_limit_of_either_side_is_kept(make_nodes: MakeNodes, side: str) -> None:
    rate = 8e6
    nodes = await make_nodes([False, False], **{side: rate})
    began = time.monotonic()
    with trio.fail_after(60):
        await nodes[1].fetch(nodes.layer)
    assert time.monotonic() - began > 0.8 * len(CONTENT) / rate
    assert nodes.content(1) == CONTENT


async def test_a_blob_comes_on_while_its_origin_is_still_getting_it(
    make_nodes: MakeNodes,
) -> None:
    """The map grows with it; who has the pieces already passes them on."""
    nodes = await make_nodes([False, False, False])
    layer = nodes.layer
    await nodes[0].store.remove_blob(layer.digest)
    unknown = Layer(layer.media_type, layer.digest, layer.size, layer.piece_size, "")
    growing = await nodes[0].store.open_growing(layer.digest, layer.size)
    verified = [0, 0, 0]

    async def fetch(number: int) -> None:
        others = [node.config.id for node in nodes.nodes if node is not nodes[number]]

        def note(progress: object) -> None:
            verified[number] = progress.verified  # type: ignore[attr-defined]

        await nodes[number].fetcher.fetch_blob(
            unknown, lambda: others, note, authority=nodes[0].config.id
        )

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, 1)
            nursery.start_soon(fetch, 2)
            for index in range(len(growing.have)):
                begin = index * MIB
                await growing.write_piece(index, CONTENT[begin : begin + MIB])
                while min(verified[1:]) < min(begin, 3 * MIB):  # noqa: ASYNC110 - real threads
                    await trio.sleep(0.01)
            assert not await nodes[0].store.has_blob(layer.digest)
            await growing.finish()
    assert [nodes.content(number) == CONTENT for number in range(3)] == [True] * 3


async def test_a_lie_of_the_origin_is_found_out_and_nothing_of_it_stays(
    make_nodes: MakeNodes,
) -> None:
    nodes = await make_nodes([False, False])
    layer = nodes.layer
    await nodes[0].store.remove_blob(layer.digest)
    unknown = Layer(layer.media_type, layer.digest, layer.size, layer.piece_size, "")
    growing = await nodes[0].store.open_growing(layer.digest, layer.size)
    for index in range(len(growing.have)):
        begin = index * MIB
        await growing.write_piece(index, b"x" + CONTENT[begin + 1 : begin + MIB])
    with trio.fail_after(60), pytest.raises(DigestMismatch):
        await nodes[1].fetcher.fetch_blob(
            unknown,
            lambda: [nodes[0].config.id],
            lambda progress: None,
            authority=nodes[0].config.id,
        )
    assert not await nodes[1].store.has_blob(layer.digest)
    assert await nodes[1].store.partials() == []
