"""Fetching a model from the node that is still getting it from its origin.

The node that pulls chooses who will have copies, as it will once the model is published, and
tells them. They fetch the large files from it and from each other as the pieces come, so that the
model is everywhere about when it is whole. Nothing has to be taken back if it never is: what came
is a partial blob like any other. When the model is published, the ordinary fetch takes over, with
a map that the cluster agreed on, which keeps what agrees with it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import trio

from ollamad.background import Background
from ollamad.cluster import Cluster
from ollamad.core.ids import NodeId
from ollamad.core.pieces import piece_size_for
from ollamad.core.state import Layer
from ollamad.peers.link import RemoteFailure
from ollamad.peers.tls import PeerUnreachable
from ollamad.store.errors import StoreError
from ollamad.store.manifests import Descriptor
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher, FetchFailed, FetchProgress
from ollamad.transfer.transfers import TransferTable

log = logging.getLogger(__name__)

TELL_TIMEOUT_S = 2.0
# Without a byte: an origin that is slow or away for a while; then the node is no use to wait for.
PATIENCE_S = 300.0
LINGER_S = 120.0  # after all files are here, for the model to be published


class FollowRequest(msgspec.Struct, frozen=True):
    """Asks a node to fetch files that the asking node is getting from an origin."""

    name: str
    key: str
    files: tuple[tuple[str, int], ...]  # digests and sizes
    fellows: tuple[NodeId, ...]  # who else is asked


@dataclass(slots=True, eq=False)
class _Follow:
    origin: NodeId
    transfer_id: str
    scope: trio.CancelScope
    ended: trio.Event = field(default_factory=trio.Event)
    taken_over: bool = False


class Following(Background):
    """What this node fetches of models that are not published yet."""

    def __init__(
        self, *, cluster: Cluster, store: ModelStore, fetcher: Fetcher, table: TransferTable
    ) -> None:
        super().__init__()
        self._cluster = cluster
        self._store = store
        self._fetcher = fetcher
        self._table = table
        self._follows: dict[str, _Follow] = {}  # by name key
        cluster.mesh.answer("follow.begin", FollowRequest, self._on_begin)
        cluster.mesh.answer("follow.end", str, self._on_end)

    # At the node that pulls.

    def tell(
        self, name: str, key: str, files: Sequence[Descriptor], nodes: Sequence[NodeId]
    ) -> None:
        """Have those nodes follow this one; returns at once."""
        if self._nursery is None or not files:
            return
        listed = tuple((file.digest, file.size) for file in files)
        request = FollowRequest(name, key, listed, tuple(nodes))
        for node_id in nodes:
            self._nursery.start_soon(self._ask, node_id, "follow.begin", request)

    def untell(self, key: str, nodes: Sequence[NodeId]) -> None:
        """It is given up here; returns at once."""
        for node_id in nodes if self._nursery is not None else ():
            assert self._nursery is not None
            self._nursery.start_soon(self._ask, node_id, "follow.end", key)

    async def _ask(self, node_id: NodeId, method: str, request: object) -> None:
        # Whoever does not hear of it fetches the model when it is published.
        with (
            trio.move_on_after(TELL_TIMEOUT_S),
            suppress(PeerUnreachable, RemoteFailure),
        ):
            await self._cluster.mesh.call(node_id, method, request, bool)

    # At the nodes that follow.

    async def take_over(self, key: str) -> None:
        """The model is published: end the follow of it, so that its blobs are free to fetch."""
        if (follow := self._follows.get(key)) is not None:
            follow.taken_over = True
        await self.leave(key)

    async def leave(self, key: str) -> None:
        """Follow the pull of that name no more, so that what came is free to be gone on with."""
        while (follow := self._follows.get(key)) is not None:
            follow.scope.cancel()
            await follow.ended.wait()

    async def _on_begin(self, peer: NodeId, request: FollowRequest) -> bool:
        # Who says so last is the one that pulls: whoever did before is lost or has given up.
        await self.leave(request.key)
        if self._nursery is None:
            return False
        scope = trio.CancelScope()
        transfer_id = self._table.begin(
            request.name,
            "replication",
            bytes_total=sum(size for _, size in request.files),
            cancel=scope.cancel,
        )
        follow = self._follows[request.key] = _Follow(peer, transfer_id, scope)
        self._nursery.start_soon(self._follow, request, follow)
        return True

    async def _on_end(self, peer: NodeId, key: str) -> bool:
        follow = self._follows.get(key)
        if follow is None or follow.origin != peer:
            return False
        follow.scope.cancel()
        return True

    async def _follow(self, request: FollowRequest, follow: _Follow) -> None:
        try:
            with follow.scope:
                async with self._store.pins.hold(*(digest for digest, _ in request.files)):
                    await self._fetch(request, follow)
                    await trio.sleep(LINGER_S)
                self._table.fail(follow.transfer_id, "the model was never published")
            if follow.taken_over:
                self._table.complete(follow.transfer_id)
            elif follow.scope.cancelled_caught:
                self._table.cancelled(follow.transfer_id)
        except (FetchFailed, StoreError, OSError) as error:
            log.info("following %s: %s", request.name, error)
            self._table.fail(follow.transfer_id, str(error))
        except Exception as error:  # whatever it is, it ends this fetch and not the daemon
            log.exception("following %s failed in an unforeseen way", request.name)
            self._table.fail(follow.transfer_id, f"unforeseen: {error}")
        finally:
            del self._follows[request.key]
            follow.ended.set()

    async def _fetch(self, request: FollowRequest, follow: _Follow) -> None:
        me = self._cluster.node_id
        fellows = [n for n in request.fellows if n != me]

        def holders() -> list[NodeId]:
            return [n for n in (follow.origin, *fellows) if self._cluster.is_online(n)]

        sizes = dict(request.files)
        with self._store.space.reserve(await self._store.missing_bytes(sizes)):
            done = 0
            for digest, size in request.files:
                layer = Layer("", digest, size, piece_size_for(size), "")
                await self._fetcher.fetch_blob(
                    layer,
                    holders,
                    self._progress(follow.transfer_id, done),
                    authority=follow.origin,
                    give_up_after_s=PATIENCE_S,
                )
                done += size

    def _progress(self, transfer_id: str, before: int) -> Callable[[FetchProgress], None]:
        def progress(step: FetchProgress) -> None:
            self._table.update(
                transfer_id,
                bytes_done=before + step.verified,
                received=before + step.received,
                peer_id=step.holder,
            )

        return progress
