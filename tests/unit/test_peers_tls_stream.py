"""TLS of our own: trio's checks of a stream, peers that use `trio.SSLStream`, and errors."""

import datetime
import socket
import ssl
from pathlib import Path

import pytest
import trio
import trio.testing

from ollamad.core.state import CertificateAuthority
from ollamad.peers.identity import Identity, make_ca
from ollamad.peers.tls_stream import TlsStream
from tests.fakes.tls_nodes import TlsNode

MIB = 1 << 20


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    ca: CertificateAuthority = make_ca(datetime.datetime.now(datetime.UTC))
    return TlsNode(tmp_path / "node").enter(ca).identity


async def transports() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Both ends of a TCP connection with small buffers."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    port = listener.socket.getsockname()[1]
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", port)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        return near, await listener.accept()


async def shake_hands(*streams: TlsStream | trio.SSLStream[trio.SocketStream]) -> None:
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.do_handshake)


async def connected(identity: Identity) -> tuple[TlsStream, TlsStream]:
    near, far = await transports()
    client = TlsStream(near, identity.client_context())
    server = TlsStream(far, identity.server_context(), server_side=True)
    await shake_hands(client, server)
    return client, server


async def receive(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        assert part, f"it ended after {len(data)} bytes"
        data += part
    return data


async def test_it_is_a_stream_as_trio_wants_them(identity: Identity) -> None:
    async def make() -> tuple[TlsStream, TlsStream]:
        return await connected(identity)

    async def clogged() -> tuple[TlsStream, TlsStream]:
        near, far = await make()
        for stream in (near, far):
            with trio.move_on_after(0.2):  # until the kernel's buffers at both ends are full
                while True:
                    await stream.send_all(bytes(10_000))
            assert stream.has_unsent
        return near, far

    await trio.testing.check_two_way_stream(make, clogged)


@pytest.mark.parametrize("server_side", [False, True])
async def test_it_speaks_with_others(identity: Identity, server_side: bool) -> None:
    near, far = await transports()
    contexts = [identity.client_context(), identity.server_context()]
    ours = TlsStream(near, contexts[server_side], server_side=server_side)
    theirs = trio.SSLStream(
        far, contexts[not server_side], server_side=not server_side, https_compatible=True
    )
    await shake_hands(ours, theirs)
    data = bytes(range(256)) * 4096
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, data)
        assert await receive(theirs, len(data)) == data
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, data)
        assert await receive(ours, len(data)) == data
    assert bool(ours.peer_certificate())
    # A farewell of TLS is the end as well, and so is a mere end of the connection.
    with trio.move_on_after(0.2):
        await theirs.unwrap()
    assert await ours.receive_some(10) == b""
    await trio.aclose_forcefully(theirs)
    assert await ours.receive_some(10) == b""
    await ours.aclose()


async def test_a_sender_that_is_cancelled_leaves_the_stream_whole(identity: Identity) -> None:
    near, far = await connected(identity)
    async with near, far:
        sent = b""
        for number in range(20):
            part = bytes([number]) * 300_000
            with trio.move_on_after(0.01):
                await near.send_all(part)
            sent += part
        # What was encrypted comes; a record is never cut, so whatever follows can be read.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"end")
            received = b""
            while not received.endswith(b"end"):
                received += await far.receive_some(MIB)
        assert len(received) < len(sent), "nothing was cancelled"
        assert set(received[:-3]) <= set(sent)


async def test_what_the_kernel_does_not_take_at_once_waits(identity: Identity) -> None:
    near, far = await connected(identity)
    async with near, far:
        assert near.send_now(b"small")
        assert not near.has_unsent
        assert not near.send_now(bytes(4 * MIB))
        assert near.has_unsent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"")  # the rest
            assert await receive(far, 5 + 4 * MIB) == b"small" + bytes(4 * MIB)
        assert not near.has_unsent


async def test_a_sender_waits_for_a_reader_that_does_not_read(identity: Identity) -> None:
    near, far = await connected(identity)
    async with near, far:
        with trio.move_on_after(0.2) as patience:
            await near.send_all(bytes(64 * MIB))
        assert patience.cancelled_caught
        assert len(near._unsent) < MIB, "it does not pile up in memory"


async def test_a_peer_that_resets(identity: Identity) -> None:
    near, far = await connected(identity)
    far.transport_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await trio.aclose_forcefully(far)
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some(1)
    with pytest.raises(trio.BrokenResourceError):
        near.send_now(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x")
    await near.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await near.receive_some(1)
    with pytest.raises(trio.ClosedResourceError):
        near.send_now(b"x")


async def test_a_record_that_was_changed_on_its_way(identity: Identity) -> None:
    near, far = await connected(identity)
    async with near, far:
        near._tls.write(b"hello")
        record = bytearray(near._outgoing.read())
        record[-1] ^= 1
        await near.transport_stream.send_all(record)
        with pytest.raises(trio.BrokenResourceError) as broken:
            await far.receive_some(10)
        assert isinstance(broken.value.__cause__, ssl.SSLError)
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some(10)


async def test_a_peer_that_hangs_up_in_the_handshake(identity: Identity) -> None:
    near, far = await transports()
    stream = TlsStream(near, identity.client_context())
    await trio.aclose_forcefully(far)
    with pytest.raises(trio.BrokenResourceError):
        await stream.do_handshake()
    await trio.aclose_forcefully(stream)
