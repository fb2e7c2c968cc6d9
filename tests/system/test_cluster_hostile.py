"""Floods, half-open connections and hostile members: the cluster goes on, in bounded memory.

While each attack runs, the other node commits through the one that is attacked and asks it, and
the attacked daemon's memory is watched. The bounds are several times what was measured, and far
below what the attack would take without its limit.
"""

import contextlib
import os
import pickle
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ollamad.core.ids import NodeId
from ollamad.core.state import CertificateAuthority
from ollamad.machine import Machine
from ollamad.peers.identity import (
    CERTIFICATE_LIFETIME,
    issue_certificate,
    make_ca,
    private_pem,
    raw_public_key,
    self_signed,
)
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.wire.mux import HEADER, MAX_MESSAGE, Kind, MuxConnection
from tests.system.harness import Cluster, Node, wait_until
from tests.system.strangers import (
    addresses,
    client_context,
    connected,
    framed,
    new_warnings,
    read_all,
    secured,
    send,
)

MIB = 1 << 20
FLOOD = 10_000  # connections of one address
FLOOD_LINES = 60  # that the log may have of it; the limit is ten a minute and kind
CLOSE_LIMIT_S = 10.0  # handshake, hello and join frame have 5 s each
# Between two answers of the cluster, and what one may take: usually some hundredths, but the
# attackers share the processors with the nodes.
PACE_S = 0.1
ANSWER_LIMIT_S = 5.0
GROWTH_LIMIT = 40 * MIB  # of the attacked daemon, unless a test says more
# After a node has left, the others let it hear so for 3 s.
FAREWELL_LIMIT_S = 8.0

PORTS = ["p2p_port", "raft_port"]
ALL_PORTS = [*PORTS, "api_port"]


class Watch:
    """What the cluster does while it is attacked."""

    def __init__(self, cluster: Cluster) -> None:
        self.attacked, self._other = cluster.nodes
        self._process = psutil.Process(self.attacked.pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._failures: list[str] = []
        self._times: list[float] = []
        self._peak = 0

    def __enter__(self) -> "Watch":
        self._leader = self.attacked.get("/cluster/status")["leader"]
        self._before = self._process.memory_info().rss
        self._log = self.attacked.log()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Bytes that the attacked daemon took more at its most than before."""
        return self._peak - self._before

    @property
    def lines(self) -> int:
        """Lines that it logged since."""
        return len(self.attacked.log()[len(self._log) :].splitlines())

    def check(self, growth_limit: int = GROWTH_LIMIT) -> None:
        """Fail unless every question was answered in time and memory was bounded."""
        wait_until("the cluster was asked", lambda: len(self._times) > 1)
        worst = max(self._times)
        print(
            f"RSS {self._before / MIB:.0f} MiB, at most {self.growth / MIB:+.1f} MiB; "
            f"{len(self._times)} commits and reads, the slowest {worst:.2f} s; {self.lines} lines"
        )
        assert not self._failures, self._failures[:3]
        assert worst < ANSWER_LIMIT_S
        assert self.growth < growth_limit, f"{self.growth / MIB:.0f} MiB"
        assert self.attacked.get("/cluster/status")["leader"] == self._leader, "nobody was deposed"

    def _ask(self) -> None:
        with self.attacked.client() as near, self._other.client() as far:
            while not self._stop.wait(PACE_S):
                self._peak = max(self._peak, self._process.memory_info().rss)
                begun = time.monotonic()
                try:
                    # A commit by both nodes, asked for at the follower; and a question.
                    undrained = far.post(f"/nodes/{self.attacked.id}/undrain", json={}, timeout=20)
                    asked = near.get("/nodes", timeout=20)
                    for answer in (undrained, asked):
                        if answer.status_code != 200:
                            self._failures.append(answer.text)
                    online = [n["status"] for n in asked.json()["nodes"]]
                    if "offline" in online:
                        self._failures.append(str(online))
                except httpx.HTTPError as error:
                    self._failures.append(repr(error))
                self._times.append(time.monotonic() - begun)


@pytest.fixture(scope="module")
def pair(single: Cluster) -> Cluster:
    """Two nodes."""
    single.grow()
    return single


@pytest.fixture(scope="module")
def authority(single: Cluster, tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    """The cluster's CA with its key, which every member has."""
    [node] = single.nodes[:1]
    journal = tmp_path_factory.mktemp("journal") / "raft.db"
    for file in node.data_dir.glob("raft.db*"):
        shutil.copy(file, journal.parent / file.name)

    async def read() -> CertificateAuthority:
        machine = Machine()
        store = SqliteStore(journal)
        raft = RaftNode(NodeId(node.id), store, machine, lambda *_: None)
        try:
            await raft.open()
            async with trio.open_nursery() as nursery:
                await nursery.start(raft.run)
                with trio.fail_after(20):
                    while machine.state.ca is None:  # noqa: ASYNC110 - it is told to nobody
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        finally:
            await store.aclose()
        assert machine.state.ca is not None
        return machine.state.ca

    return trio.run(read)


class Credentials:
    """A certificate and its key, as files that TLS can load."""

    def __init__(self, directory: Path, certificate_pem: bytes, key_pem: bytes) -> None:
        directory.mkdir()
        (directory / "node.crt").write_bytes(certificate_pem)
        (directory / "node.key").write_bytes(key_pem)
        self.path = directory


@pytest.fixture
def insider(authority: CertificateAuthority, tmp_path: Path) -> Path:
    """The identity of a node that the cluster's CA let in."""
    key = Ed25519PrivateKey.generate()
    pem = issue_certificate(authority, raw_public_key(key.public_key()), datetime.now(UTC))
    return Credentials(tmp_path / "insider", pem, private_pem(key)).path


@pytest.fixture
def watch(pair: Cluster) -> Iterator[Watch]:
    with Watch(pair) as watch:
        yield watch


@pytest.fixture(autouse=True)
def still_served(pair: Cluster) -> Iterator[None]:
    yield
    for node in pair.nodes:
        assert node.get("/cluster/status")["status"] == "healthy"


def in_parallel(count: int, work: Callable[[int], Any], workers: int = 8) -> list[Any]:
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(count)))


# Strangers in numbers.


@pytest.mark.parametrize(
    ("port", "count"), [("p2p_port", FLOOD), ("raft_port", 2000), ("api_port", 2000)]
)
def test_a_flood_makes_few_lines_and_no_memory(watch: Watch, port: str, count: int) -> None:
    source = next(addresses)

    def connect(number: int) -> None:
        with contextlib.suppress(OSError), connected(watch.attacked, port, source) as stranger:
            send(stranger, b"GET / HTTP/1.0\r\n\r\n" if number % 2 else b"\x80\x04\x95garbage")

    in_parallel(count, connect)
    time.sleep(1)
    assert watch.lines <= FLOOD_LINES
    watch.check()
    if port != "api_port":  # where anybody may send anything
        assert watch.lines >= 1
        # What another host does is told all the same.
        before = watch.attacked.log()
        with connected(watch.attacked, port) as stranger:
            send(stranger, b"garbage" * 10)
            read_all(stranger)
        wait_until("it is told", lambda: new_warnings(watch.attacked, before))


@pytest.mark.parametrize("port", PORTS)
def test_a_flood_of_whole_handshakes(watch: Watch, port: str, tmp_path: Path) -> None:
    """Each costs signatures; with a certificate of nobody, and without one."""
    key = Ed25519PrivateKey.generate()
    own = Credentials(tmp_path / "own", self_signed(key, datetime.now(UTC)), private_pem(key))
    source = next(addresses)

    def connect(number: int) -> None:
        with (
            contextlib.suppress(OSError),
            secured(watch.attacked, port, own.path if number % 2 else None, source) as stranger,
        ):
            send(stranger, b"x")

    in_parallel(600, connect)
    assert 1 <= watch.lines <= FLOOD_LINES
    watch.check()


def client_hello() -> bytes:
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("port", PORTS)
def test_half_open_connections_end_by_themselves(watch: Watch, port: str) -> None:
    """Hundreds, of twenty addresses, that stop at some stage and stay; half of them say FIN."""
    hello = client_hello()
    sources = [next(addresses) for _ in range(20)]
    with contextlib.ExitStack() as stack:

        def stop_halfway(number: int) -> socket.socket | None:
            source, stage, half_closed = sources[number % 20], number % 3, number % 2
            try:
                if stage == 2:  # the handshake is done
                    stream: socket.socket = stack.enter_context(
                        secured(watch.attacked, port, source=source)
                    )
                else:
                    stream = stack.enter_context(connected(watch.attacked, port, source))
                    stream.sendall(hello[: len(hello) * stage])
                    stream.sendall(hello[: number if stage == 0 else 0])
                if half_closed:
                    # Below TLS: only the direction from here to there is closed.
                    socket.socket.shutdown(stream, socket.SHUT_WR)
            except OSError:
                return None  # turned away at once
            return stream

        held = [one for one in in_parallel(300, stop_halfway) if one is not None]
        assert len(held) > 150
        begun = time.monotonic()
        for stranger in held:
            stranger.settimeout(CLOSE_LIMIT_S)
            read_all(stranger)
        assert time.monotonic() - begun < CLOSE_LIMIT_S
    watch.check()


def test_silent_clients_of_the_api_do_not_stop_the_cluster(watch: Watch) -> None:
    with contextlib.ExitStack() as stack:
        for source in [next(addresses) for _ in range(4)]:
            for number in range(50):
                client = stack.enter_context(connected(watch.attacked, "api_port", source))
                client.sendall(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n"[:number])
        time.sleep(2)
        watch.check()


# What a member, or who stole its key, may try.


def frames_of(port: str, *payloads: bytes) -> bytes:
    """The greeting of that port, if it has one, and frames with these bytes."""
    if port == "raft_port":
        return b"".join(map(framed, payloads))
    hello = MuxConnection(dialler=True, version="0").hello()
    return hello + b"".join(HEADER.pack(Kind.OPEN, 1, len(data)) + data for data in payloads)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("port", ALL_PORTS)
def test_no_pickle_is_ever_loaded(watch: Watch, insider: Path, port: str, tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"
    bomb = pickle.dumps(Bomb(trap))
    with connected(watch.attacked, port) as stranger:
        send(stranger, bomb)
        stranger.settimeout(2)
        with contextlib.suppress(TimeoutError):
            read_all(stranger)
    if port != "api_port":
        for data in (bomb, framed(bomb), frames_of(port, bomb)):
            for identity in (None, insider):
                with secured(watch.attacked, port, identity) as stream:
                    send(stream, data)
                    stream.settimeout(2)
                    with contextlib.suppress(TimeoutError):
                        read_all(stream)
    else:
        for path in ("/chat", "/auth/login", "/models"):
            kind = {"Content-Type": "application/x-pickle"}
            answer = watch.attacked.request("POST", path, content=bomb, headers=kind)
            assert answer.status_code in (400, 415), answer.text
    pickle.loads(bomb)  # it does go off
    assert trap.exists()
    trap.rmdir()
    time.sleep(0.5)
    assert not trap.exists()
    watch.check()


LENGTHS = {
    "raft_port": [
        struct.pack("!I", 0xFFFFFFFF) + b"x" * 1000,
        struct.pack("!I", (4 << 20) + 1) + b"x" * 1000,
        struct.pack("!I", 0),
        struct.pack("!I", 0) * 10_000,
    ],
    "p2p_port": [
        frames_of("p2p_port") + HEADER.pack(Kind.OPEN, 1, 0xFFFFFFFF) + b"x" * 1000,
        frames_of("p2p_port") + HEADER.pack(Kind.OPEN, 1, MAX_MESSAGE + 1) + b"x" * 1000,
        frames_of("p2p_port") + HEADER.pack(Kind.OPEN, 1, 0),
        HEADER.pack(Kind.HELLO, 0, 0) * 10_000,
    ],
}


@pytest.mark.parametrize("case", range(4), ids=["4 GiB", "just over", "empty", "all empty"])
@pytest.mark.parametrize("port", PORTS)
def test_a_member_with_wrong_lengths_is_cut_off_with_a_line(
    watch: Watch, insider: Path, port: str, case: int
) -> None:
    before = watch.attacked.log()
    begun = time.monotonic()
    with secured(watch.attacked, port, insider) as stream:
        send(stream, LENGTHS[port][case])
        read_all(stream)
    assert time.monotonic() - begun < 3, "at once, not by a timeout"
    wait_until("it is told", lambda: told(watch.attacked, before))
    assert len(told(watch.attacked, before)) == 1
    watch.check()


def told(node: Node, before: str) -> list[str]:
    new = node.log()[len(before) :].splitlines()
    return [line for line in new if "WARNING" in line or "ERROR" in line]


@pytest.mark.parametrize("port", PORTS)
def test_members_whose_frames_never_end(watch: Watch, insider: Path, port: str) -> None:
    """Whole but for their last byte: a member may hold a frame of each of its few connections."""
    payload = bytes(MAX_MESSAGE - 1 if port == "p2p_port" else (4 << 20) - 1)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            with contextlib.suppress(OSError):
                stream = stack.enter_context(secured(watch.attacked, port, insider))
                if port == "p2p_port":
                    send(stream, frames_of(port) + HEADER.pack(Kind.OPEN, 1, len(payload) + 1))
                else:
                    send(stream, struct.pack("!I", len(payload) + 1))
                send(stream, payload)
        time.sleep(2)
        watch.check()


def test_a_member_that_dials_in_a_loop_has_four_links(watch: Watch, insider: Path) -> None:
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(secured(watch.attacked, "p2p_port", insider)) for _ in range(40)
        ]
        for stream in streams:
            send(stream, frames_of("p2p_port"))
        time.sleep(1)
        alive = 0
        for stream in streams:
            stream.settimeout(0.05)
            try:
                while stream.recv(4096):
                    pass
            except TimeoutError:
                alive += 1
            except OSError:
                pass
        assert alive == 4
        watch.check()


def test_a_member_that_fills_thousands_of_exchanges(watch: Watch, insider: Path) -> None:
    """Requests whose parts never end, 1.5 MiB in each of 400 exchanges, over four links."""
    opened = b"\x0einfer.generate"

    def fill(_: int) -> int:
        sent = 0
        with secured(watch.attacked, "p2p_port", insider) as stream:
            stream.settimeout(5)
            stream.sendall(frames_of("p2p_port"))
            with contextlib.suppress(OSError):
                for number in range(1, 101):
                    stream.sendall(HEADER.pack(Kind.OPEN, number, len(opened)) + opened)
                    for size in (MAX_MESSAGE // 2, MAX_MESSAGE):
                        stream.sendall(HEADER.pack(Kind.MESSAGE, number, size) + bytes(size))
                        sent += size
            time.sleep(2)  # it holds what it has
        return sent

    sent = sum(in_parallel(4, fill))
    assert sent > 500 * MIB, f"{sent / MIB} MiB were sent"
    watch.check(320 * MIB)  # half of it is what the allocator makes of messages of 1 MiB
    once = watch.growth
    in_parallel(4, fill)
    assert watch.growth < once + GROWTH_LIMIT, "the second time needs no more"
    assert "refusing an exchange" in watch.attacked.log()


def test_a_member_that_opens_and_resets_in_a_loop(watch: Watch, insider: Path) -> None:
    """HTTP/2's "rapid reset", 20,000 times."""
    mux = MuxConnection(dialler=True, version="0")
    with secured(watch.attacked, "p2p_port", insider) as stream:
        stream.settimeout(20)
        stream.sendall(mux.hello())
        with contextlib.suppress(OSError):
            for _ in range(200):
                batch = bytearray()
                for _ in range(100):
                    number, data = mux.open("pieces", b"x")
                    batch += data + mux.reset(number, "X", "")
                stream.sendall(batch)
        time.sleep(0.5)
        watch.check(100 * MIB)


def test_a_member_that_asks_and_never_reads(watch: Watch, insider: Path) -> None:
    """Every question is refused; the refusals must not pile up."""
    plain = client_context(insider)
    with connected(watch.attacked, "p2p_port") as transport:
        transport.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with plain.wrap_socket(transport) as stream:
            stream.settimeout(10)
            mux = MuxConnection(dialler=True, version="0")
            stream.sendall(mux.hello())
            cut_off = False
            try:
                for _ in range(2000):
                    batch = bytearray()
                    for _ in range(200):
                        batch += mux.open("x" * 200, b"")[1]
                        mux._streams.clear()
                    stream.sendall(batch)
            except OSError:
                cut_off = True
            assert cut_off
    watch.check(150 * MIB)


@pytest.mark.parametrize("identity", ["stranger", "member"])
@pytest.mark.parametrize("port", PORTS)
def test_key_updates_in_a_loop(watch: Watch, insider: Path, port: str, identity: str) -> None:
    """TLS 1.3 has no renegotiation; asking for new keys again and again is what is left of it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{getattr(watch.attacked, port)}"]
    command += ["-tls1_3", "-bind", f"{next(addresses)}:0"]
    if identity == "member":
        command += ["-cert", str(insider / "node.crt"), "-key", str(insider / "node.key")]
    client = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert client.stdin is not None
    try:
        for _ in range(1500):  # one a read, or it is taken for text
            os.write(client.stdin.fileno(), b"K\n")
            time.sleep(0.001)
    except BrokenPipeError:
        pass  # it was cut off
    finally:
        client.kill()
        client.communicate()
    watch.check()


# Certificates.


def expired(ca: CertificateAuthority, key: Ed25519PrivateKey, _: Node) -> tuple[bytes, bytes]:
    past = datetime.now(UTC) - CERTIFICATE_LIFETIME - timedelta(days=1)
    return issue_certificate(ca, raw_public_key(key.public_key()), past), private_pem(key)


def not_yet_valid(ca: CertificateAuthority, key: Ed25519PrivateKey, _: Node) -> tuple[bytes, bytes]:
    future = datetime.now(UTC) + timedelta(days=1)
    return issue_certificate(ca, raw_public_key(key.public_key()), future), private_pem(key)


def of_a_namesake_ca(
    ca: CertificateAuthority, key: Ed25519PrivateKey, _: Node
) -> tuple[bytes, bytes]:
    fake = make_ca(datetime.now(UTC))
    pem = issue_certificate(fake, raw_public_key(key.public_key()), datetime.now(UTC))
    return pem + fake.certificate_pem, private_pem(key)


def of_a_member(ca: CertificateAuthority, key: Ed25519PrivateKey, _: Node) -> tuple[bytes, bytes]:
    """A chain of three: a good certificate that was used as if it were a CA."""
    pem = issue_certificate(ca, raw_public_key(key.public_key()), datetime.now(UTC))
    middle = CertificateAuthority(pem, private_pem(key))
    leaf = Ed25519PrivateKey.generate()
    chain = issue_certificate(middle, raw_public_key(leaf.public_key()), datetime.now(UTC))
    return chain + pem, private_pem(leaf)


def in_the_name_of_a_member(
    ca: CertificateAuthority, key: Ed25519PrivateKey, node: Node
) -> tuple[bytes, bytes]:
    """All that a member's certificate says, over another key."""
    real = x509.load_pem_x509_certificate((node.data_dir / "identity" / "node.crt").read_bytes())
    builder = x509.CertificateBuilder(
        issuer_name=real.issuer,
        subject_name=real.subject,
        public_key=key.public_key(),
        serial_number=real.serial_number,
        not_valid_before=real.not_valid_before_utc,
        not_valid_after=real.not_valid_after_utc,
        extensions=list(real.extensions),
    )
    return builder.sign(key, None).public_bytes(serialization.Encoding.PEM), private_pem(key)


def over_another_kind_of_key(
    ca: CertificateAuthority, key: Ed25519PrivateKey, _: Node
) -> tuple[bytes, bytes]:
    """Signed by the real CA, which never does that."""
    ca_key = serialization.load_pem_private_key(ca.private_key_pem, None)
    assert isinstance(ca_key, Ed25519PrivateKey)
    issuer = x509.load_pem_x509_certificate(ca.certificate_pem).subject
    other, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer, issuer, other.public_key(), 1, now - timedelta(hours=1), now + timedelta(days=1)
    )
    return (
        builder.sign(ca_key, None).public_bytes(serialization.Encoding.PEM),
        other.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (expired, "expired"),
        (not_yet_valid, "not yet valid"),
        (of_a_namesake_ca, "another cluster"),
        (of_a_member, "another cluster"),
        (in_the_name_of_a_member, "another cluster"),
        (over_another_kind_of_key, "no ed25519 key"),
    ],
)
@pytest.mark.parametrize("port", PORTS)
def test_bad_certificates_are_refused_with_a_line(
    watch: Watch,
    authority: CertificateAuthority,
    pair: Cluster,
    port: str,
    forge: Callable[..., tuple[bytes, bytes]],
    words: str,
    tmp_path: Path,
) -> None:
    shown = Credentials(
        tmp_path / "shown", *forge(authority, Ed25519PrivateKey.generate(), pair.nodes[1])
    )
    before = watch.attacked.log()
    with contextlib.suppress(OSError), secured(watch.attacked, port, shown.path) as stream:
        send(stream, frames_of(port, b"x"))
        assert read_all(stream) == b"", "not even a greeting"
    wait_until("it is told", lambda: new_warnings(watch.attacked, before))
    [line] = new_warnings(watch.attacked, before)
    assert words in line
    watch.check()


def test_a_node_that_leaves_loses_its_connections_and_gets_no_new_ones(
    pair: Cluster, tmp_path: Path
) -> None:
    node = pair.nodes[0]
    third = pair.grow()
    identity = tmp_path / "identity"
    shutil.copytree(third.data_dir / "identity", identity)
    third.stop()  # or its own link would take the place of ours
    context = client_context(identity)
    with contextlib.ExitStack() as stack:
        open_streams = {}
        for port in PORTS:
            transport = stack.enter_context(connected(node, port))
            stream = stack.enter_context(context.wrap_socket(transport))
            send(stream, frames_of(port))
            open_streams[port] = stream
        assert open_streams["p2p_port"].recv(4096), "it is greeted"
        sessions = {port: stream.session for port, stream in open_streams.items()}
        for stream in open_streams.values():
            stream.settimeout(0.5)
            with pytest.raises(TimeoutError):
                stream.recv(1)  # nothing to say, and open
        pair.dismiss(third)
        begun = time.monotonic()
        for stream in open_streams.values():
            stream.settimeout(FAREWELL_LIMIT_S)
            read_all(stream)
        assert time.monotonic() - begun < FAREWELL_LIMIT_S
    for port in PORTS:
        before = node.log()
        with (
            contextlib.suppress(OSError),
            connected(node, port) as transport,
            context.wrap_socket(transport, session=sessions[port]) as stream,
        ):
            assert not stream.session_reused
            send(stream, frames_of(port))
            said = read_all(stream)
            # That it is no member any more, where members are greeted.
            assert b"departed" in said if port == "p2p_port" else said == b""
        wait_until("it is told", lambda: new_warnings(node, before))  # noqa: B023
        assert "not a member any more" in new_warnings(node, before)[0]


@pytest.mark.parametrize("port", PORTS)
def test_a_member_that_speaks_the_other_ports_protocol(
    watch: Watch, insider: Path, port: str
) -> None:
    """Both ports show the same certificate, so somebody in between can swap them."""
    other = PORTS[1 - PORTS.index(port)]
    data = frames_of(other, b"\x96\xa6append\x01\x00\x00\x00\x90")
    before = watch.attacked.log()
    begun = time.monotonic()
    with secured(watch.attacked, port, insider) as stream:
        send(stream, data)
        read_all(stream)
    assert time.monotonic() - begun < 3, "the first frame is enough"
    wait_until("it is told", lambda: told(watch.attacked, before))
    watch.check()
