"""Whole consensus nodes in one process: a network and disks in memory, on trio's clock.

Frames are encoded and decoded as on the wire. The network drops, delays and cuts; a disk keeps
what was committed to it and forgets the rest when its node is killed.
"""

import copy
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from ollamad.core.ids import NodeId
from ollamad.raft.errors import JournalFailed, NodeFailed
from ollamad.raft.journal import Batch, Blob, LogEntry, Stored
from ollamad.raft.node import RaftNode, RaftStatus
from ollamad.raft.private import Timing


class MemoryDisk:
    """A `Store` whose content outlives its node, as far as it was synced."""

    def __init__(self) -> None:
        self.entries: dict[int, LogEntry] = {}
        self.meta = Batch()
        self.snapshot: Blob | None = None
        self.sync_s = 0.0
        self.syncs = 0
        self.fail = False
        self.is_dead = False  # its node was killed: nothing is written any more
        self.stall: trio.Event | None = None  # syncs wait for it

    async def load(self) -> Stored:
        await trio.lowlevel.checkpoint()
        meta = self.meta
        return Stored(
            [self.entries[index] for index in sorted(self.entries)],
            meta.term,
            meta.voted_for,
            meta.commit_index,
            meta.hint,
            self.snapshot,
        )

    async def commit(self, batch: Batch) -> None:
        if self.is_dead:
            return
        if self.stall is not None:
            with trio.move_on_after(100):  # a test that failed must end all the same
                await self.stall.wait()
        await trio.sleep(self.sync_s)
        if self.is_dead:
            return
        if self.fail:
            raise JournalFailed("the disk is full")
        self.syncs += 1
        batch = copy.copy(batch)
        entries = self.entries
        for index in list(entries):
            below = batch.drop_below is not None and index < batch.drop_below
            if below or (batch.drop_from is not None and index >= batch.drop_from):
                del entries[index]
        for entry in batch.add:
            assert entry[1] not in entries
            entries[entry[1]] = entry
        if batch.snapshot is not None:
            self.snapshot = batch.snapshot
        self.meta = batch

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Ledger:
    """A state machine: the list of the commands that it applied, once for each id."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []
        self.seen: set[bytes] = set()
        self.on_apply: Callable[[bytes], None] = lambda command: None
        self.restored = 0

    def apply(self, command: bytes) -> bytes:
        self.on_apply(command)
        if command not in self.seen:
            self.seen.add(command)
            self.commands.append(command)
        return b"done " + command

    def snapshot(self) -> bytes:
        return b"\n".join(self.commands)

    def restore(self, data: bytes) -> None:
        self.restored += 1
        self.commands = data.split(b"\n") if data else []
        self.seen = set(self.commands)

    def digest(self) -> str:
        return hashlib.sha256(b"\n".join(self.commands)).hexdigest()


@dataclass
class Host:
    """A node with what survives it and what does not."""

    id: NodeId
    disk: MemoryDisk = field(default_factory=MemoryDisk)
    ledger: Ledger = field(default_factory=Ledger)
    node: RaftNode | None = None
    scope: trio.CancelScope | None = None
    stopped: trio.Event | None = None
    error: NodeFailed | None = None
    history: list[RaftStatus] = field(default_factory=list)

    @property
    def raft(self) -> RaftNode:
        assert self.node is not None
        return self.node


class Cluster:
    """Nodes and the network between them. Use within a nursery."""

    def __init__(self, nursery: trio.Nursery, seed: int = 1, timing: Timing | None = None) -> None:
        self.nursery = nursery
        self.rng = random.Random(seed)
        self.timing = timing or Timing()
        self.make_ledger: Callable[[], Ledger] = Ledger
        self.hosts: dict[NodeId, Host] = {}
        self.cut: set[tuple[NodeId, NodeId]] = set()  # one way: (from, to)
        self.delay_s = 0.0002
        self.jitter_s = 0.0
        self.loss = 0.0
        self.frames = 0
        self.spy: Callable[[NodeId, NodeId, bytes], bool] = lambda source, to, frame: True
        self.sent: dict[tuple[NodeId, NodeId], trio.MemorySendChannel[tuple[float, bytes]]] = {}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[NodeId(name)]

    async def start(self, name: str, learner_of: str | None = None) -> Host:
        """Start a node on its disk; a blank one founds a cluster or follows that one."""
        host = self.hosts.setdefault(NodeId(name), Host(NodeId(name)))
        host.disk.is_dead = False
        host.ledger = self.make_ledger()
        host.error = None
        node = RaftNode(
            host.id,
            host.disk,
            host.ledger,
            lambda to, frame: self._send(host.id, to, frame),
            timing=self.timing,
            observer=host.history.append,
            rng=random.Random(self.rng.getrandbits(32)),
        )
        if not await node.open():
            if learner_of is None:
                node.bootstrap()
            else:
                node.start_as_learner(self[learner_of].raft.voters)
        host.node, host.scope, host.stopped = node, trio.CancelScope(), trio.Event()
        await self.nursery.start(self._run, host)
        for other in self.hosts.values():
            if other is not host and other.node is not None:
                if (other.id, host.id) not in self.cut:
                    other.node.peer_connected(host.id)
                if (host.id, other.id) not in self.cut:
                    node.peer_connected(other.id)
        return host

    async def _run(self, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        assert host.scope is not None
        assert host.stopped is not None
        with host.scope:
            try:
                await host.raft.run(task_status=task_status)
            except NodeFailed as error:
                host.error = error
        host.stopped.set()

    async def kill(self, name: str) -> None:
        """Stop a node at once; what was not synced is lost."""
        host = self[name]
        host.disk.is_dead = True
        await self.stop(name)

    async def stop(self, name: str) -> None:
        """Stop a node in good order."""
        host = self[name]
        assert host.scope is not None
        assert host.stopped is not None
        host.scope.cancel()
        if host.disk.stall is not None:
            host.disk.stall.set()
            host.disk.stall = None
        await host.stopped.wait()
        host.node = None
        for other in self.hosts.values():
            if other.node is not None:
                other.node.peer_disconnected(host.id)

    def partition(self, *groups: str) -> None:
        """Cut everything between these groups of names (single letters), both ways."""
        for group in groups:
            for name in group:
                for other in self.hosts:
                    if other not in group:
                        self.cut.add((NodeId(name), other))
                        self.cut.add((other, NodeId(name)))
        for source, to in sorted(self.cut):
            if (node := self[source].node) is not None:
                node.peer_disconnected(to)

    def heal(self) -> None:
        """Undo all cuts."""
        cut, self.cut = self.cut, set()
        for source, to in sorted(cut):
            node = self[source].node
            if node is not None and self[to].node is not None:
                node.peer_connected(to)

    def _send(self, source: NodeId, to: NodeId, frame: bytes) -> None:
        self.frames += 1
        if self.hosts[source].disk.is_dead:  # it is being killed
            return
        if not self.spy(source, to, frame) or self.rng.random() < self.loss:
            return
        channel = self.sent.get((source, to))
        if channel is None:
            channel, receiver = trio.open_memory_channel[tuple[float, bytes]](100_000)
            self.sent[source, to] = channel
            self.nursery.start_soon(self._carry, source, to, receiver)
        delay_s = self.delay_s + self.rng.uniform(0, self.jitter_s)
        channel.send_nowait((trio.current_time() + delay_s, frame))

    async def _carry(
        self,
        source: NodeId,
        to: NodeId,
        receiver: trio.MemoryReceiveChannel[tuple[float, bytes]],
    ) -> None:
        async for at, frame in receiver:
            await trio.sleep_until(at)
            node = self.hosts[to].node
            if (source, to) not in self.cut and node is not None:
                node.receive(source, frame)

    async def leader(self, among: str = "") -> Host:
        """Wait for one node that leads with a quorum, and that all others of `among` follow."""
        names = among or "".join(self.hosts)
        with trio.fail_after(60):
            while True:
                hosts = [self[name] for name in names if self[name].node is not None]
                leaders = {host.raft.leader for host in hosts}
                if len(leaders) == 1 and (leader := leaders.pop()) is not None:
                    host = self[leader]
                    if host.node is not None and host.raft.is_leader and host.raft.has_quorum:
                        return host
                await trio.sleep(0.01)

    async def founded(self, names: str) -> Host:
        """Start the first, let the others follow and make all of them voters."""
        first = await self.start(names[0])
        await self.leader(names[0])
        for name in names[1:]:
            await self.start(name, learner_of=names[0])
            await first.raft.add_voter(NodeId(name), 10)
        await self.leader(names)
        return first

    async def settled(self, names: str = "") -> None:
        """Wait until all running nodes have applied the same, and check that they did."""
        hosts = [self[name] for name in (names or self.hosts) if self[name].node is not None]
        with trio.fail_after(60):
            while True:
                cores = [host.raft._core for host in hosts]
                quiet = all(core.commit_index() == core.last_index() for core in cores)
                if quiet and len({core.applied_index() for core in cores}) == 1:
                    break
                await trio.sleep(0.01)
        assert len({host.ledger.digest() for host in hosts}) == 1
