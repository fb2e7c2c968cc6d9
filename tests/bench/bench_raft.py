"""Measures consensus: three processes on loopback, plain TCP, syncing on.

    python -m tests.bench.bench_raft [--kills N] [--directory DIR]

Prints commit latency through leader and follower, pipelined commits per second, the CPU that an
idle node takes, and the time from kill -9 of the leader to the next acknowledged write.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from ollamad.core.ids import NodeId
from ollamad.raft import Links, NoQuorum, OutcomeUnknown, RaftNode, SqliteStore

NAMES = "abc"
COMMAND = bytes(200)  # about what a replicated command of a cluster has
LATENCY_RUNS = 1000
PIPELINED_RUNS = 20_000
PIPELINE_DEPTH = 200
IDLE_S = 5.0


class Nothing:
    """The least of state machines: what is measured is consensus."""

    def apply(self, command: bytes) -> bytes:
        return b""

    def snapshot(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass


async def node_main(name: str, ports: dict[str, int], directory: Path) -> None:
    """One node, told what to measure line by line on stdin."""

    async def dial(to: NodeId) -> trio.abc.Stream:
        stream = await trio.open_tcp_stream("127.0.0.1", ports[to])
        await stream.send_all(name.encode())
        return stream

    async def serve(stream: trio.SocketStream) -> None:
        peer = (await stream.receive_some(1)).decode()
        if peer:
            await links.serve(stream, NodeId(peer))

    links = Links(dial)
    node = RaftNode(NodeId(name), SqliteStore(directory / f"{name}.db"), Nothing(), links.send)
    if not await node.open():
        if name == NAMES[0]:
            node.bootstrap()
        else:
            node.start_as_learner(frozenset({NodeId(NAMES[0])}))
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(ports[name], host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        await nursery.start(node.run)
        await nursery.start(links.run, node)
        links.set_peers(frozenset(map(NodeId, NAMES.replace(name, ""))))
        print("ready", flush=True)
        stdin = trio.wrap_file(sys.stdin)
        async for line in stdin:
            try:
                answer = await _measure(node, *line.split())
            except (NoQuorum, OutcomeUnknown) as error:
                answer = f"failed {type(error).__name__}"
            print(answer, flush=True)
        nursery.cancel_scope.cancel()


async def _measure(node: RaftNode, task: str, argument: str = "") -> str:
    match task:
        case "add":
            await node.add_voter(NodeId(argument), 20)
            return "ok"
        case "leader":
            return str(node.leader if node.has_quorum else None)
        case "commit":
            await node.propose(COMMAND, 20)
            return f"{time.monotonic()}"
        case "latency":
            times = []
            for _ in range(LATENCY_RUNS):
                started = time.perf_counter()
                await node.propose(COMMAND, 20)
                times.append(time.perf_counter() - started)
            times.sort()
            p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
            return f"{p50 * 1e3:.2f} {p99 * 1e3:.2f}"
        case "pipeline":
            started = time.perf_counter()

            async def worker() -> None:
                for _ in range(PIPELINED_RUNS // PIPELINE_DEPTH):
                    await node.propose(COMMAND, 20)

            async with trio.open_nursery() as nursery:
                for _ in range(PIPELINE_DEPTH):
                    nursery.start_soon(worker)
            return f"{PIPELINED_RUNS / (time.perf_counter() - started):.0f}"
        case "cpu":
            return f"{time.process_time()}"
    raise AssertionError(task)


class Remote:
    """A node in its own process."""

    def __init__(self, name: str, ports: str, directory: str) -> None:
        command = [sys.executable, "-m", "tests.bench.bench_raft", "--node", name]
        self.process = subprocess.Popen(
            [*command, "--ports", ports, "--directory", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def ask(self, line: str) -> str:
        self.tell(line)
        return self._line()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def find_leader(nodes: dict[str, Remote]) -> str:
    while True:
        views = {node.ask("leader") for node in nodes.values()}
        if len(views) == 1 and (leader := views.pop()) in nodes:
            return leader


def free_ports() -> str:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in NAMES]
    ports = ",".join(str(s.getsockname()[1]) for s in sockets)
    for s in sockets:
        s.close()
    return ports


def disk_floor(directory: str) -> list[float]:
    """Seconds that one small write and sync take here, sorted: what no commit can beat."""
    times = []
    with (Path(directory) / "floor").open("wb", buffering=0) as file:
        for _ in range(300):
            started = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return sorted(times)


def bench(directory: str, kills: int) -> None:
    ports = free_ports()
    nodes = {name: Remote(name, ports, directory) for name in NAMES}
    try:
        for name in NAMES[1:]:
            assert nodes[NAMES[0]].ask(f"add {name}") == "ok"
        leader = find_leader(nodes)
        follower = NAMES.replace(leader, "")[0]
        print(f"{'3 nodes, 3 processes, loopback, syncing on':44} {os.cpu_count()} CPUs")
        floor = disk_floor(directory)
        p50, p99 = f"{floor[150] * 1e3:.2f}", f"{floor[297] * 1e3:.2f}"
        print(f"a 4 KiB write and fdatasync, all nodes idle  p50 {p50} ms  p99 {p99} ms")
        for label, name in (("leader", leader), ("follower", follower)):
            p50, p99 = nodes[name].ask("latency").split()
            print(f"commit through the {label:25} p50 {p50} ms  p99 {p99} ms")
        for label, name in (("leader", leader), ("follower", follower)):
            print(f"pipelined through the {label:22} {nodes[name].ask('pipeline')} commits/s")
        before = {name: float(node.ask("cpu")) for name, node in nodes.items()}
        time.sleep(IDLE_S)
        for name, node in nodes.items():
            share = (float(node.ask("cpu")) - before[name]) / IDLE_S * 100
            role = "leader" if name == leader else "follower"
            print(f"idle {role:39} {share:.2f} % of a core")
        times = []
        for _ in range(kills):
            leader = find_leader(nodes)
            other = NAMES.replace(leader, "")[0]
            nodes[other].ask("commit")
            started = time.monotonic()
            nodes[leader].kill()
            times.append(float(nodes[other].ask("commit")) - started)
            nodes[leader] = Remote(leader, ports, directory)
        if times:
            times.sort()
            p50, worst = times[len(times) // 2], times[-1]
            print(f"failover over {kills} kills{'':24} p50 {p50:.2f} s  worst {worst:.2f} s")
    finally:
        for node in nodes.values():
            node.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--directory")
    parser.add_argument("--node", help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        ports = dict(zip(NAMES, map(int, arguments.ports.split(",")), strict=True))
        trio.run(node_main, arguments.node, ports, Path(arguments.directory))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        bench(directory, arguments.kills)


if __name__ == "__main__":
    main()
