"""Executes a parsed template on some data, within bounds."""

from collections.abc import Iterable, Mapping
from typing import Any

from ollamad.core.gotemplate.errors import TemplateError
from ollamad.core.gotemplate.functions import BUILTINS, Callee, printed
from ollamad.core.gotemplate.nodes import (
    Action,
    Branch,
    Call,
    Chain,
    Dot,
    Field,
    Function,
    Jump,
    Literal,
    Node,
    Operand,
    Pipe,
    Text,
    Variable,
)
from ollamad.core.gotemplate.parser import Parser
from ollamad.core.gotemplate.values import Record, field, is_true, kind

# Nodes and operands that are looked at: a chat of a thousand messages takes some 50,000; these
# many take less than a second.
MAX_STEPS = 400_000
MAX_OUTPUT = 32 << 20  # characters; no context holds as much
MAX_CALLS = 100  # of templates within templates

_LAZY = frozenset({"and", "or"})


class Template:
    """A parsed template. It may be rendered many times, in any thread."""

    def __init__(
        self,
        root: tuple[Node, ...],
        definitions: Mapping[str, tuple[Node, ...]],
        functions: Mapping[str, Callee],
    ) -> None:
        self.root = root
        self.definitions = definitions
        self._functions = functions

    def with_root(self, root: tuple[Node, ...]) -> "Template":
        """The same with another tree."""
        return Template(root, self.definitions, self._functions)

    def render(self, data: Any) -> str:
        """The text that it makes of this data.

        Raises:
          TemplateError: it does what cannot be done, or too much of it.
        """
        run = _Run(self.definitions, self._functions)
        try:
            run.body(self.root, data, [("$", data)])
        except RecursionError:
            raise TemplateError("it is nested too deeply") from None
        return "".join(run.output)


def parse(source: str, functions: Mapping[str, Callee] | None = None) -> Template:
    """Read a template, which may use these functions besides Go's own.

    Raises:
      TemplateError: it is none.
    """
    known = BUILTINS | dict(functions or {})
    parser = Parser(source, frozenset(known) | _LAZY)
    return Template(parser.parse(), parser.definitions, known)


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


Scope = list[tuple[str, Any]]  # the variables, innermost last


class _Run:
    def __init__(
        self, definitions: Mapping[str, tuple[Node, ...]], functions: Mapping[str, Callee]
    ) -> None:
        self.output: list[str] = []
        self._definitions = definitions
        self._functions = functions
        self._steps = 0
        self._length = 0
        self._calls = 0

    def body(self, nodes: Iterable[Node], dot: Any, scope: Scope) -> None:
        """Execute some nodes; what they declare ends with them."""
        depth = len(scope)
        try:
            for node in nodes:
                self._count()
                match node:
                    case Text(text):
                        self._write(text)
                    case Action(pipe):
                        value = self._pipe(pipe, dot, scope)
                        if not pipe.variables:
                            self._write(printed(value))
                    case Branch("range"):
                        self._range(node, dot, scope)
                    case Branch():
                        self._branch(node, dot, scope)
                    case Call():
                        self._call(node, dot, scope)
                    case Jump(what):
                        raise _Break if what == "break" else _Continue
        finally:
            del scope[depth:]

    def _branch(self, node: Branch, dot: Any, scope: Scope) -> None:
        depth = len(scope)
        value = self._pipe(node.pipe, dot, scope)
        if is_true(value):
            self.body(node.then, value if node.kind == "with" else dot, scope)
        else:
            self.body(node.otherwise, dot, scope)
        del scope[depth:]

    def _range(self, node: Branch, dot: Any, scope: Scope) -> None:
        value = self._evaluate(node.pipe, dot, scope)
        pairs = _pairs(value, node.pipe.line)
        names = node.pipe.variables
        ran = False
        for key, item in pairs:
            ran = True
            self._count()
            depth = len(scope)
            values = (key, item) if len(names) == 2 else (item,)
            for name, each in zip(names, values, strict=False):
                self._set(name, each, node.pipe.assigns, scope)
            try:
                self.body(node.then, item, scope)
            except _Continue:
                continue
            except _Break:
                break
            finally:
                del scope[depth:]
        if not ran:
            self.body(node.otherwise, dot, scope)

    def _call(self, node: Call, dot: Any, scope: Scope) -> None:
        body = self._definitions.get(node.name)
        if body is None:
            raise TemplateError(f"line {node.line}: there is no template {node.name!r}")
        self._calls += 1
        if self._calls > MAX_CALLS:
            raise TemplateError(f"templates call each other more than {MAX_CALLS} deep")
        value = None if node.pipe is None else self._pipe(node.pipe, dot, scope)
        self.body(body, value, [("$", value)])
        self._calls -= 1

    def _pipe(self, pipe: Pipe, dot: Any, scope: Scope) -> Any:
        value = self._evaluate(pipe, dot, scope)
        for name in pipe.variables:
            self._set(name, value, pipe.assigns, scope)
        return value

    def _evaluate(self, pipe: Pipe, dot: Any, scope: Scope) -> Any:
        value: Any = None
        for place, command in enumerate(pipe.commands):
            piped = (value,) if place else ()
            try:
                value = self._command(command, piped, dot, scope)
            except TemplateError as error:
                if str(error).startswith("line "):
                    raise
                raise TemplateError(f"line {pipe.line}: {error}") from None
        return value

    def _command(
        self, command: tuple[Operand, ...], piped: tuple[Any, ...], dot: Any, scope: Scope
    ) -> Any:
        first, *rest = command
        if not isinstance(first, Function):
            if piped:
                raise TemplateError("what stands behind a | must be a function")
            return self._operand(first, dot, scope)
        if first.name in _LAZY:
            wanted = first.name == "or"
            value: Any = None
            for operand in rest:
                value = self._operand(operand, dot, scope)
                if is_true(value) == wanted:
                    return value
            if piped:
                return piped[0]
            if not rest:
                raise TemplateError(f"{first.name} has no arguments")
            return value
        arguments = [self._operand(operand, dot, scope) for operand in rest]
        try:
            return self._functions[first.name](*arguments, *piped)
        except TypeError as error:
            raise TemplateError(f"{first.name}: wrong number of arguments") from error

    def _operand(self, operand: Operand, dot: Any, scope: Scope) -> Any:
        self._count()
        match operand:
            case Dot():
                return dot
            case Field(names):
                return _follow(dot, names)
            case Variable(name, names):
                value = next(value for known, value in reversed(scope) if known == name)
                return _follow(value, names)
            case Literal(value):
                return value
            case Chain(pipe, names):
                return _follow(self._evaluate(pipe, dot, scope), names)
            case Pipe():
                return self._evaluate(operand, dot, scope)
            case Function():
                return self._command((operand,), (), dot, scope)

    def _set(self, name: str, value: Any, assigns: bool, scope: Scope) -> None:
        if assigns:
            for place in range(len(scope) - 1, -1, -1):
                if scope[place][0] == name:
                    scope[place] = (name, value)
                    return
        scope.append((name, value))

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateError(f"it takes more than {MAX_STEPS:,} steps")

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_OUTPUT:
            raise TemplateError(f"it makes more than {MAX_OUTPUT:,} characters")
        self.output.append(text)


def _follow(value: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = field(value, name)
    return value


def _pairs(value: Any, line: int) -> Iterable[tuple[Any, Any]]:
    """What a range goes through: keys (or places) and items."""
    match value:
        case None:
            return ()
        case list():
            return enumerate(value)
        case dict():
            return value.items()
        case Record(fields):
            return fields.items()
        case bool() | str() | float():
            pass
        case int():
            return ((number, number) for number in range(value))
    raise TemplateError(f"line {line}: a range cannot go through a {kind(value)}")
