"""Tokens a second and time to the first token through the daemon, against its own runner.

    python -m tests.bench.bench_inference

Two daemons on loopback. The model is in the first one's runner. The same prompts go straight to
the runner's Unix socket, through the first daemon (local) and through the second one (forwarded
over mutual TLS), in turns within one run, so that a busy machine troubles all three alike. All
clients are the same few lines over a blocking socket. Also prints what a daemon takes in memory.
"""

import json
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.bench.bench_engine import TOKENS, bare_body, prompt_of
from tests.conftest import smollm2_file
from tests.system.harness import Cluster, Node

ROUNDS = 5
STREAM_COUNTS = (1, 4)
GOALS = {"local": 0.97, "forwarded": 0.94}
RSS_GOAL_MB = 120

Result = tuple[float, float]  # seconds to the first token, seconds in all
Ask = Callable[[str], Result]


def over_runner(path: str) -> Ask:
    """Asks llama.cpp's server itself."""

    def ask(prompt: str) -> Result:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            return timed(connection, "/completion", {}, bare_body(prompt), b'"stop":true')

    return ask


def over_daemon(node: Node, model: str) -> Ask:
    """Asks a daemon's API."""
    host, _, port = node.address.rpartition(":")
    headers = {"Authorization": f"Bearer {node.admin_token()}"}

    def ask(prompt: str) -> Result:
        body = {
            "model": model,
            "prompt": prompt,
            "raw": True,
            "stream": True,
            "options": {"temperature": 0, "num_predict": TOKENS},
        }
        with socket.create_connection((host, int(port))) as connection:
            return timed(connection, "/api/v1/generate", headers, body, b'"done":true')

    return ask


def timed(
    connection: socket.socket, path: str, headers: dict[str, str], body: object, end: bytes
) -> Result:
    """Send one request and read until the last event of its stream."""
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    head += [f"Content-Length: {len(data)}", "", ""]
    started = time.perf_counter()
    connection.sendall("\r\n".join(head).encode() + data)
    first = 0.0
    seen = b""
    while end not in seen:
        part = connection.recv(1 << 16)
        if not part:
            raise RuntimeError(f"the stream ended early: {seen[-300:]!r}")
        if not first and (b"data: " in part or b'"response":' in part):
            first = time.perf_counter() - started
        seen = seen[-2048:] + part
    total = time.perf_counter() - started
    if b'"error"' in seen:
        raise RuntimeError(f"the stream failed: {seen[-300:]!r}")
    return first, total


def one_round(ask: Ask, streams: int, marker: int) -> list[Result]:
    """Some streams at once, each with a prompt of its own."""
    results: list[Result] = []
    prompts = [prompt_of(marker * 10 + index) for index in range(streams)]
    threads = [
        threading.Thread(target=lambda prompt=prompt: results.append(ask(prompt)))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) != streams:
        raise RuntimeError("a stream failed; see above")
    return results


def compare(ways: dict[str, Ask], streams: int) -> bool:
    """Print a block for so many streams; whether the goals were reached."""
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    firsts: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS):
        # Turn the order, so that no way always runs on a warmer machine.
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for place, way in enumerate(order):
            results = one_round(ways[way], streams, 100 + streams * 1000 + number * 10 + place)
            speeds[way].append(TOKENS * streams / max(total for _, total in results))
            firsts[way] += [first for first, _ in results]
    reached = True
    for way in ways:
        ratios = [a / b for a, b in zip(speeds[way], speeds["runner"], strict=True)]
        ratio, goal = statistics.median(ratios), GOALS.get(way)
        reached = reached and (goal is None or ratio >= goal)
        print(
            f"{streams:>7}  {way:<10} {statistics.median(speeds[way]):>8.1f} "
            f"{ratio:>7.3f} {goal if goal else '':>6} "
            f"{1000 * statistics.median(firsts[way]):>10.1f}"
        )
    return reached


def main(arguments: Sequence[str] = ()) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    model_file = smollm2_file()
    with tempfile.TemporaryDirectory(prefix="ollamad-bench-") as directory:
        environment = {"OLLAMAD_MODELS__REPLICAS": "1", "OLLAMA_KEEP_ALIVE": "-1"}
        with Cluster(Path(directory), environment) as cluster:
            first = cluster.found()
            second = cluster.grow()
            cluster.wait_whole()
            idle = {node.name: rss_mb(node) for node in (first, second)}
            first.post("/distribution/auto-configure", {"enabled": False})  # nor copied when hot
            first.import_model(model_file, "bench")
            first.answer("generate", model="bench", prompt="")  # loads it
            [runner_socket] = (first.data_dir / "run").glob("*.sock")
            ways = {
                "runner": over_runner(str(runner_socket)),
                "local": over_daemon(first, "bench"),
                "forwarded": over_daemon(second, "bench"),
            }
            for ask in ways.values():
                ask(prompt_of(1))  # warm connections and caches
            print(
                f"{'streams':>7}  {'way':<10} {'tokens/s':>8} {'ratio':>7} {'goal':>6} "
                f"{'first ms':>10}"
            )
            reached = [compare(ways, streams) for streams in STREAM_COUNTS]
            busy = {node.name: rss_mb(node) for node in (first, second)}
    print()
    for name in idle:
        print(
            f"daemon {name}: {idle[name]:.0f} MB resident idle, {busy[name]:.0f} MB after the "
            f"streams (goal {RSS_GOAL_MB})"
        )
    return 0 if all(reached) and max(busy.values()) <= RSS_GOAL_MB else 1


def rss_mb(node: Node) -> float:
    return float(psutil.Process(node.pid).memory_info().rss) / 1e6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
