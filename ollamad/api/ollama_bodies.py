"""Request bodies of Ollama's API, as lenient as Ollama is: null is as good as absent, and unknown
fields and options are ignored."""

import logging
import math
from typing import Any

import msgspec

from ollamad.api.bodies import INT32_MAX, Format, KeepAlive, TokenId, fold_seed, invalid
from ollamad.api.conversation import ChatMessage
from ollamad.core.inference import Options

log = logging.getLogger(__name__)

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
# Of Ollama, and without a meaning here: llama.cpp decides, or has dropped them.
_WITHOUT_EFFECT = {
    "draft_num_predict", "embedding_only", "f16_kv", "logits_all", "low_vram", "main_gpu", "numa",
    "penalize_newline", "tfs_z", "use_mlock", "use_mmap", "vocab_only",
}  # fmt: skip


class _Prompted(msgspec.Struct, frozen=True):
    model: str | None = None
    stream: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None
    format: Format = None
    think: bool | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class GenerateBody(_Prompted, frozen=True):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: tuple[TokenId, ...] | None = None
    raw: bool | None = None
    images: tuple[str, ...] | None = None


class ChatBody(_Prompted, frozen=True):
    messages: tuple[ChatMessage, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None


class EmbedBody(msgspec.Struct, frozen=True):
    model: str | None = None
    input: str | tuple[str, ...] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None


class EmbeddingsBody(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None


class NamedBody(msgspec.Struct, frozen=True):
    """Of show, delete, pull and push. `name` is an old spelling of `model`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    verbose: bool | None = None

    @property
    def wanted(self) -> str:
        return self.model or self.name or ""


class CopyBody(msgspec.Struct, frozen=True):
    source: str | None = None
    destination: str | None = None


class CreateBody(msgspec.Struct, frozen=True):
    model: str | None = None
    name: str | None = None
    from_: str | None = msgspec.field(default=None, name="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | tuple[str, ...] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    quantize: str | None = None
    quantization: str | None = None  # an old spelling of `quantize`
    stream: bool | None = None

    @property
    def wanted(self) -> str:
        return self.model or self.name or ""


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
            options[name] = float(value)
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
    if name == "seed" and math.isfinite(value):
        return fold_seed(int(value))
    if not -INT32_MAX - 1 <= value <= INT32_MAX:  # also what is not finite
        raise invalid(f"options.{name}", f'option "{name}" is out of range', expected="int32")
    return int(value)


def _wrong_type(name: str, expected: str) -> Exception:
    return invalid(
        f"options.{name}", f'option "{name}" must be of type {expected}', expected=expected
    )
