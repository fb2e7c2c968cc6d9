"""Breaks the product on purpose, a rule at a time, to see that the simulator finds it.

    python -m tests.sim.mutants                    # all, 300 seeds each: takes a long time
    python -m tests.sim.mutants vote --seeds 100   # those with "vote" in the name

Each mutant is a private copy of the package with one text replaced. A rule whose mutant no seed
finds is a rule that the simulator does not test.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pysyncobj

ROOT = Path(__file__).parents[2]
SURVIVED = 1
SHOWN_SEEDS = 3  # of those that found a mutant


@dataclass(frozen=True, slots=True)
class Mutant:
    """One rule that is broken: in a file, a text that occurs once is replaced."""

    name: str
    file: str  # below ollamad/, or of pysyncobj
    old: str
    new: str


MUTANTS = (
    Mutant(
        "a vote is counted twice",
        "raft/fence.py",
        "if sender in voters or sender not in self._journal.voters:",
        "if sender not in self._journal.voters:",
    ),
    Mutant(
        "a vote for whoever asks, whatever its log",
        "raft/fence.py",
        '"last_log_index": last_index,\n                        "last_log_term": last_term,',
        '"last_log_index": 1 << 40,\n                        "last_log_term": 1 << 40,',
    ),
    Mutant(
        "a vote is not durable",
        "raft/transport.py",
        'self.emit_synced(to, Vote(message["term"]))',
        'self.emit(to, Vote(message["term"]), 0)',
    ),
    Mutant(
        "an entry of a term that may begin anew is named",
        "raft/transport.py",
        "self.emit(to, _to_placed(message), self._journal.term_generation)",
        "self.emit(to, _to_placed(message), 0)",
    ),
    Mutant(
        "a change of the voters is sent before its leader has it",
        "raft/transport.py",
        "self.emit_synced(to, append)",
        "self.emit(to, append, self._journal.term_generation)",
    ),
    Mutant(
        "a vote is forgotten at the next start",
        "raft/journal.py",
        "batch.term, batch.voted_for = self._term, self._voted_for",
        "batch.term, batch.voted_for = self._term, None",
    ),
    Mutant(
        "an election without a pre-vote",
        "raft/fence.py",
        "        core.lose_leader()\n        self._ask_pre_votes()\n        return False",
        "        return True",
    ),
    Mutant(
        "consent outlives its term",
        "raft/fence.py",
        "has_won = self._won_pre_vote_for == core.term() + 1",
        "has_won = bool(self._won_pre_vote_for)",
    ),
    Mutant(
        "a leader without a majority stays",
        "raft/private.py",
        "leaderFallbackTimeout=timing.election_max_s,",
        "leaderFallbackTimeout=30.0,",
    ),
    Mutant(
        "an answer of another term counts",
        "raft/fence.py",
        "if message.term != core.term() or core.state() != LEADER:",
        "if core.state() != LEADER:",
    ),
    Mutant(
        "an answer says more than was proved",
        "raft/transport.py",
        "next_index = self.proved + 1",
        "next_index = self._journal[-1][1] + 1",
    ),
    Mutant(
        "an answer before the sync",
        "raft/transport.py",
        "self.emit_synced(to, self._to_ack(message))",
        "self.emit(to, self._to_ack(message), 0)",
    ),
    Mutant(
        "a leader counts what its own disk lacks",
        "raft/private.py",
        "if count == 1 and self.state() == LEADER and (fromIDx or 0) > self.journal.durable_index:",
        "if False:",
    ),
    Mutant(
        "truncation without a conflict",
        "raft/fence.py",
        "    while held < len(entries) and journal",
        "    while False and journal",
    ),
    Mutant(
        "a commit index beyond the proof",
        "raft/fence.py",
        "return Append(message.term, min(message.commit_index, proved), last, last_term)",
        "return Append(message.term, message.commit_index, last, last_term)",
    ),
    Mutant(
        "entries of earlier terms are committed by counting",
        "pysyncobj/syncobj.py",
        "if commitTerm != self.__raftCurrentTerm:",
        "if False:",
    ),
    Mutant(
        "a leader of an earlier term is heard",
        "raft/fence.py",
        "        if term < core.term():\n",
        "        if False:\n",
    ),
    Mutant(
        "a refusal undoes one that went back further",
        "raft/private.py",
        "sending[node] = min(before, next_index)",
        "pass",
    ),
    Mutant(
        "a snapshot keeps what does not follow it",
        "raft/journal.py",
        "if self.term_at(snapshot.index) == snapshot.entry[2]:",
        "if self.term_at(snapshot.index) is not None:",
    ),
    Mutant(
        "a snapshot drops what follows it",
        "raft/journal.py",
        "if self.term_at(snapshot.index) == snapshot.entry[2]:",
        "if False:",
    ),
    Mutant(
        "an old snapshot is taken over",
        "raft/fence.py",
        "is_news = snapshot.index > core.commit_index()",
        "is_news = True",
    ),
    Mutant(
        "a snapshot proves the entries held",
        "raft/fence.py",
        '"commit_index": 0,\n                "serialized": None,',
        '"commit_index": core.last_index(),\n                "serialized": None,',
    ),
    Mutant(
        "a snapshot without its voters",
        "raft/journal.py",
        "        self._base_voters = frozenset(snapshot.voters)\n        self.snapshot_blob = self",
        "        self.snapshot_blob = self",
    ),
    Mutant(
        "a membership change before an entry of the leader's term",
        "raft/fence.py",
        "if core.commit_index() < max(journal.membership_index, core.term_start_index()):",
        "if core.commit_index() < journal.membership_index:",
    ),
    Mutant(
        "two membership changes at a time",
        "raft/fence.py",
        "if core.commit_index() < max(journal.membership_index, core.term_start_index()):",
        "if core.commit_index() < core.term_start_index():",
    ),
    Mutant(
        "a voter goes though the majority that remains is not there",
        "raft/fence.py",
        "if not _is_majority(self._able_to_commit() | {self._self_id}, voters):",
        "if False:",
    ),
    Mutant(
        "who was heard is who was elected by",
        "raft/fence.py",
        "if not _is_majority(self._able_to_commit() | {self._self_id}, voters):",
        "if not self.has_quorum():",
    ),
    Mutant(
        "the clock moves within a step",
        "raft/private.py",
        "return self._clock() if self._now is None else self._now",
        "return self._clock()",
    ),
    Mutant(
        "a disk that hangs keeps its leader",
        "raft/node.py",
        "if hanging_s > self._timing.election_max_s and not self._journal.is_blocked:",
        "if False:",
    ),
    Mutant(
        "a leader leads on without space for its journal",
        "raft/node.py",
        'self._stand_aside(f"{error}", "there is; free some, it need not be restarted")',
        "pass",
    ),
    Mutant(
        "a membership without voters",
        "raft/node.py",
        "            if not wanted:\n",
        "            if False:\n",
    ),
    Mutant(
        "frames get into the last words",
        "raft/node.py",
        'self._end(NodeFailed("this node was stopped"))',
        "pass",
    ),
    Mutant(
        "a truncated membership stays",
        "raft/journal.py",
        "while self._memberships and self._memberships[-1][0] >= index:",
        "while False:",
    ),
    Mutant(
        "a command applies twice",
        "core/commands.py",
        "if (seen := state.recent.get(proposal.id)) is not None:",
        "if (seen := state.recent.get(proposal.id)) is not None and False:",
    ),
    Mutant(
        "a command whose outcome is unknown is called refused",
        "raft/node.py",
        "        if may_happen:\n            raise OutcomeUnknown",
        "        if False:\n            raise OutcomeUnknown",
    ),
    Mutant(
        "request numbers begin anew with each start",
        "raft/private.py",
        "self._SyncObj__commandsLocalCounter = rng.getrandbits(62)",
        "self._SyncObj__commandsLocalCounter = 0",
    ),
    Mutant(
        "a read without confirmation",
        "raft/reads.py",
        "self._waiting.append(_Read(self._round + 1, core.commit_index(), finish))",
        "finish(core.commit_index())",
    ),
    Mutant(
        "a read before an entry of the leader's term",
        "raft/reads.py",
        "knows = core.commit_index() >= core.term_start_index()",
        "knows = True",
    ),
    Mutant(
        "a read confirmed by a round before it",
        "raft/reads.py",
        "self._waiting.append(_Read(self._round + 1, core.commit_index(), finish))",
        "self._waiting.append(_Read(self._round, core.commit_index(), finish))",
    ),
    Mutant(
        "a read does not wait for what it must see",
        "raft/node.py",
        "while self.applied_index < index and self._failure is None:",
        "while False:",
    ),
    Mutant(
        "entries in a snapshot are applied again",
        "raft/private.py",
        "self._SyncObj__raftLastApplied = snapshot_index",
        "self._SyncObj__raftLastApplied = 1",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="a part of the name")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--enough", type=int, default=0, help="stop after so many failures")
    parser.add_argument("--explain", action="store_true", help="show the first failure")
    options = parser.parse_args()
    survived = 0
    for mutant in MUTANTS:
        if options.name in mutant.name:
            found = _try(mutant, options)
            survived += not found
    return SURVIVED if survived else 0


def _try(mutant: Mutant, options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        _copy(copy)
        problem = _mutate(copy, mutant)
        if problem:
            print(f"{mutant.name:60} {problem}", flush=True)
            return False
        command = [sys.executable, "-m", "tests.sim", "--seeds", str(options.seeds)]
        command += ["--first", str(options.first), "--jobs", str(options.jobs)]
        command += ["--enough", str(options.enough), "--shrunk", str(int(options.explain))]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    rules = sorted(re.findall(r"^seed \d+: ([^:]*):", run.stdout, re.MULTILINE))
    summary = ", ".join(f"{rule} {rules.count(rule)}" for rule in sorted(set(rules)))
    done = re.search(r"of (\d+) seeds failed", run.stdout)
    if done is None:
        print(f"{mutant.name:60} broke the simulator: {run.stderr[-300:]}", flush=True)
        return False
    first = ", ".join(re.findall(r"^seed (\d+):", run.stdout, re.MULTILINE)[:SHOWN_SEEDS])
    found = f"{summary} (seeds {first})" if rules else "SURVIVED"
    print(f"{mutant.name:60} {len(rules):4} of {done[1]}: {found}", flush=True)
    if options.explain:
        print(run.stdout)
    return bool(rules)


def _copy(to: Path) -> None:
    for package in ("ollamad", "tests"):
        shutil.copytree(
            ROOT / package, to / package, ignore=shutil.ignore_patterns("__pycache__", "*.gguf")
        )
    shutil.copytree(Path(pysyncobj.__file__).parent, to / "pysyncobj")


def outdated(mutant: Mutant, packages: Path) -> str | None:
    """Why that mutant cannot be made of the packages in a directory; None if it can."""
    found = _path(mutant, packages).read_text().count(mutant.old)
    return None if found == 1 else f"its text occurs {found} times in {mutant.file}: adapt it"


def _mutate(copy: Path, mutant: Mutant) -> str | None:
    if (reason := outdated(mutant, copy)) is None:
        path = _path(mutant, copy)
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
    return reason


def _path(mutant: Mutant, packages: Path) -> Path:
    below = packages if mutant.file.startswith("pysyncobj/") else packages / "ollamad"
    return below / mutant.file


if __name__ == "__main__":
    sys.exit(main())
