"""How this node comes into a cluster: what `--join` says, asking or waiting, and giving up.

The exchange itself is in `peers/join.py`; here is what a node keeps of it and in which order.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

import ollamad
from ollamad.cluster import Addresses, join_addresses
from ollamad.core.commands import DEPARTED_NODE
from ollamad.core.ids import NodeId
from ollamad.core.state import Capacity
from ollamad.datadir import DataDir
from ollamad.errors import HasLeft, StartError
from ollamad.machine import Machine
from ollamad.peers.identity import KEY_FILE, Identity, sync_directory, write_private
from ollamad.peers.join import join_through, request_admission
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.settings import Settings
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
from ollamad.wire.mux import OLDEST_PROTOCOL, PROTOCOL

log = logging.getLogger(__name__)


class Invitation(msgspec.Struct, frozen=True):
    """What `--join` says: the token, and where to ask (None: wait to be asked)."""

    token: Token
    address: str | None


def parse_invitation(text: str) -> Invitation:
    token_text, _, address = text.partition("@")
    try:
        token = parse_token(token_text)
    except InvalidToken as error:
        raise StartError(str(error)) from None
    return Invitation(token, address or None)


class Seeds(msgspec.Struct, frozen=True):
    """Who to talk to before the log has told."""

    seeds: tuple[Seed, ...] = ()
    voters: tuple[NodeId, ...] = ()


def read_seeds(path: Path) -> Seeds:
    try:
        return decode(path.read_bytes(), Seeds)
    except (FileNotFoundError, MalformedMessage):
        return Seeds()


class Admission:
    """Asks to be let in, or waits to be asked, and keeps what the cluster answered."""

    def __init__(
        self,
        directory: DataDir,
        identity: Identity,
        gate: Gate,
        *,
        name: str,
        addresses: Addresses,
        capacity: Capacity,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._gate = gate
        self._name = name
        self._addresses = addresses
        self._capacity = capacity
        self._on_waiting = on_waiting  # called once it waits to be asked
        self._waiting: Invitation | None = None
        self._reply: JoinReply | None = None
        self._admitted = trio.Event()
        self.seeds = read_seeds(directory.seeds)

    @property
    def is_waiting(self) -> bool:
        """Whether this node waits for a member to dial it."""
        return self._waiting is not None and not self._admitted.is_set()

    async def enter(self, raft: RaftNode, invitation: Invitation | None) -> None:
        """Have `raft` know its cluster: by its journal, by joining, or by founding one.

        Raises:
          StartError: the cluster did not let this node in.
        """
        if self._identity.is_member:
            if not await raft.open():
                raise StartError(
                    f"the journal of this node is gone from {self._directory.path}, and with it "
                    "what it has voted for, so its id must not go on. Take it out with "
                    "`ollama-dist cluster leave` on another node, then start it here with --join; "
                    "it becomes a new node, the models stay"
                )
        elif invitation is not None:
            reply = await self._join(invitation)
            # What there was is given up only now: the cluster has let this node in.
            forget_cluster(self._directory)
            await raft.open()
            await self._take_part(raft, reply)
        elif not await raft.open():
            raft.bootstrap()
            await raft.persist()
        elif raft.voters != {self._identity.node_id}:
            raise StartError(
                f"this node was stopped in {self._directory.path} before it had joined or left a "
                "cluster altogether; start it with --join"
            )

    async def _take_part(self, raft: RaftNode, reply: JoinReply) -> None:
        """Become a member by what the sponsor answered."""
        # The identity is the last. A crash before leaves one that is no member and joins again;
        # a member without a journal is one that lost it (see `enter`).
        self.seeds = Seeds(reply.seeds, reply.voters)
        write_private(self._directory.seeds, encode(self.seeds))
        raft.start_as_learner(frozenset(reply.voters))
        await raft.persist()
        self._identity.become_member(
            self._directory.identity, reply.certificate_pem, reply.ca_certificate_pem
        )
        self._directory.departed.unlink(missing_ok=True)
        self._gate.refresh()
        log.info("joined cluster %s", reply.cluster_id)

    async def _join(self, invitation: Invitation) -> JoinReply:
        if invitation.address is None:
            log.info(
                "waiting to be let in: on a member type\n  ollama-dist cluster join %s HOST:%d\n"
                "with this host's name or address for HOST",
                self._identity.node_id,
                self._addresses.api[1],
            )
            self._waiting = invitation
            self._on_waiting()
            await self._admitted.wait()
            assert self._reply is not None, "set before the event"
            return self._reply
        try:
            return await join_through(
                self._gate,
                invitation.address,
                self._join_request(invitation),
                invitation.token,
                self._identity.sign,
            )
        except (PeerUnreachable, JoinRefused) as error:
            self._heed(error)
            raise StartError(f"cannot join through {invitation.address}: {error}") from None

    def _heed(self, error: PeerUnreachable | JoinRefused) -> None:
        """Where the key is refused for good, have the next start make another."""
        if isinstance(error, JoinRefused) and error.code == DEPARTED_NODE:
            shutil.rmtree(self._directory.joining, ignore_errors=True)

    def _join_request(self, invitation: Invitation) -> JoinRequest:
        api, p2p, raft = join_addresses(self._addresses)
        return JoinRequest(
            node_id=self._identity.node_id,
            public_key=self._identity.public_key,
            name=self._name,
            api_address=api,
            p2p_address=p2p,
            raft_address=raft,
            capacity=self._capacity,
            version=ollamad.__version__,
            protocol=PROTOCOL,
            oldest_protocol=OLDEST_PROTOCOL,
            token_id=invitation.token.id,
            now=time.time(),
        )

    async def meet_sponsor(self, stream: TlsStream, host: str) -> None:
        """While waiting: somebody dialled us; ask it to let us in."""
        invitation = self._waiting
        assert invitation is not None, "only while waiting"
        try:
            self._reply = await request_admission(
                stream,
                self._join_request(invitation),
                invitation.token,
                self._identity.certificate,
                self._identity.sign,
            )
        except JoinRefused as error:
            self._heed(error)
            log.warning("join: %s did not let this node in: %s", host, error)
        else:
            self._admitted.set()


async def choose_identity(
    settings: Settings, directory: DataDir, invitation: Invitation | None
) -> Identity:
    """The identity to start with: this node's own, or one to join with.

    A node that is in the inviting cluster already goes on as it is, also when the token has
    expired: a container's command keeps it. One that is in no cluster, in a cluster of one, or
    without a journal joins, and with a new key: logs of other nodes may still count its old id as
    a voter. A cluster of one is what a first `ollamad start` makes; it is given up for a real one.

    Raises:
      HasLeft: this node was taken out of a cluster, and is to join none.
      StartError: this node is in a cluster with others, or must not join any, or comes too late.
      IdentityError, RaftError: the identity or the journal is damaged.
    """
    if invitation is None:
        _check_not_departed(directory)
        return Identity.load_or_create(directory.identity)
    if settings.node.bootstrap:
        raise StartError("this node founds its own cluster (node.bootstrap); it joins no other")
    if (directory.identity / KEY_FILE).exists():
        own = Identity.load_or_create(directory.identity)
        if own.is_member and await _is_to_stay(own, directory, invitation):
            return own
    if invitation.token.expires_at < time.time():
        raise StartError(
            "the join token has expired; make a new one with `ollama-dist cluster token`"
        )
    return Identity.to_join(directory.joining)


def _check_not_departed(directory: DataDir) -> None:
    """Whether this is no node that was taken out, and started again by nobody's wish.

    A service manager starts it at the next boot. A cluster of its own, with another password,
    would answer for the real one then, behind the same load balancer.
    """
    # With a key it is in a cluster again: somebody has moved back what was put aside.
    if directory.departed.exists() and not (directory.identity / KEY_FILE).exists():
        raise HasLeft(
            f"this node has left its cluster, whose state is in {directory.path}/left-…; start it "
            "with --join to join one again, or let it found a new one after `ollamad forget`"
        )


async def _is_to_stay(identity: Identity, directory: DataDir, invitation: Invitation) -> bool:
    machine = Machine()
    store = SqliteStore(directory.raft)
    try:
        has_journal = await RaftNode(identity.node_id, store, machine, lambda *_: None).open()
    finally:
        await store.aclose()
    if has_journal and not is_elsewhere(identity, invitation):
        return True
    if len(machine.state.members) > 1:
        raise StartError(
            f"{directory.path} belongs to a node of another cluster; take it out there with "
            "`ollama-dist cluster leave`, or use another --data-dir"
        )
    return False


def is_elsewhere(identity: Identity, invitation: Invitation) -> bool:
    """Whether this node belongs to another cluster than the one that invites it."""
    return identity.is_member and channel_binding(identity.ca_der) != invitation.token.ca_hash


def forget_cluster(directory: DataDir) -> Path | None:
    """Put the state of a cluster that this node is no part of aside, and its key; blobs stay.

    Returns:
      Where it is; None if there was nothing.
    """
    paths = [path for path in directory.of_cluster() if path.exists()]
    if not paths:
        return None
    aside = Path(tempfile.mkdtemp(prefix=time.strftime("left-%Y%m%d-%H%M%S-"), dir=directory.path))
    for path in paths:
        path.rename(aside / path.name)
    sync_directory(directory.path)
    log.info("the old cluster's state is in %s; delete it when you do not need it", aside)
    return aside
