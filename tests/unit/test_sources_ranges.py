"""Downloads by several ranged requests, over lines that break on a virtual clock."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from trio.testing import MockClock

from ollamad.core.pieces import HASH_SIZE, MIB, PieceMap
from ollamad.sources import ranges
from ollamad.sources.base import OriginUnreachable, RemoteFile

COUNT = 16  # pieces
CONNECTIONS = 8


class Pieces:
    """A target that only counts."""

    def __init__(self) -> None:
        self.map = PieceMap(COUNT * MIB, MIB, bytes(COUNT * HASH_SIZE))
        self.have = bytearray(COUNT)

    async def write_piece(self, index: int, data: bytes | bytearray) -> bool:
        assert len(data) == MIB
        self.have[index] = 1
        return True


class Line:
    """The way to an origin: it breaks once all connections are in use, for some seconds."""

    def __init__(self, away_s: float) -> None:
        self._away_s = away_s
        self._back_at = 0.0
        self._broken = trio.Event()
        self._used = 0

    @asynccontextmanager
    async def open(
        self, url: str, headers: Mapping[str, str], *, vouched: bool
    ) -> AsyncIterator[httpx.Response]:
        await trio.lowlevel.checkpoint()
        if trio.current_time() < self._back_at:
            raise httpx.ConnectError("no route")
        first, _, last = headers["Range"].removeprefix("bytes=").partition("-")
        told = {"Content-Range": f"bytes {first}-{last}/{COUNT * MIB}"}
        yield httpx.Response(206, headers=told, content=self._body(int(last) + 1 - int(first)))

    async def _body(self, size: int) -> AsyncIterator[bytes]:
        if not self._broken.is_set():
            self._used += 1
            if self._used == CONNECTIONS:
                self._back_at = trio.current_time() + self._away_s
                self._broken.set()
            await self._broken.wait()
            raise httpx.ReadError("reset")
        yield bytes(size)


@pytest.mark.parametrize(("away_s", "comes"), [(30.0, True), (60.0, False)])
async def test_what_breaks_all_connections_is_one_failure(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, away_s: float, comes: bool
) -> None:
    monkeypatch.setattr(ranges, "MIN_SPAN_BYTES", MIB)
    target, line = Pieces(), Line(away_s)
    file = RemoteFile("https://x/a.gguf", COUNT * MIB, "sha256:" + "0" * 64)

    async def download() -> None:
        await ranges.download(
            line.open, file, target, lambda received: None, connections=CONNECTIONS
        )

    if comes:
        await download()
    else:
        with pytest.raises(OriginUnreachable, match="no route"):
            await download()
    assert all(target.have) == comes


@pytest.mark.parametrize("has_ranges", [True, False])
async def test_breaks_count_only_if_they_bring_nothing(
    autojump_clock: MockClock, has_ranges: bool
) -> None:
    """What begins anew with each answer brings the same bytes again, and must end."""
    target = Pieces()

    async def body() -> AsyncIterator[bytes]:
        yield bytes(ranges.CHUNK_BYTES)
        raise httpx.ReadError("reset")

    @asynccontextmanager
    async def open_url(
        url: str, headers: Mapping[str, str], *, vouched: bool
    ) -> AsyncIterator[httpx.Response]:
        await trio.lowlevel.checkpoint()
        told = {"Content-Range": headers["Range"].replace("=", " ") + f"/{COUNT * MIB}"}
        if has_ranges:
            yield httpx.Response(206, headers=told, content=body())
        else:
            yield httpx.Response(200, content=body())

    file = RemoteFile("https://x/a.gguf", COUNT * MIB, "sha256:" + "0" * 64)
    if has_ranges:
        await ranges.download(open_url, file, target, lambda received: None)
    else:
        with pytest.raises(OriginUnreachable, match="reset"):
            await ranges.download(open_url, file, target, lambda received: None)
    assert all(target.have) == has_ranges
