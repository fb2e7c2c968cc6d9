"""Blobs that a pull names and that other nodes of the cluster hold: they come from there.

The next version of a tag often has the same weights with another template, and other tags of a
model share them; so most of what would come over the internet once more is on the LAN.
"""

from collections.abc import Callable

from ollamad.bringing import NearbyFailed
from ollamad.cluster import Cluster
from ollamad.core.ids import NodeId
from ollamad.core.state import Layer
from ollamad.store.errors import BeingReceived, StoreError
from ollamad.transfer.fetch import Fetcher, FetchFailed, FetchProgress

# Without a byte from any holder: it is worth some waiting, and there is an origin to be asked.
PATIENCE_S = 30.0


class Nearby:
    """Fetches blobs of models that the cluster has. Starts nothing."""

    def __init__(self, cluster: Cluster, fetcher: Fetcher) -> None:
        self._cluster = cluster
        self._fetcher = fetcher

    async def fetch(self, digest: str, size: int, progress: Callable[[int, int], None]) -> bool:
        """See `bringing.FetchNearby`."""
        layer = self._find(digest, size)
        if layer is None or not self._holders(layer):
            return False

        def tell(step: FetchProgress) -> None:
            progress(step.verified, step.received)

        try:
            await self._fetcher.fetch_blob(
                layer, lambda: self._holders(layer), tell, give_up_after_s=PATIENCE_S
            )
        except BeingReceived:  # by another pull, which is waited for as elsewhere
            return False
        except (FetchFailed, StoreError) as error:
            raise NearbyFailed(str(error)) from error
        return True

    def _find(self, digest: str, size: int) -> Layer | None:
        """The blob as a model has it that somebody holds."""
        for model in self._cluster.state.models.values():
            for layer in model.layers if model.confirmed else ():
                if (layer.digest, layer.size) == (digest, size):
                    return layer
        return None

    def _holders(self, wanted: Layer) -> list[NodeId]:
        """The other nodes that hold it, and are online."""
        holders = {
            node_id
            for model in self._cluster.state.models.values()
            if any(_is_same(layer, wanted) for layer in model.layers)
            for node_id in model.confirmed
        }
        holders.discard(self._cluster.node_id)
        return sorted(node_id for node_id in holders if self._cluster.is_online(node_id))


def _is_same(one: Layer, other: Layer) -> bool:
    """Whether it is the same blob, cut in the same way."""
    return (one.digest, one.pieces_root) == (other.digest, other.pieces_root)
