"""The simulator's command line: many seeds, or one with all that happens in it.

python -m tests.sim --seeds 1000 --jobs 2     # seeds from 0; --first N begins elsewhere
python -m tests.sim --seed 95                 # the log of one run
python -m tests.sim --seed 95 --trace         # with every frame
python -m tests.sim --seed 95 --keep 3,7      # with these of its faults only
"""

import argparse
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.sim.plan import scenario
from tests.sim.runner import Result, run
from tests.sim.shrink import kept, shrink

HASH_SEED = "0"  # sets of strings are walked in the order of their hashes
MAX_SHRUNK = 5  # failing seeds that are made smaller; for the others the seed must do


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "PYTHONHASHSEED": HASH_SEED})
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Simulate consensus.")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="run this one only and show its log")
    parser.add_argument("--trace", action="store_true", help="show every frame too")
    parser.add_argument("--keep", help="the numbers of the faults to keep, with commas")
    parser.add_argument(
        "--shrunk", type=int, default=MAX_SHRUNK, help="how many failures to make smaller"
    )
    parser.add_argument("--enough", type=int, default=0, help="stop after so many failures")
    options = parser.parse_args()
    if options.seed is not None:
        return _show(options.seed, options.keep, options.trace)
    seeds = range(options.first, options.first + options.seeds)
    return _run_many(seeds, options.jobs, options.enough or len(seeds), options.shrunk)


def _show(seed: int, keep: str | None, trace: bool) -> int:
    plan = scenario(seed)
    if keep is not None:
        numbers = [int(number) for number in keep.split(",") if number]
        plan = dataclasses.replace(plan, faults=tuple(plan.faults[n] for n in numbers))
    result = run(plan, trace=trace)
    _print_run(result)
    print(f"digest {result.digest}")
    return 1 if result.violation else 0


def _print_run(result: Result) -> None:
    print(dataclasses.replace(result.scenario, faults=()))
    for number, fault in enumerate(result.scenario.faults):
        print(f"{number:3} {fault}")
    print()
    for at, who, what, *details in result.log:
        print(f"{at:9.4f}  {who:9} {what} {' '.join(map(str, details))}")
    print()
    print(f"VIOLATION of {result.violation}" if result.violation else "no violation")


def _run_quietly(seed: int) -> Result:
    result = run(scenario(seed))
    gc.collect()
    return dataclasses.replace(result, log=[])


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # runs are short; what is left of one is collected after it
    gc.freeze()  # without walking through all that was imported, each time


def _results(seeds: range, jobs: int) -> Iterator[Result]:
    with multiprocessing.get_context("fork").Pool(jobs, _ignore_interrupts) as pool:
        yield from pool.imap_unordered(_run_quietly, seeds, chunksize=4)


def _run_many(seeds: range, jobs: int, enough: int, shrunk: int) -> int:
    totals: Counter[str] = Counter()
    in_seeds: Counter[str] = Counter()
    failed: list[Result] = []
    done, virtual_s, cpu_s, slowest_s = 0, 0.0, 0.0, 0.0
    begun_s = told_s = time.monotonic()
    try:
        for result in _results(seeds, jobs):
            done += 1
            virtual_s += result.virtual_s
            cpu_s += result.cpu_s
            slowest_s = max(slowest_s, result.settled_s)
            totals.update(result.counts)
            in_seeds.update(result.counts.keys())
            if result.violation is not None:
                failed.append(result)
                print(f"seed {result.scenario.seed}: {result.violation}", flush=True)
                if len(failed) == enough:
                    break
            if time.monotonic() - told_s > 10:
                told_s = time.monotonic()
                rate = done / (told_s - begun_s)
                print(
                    f"{done} of {len(seeds)} seeds, {rate:.1f}/s, {len(failed)} failed", flush=True
                )
    except KeyboardInterrupt:
        print("interrupted")
    if done:
        print(f"\n{'what happened':32} {'times':>9} {'in seeds':>9}")
        for what, count in sorted(totals.items()):
            print(f"{what:32} {count:9} {in_seeds[what]:9}")
        wall_s = time.monotonic() - begun_s
        print(
            f"\n{done} seeds in {wall_s:.0f} s ({done / wall_s:.1f}/s); {virtual_s:.0f} virtual "
            f"seconds, {virtual_s / wall_s:.0f} times as fast as real time, "
            f"{virtual_s / cpu_s:.0f} on one core; "
            f"agreement {slowest_s:.1f} s after the healing at the latest"
        )
    failed.sort(key=lambda result: result.scenario.seed)
    for result in failed[:shrunk]:
        _explain(result)
    print(f"{len(failed)} of {done} seeds failed", *[r.scenario.seed for r in failed])
    return 1 if failed else 0


def _explain(result: Result) -> None:
    seed = result.scenario.seed
    smallest = shrink(result)
    numbers = ",".join(map(str, kept(result.scenario, smallest.scenario)))
    print(f"\n=== seed {seed}: python -m tests.sim --seed {seed} --keep {numbers or ','}")
    _print_run(smallest)


if __name__ == "__main__":
    sys.exit(main())
