"""Who listens to what: the WebSockets of this node, and the messages that go to them.

A message is encoded once, as the frame that goes on the wire (a server's frames are not masked,
so they are the same for everybody), and written to each socket that can take it right away. Who
cannot take it has it in an outbox, and a task of its own that writes it out. So nobody waits for
a slow reader.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgspec
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import Ping, TextMessage

from ollamad.api.messages import CHANNELS

# Readers that are written to before others get their turn: some 2 ms.
TURN = 256
TICK_S = 5.0
# A socket that was silent for so long is pinged: proxies cut idle connections, most after 60 s.
PING_AFTER_S = 25.0

_encode = msgspec.json.Encoder().encode
# Encodes frames for everybody; without extensions it has no state.
_framer = Connection(ConnectionType.SERVER)
PING = _framer.send(Ping())


def frame_of(message: Mapping[str, Any]) -> bytes:
    """A message as a frame."""
    return _framer.send(TextMessage(data=_encode(message).decode()))


class Listener(Protocol):
    """What the hub does with a session."""

    address: str
    last_sent: float

    def send(self, frame: bytes, key: str = "") -> None:
        """Write it now, or keep it for later. Never waits, never raises."""
        ...

    def check(self, now: float) -> None:
        """Close it if it is behind for too long, or has lost its right to be here."""
        ...

    def distrust(self) -> None:
        """See at the next check whether it still has that right."""
        ...

    def close(self, code: int, reason: str) -> None: ...


class Hub:
    """The sessions of one node. `limit` is how many an address may have; 0 for any number."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._listeners: dict[str, dict[Listener, None]] = {name: {} for name in CHANNELS}
        self._sessions: dict[Listener, None] = {}
        self._of_address: Counter[str] = Counter()
        self.interest = trio.Event()  # set when somebody subscribes; see `wait_for_interest`
        self.nursery: trio.Nursery | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def is_full(self, address: str) -> bool:
        """Whether this address has all the connections that it may have."""
        return 0 < self.limit <= self.count(address)

    def count(self, address: str) -> int:
        """How many connections this address has."""
        return self._of_address[address]

    def enter(self, session: Listener) -> None:
        self._sessions[session] = None
        self._of_address[session.address] += 1

    def leave(self, session: Listener) -> None:
        del self._sessions[session]
        for name in CHANNELS:
            self._listeners[name].pop(session, None)
        self._of_address[session.address] -= 1
        if not self._of_address[session.address]:
            del self._of_address[session.address]

    def subscribe(self, session: Listener, channel: str) -> None:
        self._listeners[channel][session] = None
        self.interest.set()
        self.interest = trio.Event()

    def unsubscribe(self, session: Listener, channel: str) -> None:
        self._listeners[channel].pop(session, None)

    def wants(self, *channels: str) -> bool:
        """Whether anybody listens to one of these channels."""
        return any(self._listeners[name] for name in channels)

    async def publish(self, message: Mapping[str, Any], *channels: str, key: str = "") -> None:
        """Send a message to who listens to one of the channels, once to each.

        `key`: a newer message of the same key makes this one useless to who has not read it yet.
        """
        listeners: Iterable[Listener]
        if len(channels) == 1:
            listeners = self._listeners[channels[0]]
        else:
            listeners = {one: None for name in channels for one in self._listeners[name]}
        if not listeners:
            return
        frame = frame_of(message)
        for place, listener in enumerate(tuple(listeners), 1):
            listener.send(frame, key)
            if place % TURN == 0:
                await trio.lowlevel.checkpoint()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write to slow readers, keep idle sockets alive and check all; until cancelled."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(TICK_S)
                now = trio.current_time()
                for place, session in enumerate(tuple(self._sessions), 1):
                    session.check(now)
                    if now - session.last_sent >= PING_AFTER_S:
                        session.send(PING, "ping")
                    if place % TURN == 0:
                        await trio.lowlevel.checkpoint()

    def distrust_all(self) -> None:
        """Users or sessions changed: see within a tick who may still listen."""
        for session in self._sessions:
            session.distrust()

    def close_all(self, code: int, reason: str) -> None:
        """Begin to close every session."""
        for session in tuple(self._sessions):
            session.close(code, reason)
