"""The scale model in small: it repeats by its seed, and shows what it is there to show."""

import pytest

from ollamad.core.gossip import FANOUT
from tests.scale.model import World
from tests.scale.run import Summary, simulate


def figures(summary: Summary) -> tuple[float, ...]:
    """What does not depend on the machine."""
    return (summary.requests, summary.wait_mean_s, summary.recomputed, summary.bytes_a_second)


def test_a_seed_repeats_exactly() -> None:
    one, again, other = (simulate(4, 8.0, seed=seed)[1] for seed in (3, 3, 4))
    assert figures(one) == figures(again)
    assert figures(one) != figures(other)


def test_affinity_evaluates_less_and_answers_sooner_than_turns() -> None:
    found = {policy: simulate(6, 25.0, policy=policy)[1] for policy in ("prefix", "round-robin")}  # type: ignore[arg-type]
    prefix, turns = found["prefix"], found["round-robin"]
    assert prefix.recomputed < 0.7 * turns.recomputed
    assert prefix.wait_mean_s < 0.7 * turns.wait_mean_s
    assert prefix.requests > turns.requests


@pytest.mark.parametrize("count", [FANOUT, 3 * FANOUT])
def test_everybody_hears_of_all_within_some_rounds(count: int) -> None:
    world = World(count)
    world.know_each_other()
    assert world.clock.now <= 8
    for node in world.nodes:
        for other in world.others[node.number]:
            age_s = world.clock.now - node.table.of(other).beat.sent_at
            assert age_s < 5


def test_every_question_is_answered_once() -> None:
    world, _ = simulate(5, 15.0)
    world.clock.run(world.clock.now + 400)  # nobody new comes; all conversations end
    assert world.measured.asked == len(world.measured.done) > 50
    for node in world.nodes:
        assert not node.waiting
        assert len(node.queue) == node.engine.busy == 0
        assert node.router._sent == {}
        assert node.router._pending == {}
