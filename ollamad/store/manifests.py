"""Reads and writes manifests in Ollama's layout: `manifests/<host>/<namespace>/<model>/<tag>`.

A model's digest is the sha256 of its manifest's bytes, so bytes are kept verbatim. What is in
here about files blocks on the disk and is called in the store's threads.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from ollamad.core.names import InvalidName, ModelName, parse_name
from ollamad.store.errors import InvalidDigest, ManifestInvalid, ManifestMissing, StoreError
from ollamad.store.files import TEMP_PREFIX, blob_name, make_directories, write_atomically

MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
_IMAGE: Final = "application/vnd.ollama.image."
MODEL_TYPE: Final = _IMAGE + "model"
PROJECTOR_TYPE: Final = _IMAGE + "projector"
ADAPTER_TYPE: Final = _IMAGE + "adapter"
TEMPLATE_TYPE: Final = _IMAGE + "template"
SYSTEM_TYPE: Final = _IMAGE + "system"
PARAMS_TYPE: Final = _IMAGE + "params"
MESSAGES_TYPE: Final = _IMAGE + "messages"
LICENSE_TYPE: Final = _IMAGE + "license"

MAX_MANIFEST_BYTES: Final = 64 * 1024  # they go through Raft; real ones have about 1 kB
MAX_LAYERS: Final = 64  # real ones have up to ten
MAX_LAYER_BYTES: Final = 1 << 50  # keeps sums and disk arithmetic sane


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """One blob as a manifest names it."""

    media_type: str
    digest: str  # "sha256:<64 hex>"
    size: int  # bytes


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """A manifest's content; fields that are not known are ignored, layers are all kept."""

    schema_version: int
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, each digest once, in the manifest's order."""
        return tuple({blob.digest: blob for blob in (self.config, *self.layers)}.values())


class StoredManifest(msgspec.Struct, frozen=True):
    """A manifest that is on the disk."""

    name: str  # shortest form with tag
    data: bytes
    modified_at: float  # Unix seconds


def manifest_digest(data: bytes) -> str:
    """The digest of the model that these bytes describe."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def describe(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
      ManifestInvalid: it is too large, not JSON, or names blobs in a way that cannot be.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"the manifest has {len(data):,} bytes, more than any real one")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestInvalid(f"the manifest cannot be read: {error}") from error
    if manifest.schema_version != 2:
        raise ManifestInvalid(f"the manifest has the schema version {manifest.schema_version}")
    if len(manifest.layers) > MAX_LAYERS:
        raise ManifestInvalid(f"the manifest names {len(manifest.layers)} layers")
    for blob in (manifest.config, *manifest.layers):
        try:
            blob_name(blob.digest)
        except InvalidDigest as error:
            raise ManifestInvalid(f"the manifest names a blob wrongly: {error}") from error
        if not 0 <= blob.size <= MAX_LAYER_BYTES:
            raise ManifestInvalid(f"the manifest says that {blob.digest} has {blob.size} bytes")
    return manifest


def manifest_path(root: Path, name: ModelName) -> Path:
    """Where that manifest is; a name that exists in another case keeps its spelling."""
    path = root
    for part in (name.host, name.namespace, name.model, name.tag):
        exact = path / part
        if not exact.exists():
            exact = next((p for p in _entries(path) if p.name.lower() == part.lower()), exact)
        path = exact
    return path


def write_manifest(root: Path, name: ModelName, data: bytes) -> None:
    """Store the bytes as they are.

    Those that are there already are not written again, which needs no room on a full disk and
    leaves the file its time.

    Raises:
      StoreError, StoreFull: the disk refused.
    """
    path = manifest_path(root, name)
    if _has(path, data):
        return
    try:
        make_directories(path.parent)
    except OSError as error:
        raise StoreError(f"the manifest of {name} cannot be written: {error}") from error
    write_atomically(path, data)


def read_manifest(root: Path, name: ModelName) -> bytes:
    """The bytes of that manifest.

    Raises:
      ManifestMissing: there is none.
      ManifestInvalid: it is larger than any manifest.
    """
    try:
        return _read(manifest_path(root, name))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ManifestMissing(f"there is no manifest of {name} in the store") from None


def delete_manifest(root: Path, name: ModelName) -> bool:
    """Remove that manifest and the directories that it leaves empty; False if there is none."""
    path = manifest_path(root, name)
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    for directory in list(path.parents)[:3]:
        try:
            directory.rmdir()
        except OSError:
            break  # another model's manifest is in it
    return True


def list_manifests(root: Path) -> list[StoredManifest]:
    """All manifests with a proper name, sorted by it; their bytes are not checked.

    Raises:
      ManifestInvalid: one is larger than any manifest.
    """
    found = []
    for host in _entries(root):
        for namespace in _entries(host):
            for model in _entries(namespace):
                for tag in _entries(model):
                    try:
                        name = parse_name(f"{host.name}/{namespace.name}/{model.name}:{tag.name}")
                        modified = tag.stat().st_mtime
                        found.append(StoredManifest(str(name), _read(tag), modified))
                    except (InvalidName, FileNotFoundError, IsADirectoryError):
                        continue  # not a manifest, or deleted meanwhile
    return sorted(found, key=lambda stored: stored.name)


def _entries(directory: Path) -> list[Path]:
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in paths if not path.name.startswith(TEMP_PREFIX)]


def _has(path: Path, data: bytes) -> bool:
    """Whether a file has just these bytes; one that cannot be read has not."""
    try:
        return _read(path) == data
    except (OSError, ManifestInvalid):
        return False


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"{path} is larger than any manifest")
    return data
