"""Every node is restarted in turn while clients write, as in an upgrade."""

import signal
from collections.abc import Callable

from tests.system.harness import Cluster
from tests.system.write_load import WriteLoad

ROUNDS = 2


def test_a_rolling_restart_loses_nothing(
    voters: Cluster, record_property: Callable[[str, object], None]
) -> None:
    with WriteLoad(voters) as load:
        for node in voters.nodes * ROUNDS:
            load.note(f"restart of {node.name}")
            assert node.stop() == 0
            node.start()
            voters.wait_whole()
            load.wait_progress()
    account = load.check()
    record_property("acknowledged", account.acknowledged)
    record_property("refused", account.refused)
    record_property("unknown", account.unknown)
    record_property("longest_gap_s", round(account.longest_gap_s, 2))


def test_all_nodes_stop_and_start_at_once_under_load(voters: Cluster) -> None:
    with WriteLoad(voters) as load:
        load.note("all nodes are stopped")
        for node in voters.nodes:
            node.signal(signal.SIGTERM)
        for node in voters.nodes:
            assert node.wait_end() == 0
        for node in voters.nodes:
            node.start(wait=False)
        for node in voters.nodes:
            node.wait_ready()
        load.wait_progress()
    load.check()


def test_all_nodes_are_killed_at_once_under_load(voters: Cluster) -> None:
    with WriteLoad(voters) as load:
        for _ in range(ROUNDS):
            load.note("all nodes are killed")
            for node in voters.nodes:
                node.signal(signal.SIGKILL)
            for node in voters.nodes:
                node.wait_end()
            for node in voters.nodes:
                node.start(wait=False)
            for node in voters.nodes:
                node.wait_ready()
            load.wait_progress()
    load.check()
