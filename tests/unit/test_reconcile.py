"""The leader's loop with a few nodes around it: placing, repairing, draining, handing over.

Stores, transfers and links are real, the consensus applies at once or when a test lets it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ollamad import reconcile as reconcile_module
from ollamad import share as share_module
from ollamad.api.services import ServiceError
from ollamad.core.commands import (
    ChangeSettings,
    ConfirmReplica,
    DeleteModel,
    PlaceReplicas,
    PutModel,
    RemoveMember,
    SetDesired,
    SetDraining,
)
from ollamad.core.ids import NodeId
from ollamad.core.inference import LoadedModel
from ollamad.core.measures import Demand
from ollamad.core.placement import Placement, Policy, View
from ollamad.core.presence import Beat, Usage
from ollamad.core.speeds import Speed, short_digest
from ollamad.core.state import Model, Settings
from ollamad.reconcile import Reconciler
from ollamad.store.errors import StoreFull
from tests.fakes.gguf_files import TENSORS, gguf_bytes
from tests.fakes.library_nodes import LibraryNode, SharedState, join, until
from tests.fakes.peer_net import PeerNet

A, B, C, D = (NodeId(name) for name in "ABCD")
NAME = "tiny:latest"
REFERENCE = "pypi:tiny"


class World:
    """Some nodes, of which A leads."""

    def __init__(self, nursery: trio.Nursery, root: Path) -> None:
        self.nursery = nursery
        self.shared = SharedState()
        self.net = PeerNet(nursery)
        content = gguf_bytes()
        self.nodes = {
            n: LibraryNode(self.shared, self.net, n, root / n, content) for n in (A, B, C, D)
        }

    async def start(self, *nodes: NodeId) -> None:
        join(self.shared, *(n for n in nodes if n not in self.shared.state.members))
        self.shared.offline -= set(nodes)
        for node_id in nodes:
            await self.nodes[node_id].start(self.nursery)
        self.lead(A)
        self.shared.notify()

    def lead(self, leader: NodeId) -> None:
        self.shared.leader = leader

    @property
    def model(self) -> Model:
        return self.shared.state.models[NAME]

    def held_by(self) -> str:
        model = self.shared.state.models.get(NAME)
        return "".join(model.confirmed) if model else ""

    async def comes_to_be_on(self, nodes: str) -> None:
        await until(self.shared, lambda: self.held_by() == nodes)
        assert "".join(self.model.desired) == nodes

    async def pulled(self, *nodes: NodeId) -> None:
        """Pull the model onto those nodes; more are welcome afterwards."""
        await self.nodes[A].library.download(REFERENCE, nodes=nodes)
        await until(self.shared, lambda: self.held_by() == "".join(nodes))
        self.shared.apply(PutModel(msgspec.structs.replace(self.model, replicas=0, pinned=())))

    async def lose(self, node_id: NodeId) -> None:
        await self.nodes[node_id].stop()
        self.shared.notify()

    def policy(self, **changes: Any) -> None:
        for node in self.nodes.values():
            if hasattr(node, "reconciler"):
                policy = dataclasses.replace(node.reconciler.policy, **changes)
                node.reconciler.policy = policy

    async def rest(self) -> None:
        """Some rounds pass."""
        await trio.sleep(0.15)
        await wait_all_tasks_blocked()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile_module, "INTERVAL_S", 0.02)
    monkeypatch.setattr(reconcile_module, "BURST_S", 0.0)
    monkeypatch.setattr(reconcile_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(reconcile_module, "BEAT_WAIT_S", 0.0)
    monkeypatch.setattr(reconcile_module, "STREAMS_POLL_S", 0.01)
    monkeypatch.setattr(share_module, "RECHECK_S", 0.05)


@pytest.fixture
async def world(nursery: trio.Nursery, tmp_path: Path) -> World:
    world = World(nursery, tmp_path)
    await world.start(A)
    return world


async def comes_to_hold(node: LibraryNode, model: Model, whole: bool) -> None:
    """Wait until the model's blobs are on the node's disk, or none of them."""
    digests = {layer.digest for layer in model.layers}
    with trio.fail_after(5):
        for _ in range(500):
            if await node.holds(digests) == (digests if whole else set()):
                return
            await trio.sleep(0.01)


# Placing and repairing.


async def test_a_join_gets_a_copy_only_where_one_is_wanted(world: World) -> None:
    await world.pulled(A)
    await world.rest()
    assert world.held_by() == "A", "there is no second node"
    await world.start(B)
    await world.comes_to_be_on("AB")
    await world.start(C)
    await world.rest()
    assert world.held_by() == "AB"


async def test_a_lost_nodes_copy_is_made_anew_after_the_grace_time(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    world.policy(lost_after_s=0.3)
    await world.lose(B)
    await world.rest()
    assert world.model.desired == (A, B), "it may be back in a moment"
    await until(world.shared, lambda: world.held_by() == "ABC")
    assert world.model.desired == (A, C)
    await world.start(B)
    await world.comes_to_be_on("AC")


async def test_a_node_that_is_back_in_time_is_left_alone(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    world.policy(lost_after_s=0.5)
    before = len(world.shared.proposed)
    for _ in range(3):
        await world.lose(B)
        await trio.sleep(0.25)
        await world.start(B)
        await trio.sleep(0.05)
    assert world.model.desired == (A, B)
    assert not [c for c in world.shared.proposed[before:] if isinstance(c, PlaceReplicas)]


async def test_a_member_that_is_gone_for_good_is_replaced_at_once(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    await world.lose(B)
    world.shared.apply(RemoveMember(B))
    await world.comes_to_be_on("AC")


async def test_the_number_that_was_asked_for_is_kept(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    await world.nodes[B].library.ask_replicas(NAME, 3)
    await world.comes_to_be_on("ABC")
    await world.nodes[B].library.ask_replicas(NAME, 1)
    await until(world.shared, lambda: len(world.held_by()) == 1)
    [left] = world.held_by()
    for node in world.nodes.values():
        if hasattr(node, "library"):
            await comes_to_hold(node, world.model, node.id == left)
    with pytest.raises(ServiceError) as caught:
        await world.nodes[B].library.ask_replicas("no-such", 1)
    assert caught.value.status == 404


async def test_without_automatic_distribution_only_what_was_asked_for_is_repaired(
    world: World,
) -> None:
    await world.start(B, C)
    world.shared.apply(ChangeSettings(Settings(auto_distribution=False)))
    await world.nodes[A].library.download(REFERENCE)
    await until(world.shared, lambda: world.held_by() == "A")
    await world.rest()
    assert world.held_by() == "A"
    await world.nodes[A].library.ask_replicas(NAME, 2)
    await world.comes_to_be_on("AB")
    world.policy(lost_after_s=0.1)
    await world.lose(B)
    await until(world.shared, lambda: world.held_by() == "ABC")


async def test_hot_models_spread_and_cool_ones_shrink(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    world.nodes[B].cluster.beat(demand=(Demand(NAME, 3.0, 0.1),))
    world.nodes[C].cluster.beat(demand=(Demand(NAME, 2.0, 0.1), Demand("other", 99, 99)))
    await world.comes_to_be_on("ABC")
    world.nodes[B].cluster.beat(demand=(Demand(NAME, 0.0, 2.5),))
    await world.rest()
    assert world.held_by() == "ABC", "it was hot not long ago"
    world.nodes[B].cluster.beat()
    world.nodes[C].cluster.beat()
    await until(world.shared, lambda: len(world.held_by()) == 2)


async def test_a_follower_decides_nothing_and_a_new_leader_goes_on(world: World) -> None:
    await world.pulled(A)
    world.lead(C)  # not there yet
    await world.start(B)
    world.lead(C)
    await world.rest()
    assert world.held_by() == "A"
    await world.start(C)
    world.lead(C)
    world.shared.notify()
    await until(world.shared, lambda: len(world.held_by()) == 2)


async def test_a_leader_without_a_quorum_waits(world: World) -> None:
    await world.pulled(A)
    world.shared.has_quorum = False
    await world.start(B)
    await world.rest()
    assert world.model.desired == (A,)
    world.shared.has_quorum = True
    await world.comes_to_be_on("AB")


async def test_a_decision_on_an_old_view_is_refused(world: World) -> None:
    """The state changes while the leader's command is on its way."""
    await world.pulled(A)
    world.shared.hold = trio.Event()
    await world.start(B)
    await until(world.shared, lambda: world.shared.waiting == 1)
    join(world.shared, C)
    world.shared.apply(SetDesired(NAME, (A, C)))
    world.shared.hold.set()
    world.shared.hold = None
    await wait_all_tasks_blocked()
    assert world.model.desired == (A, C)


async def test_a_new_leader_waits_for_the_first_heartbeats(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "SETTLE_S", 0.4)
    await world.pulled(A)
    world.lead(B)
    await trio.sleep(0.05)
    await world.start(B)
    await world.rest()
    assert world.model.desired == (A,)
    await world.comes_to_be_on("AB")


async def test_what_stands_in_the_way_is_told_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await world.pulled(A)

    async def refuse(command: object) -> object:
        await trio.lowlevel.checkpoint()
        raise ServiceError(409, "UPGRADE_FIRST", "upgrade first")

    monkeypatch.setattr(world.nodes[A].cluster, "propose", refuse)
    await world.start(B)
    await until(world.shared, lambda: "upgrade first" in caplog.text)
    await world.rest()
    assert caplog.text.count("upgrade first") == 1, caplog.text


async def test_who_has_no_room_after_all_gives_its_place_to_another(world: World) -> None:
    await world.start(B, C)
    world.lead(D)
    await world.pulled(A)
    node = world.nodes[B]

    async def full(*arguments: object) -> object:
        await trio.lowlevel.checkpoint()
        raise StoreFull(9, 1)

    node.store.open_partial = full  # type: ignore[method-assign, assignment]
    world.shared.apply(SetDesired(NAME, (A, B)))
    await until(world.shared, lambda: node.library.no_room() == (NAME,))
    node.cluster.beat(no_room=node.library.no_room())
    world.lead(A)
    await world.comes_to_be_on("AC")


async def test_a_bug_in_a_decision_ends_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reconcile_module, "FAULT_PAUSE_S", 0.05)
    await world.pulled(A)
    faults = [ZeroDivisionError("a bug"), KeyError("another one")]
    real = reconcile_module.plan

    def plan(view: View) -> list[Placement]:
        if faults:
            raise faults.pop()
        return real(view)

    monkeypatch.setattr(reconcile_module, "plan", plan)
    await world.start(B)
    await world.comes_to_be_on("AB")
    assert "a bug" in caplog.text


async def test_how_fast_copies_come_is_measured(world: World) -> None:
    tensors = TENSORS | {"blk.0.ffn_up.weight": ((1024, 8000), 0)}
    for node in world.nodes.values():
        node.source.content = gguf_bytes(tensors=tensors)
    await world.start(B)
    await world.pulled(A)
    await world.comes_to_be_on("AB")
    assert world.nodes[A].library.receive_rate == 0, "from the origin is no link"
    assert 1e6 < world.nodes[B].library.receive_rate < 1e11


# The last copy.


async def test_a_copy_is_not_given_up_while_the_others_are_away(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    await world.lose(B)
    world.lead(D)  # nobody decides
    world.shared.apply(SetDesired(NAME, (B,)))
    await world.rest()
    assert world.held_by() == "AB"
    await world.start(B)
    world.lead(D)
    await until(world.shared, lambda: world.held_by() == "B")


async def test_a_copy_that_is_needed_after_all_is_kept(world: World) -> None:
    """What a node sees may be old; the state lets only those go that are not needed."""
    await world.start(B)
    world.lead(D)
    await world.pulled(A, B)
    world.shared.hold = trio.Event()
    world.shared.apply(SetDesired(NAME, (B,)))
    await until(world.shared, lambda: world.shared.waiting == 1)  # A gives up
    world.shared.apply(ConfirmReplica(NAME, world.model.digest, B, present=False))
    first, world.shared.hold = world.shared.hold, trio.Event()
    first.set()
    await world.rest()
    assert world.held_by() == "A", "B had lost it meanwhile"
    digests = {layer.digest for layer in world.model.layers}
    assert await world.nodes[A].holds(digests) == digests
    assert await world.nodes[A].store.read_manifest(NAME) == world.model.manifest
    assert world.nodes[A].unloaded == []


# Draining.


async def test_a_drained_node_hands_on_what_only_it_serves_and_keeps_its_disk(
    world: World,
) -> None:
    await world.start(B, C)
    await world.pulled(B)
    await world.nodes[A].library.ask_replicas(NAME, 1)
    world.shared.apply(SetDraining(B, True))
    await until(world.shared, lambda: len(world.held_by()) == 2)
    await world.rest()
    [taken] = world.model.desired
    assert taken in (A, C)
    assert world.held_by() == "".join(sorted([taken, B])), "nothing is freed while it drains"
    world.shared.apply(SetDraining(B, False))
    await world.comes_to_be_on(taken)


async def test_a_short_drain_moves_nothing_that_others_serve(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    world.shared.apply(SetDraining(B, True))
    await world.rest()
    assert world.model.desired == (A, B)
    world.policy(lost_after_s=0.1)
    await until(world.shared, lambda: world.held_by() == "ABC")
    assert world.model.desired == (A, C)


# Handing over.


async def test_a_leaving_node_hands_over_what_only_it_has(world: World) -> None:
    await world.start(B)
    await world.pulled(B)
    await world.nodes[A].library.ask_replicas(NAME, 1)
    world.shared.apply(SetDraining(B, True))
    with trio.fail_after(10):
        await world.nodes[B].cluster.hand_over(B, 60)
    assert world.held_by() == "AB"


async def test_what_nobody_can_take_is_told_with_what_to_do(world: World) -> None:
    await world.pulled(A)
    world.shared.apply(SetDraining(A, True))
    with pytest.raises(ServiceError, match="With `force` it leaves") as caught:
        await world.nodes[A].cluster.hand_over(A, 60)
    assert (caught.value.status, caught.value.code) == (409, "SOLE_REPLICA")
    assert caught.value.details == {"models": [NAME], "size": world.model.size}


async def test_what_is_not_copied_in_time_is_told(world: World) -> None:
    await world.pulled(A)
    join(world.shared, B)
    await world.net.add(B)  # is there, and never fetches
    world.shared.apply(SetDraining(A, True))
    with pytest.raises(ServiceError, match=r"not copied within 0 s.*force") as caught:
        await world.nodes[A].cluster.hand_over(A, 0.2)
    assert (caught.value.status, caught.value.code) == (409, "HAND_OVER_TIMEOUT")


async def test_what_others_hold_too_needs_no_handing_over(world: World) -> None:
    await world.start(B)
    await world.pulled(A, B)
    world.shared.apply(SetDraining(B, True))
    before = len(world.shared.proposed)
    with trio.fail_after(1):
        await world.nodes[A].cluster.hand_over(B, 60)
    assert len(world.shared.proposed) == before


async def test_handing_over_turns_to_another_node_when_the_first_one_dies(world: World) -> None:
    await world.pulled(A)
    join(world.shared, B)
    await world.net.add(B)  # is there, and never fetches
    world.shared.apply(SetDraining(A, True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.nodes[A].cluster.hand_over, A, 60)
        await until(world.shared, lambda: B in world.model.desired)
        world.shared.offline.add(B)
        await world.start(C)
        with trio.fail_after(10):
            await until(world.shared, lambda: "C" in world.held_by())


async def test_a_node_that_is_away_is_let_go_only_without_what_nobody_else_has(
    world: World,
) -> None:
    await world.start(B, C)
    await world.pulled(B, C)
    await world.lose(C)
    await world.nodes[A].cluster.hand_over(C, 60)  # B has it, too
    world.shared.apply(ConfirmReplica(NAME, world.model.digest, B, present=False))
    with pytest.raises(ServiceError, match="it is offline: start it") as caught:
        await world.nodes[A].cluster.hand_over(C, 60)
    assert caught.value.code == "SOLE_REPLICA"
    world.shared.apply(DeleteModel(NAME))
    await world.nodes[A].cluster.hand_over(C, 60)


async def test_a_leaving_node_is_waited_for_until_its_answers_are_through(world: World) -> None:
    await world.start(B)
    busy = LoadedModel("m", "sha256:m", 1, 0, 4096, 0, busy=1)
    world.nodes[A].cluster.beats[B] = Beat(1.0, Usage(), loaded=(busy,), active_requests=1)
    done = trio.Event()

    async def leave() -> None:
        await world.nodes[A].cluster.hand_over(B, 60)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        await world.rest()
        assert not done.is_set()
        world.nodes[A].cluster.beats[B] = Beat(1.0, Usage(), active_requests=1)
        await world.rest()
        assert not done.is_set(), "a client still reads from it"
        world.nodes[A].cluster.beats[B] = Beat(1.0, Usage())
        with trio.fail_after(5):
            await done.wait()


# What a node sees.


async def test_the_view_is_made_of_the_state_and_the_last_heartbeats(world: World) -> None:
    await world.start(B, C)
    await world.pulled(A, B)
    cluster = world.nodes[A].cluster
    digest = short_digest(world.model.digest)
    cluster.beats[B] = Beat(
        1.0,
        Usage(disk_free=77),
        speeds=(Speed(digest, load_s=2.0), Speed("unknown", load_s=1.0), Speed("x")),
        demand=(Demand(NAME, 1.0, 2.0),),
        receive_rate=5e7,
    )
    cluster.beats[C] = Beat(1.0, Usage(), demand=(Demand(NAME, 0.5, 0.5), Demand("gone", 9, 9)))
    world.shared.apply(ChangeSettings(Settings(auto_distribution=False)))
    view = world.nodes[A].reconciler.view()
    site = view.sites[B]
    assert (site.host, site.disk_free, site.memory) == ("b", 77, 56_000_000_000)
    assert (site.rates.receive, site.rates.load) == (5e7, world.model.size / 2)
    assert view.demand[NAME] == Demand(NAME, 1.5, 2.5)
    assert not view.policy.automatic
    world.shared.offline.add(C)
    view = world.nodes[A].reconciler.view()
    assert view.demand[NAME] == Demand(NAME, 1.0, 2.0), "what it told is not true any more"
    assert (view.sites[C].online, view.sites[C].away_s) == (False, pytest.approx(0, abs=0.1))
    await trio.sleep(0.2)
    assert world.nodes[A].reconciler.view().sites[C].away_s >= 0.15


async def test_a_large_cluster_is_planned_beside_the_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "IN_THREAD", 0)
    await world.pulled(A)
    await world.start(B)
    await world.comes_to_be_on("AB")


async def test_the_policy_of_the_settings_is_used(world: World) -> None:
    await world.pulled(A)
    reconciler = Reconciler(world.nodes[A].cluster, Policy(default_replicas=5))  # type: ignore[arg-type]
    assert reconciler.view().policy.default_replicas == 5
