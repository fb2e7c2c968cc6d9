"""Shows that the simulator finds the defects of stock PySyncObj: python -m tests.sim.stock

The scenarios are those that our own nodes go through, in two networks: TCP connections as the
library's own transport makes them, and single frames that may be lost, doubled and overtaken.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable

from tests.sim.plan import Scenario, scenario
from tests.sim.stock_cluster import StockResult, run
from tests.sim.stock_process import Defect

NETWORKS = ("connections", "frames")


def stock_scenario(seed: int, network: str) -> Scenario:
    """The scenario of that seed, in that network."""
    drawn = scenario(seed, wipes=False)  # the library has no way to replace a node's id
    streams = network == "connections"
    return dataclasses.replace(drawn, network=dataclasses.replace(drawn.network, streams=streams))


def table(results: dict[str, list[StockResult]]) -> str:
    """Runs with each defect, as Markdown: all of them, and those without any power cut."""
    header, ruler = ["what was seen"], ["---"]
    counts: list[Counter[Defect]] = []
    for network, runs in results.items():
        kept = [result for result in runs if not result.had_power_cuts]
        header += [f"{network}: of {len(runs)}", f"no power cut: of {len(kept)}"]
        ruler += ["---:", "---:"]
        counts += [
            Counter(d for result in group for d in result.findings) for group in (runs, kept)
        ]
    lines = [header, ruler]
    lines += [[defect.value, *(str(count[defect]) for count in counts)] for defect in Defect]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(result: StockResult) -> Iterable[str]:
    """The first example of each finding of one run."""
    yield f"seed {result.seed}: {result.acknowledged} commands acknowledged"
    for defect, example in result.findings.items():
        yield f"  {defect.value}\n    {example}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--network", choices=NETWORKS, action="append")
    parser.add_argument("--show", action="store_true", help="an example of each finding")
    arguments = parser.parse_args()
    results: dict[str, list[StockResult]] = {}
    for network in arguments.network or NETWORKS:
        results[network] = []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            result = run(stock_scenario(seed, network))
            results[network].append(result)
            if arguments.show:
                print(*describe(result), sep="\n", flush=True)
            elif sys.stderr.isatty():
                print(f"\r{network} {seed}", end="", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
