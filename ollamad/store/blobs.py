"""Keeps blobs on disk in Ollama's layout, each known by the sha256 of its bytes.

`blobs/sha256-<hex>` is a blob: it appears under that name only when it is complete, verified
and synced. Beside it: `.pieces` (its piece map, made again when missing), `.partial` and
`.journal` (see `partial.py`), `.rotten` (see `scrub.py`), `.ollamad-*.tmp` (an import or upload
under way). What is named otherwise is not ours and is left alone.

Blobs may also stand on *shelves*: directories of the same layout that are only read, such as an
Ollama's. What is here wins over what is there; nothing is ever written to a shelf.
"""

import contextlib
import functools
import hashlib
import logging
import os
import stat
import time
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from ollamad.core.pieces import (
    HASH_SIZE,
    MIB,
    MIN_PIECE_SIZE,
    PieceMap,
    piece_count,
    piece_size_for,
)
from ollamad.store.errors import (
    BeingReceived,
    BlobMissing,
    DigestMismatch,
    InvalidPieceMap,
    PieceMapMissing,
    StoreError,
    StoreFull,
    StoreUnusable,
)
from ollamad.store.files import (
    STEP_BYTES,
    TEMP_PREFIX,
    SharedFile,
    Space,
    blob_name,
    digest_of_name,
    free_bytes_of,
    make_directories,
    read_exactly,
    temp_path,
    write_atomically,
)
from ollamad.store.incoming import Incoming, hash_pieces
from ollamad.store.journal import (
    JOURNAL_SUFFIX,
    PARTIAL_SUFFIX,
    PartialPaths,
    open_partial_files,
    sizes_of_partial,
)
from ollamad.store.partial import PartialBlob
from ollamad.store.pieces import PieceSource
from ollamad.store.pins import Hold, Pins

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[int, int | None], None]  # bytes done, bytes in all if known

PIECES_SUFFIX: Final = ".pieces"
ROTTEN_SUFFIX: Final = ".rotten"
DISK_THREADS: Final = 4  # enough to keep a disk busy, few enough to leave the CPU to models
KEEP_FREE_BYTES: Final = 256 * MIB  # never filled with models: the cluster's journal needs it
GRACE_S: Final = 3600.0  # a blob without a manifest may be one whose model is being created
MAX_PIECES_FILE_BYTES: Final = 64 * MIB  # the map of a blob of 100 TB
_BATCH_BYTES: Final = 1 * MIB  # arriving chunks are gathered to this before a thread is asked


class BlobStore:
    """The blobs under `root/blobs`. Starts nothing; call `prepare` before anything else.

    `shelves` are roots of more blobs, which are only read.

    All methods are safe to call from several tasks at once, and safe to cancel: what was being
    written is removed, except in a partial blob, which keeps its verified pieces.
    """

    def __init__(
        self, root: Path, *, keep_free_bytes: int = KEEP_FREE_BYTES, shelves: Sequence[Path] = ()
    ) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.shelves = tuple(shelves)
        self.space = Space(self.blobs, keep_free_bytes)
        self.pins = Pins()
        self._limiter = trio.CapacityLimiter(DISK_THREADS)
        self._partials: dict[str, PartialBlob | None] = {}  # None while it is being opened
        self._mapping = trio.Lock()  # one large blob is hashed for its piece map at a time
        self._unsaved: dict[str, PieceMap] = {}  # piece maps that the disk refused

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do blocking work on the disk in one of the store's own threads."""
        return await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def prepare(self) -> None:
        """Make the directories, remove what a crash left behind, and try to write.

        Raises:
          StoreUnusable: the directory cannot be made or written.
        """
        try:
            await self.in_thread(self._prepare)
        except OSError as error:
            raise StoreUnusable(
                f"the model directory {self.root} cannot be used: {error.strerror}"
            ) from error

    def blob_path(self, digest: str) -> Path:
        """Where that blob would be written; where it is, `find_blob` says.

        Raises:
          InvalidDigest: the text is no digest.
        """
        return self.blobs / blob_name(digest)

    async def find_blob(self, digest: str) -> Path:
        """The file of a blob, here or on a shelf.

        Raises:
          BlobMissing: it is not here.
        """
        path = await self.in_thread(functools.partial(self._find, digest))
        if path is None:
            raise BlobMissing(f"blob {digest} is not in the store")
        return path

    async def has_blob(self, digest: str) -> bool:
        """Whether the blob is here, complete."""
        return await self.in_thread(functools.partial(self._find, digest)) is not None

    async def blob_size(self, digest: str) -> int:
        """Bytes of the blob.

        Raises:
          BlobMissing: it is not here.
        """
        path = await self.find_blob(digest)
        try:
            return (await self.in_thread(path.stat)).st_size
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} is not in the store") from None

    async def free_bytes(self) -> int:
        """Bytes that models may still take: free, not kept back and not promised."""
        return max(0, await self.in_thread(self.space.free_bytes))

    async def total_bytes(self) -> int:
        """Bytes of the file system that the store is on."""
        return (await self.in_thread(functools.partial(free_bytes_of, self.blobs)))[1]

    # Blobs that come in whole.

    async def import_file(
        self, path: Path, *, progress: Progress | None = None, hold: Hold | None = None
    ) -> tuple[str, PieceMap]:
        """Copy a file into the store; returns its digest and its piece map.

        A file that is in the store already is read once and not written.

        Raises:
          StoreError: it is not a regular file, cannot be read, or changes while it is read.
          StoreFull: there is no room for it.
        """
        source = await self.in_thread(functools.partial(_open_source, path))
        try:
            size = os.fstat(source).st_size
            if await self.in_thread(functools.partial(self._has_blob_of_size, size)):
                digest, piece_map = await hash_pieces(self, source, size)
                if hold is not None:
                    await hold.add(digest)
                if await self._is_here(digest):
                    await self._keep_map(digest, piece_map)
                    return digest, piece_map
            async with Incoming(self, self.blobs, size) as incoming:
                for offset in range(0, size, STEP_BYTES):
                    length = min(STEP_BYTES, size - offset)
                    read = functools.partial(_read_source, source, length, offset, path)
                    await incoming.add(await self.in_thread(read))
                    if progress is not None:
                        progress(incoming.received, size)
                digest, piece_map = await incoming.commit(None, hold)
            await self._keep_map(digest, piece_map)
            return digest, piece_map
        finally:
            os.close(source)

    async def ingest(
        self,
        chunks: AsyncIterable[bytes],
        *,
        expected_digest: str | None = None,
        size: int | None = None,
        progress: Progress | None = None,
        hold: Hold | None = None,
        reserved: str = "",
    ) -> tuple[str, PieceMap]:
        """Take a blob from a stream of chunks of any length; returns its digest and piece map.

        Without `size` it is hashed once more at its end, for its pieces. If `expected_digest`
        is here already, nothing is taken from `chunks`. Closing `chunks` is the caller's part.
        With a `hold` the blob is held from the moment that it can be found. `reserved` is the key
        under which its room was reserved, as its digest is not known.

        Raises:
          DigestMismatch, SizeMismatch: the bytes are not those that were announced.
          StoreFull: there is no room (at once if `size` is given).
          whatever `chunks` raises. In each case nothing is left behind.
        """
        if expected_digest is not None and hold is not None:
            await hold.add(expected_digest)
        if expected_digest is not None and await self._is_here(expected_digest):
            return expected_digest, await self.piece_map(expected_digest)
        async with Incoming(self, self.blobs, size, reserved) as incoming:
            batch: list[bytes] = []
            gathered = 0
            async for chunk in chunks:
                batch.append(chunk)
                gathered += len(chunk)
                if gathered >= _BATCH_BYTES:
                    await incoming.add(b"".join(batch))
                    batch, gathered = [], 0
                    if progress is not None:
                        progress(incoming.received, size)
            if batch:
                await incoming.add(b"".join(batch))
                if progress is not None:
                    progress(incoming.received, size)
            digest, piece_map = await incoming.commit(expected_digest, hold)
        await self._keep_map(digest, piece_map)
        return digest, piece_map

    async def put_bytes(self, data: bytes, *, hold: Hold | None = None) -> tuple[str, PieceMap]:
        """Store a small blob, if it is not here already.

        Raises:
          StoreFull, StoreError: the disk refused.
        """
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if hold is not None:
            await hold.add(digest)
        if await self._is_here(digest):
            return digest, await self.piece_map(digest)
        async with Incoming(self, self.blobs, len(data)) as incoming:
            await incoming.add(data)
            digest, piece_map = await incoming.commit(digest)
        await self._keep_map(digest, piece_map)
        return digest, piece_map

    # Pieces.

    async def piece_map(self, digest: str) -> PieceMap:
        """The piece map of a blob that is here, made again (by reading it) if it is missing.

        Raises:
          BlobMissing: it is not here.
          DigestMismatch: its bytes are not what its name says: the disk lost some.
        """
        size = await self.blob_size(digest)
        known = await self._ready_map(digest, size)
        if known is None:
            async with self._mapping:
                # Somebody else may have made it meanwhile.
                known = await self._ready_map(digest, size) or await self._make_map(digest, size)
        return known

    async def _ready_map(self, digest: str, size: int) -> PieceMap | None:
        """The piece map of a blob that is here, if it was kept or can be made in no time."""
        if size <= MIN_PIECE_SIZE:  # not kept
            return await self._make_map(digest, size)
        known = await self.known_map(digest)
        return known if known is not None and known.size == size else None

    async def _make_map(self, digest: str, size: int) -> PieceMap:
        path = await self.find_blob(digest)
        descriptor = await self.in_thread(
            functools.partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        )
        try:
            got, piece_map = await hash_pieces(self, descriptor, size)
        finally:
            os.close(descriptor)
        if got != digest:
            raise DigestMismatch(digest, got)
        await self._keep_map(digest, piece_map)
        return piece_map

    async def known_map(self, digest: str) -> PieceMap | None:
        """The piece map of a blob as it was kept, if it was; the blob is not read."""
        return await self.in_thread(functools.partial(self._load_map, digest))

    async def open_piece_source(self, digest: str) -> PieceSource:
        """The pieces of a blob that is here or (in this process) on its way; close it when done.

        Raises:
          BlobMissing: it is neither.
          PieceMapMissing: `piece_map` has to make its map first.
        """
        partial = self._partials.get(digest)
        if partial is not None and partial.proved:
            with contextlib.suppress(FileNotFoundError):  # it has just become complete
                return await self._arriving(partial)
        piece_map = await self._ready_map(digest, await self.blob_size(digest))
        if piece_map is None:
            raise PieceMapMissing(f"the piece map of {digest} is missing")
        try:
            file = await self._open_shared(await self.find_blob(digest))
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} is not in the store") from None
        have = bytearray(b"\1" * len(piece_map))
        return PieceSource(digest, lambda: piece_map, have, file, is_origin=True)

    async def open_partial(self, digest: str, piece_map: PieceMap) -> PartialBlob:
        """Begin to receive a blob in pieces, or go on where it stopped.

        Hashes that are not known yet are zeros in the map; `learn` them later.

        Raises:
          InvalidPieceMap: the map is not possible; its root is the caller's to check.
          StoreFull: there is no room for what is to come.
          StoreError: the blob is complete here, or being received already.
        """
        if (problem := piece_map.problem()) is not None:
            raise InvalidPieceMap(f"the piece map of {digest} is not usable: {problem}")
        if await self._is_here(digest):
            raise StoreError(f"{digest} is in the store already")
        return await self._open_partial(digest, piece_map, growing=False, named=True)

    async def open_growing(self, digest: str, size: int, *, named: bool = True) -> PartialBlob:
        """Like `open_partial`, for a blob whose piece map is only made while it comes.

        If not `named`, the digest is not the blob's but stands for where it comes from, until
        `finish` finds out.

        Raises:
          StoreFull: there is no room for what is to come.
          StoreError: the blob is complete here, or being received already.
        """
        piece_size = piece_size_for(size)
        blank = PieceMap(size, piece_size, bytes(HASH_SIZE * piece_count(size, piece_size)))
        if named and await self._is_here(digest):
            raise StoreError(f"{digest} is in the store already")
        return await self._open_partial(digest, blank, growing=True, named=named)

    async def _open_partial(
        self, digest: str, piece_map: PieceMap, *, growing: bool, named: bool
    ) -> PartialBlob:
        paths = PartialPaths(self.blob_path(digest))
        if digest in self._partials:
            raise BeingReceived(f"{digest} is being received already")
        self._partials[digest] = None
        try:
            opening = functools.partial(open_partial_files, paths, piece_map)
            opened = await self.in_thread(opening)
            partial = PartialBlob(
                digest,
                piece_map,
                opened,
                paths,
                self,
                on_end=functools.partial(self._partials.__delitem__, digest),
                on_complete=self._keep_map,
                growing=growing,
                named=named,
            )
            try:
                self.space.promise(partial.missing_bytes, digest)
            except StoreFull:
                opened.close()
                raise
        except BaseException:
            del self._partials[digest]
            raise
        self._partials[digest] = partial
        return partial

    async def open_growing_source(self, digest: str) -> PieceSource:
        """Like `open_piece_source`, also for a blob that grows: its pieces are not proved yet.

        Raises:
          BlobMissing: it is not here, and not on its way in this process.
          PieceMapMissing: as `open_piece_source`.
        """
        partial = self._partials.get(digest)
        if partial is None or partial.proved:
            return await self.open_piece_source(digest)
        try:
            return await self._arriving(partial)
        except FileNotFoundError:  # it has just become complete
            return await self.open_piece_source(digest)

    async def _arriving(self, partial: PartialBlob) -> PieceSource:
        file = await self._open_shared(PartialPaths(self.blob_path(partial.digest)).data)
        return PieceSource(
            partial.digest,
            lambda: partial.map,
            partial.have,
            file,
            is_origin=partial.is_origin,
        )

    async def partials(self) -> list[str]:
        """The digests of all partial blobs on the disk, whether somebody receives them or not."""
        return await self.in_thread(self._list_partials)

    async def discard_partial(self, digest: str) -> None:
        """Throw away what is here of a blob that nobody wants any more.

        Raises:
          BeingReceived: it is, right now; close that first.
        """
        paths = PartialPaths(self.blob_path(digest))
        if digest in self._partials:
            raise BeingReceived(f"{digest} is being received")
        self._partials[digest] = None  # nobody begins to receive it meanwhile
        try:
            await self.in_thread(paths.remove)
        finally:
            del self._partials[digest]

    async def discard_old_partials(self, kept_for_s: Callable[[str], float]) -> list[str]:
        """Throw away partial blobs that nobody receives and nothing came of for so many seconds,
        which may differ from digest to digest."""
        discarded = []
        for digest in await self.partials():
            paths = PartialPaths(self.blob_path(digest))
            with contextlib.suppress(FileNotFoundError, StoreError):
                touched = (await self.in_thread(paths.data.stat)).st_mtime
                if time.time() - touched >= kept_for_s(digest):
                    await self.discard_partial(digest)
                    discarded.append(digest)
        return discarded

    async def missing_bytes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Of blobs and their sizes those to make room for, with the bytes that are to come.

        What is here of a partial blob takes its place on the disk already, and for one that is
        being received now all of it is promised.
        """
        missing = await self.in_thread(functools.partial(self._missing_bytes, dict(sizes)))
        return {d: n for d, n in missing.items() if self._partials.get(d) is None}

    # Freeing.

    async def remove_blob(self, digest: str) -> int:
        """Remove a blob and its piece map; returns the bytes that this freed, 0 if it was not here.

        Those who read it right now can finish. Partial blobs are not touched.
        """
        self._unsaved.pop(digest, None)
        return await self.in_thread(functools.partial(self._remove, self.blob_path(digest)))

    async def blobs_except(self, keep: Iterable[str], *, grace_s: float = GRACE_S) -> set[str]:
        """The digests of blobs here that are not in `keep` and older than `grace_s`."""
        return await self.in_thread(functools.partial(self._list_blobs, set(keep), grace_s))

    # In threads.

    async def _is_here(self, digest: str) -> bool:
        """Whether a blob is here; if so it counts as new, so that nobody frees it at once."""
        path = await self.in_thread(functools.partial(self._find, digest))
        if path is None or path.parent != self.blobs:  # what is on a shelf is never freed
            return path is not None
        return await self.in_thread(functools.partial(_touch, path))

    async def _open_shared(self, path: Path) -> SharedFile:
        opening = functools.partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        return SharedFile(await self.in_thread(opening))

    async def _keep_map(self, digest: str, piece_map: PieceMap) -> None:
        await self.in_thread(functools.partial(self._save_map, digest, piece_map))

    def _find(self, digest: str) -> Path | None:
        name = blob_name(digest)
        own = self.blobs / name
        if own.is_file():
            return own
        for shelf in self.shelves:
            path = shelf / "blobs" / name
            # Where a shelf's blob proved rotten, a mark of ours says so: see `scrub.py`.
            if path.is_file() and not own.with_name(name + ROTTEN_SUFFIX).exists():
                return path
        return None

    def _missing_bytes(self, sizes: dict[str, int]) -> dict[str, int]:
        missing = {}
        for digest, size in sizes.items():
            if self._find(digest) is None:
                paths = PartialPaths(self.blob_path(digest))
                written = 0
                if sizes_of_partial(paths) == size:
                    with contextlib.suppress(FileNotFoundError):
                        written = paths.data.stat().st_blocks * 512  # the file has holes
                missing[digest] = max(0, size - written)
        return missing

    def _prepare(self) -> None:
        make_directories(self.blobs)
        probe = temp_path(self.blobs)
        probe.touch()
        probe.unlink()
        names = {path.name for path in self.blobs.iterdir()}
        for name in names:
            stem, dot, suffix = name.partition(".")
            lost = digest_of_name(stem) is not None and (
                (dot + suffix == PIECES_SUFFIX and self._find(stem.replace("-", ":")) is None)
                or (dot + suffix == PARTIAL_SUFFIX and stem + JOURNAL_SUFFIX not in names)
                or (dot + suffix == JOURNAL_SUFFIX and stem + PARTIAL_SUFFIX not in names)
            )
            if lost or name.startswith(TEMP_PREFIX):
                (self.blobs / name).unlink()

    def _blob_files(self) -> dict[str, os.stat_result]:
        found = {}
        for path in self.blobs.iterdir():
            if (digest := digest_of_name(path.name)) is not None:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found[digest] = path.stat()
        return found

    def _has_blob_of_size(self, size: int) -> bool:
        return any(status.st_size == size for status in self._blob_files().values())

    def _load_map(self, digest: str) -> PieceMap | None:
        path = self.blobs / (blob_name(digest) + PIECES_SUFFIX)
        with contextlib.suppress(OSError, msgspec.DecodeError):
            if path.stat().st_size <= MAX_PIECES_FILE_BYTES:
                kept = msgspec.msgpack.decode(path.read_bytes(), type=tuple[str, PieceMap])
                root, piece_map = kept
                if piece_map.problem() is None and piece_map.root() == root:
                    return piece_map
        return self._unsaved.get(digest)

    def _save_map(self, digest: str, piece_map: PieceMap) -> None:
        if self._load_map(digest) == piece_map:
            return
        # It can always be made again, so trouble here is no reason to lose the blob. But that
        # takes long, and a full disk would refuse it again: until the next start it is known.
        try:
            write_piece_map(self.blobs / blob_name(digest), piece_map)
        except StoreError:
            self._unsaved[digest] = piece_map

    def _list_partials(self) -> list[str]:
        names = [path.name for path in self.blobs.iterdir() if path.suffix == PARTIAL_SUFFIX]
        digests = (digest_of_name(name.removesuffix(PARTIAL_SUFFIX)) for name in names)
        return sorted(digest for digest in digests if digest is not None)

    def _remove(self, path: Path) -> int:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        path.with_name(path.name + PIECES_SUFFIX).unlink(missing_ok=True)
        return size

    def _list_blobs(self, keep: set[str], grace_s: float) -> set[str]:
        newest = time.time() - grace_s
        return {
            digest
            for digest, status in self._blob_files().items()
            if digest not in keep and status.st_mtime <= newest
        }


def write_piece_map(blob: Path, piece_map: PieceMap) -> None:
    """Keep the piece map of that file beside it; not of a small one, whose map is made in no time.

    Blocks on the disk.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    if piece_map.size > MIN_PIECE_SIZE:
        content = msgspec.msgpack.encode((piece_map.root(), piece_map))
        write_atomically(blob.with_name(blob.name + PIECES_SUFFIX), content)


def _open_source(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a regular file")
    return descriptor


def _read_source(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    try:
        return read_exactly(descriptor, length, offset)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # an adopted store may belong to somebody else
        return path.is_file()
    return True
