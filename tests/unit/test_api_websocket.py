"""WebSockets on real sockets: who may open one, what is asked and told, readers that are slow."""

import json
import logging
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ollamad.api import feed, hub, messages, websocket
from ollamad.api.auth import AuthSettings
from ollamad.api.limits import RateLimits
from ollamad.core.admission import QueuedRequest
from ollamad.core.commands import DeleteModel, Revoke, SetDraining
from ollamad.core.presence import Beat, Presence, Usage
from tests.fakes import ws_server
from tests.fakes.api_services import NODE_1, NODE_2, NOW, member
from tests.fakes.ws_client import SOON_S, Refused, SocketClient
from tests.fakes.ws_server import Server, serving

quick = ws_server.quick

# Who may open one.


async def test_a_token_opens_it_by_header_and_by_query_at_both_paths() -> None:
    async with serving() as server:
        token = server.client.token("viewer")
        for path in ("/ws", "/api/v1/ws", "/ws?x=1"):
            async with await SocketClient.open(
                server.port, path, Authorization=f"Bearer {token}"
            ) as socket:
                assert (await socket.receive())["type"] == "cluster_status"
        for path in (f"/ws?token={token}", f"/api/v1/ws?a=b&token={token}"):
            async with await SocketClient.open(
                server.port, path, Origin="https://page.example"
            ) as socket:
                assert (await socket.receive())["type"] == "cluster_status"
                assert socket.response is not None
                assert socket.response.headers["x-content-type-options"] == "nosniff"
                assert socket.response.headers["x-request-id"]


async def test_a_bad_token_is_refused_before_the_upgrade() -> None:
    async with serving() as server:
        for path, headers in [
            ("/ws?token=nonsense", {}),
            ("/ws", {"Authorization": "Bearer nonsense"}),
            # A header counts more than the query.
            (f"/ws?token={server.client.token('admin')}", {"Authorization": "Bearer nonsense"}),
            ("/ws", {"Origin": "https://evil.example"}),  # a page that calls this host
            ("/ws", {"X_Forwarded_For": "192.0.2.1"}),
        ]:
            refused = await server.refused(path, **headers)
            assert (refused.status, refused.json["code"]) == (401, "UNAUTHORIZED"), path
            assert set(refused.json) == {"error", "code", "details"}
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-frame-options"] == "DENY"
        assert len(server.client.app.api.hub) == 0


async def test_programs_of_this_host_need_no_token_unless_that_is_off() -> None:
    async with serving() as server, await SocketClient.open(server.port) as socket:
        assert (await socket.receive())["type"] == "cluster_status"
    async with serving(auth=AuthSettings(loopback_role="none")) as server:
        assert (await server.refused()).status == 401


async def test_a_connection_is_a_request_of_a_keys_quota() -> None:
    async with serving() as server:
        made = await server.client.call("POST", "/keys", {"role": "viewer", "request_quota": 1})
        path = f"/ws?token={made.json['key']}"
        async with await SocketClient.open(server.port, path) as socket:
            assert (await socket.receive())["type"] == "cluster_status"
        refused = await server.refused(path)
        assert (refused.status, refused.json["code"]) == (429, "QUOTA_EXCEEDED")


async def test_a_node_that_cannot_tell_yet_says_so() -> None:
    async with serving() as server:
        server.world.cluster.is_caught_up = False
        refused = await server.refused()
        assert (refused.status, refused.json["code"]) == (503, "NOT_READY")
        assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/nope", {}, 404, "NOT_FOUND"),
        ("/ws", {"Sec_WebSocket_Version": "8"}, 400, "INVALID_HANDSHAKE"),
        ("/ws", {"Sec_WebSocket_Key": "short"}, 400, "INVALID_HANDSHAKE"),
    ],
)
async def test_what_is_no_handshake_is_told_why(
    path: str, headers: dict[str, str], status: int, code: str
) -> None:
    async with serving() as server:
        client = SocketClient(await trio.open_tcp_stream("127.0.0.1", server.port), 1, path)
        request = client.protocol.connect()
        for name, value in headers.items():
            del request.headers[name.replace("_", "-")]
            request.headers[name.replace("_", "-")] = value
        client.protocol.send_request(request)
        async with client:
            await client.flush()
            response = await client.event()
            assert (response.status_code, json.loads(response.body)["code"]) == (status, code)


async def test_an_address_has_only_so_many() -> None:
    async with serving(rate_limits=RateLimits(websocket=2)) as server:
        first = await server.open()
        async with await server.open():
            refused = await server.refused()
            assert (refused.status, refused.json["code"]) == (429, "TOO_MANY_CONNECTIONS")
            assert refused.json["details"]["limit"] == 2
            assert int(refused.headers["retry-after"]) > 0
            assert first.response is not None
            told = [
                (r.headers["ratelimit-limit"], r.headers["ratelimit-remaining"])
                for r in (first.response, refused)
            ]
            assert told == [("2", "1"), ("2", "0")]
            await first.stream.aclose()
            with trio.fail_after(SOON_S):
                while len(server.client.app.api.hub) > 1:  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.01)
            async with await server.open():
                assert (await server.refused()).status == 429


async def test_an_address_has_only_so_many_also_when_all_come_at_once() -> None:
    opened: list[SocketClient] = []
    refused: list[int] = []
    async with serving(rate_limits=RateLimits(websocket=5, general=0)) as server:

        async def come() -> None:
            try:
                opened.append(await SocketClient.open(server.port))
            except Refused as refusal:
                refused.append(refusal.status)

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(come)
        assert (len(opened), set(refused)) == (5, {429})
        for socket in opened:
            await socket.stream.aclose()


# What is asked.


async def test_a_ping_is_answered_and_subscriptions_are_acknowledged() -> None:
    async with serving() as server, await server.open() as socket:
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        for kind, status in [("subscribe", "subscribed"), ("unsubscribe", "unsubscribed")]:
            for channel in messages.CHANNELS[:-1]:
                await socket.send({"type": kind, "channel": channel})
                ack = {"type": "subscription_ack", "channel": channel, "status": status}
                assert await socket.receive_type("subscription_ack") == ack


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({"type": "nonsense"}, "UNKNOWN_TYPE"),
        ({"type": "subscribe", "channel": "nonsense"}, "UNKNOWN_CHANNEL"),
        ({"type": "subscribe"}, "UNKNOWN_CHANNEL"),
        ({"type": "unsubscribe", "channel": "x" * 2000}, "UNKNOWN_CHANNEL"),
        ({"type": "subscribe", "channel": "logs"}, "FORBIDDEN"),
        ({"type": 7}, "INVALID_MESSAGE"),
        ({}, "INVALID_MESSAGE"),
        ([], "INVALID_MESSAGE"),
        ("{", "INVALID_JSON"),
        ("", "INVALID_JSON"),
        ("[" * 4000, "INVALID_MESSAGE"),
        ('{"type":"ping","x":' + "[" * 2000 + "]" * 2000 + "}", "INVALID_JSON"),
    ],
)
async def test_an_error_is_told_and_the_socket_stays_open(sent: Any, code: str) -> None:
    async with serving() as server, await server.open() as socket:
        await socket.send(sent)
        message = await socket.receive()
        assert set(message) == {"type", "error", "code"}
        assert (message["type"], message["code"]) == ("error", code)
        assert 0 < len(message["error"]) < 300
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_frames_that_are_no_text_are_told_and_messages_in_parts_are_one() -> None:
    async with serving() as server, await server.open() as socket:
        socket.protocol.send_binary(b"\x00\xff")
        await socket.flush()
        assert (await socket.receive())["code"] == "INVALID_MESSAGE"
        socket.protocol.send_text(b'{"type":', fin=False)
        socket.protocol.send_ping(b"in between")
        socket.protocol.send_continuation(b'"ping"}', fin=True)
        await socket.flush()
        assert await socket.receive() == {"type": "pong"}


async def test_a_message_too_large_closes_it_and_takes_no_memory() -> None:
    async with serving() as server, await server.open() as socket:
        socket.protocol.send_text(b"x" * 4000, fin=False)
        for _ in range(50):
            socket.protocol.send_continuation(b"", fin=False)
        socket.protocol.send_continuation(b"x" * 4000, fin=False)
        await socket.flush()
        assert await socket.closed() == 1009


async def test_nonsense_of_the_protocol_closes_it() -> None:
    async with serving() as server, await server.open() as socket:
        await socket.stream.send_all(b"\x83\x00\x00\x00")  # an unknown kind of frame, unmasked
        assert await socket.closed() == 1002


async def test_a_close_is_answered_and_leaves_nothing_behind() -> None:
    async with serving() as server, await server.open() as socket:
        await socket.subscribe("metrics", "nodes")
        socket.protocol.send_close(1000, "bye")
        await socket.flush()
        assert await socket.closed() == 1000
        with trio.fail_after(SOON_S):
            while len(server.client.app.api.hub):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)
        assert not server.client.app.api.hub.wants("metrics", "nodes")
        assert not server.client.app.api.hub.is_full("127.0.0.1")


# What is told.


async def test_nothing_is_sent_on_a_channel_that_is_not_subscribed(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        await server.world.cluster.propose(SetDraining(NODE_2, True))
        await trio.sleep(0.1)
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        await socket.subscribe("metrics")
        assert (await socket.receive())["data"]["cpu"] == 35.25
        await socket.send({"type": "unsubscribe", "channel": "metrics"})
        await socket.receive_type("subscription_ack", status="unsubscribed")
        await trio.sleep(0.1)
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_events_come_from_what_changed_in_the_cluster(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        cluster = server.world.cluster
        await socket.subscribe("nodes", "models", "cluster")
        await cluster.propose(SetDraining(NODE_2, True))
        event = await socket.receive_type("node_event")
        assert event == {
            "type": "node_event",
            "event_type": "node_draining",
            "node_id": NODE_2,
            "data": {"address": "node_002:8080", "status": "draining", "name": "node_002"},
            "timestamp": int(NOW),
        }
        await cluster.propose(DeleteModel("smollm2:135m"))
        assert (await socket.receive_type("model_event"))["event_type"] == "model_deleted"
        cluster.presences[NODE_2] = Presence(False, NOW, Beat(NOW, Usage()))
        cluster.notify()
        assert (await socket.receive_type("node_event"))["event_type"] == "node_offline"
        status = await socket.receive_type("cluster_status")
        assert (status["data"]["status"], status["data"]["nodes_online"]) == ("degraded", 1)
        cluster.leader_id = NODE_2
        changed = await socket.receive_type("node_event")
        assert (changed["event_type"], changed["node_id"]) == ("leader_changed", NODE_2)
        assert (await socket.receive_type("cluster_status"))["data"]["leader"] == NODE_2


async def test_transfers_are_asked_for_only_while_somebody_listens(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        library, [first] = server.world.library, server.world.library.transfer_list
        asked = 0
        transfers = library.transfers

        async def counted() -> Any:
            nonlocal asked
            asked += 1
            return await transfers()

        library.transfers = counted  # type: ignore[method-assign]
        await trio.sleep(0.1)
        assert asked == 0
        await socket.subscribe("transfers")
        change = msgspec.structs.replace
        event = await socket.receive_type("model_event")
        assert event["event_type"] == "download_started"
        library.transfer_list = [change(first, bytes_done=700, progress=70.0)]
        event = await socket.receive_type("model_event")
        assert event["event_type"] == "download_progress"
        assert (event["data"]["progress"], event["data"]["transfer_id"]) == (70.0, first.id)
        library.transfer_list = [
            change(first, status="failed", error="disk full", finished_at=NOW + 1)
        ]
        event = await socket.receive_type("model_event")
        assert event["event_type"] == "download_failed"
        assert (event["data"]["status"], event["data"]["error"]) == ("failed", "disk full")


async def test_who_waits_sees_its_place_until_nobody_waits(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        await socket.subscribe("queue")
        inference = server.world.inference
        inference.queue_now = (QueuedRequest("mine", "smollm2:135m", 2, 4.5, 1.5),)
        told = await socket.receive_type("queue_status")
        assert told["data"] == {
            "waiting": 1,
            "requests": [
                {
                    "request_id": "mine",
                    "model": "smollm2:135m",
                    "position": 2,
                    "estimate_seconds": 4.5,
                    "waited_seconds": 1.5,
                }
            ],
        }
        inference.queue_now = ()
        while told["data"]["waiting"]:
            told = await socket.receive_type("queue_status")
        assert told["data"] == {"waiting": 0, "requests": []}


async def test_an_alert_is_told_once_and_to_who_comes_later(quick: None) -> None:
    async with serving() as server, await server.open() as socket, await server.open() as late:
        await socket.subscribe("alerts")
        cluster, clock = server.world.cluster, server.world.clock
        full = Usage(memory=0.99, memory_available=1, disk_free=10**12)
        cluster.presences[NODE_1] = Presence(True, NOW, Beat(NOW, full))
        cluster.notify()
        await trio.sleep(0.1)
        clock.now += 60
        alert = await socket.receive_type("alert", alert="low_memory")
        assert alert == {
            "type": "alert",
            "level": "warning",
            "message": "Node node_001 is running low on memory",
            "timestamp": int(NOW + 60),
            "alert": "low_memory",
            "subject": NODE_1,
            "state": "raised",
        }
        await late.subscribe("alerts")
        assert await late.receive_type("alert", alert="low_memory") == alert
        well = Usage(memory=0.5, memory_available=10**10, disk_free=10**12)
        cluster.presences[NODE_1] = Presence(True, NOW, Beat(NOW, well))
        cluster.notify()
        await trio.sleep(0.1)
        clock.now += 60
        for each in (socket, late):
            cleared = await each.receive_type("alert", alert="low_memory")
            assert (cleared["state"], cleared["level"]) == ("cleared", "info")


async def test_disks_and_copies_that_run_short_are_alerts_too(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        await socket.subscribe("alerts")
        cluster, clock = server.world.cluster, server.world.clock
        [known] = cluster.state.models.values()
        for disk_free, copies, state in ((10**9, (NODE_1,), "raised"), (10**12, None, "cleared")):
            beat = Beat(NOW, Usage(memory=0.5, disk_free=disk_free))
            cluster.presences[NODE_1] = Presence(True, NOW, beat)
            confirmed = copies or known.desired
            cluster.state.models[known.name] = msgspec.structs.replace(known, confirmed=confirmed)
            cluster.notify()
            await trio.sleep(0.1)
            clock.now += 60
            for kind, subject in (("low_disk", NODE_1), ("under_replicated", known.name)):
                await socket.receive_type("alert", alert=kind, subject=subject, state=state)


async def test_the_log_is_for_admins(quick: None) -> None:
    async with serving() as server, await server.open(role="admin") as socket:
        log = logging.getLogger("ollamad.somewhere")
        log.warning("before anybody listens")
        await socket.subscribe("logs")
        log.warning("disk %s is slow", "sda")
        message = await socket.receive()
        assert message["type"] == "log"
        data = message["data"]
        assert (data["level"], data["logger"]) == ("warning", "somewhere")
        assert data["message"] == "disk sda is slow"
        await trio.to_thread.run_sync(log.error, "from a thread")
        assert (await socket.receive())["data"]["message"] == "from a thread"
        for number in range(feed.MAX_LOG_LINES + 50):  # without a chance to tell them
            log.warning("flood %d", number)
        seen = [await socket.receive() for _ in range(feed.MAX_LOG_LINES)]
        dropped = sum(one["data"].get("dropped", 0) for one in seen)
        assert 40 <= dropped <= 50


# Tokens that do not count any more.


async def test_the_end_of_a_session_closes_its_sockets(quick: None) -> None:
    async with serving() as server, await server.open() as socket, await server.open() as other:
        caller = server.client.app.api.auth.identify(
            {"Authorization": f"Bearer {server.client.token('viewer')}"}, "192.0.2.1"
        )
        assert caller is not None
        [first, _] = server.client.app.api.hub._sessions
        await server.world.cluster.propose(Revoke(first._caller.session, NOW + 1e6))  # type: ignore[attr-defined]
        assert await socket.closed() == 1008
        await other.send({"type": "ping"})
        assert await other.receive() == {"type": "pong"}


async def test_a_token_that_expires_closes_its_socket(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "CHECK_S", 0.0)
    async with serving() as server, await server.open() as socket:
        server.world.clock.now += 3600
        assert await socket.closed() == 1008


async def test_an_api_key_of_its_own_header_counts_as_long_as_it_is_good(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "CHECK_S", 0.0)
    async with serving(auth=AuthSettings(loopback_role="none")) as server:
        token = server.client.token("viewer")
        async with await SocketClient.open(server.port, "/ws", X_Api_Key=token) as socket:
            await trio.sleep(0.2)  # some checks
            await socket.send({"type": "ping"})
            assert await socket.receive_type("pong") == {"type": "pong"}


async def test_who_is_no_admin_any_more_hears_no_log(quick: None) -> None:
    async with serving() as server, await server.open(role="admin") as socket:
        await socket.subscribe("logs")
        users = server.world.cluster.state.users
        users["admin"] = msgspec.structs.replace(users["admin"], role="viewer")
        server.world.cluster.notify()
        ack = await socket.receive_type("subscription_ack")
        assert (ack["channel"], ack["status"]) == ("logs", "unsubscribed")


# Readers that are slow.


async def stuff(server: Server) -> None:
    """Publish until nothing more goes to the one socket: the kernel asks anew every 200 ms."""
    app_hub = server.client.app.api.hub
    [session] = app_hub._sessions
    app_hub.subscribe(session, "metrics")
    stuck_since = trio.current_time()
    while trio.current_time() - stuck_since < 0.5:
        padded = {"type": "metrics", "pad": "x" * 2000}
        await app_hub.publish(padded, "metrics", key="metrics")
        if not session._writing:  # type: ignore[attr-defined]
            stuck_since = trio.current_time()
        else:
            await trio.sleep(0.02)


async def test_a_slow_reader_loses_old_metrics_first_and_is_told() -> None:
    async with serving() as server, await server.open(buffer=4096) as socket:
        await stuff(server)
        socket.is_strict = False  # those of this test are numbered
        publish = server.client.app.api.hub.publish
        for number in range(100):
            await publish({"type": "metrics", "number": number}, "metrics", key="metrics")
            await publish({"type": "node_event", "number": number}, "metrics")
        seen = []
        while True:
            message = await socket.receive()
            if "pad" in message or "data" in message:
                continue  # what the kernel had
            seen.append(message)
            if message == {"type": "node_event", "number": 99}:
                break
        dropped = sum(one["count"] for one in seen if one["type"] == "dropped")
        metrics = [one["number"] for one in seen if one["type"] == "metrics"]
        assert [one["number"] for one in seen if one["type"] == "node_event"] == list(range(100))
        assert metrics[-1] == 99
        assert dropped + len(metrics) >= 100


async def test_who_stays_behind_is_closed_with_1013_and_holds_up_nobody(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "BEHIND_S", 1.0)
    async with serving() as server:
        async with await server.open(buffer=4096) as socket:
            await stuff(server)
            async with await server.open() as other:
                await other.subscribe("metrics")
                assert (await other.receive_type("metrics"))["data"]
            await trio.sleep(1.2)
            assert await socket.closed() == 1013
        with trio.fail_after(SOON_S):
            while len(server.client.app.api.hub):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)


async def test_who_never_reads_again_is_cut_off(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "BEHIND_S", 1.0)
    monkeypatch.setattr(websocket, "CLOSE_S", 0.1)
    async with serving() as server, await server.open(buffer=4096):
        await stuff(server)
        with trio.fail_after(SOON_S):
            while len(server.client.app.api.hub):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)


async def test_who_asks_without_end_is_answered_at_a_bounded_rate() -> None:
    async with serving() as server, await server.open() as socket:
        for _ in range(5 * websocket.BURST):
            socket.protocol.send_text(b'{"type":"ping"}')
        await socket.flush()
        answers = 0
        with trio.move_on_after(1.0):
            while await socket.receive() == {"type": "pong"}:
                answers += 1
        assert websocket.BURST <= answers <= websocket.BURST + 3 * websocket.EVENTS_PER_S


async def test_who_does_not_read_the_answers_is_not_read(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as server, await server.open() as socket:
        ask = json.dumps({"type": "subscribe", "channel": "x" * 1000})
        sent = 0
        monkeypatch.setattr(websocket, "EVENTS_PER_S", 1e6)
        with trio.move_on_after(1.0):
            while True:
                await socket.send(ask)
                sent += 1
        assert sent < 20_000  # it came to a stop
        [session] = server.client.app.api.hub._sessions
        assert len(session._outbox or ()) < 10  # type: ignore[attr-defined]


async def test_idle_sockets_are_pinged(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PING_AFTER_S", 0.05)
    async with serving() as server, await server.open() as socket:
        with trio.fail_after(SOON_S):
            event = await socket.event()
            assert event.opcode == 9


async def test_the_shutdown_says_goodbye() -> None:
    async with serving() as server, await server.open() as socket:
        server.shutdown.set()
        assert await socket.closed() == 1001


async def test_a_member_that_joins_is_told_of(quick: None) -> None:
    async with serving() as server, await server.open() as socket:
        await socket.subscribe("nodes")
        cluster = server.world.cluster
        gone = cluster.state.members.pop(NODE_2)
        cluster.notify()
        assert (await socket.receive_type("node_event"))["event_type"] == "node_left"
        cluster.state.members[NODE_2] = member(NODE_2, gone.name)
        cluster.notify()
        kinds = [(await socket.receive_type("node_event"))["event_type"] for _ in range(2)]
        assert kinds == ["node_joined", "node_online"]
