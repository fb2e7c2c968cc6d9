"""Links that are cut, one way and both, and healed: who goes on, who refuses, who stays leader."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.system.harness import Cluster, Node, fault_seconds, wait_until
from tests.system.namespaces import NamespaceHost, Network
from tests.system.write_load import Verdict, WriteLoad

CUT_S = 7.0  # longer than an election, and than a daemon tries a write
HEALED_S = 60.0  # until every node takes writes again: connections are tried anew ever more rarely
FLAP_S = (0.1, 1.5)  # from much shorter than an election to longer
TRIES = 3  # of what the machine may disturb by standing still


@contextlib.contextmanager
def cut(network: Network, how: Callable[[], object]) -> Iterator[float]:
    """Break something for the length of the context; gives the time from which it is broken."""
    try:
        how()
        yield time.monotonic()
    finally:
        network.heal()


def host(node: Node) -> NamespaceHost:
    assert isinstance(node.host, NamespaceHost)
    return node.host


def deafen(network: Network, node: Node, others: Sequence[Node]) -> None:
    """What the others send does not reach it; what it sends reaches them."""
    for other in others:
        network.cut_one_way(host(other), host(node))


def mute(network: Network, node: Node, others: Sequence[Node]) -> None:
    for other in others:
        network.cut_one_way(host(node), host(other))


def others_than(cluster: Cluster, *excluded: Node) -> list[Node]:
    return [node for node in cluster.nodes if node not in excluded]


def term(node: Node) -> int:
    return int(node.get("/cluster/consensus")["term"])


def assert_refuses(load: WriteLoad, nodes: Sequence[Node], since: float) -> None:
    """Nodes that were cut off then and still are: no old answers, no writes."""
    for node in nodes:
        answer = node.request("GET", "/cluster/leader?consistent=true")
        assert (answer.status_code, answer.json()["code"]) == (503, "NO_QUORUM")
        view = node.get("/cluster/consensus")
        assert not view["has_quorum"]
        assert not view["is_leader"], "a leader without a majority steps down"
        assert view["state_age_ms"] > 1000, "it says how old its answers are"
        tried = load.during(since, time.monotonic(), node)
        assert tried, "no write was tried"
        assert {w.verdict for w in tried} <= {Verdict.REFUSED, Verdict.UNKNOWN}


def assert_all_go_on(cluster: Cluster, load: WriteLoad) -> None:
    for node in cluster.nodes:
        load.wait_progress(2, HEALED_S, node)


@pytest.mark.parametrize("with_leader", [True, False], ids=["with the leader", "of followers"])
def test_a_minority_refuses_while_the_majority_goes_on(
    network: Network, far_voters: Cluster, with_leader: bool
) -> None:
    size = (len(far_voters.nodes) - 1) // 2
    leader, followers = far_voters.leader(), far_voters.followers()
    minority = [leader, *followers][:size] if with_leader else followers[:size]
    majority = others_than(far_voters, *minority)
    with WriteLoad(far_voters) as load:
        load.note("a minority is cut off")
        with cut(network, lambda: network.split(map(host, minority))) as begun:
            wait_until(
                "the majority has a leader", lambda: far_voters.leader(among=majority) in majority
            )
            time.sleep(CUT_S)
            load.wait_progress()
            assert_refuses(load, minority, begun)
        load.note("healed")
        assert_all_go_on(far_voters, load)
    load.check()


def test_partitions_in_a_loop_lose_nothing(network: Network, far_voters: Cluster) -> None:
    """Any two halves, again and again; sometimes from one to the next without healing."""
    with WriteLoad(far_voters) as load:
        deadline = time.monotonic() + fault_seconds()
        while time.monotonic() < deadline:
            size = (len(far_voters.nodes) - 1) // 2
            minority = random.sample(far_voters.nodes, size)
            names = ", ".join(node.name for node in minority)
            load.note(f"{names} cut off from the others")
            network.split(map(host, minority))
            load.wait_progress(timeout_s=HEALED_S)
            time.sleep(random.uniform(0, 2))
            network.heal()
            if random.random() < 0.5:
                load.wait_progress(timeout_s=HEALED_S)
        load.note("healed")
        assert_all_go_on(far_voters, load)
    load.check()


def test_two_followers_that_do_not_reach_each_other_go_on(
    network: Network, far_voters: Cluster
) -> None:
    one, other = far_voters.followers()[:2]
    with WriteLoad(far_voters) as load:
        load.note("two followers cut from each other")
        with cut(network, lambda: network.cut(host(one), host(other))):
            time.sleep(CUT_S)
            assert_all_go_on(far_voters, load)
        assert_all_go_on(far_voters, load)
    load.check()


def test_a_leader_that_one_follower_does_not_reach_goes_on(
    network: Network, far_voters: Cluster
) -> None:
    leader, lonely = far_voters.leader(), far_voters.followers()[0]
    with WriteLoad(far_voters) as load:
        load.note("a follower cut from the leader alone")
        with cut(network, lambda: network.cut(host(leader), host(lonely))):
            time.sleep(CUT_S)
            for node in others_than(far_voters, lonely):
                load.wait_progress(node=node)
        assert_all_go_on(far_voters, load)
    load.check()


def leader_stays(cluster: Cluster, network: Network, how: Callable[[Node, Node], object]) -> bool:
    """Whether a leader stays for CUT_S, and when all is healed, whatever is done to a follower."""
    leader, follower = cluster.leader(), cluster.followers()[-1]
    others = others_than(cluster, follower)
    before = term(leader)
    with WriteLoad(cluster) as load:
        load.note(f"{follower.name}, a follower, is cut")
        with cut(network, lambda: how(leader, follower)):
            time.sleep(CUT_S)
            for node in others:
                load.wait_progress(node=node)
            stayed = term(leader) == before
        assert_all_go_on(cluster, load)
    load.check()
    return stayed and cluster.leader() is leader and term(leader) == before


@pytest.mark.parametrize("how", ["deaf", "mute", "deaf to the leader", "mute to the leader"])
def test_a_follower_with_half_a_link_does_not_depose_its_leader(
    network: Network, far_voters: Cluster, how: str
) -> None:
    def harm(leader: Node, follower: Node) -> None:
        far = [leader] if "leader" in how else others_than(far_voters, follower)
        (deafen if "deaf" in how else mute)(network, follower, far)

    assert any(leader_stays(far_voters, network, harm) for _ in range(TRIES))


@pytest.mark.parametrize("harm", [deafen, mute])
def test_a_leader_with_half_a_link_is_replaced(
    network: Network, far_voters: Cluster, harm: Callable[[Network, Node, Sequence[Node]], None]
) -> None:
    leader = far_voters.leader()
    others = others_than(far_voters, leader)
    with WriteLoad(far_voters) as load:
        load.note(f"the leader is cut one way ({harm.__name__})")
        with cut(network, lambda: harm(network, leader, others)) as begun:
            wait_until("another one leads", lambda: far_voters.leader(among=others) is not leader)
            time.sleep(CUT_S)
            load.wait_progress()
            assert_refuses(load, [leader], begun)
        assert_all_go_on(far_voters, load)
    load.check()


def test_links_that_flap_lose_nothing(network: Network, far_voters: Cluster) -> None:
    """Single links, each way by itself, and whole cables."""
    hosts = [host(node) for node in far_voters.nodes]
    with WriteLoad(far_voters) as load:
        deadline = time.monotonic() + fault_seconds()
        while time.monotonic() < deadline:
            one, other = random.sample(hosts, 2)
            match random.randrange(4):
                case 0:
                    network.cut(one, other)
                case 1:
                    network.cut_one_way(one, other)
                case 2:
                    network.split([one])
                case 3:
                    network.unplug(one)
            time.sleep(random.uniform(*FLAP_S))
            if random.random() < 0.5:
                network.heal()
                time.sleep(random.uniform(*FLAP_S))
        network.heal()
        load.note("healed")
        assert_all_go_on(far_voters, load)
    load.check()
