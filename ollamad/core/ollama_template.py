"""How a chat becomes a prompt by a template in Ollama's language. Pure.

A template names `.Messages`, then it is executed once with all of them; or it is of the older kind
with `.System`, `.Prompt` and `.Response`, then it is executed once for each turn, and the last
turn is cut off where the answer is to come. Messages of one role that follow each other are one.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from ollamad.core.gotemplate import Record, parse
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
from ollamad.core.inference import Message

_RESPONSE = Action(Pipe(((Field(("Response",)),),)))
_TYPESCRIPT = {
    "string": "string", "number": "number", "integer": "number", "boolean": "boolean",
    "array": "any[]", "object": "Record<string, any>", "null": "null",
}  # fmt: skip


class ChatTemplate:
    """A parsed template. `today` and `yesterday` are what it may ask for, as 2026-01-31.

    Raises:
      TemplateError: it cannot be read; also what rendering raises.
    """

    def __init__(self, source: str, *, today: str = "", yesterday: str = "") -> None:
        template = parse(
            source,
            {
                "currentDate": lambda *_: today,
                "yesterdayDate": lambda *_: yesterday,
                "toTypeScriptType": _typescript_type,
            },
        )
        names = set(_names_in(template.root))
        for body in template.definitions.values():
            names.update(_names_in(body))
        if not names & {"messages", "response"}:
            template = template.with_root((*template.root, _RESPONSE))
        self.takes_messages = "messages" in names
        self.takes_suffix = "suffix" in names
        self._template = template

    def fill_in(self, prompt: str, suffix: str) -> str:
        """The prompt for what belongs between two texts."""
        return self._template.render(
            {"Prompt": prompt, "Suffix": suffix, "Response": ""} | _think_values("")
        )

    def render(self, messages: Sequence[Message], tools: str = "", think: str = "") -> str:
        """The prompt of a chat, up to where the answer begins.

        Args:
          tools: functions as JSON text, in OpenAI's form.
          think: on, off, a level, or empty where nobody said.
        """
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        merged = list(_merged(messages))
        if self.takes_messages:
            return self._template.render(
                {
                    "System": system,
                    "Messages": [_message_record(message) for message in merged],
                    "Tools": _tool_records(tools),
                    "Response": "",
                }
                | _think_values(think)
            )
        return self._render_turns(merged, think)

    def _render_turns(self, messages: Iterable[Message], think: str) -> str:
        turn = _Turn()
        done: list[str] = []

        def end_turn() -> None:
            nonlocal turn
            done.append(self._template.render(turn.values(think)))
            turn = _Turn()

        for message in messages:
            match message.role:
                case "system":
                    if turn.prompt or turn.response:
                        end_turn()
                    turn.system = message.content
                case "user":
                    if turn.response:
                        end_turn()
                    turn.prompt = message.content
                case "assistant":
                    turn.response = message.content
        last = self._template.with_root(_cut_at_response(self._template.root))
        return "".join((*done, last.render(turn.values(think))))


@dataclasses.dataclass(slots=True)
class _Turn:
    system: str = ""
    prompt: str = ""
    response: str = ""

    def values(self, think: str) -> dict[str, Any]:
        shown = {"System": self.system, "Prompt": self.prompt, "Response": self.response}
        return shown | _think_values(think)


def _think_values(think: str) -> dict[str, Any]:
    level = think if think not in ("", "on", "off") else ""
    return {"Think": think not in ("", "off"), "ThinkLevel": level, "IsThinkSet": bool(think)}


def _merged(messages: Iterable[Message]) -> Iterator[Message]:
    """Neighbours of one role as one message, but for tools' results."""
    before: Message | None = None
    for message in messages:
        if before is not None and before.role == message.role != "tool":
            content = f"{before.content}\n\n{message.content}"
            before = msgspec.structs.replace(before, content=content)
            continue
        if before is not None:
            yield before
        before = message
    if before is not None:
        yield before


def _message_record(message: Message) -> Record:
    return Record(
        {
            "Role": message.role,
            "Content": message.content,
            "Thinking": message.thinking,
            "Images": [],
            "ToolCalls": [
                Record(
                    {
                        "ID": call.id,
                        "Function": _record_of(
                            {
                                "index": call.index,
                                "name": call.name,
                                "arguments": msgspec.json.decode(call.arguments),
                            },
                            maps=("arguments",),
                        ),
                    }
                )
                for call in message.tool_calls
            ],
            "ToolName": message.tool_name,
            "ToolCallID": message.tool_call_id,
        }
    )


def _tool_records(tools: str) -> Any:
    """The tools as Go has them; printed, they are JSON. Nothing if there are none."""
    if not tools:
        return None
    return [_tool_record(tool) for tool in msgspec.json.decode(tools)]


def _tool_record(tool: dict[str, Any]) -> Record:
    function = dict(tool.get("function") or {})
    parameters = dict(function.get("parameters") or {})
    properties = {
        name: Record(
            {
                "Type": _type_record(about.get("type")),
                "Items": about.get("items"),
                "Description": about.get("description") or "",
                "Enum": about.get("enum") or [],
                "AnyOf": about.get("anyOf") or [],
                "ToTypeScriptType": _typescript_type(about),
            },
            shown=about,
        )
        for name, about in (parameters.get("properties") or {}).items()
        if isinstance(about, dict)
    }
    fields = {
        "Type": parameters.get("type") or "",
        "Required": parameters.get("required") or [],
        "Items": parameters.get("items"),
        "Defs": parameters.get("$defs"),
        "Properties": properties,
    }
    shown = Record(fields, shown=parameters)
    about_function = {
        "Name": function.get("name") or "",
        "Description": function.get("description") or "",
        "Parameters": shown,
    }
    outer = {
        "Type": tool.get("type") or "function",
        "Items": tool.get("items"),
        "Function": Record(about_function, shown=function),
    }
    return Record(outer, shown=tool)


def _record_of(value: dict[str, Any], maps: tuple[str, ...]) -> Record:
    """A struct with Go's names for these JSON names; `maps` stay maps, which print as JSON."""
    fields = {
        name.title(): Record(dict(item), shown=item) if name in maps else item
        for name, item in value.items()
    }
    return Record(fields, shown=value)


def _type_record(kind: Any) -> Any:
    """A property's type: one word, or several."""
    if isinstance(kind, list):
        return Record({}, shown=kind[0] if len(kind) == 1 else f"[{' '.join(map(str, kind))}]")
    return kind or ""


def _typescript_type(about: Any) -> str:
    """How TypeScript would write the type of a property, as in the template of gpt-oss."""
    if isinstance(about, Record):
        about = about.shown
    if not isinstance(about, dict):
        return "any"
    if isinstance(about.get("anyOf"), list):
        return " | ".join(dict.fromkeys(_typescript_type(each) for each in about["anyOf"]))
    kind = about.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    words = []
    for each in kinds:
        items = about.get("items")
        if each == "array" and isinstance(items, dict) and items.get("type"):
            words.append(f"{_typescript_type(items)}[]")
        else:
            words.append(_TYPESCRIPT.get(each, "any") if isinstance(each, str) else "any")
    return " | ".join(words)


# Looking at, and cutting, the tree.


def _names_in(nodes: Iterable[Node]) -> Iterator[str]:
    """The names of all fields and variables, in lower case."""
    for node in nodes:
        match node:
            case Action(pipe):
                yield from _names_of(pipe)
            case Branch(_, pipe, then, otherwise):
                yield from _names_of(pipe)
                yield from _names_in(then)
                yield from _names_in(otherwise)
            case Call(_, Pipe() as pipe, _):
                yield from _names_of(pipe)
            case Call() | Text() | Jump():
                pass


def _names_of(operand: Operand) -> Iterator[str]:
    match operand:
        case Pipe(commands):
            for command in commands:
                for each in command:
                    yield from _names_of(each)
        case Field(names) | Variable(_, names):
            yield from (name.lower() for name in names)
        case Chain(pipe, names):
            yield from _names_of(pipe)
            yield from (name.lower() for name in names)
        case Dot() | Literal() | Function():
            pass


def _cut_at_response(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The tree without all that stands at or behind `.Response`; conditions do not count."""
    was_cut = False

    def kept(operand: Operand) -> Operand | None:
        nonlocal was_cut
        if isinstance(operand, Field) and "Response" in operand.names:
            was_cut = True
            return None
        if was_cut:
            return None
        return pipe_of(operand) if isinstance(operand, Pipe) else operand

    def pipe_of(pipe: Pipe) -> Pipe | None:
        commands = []
        for command in pipe.commands:
            operands = tuple(left for each in command if (left := kept(each)) is not None)
            if not operands:
                return None
            commands.append(operands)
        return dataclasses.replace(pipe, commands=tuple(commands))

    def walk(nodes: Sequence[Node]) -> tuple[Node, ...]:
        left: list[Node] = []
        for node in nodes:
            if was_cut:
                break
            match node:
                case Action(pipe):
                    if (rest := pipe_of(pipe)) is not None:
                        left.append(Action(rest))
                case Branch(_, _, then, otherwise):
                    before = walk(then)
                    after = walk(otherwise)
                    left.append(dataclasses.replace(node, then=before, otherwise=after))
                case _:
                    left.append(node)
        return tuple(left)

    return walk(nodes)
