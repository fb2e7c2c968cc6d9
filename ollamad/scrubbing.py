"""Reads this node's blobs now and then, and has rotten ones replaced from peers.

What is found rotten is put aside, and the node says that it does not hold the model any more; so
it is fetched again like any copy that is wanted here and missing, from those who hold it, and of
it only the pieces that went bad. If nobody else holds it, pulling it again does the same.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from ollamad.cluster import Cluster
from ollamad.core.state import Layer
from ollamad.notes import Note
from ollamad.store.errors import BlobMissing, StoreError
from ollamad.store.models import ModelStore
from ollamad.store.scrub import Scrubber, discard_rotten

log = logging.getLogger(__name__)

ROUND_S = 60.0  # how often to look whether a blob is due
# Rounds in a row after which what cannot be read counts as rotten: an hour, in which a controller
# or a cable recovers if it ever does. Bad sectors do not, and a peer may have good copies of them.
MAX_UNREADABLE = 60
KEEP_ROTTEN_S = 7 * 86400.0  # what was put aside can be looked at for so long


class Scrubbing:
    """Runs the scrub of one node.

    Args:
      interval_s: each blob is read once in so many seconds; 0: none is.
      lost: told of a blob's digest that is not here any more; see `Share.lost`.
      path: remembers when each blob was read last.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: ModelStore,
        scrubber: Scrubber,
        interval_s: float,
        lost: Callable[[str], Awaitable[None]],
        path: Path,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._scrubber = scrubber
        self._interval_s = interval_s
        self._lost = lost
        self._note = Note(path, dict[str, float], {})
        self._wall = wall
        self._read_at: dict[str, float] = {}
        self._unreadable: Counter[str] = Counter()  # rounds in a row

    async def run(self) -> None:
        """Until cancelled."""
        self._read_at = self._note.read()
        while self._interval_s > 0:
            await self.round()
            await trio.sleep(ROUND_S)

    async def round(self) -> None:
        """Read what is due, the blob that was read longest ago first."""
        layers = self._layers()
        self._read_at = {d: at for d, at in self._read_at.items() if d in layers}
        now = self._wall()
        for digest in layers:  # new ones were hashed as they came
            self._read_at.setdefault(digest, now)
        for digest in sorted(layers, key=lambda digest: self._read_at[digest]):
            if self._wall() - self._read_at[digest] < self._interval_s:
                break
            if digest in self._layers():
                await self._check(layers[digest])
        self._note.write(self._read_at)
        clearing = functools.partial(discard_rotten, self._store, KEEP_ROTTEN_S, self._wall())
        try:
            await self._store.in_thread(clearing)
        except OSError as error:
            log.error("what was put aside cannot be removed: %s", error)

    async def _check(self, layer: Layer) -> None:
        digest = layer.digest
        try:
            # A disk or a controller may fail for a moment, and the copy may be the last one.
            forgive = self._unreadable[digest] < MAX_UNREADABLE
            rot = await self._scrubber.check(digest, layer.pieces_root, forgive_unreadable=forgive)
            self._read_at[digest] = self._wall()
            del self._unreadable[digest]
            if rot is None:
                return
            async with self._store.pins.hold(digest):
                await self._scrubber.quarantine(digest, rot)
                log.error(
                    "%s is rotten on this disk: %d of %d bytes are to come again, from another "
                    "node, or, if none has it, by pulling the model once more",
                    digest,
                    rot.bad_bytes,
                    rot.size,
                )
                await self._lost(digest)
        except BlobMissing:
            await self._lost(digest)
        except (StoreError, OSError) as error:
            self._unreadable[digest] += 1
            log.error("reading %s: %s; it is read again in the next round", digest, error)

    def _layers(self) -> dict[str, Layer]:
        """The blobs of models that this node says it holds."""
        me = self._cluster.node_id
        return {
            layer.digest: layer
            for model in self._cluster.state.models.values()
            if me in model.confirmed
            for layer in model.layers
        }
