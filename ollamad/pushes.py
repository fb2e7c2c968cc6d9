"""Pushes of models to registries, each by a node that holds the model."""

import logging
from collections.abc import Callable

import msgspec
import trio

from ollamad.api.services import ServiceError
from ollamad.background import Background
from ollamad.cluster import Cluster
from ollamad.core.ids import NodeId
from ollamad.core.state import Model
from ollamad.peers.link import HandlerError
from ollamad.sources.base import Source, SourceError
from ollamad.store.errors import BlobMissing, StoreError
from ollamad.store.files import read_exactly
from ollamad.store.manifests import describe
from ollamad.store.models import ModelStore
from ollamad.transfer.transfers import TransferTable

log = logging.getLogger(__name__)


class PushRequest(msgspec.Struct, frozen=True):
    """Asks a holder to push a model; `destination` is a name with a host if need be."""

    name: str
    destination: str


class Pushes(Background):
    """This node's pushes. Runs them once `run` does."""

    def __init__(
        self, *, cluster: Cluster, store: ModelStore, source: Source, table: TransferTable
    ) -> None:
        super().__init__()
        self._cluster = cluster
        self._store = store
        self._source = source
        self._table = table
        self._here: dict[str, str] = {}  # destination -> transfer id
        cluster.mesh.answer("pushes.start", PushRequest, self._on_start)

    def start(self, request: PushRequest) -> str:
        """Begin to push a model that is here; the transfer's id, of the one that runs if one does.

        Raises:
          ServiceError: there is no such model, or the node is starting.
        """
        model = self._cluster.state.find_model(request.name)
        if model is None:
            raise ServiceError(404, "MODEL_NOT_FOUND", f"model {request.name!r} not found")
        if request.destination in self._here:
            return self._here[request.destination]
        if self._nursery is None:
            raise ServiceError(503, "STARTING", "this node is starting; try again", {})
        scope = trio.CancelScope()
        transfer_id = self._table.begin(
            model.name, "upload", bytes_total=model.size, digest=model.digest, cancel=scope.cancel
        )
        self._here[request.destination] = transfer_id
        self._nursery.start_soon(self._push, model, request.destination, transfer_id, scope)
        return transfer_id

    async def _push(
        self, model: Model, destination: str, transfer_id: str, scope: trio.CancelScope
    ) -> None:
        blobs = [(blob.digest, blob.size) for blob in describe(model.manifest).blobs]
        tell: Callable[[int], None] = lambda done: self._table.update(  # noqa: E731
            transfer_id, bytes_done=done, peer_id=destination, layers=tuple(blobs)
        )
        try:
            with scope:
                tell(0)
                async with self._store.pins.hold(*(digest for digest, _ in blobs)):
                    await self._source.push(destination, model.manifest, blobs, self._read, tell)
                self._table.complete(transfer_id)
                log.info("%s was pushed to %s", model.name, destination)
            if scope.cancelled_caught:
                self._table.cancelled(transfer_id)
        except (SourceError, StoreError) as error:
            log.warning("pushing %s failed: %s", model.name, error)
            self._table.fail(transfer_id, str(error))
        except Exception:  # as in `Pulls`
            log.exception("pushing %s failed by a bug", model.name)
            self._table.fail(transfer_id, "the push failed by a bug, which is in the node's log")
        finally:
            self._here.pop(destination, None)

    async def _read(self, digest: str, offset: int, length: int) -> bytes:
        path = await self._store.find_blob(digest)

        def read() -> bytes:
            with open(path, "rb") as file:
                return read_exactly(file.fileno(), length, offset)

        try:
            return await self._store.in_thread(read)
        except FileNotFoundError:
            raise BlobMissing(f"blob {digest} is not in the store") from None
        except OSError as error:
            raise StoreError(f"{digest} cannot be read: {error}") from error

    async def _on_start(self, peer: NodeId, request: PushRequest) -> str:
        try:
            return self.start(request)
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None
