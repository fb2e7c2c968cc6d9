"""Request bodies of OpenAI's API: null is as good as absent, unknown fields are ignored.

A field whose feature is missing and that would change the answer is refused by name.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.bodies import INT32_MAX, format_text, invalid, unsupported
from ollamad.core.inference import Message, Options, ToolCall

ROLES = {
    "system": "system",
    "developer": "system",  # its name since 2024
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
MAX_STOPS = 4


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"
    json_schema: JsonSchema | None = None

    @property
    def as_text(self) -> str:
        """The format as the scheduler takes it: "", "json" or a schema as text."""
        match self.type:
            case "text":
                return ""
            case "json_object":
                return "json"
            case "json_schema" if self.json_schema is not None and self.json_schema.schema:
                return format_text(self.json_schema.schema)
            case "json_schema":
                field = "response_format.json_schema.schema"
                raise invalid(field, f"{field} is missing", expected="object")
        raise invalid(
            "response_format.type",
            "response_format.type must be text, json_object or json_schema",
            expected="text | json_object | json_schema",
        )


class _Sampled(msgspec.Struct, frozen=True):
    """What chats and completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    def options(self, max_tokens: int | None) -> Options:
        """The options; temperature and top_p are 1 unless the request says otherwise.

        Raises:
          ServiceError: 400 naming the field.
        """
        if self.n not in (None, 1):
            raise unsupported("n")
        for name in ("logprobs", "logit_bias"):
            if getattr(self, name):
                raise unsupported(name)
        if max_tokens is not None and not 0 < max_tokens <= INT32_MAX:
            raise invalid("max_tokens", "max_tokens must be 1 or more", expected="int32")
        if self.seed is not None and abs(self.seed) > 2 * INT32_MAX + 1:
            raise invalid("seed", "seed is out of range", expected="int32")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if stop is not None and len(stop) > MAX_STOPS:
            raise invalid("stop", f"stop takes up to {MAX_STOPS} texts", expected="array")
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        return Options(
            num_predict=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
        )


class Part(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"  # JSON as text


class Called(msgspec.Struct, frozen=True):
    id: str
    function: Function


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | tuple[Part, ...] | None = None
    name: str | None = None
    tool_calls: tuple[Called, ...] | None = None
    tool_call_id: str | None = None


class ChatBody(_Sampled, frozen=True, kw_only=True):
    messages: tuple[ChatMessage, ...]
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def chosen(self) -> str:
        """Whether tools may or must be called, as the scheduler takes it.

        Raises:
          ServiceError: 400; a certain tool cannot be forced.
        """
        if self.tool_choice in (None, "auto", "none", "required"):
            return self.tool_choice or ""
        if isinstance(self.tool_choice, dict):
            raise unsupported("tool_choice.function")
        choices = ("auto", "none", "required")
        field = "tool_choice"
        raise invalid(field, f"{field} must be {', '.join(choices)}", expected=" | ".join(choices))

    def think(self, *, thinks: bool) -> str:
        """How the model is to think, as the scheduler takes it.

        Raises:
          ServiceError: 400.
        """
        efforts = {"none": "off", "minimal": "low", "low": "low", "medium": "medium"}
        efforts |= {"high": "high", "xhigh": "high"}
        effort = self.reasoning_effort
        if effort is not None and effort not in efforts:
            known = ", ".join(efforts)
            field = "reasoning_effort"
            raise invalid(field, f"{field} must be one of {known}", expected=known)
        if not thinks:
            return ""
        return "on" if effort is None else efforts[effort]


class CompletionBody(_Sampled, frozen=True, kw_only=True):
    prompt: str | tuple[str, ...] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def text(self) -> str:
        """The one prompt.

        Raises:
          ServiceError: 400 for several, or none.
        """
        prompt = self.prompt
        if isinstance(prompt, tuple):
            if len(prompt) != 1:
                raise invalid("prompt", "send one prompt a request", expected="text")
            [prompt] = prompt
        if not prompt:
            raise invalid("prompt", "prompt must not be empty", expected="text")
        return prompt


class EmbeddingBody(msgspec.Struct, frozen=True):
    model: str
    input: str | tuple[str, ...]
    encoding_format: str | None = None
    dimensions: int | None = None


def read_messages(given: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages of a chat.

    Raises:
      ServiceError: 400 naming the message.
    """
    if not given:
        raise invalid("messages", "messages must not be empty", expected="array")
    return tuple(_read_message(index, message) for index, message in enumerate(given))


def _read_message(index: int, message: ChatMessage) -> Message:
    where = f"messages[{index}]"
    if message.role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(f"{where}.role", f"{where}.role must be one of {known}", expected=known)
    if isinstance(message.content, tuple):
        texts = []
        for place, part in enumerate(message.content):
            if part.type != "text":
                raise unsupported(f"{where}.content[{place}].type {part.type[:40]!r}")
            texts.append(part.text or "")
        content = "".join(texts)
    else:
        content = message.content or ""
    return Message(
        ROLES[message.role],
        content,
        tool_calls=tuple(
            ToolCall(call.function.name, _arguments(where, call.function), call.id, place)
            for place, call in enumerate(message.tool_calls or ())
        ),
        tool_name=message.name or "" if message.role == "tool" else "",
        tool_call_id=message.tool_call_id or "",
    )


def _arguments(where: str, function: Function) -> str:
    try:
        if isinstance(msgspec.json.decode(function.arguments or "{}"), dict):
            return function.arguments or "{}"
    except msgspec.DecodeError:
        pass
    field = f"{where}.tool_calls"
    raise invalid(field, f"{field}: arguments must be a JSON object as text", expected="JSON")


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise invalid(name, f"{name} must be from {low:g} to {high:g}", expected="number")
