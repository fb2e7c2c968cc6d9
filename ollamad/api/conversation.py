"""What Ollama's API and `/api/v1` have in common in a chat: messages, tools, and thinking."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.services import ServiceError
from ollamad.core.inference import Message, ToolCall

ROLES = ("system", "user", "assistant", "tool")
THINK_LEVELS = ("low", "medium", "high")


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any] | None = None


class Called(msgspec.Struct, frozen=True):
    function: Function
    id: str | None = None


class OfferedFunction(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that a model may call: what templates are told of it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema


class OfferedTool(msgspec.Struct, frozen=True):
    """A tool in the form that OpenAI and Ollama share."""

    type: str | None = None  # a function, if it is not told
    function: OfferedFunction | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: tuple[str, ...] | None = None
    tool_calls: tuple[Called, ...] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


def read_messages(given: tuple[ChatMessage, ...] | None) -> tuple[Message, ...]:
    """The messages of a chat.

    Raises:
      ServiceError: 400, a role is not known.
    """
    for index, message in enumerate(given or ()):
        if _role(message) not in ROLES:
            raise ServiceError(
                400,
                "INVALID_REQUEST",
                f"invalid role: {message.role[:40]!r}, must be one of {', '.join(ROLES)}",
                {"field": f"messages[{index}].role", "expected": " | ".join(ROLES)},
            )
    return tuple(
        _message(message, f"messages[{index}].images") for index, message in enumerate(given or ())
    )


def read_images(given: Sequence[str] | None, field: str = "images") -> tuple[bytes, ...]:
    """Pictures that were sent as base64.

    Raises:
      ServiceError: 400, one is not.
    """
    images = []
    for index, text in enumerate(given or ()):
        try:
            # Line breaks are passed over, as Go does; `base64` of the shell makes them.
            image = base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
        except (binascii.Error, ValueError):
            image = b""
        if not image:
            where = f"{field}[{index}]"
            raise ServiceError(
                400,
                "INVALID_REQUEST",
                f"{where} must be a picture as base64, without `data:` before it",
                {"field": where, "expected": "base64"},
            )
        images.append(image)
    return tuple(images)


def read_tools(given: Sequence[OfferedTool] | None) -> str:
    """The tools as the scheduler takes them.

    Raises:
      ServiceError: 400, one is no function: nothing else is run here.
    """
    for index, tool in enumerate(given or ()):
        check_tool_type(tool.type, f"tools[{index}].type")
        if tool.function is None:
            field = f"tools[{index}].function"
            details = {"field": field, "expected": "object"}
            raise ServiceError(400, "INVALID_REQUEST", f"{field} is missing", details)
    # llama.cpp takes no null for what is left out.
    tools = [{"type": "function", "function": tool.function} for tool in given or ()]
    return msgspec.json.encode(tools).decode() if tools else ""


def check_tool_type(kind: str | None, field: str) -> None:
    """Refuse a tool that is no function.

    Raises:
      ServiceError: 400.
    """
    if kind not in (None, "", "function"):
        message = f"{field} {kind[:40]!r} is not supported: tools are functions here"
        raise ServiceError(400, "NOT_SUPPORTED", message, {"field": field})


def think_mode(think: bool | str | None, *, thinks: bool) -> str:
    """How a model is to think; one that can does so unless it is told not to.

    Raises:
      ServiceError: 400, it is no way to think.
    """
    if isinstance(think, str) and think not in THINK_LEVELS:
        raise ServiceError(
            400,
            "INVALID_REQUEST",
            f'invalid think value: "{think[:40]}" (must be "high", "medium", "low", true, or '
            "false)",
            {"field": "think", "expected": "boolean | low | medium | high"},
        )
    if not thinks:
        return ""
    return think if isinstance(think, str) else "off" if think is False else "on"


def _role(message: ChatMessage) -> str:
    role = message.role.lower()
    return "system" if role == "developer" else role  # as OpenAI calls it since 2024


def _message(message: ChatMessage, images_field: str) -> Message:
    return Message(
        _role(message),
        message.content or "",
        thinking=message.thinking or "",
        tool_calls=tuple(
            ToolCall(
                call.function.name,
                msgspec.json.encode(call.function.arguments or {}).decode(),
                call.id or "",
                index,
            )
            for index, call in enumerate(message.tool_calls or ())
        ),
        tool_name=message.tool_name or "",
        tool_call_id=message.tool_call_id or "",
        images=read_images(message.images, images_field),
    )
