"""How long a stream stands still when its node is lost, detection included: by kind of loss.

    python -m tests.bench.bench_failover

Three daemons on loopback; the model is in the memory of two, and the client talks to the third.
Each time the node that serves is killed -9, or its runner, or it is stopped in its tracks
(SIGSTOP), after some tokens; measured is the longest time without a token, at the client.
"""

import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import smollm2_file
from tests.system.harness import Cluster, Node, ok, wait_until

MODEL = "bench"
LENGTH = 60  # tokens of an answer
CUT = 20  # of them before the loss
GOAL_S = 1.5  # p50, killed -9
BODY = {
    "model": MODEL,
    "prompt": "Tell me a long story about a lighthouse and the people who live near it.",
    "options": {"temperature": 0, "num_predict": LENGTH, "stop": ["no such text"]},
}


def kill_node(node: Node) -> None:
    node.kill()


def kill_runner(node: Node) -> None:
    for runner in node.runners():
        runner.kill()


def stop_node(node: Node) -> None:
    node.pause()


# What, how often, and how it is made good again.
LOSSES: tuple[tuple[str, Callable[[Node], None], int], ...] = (
    ("kill -9 of the node", kill_node, 10),
    ("kill -9 of the runner", kill_runner, 6),
    ("SIGSTOP of the node", stop_node, 5),
)


def load_on(entry: Node, holders: list[Node]) -> None:
    """Have both holders keep the model in memory."""
    for node in holders:
        others = [other for other in holders if other is not node]
        for other in others:
            entry.post(f"/nodes/{other.id}/drain")
            wait_until("it drains", lambda o=other: entry.node(o)["draining"])
        ok(entry.answer("/generate", **BODY | {"options": {"num_predict": 1}}))
        for other in others:
            entry.post(f"/nodes/{other.id}/undrain")
            wait_until("it does not", lambda o=other: not entry.node(o)["draining"])
    time.sleep(1.5)  # a beat tells it


def silence_s(entry: Node, holders: list[Node], lose: Callable[[Node], None]) -> float:
    """The longest time without a token in an answer whose node is lost."""
    longest, lines = 0.0, 0
    with entry.stream("/generate", **BODY | {"failover": "continue"}) as stream:
        serving = next(node for node in holders if node.id == stream.served_by)
        heard = time.monotonic()
        for line in stream:
            now = time.monotonic()
            lines += 1
            if lines > 1:
                longest = max(longest, now - heard)
            heard = now
            if "error" in line:
                raise RuntimeError(str(line))
            if lines == CUT:
                lose(serving)
            if line["done"]:
                assert line["eval_count"] == LENGTH, line
                assert len(line["failovers"]) == 1, line
    if serving.running:
        serving.resume()
    else:
        serving.start()
    return longest


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    model = smollm2_file()
    environment = {"OLLAMAD_MODELS__REPLICAS": "1", "OLLAMA_KEEP_ALIVE": "-1"}
    reached = True
    with (
        tempfile.TemporaryDirectory(prefix="ollamad-bench-") as name,
        Cluster(Path(name), environment) as cluster,
    ):
        first = cluster.found()
        cluster.grow(2)
        *holders, entry = cluster.nodes
        first.import_model(model, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [holders[1].id]})
        cluster.wait_replicas(MODEL, holders)
        print(f"{'loss':<24}{'times':>6}{'p50':>9}{'worst':>9}{'goal':>8}")
        for what, lose, times in LOSSES:
            found = []
            for _ in range(times):
                cluster.wait_whole()
                load_on(entry, holders)
                found.append(silence_s(entry, holders, lose))
            middle = statistics.median(found)
            goal = GOAL_S if lose is kill_node else None
            reached = reached and (goal is None or middle <= goal)
            shown = f"{goal:.1f} s" if goal else ""
            print(f"{what:<24}{times:>6}{middle:>7.2f} s{max(found):>7.2f} s{shown:>8}", flush=True)
    return not reached


if __name__ == "__main__":
    sys.exit(main())
