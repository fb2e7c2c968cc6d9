"""What can go wrong in consensus, by name."""


class RaftError(Exception):
    """Base of this package's errors."""


class NoQuorum(RaftError):
    """The command did not happen and will not: no leader with a majority took it in time."""


class OutcomeUnknown(RaftError):
    """The deadline passed, and the command may have happened or may still happen.

    Proposing the same bytes again is safe when they carry an id that `apply` remembers.
    """


class ChangeRefused(RaftError):
    """The voters were not changed; the message says why."""


class ApplyFailed(RaftError):
    """The state machine raised while it applied the command; nobody will apply it again."""


class CommandTooLarge(RaftError):
    """The command exceeds `ollamad.wire.raftwire.MAX_COMMAND_SIZE`."""


class NodeFailed(RaftError):
    """The node must not go on: its disk failed or a promise of Raft is broken. `run` raises it."""


class SafetyViolation(NodeFailed):
    """Another node's message contradicts what is committed here. Going on would lose data."""


class JournalFailed(NodeFailed):
    """The journal cannot be read or written; the message says what to do about it."""


class StateTooLarge(RaftError):
    """The state does not fit into a snapshot, so the log cannot be compacted."""


class DiskFull(RaftError):
    """There is no space for a batch: nothing of it was written, and it may be tried again."""


class WrongLibrary(RaftError):
    """PySyncObj is not the version whose internals this package fences."""
