"""How nodes come into a cluster and leave it."""

import dataclasses
import datetime
import signal
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ollamad.peers.identity import self_signed
from ollamad.wire.join import format_token, parse_token
from tests.system.harness import Cluster, Node, free_ports, refused, wait_until


@pytest.fixture(scope="module")
def pair(single: Cluster) -> Cluster:
    """The first node, and what tests add to it and take away again."""
    return single


def start_and_fail(node: Node, *arguments: str) -> str:
    """The one line with which a start ends."""
    node.launch(*arguments)
    assert node.wait_end(60) == 1
    log = node.log()
    assert "Traceback" not in log
    errors = [line for line in log.splitlines() if line.startswith("ollamad: ")]
    assert errors[-1:] == log.splitlines()[-1:], log
    return errors[-1]


def test_a_node_joins_by_token_and_address(cluster: Cluster) -> None:
    first = cluster.found()
    made = first.post("/cluster/token", {"ttl_seconds": 600})
    second = cluster.new_node()
    # Exactly what the token's maker was told to type.
    command = made["command"].split()
    assert command[:3] == ["ollamad", "start", "--join"]
    second.start("--join", command[3])
    cluster.wait_whole()

    for node in cluster.nodes:
        status = node.get("/cluster/status")
        assert (status["cluster_size"], status["peers"]) == (2, 1)
        nodes = node.get("/nodes")["nodes"]
        assert [(n["name"], n["status"]) for n in nodes] == [
            ("node-1", "online"),
            ("node-2", "online"),
        ]
        assert {n["address"] for n in nodes} == {n.address for n in cluster.nodes}

    # What was told once need not be told again.
    second.restart()
    cluster.wait_whole()
    second.stop()
    second.start("--join", command[3])
    cluster.wait_whole()
    assert second.get("/cluster/status")["cluster_size"] == 2


def test_a_waiting_node_is_taken_in(cluster: Cluster) -> None:
    first = cluster.found()
    second = cluster.new_node()
    second.launch("--join", cluster.join_token())
    node_id = waiting_id(second)

    wrong = first.request(
        "POST", "/cluster/join", json={"node_id": node_id, "address": first.address}
    )
    refused(wrong, 400, "WRONG_NODE")
    answer = first.post("/cluster/join", {"node_id": node_id, "address": second.address})
    assert answer["node_id"] == node_id
    cluster.wait_whole()
    assert second.id == node_id
    again = {"node_id": node_id, "address": second.address}
    refused(first.request("POST", "/cluster/join", json=again), 409, "ALREADY_MEMBER")


def waiting_id(node: Node) -> str:
    """The id of a node that waits, from the line that it tells its user to type."""

    def told() -> str | None:
        lines = [line for line in node.log().splitlines() if "ollama-dist cluster join" in line]
        return lines[0].split()[3] if lines else None

    return wait_until("it tells what to type", told)


def test_a_waiting_node_lets_nobody_else_answer(pair: Cluster, cluster: Cluster) -> None:
    """The cluster that dials must know the token; another cluster's member does not."""
    other = cluster.found()
    waiting = pair.new_node()
    waiting.launch("--join", pair.join_token())
    try:
        node_id = waiting_id(waiting)
        body = {"node_id": node_id, "address": waiting.address}
        answer = other.request("POST", "/cluster/join", json=body)
        assert answer.status_code in (400, 503), answer.text
        assert other.get("/cluster/status")["cluster_size"] == 1
        # The right one still can.
        pair.nodes[0].post("/cluster/join", body)
        wait_until("it is in", lambda: waiting.get("/cluster/status")["cluster_size"] == 2)
        pair.dismiss(waiting)
    finally:
        waiting.destroy()


def test_a_waiting_node_can_be_stopped(cluster: Cluster, single: Cluster) -> None:
    node = cluster.new_node()
    node.launch("--join", single.join_token())
    waiting_id(node)
    node.wait_ready()
    wait_until(
        "the wait is told",
        lambda: "STATUS=waiting to be let into a cluster" in node.notifications(),
    )
    node.signal(signal.SIGHUP)
    wait_until("the reload is over", lambda: node.notifications().count("READY=1") == 2)
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda token: "hello", "token starts with"),
        (lambda token: token[:-3], "damaged"),
        (lambda token: token[:20] + ("a" if token[20] != "a" else "b") + token[21:], "damaged"),
    ],
)
def test_a_damaged_token_is_told(
    cluster: Cluster, single: Cluster, damage: object, words: str
) -> None:
    assert callable(damage)
    token = damage(single.join_token())
    line = start_and_fail(cluster.new_node(), "--join", f"{token}@{single.nodes[0].p2p}")
    assert words in line


def test_an_expired_token_is_told(cluster: Cluster, single: Cluster) -> None:
    token = dataclasses.replace(parse_token(single.join_token()), expires_at=int(time.time()) - 1)
    node = cluster.new_node()
    line = start_and_fail(node, "--join", f"{format_token(token)}@{single.nodes[0].p2p}")
    assert "expired" in line
    assert "ollama-dist cluster token" in line


def test_a_clock_that_breaks_certificates_is_told(cluster: Cluster) -> None:
    node = cluster.found()
    node.stop()
    key = Ed25519PrivateKey.generate()
    future = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
    certificate = node.data_dir / "identity" / "node.crt"
    good = certificate.read_bytes()
    certificate.write_bytes(self_signed(key, future))
    line = start_and_fail(node)
    assert "clock" in line
    begins = future - datetime.timedelta(hours=1)
    assert f"{begins:%Y-%m-%d}" in line
    certificate.write_bytes(good)
    node.start()


def test_a_token_of_another_cluster_is_told(cluster: Cluster, single: Cluster) -> None:
    cluster.found()
    token = cluster.join_token()
    line = start_and_fail(cluster.new_node(), "--join", f"{token}@{single.nodes[0].p2p}")
    assert "cannot join through" in line
    assert "token" in line
    assert single.nodes[0].get("/cluster/status")["cluster_size"] == 1


def test_an_address_where_nobody_listens_is_told(cluster: Cluster, single: Cluster) -> None:
    [nowhere] = free_ports(1)
    line = start_and_fail(
        cluster.new_node(), "--join", f"{single.join_token()}@127.0.0.1:{nowhere}"
    )
    assert f"127.0.0.1:{nowhere}" in line
    assert "refused" in line


def test_a_cluster_of_one_gives_way_to_a_larger_one(cluster: Cluster, single: Cluster) -> None:
    """An installed service has started and founded one before anybody could type `--join`."""
    node = cluster.new_node({"NODE_ID": "newcomer"})
    node.start()
    old = node.id
    node.stop()
    node.start("--join", f"{single.join_token()}@{single.nodes[0].p2p}")
    wait_until("it is in", lambda: node.get("/cluster/status")["cluster_size"] == 2)
    assert node.id != old, "a key belongs to one membership"
    single.nodes[0].post("/cluster/leave", {"node_id": node.id})
    assert node.wait_end() == 0


def test_a_join_that_fails_gives_nothing_up(cluster: Cluster, single: Cluster) -> None:
    node = cluster.found()
    before = node.get("/cluster/status")["cluster_id"]
    node.stop()
    [nowhere] = free_ports(1)
    start_and_fail(node, "--join", f"{single.join_token()}@127.0.0.1:{nowhere}")
    node.start()
    assert node.get("/cluster/status")["cluster_id"] == before


def test_a_member_of_a_cluster_does_not_join_another(cluster: Cluster, single: Cluster) -> None:
    cluster.found()
    node = cluster.grow()
    node.stop()
    line = start_and_fail(node, "--join", f"{single.join_token()}@{single.nodes[0].p2p}")
    assert "another cluster" in line
    assert str(node.data_dir) in line
    node.start()  # and it is none the worse for it
    cluster.wait_whole()


def test_a_node_leaves_and_can_come_back(cluster: Cluster) -> None:
    first = cluster.found()
    second = cluster.grow()
    answer = first.post("/cluster/leave", {"node_id": second.id})
    assert answer["node_id"] == second.id
    assert second.wait_end() == 0
    assert first.get("/cluster/status")["cluster_size"] == 1
    wait_until("one voter", lambda: len(first.get("/cluster/status")["voters"]) == 1)

    old = second.id
    second.start("--join", f"{cluster.join_token()}@{first.p2p}")
    cluster.wait_whole()
    assert first.get("/cluster/status")["cluster_size"] == 2
    assert second.id != old
    assert first.node(second)["name"] == "node-2"


def test_a_node_that_lost_its_journal_comes_back_as_a_new_one(cluster: Cluster) -> None:
    cluster.found()
    cluster.grow(2)
    lost = cluster.followers()[0]
    old = lost.id
    lost.stop()
    for path in lost.data_dir.glob("raft.db*"):
        path.unlink()
    line = start_and_fail(lost)
    assert "the journal of this node is gone" in line
    assert "ollama-dist cluster leave" in line
    # Its name is its old self's until that is taken out.
    join = ("--join", f"{cluster.join_token()}@{cluster.asked.p2p}")
    assert "ollama-dist cluster leave" in start_and_fail(lost, *join)
    cluster.asked.post("/cluster/leave", {"node_id": old})
    lost.start(*join)
    cluster.wait_whole()
    assert lost.id != old
    assert cluster.asked.get("/cluster/status")["cluster_size"] == 3


def test_the_leader_can_leave_by_its_own_hand(cluster: Cluster) -> None:
    cluster.found()
    cluster.grow(2)
    leader = cluster.leader()
    answer = leader.request("POST", "/cluster/leave", json={"node_id": leader.id})
    assert answer.status_code == 200, answer.text
    assert leader.wait_end() == 0
    cluster.wait_whole()
    assert cluster.asked.get("/cluster/status")["cluster_size"] == 2


def test_a_node_that_is_down_can_be_taken_out(cluster: Cluster) -> None:
    cluster.found()
    cluster.grow(2)
    gone = cluster.followers()[0]
    gone_id = gone.id
    gone.kill()
    cluster.asked.post("/cluster/leave", {"node_id": gone_id})
    cluster.wait_whole()
    assert cluster.asked.get("/cluster/status")["cluster_size"] == 2
    # When it returns it is told, and leaves in order. Its models stay.
    kept = gone.data_dir / "models" / "kept"
    kept.write_text("a blob")
    gone.launch()
    assert gone.wait_end() == 0
    told = [line for line in gone.log().splitlines() if "was removed from the cluster on" in line]
    assert len(told) == 1, gone.log()
    assert "node-" in told[0]
    assert "Traceback" not in gone.log()
    assert list(gone.data_dir.glob("left-*/raft.db"))
    assert kept.exists()
    assert cluster.asked.get("/cluster/status")["cluster_size"] == 2
    # To systemd this was a service that ended well, and not a start to try again.
    assert any("READY=1" in message for message in gone.notifications())
    assert gone.log().count("is ready after") == 1, "it was told before it was ready"
    # The next boot starts it nevertheless: it does not go on as a cluster of its own.
    gone.launch()
    assert gone.wait_end() == 78
    last = gone.log().splitlines()[-1]
    assert "this node has left its cluster" in last
    assert "--join" in last
    assert "ollamad forget" in last
    assert not (gone.data_dir / "identity").exists()
    # And it can come back.
    gone.start("--join", f"{cluster.join_token()}@{cluster.asked.p2p}")
    cluster.wait_whole()
    assert gone.get("/cluster/status")["cluster_size"] == 3
    assert gone.id != gone_id


def test_a_newcomer_takes_the_place_of_a_dead_voter(cluster: Cluster) -> None:
    cluster.found()
    cluster.grow(2)
    gone = cluster.followers()[0]
    gone_id = gone.id
    gone.kill()
    begun = time.monotonic()
    cluster.new_node().start("--join", f"{cluster.join_token()}@{cluster.asked.p2p}")
    alive = {node.id for node in cluster.running}

    def voters() -> set[str]:
        return set(cluster.asked.get("/cluster/status")["voters"])

    wait_until("the newcomer votes", lambda: voters() == {*alive, gone_id})
    wait_until("the dead one does not", lambda: voters() == alive, 60)
    assert time.monotonic() - begun > 25, "it was not given up at once"
    # It is a member still, and votes again when it returns.
    gone.start()
    cluster.wait_whole()


def test_the_last_node_and_unknown_nodes_are_refused(single: Cluster) -> None:
    node = single.nodes[0]
    details = refused(
        node.request("POST", "/cluster/leave", json={"node_id": node.id}), 409, "LAST_MEMBER"
    )
    assert isinstance(details, dict)
    assert not node.node(node)["draining"], "a refusal leaves nothing behind"
    refused(
        node.request("POST", "/cluster/leave", json={"node_id": "Qmnobody"}),
        404,
        "NODE_NOT_FOUND",
    )


def test_nodes_may_join_at_once(cluster: Cluster) -> None:
    """Two at once is what a script does; they must not be in each other's way."""
    first = cluster.found()
    token = cluster.join_token()
    nodes = [cluster.new_node() for _ in range(2)]
    threads = [
        threading.Thread(target=node.start, args=("--join", f"{token}@{first.p2p}"))
        for node in nodes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.wait_whole()
