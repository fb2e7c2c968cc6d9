"""The parts of a parsed template."""

import dataclasses
from typing import Any, Union


@dataclasses.dataclass(frozen=True, slots=True)
class Dot:
    """`.`"""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """`.A.B`"""

    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """`$x.A`; the name has its `$`."""

    name: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    value: Any  # None is `nil`


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """`(…).A.B`"""

    pipe: "Pipe"
    names: tuple[str, ...]


Operand = Union[Dot, Field, Variable, Function, Literal, Chain, "Pipe"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pipe:
    """Commands, each with the operands that stand in it; the last operand of all but the first
    is what came before."""

    commands: tuple[tuple[Operand, ...], ...]
    variables: tuple[str, ...] = ()
    assigns: bool = False  # `=` and not `:=`
    line: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    pipe: Pipe


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """`if`, `with` or `range`."""

    kind: str
    pipe: Pipe
    then: tuple["Node", ...]
    otherwise: tuple["Node", ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """`{{ template "name" pipe }}`"""

    name: str
    pipe: Pipe | None
    line: int


@dataclasses.dataclass(frozen=True, slots=True)
class Jump:
    """`break` or `continue`"""

    kind: str


Node = Text | Action | Branch | Call | Jump
