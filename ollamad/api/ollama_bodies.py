"""Request bodies of Ollama's API, as lenient as Ollama is: null is as good as absent, and unknown
fields and options are ignored."""

from typing import Any

import msgspec

from ollamad.api.bodies import Format, GivenOptions, KeepAlive, TokenId
from ollamad.api.conversation import ChatMessage, OfferedTool


class _Prompted(msgspec.Struct, frozen=True):
    model: str | None = None
    stream: bool | None = None
    options: GivenOptions = None
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
    tools: tuple[OfferedTool, ...] | None = None


class EmbedBody(msgspec.Struct, frozen=True):
    model: str | None = None
    input: str | tuple[str, ...] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: GivenOptions = None
    keep_alive: KeepAlive = None


class EmbeddingsBody(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | None = None
    options: GivenOptions = None
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
