"""One request's life: admitted, routed, run here or forwarded, relayed; and what others forward.

A request that fails on one node (which is gone, has no memory, is draining) goes to the next one,
also in the middle of its answer (`scheduler.relay`).
"""

import dataclasses
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import Protocol

import msgspec
import trio

from ollamad.core.admission import ANYBODY, HIGHEST, Asker
from ollamad.core.explanation import Explanation
from ollamad.core.failover import Answer, parse_mode
from ollamad.core.ids import NodeId
from ollamad.core.inference import (
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.measures import DemandMeter
from ollamad.core.names import nearest
from ollamad.core.prefix import Prompt
from ollamad.core.presence import Beat, Presence
from ollamad.core.routing import STICKY_BOUND_S, Choice, Policy
from ollamad.core.state import ClusterState, Model
from ollamad.core.transcripts import KEPT_S, Resume, Transcript, fingerprint_of, seed_of
from ollamad.scheduler.admission import AdmissionControl, Admitted, deadline_passed
from ollamad.scheduler.draining import DRAINING, Draining
from ollamad.scheduler.exchange import (
    EMBED,
    GENERATE,
    LOSSES,
    EmbedAnswer,
    EventSource,
    Peers,
    PeerStream,
    RemoteEvents,
    ask,
    lost,
    receive_whole,
    send_events,
    send_whole,
)
from ollamad.scheduler.relay import Attempts, Relay
from ollamad.scheduler.resume import Keeper
from ollamad.scheduler.router import Router, Sending, Serving
from ollamad.wire.codec import MalformedMessage, decode, encode

log = logging.getLogger(__name__)

UNLOAD_TIMEOUT_S = 5.0  # a runner that is idle ends in a moment
WATCH_INTERVAL_S = 0.25
# Without an event from another node for so long, it is asked whether it lives. A model that reads
# a long prompt is silent too, so that it is silent says nothing.
SILENCE_S = 1.0
USUAL_DRAIN_TIMEOUT_S = 60.0
USUAL_MAX_WAITING = 512  # Ollama's default

Probe = Callable[[NodeId], Awaitable[object]]


class Engine(Protocol):
    """The runners of this node."""

    def generate(
        self, model: Model, request: GenerateRequest
    ) -> AbstractAsyncContextManager[EventSource]: ...
    async def embed(self, model: Model, request: EmbedRequest) -> Embeddings: ...


async def _no_probe(node_id: NodeId) -> None:
    await trio.lowlevel.checkpoint()


class Dispatcher:
    """Answers requests for any model of the cluster, on whatever node that is best.

    Args:
      version: gives another object whenever state or presence changed.
      probe: finds out whether a node lives, and breaks what waits for it if not.
      slots: requests that a runner of this cluster usually serves at once.
      max_waiting: requests that may wait in the whole cluster.
      drain_timeout_s: how long answers may go on here after the node began to drain.
      demand: told of every request for a model that comes in here.
    """

    def __init__(
        self,
        node_id: NodeId,
        *,
        state: Callable[[], ClusterState],
        presence: Callable[[NodeId], Presence],
        engine: Engine,
        peers: Peers,
        version: Callable[[], object] = object,
        probe: Probe = _no_probe,
        failover: str = "continue",
        policy: Policy = "prefix",
        prefix_bound_s: float = STICKY_BOUND_S,
        slots: int = 4,
        cache_bytes: int = 128 << 20,
        max_waiting: int = USUAL_MAX_WAITING,
        drain_timeout_s: float = USUAL_DRAIN_TIMEOUT_S,
        demand: DemandMeter | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._node_id = node_id
        self._state = state
        self._presence = presence
        self._engine = engine
        self._peers = peers
        self._probe = probe
        self._failover = failover
        self._rng = rng or random.Random()
        self._demand = demand or DemandMeter(60, 600)
        self._draining = Draining(
            node_id, state=state, presence=presence, timeout_s=drain_timeout_s
        )
        self._outstanding = 0
        self._relays: set[Relay] = set()
        self.router = Router(
            node_id,
            state=state,
            presence=presence,
            version=version,
            pick=self._rng.randrange,
            now=trio.current_time,
            policy=policy,
            bound_s=prefix_bound_s,
            slots=slots,
            cache_bytes=cache_bytes,
        )
        self.admission = AdmissionControl(
            room=self.router.room,
            max_waiting=max_waiting,
            waiting_elsewhere=self._waiting_elsewhere,
            others=self._others,
        )
        self._keeper = Keeper(trio.current_time)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the queue and after silent nodes, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.admission.run)
            nursery.start_soon(self._watch)
            nursery.start_soon(self._draining.run)
            task_status.started()

    def outstanding(self) -> int:
        """Requests that came in here and are not answered yet; those that wait count too."""
        return self._outstanding + self.admission.waiting

    @asynccontextmanager
    async def generate(
        self, request: GenerateRequest, asker: Asker = ANYBODY, resume: Resume | None = None
    ) -> AsyncIterator[Relay]:
        """Run a generation; leaving the context ends it, on whatever node it runs.

        Raises:
          InferenceError: no node can answer; carries what the client should see.
        """
        begin_by = trio.current_time() + (asker.deadline_s or math.inf)
        unloaded = await self._unload_everywhere(request) if request.only_unloads else None
        if request.default_seed < 0:
            # Known here, so that the request can be run again and say the same.
            seed = seed_of(request.request_id) if request.request_id else self._rng.getrandbits(31)
            request = msgspec.structs.replace(request, default_seed=seed)
        model = self._find(request.model)
        request = msgspec.structs.replace(request, digest=model.digest)
        if request.request_id:
            fingerprint = fingerprint_of(request, asker.identity)
            request = msgspec.structs.replace(request, fingerprint=fingerprint)
        prompt = self.router.prompt(request, model)
        tokens = self.router.tokens(prompt, model)
        told = unloaded or await self._told_before(model, request)
        if told is not None and resume is not None and resume.is_ahead_of(told[1]):
            told = None  # its node was lost, too, while it repeated what the client has
        is_resumed = told is None and resume is not None and resume.from_token > 0
        if is_resumed and self._has_lost_a_node():
            # It was let in once, but nobody is left who knows. At other times anybody could say so.
            asker = dataclasses.replace(asker, priority=HIGHEST)
        async with (
            self._asked_for(model, generates=request.generates),
            self._admitted(model, request, asker, tokens, told is not None) as admitted,
        ):
            answer = Answer(request, parse_mode(request.failover or self._failover))

            def explain(choice: Choice) -> None:
                if asker.wants_scores and relay.explanation is None:
                    relay.explanation = self.router.explain(model, prompt, choice)

            relay = Relay(
                self,
                model,
                answer,
                prompt,
                on_choice=explain,
                on_placed=admitted.placed if admitted else lambda: None,
                on_end=self.router.answered,
            )
            if admitted is not None:
                relay.first_place, relay.waited_s = admitted.first_place, admitted.waited_s
            self._outstanding += 1
            self._relays.add(relay)
            try:
                with _to_begin_by(begin_by, asker):
                    if told is not None:
                        node_id, events = told
                        if resume is not None:
                            events = resume.cut(events)
                        known = resume.known(events) if resume else 0
                        await relay.begin_behind(node_id, events, known)
                    else:
                        if resume is not None and resume.from_token:
                            # Without its text it is made again, with the same seed.
                            if resume.received is None:
                                relay.skip = resume.from_token
                            else:
                                answer.have(resume.received, resume.from_token)
                        await relay.begin()
                yield relay
            finally:
                self._outstanding -= 1
                self._relays.discard(relay)
                await relay.aclose()
                if admitted is not None and relay.has_begun:
                    admitted.spent(tokens, relay.spent_tokens)

    async def embed(
        self, request: EmbedRequest, asker: Asker = ANYBODY
    ) -> tuple[NodeId, Embeddings]:
        """Embeddings, and the node that made them.

        Raises:
          InferenceError: no node can answer.
        """
        began = trio.current_time()
        model = self._find(request.model)
        prompt = Prompt(sum(map(len, request.inputs)))
        tokens = self.router.tokens(prompt, model)
        async with (
            self._asked_for(model),
            self.admission.admitted(model, asker, tokens, 0) as admitted,
        ):
            attempts = Attempts(self, model, prompt)
            self._outstanding += 1
            try:
                with _to_begin_by(began + (asker.deadline_s or math.inf), asker):
                    while True:
                        node_id, _ = await attempts.next()
                        with self.sending(node_id, model, prompt, 0.0):
                            admitted.placed()
                            try:
                                embeddings = await self._embed_on(node_id, model, request)
                            except LOSSES as error:
                                failure = lost(node_id, error)
                            except InferenceError as error:
                                failure = error.failure
                            else:
                                admitted.spent(tokens, 0)
                                return node_id, embeddings
                        attempts.failed(node_id, failure)
            finally:
                self._outstanding -= 1

    def explain(self, request: GenerateRequest) -> Explanation:
        """Where such a request would go now, and why; nothing is run.

        Raises:
          InferenceError: there is no such model.
        """
        model = self._find(request.model)
        return self.router.explain(model, self.router.prompt(request, model))

    def hear(self, node_id: NodeId, beat: Beat) -> None:
        """A beat of another node has come."""
        self.router.hear(node_id, beat)
        self.admission.hear(node_id, beat)

    # What other nodes forward to this one.

    async def serve_generate(self, peer: NodeId, request: bytes, stream: PeerStream) -> None:
        """Handle a forwarded generation: events go back in batches, as they come."""
        try:
            asked = decode(request or await receive_whole(stream), GenerateRequest)
            model = self._local(asked.model, may_drain=asked.only_unloads)
            if asked.digest not in ("", model.digest):
                # Replaced meanwhile; who asks, or this node, does not know yet.
                raise InferenceError(_not_here(asked.model))
            async with self._serve(model, asked) as events:
                await send_events(events, stream)
        except InferenceError as error:
            await stream.send(encode([error.failure]))
        except MalformedMessage as error:
            await stream.send(encode([Failed("MALFORMED", str(error), 400)]))

    async def serve_embed(self, peer: NodeId, request: bytes, stream: PeerStream) -> None:
        """Handle a forwarded embedding request."""
        answer: Embeddings | Failed
        try:
            asked = decode(request or await receive_whole(stream), EmbedRequest)
            answer = await self._engine.embed(self._local(asked.model), asked)
        except InferenceError as error:
            answer = error.failure
        except MalformedMessage as error:
            answer = Failed("MALFORMED", str(error), 400)
        await send_whole(stream, encode(EmbedAnswer.of(answer)))

    async def serve_transcript(self, peer: NodeId, request: bytes, stream: PeerStream) -> None:
        """Handle the question what this node has said to a request."""
        await self._keeper.serve(request, stream)

    # What a relay needs.

    def find_model(self, name: str) -> Model | None:
        """The model of that name as the cluster knows it now."""
        return self._state().find_model(name)

    def pick(
        self, model: Model, prompt: Prompt, without: Sequence[NodeId]
    ) -> tuple[NodeId, Choice] | None:
        """The best node but for some."""
        choice = self.router.choose(model, prompt, without=without)
        return None if choice is None else (self.router.node(choice), choice)

    def sending(self, node_id: NodeId, model: Model, prompt: Prompt, covered: float) -> Sending:
        """Counts a request at a node while its context is open."""
        return self.router.sending(node_id, model, prompt, covered)

    async def open(
        self, stack: AsyncExitStack, node_id: NodeId, model: Model, request: GenerateRequest
    ) -> EventSource:
        """Have a node answer; the stack ends it."""
        if self._failover != "continue" and not request.failover:
            request = msgspec.structs.replace(request, failover=self._failover)  # it does not know
        if node_id == self._node_id:
            return await stack.enter_async_context(self._serve(model, request))
        stream = await stack.enter_async_context(
            ask(self._peers, node_id, GENERATE, encode(request))
        )
        return RemoteEvents(stream)

    # Inside.

    @asynccontextmanager
    async def _asked_for(self, model: Model, *, generates: bool = True) -> AsyncIterator[None]:
        """Counts a request for a model, from before it waits until it is answered."""
        if not generates:
            yield
            return
        self._demand.begin(model.name, trio.current_time())
        try:
            yield
        finally:
            self._demand.end(model.name, trio.current_time())

    @asynccontextmanager
    async def _admitted(
        self,
        model: Model,
        request: GenerateRequest,
        asker: Asker,
        tokens: float,
        has_waited: bool,
    ) -> AsyncIterator[Admitted | None]:
        if not request.generates:  # nobody is to wait for that
            yield None
            return
        limit = request.options.num_predict
        async with self.admission.admitted(
            model, asker, tokens, limit, has_waited=has_waited, name=request.request_id
        ) as admitted:
            yield admitted

    async def _told_before(
        self, model: Model, request: GenerateRequest
    ) -> tuple[NodeId, list[Event]] | None:
        """Who served that request before, and what it said, if the client has named it."""
        if not request.request_id:
            return None
        return await self._keeper.find(
            request, model.confirmed, self._node_id, self._is_online, self._peers
        )

    def _has_lost_a_node(self) -> bool:
        """Whether some node went so lately that clients of it may be asking here for the rest."""
        now = self._presence(self._node_id).last_seen  # Unix time: a node sees itself now
        for node_id in self._state().members:
            presence = self._presence(node_id)
            if not presence.online:
                since_s = abs(now - presence.last_seen)
            elif presence.beat.started_at:  # it may be back already
                since_s = presence.beat.sent_at - presence.beat.started_at
            else:
                continue
            if since_s <= KEPT_S:
                return True
        return False

    def _is_online(self, node_id: NodeId) -> bool:
        return self._presence(node_id).online

    @asynccontextmanager
    async def _serve(self, model: Model, request: GenerateRequest) -> AsyncIterator[EventSource]:
        """Have this node's engine answer, measured, and kept for who may ask again."""
        with self.router.serving(model, request) as serving:
            # The tokens of what was `said` are not known, so nobody could be told where it stands.
            if not request.request_id or request.said:
                async with self._engine.generate(model, request) as events:
                    measured = _Measured(events, serving)
                    with self._draining.running(model, request, measured) as movable:
                        yield movable
                return
            with self._keeper.keeping(request) as transcript:
                async with self._engine.generate(model, request) as events:
                    kept = _Kept(events, serving, self._keeper, transcript)
                    with self._draining.running(model, request, kept) as movable:
                        yield movable

    def _others(self) -> Iterator[NodeId]:
        """The other nodes that are there."""
        for node_id in self._state().members:
            if node_id != self._node_id and self._presence(node_id).online:
                yield node_id

    def _waiting_elsewhere(self) -> int:
        return sum(self._presence(node_id).beat.waiting for node_id in self._others())

    async def _watch(self) -> None:
        """Ask nodes that say nothing for long whether they live."""
        asked = set[NodeId]()

        async def find_out(node_id: NodeId) -> None:
            try:
                await self._probe(node_id)
            finally:
                asked.discard(node_id)

        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(WATCH_INTERVAL_S)
                now = trio.current_time()
                for relay in self._relays:
                    node_id = relay.node_id
                    is_silent = now - relay.heard_at > SILENCE_S
                    if is_silent and node_id not in (self._node_id, "") and node_id not in asked:
                        asked.add(node_id)
                        nursery.start_soon(find_out, node_id)

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

    def _local(self, name: str, *, may_drain: bool = False) -> Model:
        model = self._state().find_model(name)
        member = self._state().members.get(self._node_id)
        # Who asks knows the model; here the log may be a little behind.
        if model is None or self._node_id not in model.confirmed:
            raise InferenceError(_not_here(name))
        if member is not None and member.draining and not may_drain:
            raise InferenceError(DRAINING)
        return model

    async def _unload_everywhere(
        self, request: GenerateRequest
    ) -> tuple[NodeId, list[Event]] | None:
        """Have every node drop the model from memory; those that cannot be asked are left out.

        Returns what one of them says of it, if any does.
        """
        model = self._find(request.model)
        done: list[tuple[NodeId, list[Event]]] = []

        async def tell(node_id: NodeId) -> None:
            with (
                trio.move_on_after(UNLOAD_TIMEOUT_S),
                suppress(InferenceError, trio.EndOfChannel, *LOSSES),
            ):
                async with AsyncExitStack() as stack:
                    event = await (await self.open(stack, node_id, model, request)).receive()
                    if isinstance(event, Finished):
                        done.append((node_id, [event]))

        async with trio.open_nursery() as nursery:
            for node_id in model.confirmed:
                if self._presence(node_id).online:
                    nursery.start_soon(tell, node_id)
        return done[0] if done else None

    async def _embed_on(self, node_id: NodeId, model: Model, request: EmbedRequest) -> Embeddings:
        if node_id == self._node_id:
            return await self._engine.embed(model, request)
        async with ask(self._peers, node_id, EMBED, encode(request)) as stream:
            answer = decode(await receive_whole(stream), EmbedAnswer)
        if answer.failed is not None:
            raise InferenceError(answer.failed)
        if answer.embeddings is None:
            raise MalformedMessage("an answer has one of both")
        return answer.embeddings


class _Measured:
    """The events of this node's engine, as they pass."""

    def __init__(self, events: EventSource, serving: Serving) -> None:
        self._events = events
        self._serving = serving

    async def receive(self) -> Event:
        event = await self._events.receive()
        self._serving.take(event)
        return event

    def receive_nowait(self) -> Event:
        event = self._events.receive_nowait()
        self._serving.take(event)
        return event


class _Kept:
    """The same, and each is noted for who may ask again."""

    def __init__(
        self, events: EventSource, serving: Serving, keeper: Keeper, transcript: Transcript
    ) -> None:
        self._measured = _Measured(events, serving)
        self._keeper = keeper
        self._transcript = transcript

    async def receive(self) -> Event:
        event = await self._measured.receive()
        self._keeper.note(self._transcript, event)
        return event

    def receive_nowait(self) -> Event:
        event = self._measured.receive_nowait()
        self._keeper.note(self._transcript, event)
        return event


@contextmanager
def _to_begin_by(deadline: float, asker: Asker) -> Iterator[None]:
    """The answer begins within the context, or it is too late for it.

    Raises:
      InferenceError: 408, it is.
    """
    with trio.move_on_at(deadline) as scope:
        yield
    if scope.cancelled_caught:
        raise InferenceError(deadline_passed(asker, "no node has begun to answer"))


def _not_here(name: str) -> Failed:
    return Failed("NOT_HERE", f"{name} is not on this node", 503)
