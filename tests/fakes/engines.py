"""An engine that does what a test scripted, and notes what ran and how it ended."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from ollamad.core.inference import (
    Chunk,
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.state import Model


class ScriptedEngine:
    """`script` are the events of each generation; an exception in it is raised at that point."""

    def __init__(self) -> None:
        self.script: list[Event | Exception] = [Chunk("Hi", (1,)), Finished("stop", eval_count=1)]
        # Instead of `script`, what the events are for a request.
        self.script_for: Callable[[GenerateRequest], list[Event | Exception]] | None = None
        self.refuse: Exception | None = None  # raised instead of beginning
        self.refuse_first: Exception | None = None  # the same, but once
        self.together = False  # all events are there at once, and then the end
        self.hang_after: int | None = None  # events after which nothing comes any more
        self.requests: list[GenerateRequest | EmbedRequest] = []
        self.running = 0
        self.cancelled = 0
        self.vector: tuple[float, ...] = (0.5, 0.25)

    @asynccontextmanager
    async def generate(self, model: Model, request: GenerateRequest) -> AsyncIterator["Source"]:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        self._may_refuse()
        self.running += 1
        source = Source(self, self.script_for(request) if self.script_for else self.script)
        try:
            yield source
        finally:
            self.running -= 1
            self.cancelled += not source.ended

    async def embed(self, model: Model, request: EmbedRequest) -> Embeddings:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        self._may_refuse()
        if self.hang_after is not None:
            await trio.sleep_forever()
        return Embeddings(tuple(self.vector for _ in request.inputs), len(request.inputs))

    def _may_refuse(self) -> None:
        first, self.refuse_first = self.refuse_first, None
        if (error := first or self.refuse) is not None:
            raise error


class Source:
    def __init__(self, engine: ScriptedEngine, events: list[Event | Exception]) -> None:
        self._engine = engine
        self._events = list(events)
        self._count = 0
        self.ended = False

    async def receive(self) -> Event:
        await trio.lowlevel.checkpoint()
        if self._engine.hang_after == self._count:
            await trio.sleep_forever()
        return self._next()

    def receive_nowait(self) -> Event:
        if not self._engine.together:
            raise trio.WouldBlock
        return self._next()

    def _next(self) -> Event:
        if not self._events:
            self.ended = True
            raise trio.EndOfChannel
        self._count += 1
        event = self._events.pop(0)
        if isinstance(event, Exception):
            raise event
        self.ended = isinstance(event, Finished | Failed)
        return event


def refusal(code: str, status: int = 503) -> InferenceError:
    return InferenceError(Failed(code, f"{code} here", status))


async def drain(events: "Iterable[Event] | Source") -> list[Event]:
    """All events of a generation up to its end."""
    got = list[Event]()
    while not got or isinstance(got[-1], Chunk):
        try:
            got.append(await events.receive())  # type: ignore[union-attr]
        except trio.EndOfChannel:
            break
    return got
