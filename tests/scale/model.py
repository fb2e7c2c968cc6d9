"""Nodes of the scale model: the daemon's own code around an engine that only takes time.

What is real: `Router` with the prefix index, the fleet and the measured speeds; `FairQueue` and the
shares of the entry nodes; the gossip, the table of presences and phi-accrual; every beat is encoded
and decoded as on the wire.
What is modelled: the engine (`Engine`), from rates that were measured with the real one; the
network, which delivers each beat after a few milliseconds; and the clients.

Time is a heap of events, so a run is exact and repeats by its seed. The processor time of each
decision is measured while it runs; nothing else of this machine's speed gets into the figures.
"""

import heapq
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ollamad.core.admission import OUTPUT_WEIGHT, FairQueue, Ticket
from ollamad.core.gossip import RUMOUR_ID_CHARS, Gossip, rumour_of
from ollamad.core.ids import NodeId
from ollamad.core.inference import Chunk, Finished, GenerateRequest, LoadedModel, Message
from ollamad.core.prefix import Prompt
from ollamad.core.presence import BEAT_INTERVAL_S, Beat, Presence, PresenceTable, Usage
from ollamad.core.routing import Policy
from ollamad.core.shares import Ledger, may_begin
from ollamad.core.state import Capacity, ClusterState, Member, Model, ModelDetails
from ollamad.scheduler.router import Router, Sending, Serving
from ollamad.wire.codec import decode, encode

SLOTS = 4
NETWORK_S = 0.002
# Measured on two cores with the model of the tests (docs/benchmarks.md): tokens a second.
PREFILL_RATE = 290.0
DECODE_RATE = 154.0  # of four streams together
SPREAD = 4.0  # the fastest machine of the model is so many times as fast as the slowest
CONTEXT = 4096
KV_BYTES = 23_040  # a token of that model
NAME = "model:latest"
DIGEST = "sha256:" + "5ca1e" * 12 + "0000"


class Clock:
    """Virtual seconds, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until


@dataclass
class Question:
    """A turn of a conversation."""

    identity: str
    messages: tuple[Message, ...]
    output: int  # tokens
    asked_at: float = 0.0
    begun_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    evaluated: float = 0.0  # tokens of the prompt that no cache had
    prompt_tokens: float = 0.0
    node: int = -1
    on_end: Callable[["Question"], None] = lambda question: None

    def request(self) -> GenerateRequest:
        return GenerateRequest(NAME, messages=self.messages, digest=DIGEST)


@dataclass
class Job:
    """A question in an engine."""

    question: Question
    sending: Sending
    serving: Serving
    entry: "Node"
    ticket: Ticket
    lacking: float  # tokens to evaluate


class Engine:
    """Slots that share a prefill and a decode rate; a prompt is evaluated one at a time."""

    def __init__(self, clock: Clock, speed: float) -> None:
        self._clock = clock
        self.prefill = PREFILL_RATE * speed
        self.decode = DECODE_RATE * speed
        self.busy = 0
        self.waiting: deque[Job] = deque()
        self._prefill_free_at = 0.0
        self.busy_s = 0.0  # of all slots

    def submit(self, job: Job) -> None:
        if self.busy >= SLOTS:
            self.waiting.append(job)
        else:
            self._start(job)

    def _start(self, job: Job) -> None:
        self.busy += 1
        now = self._clock.now
        begun = max(now, self._prefill_free_at)
        first = begun + (job.lacking + 1) / self.prefill
        self._prefill_free_at = first
        # Four streams share the decode rate; one alone has two thirds of it (measured).
        rate = self.decode * (0.68 if self.busy == 1 else 1 / min(SLOTS, self.busy))
        end = first + job.question.output / rate
        self._clock.at(first, lambda: self._first(job))
        self._clock.at(end, lambda: self._end(job, end - now, first - now))

    def _first(self, job: Job) -> None:
        job.question.first_at = self._clock.now + NETWORK_S
        job.sending.begun()
        job.serving.take(Chunk(""))

    def _end(self, job: Job, held_s: float, first_s: float) -> None:
        question = job.question
        self.busy -= 1
        self.busy_s += held_s
        evaluated = job.lacking
        text = "a" * (4 * question.output)
        job.serving.take(Chunk(text))
        job.serving.take(
            Finished(
                "stop",
                prompt_eval_count=round(question.prompt_tokens),
                prompt_cached_count=round(question.prompt_tokens - evaluated),
                prompt_eval_duration=round(1e9 * (evaluated + 1) / self.prefill),
                eval_count=question.output,
                eval_duration=round(1e9 * (held_s - first_s)),
            )
        )
        question.ended_at = self._clock.now + NETWORK_S
        job.sending.__exit__(None, None, None)
        job.entry.ended(job, text)
        if self.waiting:
            self._start(self.waiting.popleft())


@dataclass
class Waiting:
    question: Question
    prompt: Prompt
    tokens: float


@dataclass
class Measured:
    """What a run found."""

    decisions_s: list[float] = field(default_factory=list)  # processor time of each
    bytes_sent: int = 0
    beats: int = 0
    asked: int = 0
    refused: int = 0
    done: list[Question] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)  # when, share of the slots
    queued: list[tuple[float, int]] = field(default_factory=list)
    staleness_s: list[float] = field(default_factory=list)  # how old beats are that decide


class Node:
    """A daemon: entry and server in one."""

    def __init__(self, world: "World", number: int, speed: float, policy: Policy) -> None:
        self.id = NodeId(f"Qm{number:04}{'x' * 40}")
        self.number = number
        self.world = world
        self.rng = random.Random(world.seed * 100_003 + number)
        self.engine = Engine(world.clock, speed)
        self.table = PresenceTable()
        self.gossip = Gossip(self.rng.shuffle)
        self.router = Router(
            self.id,
            state=lambda: world.state,
            presence=self.presence,
            version=lambda: world.version,
            pick=self.rng.randrange,
            now=lambda: world.clock.now,
            policy=policy,
            slots=SLOTS,
        )
        self.queue = FairQueue()
        self.ledger = Ledger(self.queue)
        self.running = 0  # requests that were sent and are not answered
        self.waiting: dict[Ticket, Waiting] = {}

    # Beats.

    def presence(self, node_id: NodeId) -> Presence:
        if node_id == self.id:
            return Presence(True, self.world.clock.now, self.beat())
        return self.table.of(node_id)

    def beat(self) -> Beat:
        engine = self.engine
        loaded = LoadedModel(NAME, DIGEST, 1 << 30, 0, CONTEXT, 0.0, SLOTS, engine.busy)
        loaded = msgspec.structs.replace(loaded, queued=len(engine.waiting))
        usage = Usage(cpu=engine.busy / SLOTS, memory_available=1 << 34)
        return Beat(
            self.world.clock.now,
            usage,
            (loaded,),
            speeds=self.router.speeds(),
            waiting=len(self.waiting),
            shares=self.ledger.told(),
        )

    def tell(self) -> None:
        """One round of beats."""
        world = self.world
        own = self.beat()
        own = msgspec.structs.replace(own, prefixes=self.router.news(own.loaded))
        peers = world.others[self.number]
        for node_id in self.gossip.next_round(peers):
            beat = msgspec.structs.replace(own, heard=self.gossip.pass_on(peers, node_id))
            data = encode(beat)
            world.measured.bytes_sent += len(data)
            world.measured.beats += 1
            peer = world.by_id[node_id]
            world.clock.at(world.clock.now + NETWORK_S, lambda p=peer, d=data: p.hear(self.id, d))
        self.pump(takes_rest=True)
        world.clock.at(world.clock.now + BEAT_INTERVAL_S, self.tell)

    def hear(self, peer: NodeId, data: bytes) -> None:
        now = self.world.clock.now
        beat = decode(data, Beat)
        heard, beat = beat.heard, msgspec.structs.replace(beat, heard=())
        if self.table.hear(peer, beat, now, now):
            self.router.hear(peer, beat)
        self.gossip.hear(rumour_of(peer, beat))
        self.router.hear(peer, beat)
        self.ledger.hear(peer, beat.shares)
        for rumour in heard:
            node = self.world.by_prefix.get(rumour.node)
            if node is None or node is self:
                continue
            if self.table.hear_of(node.id, rumour, now, now) is not None:
                self.gossip.hear(rumour)
                told = self.table.of(node.id).beat
                self.router.hear(node.id, told)
                self.ledger.hear(node.id, told.shares)

    # Requests.

    def ask(self, question: Question) -> None:
        world = self.world
        world.measured.asked += 1
        question.asked_at = world.clock.now
        model = world.model
        request = question.request()
        prompt = self.router.prompt(request, model)
        tokens = self.router.tokens(prompt, model)
        question.prompt_tokens = prompt.size / 4.0
        cost = self.queue.expected_cost(question.identity, tokens, None)
        ticket = Ticket(question.identity, DIGEST, cost)
        self.ledger.begin(question.identity, DIGEST)
        if not self.waiting and self._has_room():
            self.queue.start(ticket)
            self._send(ticket, Waiting(question, prompt, tokens))
            return
        elsewhere = sum(self.table.of(n).beat.waiting for n in world.others[self.number])
        if len(self.waiting) + elsewhere >= world.max_queue:
            world.measured.refused += 1
            self.ledger.end(question.identity, DIGEST)
            question.on_end(question)
            return
        self.queue.enter(ticket, world.clock.now)
        self.waiting[ticket] = Waiting(question, prompt, tokens)

    def pump(self, *, takes_rest: bool = False) -> None:
        while self.waiting:
            ticket = self.queue.next(
                self.world.clock.now, lambda _: self._has_room(takes_rest=takes_rest)
            )
            if ticket is None:
                return
            self._send(ticket, self.waiting.pop(ticket))

    def _has_room(self, *, takes_rest: bool = False) -> bool:
        room, slots, _ = self.router.room(self.world.model)
        part = self.ledger.part(DIGEST)
        return may_begin(room, slots, self.running, part, takes_rest=takes_rest)

    def _send(self, ticket: Ticket, waiting: Waiting) -> None:
        world = self.world
        self.running += 1
        question, model = waiting.question, world.model
        begun = time.thread_time()
        choice = self.router.choose(model, waiting.prompt)
        world.measured.decisions_s.append(time.thread_time() - begun)
        assert choice is not None
        node_id = self.router.node(choice)
        node = world.by_id[node_id]
        sent_at = world.clock.now
        if node is not self:
            world.measured.staleness_s.append(sent_at - self.table.of(node_id).beat.sent_at)
        question.begun_at = sent_at
        question.node = node.number
        sending = self.router.sending(node_id, model, waiting.prompt, choice.score.covered)
        sending.__enter__()
        world.clock.at(
            sent_at + NETWORK_S,
            lambda: node.serve(Waiting(question, waiting.prompt, 0), sending, self, ticket),
        )

    def serve(self, waiting: Waiting, sending: Sending, entry: "Node", ticket: Ticket) -> None:
        model, question = self.world.model, waiting.question
        part = self.router.lacks(model, waiting.prompt) / self.router.tokens(waiting.prompt, model)
        serving = self.router.serving(model, question.request())
        serving.__enter__()
        lacking = question.prompt_tokens * part
        question.evaluated = lacking
        self.engine.submit(Job(question, sending, serving, entry, ticket, lacking))

    def ended(self, job: Job, text: str) -> None:
        question = job.question
        self.running -= 1
        self.ledger.end(question.identity, DIGEST)
        self.queue.settle(
            job.ticket, question.prompt_tokens + OUTPUT_WEIGHT * question.output, question.output
        )
        self.world.measured.done.append(question)
        question.messages = (*question.messages, Message("assistant", text))
        self.pump()
        question.on_end(question)


class World:
    """A cluster that holds one model on every node."""

    def __init__(
        self, count: int, seed: int = 1, policy: Policy = "prefix", max_queue: int = 1 << 30
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.measured = Measured()
        self.max_queue = max_queue
        self.version = object()
        speeds = [SPREAD ** self.rng.uniform(-0.5, 0.5) for _ in range(count)]
        self.nodes = [Node(self, number, speed, policy) for number, speed in enumerate(speeds)]
        self.by_id = {node.id: node for node in self.nodes}
        self.by_prefix = {node.id[:RUMOUR_ID_CHARS]: node for node in self.nodes}
        ids = [node.id for node in self.nodes]
        self.others = [[i for i in ids if i != node.id] for node in self.nodes]
        self.model = Model(
            NAME,
            DIGEST,
            b"{}",
            ModelDetails(kv_bytes_per_token=KV_BYTES),
            (),
            0.0,
            confirmed=tuple(sorted(ids)),
        )
        capacity = Capacity(cpu_cores=2, memory_bytes=1 << 34, disk_bytes=1 << 38)
        self.state = ClusterState(
            cluster_id="scale",
            members={
                node.id: Member(node.id, f"n{node.number}", "", "", "", capacity, 0.0)
                for node in self.nodes
            },
            models={NAME: self.model},
        )
        for node in self.nodes:
            self.clock.at(self.rng.random() * BEAT_INTERVAL_S, node.tell)
        self.clock.at(1.0, self._sample)

    def _sample(self) -> None:
        slots = SLOTS * len(self.nodes)
        busy = sum(node.engine.busy for node in self.nodes)
        queued = sum(len(node.waiting) + len(node.engine.waiting) for node in self.nodes)
        self.measured.busy.append((self.clock.now, busy / slots))
        self.measured.queued.append((self.clock.now, queued))
        self.clock.at(self.clock.now + 1.0, self._sample)

    def know_each_other(self) -> None:
        """Let beats go round until everybody has heard of all, as after a while in real life."""
        while any(
            not all(node.table.of(n).online for n in self.others[node.number])
            for node in self.nodes
        ):
            self.clock.run(self.clock.now + 1.0)
        self.version = object()

    def served_by(self) -> Counter[int]:
        return Counter(question.node for question in self.measured.done)
