"""How a node comes in: whose key it uses, in which order it keeps things, what a crash leaves."""

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio

from ollamad import admission
from ollamad.admission import Admission, Invitation, choose_identity, forget_cluster
from ollamad.cluster import Addresses
from ollamad.core.commands import DEPARTED_NODE
from ollamad.core.ids import NodeId
from ollamad.core.state import Capacity
from ollamad.datadir import DataDir
from ollamad.errors import HasLeft, StartError
from ollamad.machine import Machine
from ollamad.peers.identity import Identity, certificate_der, issue_certificate, make_ca
from ollamad.peers.tls import Gate
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.restore import forget
from ollamad.settings import Settings
from ollamad.wire.join import JoinRefused, JoinReply, Seed, Token, channel_binding
from tests.fakes.tls_nodes import TlsNode, utc_now

CA = make_ca(utc_now())
OTHER = NodeId("B" * 52)
INVITATION = Invitation(
    Token("t", b"s" * 16, channel_binding(certificate_der(CA.certificate_pem)), 2**40), "host:9000"
)
EXPIRED = msgspec.structs.replace(
    INVITATION, token=dataclasses.replace(INVITATION.token, expires_at=1)
)
ADDRESSES = Addresses(("", 8080), ("", 9000), ("", 7000))
CAPACITY = Capacity(cpu_cores=1, memory_bytes=1, disk_bytes=1)


class Crash(Exception):
    """The process ends here."""


class House:
    """One data directory, and starts of a node in it."""

    def __init__(self, directory: DataDir) -> None:
        self.directory = directory
        self.path = directory.path

    async def start(
        self,
        invitation: Invitation | None = None,
        sponsor: Callable[[Invitation], Awaitable[JoinReply]] | None = None,
    ) -> tuple[Identity, frozenset[NodeId]]:
        """Come in as a daemon does, then die; the identity and the voters as they are known."""
        identity = await choose_identity(Settings(), self.directory, invitation)
        store = SqliteStore(self.directory.raft)
        try:
            raft = RaftNode(identity.node_id, store, Machine(), lambda *_: None)
            entering = Admission(
                self.directory,
                identity,
                Gate(identity, lambda _: True),
                name="n",
                addresses=ADDRESSES,
                capacity=CAPACITY,
            )

            async def let_in(_: Invitation) -> JoinReply:
                pem = issue_certificate(CA, identity.public_key, utc_now())
                seeds = (Seed(OTHER, "h:9000", "h:7000"),)
                return JoinReply("c", CA.certificate_pem, pem, seeds, (OTHER,))

            entering._join = sponsor or let_in  # type: ignore[method-assign]
            await entering.enter(raft, invitation)
            return identity, raft.voters
        finally:
            await store.aclose()

    @property
    def left(self) -> list[str]:
        """What was put aside."""
        return sorted(path.name for path in self.path.glob("left-*/*"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(DataDir(tmp_path))


async def test_who_joins_does_so_with_a_new_key_which_becomes_its_own(house: House) -> None:
    identity, voters = await house.start(INVITATION)
    assert voters == {OTHER}
    own = Identity.load_or_create(house.directory.identity)
    assert (own.node_id, own.is_member) == (identity.node_id, True)
    assert not house.directory.joining.exists()
    assert house.left == []
    # With or without the invitation, it is a member from now on.
    for invitation in (None, INVITATION, EXPIRED):
        assert (await house.start(invitation))[0].node_id == own.node_id


async def test_who_comes_with_an_expired_token_is_told_and_changes_nothing(house: House) -> None:
    with pytest.raises(StartError, match=r"has expired; make .*`ollama-dist cluster token`"):
        await house.start(EXPIRED)
    assert list(house.path.iterdir()) == []


async def test_who_leaves_comes_back_as_somebody_else(house: House) -> None:
    first, _ = await house.start(INVITATION)
    forget_cluster(house.directory)
    assert {"identity", "raft.db", "seeds"} <= set(house.left)
    second, _ = await house.start(INVITATION)
    assert first.node_id != second.node_id


async def test_who_was_taken_out_founds_no_cluster_until_somebody_says_so(house: House) -> None:
    await house.start(INVITATION)
    aside = leave(house)
    before = sorted(house.path.iterdir())
    for _ in range(2):
        with pytest.raises(HasLeft, match=r"start it with --join .*`ollamad forget`"):
            await house.start()
    assert sorted(house.path.iterdir()) == before, "a key would be in the way of a restore"
    # Whoever puts back what was put aside is in that cluster again.
    for path in list(aside.iterdir()):
        path.rename(house.path / path.name)
    await house.start()
    leave(house)
    # Who joins another one is done with the old one.
    await house.start(INVITATION)
    assert not house.directory.departed.exists()
    leave(house)
    forget(house.path)
    founder, voters = await house.start()
    assert voters == {founder.node_id}


def leave(house: House) -> Path:
    """What is left of a node that was taken out; where its state is."""
    house.directory.departed.touch()
    aside = forget_cluster(house.directory)
    assert aside is not None
    return aside


async def test_a_key_that_may_have_been_a_members_is_not_joined_with(house: House) -> None:
    old = TlsNode(house.directory.identity)  # as an older version left it behind
    identity, _ = await house.start(INVITATION)
    assert identity.node_id != old.id
    assert house.left == ["identity"]


async def test_a_cluster_of_one_is_given_up_with_its_key(house: House) -> None:
    founder, voters = await house.start()
    assert voters == {founder.node_id}
    ca = make_ca(utc_now())
    founder.install(issue_certificate(ca, founder.public_key, utc_now()), ca.certificate_pem)
    identity, voters = await house.start(INVITATION)
    assert identity.node_id != founder.node_id
    assert voters == {OTHER}
    assert {"identity", "raft.db"} <= set(house.left)


async def test_a_try_that_fails_gives_nothing_up_and_the_next_has_the_same_key(
    house: House,
) -> None:
    founder, _ = await house.start()
    ca = make_ca(utc_now())
    founder.install(issue_certificate(ca, founder.public_key, utc_now()), ca.certificate_pem)

    async def refuse(_: Invitation) -> JoinReply:
        await trio.lowlevel.checkpoint()
        raise StartError("no")

    ids = set()
    for _ in range(2):
        with pytest.raises(StartError, match="no"):
            await house.start(INVITATION, refuse)
        ids.add((await choose_identity(Settings(), house.directory, INVITATION)).node_id)
    assert len(ids) == 1
    assert house.left == []
    identity, voters = await house.start()
    assert voters == {identity.node_id} == {founder.node_id}


@pytest.mark.parametrize(("code", "kept"), [(DEPARTED_NODE, False), ("NAME_TAKEN", True)])
async def test_a_key_that_is_refused_for_good_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch, code: str, kept: bool
) -> None:
    identity = await choose_identity(Settings(), house.directory, INVITATION)
    gate = Gate(identity, lambda _: True)
    entering = Admission(
        house.directory, identity, gate, name="n", addresses=ADDRESSES, capacity=CAPACITY
    )

    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise JoinRefused(code, "no")

    monkeypatch.setattr(admission, "join_through", refuse)
    with pytest.raises(StartError, match="cannot join"):
        await entering._join(INVITATION)
    again = await choose_identity(Settings(), house.directory, INVITATION)
    assert (again.node_id == identity.node_id) is kept


# What a crash leaves.


def crash(*_: object) -> None:
    raise Crash


def crash_after(function: Callable[..., None]) -> Callable[..., None]:
    def last(*args: object) -> None:
        function(*args)
        raise Crash

    return last


@pytest.mark.parametrize(
    ("owner", "name", "has_journal"),
    [
        (admission, "write_private", False),
        (RaftNode, "persist", False),
        (Identity, "become_member", True),
        (Identity, "install", True),  # its certificate is there, the move is not
    ],
)
async def test_who_is_killed_before_it_is_a_member_joins_again_with_the_same_key(
    house: House, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, has_journal: bool
) -> None:
    with monkeypatch.context() as patched:
        last = crash_after(Identity.install) if name == "install" else crash
        patched.setattr(owner, name, last)
        with pytest.raises(Crash):
            await house.start(INVITATION)
    wanted = await choose_identity(Settings(), house.directory, INVITATION)
    assert not wanted.is_member
    if has_journal:
        with pytest.raises(StartError, match="start it with --join"):
            await house.start()
    identity, voters = await house.start(INVITATION)
    assert identity.node_id == wanted.node_id
    assert voters == {OTHER}


async def test_who_is_killed_once_it_is_a_member_goes_on_from_what_it_was_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Identity, "become_member", crash_after(Identity.become_member))
        with pytest.raises(Crash):
            await house.start(INVITATION)
    identity, voters = await house.start()
    assert identity.is_member
    assert voters == {OTHER}


async def test_who_is_killed_while_it_founds_is_its_own_voter(house: House) -> None:
    founder, _ = await house.start()
    founder.install(issue_certificate(CA, founder.public_key, utc_now()), CA.certificate_pem)
    identity, voters = await house.start()  # its journal was there before the certificate
    assert voters == {identity.node_id} == {founder.node_id}


@pytest.mark.parametrize("gone", [["raft.db", "raft.db-witness"], None])
async def test_a_member_without_its_journal_does_not_go_on(
    house: House, gone: list[str] | None
) -> None:
    first, _ = await house.start(INVITATION)
    for path in house.path.glob("raft.db*"):
        if gone is None or path.name in gone:
            path.unlink()
    with pytest.raises(StartError, match="the journal of this node is gone") as caught:
        await house.start()
    assert str(house.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    # But it may join as a new node.
    second, _ = await house.start(INVITATION)
    assert second.node_id != first.node_id
    assert "identity" in house.left


async def test_what_is_put_aside_ends_with_the_identity(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, nothing takes the rest for the state of another cluster."""
    await house.start(INVITATION)
    rename = Path.rename

    def stop_at_identity(path: Path, target: Path) -> Path:
        if path == house.directory.identity:
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stop_at_identity)
        with pytest.raises(Crash):
            forget_cluster(house.directory)
    with pytest.raises(StartError, match="the journal of this node is gone"):
        await house.start()
