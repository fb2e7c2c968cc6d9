"""Blobs that arrive in pieces: only what is verified and synced is believed, whatever happens."""

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from ollamad.core.pieces import MIB, PieceHasher, PieceMap
from ollamad.store import files, journal, partial
from ollamad.store.blobs import BlobStore
from ollamad.store.errors import (
    BeingReceived,
    BlobMissing,
    DigestMismatch,
    InvalidPieceMap,
    PieceCorrupt,
    PieceMissing,
    PiecesRotten,
    StoreError,
    StoreFull,
)
from tests.fakes.piece_files import read_piece

PIECES = [bytes([fill]) * MIB for fill in b"abc"] + [b"tail"]
DATA = b"".join(PIECES)
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
BLOB = DIGEST.replace(":", "-")


def map_of(data: bytes) -> PieceMap:
    hasher = PieceHasher(len(data))
    hasher.update(data)
    return hasher.finish()[1]


MAP = map_of(DATA)
RECORD = 40  # bytes of the journal for each piece


@pytest.fixture
async def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


def names(store: BlobStore) -> set[str]:
    return {path.name for path in store.blobs.iterdir()}


async def reopened(store: BlobStore) -> BlobStore:
    """What another process would see: nothing of the first one's memory."""
    again = BlobStore(store.root, keep_free_bytes=0)
    await again.prepare()
    return again


async def test_pieces_in_any_order_make_the_blob(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    for done, index in enumerate([3, 0, 2, 1], start=1):
        assert not blob.complete
        assert await blob.write_piece(index, PIECES[index])
        assert blob.have_count == done
    assert blob.complete
    assert blob.have_bytes == len(DATA)
    await blob.finish()
    assert store.blob_path(DIGEST).read_bytes() == DATA
    assert names(store) == {BLOB, f"{BLOB}.pieces"}
    assert await store.piece_map(DIGEST) == MAP
    assert store.space.promised == 0
    assert await store.partials() == []


async def test_many_tasks_may_write_and_read_at_once(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    new: list[bool] = []

    async def write(index: int) -> None:
        new.append(await blob.write_piece(index, PIECES[index]))
        assert read_piece(blob, index) == PIECES[index]

    async with trio.open_nursery() as nursery:
        for index in (0, 0, 1, 2, 3, 3):  # in the end game a piece comes twice
            nursery.start_soon(write, index)
    assert sorted(new) == [False, False, True, True, True, True]
    assert (blob.have_count, blob.have_bytes) == (4, len(DATA))
    assert store.space.promised == 0
    await blob.finish()


@pytest.mark.parametrize(
    ("index", "data", "message"),
    [
        (0, PIECES[1], "wrong hash"),
        (0, PIECES[0][:-1], "has 1,048,576 bytes, not 1,048,575"),
        (3, b"tail!", "has 4 bytes, not 5"),
        (4, b"", "there is no 4"),
        (-1, b"tail", "there is no -1"),
    ],
)
async def test_a_bad_piece_is_refused_and_nobody_believes_in_it(
    store: BlobStore, index: int, data: bytes, message: str
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    with pytest.raises(PieceCorrupt, match=message):
        await blob.write_piece(index, data)
    assert blob.have == bytes(4)
    with pytest.raises(PieceMissing):
        read_piece(blob, index)
    blob.close()
    assert (await (await reopened(store)).open_partial(DIGEST, MAP)).have_count == 0


async def test_a_closed_blob_goes_on_where_it_stopped(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(2, PIECES[2])
    await blob.write_piece(3, PIECES[3])
    blob.close()
    blob.close()
    assert store.space.promised == 0
    with pytest.raises(StoreError, match="closed"):
        await blob.write_piece(0, PIECES[0])
    again = await reopened(store)
    assert await again.partials() == [DIGEST]
    blob = await again.open_partial(DIGEST, MAP)
    assert blob.have == b"\0\0\1\1"
    assert (blob.have_count, blob.have_bytes) == (2, MIB + 4)
    assert again.space.promised == 2 * MIB
    assert read_piece(blob, 2) == PIECES[2]
    assert not await blob.write_piece(2, b"not even looked at")
    for index in (0, 1):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert again.blob_path(DIGEST).read_bytes() == DATA


async def test_a_partial_blob_is_served_while_it_arrives(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    source = await store.open_piece_source(DIGEST)
    with pytest.raises(PieceMissing):
        read_piece(source, 1)
    await blob.write_piece(1, PIECES[1])
    assert source.have == b"\0\1\0\0"
    assert read_piece(source, 1) == PIECES[1]
    for index in (0, 2, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert read_piece(source, 0) == PIECES[0]  # also after it was renamed
    source.close()


async def test_finishing_too_early_is_refused(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(0, PIECES[0])
    with pytest.raises(PieceMissing, match="3 pieces"):
        await blob.finish()
    assert await blob.write_piece(1, PIECES[1])  # it goes on


async def test_a_map_of_another_blob_is_found_out_at_the_end(store: BlobStore) -> None:
    """All pieces fit the map, but the map was a lie: nothing of it may stay or be served."""
    wanted = f"sha256:{'0' * 64}"
    blob = await store.open_partial(wanted, MAP)
    source = await store.open_piece_source(wanted)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    with pytest.raises(DigestMismatch):
        await blob.finish()
    assert names(store) == set()
    assert store.space.promised == 0
    assert (blob.have_count, blob.have_bytes) == (0, 0)
    with pytest.raises(PieceMissing):
        read_piece(source, 0)
    source.close()
    (await store.open_partial(wanted, MAP)).close()  # another try begins at nothing


async def test_pieces_that_the_disk_lost_after_they_were_written_come_again_and_no_others(
    store: BlobStore,
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    (store.blobs / f"{BLOB}.partial").write_bytes(b"X" + DATA[1:-1] + b"X")
    with pytest.raises(PiecesRotten, match="lost 2 pieces"):
        await blob.finish()
    assert blob.have == bytes(4)  # those who serve it stop
    assert store.space.promised == 0
    blob = await store.open_partial(DIGEST, MAP)
    assert blob.have == b"\0\1\1\0"
    for index in (0, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert store.blob_path(DIGEST).read_bytes() == DATA


async def test_finish_can_be_cancelled_and_called_again(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "STEP_BYTES", MIB // 2)
    blob = await store.open_partial(DIGEST, MAP)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    with trio.CancelScope() as scope:
        scope.cancel()
        await blob.finish()
    assert scope.cancelled_caught
    assert BLOB not in names(store)
    await blob.finish()
    assert store.blob_path(DIGEST).read_bytes() == DATA


async def test_a_blob_is_received_by_one_at_a_time(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    with pytest.raises(StoreError, match="being received already"):
        await store.open_partial(DIGEST, MAP)
    with pytest.raises(StoreError, match="being received"):
        await store.discard_partial(DIGEST)
    blob.close()
    await store.discard_partial(DIGEST)
    assert names(store) == set()
    await store.put_bytes(b"tiny")
    tiny = f"sha256:{hashlib.sha256(b'tiny').hexdigest()}"
    with pytest.raises(StoreError, match="in the store already"):
        await store.open_partial(tiny, map_of(b"tiny"))


@pytest.mark.parametrize(
    "bad",
    [
        PieceMap(len(DATA), MIB, MAP.hashes[:-1]),
        PieceMap(len(DATA), MIB, b""),
        PieceMap(len(DATA), 17, MAP.hashes),
        PieceMap(-1, MIB, b""),
        PieceMap(1 << 62, MIB, MAP.hashes),
    ],
)
async def test_an_impossible_map_is_refused(store: BlobStore, bad: PieceMap) -> None:
    with pytest.raises(InvalidPieceMap):
        await store.open_partial(DIGEST, bad)
    assert names(store) == set()


async def test_another_map_starts_again(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(0, PIECES[0])
    blob.close()
    other = PieceMap(MAP.size, MAP.piece_size, bytes(len(MAP.hashes)))
    blob = await store.open_partial(DIGEST, other)
    assert blob.have_count == 0
    blob.close()


async def test_an_empty_blob_needs_no_piece(store: BlobStore) -> None:
    digest = f"sha256:{hashlib.sha256(b'').hexdigest()}"
    blob = await store.open_partial(digest, map_of(b""))
    assert blob.complete
    await blob.finish()
    assert await store.blob_size(digest) == 0


# Room.


async def test_a_blob_that_does_not_fit_is_refused_with_numbers(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA) - 1, 1 << 30))
    with pytest.raises(StoreFull, match="3,145,732 bytes are needed, 3,145,731 are free"):
        await store.open_partial(DIGEST, MAP)
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA), 1 << 30))
    blob = await store.open_partial(DIGEST, MAP)  # what failed holds nothing back
    with pytest.raises(StoreFull):
        await store.put_bytes(b"more")  # for all room is promised
    await blob.write_piece(3, b"tail")
    blob.close()
    await store.put_bytes(b"more")


async def test_a_disk_that_fills_up_keeps_the_pieces_that_are_here(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(0, PIECES[0])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(partial, "write_all", full)
        with pytest.raises(StoreFull):
            await blob.write_piece(1, PIECES[1])
    assert blob.have == b"\1\0\0\0"
    assert read_piece(blob, 0) == PIECES[0]
    for index in (1, 2, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()


# Crashes.


def other_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was restarted."""
    monkeypatch.setattr(journal, "boot_id", lambda: b"2" * 32)


async def test_after_a_power_cut_what_was_not_synced_is_read_before_it_is_believed(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "boot_id", lambda: b"1" * 32)
    blob = await store.open_partial(DIGEST, MAP)
    for index in (0, 1, 2):
        await blob.write_piece(index, PIECES[index])
    blob.close()
    data = store.blobs / f"{BLOB}.partial"
    data.write_bytes(PIECES[0] + bytes(MIB) + PIECES[2])  # the second one never reached the disk
    # Within the same boot what was written is there, so nothing is read.
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\1\1\0"
    blob.close()
    other_boot(monkeypatch)
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\0\1\0"
    blob.close()
    # It was found out once and for all, and what was found good was synced.
    data.write_bytes(bytes(len(DATA)))
    monkeypatch.setattr(journal, "boot_id", lambda: b"3" * 32)
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\0\1\0"
    blob.close()


async def test_what_was_synced_is_believed_after_a_power_cut(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "boot_id", lambda: b"1" * 32)
    monkeypatch.setattr(partial, "SYNC_EVERY_BYTES", 2 * MIB)
    synced: list[bytes] = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        synced.append(bytes(blob.have))
        real(descriptor)

    blob = await store.open_partial(DIGEST, MAP)
    monkeypatch.setattr(os, "fdatasync", sync)
    for index in (0, 1, 2):
        await blob.write_piece(index, PIECES[index])
    blob.close()
    assert synced == [b"\1\1\0\0"]
    read: list[int] = []
    real_hash = journal.hash_range

    def hash_range(whole: Any, descriptor: int, offset: int, length: int) -> None:
        read.append(offset // MIB)
        real_hash(whole, descriptor, offset, length)

    monkeypatch.setattr(journal, "hash_range", hash_range)
    other_boot(monkeypatch)
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\1\1\0"
    assert read == [2]
    blob.close()


async def test_a_disk_that_fails_to_sync_is_told(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SYNC_EVERY_BYTES", MIB)
    blob = await store.open_partial(DIGEST, MAP)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        await blob.write_piece(1, PIECES[1])
    blob.close()


async def test_a_piece_in_parts_is_believed_at_its_end_only(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    sink = blob.begin_piece(1)
    for begin in range(0, MIB, MIB // 4):
        sink.write(PIECES[1][begin : begin + MIB // 4])
        assert not blob.have[1]
    with pytest.raises(PieceCorrupt, match="has 1,048,576 bytes"):
        sink.write(b"x")
    sink.close()
    assert blob.have_count == 0
    sink = blob.begin_piece(1)
    sink.write(PIECES[1])
    sink.settle()
    sink.close()
    sink.close()
    assert blob.have == b"\0\1\0\0"
    short = blob.begin_piece(0)
    short.write(PIECES[0][:-1])
    with pytest.raises(PieceCorrupt, match="not 1,048,575"):
        short.settle()
    short.close()


@pytest.mark.parametrize("first", [True, False])
async def test_who_is_slower_or_lies_cannot_change_a_piece_that_settled(
    store: BlobStore, first: bool
) -> None:
    """In the end game two holders send a piece at once; one of them lies."""
    blob = await store.open_partial(DIGEST, MAP)
    one, other = blob.begin_piece(0), blob.begin_piece(0)
    liar, honest = (one, other) if first else (other, one)
    liar.write(b"L" * 1000)
    honest.write(PIECES[0])
    honest.settle()
    honest.close()
    assert blob.have[0]
    liar.write(b"L" * (MIB - 1000))
    assert read_piece(blob, 0) == PIECES[0]
    with pytest.raises(PieceCorrupt, match="wrong hash"):
        liar.settle()
    liar.close()
    late = blob.begin_piece(0)  # somebody who did not hear of it
    late.write(b"L" * MIB)
    late.close()
    assert read_piece(blob, 0) == PIECES[0]


async def test_a_blob_whose_map_comes_bit_by_bit(store: BlobStore) -> None:
    blank = PieceMap(MAP.size, MAP.piece_size, bytes(len(MAP.hashes)))
    blob = await store.open_partial(DIGEST, blank)
    with pytest.raises(BlobMissing):  # nobody who wants proof may have it
        await store.open_piece_source(DIGEST)
    with pytest.raises(PieceCorrupt, match=r"hash of piece 2 of .* is not known"):
        await blob.write_piece(2, PIECES[2])
    blob.learn({2: MAP.hash_of(2), 3: MAP.hash_of(3)})
    with pytest.raises(PieceCorrupt, match="had another hash"):
        blob.learn({2: MAP.hash_of(3)})
    await blob.write_piece(2, PIECES[2])
    source = await store.open_growing_source(DIGEST)
    assert source.map.known() == [2, 3]
    assert read_piece(source, 2) == PIECES[2]
    source.close()
    blob.close()
    blob = await store.open_partial(DIGEST, blank)
    assert blob.have_count == 0
    blob.learn({index: MAP.hash_of(index) for index in range(4)})
    assert blob.have == b"\0\0\1\0"  # of the earlier run
    assert store.space.promised == len(DATA) - MIB
    for index in (0, 1, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert store.blob_path(DIGEST).read_bytes() == DATA


async def test_keeping_up_leaves_little_for_the_end(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[int, int]] = []
    real = partial.hash_range

    def hash_range(whole: Any, descriptor: int, offset: int, length: int) -> None:
        hashed.append((offset, length))
        real(whole, descriptor, offset, length)

    monkeypatch.setattr(partial, "hash_range", hash_range)
    blob = await store.open_partial(DIGEST, MAP)
    for index in (0, 1, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.keep_up()
    assert hashed == [(0, 2 * MIB)]
    await blob.write_piece(2, PIECES[2])
    await blob.finish()
    assert hashed == [(0, 2 * MIB), (2 * MIB, MIB + 4)]


async def test_a_journal_cut_or_changed_anywhere_proves_no_wrong_piece(store: BlobStore) -> None:
    """Every cut and many bit flips: a piece is believed only if it is really there."""
    blob = await store.open_partial(DIGEST, MAP)
    for index in (1, 3, 0):
        await blob.write_piece(index, PIECES[index])
    blob.close()
    records_file, data = store.blobs / f"{BLOB}.journal", store.blobs / f"{BLOB}.partial"
    good = records_file.read_bytes()
    chance = random.Random(7)
    records = 3 * RECORD
    cuts = [*range(0, len(good) - records, 9), *range(len(good) - records, len(good))]
    variants = [good[:length] for length in cuts]
    variants += [good + b"\0" * RECORD, good + b"\0" * 5, good + b"\xff" * 2 * RECORD]
    flips = [(chance.randrange(len(good) - records), chance.randrange(8)) for _ in range(20)]
    # In each record: every bit of the piece's number, one of its hash, and one of its check.
    starts = [len(good) - records + number * RECORD for number in range(3)]
    flips += [(start + 3, bit) for start in starts for bit in range(8)]
    flips += [(start + at, 0) for start in starts for at in (20, 39)]
    for at, bit in flips:
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        variants.append(bytes(flipped))
    true = bytearray(b"\1\1\0\1")
    backup = data.with_name("copy")
    shutil.copy(data, backup)
    for variant in variants:
        records_file.write_bytes(variant)
        shutil.copy(backup, data)
        blob = await store.open_partial(DIGEST, MAP)
        for index in range(4):
            assert blob.have[index] <= true[index]
            if blob.have[index]:
                assert read_piece(blob, index) == PIECES[index]
        if blob.have_count == 0:
            assert data.stat().st_size in (0, len(DATA))
        # What comes now is appended so that it can be read again.
        assert await blob.write_piece(2, PIECES[2])
        blob.close()
        blob = await store.open_partial(DIGEST, MAP)
        assert blob.have[2]
        blob.close()


async def test_a_piece_beyond_the_end_of_a_cut_file_is_not_believed(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    for index in (0, 3):
        await blob.write_piece(index, PIECES[index])
    blob.close()
    os.truncate(store.blobs / f"{BLOB}.partial", 2 * MIB)
    blob = await store.open_partial(DIGEST, MAP)
    assert blob.have == b"\1\0\0\0"
    blob.close()


@pytest.mark.parametrize("step", ["fsync", "replace"])
async def test_a_crash_while_the_journal_is_written_anew_loses_no_piece(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As happens at the first opening after each boot of the machine."""
    blob = await store.open_partial(DIGEST, MAP)
    for index in (0, 2):
        await blob.write_piece(index, PIECES[index])
    blob.close()

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        other_boot(patch)
        patch.setattr(*((os, "fsync", crash) if step == "fsync" else (Path, "replace", crash)))
        with pytest.raises(KeyboardInterrupt):
            await store.open_partial(DIGEST, MAP)
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\0\1\0"
    blob.close()


async def test_a_record_that_a_full_disk_cut_spoils_no_later_one(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(0, PIECES[0])
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
        with pytest.raises(StoreFull):
            await blob.write_piece(1, PIECES[1])
    assert blob.have == b"\1\0\0\0"
    await blob.write_piece(2, PIECES[2])  # there is room again
    blob.close()
    blob = await (await reopened(store)).open_partial(DIGEST, MAP)
    assert blob.have == b"\1\0\1\0"
    blob.close()


async def test_what_is_being_thrown_away_is_not_begun_again_at_the_same_time(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    await blob.write_piece(0, PIECES[0])
    blob.close()
    entered, go_on = threading.Event(), threading.Event()
    real = journal.PartialPaths.remove

    def slow(self: journal.PartialPaths) -> None:
        entered.set()
        go_on.wait(10)
        real(self)

    monkeypatch.setattr(journal.PartialPaths, "remove", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.discard_partial, DIGEST)
        await trio.to_thread.run_sync(entered.wait, 10)
        with pytest.raises(BeingReceived):
            await store.open_partial(DIGEST, MAP)
        go_on.set()
    monkeypatch.undo()
    blob = await store.open_partial(DIGEST, MAP)
    assert blob.have_count == 0
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    await blob.finish()


@pytest.mark.parametrize("why", ["power cut", "rot"])
async def test_what_a_new_journal_says_to_be_synced_is(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The bytes are synced before the journal that says so takes its place."""
    blob = await store.open_partial(DIGEST, MAP)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    steps: list[str] = []
    real_sync, real_replace = os.fdatasync, Path.replace

    def sync(descriptor: int) -> None:
        steps.append("sync")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append(target.suffix)
        return real_replace(self, target)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    if why == "rot":
        path = store.blobs / f"{BLOB}.partial"
        path.write_bytes(bytes(MIB) + path.read_bytes()[MIB:])
        with pytest.raises(PiecesRotten):
            await blob.finish()
    else:
        blob.close()
        other_boot(monkeypatch)
        (await (await reopened(store)).open_partial(DIGEST, MAP)).close()
    assert steps == ["sync", ".journal"]


async def test_a_blob_that_came_in_pieces_appears_only_when_it_is_synced(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of durable steps: bytes, rename, directory, and only then the journal goes."""
    blob = await store.open_partial(DIGEST, MAP)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    steps: list[str] = []
    real_sync, real_rename, real_unlink = os.fsync, Path.rename, Path.unlink
    data = (store.blobs / f"{BLOB}.partial").stat().st_ino

    def sync(descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        names = {data: "sync data", store.blobs.stat().st_ino: "sync directory"}
        steps.append(names.get(number, "sync another"))
        real_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        steps.append(f"unlink {self.suffix}")
        real_unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "unlink", unlink)
    await blob.finish()
    assert steps[:4] == ["sync data", "rename", "sync directory", "unlink .journal"]


WRITER = """
import sys, trio
from pathlib import Path
from ollamad.core.pieces import MIB, PieceHasher
from ollamad.store.blobs import BlobStore

async def main():
    data = b"".join(bytes([fill]) * MIB for fill in range(64))
    hasher = PieceHasher(len(data)); hasher.update(data)
    digest, pieces = hasher.finish()
    store = BlobStore(Path(sys.argv[1]), keep_free_bytes=0)
    await store.prepare()
    blob = await store.open_partial(digest, pieces)
    for index in range(64):
        await blob.write_piece(index, bytes([index]) * MIB)
        print(index, flush=True)
    print("all", flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


def write_until_killed(root: Path) -> list[int]:
    """Have another process write pieces, kill it in the middle, and say what it reported."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(5)]
        process.send_signal(signal.SIGKILL)
    return reported


async def test_after_kill_9_the_pieces_that_were_reported_are_there(tmp_path: Path) -> None:
    reported = write_until_killed(tmp_path)
    data = b"".join(bytes([fill]) * MIB for fill in range(64))
    store = BlobStore(tmp_path, keep_free_bytes=0)
    await store.prepare()
    blob = await store.open_partial(f"sha256:{hashlib.sha256(data).hexdigest()}", map_of(data))
    assert all(blob.have[index] for index in reported)
    for index in range(64):
        if blob.have[index]:
            assert read_piece(blob, index) == bytes([index]) * MIB
        else:
            await blob.write_piece(index, bytes([index]) * MIB)
    await blob.finish()


# Growing: the map is made while the blob comes.


async def test_a_growing_blob_gets_its_map_from_what_came(store: BlobStore) -> None:
    blob = await store.open_growing(DIGEST, len(DATA))
    await blob.write_piece(2, PIECES[2])
    assert blob.map.hash_of(2) == MAP.hash_of(2)
    assert blob.map.hash_of(0) == bytes(32)
    blob.close()
    blob = await (await reopened(store)).open_growing(DIGEST, len(DATA))
    assert blob.have == b"\0\0\1\0"
    assert blob.map.hash_of(2) == MAP.hash_of(2)
    for index in (0, 1, 3):
        await blob.write_piece(index, PIECES[index])
    assert await blob.finish() == DIGEST
    assert await store.piece_map(DIGEST) == MAP
    assert names(store) == {BLOB, f"{BLOB}.pieces"}


async def test_a_growing_blob_without_a_name_gets_it_at_its_end(store: BlobStore) -> None:
    key = f"sha256:{hashlib.sha256(b'where it comes from').hexdigest()}"
    blob = await store.open_growing(key, len(DATA), named=False)
    for index, data in enumerate(PIECES):
        await blob.write_piece(index, data)
    told: list[str] = []

    async def on_named(digest: str) -> None:
        told.append(digest)
        assert not await store.has_blob(digest)

    assert await blob.finish(on_named) == DIGEST
    assert told == [DIGEST]
    assert store.blob_path(DIGEST).read_bytes() == DATA
    assert not await store.has_blob(key)
    assert await store.partials() == []
    assert store.space.promised == 0


async def test_what_grew_wrongly_never_becomes_the_blob(store: BlobStore) -> None:
    blob = await store.open_growing(DIGEST, len(DATA))
    for index in (0, 2, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.write_piece(1, PIECES[0])
    with pytest.raises(DigestMismatch):
        await blob.finish()
    assert names(store) == set()
    assert store.space.promised == 0


async def test_a_true_map_keeps_what_grew_rightly_and_nothing_else(store: BlobStore) -> None:
    blob = await store.open_growing(DIGEST, len(DATA))
    await blob.write_piece(0, PIECES[1])  # a lie, which without a map nobody sees
    await blob.write_piece(2, PIECES[2])
    blob.close()
    blob = await store.open_partial(DIGEST, MAP)
    assert blob.have == b"\0\0\1\0"
    for index in (0, 1, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert store.blob_path(DIGEST).read_bytes() == DATA


async def test_what_grows_is_served_only_to_those_who_ask_for_it(store: BlobStore) -> None:
    blob = await store.open_growing(DIGEST, len(DATA))
    with pytest.raises(BlobMissing):
        await store.open_piece_source(DIGEST)
    source = await store.open_growing_source(DIGEST)
    assert source.have == b"\0\0\0\0"
    await blob.write_piece(1, PIECES[1])
    assert source.have == b"\0\1\0\0"
    assert read_piece(source, 1) == PIECES[1]
    source.close()
    blob.close()


# Reservations.


async def test_what_is_reserved_is_there_for_those_blobs_and_nobody_else(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA) + 10, 1 << 30))
    with store.space.reserve({DIGEST: len(DATA), "other": 5}):
        with pytest.raises(StoreFull, match="6 bytes are needed, 5 are free"):
            store.space.promise(6)
        with pytest.raises(StoreFull), store.space.reserve({"third": 6}):
            pass
        blob = await store.open_partial(DIGEST, MAP)
        assert store.space.promised == len(DATA) + 5
        blob.close()
        assert store.space.promised == 5
    assert store.space.promised == 0


async def test_bytes_of_a_partial_blob_are_not_needed_twice(store: BlobStore) -> None:
    blob = await store.open_growing(DIGEST, len(DATA))
    await blob.write_piece(1, PIECES[1])
    blob.close()
    missing = await store.missing_bytes({DIGEST: len(DATA), "sha256:" + "0" * 64: 7})
    assert missing == {DIGEST: len(DATA) - MIB, "sha256:" + "0" * 64: 7}


async def test_room_for_a_blob_that_is_being_received_is_not_made_twice(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model, which shares it, is pulled meanwhile."""
    monkeypatch.setattr(files, "free_bytes_of", lambda directory: (len(DATA) + 10, 1 << 30))
    other = "sha256:" + "0" * 64
    with store.space.reserve(await store.missing_bytes({DIGEST: len(DATA)})):
        blob = await store.open_partial(DIGEST, MAP)
        with store.space.reserve(await store.missing_bytes({DIGEST: len(DATA), other: 7})):
            assert store.space.promised == len(DATA) + 7
        blob.close()
        assert await store.missing_bytes({DIGEST: len(DATA)}) == {DIGEST: len(DATA)}
    assert store.space.promised == 0
