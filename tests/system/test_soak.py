"""Two minutes of mixed load with random kills: nothing fails, nothing grows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.run import MODEL, Soak
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster

SECONDS = 120.0


@pytest.fixture
def three(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    settings = {"OLLAMAD_MODELS__REPLICAS": "3", "OLLAMA_CONTEXT_LENGTH": "512"}
    for cluster in open_cluster(tmp_path_factory, **settings):
        first = cluster.found()
        cluster.grow(2)
        first.import_model(smollm2_path, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [n.id for n in cluster.nodes[1:]]})
        cluster.wait_replicas(MODEL, cluster.nodes)
        yield cluster


def test_nothing_fails_and_nothing_grows(three: Cluster) -> None:
    found = Soak(three, SECONDS).run()
    print(found.report())
    assert not found.failures, found.failures[:10]
    assert not found.leaks(), found.report()
    assert not found.left_behind
    assert found.kills >= 2
    assert sum(found.done.values()) >= 20
