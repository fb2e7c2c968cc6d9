"""The data directory: made, checked and locked, so that two daemons never share one.

lock             held while a daemon runs; holds its pid
identity/        key, certificate, CA certificate
joining/         the key to join with, which becomes `identity` once a cluster lets it in
raft.db          the replicated log and its snapshot; beside it raft.db-wal, SQLite's log of
                 what is not in it yet, and raft.db-witness, which change was acknowledged last;
                 as it was before each `ollamad recover`: raft.db.before-recovery-TIME
seeds            members to talk to before the log tells (written when joining)
models/          blobs and manifests in Ollama's layout
run/             sockets of runner processes
cli-token        lets `ollama-dist` of the same user in (0600)
admin-password   the first admin's password, if it was made up (0600)
config/          settings, if they are not in /etc/ollamad
departed         there once this node was taken out of its cluster, until it is in another
restoring        there while a backup is being restored; what is here then is not whole
"""

import fcntl
import os
import pwd
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ollamad.errors import StartError


class DataDirError(Exception):
    """The data directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelPlaces:
    """Where models are: the directory that new ones go to, and those that are only read."""

    own: Path
    shelves: list[Path]


def check_owner(data_dir: Path) -> None:
    """Whether who runs this is who runs the daemon; what others leave there it could not read.

    Raises:
      StartError: it is somebody else.
    """
    if not data_dir.is_dir() or (owner := data_dir.stat().st_uid) == os.geteuid():
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"'#{owner}'"  # as sudo and a shell take a number
    raise StartError(
        f"{data_dir} belongs to another user; run this as that one: "
        f"sudo -u {name} ollamad … --data-dir {data_dir}"
    )


class DataDir:
    """The directory of one daemon; a context manager that holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    def __enter__(self) -> "DataDir":
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirError(
                f"{self.path} is not writable: {error.strerror}; choose another with --data-dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise DataDirError(
                f"{self.path} is in use by another ollamad (pid {owner or 'unknown'}); "
                "stop it, or choose another directory with --data-dir"
            ) from None
        with suppress(OSError):  # a full disk: who is told of the lock does not learn whose it is
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    @property
    def identity(self) -> Path:
        return self.path / "identity"

    @property
    def joining(self) -> Path:
        return self.path / "joining"

    @property
    def raft(self) -> Path:
        return self.path / "raft.db"

    @property
    def seeds(self) -> Path:
        return self.path / "seeds"

    @property
    def models(self) -> Path:
        return self.path / "models"

    def model_places(self, adopted: Path | None, *, read_only: bool) -> ModelPlaces:
        """Where models are, with that directory of somebody else's models (`models.path`)."""
        if adopted is None:
            return ModelPlaces(self.models, [])
        if read_only or (adopted.is_dir() and not os.access(adopted, os.W_OK)):
            return ModelPlaces(self.models, [adopted])
        return ModelPlaces(adopted, [])

    @property
    def adopted(self) -> Path:
        """Which models of an adopted directory were published."""
        return self.path / "adopted"

    @property
    def brought(self) -> Path:
        """Which models of an adopted directory that can be written are the cluster's own."""
        return self.path / "brought"

    @property
    def scrubbed(self) -> Path:
        """When each blob was last read and checked."""
        return self.path / "scrubbed"

    @property
    def pulls(self) -> Path:
        """The pulls of this node that are not over."""
        return self.path / "pulls"

    @property
    def memory_record(self) -> Path:
        return self.path / "memory.json"

    @property
    def replicas(self) -> Path:
        return self.path / "replicas"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def cli_token(self) -> Path:
        return self.path / "cli-token"

    @property
    def admin_password(self) -> Path:
        return self.path / "admin-password"

    @property
    def departed(self) -> Path:
        """That the cluster which this node was in goes on without it."""
        return self.path / "departed"

    @property
    def restoring(self) -> Path:
        return self.path / "restoring"

    def check_whole(self) -> None:
        """Whether what is here is not half of what a backup held.

        Raises:
          DataDirError: it is.
        """
        if self.restoring.exists():
            raise DataDirError(
                f"a backup was being restored into {self.path} and was cut off; restore it again, "
                "or give it up with `ollamad forget`"
            )

    def of_cluster(self) -> list[Path]:
        """What belongs to this membership of a cluster, in the order in which it is moved aside.

        The identity is the last: with it alone nothing starts, and without it the rest could be
        taken for that of the next one.
        """
        endings = ("", "-wal", "-shm", "-witness")
        journal = [self.raft.with_name(self.raft.name + end) for end in endings]
        journal += self.path.glob(f"{self.raft.name}.before-recovery-*")
        rest = [self.seeds, self.replicas, self.cli_token, self.admin_password]
        return [*journal, *rest, self.identity]
