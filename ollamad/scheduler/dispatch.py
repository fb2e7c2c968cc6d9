"""Finds the node for a request and relays its answer; serves what other nodes forward.

A request that fails before its first event (the node is gone, has no memory, is draining) goes
to the next node. After the first event a failure is told in band.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec
import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.inference import (
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    GenerateRequest,
    InferenceError,
    LoadedModel,
    Options,
)
from ollamad.core.names import nearest
from ollamad.core.presence import Presence
from ollamad.core.routing import NodeView, route
from ollamad.core.state import ClusterState, Model
from ollamad.wire.codec import MalformedMessage, decode, encode

log = logging.getLogger(__name__)

GENERATE = "infer.generate"
EMBED = "infer.embed"

# Failures of one node that another node may not share.
TRY_ELSEWHERE = {
    "INSUFFICIENT_MEMORY",
    "LOAD_FAILED",
    "RUNNER_DIED",
    "QUEUE_FULL",
    "NOT_HERE",
    "DRAINING",
    "NODE_LOST",
}
LOADED_MARGIN = 64 << 20  # bytes a runner takes beside weights and cache
PART_SIZE = 512 << 10  # bytes; longer requests and answers travel in parts of this size
MAX_WHOLE = 64 << 20  # bytes of all parts: 2000 embeddings of 3000 numbers


class EventSource(Protocol):
    """The events of a generation, up to Finished or Failed."""

    async def receive(self) -> Event: ...
    def receive_nowait(self) -> Event: ...


class Engine(Protocol):
    """The runners of this node."""

    def generate(
        self, model: Model, request: GenerateRequest
    ) -> AbstractAsyncContextManager[EventSource]: ...
    async def embed(self, model: Model, request: EmbedRequest) -> Embeddings: ...


class PeerStream(Protocol):
    async def send(self, data: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def receive(self) -> bytes | None: ...
    def receive_nowait(self) -> bytes | None: ...


class Peers(Protocol):
    def open(
        self, node_id: NodeId, method: str, request: bytes
    ) -> AbstractAsyncContextManager[PeerStream]: ...


class Serving(msgspec.Struct, frozen=True):
    """A generation that runs: on which node, and its events."""

    node_id: NodeId
    events: EventSource


class Dispatcher:
    """Answers requests for any model of the cluster, on whatever node that is best."""

    def __init__(
        self,
        node_id: NodeId,
        *,
        state: Callable[[], ClusterState],
        presence: Callable[[NodeId], Presence],
        engine: Engine,
        peers: Peers,
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._presence = presence
        self._engine = engine
        self._peers = peers
        self._outstanding: Counter[tuple[NodeId, str]] = Counter()

    def outstanding(self) -> int:
        """Requests that came in here and are not answered yet."""
        return self._outstanding.total()

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Serving]:
        """Run a generation; leaving the context ends it, on whatever node it runs.

        Raises:
          InferenceError: no node can answer; carries what the client should see.
        """
        model = self._find(request.model)
        tried: list[str] = []
        failure: Failed | None = None
        for node_id in self._candidates(model, request.options):
            async with AsyncExitStack() as stack:
                stack.enter_context(self._counted(node_id, model))
                try:
                    events = await self._open(stack, node_id, model, request)
                    first = await events.receive()
                except (*_LOSSES, trio.EndOfChannel) as error:
                    first = _lost(node_id, error)
                except InferenceError as error:
                    first = error.failure
                if isinstance(first, Failed):
                    if first.code in TRY_ELSEWHERE:
                        log.info("%s on %s: %s", model.name, short(node_id), first.message)
                        tried.append(node_id)
                        failure = first
                        continue
                    raise InferenceError(first)
                yield Serving(node_id, _Peeked(first, events, node_id))
                return
        raise InferenceError(_nobody(model, failure, tried))

    async def embed(self, request: EmbedRequest) -> tuple[NodeId, Embeddings]:
        """Embeddings, and the node that made them.

        Raises:
          InferenceError: no node can answer.
        """
        model = self._find(request.model)
        tried: list[str] = []
        failure: Failed | None = None
        for node_id in self._candidates(model, request.options):
            with self._counted(node_id, model):
                try:
                    return node_id, await self._embed_on(node_id, model, request)
                except _LOSSES as error:
                    failure = _lost(node_id, error)
                except InferenceError as error:
                    failure = error.failure
            if failure.code not in TRY_ELSEWHERE:
                raise InferenceError(failure)
            tried.append(node_id)
        raise InferenceError(_nobody(model, failure, tried))

    # What other nodes forward to this one.

    async def serve_generate(self, peer: NodeId, request: bytes, stream: PeerStream) -> None:
        """Handle a forwarded generation: events go back in batches, as they come."""
        try:
            asked = decode(request or await _receive_whole(stream), GenerateRequest)
            async with self._engine.generate(self._local(asked.model), asked) as events:
                await _relay(events, stream)
        except InferenceError as error:
            await stream.send(encode([error.failure]))
        except MalformedMessage as error:
            await stream.send(encode([Failed("MALFORMED", str(error), 400)]))

    async def serve_embed(self, peer: NodeId, request: bytes, stream: PeerStream) -> None:
        """Handle a forwarded embedding request."""
        answer: Embeddings | Failed
        try:
            asked = decode(request or await _receive_whole(stream), EmbedRequest)
            answer = await self._engine.embed(self._local(asked.model), asked)
        except InferenceError as error:
            answer = error.failure
        except MalformedMessage as error:
            answer = Failed("MALFORMED", str(error), 400)
        await _send_whole(stream, encode(_EmbedAnswer.of(answer)))

    # Inside.

    def _find(self, name: str) -> Model:
        state = self._state()
        model = state.find_model(name)
        if model is None:
            close = nearest(name, (m.name for m in state.models.values()))
            hint = f"; did you mean {' or '.join(close)}?" if close else ", try pulling it first"
            raise InferenceError(
                Failed(
                    "MODEL_NOT_FOUND",
                    f"model {name!r} not found{hint}",
                    404,
                    {"model": name, "suggestions": close},
                )
            )
        return model

    def _local(self, name: str) -> Model:
        model = self._state().find_model(name)
        member = self._state().members.get(self._node_id)
        # Who asks knows the model; here the log may be a little behind.
        if model is None or self._node_id not in model.confirmed:
            raise InferenceError(Failed("NOT_HERE", f"{name} is not on this node", 503))
        if member is not None and member.draining:
            raise InferenceError(Failed("DRAINING", "this node is draining", 503))
        return model

    def _candidates(self, model: Model, options: Options) -> Sequence[NodeId]:
        state = self._state()
        views = []
        for node_id in model.confirmed:
            member = state.members.get(node_id)
            if member is None:
                continue
            presence = self._presence(node_id)
            loaded = presence.beat.loaded
            idle = sum(other.size for other in loaded if not other.busy and not other.queued)
            views.append(
                NodeView(
                    node_id=node_id,
                    is_self=node_id == self._node_id,
                    online=presence.online,
                    draining=member.draining,
                    loaded=_find_loaded(loaded, model),
                    outstanding=self._outstanding[node_id, model.name],
                    memory_free=presence.beat.usage.memory_available + idle,
                )
            )
        context = options.num_ctx or 4096
        needed = model.size + context * model.details.kv_bytes_per_token + LOADED_MARGIN
        return route(views, needed)

    async def _open(
        self, stack: AsyncExitStack, node_id: NodeId, model: Model, request: GenerateRequest
    ) -> EventSource:
        if node_id == self._node_id:
            return await stack.enter_async_context(self._engine.generate(model, request))
        stream = await stack.enter_async_context(self._ask(node_id, GENERATE, encode(request)))
        return _RemoteEvents(stream)

    async def _embed_on(self, node_id: NodeId, model: Model, request: EmbedRequest) -> Embeddings:
        if node_id == self._node_id:
            return await self._engine.embed(model, request)
        async with self._ask(node_id, EMBED, encode(request)) as stream:
            answer = decode(await _receive_whole(stream), _EmbedAnswer)
        if answer.failed is not None:
            raise InferenceError(answer.failed)
        if answer.embeddings is None:
            raise MalformedMessage("an answer has one of both")
        return answer.embeddings

    @asynccontextmanager
    async def _ask(self, node_id: NodeId, method: str, request: bytes) -> AsyncIterator[PeerStream]:
        """An exchange with a whole request; a long one goes in parts behind the opening."""
        if len(request) > MAX_WHOLE:
            raise InferenceError(
                Failed("REQUEST_TOO_LARGE", f"the request is over {MAX_WHOLE >> 20} MiB", 413)
            )
        head, rest = (request, b"") if len(request) <= PART_SIZE else (b"", request)
        async with self._peers.open(node_id, method, head) as stream:
            await _send_whole(stream, rest)
            await stream.send_eof()
            yield stream

    def _counted(self, node_id: NodeId, model: Model) -> "_Counted":
        return _Counted(self._outstanding, (node_id, model.name))


class _Counted:
    """Counts a request as outstanding while its context is open."""

    def __init__(self, counter: Counter[tuple[NodeId, str]], key: tuple[NodeId, str]) -> None:
        self._counter = counter
        self._key = key

    def __enter__(self) -> None:
        self._counter[self._key] += 1

    def __exit__(self, *_: object) -> None:
        self._counter[self._key] -= 1
        if not self._counter[self._key]:
            del self._counter[self._key]


class _EmbedAnswer(msgspec.Struct, frozen=True):
    embeddings: Embeddings | None = None
    failed: Failed | None = None

    @classmethod
    def of(cls, answer: Embeddings | Failed) -> "_EmbedAnswer":
        if isinstance(answer, Failed):
            return cls(failed=answer)
        return cls(embeddings=answer)


class _RemoteEvents:
    """The events of a generation on another node: each message is a batch of them."""

    def __init__(self, stream: PeerStream) -> None:
        self._stream = stream
        self._batch: list[Event] = []  # reversed

    async def receive(self) -> Event:
        while not self._batch:
            data = await self._stream.receive()
            if data is None:
                raise trio.EndOfChannel
            self._fill(data)
        return self._batch.pop()

    def receive_nowait(self) -> Event:
        while not self._batch:
            data = self._stream.receive_nowait()
            if data is None:
                raise trio.WouldBlock
            self._fill(data)
        return self._batch.pop()

    def _fill(self, data: bytes) -> None:
        self._batch = decode(data, _BATCH)
        self._batch.reverse()


_BATCH: Any = list[Event]
# How a node that is lost, or talks nonsense, shows.
_LOSSES = (OSError, trio.BrokenResourceError, MalformedMessage)


class _Peeked:
    """An event source whose first event was taken already; tells a lost node in band."""

    def __init__(self, first: Event, rest: EventSource, node_id: NodeId) -> None:
        self._first: Event | None = first
        self._rest = rest
        self._node_id = node_id

    async def receive(self) -> Event:
        if (first := self._first) is not None:
            self._first = None
            return first
        try:
            return await self._rest.receive()
        except _LOSSES as error:
            return _lost(self._node_id, error)

    def receive_nowait(self) -> Event:
        if (first := self._first) is not None:
            self._first = None
            return first
        try:
            return self._rest.receive_nowait()
        except _LOSSES as error:
            return _lost(self._node_id, error)


async def _relay(events: EventSource, stream: PeerStream) -> None:
    """Send events as they come, those that are there already in one message."""
    while True:
        try:
            batch = [await events.receive()]
        except trio.EndOfChannel:
            return
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while len(batch) < 64:
                batch.append(events.receive_nowait())
        await stream.send(encode(batch))


async def _send_whole(stream: PeerStream, data: bytes) -> None:
    for start in range(0, len(data), PART_SIZE):
        await stream.send(data[start : start + PART_SIZE])


async def _receive_whole(stream: PeerStream) -> bytes:
    """All messages up to the end, as one."""
    whole = bytearray()
    while (part := await stream.receive()) is not None:
        whole += part
        if len(whole) > MAX_WHOLE:
            raise MalformedMessage(f"more than {MAX_WHOLE} bytes")
    return bytes(whole)


def _find_loaded(loaded: Sequence[LoadedModel], model: Model) -> LoadedModel | None:
    return next((one for one in loaded if one.digest == model.digest), None)


def _lost(node_id: NodeId, error: BaseException) -> Failed:
    return Failed(
        "NODE_LOST",
        f"node {short(node_id)}… was lost: {str(error) or type(error).__name__}",
        503,
        {"node_id": node_id},
    )


def _nobody(model: Model, failure: Failed | None, tried: list[str]) -> Failed:
    if failure is not None:
        details = {**failure.details, "nodes_tried": tried}
        return msgspec.structs.replace(failure, details=details)
    if not model.confirmed:
        return Failed(
            "NO_REPLICA",
            f"no node holds {model.name} completely yet; see `ollama-dist transfers list`",
            503,
            {"model": model.name},
        )
    return Failed(
        "NO_REPLICA",
        f"every node that holds {model.name} is offline or draining",
        503,
        {"model": model.name, "holders": list(model.confirmed)},
    )
