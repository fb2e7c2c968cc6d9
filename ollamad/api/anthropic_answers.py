"""What `/v1/messages` answers to Anthropic's clients, as types, for the OpenAPI document and for
the tests."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ollamad.core.inference import Failover

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


class AnthropicProblem(msgspec.Struct, frozen=True):
    """`code` is ours in lower case."""

    type: str
    message: str
    code: str


class AnthropicError(msgspec.Struct, frozen=True):
    """An error; in a stream it is the event `error`."""

    type: Literal["error"]
    error: AnthropicProblem


class AnthropicBlock(msgspec.Struct, frozen=True):
    """A part of a message: text, thoughts (`thinking`), or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | Unset = UNSET
    thinking: str | Unset = UNSET
    signature: str | Unset = UNSET
    id: str | Unset = UNSET
    name: str | Unset = UNSET
    input: dict[str, Any] | Unset = UNSET


class AnthropicUsage(msgspec.Struct, frozen=True):
    """At the beginning of a stream it is zero."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | Unset = UNSET
    cache_read_input_tokens: int | Unset = UNSET


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicMessage(msgspec.Struct, frozen=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: Sequence[AnthropicBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage
    failovers: Sequence[Failover] | Unset = UNSET


class AnthropicDelta(msgspec.Struct, frozen=True):
    """What is added to a block; of `message_delta`, which has no type, why the message ends."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | Unset = (
        UNSET
    )
    text: str | Unset = UNSET
    thinking: str | Unset = UNSET
    signature: str | Unset = UNSET
    partial_json: str | Unset = UNSET
    stop_reason: StopReason | Unset = UNSET
    stop_sequence: str | Unset | None = UNSET


class AnthropicEvent(msgspec.Struct, frozen=True):
    """An event of a stream. `failovers` are in `message_delta`, if there were such."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: AnthropicMessage | Unset = UNSET
    index: int | Unset = UNSET
    content_block: AnthropicBlock | Unset = UNSET
    delta: AnthropicDelta | Unset = UNSET
    usage: AnthropicUsage | Unset = UNSET
    failovers: Sequence[Failover] | Unset = UNSET


class AnthropicCount(msgspec.Struct, frozen=True):
    input_tokens: int
