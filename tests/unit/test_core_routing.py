"""Which node a request goes to: rules as a table, and what must hold of any cluster."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.prefix import PrefixIndex, Prompt, bits
from ollamad.core.routing import (
    BEYOND_SLOTS,
    CLASS_WIDTH,
    EVICTION_S,
    HERE_FACTOR,
    HOP_S,
    NO_ROOM_S,
    OVERLOAD_S,
    POLICIES,
    Fleet,
    Load,
    parse_policy,
)

HERE = 0
IDLE = Load(slots=4, prefill=100.0, service_s=2.0, load_s=1.0)
COLD = replace(IDLE, loaded=False)
PROMPT = Prompt(1280, tuple(range(1000, 1010)))  # ten blocks of 128 bytes
TOKENS = 320.0


def fleet_of(*loads: Load, held: dict[int, int] | None = None, here: int = HERE) -> Fleet:
    """A fleet; `held` tells how many of PROMPT's blocks a node has."""
    index = PrefixIndex()
    fleet = Fleet(index, here)
    for number, load in enumerate(loads):
        fleet.put(number, load)
    for number, count in (held or {}).items():
        index.tell(number, PROMPT.blocks[:count], 0.0)
    return fleet


def chosen(fleet: Fleet, policy: str = "prefix", **how: object) -> int | None:
    choice = fleet.choose(
        PROMPT,
        TOKENS,
        parse_policy(policy),
        random.Random(1).randrange,
        **how,  # type: ignore[arg-type]
    )
    return None if choice is None else choice.number


@pytest.mark.parametrize(
    ("loads", "held", "expected"),
    [
        ([], {}, None),
        ([replace(IDLE, willing=False)], {}, None),
        # Of equals this node: it need not hop.
        ([IDLE, IDLE], {}, 0),
        ([replace(IDLE, prefill=90.0), IDLE], {}, 0),
        ([replace(IDLE, prefill=50.0), IDLE], {}, 1),
        # The model in memory is worth its load.
        ([COLD, IDLE], {}, 1),
        ([COLD, replace(IDLE, in_use=3)], {}, 1),
        # Not when the queue there is longer than that.
        ([COLD, replace(IDLE, in_use=8)], {}, 0),
        # Who loads it already gets the next one, too.
        ([COLD, replace(COLD, loading=True, in_use=1)], {}, 1),
        # Where it does not fit only if it is nowhere else.
        ([replace(COLD, fits=False), COLD], {}, 1),
        ([replace(COLD, fits=False), replace(IDLE, in_use=30)], {}, 1),
        ([replace(COLD, fits=False)], {}, 0),
        # Not at the price of an idle one, if that is not needed.
        ([replace(COLD, evicts=True), COLD], {}, 1),
        ([replace(COLD, evicts=True), replace(IDLE, in_use=30)], {}, 0),
        # Prompts before ours, at each node's own speed.
        ([replace(IDLE, pending=900), replace(IDLE, pending=100)], {}, 1),
        ([IDLE, replace(IDLE, prefill=1000.0)], {}, 1),
        ([IDLE, replace(IDLE, prefill=1000.0, pending=9000)], {}, 0),
        # The cache: most of the prompt, whatever the others could do a little sooner.
        ([IDLE, IDLE], {1: 10}, 1),
        ([replace(IDLE, prefill=1000.0), replace(IDLE, pending=100)], {1: 10}, 1),
        # Less than WARM of it is a part of the prediction and no more.
        ([IDLE, replace(IDLE, pending=100)], {1: 7}, 1),
        ([IDLE, replace(IDLE, pending=300)], {1: 7}, 0),
        # The bound: affinity may cost two seconds, not more.
        ([replace(IDLE, prefill=1000.0), replace(IDLE, pending=200)], {1: 10}, 1),
        ([replace(IDLE, prefill=1000.0), replace(IDLE, pending=400)], {1: 10}, 0),
        # All overloaded: the shortest queue.
        (
            [replace(IDLE, in_use=40), replace(IDLE, in_use=42)],
            {1: 10},
            0,
        ),
    ],
)
def test_prefix_routing(loads: list[Load], held: dict[int, int], expected: int | None) -> None:
    assert chosen(fleet_of(*loads, held=held)) == expected


def test_overload_is_a_queue_of_some_seconds() -> None:
    """The case above is one where affinity alone would have decided otherwise."""
    queue_s = replace(IDLE, in_use=40).queue_s
    assert queue_s > OVERLOAD_S
    few = [replace(IDLE, in_use=4), replace(IDLE, in_use=5)]
    assert chosen(fleet_of(*few, held={1: 10})) == 1


def test_least_loaded_leaves_caches_aside() -> None:
    fleet = fleet_of(IDLE, replace(IDLE, pending=10), held={1: 10})
    assert chosen(fleet) == 1
    assert chosen(fleet, "least-loaded") == 0


def test_round_robin_takes_turns_among_the_willing() -> None:
    fleet = fleet_of(IDLE, replace(IDLE, willing=False), IDLE, IDLE)
    assert [chosen(fleet, "round-robin") for _ in range(5)] == [0, 2, 3, 0, 2]
    assert [chosen(fleet, "round-robin", looks=looks) for looks in (True, True, False)] == [3] * 3


def test_random_takes_everybody() -> None:
    fleet = fleet_of(*[IDLE] * 5)
    pick = random.Random(1).randrange
    taken = {fleet.choose(PROMPT, TOKENS, "random", pick).number for _ in range(200)}  # type: ignore[union-attr]
    assert taken == set(range(5))


@pytest.mark.parametrize("policy", POLICIES)
def test_those_that_were_tried_are_left_out(policy: str) -> None:
    fleet = fleet_of(IDLE, IDLE, IDLE)
    assert chosen(fleet, policy, without=0b011) == 2
    assert chosen(fleet, policy, without=0b111) is None


def test_what_changed_is_seen_and_who_left_is_gone() -> None:
    fleet = fleet_of(IDLE, IDLE)
    fleet.put(0, replace(IDLE, willing=False))
    assert chosen(fleet) == 1
    fleet.put(0, IDLE)
    fleet.remove(1)
    assert chosen(fleet) == 0
    fleet.remove(0)
    assert chosen(fleet) is None
    assert fleet.table(PROMPT, TOKENS) == []
    assert (fleet.room, fleet.slots) == (0, 0)


def test_the_table_tells_everybody_best_first() -> None:
    loads = [replace(IDLE, pending=500), IDLE, replace(IDLE, willing=False), COLD]
    table = fleet_of(*loads, held={0: 10}).table(PROMPT, TOKENS)
    assert [score.number for score in table] == [1, 3, 0, 2]
    warm = next(score for score in table if score.number == 0)
    assert (warm.covered, warm.uncached, warm.ttft_s) == (1.0, 0.0, 5.0)
    assert len(fleet_of(*loads).table(PROMPT, TOKENS, best=2)) == 2


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="least-loaded"):
        parse_policy("best")


loads = st.builds(
    Load,
    willing=st.booleans(),
    loaded=st.booleans(),
    loading=st.booleans(),
    fits=st.booleans(),
    evicts=st.booleans(),
    slots=st.integers(1, 8),
    in_use=st.integers(0, 20),
    pending=st.floats(0, 1e5),
    prefill=st.floats(1, 1e5),
    service_s=st.floats(0.01, 100),
    load_s=st.floats(0, 100),
)


@given(
    st.lists(loads, min_size=1, max_size=40),
    st.dictionaries(st.integers(0, 39), st.integers(0, 10), max_size=40),
    st.integers(0, 1 << 32),
)
def test_the_choice_is_as_good_as_the_classes_tell(
    nodes: list[Load], held: dict[int, int], seed: int
) -> None:
    """Against every node compared one by one: never worse than a class of the wait."""
    held = {number: count for number, count in held.items() if number < len(nodes)}
    fleet = fleet_of(*nodes, held=held)
    choice = fleet.choose(PROMPT, TOKENS, "prefix", random.Random(seed).randrange)
    willing = [score for score in fleet.table(PROMPT, TOKENS) if score.load.willing]
    if choice is None:
        assert not willing
        return
    assert choice.score in willing
    best = min(willing, key=lambda score: score.ttft_s)
    warm = [score for score in willing if score.covered >= 0.8]
    # This node is preferred where the difference is small.
    width, slack = CLASS_WIDTH / HERE_FACTOR, HOP_S / HERE_FACTOR + 1e-6
    if choice.why.startswith("all are overloaded"):
        least = min(score.load.wait_s for score in willing)
        assert choice.score.load.wait_s <= least * width + slack
    elif choice.score in warm:
        best_warm = min(score.ttft_s for score in warm)
        assert choice.score.ttft_s <= best_warm * width + slack
    else:
        assert choice.score.ttft_s <= best.ttft_s * width + slack


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | loads), max_size=60))
def test_the_sorted_sets_are_what_the_loads_say(changes: list[tuple[int, Load | None]]) -> None:
    fleet = Fleet(PrefixIndex())
    for number, load in changes:
        if load is None:
            fleet.remove(number)
        else:
            fleet.put(number, load)
    willing = {number for number, load in fleet.loads.items() if load.willing}
    sorted_in = [
        number
        for rate in fleet._rates.values()
        for nodes in rate.waits.values()
        for number in bits(nodes)
    ]
    assert sorted(sorted_in) == sorted(willing)
    assert set(bits(fleet._willing)) == willing
    able = [load for load in fleet.loads.values() if load.is_able]
    assert fleet.slots == sum(load.slots for load in able)
    assert fleet.room == sum(max(0, load.slots + BEYOND_SLOTS - load.in_use) for load in able)


def test_room_that_is_not_there_costs_as_much_as_it_says() -> None:
    assert replace(COLD, fits=False).wait_s == NO_ROOM_S + COLD.load_s
    assert replace(COLD, evicts=True).wait_s == EVICTION_S + COLD.load_s
