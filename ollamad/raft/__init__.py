"""Consensus: PySyncObj behind a fence. Nothing else imports pysyncobj.

How a daemon uses it (one `RaftNode` and one `Links` for each daemon, in its trio loop):

    links = Links(dial)                     # async dial(node_id) -> authenticated stream
    node = RaftNode(self_id, SqliteStore(path), machine, links.send, observer=on_status)
    if not await node.open():               # reads the journal, brings `machine` up to date
        node.bootstrap()                    # the founder, or for a joiner:
        node.start_as_learner(voters)       # ids of the voters, as a member told them
    await nursery.start(node.run)           # raises NodeFailed when it must not go on
    await nursery.start(links.run, node)
    links.set_peers(ids)                    # all other members, again at each change of them
    await links.serve(stream, peer_id)      # for each incoming, authenticated stream

    await node.propose(command, timeout_s)  # on any node -> what apply returned here;
                                            # NoQuorum | OutcomeUnknown | ApplyFailed
    node.leader, node.is_leader, node.term, node.voters, node.status, node.has_quorum
    node.applied_index, await node.wait_changed()
    node.disk_full                          # it stands aside until there is space
    node.caught_up(id)                      # on the leader: may that learner become a voter?
    await node.add_voter(id, timeout_s)     # from any node; ChangeRefused
    await node.remove_voter(id, timeout_s)  # from any node; a leader hands over first
    await node.transfer_leadership(timeout_s)

`machine` has apply(bytes) -> bytes (must not raise), snapshot() -> bytes, restore(bytes). A
joiner follows as a learner as soon as members have a link to it, and stays one until
`add_voter`. Shut down by cancelling `run`; it writes what is left and closes the journal.
"""

from ollamad.raft.errors import (
    ApplyFailed,
    ChangeRefused,
    CommandTooLarge,
    JournalFailed,
    NodeFailed,
    NoQuorum,
    OutcomeUnknown,
    RaftError,
    SafetyViolation,
    WrongLibrary,
)
from ollamad.raft.links import Links
from ollamad.raft.node import RaftNode, RaftStatus, StateMachine
from ollamad.raft.private import Timing
from ollamad.raft.sqlite_store import SqliteStore

__all__ = [
    "ApplyFailed",
    "ChangeRefused",
    "CommandTooLarge",
    "JournalFailed",
    "Links",
    "NoQuorum",
    "NodeFailed",
    "OutcomeUnknown",
    "RaftError",
    "RaftNode",
    "RaftStatus",
    "SafetyViolation",
    "SqliteStore",
    "StateMachine",
    "Timing",
    "WrongLibrary",
]
