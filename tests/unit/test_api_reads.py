"""How current an answer is: the age that is told, reads that must be current, and 404s."""

import msgspec
import pytest

from tests.fakes.api_client import ApiClient
from tests.fakes.api_services import NODE_1, NODE_2, NOW, STRANGER, FakeCluster, member, model


async def test_answers_from_the_local_state_say_how_old_it_may_be() -> None:
    client = ApiClient()
    for path in ("/nodes", "/models", "/cluster/status", "/cluster/consensus"):
        assert (await client.call("GET", path)).headers["x-state-age-ms"] == "42"
    assert client.world.cluster.barriers == 0
    assert "x-state-age-ms" not in (await client.call("GET", "/health")).headers
    client.world.cluster.silence_s = float("inf")  # no leader was heard since the start
    assert "x-state-age-ms" not in (await client.call("GET", "/nodes")).headers


async def test_a_consistent_read_waits_for_the_majority_first() -> None:
    client = ApiClient()
    cluster = client.world.cluster
    late = member(STRANGER, "node_003")
    cluster.on_barrier = lambda: cluster.state.members.update({STRANGER: late})
    answer = await client.call("GET", "/nodes?consistent=false")
    assert len(answer.json["nodes"]) == 2
    answer = await client.call("GET", "/nodes?consistent=true")
    assert len(answer.json["nodes"]) == 3


async def test_a_consistent_read_without_a_quorum_is_refused() -> None:
    client = ApiClient()
    client.world.cluster.has_quorum = False
    answer = await client.call("GET", "/nodes?consistent=true")
    assert (answer.status, answer.code) == (503, "NO_QUORUM")
    assert answer.headers["retry-after"] == "2"
    assert (await client.call("GET", "/nodes")).status == 200  # old is better than nothing


@pytest.mark.parametrize("value", ["yes", "", "True"])
async def test_consistent_is_true_or_false(value: str) -> None:
    answer = await ApiClient().call("GET", f"/nodes?consistent={value}")
    assert (answer.status, answer.code) == (400, "INVALID_REQUEST")
    assert "consistent must be true or false" in answer.json["error"]


def learns_late(cluster: FakeCluster) -> None:
    """Another node acknowledged a model and a member that this one has not applied yet."""
    cluster.state.models["new:latest"] = model("new:latest")
    cluster.state.members[STRANGER] = member(STRANGER, "node_003")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models/new", None),
        ("GET", "/nodes/node_003", None),
        ("POST", "/nodes/node_003/drain", {}),
        ("POST", "/generate", {"model": "new", "prompt": "x"}),
        ("POST", "/embeddings", {"model": "new", "prompt": "x"}),
    ],
)
async def test_a_name_is_unknown_only_if_the_majority_does_not_know_it(
    method: str, path: str, body: dict[str, str] | None
) -> None:
    client = ApiClient()
    cluster = client.world.cluster
    assert (await client.call(method, path, body)).status == 404
    assert cluster.barriers == 1
    cluster.on_barrier = lambda: learns_late(cluster)
    assert (await client.call(method, path, body)).status == 200
    assert cluster.barriers == 2
    assert (await client.call(method, path, body)).status == 200
    assert cluster.barriers == 2  # known names cost nothing


async def test_without_a_quorum_an_unknown_name_is_told_at_once() -> None:
    client = ApiClient()
    client.world.cluster.has_quorum = False
    assert (await client.call("GET", "/models/new")).status == 404


async def test_until_it_has_caught_up_a_node_that_starts_judges_nobody() -> None:
    client = ApiClient()
    client.world.cluster.is_caught_up = False  # its old state may hold ended sessions
    for path, body in (("/nodes", None), ("/generate", {"model": "x", "prompt": "y"})):
        answer = await client.call("POST" if body else "GET", path, body)
        assert (answer.status, answer.code) == (503, "NOT_READY")
        assert answer.headers["retry-after"] == "1"
    assert (await client.call("GET", "/health")).status == 200
    assert (await client.call("GET", "/version")).status == 200


async def test_the_consensus_route_tells_place_and_hash() -> None:
    client = ApiClient(role="viewer")
    cluster = client.world.cluster
    first = (await client.call("GET", "/cluster/consensus")).json
    assert first == {
        "node_id": NODE_1,
        "leader": NODE_1,
        "is_leader": True,
        "term": 3,
        "voters": [NODE_1, NODE_2],
        "has_quorum": True,
        "commit_index": 17,
        "applied_index": 17,
        "state_hash": f"sha256:{cluster.state.fingerprint()}",
        "state_age_ms": 42,
        "disk_full": False,
        "disk_hangs": False,
    }
    changed = msgspec.structs.replace(cluster.state.members[NODE_2], joined_at=NOW)
    cluster.state.members[NODE_2] = changed
    assert (await client.call("GET", "/cluster/consensus")).json["state_hash"] != first[
        "state_hash"
    ]
