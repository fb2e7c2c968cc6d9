"""Who is there, as heartbeats and their absence tell."""

from ollamad.core.ids import NodeId
from ollamad.core.presence import OFFLINE_AFTER_S, Beat, PresenceTable, Usage

A, B = NodeId("A"), NodeId("B")


def beat(*, leaving: bool = False) -> Beat:
    return Beat(1.0, Usage(), leaving=leaving)


def test_who_was_never_heard_is_offline() -> None:
    presence = PresenceTable().of(A)
    assert (presence.online, presence.last_seen) == (False, 0.0)


def test_silence_is_told_once() -> None:
    table = PresenceTable()
    assert table.hear(A, beat(), 10.0, 1000.0)
    assert not table.hear(A, beat(), 11.0, 1001.0)
    assert table.sweep(11.0 + OFFLINE_AFTER_S) == []
    assert table.of(A).online
    assert table.sweep(11.1 + OFFLINE_AFTER_S) == [A]
    assert table.sweep(99.0) == []
    assert not table.of(A).online
    assert table.of(A).last_seen == 1001.0
    assert table.hear(A, beat(), 100.0, 1100.0)


def test_who_says_goodbye_is_offline_at_once_and_not_swept() -> None:
    table = PresenceTable()
    table.hear(A, beat(), 0.0, 1.0)
    assert not table.hear(A, beat(leaving=True), 1.0, 2.0)
    assert not table.of(A).online
    assert table.sweep(99.0) == []
    assert table.hear(A, beat(), 100.0, 3.0)  # it was started again


def test_who_is_forgotten_leaves_no_trace() -> None:
    table = PresenceTable()
    table.hear(A, beat(), 0.0, 1.0)
    table.forget(A)
    table.forget(B)
    assert table.sweep(99.0) == []
    assert table.of(A).last_seen == 0.0
