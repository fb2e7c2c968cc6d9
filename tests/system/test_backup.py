"""Backup and restore with real daemons: of a whole cluster, beside the old one, and of a node."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from tests.fakes.gguf_files import LLAMA, write_gguf
from tests.system.harness import Cluster, Node, ok, run_daemon, wait_until

USER = {"username": "eve", "password": "correct horse battery", "role": "operator"}


def run(node: Node, *arguments: str) -> str:
    """Run `ollamad` with a node's settings to its end, which must be a success."""
    ended = attempt(node, *arguments)
    assert ended.returncode == 0, ended.stderr
    return str(ended.stdout)


def attempt(node: Node, *arguments: str) -> Any:
    command, *rest = arguments
    return run_daemon(
        node.directory,
        command,
        "--data-dir",
        str(node.data_dir),
        *rest,
        environment={"API_LISTEN": node.address, "NODE_ID": node.name},
    )


def replicas(node: Node) -> list[str]:
    return sorted(node.get("/models/tiny")["model"]["replicas"])


def sign_in(node: Node) -> Any:
    body = {"username": USER["username"], "password": USER["password"]}
    return node.request("POST", "/auth/login", json=body, token="")


def test_a_cluster_is_made_again_beside_the_old_one_and_then_in_its_place(
    cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.found()
    cluster.grow(2)
    old = list(cluster.nodes)
    first.import_model(write_gguf(tmp_path / "tiny.gguf", LLAMA), "tiny")
    first.post("/users", USER)
    key = first.post("/keys", {"name": "agent", "role": "inference"})["key"]
    wait_until("it has two replicas", lambda: len(replicas(first)) == 2)
    holder = next(node for node in old if node.id in replicas(first))
    ids = {node.name: node.id for node in old}
    drains = next(node for node in old if node is not holder)
    first.post(f"/nodes/{drains.id}/drain")
    before = first.get("/cluster/status")

    # A follower's answer is what the majority confirms, and nothing less.
    file = tmp_path / "cluster.backup"
    said = run(holder, "backup", str(file), "--models")
    assert "as a majority of the voters confirmed it: 3 members, 2 users, 1 models (1 with" in said
    assert file.stat().st_mode & 0o777 == 0o600
    assert "local at 127.0.0.1 took the state with its keys" in holder.log()
    refusal = attempt(holder, "backup", str(file))
    assert (refusal.returncode, "is there already" in refusal.stderr) == (1, True)

    # It is tried out on another host while the old cluster runs: neither disturbs the other.
    fresh = cluster.new_node()
    fresh.name = holder.name
    assert f"a new cluster of one node, {holder.name}" in run(fresh, "restore", str(file))
    assert "belongs to a node already" in attempt(fresh, "restore", str(file)).stderr
    fresh.start()
    assert fresh.get("/cluster/status")["cluster_id"] != before["cluster_id"]
    assert fresh.get("/cluster/status")["voters"] == [fresh.id]
    assert ok(sign_in(fresh))["user"]["role"] == "operator"
    assert fresh.request("GET", "/models", token=key).status_code == 200
    wait_until("the model is here", lambda: fresh.id in replicas(fresh))
    first.post("/cluster/token")
    after = first.get("/cluster/status")
    assert (after["voters"], after["leader"], after["term"]) == (
        before["voters"],
        before["leader"],
        before["term"],
    )
    assert all(node.running for node in old)
    assert fresh.get("/cluster/status")["has_quorum"]

    # Nothing without a quorum, unless that is good enough.
    others = [node for node in old if node is not holder]
    for node in others:
        node.kill()
    wait_until("there is no quorum", lambda: not holder.get("/cluster/status")["has_quorum"])
    refusal = attempt(holder, "backup", str(tmp_path / "stale"))
    assert refusal.returncode == 1
    assert "--stale takes what this node knows" in refusal.stderr
    assert not (tmp_path / "stale").exists()
    assert "as this node knew it" in run(holder, "backup", str(tmp_path / "stale"), "--stale")
    holder.stop()
    assert "journal" in run(holder, "backup", str(tmp_path / "journal"))

    # The others come in with their models, and take their places.
    token = str(fresh.post("/cluster/token", {"ttl_seconds": 600})["token"])
    for node in others:
        assert (
            "belongs to a node of another cluster"
            in attempt(node, "start", "--join", f"{token}@{fresh.p2p}").stderr
        )
        assert "left-" in run(node, "forget", "--yes")
        node.start("--join", f"{token}@{fresh.p2p}")
    cluster.nodes.remove(holder)
    assert holder.destroy() == []
    assert all(node.id != ids[node.name] for node in others), "each has a new key"
    drained = {n["name"]: n["draining"] for n in fresh.get("/nodes")["nodes"]}
    assert drained == {name: name == drains.name for name in ids}
    fresh.post(f"/nodes/{drains.name}/undrain")  # who drains does not become a voter
    cluster.wait_whole()
    assert fresh.get("/cluster/status")["cluster_size"] == 3
    wait_until("the model has its copies", lambda: len(replicas(fresh)) == 2)
    cluster.settled()


def test_a_node_that_lost_its_disk_comes_back_with_its_settings_and_models(
    cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.found()
    second = cluster.grow()
    first.import_model(write_gguf(tmp_path / "tiny.gguf", LLAMA), "tiny")
    wait_until("it has two replicas", lambda: len(replicas(first)) == 2)
    settings = second.data_dir / "config"
    settings.mkdir()
    (settings / "config.yaml").write_text("drain: {timeout: 7s}\n")
    file = tmp_path / "node.backup"
    run(second, "backup", str(file), "--models")
    with tarfile.open(file) as tar:
        opened = tar.extractfile("manifest.json")
        assert opened is not None
        manifest = json.load(opened)
    assert [model["included"] for model in manifest["models"]] == [True]

    old_id = second.id
    second.stop()
    shutil.rmtree(second.data_dir)
    wait_until("it is gone", lambda: not first.get("/cluster/status")["has_quorum"])
    # Two need both: the survivor alone can neither take it out nor let it in.
    first.stop()
    assert (
        run_daemon(
            first.directory, "recover", "--data-dir", str(first.data_dir), "--yes"
        ).returncode
        == 0
    )
    first.start()
    said = run(second, "restore", str(file), "--node")
    assert "Start it with `ollamad start --join" in said
    assert (settings / "config.yaml").read_text() == "drain: {timeout: 7s}\n"
    inode = next((second.data_dir / "models" / "blobs").glob("sha256-*")).stat().st_ino
    token = cluster.join_token()
    second.start("--join", f"{token}@{first.p2p}")
    cluster.wait_whole()
    assert second.id != old_id
    wait_until("it holds the model again", lambda: second.id in replicas(first))
    blob = next((second.data_dir / "models" / "blobs").glob("sha256-*"))
    assert blob.stat().st_ino == inode, "it was not copied again"
