"""The majority is lost: it is told, and `ollamad recover` is the way out, safely."""

import subprocess
import time
from pathlib import Path

from tests.fakes.gguf_files import LLAMA, write_gguf
from tests.system.harness import Cluster, Node, refused, run_daemon, wait_until

NOTICE_S = 10.0  # without a quorum, until the log tells what to do


def recover(node: Node, *options: str) -> subprocess.CompletedProcess[str]:
    return run_daemon(node.directory, "recover", "--data-dir", str(node.data_dir), *options)


def refused_recovery(node: Node) -> str:
    """The one line with which a recovery ends that must not be."""
    ended = recover(node, "--yes")
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    assert list(node.data_dir.glob("raft.db.before-recovery-*")) == []
    lines = ended.stderr.splitlines()
    assert lines[-1].startswith("ollamad: "), ended.stderr
    return lines[-1]


def replicas(node: Node) -> list[str]:
    return sorted(node.get("/models/tiny")["model"]["replicas"])


def ends_because_left_behind(node: Node) -> None:
    assert node.wait_end() == 0
    assert "was recovered without this node on 20" in node.log()
    assert list(node.data_dir.glob("left-*/raft.db"))


def test_a_survivor_goes_on_and_the_others_come_back_as_new(
    cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.found()
    cluster.grow(2)
    survivor, two, three = cluster.nodes
    assert survivor is first
    ids = {node: node.id for node in cluster.nodes}
    before = survivor.get("/cluster/status")
    survivor.import_model(write_gguf(tmp_path / "tiny.gguf", LLAMA), "tiny")
    wait_until("it has two replicas", lambda: len(replicas(survivor)) == 2)
    holders = replicas(survivor)
    survivor.post(f"/nodes/{two.id}/drain")
    wait_until("all know it", lambda: all(n.node(two)["draining"] for n in cluster.nodes))

    # While a majority is there, or could be, nobody may recover.
    three.kill()
    assert "in use by another ollamad" in refused_recovery(two)
    assert "is in touch with a quorum (leader node-" in refused_recovery(three)
    two.kill()
    survivor.stop()
    survivor.start()
    said = refused_recovery(three)
    assert "node-1 (" in said
    assert "2 of 3 voters, a majority; start this node instead" in said

    # What is lost is told, and by whom.
    wait_until(
        "the log tells what to do",
        lambda: "no quorum for 1" in survivor.log(),
        NOTICE_S + 20,
    )
    [line] = [line for line in survivor.log().splitlines() if "no quorum for 1" in line]
    assert "node-2" in line
    assert "node-3" in line
    assert "ollamad recover" in line
    health = survivor.request("GET", "/health")
    assert health.status_code == 503
    assert "node-2, node-3" in health.json()["reason"]
    assert "recover" in health.json()["reason"]
    refused(survivor.request("POST", f"/nodes/{ids[two]}/undrain"), 503, "NO_QUORUM")

    survivor.stop()
    without_terminal = recover(survivor)
    assert without_terminal.returncode == 2
    assert "--yes" in without_terminal.stderr
    ended = recover(survivor, "--yes")
    assert ended.returncode == 0, ended.stderr
    assert "connection refused" in ended.stderr
    assert "only voter now" in ended.stdout
    assert "only voter already" in recover(survivor, "--yes").stderr

    survivor.start()
    after = survivor.get("/cluster/status")
    assert after["voters"] == [ids[survivor]]
    assert (after["cluster_id"], after["cluster_size"]) == (before["cluster_id"], 3)
    assert survivor.node(two)["draining"]
    survivor.post(f"/nodes/{ids[two]}/undrain")

    # The old majority returns, both at once, with all that it knows.
    for node in (two, three):
        node.launch()
    for node in (two, three):
        ends_because_left_behind(node)
    status = survivor.get("/cluster/status")
    assert (status["is_leader"], status["voters"]) == (True, [ids[survivor]])
    assert status["term"] == after["term"], "it has heard nothing of them"

    token = cluster.join_token()
    for node in (two, three):
        node.start("--join", f"{token}@{survivor.p2p}")
    cluster.wait_whole()
    # Under other ids, but each in its own place.
    new = {ids[node]: node.id for node in cluster.nodes}
    assert [old == node_id for old, node_id in new.items()] == [True, False, False]
    holders = sorted(new[holder] for holder in holders)
    assert all(not node.node(two)["draining"] for node in cluster.nodes)
    assert survivor.get("/cluster/status")["cluster_size"] == 3
    wait_until("the models are where they were", lambda: replicas(survivor) == holders)
    assert all(list(n.data_dir.glob("models/blobs/*")) for n in cluster.nodes if n.id in holders)
    # And it is a cluster as any other, which survives a loss.
    cluster.leader().kill()
    cluster.asked.post(f"/nodes/{two.id}/drain", timeout_s=30)


def test_an_old_majority_that_met_without_the_survivor_stops_when_it_meets_it(
    cluster: Cluster,
) -> None:
    cluster.found()
    cluster.grow(2)
    survivor, two, three = cluster.nodes
    ids = {node: node.id for node in cluster.nodes}
    survivor.stop()
    for node in (two, three):
        node.stop()
    assert recover(survivor, "--yes").returncode == 0
    # A recovery by mistake: the others were not lost, and go on without the survivor.
    for node in (two, three):
        node.start()
    wait_until("they have a quorum", lambda: two.get("/cluster/status")["has_quorum"])
    two.post(f"/nodes/{ids[three]}/drain")

    survivor.start()
    for node in (two, three):
        ends_because_left_behind(node)
    assert survivor.get("/cluster/status")["voters"] == [ids[survivor]]
    assert not survivor.node(three)["draining"], "nothing of what they agreed on came over"
    time.sleep(1)
    assert survivor.get("/cluster/status")["has_quorum"]

    # What they agreed on is not lost: if the recovery was the mistake, it can be put back.
    survivor.stop()
    assert "not the data directory of a node" in recover(two, "--yes").stderr
    for node in (two, three):
        [aside] = node.data_dir.glob("left-*")
        for path in list(aside.iterdir()):
            path.rename(node.data_dir / path.name)
        node.start()
    wait_until("they have a quorum", lambda: two.get("/cluster/status")["has_quorum"])
    assert two.id == ids[two]
    assert two.node(three)["draining"]
