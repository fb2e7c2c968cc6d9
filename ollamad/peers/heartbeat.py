"""Heartbeats: nodes tell each other once a second how they are; and who is silent is asked.

A link that breaks and a silence that is improbably long are suspicion: the node is asked whether
it lives, and two others are asked to ask it. Who does not answer is offline from here, at once: a
daemon that was killed within a moment, one that hangs or whose cable was pulled within some three
seconds. Whoever beats is online again.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable

import msgspec
import trio

from ollamad.core.gossip import RUMOUR_ID_CHARS, Gossip, rumour_of
from ollamad.core.ids import NodeId, short
from ollamad.core.presence import BEAT_INTERVAL_S, Beat, Presence, PresenceTable
from ollamad.peers.link import HandlerError, RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import PeerUnreachable

log = logging.getLogger(__name__)

METHOD = "beat"
PING = "ping"
PING_FOR = "ping.for"  # have another node ask
ANSWER_TIMEOUT_S = 2.0  # a link whose peer does not answer this long is dropped and dialled anew
FAREWELL_TIMEOUT_S = 0.5
# A loop that is held up, by a sync or the collector, answers within that.
PING_TIMEOUT_S = 1.0
# On a machine that is overloaded an answer may take longer. Who beat that recently is not given up
# for a question without an answer; only for one that was refused.
SURE_SILENCE_S = 2.0
HELPERS = 2  # others that are asked to ask a suspect: one of them may be away itself
# This node's loop was held up for so long: it was stopped, or the machine stands still. What others
# said meanwhile is not heard yet, so that their silence is no sign (Cassandra does the same).
LOCAL_PAUSE_S = 1.0
LOOK_INTERVAL_S = BEAT_INTERVAL_S / 4
CLOCK_STEP_S = 0.001  # how much later than the last one a beat says to be whose clock went back
MAX_PINGS_FOR = 16  # at once, for others; each takes PING_TIMEOUT_S at the most


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
        rng: random.Random | None = None,
    ) -> None:
        self._mesh = mesh
        self._peers = peers
        self._own_beat = own_beat
        self._on_change = on_change
        self._rng = rng or random.Random()
        # Told of each beat, and of what others tell of one.
        self.on_beat: Callable[[NodeId, Beat], None] = lambda node_id, beat: None
        self._table = PresenceTable()
        self._gossip = Gossip(self._rng.shuffle)
        self._by_prefix: dict[str, NodeId] = {}
        self._members = frozenset[NodeId]()
        self._telling: dict[NodeId, trio.CancelScope] = {}
        self._probing: set[NodeId] = set()
        self._sent_at = 0.0  # what the last beat said
        self._pings_for = 0
        self._nursery: trio.Nursery | None = None
        mesh.answer(METHOD, Beat, self._hear)
        mesh.answer(PING, bool, lambda peer, _: True)
        mesh.answer(PING_FOR, NodeId, self._ping_for)
        mesh.on_link_lost = self._suspect

    def presence(self, node_id: NodeId) -> Presence:
        """What is known of another node."""
        return self._table.of(node_id)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._beat(nursery)
            finally:
                self._nursery = None  # it takes no more questions

    async def _beat(self, nursery: trio.Nursery) -> None:
        next_round = looked_at = trio.current_time()
        while True:
            self._note_members(frozenset(self._peers()))
            now = trio.current_time()
            pause_s = now - looked_at - LOOK_INTERVAL_S
            looked_at = now
            if pause_s > LOCAL_PAUSE_S:
                log.info("this node stood still for %.1f s", pause_s)
                self._table.excuse(pause_s, now)
            if now >= next_round:
                next_round = max(next_round + BEAT_INTERVAL_S, now)
                self._begin_round(nursery)
            for node_id in self._table.suspects(now):
                self._suspect(node_id)
            for node_id in self._table.sweep(now):
                self._lose(node_id, "it is silent")
            await trio.sleep(LOOK_INTERVAL_S)

    async def farewell(self, beat: Beat) -> None:
        """Tell everybody who is online that this node stops now."""
        with trio.move_on_after(FAREWELL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for node_id in self._peers():
                    if self._table.of(node_id).online:
                        nursery.start_soon(self._tell, node_id, beat)

    async def probe(self, node_id: NodeId) -> bool:
        """Find out whether a node can be reached, and drop its links if not.

        Whatever waits for an answer over such a link fails then. True also while somebody else
        finds it out.
        """
        if node_id in self._probing:
            return True
        self._probing.add(node_id)
        try:
            reached = await self._reaches(node_id)
            now = trio.current_time()
            if reached:
                self._table.reached(node_id, now)
                return True
            if reached is None and self._is_heard(node_id):
                return True  # it is slow; whoever doubts it asks again
            self._mesh.drop(node_id)
            if self._table.convict(node_id, trio.current_time()):
                log.warning("node %s is offline: it does not answer", short(node_id))
                self._on_change(node_id, False)
            return False
        finally:
            self._probing.discard(node_id)

    def _begin_round(self, nursery: trio.Nursery) -> None:
        beat = self._own_beat()
        # Which of two beats is the newer one others tell by this; clocks are set back now and then.
        self._sent_at = max(beat.sent_at, self._sent_at + CLOCK_STEP_S)
        beat = msgspec.structs.replace(beat, sent_at=self._sent_at)
        for node_id in self._gossip.next_round(self._members):
            if node_id not in self._telling:  # else the last beat is still on its way
                heard = self._gossip.pass_on(self._members, node_id)
                told = msgspec.structs.replace(beat, heard=heard) if heard else beat
                # Noted now, not by the task: on a machine that stands still it may run late.
                self._telling[node_id] = scope = trio.CancelScope()
                nursery.start_soon(self._tell_alone, node_id, told, scope)

    def _note_members(self, members: Collection[NodeId]) -> None:
        if members == self._members:
            return
        for node_id in self._members - set(members):
            self._table.forget(node_id)
            self._gossip.forget(node_id)
            if (scope := self._telling.get(node_id)) is not None:
                scope.cancel()
        self._members = frozenset(members)
        self._by_prefix = {node_id[:RUMOUR_ID_CHARS]: node_id for node_id in members}

    def _hear(self, peer: NodeId, beat: Beat) -> bool:
        now, wall = trio.current_time(), time.time()
        heard, beat = beat.heard, msgspec.structs.replace(beat, heard=())
        came = self._table.hear(peer, beat, now, wall)
        if came:
            log.info("node %s is online", short(peer))
            self._on_change(peer, True)
        elif beat.leaving:
            log.info("node %s stops", short(peer))
            self._on_change(peer, False)
        self._gossip.hear(rumour_of(peer, beat))
        self.on_beat(peer, beat)
        for rumour in heard:
            node_id = self._by_prefix.get(rumour.node)
            if node_id is None or node_id == peer:
                continue
            was_online = self._table.of(node_id).online
            if self._table.hear_of(node_id, rumour, now, wall) is None:
                continue
            self._gossip.hear(rumour)
            presence = self._table.of(node_id)
            if presence.online != was_online:
                log.info("node %s %s", short(node_id), "is online" if not was_online else "stops")
                self._on_change(node_id, presence.online)
            self.on_beat(node_id, presence.beat)
        return True

    # Suspicion.

    def _suspect(self, node_id: NodeId) -> None:
        """Ask a node whether it lives, if there is a doubt that matters."""
        if self._nursery is not None and self._table.of(node_id).online:
            self._nursery.start_soon(self.probe, node_id)

    async def _reaches(self, node_id: NodeId) -> bool | None:
        """Whether that node answers us; None if it says nothing in time."""
        by_others = False
        directly: bool | None = False

        async def ask_directly() -> None:
            nonlocal directly
            directly = await self._answers(node_id, PING, False)

        async def ask_through(helper: NodeId) -> None:
            nonlocal by_others
            by_others |= bool(await self._answers(helper, PING_FOR, node_id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_directly)
            for helper in self._helpers(node_id):
                nursery.start_soon(ask_through, helper)
        is_slow = directly is None and self._is_heard(node_id)
        if directly or is_slow or not by_others:
            return directly
        # It lives, so the connection may be what is dead: another one, before it is given up.
        self._mesh.drop(node_id)
        return await self._answers(node_id, PING, False)

    def _is_heard(self, node_id: NodeId) -> bool:
        """Whether it has shown that it lives a moment ago."""
        return self._table.silence_s(node_id, trio.current_time()) < SURE_SILENCE_S

    def _helpers(self, suspect: NodeId) -> list[NodeId]:
        others = [n for n in self._members if n != suspect and self._table.of(n).online]
        return self._rng.sample(others, min(HELPERS, len(others)))

    async def _answers(self, node_id: NodeId, method: str, question: object) -> bool | None:
        """What it answers; false if it cannot be asked, None if it does not answer in time."""
        with trio.move_on_after(PING_TIMEOUT_S):
            try:
                return await self._mesh.call(node_id, method, question, bool)
            except (PeerUnreachable, RemoteFailure):
                return False
        return None

    async def _ping_for(self, peer: NodeId, node_id: NodeId) -> bool:
        if node_id not in self._members:
            return False
        if self._pings_for >= MAX_PINGS_FOR:
            raise HandlerError("BUSY", "too many questions at once")
        self._pings_for += 1
        try:
            return bool(await self._answers(node_id, PING, False))
        finally:
            self._pings_for -= 1

    def _lose(self, node_id: NodeId, why: str) -> None:
        log.warning("node %s is offline: %s", short(node_id), why)
        self._on_change(node_id, False)

    async def _tell_alone(self, node_id: NodeId, beat: Beat, scope: trio.CancelScope) -> None:
        """Tell one node, unless it leaves meanwhile."""
        try:
            with scope:
                await self._tell(node_id, beat)
        finally:
            del self._telling[node_id]

    async def _tell(self, node_id: NodeId, beat: Beat) -> None:
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await self._mesh.call(node_id, METHOD, beat, bool)
        except trio.TooSlowError:
            self._mesh.drop(node_id)
        except (PeerUnreachable, RemoteFailure) as error:
            log.debug("no beat to %s: %s", short(node_id), error)
