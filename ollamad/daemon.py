"""The daemon: builds every part, and runs them as one visible tree of tasks.

This is the one place that knows every package. `Daemon.run` starts the tasks line by line in
their order; shutting down goes the other way: new requests are refused first, the runners and
the consensus end last.
"""

import atexit
import datetime
import errno
import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

import ollamad
from ollamad import cgroups, logs, systemd
from ollamad.adapters import ApiHost, ApiInference, LocalEngine
from ollamad.admission import Admission, Invitation
from ollamad.api.app import build_app
from ollamad.api.auth import AuthSettings, hash_password, mint_local_token
from ollamad.api.calls import ApiSettings
from ollamad.api.http import ConnectionLimits
from ollamad.api.limits import RateLimits
from ollamad.api.origins import parse_origins
from ollamad.api.serve import (
    CannotListen,
    connections_allowed,
    open_listeners,
    open_ollama_listeners,
    serve_api,
)
from ollamad.api.services import Services
from ollamad.build import build_info, engine_versions, installed_engines, platform_name
from ollamad.cluster import Addresses, Cluster
from ollamad.core.commands import LEVEL
from ollamad.core.ids import NodeId, short
from ollamad.core.measures import DemandMeter
from ollamad.core.names import node_name_of
from ollamad.core.placement import Policy as PlacementPolicy
from ollamad.core.presence import Beat, Presence
from ollamad.core.routing import parse_policy
from ollamad.core.state import User
from ollamad.core.weights import LLAMA_SERVER
from ollamad.datadir import DataDir, ModelPlaces
from ollamad.engine.engine import Engine
from ollamad.engine.llama_server import Program, Unusable, inspect
from ollamad.engine.runner import PROMPT_CACHE_MIB
from ollamad.engine.spec import EngineSettings, usable_cores
from ollamad.errors import StartError
from ollamad.host import HostMonitor
from ollamad.library import Library
from ollamad.machine import Machine
from ollamad.peers.bulk import BulkPeers
from ollamad.peers.doorman import Doorman
from ollamad.peers.identity import (
    RENEWAL_CHECK_S,
    RENEWAL_RETRY_S,
    Identity,
    ca_end_in_sight,
    write_private,
)
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.raft.errors import RaftError
from ollamad.raft.links import Links
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.reconcile import Reconciler
from ollamad.scheduler.dispatch import Dispatcher
from ollamad.scheduler.exchange import EMBED, GENERATE, TRANSCRIPT
from ollamad.scrubbing import Scrubbing
from ollamad.settings import (
    Settings,
    SourceSettings,
    parse_duration,
    parse_listen,
    parse_rate,
)
from ollamad.sources.origins import Origins, OriginSettings
from ollamad.sources.policy import Policy, parse_hosts
from ollamad.store.errors import BlobMissing, PieceCorrupt, PieceMapMissing, PiecesRotten
from ollamad.store.models import ModelStore
from ollamad.store.scrub import Scrubber
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.lanes import BulkLanes
from ollamad.transfer.limits import Limit
from ollamad.transfer.server import PieceServer
from ollamad.transfer.transfers import TransferTable
from ollamad.usage import KeyUsage
from ollamad.wire.mux import Departed, farewell
from ollamad.wire.pieces import METHOD as PIECES

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 7.0  # for goodbyes; the rest of 10 is for runners and the journal
TRANSFER_TIMEOUT_S = 1.0
DEPARTURE_GRACE_S = 0.5  # the answer to `leave` is still on its way
DEPARTURE_NOTICE_S = 3.0  # a node that was taken out still hears so from the log
FIRST_STATE_TIMEOUT_S = 10.0
CATCH_UP_TIMEOUT_S = 3.0  # some elections' time; without a quorum old state must do
SAMPLE_INTERVAL_S = 1.0
GENERATION_CHECK_S = 0.1
HIDDEN_FROM_SERVICE = ("/home", "/root", "/run/user")  # by ProtectHome= of its unit
MAX_RUNTIME_DIR = 80  # bytes; sockets' names and their limit of 107 leave no more


class Daemon:
    """All parts of a node, built but not running; `run` runs them."""

    def __init__(
        self,
        settings: Settings,
        directory: DataDir,
        identity: Identity,
        *,
        api_sockets: list[socket.socket],
        p2p_listeners: list[trio.SocketListener],
        raft_listeners: list[trio.SocketListener],
        places: ModelPlaces,
        llama_server: Program | None = None,
    ) -> None:
        self._settings = settings
        self._engine_versions = engine_versions()
        if llama_server is not None:
            self._engine_versions[LLAMA_SERVER] = llama_server.version
        self._directory = directory
        self._identity = identity
        self._api_sockets = api_sockets
        self._p2p_listeners = p2p_listeners
        self._raft_listeners = raft_listeners
        self._stop = trio.Event()
        self._api_down = trio.Event()
        self._api_ended = trio.Event()
        self._started_at = time.time()
        self._leaving = False
        self._generating = False
        self._announced = False
        self.is_active = False  # whether systemd takes it for started; see `_become_active`
        self._change_limits: Callable[[RateLimits], None] | None = None  # once the API is there
        self._local_token_written = False
        self._local_token_refused = False  # by the disk; said once
        self.departed = False  # this node is no member any more; its cluster is to be forgotten

        models_dir, shelves = places.own, places.shelves
        for shelf in shelves:
            log.info("%s is only read; new models go to %s", shelf, models_dir)
        self._host = HostMonitor(models_dir)
        self._addresses = Addresses(
            api=_bound(settings.api.listen, api_sockets[0].getsockname()[1]),
            p2p=_bound(settings.p2p.listen, p2p_listeners[0].socket.getsockname()[1]),
            raft=_bound(settings.raft.listen, raft_listeners[0].socket.getsockname()[1]),
            advertise=settings.node.advertise,
        )
        self._name = settings.node.name or node_name_of(socket.gethostname())

        self._machine = Machine()
        self._gate = Gate(
            identity,
            self._is_welcome,
            on_newer=lambda *newer: self._cluster.on_recovered_elsewhere(*newer),
        )
        self._mesh = Mesh(self._gate, version=ollamad.__version__, address_of=self._p2p_address)
        self._links = Links(self._dial_raft)
        self._raft = RaftNode(
            identity.node_id,
            SqliteStore(directory.raft),
            self._machine,
            self._links.send,
        )
        self._store = ModelStore(models_dir, shelves=shelves)
        self._engine = Engine(
            EngineSettings(
                runtime_dir=_runtime_dir(directory),
                keep_alive_s=parse_duration(settings.engine.keep_alive),
                num_parallel=settings.engine.num_parallel,
                max_loaded_models=settings.engine.max_loaded_models,
                context_length=settings.engine.context_length,
                max_queue=settings.engine.max_queue,
                load_timeout_s=parse_duration(settings.engine.load_timeout),
                stall_timeout_s=parse_duration(settings.engine.stall_timeout),
                threads=settings.engine.threads or usable_cores(cgroups.cpu_quota()),
                gpu_layers=settings.engine.gpu_layers,
                cache_type=settings.engine.kv_cache_type,
                engines=installed_engines(),
                llama_server=settings.engine.llama_server,
                memory_record=directory.memory_record,
            ),
            lambda: self._host.sample().memory_available,
            self._host,
        )
        local_engine = LocalEngine(self._engine, self._store)
        capacity = self._host.capacity()
        self._admission = Admission(
            directory,
            identity,
            self._gate,
            name=self._name,
            addresses=self._addresses,
            capacity=capacity,
            on_waiting=self._become_active,
        )
        self._cluster = Cluster(
            identity=identity,
            name=self._name,
            addresses=self._addresses,
            capacity=capacity,
            gate=self._gate,
            mesh=self._mesh,
            raft=self._raft,
            machine=self._machine,
            own_beat=self._beat,
        )
        self._usage = KeyUsage(self._cluster, self._mesh)
        self._table = TransferTable(
            identity.node_id, secrets.token_hex(2), wall=time.time, steady=time.monotonic
        )
        self._demand = DemandMeter(*_spans(settings))
        self._reconciler = Reconciler(
            self._cluster,
            _placement(settings),
            drain_timeout_s=parse_duration(settings.drain.timeout),
        )
        self._cluster.hand_over = self._reconciler.hand_over
        limits = settings.transfer
        plain = not limits.encryption
        self._bulk = BulkPeers(self._gate, address_of=self._p2p_address)
        self._lanes = BulkLanes(
            self._bulk,
            upload=self._limit(limits.max_upload),
            download=self._limit(limits.max_download),
        )
        self._library = Library(
            cluster=self._cluster,
            store=self._store,
            fetcher=Fetcher(
                self._mesh,
                self._lanes,
                self._store,
                corrupt=PieceCorrupt,
                rotten=PiecesRotten,
                plain=plain,
            ),
            table=self._table,
            source=Origins(_origin_settings(settings.sources)),
            unload=self._unload,
            held_path=directory.replicas,
            brought_path=directory.brought,
            pulls_path=directory.pulls,
            view=self._reconciler.view,
            adopted_path=directory.adopted if settings.models.path else None,
            scrub=lambda lost: Scrubbing(
                cluster=self._cluster,
                store=self._store,
                scrubber=Scrubber(self._store, settings.models.scrub_rate * 1e6),
                interval_s=parse_duration(settings.models.scrub_interval),
                lost=lost,
                path=directory.scrubbed,
            ),
            engine_of=local_engine.choice,
            objection=local_engine.objection,
        )
        self._dispatcher = Dispatcher(
            identity.node_id,
            state=lambda: self._machine.state,
            presence=self._presence,
            engine=local_engine,
            peers=self._mesh,
            version=self._cluster.changes.next,
            probe=self._cluster.heartbeats.probe,
            failover=settings.scheduler.failover,
            policy=parse_policy(settings.scheduler.policy),
            prefix_bound_s=parse_duration(settings.scheduler.prefix_bound),
            slots=settings.engine.num_parallel,
            cache_bytes=PROMPT_CACHE_MIB << 20,
            max_waiting=settings.engine.max_queue,
            drain_timeout_s=parse_duration(settings.drain.timeout),
            demand=self._demand,
        )
        self._cluster.heartbeats.on_beat = self._dispatcher.hear
        self._mesh.handle(GENERATE, self._dispatcher.serve_generate)
        self._mesh.handle(TRANSCRIPT, self._dispatcher.serve_transcript)
        self._mesh.handle(EMBED, self._dispatcher.serve_embed)
        self._pieces = PieceServer(
            self._store,
            self._lanes,
            missing=BlobMissing,
            unmapped=PieceMapMissing,
            plain=plain,
        )
        self._mesh.handle(PIECES, self._pieces.handle)

    @classmethod
    async def build(cls, settings: Settings, directory: DataDir, identity: Identity) -> "Daemon":
        """Bind all ports and make all parts.

        Raises:
          CannotListen: a port is in use or an address is not ours.
          StartError: the models' directory or the llama-server that is to be used cannot be.
        """
        places = open_model_places(settings, directory)
        program = None
        if settings.engine.llama_server:
            try:
                program = await inspect(settings.engine.llama_server)
            except Unusable as error:
                raise StartError(f"engine.llama_server: {error}") from None
            log.info("models run in %s, version %s", program.path, program.version)
        host, port = parse_listen(settings.api.listen)
        api_sockets = await open_listeners([f"{_bracket(host)}:{port}"])
        api_sockets += await open_ollama_listeners(settings.api.ollama_listen)
        p2p = await _listen("p2p.listen", settings.p2p.listen)
        raft = await _listen("raft.listen", settings.raft.listen)
        return cls(
            settings,
            directory,
            identity,
            api_sockets=api_sockets,
            p2p_listeners=p2p,
            raft_listeners=raft,
            places=places,
            llama_server=program,
        )

    def stop(self) -> None:
        """Begin to shut down."""
        self._stop.set()

    def reconfigure(self, settings: Settings) -> None:
        """Take over what can change in a daemon that runs: see `reload`."""
        self._settings = settings
        logs.set_level(settings.log.level)
        self._reconciler.policy = _placement(settings)
        self._demand.recent_s, self._demand.lasting_s = _spans(settings)
        if self._change_limits is not None:
            self._change_limits(_rate_limits(settings))

    def _status(self) -> str:
        """One line for `systemctl status`."""
        members = self._machine.state.members
        if self._stop.is_set():
            return "stopping"
        if not self._announced:
            return "waiting to be let into a cluster" if self._admission.is_waiting else "starting"
        online = sum(self._cluster.is_online(node_id) for node_id in members)
        role = "leader" if self._raft.is_leader else "follower"
        quorum = "" if self._cluster.has_quorum else "; no quorum: nothing can be changed"
        models = len(self._engine.loaded())
        return f"{role}; {online} of {len(members)} nodes online; {models} models loaded{quorum}"

    async def run(self, invitation: Invitation | None) -> None:
        """The task tree. Returns after an orderly shutdown.

        Raises:
          StartError: the node could not join. RaftError: the consensus cannot go on.
        """
        begun = time.monotonic()
        await self._store.prepare()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(systemd.feed_watchdog)
            nursery.start_soon(systemd.keep_status, self._status)
            await nursery.start(self._mesh.run)
            await nursery.start(self._serve_peers)
            await nursery.start(self._serve_api)
            nursery.start_soon(self._stop_on_departure)
            if await self._until_stopped(self._admission.enter, self._raft, invitation):
                self._renew_if_due()  # before anybody is dialled: see `recover`
                await nursery.start(self._engine.run)
                await nursery.start(self._links.run, self._raft)
                await nursery.start(self._raft.run)
                await nursery.start(self._cluster.heartbeats.run)
                await nursery.start(self._cluster.run)
                await nursery.start(self._usage.run)
                await nursery.start(self._pieces.run)
                await nursery.start(self._library.run)
                await nursery.start(self._reconciler.run)
                await nursery.start(self._dispatcher.run)
                nursery.start_soon(self._sample_host)
                nursery.start_soon(self._watch_generation)
                nursery.start_soon(self._renew_certificate)
                nursery.start_soon(self._track_members)
                if await self._until_stopped(self._become_ready):
                    self._announce(time.monotonic() - begun)
                    nursery.start_soon(systemd.forget_failures_later)
                    await self._stop.wait()
            systemd.notify("STOPPING=1\nSTATUS=stopping")
            with trio.move_on_after(SHUTDOWN_TIMEOUT_S):
                await self._say_goodbye()
            nursery.cancel_scope.cancel()

    async def _until_stopped(self, function: Callable[..., Awaitable[None]], *args: object) -> bool:
        """Await `function(*args)` but give up when the daemon is to stop; whether it ended."""
        ended = False
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self._stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            await function(*args)
            ended = True
            nursery.cancel_scope.cancel()
        return ended

    async def _say_goodbye(self) -> None:
        """Stop in order: no new requests, running answers end, leadership moves, peers know."""
        self._api_down.set()
        await self._api_ended.wait()
        await self._usage.record()
        self._leaving = True
        await self._cluster.heartbeats.farewell(self._beat())
        if self._raft.is_leader and len(self._raft.voters) > 1:
            with suppress(RaftError):
                await self._raft.transfer_leadership(TRANSFER_TIMEOUT_S)

    async def _become_ready(self) -> None:
        """Found the cluster if this is the first start, then serve."""
        if not self._machine.state.cluster_id and self._raft.voters == {self._identity.node_id}:
            password, admin = await self._make_admin()
            await self._cluster.found(str(uuid.uuid4()), admin)
            log.info(
                "founded cluster %s; the user `admin` has the password %s",
                self._machine.state.cluster_id,
                password,
            )
        await self._cluster.catch_up(CATCH_UP_TIMEOUT_S)
        with trio.move_on_after(FIRST_STATE_TIMEOUT_S):
            # A new member is of no use before it knows who is who.
            while self._identity.node_id not in self._machine.state.members:
                await self._cluster.changes.next().wait()
        self._write_local_token()

    async def _make_admin(self) -> tuple[str, User]:
        """The first user, and where its password is (never the password itself)."""
        given = os.environ.get("OLLAMAD_ADMIN_PASSWORD")
        password = given or secrets.token_urlsafe(18)
        where = "of OLLAMAD_ADMIN_PASSWORD"
        if given is None:
            write_private(self._directory.admin_password, f"{password}\n".encode())
            where = f"in {self._directory.admin_password}"
        hashed = await trio.to_thread.run_sync(hash_password, password)
        return where, User("admin", hashed, "admin", time.time())

    def _announce(self, took_s: float) -> None:
        """Say where the node listens and what to type next."""
        self._announced = True
        self._become_active()
        host, port = self._addresses.api
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        members = len(self._machine.state.members)
        log.info(
            "node %s (%s) is ready after %.2f s", self._name, short(self._identity.node_id), took_s
        )
        log.info(
            "API http://%s:%d  peers %s:%d  raft %s:%d",
            _bracket(shown),
            port,
            *self._addresses.p2p,
            *self._addresses.raft,
        )
        if members <= 1:
            log.info(
                "a cluster of one. Next: `ollama-dist models pull smollm2:135m`, then "
                "`ollama-dist run smollm2:135m`; `ollama-dist cluster token` adds a node"
            )

    def _become_active(self) -> None:
        """Tell systemd that this start has succeeded: it serves, or waits, or ends well."""
        if not self.is_active:
            self.is_active = True
            systemd.notify("READY=1")

    # What others ask of this node.

    def _presence(self, node_id: NodeId) -> Presence:
        """How a node is, for who decides where requests go: of this one only what that needs."""
        if node_id == self._identity.node_id:
            return Presence(True, time.time(), self._load())
        return self._cluster.presence(node_id)

    def _load(self) -> Beat:
        """How busy this node is. It is asked several times a request, so it is cheap; and counted
        anew each time, so that no two requests take the same free slot."""
        return Beat(
            sent_at=time.time(),
            usage=self._host.usage,
            loaded=self._engine.loaded(),
            started_at=self._started_at,
            places=self._engine.places,
            vram_free=self._engine.usable_vram(
                [gpu.memory_total - gpu.memory_used for gpu in self._host.gpus]
            ),
        )

    def _beat(self) -> Beat:
        """All that this node tells the others."""
        load = self._load()
        return msgspec.structs.replace(
            load,
            gpus=self._host.gpus,
            active_requests=self._dispatcher.outstanding(),
            leaving=self._leaving,
            level=LEVEL,
            speeds=self._dispatcher.router.speeds(),
            prefixes=self._dispatcher.router.news(load.loaded),
            waiting=self._dispatcher.admission.waiting,
            demand=self._demand.read(trio.current_time()),
            receive_rate=self._library.receive_rate,
            no_room=self._library.no_room(),
            shares=self._dispatcher.admission.ledger.told(),
        )

    def _limit(self, rate: str) -> Limit:
        """A limit of the transfers in one direction."""
        while_generating = parse_rate(self._settings.transfer.while_generating)
        return Limit(
            parse_rate(rate),
            rate_when_busy=while_generating,
            is_busy=lambda: self._generating,  # also asked in threads
        )

    async def _watch_generation(self) -> None:
        """Notice when models answer here, so that transfers leave them the machine."""
        while True:
            self._generating = any(model.busy for model in self._engine.loaded())
            await trio.sleep(GENERATION_CHECK_S)

    async def _unload(self, name: str) -> None:
        await self._engine.unload(name)

    def _is_welcome(self, node_id: NodeId) -> bool:
        # Not "is a member": a node that was away does not know newer members yet, and one of
        # them may be the leader that is to tell it. Our CA signed the certificate.
        return node_id not in self._machine.state.departed

    def _farewell(self, node_id: NodeId) -> bytes:
        """What a node hears that was removed while it was away, in the words of the mesh."""
        return farewell(ollamad.__version__, Departed(self._machine.state.departed[node_id]))

    def _p2p_address(self, node_id: NodeId) -> str | None:
        member = self._machine.state.members.get(node_id)
        if member is not None:
            return member.p2p_address
        return next((s.p2p_address for s in self._admission.seeds.seeds if s.id == node_id), None)

    async def _dial_raft(self, node_id: NodeId) -> TlsStream:
        member = self._machine.state.members.get(node_id)
        address = member.raft_address if member else None
        if address is None:
            address = next(
                (s.raft_address for s in self._admission.seeds.seeds if s.id == node_id), None
            )
        if address is None:
            raise PeerUnreachable(f"the address of {short(node_id)}… is not known")
        return await self._gate.dial(node_id, address)

    # Tasks.

    async def _serve_peers(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept on the P2P and the Raft port until cancelled."""
        async with trio.open_nursery() as nursery:
            for doorman, listeners in (
                (
                    Doorman(self._gate, self._serve_p2p, self._farewell, self._bulk),
                    self._p2p_listeners,
                ),
                (Doorman(self._gate, self._serve_raft), self._raft_listeners),
            ):
                nursery.start_soon(trio.serve_listeners, doorman.accept, listeners)
            task_status.started()

    async def _serve_p2p(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        if peer is not None:
            await self._mesh.serve_member(stream, peer)
        elif self._machine.state.ca is not None:
            await self._cluster.sponsor.serve(stream, self._identity.certificate, host)
        elif self._admission.is_waiting:
            await self._admission.meet_sponsor(stream, host)

    async def _serve_raft(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        if peer is None:
            raise PeerUnreachable("no member's certificate")
        if peer in self._mesh.incompatible:
            raise PeerUnreachable(f"the version of {short(peer)} does not fit")
        await self._links.serve(stream, peer)

    async def _serve_api(
        self, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        auth = self._auth_settings()
        info = build_info()
        services = Services(
            cluster=self._cluster,
            library=self._library,
            inference=ApiInference(self._dispatcher, self._engine),
            host=ApiHost(self._host),
            keys=self._usage,
            build_time=info.build_time,
            git_commit=info.git_commit,
            platform=platform_name(),
            engine_versions=self._engine_versions,
            p2p_port=self._addresses.p2p[1],
        )
        origins = parse_origins(self._settings.api.origins)
        api = ApiSettings(
            auth=auth,
            origins=origins,
            metrics_public=self._settings.metrics.public,
            rate_limits=_rate_limits(self._settings),
        )
        app = build_app(services, api)
        section = self._settings.api
        connections = ConnectionLimits(
            connections_allowed(section.max_connections), section.max_connections_per_address
        )
        self._change_limits = app.change_limits
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(app.api.hub.run)
                await nursery.start(app.feed.run)
                await serve_api(
                    app,
                    self._api_sockets,
                    self._api_down,
                    limits=connections,
                    websockets=app.websockets,
                    task_status=task_status,
                )
                nursery.cancel_scope.cancel()
        finally:
            self._api_ended.set()

    async def _track_members(self) -> None:
        """Follow the replicated state where other parts need to be told."""
        expelled_at: dict[NodeId, float] = {}
        known: set[NodeId] = set()
        while True:
            changed = self._cluster.changes.next()
            self._write_local_token()
            state, now = self._machine.state, trio.current_time()
            members = set(state.members) or {seed.id for seed in self._admission.seeds.seeds}
            members |= self._raft.voters
            # Also who came and went while this node was away, and was let in in between.
            connected = self._mesh.dialled_by | self._links.dialled_by
            for gone in (known | (connected & state.departed.keys())) - members:
                expelled_at.setdefault(gone, now + DEPARTURE_NOTICE_S)
            for gone, at in list(expelled_at.items()):
                if gone in members or at <= now:
                    del expelled_at[gone]
                    if gone not in members:
                        self._mesh.expel(gone)
            known = members | expelled_at.keys()
            # Whose protocol is another one must not be half a member, that votes and does no more.
            strangers = {self._identity.node_id, *self._mesh.incompatible}
            self._links.set_peers(frozenset(known - strangers))
            with trio.move_on_at(min(expelled_at.values(), default=math.inf)):
                await changed.wait()

    def _write_local_token(self) -> None:
        """Let the command line of this host's user in, as soon as there is a key to sign with.

        What the disk refuses is tried again by the next call; the token from before is good for
        long.
        """
        state = self._machine.state
        if self._local_token_written or not state.cluster_id:
            return
        token = mint_local_token(
            state, self._auth_settings(), self._identity.node_id, now=time.time()
        )
        try:
            write_private(self._directory.cli_token, token.encode())
        except OSError as error:
            if not self._local_token_refused:
                log.warning(
                    "%s cannot be written now: %s", self._directory.cli_token, error.strerror
                )
            self._local_token_refused = True
        else:
            self._local_token_written, self._local_token_refused = True, False

    async def _sample_host(self) -> None:
        while True:
            self._host.sample()
            await trio.sleep(SAMPLE_INTERVAL_S)

    async def _renew_certificate(self) -> None:
        """Every member holds the CA's key, so a node renews its own certificate in time."""
        while True:
            self._watch_ca()
            self._local_token_written = False  # it too would end some day
            self._write_local_token()
            all_well = self._renew_if_due() and not self._local_token_refused
            await trio.sleep(RENEWAL_CHECK_S if all_well else RENEWAL_RETRY_S)

    def _renew_if_due(self) -> bool:
        """Renew the certificate if its time has come; False if the disk refused.

        Raises:
          StartError: it did, and with the old one this node would be taken for one of the cluster
            from before the recovery.
        """
        state, now = self._machine.state, datetime.datetime.now(datetime.UTC)
        if state.ca is None:
            return True
        try:
            renewed = self._identity.renew_if_due(state.ca, state.incarnation, now)
        except OSError as error:
            if self._identity.incarnation < state.incarnation:
                raise StartError(
                    f"the certificate that the recovery calls for cannot be written: "
                    f"{error.strerror}"
                ) from None
            log.error(
                "this node's certificate, valid until %s, cannot be renewed: %s; look after the "
                "disk of %s, it is tried again in %d minutes",
                f"{self._identity.valid_until:%Y-%m-%d}",
                error.strerror,
                self._directory.path,
                RENEWAL_RETRY_S // 60,
            )
            return False
        if renewed:
            self._gate.refresh()
            log.info("this node's certificate was renewed")
        return True

    def _watch_ca(self) -> None:
        """Nobody renews the CA, and where it has ended no node talks to another."""
        ca, now = self._machine.state.ca, datetime.datetime.now(datetime.UTC)
        if ca is not None and (end := ca_end_in_sight(ca, now)) is not None:
            log.warning(
                "the cluster's CA ends on %s, and connections between its nodes with it; make the "
                'cluster anew before: see "Certificates" in docs/operations.md',
                f"{end:%Y-%m-%d}",
            )

    async def _stop_on_departure(self) -> None:
        """A node that is no member any more keeps its models and forgets the cluster."""
        await self._cluster.departed.wait()
        await trio.sleep(DEPARTURE_GRACE_S)
        log.info("this node has left the cluster; start it with --join to join one again")
        self.departed = True
        # Or the end would be that of a start that failed, which systemd tries again.
        self._become_active()
        self._stop.set()

    def _auth_settings(self) -> AuthSettings:
        section = self._settings.auth
        return AuthSettings(
            loopback_role=section.loopback_role,
            jwt_secret=section.jwt_secret.encode() or None,
            access_ttl_s=parse_duration(section.token_ttl),
        )


def open_model_places(settings: Settings, directory: DataDir) -> ModelPlaces:
    """Where models are: the directory for new ones, made, and those that are only read.

    Raises:
      StartError: one cannot be made or seen; says how the service is allowed to.
    """
    adopted = Path(settings.models.path) if settings.models.path else None
    try:
        places = directory.model_places(adopted, read_only=settings.models.read_only)
        places.own.mkdir(parents=True, exist_ok=True)
        for shelf in places.shelves:
            for part in (shelf, shelf / "manifests", shelf / "blobs"):
                with suppress(FileNotFoundError):
                    os.scandir(part).close()
    except OSError as error:
        where = error.filename or adopted or directory.models
        told = f"{where} cannot be used for models: {error.strerror}"
        if adopted is None:
            raise StartError(told) from None
        raise StartError(f"models.path: {told}{_remedy(adopted, error.errno)}") from None
    return places


def _remedy(path: Path, number: int | None) -> str:
    """What lets the service have a directory that its sandbox, or somebody, keeps from it."""
    edit = "under [Service] by `systemctl edit ollamad`"
    if number == errno.EROFS:
        return f"; make it (`install -d -o ollamad {path}`) and put ReadWritePaths={path} {edit}"
    if number == errno.EACCES and any(path.is_relative_to(home) for home in HIDDEN_FROM_SERVICE):
        return f"; for a service put ProtectHome=tmpfs and BindPaths={path} {edit}"
    if number == errno.EACCES:
        return "; make it for the daemon's user, or let that read there"
    return ""


async def _listen(key: str, text: str) -> list[trio.SocketListener]:
    host, port = parse_listen(text)
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {text} ({key}): {error.strerror or error}; "
            "is another ollamad running?"
        ) from None


def _runtime_dir(directory: DataDir) -> Path:
    """Where the runners' sockets are; a Unix socket's path must be short."""
    if len(os.fsencode(directory.run)) <= MAX_RUNTIME_DIR:
        return directory.run
    path = tempfile.mkdtemp(prefix="ollamad-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _origin_settings(section: SourceSettings) -> OriginSettings:
    folders = [part.strip() for part in section.local_files.split(":")]
    return OriginSettings(
        policy=Policy(
            allow_http=parse_hosts(section.allow_http),
            allow_private=parse_hosts(section.allow_private),
            any_redirects=section.redirects == "any",
        ),
        mirror=section.registry,
        token_hosts=parse_hosts(section.token_hosts),
        ca_file=section.ca_file,
        connections=section.connections,
        local_files=tuple(folder for folder in folders if folder),
        hf_endpoint=section.hf_endpoint,
        hf_token=section.hf_token,
    )


def _placement(settings: Settings) -> PlacementPolicy:
    return PlacementPolicy(
        default_replicas=settings.models.replicas,
        lost_after_s=parse_duration(settings.distribution.lost_after),
        hot_load=settings.distribution.hot_load,
    )


def _spans(settings: Settings) -> tuple[float, float]:
    """Over how many seconds it is told what is asked for: lately, and lastingly."""
    distribution = settings.distribution
    return parse_duration(distribution.hot_after), parse_duration(distribution.cool_after)


def _rate_limits(settings: Settings) -> RateLimits:
    limits = settings.rate_limits
    return RateLimits(limits.general, limits.model_ops, limits.websocket)


def _bound(text: str, port: int) -> tuple[str, int]:
    """The host of a listen setting with the port that the system gave."""
    return parse_listen(text)[0], port


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
