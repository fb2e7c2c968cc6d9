"""Events as tables: the cluster before, the cluster after, what is told."""

from typing import Any

import msgspec
import pytest

from ollamad.core.events import (
    ModelEvent,
    ModelEventKind,
    NodeEvent,
    NodeEventKind,
    Picture,
    model_events,
    node_events,
    transfer_events,
)
from ollamad.core.ids import NodeId
from ollamad.core.state import Member
from ollamad.core.transfers import Transfer
from tests.fakes.api_services import NODE_1, NODE_2, member, model

A, B = NODE_1, NODE_2
NOW = 1000.0
ALL_KINDS = {*NodeEventKind.__args__, *ModelEventKind.__args__}  # type: ignore[attr-defined]


def picture(
    *members: Member,
    online: set[NodeId] | None = None,
    leader: NodeId | None = A,
    models: dict[str, Any] | None = None,
    loaded: set[tuple[NodeId, str]] | None = None,
) -> Picture:
    return Picture(
        members={each.id: each for each in members},
        models={name: model(name, **changes) for name, changes in (models or {}).items()},
        online=frozenset({A, B} if online is None else online),
        loaded=frozenset(loaded or ()),
        leader=leader,
    )


a, b = member(A, "a"), member(B, "b")
drained = member(B, "b", draining=True)

NODES = [
    ("nothing", picture(a, b), picture(a, b), []),
    ("it falls silent", picture(a, b), picture(a, b, online={A}), [("node_offline", B, "offline")]),
    ("it returns", picture(a, b, online={A}), picture(a, b), [("node_online", B, "online")]),
    ("it joins, not heard yet", picture(a, online={A}), picture(a, b, online={A}),
     [("node_joined", B, "offline")]),
    ("it joins and is there", picture(a, online={A}), picture(a, b),
     [("node_joined", B, "online"), ("node_online", B, "online")]),
    ("it leaves", picture(a, b), picture(a), [("node_left", B, "offline")]),
    ("it leaves while silent", picture(a, b, online={A}), picture(a),
     [("node_left", B, "offline")]),
    ("it is drained", picture(a, b), picture(a, drained), [("node_draining", B, "draining")]),
    ("a silent one is drained", picture(a, b, online={A}), picture(a, drained, online={A}),
     [("node_draining", B, "offline")]),
    ("it is undrained", picture(a, drained), picture(a, b), [("node_undrained", B, "online")]),
    ("it joins drained", picture(a, online={A}), picture(a, drained),
     [("node_joined", B, "draining"), ("node_online", B, "draining"),
      ("node_draining", B, "draining")]),
    ("another leads", picture(a, b), picture(a, b, leader=B), [("leader_changed", B, "online")]),
    ("nobody leads", picture(a, b), picture(a, b, leader=None),
     [("leader_changed", "", "offline")]),
    ("somebody leads again", picture(a, b, leader=None), picture(a, b),
     [("leader_changed", A, "online")]),
    ("the leader dies", picture(a, b), picture(a, b, online={B}, leader=B),
     [("node_offline", A, "offline"), ("leader_changed", B, "online")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [row[1:] for row in NODES],
    ids=[row[0] for row in NODES],
)
def test_nodes(before: Picture, after: Picture, told: list[tuple[str, NodeId, str]]) -> None:
    assert [(e.kind, e.node_id, e.status) for e in node_events(before, after)] == told


def test_a_nodes_event_says_where_it_is() -> None:
    [event] = node_events(picture(a, b), picture(a, b, online={A}))
    assert event == NodeEvent("node_offline", B, "b", "b:8080", "offline")


M = "m:latest"
MODELS = [
    ("nothing", picture(models={M: {}}), picture(models={M: {}}), []),
    ("it is new, on one node", picture(), picture(models={M: {"confirmed": (A,)}}),
     [("model_replicated", A)]),
    ("it is wanted, on no node yet", picture(), picture(models={M: {"confirmed": ()}}), []),
    ("a second copy", picture(models={M: {"confirmed": (A,)}}), picture(models={M: {}}),
     [("model_replicated", B)]),
    ("a copy less is no event", picture(models={M: {}}), picture(models={M: {"confirmed": (A,)}}),
     []),
    ("it is replaced", picture(models={M: {"digest": "sha256:old"}}),
     picture(models={M: {"confirmed": (A,)}}), [("model_replicated", A)]),
    ("it is deleted", picture(models={M: {}}), picture(), [("model_deleted", "")]),
    ("it is loaded", picture(), picture(loaded={(B, M)}), [("model_loaded", B)]),
    ("it moves", picture(loaded={(B, M)}), picture(loaded={(A, M)}),
     [("model_loaded", A), ("model_unloaded", B)]),
    ("it is deleted while loaded", picture(models={M: {}}, loaded={(A, M)}), picture(),
     [("model_deleted", ""), ("model_unloaded", A)]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "told"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS]
)
def test_models(before: Picture, after: Picture, told: list[tuple[str, str]]) -> None:
    events = model_events(before, after)
    assert [(e.kind, e.node_id) for e in events] == told
    assert {e.model_name for e in events} <= {M}


def transfer(**changes: Any) -> Transfer:
    plain = Transfer(
        id="t1",
        model_name=M,
        type="download",
        status="active",
        progress=10.0,
        speed=1.0,
        eta=None,
        peer_id="",
        node_id=A,
        bytes_done=10,
        bytes_total=100,
        error="",
        started_at=NOW,
        finished_at=None,
    )
    return msgspec.structs.replace(plain, **changes)


RUNS = transfer()
ENDED = transfer(status="completed", bytes_done=100, finished_at=NOW + 1)
TRANSFERS = [
    ("it begins", None, RUNS, ["download_started"]),
    ("nothing moves", RUNS, RUNS, []),
    ("it waits, then moves", transfer(status="pending", bytes_done=0), transfer(bytes_done=0),
     ["download_progress"]),
    ("it moves", RUNS, transfer(bytes_done=20), ["download_progress"]),
    ("it is done", RUNS, ENDED, ["download_completed"]),
    ("it fails", RUNS, transfer(status="failed", finished_at=NOW + 1), ["download_failed"]),
    ("it is cancelled", RUNS, transfer(status="cancelled", finished_at=NOW + 1),
     ["download_failed"]),
    ("it was over before", ENDED, ENDED, []),
    ("it began and ended unseen", None, ENDED, ["download_started", "download_completed"]),
    ("it began before anybody listened", None, transfer(started_at=NOW - 50), []),
    ("it began before, and ended since", None, transfer(
        started_at=NOW - 50, status="completed", finished_at=NOW + 1), ["download_completed"]),
    ("it ended long ago", None, transfer(
        started_at=NOW - 50, status="completed", finished_at=NOW - 40), []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "kinds"), [row[1:] for row in TRANSFERS], ids=[row[0] for row in TRANSFERS]
)
def test_transfers(before: Transfer | None, after: Transfer, kinds: list[str]) -> None:
    known = {} if before is None else {before.id: before}
    events = transfer_events(known, [after], since=NOW)
    assert [event.kind for event in events] == kinds
    assert all(event.transfer == after and event.node_id == A for event in events)


def test_a_transfer_that_waits_or_runs_is_downloading() -> None:
    events = transfer_events({}, [RUNS], since=NOW)
    assert events == [ModelEvent("download_started", M, A, "downloading", RUNS)]


def test_the_tables_know_every_kind() -> None:
    told = {kind for row in (*NODES, *MODELS) for kind, *_ in row[3]}
    told |= {kind for row in TRANSFERS for kind in row[3]}
    assert told == ALL_KINDS
