"""Reads pip's own settings, so that a model comes from where a site's packages come from.

The same files and variables in the same order as pip: global, user, site, `PIP_CONFIG_FILE`,
then `PIP_…` variables; in the files `[global]`, then `[download]`. Read are index-url,
extra-index-url, no-index, cert, proxy and trusted-host. Not read: find-links (a directory
promises no hashes), keyring and netrc (put the credentials into index-url).
"""

import configparser
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ollamad.sources.base import SourceError

DEFAULT_INDEX: Final = "https://pypi.org/simple"  # pip's own default
MAX_CONFIG_BYTES: Final = 1 << 20  # of one file; real ones have a few lines
GLOBAL_FILE: Final = Path("/etc/pip.conf")
_SECTIONS: Final = ("global", "download")


@dataclasses.dataclass(frozen=True, slots=True)
class PipConfig:
    """Where and how to ask for packages."""

    index_urls: tuple[str, ...] = (DEFAULT_INDEX,)  # may hold credentials: do not show them
    cert: str | None = None  # path of a CA bundle
    proxy: str | None = None  # None: HTTP_PROXY and its kin decide
    trusted_hosts: tuple[str, ...] = ()  # host or host:port, not verified


def read_pip_config(
    environ: Mapping[str, str] | None = None, prefix: Path = Path(sys.prefix)
) -> PipConfig:
    """Collect pip's settings. Reads a few small files: call it in a thread.

    Raises:
      SourceError: a file cannot be understood; the message names it.
    """
    environ = os.environ if environ is None else environ
    settings: dict[str, str] = {}
    for path in _config_files(environ, prefix):
        settings |= _read_file(path)
    for key, value in environ.items():
        if key.startswith("PIP_") and value:
            settings[_normal(key.removeprefix("PIP_"))] = value
    urls = [settings.get("index-url", DEFAULT_INDEX), *settings.get("extra-index-url", "").split()]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        urls = []
    return PipConfig(
        index_urls=tuple(dict.fromkeys(url.rstrip("/") for url in urls)),
        cert=settings.get("cert"),
        proxy=settings.get("proxy"),
        trusted_hosts=tuple(settings.get("trusted-host", "").split()),
    )


def _config_files(environ: Mapping[str, str], prefix: Path) -> list[Path]:
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:  # pip's way to say: no files at all
        return []
    home = Path(environ.get("HOME", "/nonexistent"))
    config_home = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    shared = [Path(path) for path in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if path]
    files = [path / "pip" / "pip.conf" for path in reversed(shared)]
    files += [
        GLOBAL_FILE,
        home / ".pip" / "pip.conf",
        config_home / "pip" / "pip.conf",
        prefix / "pip.conf",
    ]
    return [*files, Path(named)] if named else files


def _read_file(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_CONFIG_BYTES)
    except OSError:
        return {}  # as pip does: a file that is not there or not ours says nothing
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise SourceError(
            f"pip's configuration in {path} cannot be read: {error}; check it with pip config list"
        ) from error
    settings: dict[str, str] = {}
    for section in _SECTIONS:
        if parser.has_section(section):
            settings |= {_normal(key): value for key, value in parser.items(section)}
    return settings


def _normal(key: str) -> str:
    return key.lower().replace("_", "-")
