"""What is replicated must not change unnoticed: a node of another version would come to differ.

`tests/data/replicated-LEVEL.json` holds, for a level of commands, their schema and that of the
state, a log with every command, and what came of it. If a test here fails, the change needs a new
LEVEL or STATE_FORMAT, as "Versions" in docs/peer-protocol.md says; then write the new file with
`python -m tests.unit.test_replication_contract` and keep the old ones: their logs must go on
giving the same outcomes.
"""

import json
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from ollamad.core.commands import (
    LEVEL,
    AddJoinToken,
    AddKey,
    AddUser,
    AdmitMember,
    AnyCommand,
    AskReplicas,
    ChangeSettings,
    ConfirmReplica,
    DeleteKey,
    DeleteModel,
    DeleteUser,
    FoundCluster,
    PlaceReplicas,
    Proposal,
    PutModel,
    PutUser,
    RecordUsage,
    RecoverCluster,
    ReleaseReplica,
    RemoveMember,
    Revoke,
    SetDesired,
    SetDraining,
    SetPassword,
    SetRole,
    UpdateMember,
    level_of,
)
from ollamad.core.quota import KeyCount, Used
from ollamad.core.state import (
    ApiKey,
    Capacity,
    CertificateAuthority,
    ClusterState,
    JoinToken,
    Settings,
    User,
)
from ollamad.machine import STATE_FORMAT, Machine
from ollamad.wire.codec import encode
from tests.fakes.api_services import NODE_1, NODE_2, member, model

DATA = Path(__file__).parent.parent / "data"
FILES = sorted(DATA.glob("replicated-*.json"))
NOW = 1000.0


def schema() -> dict[str, Any]:
    """The shape of what is in the log and in snapshots; descriptions are none of it."""
    _, parts = msgspec.json.schema_components([Proposal, ClusterState])
    bare: dict[str, Any] = json.loads(json.dumps(_without_descriptions(parts)))
    return bare


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_descriptions(v) for k, v in node.items() if k != "description"}
    if isinstance(node, list):
        return [_without_descriptions(item) for item in node]
    return node


def log() -> list[bytes]:
    """Every command at least once, some refused, one sent twice."""
    one, two = member(NODE_1, "one"), member(NODE_2, "two")
    tiny = model("tiny", confirmed=(NODE_1,))
    key = ApiKey("k1", "agent", "ab" * 32, "inference", NOW, "admin")
    admin = User("admin", "hash", "admin", 1.0)
    commands: list[AnyCommand] = [
        SetDraining(NODE_1, True),  # before there is a cluster
        FoundCluster("c1", CertificateAuthority(b"ca", b"key"), b"jwt", one, admin),
        ChangeSettings(Settings(auto_distribution=False)),
        AdmitMember(two, "t1"),  # without a token
        AddJoinToken(JoinToken("t1", b"key", NOW + 60)),
        AdmitMember(two, "t1"),
        UpdateMember(NODE_2, "zwei", "b:1", "b:2", "b:3", Capacity(8, 1 << 34, 1 << 40), "0.2"),
        SetDraining(NODE_2, True),
        PutModel(tiny),
        SetDesired("tiny", (NODE_1, NODE_2)),
        ConfirmReplica("tiny", tiny.digest, NODE_2),
        AskReplicas("tiny", 1, (NODE_1,)),
        PlaceReplicas("tiny", tiny.digest, tuple(sorted((NODE_1, NODE_2))), (NODE_1,)),
        PlaceReplicas("tiny", tiny.digest, (), (NODE_2,)),  # stale
        ReleaseReplica("tiny", tiny.digest, NODE_2),
        ReleaseReplica("tiny", tiny.digest, NODE_1),  # needed
        PutUser(User("eve", "hash", "viewer", 2.0)),
        AddUser(User("bob", "hash", "operator", 3.0)),
        AddUser(User("bob", "hash", "operator", 3.0)),  # taken
        SetPassword("bob", "other", "g2"),
        SetRole("bob", "admin"),
        SetRole("bob", "viewer"),
        SetRole("admin", "viewer"),  # the last one
        DeleteUser("eve"),
        DeleteUser("admin"),  # the last one
        AddKey(key),
        RecordUsage(NODE_1, (KeyCount("k1", Used(0, 3, 40)),)),
        AddKey(msgspec.structs.replace(key, id="k2")),
        DeleteKey("k2"),
        Revoke("s", NOW + 60),
        Revoke("s", NOW + 60),
        RecoverCluster(5, NODE_1),
        RecoverCluster(4, NODE_1),  # an old one
        RemoveMember(NODE_2),
        RemoveMember(NODE_1),  # the last one
        DeleteModel("tiny"),
        DeleteModel("tiny"),
    ]
    assert {type(command) for command in commands} == set(get_args(AnyCommand))
    entries = [
        encode(Proposal(f"p{number}", NOW + number, command, level_of(command)))
        for number, command in enumerate(commands)
    ]
    return [*entries, entries[-1]]


def played(entries: list[bytes]) -> tuple[list[str], Machine]:
    machine = Machine()
    return [b64encode(machine.apply(entry)).decode() for entry in entries], machine


def recorded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def present() -> dict[str, Any]:
    entries = log()
    outcomes, machine = played(entries)
    return {
        "level": LEVEL,
        "state_format": STATE_FORMAT,
        "schema": schema(),
        "log": [b64encode(entry).decode() for entry in entries],
        "outcomes": outcomes,
        "snapshot": b64encode(machine.snapshot()).decode(),
        "fingerprint": machine.state.fingerprint(),
    }


def test_the_level_and_the_format_are_recorded() -> None:
    assert f"replicated-{LEVEL}.json" in [path.name for path in FILES]
    last = recorded(DATA / f"replicated-{LEVEL}.json")
    assert (last["level"], last["state_format"]) == (LEVEL, STATE_FORMAT)


def test_the_shape_of_commands_and_state_is_that_of_the_level() -> None:
    last = recorded(DATA / f"replicated-{LEVEL}.json")
    assert schema() == last["schema"], "raise LEVEL (and STATE_FORMAT): see this file's beginning"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_recorded_log_gives_what_it_gave(path: Path) -> None:
    then = recorded(path)
    outcomes, machine = played([b64decode(entry) for entry in then["log"]])
    assert outcomes == then["outcomes"], "apply decides otherwise than it did at that level"
    if then["level"] == LEVEL:
        assert machine.state.fingerprint() == then["fingerprint"]
    other = Machine()
    other.restore(b64decode(then["snapshot"]))
    assert other.state.fingerprint() == machine.state.fingerprint()


def test_the_recorded_log_has_every_command_of_now() -> None:
    last = recorded(DATA / f"replicated-{LEVEL}.json")
    assert [b64encode(e).decode() for e in log()] == last["log"]


if __name__ == "__main__":
    target = DATA / f"replicated-{LEVEL}.json"
    target.write_text(json.dumps(present(), indent=1, sort_keys=True) + "\n")
    print(target)
