"""A decision of routing among a thousand nodes: its processor time, by policy, and what feeds it.

    python -m tests.bench.bench_decisions

The nodes differ in speed and load; half of them have a common system prompt in their caches, two
the whole conversation. First the pure rule, then what a daemon does for a request, with all that it
looks at; it is put together as ever and does not run. Measured is this machine's Python.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio
import trio.testing

from ollamad.core.admission import Asker
from ollamad.core.ids import NodeId
from ollamad.core.inference import GenerateRequest, LoadedModel, Message, Options
from ollamad.core.prefix import PrefixIndex, Prompt, prompt_of
from ollamad.core.presence import Beat, Usage
from ollamad.core.routing import POLICIES, Fleet, Load
from ollamad.core.speeds import Speed, short_digest
from ollamad.core.state import Model
from ollamad.daemon import Daemon
from ollamad.datadir import DataDir
from ollamad.engine.pool import Resident, _key
from ollamad.engine.spec import ModelSpec, runner_config
from ollamad.scheduler.dispatch import USUAL_MAX_WAITING
from tests.fakes.api_services import member, model
from tests.fakes.built_daemon import built_daemon

NODES = 1000
PROMPTS = 300
POKES = 300
IDENTITIES = 20  # who waits
GOAL_US = 100.0


def load(rng: random.Random) -> Load:
    speed = rng.choice([100, 300, 320, 1000, 5000]) * rng.uniform(0.8, 1.2)
    return Load(
        slots=4,
        in_use=rng.randrange(8),
        pending=3000 * rng.random(),
        prefill=speed,
        service_s=5 * rng.random(),
    )


def timed(what: str, actions: list[Callable[[], object]], goal: float | None = None) -> bool:
    """Print how long each took; whether the goal was reached."""
    times = []
    for action in actions:
        begun = time.thread_time()
        action()
        times.append(1e6 * (time.thread_time() - begun))
    times.sort()
    middle = statistics.median(times)
    shown = f"{goal:.0f}" if goal else ""
    print(f"{what:<40}{middle:>8.1f}{times[int(0.99 * len(times))]:>8.1f}{shown:>8}")
    return goal is None or middle <= goal


class EntryNode:
    """A daemon that has the model in memory, and knows of all the others."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self.daemon = daemon
        self.dispatcher = daemon._dispatcher
        self.rng = rng
        self.others = [NodeId(f"Qm{number:044}") for number in range(NODES - 1)]
        here = daemon._identity.node_id
        state = daemon._machine.state
        for node_id in (here, *self.others):
            state.members[node_id] = member(node_id, node_id[-8:])
        self.model: Model = model(confirmed=tuple(state.members))
        state.models[self.model.name] = self.model

    async def load_model(self) -> Resident:
        """Have it in memory here, as far as anybody asks."""
        pool, held = self.daemon._engine._pool, self.model
        spec = ModelSpec(held.name, held.digest, "model", held.size, held.details)
        config = runner_config(spec, Options(), pool._settings)
        resident = await pool._planned(spec, config, None)
        pool._residents[_key(spec, config)] = resident
        return resident

    def hear_all(self, busy: Callable[[], int]) -> None:
        """A beat of every other node; `busy` are the requests there."""
        short = short_digest(self.model.digest)
        for node_id in self.others:
            like = load(self.rng)
            taken = busy()
            loaded = LoadedModel(self.model.name, self.model.digest, 1 << 30, 0, 4096, 0.0, 4)
            beat = Beat(
                time.time(),
                Usage(memory_available=1 << 34),
                (msgspec.structs.replace(loaded, busy=min(4, taken), queued=max(0, taken - 4)),),
                speeds=(Speed(short, round(like.pending), like.prefill, 30.0, like.service_s),),
            )
            self.daemon._cluster.heartbeats._table.hear(
                node_id, beat, trio.current_time(), time.time()
            )
            self.dispatcher.hear(node_id, beat)

    def decide(self, request: GenerateRequest) -> None:
        """All that is decided for a request that finds room."""
        router = self.dispatcher.router
        prompt = router.prompt(request, self.model)
        assert self.dispatcher.admission._has_room(self.model)
        found = self.dispatcher.pick(self.model, prompt, ())
        assert found is not None
        with router.sending(found[0], self.model, prompt, found[1].score.covered) as sending:
            sending.begun()

    async def wait(self, number: int) -> None:
        """A request that finds no room."""
        asker = Asker(str(number % IDENTITIES))
        async with self.dispatcher.admission.admitted(self.model, asker, 1000.0, None):
            raise AssertionError("there is room")


async def time_daemon(
    rng: random.Random, requests: list[GenerateRequest], system: GenerateRequest
) -> bool:
    """Print what a daemon takes; whether the goals were reached."""
    with tempfile.TemporaryDirectory() as folder, DataDir(Path(folder)) as directory:
        async with built_daemon(directory) as daemon, trio.open_nursery() as nursery:
            node = EntryNode(daemon, rng)
            resident = await node.load_model()
            node.hear_all(lambda: rng.randrange(8))
            router = node.dispatcher.router
            prompts = [router.prompt(request, node.model) for request in requests]
            shared = router.prompt(system, node.model)
            for node_id in node.others[::2]:
                router.holds(node_id, shared)
            for prompt in prompts:
                for node_id in rng.sample(node.others, 2):
                    router.holds(node_id, prompt)
            pick = node.dispatcher.pick
            picks = [lambda p=prompt: pick(node.model, p, ()) for prompt in prompts]
            reached = timed("a daemon: decide", picks, GOAL_US)
            timed(
                "the same, hashed, admitted, counted",
                [lambda r=r: node.decide(r) for r in requests],
            )
            timed("its own load", [daemon._load] * PROMPTS)
            timed("its own beat", [daemon._beat] * PROMPTS)
            node.hear_all(lambda: 5)
            resident.busy, resident.queued = resident.config.parallel, 1
            for number in range(USUAL_MAX_WAITING):
                nursery.start_soon(node.wait, number)
            await trio.testing.wait_all_tasks_blocked()
            control = node.dispatcher.admission
            assert control.waiting == USUAL_MAX_WAITING
            reached &= timed(f"poke, {control.waiting} wait", [control.poke] * POKES, GOAL_US)
            nursery.cancel_scope.cancel()
    return reached


def main() -> int:
    rng = random.Random(1)
    index = PrefixIndex()
    fleet = Fleet(index, here=0)
    loads = [load(rng) for _ in range(NODES)]
    for number, known in enumerate(loads):
        fleet.put(number, known)
    system = Message("system", "s" * 4000)
    requests = [
        GenerateRequest("m", messages=(system, Message("user", f"{number:06}" * 500)))
        for number in range(PROMPTS)
    ]
    shared = prompt_of(GenerateRequest("m", messages=(system,)), "d").blocks
    prompts: list[Prompt] = [prompt_of(request, "d") for request in requests]
    for number in range(0, NODES, 2):
        index.tell(number, shared[: rng.randrange(len(shared))], 0.0)
    for prompt in prompts:
        for number in rng.sample(range(NODES), 2):
            index.tell(number, prompt.blocks, 0.0)
    print(f"{NODES} nodes, {len(index)} blocks{'':<18}{'p50 us':>12}{'p99 us':>8}{'goal':>8}")
    reached = True
    for policy in POLICIES:
        choose = [
            lambda p=prompt, y=policy: fleet.choose(p, p.size / 4, y, rng.randrange)
            for prompt in prompts
        ]
        reached &= timed(f"decide, {policy}", choose, GOAL_US)
    timed("hash a prompt of 7 kB", [lambda r=r: prompt_of(r, "d") for r in requests])
    timed("note a beat", [lambda n=n: fleet.put(n % NODES, load(rng)) for n in range(1000)])
    table = [lambda p=prompt: fleet.table(p, p.size / 4) for prompt in prompts[:50]]
    timed("the whole table of scores", table)
    asks_system = GenerateRequest("m", messages=(system,))
    reached &= trio.run(time_daemon, rng, requests, asks_system)
    return not reached


if __name__ == "__main__":
    sys.exit(main())
