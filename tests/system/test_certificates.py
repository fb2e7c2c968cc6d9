"""Certificates that last for seconds: nodes renew them, and no request is lost meanwhile."""

import datetime
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.system.conftest import MODEL, open_cluster
from tests.system.harness import Cluster, Node, ok, run_daemon, wait_until
from tests.system.releases import other_version
from tests.system.streams import at_once

LIFETIME_S = 14
RENEWED = "this node's certificate was renewed"
ASK = {
    "model": MODEL,
    "prompt": "Tell me a story.",
    "options": {"temperature": 0, "num_predict": 8, "num_thread": 1},
}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Three nodes; the model is on the first, so that the others' answers cross the network."""
    short = other_version(lifetime_s=LIFETIME_S, renew_before_s=LIFETIME_S / 2)
    settings = {"OLLAMAD_MODELS__REPLICAS": "1", "OLLAMA_CONTEXT_LENGTH": "512"}
    for cluster in open_cluster(tmp_path_factory, **settings, **short):
        first = cluster.found()
        first.import_model(smollm2_path, MODEL)
        cluster.grow(2)
        yield cluster


def ends_at(node: Node) -> float:
    """When the certificate that a node shows now ends, Unix seconds."""
    pem = ssl.get_server_certificate((node.host.address, node.p2p_port))
    end: datetime.datetime = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
    return end.timestamp()


def test_nodes_renew_their_certificates_and_no_request_is_lost(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    third.stop()
    third_ends = time.time() + LIFETIME_S  # at the latest
    failures: list[Any] = []
    answered = dict.fromkeys((first, second), 0)
    until = time.monotonic() + 2 * LIFETIME_S

    def ask(node: Node) -> None:
        """Answers and changes through one node, each over the connections between nodes."""
        while time.monotonic() < until:
            try:
                ok(node.answer("/generate", **ASK))
                node.post(f"/nodes/{second.id}/undrain", timeout_s=10)
            except Exception as error:  # whatever it is, it is a lost request
                failures.append((node.name, error))
            answered[node] += 1

    before = {node: ends_at(node) for node in (first, second)}
    threads = at_once([lambda n=node: ask(n) for node in (first, second)])  # type: ignore[misc]
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert failures == []
    assert min(answered.values()) >= 5
    for node in (first, second):
        assert node.log().count(RENEWED) >= 2
        assert ends_at(node) > max(time.time(), before[node])
    # New connections are made with the new ones.
    second.restart()
    wait_until("they are in touch", lambda: first.node(second)["status"] == "online")

    # Who was off for too long says what to do, and that is enough.
    assert time.time() > third_ends
    third.launch()
    assert third.wait_end() == 1
    assert "run `ollamad renew`" in third.tail(1)
    ended = run_daemon(
        third.directory,
        "renew",
        "--data-dir",
        str(third.data_dir),
        environment=third.environment,
    )
    assert (ended.returncode, "valid until" in ended.stdout) == (0, True), ended.stderr
    old_id = third.id
    third.start()
    cluster.wait_whole()
    assert third.get("/cluster/status")["node_id"] == old_id
    cluster.settled()
