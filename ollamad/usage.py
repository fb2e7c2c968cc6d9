"""What API keys have used, in the whole cluster: told from node to node, and kept in the state.

A node counts what it serves, tells the others twice a second what changed, and has it recorded in
the replicated state every RECORD_INTERVAL_S and when it stops. So a key may exceed its quota by
what other nodes served within about a second (more while nodes cannot reach each other: they
count on alone), and by the tokens of the answers that were under way when it was reached. A node
that was killed learns its own counts from the others; what it had told nobody, RECORD_INTERVAL_S
at most if it is alone, is forgotten.
"""

import logging
import time
from collections.abc import Callable

import trio

from ollamad.api.services import ServiceError
from ollamad.cluster import Cluster
from ollamad.core.commands import Applied, RecordUsage
from ollamad.core.ids import NodeId, short
from ollamad.core.quota import KeyCount, Ledger, NodeCount, Used
from ollamad.core.state import ApiKey
from ollamad.peers.link import RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import PeerUnreachable

log = logging.getLogger(__name__)

METHOD = "usage"
TELL_INTERVAL_S = 0.5
TELL_TIMEOUT_S = 2.0
RECORD_INTERVAL_S = 10.0
LAST_RECORD_TIMEOUT_S = 1.0  # when the daemon stops
COUNTS_AT_ONCE = 2_000  # of some 80 bytes: far below what a message or a command may have


class KeyUsage:
    """The counts of all keys; `run` keeps them the same on all nodes."""

    def __init__(
        self, cluster: Cluster, mesh: Mesh, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._cluster = cluster
        self._mesh = mesh
        self._wall = wall
        self._ledger = Ledger(cluster.node_id)
        # Up to which version each node was told, in which of its lives.
        self._told: dict[NodeId, tuple[float, int]] = {}
        self._telling: set[NodeId] = set()
        self._recorded = 0
        self._unknown: set[str] = set()
        mesh.answer(METHOD, tuple[NodeCount, ...], self._on_told)

    def used(self, key: ApiKey) -> Used:
        """What was used of a key in the period that runs, as far as this node knows."""
        return self._ledger.used(key.id, key.period, self._wall())

    def count(self, key: ApiKey, *, requests: int = 0, tokens: int = 0) -> None:
        """Count what this node serves."""
        self._ledger.add(key.id, key.period, self._wall(), requests=requests, tokens=tokens)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell and record until cancelled. `record` once more before the end."""
        self._learn()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._record_all)
            task_status.started()
            while True:
                for node_id in self._cluster.other_members():
                    if node_id not in self._telling and self._cluster.is_online(node_id):
                        nursery.start_soon(self._tell, node_id)
                await trio.sleep(TELL_INTERVAL_S)

    async def record(self) -> None:
        """Have this node's counts recorded, if there are new ones; without a quorum, not."""
        with trio.move_on_after(LAST_RECORD_TIMEOUT_S):
            await self._record()

    async def _record_all(self) -> None:
        while True:
            await trio.sleep(RECORD_INTERVAL_S)
            await self._record()
            self._learn()

    async def _record(self) -> None:
        version = self._ledger.version
        keys = self._cluster.state.api_keys
        counts = [
            KeyCount(count.key_id, count.used)
            for count in self._ledger.changes(self._recorded, own=True)
            if count.key_id in keys
        ]
        try:
            for start in range(0, len(counts), COUNTS_AT_ONCE):
                part = tuple(counts[start : start + COUNTS_AT_ONCE])
                outcome = await self._cluster.propose(RecordUsage(self._cluster.node_id, part))
                if not isinstance(outcome, Applied):
                    return
        except ServiceError as error:
            log.debug("the usage of API keys is not recorded now: %s", error)
            return
        self._recorded = version

    def _learn(self) -> None:
        """Take over what is recorded, and forget the keys that are gone."""
        state = self._cluster.state
        for key_id, by_node in state.key_usage.items():
            for node_id, used in by_node.items():
                self._ledger.merge(NodeCount(node_id, key_id, used))
        unknown = {key_id for key_id in self._ledger.key_ids() if key_id not in state.api_keys}
        # Twice unknown: another node may tell of a new key before this one has it in its state.
        for key_id in unknown & self._unknown:
            self._ledger.forget(key_id)
        self._unknown = unknown

    async def _tell(self, node_id: NodeId) -> None:
        life = self._cluster.presence(node_id).beat.started_at
        known_life, told = self._told.get(node_id, (-1.0, 0))
        is_new = known_life != life
        version = self._ledger.version
        # A node that started anew needs everything, its own counts above all.
        counts = self._ledger.changes(0 if is_new else told, own=not is_new)
        self._telling.add(node_id)
        try:
            with trio.fail_after(TELL_TIMEOUT_S):
                for start in range(0, len(counts), COUNTS_AT_ONCE):
                    part = tuple(counts[start : start + COUNTS_AT_ONCE])
                    await self._mesh.call(node_id, METHOD, part, bool)
        except (PeerUnreachable, trio.TooSlowError) as error:
            log.debug("usage was not told to %s: %s", short(node_id), error)
        except RemoteFailure:
            self._told[node_id] = (life, version)  # of an older version; it keeps no counts
        else:
            self._told[node_id] = (life, version)
        finally:
            self._telling.discard(node_id)

    def _on_told(self, peer: NodeId, counts: tuple[NodeCount, ...]) -> bool:
        for count in counts:
            self._ledger.merge(count)
        return True
