"""Runs one scenario from beginning to end and judges it."""

import hashlib
import logging
import time
from collections import Counter
from dataclasses import dataclass

import trio

from tests.sim.checks import Violation
from tests.sim.clients import KEYS, Client, last_words
from tests.sim.cluster import Cluster, Host
from tests.sim.history import History, Kind
from tests.sim.linearizability import Outcome, judge
from tests.sim.plan import Scenario
from tests.sim.world import START_S, World

BURST_PATIENCE_S = 1.0  # of a client that writes once, through one host


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a scenario. `violation` is None if nothing was wrong."""

    scenario: Scenario
    violation: Violation | None
    counts: Counter[str]  # what happened how often
    virtual_s: float
    cpu_s: float
    settled_s: float  # from the healing until all hosts agreed
    log: list[tuple[object, ...]]

    @property
    def digest(self) -> str:
        """Equal for two runs if, and only if, the same happened at the same times."""
        return hashlib.sha256(repr((self.log, sorted(self.counts.items()))).encode()).hexdigest()


def run(scenario: Scenario, *, trace: bool = False) -> Result:
    """Run a scenario; the same one always gives the same result. A trace logs every frame."""
    logging.disable(logging.CRITICAL)
    begun_s = time.process_time()
    world = World(scenario.seed, trace=trace)
    play = _Play(world, scenario)
    violation = None
    try:
        world.run(play.run)
    except Violation as error:
        violation = error
    return Result(
        scenario,
        violation,
        play.counts,
        world.now - START_S,
        time.process_time() - begun_s,
        play.settled_s,
        world.log,
    )


class _Play:
    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self.counts: Counter[str] = Counter()
        self.settled_s = 0.0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(self.world, self.scenario, nursery)
            self.counts = cluster.counts
            try:
                await self._run(cluster)
            finally:
                nursery.cancel_scope.cancel()

    async def _run(self, cluster: Cluster) -> None:
        world, scenario = self.world, self.scenario
        history = History()
        clients = [Client(cluster, history, cluster.hosts) for _ in range(scenario.clients)]

        async def write_at(host: Host) -> None:
            client = Client(cluster, history, [host], BURST_PATIENCE_S)
            clients.append(client)
            await client.operate(Kind.WRITE, f"u{client.rng.randrange(KEYS)}")

        cluster.write_at = write_at
        await cluster.begin()
        for fault in scenario.faults:
            world.at(START_S + fault.at, cluster.strike, fault)
        heals_at = START_S + scenario.duration_s
        async with trio.open_nursery() as nursery:
            for client in clients[: scenario.clients]:
                nursery.start_soon(client.run, heals_at)
            await trio.sleep_until(heals_at)
            cluster.heal()
        await cluster.replace()
        limping = await cluster.limp()
        if limping is not None:
            await cluster.settle(limping)
            clients += await last_words(cluster, history, limping)
            await cluster.recover()
        self.settled_s = await cluster.settle()
        clients += await last_words(cluster, history)
        await cluster.settle()
        self._judge(cluster, history, clients)

    def _judge(self, cluster: Cluster, history: History, clients: list[Client]) -> None:
        checker = cluster.checker
        for host in cluster.hosts:
            assert host.life is not None
            recent = host.life.machine.state.recent
            for client in clients:
                for lost in [c for c in client.acknowledged if c not in recent]:
                    checker.violated("acknowledged is kept", f"{host.id} has nothing of {lost!r}")
        for verdict in judge(history.operations):
            if verdict.outcome is Outcome.VIOLATION:
                checker.violated("linearizable", f"{verdict.key}\n{verdict.explanation}")
            elif verdict.outcome is Outcome.UNDECIDED:
                self.counts["history undecided"] += 1
