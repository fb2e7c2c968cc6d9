"""Makes a failing scenario smaller: leaves out what it does not need to fail in the same way.

Delta debugging (Zeller and Hildebrandt, 2002) over the list of faults. A smaller scenario runs
differently from the first moment, so what is found is one that fails by the same rule, which
need not be the same accident.
"""

import dataclasses
from collections.abc import Callable

from tests.sim.plan import Fault, Scenario
from tests.sim.runner import Result, run

MAX_RUNS = 300  # a minute or so; a longer search seldom finds much


def shrink(failed: Result) -> Result:
    """The result of the smallest scenario found that breaks the same rule."""
    assert failed.violation is not None
    rule = failed.violation.rule
    best = failed
    runs = 0

    def fails(faults: tuple[Fault, ...]) -> bool:
        nonlocal best, runs
        if runs == MAX_RUNS:
            return False
        runs += 1
        result = run(dataclasses.replace(failed.scenario, faults=faults))
        if result.violation is None or result.violation.rule != rule:
            return False
        best = result
        return True

    minimize(failed.scenario.faults, fails)
    return best


def minimize(
    faults: tuple[Fault, ...], fails: Callable[[tuple[Fault, ...]], bool]
) -> tuple[Fault, ...]:
    """The fewest of these faults, more or less, with which it still fails."""
    parts = 2
    while faults:
        size = -(-len(faults) // parts)
        for start in range(0, len(faults), size):
            rest = faults[:start] + faults[start + size :]
            if fails(rest):
                faults, parts = rest, max(2, parts - 1)
                break
        else:
            if parts >= len(faults):
                break
            parts = min(2 * parts, len(faults))
    return faults


def kept(whole: Scenario, part: Scenario) -> list[int]:
    """The numbers of the faults of `whole` that `part` still has."""
    return [number for number, fault in enumerate(whole.faults) if fault in part.faults]
