"""A node's models on disk: blobs and manifests, and what they say together.

Knows Ollama's layout and media types, so an Ollama model directory can be used as it is. Does
not know the cluster: which models there should be is the daemon's business.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ollamad.core.description import Changes, Description
from ollamad.core.inference import Message, Options
from ollamad.core.names import parse_name
from ollamad.core.state import Layer, Model
from ollamad.core.weights import Weights
from ollamad.store import manifests
from ollamad.store.blobs import GRACE_S, KEEP_FREE_BYTES, BlobStore
from ollamad.store.details import capabilities_of, details_of, facts_of
from ollamad.store.errors import BlobMissing, ManifestInvalid
from ollamad.store.files import TEMP_PREFIX
from ollamad.store.gguf import GgufError, GgufHeader, Skipped
from ollamad.store.manifests import Descriptor, Manifest, StoredManifest, describe
from ollamad.store.pins import Hold
from ollamad.store.weights import read_weights

log = logging.getLogger(__name__)

# Licences are the longest of the small layers, with up to 40 kB.
MAX_SMALL_LAYER_BYTES: Final = 1 << 20
MAX_REMEMBERED: Final = 256  # headers in short, a kilobyte each


class RuntimeParts(msgspec.Struct, frozen=True):
    """What a runner needs of a model; None or empty where the model says nothing."""

    gguf: Path
    template: str | None  # Go template of a layer; None: the GGUF's own (jinja) template
    system: str | None
    params: Options
    messages: tuple[Message, ...]
    licenses: tuple[str, ...]
    adapters: tuple[Path, ...] = ()  # LoRA
    projector: Path | None = None
    weights: Weights = Weights()


class Freed(msgspec.Struct, frozen=True):
    """What freeing brought."""

    size: int  # bytes
    held: frozenset[str]  # not needed but held: to be tried again


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: tuple[str, ...]


class _Config(msgspec.Struct, frozen=True):
    """The config blob, with the fields and constants that Ollama writes."""

    model_format: str
    model_family: str
    model_families: tuple[str, ...]
    model_type: str
    file_type: str
    rootfs: _RootFs
    architecture: str = "amd64"
    os: str = "linux"


class ModelStore(BlobStore):
    """All of a node's models under `root`. Starts nothing; call `prepare` first."""

    def __init__(
        self, root: Path, *, keep_free_bytes: int = KEEP_FREE_BYTES, shelves: Sequence[Path] = ()
    ) -> None:
        super().__init__(root, keep_free_bytes=keep_free_bytes, shelves=shelves)
        self.manifests = root / "manifests"
        self._weights: dict[str, Weights] = {}  # by the blob's digest

    def _prepare(self) -> None:
        super()._prepare()
        self.manifests.mkdir(exist_ok=True)
        for temp in self.manifests.rglob(f"{TEMP_PREFIX}*"):
            temp.unlink()

    # Manifests. All raise InvalidName (a ValueError) for what is no model name.

    async def write_manifest(self, name: str, data: bytes) -> None:
        """Store a manifest's bytes as they are; replaces the one of that name at once.

        Raises:
          StoreError, StoreFull: the disk refused.
        """
        work = functools.partial(manifests.write_manifest, self.manifests, parse_name(name), data)
        await self.in_thread(work)

    async def read_manifest(self, name: str) -> bytes:
        """The bytes of a manifest.

        Raises:
          ManifestMissing, ManifestInvalid: there is none, or it is absurdly large.
        """
        work = functools.partial(manifests.read_manifest, self.manifests, parse_name(name))
        return await self.in_thread(work)

    async def delete_manifest(self, name: str) -> bool:
        """Remove a manifest; False if there was none. Blobs stay: see `unreferenced`."""
        work = functools.partial(manifests.delete_manifest, self.manifests, parse_name(name))
        return await self.in_thread(work)

    async def list_manifests(self) -> list[StoredManifest]:
        """All manifests on the disk, sorted by name."""
        return await self.in_thread(functools.partial(manifests.list_manifests, self.manifests))

    async def shelved_manifests(self) -> list[StoredManifest]:
        """All manifests on the shelves; of a name that is on several, the first shelf's."""
        found: dict[str, StoredManifest] = {}
        for shelf in self.shelves:
            listing = functools.partial(manifests.list_manifests, shelf / "manifests")
            for stored in await self.in_thread(listing):
                found.setdefault(stored.name, stored)
        return list(found.values())

    # Models.

    async def build_model(
        self,
        name: str,
        gguf_digest: str,
        *,
        template: str | None = None,
        system: str | None = None,
        params: Options | None = None,
        license: str | Sequence[str] | None = None,
        projectors: Sequence[str] = (),
        hold: Hold | None = None,
    ) -> Model:
        """Make a model of a GGUF blob that is here: writes its small blobs, not the manifest.

        `projectors` are digests of more GGUF blobs, which let it see or hear. With a `hold` the
        small blobs are held from the moment that they are here.

        The same parts always give the same manifest, on whatever node.

        Raises:
          BlobMissing: the GGUF is not here.
          GgufError: it is not a GGUF file that can be used.
          StoreError, StoreFull: the disk refused.
        """
        canonical = str(parse_name(name))
        details = details_of(facts_of(await self.read_header(gguf_digest)))
        gguf = Descriptor(manifests.MODEL_TYPE, gguf_digest, await self.blob_size(gguf_digest))
        texts = [license] if isinstance(license, str) else list(license or ())
        parts = [(manifests.LICENSE_TYPE, text) for text in texts]
        if template:
            parts.append((manifests.TEMPLATE_TYPE, template))
        if system:
            parts.append((manifests.SYSTEM_TYPE, system))
        if params is not None and params != Options():
            parts.append((manifests.PARAMS_TYPE, msgspec.json.encode(params).decode()))
        layers = [gguf]
        for digest in projectors:
            layers.append(await self._gguf_part(manifests.PROJECTOR_TYPE, digest))
        for media_type, text in parts:
            layers.append(await self._put_part(media_type, text.encode(), hold))
        config = _Config(
            model_format=details.format,
            model_family=details.family,
            model_families=details.families,
            model_type=details.parameter_size,
            file_type=details.quantization_level,
            rootfs=_rootfs(layers),
        )
        return await self._model_of_layers(canonical, config, layers, hold)

    async def derive_model(
        self, name: str, base: bytes, changes: Changes, hold: Hold | None = None
    ) -> Model:
        """Make a model of another one's manifest: writes its small blobs, not the manifest.

        Layers that the changes do not concern are kept, unknown ones too. Without changes the
        manifest, and so the digest, is the same. With a `hold` all its blobs are held from the
        moment that they are here.

        Raises:
          BlobMissing: a blob of the other one is not here.
          ManifestInvalid: the other one cannot be read, or a part of the new one is too large.
          StoreError, StoreFull: the disk refused.
        """
        canonical = str(parse_name(name))
        parsed = describe(base)
        if hold is not None:
            await hold.add(*(blob.digest for blob in parsed.blobs))
        if changes == Changes():
            return await self.model_of(canonical, base)
        replaced: dict[str, bytes] = {}
        if changes.template:
            replaced[manifests.TEMPLATE_TYPE] = changes.template.encode()
        if changes.system:
            replaced[manifests.SYSTEM_TYPE] = changes.system.encode()
        if changes.parameters:
            merged = await self._parameters(parsed) | changes.parameters
            replaced[manifests.PARAMS_TYPE] = msgspec.json.encode(merged, order="sorted")
        if changes.messages:
            replaced[manifests.MESSAGES_TYPE] = msgspec.json.encode(changes.messages)
        gone = {*replaced, *([manifests.ADAPTER_TYPE] if changes.adapters else [])}
        layers = [layer for layer in parsed.layers if layer.media_type not in gone]
        for digest in changes.adapters:
            layers.append(await self._gguf_part(manifests.ADAPTER_TYPE, digest))
        for text in changes.licenses:
            layers.append(await self._put_part(manifests.LICENSE_TYPE, text.encode(), hold))
        for media_type, data in replaced.items():
            layers.append(await self._put_part(media_type, data, hold))
        try:
            config = msgspec.json.decode(await self._read_small(parsed.config), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ManifestInvalid(f"the config of the model cannot be read: {error}") from error
        config |= {"rootfs": _rootfs(layers), **changes.config}
        return await self._model_of_layers(canonical, config, layers, hold)

    async def describe_model(self, model: Model) -> Description:
        """What the small blobs and the file's header of a model say.

        Raises:
          BlobMissing: a blob is not here.
          ManifestInvalid, GgufError: one cannot be read.
        """
        parsed = describe(model.manifest)
        header = await self.read_header(_gguf_of(parsed).digest)
        facts = facts_of(header)
        messages = await self._text(parsed, manifests.MESSAGES_TYPE)
        try:
            return Description(
                template=await self._text(parsed, manifests.TEMPLATE_TYPE) or facts.chat_template,
                system=await self._text(parsed, manifests.SYSTEM_TYPE) or "",
                parameters=await self._parameters(parsed),
                messages=msgspec.json.decode(messages or b"[]", type=tuple[Message, ...]),
                licenses=tuple(await self._texts(parsed, manifests.LICENSE_TYPE)),
                metadata={
                    key: [] if isinstance(value, Skipped) else value
                    for key, value in header.metadata.items()
                },
                parameter_count=facts.parameter_count,
                config=await self._config(parsed),
            )
        except msgspec.DecodeError as error:
            raise ManifestInvalid(f"the messages of {model.name}: {error}") from error

    async def model_of(self, name: str, manifest: bytes) -> Model:
        """The model that these bytes describe, from blobs that are here (also Ollama's own).

        Raises:
          ManifestInvalid: it names no GGUF, or a blob has another size than it says.
          BlobMissing: a blob is not here.
          GgufError: the model is not a GGUF file that can be used.
        """
        parsed = describe(manifest)
        layers = []
        for blob in parsed.blobs:
            size = await self.blob_size(blob.digest)
            if size != blob.size:
                raise ManifestInvalid(
                    f"the manifest of {name} says that {blob.digest} has {blob.size:,} bytes; "
                    f"here it has {size:,}"
                )
            pieces = await self.piece_map(blob.digest)
            layers.append(
                Layer(blob.media_type, blob.digest, size, pieces.piece_size, pieces.root())
            )
        facts = facts_of(await self.read_header(_gguf_of(parsed).digest))
        details = details_of(facts)
        template = await self._text(parsed, manifests.TEMPLATE_TYPE)
        if template is not None:
            capabilities = capabilities_of(facts.architecture, facts.pooling_type, template)
            details = msgspec.structs.replace(details, capabilities=capabilities)
        if any(layer.media_type == manifests.PROJECTOR_TYPE for layer in parsed.layers):
            capabilities = (*details.capabilities, "vision")
            details = msgspec.structs.replace(details, capabilities=capabilities)
        return Model(
            name=str(parse_name(name)),
            digest=manifests.manifest_digest(manifest),
            manifest=manifest,
            details=details,
            layers=tuple(layers),
            modified_at=time.time(),
        )

    async def read_header(self, gguf_digest: str) -> GgufHeader:
        """The GGUF header of a blob that is here.

        Raises:
          BlobMissing: it is not here.
          GgufError: it is not a GGUF file that can be used.
        """
        path = await self.find_blob(gguf_digest)
        try:
            return await self.in_thread(functools.partial(read_weights, path))
        except FileNotFoundError:
            raise BlobMissing(f"blob {gguf_digest} is not in the store") from None

    async def weights(self, digest: str) -> Weights:
        """What decides how the weights of a blob are run; remembered, for every request asks.

        Raises:
          BlobMissing, GgufError: as `read_header`.
        """
        known = self._weights.get(digest)
        if known is None:
            known = facts_of(await self.read_header(digest)).weights
            while len(self._weights) >= MAX_REMEMBERED:
                del self._weights[next(iter(self._weights))]
            self._weights[digest] = known
        return known

    async def runtime_parts(self, model: Model) -> RuntimeParts:
        """Where the model's large files are, and what its small layers say.

        Raises:
          BlobMissing: a blob is not here.
          ManifestInvalid: a layer cannot be read.
          GgufError: the weights cannot be used.
        """
        manifest = describe(model.manifest)
        gguf = _gguf_of(manifest)
        adapters = await self._paths(manifest, manifests.ADAPTER_TYPE)
        projectors = await self._paths(manifest, manifests.PROJECTOR_TYPE)
        params = await self._text(manifest, manifests.PARAMS_TYPE)
        messages = await self._text(manifest, manifests.MESSAGES_TYPE)
        try:
            return RuntimeParts(
                gguf=await self.find_blob(gguf.digest),
                template=await self._text(manifest, manifests.TEMPLATE_TYPE),
                system=await self._text(manifest, manifests.SYSTEM_TYPE),
                # Lenient: models carry parameters that were renamed or dropped since.
                params=msgspec.json.decode(params or b"{}", type=Options, strict=False),
                messages=msgspec.json.decode(messages or b"[]", type=tuple[Message, ...]),
                licenses=tuple(await self._texts(manifest, manifests.LICENSE_TYPE)),
                adapters=adapters,
                projector=projectors[-1] if projectors else None,
                weights=await self.weights(gguf.digest),
            )
        except msgspec.DecodeError as error:
            raise ManifestInvalid(f"the parameters of {model.name}: {error}") from error

    async def free(
        self,
        keep: Callable[[], Iterable[str]],
        *,
        among: Iterable[str] | None = None,
        grace_s: float = GRACE_S,
    ) -> Freed:
        """Remove blobs that neither `keep` nor a manifest here names, and nobody holds.

        Args:
          keep: digests that are wanted; asked once the sweep has begun, see `pins.py`.
          among: free no others than these.
          grace_s: leave younger ones alone.

        If a manifest cannot be read nothing is freed, for it may name any blob.
        """
        freed, held = 0, set[str]()
        with self.pins.sweep() as sweep:
            doomed = await self.unreferenced(keep(), grace_s=grace_s)
            for digest in doomed if among is None else doomed & set(among):
                with sweep.removing(digest) as allowed:
                    if allowed:
                        freed += await self.remove_blob(digest)
                    else:
                        held.add(digest)
        return Freed(freed, frozenset(held))

    async def unreferenced(self, keep: Iterable[str], *, grace_s: float = GRACE_S) -> set[str]:
        """Blobs that neither `keep` nor any manifest on the disk names, older than the grace."""
        named = set(keep)
        try:
            for stored in await self.list_manifests():
                named.update(blob.digest for blob in describe(stored.data).blobs)
        except ManifestInvalid as error:
            log.warning("no blobs are freed because a manifest cannot be read: %s", error)
            return set()
        return await self.blobs_except(named, grace_s=grace_s)

    async def _model_of_layers(
        self,
        name: str,
        config: "_Config | dict[str, Any]",
        layers: Sequence[Descriptor],
        hold: Hold | None,
    ) -> Model:
        data = msgspec.json.encode(config)
        config_blob = await self._put_part(manifests.CONFIG_TYPE, data, hold)
        manifest = Manifest(2, manifests.MANIFEST_TYPE, config_blob, tuple(layers))
        return await self.model_of(name, msgspec.json.encode(manifest))

    async def _config(self, manifest: Manifest) -> dict[str, str]:
        """What the config says beyond what the file itself does."""
        known = msgspec.json.decode(await self._read_small(manifest.config), type=dict[str, Any])
        wanted = ("renderer", "parser", "requires")
        return {key: known[key] for key in wanted if isinstance(known.get(key), str)}

    async def _parameters(self, manifest: Manifest) -> dict[str, Any]:
        text = await self._text(manifest, manifests.PARAMS_TYPE)
        try:
            return msgspec.json.decode(text or b"{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ManifestInvalid(f"the parameters of the model: {error}") from error

    async def kind_of(self, gguf_digest: str) -> str:
        """What a GGUF blob that is here is for: `model`, `projector` or `adapter`.

        Raises:
          BlobMissing, GgufError: it is not here, or no GGUF file.
        """
        metadata = (await self.read_header(gguf_digest)).metadata
        if metadata.get("general.type") == "adapter":
            return "adapter"
        is_projector = metadata.get("general.type") == "mmproj"
        if is_projector or metadata.get("general.architecture") == "clip":
            return "projector"
        return "model"

    async def _gguf_part(self, media_type: str, digest: str) -> Descriptor:
        """A layer of a GGUF blob that is here and of that kind."""
        kind = await self.kind_of(digest)
        wanted = "adapter" if media_type == manifests.ADAPTER_TYPE else "projector"
        if kind != wanted:
            raise GgufError(f"{digest} is a {kind}, where the {wanted} should be")
        return Descriptor(media_type, digest, await self.blob_size(digest))

    async def _put_part(self, media_type: str, data: bytes, hold: Hold | None) -> Descriptor:
        if len(data) > MAX_SMALL_LAYER_BYTES:
            raise ManifestInvalid(f"a {media_type} of {len(data):,} bytes is too large")
        digest, _ = await self.put_bytes(data, hold=hold)
        return Descriptor(media_type, digest, len(data))

    async def _paths(self, manifest: Manifest, media_type: str) -> tuple[Path, ...]:
        """The files of the layers of that type, which must all be here."""
        digests = [layer.digest for layer in manifest.layers if layer.media_type == media_type]
        return tuple([await self.find_blob(digest) for digest in digests])

    async def _text(self, manifest: Manifest, media_type: str) -> str | None:
        texts = await self._texts(manifest, media_type)
        return texts[-1] if texts else None  # as in Ollama, the last one counts

    async def _texts(self, manifest: Manifest, media_type: str) -> list[str]:
        wanted = [layer for layer in manifest.layers if layer.media_type == media_type]
        return [await self._read_small(layer) for layer in wanted]

    async def _read_small(self, layer: Descriptor) -> str:
        path = await self.find_blob(layer.digest)

        def read() -> bytes:
            with open(path, "rb") as file:
                return file.read(MAX_SMALL_LAYER_BYTES + 1)

        try:
            data = await self.in_thread(read)
        except FileNotFoundError:
            raise BlobMissing(f"blob {layer.digest} is not in the store") from None
        if len(data) > MAX_SMALL_LAYER_BYTES:
            raise ManifestInvalid(f"the layer {layer.digest} is too large for {layer.media_type}")
        return data.decode(errors="replace")


def _rootfs(layers: Sequence[Descriptor]) -> _RootFs:
    return _RootFs("layers", tuple(layer.digest for layer in layers))


def _gguf_of(manifest: Manifest) -> Descriptor:
    for layer in manifest.layers:
        if layer.media_type == manifests.MODEL_TYPE:
            return layer
    raise ManifestInvalid("the manifest names no model layer")
