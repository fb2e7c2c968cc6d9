"""One node that gives and takes pieces: a store, the links and the transfer; nothing else.

    python -m tests.system.swarm_node DIRECTORY

For benchmarks and fault tests, where whole daemons would do the same work and, with many of them
on few processors, much that is not looked for. DIRECTORY has `node.json` (`NodeConfig`) and an
identity. It says `ready`, then reads a line `fetch LAYER` or `stop`, and answers `done` with the
seconds that it took, or `bye` with the processor time that it has used and the bytes that it sent.
`run_node` instead fetches what the config names until it is here, and serves for ever.
"""

import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import PieceMap
from ollamad.core.state import Layer
from ollamad.peers.bulk import BulkPeers
from ollamad.peers.doorman import Doorman
from ollamad.peers.identity import Identity
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, split_address
from ollamad.peers.tls_stream import TlsStream
from ollamad.store.errors import (
    BlobMissing,
    PieceCorrupt,
    PieceMapMissing,
    PiecesRotten,
    StoreError,
)
from ollamad.store.models import ModelStore
from ollamad.store.partial import PartialBlob
from ollamad.store.sink import PieceSink
from ollamad.transfer.fetch import Fetcher, FetchFailed
from ollamad.transfer.lanes import BulkLanes
from ollamad.transfer.limits import Limit
from ollamad.transfer.server import PieceServer
from ollamad.wire.pieces import METHOD

RETRY_S = 0.5


class NodeConfig(msgspec.Struct):
    """What a node has to know."""

    id: NodeId
    listen: str  # host:port
    addresses: dict[NodeId, str]  # where all are reached
    plain: bool = False
    rate: float | None = None  # of what comes, bytes/s
    upload: float | None = None  # of what goes, bytes/s
    layer: Layer | None = None  # to have
    settled: str = ""  # a file that gets a line for each piece that was verified and recorded


class NotingStore(ModelStore):
    """A store that notes which pieces became true, once for each time."""

    def __init__(self, root: Path, notes: Path) -> None:
        super().__init__(root, keep_free_bytes=0)
        self._notes = notes

    async def open_partial(self, digest: str, piece_map: PieceMap) -> PartialBlob:
        blob = await super().open_partial(digest, piece_map)
        begin = blob.begin_piece
        notes = os.open(self._notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

        def begin_piece(index: int) -> PieceSink:
            sink = begin(index)
            record = sink._record

            def record_and_note(got: bytes) -> None:
                record(got)
                os.write(notes, f"{index}\n".encode())

            sink._record = record_and_note  # type: ignore[method-assign]
            return sink

        blob.begin_piece = begin_piece  # type: ignore[method-assign]
        return blob


class SwarmNode:
    """The parts of a node, put together as the daemon does."""

    def __init__(self, directory: Path) -> None:
        self.config = msgspec.json.decode((directory / "node.json").read_bytes(), type=NodeConfig)
        config = self.config
        root = directory / "models"
        notes = Path(config.settled) if config.settled else None
        self.store: ModelStore = (
            ModelStore(root, keep_free_bytes=0) if notes is None else NotingStore(root, notes)
        )
        gate = Gate(Identity.load_or_create(directory), lambda node_id: True)
        self._mesh = Mesh(gate, version="test", address_of=config.addresses.get)
        self._bulk = BulkPeers(gate, address_of=config.addresses.get)
        self._doorman = Doorman(gate, self._serve, lanes=self._bulk)
        self.lanes = BulkLanes(self._bulk, upload=Limit(config.upload), download=Limit(config.rate))
        plain = config.plain
        self.server = PieceServer(
            self.store, self.lanes, missing=BlobMissing, unmapped=PieceMapMissing, plain=plain
        )
        self._mesh.handle(METHOD, self.server.handle)
        self.fetcher = Fetcher(
            self._mesh,
            self.lanes,
            self.store,
            corrupt=PieceCorrupt,
            rotten=PiecesRotten,
            plain=plain,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.store.prepare()
        host, port = split_address(self.config.listen)
        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._mesh.run)
            nursery.start_soon(trio.serve_listeners, self._doorman.accept, listeners)
            task_status.started()

    async def fetch(self, layer: Layer) -> None:
        others = [node_id for node_id in self.config.addresses if node_id != self.config.id]
        await self.fetcher.fetch_blob(layer, lambda: others, lambda progress: None)

    async def _serve(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        if peer is not None:
            await self._mesh.serve_member(stream, peer)


def write_config(directory: Path, **values: Any) -> None:
    (directory / "node.json").write_bytes(msgspec.json.encode(NodeConfig(**values)))


def run_node(directory: Path) -> None:
    """Have what the config names, and serve it; until killed."""

    async def main() -> None:
        node = SwarmNode(directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            layer = node.config.layer
            while layer is not None and not await node.store.has_blob(layer.digest):
                with suppress(FetchFailed, StoreError, OSError):  # as the daemon does
                    await node.fetch(layer)
                await trio.sleep(RETRY_S)

    trio.run(main)


def processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def obey(directory: Path) -> None:
    """Do what the lines on the input say."""
    node = SwarmNode(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        before = processor_s()
        print("ready", flush=True)
        while True:
            command = (await trio.to_thread.run_sync(sys.stdin.readline)).split(" ", 1)
            if command[0] != "fetch":
                break
            began = time.perf_counter()
            await node.fetch(msgspec.json.decode(command[1], type=Layer))
            print(f"done {time.perf_counter() - began:.4f}", flush=True)
        print(f"bye {processor_s() - before:.4f} {node.server.bytes_sent}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(obey, Path(sys.argv[1]))
