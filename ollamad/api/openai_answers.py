"""What `/v1/*` answers to OpenAI's clients, as types, for the OpenAPI document and for the tests.

Times are Unix seconds, except where a field is there for Anthropic's clients.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ollamad.api.schemas import LikelyToken, Time
from ollamad.core.inference import Failover

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


class OpenaiProblem(msgspec.Struct, frozen=True):
    """`param` is the field that is wrong, `code` is ours in lower case."""

    message: str
    type: str
    param: str | None
    code: str


class OpenaiError(msgspec.Struct, frozen=True):
    error: OpenaiProblem


class V1Model(msgspec.Struct, frozen=True):
    """A model, for OpenAI's clients; `type`, `display_name` and `created_at` for Anthropic's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: Time


class V1Models(msgspec.Struct, frozen=True):
    object: Literal["list"]
    data: Sequence[V1Model]
    has_more: bool
    first_id: str | None
    last_id: str | None


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class OpenaiUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class OpenaiFunction(msgspec.Struct, frozen=True):
    """`arguments` is JSON as text."""

    name: str
    arguments: str


class OpenaiToolCall(msgspec.Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: OpenaiFunction
    index: int | Unset = UNSET  # in streams


class OpenaiMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | Unset = UNSET
    tool_calls: Sequence[OpenaiToolCall] | Unset = UNSET


class OpenaiDelta(msgspec.Struct, frozen=True):
    """What a chunk adds; the role is in the first."""

    role: Literal["assistant"] | Unset = UNSET
    content: str | Unset = UNSET
    reasoning: str | Unset = UNSET
    tool_calls: Sequence[OpenaiToolCall] | Unset = UNSET


class OpenaiLogprobs(msgspec.Struct, frozen=True):
    content: Sequence[LikelyToken]
    refusal: None


ChatEnd = Literal["stop", "length", "tool_calls"]


class OpenaiChoice(msgspec.Struct, frozen=True):
    index: int
    message: OpenaiMessage
    finish_reason: ChatEnd
    logprobs: OpenaiLogprobs | Unset = UNSET


class OpenaiPart(msgspec.Struct, frozen=True):
    index: int
    delta: OpenaiDelta
    finish_reason: ChatEnd | None
    logprobs: OpenaiLogprobs | Unset = UNSET


class _Answer(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer, frozen=True, kw_only=True):
    object: Literal["chat.completion"]
    choices: Sequence[OpenaiChoice]
    usage: OpenaiUsage
    failovers: Sequence[Failover] | Unset = UNSET


class ChatCompletionChunk(_Answer, frozen=True, kw_only=True):
    """An event of a stream. `usage` is there if it was asked for, and null on all but the last;
    `failovers` are where a choice ends, if there were such."""

    object: Literal["chat.completion.chunk"]
    choices: Sequence[OpenaiPart]
    usage: OpenaiUsage | Unset | None = UNSET
    failovers: Sequence[Failover] | Unset = UNSET


class OpenaiTextLogprobs(msgspec.Struct, frozen=True):
    tokens: Sequence[str]
    token_logprobs: Sequence[float]
    top_logprobs: Sequence[dict[str, float]]
    text_offset: Sequence[int]


class OpenaiText(msgspec.Struct, frozen=True):
    text: str
    index: int
    logprobs: OpenaiTextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(_Answer, frozen=True, kw_only=True):
    """A whole answer, or an event of a stream, which has `usage` if that was asked for."""

    object: Literal["text_completion"]
    choices: Sequence[OpenaiText]
    usage: OpenaiUsage | Unset | None = UNSET
    failovers: Sequence[Failover] | Unset = UNSET


class OpenaiEmbedding(msgspec.Struct, frozen=True):
    """`embedding` is text for the format base64: 32-bit floats, the lowest byte first."""

    object: Literal["embedding"]
    index: int
    embedding: Sequence[float] | str


class OpenaiEmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class OpenaiEmbeddings(msgspec.Struct, frozen=True):
    object: Literal["list"]
    data: Sequence[OpenaiEmbedding]
    model: str
    usage: OpenaiEmbeddingUsage


# Responses


class ResponsePart(msgspec.Struct, frozen=True):
    """Of a message (`output_text`) or of thoughts (`reasoning_text`)."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: Sequence[Any] | Unset = UNSET
    logprobs: Sequence[LikelyToken] | Unset = UNSET


class ResponseItem(msgspec.Struct, frozen=True):
    """A message, thoughts, or a call of a function."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed"]
    role: Literal["assistant"] | Unset = UNSET
    content: Sequence[ResponsePart] | Unset = UNSET
    summary: Sequence[Any] | Unset = UNSET
    call_id: str | Unset = UNSET
    name: str | Unset = UNSET
    arguments: str | Unset = UNSET


class ReasoningTokens(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseProblem(msgspec.Struct, frozen=True):
    code: str
    message: str


class ResponseReasoning(msgspec.Struct, frozen=True):
    effort: str | None
    summary: str | None


class ResponseText(msgspec.Struct, frozen=True):
    format: dict[str, Any]


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseAnswer(msgspec.Struct, frozen=True):
    """A response. What it was asked with is told again."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseProblem | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: Sequence[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ResponseReasoning
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: Sequence[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    failovers: Sequence[Failover] | Unset = UNSET


class ResponseEvent(msgspec.Struct, frozen=True):
    """An event of a stream. The first and the last ones have the response, those of an item where
    it stands and what it adds."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseAnswer | Unset = UNSET
    item: ResponseItem | Unset = UNSET
    item_id: str | Unset = UNSET
    output_index: int | Unset = UNSET
    content_index: int | Unset = UNSET
    part: ResponsePart | Unset = UNSET
    delta: str | Unset = UNSET
    text: str | Unset = UNSET
    logprobs: Sequence[LikelyToken] | Unset = UNSET
    name: str | Unset = UNSET
    arguments: str | Unset = UNSET
