"""Rotten blobs: found, put aside with what is right of them, and completed again."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from ollamad.core.pieces import MIB
from ollamad.store import scrub
from ollamad.store.blobs import BlobStore
from ollamad.store.scrub import Rot, Scrubber, discard_rotten

PIECES = [bytes([fill]) * MIB for fill in b"abc"] + [b"tail"]
DATA = b"".join(PIECES)
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
FAST = 1e12


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    await store.put_bytes(DATA)
    return store


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


async def test_what_is_right_is_left_alone(store: BlobStore) -> None:
    root = (await store.piece_map(DIGEST)).root()
    for trusted in (root, ""):
        assert await Scrubber(store, FAST).check(DIGEST, trusted) is None


@pytest.mark.parametrize("offset", [0, MIB + 7, len(DATA) - 1])
async def test_one_flipped_bit_costs_one_piece(store: BlobStore, offset: int) -> None:
    pieces = await store.piece_map(DIGEST)
    flip(store.blob_path(DIGEST), offset)
    scrubber = Scrubber(store, FAST)
    rot = await scrubber.check(DIGEST, pieces.root())
    assert rot is not None
    bad = offset // MIB
    assert set(rot.sound) == {0, 1, 2, 3} - {bad}
    assert rot.bad_bytes == pieces.length_of(bad)
    await scrubber.quarantine(DIGEST, rot)
    assert not await store.has_blob(DIGEST)
    # After a restart, too, only that piece is missing.
    again = BlobStore(store.root, keep_free_bytes=0)
    await again.prepare()
    blob = await again.open_partial(DIGEST, pieces)
    assert [index for index, held in enumerate(blob.have) if not held] == [bad]
    await blob.write_piece(bad, PIECES[bad])
    await blob.finish()
    assert again.blob_path(DIGEST).read_bytes() == DATA
    assert await Scrubber(again, FAST).check(DIGEST, pieces.root()) is None


@pytest.mark.parametrize("trusted", [True, False])
async def test_what_is_right_the_second_time_is_not_rotten(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    root = (await store.piece_map(DIGEST)).root() if trusted else ""
    real, flipped = scrub.read_exactly, False

    def flip_once(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal flipped
        data = real(descriptor, length, offset)
        if flipped:
            return data
        flipped = True
        return data[:-1] + b"?"

    monkeypatch.setattr(scrub, "read_exactly", flip_once)
    assert await Scrubber(store, FAST).check(DIGEST, root) is None
    assert flipped


async def test_what_cannot_be_read_is_no_verdict_unless_it_never_can(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(scrub, "read_exactly", fail)
    with pytest.raises(OSError, match="Input/output"):
        await Scrubber(store, FAST).check(DIGEST)
    assert await Scrubber(store, FAST).check(DIGEST, forgive_unreadable=False) is not None


@pytest.mark.parametrize("trusted", ["", "0" * 64])
async def test_without_a_map_to_trust_all_is_put_aside(store: BlobStore, trusted: str) -> None:
    flip(store.blob_path(DIGEST), 5)
    scrubber = Scrubber(store, FAST)
    rot = await scrubber.check(DIGEST, trusted)
    assert rot is not None
    assert rot.bad_bytes == len(DATA)
    await scrubber.quarantine(DIGEST, rot)
    assert not await store.has_blob(DIGEST)
    [aside] = store.blobs.glob("*.rotten")
    assert discard_rotten(store, 100.0, aside.stat().st_mtime + 99) == []
    await store.put_bytes(DATA)  # replaced: now it is of no use
    assert discard_rotten(store, 100.0, aside.stat().st_mtime) == [aside]


async def test_a_file_that_was_cut_short_is_rotten(store: BlobStore) -> None:
    pieces = await store.piece_map(DIGEST)
    os.truncate(store.blob_path(DIGEST), 2 * MIB)
    rot = await Scrubber(store, FAST).check(DIGEST, pieces.root())
    assert rot is not None


async def test_a_shelf_is_not_touched_and_does_not_count_any_more(
    store: BlobStore, tmp_path: Path
) -> None:
    ours = BlobStore(tmp_path / "ours", keep_free_bytes=0, shelves=[store.root])
    await ours.prepare()
    pieces = await ours.piece_map(DIGEST)
    flip(store.blob_path(DIGEST), 5)
    before = store.blob_path(DIGEST).read_bytes()
    scrubber = Scrubber(ours, FAST)
    rot = await scrubber.check(DIGEST, pieces.root())
    assert rot is not None
    await scrubber.quarantine(DIGEST, rot)
    assert store.blob_path(DIGEST).read_bytes() == before
    again = BlobStore(ours.root, keep_free_bytes=0, shelves=[store.root])
    await again.prepare()
    assert not await again.has_blob(DIGEST)
    discard_rotten(again, 0.0, 1e12)  # the mark stays
    await again.put_bytes(DATA)
    assert await again.find_blob(DIGEST) == again.blob_path(DIGEST)


async def test_what_was_freed_meanwhile_leaves_no_mark(store: BlobStore) -> None:
    rot = Rot(1, {}, None)
    await Scrubber(store, 1e12).quarantine(f"sha256:{'0' * 64}", rot)
    assert not list(store.blobs.glob("*.rotten"))


async def test_it_keeps_to_its_pace(store: BlobStore) -> None:
    """By the clock that it is given, which only its own pauses move here."""
    slept = 0.0
    clock = trio.testing.MockClock()
    real = trio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        await real(0)

    scrubber = Scrubber(store, MIB, clock=clock.current_time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ollamad.store.scrub.trio.sleep", sleep)
        await scrubber.check(DIGEST, (await store.piece_map(DIGEST)).root())
    assert slept == pytest.approx(4.0, abs=0.01)  # a second for each piece
