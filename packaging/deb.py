"""Builds the Debian package of what `packaging/binary.py` has built: python packaging/deb.py

The package holds the folder, not the one file: nothing has to be unpacked at the first start, and
the service needs no place to do it. On another architecture the same two commands make its
package; there is nothing here that depends on it.
"""

import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from binary import BUILD, DIST, FOLDER, ROOT, epoch, version

WORK = ROOT / "build" / "deb"
PROGRAMS = ("ollamad", "ollama-dist")
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/{}",
    "zsh": "usr/share/zsh/vendor-completions/_{}",
    "fish": "usr/share/fish/vendor_completions.d/{}.fish",
}


def main() -> None:
    number = version()
    source = WORK / f"ollamad-{number}"
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(ROOT / "packaging" / "debian", source / "debian")
    (source / "debian" / "changelog").write_text(changelog(number))
    (source / "debian" / "rules").chmod(0o755)
    shutil.copy(ROOT / "ollamad.service", source / "debian" / "ollamad.service")
    fill(source / "root", number)
    # A checkout's files have the times of the checkout.
    for path in source.rglob("*"):
        os.utime(path, (int(epoch()), int(epoch())), follow_symlinks=False)
    subprocess.run(
        ["dpkg-buildpackage", "--build=binary", "--no-sign"],
        cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch(), "GLIBC": glibc()},
        check=True,
    )
    DIST.mkdir(exist_ok=True)
    for package in WORK.glob("ollamad_*.deb"):
        shutil.copy(package, DIST)
        print(f"dist/{package.name}: {package.stat().st_size / 1e6:.0f} MB")


def fill(root: Path, number: str) -> None:
    """Everything that the package installs, under `root`."""
    shutil.copytree(FOLDER, root / "usr/lib/ollamad", symlinks=True)
    for library in (root / "usr/lib/ollamad/_internal").rglob("*.so*"):
        library.chmod(0o644)
    programs = root / "usr/bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).symlink_to(f"../lib/ollamad/{name}")
    settings = root / "etc"
    (settings / "ollamad").mkdir(parents=True)
    shutil.copy(ROOT / "packaging/config.yaml", settings / "ollamad/config.yaml")
    (settings / "default").mkdir()
    shutil.copy(ROOT / "packaging/default", settings / "default/ollamad")
    docs = root / "usr/share/doc/ollamad"
    docs.mkdir(parents=True)
    for path in (ROOT / "README.md", ROOT / "docs/operations.md", DIST / "ollamad.cdx.json"):
        shutil.copy(path, docs)
    python = BUILD / "venv/bin/python"
    subprocess.run(
        [python, ROOT / "packaging/manpages.py", number, root / "usr/share/man/man1"],
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch()},
        check=True,
    )
    for shell, pattern in COMPLETIONS.items():
        for name in PROGRAMS:
            path = root / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(completion(FOLDER / name, shell))


def completion(program: Path, shell: str) -> str:
    """The script with which a shell completes that program."""
    function = f"_{program.name.replace('-', '_')}"
    variable = f"{function.upper()}_COMPLETE"
    script = subprocess.run(
        [program],
        env={variable: f"source_{shell}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,  # Typer ends with 1 after a script
    ).stdout
    assert variable in script, f"no completion of {program.name} for {shell}"
    if shell == "zsh":  # the key press that loads the file wants an answer too
        script += f'\n{function}_completion "$@"'
    return f"{script.strip()}\n"


def glibc() -> str:
    """The oldest version of glibc that everything inside runs with, by the symbols it asks for."""
    found = {
        (int(major), int(minor))
        for path in FOLDER.rglob("*")
        if path.is_file() and (path.name == "ollamad" or ".so" in path.name)
        for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)\b", path.read_bytes())
    }
    return "{}.{}".format(*max(found))


def changelog(number: str) -> str:
    moment = format_datetime(datetime.fromtimestamp(int(epoch()), UTC))
    return (
        f"ollamad ({number}) stable; urgency=medium\n\n"
        "  * See CHANGELOG.md of the project.\n\n"
        f" -- Ollama Distributed <maintainers@ollama-distributed.invalid>  {moment}\n"
    )


if __name__ == "__main__":
    main()
