"""The consensus messages on the wire, so that nothing unchecked reaches the Raft library.

One frame is one msgpack array: a tag and the fields. `decode` gives a message whose types and
bounds hold, or raises `MalformedMessage`; what a message means is for `ollamad.raft` to judge.
Fields may be added at the end with defaults, and kinds of messages: a node ignores those that it
does not know. The sender is not in here: the link knows it.
"""

from typing import Annotated, get_args

import msgspec

from ollamad.core.ids import NodeId
from ollamad.wire.codec import MAX_REASON

MIB = 1 << 20
MAX_COMMAND_SIZE = 1 * MIB  # bytes of one log entry; the state is small, blobs go elsewhere
# Short enough not to hold up heartbeats and votes behind some of them, on slow links too: bytes
# after which a batch of entries is closed (see Append), and of a part of a snapshot.
APPEND_BATCH_SIZE = 256 * 1024
SNAPSHOT_CHUNK_SIZE = 256 * 1024
MAX_SNAPSHOT_SIZE = 256 * MIB  # bytes; held in memory by sender and receiver
MAX_FRAME_SIZE = 4 * MIB  # a batch may go over its size by one entry, and has 16 bytes an entry
MAX_ENTRIES = 16384  # entries in one message, however small they are
MAX_VOTERS = 9  # more voters make every commit slower and save nothing

# First byte of every log entry, as PySyncObj numbers its kinds of commands.
REGULAR = 0  # the rest is opaque to consensus
NO_OP = 1  # what a new leader begins with
MEMBERSHIP = 2  # the rest is the whole list of voters, in msgpack
# Never in a log: asks the leader for an entry of the kind before. The rest is a `VoterChange`.
VOTER_CHANGE = 4  # 3 is the library's change of versions, which nobody may ask for

Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Term = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
RequestId = Annotated[int, msgspec.Meta(ge=0)]
CommandBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_COMMAND_SIZE + 1)]
Voters = Annotated[
    tuple[Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9]{1,64}$")], ...],
    msgspec.Meta(min_length=1, max_length=MAX_VOTERS),
]


class VoterChange(msgspec.Struct, frozen=True, array_like=True):
    """Have `wanted` vote in the place of `base`.

    The leader refuses unless `base` are its voters at that moment. With `wanted` alone, a request
    that was late or sent twice would undo what others have changed since it was made.
    """

    base: Voters
    wanted: Voters


class MalformedMessage(ValueError):
    """The bytes are not a message of this protocol; whoever sent them is not to be trusted."""


class UnknownMessage(MalformedMessage):
    """A message of a kind that this version does not know: to be ignored, as if it were lost."""


Kind = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A log entry without its index, which follows from its place."""

    term: Term
    command: CommandBytes


class Append(msgspec.Struct, frozen=True, array_like=True, tag="append"):
    """The leader's entries after `prev_index`, or, without entries, its heartbeat."""

    term: Term
    commit_index: Index
    prev_index: Index
    prev_term: Term
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=MAX_ENTRIES)] = ()


class Install(msgspec.Struct, frozen=True, array_like=True, tag="install"):
    """A part of the leader's snapshot, or, without data, word that it comes later."""

    term: Term
    offset: Index
    total: Annotated[int, msgspec.Meta(ge=0, le=MAX_SNAPSHOT_SIZE)]
    sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]  # of the whole
    data: Annotated[bytes, msgspec.Meta(max_length=SNAPSHOT_CHUNK_SIZE)]


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """An answer to Append or Install: with `success`, all before `next_index` is held."""

    term: Term
    next_index: Index
    success: bool
    reset: bool  # go on from next_index, be it lower than what was sent already
    snapshot_held: Index | None = None  # bytes of the snapshot, to a part of which this answers


class Outdated(msgspec.Struct, frozen=True, array_like=True, tag="outdated"):
    """An answer to a leader of a term that is over."""

    term: Term


class VoteRequest(msgspec.Struct, frozen=True, array_like=True, tag="vote?"):
    """A candidate asks for a vote in `term`."""

    term: Term
    last_index: Index
    last_term: Term


class Vote(msgspec.Struct, frozen=True, array_like=True, tag="vote"):
    """The sender's vote in `term`. A refusal is silent."""

    term: Term


class PreVoteRequest(msgspec.Struct, frozen=True, array_like=True, tag="prevote?"):
    """Would you vote for me in that term, if I started it? Changes nothing at either side."""

    proposed_term: Term
    last_index: Index
    last_term: Term


class PreVote(msgspec.Struct, frozen=True, array_like=True, tag="prevote"):
    """The answer, with the term that the sender is in."""

    term: Term
    proposed_term: Term
    granted: bool


class TakeOver(msgspec.Struct, frozen=True, array_like=True, tag="takeover"):
    """The leader asks the receiver to be elected in its place at once."""

    term: Term


class Forward(msgspec.Struct, frozen=True, array_like=True, tag="forward"):
    """A proposal on its way to the leader: its kind in the first byte, then the rest."""

    request_id: RequestId
    command: CommandBytes


class Placed(msgspec.Struct, frozen=True, array_like=True, tag="placed"):
    """Where the leader put a forwarded proposal, or with `error` why it did not."""

    request_id: RequestId
    index: Index = 0
    term: Term = 0
    error: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0


class AskRead(msgspec.Struct, frozen=True, array_like=True, tag="read?"):
    """Which entry must be applied so that a read that began before this is current?"""

    request_id: RequestId


class ReadAt(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """That entry's index; 0: not known now, ask again."""

    request_id: RequestId
    index: Index = 0


class ReadProbe(msgspec.Struct, frozen=True, array_like=True, tag="probe"):
    """The leader asks whether it still leads; `round` grows within its term."""

    term: Term
    round: Index


class ReadProof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    """The sender was in no later term when it got that probe."""

    term: Term
    round: Index


Message = (
    Append
    | Install
    | Ack
    | Outdated
    | VoteRequest
    | Vote
    | PreVoteRequest
    | PreVote
    | TakeOver
    | Forward
    | Placed
    | AskRead
    | ReadAt
    | ReadProbe
    | ReadProof
)

KINDS = frozenset(str(kind.__struct_config__.tag) for kind in get_args(Message))

_encoder = msgspec.msgpack.Encoder()
_parts_decoder = msgspec.msgpack.Decoder(tuple[msgspec.Raw, ...])
_kind_decoder = msgspec.msgpack.Decoder(Kind)
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_voters_decoder: msgspec.msgpack.Decoder[tuple[NodeId, ...]] = msgspec.msgpack.Decoder(Voters)
_change_decoder = msgspec.msgpack.Decoder(VoterChange)


def encode(message: Message) -> bytes:
    """The frame's bytes for that message."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Message:
    """Read one frame.

    Raises:
      UnknownMessage: another version may know its kind.
      MalformedMessage: types, bounds, an entry's kind or the order of terms are wrong.
    """
    if len(frame) > MAX_FRAME_SIZE:
        raise MalformedMessage(f"a frame of {len(frame)} bytes; the limit is {MAX_FRAME_SIZE}")
    try:
        message = _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if (kind := _kind_of(frame)) is not None and kind not in KINDS:
            raise UnknownMessage(f"a message of kind {kind!r}") from None
        raise MalformedMessage(str(error)[:MAX_REASON]) from None
    match message:
        case Append(term, _, _, prev_term, entries):
            last_term = prev_term
            for entry in entries:
                if entry.term < last_term:
                    raise MalformedMessage("terms go down within the entries")
                last_term = entry.term
                _check_kind(entry.command, (REGULAR, NO_OP, MEMBERSHIP))
            if last_term > term:
                raise MalformedMessage("an entry's term is above its leader's")
        case Forward(_, command):
            _check_kind(command, (REGULAR, VOTER_CHANGE))
        case Install(_, offset, total, _, data) if offset + len(data) > total:
            raise MalformedMessage("a part reaches past the end of its snapshot")
        case _:
            pass
    return message


def _kind_of(frame: bytes | memoryview) -> str | None:
    try:
        parts = _parts_decoder.decode(frame)
        return _kind_decoder.decode(parts[0]) if parts else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def encode_voters(voters: frozenset[NodeId]) -> bytes:
    """The log entry that makes these nodes the voters."""
    return bytes([MEMBERSHIP]) + _encoder.encode(sorted(voters))


def decode_voters(command: bytes) -> frozenset[NodeId] | None:
    """The voters that a log entry sets; None for an entry of another kind.

    Raises:
      MalformedMessage: it is a membership entry, but not a valid one.
    """
    if command[0] != MEMBERSHIP:
        return None
    try:
        voters = _voters_decoder.decode(memoryview(command)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"membership entry: {error}") from None
    if len(set(voters)) != len(voters):
        raise MalformedMessage("membership entry: a voter is named twice")
    return frozenset(voters)


def encode_change(base: frozenset[NodeId], wanted: frozenset[NodeId]) -> bytes:
    """The request for that change of the voters."""
    change = VoterChange(tuple(sorted(base)), tuple(sorted(wanted)))
    return bytes([VOTER_CHANGE]) + _encoder.encode(change)


def decode_change(command: bytes) -> VoterChange | None:
    """The change that is asked for; None for a command of another kind.

    Raises:
      MalformedMessage: it is such a request, but not a valid one.
    """
    if command[0] != VOTER_CHANGE:
        return None
    try:
        change = _change_decoder.decode(memoryview(command)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"change of the voters: {error}") from None
    for voters in (change.base, change.wanted):
        if len(set(voters)) != len(voters):
            raise MalformedMessage("change of the voters: a voter is named twice")
    return change


def log_entry(command: bytes) -> bytes:
    """What goes into the log for a command that the leader has accepted."""
    change = decode_change(command)
    return command if change is None else encode_voters(frozenset(map(NodeId, change.wanted)))


def _check_kind(command: bytes, kinds: tuple[int, ...]) -> None:
    if command[0] not in kinds:
        raise MalformedMessage(f"a command of kind {command[0]}")
    decode_voters(command)
    decode_change(command)
