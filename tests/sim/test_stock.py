"""The stock library in the simulator: it shows what it must, and nothing when all is well."""

import dataclasses
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
import pytest
from pysyncobj.poller import POLL_EVENT_TYPE
from pysyncobj.tcp_connection import TcpConnection

import ollamad.raft.private
from ollamad.core.ids import NodeId
from ollamad.wire.raftwire import MalformedMessage, decode
from tests.sim import stock_cluster
from tests.sim.network import Paths
from tests.sim.plan import Crash, Fault, Network
from tests.sim.plan import Kind as FaultKind
from tests.sim.stock import describe, stock_scenario, table
from tests.sim.stock_cluster import StockResult, run
from tests.sim.stock_library import PAGE_SIZE, PageCache, StockJournal, syncobj
from tests.sim.stock_network import CONNECTION_TIMEOUT_S, StockConnections
from tests.sim.stock_process import Defect
from tests.sim.world import World

SEEDS = range(20)
BUGS_OF_THE_APPLICATION = {Defect.RETRIED, Defect.CALLBACK_TWICE}


@pytest.fixture(scope="module")
def results() -> list[StockResult]:
    """Twenty runs over connections, as the library's own transport makes them."""
    return [run(stock_scenario(seed, "connections")) for seed in SEEDS]


@pytest.mark.parametrize(
    "defect",
    [
        Defect.CUTS_APPLIED,
        Defect.LOST,
        Defect.VOTES_TWICE,
        Defect.FORGETS_TERM,
        Defect.LINGERS,
        Defect.DEPOSES,
        Defect.FAILED_YET_APPLIED,
        Defect.RETRIED,
        Defect.CALLBACK_TWICE,
    ],
)
def test_twenty_seeds_show(results: list[StockResult], defect: Defect) -> None:
    assert any(defect in result.findings for result in results)


def test_frames_show_what_needs_a_network_that_doubles_them() -> None:
    runs = [run(stock_scenario(seed, "frames")) for seed in SEEDS[:12]]
    shown = {defect for result in runs for defect in result.findings}
    assert {Defect.OVERCLAIMS, Defect.COMMITS_ALONE, Defect.COUNTS_TWICE} <= shown


def test_without_power_cuts_nothing_is_forgotten(results: list[StockResult]) -> None:
    kept = [result for result in results if not result.had_power_cuts]
    assert 5 < len(kept) < len(results)
    for result in kept:
        forgotten = {Defect.FORGETS_TERM, Defect.VOTES_TWICE, Defect.DOES_NOT_START}
        assert not forgotten & result.findings.keys(), "\n".join(describe(result))


def test_in_peace_only_the_truncation_shows() -> None:
    """What the detectors report is the library's doing, not the simulator's."""
    batches = set()
    for seed in range(8):
        drawn = stock_scenario(seed, "connections")
        result = run(dataclasses.replace(drawn, faults=()))
        expected = set() if result.uses_batch else {Defect.CUTS_APPLIED}
        unexpected = result.findings.keys() - BUGS_OF_THE_APPLICATION - expected
        assert not unexpected, "\n".join(describe(result))
        assert result.findings.keys() >= BUGS_OF_THE_APPLICATION
        assert result.acknowledged > 20
        batches.add(result.uses_batch)
    assert batches == {False, True}


def test_a_leader_that_hears_a_majority_does_not_linger() -> None:
    for seed in range(4):
        drawn = stock_scenario(seed, "connections")
        crash = Fault(1.0, FaultKind.CRASH, 0, (Crash.NOW, 1, 10.0))
        result = run(dataclasses.replace(drawn, voters=5, faults=(crash,)))
        assert Defect.LINGERS not in result.findings, "\n".join(describe(result))


def test_a_storm_of_messages_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_cluster, "STORM", 300)
    result = run(stock_scenario(2, "connections"))
    assert Defect.STORM in result.findings
    later = BUGS_OF_THE_APPLICATION | {Defect.STUCK}
    assert not later & result.findings.keys()


def test_a_seed_gives_the_same_run_in_any_process() -> None:
    program = "from tests.sim.stock import *; print(run(stock_scenario(5, 'connections')))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in "12"
    }
    assert len(texts) == 1


def test_the_table_counts_runs() -> None:
    def result(*findings: Defect, power: bool) -> StockResult:
        return StockResult(1, dict.fromkeys(findings, "example"), True, power, 10)

    runs = [result(power=False), result(Defect.LOST, power=False), result(Defect.LOST, power=True)]
    lines = table({"connections": runs}).splitlines()
    assert lines[0] == "| what was seen | connections: of 3 | no power cut: of 2 |"
    assert "| an acknowledged command is gone | 2 | 1 |" in lines
    assert "| two nodes lead in one term | 0 | 0 |" in lines
    assert len(lines) == 2 + len(Defect)


# What the runs stand on.


def test_the_library_runs_as_it_comes() -> None:
    """The copy has the very code of the library, and none of what our package replaces in it."""
    copy, original = vars(syncobj), vars(pysyncobj.syncobj)
    assert syncobj.__file__ == pysyncobj.syncobj.__file__
    assert isinstance(original["pickle"], ollamad.raft.private._NoPickle)
    assert copy["pickle"].__name__ == "pysyncobj.pickle"
    assert copy["Serializer"].__name__ == "Serializer"
    copied, stock = copy["SyncObj"], original["SyncObj"]
    assert copied is not stock
    for name, function in vars(stock).items():
        if hasattr(function, "__code__"):
            assert vars(copied)[name].__code__ == function.__code__, name


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Luck(random.Random):
    """Whether the kernel writes a page back just before the power goes."""

    def __init__(self, share: float) -> None:
        super().__init__(1)
        self.share = share

    def random(self) -> float:
        return self.share

    def uniform(self, a: float, b: float) -> float:
        return a


def test_a_power_cut_loses_what_was_not_written_back() -> None:
    clock = Clock()
    pages = PageCache(clock, Luck(0.99))
    journal = StockJournal(pages, lambda entries: None)
    journal.add(b"\x00first", 1, 1)
    journal.flush()
    journal.add(b"\x00second", 2, 1)
    assert len(StockJournal(pages, lambda entries: None)) == 2  # a kill -9 keeps the page cache
    clock.now += 29.0
    pages.cut_power()
    reopened = StockJournal(pages, lambda entries: None)
    assert [entry[1] for entry in reopened[:]] == [1]


def test_the_kernel_writes_back_what_is_old() -> None:
    clock = Clock()
    pages = PageCache(clock, Luck(0.99))
    pages.write(0, b"old")
    clock.now += 29.9
    pages.write(PAGE_SIZE, b"young")
    pages.cut_power()
    assert bytes(pages.cached[:3]) == b"old"
    assert len(pages.cached) <= PAGE_SIZE


def test_a_page_that_is_written_again_and_again_is_written_back_all_the_same() -> None:
    clock = Clock()
    pages = PageCache(clock, Luck(0.99))
    pages.write(0, b"first")
    clock.now += 31.0
    pages.write(0, b"later")
    clock.now += 1.0
    pages.cut_power()
    assert bytes(pages.cached) == b"first"


def test_a_power_cut_loses_the_last_seconds_of_term_and_vote() -> None:
    clock = Clock()
    pages = PageCache(clock, Luck(0.5))
    clock.now = 101.0
    StockJournal(pages, lambda entries: None).setCurrentTerm(3, "A")
    clock.now = 104.0
    StockJournal(pages, lambda entries: None).setCurrentTerm(4, "B")
    clock.now = 104.9
    pages.cut_power()
    assert StockJournal(pages, lambda entries: None).getCurrentTerm() == 0
    StockJournal(pages, lambda entries: None).setCurrentTerm(5, "C")
    clock.now = 106.0  # the file system commits every five seconds
    StockJournal(pages, lambda entries: None).setCurrentTerm(6, "D")
    clock.now = 109.0
    pages.cut_power()
    journal = StockJournal(pages, lambda entries: None)
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (5, "C")


def test_a_journal_tells_what_is_cut_off() -> None:
    cut: list[Any] = []
    journal = StockJournal(PageCache(Clock(), Luck(0.5)), cut.extend)
    for index in (1, 2, 3):
        journal.add(b"\x00", index, 1)
    journal.deleteEntriesFrom(1)
    assert [entry[1] for entry in cut] == [2, 3]
    assert len(journal) == 1


class Wires:
    """Connections between A and B, and what each of them sees."""

    def __init__(self) -> None:
        self.world = World(1)
        self.paths = Paths()
        self.seen: list[tuple[str, str, object]] = []
        self.up = {NodeId("A"), NodeId("B")}
        network = Network(streams=True, ordered=True, latency_s=0.01, jitter_s=0.1)
        self.connections = StockConnections(
            self.world,
            network,
            self.paths,
            lambda source, to, message: self.seen.append((source, to, message)),
            lambda node, peer, is_up: self.seen.append((node, peer, is_up)),
            self.up.__contains__,
        )
        self.connections.start(NodeId("B"), [NodeId("A")])
        self.run(1.0)
        self.take()

    def run(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world._agenda and self.world._agenda[0][0] <= until:
            self.world.now, _, what, args = self.world._agenda.pop(0)
            what(*args)
            self.world._agenda.sort(key=lambda item: item[:2])
        self.world.now = until

    def send(self, message: str) -> bool:
        return self.connections.send(NodeId("A"), NodeId("B"), message)

    def take(self) -> list[tuple[str, str, object]]:
        seen, self.seen = self.seen, []
        return seen


def test_messages_keep_their_order_and_outlive_a_short_cut() -> None:
    wires = Wires()
    sent = [str(number) for number in range(20)]
    for number in sent[:10]:
        assert wires.send(number)
    wires.paths.cut(NodeId("A"), NodeId("B"))
    for number in sent[10:]:
        assert wires.send(number)
    wires.run(2.0)
    assert wires.take() == []
    wires.paths.mend(NodeId("A"), NodeId("B"))
    wires.connections.mended(NodeId("A"), NodeId("B"))
    wires.run(1.0)
    assert [message for _, _, message in wires.take()] == sent


def test_a_connection_breaks_when_nothing_is_heard_and_comes_back() -> None:
    wires = Wires()
    wires.run(CONNECTION_TIMEOUT_S)
    assert not wires.send("lost")
    wires.run(1.5)
    seen = wires.take()
    assert seen[0] == ("A", "B", False)
    assert ("B", "A", False) in seen
    assert set(seen[-2:]) == {("A", "B", True), ("B", "A", True)}
    assert wires.send("arrives")
    wires.run(1.0)
    assert wires.take() == [("A", "B", "arrives")]


def test_a_host_without_power_says_nothing() -> None:
    wires = Wires()
    wires.up.remove(NodeId("B"))
    wires.connections.died(NodeId("B"), [NodeId("A")], silently=True)
    assert wires.send("into the void")
    wires.run(1.0)
    assert wires.take() == []
    silent = Wires()
    silent.up.remove(NodeId("B"))
    silent.connections.died(NodeId("B"), [NodeId("A")], silently=False)
    silent.run(1.0)
    assert silent.take() == [("A", "B", False)]


# The defect that no scenario is needed for.

_ran: list[str] = []


def _run_by_a_stranger(text: str) -> None:
    _ran.append(text)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return _run_by_a_stranger, ("as this process",)


class _Poller:
    def __init__(self) -> None:
        self.callback: Any = None

    def subscribe(self, descr: int, callback: Any, events: int) -> None:
        self.callback = callback

    def unsubscribe(self, descr: int) -> None:
        pass


def test_a_strangers_pickle_runs_in_the_stock_transport_and_not_in_ours() -> None:
    frame = zlib.compress(pickle.dumps(_Payload()))
    poller = _Poller()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        connection = TcpConnection(
            poller, socket=ours, timeout=10, sendBufferSize=4096, recvBufferSize=4096
        )
        theirs.sendall(struct.pack("i", len(frame)) + frame)
        poller.callback(ours.fileno(), POLL_EVENT_TYPE.READ)
        connection.disconnect()
    assert _ran == ["as this process"]
    _ran.clear()
    for data in (frame, pickle.dumps(_Payload())):
        with pytest.raises(MalformedMessage):
            decode(data)
    assert _ran == []
