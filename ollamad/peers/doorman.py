"""Accepts the connections of other nodes: handshakes, limits, and errors that stay inside."""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from ollamad.core.ids import NodeId
from ollamad.peers.bulk import BulkPeers, is_lane
from ollamad.peers.tls import HANDSHAKE_TIMEOUT_S, Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.codec import MalformedMessage

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512  # of members and strangers that were accepted, per port
MAX_HANDSHAKES = 128  # under way at once; beyond that the oldest must go
MAX_HANDSHAKES_PER_HOST = 16  # so that one host cannot keep the others out
# Strangers whose handshake is done: they have seconds to join, and leave room for the members.
MAX_STRANGERS = 64
MAX_STRANGERS_PER_HOST = 16  # as many hosts behind one NAT may join at once

Serve = Callable[[TlsStream, NodeId | None, str], Awaitable[None]]


class Doorman:
    """Does the TLS handshake for each connection and hands it on; never lets an error out.

    Somebody who opens connections and says nothing holds a handshake until its time-out, so
    those are counted apart from the connections of members, by host, and the oldest gives way.
    Those without a member's certificate are counted apart too.
    """

    def __init__(
        self,
        gate: Gate,
        serve: Serve,
        farewell: Callable[[NodeId], bytes] | None = None,
        lanes: BulkPeers | None = None,
    ) -> None:
        self._gate = gate
        self._serve = serve
        self._lanes = lanes  # takes the connections that are for bulk
        self._farewell = farewell  # see `Gate.accept`
        self._connections = 0
        self._handshakes: dict[trio.CancelScope, str] = {}  # oldest first
        self._strangers: Counter[str] = Counter()  # by host

    async def accept(self, transport: trio.SocketStream) -> None:
        """Serve one connection to its end; fits `trio.serve_listeners`."""
        host = "?"
        try:
            host = transport.socket.getpeername()[0]
            await self._accept(transport, host)
        except PeerUnreachable as error:
            # A node that joins is dialled as soon as it is known, a moment before it has its
            # certificate.
            level = logging.WARNING if self._gate.is_member else logging.DEBUG
            log.log(level, "closing a connection of %s: %s", host, error)
        except MalformedMessage as error:
            log.warning("closing a connection of %s: %s", host, error)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.info("a connection of %s ended: %s", host, error)
        except Exception:
            log.exception("a connection of %s failed", host)

    async def _accept(self, transport: trio.SocketStream, host: str) -> None:
        if self._connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(transport)
            raise PeerUnreachable(f"there are {MAX_CONNECTIONS} connections already")
        self._make_way(host)
        accepted: tuple[TlsStream, NodeId | None] | None = None
        with trio.CancelScope() as scope:
            self._handshakes[scope] = host
            try:
                if self._lanes is not None and await self._is_lane(transport):
                    await self._lanes.accept(transport)
                    return
                accepted = await self._gate.accept(transport, self._farewell)
            finally:
                self._handshakes.pop(scope, None)
        if accepted is None:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(transport)
            raise PeerUnreachable("too many handshakes at once")
        stream, peer = accepted
        self._connections += 1
        try:
            if peer is None:
                await self._serve_stranger(stream, host)
            else:
                await self._serve(stream, peer, host)
        finally:
            self._connections -= 1
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(stream)

    async def _is_lane(self, transport: trio.SocketStream) -> bool:
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
            return is_lane(await transport.socket.recv(1, trio.socket.MSG_PEEK))
        raise PeerUnreachable("handshake failed: timed out")

    async def _serve_stranger(self, stream: TlsStream, host: str) -> None:
        if (
            self._strangers[host] >= MAX_STRANGERS_PER_HOST
            or self._strangers.total() >= MAX_STRANGERS
        ):
            raise PeerUnreachable("too many connections without a member's certificate")
        self._strangers[host] += 1
        try:
            await self._serve(stream, None, host)
        finally:
            self._strangers[host] -= 1
            if not self._strangers[host]:
                del self._strangers[host]

    def _make_way(self, host: str) -> None:
        """End the oldest handshake of that host, or of all, if there are too many."""
        same = [scope for scope, other in self._handshakes.items() if other == host]
        if len(same) >= MAX_HANDSHAKES_PER_HOST:
            oldest = same[0]
        elif len(self._handshakes) >= MAX_HANDSHAKES:
            oldest = next(iter(self._handshakes))
        else:
            return
        del self._handshakes[oldest]
        oldest.cancel()
