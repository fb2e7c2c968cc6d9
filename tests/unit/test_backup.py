"""Backups: what is in them, what is refused, and that a restore is whole or can be repeated."""

import datetime
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from typer.testing import CliRunner

from ollamad import restore as restore_module
from ollamad.archive import FORMAT, BadArchive, opened
from ollamad.backup import backup
from ollamad.core.commands import Proposal, PutModel, PutUser
from ollamad.core.ids import NodeId
from ollamad.core.quota import Used
from ollamad.core.refounding import refound
from ollamad.core.state import (
    ApiKey,
    ClusterState,
    JoinToken,
    Layer,
    Member,
    Model,
    ModelDetails,
    User,
)
from ollamad.core.state import Settings as ClusterSettings
from ollamad.datadir import DataDir
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.main import app
from ollamad.peers.identity import Identity, IdentityError, issue_certificate, make_ca
from ollamad.raft.node import RaftNode
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.renewal import renew
from ollamad.restore import forget, restore
from ollamad.settings import ConfigError, Effective, Settings, load
from ollamad.start import run
from ollamad.store import blobs
from ollamad.store.models import ModelStore
from ollamad.wire.codec import encode
from tests.fakes.api_services import member
from tests.unit.test_recover import Survivor

WEIGHTS = b"weights of a model"
BLOB = hashlib.sha256(WEIGHTS).hexdigest()


def a_model(*holders: NodeId) -> Model:
    layer = Layer("application/vnd.ollama.image.model", f"sha256:{BLOB}", len(WEIGHTS), 1 << 20, "")
    manifest = b'{"schemaVersion":2}'
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    return Model("tiny:latest", digest, manifest, ModelDetails(), (layer,), 1.0, holders, holders)


class Host:
    """A stopped node with a journal, and the way to back it up."""

    def __init__(self, path: Path) -> None:
        self.node = Survivor(path)
        self.node.more = [PutModel(a_model(self.node.id)), PutUser(User("eve", "h", "viewer", 1.0))]
        self.node.write()
        self.path = self.node.path
        blobs = self.path / "models" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"sha256-{BLOB}").write_bytes(WEIGHTS)
        self.file = path / "backup"

    def backup(self, *, models: bool = True, config_dir: Path | None = None) -> str:
        return backup(self.file, self.path, effective(config_dir), config_dir, models=models)


def etc(directory: Path, config: str) -> Path:
    """A directory of settings."""
    path = directory / "etc"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    return path


def effective(config_dir: Path | None = None) -> Effective:
    return load(config_dir, {}, {})


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Commands are processes of their own, and change theirs."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return tmp_path / "fresh"


def put_back(file: Path, into: Path, *, node_only: bool = False) -> str:
    """A restore on a host that has no settings yet."""
    return restore(file, into, None, lambda of: effective(of).settings, node_only=node_only)


def started(path: Path) -> tuple[NodeId, Machine, frozenset[NodeId]]:
    """What a daemon would find in that directory."""

    async def open_() -> tuple[NodeId, Machine, frozenset[NodeId]]:
        identity = Identity.load_or_create(path / "identity")
        assert identity.is_member
        identity.check_validity(datetime.datetime.now(datetime.UTC))
        machine, store = Machine(), SqliteStore(path / "raft.db")
        node = RaftNode(identity.node_id, store, machine, lambda *_: None)
        assert await node.open()
        await store.aclose()
        return identity.node_id, machine, node.voters

    return trio.run(open_)


def content(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


# The state of a new cluster.


def test_nothing_by_which_nodes_know_each_other_is_taken_over() -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    a, b, c, new = (NodeId(letter * 46) for letter in "abcn")
    members: dict[NodeId, Member] = {n: member(n, name) for n, name in ((a, "one"), (b, "two"))}
    members[b] = member(b, "two", draining=True)
    key = ApiKey("k", "agent", "00", "inference", 1.0, "admin")
    old = ClusterState(
        cluster_id="old",
        incarnation=5,
        ca=make_ca(now),
        jwt_key=b"o" * 32,
        settings=ClusterSettings(auto_distribution=False),
        members=members,
        departed={c: 1.0},
        models={"tiny": a_model(a, b)},
        users={"eve": User("eve", "hash", "viewer", 1.0)},
        api_keys={"k": key},
        key_usage={"k": {a: Used(0)}},
        join_tokens={"t": JoinToken("t", b"", 9e9)},
        revoked={"s": 9e9},
    )
    before = encode(old)
    state = refound(
        old, cluster_id="new", ca=make_ca(now), jwt_key=b"n" * 32, founder=new, predecessor=a
    )
    assert encode(old) == before, "what it is made of is left alone"
    assert (state.cluster_id, state.incarnation, state.jwt_key) == ("new", 0, b"n" * 32)
    assert state.ca != old.ca
    assert (state.departed, state.join_tokens, state.recent) == ({}, {}, {})
    assert state.revoked == old.revoked, "who was logged out stays so"
    assert set(state.members) == {new, b}
    assert (state.members[new].name, state.members[new].left_behind) == ("one", False)
    two = state.members[b]
    assert (two.left_behind, two.draining) == (True, True)
    assert {two.api_address, two.p2p_address, two.raft_address} == {""}, "nobody is dialled there"
    model = state.models["tiny"]
    assert model.desired == model.confirmed == tuple(sorted((new, b)))
    assert (state.users, state.api_keys, state.settings) == (old.users, old.api_keys, old.settings)
    assert state.key_usage == old.key_usage


# A whole round.


def test_a_stopped_node_is_backed_up_and_made_a_new_cluster_of(host: Host, empty: Path) -> None:
    said = host.backup()
    assert "as this node's journal has it" in said
    assert "3 members, 3 users, 1 models (1 with their files)" in said
    assert host.file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in host.file.parent.glob(".backup*")] == []

    said = put_back(host.file, empty)
    assert "For each of three, two:" in said
    node_id, machine, voters = started(empty)
    state = machine.state
    assert node_id not in (host.node.id, host.node.b, host.node.c)
    assert voters == {node_id}
    assert set(state.members) == {node_id, host.node.b, host.node.c}
    assert state.members[node_id].name == "one"
    assert set(state.users) == {"admin", "tail", "eve"}, "what is in the log counts as committed"
    [model] = state.models.values()
    assert model.confirmed == (node_id,)
    assert state.ca is not None
    assert state.ca != host.node.ca
    assert (empty / "models" / "blobs" / f"sha256-{BLOB}").read_bytes() == WEIGHTS
    manifest = empty / "models" / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    assert manifest.read_bytes() == model.manifest
    assert not (empty / "restoring").exists()
    assert all(p.stat().st_mode & 0o077 == 0 for p in empty.rglob("*"))


async def test_the_new_cluster_commits_and_sends_its_state_to_who_joins(
    tmp_path: Path,
) -> None:
    """Its log begins so late that a blank one needs the snapshot."""
    host = await trio.to_thread.run_sync(Host, tmp_path)
    await trio.to_thread.run_sync(host.backup)
    empty = tmp_path / "fresh"
    await trio.to_thread.run_sync(put_back, host.file, empty)
    identity = Identity.load_or_create(empty / "identity")
    told = trio.Event()
    machine = Machine()
    other = Machine(lambda: told.set() if "later" in other.state.users else None)
    joiner = NodeId("j" * 46)
    nodes: dict[NodeId, RaftNode] = {}

    def send(me: NodeId) -> Callable[[NodeId, bytes], None]:
        return lambda to, frame: nodes[to].receive(me, frame)

    nodes[identity.node_id] = RaftNode(
        identity.node_id, SqliteStore(empty / "raft.db"), machine, send(identity.node_id)
    )
    nodes[joiner] = RaftNode(joiner, SqliteStore(tmp_path / "j.db"), other, send(joiner))
    for node in nodes.values():
        await node.open()
    nodes[joiner].start_as_learner(frozenset({identity.node_id}))
    async with trio.open_nursery() as nursery:
        for node in nodes.values():
            await nursery.start(node.run)
        nodes[identity.node_id].peer_connected(joiner)
        nodes[joiner].peer_connected(identity.node_id)
        later = Proposal("p", 5.0, PutUser(User("later", "hash", "viewer", 5.0)))
        await nodes[identity.node_id].propose(encode(later), 5)
        with trio.fail_after(20):
            await told.wait()
        nursery.cancel_scope.cancel()
    assert other.state.fingerprint() == machine.state.fingerprint()
    assert "eve" in other.state.users


def test_of_a_node_only_settings_and_models_are_restored(host: Host, empty: Path) -> None:
    host.backup()
    said = put_back(host.file, empty, node_only=True)
    assert "Start it with `ollamad start --join" in said
    assert (empty / "models" / "blobs" / f"sha256-{BLOB}").is_file()
    assert not any(path.exists() for path in DataDir(empty).of_cluster())


def test_models_come_back_with_their_piece_maps(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "MIN_PIECE_SIZE", 0)  # of so small a file none is kept
    host.backup()
    put_back(host.file, empty)
    piece_map = trio.run(ModelStore(empty / "models").known_map, f"sha256:{BLOB}")
    assert piece_map is not None
    assert piece_map.hashes.hex() == BLOB


def test_without_models_none_are_in_it(host: Host, empty: Path) -> None:
    assert "1 models (none with their files)" in host.backup(models=False)
    put_back(host.file, empty)
    assert not (empty / "models").exists()
    _, machine, _ = started(empty)
    assert len(machine.state.models) == 1


def test_the_host_is_the_member_of_its_name(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.backup()
    monkeypatch.setattr("socket.gethostname", lambda: "three")
    put_back(host.file, empty)
    node_id, machine, _ = started(empty)
    assert machine.state.members[node_id].name == "three"
    assert set(machine.state.members) == {node_id, host.node.id, host.node.b}
    [model] = machine.state.models.values()
    assert model.confirmed == (host.node.id,), "that node is still to come back"


# Settings.


def test_settings_come_back_where_there_are_none_and_are_never_overwritten(
    host: Host, empty: Path, tmp_path: Path
) -> None:
    there = etc(tmp_path, "drain: {timeout: 7s}\n")
    (there / "node.yaml").write_text("node: {name: two}\n")
    host.backup(config_dir=there)
    put_back(host.file, empty)
    assert (empty / "config" / "config.yaml").read_text() == "drain: {timeout: 7s}\n"
    node_id, machine, _ = started(empty)
    assert machine.state.members[node_id].name == "two", "settings of the backup are in force"

    other = tmp_path / "other"
    (there / "config.yaml").write_text("drain: {timeout: 9s}\n")
    said = restore(host.file, other, there, lambda of: effective(of).settings)
    assert (there / "config.yaml").read_text() == "drain: {timeout: 9s}\n"
    assert (other / "config-of-backup" / "config.yaml").read_text() == "drain: {timeout: 7s}\n"
    assert not (other / "config-of-backup" / "node.yaml").exists(), "it is the same"
    assert "config-of-backup" in said


def test_models_go_where_the_settings_in_force_say_and_it_tells_of_another_place(
    host: Host, tmp_path: Path
) -> None:
    big, blob = tmp_path / "big", f"blobs/sha256-{BLOB}"
    there = etc(tmp_path, f"models: {{path: {big}}}\n")
    backup(host.file, host.path, effective(), there, models=True)
    # A host whose settings are those that its package brings.
    stock = etc(tmp_path / "stock", "# models:\n#   replicas: 2\n")
    first, second = tmp_path / "first", tmp_path / "second"
    said = restore(host.file, first, stock, lambda of: effective(of).settings)
    assert (first / "models" / blob).read_bytes() == WEIGHTS
    assert (
        f"The models are in {first}/models. With the backup's settings they are looked for in "
        f"{big}: move them there before" in said
    )
    assert not big.exists()
    # The manual's order: first the settings, then the restore.
    with tarfile.open(host.file) as tar:
        (stock / "config.yaml").write_bytes(_read(tar, tar.getmember("config/config.yaml")))
    said = restore(host.file, second, stock, lambda of: effective(of).settings)
    assert (big / blob).read_bytes() == WEIGHTS
    assert not (second / "models" / blob).exists()
    assert "looked for" not in said


def test_settings_of_the_backup_that_cannot_be_used_are_told_before_anything_is_written(
    host: Host, empty: Path, tmp_path: Path
) -> None:
    there = etc(tmp_path, "drain: {timeout: 7s}\n")
    host.backup(config_dir=there)

    def settings(of: Path | None) -> Settings:
        assert of is not None
        raise ConfigError(f"{of / 'config.yaml'}:1: there is no setting 'drain'")

    with pytest.raises(StartError) as told:
        restore(host.file, empty, None, settings)
    assert str(told.value) == (
        "the settings in the backup cannot be used (config.yaml:1: there is no setting 'drain'); "
        "give others: --config DIR"
    )
    assert content(empty) == {}


def test_room_is_looked_for_on_the_disk_that_the_models_go_to(
    host: Host, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path("/dev/shm/models-of-a-test/not-there-yet")
    there = etc(tmp_path, f"models: {{path: {other}}}\n")
    backup(host.file, host.path, effective(), there, models=True)
    usage = shutil.disk_usage
    asked = []

    def almost_full(path: Path) -> object:
        asked.append(path)
        return usage(path)._replace(free=10 if path == Path("/dev/shm") else 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    with pytest.raises(StartError, match=f"{other} has room for 0 MB; this backup needs 0 MB"):
        put_back(host.file, empty)
    assert len(asked) == 2
    assert content(empty) == {}
    assert not other.parent.exists()


def test_variables_are_told_by_name_only(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_JWT_SECRET", "hush " * 10)
    said = backup(host.file, host.path, load(None, os.environ, {}), None)
    assert "OLLAMA_JWT_SECRET" in said
    assert b"hush" not in host.file.read_bytes()
    assert "OLLAMA_JWT_SECRET" in put_back(host.file, empty)


# What is refused, and that nothing changes then.


def test_the_directory_of_a_node_is_refused(host: Host) -> None:
    host.backup()
    before = content(host.path)
    with pytest.raises(StartError, match=r"belongs to a node already.*ollamad forget"):
        put_back(host.file, host.path)
    assert content(host.path) == before


def test_what_is_of_no_cluster_may_be_there(host: Host, empty: Path) -> None:
    """As in the home directory that it is for the service's user."""
    host.backup()
    (empty / ".local").mkdir(parents=True)
    (empty / ".local/history").write_text("hello")
    kept = empty / "raft.db.before-recovery-20260101-000000"
    kept.write_text("")
    with pytest.raises(StartError, match=kept.name):
        put_back(host.file, empty)
    forget(empty)
    assert not kept.exists(), "it goes with its cluster"
    put_back(host.file, empty)
    started(empty)
    assert (empty / ".local/history").read_text() == "hello"


def test_a_timer_gets_no_backup_of_a_node_that_does_not_run(host: Host) -> None:
    with pytest.raises(StartError, match="no daemon runs"):
        backup(host.file, host.path, effective(), None, live=True)
    assert not host.file.exists()
    with DataDir(host.path), pytest.raises(StartError, match="the daemon is in no cluster yet"):
        backup(host.file, host.path, effective(), None, live=True)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_may_read_is_refused(host: Host, empty: Path, mode: int) -> None:
    host.backup()
    host.file.chmod(mode)
    with pytest.raises(BadArchive, match=r"others may read .*chmod 600"):
        put_back(host.file, empty)
    assert not empty.exists()


def test_no_damage_goes_unnoticed(host: Host, empty: Path) -> None:
    host.backup()
    whole = host.file.read_bytes()
    with opened(host.file) as archive:
        manifest = archive.manifest
    for cut in range(0, len(whole), 509):
        if not any(whole[cut:]):
            continue  # only the end's zeros are gone
        host.file.write_bytes(whole[:cut])
        with pytest.raises(BadArchive):
            put_back(host.file, empty)
    rng = random.Random(7)
    for place in [*range(0, 1024, 7), *(rng.randrange(len(whole)) for _ in range(300))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        host.file.write_bytes(damaged)
        # What is found is told; the rest of a tar's fields (owners, times) changes nothing.
        with suppress(BadArchive), opened(host.file) as archive:
            assert archive.manifest == manifest
            for name, entry in manifest.files.items():
                assert hashlib.sha256(archive.read(name)).hexdigest() == entry.sha256
    assert not empty.exists()


def rewritten(
    file: Path, change: Callable[[str, bytes], bytes], rename: Mapping[str, str] | None = None
) -> None:
    """Change parts of an archive, and make its first line fit the manifest again."""
    with tarfile.open(file) as tar:
        parts = {info.name: change(info.name, _read(tar, info)) for info in tar}
    head = parts["ollamad-backup"].splitlines()
    head[1] = hashlib.sha256(parts["manifest.json"]).hexdigest().encode()
    parts["ollamad-backup"] = b"\n".join(head) + b"\n"
    with tarfile.open(file, "w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo((rename or {}).get(name, name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    opened_file = tar.extractfile(info)
    assert opened_file is not None
    return opened_file.read()


def test_a_newer_format_is_refused(host: Host, empty: Path) -> None:
    host.backup()
    later = b"ollamad backup %d\n" % (FORMAT + 1)
    rewritten(
        host.file,
        lambda name, data: (
            data.replace(b"ollamad backup 1\n", later) if name == "ollamad-backup" else data
        ),
    )
    with pytest.raises(BadArchive, match=f"format {FORMAT + 1}, this version reads up to {FORMAT}"):
        put_back(host.file, empty)
    assert not empty.exists()


def test_the_state_of_a_newer_version_is_refused(host: Host, empty: Path) -> None:
    host.backup()
    with opened(host.file) as archive:
        state = archive.read("state.msgpack")
    newer = state.replace(encode("format") + encode(1), encode("format") + encode(9), 1)
    assert newer != state

    def change(name: str, data: bytes) -> bytes:
        if name == "state.msgpack":
            return newer
        if name == "manifest.json":
            manifest = json.loads(data)
            manifest["files"]["state.msgpack"]["sha256"] = hashlib.sha256(newer).hexdigest()
            return json.dumps(manifest).encode()
        return data

    rewritten(host.file, change)
    with pytest.raises(StartError, match="format 9; this version reads up to format 1"):
        put_back(host.file, empty)
    assert not empty.exists()


def test_a_file_that_the_manifest_does_not_name_is_refused(host: Host, empty: Path) -> None:
    host.backup()

    def change(name: str, data: bytes) -> bytes:
        if name != "manifest.json":
            return data
        manifest = json.loads(data)
        del manifest["files"][f"blobs/sha256-{BLOB}"]
        return json.dumps(manifest).encode()

    rewritten(host.file, change)
    with pytest.raises(BadArchive, match=BLOB):
        put_back(host.file, empty)
    assert not empty.exists()


@pytest.mark.parametrize(
    "name",
    [
        "blobs/../../../evil",
        "blobs//etc/evil",
        "config/..",
        "config/a/node.yaml",
        "../state.msgpack",
        "/etc/evil",
        f"blobs/sha256-{'0' * 64}",  # the name of other contents
    ],
)
def test_a_file_with_a_name_that_leads_elsewhere_is_refused(
    host: Host, empty: Path, tmp_path: Path, name: str
) -> None:
    host.backup()
    blob = f"blobs/sha256-{BLOB}"

    def change(part: str, data: bytes) -> bytes:
        if part == "manifest.json":
            manifest = json.loads(data)
            manifest["files"][name] = manifest["files"].pop(blob)
            return json.dumps(manifest).encode()
        return data

    rewritten(host.file, change, rename={blob: name})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadArchive, match="which no backup of ollamad has"):
        put_back(host.file, empty)
    assert not empty.exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_backup_is_told(tmp_path: Path, empty: Path) -> None:
    file = tmp_path / "b"
    for data in (b"", b"hello", bytes(10240)):
        file.write_bytes(data)
        file.chmod(0o600)
        with pytest.raises(BadArchive, match="no backup of ollamad"):
            put_back(file, empty)
    with pytest.raises(StartError, match=r"missing: No such file"):
        put_back(tmp_path / "missing", empty)
    with pytest.raises(StartError):
        put_back(tmp_path, empty)
    assert not empty.exists()


def test_a_backup_of_what_is_no_node_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StartError, match="not the data directory of a node"):
            backup(tmp_path / "b", path, effective(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_not_backed_up(host: Host) -> None:
    blob = host.path / "models" / "blobs" / f"sha256-{BLOB}"
    for data in (WEIGHTS[:-1], b"W" + WEIGHTS[1:]):
        blob.write_bytes(data)
        with pytest.raises(StartError, match=r"is damaged; .* without --models"):
            host.backup()
    blob.unlink()
    with pytest.raises(StartError, match="tiny:latest is missing"):
        host.backup()
    assert not host.file.exists()
    assert list(host.file.parent.glob(".backup*")) == []


def test_too_little_room_is_told_before_anything_is_written(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.backup()
    monkeypatch.setattr(restore_module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(StartError, match="has room for"):
        put_back(host.file, empty)
    assert content(empty) == {}


# Cut off.


@pytest.mark.parametrize("at", ["write_manifest", "make_ca", "begin_with", "issue_certificate"])
def test_a_restore_that_was_cut_off_starts_nothing_and_is_repeated(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    host.backup()

    class PowerCut(BaseException):
        pass

    def cut(*arguments: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(restore_module, at, cut)
        with pytest.raises(PowerCut):
            put_back(host.file, empty)
    for step in (
        lambda: run(effective().settings, empty, None, lambda: effective().settings),
        lambda: backup(host.file.with_name("second"), empty, effective(), None),
        lambda: renew(empty),
    ):
        (empty / "raft.db").touch()  # as far as it may have come
        with pytest.raises(StartError, match="was cut off; restore it again"):
            step()
    put_back(host.file, empty)
    node_id, machine, voters = started(empty)
    assert voters == {node_id}
    assert len(machine.state.users) == 3


def test_a_restore_that_was_cut_off_can_be_given_up(
    host: Host, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.backup()
    monkeypatch.setattr(restore_module, "issue_certificate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        put_back(host.file, empty)
    forget(empty)
    assert not any(path.exists() for path in DataDir(empty).of_cluster())
    assert not (empty / "restoring").exists()


def test_what_a_node_forgets_is_put_aside(host: Host, tmp_path: Path) -> None:
    (host.path / "memory.json").write_text("{}")
    before = content(host.path)
    said = forget(host.path)
    [aside] = host.path.glob("left-*")
    assert str(aside) in said
    assert {p.name for p in aside.iterdir()} >= {"raft.db", "identity"}
    assert (host.path / "models" / "blobs" / f"sha256-{BLOB}").is_file()
    assert len(content(host.path)) == len(before), "nothing is lost"
    with pytest.raises(StartError, match="nothing to forget"):
        forget(host.path)
    # And then there is room for a cluster, also where a node was taken out.
    (host.path / "departed").touch()
    (tmp_path / "second").mkdir()
    other = Host(tmp_path / "second")
    other.backup()
    put_back(other.file, host.path)
    assert not (host.path / "departed").exists()
    started(host.path)


# Certificates that ended.


def test_a_certificate_that_ended_is_signed_anew_from_the_journal(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = host.node.identity
    assert "need not be renewed yet" in renew(host.path)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1000)
    old = issue_certificate(host.node.ca, identity.public_key, long_ago)
    identity.install(old, host.node.ca.certificate_pem)
    with pytest.raises(IdentityError, match="run `ollamad renew`"):
        identity.check_validity(datetime.datetime.now(datetime.UTC))
    monkeypatch.setattr("time.time", lambda: 1.0)
    with pytest.raises(StartError, match="have yet to join the cluster; set it"):
        renew(host.path)
    assert (host.path / "identity" / "node.crt").read_bytes() == old, (
        "a clock that is wrong changes nothing"
    )
    monkeypatch.undo()
    assert "valid until" in renew(host.path)
    identity.check_validity(datetime.datetime.now(datetime.UTC))
    node_id, _, _ = started(host.path)
    assert node_id == host.node.id


def test_there_is_nothing_to_renew_without_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nothing to renew"):
        renew(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command line.


def test_the_commands_end_with_a_line_and_a_code(host: Host, empty: Path) -> None:
    runner = CliRunner()

    def call(*arguments: str) -> tuple[int, str]:
        ended = runner.invoke(app, list(arguments))
        return ended.exit_code, ended.output

    made = call("backup", str(host.file), "--data-dir", str(host.path))
    assert (made[0], "It holds the cluster's keys" in made[1]) == (0, True)
    again = call("backup", str(host.file), "--data-dir", str(host.path))
    assert again == (1, f"ollamad: {host.file} is there already; choose another name\n")
    assert call("restore", str(host.file), "--data-dir", str(empty))[0] == 0
    code, output = call("restore", str(host.file), "--data-dir", str(empty))
    assert (code, output.startswith("ollamad: "), output.count("\n")) == (1, True, 1)
    assert call("forget", "--data-dir", str(empty))[0] == 2
    assert call("forget", "--yes", "--data-dir", str(empty))[0] == 0
    assert started(host.path), "the node that was backed up is as it was"
