"""A consensus of one that applies at once, and fails when a test says so."""

import trio

from ollamad.core.ids import NodeId
from ollamad.machine import Machine
from ollamad.raft.errors import ChangeRefused, RaftError
from ollamad.raft.recovery import LogEnd


class FakeRaft:
    def __init__(self, node_id: NodeId, machine: Machine) -> None:
        self.machine = machine
        self.leader: NodeId | None = node_id
        self.is_leader = True
        self.has_quorum = True
        self.state_too_large = False
        self.term = 1
        self.log_end = LogEnd(1, 3)
        self.applied_index = 3
        self.voters = frozenset({node_id})
        self.behind: set[NodeId] = set()  # not caught up yet
        self.failure: RaftError | None = None  # what every proposal ends in
        self.refusals = 0  # changes of the voters that are refused before one is done
        self.changes: list[tuple[str, NodeId]] = []
        self.proposals: list[bytes] = []

    async def propose(self, command: bytes, timeout_s: float) -> bytes:
        await trio.lowlevel.checkpoint()
        self.proposals.append(command)
        if self.failure is not None:
            raise self.failure
        return self.machine.apply(command)

    def caught_up(self, node_id: NodeId) -> bool:
        return node_id not in self.behind

    async def add_voter(self, node_id: NodeId, timeout_s: float) -> None:
        await self._change("add", node_id)
        self.voters |= {node_id}

    async def remove_voter(self, node_id: NodeId, timeout_s: float) -> None:
        await self._change("remove", node_id)
        self.voters -= {node_id}

    async def _change(self, what: str, node_id: NodeId) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            self.refusals -= 1
            raise ChangeRefused("another change runs")
        self.changes.append((what, node_id))
