"""Blobs on disk: what comes in whole, its pieces, what is cleared away, and the full disk."""

import errno
import hashlib
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from ollamad.core.pieces import MIB, PieceHasher, PieceMap
from ollamad.store import blobs, files, incoming
from ollamad.store.blobs import BlobStore
from ollamad.store.errors import (
    BlobMissing,
    DigestMismatch,
    InvalidDigest,
    PieceMapMissing,
    PieceMissing,
    SizeMismatch,
    StoreError,
    StoreFull,
    StoreUnusable,
)
from tests.fakes.piece_files import read_piece

DATA = bytes(range(256)) * 4096 * 3 + b"tail"  # three pieces of 1 MiB, and a short one
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


def map_of(data: bytes) -> PieceMap:
    hasher = PieceHasher(len(data))
    hasher.update(data)
    return hasher.finish()[1]


class Chunks:
    """The bytes in chunks; nothing to close when it is abandoned, unlike a generator."""

    def __init__(self, data: bytes, length: int = 100_000) -> None:
        self._chunks = [data[at : at + length] for at in range(0, len(data), length)]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._chunks:
            raise StopAsyncIteration
        return self._chunks.pop(0)


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


def names(store: BlobStore) -> set[str]:
    return {path.name for path in store.blobs.iterdir()}


BLOB = DIGEST.replace(":", "-")
COMPLETE = {BLOB, f"{BLOB}.pieces"}


async def test_an_imported_file_is_a_blob_with_its_pieces(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(DATA)
    seen: list[tuple[int, int | None]] = []
    digest, piece_map = await store.import_file(
        source, progress=lambda done, total: seen.append((done, total))
    )
    assert digest == DIGEST
    assert piece_map == map_of(DATA)
    assert store.blob_path(digest).read_bytes() == DATA
    assert await store.has_blob(digest)
    assert await store.blob_size(digest) == len(DATA)
    assert seen[-1] == (len(DATA), len(DATA))
    assert names(store) == COMPLETE
    assert source.read_bytes() == DATA
    assert store.space.promised == 0


async def test_importing_a_file_again_writes_nothing(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(DATA)
    first = await store.import_file(source)
    inode = store.blob_path(DIGEST).stat().st_ino
    monkeypatch.setattr(incoming, "write_all", None)  # would fail if it were called
    assert await store.import_file(source) == first
    assert store.blob_path(DIGEST).stat().st_ino == inode


async def test_another_file_of_the_same_size_is_imported(store: BlobStore, tmp_path: Path) -> None:
    for fill in (b"a", b"b"):
        (tmp_path / "file").write_bytes(fill * 5000)
        digest, _ = await store.import_file(tmp_path / "file")
        assert digest == f"sha256:{hashlib.sha256(fill * 5000).hexdigest()}"
    assert len(names(store)) == 2


async def test_an_empty_file_is_a_blob_without_pieces(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    digest, piece_map = await store.import_file(tmp_path / "empty")
    assert (len(piece_map), await store.blob_size(digest)) == (0, 0)


async def test_only_regular_files_are_imported(store: BlobStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "nothing", "No such file"),
    ):
        with pytest.raises(StoreError, match=message):
            await store.import_file(path)
    assert names(store) == set()


async def test_a_file_that_shrinks_during_the_import_is_refused(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(DATA)
    monkeypatch.setattr("ollamad.store.blobs.STEP_BYTES", MIB)

    def cut(done: int, total: int | None) -> None:
        os.truncate(source, done)

    with pytest.raises(SizeMismatch):
        await store.import_file(source, progress=cut)
    assert names(store) == set()


@pytest.mark.parametrize("size", [None, len(DATA)])
async def test_a_stream_is_taken_in(store: BlobStore, size: int | None) -> None:
    digest, piece_map = await store.ingest(Chunks(DATA), expected_digest=DIGEST, size=size)
    assert (digest, piece_map) == (DIGEST, map_of(DATA))
    assert store.blob_path(digest).read_bytes() == DATA
    assert names(store) == COMPLETE
    assert store.space.promised == 0


async def test_a_stream_for_a_blob_that_is_here_is_not_read(store: BlobStore) -> None:
    await store.ingest(Chunks(DATA))

    async def untouched() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    assert await store.ingest(untouched(), expected_digest=DIGEST) == (DIGEST, map_of(DATA))


@pytest.mark.parametrize("size", [None, len(DATA)])
async def test_a_wrong_digest_leaves_nothing_behind(store: BlobStore, size: int | None) -> None:
    wrong = f"sha256:{'0' * 64}"
    with pytest.raises(DigestMismatch) as caught:
        await store.ingest(Chunks(DATA), expected_digest=wrong, size=size)
    assert str(caught.value) == f'digest mismatch, expected "{wrong}", got "{DIGEST}"'
    assert names(store) == set()
    assert store.space.promised == 0


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
async def test_a_wrong_size_leaves_nothing_behind(store: BlobStore, size: int) -> None:
    with pytest.raises(SizeMismatch):
        await store.ingest(Chunks(DATA), size=size)
    assert names(store) == set()


async def test_what_the_stream_raises_comes_out_and_leaves_nothing(store: BlobStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield DATA[: 2 * MIB]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        await store.ingest(broken(), size=len(DATA))
    assert names(store) == set()
    assert store.space.promised == 0


async def test_a_cancelled_stream_leaves_nothing(store: BlobStore) -> None:
    started = trio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield DATA[: 2 * MIB]
        started.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.ingest, endless())
        await started.wait()
        assert any(name.endswith(".tmp") for name in names(store))
        nursery.cancel_scope.cancel()
    assert names(store) == set()
    assert store.space.promised == 0


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:" + "A" * 64,
        "sha256:../../../etc/passwd",
        "md5:" + "0" * 64,
        "sha256:" + "0" * 64 + "\n",
        "sha256-" + "0" * 64,
    ],
)
async def test_what_is_no_digest_never_becomes_a_path(store: BlobStore, digest: str) -> None:
    with pytest.raises(InvalidDigest):
        store.blob_path(digest)
    with pytest.raises(InvalidDigest):
        await store.ingest(Chunks(DATA), expected_digest=digest)
    with pytest.raises(InvalidDigest):
        await store.remove_blob(digest)
    assert names(store) == set()


async def test_a_blob_that_is_not_here(store: BlobStore) -> None:
    assert not await store.has_blob(DIGEST)
    assert await store.remove_blob(DIGEST) == 0
    for work in (store.blob_size, store.piece_map, store.open_piece_source):
        with pytest.raises(BlobMissing):
            await work(DIGEST)


# Piece maps and reading.


async def test_a_missing_or_broken_piece_map_is_made_again(store: BlobStore) -> None:
    await store.ingest(Chunks(DATA))
    path = store.blobs / f"{BLOB}.pieces"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for broken in (None, b"", b"\xc1garbage", good[:-1], bytes(flipped)):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(PieceMapMissing):
            await store.open_piece_source(DIGEST)
        assert await store.piece_map(DIGEST) == map_of(DATA)
        assert path.read_bytes() == good


async def test_a_map_that_the_disk_refuses_is_known_all_the_same(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise StoreFull(len(data), 0)

    monkeypatch.setattr(blobs, "write_atomically", full)
    await store.ingest(Chunks(DATA))
    assert names(store) == {BLOB}
    (await store.open_piece_source(DIGEST)).close()
    assert await BlobStore(store.root, keep_free_bytes=0).known_map(DIGEST) is None


async def test_nobody_waits_for_the_map_of_another_blob(store: BlobStore) -> None:
    small, _ = await store.put_bytes(b"a template")
    await store.ingest(Chunks(DATA))
    with trio.fail_after(5):
        async with store._mapping:  # a large one is being read
            for digest in (small, DIGEST):
                await store.piece_map(digest)
                (await store.open_piece_source(digest)).close()


async def test_a_blob_that_the_disk_changed_is_noticed_when_it_is_mapped(
    store: BlobStore,
) -> None:
    await store.ingest(Chunks(DATA))
    (store.blobs / f"{BLOB}.pieces").unlink()
    store.blob_path(DIGEST).write_bytes(DATA[:-1] + b"X")
    with pytest.raises(DigestMismatch):
        await store.piece_map(DIGEST)


async def test_pieces_of_a_complete_blob_are_read(store: BlobStore) -> None:
    _, piece_map = await store.ingest(Chunks(DATA))
    source = await store.open_piece_source(DIGEST)
    assert source.have == b"\1" * 4
    assert b"".join([read_piece(source, index) for index in range(4)]) == DATA
    for index in (-1, 4, 1 << 40):
        with pytest.raises(PieceMissing):
            read_piece(source, index)
    await store.remove_blob(DIGEST)
    assert read_piece(source, 3) == b"tail"  # whoever reads it right now can finish
    source.close()
    source.close()
    with pytest.raises(StoreError, match="closed"):
        read_piece(source, 0)
    assert piece_map == source.map


async def test_closing_while_a_read_is_under_way_lets_the_read_finish(store: BlobStore) -> None:
    await store.ingest(Chunks(DATA))
    source = await store.open_piece_source(DIGEST)
    with source.open_piece(0) as region:
        source.close()
        assert os.pread(region.descriptor, region.length, region.offset) == DATA[:MIB]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(region.descriptor)


# Preparing, freeing, room.


async def test_prepare_clears_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    other = "sha256-" + "1" * 64
    lost = "sha256-" + "2" * 64
    kept = {BLOB, f"{BLOB}.pieces", f"{other}.partial", f"{other}.journal", "README", "x.tmp"}
    kept |= {f"{BLOB}-partial", f"{BLOB}-partial-0"}  # a download of Ollama's own
    for name in kept | {f"{lost}.pieces", f"{lost}.partial", ".ollamad-00ff.tmp"}:
        (blobs / name).touch()
    (blobs / f"{'sha256-' + '3' * 64}.journal").touch()
    store = BlobStore(tmp_path)
    await store.prepare()
    assert names(store) == kept


async def test_a_root_that_cannot_be_written_has_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match=r"model directory .*/file cannot be used: Not a dir"):
        await BlobStore(tmp_path / "file").prepare()


async def test_a_read_only_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *rest: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(StoreUnusable, match="Read-only file system"):
        await BlobStore(tmp_path).prepare()


async def test_old_blobs_that_nobody_names_are_listed_and_removed(store: BlobStore) -> None:
    await store.ingest(Chunks(DATA))
    young, _ = await store.put_bytes(b"young")
    kept, _ = await store.put_bytes(b"kept")
    (store.blobs / "foreign").touch()
    piece_map = map_of(DATA[:-1])
    partial = await store.open_partial(f"sha256:{'7' * 64}", piece_map)
    long_ago = time.time() - 7200
    for digest in (DIGEST, kept):
        os.utime(store.blob_path(digest), (long_ago, long_ago))
    assert await store.blobs_except([kept]) == {DIGEST}
    assert await store.blobs_except([kept], grace_s=0) == {DIGEST, young}
    assert await store.remove_blob(DIGEST) == len(DATA)
    partial.close()
    left = {"foreign", f"sha256-{'7' * 64}.partial", f"sha256-{'7' * 64}.journal"}
    assert names(store) == left | {young.replace(":", "-"), kept.replace(":", "-")}


async def test_a_blob_that_comes_again_counts_as_young(store: BlobStore) -> None:
    await store.put_bytes(b"again")
    digest, _ = await store.put_bytes(b"again")
    os.utime(store.blob_path(digest), (0, 0))
    await store.put_bytes(b"again")
    assert await store.blobs_except([]) == set()


async def test_room_is_checked_before_a_byte_is_written(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA) - 1, 1 << 30))
    with pytest.raises(StoreFull) as caught:
        await store.ingest(Chunks(DATA), size=len(DATA))
    assert caught.value.needed_bytes == len(DATA)
    assert caught.value.free_bytes == len(DATA) - 1
    assert "3,145,732 bytes are needed, 3,145,731 are free" in str(caught.value)
    assert names(store) == set()


async def test_two_streams_do_not_count_on_the_same_room(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA) + 1000, 1 << 30))
    opened = incoming.Incoming(store, store.blobs, len(DATA))
    async with opened:
        with pytest.raises(StoreFull):
            await store.ingest(Chunks(DATA), size=len(DATA))
    assert names(store) == set()
    await store.ingest(Chunks(DATA), size=len(DATA))


async def test_a_margin_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (1000, 1 << 30))
    monkeypatch.setattr("ollamad.store.blobs.free_bytes_of", lambda directory: (1000, 1 << 30))
    store = BlobStore(tmp_path, keep_free_bytes=600)
    await store.prepare()
    assert await store.free_bytes() == 400
    assert await store.total_bytes() == 1 << 30
    with pytest.raises(StoreFull):
        await store.put_bytes(bytes(401))
    await store.put_bytes(bytes(400))


@pytest.mark.parametrize("size", [None, len(DATA)])
async def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> None:
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        files.write_all(descriptor, data, offset)

    monkeypatch.setattr(incoming, "write_all", full)
    with pytest.raises(StoreFull):
        await store.ingest(Chunks(DATA), size=size)
    assert names(store) == set()
    assert store.space.promised == 0


async def test_a_blob_appears_only_when_it_is_synced(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of durable steps: file, rename, directory."""
    steps: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("sync directory" if directory else "sync file")
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    await store.put_bytes(b"small")
    assert steps == ["sync file", "rename", "sync directory"]
