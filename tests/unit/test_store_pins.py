"""Freeing never meets a hold: not one from before, not one that comes in the middle."""

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ollamad.adapters import LocalEngine
from ollamad.core.inference import GenerateRequest
from ollamad.engine.spec import ModelSpec
from ollamad.store import models
from ollamad.store.models import ModelStore
from ollamad.store.pins import Pins
from tests.fakes.gguf_files import gguf_bytes
from tests.fakes.piece_files import read_piece


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def may_remove(pins: Pins, digest: str) -> bool:
    with pins.sweep() as sweep, sweep.removing(digest) as allowed:
        return allowed


async def test_what_is_held_is_not_removed() -> None:
    pins = Pins()
    assert may_remove(pins, "a")
    async with pins.hold("a") as first:
        async with pins.hold("a"):
            assert not may_remove(pins, "a")
        assert not may_remove(pins, "a")
        assert may_remove(pins, "b")
        await first.add("b")
        assert not may_remove(pins, "b")
    assert may_remove(pins, "a")
    assert may_remove(pins, "b")
    assert not pins.is_held("a")


async def test_a_hold_that_came_and_went_during_a_sweep_counts() -> None:
    pins = Pins()
    with pins.sweep() as sweep:
        async with pins.hold("a"):
            pass  # a manifest was written in here, which the sweep has not seen
        with sweep.removing("a") as allowed:
            assert not allowed
    assert may_remove(pins, "a")


async def test_a_blob_that_two_sweeps_remove_is_free_when_both_have_ended() -> None:
    pins = Pins()
    held = trio.Event()

    async def hold() -> None:
        async with pins.hold("a"):
            held.set()

    async with trio.open_nursery() as nursery:
        with pins.sweep() as second, second.removing("a"):
            with pins.sweep() as first, first.removing("a"):
                nursery.start_soon(hold)
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            assert not held.is_set()
        await held.wait()


async def test_who_wants_a_blob_that_is_being_removed_waits_until_it_is_gone() -> None:
    pins = Pins()
    held = trio.Event()

    async def hold() -> None:
        async with pins.hold("a"):
            held.set()

    async with trio.open_nursery() as nursery:
        with pins.sweep() as sweep, sweep.removing("a") as allowed:
            assert allowed
            nursery.start_soon(hold)
            await wait_all_tasks_blocked()
            assert not held.is_set()
        await held.wait()


async def test_a_hold_ends_when_its_task_is_cancelled() -> None:
    pins = Pins()
    with trio.CancelScope() as scope:
        async with pins.hold("a"):
            scope.cancel()
            await trio.sleep_forever()
    assert may_remove(pins, "a")


def test_a_lease_ends_with_time_or_when_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    pins = Pins(clock)
    pins.lease("a", 10)
    pins.lease("b", 10)
    clock.now = 9.0
    assert not may_remove(pins, "a")
    pins.end_lease("b")
    assert may_remove(pins, "b")
    clock.now = 10.0
    assert may_remove(pins, "a")
    monkeypatch.setattr("ollamad.store.pins.MAX_LEASES", 2)
    for digest in "xyz":
        pins.lease(digest, 10)
    assert may_remove(pins, "x")
    assert not may_remove(pins, "z")


@pytest.fixture
async def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "models", keep_free_bytes=0)
    await store.prepare()
    return store


async def test_a_model_that_is_made_while_its_blobs_are_freed_keeps_them(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race that once lost a blob: listed as free, then named, then removed."""
    async with store.pins.hold() as hold:
        digest, _ = await store.put_bytes(gguf_bytes(), hold=hold)
    listed, go_on = trio.Event(), trio.Event()
    real = ModelStore.blobs_except

    async def slow(self: ModelStore, *args: object, **more: object) -> set[str]:
        found = await real(self, *args, **more)  # type: ignore[arg-type]
        listed.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(models.BlobStore, "blobs_except", slow)
    freed: list[models.Freed] = []

    async def free() -> None:
        freed.append(await store.free(lambda: (), grace_s=0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(free)
        await listed.wait()
        async with store.pins.hold(digest):
            model = await store.build_model("tiny", digest)
            await store.write_manifest("tiny", model.manifest)
        go_on.set()
    assert freed == [models.Freed(0, frozenset({digest}))]
    assert await store.has_blob(digest)
    monkeypatch.undo()
    assert (await store.free(lambda: (), grace_s=0)).size == 0  # the manifest names it
    await store.delete_manifest("tiny")
    assert (await store.free(lambda: (), among=[digest], grace_s=0)).size > 0
    assert not await store.has_blob(digest)
    assert await store.has_blob(model.layers[0].digest)  # not among those to be freed


async def test_shelves_are_read_and_never_written(tmp_path: Path) -> None:
    theirs = ModelStore(tmp_path / "ollama", keep_free_bytes=0)
    await theirs.prepare()
    digest, _ = await theirs.put_bytes(gguf_bytes())
    model = await theirs.build_model("tiny", digest)
    await theirs.write_manifest("tiny", model.manifest)
    for path in (tmp_path / "ollama").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ollama").rglob("*")}
    ours = ModelStore(tmp_path / "ours", keep_free_bytes=0, shelves=[tmp_path / "ollama"])
    await ours.prepare()
    [stored] = await ours.shelved_manifests()
    adopted = await ours.model_of(stored.name, stored.data)
    assert adopted.digest == model.digest
    assert await ours.find_blob(digest) == theirs.blob_path(digest)
    assert (await ours.runtime_parts(adopted)).gguf == theirs.blob_path(digest)
    source = await ours.open_piece_source(digest)
    assert read_piece(source, 0) == gguf_bytes()
    source.close()
    assert await ours.remove_blob(digest) == 0
    assert (await ours.free(lambda: (), grace_s=0)).size == 0
    # What comes and is there already is not written, and theirs does not count as newer.
    await ours.put_bytes(gguf_bytes())
    # What is derived lands in our own directory.
    more = await ours.build_model("more", digest, system="Be brief.")
    assert not await theirs.has_blob(more.layers[-1].digest)
    assert await ours.has_blob(more.layers[-1].digest)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "ollama").rglob("*")} == before


async def test_a_blob_on_a_disk_that_cannot_be_written_is_here_all_the_same(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, _ = await store.put_bytes(b"x")

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert (await store.put_bytes(b"x"))[0] == digest


class Loading:
    """An engine that is about to open the model's file."""

    def __init__(self, while_loading: Callable[[], Awaitable[None]]) -> None:
        self._while_loading = while_loading

    @asynccontextmanager
    async def generate(self, spec: ModelSpec, request: GenerateRequest) -> AsyncIterator[None]:
        await self._while_loading()
        assert await trio.Path(spec.gguf_path).read_bytes() == gguf_bytes()
        yield


async def test_a_model_that_is_being_loaded_keeps_its_files(store: ModelStore) -> None:
    """It is dropped in the moment between finding its file and opening it."""
    digest, _ = await store.put_bytes(gguf_bytes())
    model = await store.build_model("tiny", digest)

    async def drop() -> None:
        freed = await store.free(lambda: (), among=[digest], grace_s=0)
        assert freed == models.Freed(0, frozenset({digest}))

    engine = LocalEngine(Loading(drop), store)  # type: ignore[arg-type]
    async with engine.generate(model, GenerateRequest(model="tiny")):
        pass
    assert (await store.free(lambda: (), among=[digest], grace_s=0)).size > 0
