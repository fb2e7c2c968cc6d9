"""The state machine behind the replicated log: bytes in, outcome bytes out, never an exception."""

from collections.abc import Callable

import msgspec

from ollamad.core.commands import APPLIED, Applied, Outcome, Proposal, Rejected, apply
from ollamad.core.state import ClusterState
from ollamad.wire.codec import MalformedMessage, decode, encode


class _OutcomeMessage(msgspec.Struct, frozen=True, array_like=True):
    code: str
    message: str


class Machine:
    """Holds the cluster's state and applies what the log says, on every node alike."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.state = ClusterState()
        self.on_change = on_change

    def apply(self, command: bytes) -> bytes:
        """Apply one proposal; the answer is for `decode_outcome`."""
        try:
            proposal = decode(command, Proposal)
        except MalformedMessage as error:
            # A newer node's command: every node of this version refuses it alike.
            return encode_outcome(Rejected("UNKNOWN_COMMAND", str(error)))
        outcome = apply(self.state, proposal)
        self.on_change()
        return encode_outcome(outcome)

    def snapshot(self) -> bytes:
        return encode(self.state)

    def restore(self, data: bytes) -> None:
        """Replace the state by a snapshot.

        Raises:
          MalformedMessage: it is not a snapshot that this version understands.
        """
        self.state = decode(data, ClusterState)
        self.on_change()


def encode_outcome(outcome: Outcome) -> bytes:
    if isinstance(outcome, Applied):
        return encode(_OutcomeMessage("", ""))
    return encode(_OutcomeMessage(outcome.code, outcome.message))


def decode_outcome(data: bytes) -> Outcome:
    message = decode(data, _OutcomeMessage)
    return Rejected(message.code, message.message) if message.code else APPLIED
