"""One of our nodes in a process of its own: `RaftNode` and `Links` on loopback, syncing on."""

import json
import sys
import time
from pathlib import Path

import trio

from ollamad.core.ids import NodeId
from ollamad.peers.identity import Identity
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.raft import Links, RaftError, RaftNode, SqliteStore
from tests.bench.bench_raft_process import COMMAND, Answer, say

PROPOSE_S = 20.0


class Nothing:
    """The least of state machines: what is measured is consensus."""

    def apply(self, command: bytes) -> bytes:
        return b""

    def snapshot(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass


async def main(self_id: NodeId, ports: dict[NodeId, int], directory: Path, use_tls: bool) -> None:
    """Run one node; the first of `ports` founds the cluster, the others wait to be added."""
    gate = Gate(Identity.load_or_create(directory), lambda peer: True) if use_tls else None

    async def dial(to: NodeId) -> trio.abc.Stream:
        if gate is not None:
            return await gate.dial(to, f"127.0.0.1:{ports[to]}")
        stream = await trio.open_tcp_stream("127.0.0.1", ports[to])
        await stream.send_all(bytes([list(ports).index(self_id)]))
        return stream

    async def serve(transport: trio.SocketStream) -> None:
        if gate is not None:
            try:
                stream, peer = await gate.accept(transport)
            except PeerUnreachable:
                return
            if peer is not None:
                await links.serve(stream, peer)
        elif place := await transport.receive_some(1):
            await links.serve(transport, list(ports)[place[0]])

    links = Links(dial)
    founder = next(iter(ports))
    node = RaftNode(self_id, SqliteStore(directory / "raft.db"), Nothing(), links.send)
    if not await node.open():
        if self_id == founder:
            node.bootstrap()
        else:
            node.start_as_learner(frozenset({founder}))
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(ports[self_id], host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        await nursery.start(node.run)
        await nursery.start(links.run, node)
        links.set_peers(frozenset(ports) - {self_id})
        say({})
        async for line in trio.wrap_file(sys.stdin):
            try:
                say(await perform(node, **json.loads(line)))
            except RaftError as error:
                say({"error": repr(error)})
        nursery.cancel_scope.cancel()


async def perform(
    node: RaftNode, task: str, node_id: str = "", runs: int = 0, time_s: float = 0, depth: int = 0
) -> Answer:
    match task:
        case "add":
            await node.add_voter(NodeId(node_id), PROPOSE_S)
            return {}
        case "status":
            leader = node.leader if node.has_quorum else None
            return {"leader": leader, "applied": node.applied_index, "voters": len(node.voters)}
        case "commit":
            await node.propose(COMMAND, PROPOSE_S)
            return {"at": time.monotonic()}
        case "latency":
            times = []
            for _ in range(runs):
                started = time.perf_counter()
                await node.propose(COMMAND, PROPOSE_S)
                times.append(time.perf_counter() - started)
            return {"times": times}
        case "pipelined":
            return await pipelined(node, time_s, depth)
        case "cpu":
            return {"cpu_s": time.process_time()}
    raise AssertionError(task)


async def pipelined(node: RaftNode, time_s: float, depth: int) -> Answer:
    done = 0
    started = time.perf_counter()

    async def propose_on() -> None:
        nonlocal done
        while time.perf_counter() - started < time_s:
            await node.propose(COMMAND, PROPOSE_S)
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(propose_on)
    return {"done": done, "took_s": time.perf_counter() - started}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    trio.run(
        main,
        settings["id"],
        settings["ports"],
        Path(settings["directory"]),
        settings["use_tls"],
    )
