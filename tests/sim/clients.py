"""Clients that write, delete, claim and read through random hosts, and what they were told.

A client tries again, with the same command id and through another host, until it knows the
outcome or its patience ends. So a command that was applied twice, or that was lost after its
acknowledgement, shows in the history.
"""

import trio

from ollamad.core.commands import (
    AnyCommand,
    DeleteUser,
    Proposal,
    PutUser,
    Rejected,
    Revoke,
)
from ollamad.core.state import User
from ollamad.machine import decode_outcome
from ollamad.raft import NoQuorum, RaftError
from ollamad.wire.codec import encode
from tests.sim.cluster import PROGRESS_BOUND_S, Cluster, Host
from tests.sim.history import History, Kind
from tests.sim.process import Gone, Life

ATTEMPT_S = (0.3, 2.0)  # patience with one host, at random between these
PAUSE_S = (0.001, 0.03)  # before an attempt
PATIENCE_S = 4.0  # with one operation
KEYS = 3  # registers: few, so that clients meet
CLAIMS = 4  # test-and-set objects in use at a time


class Client:
    """One client; makes one operation at a time."""

    def __init__(
        self,
        cluster: Cluster,
        history: History,
        hosts: list[Host],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.cluster = cluster
        self.history = history
        self.number = next(cluster.client_numbers)
        self.name = f"client {self.number}"
        self.hosts = hosts
        self.patience_s = patience_s
        self.rng = cluster.world.rng(self.name)
        self.made = 0
        self.acknowledged: list[str] = []  # ids of commands

    async def run(self, until_s: float) -> None:
        """Make operations until that time."""
        world, rng = self.cluster.world, self.rng
        while world.now < until_s:
            await trio.sleep(rng.expovariate(1 / self.cluster.scenario.think_s))
            kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
            # New flags come into use as time goes on.
            flag = f"r{int(world.now) // 5}.{rng.randrange(CLAIMS)}"
            await self.operate(kind, flag if kind is Kind.CLAIM else f"u{rng.randrange(KEYS)}")

    async def operate(self, kind: Kind, key: str) -> bool:
        """One operation, with all its attempts. Returns whether its outcome is known."""
        self.made += 1
        world, checker, counts = self.cluster.world, self.cluster.checker, self.cluster.counts
        rng = self.rng
        proposal_id = f"{self.number}.{self.made}"
        command = _command(kind, key, proposal_id)
        operation = self.history.invoke(
            self.number, kind, key, proposal_id if kind is Kind.WRITE else None
        )
        world.note(self.name, kind, key, proposal_id)
        data = b"" if command is None else encode(Proposal(proposal_id, 0.0, command))
        gives_up_at = world.now + self.patience_s
        may_happen = False
        while world.now < gives_up_at:
            life = rng.choice(self.hosts).life
            timeout_s = rng.uniform(*ATTEMPT_S)
            await trio.sleep(rng.uniform(*PAUSE_S))
            if life is None or not life.is_running:
                continue
            try:
                if command is None:
                    found = await life.call(self._read, life, key, timeout_s)
                    world.note(self.name, f"reads at {life.host.id}", found)
                    self.history.complete(operation, found)
                    counts["client: read"] += 1
                    return True
                answer = await life.call(life.node.propose, data, timeout_s)
            except NoQuorum:
                continue
            except (RaftError, Gone):
                may_happen = True
                continue
            checker.acknowledged(data)
            outcome = decode_outcome(answer)
            world.note(self.name, f"is told by {life.host.id}", outcome)
            self.history.complete(operation, not isinstance(outcome, Rejected))
            self.acknowledged.append(proposal_id)
            counts["client: acknowledged"] += 1
            return True
        world.note(self.name, "gives up", "outcome unknown" if may_happen else "not done")
        counts["client: gave up"] += 1
        if not may_happen:
            self.history.failed(operation)
            if command is not None:
                checker.refused(data)
        return False

    async def _read(self, life: Life, key: str, timeout_s: float) -> str | None:
        await life.node.read_barrier(timeout_s)
        user = life.machine.state.users.get(key)
        return None if user is None else user.password_hash


_SHARES = {Kind.WRITE: 4, Kind.DELETE: 1, Kind.CLAIM: 2, Kind.READ: 4}


def _command(kind: Kind, key: str, value: str) -> AnyCommand | None:
    match kind:
        case Kind.WRITE:
            return PutUser(User(key, value, "viewer", 0.0))
        case Kind.DELETE:
            return DeleteUser(key)
        case Kind.CLAIM:
            return Revoke(key, 1e12)
        case Kind.READ:
            return None


async def last_words(
    cluster: Cluster, history: History, limping: Host | None = None
) -> list[Client]:
    """A write and a read through every host, when all is well again, but for one at most."""
    clients = []
    for host in cluster.hosts:
        if host is limping:
            continue
        client = Client(cluster, history, [host], PROGRESS_BOUND_S)
        clients.append(client)
        for kind in (Kind.WRITE, Kind.READ):
            if not await client.operate(kind, "u0"):
                cluster.checker.violated(
                    "progress", f"{host.id} does not carry out a {kind}, though all is healed"
                )
    return clients
