"""Moves consensus frames between nodes over byte streams.

Every node keeps one outgoing link to every peer; it sends on those only and receives on the
links of others only, so there is never a second link to choose between. Frames are a 4-byte
length and as many bytes. A frame that cannot leave is dropped: consensus asks again.

Knows neither TLS nor addresses: the caller dials and authenticates.
"""

import contextlib
import logging
import random
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

import trio

from ollamad.core.ids import NodeId, short
from ollamad.wire.raftwire import MAX_FRAME_SIZE, MalformedMessage

logger = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 16 << 20  # to one peer; above it new frames are dropped, the link is too slow
MAX_QUEUED_FRAMES = 20_000
WRITE_BATCH_BYTES = 256 * 1024  # joined into one write
READ_BYTES = 256 * 1024  # a read; TLS gives at most 16 KiB at once
WRITE_TIMEOUT_S = 5.0  # for one such batch; then the peer is taken for dead
DIAL_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.05  # after a failed dial: doubled each time, with jitter, up to
BACKOFF_MAX_S = 1.0  # so that a node that returns is in touch within a second or so
USER_TIMEOUT_MS = 3000  # unacknowledged bytes for so long break the connection (TCP_USER_TIMEOUT)

_HEADER = struct.Struct(">I")

Dial = Callable[[NodeId], Awaitable[trio.abc.Stream]]


class Consensus(Protocol):
    """Who gets the frames."""

    def receive(self, sender: NodeId, frame: bytes) -> None: ...
    def peer_connected(self, node_id: NodeId) -> None: ...
    def peer_disconnected(self, node_id: NodeId) -> None: ...


class FrameSplitter:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """The frames that are complete now.

        Raises:
          MalformedMessage: a frame announces more bytes than any may have.
        """
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(buffer, start)
            if length > MAX_FRAME_SIZE:
                raise MalformedMessage(f"a frame of {length} bytes is announced")
            end = start + _HEADER.size + length
            if len(buffer) < end:
                break
            frames.append(bytes(buffer[start + _HEADER.size : end]))
            start = end
        if start:
            del buffer[:start]
        return frames


@runtime_checkable
class PromptStream(Protocol):
    """A stream that can send at once, without a pass of the event loop (see `peers.tls_stream`)."""

    @property
    def has_unsent(self) -> bool: ...
    def send_now(self, data: bytes) -> bool: ...


class _Outgoing:
    """The queue to one peer and the task that empties it."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.size = 0
        self.ready = trio.Event()
        self.connected = False
        self.prompt: PromptStream | None = None  # the connection, if it is one
        self.scope = trio.CancelScope()

    def put(self, frame: bytes) -> bool:
        full = len(self.frames) >= MAX_QUEUED_FRAMES or self.size + len(frame) > MAX_QUEUED_BYTES
        if full or not self.connected:
            return False
        if self.prompt is not None and not self.frames and not self.prompt.has_unsent:
            # Mostly nothing waits, and a frame that leaves now is a commit that is done sooner.
            try:
                if not self.prompt.send_now(_HEADER.pack(len(frame)) + frame):
                    self.ready.set()  # the task sends the rest
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.ready.set()  # the task meets the same error, and dials again
                return False
            return True
        self.frames.append(frame)
        self.size += len(frame)
        self.ready.set()
        return True

    def take(self) -> bytes:
        """As many frames as make one write, with their lengths before them."""
        parts: list[bytes] = []
        total = 0
        while self.frames and total < WRITE_BATCH_BYTES:
            frame = self.frames.popleft()
            parts += (_HEADER.pack(len(frame)), frame)
            total += len(frame)
        self.size -= total
        if not self.frames:
            self.ready = trio.Event()
        return b"".join(parts)

    def clear(self) -> None:
        self.frames.clear()
        self.size = 0
        self.ready = trio.Event()


class Links:
    """All links of one node. `send` fits `RaftNode(send=…)`.

    `dial` gives an authenticated stream to that node, or raises OSError or trio's
    BrokenResourceError; it is cancelled after DIAL_TIMEOUT_S.
    """

    def __init__(self, dial: Dial, *, rng: random.Random | None = None) -> None:
        self._dial = dial
        self._rng = rng or random.Random()
        self._wanted: frozenset[NodeId] = frozenset()
        self._outgoing: dict[NodeId, _Outgoing] = {}
        self._incoming: dict[NodeId, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._consensus: Consensus | None = None

    @property
    def connected(self) -> frozenset[NodeId]:
        """The peers whose outgoing link is up."""
        return frozenset(node for node, link in self._outgoing.items() if link.connected)

    @property
    def dialled_by(self) -> frozenset[NodeId]:
        """The nodes that have a link to us."""
        return frozenset(self._incoming)

    def set_peers(self, peers: frozenset[NodeId]) -> None:
        """Keep a link to each of these, and to nobody else. Leave this node itself out.

        Who was among them and is not any more loses its link to us too.
        """
        for gone in self._wanted - peers:
            if (incoming := self._incoming.get(gone)) is not None:
                incoming.cancel()
        self._wanted = peers
        if self._nursery is not None:
            self._adjust(self._nursery)

    def send(self, node_id: NodeId, frame: bytes) -> None:
        """Queue a frame; drop it if there is no link or its queue is full."""
        link = self._outgoing.get(node_id)
        if link is not None:
            link.put(frame)

    async def run(
        self, consensus: Consensus, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep the outgoing links up until cancelled."""
        self._consensus = consensus
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._adjust(nursery)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def _adjust(self, nursery: trio.Nursery) -> None:
        for gone in self._outgoing.keys() - self._wanted:
            self._outgoing.pop(gone).scope.cancel()
        for new in sorted(self._wanted - self._outgoing.keys()):
            link = self._outgoing[new] = _Outgoing()
            nursery.start_soon(self._keep, new, link)

    async def serve(self, stream: trio.abc.Stream, peer_id: NodeId) -> None:
        """Receive the frames of an authenticated member until the stream ends; then close it.

        A newer stream of the same peer ends this one. Errors of the peer are logged, not raised.
        """
        if self._consensus is None:
            await trio.aclose_forcefully(stream)
            return
        older = self._incoming.get(peer_id)
        if older is not None:
            older.cancel()
        tune(stream)
        with trio.CancelScope() as scope:
            self._incoming[peer_id] = scope
            try:
                await self._receive_all(self._consensus, stream, peer_id)
            except MalformedMessage as error:
                logger.error("closing the consensus link of %s: %s", short(peer_id), error)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                if self._incoming.get(peer_id) is scope:
                    del self._incoming[peer_id]
                await trio.aclose_forcefully(stream)

    async def _receive_all(
        self, consensus: Consensus, stream: trio.abc.Stream, peer_id: NodeId
    ) -> None:
        splitter = FrameSplitter()
        while data := await stream.receive_some(READ_BYTES):
            for frame in splitter.feed(data):
                consensus.receive(peer_id, frame)

    async def _keep(self, peer_id: NodeId, link: _Outgoing) -> None:
        backoff_s = BACKOFF_MIN_S
        with link.scope:
            while True:
                if await self._connect_once(peer_id, link):
                    backoff_s = BACKOFF_MIN_S
                await trio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _connect_once(self, peer_id: NodeId, link: _Outgoing) -> bool:
        """Dial and send until the link breaks. Returns whether there was a connection."""
        assert self._consensus is not None
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                stream = await self._dial(peer_id)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            logger.debug("no consensus link to %s: %s", short(peer_id), error)
            return False
        tune(stream)
        link.clear()
        link.connected = True
        link.prompt = stream if isinstance(stream, PromptStream) else None
        try:
            self._consensus.peer_connected(peer_id)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch_for_end, stream, nursery.cancel_scope)
                await _send_all(stream, link)
                nursery.cancel_scope.cancel()
        finally:
            link.connected = False
            link.prompt = None
            link.clear()
            self._consensus.peer_disconnected(peer_id)
            await trio.aclose_forcefully(stream)
        return True


async def _send_all(stream: trio.abc.Stream, link: _Outgoing) -> None:
    try:
        while True:
            await link.ready.wait()
            with trio.fail_after(WRITE_TIMEOUT_S):
                await stream.send_all(link.take())
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        pass


async def _watch_for_end(stream: trio.abc.Stream, link_scope: trio.CancelScope) -> None:
    """Notice at once that the peer went away. It has nothing to say on this stream."""
    with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.receive_some(1)
    link_scope.cancel()


def tune(stream: trio.abc.Stream) -> None:
    """Set TCP_USER_TIMEOUT, so that a partition does not leave a link waiting for minutes."""
    transport = getattr(stream, "transport_stream", stream)
    if isinstance(transport, trio.SocketStream):
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is not None and transport.socket.family in (socket.AF_INET, socket.AF_INET6):
            transport.setsockopt(socket.IPPROTO_TCP, option, USER_TIMEOUT_MS)
