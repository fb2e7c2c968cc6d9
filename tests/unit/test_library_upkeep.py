"""Models that were there before, pulls that go on after a restart, and blobs that rot."""

import errno
import hashlib
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from ollamad import adoption, bringing, nearby, pulls, share
from ollamad import scrubbing as scrubbing_module
from ollamad.api.services import ServiceError
from ollamad.bringing import Bringer, NearbyFailed, Step
from ollamad.core.commands import AskReplicas, SetDesired
from ollamad.core.ids import NodeId
from ollamad.core.pieces import MIB, PieceHasher
from ollamad.core.placement import KEEP_FREE_BYTES
from ollamad.core.state import Model
from ollamad.scrubbing import Scrubbing
from ollamad.share import Share
from ollamad.sources.base import AccessRefused, OriginRefused, OriginUnreachable, SourceError
from ollamad.sources.references import resolve_source
from ollamad.store import manifests, scrub
from ollamad.store.errors import StoreFull
from ollamad.store.models import ModelStore
from ollamad.store.partial import PartialBlob
from ollamad.store.scrub import Rot, Scrubber
from ollamad.transfer.fetch import Fetcher
from tests.fakes.gguf_files import LLAMA, gguf_bytes
from tests.fakes.library_nodes import LibraryNode, ScriptedSource, until
from tests.unit.test_library_models import NAME, REFERENCE, A, B, C, World, comes_to_hold

LARGE = gguf_bytes(tensors={"w": ((1024, 1024), 0)}, fill=random.Random(4).randbytes(1 << 22))


@pytest.fixture
async def world(nursery: trio.Nursery, tmp_path: Path) -> World:
    world = World(nursery, tmp_path, LARGE)
    await world.start(A, B)
    return world


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "RESCAN_S", 0.02)
    monkeypatch.setattr(pulls, "MIRROR_INTERVAL_S", 0.01)


# What was there before.


async def ollama_at(path: Path, *names: str) -> ModelStore:
    """A directory as an Ollama leaves it."""
    store = ModelStore(path, keep_free_bytes=0)
    await store.prepare()
    for name in names:
        digest, _ = await store.put_bytes(gguf_bytes({**LLAMA, "general.name": name}))
        await store.write_manifest(name, (await store.build_model(name, digest)).manifest)
    return store


def adopt(world: World, node_id: NodeId, path: Path, *, read_only: bool) -> LibraryNode:
    """Give a node that directory; it is not started yet."""
    root = path.parent / f"{node_id}-root"
    node = LibraryNode(
        world.shared, world.net, node_id, root, LARGE, ollama=path, read_only=read_only
    )
    world.nodes[node_id] = node
    return node


@pytest.mark.parametrize("read_only", [False, True])
async def test_models_of_an_ollama_become_models_of_the_cluster(
    world: World, tmp_path: Path, read_only: bool
) -> None:
    theirs = await ollama_at(tmp_path / "ollama", "one", "me/two:7b")
    before = {path: path.read_bytes() for path in theirs.root.rglob("*") if path.is_file()}
    node = adopt(world, C, theirs.root, read_only=read_only)
    await world.start(C)
    await until(world.shared, lambda: {"one:latest", "me/two:7b"} <= world.models.keys())
    model = world.models["one:latest"]
    assert model.manifest == await theirs.read_manifest("one")
    assert (model.pinned, model.confirmed) == ((C,), (C,))
    # Others get it, and it can be described.
    world.shared.apply(SetDesired("one:latest", (B, C)))
    await until(world.shared, lambda: world.confirmed("one:latest") == (B, C))
    assert (await world.nodes[A].library.describe("one")).metadata["general.name"] == "one"
    # What is moved away from here stays on the disk all the same.
    world.shared.apply(AskReplicas("one:latest", 1, ()))
    world.shared.apply(SetDesired("one:latest", (B,)))
    await until(world.shared, lambda: world.confirmed("one:latest") == (B,))
    await world.settled()
    assert {path: path.read_bytes() for path in before} == before
    if read_only:
        here = {path for path in theirs.root.rglob("*") if path.is_file()}
        assert here == before.keys()
        assert list((node.root / "models" / "manifests").rglob("*"))


@pytest.mark.parametrize("read_only", [False, True])
async def test_what_is_deleted_does_not_come_back_but_what_is_new_does(
    world: World, tmp_path: Path, read_only: bool
) -> None:
    theirs = await ollama_at(tmp_path / "ollama", "one")
    node = adopt(world, C, theirs.root, read_only=read_only)
    await world.start(C)
    await until(world.shared, lambda: "one:latest" in world.models)
    await world.nodes[A].library.delete("one")
    if not read_only:
        with trio.fail_after(10):
            while await theirs.list_manifests():  # noqa: ASYNC110 - a disk
                await trio.sleep(0.01)
    await trio.sleep(0.2)  # some scans
    assert "one:latest" not in world.models
    assert bool([s for s in await theirs.list_manifests() if s.name == "one:latest"]) == read_only
    await node.stop()
    await world.start(C)
    await trio.sleep(0.2)
    assert "one:latest" not in world.models
    await ollama_at(tmp_path / "ollama", "two")
    await until(world.shared, lambda: "two:latest" in world.models)


@pytest.mark.parametrize("read_only", [False, True])
async def test_what_is_moved_away_is_not_taken_for_new(
    world: World, tmp_path: Path, read_only: bool
) -> None:
    """Else the cluster would make, and give up, the same copy for ever."""
    key = "one:latest"
    theirs = await ollama_at(tmp_path / "ollama", "one")
    node = adopt(world, C, theirs.root, read_only=read_only)
    await world.start(C)
    await until(world.shared, lambda: world.confirmed(key) == (C,))

    async def scan() -> None:
        await world.settled()
        before = len(world.shared.proposed)
        assert node.library._adoption is not None
        await node.library._adoption.scan()
        await world.settled()
        assert world.shared.proposed[before:] == []

    for round_ in (1, 2):
        world.shared.apply(SetDesired(key, (B, C)))
        await until(world.shared, lambda: world.confirmed(key) == (B, C))
        world.shared.apply(AskReplicas(key, 1, ()))
        world.shared.apply(SetDesired(key, (B,)))
        await until(world.shared, lambda: world.confirmed(key) == (B,))
        await scan()
        assert node.unloaded == [key] * round_
    await node.stop()
    await world.start(C)
    await scan()
    assert world.confirmed(key) == (B,)
    manifest = theirs.manifests / "registry.ollama.ai/library/one/latest"
    assert manifest.exists()
    # A deletion is for what was moved away, too.
    await world.nodes[A].library.delete("one")
    await until(world.shared, lambda: manifest.exists() == read_only)
    await scan()
    assert key not in world.models


@pytest.mark.parametrize("read_only", [False, True])
async def test_what_was_moved_away_counts_again_when_all_others_are_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    monkeypatch.setattr(adoption, "RESCAN_S", 3600.0)
    key = "one:latest"
    theirs = await ollama_at(tmp_path / "ollama", "one")
    node = adopt(world, C, theirs.root, read_only=read_only)
    await world.start(C)
    await until(world.shared, lambda: world.confirmed(key) == (C,))
    world.shared.apply(SetDesired(key, (B, C)))
    await until(world.shared, lambda: world.confirmed(key) == (B, C))
    world.shared.apply(AskReplicas(key, 1, ()))
    world.shared.apply(SetDesired(key, (B,)))
    await until(world.shared, lambda: world.confirmed(key) == (B,))
    await world.settled()
    scan = node.library._adoption.scan  # type: ignore[union-attr]
    await scan()
    before = len(world.shared.proposed)
    await world.nodes[B].stop()
    await scan()
    assert world.shared.proposed[before:] == []  # it may only be starting anew
    await scan()
    await until(world.shared, lambda: C in world.confirmed(key))
    assert await world.nodes[A].library.describe("one")


async def test_what_the_cluster_brought_into_a_models_directory_goes_with_its_copy(
    world: World, tmp_path: Path
) -> None:
    """An Ollama's files, which lie beside it, do not."""
    theirs = await ollama_at(tmp_path / "ollama", "one")
    node = adopt(world, C, theirs.root, read_only=False)
    await world.start(C)
    await until(world.shared, lambda: "one:latest" in world.models)
    ours = await world.pulled(A, C)
    world.shared.apply(AskReplicas(NAME, 1, ()))
    world.shared.apply(SetDesired(NAME, (A,)))
    await comes_to_hold(node, ours, set())
    assert [stored.name for stored in await theirs.list_manifests()] == ["one:latest"]
    assert world.confirmed() == (A,)


async def test_what_an_ollama_puts_in_the_place_of_a_copy_is_not_freed_with_it(
    world: World, tmp_path: Path
) -> None:
    theirs = await ollama_at(tmp_path / "ollama")
    node = adopt(world, C, theirs.root, read_only=False)
    await world.start(C)
    await world.pulled(A, C)
    newer, _ = await theirs.put_bytes(gguf_bytes({**LLAMA, "general.name": "newer"}))
    manifest = (await theirs.build_model(NAME, newer)).manifest
    await theirs.write_manifest(NAME, manifest)
    world.shared.apply(AskReplicas(NAME, 1, ()))
    world.shared.apply(SetDesired(NAME, (A,)))
    await until(world.shared, lambda: world.confirmed() == (A,))
    await world.settled()
    assert await theirs.read_manifest(NAME) == manifest
    assert await node.holds({newer}) == {newer}


async def test_what_lay_there_before_the_cluster_wanted_a_copy_is_not_freed_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was never adopted, as where an Ollama pulls just before the cluster does."""
    monkeypatch.setattr(adoption, "RESCAN_S", 3600.0)
    theirs = await ollama_at(tmp_path / "ollama")
    node = adopt(world, C, theirs.root, read_only=False)
    await world.start(C)
    await world.settled()
    ours = await world.pulled(A)
    model = world.models[NAME]
    for layer in model.layers:
        source = world.nodes[A].store.blob_path(layer.digest)
        await theirs.put_bytes(source.read_bytes())
    await theirs.write_manifest(NAME, model.manifest)
    world.shared.apply(SetDesired(NAME, (A, C)))
    await until(world.shared, lambda: world.confirmed() == (A, C))
    world.shared.apply(AskReplicas(NAME, 1, ()))
    world.shared.apply(SetDesired(NAME, (A,)))
    await until(world.shared, lambda: world.confirmed() == (A,))
    await world.settled()
    assert await theirs.read_manifest(NAME) == model.manifest
    assert await node.holds(ours) == ours


@pytest.mark.parametrize("moved_before", [False, True])
async def test_what_was_an_ollamas_goes_when_its_name_means_another_model(
    world: World, tmp_path: Path, moved_before: bool
) -> None:
    key = "one:latest"
    theirs = await ollama_at(tmp_path / "ollama", "one")
    node = adopt(world, C, theirs.root, read_only=False)
    await world.start(C)
    await until(world.shared, lambda: world.confirmed(key) == (C,))
    if moved_before:
        world.shared.apply(AskReplicas(key, 1, ()))
        world.shared.apply(SetDesired(key, (B,)))
        await until(world.shared, lambda: world.confirmed(key) == (B,))
    before = {layer.digest for layer in world.models[key].layers}
    assert await node.holds(before) == before
    await world.nodes[A].library.download("one", source=REFERENCE, nodes=[A])
    await comes_to_hold(node, before, set())
    assert await theirs.list_manifests() == []


@pytest.mark.parametrize("used", [False, True])
async def test_an_upload_stays_where_an_ollama_may_be_about_to_use_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    theirs = await ollama_at(tmp_path / "ollama", *(["one"] if used else []))
    node = adopt(world, C, theirs.root, read_only=False)
    await world.start(C)
    await until(world.shared, lambda: ("one:latest" in world.models) == used)
    await node.stop()
    unused, _ = await theirs.put_bytes(b"of no model")
    await begun_at(theirs, "f", days=8)
    monkeypatch.setattr(share, "GARBAGE_AGE_S", 0.0)
    monkeypatch.setattr(share, "GARBAGE_INTERVAL_S", 0.02)
    await world.start(C)
    await collected(node)
    assert await node.holds({unused}) == ({unused} if used else set())


async def test_a_name_that_means_another_model_is_left_alone(world: World, tmp_path: Path) -> None:
    await world.pulled(A)
    theirs = await ollama_at(tmp_path / "ollama", "tiny", "other")
    adopt(world, C, theirs.root, read_only=True)
    digest = world.models[NAME].digest
    await world.start(C)
    await until(world.shared, lambda: "other:latest" in world.models)
    await world.settled()
    assert world.models[NAME].digest == digest
    assert world.confirmed() == (A,)


# Pulls.


async def begun_at(store: ModelStore, digit: str, *, days: float) -> str:
    """A partial blob of which something came that many days ago."""
    digest = f"sha256:{64 * digit}"
    (await store.open_growing(digest, 2 * MIB)).close()
    age(store, digest, days=days)
    return digest


def age(store: ModelStore, digest: str, *, days: float) -> None:
    then = time.time() - days * 86400
    for path in store.blobs.glob(f"{store.blob_path(digest).name}.*"):
        os.utime(path, (then, then))


async def collected(node: LibraryNode) -> None:
    """The node has looked for garbage: what was begun long ago is thrown away."""
    with trio.fail_after(5):
        while f"sha256:{64 * 'f'}" in await node.store.partials():  # noqa: ASYNC110 - a disk
            await trio.sleep(0.01)


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_pull_that_was_cancelled_goes_on_days_later(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adopted: bool
) -> None:
    node = adopt(world, C, tmp_path / "models", read_only=False) if adopted else world.nodes[C]
    await world.start(C)
    digest = node.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    node.source.gate = trio.Event()
    transfer_id = await node.library.download(REFERENCE, nodes=[C])
    await until(world.shared, lambda: held_by(node, digest) == 4)
    await node.library.cancel(transfer_id)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "cancelled")
    await node.stop()
    age(node.store, digest, days=6.9)
    await begun_at(node.store, "f", days=7.1)
    monkeypatch.setattr(share, "GARBAGE_INTERVAL_S", 0.02)
    await world.start(C)
    await collected(node)
    written: list[int] = []
    real = PartialBlob.write_piece

    async def write(self: PartialBlob, index: int, data: bytes | bytearray) -> bool:
        written.append(index)
        return await real(self, index, data)

    monkeypatch.setattr(PartialBlob, "write_piece", write)
    node.source.gate = None
    await node.library.download(REFERENCE, nodes=[C])
    await until(world.shared, lambda: world.confirmed() == (C,))
    assert written == [4]
    assert node.store.blob_path(digest).read_bytes() == LARGE


@pytest.mark.parametrize("followed", [False, True])
async def test_a_pull_goes_on_after_a_restart(
    world: World, monkeypatch: pytest.MonkeyPatch, followed: bool
) -> None:
    real = ScriptedSource.download

    async def download(self: ScriptedSource, *arguments: Any) -> None:
        try:
            await real(self, *arguments)
        except trio.Cancelled:  # a piece is being written when the daemon ends
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            raise

    monkeypatch.setattr(ScriptedSource, "download", download)
    monkeypatch.setattr(bringing, "GROWING_BYTES", 1)
    node, nodes = world.nodes[A], (A, B) if followed else (A,)
    node.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    node.source.gate = trio.Event()
    await node.library.download(REFERENCE, nodes=nodes)
    await until(world.shared, lambda: node.source.fetches == 1)
    await trio.sleep(0.1)
    node.cluster.beat(active_requests=9)  # busy, and yet the one that has a part of it
    await node.stop()
    node.source.gate = None
    node.store = ModelStore(node.store.root, keep_free_bytes=0)
    await node.start(world.nursery)
    await until(world.shared, lambda: node.source.fetches == 2)
    world.shared.offline.discard(A)  # the others hear of it only now
    await until(world.shared, lambda: world.confirmed() == nodes)
    assert node.source.fetches == 2
    await until(world.shared, lambda: (node.root / "pulls").read_bytes() == b"\x90")  # none left


@pytest.mark.parametrize("meanwhile", ["running", "published", "deleted"])
@pytest.mark.parametrize("handed_on", [False, True])
async def test_a_pull_that_was_overtaken_does_not_go_on(
    world: World, handed_on: bool, meanwhile: str
) -> None:
    a, b, c = world.nodes[A], world.nodes[B], world.nodes[C]
    a.source.gate = trio.Event()
    if handed_on:
        await world.start(C)
        c.source.failure = OriginUnreachable("no route")
        await c.library.download(REFERENCE, nodes=[C])
    else:
        await a.library.download(REFERENCE, nodes=[A])
    await until(world.shared, lambda: a.source.fetches == 1)
    await a.stop()
    if handed_on:
        await c.stop()
    b.source.gate = trio.Event()
    transfer_id = await b.library.download(REFERENCE, nodes=[B])
    await until(world.shared, lambda: b.source.fetches == 1)
    if meanwhile != "running":
        b.source.gate.set()
        await until(world.shared, lambda: b.transfer(transfer_id).status == "completed")
    if meanwhile == "deleted":
        await b.library.delete(NAME)
    a.source.gate = None
    a.store = ModelStore(a.store.root, keep_free_bytes=0)
    world.shared.deaf.add(A)
    await world.start(A)
    await until(world.shared, lambda: (a.root / "pulls").read_bytes() == b"\x90")  # none left
    b.source.gate.set()
    await until(world.shared, lambda: b.transfer(transfer_id).status == "completed")
    await world.settled()
    assert a.source.fetches == 1
    assert world.confirmed() == (() if meanwhile == "deleted" else (B,))


@pytest.mark.parametrize("rotten", [False, True])
async def test_what_a_peer_holds_does_not_cross_the_internet_again(
    world: World, monkeypatch: pytest.MonkeyPatch, rotten: bool
) -> None:
    """Another name of the same weights. What the peer fails to give, the origin does."""
    b = world.nodes[B]
    digest = b.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    await world.pulled(A)
    if rotten:
        monkeypatch.setattr(nearby, "PATIENCE_S", 0.3)
        rot(world.nodes[A], digest)
    await b.library.download("pypi:other", nodes=[B])
    await until(world.shared, lambda: world.confirmed("other:latest") == (B,))
    assert b.source.fetches == rotten
    assert b.store.blob_path(digest).read_bytes() == LARGE
    assert b.store.space.promised == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_what_comes_from_nearby_is_told(tmp_path: Path, fails: bool) -> None:
    store, source = ModelStore(tmp_path, keep_free_bytes=0), ScriptedSource(LARGE)
    await store.prepare()
    source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    steps: list[Step] = []

    async def fetch(digest: str, size: int, progress: Callable[[int, int], None]) -> bool:
        progress(MIB, 2 * MIB)
        if fails:
            raise NearbyFailed("it is gone")
        await store.put_bytes(LARGE)
        return True

    async with store.pins.hold() as hold:
        bringer = Bringer(store, source, fetch)
        wanted = resolve_source(REFERENCE)
        await bringer.bring(wanted, "mine", hold, steps.append, lambda files: None)
    # How large it is comes first: without room here, somebody else is to be found for it.
    assert (steps[0].done, steps[0].received, steps[0].total) == (0, 0, len(LARGE))
    assert (steps[1].done, steps[1].received) == (MIB, 2 * MIB)
    assert steps[-1].done == len(LARGE)
    assert (steps[-1].received > 2 * MIB) == fails
    received = [step.received for step in steps]
    assert received == sorted(received)


@pytest.mark.parametrize(
    ("kind", "first"), [(OriginUnreachable, B), (OriginRefused, A), (AccessRefused, A)]
)
async def test_who_does_not_get_through_hands_the_pull_on(
    world: World, kind: type[SourceError], first: NodeId
) -> None:
    a, b = world.nodes[A], world.nodes[B]
    a.source.failure = kind("not from here")
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).status == "completed")
    assert B in world.confirmed()
    assert (a.source.fetches, b.source.fetches) == (0, 1)
    # Who is cut off is remembered, so the next pull begins where it can succeed. What is refused
    # says nothing of what else is there.
    a.source.failure = None
    await a.library.download("pypi:other")
    await until(world.shared, lambda: "other:latest" in world.models)
    assert (a.source.fetches, b.source.fetches) == ((1, 1) if first == A else (0, 2))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (OriginRefused, "MAX_REFUSED"),
        (AccessRefused, "MAX_REFUSED"),
        (OriginUnreachable, "MAX_TRIED"),
    ],
)
async def test_a_pull_is_not_handed_on_without_end(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: type[SourceError], limit: str
) -> None:
    monkeypatch.setattr(pulls, limit, 2)
    await world.start(C)
    a, b, c = world.nodes[A], world.nodes[B], world.nodes[C]
    a.source.failure = b.source.failure = kind("there is none, or it is private")
    c.cluster.beat(active_requests=1)  # the third
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).finished_at is not None)
    assert a.transfer(transfer_id).error == "there is none, or it is private"
    assert [t.status for t in b.table.list()] == ["failed"]
    assert c.table.list() == []


async def test_nobody_gets_through(world: World) -> None:
    for node_id in (A, B):
        world.nodes[node_id].source.failure = OriginUnreachable(f"no route from {node_id}")
    a = world.nodes[A]
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).status == "failed")
    error = a.transfer(transfer_id).error
    assert "no route from A" in error
    assert "no route from B" in error
    # What is the same for all is said once.
    for node_id in (A, B):
        world.nodes[node_id].source.failure = AccessRefused("sign in first")
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).status == "failed")
    assert a.transfer(transfer_id).error == "sign in first"


@pytest.mark.parametrize("back", [False, True])
async def test_whose_node_is_lost_finds_another_one(
    world: World, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """Also where the lost one is back, which leaves its pull to the one that waits for it."""
    await world.start(C)
    a, b, c = world.nodes[A], world.nodes[B], world.nodes[C]
    a.source.failure = OriginUnreachable("no route")
    b.source.gate = trio.Event()
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: b.source.fetches == 1)
    await b.stop()
    if back:
        b.source.gate = None
        b.store = ModelStore(b.store.root, keep_free_bytes=0)
        await world.start(B)
        b.cluster.disk_free -= 1  # to be the second choice, but that it has a part
        b.cluster.beat()
        await until(world.shared, lambda: (b.root / "pulls").read_bytes() == b"\x90")
    assert a.transfer(transfer_id).status == "active"
    monkeypatch.setattr(pulls, "LOST_AFTER_S", 0.0)
    # Questions to who is cut off end by their time only, and there are several.
    await until(world.shared, lambda: a.transfer(transfer_id).finished_at is not None, 60)
    assert a.transfer(transfer_id).error == ""
    assert (b.source.fetches, c.source.fetches) == ((2, 0) if back else (1, 1))


async def test_a_file_is_looked_for_on_the_node_that_was_asked_and_on_no_other(
    world: World,
) -> None:
    a, b = world.nodes[A], world.nodes[B]
    a.cluster.beat(active_requests=9)
    transfer_id = await a.library.download("mine", source="/srv/x.gguf")
    await until(world.shared, lambda: a.transfer(transfer_id).status == "completed")
    assert (a.source.fetches, b.source.fetches) == (1, 0)
    a.source.failure = OriginRefused("name it in sources.local_files")
    transfer_id = await a.library.download("other", source="/srv/y.gguf")
    await until(world.shared, lambda: a.transfer(transfer_id).status == "failed")
    assert a.transfer(transfer_id).error == "name it in sources.local_files"
    assert b.source.fetches == 0


async def test_without_room_it_goes_to_a_node_that_has_room_for_its_size(world: World) -> None:
    await world.start(C)
    a, b, c = world.nodes[A], world.nodes[B], world.nodes[C]

    def full(sizes: object) -> NoReturn:
        raise StoreFull(len(LARGE), 10)

    a.store.space.reserve = full  # type: ignore[method-assign, assignment]
    b.cluster.disk_free = KEEP_FREE_BYTES + len(LARGE) - 1
    b.cluster.beat()
    c.cluster.beat(active_requests=1)  # else it would be the next one anyway
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).status == "completed")
    assert (b.source.fetches, c.source.fetches) == (0, 1)
    # Of the next version so much is taken for granted at once.
    await b.library.download(NAME, source=REFERENCE)
    await until(world.shared, lambda: c.source.fetches == 2)
    assert b.source.fetches == 0


async def test_two_tags_that_are_pulled_at_once_come_once(world: World) -> None:
    a, b = world.nodes[A], world.nodes[B]
    gate = trio.Event()
    for node in (a, b):
        node.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
        node.source.gate = gate
    async with trio.open_nursery() as nursery:
        for node, tag in ((a, "small"), (b, "latest")):
            download = partial(node.library.download, f"tiny:{tag}", source=REFERENCE)
            nursery.start_soon(download)
    gate.set()
    await until(world.shared, lambda: {"tiny:small", "tiny:latest"} <= world.models.keys())
    assert a.source.fetches + b.source.fetches == 1


# Following.


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bringing, "GROWING_BYTES", 1)


def held_by(node: LibraryNode, digest: str) -> int:
    """How many pieces of a blob that is on its way are here."""
    blob = node.store._partials.get(digest)
    return 0 if blob is None else sum(blob.have)


async def test_a_model_that_changed_at_its_origin_is_fetched_and_replaces_the_old_one(
    world: World,
) -> None:
    await world.pulled(A, B)
    a, b = world.nodes[A], world.nodes[B]
    before = world.models[NAME]
    a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    fetches = a.source.fetches
    assert await a.library.update(NAME) is None  # it is the same
    assert a.source.fetches == fetches
    newer = gguf_bytes(tensors={"w": ((1024, 1024), 0)}, fill=random.Random(5).randbytes(1 << 22))
    a.source.content = b.source.content = newer
    a.source.digest = b.source.digest = f"sha256:{hashlib.sha256(newer).hexdigest()}"
    assert await a.library.update(NAME) is not None
    await until(world.shared, lambda: world.models[NAME].digest != before.digest)
    await until(world.shared, lambda: world.confirmed() == (A, B))
    assert b.store.blob_path(a.source.digest).read_bytes() == newer
    gone = {layer.digest for layer in before.layers} - {
        layer.digest for layer in world.models[NAME].layers
    }
    assert gone
    await comes_to_hold(b, gone, set())  # freed only once everybody knows of the new ones
    a.source.failure = OriginUnreachable("no way there")
    with pytest.raises(ServiceError, match="no way there") as caught:
        await a.library.update(NAME)
    assert caught.value.status == 502


@pytest.mark.usefixtures("small_counts")
async def test_peers_fetch_while_the_origin_still_sends(world: World) -> None:
    a, b = world.nodes[A], world.nodes[B]
    digest = a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    a.source.gate = trio.Event()
    await a.library.download(REFERENCE, nodes=[A, B])
    # The last piece is to come: all others are at both nodes, and the model is nowhere yet.
    await until(world.shared, lambda: held_by(b, digest) == 4)
    assert world.models == {}
    a.source.gate.set()
    await until(world.shared, lambda: world.confirmed() == (A, B))
    assert b.store.blob_path(digest).read_bytes() == LARGE
    assert (a.source.fetches, b.source.fetches) == (1, 0)
    await until(world.shared, lambda: {t.status for t in b.table.list()} == {"completed"})


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize(("puller", "follower"), [(B, C), (C, B)])
async def test_who_followed_a_node_that_is_lost_goes_on(
    world: World, puller: NodeId, follower: NodeId
) -> None:
    """As the one that pulls, or following the one that does."""
    await world.start(C)
    digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    for node in world.nodes.values():
        node.source.digest = digest
        node.source.gate = trio.Event()
    await world.nodes[A].library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: held_by(world.nodes[B], digest) == 4)
    world.nodes[A].library._pulls._withdraw = lambda key, nodes: None  # it is killed
    await world.nodes[A].stop()
    pulling, follows = world.nodes[puller], world.nodes[follower].library._share.following._follows
    await pulling.library.download(REFERENCE, nodes=[B, C])
    await until(
        world.shared, lambda: pulling.source.fetches == 1 and follows[NAME].origin == puller
    )
    pulling.source.gate.set()  # type: ignore[union-attr]
    await until(world.shared, lambda: world.confirmed() == (B, C))


@pytest.mark.usefixtures("small_counts")
async def test_what_came_before_its_model_is_kept_until_that_is_published(world: World) -> None:
    a, b = world.nodes[A], world.nodes[B]
    digest = a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    world.shared.hold = trio.Event()
    await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, b.store.blob_path(digest).exists)
    assert (await b.store.free(lambda: (), grace_s=0)).held == {digest}
    world.shared.hold.set()
    await until(world.shared, lambda: world.confirmed() == (A, B))


async def test_half_a_copy_of_what_is_elsewhere_is_thrown_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.pulled(A)
    a, b = world.nodes[A], world.nodes[B]
    ours = {layer.digest for layer in world.models[NAME].layers}
    hasher = PieceHasher(MIB)
    hasher.update(bytes(MIB))
    unknown, piece_map = hasher.finish()
    begun = {digest: await a.store.piece_map(digest) for digest in ours} | {unknown: piece_map}
    for digest in begun:
        (await b.store.open_partial(digest, begun[digest])).close()
    assert set(await b.store.partials()) == begun.keys()
    monkeypatch.setattr(share, "STRAY_AGE_S", 0.0)
    monkeypatch.setattr(share, "GARBAGE_INTERVAL_S", 0.02)
    await b.stop()
    await world.start(B)
    with trio.fail_after(5):
        while set(await b.store.partials()) & ours:  # noqa: ASYNC110 - the disk tells nobody
            await trio.sleep(0.01)
    assert await b.store.partials() == [unknown]  # a pull may go on with what no model has yet


async def test_a_copy_on_its_way_is_not_freed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.pulled(A)
    real = Share._fetch_layers

    async def late(self: Share, model: Model, transfer_id: str) -> None:
        await real(self, model, transfer_id)
        await self._store.free(lambda: (), grace_s=0)

    monkeypatch.setattr(Share, "_fetch_layers", late)
    world.shared.apply(SetDesired(NAME, (A, B)))
    await until(world.shared, lambda: world.confirmed() == (A, B))
    digests = {layer.digest for layer in world.models[NAME].layers}
    assert await world.nodes[B].holds(digests) == digests


@pytest.mark.usefixtures("small_counts")
@pytest.mark.parametrize("growing", [True, False])
async def test_an_unforeseen_error_of_a_fetch_ends_nothing_else(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    growing: bool,
) -> None:
    a, b = world.nodes[A], world.nodes[B]
    a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}" if growing else ""
    monkeypatch.setattr(share, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(share, "RECHECK_S", 0.05)
    real, failed = Fetcher.fetch_blob, False

    async def break_once(self: Fetcher, *arguments: Any, **more: Any) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise AssertionError("a bug")
        await real(self, *arguments, **more)

    monkeypatch.setattr(Fetcher, "fetch_blob", break_once)
    await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: world.confirmed() == (A, B))
    assert "failed" in {t.status for t in b.table.list()}
    [record] = [r for r in caplog.records if "unforeseen" in r.message]
    assert record.exc_info


@pytest.mark.usefixtures("small_counts")
async def test_who_follows_in_vain_is_told(world: World) -> None:
    a, b = world.nodes[A], world.nodes[B]
    digest = a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    a.source.gate = trio.Event()
    transfer_id = await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: held_by(b, digest) == 4)
    await a.library.cancel(transfer_id)
    await until(world.shared, lambda: [t.status for t in b.table.list()] == ["cancelled"])
    assert await b.store.partials() == [digest]  # for the next time
    a.source.gate = None
    await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: world.confirmed() == (A, B))


@pytest.mark.usefixtures("small_counts")
async def test_what_an_origin_sends_wrongly_stays_nowhere(world: World) -> None:
    a, b = world.nodes[A], world.nodes[B]
    digest = a.source.digest = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    a.source.content = LARGE[:-1] + bytes([LARGE[-1] ^ 1])
    transfer_id = await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: a.transfer(transfer_id).status == "failed")
    await until(world.shared, lambda: all(t.finished_at for t in b.table.list()))
    for node in (a, b):
        assert not await node.store.has_blob(digest)
    a.source.content = LARGE
    await a.library.download(REFERENCE, nodes=[A, B])
    await until(world.shared, lambda: world.confirmed() == (A, B))
    for node in (a, b):
        assert node.store.blob_path(digest).read_bytes() == LARGE


# What is here when the daemon starts.


async def test_a_disk_that_refuses_at_the_start_holds_up_only_what_it_refuses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes no manifest."""
    await world.pulled(A)
    node = world.nodes[A]
    await node.library.derive("other", NAME)
    await node.stop()
    for name in (NAME, "other:latest"):
        await node.store.delete_manifest(name)
    real, failing = manifests.write_atomically, True

    def refuse(path: Path, data: bytes) -> None:
        if failing and "tiny" in str(path):
            raise StoreFull(len(data), 0)
        real(path, data)

    monkeypatch.setattr(manifests, "write_atomically", refuse)
    monkeypatch.setattr(share, "RECHECK_S", 0.02)
    await world.start(A)

    def has(name: str) -> bool:
        return (node.store.manifests / f"registry.ollama.ai/library/{name}/latest").exists()

    await until(world.shared, lambda: has("other"))
    assert not has("tiny")
    assert world.confirmed() == (A,)
    failing = False
    await until(world.shared, lambda: has("tiny"))


# Rot.


def scrubbing(node: LibraryNode) -> Scrubbing:
    return Scrubbing(
        cluster=node.cluster,  # type: ignore[arg-type]
        store=node.store,
        scrubber=Scrubber(node.store, 1e12),
        interval_s=1e-9,
        lost=node.library._share.lost,
        path=node.root / "scrubbed",
    )


def rot(node: LibraryNode, digest: str) -> None:
    path = node.store.blob_path(digest)
    data = bytearray(path.read_bytes())
    data[2 * MIB + 5] ^= 1
    path.write_bytes(data)


def weights_of(world: World) -> str:
    return next(
        layer.digest for layer in world.models[NAME].layers if layer.media_type.endswith("model")
    )


async def scrubbed(node: LibraryNode) -> None:
    scrubber = scrubbing(node)
    await scrubber.round()  # takes note of what is here
    await trio.sleep(0.001)
    await scrubber.round()


async def test_a_rotten_blob_is_replaced_by_a_peer(world: World) -> None:
    await world.pulled(A, B)
    node, digest = world.nodes[A], weights_of(world)
    rot(node, digest)
    await scrubbed(node)
    assert node.unloaded == [NAME]
    await until(world.shared, lambda: world.confirmed() == (A, B))
    assert node.store.blob_path(digest).read_bytes() == LARGE
    [copy] = [t for t in node.table.list() if t.type == "replication"]
    await until(world.shared, lambda: node.transfer(copy.id).status == "completed")
    await scrubbed(node)
    assert node.unloaded == [NAME]  # nothing more was found


async def test_a_disk_that_cannot_remove_what_was_put_aside_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await world.pulled(A)

    def refuse(store: ModelStore, age_s: float, now: float) -> list[Path]:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(scrubbing_module, "discard_rotten", refuse)
    await scrubbed(world.nodes[A])
    assert "Read-only file system" in caplog.text


async def test_a_disk_that_cannot_read_for_a_moment_costs_no_copy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the last one. What can never be read is fetched again in the end."""
    monkeypatch.setattr(scrubbing_module, "MAX_UNREADABLE", 2)
    await world.pulled(A, B)
    node, digest = world.nodes[A], weights_of(world)
    real = scrub.read_exactly
    failing = True

    def read(descriptor: int, length: int, offset: int) -> bytes:
        if failing and offset == 2 * MIB:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, length, offset)

    monkeypatch.setattr(scrub, "read_exactly", read)
    scrubber = scrubbing(node)
    for failing in (True, True, False, True, True):  # noqa: B007 - `read` looks at it
        await trio.sleep(0.001)
        await scrubber.round()
    assert node.unloaded == []
    assert await node.store.has_blob(digest)
    await trio.sleep(0.001)
    await scrubber.round()
    await until(world.shared, lambda: node.unloaded == [NAME])
    await until(world.shared, lambda: world.confirmed() == (A, B))


async def test_what_is_put_aside_is_not_freed_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.pulled(A, B)
    node, digest = world.nodes[A], weights_of(world)
    real, held = Scrubber.quarantine, set[str]()

    async def late(self: Scrubber, digest: str, rot: Rot) -> None:
        held.update((await node.store.free(lambda: (), among=[digest], grace_s=0)).held)
        await real(self, digest, rot)

    await node.store.delete_manifest(NAME)
    monkeypatch.setattr(Scrubber, "quarantine", late)
    rot(node, digest)
    await scrubbed(node)
    assert held == {digest}


async def test_the_only_copy_is_completed_by_pulling_it_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.pulled(A)
    node, digest = world.nodes[A], weights_of(world)
    await until(world.shared, lambda: node.table.list()[-1].status == "completed")
    rot(node, digest)
    await scrubbed(node)
    await until(world.shared, lambda: world.confirmed() == ())
    written: list[int] = []
    real = type(node.source).download

    async def download(self: object, file: object, target: object, progress: object) -> None:
        written.extend(i for i, held in enumerate(target.have) if not held)  # type: ignore[attr-defined]
        await real(self, file, target, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(type(node.source), "download", download)
    node.source.digest = digest
    await node.library.download("tiny", source=REFERENCE)
    await until(world.shared, lambda: world.confirmed() == (A,))
    assert written == [2]
    assert node.store.blob_path(digest).read_bytes() == LARGE
