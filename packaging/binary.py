"""Builds `dist/ollamad`, the program in one file, and its list of parts: python packaging/binary.py

PyInstaller makes a folder of it, in an environment of its own under `build/`; the folder is packed
behind a small shell script that unpacks it once and starts it (see docs/packaging.md for what else
was tried). The Debian package takes the folder as it is.

SOURCE_DATE_EPOCH, by default the time of the commit, is the time of all files.
"""

import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from parts import complete

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "binary"
DIST = ROOT / "dist"
FOLDER = BUILD / "folder" / "ollamad"
FREEZER = ("pyinstaller==6.22.3", "pyinstaller-hooks-contrib==2026.9")
LISTER = "cyclonedx-bom==7.5.0"


def main() -> None:
    environment = os.environ | {"SOURCE_DATE_EPOCH": epoch(), "PYTHONHASHSEED": "0"}
    shutil.rmtree(BUILD, ignore_errors=True)
    python, tools = environments(environment)
    run(
        environment,
        tools / "cyclonedx-py",
        *("environment", python, "--pyproject", "pyproject.toml", "--mc-type", "application"),
        *("--of", "JSON", "--output-reproducible", "-o", BUILD / "sbom.json"),
    )
    run(
        environment,
        python.parent / "pyinstaller",
        *("--log-level", "WARN", "--noconfirm", "packaging/ollamad.spec"),
        *("--distpath", FOLDER.parent, "--workpath", BUILD / "work"),
    )
    (packages,) = (BUILD / "venv" / "lib").glob("python3.*/site-packages")
    complete(BUILD / "sbom.json", BUILD / "work" / "ollamad", packages)
    (FOLDER / "ollama-dist").symlink_to("ollamad")
    DIST.mkdir(exist_ok=True)
    target = DIST / "ollamad"
    pack(target, int(environment["SOURCE_DATE_EPOCH"]))
    shutil.copy(BUILD / "sbom.json", DIST / "ollamad.cdx.json")
    link = DIST / "ollama-dist"
    link.unlink(missing_ok=True)
    link.symlink_to("ollamad")
    size = target.stat().st_size
    print(f"{target.relative_to(ROOT)}: {size / 1e6:.0f} MB, sha256 {sha256(target)}")


def epoch() -> str:
    """When this source was made, in Unix seconds."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "0"


def environments(environment: dict[str, str]) -> tuple[Path, Path]:
    """One with the program, its dependencies and PyInstaller; and where the tools are."""
    python = BUILD / "venv" / "bin" / "python"
    tools = BUILD / "tools" / "bin"
    for directory in (python.parent.parent, tools.parent):
        run(environment, sys.executable, "-m", "venv", directory)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(environment, python, *pip, "--constraint", "constraints.txt", ROOT, *FREEZER)
    run(environment, tools / "python", *pip, LISTER)
    return python, tools


def pack(target: Path, moment: int) -> None:
    """The folder, packed behind the script that unpacks it."""
    packed = BUILD / "folder.tar.gz"
    with (
        open(packed, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in sorted(FOLDER.rglob("*")):
            member = tar.gettarinfo(path, str(path.relative_to(FOLDER)))
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.mode = 0o755 if path.is_dir() or member.mode & 0o100 else 0o644
            if member.isfile():
                with open(path, "rb") as content:
                    tar.addfile(member, content)
            else:
                tar.addfile(member)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    script = (ROOT / "packaging" / "unpack.sh").read_text()
    values = {
        "VERSION": version(),
        "MACHINE": platform.machine(),
        "ID": sha256(packed)[:16],
        "MEGABYTES": str(size // 1_000_000 + 1),
    }
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    # The offset counts itself; it has always the same number of digits.
    shorter = len("@OFFSET@") - len("00000")
    offset = len(script) - shorter * script.count("@OFFSET@") + 1
    script = script.replace("@OFFSET@", f"{offset:05}")
    with open(target, "wb") as file:
        file.write(script.encode())
        with open(packed, "rb") as content:
            shutil.copyfileobj(content, file)
    target.chmod(0o755)


def version() -> str:
    """The version in `ollamad/__init__.py`."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "ollamad" / "__init__.py").read_text())
    assert found is not None
    return found[1]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(environment: dict[str, str], *command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
