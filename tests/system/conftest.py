"""Fixtures of the system tests: clusters of real daemons, shared where isolation allows."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import write_load
from tests.system.harness import VOTERS, Cluster, ok, wait_until
from tests.system.namespaces import Network, NotPermitted

MODEL = "smollm2:135m"
# What a model that is greedy never stops saying: as much as its context holds. On one thread: two
# that wait for each other get nowhere on a busy machine.
ENDLESS = {
    "prompt": "a a a a a a a a a a a a",
    "raw": True,
    "options": {"num_thread": 1, "temperature": 0, "repeat_penalty": 1.0, "num_predict": 20_000},
}

_numbers = itertools.count(1)
_clusters: list[Cluster] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.system)
            if "smollm2_path" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.model)


def open_cluster(factory: pytest.TempPathFactory, **environment: str) -> Iterator[Cluster]:
    """A cluster without nodes that is ended after use; its paths are short, for Unix sockets."""
    with Cluster(factory.mktemp(f"c{next(_numbers)}-", numbered=False), environment) as cluster:
        _clusters.append(cluster)
        try:
            yield cluster
        finally:
            _clusters.remove(cluster)


@pytest.fixture(scope="module")
def model_on_one(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Two nodes; the model is on the first one, so that the second always forwards."""
    for cluster in open_cluster(tmp_path_factory, OLLAMAD_MODELS__REPLICAS="1"):
        first = cluster.found()
        cluster.grow(1)
        first.import_model(smollm2_path, MODEL)
        cluster.wait_replicas(MODEL, [first])
        yield cluster


@contextlib.contextmanager
def derived(cluster: Cluster, name: str, template: str) -> Iterator[str]:
    """The model with another template, known at the second node; deleted with the block."""
    first, second = cluster.nodes[:2]
    body = {"model": name, "from": MODEL, "template": template, "stream": False}
    ok(first.request("POST", f"{first.url}/api/create", json=body))
    try:
        wait_until("it is known", lambda: second.request("GET", f"/models/{name}").is_success)
        yield name
    finally:
        first.delete(f"/models/{name}")


def open_two_holders(
    factory: pytest.TempPathFactory, smollm2_path: Path, **environment: str
) -> Iterator[Cluster]:
    """Three nodes; the model is on the first two, so that the third always forwards."""
    settings = {
        "OLLAMAD_MODELS__REPLICAS": "1",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_CONTEXT_LENGTH": "2048",
        "OLLAMAD_ENGINE__STALL_TIMEOUT": "2s",
    }
    for cluster in open_cluster(factory, **settings | environment):
        first = cluster.found()
        cluster.grow(2)
        first.import_model(smollm2_path, MODEL)
        first.post(f"/models/{MODEL}/download", {"nodes": [cluster.nodes[1].id]})
        cluster.wait_replicas(MODEL, cluster.nodes[:2])
        yield cluster


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of a test's own, without nodes."""
    yield from open_cluster(tmp_path_factory)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, for the tests of a module."""
    for cluster in open_cluster(tmp_path_factory):
        cluster.found()
        yield cluster


@pytest.fixture(scope="module")
def trio_of_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, for the tests of a module; a test leaves all of them running."""
    for cluster in open_cluster(tmp_path_factory):
        cluster.found()
        cluster.grow(2)
        yield cluster


@pytest.fixture(scope="module", params=[3, 5])
def _voters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    for cluster in open_cluster(tmp_path_factory, **write_load.ENVIRONMENT):
        cluster.found()
        cluster.grow(request.param - 1)
        yield cluster


@pytest.fixture
def voters(_voters: Cluster) -> Cluster:
    """Three nodes that run, then five, for a write load; shared by the tests of a module."""
    _voters.revive()
    return _voters


@pytest.fixture(scope="module", params=VOTERS)
def _far_voters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    try:
        with Network() as network:
            for cluster in open_cluster(tmp_path_factory, **write_load.ENVIRONMENT):
                cluster.network = network
                cluster.found()
                cluster.grow(request.param - 1)
                yield cluster
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.fixture
def network(_far_voters: Cluster) -> Iterator[Network]:
    """The links between `far_voters`, whole before and after a test."""
    assert isinstance(_far_voters.network, Network)
    _far_voters.network.heal()
    yield _far_voters.network
    _far_voters.network.heal()


@pytest.fixture
def far_voters(_far_voters: Cluster, network: Network) -> Cluster:
    """Like `voters`, each node on a host of its own."""
    _far_voters.revive()
    return _far_voters


@pytest.fixture(autouse=True)
def no_tracebacks() -> Iterator[None]:
    """A daemon never logs a traceback, whatever a test does to it."""
    before = {node.log_path: len(node.log()) for each in _clusters for node in each.nodes}
    yield
    for cluster in _clusters:
        for node in cluster.nodes:
            new = node.log()[before.get(node.log_path, 0) :]
            assert "Traceback (most recent call last)" not in new, f"{node.name}:\n{new}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for cluster in _clusters:
            for node in cluster.nodes:
                report.sections.append((f"log of {node.name}", node.tail()))
    return report
