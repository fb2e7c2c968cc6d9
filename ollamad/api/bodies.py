"""JSON bodies of requests, decoded strictly, with errors that name the field.

Unknown fields are ignored, as Ollama does. What would change the answer and cannot be done is
refused: silence would be a wrong answer.
"""

import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from ollamad.api.conversation import (
    ChatMessage,
    OfferedTool,
    read_images,
    read_messages,
    read_tools,
)
from ollamad.api.schemas import Period, RoleName
from ollamad.api.services import ServiceError
from ollamad.core.failover import MODES
from ollamad.core.gotemplate import TemplateError
from ollamad.core.inference import EmbedRequest, GenerateRequest, Message, Options
from ollamad.core.ollama_template import ChatTemplate
from ollamad.core.transcripts import MAX_ID_CHARS, Resume

log = logging.getLogger(__name__)

Body = TypeVar("Body")

FOR_EVER_S = -1.0
MAX_KEEP_ALIVE_S = 10 * 365 * 86400.0  # more is for ever, and would not fit a date
MAX_TOP_LOGPROBS = 20  # as in Ollama
INT32_MAX = (1 << 31) - 1  # the engine's integers
ANY_SEED = (1 << 32) - 1  # the engine's seeds are below; this one is its word for any

TokenId = Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]
KeepAlive = int | float | str | None
Format = str | dict[str, Any] | None
Text = Annotated[str, msgspec.Meta(min_length=1)]

_INTEGERS = {
    field.name
    for field in msgspec.structs.fields(Options)
    if field.type == int | None
}  # fmt: skip
_NUMBERS = {
    field.name
    for field in msgspec.structs.fields(Options)
    if field.type == float | None
}  # fmt: skip
# Read by `read_options`, which takes 4096.0 for a whole number as Ollama does.
GivenOptions = (
    Annotated[
        dict[str, Any],
        msgspec.Meta(
            extra_json_schema={
                "properties": {
                    **{name: {"type": ["number", "null"]} for name in sorted(_INTEGERS | _NUMBERS)},
                    "stop": {"type": ["array", "null"], "items": {"type": "string"}},
                    "engine": {"type": ["string", "null"]},
                }
            }
        ),
    ]
    | None
)
# Of Ollama, and without a meaning here: llama.cpp decides, or has dropped them.
_WITHOUT_EFFECT = {
    "draft_num_predict", "embedding_only", "f16_kv", "logits_all", "low_vram", "main_gpu", "numa",
    "penalize_newline", "tfs_z", "use_mlock", "use_mmap", "vocab_only",
}  # fmt: skip

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_DURATION = re.compile(r"(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNIT_S = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0,
}  # fmt: skip


class JoinBody(msgspec.Struct, frozen=True):
    node_id: Text
    address: Text


class LeaveBody(msgspec.Struct, frozen=True):
    node_id: Text
    force: bool = False  # also if models are lost with it
    # For copying what only it has; at least what one copy takes, at most a day.
    timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=86400)] = 600.0


class ReplicasBody(msgspec.Struct, frozen=True):
    # null: the cluster's default.
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None


class JoinTokenBody(msgspec.Struct, frozen=True):
    # A minute to type it, at most a month to forget it.
    ttl_seconds: Annotated[float, msgspec.Meta(ge=60, le=30 * 86400)] = 3600.0


class DownloadBody(msgspec.Struct, frozen=True):
    source: Text | None = None
    nodes: tuple[Text, ...] = ()
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None


class CreateBody(msgspec.Struct, frozen=True):
    name: Text
    # File name, or path as the Modelfile has it -> "sha256:…" of an uploaded blob.
    files: dict[str, str] = {}
    modelfile: str = ""
    replace: bool = False  # another model that has that name
    quantize: str | None = None


class CopyBody(msgspec.Struct, frozen=True):
    destination: Text


class PushBody(msgspec.Struct, frozen=True):
    destination: Text | None = None  # the model's own name, if it is not told


class AutoConfigureBody(msgspec.Struct, frozen=True):
    enabled: bool


class LoginBody(msgspec.Struct, frozen=True):
    username: Annotated[str, msgspec.Meta(max_length=256)]
    password: Annotated[str, msgspec.Meta(max_length=1024)]


MIN_PASSWORD_LENGTH = 8  # NIST SP 800-63B; the rate of guesses is bounded too
DateTime = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
NewPassword = Annotated[str, msgspec.Meta(max_length=1024)]


class UserBody(msgspec.Struct, frozen=True):
    username: Text
    password: NewPassword
    role: RoleName


class RoleBody(msgspec.Struct, frozen=True):
    role: RoleName


class PasswordBody(msgspec.Struct, frozen=True):
    password: NewPassword
    current_password: Annotated[str, msgspec.Meta(max_length=1024)] | None = None


Quota = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class KeyBody(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(max_length=128)] = ""
    role: RoleName = "inference"
    ttl_seconds: Annotated[float, msgspec.Meta(ge=1, le=100 * 365 * 86400)] | None = None
    expires_at: DateTime | None = None
    request_quota: Quota | None = None  # in a period
    token_quota: Quota | None = None  # in a period, of prompts and answers together
    quota_period: Period = "total"


class RefreshBody(msgspec.Struct, frozen=True):
    refresh_token: Text


class _Inference(msgspec.Struct, frozen=True):
    model: str
    stream: bool | None = None
    options: GivenOptions = None
    keep_alive: KeepAlive = None
    format: Format = None
    system: str | None = None
    truncate: bool | None = None
    think: bool | str | None = None
    failover: str = ""  # continue, replay or off; empty: the node's setting
    request_id: str | None = None  # the client's own name for it, to resume it by
    resume_from: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)] = 0  # tokens that it has
    received: str | None = None  # their text
    logprobs: bool | None = None
    top_logprobs: int | None = None
    shift: bool | None = None

    def resume(self) -> Resume | None:
        """Where the client stands, if it asks for the rest of an answer.

        Raises:
          ServiceError: 400 naming the field.
        """
        if self.request_id is None:
            if self.resume_from or self.received is not None:
                raise invalid("request_id", "to resume an answer, name it with request_id")
            return None
        if not 0 < len(self.request_id) <= MAX_ID_CHARS:
            raise invalid("request_id", f"request_id must have 1 to {MAX_ID_CHARS} characters")
        return Resume(self.resume_from, self.received)


class GenerateBody(_Inference, frozen=True):
    prompt: str | None = None
    context: tuple[TokenId, ...] | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    images: tuple[str, ...] | None = None

    def request(self) -> GenerateRequest:
        """The request as the scheduler takes it.

        Raises:
          ServiceError: 400 naming the field.
        """
        if self.raw and (self.template or self.system or self.context):
            raise invalid("raw", "raw mode does not support template, system, or context")
        return GenerateRequest(
            model=self.model,
            prompt=self.prompt or "",
            system=self.system,
            context=self.context or (),
            raw=self.raw is True,
            suffix="" if self.raw else self.suffix or "",
            template=checked_template(self.template),
            images=read_images(self.images),
            format=format_text(self.format),
            options=read_options(self.options),
            keep_alive_s=keep_alive_s(self.keep_alive),
            truncate=self.truncate is not False,
            failover=failover_mode(self.failover, "failover"),
            request_id=self.request_id or "",
            shift=self.shift is not False,
            logprobs=read_logprobs(self.logprobs, self.top_logprobs),
        )


class ChatBody(_Inference, frozen=True, kw_only=True):
    messages: tuple[ChatMessage, ...]
    tools: tuple[OfferedTool, ...] | None = None

    def request(self) -> GenerateRequest:
        """The request as the scheduler takes it.

        Raises:
          ServiceError: 400 naming the field.
        """
        messages = read_messages(self.messages)
        if self.system and messages and all(message.role != "system" for message in messages):
            messages = (Message("system", self.system), *messages)
        return GenerateRequest(
            model=self.model,
            messages=messages,
            tools=read_tools(self.tools),
            format=format_text(self.format),
            options=read_options(self.options),
            keep_alive_s=keep_alive_s(self.keep_alive),
            truncate=self.truncate is not False,
            failover=failover_mode(self.failover, "failover"),
            request_id=self.request_id or "",
            shift=self.shift is not False,
            logprobs=read_logprobs(self.logprobs, self.top_logprobs),
        )


class ExplainBody(msgspec.Struct, frozen=True):
    """A prompt or a chat, to see where it would go."""

    model: str
    prompt: str = ""
    messages: tuple[ChatMessage, ...] | None = None
    system: str | None = None
    context: tuple[TokenId, ...] | None = None

    def request(self) -> GenerateRequest:
        """The request as the scheduler takes it.

        Raises:
          ServiceError: 400 naming the field.
        """
        if self.messages is not None:
            return ChatBody(self.model, messages=self.messages, system=self.system).request()
        body = GenerateBody(
            self.model, prompt=self.prompt, context=self.context, system=self.system
        )
        return body.request()


class EmbedBody(msgspec.Struct, frozen=True):
    model: str
    prompt: str | None = None
    input: str | tuple[str, ...] | None = None
    options: GivenOptions = None
    keep_alive: KeepAlive = None
    truncate: bool | None = None
    dimensions: int | None = None

    def request(self) -> EmbedRequest:
        """The request as the scheduler takes it.

        Raises:
          ServiceError: 400 naming the field.
        """
        if self.dimensions is not None and self.dimensions < 0:
            raise invalid("dimensions", "dimensions must not be negative", expected="integer")
        field = "prompt" if self.input is None else "input"
        given = self.prompt if self.input is None else self.input
        inputs = (given,) if isinstance(given, str) else given
        if not inputs or not all(inputs):
            raise invalid(field, f"{field} must not be empty", expected="text")
        return EmbedRequest(
            model=self.model,
            inputs=inputs,
            options=read_options(self.options),
            keep_alive_s=keep_alive_s(self.keep_alive),
            truncate=self.truncate is not False,
        )


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """Decode a JSON body.

    Raises:
      ServiceError: 400 INVALID_JSON for what is not JSON, INVALID_REQUEST for a field that is
        missing or of the wrong type, with `details.field` and `details.expected`.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServiceError(400, "INVALID_JSON", f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ServiceError(400, "INVALID_JSON", "the body is nested too deeply") from None


def keep_alive_s(value: KeepAlive) -> float | None:
    """Ollama's `keep_alive` in seconds: a number of them, or a Go duration such as `1h30m`.

    Negative means for ever (FOR_EVER_S); None stays None.

    Raises:
      ServiceError: 400.
    """
    if value is None:
        return None
    seconds = _go_duration_s(value) if isinstance(value, str) else value
    return FOR_EVER_S if seconds < 0 or seconds > MAX_KEEP_ALIVE_S else float(seconds)


def invalid(field: str, message: str, *, expected: str | None = None) -> ServiceError:
    """400 INVALID_REQUEST about one field."""
    details = {"field": field} | ({"expected": expected} if expected else {})
    return ServiceError(400, "INVALID_REQUEST", message, details)


def unsupported(field: str) -> ServiceError:
    """400 NOT_SUPPORTED about one field."""
    return ServiceError(
        400, "NOT_SUPPORTED", f"{field} is not supported by this version", {"field": field}
    )


def _validation_error(text: str) -> ServiceError:
    match = _MESSAGE.fullmatch(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    if missing := _MISSING.fullmatch(what):
        field = f"{path}.{missing['name']}" if path else missing["name"]
        return invalid(field, f"{field} is missing", expected="a value")
    expected, _, got = what.removeprefix("Expected ").partition(", got ")
    expected = expected.replace("`", "")
    name = path or "body"
    found = f", not {got.replace('`', '')}" if got else ""
    return invalid(name, f"{name} must be {expected}{found}", expected=expected)


def checked_template(text: str | None) -> str:
    """A request's own template; empty if there is none.

    Raises:
      ServiceError: 400, it is none in Ollama's language.
    """
    if text:
        try:
            ChatTemplate(text)
        except TemplateError as error:
            message = f"the template cannot be used: {error}"
            raise invalid("template", message, expected="a template in Go's language") from None
    return text or ""


def read_logprobs(wanted: bool | None, candidates: int | None) -> int:
    """How many likely tokens are to be told for each; -1 if nothing is.

    Raises:
      ServiceError: 400.
    """
    if candidates is not None and not 0 <= candidates <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}"
        raise invalid("top_logprobs", message, expected="integer")
    return (candidates or 0) if wanted else -1


def failover_mode(text: str, field: str) -> str:
    """A mode of failover as it was asked for; empty if nothing was.

    Raises:
      ServiceError: 400.
    """
    if text and text not in MODES:
        modes = ", ".join(MODES)
        raise invalid(field, f"{field} must be one of {modes}", expected=" | ".join(MODES))
    return text


def format_text(value: Format) -> str:
    """What `format` asks for, as the scheduler takes it: "", "json" or a schema as text.

    Raises:
      ServiceError: 400.
    """
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode()
    if value not in (None, "", "json"):
        raise invalid("format", 'format must be "json" or a JSON schema', expected="json | object")
    return value or ""


def read_options(given: dict[str, Any] | None) -> Options:
    """Ollama's options: a whole number may be written as 4096.0, null says nothing.

    Raises:
      ServiceError: 400, an option has the wrong type or is out of range.
    """
    options: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _INTEGERS:
            options[name] = _integer(name, value)
        elif name in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _wrong_type(name, "float32")
            options[name] = _float(name, value)
        elif name == "stop":
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise _wrong_type(name, "array of strings")
            options[name] = tuple(value)
        elif name == "engine":
            if not isinstance(value, str):
                raise _wrong_type(name, "string")
            options[name] = value
        else:
            log.debug("an option that is not known is ignored: %.40r", name)
    return Options(**options)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "integer")
    if name == "seed":
        return fold_seed(int(value))
    if not -INT32_MAX - 1 <= value <= INT32_MAX:
        raise _out_of_range(name, "int32")
    return int(value)


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON's whole numbers have any length
        raise _out_of_range(name, "float32") from None


def _out_of_range(name: str, expected: str) -> Exception:
    return invalid(f"options.{name}", f'option "{name}" is out of range', expected=expected)


def _wrong_type(name: str, expected: str) -> Exception:
    return invalid(
        f"options.{name}", f'option "{name}" must be of type {expected}', expected=expected
    )


def fold_seed(seed: int) -> int:
    """A seed as the engine takes it, which has 32 bits, where clients may send 64; -1, any will
    do, for all that are negative."""
    return -1 if seed < 0 else seed % ANY_SEED


def _go_duration_s(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    body = text[1:] if text[:1] in ("-", "+") else text
    if body == "0":
        return 0.0
    if len(body) > 64 or not _DURATION.fullmatch(body):
        raise _bad_keep_alive()
    parts: Sequence[tuple[str, str]] = _DURATION_PART.findall(body)
    return sign * sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def _bad_keep_alive() -> ServiceError:
    return invalid(
        "keep_alive",
        "keep_alive must be a number of seconds or a duration with a unit, such as 5m or -1s",
        expected="seconds | duration",
    )
