"""Where models are kept: losses, drains, leaves, joins, demand, and a leader that dies meanwhile.

One cluster of real daemons for all tests, with short times: a node is lost after a few seconds.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gguf_files import LLAMA, TENSORS, gguf_bytes, write_gguf
from tests.system import test_models
from tests.system.conftest import ENDLESS, MODEL, open_cluster
from tests.system.harness import Cluster, Node, refused, run_cli, wait_until
from tests.system.sockets import Listener

LOST_AFTER_S = 4.0
SETTINGS = {
    "OLLAMAD_DISTRIBUTION__LOST_AFTER": f"{LOST_AFTER_S}s",
    "OLLAMAD_DISTRIBUTION__HOT_LOAD": "0.2",
    "OLLAMAD_DISTRIBUTION__HOT_AFTER": "2s",
    "OLLAMAD_DISTRIBUTION__COOL_AFTER": "4s",
    "OLLAMAD_RATE_LIMITS__GENERAL": "0",
    "OLLAMAD_RATE_LIMITS__MODEL_OPS": "0",
    "OLLAMA_CONTEXT_LENGTH": "2048",
}
COPY_S = 90.0  # for what takes a second or two on a machine that does nothing else
STEADY_S = 3.0  # several rounds of the leader's loop


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; the first test brings the fourth."""
    for cluster in open_cluster(tmp_path_factory, **SETTINGS):
        cluster.found()
        cluster.grow(2)
        yield cluster


@pytest.fixture(autouse=True)
def all_run(four: Cluster) -> None:
    four.revive()
    for model in four.asked.get("/models")["models"]:
        four.asked.delete(f"/models/{model['name']}")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A GGUF file that no other test has."""
    return write_gguf(tmp_path / "tiny.gguf", LLAMA | {"general.name": str(tmp_path)})


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    """A file that takes some moments to copy."""
    tensors = TENSORS | {"blk.0.ffn_up.weight": ((1024, 15_000), 0)}
    small = gguf_bytes(tensors=TENSORS | {"blk.0.ffn_up.weight": ((1024, 1), 0)})
    path = tmp_path / "medium.gguf"
    with open(path, "wb") as file:
        file.write(gguf_bytes(LLAMA, tensors)[: len(small) - 4096])
        for row in range(15_000):
            file.write(row.to_bytes(4, "little") * 1024)
    return path


def holders(four: Cluster, model: str, asked: Node | None = None) -> set[str]:
    """The names of the nodes that hold a model."""
    names = {node.id: node.name for node in four.nodes}
    shown = (asked or four.asked).get(f"/models/{model}")["model"]
    return {names.get(node_id, node_id) for node_id in shown["replicas"]}


def comes_to(four: Cluster, model: str, count: int, asked: Node | None = None) -> list[Node]:
    """Wait until so many nodes hold a model, and no others should; who they are."""

    def rests() -> Any:
        shown = (asked or four.asked).get(f"/models/{model}")["model"]
        at_rest = sorted(shown["replicas"]) == sorted(shown["desired"])
        return shown["replicas"] if at_rest and len(shown["replicas"]) == count else None

    ids = wait_until(f"{model} is on {count} nodes", rests, COPY_S)
    return [node for node in four.nodes if node.id in ids]


def other_than(four: Cluster, *nodes: Node) -> Node:
    return next(node for node in four.running if node not in nodes)


def blobs(node: Node) -> set[Path]:
    """The models' files that are whole; half of one may stay, for the next who asks for it."""
    return {path for path in test_models.blobs(node) if not path.suffix}


def test_a_join_gets_no_copy_unless_one_is_wanted(four: Cluster, tiny: Path) -> None:
    first = four.nodes[0]
    first.import_model(tiny, "tiny")
    before = comes_to(four, "tiny", 2)
    with Listener(first, "nodes") as heard:
        fourth = four.grow()
        event = heard.wait("node_event", event_type="node_joined", node_id=fourth.id)
        assert event["data"]["name"] == fourth.name
    time.sleep(STEADY_S)
    assert comes_to(four, "tiny", 2) == before

    # Everybody knows why, also who does not lead.
    for node in four.nodes:
        shown = node.get("/models/tiny")["model"]
        assert (shown["replicas_wanted"], shown["placement"]["reason"]) == (2, "2 by default")
        states = {v["node_id"]: v["state"] for v in shown["placement"]["nodes"]}
        holds = {node.id for node in before}
        assert states == {n.id: "holds" if n.id in holds else "none" for n in four.nodes}
        assert all(v["score_s"] is not None for v in shown["placement"]["nodes"])
    listed = run_cli(fourth, "models", "list").stdout
    assert "2/2" in listed
    told = run_cli(fourth, "models", "show", "tiny").stdout
    assert "not needed (2 by default)" in told

    said = run_cli(fourth, "models", "replicas", "tiny", "4")
    assert said.returncode == 0, said.stderr
    assert "tiny:latest should have 4 copies" in said.stdout
    assert len(comes_to(four, "tiny", 4)) == 4
    assert run_cli(fourth, "models", "replicas", "tiny", "default").returncode == 0
    left = comes_to(four, "tiny", 2)
    wait_until("the others freed theirs", lambda: sum(bool(blobs(n)) for n in four.nodes) == 2)
    assert all(blobs(node) for node in left)


def test_what_a_lost_node_had_is_made_anew_after_the_grace_time(four: Cluster, tiny: Path) -> None:
    four.nodes[0].import_model(tiny, "tiny")
    lost, kept = comes_to(four, "tiny", 2)
    lost.kill()
    killed_at = time.monotonic()
    asked = other_than(four, lost)
    wait_until(
        "another one has it", lambda: len(holders(four, "tiny", asked) - {lost.name}) == 2, COPY_S
    )
    assert time.monotonic() - killed_at > LOST_AFTER_S - 1, "not before it is lost"
    lost.start()
    left = comes_to(four, "tiny", 2)
    assert kept in left
    assert lost not in left
    wait_until("it gave its copy up", lambda: not blobs(lost))


def test_a_leader_that_dies_while_copies_are_made_is_no_matter(four: Cluster, medium: Path) -> None:
    leader = four.leader()
    first = four.followers()[0]
    first.import_model(medium, "medium")
    first.request("PUT", "/models/medium/replicas", json={"replicas": 3})
    wait_until(
        "it decided",
        lambda: len(first.get("/models/medium")["model"]["desired"]) == 3,
        every_s=0.01,
    )
    leader.kill()
    assert len(holders(four, "medium", first)) < 3, "killed on the way"
    wait_until(
        "three others have it",
        lambda: len(holders(four, "medium", first) - {leader.name}) == 3,
        COPY_S,
    )
    leader.start()
    four.wait_whole()
    assert len(comes_to(four, "medium", 3)) == 3


def test_a_drain_moves_what_only_that_node_serves_and_outlives_restarts(
    four: Cluster, tiny: Path
) -> None:
    drained = four.followers()[0]
    asked = other_than(four, drained)
    asked.post("/distribution/auto-configure", {"enabled": False})
    drained.import_model(tiny, "tiny")
    drained.request("PUT", "/models/tiny/replicas", json={"replicas": 1})
    asked.post("/distribution/auto-configure", {"enabled": True})
    assert holders(four, "tiny", asked) == {drained.name}
    said = run_cli(asked, "nodes", "drain", drained.name, "--wait")
    assert (said.returncode, "is drained" in said.stderr) == (0, True), said.stderr
    assert len(holders(four, "tiny", asked)) == 2
    assert blobs(drained), "it keeps its own until it leaves"

    drained.restart()
    leader = four.leader()
    leader.kill()
    survivor = other_than(four, leader, drained)
    four.leader(timeout_s=30)
    assert survivor.node(drained)["draining"]
    leader.start()
    four.wait_whole()
    assert leader.node(drained)["drain"] == {"done": True, "answers": 0, "sole_models": []}
    survivor.post(f"/nodes/{drained.id}/undrain")
    assert drained not in comes_to(four, "tiny", 1)
    wait_until("it gave its copy up", lambda: not blobs(drained))


def test_what_is_deleted_and_made_anew_while_a_node_is_down(four: Cluster, tmp_path: Path) -> None:
    """The node that returns has one model to drop, and another one to replace."""
    old = write_gguf(tmp_path / "old.gguf", LLAMA | {"general.name": "old"})
    new = write_gguf(tmp_path / "new.gguf", LLAMA | {"general.name": "new"})
    extra = write_gguf(tmp_path / "extra.gguf", LLAMA | {"general.name": "extra"})
    first, *_, last = four.nodes
    for file, name in ((old, "same"), (extra, "gone")):
        first.import_model(file, name)
        first.request("PUT", f"/models/{name}/replicas", json={"replicas": 4})
    for name in ("same", "gone"):
        assert len(comes_to(four, name, 4)) == 4
    before = blobs(last)
    assert len(before) == 2
    last.kill()
    first.delete("/models/gone")
    first.delete("/models/same")
    first.import_model(new, "same")
    first.request("PUT", "/models/same/replicas", json={"replicas": 4})
    last.start()
    assert last in comes_to(four, "same", 4)
    wait_until("what it had is gone", lambda: not before & blobs(last))
    assert len(blobs(last)) == 1
    refused(last.request("GET", "/models/gone"), 404, "MODEL_NOT_FOUND")


def test_without_automatic_distribution_nothing_is_copied_unasked(
    four: Cluster, tiny: Path
) -> None:
    first = four.nodes[0]
    first.post("/distribution/auto-configure", {"enabled": False})
    try:
        first.import_model(tiny, "tiny")
        time.sleep(STEADY_S)
        assert comes_to(four, "tiny", 1) == [first]
        reason = first.get("/models/tiny")["model"]["placement"]["reason"]
        assert reason == "the first copy (automatic distribution is off)"
    finally:
        first.post("/distribution/auto-configure", {"enabled": True})
    assert len(comes_to(four, "tiny", 2)) == 2


def test_a_hot_model_spreads_and_shrinks_when_it_cools(four: Cluster, smollm2_path: Path) -> None:
    first = four.nodes[0]
    first.import_model(smollm2_path, MODEL)
    comes_to(four, MODEL, 2)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with first.stream("/generate", model=MODEL, **ENDLESS) as answer:
                for _ in answer:
                    if stop.is_set():
                        return

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        wait_until("it has more copies", lambda: len(holders(four, MODEL)) > 2, COPY_S)
        reason = first.get(f"/models/{MODEL}")["model"]["placement"]["reason"]
        assert "more: " in reason
        assert "requests at once" in reason
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert len(comes_to(four, MODEL, 2)) == 2


def test_a_leave_that_would_lose_a_model_says_so_and_can_be_forced(
    four: Cluster, tiny: Path
) -> None:
    """The last test: a node fewer afterwards."""
    leaving = four.nodes[-1]
    others = four.nodes[:-1]
    asked = others[0]
    for node in others:
        asked.post(f"/nodes/{node.id}/drain")
    leaving.import_model(tiny, "tiny")
    body = {"node_id": leaving.id}
    answer = asked.request("POST", "/cluster/leave", json=body, timeout_s=60)
    details = refused(answer, 409, "SOLE_REPLICA")
    assert details["models"] == ["tiny:latest"]
    assert "force" in answer.json()["error"]
    assert not asked.node(leaving)["draining"], "it goes on as before"
    for node in others:
        asked.post(f"/nodes/{node.id}/undrain")
    comes_to(four, "tiny", 2)

    with Listener(asked, "nodes") as heard:
        four.dismiss(leaving)
        heard.wait("node_event", event_type="node_left", node_id=leaving.id)
    assert len(comes_to(four, "tiny", 2)) == 2

    # Who is away can hand nothing over.
    lost = other_than(four, asked, four.leader())
    asked.post("/distribution/auto-configure", {"enabled": False})
    lost.import_model(write_gguf(tiny.with_name("b.gguf"), LLAMA | {"general.name": "b"}), "b")
    lost.kill()
    wait_until("it is offline", lambda: asked.node(lost)["status"] == "offline")
    body = {"node_id": lost.id}
    details = refused(asked.request("POST", "/cluster/leave", json=body), 409, "SOLE_REPLICA")
    assert details["models"] == ["b:latest"]
    asked.post("/cluster/leave", body | {"force": True}, timeout_s=60)
    assert lost.id not in {node["id"] for node in asked.get("/nodes")["nodes"]}
    four.nodes.remove(lost)
    assert lost.destroy() == []
    assert asked.get("/models/b")["model"]["status"] == "missing"
