"""The checker against known histories, against brute force, and against an atomic object."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.history import History, Kind, Operation
from tests.sim.linearizability import (
    Outcome,
    State,
    Verdict,
    check,
    initial_state,
    judge,
    step,
)


def op(text: str) -> Operation:
    """From "client request invoked completed".

    Requests: w1 writes, r1 reads 1, r- reads that nothing is there, d+ deletes something and d-
    nothing, c+ wins a claim and c- loses it. Without an end the outcome is unknown.
    """
    client, request, invoked, *completed = text.split()
    kind = {"w": Kind.WRITE, "r": Kind.READ, "d": Kind.DELETE, "c": Kind.CLAIM}[request[0]]
    argument: str | None = None
    result: str | bool | None = None
    if kind is Kind.WRITE:
        argument, result = request[1], True
    elif kind is Kind.READ:
        result = None if request[1] == "-" else request[1]
    else:
        result = request[1:] == "+"
    operation = Operation(ord(client) - ord("a"), kind, "k", argument, int(invoked))
    if completed:
        operation.completed, operation.result = int(completed[0]), result
    return operation


LINEARIZABLE = {
    "one after the other": ["a w1 0 1", "a r1 2 3", "a w2 4 5", "b r2 6 7"],
    "never written": ["a r- 0 1"],
    "deleted": ["a w1 0 1", "a d+ 2 3", "b r- 4 5", "a d- 6 7"],
    "a read beside a write sees the old": ["a w1 0 9", "b r- 1 2"],
    "a read beside a write sees the new": ["a w1 0 9", "b r1 1 2"],
    "first the old, then the new": ["a w1 0 9", "b r- 1 2", "c r1 3 4"],
    "two writes at once, either last": ["a w1 0 5", "b w2 0 5", "c r1 6 7"],
    "three writes at once": ["a w1 0 9", "b w2 0 9", "c w3 0 9", "d r3 1 8", "d r1 10 11"],
    "the same value again": ["a w1 0 1", "b w1 2 3", "c r1 4 5"],
    "a deletion beside a write": ["a w1 0 5", "b d- 1 8", "c r1 9 10"],
    "a deletion after the write beside it": ["a w1 0 5", "b d+ 1 8", "c r- 9 10"],
    "unknown, never happened": ["a w1 0 1", "b w2 2", "c r1 3 4", "c r1 5 6"],
    "unknown, happened": ["a w1 0 1", "b w2 2", "c r2 3 4", "c r2 5 6"],
    "unknown, happened much later": [
        "a w1 0 1", "b w2 2", "c r1 3 4", "a w3 5 6", "c r3 7 8", "c r2 9 10",
    ],
    "unknown deletion": ["a w1 0 1", "b d 2", "c r1 3 4", "c r- 5 6"],
    "unknown write, seen by a deletion": ["a w1 0", "b d- 1 2", "b d+ 3 4", "b r- 5 6"],
    "unknown read": ["a w1 0 1", "b r- 2"],
    "two unknown, in an order of their own": ["a w1 0", "b w2 1", "c r2 2 3", "c r1 4 5"],
    "the same unknown twice": ["a d 0", "b d 1", "c w1 2 3", "c r- 4 5", "c w2 6 7", "c r- 8 9"],
    "one claim wins": ["a c+ 0 1", "b c- 2 3", "c c- 2 4"],
    "the later of two wins while both run": ["a c- 0 9", "b c+ 1 2"],
    "an unknown claim won": ["a c 0", "b c- 1 2"],
    "an unknown claim lost": ["a c 0", "b c+ 1 2", "c c- 3 4"],
}  # fmt: skip

VIOLATIONS = {
    "stale read": ["a w1 0 1", "a w2 2 3", "b r1 4 5"],
    "stale read beside a write, after a new one": ["a w1 0 9", "b r1 1 2", "c r- 3 4"],
    "lost write": ["a w1 0 1", "b r- 2 3"],
    "lost write, seen by a deletion": ["a w1 0 1", "b d- 2 3"],
    "lost deletion": ["a w1 0 1", "a d+ 2 3", "b r1 4 5"],
    "deleted twice": ["a w1 0 1", "a d+ 2 8", "b d+ 2 9"],
    "out of the blue": ["a w1 0 1", "b r7 2 3"],
    "read before it was asked for": ["b r1 0 1", "a w1 2 3"],
    "an unknown write read before it was asked for": ["b r1 0 1", "a w1 2"],
    "an overwritten value comes back": ["a w1 0 5", "b w2 0 5", "c r1 6 7", "c r2 8 9"],
    "an unknown write happens twice": [
        "a w1 0", "b r1 1 2", "c w2 3 4", "c r2 5 6", "b r1 7 8",
    ],
    "two readers disagree on the order": [
        "a w1 0 20", "b w2 0 20", "c r1 1 2", "c r2 3 4", "d r1 5 6",
    ],
    "claimed twice": ["a c+ 0 1", "b c+ 2 3"],
    "claimed twice, at the same time": ["a c+ 0 9", "b c+ 0 9"],
    "nobody won": ["a c- 0 1"],
    "nobody that had begun won": ["a c- 0 1", "b c 2"],
}  # fmt: skip


def verdict(operations: Sequence[Operation]) -> Verdict:
    (result,) = judge(operations)
    return result


def fits(order: Sequence[Operation]) -> bool:
    """Whether that order is legal and keeps real time."""
    state: State = initial_state(order[0]) if order else None
    latest_invocation = -1
    for operation in order:
        latest_invocation = max(latest_invocation, operation.invoked)
        if operation.completed is not None and operation.completed < latest_invocation:
            return False
        state, result = step(state, operation)
        if operation.completed is not None and operation.result != result:
            return False
    return True


def assert_is_witness(result: Verdict, operations: Sequence[Operation]) -> None:
    assert len(set(result.order)) == len(result.order)
    known = {o for o in operations if o.completed is not None}
    assert known <= set(result.order) <= set(operations)
    assert fits(result.order)


def is_linearizable_by_force(operations: Sequence[Operation]) -> bool:
    """Every order of every subset that has all of known outcome."""
    known = [o for o in operations if o.completed is not None]
    unknown = [o for o in operations if o.completed is None]
    return any(
        fits(order)
        for count in range(len(unknown) + 1)
        for chosen in itertools.combinations(unknown, count)
        for order in itertools.permutations([*known, *chosen])
    )


@pytest.mark.parametrize("lines", LINEARIZABLE.values(), ids=LINEARIZABLE.keys())
def test_histories_of_an_atomic_object(lines: list[str]) -> None:
    operations = [op(line) for line in lines]
    result = verdict(operations)
    assert result.outcome is Outcome.LINEARIZABLE, result.explanation
    assert_is_witness(result, operations)
    assert is_linearizable_by_force(operations)


@pytest.mark.parametrize("lines", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_histories_of_no_atomic_object(lines: list[str]) -> None:
    operations = [op(line) for line in lines]
    assert verdict(operations).outcome is Outcome.VIOLATION
    assert not is_linearizable_by_force(operations)


@st.composite
def tiny_histories(draw: st.DrawFn, kinds: Sequence[Kind]) -> list[Operation]:
    """Up to six operations with times and answers at random; about half are linearizable."""
    operations = []
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(kinds))
        argument = draw(st.sampled_from("12")) if kind is Kind.WRITE else None
        result: str | bool | None = True
        if kind is Kind.READ:
            result = draw(st.sampled_from([None, "1", "2"]))
        elif kind is not Kind.WRITE:
            result = draw(st.booleans())
        # No two places in real time are the same.
        invoked = draw(st.integers(0, 12)) * 16 + number
        operation = Operation(number, kind, "k", argument, invoked)
        if draw(st.integers(0, 3)):
            operation.completed = invoked + draw(st.integers(1, 8)) * 16 + 8
            operation.result = result
        operations.append(operation)
    return operations


REGISTER = [Kind.WRITE, Kind.READ, Kind.DELETE]


@settings(max_examples=500, deadline=None)
@given(st.one_of(tiny_histories(REGISTER), tiny_histories([Kind.CLAIM])))
def test_verdicts_are_those_of_brute_force(operations: list[Operation]) -> None:
    result = verdict(operations)
    linearizable = is_linearizable_by_force(operations)
    assert result.outcome is (Outcome.LINEARIZABLE if linearizable else Outcome.VIOLATION)
    assert (check(operations) is None) == linearizable
    if linearizable:
        assert_is_witness(result, operations)


def atomic_history(
    seed: int, count: int = 300, clients: int = 6, keys: int = 1, unknown: float = 0.1
) -> list[Operation]:
    """Of objects where each operation happens at one moment between question and answer."""
    rng = random.Random(seed)
    history = History()
    operations: dict[int, Operation] = {}
    states: dict[str, State] = {}
    results: dict[int, str | bool | None] = {}
    events: list[tuple[float, int, str]] = []
    idle_from = [0.0] * clients
    for number in range(count):
        client = rng.randrange(clients)
        invoked = idle_from[client] + rng.expovariate(1.0)
        happens = invoked + rng.expovariate(1.0)
        idle_from[client] = happens + rng.expovariate(1.0)
        events.append((invoked, number, f"invoked by {client}"))
        if rng.random() >= unknown:
            events += [(happens, number, "happens"), (idle_from[client], number, "completed")]
        elif rng.random() < 0.5:
            events.append((invoked + rng.expovariate(0.02), number, "happens"))
    for _, number, what in sorted(events):
        if what == "happens":
            operation = operations[number]
            state = states.get(operation.key, initial_state(operation))
            states[operation.key], result = step(state, operation)
            assert result is None or isinstance(result, str | bool)
            results[number] = result
        elif what == "completed":
            history.complete(operations[number], results[number])
        else:
            kind = rng.choice([Kind.WRITE, Kind.WRITE, Kind.READ, Kind.READ, Kind.DELETE])
            key = f"u{rng.randrange(keys)}"
            if rng.random() < 0.1:
                kind, key = Kind.CLAIM, "r" + key
            argument = f"v{number}" if kind is Kind.WRITE else None
            operations[number] = history.invoke(int(what.split()[-1]), kind, key, argument)
    return history.operations


@pytest.mark.parametrize("seed", range(40))
def test_an_atomic_object_is_linearizable(seed: int) -> None:
    operations = atomic_history(seed, keys=1 + seed % 3, unknown=(0.0, 0.1, 0.4)[seed % 3])
    assert check(operations) is None
    for result in judge(operations):
        assert_is_witness(result, [o for o in operations if o.key == result.key])
        assert result.configurations < 3_000  # tens of milliseconds


@pytest.mark.parametrize("seed", range(40))
def test_one_stale_read_among_hundreds_is_found(seed: int) -> None:
    operations = atomic_history(seed, unknown=(0.0, 0.1, 0.4)[seed % 3])
    written = [o for o in operations if o.kind is Kind.WRITE and o.completed is not None]
    old = written[5]
    new = next(o for o in written if o.invoked > (old.completed or 0))
    read = random.Random(seed).choice(
        [o for o in operations if o.kind is Kind.READ and o.completed is not None
         and o.invoked > (new.completed or 0)]
    )  # fmt: skip
    read.result = old.argument
    (result,) = [r for r in judge(operations) if r.key == "u0"]
    assert result.outcome is Outcome.VIOLATION
    # The counter-example ends with the lie: what came after it played no part.
    assert result.explanation.endswith(str(read))
    assert_is_witness(result, [o for o in result.order if o is not read])
    assert all(o.invoked < (read.completed or 0) for o in result.order)


@pytest.mark.parametrize("seed", range(10))
def test_a_second_winner_is_found(seed: int) -> None:
    operations = atomic_history(seed, unknown=0.0)
    assert check(operations) is None
    losers = [o for o in operations if o.kind is Kind.CLAIM and o.result is False]
    losers[-1].result = True
    assert (check(operations) or "").startswith("not linearizable: ru0")


def test_keys_are_apart() -> None:
    write = op("a w1 0 1")
    absent = dataclasses.replace(op("b r- 2 3"), key="other")
    assert check([write, absent]) is None
    assert [result.key for result in judge([absent, write])] == ["k", "other"]


def test_the_limit_makes_it_undecided_not_good() -> None:
    operations = [op(f"a w{n} {n} 100") for n in range(9)] + [op("b rx 101 102")]
    assert judge(operations)[0].outcome is Outcome.VIOLATION
    (result,) = judge(operations, max_configurations=100)
    assert result.outcome is Outcome.UNDECIDED
    assert result.configurations == 101
    many = [op(f"a w{n % 10} {n} 100") for n in range(30)] + [op("b rx 101 102")]
    for number, write in enumerate(many[:-1]):
        write.argument = f"v{number}"
    assert (check(many) or "").startswith("undecided: k\n")


def test_many_unknown_outcomes_are_cheap() -> None:
    unknown = [op(f"u w{n % 10} {n}") for n in range(200)]
    reads = [op(f"r r{n % 10} {300 + 2 * n} {301 + 2 * n}") for n in range(200)]
    good = verdict(unknown + reads)
    assert good.outcome is Outcome.LINEARIZABLE
    assert good.configurations < 1_000
    bad = verdict([*unknown, *reads, op("r rx 900 901")])
    assert bad.outcome is Outcome.VIOLATION
    assert bad.configurations < 1_000


def test_a_counter_example_can_be_read() -> None:
    operations = [op("a w1 0 1"), op("a w2 2 3"), op("b d 4"), op("b r1 5 6"), op("b r2 7 8")]
    assert check(operations) == (
        "not linearizable: k\n"
        "  up to some answer all fits; the order of 2 operations ends:\n"
        "         0 to      1  client 0: write 1 -> True\n"
        "         2 to      3  client 0: write 2 -> True\n"
        "  the next answer fits into no order:\n"
        "         5 to      6  client 1: read -> 1"
    )


def test_a_history_keeps_the_order_of_its_calls() -> None:
    history = History()
    write = history.invoke(1, Kind.WRITE, "u1", "x")
    read = history.invoke(2, Kind.READ, "u1")
    refused = history.invoke(3, Kind.DELETE, "u1")
    history.complete(read, None)
    history.failed(refused)
    history.complete(write, True)
    lost = history.invoke(4, Kind.CLAIM, "r1")
    assert history.operations == [write, read, lost]
    places = [(o.invoked, o.completed, o.result) for o in history.operations]
    assert places == [(1, 5, True), (2, 4, None), (6, None, None)]
    with pytest.raises(AssertionError, match="complete already"):
        history.complete(read, "x")
