"""TLS between nodes: dialling a member, accepting one, and telling strangers apart."""

import ssl
from collections.abc import Callable
from contextlib import suppress

import trio

from ollamad.core.ids import NodeId, short
from ollamad.peers.identity import Identity, IdentityError, PeerCertificate, peer_certificate
from ollamad.peers.tls_stream import TlsStream

DIAL_TIMEOUT_S = 3.0  # TCP and TLS to a LAN neighbour take milliseconds
HANDSHAKE_TIMEOUT_S = 5.0  # for those who dial us; half-open connections end here
FAREWELL_TIMEOUT_S = 1.0  # for a node that left to read that it did
MAX_FAREWELL_READS = 4  # of what it says meanwhile: a hello
TCP_USER_TIMEOUT_MS = 5000  # a peer that lost power is noticed when it owes us an ACK
# A node that only answers owes its peer nothing; without probes it would keep the connection of
# one that lost power for ever.
KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 5
_TCP_USER_TIMEOUT = 18  # from linux/tcp.h; trio.socket does not name it


class PeerUnreachable(OSError):
    """The other node cannot be reached now, or refuses us; the message says why."""


class Gate:
    """This node's side of every TLS connection between nodes.

    Args:
      is_welcome: says of an id whose certificate our CA signed whether it may still talk to us
        (a node that left may not).
      on_newer: is told when a node proved that it is of a later incarnation of this cluster, and
        of which: the cluster was recovered without this node.
    """

    def __init__(
        self,
        identity: Identity,
        is_welcome: Callable[[NodeId], bool],
        *,
        on_newer: Callable[[NodeId, int], None] = lambda peer, incarnation: None,
    ) -> None:
        self._identity = identity
        self._is_welcome = is_welcome
        self._on_newer = on_newer
        self.refresh()

    @property
    def is_member(self) -> bool:
        """Whether this node has a certificate of a cluster."""
        return self._client is not None

    def refresh(self) -> None:
        """Use the certificate as it is on disk now (after a join or a renewal)."""
        self._server = self._identity.server_context()
        self._client = self._identity.client_context() if self._identity.is_member else None
        self._incarnation = self._identity.incarnation
        self._stranger = self._identity.stranger_context()

    async def dial(self, node_id: NodeId, address: str) -> TlsStream:
        """Connect to that member at `host:port` and check that it holds the id's key.

        Raises:
          PeerUnreachable: no connection within DIAL_TIMEOUT_S, it is somebody else, or it is of
            another incarnation of the cluster.
        """
        assert self._client is not None, "a node without a cluster has no members to dial"
        stream = await self._connect(address, self._client)
        try:
            found = _certificate_of(stream)
            assert found is not None, "a TLS server always shows a certificate"
            if found.node_id != node_id:
                raise PeerUnreachable(
                    f"{address} is node {short(found.node_id)}…, not {short(node_id)}…"
                )
            self._check_incarnation(found)
        except (PeerUnreachable, IdentityError) as error:
            await trio.aclose_forcefully(stream)
            raise PeerUnreachable(str(error)) from None
        return stream

    async def dial_stranger(self, address: str) -> TlsStream:
        """Connect to `host:port` without checking who it is (the join exchange does that)."""
        return await self._connect(address, self._stranger)

    async def accept(
        self, transport: trio.SocketStream, farewell: Callable[[NodeId], bytes] | None = None
    ) -> tuple[TlsStream, NodeId | None]:
        """Do the handshake with somebody who dialled us.

        Args:
          farewell: what to send to a node that left, before its connection is closed.

        Returns:
          The stream, and the member's id; None for somebody without a certificate.

        Raises:
          PeerUnreachable: no TLS, a certificate of another cluster or of another incarnation of
            this one, or of a node that left.
        """
        watch_over(transport)
        stream = TlsStream(transport, self._server, server_side=True)
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                await stream.do_handshake()
            shown = _certificate_of(stream)
        except (trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError, OSError) as error:
            await trio.aclose_forcefully(stream)
            raise PeerUnreachable(f"handshake failed: {_reason(error)}") from None
        except IdentityError as error:
            await trio.aclose_forcefully(stream)
            raise PeerUnreachable(str(error)) from None
        if shown is None:
            return stream, None
        try:
            self._check_incarnation(shown)
            if not self._is_welcome(shown.node_id):
                if farewell is not None:
                    await _part(stream, farewell(shown.node_id))
                raise PeerUnreachable(f"node {short(shown.node_id)}… is not a member any more")
        except PeerUnreachable:
            await trio.aclose_forcefully(stream)
            raise
        return stream, shown.node_id

    # For connections that are not the event loop's: see `bulk.py`.

    def client_tls(self) -> ssl.SSLContext:
        """What a node that dials shows and checks."""
        assert self._client is not None, "a node without a cluster has no members to dial"
        return self._client

    def server_tls(self) -> ssl.SSLContext:
        """What a node that is dialled shows and checks; those without a certificate pass it."""
        return self._server

    def check_certificate(self, der: bytes, node_id: NodeId) -> None:
        """Check that the other end is that member.

        Raises:
          PeerUnreachable, IdentityError: it is somebody else, or of another incarnation.
        """
        shown = peer_certificate(der) if der else None
        if shown is None or shown.node_id != node_id:
            raise PeerUnreachable(f"it is not node {short(node_id)}…")
        self._check_incarnation(shown)

    def _check_incarnation(self, shown: PeerCertificate) -> None:
        """Refuse a node that this cluster's recovery left behind, or that left us behind."""
        if shown.incarnation > self._incarnation:
            self._on_newer(shown.node_id, shown.incarnation)
            raise PeerUnreachable(
                f"node {short(shown.node_id)}… recovered the cluster without this node"
            )
        if shown.incarnation < self._incarnation:
            raise PeerUnreachable(
                f"node {short(shown.node_id)}… is of the time before the cluster was recovered; "
                "it must join again"
            )

    async def _connect(self, address: str, context: ssl.SSLContext) -> TlsStream:
        host, port = split_address(address)
        stream: TlsStream | None = None
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                transport = await trio.open_tcp_stream(host, port)
                watch_over(transport)
                stream = TlsStream(transport, context)
                await stream.do_handshake()
        except (trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError, OSError) as error:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            raise PeerUnreachable(f"{address}: {_reason(error)}") from None
        except trio.Cancelled:
            if stream is not None:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)
            raise
        return stream


def peer_of(stream: TlsStream) -> NodeId | None:
    """The id of who is on the other end, by its certificate; None if it showed none."""
    shown = _certificate_of(stream)
    return None if shown is None else shown.node_id


def _certificate_of(stream: TlsStream) -> PeerCertificate | None:
    der = stream.peer_certificate()
    return peer_certificate(der) if der else None


async def _part(stream: TlsStream, last_words: bytes) -> None:
    """Send that, and give the other end a moment to read it and hang up; it is not listened to."""
    with trio.move_on_after(FAREWELL_TIMEOUT_S), suppress(trio.BrokenResourceError):
        await stream.send_all(last_words)
        # To close with bytes unread would reset the connection, and ours might be lost with it.
        for _ in range(MAX_FAREWELL_READS):
            if not await stream.receive_some(4096):
                break


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`.

    Raises:
      PeerUnreachable: it is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise PeerUnreachable(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def watch_over(stream: trio.SocketStream) -> None:
    """Have the kernel end a connection whose other end is gone."""
    tcp = trio.socket.IPPROTO_TCP
    stream.setsockopt(tcp, _TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE, 1)
    stream.setsockopt(tcp, trio.socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    stream.setsockopt(tcp, trio.socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)


def _reason(error: BaseException) -> str:
    """Why a connection failed, in words for the log; clocks are named where they are at fault."""
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
    if isinstance(cause, OSError) and isinstance(cause.__cause__, BaseExceptionGroup):
        cause = cause.__cause__.exceptions[0]  # one for each address that was tried
    if isinstance(cause, trio.TooSlowError):
        return "timed out"
    if isinstance(cause, ssl.SSLCertVerificationError):
        text = cause.verify_message
        if "not yet valid" in text or "expired" in text:
            return f"{text}; compare the clocks of both machines (NTP)"
        return f"{text}: a certificate of another cluster"
    if isinstance(cause, ssl.SSLError):
        return (cause.reason or str(cause)).lower().replace("_", " ")
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return str(cause or error) or type(error).__name__
