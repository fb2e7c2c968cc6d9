"""Anthropic's `/v1/messages`, and the counting of a prompt's tokens.

A model thinks only when it is asked to, as Anthropic has it.
"""

from typing import Any, ClassVar

import msgspec

from ollamad.api.anthropic_bodies import CountBody, MessagesBody
from ollamad.api.asgi import Reply
from ollamad.api.asking import asker_of, routing_headers
from ollamad.api.calls import Call, reply
from ollamad.api.dialects import anthropic_error
from ollamad.api.generation import Whole, answer, encode, failovers_of
from ollamad.api.ollama import find, require_capability, require_completion
from ollamad.api.openai_layouts import begun, waiting
from ollamad.api.services import ServiceError
from ollamad.core.inference import (
    Chunk,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
    Options,
    Output,
    Thought,
    ToolCall,
)


async def create_message(call: Call) -> Reply | None:
    body = await call.body(MessagesBody, any_type=True)
    asked = await _asked(call, body)
    request = msgspec.structs.replace(asked, options=body.options(), format=body.format)
    layout = MessageLayout(call, body.model)
    return await answer(
        call, request, layout, stream=body.stream is True, waiting=waiting, on_begin=begun
    )


async def count_tokens(call: Call) -> Reply:
    body = await call.body(CountBody, any_type=True)
    # One token, should the node that counts be too old to know that it is only to count.
    request = msgspec.structs.replace(
        await _asked(call, body), only_counts=True, options=Options(num_predict=1)
    )
    async with call.services.inference.generate(request, asker_of(call)) as generation:
        while True:
            event = await generation.events.receive()
            if isinstance(event, Failed):
                raise InferenceError(event)
            if isinstance(event, Finished):
                return reply(
                    {"input_tokens": event.prompt_eval_count}, headers=routing_headers(generation)
                )


async def _asked(call: Call, body: CountBody) -> GenerateRequest:
    model = await find(call, body.model, f"model: {body.model}")
    require_completion(model, body.model, "chat")
    if body.tools:
        require_capability(model, "tools")
    tools, choice = body.offered()
    one_call = body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use is True
    request = GenerateRequest(
        model=model.name,
        messages=body.read_messages(),
        tools=tools,
        tool_choice=choice,
        parallel_calls=not one_call,
        think=body.think(thinks="thinking" in model.details.capabilities),
    )
    if request.has_images:
        require_capability(model, "vision")
    return request


class MessageLayout:
    """One message; its content is blocks of thoughts, text and calls, in their order."""

    content_type: ClassVar[bytes] = b"text/event-stream"

    def __init__(self, call: Call, model: str) -> None:
        self._id = f"msg_{call.request.id}"
        self._model = model
        self._begun = False
        self._blocks = 0  # that were begun
        self._open = ""  # the kind of the block whose text is coming
        self._calls = 0

    def part(self, output: Output) -> bytes:
        events = self._begin()
        match output:
            case Chunk(text):
                events += self._opened("text", {"text": ""})
                events.append(self._delta({"type": "text_delta", "text": text}))
            case Thought(text):
                events += self._opened("thinking", {"thinking": "", "signature": ""})
                events.append(self._delta({"type": "thinking_delta", "thinking": text}))
            case ToolCall():
                self._calls += 1
                events += self._closed()
                about = {"id": output.id, "name": output.name, "input": {}}
                events += self._opened("tool_use", about)
                delta = {"type": "input_json_delta", "partial_json": output.arguments}
                events += [self._delta(delta), *self._closed()]
        return b"".join(events)

    def last(self, end: Finished) -> bytes:
        events = [*self._begin(), *self._closed()]
        delta = _ending(end, called=self._calls > 0)
        events.append(_event("message_delta", delta=delta, usage=_usage(end), **failovers_of(end)))
        events.append(_event("message_stop"))
        return b"".join(events)

    def failure(self, error: ServiceError) -> bytes:
        return b"event: error\ndata: %b\n\n" % encode(anthropic_error(error))

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if said.thinking:
            content.append({"type": "thinking", "thinking": said.thinking, "signature": ""})
        if said.text or not said.tool_calls:
            content.append({"type": "text", "text": said.text})
        for call in said.tool_calls:
            given = msgspec.Raw(call.arguments.encode())
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        ending = _ending(end, called=bool(said.tool_calls))
        return self._message(content) | ending | {"usage": _usage(end)} | failovers_of(end)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _begin(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        # How long the prompt was is told at the end.
        usage = {"input_tokens": 0, "output_tokens": 0}
        return [_event("message_start", message=self._message([]) | {"usage": usage})]

    def _opened(self, kind: str, about: dict[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        events = self._closed()
        self._open = kind
        self._blocks += 1
        block = {"type": kind} | about
        events.append(_event("content_block_start", index=self._blocks - 1, content_block=block))
        return events

    def _closed(self) -> list[bytes]:
        if not self._open:
            return []
        events = []
        if self._open == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self._open = ""
        return [*events, _event("content_block_stop", index=self._blocks - 1)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind} | fields))


def _ending(end: Finished, *, called: bool) -> dict[str, Any]:
    reason = "max_tokens" if end.reason == "length" else "end_turn"
    if end.stop_text:
        reason = "stop_sequence"
    if called:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": end.stop_text or None}


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_eval_count - end.prompt_cached_count,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": end.prompt_cached_count,
        "output_tokens": end.eval_count,
    }
