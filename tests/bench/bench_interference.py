"""What a transfer of a model costs those who use the nodes meanwhile.

    python -m tests.bench.bench_interference

Two daemons on loopback, mutual TLS between them; files are in memory. Windows with a transfer and
without take turns. Measured on the node that sends and on the one that receives: how long a health
check takes (goal: p99 at most 5 ms more), and how many tokens a second a stream gets (goal: at most
5 % fewer). The health checks run beside a transfer at full speed and at the speed of a gigabit;
the tokens beside one that is slowed by `transfer.while_generating`, as it is by default.
"""

import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.bench.bench_engine import prompt_of
from tests.bench.bench_swarm import Meter, scratch
from tests.conftest import smollm2_file
from tests.fakes.gguf_files import LLAMA, TENSORS, gguf_bytes
from tests.system.harness import Cluster, Node, wait_until

MIB = 1 << 20
ROUNDS = 3
CHECK_EVERY_S = 0.005
QUIET_S = 4.0  # a window without a transfer
GOAL_HEALTH_MS = 5.0
GOAL_PACE = 0.95
GIGABIT = "119MB"
COPY_S = 120.0
STREAM_TOKENS = 400

Window = Callable[[threading.Event], list[float]]  # measures until the event is set


def large_file(path: Path, mib: int) -> Path:
    """A GGUF file of about that size, whose pieces all differ."""
    rows = mib * MIB // 4096
    header = gguf_bytes(LLAMA, TENSORS | {"blk.0.ffn_up.weight": ((1024, rows), 0)})
    with open(path, "wb") as file:
        file.write(header[: len(header) - rows * 4096])
        for _ in range(mib):
            file.write(os.urandom(MIB))
    return path


def checks(node: Node) -> Window:
    """Seconds that each health check took, one every few milliseconds over one connection."""

    def window(over: threading.Event) -> list[float]:
        host, _, port = node.address.rpartition(":")
        request = b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
        times: list[float] = []
        with socket.create_connection((host, int(port))) as connection:
            while not over.is_set():
                began = time.perf_counter()
                connection.sendall(request)
                if not connection.recv(1 << 16).startswith(b"HTTP/1.1 200"):
                    raise RuntimeError("a health check failed")
                times.append(time.perf_counter() - began)
                time.sleep(max(0.0, CHECK_EVERY_S - times[-1]))
        return times

    return window


def tokens(node: Node, markers: Iterator[int]) -> Window:
    """The moments at which tokens of one stream after the other arrived."""

    def window(over: threading.Event) -> list[float]:
        times: list[float] = []
        while not over.is_set():
            options = {"temperature": 0, "num_predict": STREAM_TOKENS}
            prompt = prompt_of(next(markers))
            with node.stream("/generate", model="bench", prompt=prompt, raw=True,
                             options=options) as stream:  # fmt: skip
                for _ in stream:
                    times.append(time.perf_counter())
                    if over.is_set():
                        break
        return times

    return window


def beside(window: Window, work: Callable[[], object]) -> list[float]:
    """What a window measures while something is done."""
    over = threading.Event()
    measured: list[list[float]] = []
    thread = threading.Thread(target=lambda: measured.append(window(over)))
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    [found] = measured
    return found


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Bench:
    """Two nodes, and files that neither has sent to the other yet."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.directory = cluster, directory
        self._count = 0

    def transfer(self, source: Node, target: Node, mib: int) -> tuple[Callable[[], None], str]:
        """Have a new file on one node; what copies it to the other one, and its name."""
        self._count += 1
        name = f"file{self._count}"
        path = large_file(self.directory / name, mib)
        source.import_model(path, name)
        path.unlink()

        def copy() -> None:
            source.post(f"/models/{name}/download", {"nodes": [target.id]})

            # Not by asking the node: questions, 20 a second, cost a stream more than the transfer.
            manifests = target.data_dir / "models" / "manifests"
            wait_until(f"{name} is copied", lambda: any(manifests.glob(f"**/{name}/*")), COPY_S)

        return copy, name

    def compare(
        self, window: Window, source: Node, target: Node, mib: int
    ) -> tuple[list[list[float]], list[list[float]], float, float]:
        """Windows without and with a transfer, in turns; its bytes/s and the load beside it."""
        without, during, rates, loads = [], [], [], []
        for _ in range(ROUNDS):
            copy, name = self.transfer(source, target, mib)
            without.append(beside(window, lambda: time.sleep(QUIET_S)))
            meter, began = Meter(), time.perf_counter()
            during.append(beside(window, copy))
            rates.append(mib * MIB / (time.perf_counter() - began))
            loads.append(meter.load())
            source.delete(f"/models/{name}")
        return without, during, statistics.median(rates), statistics.median(loads)


def compare_health(bench: Bench, label: str, mib: int) -> bool:
    first, second = bench.cluster.nodes
    reached = True
    for role, asked in (("sends", first), ("receives", second)):
        without, during, rate, load = bench.compare(checks(asked), first, second, mib)
        quiet, busy = [t for w in without for t in w], [t for w in during for t in w]
        cells = [1000 * percentile(v, p) for p in (0.5, 0.99) for v in (quiet, busy)]
        added = cells[3] - cells[2]
        reached = reached and added <= GOAL_HEALTH_MS
        print(
            f"{label:12}{role:10}{rate / 1e6:8.0f}{load:7.0%}{len(busy):8}"
            + "".join(f"{cell:9.2f}" for cell in cells)
            + f"{added:+9.2f}",
            flush=True,
        )
    return reached


def compare_pace(bench: Bench, mib: int) -> bool:
    first, second = bench.cluster.nodes
    markers = iter(range(1, 1 << 30))
    reached = True
    for role, source, target in (("sends", first, second), ("receives", second, first)):
        window = tokens(first, markers)
        without, during, rate, load = bench.compare(window, source, target, mib)
        speeds = [
            statistics.median((len(w) - 1) / (w[-1] - w[0]) for w in windows)
            for windows in (without, during)
        ]
        ratio = speeds[1] / speeds[0]
        reached = reached and ratio >= GOAL_PACE
        print(
            f"{role:12}{rate / 1e6:8.0f}{load:7.0%}{speeds[0]:10.1f}{speeds[1]:10.1f}{ratio:8.3f}",
            flush=True,
        )
    return reached


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    reached = []
    environment = {
        "OLLAMAD_MODELS__REPLICAS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMAD_RATE_LIMITS__GENERAL": "0",
        "OLLAMAD_RATE_LIMITS__MODEL_OPS": "0",
    }
    print(f"health checks, goal: p99 at most {GOAL_HEALTH_MS:+.0f} ms")
    print(f"{'transfer':12}{'node':10}{'MB/s':>8}{'load':>7}{'checks':>8}{'p50':>9}{'with':>9}"
          f"{'p99':>9}{'with':>9}{'ms':>9}")  # fmt: skip
    for label, more in (
        ("full speed", {}),
        ("1 Gbit/s", {"OLLAMAD_TRANSFER__MAX_UPLOAD": GIGABIT}),
    ):
        with scratch() as directory, Cluster(directory, environment | more) as cluster:
            cluster.found()
            cluster.grow()
            reached.append(compare_health(Bench(cluster, directory), label, 512))
    print(f"\ntokens of one stream, goal {GOAL_PACE}")
    print(f"{'node':12}{'MB/s':>8}{'load':>7}{'tokens/s':>10}{'with':>10}{'ratio':>8}")
    with scratch() as directory, Cluster(directory, environment) as cluster:
        first = cluster.found()
        cluster.grow()
        first.post("/distribution/auto-configure", {"enabled": False})  # nor copied when hot
        first.import_model(smollm2_file(), "bench")
        first.answer("/generate", model="bench", prompt="")
        reached.append(compare_pace(Bench(cluster, directory), 128))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
