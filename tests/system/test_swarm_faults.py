"""Pieces between processes that are killed, over links that fail, on disks that rot and fill up.

Two nodes have a file and two fetch it, again and again, while something goes wrong all the time.
What must hold, whatever happens: a blob that can be found is right, and no piece that was verified
is fetched twice, but those that the disk lost. `OLLAMAD_SWARM_KILLS=50` for the long run (`make
faults`); with the seed that is printed the same things happen at about the same times.
"""

import datetime
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import trio

from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB, PieceHasher
from ollamad.core.state import Layer
from ollamad.peers.identity import Identity, issue_certificate, make_ca
from ollamad.store.journal import PartialPaths
from ollamad.store.models import ModelStore
from tests.system.harness import free_ports
from tests.system.swarm_node import run_node, write_config

pytestmark = pytest.mark.system

KILLS = int(os.environ.get("OLLAMAD_SWARM_KILLS", "10"))
SEED = int(os.environ.get("OLLAMAD_SWARM_SEED", "0")) or random.randrange(1 << 32)
PIECES = 24
CONTENT = random.Random(5).randbytes(PIECES * MIB - 12345)
RATE = 6e6  # bytes/s into a node, so that faults meet a transfer
PATIENCE_S = 120.0  # for a file to arrive when nothing goes wrong any more
SOURCES, FETCHERS = 2, 2

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.system.swarm_node"])


class Wire:
    """The way to one node, which can flip a bit, be cut, or hold everything up."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self._port = port
        self._rng = rng
        self._streams: set[trio.SocketStream] = set()
        self._flips = 0
        self.flipped = 0
        self._open = trio.Event()
        self._open.set()

    async def serve(self, nursery: trio.Nursery) -> str:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, self._relay, [listener])
        return f"127.0.0.1:{listener.socket.getsockname()[1]}"

    def flip(self) -> None:
        """One bit of what comes next from the node."""
        self._flips += 1

    def cut(self) -> None:
        for stream in self._streams:
            with suppress(OSError):
                stream.socket.shutdown(trio.socket.SHUT_RDWR)

    def hold(self) -> None:
        self._open = trio.Event()

    def release(self) -> None:
        self._open.set()

    async def _relay(self, outer: trio.SocketStream) -> None:
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            inner = await trio.open_tcp_stream("127.0.0.1", self._port)
            self._streams |= {inner, outer}
            try:
                async with inner, outer, trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, outer, inner, False)
                    await self._copy(inner, outer, True)
                    nursery.cancel_scope.cancel()
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                self._streams -= {inner, outer}

    async def _copy(
        self, source: trio.SocketStream, target: trio.SocketStream, from_node: bool
    ) -> None:
        async for received in source:
            data = bytearray(received)
            await self._open.wait()
            if from_node and self._flips and len(data) > 10_000:
                self._flips -= 1
                self.flipped += 1
                data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            await target.send_all(data)
        await target.send_eof()


class Host:
    """One node: its directory, and the process over it."""

    def __init__(self, directory: Path, node_id: NodeId, wire: Wire, port: int) -> None:
        self.directory = directory
        self.id = node_id
        self.wire = wire
        self.listen = f"127.0.0.1:{port}"
        self.notes = directory / "settled"
        self.rotten: set[int] = set()  # pieces that were changed on its disk
        self.process: ForkServerProcess | None = None

    def start(self) -> None:
        self.process = _processes.Process(target=run_node, args=(self.directory,), daemon=True)
        self.process.start()

    def kill(self) -> None:
        if self.process is not None:
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.process = None

    def blob(self, layer: Layer) -> Path:
        return self.directory / "models" / "blobs" / layer.digest.replace(":", "-")

    def has(self, layer: Layer) -> bool:
        """Whether it has the blob. If so it is right."""
        try:
            content = self.blob(layer).read_bytes()
        except FileNotFoundError:
            return False
        assert hashlib.sha256(content).hexdigest() == layer.digest.removeprefix("sha256:")
        return True

    def check_notes(self) -> None:
        """No piece was verified twice, unless its bytes were changed on the disk."""
        if self.notes.exists():
            times = Counter(int(line) for line in self.notes.read_text().split())
            twice = {index for index, count in times.items() if count > 1}
            assert twice <= self.rotten, f"fetched twice: {sorted(twice - self.rotten)}"

    def begin_again(self, layer: Layer) -> None:
        """Check what came, and forget it (the process must be down)."""
        assert self.process is None
        self.check_notes()
        self.notes.unlink(missing_ok=True)
        self.rotten.clear()
        paths = PartialPaths(self.blob(layer))
        paths.remove()
        for path in paths.blob.parent.glob(f"{paths.blob.name}*"):
            path.unlink()

    def rot(self, layer: Layer, rng: random.Random) -> None:
        """Flip a bit of what has come, in the middle of the bytes of some piece."""
        with suppress(FileNotFoundError), open(PartialPaths(self.blob(layer)).data, "r+b") as file:
            at = rng.randrange(max(1, os.fstat(file.fileno()).st_size))
            file.seek(at)
            if byte := file.read(1):
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << rng.randrange(8)]))
                self.rotten.add(at // MIB)


@asynccontextmanager
async def swarm(
    root: Path, rng: random.Random, *, plain: bool, rate: float = RATE
) -> AsyncIterator[tuple[list[Host], Layer]]:
    """The sources first, then those that fetch; none is started."""
    now = datetime.datetime.now(datetime.UTC)
    ca = make_ca(now)
    hasher = PieceHasher(len(CONTENT))
    hasher.update(CONTENT)
    digest, piece_map = hasher.finish()
    layer = Layer("m", digest, piece_map.size, piece_map.piece_size, piece_map.root())
    hosts: list[Host] = []
    async with trio.open_nursery() as nursery:
        addresses: dict[NodeId, str] = {}
        for number, port in enumerate(free_ports(SOURCES + FETCHERS)):
            identity = Identity.load_or_create(root / str(number))
            certificate = issue_certificate(ca, identity.public_key, now)
            identity.install(certificate, ca.certificate_pem)
            wire = Wire(port, rng)
            addresses[identity.node_id] = await wire.serve(nursery)
            hosts.append(Host(root / str(number), identity.node_id, wire, port))
        for number, host in enumerate(hosts):
            if number < SOURCES:
                store = ModelStore(host.directory / "models", keep_free_bytes=0)
                await store.prepare()
                await store.put_bytes(CONTENT)
            write_config(
                host.directory,
                id=host.id,
                listen=host.listen,
                addresses=addresses,
                plain=plain,
                rate=rate,
                layer=layer,
                settled=str(host.notes),
            )
        try:
            yield hosts, layer
        finally:
            for host in hosts:
                host.kill()
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - of other processes
            await trio.sleep(0.02)


async def until_all_have_it(hosts: list[Host], layer: Layer) -> None:
    for host in hosts:
        await until(host.blob(layer).exists)
        assert host.has(layer)
    for host in hosts:
        host.check_notes()


async def test_kill_9_at_any_time_of_senders_and_receivers(tmp_path: Path) -> None:
    """And bits flip on the disks of those that were killed."""
    print(f"OLLAMAD_SWARM_SEED={SEED}")
    rng = random.Random(SEED)
    async with swarm(tmp_path, rng, plain=False) as (hosts, layer):
        for host in hosts:
            host.start()
        arrived = killed_in_the_middle = 0
        for number in range(KILLS):
            await trio.sleep(rng.uniform(0.1, 1.5))
            victim = hosts[number % len(hosts)]
            victim.kill()
            for fetcher in hosts[SOURCES:]:
                if fetcher.has(layer):
                    fetcher.kill()
                    fetcher.begin_again(layer)
                    fetcher.start()
                    arrived += 1
            if victim.process is None:
                if victim in hosts[SOURCES:] and not victim.has(layer):
                    killed_in_the_middle += victim.notes.exists()
                    if rng.random() < 0.5:
                        victim.rot(layer, rng)
                victim.start()
        await until_all_have_it(hosts, layer)
        print(f"{KILLS} kills, {killed_in_the_middle} amid pieces, {arrived} arrivals meanwhile")
        assert killed_in_the_middle


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "encrypted"])
async def test_bits_flip_on_the_wire_and_links_are_cut_and_held_up(
    tmp_path: Path, plain: bool
) -> None:
    print(f"OLLAMAD_SWARM_SEED={SEED}")
    rng = random.Random(SEED)
    async with swarm(tmp_path, rng, plain=plain) as (hosts, layer):
        for host in hosts:
            host.start()
        flips = 0
        for number in range(max(6, KILLS // 2)):
            await trio.sleep(rng.uniform(0.05, 0.5))
            wire = rng.choice(hosts).wire
            match number % 3:
                case 0 if flips < SOURCES:  # who sent it is banned; all must not be
                    hosts[flips].wire.flip()
                    flips += 1
                case 1:
                    wire.hold()
                    await trio.sleep(0.3)
                    wire.release()
                case _:
                    wire.cut()
        if plain and sum(host.wire.flipped for host in hosts) >= SOURCES:
            # Who sent wrong pieces is banned, perhaps both; a new process knows nothing of it.
            for host in hosts[SOURCES:]:
                host.kill()
                host.start()
        await until_all_have_it(hosts, layer)
        assert sum(host.wire.flipped for host in hosts)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half of the file."""
    directory = tmp_path / "small"
    directory.mkdir()
    options = f"size={PIECES // 2 + 2}m"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


async def test_a_disk_that_fills_up_in_the_middle_keeps_what_came(
    tmp_path: Path, small_disk: Path
) -> None:
    rng = random.Random(SEED)
    async with swarm(tmp_path, rng, plain=False) as (hosts, layer):
        full = hosts[-1]
        models = full.directory / "models"
        models.mkdir(exist_ok=True)
        for host in hosts[:-1]:
            host.start()
        # The file system has room when the node asks, and then somebody else takes it.
        resize(small_disk, 4 * PIECES)
        (small_disk / "blobs").mkdir()
        (models / "blobs").symlink_to(small_disk / "blobs")
        full.start()
        await until(lambda: full.notes.exists() and full.notes.stat().st_size > 0)
        resize(small_disk, PIECES // 2)
        await trio.sleep(3)
        assert not full.has(layer)
        settled = len(full.notes.read_text().split())
        assert 0 < settled < PIECES
        resize(small_disk, 4 * PIECES)
        await until_all_have_it(hosts, layer)


def resize(mount: Path, mib: int) -> None:
    used = shutil.disk_usage(mount).used // MIB
    size = max(mib, used + 1)
    command = ["mount", "-o", f"remount,size={size}m", str(mount)]
    subprocess.run(command, check=True, capture_output=True)
