"""Models: manifests in Ollama's layout, kept byte for byte, and what they say with their blobs."""

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from ollamad.core.inference import Message, Options
from ollamad.core.names import InvalidName
from ollamad.core.pieces import MIN_PIECE_SIZE
from ollamad.store import files, manifests
from ollamad.store.errors import BlobMissing, ManifestInvalid, ManifestMissing, StoreFull
from ollamad.store.gguf import GgufError
from ollamad.store.manifests import (
    ADAPTER_TYPE,
    CONFIG_TYPE,
    LICENSE_TYPE,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    MESSAGES_TYPE,
    MODEL_TYPE,
    PARAMS_TYPE,
    PROJECTOR_TYPE,
    SYSTEM_TYPE,
    TEMPLATE_TYPE,
    Descriptor,
    Manifest,
    describe,
    manifest_digest,
)
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import gguf_bytes

GGUF = gguf_bytes()


@pytest.fixture
async def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


@pytest.fixture
async def gguf(store: ModelStore) -> str:
    return (await store.put_bytes(GGUF))[0]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def foreign_manifest(store: ModelStore, *layers: tuple[str, bytes]) -> bytes:
    """A manifest as another program would write it, with its blobs in the store."""
    descriptors = []
    for media_type, data in ((CONFIG_TYPE, b"{}"), *layers):
        digest, _ = await store.put_bytes(data)
        descriptors.append(Descriptor(media_type, digest, len(data)))
    return msgspec.json.format(
        msgspec.json.encode(Manifest(2, MANIFEST_TYPE, descriptors[0], tuple(descriptors[1:]))),
        indent=3,
    )


async def test_a_model_is_built_as_ollama_would(store: ModelStore, gguf: str) -> None:
    model = await store.build_model(
        "Tiny:1b",
        gguf,
        template="{{ .Prompt }}",
        system="Be kind.",
        params=Options(temperature=0.5, stop=("<end>",)),
        license=["MIT", "Apache-2.0"],
    )
    assert model.name == "Tiny:1b"
    assert model.digest == digest_of(model.manifest)
    raw = msgspec.json.decode(model.manifest)
    assert (raw["schemaVersion"], raw["mediaType"]) == (2, MANIFEST_TYPE)
    assert [layer["mediaType"] for layer in raw["layers"]] == [
        MODEL_TYPE,
        LICENSE_TYPE,
        LICENSE_TYPE,
        TEMPLATE_TYPE,
        SYSTEM_TYPE,
        PARAMS_TYPE,
    ]
    assert raw["layers"][0] == {"mediaType": MODEL_TYPE, "digest": gguf, "size": len(GGUF)}
    config = msgspec.json.decode(store.blob_path(raw["config"]["digest"]).read_bytes())
    assert config == {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "43K",
        "file_type": "Q4_1",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {
            "type": "layers",
            "diff_ids": [layer["digest"] for layer in raw["layers"]],
        },
    }
    assert [layer.media_type for layer in model.layers][:2] == [CONFIG_TYPE, MODEL_TYPE]
    for layer in model.layers:
        assert await store.blob_size(layer.digest) == layer.size
        pieces = await store.piece_map(layer.digest)
        assert (layer.piece_size, layer.pieces_root) == (MIN_PIECE_SIZE, pieces.root())
    assert model.details.quantization_level == "Q4_1"
    assert model.size == sum(layer.size for layer in model.layers) > len(GGUF)
    assert await store.list_manifests() == []  # that is the caller's decision


async def test_the_same_parts_make_the_same_manifest(
    store: ModelStore, gguf: str, tmp_path: Path
) -> None:
    other = ModelStore(tmp_path / "other", keep_free_bytes=0)
    await other.prepare()
    await other.put_bytes(GGUF)
    made = [await place.build_model("a", gguf, system="x") for place in (store, other)]
    assert made[0].manifest == made[1].manifest
    assert made[0].layers == made[1].layers


async def test_what_a_runner_needs_comes_back(store: ModelStore, gguf: str) -> None:
    params = Options(temperature=0.5, stop=("<end>",), num_ctx=64)
    model = await store.build_model(
        "a", gguf, template="T", system="S", params=params, license="MIT"
    )
    parts = await store.runtime_parts(model)
    assert parts.gguf.read_bytes() == GGUF
    assert (parts.template, parts.system, parts.licenses) == ("T", "S", ("MIT",))
    assert parts.params == params
    bare = await store.runtime_parts(await store.build_model("b", gguf))
    assert (bare.template, bare.system, bare.licenses, bare.messages) == (None, None, (), ())
    assert bare.params == Options()


async def test_a_template_with_tools_makes_the_model_able_to_use_them(
    store: ModelStore, gguf: str
) -> None:
    model = await store.build_model("a", gguf, template="{{ if .Tools }}…{{ end }}")
    assert model.details.capabilities == ("completion", "tools")


async def test_a_model_of_ollama_is_read_and_its_manifest_kept(store: ModelStore) -> None:
    data = await foreign_manifest(
        store,
        (MODEL_TYPE, GGUF),
        ("application/vnd.ollama.image.novelty", b"?"),
        (PARAMS_TYPE, b'{"temperature": 1, "stop": ["a"], "penalize_newline": true}'),
        (MESSAGES_TYPE, b'[{"role": "user", "content": "hi", "images": []}]'),
        (LICENSE_TYPE, b"caf\xe9"),
    )
    model = await store.model_of("library/tiny", data)
    assert (model.name, model.manifest, model.digest) == ("tiny:latest", data, digest_of(data))
    assert len(model.layers) == 6
    parts = await store.runtime_parts(model)
    assert parts.params == Options(temperature=1.0, stop=("a",))
    assert parts.messages == (Message("user", "hi"),)
    assert parts.licenses == ("caf\ufffd",)


async def test_a_models_adapters_and_projector_are_files_that_the_runner_needs(
    store: ModelStore,
) -> None:
    layers = [(ADAPTER_TYPE, b"x"), (ADAPTER_TYPE, b"y"), (PROJECTOR_TYPE, b"z")]
    model = await store.model_of("a", await foreign_manifest(store, (MODEL_TYPE, GGUF), *layers))
    parts = await store.runtime_parts(model)
    assert [path.read_bytes() for path in parts.adapters] == [b"x", b"y"]
    assert parts.projector is not None
    assert parts.projector.read_bytes() == b"z"
    await store.remove_blob(digest_of(b"y"))
    with pytest.raises(BlobMissing):  # without it, it would be another model
        await store.runtime_parts(model)


async def test_parameters_of_the_wrong_type_are_refused(store: ModelStore) -> None:
    data = await foreign_manifest(store, (MODEL_TYPE, GGUF), (PARAMS_TYPE, b'{"top_k": []}'))
    with pytest.raises(ManifestInvalid, match="parameters of a:latest"):
        await store.runtime_parts(await store.model_of("a", data))


async def test_a_model_needs_all_its_blobs_in_the_right_size(store: ModelStore, gguf: str) -> None:
    model = await store.build_model("a", gguf, system="x")
    wrong = model.manifest.replace(f'"size":{len(GGUF)}'.encode(), b'"size":17')
    with pytest.raises(ManifestInvalid, match="has 17 bytes; here it has"):
        await store.model_of("a", wrong)
    await store.remove_blob(gguf)
    with pytest.raises(BlobMissing):
        await store.model_of("a", model.manifest)
    with pytest.raises(BlobMissing):
        await store.runtime_parts(model)
    with pytest.raises(BlobMissing):
        await store.build_model("a", gguf)


async def test_what_is_no_gguf_makes_no_model(store: ModelStore) -> None:
    digest, _ = await store.put_bytes(b"MZ this is a program")
    with pytest.raises(GgufError):
        await store.build_model("a", digest)
    assert len(list(store.blobs.iterdir())) == 1  # no config blob, nothing


async def test_a_manifest_without_a_model_layer_is_refused(store: ModelStore) -> None:
    with pytest.raises(ManifestInvalid, match="names no model layer"):
        await store.model_of("a", await foreign_manifest(store, (LICENSE_TYPE, b"MIT")))


CONFIG = {"mediaType": CONFIG_TYPE, "digest": f"sha256:{'0' * 64}", "size": 2}
GOOD = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": CONFIG, "layers": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"\xff\xff", "cannot be read"),
        (b"[" * 50_000, "cannot be read"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "more than any real one"),
        ({**GOOD, "schemaVersion": 1}, "schema version 1"),
        ({**GOOD, "layers": [CONFIG] * 65}, "65 layers"),
        ({**GOOD, "config": {**CONFIG, "size": -1}}, "has -1 bytes"),
        ({**GOOD, "config": {**CONFIG, "size": 1 << 60}}, "bytes"),
        ({**GOOD, "config": {**CONFIG, "size": 1.5}}, "cannot be read"),
        ({**GOOD, "config": {**CONFIG, "digest": "sha256:../../x"}}, "names a blob wrongly"),
        ({**GOOD, "layers": [{**CONFIG, "digest": ""}]}, "names a blob wrongly"),
    ],
)
def test_a_hostile_manifest_is_refused(content: bytes | dict[str, object], message: str) -> None:
    data = content if isinstance(content, bytes) else msgspec.json.encode(content)
    with pytest.raises(ManifestInvalid, match=message):
        describe(data)


def test_a_manifest_names_each_blob_once() -> None:
    data = msgspec.json.encode({**GOOD, "layers": [CONFIG, CONFIG]})
    assert len(describe(data).blobs) == 1
    assert manifest_digest(data) == digest_of(data)


# Manifests as files.


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tiny", "registry.ollama.ai/library/tiny/latest"),
        ("me/tiny:q4", "registry.ollama.ai/me/tiny/q4"),
        ("hf.co/me/tiny", "hf.co/me/tiny/latest"),
        ("localhost:5000/me/tiny:x", "localhost:5000/me/tiny/x"),
    ],
)
async def test_manifests_lie_where_ollama_looks(store: ModelStore, name: str, path: str) -> None:
    data = b'{"as": "it is" }\n'
    await store.write_manifest(name, data)
    assert (store.root / "manifests" / path).read_bytes() == data
    assert await store.read_manifest(name) == data
    (stored,) = await store.list_manifests()
    assert stored.data == data
    assert await store.delete_manifest(name)
    assert not await store.delete_manifest(name)
    assert list(store.manifests.iterdir()) == []  # no empty directories are left


async def test_names_are_compared_without_case(store: ModelStore) -> None:
    await store.write_manifest("Me/Tiny:Q4", b"1")
    await store.write_manifest("me/tiny:q4", b"2")
    assert [(m.name, m.data) for m in await store.list_manifests()] == [("Me/Tiny:Q4", b"2")]
    assert await store.read_manifest("ME/TINY:Q4") == b"2"
    assert await store.delete_manifest("me/TINY:q4")


async def test_a_manifest_that_is_not_there(store: ModelStore) -> None:
    await store.write_manifest("a/b:c", b"{}")
    for name in ("b:c", "a/b", "a/b:d", "x/y/z:1"):
        with pytest.raises(ManifestMissing):
            await store.read_manifest(name)
        assert not await store.delete_manifest(name)


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "a:b/c:d", "a:..", "/etc/passwd", "x\0y"])
async def test_what_is_no_name_never_becomes_a_path(store: ModelStore, name: str) -> None:
    for work in (store.read_manifest, store.delete_manifest):
        with pytest.raises(InvalidName):
            await work(name)
    with pytest.raises(InvalidName):
        await store.write_manifest(name, b"{}")


async def test_strange_files_among_the_manifests_are_passed_over(store: ModelStore) -> None:
    await store.write_manifest("a", b"{}")
    (store.manifests / "file").touch()
    (store.manifests / "registry.ollama.ai/library/a/.DS_Store").touch()
    (store.manifests / "registry.ollama.ai/library/a/dir").mkdir()
    (store.manifests / "registry.ollama.ai/library/a/.ollamad-77.tmp").touch()
    assert [stored.name for stored in await store.list_manifests()] == ["a:latest"]


async def test_a_replaced_manifest_is_never_half_written(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.write_manifest("a", b"old")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            await store.write_manifest("a", b"new")
    assert await store.read_manifest("a") == b"old"
    await store.prepare()  # the next start
    assert len(list(store.manifests.rglob("*/*/*/*"))) == 1
    await store.write_manifest("a", b"new")
    assert await store.read_manifest("a") == b"new"


async def test_a_manifest_that_is_there_already_is_not_written_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.write_manifest("a", b"same")

    def full(path: Path, data: bytes) -> None:
        raise StoreFull(len(data), 0)

    monkeypatch.setattr(manifests, "write_atomically", full)
    await store.write_manifest("a", b"same")
    with pytest.raises(StoreFull):
        await store.write_manifest("a", b"other")


async def test_the_directories_of_a_manifest_outlive_a_power_cut(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new directory is in one that is synced after it was made."""
    synced: set[Path] = set()
    monkeypatch.setattr(files, "fsync_directory", synced.add)
    await store.write_manifest("me/new:7b", b"{}")
    assert synced == {
        store.manifests.joinpath(*parts)
        for parts in (
            (),
            ("registry.ollama.ai",),
            ("registry.ollama.ai", "me"),
            ("registry.ollama.ai", "me", "new"),
        )
    }


# Freeing.


async def test_only_what_no_model_names_is_unreferenced(store: ModelStore, gguf: str) -> None:
    one = await store.build_model("one", gguf, system="1")
    two = await store.build_model("two", gguf, system="2")
    stray, _ = await store.put_bytes(b"stray")
    await store.write_manifest("one", one.manifest)
    await store.write_manifest("two", two.manifest)
    assert await store.unreferenced([]) == set()  # all too young
    assert await store.unreferenced([], grace_s=0) == {stray}
    assert await store.unreferenced([stray], grace_s=0) == set()
    await store.delete_manifest("two")
    only_two = {layer.digest for layer in two.layers} - {layer.digest for layer in one.layers}
    assert len(only_two) == 2  # its config and its system text
    assert await store.unreferenced([stray], grace_s=0) == only_two
    await store.delete_manifest("one")
    assert gguf in await store.unreferenced([], grace_s=0)


async def test_an_unreadable_manifest_protects_everything(store: ModelStore) -> None:
    await store.put_bytes(b"stray")
    await store.write_manifest("broken", b"{")
    assert await store.unreferenced([], grace_s=0) == set()
