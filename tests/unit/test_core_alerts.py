"""Alerts by a clock that the tests move: raised once, cleared once, and no flapping between."""

from typing import Any

import msgspec
import pytest

from ollamad.core.alerts import (
    CLEAR_AFTER_S,
    RAISE_AFTER_S,
    AlertBook,
    AlertKind,
    Finding,
    findings,
)
from ollamad.core.presence import Beat, Presence, Usage
from ollamad.core.state import ClusterState
from tests.fakes.api_services import NODE_1, NODE_2, member, model

GB = 1_000_000_000
WELL = Usage(memory=0.5, disk_free=400 * GB)
KINDS: list[AlertKind] = list(RAISE_AFTER_S)


def finding(kind: AlertKind, how: str, subject: str = "s") -> Finding:
    return Finding(kind, subject, how == "bad", how == "well", "trouble", "relief")


def run(kind: AlertKind, *script: tuple[float, str]) -> list[tuple[float, str]]:
    """When what was told, for what was found when ("" for a subject that is gone)."""
    book, told = AlertBook(), []
    for now, how in script:
        found = [finding(kind, how)] if how else []
        told += [
            (now, "raised" if alert.raised else "cleared")
            for alert in book.look(found, now, 1e9 + now)
        ]
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_raised_once_when_it_lasts_and_cleared_once_when_it_is_over(kind: AlertKind) -> None:
    after = RAISE_AFTER_S[kind]
    script = [
        (0.0, "well"),
        (1.0, "bad"),
        (1.0 + after - 0.1, "bad"),
        (1.0 + after, "bad"),
        (2.0 + after, "bad"),
        (100.0, "well"),
        (100.0 + CLEAR_AFTER_S - 0.1, "well"),
        (100.0 + CLEAR_AFTER_S, "well"),
        (200.0, "well"),
    ]
    assert run(kind, *script) == [(1.0 + after, "raised"), (100.0 + CLEAR_AFTER_S, "cleared")]


def test_what_lies_between_the_marks_changes_nothing() -> None:
    script = [(0.0, "bad"), (5.0, "bad"), (6.0, "between"), (60.0, "between"), (61.0, "bad")]
    assert run("low_memory", *script) == [(5.0, "raised")]
    # Nor does it count as lasting: it must be bad all the time.
    assert run("low_memory", (0.0, "bad"), (4.0, "between"), (6.0, "bad"), (10.9, "bad")) == []


def test_it_does_not_flap() -> None:
    script = [(float(second), "bad" if second % 2 else "well") for second in range(100)]
    assert run("low_memory", *script) == []


def test_a_subject_that_is_gone_is_cleared() -> None:
    assert run("node_offline", (0.0, "bad"), (2.0, "bad"), (3.0, ""), (4.0, "")) == [
        (2.0, "raised"),
        (3.0, "cleared"),
    ]
    assert run("node_offline", (0.0, "bad"), (1.0, "")) == []


def test_what_stands_is_known_to_who_comes_later() -> None:
    book = AlertBook()
    for now in (0.0, 2.0):
        found = [finding("node_offline", "bad", "one"), finding("no_quorum", "bad", "c")]
        book.look(found, now, 1e9 + now)
    standing = book.standing()
    assert [(alert.kind, alert.subject) for alert in standing] == [
        ("node_offline", "one"),
        ("no_quorum", "c"),
    ]
    assert all(alert.raised and alert.at == 1e9 + 2 for alert in standing)
    book.look([finding("no_quorum", "bad", "c")], 3.0, 1e9 + 3)
    assert [alert.kind for alert in book.standing()] == ["no_quorum"]


def cluster(**changes: Any) -> ClusterState:
    state = ClusterState(cluster_id="c1")
    state.members = {NODE_1: member(NODE_1, "a"), NODE_2: member(NODE_2, "b")}
    state.models = {"m:latest": model("m:latest", **changes)}
    return state


def beat(usage: Usage = WELL, *, online: bool = True, sent_at: float = 1.0) -> Presence:
    return Presence(online, 1.0, Beat(sent_at, usage))


# What is found, by kind: bad, well, or neither (a subject that nobody can judge, or in between).
USAGE = [
    (WELL, "well", "well"),
    (msgspec.structs.replace(WELL, memory=0.95), "bad", "well"),
    (msgspec.structs.replace(WELL, memory=0.92), "", "well"),
    (msgspec.structs.replace(WELL, memory=0.90), "well", "well"),
    # A disk of 500 GB: a twentieth is more than the most that is asked for.
    (msgspec.structs.replace(WELL, disk_free=19 * GB), "well", "bad"),
    (msgspec.structs.replace(WELL, disk_free=22 * GB), "well", ""),
    (msgspec.structs.replace(WELL, disk_free=25 * GB), "well", "well"),
]


def how(found: list[Finding], kind: AlertKind, subject: str) -> str:
    [one] = [f for f in found if (f.kind, f.subject) == (kind, subject)]
    assert not (one.bad and one.well)
    return "bad" if one.bad else "well" if one.well else ""


@pytest.mark.parametrize(("usage", "memory", "disk"), USAGE)
def test_a_hosts_usage(usage: Usage, memory: str, disk: str) -> None:
    found = findings(cluster(), {NODE_1: beat(usage), NODE_2: beat()}, has_quorum=True)
    assert how(found, "low_memory", NODE_1) == memory
    assert how(found, "low_disk", NODE_1) == disk
    assert how(found, "low_memory", NODE_2) == how(found, "low_disk", NODE_2) == "well"


@pytest.mark.parametrize("presence", [beat(Usage(), sent_at=0.0), beat(Usage(), online=False)])
def test_of_who_said_nothing_nothing_is_said(presence: Presence) -> None:
    found = findings(cluster(), {NODE_1: presence, NODE_2: beat()}, has_quorum=True)
    assert how(found, "low_memory", NODE_1) == how(found, "low_disk", NODE_1) == ""
    assert how(found, "node_offline", NODE_1) == ("well" if presence.online else "bad")


@pytest.mark.parametrize(
    ("desired", "confirmed", "b_online", "expected", "level"),
    [
        ((NODE_1, NODE_2), (NODE_1, NODE_2), True, "well", "warning"),
        ((NODE_1, NODE_2), (NODE_1, NODE_2), False, "bad", "warning"),
        ((NODE_1, NODE_2), (NODE_1,), True, "bad", "warning"),
        ((NODE_1,), (NODE_1, NODE_2), True, "well", "warning"),
        ((NODE_1,), (), True, "bad", "critical"),
        ((), (), True, "bad", "critical"),  # a model that nobody has
    ],
)
def test_copies_of_a_model(
    desired: Any, confirmed: Any, b_online: bool, expected: str, level: str
) -> None:
    state = cluster(desired=desired, confirmed=confirmed)
    found = findings(state, {NODE_1: beat(), NODE_2: beat(online=b_online)}, has_quorum=True)
    assert how(found, "under_replicated", "m:latest") == expected
    [one] = [f for f in found if f.kind == "under_replicated"]
    assert one.level == level


def test_the_quorum() -> None:
    presence = {NODE_1: beat(), NODE_2: beat()}
    assert how(findings(cluster(), presence, has_quorum=True), "no_quorum", "c1") == "well"
    assert how(findings(cluster(), presence, has_quorum=False), "no_quorum", "c1") == "bad"
