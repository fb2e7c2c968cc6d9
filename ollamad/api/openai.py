"""Handlers of OpenAI's API (`/v1`): chat, completions, embeddings, models.

Shapes, defaults and the order of a stream's events are OpenAI's, so that its clients work with
another base URL. A completion's prompt is read as it is, without the model's template.
"""

import base64
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

from ollamad.api.asgi import Reply
from ollamad.api.bodies import invalid, unsupported
from ollamad.api.calls import Call, reply
from ollamad.api.conversation import read_tools
from ollamad.api.dialects import openai_error
from ollamad.api.generation import Whole, answer, embed, encode
from ollamad.api.ollama import find, require_capability, shortened
from ollamad.api.openai_bodies import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    read_messages,
)
from ollamad.api.services import ServiceError
from ollamad.core.admission import Place
from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Finished,
    GenerateRequest,
    Output,
    Thought,
    ToolCall,
)
from ollamad.core.names import parse_name
from ollamad.core.state import Model

DONE = b"data: [DONE]\n\n"


def waiting(place: Place) -> bytes:
    """Where a request stands in the queue, as a comment, which clients leave out."""
    return b": queued, position %d, about %d s\n\n" % (place.position, round(place.estimate_s))


class _EventLayout:
    """Server-sent events: what chats and completions share."""

    content_type: ClassVar[bytes] = b"text/event-stream"
    object: ClassVar[str]
    stream_object: ClassVar[str]

    def __init__(self, call: Call, model: str, *, prefix: str, includes_usage: bool) -> None:
        self._model = model
        self._includes_usage = includes_usage
        self._head = {
            "id": f"{prefix}-{call.request.id}",
            "created": int(call.services.wall()),
            "model": model,
            "system_fingerprint": "fp_ollamad",
        }

    def last(self, end: Finished) -> bytes:
        events = [self._event([self._closing(end)])]
        if self._includes_usage:
            events.append(self._event([], usage=_usage(end)))
        return b"".join((*events, DONE))

    def failure(self, error: ServiceError) -> bytes:
        return _event(openai_error(error))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self._includes_usage:
            more = {"usage": None} | more  # as OpenAI has it, on all but the last
        return _event({**self._head, "object": self.stream_object, "choices": choices, **more})

    def _closing(self, end: Finished) -> dict[str, Any]:
        raise NotImplementedError

    def _body(self, choice: dict[str, Any], end: Finished) -> dict[str, Any]:
        body = {**self._head, "object": self.object, "choices": [choice], "usage": _usage(end)}
        return body | {"failovers": end.failovers} if end.failovers else body


class ChatLayout(_EventLayout):
    """`chat.completion`, and its chunks: the role in the first delta only."""

    object = "chat.completion"
    stream_object = "chat.completion.chunk"

    def __init__(self, call: Call, model: str, *, includes_usage: bool) -> None:
        super().__init__(call, model, prefix="chatcmpl", includes_usage=includes_usage)
        self._calls = 0
        self._opening: dict[str, Any] = {"role": "assistant"}
        # All but the text of a plain part is the same each time.
        empty = self._event([{"index": 0, "delta": {"content": ""}, "finish_reason": None}])
        self._before, self._after = empty.split(b'"content":""')
        self._before += b'"content":'

    def part(self, output: Output) -> bytes:
        if isinstance(output, Chunk) and not self._opening:
            return b"".join((self._before, encode(output.text), self._after))
        delta, self._opening = self._opening | self._delta(output), {}
        return self._event([{"index": 0, "delta": delta, "finish_reason": None}])

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if said.thinking:
            message["reasoning"] = said.thinking
        if said.tool_calls:
            message["content"] = said.text or None
            message["tool_calls"] = [_tool_call(call) for call in said.tool_calls]
        reason = _finish_reason(end, bool(said.tool_calls))
        return self._body({"index": 0, "message": message, "finish_reason": reason}, end)

    def _delta(self, output: Output) -> dict[str, Any]:
        match output:
            case Chunk(text):
                return {"content": text}
            case Thought(text):
                return {"reasoning": text}
            case ToolCall():
                self._calls += 1
                return {"tool_calls": [{"index": output.index} | _tool_call(output)]}

    def _closing(self, end: Finished) -> dict[str, Any]:
        reason = _finish_reason(end, bool(self._calls))
        return {"index": 0, "delta": self._opening, "finish_reason": reason}


class CompletionLayout(_EventLayout):
    """`text_completion`, in parts of the same name."""

    object = stream_object = "text_completion"

    def __init__(self, call: Call, model: str, *, includes_usage: bool, echo: str) -> None:
        super().__init__(call, model, prefix="cmpl", includes_usage=includes_usage)
        self._echo = echo  # before the first text

    def part(self, output: Output) -> bytes:
        text = self._echo + output.text if isinstance(output, Chunk) else ""
        self._echo = ""
        return self._event([_choice(text, None)])

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        return self._body(_choice(self._echo + said.text, _finish_reason(end, False)), end)

    def _closing(self, end: Finished) -> dict[str, Any]:
        return _choice("", _finish_reason(end, False))


async def list_models(call: Call) -> Reply:
    models = call.services.cluster.state.models.values()
    newest_first = sorted(models, key=lambda model: (-model.modified_at, model.name))
    return reply({"object": "list", "data": [_describe(model) for model in newest_first]})


async def show_model(call: Call, name: str) -> Reply:
    return reply(_describe(await _find(call, name)))


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody, any_type=True)
    model = await _find(call, body.model)
    if body.tools:
        require_capability(model, "tools")
    choice = body.chosen
    request = GenerateRequest(
        model=model.name,
        messages=read_messages(body.messages),
        tools=read_tools(body.tools),
        tool_choice=choice if body.tools else "",
        think=body.think(thinks="thinking" in model.details.capabilities),
        format=body.response_format.as_text if body.response_format else "",
        options=body.options(body.max_completion_tokens or body.max_tokens),
    )
    layout = ChatLayout(call, body.model, includes_usage=body.includes_usage)
    return await answer(call, request, layout, stream=body.stream is True, waiting=waiting)


async def complete(call: Call) -> Reply | None:
    body = await call.body(CompletionBody, any_type=True)
    model = await _find(call, body.model)
    if body.suffix:
        require_capability(model, "insert")
        raise unsupported("suffix")
    if body.best_of not in (None, 1):
        raise unsupported("best_of")
    request = GenerateRequest(
        model=model.name, prompt=body.text, raw=True, options=body.options(body.max_tokens)
    )
    layout = CompletionLayout(
        call,
        body.model,
        includes_usage=body.includes_usage,
        echo=body.text if body.echo else "",
    )
    return await answer(call, request, layout, stream=body.stream is True, waiting=waiting)


async def embeddings(call: Call) -> Reply:
    body = await call.body(EmbeddingBody, any_type=True)
    model = await _find(call, body.model)
    inputs = (body.input,) if isinstance(body.input, str) else body.input
    if not inputs or not all(inputs):
        raise invalid("input", "input must not be empty", expected="text")
    if body.encoding_format not in (None, "float", "base64"):
        raise invalid(
            "encoding_format",
            "encoding_format must be float or base64",
            expected="float | base64",
        )
    if body.dimensions is not None and body.dimensions < 1:
        raise invalid("dimensions", "dimensions must be 1 or more", expected="integer")
    embedded = await embed(call, EmbedRequest(model=model.name, inputs=inputs))
    result = embedded.embeddings
    rows = []
    for index, vector in enumerate(result.vectors):
        numbers = shortened(vector, body.dimensions) if body.dimensions else vector
        shown = _base64(numbers) if body.encoding_format == "base64" else numbers
        rows.append({"object": "embedding", "index": index, "embedding": shown})
    count = result.prompt_eval_count
    shown_whole = {
        "object": "list",
        "data": rows,
        "model": body.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return reply(shown_whole, headers={"X-Ollamad-Node": embedded.node_id})


async def _find(call: Call, name: str) -> Model:
    return await find(call, name, f"model {name!r} not found")


def _describe(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified_at),
        "owned_by": parse_name(model.name).namespace,
    }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}


def _finish_reason(end: Finished, called: bool) -> str:
    if called:
        return "tool_calls"
    return "length" if end.reason == "length" else "stop"


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": end.prompt_eval_count,
        "completion_tokens": end.eval_count,
        "total_tokens": end.prompt_eval_count + end.eval_count,
        "prompt_tokens_details": {"cached_tokens": end.prompt_cached_count},
    }


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form: its arguments are JSON as text."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _base64(numbers: Sequence[float]) -> str:
    """Little-endian 32-bit floats, which is what OpenAI's own client asks for."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
