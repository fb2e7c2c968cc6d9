"""What the tests of the packages share: what is built, and Debian systems to try it on.

Where something for them is missing they are skipped, and fail if PACKAGES_REQUIRED is set,
as it is by .ci/run. What the host's kernel refuses is skipped in any case, with the reason.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.packaging.machines import (
    ROOT,
    SYSTEMD,
    Machine,
    Missing,
    NotPermitted,
    debian,
    inside,
    run,
)

DIST = ROOT / "dist"
REQUIRED = "PACKAGES_REQUIRED"  # no OLLAMAD_…: the systems see it, and it would be a setting


def lacking(reason: str) -> NoReturn:
    """End a test for which something is missing."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason} ({REQUIRED} is set)")
    pytest.skip(reason)


def copy_of_debian(root: Path, name: str, *packages: str) -> None:
    """A root file system of the test's own; the test ends where there cannot be one."""
    try:
        run("cp", "-a", debian(name, *packages), root)
    except NotPermitted as reason:
        pytest.skip(str(reason))
    except Missing as reason:
        lacking(str(reason))


@pytest.fixture(scope="session")
def binary() -> Path:
    """The program in one file."""
    path = DIST / "ollamad"
    if not path.exists():
        lacking("dist/ollamad is not there: make binary")
    return path


@pytest.fixture(scope="session")
def package() -> Path:
    """The package for this machine."""
    found = sorted(DIST.glob("ollamad_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        lacking("dist/ has no package: make deb")
    return found[-1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, binary: Path) -> Iterator[Path]:
    """The smallest Debian, with nothing but the one file by both names: no Python, no systemd."""
    root = tmp_path_factory.mktemp("bare") / "root"
    copy_of_debian(root, "minbase")
    tried = inside(root, "true")
    if tried.returncode:
        pytest.skip(f"systemd-nspawn: {tried.stderr.strip()[-300:]}")
    programs = root / "usr/local/bin"
    shutil.copy(binary, programs / "ollamad")
    (programs / "ollama-dist").symlink_to("ollamad")
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted Debian of the module's own, without the package."""
    root = tmp_path_factory.mktemp("machine") / "root"
    machine = Machine(root)
    copy_of_debian(root, "systemd", *SYSTEMD)
    try:
        # Or it asks at its first start.
        (root / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")
        machine.boot()
        yield machine
    except NotPermitted as reason:
        pytest.skip(str(reason))
    finally:
        machine.close()
        shutil.rmtree(root, ignore_errors=True)
