"""Brings a file by several ranged requests at once, and only the pieces that are not here yet.

The target keeps what came through crashes and restarts, so a download never asks for a piece
that it has. Of a piece that breaks off the rest is asked for; only who ends the download loses the
pieces that are half here, one for each connection. A server without ranges is read from the start
on one connection; of what is here already the bytes must then come again, but are not written
again. Where neither a digest nor the server tells one version of a file from another, all of it
has to come in a single answer.
"""

import math
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

import httpx
import msgspec
import trio

from ollamad.core.pieces import MIB
from ollamad.sources.base import (
    NotFound,
    OriginUnreachable,
    Progress,
    RemoteFile,
    SourceError,
    Target,
)
from ollamad.sources.client import TryAgain, check_status, explain, number, shown, unwinding

CONNECTIONS: Final = 8  # at once; Ollama takes 16, and a home line is full with fewer
MAX_BUFFERED_BYTES: Final = 256 * MIB  # pieces in memory, before fewer connections are used
# What one request asks for: enough that its round trip does not count, and small enough that all
# connections stay busy until the end.
MIN_SPAN_BYTES: Final = 4 * MIB
MAX_SPAN_BYTES: Final = 128 * MIB
# In a row, without a chunk that is kept. The pauses between them are half a minute together: a
# router that begins anew, an address that changes.
MAX_FAILURES: Final = 7
# So much has to come in so much time, 1 kB/s: a byte now and then is no progress.
CHUNK_BYTES: Final = 64 * 1024
CHUNK_S: Final = 60.0
BACKOFF_S: Final = 0.5  # before the second attempt; doubles with each failure in a row
MAX_BACKOFF_S: Final = 15.0


class Opener(Protocol):
    """Opens an answer to a GET; `OriginClient.open`, with credentials if need be."""

    def __call__(
        self, url: str, headers: Mapping[str, str], *, vouched: bool
    ) -> AbstractAsyncContextManager[httpx.Response]: ...


@dataclass(slots=True, eq=False)
class Span:
    """Pieces in a row that are to come: from the first one up to but without the last."""

    first: int
    end: int
    begun: bytearray = field(default_factory=bytearray)  # what has come of the first

    def take(self) -> tuple[int, bytearray]:
        """The first piece, which is whole, and its index."""
        index, piece = self.first, self.begun
        self.first, self.begun = index + 1, bytearray()
        return index, piece


async def stat(open_url: Opener, file: RemoteFile) -> RemoteFile:
    """The file with what the server says of it: size, etag and the time of its last change.

    One byte is asked for, since servers that sign their URLs allow a GET only.

    Raises:
      SourceError: there is none, or its size is not told.
    """
    try:
        async with open_url(
            file.url, {"Range": "bytes=0-0"}, vouched=bool(file.digest)
        ) as response:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                size: int | None = 0
            else:
                check_status(response)
                size = _size(response)
            etag, modified = _etag(response), _modified(response)
    except (httpx.HTTPError, httpx.InvalidURL, TryAgain) as error:
        raise OriginUnreachable(explain(file.url, error)) from error
    if size is None:
        raise SourceError(
            f"{shown(file.url)} does not say how long it is, so it is not fetched; use another "
            "server that has it"
        )
    if file.size is not None and file.size != size:
        raise SourceError(
            f"{shown(file.url)} has {size:,} bytes, not the {file.size:,} that were announced; "
            "pull again, and if it stays so use another server that has it"
        )
    return msgspec.structs.replace(file, size=size, etag=etag, modified=modified)


async def download(
    open_url: Opener,
    file: RemoteFile,
    target: Target,
    progress: Progress,
    *,
    connections: int = CONNECTIONS,
) -> None:
    """Bring the pieces that the target lacks; see `Source.download`."""
    if file.size != target.map.size:
        raise SourceError(
            f"{shown(file.url)} has another size than the file that is received; pull it again"
        )
    run = _Download(open_url, file, target, progress)
    await run.go(connections)


class _Download:
    """One run of a download."""

    def __init__(
        self, open_url: Opener, file: RemoteFile, target: Target, progress: Progress
    ) -> None:
        self._open = open_url
        self._file = file
        self._target = target
        self._progress = progress
        self._spans: deque[Span] = deque()
        self._failures = 0  # in a row
        self._failed_at = -math.inf  # the last of them
        self._has_ranges = trio.Event()
        self._received = 0
        # Whether bytes of several answers may be put together.
        self._joins = bool(file.digest or file.version)
        # Whether of a piece that breaks off the rest comes: not once an answer began anew.
        self._goes_on = self._joins

    async def go(self, connections: int) -> None:
        piece_size = self._target.map.piece_size
        workers = max(1, min(connections, MAX_BUFFERED_BYTES // piece_size))
        if self._joins:
            self._plan(workers)
        elif any(self._target.have):
            raise ValueError("nobody can tell whether what is here is of the same file")
        elif self._target.have:
            self._spans.append(Span(0, len(self._target.have)))
        if not self._spans:
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lead, nursery.cancel_scope)
                for _ in range(1, min(workers, len(self._spans))):
                    nursery.start_soon(self._work_with_ranges)
        except BaseExceptionGroup as group:
            errors = list(_leaves(group))
            if any(isinstance(error, trio.Cancelled) for error in errors):
                raise
            raise errors[0] from None  # what one connection fails of ends all

    def _plan(self, workers: int) -> None:
        """Cut what is missing into spans."""
        sizes = self._target.map
        missing = [i for i, held in enumerate(self._target.have) if not held]
        left = sum(sizes.length_of(i) for i in missing)
        wanted = min(MAX_SPAN_BYTES, max(MIN_SPAN_BYTES, left // (4 * workers)))
        length = max(1, wanted // sizes.piece_size)
        start: int | None = None
        for index in missing:
            if start is None:
                start = index
            is_last = index + 1 >= len(self._target.have) or bool(self._target.have[index + 1])
            if is_last or index + 1 - start >= length:
                self._spans.append(Span(start, index + 1))
                start = None

    async def _lead(self, scope: trio.CancelScope) -> None:
        """Work, and have the others do so once the first answer shows that there are ranges."""
        await self._work()
        if not self._has_ranges.is_set():
            scope.cancel()

    async def _work_with_ranges(self) -> None:
        await self._has_ranges.wait()
        await self._work()

    async def _work(self) -> None:
        while self._spans:
            span = self._spans.popleft()
            begun, pause = trio.current_time(), 0.0
            try:
                await self._bring(span)
            except NotFound:
                raise SourceError(
                    f"there is no {shown(self._file.url)} any more; pull again, to see what there "
                    "is by now"
                ) from None
            except (httpx.TransportError, TryAgain) as error:
                # What breaks one connection breaks all: those that were open say nothing new.
                if begun > self._failed_at:
                    self._failures += 1
                    self._failed_at = trio.current_time()
                if not self._joins and any(self._target.have):
                    raise OriginUnreachable(
                        f"{shown(self._file.url)} broke off ({error}), and cannot be gone on with: "
                        "its server tells neither an ETag nor when it changed. Pull it again, or "
                        "add its digest (#sha256=…)"
                    ) from error
                if self._failures >= MAX_FAILURES:
                    raise OriginUnreachable(explain(self._file.url, error)) from error
                pause = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._failures - 1))
                if isinstance(error, TryAgain):
                    pause = max(pause, error.after_s)
                if not self._joins:
                    span.begun.clear()
                if span.first < span.end:
                    self._spans.appendleft(span)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise SourceError(explain(self._file.url, error)) from error
            await trio.sleep(pause)

    async def _bring(self, span: Span) -> None:
        sizes = self._target.map
        begin = span.first * sizes.piece_size + len(span.begun)
        end = min(span.end * sizes.piece_size, sizes.size)
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        # Where a digest says what is right, the etag or time of another mirror does not matter.
        if self._file.version and not self._file.digest:
            headers["If-Range"] = self._file.version
        async with self._open(self._file.url, headers, vouched=bool(self._file.digest)) as response:
            check_status(response)
            if self._is_partial(response, begin):
                self._has_ranges.set()
                await self._receive(response, span)
                return
            self._check_same(response, _size(response))
            # Without ranges all comes in one answer, on this connection.
            self._spans.clear()
            self._goes_on = False
            try:
                await self._receive(response, Span(0, len(self._target.have)))
            except BaseException:
                self._spans.append(Span(0, len(self._target.have)))
                raise

    async def _receive(self, response: httpx.Response, span: Span) -> None:
        """Take the pieces of an answer and write those that are missing."""
        async with unwinding(response.aiter_raw(CHUNK_BYTES)) as chunks:
            while data := await self._next(chunks):
                view = memoryview(data)
                self._received += len(data)
                self._progress(self._received)
                if self._goes_on and len(data) >= CHUNK_BYTES:
                    self._failures = 0  # which costs a chunk of the file each time, so it ends
                while view:
                    if span.first >= span.end:
                        raise SourceError(
                            f"{shown(self._file.url)} sends more than was asked for; use another "
                            "server that has it"
                        )
                    length = self._target.map.length_of(span.first)
                    part = view[: length - len(span.begun)]
                    span.begun += part
                    view = view[len(part) :]
                    if len(span.begun) == length:
                        await self._write(*span.take())
        if span.first < span.end:
            raise TryAgain("the answer ended early")

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes:
        """The next bytes of an answer; none at its end.

        Raises:
          TryAgain: they are too slow.
        """
        with trio.move_on_after(CHUNK_S):
            return await anext(chunks, b"")
        raise TryAgain(f"less than {CHUNK_BYTES:,} bytes came in {CHUNK_S:g} s")

    async def _write(self, index: int, data: bytearray) -> None:
        if not self._target.have[index]:
            await self._target.write_piece(index, data)
            self._failures = 0
            self._progress(self._received)

    def _is_partial(self, response: httpx.Response, begin: int) -> bool:
        """Whether this is the range that was asked for, rather than the whole file.

        Raises:
          SourceError: it is another range, or one of another file.
        """
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            return False
        text = response.headers.get("Content-Range", "")
        unit, _, rest = text.partition(" ")
        extent, _, total = rest.partition("/")
        if unit != "bytes" or not extent.startswith(f"{begin}-"):
            raise SourceError(
                f"{shown(self._file.url)} sends another range than was asked for; use another "
                "server that has it"
            )
        self._check_same(response, number(total))
        return True

    def _check_same(self, response: httpx.Response, size: int | None) -> None:
        changed = size is not None and size != self._target.map.size
        # Where a digest says what is right, another etag (of another mirror) does not matter.
        if self._file.version and not self._file.digest:
            name = "ETag" if self._file.etag else "Last-Modified"
            told = response.headers.get(name, "")
            # A part that is sent because the condition held need not say so again.
            is_silent = not told and response.status_code == httpx.codes.PARTIAL_CONTENT
            changed = changed or (told != self._file.version and not is_silent)
        if changed:
            raise SourceError(
                f"{shown(self._file.url)} has changed while it was fetched; pull it again, "
                "from the beginning"
            )


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _etag(response: httpx.Response) -> str:
    """The etag; "" for a weak one, which may stand for other bytes."""
    etag: str = response.headers.get("ETag", "")
    return "" if etag.startswith("W/") else etag


def _modified(response: httpx.Response) -> str:
    """The time of the last change; "" if the file may change once more in the same second."""
    modified: str = response.headers.get("Last-Modified", "")
    return "" if modified == response.headers.get("Date") else modified


def _size(response: httpx.Response) -> int | None:
    """The size of the whole file that an answer tells."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        return number(total)
    return number(response.headers.get("Content-Length", ""))
