"""Makes the tree of a template of its tokens, by recursive descent."""

import re
from collections.abc import Iterator

from ollamad.core.gotemplate.errors import TemplateError
from ollamad.core.gotemplate.lexer import Token, tokens
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

MAX_DEPTH = 100  # of blocks or parentheses in each other

_KEYWORDS = {
    "if", "else", "end", "range", "with", "define", "template", "block", "break", "continue",
}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "nil": None}
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip


class Parser:
    """Parses one source; `definitions` has what it defines by name."""

    def __init__(self, source: str, functions: frozenset[str]) -> None:
        self.definitions: dict[str, tuple[Node, ...]] = {}
        self._functions = functions
        self._tokens: Iterator[Token] = tokens(source)
        self._next = next(self._tokens)
        self._scopes: list[set[str]] = [{"$"}]
        self._depth = 0
        self._loops = 0

    def parse(self) -> tuple[Node, ...]:
        """The template itself.

        Raises:
          TemplateError: it is no template.
        """
        body, ending = self._body()
        if ending is not None:
            raise self._error(f"there is nothing for {{{{{ending}}}}} to end")
        return body

    # Blocks.

    def _body(self) -> tuple[tuple[Node, ...], str | None]:
        """Nodes up to `else` or `end`, whose word was read, or the end of the source."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"it is nested more than {MAX_DEPTH} deep")
        nodes: list[Node] = []
        ending: str | None = None
        while ending is None and self._next.kind != "end":
            token = self._take()
            if token.kind == "text":
                nodes.append(Text(token.text))
                continue
            # Whatever is not text here begins an action; its first token may be a space.
            if token.kind == "space":
                token = self._take()
            if token.kind == "close":
                raise self._error("an action is empty")
            if token.kind == "word" and token.text in _KEYWORDS:
                ending = self._keyword(token, nodes)
            else:
                nodes.append(Action(self._pipe(token, "close", declares=True)))
        self._depth -= 1
        return tuple(nodes), ending

    def _keyword(self, token: Token, nodes: list[Node]) -> str | None:
        match token.text:
            case "if" | "with" | "range":
                nodes.append(self._branch(token.text))
            case "define":
                name = self._name()
                self._expect("close")
                self.definitions[name] = self._definition()
            case "block":
                name = self._name()
                pipe = self._pipe(self._take_solid(), "close")
                self.definitions[name] = self._definition()
                nodes.append(Call(name, pipe, token.line))
            case "template":
                name, then = self._name(), self._take_solid()
                given = None if then.kind == "close" else self._pipe(then, "close")
                nodes.append(Call(name, given, token.line))
            case "break" | "continue":
                if not self._loops:
                    raise self._error(f"{{{{{token.text}}}}} is outside of a range")
                self._expect("close")
                nodes.append(Jump(token.text))
            case "end":
                self._expect("close")
                return "end"
            case _:  # else; what follows it is the branch's affair
                return "else"
        return None

    def _branch(self, kind: str) -> Branch:
        self._scopes.append(set())
        pipe = self._pipe(self._take_solid(), "close", declares=True, ranges=kind == "range")
        self._loops += kind == "range"
        then, ending = self._scoped()
        self._loops -= kind == "range"
        otherwise: tuple[Node, ...] = ()
        if ending == "else":
            after = self._take_solid()
            if after.kind == "word" and after.text in ("if", "with") and kind != "range":
                otherwise = (self._branch(after.text),)
                ending = "end"  # the inner one has read it
            elif after.kind == "close":
                otherwise, ending = self._scoped()
            else:
                raise self._error(f"unexpected {after.text!r} after else")
        if ending != "end":
            raise self._error(f"{{{{{kind}}}}} is not ended")
        self._scopes.pop()
        return Branch(kind, pipe, then, otherwise)

    def _definition(self) -> tuple[Node, ...]:
        outer, self._scopes = self._scopes, [{"$"}]
        loops, self._loops = self._loops, 0
        body, ending = self._body()
        self._scopes, self._loops = outer, loops
        if ending != "end":
            raise self._error("a definition is not ended")
        return body

    def _scoped(self) -> tuple[tuple[Node, ...], str | None]:
        self._scopes.append(set())
        body = self._body()
        self._scopes.pop()
        return body

    # Pipelines.

    def _pipe(
        self, token: Token, closing: str, *, declares: bool = False, ranges: bool = False
    ) -> Pipe:
        """A pipeline that begins with that token, up to the closing one, which is read."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"it is nested more than {MAX_DEPTH} deep")
        line = token.line
        names: list[str] = []
        assigns = False
        held: list[Operand] = []
        if token.kind == "variable" and declares:
            token, names, assigns, held = self._declaration(token, ranges=ranges)
        commands: list[tuple[Operand, ...]] = []
        while True:
            operands = held
            held = []
            while token.kind not in (closing, "pipe"):
                if token.kind != "space":
                    operands.append(self._operand(token))
                    if self._next.kind not in ("space", "pipe", "close", "right"):
                        raise self._error(f"unexpected {self._next.text!r}")
                token = self._take()
            if not operands:
                raise self._error("a command is missing")
            _check_command(operands, is_first=not commands)
            commands.append(tuple(operands))
            if token.kind == closing:
                break
            token = self._take()
        for name in names:
            if assigns:
                self._check_variable(name)
            else:
                self._scopes[-1].add(name)
        self._depth -= 1
        return Pipe(tuple(commands), tuple(names), assigns, line)

    def _declaration(
        self, token: Token, *, ranges: bool
    ) -> tuple[Token, list[str], bool, list[Operand]]:
        """`$x :=`, `$x =` or `$i, $x :=` at the beginning of a pipeline, if that is what it is.

        Returns the token after it, the names, whether they are assigned to, and the first
        operand if it was none.
        """
        first = token
        names = [first.text]
        token = self._take()
        if token.kind == "field":  # `$x.Field`
            operand, token = self._fields_of(first, token)
            return token, [], False, [operand]
        if token.kind == "space" and self._next.kind in ("declare", "assign", "comma"):
            token = self._take()
        if token.kind == "comma" and ranges:
            second = self._take_solid()
            if second.kind != "variable":
                raise self._error("a range has two variables at most")
            names.append(second.text)
            token = self._take_solid()
        if token.kind in ("declare", "assign"):
            return self._take_solid(), names, token.kind == "assign", []
        if len(names) > 1:
            raise self._error("a := is missing")
        self._check_variable(first.text)
        return token, [], False, [Variable(first.text)]

    def _fields_of(self, variable: Token, token: Token) -> tuple[Operand, Token]:
        self._check_variable(variable.text)
        names = []
        while token.kind == "field":
            names.append(token.text[1:])
            token = self._take()
        return Variable(variable.text, tuple(names)), token

    def _operand(self, token: Token) -> Operand:
        match token.kind:
            case "dot":
                return Dot()
            case "field":
                return Field((token.text[1:], *self._names()))
            case "variable":
                self._check_variable(token.text)
                return Variable(token.text, self._names())
            case "word" if token.text in _CONSTANTS:
                return Literal(_CONSTANTS[token.text])
            case "word":
                if token.text not in self._functions:
                    raise TemplateError(f"line {token.line}: there is no function {token.text!r}")
                return Function(token.text)
            case "string":
                return Literal(unquote(token.text[1:-1]))
            case "raw":
                return Literal(token.text[1:-1].replace("\r", ""))
            case "char":
                return Literal(self._character(token))
            case "number":
                return Literal(self._number(token))
            case "left":
                pipe = self._pipe(self._take_solid(), "right")
                names = self._names()
                return Chain(pipe, names) if names else pipe
        raise TemplateError(f"line {token.line}: unexpected {token.text or token.kind!r}")

    def _names(self) -> tuple[str, ...]:
        names = []
        while self._next.kind == "field":
            names.append(self._take().text[1:])
        return tuple(names)

    def _character(self, token: Token) -> int:
        text = unquote(token.text[1:-1])
        if len(text) != 1:
            raise TemplateError(f"line {token.line}: {token.text} is no character")
        return ord(text)

    def _number(self, token: Token) -> int | float:
        text = token.text
        try:
            return int(text, 0) if not re.fullmatch(r"[+-]?0\d+", text) else int(text, 8)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            raise TemplateError(f"line {token.line}: {text} is no number") from None

    # Tokens.

    def _take(self) -> Token:
        token = self._next
        if token.kind == "end":
            raise self._error("it ends in the middle")
        self._next = next(self._tokens)
        return token

    def _take_solid(self) -> Token:
        """The next token that is no space."""
        token = self._take()
        return self._take() if token.kind == "space" else token

    def _expect(self, kind: str) -> None:
        token = self._take_solid()
        if token.kind != kind:
            raise self._error(f"unexpected {token.text!r}")

    def _name(self) -> str:
        token = self._take_solid()
        if token.kind == "string":
            return unquote(token.text[1:-1])
        if token.kind == "raw":
            return token.text[1:-1]
        raise self._error("a name in quotes is missing")

    def _check_variable(self, name: str) -> None:
        if not any(name in scope for scope in self._scopes):
            raise self._error(f"there is no variable {name}")

    def _error(self, message: str) -> TemplateError:
        return TemplateError(f"line {self._next.line}: {message}")


def unquote(text: str) -> str:
    """What stands between quotes, with Go's escapes resolved.

    Raises:
      TemplateError: an escape is none of Go's.
    """

    def resolve(match: re.Match[str]) -> str:
        code = match[0][1:]
        if code in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[code]
        if len(code) == 1:
            raise TemplateError(f"there is no escape {match[0]!r}")
        number = int(code, 8) if code[0] in "01234567" else int(code[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise TemplateError(f"{match[0]!r} is no character")
        return chr(number)

    return _ESCAPE.sub(resolve, text)


def _check_command(operands: list[Operand], *, is_first: bool) -> None:
    """Refuse what can never be called, as Go does when it parses."""
    first = operands[0]
    constant = isinstance(first, Literal | Dot)
    if not is_first and constant:
        raise TemplateError("what stands behind a | must be a function")
    if len(operands) > 1 and not isinstance(first, Function):
        raise TemplateError(f"{_shown(first)} takes no arguments")


def _shown(operand: Operand) -> str:
    match operand:
        case Dot():
            return "."
        case Field(names):
            return "." + ".".join(names)
        case Variable(name, names):
            return ".".join((name, *names))
        case Literal(value):
            return repr(value)
        case _:
            return "an expression"
