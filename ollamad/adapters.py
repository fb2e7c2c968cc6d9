"""Fits parts to each other that do not know each other: engine to scheduler, host to API."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from ollamad.api.services import Embedded, Generation
from ollamad.core.admission import ANYBODY, Asker, QueuedRequest
from ollamad.core.explanation import Explanation
from ollamad.core.inference import (
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.state import Model
from ollamad.core.transcripts import Resume
from ollamad.core.weights import Choice
from ollamad.engine.engine import Engine
from ollamad.engine.spec import ModelSpec
from ollamad.host import HostMonitor
from ollamad.scheduler.dispatch import Dispatcher
from ollamad.scheduler.exchange import EventSource
from ollamad.store.errors import StoreError
from ollamad.store.gguf import GgufError
from ollamad.store.models import ModelStore


class LocalEngine:
    """The engine in terms of the cluster's models: finds the files of each."""

    def __init__(self, engine: Engine, store: ModelStore) -> None:
        self._engine = engine
        self._store = store

    @asynccontextmanager
    async def generate(self, model: Model, request: GenerateRequest) -> AsyncIterator[EventSource]:
        # Held, so that no file of it is freed before a runner has opened it.
        async with self._held(model):
            spec = await self._spec(model)
            async with self._engine.generate(spec, request) as events:
                yield _OnDemand(events)

    async def embed(self, model: Model, request: EmbedRequest) -> Embeddings:
        async with self._held(model):
            return await self._engine.embed(await self._spec(model), request)

    async def choice(self, model: Model) -> Choice:
        """The engine that runs a model here; without a name if none does, and why."""
        try:
            return self._engine.choice(await self._spec(model))
        except InferenceError as error:
            return Choice("", error.failure.message)

    async def objection(self, model: Model) -> str:
        """Why this node could not run a model that is here; empty if nothing is known."""
        async with self._held(model):
            try:
                return await self._engine.objection(await self._spec(model))
            except InferenceError as error:
                return error.failure.message

    def _held(self, model: Model) -> AbstractAsyncContextManager[object]:
        return self._store.pins.hold(*(layer.digest for layer in model.layers))

    async def _spec(self, model: Model) -> ModelSpec:
        try:
            parts = await self._store.runtime_parts(model)
        except StoreError as error:
            raise InferenceError(Failed("NOT_HERE", str(error), 503)) from None
        except GgufError as error:
            raise InferenceError(Failed("LOAD_FAILED", f"{model.name}: {error}")) from None
        return ModelSpec(
            name=model.name,
            digest=model.digest,
            gguf_path=str(parts.gguf),
            size=model.size,
            details=model.details,
            template=parts.template,
            system=parts.system,
            messages=parts.messages,
            options=parts.params,
            adapter_paths=tuple(str(path) for path in parts.adapters),
            projector_path="" if parts.projector is None else str(parts.projector),
            weights=parts.weights,
        )


class _OnDemand:
    """The engine makes events only when asked, so there is never one waiting."""

    def __init__(self, events: trio.abc.ReceiveChannel[Event]) -> None:
        self._events = events

    async def receive(self) -> Event:
        return await self._events.receive()

    def receive_nowait(self) -> Event:
        raise trio.WouldBlock


class ApiInference:
    def __init__(self, dispatcher: Dispatcher, engine: Engine) -> None:
        self._dispatcher = dispatcher
        self._engine = engine

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, asker: Asker = ANYBODY, resume: Resume | None = None
    ) -> AsyncIterator[Generation]:
        async with self._dispatcher.generate(request, asker, resume) as relay:
            yield Generation(
                relay.node_id, relay, relay.explanation, relay.first_place, relay.waited_s
            )

    async def embed(self, request: EmbedRequest, asker: Asker = ANYBODY) -> Embedded:
        return Embedded(*await self._dispatcher.embed(request, asker))

    def explain(self, request: GenerateRequest) -> Explanation:
        return self._dispatcher.explain(request)

    def queue(self) -> Sequence[QueuedRequest]:
        return self._dispatcher.admission.queued()

    def queued(self) -> int:
        in_runners = sum(model.queued for model in self._engine.loaded())
        return in_runners + self._dispatcher.admission.waiting


class ApiHost:
    def __init__(self, host: HostMonitor) -> None:
        self._host = host

    def cpu_percent(self) -> float:
        return 100 * self._host.usage.cpu

    def memory_percent(self) -> float:
        return 100 * self._host.usage.memory

    def network_percent(self) -> float:
        return self._host.network_percent()
