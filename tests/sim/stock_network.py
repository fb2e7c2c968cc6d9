"""Two networks for stock nodes.

`StockFrames` is as harsh as the one for our own nodes. `StockConnections` is the library's TCP
transport, as far as its nodes can tell: messages arrive in order and once. A connection outlives a
short cut, whose messages come late; it breaks by the library's own rules: whoever sends, and has
read nothing for `connectionTimeout`, drops it, and what was under way is lost. The node with the
larger address connects again.
"""

from collections.abc import Callable
from typing import Any

from ollamad.core.ids import NodeId
from tests.sim.network import Paths
from tests.sim.plan import Network
from tests.sim.world import World

CONNECTION_TIMEOUT_S = 3.5  # the library's defaults
RETRY_S = 5.0
RETRANSMIT_S = 0.4  # after a cut heals, until data flows again

Message = Any
Deliver = Callable[[NodeId, NodeId, Message], None]  # from, to, message


class StockFrames:
    """Single messages: late, lost, doubled or overtaken, as our own nodes' frames are too."""

    def __init__(self, world: World, usual: Network, paths: Paths, deliver: Deliver) -> None:
        self._world = world
        self._rng = world.rng("frames")
        self._paths = paths
        self._deliver = deliver
        self._last: dict[tuple[NodeId, NodeId], float] = {}  # when the latest one arrives
        self.now = usual

    def send(self, source: NodeId, to: NodeId, message: Message, may_double: bool) -> None:
        rng, now = self._rng, self.now
        if self._paths.is_cut(source, to) or (now.loss and rng.random() < now.loss):
            return
        arrives_at = self._world.now + self._delay_s()
        if now.ordered:
            arrives_at = max(arrives_at, self._last.get((source, to), 0.0))
            self._last[source, to] = arrives_at
        self._world.at(arrives_at, self._deliver, source, to, message)
        if now.duplication and rng.random() < now.duplication and may_double:
            self._world.after(2 * self._delay_s(), self._deliver, source, to, message)

    def _delay_s(self) -> float:
        rng, now = self._rng, self.now
        late_s = now.straggling_s if rng.random() < now.straggling else now.jitter_s
        return now.latency_s + rng.random() * late_s


class Connection:
    """Of two nodes, each of which may think differently about it."""

    def __init__(self, one: NodeId, other: NodeId, now_s: float) -> None:
        self.is_open = {one: True, other: True}
        self.heard_at = {one: now_s, other: now_s}
        self.arrives_at = {one: 0.0, other: 0.0}  # by sender: nothing overtakes
        self.held: dict[NodeId, list[Message]] = {one: [], other: []}  # by sender, by a cut

    def other(self, end: NodeId) -> NodeId:
        return next(node for node in self.is_open if node != end)


class StockConnections:
    """All connections. `notice(node, peer, is_up)` tells a node, `is_up` says whether one runs."""

    def __init__(
        self,
        world: World,
        usual: Network,
        paths: Paths,
        deliver: Deliver,
        notice: Callable[[NodeId, NodeId, bool], None],
        is_up: Callable[[NodeId], bool],
    ) -> None:
        self._world = world
        self._rng = world.rng("connections")
        self._paths = paths
        self._deliver = deliver
        self._notice = notice
        self._is_up = is_up
        self.now = usual
        self._current: dict[tuple[NodeId, NodeId], Connection] = {}
        self._attempted_at: dict[tuple[NodeId, NodeId], float] = {}

    def send(self, source: NodeId, to: NodeId, message: Message) -> bool:
        connection = self._current.get(_pair(source, to))
        if connection is None or not connection.is_open[source]:
            return False
        if self._world.now - connection.heard_at[source] > CONNECTION_TIMEOUT_S:
            self._break_end(connection, source)
            return False
        self._launch(connection, source, message)
        return True

    def start(self, node: NodeId, peers: list[NodeId]) -> None:
        """A process listens from now on, and connects."""
        for peer in peers:
            self._attempted_at.pop(_pair(node, peer), None)
            self._connect(_pair(node, peer))

    def died(self, node: NodeId, peers: list[NodeId], silently: bool) -> None:
        """Without power the kernel cannot even say that the process is gone."""
        for peer in peers:
            connection = self._current.get(_pair(node, peer))
            if connection is not None:
                connection.is_open[node] = False
                connection.held[node].clear()
                if not silently:
                    self._tell_other_end(connection, node)

    def reset(self, one: NodeId, other: NodeId) -> None:
        connection = self._current.get(_pair(one, other))
        if connection is not None:
            self._break_end(connection, one)
            self._break_end(connection, other)

    def mended(self, source: NodeId, to: NodeId) -> None:
        """That way is open again: TCP sends once more what was held."""
        connection = self._current.get(_pair(source, to))
        if connection is not None:
            held, connection.held[source] = connection.held[source], []
            for message in held:
                self._launch(connection, source, message, RETRANSMIT_S)

    def _delay_s(self) -> float:
        return self.now.latency_s + self._rng.random() * self.now.jitter_s

    def _launch(
        self, connection: Connection, source: NodeId, message: Message, extra_s: float = 0.0
    ) -> None:
        at = max(connection.arrives_at[source], self._world.now + extra_s + self._delay_s())
        connection.arrives_at[source] = at
        self._world.at(at, self._arrive, connection, source, message)

    def _arrive(self, connection: Connection, source: NodeId, message: Message) -> None:
        to = connection.other(source)
        if self._paths.is_cut(source, to):
            connection.held[source].append(message)
        elif connection.is_open[to]:
            connection.heard_at[to] = self._world.now
            self._deliver(source, to, message)
        elif self._is_up(to):
            self._tell_other_end(connection, to)

    def _tell_other_end(self, connection: Connection, end: NodeId) -> None:
        other = connection.other(end)
        if not self._paths.is_cut(end, other):
            self._world.after(self._delay_s(), self._break_end, connection, other)

    def _break_end(self, connection: Connection, end: NodeId) -> None:
        if not connection.is_open[end]:
            return
        connection.is_open[end] = False
        connection.held[end].clear()
        other = connection.other(end)
        if self._current[_pair(end, other)] is connection:
            self._notice(end, other, False)
            self._connect(_pair(end, other))
        self._tell_other_end(connection, end)

    def _connect(self, pair: tuple[NodeId, NodeId]) -> None:
        """Let the larger one connect, if it is time."""
        connector, acceptor = pair
        connection = self._current.get(pair)
        if not self._is_up(connector) or (connection and connection.is_open[connector]):
            return
        next_at = self._attempted_at.get(pair, -RETRY_S) + RETRY_S
        if self._world.now < next_at:
            self._world.at(next_at, self._connect, pair)
            return
        self._attempted_at[pair] = self._world.now
        whole = not (
            self._paths.is_cut(connector, acceptor) or self._paths.is_cut(acceptor, connector)
        )
        if whole and self._is_up(acceptor):
            self._world.after(2 * self._delay_s(), self._establish, pair)
        else:
            self._world.after(RETRY_S, self._connect, pair)

    def _establish(self, pair: tuple[NodeId, NodeId]) -> None:
        if not all(self._is_up(end) for end in pair):
            self._connect(pair)
            return
        self._current[pair] = Connection(*pair, self._world.now)
        for end, other in (pair, pair[::-1]):
            self._notice(end, other, True)


def _pair(one: NodeId, other: NodeId) -> tuple[NodeId, NodeId]:
    """The one that connects comes first."""
    return (one, other) if one > other else (other, one)
