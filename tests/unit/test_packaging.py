"""What the recipes of the packages do that needs no Debian to try it on."""

import importlib
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from tests.packaging import machines
from tests.packaging.conftest import REQUIRED, copy_of_debian, lacking

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "packaging"


def recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of packaging/, which is no package: its files are run from there."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module(name)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in one file, like dist/ollamad, with a script of a line in it."""
    binary = recipe("binary", monkeypatch)
    folder = tmp_path / "build" / "folder"
    folder.mkdir(parents=True)
    script = folder / "ollamad"
    script.write_text('#!/bin/sh\necho "it runs, with $(cat "${0%/*}/part")"\n')
    script.chmod(0o755)
    (folder / "part").write_text("all of it")
    monkeypatch.setattr(binary, "BUILD", folder.parent)
    monkeypatch.setattr(binary, "FOLDER", folder)
    target = tmp_path / "ollamad"
    binary.pack(target, 0)
    return target


def start(program: Path, base: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", program],
        env={"OLLAMAD_UNPACK_DIR": str(base), "PATH": f"{path}/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def remnant(program: Path, base: Path) -> Path:
    """What a deletion that was cut off leaves of an unpacked program: not that it is complete."""
    assert start(program, base).stdout == "it runs, with all of it\n"
    (home,) = base.iterdir()
    (home / "complete").unlink()
    (home / "part").write_text("a part")
    return home


def test_what_a_deletion_has_left_is_replaced(program: Path, tmp_path: Path) -> None:
    base = tmp_path / "cache"
    home = remnant(program, base)
    done = start(program, base)
    assert (done.stdout, done.stderr) == ("it runs, with all of it\n", "")
    assert list(base.iterdir()) == [home], "nothing else is left"


def test_it_is_replaced_once_by_starts_at_the_same_time(program: Path, tmp_path: Path) -> None:
    base = tmp_path / "cache"
    home = remnant(program, base)
    done: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda: done.append(start(program, base))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(one.stdout, one.stderr) for one in done} == {("it runs, with all of it\n", "")}
    assert list(base.iterdir()) == [home]


def test_where_nothing_can_be_locked_it_says_what_to_delete(program: Path, tmp_path: Path) -> None:
    base = tmp_path / "cache"
    home = remnant(program, base)
    (tmp_path / "flock").write_text("#!/bin/sh\nexit 1\n")  # as of some network disks
    (tmp_path / "flock").chmod(0o755)
    done = start(program, base, f"{tmp_path}:")
    assert done.returncode == 1
    assert f"{home} is there in part and cannot be replaced; delete it" in done.stderr
    assert list(base.iterdir()) == [home]


def test_what_vanishes_while_it_looks_for_old_ones_is_no_failure(
    program: Path, tmp_path: Path
) -> None:
    """Another start puts its copy in place just then."""
    (tmp_path / "find").write_text("#!/bin/sh\necho 'find: No such file' >&2\nexit 1\n")
    (tmp_path / "find").chmod(0o755)
    done = start(program, tmp_path / "cache", f"{tmp_path}:")
    assert (done.stdout, done.stderr) == ("it runs, with all of it\n", "")


@pytest.mark.parametrize(
    ("head", "machine"),
    [
        (b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\x3e\0", 62),
        (b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\xb7\0", 183),
        (b"\x7fELF\2\2\1" + bytes(9) + b"\0\3\0\x16", 22),  # the other order of bytes
        (b"\x7fELF\2\1\1", None),
        (b"MZ" + bytes(100), None),
        (b"", None),
    ],
)
def test_libraries_of_other_machines_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes, machine: int | None
) -> None:
    elf = recipe("elf", monkeypatch)
    library = tmp_path / "library.so"
    library.write_bytes(head)
    assert elf.machine(library) == machine
    own = tmp_path / "python"
    own.write_bytes(b"\x7fELF\2\1\1" + bytes(9) + b"\2\0\xb7\0")
    monkeypatch.setattr("sys.executable", str(own))
    assert elf.is_for_this_machine(library) == (machine == 183)


def test_a_library_of_this_machine_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    elf = recipe("elf", monkeypatch)
    assert elf.is_for_this_machine(Path(importlib.import_module("_ctypes").__file__ or ""))
    assert "is_for_this_machine(" in (RECIPES / "ollamad.spec").read_text()


def test_a_part_has_the_texts_of_its_licences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = recipe("parts", monkeypatch)
    licences = tmp_path / "a_part-1.0.dist-info" / "licenses"
    licences.mkdir(parents=True)
    for name in ("LICENSE.MIT", "NOTICE", "METADATA"):
        (licences / name).write_text(f"text of {name}")
    ((name, info),) = parts.infos(tmp_path)
    assert name == "a_part"
    known = {"license": {"id": "MIT"}}
    part = {"name": name, "licenses": [], "evidence": {"licenses": [known]}}
    first, *texts = parts.with_texts(part, list(parts.licence_texts(info)))["evidence"]["licenses"]
    assert first == known
    assert [(one["license"]["name"], one["license"]["text"]["content"]) for one in texts] == [
        ("LICENSE.MIT", "text of LICENSE.MIT"),
        ("NOTICE", "text of NOTICE"),
    ]
    assert parts.with_texts(part, []) == part


def test_the_code_in_an_engine_has_its_licence_where_it_is_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = recipe("parts", monkeypatch)
    wheel = {"name": "ctransformers", "version": "0.2.27"}
    library = Path("/site-packages/ctransformers/lib/avx/libctransformers.so")
    (core,) = parts.with_core(wheel, {library})["components"]
    assert core["name"] == "ggml"
    (text,) = core["evidence"]["licenses"]
    assert "The ggml authors" in text["license"]["text"]["content"]
    assert parts.with_core(wheel, {library.with_suffix(".py")}) == wheel, "of another machine"


@pytest.mark.parametrize("name", ["ollamad", "ollama-dist"])
def test_each_program_tells_how_a_shell_completes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / name
    package = name.replace("-", "_")
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'cli')!r}]\n"
        f"from {package}.main import main\nmain()\n"
    )
    program.chmod(0o755)
    script = recipe("deb", monkeypatch).completion(program, "zsh")
    assert script.startswith(f"#compdef {name}\n")
    assert script.endswith(f'\n_{package}_completion "$@"\n')


# Which tests of the packages may be left out.

OUTCOMES = (pytest.skip.Exception, pytest.fail.Exception)


@pytest.mark.parametrize(
    ("fails", "said", "outcome"),
    [
        ("unshare", "unshare failed: Operation not permitted", pytest.skip.Exception),
        ("debootstrap", "E: Cannot install: mounted with noexec or nodev", pytest.skip.Exception),
        ("debootstrap", "E: Failed getting release file http://x/", pytest.skip.Exception),
        ("which", "debootstrap is not installed", pytest.fail.Exception),
    ],
)
def test_a_tool_that_is_missing_fails_ci_and_what_a_host_refuses_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    said: str,
    outcome: type[BaseException],
) -> None:
    def attempt(command: str, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], int(command == fails), "", said)

    monkeypatch.setattr(machines, "_attempt", attempt)
    monkeypatch.setattr(machines, "CACHE", tmp_path)
    monkeypatch.setattr(machines, "mirror", lambda: "http://deb.debian.org/debian")
    monkeypatch.setattr(machines, "_proxies", dict)
    monkeypatch.setattr("shutil.which", lambda tool: None if fails == "which" else tool)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    for required, expected in (("", pytest.skip.Exception), ("1", outcome)):
        monkeypatch.setenv(REQUIRED, required)
        with pytest.raises(OUTCOMES, match=said[:20]) as ended:
            copy_of_debian(tmp_path / "root", "minbase")
        assert ended.type is expected


def test_what_was_not_built_fails_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(OUTCOMES, match="make deb") as ended:
        lacking("dist/ has no package: make deb")
    assert ended.type is pytest.fail.Exception
    assert f"export {REQUIRED}=1" in (ROOT / ".ci/run").read_text()
