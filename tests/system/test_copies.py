"""Copies of models beside other things: answers of the same node, and a log that was compacted."""

import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ollamad.core.pieces import MIB
from tests.fakes.gguf_files import LLAMA, TENSORS, gguf_bytes, write_gguf
from tests.fakes.tiny_llama import random_llama
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, refused, wait_until

MB = 1_000_000
SLOW = 3 * MB  # bytes/s while a model answers
CARGO_BYTES = 15 * MB
GIVEN = 2 * MB  # what a limit may let through at once

# Before the daemon is imported: a log that is compacted after a few entries, to almost nothing.
HASTY = """
import sys
if "start" in sys.orig_argv:
    import ollamad.raft.journal, ollamad.raft.node
    ollamad.raft.node.COMPACT_ENTRIES = 32
    ollamad.raft.journal.COMPACTION_TAIL = 2
"""

# A round of the scrub comes soon after the one before.
WARY = """
import sys
if "start" in sys.orig_argv:
    import ollamad.scrubbing
    ollamad.scrubbing.ROUND_S = 0.2
"""


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {
        "OLLAMAD_MODELS__REPLICAS": "1",
        "OLLAMAD_TRANSFER__WHILE_GENERATING": f"{SLOW // MB}MB",
    }
    for cluster in open_cluster(tmp_path_factory, **settings):
        cluster.found()
        cluster.grow()
        yield cluster


def cargo(path: Path, seed: int) -> Path:
    """A file that no engine has to read."""
    rows = CARGO_BYTES // 4096
    tensors = TENSORS | {"blk.0.ffn_up.weight": ((1024, rows), 0)}
    path.write_bytes(gguf_bytes(tensors=tensors, fill=random.Random(seed).randbytes(1 << 20)))
    return path


def seconds_of_copy(source: Node, target: Node, model: str) -> float:
    begun = time.monotonic()
    body = {"nodes": [target.id]}
    transfer_id = source.post(f"/models/{model}/download", body)["transfer_id"]

    def over() -> bool:
        transfer = source.get(f"/transfers/{transfer_id}")["transfer"]
        assert transfer["status"] in ("pending", "active", "completed"), transfer
        return bool(transfer["status"] == "completed")

    wait_until("the copy is there", over, 60, 0.05)
    return time.monotonic() - begun


@pytest.mark.parametrize("busy", ["source", "target"])
def test_a_copy_goes_slowly_while_a_model_answers_on_either_node(
    two: Cluster, tmp_path: Path, busy: str
) -> None:
    source, target = two.nodes
    talker = source if busy == "source" else target
    talker.import_model(random_llama().write(tmp_path / "talker.gguf"), "talker")
    for number, name in enumerate(("slow", "quick")):
        source.import_model(cargo(tmp_path / f"{name}.gguf", number), name)
    fair_s = (CARGO_BYTES - GIVEN) / SLOW
    options = {"num_predict": 1_000_000}
    with talker.stream("/generate", model="talker", prompt="a", options=options) as answer:
        answer.next()
        # Who does not read on keeps the model busy.
        wait_until("it answers", lambda: any(one["busy"] for one in talker.loaded()))
        time.sleep(0.5)  # it is looked at now and then
        slow_s = seconds_of_copy(source, target, "slow")
        assert any(one["busy"] for one in talker.loaded()), "it answered all the time"
    wait_until("it ended", lambda: not any(one["busy"] for one in talker.loaded()))
    time.sleep(0.5)
    quick_s = seconds_of_copy(source, target, "quick")
    print(f"{slow_s:.1f} s beside an answer, {quick_s:.1f} s alone")
    assert slow_s >= fair_s
    assert quick_s < fair_s


def test_a_holder_without_a_piece_map_makes_it_and_serves(two: Cluster, tmp_path: Path) -> None:
    source, target = two.nodes
    source.import_model(cargo(tmp_path / "cargo.gguf", 2), "cargo")
    [kept] = (source.data_dir / "models" / "blobs").glob("*.pieces")
    piece_map = kept.read_bytes()
    kept.unlink()
    seconds_of_copy(source, target, "cargo")
    assert kept.read_bytes() == piece_map


@pytest.fixture
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes whose logs are short."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(HASTY)
    for cluster in open_cluster(tmp_path_factory, PYTHONPATH=str(modules)):
        cluster.found()
        cluster.grow(2)
        yield cluster


def test_a_node_learns_from_a_snapshot_what_was_deleted_while_it_was_down(
    hasty: Cluster, tmp_path: Path
) -> None:
    first, second, last = hasty.nodes
    for name in ("gone", "kept"):
        file = write_gguf(tmp_path / f"{name}.gguf", LLAMA | {"general.name": name})
        first.import_model(file, name)
        first.request("PUT", f"/models/{name}/replicas", json={"replicas": 3})
        hasty.wait_replicas(name, hasty.nodes)
    held = weights(last)
    assert len(held) == 2
    last.kill()
    _, known = log_of(last, tmp_path / "log")
    first.delete("/models/gone")
    for _ in range(80):
        first.post("/cluster/token", {"ttl_seconds": 60})
    for node in (first, second):
        # What the one that is down would need next is in no log any more.
        wait_until("a log is compacted", lambda: log_of(node, tmp_path / "log")[0] > known + 1)  # noqa: B023
    last.start()
    wait_until("it is gone there too", lambda: len(weights(last)) == 1)
    assert weights(last) < held
    refused(last.request("GET", "/models/gone"), 404, "MODEL_NOT_FOUND")
    assert last.get("/models/kept")["model"]["name"] == "kept:latest"


@pytest.fixture
def wary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that read their files all the time."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(WARY)
    settings = {"OLLAMAD_MODELS__SCRUB_INTERVAL": "1s", "OLLAMAD_MODELS__SCRUB_RATE": "1000"}
    for cluster in open_cluster(tmp_path_factory, PYTHONPATH=str(modules), **settings):
        cluster.found()
        cluster.grow()
        yield cluster


def test_a_bit_that_flips_on_a_disk_costs_one_piece_which_a_peer_replaces(
    wary: Cluster, tmp_path: Path
) -> None:
    first, second = wary.nodes
    first.import_model(cargo(tmp_path / "cargo.gguf", 1), "cargo")
    wary.wait_replicas("cargo", wary.nodes)
    [name] = weights(second)
    file = second.data_dir / "models" / "blobs" / name
    content = file.read_bytes()
    with file.open("r+b", buffering=0) as broken:
        broken.seek(5 * MIB)
        broken.write(bytes([content[5 * MIB] ^ 1]))
    found = f"is rotten on this disk: {MIB} of {len(content)} bytes are to come again"
    wait_until("it is found", lambda: found in second.log())
    wait_until("it is whole again", lambda: file.exists() and file.read_bytes() == content)
    wary.wait_replicas("cargo", wary.nodes)
    assert "is rotten" not in first.log()


def weights(node: Node) -> set[str]:
    directory = node.data_dir / "models" / "blobs"
    return {path.name for path in directory.glob("*") if path.stat().st_size > 20_000}


def log_of(node: Node, scratch: Path) -> tuple[int, int]:
    """The first and the last index in a node's log on its disk, which the node has locked."""
    scratch.mkdir(exist_ok=True)
    for file in node.data_dir.glob("raft.db*"):
        shutil.copy(file, scratch / file.name)
    with closing(sqlite3.connect(scratch / "raft.db")) as disk:
        first, last = disk.execute("SELECT min(idx), max(idx) FROM entries").fetchone()
        return int(first), int(last)
