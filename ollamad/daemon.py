"""The daemon: builds every part, and runs them as one visible tree of tasks.

This is the one place that knows every package. `Daemon.run` starts the tasks line by line in
their order; shutting down goes the other way: new requests are refused first, the runners and
the consensus end last.
"""

import atexit
import datetime
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

import ollamad
from ollamad import logs, systemd
from ollamad.api.app import build_app
from ollamad.api.auth import AuthSettings, hash_password, mint_local_token
from ollamad.api.calls import ApiSettings
from ollamad.api.serve import CannotListen, open_listeners, serve_api
from ollamad.api.services import Embedded, Generation, ServiceError, Services
from ollamad.build import engine_versions
from ollamad.cluster import Addresses, Cluster, join_addresses
from ollamad.core.ids import NodeId, short
from ollamad.core.inference import (
    Embeddings,
    EmbedRequest,
    Event,
    Failed,
    GenerateRequest,
    InferenceError,
)
from ollamad.core.presence import Beat
from ollamad.core.state import Model, User
from ollamad.datadir import DataDir, DataDirError
from ollamad.engine.engine import Engine
from ollamad.engine.spec import EngineSettings, ModelSpec
from ollamad.host import HostMonitor
from ollamad.library import Library
from ollamad.machine import Machine
from ollamad.peers.identity import Identity, IdentityError, write_private
from ollamad.peers.join import join_through, request_admission
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, PeerUnreachable, TlsStream
from ollamad.raft.errors import RaftError
from ollamad.raft.links import Links
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.scheduler.dispatch import EMBED, GENERATE, Dispatcher, EventSource
from ollamad.settings import Settings, parse_duration, parse_listen
from ollamad.sources.pypi import PypiSource
from ollamad.store.errors import BlobMissing, PieceCorrupt, StoreError
from ollamad.store.models import ModelStore
from ollamad.transfer.fetch import Fetcher
from ollamad.transfer.server import PieceServer
from ollamad.transfer.transfers import TransferTable
from ollamad.wire.codec import MalformedMessage, decode, encode
from ollamad.wire.join import (
    InvalidToken,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Seed,
    Token,
    channel_binding,
    parse_token,
)
from ollamad.wire.mux import PROTOCOL
from ollamad.wire.pieces import METHOD as PIECES

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 7.0  # for goodbyes; the rest of 10 is for runners and the journal
TRANSFER_TIMEOUT_S = 1.0
DEPARTURE_GRACE_S = 0.5  # the answer to `leave` is still on its way
DEPARTURE_NOTICE_S = 3.0  # a node that was taken out still hears so from the log
FIRST_STATE_TIMEOUT_S = 10.0
SAMPLE_INTERVAL_S = 1.0
RENEWAL_CHECK_S = 86400.0
MAX_RUNTIME_DIR = 80  # bytes; sockets' names and their limit of 107 leave no more
MAX_INBOUND = 256  # connections of other nodes at once, per port


class StartError(Exception):
    """The daemon cannot start; the message is one line that says what to do."""


def run(settings: Settings, data_dir: Path, join: str | None) -> None:
    """Run a daemon until it is told to stop.

    Raises:
      StartError: it cannot start, or had to give up.
    """
    logs.set_up(
        settings.log.level, settings.log.format, under_systemd="JOURNAL_STREAM" in os.environ
    )
    os.umask(0o077)  # the journal holds the cluster's keys
    invitation = _parse_invitation(join) if join else None
    try:
        with DataDir(data_dir) as directory:
            identity = Identity.load_or_create(directory.identity)
            if identity.is_member:
                identity.check_validity(datetime.datetime.now(datetime.UTC))
            trio.run(partial(_run, settings, directory, identity, invitation))
    except (DataDirError, IdentityError, RaftError, StoreError) as error:
        raise StartError(str(error)) from None
    except BaseExceptionGroup as group:
        _explain(group)


class Invitation(msgspec.Struct, frozen=True):
    """What `--join` says: the token, and where to ask (None: wait to be asked)."""

    token: Token
    address: str | None


def _parse_invitation(text: str) -> Invitation:
    token_text, _, address = text.partition("@")
    try:
        token = parse_token(token_text)
    except InvalidToken as error:
        raise StartError(str(error)) from None
    if token.expires_at < time.time():
        raise StartError(
            "the join token has expired; make a new one with `ollama-dist cluster token`"
        )
    return Invitation(token, address or None)


async def _run(
    settings: Settings, directory: DataDir, identity: Identity, invitation: Invitation | None
) -> None:
    if invitation is not None:
        await _check_room(settings, directory, identity, invitation)
    daemon = await Daemon.build(settings, directory, identity)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, daemon.stop)
        await daemon.run(invitation)
        nursery.cancel_scope.cancel()
    if daemon.departed:
        _forget_cluster(directory, identity)


async def _check_room(
    settings: Settings, directory: DataDir, identity: Identity, invitation: Invitation
) -> None:
    """Whether this node may join: it is in no cluster, in this one, or in a cluster of one.

    The last is what a first `ollamad start` makes; it is given up for a real one.

    Raises:
      StartError: this node is in a cluster with others, or must not join any.
    """
    if settings.node.bootstrap:
        raise StartError("this node founds its own cluster (node.bootstrap); it joins no other")
    if not _is_elsewhere(identity, invitation):
        return
    machine = Machine()
    store = SqliteStore(directory.raft)
    try:
        await RaftNode(identity.node_id, store, machine, lambda *_: None).open()
    finally:
        await store.aclose()
    if len(machine.state.members) > 1:
        raise StartError(
            f"{directory.path} belongs to a node of another cluster; take it out there with "
            "`ollama-dist cluster leave`, or use another --data-dir"
        )


def _is_elsewhere(identity: Identity, invitation: Invitation) -> bool:
    """Whether this node belongs to another cluster than the one that invites it."""
    return identity.is_member and channel_binding(identity.ca_der) != invitation.token.ca_hash


def _forget_cluster(directory: DataDir, identity: Identity) -> None:
    """Put the state of a cluster that this node is no part of aside; blobs stay on disk."""
    identity.forget_cluster()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = directory.path / f"left-{stamp}"
    aside.mkdir(mode=0o700, exist_ok=True)
    for path in directory.of_cluster():
        if path.exists():
            path.rename(aside / path.name)
    log.info("the old cluster's state is in %s; delete it when you do not need it", aside)


async def _watch_signals(stop: Callable[[], None]) -> None:
    """SIGTERM and Ctrl-C stop in order; the second one at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            stop()
            break
        async for _ in signals:
            os._exit(1)  # whoever asks twice does not want to wait for anything


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
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._identity = identity
        self._api_sockets = api_sockets
        self._p2p_listeners = p2p_listeners
        self._raft_listeners = raft_listeners
        self._stop = trio.Event()
        self._api_down = trio.Event()
        self._api_ended = trio.Event()
        self._invitation: Invitation | None = None  # while waiting to be let in
        self._admission: JoinReply | None = None
        self._admitted = trio.Event()
        self._seeds = _read_seeds(directory.seeds)
        self._started_at = time.time()
        self._leaving = False
        self._local_token_written = False
        self.departed = False  # this node is no member any more; its cluster is to be forgotten

        models_dir = Path(settings.models.path) if settings.models.path else directory.models
        models_dir.mkdir(parents=True, exist_ok=True)
        self._host = HostMonitor(models_dir)
        self._addresses = Addresses(
            api=_bound(settings.api.listen, api_sockets[0].getsockname()[1]),
            p2p=_bound(settings.p2p.listen, p2p_listeners[0].socket.getsockname()[1]),
            raft=_bound(settings.raft.listen, raft_listeners[0].socket.getsockname()[1]),
            advertise=settings.node.advertise,
        )
        self._name = settings.node.name or socket.gethostname()

        self._machine = Machine()
        self._gate = Gate(identity, self._is_welcome)
        self._mesh = Mesh(self._gate, version=ollamad.__version__, address_of=self._p2p_address)
        self._links = Links(self._dial_raft)
        self._raft = RaftNode(
            identity.node_id,
            SqliteStore(directory.raft),
            self._machine,
            self._links.send,
        )
        self._store = ModelStore(models_dir)
        self._engine = Engine(
            EngineSettings(
                runtime_dir=_runtime_dir(directory),
                keep_alive_s=parse_duration(settings.engine.keep_alive),
                num_parallel=settings.engine.num_parallel,
                max_loaded_models=settings.engine.max_loaded_models,
                context_length=settings.engine.context_length,
                max_queue=settings.engine.max_queue,
            ),
            lambda: self._host.sample().memory_available,
        )
        self._cluster = Cluster(
            identity=identity,
            name=self._name,
            addresses=self._addresses,
            capacity=self._host.capacity(),
            gate=self._gate,
            mesh=self._mesh,
            raft=self._raft,
            machine=self._machine,
            own_beat=self._beat,
        )
        self._table = TransferTable(
            identity.node_id, secrets.token_hex(2), wall=time.time, steady=time.monotonic
        )
        self._library = Library(
            cluster=self._cluster,
            store=self._store,
            fetcher=Fetcher(self._mesh, self._store, corrupt=PieceCorrupt),
            table=self._table,
            source=PypiSource(),
            unload=self._unload,
            held_path=directory.replicas,
            default_replicas=settings.models.replicas,
        )
        self._dispatcher = Dispatcher(
            identity.node_id,
            state=lambda: self._machine.state,
            presence=self._cluster.presence,
            engine=_LocalEngine(self._engine, self._store),
            peers=self._mesh,
        )
        self._mesh.handle(GENERATE, self._dispatcher.serve_generate)
        self._mesh.handle(EMBED, self._dispatcher.serve_embed)
        self._mesh.handle(PIECES, PieceServer(self._store, missing=BlobMissing).handle)

    @classmethod
    async def build(cls, settings: Settings, directory: DataDir, identity: Identity) -> "Daemon":
        """Bind all ports and make all parts.

        Raises:
          StartError: a port is in use or an address is not ours.
        """
        try:
            host, port = parse_listen(settings.api.listen)
            api_sockets = await open_listeners([f"{_bracket(host)}:{port}"])
            p2p = await _listen("p2p.listen", settings.p2p.listen)
            raft = await _listen("raft.listen", settings.raft.listen)
        except CannotListen as error:
            raise StartError(str(error)) from None
        return cls(
            settings,
            directory,
            identity,
            api_sockets=api_sockets,
            p2p_listeners=p2p,
            raft_listeners=raft,
        )

    def stop(self) -> None:
        """Begin to shut down."""
        self._stop.set()

    async def run(self, invitation: Invitation | None) -> None:
        """The task tree. Returns after an orderly shutdown.

        Raises:
          StartError: the node could not join. RaftError: the consensus cannot go on.
        """
        begun = time.monotonic()
        await self._store.prepare()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._mesh.run)
            await nursery.start(self._serve_peers)
            await nursery.start(self._serve_api)
            nursery.start_soon(self._stop_on_departure)
            if await self._until_stopped(self._enter_cluster, invitation):
                await nursery.start(self._engine.run)
                await nursery.start(self._links.run, self._raft)
                await nursery.start(self._raft.run)
                await nursery.start(self._cluster.heartbeats.run)
                await nursery.start(self._cluster.run)
                await nursery.start(self._library.run)
                nursery.start_soon(self._sample_host)
                nursery.start_soon(self._renew_certificate)
                nursery.start_soon(self._track_members)
                if await self._until_stopped(self._become_ready):
                    self._announce(time.monotonic() - begun)
                    await self._stop.wait()
            systemd.notify("STOPPING=1")
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
        self._leaving = True
        await self._cluster.heartbeats.farewell(self._beat())
        if self._raft.is_leader and len(self._raft.voters) > 1:
            with suppress(RaftError):
                await self._raft.transfer_leadership(TRANSFER_TIMEOUT_S)

    # Becoming part of a cluster.

    async def _enter_cluster(self, invitation: Invitation | None) -> None:
        """Know the cluster: from the journal, by joining, or by founding one."""
        if invitation is not None and _is_elsewhere(self._identity, invitation):
            # The cluster of one is given up only once the other one has let this node in.
            reply = await self._join(invitation)
            _forget_cluster(self._directory, self._identity)
            await self._raft.open()
            self._take_part(reply)
            return
        if await self._raft.open():
            return
        if self._identity.is_member:  # stopped after it was let in and before the log began
            self._raft.start_as_learner(frozenset(_read_seeds(self._directory.seeds).voters))
            return
        if invitation is None:
            self._raft.bootstrap()
            return
        self._take_part(await self._join(invitation))

    def _take_part(self, reply: JoinReply) -> None:
        """Become a member by what the sponsor answered."""
        # In this order: a crash in between either joins again or goes on from the seeds.
        write_private(self._directory.seeds, encode(Seeds(reply.seeds, reply.voters)))
        self._seeds = Seeds(reply.seeds, reply.voters)
        self._identity.install(reply.certificate_pem, reply.ca_certificate_pem)
        self._gate.refresh()
        self._raft.start_as_learner(frozenset(reply.voters))
        log.info("joined cluster %s", reply.cluster_id)

    async def _join(self, invitation: Invitation) -> JoinReply:
        if invitation.address is None:
            log.info(
                "waiting to be let in: on a member type\n  ollama-dist cluster join %s HOST:%d\n"
                "with this host's name or address for HOST",
                self._identity.node_id,
                self._addresses.api[1],
            )
            self._invitation = invitation
            systemd.notify("READY=1\nSTATUS=waiting to be let into a cluster")
            await self._admitted.wait()
            assert self._admission is not None, "set before the event"
            return self._admission
        try:
            return await join_through(
                self._gate, invitation.address, self._join_request(invitation), invitation.token
            )
        except (PeerUnreachable, JoinRefused) as error:
            raise StartError(f"cannot join through {invitation.address}: {error}") from None

    def _join_request(self, invitation: Invitation) -> JoinRequest:
        api, p2p, raft = join_addresses(self._addresses)
        return JoinRequest(
            node_id=self._identity.node_id,
            public_key=self._identity.public_key,
            name=self._name,
            api_address=api,
            p2p_address=p2p,
            raft_address=raft,
            capacity=self._host.capacity(),
            version=ollamad.__version__,
            protocol=PROTOCOL,
            token_id=invitation.token.id,
            now=time.time(),
        )

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
        systemd.notify("READY=1\nSTATUS=serving")
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

    # What others ask of this node.

    def _beat(self) -> Beat:
        return Beat(
            sent_at=time.time(),
            usage=self._host.usage,
            loaded=self._engine.loaded(),
            gpus=self._host.gpus,
            active_requests=self._dispatcher.outstanding(),
            started_at=self._started_at,
            leaving=self._leaving,
        )

    async def _unload(self, name: str) -> None:
        await self._engine.unload(name)

    def _is_welcome(self, node_id: NodeId) -> bool:
        # Not "is a member": a node that was away does not know newer members yet, and one of
        # them may be the leader that is to tell it. Our CA signed the certificate.
        return node_id not in self._machine.state.departed

    def _p2p_address(self, node_id: NodeId) -> str | None:
        member = self._machine.state.members.get(node_id)
        if member is not None:
            return member.p2p_address
        return next((s.p2p_address for s in self._seeds.seeds if s.id == node_id), None)

    async def _dial_raft(self, node_id: NodeId) -> TlsStream:
        member = self._machine.state.members.get(node_id)
        address = member.raft_address if member else None
        if address is None:
            address = next((s.raft_address for s in self._seeds.seeds if s.id == node_id), None)
        if address is None:
            raise PeerUnreachable(f"the address of {short(node_id)}… is not known")
        return await self._gate.dial(node_id, address)

    # Tasks.

    async def _serve_peers(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept on the P2P and the Raft port until cancelled."""
        async with trio.open_nursery() as nursery:
            for handler, listeners in (
                (self._serve_p2p, self._p2p_listeners),
                (self._serve_raft, self._raft_listeners),
            ):
                gatekeeper = _Doorman(self._gate, handler)
                nursery.start_soon(trio.serve_listeners, gatekeeper.serve, listeners)
            task_status.started()

    async def _serve_p2p(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        if peer is not None:
            await self._mesh.serve_member(stream, peer)
        elif self._machine.state.ca is not None:
            await self._cluster.sponsor.serve(stream, self._identity.certificate, host)
        elif self._invitation is not None and not self._admitted.is_set():
            await self._meet_sponsor(self._invitation, stream, host)

    async def _serve_raft(self, stream: TlsStream, peer: NodeId | None, host: str) -> None:
        if peer is None:
            log.warning("raft: closing %s: no member's certificate", host)
        else:
            await self._links.serve(stream, peer)

    async def _meet_sponsor(self, invitation: Invitation, stream: TlsStream, host: str) -> None:
        """While waiting: somebody dialled us; ask it to let us in."""
        try:
            self._admission = await request_admission(
                stream, self._join_request(invitation), invitation.token, self._identity.certificate
            )
        except JoinRefused as error:
            log.warning("join: %s did not let this node in: %s", host, error)
        else:
            self._admitted.set()

    async def _serve_api(
        self, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        auth = self._auth_settings()
        services = Services(
            cluster=self._cluster,
            library=self._library,
            inference=_ApiInference(self._dispatcher),
            host=_ApiHost(self._host),
            engine_versions=engine_versions(),
            p2p_port=self._addresses.p2p[1],
        )
        app = build_app(services, ApiSettings(auth=auth))
        try:
            await serve_api(app, self._api_sockets, self._api_down, task_status=task_status)
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
            members = set(state.members) or {seed.id for seed in self._seeds.seeds}
            members |= self._raft.voters
            for gone in known - members:
                expelled_at.setdefault(gone, now + DEPARTURE_NOTICE_S)
            for gone, at in list(expelled_at.items()):
                if gone in members or at <= now:
                    del expelled_at[gone]
                    if gone not in members:
                        self._mesh.expel(gone)
            known = members | expelled_at.keys()
            self._links.set_peers(frozenset(known - {self._identity.node_id}))
            with trio.move_on_at(min(expelled_at.values(), default=math.inf)):
                await changed.wait()

    def _write_local_token(self) -> None:
        """Let the command line of this host's user in, as soon as there is a key to sign with."""
        state = self._machine.state
        if self._local_token_written or not state.cluster_id:
            return
        token = mint_local_token(
            state, self._auth_settings(), self._identity.node_id, now=time.time()
        )
        write_private(self._directory.cli_token, token.encode())
        self._local_token_written = True

    async def _sample_host(self) -> None:
        while True:
            self._host.sample()
            await trio.sleep(SAMPLE_INTERVAL_S)

    async def _renew_certificate(self) -> None:
        """Every member holds the CA's key, so a node renews its own certificate in time."""
        while True:
            ca, now = self._machine.state.ca, datetime.datetime.now(datetime.UTC)
            if ca is not None and self._identity.renew_if_due(ca, now):
                self._gate.refresh()
                log.info("this node's certificate was renewed")
            await trio.sleep(RENEWAL_CHECK_S)

    async def _stop_on_departure(self) -> None:
        """A node that is no member any more keeps its models and forgets the cluster."""
        await self._cluster.departed.wait()
        await trio.sleep(DEPARTURE_GRACE_S)
        log.info("this node has left the cluster; start it with --join to join one again")
        self.departed = True
        self._stop.set()

    def _auth_settings(self) -> AuthSettings:
        section = self._settings.auth
        return AuthSettings(
            loopback_role=section.loopback_role,
            jwt_secret=section.jwt_secret.encode() or None,
            access_ttl_s=parse_duration(section.token_ttl),
        )


class _Doorman:
    """Does the TLS handshake for each connection and hands it on; never lets an error out."""

    def __init__(
        self, gate: Gate, handler: Callable[[TlsStream, NodeId | None, str], Awaitable[None]]
    ) -> None:
        self._gate = gate
        self._handler = handler
        self._active = 0

    async def serve(self, transport: trio.SocketStream) -> None:
        if self._active >= MAX_INBOUND:
            await trio.aclose_forcefully(transport)
            return
        self._active += 1
        host = "?"
        try:
            host = transport.socket.getpeername()[0]
            stream, peer = await self._gate.accept(transport)
            try:
                await self._handler(stream, peer, host)
            finally:
                with trio.move_on_after(1, shield=True):
                    await trio.aclose_forcefully(stream)
        except PeerUnreachable as error:
            # A node that joins is dialled as soon as it is known, a moment before it has its
            # certificate.
            level = logging.WARNING if self._gate.is_member else logging.DEBUG
            log.log(level, "closing a connection of %s: %s", host, error)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.info("a connection of %s ended: %s", host, error)
        except MalformedMessage as error:
            log.warning("closing a connection of %s: %s", host, error)
        except Exception:
            log.exception("a connection of %s failed", host)
        finally:
            self._active -= 1


class _LocalEngine:
    """The engine in terms of the cluster's models: finds the files of each."""

    def __init__(self, engine: Engine, store: ModelStore) -> None:
        self._engine = engine
        self._store = store

    @asynccontextmanager
    async def generate(self, model: Model, request: GenerateRequest) -> AsyncIterator[EventSource]:
        spec = await self._spec(model)
        async with self._engine.generate(spec, request) as events:
            yield _OnDemand(events)

    async def embed(self, model: Model, request: EmbedRequest) -> Embeddings:
        return await self._engine.embed(await self._spec(model), request)

    async def _spec(self, model: Model) -> ModelSpec:
        try:
            parts = await self._store.runtime_parts(model)
        except StoreError as error:
            raise InferenceError(Failed("NOT_HERE", str(error), 503)) from None
        return ModelSpec(
            name=model.name,
            digest=model.digest,
            gguf_path=str(parts.gguf),
            size=model.size,
            details=model.details,
            template=parts.template,
            system=parts.system,
            options=parts.params,
        )


class _OnDemand:
    """The engine makes events only when asked, so there is never one waiting."""

    def __init__(self, events: trio.abc.ReceiveChannel[Event]) -> None:
        self._events = events

    async def receive(self) -> Event:
        return await self._events.receive()

    def receive_nowait(self) -> Event:
        raise trio.WouldBlock


class _ApiInference:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        async with self._dispatcher.generate(request) as serving:
            yield Generation(serving.node_id, serving.events)

    async def embed(self, request: EmbedRequest) -> Embedded:
        return Embedded(*await self._dispatcher.embed(request))

    def queued(self) -> int:
        return 0


class _ApiHost:
    def __init__(self, host: HostMonitor) -> None:
        self._host = host

    def cpu_percent(self) -> float:
        return 100 * self._host.usage.cpu

    def memory_percent(self) -> float:
        return 100 * self._host.usage.memory

    def network_percent(self) -> float:
        return self._host.network_percent()


class Seeds(msgspec.Struct, frozen=True):
    """Who to talk to before the log has told."""

    seeds: tuple[Seed, ...] = ()
    voters: tuple[NodeId, ...] = ()


def _read_seeds(path: Path) -> Seeds:
    try:
        return decode(path.read_bytes(), Seeds)
    except (FileNotFoundError, MalformedMessage):
        return Seeds()


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


def _bound(text: str, port: int) -> tuple[str, int]:
    """The host of a listen setting with the port that the system gave."""
    return parse_listen(text)[0], port


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _explain(group: BaseExceptionGroup[BaseException]) -> None:
    """Turn what ended the daemon into one line, if it is something expected."""
    expected = group.subgroup((StartError, RaftError, StoreError, ServiceError))
    rest = group.split((StartError, RaftError, StoreError, ServiceError))[1]
    if expected is None or rest is not None:
        raise group
    error: BaseException = expected
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise StartError(str(error)) from None
