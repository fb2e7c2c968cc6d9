"""The cluster as this node sees it: replicated state, membership, who leads, who is there."""

import datetime
import logging
import secrets
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import msgspec
import psutil
import trio

import ollamad
from ollamad.api.services import (
    Consensus,
    IssuedToken,
    NoQuorum,
    ServiceError,
    Unavailable,
)
from ollamad.core.commands import (
    DEPARTED_NODE,
    AddJoinToken,
    AddKey,
    AddUser,
    AdmitMember,
    AnyCommand,
    Applied,
    FoundCluster,
    Outcome,
    Proposal,
    PutModel,
    PutUser,
    Rejected,
    RemoveMember,
    SetDraining,
    UpdateMember,
    level_of,
)
from ollamad.core.ids import NodeId, short
from ollamad.core.presence import Beat, Presence
from ollamad.core.state import Capacity, ClusterState, JoinToken, Member, User
from ollamad.machine import Machine, decode_outcome
from ollamad.peers.heartbeat import Heartbeats
from ollamad.peers.identity import Identity, certificate_der, issue_certificate, make_ca
from ollamad.peers.join import Sponsor, sponsor_waiting_node
from ollamad.peers.link import HandlerError, RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.raft.errors import ChangeRefused, CommandTooLarge, OutcomeUnknown, RaftError
from ollamad.raft.errors import NoQuorum as RaftNoQuorum
from ollamad.raft.node import RaftNode
from ollamad.raft.recovery import LogEnd
from ollamad.wire.codec import encode
from ollamad.wire.join import (
    MAX_SEEDS,
    SECRET_SIZE,
    TOKEN_ID_SIZE,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Seed,
    Token,
    channel_binding,
    format_token,
    token_key,
)
from ollamad.wire.mux import Departed

log = logging.getLogger(__name__)

PROPOSE_TIMEOUT_S = 5.0  # several elections long
MAX_VOTERS = 5  # more voters make every commit slower and survive no likelier fault
MEMBERSHIP_INTERVAL_S = 0.5  # how often the leader looks whether voters should change
CHANGE_TIMEOUT_S = 3.0  # for one change of the voters
REMOVE_VOTER_TIMEOUT_S = 15.0  # for all tries, leader changes included
HAND_OVER_TIMEOUT_S = 600.0  # a large model takes minutes to copy on a LAN
ANNOUNCE_RETRY_S = 1.0
ADDRESS_CHECK_S = 60.0  # so often this host's addresses are looked at
BEYOND = ("203.0.113.1", 9)  # of no network that this host is in (RFC 5737)
REPAIR_AFTER_S = 30.0  # a voter is replaced when it has been away this long
QUORUM_CHECK_INTERVAL_S = 0.5
QUORUM_NOTICE_S = 10.0  # many elections: what ends by itself has ended by then
# What makes the state larger for good. All else goes on when it is too large for a snapshot.
GROWING = (PutModel, PutUser, AddUser, AddKey, AddJoinToken, AdmitMember)

CONSENSUS_VIEW = "consensus.view"

HandOver = Callable[[NodeId, float], Awaitable[None]]  # the node, and how long it may take


class ConsensusView(msgspec.Struct, frozen=True):
    """What a node knows of the consensus; `ollamad recover` asks every member for it."""

    term: int
    leader: str  # node id; empty if it knows none
    has_quorum: bool
    end: LogEnd
    voters: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where this node listens, as `host:port`; an empty host means every interface."""

    api: tuple[str, int]
    p2p: tuple[str, int]
    raft: tuple[str, int]
    advertise: str = ""


class Cluster:
    """What the rest of the daemon asks about the cluster, and how the membership changes."""

    def __init__(
        self,
        *,
        identity: Identity,
        name: str,
        addresses: Addresses,
        capacity: Capacity,
        gate: Gate,
        mesh: Mesh,
        raft: RaftNode,
        machine: Machine,
        own_beat: Callable[[], Beat],
    ) -> None:
        self.node_id = identity.node_id
        self.mesh = mesh
        self.changes = Changes()
        self.is_caught_up = False
        self.departed = trio.Event()  # set when this node is no member any more
        # Waits until nothing would be lost with a node; set by who looks after the models.
        self.hand_over: HandOver = _nothing_to_hand_over
        self._identity = identity
        self._name = name
        self._addresses = addresses
        self._capacity = capacity
        self._gate = gate
        self._raft = raft
        self._machine = machine
        self._own_beat = own_beat
        self._quorum_lost_at: float | None = None
        self._told: UpdateMember | None = None  # what this node last said of itself
        self.heartbeats = Heartbeats(
            mesh, peers=self.other_members, own_beat=own_beat, on_change=self._presence_changed
        )
        self.sponsor = Sponsor(self._live_token, self._admit)
        machine.on_change = self.changes.notify
        mesh.on_turned_away = self.on_turned_away
        mesh.on_compatibility = self.changes.notify
        mesh.answer("announce", UpdateMember, self._on_announce)
        mesh.answer("voter.remove", NodeId, self._on_remove_voter)
        mesh.answer(CONSENSUS_VIEW, type(None), self._on_consensus_view)

    # What everybody reads.

    @property
    def state(self) -> ClusterState:
        return self._machine.state

    @property
    def is_leader(self) -> bool:
        return self._raft.is_leader

    @property
    def has_quorum(self) -> bool:
        return self._raft.has_quorum

    @property
    def quorum_lost_for_s(self) -> float:
        """Seconds since this node last knew of a quorum; 0 while there is one."""
        if self._raft.has_quorum:
            self._quorum_lost_at = None
            return 0.0
        if self._quorum_lost_at is None:
            self._quorum_lost_at = trio.current_time()
        return trio.current_time() - self._quorum_lost_at

    @property
    def term(self) -> int:
        return self._raft.term

    def leader(self) -> NodeId | None:
        return self._raft.leader

    def voters(self) -> Sequence[NodeId]:
        return sorted(self._raft.voters)

    def other_members(self) -> list[NodeId]:
        return [node_id for node_id in self.state.members if node_id != self.node_id]

    def presence(self, node_id: NodeId) -> Presence:
        """How a node is; this node is always online to itself."""
        if node_id == self.node_id:
            return Presence(True, time.time(), self._own_beat())
        return self.heartbeats.presence(node_id)

    def is_online(self, node_id: NodeId) -> bool:
        return node_id == self.node_id or self.heartbeats.presence(node_id).online

    def changed(self) -> trio.Event:
        return self.changes.next()

    def consensus(self) -> Consensus:
        raft = self._raft
        return Consensus(
            raft.commit_index, raft.applied_index, raft.silence_s, raft.disk_full, raft.disk_hangs
        )

    def snapshot(self) -> tuple[int, bytes]:
        """The replicated state in bytes, and the index of the last entry that it includes."""
        return self._raft.applied_index, self._machine.snapshot()

    async def catch_up(self, timeout_s: float) -> None:
        """After a start: learn what happened meanwhile, or give that up for want of a quorum.

        What this node knew when it ended may hold sessions that were ended since.
        """
        with suppress(ServiceError):
            await self.read_barrier(timeout_s)
        self.is_caught_up = True

    async def read_barrier(self, timeout_s: float) -> None:
        """Wait until `state` includes all that any node acknowledged before this call.

        Raises:
          NoQuorum: no leader with a majority confirmed that in time.
          Unavailable: this node's consensus has stopped.
        """
        try:
            await self._raft.read_barrier(timeout_s)
        except RaftNoQuorum as error:
            raise NoQuorum(str(error)) from None
        except RaftError as error:
            raise Unavailable(str(error), code="CONSENSUS_FAILED") from None

    # Changing the state.

    async def propose(self, command: AnyCommand) -> Outcome:
        """Replicate a command and return its outcome.

        Raises:
          NoQuorum: it did not happen and will not.
          Unavailable: it may or may not have happened when this is raised.
          ServiceError: 409 UPGRADE_FIRST, during an upgrade, or STATE_TOO_LARGE; 413
            COMMAND_TOO_LARGE; nothing happened.
        """
        if self._raft.state_too_large and isinstance(command, GROWING):
            raise ServiceError(
                409,
                "STATE_TOO_LARGE",
                "the cluster's state has reached its limit, so nothing new is taken in; delete "
                "models, users or keys that nobody needs, and try again a minute later",
            )
        level = level_of(command)
        if level > 1 and (behind := self._members_below(level)):
            raise ServiceError(
                409,
                "UPGRADE_FIRST",
                f"{', '.join(behind)} would have to stop, because the version there does not know "
                "this change; upgrade first",
                {"nodes": behind},
            )
        proposal = Proposal(uuid.uuid4().hex, time.time(), command, level)
        try:
            return decode_outcome(await self._raft.propose(encode(proposal), PROPOSE_TIMEOUT_S))
        except CommandTooLarge as error:
            raise ServiceError(413, "COMMAND_TOO_LARGE", f"{error}; nothing was changed") from None
        except RaftNoQuorum as error:
            raise NoQuorum(f"{error}; nothing was changed") from None
        except OutcomeUnknown as error:
            raise Unavailable(str(error), code="OUTCOME_UNKNOWN") from None
        except RaftError as error:
            raise Unavailable(str(error), code="CONSENSUS_FAILED") from None

    def _members_below(self, level: int) -> list[str]:
        """The names of the members that are online and do not know commands of that level.

        Who is known by hearsay only is no older version: those beat to everybody.
        """
        presences = {n: self.heartbeats.presence(n) for n in self.other_members()}
        return [
            self.state.members[node_id].name
            for node_id, presence in presences.items()
            if presence.online and presence.beat.started_at and presence.beat.level < level
        ]

    async def require(self, command: AnyCommand) -> None:
        """Propose, and turn a rejection into the error that a client should see."""
        match await self.propose(command):
            case Rejected(code, message):
                status = 404 if code.endswith("_NOT_FOUND") else 409
                raise ServiceError(status, code, message)
            case Applied():
                return

    async def found(self, cluster_id: str, admin: User) -> None:
        """Make this node the first of a new cluster; the CA and all secrets are made here."""
        now = datetime.datetime.now(datetime.UTC)
        ca = make_ca(now)
        self._identity.install(
            issue_certificate(ca, self._identity.public_key, now), ca.certificate_pem
        )
        self._gate.refresh()
        founder = self._member(self.node_id, self._own_host(""), time.time())
        await self.require(FoundCluster(cluster_id, ca, secrets.token_bytes(32), founder, admin))

    # Membership.

    async def make_join_token(self, ttl_s: float) -> IssuedToken:
        """A token that lets nodes in for `ttl_s` seconds, and the command that uses it."""
        ca = self.state.ca
        assert ca is not None, "a founded cluster has a CA"
        token = Token(
            id=secrets.token_hex(TOKEN_ID_SIZE),
            secret=secrets.token_bytes(SECRET_SIZE),
            ca_hash=channel_binding(certificate_der(ca.certificate_pem)),
            expires_at=int(time.time() + ttl_s),
        )
        await self.require(
            AddJoinToken(JoinToken(token.id, token_key(token.secret), token.expires_at))
        )
        text = format_token(token)
        here = self.state.members[self.node_id].p2p_address
        return IssuedToken(text, token.expires_at, f"ollamad start --join {text}@{here}")

    async def admit(self, node_id: NodeId, address: str) -> None:
        """Let in a node that waits with a token: dial it and check that it is that node."""
        if node_id in self.state.members:
            raise ServiceError(409, "ALREADY_MEMBER", f"node {short(node_id)}… is a member already")
        if node_id in self.state.departed:
            raise ServiceError(
                409,
                DEPARTED_NODE,
                f"node {short(node_id)}… has left this cluster, and an id does not come back; "
                "start it again with --join, and use the id that it says then",
            )
        try:
            p2p_address = await find_p2p_address(address)
            await sponsor_waiting_node(self._gate, self.sponsor, node_id, p2p_address)
        except PeerUnreachable as error:
            raise ServiceError(
                503,
                "NODE_UNREACHABLE",
                f"{error}; start it with `ollamad start --join TOKEN` and check the address",
            ) from None
        except JoinRefused as error:
            raise ServiceError(400, error.code, str(error)) from None
        if node_id not in self.state.members:
            raise ServiceError(
                400, "JOIN_REFUSED", f"node {short(node_id)}… was not let in; see this node's log"
            )

    async def set_draining(self, node_id: NodeId, draining: bool) -> None:
        await self.require(SetDraining(node_id, draining))

    async def remove(
        self, node_id: NodeId, *, force: bool = False, timeout_s: float = HAND_OVER_TIMEOUT_S
    ) -> None:
        """Take a member out: it drains, its sole replicas move, it leaves the voters.

        With `force` nothing is waited for, and what only it holds is lost.
        """
        if node_id not in self.state.members:
            raise ServiceError(
                404, "NODE_NOT_FOUND", f"there is no node {short(node_id)}… in this cluster"
            )
        if len(self.state.members) == 1:
            raise ServiceError(
                409, "LAST_MEMBER", "the last node cannot leave; stop it instead, nothing is lost"
            )
        self._check_that_a_majority_stays(node_id)
        was_draining = self.state.members[node_id].draining
        await self.set_draining(node_id, True)
        try:
            if not force:
                await self.hand_over(node_id, timeout_s)
            await self._remove_voter(node_id)
            await self.require(RemoveMember(node_id))
        except BaseException:
            # What ended the removal must go on, also if there is no quorum to undo its beginning.
            with trio.move_on_after(PROPOSE_TIMEOUT_S, shield=True), suppress(ServiceError):
                if not was_draining:
                    await self.propose(SetDraining(node_id, False))
            raise

    def _check_that_a_majority_stays(self, leaving: NodeId) -> None:
        """Refuse before anything is moved what the leader would refuse in the end."""
        voters = self._raft.voters
        if leaving not in voters:
            return
        rest = voters - {leaving}
        away = sorted(
            self.state.members[voter].name if voter in self.state.members else short(voter)
            for voter in rest
            if voter != self.node_id and not self.is_online(voter)
        )
        if away and 2 * (len(rest) - len(away)) <= len(rest):
            raise ServiceError(
                409,
                "MAJORITY_AT_RISK",
                f"{', '.join(away)} is away, and without this node too no majority of the voters "
                "would be left; start it, or take it out first",
                {"away": away},
            )

    # Tasks.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep addresses known and, while leading, the voters right; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            nursery.start_soon(self._watch_departure)
            nursery.start_soon(self._watch_quorum)
            task_status.started()
            await self._keep_voters()

    async def _announce(self) -> None:
        """Keep the state right about where this node is and what it has; until cancelled.

        The network may come up after this node does, and addresses change while it runs.
        """
        while True:
            is_told = await self._announce_once()
            await trio.sleep(ADDRESS_CHECK_S if is_told else ANNOUNCE_RETRY_S)

    async def _announce_once(self) -> bool:
        """Tell the cluster about this node if the state says something else; whether it knows."""
        me = self.state.members.get(self.node_id)
        if me is None:
            return False
        # Who is alone was told its address by nobody; it is guessed anew.
        known = me.p2p_address.rpartition(":")[0] if self.other_members() else ""
        wanted = self._member(self.node_id, self._own_host(known), me.joined_at)
        update = UpdateMember(
            self.node_id,
            wanted.name,
            wanted.api_address,
            wanted.p2p_address,
            wanted.raft_address,
            wanted.capacity,
            wanted.version,
        )
        if update == self._told or msgspec.structs.replace(wanted, draining=me.draining) == me:
            return True
        if await self._tell_addresses(update):
            self._told = update  # not said again, though the state may have kept another name
            return True
        return False

    async def _tell_addresses(self, update: UpdateMember) -> bool:
        # Through another node if there is one: with a new address nobody can answer our own Raft.
        for node_id in self.other_members():
            try:
                with trio.fail_after(PROPOSE_TIMEOUT_S + 1):
                    if await self.mesh.call(node_id, "announce", update, bool):
                        return True
            except (PeerUnreachable, RemoteFailure, trio.TooSlowError) as error:
                log.debug("cannot announce through %s: %s", short(node_id), error)
        if self.voters() != [self.node_id]:
            return False
        try:
            return isinstance(await self.propose(update), Applied)
        except ServiceError:
            return False

    async def _on_announce(self, peer: NodeId, update: UpdateMember) -> bool:
        if update.id != peer:
            raise HandlerError("FORBIDDEN", "a node announces only itself")
        try:
            return isinstance(await self.propose(update), Applied)
        except ServiceError as error:
            raise HandlerError(error.code, str(error)) from None

    async def _watch_departure(self) -> None:
        known = False
        while True:
            changed = self.changes.next()
            if self.node_id in self.state.members:
                known = True
            elif known and self.node_id in self.state.departed:
                self.departed.set()
            await changed.wait()

    def on_recovered_elsewhere(self, peer: NodeId, incarnation: int) -> None:
        """A node proved that this cluster was recovered without us: depart."""
        if self.departed.is_set():
            return
        member = self.state.members.get(peer)
        log.error(
            "this cluster lost its majority and was recovered without this node on %s: node %s is "
            "of it now. This node's state of the cluster is put aside, its models stay",
            _date(incarnation / 1e9),
            member.name if member is not None else short(peer),
        )
        self.departed.set()

    def on_turned_away(self, peer: NodeId, word: Departed) -> None:
        """A member says that this node was removed, which is for good: depart."""
        state = self.state
        if self.departed.is_set() or not {peer, self.node_id} <= state.members.keys():
            return
        log.error(
            "this node was removed from the cluster on %s, says %s. Its state of the cluster is "
            "put aside, its models stay",
            _date(word.at),
            state.members[peer].name,
        )
        self.departed.set()

    async def _watch_quorum(self) -> None:
        """Say once that the quorum is lost and what to do, and once that it is back."""
        told = False
        while True:
            await trio.sleep(QUORUM_CHECK_INTERVAL_S)
            lost_s = self.quorum_lost_for_s
            if not told and lost_s >= QUORUM_NOTICE_S:
                log.error(
                    "no quorum for %.0f s: of %d voters these are missing: %s. Nothing can be "
                    "changed until a majority is back: start them. If they are lost for good, see "
                    '`ollamad recover` and "The majority is lost" in docs/operations.md',
                    lost_s,
                    len(self._raft.voters),
                    ", ".join(self._missing_voters()) or "none (they do not agree on a leader)",
                )
                told = True
            elif told and lost_s == 0:
                log.info("there is a quorum again")
                told = False

    def _missing_voters(self) -> list[str]:
        missing = []
        for node_id in self.voters():
            presence = self.presence(node_id)
            if not presence.online:
                member = self.state.members.get(node_id)
                seen = _date(presence.last_seen) if presence.last_seen else "not since the start"
                name = member.name if member is not None else short(node_id)
                why = self.mesh.incompatible.get(node_id, f"last seen: {seen}")
                missing.append(f"{name} ({why})")
        return missing

    async def _keep_voters(self) -> None:
        """While leading: make members voters, up to five, and replace those long gone."""
        away_since: dict[NodeId, float] = {}
        while True:
            await trio.sleep(MEMBERSHIP_INTERVAL_S)
            if not self._raft.is_leader or not self.state.cluster_id:
                away_since.clear()
                continue
            now = trio.current_time()
            for node_id in self.state.members:
                if self.is_online(node_id):
                    away_since.pop(node_id, None)
                else:
                    away_since.setdefault(node_id, now)
            try:
                await self._adjust_voters(
                    {n for n, since in away_since.items() if now - since > REPAIR_AFTER_S}
                )
            except RaftError as error:
                log.info("voters stay as they are for now: %s", error)

    async def _adjust_voters(self, long_gone: set[NodeId]) -> None:
        voters = set(self._raft.voters)
        members = self.state.members
        for node_id in voters - members.keys():
            log.info("removing %s from the voters: it is no member", short(node_id))
            await self._raft.remove_voter(node_id, CHANGE_TIMEOUT_S)
            return
        spare = sorted(
            (m.joined_at, m.id)
            for m in members.values()
            if m.id not in voters
            and not m.draining
            and self.is_online(m.id)
            and self._raft.caught_up(m.id)
        )
        full = len(voters) >= MAX_VOTERS
        if spare and not full:
            # An even number of voters survives no more than the odd number below it, but a new
            # cluster grows one by one, so every member counts until there are five.
            await self._raft.add_voter(spare[0][1], CHANGE_TIMEOUT_S)
            log.info("%s is a voter now", short(spare[0][1]))
        elif (gone := sorted(voters & long_gone)) and (spare or len(voters) % 2 == 0):
            # Where somebody takes its place; and without a dead voter an odd number is left, which
            # needs one vote less. It becomes a voter again when it returns.
            for node_id in gone:
                # The leader refuses to lose one that it needs, whatever its heartbeats say.
                with suppress(ChangeRefused):
                    await self._raft.remove_voter(node_id, CHANGE_TIMEOUT_S)
                    log.info("%s has been away for long and votes no more", short(node_id))
                    return

    async def _remove_voter(self, node_id: NodeId) -> None:
        """Have the leader take a node out of the voters, whoever leads meanwhile."""
        with trio.move_on_after(REMOVE_VOTER_TIMEOUT_S):
            while node_id in self._raft.voters:
                leader = self._raft.leader
                try:
                    if leader == self.node_id:
                        await self._raft.remove_voter(node_id, CHANGE_TIMEOUT_S)
                    elif leader is not None:
                        await self.mesh.call(leader, "voter.remove", node_id, bool)
                except (RaftError, PeerUnreachable, RemoteFailure) as error:
                    log.info("removing voter %s: %s", short(node_id), error)
                await trio.sleep(0.1)
            return
        if self.voters() == [node_id]:
            raise ServiceError(
                409,
                "LAST_VOTER",
                f"node {short(node_id)}… is the only voter, and no other node could become one: "
                "undrain or start one, and try again",
            )
        raise NoQuorum(f"node {short(node_id)}… could not be taken out of the voters in time")

    async def _on_remove_voter(self, peer: NodeId, node_id: NodeId) -> bool:
        member = self.state.members.get(node_id)
        if member is not None and not member.draining:
            raise HandlerError("NOT_DRAINING", "only a draining node leaves the voters")
        try:
            await self._raft.remove_voter(node_id, CHANGE_TIMEOUT_S)
        except RaftError as error:
            raise HandlerError("NO_QUORUM", str(error)) from None
        return True

    def _on_consensus_view(self, peer: NodeId, request: None) -> ConsensusView:
        raft = self._raft
        return ConsensusView(
            raft.term, raft.leader or "", raft.has_quorum, raft.log_end, tuple(self.voters())
        )

    # Joining, the sponsor's side.

    def _live_token(self, token_id: str) -> JoinToken | None:
        token = self.state.join_tokens.get(token_id)
        return token if token is not None and token.expires_at > time.time() else None

    async def _admit(self, request: JoinRequest, host: str) -> JoinReply:
        """Commit a new member and answer with what it needs to take part."""
        state = self.state
        if state.ca is None:
            raise JoinRefused("NOT_READY", "this node has no cluster itself yet")
        if request.node_id in self._raft.voters:
            # It comes without its log, and could vote a second time.
            raise JoinRefused(
                "ALREADY_MEMBER",
                f"{short(request.node_id)}… votes in this cluster already; take it out first with "
                "`ollama-dist cluster leave`, then start it again with --join, with a new key",
            )
        member = Member(
            id=request.node_id,
            name=request.name,
            api_address=_with_host(request.api_address, host),
            p2p_address=_with_host(request.p2p_address, host),
            raft_address=_with_host(request.raft_address, host),
            capacity=request.capacity,
            joined_at=time.time(),
            version=request.version,
        )
        try:
            outcome = await self.propose(AdmitMember(member, request.token_id))
        except ServiceError as error:
            raise JoinRefused(error.code, f"{error.message}; try again") from None
        if isinstance(outcome, Rejected):
            raise JoinRefused(outcome.code, outcome.message)
        now = datetime.datetime.now(datetime.UTC)
        online_first = sorted(
            (m for m in state.members.values() if m.id != member.id),
            key=lambda m: not self.is_online(m.id),
        )
        return JoinReply(
            cluster_id=state.cluster_id,
            ca_certificate_pem=state.ca.certificate_pem,
            certificate_pem=issue_certificate(state.ca, request.public_key, now, state.incarnation),
            seeds=tuple(
                Seed(m.id, m.p2p_address, m.raft_address) for m in online_first[:MAX_SEEDS]
            ),
            voters=tuple(self.voters()),
        )

    # Addresses.

    def _member(self, node_id: NodeId, host: str, joined_at: float) -> Member:
        api, p2p, raft = (
            _with_host(f"{_specific(listen[0])}:{listen[1]}", host)
            for listen in (self._addresses.api, self._addresses.p2p, self._addresses.raft)
        )
        return Member(
            id=node_id,
            name=self._name,
            api_address=api,
            p2p_address=p2p,
            raft_address=raft,
            capacity=self._capacity,
            joined_at=joined_at,
            version=ollamad.__version__,
        )

    def _own_host(self, known: str) -> str:
        """The host to advertise: what was configured, else what is known and still ours."""
        return self._addresses.advertise or advertised_host(known.strip("[]"))

    def _presence_changed(self, node_id: NodeId, online: bool) -> None:
        if not online:
            self.mesh.drop(node_id)
        self.changes.notify()


async def _nothing_to_hand_over(node_id: NodeId, timeout_s: float) -> None:
    await trio.lowlevel.checkpoint()


class Changes:
    """Wakes whoever waits for the state or the presence of nodes to change."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def next(self) -> trio.Event:
        """Set at the next change after this call. Take it before looking, then wait."""
        return self._event

    def notify(self) -> None:
        self._event.set()
        self._event = trio.Event()


async def find_p2p_address(api_address: str) -> str:
    """Where the node with that API address listens for other nodes; it says so in `/version`.

    Raises:
      PeerUnreachable: nobody answers there, or somebody else.
    """
    url = f"http://{api_address}/api/v1/version"
    try:
        async with httpx.AsyncClient(timeout=3.0, trust_env=False) as client:
            answer = msgspec.json.decode((await client.get(url)).content, type=_Version)
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerUnreachable(
            f"no ollamad answers at {api_address}: {str(error) or type(error).__name__}"
        ) from None
    return f"{api_address.rpartition(':')[0]}:{answer.p2p_port}"


class _Version(msgspec.Struct):
    p2p_port: int


def join_addresses(addresses: Addresses) -> tuple[str, str, str]:
    """API, P2P and Raft address for a join request; no host where the sponsor knows better."""
    api, p2p, raft = (
        f"{addresses.advertise or _specific(host)}:{port}"
        for host, port in (addresses.api, addresses.p2p, addresses.raft)
    )
    return api, p2p, raft


def advertised_host(known: str) -> str:
    """The address of this host that others use: the known one while it is still here.

    Else the one that the way to the rest of the world begins at, for bridges of containers lead
    nowhere; loopback only where there is nothing else.
    """
    outside = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    for host in (known, _routed_host(), *outside):
        if host in outside:
            return host
    return "127.0.0.1"


def _routed_host() -> str:
    """The address that this host would send from to hosts beyond; empty if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(BEYOND)  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _date(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _specific(host: str) -> str:
    """The host that a socket listens on, empty if it listens on all."""
    return "" if host in ("0.0.0.0", "::", "") else host


def _with_host(address: str, host: str) -> str:
    own, _, port = address.rpartition(":")
    chosen = (own or host).strip("[]")
    return f"[{chosen}]:{port}" if ":" in chosen else f"{chosen}:{port}"
