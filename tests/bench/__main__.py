"""`make bench`: all benchmarks, one after the other; each prints ratios within its own run."""

import subprocess
import sys

BENCHMARKS = (
    ("tokens through the daemon, against its runner", "bench_inference"),
    ("a decision of routing among 1,000 nodes", "bench_decisions"),
    ("conversations on three nodes, by policy of routing", "bench_routing"),
    ("time without a token when a node is lost", "bench_failover"),
    ("what each surface adds to the runner", "bench_surfaces"),
    ("commits: latency, throughput, failover", "bench_raft"),
    ("memory: estimated, used, corrected", "bench_memory"),
    ("/health and /nodes, against a bare ASGI app", "bench_http"),
    ("5,000 WebSockets: memory, and an event to all", "bench_websocket"),
    ("what a transfer costs those who use the nodes", "bench_interference"),
    ("a file to many nodes, and to one", "bench_swarm"),
)


def main() -> int:
    missed = []
    for title, module in BENCHMARKS:
        print(f"\n== {title} ({module})", flush=True)
        done = subprocess.run([sys.executable, "-m", f"tests.bench.{module}"])
        if done.returncode:
            missed.append(module)
    if missed:
        print(f"\ngoals missed or not measured: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
