"""Request bodies of OpenAI's `/v1/responses`.

Nothing is kept between requests: who goes on with a conversation sends it whole.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.bodies import INT32_MAX, format_text, invalid, read_logprobs, unsupported
from ollamad.api.conversation import OfferedFunction, OfferedTool, check_tool_type
from ollamad.api.openai_bodies import ROLES, Tools, read_arguments, read_data_url, think_of
from ollamad.core.inference import Message, Options, ToolCall

WITH_LOGPROBS = "message.output_text.logprobs"  # of `include`


class TextFormat(msgspec.Struct, frozen=True):
    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class Text(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class ResponseTool(msgspec.Struct, frozen=True):
    type: str | None = "function"  # or a tool that OpenAI runs itself
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseBody(msgspec.Struct, frozen=True):
    model: str
    input: str | tuple[dict[str, Any], ...] | None = None
    instructions: str | None = None
    stream: bool | None = None
    tools: tuple[ResponseTool, ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: tuple[str, ...] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    def check(self) -> None:
        """Refuse what cannot be done here.

        Raises:
          ServiceError: 400 naming the field.
        """
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name):
                message = (
                    f"{name}: no responses are kept here; send the whole conversation in input"
                )
                raise invalid(name, message, expected="null")
        for name in ("prompt", "background"):
            if getattr(self, name):
                raise unsupported(name)
        if self.truncation not in (None, "auto", "disabled"):
            message = "truncation must be auto or disabled"
            raise invalid("truncation", message, expected="auto | disabled")

    def options(self) -> Options:
        """The options; temperature and top_p are 1 unless the request says otherwise.

        Raises:
          ServiceError: 400 naming the field.
        """
        limit = self.max_output_tokens
        if limit is not None and not 0 < limit <= INT32_MAX:
            message = "max_output_tokens must be 1 or more"
            raise invalid("max_output_tokens", message, expected="int32")
        for name, high in (("temperature", 2), ("top_p", 1)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise invalid(name, f"{name} must be from 0 to {high}", expected="number")
        return Options(
            num_predict=limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
        )

    def think(self, *, thinks: bool) -> str:
        """How the model is to think, as the scheduler takes it.

        Raises:
          ServiceError: 400.
        """
        effort = self.reasoning.effort if self.reasoning else None
        return think_of("reasoning.effort", effort, thinks=thinks)

    @property
    def candidates(self) -> int:
        """How many likely tokens are to be told for each; -1 if nothing is.

        Raises:
          ServiceError: 400.
        """
        return read_logprobs(WITH_LOGPROBS in (self.include or ()), self.top_logprobs)

    @property
    def format(self) -> str:
        """The format as the scheduler takes it: "", "json" or a schema as text.

        Raises:
          ServiceError: 400.
        """
        wanted = self.text.format if self.text else None
        match wanted:
            case None | TextFormat(type="text"):
                return ""
            case TextFormat(type="json_object"):
                return "json"
            case TextFormat(type="json_schema", schema=dict(schema)) if schema:
                return format_text(schema)
            case TextFormat(type="json_schema"):
                field = "text.format.schema"
                raise invalid(field, f"{field} is missing", expected="object")
        message = "text.format.type must be text, json_object or json_schema"
        raise invalid("text.format.type", message, expected="text | json_object | json_schema")

    def chat_tools(self) -> Tools:
        """The tools in the form that a chat has them.

        Raises:
          ServiceError: 400, one is no function, or has no name.
        """
        tools = []
        for index, tool in enumerate(self.tools or ()):
            check_tool_type(tool.type, f"tools[{index}].type")
            if not tool.name:
                field = f"tools[{index}].name"
                raise invalid(field, f"{field} is missing", expected="name")
            function = OfferedFunction(tool.name, tool.description, tool.parameters)
            tools.append(OfferedTool("function", function))
        return tools

    def messages(self) -> tuple[Message, ...]:
        """The conversation.

        Raises:
          ServiceError: 400 naming the item.
        """
        messages = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str) and self.input:
            messages.append(Message("user", self.input))
        elif self.input:
            messages += _read_items(self.input)
        if not any(message.role != "system" for message in messages):
            raise invalid("input", "input must not be empty", expected="text | array")
        return tuple(messages)


def _read_items(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Items as messages: calls and thoughts belong to the message of the assistant around them."""
    messages: list[Message] = []
    said: Message | None = None  # by the assistant, as far as it is read

    def end() -> None:
        nonlocal said
        if said is not None:
            messages.append(said)
        said = None

    for index, item in enumerate(items):
        field = f"input[{index}]"
        match item:
            case {"type": "function_call", "name": str(name), "arguments": str(arguments)}:
                said = said or Message("assistant", "")
                id_ = item.get("call_id")
                call = ToolCall(
                    name,
                    read_arguments(f"{field}.arguments", arguments),
                    id_ if isinstance(id_, str) else "",
                    len(said.tool_calls),
                )
                said = msgspec.structs.replace(said, tool_calls=(*said.tool_calls, call))
            case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
                end()
                content, images = _read_content(output, f"{field}.output")
                messages.append(Message("tool", content, tool_call_id=call_id, images=images))
            case {"type": "reasoning"}:
                end()
                said = Message("assistant", "", thinking=_thoughts(item))
            case {"role": str(role), "content": content} if (
                item.get("type", "message") == "message"
            ):
                if role not in ROLES or role == "tool":
                    known = ", ".join(name for name in ROLES if name != "tool")
                    message = f"{field}.role must be one of {known}"
                    raise invalid(f"{field}.role", message, expected=known)
                text, images = _read_content(content, f"{field}.content")
                if role == "assistant" and said is not None and not said.content:
                    said = msgspec.structs.replace(said, content=text)
                    continue
                end()
                message_read = Message(ROLES[role], text, images=images)
                if role == "assistant":
                    said = message_read
                else:
                    messages.append(message_read)
            case {"type": str(kind)} if kind not in ("message", "function_call"):
                raise unsupported(f"{field}.type {kind[:40]!r}")
            case _:
                message = f"{field} must be a message, a function_call or a function_call_output"
                raise invalid(field, message, expected="message")
    end()
    return messages


def _read_content(content: Any, field: str) -> tuple[str, tuple[bytes, ...]]:
    """Text and pictures of a message, or of what a function gave."""
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list):
        raise invalid(field, f"{field} must be text or parts", expected="text | array")
    texts: list[str] = []
    images: list[bytes] = []
    for index, part in enumerate(content):
        where = f"{field}[{index}]"
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case {"type": "input_image", "image_url": str(url)}:
                images.append(read_data_url(url, f"{where}.image_url"))
            case {"type": str(kind)}:
                raise unsupported(f"{where}.type {kind[:40]!r}")
            case _:
                raise invalid(where, f"{where} must have a type", expected="object")
    return "".join(texts), tuple(images)


def _thoughts(item: dict[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or ()
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))
