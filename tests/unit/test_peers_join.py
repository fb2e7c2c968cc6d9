"""The join exchange over real TLS: both directions, every refusal, strangers that misbehave."""

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID
from trio.testing import wait_all_tasks_blocked

from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.state import Capacity, CertificateAuthority, JoinToken
from ollamad.peers import join
from ollamad.peers.identity import (
    certificate_der,
    issue_certificate,
    make_ca,
    private_pem,
    raw_public_key,
    self_signed,
)
from ollamad.peers.join import (
    ATTEMPTS,
    MAX_STRANGERS,
    Sponsor,
    join_through,
    request_admission,
    sponsor_waiting_node,
)
from ollamad.peers.tls import PeerUnreachable
from ollamad.peers.tls_stream import TlsStream
from ollamad.wire.join import (
    MAX_CLOCK_SKEW_S,
    MAX_JOIN_FRAME,
    JoinRefused,
    JoinReply,
    JoinRequest,
    Seed,
    Token,
    channel_binding,
    proof_text,
    seal_request,
)
from ollamad.wire.mux import OLDEST_PROTOCOL, PROTOCOL
from tests.fakes.tls_nodes import TlsNode, utc_now

CA = make_ca(utc_now())
TOKEN = Token(
    "010203040506", b"s" * 16, channel_binding(certificate_der(CA.certificate_pem)), 2**40
)


class Member:
    """A member that admits, and notes whom."""

    def __init__(self, node: TlsNode, ca: CertificateAuthority) -> None:
        self.node = node
        self.ca = ca
        self.tokens = {TOKEN.id: JoinToken(TOKEN.id, TOKEN.key, 2**40)}
        self.admitted: list[tuple[JoinRequest, str]] = []
        self.refusal: JoinRefused | None = None
        self.wait = trio.Event()
        self.wait.set()
        self.change: Callable[[JoinReply], JoinReply] = lambda reply: reply
        self.sponsor = Sponsor(self.tokens.get, self.admit)
        self.address = ""

    async def admit(self, request: JoinRequest, host: str) -> JoinReply:
        await self.wait.wait()
        if self.refusal:
            raise self.refusal
        self.admitted.append((request, host))
        certificate = issue_certificate(self.ca, request.public_key, utc_now())
        seeds = (Seed(self.node.id, self.address, "r:1"),)
        reply = JoinReply("c1", self.ca.certificate_pem, certificate, seeds, (self.node.id,))
        return self.change(reply)

    async def serve(self, stream: TlsStream, peer: NodeId | None) -> None:
        await self.sponsor.serve(stream, self.node.identity.certificate, "127.0.0.1")


@pytest.fixture
async def member(tmp_path: Path) -> AsyncIterator[Member]:
    async with trio.open_nursery() as nursery:
        found = Member(TlsNode(tmp_path / "member").enter(CA), CA)
        found.address = await found.node.listen(nursery, found.serve)
        yield found
        nursery.cancel_scope.cancel()


@pytest.fixture
def joiner(tmp_path: Path) -> TlsNode:
    return TlsNode(tmp_path / "joiner")


def request_of(node: TlsNode, **changes: Any) -> JoinRequest:
    plain = JoinRequest(
        node_id=node.id,
        public_key=node.identity.public_key,
        name="two",
        api_address=":8080",
        p2p_address=":9000",
        raft_address=":7000",
        capacity=Capacity(1, 2, 3),
        version="1.0",
        protocol=1,
        token_id=TOKEN.id,
        now=time.time(),
    )
    return msgspec.structs.replace(plain, **changes)


async def ask(node: TlsNode, member: Member, token: Token = TOKEN, **changes: Any) -> JoinReply:
    with trio.fail_after(5):
        return await join_through(
            node.gate, member.address, request_of(node, **changes), token, node.identity.sign
        )


async def refused(node: TlsNode, member: Member, token: Token = TOKEN, **changes: Any) -> str:
    with pytest.raises(JoinRefused) as caught:
        await ask(node, member, token, **changes)
    assert member.admitted == []
    return caught.value.code


async def test_a_joiner_dials_a_member_and_is_one_afterwards(
    member: Member, joiner: TlsNode
) -> None:
    reply = await ask(joiner, member)
    assert reply.cluster_id == "c1"
    assert reply.voters == (member.node.id,)
    [(request, host)] = member.admitted
    assert (request.node_id, host) == (joiner.id, "127.0.0.1")
    joiner.identity.install(reply.certificate_pem, reply.ca_certificate_pem)
    joiner.gate.refresh()
    stream = await joiner.gate.dial(member.node.id, member.address)
    await trio.aclose_forcefully(stream)


async def test_a_member_dials_a_node_that_waits(
    member: Member, joiner: TlsNode, nursery: trio.Nursery
) -> None:
    replies = list[JoinReply]()

    async def wait(stream: TlsStream, peer: NodeId | None) -> None:
        certificate = joiner.identity.certificate
        request, sign = request_of(joiner), joiner.identity.sign
        replies.append(await request_admission(stream, request, TOKEN, certificate, sign))

    address = await joiner.listen(nursery, wait)
    with trio.fail_after(5):
        await sponsor_waiting_node(member.node.gate, member.sponsor, joiner.id, address)
    assert replies[0].cluster_id == "c1"
    assert member.admitted[0][1] == "127.0.0.1"


async def test_a_node_that_waits_with_a_wrong_token_lets_nobody_admit_it(
    member: Member, joiner: TlsNode, nursery: trio.Nursery
) -> None:
    failures = list[str]()

    async def wait(stream: TlsStream, peer: NodeId | None) -> None:
        token = Token(TOKEN.id, b"x" * 16, TOKEN.ca_hash, 2**40)
        try:
            identity = joiner.identity
            await request_admission(
                stream, request_of(joiner), token, identity.certificate, identity.sign
            )
        except JoinRefused as error:
            failures.append(error.code)

    address = await joiner.listen(nursery, wait)
    with trio.fail_after(5):
        await sponsor_waiting_node(member.node.gate, member.sponsor, joiner.id, address)
    assert member.admitted == []
    await wait_all_tasks_blocked()
    assert failures == ["NOT_PROVED"]


async def test_a_member_dials_somebody_else(
    member: Member, joiner: TlsNode, nursery: trio.Nursery
) -> None:
    async def wait(stream: TlsStream, peer: NodeId | None) -> None:
        assert await stream.receive_some(1) == b""

    address = await joiner.listen(nursery, wait)
    with pytest.raises(JoinRefused, match=f"is node {joiner.id[:12]}…, not Qm"):
        await sponsor_waiting_node(member.node.gate, member.sponsor, node_id_of(b"z" * 32), address)
    assert member.admitted == []


async def test_a_member_dials_a_web_server(
    member: Member, tmp_path: Path, nursery: trio.Nursery
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web")])
    now = utc_now()
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now.replace(year=2099))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem += key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "web.pem").write_bytes(pem)
    web = TlsNode(tmp_path / "web")
    web.gate._server.load_cert_chain(tmp_path / "web.pem")

    async def wait(stream: TlsStream, peer: NodeId | None) -> None:
        await stream.receive_some(1)

    address = await web.listen(nursery, wait)
    with pytest.raises(JoinRefused, match="is node"):
        await sponsor_waiting_node(member.node.gate, member.sponsor, web.id, address)


async def test_nobody_listens(member: Member, joiner: TlsNode) -> None:
    member.address = "127.0.0.1:1"
    with pytest.raises(PeerUnreachable):
        await ask(joiner, member)


# What the sponsor refuses.


async def test_a_wrong_secret(member: Member, joiner: TlsNode) -> None:
    wrong = Token(TOKEN.id, b"x" * 16, TOKEN.ca_hash, 2**40)
    assert await refused(joiner, member, wrong) == "NOT_PROVED"


async def test_an_unknown_token(member: Member, joiner: TlsNode) -> None:
    member.tokens.clear()
    assert await refused(joiner, member) == "NOT_PROVED"


async def test_a_token_named_that_is_not_the_one_proved(member: Member, joiner: TlsNode) -> None:
    other = Token("ffffffffffff", b"o" * 16, TOKEN.ca_hash, 2**40)
    member.tokens[other.id] = JoinToken(other.id, other.key, 2**40)
    assert await refused(joiner, member, TOKEN, token_id=other.id) == "NOT_PROVED"


async def test_an_id_of_another_key(member: Member, joiner: TlsNode) -> None:
    assert await refused(joiner, member, node_id=node_id_of(b"k" * 32)) == "BAD_IDENTITY"
    assert await refused(joiner, member, public_key=b"short") == "BAD_IDENTITY"
    assert await refused(joiner, member, node_id="") == "BAD_IDENTITY"


async def test_a_token_is_not_enough_to_ask_in_the_name_of_a_member(
    member: Member, joiner: TlsNode, tmp_path: Path
) -> None:
    """Everybody knows a member's public key; with other addresses it could be cut off."""
    other = TlsNode(tmp_path / "other")
    name = {"node_id": other.id, "public_key": other.identity.public_key}
    assert await refused(joiner, member, **name) == "BAD_IDENTITY"


async def test_a_proof_for_another_connection_is_none(member: Member, joiner: TlsNode) -> None:
    elsewhere = joiner.identity.sign(proof_text(TOKEN.id, b"x" * 32))
    for sign in (
        lambda _: elsewhere,
        lambda _: b"",
        lambda data: joiner.identity.sign(data + b"x"),
    ):
        with pytest.raises(JoinRefused) as caught:
            await join_through(joiner.gate, member.address, request_of(joiner), TOKEN, sign)
        assert caught.value.code == "BAD_IDENTITY"
    assert member.admitted == []


@pytest.mark.parametrize("seconds", [MAX_CLOCK_SKEW_S + 60, -MAX_CLOCK_SKEW_S - 60, 1e300])
async def test_clocks_that_differ(member: Member, joiner: TlsNode, seconds: float) -> None:
    assert await refused(joiner, member, now=time.time() + seconds) == "CLOCK_SKEW"


async def test_clocks_that_differ_a_little(member: Member, joiner: TlsNode) -> None:
    await ask(joiner, member, now=time.time() + MAX_CLOCK_SKEW_S - 60)


async def test_a_clock_that_is_no_number(member: Member, joiner: TlsNode) -> None:
    assert await refused(joiner, member, now=float("nan")) == "CLOCK_SKEW"


async def test_a_protocol_that_is_too_old(member: Member, joiner: TlsNode) -> None:
    assert await refused(joiner, member, protocol=OLDEST_PROTOCOL - 1) == "INCOMPATIBLE_VERSION"


async def test_a_protocol_that_is_too_new(member: Member, joiner: TlsNode) -> None:
    newer = PROTOCOL + 1
    code = await refused(joiner, member, protocol=newer + 1, oldest_protocol=newer)
    assert code == "INCOMPATIBLE_VERSION"


async def test_a_refusal_of_the_cluster_is_told_word_for_word(
    member: Member, joiner: TlsNode
) -> None:
    member.refusal = JoinRefused("NAME_TAKEN", "there is another")
    with pytest.raises(JoinRefused, match="there is another"):
        await ask(joiner, member)
    assert await refused(joiner, member) == "NAME_TAKEN"


async def test_a_request_captured_elsewhere_is_worth_nothing(
    member: Member, joiner: TlsNode, tmp_path: Path
) -> None:
    """Sealed for the TLS connection to somebody in the middle, replayed to the member."""
    middle = TlsNode(tmp_path / "middle")
    captured = seal_request(
        request_of(joiner), TOKEN.key, channel_binding(middle.identity.certificate)
    )
    stream = await joiner.gate.dial_stranger(member.address)
    await stream.send_all(len(captured).to_bytes(4, "big") + captured)
    answer = await stream.receive_some(10_000)
    assert b"BAD_TOKEN" in answer
    assert member.admitted == []
    await trio.aclose_forcefully(stream)


# What the joiner refuses.


async def test_a_member_of_another_cluster_that_knows_the_secret(
    joiner: TlsNode, tmp_path: Path, nursery: trio.Nursery
) -> None:
    other_ca = make_ca(utc_now())
    foreign = Member(TlsNode(tmp_path / "foreign").enter(other_ca), other_ca)
    foreign.address = await foreign.node.listen(nursery, foreign.serve)
    with pytest.raises(JoinRefused) as caught:
        await ask(joiner, foreign)
    assert caught.value.code == "WRONG_CLUSTER"


async def test_a_sponsor_that_does_not_know_the_secret(
    member: Member, joiner: TlsNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers any request as if it were proved still cannot sign the reply."""
    monkeypatch.setattr(join, "request_is_proved", lambda *_: True)
    member.tokens[TOKEN.id] = JoinToken(TOKEN.id, b"not the key", 2**40)
    with pytest.raises(JoinRefused) as caught:
        await ask(joiner, member)
    assert caught.value.code in ("NOT_PROVED", "MALFORMED")


def signed_by(ca: CertificateAuthority, reply: JoinReply) -> JoinReply:
    """The reply with a certificate over the right key that another CA signed."""
    key = x509.load_pem_x509_certificate(reply.certificate_pem).public_key()
    assert isinstance(key, Ed25519PublicKey)
    pem = issue_certificate(ca, raw_public_key(key), utc_now())
    return msgspec.structs.replace(reply, certificate_pem=pem)


def self_made_ca() -> CertificateAuthority:
    key = Ed25519PrivateKey.generate()
    return CertificateAuthority(self_signed(key, utc_now()), private_pem(key))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (
            lambda r: msgspec.structs.replace(
                r, certificate_pem=issue_certificate(CA, b"o" * 32, utc_now())
            ),
            "MALFORMED",
        ),
        (lambda r: signed_by(make_ca(utc_now()), r), "MALFORMED"),  # which has the same name
        (lambda r: signed_by(self_made_ca(), r), "MALFORMED"),  # which has another
        (lambda r: msgspec.structs.replace(r, certificate_pem=b"junk"), "MALFORMED"),
        (lambda r: msgspec.structs.replace(r, certificate_pem=b"\xff"), "MALFORMED"),
        (lambda r: msgspec.structs.replace(r, ca_certificate_pem=b"junk"), "MALFORMED"),
        (
            lambda r: msgspec.structs.replace(
                r, ca_certificate_pem=make_ca(utc_now()).certificate_pem
            ),
            "WRONG_CLUSTER",
        ),
    ],
)
async def test_certificates_that_do_not_fit(
    member: Member, joiner: TlsNode, change: Callable[[JoinReply], JoinReply], code: str
) -> None:
    member.change = change
    with pytest.raises(JoinRefused) as caught:
        await ask(joiner, member)
    assert caught.value.code == code


async def test_a_sponsor_that_hangs(
    member: Member, joiner: TlsNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "EXCHANGE_TIMEOUT_S", 0.1)
    member.wait = trio.Event()
    with pytest.raises(JoinRefused) as caught:
        await ask(joiner, member)
    assert caught.value.code in ("TIMEOUT", "BROKEN")
    await active(member, 0)


# Strangers that misbehave.


async def raw(joiner: TlsNode, member: Member, data: bytes) -> bytes:
    """Send bytes as a stranger, then read until the member closes."""
    stream = await joiner.gate.dial_stranger(member.address)
    answer = b""
    try:
        with trio.fail_after(5):
            await stream.send_all(data)
            while part := await stream.receive_some(10_000):
                answer += part
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)
    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        (MAX_JOIN_FRAME + 1).to_bytes(4, "big") + b"x" * 100,
        (5).to_bytes(4, "big") + b"junk!",
        (0).to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_frames_that_are_no_request(member: Member, joiner: TlsNode, data: bytes) -> None:
    assert await raw(joiner, member, data) == b""
    await active(member, 0)
    await ask(joiner, member)


async def test_a_stranger_that_hangs_up(member: Member, joiner: TlsNode) -> None:
    stream = await joiner.gate.dial_stranger(member.address)
    await stream.send_all(b"\0\0")
    await trio.aclose_forcefully(stream)
    await ask(joiner, member)


async def test_a_stranger_that_drips(
    member: Member, joiner: TlsNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "FRAME_TIMEOUT_S", 0.15)
    stream = await joiner.gate.dial_stranger(member.address)
    begun = trio.current_time()
    try:
        while trio.current_time() - begun < 2:
            await stream.send_all(b"\0")
            await trio.sleep(0.02)
    except trio.BrokenResourceError:
        pass
    assert trio.current_time() - begun < 1
    await trio.aclose_forcefully(stream)
    await active(member, 0)


async def test_one_address_may_only_try_so_often(member: Member, joiner: TlsNode) -> None:
    wrong = Token(TOKEN.id, b"x" * 16, TOKEN.ca_hash, 2**40)
    for _ in range(ATTEMPTS):
        assert await refused(joiner, member, wrong) == "NOT_PROVED"
    assert await refused(joiner, member, TOKEN) == "BROKEN"


async def active(member: Member, count: int) -> None:
    """Wait until the member talks to that many strangers."""
    for _ in range(400):
        if member.sponsor._active == count:
            return
        await trio.sleep(0.005)
    raise AssertionError(f"{member.sponsor._active} strangers, not {count}")


async def test_only_so_many_strangers_at_once(member: Member, joiner: TlsNode) -> None:
    streams = [await joiner.gate.dial_stranger(member.address) for _ in range(MAX_STRANGERS)]
    await active(member, MAX_STRANGERS)
    assert await refused(joiner, member) == "BROKEN"
    for stream in streams:
        await trio.aclose_forcefully(stream)
    await active(member, 0)
