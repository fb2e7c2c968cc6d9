"""The Debian package: what is in it, and its way through a machine's life: `make deb`, then this.

The tests of the machine build on one another, in their order: install, upgrade, remove, purge.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.packaging.conftest import lacking
from tests.packaging.machines import ROOT, Machine, run

PREVIOUS_VERSION = "0.0.9"
OTHER_NODES = (2, 3)  # of the cluster, beside the package's; from the one file, like from a user
LINTIAN_LIMIT_S = 300
SETTINGS = "# An administrator's own.\nrate_limits:\n  general: 1234\n"


def test_lintian_has_nothing_to_say(package: Path) -> None:
    if shutil.which("lintian") is None:
        lacking("lintian is not installed")
    done = subprocess.run(
        ["lintian", "--allow-root", "--display-info", "--tag-display-limit=0", package],
        capture_output=True,
        text=True,
        check=False,
        timeout=LINTIAN_LIMIT_S,
    )
    tags = [line for line in done.stdout.splitlines() if not line.startswith("N:")]
    assert tags == []
    assert done.returncode == 0, done.stderr


def test_each_override_of_lintian_has_a_reason() -> None:
    lines = (ROOT / "packaging/debian/ollamad.lintian-overrides").read_text().splitlines()
    reasoned = False
    for line in lines:
        if line.startswith("#"):
            reasoned = len(line) > 20
        elif line:
            assert reasoned, f"no reason: {line}"
        else:
            reasoned = False


def test_what_the_package_says_of_itself(package: Path) -> None:
    told = run("dpkg-deb", "--field", package)
    assert re.search(r"^Package: ollamad$", told, re.M)
    assert re.search(r"^Depends:.*\blibc6 \(>= 2\.", told, re.M)
    assert re.search(r"^Depends:.*\bca-certificates\b", told, re.M)
    source = (ROOT / "packaging/debian/control").read_text()
    assert re.search(r"^Architecture: amd64 arm64$", source, re.M)
    conffiles = run("dpkg-deb", "--info", package, "conffiles").split()
    assert conffiles == ["/etc/default/ollamad", "/etc/ollamad/config.yaml"]


def test_the_documents_that_it_names_are_in_it(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--extract", package, tmp_path)
    naming = ("lib/systemd/system/ollamad.service", "etc/ollamad/config.yaml")
    naming += ("usr/share/doc/ollamad/copyright",)
    for name in naming:
        named = re.findall(r"/(usr/share/doc/ollamad/[\w.-]+\w)", (tmp_path / name).read_text())
        assert named, name
        for path in named:
            assert (tmp_path / path).is_file(), f"{name}: {path}"


@pytest.fixture(scope="module")
def previous(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the release before: OLLAMAD_PREVIOUS_DEB, else this one with an older number.

    The latter has another default configuration, and a file that is not in this one any more.
    """
    if given := os.environ.get("OLLAMAD_PREVIOUS_DEB"):
        return Path(given)
    root = tmp_path_factory.mktemp("previous") / "root"
    run("dpkg-deb", "--raw-extract", package, root)
    control = root / "DEBIAN/control"
    control.write_text(
        re.sub(r"^Version: .+$", f"Version: {PREVIOUS_VERSION}", control.read_text(), flags=re.M)
    )
    (root / "etc/ollamad/config.yaml").write_text("# As it was.\n")
    (root / "etc/default/ollamad").write_text("# As it was.\n")
    (root / "etc/default/ollamad").chmod(0o644)  # as in 0.1.0
    (root / "usr/lib/ollamad/_internal/gone").write_text("")
    target = root.with_suffix(".deb")
    run("dpkg-deb", "--build", "-Znone", "--root-owner-group", root, target)
    shutil.rmtree(root)
    return target


def status(machine: Machine) -> str:
    """The text that the service shows; empty unless it is active."""
    return machine.property("StatusText") if machine.property("ActiveState") == "active" else ""


def wait_nodes(machine: Machine, number: int) -> None:
    machine.wait(f"{number} nodes", lambda: f"{number} of {number}" in status(machine))


def installed_version(machine: Machine) -> str:
    return machine.call("dpkg-query", "--show", "--showformat=${Version}", "ollamad")


def test_it_installs_a_service_that_runs(machine: Machine, previous: Path, package: Path) -> None:
    shutil.copy(previous, machine.root / "previous.deb")
    shutil.copy(package, machine.root / "ollamad.deb")
    machine.call("dpkg", "--install", "/previous.deb")
    wait_nodes(machine, 1)
    user = machine.call("getent", "passwd", "ollamad").strip().split(":")
    assert 0 < int(user[2]) < 1000, "a system user"
    assert user[5] == "/var/lib/ollamad"
    assert user[6].endswith("nologin")
    state = machine.call("stat", "--format=%U %a", "/var/lib/ollamad").strip()
    assert state == "ollamad 700"
    assert machine.call("systemctl", "is-enabled", "ollamad").strip() == "enabled"
    assert re.search(r"Nodes +1 of 1 online", machine.call("ollama-dist", "status"))
    groups = machine.call("id", "-nG", "ollamad").split()
    assert {"video", "render"} <= set(groups), "GPUs belong to them"


def test_an_upgrade_keeps_a_cluster_that_runs(
    machine: Machine, binary: Path, package: Path
) -> None:
    """The package's node is upgraded, while the others see their cluster work all the time."""
    shutil.copy(binary, machine.root / "opt/ollamad")
    told = machine.call("ollama-dist", "cluster", "token")
    invitation = told.partition("--join ")[2].split()[0]
    for number in OTHER_NODES:
        machine.call(
            *("systemd-run", "--quiet", f"--unit=node{number}"),
            *("--setenv=OLLAMAD_UNPACK_DIR=/opt/unpacked", f"--setenv=NODE_ID=node{number}"),
            f"--setenv=API_LISTEN=127.0.0.1:808{number}",
            f"--setenv=P2P_LISTEN=127.0.0.1:900{number}",
            f"--setenv=RAFT_BIND_ADDR=127.0.0.1:700{number}",
            "--setenv=OLLAMAD_API__OLLAMA_LISTEN=off",
            *("/opt/ollamad", "start", "--data-dir", f"/opt/node{number}"),
            *("--join", invitation),
        )
        wait_nodes(machine, number)
    (machine.root / "etc/ollamad/config.yaml").write_text(SETTINGS)
    before = machine.property("MainPID")
    with Asking(machine) as asking:
        machine.call("dpkg", "--install", "--force-confdef", "--force-confold", "/ollamad.deb")
        wait_nodes(machine, 3)
    assert machine.property("MainPID") != before
    assert installed_version(machine) in package.name
    assert asking.answers >= 3, "it was asked all the time"
    assert asking.failures == []
    assert (machine.root / "etc/ollamad/config.yaml").read_text() == SETTINGS
    # What nobody has changed is the new version's.
    assert "As it was" not in (machine.root / "etc/default/ollamad").read_text()
    assert not (machine.root / "usr/lib/ollamad/_internal/gone").exists()
    tokens = machine.call("stat", "--format=%U %G %a", "/etc/default/ollamad").strip()
    assert tokens == "root root 640", "tokens and keys may be in it"
    assert not machine.call("journalctl", "-u", "ollamad", "--grep=Traceback", fails=True).count(
        "Traceback"
    )


def test_a_version_back_and_forth_again(machine: Machine) -> None:
    """As long as nothing was used that the older one does not know."""
    for name in ("previous", "ollamad"):
        machine.call("dpkg", "--install", "--force-confold", f"/{name}.deb")
        wait_nodes(machine, 3)
    assert (machine.root / "etc/ollamad/config.yaml").read_text() == SETTINGS


class Asking:
    """Asks another node of the cluster again and again, with reads that need a majority."""

    def __init__(self, machine: Machine) -> None:
        script = (
            "while [ ! -e /stop ]; do"
            " if ollama-dist --host 127.0.0.1:8082 models list >/answer 2>&1;"
            " then echo ok; else cat /answer; fi; sleep 0.1; done"
        )
        self._machine = machine
        self._script = script
        self.answers = 0
        self.failures: list[str] = []

    def __enter__(self) -> "Asking":
        # By the one file: the package's own command is away for a moment.
        (self._machine.root / "opt/ollama-dist").symlink_to("ollamad")
        script = self._script.replace("ollama-dist", "/opt/ollama-dist")
        self._process = subprocess.Popen(
            self._machine.command("env", "OLLAMAD_UNPACK_DIR=/opt/unpacked", "sh", "-c", script),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        (self._machine.root / "stop").touch()
        told, _ = self._process.communicate(timeout=30)
        (self._machine.root / "stop").unlink()
        lines = told.splitlines()
        self.answers = lines.count("ok")
        self.failures = [line for line in lines if line != "ok"]


def test_the_manual_has_every_command(machine: Machine) -> None:
    for program in ("ollamad", "ollama-dist"):
        page = machine.call("env", "MANWIDTH=100", "man", program)
        assert "SYNOPSIS" in page
        help_text = machine.call(program, "--help")
        for command in re.findall(r"^  ([a-z]+)  +\S", help_text.split("Commands:")[1], re.M):
            assert re.search(rf"\b{command}\b", page), f"{program} {command}"
    warnings = machine.call(
        "sh", "-c", "man --warnings -l /usr/share/man/man1/ollama*.1.gz 2>&1 >/dev/null"
    )
    assert warnings == ""


@pytest.mark.parametrize(
    ("words", "whole"), [("ollama-dist models im", "import"), ("ollamad backup --li", "--live")]
)
def test_shells_complete(machine: Machine, words: str, whole: str) -> None:
    program = words.split()[0]
    fish = machine.call("fish", "-c", f"complete -C '{words}'")
    assert whole in fish
    bash = machine.call(
        "bash",
        "-c",
        f"""
        . /usr/share/bash-completion/bash_completion
        _completion_loader {program}
        COMP_WORDS=({words}) COMP_CWORD=2
        $(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {program}
        echo "${{COMPREPLY[@]}}"
        """,
    )
    assert bash.split() == [whole]
    zsh = machine.call(
        "zsh",
        "-fc",
        f"""
        autoload -U compinit && compinit -u
        print -r -- $_comps[{program}]
        zsh -n /usr/share/zsh/vendor-completions/_{program} && print fine
        # Outside of a line that is edited nothing can be completed: what would be is shown.
        _arguments() {{ print -r -- "$@" }}
        words=({words}) CURRENT=3
        . /usr/share/zsh/vendor-completions/_{program}
        """,
    )
    assert zsh.split()[:2] == [f"_{program}", "fine"]
    assert f'"{whole}"' in zsh


def test_removing_keeps_what_is_there(machine: Machine) -> None:
    machine.call("dpkg", "--remove", "ollamad")
    assert not (machine.root / "usr/bin/ollamad").is_symlink()
    assert not (machine.root / "usr/lib/ollamad").exists()
    assert not machine.call("pgrep", "-u", "ollamad", fails=True).strip()
    assert (machine.root / "var/lib/ollamad/raft.db").exists()
    assert (machine.root / "etc/ollamad/config.yaml").read_text() == SETTINGS


def test_installing_again_goes_on_where_it_was(machine: Machine) -> None:
    machine.call("dpkg", "--install", "/ollamad.deb")
    wait_nodes(machine, 3)


def test_purging_leaves_nothing(machine: Machine) -> None:
    machine.call("dpkg", "--purge", "ollamad")
    for path in ("var/lib/ollamad", "etc/ollamad", "var/cache/ollamad", "etc/default/ollamad"):
        assert not (machine.root / path).exists(), path
    assert "ollamad.service" not in machine.call("systemctl", "list-unit-files", "--no-pager")
    machine.call("dpkg", "--purge", "ollamad", fails=True)  # again: nothing to do, no harm


def test_purging_says_what_a_link_leaves(machine: Machine) -> None:
    models = machine.root / "big/models"
    models.mkdir(parents=True)
    (models / "of-somebody").touch()
    (machine.root / "var/lib/ollamad").symlink_to("/big")
    machine.call("systemctl", "mask", "ollamad")  # it is not to start
    machine.call("dpkg", "--install", "/ollamad.deb")
    told = machine.call("dpkg", "--purge", "ollamad")
    assert "/var/lib/ollamad was a link; what is in /big stays" in told
    assert not (machine.root / "var/lib/ollamad").is_symlink()
    assert (models / "of-somebody").exists()
