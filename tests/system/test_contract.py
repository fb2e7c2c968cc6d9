"""Every JSON example of the document against real nodes with a real model: asked as it is printed,
but for the ids, and the answer held against the printed one, key by key and type by type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.document import differences, read_examples
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, ok, wait_until
from tests.system.test_cluster_join import waiting_id

MODEL = "llama2:7b"  # as the document calls its own
EXAMPLES = read_examples()


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Two nodes with the model, and a third one that waits to be taken in."""
    settings = {"OLLAMAD_MODELS__REPLICAS": "1", "OLLAMAD_SOURCES__REGISTRY": "http://127.0.0.1:9"}
    for cluster in open_cluster(tmp_path_factory, **settings):
        first = cluster.found()
        second = cluster.grow()
        first.import_model(smollm2_path, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [second.id]})
        cluster.wait_replicas(MODEL, cluster.nodes)
        yield cluster


def test_every_example_of_the_document(documented: Cluster) -> None:
    cluster, asked = documented, set[str]()
    first, second = cluster.nodes

    def ask(route: str, path: str = "", **of_body: str) -> Any:
        """Ask as the document does, with these ids in the place of its own."""
        method, named = route.split()
        body = EXAMPLES[route].get("Request Body")
        if body is not None:
            body |= of_body
        answer = ok(first.request(method, path or named, json=body, timeout_s=120))
        asked.add(route)
        found = differences(EXAMPLES[route]["Response"], answer)
        # A time to wait is null where it is not known, as it is of what failed.
        assert [line for line in found if not line.endswith(".eta: None is no int")] == [], route
        return answer

    for route in ("GET /health", "GET /version", "GET /cluster/status", "GET /cluster/leader"):
        ask(route)
    for route in ("POST /generate", "POST /chat", "POST /embeddings"):
        answer = ask(route)
        assert answer["model"] == MODEL
    assert ask("GET /models")["models"][0]["name"] == MODEL
    ask("GET /models/:name", f"/models/{MODEL}")
    wait_until("usage was measured", lambda: all(n["usage"] for n in first.get("/nodes")["nodes"]))
    assert len(ask("GET /nodes")["nodes"]) == 2
    ask("GET /nodes/:id", f"/nodes/{second.id}")
    ask("GET /metrics")

    ask("POST /distribution/auto-configure")
    ask("POST /models/:name/download", "/models/nowhere:7b/download")
    [*_, transfer] = ask("GET /transfers")["transfers"]
    ask("GET /transfers/:id", f"/transfers/{transfer['id']}")

    ask("POST /nodes/:id/drain", f"/nodes/{second.id}/drain")
    assert first.node(second)["status"] == "draining"
    ask("POST /nodes/:id/undrain", f"/nodes/{second.id}/undrain")
    assert first.node(second)["status"] == "online"

    third = cluster.new_node()
    third.launch("--join", cluster.join_token())
    waiting = waiting_id(third)
    ask("POST /cluster/join", node_id=waiting, address=third.address)
    cluster.wait_whole()
    assert third.id == waiting
    ask("POST /cluster/leave", node_id=third.id)
    assert third.wait_end() == 0
    cluster.wait_whole()

    ask("DELETE /models/:name", f"/models/{MODEL}")
    assert first.get("/models")["models"] == []

    assert asked == set(EXAMPLES)
