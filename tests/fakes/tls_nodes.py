"""Nodes with real keys, certificates and loopback sockets, and a cluster CA that lets them in."""

import datetime
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from ollamad.core.ids import NodeId
from ollamad.core.state import CertificateAuthority
from ollamad.peers.identity import Identity, issue_certificate
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream

Handler = Callable[[TlsStream, NodeId | None], Awaitable[None]]


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class TlsNode:
    """A node; in a cluster once `enter` was called."""

    def __init__(self, directory: Path) -> None:
        self.identity = Identity.load_or_create(directory)
        self.departed: set[NodeId] = set()
        self.gate = Gate(self.identity, lambda node_id: node_id not in self.departed)
        self.accepted: list[NodeId | None] = []
        self.refused: list[str] = []

    @property
    def id(self) -> NodeId:
        return self.identity.node_id

    def enter(self, ca: CertificateAuthority, *, at: datetime.datetime | None = None) -> "TlsNode":
        """Get a certificate of that CA, issued now or at another time."""
        pem = issue_certificate(ca, self.identity.public_key, at or utc_now())
        self.identity.install(pem, ca.certificate_pem)
        self.gate.refresh()
        return self

    async def listen(self, nursery: trio.Nursery, handler: Handler) -> str:
        """Accept on a free port and hand connections on; the address. Notes who was refused."""

        async def serve(transport: trio.SocketStream) -> None:
            try:
                stream, peer = await self.gate.accept(transport)
            except PeerUnreachable as error:
                self.refused.append(str(error))
                return
            self.accepted.append(peer)
            try:
                await handler(stream, peer)
            except (trio.BrokenResourceError, ssl.SSLError):
                pass
            finally:
                await trio.aclose_forcefully(stream)

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        return f"127.0.0.1:{listener.socket.getsockname()[1]}"


async def echo_once(stream: TlsStream, peer: NodeId | None) -> None:
    """Send back what comes first."""
    await stream.send_all(await stream.receive_some(100))


async def says(stream: TlsStream, text: bytes = b"hello") -> bool:
    """Whether the other side still talks to us (in TLS 1.3 it may refuse us after `dial`)."""
    try:
        await stream.send_all(text)
        return bytes(await stream.receive_some(100)) == text
    except trio.BrokenResourceError:
        return False
    finally:
        await trio.aclose_forcefully(stream)
