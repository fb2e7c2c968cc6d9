"""Daemons that stand still (SIGSTOP) and go on: as after swapping, or a moved virtual machine."""

import contextlib
import random
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.system.harness import Cluster, Node, fault_seconds
from tests.system.write_load import Verdict, WriteLoad

SHORT_S = (1.0, 4.0)  # longer than an election takes
LONG_S = 20.0  # longer than any deadline of a request or a link


@contextlib.contextmanager
def paused(nodes: Sequence[Node]) -> Iterator[None]:
    try:
        for node in nodes:
            node.pause()
        yield
    finally:
        for node in nodes:
            node.resume()


def term(node: Node) -> int:
    return int(node.get("/cluster/consensus")["term"])


def test_leaders_that_stand_still_in_a_loop_acknowledge_nothing_old(voters: Cluster) -> None:
    with WriteLoad(voters) as load:
        deadline = time.monotonic() + fault_seconds()
        while time.monotonic() < deadline:
            leader = voters.leader()
            others = voters.followers()
            load.note(f"{leader.name}, which leads, stands still")
            with paused([leader]):
                time.sleep(random.uniform(*SHORT_S))
                load.wait_progress()
                assert voters.leader(among=others) is not leader
            load.wait_progress(node=leader)
    load.check()


def test_followers_that_stand_still_in_a_loop_disturb_nobody(voters: Cluster) -> None:
    before, pauses = term(voters.leader()), 0
    with WriteLoad(voters) as load:
        deadline = time.monotonic() + fault_seconds()
        while time.monotonic() < deadline:
            follower = random.choice(voters.followers())
            load.note(f"{follower.name}, which follows, stands still")
            with paused([follower]):
                time.sleep(random.uniform(*SHORT_S))
                load.wait_progress()
            pauses += 1
            load.wait_progress(node=follower)
    load.check()
    # A busy machine may cause an election, a node that comes back must not.
    assert term(voters.leader()) - before <= pauses // 2


def test_nodes_that_stood_still_for_long_come_back(voters: Cluster) -> None:
    """The leader, with as many followers as the cluster survives."""
    spare = (len(voters.nodes) - 1) // 2
    victims = [voters.leader(), *voters.followers()[: spare - 1]]
    with WriteLoad(voters) as load:
        load.note(f"{len(victims)} nodes, the leader too, stand still for {LONG_S:g} s")
        with paused(victims):
            time.sleep(LONG_S)
            load.wait_progress()
        for node in victims:
            load.wait_progress(node=node)
    load.check()


@pytest.mark.parametrize("with_leader", [True, False], ids=["leader too", "leader not"])
def test_without_a_majority_nothing_is_acknowledged(voters: Cluster, with_leader: bool) -> None:
    """Those that go on say so, and all is well again when the others go on too."""
    leader, followers = voters.leader(), voters.followers()
    majority = len(voters.nodes) // 2 + 1
    victims = [leader, *followers][:majority] if with_leader else followers[:majority]
    others = [node for node in voters.nodes if node not in victims]
    with WriteLoad(voters) as load:
        load.note("a majority stands still")
        with paused(victims):
            begun = time.monotonic()
            time.sleep(random.uniform(6, 8))  # longer than a write is tried
            for node in others:
                answer = node.request("GET", "/cluster/leader?consistent=true")
                assert (answer.status_code, answer.json()["code"]) == (503, "NO_QUORUM")
                assert len(node.get("/nodes")["nodes"]) == len(voters.nodes), "old, but readable"
            tried = [w for node in others for w in load.during(begun, time.monotonic(), node)]
        load.wait_progress()
        for node in voters.nodes:
            load.wait_progress(1, node=node)
    load.check()
    assert tried
    assert {write.verdict for write in tried} <= {Verdict.REFUSED, Verdict.UNKNOWN}
