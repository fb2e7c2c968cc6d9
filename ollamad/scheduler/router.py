"""What this node knows of every node's load, speed and cache, kept up to date; asks `core.routing`.

Knowledge comes from three sides: the replicated state says who holds a model, beats tell how busy
and how fast the others are and which prompts they have in their caches, and what this node has
sent itself since is added, because beats are a second old. Nothing here waits for anything.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import msgspec

from ollamad.core.explanation import Explanation, NodeScore
from ollamad.core.ids import NodeId
from ollamad.core.inference import Chunk, Event, Finished, GenerateRequest, LoadedModel
from ollamad.core.prefix import (
    Numbers,
    PrefixCache,
    PrefixIndex,
    PrefixNews,
    Prompt,
    prompt_after,
    prompt_of,
)
from ollamad.core.presence import Beat, Presence
from ollamad.core.routing import STICKY_BOUND_S, Choice, Fleet, Load, Pick, Policy, Score
from ollamad.core.speeds import (
    BYTES_PER_TOKEN,
    LOAD_BYTES_PER_S,
    LOAD_OVERHEAD_S,
    PREFILL_RATE,
    SERVICE_S,
    Speed,
    Speedometer,
    believable,
    short_digest,
)
from ollamad.core.state import ClusterState, Model

USUAL_CONTEXT = 4096  # tokens, where a request does not say: for whether a model fits
LOADED_MARGIN = 64 << 20  # bytes a runner takes beside weights and cache
USUAL_KV_BYTES = 32 << 10  # a token, for files that do not tell
NEWS_INTERVAL_S = 0.5  # beats go to each peer by itself; all of one round tell the same


@dataclass(slots=True)
class _Sent:
    """What this node has sent to another one for a model and is not answered yet."""

    requests: int = 0
    tokens: float = 0.0  # of prompts, that are not evaluated yet
    beat: float = -1.0  # the beat that was the last then, and what of the above it knew
    requests_then: int = 0
    tokens_then: float = 0.0


@dataclass(slots=True)
class _Known:
    """The nodes that hold a model, as of some version of the state."""

    model: Model
    fleet: Fleet
    version: object = None


class Router:
    """Decides for this entry node, and measures what this node serves.

    Args:
      presence: what is known of a node. This node is looked at for every request and has no news
        for itself, so its own beat need not tell speeds or caches.
      version: gives another object whenever state or presence changed.
      pick: a random number below its argument.
      now: a monotonic clock.
      cache_bytes: that a runner has for prompts beside its slots.
    """

    def __init__(
        self,
        node_id: NodeId,
        *,
        state: Callable[[], ClusterState],
        presence: Callable[[NodeId], Presence],
        version: Callable[[], object],
        pick: Pick,
        now: Callable[[], float],
        policy: Policy = "prefix",
        bound_s: float = STICKY_BOUND_S,
        slots: int = 4,
        cache_bytes: int = 128 << 20,
    ) -> None:
        self.node_id = node_id
        self.policy: Policy = policy
        self.prompt_tokens = 0  # of all answers that came in here
        self.cached_tokens = 0  # of them, that needed no evaluation
        self._state = state
        self._presence = presence
        self._version = version
        self._pick = pick
        self._now = now
        self._bound_s = bound_s
        self._slots = slots
        self._cache_bytes = cache_bytes
        self._numbers = Numbers()
        self._here = self._numbers.number(node_id)
        self._index = PrefixIndex()
        self._known: dict[str, _Known] = {}  # by digest
        self._sent: dict[tuple[NodeId, str], _Sent] = {}
        self._typical: dict[str, Speed] = {}  # by short digest: what some node has measured
        self._cache = PrefixCache()
        self._speeds = Speedometer()
        self._pending: dict[str, float] = {}  # by digest, of what this node serves
        self._news = PrefixNews()
        self._news_at = -NEWS_INTERVAL_S

    # Deciding.

    def prompt(self, request: GenerateRequest, model: Model) -> Prompt:
        """What routing looks at of a request."""
        return prompt_of(request, model.digest)

    def tokens(self, prompt: Prompt, model: Model) -> float:
        """About how many tokens a prompt has."""
        speed = self._speed_of(model.digest, self._speeds.speed(model.digest))
        return prompt.size / (speed.bytes_per_token or BYTES_PER_TOKEN)

    def choose(
        self, model: Model, prompt: Prompt, *, without: Sequence[NodeId] = ()
    ) -> Choice | None:
        """The node for a request; None if there is none but those that it must not be."""
        known = self._look_at(model)
        excluded = 0
        for node_id in without:
            excluded |= 1 << self._numbers.of.get(node_id, len(self._numbers.nodes))
        return known.fleet.choose(
            prompt,
            self.tokens(prompt, model),
            self.policy,
            self._pick,
            bound_s=self._bound_s,
            without=excluded,
        )

    def node(self, choice: Choice) -> NodeId:
        """Who was chosen."""
        node_id = self._numbers.nodes[choice.number]
        assert node_id is not None, "a fleet has members only"
        return node_id

    def explain(
        self, model: Model, prompt: Prompt, choice: Choice | None = None, *, best: int | None = None
    ) -> Explanation:
        """The table of scores as it is now; `choice` is a decision that was made just before."""
        known = self._look_at(model)
        tokens = self.tokens(prompt, model)
        if choice is None:
            choice = known.fleet.choose(
                prompt, tokens, self.policy, self._pick, bound_s=self._bound_s, looks=True
            )
        members = self._state().members
        scores = []
        for score in known.fleet.table(prompt, tokens, best=best):
            node_id = self._numbers.nodes[score.number]
            if node_id is not None and node_id in members:
                chosen = choice is not None and choice.number == score.number
                scores.append(_shown(score, node_id, members[node_id].name, chosen))
        return Explanation(
            policy=self.policy,
            why=choice.why if choice is not None else "no node that holds the model is willing",
            prompt_tokens=round(tokens),
            chosen=self.node(choice) if choice is not None else "",
            scores=tuple(scores),
        )

    def room(self, model: Model) -> tuple[int, int, float]:
        """Requests that the holders of a model have room for, their slots, seconds a request.

        Room without bound if no holder is able: then there is nothing to wait for.
        """
        fleet = self._look_at(model).fleet
        if not fleet.slots:
            return 1 << 30, 1, fleet.service_s
        return fleet.room, fleet.slots, fleet.service_s

    # What is sent.

    def sending(
        self, node_id: NodeId, model: Model, prompt: Prompt | None, covered: float = 0.0
    ) -> "Sending":
        """Counts a request that is sent to a node while its context is open."""
        tokens = self.tokens(prompt, model) * (1 - covered) if prompt is not None else 0.0
        return Sending(self, node_id, model, prompt, tokens)

    def answered(self, end: Finished) -> None:
        """An answer to a client of this node has ended."""
        self.prompt_tokens += end.prompt_eval_count
        self.cached_tokens += end.prompt_cached_count

    def change(self, node_id: NodeId, model: Model, requests: int, tokens: float) -> None:
        """Add to what is on its way to a node, or take away."""
        sent = self._sent.setdefault((node_id, model.digest), _Sent())
        sent.requests += requests
        sent.tokens = max(0.0, sent.tokens + tokens)
        known = self._known.get(model.digest)
        number = self._numbers.of.get(node_id)
        is_member = node_id in self._state().members  # else it has left with a request open
        if known is not None and is_member and number in known.fleet.loads:
            assert number is not None
            known.fleet.put(number, self._load(node_id, known.model))
        if not sent.requests:
            del self._sent[node_id, model.digest]

    def holds(self, node_id: NodeId, prompt: Prompt) -> None:
        """That node has evaluated such a prompt just now."""
        # The first blocks last, so that of what is forgotten they go last.
        self._index.tell(self._numbers.number(node_id), reversed(prompt.blocks), self._now())

    # What others tell.

    def hear(self, node_id: NodeId, beat: Beat) -> None:
        """A beat of another node has come."""
        if node_id not in self._state().members:
            return  # it has left, and says goodbye
        number = self._numbers.number(node_id)
        self._index.hear(number, beat.prefixes, self._now())
        for known in self._known.values():
            if number in known.fleet.loads:
                known.fleet.put(number, self._load(node_id, known.model))

    # What this node serves.

    def serving(self, model: Model, request: GenerateRequest) -> "Serving":
        """Measures a request that this node's engine answers."""
        return Serving(self, model, request)

    def began(self, model: Model, prompt: Prompt) -> None:
        """A prompt of a request that this node serves is in the cache of a runner."""
        per_token = model.details.kv_bytes_per_token or USUAL_KV_BYTES
        self._cache.hold(
            model.digest,
            prompt,
            self.tokens(prompt, model),
            slots=self._slots,
            room=self._cache_bytes / per_token,
            now=self._now(),
        )
        self.holds(self.node_id, prompt)

    def pend(self, model: Model, tokens: float) -> None:
        """Add to the tokens of prompts that wait for evaluation here, or take away."""
        left = self._pending.get(model.digest, 0.0) + tokens
        if left > 0.5:
            self._pending[model.digest] = left
        else:
            self._pending.pop(model.digest, None)

    def lacks(self, model: Model, prompt: Prompt) -> float:
        """Tokens of a prompt that this node would have to evaluate."""
        return self.tokens(prompt, model) * (1 - self._cache.covered(model.digest, prompt))

    def measure(self, model: Model, end: Finished, prompt: Prompt) -> None:
        """Learn from an answer of this node."""
        self._speeds.measure(model.digest, end, prompt.size)

    def speeds(self) -> tuple[Speed, ...]:
        """What a beat of this node tells of its speeds."""
        return self._speeds.told(self._pending.items())

    def news(self, loaded: Sequence[LoadedModel]) -> PrefixNews:
        """What a beat of this node tells of its caches; the same for all beats of a round."""
        now = self._now()
        if now - self._news_at >= NEWS_INTERVAL_S:
            if self._cache.keep_only(one.digest for one in loaded):
                self._index.forget(self._here)
                self._index.tell(self._here, self._cache.blocks(), now)
            self._news, self._news_at = self._cache.news(now), now
            # What it holds beside others' is bounded like theirs.
            self._index.hear(self._here, self._news, now)
        return self._news

    # Inside.

    def _look_at(self, model: Model) -> _Known:
        """The model's nodes as they are now, however old what the caller knows of it is."""
        version = self._version()
        known = self._known.get(model.digest)
        if known is None:
            self._forget_models()
            known = self._known[model.digest] = _Known(model, Fleet(self._index, self._here))
        elif known.version is version and known.model.name == model.name:
            if self._here in known.fleet.loads:  # nobody beats to itself
                known.fleet.put(self._here, self._load(self.node_id, known.model))
            return known
        # Who waited, or moves for the second time, may know holders of long ago.
        newest = self._state().find_model(model.name)
        if newest is not None and newest.digest == model.digest:
            model = newest
        known.model, known.version = model, version
        members = self._state().members
        wanted = {self._numbers.number(n): n for n in model.confirmed if n in members}
        for number in known.fleet.loads.keys() - wanted.keys():
            known.fleet.remove(number)
        for number, node_id in wanted.items():
            known.fleet.put(number, self._load(node_id, model))
        return known

    def _forget_models(self) -> None:
        """Forget models and nodes that are no part of the cluster any more."""
        state = self._state()
        digests = {model.digest for model in state.models.values()}
        for digest in self._known.keys() - digests:
            del self._known[digest]
        for node_id in self._numbers.of.keys() - state.members.keys() - {self.node_id}:
            number = self._numbers.of[node_id]
            self._index.forget(number)
            for known in self._known.values():
                known.fleet.remove(number)
            self._numbers.drop(node_id)

    def _load(self, node_id: NodeId, model: Model) -> Load:
        member = self._state().members[node_id]
        presence = self._presence(node_id)
        beat = presence.beat
        short = short_digest(model.digest)
        loaded = next((one for one in beat.loaded if short_digest(one.digest) == short), None)
        speed: Speed | None = self._own_speed(model.digest)
        if node_id != self.node_id:
            speed = next((one for one in beat.speeds if one.model == short), None)
        if speed is not None:
            speed = believable(speed)
            if speed.prefill:
                self._typical[short] = speed
        speed = self._speed_of(model.digest, speed)
        told = loaded.busy + loaded.queued if loaded is not None else 0
        requests, tokens = told, float(speed.pending)
        sent = self._sent.get((node_id, model.digest))
        if sent is not None:
            if sent.beat != beat.sent_at:
                sent.beat = beat.sent_at
                sent.requests_then, sent.tokens_then = sent.requests, sent.tokens
            if node_id != self.node_id:  # else the engine has counted them already
                requests = sent.requests + max(0, told - sent.requests_then)
                tokens = sent.tokens + max(0.0, tokens - sent.tokens_then)
            else:
                requests = max(told, sent.requests)
                tokens = max(tokens, sent.tokens)
        fits, evicts = (True, False) if loaded is not None else _room_for(model, beat)
        return Load(
            willing=presence.online and not member.draining,
            why_not="offline" if not presence.online else "draining" if member.draining else "",
            loaded=loaded is not None,
            loading=loaded is None and requests > 0,
            fits=fits,
            evicts=evicts,
            slots=max(1, loaded.slots) if loaded is not None else self._slots,
            in_use=max(0, requests),
            pending=tokens,
            prefill=speed.prefill or PREFILL_RATE,
            service_s=speed.service_s or SERVICE_S,
            load_s=speed.load_s or model.size / LOAD_BYTES_PER_S + LOAD_OVERHEAD_S,
        )

    def _own_speed(self, digest: str) -> Speed:
        pending = round(self._pending.get(digest, 0.0))
        return msgspec.structs.replace(self._speeds.speed(digest), pending=pending)

    def _speed_of(self, digest: str, speed: Speed | None) -> Speed:
        """What a node has measured, and where it has not, what another one has."""
        typical = self._typical.get(short_digest(digest))
        if speed is None:
            return msgspec.structs.replace(typical, pending=0) if typical else Speed("")
        if speed.prefill or typical is None:
            return speed
        return msgspec.structs.replace(typical, pending=speed.pending)


class Sending(AbstractContextManager["Sending"]):
    """One request that is with a node, counted there until it ends."""

    def __init__(
        self, router: Router, node_id: NodeId, model: Model, prompt: Prompt | None, tokens: float
    ) -> None:
        self._router = router
        self._node_id = node_id
        self._model = model
        self._prompt = prompt
        self._tokens = tokens

    def __enter__(self) -> "Sending":
        self._router.change(self._node_id, self._model, 1, self._tokens)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._router.change(self._node_id, self._model, -1, -self._tokens)

    def begun(self) -> None:
        """The first token is here, so its prompt was evaluated."""
        self._router.change(self._node_id, self._model, 0, -self._tokens)
        self._tokens = 0.0
        if self._prompt is not None:
            self._router.holds(self._node_id, self._prompt)


class Serving(AbstractContextManager["Serving"]):
    """One request that this node serves: what waits, what was held, how fast it was."""

    def __init__(self, router: Router, model: Model, request: GenerateRequest) -> None:
        self._router = router
        self._model = model
        self._request = request
        self._prompt = router.prompt(request, model)
        self._pending = router.lacks(model, self._prompt)
        self._text: list[str] = []
        self._begun = False

    def __enter__(self) -> "Serving":
        self._router.pend(self._model, self._pending)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._begun:
            self._router.pend(self._model, -self._pending)

    def take(self, event: Event) -> None:
        """Note an event of the answer."""
        if not self._begun:
            self._begun = True
            self._router.pend(self._model, -self._pending)
            if self._request.generates:
                self._router.began(self._model, self._prompt)
        if isinstance(event, Chunk):
            self._text.append(event.text)
        elif isinstance(event, Finished) and self._request.generates:
            if not self._request.resume:
                self._router.measure(self._model, event, self._prompt)
            self._router.began(
                self._model,
                prompt_after(self._request, self._model.digest, self._text, event.context),
            )


def _room_for(model: Model, beat: Beat) -> tuple[bool, bool]:
    """Whether a model fits there beside those that serve somebody, and if an idle one must leave.

    Weights may lie on GPUs or not, in any parts, so both memories count as one.
    """
    needed = model.size + USUAL_CONTEXT * model.details.kv_bytes_per_token + LOADED_MARGIN
    free = beat.usage.memory_available + beat.vram_free
    idle = [one.size for one in beat.loaded if not one.busy and not one.queued]
    has_place = beat.places is None or beat.places > 0
    fits = free + sum(idle) >= needed and (has_place or len(idle) > 0)
    return fits, fits and not (has_place and free >= needed)


def _shown(score: Score, node_id: NodeId, name: str, chosen: bool) -> NodeScore:
    load = score.load
    return NodeScore(
        node_id=node_id,
        node=name,
        chosen=chosen,
        willing=load.willing,
        why_not=load.why_not,
        loaded=load.loaded,
        fits=load.fits,
        slots=load.slots,
        in_use=load.in_use,
        pending_tokens=round(load.pending),
        cached=round(score.covered, 4),
        uncached_tokens=round(score.uncached),
        prefill_rate=round(load.prefill, 1),
        queue_s=round(load.queue_s, 3),
        load_s=0.0 if load.loaded else round(load.load_s, 3),
        time_to_first_token_s=round(score.ttft_s, 4),
    )
