"""Handlers: generate, chat and embeddings, whole and streamed.

A stream is sent from within the generation's own context: when the client goes away the
handler is cancelled, the context is left, and the generation ends wherever it runs.
"""

import dataclasses
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio

from ollamad.api.asgi import Reply
from ollamad.api.bodies import ChatBody, EmbedBody, GenerateBody
from ollamad.api.calls import Call, error_body, reply
from ollamad.api.errors import as_service_error
from ollamad.api.services import EventChannel, Generation, ServiceError
from ollamad.core.inference import Chunk, Event, Failed, Finished, GenerateRequest

log = logging.getLogger(__name__)

STREAM_HEADERS = ((b"content-type", b"application/x-ndjson"),)
# Lines sent at once when a client is slower than the model; more adds no speed, only memory.
MAX_COALESCED = 64

_encode = msgspec.json.Encoder().encode


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


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How one route lays out its answer; the constant parts of a line are encoded once."""

    model: str
    chat: bool
    timestamps: Timestamps
    head: bytes
    middle: bytes
    tail: bytes

    @classmethod
    def of(cls, model: str, *, chat: bool, wall: Callable[[], float]) -> "Shape":
        head = b'{"model":' + _encode(model) + b',"created_at":"'
        if chat:
            middle, tail = b'","message":{"role":"assistant","content":', b'},"done":false}\n'
        else:
            middle, tail = b'","response":', b',"done":false}\n'
        return cls(model, chat, Timestamps(wall), head, middle, tail)

    def line(self, text: str) -> bytes:
        stamp = self.timestamps.now().encode()
        return b"".join((self.head, stamp, self.middle, _encode(text), self.tail))

    def final(self, text: str, end: Finished) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "created_at": self.timestamps.now()}
        if self.chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body["response"] = text
        body |= {"done": True, "done_reason": end.reason}
        if not self.chat:
            body["context"] = end.context
        return body | {
            "total_duration": end.total_duration,
            "load_duration": end.load_duration,
            "prompt_eval_count": end.prompt_eval_count,
            "prompt_eval_duration": end.prompt_eval_duration,
            "eval_count": end.eval_count,
            "eval_duration": end.eval_duration,
            "prompt_cached_count": end.prompt_cached_count,
        }


async def generate(call: Call) -> Reply | None:
    body = await call.body(GenerateBody)
    return await _answer(call, body.request(), stream=body.stream)


async def chat(call: Call) -> Reply | None:
    body = await call.body(ChatBody)
    return await _answer(call, body.request(), stream=body.stream)


async def embeddings(call: Call) -> Reply:
    body = await call.body(EmbedBody)
    request = body.request()
    request = msgspec.structs.replace(request, model=(await call.find_model(request.model)).name)
    stats = call.api.inference_stats
    begun = stats.begin()
    failed = True
    try:
        with _deadline(call) as scope:
            embedded = await call.services.inference.embed(request)
            failed = False
        if scope.cancelled_caught:
            raise _too_late()
    finally:
        stats.end(call.services.monotonic() - begun, failed=failed)
    result = embedded.embeddings
    answer: dict[str, Any] = {"model": request.model, "embedding": result.vectors[0]}
    if body.input is not None:
        answer["embeddings"] = result.vectors
    answer |= {
        "total_duration": result.total_duration,
        "load_duration": result.load_duration,
        "prompt_eval_count": result.prompt_eval_count,
    }
    return reply(answer, headers={"X-Ollamad-Node": embedded.node_id})


async def _answer(call: Call, request: GenerateRequest, *, stream: bool) -> Reply | None:
    request = msgspec.structs.replace(request, model=(await call.find_model(request.model)).name)
    shape = Shape.of(request.model, chat=request.messages is not None, wall=call.services.wall)
    stats = call.api.inference_stats
    begun = stats.begin()
    outcome: Finished | ServiceError | None = None
    node_id = ""
    texts: list[str] = []
    try:
        try:
            with _deadline(call):
                async with call.services.inference.generate(request) as generation:
                    node_id = generation.node_id
                    if stream:
                        outcome = await _stream(call, generation, shape)
                    else:
                        outcome = await _collect(generation.events, texts)
            if outcome is None:
                outcome = _too_late()
        except Exception as error:  # also a group of them, from a generation with a nursery
            outcome = as_service_error(error, call.request.id)
    finally:
        # No outcome: the client went away, which is no failure.
        failed = isinstance(outcome, ServiceError)
        stats.end(call.services.monotonic() - begun, failed=failed)
    if call.request.head_sent_at is not None:
        last = (
            error_body(outcome) if isinstance(outcome, ServiceError) else shape.final("", outcome)
        )
        await call.request.send_body(_encode(last) + b"\n", more=False)
        return None
    if isinstance(outcome, ServiceError):
        raise outcome
    return reply(shape.final("".join(texts), outcome), headers={"X-Ollamad-Node": node_id})


async def _collect(events: EventChannel, texts: list[str]) -> Finished | ServiceError:
    while True:
        try:
            event = await events.receive()
        except trio.EndOfChannel:
            return _lost()
        if isinstance(event, Chunk):
            texts.append(event.text)
        else:
            return _end(event)


async def _stream(call: Call, generation: Generation, shape: Shape) -> Finished | ServiceError:
    """Send the chunks. An error before the first byte leaves the status to the caller."""
    request = call.request
    events = generation.events
    try:
        event: Event = await events.receive()
        if isinstance(event, Failed):
            return _end(event)
        await request.send_head(
            200, (*STREAM_HEADERS, (b"x-ollamad-node", generation.node_id.encode()))
        )
        while isinstance(event, Chunk):
            # Chunks that wait already go out together; each stays a line of its own.
            lines = [shape.line(event.text)]
            waiting: Event | None = None
            while len(lines) < MAX_COALESCED:
                try:
                    waiting = events.receive_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    waiting = None
                    break
                if not isinstance(waiting, Chunk):
                    break
                lines.append(shape.line(waiting.text))
            else:
                waiting = None
            await request.send_body(b"".join(lines), more=True)
            event = await events.receive() if waiting is None else waiting
    except trio.EndOfChannel:
        return _lost()
    return _end(event)


def _end(event: Finished | Failed) -> Finished | ServiceError:
    if isinstance(event, Finished):
        return event
    return ServiceError(event.status, event.code, event.message, event.details)


def _deadline(call: Call) -> trio.CancelScope:
    seconds = call.api.settings.inference_deadline_s
    return trio.CancelScope() if seconds is None else trio.move_on_after(seconds)


def _too_late() -> ServiceError:
    return ServiceError(408, "REQUEST_TIMEOUT", "the answer took longer than its deadline allows")


def _lost() -> ServiceError:
    return ServiceError(500, "GENERATION_LOST", "the generation ended without saying why")
