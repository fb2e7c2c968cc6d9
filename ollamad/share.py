"""What this node holds of the cluster's models, and how that follows what it should hold.

Which node should hold what stands in the replicated state. Every node works on its own share: it
fetches what it should hold and lacks from peers, and drops what it should not hold any more.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from ollamad.api.services import ServiceError
from ollamad.cluster import Cluster
from ollamad.core.commands import (
    Applied,
    AskReplicas,
    ConfirmReplica,
    PutModel,
    ReleaseReplica,
    SetDesired,
)
from ollamad.core.ids import NodeId
from ollamad.core.measures import Rate
from ollamad.core.names import parse_name
from ollamad.core.state import Model
from ollamad.following import Following
from ollamad.notes import Note
from ollamad.ownership import Brought
from ollamad.store.errors import BlobMissing, StoreError, StoreFull
from ollamad.store.manifests import describe, manifest_digest
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher, FetchFailed, FetchProgress
from ollamad.transfer.transfers import TransferTable

log = logging.getLogger(__name__)

GARBAGE_INTERVAL_S = 3600.0
GARBAGE_AGE_S = 86400.0  # an upload may wait that long for the request that makes it a model
PARTIAL_AGE_S = 7 * 86400.0  # a pull that was cancelled or failed can go on for so long
STRAY_AGE_S = 3600.0  # a copy was begun here by a process that died, and went to another node
RECHECK_S = 5.0  # how often a node compares what it holds with what it should hold
FIRST_RETRY_S = 2.0  # after a failed fetch; doubles up to MAX_RETRY_S
MAX_RETRY_S = 60.0
BARRIER_S = 5.0  # for a majority to confirm what would have a copy dropped
CLEANUP_S = 5.0  # after a cancellation; a disk that hangs must not hold up the end
NO_ROOM_S = 600.0  # so long other nodes are asked first
MAX_NO_ROOM = 16  # models told in a heartbeat


class _Fetch(msgspec.Struct, frozen=True):
    """A copy that is under way to this node."""

    transfer_id: str
    digest: str  # of the manifest


class Share:
    """This node's models: on its disk, on their way to it, and on their way out.

    Args:
      unload: frees the memory of a model that is about to go.
      held_path: remembers which models this node holds for the cluster, so that it drops those
        that were deleted while it was down, and nothing else.
      brought: what of the store's own directory is the cluster's; None: all. Only a deletion or
        replacement removes anything else; and if there is any, blobs that no model uses are not
        collected, for an Ollama may be about to.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: ModelStore,
        fetcher: Fetcher,
        table: TransferTable,
        unload: Callable[[str], Awaitable[None]],
        held_path: Path,
        brought: Brought | None,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._fetcher = fetcher
        self._table = table
        self._unload = unload
        self.following = Following(cluster=cluster, store=store, fetcher=fetcher, table=table)
        self._note = Note(held_path, dict[str, str], {})
        self._brought = brought
        self.received = Rate()  # of copies from peers
        self._held: dict[str, str] = {}
        self._unchecked: set[str] = set()  # name keys of those that were not looked for yet
        self._kept: set[str] = set()  # of those that moved away, whose files stay: see `_drop`
        self._fetches: dict[str, _Fetch] = {}  # by name key
        # Name keys of models that are on the disk and on their way into the state: hands off.
        self._publishing: set[str] = set()
        self._unfreed: set[str] = set()  # blobs to free once nobody holds them any more
        self._no_room: dict[str, float] = {}  # names of models -> until when it is told
        self._retry_at: dict[str, float] = {}
        self._retry_after: dict[str, float] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what this node holds equal to what it should hold; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._held = self._note.read()
            if self._brought is not None:
                self._brought.remember()
            self._unchecked = set(self._held)  # somebody may have cleaned up
            await nursery.start(self.following.run)
            task_status.started()
            nursery.start_soon(self._collect_garbage)
            while True:
                changed = self._cluster.changes.next()
                self._note.catch_up()
                try:
                    await self._reconcile()
                    if self._unfreed:
                        await self.free(self._unfreed)
                except ServiceError as error:
                    log.info("models: %s", error)  # no quorum; the next round tries again
                except (StoreError, OSError) as error:
                    log.error("models: %s", error)
                with trio.move_on_after(RECHECK_S):
                    await changed.wait()

    def fetch(self, model: Model) -> str:
        """Begin to fetch a model that this node should hold; the transfer's id."""
        running = self._fetches.get(parse_name(model.name).key)
        return running.transfer_id if running is not None else self._start_fetch(model)

    def no_room(self) -> tuple[str, ...]:
        """The models that were to come here lately and found no room; a few of them."""
        now = trio.current_time()
        self._no_room = {name: until for name, until in self._no_room.items() if until > now}
        return tuple(list(self._no_room)[-MAX_NO_ROOM:])

    async def publish(self, model: Model, desired: tuple[NodeId, ...]) -> None:
        """Make a model whose blobs are here known to the cluster.

        If that fails or is cancelled, the blobs stay for a day, for another try.

        Raises:
          ServiceError: the cluster could not agree. StoreError: the disk refused.
        """
        async with self._store.pins.hold(*(layer.digest for layer in model.layers)):
            for layer in model.layers:
                # Whoever made it may not have held all of it while another model was deleted.
                if not await self._store.has_blob(layer.digest):
                    raise BlobMissing(
                        f"blob {layer.digest} of {model.name} was deleted meanwhile; try again"
                    )
            await self._publish(model, desired)

    async def _publish(self, model: Model, desired: tuple[NodeId, ...]) -> None:
        key = parse_name(model.name).key
        self._publishing.add(key)
        try:
            before = await self._write_manifest(model)
            try:
                await self._tell(key, model, desired)
            except BaseException:
                # If it comes to be all the same, `_take_stock` finds it.
                with trio.move_on_after(CLEANUP_S, shield=True):
                    await self._set_manifest(key, before)
                    if self._brought is not None:
                        self._brought.forget(key)
                raise
            self._remember(key, model.digest)
        finally:
            self._publishing.discard(key)
            self._cluster.changes.notify()
        await self.free(_blobs(before))

    async def _tell(self, key: str, model: Model, desired: tuple[NodeId, ...]) -> None:
        """Put a model that is here into the state."""
        me, name = self._cluster.node_id, model.name
        known = self._cluster.state.models.get(key)
        if known is None or known.digest != model.digest:
            put = msgspec.structs.replace(model, desired=desired, confirmed=(me,))
            await self._cluster.require(PutModel(put))
            return
        # The same one: the copies that others hold still count, or they would be dropped.
        if (known.replicas, known.pinned) != (model.replicas, model.pinned):
            await self._cluster.require(AskReplicas(name, model.replicas, model.pinned))
        if not set(desired) <= set(known.desired):
            both = tuple(sorted({*known.desired, *desired}))
            await self._cluster.require(SetDesired(name, both))
        if me not in known.confirmed:
            await self._cluster.require(ConfirmReplica(name, model.digest, me, present=True))

    def holds(self, key: str) -> bool:
        """Whether this node has, keeps or publishes a model of that name for the cluster."""
        return key in self._held or key in self._publishing or key in self._fetches

    async def lost(self, digest: str) -> None:
        """A blob is not here any more: say so for each model of it, and have it fetched again."""
        me = self._cluster.node_id
        for key, model in list(self._cluster.state.models.items()):
            if me in model.confirmed and any(layer.digest == digest for layer in model.layers):
                await self._unload(key)
                await self._confirm(model, present=False)

    async def _take_stock(self, model: Model) -> None:
        """This node should have that model: remember it, or say that it is not here."""
        for layer in model.layers:
            if not await self._store.has_blob(layer.digest):
                log.warning("%s: blob %s is missing here", model.name, layer.digest)
                await self._confirm(model, present=False)
                return
        await self._store.write_manifest(model.name, model.manifest)
        self._remember(parse_name(model.name).key, model.digest)

    async def _reconcile(self) -> None:
        assert self._nursery is not None, "runs inside run()"
        me = self._cluster.node_id
        models = dict(self._cluster.state.models)
        for key, fetch in self._fetches.items():
            wanted = models.get(key)
            if wanted is None or me not in wanted.desired or wanted.digest != fetch.digest:
                self._table.request_cancel(fetch.transfer_id)
        for key, model in models.items():
            if key not in self._publishing:
                with _told(model.name):
                    await self._reconcile_model(key, model)
        if self._unwanted():
            # This node may not know yet what was agreed on last, least of all after a start.
            await self._cluster.read_barrier(BARRIER_S)
            for key in self._unwanted():
                with _told(key):
                    await self._drop(key)

    async def _reconcile_model(self, key: str, model: Model) -> None:
        me = self._cluster.node_id
        if me in model.desired and me not in model.confirmed:
            if key not in self._fetches and self._retry_at.get(key, 0) <= trio.current_time():
                self._start_fetch(model)
        elif self._is_spare(model):
            await self._give_up(key, model)
        elif me in model.confirmed and (
            self._held.get(key) != model.digest or key in self._unchecked
        ):
            await self._take_stock(model)

    def _unwanted(self) -> list[str]:
        """Names of models that this node holds, and that were deleted, replaced or moved away."""
        me = self._cluster.node_id
        models = self._cluster.state.models
        return [
            key
            for key in self._held
            if key not in self._publishing
            and (
                (model := models.get(key)) is None
                or not (
                    (key in self._kept and model.digest == self._held[key])
                    or me in model.desired
                    or me in model.confirmed
                )
            )
        ]

    def _is_spare(self, model: Model) -> bool:
        """Whether this node holds a model that others should hold, and do, and can serve."""
        me, members = self._cluster.node_id, self._cluster.state.members
        if me not in model.confirmed or me in model.desired or not model.desired:
            return False
        if me in members and members[me].draining:
            return False  # it may be about to leave, with what it has
        return set(model.desired) <= set(model.confirmed) and any(
            self._cluster.is_online(n) and not members[n].draining
            for n in model.desired
            if n in members
        )

    async def _give_up(self, key: str, model: Model) -> None:
        """Free a copy (see `_drop`), if the cluster agrees that it is not needed."""
        command = ReleaseReplica(model.name, model.digest, self._cluster.node_id)
        outcome = await self._cluster.propose(command)
        if isinstance(outcome, Applied):
            await self._drop(key)
        else:
            log.info("keeping %s: %s", model.name, outcome.message)

    # Fetching.

    def _start_fetch(self, model: Model) -> str:
        assert self._nursery is not None, "runs inside run()"
        scope = trio.CancelScope()
        transfer_id = self._table.begin(
            model.name,
            "replication",
            bytes_total=model.size,
            digest=model.digest,
            cancel=scope.cancel,
        )
        self._fetches[parse_name(model.name).key] = _Fetch(transfer_id, model.digest)
        self._nursery.start_soon(self._fetch, model, transfer_id, scope)
        return transfer_id

    async def _fetch(self, model: Model, transfer_id: str, scope: trio.CancelScope) -> None:
        key = parse_name(model.name).key
        try:
            with scope:
                async with self._store.pins.hold(*(layer.digest for layer in model.layers)):
                    await self.following.take_over(key)
                    await self._fetch_held(model, transfer_id)
                self._table.complete(transfer_id)
                self._retry_after.pop(key, None)
                self._no_room.pop(model.name, None)
                log.info("%s is here now", model.name)
            if scope.cancelled_caught:
                self._table.cancelled(transfer_id)
                await self._abandon(model)
        except Exception as error:  # whatever it is, it ends this fetch and not the daemon
            if not isinstance(error, FetchFailed | StoreError | ServiceError | OSError):
                log.exception("fetching %s failed in an unforeseen way", model.name)
            pause = min(MAX_RETRY_S, 2 * self._retry_after.get(key, FIRST_RETRY_S / 2))
            self._retry_after[key] = pause
            self._retry_at[key] = trio.current_time() + pause
            if isinstance(error, StoreFull):
                self._no_room[model.name] = trio.current_time() + NO_ROOM_S
            log.warning("fetching %s failed: %s; next try in %.0f s", model.name, error, pause)
            self._table.fail(transfer_id, str(error))
        finally:
            self._fetches.pop(key, None)
            self._cluster.changes.notify()

    async def _fetch_held(self, model: Model, transfer_id: str) -> None:
        """Have all blobs of a model here, for which there is room, and say so."""
        key = parse_name(model.name).key
        sizes = {layer.digest: layer.size for layer in model.layers}
        with self._store.space.reserve(await self._store.missing_bytes(sizes)):
            await self._fetch_layers(model, transfer_id)
        before = await self._write_manifest(model)
        self._remember(key, model.digest)
        await self._confirm(model, present=True)
        await self.free(_blobs(before))

    async def _abandon(self, model: Model) -> None:
        """Free what came of a model that this node is not to have after all."""
        wanted = self._wanted_here()
        for layer in model.layers:
            if layer.digest not in wanted:
                await self._store.discard_partial(layer.digest)
        await self.free({layer.digest for layer in model.layers})

    async def _fetch_layers(self, model: Model, transfer_id: str) -> None:
        before, begun = 0, trio.current_time()

        def holders() -> Sequence[NodeId]:
            current = self._cluster.state.find_model(model.name)
            confirmed = current.confirmed if current and current.digest == model.digest else ()
            return [
                n for n in confirmed if n != self._cluster.node_id and self._cluster.is_online(n)
            ]

        layers = tuple((layer.digest, layer.size) for layer in model.layers)
        received_before = 0
        for layer in model.layers:
            received = 0

            def progress(step: FetchProgress) -> None:
                nonlocal received
                received = step.received
                self._table.update(
                    transfer_id,
                    bytes_done=before + step.verified,  # noqa: B023 - called within this turn
                    received=received_before + step.received,  # noqa: B023
                    peer_id=step.holder,
                    layers=layers,
                )

            await self._fetcher.fetch_blob(layer, holders, progress)
            before += layer.size
            received_before += received
        self.received.note(received_before, trio.current_time() - begun)

    async def _confirm(self, model: Model, *, present: bool) -> None:
        """Say that this node holds a model, or not any more; waits out elections."""
        command = ConfirmReplica(model.name, model.digest, self._cluster.node_id, present)
        pause = 0.5
        while True:
            try:
                outcome = await self._cluster.propose(command)
            except ServiceError as error:
                log.info("confirming %s: %s", model.name, error)
                await trio.sleep(pause)
                pause = min(10.0, 2 * pause)
                continue
            if not isinstance(outcome, Applied):
                log.info("confirming %s: %s", model.name, outcome.message)
            return

    # Dropping.

    async def _drop(self, key: str) -> None:
        """Free what this node holds of a model that is not wanted here any more."""
        await self._unload(key)
        model = self._cluster.state.models.get(key)
        held = self._held.get(key, "" if model is None else model.digest)
        manifest = await self._manifest_of(key)
        if self._brought is not None:
            is_moved = model is not None and model.digest == held
            if is_moved and not self._brought.has(key, held):
                # An Ollama's: it stays until it is deleted or replaced. So it stays in `_held`,
                # else the adoption would take it for new, and that for a copy too many.
                self._kept.add(key)
                return
            self._brought.forget(key)
            if manifest is not None and manifest_digest(manifest) != held:
                manifest = None  # an Ollama has put another one there since
        freed = 0
        if manifest is not None:
            await self._store.delete_manifest(key)
            freed = await self.free(_blobs(manifest))
        self._held.pop(key, None)
        self._kept.discard(key)
        self._write_held()
        log.info("%s is gone from this node; %.1f MB freed", key, freed / 1e6)

    async def _write_manifest(self, model: Model) -> bytes | None:
        """Put a model's manifest onto the disk; returns the one that was there before."""
        key = parse_name(model.name).key
        before = await self._manifest_of(key)
        await self._store.write_manifest(model.name, model.manifest)
        if self._brought is not None and (
            before is None or manifest_digest(before) != model.digest
        ):
            self._brought.note(key, model.digest)
        return before

    async def _are_all_ours(self) -> bool:
        """Whether this daemon brought all models of the store's own directory."""
        brought = self._brought
        return brought is None or all(
            brought.has(parse_name(stored.name).key, manifest_digest(stored.data))
            for stored in await self._store.list_manifests()
        )

    async def _manifest_of(self, key: str) -> bytes | None:
        try:
            return await self._store.read_manifest(key)
        except StoreError:
            return None

    async def _set_manifest(self, key: str, manifest: bytes | None) -> None:
        if manifest is None:
            await self._store.delete_manifest(key)
        else:
            await self._store.write_manifest(key, manifest)

    async def free(self, digests: set[str]) -> int:
        """Remove those of the blobs that no model here needs; the bytes that it freed.

        Those that somebody holds now are tried again later.
        """
        freed = await self._store.free(self._wanted_here, among=digests, grace_s=0)
        self._unfreed = (self._unfreed - digests) | freed.held
        return freed.size

    def _wanted_here(self) -> set[str]:
        """The digests of all blobs of models that this node holds or should hold."""
        me = self._cluster.node_id
        return {
            layer.digest
            for model in self._cluster.state.models.values()
            if me in model.desired or me in model.confirmed
            for layer in model.layers
        }

    async def _collect_garbage(self) -> None:
        """Free uploads that never became a model, and partial copies that nobody wants."""
        while True:
            await trio.sleep(GARBAGE_INTERVAL_S)
            try:
                await self._cluster.read_barrier(BARRIER_S)
                if await self._are_all_ours():
                    freed = await self._store.free(self._wanted_here, grace_s=GARBAGE_AGE_S)
                    if freed.size:
                        log.info("freed %.1f MB, which no model uses", freed.size / 1e6)
                for digest in await self._store.discard_old_partials(self._partial_age()):
                    log.info("threw away what had come of %s; nobody asked for the rest", digest)
            except (ServiceError, StoreError, OSError) as error:
                log.warning("freeing unused blobs: %s", error)

    def _partial_age(self) -> Callable[[str], float]:
        """For how many seconds to keep what came of a blob, if no more comes."""
        wanted = self._wanted_here()
        models = self._cluster.state.models.values()
        elsewhere = {layer.digest for model in models for layer in model.layers} - wanted

        def age(digest: str) -> float:
            if digest in wanted:
                return math.inf
            return STRAY_AGE_S if digest in elsewhere else PARTIAL_AGE_S

        return age

    def _remember(self, key: str, digest: str) -> None:
        self._held[key] = digest
        self._unchecked.discard(key)
        self._kept.discard(key)
        self._write_held()

    def _write_held(self) -> None:
        self._note.write(self._held)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Log it if the disk refuses what concerns one model, so that the others have their turn."""
    try:
        yield
    except (StoreError, OSError) as error:
        log.error("%s: %s; the next round tries again", name, error)


def _blobs(manifest: bytes | None) -> set[str]:
    """The blobs that a manifest names; none of one that cannot be read."""
    if manifest is None:
        return set()
    try:
        return {blob.digest for blob in describe(manifest).blobs}
    except StoreError:
        return set()
