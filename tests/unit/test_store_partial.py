"""Blobs that arrive in pieces: only what is verified and synced is believed, whatever happens."""

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from ollamad.core.pieces import MIB, PieceHasher, PieceMap
from ollamad.store import files, partial
from ollamad.store.blobs import BlobStore
from ollamad.store.errors import (
    BlobMissing,
    DigestMismatch,
    InvalidPieceMap,
    PieceCorrupt,
    PieceMissing,
    StoreError,
    StoreFull,
)

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
        assert await blob.read_piece(index) == PIECES[index]

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
async def test_a_bad_piece_is_refused_and_not_written(
    store: BlobStore, index: int, data: bytes, message: str
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    with pytest.raises(PieceCorrupt, match=message):
        await blob.write_piece(index, data)
    assert blob.have == bytes(4)
    assert (store.blobs / f"{BLOB}.partial").stat().st_size == 0
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
    assert await blob.read_piece(2) == PIECES[2]
    assert not await blob.write_piece(2, b"not even looked at")
    for index in (0, 1):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert again.blob_path(DIGEST).read_bytes() == DATA


async def test_a_partial_blob_is_served_while_it_arrives(store: BlobStore) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    source = await store.open_piece_source(DIGEST)
    with pytest.raises(PieceMissing):
        await source.read_piece(1)
    await blob.write_piece(1, PIECES[1])
    assert source.have == b"\0\1\0\0"
    assert await source.read_piece(1) == PIECES[1]
    for index in (0, 2, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()
    assert await source.read_piece(0) == PIECES[0]  # also after it was renamed
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
        await source.read_piece(0)
    source.close()
    (await store.open_partial(wanted, MAP)).close()  # another try begins at nothing


async def test_a_piece_that_the_disk_lost_after_it_was_synced_is_found_out(
    store: BlobStore,
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    for index, piece in enumerate(PIECES):
        await blob.write_piece(index, piece)
    (store.blobs / f"{BLOB}.partial").write_bytes(DATA[:-1] + b"X")
    with pytest.raises(DigestMismatch):
        await blob.finish()
    assert names(store) == set()


async def test_finish_can_be_cancelled_and_called_again(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "STEP_BYTES", MIB)
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
    assert await blob.read_piece(0) == PIECES[0]
    for index in (1, 2, 3):
        await blob.write_piece(index, PIECES[index])
    await blob.finish()


# Crashes.


async def test_a_piece_is_recorded_only_after_it_is_synced(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.open_partial(DIGEST, MAP)
    journal = store.blobs / f"{BLOB}.journal"
    size = journal.stat().st_size
    sizes_at_sync: list[int] = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        sizes_at_sync.append(journal.stat().st_size - size)
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    await blob.write_piece(0, PIECES[0])
    assert sizes_at_sync == [0]
    assert journal.stat().st_size - size == RECORD

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        await blob.write_piece(1, PIECES[1])
    blob.close()
    assert (await (await reopened(store)).open_partial(DIGEST, MAP)).have == b"\1\0\0\0"


async def test_a_journal_cut_or_changed_anywhere_proves_no_wrong_piece(store: BlobStore) -> None:
    """Every cut and many bit flips: a piece is believed only if it is really there."""
    blob = await store.open_partial(DIGEST, MAP)
    for index in (1, 3, 0):
        await blob.write_piece(index, PIECES[index])
    blob.close()
    journal, data = store.blobs / f"{BLOB}.journal", store.blobs / f"{BLOB}.partial"
    good = journal.read_bytes()
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
        journal.write_bytes(variant)
        shutil.copy(backup, data)
        blob = await store.open_partial(DIGEST, MAP)
        for index in range(4):
            assert blob.have[index] <= true[index]
            if blob.have[index]:
                assert await blob.read_piece(index) == PIECES[index]
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
            assert await blob.read_piece(index) == bytes([index]) * MIB
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
    assert await source.read_piece(1) == PIECES[1]
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
