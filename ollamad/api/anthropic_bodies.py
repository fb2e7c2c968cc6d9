"""Request bodies of Anthropic's `/v1/messages`."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.bodies import INT32_MAX, format_text, invalid, unsupported
from ollamad.api.conversation import OfferedFunction, OfferedTool, read_images, read_tools
from ollamad.core.inference import Message, Options, ToolCall

_CHOICES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}

Content = str | tuple[dict[str, Any], ...]


class Turn(msgspec.Struct, frozen=True):
    role: str
    content: Content


class Tool(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None  # "custom", or a tool of Anthropic's own


class ToolChoice(msgspec.Struct, frozen=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    type: str
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    format: OutputFormat | None = None


class CountBody(msgspec.Struct, frozen=True, kw_only=True):
    """What `/v1/messages/count_tokens` takes."""

    model: str
    messages: tuple[Turn, ...]
    system: Content | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def read_messages(self) -> tuple[Message, ...]:
        """The conversation.

        Raises:
          ServiceError: 400 naming the block.
        """
        if not self.messages:
            raise invalid("messages", "messages must not be empty", expected="array")
        messages: list[Message] = []
        if self.system:
            messages.append(Message("system", _text_of(self.system, "system")))
        for index, turn in enumerate(self.messages):
            if turn.role not in ("user", "assistant"):
                field = f"messages.{index}.role"
                raise invalid(field, f"{field} must be user or assistant", expected="user")
            messages += _read_turn(turn, f"messages.{index}.content")
        return tuple(messages)

    def offered(self) -> tuple[str, str]:
        """The tools as the scheduler takes them, and whether they may or must be called.

        Raises:
          ServiceError: 400 naming the tool.
        """
        tools = self.tools or ()
        choice = self.tool_choice
        for index, tool in enumerate(tools):
            if tool.type not in (None, "custom"):
                raise unsupported(f"tools.{index}.type {tool.type[:40]!r}")
        if choice is not None and choice.type not in _CHOICES:
            known = ", ".join(_CHOICES)
            raise invalid("tool_choice.type", f"tool_choice.type must be one of {known}")
        if choice is not None and choice.type == "tool":
            tools = tuple(tool for tool in tools if tool.name == choice.name)
            if not tools:
                message = "tool_choice.name must be the name of one of the tools"
                raise invalid("tool_choice.name", message, expected="name")
        functions = [
            OfferedFunction(
                tool.name, tool.description or "", tool.input_schema or {"type": "object"}
            )
            for tool in tools
        ]
        offered = [OfferedTool("function", function) for function in functions]
        return read_tools(offered), _CHOICES[choice.type] if choice and tools else ""

    def think(self, *, thinks: bool) -> str:
        """How the model is to think, as the scheduler takes it: not unless it is asked to.

        Raises:
          ServiceError: 400.
        """
        if self.thinking is not None and self.thinking.type not in _THINKING:
            known = ", ".join(_THINKING)
            raise invalid("thinking.type", f"thinking.type must be one of {known}", expected=known)
        if not thinks:
            return ""
        return _THINKING[self.thinking.type] if self.thinking else "off"


_THINKING = {"enabled": "on", "adaptive": "on", "disabled": "off"}


class MessagesBody(CountBody, frozen=True, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    stop_sequences: tuple[str, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its place while it was a beta

    @property
    def format(self) -> str:
        """The format as the scheduler takes it: "" or a schema as text.

        Raises:
          ServiceError: 400 naming the field.
        """
        wanted = self.output_format
        if self.output_config is not None and self.output_config.format is not None:
            wanted = self.output_config.format
        if wanted is None:
            return ""
        if wanted.type != "json_schema":
            message = "output_config.format.type must be json_schema"
            raise invalid("output_config.format.type", message, expected="json_schema")
        if not wanted.schema:
            message = "output_config.format.schema is missing"
            raise invalid("output_config.format.schema", message, expected="object")
        return format_text(wanted.schema)

    def options(self) -> Options:
        """The options; temperature is 1 unless the request says otherwise.

        Raises:
          ServiceError: 400 naming the field.
        """
        if not 0 < self.max_tokens <= INT32_MAX:
            raise invalid("max_tokens", "max_tokens must be 1 or more", expected="integer")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise invalid(name, f"{name} must be from 0 to 1", expected="number")
        if self.top_k is not None and not 0 <= self.top_k <= INT32_MAX:
            raise invalid("top_k", "top_k must not be negative", expected="integer")
        return Options(
            num_predict=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )


def _text_of(content: Content, field: str) -> str:
    """A content of text blocks only."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise _bad_block(block, f"{field}.{index}")
    return "\n\n".join(texts)


def _read_turn(turn: Turn, field: str) -> list[Message]:
    """A turn as messages: the results of tools are messages of their own, before the rest."""
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    texts: list[str] = []
    thoughts: list[str] = []
    images: list[bytes] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for index, block in enumerate(turn.content):
        where = f"{field}.{index}"
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image", "source": {"type": "base64", "data": str(data)}}:
                images += read_images((data,), f"{where}.source.data")
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "name": str(name), "input": dict(given)}:
                id_ = block.get("id")
                arguments = msgspec.json.encode(given).decode()
                calls.append(
                    ToolCall(name, arguments, id_ if isinstance(id_, str) else "", len(calls))
                )
            case {"type": "tool_result", "tool_use_id": str(id_)}:
                text, pictures = _read_result(block.get("content") or "", f"{where}.content")
                images += pictures
                results.append(Message("tool", text, tool_call_id=id_))
            case _:
                raise _bad_block(block, where)
    if not (texts or images or calls or thoughts) and results:
        return results
    said = Message(
        turn.role,
        "\n\n".join(texts),
        thinking="".join(thoughts),
        tool_calls=tuple(calls),
        images=tuple(images),
    )
    return [*results, said]


def _read_result(content: Any, field: str) -> tuple[str, tuple[bytes, ...]]:
    if isinstance(content, str):
        return content, ()
    texts: list[str] = []
    images: list[bytes] = []
    blocks: Sequence[Any] = content if isinstance(content, list) else (content,)
    for index, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image", "source": {"type": "base64", "data": str(data)}}:
                images += read_images((data,), f"{field}.{index}.source.data")
            case _:
                raise _bad_block(block, f"{field}.{index}")
    return "\n\n".join(texts), tuple(images)


def _bad_block(block: Any, field: str) -> Exception:
    kind = block.get("type") if isinstance(block, dict) else None
    known = ("text", "image", "thinking", "tool_use", "tool_result")
    if isinstance(kind, str) and kind not in known:
        return unsupported(f"{field}.type {kind[:40]!r}")
    if kind == "image":
        message = f"{field}.source must be base64: no URL is fetched"
        return invalid(f"{field}.source", message, expected="base64")
    return invalid(field, f"{field} is no complete block", expected=" | ".join(known))
