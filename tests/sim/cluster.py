"""The simulated cluster: hosts, what befalls them, and how all of it ends well."""

import dataclasses
import itertools
import random
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import trio

import ollamad.raft.fence as fence_module
import ollamad.raft.journal as journal_module
import ollamad.raft.node as node_module
import ollamad.raft.private as private_module
import ollamad.raft.transport as transport_module
from ollamad.core.commands import FoundCluster, Proposal
from ollamad.core.ids import NodeId
from ollamad.core.state import Capacity, CertificateAuthority, Member, User
from ollamad.raft import ChangeRefused, JournalFailed, Links, RaftError
from ollamad.raft.journal import LogEntry
from ollamad.wire.codec import encode
from ollamad.wire.raftwire import NO_OP, REGULAR, encode_voters
from tests.sim.checks import Checker
from tests.sim.disk import DEVICE_ERROR, SimDisk
from tests.sim.network import Connection, Connections, Datagrams, Paths
from tests.sim.plan import LEADER, Crash, Fault, Kind, Network, Scenario, Tuning, Way
from tests.sim.process import Clock, Gone, Life, WatchedJournal
from tests.sim.world import World

PROGRESS_BOUND_S = 15.0  # after all is healed: until every node has the same state
SETTLED_CHECK_S = 0.05
FOUNDING_S = 0.2  # until the founder, alone, surely leads
CATCH_UP_STEP_S = 1e-6  # for each thing that came while a process was stopped
CHANGE_TIMEOUT_S = 3.0  # for a change of the voters
NOTICE_S = 1.5  # until a node learns that a link broke or works again, at most (datagrams)
NOTICED_S = 2.0  # until the others do not count on a host any more that has stopped
LATE_S = 3.0  # a straggling frame's delay, at most
RESTART_S = 2.0  # until somebody starts a daemon again that stopped by itself


class Host:
    """A machine: its disk and its clock outlive the processes."""

    def __init__(self, world: World, number: int, scenario: Scenario, key: str = "") -> None:
        self.id = NodeId(chr(ord("A") + number) + key)
        self.number = number
        self.rng = world.rng(f"host {self.id}")
        self.disk = SimDisk(world, self.id, scenario.sync_s)
        self.clock = Clock(world, self.rng.uniform(0, 1000), scenario.creep_s)
        self.pauses = 0  # how many of the faults that stop it are not over
        # What reaches a process that is stopped, in order.
        self.inbox: deque[tuple[Life, Callable[..., object], tuple[object, ...]]] = deque()
        self.resumed = trio.Event()
        self.life: Life | None = None
        self.mistaken: set[NodeId] = set()  # peers whose links are wrongly said to be down
        self.downs = 0  # how many of the faults that keep it down are not over


class Cluster:
    """All hosts and the network between them."""

    def __init__(self, world: World, scenario: Scenario, nursery: trio.Nursery) -> None:
        tune(scenario.tuning)
        self.world = world
        self.scenario = scenario
        self.nursery = nursery
        self.rng = world.rng("cluster")
        self.counts: Counter[str] = Counter()
        self.checker = Checker(world.fail)
        self.paths = Paths()
        self.hosts = [Host(world, n, scenario) for n in range(scenario.hosts)]
        self.by_id = {host.id: host for host in self.hosts}
        self.network = Datagrams(world, scenario.network, self.paths, self._deliver, self.counts)
        self.connections = Connections(
            world, scenario.network, self.paths, self._accept, self._hand_over
        )
        self._ends: dict[int, tuple[Callable[..., object], tuple[object, ...]]] = {}
        self._tokens = itertools.count()
        self.client_numbers = itertools.count()
        self._is_healed = False
        self._lame_until = 0.0
        self._changing_until = 0.0  # by then what was asked of the voters has come or never will
        self.write_at: Callable[[Host], Awaitable[None]] = _nobody_writes
        self._first_ids = frozenset(self.by_id)
        self._lost: Host | None = None  # the host whose disk is gone, and with it its id
        self._replaced = trio.Event()
        self._founder_voters = frozenset(host.id for host in self.hosts[: scenario.voters])
        if not scenario.grows:
            self._preform()

    # Beginning.

    def _preform(self) -> None:
        entries = [
            (bytes([NO_OP]), 1, 0),
            (encode_voters(self._founder_voters), 2, 0),
            (bytes([REGULAR]) + FOUNDING, 3, 0),
        ]
        for host in self.hosts[: self.scenario.voters]:
            host.disk.store(list(entries))

    async def begin(self) -> None:
        """Start all hosts; returns when the cluster takes commands."""
        for host in self.hosts:
            self.start(host)
        if self.scenario.grows:
            founder = self.hosts[0]
            await trio.sleep(FOUNDING_S)
            assert founder.life is not None
            try:
                await founder.life.call(founder.life.node.propose, FOUNDING, 10.0)
            except (RaftError, Gone) as error:
                self.checker.violated("progress", f"no cluster was founded: {error!r}")
                return
            for host in self.hosts[1 : self.scenario.voters]:
                self.nursery.start_soon(self._change, founder, host.id, True)

    def start(self, host: Host) -> None:
        """Start a process, if none runs."""
        if host.life is None and host.downs == 0:
            host.life = Life(host, self)
            self.nursery.start_soon(self._live, host.life)

    async def _live(self, life: Life) -> None:
        host, node = life.host, life.node
        try:
            with life.scope:
                if not await node.open():
                    if self.scenario.grows and host.number == 0:
                        node.bootstrap()
                    else:
                        node.start_as_learner(self._voters_for(host))
                self.checker.starts_with_term(host.id, node._core.term())
                life.note("starts in term", node._core.term())
                node.observe()
                async with trio.open_nursery() as nursery:
                    life.nursery = nursery
                    await nursery.start(node.run)
                    life.is_running = True
                    await self._connect(life)
        except* Exception as group:
            self._failed(life, group)
        finally:
            life.is_running = False
        if not life.is_dead:
            life.end("has ended")

    def _voters_for(self, host: Host) -> frozenset[NodeId]:
        if host.id not in self._first_ids:
            leader = self.leader()
            if leader is not None and leader.life is not None:
                return leader.life.node.voters
        known = frozenset({self.hosts[0].id}) if self.scenario.grows else self._founder_voters
        return known - {host.id} or frozenset({self.hosts[0].id})

    def _failed(self, life: Life, group: BaseExceptionGroup[Exception]) -> None:
        if life.is_dead:
            return
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        life.note("FAILS", repr(error))
        if not (isinstance(error, JournalFailed) and DEVICE_ERROR in str(error)):
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.checker.violated(
                "nodes go on", f"{life.host.id} stopped: {error!r} ({where.name}:{where.lineno})"
            )

    def holders(self, entry: LogEntry, among: frozenset[NodeId]) -> frozenset[NodeId]:
        """Those that have the entry on their disk, or had it when the disk was wiped."""
        lacking = {host.id for host in self.hosts if not host.disk.holds(entry)}
        return among - lacking

    def process_ended(self, life: Life) -> None:
        """A process is gone; the others will notice sooner or later, or not at all."""
        host = life.host
        self.checker.ended(life.log, host.disk.meta.term)
        if host.life is not life:
            return
        host.life = None
        if self.scenario.network.streams:
            self.connections.host_died(host.id)
        for other in self.hosts:
            self.world.after(self.rng.uniform(0, NOTICE_S), self._tell, other, host)
        if host.downs == 0:
            self.world.after(RESTART_S, self.start, host)

    # The network.

    async def _connect(self, life: Life) -> None:
        if self.scenario.network.streams:
            assert life.nursery is not None

            async def dial(to: NodeId) -> trio.abc.Stream:
                return await self.connections.dial(life.host.id, to)

            life.links = Links(dial, rng=random.Random(life.host.rng.getrandbits(64)))
            await life.nursery.start(life.links.run, life.node)
            self._set_peers(life)
            return
        for other in [other for other in self.hosts if other is not life.host]:
            self.world.after(self.rng.uniform(0, 0.1), self._tell, life.host, other)
            self.world.after(self.rng.uniform(0, 0.1), self._tell, other, life.host)

    def _set_peers(self, life: Life) -> None:
        if life.links is not None:
            life.links.set_peers(frozenset(h.id for h in self.hosts if h is not life.host))

    def _tell(self, host: Host, other: Host) -> None:
        """Let a node know whether its link to another one is up, if that is news."""
        life = host.life
        if self.scenario.network.streams or host is other or life is None or not life.is_running:
            return
        is_up = (
            other.life is not None
            and other.life.is_running
            and not self.paths.is_cut(host.id, other.id)
            and other.id not in host.mistaken
        )
        if is_up and other.id not in life.told:
            life.told.add(other.id)
            life.wake(life.node.peer_connected, other.id)
        elif not is_up and other.id in life.told:
            life.told.discard(other.id)
            life.wake(life.node.peer_disconnected, other.id)

    def _deliver(self, source: NodeId, to: NodeId, frame: bytes) -> None:
        host = self.by_id[to]
        if host.life is not None and host.life.is_running:
            host.life.wake(host.life.node.receive, source, frame)

    def _accept(self, connection: Connection) -> bool:
        life = self.by_id[connection.to].life
        if life is None or life.links is None or life.nursery is None or life.is_still:
            return False
        life.nursery.start_soon(life.links.serve, connection.acceptor, connection.source)
        return True

    def _hand_over(self, connection: Connection, data: bytes) -> None:
        life = self.by_id[connection.to].life
        if life is not None:
            life.wake(connection.acceptor.feed, data)

    def _cut(self, source: Host, to: Host) -> None:
        if source is not to:
            self.paths.cut(source.id, to.id)
            self.world.after(self.rng.uniform(0, NOTICE_S), self._tell, source, to)

    def _mend(self, source: Host, to: Host) -> None:
        if source is not to:
            self.paths.mend(source.id, to.id)
            if not self.paths.is_cut(source.id, to.id):
                self.connections.mended(source.id, to.id)
            self.world.after(self.rng.uniform(0, NOTICE_S), self._tell, source, to)

    # Faults.

    def lasting(self, seconds: float, end: Callable[..., object], *args: object) -> None:
        """Undo something after a while, or when all is healed."""
        token = next(self._tokens)
        self._ends[token] = (end, args)
        self.world.after(seconds, self._end, token)

    def _end(self, token: int) -> None:
        if token in self._ends:
            end, args = self._ends.pop(token)
            end(*args)

    def heal(self) -> None:
        """End all that is wrong."""
        self._is_healed = True
        self.world.note("world", "is healed")
        for token in list(self._ends):
            self._end(token)
        # The parts of a snapshot must come in order, as they do on any stream.
        usual = self.scenario.network
        self._use_network(
            Network(usual.streams, True, usual.latency_s, usual.jitter_s, straggling=0.0)
        )
        for host in self.hosts:
            host.disk.breaks_next = False
            if host.life is not None:
                host.life.frames_to_death = host.life.disk.crash = None

    def leader(self) -> Host | None:
        """Who leads the highest term, as far as those who lead know."""
        leading = [h for h in self.hosts if h.life and h.life.is_running and h.life.node.is_leader]
        return max(leading, key=lambda host: host.life.node.term, default=None)  # type: ignore

    def _host(self, number: int, at: float) -> Host:
        host = self.leader() if number == LEADER else self.hosts[number]
        return host or self.hosts[int(at * 1e6) % len(self.hosts)]

    def strike(self, fault: Fault) -> None:
        """Let a fault happen."""
        if self._is_healed:
            return
        host = self._host(fault.who, fault.at)
        self.world.note(host.id, f"fault: {fault.kind}", *fault.args)
        self.counts[f"fault: {fault.kind}"] += 1
        life = host.life
        match fault.kind, fault.args:
            case Kind.WIPE, (float(down_s),):
                self._wipe(host, down_s)
            case Kind.CRASH, (Crash() as how, int(count), float(down_s)):
                if life is not None:
                    self._crash(life, how, count, down_s)
            case Kind.BLACKOUT, (float(down_s),):
                for each in self.hosts:
                    if each.life is not None:
                        self._down(each, each.rng.uniform(0, down_s))
                        each.life.crash("in a blackout")
            case Kind.STOP, (float(down_s),):
                if life is not None and life.is_running:
                    self._down(host, down_s)
                    life.wake(life.scope.cancel)
            case Kind.PAUSE, (float(seconds),):
                host.pauses += 1
                self.lasting(seconds, self._resume, host)
            case Kind.CLOCK, (float(rate), float(seconds)):
                host.clock.set_rate(rate)
                self.lasting(seconds, host.clock.set_rate, 1.0)
            case Kind.SLOW_DISK, (float(sync_s), float(seconds)):
                host.disk.sync_s = sync_s
                self.lasting(seconds, self._usual_disk, host.disk)
            case Kind.STALLED_DISK, (float(seconds),):
                host.disk.stalled_until = self.world.now + seconds
            case Kind.FULL_DISK, (float(seconds),):
                host.disk.full_until = self.world.now + seconds
                self.lasting(seconds, self._usual_disk, host.disk)
            case Kind.BROKEN_DISK, (float(),):
                host.disk.breaks_next = True
            case Kind.CUT, (int(other), float(seconds)):
                self._cut_pairs([(host, self.hosts[other])], seconds)
            case Kind.ISOLATE, (Way() as way, float(seconds)):
                pairs = [(host, other) for other in self.hosts if way is not Way.IN]
                pairs += [(other, host) for other in self.hosts if way is not Way.OUT]
                self._cut_pairs(pairs, seconds)
            case Kind.PARTITION, (tuple() as numbers, float(seconds)):
                pairs = [
                    (one, other)
                    for one in self.hosts
                    for other in self.hosts
                    if (one.number in numbers) != (other.number in numbers)
                ]
                self._cut_pairs(pairs, seconds)
            case Kind.BAD_NETWORK, (float(loss), float(duplication), float(jitter), float(seconds)):
                usual = self.scenario.network
                bad = dataclasses.replace(
                    usual, ordered=False, jitter_s=jitter, loss=loss, duplication=duplication
                )
                self._use_network(bad)
                self.lasting(seconds, self._use_network, usual)
            case Kind.RESET, (int(other),):
                self.connections.reset(host.id, self.hosts[other].id)
            case Kind.MISTAKE, (int(other), float(seconds)):
                host.mistaken.add(self.hosts[other].id)
                self._tell(host, self.hosts[other])
                self.lasting(seconds, self._see_clearly, host, self.hosts[other])
            case (Kind.ADD | Kind.REMOVE) as kind, (int(at),):
                changer = self._host(at, fault.at)
                self.nursery.start_soon(self._change, changer, host.id, kind is Kind.ADD)
            case Kind.BURST, (int(count),):
                for _ in range(count):
                    self.nursery.start_soon(self.write_at, host)
            case Kind.TRANSFER, ():
                self.nursery.start_soon(self._transfer, host)
            case unknown:
                raise AssertionError(f"a fault that nobody knows: {unknown}")

    def _crash(self, life: Life, how: Crash, count: int, down_s: float) -> None:
        self._down(life.host, down_s)
        match how:
            case Crash.NOW:
                life.crash("between steps")
            case Crash.AT_SEND:
                life.frames_to_death = count
            case Crash.BEFORE_WRITE | Crash.AFTER_WRITE:
                life.disk.crash = (how, count)

    def _wipe(self, host: Host, down_s: float) -> None:
        """The machine comes back without its disk: as a new node, to the others a stranger."""
        if self._lost is not None:
            return
        if host.life is not None:
            host.life.crash("with its disk")
        host.downs += 1  # for ever
        self._lost = host
        new = Host(self.world, host.number, self.scenario, key="2")
        new.downs += 1
        self.hosts[host.number] = self.by_id[new.id] = new
        for other in self.hosts:
            if other.life is not None:
                self._set_peers(other.life)
        self.lasting(down_s, self._up, new)
        self.nursery.start_soon(self._replace, host.id, new.id)

    async def _replace(self, lost: NodeId, new: NodeId) -> None:
        """What the daemons' supervisor does: the voter that is gone makes room for the new one."""
        for node_id, adding in ((lost, False), (new, True)):
            while not self._votes(node_id, adding):
                leader = self.leader()
                if leader is not None:
                    await self._change(leader, node_id, adding)
                await trio.sleep(self.rng.uniform(0.2, 1.0))
        self._replaced.set()

    def _votes(self, node_id: NodeId, expected: bool) -> bool:
        """Whether it is committed that the node is a voter, or is none."""
        leader = self.leader()
        if leader is None or leader.life is None or leader.life.node._change_is_open():
            return False
        return (node_id in leader.life.node.voters) == expected

    def _down(self, host: Host, seconds: float) -> None:
        host.downs += 1
        self.lasting(seconds, self._up, host)

    def _up(self, host: Host) -> None:
        host.downs -= 1
        self.start(host)

    def _resume(self, host: Host) -> None:
        host.pauses -= 1
        if host.pauses:
            return
        self.world.note(host.id, "goes on after a pause")
        host.resumed.set()
        host.resumed = trio.Event()
        # What came meanwhile and the timers that are due: either may be first.
        if host.rng.random() < 0.5:
            self._tick(host)
        self._catch_up(host)

    def _catch_up(self, host: Host) -> None:
        """Let what came during a pause happen, in its order and before what comes now."""
        if host.pauses:
            return
        if not host.inbox:
            self._tick(host)
            return
        whose, what, args = host.inbox[0]
        if not whose.is_dead:
            what(*args)
        host.inbox.popleft()
        self.world.after(CATCH_UP_STEP_S, self._catch_up, host)

    def _tick(self, host: Host) -> None:
        if host.life is not None:
            host.life.node._wake.set()

    def _usual_disk(self, disk: SimDisk) -> None:
        disk.sync_s = disk.usual_sync_s
        disk.stalled_until = disk.full_until = 0.0

    def _cut_pairs(self, pairs: list[tuple[Host, Host]], seconds: float) -> None:
        for source, to in pairs:
            self._cut(source, to)
            self.lasting(seconds, self._mend, source, to)

    def _use_network(self, network: Network) -> None:
        self.network.now = self.connections.now = network

    def _see_clearly(self, host: Host, other: Host) -> None:
        host.mistaken.discard(other.id)
        self._tell(host, other)

    async def _change(self, asked: Host, node_id: NodeId, adding: bool) -> None:
        life = asked.life
        if life is None or not life.is_running:
            return
        change = life.node.add_voter if adding else life.node.remove_voter
        what = "add voter" if adding else "remove voter"
        self._changing_until = self.world.now + CHANGE_TIMEOUT_S + LATE_S
        try:
            await life.call(change, node_id, CHANGE_TIMEOUT_S)
        except ChangeRefused:
            self.counts[f"{what}: refused"] += 1
        except (RaftError, Gone):
            self.counts[f"{what}: unknown"] += 1
        else:
            life.note(f"{what}: done", node_id, *sorted(life.node.voters))
            self.counts[f"{what}: done"] += 1

    async def _transfer(self, host: Host) -> None:
        life = host.life
        if life is None or not life.is_running or not life.node.is_leader:
            return
        try:
            await life.call(life.node.transfer_leadership, CHANGE_TIMEOUT_S)
        except (RaftError, Gone):
            self.counts["transfer: failed"] += 1
        else:
            self.counts["transfer: done"] += 1

    # The end.

    async def replace(self) -> None:
        """Wait until the node that lost its disk is no voter any more, and its successor is."""
        if self._lost is None:
            return
        with trio.move_on_after(PROGRESS_BOUND_S) as scope:
            await self._replaced.wait()
        if scope.cancelled_caught:
            self.checker.violated("progress", f"{self._lost.id} is not replaced as a voter")

    async def limp(self) -> Host | None:
        """Let something go on being wrong with one host, if the others can do without it.

        Returns when the others have had the time to notice.
        """
        lame = self.scenario.lame
        if lame is None:
            return None
        await self.settle()
        await trio.sleep_until(self._changing_until)
        if self.world.now < self._changing_until:
            return None  # the voters still change
        host = self._host(lame.who, lame.seconds)
        absent = {host.id} if self._lost is None else {host.id, self._lost.id}
        for other in self.hosts:
            voters = other.life.node.voters if other.life else frozenset()
            if 2 * len(voters - absent) <= len(voters):
                return None
        self.counts[f"limps: {lame.kind}"] += 1
        self._is_healed = False
        self.strike(Fault(0.0, lame.kind, host.number, lame.args))
        self._is_healed = True
        self._lame_until = self.world.now + lame.seconds
        await trio.sleep(NOTICED_S)
        return host

    async def recover(self) -> None:
        """Heal the host that limps."""
        if self.scenario.lame is not None and self.scenario.lame.kind is Kind.STALLED_DISK:
            await trio.sleep_until(self._lame_until)  # nobody takes a write back from the device
        self.heal()

    async def settle(self, limping: Host | None = None) -> float:
        """Wait until all hosts have applied the same; returns how many seconds it took.

        If one is still limping, the others must not wait for it.
        """
        begun_at = self.world.now
        while (difference := self._difference(limping)) is not None:
            if self.world.now > begun_at + PROGRESS_BOUND_S:
                self.checker.violated(
                    "progress", f"{PROGRESS_BOUND_S:g} s after all was healed: {difference}"
                )
                return PROGRESS_BOUND_S
            await trio.sleep(SETTLED_CHECK_S)
        return self.world.now - begun_at

    def _difference(self, limping: Host | None) -> str | None:
        hosts = [host for host in self.hosts if host is not limping]
        lives = [host.life for host in hosts if host.life is not None]
        running = [life for life in lives if life.is_running]
        if len(running) < len(hosts):
            return "not all hosts run"
        leader = self.leader()
        if leader is None or any(life.node.leader != leader.id for life in running):
            return f"leaders are {[life.node.leader for life in running]}"
        cores = [life.node._core for life in running]
        progress = {(c.last_index(), c.commit_index(), c.applied_index()) for c in cores}
        if len(progress) > 1 or len(set(progress.pop())) > 1:
            progresses = [(c.last_index(), c.commit_index(), c.applied_index()) for c in cores]
            return f"last, commit and applied index are {progresses}"
        if len({life.node.voters for life in running}) > 1:
            return "they do not agree on the voters"
        if len({life.machine.state.fingerprint() for life in running}) > 1:
            self.checker.violated("state machine safety", "the final states differ")
        return None


async def _nobody_writes(host: Host) -> None:
    """In the place of clients, where there are none."""


def tune(tuning: Tuning) -> None:
    """Set the product's limits, and have its journals watched."""
    node_module.Journal = WatchedJournal  # type: ignore[misc]
    node_module.COMPACT_ENTRIES = tuning.compact_entries
    journal_module.COMPACTION_TAIL = tuning.compaction_tail
    private_module.SNAPSHOT_CHUNK_SIZE = tuning.snapshot_chunk
    transport_module.SNAPSHOT_CHUNK_SIZE = tuning.snapshot_chunk
    private_module.MAX_ENTRIES = tuning.max_entries
    fence_module.CATCH_UP_ENTRIES = tuning.catch_up_entries


FOUNDING = encode(
    Proposal(
        "founding",
        0.0,
        FoundCluster(
            "simulated",
            CertificateAuthority(b"", b""),
            b"",
            Member(NodeId("A"), "a", "", "", "", Capacity(1, 1, 1), 0.0),
            User("admin", "", "admin", 0.0),
        ),
    )
)
