"""Suspicion by silence, gossip of beats, and what the table of presences makes of both."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.gossip import (
    FANOUT,
    MAX_RUMOURS,
    RETOLD,
    RUMOUR_ID_CHARS,
    Gossip,
    rumour_of,
)
from ollamad.core.ids import NodeId
from ollamad.core.inference import LoadedModel
from ollamad.core.presence import UNREACHED_S, Beat, ModelLoad, PresenceTable, Rumour, Usage
from ollamad.core.shares import MAX_TOLD_NAMES, Asking, Shares
from ollamad.core.speeds import Speed, short_digest
from ollamad.core.suspicion import CONVICT, SUSPECT, PhiAccrual
from ollamad.wire.codec import encode

A, B = NodeId("A"), NodeId("B")
DIGEST = "sha256:" + "0123456789ab" + "c" * 52


def heard(*times: float) -> PhiAccrual:
    signs = PhiAccrual(1.0, times[0])
    for time in times[1:]:
        signs.hear(time)
    return signs


def silence(signs: PhiAccrual, phi: float) -> float:
    """How long it may be silent until that suspicion."""
    since = signs.last
    step = 0
    while signs.phi(since + step / 100) < phi:
        step += 1
    return step / 100


def test_a_steady_node_is_suspected_after_a_missed_beat() -> None:
    signs = heard(*range(40))
    assert 1.2 < silence(signs, SUSPECT) < 1.7
    assert 1.5 < silence(signs, CONVICT) < 2.2
    assert signs.phi(39.5) == 0.0


def test_an_irregular_node_gets_more_time() -> None:
    rng = random.Random(1)
    times = [0.0]
    for _ in range(60):
        times.append(times[-1] + rng.uniform(0.2, 2.5))
    assert silence(heard(*times), SUSPECT) > 2.5
    rare = heard(*(10.0 * n for n in range(20)))
    assert silence(rare, SUSPECT) > 12


def test_two_signs_at_once_do_not_make_it_impatient() -> None:
    times = [float(n) for n in range(40)]
    doubled = sorted(times + [time + 0.001 for time in times])
    assert silence(heard(*doubled), SUSPECT) == pytest.approx(
        silence(heard(*times), SUSPECT), abs=0.1
    )


@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=60),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_suspicion_only_grows_with_silence(gaps: list[float], one: float, other: float) -> None:
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    signs = heard(*times)
    low, high = sorted((one, other))
    assert 0 <= signs.phi(times[-1] + low) <= signs.phi(times[-1] + high)


# The table.


def beat(sent_at: float, **fields: object) -> Beat:
    return Beat(sent_at, Usage(cpu=0.5), **fields)  # type: ignore[arg-type]


def loaded(busy: int = 0) -> LoadedModel:
    return LoadedModel("m:latest", DIGEST, 10, 0, 4096, 0.0, slots=4, busy=busy)


def test_who_is_silent_is_suspect_and_an_answer_clears_it() -> None:
    table = PresenceTable()
    for second in range(10):
        table.hear(A, beat(second), float(second), 0.0)
    assert table.suspects(10.2) == []
    assert table.suspects(11.0) == [A]
    table.reached(A, 11.0)
    assert table.suspects(11.5) == []
    assert table.sweep(13.0) == []


def test_who_is_not_reached_is_offline_until_it_beats_itself() -> None:
    table = PresenceTable()
    table.hear(A, beat(1.0), 0.0, 0.0)
    assert table.convict(A, 1.0)
    assert not table.convict(A, 1.0)
    assert not table.of(A).online
    rumour = Rumour("A", 5.0)
    assert table.hear_of(A, rumour, 2.0, 0.0) is None, "others may reach it, we do not"
    assert table.hear_of(A, rumour, 1.1 + UNREACHED_S, 0.0)
    table.convict(A, 40.0)
    assert table.hear(A, beat(6.0), 41.0, 0.0)


def test_a_rumour_is_news_only_if_it_is_newer() -> None:
    table = PresenceTable()
    table.hear(A, beat(10.0, loaded=(loaded(),)), 0.0, 0.0)
    assert table.hear_of(A, Rumour("A", 10.0), 1.0, 0.0) is None
    load = ModelLoad(short_digest(DIGEST), 4, 3, 2, 77)
    assert table.hear_of(A, Rumour("A", 11.0, (load,), 5), 1.0, 0.0) is False
    told = table.of(A).beat
    assert (told.loaded[0].busy, told.loaded[0].queued, told.loaded[0].name) == (3, 2, "m:latest")
    assert (told.waiting, told.usage.cpu) == (5, 0.5)
    assert told.speeds == (Speed(short_digest(DIGEST), 77),)
    assert table.hear_of(A, Rumour("A", 12.0, leaving=True), 2.0, 0.0) is False
    assert not table.of(A).online


def test_a_node_is_known_by_rumour_alone() -> None:
    table = PresenceTable()
    load = ModelLoad(short_digest(DIGEST), 4, 1, 0)
    assert table.hear_of(A, Rumour("A", 3.0, (load,)), 0.0, 50.0)
    assert table.of(A).online
    assert short_digest(table.of(A).beat.loaded[0].digest) == short_digest(DIGEST)


def test_a_rumour_tells_what_routing_needs() -> None:
    told = rumour_of(
        NodeId("Qm" + "x" * 44),
        beat(9.0, loaded=(loaded(2),), speeds=(Speed(short_digest(DIGEST), 41),), waiting=3),
    )
    assert told == Rumour(
        "Qm" + "x" * (RUMOUR_ID_CHARS - 2),
        9.0,
        (ModelLoad(short_digest(DIGEST), 4, 2, 0, 41),),
        3,
    )


# Gossip.


def gossip() -> Gossip:
    return Gossip(random.Random(1).shuffle)


def nodes(count: int) -> list[NodeId]:
    return [NodeId(f"{number:012}") for number in range(count)]


def test_a_small_cluster_tells_everybody_and_passes_nothing_on() -> None:
    peers = nodes(FANOUT)
    one = gossip()
    one.hear(Rumour(peers[0], 1.0))
    assert sorted(one.next_round(peers)) == peers
    assert one.pass_on(peers, peers[1]) == ()


def test_in_a_large_one_everybody_has_a_turn() -> None:
    peers = nodes(50)
    one = gossip()
    rounds = [one.next_round(peers) for _ in range(20)]
    assert all(len(set(each)) == FANOUT for each in rounds)
    told = [node_id for each in rounds[:7] for node_id in each]
    assert set(told) == set(peers)
    assert max(told.count(node_id) for node_id in peers) <= 2


def test_who_left_has_no_turn_any_more() -> None:
    one = gossip()
    one.next_round(nodes(50))
    for _ in range(10):
        assert set(one.next_round(nodes(20))) <= set(nodes(20))


def test_news_are_passed_on_some_times_and_not_to_whom_they_are_of() -> None:
    peers = nodes(30)
    one = gossip()
    one.hear(Rumour(peers[0], 1.0))
    assert one.pass_on(peers, peers[0]) == ()
    told = [one.pass_on(peers, peers[1]) for _ in range(2 * RETOLD)]
    assert sum(map(len, told)) == RETOLD
    one.hear(Rumour(peers[0], 0.5))  # older
    assert one.pass_on(peers, peers[1]) == ()
    one.hear(Rumour(peers[0], 2.0))
    assert one.pass_on(peers, peers[1]) == (Rumour(peers[0], 2.0),)
    one.forget(peers[0])
    assert one.pass_on(peers, peers[1]) == ()


def test_a_beat_is_small_in_any_cluster() -> None:
    peers = nodes(1000)
    one = gossip()
    load = ModelLoad(short_digest(DIGEST), 4, 3, 10, 5000)
    for node_id in peers:
        one.hear(Rumour(node_id, 1.79e9, (load,), 3))
    heard = one.pass_on(peers, peers[0])
    assert len(heard) == MAX_RUMOURS
    names = bytes(range(4 * MAX_TOLD_NAMES))
    who = Asking(load.model, (1 << MAX_TOLD_NAMES) - 1, 99)
    shares = Shares(names, (1 << 30,) * MAX_TOLD_NAMES, (who,) * 4)
    whole = msgspec.structs.replace(beat(1.0), heard=heard, shares=shares)
    assert len(encode(whole)) < 4300
