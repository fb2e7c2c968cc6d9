"""Sign-ins on disk, one for each daemon, and the daemon's own token on the same host.

`credentials.json` is 0600 in a 0700 directory and is replaced as a whole, so that a crash
leaves the old file or the new one. A refresh token works once: who refreshes holds `lock`.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollama_dist.address import Address
from ollama_dist.errors import CliError

MAX_TOKEN_BYTES = 16 * 1024  # a token file that is larger is something else


@dataclass(frozen=True, slots=True)
class Login:
    """What `POST /auth/login` gave; `expires_at` is RFC 3339, or empty when not told."""

    token: str
    refresh_token: str
    expires_at: str = ""
    username: str = ""


def config_directory() -> Path:
    """Where this program keeps what must stay private."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "ollama-dist"


def _path() -> Path:
    return config_directory() / "credentials.json"


def load_login(address: Address) -> Login | None:
    """The stored sign-in for that daemon.

    Raises:
      CliError: the file is there and cannot be read.
    """
    entry = _read().get(address.url)
    try:
        return Login(**entry) if entry else None
    except TypeError:
        raise _damaged(_path()) from None


def save_login(address: Address, login: Login | None) -> None:
    """Store the sign-in for that daemon; None forgets it."""
    hosts = _read()
    if login is not None:
        hosts[address.url] = asdict(login)
    elif hosts.pop(address.url, None) is None:
        return
    _write(hosts)


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Held while the file is read, changed and written, against other runs of this program."""
    handle = os.open(_directory() / "credentials.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def local_tokens(address: Address) -> list[tuple[str, Path]]:
    """Tokens that a daemon on this host left for its own user, best first, and from where.

    They never go to another host: an address that is not loopback has none.
    """
    if not address.is_loopback:
        return []
    directory = os.environ.get("OLLAMAD_DATA_DIR")
    if directory:
        places = [Path(directory)]
    else:
        places = [Path.home() / ".local/share/ollamad", Path("/var/lib/ollamad")]
    found = []
    for place in places:
        path = place / "cli-token"
        with contextlib.suppress(OSError, UnicodeDecodeError), path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES).decode("ascii").strip()
            if token and token.isprintable():
                found.append((token, path))
    return found


def _read() -> dict[str, Any]:
    path = _path()
    try:
        hosts = json.loads(path.read_bytes())["hosts"]
    except FileNotFoundError:
        return {}
    except OSError as problem:
        raise CliError(f"cannot read {path}: {problem.strerror}") from problem
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    if not isinstance(hosts, dict):
        raise _damaged(path)
    return hosts


def _damaged(path: Path) -> CliError:
    return CliError(f"{path} is damaged", hint="Delete it and sign in again.")


def _directory() -> Path:
    directory = config_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as problem:
        raise CliError(f"cannot use {directory}: {problem.strerror}") from problem
    return directory


def _write(hosts: dict[str, Any]) -> None:
    directory = _directory()
    try:
        # mkstemp makes the file 0600.
        handle, name = tempfile.mkstemp(prefix=".credentials-", dir=directory)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"hosts": hosts}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(directory / "credentials.json")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise CliError(f"cannot write to {directory}: {problem.strerror}") from problem
