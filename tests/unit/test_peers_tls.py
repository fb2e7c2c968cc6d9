"""Who gets through a node's door: right and wrong ids, strangers, other clusters, bad clocks."""

import contextlib
import datetime
import re
import ssl
import stat
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from trio.testing import wait_all_tasks_blocked

from ollamad.core.ids import node_id_of
from ollamad.core.state import CertificateAuthority
from ollamad.peers import tls
from ollamad.peers.identity import (
    BACKDATE,
    CA_LIFETIME,
    CA_NOTICE,
    CERTIFICATE_LIFETIME,
    RENEW_BEFORE,
    Identity,
    IdentityError,
    ca_end_in_sight,
    certificate_der,
    issue_certificate,
    make_ca,
    peer_certificate,
    private_pem,
    raw_public_key,
    self_signed,
    write_private,
)
from ollamad.peers.tls import PeerUnreachable, peer_of, split_address
from ollamad.peers.tls_stream import TlsStream
from tests.fakes.tls_nodes import TlsNode, echo_once, says, utc_now

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def ca() -> CertificateAuthority:
    return make_ca(utc_now())


@pytest.fixture
def node(tmp_path: Path, ca: CertificateAuthority) -> TlsNode:
    """A member that is dialled."""
    return TlsNode(tmp_path / "node").enter(ca)


@pytest.fixture
def other(tmp_path: Path, ca: CertificateAuthority) -> TlsNode:
    """A member that dials."""
    return TlsNode(tmp_path / "other").enter(ca)


async def connect(context: ssl.SSLContext, address: str) -> trio.SSLStream[trio.SocketStream]:
    """A client that this program did not write."""
    host, port = split_address(address)
    transport = await trio.open_tcp_stream(host, port)
    return trio.SSLStream(transport, context, https_compatible=True)


async def closed_by_peer(transport: trio.SocketStream) -> None:
    """Wait until the other side has closed the connection, and has noted why."""
    with trio.fail_after(2), contextlib.suppress(trio.BrokenResourceError):
        while await transport.receive_some(10_000):
            pass
    await wait_all_tasks_blocked()


def client(directory: Path, certificate_pem: bytes, key: Ed25519PrivateKey) -> ssl.SSLContext:
    """A client that shows any certificate and trusts anybody."""
    directory.mkdir()
    (directory / "crt").write_bytes(certificate_pem)
    (directory / "key").write_bytes(private_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(directory / "crt", directory / "key")
    return context


async def test_members_meet(node: TlsNode, other: TlsNode, nursery: trio.Nursery) -> None:
    address = await node.listen(nursery, echo_once)
    stream = await other.gate.dial(node.id, address)
    assert peer_of(stream) == node.id
    assert await says(stream)
    assert node.accepted == [other.id]


async def test_a_dial_that_reaches_somebody_else(
    node: TlsNode, other: TlsNode, nursery: trio.Nursery
) -> None:
    address = await node.listen(nursery, echo_once)
    wrong = node_id_of(b"w" * 32)
    with pytest.raises(PeerUnreachable, match=f"is node {node.id[:12]}…, not {wrong[:12]}…"):
        await other.gate.dial(wrong, address)


async def test_a_stranger_is_told_apart(
    node: TlsNode, tmp_path: Path, nursery: trio.Nursery
) -> None:
    address = await node.listen(nursery, echo_once)
    stranger = TlsNode(tmp_path / "stranger")
    stream = await stranger.gate.dial_stranger(address)
    assert peer_of(stream) == node.id
    assert await says(stream)
    assert node.accepted == [None]


async def test_a_member_shows_a_stranger_no_certificate(
    node: TlsNode, other: TlsNode, nursery: trio.Nursery
) -> None:
    address = await node.listen(nursery, echo_once)
    assert await says(await other.gate.dial_stranger(address))
    assert node.accepted == [None]


async def test_a_server_of_another_cluster(
    other: TlsNode, tmp_path: Path, nursery: trio.Nursery
) -> None:
    foreign = TlsNode(tmp_path / "foreign").enter(make_ca(utc_now()))
    address = await foreign.listen(nursery, echo_once)
    with pytest.raises(PeerUnreachable, match="another cluster"):
        await other.gate.dial(foreign.id, address)


async def test_a_server_that_is_in_no_cluster(
    other: TlsNode, tmp_path: Path, nursery: trio.Nursery
) -> None:
    lonely = TlsNode(tmp_path / "lonely")
    address = await lonely.listen(nursery, echo_once)
    with pytest.raises(PeerUnreachable):
        await other.gate.dial(lonely.id, address)


def self_made(key: Ed25519PrivateKey, ca: CertificateAuthority) -> bytes:
    return self_signed(key, utc_now())


def of_another_ca(key: Ed25519PrivateKey, ca: CertificateAuthority) -> bytes:
    return issue_certificate(make_ca(utc_now()), raw_public_key(key.public_key()), utc_now())


def expired(key: Ed25519PrivateKey, ca: CertificateAuthority) -> bytes:
    long_ago = utc_now() - CERTIFICATE_LIFETIME - DAY
    return issue_certificate(ca, raw_public_key(key.public_key()), long_ago)


def of_the_future(key: Ed25519PrivateKey, ca: CertificateAuthority) -> bytes:
    return issue_certificate(ca, raw_public_key(key.public_key()), utc_now() + DAY)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (self_made, "another cluster"),
        (of_another_ca, "another cluster"),
        (expired, "expired.*clocks"),
        (of_the_future, "not yet valid.*clocks"),
    ],
)
async def test_a_client_with_a_bad_certificate(
    node: TlsNode,
    ca: CertificateAuthority,
    tmp_path: Path,
    nursery: trio.Nursery,
    make: object,
    reason: str,
) -> None:
    address = await node.listen(nursery, echo_once)
    key = Ed25519PrivateKey.generate()
    context = client(tmp_path / "client", make(key, ca), key)  # type: ignore[operator]
    assert not await says(await connect(context, address))
    await wait_all_tasks_blocked()
    assert node.accepted == []
    [refusal] = node.refused
    assert re.search(reason, refusal)


@pytest.mark.parametrize("shift", [-CERTIFICATE_LIFETIME - DAY, DAY])
async def test_a_server_with_a_bad_clock(
    other: TlsNode,
    ca: CertificateAuthority,
    tmp_path: Path,
    nursery: trio.Nursery,
    shift: datetime.timedelta,
) -> None:
    server = TlsNode(tmp_path / "server").enter(ca, at=utc_now() + shift)
    address = await server.listen(nursery, echo_once)
    with pytest.raises(PeerUnreachable, match="compare the clocks"):
        await other.gate.dial(server.id, address)


async def test_a_member_cannot_let_others_in(
    node: TlsNode, other: TlsNode, ca: CertificateAuthority, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """A certificate that a member signed with its own key, with its own in the chain."""
    address = await node.listen(nursery, echo_once)
    directory = tmp_path / "other"
    signer = serialization.load_pem_private_key((directory / "node.key").read_bytes(), None)
    assert isinstance(signer, Ed25519PrivateKey)
    pseudo_ca = CertificateAuthority((directory / "node.crt").read_bytes(), private_pem(signer))
    key = Ed25519PrivateKey.generate()
    leaf = issue_certificate(pseudo_ca, raw_public_key(key.public_key()), utc_now())
    context = client(tmp_path / "client", leaf + pseudo_ca.certificate_pem, key)
    assert not await says(await connect(context, address))
    assert node.accepted == []


async def test_a_node_that_left_is_not_welcome(
    node: TlsNode, other: TlsNode, nursery: trio.Nursery
) -> None:
    address = await node.listen(nursery, echo_once)
    node.departed.add(other.id)
    assert not await says(await other.gate.dial(node.id, address))
    await wait_all_tasks_blocked()
    assert node.accepted == []
    assert "not a member any more" in node.refused[0]


async def test_old_tls_is_refused(node: TlsNode, nursery: trio.Nursery) -> None:
    address = await node.listen(nursery, echo_once)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert not await says(await connect(context, address))
    assert node.accepted == []


async def test_no_session_is_ever_resumed(
    node: TlsNode, other: TlsNode, nursery: trio.Nursery
) -> None:
    address = await node.listen(nursery, echo_once)
    stream = await other.gate.dial(node.id, address)
    await stream.send_all(b"x")
    await stream.receive_some(1)
    session = stream._tls.session
    assert session is None or not session.has_ticket
    assert not stream._tls.session_reused
    await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff\xff"])
async def test_no_tls_at_all(node: TlsNode, nursery: trio.Nursery, data: bytes) -> None:
    address = await node.listen(nursery, echo_once)
    async with await trio.open_tcp_stream(*split_address(address)) as transport:
        await transport.send_all(data)
        await transport.send_eof()
        await closed_by_peer(transport)
    assert node.accepted == []
    assert len(node.refused) == 1
    assert node.refused[0].startswith("handshake failed: ")


async def test_a_handshake_that_does_not_end(
    node: TlsNode, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.05)
    address = await node.listen(nursery, echo_once)
    async with await trio.open_tcp_stream(*split_address(address)) as transport:
        await closed_by_peer(transport)
    assert node.refused == ["handshake failed: timed out"]


async def test_a_dial_that_nobody_answers(other: TlsNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "DIAL_TIMEOUT_S", 0.05)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with pytest.raises(PeerUnreachable, match=f"127.0.0.1:{port}: timed out"):
        await other.gate.dial(other.id, f"127.0.0.1:{port}")
    await listener.aclose()
    with pytest.raises(PeerUnreachable, match="refused"):
        await other.gate.dial(other.id, f"127.0.0.1:{port}")


async def test_a_cancelled_dial_closes_its_socket(other: TlsNode) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with trio.move_on_after(0.05) as scope:
        await other.gate.dial(other.id, f"127.0.0.1:{port}")
    assert scope.cancelled_caught
    async with listener, await listener.accept() as accepted:
        await closed_by_peer(accepted)


async def test_the_kernel_watches_over_both_ends(
    node: TlsNode, other: TlsNode, nursery: trio.Nursery
) -> None:
    options = list[tuple[int, int]]()

    def read(stream: TlsStream) -> tuple[int, int]:
        sock = stream.transport_stream.socket
        return (
            sock.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_KEEPALIVE),
            sock.getsockopt(trio.socket.IPPROTO_TCP, 18),
        )

    async def note(stream: TlsStream, peer: object) -> None:
        options.append(read(stream))
        await echo_once(stream, None)

    address = await node.listen(nursery, note)
    stream = await other.gate.dial(node.id, address)
    options.append(read(stream))
    assert await says(stream)
    assert options == [(1, 5000), (1, 5000)]


async def test_a_new_certificate_counts_after_refresh(
    ca: CertificateAuthority, node: TlsNode, tmp_path: Path, nursery: trio.Nursery
) -> None:
    late = TlsNode(tmp_path / "late").enter(ca, at=utc_now() - CERTIFICATE_LIFETIME + DAY)
    address = await node.listen(nursery, echo_once)
    assert late.identity.renew_if_due(ca, 0, utc_now())
    late.gate.refresh()
    assert await says(await late.gate.dial(node.id, address))
    late.identity.check_validity(utc_now() + CERTIFICATE_LIFETIME - DAY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:9000", ("10.0.0.1", 9000)),
        ("host.example:1", ("host.example", 1)),
        ("[fd00::1]:65535", ("fd00::1", 65535)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":9000", "host", "host:", "host:0", "host:65536", "host:-1", "host:x", "host: 1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(PeerUnreachable, match="not host:port"):
        split_address(text)


# The files of an identity.


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "identity"
    first = Identity.load_or_create(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "node.key").stat().st_mode) == 0o600
    assert Identity.load_or_create(directory).node_id == first.node_id
    assert node_id_of(first.public_key) == first.node_id
    assert not first.is_member


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a private key"),
        (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            "is not an ed25519 key",
        ),
    ],
)
def test_a_damaged_key_is_named_and_kept(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "node.key").write_bytes(content)
    with pytest.raises(IdentityError, match=reason):
        Identity.load_or_create(tmp_path)
    assert (tmp_path / "node.key").read_bytes() == content


def test_a_key_becomes_a_members_by_one_rename(ca: CertificateAuthority, tmp_path: Path) -> None:
    directory, joining = tmp_path / "identity", tmp_path / "joining"
    identity = Identity.to_join(joining)
    # A certificate that a killed join left is not taken for a member's; the key is the same.
    identity.install(b"not a certificate", b"nor a CA")
    again = Identity.to_join(joining)
    assert (again.node_id, again.is_member) == (identity.node_id, False)
    pem = issue_certificate(ca, again.public_key, utc_now())
    again.become_member(directory, pem, ca.certificate_pem)
    assert not joining.exists()
    found = Identity.load_or_create(directory)
    assert (found.node_id, found.is_member) == (identity.node_id, True)
    assert again.certificate == found.certificate
    again.server_context()


def test_the_end_of_a_ca_is_told_in_its_last_year(ca: CertificateAuthority) -> None:
    end = utc_now() + CA_LIFETIME
    assert ca_end_in_sight(ca, end - CA_NOTICE - DAY) is None
    told = ca_end_in_sight(ca, end - CA_NOTICE + DAY)
    assert told is not None
    assert abs(told - end) < DAY


def test_a_key_of_another_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Identity.load_or_create(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(IdentityError, match=r"node\.key must belong to whoever runs ollamad"):
        Identity.load_or_create(tmp_path)


def test_the_certificate_is_renewed_when_a_third_of_its_life_is_left(
    ca: CertificateAuthority, tmp_path: Path
) -> None:
    now = utc_now()
    identity = TlsNode(tmp_path).enter(ca, at=now).identity
    due = now + CERTIFICATE_LIFETIME - RENEW_BEFORE
    assert not identity.renew_if_due(ca, 0, due - DAY)
    before = identity.certificate
    assert identity.renew_if_due(ca, 0, due + DAY)
    assert identity.certificate != before
    assert peer_certificate(identity.certificate).node_id == identity.node_id


@pytest.mark.parametrize("shift", [-BACKDATE - DAY, CERTIFICATE_LIFETIME + DAY])
def test_a_clock_that_does_not_fit_the_certificate(
    ca: CertificateAuthority, tmp_path: Path, shift: datetime.timedelta
) -> None:
    identity = TlsNode(tmp_path).enter(ca).identity
    identity.check_validity(utc_now())
    with pytest.raises(IdentityError, match="set the clock"):
        identity.check_validity(utc_now() + shift)


@pytest.mark.parametrize("der", [b"", b"junk", b"\x30\x82\xff\xff"])
def test_what_is_no_certificate(der: bytes) -> None:
    with pytest.raises(IdentityError, match="not a certificate"):
        peer_certificate(der)


def test_a_certificate_over_another_kind_of_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, utc_now(), utc_now() + DAY)

    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    with pytest.raises(IdentityError, match="no ed25519 key"):
        peer_certificate(der)


def test_private_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    (tmp_path / ".secret.tmp").write_bytes(b"left by a crash")
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_the_ca_signs_for_the_id_of_the_key(ca: CertificateAuthority) -> None:
    key = bytes(range(32))
    leaf = x509.load_pem_x509_certificate(issue_certificate(ca, key, utc_now()))
    authority = x509.load_pem_x509_certificate(ca.certificate_pem)
    leaf.verify_directly_issued_by(authority)
    assert leaf.subject.rfc4514_string() == f"CN={node_id_of(key)}"
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert certificate_der(ca.certificate_pem) == authority.public_bytes(serialization.Encoding.DER)
