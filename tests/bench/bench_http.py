"""Requests per second of `/health` and `/nodes` against a bare ASGI app on hypercorn as it comes.

    python -m tests.bench.bench_http

Each server runs in a child process, with trio; the bare app, which answers what `/health` does,
once by hypercorn itself and once by the daemon's connections (`bare_here`). A small load client
with keep-alive connections runs in this one. Short rounds alternate, so that a busy machine
disturbs all alike; the ratio is the median over pairs of rounds. The server's processor time per
request is printed beside it: other processes disturb it least.
"""

import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import hypercorn.trio
import trio
from hypercorn.config import Config

from ollamad.api.app import build_app
from ollamad.api.calls import ApiSettings
from ollamad.api.limits import RateLimits
from ollamad.api.serve import open_listeners, serve_api
from tests.fakes.api_services import make_world

CONNECTIONS = 8
ROUND_S = 0.5
ROUNDS = 20
BODY = b'{"status":"healthy","timestamp":"2024-01-15T10:00:00Z","uptime":"0h 0m 0s"}'
GOAL = 0.7
HEALTH = "/api/v1/health"
PATHS = {"health": HEALTH, "nodes": "/api/v1/nodes"}  # of the daemon's API
KINDS = ("bare", "bare_here", *PATHS)


# The limits are counted, and nobody reaches them.
SETTINGS = ApiSettings(rate_limits=RateLimits(general=10**9, model_ops=10**9))


async def bare_app(scope: Any, receive: Any, send: Any) -> None:
    """The least that an ASGI app can do for the same answer."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", str(len(BODY)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY, "more_body": False})


def serve_in_child(kind: str, pipe: Connection) -> None:
    """Serve one of the two apps; tell the port, and stop when the pipe says so."""

    async def main() -> None:
        app: Any = bare_app
        if kind in PATHS:
            app = build_app(make_world().services, SETTINGS)
        sockets = await open_listeners(["127.0.0.1:0"])
        port = sockets[0].getsockname()[1]
        shutdown = trio.Event()
        async with trio.open_nursery() as nursery:
            if kind == "bare":
                config = Config()
                config.bind = [f"fd://{sockets[0].detach()}"]
                config.accesslog = config.errorlog = None
                config.keep_alive_max_requests = 1_000_000
                config.include_server_header = False
                nursery.start_soon(
                    lambda: hypercorn.trio.serve(
                        app, config, shutdown_trigger=shutdown.wait, mode="asgi"
                    )
                )
            else:
                await nursery.start(serve_api, app, sockets, shutdown)
            pipe.send(port)
            while await trio.to_thread.run_sync(pipe.recv) == "time":
                pipe.send(time.process_time())
            shutdown.set()

    trio.run(main)


async def measure(port: int, seconds: float, path: str) -> float:
    """Requests per second over CONNECTIONS keep-alive connections."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    done = 0

    async def client(deadline: float) -> None:
        nonlocal done
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            while time.monotonic() < deadline:
                await stream.send_all(request)
                answer = b""
                while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                    answer += await stream.receive_some(65536)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                done += 1

    begun = time.monotonic()
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(client, begun + seconds)
    return done / (time.monotonic() - begun)


def main() -> int:
    context = multiprocessing.get_context("spawn")
    ports: dict[str, int] = {}
    children = []
    for kind in KINDS:
        here, there = context.Pipe()
        child = context.Process(target=serve_in_child, args=(kind, there))
        child.start()
        ports[kind] = here.recv()
        children.append((child, here))
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu_us: dict[str, float] = {}
    for (_, pipe), (kind, port) in zip(children, ports.items(), strict=True):
        path = PATHS.get(kind, HEALTH)
        trio.run(measure, port, 0.5, path)  # warm up
        before = _process_time(pipe)
        requests = trio.run(measure, port, 1.0, path)
        cpu_us[kind] = 1e6 * (_process_time(pipe) - before) / requests
    for _ in range(ROUNDS):
        for kind, port in ports.items():
            rates[kind].append(trio.run(measure, port, ROUND_S, PATHS.get(kind, HEALTH)))
    for child, pipe in children:
        pipe.send("stop")
        child.join()
    ratio = {}
    for kind in KINDS[1:]:
        pairs = zip(rates[kind], rates["bare"], strict=True)
        ratio[kind] = statistics.median(ours / bare for ours, bare in pairs)
    for kind in KINDS:
        row = {
            "what": kind,
            "rps": round(statistics.median(rates[kind])),
            "cpu_us": round(cpu_us[kind]),
            "of_bare": round(ratio.get(kind, 1.0), 3),
            "of_bare_by_cpu": round(cpu_us["bare"] / cpu_us[kind], 3),
        }
        print(json.dumps(row | ({"goal": GOAL} if kind == "health" else {})))
    return 0 if ratio["health"] >= GOAL else 1


def _process_time(pipe: Connection) -> float:
    pipe.send("time")
    return float(pipe.recv())


if __name__ == "__main__":
    sys.exit(main())
