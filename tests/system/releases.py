"""Runs daemons of other versions: the previous release as it was, and what could come."""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

RELEASES = Path(__file__).parent.parent / "data" / "releases"
OTHER_VERSION = Path(__file__).parent / "other_version"


def previous_release(directory: Path) -> dict[str, str]:
    """The environment in which a node runs the previous release, which is unpacked there."""
    [*archives] = sorted(
        RELEASES.glob("ollamad-*.tar.xz"), key=lambda path: _numbers(path.name.split("-")[1])
    )
    with tarfile.open(archives[-1]) as tar:
        tar.extractall(directory, filter="data")
    return {"PYTHONPATH": str(directory)}


def other_version(**numbers: object) -> dict[str, str]:
    """The environment in which a node is of a version with other numbers: see `other_version/`.

    Keys: version, protocol, oldest (`wire.mux`), level (`core.commands`), state (`machine`).
    """
    return {"PYTHONPATH": str(OTHER_VERSION), "OTHER_VERSION": json.dumps(numbers)}


def switch(environment: dict[str, str], to: Mapping[str, str]) -> None:
    """Have a node run another version at its next start; {} is the present one."""
    for key in ("PYTHONPATH", "OTHER_VERSION"):
        environment.pop(key, None)
    environment.update(to)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.removesuffix(".tar.xz").split("."))
