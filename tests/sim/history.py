"""What clients asked of the cluster and what they were told, in the order in which it happened.

Knows neither the cluster nor a clock: real time is the order of the calls into a `History`.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a client can ask. The comments say what the answer is."""

    WRITE = "write"  # True
    READ = "read"  # the value, or None if there is none
    DELETE = "delete"  # whether there was a value
    CLAIM = "claim"  # True for the first that claims this key, False for all others


@dataclass(slots=True, eq=False)
class Operation:
    """One request and its answer; `invoked` and `completed` are places in real time."""

    client: int
    kind: Kind
    key: str
    argument: str | None  # the value to write, another for each write or less is found
    invoked: int
    completed: int | None = None  # None: it may have happened at any time since, or never
    result: str | bool | None = None

    def __str__(self) -> str:
        what = self.kind if self.argument is None else f"{self.kind} {self.argument}"
        result = "?" if self.completed is None else str(self.result)
        until = "" if self.completed is None else self.completed
        return f"{self.invoked:>6} to {until:>6}  client {self.client}: {what} -> {result}"


class History:
    """A record of concurrent operations."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []  # in the order in which they were invoked
        self._place = 0

    def invoke(self, client: int, kind: Kind, key: str, argument: str | None = None) -> Operation:
        """A client asks. Without `complete` or `failed` the outcome stays unknown."""
        self._place += 1
        operation = Operation(client, kind, key, argument, self._place)
        self.operations.append(operation)
        return operation

    def complete(self, operation: Operation, result: str | bool | None) -> None:
        """It happened, with that answer."""
        assert operation.completed is None, f"{operation} is complete already"
        self._place += 1
        operation.completed = self._place
        operation.result = result

    def failed(self, operation: Operation) -> None:
        """It did not happen and will not, or so the client was told: no history knows of it."""
        self.operations.remove(operation)
