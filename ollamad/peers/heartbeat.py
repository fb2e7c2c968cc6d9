"""Heartbeats: every node tells every other one once a second how it is.

Silence for a little over three beats means offline; a node that returns beats at once, so it is
online again as soon as it can be reached.
"""

import logging
import time
from collections.abc import Callable, Iterable

import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.presence import BEAT_INTERVAL_S, Beat, Presence, PresenceTable
from ollamad.peers.link import RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import PeerUnreachable

log = logging.getLogger(__name__)

METHOD = "beat"
ANSWER_TIMEOUT_S = 2.0  # a link whose peer does not answer this long is dropped and dialled anew
FAREWELL_TIMEOUT_S = 0.5


class Heartbeats:
    """Sends this node's beats and keeps the table of the others'.

    Args:
      peers: the ids of the other members.
      own_beat: what to tell.
      on_change: called as `on_change(node_id, online)` when a node comes or goes.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        peers: Callable[[], Iterable[NodeId]],
        own_beat: Callable[[], Beat],
        on_change: Callable[[NodeId, bool], None],
    ) -> None:
        self._mesh = mesh
        self._peers = peers
        self._own_beat = own_beat
        self._on_change = on_change
        self.on_beat: Callable[[NodeId, Beat], None] = lambda node_id, beat: None
        self._table = PresenceTable()
        self._senders: dict[NodeId, trio.CancelScope] = {}
        mesh.answer(METHOD, Beat, self._hear)

    def presence(self, node_id: NodeId) -> Presence:
        """What is known of another node."""
        return self._table.of(node_id)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                wanted = set(self._peers())
                for node_id in wanted - self._senders.keys():
                    self._senders[node_id] = trio.CancelScope()
                    nursery.start_soon(self._send_beats, node_id)
                for node_id in self._senders.keys() - wanted:
                    self._senders[node_id].cancel()
                for node_id in self._table.sweep(trio.current_time()):
                    log.warning("node %s is offline", short(node_id))
                    self._on_change(node_id, False)
                await trio.sleep(BEAT_INTERVAL_S / 4)

    async def farewell(self, beat: Beat) -> None:
        """Tell everybody who is online that this node stops now."""
        with trio.move_on_after(FAREWELL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for node_id in self._peers():
                    if self._table.of(node_id).online:
                        nursery.start_soon(self._tell, node_id, beat)

    def _hear(self, peer: NodeId, beat: Beat) -> bool:
        came = self._table.hear(peer, beat, trio.current_time(), time.time())
        if came:
            log.info("node %s is online", short(peer))
            self._on_change(peer, True)
        elif beat.leaving:
            log.info("node %s stops", short(peer))
            self._on_change(peer, False)
        self.on_beat(peer, beat)
        return True

    async def _send_beats(self, node_id: NodeId) -> None:
        with self._senders[node_id]:
            while True:
                next_beat = trio.current_time() + BEAT_INTERVAL_S
                await self._tell(node_id, self._own_beat())
                await trio.sleep_until(next_beat)
        self._table.forget(node_id)
        del self._senders[node_id]

    async def _tell(self, node_id: NodeId, beat: Beat) -> None:
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await self._mesh.call(node_id, METHOD, beat, bool)
        except trio.TooSlowError:
            self._mesh.drop(node_id)
        except (PeerUnreachable, RemoteFailure) as error:
            log.debug("no beat to %s: %s", short(node_id), error)
