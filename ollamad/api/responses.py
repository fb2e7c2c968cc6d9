"""OpenAI's `/v1/responses`: a conversation as items, and a stream of numbered events."""

from typing import Any, ClassVar

from ollamad.api.asgi import Reply
from ollamad.api.calls import Call
from ollamad.api.generation import Whole, answer, encode, failovers_of, shown_likelihood
from ollamad.api.ollama import find, require_capability, require_completion
from ollamad.api.openai_bodies import offered_tools
from ollamad.api.openai_layouts import begun, waiting
from ollamad.api.responses_bodies import ResponseBody
from ollamad.api.services import ServiceError
from ollamad.core.inference import Chunk, Finished, GenerateRequest, Output, Thought, ToolCall


async def respond(call: Call) -> Reply | None:
    body = await call.body(ResponseBody, any_type=True)
    body.check()
    model = await find(call, body.model, f"model {body.model!r} not found")
    require_completion(model, body.model, "chat")
    if body.tools:
        require_capability(model, "tools")
    tools, choice = offered_tools(body.chat_tools(), body.tool_choice)
    request = GenerateRequest(
        model=model.name,
        messages=body.messages(),
        tools=tools,
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls is not False,
        think=body.think(thinks="thinking" in model.details.capabilities),
        format=body.format,
        options=body.options(),
        logprobs=body.candidates,
        truncate=body.truncation == "auto",
    )
    if request.has_images:
        require_capability(model, "vision")
    layout = ResponseLayout(call, body)
    return await answer(
        call, request, layout, stream=body.stream is True, waiting=waiting, on_begin=begun
    )


class ResponseLayout:
    """One response. Its items are thoughts, a message, and calls, in the order of their coming."""

    content_type: ClassVar[bytes] = b"text/event-stream"

    def __init__(self, call: Call, body: ResponseBody) -> None:
        self._call = call
        self._body = body
        self._created_at = int(call.services.wall())
        self._number = 0  # of the next event
        self._items: list[dict[str, Any]] = []  # that are complete
        self._open: _OpenItem | None = None

    def part(self, output: Output) -> bytes:
        events = [] if self._number else self._begin()
        match output:
            case Chunk(text):
                events += self._opened("message")
                assert self._open is not None
                self._open.texts.append(text)
                likely = [shown_likelihood(each) for each in output.logprobs]
                self._open.logprobs += likely
                delta = {"delta": text, "logprobs": likely}
                events.append(self._event("response.output_text.delta", self._open.place | delta))
            case Thought(text):
                events += self._opened("reasoning")
                assert self._open is not None
                self._open.texts.append(text)
                place = self._open.place | {"delta": text}
                events.append(self._event("response.reasoning_text.delta", place))
            case ToolCall():
                events += self._closed()
                events += self._call_events(output)
        return b"".join(events)

    def last(self, end: Finished) -> bytes:
        events = [] if self._number else self._begin()
        events += self._closed()
        response = self._response(self._items, end)
        kind = "incomplete" if end.reason == "length" else "completed"
        events.append(self._event(f"response.{kind}", {"response": response}))
        return b"".join(events)

    def failure(self, error: ServiceError) -> bytes:
        described = {"code": error.code.lower(), "message": error.message}
        response = self._response(self._items, None) | {"status": "failed", "error": described}
        return self._event("response.failed", {"response": response})

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        if said.thinking:
            items.append(self._item(len(items), "reasoning", said.thinking))
        if said.text or not said.tool_calls:
            likely = [shown_likelihood(each) for each in said.logprobs]
            items.append(self._item(len(items), "message", said.text, likely))
        for call in said.tool_calls:
            items.append(self._call_item(len(items), call))
        return self._response(items, end)

    # Events.

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": self._number} | fields
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(body))

    def _begin(self) -> list[bytes]:
        response = {"response": self._response([], None)}
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response) for kind in kinds]

    def _opened(self, kind: str) -> list[bytes]:
        """What begins an item of that kind, if none is open; an item of another kind ends."""
        if self._open is not None and self._open.kind == kind:
            return []
        events = self._closed()
        index = len(self._items)
        self._open = _OpenItem(kind, index, self._item_id(index, kind))
        item = self._item(index, kind, "") | {"status": "in_progress", "content": []}
        added = {"output_index": index, "item": item}
        events.append(self._event("response.output_item.added", added))
        place = self._open.place | {"part": _part(kind, "", [])}
        events.append(self._event("response.content_part.added", place))
        return events

    def _closed(self) -> list[bytes]:
        """What ends the open item, if there is one."""
        if self._open is None:
            return []
        item, self._open = self._open, None
        text = "".join(item.texts)
        word = "output_text" if item.kind == "message" else "reasoning_text"
        logprobs = {"logprobs": item.logprobs} if item.kind == "message" else {}
        whole = self._item(item.index, item.kind, text, item.logprobs)
        self._items.append(whole)
        part = {"part": _part(item.kind, text, item.logprobs)}
        done = {"output_index": item.index, "item": whole}
        return [
            self._event(f"response.{word}.done", item.place | {"text": text} | logprobs),
            self._event("response.content_part.done", item.place | part),
            self._event("response.output_item.done", done),
        ]

    def _call_events(self, call: ToolCall) -> list[bytes]:
        index = len(self._items)
        item = self._call_item(index, call)
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        added = {"output_index": index, "item": begun}
        delta = place | {"delta": call.arguments}
        done = place | {"name": call.name, "arguments": call.arguments}
        return [
            self._event("response.output_item.added", added),
            self._event("response.function_call_arguments.delta", delta),
            self._event("response.function_call_arguments.done", done),
            self._event("response.output_item.done", {"output_index": index, "item": item}),
        ]

    # Objects.

    def _item_id(self, index: int, kind: str) -> str:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        return f"{prefix}_{self._call.request.id}{index}"

    def _item(
        self, index: int, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(index, kind), "type": kind}
        content = {"content": [_part(kind, text, logprobs or [])], "status": "completed"}
        if kind == "message":
            return item | {"role": "assistant"} | content
        return item | {"summary": []} | content

    def _call_item(self, index: int, call: ToolCall) -> dict[str, Any]:
        return {
            "id": self._item_id(index, "function_call"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }

    def _response(self, items: list[dict[str, Any]], end: Finished | None) -> dict[str, Any]:
        body = self._body
        is_cut = end is not None and end.reason == "length"
        reasoning = body.reasoning
        return {
            "id": f"resp_{self._call.request.id}",
            "object": "response",
            "created_at": self._created_at,
            "status": "in_progress" if end is None else "incomplete" if is_cut else "completed",
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text.format if body.text and body.text.format else _PLAIN},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if end is None else _usage(end),
            "user": body.user,
            **(failovers_of(end) if end is not None else {}),
        }


class _OpenItem:
    """An item whose text is coming."""

    def __init__(self, kind: str, index: int, id_: str) -> None:
        self.kind = kind
        self.index = index
        self.place: dict[str, Any] = {"item_id": id_, "output_index": index, "content_index": 0}
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []


_PLAIN = {"type": "text"}


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {"type": "reasoning_text", "text": text}


def _usage(end: Finished) -> dict[str, Any]:
    return {
        "input_tokens": end.prompt_eval_count,
        "input_tokens_details": {"cached_tokens": end.prompt_cached_count},
        "output_tokens": end.eval_count,
        # llama.cpp does not tell how many of them were thoughts.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.prompt_eval_count + end.eval_count,
    }
