"""Brings a model from its origin into this node's store, and goes on where an earlier try stopped.

Knows the sources and the store, and of the cluster only that it may have a file already. Each
file grows as a partial blob: what came is on the disk, and is not fetched again after a break, a
cancellation or a restart.
"""

import functools
import hashlib
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from ollamad.core.state import Model
from ollamad.sources.base import Offer, OpenSource, RemoteFile, Source, SourceError
from ollamad.sources.pypi import local_path
from ollamad.sources.references import Wanted
from ollamad.store.errors import BeingReceived, DigestMismatch, PiecesRotten
from ollamad.store.manifests import Descriptor, describe
from ollamad.store.models import ModelStore
from ollamad.store.partial import PartialBlob
from ollamad.store.pins import Hold

log = logging.getLogger(__name__)

MAX_ROTTEN = 3  # times that the disk may lose pieces of a file before a pull fails
RECHECK_S = 0.5  # how often to look whether another task has brought a blob that is wanted here
# What is worth fetching by others while it comes: below, it is here before they have begun.
GROWING_BYTES = 16 << 20
_KEY_SALT = b"ollamad origin 1\n"


@dataclass(frozen=True, slots=True)
class Step:
    """How far a pull is; all are bytes, but the digest."""

    done: int  # on the disk
    total: int | None
    received: int  # in this run, wasted ones included
    digest: str = ""  # of the model, or of the one file that it is made of; "" while unknown
    layers: tuple[tuple[str, int], ...] = ()  # digests and sizes of several files, in their order


Report = Callable[[Step], None]
Announce = Callable[[Sequence[Descriptor]], None]
# Has the blob of that digest and size in the store, from nearer than its origin; whether it is.
# False: nobody has it. It tells the bytes on the disk and those that came. Raises NearbyFailed.
FetchNearby = Callable[[str, int, Callable[[int, int], None]], Awaitable[bool]]


class NearbyFailed(Exception):
    """Who has the file did not give it, or all of it. What came stays, to be gone on with."""


async def nowhere(digest: str, size: int, progress: Callable[[int, int], None]) -> bool:
    """A `FetchNearby` that finds nothing."""
    return False


class Bringer:
    """Makes models of this node's store out of what origins have. Starts nothing."""

    def __init__(
        self, store: ModelStore, source: Source, fetch_nearby: FetchNearby = nowhere
    ) -> None:
        self._store = store
        self._source = source
        self._fetch_nearby = fetch_nearby

    async def bring(
        self, wanted: Wanted, name: str, hold: Hold, report: Report, announce: Announce
    ) -> Model:
        """Have the model's blobs here, held by `hold`; its manifest is the caller's to write.

        Args:
          report: called in the event loop as bytes come.
          announce: called with the large files once their digests and sizes are known and
            before they come, so that other nodes can begin to fetch them.

        If cancelled, what has come stays for the next time.

        Raises:
          SourceError: it cannot be had; NotFromHere if another node may have it.
          GgufError, StoreError: it is no model, or there is no room for it.
        """
        async with self._source.open(wanted.reference) as origin:
            offer = await origin.resolve()
            run = _Run(self._store, origin, self._fetch_nearby, hold, report, announce)
            if offer.manifest:
                return await run.bring_manifest(offer, name)
            if offer.local:
                digest, _ = await self._store.import_file(
                    Path(offer.local),
                    progress=lambda done, total: report(Step(done, total, done)),
                    hold=hold,
                )
                projectors: list[str] = []
            elif offer.package is not None:
                digest, projectors = await run.bring_package(offer.package), []
            else:
                digest, projectors = await run.bring_files(offer)
            licence = wanted.licence or offer.licence
            return await self._store.build_model(
                name, digest, license=licence or None, projectors=projectors, hold=hold
            )

    async def has_news(self, wanted: Wanted, model: Model) -> bool:
        """Whether the origin has another model by now. Fetches nothing of it.

        Raises:
          SourceError: nobody can tell.
        """
        async with self._source.open(wanted.reference) as origin:
            offer = await origin.resolve()
            if offer.manifest:
                return f"sha256:{hashlib.sha256(offer.manifest).hexdigest()}" != model.digest
            if offer.weights is None:
                return False  # a package has one version in its name
            weights = offer.weights
            digest = weights.digest or (await origin.stat(weights)).digest
            return bool(digest) and all(layer.digest != digest for layer in model.layers)


class _Run:
    """One pull."""

    def __init__(
        self,
        store: ModelStore,
        origin: OpenSource,
        fetch_nearby: FetchNearby,
        hold: Hold,
        report: Report,
        announce: Announce,
    ) -> None:
        self._store = store
        self._origin = origin
        self._fetch_nearby = fetch_nearby
        self._hold = hold
        self._report = report
        self._announce = announce
        self._before = 0  # bytes of files that are done
        self._received = 0  # bytes of earlier files
        self._now = 0  # bytes of the present file
        self._total: int | None = None
        self._digest = ""
        self._layers: tuple[tuple[str, int], ...] = ()

    async def bring_manifest(self, offer: Offer, name: str) -> Model:
        manifest = describe(offer.manifest)
        self._digest = f"sha256:{hashlib.sha256(offer.manifest).hexdigest()}"
        config, *layers = manifest.blobs
        blobs = (*layers, config)  # in the order in which Ollama shows them
        self._layers = tuple((blob.digest, blob.size) for blob in blobs)
        self._total = sum(blob.size for blob in blobs)
        self._tell(0)  # where there is no room, whoever is next has to know how much it takes
        await self._hold.add(*(blob.digest for blob in blobs))
        missing = await self._store.missing_bytes(
            {blob.digest: blob.size for blob in manifest.blobs}
        )
        with self._store.space.reserve(missing):
            self._announce([b for b in manifest.blobs if b.size >= GROWING_BYTES])
            for blob in blobs:
                await self._bring(self._origin.blob(blob.digest, blob.size))
        return await self._store.model_of(name, offer.manifest)

    async def bring_files(self, offer: Offer) -> tuple[str, list[str]]:
        """The digests of weights and projectors."""
        assert offer.weights is not None, "an offer offers something"
        files = [await self._sized(f) for f in (offer.weights, offer.projector) if f is not None]
        self._digest = files[0].digest
        self._total = sum(file.size or 0 for file in files)
        if len(files) > 1 and all(file.digest for file in files):
            self._layers = tuple((file.digest, file.size or 0) for file in files)
        self._tell(0)
        sizes = {_key(file): file.size or 0 for file in files}
        await self._hold.add(*(file.digest for file in files if file.digest))
        with self._store.space.reserve(await self._store.missing_bytes(sizes)):
            self._announce(
                [
                    Descriptor("", file.digest, file.size or 0)
                    for file in files
                    if file.digest and (file.size or 0) >= GROWING_BYTES
                ]
            )
            digests = [await self._bring(file) for file in files]
        return digests[0], digests[1:]

    async def bring_package(self, package: RemoteFile) -> str:
        """The digest of the GGUF file in a package, which is removed again."""
        if path := local_path(package.url):
            return (await self._origin.unpack(path, self._ingest))[0]
        package = await self._sized(package)
        self._digest, self._total = package.digest, package.size
        self._tell(0)
        async with self._store.pins.hold(package.digest) as hold:
            # Packed or not, the model takes about as much again.
            sizes = {package.digest: package.size or 0}
            missing = await self._store.missing_bytes(sizes)
            unpacked = f"unpacked {package.digest}"  # what its digest will be is not known yet
            with self._store.space.reserve(missing | {unpacked: package.size or 0}):
                await self._bring(package, hold)
                path = await self._store.find_blob(package.digest)
                ingest = functools.partial(self._ingest, reserved=unpacked)
                try:
                    digest, _ = await self._origin.unpack(path, ingest)
                except SourceError:
                    # It is what the index promised, and no model: no use to keep it.
                    await self._store.remove_blob(package.digest)
                    raise
        await self._store.free(lambda: (), among=[package.digest], grace_s=0)
        return digest

    async def _ingest(
        self, chunks: AsyncIterable[bytes], /, *, size: int | None, reserved: str = ""
    ) -> tuple[str, object]:
        return await self._store.ingest(chunks, size=size, hold=self._hold, reserved=reserved)

    async def _sized(self, file: RemoteFile) -> RemoteFile:
        return file if file.size is not None and file.digest else await self._origin.stat(file)

    async def _bring(self, file: RemoteFile, hold: Hold | None = None) -> str:
        """Have that file here; its digest."""
        for attempt in range(1, MAX_ROTTEN + 1):
            try:
                return await self._bring_once(file, hold)
            except PiecesRotten as error:
                if attempt == MAX_ROTTEN:
                    raise
                log.error("%s; they are fetched again", error)
        raise AssertionError("not reached")

    async def _bring_once(self, file: RemoteFile, hold: Hold | None) -> str:
        assert file.size is not None, "sized before"
        blob = None if await self._came_from_nearby(file) else await self._open(file)
        if blob is None:  # it is here
            self._ended(file.size)
            return file.digest
        try:
            self._tell(blob.have_bytes)
            if not blob.complete:
                await self._origin.download(
                    file, blob, lambda received: self._heard(blob.have_bytes, received)
                )
            try:
                digest = await blob.finish((hold or self._hold).add)
            except DigestMismatch as error:
                raise SourceError(
                    f"{file.digest} was promised, and {error.got} came; it was thrown away. Pull "
                    "again; if it happens again, something between here and the origin changes "
                    "files"
                ) from error
        finally:
            blob.close()
        self._digest = self._digest or digest
        self._ended(file.size)
        return digest

    async def _came_from_nearby(self, file: RemoteFile) -> bool:
        """Whether the file is here, without a word to its origin."""
        if not file.digest:
            return False
        assert file.size is not None
        try:
            return await self._fetch_nearby(file.digest, file.size, self._heard)
        except NearbyFailed as error:
            log.warning("%s; it comes from its origin", error)
            self._fetch_nearby = nowhere  # to wait in vain once is enough
            self._received += self._now
            self._now = 0
            return False

    async def _open(self, file: RemoteFile) -> PartialBlob | None:
        assert file.size is not None
        while True:
            if file.digest and await self._store.has_blob(file.digest):
                return None
            try:
                if not file.digest and not file.version:
                    # Nobody can tell whether what came earlier is of the same file.
                    await self._store.discard_partial(_key(file))
                return await self._store.open_growing(
                    _key(file), file.size, named=bool(file.digest)
                )
            except BeingReceived:  # by another pull, or from a peer
                await trio.sleep(RECHECK_S)

    def _heard(self, done: int, received: int) -> None:
        self._now = received
        self._tell(done)

    def _ended(self, size: int) -> None:
        """The present file is here."""
        self._before += size
        self._received += self._now
        self._now = 0
        self._tell(0)

    def _tell(self, done: int) -> None:
        self._report(
            Step(
                self._before + done,
                self._total,
                self._received + self._now,
                self._digest,
                self._layers,
            )
        )


def _key(file: RemoteFile) -> str:
    """The digest of a file, or what stands for it: this version of it, at this place."""
    if file.digest:
        return file.digest
    text = msgspec.json.encode([file.url, file.size, file.version])
    return f"sha256:{hashlib.sha256(_KEY_SALT + text).hexdigest()}"
