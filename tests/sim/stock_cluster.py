"""A cluster of stock PySyncObj nodes under the same misfortunes as ours, and what is found there.

Nothing ends a run: each kind of finding is counted once a run, with the first example.
"""

import dataclasses
import gc
import itertools
import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from pysyncobj import FAIL_REASON
from pysyncobj.node import Node

from ollamad.core.ids import NodeId
from tests.sim.history import History, Kind, Operation
from tests.sim.linearizability import Outcome, judge
from tests.sim.network import Paths
from tests.sim.plan import LEADER, Crash, Fault, Network, Scenario, Way
from tests.sim.plan import Kind as FaultKind
from tests.sim.stock_library import BugInApplication, use_random
from tests.sim.stock_network import StockConnections, StockFrames
from tests.sim.stock_process import (
    CALLED_BACK,
    EXPLODED,
    LINGERS_S,
    SETTLE_S,
    STORM,
    UNANSWERED_S,
    Defect,
    Host,
    Process,
    Sent,
)
from tests.sim.world import START_S, World

SETTLE_STEP_S = 0.5
BUG_S = 1.0  # to see what a bug in the application leads to
BURST_SHARE = 0.2  # of the operations are several at once
BURST = (5, 20)
KEYS = 3
_SHARES = {Kind.WRITE: 5, Kind.READ: 4, Kind.DELETE: 1, Kind.CLAIM: 1}


@dataclass(frozen=True, slots=True)
class StockResult:
    """What a run showed. `findings` has the first example of each defect, with its time."""

    seed: int
    findings: dict[Defect, str]
    uses_batch: bool
    had_power_cuts: bool
    acknowledged: int


class StockCluster:
    """All hosts, the network, the faults and the clients of one run."""

    def __init__(self, world: World, scenario: Scenario, directory: Path) -> None:
        self.world = world
        self.scenario = scenario
        self.directory = directory
        rng = self.rng = world.rng("stock")
        use_random(world.rng("library"))
        self.uses_batch = rng.random() < 0.5
        self.compacts = rng.random() < 0.3
        self.changes_members = rng.random() < 0.3
        # In half of the runs a crash is a kill -9, which leaves the page cache whole.
        self.cuts_power = rng.random() < 0.5
        self.had_power_cuts = False
        self.findings: dict[Defect, str] = {}
        self.leaders: dict[int, NodeId] = {}
        self.applied_at: dict[int, str] = {}
        self.chosen: dict[int, tuple[bytes, int]] = {}  # as the first leader to commit it had it
        self.applied: set[str] = set()
        self.failed: dict[str, int] = {}
        self.acknowledged: list[str] = []
        self.bugs: list[tuple[NodeId, str]] = []
        self.history = History()
        self._made = itertools.count()
        self._transferred_at = 0.0
        self._messages = 0
        self._scope = trio.CancelScope()
        self._ends: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._tokens = itertools.count()
        self.paths = Paths()
        self.hosts = [Host(self, n) for n in range(scenario.voters)]
        self.by_id = {host.id: host for host in self.hosts}
        self.connections: StockConnections | None = None
        self.frames: StockFrames | None = None
        if scenario.network.streams:
            self.connections = StockConnections(
                world, scenario.network, self.paths, self._deliver, self._notice, self._is_up
            )
        else:
            self.frames = StockFrames(world, scenario.network, self.paths, self._deliver)

    def found(self, defect: Defect, details: str) -> None:
        self.findings.setdefault(defect, f"{self.world.now - START_S:.3f} {details}")

    # The run.

    async def run(self) -> None:
        with self._scope:
            await self._run()

    async def _run(self) -> None:
        world, scenario = self.world, self.scenario
        for host in self.hosts:
            self.start(host)
        for fault in scenario.faults:
            world.at(START_S + fault.at, self.strike, fault)
        for number in range(scenario.clients):
            world.after(1.0, self._operate, number, world.rng(f"client {number}"))
        await trio.sleep_until(START_S + scenario.duration_s)
        for token in list(self._ends):
            self._end(token)
        leader = await self._settled()
        if leader is None:
            self.found(Defect.STUCK, self._describe())
        if any(process.waiting for process in self._alive()):
            await trio.sleep(UNANSWERED_S)
            for process in self._alive():
                for command_id in process.waiting:
                    process.found(Defect.UNANSWERED, command_id)
        self._judge(leader)
        if leader is not None:
            await self._try_bugs(leader)

    def result(self) -> StockResult:
        return StockResult(
            self.scenario.seed,
            self.findings,
            self.uses_batch,
            self.had_power_cuts,
            len(self.acknowledged),
        )

    async def _settled(self) -> Process | None:
        """The leader, as soon as all members agree with it; None if they never do."""
        give_up_at = self.world.now + SETTLE_S
        while self.world.now < give_up_at:
            await trio.sleep(SETTLE_STEP_S)
            leader = self.leader()
            if leader is None:
                continue
            last = leader.last_index
            members = [
                host.process
                for host in map(self.by_id.__getitem__, leader.voters)
                if not host.is_broken
            ]
            if any(
                p is None
                or p.obj.raftLastApplied != last
                or p.obj.raftCommitIndex != last
                or p.obj._getLeader() != Node(leader.host.id)
                for p in members
            ):
                continue
            return leader
        return None

    def _judge(self, leader: Process | None) -> None:
        alive = self._alive()
        # Without a leader, a command counts as lost only if nobody has it any more.
        judged = alive if leader is None else [leader]
        kept = {command_id for process in judged for command_id in process.obj.applied_ids}
        if leader is None:
            logs = b"".join(command for p in alive for command, *_ in p.private("raftLog")[:])
            kept |= {c for c in self.acknowledged if f"({c})".encode() in logs}
        if lost := [command_id for command_id in self.acknowledged if command_id not in kept]:
            self.found(Defect.LOST, f"{len(lost)} of {len(self.acknowledged)}, first {lost[0]}")
        if leader is not None:
            members = [self.by_id[voter].process for voter in leader.voters]
            if len({repr(p.obj.applied_ids) for p in members if p is not None}) > 1:
                self.found(Defect.DIVERGED, "the states differ in the end")
        for verdict in judge(self.history.operations):
            if verdict.outcome is Outcome.VIOLATION:
                self.found(Defect.NOT_LINEARIZABLE, f"{verdict.key}\n{verdict.explanation}")
                if not self.findings.keys() & {Defect.LOST, Defect.DIVERGED, Defect.APPLIED_TWICE}:
                    self.found(Defect.STALE_READ, f"{verdict.key}\n{verdict.explanation}")

    async def _try_bugs(self, leader: Process) -> None:
        """What follows from a bug in the application, when all is well otherwise."""

        def explode(result: object, error: int) -> None:
            raise BugInApplication

        leader.enter()
        leader.obj.carry_out(CALLED_BACK, Kind.WRITE.value, "u0", callback=explode)
        leader.tick_soon()
        await trio.sleep(BUG_S)
        if self.bugs.count((leader.host.id, CALLED_BACK)) > 1:
            leader.found(Defect.CALLBACK_TWICE, "")
        leader.enter()
        leader.obj.explode(EXPLODED)
        leader.tick_soon()
        await trio.sleep(BUG_S)
        if (times := self.bugs.count((leader.host.id, EXPLODED))) > 1:
            leader.found(Defect.RETRIED, f"{times} times in {BUG_S:g} s")

    def leader(self) -> Process | None:
        """Who leads the highest term."""
        leading = [process for process in self._alive() if process.leads]
        return max(leading, key=lambda process: process.obj.raftCurrentTerm, default=None)

    def _describe(self) -> str:
        nodes = []
        for host in self.hosts:
            process = host.process
            if process is None:
                nodes.append(f"{host.id} is down")
            else:
                obj = process.obj
                nodes.append(
                    f"{host.id} {'leads' if process.leads else 'follows'} in {obj.raftCurrentTerm}"
                    f" applied {obj.raftLastApplied} committed {obj.raftCommitIndex}"
                    f" last {process.last_index} waiting {len(process.waiting)}"
                )
        return ", ".join(nodes)

    # Hosts.

    def _alive(self) -> list[Process]:
        return [host.process for host in self.hosts if host.process is not None]

    def start(self, host: Host) -> None:
        if host.process is not None or host.downs or host.is_broken:
            return
        try:
            process = Process(self, host)
        except Exception as error:
            self.found(Defect.DOES_NOT_START, f"{host.id}: {error!r}")
            host.is_broken = True
            return
        host.process = host.last_process = process
        if self.connections is not None:
            self.connections.start(host.id, self._peers(host))
        else:
            for other in self.hosts:
                if other is not host:
                    process.wake(process.transport._onNodeConnected, Node(other.id))
        process.start()

    def _peers(self, host: Host) -> list[NodeId]:
        return [other.id for other in self.hosts if other is not host]

    def _kill(self, host: Host, *, cuts_power: bool) -> None:
        process = host.process
        if process is not None:
            process.is_dead = True
            host.process = None
            if self.connections is not None:
                self.connections.died(host.id, self._peers(host), silently=cuts_power)
        if cuts_power:
            self.had_power_cuts = True
            host.pages.cut_power()

    def _is_up(self, node: NodeId) -> bool:
        return self.by_id[node].process is not None

    # The network.

    def send(self, source: NodeId, to: NodeId, sent: Sent) -> bool:
        self._messages += 1
        if self._messages > STORM:
            self.found(Defect.STORM, f"{source} to {to}; the run ends here")
            self._scope.cancel()
            return False
        if self.connections is not None:
            return self.connections.send(source, to, sent)
        assert self.frames is not None
        self.frames.send(source, to, sent, may_double=not sent.is_proposal)
        return True

    def _deliver(self, source: NodeId, to: NodeId, sent: Sent) -> None:
        process = self.by_id[to].process
        if process is not None:
            process.wake(process.receive, source, sent)

    def _notice(self, node: NodeId, peer: NodeId, is_up: bool) -> None:
        process = self.by_id[node].process
        if process is not None:
            transport = process.transport
            tell = transport._onNodeConnected if is_up else transport._onNodeDisconnected
            process.wake(tell, Node(peer))

    def _cut(self, pairs: list[tuple[Host, Host]], seconds: float) -> None:
        pairs = [(source, to) for source, to in pairs if source is not to]
        for source, to in pairs:
            self.paths.cut(source.id, to.id)
        self._lasting(seconds, self._mend, pairs)

    def _mend(self, pairs: list[tuple[Host, Host]]) -> None:
        for source, to in pairs:
            self.paths.mend(source.id, to.id)
            if self.connections is not None and not self.paths.is_cut(source.id, to.id):
                self.connections.mended(source.id, to.id)

    # Faults.

    def _lasting(self, seconds: float, end: Callable[..., object], *args: Any) -> None:
        token = next(self._tokens)
        self._ends[token] = (end, args)
        self.world.after(seconds, self._end, token)

    def _end(self, token: int) -> None:
        if token in self._ends:
            end, args = self._ends.pop(token)
            end(*args)

    def strike(self, fault: Fault) -> None:
        """Let a fault happen. Of disks only power cuts make a difference to this library."""
        leader = self.leader()
        host = self.hosts[fault.who % len(self.hosts)]
        if fault.who == LEADER and leader is not None:
            host = leader.host
        process = host.process
        match fault.kind, fault.args:
            case FaultKind.CRASH, (Crash(), int(), float(down_s)):
                self._down([host], down_s, cuts_power=self.cuts_power)
            case FaultKind.BLACKOUT, (float(down_s),):
                self._down(self.hosts, down_s, cuts_power=self.cuts_power)
            case FaultKind.STOP, (float(down_s),):
                if process is not None:
                    process.obj.destroy()
                    self._down([host], down_s, cuts_power=False)
            case FaultKind.PAUSE, (float(seconds),):
                host.pauses += 1
                self._lasting(seconds, self._resume, host)
            case FaultKind.CLOCK, (float(rate), float(seconds)):
                host.clock.set_rate(rate)
                self._lasting(seconds, host.clock.set_rate, 1.0)
            case FaultKind.CUT, (int(other), float(seconds)):
                self._cut([(host, self._host(other))], seconds)
            case FaultKind.ISOLATE, (Way() as way, float(seconds)):
                pairs = [(host, other) for other in self.hosts if way is not Way.IN]
                pairs += [(other, host) for other in self.hosts if way is not Way.OUT]
                self._cut(pairs, seconds)
            case FaultKind.PARTITION, (tuple() as numbers, float(seconds)):
                pairs = [
                    (one, other)
                    for one in self.hosts
                    for other in self.hosts
                    if (one.number in numbers) != (other.number in numbers)
                ]
                self._cut(pairs, seconds)
            case FaultKind.BAD_NETWORK, (float(loss), float(twice), float(jitter), float(seconds)):
                usual = self.scenario.network
                bad = dataclasses.replace(
                    usual, ordered=False, jitter_s=jitter, loss=loss, duplication=twice
                )
                self._use_network(bad)
                self._lasting(seconds, self._use_network, usual)
            case FaultKind.RESET, (int(other),):
                if self.connections is not None and self._host(other) is not host:
                    self.connections.reset(host.id, self._host(other).id)
            case (FaultKind.ADD | FaultKind.REMOVE) as kind, (int(at),):
                asked = self._host(at).process
                if self.changes_members and asked is not None and asked.host is not host:
                    asked.wake(self._change, asked, host.id, kind is FaultKind.ADD)
            case FaultKind.TRANSFER, _:
                if process is not None and process.leads:
                    self._transferred_at = self.world.now
                    process.wake(process.obj.transferLeadership)

    def _host(self, number: int) -> Host:
        return self.hosts[number % len(self.hosts)]

    def _down(self, hosts: list[Host], seconds: float, *, cuts_power: bool) -> None:
        for host in hosts:
            self._kill(host, cuts_power=cuts_power)
            host.downs += 1
            down_s = seconds if len(hosts) == 1 else host.rng.uniform(0, seconds)
            self._lasting(down_s, self._up, host)

    def _up(self, host: Host) -> None:
        host.downs -= 1
        self.start(host)

    def _resume(self, host: Host) -> None:
        host.pauses -= 1
        if host.pauses == 0 and host.process is not None:
            host.process.resume()

    def _use_network(self, network: Network) -> None:
        for each in (self.connections, self.frames):
            if each is not None:
                each.now = network

    def _change(self, process: Process, node: NodeId, adds: bool) -> None:
        change = process.obj.addNodeToCluster if adds else process.obj.removeNodeFromCluster
        change(Node(node))

    def transfers_lately(self) -> bool:
        return self.world.now - self._transferred_at < LINGERS_S

    # Clients.

    def _operate(self, client: int, rng: random.Random) -> None:
        """One operation or several at once, and the next ones later."""
        if self.world.now > START_S + self.scenario.duration_s:
            return
        self.world.after(rng.expovariate(1 / self.scenario.think_s), self._operate, client, rng)
        count = rng.randint(*BURST) if rng.random() < BURST_SHARE else 1
        process = rng.choice(self.hosts).process
        for _ in range(count):
            kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
            key = f"u{rng.randrange(KEYS)}"
            if kind is Kind.CLAIM:
                key = f"r{int(self.world.now) // 5}"
            if process is None:
                continue
            command_id = f"{client}.{next(self._made)}"
            argument = command_id if kind is Kind.WRITE else None
            operation = self.history.invoke(client, kind, key, argument)
            if kind is Kind.READ:
                process.wake(self._read, process, operation)
            else:
                process.wake(self._submit, process, operation, command_id)

    def _read(self, process: Process, operation: Operation) -> None:
        """A read at a leader is the freshest that the library offers."""
        leader = process.obj._getLeader()
        reader = None if leader is None else self.by_id[leader.id].process
        if reader is not None and reader.leads and not reader.host.pauses:
            self.history.complete(operation, reader.obj.values.get(operation.key))

    def _submit(self, process: Process, operation: Operation, command_id: str) -> None:
        def answered(result: Any, error: int) -> None:
            if process.is_dead or process.waiting.pop(command_id, None) is None:
                return
            if error == FAIL_REASON.SUCCESS:
                if result[0] != command_id:
                    process.found(Defect.WRONG_ANSWER, f"{command_id} got that of {result[0]}")
                    return
                self.acknowledged.append(command_id)
                self.history.complete(operation, result[1])
            elif error != FAIL_REASON.UNKNOWN_OUTCOME:
                self.failed[command_id] = error
                if command_id in self.applied:
                    process.found(Defect.FAILED_YET_APPLIED, f"{command_id}: {error}")

        process.waiting[command_id] = self.world.now
        process.obj.carry_out(command_id, operation.kind.value, operation.key, callback=answered)
        if not self.uses_batch:
            process.tick_soon()  # the library's notifier


def run(scenario: Scenario) -> StockResult:
    """Run a scenario; the same one always gives the same result."""
    logging.disable(logging.CRITICAL)
    world = World(scenario.seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=_memory()) as directory:
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its dumps open,
        cluster = StockCluster(world, scenario, Path(directory))
        world.run(cluster.run)
        result = cluster.result()
        del cluster, world
        gc.collect()  # and this closes them
    return result


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
