"""Runs the scale model and sums up what it found."""

import time
from dataclasses import dataclass

from ollamad.core.routing import Policy
from tests.scale.model import Measured, World
from tests.scale.trace import play


@dataclass(frozen=True)
class Summary:
    """One run in figures."""

    nodes: int
    policy: str
    seconds: float  # virtual
    requests: int
    refused: int
    utilisation: float  # of all slots, mean
    queued_p99: float  # requests that wait, a node
    wait_mean_s: float  # from the question to the first token
    wait_p99_s: float
    recomputed: float  # part of the prompts' tokens
    decision_p50_us: float
    decision_p99_us: float
    bytes_a_second: float  # that a node sends in beats
    staleness_p50_s: float  # of beats that decide
    ran_s: float


def simulate(
    count: int, seconds: float, *, policy: Policy = "prefix", seed: int = 1
) -> tuple[World, Summary]:
    """A cluster that knows each other, and then a trace of so many virtual seconds."""
    begun = time.monotonic()
    world = World(count, seed, policy)
    world.know_each_other()
    start = world.clock.now
    world.measured = Measured()
    play(world, seconds)
    world.clock.run(start + seconds)
    return world, _sum_up(world, seconds, policy, time.monotonic() - begun)


def _sum_up(world: World, seconds: float, policy: str, ran_s: float) -> Summary:
    measured = world.measured
    waits = sorted(question.first_at - question.asked_at for question in measured.done)
    prompts = sum(question.prompt_tokens for question in measured.done)
    evaluated = sum(question.evaluated for question in measured.done)
    queued = sorted(count for _, count in measured.queued)
    decisions = sorted(measured.decisions_s)
    return Summary(
        nodes=len(world.nodes),
        policy=policy,
        seconds=seconds,
        requests=len(measured.done),
        refused=measured.refused,
        utilisation=sum(share for _, share in measured.busy) / len(measured.busy),
        queued_p99=_at(queued, 0.99) / len(world.nodes),
        wait_mean_s=sum(waits) / len(waits),
        wait_p99_s=_at(waits, 0.99),
        recomputed=evaluated / prompts,
        decision_p50_us=1e6 * _at(decisions, 0.5),
        decision_p99_us=1e6 * _at(decisions, 0.99),
        bytes_a_second=measured.bytes_sent / len(world.nodes) / seconds,
        staleness_p50_s=_at(sorted(measured.staleness_s), 0.5),
        ran_s=ran_s,
    )


def _at(ordered: list[float] | list[int], share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) if ordered else 0.0


HEADING = (
    f"{'nodes':>6} {'policy':<13}{'requests':>9}{'slots busy':>11}{'queued p99':>11}"
    f"{'first token':>12}{'p99':>9}{'recomputed':>11}{'decision':>10}{'p99':>8}"
    f"{'beats/node':>12}{'age':>7}"
)


def line(found: Summary) -> str:
    return (
        f"{found.nodes:>6} {found.policy:<13}{found.requests:>9}{found.utilisation:>11.0%}"
        f"{found.queued_p99:>11.2f}{found.wait_mean_s:>10.2f} s{found.wait_p99_s:>7.1f} s"
        f"{found.recomputed:>11.0%}{found.decision_p50_us:>7.0f} us{found.decision_p99_us:>5.0f} us"
        f"{found.bytes_a_second / 1000:>7.1f} kB/s{found.staleness_p50_s:>5.1f} s"
    )


__all__ = ["HEADING", "Summary", "line", "simulate"]
