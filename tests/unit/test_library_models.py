"""The library of a few nodes: bringing in, spreading, dropping, and what goes wrong.

Stores, transfers and links are real, the consensus applies at once or when a test lets it.
"""

import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from ollamad import library as library_module
from ollamad import notes, pulls
from ollamad import share as share_module
from ollamad.api.services import NoQuorum, ServiceError
from ollamad.core.commands import AddJoinToken, DeleteModel, PutModel, SetDesired, SetDraining
from ollamad.core.description import Changes
from ollamad.core.ids import NodeId
from ollamad.core.state import ClusterState, JoinToken, Model
from ollamad.machine import Machine
from ollamad.notes import Note
from ollamad.sources.base import OriginUnreachable, SourceError
from ollamad.store.models import ModelStore
from tests.fakes.gguf_files import LLAMA, gguf_bytes
from tests.fakes.library_nodes import LibraryNode, SharedState, join, until
from tests.fakes.peer_net import PeerNet

A, B, C = NodeId("A"), NodeId("B"), NodeId("C")
NAME = "tiny:latest"
REFERENCE = "pypi:tiny"
CONTENT = gguf_bytes()
OTHER_CONTENT = gguf_bytes({**LLAMA, "general.name": "Other"})


class World:
    """Three nodes; only A is started."""

    def __init__(self, nursery: trio.Nursery, root: Path, content: bytes = CONTENT) -> None:
        self.nursery = nursery
        self.shared = SharedState()
        self.net = PeerNet(nursery)
        self.nodes = {
            n: LibraryNode(self.shared, self.net, n, root / n, content) for n in (A, B, C)
        }

    async def start(self, *nodes: NodeId) -> None:
        join(self.shared, *(n for n in nodes if n not in self.shared.state.members))
        self.shared.offline -= set(nodes)
        for node_id in nodes:
            await self.nodes[node_id].start(self.nursery)

    @property
    def models(self) -> dict[str, Model]:
        return self.shared.state.models

    def confirmed(self, key: str = NAME) -> tuple[NodeId, ...]:
        return self.models[key].confirmed if key in self.models else ()

    async def pulled(self, *nodes: NodeId) -> set[str]:
        """Pull the model onto those nodes; the digests of its blobs."""
        await self.nodes[A].library.download(REFERENCE, nodes=nodes)
        await until(self.shared, lambda: self.confirmed() == nodes)
        return {layer.digest for layer in self.models[NAME].layers}

    async def settled(self) -> None:
        """Every library has seen the last change."""
        self.shared.notify()
        await trio.sleep(0.05)


@pytest.fixture
async def world(nursery: trio.Nursery, tmp_path: Path) -> World:
    world = World(nursery, tmp_path)
    await world.start(A)
    return world


async def comes_to_hold(node: LibraryNode, digests: set[str], expected: set[str]) -> None:
    """Wait until of those blobs exactly the expected ones are on the node's disk."""
    with trio.fail_after(10):
        for _ in range(2000):
            if await node.holds(digests) == expected:
                return
            await trio.sleep(0.005)
    raise AssertionError(f"{await node.holds(digests)} are there, not {expected}")


# Bringing in.


async def test_a_pull_brings_the_model_in_and_spreads_it(world: World) -> None:
    await world.start(B, C)
    node = world.nodes[A]
    transfer_id = await node.library.download(REFERENCE)
    assert node.transfer(transfer_id).status in ("pending", "active")
    await until(world.shared, lambda: len(world.confirmed()) == 2)
    model = world.models[NAME]
    assert model.desired == model.confirmed
    assert A in model.confirmed
    assert node.transfer(transfer_id).status == "completed"
    [copy] = set(model.confirmed) - {A}
    digests = {layer.digest for layer in model.layers}
    assert await world.nodes[copy].holds(digests) == digests
    assert await world.nodes[copy].store.read_manifest(NAME) == model.manifest
    assert node.library.inference_ready(model)
    types = {t.type for t in await node.library.transfers()}
    assert types == {"download", "replication"}


async def test_a_running_pull_is_joined_from_anywhere(world: World) -> None:
    await world.start(B)
    node = world.nodes[A]
    node.source.gate = trio.Event()
    first = await node.library.download(REFERENCE)
    await until(world.shared, lambda: node.source.fetches == 1)
    assert await node.library.download(REFERENCE) == first
    assert await world.nodes[B].library.download(REFERENCE) == first
    node.source.gate.set()
    await until(world.shared, lambda: A in world.confirmed())
    assert node.source.fetches == 1


@pytest.mark.parametrize("asked", [A, B])
async def test_a_running_pull_is_not_taken_for_what_it_is_not(world: World, asked: NodeId) -> None:
    await world.start(B)
    node, library = world.nodes[A], world.nodes[asked].library
    node.source.gate = trio.Event()
    first = await node.library.download("tiny", source=REFERENCE, nodes=[A], replicas=2)
    others: list[dict[str, Any]] = [{"nodes": [B]}, {"replicas": 3}, {"source": "pypi:another"}]
    for wish in others:
        with pytest.raises(ServiceError, match="ask again when it is here") as caught:
            await library.download("tiny", **wish)
        assert (caught.value.status, caught.value.code) == (409, "PULL_DIFFERS")
    same: list[dict[str, Any]] = [{}, {"nodes": [A]}, {"replicas": 2}, {"source": REFERENCE}]
    for wish in same:
        assert await library.download("tiny", **wish) == first
    node.source.gate.set()
    await until(world.shared, lambda: A in world.confirmed())


async def test_a_model_whose_holders_are_gone_is_pulled_again(world: World) -> None:
    await world.start(B)
    await world.pulled(B)
    await world.nodes[B].stop()
    node = world.nodes[A]
    transfer_id = await node.library.download(NAME)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "completed")
    assert node.source.fetches == 1
    assert A in world.confirmed()


async def test_a_pull_onto_another_node_runs_there(world: World) -> None:
    await world.start(B)
    transfer_id = await world.nodes[A].library.download(REFERENCE, nodes=[B])
    await until(world.shared, lambda: world.confirmed() == (B,))
    table = world.nodes[B]
    await until(world.shared, lambda: table.transfer(transfer_id).status == "completed")
    assert world.nodes[A].source.fetches == 0


async def test_a_draining_node_lets_another_one_pull(world: World) -> None:
    await world.start(B)
    world.shared.apply(SetDraining(A, True))
    await world.nodes[A].library.download(REFERENCE)
    await until(world.shared, lambda: world.confirmed() == (B,))


@pytest.mark.parametrize("from_other", [False, True])
async def test_a_source_that_nobody_knows(world: World, from_other: bool) -> None:
    await world.start(B)
    nodes = [B] if from_other else []
    with pytest.raises(ServiceError) as caught:
        await world.nodes[A].library.download("x", source="ftp://x/y", nodes=nodes)
    assert (caught.value.status, caught.value.code) == (404, "UNKNOWN_SOURCE")


async def test_a_source_that_fails_is_told_in_the_transfer(world: World) -> None:
    node = world.nodes[A]
    node.source.failure = SourceError("no such release")
    transfer_id = await node.library.download(REFERENCE)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "failed")
    assert "no such release" in node.transfer(transfer_id).error
    node.source.failure = None
    assert await node.library.download(REFERENCE) != transfer_id
    await until(world.shared, lambda: world.confirmed() == (A,))


async def test_a_file_that_is_no_model(world: World) -> None:
    node = world.nodes[A]
    node.source.content = b"<html>" * 100
    transfer_id = await node.library.download(REFERENCE)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "failed")
    assert world.models == {}


async def test_a_cancelled_pull_leaves_nothing_half_done(world: World) -> None:
    node = world.nodes[A]
    node.source.gate = trio.Event()
    transfer_id = await node.library.download(REFERENCE)
    await until(world.shared, lambda: node.source.fetches == 1)
    await node.library.cancel(transfer_id)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "cancelled")
    assert world.models == {}
    node.source.gate = None
    await world.pulled(A)


async def test_a_change_of_the_state_does_not_touch_a_model_on_its_way(world: World) -> None:
    """The blobs are on the disk, the command is with the voters: nothing may be cleaned up."""
    node = world.nodes[A]
    world.shared.hold = trio.Event()
    await node.library.download(REFERENCE)
    await until(world.shared, lambda: world.shared.waiting == 1)
    world.shared.apply(AddJoinToken(JoinToken("t", b"", 1.0)))
    await world.settled()
    world.shared.hold.set()
    await until(world.shared, lambda: world.confirmed() == (A,))
    digests = {layer.digest for layer in world.models[NAME].layers}
    assert await node.holds(digests) == digests
    assert node.unloaded == []


async def test_a_pull_that_ends_without_quorum_waits_for_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls, "AGREE_AGAIN_S", 0.02)
    node = world.nodes[A]
    node.source.digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    world.shared.has_quorum = False
    transfer_id = await node.library.download(REFERENCE)
    await until(world.shared, lambda: bool(list(node.root.glob("models/blobs/sha256-*"))))
    await trio.sleep(0.2)  # some tries, and some looks at what is unwanted
    assert node.transfer(transfer_id).status == "active"
    await node.stop()  # and goes on after a restart
    await world.start(A)
    await trio.sleep(0.1)
    world.shared.has_quorum = True
    await until(world.shared, lambda: world.confirmed() == (A,))
    assert node.source.fetches == 1


async def test_what_could_not_be_made_known_is_kept_for_another_try(world: World) -> None:
    node = world.nodes[A]
    digest, _ = await node.store.put_bytes(CONTENT)
    world.shared.has_quorum = False
    with pytest.raises(NoQuorum):
        await node.library.create("mine", {"m.gguf": digest})
    assert "mine:latest" not in Note(node.root / "held", dict[str, str], {}).read()
    world.shared.has_quorum = True
    await world.settled()
    assert "mine:latest" not in world.models
    assert await node.store.has_blob(digest)
    assert await node.store.list_manifests() == []
    await node.library.create("mine", {"m.gguf": digest})
    assert world.confirmed("mine:latest") == (A,)


async def test_a_node_that_lacks_the_latest_drops_nothing_that_is_in_it(world: World) -> None:
    """Its journal is applied up to where it knew it committed; the rest comes with a leader."""
    node = world.nodes[A]
    digests = await world.pulled(A)
    await node.stop()
    before = ClusterState(cluster_id="c1", members=dict(world.shared.state.members))
    world.shared.behind[A] = before
    world.shared.has_quorum = False
    await world.start(A)
    await trio.sleep(0.2)
    assert await node.holds(digests) == digests
    world.shared.has_quorum = True
    await until(world.shared, lambda: A not in world.shared.behind)
    await world.settled()
    assert await node.holds(digests) == digests
    assert world.confirmed() == (A,)


async def test_the_same_model_again_leaves_the_copies_of_others(world: World) -> None:
    await world.start(B)
    await world.start(C)
    digests = await world.pulled(A, B)
    c = world.nodes[C]
    assert await c.library.download(NAME, source=REFERENCE, nodes=[C])
    await until(world.shared, lambda: {t.status for t in c.table.list()} == {"completed"})
    await world.settled()
    assert world.confirmed() == (A, B, C)
    for node in (A, B, C):
        assert await world.nodes[node].holds(digests) == digests


async def test_a_model_that_came_after_all_is_not_claimed_without_its_blobs(world: World) -> None:
    """The outcome was unknown, the blobs were freed, and then the command was applied."""
    node = world.nodes[A]
    await world.start(B)
    await world.pulled(A, B)
    model = world.models[NAME]
    world.shared.apply(DeleteModel(NAME))
    await comes_to_hold(node, {layer.digest for layer in model.layers}, set())
    await world.settled()
    world.shared.apply(PutModel(msgspec.structs.replace(model, desired=(A,), confirmed=(A,))))
    await until(world.shared, lambda: world.confirmed() == ())


# Uploads.


async def upload(node: LibraryNode, content: bytes = CONTENT) -> str:
    digest, _ = await node.store.put_bytes(content)
    return digest


async def test_a_model_is_made_of_an_upload(world: World) -> None:
    await world.start(B)
    node = world.nodes[A]
    digest = await upload(node)
    model = await node.library.create("mine", {"x.gguf": digest})
    assert (model.name, A in model.confirmed) == ("mine:latest", True)
    await until(world.shared, lambda: len(world.confirmed("mine:latest")) == 2)
    again = await node.library.create("mine", {"x.gguf": digest})
    assert again.digest == model.digest


async def test_an_upload_that_does_not_fit_is_refused_before_it_comes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 10:
            taken += 1
            yield bytes(1000)

    monkeypatch.setattr("ollamad.store.files.free_bytes_of", lambda _: (5000, 1 << 40))
    with pytest.raises(ServiceError) as caught:
        await world.nodes[A].library.receive_blob("sha256:" + "0" * 64, chunks(), 10_000)
    assert (caught.value.code, taken) == ("DISK_FULL", 0)


async def test_what_no_model_can_be_made_of(world: World) -> None:
    node = world.nodes[A]
    digest, junk = await upload(node), await upload(node, b"no gguf" * 10)
    missing = "sha256:" + "0" * 64
    for files, code in (
        ({}, "INVALID_REQUEST"),
        ({"a": digest, "b": digest}, "INVALID_REQUEST"),
        ({"a": missing}, "BLOB_NOT_FOUND"),
        ({"a": junk}, "INVALID_MODEL_FILE"),
    ):
        with pytest.raises(ServiceError) as caught:
            await node.library.create("mine", files)
        assert (caught.value.status, caught.value.code) == (400, code)
    assert world.models == {}


async def test_another_model_of_that_name(world: World) -> None:
    node = world.nodes[A]
    await node.library.create("mine", {"x": await upload(node)})
    with pytest.raises(ServiceError) as caught:
        await node.library.create("Mine", {"x": await upload(node, OTHER_CONTENT)})
    assert (caught.value.status, caught.value.code) == (409, "MODEL_EXISTS")


async def test_parts_of_a_new_model_are_held_from_the_moment_they_are_here(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model has the same small blobs, and is deleted while this one is made."""
    node, real = world.nodes[A], ModelStore.model_of

    async def slow(self: ModelStore, name: str, manifest: bytes) -> Model:
        model = await real(self, name, manifest)
        await self.free(lambda: (), grace_s=0)  # what a deletion does, and more
        return model

    digest = await upload(node)
    monkeypatch.setattr(ModelStore, "model_of", slow)
    for name in ("tiny", "mine"):
        if name == "tiny":
            await node.library.download(REFERENCE)
            await until(world.shared, lambda: world.confirmed() == (A,))
        else:
            await node.library.create(name, {"x": digest}, Changes(system="Be brief."))
        model = world.models[f"{name}:latest"]
        digests = {layer.digest for layer in model.layers}
        assert await node.holds(digests) == digests


async def test_a_disk_that_cannot_remember_ends_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes for the next start cannot be written; models come and go all the same."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    node = world.nodes[A]
    with monkeypatch.context() as patch:
        patch.setattr(notes, "write_private", full)
        await world.pulled(A)
        await node.library.delete(NAME)
        await until(world.shared, lambda: not node.library._share.holds(NAME))
        transfer_id = await node.library.download(REFERENCE)
        await until(world.shared, lambda: node.transfer(transfer_id).status == "completed")
        assert not (node.root / "held").exists()
    await world.settled()
    assert Note(node.root / "held", dict[str, str], {}).read().keys() == {NAME}


async def test_what_speaks_against_a_model_is_told_with_its_pull(world: World) -> None:
    node = world.nodes[A]
    asked: list[str] = []

    async def objection(model: Model) -> str:
        asked.append(model.name)
        assert model.name not in world.models  # nobody has been told of it
        return "no engine knows it"

    node.library._pulls._objection = objection
    transfer_id = await node.library.download(REFERENCE)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "completed")
    assert node.transfer(transfer_id).warning == "no engine knows it"
    assert (asked, world.confirmed()) == ([NAME], (A,))


async def test_a_warning_comes_from_the_node_that_pulled(world: World) -> None:
    await world.start(B)
    a, b = world.nodes[A], world.nodes[B]
    a.source.failure = OriginUnreachable("no route")

    async def objection(model: Model) -> str:
        return "no engine knows it"

    b.library._pulls._objection = objection
    transfer_id = await a.library.download(REFERENCE)
    await until(world.shared, lambda: a.transfer(transfer_id).status == "completed")
    assert a.transfer(transfer_id).warning == "no engine knows it"


# Deleting and dropping.


async def test_a_deleted_model_is_gone_from_every_node(world: World) -> None:
    await world.start(B)
    digests = await world.pulled(A, B)
    await world.nodes[B].library.delete(NAME)
    for node_id in (A, B):
        node = world.nodes[node_id]
        await until(world.shared, lambda node=node: node.unloaded == [NAME])
    await world.settled()
    for node_id in (A, B):
        await comes_to_hold(world.nodes[node_id], digests, set())
        assert await world.nodes[node_id].store.list_manifests() == []


@pytest.mark.parametrize("how", ["log", "snapshot"])
async def test_a_node_that_was_down_drops_what_was_deleted(world: World, how: str) -> None:
    """Also where it gets a snapshot, and never sees that the model was deleted."""
    await world.start(B)
    digests = await world.pulled(A, B)
    node = world.nodes[B]
    await node.stop()
    await world.nodes[A].library.delete(NAME)
    await world.settled()
    assert await node.holds(digests) == digests
    if how == "snapshot":
        before, after = Machine(), Machine()
        before.state = world.shared.state
        after.restore(before.snapshot())
        world.shared.state = after.state
    await world.start(B)
    await until(world.shared, lambda: node.unloaded == [NAME])
    await world.settled()
    await comes_to_hold(node, digests, set())


async def test_a_node_that_was_down_drops_what_was_moved_away(world: World) -> None:
    await world.start(B)
    digests = await world.pulled(A, B)
    node = world.nodes[B]
    await node.stop()
    model = world.models[NAME]
    world.shared.apply(PutModel(msgspec.structs.replace(model, desired=(A,), confirmed=(A,))))
    await world.start(B)
    await until(world.shared, lambda: node.unloaded == [NAME])
    await world.settled()
    await comes_to_hold(node, digests, set())


async def test_blobs_of_another_model_stay(world: World) -> None:
    node = world.nodes[A]
    digests = await world.pulled(A)
    weights = world.models[NAME].layers
    gguf = next(layer.digest for layer in weights if layer.size == len(CONTENT))
    await node.library.create("mine", {"x": gguf})
    await node.library.delete(NAME)
    await until(world.shared, lambda: node.unloaded == [NAME])
    await world.settled()
    mine = {layer.digest for layer in world.models["mine:latest"].layers}
    await comes_to_hold(node, mine | digests, mine)


async def test_a_copy_that_is_not_wanted_goes_when_the_others_have_it(world: World) -> None:
    digests = await world.pulled(A)
    world.shared.apply(SetDesired(NAME, ()))
    await world.settled()
    assert await world.nodes[A].holds(digests) == digests, "the last copy is kept"
    join(world.shared, B)
    world.shared.offline.add(B)
    world.shared.apply(SetDesired(NAME, (B,)))
    await world.settled()
    assert world.confirmed() == (A,)
    await world.start(B)
    world.shared.notify()
    await until(world.shared, lambda: world.confirmed() == (B,))
    await until(world.shared, lambda: world.nodes[A].unloaded == [NAME])
    await world.settled()
    await comes_to_hold(world.nodes[A], digests, set())


async def test_the_blobs_of_a_replaced_model_are_freed_everywhere(world: World) -> None:
    await world.start(B)
    old = await world.pulled(A, B)
    world.nodes[A].source.content = OTHER_CONTENT
    first = world.models[NAME].digest
    await world.nodes[A].library.download(NAME, source=REFERENCE, nodes=[A, B])
    await until(
        world.shared, lambda: world.models[NAME].digest != first and world.confirmed() == (A, B)
    )
    await world.settled()
    new = {layer.digest for layer in world.models[NAME].layers}
    for node_id in (A, B):
        await comes_to_hold(world.nodes[node_id], old | new, new)


async def test_a_blob_that_somebody_deleted_is_fetched_again(world: World) -> None:
    await world.start(B)
    digests = await world.pulled(A, B)
    node = world.nodes[B]
    await node.stop()
    largest = max(world.models[NAME].layers, key=lambda layer: layer.size)
    await node.store.remove_blob(largest.digest)
    await world.start(B)
    await until(world.shared, lambda: [t.status for t in node.table.list()] == ["completed"])
    assert world.confirmed() == (A, B)
    assert await node.holds(digests) == digests


# Spreading.


async def test_a_model_that_is_here_is_copied_to_more_nodes(world: World) -> None:
    await world.pulled(A)
    await world.start(B, C)
    library = world.nodes[A].library
    transfer_id = await library.download(NAME, nodes=[C])
    await until(world.shared, lambda: world.confirmed() == (A, C))
    assert world.nodes[C].transfer(transfer_id).type == "replication"
    await library.download(NAME, replicas=3)
    await until(world.shared, lambda: world.confirmed() == (A, B, C))
    done = await library.download(NAME)
    assert world.nodes[A].transfer(done).status == "completed"
    assert world.nodes[A].source.fetches == 1, "it crossed the internet once"


async def test_a_node_that_is_away_gets_its_copy_later(world: World) -> None:
    await world.pulled(A)
    join(world.shared, B)
    world.shared.offline.add(B)
    with pytest.raises(ServiceError) as caught:
        await world.nodes[A].library.download(NAME, nodes=[B])
    assert (caught.value.status, caught.value.code) == (503, "NODE_UNREACHABLE")
    assert world.models[NAME].desired == (A, B)
    await world.start(B)
    world.shared.notify()
    await until(world.shared, lambda: world.confirmed() == (A, B))


async def test_a_copy_that_fails_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(share_module, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(share_module, "RECHECK_S", 0.05)
    await world.pulled(A)
    await world.start(B)
    node = world.nodes[B]
    real = node.store.open_partial

    async def fail(*arguments: object) -> object:
        node.store.open_partial = real  # type: ignore[method-assign]
        raise OSError("the disk is not ready")

    node.store.open_partial = fail  # type: ignore[method-assign, assignment]
    world.shared.apply(SetDesired(NAME, (A, B)))
    wanted = {"failed", "completed"}
    await until(world.shared, lambda: {t.status for t in node.table.list()} == wanted)
    assert world.confirmed() == (A, B)
    assert "the disk is not ready" in caplog.text


async def test_a_cancelled_copy_is_not_wanted_any_more(world: World) -> None:
    await world.pulled(A)
    await world.start(B)
    hold = trio.Event()
    node = world.nodes[B]
    real = node.store.open_partial

    async def wait(digest: str, piece_map: object) -> object:
        await hold.wait()
        return await real(digest, piece_map)  # type: ignore[arg-type]

    node.store.open_partial = wait  # type: ignore[method-assign, assignment]
    transfer_id = await world.nodes[A].library.download(NAME, nodes=[B])
    await world.nodes[A].library.cancel(transfer_id)
    await until(world.shared, lambda: node.transfer(transfer_id).status == "cancelled")
    assert world.models[NAME].desired == (A,)
    await world.settled()
    assert world.confirmed() == (A,)


async def test_a_transfer_that_nobody_knows(world: World) -> None:
    with pytest.raises(ServiceError) as caught:
        await world.nodes[A].library.cancel("no-such")
    assert (caught.value.status, caught.value.code) == (404, "TRANSFER_NOT_FOUND")


async def test_transfers_of_a_node_that_hangs_are_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "PEER_TIMEOUT_S", 0.05)
    await world.pulled(A)
    join(world.shared, B, C)
    await world.net.add(B)
    world.net.mute.add(B)
    found = await world.nodes[A].library.transfers()
    assert [t.node_id for t in found] == [A]
