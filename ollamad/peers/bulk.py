"""Connections for bulk: one exchange each, used by blocking calls in threads.

Pieces are so many bytes that TLS, hashing and the disk would hold up the event loop, and with it
every token and heartbeat. So they come over connections of their own to the P2P port ("lanes",
see `wire/lane.py`), on which everything from the TLS handshake on happens in threads. Who may
open one was decided over the link between the nodes, which is always mutual TLS: it handed out a
ticket. With encryption the other side shows its certificate once more; without, the ticket is all
the proof there is, and whoever listens on the wire can read the pieces (they are checked by their
hashes in any case, so nobody can change them).
"""

import contextlib
import os
import secrets
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import trio

from ollamad.core.ids import NodeId, short
from ollamad.peers.identity import IdentityError
from ollamad.peers.tls import (
    DIAL_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    Gate,
    PeerUnreachable,
    split_address,
    watch_over,
)
from ollamad.wire.lane import (
    MAGIC,
    PREAMBLE,
    TICKET_SIZE,
    Mode,
    ProtocolViolation,
    decode_preamble,
    encode_preamble,
)

ARRIVAL_TIMEOUT_S = 10.0  # for the fetcher to connect after it got its ticket
SEND_TIMEOUT_S = 60.0  # for a peer to take some bytes; a live link does in milliseconds
# Bytes that wait in the kernel for the link. More would only make pieces late that others could
# pass on: they count as sent, but are not.
NOT_SENT_LOW_WATER = 128 * 1024
# Bytes that must have come before a thread is woken for them (but for the end of a message): on a
# slow link it would be woken for each packet, which costs more than all the rest.
READ_LOW_WATER = 32 * 1024
MAX_RECORD = 17 * 1024  # bytes of a TLS record, and some
RECORDS_BYTES = 256 * 1024  # read from the socket at once, and encrypted before they are sent
MAX_THREADS = 256  # each for one blocking call on one connection; what is served is bounded before

T = TypeVar("T")


class BulkConnection:
    """A connected socket, with TLS or without.

    All methods but `run`, `shut` and `close` block, so call them in what is given to `run`, one
    at a time. Their errors are OSErrors (ssl.SSLError is one) and EOFError.
    """

    def __init__(self, sock: socket.socket, threads: trio.CapacityLimiter) -> None:
        self._socket = sock
        self._threads = threads
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._buffer = memoryview(bytearray(0))
        self._low_water = 1
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._patience_ms: float | None = None  # for the other side to say something
        self.received = 0  # bytes, as they came over the network
        self._ended = threading.Event()

    async def run(self, work: Callable[[], T]) -> T:
        """Do blocking work on this connection in a thread.

        If cancelled, the connection is shut, so that the work fails, and is waited for.
        """
        done, place = False, _Place(self._threads)

        def in_thread() -> T:
            nonlocal done
            try:
                return work()
            finally:
                done = True

        try:
            return await trio.to_thread.run_sync(
                in_thread,
                abandon_on_cancel=True,
                limiter=place,  # type: ignore[arg-type]  # trio calls these two methods only
            )
        except trio.Cancelled:
            self.shut()
            with trio.CancelScope(shield=True):
                # Milliseconds, since nothing that it waits for is left; if it has begun at all.
                while place.taken and not done:  # noqa: ASYNC110 - the thread may not touch trio's events
                    await trio.sleep(0.001)
            raise

    def handshake(self, context: ssl.SSLContext, *, server_side: bool) -> bytes:
        """Begin TLS; returns the other side's certificate (DER), empty if it showed none."""
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._buffer = memoryview(bytearray(RECORDS_BYTES))
        self._patience_ms = 1000 * HANDSHAKE_TIMEOUT_S
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        self._patience_ms = None
        self._tls = tls
        return tls.getpeercert(binary_form=True) or b""

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it."""
        if self._tls is None:
            self._send_raw(data)
            return
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        self._flush()

    def send_file(self, head: bytes, descriptor: int, offset: int, size: int) -> None:
        """Send some bytes, and so many of a file after them.

        Raises:
          EOFError: the file is shorter; nothing usable can be sent any more.
        """
        if self._tls is not None:
            if len(self._buffer) < len(head) + size:
                self._buffer = memoryview(bytearray(len(head) + size))
            message = self._buffer[: len(head) + size]
            message[: len(head)] = head
            if os.preadv(descriptor, [message[len(head) :]], offset) != size:
                raise EOFError("the file is shorter than it should be")
            self.send(message)
            return
        self._send_raw(head, socket.MSG_MORE)
        end = offset + size
        while offset < end:
            sent = self._timed(os.sendfile, self._socket.fileno(), descriptor, offset, end - offset)
            if not sent:
                raise EOFError("the file is shorter than it should be")
            offset += sent

    def receive_into(self, view: memoryview) -> None:
        """Fill it.

        Raises:
          EOFError: the other side closed the connection.
        """
        if self._tls is None:
            while view:
                view = view[self._read_socket(view, len(view)) :]
            return
        while view:
            try:
                count: int = self._tls.read(len(view), view)  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                self._fill(len(view))
                continue
            if not count:
                raise EOFError("the other side closed the connection")
            view = view[count:]

    def pause(self, seconds: float) -> None:
        """Do nothing for so long, or until it is shut."""
        self._ended.wait(seconds)

    def shut(self) -> None:
        """Have the calls that block in other threads fail, and all later ones."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back, when no thread uses it any more."""
        self._socket.close()

    def _fill(self, expected: int = 0) -> None:
        """Read some of what will be so many bytes of data at least."""
        # OpenSSL may hold up to a record that it has taken in and that is not complete.
        count = self._read_socket(self._buffer, max(1, expected - MAX_RECORD))
        self._incoming.write(self._buffer[:count])

    def _read_socket(self, view: memoryview, sure: int) -> int:
        """Read what is there, once READ_LOW_WATER is or all of what will come for `sure`."""
        low_water = min(READ_LOW_WATER, sure)
        if low_water != self._low_water:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        # A read that blocks takes what is there, and then sleeps until as much as the low water has
        # come besides, which may be more than will ever come; poll counts what is there already.
        while True:
            if not self._readable.poll(self._patience_ms):
                raise TimeoutError("the other side says nothing")
            with contextlib.suppress(BlockingIOError):  # woken for nothing
                count = self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
                break
        if not count:
            raise EOFError("the other side closed the connection")
        self.received += count
        return count

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._send_raw(data)

    def _send_raw(self, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        view = memoryview(data)
        while view:
            view = view[self._timed(self._socket.send, view, flags) :]

    def _timed(self, call: Callable[..., int], *args: object) -> int:
        try:
            return call(*args)
        except BlockingIOError:
            raise TimeoutError(f"the peer took nothing for {SEND_TIMEOUT_S:g} s") from None

    def prepare(self) -> None:
        """Blocking, with a bound on how long a peer may take nothing."""
        self._socket.setblocking(True)
        timeout = struct.pack("ll", int(SEND_TIMEOUT_S), int(SEND_TIMEOUT_S % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)


class _Place:
    """A place in a limiter, which says whether it was taken: from then on a thread runs."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter
        self.taken = False

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._limiter.acquire_on_behalf_of(borrower)
        self.taken = True

    def release_on_behalf_of(self, borrower: object) -> None:
        self._limiter.release_on_behalf_of(borrower)


class Ticket:
    """A lane that a fetcher may open, once; made by `BulkPeers.expect`."""

    def __init__(self, peer: NodeId, *, plain: bool) -> None:
        self.peer = peer
        self.plain = plain
        self.token = secrets.token_bytes(TICKET_SIZE)
        self._arrived = trio.Event()
        self._is_void = False
        self._connection: BulkConnection | None = None

    async def arrived(self) -> BulkConnection:
        """Wait for the fetcher.

        Raises:
          PeerUnreachable: it did not come.
        """
        with trio.move_on_after(ARRIVAL_TIMEOUT_S):
            await self._arrived.wait()
        if self._connection is None:
            raise PeerUnreachable(f"{short(self.peer)}… did not open its lane")
        connection, self._connection = self._connection, None
        return connection

    def deliver(self, connection: BulkConnection) -> None:
        if self._is_void:  # the exchange has ended during the handshake
            connection.close()
            return
        self._connection = connection
        self._arrived.set()

    def void(self) -> None:
        self._is_void = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class BulkPeers:
    """Opens lanes to members, and takes those that members open."""

    def __init__(self, gate: Gate, *, address_of: Callable[[NodeId], str | None]) -> None:
        self._gate = gate
        self._address_of = address_of
        self._tickets: dict[bytes, Ticket] = {}
        self._threads = trio.CapacityLimiter(MAX_THREADS)

    async def dial(self, node_id: NodeId, token: bytes, *, plain: bool) -> BulkConnection:
        """Open the lane that a ticket is for.

        Raises:
          PeerUnreachable: no connection, or it is somebody else.
        """
        address = self._address_of(node_id)
        if address is None:
            raise PeerUnreachable(f"{short(node_id)}… is not a member of this cluster")
        host, port = split_address(address)
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                stream = await trio.open_tcp_stream(host, port)
        except (OSError, trio.TooSlowError) as error:
            raise PeerUnreachable(f"{address}: {error or 'timed out'}") from None
        connection = self._detach(stream)
        mode = Mode.PLAIN if plain else Mode.TLS

        def begin() -> bytes | None:
            connection.send(encode_preamble(mode, token))
            if plain:
                return None
            return connection.handshake(self._gate.client_tls(), server_side=False)

        await self._begin(connection, begin, node_id)
        return connection

    @contextlib.contextmanager
    def expect(self, peer: NodeId, *, plain: bool) -> Iterator[Ticket]:
        """A ticket for a lane of that member; void after the block."""
        ticket = Ticket(peer, plain=plain)
        self._tickets[ticket.token] = ticket
        try:
            yield ticket
        finally:
            self._tickets.pop(ticket.token, None)
            ticket.void()

    async def accept(self, stream: trio.SocketStream) -> None:
        """Take a connection that began with MAGIC, which is still to be read.

        Raises:
          PeerUnreachable: it has no ticket, or is of somebody else.
        """
        preamble = b""
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
            while len(preamble) < PREAMBLE.size:
                data = await stream.receive_some(PREAMBLE.size - len(preamble))
                if not data:
                    break
                preamble += data
        try:
            mode, token = decode_preamble(preamble)
        except ProtocolViolation as error:
            raise PeerUnreachable(f"a lane: {error}") from None
        ticket = self._tickets.get(token)
        if ticket is None or ticket.plain != (mode is Mode.PLAIN):
            raise PeerUnreachable("a lane without a ticket")
        del self._tickets[token]
        connection = self._detach(stream)

        def begin() -> bytes | None:
            if ticket.plain:
                return None
            return connection.handshake(self._gate.server_tls(), server_side=True)

        await self._begin(connection, begin, ticket.peer)
        ticket.deliver(connection)

    async def _begin(
        self, connection: BulkConnection, begin: Callable[[], bytes | None], node_id: NodeId
    ) -> None:
        try:
            shown = await connection.run(begin)
            if shown is not None:
                self._gate.check_certificate(shown, node_id)
        except (OSError, EOFError, IdentityError) as error:
            connection.close()
            raise PeerUnreachable(f"a lane: {error}") from None
        except BaseException:
            connection.close()
            raise

    def _detach(self, stream: trio.SocketStream) -> BulkConnection:
        """Take the socket out of the event loop."""
        watch_over(stream)
        sock = socket.socket(fileno=os.dup(stream.socket.fileno()))
        connection = BulkConnection(sock, self._threads)
        stream.socket.close()
        connection.prepare()
        return connection


def is_lane(first: bytes) -> bool:
    """Whether a connection that begins with that byte is for bulk (TLS begins with 0x16)."""
    return first == MAGIC[:1]
