"""The cluster's models: bringing them in, spreading them, deleting them.

What is asked here changes the replicated state; `share.py` makes this node's disk follow it.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from ollamad.adoption import Adoption
from ollamad.api.services import ServiceError
from ollamad.cluster import Cluster
from ollamad.core.commands import AskReplicas, DeleteModel, SetDesired
from ollamad.core.description import NO_CHANGES, Changes, Description
from ollamad.core.ids import NodeId, short
from ollamad.core.names import is_reference, parse_name
from ollamad.core.placement import (
    Ledger,
    View,
    Whereabouts,
    base_count,
    decide,
    explain,
    sole_copies,
)
from ollamad.core.state import Layer, Model, ModelDetails
from ollamad.core.transfers import Transfer
from ollamad.core.weights import Choice
from ollamad.ownership import Brought
from ollamad.peers.link import HandlerError, RemoteFailure
from ollamad.peers.tls import PeerUnreachable
from ollamad.pulls import PullRequest, Pulls
from ollamad.pushes import Pushes, PushRequest
from ollamad.scrubbing import Scrubbing
from ollamad.share import Share
from ollamad.sources.base import Source, SourceError
from ollamad.sources.references import Wanted, resolve_source
from ollamad.store.errors import BlobMissing, DigestMismatch, SizeMismatch, StoreError, StoreFull
from ollamad.store.gguf import GgufError
from ollamad.store.manifests import Descriptor
from ollamad.store.models import ModelStore
from ollamad.store.pins import Hold
from ollamad.transfer.fetch import Fetcher, FetchFailed
from ollamad.transfer.transfers import TransferTable
from ollamad.wire.codec import encode

log = logging.getLogger(__name__)

UPLOAD_LEASE_S = 3600.0  # an upload waits for so long for the request that makes it a model
PEER_TIMEOUT_S = 2.0  # for questions that a peer answers from memory
ADAPTERS_TIMEOUT_S = 600.0  # the same, after some hundred MB of adapters have come
DERIVE_TIMEOUT_S = 30.0  # some small files and a command through the log, on a busy node
MAX_MESSAGE_BYTES = 1_000_000  # of a question or an answer between nodes, with room for its head

T = TypeVar("T")

# What another node refused with, as the status that a client of that node would have seen.
_REMOTE_STATUS = {"UNKNOWN_SOURCE": 404, "INVALID_SOURCE": 400, "MODEL_NOT_FOUND": 404}


class DeriveRequest(msgspec.Struct, frozen=True):
    """Asks a node that holds the model `base` to make another one of it."""

    name: str
    base: str
    changes: Changes
    # Adapters that were uploaded to the node that asks; the other one fetches them from it.
    adapters: tuple[Layer, ...] = ()


class Library:
    """Models of the cluster, from this node's point of view.

    Args:
      source: where models come from that the cluster does not have.
      pulls_path: see `Pulls`.
      brought_path: where to remember what this node brought into a directory that it shares.
      adopted_path: where to remember what was adopted; None: nothing is.
      scrub: makes the task that reads this node's blobs, given what to tell of lost ones.
      view: the cluster as placement sees it now.
      engine_of: which engine would run a model here, and why.
      objection: why a model that is here could not be run here; empty if nothing is known.
      unload, held_path: see `Share`, which looks after this node's own copies.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: ModelStore,
        fetcher: Fetcher,
        table: TransferTable,
        source: Source,
        unload: Callable[[str], Awaitable[None]],
        held_path: Path,
        pulls_path: Path,
        view: Callable[[], View],
        brought_path: Path,
        adopted_path: Path | None = None,
        scrub: Callable[[Callable[[str], Awaitable[None]]], Scrubbing] | None = None,
        engine_of: Callable[[Model], Awaitable[Choice]] | None = None,
        objection: Callable[[Model], Awaitable[str]] | None = None,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._engine_of = engine_of
        self._table = table
        self._fetcher = fetcher
        self._view = view
        shares_directory = adopted_path is not None and not store.shelves
        brought = Brought(brought_path, store.root) if shares_directory else None
        self._share = Share(
            cluster=cluster,
            store=store,
            fetcher=fetcher,
            table=table,
            unload=unload,
            held_path=held_path,
            brought=brought,
        )
        self._pulls = Pulls(
            cluster=cluster,
            store=store,
            fetcher=fetcher,
            source=source,
            table=table,
            publish=self._publish,
            announce=self._announce,
            withdraw=self._share.following.untell,
            leave=self._share.following.leave,
            transfers=self.transfers,
            transfer=self.transfer,
            cancel=self.cancel,
            pulls_path=pulls_path,
            objection=objection,
        )
        self._adoption: Adoption | None = None
        if adopted_path is not None:
            self._adoption = Adoption(
                cluster=cluster,
                store=store,
                publish=self._share.publish,
                holds=self._share.holds,
                path=adopted_path,
            )
        self._scrubbing = None if scrub is None else scrub(self._share.lost)
        self._pushes = Pushes(cluster=cluster, store=store, source=source, table=table)
        mesh = cluster.mesh
        mesh.answer("library.want", str, self._on_want)
        mesh.answer("library.derive", DeriveRequest, self._on_derive)
        mesh.answer("library.describe", str, self._on_describe)
        mesh.answer("library.transfers", type(None), self._on_transfers)
        mesh.answer("library.transfer", str, self._on_transfer)
        mesh.answer("library.cancel", str, self._on_cancel)

    # What the API asks.

    async def download(
        self,
        name: str,
        *,
        source: str | None = None,
        nodes: Sequence[NodeId] = (),
        replicas: int | None = None,
    ) -> str:
        """Have a model in the cluster, on those nodes or that many; returns a transfer id at once.

        A model that a node can give is copied to more nodes; a running transfer is joined.

        Raises:
          ServiceError: see `Pulls.begin`, and 503 for copies that have to wait.
        """
        if source is None and is_reference(name):
            source, name = name, _wanted(name).model_name
        model = self._cluster.state.find_model(name)
        if model is not None and source is None and self._online_holder(model) is not None:
            return await self._spread(model, nodes, replicas)
        request = PullRequest(name, source, replicas or 0, tuple(nodes), self._cluster.node_id)
        return (await self._pulls.begin(request)).transfer_id

    async def update(self, name: str) -> str | None:
        """Have what a model's origin has under this name by now: a transfer's id, or None where
        that is the model that is here."""
        model = self._cluster.state.find_model(name)
        if model is not None and not await self._pulls.has_news(model):
            return None
        return await self.download(name, source=name)

    async def create(
        self,
        name: str,
        files: Mapping[str, str],
        changes: Changes = NO_CHANGES,
        *,
        replace: bool = False,
    ) -> Model:
        """Make a model of a GGUF blob that was uploaded to this node.

        A name that is taken is refused, unless the models are the same or `replace`.
        """
        async with self._store.pins.hold(*files.values(), *changes.adapters) as hold:
            plain, model = await self._build(name, files, changes, hold)
            known = self._cluster.state.find_model(name)
            if known is not None and known.digest != model.digest and not replace:
                raise ServiceError(
                    409,
                    "MODEL_EXISTS",
                    f"there is another model {known.name} already; choose another name, "
                    f"or delete it first: ollama-dist models rm {known.name}",
                    {"name": known.name},
                )
            try:
                await self._publish(model, (), 0)
            except StoreError as error:
                raise _store_failure(error) from None
        for digest in (*files.values(), *changes.adapters):
            self._store.pins.end_lease(digest)
        await self._share.free({layer.digest for layer in plain.layers})  # what was in between
        return self._cluster.state.models[parse_name(name).key]

    async def _build(
        self, name: str, files: Mapping[str, str], changes: Changes, hold: Hold
    ) -> tuple[Model, Model]:
        """A model of uploaded blobs (weights, perhaps projectors): as it is, and with changes."""
        kinds: dict[str, list[str]] = {"model": [], "projector": [], "adapter": []}
        digest = ""
        try:
            for digest in files.values():
                kinds[await self._store.kind_of(digest)].append(digest)
            if len(kinds["model"]) != 1 or kinds["adapter"]:
                raise ServiceError(
                    400,
                    "INVALID_REQUEST",
                    "files must be one GGUF file with a model, and GGUF files of its projectors "
                    f"if it has any; these are {', '.join(k for k in kinds if kinds[k])}. "
                    "Adapters go into adapters (ADAPTER in a Modelfile)",
                    {"field": "files"},
                )
            model = await self._store.build_model(
                name, kinds["model"][0], projectors=kinds["projector"], hold=hold
            )
            return model, await self._store.derive_model(name, model.manifest, changes, hold)
        except BlobMissing as error:
            raise ServiceError(400, "BLOB_NOT_FOUND", f"{error}; upload it first") from None
        except GgufError as error:
            raise ServiceError(400, "INVALID_MODEL_FILE", str(error), {"digest": digest}) from None
        except StoreError as error:
            raise _store_failure(error) from None

    async def derive(self, name: str, base: str, changes: Changes = NO_CHANGES) -> Model:
        """Make a model of another one, on a node that holds that; without changes, a copy.

        A model of that name is replaced.
        """
        holder = self._holder(base)
        async with self._store.pins.hold(*changes.adapters):
            await self._derive(holder, DeriveRequest(name, base, changes))
        for digest in changes.adapters:
            self._store.pins.end_lease(digest)
        return self._cluster.state.models[parse_name(name).key]

    async def _derive(self, holder: NodeId, request: DeriveRequest) -> None:
        name, digests = request.name, request.changes.adapters
        if holder == self._cluster.node_id:
            await self._derive_here(request)
        else:
            layers = tuple([await self._uploaded(digest) for digest in digests])
            request = msgspec.structs.replace(request, adapters=layers)
            if len(encode(request)) > MAX_MESSAGE_BYTES:
                raise ServiceError(
                    413,
                    "BODY_TOO_LARGE",
                    "template, messages and licence are "
                    f"larger than {MAX_MESSAGE_BYTES:,} bytes together",
                )
            timeout_s = ADAPTERS_TIMEOUT_S if layers else DERIVE_TIMEOUT_S
            digest = await self._ask(holder, "library.derive", request, timeout_s)
            await self._until_known(name, digest)

    async def _uploaded(self, digest: str) -> Layer:
        """A blob of this node, as others can fetch it."""
        try:
            pieces = await self._store.piece_map(digest)
        except StoreError as error:
            raise ServiceError(400, "BLOB_NOT_FOUND", f"{error}; upload it first") from None
        return Layer("", digest, pieces.size, pieces.piece_size, pieces.root())

    async def push(self, name: str, destination: str) -> str:
        """Have a holder send a model to a registry; returns a transfer id at once."""
        holder = self._holder(name)
        request = PushRequest(name, destination)
        if holder == self._cluster.node_id:
            return self._pushes.start(request)
        return await self._ask(holder, "pushes.start", request, PEER_TIMEOUT_S)

    async def describe(self, name: str) -> Description:
        """What the small blobs and the file of a model say, read by a node that holds them."""
        holder = self._holder(name)
        if holder == self._cluster.node_id:
            return await self._describe_here(name)
        return await self._call(holder, "library.describe", name, Description, PEER_TIMEOUT_S)

    async def delete(self, name: str) -> None:
        """Delete a model from every node; those that are down drop it when they return."""
        await self._cluster.require(DeleteModel(name))

    async def transfers(self) -> Sequence[Transfer]:
        """All active and recent transfers of the nodes that are online, newest first."""
        found = self._table.list()

        async def ask(node_id: NodeId) -> None:
            with trio.move_on_after(PEER_TIMEOUT_S), suppress(PeerUnreachable, RemoteFailure):
                mesh = self._cluster.mesh
                found.extend(await mesh.call(node_id, "library.transfers", None, list[Transfer]))

        async with trio.open_nursery() as nursery:
            for node_id in self._cluster.other_members():
                if self._cluster.is_online(node_id):
                    nursery.start_soon(ask, node_id)
        return sorted(found, key=lambda transfer: -transfer.started_at)

    async def transfer(self, transfer_id: str) -> Transfer | None:
        """A transfer as it is now; None when its node has forgotten it, or is away."""
        if (mine := self._table.get(transfer_id)) is not None:
            return mine
        for node_id in self._cluster.other_members():
            if transfer_id.startswith(short(node_id)):
                with suppress(ServiceError):
                    return await self._call(
                        node_id, "library.transfer", transfer_id, Transfer, PEER_TIMEOUT_S
                    )
        return None

    async def cancel(self, transfer_id: str) -> None:
        """Stop a transfer, wherever it runs; a copy from a peer is then not wanted there."""
        transfer = next((t for t in await self.transfers() if t.id == transfer_id), None)
        if transfer is None:
            raise ServiceError(404, "TRANSFER_NOT_FOUND", f"there is no transfer {transfer_id}", {})
        if transfer.type == "replication":
            model = self._cluster.state.find_model(transfer.model_name)
            if model is not None and transfer.node_id in model.desired:
                rest = tuple(n for n in model.desired if n != transfer.node_id)
                pinned = tuple(n for n in model.pinned if n != transfer.node_id)
                # One copy fewer, or another node would get it.
                await self._cluster.require(AskReplicas(model.name, max(1, len(rest)), pinned))
                await self._cluster.require(SetDesired(model.name, rest))
        if transfer.node_id == self._cluster.node_id:
            self._on_cancel(transfer.node_id, transfer_id)
        else:
            await self._ask(transfer.node_id, "library.cancel", transfer_id, PEER_TIMEOUT_S)

    def no_room(self) -> tuple[str, ...]:
        """The models that this node should hold and found no room for lately."""
        return self._share.no_room()

    @property
    def receive_rate(self) -> float:
        """Bytes a second at which copies came from peers lately; 0 if none did."""
        return self._share.received.value

    async def has_blob(self, digest: str) -> bool:
        """Whether a blob is here; if so it stays for a while, as whoever asks will not send it."""
        self._store.pins.lease(digest, UPLOAD_LEASE_S)
        here = await self._store.has_blob(digest)
        if not here:
            self._store.pins.end_lease(digest)
        return here

    async def receive_blob(
        self, digest: str, chunks: AsyncIterator[bytes], size: int | None = None
    ) -> None:
        """Store an uploaded blob of this node under its digest, durably.

        With its `size` there is room for all of it from the start, or none of it is taken.
        """
        try:
            async with self._store.pins.hold() as hold:
                await self._store.ingest(chunks, expected_digest=digest, size=size, hold=hold)
                self._store.pins.lease(digest, UPLOAD_LEASE_S)
        except (DigestMismatch, SizeMismatch) as error:
            raise ServiceError(400, "DIGEST_MISMATCH", str(error), {"digest": digest}) from None
        except StoreError as error:
            raise _store_failure(error) from None

    def inference_ready(self, model: Model) -> bool:
        """Whether some online node can answer with this model now."""
        members = self._cluster.state.members
        return any(
            node_id in members
            and not members[node_id].draining
            and self._cluster.is_online(node_id)
            for node_id in model.confirmed
        )

    async def ask_replicas(self, name: str, replicas: int) -> Model:
        """Have so many copies of a model in the cluster; 0: as many as by default.

        On which nodes is the cluster's choice again, also if some were asked for by name.
        """
        model = self._cluster.state.find_model(name)
        if model is None:
            raise ServiceError(404, "MODEL_NOT_FOUND", f"model {name!r} not found", {"model": name})
        await self._cluster.require(AskReplicas(model.name, replicas))
        return self._cluster.state.find_model(name) or model

    def placement(self, model: Model) -> Whereabouts:
        """Why a model is where it is."""
        return explain(self._view(), model)

    def sole_models(self, node_id: NodeId) -> list[str]:
        """The models that only that node could serve."""
        return [model.name for model in sole_copies(self._view(), node_id)]

    def wanted_replicas(self) -> dict[str, int]:
        """How many copies of each model (by its name) there should be, but for hot ones."""
        view = self._view()
        return {
            model.name: base_count(view.policy, model, len(view.sites))[0]
            for model in view.models.values()
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run pulls, and this node's share of the models; until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._share.run)
            await nursery.start(self._pulls.run)
            await nursery.start(self._pushes.run)
            if self._adoption is not None:
                nursery.start_soon(self._adoption.run)
            if self._scrubbing is not None:
                nursery.start_soon(self._scrubbing.run)
            task_status.started()

    # Bringing in.

    def _announce(self, request: PullRequest, files: Sequence[Descriptor]) -> list[NodeId]:
        """Have those fetch a model's large files already that will get copies of it."""
        me = self._cluster.node_id
        layers = tuple(Layer(f.media_type, f.digest, f.size, 1, "") for f in files)
        coming = Model(request.name, "", b"", ModelDetails(), layers, 0.0)
        placed = self._placed(coming, request.nodes, request.replicas)
        others = [n for n in placed.desired if n != me and self._cluster.is_online(n)]
        self._share.following.tell(request.name, request.key, files, others)
        return others

    def _placed(self, model: Model, nodes: Sequence[NodeId], replicas: int) -> Model:
        """A model that this node has or is getting, with where it should be; see `_publish`."""
        me = self._cluster.node_id
        known = self._cluster.state.find_model(model.name)
        if known is not None and not nodes:
            nodes, replicas = known.pinned, replicas or known.replicas
        elif nodes:
            replicas = max(replicas, len(set(nodes)))
        model = msgspec.structs.replace(
            model,
            replicas=replicas,
            pinned=tuple(sorted(set(nodes))),
            desired=tuple(sorted({me, *nodes})),
            confirmed=(me,),
        )
        view = self._view()
        desired = decide(view, Ledger(view), model).desired
        return msgspec.structs.replace(model, desired=desired)

    async def _publish(self, model: Model, nodes: Sequence[NodeId], replicas: int) -> None:
        """Make a model that this node holds known to the cluster, and place its copies.

        On those nodes and no others, unless somebody said how many; else as many as the model of
        that name had before.
        """
        placed = self._placed(model, nodes, replicas)
        await self._share.publish(placed, placed.desired)

    # Spreading.

    async def _spread(self, model: Model, nodes: Sequence[NodeId], replicas: int | None) -> str:
        """Copy a model to more nodes: to those as well, or to have that many."""
        view = self._view()
        base, _ = base_count(view.policy, model, len(view.sites))
        count = max(replicas, base) if replicas else model.replicas
        if nodes:  # they come on top of those that should have it
            there = base if view.policy.automatic else max(base, len(model.desired))
            count = max(count, there + len(set(nodes) - set(model.desired)))
        pinned = tuple(sorted({*model.pinned, *nodes}))
        if (count, pinned) != (model.replicas, model.pinned):
            await self._cluster.require(AskReplicas(model.name, count, pinned))
            model = msgspec.structs.replace(model, replicas=count, pinned=pinned)
        wanted = set(decide(view, Ledger(view), model).desired) | set(model.desired) | set(nodes)
        if wanted != set(model.desired):
            await self._cluster.require(SetDesired(model.name, tuple(sorted(wanted))))
        missing = sorted(wanted - set(model.confirmed))
        for node_id in missing:
            if self._cluster.is_online(node_id):
                if node_id == self._cluster.node_id:
                    return await self._fetch_here(model.name)
                return await self._ask(node_id, "library.want", model.name, PEER_TIMEOUT_S)
        if missing:
            raise ServiceError(
                503,
                "NODE_UNREACHABLE",
                f"{', '.join(short(n) for n in missing)} is offline; it fetches {model.name} "
                "when it returns",
                {"nodes": list(missing)},
            )
        done = self._table.begin(model.name, "replication", bytes_total=model.size)
        self._table.complete(done)
        return done

    async def _fetch_here(self, name: str) -> str:
        """Begin to fetch a model that this node should hold; the transfer's id."""
        with trio.move_on_after(PEER_TIMEOUT_S):
            while True:
                changed = self._cluster.changes.next()
                model = self._cluster.state.find_model(name)
                if model is not None and self._cluster.node_id in model.desired:
                    return self._share.fetch(model)
                await changed.wait()  # the command is on its way to this node
        raise ServiceError(503, "BEHIND", "this node does not know of that model yet; try again")

    # Helpers.

    def _holder(self, name: str) -> NodeId:
        """A node that holds the model and can be asked: this one if possible."""
        model = self._cluster.state.find_model(name)
        if model is None:
            raise ServiceError(404, "MODEL_NOT_FOUND", f"model {name!r} not found", {"model": name})
        holder = self._online_holder(model)
        if holder is None:
            raise ServiceError(
                503,
                "NO_REPLICA",
                f"no node that holds {model.name} is online",
                {"model": model.name, "holders": list(model.confirmed)},
            )
        return holder

    def _online_holder(self, model: Model) -> NodeId | None:
        """This node if it holds the model, else another one that can be asked for it."""
        holders = sorted(model.confirmed, key=lambda node_id: node_id != self._cluster.node_id)
        for node_id in holders:
            if node_id in self._cluster.state.members and self._cluster.is_online(node_id):
                return node_id
        return None

    async def _derive_here(self, request: DeriveRequest) -> str:
        base = self._cluster.state.find_model(request.base)
        if base is None:
            raise ServiceError(404, "MODEL_NOT_FOUND", f"model {request.base!r} not found")
        try:
            # Held, since the other one may be deleted while this one is made of it.
            async with self._store.pins.hold() as hold:
                model = await self._store.derive_model(
                    request.name, base.manifest, request.changes, hold
                )
                known = self._cluster.state.find_model(request.name)
                if known is None or known.digest != model.digest:
                    asked = base if known is None else known
                    model = msgspec.structs.replace(
                        model, replicas=asked.replicas, pinned=asked.pinned
                    )
                    await self._share.publish(model, base.desired or (self._cluster.node_id,))
        except (StoreError, GgufError) as error:
            raise _store_failure(error) from None
        return model.digest

    async def _describe_here(self, name: str) -> Description:
        model = self._cluster.state.find_model(name)
        if model is None:
            raise ServiceError(404, "MODEL_NOT_FOUND", f"model {name!r} not found")
        try:
            description = await self._store.describe_model(model)
        except (StoreError, GgufError) as error:
            raise _store_failure(error) from None
        if self._engine_of is None:
            return description
        choice = await self._engine_of(model)
        return msgspec.structs.replace(
            description, engine=choice.engine, engine_reason=choice.reason
        )

    async def _until_known(self, name: str, digest: str) -> None:
        """Wait until this node's state has caught up with what another node published."""
        with trio.move_on_after(PEER_TIMEOUT_S):
            while True:
                changed = self._cluster.changes.next()
                model = self._cluster.state.find_model(name)
                if model is not None and model.digest == digest:
                    return
                await changed.wait()
        raise ServiceError(503, "BEHIND", f"{name} is made, but this node does not know it yet")

    async def _ask(self, node_id: NodeId, method: str, request: object, timeout_s: float) -> str:
        """Ask another node something that it answers with a text."""
        return await self._call(node_id, method, request, str, timeout_s)

    async def _call(
        self, node_id: NodeId, method: str, request: object, answer_type: type[T], timeout_s: float
    ) -> T:
        try:
            with trio.fail_after(timeout_s):
                return await self._cluster.mesh.call(node_id, method, request, answer_type)
        except trio.TooSlowError:
            raise ServiceError(
                503, "NODE_UNREACHABLE", f"node {short(node_id)}… did not answer in time"
            ) from None
        except PeerUnreachable as error:
            raise ServiceError(503, "NODE_UNREACHABLE", str(error)) from None
        except RemoteFailure as error:
            raise ServiceError(
                _REMOTE_STATUS.get(error.code, 503), error.code, error.message
            ) from None

    # What other nodes ask.

    async def _on_want(self, peer: NodeId, name: str) -> str:
        try:
            return await self._fetch_here(name)
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None

    async def _on_derive(self, peer: NodeId, request: DeriveRequest) -> str:
        try:
            async with self._store.pins.hold(*request.changes.adapters):
                for layer in request.adapters:
                    await self._fetcher.fetch_blob(layer, lambda: [peer], lambda step: None)
                return await self._derive_here(request)
        except (FetchFailed, StoreError) as error:
            raise HandlerError("FETCH_FAILED", str(error)) from None
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None

    async def _on_describe(self, peer: NodeId, name: str) -> Description:
        try:
            description = await self._describe_here(name)
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None
        if len(encode(description)) > MAX_MESSAGE_BYTES:
            # Licences are what is long; everything else is needed to work with the model.
            return msgspec.structs.replace(description, licenses=())
        return description

    def _on_transfer(self, peer: NodeId, transfer_id: str) -> Transfer:
        transfer = self._table.get(transfer_id)
        if transfer is None:
            raise HandlerError("TRANSFER_NOT_FOUND", f"there is no transfer {transfer_id}")
        return transfer

    def _on_transfers(self, peer: NodeId, _: None) -> list[Transfer]:
        return self._table.list()

    def _on_cancel(self, peer: NodeId, transfer_id: str) -> str:
        with suppress(KeyError):  # it is over and forgotten
            self._table.request_cancel(transfer_id)
        return transfer_id


def _wanted(text: str) -> Wanted:
    try:
        return resolve_source(text)
    except SourceError as error:
        raise ServiceError(404, "UNKNOWN_SOURCE", str(error), {"source": text}) from None


def _store_failure(error: StoreError | GgufError) -> ServiceError:
    code = "DISK_FULL" if isinstance(error, StoreFull) else "STORE_FAILED"
    return ServiceError(503, code, str(error))
