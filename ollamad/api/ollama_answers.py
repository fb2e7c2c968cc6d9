"""What `/api/*` answers, as types, for the OpenAPI document and for the tests.

What Ollama leaves out when it is zero or empty may be absent here. Durations are nanoseconds.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from ollamad.api.schemas import AssistantMessage, LikelyToken, Time
from ollamad.core.inference import Failover

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


class OllamaError(msgspec.Struct, frozen=True):
    """Every error of `/api`, also as the last line of a stream."""

    error: str


class OllamaVersion(msgspec.Struct, frozen=True):
    """`version` is the release of Ollama whose API this follows, `ollamad` this program's own."""

    version: str
    ollamad: str


class OllamaDetails(msgspec.Struct, frozen=True):
    parent_model: str
    format: str
    family: str
    families: Sequence[str]
    parameter_size: str
    quantization_level: str


class OllamaTag(msgspec.Struct, frozen=True):
    """A model. `digest` is without `sha256:`."""

    name: str
    model: str
    modified_at: Time
    size: int
    digest: str
    details: OllamaDetails
    capabilities: Sequence[str]


class OllamaTags(msgspec.Struct, frozen=True):
    models: Sequence[OllamaTag]


class OllamaRunning(msgspec.Struct, frozen=True):
    """A model in the memory of `node`."""

    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: Time
    size_vram: int
    context_length: int
    engine: str
    node: str


class OllamaPs(msgspec.Struct, frozen=True):
    models: Sequence[OllamaRunning]


class OllamaShown(msgspec.Struct, frozen=True):
    """What a model is made of; texts that it does not have are left out."""

    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: Sequence[str]
    modified_at: Time
    modelfile: str
    license: str | Unset = UNSET
    parameters: str | Unset = UNSET
    template: str | Unset = UNSET
    system: str | Unset = UNSET
    messages: Sequence[dict[str, str]] | Unset = UNSET
    renderer: str | Unset = UNSET
    parser: str | Unset = UNSET
    requires: str | Unset = UNSET


class _Answer(msgspec.Struct, frozen=True):
    model: str
    created_at: Time
    done: bool
    done_reason: str | Unset = UNSET
    total_duration: int | Unset = UNSET
    load_duration: int | Unset = UNSET
    prompt_eval_count: int | Unset = UNSET
    prompt_eval_duration: int | Unset = UNSET
    eval_count: int | Unset = UNSET
    eval_duration: int | Unset = UNSET
    logprobs: Sequence[LikelyToken] | Unset = UNSET
    failovers: Sequence[Failover] | Unset = UNSET


class OllamaGeneration(_Answer, frozen=True, kw_only=True):
    """A whole answer, or a line of a stream, of which the last has `done: true` and the counts."""

    response: str
    thinking: str | Unset = UNSET
    context: Sequence[int] | Unset = UNSET


class OllamaChat(_Answer, frozen=True, kw_only=True):
    """A whole answer, or a line of a stream, of which the last has `done: true` and the counts."""

    message: AssistantMessage


class OllamaEmbeddings(msgspec.Struct, frozen=True):
    """A vector of length 1 for each input."""

    model: str
    embeddings: Sequence[Sequence[float]]
    total_duration: int | Unset = UNSET
    load_duration: int | Unset = UNSET
    prompt_eval_count: int | Unset = UNSET


class OllamaEmbedding(msgspec.Struct, frozen=True):
    embedding: Sequence[float]


class OllamaProgress(msgspec.Struct, frozen=True):
    """A step. `total` and `completed` are bytes of what has the digest."""

    status: str
    digest: str | Unset = UNSET
    total: int | Unset = UNSET
    completed: int | Unset = UNSET
