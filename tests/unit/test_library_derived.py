"""Models that are made of other models, and described, from any node."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ollamad import library as library_module
from ollamad.api.services import ServiceError
from ollamad.core.commands import DeleteModel, PutModel
from ollamad.core.description import NO_CHANGES, Changes
from ollamad.core.inference import Message
from ollamad.core.state import Model
from ollamad.store.errors import BlobMissing
from ollamad.store.manifests import describe
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import gguf_bytes
from tests.unit.test_library_models import NAME, REFERENCE, A, B, World, until

JINJA = "{% if tools %}x{% endif %}<think>"


@pytest.fixture
async def world(nursery: trio.Nursery, tmp_path: Path) -> World:
    """The model is on A alone."""
    world = World(nursery, tmp_path)
    await world.start(A, B)
    await world.pulled(A)
    # Until it has said so itself, the same pull again would join it.
    table = world.nodes[A].table
    await until(world.shared, lambda: {t.status for t in table.list()} == {"completed"})
    return world


@pytest.mark.parametrize("asked", [A, B])
async def test_a_copy_is_the_same_model(world: World, asked: str) -> None:
    library = world.nodes[asked].library  # type: ignore[index]
    model = await library.derive("Copy", NAME, NO_CHANGES)
    assert (model.name, model.digest) == ("Copy:latest", world.models[NAME].digest)
    await until(world.shared, lambda: world.confirmed("copy:latest") == (A,))
    assert await world.nodes[A].store.read_manifest("copy") == model.manifest


@pytest.mark.parametrize("changes", [NO_CHANGES, Changes(system="Arr.")])
async def test_a_model_whose_base_is_deleted_while_it_is_made_has_all_its_blobs(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: Changes
) -> None:
    node, real = world.nodes[A], ModelStore.model_of

    async def slow(self: ModelStore, name: str, manifest: bytes) -> Model:
        model = await real(self, name, manifest)
        world.shared.apply(DeleteModel(NAME))
        await until(world.shared, lambda: NAME not in node.library._share._held)
        return model

    monkeypatch.setattr(ModelStore, "model_of", slow)
    model = await node.library.derive("other", NAME, changes)
    digests = {layer.digest for layer in model.layers}
    await world.settled()
    assert await node.holds(digests) == digests
    await until(world.shared, lambda: world.confirmed("other:latest") == (A,))


async def test_what_lost_a_blob_before_it_was_published_is_not_published(world: World) -> None:
    node = world.nodes[A]
    model = msgspec.structs.replace(world.models[NAME], name="other:latest")
    await node.store.remove_blob(model.layers[-1].digest)
    with pytest.raises(BlobMissing, match="was deleted meanwhile; try again"):
        await node.library._share.publish(model, (A,))
    assert "other:latest" not in world.models


@pytest.mark.parametrize("asked", [A, B])
async def test_a_derived_model_says_what_was_changed(world: World, asked: str) -> None:
    library = world.nodes[asked].library  # type: ignore[index]
    changes = Changes(
        template=JINJA,
        system="Arr.",
        parameters={"temperature": 0.5, "stop": ["x"]},
        messages=(Message("user", "hi"),),
        licenses=("Mine",),
    )
    model = await library.derive("pirate", NAME, changes)
    assert model.details.capabilities == ("completion", "tools", "thinking")
    described = await library.describe("PIRATE")
    assert (described.template, described.system) == (JINJA, "Arr.")
    assert described.parameters == {"temperature": 0.5, "stop": ["x"]}
    assert described.messages == (Message("user", "hi"),)
    assert described.licenses == ("MIT", "Mine")
    assert described.metadata["general.architecture"] == "llama"
    assert described.parameter_count > 0
    # What is changed again is replaced; parameters are added, the rest stays.
    again = Changes(system="Ho.", parameters={"temperature": 1, "top_k": 3})
    await library.derive("pirate", "pirate", again)
    described = await library.describe("pirate")
    assert (described.template, described.system) == (JINJA, "Ho.")
    assert described.parameters == {"temperature": 1, "stop": ["x"], "top_k": 3}
    assert described.licenses == ("MIT", "Mine")
    assert (await library.describe(NAME)).system == ""
    types = [layer.media_type for layer in describe(world.models["pirate:latest"].manifest).layers]
    assert len(types) == len(set(types)) + 1  # two licences, nothing else twice
    parts = await world.nodes[A].store.runtime_parts(world.models["pirate:latest"])
    assert parts.params.temperature == 1.0
    assert parts.params.stop == ("x",)


async def test_a_file_becomes_a_model_with_parts(world: World) -> None:
    library = world.nodes[A].library
    digest = next(
        layer.digest for layer in world.models[NAME].layers if layer.media_type.endswith("model")
    )
    await library.create("own", {"m.gguf": digest}, Changes(system="One."))
    with pytest.raises(ServiceError, match="another model") as caught:
        await library.create("own", {"m.gguf": digest}, Changes(system="Two."))
    assert caught.value.status == 409
    await library.create("own", {"m.gguf": digest}, Changes(system="Two."), replace=True)
    assert (await library.describe("own")).system == "Two."


async def test_without_a_holder_nothing_can_be_made(world: World) -> None:
    library = world.nodes[B].library
    await world.nodes[A].stop()
    for ask in (library.describe(NAME), library.derive("x", NAME)):
        with pytest.raises(ServiceError) as caught:
            await ask
        assert (caught.value.status, caught.value.code) == (503, "NO_REPLICA")
    with pytest.raises(ServiceError) as caught:
        await library.describe("nope")
    assert caught.value.status == 404


async def test_what_does_not_fit_between_nodes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Changes(licenses=("x" * 2000,))
    await world.nodes[A].library.derive("long", NAME, long)
    monkeypatch.setattr(library_module, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(ServiceError) as caught:
        await world.nodes[B].library.derive("other", NAME, long)
    assert caught.value.status == 413
    # A description leaves the licences out rather than failing.
    assert (await world.nodes[B].library.describe("long")).licenses == ()
    assert len((await world.nodes[A].library.describe("long")).licenses) == 2


async def test_a_transfer_is_found_wherever_it_runs(world: World) -> None:
    a, b = world.nodes[A].library, world.nodes[B].library
    transfer_id = await b.download(REFERENCE, nodes=[B])
    await until(world.shared, lambda: B in world.confirmed())
    for library in (a, b):
        found = await library.transfer(transfer_id)
        assert found is not None
        assert (found.id, found.node_id) == (transfer_id, B)
    pulled = next(t for t in await b.transfers() if t.type == "download" and t.node_id == A)
    seen = await b.transfer(pulled.id)
    assert seen is not None
    assert seen.digest == world.models[NAME].layers[1].digest
    assert await a.transfer("nobody-1") is None
    await world.nodes[A].stop()
    assert await b.transfer(pulled.id) is None


async def test_what_another_node_made_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = world.nodes[B].library
    made = msgspec.structs.replace(world.models[NAME], name="late:latest")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(library._until_known, "late", made.digest)
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        world.shared.apply(PutModel(made))
    monkeypatch.setattr(library_module, "PEER_TIMEOUT_S", 0.01)
    with pytest.raises(ServiceError) as caught:
        await library._until_known("late", "sha256:other")
    assert (caught.value.status, caught.value.code) == (503, "BEHIND")


ADAPTER = gguf_bytes({"general.architecture": "llama", "general.type": "adapter"})
PROJECTOR = gguf_bytes({"general.architecture": "clip"})


async def upload(world: World, node: str, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    await world.nodes[node].library.receive_blob(digest, chunks())  # type: ignore[index]
    return digest


@pytest.mark.parametrize("asked", [A, B])
async def test_an_adapter_reaches_the_node_that_holds_the_base(world: World, asked: str) -> None:
    digest = await upload(world, asked, ADAPTER)
    library = world.nodes[asked].library  # type: ignore[index]
    model = await library.derive("tuned", NAME, Changes(adapters=(digest,)))
    parts = await world.nodes[A].store.runtime_parts(model)
    assert [path.read_bytes() for path in parts.adapters] == [ADAPTER]
    # Another adapter takes its place.
    other = await upload(world, asked, ADAPTER + b"\0")
    model = await library.derive("tuned", "tuned", Changes(adapters=(other,)))
    assert len((await world.nodes[A].store.runtime_parts(model)).adapters) == 1


async def test_files_are_told_apart_by_what_they_are(world: World) -> None:
    library = world.nodes[A].library
    weights, adapter, projector = [
        await upload(world, A, data) for data in (gguf_bytes(), ADAPTER, PROJECTOR)
    ]
    model = await library.create("sees", {"p": projector, "w": weights}, Changes(system="x"))
    # Nothing is left of the steps in between.
    named = {layer.digest for m in world.models.values() for layer in m.layers}
    assert set(world.nodes[A].store._blob_files()) == named | {adapter}
    parts = await world.nodes[A].store.runtime_parts(model)
    assert parts.projector is not None
    for files, changes in (
        ({"w": weights, "a": adapter}, NO_CHANGES),
        ({"p": projector}, NO_CHANGES),
        ({"w": weights}, Changes(adapters=(projector,))),
        ({"w": "sha256:" + "0" * 64}, NO_CHANGES),
    ):
        with pytest.raises(ServiceError) as caught:
            await library.create("other", files, changes)
        assert caught.value.status == 400
    assert "other:latest" not in world.models


async def test_an_upload_waits_for_its_model_while_others_are_dropped(world: World) -> None:
    """The same bytes are a model's that is deleted just now: they are not freed with it."""
    [weights] = [
        layer.digest for layer in world.models[NAME].layers if layer.media_type.endswith("model")
    ]
    library = world.nodes[A].library
    assert await library.has_blob(weights)  # so whoever asks does not send it
    await library.delete(NAME)
    await world.settled()
    model = await library.create("late", {"f": weights})
    assert await world.nodes[A].holds({layer.digest for layer in model.layers})
    await library.delete("late")
    with trio.fail_after(10):
        while await world.nodes[A].store.has_blob(weights):  # noqa: ASYNC110 - a disk
            await trio.sleep(0.01)


async def test_what_is_pushed_is_not_freed_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = world.nodes[A]
    real = type(node.source).push

    async def late(self: object, *arguments: object) -> None:
        await node.store.delete_manifest(NAME)
        await node.store.free(lambda: (), grace_s=0)
        await real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(node.source), "push", late)
    transfer_id = await node.library.push(NAME, "reg.lan/me/x:latest")
    await until(world.shared, lambda: node.transfer(transfer_id).finished_at is not None)
    assert node.transfer(transfer_id).status == "completed", node.transfer(transfer_id).error


async def test_what_is_published_is_not_freed_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adopted model, which nobody else holds."""
    node, real = world.nodes[A], ModelStore.write_manifest
    model = msgspec.structs.replace(world.models[NAME], name="other:latest")
    await node.store.delete_manifest(NAME)

    async def late(self: ModelStore, name: str, data: bytes) -> None:
        await self.free(lambda: (), grace_s=0)
        await real(self, name, data)

    monkeypatch.setattr(ModelStore, "write_manifest", late)
    await node.library._share.publish(model, (A,))
    digests = {layer.digest for layer in model.layers}
    assert await node.holds(digests) == digests


@pytest.mark.parametrize("asked", [A, B])
async def test_a_push_runs_where_the_model_is(world: World, asked: str) -> None:
    library = world.nodes[asked].library  # type: ignore[index]
    transfer_id = await library.push(NAME, "reg.lan/me/x:latest")
    transfer = await library.transfer(transfer_id)
    assert transfer is not None
    assert (transfer.node_id, transfer.type) == (A, "upload")
    source = world.nodes[A].source
    await until(world.shared, lambda: bool(source.pushed))
    sent = source.pushed["reg.lan/me/x:latest"]
    assert set(sent) == {layer.digest for layer in world.models[NAME].layers}
    assert all(f"sha256:{hashlib.sha256(data).hexdigest()}" == d for d, data in sent.items())
    with pytest.raises(ServiceError):
        await library.push("absent", "x")
