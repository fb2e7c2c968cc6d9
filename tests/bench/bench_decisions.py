"""A decision of routing among a thousand nodes: its processor time, by policy, and what feeds it.

    python -m tests.bench.bench_decisions

The nodes differ in speed and load; half of them have a common system prompt in their caches, two
the whole conversation. Pure code, no daemon: what is measured is this machine's Python.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable

from ollamad.core.inference import GenerateRequest, Message
from ollamad.core.prefix import PrefixIndex, Prompt, prompt_of
from ollamad.core.routing import POLICIES, Fleet, Load

NODES = 1000
PROMPTS = 300
GOAL_US = 100.0


def load(rng: random.Random) -> Load:
    speed = rng.choice([100, 300, 320, 1000, 5000]) * rng.uniform(0.8, 1.2)
    return Load(
        slots=4,
        in_use=rng.randrange(8),
        pending=3000 * rng.random(),
        prefill=speed,
        service_s=5 * rng.random(),
    )


def timed(what: str, actions: list[Callable[[], object]], goal: float | None = None) -> bool:
    """Print how long each took; whether the goal was reached."""
    times = []
    for action in actions:
        begun = time.thread_time()
        action()
        times.append(1e6 * (time.thread_time() - begun))
    times.sort()
    middle = statistics.median(times)
    shown = f"{goal:.0f}" if goal else ""
    print(f"{what:<40}{middle:>8.1f}{times[int(0.99 * len(times))]:>8.1f}{shown:>8}")
    return goal is None or middle <= goal


def main() -> int:
    rng = random.Random(1)
    index = PrefixIndex()
    fleet = Fleet(index, here=0)
    loads = [load(rng) for _ in range(NODES)]
    for number, known in enumerate(loads):
        fleet.put(number, known)
    system = Message("system", "s" * 4000)
    requests = [
        GenerateRequest("m", messages=(system, Message("user", f"{number:06}" * 500)))
        for number in range(PROMPTS)
    ]
    shared = prompt_of(GenerateRequest("m", messages=(system,)), "d").blocks
    prompts: list[Prompt] = [prompt_of(request, "d") for request in requests]
    for number in range(0, NODES, 2):
        index.tell(number, shared[: rng.randrange(len(shared))], 0.0)
    for prompt in prompts:
        for number in rng.sample(range(NODES), 2):
            index.tell(number, prompt.blocks, 0.0)
    print(f"{NODES} nodes, {len(index)} blocks{'':<18}{'p50 us':>12}{'p99 us':>8}{'goal':>8}")
    reached = True
    for policy in POLICIES:
        choose = [
            lambda p=prompt, y=policy: fleet.choose(p, p.size / 4, y, rng.randrange)
            for prompt in prompts
        ]
        reached &= timed(f"decide, {policy}", choose, GOAL_US)
    timed("hash a prompt of 7 kB", [lambda r=r: prompt_of(r, "d") for r in requests])
    timed("note a beat", [lambda n=n: fleet.put(n % NODES, load(rng)) for n in range(1000)])
    table = [lambda p=prompt: fleet.table(p, p.size / 4) for prompt in prompts[:50]]
    timed("the whole table of scores", table)
    return not reached


if __name__ == "__main__":
    sys.exit(main())
