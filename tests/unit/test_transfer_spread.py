"""What the source of a blob shows to whom: each piece leaves it about once."""

import random
from collections import Counter

import pytest

from ollamad.core.pieces import MIB
from ollamad.core.spread import CLAIM_S, Spread
from ollamad.wire.pieces import indices_of

ALL = (1 << 20) - 1
CLAIMS = 4  # of 1 MiB


def spread(start: int = 0, *nodes: str) -> Spread:
    plan = Spread(MIB, start)
    for node in nodes:
        plan.joined(node)
    return plan


def test_who_fetches_alone_sees_everything() -> None:
    plan = spread(7, "a")
    assert plan.show("a", ALL, 0) == ALL


def test_each_of_several_sees_other_pieces_in_order() -> None:
    plan = spread(18, "a", "b")
    assert indices_of(plan.show("a", ALL, 0)) == [0, 1, 18, 19]
    assert indices_of(plan.show("b", ALL, 0)) == [2, 3, 4, 5]
    assert indices_of(plan.show("a", ALL, 1)) == [0, 1, 18, 19]  # until it has them


def test_more_is_shown_as_pieces_arrive() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", ALL, 0)
    plan.show("b", ALL, 0)
    plan.got("a", 0b0011)
    assert indices_of(plan.show("a", ALL, 1)) == [0, 1, 2, 3, 8, 9]
    plan.got("b", 0b0011)  # of `a`: no place of its own becomes free
    assert indices_of(plan.show("b", ALL, 1)) == [4, 5, 6, 7]


def test_what_is_not_here_yet_is_not_shown() -> None:
    plan = spread(0, "a", "b")
    assert plan.show("a", 0b1, 0) == 0b1
    assert plan.show("b", 0b1, 0) == 0
    assert plan.show("b", 0b11, 0) == 0b10


def test_when_all_is_out_everybody_sees_what_is_not_on_its_way_to_another() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", 0b111111, 0)
    plan.show("b", 0b111111, 0)  # 4 and 5: now all is claimed
    plan.got("a", 0b0111)
    assert plan.show("b", 0b111111, 1) == 0b110111
    plan.got("a", 0b1000)
    assert plan.show("b", 0b111111, 1) == 0b111111


def test_pieces_that_only_a_lost_node_had_are_given_to_another() -> None:
    plan = spread(0, "a", "b", "c")
    plan.show("a", ALL, 0)
    plan.got("a", 0b1111)
    plan.got("b", 0b0001)  # of `a`
    plan.left("a")
    assert plan.show("c", ALL, 1) == 0b11110


def test_a_claim_of_a_node_that_is_too_slow_does_not_hold_others_up() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", 0b1111, 0)
    assert plan.show("b", 0b1111, CLAIM_S - 1) == 0
    plan.show("a", 0b1111, CLAIM_S)  # nor does it claim them again, before it got something
    assert plan.show("b", 0b1111, CLAIM_S) == 0b1111
    plan = spread(0, "a", "b")
    plan.show("a", ALL, 0)
    plan.show("b", ALL, CLAIM_S)
    plan.show("b", ALL, CLAIM_S)
    plan.got("a", 0b1)
    assert plan.show("a", ALL, CLAIM_S).bit_count() > CLAIMS


def test_what_a_node_asks_for_is_claimed_and_a_cancelled_request_is_not() -> None:
    plan = spread(0, "a")
    plan.show("a", ALL, 0)
    plan.asked("a", 0, 1)
    plan.asked("a", 1, 1)
    plan.joined("b")
    assert indices_of(plan.show("b", ALL, 1)) == [2, 3, 4, 5]
    plan.ended("a", 1)
    plan.got("b", 0b100)
    assert indices_of(plan.show("b", ALL, 1)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("nodes", [2, 5, 16])
@pytest.mark.parametrize("seed", range(5))
def test_a_swarm_takes_each_piece_about_once(nodes: int, seed: int) -> None:
    """The source sends one piece a turn; so do the nodes, to whomever lacks what they have."""
    rng = random.Random(seed)
    count = 200
    everything = (1 << count) - 1
    names = [f"node {number}" for number in range(nodes)]
    plan = spread(rng.randrange(count), *names)
    have = dict.fromkeys(names, 0)
    left_the_source: Counter[int] = Counter()
    turns = 0
    while any(bits != everything for bits in have.values()):
        turns += 1
        name = names[turns % nodes]
        wanted = plan.show(name, everything, turns / 100) & ~have[name]
        if wanted:
            index = rng.choice(list(indices_of(wanted)))
            plan.asked(name, index, turns / 100)
            have[name] |= 1 << index
            plan.got(name, 1 << index)
            left_the_source[index] += 1
        for giver in names:
            taker = rng.choice(names)
            if offered := have[giver] & ~have[taker]:
                have[taker] |= 1 << rng.choice(list(indices_of(offered)))
                plan.got(taker, have[taker])
        assert turns < 20 * count
    assert set(left_the_source) == set(range(count))
    assert left_the_source.total() < 1.25 * count + 20 * nodes
