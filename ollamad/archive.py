"""The file of a backup: a tar whose second part, the manifest, says what must be in the rest.

    ollamad-backup      "ollamad backup 1\n" and the sha256 of manifest.json
    manifest.json       what this is a backup of, and each further file's size and sha256
    state.msgpack       the replicated state, with the cluster's keys
    config/…            settings, as they are on the host
    blobs/sha256-…      files of models, if they were asked for

So anybody can look into it with `tar`, and nothing of it is believed before its checksum was
seen. The first line comes first so that a newer format is told from damage.
"""

import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ollamad.errors import StartError
from ollamad.peers.identity import sync_directory

FORMAT = 1  # raise it when an older version could not restore what this one writes
HEAD = "ollamad-backup"
MANIFEST = "manifest.json"
STATE = "state.msgpack"
CONFIG = "config/"
BLOBS = "blobs/"
MAX_MANIFEST_BYTES = 64 << 20  # some 100 bytes for each file and model
COPY_BYTES = 1 << 20

# Nothing else is in a backup: what is restored has the place that its name says.
_NAME = re.compile(r"state\.msgpack|config/(?:config|node)\.yaml|blobs/sha256-([0-9a-f]{64})")
_HEAD = re.compile(rb"ollamad backup (\d+)\n([0-9a-f]{64})\n")


class BadArchive(StartError):
    """The file cannot be restored; the message says why and what to do."""


class FileEntry(msgspec.Struct, frozen=True):
    """What a file of the archive must be."""

    size: int
    sha256: str  # hex


class NodeEntry(msgspec.Struct, frozen=True):
    id: str
    name: str


class ModelEntry(msgspec.Struct, frozen=True):
    name: str
    digest: str
    size: int  # bytes
    included: bool  # whether its blobs are in the archive


class Manifest(msgspec.Struct, frozen=True):
    """What a backup is of; for people, and for whoever restores it."""

    format: int
    created_at: str  # RFC 3339
    version: str  # of the program that wrote it
    source: str  # "majority", "node" or "journal": see `backup`
    cluster_id: str
    applied_index: int
    node: NodeEntry  # where it was made
    members: tuple[NodeEntry, ...]
    models: tuple[ModelEntry, ...]
    environment: tuple[str, ...]  # names of variables that were settings; not in the archive
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Source:
    """A file that goes into an archive: bytes, or a file on disk whose hash is known."""

    entry: FileEntry
    data: bytes = b""
    path: Path | None = None


def from_bytes(data: bytes) -> Source:
    return Source(FileEntry(len(data), hashlib.sha256(data).hexdigest()), data)


def write(
    path: Path, sources: Mapping[str, Source], describe: Callable[[dict[str, FileEntry]], Manifest]
) -> int:
    """Write an archive that only its owner may read, whole or not at all; returns its size.

    Raises:
      StartError: there is such a file already, or a source is not what its entry says.
      OSError: the disk refused.
    """
    if path.exists():
        raise StartError(f"{path} is there already; choose another name")
    manifest = msgspec.json.format(
        msgspec.json.encode(describe({name: source.entry for name, source in sources.items()})),
        indent=1,
    )
    head = b"ollamad backup %d\n%s\n" % (FORMAT, hashlib.sha256(manifest).hexdigest().encode())
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, HEAD, io.BytesIO(head), len(head))
                _add(tar, MANIFEST, io.BytesIO(manifest), len(manifest))
                for name, source in sources.items():
                    _add_source(tar, name, source)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.rename(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _add_source(tar: tarfile.TarFile, name: str, source: Source) -> None:
    if source.path is None:
        _add(tar, name, io.BytesIO(source.data), source.entry.size)
        return
    with open(source.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Hashing(file)
        if size == source.entry.size:
            _add(tar, name, reader, size)
    if size != source.entry.size or reader.hexdigest() != source.entry.sha256:
        raise StartError(
            f"{source.path} is damaged; start the daemon, which fetches it again from another "
            "node if one has it, or make the backup without --models"
        )


def _add(tar: tarfile.TarFile, name: str, file: "io.BytesIO | _Hashing", size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    tar.addfile(info, file)


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Archive:
    """An archive of which every byte was checked. Close it after use."""

    def __init__(self, path: Path, tar: tarfile.TarFile, manifest: Manifest) -> None:
        self._path = path
        self._tar = tar
        self._members = {info.name: info for info in tar.getmembers()}
        self.manifest = manifest

    def names(self, folder: str) -> list[str]:
        """The files of that folder ("config/")."""
        return sorted(name for name in self.manifest.files if name.startswith(folder))

    def read(self, name: str) -> bytes:
        """A small file, checked once more."""
        file = self._tar.extractfile(self._members[name])
        assert file is not None, "only regular files are in a checked archive"
        data = file.read()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise _damaged(self._path, name)
        return data

    def copy(self, name: str, to: Path, passing: Callable[[bytes], None]) -> None:
        """Write a file of any size, whole or not at all, and check it once more.

        `passing` sees its bytes, in their order.
        """
        partial = to.with_name(f".{to.name}.tmp")
        partial.unlink(missing_ok=True)
        file = self._tar.extractfile(self._members[name])
        assert file is not None, "only regular files are in a checked archive"
        entry, found = self.manifest.files[name], hashlib.sha256()
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as target:
            while data := file.read(COPY_BYTES):
                found.update(data)
                passing(data)
                target.write(data)
            target.flush()
            os.fsync(target.fileno())
        if found.hexdigest() != entry.sha256:
            raise _damaged(self._path, name)
        partial.replace(to)


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Check an archive from the first byte to the last, and give access to it.

    Raises:
      BadArchive: it is no backup, damaged, cut off, of a newer format, or others may read it.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise BadArchive(f"{path} is not a file")
        if mode & 0o077:
            raise BadArchive(
                f"others may read {path}, and it holds the cluster's keys; if nobody has: "
                f"chmod 600 {path}"
            )
        try:
            tar = tarfile.TarFile(fileobj=file)
            archive = Archive(path, tar, _check(path, tar))
        except (tarfile.TarError, ValueError, OverflowError):
            raise BadArchive(
                f"{path} is no backup of ollamad, or is damaged or cut off; use another copy of it"
            ) from None
        with tar:
            yield archive


def _check(path: Path, tar: tarfile.TarFile) -> Manifest:
    first = tar.next()
    head = b"" if first is None or first.name != HEAD else _read(path, tar, first, 4096)
    said = _HEAD.fullmatch(head)
    if said is None:
        raise BadArchive(f"{path} is no backup of ollamad")
    if int(said[1]) > FORMAT:
        raise BadArchive(
            f"{path} has format {int(said[1])}, this version reads up to {FORMAT}; "
            "restore it with the version that wrote it, or a newer one"
        )
    second = tar.next()
    if second is None or second.name != MANIFEST:
        raise _damaged(path, MANIFEST)
    data = _read(path, tar, second, MAX_MANIFEST_BYTES)
    if hashlib.sha256(data).hexdigest().encode() != said[2]:
        raise _damaged(path, MANIFEST)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BadArchive(f"{path}: its manifest cannot be read: {error}") from None
    for name, promised in manifest.files.items():
        known = _NAME.fullmatch(name)
        if known is None or known[1] not in (None, promised.sha256):
            raise BadArchive(f"{path} has a file {name!r}, which no backup of ollamad has")
    missing = dict(manifest.files)
    while (info := tar.next()) is not None:
        entry = missing.pop(info.name, None)
        if entry is None or not info.isreg() or _hash(path, tar, info) != entry:
            raise _damaged(path, info.name)
    if missing:
        raise _damaged(path, min(missing))
    return manifest


def _read(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo, limit: int) -> bytes:
    file = tar.extractfile(info) if info.isreg() and info.size <= limit else None
    if file is None:
        raise _damaged(path, info.name)
    return file.read()


def _hash(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> FileEntry:
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    found = hashlib.sha256()
    while data := file.read(COPY_BYTES):
        found.update(data)
    return FileEntry(info.size, found.hexdigest())


def _damaged(path: Path, name: str) -> BadArchive:
    return BadArchive(f"{path} is damaged or cut off ({name}); use another copy of it")
