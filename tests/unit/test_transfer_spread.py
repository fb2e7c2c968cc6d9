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


def test_who_fetches_alone_sees_twice_as_much_and_holds_no_later_one_back() -> None:
    plan = spread(0, "a")
    assert indices_of(plan.show("a", ALL, 0)) == list(range(2 * CLAIMS))
    plan.joined("b")
    assert indices_of(plan.show("b", ALL, 0)) == [8, 9, 10, 11]


def test_with_many_nodes_less_is_claimed_for_each() -> None:
    plan = spread(0, *[f"n{number}" for number in range(16)])
    assert plan.show("n3", ALL, 0).bit_count() == 2


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


def test_when_everything_has_left_the_source_everybody_sees_it() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", 0b111111, 0)
    plan.show("b", 0b111111, 0)  # 4 and 5: now all is claimed
    plan.got("a", 0b0111)
    assert plan.show("b", 0b111111, 1) == 0b110000
    plan.got("a", 0b1000)
    assert plan.show("b", 0b111111, 1) == 0b111111


def test_pieces_that_only_a_lost_node_had_are_given_to_another() -> None:
    plan = spread(0, "a", "b", "c")
    plan.show("a", ALL, 0)
    plan.got("a", 0b1111)
    plan.got("b", 0b0001)  # of `a`
    plan.left("a")
    assert plan.show("c", ALL, 1) == 0b11110


def test_claims_lapse_when_the_source_sends_nothing() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", 0b1111, 0)
    assert plan.show("b", 0b1111, CLAIM_S - 1) == 0
    plan.show("a", 0b1111, CLAIM_S)  # nor does it claim them again, before it got something
    assert plan.show("b", 0b1111, CLAIM_S) == 0b1111


def test_a_node_whose_claim_lapsed_gets_new_ones_when_it_gets_pieces() -> None:
    plan = spread(0, "a", "b")
    plan.show("a", ALL, 0)
    plan.show("b", ALL, CLAIM_S)
    plan.got("a", 0b1)
    assert plan.show("a", ALL, CLAIM_S).bit_count() > CLAIMS


def test_claims_of_a_slow_source_do_not_lapse_while_it_sends() -> None:
    """Large pieces on a slow link: all that is claimed takes minutes, and that is right."""
    plan = spread(0, "a", "b")
    for second in range(100):
        plan.moved(float(second))
        shown = plan.show("a", ALL, second) & plan.show("b", ALL, second)
        assert shown == 0


def test_a_claim_lapses_when_much_was_sent_to_others_meanwhile() -> None:
    plan = spread(0, "a", "b")
    first = plan.show("a", ALL, 0)
    now = 0.0
    while not first & plan.show("b", ALL, now):
        now += 1
        for index in indices_of(plan.show("b", ALL, now)):
            plan.sent("b", index, now)
        assert now < 4 * CLAIM_S


def test_what_a_node_asks_for_is_claimed_and_a_cancelled_request_is_not() -> None:
    plan = spread(0, "a", "b")
    plan.asked("a", 0, 1)  # it knows of them from an earlier exchange
    plan.asked("a", 1, 1)
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
