"""The cluster as one node sees it: founding, tokens, admission, removal, voters, addresses."""

import datetime
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ollamad import cluster as cluster_module
from ollamad.api.services import NoQuorum, ServiceError, Unavailable
from ollamad.cluster import (
    ADDRESS_CHECK_S,
    CONSENSUS_VIEW,
    MAX_VOTERS,
    QUORUM_NOTICE_S,
    REPAIR_AFTER_S,
    Addresses,
    Cluster,
    ConsensusView,
    _with_host,
    advertised_host,
    find_p2p_address,
    join_addresses,
)
from ollamad.core.commands import (
    AddJoinToken,
    AdmitMember,
    Applied,
    AskReplicas,
    DeleteUser,
    PutUser,
    RecoverCluster,
    Rejected,
    SetDraining,
    UpdateMember,
)
from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.state import Capacity, JoinToken, User
from ollamad.machine import Machine
from ollamad.peers.identity import Identity, certificate_der, peer_certificate
from ollamad.peers.link import RemoteFailure
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import PeerUnreachable
from ollamad.raft.errors import CommandTooLarge, OutcomeUnknown, RaftError
from ollamad.raft.errors import NoQuorum as RaftNoQuorum
from ollamad.raft.recovery import LogEnd
from ollamad.wire.join import JoinRefused, JoinRequest, channel_binding, parse_token
from ollamad.wire.mux import Departed
from tests.fakes.api_services import member
from tests.fakes.peer_net import PeerNet
from tests.fakes.raft_fake import FakeRaft

KEYS = {name: name.encode() * 32 for name in "BCDEFGH"}
B, C, D, E, F, G, H = (node_id_of(key) for key in KEYS.values())
CAPACITY = Capacity(4, 1 << 30, 1 << 40)
ADMIN = User("admin", "hash", "admin", 1.0)


class FakeGate:
    def __init__(self) -> None:
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1


class Node:
    """A cluster of this node, with fakes around it."""

    def __init__(self, directory: Path, mesh: Mesh, identity: Identity) -> None:
        self.identity = identity
        self.machine = Machine()
        self.raft = FakeRaft(identity.node_id, self.machine)
        self.gate = FakeGate()
        self.mesh = mesh
        self.cluster = Cluster(
            identity=identity,
            name="one",
            addresses=Addresses(("10.0.0.1", 8080), ("10.0.0.1", 9000), ("10.0.0.1", 7000)),
            capacity=CAPACITY,
            gate=self.gate,  # type: ignore[arg-type]
            mesh=mesh,
            raft=self.raft,  # type: ignore[arg-type]
            machine=self.machine,
            own_beat=lambda: Beat(1.0, Usage()),
        )
        self.id = identity.node_id
        self.offline: set[NodeId] = set()
        self.beat = Beat(1.0, Usage())  # of everybody else
        self.cluster.heartbeats.presence = (  # type: ignore[method-assign]
            lambda node_id: Presence(node_id not in self.offline, 1.0, self.beat)
        )

    async def let_in(self, *nodes: NodeId) -> None:
        token = JoinToken("t", b"key", 2**40)
        await self.cluster.require(AddJoinToken(token))
        for count, node_id in enumerate(nodes):
            wanted = member(node_id, f"n{node_id[:9]}", joined_at=float(count))
            await self.cluster.require(AdmitMember(wanted, "t"))

    @property
    def members(self) -> set[NodeId]:
        return set(self.cluster.state.members)


@pytest.fixture
async def net(nursery: trio.Nursery) -> PeerNet:
    return PeerNet(nursery)


@pytest.fixture
async def node(net: PeerNet, tmp_path: Path) -> Node:
    identity = Identity.load_or_create(tmp_path / "identity")
    found = Node(tmp_path, await net.add(identity.node_id), identity)
    await found.cluster.found("c1", ADMIN)
    return found


def request(**changes: Any) -> JoinRequest:
    plain = JoinRequest(
        node_id=B,
        public_key=KEYS["B"],
        name="two",
        api_address=":8080",
        p2p_address=":9000",
        raft_address="192.0.2.9:7000",
        capacity=CAPACITY,
        version="1",
        protocol=1,
        token_id="t",
        now=1.0,
    )
    return msgspec.structs.replace(plain, **changes)


async def test_founding_makes_a_member_with_a_certificate_of_the_new_ca(node: Node) -> None:
    state = node.cluster.state
    assert (state.cluster_id, set(state.members), state.users) == (
        "c1",
        {node.id},
        {"admin": ADMIN},
    )
    assert node.identity.is_member
    assert node.gate.refreshed == 1
    assert state.ca is not None
    assert node.identity.ca_der == certificate_der(state.ca.certificate_pem)
    assert len(state.jwt_key) == 32
    me = state.members[node.id]
    assert (me.api_address, me.p2p_address) == ("10.0.0.1:8080", "10.0.0.1:9000")
    node.identity.check_validity(datetime.datetime.now(datetime.UTC))


async def test_a_cluster_is_founded_once(node: Node) -> None:
    with pytest.raises(ServiceError) as caught:
        await node.cluster.found("c2", ADMIN)
    assert (caught.value.status, caught.value.code) == (409, "ALREADY_FOUNDED")


@pytest.mark.parametrize(
    ("failure", "error", "code"),
    [
        (RaftNoQuorum("nobody leads"), NoQuorum, "NO_QUORUM"),
        (OutcomeUnknown("late"), Unavailable, "OUTCOME_UNKNOWN"),
        (CommandTooLarge("large"), ServiceError, "COMMAND_TOO_LARGE"),
    ],
)
async def test_what_consensus_says_becomes_an_answer(
    node: Node, failure: RaftError, error: type[ServiceError], code: str
) -> None:
    node.raft.failure = failure
    with pytest.raises(error) as caught:
        await node.cluster.propose(DeleteUser("admin"))
    status = 413 if code == "COMMAND_TOO_LARGE" else 503
    assert (caught.value.code, caught.value.status) == (code, status)
    assert "admin" in node.cluster.state.users


async def test_rejections_become_errors(node: Node) -> None:
    assert isinstance(await node.cluster.propose(DeleteUser("x")), Rejected)
    with pytest.raises(ServiceError) as caught:
        await node.cluster.require(DeleteUser("x"))
    assert (caught.value.status, caught.value.code) == (404, "USER_NOT_FOUND")


async def test_a_state_that_is_too_large_takes_in_nothing_new(node: Node) -> None:
    node.raft.state_too_large = True
    before = node.machine.state.fingerprint()
    with pytest.raises(ServiceError, match="delete models, users or keys") as caught:
        await node.cluster.propose(PutUser(User("new", "h", "viewer", 1.0)))
    assert (caught.value.status, caught.value.code) == (409, "STATE_TOO_LARGE")
    assert node.machine.state.fingerprint() == before
    assert isinstance(await node.cluster.propose(SetDraining(node.id, True)), Applied)


async def test_every_proposal_has_an_id_of_its_own(node: Node) -> None:
    for _ in range(2):
        await node.cluster.propose(SetDraining(node.id, False))
    assert len(set(node.raft.proposals)) == len(node.raft.proposals)


async def test_what_an_older_member_cannot_carry_out_waits_for_its_upgrade(node: Node) -> None:
    await node.let_in(B)
    assert isinstance(await node.cluster.propose(AskReplicas("m", 2)), Rejected)  # by hearsay
    node.beat = Beat(1.0, Usage(), started_at=1.0)
    before = node.machine.state.fingerprint()
    with pytest.raises(ServiceError, match="upgrade first") as caught:
        await node.cluster.propose(AskReplicas("m", 2))
    assert (caught.value.status, caught.value.code) == (409, "UPGRADE_FIRST")
    assert caught.value.details == {"nodes": [f"n{B[:9]}"]}
    assert node.machine.state.fingerprint() == before
    node.offline = {B}  # it stops when it comes back, and says why
    assert isinstance(await node.cluster.propose(AskReplicas("m", 2)), Rejected)


async def test_a_join_token_pins_the_ca_and_is_kept_as_a_key_only(node: Node) -> None:
    issued = await node.cluster.make_join_token(60)
    token = parse_token(issued.token)
    assert token.ca_hash == channel_binding(node.identity.ca_der)
    [kept] = node.cluster.state.join_tokens.values()
    assert (kept.id, kept.key, kept.expires_at) == (token.id, token.key, token.expires_at)
    assert token.secret not in node.raft.proposals[-1]
    assert issued.command == f"ollamad start --join {issued.token}@10.0.0.1:9000"
    assert (await node.cluster.make_join_token(60)).token != issued.token


async def test_a_token_that_has_expired_is_none(node: Node) -> None:
    await node.cluster.require(AddJoinToken(JoinToken("old", b"", 1.0)))
    await node.cluster.require(AddJoinToken(JoinToken("new", b"", 2.0**40)))
    assert node.cluster._live_token("old") is None
    assert node.cluster._live_token("no-such") is None
    assert node.cluster._live_token("new") is not None


async def test_a_new_member_gets_what_it_needs(node: Node) -> None:
    await node.let_in(C)
    node.offline = {C}
    reply = await node.cluster._admit(request(), "192.0.2.1")
    assert peer_certificate(certificate_der(reply.certificate_pem)).node_id == B
    assert certificate_der(reply.ca_certificate_pem) == node.identity.ca_der
    assert [seed.id for seed in reply.seeds] == [node.id, C], "who is online comes first"
    assert reply.voters == (node.id,)
    found = node.cluster.state.members[B]
    assert found.api_address == "192.0.2.1:8080"
    assert found.raft_address == "192.0.2.9:7000", "what it says itself counts more"


@pytest.mark.parametrize(
    ("failure", "changes", "code"),
    [
        (RaftNoQuorum("nobody leads"), {}, "NO_QUORUM"),
        (OutcomeUnknown("late"), {}, "OUTCOME_UNKNOWN"),
        (None, {"token_id": "no-such"}, "TOKEN_EXPIRED"),
        (None, {"name": "one"}, "NAME_TAKEN"),
    ],
)
async def test_who_is_not_let_in_hears_why(
    node: Node, failure: RaftError | None, changes: dict[str, str], code: str
) -> None:
    await node.let_in()
    node.raft.failure = failure
    with pytest.raises(JoinRefused) as caught:
        await node.cluster._admit(request(**changes), "192.0.2.1")
    assert caught.value.code == code
    assert B not in node.members


async def test_a_voter_is_not_let_in_again(node: Node) -> None:
    await node.let_in(B)
    node.raft.voters |= {B}
    with pytest.raises(JoinRefused, match="cluster leave") as caught:
        await node.cluster._admit(request(), "192.0.2.1")
    assert caught.value.code == "ALREADY_MEMBER"
    # Who got no answer and is no voter tries again.
    node.raft.voters -= {B}
    await node.cluster._admit(request(name="n" + B[:9]), "192.0.2.1")


async def test_who_left_is_not_let_in_again(node: Node) -> None:
    await node.let_in(B)
    await node.cluster.remove(B)
    with pytest.raises(JoinRefused, match="makes a new key") as caught:
        await node.cluster._admit(request(), "192.0.2.1")
    assert caught.value.code == "DEPARTED_NODE"
    with pytest.raises(ServiceError, match="--join") as refused:
        await node.cluster.admit(B, "192.0.2.1:8080")
    assert (refused.value.status, refused.value.code) == (409, "DEPARTED_NODE")


async def test_a_node_without_a_cluster_lets_nobody_in(net: PeerNet, tmp_path: Path) -> None:
    identity = Identity.load_or_create(tmp_path / "x")
    node = Node(tmp_path, await net.add(identity.node_id), identity)
    with pytest.raises(JoinRefused, match="no cluster"):
        await node.cluster._admit(request(), "h")


async def test_admitting_who_is_a_member_or_cannot_be_reached(node: Node) -> None:
    with pytest.raises(ServiceError) as caught:
        await node.cluster.admit(node.id, "10.0.0.1:8080")
    assert (caught.value.status, caught.value.code) == (409, "ALREADY_MEMBER")
    for address in ("127.0.0.1:1", "no host", "", "127.0.0.1"):
        with pytest.raises(ServiceError) as caught:
            await node.cluster.admit(B, address)
        assert (caught.value.status, caught.value.code) == (503, "NODE_UNREACHABLE")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"p2p_port": 9001, "version": "1"}', 9001),
        (b'{"version": "1"}', None),
        (b"<html>", None),
        (b"\xff\xfe", None),
        (b'{"p2p_port": "\xff"}', None),
        (b"", None),
    ],
)
async def test_where_a_waiting_node_listens(
    nursery: trio.Nursery, body: bytes, expected: int | None
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(10_000)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    listeners = await nursery.start(trio.serve_tcp, serve, 0)
    port = listeners[0].socket.getsockname()[1]
    if expected is None:
        with pytest.raises(PeerUnreachable, match="no ollamad answers"):
            await find_p2p_address(f"127.0.0.1:{port}")
    else:
        assert await find_p2p_address(f"127.0.0.1:{port}") == f"127.0.0.1:{expected}"


# Removal.


async def test_a_member_drains_hands_over_leaves_the_voters_and_is_gone(node: Node) -> None:
    await node.let_in(B)
    node.raft.voters |= {B}
    steps = list[tuple[str, bool, bool]]()

    async def hand_over(node_id: NodeId, timeout_s: float) -> None:
        await trio.lowlevel.checkpoint()
        steps.append((node_id, node.cluster.state.members[B].draining, B in node.raft.voters))

    node.cluster.hand_over = hand_over
    await node.cluster.remove(B)
    assert steps == [(B, True, True)]
    assert node.members == {node.id}
    assert B in node.cluster.state.departed
    assert node.raft.voters == {node.id}


async def test_a_removal_by_force_waits_for_nothing(node: Node) -> None:
    await node.let_in(B)
    handed = list[NodeId]()

    async def hand_over(node_id: NodeId, timeout_s: float) -> None:
        handed.append(node_id)

    node.cluster.hand_over = hand_over
    await node.cluster.remove(B, force=True)
    assert handed == []
    assert node.members == {node.id}


async def test_nobody_is_taken_out_whom_the_majority_needs(node: Node) -> None:
    for other in (B, C):
        await node.let_in(other)
    node.raft.voters |= {B, C}
    node.offline = {C}
    for force in (False, True):
        with pytest.raises(ServiceError, match="no majority of the voters") as caught:
            await node.cluster.remove(B, force=force)
        assert (caught.value.status, caught.value.code) == (409, "MAJORITY_AT_RISK")
        assert caught.value.details == {"away": [node.cluster.state.members[C].name]}
    assert not node.cluster.state.members[B].draining, "nothing was begun"
    await node.cluster.remove(C, force=True)
    await node.cluster.remove(B, force=True)


async def test_the_only_voter_cannot_be_removed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "REMOVE_VOTER_TIMEOUT_S", 0.05)
    await node.let_in(B)
    node.raft.refusals = 999
    with pytest.raises(ServiceError, match="undrain or start one") as caught:
        await node.cluster.remove(node.id)
    assert (caught.value.status, caught.value.code) == (409, "LAST_VOTER")
    assert node.id in node.members
    assert not node.cluster.state.members[node.id].draining


async def test_who_cannot_be_removed(node: Node) -> None:
    for node_id, status, code in ((B, 404, "NODE_NOT_FOUND"), (node.id, 409, "LAST_MEMBER")):
        with pytest.raises(ServiceError) as caught:
            await node.cluster.remove(node_id)
        assert (caught.value.status, caught.value.code) == (status, code)
    assert not node.cluster.state.members[node.id].draining


@pytest.mark.parametrize("was_draining", [False, True])
async def test_a_removal_that_fails_takes_the_draining_back(node: Node, was_draining: bool) -> None:
    await node.let_in(B)
    await node.cluster.set_draining(B, was_draining)

    async def fail(node_id: NodeId, timeout_s: float) -> None:
        raise ServiceError(409, "SOLE_REPLICA", "no")

    node.cluster.hand_over = fail
    with pytest.raises(ServiceError, match="no"):
        await node.cluster.remove(B)
    assert node.cluster.state.members[B].draining is was_draining


async def test_a_cancelled_removal_stays_cancelled_even_without_quorum(node: Node) -> None:
    await node.let_in(B)

    async def hang(node_id: NodeId, timeout_s: float) -> None:
        node.raft.failure = RaftNoQuorum("gone")
        await trio.sleep_forever()

    node.cluster.hand_over = hang
    with trio.move_on_after(0.02) as scope:
        await node.cluster.remove(B)
    assert scope.cancelled_caught
    assert B in node.members


async def test_the_reason_of_a_failed_removal_is_not_hidden_by_a_lost_quorum(node: Node) -> None:
    await node.let_in(B)

    async def fail(node_id: NodeId, timeout_s: float) -> None:
        node.raft.failure = RaftNoQuorum("gone")
        raise ServiceError(409, "SOLE_REPLICA", "no")

    node.cluster.hand_over = fail
    with pytest.raises(ServiceError) as caught:
        await node.cluster.remove(B)
    assert caught.value.code == "SOLE_REPLICA"


async def test_voters_are_removed_through_whoever_leads(node: Node, net: PeerNet) -> None:
    await node.let_in(B, C)
    node.raft.voters |= {B}
    node.raft.leader, node.raft.is_leader = C, False
    leader = await net.add(C)
    asked = list[NodeId]()

    def remove(peer: NodeId, node_id: NodeId) -> bool:
        asked.append(node_id)
        node.raft.voters -= {node_id}
        return True

    leader.answer("voter.remove", NodeId, remove)
    await node.cluster.remove(B)
    assert asked == [B]


async def test_a_refused_change_of_voters_is_tried_again(node: Node) -> None:
    await node.let_in(B)
    node.raft.voters |= {B}
    node.raft.refusals = 1
    await node.cluster.remove(B)
    assert node.raft.changes == [("remove", B)]


async def test_a_voter_that_cannot_be_removed_in_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "REMOVE_VOTER_TIMEOUT_S", 0.05)
    await node.let_in(B)
    node.raft.voters |= {B}
    node.raft.leader = None
    with pytest.raises(NoQuorum, match="out of the voters"):
        await node.cluster.remove(B)
    assert B in node.members
    assert not node.cluster.state.members[B].draining


async def test_only_a_draining_node_may_be_taken_out_of_the_voters_by_a_peer(
    node: Node, net: PeerNet
) -> None:
    await node.let_in(B)
    peer = await net.add(B)
    with pytest.raises(RemoteFailure) as caught:
        await peer.call(node.id, "voter.remove", B, bool)
    assert caught.value.code == "NOT_DRAINING"
    await node.cluster.set_draining(B, True)
    assert await peer.call(node.id, "voter.remove", B, bool)
    node.raft.refusals = 1
    with pytest.raises(RemoteFailure) as caught:
        await peer.call(node.id, "voter.remove", B, bool)
    assert caught.value.code == "NO_QUORUM"


# Announcements.


def update(node_id: NodeId) -> UpdateMember:
    return UpdateMember(node_id, "new", "a:1", "a:2", "a:3", CAPACITY, "2")


async def test_a_node_announces_itself_and_nobody_else(node: Node, net: PeerNet) -> None:
    await node.let_in(B)
    peer = await net.add(B)
    assert await peer.call(node.id, "announce", update(B), bool)
    assert node.cluster.state.members[B].p2p_address == "a:2"
    with pytest.raises(RemoteFailure) as caught:
        await peer.call(node.id, "announce", update(node.id), bool)
    assert caught.value.code == "FORBIDDEN"
    assert node.cluster.state.members[node.id].p2p_address == "10.0.0.1:9000"
    node.raft.failure = RaftNoQuorum("gone")
    with pytest.raises(RemoteFailure) as caught:
        await peer.call(node.id, "announce", update(B), bool)
    assert caught.value.code == "NO_QUORUM"


async def test_new_addresses_are_told_through_another_node_first(
    node: Node, net: PeerNet, nursery: trio.Nursery
) -> None:
    await node.let_in(B, C)
    peer = await net.add(C)  # B cannot be reached
    told = list[UpdateMember]()

    def announce(sender: NodeId, command: UpdateMember) -> bool:
        told.append(command)
        return True

    peer.answer("announce", UpdateMember, announce)
    node.cluster._addresses = Addresses(("10.0.0.7", 8080), ("10.0.0.7", 9000), ("10.0.0.7", 7000))
    with trio.fail_after(2):
        assert await node.cluster._announce_once()
    assert [command.p2p_address for command in told] == ["10.0.0.7:9000"]


async def test_a_cluster_of_one_notes_its_new_address_itself(node: Node) -> None:
    node.cluster._addresses = Addresses(("10.0.0.7", 8080), ("10.0.0.7", 9000), ("10.0.0.7", 7000))
    with trio.fail_after(2):
        assert await node.cluster._announce_once()
    assert node.cluster.state.members[node.id].raft_address == "10.0.0.7:7000"
    before = len(node.raft.proposals)
    assert await node.cluster._announce_once()
    assert len(node.raft.proposals) == before, "nothing new, nothing to say"


# Voters.


@pytest.mark.parametrize(
    ("members", "voters", "offline", "behind", "draining", "long_gone", "expected"),
    [
        ([], [], [], [], [], [], []),
        ([B], [], [], [], [], [], [("add", B)]),
        ([B, C], [], [], [], [], [], [("add", B)]),  # who joined first
        ([B, C], [], [B], [], [], [], [("add", C)]),
        ([B], [], [], [B], [], [], []),
        ([B], [], [], [], [B], [], []),
        ([B], [C], [], [], [], [], [("remove", C)]),  # no member any more
        ([B, C, D, E, F], [B, C, D, E], [], [], [], [], []),  # five are enough
        ([B, C, D, E, F], [B, C, D, E], [C], [], [], [], []),  # away for a moment
        ([B, C, D, E, F], [B, C, D, E], [C], [], [], [C], [("remove", C)]),
        ([B, C, D, E], [B, C, D, E], [C], [], [], [C], []),  # nobody could take its place
        ([B, C, D, E, F], [B, C, D, E], [C, F], [], [], [C, F], []),
        # Fewer than five: the new one comes first, then the dead one goes.
        ([B, C, D], [B, C], [C], [], [], [C], [("add", D)]),
        ([B, C, D], [B, C, D], [C], [], [], [C], [("remove", C)]),
        ([B, C, D], [B, C, D], [C], [], [], [], []),  # away for a moment
        ([B, C], [B, C], [C], [], [], [C], []),  # two of three are as good as two of two
        # Every fifth member of seven, and never a sixth.
        ([B, C, D, E, F, G, H], [B, C, D], [], [], [], [], [("add", E)]),
        ([B, C, D, E, F, G, H], [B, C, D, E], [], [], [], [], []),
    ],
)
async def test_who_votes(
    node: Node,
    members: list[NodeId],
    voters: list[NodeId],
    offline: list[NodeId],
    behind: list[NodeId],
    draining: list[NodeId],
    long_gone: list[NodeId],
    expected: list[tuple[str, NodeId]],
) -> None:
    await node.let_in(*members)
    for node_id in draining:
        await node.cluster.set_draining(node_id, True)
    node.raft.voters |= set(voters)
    node.raft.behind = set(behind)
    node.offline = set(offline)
    await node.cluster._adjust_voters(set(long_gone))
    assert node.raft.changes == expected


async def test_the_leader_keeps_the_voters_right(
    node: Node, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    members = [B, C, D, E, F]
    await node.let_in(*members)
    node.raft.is_leader = False
    nursery.start_soon(node.cluster._keep_voters)
    await trio.sleep(5)
    assert node.raft.changes == []
    node.raft.is_leader = True
    node.raft.refusals = 1
    await trio.sleep(5)
    assert len(node.raft.voters) == MAX_VOTERS
    assert "another change runs" in caplog.text
    [spare] = set(members) - node.raft.voters
    gone = next(iter(node.raft.voters - {node.id}))
    node.offline = {gone}
    await trio.sleep(REPAIR_AFTER_S - 2)
    assert gone in node.raft.voters
    await trio.sleep(4)
    assert gone not in node.raft.voters
    assert spare in node.raft.voters
    nursery.cancel_scope.cancel()


# The majority is lost.


async def test_a_lost_quorum_is_told_once_with_what_to_do_and_so_is_its_return(
    node: Node, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await node.let_in(B, C)
    node.raft.voters |= {B, C}
    nursery.start_soon(node.cluster._watch_quorum)
    node.raft.has_quorum = False
    node.offline = {B, C}
    node.cluster.heartbeats.presence = (  # type: ignore[method-assign]
        lambda node_id: Presence(False, 1_700_000_000.0 if node_id == B else 0.0, Beat(1, Usage()))
    )
    await trio.sleep(QUORUM_NOTICE_S - 1)
    assert caplog.records == []
    await trio.sleep(60)
    [record] = caplog.records
    told = record.getMessage()
    names = {n: node.cluster.state.members[n].name for n in (B, C)}
    assert f"{names[B]} (last seen: 2023-11-14 22:13:20 UTC)" in told
    assert f"{names[C]} (last seen: not since the start)" in told
    assert "`ollamad recover`" in told
    node.raft.has_quorum = True
    await trio.sleep(60)
    assert [r.getMessage() for r in caplog.records[1:]] == ["there is a quorum again"]
    node.raft.has_quorum = False
    await trio.sleep(5)
    node.raft.has_quorum = True
    await trio.sleep(5)
    assert len(caplog.records) == 2, "an election is nothing to tell of"
    nursery.cancel_scope.cancel()


async def test_a_node_that_the_recovery_left_behind_departs_and_says_so_once(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    await node.let_in(B)
    node.cluster.on_recovered_elsewhere(B, 1_700_000_000 * 10**9)
    node.cluster.on_recovered_elsewhere(C, 1_700_000_000 * 10**9)
    assert node.cluster.departed.is_set()
    [record] = caplog.records
    assert "recovered without this node on 2023-11-14 22:13:20 UTC" in record.getMessage()
    assert node.cluster.state.members[B].name in record.getMessage()


@pytest.mark.parametrize(
    ("teller", "departs"),
    [
        (B, True),
        (C, False),  # no member by what we know
    ],
)
async def test_a_member_may_say_that_this_node_was_removed(
    node: Node, caplog: pytest.LogCaptureFixture, teller: NodeId, departs: bool
) -> None:
    await node.let_in(B)
    node.mesh.on_turned_away(teller, Departed(1_700_000_000.0))
    node.mesh.on_turned_away(teller, Departed(1_700_000_000.0))
    assert node.cluster.departed.is_set() is departs
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == departs
    if departs:
        assert "this node was removed from the cluster on 2023-11-14 22:13:20 UTC" in told[0]
        assert node.cluster.state.members[B].name in told[0]


async def test_a_node_that_does_not_know_itself_as_a_member_waits(node: Node) -> None:
    await node.let_in(B)
    del node.cluster.state.members[node.id]
    node.cluster.on_turned_away(B, Departed(1.0))
    assert not node.cluster.departed.is_set()


async def test_who_wants_to_recover_is_told_what_this_node_sees(node: Node, net: PeerNet) -> None:
    node.raft.voters |= {B}
    asker = await net.add(B)
    view = await asker.call(node.id, CONSENSUS_VIEW, None, ConsensusView)
    assert view == ConsensusView(1, node.id, True, LogEnd(1, 3), tuple(sorted((node.id, B))))
    node.raft.leader, node.raft.has_quorum = None, False
    view = await asker.call(node.id, CONSENSUS_VIEW, None, ConsensusView)
    assert (view.leader, view.has_quorum) == ("", False)


async def test_a_certificate_is_of_the_clusters_incarnation(node: Node) -> None:
    await node.let_in()
    await node.cluster.require(RecoverCluster(1_700_000_000))
    reply = await node.cluster._admit(request(), "192.0.2.1")
    assert peer_certificate(certificate_der(reply.certificate_pem)).incarnation == 1_700_000_000


async def test_the_only_voter_notes_its_new_address_though_there_are_members(node: Node) -> None:
    await node.let_in(B)
    node.cluster._addresses = Addresses(("10.0.0.7", 8080), ("10.0.0.7", 9000), ("10.0.0.7", 7000))
    with trio.fail_after(2):
        assert await node.cluster._announce_once()
    assert node.cluster.state.members[node.id].raft_address == "10.0.0.7:7000"


# What is read.


async def test_how_long_there_has_been_no_quorum(node: Node, autojump_clock: MockClock) -> None:
    cluster = node.cluster
    assert cluster.quorum_lost_for_s == 0
    node.raft.has_quorum = False
    assert cluster.quorum_lost_for_s == 0
    await trio.sleep(7)
    assert cluster.quorum_lost_for_s == pytest.approx(7)
    node.raft.has_quorum = True
    assert cluster.quorum_lost_for_s == 0


async def test_a_node_is_always_online_to_itself(node: Node) -> None:
    node.offline = {node.id, B}
    assert node.cluster.is_online(node.id)
    assert node.cluster.presence(node.id).online
    assert not node.cluster.is_online(B)


async def test_a_node_notices_that_it_is_no_member_any_more(
    node: Node, nursery: trio.Nursery
) -> None:
    await node.let_in(B)
    nursery.start_soon(node.cluster._watch_departure)
    await wait_all_tasks_blocked()
    assert not node.cluster.departed.is_set()
    await node.cluster.remove(node.id)
    await wait_all_tasks_blocked()
    assert node.cluster.departed.is_set()
    nursery.cancel_scope.cancel()


async def test_changes_wake_whoever_took_the_event_before(node: Node) -> None:
    event = node.cluster.changes.next()
    await node.cluster.set_draining(node.id, True)
    assert event.is_set()
    assert not node.cluster.changes.next().is_set()


# Addresses.


@pytest.mark.parametrize(
    ("address", "host", "expected"),
    [
        (":9000", "10.0.0.1", "10.0.0.1:9000"),
        ("10.0.0.2:9000", "10.0.0.1", "10.0.0.2:9000"),
        (":9000", "fd00::1", "[fd00::1]:9000"),
        (":9000", "[fd00::1]", "[fd00::1]:9000"),
        ("fd00::1:9000", "10.0.0.1", "[fd00::1]:9000"),
        ("[fd00::1]:9000", "10.0.0.1", "[fd00::1]:9000"),
        ("host.lan:9000", "", "host.lan:9000"),
    ],
)
def test_hosts_are_filled_in(address: str, host: str, expected: str) -> None:
    assert _with_host(address, host) == expected


def test_what_a_joiner_says_of_its_addresses() -> None:
    everywhere = Addresses(("0.0.0.0", 1), ("::", 2), ("10.0.0.1", 3))
    assert join_addresses(everywhere) == (":1", ":2", "10.0.0.1:3")
    told = Addresses(("0.0.0.0", 1), ("::", 2), ("10.0.0.1", 3), advertise="h")
    assert join_addresses(told) == ("h:1", "h:2", "h:3")


class Interfaces:
    """The addresses of this host's interfaces, and which one the way to elsewhere begins at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses = ["127.0.0.1"]
        self.routed = ""
        monkeypatch.setattr(cluster_module, "_routed_host", lambda: self.routed)
        monkeypatch.setattr(cluster_module.psutil, "net_if_addrs", self._read)

    def _read(self) -> dict[str, list[Any]]:
        family = cluster_module.socket.AF_INET
        return {
            f"eth{number}": [SimpleNamespace(family=family, address=address)]
            for number, address in enumerate(self.addresses)
        }


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> Interfaces:
    return Interfaces(monkeypatch)


def test_the_host_that_others_use(interfaces: Interfaces) -> None:
    assert advertised_host("10.0.0.1") == "127.0.0.1"
    interfaces.addresses += ["10.0.0.1", "10.0.0.2"]
    assert advertised_host("10.0.0.2") == "10.0.0.2"
    assert advertised_host("10.9.9.9") == "10.0.0.1"
    assert advertised_host("") == "10.0.0.1"
    assert advertised_host("127.0.0.1") == "10.0.0.1", "others do not reach that one"
    interfaces.routed = "10.0.0.2"
    assert advertised_host("") == "10.0.0.2"
    assert advertised_host("10.0.0.1") == "10.0.0.1"


def test_the_way_to_elsewhere_begins_at_an_address_of_this_host() -> None:
    here = {a.address for some in psutil.net_if_addrs().values() for a in some}
    assert cluster_module._routed_host() in {*here, ""}


EVERYWHERE = Addresses(("0.0.0.0", 8080), ("0.0.0.0", 9000), ("0.0.0.0", 7000))


async def test_who_is_alone_has_whatever_address_its_host_has(
    node: Node, interfaces: Interfaces, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A host that is installed before its network is up, with a bridge for containers."""
    node.cluster._addresses = EVERYWHERE
    nursery.start_soon(node.cluster._announce)
    for addresses, routed, shown in (
        ([], "", "127.0.0.1"),
        (["172.17.0.1"], "", "172.17.0.1"),
        (["172.17.0.1", "192.0.2.1"], "192.0.2.1", "192.0.2.1"),
    ):
        interfaces.addresses[1:], interfaces.routed = addresses, routed
        await trio.sleep(ADDRESS_CHECK_S + 1)
        assert node.cluster.state.members[node.id].p2p_address == f"{shown}:9000"
    assert (await node.cluster.make_join_token(60)).command.endswith("@192.0.2.1:9000")
    proposals = len(node.raft.proposals)
    await trio.sleep(10 * ADDRESS_CHECK_S)
    assert len(node.raft.proposals) == proposals, "nothing new, nothing to say"
    nursery.cancel_scope.cancel()


async def test_an_address_that_others_know_stays_while_it_is_here(
    node: Node, interfaces: Interfaces
) -> None:
    await node.let_in(B)
    interfaces.addresses += ["10.0.0.1", "192.0.2.1"]
    interfaces.routed = "192.0.2.1"
    # The API may be for this host alone: others do not come by it.
    node.cluster._addresses = Addresses(("127.0.0.1", 8080), ("0.0.0.0", 9000), ("0.0.0.0", 7000))
    for shown in ("10.0.0.1", "192.0.2.1"):
        assert await node.cluster._announce_once()
        me = node.cluster.state.members[node.id]
        assert (me.api_address, me.p2p_address) == ("127.0.0.1:8080", f"{shown}:9000")
        interfaces.addresses[1:] = ["192.0.2.1"]  # a new lease


async def test_a_name_that_is_another_nodes_is_not_asked_for_again_and_again(
    node: Node, net: PeerNet
) -> None:
    await node.let_in(B)
    node.cluster._name = node.cluster.state.members[B].name
    assert await node.cluster._announce_once()
    proposals = len(node.raft.proposals)
    assert await node.cluster._announce_once()
    assert len(node.raft.proposals) == proposals
    assert node.cluster.state.members[node.id].name == "one"
