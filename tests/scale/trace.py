"""What the scale model is asked: conversations of many people with a few programs, in bursts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ollamad.core.inference import Message
from tests.scale.model import Node, Question, World

PROGRAMS = 20  # each with a system prompt of its own
SYSTEM_BYTES = (1200, 6000)
TURNS = 6  # of a conversation, on average
THINK_S = 4.0  # between the turns, on average
QUESTION_BYTES = (80, 400)
OUTPUT_TOKENS = 64  # on average
PEOPLE = 40  # some of whom ask far more than others
# Conversations that begin, a second and node: base load, and bursts of BURST_S every PERIOD_S.
BASE, BURST = 0.3, 0.9
PERIOD_S, BURST_S = 6.0, 2.0
WORDS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Conversation:
    """One person and one program; the next turn comes when the last one was answered."""

    world: World
    rng: random.Random
    entry: Node
    identity: str
    turns: int

    def go_on(self, question: Question) -> None:
        self.turns -= 1
        if self.turns > 0:
            clock = self.world.clock
            when = clock.now + self.rng.expovariate(1 / THINK_S)
            clock.at(when, lambda: self.ask(question.messages))

    def ask(self, before: tuple[Message, ...]) -> None:
        text = _text(self.rng, self.rng.randint(*QUESTION_BYTES))
        output = max(4, min(400, round(self.rng.expovariate(1 / OUTPUT_TOKENS))))
        messages = (*before, Message("user", text))
        self.entry.ask(Question(self.identity, messages, output, on_end=self.go_on))


def play(world: World, seconds: float) -> None:
    """Conversations that begin within the next seconds; run the clock for them to happen."""
    rng = random.Random(world.seed + 17)
    systems = [Message("system", _text(rng, rng.randint(*SYSTEM_BYTES))) for _ in range(PROGRAMS)]
    for when in _arrivals(rng, len(world.nodes), seconds):
        system = systems[min(PROGRAMS - 1, int(rng.paretovariate(1.0)) - 1)]
        person = f"person-{min(PEOPLE - 1, int(rng.paretovariate(0.7)) - 1)}"
        conversation = Conversation(
            world,
            random.Random(rng.getrandbits(32)),
            rng.choice(world.nodes),
            person,
            1 + int(rng.expovariate(1 / (TURNS - 1))),
        )
        world.clock.at(world.clock.now + when, lambda c=conversation, s=system: c.ask((s,)))


def _arrivals(rng: random.Random, nodes: int, seconds: float) -> Iterator[float]:
    """A Poisson process whose rate jumps."""
    now = 0.0
    most = BURST * nodes
    while True:
        now += rng.expovariate(most)
        if now > seconds:
            return
        rate = BURST if now % PERIOD_S > PERIOD_S - BURST_S else BASE
        if rng.random() * BURST < rate:
            yield now


def _text(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(WORDS, k=size))
