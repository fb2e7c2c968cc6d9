"""Journals in which one node is the only voter: of a survivor, and of a restored backup.

`make_only_voter` rewrites the journal of a node after the majority is lost for good.

All entries of the log count as committed, the tail included, as HashiCorp's `RecoverCluster` has
it and etcd's `--force-new-cluster` has not: the commit index on disk is an old hint here, and what
a lost majority had acknowledged cannot be known. An entry that was never acknowledged does less
harm than one that is lost. All that changes is in two new entries, so that one transaction of the
store carries it out or does not.

Does not know who else is left; asking them comes first.
"""

from dataclasses import dataclass
from typing import Protocol

import msgspec

from ollamad.core.ids import NodeId
from ollamad.raft.journal import (
    SNAPSHOT_FORMAT,
    Batch,
    Journal,
    Snapshot,
    Stored,
    pack_snapshot,
    unpack_snapshot,
)
from ollamad.wire.raftwire import NO_OP, REGULAR, encode_voters

# More elections than the lost voters can have held since this node heard of their term.
TERM_STEP = 1 << 20


class Machine(Protocol):
    """The part of the state machine that is needed to read a log."""

    def apply(self, command: bytes) -> bytes: ...
    def restore(self, data: bytes) -> None: ...


class LogEnd(msgspec.Struct, frozen=True, order=True):
    """How far a log goes; as in elections, the greater one has more (Raft, 5.4.1)."""

    term: int  # of the last entry
    index: int


@dataclass(frozen=True, slots=True)
class LogView:
    """What a whole log says, committed or not."""

    voters: frozenset[NodeId]
    term: int  # the latest that the node knew
    end: LogEnd


def read_log(stored: Stored, machine: Machine) -> LogView:
    """Bring a blank state machine to the end of a log that has entries.

    Raises:
      JournalFailed: the journal is corrupt.
      MalformedMessage: the snapshot is not one that this machine understands.
    """
    journal = Journal(stored)
    if journal.snapshot_blob is not None:
        machine.restore(unpack_snapshot(journal.snapshot_blob).state)
    for command, index, _ in stored.entries:
        if index > journal.snapshot_index and command[0] == REGULAR:
            machine.apply(command[1:])
    _, last_index, last_term = stored.entries[-1]
    return LogView(journal.voters, stored.term, LogEnd(last_term, last_index))


def make_only_voter(view: LogView, self_id: NodeId, term: int, command: bytes) -> Batch:
    """The change of the journal that makes this node the only voter and then runs a command.

    `term` is the latest that any node is known to have been in.
    """
    term = max(term, view.term) + TERM_STEP
    index = view.end.index + 1
    entries = [
        (encode_voters(frozenset({self_id})), index, term),
        (bytes([REGULAR]) + command, index + 1, term),
    ]
    return Batch(add=entries, term=term, commit_index=index + 1)


# A blank log has one entry. The first of a log that begins with a state must be later, so that
# whoever joins is sent the state, and not the few entries from there on.
FIRST_INDEX = 16


def begin_with(state: bytes, self_id: NodeId) -> Batch:
    """The first change of a blank journal: it begins with that state, and this node alone votes.

    Raises:
      StateTooLarge: no node would accept the state.
    """
    term = 1
    previous = (bytes([NO_OP]), FIRST_INDEX - 1, term)
    entry = (encode_voters(frozenset({self_id})), FIRST_INDEX, term)
    snapshot = Snapshot(SNAPSHOT_FORMAT, previous, entry, (self_id,), state)
    return Batch(
        add=[previous, entry],
        snapshot=pack_snapshot(snapshot),
        term=term,
        commit_index=FIRST_INDEX,
    )
