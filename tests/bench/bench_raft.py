"""Measures consensus beside its alternatives, in turns within one run; three processes each.

    python -m tests.bench.bench_raft [--kills N] [--rounds N] [--directory DIR]

Ours with plain links and with the daemon's TLS, syncing on; PySyncObj as it comes, which does not
sync; and etcd, which syncs. Prints commit latency through leader and follower, pipelined commits
per second, what an idle node takes, and the time from kill -9 of the leader to the next
acknowledged write. Exits with 1 when a goal was missed or something could not be measured.
"""

import argparse
import datetime
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, Protocol

from ollamad.core.ids import NodeId
from ollamad.peers.identity import Identity, issue_certificate, make_ca
from tests.bench.bench_raft_process import Answer, Failed, Remote, free_ports
from tests.bench.etcd_members import Members, NoEtcd

ROUNDS = 5
RUNS = 200  # commits in a row, in each round and for each role
BATCH_RUNS = 8  # where one takes 0.1 or 0.2 s
WARM_UP_RUNS = 50
PIPELINED_S = 0.7  # in each round and for each role
DEPTH = 1000  # commits under way when pipelined
KILLS = 30
ETCD_KILLS = 10
IDLE_S = 5.0
READY_S = 30.0
MIN_FOR_P99 = 100  # values below which a p99 means nothing

GOAL_PIPELINED = 10_000
GOAL_FAILOVER_P50_S, GOAL_FAILOVER_P99_S = 0.8, 1.5


class System(Protocol):
    """Three processes that commit commands together."""

    name: str
    runs: int

    def latency(self, is_leader: bool, runs: int) -> Answer: ...
    def pipelined(self, is_leader: bool) -> Answer | None: ...
    def close(self) -> None: ...


class Ours:
    """Our nodes, with plain links or the daemon's TLS."""

    runs = RUNS

    def __init__(self, directory: Path, use_tls: bool) -> None:
        self.name = "ours, TLS links" if use_tls else "ours, plain links"
        self._use_tls = use_tls
        self._directories: dict[NodeId, Path] = {}
        authority = make_ca(datetime.datetime.now(datetime.UTC))
        for name in "abc":
            home = directory / name
            home.mkdir(parents=True)
            identity = Identity.load_or_create(home)
            now = datetime.datetime.now(datetime.UTC)
            pem = issue_certificate(authority, identity.public_key, now)
            identity.install(pem, authority.certificate_pem)
            self._directories[identity.node_id] = home
        self._ports = dict(zip(self._directories, free_ports(3), strict=True))
        self.nodes: dict[NodeId, Remote] = {}
        try:
            for node_id in self._ports:
                self._start(node_id)
            founder, *others = self.nodes
            for node_id in others:
                self.nodes[founder].ask("add", node_id=node_id)
            self.leader()
        except BaseException:
            self.close()
            raise

    def _start(self, node_id: NodeId) -> None:
        settings = {
            "id": node_id,
            "ports": self._ports,
            "directory": str(self._directories[node_id]),
            "use_tls": self._use_tls,
        }
        command = (sys.executable, "-m", "tests.bench.bench_raft_node", json.dumps(settings))
        self.nodes[node_id] = Remote(*command)

    def leader(self) -> NodeId:
        """Wait until all nodes follow one leader and hold the same; its id."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            views = [node.ask("status") for node in self.nodes.values()]
            if all(view == views[0] for view in views) and views[0]["leader"] is not None:
                return NodeId(views[0]["leader"])
            time.sleep(0.01)
        raise Failed("our nodes have no leader")

    def _node(self, is_leader: bool) -> Remote:
        leader = self.leader()
        return self.nodes[leader if is_leader else min(set(self.nodes) - {leader})]

    def latency(self, is_leader: bool, runs: int) -> Answer:
        return self._node(is_leader).ask("latency", runs=runs)

    def pipelined(self, is_leader: bool) -> Answer:
        return self._node(is_leader).ask("pipelined", time_s=PIPELINED_S, depth=DEPTH)

    def idle_cpu(self) -> list[float]:
        """The share of a core that each node takes when nothing happens, the leader first."""
        leader = self.leader()
        order = [leader, *sorted(set(self.nodes) - {leader})]
        before = [float(self.nodes[n].ask("cpu")["cpu_s"]) for n in order]
        time.sleep(IDLE_S)
        after = [float(self.nodes[n].ask("cpu")["cpu_s"]) for n in order]
        return [(b - a) / IDLE_S for a, b in zip(before, after, strict=True)]

    def fail_over(self) -> float:
        """Kill the leader; seconds until a write was acknowledged. Then start it again."""
        leader = self.leader()
        left = self.nodes[random.choice(sorted(set(self.nodes) - {leader}))]
        started = time.monotonic()
        self.nodes[leader].process.kill()
        took_s = float(left.ask("commit")["at"]) - started
        self.nodes[leader].kill()
        self._start(leader)
        return took_s

    def close(self) -> None:
        for node in self.nodes.values():
            node.kill()


class Stock:
    """PySyncObj as it comes."""

    def __init__(self, directory: Path, use_batch: bool) -> None:
        self.name = f"PySyncObj, {'batch' if use_batch else 'no batch'}, not synced"
        self.runs = BATCH_RUNS if use_batch else RUNS
        ports = free_ports(3)
        self._nodes: list[Remote] = []
        directory.mkdir(parents=True)
        try:
            for port in ports:
                settings = {
                    "port": port,
                    "others": [other for other in ports if other != port],
                    "journal": str(directory / f"{port}.journal"),
                    "use_batch": use_batch,
                }
                command = (sys.executable, "-m", "tests.bench.bench_raft_stock")
                self._nodes.append(Remote(*command, json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def _node(self, is_leader: bool) -> Remote:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            views = [node.ask("status") for node in self._nodes]
            if len({view["leader"] for view in views}) == 1 and views[0]["leader"] is not None:
                for node, view in zip(self._nodes, views, strict=True):
                    if (view["leader"] == view["me"]) == is_leader:
                        return node
            time.sleep(0.05)
        raise Failed(f"{self.name} has no leader")

    def latency(self, is_leader: bool, runs: int) -> Answer:
        return self._node(is_leader).ask("latency", runs=runs)

    def pipelined(self, is_leader: bool) -> Answer:
        return self._node(is_leader).ask("pipelined", time_s=PIPELINED_S, depth=DEPTH)

    def truncations(self) -> int:
        """How often a node deleted entries that it had applied."""
        return sum(int(node.ask("status")["truncations"]) for node in self._nodes)

    def close(self) -> None:
        for node in self._nodes:
            node.kill()


class Etcd:
    """etcd, by one of its two ways in."""

    runs = RUNS

    def __init__(self, members: Members, way: str) -> None:
        self.name = f"etcd 3.5.1, {way}"
        self._members, self._way = members, way

    def latency(self, is_leader: bool, runs: int) -> Answer:
        port = self._members.port(is_leader)
        return self._members.client.ask("latency", port=port, way=self._way, runs=runs)

    def pipelined(self, is_leader: bool) -> Answer | None:
        if self._way != "gRPC":
            return None
        port = self._members.port(is_leader)
        return self._members.client.ask("pipelined", port=port, time_s=PIPELINED_S, depth=DEPTH)

    def close(self) -> None:
        pass  # the members are closed by who made them


class Figures:
    """What was measured of one system, by role: whether it was the leader."""

    def __init__(self) -> None:
        self.times: dict[bool, list[float]] = defaultdict(list)
        self.rates: dict[bool, list[float]] = defaultdict(list)
        self.failed = 0

    def p50(self, is_leader: bool) -> float:
        return quantile(self.times[is_leader], 0.5)

    def rate(self, is_leader: bool) -> float:
        return quantile(self.rates[is_leader], 0.5)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def disk_floor(directory: Path, *, grows: bool) -> float:
    """p50 in seconds of a small write and its sync here: what no commit can beat."""
    times = []
    size, count = 4096, 200
    with (directory / "floor").open("wb", buffering=0) as file:
        if not grows:
            file.write(bytes(size * count))
            os.fsync(file.fileno())
            file.seek(0)
        for _ in range(count):
            started = time.perf_counter()
            file.write(bytes(size))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return quantile(times, 0.5)


def measure(systems: list[System], rounds: int) -> dict[str, Figures]:
    """All systems in turns, each time in another order, so that noise hits all alike."""
    figures = {system.name: Figures() for system in systems}
    for system in systems:
        for is_leader in (True, False):
            system.latency(is_leader, min(WARM_UP_RUNS, system.runs))
    for _ in range(rounds):
        for system in random.sample(systems, len(systems)):
            found = figures[system.name]
            for is_leader in (True, False):
                found.times[is_leader] += system.latency(is_leader, system.runs)["times"]
                rate = system.pipelined(is_leader)
                if rate is not None:
                    found.rates[is_leader].append(rate["done"] / rate["took_s"])
                    found.failed += rate.get("failed", 0)
    return figures


def report(figures: dict[str, Figures]) -> None:
    print(f"\n{'commits':34}{'leader ms':>16}{'follower ms':>16}{'pipelined/s':>18}")
    print(f"{'':34}{'p50     p99':>16}{'p50     p99':>16}{'leader  follower':>18}")
    for name, found in figures.items():
        line = f"{name:34}"
        for is_leader in (True, False):
            times = found.times[is_leader]
            p99 = f"{quantile(times, 0.99) * 1e3:.2f}" if len(times) >= MIN_FOR_P99 else "-"
            line += f"{found.p50(is_leader) * 1e3:9.2f}{p99:>7}"
        if found.rates:
            line += f"{found.rate(True):10,.0f}{found.rate(False):8,.0f}"
        if found.failed:
            line += f"  {found.failed} failed"
        print(line)


def report_ratios(figures: dict[str, Figures]) -> None:
    ours, *others = figures
    print(f"\n{'p50 of ' + ours:34}{'leader':>16}{'follower':>16}{'pipelined':>18}")
    for name in others:
        if name.startswith("ours"):
            continue
        line = f"{'  / ' + name:34}"
        for is_leader in (True, False):
            line += f"{figures[ours].p50(is_leader) / figures[name].p50(is_leader):16.2f}"
        if figures[name].rates:
            line += f"{figures[ours].rate(True) / figures[name].rate(True):18.2f}"
        print(line)


def fail_over(name: str, kill_once: Callable[[], float], kills: int) -> list[float]:
    times = []
    for _ in range(kills):
        time.sleep(random.uniform(0.2, 0.4))  # not always at the same moment between heartbeats
        times.append(kill_once())
    p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
    print(f"{name:34}p50 {p50:.2f} s  p99 {p99:.2f} s  over {kills} kills", flush=True)
    return times


def bench(directory: Path, rounds: int, kills: int) -> bool:
    """Returns whether all goals were reached."""
    goals: dict[str, bool] = {}
    with ExitStack() as stack:
        ours = Ours(directory / "plain", use_tls=False)
        stack.callback(ours.close)
        systems: list[System] = [ours]
        for make in (
            lambda: Ours(directory / "tls", use_tls=True),
            lambda: Stock(directory / "no-batch", use_batch=False),
            lambda: Stock(directory / "batch", use_batch=True),
        ):
            system: System = make()
            stack.callback(system.close)
            systems.append(system)
        members: Members | None = None
        try:
            (directory / "etcd").mkdir()
            members = Members(directory / "etcd")
            stack.callback(members.close)
            systems += [Etcd(members, "gRPC"), Etcd(members, "gateway")]
        except NoEtcd as error:
            print(f"etcd is not measured: {error}")
        print(
            f"3 processes each, on loopback; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
        )
        grown, written = disk_floor(directory, grows=True), disk_floor(directory, grows=False)
        print(f"4 KiB and fdatasync alone: p50 {grown * 1e3:.2f} ms where the file grows,", end=" ")
        print(f"{written * 1e3:.2f} ms where it does not", flush=True)
        figures = measure(systems, rounds)
        report(figures)
        for system in systems:
            if isinstance(system, Stock) and (count := system.truncations()):
                print(f"{system.name}: {count} times entries were deleted that had been applied")
        report_ratios(figures)
        print("\nidle, leader first:", *(f"{share:.1%}" for share in ours.idle_cpu()), "of a core")
        print("\nfrom kill -9 of the leader to the next acknowledged write")
        times = fail_over(ours.name, ours.fail_over, kills)
        if members is not None:
            fail_over("etcd 3.5.1", members.fail_over, min(kills, ETCD_KILLS))
            for is_leader, role in ((True, "leader"), (False, "follower")):
                best = min(figures[s.name].p50(is_leader) for s in systems[-2:])
                goals[f"p50 on the {role} no slower than etcd's, whichever way is faster"] = (
                    figures[ours.name].p50(is_leader) <= best
                )
        else:
            goals["etcd measured"] = False
        for is_leader, role in ((True, "leader"), (False, "follower")):
            rate = figures[ours.name].rate(is_leader)
            goals[f"{GOAL_PIPELINED:,} pipelined commits/s on the {role}"] = rate >= GOAL_PIPELINED
        goals[f"failover p50 {GOAL_FAILOVER_P50_S} s and p99 {GOAL_FAILOVER_P99_S} s"] = (
            quantile(times, 0.5) <= GOAL_FAILOVER_P50_S
            and quantile(times, 0.99) <= GOAL_FAILOVER_P99_S
        )
    print()
    for goal, reached in goals.items():
        print(f"{'reached' if reached else 'MISSED':9}{goal}")
    return all(goals.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--directory", help="where the journals go: the disk that is measured")
    arguments = parser.parse_args()

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)  # by way of `bench`, which ends its processes

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        return 0 if bench(Path(directory), arguments.rounds, arguments.kills) else 1


if __name__ == "__main__":
    sys.exit(main())
