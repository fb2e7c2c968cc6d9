"""Finds the node for a request and relays its answer; serves what other nodes forward.

A request that fails on one node (which is gone, has no memory, is draining) goes to the next one,
also in the middle of its answer: see `core.failover` for how it goes on there.
"""

import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, TypeGuard

import msgspec
import trio

from ollamad.core.failover import Answer, parse_mode
from ollamad.core.ids import NodeId, short
from ollamad.core.inference import (
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    Failover,
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
# An answer that finds no node to go on waits so long for one: a daemon restarts in a second or
# two, a node that was only cut off is back after its links are dialled again.
WAIT_FOR_NODE_S = 10.0
WAIT_STEP_S = 0.25
MAX_BARREN_FAILURES = 3  # of nodes in a row that added nothing: then it may be the request
UNLOAD_TIMEOUT_S = 5.0  # a runner that is idle ends in a moment
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
        failover: str = "continue",
        rng: random.Random | None = None,
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._presence = presence
        self._engine = engine
        self._peers = peers
        self._failover = failover
        self._rng = rng or random.Random()
        self._outstanding: Counter[tuple[NodeId, str]] = Counter()

    def outstanding(self) -> int:
        """Requests that came in here and are not answered yet."""
        return self._outstanding.total()

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator["Relay"]:
        """Run a generation; leaving the context ends it, on whatever node it runs.

        Raises:
          InferenceError: no node can answer; carries what the client should see.
        """
        if request.only_loads and request.keep_alive_s == 0:
            await self._unload_everywhere(request)
        if request.default_seed < 0:
            # Known here, so that the request can be run again and say the same.
            request = msgspec.structs.replace(request, default_seed=self._rng.getrandbits(31))
        model = self._find(request.model)
        request = msgspec.structs.replace(request, digest=model.digest)
        answer = Answer(request, parse_mode(request.failover or self._failover))
        relay = Relay(self, model, answer, request.options)
        try:
            await relay.begin()
            yield relay
        finally:
            await relay.aclose()

    async def embed(self, request: EmbedRequest) -> tuple[NodeId, Embeddings]:
        """Embeddings, and the node that made them.

        Raises:
          InferenceError: no node can answer.
        """
        model = self._find(request.model)
        tried: list[str] = []
        failure: Failed | None = None
        for node_id in self.candidates(model, request.options):
            with self.counted(node_id, model):
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
            model = self._local(asked.model)
            if asked.digest not in ("", model.digest):
                # Replaced meanwhile; who asks, or this node, does not know yet.
                raise InferenceError(_not_here(asked.model))
            async with self._engine.generate(model, asked) as events:
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

    def find_model(self, name: str) -> Model | None:
        """The model of that name as the cluster knows it now."""
        return self._state().find_model(name)

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
            raise InferenceError(_not_here(name))
        if member is not None and member.draining:
            raise InferenceError(Failed("DRAINING", "this node is draining", 503))
        return model

    def candidates(self, model: Model, options: Options) -> Sequence[NodeId]:
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

    async def _unload_everywhere(self, request: GenerateRequest) -> None:
        """Have every node drop the model from memory; those that cannot be asked are left out."""
        model = self._find(request.model)

        async def tell(node_id: NodeId) -> None:
            with (
                trio.move_on_after(UNLOAD_TIMEOUT_S),
                suppress(InferenceError, trio.EndOfChannel, *_LOSSES),
            ):
                async with AsyncExitStack() as stack:
                    await (await self.open(stack, node_id, model, request)).receive()

        async with trio.open_nursery() as nursery:
            for node_id in model.confirmed:
                if self._presence(node_id).online:
                    nursery.start_soon(tell, node_id)

    async def open(
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

    def counted(self, node_id: NodeId, model: Model) -> "_Counted":
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


class Relay:
    """The events of one generation, whichever nodes they come from. One task may receive."""

    def __init__(
        self, dispatcher: Dispatcher, model: Model, answer: Answer, options: Options
    ) -> None:
        self.node_id = NodeId("")  # the node that serves now
        self._dispatcher = dispatcher
        self._model = model
        self._answer = answer
        self._options = options
        self._attempt = AsyncExitStack()
        self._events: EventSource | None = None
        self._first: Event | None = None  # of the attempt; taken to see that there is one
        self._loss: Failed | None = None  # how the attempt ended, found where nothing can wait
        self._lost: set[NodeId] = set()
        self._barren = 0
        self._heard_at = trio.current_time()

    async def begin(self) -> None:
        """Find a node that begins to answer.

        Raises:
          InferenceError: none does; or the request is wrong.
        """
        failure, tried = None, list[str]()
        for node_id in self._dispatcher.candidates(self._model, self._options):
            failure = await self._try(node_id)
            if failure is None:
                return
            if failure.code not in TRY_ELSEWHERE:
                raise InferenceError(failure)
            tried.append(node_id)
        raise InferenceError(_nobody(self._model, failure, tried))

    async def receive(self) -> Event:
        while True:
            event = await self._next()
            if self._is_loss(event):
                self._loss = None
                if (failure := await self._go_on(event)) is not None:
                    return failure
                continue
            if (new := self._take(event)) is not None:
                return new

    def receive_nowait(self) -> Event:
        """Raises trio.WouldBlock also where the answer has to go on elsewhere first."""
        while True:
            if self._loss is not None or self._events is None:
                raise trio.WouldBlock
            if self._first is not None:
                event, self._first = self._first, None
            else:
                try:
                    event = self._events.receive_nowait()
                except InferenceError as error:
                    event = error.failure
                except (*_LOSSES, trio.EndOfChannel) as error:
                    event = _lost(self.node_id, error)
            if self._is_loss(event):
                self._loss = event
                raise trio.WouldBlock
            if (new := self._take(event)) is not None:
                return new

    async def aclose(self) -> None:
        """End the generation wherever it runs."""
        self._events = None
        await self._attempt.aclose()

    def _is_loss(self, event: Event) -> TypeGuard[Failed]:
        return (
            isinstance(event, Failed) and event.code in TRY_ELSEWHERE and self._answer.mode != "off"
        )

    def _take(self, event: Event) -> Event | None:
        self._heard_at = trio.current_time()
        new = self._answer.take(event)
        if new is not None:
            self._barren = 0
        return new

    async def _next(self) -> Event:
        if self._loss is not None:
            return self._loss
        if self._first is not None:
            event, self._first = self._first, None
            return event
        assert self._events is not None
        try:
            return await self._events.receive()
        except InferenceError as error:
            return error.failure
        except (*_LOSSES, trio.EndOfChannel) as error:
            return _lost(self.node_id, error)

    async def _try(self, node_id: NodeId) -> Failed | None:
        """Have that node answer, from where the answer is. Returns why it does not."""
        await self._attempt.aclose()
        self._attempt = attempt = AsyncExitStack()
        attempt.enter_context(self._dispatcher.counted(node_id, self._model))
        request = self._answer.resume()
        try:
            self._events = await self._dispatcher.open(attempt, node_id, self._model, request)
            first = await self._events.receive()
        except (*_LOSSES, trio.EndOfChannel) as error:
            first = _lost(node_id, error)
        except InferenceError as error:
            first = error.failure
        if isinstance(first, Failed):
            log.info("%s on %s: %s", self._model.name, short(node_id), first.message)
            await attempt.aclose()
            return first
        self.node_id, self._first = node_id, first
        return None

    async def _go_on(self, failure: Failed) -> Failed | None:
        """Find a node for the rest of the answer. Returns the failure if there is none."""
        lost_at, lost_on = self._heard_at, self.node_id
        self._lost.add(lost_on)
        self._barren += 1
        if self._barren > MAX_BARREN_FAILURES:
            return failure
        after_tokens, mode = self._answer.token_count, self._answer.mode
        give_up_at = trio.current_time() + WAIT_FOR_NODE_S
        while self._is_the_same_model():
            for node_id in self._still_possible():
                refusal = await self._try(node_id)
                if refusal is None:
                    self._moved(lost_on, failure, mode, after_tokens, lost_at)
                    return None
                if refusal.code not in TRY_ELSEWHERE:
                    return refusal
                self._lost.add(node_id)
            if trio.current_time() >= give_up_at:
                return failure
            await trio.sleep(WAIT_STEP_S)
            # Nobody else is there: a node that was lost may be back.
            self._lost.clear()
        return failure

    def _is_the_same_model(self) -> bool:
        """Look the model up again (its holders may have changed); false: deleted or replaced."""
        model = self._dispatcher.find_model(self._model.name)
        if model is None or model.digest != self._model.digest:
            return False
        self._model = model
        return True

    def _still_possible(self) -> list[NodeId]:
        """The nodes to go on at, best first; those that failed this answer are left out."""
        nodes = self._dispatcher.candidates(self._model, self._options)
        return [node_id for node_id in nodes if node_id not in self._lost]

    def _moved(
        self, lost_on: NodeId, failure: Failed, mode: str, after_tokens: int, lost_at: float
    ) -> None:
        silence_ms = round(1000 * (trio.current_time() - lost_at))
        move = Failover(lost_on, self.node_id, failure.code, mode, after_tokens, silence_ms)
        self._answer.failovers += (move,)
        log.warning(
            "%s: %s was lost after %d tokens (%s); %s goes on (%s, %d ms of silence)",
            self._model.name,
            short(lost_on),
            after_tokens,
            failure.message,
            short(self.node_id),
            mode,
            silence_ms,
        )


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


def _not_here(name: str) -> Failed:
    return Failed("NOT_HERE", f"{name} is not on this node", 503)


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
