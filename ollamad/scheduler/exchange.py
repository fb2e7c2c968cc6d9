"""How requests and events travel between nodes: batches of events, long requests in parts."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec
import trio

from ollamad.core.ids import NodeId, short
from ollamad.core.inference import Embeddings, Event, Failed, InferenceError
from ollamad.wire.codec import MalformedMessage, decode, encode

GENERATE = "infer.generate"
EMBED = "infer.embed"
TRANSCRIPT = "infer.transcript"

PART_SIZE = 512 << 10  # bytes; longer requests and answers travel in parts of this size
MAX_WHOLE = 64 << 20  # bytes of all parts: 2000 embeddings of 3000 numbers
MAX_BATCH = 64  # events in a message

_BATCH: Any = list[Event]
# How a node that is lost, or talks nonsense, shows.
LOSSES = (OSError, trio.BrokenResourceError, MalformedMessage)


class EventSource(Protocol):
    """The events of a generation, up to Finished or Failed."""

    async def receive(self) -> Event: ...
    def receive_nowait(self) -> Event: ...


class PeerStream(Protocol):
    async def send(self, data: bytes) -> None: ...
    async def send_eof(self) -> None: ...
    async def receive(self) -> bytes | None: ...
    def receive_nowait(self) -> bytes | None: ...


class Peers(Protocol):
    def open(
        self, node_id: NodeId, method: str, request: bytes
    ) -> AbstractAsyncContextManager[PeerStream]: ...


class EmbedAnswer(msgspec.Struct, frozen=True):
    """Embeddings, or why there are none."""

    embeddings: Embeddings | None = None
    failed: Failed | None = None

    @classmethod
    def of(cls, answer: Embeddings | Failed) -> "EmbedAnswer":
        if isinstance(answer, Failed):
            return cls(failed=answer)
        return cls(embeddings=answer)


class RemoteEvents:
    """The events of a generation on another node: each message is a batch of them."""

    def __init__(self, stream: PeerStream) -> None:
        self._stream = stream
        self._batch: list[Event] = []  # reversed

    async def receive(self) -> Event:
        while not self._batch:
            data = await self._stream.receive()
            if data is None:
                raise trio.EndOfChannel
            self._fill(data)
        return self._batch.pop()

    def receive_nowait(self) -> Event:
        while not self._batch:
            data = self._stream.receive_nowait()
            if data is None:
                raise trio.WouldBlock
            self._fill(data)
        return self._batch.pop()

    def _fill(self, data: bytes) -> None:
        self._batch = decode(data, _BATCH)
        self._batch.reverse()


async def send_events(events: EventSource, stream: PeerStream) -> None:
    """Send events as they come, those that are there already in one message."""
    while True:
        try:
            batch = [await events.receive()]
        except trio.EndOfChannel:
            return
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while len(batch) < MAX_BATCH:
                batch.append(events.receive_nowait())
        await stream.send(encode(batch))


@asynccontextmanager
async def ask(
    peers: Peers, node_id: NodeId, method: str, request: bytes
) -> AsyncIterator[PeerStream]:
    """An exchange with a whole request; a long one goes in parts behind the opening."""
    if len(request) > MAX_WHOLE:
        raise InferenceError(
            Failed("REQUEST_TOO_LARGE", f"the request is over {MAX_WHOLE >> 20} MiB", 413)
        )
    head, rest = (request, b"") if len(request) <= PART_SIZE else (b"", request)
    async with peers.open(node_id, method, head) as stream:
        await send_whole(stream, rest)
        await stream.send_eof()
        yield stream


async def send_whole(stream: PeerStream, data: bytes) -> None:
    """Send bytes of any length, in parts."""
    for start in range(0, len(data), PART_SIZE):
        await stream.send(data[start : start + PART_SIZE])


async def receive_whole(stream: PeerStream) -> bytes:
    """All messages up to the end, as one."""
    whole = bytearray()
    while (part := await stream.receive()) is not None:
        whole += part
        if len(whole) > MAX_WHOLE:
            raise MalformedMessage(f"more than {MAX_WHOLE} bytes")
    return bytes(whole)


def lost(node_id: NodeId, error: BaseException) -> Failed:
    """What is told of a node that was lost."""
    return Failed(
        "NODE_LOST",
        f"node {short(node_id)}… was lost: {str(error) or type(error).__name__}",
        503,
        {"node_id": node_id},
    )
