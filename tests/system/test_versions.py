"""Nodes of different versions: neighbours work together, others are refused without any harm."""

import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ollamad import __version__
from ollamad.core.commands import LEVEL
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, refused, run_daemon, wait_until
from tests.system.releases import other_version, previous_release, switch

NEXT = {"version": "8.0.0", "protocol": 2, "oldest": 1}
TOO_NEW = {"version": "9.0.0", "protocol": 4, "oldest": 3}
NUMBERS = f"(protocol 3 to 4), this one {__version__} (1 to 1)"
THEIRS = f"{__version__} (protocol 1 to 1), this one 9.0.0 (3 to 4)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of the present version and one of the next."""
    for cluster in open_cluster(tmp_path_factory):
        cluster.found()
        cluster.grow()
        join(cluster, cluster.new_node(other_version(**NEXT)))
        yield cluster


def add_user(node: Node, name: str) -> object:
    body = {"username": name, "password": "correct horse battery", "role": "viewer"}
    return node.request("POST", "/users", json=body)


def join(cluster: Cluster, node: Node) -> Node:
    node.start("--join", f"{cluster.join_token()}@{cluster.nodes[0].p2p}")
    cluster.wait_whole()
    return node


def version_of(asked: Node, node: Node) -> str:
    return str(asked.node(node)["version"])


def test_a_node_of_the_next_protocol_is_a_member_as_any_other(cluster: Cluster) -> None:
    first, _, third = cluster.nodes
    assert version_of(first, third) == "8.0.0"
    # It takes its part in both directions: forwards and is forwarded to, follows and leads.
    third.post("/users", {"username": "a", "password": "correct horse battery", "role": "viewer"})
    leader = cluster.leader()
    for _ in range(3):
        if leader is third:
            break
        leader.restart()
        cluster.wait_whole()
        leader = cluster.leader()
    first.post("/users", {"username": "b", "password": "correct horse battery", "role": "viewer"})
    cluster.settled()


def test_a_change_that_older_nodes_do_not_know_waits_for_their_upgrade(cluster: Cluster) -> None:
    first, second, third = cluster.nodes
    newer = other_version(**NEXT, level=LEVEL + 1)
    switch(third.environment, newer)
    third.restart()
    cluster.wait_whole()
    # To the newer node this is a command of a new level; the others say up to which they go.
    wait_until(
        "the levels are known",
        lambda: third.request("POST", "/users", json=user("early")).status_code == 409,
    )
    details = refused(third.request("POST", "/users", json=user("early")), 409, "UPGRADE_FIRST")
    assert sorted(details["nodes"]) == [first.name, second.name]
    third.post(f"/nodes/{first.id}/drain")  # what all know is done, through the newer one too
    third.post(f"/nodes/{first.id}/undrain")
    cluster.settled()
    for node in (first, second):
        switch(node.environment, newer)
        node.restart()
        cluster.wait_whole()
    wait_until(
        "it is done once all know it",
        lambda: third.request("POST", "/users", json=user("late")).status_code == 201,
    )
    state = cluster.settled()

    # One that was away and comes back too old stops at that change, and its state is as it was.
    journal = first.data_dir / "raft.db"
    first.stop()
    switch(first.environment, {})
    first.launch()
    assert first.wait_end() == 1
    last = first.tail(1)
    wanted = f"commands of level {LEVEL + 1}, this version knows them up to level {LEVEL}; install"
    assert wanted in last, last
    assert journal.is_file()
    switch(first.environment, newer)
    first.start()
    cluster.wait_whole()
    assert cluster.settled() == state
    for node in cluster.nodes:
        switch(node.environment, {})


def user(name: str) -> dict[str, str]:
    return {"username": name, "password": "correct horse battery", "role": "viewer"}


def test_a_version_that_is_too_new_is_shut_out_and_told_on_both_sides(
    cluster_of_three: Cluster,
) -> None:
    cluster = cluster_of_three
    first, second, third = cluster.nodes
    before = {node: len(node.log()) for node in cluster.nodes}
    switch(third.environment, other_version(**TOO_NEW))
    third.stop()
    third.start()

    def lines(node: Node, text: str) -> list[str]:
        return [line for line in node.log()[before[node] :].splitlines() if text in line]

    wait_until("all three say why", lambda: lines(first, NUMBERS) and lines(second, NUMBERS))
    wait_until("the new one too", lambda: len(lines(third, THEIRS)) >= 2)
    # The others go on; the new one waits, neither ends nor votes, and does not repeat itself.
    terms = {node: node.get("/cluster/status")["term"] for node in (first, second)}
    time.sleep(4)
    assert all(node.running for node in cluster.nodes)
    assert {n: n.get("/cluster/status")["term"] for n in (first, second)} == terms
    assert not third.get("/cluster/status")["has_quorum"]
    first.post("/users", user("without"))
    assert all(len(lines(node, "is shut out")) == 1 for node in (first, second))
    assert len(lines(third, "is shut out")) == 2
    # As soon as its version fits, it catches up.
    switch(third.environment, {})
    third.restart()
    cluster.wait_whole()
    assert "without" in {each["username"] for each in third.get("/users")["users"]}
    cluster.settled()

    # One that wants to join is told as well, and ends.
    newcomer = cluster.new_node(other_version(**TOO_NEW))
    newcomer.launch("--join", f"{cluster.join_token()}@{first.p2p}")
    assert newcomer.wait_end() == 1
    assert "runs 9.0.0 (protocol 3 to 4), this cluster speaks protocol 1 to 1" in newcomer.tail(1)
    assert "refused 127.0.0.1 (" in first.tail(5)
    cluster.nodes.remove(newcomer)
    assert newcomer.destroy() == []


@pytest.fixture
def cluster_of_three(trio_of_nodes: Cluster) -> Cluster:
    return trio_of_nodes


def test_the_previous_release_lets_the_present_one_in_and_is_let_in(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    old = previous_release(tmp_path_factory.mktemp("old"))
    for cluster in open_cluster(tmp_path_factory):
        first = cluster.new_node(old).start()
        join(cluster, cluster.new_node())
        cluster.nodes.reverse()  # the next one asks the present version
        join(cluster, cluster.new_node(old))
        assert first.get("/cluster/status")["cluster_size"] == 3
        cluster.settled()


# Downgrades.


def test_a_downgrade_that_cannot_work_is_refused_and_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The state of a version whose format is newer, with a snapshot in the journal."""
    for cluster in open_cluster(tmp_path_factory):
        first = cluster.found()
        # A joiner takes the whole state over as a snapshot, of the newer format here.
        switch(first.environment, other_version(state=2))
        first.restart()
        file = cluster.directory / "b"
        assert (
            run_daemon(
                first.directory,
                "backup",
                str(file),
                "--data-dir",
                str(first.data_dir),
                environment={"API_LISTEN": first.address} | first.environment,
            ).returncode
            == 0
        )
        first.stop()
        later = cluster.new_node(other_version(state=2))
        arguments = ("restore", str(file), "--data-dir", str(later.data_dir))
        refusal = run_daemon(later.directory, *arguments)
        assert refusal.returncode == 1
        assert "the state has format 2; this version reads up to format 1" in refusal.stderr
        assert not later.data_dir.exists()
        assert (
            run_daemon(later.directory, *arguments, environment=later.environment).returncode == 0
        )
        later.start().stop()

        before = content(later)
        old = previous_release(tmp_path_factory.mktemp("old"))
        for version in ({}, {}, old):
            switch(later.environment, version)
            later.launch()
            assert later.wait_end() == 1
            assert "the state has format 2; this version reads up to format 1" in later.tail(1)
            assert "start the newer version that wrote it" in later.tail(1)
            assert content(later) == before
        switch(later.environment, other_version(state=2))
        later.start()


def content(node: Node) -> dict[str, bytes]:
    """The files of a node's state; of the journal what SQLite finds in it and in its log."""
    files = {
        path.name: path.read_bytes()
        for path in sorted(node.data_dir.rglob("*"))
        if path.is_file() and path.name != "lock"
    }
    with tempfile.TemporaryDirectory() as directory:
        for name in {"raft.db", "raft.db-wal", "raft.db-shm"} & set(files):
            (Path(directory) / name).write_bytes(files.pop(name))
        with closing(sqlite3.connect(Path(directory) / "raft.db")) as journal:
            assert journal.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,)
            files["raft.db"] = "\n".join(journal.iterdump()).encode()
    return files
