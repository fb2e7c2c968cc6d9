"""Clients that take what they can: connections, time, memory. Each has a bound and a clear end."""

import json
import socket
from contextlib import suppress
from typing import Any

import pytest
import trio

from ollamad.api import asgi, calls, http
from ollamad.api.http import ConnectionLimits
from ollamad.api.serve import RESERVED_FILES, connections_allowed
from ollamad.core.inference import Chunk
from tests.fakes.api_server import SOON_S, Server, Wire, serving
from tests.fakes.api_services import FINISHED

GENERATE = {"model": "smollm2:135m", "prompt": "hi"}


async def rest(stream: trio.SocketStream) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with trio.fail_after(SOON_S):
        try:
            while part := await stream.receive_some(65536):
                data += part
        except trio.BrokenResourceError:
            pass
    return data


def refusal(data: bytes) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of an answer as it was on the wire."""
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    parsed = json.loads(body)
    assert set(parsed) == {"error", "code", "details"}
    assert headers["x-content-type-options"] == "nosniff"
    assert len(headers["x-request-id"]) == 16
    return int(status.split()[1]), parsed, headers


async def is_well(server: Server) -> None:
    async with await server.connect() as wire:
        assert (await wire.get("/api/v1/health"))[0] == 200


# Connections.


async def test_an_address_has_only_so_many_connections_and_gets_them_back() -> None:
    async with serving(limits=ConnectionLimits(per_address=2)) as server:
        first, second = await server.connect(), await server.connect()
        for wire in (first, second):
            assert (await wire.get("/api/v1/health"))[0] == 200
        third = await server.connect()
        status, body, headers = refusal(await rest(third.stream))
        assert (status, body["code"]) == (429, "TOO_MANY_CONNECTIONS")
        assert body["details"]["limit"] == 2
        assert int(headers["retry-after"]) > 0
        first.h11.start_next_cycle()  # those that are there go on
        assert (await first.get("/api/v1/health"))[0] == 200
        await first.stream.aclose()
        with trio.fail_after(SOON_S):
            while True:
                async with await server.connect() as wire:
                    try:
                        assert (await wire.get("/api/v1/health"))[0] == 200
                        break
                    except (AssertionError, trio.BrokenResourceError):
                        await trio.sleep(0.01)


async def test_what_is_refused_before_it_is_a_request_can_be_found_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "ollamad.api.http")
    async with serving() as server:
        wire = await server.connect()
        await wire.stream.send_all(b"nonsense\r\n\r\n")
        _, body, headers = refusal(await rest(wire.stream))
        line = f"request {headers['x-request-id']}: 400 BAD_REQUEST: {body['error']}"
        assert caplog.messages == [line]


async def test_a_node_has_only_so_many_connections() -> None:
    limits = ConnectionLimits(connections=3, per_address=0)
    async with serving(limits=limits) as server:
        held = [await server.connect() for _ in range(3)]
        for wire in held:
            await wire.get("/api/v1/health")
        status, body, _ = refusal(await rest((await server.connect()).stream))
        assert (status, body["code"]) == (503, "TOO_MANY_CONNECTIONS")
        assert "try another node" in body["error"]


async def test_a_crowd_of_refused_ones_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REFUSING", 2)
    async with serving(limits=ConnectionLimits(per_address=1)) as server:
        first = await server.connect()
        await first.get("/api/v1/health")
        crowd = [await server.connect() for _ in range(10)]
        answers = [await rest(wire.stream) for wire in crowd]
        assert 1 <= sum(bool(answer) for answer in answers) < 10


def test_the_limit_of_files_bounds_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: raised.append(limits))
    most = 4096 - RESERVED_FILES
    assert connections_allowed(1000) == 1000
    assert connections_allowed(100_000) == most
    assert connections_allowed(0) == most
    assert raised == [(4096, 4096)] * 3


# Time.


async def test_a_head_that_comes_a_byte_at_a_time_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.3)
    async with serving() as server:
        begun = trio.current_time()
        wire = await server.connect()

        async def drip() -> None:
            try:
                for byte in b"GET /api/v1/health HTTP/1.1\r\nX: " + b"x" * 10_000:
                    await wire.stream.send_all(bytes([byte]))
                    await trio.sleep(0.02)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            status, body, _ = refusal(await rest(wire.stream))
            nursery.cancel_scope.cancel()
        assert (status, body["code"]) == (408, "REQUEST_TIMEOUT")
        assert trio.current_time() - begun < 2.0


async def test_who_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.4)
    async with serving() as server:
        assert await rest((await server.connect()).stream) == b""
        wire = await server.connect()
        assert (await wire.get("/api/v1/health"))[0] == 200
        begun = trio.current_time()
        assert await rest(wire.stream) == b""
        assert trio.current_time() - begun >= 0.35  # idle clients have more patience than silent
        # The next head on a connection that was idle has its own deadline.
        wire = await server.connect()
        assert (await wire.get("/api/v1/health"))[0] == 200
        await wire.stream.send_all(b"GET /")
        status, body, _ = refusal(await rest(wire.stream))
        assert (status, body["code"]) == (408, "REQUEST_TIMEOUT")


async def drip(wire: Wire) -> None:
    """A byte of a body now and then, as long as the other side reads."""
    with suppress(trio.BrokenResourceError):
        while True:
            await wire.send_data(b" ")
            await trio.sleep(0.02)


async def test_a_body_that_comes_a_byte_at_a_time_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "BODY_TIMEOUT_S", 0.3)
    async with serving() as server, await server.connect() as wire:
        await wire.send_head(
            "POST", "/api/v1/generate", Content_Length="1000", Content_Type="application/json"
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, wire)
            status, _, body = await wire.answer()
            nursery.cancel_scope.cancel()
        assert (status, json.loads(body)["code"]) == (408, "REQUEST_TIMEOUT")


async def test_who_has_no_token_sends_no_large_body() -> None:
    async with serving() as server:
        for path in ("login", "refresh"):
            async with await server.connect() as wire:
                await wire.send_head(
                    "POST", f"/api/v1/auth/{path}", Transfer_Encoding="chunked",
                    Content_Type="application/json",
                )  # fmt: skip
                await wire.send_data(b" " * calls.MAX_PUBLIC_JSON_BYTES)
                await wire.send_data(b" ")
                status, _, body = await wire.answer()
                assert (status, json.loads(body)["code"]) == (413, "BODY_TOO_LARGE")
                assert json.loads(body)["details"] == {"limit_bytes": 64 << 10}


async def test_only_some_large_bodies_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends one slowly holds up others who do, for a while, and nobody else."""
    monkeypatch.setattr(calls, "BODY_TIMEOUT_S", 0.5)
    large = b" " * (calls.LARGE_JSON_BYTES + 1)
    async with serving() as server:
        body = json.dumps(GENERATE).encode()

        async def send(data: bytes, *, length: int) -> Wire:
            wire = await server.connect()
            await wire.send_head(
                "POST",
                "/api/v1/generate",
                Content_Length=str(length),
                Content_Type="application/json",
            )
            await wire.send_data(data)
            return wire

        slow = [await send(large, length=len(large) + 9) for _ in range(calls.MAX_LARGE_BODIES)]
        limiter = server.client.app.api.large_bodies
        with trio.fail_after(SOON_S):
            while limiter.value:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        small = await send(body, length=len(body))
        await small.end()
        assert (await small.answer())[0] == 200
        assert {(await wire.answer())[0] for wire in slow} == {408}
        assert limiter.value == calls.MAX_LARGE_BODIES
        for _ in range(calls.MAX_LARGE_BODIES):
            await limiter.acquire()
        late = await send(large + body, length=len(large + body))
        await late.end()
        status, headers, text = await late.answer()
        assert (status, json.loads(text)["code"]) == (503, "TOO_MANY_LARGE_BODIES")
        assert headers["retry-after"] == "5"
        limiter.release()
        again = await send(large + body, length=len(large + body))
        await again.end()
        assert (await again.answer())[0] == 200


async def test_what_waits_with_large_bodies_is_bounded_by_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A queue of 512 prompts of 30 MB each would be more than most hosts have."""
    size = calls.LARGE_JSON_BYTES + 1000
    monkeypatch.setattr(calls, "MAX_HELD_BYTES", 2 * size)
    async with serving() as server:
        inference = server.world.inference
        inference.script = [trio.Event()]  # nothing is answered
        large = json.dumps(GENERATE | {"prompt": "x"}).encode().ljust(size)

        async def send(body: bytes) -> Wire:
            wire = await server.connect()
            await wire.send_head(
                "POST",
                "/api/v1/generate",
                Content_Length=str(len(body)),
                Content_Type="application/json",
            )
            await wire.send_data(body)
            await wire.end()
            return wire

        waiting = [await send(large) for _ in range(2)]
        with trio.fail_after(SOON_S):
            while inference.running < 2:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        status, headers, text = await (await send(large)).answer()
        assert (status, json.loads(text)["code"]) == (503, "TOO_MANY_LARGE_BODIES")
        assert headers["retry-after"] == "5"
        # Small ones are held up by nobody, and who leaves gives back what it took.
        small = await send(json.dumps(GENERATE).encode())
        with trio.fail_after(SOON_S):
            while inference.running < 3:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        for wire in (*waiting, small):
            await wire.stream.aclose()
        budget = server.client.app.api.budget
        with trio.fail_after(SOON_S):
            while budget.held:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        inference.script = [Chunk("ok"), FINISHED]
        assert (await (await send(large)).answer())[0] == 200


async def test_an_upload_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "STALL_S", 0.3)
    async with serving() as server, await server.connect() as wire:
        token = server.client.token("operator")
        await wire.send_head(
            "POST",
            f"/api/v1/blobs/sha256:{'0' * 64}",
            Content_Length="1000000",
            Authorization=f"Bearer {token}",
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, wire)
            status, _, body = await wire.answer()
            nursery.cancel_scope.cancel()
        assert (status, json.loads(body)["code"]) == (408, "REQUEST_TIMEOUT")


async def test_a_client_that_stops_reading_a_stream_loses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "UNREAD_TIMEOUT_S", 0.3)
    async with serving() as server, await server.connect() as wire:
        server.world.inference.script = [Chunk("x" * 500_000) for _ in range(40)]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        with trio.fail_after(SOON_S):
            await server.world.inference.left.wait()
        await server.all_done()
        await is_well(server)


async def test_a_slow_reader_keeps_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "UNREAD_TIMEOUT_S", 0.5)
    async with serving() as server, await server.connect() as wire:
        server.world.inference.script = [Chunk("x" * 200_000) for _ in range(20)]
        await wire.post("/api/v1/generate", GENERATE | {"stream": True})
        got = 0
        while got < 4_000_000:
            got += len(await wire.stream.receive_some(150_000))
            await trio.sleep(0.02)
        assert wire.stream.socket.fileno() > 0


# Memory.


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","format":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"model":"m","options":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 1_000_000,
        b'{"model":"m","unknown":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_json_that_is_too_deep_is_refused(body: bytes) -> None:
    async with serving() as server, await server.connect() as wire:
        for path in ("/api/v1/generate", "/api/generate", "/v1/completions"):
            await wire.send_head(
                "POST", path, Content_Length=str(len(body)), Content_Type="application/json"
            )
            await wire.send_data(body)
            await wire.end()
            status, _, answer = await wire.answer()
            assert status == 400, (path, answer[:200])
            wire.h11.start_next_cycle()


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"x-%d: y\r\n" % number for number in range(500)),
        b"".join(b"a: b\r\n" for _ in range(2000)),
        b"x: " + b"y" * 40_000 + b"\r\n",
    ],
)
async def test_floods_of_headers_are_refused(head: bytes) -> None:
    async with serving() as server:
        wire = await server.connect()
        await wire.stream.send_all(b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n" + head)
        with suppress(trio.BrokenResourceError):
            await wire.stream.send_all(b"\r\n")
        status, body, _ = refusal(await rest(wire.stream))
        assert (status, body["code"]) == (431, "REQUEST_HEADER_FIELDS_TOO_LARGE")
        await is_well(server)


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (b"/v1/chat/completions", {"error": {"message", "type", "param", "code"}}),
        (b"/v1/messages?beta=true", {"error": {"type", "message", "code"}, "type": None}),
        (b"/api/chat", {"error": None}),
    ],
)
async def test_a_flood_is_refused_in_the_shape_of_the_surface(
    path: bytes, keys: dict[str, set[str] | None]
) -> None:
    async with serving() as server:
        wire = await server.connect()
        head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 40_000
        await wire.stream.send_all(head + b"\r\n\r\n")
        answer = await rest(wire.stream)
        assert answer.startswith(b"HTTP/1.1 431 ")
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        shape = {
            key: set(value) if isinstance(value, dict) else None for key, value in body.items()
        }
        assert shape == keys


async def test_http_2_and_nonsense_are_told_what_is_spoken_here() -> None:
    async with serving() as server:
        for data, statuses in [
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        ]:
            wire = await server.connect()
            await wire.stream.send_all(data)
            status, body, _ = refusal(await rest(wire.stream))
            assert status in statuses, body
        # An upgrade that nobody takes is passed over, as HTTP has it.
        async with await server.connect() as wire:
            await wire.send_head("GET", "/api/v1/health", Connection="Upgrade", Upgrade="h2c")
            await wire.end()
            assert (await wire.answer())[0] == 200


async def test_many_requests_at_once_on_one_connection_are_answered_in_order() -> None:
    async with serving() as server, await server.connect() as wire:
        count = 200
        request = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        await wire.stream.send_all(request * count)
        seen = b""
        with trio.fail_after(SOON_S):
            while seen.count(b"HTTP/1.1 200") < count or not seen.endswith(b"}"):
                seen += await wire.stream.receive_some(65536)


async def test_a_websocket_may_come_after_other_requests() -> None:
    async with serving() as server, await server.connect() as wire:
        assert (await wire.get("/api/v1/health"))[0] == 200
        await wire.stream.send_all(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Upgrade\r\n"
            b"Upgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x89\x80\x00\x00\x00\x00"
        )
        with trio.fail_after(SOON_S):
            seen = b""
            while b"\x8a\x00" not in seen:  # the pong to what came behind the head
                seen += await wire.stream.receive_some(65536)
        assert seen.startswith(b"HTTP/1.1 101")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in seen  # RFC 6455's own example


async def test_a_reset_in_the_middle_of_anything_leaves_no_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as server:
        for data in (
            b"",
            b"GET /api",
            b"POST /api/v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
            b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        ):
            wire: Wire = await server.connect()
            await wire.stream.send_all(data)
            linger = b"\1\0\0\0\0\0\0\0"
            wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            wire.stream.socket.close()
        await is_well(server)
        await server.all_done()
    assert caplog.records == []


async def test_what_a_client_left_behind_is_not_answered() -> None:
    async with serving() as server:
        request = b"GET /api/v1/nodes HTTP/1.1\r\nHost: localhost\r\n\r\n"
        wire = await server.connect()
        await wire.stream.send_all(request * 1000)
        linger = b"\1\0\0\0\0\0\0\0"
        wire.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        wire.stream.socket.close()
        await trio.sleep(0.1)
        await is_well(server)
        await server.all_done()
        assert server.client.app.stats.snapshot().total < 900
