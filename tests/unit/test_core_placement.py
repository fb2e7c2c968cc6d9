"""Placement: tables of decisions, and what must hold of all of them together."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.core.measures import Demand
from ollamad.core.placement import (
    KEEP_FREE_BYTES,
    MAX_COMING,
    Ledger,
    Placement,
    Policy,
    Rates,
    Site,
    View,
    decide,
    explain,
    memory_needed,
    plan,
    sole_copies,
)
from ollamad.core.state import Layer, Model, ModelDetails
from tests.fakes.api_services import model as some_model

GB = 1_000_000_000
BY_HAND = Policy(automatic=False)
A, B, C, D, E = (NodeId(name) for name in "ABCDE")
NAME = "m:latest"


def site(node_id: str, **changes: Any) -> Site:
    plain = Site(NodeId(node_id), f"host-{node_id}", True, disk_free=100 * GB, memory=32 * GB)
    return dataclasses.replace(plain, **changes)


def model(
    desired: str = "A", confirmed: str | None = None, name: str = NAME, **changes: Any
) -> Model:
    held = desired if confirmed is None else confirmed
    size = changes.pop("size", 4 * GB)
    plain = some_model(
        name,
        desired=tuple(NodeId(n) for n in sorted(desired)),
        confirmed=tuple(NodeId(n) for n in sorted(held)),
        layers=(Layer("weights", f"sha256:{name}", size, 1, ""),),
        details=ModelDetails(kv_bytes_per_token=1000),
    )
    return msgspec.structs.replace(plain, **changes)


def view(sites: Iterable[Site], *models: Model, **changes: Any) -> View:
    return View({s.node_id: s for s in sites}, {m.name: m for m in models}, **changes)


def desired(decided: View, name: str = NAME) -> str:
    """Where the model should be, as letters."""
    return "".join(decide(decided, Ledger(decided), decided.models[name]).desired)


FIVE = {n: site(n) for n in "ABCDE"}


def with_sites(**changes: Mapping[str, Any]) -> list[Site]:
    """Five nodes, some of them changed; None takes one out."""
    return [dataclasses.replace(s, **changes.get(n, {})) for n, s in FIVE.items()]


AWAY = {"online": False, "away_s": 10.0}
LOST = {"online": False, "away_s": 301.0}
DRAINS = {"draining": True, "away_s": 10.0}
DRAINS_LONG = {"draining": True, "away_s": 301.0}


@pytest.mark.parametrize(
    ("placed", "sites", "expected"),
    [
        # As many as there should be, and what is there stays.
        (model("A"), {}, "AB"),
        (model("AB"), {}, "AB"),
        (model("DE"), {}, "DE"),
        (model("AB", "A"), {}, "AB"),  # the copy is on its way
        (model("A", replicas=4), {}, "ABCD"),
        (model("A", replicas=9), {}, "ABCDE"),
        # Fewer are wanted: who has it not yet goes first.
        (model("ABC", "AC", replicas=2), {}, "AC"),
        (model("ABC", "B", replicas=1), {}, "B"),
        (model("ABC", replicas=1, pinned=(C,)), {}, "C"),
        (model("A", replicas=1, pinned=(C,)), {}, "C"),  # A keeps it until C has it
        (model("A", pinned=(C, D, E)), {}, "CDE"),
        # A node is away: for a moment nothing moves, then another one takes its place.
        (model("AB"), {"B": AWAY}, "AB"),
        (model("AB"), {"B": LOST}, "AC"),
        (model("AB"), {"B": LOST, "C": AWAY, "D": AWAY, "E": AWAY}, "AB"),  # nobody else can
        (model("AC", "ABC"), {"B": LOST}, "AC"),
        (model("AC", "AB"), {}, "AB"),  # it is back before the other one was ready
        (model("AC", "ABC"), {}, "AC"),  # and after
        (model("AC", "ABC"), {"C": AWAY}, "AB"),  # a copy that serves is better than one that may
        # Nobody to copy from: whoever had it is waited for.
        (model("AB"), {"A": LOST, "B": LOST}, "AB"),
        (model("AB", ""), {}, "AB"),
        # Draining: what only that node serves moves at once, the rest if it takes long.
        (model("A", replicas=1), {"A": DRAINS}, "B"),
        (model("AB"), {"A": DRAINS}, "AB"),
        (model("AB"), {"A": DRAINS_LONG}, "BC"),
        (model("AB"), {"A": DRAINS, "B": DRAINS}, "CD"),
        (model("AB", "A"), {"B": DRAINS}, "AC"),  # it was about to fetch
        (model("A", replicas=1), dict.fromkeys("ABCDE", DRAINS), "A"),
        # One drains, one is just restarted: one more is enough.
        (model("AB"), {"A": DRAINS, "B": AWAY}, "BC"),
        # The rescuer is lost before it had the copy: the next one.
        (model("B", "A", replicas=1), {"A": DRAINS, "B": AWAY}, "C"),
        # Asked for by name: also where it is away, and beside it enough that are there.
        (model("A", pinned=(B,)), {"B": LOST}, "ABC"),
        (model("AB", pinned=(B,)), {"B": DRAINS_LONG}, "ABC"),
        (model("A", pinned=(NodeId("Z"),)), {}, "AB"),  # a member no more
    ],
)  # fmt: skip
def test_where_a_model_should_be(
    placed: Model, sites: dict[str, dict[str, Any]], expected: str
) -> None:
    assert desired(view(with_sites(**sites), placed)) == expected


@pytest.mark.parametrize(
    ("placed", "sites", "expected"),
    [
        (model("A"), {}, "A"),  # nobody asked for a second one
        (model("AB"), {}, "AB"),  # nor to take one away
        (model("ABC", replicas=2), {}, "AB"),  # somebody did
        (model("A", replicas=2), {}, "AB"),
        (model("AB", replicas=2), {"B": LOST}, "AC"),  # repaired: it was asked for
        (model("AB"), {"B": LOST}, "AB"),  # it was not
        (model("A"), {"A": DRAINS}, "B"),
        (model("A", pinned=(C,)), {}, "AC"),
        (model("ABC"), {"B": LOST}, "ABC"),
    ],
)
def test_without_automatic_distribution_only_what_was_asked_for_is_kept_up(
    placed: Model, sites: dict[str, dict[str, Any]], expected: str
) -> None:
    assert desired(view(with_sites(**sites), placed, policy=BY_HAND)) == expected


SMALL, LARGE = model("A", size=1 * GB), model("A", size=20 * GB)
NO_ROOM = {"no_room": frozenset([NAME])}
FULL = {"disk_free": KEEP_FREE_BYTES}


SLOW = {n: {"rates": Rates(1e8, 5e8)} for n in "ABCDE"}
QUICK = {"rates": Rates(1e9, 1e8)}  # to come, not to load


@pytest.mark.parametrize(
    ("placed", "sites", "expected"),
    [
        # The cheapest: what is missing over the link, and the time to load it.
        (LARGE, SLOW | {"D": {"rates": Rates(1e9, 5e8)}}, "AD"),
        (LARGE, SLOW | {"D": {"rates": Rates(1e8, 4e9)}}, "AB"),  # 205 s instead of 240
        (SMALL, SLOW | {"D": {"rates": Rates(1.01e8, 5e8)}}, "AB"),
        (LARGE, dict.fromkeys("ABCE", QUICK) | {"D": {"rates": Rates(1e9, 1e9)}}, "AD"),
        # As the measured ones are, so are the others taken to be.
        (LARGE, {"B": {"rates": Rates(1e6)}} | dict.fromkeys("CD", QUICK), "AC"),
        (LARGE, {n: {"rates": Rates(receive=1e9)} for n in "CDE"}, "AB"),
        # Nearly as cheap is as cheap: the roomiest then, else the first.
        (LARGE, {"E": {"disk_free": 120 * GB}, "C": {"rates": Rates(1.2e8)}}, "AE"),
        (SMALL, {"B": {"rates": Rates(2e9)}, "C": {"disk_free": 200 * GB}}, "AC"),
        # Where it fits: on the disk with a reserve, and in memory.
        (SMALL, {"B": FULL}, "AC"),
        (SMALL, {"B": {"disk_free": KEEP_FREE_BYTES + GB - 1}}, "AC"),
        (SMALL, {"C": {"disk_free": KEEP_FREE_BYTES + GB}, "B": FULL, "D": FULL, "E": FULL}, "AC"),
        (LARGE, {"B": {"memory": 20 * GB}}, "AC"),
        (SMALL, dict.fromkeys("BCDE", FULL), "A"),
        # Who found no room for it is left out, but for who was asked for by name.
        (SMALL, {"B": NO_ROOM}, "AC"),
        (model("AB", "A"), {"B": NO_ROOM}, "AC"),
        (model("AB"), {"B": NO_ROOM}, "AB"),  # it was so once
        (model("AB", "A"), dict.fromkeys("BCDE", NO_ROOM), "AB"),  # it tries again
        (model("AB", "A", pinned=(B,)), {"B": NO_ROOM}, "AB"),
        # The only copy goes wherever it can be kept, also where it cannot run.
        (LARGE, {"A": DRAINS} | {n: {"memory": GB} for n in "BCDE"}, "AB"),
        # Apart: not on the same machine, even if that is cheaper.
        (LARGE, {"B": {"host": "host-A", "rates": Rates(1e9)}}, "AC"),
        (model("AB", replicas=3), {n: {"host": "x"} for n in "ABC"}, "ABD"),
        (model("ABC", replicas=2), {n: {"host": "x"} for n in "AB"}, "AC"),
        (LARGE, {n: {"host": "x"} for n in "ABCDE"}, "AB"),
    ],
)  # fmt: skip
def test_where_a_copy_goes(placed: Model, sites: dict[str, dict[str, Any]], expected: str) -> None:
    assert desired(view(with_sites(**sites), placed)) == expected


def test_what_models_share_does_not_travel() -> None:
    base = model("AD", name="base:latest", size=20 * GB)
    tuned = model("A", size=21 * GB, layers=(*base.layers, Layer("adapter", "sha256:x", GB, 1, "")))
    assert desired(view(FIVE.values(), base, tuned)) == "AD"


def test_what_is_on_its_way_takes_its_room_and_its_time() -> None:
    big = model("AB", "A", name="big:latest", size=90 * GB)
    sites = with_sites(**{n: {"memory": 200 * GB} for n in "ABCDE"})
    assert desired(view(sites, big, model("A", size=30 * GB))) == "AC"
    # It would fit on either, and is sooner on the one that fetches nothing.
    sites = [dataclasses.replace(s, disk_free=500 * GB) for s in sites]
    assert desired(view(sites, big, model("A", size=30 * GB))) == "AC"


def test_a_node_gets_some_copies_at_a_time_and_then_the_rest() -> None:
    models = [model("A", name=f"m{i}:latest") for i in range(3 * MAX_COMING)]
    two = view([site("A"), site("B")], *models)
    first = plan(two)
    assert len(first) == MAX_COMING
    followed = follow(two, first)
    assert plan(followed) == []  # they are on their way
    rounds = 0
    while placements := plan(followed := all_arrived(followed)):
        followed = follow(followed, placements)
        rounds += 1
    assert rounds == 2
    assert all(m.confirmed == (A, B) for m in followed.models.values())


def test_what_nobody_serves_comes_first_and_the_small_before_the_large() -> None:
    drained = with_sites(A=DRAINS)
    models = [
        model("C", name="a:latest", size=GB),
        model("A", name="b:latest", size=9 * GB, replicas=1),
        model("A", name="c:latest", size=5 * GB, replicas=1),
        model("C", name="d:latest", size=2 * GB),
    ]
    ordered = [p.model.name for p in plan(view(drained, *models))]
    assert ordered == ["c:latest", "b:latest", "a:latest", "d:latest"]
    assert len(plan(view(drained, *models), limit=2)) == 2


# Hot models.


def hot(recent: float, lasting: float = 0.0) -> dict[str, Demand]:
    return {NAME: Demand(NAME, recent, lasting)}


@pytest.mark.parametrize(
    ("placed", "demand", "count"),
    [
        (model("A", replicas=1), hot(2.0), 1),
        (model("A", replicas=1), hot(2.1), 2),  # over 2 a copy
        (model("AB"), hot(4.0), 2),
        (model("AB"), hot(4.1), 3),
        (model("AB"), hot(99.0), 3),  # one at a time
        (model("ABC", "AB"), hot(99.0), 3),  # which must be there before the next
        (model("ABCDE"), hot(99.0), 5),
        # It cools late: at half of what had made it hot, also over the longer time.
        (model("ABC"), hot(2.0), 3),
        (model("ABC"), hot(1.9), 2),
        (model("ABC"), hot(0.0, 2.0), 3),
        (model("ABC"), hot(0.0, 1.9), 2),
        (model("ABC"), {}, 2),
        (model("ABCDE"), {}, 2),
        (model("ABCDE"), hot(3.1), 4),
        (model("AB"), {}, 2),
        (model("ABC", replicas=3), {}, 3),
    ],
)
def test_demand_makes_copies_come_and_go(
    placed: Model, demand: dict[str, Demand], count: int
) -> None:
    assert len(desired(view(FIVE.values(), placed, demand=demand))) == count
    # By hand it is by hand.
    by_hand = view(FIVE.values(), placed, demand=demand, policy=BY_HAND)
    assert len(desired(by_hand)) == len(placed.desired)


@given(st.floats(0, 30), st.integers(1, 5))
def test_steady_demand_gives_a_steady_number_of_copies(requests: float, begin: int) -> None:
    """Wherever it starts: it climbs or falls to a number and stays there."""
    state = view(FIVE.values(), model("ABCDE"[:begin], replicas=1), demand=hot(requests, requests))
    counts = [begin]
    for _ in range(12):
        state = all_arrived(follow(state, plan(state)))
        counts.append(len(state.models[NAME].desired))
    assert counts in (sorted(counts), sorted(counts, reverse=True))
    assert len(set(counts[-6:])) == 1
    assert requests <= 2 * counts[-1] or counts[-1] == 5


# Sole copies.


@pytest.mark.parametrize(
    ("placed", "sites", "sole"),
    [
        (model("A"), {}, True),
        (model("AB"), {}, False),
        (model("AB", "A"), {}, True),
        (model("AB"), {"B": AWAY}, True),
        (model("AB"), {"B": DRAINS}, True),
        (model("B"), {}, False),
        (model("A", "AZ"), {}, True),  # Z is a member no more
    ],
)
def test_what_would_be_lost_with_a_node(
    placed: Model, sites: dict[str, dict[str, Any]], sole: bool
) -> None:
    found = sole_copies(view(with_sites(**sites), placed), A)
    assert [m.name for m in found] == ([NAME] if sole else [])


# What is told about it.


def test_every_node_is_explained() -> None:
    sites = with_sites(
        B={"rates": Rates(receive=1e8, load=5e8)},
        C={"online": False, "away_s": 400.0},
        D={"disk_free": 2 * GB},
        E={"memory": GB},
    )
    told = explain(
        view([*sites, site("F"), site("G", draining=True)], model("AF", "A")), model("AF", "A")
    )
    assert (told.want, told.reason) == (2, "2 by default")
    assert [v.node_id for v in told.nodes][:2] == [A, "F"]
    by_node = {v.node_id: v for v in told.nodes}
    assert {n: v.state for n, v in by_node.items()} == {
        "A": "holds", "F": "fetching", "B": "none", "C": "none", "D": "none", "E": "none",
        "G": "none",
    }  # fmt: skip
    assert by_node[B].score_s == pytest.approx(40 + 8)  # 4 GB over the link, then from the disk
    assert by_node[B].reason == "not needed (2 by default)"
    assert by_node[C].reason == "it is offline"
    assert by_node[D].reason == (
        "too little disk: 4.0 GB are missing there, and 0.9 GB may be filled"
    )
    assert by_node[E].reason.startswith("too little memory: it needs 4.1 GB, and the node has 1.0")
    assert by_node[NodeId("G")].reason == "it drains"
    assert by_node[C].score_s is None


@pytest.mark.parametrize(
    ("placed", "changes", "reason"),
    [
        (model("AB", replicas=2), {}, "2 asked for"),
        (model("AB", pinned=(A, B, C)), {}, "3 nodes asked for by name"),
        (model("A"), {"policy": BY_HAND}, "the first copy (automatic distribution is off)"),
        (model("AB"), {"policy": BY_HAND}, "as many as there are (automatic distribution is off)"),
        (
            model("AB"),
            {"demand": hot(5.0)},
            "2 by default, 1 more: 5.0 requests at once are over 2 a copy",
        ),
        (
            model("ABC"),
            {"demand": hot(1.0, 2.9)},
            "2 by default, 1 more: 2.9 requests at once lately",
        ),
    ],
)
def test_why_there_are_so_many(placed: Model, changes: dict[str, Any], reason: str) -> None:
    assert explain(view(FIVE.values(), placed, **changes), placed).reason == reason


def test_one_node_cannot_have_two_copies() -> None:
    told = explain(view([site("A")], model("A")), model("A"))
    assert (told.want, told.reason) == (1, "1 of 2 by default, for want of nodes")


@pytest.mark.parametrize(
    ("placed", "node", "state", "reason"),
    [
        (model("AB"), {"B": AWAY}, "holds", "2 by default; it is offline"),
        (model("AB", pinned=(B,)), {}, "holds", "asked for by name"),
        (model("AC", "ABC"), {}, "spare", "more than needed (2 by default)"),
        (model("AB", "A"), {"B": AWAY}, "waiting", "2 by default; it fetches it when it is back"),
        (model("AB"), {"B": DRAINS}, "holds", "it drains"),
        (model("AC", "ABC"), {"B": DRAINS}, "holds", "it drains, and needs its copy no more"),
        (model("A"), {}, "none", "2 by default; among the cheapest"),
        (model("AB", "A", pinned=(B,)), {}, "fetching", "asked for by name"),
    ],
)
def test_what_is_said_of_one_node(
    placed: Model, node: dict[str, dict[str, Any]], state: str, reason: str
) -> None:
    told = explain(view(with_sites(**node), placed), placed)
    [verdict] = [v for v in told.nodes if v.node_id == B]
    assert (verdict.state, verdict.reason) == (state, reason)


def test_memory_has_room_for_weights_and_some_context() -> None:
    assert memory_needed(model(size=GB)) == GB + 4096 * 1000 + (64 << 20)


# What holds of every decision.


def follow(before: View, placements: Iterable[Placement]) -> View:
    """The cluster after those changes; nothing is copied yet."""
    models = dict(before.models)
    for placement in placements:
        models[placement.model.name] = msgspec.structs.replace(
            placement.model, desired=placement.desired
        )
    return dataclasses.replace(before, models=models)


def arrived(before: View, nodes: Iterable[NodeId]) -> View:
    """Those nodes fetched what they should hold and gave up what they need not."""
    models = dict(before.models)
    for node_id in nodes:
        for name, placed in list(models.items()):
            online = [n for n in placed.confirmed if n in before.sites and before.sites[n].online]
            confirmed = set(placed.confirmed)
            has_room = name not in before.sites[node_id].no_room
            if has_room and node_id in placed.desired and any(n != node_id for n in online):
                confirmed.add(node_id)
            spare = node_id not in placed.desired and not before.sites[node_id].draining
            others = [n for n in online if n != node_id]
            if spare and others and set(placed.desired) <= confirmed - {node_id}:
                confirmed.discard(node_id)
            models[name] = msgspec.structs.replace(placed, confirmed=tuple(sorted(confirmed)))
    return dataclasses.replace(before, models=models)


def all_arrived(before: View) -> View:
    return arrived(before, [n for n, s in before.sites.items() if s.online])


NODE_NAMES = "ABCDEFGH"
SITES = st.builds(
    lambda name, host, away, draining, disk, memory, receive, no_room: Site(
        NodeId(name),
        f"host-{host}",
        away == 0.0,
        draining,
        max(away, 10.0 * draining),
        disk * GB,
        memory * GB,
        Rates(receive, receive),
        frozenset(no_room),
    ),
    st.sampled_from(NODE_NAMES),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.0, 0.0, 10.0, 500.0]),
    st.sampled_from([False, False, False, True]),
    st.integers(0, 60),
    st.sampled_from([2, 8, 64]),
    st.sampled_from([0.0, 1e6, 1e8, 1e9]),
    st.sampled_from([(), (), (), ("m0:latest", "m1:latest")]),
)
NODE_SETS = st.sets(st.sampled_from(NODE_NAMES), max_size=5).map(
    lambda found: "".join(sorted(found))
)
MODELS = st.builds(
    lambda number, wanted, held, replicas, pins, size: model(
        wanted,
        held,
        name=f"m{number}:latest",
        replicas=replicas,
        pinned=tuple(NodeId(n) for n in sorted(pins)),
        size=size * GB,
    ),
    st.integers(0, 5),
    NODE_SETS,
    NODE_SETS,
    st.sampled_from([0, 0, 0, 1, 2, 3, 7]),
    st.sets(st.sampled_from(NODE_NAMES), max_size=2),
    st.integers(1, 12),
)


@st.composite
def views(draw: st.DrawFn) -> View:
    sites = draw(st.lists(SITES, min_size=1, max_size=8, unique_by=lambda s: s.node_id))
    members = {s.node_id for s in sites}
    models = [
        msgspec.structs.replace(
            m,
            desired=tuple(n for n in m.desired if n in members),
            confirmed=tuple(n for n in m.confirmed if n in members),
            pinned=tuple(n for n in m.pinned if n in members),
        )
        for m in draw(st.lists(MODELS, max_size=6))
    ]
    demand = {
        m.name: Demand(m.name, draw(st.floats(0, 20)), draw(st.floats(0, 20)))
        for m in models
        if draw(st.booleans())
    }
    return view(sites, *models, demand=demand, policy=Policy(automatic=draw(st.booleans())))


@settings(max_examples=150, deadline=None)
@given(views(), st.randoms(use_true_random=False))
def test_the_same_cluster_gives_the_same_plan_in_whatever_order_it_is_told(
    before: View, random: Any
) -> None:
    sites, models = list(before.sites.items()), list(before.models.items())
    random.shuffle(sites)
    random.shuffle(models)
    shuffled = dataclasses.replace(before, sites=dict(sites), models=dict(models))
    assert plan(shuffled) == plan(before)


@settings(max_examples=150, deadline=None)
@given(views())
def test_a_plan_that_was_followed_is_followed_by_none(before: View) -> None:
    """Before anything else changes; but where a copy was called off there is room for another."""
    before = dataclasses.replace(before, demand={})  # its copies come one by one
    first = plan(before)
    again = plan(follow(before, first))
    taken = {n for p in again for n in set(p.model.desired) - set(p.desired)}
    assert not any(before.sites[n].available for n in taken), "nothing is taken back"
    called_off = {n for p in first for n in set(p.model.desired) - set(p.desired)}
    assert all(set(p.desired) - set(p.model.desired) <= called_off for p in again)


@settings(max_examples=150, deadline=None)
@given(views(), st.data())
def test_no_order_of_events_takes_the_last_copy_away(before: View, data: st.DataObject) -> None:
    state = before
    nodes = [n for n, s in before.sites.items() if s.online]
    for _ in range(6):
        state = follow(state, plan(state))
        state = arrived(
            state, data.draw(st.lists(st.sampled_from(nodes), max_size=4)) if nodes else []
        )
        for name, placed in state.models.items():
            had = [n for n in before.models[name].confirmed if before.sites[n].online]
            has = [n for n in placed.confirmed if before.sites[n].online]
            assert bool(has) >= bool(had), "somebody who is there has it"
            if any(before.sites[n].available for n in had):
                assert any(before.sites[n].available for n in has), "and can serve it"


@settings(max_examples=150, deadline=None)
@given(views())
def test_a_cluster_that_is_left_alone_comes_to_rest_with_what_was_wanted(before: View) -> None:
    state = before
    for _ in range(40):
        placements = plan(state)
        moved = all_arrived(follow(state, placements))
        if not placements and moved == state:
            break
        state = moved
    assert plan(state) == []
    ledger = Ledger(state)
    for placed in state.models.values():
        if not any(state.sites[n].online for n in placed.confirmed):
            continue
        decision = decide(state, ledger, placed)
        live = [n for n in placed.confirmed if state.sites[n].available]
        away = [  # or there, and without room for it: nobody else could take its place
            n
            for n in decision.desired
            if not state.sites[n].available
            or (placed.name in state.sites[n].no_room and n not in placed.confirmed)
        ]
        room = [
            v
            for v in explain(state, placed).nodes
            if not v.desired and v.state == "none" and v.score_s is not None
        ]
        assert len(live) + len(away) >= decision.want or not room, "as many as wanted or as fit"
        surplus = [n for n in live if n not in decision.desired]
        assert not surplus or away, "and no more"


@settings(max_examples=150, deadline=None)
@given(views())
def test_nothing_moves_that_need_not(before: View) -> None:
    """No node gets a copy while as many that have it, or are getting it, are there."""
    for placement in plan(before):
        placed = placement.model
        new = set(placement.desired) - set(placed.desired) - set(placed.confirmed)
        want = decide(before, Ledger(before), placed).want
        there = [  # but for those that found no room for it: somebody takes their place
            n
            for n in {*placed.desired, *placed.confirmed}
            if n in before.sites
            and before.sites[n].available
            and (placed.name not in before.sites[n].no_room or n in placed.confirmed)
        ]
        assert len(new - set(placed.pinned)) <= max(0, want - len(there))


def test_a_hundred_nodes_stay_at_rest_and_repair_only_what_a_loss_breaks() -> None:
    """300 models on 100 machines: joins move nothing, a loss moves what was there, once."""
    nodes = [NodeId(f"N{i:03}") for i in range(100)]
    sites = {
        n: site(n, host=f"host-{i // 2}", disk_free=(200 + i) * GB, memory=(16 + i % 5 * 16) * GB,
                rates=Rates(1e8 * (1 + i % 7), 5e8))
        for i, n in enumerate(nodes)
    }  # fmt: skip
    models = {
        f"m{i}:latest": msgspec.structs.replace(
            model("A", name=f"m{i}:latest", size=(1 + i % 14) * GB, replicas=i % 4),
            desired=(nodes[i % 97],), confirmed=(nodes[i % 97],),
        )
        for i in range(300)
    }  # fmt: skip
    state = View(sites, models)
    for _ in range(60):
        placements = plan(state)
        state = all_arrived(follow(state, placements))
        if not placements:
            break
    assert plan(state) == []
    for placed in state.models.values():
        assert len(placed.confirmed) == (placed.replicas or 2)
        hosts = {state.sites[n].host for n in placed.confirmed}
        assert len(hosts) == len(placed.confirmed), "each copy on another machine"
    held = [sum(n in m.confirmed for m in state.models.values()) for n in nodes]
    assert max(held) <= 25, "no node gets everything"

    joined = dataclasses.replace(state, sites={**state.sites, NodeId("new"): site("new")})
    assert plan(joined) == [], "a join alone moves nothing"

    lost = nodes[50]
    gone = {**state.sites, lost: dataclasses.replace(state.sites[lost], online=False, away_s=999)}
    broken = {m.name for m in state.models.values() if lost in m.confirmed}
    state = dataclasses.replace(state, sites=gone)
    moved: set[str] = set()
    copies = 0
    while placements := plan(state):
        moved |= {p.model.name for p in placements}
        copies += sum(len(set(p.desired) - set(p.model.confirmed)) for p in placements)
        state = all_arrived(follow(state, placements))
    assert broken, "the node held something"
    assert moved == broken
    assert copies == len(broken), "one copy for each that was lost"

    back = dataclasses.replace(
        state, sites={**gone, lost: dataclasses.replace(gone[lost], online=True, away_s=0.0)}
    )
    assert plan(back) == [], "its return moves nothing"
    assert all(
        lost not in m.confirmed for m in all_arrived(back).models.values() if m.name in broken
    )
