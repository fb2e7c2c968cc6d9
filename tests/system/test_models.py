"""Models in a cluster: brought in on one node, copied to others, deleted from all."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gguf_files import LLAMA, TENSORS, gguf_bytes, write_gguf
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, refused, run_daemon, wait_until

MB = 1_000_000
LARGE_SIZE = 400 * MB  # a few seconds of transfer, time enough to be killed in
IN_FLIGHT = 60 * MB  # what may be on its way, or read for another reason, when a node dies


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes that copy a model only when they are told to."""
    for cluster in open_cluster(tmp_path_factory, OLLAMAD_MODELS__REPLICAS="1"):
        cluster.found()
        cluster.grow(2)
        yield cluster


@pytest.fixture(autouse=True)
def all_run(three: Cluster) -> None:
    for node in three.nodes:
        if not node.running:
            node.start()
    three.wait_whole()


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A GGUF file whose header is right and whose every megabyte is another."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    rows = LARGE_SIZE // (4 * 1024)
    tensors = TENSORS | {"blk.0.ffn_up.weight": ((1024, rows), 0)}
    small = gguf_bytes(tensors=TENSORS | {"blk.0.ffn_up.weight": ((1024, 1), 0)})
    # The shape of the last tensor is all that differs, so the header is as long.
    header = gguf_bytes(LLAMA, tensors)[: len(small) - 4096]
    noise = os.urandom(MB)
    with open(path, "wb") as file:
        file.write(header)
        left = rows * 4096
        while left:
            part = (left.to_bytes(8, "big") + noise)[: min(MB, left)]
            left -= file.write(part)
    yield path
    path.unlink()


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A GGUF file that no other test has."""
    return write_gguf(tmp_path / "tiny.gguf", LLAMA | {"general.name": str(tmp_path)})


@contextlib.contextmanager
def imported(cluster: Cluster, node: Node, file: Path, name: str) -> Iterator[Any]:
    """A model on one node, deleted afterwards; then no file of it is left on any node."""
    before = {path for each in cluster.nodes for path in blobs(each)}
    model = node.import_model(file, name)
    try:
        yield model
    finally:
        for each in cluster.nodes:
            if not each.running:
                each.start()
        cluster.asked.delete(f"/models/{name}")
        wait_until(
            "its blobs are gone",
            lambda: {path for each in cluster.nodes for path in blobs(each)} <= before,
        )


def blobs(node: Node) -> list[Path]:
    """The models' files in a node's store, finished or not (not configurations, piece maps)."""
    directory = node.data_dir / "models" / "blobs"
    return [path for path in directory.glob("*") if path.stat().st_size > 20_000]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_to(asked: Node, model: str, *nodes: Node) -> str:
    body = {"nodes": [node.id for node in nodes]}
    return str(asked.post(f"/models/{model}/download", body)["transfer_id"])


def transfer_of(asked: Node, model: str, to: Node, status: str = "") -> Any:
    """The newest transfer of a model to a node."""
    for transfer in asked.get("/transfers")["transfers"]:
        this = transfer["model_name"] == f"{model}:latest" and transfer["node_id"] == to.id
        if this and status in ("", transfer["status"]):
            return transfer
    return None


def read_bytes(node: Node) -> int:
    """What the daemon has read from its disk so far."""
    lines = Path(f"/proc/{node.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar"))[7:])


def test_an_imported_model_is_told_by_every_node(three: Cluster, tiny_file: Path) -> None:
    first = three.nodes[0]
    with imported(three, first, tiny_file, "user/tiny:q4") as made:
        assert made["details"]["family"] == "llama"
        assert made["size"] >= tiny_file.stat().st_size
        for node in three.nodes:
            wait_until(
                "every node knows it",
                lambda n=node: "user/tiny:q4" in [m["name"] for m in n.get("/models")["models"]],
            )
            model = node.get("/models/user%2Ftiny:q4")["model"]
            assert model["digest"] == made["digest"]
            assert model["replicas"] == [first.id]
            assert model["inference_ready"]
        assert [sha256(path) for path in blobs(first)] == [sha256(tiny_file)]


def test_a_copy_arrives_in_verified_pieces_with_true_progress(
    three: Cluster, large_file: Path, record_property: Callable[[str, object], None]
) -> None:
    source, target, witness = three.nodes
    size = large_file.stat().st_size
    with imported(three, source, large_file, "large"):
        begun = time.monotonic()
        transfer_id = copy_to(witness, "large", target)
        seen: list[Any] = []

        def over() -> bool:
            seen.append(witness.get(f"/transfers/{transfer_id}")["transfer"])
            return bool(seen[-1]["status"] not in ("pending", "active"))

        wait_until("the copy is there", over, 120, 0.05)
        took_s = time.monotonic() - begun
        record_property("copy_mb_per_s", round(size / took_s / MB))
        print(f"{size / took_s / MB:.0f} MB/s")

        last = seen[-1]
        assert last["status"] == "completed", last
        assert (last["progress"], last["bytes_done"]) == (100, last["bytes_total"])
        assert last["bytes_total"] >= size
        assert last["type"] == "replication"
        assert last["node_id"] == target.id
        done = [each["bytes_done"] for each in seen]
        assert done == sorted(done), "progress does not go back"
        between = [each for each in seen if 0 < each["progress"] < 100]
        assert len(between) >= 3, "it is seen on its way"
        for each in between:
            assert each["progress"] == pytest.approx(
                100 * each["bytes_done"] / last["bytes_total"], abs=1
            )
        assert {each["peer_id"] for each in between[1:]} == {source.id}
        moving = [each for each in between if each["speed"]]
        assert moving, "a speed is told"
        assert all(each["eta"] is not None for each in moving)
        # As fast as the clock says, with room for the first moments.
        assert 0.3 < moving[-1]["speed"] / (size / took_s) < 4

        three.wait_replicas("large", [source, target])
        assert [sha256(path) for path in blobs(target)] == [sha256(large_file)]
        # Once more: it is there already, and no byte moves.
        before = read_bytes(source)
        copy_to(witness, "large", target)
        assert read_bytes(source) - before < IN_FLIGHT


def test_a_receiver_that_is_killed_goes_on_where_it_was(three: Cluster, large_file: Path) -> None:
    source, target, witness = three.nodes
    size = large_file.stat().st_size
    with imported(three, source, large_file, "large"):
        before = read_bytes(source)
        copy_to(witness, "large", target)
        half = wait_half(witness, target)
        target.kill()
        assert size > read_bytes(source) - before > 0.2 * size, "killed on the way"
        target.start()
        resumed = wait_until(
            "it goes on",
            lambda: (t := transfer_of(witness, "large", target)) and t["bytes_done"] and t,
        )
        assert resumed["bytes_done"] >= half - IN_FLIGHT
        three.wait_replicas("large", [source, target])
        read = read_bytes(source) - before
        assert 0.9 * size < read < size + IN_FLIGHT, "no verified piece is fetched again"
        assert [sha256(path) for path in blobs(target)] == [sha256(large_file)]


def test_a_sender_that_is_killed_is_waited_for(three: Cluster, large_file: Path) -> None:
    source, target, witness = three.nodes
    size = large_file.stat().st_size
    with imported(three, source, large_file, "large"):
        copy_to(witness, "large", target)
        half = wait_half(witness, target)
        source.kill()
        assert not complete(three, target), "killed on the way"
        time.sleep(1)
        source.start()
        three.wait_replicas("large", [source, target])
        assert read_bytes(source) < size - half + IN_FLIGHT, "no verified piece is fetched again"
        assert [sha256(path) for path in blobs(target)] == [sha256(large_file)]


def wait_half(witness: Node, target: Node) -> int:
    """Wait until a good part of `large` is there; the bytes that are verified."""

    def half() -> Any:
        transfer = transfer_of(witness, "large", target, "active")
        return transfer if transfer and transfer["progress"] > 30 else None

    transfer = wait_until("a part is there", half, 60, 0.01)
    return int(transfer["bytes_done"])


def complete(cluster: Cluster, node: Node) -> bool:
    asked = next(each for each in cluster.running if each is not node)
    return node.id in asked.get("/models/large")["model"]["replicas"]


def test_a_second_copy_comes_while_the_first_holder_is_down(
    three: Cluster, tiny_file: Path
) -> None:
    first, second, third = three.nodes
    with imported(three, first, tiny_file, "tiny"):
        copy_to(first, "tiny", second)
        three.wait_replicas("tiny", [first, second])
        first.kill()
        wait_until("it is offline", lambda: second.node(first)["status"] == "offline")
        copy_to(second, "tiny", third)
        three.wait_replicas("tiny", [first, second, third])


def test_a_copy_that_is_cancelled_stops(three: Cluster, large_file: Path) -> None:
    source, target, witness = three.nodes
    with imported(three, source, large_file, "large"):
        transfer_id = copy_to(witness, "large", target)
        wait_until("it moves", lambda: transfer_of(witness, "large", target, "active"), 30, 0.01)
        witness.post(f"/transfers/{transfer_id}/cancel")
        ended = wait_until(
            "it is over",
            lambda: (
                (t := witness.get(f"/transfers/{transfer_id}")["transfer"])["status"] != "active"
                and t
            ),
        )
        assert ended["status"] == "cancelled"
        time.sleep(1)
        assert witness.get("/models/large")["model"]["replicas"] == [source.id]
        details = refused(
            witness.request("POST", f"/transfers/{transfer_id}/cancel", json={}),
            409,
            "TRANSFER_ENDED",
        )
        assert details["status"] == "cancelled"


def test_a_model_that_is_deleted_while_it_is_copied_leaves_nothing(
    three: Cluster, large_file: Path
) -> None:
    source, target, witness = three.nodes
    with imported(three, source, large_file, "large"):
        copy_to(witness, "large", target)
        wait_until("it moves", lambda: transfer_of(witness, "large", target, "active"), 30, 0.01)
    wait_until(
        "it is over",
        lambda: transfer_of(witness, "large", target)["status"] in ("cancelled", "failed"),
    )


def test_a_deleted_model_is_gone_from_every_node_also_from_one_that_was_down(
    three: Cluster, tiny_file: Path
) -> None:
    first, second, third = three.nodes
    first.import_model(tiny_file, "tiny")
    copy_to(first, "tiny", second, third)
    three.wait_replicas("tiny", three.nodes)
    assert all(len(blobs(node)) == 1 for node in three.nodes)
    third.kill()
    first.delete("/models/tiny")
    wait_until("it is gone", lambda: not blobs(first) and not blobs(second))
    assert blobs(third)
    refused(second.request("GET", "/models/tiny"), 404, "MODEL_NOT_FOUND")
    third.start()
    wait_until("it is gone there too", lambda: not blobs(third))
    manifests = third.data_dir / "models" / "manifests"
    wait_until("and its name", lambda: not list(manifests.rglob("tiny/*")))
    refused(third.request("GET", "/models/tiny"), 404, "MODEL_NOT_FOUND")


def test_a_blob_that_two_models_use_stays_until_both_are_gone(
    three: Cluster, tiny_file: Path
) -> None:
    first = three.nodes[0]
    first.import_model(tiny_file, "one")
    with imported(three, first, tiny_file, "two"):
        first.delete("/models/one")
        time.sleep(1)
        assert [sha256(path) for path in blobs(first)] == [sha256(tiny_file)]


def test_a_copy_that_somebody_removed_from_the_disk_comes_back(
    three: Cluster, tiny_file: Path
) -> None:
    first, second, _ = three.nodes
    with imported(three, first, tiny_file, "tiny"):
        copy_to(first, "tiny", second)
        three.wait_replicas("tiny", [first, second])
        second.stop()
        for path in blobs(second):
            path.unlink()
        second.start()
        wait_until("it is fetched again", lambda: blobs(second))
        three.wait_replicas("tiny", [first, second])


def test_a_node_that_leaves_hands_over_what_only_it_has(three: Cluster, tiny_file: Path) -> None:
    leaving = three.grow()
    model = leaving.import_model(tiny_file, "tiny")
    assert model["replicas"] == [leaving.id]
    gone = leaving.id
    three.dismiss(leaving)
    [holder] = three.asked.get("/models/tiny")["model"]["replicas"]
    assert holder != gone
    [node] = [node for node in three.nodes if node.id == holder]
    assert [sha256(path) for path in blobs(node)] == [sha256(tiny_file)]
    three.asked.delete("/models/tiny")


# What cannot be brought in.


def upload(node: Node, data: bytes, digest: str = "") -> Any:
    digest = digest or "sha256:" + hashlib.sha256(data).hexdigest()
    return node.request("POST", f"/blobs/{digest}", content=data)


@pytest.mark.parametrize(
    "data",
    [
        b"this is no model",
        b"GGUF",
        gguf_bytes()[:2000],
        gguf_bytes()[:-100],
        gguf_bytes(pair_count=1 << 60),
        gguf_bytes(tensor_count=1 << 60),
        gguf_bytes(version=99),
        b"GGUF" + b"\xff" * 5000,
    ],
    ids=["text", "magic", "header cut", "data cut", "pairs", "tensors", "version", "noise"],
)
def test_a_file_that_is_no_model_is_refused(three: Cluster, data: bytes) -> None:
    node = three.nodes[0]
    assert upload(node, data).status_code in (200, 201)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    answer = node.request("POST", "/models", json={"name": "bad", "files": {"f": digest}})
    details = refused(answer, 400, "INVALID_MODEL_FILE")
    assert details["digest"] == digest
    refused(node.request("GET", "/models/bad"), 404, "MODEL_NOT_FOUND")
    (node.data_dir / "models/blobs" / digest.replace(":", "-")).unlink()


def test_bytes_that_do_not_have_their_digest_are_refused(three: Cluster) -> None:
    node = three.nodes[0]
    digest = "sha256:" + "0" * 64
    refused(upload(node, gguf_bytes(), digest), 400, "DIGEST_MISMATCH")
    assert node.request("HEAD", f"/blobs/{digest}").status_code == 404
    answer = node.request("POST", "/models", json={"name": "bad", "files": {"f": digest}})
    refused(answer, 400, "BLOB_NOT_FOUND")


def test_a_name_that_is_taken_is_refused(three: Cluster, tiny_file: Path, tmp_path: Path) -> None:
    node = three.nodes[0]
    other = write_gguf(tmp_path / "other.gguf", LLAMA | {"general.name": "Other"})
    with imported(three, node, tiny_file, "tiny"):
        digest = "sha256:" + sha256(other)
        upload(node, other.read_bytes())
        answer = node.request("POST", "/models", json={"name": "tiny", "files": {"f": digest}})
        refused(answer, 409, "MODEL_EXISTS")
        # The same file by the same name is no conflict.
        node.import_model(tiny_file, "tiny")
        [path] = [path for path in blobs(node) if sha256(path) == sha256(other)]
        path.unlink()


def test_an_upload_that_breaks_off_leaves_nothing(three: Cluster, large_file: Path) -> None:
    node = three.nodes[0]
    digest = "sha256:" + "1" * 64

    def part() -> Iterator[bytes]:
        yield b"x" * MB
        raise ConnectionError("the client dies")

    with pytest.raises(ConnectionError), node.client() as client:
        client.post(f"/blobs/{digest}", content=part())
    assert node.request("HEAD", f"/blobs/{digest}").status_code == 404
    wait_until("the part is gone", lambda: not [p for p in blobs(node) if p.stat().st_size == MB])


def test_many_uploads_of_the_same_file_at_once_are_one(three: Cluster, tiny_file: Path) -> None:
    node = three.nodes[0]
    names = [f"tiny{number}" for number in range(6)]
    threads = [threading.Thread(target=node.import_model, args=(tiny_file, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {model["name"] for model in node.get("/models")["models"]} >= {
        f"{n}:latest" for n in names
    }
    assert len(blobs(node)) == 1
    for name in names:
        node.delete(f"/models/{name}")
    wait_until("all is gone", lambda: not blobs(node))


def test_a_models_directory_of_ollama_can_be_used(cluster: Cluster, tmp_path: Path) -> None:
    """`OLLAMA_MODELS` is where the models go, in Ollama's own layout."""
    directory = tmp_path / "models"
    node = cluster.new_node({"OLLAMA_MODELS": str(directory)})
    node.start()
    node.import_model(write_gguf(tmp_path / "tiny.gguf"), "tiny")
    manifest = directory / "manifests/registry.ollama.ai/library/tiny/latest"
    assert manifest.is_file()
    digest = sha256(tmp_path / "tiny.gguf")
    assert (directory / "blobs" / f"sha256-{digest}").is_file()
    shown = run_daemon(tmp_path, "config", environment={"OLLAMA_MODELS": str(directory)}).stdout
    assert f"{directory}  OLLAMA_MODELS" in shown
