"""The state machine behind the replicated log: bytes in, outcome bytes out, never an exception."""

from collections.abc import Callable

import msgspec

from ollamad.core.commands import APPLIED, LEVEL, Applied, Outcome, Proposal, Rejected, apply
from ollamad.core.state import ClusterState
from ollamad.raft.errors import NodeFailed
from ollamad.wire.codec import MalformedMessage, decode, encode

# Raise it when an older version would read a state and understand something else. A new field
# needs a default for older states, and is refused by older versions by itself.
STATE_FORMAT = 1
FIELDS_OF_EVERY_STATE = {  # those of the first version
    *("cluster_id", "ca", "jwt_key", "settings", "members", "departed"),
    *("models", "users", "join_tokens", "revoked", "recent"),
}
_FORMAT_1 = msgspec.Raw(encode(1))  # of states that do not say


class NewerCommand(NodeFailed):
    """The log has a command that only a newer version can carry out."""


class _Level(msgspec.Struct, frozen=True):
    """The part of a proposal that every version can read."""

    level: int = 1


class _OutcomeMessage(msgspec.Struct, frozen=True, array_like=True):
    code: str
    message: str


class Machine:
    """Holds the cluster's state and applies what the log says, on every node alike."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.state = ClusterState()
        self.on_change = on_change

    def apply(self, command: bytes) -> bytes:
        """Apply one proposal; the answer is for `decode_outcome`.

        Raises:
          NewerCommand: this node must stop, because it would come to differ from newer ones.
        """
        try:
            level = decode(command, _Level).level
            if level > LEVEL:
                raise NewerCommand(
                    f"the cluster uses commands of level {level}, this version knows them up to "
                    f"level {LEVEL}; install the version that the other nodes have and start again"
                )
            proposal = decode(command, Proposal)
        except MalformedMessage as error:
            # Nonsense to every node of this level and above: all refuse it alike.
            return encode_outcome(Rejected("UNKNOWN_COMMAND", str(error)))
        outcome = apply(self.state, proposal)
        self.on_change()
        return encode_outcome(outcome)

    def snapshot(self) -> bytes:
        # The format stands beside the fields, where versions without one do not look.
        return encode({"format": STATE_FORMAT, **msgspec.structs.asdict(self.state)})

    def restore(self, data: bytes) -> None:
        """Replace the state by a snapshot.

        Raises:
          MalformedMessage: it is not a whole state, or one of a newer version; nothing changed.
        """
        fields = decode(data, dict[str, msgspec.Raw])
        format_ = decode(fields.pop("format", _FORMAT_1), int)
        unknown = fields.keys() - set(ClusterState.__struct_fields__)
        if format_ > STATE_FORMAT or unknown:
            # To drop what this version does not know would make this node differ from the others.
            what = f"format {format_}" + (f" with {', '.join(sorted(unknown))}" if unknown else "")
            raise MalformedMessage(
                f"the state has {what}; this version reads up to format {STATE_FORMAT}; "
                "start the newer version that wrote it"
            )
        if missing := FIELDS_OF_EVERY_STATE - fields.keys():
            raise MalformedMessage(f"not a whole state, it lacks {', '.join(sorted(missing))}")
        self.state = decode(data, ClusterState)
        self.on_change()


def encode_outcome(outcome: Outcome) -> bytes:
    if isinstance(outcome, Applied):
        return encode(_OutcomeMessage("", ""))
    return encode(_OutcomeMessage(outcome.code, outcome.message))


def decode_outcome(data: bytes) -> Outcome:
    message = decode(data, _OutcomeMessage)
    return Rejected(message.code, message.message) if message.code else APPLIED
