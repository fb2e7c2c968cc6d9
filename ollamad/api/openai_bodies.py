"""Request bodies of OpenAI's API: null is as good as absent, unknown fields are ignored.

A field whose feature is missing and that would change the answer is refused by name.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.bodies import (
    INT32_MAX,
    MAX_TOP_LOGPROBS,
    TokenId,
    fold_seed,
    format_text,
    invalid,
    read_logprobs,
    unsupported,
)
from ollamad.api.conversation import OfferedTool, read_images, read_tools
from ollamad.core.inference import Message, Options, ToolCall

ROLES = {
    "system": "system",
    "developer": "system",  # its name since 2024
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
Tools = Sequence[OfferedTool]
Prompt = str | tuple[int, ...]  # a text, or token ids

MAX_STOPS = 4
MAX_CHOICES = 16  # of one request: each takes a place in the queue
MAX_TOKEN_DIGITS = 9  # no vocabulary has a billion tokens


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
    logit_bias: dict[str, float] | None = None

    @property
    def count(self) -> int:
        """How many choices are wanted.

        Raises:
          ServiceError: 400, too many or too few.
        """
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MAX_CHOICES:
            raise invalid("n", f"n must be from 1 to {MAX_CHOICES}", expected="integer")
        return count

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The logit_bias as the scheduler takes it.

        Raises:
          ServiceError: 400.
        """
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > MAX_TOKEN_DIGITS:
                message = f"logit_bias: {token[:20]!r} is no token id"
                raise invalid("logit_bias", message, expected="token id")
            _check_range("logit_bias", bias, -100, 100)
            biases.append((int(token), bias))
        return tuple(biases)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def limit(self) -> tuple[str, int | None]:
        """The most tokens that an answer may have, and the field that says so."""
        return "max_tokens", self.max_tokens

    def options(self) -> Options:
        """The options; temperature and top_p are 1 unless the request says otherwise.

        Raises:
          ServiceError: 400 naming the field.
        """
        field, max_tokens = self.limit
        if max_tokens is not None and not 0 < max_tokens <= INT32_MAX:
            raise invalid(field, f"{field} must be 1 or more", expected="int32")
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
            seed=None if self.seed is None else fold_seed(self.seed),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
        )


class ImageUrl(msgspec.Struct, frozen=True):
    url: str


class Part(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | None = None


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
    tools: tuple[OfferedTool, ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: tuple[str, ...] | None = None
    functions: tuple[dict[str, Any], ...] | None = None  # what tools were called before 2023-11

    @property
    def limit(self) -> tuple[str, int | None]:
        newer = self.max_completion_tokens
        return super().limit if newer is None else ("max_completion_tokens", newer)

    def check(self) -> None:
        """Refuse what would change the answer and cannot be done.

        Raises:
          ServiceError: 400 naming the field.
        """
        for kind in self.modalities or ():
            if kind != "text":
                raise unsupported(f"modalities {kind[:40]!r}")
        if self.functions:
            raise invalid("functions", "functions are called tools now: send tools instead")

    @property
    def candidates(self) -> int:
        """How many likely tokens are to be told for each; -1 if nothing is.

        Raises:
          ServiceError: 400.
        """
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        return read_logprobs(self.logprobs, self.top_logprobs)

    def think(self, *, thinks: bool) -> str:
        """How the model is to think, as the scheduler takes it.

        Raises:
          ServiceError: 400.
        """
        return think_of("reasoning_effort", self.reasoning_effort, thinks=thinks)


class CompletionBody(_Sampled, frozen=True, kw_only=True):
    # A text, some of them, token ids, or some lists of these.
    prompt: str | tuple[str | TokenId | tuple[TokenId, ...], ...] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts.

        Raises:
          ServiceError: 400 for none, an empty one, or token ids where they mean nothing.
        """
        given = (self.prompt,) if isinstance(self.prompt, str) else self.prompt or ()
        ids = tuple(one for one in given if isinstance(one, int))
        prompts: tuple[Prompt, ...] = tuple(one for one in given if not isinstance(one, int))
        if ids and prompts:
            raise invalid("prompt", "prompt mixes token ids with texts", expected="text")
        prompts = (ids,) if ids else prompts
        if not prompts or not all(prompts):
            raise invalid("prompt", "prompt must not be empty", expected="text")
        if any(isinstance(one, tuple) for one in prompts):
            if self.echo:
                raise unsupported("echo with token ids")
            if self.suffix:
                raise unsupported("suffix with token ids")
        return prompts

    @property
    def tries(self) -> int:
        """How many choices are made of each prompt, of which the best are told.

        Raises:
          ServiceError: 400.
        """
        tries = self.count if self.best_of is None else self.best_of
        if not self.count <= tries <= MAX_CHOICES:
            message = f"best_of must be from n to {MAX_CHOICES}"
            raise invalid("best_of", message, expected="integer")
        if tries * len(self.prompts) > MAX_CHOICES:
            message = f"prompt: at most {MAX_CHOICES} texts are written for one request"
            raise invalid("prompt", message, expected="fewer prompts")
        if tries > self.count and self.stream:
            raise invalid("best_of", "best_of cannot be streamed: what is best shows at the end")
        return tries

    @property
    def candidates(self) -> int:
        """How many likely tokens are to be told for each; -1 if nothing is.

        Raises:
          ServiceError: 400.
        """
        if self.logprobs is None:
            return -1
        if not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            message = f"logprobs must be from 0 to {MAX_TOP_LOGPROBS}"
            raise invalid("logprobs", message, expected="integer")
        if self.echo:
            raise unsupported("echo with logprobs")
        return self.logprobs


class EmbeddingBody(msgspec.Struct, frozen=True):
    model: str
    input: str | tuple[str | int | tuple[int, ...], ...]
    encoding_format: str | None = None
    dimensions: int | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The texts.

        Raises:
          ServiceError: 400, there are none, or token ids: clients make them by the vocabulary of
            OpenAI's models, so that another model would be asked for something else.
        """
        given = (self.input,) if isinstance(self.input, str) else self.input
        texts = tuple(one for one in given if isinstance(one, str))
        if len(texts) < len(given):
            message = (
                "input must be text: token ids mean something else to each model "
                "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
            raise invalid("input", message, expected="text")
        if not texts or not all(texts):
            raise invalid("input", "input must not be empty", expected="text")
        return texts


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
    images: list[bytes] = []
    if isinstance(message.content, tuple):
        texts = []
        for place, part in enumerate(message.content):
            field = f"{where}.content[{place}]"
            match part.type:
                case "text":
                    texts.append(part.text or "")
                case "refusal":  # an answer that is sent back
                    texts.append(part.refusal or "")
                case "image_url":
                    url = part.image_url.url if part.image_url else ""
                    images.append(read_data_url(url, f"{field}.image_url"))
                case _:
                    raise unsupported(f"{field}.type {part.type[:40]!r}")
        content = "".join(texts)
    else:
        content = message.content or ""
    return Message(
        ROLES[message.role],
        content,
        tool_calls=tuple(
            ToolCall(
                call.function.name,
                read_arguments(f"{where}.tool_calls", call.function.arguments),
                call.id,
                place,
            )
            for place, call in enumerate(message.tool_calls or ())
        ),
        images=tuple(images),
        tool_name=message.name or "" if message.role == "tool" else "",
        tool_call_id=message.tool_call_id or "",
    )


def read_arguments(field: str, arguments: str) -> str:
    """The arguments of a call, as JSON text.

    Raises:
      ServiceError: 400, they are no object.
    """
    try:
        if isinstance(msgspec.json.decode(arguments or "{}"), dict):
            return arguments or "{}"
    except msgspec.DecodeError:
        pass
    raise invalid(field, f"{field}: arguments must be a JSON object as text", expected="JSON")


def read_data_url(url: str, field: str) -> bytes:
    """The picture in a `data:` URL. Others are refused: a node fetches nothing for a client.

    Raises:
      ServiceError: 400.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        message = f"{field} must be a picture as data:image/png;base64,…: no other URL is fetched"
        raise invalid(field, message, expected="data URL")
    [image] = read_images((data,), field)
    return image


def think_of(field: str, effort: str | None, *, thinks: bool) -> str:
    """How a model is to think, as the scheduler takes it.

    Raises:
      ServiceError: 400.
    """
    efforts = {"none": "off", "minimal": "low", "low": "low", "medium": "medium"}
    efforts |= {"high": "high", "xhigh": "high"}
    if effort is not None and effort not in efforts:
        known = ", ".join(efforts)
        raise invalid(field, f"{field} must be one of {known}", expected=known)
    if not thinks:
        return ""
    return "on" if effort is None else efforts[effort]


def offered_tools(tools: Tools, choice: str | dict[str, Any] | None) -> tuple[str, str]:
    """The tools as the scheduler takes them, and whether they may or must be called.

    A certain tool is forced by offering no other.

    Raises:
      ServiceError: 400.
    """
    if isinstance(choice, dict):
        tools, choice = _chosen(tools, choice)
    choices = ("auto", "none", "required")
    if choice not in (None, *choices):
        message = f"tool_choice must be {', '.join(choices)}, or name a function"
        raise invalid("tool_choice", message, expected=" | ".join(choices))
    return read_tools(tools), (choice or "") if tools else ""


def _chosen(tools: Tools, choice: dict[str, Any]) -> tuple[Tools, str]:
    """The tools that a choice leaves, and whether they must be called."""
    mode = "required"
    match choice:
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": str(mode), "tools": list(allowed)},
        }:
            names = {_allowed_name(tool) for tool in allowed}
        case {"function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            names = {name}
        case _:
            message = "tool_choice.function must have the name of one of the tools"
            raise invalid("tool_choice.function", message, expected="name")
    left = [tool for tool in tools if tool.function and tool.function.name in names]
    if len(left) < len(names):
        unknown = ", ".join(sorted(names - {tool.function.name for tool in left if tool.function}))
        message = f"tool_choice.function: there is no tool {unknown[:80]!r} in tools"
        raise invalid("tool_choice.function", message, expected="name")
    return left, mode


def _allowed_name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise invalid(name, f"{name} must be from {low:g} to {high:g}", expected="number")
