"""Placement and presence as tables."""

import pytest

from ollamad.core.ids import NodeId
from ollamad.core.placement import KEEP_FREE_BYTES, Site, fits, place
from ollamad.core.presence import OFFLINE_AFTER_S, Beat, PresenceTable, Usage

A, B, C, D = (NodeId(name) for name in "ABCD")
GB = 1 << 30


def site(node_id: NodeId, free: int, *, usable: bool = True) -> Site:
    return Site(node_id, usable, free)


SITES = [site(A, 5 * GB), site(B, 9 * GB), site(C, 9 * GB), site(D, 99 * GB, usable=False)]


@pytest.mark.parametrize(
    ("size", "replicas", "keep", "expected"),
    [
        (1 * GB, 1, (), (B,)),  # the roomiest, ties by id
        (1 * GB, 2, (), (B, C)),
        (1 * GB, 9, (), (A, B, C)),  # never one that drains
        (1 * GB, 2, (A,), (A, B)),
        (1 * GB, 1, (A,), (A,)),
        (1 * GB, 1, (A, C), (A, C)),  # none is taken away
        (1 * GB, 2, (D,), (B, D)),  # what is there counts, even if it drains
        (4 * GB, 3, (), (A, B, C)),  # exactly the reserve is left on A
        (4 * GB + 1, 3, (), (B, C)),
        (8 * GB, 3, (), (B, C)),
        (8 * GB + 1, 3, (), ()),
        (0, 0, (), ()),
    ],
)
def test_placement(
    size: int, replicas: int, keep: tuple[NodeId, ...], expected: tuple[NodeId, ...]
) -> None:
    assert place(SITES, size, replicas, keep) == expected
    assert place(reversed(SITES), size, replicas, keep) == expected


def test_the_reserve_of_the_disk_is_kept() -> None:
    assert fits(site(A, KEEP_FREE_BYTES + 10), 10)
    assert not fits(site(A, KEEP_FREE_BYTES + 10), 11)
    assert not fits(site(A, 99 * GB, usable=False), 1)


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
