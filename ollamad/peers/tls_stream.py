"""TLS over a TCP socket of trio's, with as few passes of the event loop as can be.

Used between nodes, where messages are small and many: to send and to receive one takes a third of
the processor time that it takes with `trio.SSLStream`. What goes out is encrypted and given to the
kernel on the spot, without a lock and without a task in between; `send_now` does just that. So a
sender that is cancelled leaves the stream whole: its records are sent on by whoever comes next.
"""

import contextlib
import operator
import os
import ssl
from collections.abc import Iterator

import trio

ENCRYPT_BYTES = 64 * 1024  # at a time; what the kernel does not take of it waits in memory
READ_BYTES = 64 * 1024


class TlsStream(trio.abc.Stream):
    """One end of a connection; the handshake has to be done first.

    A peer that hangs up without TLS's farewell looks like one that ended: all that travels here
    says itself where it ends.
    """

    def __init__(
        self, transport: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool = False
    ) -> None:
        self.transport_stream = transport
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._unsent = bytearray()  # encrypted, in order
        self._sending = False  # a task waits for the kernel to take more
        self._closed = False
        self._broken = False

    def peer_certificate(self) -> bytes:
        """What the peer has shown, as DER; empty if nothing."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def do_handshake(self) -> None:
        """Agree on keys.

        Raises:
          BrokenResourceError: the peer refuses, or is no TLS peer; the cause says which.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    raise trio.BrokenResourceError("the peer hung up") from None
            except (ssl.SSLError, ssl.CertificateError) as error:
                self._broken = True
                self._try_flush()  # the alert, so that the peer knows why
                raise trio.BrokenResourceError from error
            else:
                await self._flush()
                return

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel has not taken all yet."""
        return bool(self._unsent)

    def send_now(self, data: bytes | bytearray | memoryview) -> bool:
        """Send, without waiting.

        Returns:
          Whether the kernel has taken it all; else the rest waits here for the next `send_all`.

        Raises:
          BrokenResourceError, ClosedResourceError
        """
        self._check()
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            self._broken = True
            raise trio.BrokenResourceError from error
        self._push()
        return not self._unsent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send it all. See `trio.abc.SendStream`; cancelled, it may have been sent in part."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._alone():
            view = memoryview(data)
            waited = await self._flush()
            for start in range(0, len(view), ENCRYPT_BYTES):
                self.send_now(view[start : start + ENCRYPT_BYTES])
                waited = await self._flush() or waited
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()
        with self._alone():
            await self._flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, or none at the end. See `trio.abc.ReceiveStream`.

        Raises:
          BrokenResourceError, ClosedResourceError
        """
        limit = READ_BYTES if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            self._check()
            try:
                data = self._tls.read(limit)
            except ssl.SSLWantReadError:
                self._push()  # an answer to a change of keys
                waited = True
                if not await self._fill():
                    return b""
            except ssl.SSLZeroReturnError:
                data = b""
                break
            except ssl.SSLError as error:
                self._broken = True
                self._try_flush()
                raise trio.BrokenResourceError from error
            else:
                break
        while data and len(data) < limit:
            # A record holds 16 KiB at most; take all that are here.
            try:
                more = self._tls.read(limit - len(data))
            except ssl.SSLError:  # nothing yet, the end, or an error: told by the next read
                break
            if not more:
                break
            data += more
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    async def aclose(self) -> None:
        """Hang up, without a farewell."""
        self._closed = True
        await self.transport_stream.aclose()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._broken:
            raise trio.BrokenResourceError("it broke earlier")

    async def _fill(self) -> bool:
        """Wait for bytes of the peer; False when it sends no more."""
        socket = self.transport_stream.socket
        while True:
            await trio.lowlevel.wait_readable(socket)
            try:
                data = os.read(socket.fileno(), READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._breaks(error) from error
            if data:
                self._incoming.write(data)
            return bool(data)

    async def _flush(self) -> bool:
        """Whether it had to wait."""
        self._push()
        waited = False
        while self._unsent:
            waited = True
            await trio.lowlevel.wait_writable(self.transport_stream.socket)
            self._push()
        return waited

    def _push(self) -> None:
        """Give the kernel what it takes."""
        self._check()
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        while self._unsent:
            try:
                sent = os.write(self.transport_stream.socket.fileno(), self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._breaks(error) from error
            del self._unsent[:sent]

    def _try_flush(self) -> None:
        broken, self._broken = self._broken, False
        try:
            self._push()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._broken = broken

    def _breaks(self, error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
        if self._closed:
            return trio.ClosedResourceError("it was closed meanwhile")
        self._broken = True
        return trio.BrokenResourceError(str(error))
