"""Where the daemon is: what `--host` and OLLAMA_DIST_HOST may look like. Pure."""

import contextlib
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_HOST = "http://127.0.0.1:8080"
DEFAULT_PORT = 8080  # of API_LISTEN; a URL without a port means its scheme's own port
OLLAMA_PORT = 11434  # what OLLAMA_HOST means when it names none
_SCHEME_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """A daemon's API: `url` has no slash at its end and no `/api/v1`."""

    url: str
    host: str

    @property
    def is_loopback(self) -> bool:
        """Whether it can only be this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Read `host`, `host:port`, `[v6]:port`, a bare IPv6 address, or a URL.

    Raises:
      ValueError: it is none of them; the message says what is wrong.
    """
    wanted = text.strip()
    bare = "://" not in wanted
    if bare:
        with contextlib.suppress(ValueError):
            wanted = f"[{ipaddress.IPv6Address(wanted)}]"
        wanted = f"http://{wanted}"
    try:
        parts = urlsplit(wanted)
        port = parts.port
    except ValueError as problem:
        raise ValueError(f"{text!r} is not a host: {problem}") from None
    if parts.scheme not in _SCHEME_PORTS:
        raise ValueError(f"{text!r} is not a host: use http or https, not {parts.scheme!r}")
    host = parts.hostname or ""
    if not host or any(character.isspace() for character in host):
        raise ValueError(f"{text!r} is not a host: write it like box, box:8080 or http://box:8080")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is not a host: it has a user, a query or a fragment")
    port = port or (DEFAULT_PORT if bare else _SCHEME_PORTS[parts.scheme])
    shown = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/api/v1")
    return Address(url=f"{parts.scheme}://{shown}:{port}{path}", host=host)


def of_ollama(text: str) -> str:
    """What OLLAMA_HOST means, in the form of `--host`; it may be written as for a server."""
    wanted = text.strip().strip("\"'")
    if not wanted or "://" in wanted:
        return wanted
    with contextlib.suppress(ValueError):
        wanted = f"[{ipaddress.IPv6Address(wanted.strip('[]'))}]"
    host, colon, port = wanted.rpartition(":")
    if not colon or not port.isdecimal():
        host, port = wanted, str(OLLAMA_PORT)
    if host in ("", "0.0.0.0", "[::]"):
        host = "127.0.0.1"
    return f"{host}:{port}"
