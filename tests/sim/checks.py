"""What must hold in every step of every node: Raft's five properties, and what it promises.

Each check is O(1) for each event. A log is told by chain hashes: the hash at an entry covers all
entries up to it. So two logs that agree in the hash at one entry agree in all before it, and Log
Matching is that an (index, term) never has two hashes.

Knows no network and no time. A violation goes to `fail`, which ends the run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ollamad.core.ids import NodeId
from ollamad.raft.journal import LogEntry
from ollamad.wire.raftwire import REGULAR


class Violation(Exception):
    """A promise of consensus is broken. `rule` is its name, the same for the same kind."""

    def __init__(self, rule: str, details: str) -> None:
        super().__init__(rule, details)
        self.rule = rule

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(slots=True)
class Log:
    """The chain hashes of one node's log in memory."""

    host: str
    first: int = 0  # index of hashes[0]
    hashes: list[int] = field(default_factory=list)
    commit: int = 1  # as far as this process has said; entry 1 is the same everywhere
    applied: int = 1
    term: int = 0
    led_term: int = 0

    @property
    def last(self) -> int:
        return self.first + len(self.hashes) - 1

    def at(self, index: int) -> int | None:
        place = index - self.first
        return self.hashes[place] if 0 <= place < len(self.hashes) else None


class Checker:
    """Sees all nodes at once. `fail` gets the violations."""

    def __init__(self, fail: Callable[[Violation], None]) -> None:
        self._fail = fail
        self._chains: dict[tuple[int, int], int] = {}  # of every entry that any log ever had
        self._leaders: dict[int, Log] = {}  # by term
        self._votes: dict[tuple[str, int], str] = {}  # by voter and term: who got it
        self._pre_votes: dict[tuple[str, int], set[str]] = {}  # by candidate and proposed term
        self._requests: dict[tuple[str, str, int], Log] = {}  # by host, kind and number
        self._claims: dict[tuple[str, int], tuple[int, int]] = {}  # by candidate and term
        self._answers: dict[tuple[str, int], int] = {}  # by host and term: the last entry it has
        self._heirs: set[tuple[str, int]] = set()  # who was asked to take over, and from what term
        self._terms: dict[str, int] = {}  # the highest that a host told others
        self.committed: dict[int, int] = {}  # index: chain hash
        self._commands: dict[int, bytes] = {}  # index: committed command
        self._committed_commands: dict[bytes, int] = {}  # and the first index of each
        self.last_committed = 0
        self._last_in_term: dict[int, int] = {}  # the last entry that was committed in each term
        self._outcomes: dict[int, bytes] = {}
        self._first_outcomes: dict[bytes, bytes] = {}
        self._snapshots: dict[int, int] = {}  # hash of the state's bytes, by its last index
        self._refused: set[bytes] = set()

    def violated(self, rule: str, details: str) -> None:
        self._fail(Violation(rule, details))

    # Logs.

    def log_opened(self, log: Log, entries: list[LogEntry]) -> None:
        """A process read its journal."""
        if entries:
            self.log_begins(log, entries[0])
            for entry in entries[1:]:
                self.appended(log, entry)

    def log_begins(self, log: Log, entry: LogEntry) -> None:
        """A log now begins with this entry, the first of all or one out of a snapshot."""
        command, index, term = entry
        if index == 1:
            chain = self._chains.setdefault((1, term), hash((command, 1, term)))
        else:
            known = self._chains.get((index, term))
            if known is None:
                self.violated(
                    "log matching",
                    f"{log.host} begins with entry {index} of term {term}, which nobody made",
                )
                return
            chain = known
        log.first, log.hashes = index, [chain]

    def appended(self, log: Log, entry: LogEntry) -> None:
        command, index, term = entry
        if not log.hashes:
            self.log_begins(log, entry)
            return
        if index != log.last + 1:
            self.violated("log matching", f"{log.host} puts entry {index} after {log.last}")
            return
        chain = hash((log.hashes[-1], command, index, term))
        if self._chains.setdefault((index, term), chain) != chain:
            self.violated(
                "log matching",
                f"{log.host} has an entry {index} of term {term} with another history than "
                "another log has",
            )
        log.hashes.append(chain)

    def cut(self, log: Log, index: int) -> None:
        """A log loses the entry `index` and all after it."""
        held = log.at(index)
        if held is None:
            return
        if index <= log.commit:
            self.violated("committed is final", f"{log.host} deletes its committed entry {index}")
        elif self.committed.get(index) == held:
            self.violated(
                "committed is final",
                f"{log.host} deletes entry {index}, which is committed by others",
            )
        del log.hashes[index - log.first :]

    def compacted(self, log: Log, first: int, applied: int) -> None:
        """A log loses what is before `first`."""
        if first > applied:
            self.violated(
                "committed is final",
                f"{log.host} compacts up to {first} and has applied {applied} only",
            )
        del log.hashes[: first - log.first]
        log.first = first

    def installed(self, log: Log, before: Log, index: int) -> None:
        """A snapshot up to `index` took the place of the log `before`."""
        if log.at(index) != self.committed.get(index):
            self.violated(
                "state machine safety", f"{log.host} installs another state at {index} than others"
            )
        last = self.last_committed
        if last > log.last and last >= before.first and before.at(last) == self.committed[last]:
            self.violated(
                "committed is final", f"{log.host} loses entry {last} to a snapshot at {index}"
            )

    # Progress of one process.

    def observe(
        self,
        log: Log,
        term: int,
        commit: int,
        applied: int,
        electors: frozenset[NodeId] | None,
    ) -> None:
        """Look at a node after a step; `electors` are the voters if it leads."""
        if term != log.term:
            if term < log.term:
                self.violated("terms grow", f"{log.host} goes from term {log.term} to {term}")
            log.term = term
        if electors is not None and log.led_term != term:
            log.led_term = term
            self._leads(log, term, electors)
        if commit != log.commit:
            self._commits(log, commit)
        if applied != log.applied:
            if applied < log.applied:
                self.violated("applied once", f"{log.host} goes from {log.applied} to {applied}")
            log.applied = applied
        if applied > commit:
            self.violated(
                "state machine safety", f"{log.host} applied {applied}, committed is {commit}"
            )

    def led_to_commit(
        self, log: Log, index: int, electors: frozenset[NodeId], holders: frozenset[NodeId]
    ) -> None:
        """A leader of these voters says that an entry is committed, which these disks have."""
        if 2 * len(electors & holders) <= len(electors):
            self.violated(
                "promises are durable",
                f"{log.host} commits {index}: of {sorted(electors)} {sorted(holders)} have it",
            )

    def ended(self, log: Log, durable_term: int) -> None:
        """A process is gone. Of what it led without its disk and anybody knowing nothing is left.

        Only a voter alone leads a term at once; its next life may lead the same one otherwise.
        """
        if self._leaders.get(log.term) is not log or durable_term >= log.term:
            return
        if self._terms.get(log.host, 0) < log.term:
            for entry in [entry for entry in self._chains if entry[1] == log.term]:
                del self._chains[entry]

    def _leads(self, log: Log, term: int, electors: frozenset[NodeId]) -> None:
        known = self._leaders.get(term)
        self._leaders[term] = log
        # A voter alone may lead a term, die before it is on its disk, and lead it once more.
        if known is not None and known.host != log.host:
            self.violated("election safety", f"{known.host} and {log.host} lead term {term}")
        votes = [v for v in electors if v == log.host or self._votes.get((v, term)) == log.host]
        if 2 * len(votes) <= len(electors):
            self.violated(
                "election safety",
                f"{log.host} leads term {term} by the votes of {sorted(votes)} "
                f"of {sorted(electors)}",
            )
        # What later terms committed, a leader that learns of its election late cannot have. Earlier
        # entries follow from the chain; a log that begins later has it in a snapshot.
        last = max((i for t, i in self._last_in_term.items() if t < term), default=0)
        if last and last >= log.first and log.at(last) != self.committed[last]:
            self.violated(
                "leader completeness",
                f"{log.host} leads term {term} without the committed entry {last}; "
                f"it has {log.first} to {log.last}",
            )

    def _commits(self, log: Log, commit: int) -> None:
        if commit < log.commit:
            self.violated("commit index grows", f"{log.host} goes from {log.commit} to {commit}")
            return
        if commit > log.last:
            self.violated(
                "commit index grows", f"{log.host} commits {commit} of {log.last} entries"
            )
            return
        for index in range(max(log.commit + 1, log.first), commit + 1):
            self._commit(log, index)
        log.commit = commit

    def _commit(self, log: Log, index: int) -> None:
        chain = log.at(index)
        assert chain is not None
        if self.committed.setdefault(index, chain) != chain:
            self.violated(
                "state machine safety", f"{log.host} commits another entry {index} than others"
            )
        if index > self.last_committed:
            self.last_committed = self._last_in_term[log.term] = index

    def applies(self, log: Log, index: int, command: bytes, outcome: bytes) -> None:
        """The state machine of a node carried out a regular command."""
        # The step in which it was committed may not be over yet.
        for missing in range(max(log.commit + 1, log.first), index + 1):
            if log.at(missing) is not None:
                self._commit(log, missing)
        log.commit = max(log.commit, index)
        if self._commands.setdefault(index, command) != command:
            self.violated("state machine safety", f"{log.host} applies another command {index}")
        if self._outcomes.setdefault(index, outcome) != outcome:
            self.violated(
                "state machine safety", f"{log.host} gets another outcome of entry {index}"
            )
        if self._first_outcomes.setdefault(command, outcome) != outcome:
            self.violated("applied once", f"entry {index} repeats a command with another outcome")
        self._committed_commands.setdefault(command, index)
        if command in self._refused:
            self.violated(
                "refused is refused", f"entry {index} is a command that surely would not happen"
            )

    def snapshot(self, log: Log, index: int, state: bytes) -> None:
        """A node made or took over a snapshot of the state after that entry."""
        if self._snapshots.setdefault(index, hash(state)) != hash(state):
            self.violated(
                "state machine safety", f"the state of {log.host} at entry {index} differs"
            )

    # What hosts tell others; it binds the next process on the same disk.

    def asked(self, log: Log, request: str, number: int) -> None:
        """A process asks another one; the answer must not be taken for one to its successor."""
        asker = self._requests.setdefault((log.host, request, number), log)
        if asker is not log:
            self.violated(
                "requests have numbers of their own",
                f"{log.host} uses {number} for a {request} as its former life did",
            )

    def told_term(self, host: str, term: int) -> None:
        if term > self._terms.get(host, 0):
            self._terms[host] = term

    def starts_with_term(self, host: str, term: int) -> None:
        told = self._terms.get(host, 0)
        if term < told:
            self.violated("terms grow", f"{host} starts in term {term} and was in {told} before")

    def votes_by_log(self, log: Log, term: int, candidate: str, last: tuple[int, int]) -> None:
        """A host whose log ends with that term and index grants a vote."""
        claimed = self._claims.get((candidate, term), (0, 0))
        # Once it follows another term, or the candidate as its leader, its log may have changed.
        if log.term == term and last[0] < term and last > claimed:
            self.violated(
                "votes go to logs that lack nothing",
                f"{log.host} with {last} (term, index) votes for {candidate} with {claimed}",
            )

    def voted(self, host: str, term: int, candidate: str) -> None:
        known = self._votes.setdefault((host, term), candidate)
        if known != candidate:
            self.violated(
                "one vote a term", f"{host} votes in term {term} for {known} and {candidate}"
            )

    def answered(self, log: Log, term: int, index: int) -> None:
        """A host tells the leader of a term that it holds the same log up to that entry."""
        if index > self._answers.get((log.host, term), 0):
            self._answers[log.host, term] = index
        leader = self._leaders.get(term)
        if leader is None or leader.term != term or log.term != term or leader is log:
            return  # too late to compare
        theirs, ours = leader.at(index), log.at(index)
        if theirs != ours and not index < max(leader.first, log.first):
            self.violated(
                "answers are true",
                f"{log.host} answers {leader.host} in term {term} for entry {index}, "
                "which is another than the leader's",
            )

    def counted(self, log: Log, host: str, index: int) -> None:
        """A leader believes that another host has its log up to that entry."""
        if index > self._answers.get((host, log.term), 0):
            self.violated(
                "leaders count what they were told",
                f"{log.host} believes in term {log.term} that {host} has entry {index}, and it "
                f"said {self._answers.get((host, log.term), 0)} in that term",
            )

    def would_vote(self, voter: str, term: int, candidate: str) -> None:
        """A host says that it would vote for that one in that term."""
        self._pre_votes.setdefault((candidate, term), {candidate}).add(voter)

    def hands_over(self, heir: str, term: int) -> None:
        """A leader of that term asks another host to take over."""
        self._heirs.add((heir, term))

    def stands(
        self, candidate: str, term: int, voters: frozenset[NodeId], last: tuple[int, int]
    ) -> None:
        """A host begins an election; `last` are term and index of the last entry it claims."""
        self._claims[candidate, term] = last
        would = self._pre_votes.get((candidate, term), {candidate}) & voters
        if 2 * len(would) <= len(voters) and (candidate, term - 1) not in self._heirs:
            self.violated(
                "elections need consent",
                f"{candidate} stands in term {term}, and of {sorted(voters)} only {sorted(would)} "
                "would vote for it",
            )

    # What clients were told.

    def acknowledged(self, command: bytes) -> None:
        """A client was told that its command was applied."""
        if command not in self._committed_commands:
            self.violated("acknowledged is committed", "a command was acknowledged too early")

    def refused(self, command: bytes) -> None:
        """A client was told that its command did not happen and will not."""
        self._refused.add(command)
        if command in self._committed_commands:
            self.violated(
                "refused is refused",
                f"entry {self._committed_commands[command]} is a command whose client was told "
                "that it had not happened",
            )


def regular(command: bytes) -> bytes | None:
    """What a log entry has for the state machine."""
    return command[1:] if command[0] == REGULAR else None
