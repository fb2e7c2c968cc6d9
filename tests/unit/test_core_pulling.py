"""Which node talks to the origin: a table of clusters, and who pulls first."""

import pytest

from ollamad.core.ids import NodeId
from ollamad.core.placement import KEEP_FREE_BYTES
from ollamad.core.pulling import UNREACHABLE_S, Candidate, rank

GB = 1_000_000_000


def node(name: str, **changes: object) -> Candidate:
    plain = {
        "usable": True,
        "disk_free": 100 * GB,
        "cpu": 0.1,
        "active_requests": 0,
        "unreachable_for_s": None,
    }
    return Candidate(NodeId(name), **(plain | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([node("b")], "ab"),  # equals: the node that was asked
        ([node("b", disk_free=900 * GB)], "ab"),  # what has room has room
        ([node("b", holds=True)], "ba"),  # most of it is there
        ([node("b", holds=True, active_requests=1)], "ab"),
        ([node("0", active_requests=1)], "a0"),
        ([node("0", active_requests=1, pulls_kin=True)], "0a"),  # the same weights, perhaps
        ([node("0", disk_free=GB, pulls_kin=True)], "a0"),
        ([node("0", cpu=0.9)], "a0"),
        ([node("0", usable=False)], "a"),
        ([node("0", disk_free=GB)], "a0"),
        ([node("0", disk_free=10 * GB + KEEP_FREE_BYTES - 1)], "a0"),
        ([node("0", unreachable_for_s=1.0)], "a0"),
    ],
)
def test_who_pulls_first(others: list[Candidate], expected: str) -> None:
    assert "".join(rank([*others, node("a")], size=10 * GB, here=NodeId("a"))) == expected


@pytest.mark.parametrize(
    ("here", "other"),
    [
        (node("a", active_requests=2), node("b", active_requests=1)),
        (node("a", cpu=0.8), node("b", cpu=0.6)),
        (node("a", disk_free=5 * GB), node("b", active_requests=9, cpu=1.0)),
        # Who does not get through is the last to be asked, however much room it has.
        (node("a", unreachable_for_s=10.0), node("b", disk_free=GB, active_requests=9)),
    ],
)
def test_another_node_pulls_where_it_can_do_so_better(here: Candidate, other: Candidate) -> None:
    assert rank([here, other], size=10 * GB, here=NodeId("a")) == ["b", "a"]


def test_a_node_that_got_through_to_nobody_is_asked_again_after_a_while() -> None:
    late = node("a", unreachable_for_s=UNREACHABLE_S)
    assert rank([late, node("b")], size=0, here=NodeId("a")) == ["a", "b"]


def test_only_who_was_asked_for_and_has_not_failed() -> None:
    nodes = [node("a"), node("b"), node("c"), node("d", usable=False)]
    assert rank(nodes, size=0, asked=["b", "c", "d"]) == ["b", "c"]
    assert rank(nodes, size=0, asked=["b", "c", "d"], tried=["b"]) == ["c"]
    assert rank(nodes, size=0, tried=["a", "b", "c"]) == []


def test_of_equals_the_roomiest_and_the_order_is_the_same_everywhere() -> None:
    nodes = [
        node("a", disk_free=50 * GB),
        node("b", disk_free=60 * GB),
        node("c", disk_free=60 * GB),
    ]
    assert rank(nodes, size=0) == rank(reversed(nodes), size=0) == ["b", "c", "a"]
