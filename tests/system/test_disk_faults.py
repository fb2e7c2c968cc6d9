"""Nodes whose disk fills up: each has its data directory on a small file system of its own."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.system.harness import VOTERS, Cluster, Node, wait_until
from tests.system.sockets import Listener
from tests.system.write_load import ENVIRONMENT, REQUEST_TIMEOUT_S, Verdict, WriteLoad

DISK_SIZE_MB = 32  # more than a node needs here
FULL_S = 5.0  # how long it stays full
FULL, SPACE = "no space is left on the disk", "there is space for the journal again"


@pytest.fixture(params=VOTERS)
def small_disks(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster.environment |= ENVIRONMENT
    with ExitStack() as mounts:
        for _ in range(request.param):
            node = cluster.new_node()
            mount(node.data_dir, mounts)
        first, *others = cluster.nodes
        first.start()
        token = cluster.join_token()
        for node in others:
            node.start("--join", f"{token}@{first.p2p}")
        cluster.wait_whole()
        yield cluster


def mount(directory: Path, mounts: ExitStack) -> None:
    directory.mkdir()
    options = f"size={DISK_SIZE_MB}m,mode=700"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    mounts.callback(subprocess.run, ["umount", "--lazy", str(directory)], check=True)


def fill(node: Node) -> Path:
    filler = node.data_dir / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert shutil.disk_usage(node.data_dir).free == 0
    return filler


def says(node: Node, line: str, times: int = 1) -> None:
    wait_until(f"{node.name} says: {line}", lambda: node.log().count(line) == times)


def test_a_node_whose_disk_is_full_costs_nothing_and_lives(small_disks: Cluster) -> None:
    """First a follower, then the leader, which hands over."""
    with WriteLoad(small_disks) as load:
        for victim in (small_disks.followers()[0], small_disks.leader()):
            load.note(f"the disk of {victim.name} is full")
            filler = fill(victim)
            says(victim, FULL)
            deadline = time.monotonic() + FULL_S
            while time.monotonic() < deadline:
                load.wait_progress()
                load.wait_progress(node=victim)
                assert small_disks.leader() is not victim
            filler.unlink()
            says(victim, SPACE)
            load.wait_progress(node=victim)
    load.check()
    assert small_disks.running == small_disks.nodes
    # Disks of this size are always short of space.
    with Listener(small_disks.asked, "alerts") as heard:
        for node in small_disks.nodes:
            alert = heard.wait("alert", alert="low_disk", subject=node.id, state="raised")
            assert node.name in alert["message"]


def test_when_most_disks_are_full_space_is_all_that_is_needed(small_disks: Cluster) -> None:
    spare = (len(small_disks.nodes) - 1) // 2
    victims = [small_disks.leader(), *small_disks.followers()[:spare]]
    with WriteLoad(small_disks) as load:
        load.note("the disks of a majority are full")
        fillers = [fill(node) for node in victims]
        for node in victims:
            says(node, FULL)
        begun = time.monotonic()
        time.sleep(2 * REQUEST_TIMEOUT_S)  # of two writes of each client, one falls into it
        ended = time.monotonic()
        for filler in fillers:
            filler.unlink()
        for node in victims:
            says(node, SPACE)
        for node in small_disks.nodes:
            load.wait_progress(node=node)
    load.check()
    tried = [w for node in small_disks.nodes for w in load.during(begun, ended, node)]
    assert tried
    assert {write.verdict for write in tried} <= {Verdict.REFUSED, Verdict.UNKNOWN}
    assert small_disks.running == small_disks.nodes


def test_a_node_that_is_killed_while_its_disk_is_full_comes_back(small_disks: Cluster) -> None:
    victim = small_disks.leader()
    with WriteLoad(small_disks) as load:
        load.note(f"the disk of {victim.name}, which leads, is full, and it is killed")
        filler = fill(victim)
        says(victim, FULL)
        load.wait_progress()
        victim.kill()
        load.wait_progress()
        filler.unlink()
        victim.start()
        load.wait_progress(node=victim)
    load.check()
