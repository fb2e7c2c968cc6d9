"""A real daemon and clients that take what they can: memory stays bounded, others are served.

The bounds are stated beside each test, and are on resident memory: what a client costs while it is
there, with room for what a Python process keeps for itself.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.system.conftest import open_cluster
from tests.system.harness import Node, wait_until

MB = 1 << 20
PER_ADDRESS = 1050  # connections; the tests' own clients come beside their crowds
LATENCY_S = 5.0  # for others meanwhile; it is milliseconds where a machine has nothing else to do
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
POST_JSON = (
    b"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
ASK_NODES = b"GET /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node that takes 1,050 connections of one address."""
    settings = {
        "OLLAMAD_API__MAX_CONNECTIONS_PER_ADDRESS": str(PER_ADDRESS),
        "OLLAMAD_RATE_LIMITS__WEBSOCKET": "0",
        "OLLAMAD_RATE_LIMITS__GENERAL": "0",
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        yield cluster.found()


@pytest.fixture(scope="module", autouse=True)
def dripped(node: Node) -> Iterator[Future[bytes]]:
    """What is answered to a body that comes byte by byte from before the first test on, so that
    its minute passes while others run."""
    with (
        socket.create_connection((node.host.address, node.api_port), 1) as one,
        ThreadPoolExecutor(1) as pool,
    ):
        one.sendall(POST_JSON + b"Content-Length: 9000000\r\n\r\n{")
        yield pool.submit(drip, one)
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def drip(one: socket.socket) -> bytes:
    """Send a byte with each timeout of the socket until there is an answer, and return that."""
    while True:
        try:
            begun = one.recv(65536)
        except TimeoutError:
            one.send(b" ")
        else:
            return begun + read_all(one)


class Crowd:
    """Many plain connections to a node. Leaving the block closes them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.sockets:
            one.close()

    def add(self, data: bytes) -> socket.socket:
        one = socket.create_connection((self.node.host.address, self.node.api_port), 30)
        self.sockets.append(one)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            one.sendall(data)
        return one


def read_all(one: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(65536):
            data += part
    return data


def first_of(one: socket.socket) -> bytes:
    """The beginning of the answer; nothing if the connection was cut instead."""
    with contextlib.suppress(ConnectionResetError):
        return one.recv(65536)
    return b""


def rss(node: Node) -> int:
    return int(psutil.Process(node.pid).memory_info().rss)


def files(node: Node) -> int:
    return int(psutil.Process(node.pid).num_fds())


def others_are_served(node: Node) -> None:
    begun = time.monotonic()
    assert node.get("/health")["status"] == "healthy"
    assert node.get("/nodes")["nodes"]
    assert time.monotonic() - begun < LATENCY_S


def test_a_thousand_idle_websockets(node: Node) -> None:
    """At most 48 KiB each; measured are 19."""
    others_are_served(node)
    before = rss(node)
    with Crowd(node) as crowd:
        for _ in range(1000):
            crowd.add(HANDSHAKE + b"\r\n")
        for one in crowd.sockets:
            assert one.recv(65536).startswith(b"HTTP/1.1 101")
        text = node.request("GET", f"{node.url}/metrics").text
        assert "ollamad_websockets 1000.0" in text
        assert rss(node) - before < 1000 * 48 * 1024
        others_are_served(node)
    wait_until(
        "all are gone",
        lambda: "ollamad_websockets 0.0" in node.request("GET", f"{node.url}/metrics").text,
    )


def test_handshakes_that_are_not_ended(node: Node) -> None:
    """At most 64 KiB each, and 15 s."""
    before = rss(node)
    with Crowd(node) as crowd:
        begun = time.monotonic()
        for _ in range(500):
            crowd.add(HANDSHAKE)  # and no empty line
        others_are_served(node)
        assert rss(node) - before < 500 * 64 * 1024
        answers = [read_all(one) for one in crowd.sockets]
        assert time.monotonic() - begun < 60
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    others_are_served(node)


def test_bodies_that_are_too_large_too_deep_or_never_end(node: Node) -> None:
    """One body may be read up to its limit of 32 MiB; none of these is kept."""
    before = rss(node)
    deep = b'{"model":"m","format":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}"
    with Crowd(node) as crowd:
        for _ in range(50):
            announced = crowd.add(POST_JSON + b"Content-Length: 99999999999\r\n\r\n" + b" " * 1000)
            assert b"413" in announced.recv(65536)[:20]
        for _ in range(10):
            one = crowd.add(POST_JSON + b"Content-Length: %d\r\n\r\n" % len(deep) + deep)
            assert b"400" in one.recv(65536)[:20]
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        one = crowd.add(POST_JSON + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            for _ in range(40):
                one.sendall(chunk)
        assert b"413" in one.recv(65536)[:20]
        dripping = [crowd.add(POST_JSON + b"Content-Length: 9000000\r\n\r\n") for _ in range(200)]
        for _ in range(5):
            for one in dripping:
                one.send(b" ")
        others_are_served(node)
    assert rss(node) - before < 100 * MB


def test_floods_of_headers(node: Node) -> None:
    """A head may have 32 KiB; nothing of it stays."""
    before = rss(node)
    floods = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000_000,
        b"GET /" + b"x" * 1_000_000,
    ]
    with Crowd(node) as crowd:
        for _ in range(30):
            for flood in floods:
                answer = read_all(crowd.add(flood))
                assert answer == b"" or b" 431 " in answer[:20] or b" 400 " in answer[:20]
        others_are_served(node)
    assert rss(node) - before < 30 * MB


def test_readers_that_stop_reading(node: Node) -> None:
    """What waits for a reader is bounded at 128 KiB; its kernel has the rest."""
    before = rss(node)
    with Crowd(node) as crowd:
        ask = masked(b'{"type":"subscribe","channel":"' + b"x" * 2000 + b'"}')
        for _ in range(100):
            one = crowd.add(HANDSHAKE + b"\r\n" + ask * 100)  # 100 errors each, unread
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(50):
                    one.send(ask * 100)
        for _ in range(20):  # and requests whose answers nobody reads
            one = crowd.add(b"")
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(10):
                    one.send(ASK_NODES * 100)
        others_are_served(node)
        assert rss(node) - before < 120 * 300 * 1024
    others_are_served(node)


@pytest.mark.parametrize("connections", [1, 200, 1000])
def test_requests_that_do_not_wait_for_answers(node: Node, connections: int) -> None:
    """20,000 at once; whoever waits for answers has them in tens of milliseconds."""
    before, files_before = rss(node), files(node)
    with Crowd(node) as crowd, contextlib.ExitStack() as stack:
        client = stack.enter_context(node.client())
        poller = select.epoll()
        stack.callback(poller.close)
        waiting: dict[int, tuple[socket.socket, memoryview]] = {}
        for _ in range(connections):
            one = crowd.add(b"")
            one.setblocking(False)
            waiting[one.fileno()] = (one, memoryview(ASK_NODES * (20_000 // connections)))
            poller.register(one, select.EPOLLIN | select.EPOLLOUT)
        ended = threading.Event()
        answered = 0

        def flood() -> None:
            """Send and read as fast as it goes."""
            nonlocal answered
            while not ended.is_set():
                for number, events in poller.poll(0.1):
                    one, rest = waiting[number]
                    if events & select.EPOLLIN:
                        answered += one.recv(1 << 20).count(b"HTTP/1.1 200")
                    if rest and events & select.EPOLLOUT:
                        waiting[number] = (one, rest := rest[one.send(rest) :])
                        if not rest:
                            poller.modify(one, select.EPOLLIN)

        flooding = threading.Thread(target=flood)
        flooding.start()
        stack.callback(flooding.join)
        stack.callback(ended.set)
        wait_until("the flood has begun", lambda: answered > connections)
        took = []
        others_are_served(node)
        for _ in range(20):
            begun = time.monotonic()
            assert client.get("/nodes").status_code == 200
            took.append(time.monotonic() - begun)
        assert 0 < answered < 20_000, "the flood was over before the others were through"
        others_are_served(node)
        print(f"{answered} answers; others waited {sorted(took)[10]:.3f}, {max(took):.3f} s")
        assert sorted(took)[10] < 0.3
        assert max(took) < LATENCY_S
        assert rss(node) - before < connections * 100 * 1024 + 10 * MB
    wait_until("they are forgotten", lambda: files(node) <= files_before + 10)
    others_are_served(node)


def test_more_connections_than_an_address_may_have(node: Node) -> None:
    with Crowd(node) as crowd:
        for _ in range(1100):
            crowd.add(b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        # Some are told why; when many are refused at once, the others are just hung up on.
        answers = [first_of(one) for one in crowd.sockets]
        refused = [answer for answer in answers if b" 429 " in answer[:20]]
        assert refused
        assert sum(b" 200 " in answer[:20] for answer in answers) <= PER_ADDRESS
        body: Any = json.loads(refused[0].partition(b"\r\n\r\n")[2])
        assert body["code"] == "TOO_MANY_CONNECTIONS"
    wait_until("they are forgotten", lambda: node.request("GET", "/health").status_code == 200)


def test_a_body_that_never_ends_is_cut_off_after_a_minute(
    node: Node, dripped: Future[bytes]
) -> None:
    """The last test: most of the minute is over."""
    head, _, body = dripped.result(90).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    refusal = json.loads(body)
    assert refusal["code"] == "REQUEST_TIMEOUT"
    assert 1 < refusal["details"]["received_bytes"] <= refusal["details"]["limit_s"] + 1
    others_are_served(node)


def masked(text: bytes) -> bytes:
    """A client's frame of more than 125 bytes, with the mask of nothing."""
    return b"\x81\xfe" + len(text).to_bytes(2, "big") + b"\0\0\0\0" + text
