"""The events of one generation, whichever nodes they come from.

It begins at the best node that answers, and when that node is lost in the middle it goes on at
another: see `core.failover` for how. It can also begin in the middle, with what another entry node
had of the answer before that died.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from typing import Protocol, TypeGuard

import msgspec
import trio

from ollamad.core.admission import Place
from ollamad.core.explanation import Explanation
from ollamad.core.failover import Answer
from ollamad.core.ids import NodeId, short
from ollamad.core.inference import (
    Chunk,
    Event,
    Failed,
    Failover,
    Finished,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.prefix import Prompt
from ollamad.core.routing import Choice
from ollamad.core.state import Model
from ollamad.scheduler.exchange import LOSSES, EventSource, lost

log = logging.getLogger(__name__)

# Failures of one node that another node may not share.
TRY_ELSEWHERE = {
    "INSUFFICIENT_MEMORY",
    "LOAD_FAILED",
    "RUNNER_DIED",
    "QUEUE_FULL",
    "NOT_HERE",
    "DRAINING",
    "NODE_LOST",
    "STOPPED",
    "ENGINE_ERROR",
}
# What a node says again when it is asked again: its context is set smaller, or it cannot decode.
# A prompt that is too long is tried elsewhere once something was answered: some node took it.
UNFIT = {"PROMPT_TOO_LONG", "ENGINE_ERROR"}
# Of TRY_ELSEWHERE, what may be over in a moment: a runner starts anew, a link is dialled again, a
# daemon that was killed or stopped restarts.
PASSING = {"RUNNER_DIED", "NODE_LOST", "STOPPED"}
ENTRY_LOST = "ENTRY_LOST"  # the node that the client talked to; who served lives
# What has lost its node and finds no other waits so long for one, before the first token as in the
# middle: a daemon restarts in a second or two, a node that was only cut off is back after its links
# are dialled again.
WAIT_FOR_NODE_S = 10.0
WAIT_STEP_S = 0.25
# Of nodes in a row that added nothing: then it may be the request. Each runner that it kills takes
# the answers of others along, so however many nodes there are, no more are given it.
MAX_BARREN_FAILURES = 3
MAY_BE_THE_REQUEST = {"RUNNER_DIED"} | UNFIT
# Times that nodes are lost once more with the same request before it begins: it may be that, too.
MAX_LOST_AGAIN = 2


class Sending(Protocol):
    """A request that counts at a node while it is with it."""

    def begun(self) -> None: ...


class Nodes(Protocol):
    """What a relay needs of the dispatcher."""

    def find_model(self, name: str) -> Model | None: ...
    def pick(
        self, model: Model, prompt: Prompt, without: Sequence[NodeId]
    ) -> tuple[NodeId, Choice] | None: ...
    def sending(
        self, node_id: NodeId, model: Model, prompt: Prompt, covered: float
    ) -> AbstractContextManager[Sending]: ...
    async def open(
        self, stack: AsyncExitStack, node_id: NodeId, model: Model, request: GenerateRequest
    ) -> EventSource: ...


class Attempts:
    """The nodes that may begin a request, one after another.

    Args:
      has_begun: the client has a part of the answer from before.
    """

    def __init__(
        self, nodes: "Nodes", model: Model, prompt: Prompt, *, has_begun: bool = False
    ) -> None:
        self._elsewhere = TRY_ELSEWHERE | UNFIT if has_begun else TRY_ELSEWHERE
        self._nodes = nodes
        self._model = model
        self._prompt = prompt
        self._tried = dict[NodeId, None]()
        self._without = list[NodeId]()
        self._passing = set[NodeId]()  # those that may do better in a moment
        self._give_up_at = -math.inf
        self._lost_again = 0
        self._barren = 0
        self._failure: Failed | None = None

    async def next(self) -> tuple[NodeId, Choice]:
        """The next one; when nobody else is left, one that was lost, as soon as it is back.

        Raises:
          InferenceError: nobody is left, or comes back in time.
        """
        while (found := self._nodes.pick(self._model, self._prompt, self._without)) is None:
            if not self._may_come_back() or trio.current_time() >= self._give_up_at:
                raise InferenceError(nobody(self._model, self._failure, list(self._tried)))
            await trio.sleep(WAIT_STEP_S)
            self._without = [node for node in self._without if node not in self._passing]
        return found

    def failed(self, node_id: NodeId, failure: Failed) -> None:
        """It did not begin.

        Raises:
          InferenceError: no other one would.
        """
        if failure.code not in self._elsewhere:
            raise InferenceError(failure)
        self._without.append(node_id)
        if failure.code == "NOT_HERE" and node_id in self._passing:
            return  # it is back, and has not read its log to the end yet
        self._failure = failure
        was_tried = node_id in self._tried
        self._tried[node_id] = None
        # A runner that crashes again and again says when it is started again.
        is_put_off = "retry_after" in failure.details
        if failure.code in PASSING and not is_put_off:
            self._passing.add(node_id)
            self._lost_again += was_tried
        else:
            self._passing.discard(node_id)
        # Who is refused by another node is told so soon, after one more look at those lost.
        only_lost = self._passing.issuperset(self._without)
        self._give_up_at = trio.current_time() + (WAIT_FOR_NODE_S if only_lost else WAIT_STEP_S)
        self._barren += failure.code in MAY_BE_THE_REQUEST and not is_put_off
        if self._barren >= MAX_BARREN_FAILURES:
            raise InferenceError(nobody(self._model, given_up(failure), list(self._tried)))

    def _may_come_back(self) -> bool:
        """Whether a node that was lost still holds the model, and the request may not be why."""
        newest = newest_of(self._nodes, self._model)
        has_left = newest is None or self._passing.isdisjoint(newest.confirmed)
        return not has_left and self._lost_again < MAX_LOST_AGAIN


class Relay:
    """One task may receive. `node_id` is the node that serves now."""

    def __init__(
        self,
        nodes: Nodes,
        model: Model,
        answer: Answer,
        prompt: Prompt,
        *,
        on_choice: Callable[[Choice], None] = lambda choice: None,
        on_placed: Callable[[], None] = lambda: None,
        on_end: Callable[[Finished], None] = lambda end: None,
    ) -> None:
        self.node_id = NodeId("")
        self.explanation: Explanation | None = None  # of the first decision, if it was asked for
        self.first_place: Place | None = None  # in the queue, if it waited
        self.waited_s = 0.0
        self.heard_at = trio.current_time()
        self.has_begun = False  # some node has evaluated the prompt
        self.output_tokens = 0  # known at the end
        self.skip = 0  # tokens that the client has already, and that are generated once more
        self._nodes = nodes
        self._model = model
        self._answer = answer
        self._prompt = prompt
        self._on_choice = on_choice
        self._on_placed = on_placed
        self._on_end = on_end
        self._attempt = AsyncExitStack()
        self._events: EventSource | None = None
        self._first: Event | None = None  # of the attempt; taken to see that there is one
        self._known = deque[Event]()  # what an earlier entry node had, and the client lacks
        self._loss: Failed | None = None  # how the attempt ended, found where nothing can wait
        self._lost: set[NodeId] = set()
        self._unfit: set[NodeId] = set()  # the same, and it would be no use to ask them again
        self._tried = dict[NodeId, None]()  # all that were lost or refused, in their order
        self._barren = 0

    @property
    def spent_tokens(self) -> int:
        """Tokens of the answer, in all or, about, so far."""
        return self.output_tokens or self._answer.written_count

    async def begin(self) -> None:
        """Find a node that begins to answer.

        Raises:
          InferenceError: none does; or the request is wrong.
        """
        attempts = Attempts(self._nodes, self._model, self._prompt, has_begun=self._answer.begun)
        while True:
            node_id, choice = await attempts.next()
            self._on_choice(choice)
            failure = await self._try(node_id, choice)
            if failure is None:
                return
            attempts.failed(node_id, failure)

    async def begin_behind(
        self, node_id: NodeId, events: Sequence[Event], known_to_client: int
    ) -> None:
        """Begin with what that node had said; the client has the first of these events already.

        Raises:
          InferenceError: the answer is not whole, and nobody goes on with it.
        """
        self.node_id = node_id
        for place, event in enumerate(events):
            if not isinstance(event, Finished):
                self._answer.take(event)
            if place >= known_to_client:
                self._known.append(event)
        if events and isinstance(events[-1], Finished):
            self._on_placed()
            return
        heard = Failed(ENTRY_LOST, "the node that the client talked to was lost", 503)
        if (failure := await self._go_on(heard)) is not None:
            raise InferenceError(with_tried(failure, self._tried))

    async def receive(self) -> Event:
        if self._known:
            return self._known.popleft()
        while True:
            event = await self._next()
            if self._is_loss(event):
                self._loss = None
                if (failure := await self._go_on(event)) is not None:
                    return with_tried(failure, self._tried)
                continue
            if (new := self._take(event)) is not None:
                return new

    def receive_nowait(self) -> Event:
        """Raises trio.WouldBlock also where the answer has to go on elsewhere first."""
        if self._known:
            return self._known.popleft()
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
                except (*LOSSES, trio.EndOfChannel) as error:
                    event = lost(self.node_id, error)
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
            isinstance(event, Failed)
            and self._may_do_elsewhere(event.code)
            and self._answer.mode != "off"
        )

    def _may_do_elsewhere(self, code: str) -> bool:
        return code in TRY_ELSEWHERE or (code in UNFIT and self._answer.begun)

    def _take(self, event: Event) -> Event | None:
        self.heard_at = trio.current_time()
        new = self._answer.take(event)
        if new is not None:
            self._barren = 0
            if self.skip:
                return self._skipped(new)
            if isinstance(new, Finished):
                self.output_tokens = new.eval_count
                self._on_end(new)
        return new

    def _skipped(self, event: Event) -> Event | None:
        """What is left of an event of which the client has the first `skip` tokens."""
        if isinstance(event, Chunk) and 0 < len(event.tokens) <= self.skip:
            self.skip -= len(event.tokens)
            return None
        return Failed(
            "RESUME_MISMATCH",
            "the answer was made again and has no part that ends where the client stands; "
            "ask again from token 0",
            409,
        )

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
        except (*LOSSES, trio.EndOfChannel) as error:
            return lost(self.node_id, error)

    async def _try(self, node_id: NodeId, choice: Choice) -> Failed | None:
        """Have that node answer, from where the answer is. Returns why it does not."""
        await self._attempt.aclose()
        self._attempt = attempt = AsyncExitStack()
        sending = attempt.enter_context(
            self._nodes.sending(node_id, self._model, self._prompt, choice.score.covered)
        )
        self._on_placed()
        self.node_id, self.heard_at = node_id, trio.current_time()
        request = self._answer.resume()
        try:
            self._events = await self._nodes.open(attempt, node_id, self._model, request)
            first = await self._events.receive()
        except (*LOSSES, trio.EndOfChannel) as error:
            first = lost(node_id, error)
        except InferenceError as error:
            first = error.failure
        if isinstance(first, Failed):
            log.info("%s on %s: %s", self._model.name, short(node_id), first.message)
            await attempt.aclose()
            return first
        sending.begun()
        self.has_begun = True
        self._first = first
        return None

    async def _go_on(self, failure: Failed) -> Failed | None:
        """Find a node for the rest of the answer. Returns the failure if there is none."""
        lost_at, lost_on = self.heard_at, self.node_id
        if failure.code != ENTRY_LOST:  # else the one that served has all of it in its cache
            self._leave_out(lost_on, failure)
        self._barren += 1
        if self._barren > MAX_BARREN_FAILURES:
            return given_up(failure)
        after_tokens, mode = self._answer.token_count, self._answer.mode
        give_up_at = trio.current_time() + WAIT_FOR_NODE_S
        while self._is_the_same_model():
            # The holders may have changed; those that failed this answer are left out.
            while (
                found := self._nodes.pick(self._model, self._prompt, (*self._lost, *self._unfit))
            ) is not None:
                node_id, choice = found
                refusal = await self._try(node_id, choice)
                if refusal is None:
                    self._moved(lost_on, failure, mode, after_tokens, lost_at)
                    return None
                if not self._may_do_elsewhere(refusal.code):
                    return refusal
                self._leave_out(node_id, refusal)
                if "retry_after" not in refusal.details:  # else it was not even started
                    self._barren += refusal.code in MAY_BE_THE_REQUEST
                if self._barren > MAX_BARREN_FAILURES:
                    return given_up(failure)
            if failure.code in UNFIT or trio.current_time() >= give_up_at:
                return failure
            await trio.sleep(WAIT_STEP_S)
            # Nobody else is there: a node that was lost may be back.
            self._lost.clear()
        return failure

    def _leave_out(self, node_id: NodeId, failure: Failed) -> None:
        (self._unfit if failure.code in UNFIT else self._lost).add(node_id)
        self._tried[node_id] = None

    def _is_the_same_model(self) -> bool:
        """Look the model up again (its holders may have changed); false: deleted or replaced."""
        model = newest_of(self._nodes, self._model)
        if model is None:
            return False
        self._model = model
        return True

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


def newest_of(nodes: Nodes, model: Model) -> Model | None:
    """The same model as the cluster knows it now; None if it was deleted or replaced."""
    newest = nodes.find_model(model.name)
    return newest if newest is not None and newest.digest == model.digest else None


def given_up(failure: Failed) -> Failed:
    """Why no other node is asked, though there may be some."""
    message = (
        f"{failure.message}; given up after {MAX_BARREN_FAILURES} failures in a row that added "
        "nothing, since it may be the request that causes them"
    )
    return msgspec.structs.replace(failure, message=message)


def with_tried(failure: Failed, tried: Iterable[str]) -> Failed:
    """The failure, with the nodes that failed before nobody was left."""
    return msgspec.structs.replace(failure, details={**failure.details, "nodes_tried": list(tried)})


def nobody(model: Model, failure: Failed | None, tried: Sequence[str]) -> Failed:
    """Why no node answers."""
    if failure is not None:
        return with_tried(failure, tried)
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
