"""`ollamad restore`: a new cluster, or a node that is to join one, out of a backup.

A cluster begins anew with one node, which holds the state of the backup: with a CA, an id and
keys of its own (see `core/refounding.py`), so that it and what is left of the old one do not
disturb each other. All is checked before anything is written, nothing of a cluster may be in the
directory, and the certificate, without which nothing starts, is written last.
"""

import datetime
import os
import secrets
import shutil
import socket
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import trio

from ollamad.admission import forget_cluster
from ollamad.archive import BLOBS, CONFIG, STATE, Archive, opened
from ollamad.backup import SOURCES
from ollamad.core.ids import NodeId
from ollamad.core.names import node_name_of, parse_name
from ollamad.core.pieces import PieceHasher
from ollamad.core.refounding import refound
from ollamad.core.state import ClusterState
from ollamad.datadir import DataDir, DataDirError, check_owner
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.peers.identity import (
    Identity,
    IdentityError,
    issue_certificate,
    make_ca,
    sync_directory,
    write_private,
)
from ollamad.raft.errors import RaftError
from ollamad.raft.recovery import begin_with
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.settings import ConfigError, Settings
from ollamad.store.blobs import write_piece_map
from ollamad.store.errors import StoreError
from ollamad.store.manifests import write_manifest
from ollamad.wire.codec import MalformedMessage

CONFIG_ASIDE = "config-of-backup"
SPARE_BYTES = 64 << 20  # beside the files themselves: for the journal


def restore(
    path: Path,
    data_dir: Path,
    config_dir: Path | None,
    settings: Callable[[Path | None], Settings],
    *,
    node_only: bool = False,
) -> str:
    """Make a cluster of one out of a backup; `node_only`: only what is the node's, to join with.

    Args:
      config_dir: where settings are read from on this host; None if there are none.
      settings: reads those of a directory, with what stands above it; raises ConfigError.

    Returns:
      What was done and what is next, for the user.

    Raises:
      StartError: it cannot be done. Unless it says otherwise, nothing was changed.
    """
    os.umask(0o077)
    check_owner(data_dir)
    try:
        with opened(path) as archive:
            state = _state_of(path, archive)
            with DataDir(data_dir) as directory:
                _check_of_no_cluster(directory)
                chosen = _read_settings(archive, config_dir, settings)
                _check_space(archive, directory, chosen)
                warnings = _elsewhere(archive, directory, chosen, settings)
                try:
                    return _restore(
                        directory, archive, state, config_dir, chosen, warnings, node_only
                    )
                except OSError as error:
                    raise StartError(f"{error}; when that is mended, restore it again") from None
    except (DataDirError, IdentityError, RaftError, StoreError) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"{error.filename or data_dir}: {error.strerror}") from None


def _restore(
    directory: DataDir,
    archive: Archive,
    state: ClusterState,
    config_dir: Path | None,
    settings: Settings,
    warnings: list[str],
    node_only: bool,
) -> str:
    manifest = archive.manifest
    lines = [
        f"The backup is of {manifest.created_at}, cluster {manifest.cluster_id} "
        f"{SOURCES.get(manifest.source, manifest.source)}."
    ]
    directory.restoring.touch()
    sync_directory(directory.path)
    lines += _restore_settings(directory, archive, config_dir) + warnings
    _restore_models(directory, archive, state, settings)
    if not node_only:
        predecessor = _predecessor(state, settings, NodeId(manifest.node.id))
        trio.run(_found, directory, state, predecessor)
        directory.departed.unlink(missing_ok=True)
    directory.restoring.unlink()
    sync_directory(directory.path)
    if variables := manifest.environment:
        lines.append(f"Settings of the environment were not in it: {', '.join(variables)}.")
    return "\n".join(lines + (_join_next() if node_only else _found_next(state, predecessor)))


def forget(data_dir: Path) -> str:
    """Put aside the state of the cluster that a stopped node was in, so that it can join another.

    Raises:
      StartError: the node runs, or is in no cluster.
    """
    check_owner(data_dir)
    directory = DataDir(data_dir)
    there = (*directory.of_cluster(), directory.restoring, directory.departed)
    if not any(path.exists() for path in there):
        raise StartError(f"the node of {data_dir} is in no cluster; nothing to forget")
    try:
        with directory:
            aside = forget_cluster(directory)
            directory.restoring.unlink(missing_ok=True)
            directory.departed.unlink(missing_ok=True)
    except DataDirError as error:
        raise StartError(str(error)) from None
    where = f"The state is in {aside} now; the models stay. " if aside is not None else ""
    return (
        f"{where}Start this node with `ollamad start --join TOKEN@HOST:PORT`; without --join it "
        "founds a new cluster."
    )


# Looking.


def _state_of(path: Path, archive: Archive) -> ClusterState:
    machine = Machine()
    try:
        machine.restore(archive.read(STATE))
    except MalformedMessage as error:
        raise StartError(f"{path}: {error}") from None
    if not machine.state.cluster_id or archive.manifest.node.id not in machine.state.members:
        raise StartError(f"{path} holds no cluster")
    return machine.state


def _check_of_no_cluster(directory: DataDir) -> None:
    """All else may be there: models, and what is in a home, as it is that of the service's user."""
    found = [path.name for path in directory.of_cluster() if path.exists()]
    if directory.restoring.exists():
        # What is there of a cluster was to be one, and was cut off.
        forget_cluster(directory)
    elif found:
        raise StartError(
            f"{directory.path} belongs to a node already ({', '.join(found[:4])}); stop its "
            "daemon and put the state aside with `ollamad forget`, or name another directory with "
            "--data-dir"
        )


def _read_settings(
    archive: Archive, config_dir: Path | None, settings: Callable[[Path | None], Settings]
) -> Settings:
    """Those that will be in force: the backup's where this host has none."""
    if config_dir is not None or not archive.names(CONFIG):
        return settings(config_dir)
    try:
        return _settings_of_backup(archive, settings)
    except ConfigError as error:
        raise StartError(
            f"the settings in the backup cannot be used ({error}); give others: --config DIR"
        ) from None


def _settings_of_backup(archive: Archive, settings: Callable[[Path | None], Settings]) -> Settings:
    with tempfile.TemporaryDirectory() as directory:
        for name in archive.names(CONFIG):
            write_private(Path(directory) / Path(name).name, archive.read(name))
        try:
            return settings(Path(directory))
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{directory}/", "")) from None


def _elsewhere(
    archive: Archive,
    directory: DataDir,
    chosen: Settings,
    settings: Callable[[Path | None], Settings],
) -> list[str]:
    """Tell who takes over the backup's settings later that the models will be missed there."""
    if not archive.names(BLOBS) or not archive.names(CONFIG):
        return []
    try:
        theirs = _model_root(directory, _settings_of_backup(archive, settings))
    except ConfigError:
        return []  # nobody takes these over as they are
    here = _model_root(directory, chosen)
    if theirs == here:
        return []
    return [
        f"The models are in {here}. With the backup's settings they are looked for in {theirs}: "
        "move them there before you take these settings over."
    ]


def _check_space(archive: Archive, directory: DataDir, settings: Settings) -> None:
    """On each disk: models may have one of their own."""
    blobs = _model_root(directory, settings)
    needed: Counter[int] = Counter({_nearest(directory.path).stat().st_dev: SPARE_BYTES})
    places = {_nearest(place).stat().st_dev: place for place in (blobs, directory.path)}
    for name, entry in archive.manifest.files.items():
        place = blobs if name.startswith(BLOBS) else directory.path
        needed[_nearest(place).stat().st_dev] += entry.size
    for disk, size in needed.items():
        free = shutil.disk_usage(_nearest(places[disk])).free
        if free < size:
            raise StartError(
                f"{places[disk]} has room for {free / 1e6:.0f} MB; this backup needs "
                f"{size / 1e6:.0f} MB there"
            )


def _model_root(directory: DataDir, settings: Settings) -> Path:
    adopted = Path(settings.models.path) if settings.models.path else None
    return directory.model_places(adopted, read_only=settings.models.read_only).own


def _nearest(path: Path) -> Path:
    """It, or the directory that is there and in which it will be."""
    return next(place for place in (path, *path.parents) if place.exists())


def _predecessor(state: ClusterState, settings: Settings, made_on: NodeId) -> NodeId:
    """Which node of the old cluster this host is: the one of its name, else where it was made."""
    name = settings.node.name or node_name_of(socket.gethostname())
    return next((m.id for m in state.members.values() if m.name == name), made_on)


# Writing.


def _restore_settings(directory: DataDir, archive: Archive, config_dir: Path | None) -> list[str]:
    """Where there are no settings yet they come from the backup; others are never overwritten."""
    lines = []
    for name in archive.names(CONFIG):
        data, file = archive.read(name), Path(name).name
        there = None if config_dir is None else config_dir / file
        if there is not None and there.is_file() and there.read_bytes() == data:
            continue
        folder = directory.path / ("config" if config_dir is None else CONFIG_ASIDE)
        folder.mkdir(exist_ok=True)
        write_private(folder / file, data)
        if config_dir is None:
            lines.append(f"Settings: {folder / file}; look through them, addresses above all.")
        else:
            lines.append(f"{config_dir} stays as it is; the backup's settings: {folder / file}.")
    return lines


def _restore_models(
    directory: DataDir, archive: Archive, state: ClusterState, settings: Settings
) -> None:
    """Blobs first: a manifest whose blobs are not there would be of no use."""
    names = archive.names(BLOBS)
    if not names:
        return
    root = _model_root(directory, settings)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for name in names:
        pieces = PieceHasher(archive.manifest.files[name].size)
        archive.copy(name, root / name, pieces.update)
        # Nodes that join would wait for it to be made.
        write_piece_map(root / name, pieces.finish()[1])
    sync_directory(root / "blobs")
    included = {model.digest for model in archive.manifest.models if model.included}
    (root / "manifests").mkdir(exist_ok=True)
    for model in state.models.values():
        if model.digest in included:
            write_manifest(root / "manifests", parse_name(model.name), model.manifest)


async def _found(directory: DataDir, old: ClusterState, predecessor: NodeId) -> None:
    """Make the journal of the new cluster and then the certificate of its only member."""
    now = datetime.datetime.now(datetime.UTC)
    identity = Identity.to_join(directory.joining)
    machine, ca = Machine(), make_ca(now)
    machine.state = refound(
        old,
        cluster_id=str(uuid.uuid4()),
        ca=ca,
        jwt_key=secrets.token_bytes(32),
        founder=identity.node_id,
        predecessor=predecessor,
    )
    store = SqliteStore(directory.raft)
    try:
        await store.load()
        await store.commit(begin_with(machine.snapshot(), identity.node_id))
    finally:
        await store.aclose()
    certificate = issue_certificate(ca, identity.public_key, now)
    identity.become_member(directory.identity, certificate, ca.certificate_pem)


def _join_next() -> list[str]:
    return [
        "This node's settings and models are here. Start it with `ollamad start --join "
        "TOKEN@HOST:PORT` (TOKEN from `ollama-dist cluster token` on a member). If the old node is "
        "still a member, take it out first: `ollama-dist cluster leave NODE`."
    ]


def _found_next(state: ClusterState, predecessor: NodeId) -> list[str]:
    others = sorted(m.name for m in state.members.values() if m.id != predecessor)
    lines = [
        f"This is a new cluster of one node, {state.members[predecessor].name}, with "
        f"{len(state.models)} models and {len(state.users)} users; passwords and API keys are as "
        "they were, sessions have ended.",
        "Start it: ollamad start",
    ]
    if others:
        lines.append(
            f"For each of {', '.join(others)}: on an empty host, or after `ollamad forget`, start "
            "it with `ollamad start --join TOKEN@HOST:PORT` (TOKEN from `ollama-dist cluster "
            "token` here); under its name it takes its place again. If it is gone for good: "
            "`ollama-dist cluster leave NODE --force`."
        )
    return lines
