"""5,000 mostly idle WebSockets on one node: what each costs, and how soon an event is everywhere.

    python -m tests.bench.bench_websocket [COUNT]

The node's API (over fakes, so that only it is measured) runs in a child process, the clients in
this one: plain sockets on one epoll. Memory is the child's resident set, before and with the
sockets, from its own /proc. The event is a drain, from the command's being applied to the last
client's having read it. Two things stand beside it: the floor, one write(2) of the same bytes to
each of the same sockets, by a loop that does nothing else; and the same number of sockets on bare
hypercorn with an ASGI app that does nothing but send, which browsers get compressed.
"""

import json
import multiprocessing
import os
import resource
import select
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import hypercorn.trio
import trio
from hypercorn.config import Config

from ollamad.api.limits import RateLimits
from ollamad.api.serve import open_listeners, serve_api
from ollamad.core.commands import SetDraining
from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import NODE_2

COUNT = 5000
EVENTS = 9
# What browsers send; the extension costs who accepts it a compressor for each socket.
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)
GOAL_KIB, GOAL_S = 40, 0.5  # a socket; for the last client


def masked(text: bytes) -> bytes:
    """A client's frame, with the mask of nothing."""
    return bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text


SUBSCRIBE = masked(b'{"type":"subscribe","channel":"nodes"}')


def serve_node(pipe: Connection) -> None:
    async def main() -> None:
        client = ApiClient(rate_limits=RateLimits(general=0, model_ops=0, websocket=0))
        sockets = await open_listeners(["127.0.0.1:0"])
        port = sockets[0].getsockname()[1]
        shutdown = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(client.app.api.hub.run)
            await nursery.start(client.app.feed.run)

            async def serve(task_status: trio.TaskStatus[list[str]]) -> None:
                await serve_api(
                    client.app,
                    sockets,
                    shutdown,
                    websockets=client.app.websockets,
                    graceful_timeout_s=0.1,
                    task_status=task_status,
                )

            await nursery.start(serve)
            pipe.send(port)
            draining = True
            while (word := await trio.to_thread.run_sync(pipe.recv)) != "stop":
                if word == "memory":
                    pipe.send(_memory())
                elif word == "event":
                    pipe.send((time.monotonic(), time.process_time()))
                    await client.world.cluster.propose(SetDraining(NODE_2, draining))
                    draining = not draining
                elif word == "time":
                    pipe.send(time.process_time())
                elif word == "floor":
                    frame = b"\x81\x7e\x00\xd0" + b"x" * 208
                    begun = time.monotonic()
                    for session in client.app.api.hub._sessions:
                        os.write(session._socket.fileno(), frame)  # type: ignore[attr-defined]
                    pipe.send(time.monotonic() - begun)
            shutdown.set()
            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()

    _raise_limit()
    trio.run(main)


def serve_bare(pipe: Connection) -> None:
    """hypercorn as it comes: an app that accepts, and sends what it is told to."""
    listeners: set[Any] = set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "greeting"})
        listeners.add(send)
        try:
            while (await receive())["type"] != "websocket.disconnect":
                await send({"type": "websocket.send", "text": '{"status":"subscribed"}'})
        finally:
            listeners.discard(send)

    async def main() -> None:
        [listener] = await open_listeners(["127.0.0.1:0"])
        config = Config()
        config.bind = [f"fd://{listener.detach()}"]
        config.accesslog = config.errorlog = None
        config.graceful_timeout = 0.1
        shutdown = trio.Event()
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(
                lambda task_status: hypercorn.trio.serve(
                    app,  # type: ignore[arg-type]
                    config,
                    shutdown_trigger=shutdown.wait,
                    task_status=task_status,
                    mode="asgi",
                )
            )
            pipe.send(int(urls[0].rpartition(":")[2]))
            text = '{"event_type":"node_draining","pad":"' + "x" * 200 + '"}'
            while (word := await trio.to_thread.run_sync(pipe.recv)) != "stop":
                if word == "memory":
                    pipe.send(_memory())
                elif word == "time":
                    pipe.send(time.process_time())
                elif word == "event":
                    pipe.send((time.monotonic(), time.process_time()))
                    for send in tuple(listeners):
                        await send({"type": "websocket.send", "text": text})
            shutdown.set()

    _raise_limit()
    trio.run(main)


def measure(kind: Any, count: int) -> dict[str, Any]:
    """Connect that many, subscribe, and time some events."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=kind, args=(there,))
    child.start()
    port = here.recv()
    poll = select.epoll()
    connect(port, 20, poll)  # what the first ones load is not theirs
    before = _ask(here, "memory")
    begun = time.monotonic()
    sockets = connect(port, count, poll)
    took = time.monotonic() - begun
    time.sleep(1.0)
    with_them = _ask(here, "memory")
    first, last, cpu = [], [], []
    for _ in range(EVENTS):
        drain(poll, sockets)
        time.sleep(0.2)
        sent_at, cpu_before = _ask(here, "event")
        arrivals = arrive(poll, sockets)
        first.append(arrivals[0] - sent_at)
        last.append(arrivals[-1] - sent_at)
        cpu.append(_ask(here, "time") - cpu_before)
    found = {
        "sockets": count,
        "kib_each": round((with_them - before) / 1024 / count, 1),
        "opened_per_s": round(count / took),
        "event_first_ms": round(1000 * statistics.median(first), 1),
        "event_last_ms": round(1000 * statistics.median(last), 1),
        "event_cpu_us_each": round(1e6 * statistics.median(cpu) / count, 1),
    }
    if kind is serve_node:
        drain(poll, sockets)
        found["floor_ms"] = round(1000 * min(_ask(here, "floor") for _ in range(3)), 1)
    for one in sockets.values():
        one.close()
    here.send("stop")
    child.join()
    return found


def connect(port: int, count: int, poll: select.epoll) -> dict[int, socket.socket]:
    """Open that many sockets, a hundred at a time, and subscribe each."""
    opened: dict[int, socket.socket] = {}
    while len(opened) < count:
        batch = []
        for _ in range(min(100, count - len(opened))):
            one = socket.create_connection(("127.0.0.1", port))
            one.sendall(HANDSHAKE)
            batch.append(one)
        for one in batch:
            seen = b""
            while b"\r\n\r\n" not in seen:
                seen += one.recv(65536)
            assert seen.startswith(b"HTTP/1.1 101"), seen
            one.sendall(SUBSCRIBE)
            while b"subscribed" not in seen and b"\xc1" not in seen:  # or compressed
                seen += one.recv(65536)
            one.setblocking(False)
            opened[one.fileno()] = one
            poll.register(one, select.EPOLLIN)
    return opened


def drain(poll: select.epoll, sockets: dict[int, socket.socket]) -> None:
    while ready := poll.poll(0.3, len(sockets)):
        for number, _ in ready:
            os.read(number, 65536)


def arrive(poll: select.epoll, sockets: dict[int, socket.socket]) -> list[float]:
    """When each socket had something to read."""
    waiting = set(sockets)
    arrivals = []
    while waiting:
        for number, _ in poll.poll(30.0, 1000):
            os.read(number, 65536)
            if number in waiting:
                waiting.discard(number)
                arrivals.append(time.monotonic())
    return arrivals


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    _raise_limit()
    node = measure(serve_node, count)
    print(json.dumps({"node": node}), flush=True)
    bare = measure(serve_bare, min(count, 1000))
    print(json.dumps({"bare hypercorn": bare}))
    return 0 if node["kib_each"] <= GOAL_KIB and node["event_last_ms"] <= 1000 * GOAL_S else 1


def _memory() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ask(pipe: Connection, word: str) -> Any:
    pipe.send(word)
    return pipe.recv()


if __name__ == "__main__":
    sys.exit(main())
