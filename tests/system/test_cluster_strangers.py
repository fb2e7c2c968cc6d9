"""What somebody gets who is no member: the join exchange on the P2P port, and nothing else.

The strangers here come from addresses of their own in 127/8, so that the limits that hold for an
address hold for one test.
"""

import contextlib
import itertools
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ollamad.core.ids import NodeId, node_id_of
from ollamad.core.state import Capacity
from ollamad.wire.codec import decode, encode
from ollamad.wire.join import (
    JoinReply,
    JoinRequest,
    Refusal,
    Sealed,
    Token,
    channel_binding,
    parse_token,
    proof_text,
    seal_request,
)
from ollamad.wire.mux import PROTOCOL
from tests.system.harness import Cluster, Node, wait_until
from tests.system.strangers import (
    addresses,
    client_context,
    closed,
    connected,
    framed,
    new_warnings,
    read_all,
    secured,
    send,
)

CLOSE_LIMIT_S = 10.0  # handshake and frame have 5 s each
PORTS = ["p2p_port", "raft_port"]


@pytest.fixture(scope="module")
def pair(single: Cluster) -> Cluster:
    """Two nodes."""
    single.grow()
    return single


@pytest.fixture(scope="module")
def foreign_identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The identity of a member of another cluster."""
    directory = tmp_path_factory.mktemp("foreign")
    with Cluster(directory) as cluster:
        node = cluster.found()
        node.stop()
        shutil.copytree(node.data_dir / "identity", directory / "identity")
    return directory / "identity"


@pytest.fixture(autouse=True)
def still_served(pair: Cluster) -> Iterator[None]:
    """Whatever a stranger does, the members go on."""
    yield
    for node in pair.nodes:
        status = node.get("/cluster/status")
        assert status["status"] == "healthy", status
        assert status["cluster_size"] == 2
    pair.nodes[1].post(f"/nodes/{pair.nodes[0].id}/undrain")  # a commit, by both


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(
    "data",
    [
        b"GET /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0" * 4096,
        b"\x16\x03\x01\xff\xff" + b"x" * 70000,  # a TLS record as long as they get
        bytes(range(256)) * 16,
    ],
    ids=["http", "zeros", "endless record", "noise"],
)
def test_no_tls_no_answer(pair: Cluster, port: str, data: bytes) -> None:
    node = pair.nodes[0]
    before = node.log()
    with connected(node, port) as stranger:
        send(stranger, data)
        answer = read_all(stranger)
    # At most a TLS alert: a record of seven bytes.
    assert len(answer) <= 7, answer
    assert not answer or answer[0] == 21
    wait_until("it is told in a line", lambda: new_warnings(node, before))
    assert len(new_warnings(node, before)) == 1


@pytest.mark.parametrize("port", PORTS)
def test_old_tls_is_refused(pair: Cluster, port: str) -> None:
    context = client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(pair.nodes[0], port) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain)


def test_a_stranger_gets_nothing_on_the_raft_port(pair: Cluster) -> None:
    node = pair.nodes[0]
    before = node.log()
    begun = time.monotonic()
    with secured(node, "raft_port") as stream:
        token = parse_token(pair.join_token())
        send(stream, framed(sealed(request(token), token.key, binding(stream))))
        assert read_all(stream) == b""
    assert time.monotonic() - begun < CLOSE_LIMIT_S
    wait_until("it is told in a line", lambda: new_warnings(node, before))
    assert len(new_warnings(node, before)) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # A member's hello, which is a short join frame.
        (struct.pack("!BII", 0, 0, 20) + b"\x83\xa8protocol\x01\xa6oldest\x01", "not a valid"),
        (struct.pack("!I", 1 << 30), "too long"),
        (struct.pack("!I", 32 * 1024 + 1) + b"x" * 40000, "too long"),
        (struct.pack("!I", 4) + b"\xc1\xc1\xc1\xc1", "not a valid"),
        (struct.pack("!I", 30000) + b"\x91" * 30000, "not a valid"),  # nested that deep
        (struct.pack("!I", 5) + b"\xdd\xff\xff\xff\xff", "not a valid"),  # a list of 4 billion
        (struct.pack("!I", 0), "not a valid"),
    ],
    ids=["hello", "huge", "too long", "no msgpack", "deep", "wide", "empty"],
)
def test_a_stranger_that_does_not_join_is_cut_off(pair: Cluster, data: bytes, words: str) -> None:
    node = pair.nodes[0]
    before = node.log()
    begun = time.monotonic()
    with secured(node, "p2p_port") as stream:
        send(stream, data)
        assert read_all(stream) == b""
    assert time.monotonic() - begun < 3, "at once, not by a timeout"
    wait_until("it is told in a line", lambda: new_warnings(node, before))
    [line] = new_warnings(node, before)
    assert words in line


@pytest.mark.parametrize("port", PORTS)
def test_a_certificate_of_another_cluster_is_refused(
    pair: Cluster, foreign_identity: Path, port: str
) -> None:
    node = pair.nodes[0]
    before = node.log()
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError),
        secured(node, port, foreign_identity) as stream,
    ):
        send(stream, struct.pack("!BII", 0, 0, 0))
        assert read_all(stream) == b""
    wait_until("it is told in a line", lambda: new_warnings(node, before))
    assert "another cluster" in new_warnings(node, before)[0]
    assert len(new_warnings(node, before)) == 1


def test_the_certificate_of_a_node_that_left_is_refused(pair: Cluster, tmp_path: Path) -> None:
    third = pair.grow()
    shutil.copytree(third.data_dir / "identity", tmp_path / "identity")
    with secured(pair.nodes[0], "p2p_port", tmp_path / "identity") as stream:
        assert stream.recv(1), "as long as it is a member it is greeted"
    pair.dismiss(third)
    for node, port in itertools.product(pair.nodes, PORTS):
        with (
            contextlib.suppress(ssl.SSLError, ConnectionError),
            secured(node, port, tmp_path / "identity") as stream,
        ):
            said = read_all(stream)
            # That it is no member any more, where members are greeted.
            assert b"departed" in said if port == "p2p_port" else said == b""
            assert len(said) < 200


@pytest.mark.parametrize("port", PORTS)
def test_a_member_that_talks_nonsense_is_cut_off(pair: Cluster, port: str) -> None:
    """Its certificate is good, its program is broken."""
    identity = pair.nodes[1].data_dir / "identity"
    with secured(pair.nodes[0], port, identity) as stream:
        send(stream, struct.pack("!I", 1 << 31) + b"\xc1" * 5000)
        begun = time.monotonic()
        read_all(stream)
        assert time.monotonic() - begun < CLOSE_LIMIT_S


@pytest.mark.parametrize("port", PORTS)
def test_slow_strangers_do_not_shut_members_out(pair: Cluster, port: str) -> None:
    """Hundreds of connections that say nothing, renewed as they are closed."""
    node, other = pair.nodes
    source = next(addresses)
    stop = threading.Event()

    def hold(count: int) -> None:
        held: list[socket.socket] = []
        while not stop.is_set():
            if len(held) < count:
                with contextlib.suppress(OSError):
                    address = ("127.0.0.1", getattr(node, port))
                    held.append(socket.create_connection(address, 1, source_address=(source, 0)))
            time.sleep(0.002)
            for one in held[:20]:  # the oldest are closed first
                if closed(one):
                    one.close()
                    held.remove(one)
        for one in held:
            one.close()

    thread = threading.Thread(target=hold, args=(400,))
    thread.start()
    try:
        time.sleep(2)
        other.kill()
        other.start()
        pair.wait_whole(20)
    finally:
        stop.set()
        thread.join()


def test_a_stranger_that_says_nothing_is_cut_off(pair: Cluster) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(pair.nodes[0], port)) for port in PORTS]
        begun = time.monotonic()
        for stranger in silent:
            assert len(read_all(stranger)) <= 7
        assert time.monotonic() - begun < CLOSE_LIMIT_S


def test_a_stranger_that_drips_is_cut_off(pair: Cluster) -> None:
    begun = time.monotonic()
    with secured(pair.nodes[0], "p2p_port") as stream:
        send(stream, struct.pack("!I", 1000))
        with pytest.raises((OSError, AssertionError)):  # noqa: PT012 - which call fails is open
            while True:
                stream.settimeout(0.3)
                with contextlib.suppress(TimeoutError):
                    assert stream.recv(1) != b""
                stream.sendall(b"x")
                assert time.monotonic() - begun < 20, "nobody cut it off"
    assert time.monotonic() - begun < CLOSE_LIMIT_S


# The join exchange itself, with a request that is wrong in one thing.


_keys: dict[bytes, Ed25519PrivateKey] = {}  # by public key


def key_pair() -> tuple[str, bytes]:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    _keys[public] = key
    return node_id_of(public), public


def sealed(request: JoinRequest, token_key: bytes, seen: bytes) -> bytes:
    """The frame of a request that is proved, if the key is ours."""
    key = _keys.get(request.public_key, Ed25519PrivateKey.generate())
    proof = key.sign(proof_text(request.token_id, seen))
    return seal_request(msgspec.structs.replace(request, proof=proof), token_key, seen)


def request(token: Token) -> JoinRequest:
    node_id, public = key_pair()
    return JoinRequest(
        node_id=node_id,
        public_key=public,
        name=f"stranger-{node_id[-6:]}",
        api_address=":1",
        p2p_address=":2",
        raft_address=":3",
        capacity=Capacity(1, 1, 1),
        version="0",
        protocol=PROTOCOL,
        token_id=token.id,
        now=time.time(),
    )


def public_key_of(node: Node) -> bytes:
    """What everybody sees of a member's key."""
    with secured(node, "p2p_port") as stream:
        shown = stream.getpeercert(binary_form=True)
    assert shown
    key = x509.load_der_x509_certificate(shown).public_key()
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def binding(stream: ssl.SSLSocket) -> bytes:
    certificate = stream.getpeercert(binary_form=True)
    assert certificate
    return channel_binding(certificate)


def exchange(node: Node, frame_of: object, source: str | None = None) -> bytes:
    """Send what `frame_of(binding)` makes; the sponsor's answer, without its length."""
    assert callable(frame_of)
    with secured(node, "p2p_port", source=source) as stream:
        send(stream, framed(frame_of(binding(stream))))
        return read_all(stream)[4:]


def refusal(answer: bytes) -> str:
    return decode(decode(answer, Sealed).body, Refusal).code


def test_each_wrong_request_is_refused_with_its_reason(pair: Cluster) -> None:
    node = pair.nodes[0]
    token = parse_token(pair.join_token())
    right = request(token)
    cases: list[tuple[str, dict[str, object]]] = [
        ("BAD_IDENTITY", {"node_id": key_pair()[0]}),
        (
            "BAD_IDENTITY",
            {"node_id": NodeId(pair.nodes[1].id), "public_key": public_key_of(pair.nodes[1])},
        ),
        ("INCOMPATIBLE_VERSION", {"protocol": 0}),
        ("INCOMPATIBLE_VERSION", {"protocol": 99, "oldest_protocol": 98}),
        ("CLOCK_SKEW", {"now": time.time() - 3600}),
        ("CLOCK_SKEW", {"now": float("nan")}),
        ("BAD_TOKEN", {"token_id": "00" * 6}),
        ("NAME_TAKEN", {"name": pair.nodes[1].name}),
    ]
    for code, change in cases:
        wrong = msgspec.structs.replace(right, **change)
        answer = exchange(node, lambda seen, w=wrong: sealed(w, token.key, seen))
        assert refusal(answer) == code
    answer = exchange(node, lambda seen: sealed(right, b"guessed" * 5, seen))
    assert refusal(answer) == "BAD_TOKEN"


def test_a_request_that_was_captured_is_worth_nothing_elsewhere(pair: Cluster) -> None:
    """Somebody in the middle has another certificate, to which the request is not bound."""
    first, second = pair.nodes
    token = parse_token(pair.join_token())
    captured: list[bytes] = []
    with secured(second, "p2p_port") as stream:
        captured.append(sealed(request(token), token.key, binding(stream)))
    assert refusal(exchange(first, lambda _: captured[0])) == "BAD_TOKEN"


def test_a_replayed_request_lets_nobody_else_in(pair: Cluster) -> None:
    """The same node asks again when its first answer was lost; nobody else profits."""
    node = pair.nodes[0]
    token = parse_token(pair.join_token())
    asked = request(token)
    frames: list[bytes] = []

    def once(seen: bytes) -> bytes:
        frames.append(sealed(asked, token.key, seen))
        return frames[0]

    first = decode(decode(exchange(node, once), Sealed).body, JoinReply)
    again = decode(exchange(node, lambda _: frames[0]), Sealed)
    try:
        assert node.get("/cluster/status")["cluster_size"] == 3
        # Whatever the second answer is, its certificate fits the first node's key alone.
        with contextlib.suppress(msgspec.ValidationError):
            reply = decode(again.body, JoinReply)
            assert reply.cluster_id == first.cluster_id
        changed = decode(frames[0], Sealed)
        other = msgspec.structs.replace(request(token), name=asked.name)
        forged = encode(Sealed(encode(other), changed.mac))
        assert refusal(exchange(node, lambda _: forged)) == "BAD_TOKEN"
    finally:
        node.post("/cluster/leave", {"node_id": asked.node_id}, timeout_s=60)


def test_guessing_is_throttled(pair: Cluster) -> None:
    node = pair.nodes[0]
    source = next(addresses)
    token = parse_token(pair.join_token())
    wrong = request(token)

    def attempt() -> bytes:
        try:
            return exchange(node, lambda seen: sealed(wrong, b"g" * 32, seen), source)
        except (OSError, ssl.SSLError):
            return b""

    begun = time.monotonic()
    answers = [attempt() for _ in range(30)]
    refilled = int((time.monotonic() - begun) / 3)  # it is twenty a minute
    assert answers[0], "the first ones are answered"
    assert sum(map(bool, answers)) <= 20 + refilled
    assert sum(map(bool, answers[-5:])) <= refilled, "the last ones are not"
    # The others are not held up: another address, a right token.
    asked = request(token)
    answer = exchange(node, lambda seen: sealed(asked, token.key, seen))
    assert decode(decode(answer, Sealed).body, JoinReply).cluster_id
    node.post("/cluster/leave", {"node_id": asked.node_id}, timeout_s=60)


# The API port is for everybody, and so has to bear everything.


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 1000,
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 300_000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ],
    ids=["zeros", "long header", "version", "length", "chunks", "http2"],
)
def test_broken_requests_do_not_disturb(pair: Cluster, data: bytes) -> None:
    with connected(pair.nodes[0], "api_port") as client:
        send(client, data)
        client.settimeout(3)
        with contextlib.suppress(TimeoutError):
            answer = read_all(client)
            assert b" 200 " not in answer[:20]
