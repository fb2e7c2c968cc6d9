"""Decides whether a history could have come from atomic objects.

The search is Wing and Gong's (1993) with Lowe's memory of the configurations that led nowhere
(2017). Each key is searched by itself, as in Porcupine: a history is linearizable if and only if
that of every object is (P-compositionality). An operation of unknown outcome may take effect at
any time after its invocation, or never.

An object is a register (write, read, delete) or a claim, which the first who asks gets. In both,
the state after an operation follows from its request and answer alone. This allows some shortcuts,
which keep reads and unknown outcomes cheap and leave the verdict as it is:

- An operation that never changes anything, by its kind and answer, comes next where it fits. Were
  it later in some order, it could as well stand here.
- An operation of unknown outcome happens only right before one of known outcome that would not
  fit without it. Elsewhere the next operation would leave the same state without it. Of equal
  ones, the first invoked comes first.
- Values that no operation yet to come reads are all the same.
- Nothing overwrites a value that is yet to be read and that nobody will write again.
"""

import dataclasses
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from tests.sim.history import Kind, Operation

MAX_CONFIGURATIONS = 20_000  # for one key: a second of work, where a usual search needs hundreds
SHOWN_OPERATIONS = 10  # of an order that works, before the operation that does not fit


class _Unread(Enum):
    UNREAD = "a value that nobody reads any more"


State = str | bool | None | _Unread
Result = State


class Outcome(Enum):
    """What a search found."""

    LINEARIZABLE = "linearizable"
    VIOLATION = "not linearizable"
    UNDECIDED = "undecided"  # more than the allowed number of configurations


@dataclass(frozen=True, slots=True)
class Verdict:
    """On the operations with one key."""

    outcome: Outcome
    key: str
    order: tuple[Operation, ...]  # one that works, of all or of what came before the violation
    configurations: int  # how many were looked at
    explanation: str = ""


def check(operations: Iterable[Operation]) -> str | None:
    """None if the history is linearizable, else a text that shows why it is not.

    A search that was given up counts as a failure too; its text begins with "undecided".
    """
    for verdict in judge(operations):
        if verdict.outcome is not Outcome.LINEARIZABLE:
            return f"{verdict.outcome.value}: {verdict.key}\n{verdict.explanation}"
    return None


def judge(
    operations: Iterable[Operation], max_configurations: int = MAX_CONFIGURATIONS
) -> list[Verdict]:
    """A verdict for each key, in the order of their first operations."""
    objects: dict[str, list[Operation]] = {}
    for operation in sorted(operations, key=lambda op: op.invoked):
        objects.setdefault(operation.key, []).append(operation)
    return [_judge_object(key, ops, max_configurations) for key, ops in objects.items()]


def initial_state(operation: Operation) -> State:
    """The state of the operation's object before all operations."""
    return False if operation.kind is Kind.CLAIM else None


def step(state: State, operation: Operation) -> tuple[State, Result]:
    """The state after the operation, and the answer to it."""
    match operation.kind:
        case Kind.WRITE:
            return operation.argument, True
        case Kind.READ:
            return state, state
        case Kind.DELETE:
            return None, state is not None
        case Kind.CLAIM:
            return True, not state


def _never_changes(operation: Operation) -> bool:
    return operation.kind is Kind.READ or operation.result is False


def _judge_object(key: str, operations: list[Operation], max_configurations: int) -> Verdict:
    search = _Search(operations, max_configurations)
    outcome = search.run()
    if outcome is Outcome.LINEARIZABLE:
        return Verdict(outcome, key, tuple(search.order), search.configurations)
    if outcome is Outcome.UNDECIDED:
        explanation = f"  {len(operations)} operations, given up after {max_configurations} steps"
        return Verdict(outcome, key, (), search.configurations, explanation)
    order, culprit = _first_that_does_not_fit(operations, max_configurations)
    lines = [f"  up to some answer all fits; the order of {len(order)} operations ends:"]
    lines += [f"    {operation}" for operation in order[-SHOWN_OPERATIONS:]]
    lines += ["  the next answer fits into no order:", f"    {culprit}"]
    return Verdict(outcome, key, tuple(order), search.configurations, "\n".join(lines))


def _first_that_does_not_fit(
    operations: list[Operation], max_configurations: int
) -> tuple[list[Operation], Operation]:
    """An order of what was answered before, and the first answer that makes it a violation.

    What comes later cannot make a history good.
    """
    answered = sorted(
        (op for op in operations if op.completed is not None), key=lambda op: op.completed or 0
    )

    def search_until(operation: Operation) -> _Search:
        end = operation.completed or 0
        cut = [_without_answer_after(end, op) for op in operations]
        return _Search(cut, max_configurations)

    def fails(operation: Operation) -> bool:
        return search_until(operation).run() is Outcome.VIOLATION

    # The last needs no test, as the whole history fails.
    place = bisect_left(answered[:-1], True, key=fails)
    if place == 0:
        return [], answered[0]
    search = search_until(answered[place - 1])
    search.run()
    return search.order, answered[place]


def _without_answer_after(end: int, operation: Operation) -> Operation:
    if operation.completed is None or operation.completed <= end:
        return operation
    return dataclasses.replace(operation, completed=None, result=None)


@dataclass(frozen=True, slots=True)
class _Configuration:
    """Sets are bits, by the place in `_Search`'s lists."""

    known: int  # the operations of known outcome that happened
    unknown: int  # those of unknown outcome
    state: State


class _Search:
    """Depth first over the configurations of one object."""

    def __init__(self, operations: list[Operation], max_configurations: int) -> None:
        """`operations` come in the order of their invocation."""
        self._known = [op for op in operations if op.completed is not None]
        self._unknown = [
            op for op in operations if op.completed is None and op.kind is not Kind.READ
        ]
        self._everything = (1 << len(self._known)) - 1
        # Places by value, as bits.
        self._readers: dict[State, int] = defaultdict(int)
        self._writers: dict[State, int] = defaultdict(int)
        self._unknown_writers: dict[State, int] = defaultdict(int)
        for place, operation in enumerate(self._known):
            if operation.kind is Kind.READ:
                self._readers[operation.result] |= 1 << place
            elif not _never_changes(operation):
                self._writers[operation.argument] |= 1 << place
        for place, operation in enumerate(self._unknown):
            self._unknown_writers[operation.argument] |= 1 << place
        self._initial = initial_state(operations[0])
        self._max_configurations = max_configurations
        self.configurations = 0
        self.order: list[Operation] = []

    def run(self) -> Outcome:
        seen: set[_Configuration] = set()
        # What is still to be tried: the length of the order before, what comes then, and then.
        todo: list[tuple[int, Operation | None, _Configuration]] = [
            (0, None, _Configuration(0, 0, self._initial))
        ]
        while todo:
            length, operation, before = todo.pop()
            del self.order[length:]
            if operation is not None:
                self.order.append(operation)
            here = self._take_what_never_changes(before)
            if here.known == self._everything:
                return Outcome.LINEARIZABLE
            if here in seen:
                continue
            seen.add(here)
            self.configurations += 1
            if self.configurations > self._max_configurations:
                return Outcome.UNDECIDED
            todo += [(len(self.order), *branch) for branch in self._branches(here)]
        return Outcome.VIOLATION

    def _candidates(self, known: int) -> list[int]:
        """The operations of known outcome that may come next: invoked before any other's answer."""
        missing = self._everything & ~known
        result: list[int] = []
        if not missing:
            return result
        place = (missing & -missing).bit_length() - 1
        first_answer = self._completed(place)
        while place < len(self._known) and self._known[place].invoked < first_answer:
            if missing >> place & 1:
                result.append(place)
                first_answer = min(first_answer, self._completed(place))
            place += 1
        return result

    def _completed(self, place: int) -> int:
        completed = self._known[place].completed
        assert completed is not None
        return completed

    def _take_what_never_changes(self, here: _Configuration) -> _Configuration:
        known = here.known
        found = True
        while found:
            found = False
            for place in self._candidates(known):
                operation = self._known[place]
                if _never_changes(operation) and step(here.state, operation)[1] == operation.result:
                    known |= 1 << place
                    self.order.append(operation)
                    found = True
        return _Configuration(known, here.unknown, self._simplified(here.state, known))

    def _simplified(self, value: State, known: int) -> State:
        if isinstance(value, str) and not self._readers[value] & ~known:
            return _Unread.UNREAD
        return value

    def _loses_a_value(self, value: State, after: _Configuration) -> bool:
        """Whether that value was overwritten for good and is yet to be read."""
        return (
            after.state != value
            and self._readers[value] & ~after.known != 0
            and not self._writers[value] & ~after.known
            and not self._unknown_writers[value] & ~after.unknown
        )

    def _branches(self, here: _Configuration) -> list[tuple[Operation, _Configuration]]:
        """What may come next, the most promising last."""
        fitting, stuck = [], []
        candidates = self._candidates(here.known)
        # The one that was answered first is the likeliest to come first.
        for place in sorted(candidates, key=self._completed, reverse=True):
            operation = self._known[place]
            state, result = step(here.state, operation)
            if result != operation.result:
                stuck.append(operation)
                continue
            after = _Configuration(here.known | 1 << place, here.unknown, state)
            if not self._loses_a_value(here.state, after):
                fitting.append((operation, after))
        first_answer = min(map(self._completed, candidates))
        helping = []
        tried: set[tuple[Kind, State]] = set()
        for place, operation in enumerate(self._unknown):
            if operation.invoked > first_answer:
                break
            request = (operation.kind, self._simplified(operation.argument, here.known))
            if here.unknown >> place & 1 or request in tried:
                continue
            tried.add(request)
            state, _ = step(here.state, operation)
            after = _Configuration(here.known, here.unknown | 1 << place, state)
            if any(
                step(state, blocked)[1] == blocked.result for blocked in stuck
            ) and not self._loses_a_value(here.state, after):
                helping.append((operation, after))
        return helping + fitting
