"""What the tests of the packages share: what is built, and Debian systems to try it on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.machines import ROOT, SYSTEMD, Machine, NotPermitted, debian, inside, run

DIST = ROOT / "dist"


@pytest.fixture(scope="session")
def binary() -> Path:
    """The program in one file."""
    path = DIST / "ollamad"
    if not path.exists():
        pytest.skip("dist/ollamad is not there: make binary")
    return path


@pytest.fixture(scope="session")
def package() -> Path:
    """The package for this machine."""
    found = sorted(DIST.glob("ollamad_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("dist/ has no package: make deb")
    return found[-1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, binary: Path) -> Iterator[Path]:
    """The smallest Debian, with nothing but the one file by both names: no Python, no systemd."""
    root = tmp_path_factory.mktemp("bare") / "root"
    try:
        run("cp", "-a", debian("minbase"), root)
    except NotPermitted as reason:
        pytest.skip(str(reason))
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
    try:
        run("cp", "-a", debian("systemd", *SYSTEMD), root)
        # Or it asks at its first start.
        (root / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")
        machine.boot()
        yield machine
    except NotPermitted as reason:
        pytest.skip(str(reason))
    finally:
        machine.close()
        shutil.rmtree(root, ignore_errors=True)
