"""Makes the models of a directory that somebody else fills, an Ollama's, models of the cluster.

Each manifest there is published once; if it changes, again. So what was deleted from the cluster
does not come back by itself, though its files may still lie there. A copy that was moved away, and
whose files are still there, counts again when nobody else has the model any more.
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from ollamad.api.services import ServiceError
from ollamad.cluster import Cluster
from ollamad.core.commands import SetDesired
from ollamad.core.ids import NodeId
from ollamad.core.names import parse_name
from ollamad.core.state import Model
from ollamad.notes import Note
from ollamad.store.errors import StoreError
from ollamad.store.gguf import GgufError
from ollamad.store.manifests import StoredManifest, manifest_digest
from ollamad.store.models import ModelStore

log = logging.getLogger(__name__)

RESCAN_S = 60.0  # how soon a model that an Ollama has pulled is seen


class Adoption:
    """Publishes found models; `publish` and `holds` are `Share`'s."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: ModelStore,
        publish: Callable[[Model, tuple[NodeId, ...]], Awaitable[None]],
        holds: Callable[[str], bool],
        path: Path,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._publish = publish
        self._holds = holds
        self._note = Note(path, dict[str, str], {})
        self._seen: dict[str, str] = {}  # by name key: which manifest, written when
        self._missed: set[str] = set()  # name keys of what nobody had at the last look

    async def run(self) -> None:
        """Until cancelled."""
        self._seen = self._note.read()
        while True:
            await self.scan()
            await trio.sleep(RESCAN_S)

    async def scan(self) -> None:
        """Look at the directory once."""
        self._note.catch_up()
        try:
            shelved = bool(self._store.shelves)
            found = await (
                self._store.shelved_manifests() if shelved else self._store.list_manifests()
            )
        except (StoreError, OSError) as error:
            log.warning("models that are there already cannot be listed: %s", error)
            return
        missed, self._missed = self._missed, set()
        for stored in found:
            key = parse_name(stored.name).key
            mark = f"{manifest_digest(stored.data)} {stored.modified_at}"
            if self._is_missed(stored):
                self._missed.add(key)
            is_known = self._seen.get(key) == mark or (not shelved and self._holds(key))
            # At two looks: who has it may only be starting anew.
            if is_known and key not in missed & self._missed:
                continue
            try:
                await self._adopt(stored)
            except ServiceError as error:
                log.info("%s is not adopted yet: %s", stored.name, error)
                continue  # no quorum; the next scan tries again
            except (StoreError, GgufError, OSError) as error:
                log.warning("%s is there, but cannot be used: %s", stored.name, error)
            self._seen[key] = mark
            self._note.write(self._seen)

    def _is_missed(self, stored: StoredManifest) -> bool:
        """Whether it is a model of the cluster, moved away, and nobody who has it is there."""
        model = self._cluster.state.find_model(stored.name)
        return (
            model is not None
            and model.digest == manifest_digest(stored.data)
            and self._cluster.node_id not in (*model.desired, *model.confirmed)
            and not any(self._cluster.is_online(node_id) for node_id in model.confirmed)
        )

    async def _adopt(self, stored: StoredManifest) -> None:
        me = self._cluster.node_id
        known = self._cluster.state.find_model(stored.name)
        if known is None:
            model = await self._store.model_of(stored.name, stored.data)
            # It stays here, since its files do; the cluster makes as many copies as of others.
            model = msgspec.structs.replace(model, pinned=(me,), modified_at=stored.modified_at)
            await self._publish(model, (me,))
            log.info("%s was there already and is a model of the cluster now", stored.name)
        elif known.digest != manifest_digest(stored.data):
            log.warning(
                "%s is there, but the cluster has another model of that name; copy one of them "
                "to another name to have both",
                stored.name,
            )
        elif me not in known.confirmed:
            await self._store.model_of(stored.name, stored.data)  # whole, and what it says
            await self._cluster.require(SetDesired(known.name, tuple(sorted({me, *known.desired}))))
