"""How chats and completions look in OpenAI's API: whole, or as events one after another.

One layout is made for each choice of an answer; they share the answer's id.
"""

from typing import Any, ClassVar

from ollamad.api.asking import routing_headers
from ollamad.api.calls import Call
from ollamad.api.dialects import openai_error
from ollamad.api.generation import Whole, encode, failovers_of, shown_likelihood
from ollamad.api.services import Generation, ServiceError
from ollamad.core.admission import Place
from ollamad.core.inference import Chunk, Finished, Likelihood, Output, Thought, ToolCall

DONE = b"data: [DONE]\n\n"


def waiting(place: Place) -> bytes:
    """Where a request stands in the queue, as a comment, which clients leave out."""
    return b": queued, position %d, about %d s\n\n" % (place.position, round(place.estimate_s))


def begun(generation: Generation) -> bytes:
    """What the headers would have told if the request had not waited, as comments."""
    headers = routing_headers(generation)
    return "".join(f": {name}: {value}\n" for name, value in headers.items()).encode() + b"\n"


class EventLayout:
    """Server-sent events: what chats and completions share."""

    content_type: ClassVar[bytes] = b"text/event-stream"
    object: ClassVar[str]
    stream_object: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, call: Call, model: str, *, index: int, includes_usage: bool) -> None:
        self._index = index
        self._includes_usage = includes_usage
        self._head = {
            "id": f"{self.prefix}-{call.request.id}",
            "created": int(call.services.wall()),
            "model": model,
            "system_fingerprint": "fp_ollamad",
        }

    def part(self, output: Output) -> bytes:
        raise NotImplementedError

    def choice(self, said: Whole, end: Finished) -> dict[str, Any]:
        """The choice in an answer that is not streamed."""
        raise NotImplementedError

    def end(self, end: Finished) -> bytes:
        """The last event of this choice."""
        return self._event([self._closing(end)], **failovers_of(end))

    def close(self, usage: dict[str, Any]) -> bytes:
        """What ends a stream."""
        return (self._event([], usage=usage) if self._includes_usage else b"") + DONE

    def last(self, end: Finished) -> bytes:
        return self.end(end) + self.close(usage_of(end))

    def failure(self, error: ServiceError) -> bytes:
        return event(openai_error(error))

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        return self.body([self.choice(said, end)], usage_of(end)) | failovers_of(end)

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self._includes_usage:
            more = {"usage": None} | more  # as OpenAI has it, on all but the last
        return event({**self._head, "object": self.stream_object, "choices": choices, **more})

    def _closing(self, end: Finished) -> dict[str, Any]:
        raise NotImplementedError


class ChatLayout(EventLayout):
    """`chat.completion`, and its chunks: the role in the first delta only."""

    object = "chat.completion"
    stream_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, call: Call, model: str, *, index: int, includes_usage: bool) -> None:
        super().__init__(call, model, index=index, includes_usage=includes_usage)
        self._calls = 0
        self._opening: dict[str, Any] = {"role": "assistant"}
        # All but the text of a plain part is the same each time.
        empty = self._event([{"index": index, "delta": {"content": ""}, "finish_reason": None}])
        self._before, self._after = empty.split(b'"content":""')
        self._before += b'"content":'

    def part(self, output: Output) -> bytes:
        likely = output.logprobs if isinstance(output, Chunk) else ()
        if isinstance(output, Chunk) and not self._opening and not likely:
            return b"".join((self._before, encode(output.text), self._after))
        delta, self._opening = self._opening | self._delta(output), {}
        choice = {"index": self._index, "delta": delta, "finish_reason": None}
        if likely:
            choice["logprobs"] = _logprobs(likely)
        return self._event([choice])

    def choice(self, said: Whole, end: Finished) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if said.thinking:
            message["reasoning"] = said.thinking
        if said.tool_calls:
            message["content"] = said.text or None
            message["tool_calls"] = [_tool_call(call) for call in said.tool_calls]
        reason = _finish_reason(end, bool(said.tool_calls))
        choice = {"index": self._index, "message": message, "finish_reason": reason}
        return choice | ({"logprobs": _logprobs(said.logprobs)} if said.logprobs else {})

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
        return {"index": self._index, "delta": self._opening, "finish_reason": reason}


class CompletionLayout(EventLayout):
    """`text_completion`, in parts of the same name. `echo` stands before the first text."""

    object = stream_object = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, call: Call, model: str, *, index: int, includes_usage: bool, echo: str
    ) -> None:
        super().__init__(call, model, index=index, includes_usage=includes_usage)
        self._echo = echo
        self._offset = 0  # characters before the next text

    def part(self, output: Output) -> bytes:
        likely = output.logprobs if isinstance(output, Chunk) else ()
        text = self._echo + output.text if isinstance(output, Chunk) else ""
        self._echo = ""
        return self._event([self._choice(text, None, likely)])

    def choice(self, said: Whole, end: Finished) -> dict[str, Any]:
        text, self._echo = self._echo + said.text, ""
        return self._choice(text, _finish_reason(end, False), said.logprobs)

    def _closing(self, end: Finished) -> dict[str, Any]:
        text, self._echo = self._echo, ""
        return self._choice(text, _finish_reason(end, False), ())

    def _choice(
        self, text: str, reason: str | None, likely: tuple[Likelihood, ...]
    ) -> dict[str, Any]:
        logprobs = self._logprobs(likely) if likely else None
        return {"text": text, "index": self._index, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, likely: tuple[Likelihood, ...]) -> dict[str, Any]:
        """The older form: a list for each of the things that are told of a token."""
        tokens = [each.token.decode(errors="replace") for each in likely]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in likely],
            "top_logprobs": [
                {other.token.decode(errors="replace"): other.logprob for other in each.others}
                for each in likely
            ],
            "text_offset": offsets,
        }


def event(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(body) + b"\n\n"


def usage_of(*ends: Finished, prompts: int | None = None) -> dict[str, Any]:
    """What one or several generations took; only the first `prompts` of them count their prompt."""
    counted = ends[:prompts]
    prompt = sum(end.prompt_eval_count for end in counted)
    written = sum(end.eval_count for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(end.prompt_cached_count for end in counted)},
    }


def _logprobs(likely: tuple[Likelihood, ...]) -> dict[str, Any]:
    # OpenAI always has the key, empty where nothing was asked for.
    content = [{"top_logprobs": []} | shown_likelihood(each) for each in likely]
    return {"content": content, "refusal": None}


def _finish_reason(end: Finished, called: bool) -> str:
    if called:
        return "tool_calls"
    return "length" if end.reason == "length" else "stop"


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form: its arguments are JSON as text."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
