"""`apply`: every command, and that it is total, deterministic, and applies an id once."""

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamad.core.commands import (
    APPLIED,
    LEVEL,
    AddJoinToken,
    AddKey,
    AddUser,
    AdmitMember,
    AnyCommand,
    AskReplicas,
    ChangeSettings,
    Command,
    ConfirmReplica,
    DeleteKey,
    DeleteModel,
    DeleteUser,
    FoundCluster,
    Outcome,
    PlaceReplicas,
    Proposal,
    PutModel,
    PutUser,
    RecordUsage,
    RecoverCluster,
    Rejected,
    ReleaseReplica,
    RemoveMember,
    Revoke,
    SetDesired,
    SetDraining,
    SetPassword,
    SetRole,
    UpdateMember,
    apply,
    level_of,
)
from ollamad.core.ids import NodeId
from ollamad.core.quota import PERIODS, KeyCount, Used
from ollamad.core.state import (
    MAX_RECENT_COMMANDS,
    RECENT_COMMANDS,
    ApiKey,
    Capacity,
    CertificateAuthority,
    ClusterState,
    JoinToken,
    Layer,
    Member,
    Model,
    ModelDetails,
    Recency,
    Settings,
    User,
)
from ollamad.machine import Machine, NewerCommand, decode_outcome, encode_outcome
from ollamad.wire.codec import MalformedMessage, encode
from tests.fakes.api_services import NODE_1, NODE_2, STRANGER, member, model

NODE_3 = NodeId("QmThird")
NODE_5 = NodeId("QmFifth")
NOW = 1000.0
ADMIN = User("admin", "hash", "admin", 1.0)
FOUND = FoundCluster(
    "c1", CertificateAuthority(b"ca", b"key"), b"jwt", member(NODE_1, "one"), ADMIN
)
BOTH = tuple(sorted((NODE_1, NODE_2)))
TOKEN = JoinToken("t1", b"key", NOW + 60)
USER = User("u", "h", "viewer", 1.0)
KEY = ApiKey("k1", "agent", "ab" * 32, "inference", NOW, "admin")
COUNTS = (KeyCount("k1", Used(0, 3, 40)),)


class Replica:
    """A state with a counter for ids."""

    def __init__(self, *commands: AnyCommand) -> None:
        self.state = ClusterState()
        self._count = 0
        for command in commands:
            assert self(command) == APPLIED

    def __call__(self, command: AnyCommand, at: float = NOW) -> Outcome:
        self._count += 1
        return apply(self.state, Proposal(f"id{self._count}", at, command))


@pytest.fixture
def replica() -> Replica:
    """Two members, a model on the first, a token that is alive."""
    return Replica(
        FOUND,
        AddJoinToken(TOKEN),
        AdmitMember(member(NODE_2, "two"), "t1"),
        PutModel(model("smollm2:135m", desired=(NODE_1, NODE_2), confirmed=(NODE_1,))),
    )


def code(outcome: Outcome) -> str:
    return outcome.code if isinstance(outcome, Rejected) else ""


def update(node_id: NodeId, name: str, **changes: Any) -> UpdateMember:
    plain = UpdateMember(node_id, name, "h:1", "h:2", "h:3", Capacity(1, 2, 3), "9.9")
    return msgspec.structs.replace(plain, **changes)


EVERY_COMMAND: list[AnyCommand] = [
    FOUND,
    RecoverCluster(1_700_000_000),
    ChangeSettings(Settings(auto_distribution=False)),
    AdmitMember(member(NODE_3, "three"), "t1"),
    update(NODE_1, "one"),
    SetDraining(NODE_1, True),
    RemoveMember(NODE_2),
    PutModel(model()),
    DeleteModel("smollm2:135m"),
    SetDesired("smollm2:135m", (NODE_2,)),
    ConfirmReplica("smollm2:135m", model().digest, NODE_2, present=False),
    AskReplicas("smollm2:135m", 2, (NODE_1,)),
    PlaceReplicas("smollm2:135m", model().digest, (), (NODE_1,)),
    ReleaseReplica("smollm2:135m", model().digest, NODE_2),
    PutUser(USER),
    DeleteUser("u"),
    AddUser(User("v", "h", "viewer", 1.0)),
    SetPassword("admin", "other", "g1"),
    SetRole("admin", "admin"),
    AddKey(msgspec.structs.replace(KEY, id="k2")),
    DeleteKey("k1"),
    RecordUsage(NODE_1, COUNTS),
    AddJoinToken(JoinToken("t2", b"k", NOW + 1)),
    Revoke("x", NOW + 1),
]


def test_the_list_above_is_complete() -> None:
    assert {type(command) for command in EVERY_COMMAND} == set(Command.__subclasses__())


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda c: type(c).__name__)
def test_every_command_survives_the_wire_and_changes_the_state(command: AnyCommand) -> None:
    machine = Machine()
    if not isinstance(command, FoundCluster):
        for number, before in enumerate([FOUND, AddJoinToken(TOKEN)]):
            machine.apply(encode(Proposal(f"b{number}", NOW, before)))
        machine.apply(encode(Proposal("b2", NOW, AdmitMember(member(NODE_2, "two"), "t1"))))
        machine.apply(encode(Proposal("b3", NOW, PutModel(model(desired=())))))
        if not isinstance(command, PutUser):
            machine.apply(encode(Proposal("b4", NOW, AddUser(USER))))
        machine.apply(encode(Proposal("b5", NOW, AddKey(KEY))))
    before_print = machine.state.fingerprint()
    assert decode_outcome(machine.apply(encode(Proposal("c", NOW, command)))) == APPLIED
    after_print = machine.state.fingerprint()
    assert after_print != before_print
    # The same id again answers the same and changes nothing.
    assert decode_outcome(machine.apply(encode(Proposal("c", NOW, command)))) == APPLIED
    assert machine.state.fingerprint() == after_print


@pytest.mark.parametrize("command", EVERY_COMMAND[1:], ids=lambda c: type(c).__name__)
def test_nothing_happens_before_the_founding(command: AnyCommand) -> None:
    replica = Replica()
    assert code(replica(command)) == "NO_CLUSTER"
    assert msgspec.structs.replace(replica.state, recent={}, recency=Recency()) == ClusterState()


def test_a_cluster_is_founded_once() -> None:
    replica = Replica(FOUND)
    state = replica.state
    assert (state.cluster_id, state.jwt_key, list(state.members)) == ("c1", b"jwt", [NODE_1])
    assert state.users == {"admin": ADMIN}
    other = msgspec.structs.replace(FOUND, cluster_id="c2")
    assert code(replica(other)) == "ALREADY_FOUNDED"
    assert state.cluster_id == "c1"


@pytest.mark.parametrize(
    ("command", "at", "expected"),
    [
        (AdmitMember(member(NODE_3, "three"), "t1"), NOW, ""),
        (AdmitMember(member(NODE_3, "three"), "t1"), NOW + 60, ""),
        (AdmitMember(member(NODE_3, "three"), "t1"), NOW + 60.1, "TOKEN_EXPIRED"),
        (AdmitMember(member(NODE_3, "three"), "t9"), NOW, "TOKEN_EXPIRED"),
        (AdmitMember(member(NODE_3, "two"), "t1"), NOW, "NAME_TAKEN"),
        (AdmitMember(member(NODE_2, "one"), "t1"), NOW, "NAME_TAKEN"),
        (AdmitMember(member(NODE_2, "renamed"), "t1"), NOW, ""),
        (update(NODE_1, "uno"), NOW, ""),
        (update(STRANGER, "x"), NOW, "NODE_NOT_FOUND"),
        (SetDraining(STRANGER, True), NOW, "NODE_NOT_FOUND"),
        (RemoveMember(STRANGER), NOW, "NODE_NOT_FOUND"),
        (PutModel(model("../x")), NOW, "INVALID_MODEL_NAME"),
        (PutModel(model("")), NOW, "INVALID_MODEL_NAME"),
        (DeleteModel("no-such"), NOW, "MODEL_NOT_FOUND"),
        (DeleteModel("../x\0"), NOW, "MODEL_NOT_FOUND"),
        (DeleteModel("SMOLLM2:135M"), NOW, ""),
        (SetDesired("no-such", ()), NOW, "MODEL_NOT_FOUND"),
        (SetDesired("smollm2:135m", (NODE_1, STRANGER)), NOW, "NODE_NOT_FOUND"),
        (ConfirmReplica("no-such", "", NODE_1), NOW, "MODEL_NOT_FOUND"),
        (ConfirmReplica("smollm2:135m", "sha256:other", NODE_1), NOW, "SUPERSEDED"),
        (ConfirmReplica("smollm2:135m", model().digest, STRANGER), NOW, "NODE_NOT_FOUND"),
        (AskReplicas("smollm2:135m", 2, (NODE_2,)), NOW, ""),
        (AskReplicas("no-such", 2), NOW, "MODEL_NOT_FOUND"),
        (AskReplicas("smollm2:135m", -1), NOW, "INVALID_REPLICAS"),
        (AskReplicas("smollm2:135m", 2, (STRANGER,)), NOW, "NODE_NOT_FOUND"),
        (PlaceReplicas("smollm2:135m", model().digest, BOTH, (NODE_1,)), NOW, ""),
        (PlaceReplicas("no-such", model().digest, BOTH, (NODE_1,)), NOW, "MODEL_NOT_FOUND"),
        (PlaceReplicas("smollm2:135m", "sha256:other", BOTH, (NODE_1,)), NOW, "STALE"),
        (PlaceReplicas("smollm2:135m", model().digest, (NODE_1,), (NODE_2,)), NOW, "STALE"),
        (PlaceReplicas("smollm2:135m", model().digest, BOTH, (STRANGER,)), NOW, "NODE_NOT_FOUND"),
        (ReleaseReplica("no-such", model().digest, NODE_1), NOW, "MODEL_NOT_FOUND"),
        (ReleaseReplica("smollm2:135m", "sha256:other", NODE_1), NOW, "SUPERSEDED"),
        (ReleaseReplica("smollm2:135m", model().digest, NODE_1), NOW, "NEEDED"),
        (PutUser(User("u", "h", "root", 1.0)), NOW, "INVALID_ROLE"),
        (DeleteUser("nobody"), NOW, "USER_NOT_FOUND"),
        (DeleteUser("admin"), NOW, "LAST_ADMIN"),
        (AddUser(User("admin", "h", "admin", 1.0)), NOW, "USER_EXISTS"),
        (AddUser(User("u", "h", "root", 1.0)), NOW, "INVALID_ROLE"),
        (AddUser(User("local", "h", "viewer", 1.0)), NOW, "INVALID_USERNAME"),
        (AddUser(User("a/b", "h", "viewer", 1.0)), NOW, "INVALID_USERNAME"),
        (AddUser(User("", "h", "viewer", 1.0)), NOW, "INVALID_USERNAME"),
        (AddUser(User("a" * 65, "h", "viewer", 1.0)), NOW, "INVALID_USERNAME"),
        (AddUser(User("me@example.com", "h", "viewer", 1.0)), NOW, ""),
        (SetPassword("nobody", "h", "g"), NOW, "USER_NOT_FOUND"),
        (SetRole("nobody", "viewer"), NOW, "USER_NOT_FOUND"),
        (SetRole("admin", "root"), NOW, "INVALID_ROLE"),
        (SetRole("admin", "operator"), NOW, "LAST_ADMIN"),
        (AddKey(msgspec.structs.replace(KEY, role="root")), NOW, "INVALID_ROLE"),
        (AddKey(msgspec.structs.replace(KEY, period="week")), NOW, "INVALID_PERIOD"),
        (DeleteKey("k1"), NOW, "KEY_NOT_FOUND"),
    ],
)
def test_outcomes(replica: Replica, command: AnyCommand, at: float, expected: str) -> None:
    before = msgspec.structs.replace(replica.state, recent={}, recency=Recency()).fingerprint()
    assert code(replica(command, at)) == expected
    changed = (
        msgspec.structs.replace(replica.state, recent={}, recency=Recency()).fingerprint() != before
    )
    assert changed == (not expected), "a rejected command changes nothing"


def test_of_two_admins_either_can_be_deleted_but_not_both(replica: Replica) -> None:
    replica(AddUser(User("second", "h", "admin", 1.0)))
    assert replica(DeleteUser("admin")) == APPLIED
    assert code(replica(DeleteUser("second"))) == "LAST_ADMIN"
    assert list(replica.state.users) == ["second"]


def test_a_role_changes_and_nothing_else_does(replica: Replica) -> None:
    replica(AddUser(User("second", "h", "admin", 1.0, "g1")))
    assert replica(SetRole("admin", "viewer")) == APPLIED
    assert code(replica(SetRole("second", "viewer"))) == "LAST_ADMIN"
    assert replica(SetRole("second", "admin")) == APPLIED
    assert replica.state.users["second"] == User("second", "h", "admin", 1.0, "g1")
    assert replica.state.users["admin"].role == "viewer"


def test_a_new_password_keeps_all_but_the_hash_and_the_generation(replica: Replica) -> None:
    assert replica(SetPassword("admin", "new", "g1")) == APPLIED
    assert replica.state.users["admin"] == User("admin", "new", "admin", 1.0, "g1")


def test_users_and_keys_are_bounded(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollamad.core.commands.MAX_USERS", 2)
    monkeypatch.setattr("ollamad.core.commands.MAX_KEYS", 1)
    assert replica(AddUser(USER)) == APPLIED
    assert code(replica(AddUser(User("w", "h", "viewer", 1.0)))) == "TOO_MANY_USERS"
    assert replica(AddKey(KEY)) == APPLIED
    assert code(replica(AddKey(KEY))) == "KEY_EXISTS"
    assert code(replica(AddKey(msgspec.structs.replace(KEY, id="k2")))) == "TOO_MANY_KEYS"


def test_usage_is_kept_by_node_never_shrinks_and_goes_with_its_key(replica: Replica) -> None:
    usage = replica.state.key_usage
    assert replica(RecordUsage(NODE_1, COUNTS)) == APPLIED
    assert usage == {}, "no such key"
    replica(AddKey(KEY))
    replica(RecordUsage(NODE_1, COUNTS))
    replica(RecordUsage(NODE_2, (KeyCount("k1", Used(0, 1, 1)),)))
    replica(RecordUsage(NODE_1, (KeyCount("k1", Used(0, 2, 50)),)))
    assert usage == {"k1": {NODE_1: Used(0, 3, 50), NODE_2: Used(0, 1, 1)}}
    replica(RecordUsage(NODE_1, (KeyCount("k1", Used(60, 1, 2)),)))
    replica(RecordUsage(NODE_1, COUNTS))  # of a window that is over
    assert usage["k1"][NODE_1] == Used(60, 1, 2)
    replica(DeleteKey("k1"))
    assert usage == {}


def test_who_joins_again_stays_drained_and_keeps_its_seniority(replica: Replica) -> None:
    replica(SetDraining(NODE_2, True))
    again = member(NODE_2, "two", p2p_address="new:9", joined_at=5e9)
    assert replica(AdmitMember(again, "t1")) == APPLIED
    found = replica.state.members[NODE_2]
    assert (found.draining, found.p2p_address) == (True, "new:9")
    assert found.joined_at == member(NODE_2, "two").joined_at


def test_a_name_that_was_taken_meanwhile_is_not_taken_away(replica: Replica) -> None:
    assert replica(update(NODE_2, "one")) == APPLIED
    found = replica.state.members[NODE_2]
    assert (found.name, found.api_address, found.version) == ("two", "h:1", "9.9")


def test_who_leaves_departs_and_holds_nothing(replica: Replica) -> None:
    assert replica(RemoveMember(NODE_1)) == APPLIED
    state = replica.state
    assert list(state.members) == [NODE_2]
    assert state.departed == {NODE_1: NOW}
    found = state.models["smollm2:135m"]
    assert (found.desired, found.confirmed) == ((NODE_2,), ())
    assert code(replica(RemoveMember(NODE_2))) == "LAST_MEMBER"


def test_who_was_left_behind_by_a_recovery_comes_back_in_its_own_place(replica: Replica) -> None:
    replica(RemoveMember(NODE_2))
    replica(AdmitMember(member(NODE_3, "two"), "t1"))
    replica(PutModel(model("x", desired=(NODE_1, NODE_3), confirmed=(NODE_3,))))
    replica(SetDraining(NODE_3, True))
    replica(RecoverCluster(5, NODE_1))
    members = replica.state.members
    assert [members[n].left_behind for n in (NODE_1, NODE_3)] == [False, True]
    # Nobody else takes the survivor's name, and a member does not take a second place.
    assert code(replica(AdmitMember(member(NODE_5, "one"), "t1"))) == "NAME_TAKEN"
    assert code(replica(AdmitMember(member(NODE_1, "two"), "t1"))) == "NAME_TAKEN"
    assert replica(AdmitMember(member(NODE_5, "two"), "t1")) == APPLIED
    state = replica.state
    assert set(state.members) == {NODE_1, NODE_5}
    found = state.members[NODE_5]
    assert (found.draining, found.left_behind) == (True, False)
    assert set(state.departed) == {NODE_2, NODE_3}
    kept = state.models["x:latest"]
    assert (set(kept.desired), kept.confirmed) == ({NODE_1, NODE_5}, (NODE_5,))
    # Its place is taken: the next of that name is another node.
    assert code(replica(AdmitMember(member(NodeId("QmFourth"), "two"), "t1"))) == "NAME_TAKEN"


def test_an_id_that_left_does_not_come_back(replica: Replica) -> None:
    replica(RemoveMember(NODE_1))
    assert code(replica(AdmitMember(member(NODE_1, "one"), "t1"))) == "DEPARTED_NODE"
    assert list(replica.state.members) == [NODE_2]
    assert replica.state.departed == {NODE_1: NOW}


def test_a_model_is_put_only_on_members_and_replaced_by_name(replica: Replica) -> None:
    replica(PutModel(model("X", desired=(STRANGER, NODE_2, NODE_1, NODE_2), confirmed=(STRANGER,))))
    found = replica.state.models["x:latest"]
    assert found.desired == tuple(sorted((NODE_1, NODE_2)))
    assert found.confirmed == ()
    replica(PutModel(model("x", digest="sha256:new")))
    assert len(replica.state.models) == 2
    assert replica.state.models["x:latest"].digest == "sha256:new"


def test_replicas_are_confirmed_and_taken_back(replica: Replica) -> None:
    digest = model("smollm2:135m").digest
    models = replica.state.models
    replica(ConfirmReplica("smollm2:135m", digest, NODE_2))
    assert models["smollm2:135m"].confirmed == tuple(sorted((NODE_1, NODE_2)))
    replica(ConfirmReplica("smollm2:135m", digest, NODE_2))
    assert models["smollm2:135m"].confirmed == tuple(sorted((NODE_1, NODE_2)))
    replica(ConfirmReplica("smollm2:135m", digest, NODE_1, present=False))
    replica(ConfirmReplica("smollm2:135m", digest, NODE_1, present=False))
    assert models["smollm2:135m"].confirmed == (NODE_2,)
    replica(SetDesired("SmolLM2:135m", (NODE_2, NODE_1, NODE_2)))
    assert models["smollm2:135m"].desired == tuple(sorted((NODE_1, NODE_2)))


@pytest.mark.parametrize(
    ("desired", "confirmed", "expected"),
    [
        ((NODE_2,), (NODE_1, NODE_2), ""),
        ((NODE_1, NODE_2), (NODE_1, NODE_2), "NEEDED"),  # it is wanted again
        ((NODE_2,), (NODE_1,), "NEEDED"),  # who should have it has not
        ((), (NODE_1,), "NEEDED"),  # the last one
        ((), (NODE_1, NODE_2), ""),
        ((NODE_2,), (NODE_2,), ""),  # it was released before
    ],
)
def test_a_copy_is_given_up_only_where_the_others_have_it(
    replica: Replica,
    desired: tuple[NodeId, ...],
    confirmed: tuple[NodeId, ...],
    expected: str,
) -> None:
    replica(PutModel(model(desired=desired, confirmed=confirmed)))
    assert code(replica(ReleaseReplica("smollm2:135m", model().digest, NODE_1))) == expected
    left = replica.state.models["smollm2:135m"].confirmed
    assert left == (tuple(sorted(confirmed)) if expected else (NODE_2,))


def test_who_leaves_is_not_asked_for_any_more_and_who_takes_its_place_is(replica: Replica) -> None:
    replica(AskReplicas("smollm2:135m", 0, (NODE_2, NODE_1, NODE_2)))
    replica(RecoverCluster(5, NODE_1))
    replica(AdmitMember(member(NODE_3, "two"), "t1"))
    assert replica.state.models["smollm2:135m"].pinned == tuple(sorted((NODE_1, NODE_3)))
    replica(RemoveMember(NODE_3))
    assert replica.state.models["smollm2:135m"].pinned == (NODE_1,)


def test_what_the_first_version_does_not_know_is_of_a_higher_level() -> None:
    """Of a model, too: that version would drop what somebody asked for, and differ."""
    first = {command for command in EVERY_COMMAND if level_of(command) == 1}
    later = {type(command).__name__ for command in EVERY_COMMAND if command not in first}
    assert later == {
        *("AskReplicas", "PlaceReplicas", "ReleaseReplica"),
        *("AddUser", "SetPassword", "DeleteUser", "AddKey", "DeleteKey", "RecordUsage"),
        "SetRole",
    }
    assert level_of(SetRole("admin", "viewer")) == 3
    assert level_of(PutModel(model(replicas=2))) == 2
    assert level_of(PutModel(model(pinned=(NODE_1,)))) == 2
    assert max(map(level_of, EVERY_COMMAND)) == LEVEL


def test_a_token_is_spent_once_and_forgotten_when_it_would_have_expired() -> None:
    replica = Replica(FOUND)
    assert replica(Revoke("jti", 2000.0), at=1000.0) == APPLIED
    assert code(replica(Revoke("jti", 2000.0), at=1999.0)) == "ALREADY_REVOKED"
    replica(Revoke("other", 9000.0), at=2001.0)
    assert list(replica.state.revoked) == ["other"]


def test_expired_join_tokens_are_cleaned_away() -> None:
    replica = Replica(FOUND)
    replica(AddJoinToken(JoinToken("old", b"", 10.0)), at=5.0)
    replica(AddJoinToken(JoinToken("new", b"", 99.0)), at=11.0)
    assert list(replica.state.join_tokens) == ["new"]


def test_a_repeated_id_answers_as_the_first_time(replica: Replica) -> None:
    spent = Proposal("same", NOW, Revoke("jti", 2000.0))
    assert apply(replica.state, spent) == APPLIED
    assert apply(replica.state, spent) == APPLIED
    refused = Proposal("no", NOW, DeleteUser("later"))
    assert code(apply(replica.state, refused)) == "USER_NOT_FOUND"
    replica(PutUser(User("later", "h", "viewer", 1.0)))
    assert code(apply(replica.state, refused)) == "USER_NOT_FOUND"
    assert "later" in replica.state.users


def remember(state: ClusterState, count: int, at: float, step_s: float, name: str) -> float:
    """Have so many commands pass, proposed that far apart; returns the time of the next."""
    for number in range(count):
        state.remember(f"{name}{number}", "", "", at)
        at += step_s
    return at


def test_memory_of_ids_is_bounded_and_forgets_the_oldest_also_after_a_snapshot() -> None:
    machine = Machine()
    machine.apply(encode(Proposal("zz first", NOW, FOUND)))
    at = remember(machine.state, 6000, NOW, 10.0, "old")
    restored = Machine()
    restored.restore(machine.snapshot())
    for state in (machine.state, restored.state):
        for number in range(RECENT_COMMANDS):
            apply(state, Proposal(f"{number}", at + 10 * number, SetDraining(NODE_1, True)))
        assert RECENT_COMMANDS <= len(state.recent) <= RECENT_COMMANDS * 17 // 16
        assert "zz first" not in state.recent
        assert "old0" not in state.recent
        assert "0" in state.recent
    assert machine.state.fingerprint() == restored.state.fingerprint()


def test_an_id_is_remembered_for_as_long_as_its_caller_retries_however_much_comes_between() -> None:
    state = ClusterState()
    at = remember(state, 1, NOW, 1e-4, "claim")
    at = remember(state, 50_000, at, 1e-4, "a")  # 10,000 a second
    assert "claim0" in state.recent
    at = remember(state, 60_000, at, 5e-4, "b")
    assert "claim0" not in state.recent
    # A quiet cluster keeps no more than it did before.
    remember(state, 2 * RECENT_COMMANDS, at, 60.0, "c")
    assert len(state.recent) <= RECENT_COMMANDS * 17 // 16


def test_memory_of_ids_has_an_end_even_if_no_time_passes() -> None:
    state = ClusterState()
    remember(state, MAX_RECENT_COMMANDS * 9 // 8, NOW, 0.0, "a")
    assert MAX_RECENT_COMMANDS <= len(state.recent) <= MAX_RECENT_COMMANDS * 17 // 16
    assert "a0" not in state.recent


@pytest.mark.parametrize("wrong", [1e5, -1e5, 1e300, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rounds", [1, 40])
def test_a_clock_that_is_far_off_neither_flushes_nor_pins_what_is_remembered(
    wrong: float, rounds: int
) -> None:
    state = ClusterState()
    at = remember(state, 3000, NOW, 1e-3, "early")
    remember(state, 1, at, 0.0, "claim")
    for number in range(rounds):
        remember(state, 1, at + wrong, 0.0, f"wrong{number}")
        at = remember(state, 10_000 // rounds, at, 5e-4, f"a{number} ")
    assert "claim0" in state.recent, "5 s later"
    remember(state, 80_000, at, 1e-3, "b")
    assert "claim0" not in state.recent
    assert len(state.recent) < 40_000, "30 s of 1,000 a second"


# Fuzz: small pools of ids and names, so that commands meet each other.

IDS = st.sampled_from([NODE_1, NODE_2, NODE_3, NodeId(""), NodeId("\0")])
NAMES = st.sampled_from(["one", "two", "", "a/b:c", "../x", "X", "x:latest", "é", "a" * 99])
TIMES = st.sampled_from([0.0, 500.0, 1000.0, 2000.0, float("inf"), -1.0])
CAPACITIES = st.builds(Capacity, st.integers(-1, 9), st.just(2**63), st.just(0))
MEMBERS = st.builds(Member, IDS, NAMES, NAMES, NAMES, NAMES, CAPACITIES, TIMES)
NODES = st.lists(IDS, max_size=4).map(tuple)
MODELS = st.builds(
    Model,
    name=NAMES,
    digest=st.sampled_from(["d1", "d2"]),
    manifest=st.binary(max_size=3),
    details=st.just(ModelDetails()),
    layers=st.just((Layer("", "", 1, 1, ""),)),
    modified_at=TIMES,
    desired=NODES,
    confirmed=NODES,
    replicas=st.integers(-1, 9),
    pinned=NODES,
)
USERS = st.builds(User, NAMES, NAMES, st.sampled_from(["viewer", "admin", "", "root"]), TIMES)
KEYS = st.sampled_from(["t1", "t2", ""])
ROLES_AND_MORE = st.sampled_from(["viewer", "admin", "root"])
PERIODS_AND_MORE = st.sampled_from([*PERIODS, "week"])
API_KEYS = st.builds(
    ApiKey, KEYS, NAMES, NAMES, ROLES_AND_MORE, TIMES, NAMES, period=PERIODS_AND_MORE
)
COUNTERS = st.integers(-1, 3)
KEY_COUNTS = st.builds(KeyCount, KEYS, st.builds(Used, COUNTERS, COUNTERS, COUNTERS))
COMMANDS: st.SearchStrategy[AnyCommand] = st.one_of(
    st.just(FOUND),
    st.builds(ChangeSettings, st.builds(Settings, st.booleans())),
    st.builds(AdmitMember, MEMBERS, KEYS),
    st.builds(UpdateMember, IDS, NAMES, NAMES, NAMES, NAMES, CAPACITIES, NAMES),
    st.builds(SetDraining, IDS, st.booleans()),
    st.builds(RemoveMember, IDS),
    st.builds(PutModel, MODELS),
    st.builds(DeleteModel, NAMES),
    st.builds(SetDesired, NAMES, NODES),
    st.builds(ConfirmReplica, NAMES, st.sampled_from(["d1", "d2"]), IDS, st.booleans()),
    st.builds(AskReplicas, NAMES, st.integers(-1, 9), NODES),
    st.builds(PlaceReplicas, NAMES, st.sampled_from(["d1", "d2"]), NODES, NODES),
    st.builds(ReleaseReplica, NAMES, st.sampled_from(["d1", "d2"]), IDS),
    st.builds(PutUser, USERS),
    st.builds(DeleteUser, NAMES),
    st.builds(AddUser, USERS),
    st.builds(SetPassword, NAMES, NAMES, NAMES),
    st.builds(SetRole, NAMES, st.sampled_from(["viewer", "admin", "root"])),
    st.builds(AddKey, API_KEYS),
    st.builds(DeleteKey, KEYS),
    st.builds(RecordUsage, IDS, st.lists(KEY_COUNTS, max_size=3).map(tuple)),
    st.builds(AddJoinToken, st.builds(JoinToken, KEYS, st.just(b""), TIMES)),
    st.builds(Revoke, KEYS, TIMES),
)
LOGS = st.lists(st.builds(Proposal, st.sampled_from([*"abcdefghij"]), TIMES, COMMANDS), max_size=25)


def without_recent(state: ClusterState) -> str:
    return msgspec.structs.replace(state, recent={}, recency=Recency()).fingerprint()


def check_invariants(state: ClusterState) -> None:
    assert not set(state.members) & set(state.departed)
    names = [m.name for m in state.members.values()]
    assert len(names) == len(set(names))
    for key, found in state.models.items():
        assert state.find_model(found.name) is found
        assert state.find_model(key) is found
        assert found.replicas >= 0
        for nodes in (found.desired, found.confirmed, found.pinned):
            assert list(nodes) == sorted(set(nodes))
            assert set(nodes) <= set(state.members)
    assert bool(state.members) == bool(state.cluster_id)
    assert set(state.key_usage) <= set(state.api_keys)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LOGS, st.integers(0, 25))
def test_any_log_gives_every_node_the_same_state_with_or_without_a_snapshot(
    log: list[Proposal], cut: int
) -> None:
    one, other = Machine(), Machine()
    first = Proposal("found", 0.0, FOUND)
    for number, proposal in enumerate([first, *log]):
        if number == cut:
            other.restore(other.snapshot())
        data = encode(proposal)
        before = without_recent(one.state)
        answer = one.apply(data)
        assert other.apply(data) == answer
        if decode_outcome(answer) != APPLIED and not isinstance(proposal.command, Revoke):
            assert without_recent(one.state) == before  # a refused Revoke may still clean up
        once = one.state.fingerprint()
        assert one.apply(data) == answer
        assert one.state.fingerprint() == once
        check_invariants(one.state)
    assert one.state.fingerprint() == other.state.fingerprint()


@given(st.binary(max_size=200))
def test_any_bytes_in_the_log_are_refused_and_never_raise(data: bytes) -> None:
    machine = Machine()
    assert code(decode_outcome(machine.apply(data))) == "UNKNOWN_COMMAND"


@given(st.data())
def test_a_damaged_command_never_raises(data: st.DataObject) -> None:
    whole = bytearray(encode(Proposal("x", NOW, data.draw(COMMANDS))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    machine = Machine()
    machine.apply(encode(Proposal("found", 0.0, FOUND)))
    with contextlib.suppress(NewerCommand):  # the damage hit the level
        decode_outcome(machine.apply(bytes(whole)))
    check_invariants(machine.state)


def test_a_command_of_a_newer_level_stops_the_node_and_changes_nothing() -> None:
    """An older node that refused, or half understood it, would differ from newer ones for ever."""
    machine = Machine()
    machine.apply(encode(Proposal("found", 0.0, FOUND)))
    before = machine.state.fingerprint()
    known = encode(Proposal("x", NOW, DeleteUser("nobody"), level=LEVEL + 1))
    unknown = encode({"id": "x", "at": NOW, "command": {"type": "Later"}, "level": LEVEL + 1})
    for command in (known, unknown):
        with pytest.raises(NewerCommand, match=f"up to level {LEVEL}; install the version"):
            machine.apply(command)
    assert machine.state.fingerprint() == before


def test_a_proposal_without_a_level_is_of_the_first_one() -> None:
    machine = Machine()
    machine.apply(encode(Proposal("found", 0.0, FOUND)))
    revoke = {"type": "Revoke", "id": "jti", "expires_at": NOW + 9}
    assert (
        decode_outcome(machine.apply(encode({"id": "x", "at": NOW, "command": revoke}))) == APPLIED
    )


@given(st.data())
def test_what_is_no_snapshot_is_refused_and_leaves_the_state(data: st.DataObject) -> None:
    machine = Machine()
    machine.apply(encode(Proposal("found", 0.0, FOUND)))
    whole = machine.snapshot()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for damaged in (cut, whole + b"\0", b"\xff" + cut, data.draw(st.binary(max_size=1)) + b"\xc1"):
        with pytest.raises(MalformedMessage):
            machine.restore(damaged)
    assert machine.state.cluster_id == "c1"


def test_the_machine_tells_of_every_change() -> None:
    calls = list[int]()
    machine = Machine(lambda: calls.append(1))
    machine.apply(encode(Proposal("found", 0.0, FOUND)))
    machine.restore(machine.snapshot())
    assert len(calls) == 2


@pytest.mark.parametrize("outcome", [APPLIED, Rejected("CODE", "why")])
def test_outcomes_survive_the_wire(outcome: Outcome) -> None:
    assert decode_outcome(encode_outcome(outcome)) == outcome


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (NODE_1, NODE_1),
        ("two", NODE_2),
        (NODE_1[:12], NODE_1),
        (NODE_1[:5], None),
        ("Qm", None),
        ("", None),
        (NODE_1 + "x", None),
    ],
)
def test_members_are_found_by_id_name_and_prefix(
    replica: Replica, reference: str, expected: NodeId | None
) -> None:
    found = replica.state.find_member(reference)
    assert (found.id if found else None) == expected


def test_an_ambiguous_prefix_finds_nobody() -> None:
    members = {NodeId(f"Qmsame{i}"): member(NodeId(f"Qmsame{i}"), f"n{i}") for i in range(2)}
    state = ClusterState(members=members)
    assert state.find_member("Qmsame") is None
    assert state.find_member("Qmsame1") is members[NodeId("Qmsame1")]
