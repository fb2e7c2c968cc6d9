"""How this node comes into a cluster: what `--join` says, asking or waiting, and giving up.

The exchange itself is in `peers/join.py`; here is what a node keeps of it and in which order.
"""

import logging
import time
from pathlib import Path

import msgspec
import trio

import ollamad
from ollamad import systemd
from ollamad.cluster import Addresses, join_addresses
from ollamad.core.ids import NodeId
from ollamad.core.state import Capacity
from ollamad.datadir import DataDir
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.peers.identity import Identity, write_private
from ollamad.peers.join import join_through, request_admission
from ollamad.peers.tls import Gate, PeerUnreachable, TlsStream
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
    if token.expires_at < time.time():
        raise StartError(
            "the join token has expired; make a new one with `ollama-dist cluster token`"
        )
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
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._gate = gate
        self._name = name
        self._addresses = addresses
        self._capacity = capacity
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
        if invitation is not None and is_elsewhere(self._identity, invitation):
            # The cluster of one is given up only once the other one has let this node in.
            reply = await self._join(invitation)
            forget_cluster(self._directory, self._identity)
            await raft.open()
            self._take_part(raft, reply)
        elif await raft.open():
            return
        elif self._identity.is_member:  # stopped after it was let in and before the log began
            raft.start_as_learner(frozenset(self.seeds.voters))
        elif invitation is None:
            raft.bootstrap()
        else:
            self._take_part(raft, await self._join(invitation))

    def _take_part(self, raft: RaftNode, reply: JoinReply) -> None:
        """Become a member by what the sponsor answered."""
        # In this order: a crash in between either joins again or goes on from the seeds.
        self.seeds = Seeds(reply.seeds, reply.voters)
        write_private(self._directory.seeds, encode(self.seeds))
        self._identity.install(reply.certificate_pem, reply.ca_certificate_pem)
        self._gate.refresh()
        raft.start_as_learner(frozenset(reply.voters))
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
            systemd.notify("READY=1\nSTATUS=waiting to be let into a cluster")
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
            log.warning("join: %s did not let this node in: %s", host, error)
        else:
            self._admitted.set()


async def check_room(
    settings: Settings, directory: DataDir, identity: Identity, invitation: Invitation
) -> None:
    """Whether this node may join: it is in no cluster, in this one, or in a cluster of one.

    The last is what a first `ollamad start` makes; it is given up for a real one.

    Raises:
      StartError: this node is in a cluster with others, or must not join any.
    """
    if settings.node.bootstrap:
        raise StartError("this node founds its own cluster (node.bootstrap); it joins no other")
    if not is_elsewhere(identity, invitation):
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


def is_elsewhere(identity: Identity, invitation: Invitation) -> bool:
    """Whether this node belongs to another cluster than the one that invites it."""
    return identity.is_member and channel_binding(identity.ca_der) != invitation.token.ca_hash


def forget_cluster(directory: DataDir, identity: Identity) -> None:
    """Put the state of a cluster that this node is no part of aside; blobs stay on disk."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = directory.path / f"left-{stamp}"
    aside.mkdir(mode=0o700, exist_ok=True)
    identity.forget_cluster(aside)
    for path in directory.of_cluster():
        if path.exists():
            path.rename(aside / path.name)
    log.info("the old cluster's state is in %s; delete it when you do not need it", aside)
