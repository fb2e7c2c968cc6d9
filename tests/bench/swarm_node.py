"""One node of `bench_swarm`: a store, the links, and the transfer of pieces; nothing else.

    python -m tests.bench.swarm_node DIRECTORY

DIRECTORY has `node.json` (this node's address and those of all) and an identity. It says `ready`,
then reads a line `fetch LAYER` or `stop`, and answers `done` with the seconds that it took and
the processor time that the process has used since. A whole daemon would do the same work and, with
nine of them on two cores, much that is not to be measured.
"""

import resource
import sys
import time
from pathlib import Path

import msgspec
import trio

from ollamad.core.ids import NodeId
from ollamad.core.state import Layer
from ollamad.peers.bulk import BulkPeers
from ollamad.peers.doorman import Doorman
from ollamad.peers.identity import Identity
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, TlsStream, split_address
from ollamad.store.errors import BlobMissing, PieceCorrupt, PiecesRotten
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.lanes import BulkLanes
from ollamad.transfer.server import PieceServer
from ollamad.wire.pieces import METHOD


class NodeConfig(msgspec.Struct):
    """What a node has to know."""

    id: NodeId
    addresses: dict[NodeId, str]  # host:port of all, this one included
    plain: bool


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def main(directory: Path) -> None:
    config = msgspec.json.decode((directory / "node.json").read_bytes(), type=NodeConfig)
    identity = Identity.load_or_create(directory)
    gate = Gate(identity, lambda node_id: True)
    store = ModelStore(directory / "models", keep_free_bytes=0)
    await store.prepare()
    mesh = Mesh(gate, version="bench", address_of=config.addresses.get)
    bulk = BulkPeers(gate, address_of=config.addresses.get)
    lanes = BulkLanes(bulk)
    server = PieceServer(store, lanes, missing=BlobMissing, plain=config.plain)
    mesh.handle(METHOD, server.handle)
    fetcher = Fetcher(
        mesh, lanes, store, corrupt=PieceCorrupt, rotten=PiecesRotten, plain=config.plain
    )
    others = [node_id for node_id in config.addresses if node_id != config.id]

    async def serve(stream: TlsStream, peer: NodeId | None, host: str) -> None:
        assert peer is not None
        await mesh.serve_member(stream, peer)

    host, port = split_address(config.addresses[config.id])
    listeners = await trio.open_tcp_listeners(port, host=host)
    doorman = Doorman(gate, serve, lanes=bulk)
    async with trio.open_nursery() as nursery:
        await nursery.start(mesh.run)
        nursery.start_soon(trio.serve_listeners, doorman.accept, listeners)
        print("ready", flush=True)
        while True:
            command = (await trio.to_thread.run_sync(sys.stdin.readline)).split(" ", 1)
            if command[0] != "fetch":
                break
            layer = msgspec.json.decode(command[1], type=Layer)
            began = time.perf_counter()
            await fetcher.fetch_blob(layer, lambda: others, lambda progress: None)
            print(f"done {time.perf_counter() - began:.4f} {server.bytes_sent}", flush=True)
        print(f"bye {processor_s():.4f} {server.bytes_sent}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
