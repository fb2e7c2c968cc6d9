"""`ollamad backup`: one file from which a cluster, or this node, can be made again.

The state comes from the daemon that runs here, after a majority has confirmed that it is current;
or, if none runs, from the journal. Only who may read the data directory gets it, by the token that
is in there. The node's key is not taken along: a key whose log is old must never vote again, so
whatever is restored joins, or founds, with a new one.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import trio

import ollamad
from ollamad.archive import (
    BLOBS,
    CONFIG,
    FORMAT,
    STATE,
    FileEntry,
    Manifest,
    ModelEntry,
    NodeEntry,
    Source,
    from_bytes,
    write,
)
from ollamad.core.ids import NodeId
from ollamad.core.state import ClusterState, Member, Model
from ollamad.datadir import DataDir, DataDirError, check_owner
from ollamad.errors import StartError
from ollamad.machine import Machine
from ollamad.peers.identity import Identity, IdentityError
from ollamad.raft.errors import RaftError
from ollamad.raft.recovery import read_log
from ollamad.raft.sqlite_store import SqliteStore
from ollamad.settings import CONFIG_FILES, Effective, parse_listen
from ollamad.store.files import blob_name
from ollamad.wire.codec import MalformedMessage

ANSWER_TIMEOUT_S = 60.0  # a state of 256 MB, on a busy machine
SOURCES = {
    "majority": "as a majority of the voters confirmed it",
    "node": "as this node knew it; a majority did not confirm that it is current",
    "journal": "as this node's journal has it; others may have gone on since it was stopped",
}


@dataclass(frozen=True, slots=True)
class Copy:
    """The replicated state at one moment."""

    source: str  # one of SOURCES
    node_id: NodeId
    applied_index: int
    data: bytes
    state: ClusterState

    @property
    def node(self) -> Member:
        return self.state.members[self.node_id]

    @property
    def held(self) -> list[Model]:
        """The models that the node holds."""
        return [m for m in self.state.models.values() if self.node_id in m.confirmed]


def backup(
    path: Path,
    data_dir: Path,
    effective: Effective,
    config_dir: Path | None,
    *,
    models: bool = False,
    stale: bool = False,
    live: bool = False,
) -> str:
    """Write a backup to `path`.

    Args:
      config_dir: where this node's settings are.
      models: with the files of the models that this node holds.
      stale: if a daemon runs, and no majority answers it: what it knows is good enough.
      live: only of a daemon that runs; the journal of a stopped one gets old.

    Returns:
      What was done, for the user.

    Raises:
      StartError: it cannot be done; nothing was written.
    """
    if path.exists():
        raise StartError(f"{path} is there already; choose another name")
    check_owner(data_dir)
    if not (data_dir / "raft.db").is_file():
        raise StartError(
            f"{data_dir} is not the data directory of a node that is in a cluster; name it with "
            "--data-dir"
        )
    try:
        directory = DataDir(data_dir)
        directory.check_whole()
        try:
            with directory:
                if live:
                    raise StartError(
                        f"no daemon runs in {data_dir}; without --live its journal is backed up"
                    )
                copy = trio.run(read_journal, directory)
        except DataDirError:
            copy = _ask_daemon(directory, effective, stale=stale)
        held = copy.held if models else []
        sources = {STATE: from_bytes(copy.data)} | _settings(config_dir)
        sources |= _blobs(held, directory, effective)
        size = write(path, sources, lambda files: _manifest(copy, effective, held, files))
    except (DataDirError, RaftError, IdentityError, MalformedMessage, OSError) as error:
        raise StartError(str(error)) from None
    return _report(path, size, copy, effective, held)


async def read_journal(directory: DataDir) -> Copy:
    """The state at the end of a stopped node's log, its uncommitted tail included."""
    identity = Identity.load_or_create(directory.identity)
    machine, store = Machine(), SqliteStore(directory.raft)
    try:
        stored = await store.load()
        log = read_log(stored, machine) if stored.entries else None
    finally:
        await store.aclose()
    if log is None or identity.node_id not in machine.state.members:
        raise StartError(
            f"the node of {directory.path} is no member of a cluster, or has learnt nothing of it "
            "yet; another node of it must do this"
        )
    return Copy("journal", identity.node_id, log.end.index, machine.snapshot(), machine.state)


def _ask_daemon(directory: DataDir, effective: Effective, *, stale: bool) -> Copy:
    host, port = parse_listen(effective.settings.api.listen)
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/api/v1/cluster"
    try:
        token = directory.cli_token.read_text().strip()
    except FileNotFoundError:
        raise StartError("the daemon is in no cluster yet; there is nothing to back up") from None
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(headers=headers, timeout=ANSWER_TIMEOUT_S, trust_env=False) as client:
        try:
            consistent = "false" if stale else "true"
            answer = client.get(f"{url}/snapshot", params={"consistent": consistent})
            status = client.get(f"{url}/status")
        except httpx.TransportError as error:
            raise StartError(
                f"the daemon of {directory.path} runs, but does not answer at {host}:{port} "
                f"({error}); give this command the daemon's settings (--config, API_LISTEN)"
            ) from None
    if answer.status_code != 200 or status.status_code != 200:
        raise StartError(_why_refused(answer if answer.status_code != 200 else status))
    machine = Machine()
    machine.restore(answer.content)
    return Copy(
        "node" if stale else "majority",
        NodeId(status.json()["node_id"]),
        int(answer.headers["X-Applied-Index"]),
        answer.content,
        machine.state,
    )


def _why_refused(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        code, reason = str(body["code"]), str(body["error"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered with status {answer.status_code}; is it of this version?"
    if code == "NO_QUORUM":
        return f"{reason}; --stale takes what this node knows"
    if answer.status_code == 404:
        return "the daemon is of an older version that cannot do this; restart it"
    return f"the daemon said: {reason}"


def _settings(config_dir: Path | None) -> dict[str, Source]:
    found = {}
    for name in CONFIG_FILES if config_dir is not None else ():
        path = Path(config_dir or "") / name
        if path.is_file():
            found[CONFIG + name] = from_bytes(path.read_bytes())
    return found


def _blobs(held: list[Model], directory: DataDir, effective: Effective) -> dict[str, Source]:
    """Where the blobs of these models are on this node, each once."""
    section = effective.settings.models
    adopted = Path(section.path) if section.path else None
    places = directory.model_places(adopted, read_only=section.read_only)
    roots = [place / "blobs" for place in (places.own, *places.shelves)]
    found = {}
    for model in held:
        for layer in model.layers:
            name = blob_name(layer.digest)
            path = next((root / name for root in roots if (root / name).is_file()), None)
            if path is None:
                raise StartError(
                    f"a file of {model.name} is missing ({layer.digest}); if it was deleted "
                    "meanwhile, try again"
                )
            entry = FileEntry(layer.size, layer.digest.removeprefix("sha256:"))
            found[BLOBS + name] = Source(entry, path=path)
    return found


def _manifest(
    copy: Copy, effective: Effective, held: list[Model], files: Mapping[str, FileEntry]
) -> Manifest:
    state = copy.state
    return Manifest(
        format=FORMAT,
        created_at=datetime.fromtimestamp(int(time.time()), UTC).isoformat(),
        version=ollamad.__version__,
        source=copy.source,
        cluster_id=state.cluster_id,
        applied_index=copy.applied_index,
        node=NodeEntry(copy.node_id, copy.node.name),
        members=tuple(
            NodeEntry(m.id, m.name) for m in sorted(state.members.values(), key=lambda m: m.name)
        ),
        models=tuple(
            ModelEntry(m.name, m.digest, m.size, m in held)
            for m in sorted(state.models.values(), key=lambda m: m.name)
        ),
        environment=_variables(effective),
        files=dict(files),
    )


def _variables(effective: Effective) -> tuple[str, ...]:
    """The names of the variables that are settings here."""
    return tuple(sorted({o.text for o in effective.origins.values() if o.text in os.environ}))


def _report(path: Path, size: int, copy: Copy, effective: Effective, held: list[Model]) -> str:
    state = copy.state
    lines = [
        f"{path}: {size / 1e6:.1f} MB, cluster {state.cluster_id} {SOURCES[copy.source]}: "
        f"{len(state.members)} members, {len(state.users)} users, {len(state.models)} models"
        f" ({len(held) or 'none'} with their files)"
    ]
    if variables := _variables(effective):
        lines.append(f"Not in it are the variables {', '.join(variables)}.")
    lines.append("It holds the cluster's keys: keep it as you would keep those.")
    return "\n".join(lines)
