"""Fetching between two real stores: what is on the disks in the end."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB, PieceMap
from ollamad.core.state import Layer
from ollamad.store.errors import (
    BlobMissing,
    DigestMismatch,
    PieceCorrupt,
    PieceMapMissing,
    PiecesRotten,
    StoreFull,
)
from ollamad.store.models import ModelStore
from ollamad.transfer import server
from ollamad.transfer.fetch import Fetcher, FetchFailed, FetchProgress
from ollamad.transfer.server import PieceServer
from ollamad.wire import pieces
from tests.fakes.piece_nodes import Network

A, B, HERE = NodeId("A"), NodeId("B"), NodeId("here")
PIECES = 9
CONTENT = random.Random(3).randbytes(PIECES * MIB - 77)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(nursery)
        nursery.cancel_scope.cancel()


async def open_store(path: Path) -> ModelStore:
    store = ModelStore(path, keep_free_bytes=0)
    await store.prepare()
    return store


def server_of(network: Network, name: NodeId, store: ModelStore) -> PieceServer:
    """A node's server, which the others reach."""
    server = PieceServer(
        store, network.lanes_of(name), missing=BlobMissing, unmapped=PieceMapMissing
    )
    network.handle(name, pieces.METHOD, server.handle)
    return server


async def holder(network: Network, path: Path, name: NodeId) -> tuple[ModelStore, Layer]:
    """A node that has the blob and serves it."""
    store = await open_store(path / name)
    digest, piece_map = await store.put_bytes(CONTENT)
    server_of(network, name, store)
    layer = Layer("model", digest, piece_map.size, piece_map.piece_size, piece_map.root())
    return store, layer


def fetcher_of(network: Network, store: ModelStore) -> Fetcher:
    randrange = random.Random(1).randrange
    return Fetcher(
        network.peers_of(HERE),
        network.lanes_of(HERE),
        store,
        corrupt=PieceCorrupt,
        rotten=PiecesRotten,
        randrange=randrange,
    )


def ignore(progress: FetchProgress) -> None:
    pass


async def test_a_blob_arrives_on_disk_and_is_served_on(network: Network, tmp_path: Path) -> None:
    _, layer = await holder(network, tmp_path, A)
    here = await open_store(tmp_path / "here")
    await fetcher_of(network, here).fetch_blob(layer, lambda: [A], ignore)
    assert here.blob_path(layer.digest).read_bytes() == CONTENT
    assert [path.suffix for path in sorted(here.blobs.iterdir())] == ["", ".pieces"]
    server_of(network, B, here)
    third = await open_store(tmp_path / "third")
    await fetcher_of(network, third).fetch_blob(layer, lambda: [B], ignore)
    assert third.blob_path(layer.digest).read_bytes() == CONTENT


async def test_an_empty_blob(network: Network, tmp_path: Path) -> None:
    source = await open_store(tmp_path / "source")
    digest, piece_map = await source.put_bytes(b"")
    layer = Layer("model", digest, 0, piece_map.piece_size, piece_map.root())
    here = await open_store(tmp_path / "here")
    await fetcher_of(network, here).fetch_blob(layer, list, ignore)
    assert here.blob_path(digest).read_bytes() == b""


async def test_flipped_bits_on_a_holders_disk_never_arrive(
    network: Network, tmp_path: Path
) -> None:
    rotten, layer = await holder(network, tmp_path, A)
    await holder(network, tmp_path, B)
    content = bytearray(CONTENT)
    for index in range(PIECES):
        content[index * MIB + 1000] ^= 4
    rotten.blob_path(layer.digest).write_bytes(content)
    here = await open_store(tmp_path / "here")
    fetcher = fetcher_of(network, here)
    with pytest.raises(FetchFailed, match=r"A: piece . of .* has the wrong hash"):
        await fetcher.fetch_blob(layer, lambda: [A], ignore, give_up_after_s=0.2)
    await fetcher.fetch_blob(layer, lambda: [A, B], ignore)
    assert network.opened[A] == 1
    assert here.blob_path(layer.digest).read_bytes() == CONTENT


@pytest.mark.parametrize("rotten", [False, True])
async def test_a_piece_map_is_made_once_however_long_that_takes(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotten: bool
) -> None:
    """Whoever asks does not wait for it, so that its leaving does not begin it anew."""
    monkeypatch.setattr(server, "MAPPING_RETRY_S", 0.01)
    store, layer = await holder(network, tmp_path, A)
    store.blob_path(layer.digest).with_suffix(".pieces").unlink()
    begun, go = 0, trio.Event()

    async def late(digest: str) -> PieceMap:
        nonlocal begun
        begun += 1
        await go.wait()
        if rotten:
            raise DigestMismatch(digest, "another")
        return await ModelStore.piece_map(store, digest)

    monkeypatch.setattr(store, "piece_map", late)
    here = await open_store(tmp_path / "here")
    fetcher = fetcher_of(network, here)
    async with trio.open_nursery() as nursery:
        await nursery.start(server_of(network, A, store).run)
        with pytest.raises(FetchFailed, match="A: it reads the blob for its piece map"):
            await fetcher.fetch_blob(layer, lambda: [A], ignore, give_up_after_s=0.5)
        assert network.opened[A] > 1
        go.set()
        if rotten:
            with pytest.raises(FetchFailed):
                await fetcher.fetch_blob(layer, lambda: [A], ignore, give_up_after_s=0.5)
        else:
            await fetcher.fetch_blob(layer, lambda: [A], ignore)
            assert here.blob_path(layer.digest).read_bytes() == CONTENT
        nursery.cancel_scope.cancel()
    assert begun == 1


async def test_a_receiver_that_is_restarted_never_asks_for_a_verified_piece(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, layer = await holder(network, tmp_path, A)
    piece_map = await sender.piece_map(layer.digest)
    asked: list[int] = []
    request = pieces.FetcherSide.request

    def remember(side: pieces.FetcherSide, index: int) -> bytes:
        asked.append(index)
        return request(side, index)

    monkeypatch.setattr(pieces.FetcherSide, "request", remember)
    verified: set[int] = set()
    for aim in (2 * MIB, 4 * MIB, 6 * MIB, 8 * MIB):
        here = await open_store(tmp_path / "here")
        scope = trio.CancelScope()

        def stop(report: FetchProgress, scope: trio.CancelScope = scope, aim: int = aim) -> None:
            if report.verified >= aim:
                scope.cancel()

        asked.clear()
        with scope:
            await fetcher_of(network, here).fetch_blob(layer, lambda: [A], stop)
        assert scope.cancelled_caught
        assert not verified & set(asked)
        again = await open_store(tmp_path / "here")  # what a new process would find
        partial = await again.open_partial(layer.digest, piece_map)
        verified = {index for index, held in enumerate(partial.have) if held}
        assert partial.have_bytes >= aim
        partial.close()
    asked.clear()
    here = await open_store(tmp_path / "here")
    await fetcher_of(network, here).fetch_blob(layer, lambda: [A], ignore)
    assert here.blob_path(layer.digest).read_bytes() == CONTENT
    assert sorted(asked) == sorted(set(range(PIECES)) - verified)


async def test_a_blob_that_does_not_fit_is_a_clear_error(network: Network, tmp_path: Path) -> None:
    _, layer = await holder(network, tmp_path, A)
    here = ModelStore(tmp_path / "here", keep_free_bytes=1 << 60)
    await here.prepare()
    with pytest.raises(StoreFull, match="not enough room"):
        await fetcher_of(network, here).fetch_blob(layer, lambda: [A], ignore)


async def test_two_nodes_that_fetch_at_once_give_each_other_pieces(
    network: Network, tmp_path: Path
) -> None:
    _, layer = await holder(network, tmp_path, A)
    left, right = await open_store(tmp_path / "left"), await open_store(tmp_path / "right")
    for name, store in ((B, left), (HERE, right)):
        server_of(network, name, store)
    async with trio.open_nursery() as nursery:
        for name, store in ((B, left), (HERE, right)):
            others = [node for node in (A, B, HERE) if node != name]
            fetcher = Fetcher(
                network.peers_of(name),
                network.lanes_of(name),
                store,
                corrupt=PieceCorrupt,
                rotten=PiecesRotten,
            )
            nursery.start_soon(fetcher.fetch_blob, layer, lambda o=others: o, ignore)
    for store in (left, right):
        assert store.blob_path(layer.digest).read_bytes() == CONTENT
