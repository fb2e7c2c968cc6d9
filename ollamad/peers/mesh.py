"""The one way to ask another node something: links to members, dialled when needed.

Each node dials its own links, so between two nodes there are up to two per direction: one for
questions and tokens, one for bulk (pieces), so that a transfer never stands before a token.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from ollamad.core.ids import NodeId, short
from ollamad.peers.link import (
    Budget,
    Handler,
    HandlerError,
    Link,
    LinkClosed,
    RemoteFailure,
    Stream,
)
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.mux import (
    Departed,
    IncompatibleVersion,
    ProtocolError,
    StreamIdsSpent,
    TooManyStreams,
    TurnedAway,
)

log = logging.getLogger(__name__)

# Connections that one member may have to us. It needs two, and as many again while it replaces
# those that broke without our noticing.
MAX_LINKS_PER_MEMBER = 4

T = TypeVar("T")
R = TypeVar("R")


class Mesh:
    """Links to the other nodes. `run` owns them; the rest may be called while it runs.

    `on_turned_away` is told when a node that was dialled says that we are no member any more.
    """

    def __init__(
        self, gate: Gate, *, version: str, address_of: Callable[[NodeId], str | None]
    ) -> None:
        self._gate = gate
        self._version = version
        self._address_of = address_of
        self.on_turned_away: Callable[[NodeId, Departed], None] = lambda peer, departed: None
        # Told when a link that was dialled has ended, whoever ended it.
        self.on_link_lost: Callable[[NodeId], None] = lambda peer: None
        # Members that speak no protocol that this node speaks, and why that is; told of changes.
        self.incompatible: dict[NodeId, str] = {}
        self.on_compatibility: Callable[[], None] = lambda: None
        self._handlers: dict[str, Handler] = {}
        self._links: dict[tuple[NodeId, bool], Link] = {}
        self._dialling: dict[tuple[NodeId, bool], trio.Lock] = {}
        self._outbound: set[Link] = set()  # those that run, retired ones included
        self._inbound: dict[NodeId, _Inbound] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def connected(self) -> int:
        """How many nodes there is a link to, from here or from there."""
        out = {peer for (peer, _), link in self._links.items() if not link.is_closed}
        return len(out | self._inbound.keys())

    @property
    def dialled_by(self) -> frozenset[NodeId]:
        """The nodes that have a connection to us which they made."""
        return frozenset(self._inbound)

    def handle(self, method: str, handler: Handler) -> None:
        """Answer exchanges of that method with `await handler(peer, request, stream)`."""
        self._handlers[method] = handler

    def answer(
        self,
        method: str,
        request_type: type[R],
        function: Callable[[NodeId, R], "object"],
    ) -> None:
        """Answer unary calls of that method with the value of `function(peer, request)`."""

        async def respond(peer: NodeId, request: bytes, stream: Stream) -> None:
            try:
                value = decode(request, request_type)
            except MalformedMessage as error:
                raise HandlerError("MALFORMED", str(error)) from None
            result = function(peer, value)
            if hasattr(result, "__await__"):
                result = await result
            await stream.send(encode(result))

        self.handle(method, respond)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the links until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def serve_member(self, stream: TlsStream, peer: NodeId) -> None:
        """Handle the exchanges of a member that dialled us, until it goes.

        Of more than MAX_LINKS_PER_MEMBER connections of a member, the oldest are closed.
        """
        inbound = self._inbound.setdefault(peer, _Inbound())
        link = Link(
            stream,
            peer,
            dialler=False,
            version=self._version,
            handlers=self._handlers,
            budget=inbound.budget,
        )
        inbound.links.append(link)
        for older in inbound.links[:-MAX_LINKS_PER_MEMBER]:
            older.close()
        try:
            await link.run()
        except IncompatibleVersion as error:
            self._note_compatibility(peer, str(error))
        except ProtocolError as error:
            log.warning("closing the link of %s: %s", short(peer), error)
        except LinkClosed:
            pass
        finally:
            inbound.links.remove(link)
            if not inbound.links:
                del self._inbound[peer]

    @asynccontextmanager
    async def open(
        self, node_id: NodeId, method: str, request: bytes, *, bulk: bool = False
    ) -> AsyncIterator[Stream]:
        """An exchange with another node; left early, it is cancelled there too.

        Raises:
          PeerUnreachable: there is no link and none can be made.
        """
        stream = await self._open(node_id, method, request, bulk)
        try:
            yield stream
        finally:
            stream.close()

    async def call(self, node_id: NodeId, method: str, request: object, answer_type: type[T]) -> T:
        """Ask one question and wait for the one answer. The caller sets the deadline.

        Raises:
          PeerUnreachable: the node cannot be reached, or was lost meanwhile.
          RemoteFailure: the node refused; `code` and `message` say why.
        """
        async with self.open(node_id, method, encode(request)) as stream:
            try:
                await stream.send_eof()
                answer = await stream.receive()
            except LinkClosed as error:
                raise PeerUnreachable(str(error)) from None
        if answer is None:
            raise RemoteFailure("NO_ANSWER", f"{short(node_id)} did not answer {method}")
        try:
            return decode(answer, answer_type)
        except MalformedMessage as error:
            raise RemoteFailure("MALFORMED", str(error)) from None

    def drop(self, node_id: NodeId) -> None:
        """Close all links that were dialled to a node (it left, or it does not answer any more)."""
        for link in [link for link in self._outbound if link.peer == node_id]:
            link.close()

    def expel(self, node_id: NodeId) -> None:
        """Close all links with a node, also those that it dialled."""
        self.drop(node_id)
        inbound = self._inbound.get(node_id)
        for link in inbound.links if inbound else ():
            link.close()

    async def _open(self, node_id: NodeId, method: str, request: bytes, bulk: bool) -> Stream:
        while True:
            link = await self._link_to(node_id, bulk)
            await link.wait_uncongested()
            try:
                return link.open(method, request)
            except StreamIdsSpent:  # meanwhile; the next round dials
                continue
            except (LinkClosed, TooManyStreams) as error:
                raise PeerUnreachable(str(error)) from None

    async def _link_to(self, node_id: NodeId, bulk: bool) -> Link:
        key = (node_id, bulk)
        link = self._links.get(key)
        if link is not None and link.is_usable:
            return link
        # One dialler at a time a peer; the others wait and use its link.
        async with self._dialling.setdefault(key, trio.Lock()):
            link = self._links.get(key)
            if link is not None and link.is_usable:
                return link
            fresh = self._links[key] = await self._dial(node_id)
            if link is not None:
                link.retire()
            return fresh

    async def _dial(self, node_id: NodeId) -> Link:
        address = self._address_of(node_id)
        if address is None or self._nursery is None:
            raise PeerUnreachable(f"{short(node_id)}… is not a member of this cluster")
        stream = await self._gate.dial(node_id, address)
        link = Link(stream, node_id, dialler=True, version=self._version)
        try:
            await self._nursery.start(self._run_link, link)
        except (ProtocolError, LinkClosed) as error:
            if isinstance(error, TurnedAway):
                self.on_turned_away(node_id, error.departed)
            if isinstance(error, IncompatibleVersion):
                self._note_compatibility(node_id, str(error))
            raise PeerUnreachable(f"{short(node_id)}…: {error}") from None
        self._note_compatibility(node_id, "")
        return link

    def _note_compatibility(self, peer: NodeId, reason: str) -> None:
        """Both dial again every second: what is known already is not said again."""
        if reason == self.incompatible.get(peer, ""):
            return
        if reason:
            self.incompatible[peer] = reason
            log.error("%s is shut out, its version does not fit: %s", short(peer), reason)
        else:
            del self.incompatible[peer]
            log.info("%s has a version that fits now", short(peer))
        self.on_compatibility()

    async def _run_link(
        self, link: Link, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        started = _Started(task_status)
        self._outbound.add(link)
        try:
            await link.run(task_status=started)
        except (ProtocolError, LinkClosed) as error:
            # Before the hellos the dialler sees the failure; afterwards the link's streams do.
            if not started.done:
                raise
            log.info("link to %s ended: %s", short(link.peer), error)
        finally:
            self._outbound.discard(link)
            for key in [key for key, kept in self._links.items() if kept is link]:
                del self._links[key]
            if started.done:
                self.on_link_lost(link.peer)


class _Inbound:
    """The links that one member made to us, oldest first, and what they may hold together."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.budget = Budget()


class _Started:
    """Remembers whether `started` was called, since trio does not tell."""

    def __init__(self, inner: trio.TaskStatus[None]) -> None:
        self._inner = inner
        self.done = False

    def started(self, value: None = None) -> None:
        self.done = True
        self._inner.started(value)
