"""The API on real sockets: streams, clients that leave or stall, uploads, shutdown."""

import hashlib
import json
import socket
from typing import Any

import h11
import pytest
import trio
import trio.testing

from ollamad.api import calls, serve
from ollamad.api.asgi import BODY_HIGH_WATER
from ollamad.api.serve import (
    CannotListen,
    open_listeners,
    open_ollama_listeners,
)
from ollamad.core.inference import Chunk
from tests.fakes.api_server import SOON_S, serving
from tests.fakes.api_services import FINISHED, model

GENERATE = {"model": "smollm2:135m", "prompt": "hi"}


async def test_requests_on_one_connection() -> None:
    async with serving() as server, await server.connect() as wire:
        for _ in range(3):
            status, headers, body = await wire.get("/api/v1/health")
            assert (status, json.loads(body)["status"]) == (200, "healthy")
            assert headers["content-length"] == str(len(body))
            wire.h11.start_next_cycle()
        status, headers, body = await wire.get("/", method="HEAD")
        assert (status, body) == (200, b"")
        assert "server" not in headers


async def test_loopback_without_a_token_may_infer() -> None:
    async with serving() as server, await server.connect() as wire:
        await wire.post("/api/v1/generate", GENERATE)
        assert (await wire.answer())[0] == 200
        wire.h11.start_next_cycle()
        await wire.post("/api/v1/generate", GENERATE, Origin="https://evil.example")
        assert (await wire.answer())[0] == 401


OLLAMAS = ("/", "/api/version", "/api/tags", "/v1/models")


@pytest.mark.parametrize(
    ("host", "status"), [("127.0.0.1", 403), ("0.0.0.0", 401)], ids=["local", "public"]
)
async def test_ollamas_routes_refuse_a_page_that_says_it_is_this_host(
    host: str, status: int
) -> None:
    """As Ollama does, where the listener is for this host alone."""
    async with serving(host=host) as server, await server.connect() as wire:

        async def status_of(path: str, **headers: str) -> int:
            answer = await wire.get(path, **headers)
            wire.h11.start_next_cycle()
            return answer[0]

        token = {"Authorization": f"Bearer {server.client.token('viewer')}"}
        for path in OLLAMAS:
            is_open = status == 401 and path in ("/", "/api/version")
            assert await status_of(path, Host="evil.example") == (200 if is_open else status)
            assert await status_of(path, Host="evil.example", **token) == 200
            assert await status_of(path, Host="localhost:11434") == 200
        # A browser can send no token for the page that it signs in on, as behind a proxy.
        browser = {"Host": "cluster.example", "Accept": "text/html,application/xhtml+xml"}
        assert await status_of("/", **browser) == 200
        assert await status_of("/api/tags", **browser) == status
        assert await status_of("/api/v1/nodes", Host="evil.example") == 401
        assert await status_of("/api/v1/health", Host="evil.example") == 200


async def test_names_with_slashes_work_percent_encoded() -> None:
    async with serving() as server, await server.connect() as wire:
        models = server.world.cluster.state.models
        models["me/new:latest"] = model("me/new:latest")
        for path in ("me%2Fnew", "me/new", "me%2fnew%3Alatest", "registry.ollama.ai%2Fme%2Fnew"):
            status, _, body = await wire.get(f"/api/v1/models/{path}")
            assert (status, json.loads(body)["model"]["name"]) == (200, "me/new:latest")
            wire.h11.start_next_cycle()


async def test_a_stream_arrives_token_by_token() -> None:
    async with serving() as server, await server.connect() as wire:
        go_on = trio.Event()
        server.world.inference.script = [Chunk("Hel"), go_on, Chunk("lo"), FINISHED]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        head = await wire.event()
        assert head.status_code == 200
        first = await wire.event()
        assert json.loads(first.data)["response"] == "Hel"
        go_on.set()
        rest = b""
        while isinstance(event := await wire.event(), h11.Data):
            rest += event.data
        assert [json.loads(line)["done"] for line in rest.splitlines()] == [False, True]
        wire.h11.start_next_cycle()
        assert (await wire.get("/api/v1/health"))[0] == 200


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("script", [[], [Chunk("Hel")]], ids=["before", "amid"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_ends_its_generation(
    stream: bool, script: list[Any], reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as server:
        inference = server.world.inference
        inference.script = [*script, trio.Event()]
        wire = await server.connect()
        await wire.post("/api/v1/generate", GENERATE | {"stream": stream})
        with trio.fail_after(SOON_S):
            await inference.entered.wait()
            if stream and script:
                assert (await wire.event()).status_code == 200
            assert not inference.left.is_set()
            if reset:
                linger = b"\1\0\0\0\0\0\0\0"
                wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                wire.stream.socket.close()
            else:
                await wire.stream.aclose()
        with trio.fail_after(1.0):  # the contract: within a second
            await inference.left.wait()
        stats = server.client.app.api.inference_stats.snapshot()
        assert (stats.active, stats.failed) == (0, 0)
        await server.all_done()
    assert caplog.records == []  # it is no error


async def test_shutdown_lets_a_stream_end() -> None:
    async with serving() as server, await server.connect() as wire:
        go_on = trio.Event()
        server.world.inference.script = [Chunk("Hel"), go_on, FINISHED]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        assert (await wire.event()).status_code == 200
        assert (await wire.event()).data
        server.shutdown.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(OSError, match="all attempts"):
            await server.connect()
        go_on.set()
        last = await wire.event()
        assert json.loads(last.data)["done"] is True
        with trio.fail_after(1.0):  # and does not wait for the client to close
            await server.ended.wait()


async def test_shutdown_cancels_a_stream_after_its_grace() -> None:
    async with serving(graceful_timeout_s=0.05) as server, await server.connect() as wire:
        server.world.inference.script = [Chunk("Hel"), trio.Event()]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        assert (await wire.event()).status_code == 200
        server.shutdown.set()
        with trio.fail_after(SOON_S):
            await server.ended.wait()
        assert server.world.inference.left.is_set()


async def test_idle_connections_do_not_hold_up_the_shutdown() -> None:
    async with serving() as server, await server.connect() as wire, await server.connect():
        assert (await wire.get("/api/v1/health"))[0] == 200
        server.shutdown.set()
        with trio.fail_after(1.0):
            await server.ended.wait()


async def test_a_client_that_stopped_reading_does_not_hold_up_the_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "ABORT_AFTER_S", 0.05)
    async with serving(graceful_timeout_s=0.05) as server, await server.connect() as wire:
        server.world.inference.script = [Chunk("x" * 1_000_000) for _ in range(40)]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        await server.world.inference.entered.wait()
        await trio.testing.wait_all_tasks_blocked(0.2)  # its buffers and ours are full
        assert not server.world.inference.left.is_set()
        server.shutdown.set()
        with trio.fail_after(SOON_S):
            await server.ended.wait()
        assert server.world.inference.left.is_set()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_413_and_the_client_can_read_it(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_JSON_BYTES", 2 << 20)
    size = 8 << 20
    async with serving() as server, await server.connect() as wire:
        length = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": str(size)}
        await wire.send_head("POST", "/api/v1/generate", Content_Type="application/json", **length)
        for _ in range(size >> 20):
            await wire.send_data(b" " * (1 << 20))
        await wire.end()
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["code"]) == (413, "BODY_TOO_LARGE")
        assert server.world.inference.requests == []


async def test_a_refused_upload_is_answered_and_gets_nothing_stuck() -> None:
    async with serving() as server:
        size = 16 << 20
        async with await server.connect() as wire:
            path = "/api/v1/blobs/sha256:" + "0" * 64
            await wire.send_head("POST", path, Content_Length=str(size))
            for _ in range(size >> 20):
                await wire.send_data(b"x" * (1 << 20))
            await wire.end()
            assert (await wire.answer())[0] == 403
        # A client that announces a body, sends half of it and waits gets its answer too.
        async with await server.connect() as wire:
            await wire.send_head("POST", "/api/v1/cluster/token", Content_Length="100")
            await wire.send_data(b"x" * 50)
            with trio.fail_after(SOON_S):
                assert (await wire.answer())[0] == 403
                assert await wire.stream.receive_some() == b""  # closed: it is out of step
        # One that announces far too much is told so before it sends anything.
        async with await server.connect() as wire:
            await wire.send_head("POST", "/api/v1/generate", Content_Length=str(1 << 40))
            with trio.fail_after(SOON_S):
                assert (await wire.answer())[0] == 413
        # Nor does a body where none belongs, though the answer takes its time.
        sent_enough = trio.Event()
        transfers = server.world.library.transfers

        async def slow_transfers() -> Any:
            await sent_enough.wait()
            return await transfers()

        server.world.library.transfers = slow_transfers  # type: ignore[method-assign]
        async with await server.connect() as wire:
            await wire.send_head("GET", "/api/v1/transfers", Content_Length=str(size))
            async with trio.open_nursery() as nursery:

                async def send_all() -> None:
                    with trio.CancelScope() as scope:
                        try:
                            for _ in range(size >> 20):
                                await wire.send_data(b"x" * (1 << 20))
                        except trio.BrokenResourceError:
                            scope.cancel()  # the server may have closed by now

                nursery.start_soon(send_all)
                await trio.testing.wait_all_tasks_blocked(0.1)
                sent_enough.set()
                with trio.fail_after(SOON_S):
                    assert (await wire.answer())[0] == 200
        async with await server.connect() as wire:
            assert (await wire.get("/api/v1/health"))[0] == 200
        await server.all_done()


async def test_an_upload_is_streamed_and_pushes_back() -> None:
    blob = bytes(range(256)) * (32 << 10)  # 8 MiB
    digest = "sha256:" + hashlib.sha256(blob).hexdigest()
    async with serving() as server:
        library = server.world.library
        stored, largest, sent = trio.Event(), 0, 0

        async def slow_disk(chunk: bytes) -> None:
            nonlocal largest
            largest = max(largest, len(chunk))
            await stored.wait()

        library.on_chunk = slow_disk
        token = server.client.token("operator")
        wire = await server.connect()
        await wire.send_head(
            "POST",
            f"/api/v1/blobs/{digest}",
            Content_Length=str(len(blob)),
            Authorization=f"Bearer {token}",
        )

        async def upload() -> None:
            nonlocal sent
            for start in range(0, len(blob), 1 << 16):
                await wire.send_data(blob[start : start + (1 << 16)])
                sent += 1 << 16
            await wire.end()

        async with wire, trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            await trio.testing.wait_all_tasks_blocked(0.2)
            held = sent
            stored.set()
            assert (await wire.answer())[0] == 201
        assert library.blobs[digest] == blob
        # The kernel's buffers hold a few MiB at most; without push-back all of it was gone.
        assert held < len(blob)
        assert largest <= BODY_HIGH_WATER + (1 << 16)


async def test_an_upload_that_breaks_off_is_not_taken_for_whole() -> None:
    digest = "sha256:" + hashlib.sha256(b"half").hexdigest()
    async with serving() as server:
        begun = trio.Event()

        async def first(chunk: bytes) -> None:
            begun.set()

        server.world.library.on_chunk = first
        token = server.client.token("operator")
        async with await server.connect() as wire:
            await wire.send_head(
                "POST",
                f"/api/v1/blobs/{digest}",
                Content_Length="8",
                Authorization=f"Bearer {token}",
            )
            await wire.send_data(b"half")
            await begun.wait()
        await server.all_done()
        assert server.world.library.blobs == {}


async def test_what_is_no_http_gets_400_and_huge_headers_431() -> None:
    async with serving() as server:
        for data, status in [
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 60_000, b"431"),
        ]:
            async with await server.connect() as wire:
                await wire.stream.send_all(data)
                assert (await wire.stream.receive_some())[9:12] == status
        async with await server.connect() as wire:
            assert (await wire.get("/api/v1/health"))[0] == 200


async def test_odd_but_valid_requests_get_json_errors() -> None:
    async with serving() as server:
        for target in ("*", "/%00", "/%ff%fe", "/api/v1/models/%2e%2e%2f", "http://x/y", "/?a=%"):
            async with await server.connect() as wire:
                status, headers, body = await wire.get(target)
                if target != "/?a=%":
                    assert status in (400, 404), target
                    if status == 404:
                        assert json.loads(body)["code"] in ("NOT_FOUND", "MODEL_NOT_FOUND")
                assert "x-request-id" in headers
        async with await server.connect() as wire:
            await wire.send_head("GET", "/api/v1/nodes", Host="a b@[")
            await wire.end()
            assert (await wire.answer())[0] == 401


async def test_a_port_in_use_is_told_clearly() -> None:
    (first,) = await open_listeners(["127.0.0.1:0"])
    with first:
        bind = f"127.0.0.1:{first.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"cannot listen on {bind}: the port is in use"):
            await open_listeners(["127.0.0.1:0", bind])


@pytest.mark.parametrize("bind", ["", "8080", ":8080", "host:", "127.0.0.1:x", "127.0.0.1:70000"])
async def test_a_malformed_address_is_told_clearly(bind: str) -> None:
    with pytest.raises(CannotListen, match="write HOST:PORT"):
        await open_listeners([bind])


async def test_a_foreign_address_is_told_clearly() -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on 192\.0\.2\.1:0: this host has no"):
        await open_listeners(["192.0.2.1:0"])


async def test_accepted_connections_inherit_the_socket_options() -> None:
    (listener,) = await open_listeners(["127.0.0.1:0"])
    with listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            tcp = socket.IPPROTO_TCP
            assert accepted.getsockopt(tcp, socket.TCP_NODELAY)
            assert accepted.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == serve.USER_TIMEOUT_MS
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(tcp, socket.TCP_KEEPIDLE) == serve.KEEPALIVE_IDLE_S


# Where Ollama listens


async def test_ollamas_address_is_taken_if_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr(serve, "OLLAMA_ADDRESS", address)
        other.listen()
        assert await open_ollama_listeners("auto") == []
        assert f"{address}, where programs look for Ollama, is in use" in caplog.text
        with pytest.raises(CannotListen):
            await open_ollama_listeners(address)
    assert await open_ollama_listeners("off") == []
    for setting in ("auto", address):
        [listener] = await open_ollama_listeners(setting)
        with listener:
            assert listener.getsockname() == ("127.0.0.1", int(address.rpartition(":")[2]))
