"""Networks between simulated hosts.

`Datagrams` is harsher than any that the product will meet: every frame by itself may be late,
lost, doubled or overtaken. `Connections` gives `Links` streams as TCP would: in order, and with
all the ways in which one end can know less than the other. What arrives may belong to a
connection that its other end has long given up.
"""

from collections import Counter, deque
from collections.abc import Callable

import trio

from ollamad.core.ids import NodeId
from tests.sim.plan import Network
from tests.sim.world import World

# A proposal on its way to the leader is the one frame that must not come twice, and on streams it
# does not: "did not happen and will not" would be wrong.
_FORWARD = b"\xa7for"

Deliver = Callable[[NodeId, NodeId, bytes], None]  # from, to, frame

USER_TIMEOUT_S = 3.0  # as `Links` sets it for TCP: unacknowledged for so long is broken
RETRANSMIT_S = 0.4  # after a cut heals, until data flows again
TCP_BUFFER = 256 * 1024  # bytes that a sender may have under way


class Paths:
    """Which host can reach which. Cuts may overlap; each is undone by itself."""

    def __init__(self) -> None:
        self._cuts: Counter[tuple[NodeId, NodeId]] = Counter()

    def cut(self, source: NodeId, to: NodeId) -> None:
        self._cuts[source, to] += 1

    def mend(self, source: NodeId, to: NodeId) -> None:
        self._cuts[source, to] -= 1

    def is_cut(self, source: NodeId, to: NodeId) -> bool:
        return self._cuts[source, to] > 0


class Datagrams:
    """Single frames."""

    def __init__(
        self,
        world: World,
        usual: Network,
        paths: Paths,
        deliver: Deliver,
        counts: Counter[str],
    ) -> None:
        self._world = world
        self._counts = counts
        self._rng = world.rng("network")
        self._deliver = deliver
        self._paths = paths
        self._last: dict[tuple[NodeId, NodeId], float] = {}  # when the latest frame arrives
        self.now = usual  # what it is like at the moment

    def send(self, source: NodeId, to: NodeId, frame: bytes) -> None:
        rng, now, counts = self._rng, self.now, self._counts
        counts["frames"] += 1
        if self._paths.is_cut(source, to):
            counts["frames cut off"] += 1
            return
        if now.loss and rng.random() < now.loss:
            counts["frames lost"] += 1
            return
        arrives_at = self._world.now + self._delay_s()
        if now.ordered:
            arrives_at = max(arrives_at, self._last.get((source, to), 0.0))
            self._last[source, to] = arrives_at
        self._world.at(arrives_at, self._deliver, source, to, frame)
        may_double = frame[1:5] != _FORWARD
        if now.duplication and rng.random() < now.duplication and may_double:
            counts["frames doubled"] += 1
            self._world.after(2 * self._delay_s(), self._deliver, source, to, frame)

    def _delay_s(self) -> float:
        now = self.now
        late_s = now.straggling_s if self._rng.random() < now.straggling else now.jitter_s
        return now.latency_s + self._rng.random() * late_s


class Connection:
    """One TCP connection; data flows from the host that dialed only."""

    def __init__(self, network: "Connections", source: NodeId, to: NodeId) -> None:
        self._network = network
        self.source, self.to = source, to
        self.dialer = DialerEnd(self)
        self.acceptor = AcceptorEnd(self)
        self.under_way = 0  # bytes that the other end has not got
        self._held: deque[bytes] = deque()  # what waits for the path to be whole
        self._arrives_at = 0.0  # nothing overtakes
        self._progress_at = network.world.now  # when the sender knew last that something arrived

    def send(self, data: bytes) -> None:
        network = self._network
        self.under_way += len(data)
        if self._held or network.paths.is_cut(self.source, self.to):
            self._held.append(data)
        else:
            self._launch(data)
        if not network.is_whole(self.source, self.to):
            network.world.after(USER_TIMEOUT_S, self._check_timeout, network.world.now)

    def _launch(self, data: bytes, extra_s: float = 0.0) -> None:
        network = self._network
        now_s = network.world.now
        self._arrives_at = max(self._arrives_at, now_s + extra_s + network.delay_s())
        network.world.at(self._arrives_at, self._arrive, data)

    def _arrive(self, data: bytes) -> None:
        self.under_way -= len(data)
        if self._network.is_whole(self.source, self.to):
            self._progress_at = self._network.world.now
        self._network.hand_over(self, data)
        self.dialer.flowed()

    def _check_timeout(self, sent_at: float) -> None:
        """Break if what was sent then is not acknowledged: lost, or the answer is."""
        if self._progress_at < sent_at and not self.dialer.is_over:
            self.dialer.broke()
            self._held.clear()

    def path_mended(self) -> None:
        """The path to the acceptor works again: TCP sends once more what was held."""
        held, self._held = self._held, deque()
        for data in held:
            self._launch(data, RETRANSMIT_S)

    def reset(self) -> None:
        """Both ends break; what is in flight is lost."""
        self._held.clear()
        self.dialer.broke()
        self.acceptor.broke()

    def dialer_closed(self) -> None:
        """The other end will learn of it, if word gets through, after what is under way."""
        network = self._network
        network.gone(self)
        if not network.paths.is_cut(self.source, self.to):
            at = max(self._arrives_at, network.world.now + network.delay_s())
            network.world.at(at, self.acceptor.broke)

    def acceptor_closed(self) -> None:
        network = self._network
        network.gone(self)
        if network.is_whole(self.source, self.to):
            network.world.after(network.delay_s(), self.dialer.broke)
        else:
            network.world.after(USER_TIMEOUT_S, self.dialer.broke)


class _End(trio.abc.Stream):
    def __init__(self) -> None:
        self.is_over = False
        self._changed = trio.Event()

    def broke(self) -> None:
        self.is_over = True
        self._changed.set()

    async def _change(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()


class DialerEnd(_End):
    """Sends only. `receive_some` waits for the end, as the other side never says a word."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._room = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        while self._connection.under_way > TCP_BUFFER and not self.is_over:
            self._room = trio.Event()
            await self._room.wait()
        if self.is_over:
            raise trio.BrokenResourceError("the simulated connection broke")
        self._connection.send(bytes(data))

    def flowed(self) -> None:
        self._room.set()

    def broke(self) -> None:
        super().broke()
        self._room.set()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self.is_over:
            await self._change()
        raise trio.BrokenResourceError("the simulated connection broke")

    async def aclose(self) -> None:
        was_over, self.is_over = self.is_over, True
        if not was_over:
            self._connection.dialer_closed()
        await trio.lowlevel.checkpoint()


class AcceptorEnd(_End):
    """Receives only."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        if not self.is_over:
            self._data += data
            self._changed.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError("this side only listens")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._data and not self.is_over:
            await self._change()
        if not self._data:
            raise trio.BrokenResourceError("the simulated connection broke")
        data, self._data = bytes(self._data), bytearray()
        return data

    async def aclose(self) -> None:
        was_over, self.is_over = self.is_over, True
        if not was_over:
            self._connection.acceptor_closed()
        await trio.lowlevel.checkpoint()


Accept = Callable[[Connection], bool]  # whether somebody listens at `connection.to`
HandOver = Callable[[Connection, bytes], None]


class Connections:
    """Streams for `Links`."""

    def __init__(
        self, world: World, usual: Network, paths: Paths, accept: Accept, hand_over: HandOver
    ) -> None:
        self.world = world
        self.paths = paths
        self.hand_over = hand_over
        self._accept = accept
        self._rng = world.rng("network")
        self.now = usual
        self._open: dict[Connection, None] = {}  # a set that keeps its order

    def delay_s(self) -> float:
        return self.now.latency_s + self._rng.random() * self.now.jitter_s

    def is_whole(self, one: NodeId, other: NodeId) -> bool:
        return not self.paths.is_cut(one, other) and not self.paths.is_cut(other, one)

    async def dial(self, source: NodeId, to: NodeId) -> trio.abc.Stream:
        """Connect; hangs while the path is cut, and is refused when nobody listens."""
        await trio.sleep(2 * self.delay_s())
        if not self.is_whole(source, to):
            await trio.sleep_forever()  # the caller gives up
        connection = Connection(self, source, to)
        if not self._accept(connection):
            raise ConnectionRefusedError("nobody listens at the simulated port")
        self._open[connection] = None
        return connection.dialer

    def gone(self, connection: Connection) -> None:
        self._open.pop(connection, None)

    def mended(self, source: NodeId, to: NodeId) -> None:
        for connection in list(self._open):
            if (connection.source, connection.to) == (source, to):
                connection.path_mended()

    def reset(self, one: NodeId, other: NodeId) -> None:
        for connection in list(self._open):
            if {connection.source, connection.to} == {one, other}:
                connection.reset()
                self.gone(connection)

    def host_died(self, host: NodeId) -> None:
        """Its kernel resets its connections, as far as the others can hear it."""
        for connection in list(self._open):
            if connection.source == host:
                connection.dialer.is_over = True
                connection.dialer_closed()
            elif connection.to == host:
                connection.acceptor.is_over = True
                connection.acceptor_closed()
