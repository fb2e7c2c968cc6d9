"""One connection to another node with its multiplexed exchanges: trio around `wire/mux.py`.

A writer task sends what all exchanges produced in one go, so that no exchange ever holds a
half-sent record when it is cancelled (a cancelled `send_all` poisons a TLS stream).
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ollamad.core.ids import NodeId, short
from ollamad.wire.mux import (
    MAX_STREAMS,
    CreditReceived,
    Hello,
    HelloReceived,
    MessageReceived,
    MuxConnection,
    ProtocolError,
    StreamEnded,
    StreamOpened,
    StreamReset,
)

log = logging.getLogger(__name__)

RECEIVE_SIZE = 256 * 1024  # bytes asked of the socket at a time
MAX_OUTBOX = 2 << 20  # bytes waiting for the socket before senders wait: two full messages
HELLO_TIMEOUT_S = 5.0
# Bytes that a peer can make this side hold; the windows of all exchanges alone would allow 3 GiB.
# Where exchanges are handled, all that came in counts until the handler ends, since it may keep
# what it read; where they were opened, what was not read yet. Room for the longest request (64
# MiB in parts) and as much of others.
MAX_HELD = 128 << 20
MESSAGE_OVERHEAD = 64  # bytes that even an empty message takes
# Handlers that run, those included whose exchange the peer has reset and that still clean up: who
# opens and resets in a loop has no more of them than twice what it may have open.
MAX_HANDLERS = 2 * MAX_STREAMS
# Bytes of frames that wait for a peer that does not read. Messages and requests wait before they
# come here, so only answers to control frames pile up that high.
MAX_BACKLOG = 4 * MAX_OUTBOX

Handler = Callable[[NodeId, bytes, "Stream"], Awaitable[None]]


class LinkClosed(trio.BrokenResourceError):
    """The connection to the other node is gone."""


class RemoteFailure(trio.BrokenResourceError):
    """The other node ended the exchange with an error of its own."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class HandlerError(Exception):
    """Raised by a handler to end the exchange with a code and a message for the other node."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Budget:
    """How many bytes are held for a peer, on all of the links that share this."""

    def __init__(self) -> None:
        self.held = 0


class Stream:
    """One exchange: messages both ways, each direction ended on its own.

    Cancelling `send` or `receive` is safe: a message is either queued whole or not at all.
    """

    def __init__(self, link: "Link", stream_id: int) -> None:
        self._link = link
        self._id = stream_id
        self._inbox: deque[bytes] = deque()
        self.held = 0  # bytes of this exchange in what is held for the peer
        self._ended = False  # by the peer
        # Made anew each time: one that was raised holds the frames of its handler, and all in them.
        self._failure: Callable[[], trio.BrokenResourceError] | None = None
        self._changed = trio.Event()

    async def send(self, data: bytes) -> None:
        """Queue one message (at most MAX_MESSAGE bytes) when the peer gave credit for it.

        Raises:
          LinkClosed, RemoteFailure: the exchange is over (both trio.BrokenResourceError).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._failure is not None:
                raise self._failure()
            if not self._link.is_congested:
                if self._link.mux.can_send(self._id):
                    break
                await self._wait()
            else:
                await self._link.wait_uncongested()
        self._link.write(self._link.mux.message(self._id, data))

    async def receive(self) -> bytes | None:
        """The next message; None when the peer has ended its side.

        Raises:
          LinkClosed, RemoteFailure: the exchange is over (both trio.BrokenResourceError).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbox:
            if self._ended:
                return None
            if self._failure is not None:
                raise self._failure()
            await self._wait()
        return self._take()

    def receive_nowait(self) -> bytes | None:
        """The next message if one is here already, else None."""
        return self._take() if self._inbox else None

    async def send_eof(self) -> None:
        """Say that no more messages come from this side."""
        await trio.lowlevel.checkpoint()
        if self._failure is None:
            self._link.write(self._link.mux.end(self._id))

    def close(self, code: str = "CANCELLED", message: str = "the other side went away") -> None:
        """End the exchange if it is not over: the peer sees a failure, its handler is cancelled."""
        self._link.end_stream(self._id, code, message)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """End our side; what the peer still sends is dropped."""
        self._link.write(self._link.mux.end(self._id))
        self._link.end_stream(self._id, "DONE", "the handler has finished")

    def deliver(self, data: bytes) -> None:
        self._inbox.append(data)
        self._notify()

    def deliver_end(self) -> None:
        self._ended = True
        self._notify()

    def fail(self, failure: Callable[[], trio.BrokenResourceError]) -> None:
        self._failure = failure
        self._notify()

    def notify_credit(self) -> None:
        self._notify()

    def _take(self) -> bytes:
        data = self._inbox.popleft()
        self._link.let_go_read(self, data)
        self._link.write(self._link.mux.consumed(self._id, len(data)))
        return data

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait(self) -> None:
        await self._changed.wait()


class Link:
    """A connection to one peer. The dialler opens exchanges; the other side handles them.

    Links with the same `budget` hold MAX_HELD bytes together.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        peer: NodeId,
        *,
        dialler: bool,
        version: str,
        handlers: dict[str, Handler] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.peer = peer
        self._dialler = dialler
        self.mux = MuxConnection(dialler=dialler, version=version)
        self.peer_hello: Hello | None = None
        self._transport = transport
        self._handlers = {} if handlers is None else handlers  # may grow while it runs
        self._streams: dict[int, Stream] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._handling = 0  # see MAX_HANDLERS
        self._budget = Budget() if budget is None else budget
        self._retired = False
        self._outbox = bytearray()
        self._outbox_filled = trio.Event()
        self._outbox_drained = trio.Event()
        self._closed = False
        self._began = False  # the hellos were exchanged, and whoever waits was told
        self._cancel_scope: trio.CancelScope | None = None

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_usable(self) -> bool:
        """Whether an exchange can be opened, now or when others have ended."""
        return not self._closed and not self.mux.is_spent

    @property
    def is_congested(self) -> bool:
        return len(self._outbox) >= MAX_OUTBOX

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Move frames until the connection ends; started once hellos were exchanged.

        Raises:
          ProtocolError: the peer broke the protocol or speaks another version.
          LinkClosed: the connection failed before the link was started.
        """
        self.write(self.mux.hello())
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                self._cancel_scope = nursery.cancel_scope
                nursery.start_soon(self._write_loop)
                # Raised after the nursery: with the handlers' Cancelled it would make a group, in
                # which all that they held would stay until a collection of cycles.
                try:
                    await self._receive_all(nursery, task_status)
                except (ProtocolError, OSError, trio.BrokenResourceError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
            if isinstance(failure, ProtocolError):
                raise failure
            if not self._began:
                raise LinkClosed(str(failure or "the connection was lost"))
        finally:
            failure = None  # its traceback holds this frame
            self._end()
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(self._transport)

    async def _receive_all(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        with trio.move_on_after(HELLO_TIMEOUT_S) as hello_scope:
            await self._receive(nursery)
            while self.peer_hello is None and not self._closed:
                await self._receive(nursery)
        if hello_scope.cancelled_caught:
            raise ProtocolError(f"no hello within {HELLO_TIMEOUT_S} s")
        if self.is_closed:
            raise LinkClosed("the other node closed the connection")
        self._began = True
        task_status.started()
        while not self._closed:
            await self._receive(nursery)

    def close(self) -> None:
        """Drop the connection and all of its exchanges."""
        self._end()
        if self._cancel_scope is not None:
            self._cancel_scope.cancel()

    def retire(self) -> None:
        """Close the connection once the last of its exchanges has ended."""
        self._retired = True
        self._close_if_done()

    def open(self, method: str, request: bytes) -> Stream:
        """Begin an exchange; wait until the link is not congested first.

        Raises:
          LinkClosed: the connection is gone. TooManyStreams: too many exchanges run.
          StreamIdsSpent: the connection can have no more exchanges; `retire` it.
        """
        if self._closed:
            raise LinkClosed(f"the connection to {short(self.peer)} is closed")
        stream_id, frame = self.mux.open(method, request)
        stream = self._streams[stream_id] = Stream(self, stream_id)
        self.write(frame)
        return stream

    def write(self, frame: bytes) -> None:
        if frame and not self._closed:
            self._outbox += frame
            self._outbox_filled.set()

    async def wait_uncongested(self) -> None:
        """Wait while too many bytes wait for the socket; check `is_closed` afterwards."""
        while self.is_congested:
            await self._outbox_drained.wait()

    def let_go_read(self, stream: Stream, data: bytes) -> None:
        """A message was read."""
        if self._dialler and stream.held:  # else its handler ends it all, or it is over
            self._hold(stream, -len(data) - MESSAGE_OVERHEAD)

    def end_stream(self, stream_id: int, code: str, message: str) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self.write(self.mux.reset(stream_id, code, message))
            stream.fail(partial(LinkClosed, "the exchange was closed here"))
            self._forget(stream)

    def _hold(self, stream: Stream, size: int) -> None:
        """Count bytes (fewer if negative) that the peer has us keep for that exchange."""
        stream.held += size
        self._budget.held += size

    def _forget(self, stream: Stream) -> None:
        """An exchange is over; one that has a handler is held until that ends."""
        if self._dialler:
            self._hold(stream, -stream.held)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._streams:
            self.close()

    def _end(self) -> None:
        self._closed = True
        self._outbox.clear()
        self._outbox_drained.set()
        for stream in list(self._streams.values()):
            stream.fail(partial(LinkClosed, f"the connection to {short(self.peer)} was lost"))
        self._streams.clear()
        for scope in self._scopes.values():
            scope.cancel()

    async def _write_loop(self) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled = trio.Event()
            data, self._outbox = self._outbox, bytearray()
            self._outbox_drained.set()
            self._outbox_drained = trio.Event()
            if data:
                try:
                    await self._transport.send_all(data)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    self.close()

    async def _receive(self, nursery: trio.Nursery) -> None:
        data = await self._transport.receive_some(RECEIVE_SIZE)
        if not data:
            self._closed = True
            return
        for event in self.mux.receive_data(data):
            match event:
                case HelloReceived(hello):
                    self.peer_hello = hello
                case StreamOpened(stream_id, method, request):
                    stream = self._streams[stream_id] = Stream(self, stream_id)
                    if self._handling < MAX_HANDLERS and self._has_room(stream, request):
                        self._handling += 1
                        nursery.start_soon(self._handle, stream_id, stream, method, request)
                    else:
                        self._shed(stream_id)
                case MessageReceived(stream_id, message):
                    if (found := self._streams.get(stream_id)) is not None:
                        if self._has_room(found, message):
                            found.deliver(message)
                        else:
                            self._shed(stream_id)
                case StreamEnded(stream_id):
                    if (found := self._streams.get(stream_id)) is not None:
                        found.deliver_end()
                case StreamReset(stream_id, reset):
                    ended = self._streams.pop(stream_id, None)
                    if ended is not None:
                        ended.fail(partial(RemoteFailure, reset.code, reset.message))
                        self._forget(ended)
                    if (scope := self._scopes.get(stream_id)) is not None:
                        scope.cancel()
                case CreditReceived(stream_id):
                    if (found := self._streams.get(stream_id)) is not None:
                        found.notify_credit()
        if len(self._outbox) > MAX_BACKLOG:
            raise ProtocolError(f"{len(self._outbox)} bytes wait for a peer that does not read")

    def _has_room(self, stream: Stream, data: bytes) -> bool:
        """Count these bytes of the peer in, if the link may hold them."""
        size = len(data) + MESSAGE_OVERHEAD
        if self._budget.held + size > MAX_HELD:
            return False
        self._hold(stream, size)
        return True

    def _shed(self, stream_id: int) -> None:
        """End an exchange for which there is no room; the peer may try again later."""
        log.warning(
            "refusing an exchange of %s: it has %d handlers and %d bytes here",
            short(self.peer),
            self._handling,
            self._budget.held,
        )
        self.end_stream(stream_id, "OVERLOADED", "this node has too much of yours to do")
        if (scope := self._scopes.get(stream_id)) is not None:
            scope.cancel()

    async def _handle(self, stream_id: int, stream: Stream, method: str, request: bytes) -> None:
        try:
            if stream_id in self._streams:  # else given up before this task began
                await self._run_handler(stream_id, stream, method, request)
        finally:
            self._handling -= 1
            self._hold(stream, -stream.held)

    async def _run_handler(
        self, stream_id: int, stream: Stream, method: str, request: bytes
    ) -> None:
        handler = self._handlers.get(method)
        if handler is None:
            self.end_stream(stream_id, "UNKNOWN_METHOD", f"this node has no method {method!r}")
            return
        with trio.CancelScope() as scope:
            self._scopes[stream_id] = scope
            try:
                await handler(self.peer, request, stream)
            except HandlerError as error:
                self.end_stream(stream_id, error.code, error.message)
            except trio.BrokenResourceError:
                pass  # the peer went away in the middle; nobody is left to tell
            except Exception as error:
                log.exception("%s failed for %s", method, short(self.peer))
                self.end_stream(stream_id, "INTERNAL", f"{type(error).__name__}: {error}")
            finally:
                del self._scopes[stream_id]
        if stream_id in self._streams:
            stream.finish()
