"""What nodes hear that the cluster left behind: recovered without them, or removed while away.

Incarnations of one cluster do not talk to each other: who was there when it was recovered talks to
nobody who was not.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from ollamad.core.commands import FoundCluster, Proposal, RecoverCluster, apply
from ollamad.core.ids import NodeId, short
from ollamad.core.state import CertificateAuthority, ClusterState, User
from ollamad.peers import tls
from ollamad.peers.doorman import Doorman
from ollamad.peers.identity import certificate_der, issue_certificate, make_ca, peer_certificate
from ollamad.peers.mesh import Mesh
from ollamad.peers.tls import Gate, PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.mux import Departed, HelloReceived, MuxConnection, TurnedAway, farewell
from tests.fakes.api_services import member
from tests.fakes.tls_nodes import TlsNode, echo_once, says, utc_now

EARLIER, LATER = 1_700_000_000 * 10**9, 1_800_000_000 * 10**9

Made = Callable[[str, int], TlsNode]


@pytest.fixture
def ca() -> CertificateAuthority:
    return make_ca(utc_now())


class Witness(TlsNode):
    """A node that notes who proved to be of a later incarnation."""

    def __init__(self, directory: Path, ca: CertificateAuthority, incarnation: int) -> None:
        super().__init__(directory)
        self.newer: list[tuple[NodeId, int]] = []
        self.gate = Gate(
            self.identity, lambda _: True, on_newer=lambda *newer: self.newer.append(newer)
        )
        pem = issue_certificate(ca, self.identity.public_key, utc_now(), incarnation)
        self.identity.install(pem, ca.certificate_pem)
        self.gate.refresh()


@pytest.mark.parametrize(
    ("dialler", "listener"), [(0, LATER), (EARLIER, LATER), (LATER, 0), (LATER, EARLIER)]
)
async def test_incarnations_do_not_meet_and_the_older_one_learns_of_it(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery, dialler: int, listener: int
) -> None:
    one = Witness(tmp_path / "one", ca, dialler)
    other = Witness(tmp_path / "other", ca, listener)
    address = await other.listen(nursery, echo_once)
    with pytest.raises(PeerUnreachable, match="recovered"):
        await one.gate.dial(other.id, address)
    # The dialler knows when it has seen the certificate; the other end a moment later.
    with trio.fail_after(2):
        while True:
            if other.refused:
                break
            await trio.sleep(0.01)
    older, newer = (one, other) if dialler < listener else (other, one)
    assert older.newer == [(newer.id, max(dialler, listener))]
    assert newer.newer == []
    assert other.accepted == []
    nursery.cancel_scope.cancel()


async def test_a_server_of_before_learns_from_who_dials_it(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    old, new = Witness(tmp_path / "old", ca, 0), Witness(tmp_path / "new", ca, LATER)
    # A client that does not look at what the server shows.
    new.gate._check_incarnation = lambda shown: None  # type: ignore[method-assign]
    stream = await new.gate.dial(old.id, await old.listen(nursery, echo_once))
    assert not await says(stream)
    assert old.newer == [(new.id, LATER)]
    assert old.accepted == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("incarnation", [0, LATER])
async def test_nodes_of_one_incarnation_meet(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery, incarnation: int
) -> None:
    one = Witness(tmp_path / "one", ca, incarnation)
    other = Witness(tmp_path / "other", ca, incarnation)
    stream = await one.gate.dial(other.id, await other.listen(nursery, echo_once))
    assert await says(stream)
    assert one.newer == other.newer == []
    nursery.cancel_scope.cancel()


async def test_another_cluster_cannot_say_that_this_one_was_recovered(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Witness(tmp_path / "node", ca, 0)
    forger = Witness(tmp_path / "forger", make_ca(utc_now()), LATER)
    with pytest.raises(PeerUnreachable):
        await node.gate.dial(forger.id, await forger.listen(nursery, echo_once))
    stream_error = False
    try:
        # What a forger does, which shows its certificate and trusts anybody's.
        forger.gate._client = context = forger.identity.client_context()
        context.load_verify_locations(cadata=node.identity.ca_der)
        stream = await forger.gate._connect(await node.listen(nursery, echo_once), context)
        stream_error = not await says(stream)
    except PeerUnreachable:
        stream_error = True
    assert stream_error
    assert node.newer == []
    nursery.cancel_scope.cancel()


def test_a_certificate_says_its_incarnation(ca: CertificateAuthority, tmp_path: Path) -> None:
    node = TlsNode(tmp_path)
    assert node.identity.incarnation == 0
    for incarnation in (0, EARLIER, LATER):
        pem = issue_certificate(ca, node.identity.public_key, utc_now(), incarnation)
        shown = peer_certificate(certificate_der(pem))
        assert (shown.node_id, shown.incarnation) == (node.id, incarnation)


def test_a_certificate_follows_its_clusters_incarnation(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    identity = TlsNode(tmp_path).enter(ca).identity
    assert not identity.renew_if_due(ca, 0, utc_now())
    assert identity.renew_if_due(ca, LATER, utc_now())
    assert identity.incarnation == LATER
    assert not identity.renew_if_due(ca, LATER, utc_now())
    # A node that has just joined has a certificate, and a log that does not say so much yet.
    assert not identity.renew_if_due(ca, EARLIER, utc_now())
    assert identity.renew_if_due(ca, EARLIER, utc_now().replace(year=utc_now().year + 1))
    assert identity.incarnation == LATER


# Removed while it was away.

WORD = Departed(at=1_700_000_000.0)


class Removed:
    """A node that dials a member, which says that it was removed."""

    def __init__(self, directory: Path, ca: CertificateAuthority) -> None:
        self.node = TlsNode(directory / "removed").enter(ca)
        self.member = TlsNode(directory / "member").enter(ca)
        self.member.departed.add(self.node.id)
        self.heard: list[tuple[NodeId, Departed]] = []
        self.served = 0

    async def listen(self, nursery: trio.Nursery) -> str:
        async def serve(stream: TlsStream, peer: NodeId | None, host: str) -> None:
            self.served += 1

        doorman = Doorman(self.member.gate, serve, lambda peer: farewell("1", WORD))
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, doorman.accept, [listener])
        return f"127.0.0.1:{listener.socket.getsockname()[1]}"

    async def ask(self, nursery: trio.Nursery) -> None:
        address = await self.listen(nursery)
        mesh = Mesh(self.node.gate, version="1", address_of=lambda _: address)
        mesh.on_turned_away = lambda *heard: self.heard.append(heard)
        await nursery.start(mesh.run)
        await mesh.call(self.member.id, "beat", None, bool)


async def test_a_node_that_was_removed_while_it_was_away_is_told(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    removed = Removed(tmp_path, ca)
    with trio.fail_after(2), pytest.raises(PeerUnreachable, match="was removed from the cluster"):
        await removed.ask(nursery)
    assert removed.heard == [(removed.member.id, WORD)]
    assert removed.served == 0
    nursery.cancel_scope.cancel()


async def test_another_cluster_cannot_say_that_a_node_was_removed(
    ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    removed = Removed(tmp_path, ca)
    other_ca = make_ca(utc_now())
    removed.member.enter(other_ca)
    removed.member.gate.refresh()
    with pytest.raises(PeerUnreachable, match="another cluster"):
        await removed.ask(nursery)
    assert removed.heard == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("talks", [False, True])
async def test_a_node_that_was_removed_is_not_listened_to(
    ca: CertificateAuthority,
    tmp_path: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    talks: bool,
) -> None:
    # Who is silent is given a moment, who talks a few reads.
    monkeypatch.setattr(tls, "FAREWELL_TIMEOUT_S", 30 if talks else 0.2)
    removed = Removed(tmp_path, ca)
    stream = await removed.node.gate.dial(removed.member.id, await removed.listen(nursery))
    with trio.fail_after(2):
        if talks:
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(bytes(16_000))
        else:
            assert await stream.receive_some(1000) == farewell("1", WORD)
            assert await stream.receive_some(1000) == b"", "and then it hangs up"
    await trio.aclose_forcefully(stream)
    await trio.testing.wait_all_tasks_blocked()  # it hangs up before it says why
    [record] = caplog.records
    assert f"node {short(removed.node.id)}… is not a member any more" in record.getMessage()
    assert removed.served == 0
    nursery.cancel_scope.cancel()


def test_only_who_was_dialled_can_turn_a_node_away() -> None:
    dialler, listener = (MuxConnection(dialler=side, version="1") for side in (True, False))
    with pytest.raises(TurnedAway) as caught:
        dialler.receive_data(farewell("1", WORD))
    assert caught.value.departed == WORD
    [event] = listener.receive_data(farewell("1", WORD))
    assert isinstance(event, HelloReceived)


def test_incarnations_only_go_up() -> None:
    state = ClusterState()

    def propose(number: int, incarnation: int) -> str:
        outcome = apply(state, Proposal(str(number), 1.0, RecoverCluster(incarnation)))
        return getattr(outcome, "code", "")

    assert propose(0, EARLIER) == "NO_CLUSTER"
    founder, admin = member(NodeId("A" * 46), "a"), User("admin", "", "admin", 1.0)
    apply(state, Proposal("f", 1.0, FoundCluster("c", make_ca(utc_now()), b"", founder, admin)))
    assert state.incarnation == 0
    assert [propose(1, EARLIER), propose(2, LATER)] == ["", ""]
    assert [propose(3, LATER), propose(4, EARLIER)] == ["OLD_INCARNATION"] * 2
    assert state.incarnation == LATER
