"""Pulls from origins: one node of the cluster does each, and this module finds the one.

Whoever is asked for a pull has the leader choose, so that a model that many ask for at once
still crosses the internet once. What other nodes hold comes from them. A node that does not get
through to the origin, may not, or has no room, hands the pull on; its transfer then shows what the
next one does. Not without end: who are refused are few. Pulls outlive a restart: what was under way
when the daemon ended goes on when it starts again, unless somebody has done it or dealt with that
name meanwhile.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from ollamad.api.services import NoQuorum, ServiceError, Unavailable
from ollamad.background import Background
from ollamad.bringing import Bringer, Step
from ollamad.cluster import Cluster
from ollamad.core.ids import NodeId, short
from ollamad.core.names import parse_name
from ollamad.core.pulling import UNREACHABLE_S, Candidate, rank
from ollamad.core.state import Model
from ollamad.core.transfers import Transfer
from ollamad.nearby import Nearby
from ollamad.notes import Note
from ollamad.peers.link import HandlerError, RemoteFailure
from ollamad.peers.tls import PeerUnreachable
from ollamad.sources.base import NotFromHere, OriginUnreachable, Source, SourceError
from ollamad.sources.pypi import SCHEME as PYPI
from ollamad.sources.references import FILE_SCHEME, Wanted, resolve_source
from ollamad.store.errors import StoreError, StoreFull
from ollamad.store.gguf import GgufError
from ollamad.store.manifests import Descriptor
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.transfers import TransferTable

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 5.0  # for the beginning of a pull elsewhere; the origin is asked after that
BARRIER_S = 3.0  # for a majority to confirm what is known of a name; within PEER_TIMEOUT_S
AGREE_AGAIN_S = 2.0  # while the cluster cannot agree on what has come, or on what goes on
# What the origin or a node's own rules refuse, mostly all are refused: a name that does not exist
# looks like a private one. A few tries find a login that most nodes have; else one names its node.
MAX_REFUSED = 3
# Each of them shows what the next one does, and a failure climbs back through them all.
MAX_TRIED = 16
MIRROR_INTERVAL_S = 0.5  # how often a handed-on pull is looked at
LOST_AFTER_S = 15.0  # a node that has it and does not answer for so long is lost
UNKNOWN, OVERTAKEN, DIFFERS = "UNKNOWN_SOURCE", "PULL_OVERTAKEN", "PULL_DIFFERS"
# Why a pull does not go on after a restart, ever; and as what a client sees it.
NOT_TO_BE = {UNKNOWN: 404, OVERTAKEN: 409, DIFFERS: 409}

T = TypeVar("T")


class PullRequest(msgspec.Struct, frozen=True):
    """Asks for a model to be brought in."""

    name: str
    source: str | None
    replicas: int  # 0: the cluster's default
    nodes: tuple[NodeId, ...]  # where it should be in any case
    asked: NodeId = NodeId("")  # the node that the user asked
    tried: tuple[NodeId, ...] = ()  # nodes that could not
    refused: int = 0  # how many of them were not let in, or may not ask there by their own rules
    cut_off: bool = False  # whether the last of them did not get through to the origin
    size: int = 0  # bytes, once somebody knows
    # What the node that has begun it notes, to find out after a restart whether it is wanted still.
    begun_by: NodeId = NodeId("")
    begun_at: float = 0.0  # Unix seconds
    known: str = ""  # digest of the model that had the name then

    @property
    def key(self) -> str:
        return parse_name(self.name).key

    @property
    def family(self) -> str:
        """The name without its tag: tags of one model often have the same weights."""
        return _family(self.key)

    @property
    def is_handed_on(self) -> bool:
        """Whether it comes from a node that could not; else from a user, or after a restart."""
        return bool(self.tried) and self.begun_by in ("", *self.tried)

    @property
    def wanted(self) -> Wanted:
        """Raises ServiceError (404) for what is no source."""
        text = self.source or self.name
        try:
            return resolve_source(text)
        except SourceError as error:
            raise ServiceError(404, UNKNOWN, str(error), {"source": text}) from None


class Begun(msgspec.Struct, frozen=True):
    """A pull that runs."""

    node_id: NodeId
    transfer_id: str


# Makes a model that is here known to the cluster: with the nodes and copies that were asked for.
Publish = Callable[[Model, Sequence[NodeId], int], Awaitable[None]]
# Tells nodes that will get a model to begin with its large files, and which they are.
Announce = Callable[[PullRequest, Sequence[Descriptor]], Sequence[NodeId]]
# Tells them that nothing more comes from here.
Withdraw = Callable[[str, Sequence[NodeId]], None]
# Ends what this node fetches of that name (by key) from another node's pull.
Leave = Callable[[str], Awaitable[None]]


class Pulls(Background):
    """The cluster's pulls, from this node's point of view.

    Args:
      transfers: the active and recent ones of all nodes; `transfer`: one of them, by its id.
      pulls_path: remembers the pulls of this node that are not over.
      objection: why a model that is here could not be run here; empty if nothing is known.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        store: ModelStore,
        fetcher: Fetcher,
        source: Source,
        table: TransferTable,
        publish: Publish,
        announce: Announce,
        withdraw: Withdraw,
        leave: Leave,
        transfers: Callable[[], Awaitable[Sequence[Transfer]]],
        transfer: Callable[[str], Awaitable[Transfer | None]],
        cancel: Callable[[str], Awaitable[None]],
        pulls_path: Path,
        objection: Callable[[Model], Awaitable[str]] | None = None,
    ) -> None:
        super().__init__()
        self._cluster = cluster
        self._store = store
        self._bringer = Bringer(store, source, Nearby(cluster, fetcher).fetch)
        self._table = table
        self._publish = publish
        self._announce = announce
        self._withdraw = withdraw
        self._leave = leave
        self._transfers = transfers
        self._transfer = transfer
        self._cancel = cancel
        self._objection = objection
        self._note = Note(pulls_path, list[PullRequest], [])
        self._here: dict[str, tuple[str, PullRequest]] = {}  # key -> transfer id, request
        self._left: dict[str, PullRequest] = {}  # by key; of the last run, and not yet here again
        self._choosing: dict[str, trio.Lock] = {}  # by family
        self._unreachable: dict[tuple[NodeId, str], float] = {}  # node and origin -> when
        cluster.mesh.answer("pulls.begin", PullRequest, self._on_begin)
        cluster.mesh.answer("library.pull", PullRequest, self._on_pull)

    def _resume(self) -> None:
        assert self._nursery is not None, "called by run()"
        self._left = {request.key: request for request in self._note.read()}
        for request in self._left.values():
            self._nursery.start_soon(self._go_on, request)

    async def _go_on(self, request: PullRequest) -> None:
        """Have a pull of the last run go on, here or where it runs by now, if it is wanted."""
        told = ""
        while True:
            try:
                # Who has just started has heard of nobody, and would believe that nobody pulls.
                await self._cluster.read_barrier(BARRIER_S)
                begun = await self.begin(request)
                log.info("the pull of %s goes on at %s", request.name, short(begun.node_id))
                break
            except ServiceError as error:
                if str(error) != told:  # not again with each try
                    told = str(error)
                    log.info("the pull of %s does not go on: %s", request.name, told)
                if error.code in NOT_TO_BE:
                    break
            await trio.sleep(AGREE_AGAIN_S)
        del self._left[request.key]
        self._remember()

    async def begin(self, request: PullRequest) -> Begun:
        """Have a pull run, here or elsewhere; returns at once, with the one that runs already.

        Raises:
          ServiceError: 404 for a source that is not understood, 503 if no node can, 409 where
            that name is being pulled otherwise, and for one that was begun before a restart and
            overtaken by what others did.
        """
        _ = request.wanted  # what is wrong with it is told here
        leader = self._cluster.leader()
        if leader is not None and leader != self._cluster.node_id:
            with suppress(PeerUnreachable, trio.TooSlowError):
                return await self._call(leader, "pulls.begin", request, Begun)
        return await self._choose(request)

    async def has_news(self, model: Model) -> bool:
        """Whether a model that is here is another one at its origin by now.

        Raises:
          ServiceError: 404 for what is no source, 502 where this node cannot tell.
        """
        wanted = PullRequest(model.name, None, 0, ()).wanted
        try:
            return await self._bringer.has_news(wanted, model)
        except SourceError as error:
            raise ServiceError(502, "ORIGIN_UNREACHABLE", str(error)) from None

    # At the node that chooses.

    async def _choose(self, request: PullRequest) -> Begun:
        lock = self._choosing.setdefault(request.family, trio.Lock())
        try:
            async with lock:
                pulls = [pull for pull in await self._transfers() if pull.type == "download"]
                if not request.is_handed_on:
                    same = [pull for pull in pulls if _key(pull) == request.key]
                    for pull in _running(same):
                        return await self._join(request, pull)
                    if request.begun_by:
                        await self._check_wanted(request, same)
                return await self._choose_alone(request, _running(pulls))
        finally:
            if not lock.locked():
                self._choosing.pop(request.family, None)

    async def _join(self, request: PullRequest, pull: Transfer) -> Begun:
        """Take a pull that runs for what was asked for.

        Raises:
          ServiceError: 409 if it is not.
        """
        if request.begun_by or not (request.nodes or request.replicas or request.source):
            return Begun(pull.node_id, pull.id)  # whatever comes will do
        with suppress(PeerUnreachable, trio.TooSlowError):
            return await self._begin_at(pull.node_id, request)
        return Begun(pull.node_id, pull.id)

    async def _check_wanted(self, request: PullRequest, pulls: Sequence[Transfer]) -> None:
        """Whether a pull that was begun before a restart is wanted still.

        The state forgets names that were deleted, so the transfers count as well.

        Raises:
          ServiceError: 409 if its model was pulled, made or deleted meanwhile; 503 if nobody can
            tell now.
        """
        await self._cluster.read_barrier(BARRIER_S)
        came = any(
            pull.status == "completed" and (pull.finished_at or 0.0) > request.begun_at
            for pull in pulls
        )
        if came or self._digest_of(request.name) != request.known:
            raise ServiceError(
                409, OVERTAKEN, f"{request.name} was pulled, made or deleted meanwhile"
            )

    def _digest_of(self, name: str) -> str:
        """The digest of the model that has a name now; "" for none."""
        model = self._cluster.state.find_model(name)
        return "" if model is None else model.digest

    async def _choose_alone(self, request: PullRequest, running: Sequence[Transfer]) -> Begun:
        origin = _origin(request.wanted)
        if request.is_handed_on and request.cut_off:
            now = trio.current_time()
            late = [key for key, at in self._unreachable.items() if now - at >= UNREACHABLE_S]
            for key in late:
                del self._unreachable[key]
            self._unreachable[request.tried[-1], origin] = now
        failed: list[NodeId] = []
        while True:
            nodes = self._rank(request, origin, {*request.tried, *failed}, running)
            if not nodes:
                raise ServiceError(
                    503,
                    "NO_NODE",
                    "no node is left that is online, does not drain, and could pull this model; "
                    "see ollama-dist nodes list, and pull again",
                )
            try:
                return await self._begin_at(nodes[0], request)
            except (PeerUnreachable, trio.TooSlowError):
                failed.append(nodes[0])

    async def _begin_at(self, node_id: NodeId, request: PullRequest) -> Begun:
        """Have that node pull. Raises PeerUnreachable, TooSlowError."""
        if node_id == self._cluster.node_id:
            return Begun(node_id, self._start(request))
        return Begun(node_id, await self._call(node_id, "library.pull", request, str))

    def _rank(
        self,
        request: PullRequest,
        origin: str,
        tried: Collection[NodeId],
        running: Iterable[Transfer],
    ) -> list[NodeId]:
        """The nodes that may pull, best first."""
        candidates = self._candidates(request, origin, running)
        model = self._cluster.state.find_model(request.name)
        # Until somebody knows, the next version is taken to be as large as this one.
        size = request.size or (0 if model is None else model.size)
        # Who has begun has a part of it. Those who should have it come next; where they cannot get
        # it, others can, and pass it on.
        begun = [(request.begun_by,)] if request.begun_by else []
        wished: list[tuple[NodeId, ...]] = [*begun, request.nodes, ()]
        if request.wanted.reference.startswith(FILE_SCHEME) and request.asked:
            # What others have at that place is another file, or none.
            wished = [*begun, request.nodes or (request.asked,)]
        for asked in wished:
            nodes = rank(candidates, size=size, asked=asked, tried=tried, here=request.asked)
            if nodes:
                return nodes
        return []

    def _candidates(
        self, request: PullRequest, origin: str, running: Iterable[Transfer]
    ) -> list[Candidate]:
        now = trio.current_time()
        model = self._cluster.state.find_model(request.name)
        holders = () if model is None else model.confirmed
        near = {pull.node_id for pull in running if _family(_key(pull)) == request.family}
        found = []
        for member in self._cluster.state.members.values():
            presence = self._cluster.presence(member.id)
            since = self._unreachable.get((member.id, origin))
            # Who has just started and asks for its pull is there, though it was not heard of yet.
            is_there = member.id == request.begun_by or self._cluster.is_online(member.id)
            found.append(
                Candidate(
                    member.id,
                    is_there and not member.draining,
                    presence.beat.usage.disk_free,
                    presence.beat.usage.cpu,
                    presence.beat.active_requests,
                    None if since is None else now - since,
                    member.id in holders,
                    member.id in near,
                )
            )
        return found

    async def _call(self, node_id: NodeId, method: str, request: PullRequest, kind: type[T]) -> T:
        try:
            with trio.fail_after(PEER_TIMEOUT_S):
                return await self._cluster.mesh.call(node_id, method, request, kind)
        except RemoteFailure as error:
            raise ServiceError(NOT_TO_BE.get(error.code, 503), error.code, error.message) from None

    # At the node that pulls.

    def _start(self, request: PullRequest) -> str:
        if request.key in self._here:
            transfer_id, running = self._here[request.key]
            if not request.begun_by:
                _check_covered(request, running)
            return transfer_id
        if self._nursery is None:
            raise ServiceError(503, "STARTING", "this node is starting; try again", {})
        wanted = request.wanted
        request = msgspec.structs.replace(
            request,
            begun_by=self._cluster.node_id,
            begun_at=time.time(),
            known=self._digest_of(request.name),
        )
        scope = trio.CancelScope()
        transfer_id = self._table.begin(request.name, "download", cancel=scope.cancel)
        self._here[request.key] = transfer_id, request
        self._remember()
        self._nursery.start_soon(self._pull, request, wanted, transfer_id, scope)
        return transfer_id

    async def _pull(
        self, request: PullRequest, wanted: Wanted, transfer_id: str, scope: trio.CancelScope
    ) -> None:
        total, warning = request.size, ""

        def report(step: Step) -> None:
            nonlocal total
            total = step.total or total
            self._table.update(
                transfer_id,
                bytes_done=step.done,
                bytes_total=step.total,
                received=step.received,
                digest=step.digest,
                layers=step.layers,
            )

        try:
            with scope:
                self._table.update(transfer_id, bytes_done=0, peer_id=_shown(wanted.reference))
                try:
                    warning = await self._bring(request, wanted, report)
                except (NotFromHere, StoreFull) as error:
                    request = msgspec.structs.replace(request, size=total)
                    warning = await self._hand_on(request, transfer_id, error)
                self._table.complete(transfer_id, warning)
                log.info("%s is in the cluster, from %s", request.name, _shown(wanted.reference))
            if scope.cancelled_caught:
                self._table.cancelled(transfer_id)
        except (SourceError, ServiceError, StoreError, GgufError, OSError) as error:
            log.warning("pulling %s failed: %s", request.name, error)
            self._table.fail(transfer_id, str(error))
        except Exception:  # what an origin makes us stumble over must not end the daemon
            log.exception("pulling %s failed by a bug", request.name)
            self._table.fail(transfer_id, "the pull failed by a bug, which is in the node's log")
        if self._nursery is not None:  # when the daemon ends, it is to go on later
            self._here.pop(request.key, None)
            self._remember()

    async def _bring(
        self, request: PullRequest, wanted: Wanted, report: Callable[[Step], None]
    ) -> str:
        """Have the model here and in the cluster; returns what speaks against its use."""
        await self._leave(request.key)  # whoever pulled it before is lost, or handed it on
        told: list[NodeId] = []
        async with self._store.pins.hold() as hold:
            try:
                model = await self._bringer.bring(
                    wanted,
                    request.name,
                    hold,
                    report,
                    lambda files: told.extend(self._announce(request, files)),
                )
                warning = "" if self._objection is None else await self._objection(model)
                if warning:
                    log.warning(
                        "%s came whole, but this node cannot run it: %s", model.name, warning
                    )
                await self._publish_at_last(model, request)
                return warning
            except BaseException:
                self._withdraw(request.key, told)
                raise

    async def _publish_at_last(self, model: Model, request: PullRequest) -> None:
        """Make it known to the cluster, which may be without a leader just now."""
        while True:
            try:
                await self._publish(model, request.nodes, request.replicas)
                return
            except (NoQuorum, Unavailable) as error:
                log.warning("%s came whole, and is still to be told: %s", request.name, error)
            await trio.sleep(AGREE_AGAIN_S)

    async def _hand_on(
        self, request: PullRequest, transfer_id: str, error: SourceError | StoreError
    ) -> str:
        """Have another node pull, and show its progress as this one's; returns its warning.

        Raises:
          SourceError, StoreError: nobody else is left, enough have tried, or whoever it was has
            failed.
        """
        is_cut_off = isinstance(error, OriginUnreachable)
        is_refused = isinstance(error, NotFromHere) and not is_cut_off
        request = msgspec.structs.replace(
            request,
            tried=(*request.tried, self._cluster.node_id),
            refused=request.refused + is_refused,
            cut_off=is_cut_off,
        )
        log.warning("%s cannot be pulled by this node: %s", request.name, error)
        if request.refused >= MAX_REFUSED or len(request.tried) >= MAX_TRIED:
            raise error
        lost: list[NodeId] = []
        while True:
            try:
                begun = await self.begin(request)
            except ServiceError as other:
                if other.code != "NO_NODE":
                    raise
                if not lost:
                    raise error from None
                raise _lost(error, lost[-1]) from None
            log.info("node %s pulls %s instead", short(begun.node_id), request.name)
            transfer = await self._mirror(begun, transfer_id)
            if transfer is None:
                if begun.node_id in lost:  # and was back meanwhile: once is enough
                    raise _lost(error, begun.node_id)
                lost.append(begun.node_id)
                # If it is back, it leaves its pull to this one, and has a part of it.
                request = msgspec.structs.replace(request, asked=begun.node_id)
            elif transfer.status == "completed":
                return transfer.warning
            else:
                why = transfer.error or "it was cancelled there"
                if why == str(error):  # for everybody, so nobody needs to be named
                    raise error
                raise SourceError(f"{error}; node {short(begun.node_id)}: {why}")

    async def _mirror(self, begun: Begun, transfer_id: str) -> Transfer | None:
        """Show another node's pull as this one's until it has ended; None if its node is lost."""
        heard = trio.current_time()
        try:
            while True:
                transfer = await self._transfer(begun.transfer_id)
                now = trio.current_time()
                if transfer is None:
                    if now - heard > LOST_AFTER_S:
                        return None
                else:
                    heard = now
                    self._table.update(
                        transfer_id,
                        bytes_done=transfer.bytes_done,
                        bytes_total=transfer.bytes_total,
                        digest=transfer.digest,
                        layers=transfer.layers,
                    )
                    if transfer.finished_at is not None:
                        return transfer
                await trio.sleep(MIRROR_INTERVAL_S)
        except trio.Cancelled:
            with trio.move_on_after(PEER_TIMEOUT_S, shield=True), suppress(ServiceError):
                await self._cancel(begun.transfer_id)
            raise

    def _remember(self) -> None:
        here = {key: request for key, (_, request) in self._here.items()}
        self._note.write(list((self._left | here).values()))

    # What other nodes ask.

    async def _on_begin(self, peer: NodeId, request: PullRequest) -> Begun:
        try:
            return await self._choose(request)
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None

    async def _on_pull(self, peer: NodeId, request: PullRequest) -> str:
        try:
            return self._start(request)
        except ServiceError as error:
            raise HandlerError(error.code, error.message) from None


def _family(key: str) -> str:
    return key.rpartition(":")[0]


def _key(pull: Transfer) -> str:
    return parse_name(pull.model_name).key


def _running(pulls: Iterable[Transfer]) -> list[Transfer]:
    return [pull for pull in pulls if pull.status in ("pending", "active")]


def _check_covered(request: PullRequest, running: PullRequest) -> None:
    """Whether a pull that runs does what is asked for now as well.

    Raises:
      ServiceError: 409 if it does not: what it would leave out is not to be lost in silence.
    """
    if request.source is not None and request.wanted.reference != running.wanted.reference:
        other = f"from {_shown(running.wanted.reference)}"
    elif not set(request.nodes) <= set(running.nodes):
        other = "for other nodes"
    elif request.replicas > 0 and request.replicas != running.replicas:
        other = "with another number of copies"
    else:
        return
    raise ServiceError(
        409,
        DIFFERS,
        f"{request.name} is being pulled already, {other}; ask again when it is here, or cancel "
        "that pull first (ollama-dist transfers list shows it)",
    )


def _lost(error: SourceError | StoreError, node_id: NodeId) -> SourceError:
    return SourceError(
        f"{error}; node {short(node_id)}, which pulled it instead, is lost. Pull again: what has "
        "come is kept"
    )


def _origin(wanted: Wanted) -> str:
    """What of a reference says how to get there: the host, or the scheme."""
    if wanted.reference.startswith(PYPI):
        return PYPI
    return wanted.reference.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _shown(reference: str) -> str:
    """A reference without what is nobody's business: passwords, signatures."""
    plain, _, rest = reference.partition("?")
    scheme, separator, address = plain.partition("://")
    if separator and "@" in address.partition("/")[0]:
        return f"{scheme}://{address.partition('@')[2]}"
    return plain if rest else reference
