"""`ollamad recover`: when it refuses, what it changes, and that it changes all of it or nothing."""

import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import trio
from typer.testing import CliRunner

from ollamad import recover as recover_module
from ollamad.cluster import CONSENSUS_VIEW, ConsensusView
from ollamad.core.commands import (
    AddJoinToken,
    AdmitMember,
    AnyCommand,
    FoundCluster,
    Proposal,
    PutUser,
    RecoverCluster,
    RemoveMember,
)
from ollamad.core.ids import NodeId, short
from ollamad.core.state import JoinToken, User
from ollamad.datadir import DataDir
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.main import app
from ollamad.peers.identity import Identity, issue_certificate, make_ca
from ollamad.peers.mesh import Mesh
from ollamad.raft.journal import Batch, LogEntry, Snapshot, Stored, pack_snapshot
from ollamad.raft.node import RaftNode
from ollamad.raft.recovery import TERM_STEP, LogEnd, LogView, read_log
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.recover import Plan, Survey, check, recover
from ollamad.wire.codec import encode
from ollamad.wire.mux import Departed
from ollamad.wire.raftwire import NO_OP, REGULAR, encode_voters
from tests.fakes.api_services import member
from tests.fakes.tls_nodes import TlsNode, utc_now

TERM = 7


class Survivor:
    """The data directory of node `a` of a cluster of three, which runs nowhere."""

    def __init__(self, path: Path) -> None:
        self.path = path / "a"
        self.path.mkdir()
        self.ca = make_ca(utc_now())
        self.identity = Identity.load_or_create(self.path / "identity")
        self.others = [TlsNode(path / name).enter(self.ca) for name in ("b", "c")]
        self.id, self.b, self.c = self.identity.node_id, *(node.id for node in self.others)
        self.enter(0)
        self.addresses = {self.b: "127.0.0.1:1", self.c: "127.0.0.1:1"}
        self.voters = {self.id, self.b, self.c}
        self.more: list[AnyCommand] = []

    def enter(self, incarnation: int) -> None:
        pem = issue_certificate(self.ca, self.identity.public_key, utc_now(), incarnation)
        self.identity.install(pem, self.ca.certificate_pem)

    def write(self) -> "Survivor":
        """Write the journal; its last entries are not known to be committed."""
        founder = member(self.id, "one", joined_at=1.0)
        admin = User("admin", "hash", "admin", 1.0)
        commands: list[AnyCommand] = [
            FoundCluster("c1", self.ca, b"k" * 32, founder, admin),
            AddJoinToken(JoinToken("t", b"key", 2.0**40)),
            *(
                AdmitMember(member(n, name, joined_at=2.0, p2p_address=self.addresses[n]), "t")
                for n, name in ((self.b, "two"), (self.c, "three"))
            ),
            PutUser(User("tail", "hash", "viewer", 3.0)),
            *self.more,
        ]
        bodies = [
            bytes([NO_OP]),
            encode_voters(frozenset(self.voters)),
            *(
                bytes([REGULAR]) + encode(Proposal(f"p{number}", 4.0, command))
                for number, command in enumerate(commands)
            ),
        ]
        entries: list[LogEntry] = [
            (body, index, 0 if index < 3 else TERM) for index, body in enumerate(bodies, 1)
        ]
        batch = Batch(
            add=entries, term=TERM, voted_for=self.b, commit_index=len(entries) - 2, hint=(self.b,)
        )
        trio.run(self._commit, batch)
        return self

    async def _commit(self, batch: Batch) -> None:
        store = SqliteStore(self.path / "raft.db")
        await store.load()
        await store.commit(batch)
        await store.aclose()

    def open(self) -> tuple[Machine, frozenset[NodeId], int]:
        """What a daemon would make of it at its start: the state, the voters, the term."""

        async def open() -> tuple[Machine, frozenset[NodeId], int]:
            machine = Machine()
            store = SqliteStore(self.path / "raft.db")
            node = RaftNode(self.id, store, machine, lambda *_: None)
            assert await node.open()
            await store.aclose()
            return machine, node.voters, node.term

        return trio.run(open)

    def copies(self) -> list[Path]:
        return sorted(self.path.glob("raft.db.before-recovery-*"))


@pytest.fixture
def survivor(tmp_path: Path) -> Survivor:
    return Survivor(tmp_path)


def yes(plan: str) -> bool:
    return True


def test_the_survivor_goes_on_alone_with_all_that_its_log_says(survivor: Survivor) -> None:
    survivor.write()
    before, _, _ = survivor.open()
    assert "tail" not in before.state.users  # not known to be committed
    shown = list[str]()
    told = recover(survivor.path, lambda plan: not shown.append(plan))

    machine, voters, term = survivor.open()
    assert voters == {survivor.id}
    assert term == TERM + TERM_STEP
    after = machine.state
    assert set(after.users) == {"admin", "tail"}, "what is in the log counts as committed"
    assert set(after.members) == {survivor.id, survivor.b, survivor.c}
    assert abs(after.incarnation - time.time_ns()) < 60e9
    assert (after.ca, after.jwt_key, set(after.join_tokens)) == (survivor.ca, b"k" * 32, {"t"})
    assert survivor.identity.incarnation == after.incarnation
    assert {m.id for m in after.members.values() if not m.left_behind} == {survivor.id}

    [plan] = shown
    assert "entry 7 of term 7" in plan
    assert all(f"  {name} " in plan for name in ("one", "two", "three"))
    assert "connection refused" in plan
    [copy] = survivor.copies()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert str(copy) in told
    with closing(sqlite3.connect(copy)) as kept:
        assert kept.execute("SELECT max(idx), max(term) FROM entries").fetchone() == (7, TERM)
        assert kept.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_the_recovered_node_leads_and_commits(tmp_path: Path) -> None:
    survivor = await trio.to_thread.run_sync(lambda: Survivor(tmp_path).write())
    await trio.to_thread.run_sync(recover, survivor.path, yes)
    machine = Machine()
    node = RaftNode(survivor.id, SqliteStore(survivor.path / "raft.db"), machine, lambda *_: None)
    await node.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        proposal = Proposal("new", 5.0, PutUser(User("new", "hash", "viewer", 5.0)))
        await node.propose(encode(proposal), 5)
        nursery.cancel_scope.cancel()
    assert "new" in machine.state.users


def test_the_old_journal_can_be_put_back(survivor: Survivor) -> None:
    survivor.write()
    recover(survivor.path, yes)
    [copy] = survivor.copies()
    copy.replace(survivor.path / "raft.db")
    (survivor.path / "raft.db-witness").unlink()
    [certificate] = (survivor.path / "identity").glob("node.crt.before-recovery-*")
    certificate.replace(survivor.path / "identity" / "node.crt")
    assert survivor.identity.incarnation == 0
    machine, voters, term = survivor.open()
    assert (len(voters), term, machine.state.incarnation) == (3, TERM, 0)


def test_a_second_recovery_finds_nothing_to_do(survivor: Survivor) -> None:
    survivor.write()
    recover(survivor.path, yes)
    with pytest.raises(StartError, match="only voter already"):
        recover(survivor.path, yes)
    assert len(survivor.copies()) == 1


def test_a_recovery_can_be_undone_as_the_manual_says_also_after_kill_9(
    survivor: Survivor, tmp_path: Path
) -> None:
    manual = Path(__file__).parents[2] / "docs" / "operations.md"
    [how] = [text for text in manual.read_text().split("\n\n") if "undo a recovery" in text]
    to_remove = set(re.findall(r"`(raft\.db-[a-z]+)`", how))
    survivor.write()
    _, voters, term = survivor.open()
    recover(survivor.path, yes)
    killed = tmp_path / "killed"

    async def run_and_die() -> None:
        store = SqliteStore(survivor.path / "raft.db")
        await store.load()
        await store.commit(Batch(term=2**40, commit_index=9))
        shutil.copytree(survivor.path, killed)  # what `kill -9` leaves
        await store.aclose()

    trio.run(run_and_die)
    assert (killed / "raft.db-wal").exists()
    survivor.path = killed
    for name in to_remove:
        (killed / name).unlink(missing_ok=True)
    [copy] = survivor.copies()
    copy.rename(killed / "raft.db")
    assert survivor.open()[1:] == (voters, term)


def test_a_later_recovery_is_another_incarnation_whatever_the_clock_says(
    survivor: Survivor, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor.more = [RecoverCluster(2**62)]
    survivor.enter(2**62)
    recover(survivor.write().path, yes)
    assert survivor.open()[0].state.incarnation == 2**62 + 1


def test_a_log_is_read_from_its_snapshot_to_its_end() -> None:
    commands = [bytes([NO_OP]), encode_voters(ids("AB")), *(b"\x00%d" % n for n in range(3, 8))]
    entries: list[LogEntry] = [(command, n, 2) for n, command in enumerate(commands, 1)]
    snapshot = Snapshot(1, entries[3], entries[4], (A, B), b"state")
    stored = Stored(entries, term=4, commit_index=5, snapshot=pack_snapshot(snapshot))

    class Recorder:
        seen: ClassVar[list[bytes]] = []

        def apply(self, command: bytes) -> bytes:
            self.seen.append(command)
            return b""

        def restore(self, data: bytes) -> None:
            self.seen.append(data)

    assert read_log(stored, Recorder()) == LogView(ids("AB"), 4, LogEnd(2, 7))
    assert Recorder.seen == [b"state", b"6", b"7"]


# What is refused.


def refusal(survivor: Survivor) -> str:
    """The words of a refusal, which must leave all as it was."""
    with pytest.raises(StartError) as caught:
        recover(survivor.path, yes)
    assert survivor.copies() == []
    return str(caught.value)


def test_whoever_says_no_changes_nothing(survivor: Survivor) -> None:
    survivor.write()
    with pytest.raises(StartError, match="nothing was changed"):
        recover(survivor.path, lambda plan: False)
    assert survivor.copies() == []
    assert len(survivor.open()[1]) == 3


def test_directories_that_are_none(survivor: Survivor, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StartError, match="--data-dir"):
            recover(path, yes)
    assert not (tmp_path / "nowhere").exists()


def test_another_users_directory(survivor: Survivor, monkeypatch: pytest.MonkeyPatch) -> None:
    survivor.write()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert f"sudo -u {pwd.getpwuid(os.getuid()).pw_name} ollamad" in refusal(survivor)

    def unknown(number: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # of another host, or a container
    assert f"sudo -u '#{os.getuid()}' ollamad" in refusal(survivor)


def test_a_running_daemon(survivor: Survivor) -> None:
    survivor.write()
    with DataDir(survivor.path):
        assert "in use by another ollamad" in refusal(survivor)


def test_a_node_that_is_no_member(survivor: Survivor) -> None:
    survivor.more = [RemoveMember(survivor.id)]
    assert "no member" in refusal(survivor.write())


def test_a_node_without_a_certificate(survivor: Survivor) -> None:
    survivor.write()
    (survivor.path / "identity" / "node.crt").unlink()
    assert "in no cluster" in refusal(survivor)


def test_a_node_that_has_learnt_nothing_yet(survivor: Survivor) -> None:
    trio.run(survivor._commit, Batch(term=0, hint=(survivor.b,)))
    assert "recover another node" in refusal(survivor)


def test_a_corrupt_journal(survivor: Survivor) -> None:
    survivor.write()
    with closing(sqlite3.connect(survivor.path / "raft.db")) as database:
        database.execute("UPDATE entries SET command = x'00' WHERE idx = 4")
        database.commit()
    assert "entry 4 is corrupt" in refusal(survivor)


def test_a_clock_that_would_make_everybody_seem_gone(survivor: Survivor) -> None:
    survivor.write()
    pem = issue_certificate(
        survivor.ca, survivor.identity.public_key, utc_now().replace(year=utc_now().year + 2)
    )
    survivor.identity.install(pem, survivor.ca.certificate_pem)
    assert "clock" in refusal(survivor)


def test_a_copy_that_cannot_be_kept(survivor: Survivor, monkeypatch: pytest.MonkeyPatch) -> None:
    survivor.write()
    connect = sqlite3.connect

    def no_space(path: Any, *args: Any, **more: Any) -> sqlite3.Connection:
        if "before-recovery" in str(path):
            raise sqlite3.OperationalError("database or disk is full")
        return connect(path, *args, **more)

    monkeypatch.setattr(recover_module.sqlite3, "connect", no_space)
    assert "disk is full; nothing was changed" in refusal(survivor)
    monkeypatch.undo()
    assert len(survivor.open()[1]) == 3


# Who answers.

A, B, C, D, E = (NodeId(letter * 46) for letter in "ABCDE")
END = LogEnd(7, 100)


def plan(
    views: dict[NodeId, ConsensusView],
    *,
    voters: str = "ABC",
    newer: dict[NodeId, int] | None = None,
    mute: dict[NodeId, str] | None = None,
    farewell: Departed | None = None,
) -> Plan:
    machine = Machine()
    for letter, node_id in zip("abcde", (A, B, C, D, E), strict=True):
        machine.state.members[node_id] = member(node_id, letter)
    log = LogView(ids(voters), 7, END)
    survey = Survey(views, {}, mute or {}, newer or {}, {B: farewell} if farewell else {})
    return Plan(A, machine.state, log, survey)


def ids(letters: str) -> frozenset[NodeId]:
    return frozenset(NodeId(letter * 46) for letter in letters)


def view(voters: str = "ABC", **changes: Any) -> ConsensusView:
    plain = ConsensusView(7, "", False, END, tuple(sorted(ids(voters))))
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        # A quorum that somebody sees, voter or not.
        (plan({B: view(has_quorum=True, leader=C)}), "b (BBBBBBBBBBBB…) is in touch with a quorum"),
        (plan({B: view(has_quorum=True, leader=C)}), "leader c (CCCCCCCCCCCC…), term 7"),
        (plan({D: view(has_quorum=True)}), "leader unknown"),
        # A majority that would be there with this node.
        (plan({B: view()}), "that makes 2 of 3 voters, a majority"),
        (plan({B: view("AB")}, voters="AB"), "2 of 2"),
        (plan({B: view("ABCDE"), E: view("ABCDE")}, voters="ABCDE"), "3 of 5"),
        # The log of another knows that the voters are others by now.
        (plan({E: view("AE")}), "2 of 2"),
        (plan({D: view("BDE"), E: view("BDE")}), "2 of 3"),
        # It has happened already; or cannot be told.
        (plan({}, newer={B: 5}), "recovered already, by or with b (BBBBBBBBBBBB…)"),
        (
            plan({}, farewell=Departed(1.0)),
            "b (BBBBBBBBBBBB…) says that this node was removed",
        ),
        (plan({}, mute={B: "no such method"}), "b (BBBBBBBBBBBB…) runs but cannot say"),
        # Another survivor has more.
        (
            plan({B: view("ABCDE", end=LogEnd(7, 101))}, voters="ABCDE"),
            "b (BBBBBBBBBBBB…) has more of the log (entry 101 of term 7)",
        ),
        (plan({D: view("ABC", end=LogEnd(8, 3))}), "d (DDDDDDDDDDDD…) has more"),
    ],
)
def test_recovery_is_refused_with_the_reason(case: Plan, words: str) -> None:
    with pytest.raises(StartError) as caught:
        check(case)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "case",
    [
        plan({}),
        plan({}, voters="AB"),
        plan({B: view("ABCDE")}, voters="ABCDE"),
        plan({D: view(), E: view()}),  # no voters
        plan({B: view("ABCDE", end=LogEnd(6, 1000))}, voters="ABCDE"),  # longer, but older
        plan({}, voters="BCD"),  # a learner may be all that is left
    ],
)
def test_recovery_is_right_where_no_majority_can_be_had(case: Plan) -> None:
    check(case)


async def answer_as(node: TlsNode, answer: ConsensusView | None, nursery: trio.Nursery) -> str:
    """Have a node serve its P2P port; without an answer it does not know the question."""
    mesh = Mesh(node.gate, version="1", address_of=lambda _: None)
    if answer is not None:
        mesh.answer(CONSENSUS_VIEW, type(None), lambda peer, request: answer)

    async def serve(stream: Any, peer: NodeId | None) -> None:
        assert peer is not None
        await mesh.serve_member(stream, peer)

    return await node.listen(nursery, serve)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ConsensusView(9, "", True, END, ()), "two (*…) is in touch with a quorum"),
        (ConsensusView(9, "", False, LogEnd(0, 1), ()), "two (*…) answered"),
        (None, "two (*…) runs but cannot say"),
    ],
)
async def test_the_others_are_asked_over_tls(
    tmp_path: Path,
    nursery: trio.Nursery,
    answer: ConsensusView | None,
    words: str,
) -> None:
    survivor = await trio.to_thread.run_sync(Survivor, tmp_path)
    two = survivor.others[0]
    survivor.addresses[two.id] = await answer_as(two, answer, nursery)
    await trio.to_thread.run_sync(survivor.write)
    with pytest.raises(StartError) as caught:
        await trio.to_thread.run_sync(recover, survivor.path, yes)
    assert words.replace("*", short(two.id)) in str(caught.value)
    assert survivor.copies() == []
    nursery.cancel_scope.cancel()


async def test_a_stranger_at_a_members_address_is_nobody(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    survivor = await trio.to_thread.run_sync(Survivor, tmp_path)
    stranger = TlsNode(tmp_path / "x").enter(make_ca(utc_now()))
    quorum = ConsensusView(9, "", True, END, ())
    survivor.addresses[survivor.b] = await answer_as(stranger, quorum, nursery)
    await trio.to_thread.run_sync(survivor.write)
    shown = list[str]()
    await trio.to_thread.run_sync(recover, survivor.path, lambda text: not shown.append(text))
    assert "certificate of another cluster" in shown[0]
    nursery.cancel_scope.cancel()


async def test_who_returns_while_the_user_thinks_is_asked_too(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    survivor = await trio.to_thread.run_sync(Survivor, tmp_path)
    two = survivor.others[0]
    view = ConsensusView(9, "", True, END, ())
    survivor.addresses[two.id] = await answer_as(two, view, nursery)
    survivor.addresses[two.id], there = "127.0.0.1:1", survivor.addresses[two.id]
    await trio.to_thread.run_sync(survivor.write)

    async def ask(identity: Identity, state: Any, real: Any = recover_module._ask_all) -> Survey:
        state.members[two.id] = msgspec.structs.replace(state.members[two.id], p2p_address=there)
        survey: Survey = await real(identity, state)
        return survey

    def think(plan: str) -> bool:
        recover_module._ask_all = ask
        return True

    before = recover_module._ask_all
    try:
        with pytest.raises(StartError, match="in touch with a quorum"):
            await trio.to_thread.run_sync(recover, survivor.path, think)
    finally:
        recover_module._ask_all = before
    assert survivor.copies() == []
    nursery.cancel_scope.cancel()


# Killed in the middle.


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_statement(text: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Die when the journal's store is about to carry out that statement."""

    def patch(patcher: pytest.MonkeyPatch) -> None:
        original = SqliteStore._commit

        def commit(self: SqliteStore, batch: Batch) -> None:
            assert self._connection is not None
            self._connection.set_trace_callback(lambda sql: kill_self() if text in sql else None)
            original(self, batch)

        patcher.setattr(SqliteStore, "_commit", commit)

    return patch


def before(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patcher: patcher.setattr(owner, name, lambda *_: kill_self())


def before_the_rename_of_the_copy(patcher: pytest.MonkeyPatch) -> None:
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name.startswith(".raft.db"):
            kill_self()
        return original(self, target)

    patcher.setattr(Path, "replace", replace)


DEATHS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the copy": before(recover_module, "_keep_copies"),
    "in the copy": before_the_rename_of_the_copy,
    "before the change": before(recover_module, "make_only_voter"),
    "at its begin": at_statement("BEGIN"),
    "at its entries": at_statement("INSERT INTO entries"),
    "at its head": at_statement("INSERT OR REPLACE INTO head"),
    "at its commit": at_statement("COMMIT"),
    "before the certificate": before(Identity, "renew_if_due"),
}


def recover_and_die(death: str, path: str) -> None:
    """Run in a process of its own."""
    DEATHS[death](pytest.MonkeyPatch())
    recover(Path(path), yes)


@pytest.mark.parametrize("death", DEATHS)
def test_killed_in_the_middle_it_is_the_old_journal_or_the_new_one(
    survivor: Survivor, death: str
) -> None:
    survivor.write()
    code = f"import sys; from {__name__} import recover_and_die as run; run(*sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", code, death, str(survivor.path)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(survivor.copies()) == (death not in ("before the copy", "in the copy"))
    machine, voters, _ = survivor.open()
    if death == "before the certificate":
        assert voters == {survivor.id}
        assert machine.state.incarnation > 0
        assert survivor.identity.incarnation == 0, "the next start makes the certificate"
    else:
        assert len(voters) == 3
        assert machine.state.incarnation == 0
        recover(survivor.path, yes)
        assert survivor.open()[1] == {survivor.id}


# The command line.


def test_without_a_terminal_it_wants_to_be_told(survivor: Survivor) -> None:
    survivor.write()
    result = CliRunner().invoke(app, ["recover", "--data-dir", str(survivor.path)])
    assert result.exit_code == 2
    assert "--yes" in result.output
    assert len(survivor.open()[1]) == 3
    result = CliRunner().invoke(app, ["recover", "--data-dir", str(survivor.path), "--yes"])
    assert result.exit_code == 0, result.output
    assert "only voter now" in result.stdout
    assert survivor.open()[1] == {survivor.id}
    result = CliRunner().invoke(app, ["recover", "--data-dir", str(survivor.path), "--yes"])
    assert result.exit_code == 1
    assert "ollamad: this node is the only voter already" in result.output


def test_ctrl_c_changes_nothing(survivor: Survivor, monkeypatch: pytest.MonkeyPatch) -> None:
    survivor.write()

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(recover_module, "describe", interrupt)
    result = CliRunner().invoke(app, ["recover", "--data-dir", str(survivor.path), "--yes"])
    assert result.exit_code == 1
    assert "interrupted; nothing was changed" in result.output
    assert len(survivor.open()[1]) == 3


def test_ctrl_c_does_not_stop_a_change_that_has_begun(
    survivor: Survivor, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor.write()
    real = recover_module.make_only_voter

    def interrupted(*args: Any) -> Batch:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(recover_module, "make_only_voter", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    result = CliRunner().invoke(app, ["recover", "--data-dir", str(survivor.path), "--yes"])
    assert result.exit_code == 0, result.output
    assert survivor.open()[1] == {survivor.id}
    assert signal.getsignal(signal.SIGINT) is handler
