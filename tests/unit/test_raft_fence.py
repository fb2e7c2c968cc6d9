"""Each fence alone, against the paper: what the library is told, and what leaves."""

import random
from typing import Any

import pytest

from ollamad.core.ids import NodeId
from ollamad.raft.errors import SafetyViolation
from ollamad.raft.fence import narrow
from ollamad.raft.journal import SNAPSHOT_FORMAT, Snapshot, pack_snapshot
from ollamad.raft.private import CANDIDATE, FOLLOWER, LEADER, QUEUE_FULL, QUEUE_SIZE
from ollamad.wire.raftwire import (
    SNAPSHOT_CHUNK_SIZE,
    Ack,
    Append,
    Entry,
    Forward,
    Install,
    MalformedMessage,
    Outdated,
    PreVote,
    PreVoteRequest,
    TakeOver,
    Vote,
    VoteRequest,
    encode_change,
    encode_voters,
)
from tests.fakes.raft_solo import NO_OP_COMMAND, Solo, command


def entries(first: int, terms: str) -> tuple[Entry, ...]:
    return tuple(
        Entry(int(term), command(f"{index}@{term}")) for index, term in enumerate(terms, first)
    )


def append(term: int, prev: int, prev_term: int, terms: str = "", commit: int = 0) -> Append:
    return Append(term, commit, prev, prev_term, entries(prev + 1, terms))


# Append entries (§5.3). Logs are the terms of entries 3, 4, 5, …


@pytest.mark.parametrize(
    ("log", "message", "after", "answer"),
    [
        pytest.param("11", append(1, 4, 1, "1"), "111", Ack(1, 6, True, False), id="new"),
        pytest.param("11", append(1, 4, 1), "11", Ack(1, 5, True, False), id="heartbeat"),
        pytest.param("1111", append(1, 3, 1), "1111", Ack(1, 4, True, False), id="late heartbeat"),
        pytest.param("1111", append(1, 3, 1, "1"), "1111", Ack(1, 5, True, False), id="duplicate"),
        pytest.param("11", append(1, 3, 1, "111"), "1111", Ack(1, 7, True, False), id="overlap"),
        pytest.param("1122", append(3, 4, 1, "3"), "113", Ack(3, 6, True, False), id="conflict"),
        pytest.param(
            "1122", append(3, 3, 1, "133"), "1133", Ack(3, 7, True, False), id="late conflict"
        ),
        pytest.param("11", append(1, 9, 1, "1"), "11", Ack(1, 5, False, True), id="gap"),
        pytest.param(
            "112222", append(3, 8, 3, "3"), "112222", Ack(3, 5, False, True), id="back by a term"
        ),
    ],
)
def test_append(log: str, message: Append, after: str, answer: Ack) -> None:
    solo = Solo(log=log)
    solo.receive("b", message)
    solo.sync()
    assert solo.terms() == after
    assert solo.take() == [("b", answer)]


def test_pipelined_and_repeated_appends_delete_nothing() -> None:
    solo = Solo()
    for last in (3, 4, 5, 6):
        solo.receive("b", append(1, 2, 0, "1" * (last - 2), commit=last))
    deleted: list[int] = []
    original = solo.journal.deleteEntriesFrom
    solo.journal.deleteEntriesFrom = lambda at: deleted.append(at) or original(at)  # type: ignore
    for last in (3, 5, 4, 6):  # as a network may repeat and a pipeline overlap them
        solo.receive("b", append(1, 2, 0, "1" * (last - 2), commit=last))
    assert deleted == []
    assert solo.terms() == "1111"


def test_commit_goes_no_further_than_what_the_message_proves() -> None:
    solo = Solo(log="1122")  # 5 and 6 are of a leader that lost
    solo.receive("b", append(3, 4, 1, commit=6))
    assert solo.core.commit_index() == 4


@pytest.mark.parametrize("message", [append(3, 2, 0, "3", commit=3), append(3, 3, 2)])
def test_a_contradiction_to_what_is_committed_stops_the_node(message: Append) -> None:
    solo = Solo(log="111")
    solo.receive("b", append(1, 5, 1, commit=5))
    with pytest.raises(SafetyViolation):
        solo.receive("c", message)
    assert solo.terms() == "111"


def test_the_library_cannot_delete_what_is_committed_either() -> None:
    solo = Solo(log="111")
    solo.receive("b", append(1, 5, 1, commit=5))
    with pytest.raises(SafetyViolation):
        solo.core._SyncObj__deleteEntriesFrom(5)


def test_entries_from_before_the_snapshot_are_held() -> None:
    solo = Solo(log="1" * 2000)
    solo.receive("b", append(1, 2002, 1, commit=2002))
    solo.core.apply_committed()
    solo.journal.compact(b"", 2002)
    first = solo.core.first_index()
    assert first > 900
    below = narrow(append(1, 2, 0, "111"), solo.journal, 2002)
    assert (below.matches, below.proved_index, below.append.entries) == (True, 5, ())
    across = narrow(append(1, first - 2, 1, "1" * 10), solo.journal, 2002)
    assert (across.matches, across.proved_index, across.append.entries) == (True, first + 8, ())


def test_a_message_of_a_term_that_is_over_is_answered_with_the_term() -> None:
    solo = Solo(log="11", term=5)
    solo.receive("b", append(4, 4, 1, "4"))
    assert solo.terms() == "11"
    assert solo.take() == [("b", Outdated(5))]


def test_two_leaders_of_one_term_are_not_believed() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(2, 3, 1))
    with pytest.raises(MalformedMessage):
        solo.receive("c", append(2, 3, 1))


# Answers.


def test_a_leader_commits_by_answers_of_its_term_only() -> None:
    solo = Solo(log="1", term=1)
    solo.lead()  # term 2, its no-op is entry 4
    for message in (Ack(1, 5, True, False), Ack(0, 5, True, False)):
        solo.receive("b", message)
        solo.tick()
        assert solo.core.commit_index() == 1
    solo.receive("b", Ack(2, 5, True, False))
    solo.tick()
    assert solo.core.commit_index() == 4


def test_a_strangers_answer_is_ignored_and_an_impossible_one_refused() -> None:
    solo = Solo(log="1", term=1)
    solo.lead()
    solo.receive("x", Ack(2, 5, True, False))
    solo.tick()
    assert solo.core.commit_index() == 1
    with pytest.raises(MalformedMessage):
        solo.receive("b", Ack(2, 6, True, False))


def test_a_leader_steps_down_for_an_answer_of_a_later_term() -> None:
    for message in (Ack(7, 5, True, False), Outdated(7)):
        solo = Solo(log="1", term=1)
        solo.lead()
        solo.receive("b", message)
        assert (solo.core.state(), solo.core.term()) == (FOLLOWER, 7)


def test_acknowledged_entries_are_not_sent_again() -> None:
    solo = Solo(term=1)
    solo.lead()
    for number in range(5):
        solo.core.submit(command(str(number)), lambda result, error: None)
    solo.tick()
    solo.core.send_appends()
    solo.take()
    solo.receive("b", Ack(2, 4, True, False))  # the no-op only; five are on their way
    solo.core.send_appends()
    assert [m for to, m in solo.take() if to == "b" and isinstance(m, Append) and m.entries] == []


def test_a_reset_does_send_them_again() -> None:
    solo = Solo(term=1)
    solo.lead()
    solo.receive("b", Ack(2, 3, False, True))
    solo.core.send_appends()
    sent = [m for to, m in solo.take() if to == "b" and isinstance(m, Append)]
    assert sent[0].entries == (Entry(2, NO_OP_COMMAND),)


def test_a_refusal_that_goes_back_less_far_does_not_undo_one_before() -> None:
    solo = Solo(log="11", term=1)
    solo.lead()
    # It refused the first of two messages for a conflict, and then the second for the gap.
    solo.receive("b", Ack(2, 3, False, True))
    solo.receive("b", Ack(2, 4, False, True))
    solo.core.send_appends()
    sent = [m for to, m in solo.take() if to == "b" and isinstance(m, Append)]
    assert sent[0].prev_index == 2


# Votes.


def test_a_voter_counts_once() -> None:
    solo = Solo("abcde")
    solo.wait_for_election()
    for voter in "bc":
        solo.receive(voter, PreVote(0, 1, True))
    solo.tick()
    solo.sync()
    assert solo.core.state() == CANDIDATE
    for _ in range(3):
        solo.receive("b", Vote(1))
    assert solo.core.state() == CANDIDATE
    solo.receive("x", Vote(1))  # no voter
    solo.receive("c", Vote(0))  # another term
    assert solo.core.state() == CANDIDATE
    solo.receive("c", Vote(1))
    assert solo.core.state() == LEADER


def test_consent_is_for_one_term_only() -> None:
    solo = Solo()
    solo.wait_for_election()
    solo.receive("b", PreVote(0, 1, True))
    solo.receive("c", VoteRequest(5, 9, 9))  # before the tick that would have begun the election
    solo.sync()
    solo.take()
    solo.wait_for_election()
    assert (solo.core.state(), solo.core.term()) == (FOLLOWER, 5)
    assert ("b", PreVoteRequest(6, 2, 0)) in solo.take()


def test_one_vote_a_term() -> None:
    solo = Solo(log="1")
    solo.receive("b", VoteRequest(2, 3, 1))
    solo.receive("c", VoteRequest(2, 3, 1))
    solo.sync()
    assert solo.take() == [("b", Vote(2))]


def test_no_vote_for_a_log_that_lacks_something() -> None:
    solo = Solo(log="12")
    solo.receive("b", VoteRequest(3, 9, 1))
    solo.receive("c", VoteRequest(4, 3, 2))
    solo.sync()
    assert solo.take() == []


# Durability: what leaves before the disk has it, and what does not.


def test_an_answer_waits_for_the_disk() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1, "1"))
    assert solo.take() == []
    solo.sync()
    assert solo.take() == [("b", Ack(1, 5, True, False))]


def test_a_vote_waits_for_the_disk() -> None:
    solo = Solo(log="1")
    solo.receive("b", VoteRequest(2, 3, 1))
    assert solo.take() == []
    solo.sync()
    assert solo.take() == [("b", Vote(2))]


def test_a_request_for_votes_waits_for_the_disk() -> None:
    solo = Solo(log="1")
    solo.wait_for_election()
    solo.take()
    solo.receive("b", PreVote(1, 2, True))
    solo.tick()
    assert solo.core.state() == CANDIDATE
    assert solo.take() == []
    solo.sync()
    assert sorted(solo.take(), key=str) == [(to, VoteRequest(2, 3, 1)) for to in "bc"]


def test_what_was_staged_during_a_sync_waits_for_the_next() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1, "1"))
    assert solo.journal.take() is not None
    solo.receive("b", append(1, 4, 1, "1"))
    solo.journal.synced()
    solo.transport.release()
    assert solo.take() == [("b", Ack(1, 5, True, False))]
    solo.sync()
    assert solo.take() == [("b", Ack(1, 6, True, False))]


def test_a_leaders_entries_travel_before_its_sync_but_do_not_count() -> None:
    solo = Solo(term=1)
    solo.lead()
    solo.receive("b", Ack(2, 4, True, False))
    solo.tick()
    assert solo.core.commit_index() == 3
    solo.core.submit(command("x"), lambda result, error: None)
    solo.tick()
    solo.core.send_appends()
    sent = {to for to, m in solo.take() if isinstance(m, Append) and m.entries}
    assert sent == {"b", "c"}
    solo.receive("b", Ack(2, 5, True, False))
    solo.tick()
    assert solo.core.commit_index() == 3  # held by b alone, durably
    solo.sync()
    solo.tick()
    assert solo.core.commit_index() == 4


# Pre-vote and leaders.


def test_an_election_needs_a_majority_that_would_vote() -> None:
    solo = Solo("abcde", log="1")
    solo.wait_for_election()
    assert {type(m) for _, m in solo.take()} == {PreVoteRequest}
    solo.receive("b", PreVote(1, 2, True))
    solo.receive("b", PreVote(1, 2, True))
    solo.receive("c", PreVote(1, 2, False))
    solo.receive("c", PreVote(1, 9, True))
    solo.receive("x", PreVote(1, 2, True))
    solo.tick()
    assert (solo.core.state(), solo.core.term()) == (FOLLOWER, 1)


@pytest.mark.parametrize(
    ("silence_s", "request_", "granted"),
    [
        (0.1, PreVoteRequest(2, 9, 1), False),  # the leader is alive
        (0.5, PreVoteRequest(2, 9, 1), True),
        (0.5, PreVoteRequest(2, 2, 0), False),  # its log lacks something
        (0.5, PreVoteRequest(1, 9, 1), False),  # it is not in our term
    ],
)
def test_pre_votes(silence_s: float, request_: PreVoteRequest, granted: bool) -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1))
    solo.take()
    solo.now += silence_s
    solo.receive("c", request_)
    assert solo.take() == [("c", PreVote(1, request_.proposed_term, granted))]
    assert solo.core.term() == 1


def test_a_leader_grants_no_pre_vote() -> None:
    solo = Solo(log="1")
    solo.lead()
    solo.receive("c", PreVoteRequest(3, 9, 2))
    assert solo.take() == [("c", PreVote(2, 3, False))]


def test_a_leader_without_a_majority_steps_down_within_an_election_timeout() -> None:
    solo = Solo(log="1")
    solo.lead()
    assert solo.fence.has_quorum()
    solo.now += 0.7
    solo.receive("b", Ack(2, 4, False, False))
    solo.tick()
    assert solo.core.state() == LEADER
    solo.now += 0.81
    assert not solo.fence.has_quorum()
    solo.tick()
    assert solo.core.state() == FOLLOWER


def test_a_learner_calls_no_election_but_votes() -> None:
    solo = Solo("bcd", log="1")
    for _ in range(5):
        solo.wait_for_election()
    assert solo.take() == []
    assert solo.core.term() == 1
    solo.receive("b", VoteRequest(2, 3, 1))  # it may be a voter already and not know it yet
    solo.sync()
    assert solo.take() == [("b", Vote(2))]


def test_only_the_leader_can_hand_over() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1))
    solo.take()
    solo.receive("c", TakeOver(1))
    solo.tick()
    assert solo.core.state() == FOLLOWER
    solo.receive("b", TakeOver(1))
    solo.tick()
    assert (solo.core.state(), solo.core.term()) == (CANDIDATE, 2)  # without a pre-vote


# Membership.


def test_voters_follow_the_log_forth_and_back() -> None:
    solo = Solo("abc", log="1")
    wider = Entry(2, encode_voters(frozenset(map(NodeId, "abcd"))))
    solo.receive("b", Append(2, 0, 3, 1, (wider,)))
    assert solo.journal.voters == set("abcd")
    solo.receive("c", append(3, 3, 1, "3"))  # truncates it
    assert solo.journal.voters == set("abc")


@pytest.mark.parametrize(
    ("voters", "accepted"),
    [("abcd", True), ("ab", True), ("abcde", False), ("ad", False), ("abc", False)],
)
def test_one_voter_at_a_time(voters: str, accepted: bool) -> None:
    solo = Solo(log="1")
    solo.lead()
    solo.core.connected(NodeId("d"))
    for node in "bcd":
        solo.receive(node, Ack(2, 5, True, False))
    solo.tick()
    assert solo.may_change_voters(frozenset(map(NodeId, voters))) == accepted


def test_no_removal_that_leaves_too_few_voters_that_are_there() -> None:
    solo = Solo("abc", log="1")
    solo.lead()
    for node in "bc":
        solo.receive(node, Ack(2, 5, True, False))
    solo.tick()
    solo.now += 1
    solo.receive("b", Ack(2, 5, True, False))  # c is silent
    assert not solo.may_change_voters(ids("ac")), "it would need c for its own commit"
    assert solo.may_change_voters(ids("ab"))
    solo.receive("c", Ack(2, 5, True, False))
    assert solo.may_change_voters(ids("ac"))


def test_a_voter_that_answers_but_cannot_follow_is_no_majority() -> None:
    solo = Solo("abc", log="1" * 300)
    solo.lead()
    solo.receive("c", Ack(2, 304, True, False))
    solo.tick()
    solo.receive("b", Ack(2, 2, False, False))  # as one that cannot read our snapshot
    assert not solo.may_change_voters(ids("ab"))
    assert solo.may_change_voters(ids("ac"))


def ids(names: str) -> frozenset[NodeId]:
    return frozenset(map(NodeId, names))


def change(solo: Solo, voters: str, base: str | None = None) -> list[int]:
    results: list[int] = []
    solo.core.submit(
        encode_change(solo.journal.voters if base is None else ids(base), ids(voters)),
        lambda result, error: results.append(error),
    )
    solo.tick()
    solo.core.use_voters(solo.journal.voters)
    return results


def test_no_change_before_the_last_one_or_the_leaders_own_term_is_committed() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1, commit=3))
    solo.lead()
    assert change(solo, "ab") == [6]  # REQUEST_DENIED: the no-op is not committed
    solo.receive("b", Ack(2, 5, True, False))
    solo.tick()
    assert change(solo, "ab") == []
    assert change(solo, "a") == [6]  # the change before is not committed
    solo.receive("b", Ack(2, 6, True, False))
    solo.sync()
    solo.tick()
    assert change(solo, "a") == []


def test_a_change_that_was_meant_for_other_voters_is_refused() -> None:
    solo = Solo("abcd", log="1")
    solo.lead()
    for node in "bc":
        solo.receive(node, Ack(2, 5, True, False))
    solo.tick()
    # Asked for as "add c" when there were two others; "remove d" by now.
    assert change(solo, "abc", base="ab") == [6]
    assert solo.journal.voters == set("abcd")
    assert change(solo, "abc") == []
    assert solo.journal[-1][0] == encode_voters(ids("abc")), "the log keeps the list alone"


def test_a_learner_that_lags_or_is_silent_is_not_promoted() -> None:
    solo = Solo(log="1" * 300)
    solo.lead()
    solo.receive("b", Ack(2, 304, True, False))
    solo.tick()
    solo.core.connected(NodeId("d"))
    four = frozenset(map(NodeId, "abcd"))
    assert not solo.may_change_voters(four)
    solo.receive("d", Ack(2, 10, True, False))
    assert not solo.may_change_voters(four)
    solo.receive("d", Ack(2, 300, True, False))
    assert solo.may_change_voters(four)
    solo.now += 1
    assert not solo.may_change_voters(four)


def test_a_learner_that_does_not_know_who_votes_is_not_promoted() -> None:
    # It would give no vote, and its own may be needed at once.
    solo = Solo(log="1")
    solo.lead()
    solo.receive("b", Ack(2, 5, True, False))
    solo.tick()
    solo.core.connected(NodeId("d"))
    solo.receive("d", Ack(2, 2, True, False))
    assert not solo.may_change_voters(ids("abcd"))
    solo.receive("d", Ack(2, 3, True, False))
    assert solo.may_change_voters(ids("abcd"))


# Snapshots.


def snapshot(index: int, term: int, voters: str = "abc", state: bytes = b"s") -> list[Install]:
    blob = pack_snapshot(
        Snapshot(
            SNAPSHOT_FORMAT,
            (command("p"), index - 1, term),
            (command("l"), index, term),
            tuple(map(NodeId, voters)),
            state,
        )
    )
    half = len(blob.data) // 2
    return [
        Install(term, 0, len(blob.data), blob.sha256, blob.data[:half]),
        Install(term, half, len(blob.data), blob.sha256, blob.data[half:]),
    ]


def test_a_snapshot_is_installed_once_complete() -> None:
    solo = Solo(log="1")
    head, tail = snapshot(50, 2, "abd")
    solo.receive("b", head)
    assert solo.ledger.restored == 0
    solo.receive("b", tail)
    solo.sync()
    assert solo.ledger.commands == [b"s"]
    assert (solo.core.last_index(), solo.core.commit_index()) == (50, 50)
    assert solo.journal.voters == set("abd")
    assert solo.take()[-1] == ("b", Ack(2, 51, True, False))
    solo.receive("b", head)
    solo.receive("b", tail)  # again: it is behind us now
    assert solo.ledger.restored == 1


def test_a_part_of_a_snapshot_commits_nothing() -> None:
    # The library would commit our own entries up to the leader's commit index.
    seen: list[dict[str, Any]] = []
    solo = Solo(log="111")
    deliver = solo.core.deliver
    solo.core.deliver = lambda sender, message: seen.append(message) or deliver(sender, message)  # type: ignore
    solo.receive("b", snapshot(50, 2)[0])
    assert solo.core.commit_index() == 1
    assert [message["commit_index"] for message in seen] == [0]


@pytest.mark.parametrize("fault", ["lost", "damaged", "swapped"])
def test_a_faulty_transfer_installs_nothing(fault: str) -> None:
    solo = Solo(log="1")
    head, tail = snapshot(50, 2)
    match fault:
        case "lost":
            parts = [tail]
        case "damaged":
            parts = [head, Install(2, tail.offset, tail.total, tail.sha256, bytes(len(tail.data)))]
        case _:
            parts = [tail, head]
    for part in parts:
        solo.receive("b", part)
    assert solo.ledger.restored == 0
    assert solo.core.commit_index() == 1


def test_entries_after_the_snapshot_are_kept_if_they_fit() -> None:
    for term, after in ((1, 8), (2, 6)):
        solo = Solo(log="111111", term=1)  # 3 to 8
        for part in snapshot(6, term):
            solo.receive("b", part)
        assert solo.core.last_index() == after


def compacted_leader(parts: int) -> tuple[Solo, int, int]:
    """One whose follower b needs a snapshot of so many parts; also its size and index."""
    solo = Solo(log="1" * 20)
    solo.lead()
    for voter in "bc":
        solo.receive(voter, Ack(2, solo.core.last_index() + 1, True, False))
    solo.tick()
    index = solo.core.applied_index()
    assert index > 20
    solo.journal.compact(random.Random(1).randbytes((parts - 1) * SNAPSHOT_CHUNK_SIZE), index)
    del solo.journal._entries[:-3]
    solo.sync()
    solo.take()
    solo.receive("b", Ack(2, 3, False, True))
    blob = solo.journal.snapshot_blob
    assert blob is not None
    return solo, len(blob.data), index


def sent_parts(solo: Solo) -> list[int]:
    """The places of the parts that b was sent since the last call."""
    sent = [m for to, m in solo.take() if to == "b" and isinstance(m, Install) and m.data]
    return [message.offset // SNAPSHOT_CHUNK_SIZE for message in sent]


def held(parts: int) -> Ack:
    return Ack(2, 3, False, False, parts * SNAPSHOT_CHUNK_SIZE)


def test_a_snapshot_is_sent_as_fast_as_it_is_acknowledged() -> None:
    solo, size, index = compacted_leader(parts=20)
    for _ in range(3):
        solo.core.send_appends()
    assert sent_parts(solo) == list(range(8))
    solo.receive("b", held(1))
    solo.receive("b", held(1))
    assert sent_parts(solo) == [8]
    solo.receive("b", held(6))
    assert sent_parts(solo) == [9, 10, 11, 12, 13]
    for part in range(7, 20):
        solo.receive("b", held(part))
    assert sent_parts(solo) == [14, 15, 16, 17, 18, 19]
    solo.core.send_appends()
    beats = [m for to, m in solo.take() if to == "b"]
    assert [m.data for m in beats if isinstance(m, Install)] == [b""], "still a heartbeat"
    solo.receive("b", Ack(2, index + 1, True, False))
    solo.core.send_appends()
    (after,) = [m for to, m in solo.take() if to == "b"]
    assert isinstance(after, Append)
    assert after.prev_index == index
    assert size > 19 * SNAPSHOT_CHUNK_SIZE


def test_lost_parts_of_a_snapshot_are_sent_again_from_where_the_follower_is() -> None:
    solo, _, _ = compacted_leader(parts=20)
    solo.core.send_appends()
    solo.receive("b", held(3))
    assert sent_parts(solo) == list(range(11))
    solo.now += 1.9
    solo.core.send_appends()
    assert sent_parts(solo) == []
    solo.now += 0.2
    solo.core.send_appends()
    assert sent_parts(solo) == [3], "only one: the follower may just be slow"
    solo.now += 0.1
    solo.core.send_appends()
    assert sent_parts(solo) == []
    solo.receive("b", held(4))
    assert sent_parts(solo) == list(range(4, 12))
    solo.core.disconnected(NodeId("b"))
    solo.core.connected(NodeId("b"))
    solo.core.send_appends()
    assert sent_parts(solo) == [4], "a link broke"
    solo.receive("b", held(0))  # and the follower was started again
    solo.core.send_appends()
    assert sent_parts(solo) == [0]


def test_what_is_said_of_another_snapshot_does_no_harm() -> None:
    solo, size, _ = compacted_leader(parts=3)
    solo.core.send_appends()
    assert sent_parts(solo) == [0, 1, 2]
    solo.receive("c", held(1))
    for answer in (held(50), Ack(2, 3, False, False, size)):
        solo.receive("b", answer)
        solo.now += 2.1
        solo.core.send_appends()
        assert sent_parts(solo) == [0]
    solo.receive("b", held(2))
    solo.receive("b", held(1))
    solo.core.send_appends()
    assert sent_parts(solo) == [2, 1]


def test_a_follower_keeps_the_parts_before_a_lost_one() -> None:
    solo = Solo(log="1")
    (one, two), (other, _) = snapshot(50, 2), snapshot(60, 2)
    middle = len(one.data) // 2
    first = Install(2, 0, one.total, one.sha256, one.data[:middle])
    second = Install(2, middle, one.total, one.sha256, one.data[middle:])
    answers = []
    for part in (second, first, two, first, one, second):
        solo.receive("b", part)
        solo.sync()
        answers += [m.snapshot_held for _, m in solo.take() if isinstance(m, Ack)]
    assert answers == [0, middle, middle, middle, len(one.data), len(one.data)]
    solo.receive("b", two)
    solo.sync()
    assert solo.take()[-1] == ("b", Ack(2, 51, True, False))
    solo.receive("b", two)  # the answer was lost
    assert solo.take()[-1] == ("b", Ack(2, 51, True, False))
    solo.receive("b", other)
    assert solo.take()[-1] == ("b", Ack(2, 51, False, False, len(other.data)))


def test_a_follower_that_was_away_gets_the_newest_snapshot_and_one_that_is_there_the_first() -> (
    None
):
    for away in (False, True):
        solo, _, index = compacted_leader(parts=3)
        solo.core.send_appends()
        solo.receive("b", held(1))
        if away:
            solo.core.disconnected(NodeId("b"))
        solo.journal.compact(bytes(9 * SNAPSHOT_CHUNK_SIZE), index)
        solo.sync()
        solo.core.send_appends()
        solo.take()
        if away:
            solo.core.connected(NodeId("b"))
            solo.core.send_appends()
            assert sent_parts(solo) == list(range(8))
        else:
            solo.receive("b", held(0))
            solo.receive("b", held(2))
            assert sent_parts(solo) == [2]
            solo.receive("b", Ack(2, index + 1, True, False))
            solo.receive("b", Ack(2, 3, False, True))  # it lost its disk
            solo.core.send_appends()
            assert sent_parts(solo) == list(range(8))


def test_who_leads_no_more_holds_no_snapshot_for_others() -> None:
    solo, _, _ = compacted_leader(parts=3)
    solo.core.send_appends()
    assert solo.core._snapshots._transfers
    solo.core.step_down(9)
    solo.tick()
    assert not solo.core._snapshots._transfers


# Proposals.


def test_proposals_that_wait_are_bounded_in_bytes() -> None:
    solo = Solo(log="1")
    solo.lead()
    answers: list[int] = []
    whole = command("x" * (1 << 20))
    for _ in range(70):
        solo.core.submit(whole, lambda _, error: answers.append(error))
    assert answers == [QUEUE_FULL] * 7  # 63 and their first bytes are below 64 MiB
    solo.tick()
    solo.core.submit(whole, lambda _, error: answers.append(error))
    assert len(answers) == 7
    solo.tick()
    for _ in range(QUEUE_SIZE + 5):
        solo.core.submit(command("x"), lambda _, error: answers.append(error))
    assert len(answers) == 7 + 5


def test_a_forwarded_proposal_is_placed_or_refused() -> None:
    solo = Solo(log="1")
    solo.receive("b", Forward(77, command("x")))
    solo.tick()
    ((to, answer),) = solo.take()
    assert (to, answer.request_id, answer.error) == ("b", 77, 2)  # type: ignore[union-attr]
    solo.lead()
    solo.receive("b", Forward(78, command("x")))
    solo.tick()
    placed = [m for to, m in solo.take() if getattr(m, "request_id", None) == 78]
    assert [(m.index, m.term, m.error) for m in placed] == [(5, 2, 0)]  # type: ignore[union-attr]


def test_request_ids_begin_at_random_so_that_two_lives_do_not_share_them() -> None:
    solo = Solo(log="1")
    solo.receive("b", append(1, 3, 1))
    solo.take()
    solo.core.submit(command("x"), lambda result, error: None)
    solo.tick()
    ((_, forward),) = solo.take()
    assert isinstance(forward, Forward)
    assert forward.request_id > 1 << 32
