"""Consensus messages on the wire: what is sent arrives, what is malformed is refused."""

import contextlib
import pickle
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.wire import raftwire
from ollamad.wire.raftwire import (
    MAX_COMMAND_SIZE,
    MAX_FRAME_SIZE,
    Ack,
    Append,
    Entry,
    Forward,
    Install,
    MalformedMessage,
    Outdated,
    Placed,
    PreVote,
    PreVoteRequest,
    TakeOver,
    UnknownMessage,
    Vote,
    VoteRequest,
    decode,
    decode_change,
    decode_voters,
    encode,
    encode_change,
    encode_voters,
)

MESSAGES = [
    Append(3, 7, 8, 2, (Entry(2, b"\0x"), Entry(3, b"\1"))),
    Append(3, 7, 8, 2),
    Install(3, 0, 4, bytes(32), b"data"),
    Ack(3, 9, True, False),
    Ack(3, 9, False, False, 262144),
    Outdated(4),
    VoteRequest(3, 8, 2),
    Vote(3),
    PreVoteRequest(4, 8, 2),
    PreVote(3, 4, True),
    TakeOver(3),
    Forward(1 << 62, b"\0x"),
    Placed(5, 9, 3),
    Placed(5, error=4),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: raftwire.Message) -> None:
    assert decode(encode(message)) == message


def array(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        array("append"),
        array("ack", "3", 9, True, False),
        array("ack", -1, 9, True, False),
        array("ack", 1 << 60, 9, True, False),
        array("ack", 3, 9, 1, False),
        array("nonsense", 3),
        array(3, 3),
        msgspec.msgpack.encode({"type": "ack"}),
        array("append", 3, 0, 1, 1, [[1, b""]]),  # a command without a kind
        array("append", 3, 0, 1, 1, [[1, b"\x03\x80"]]),  # the library's VERSION kind: a pickle
        array("append", 3, 0, 1, 2, [[1, b"\0"]]),  # a term that goes down
        array("append", 1, 0, 1, 1, [[2, b"\0"]]),  # an entry newer than its leader
        array("append", 3, 0, 1, 1, [[1, b"\2" + pickle.dumps(["add", "x"])]]),
        array("append", 3, 0, 1, 1, [[1, b"\0" + bytes(MAX_COMMAND_SIZE + 1)]]),
        array("forward", 1, b"\1"),  # only a leader makes no-ops
        array("forward", 1, b"\4\x92\x91\xa1a\x90"),  # nobody would vote
        array("install", 3, 1, 4, bytes(32), b"data"),
        array("install", 3, 0, 4, bytes(31), b"data"),
        array("placed", 1, 1, 1, 8),
        pickle.dumps({"type": "append_entries"}),
        bytes(MAX_FRAME_SIZE + 1),
    ],
)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(frame)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode(data)


@given(st.sampled_from(MESSAGES), st.integers(0, 2**32))
def test_a_damaged_message_is_a_message_or_malformed(message: raftwire.Message, seed: int) -> None:
    rng = random.Random(seed)
    frame = bytearray(encode(message))
    frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    del frame[rng.randrange(len(frame)) + 1 :]
    with contextlib.suppress(MalformedMessage):
        decode(bytes(frame))


def test_a_message_of_a_kind_that_is_not_known_is_told_apart_from_a_malformed_one() -> None:
    for frame in (array("gossip", 1, {"a": []}), array("gossip")):
        with pytest.raises(UnknownMessage, match="'gossip'"):
            decode(frame)
    for frame in (array("vote"), array("append", 1), array(7, 1), array(), array("x" * 33), b"x"):
        with pytest.raises(MalformedMessage) as caught:
            decode(frame)
        assert caught.type is MalformedMessage


def test_a_message_of_a_newer_version_may_have_more_fields() -> None:
    assert decode(array("ack", 3, 9, True, False, None, "more")) == Ack(3, 9, True, False)
    assert decode(array("ack", 3, 9, True, False)) == Ack(3, 9, True, False)


def test_voters() -> None:
    voters = frozenset({NodeId("QmA"), NodeId("QmB")})
    assert decode_voters(encode_voters(voters)) == voters
    assert encode_voters(voters) == encode_voters(frozenset(sorted(voters, reverse=True)))
    assert decode_voters(b"\0anything") is None


@pytest.mark.parametrize(
    "voters", [[], ["a", "a"], ["a b"], [""], [1], "ab", ["x" * 65], [str(n) for n in range(10)]]
)
def test_bad_voters(voters: object) -> None:
    with pytest.raises(MalformedMessage):
        decode_voters(bytes([raftwire.MEMBERSHIP]) + msgspec.msgpack.encode(voters))
    for lists in ([voters, ["a"]], [["a"], voters]):
        change = bytes([raftwire.VOTER_CHANGE]) + msgspec.msgpack.encode(lists)
        for read in (decode_change, lambda c: decode(encode(Forward(1, c)))):
            with pytest.raises(MalformedMessage):
                read(change)


def test_a_change_of_the_voters_is_asked_for_with_its_base_and_kept_without() -> None:
    two, three = frozenset(map(NodeId, "ab")), frozenset(map(NodeId, "abc"))
    command = encode_change(two, three)
    asked = decode_change(command)
    assert asked is not None
    assert (asked.base, asked.wanted) == (("a", "b"), ("a", "b", "c"))
    assert decode(encode(Forward(1, command))) == Forward(1, command)
    assert raftwire.log_entry(command) == encode_voters(three)
    assert raftwire.log_entry(b"\0x") == b"\0x"
    for message in (
        Forward(1, encode_voters(three)),  # nobody says a whole list to the leader,
        Append(1, 0, 0, 0, (Entry(1, command),)),  # and no leader has a request in its log
    ):
        with pytest.raises(MalformedMessage, match="kind"):
            decode(encode(message))
