"""`make scale`: the scale model at several sizes, as a table and as pictures in docs/.

    python -m tests.scale [--sizes 10 100 1000] [--seconds 60] [--plot docs]

matplotlib is needed for the pictures only; `make scale` installs it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ollamad.core.routing import POLICIES
from tests.scale.model import World
from tests.scale.run import HEADING, Summary, line, simulate

DECISION_GOAL_US = 100.0
# Beside the largest cluster the others are compared by policy: it takes minutes by itself.
COMPARED_UP_TO = 30
FLAT = 1.5  # the largest cluster's control bytes, times those of the first that gossips


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 100, 1000])
    parser.add_argument("--seconds", type=float, default=30.0, help="virtual, of the trace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a directory for the pictures")
    chosen = parser.parse_args(arguments)
    print(HEADING, flush=True)
    found: list[Summary] = []
    worlds: dict[int, World] = {}
    for size in chosen.sizes:
        for policy in POLICIES if size <= COMPARED_UP_TO else POLICIES[:1]:
            world, summary = simulate(size, chosen.seconds, policy=policy, seed=chosen.seed)
            print(line(summary), f" ({summary.ran_s:.0f} s)", flush=True)
            found.append(summary)
            if policy == POLICIES[0]:
                worlds[size] = world
    if chosen.plot:
        draw(found, worlds, chosen.plot)
    return judge([summary for summary in found if summary.policy == POLICIES[0]])


def judge(found: list[Summary]) -> int:
    """Print the goals; 0 if they were reached."""
    largest = found[-1]
    print(
        f"a decision at {largest.nodes} nodes: {largest.decision_p50_us:.0f} us, p99 "
        f"{largest.decision_p99_us:.0f} us of processor time (goal: {DECISION_GOAL_US:.0f} us)"
    )
    reached = largest.decision_p50_us <= DECISION_GOAL_US
    gossiping = [summary for summary in found if summary.nodes > 50]
    if len(gossiping) > 1:
        ratio = gossiping[-1].bytes_a_second / gossiping[0].bytes_a_second
        print(
            f"control bytes a node and second at {gossiping[-1].nodes} nodes: {ratio:.2f} times "
            f"those at {gossiping[0].nodes} (at most {FLAT})"
        )
        reached = reached and ratio <= FLAT
    return not reached


def draw(found: list[Summary], worlds: dict[int, World], directory: Path) -> None:
    """The pictures: over time, and over the size of the cluster."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    from matplotlib import pyplot

    style: dict[str, Any] = {"figsize": (9, 5.5), "layout": "constrained"}
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, **style)
    for size, world in worlds.items():
        start = world.measured.busy[0][0]
        busy, queued = world.measured.busy, world.measured.queued
        upper.plot(
            [t - start for t, _ in busy], [100 * share for _, share in busy], label=str(size)
        )
        lower.plot([t - start for t, _ in queued], [count / size for _, count in queued])
    upper.set(ylabel="slots in use, %", ylim=(0, 105), title="A bursty trace")
    upper.legend(title="nodes")
    lower.set(xlabel="seconds", ylabel="requests that wait, a node")
    figure.savefig(directory / "scale-load.png", dpi=80)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    prefix = [summary for summary in found if summary.policy == POLICIES[0]]
    sizes = [summary.nodes for summary in prefix]
    axes[0].plot(sizes, [s.decision_p50_us for s in prefix], "o-", label="p50")
    axes[0].plot(sizes, [s.decision_p99_us for s in prefix], "o--", label="p99")
    axes[0].axhline(DECISION_GOAL_US, color="grey", linewidth=1)
    axes[0].set(xscale="log", ylim=0, xlabel="nodes", title="A decision, µs")
    axes[0].legend()
    axes[1].plot(sizes, [s.bytes_a_second / 1000 for s in prefix], "o-")
    axes[1].set(xscale="log", ylim=0, xlabel="nodes", title="Beats that a node sends, kB/s")
    for policy in POLICIES:
        of_policy = [s for s in found if s.policy == policy]
        axes[2].plot(
            [s.nodes for s in of_policy], [s.wait_mean_s for s in of_policy], "o-", label=policy
        )
    axes[2].set(xscale="log", ylim=0, xlabel="nodes", title="Mean time to the first token, s")
    axes[2].legend()
    figure.savefig(directory / "scale-size.png", dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
