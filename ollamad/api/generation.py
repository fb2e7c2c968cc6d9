"""Runs a generation or an embedding for any surface; how an answer looks is a `Layout`'s affair.

A stream is sent from within the generation's own context: when the client goes away the
handler is cancelled, the context is left, and the generation ends wherever it runs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

import msgspec
import trio

from ollamad.api.asgi import Reply, Request
from ollamad.api.asking import asker_of, routing_headers
from ollamad.api.bodies import failover_mode
from ollamad.api.calls import Call, reply
from ollamad.api.dialects import native_error
from ollamad.api.errors import as_service_error
from ollamad.api.services import Embedded, EventChannel, Generation, ServiceError
from ollamad.core.admission import Place
from ollamad.core.inference import (
    Chunk,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Likelihood,
    Output,
    Thought,
    ToolCall,
)
from ollamad.core.transcripts import Resume

# Lines sent at once when a client is slower than the model; more adds no speed, only memory.
MAX_COALESCED = 64
CHARACTERS_PER_TOKEN = 4  # roughly, for English and most tokenizers
FAILOVER_HEADER = "X-Ollamad-Failover"

encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """Everything that a model said, for answers that are not streamed."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Likelihood, ...] = ()

    @classmethod
    def of(cls, outputs: Sequence[Output]) -> "Whole":
        return cls(
            text="".join(output.text for output in outputs if isinstance(output, Chunk)),
            thinking="".join(output.text for output in outputs if isinstance(output, Thought)),
            tool_calls=tuple(output for output in outputs if isinstance(output, ToolCall)),
            logprobs=tuple(
                likely
                for output in outputs
                if isinstance(output, Chunk)
                for likely in output.logprobs
            ),
        )


class Layout(Protocol):
    """How a surface lays out one answer; one is made for each request."""

    content_type: ClassVar[bytes]  # of a stream

    def part(self, output: Output) -> bytes:
        """A part of a stream, with all that must stand between it and the next."""
        ...

    def last(self, end: Finished) -> bytes:
        """The end of a stream."""
        ...

    def failure(self, error: ServiceError) -> bytes:
        """The end of a stream that failed after its first byte."""
        ...

    def whole(self, said: Whole, end: Finished) -> Any:
        """The body of an answer that is not streamed."""
        ...


class Meter:
    """Passes events on and counts the tokens that they cost.

    The engine says at the end how many there were. Of an answer that ended early, because the
    client went away or its node was lost, the prompt's are estimated.
    """

    def __init__(self, request: GenerateRequest, events: EventChannel) -> None:
        self._events = events
        messages = request.messages or ()
        characters = len(request.prompt) + sum(len(message.content) for message in messages)
        self.tokens = characters // CHARACTERS_PER_TOKEN + len(request.context)

    async def receive(self) -> Event:
        return self._seen(await self._events.receive())

    def receive_nowait(self) -> Event:
        return self._seen(self._events.receive_nowait())

    def _seen(self, event: Event) -> Event:
        match event:
            case Finished():
                self.tokens = event.prompt_eval_count + event.eval_count
            case Chunk(tokens=tokens):
                self.tokens += max(1, len(tokens))
            case Thought() | ToolCall():
                self.tokens += 1
            case Failed():
                pass
        return event


class Timestamps:
    """RFC 3339 with microseconds; the slow part is made once a second."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._second = -1
        self._prefix = ""

    def now(self) -> str:
        moment = self._wall()
        second = int(moment)
        if second != self._second:
            self._second = second
            self._prefix = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._prefix}.{int((moment - second) * 1_000_000):06d}Z"


class LineLayout:
    """NDJSON, one line a part, as `/api/v1` has it; the constant parts are encoded once."""

    content_type: ClassVar[bytes] = b"application/x-ndjson"

    def __init__(self, model: str, *, chat: bool, wall: Callable[[], float]) -> None:
        self._model = model
        self._chat = chat
        self._timestamps = Timestamps(wall)
        self._head = b'{"model":' + encode(model) + b',"created_at":"'
        if chat:
            self._middle = b'","message":{"role":"assistant","content":'
            self._tail = b'},"done":false}\n'
        else:
            self._middle = b'","response":'
            self._tail = b',"done":false}\n'

    def part(self, output: Output) -> bytes:
        if isinstance(output, Chunk) and not output.logprobs:
            stamp = self._timestamps.now().encode()
            return b"".join((self._head, stamp, self._middle, encode(output.text), self._tail))
        return encode(self.opening(Whole.of([output])) | {"done": False}) + b"\n"

    def last(self, end: Finished) -> bytes:
        return encode(self.whole(Whole(), end)) + b"\n"

    def failure(self, error: ServiceError) -> bytes:
        return encode(native_error(error)) + b"\n"

    def whole(self, said: Whole, end: Finished) -> dict[str, Any]:
        body = self.opening(said) | {"done": True, "done_reason": end.reason}
        if not self._chat:
            body["context"] = end.context
        body |= durations(end) | {"prompt_cached_count": end.prompt_cached_count}
        return body | failovers_of(end)

    def opening(self, said: Whole) -> dict[str, Any]:
        """The beginning of a line, up to what the model said."""
        opening: dict[str, Any] = {"model": self._model, "created_at": self._timestamps.now()}
        thinking = {"thinking": said.thinking} if said.thinking else {}
        likely = {"logprobs": [shown_likelihood(each) for each in said.logprobs]}
        logprobs = likely if said.logprobs else {}
        if not self._chat:
            return opening | {"response": said.text} | thinking | logprobs
        message: dict[str, Any] = {"role": "assistant", "content": said.text} | thinking
        if said.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in said.tool_calls]
        return opening | {"message": message} | logprobs


def shown_likelihood(likely: Likelihood) -> dict[str, Any]:
    """A token and its logprob as Ollama and OpenAI show them."""
    shown: dict[str, Any] = {
        "token": likely.token.decode(errors="replace"),
        "logprob": likely.logprob,
        "bytes": list(likely.token),
    }
    if likely.others:
        shown["top_logprobs"] = [shown_likelihood(other) for other in likely.others]
    return shown


def durations(end: Finished) -> dict[str, int]:
    """Ollama's counts and durations (nanoseconds) of a generation."""
    return {
        "total_duration": end.total_duration,
        "load_duration": end.load_duration,
        "prompt_eval_count": end.prompt_eval_count,
        "prompt_eval_duration": end.prompt_eval_duration,
        "eval_count": end.eval_count,
        "eval_duration": end.eval_duration,
    }


def failovers_of(*ends: Finished) -> dict[str, Any]:
    """Which nodes were lost and who went on, if there were such."""
    moves = [move for end in ends for move in end.failovers]
    return {"failovers": moves} if moves else {}


def with_failover(call: Call, request: GenerateRequest) -> GenerateRequest:
    """The request with the mode of failover that the header asks for.

    Raises:
      ServiceError: 400, there is no such mode.
    """
    if header := call.request.headers.get(FAILOVER_HEADER):
        mode = failover_mode(header, FAILOVER_HEADER)
        return msgspec.structs.replace(request, failover=mode)
    return request


async def answer(
    call: Call,
    request: GenerateRequest,
    layout: Layout,
    *,
    stream: bool,
    resume: Resume | None = None,
    waiting: Callable[[Place], bytes] | None = None,
    on_begin: Callable[[Generation], bytes] = lambda generation: b"",
) -> Reply | None:
    """Run a generation and answer with it; None when the answer was streamed.

    Args:
      waiting: how a stream tells that the request has to wait; without it, it does not.
      on_begin: told when it waits no more; gives what a stream tells then whose headers are out.

    Raises:
      ServiceError: it failed before the first byte was sent.
    """
    request = with_failover(call, request)

    async def tell(place: Place) -> None:
        if stream and waiting is not None:
            if call.request.head_sent_at is None:
                await begin_stream(call.request, layout, {})
            await call.request.send_body(waiting(place), more=True)

    asker = asker_of(call, tell)
    stats = call.api.inference_stats
    begun = stats.begin()
    headers: dict[str, str] = {}
    outcome: Finished | ServiceError | None = None
    meter: Meter | None = None
    outputs: list[Output] = []
    try:
        try:
            with with_deadline(call):
                async with call.services.inference.generate(request, asker, resume) as generation:
                    headers = routing_headers(generation)
                    late = on_begin(generation)
                    meter = Meter(request, generation.events)
                    metered = dataclasses.replace(generation, events=meter)
                    if stream:
                        outcome = await _stream(call, metered, layout, headers, late)
                    else:
                        outcome = await _collect(meter, outputs)
            if outcome is None:
                outcome = too_late()
        except Exception as error:  # also a group of them, from a generation with a nursery
            outcome = as_service_error(error, call.request.id)
    finally:
        # No outcome: the client went away, which is no failure.
        failed = isinstance(outcome, ServiceError)
        if meter is not None:
            call.spend_tokens(meter.tokens)
        stats.end(call.services.monotonic() - begun, failed=failed)
    if isinstance(outcome, ServiceError):
        outcome = as_service_error(outcome, call.request.id)
    if call.request.head_sent_at is not None:
        last = (
            layout.failure(outcome) if isinstance(outcome, ServiceError) else layout.last(outcome)
        )
        await call.request.send_body(last, more=False)
        return None
    if isinstance(outcome, ServiceError):
        raise outcome
    if outcome.failovers:
        headers["X-Ollamad-Node"] = outcome.failovers[-1].to_node
        headers["X-Ollamad-Failovers"] = str(len(outcome.failovers))
    return reply(layout.whole(Whole.of(outputs), outcome), headers=headers)


async def embed(call: Call, request: EmbedRequest) -> Embedded:
    """Make embeddings.

    Raises:
      ServiceError, InferenceError: with what the client should see.
    """
    stats = call.api.inference_stats
    begun = stats.begin()
    failed = True
    try:
        with with_deadline(call) as scope:
            embedded = await call.services.inference.embed(request, asker_of(call))
            call.spend_tokens(embedded.embeddings.prompt_eval_count)
            failed = False
        if scope.cancelled_caught:
            raise too_late()
    finally:
        stats.end(call.services.monotonic() - begun, failed=failed)
    return embedded


async def _collect(events: EventChannel, outputs: list[Output]) -> Finished | ServiceError:
    while True:
        try:
            event = await events.receive()
        except trio.EndOfChannel:
            return lost()
        if isinstance(event, Finished | Failed):
            return _end(event)
        outputs.append(event)


async def begin_stream(request: Request, layout: Layout, headers: dict[str, str]) -> None:
    """Send the head of a stream."""
    told = ((name.lower().encode(), value.encode()) for name, value in headers.items())
    await request.send_head(200, ((b"content-type", layout.content_type), *told))


async def _stream(
    call: Call, generation: Generation, layout: Layout, headers: dict[str, str], late: bytes
) -> Finished | ServiceError:
    """Send the parts. An error before the first byte leaves the status to the caller."""
    request = call.request
    events = generation.events
    try:
        event: Event = await events.receive()
        if isinstance(event, Failed):
            return _end(event)
        if request.head_sent_at is None:
            await begin_stream(request, layout, headers)
        elif late:  # it had to wait
            await request.send_body(late, more=True)
        while not isinstance(event, Finished | Failed):
            # Parts that wait already go out together; each stays a line of its own.
            lines = [layout.part(event)]
            waiting: Event | None = None
            while len(lines) < MAX_COALESCED:
                try:
                    waiting = events.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    waiting = None
                    break
                if isinstance(waiting, Finished | Failed):
                    break
                lines.append(layout.part(waiting))
            else:
                waiting = None
            await request.send_body(b"".join(lines), more=True)
            event = await events.receive() if waiting is None else waiting
    except trio.EndOfChannel:
        return lost()
    return _end(event)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """A call in Ollama's form: its arguments are an object."""
    function = {
        "index": call.index,
        "name": call.name,
        "arguments": msgspec.Raw(call.arguments.encode()),
    }
    return {"id": call.id, "function": function}


def _end(event: Finished | Failed) -> Finished | ServiceError:
    if isinstance(event, Finished):
        return event
    return ServiceError(event.status, event.code, event.message, event.details)


def with_deadline(call: Call) -> trio.CancelScope:
    """A scope that ends when the answer takes longer than it may."""
    seconds = call.api.settings.inference_deadline_s
    return trio.CancelScope() if seconds is None else trio.move_on_after(seconds)


def too_late() -> ServiceError:
    """The error of an answer that took longer than it may."""
    return ServiceError(408, "REQUEST_TIMEOUT", "the answer took longer than its deadline allows")


def lost() -> ServiceError:
    """The error of a generation without an end."""
    return ServiceError(500, "GENERATION_LOST", "the generation ended without saying why")
