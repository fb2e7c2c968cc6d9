"""The file and the package on Debian systems with nothing else on them: `make packagetest`.

Needs root, debootstrap, systemd-container, and what `make deb` has put into dist/. Each system is
a copy of one that debootstrap makes once, in `.cache/`; one of them is booted.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BINARY = ROOT / "dist" / "ollamad"
BASE = ROOT / ".cache" / "bookworm"
BOOT_LIMIT_S = 60.0
MAX_SIZE = 150_000_000


def packages() -> list[Path]:
    return sorted((ROOT / "dist").glob("ollamad_*.deb"))


def missing() -> str:
    """Why these tests cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "only root makes root file systems"
    for tool in ("debootstrap", "systemd-nspawn"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return "" if BINARY.exists() and packages() else "dist/ is empty: make deb"


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


def run(*command: str | Path, **more: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


def mirror() -> str:
    """Where this host gets its Debian packages."""
    for path in (*Path("/etc/apt/sources.list.d").glob("*"), Path("/etc/apt/sources.list")):
        if path.is_file() and (found := re.search(r"https?://\S+/debian\b", path.read_text())):
            return found[0]
    return "http://deb.debian.org/debian"


def debian(name: str, *more: str) -> Path:
    """A root file system with these packages, made once."""
    path = BASE.with_name(f"{BASE.name}-{name}")
    if not (path / "etc/debian_version").exists():
        shutil.rmtree(path, ignore_errors=True)
        including = [f"--include={','.join(more)}"] if more else []
        run("debootstrap", "--variant=minbase", *including, "bookworm", path, mirror())
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    """The smallest Debian: no Python, no systemd."""
    root = tmp_path / "bare"
    run("cp", "-a", "--reflink=auto", debian("bare"), root)
    yield root
    shutil.rmtree(root)


def test_the_one_file_runs_where_no_python_is(bare: Path) -> None:
    assert not (bare / "usr/bin/python3").exists()
    assert BINARY.stat().st_size <= MAX_SIZE
    shutil.copy(BINARY, bare / "usr/local/bin/ollamad")
    (bare / "usr/local/bin/ollama-dist").symlink_to("ollamad")
    told = run("chroot", bare, "ollamad", "version")
    assert re.search(r"^ollamad [\d.]+ \(commit [0-9a-f]{12}, built \d{4}-", told), told
    assert "xllamacpp" in told
    assert "Commands" in run("chroot", bare, "ollama-dist", "--help")
    unpacked = list((bare / "var/cache/ollamad").iterdir())
    assert len(unpacked) == 1, "one version is unpacked once"
    assert unpacked[0].stat().st_mode & 0o077 == 0
    # A runner is the program itself.
    refused = subprocess.run(
        ["chroot", bare, "ollamad", "runner", "--help"], capture_output=True, text=True, check=False
    )
    assert "--model" in refused.stdout + refused.stderr


def test_a_full_disk_leaves_nothing_half_unpacked(bare: Path, tmp_path: Path) -> None:
    shutil.copy(BINARY, bare / "usr/local/bin/ollamad")
    small = bare / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small)
    try:
        failed = subprocess.run(
            ["chroot", bare, "env", "OLLAMAD_UNPACK_DIR=/small", "ollamad", "version"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert failed.returncode == 1
        assert "free" in failed.stderr
        assert "OLLAMAD_UNPACK_DIR" in failed.stderr
        assert list(small.iterdir()) == []
    finally:
        run("umount", small)


def test_the_list_of_parts_names_them_with_versions_and_licences() -> None:
    parts = json.loads((ROOT / "dist" / "ollamad.cdx.json").read_text())
    assert parts["bomFormat"] == "CycloneDX"
    by_name = {part["name"]: part for part in parts["components"]}
    for name in ("trio", "hypercorn", "pysyncobj", "xllamacpp", "msgspec", "cryptography"):
        assert by_name[name]["version"]
    assert by_name["trio"]["licenses"]


class Machine:
    """A Debian with systemd that runs in a container, with the package installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"ollamad-test-{os.getpid()}"
        self.process: subprocess.Popen[str] | None = None

    def boot(self) -> None:
        self.process = subprocess.Popen(
            [
                *("systemd-nspawn", "-q", "-D", self.root, "--register=no", "--keep-unit"),
                *("--private-network", f"--machine={self.name}", "--console=pipe", "-b"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        limit = time.monotonic() + BOOT_LIMIT_S
        while "running" not in (state := self.call("systemctl", "is-system-running", fails=True)):
            if "degraded" in state:
                break
            assert time.monotonic() < limit, f"it did not boot: {state}"
            time.sleep(0.3)

    def leader(self) -> str:
        """The pid of the container's first process."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return children.split()[0] if children.split() else ""

    def call(self, *command: str, fails: bool = False) -> str:
        """Run a command inside, and give what it prints."""
        inside = ["nsenter", "--all", "--target", self.leader() or "1", "--", *command]
        if not self.leader():
            return ""
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert fails or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def wait(self, what: str, *command: str, shows: str, limit_s: float = 40.0) -> str:
        limit = time.monotonic() + limit_s
        while shows not in (told := self.call(*command, fails=True)):
            if time.monotonic() > limit:
                log = self.call("journalctl", "-u", "ollamad", "--no-pager", "-n", "40", fails=True)
                raise AssertionError(f"{what}: {told}\n{log}")
            time.sleep(0.2)
        return told

    def property(self, name: str) -> str:
        return self.call("systemctl", "show", "ollamad", f"--property={name}", "--value").strip()

    def close(self) -> None:
        if self.process is not None:
            leader = self.leader()
            if leader:
                subprocess.run(["kill", "-SIGRTMIN+4", leader], check=False)  # power off
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = tmp_path_factory.mktemp("boot") / "root"
    made = debian("systemd", "systemd-sysv", "dbus", "ca-certificates", "adduser", "procps")
    run("cp", "-a", "--reflink=auto", made, root)
    shutil.copy(packages()[-1], root / "ollamad.deb")
    machine = Machine(root)
    try:
        machine.boot()
        yield machine
    finally:
        machine.close()
        shutil.rmtree(root)


def test_the_package_installs_a_service_that_runs(machine: Machine) -> None:
    machine.call("dpkg", "--install", "/ollamad.deb")
    machine.wait("active", "systemctl", "is-active", "ollamad", shows="active")
    machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="leader; 1 of 1")
    assert "ollamad" in machine.call("ps", "-o", "user=", "-p", machine.property("MainPID"))
    health = machine.call("ollama-dist", "status")
    assert "healthy" in health or "leader" in health, health
    for path in ("/usr/share/man/man1/ollamad.1.gz", "/etc/ollamad/config.yaml"):
        assert (machine.root / path.lstrip("/")).exists()


def test_a_crash_and_a_loop_that_stands_still_are_followed_by_a_restart(machine: Machine) -> None:
    machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="leader; 1 of 1")
    for signal in ("SIGKILL", "SIGSTOP"):  # a stopped process feeds no watchdog
        before = machine.property("MainPID")
        if signal == "SIGSTOP":
            drop_in = machine.root / "run/systemd/system/ollamad.service.d"
            drop_in.mkdir(parents=True, exist_ok=True)
            (drop_in / "soon.conf").write_text("[Service]\nWatchdogSec=4\n")
            machine.call("systemctl", "daemon-reload")
            machine.call("systemctl", "restart", "ollamad")
            before = machine.property("MainPID")
        machine.call("kill", f"-{signal}", before)
        limit = time.monotonic() + 60
        while machine.property("MainPID") in ("0", before):
            assert time.monotonic() < limit, f"it was not started again after {signal}"
            time.sleep(0.2)
        machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="1 of 1")


def test_reload_and_stop(machine: Machine) -> None:
    machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="leader; 1 of 1")
    (machine.root / "etc/ollamad/config.yaml").write_text("rate_limits:\n  general: 77\n")
    machine.call("systemctl", "reload", "ollamad")
    machine.wait(
        "reloaded", "journalctl", "-u", "ollamad", "--no-pager", shows="rate_limits.general is 77"
    )
    begun = time.monotonic()
    machine.call("systemctl", "stop", "ollamad")
    assert time.monotonic() - begun < 10
    assert machine.property("Result") == "success"


def test_the_sandbox_is_strict(machine: Machine) -> None:
    told = machine.call("systemd-analyze", "security", "ollamad", "--no-pager", fails=True)
    level = re.search(r"Overall exposure level for ollamad.service: ([\d.]+)", told)
    assert level is not None, told
    assert float(level[1]) <= 2.0
    assert "ollamad.service" not in machine.call(
        "systemd-analyze", "verify", "ollamad.service", fails=True
    )


def test_removing_keeps_what_is_there_and_purging_does_not(machine: Machine) -> None:
    machine.call("systemctl", "start", "ollamad")
    machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="leader; 1 of 1")
    machine.call("dpkg", "--install", "/ollamad.deb")  # as an upgrade does
    machine.wait("ready", "systemctl", "status", "ollamad", "--no-pager", shows="leader; 1 of 1")
    machine.call("dpkg", "--remove", "ollamad")
    assert not (machine.root / "usr/bin/ollamad").is_symlink()
    assert (machine.root / "var/lib/ollamad/raft.db").exists()
    assert (machine.root / "etc/ollamad/config.yaml").exists()
    machine.call("dpkg", "--purge", "ollamad")
    for path in ("var/lib/ollamad", "etc/ollamad", "var/cache/ollamad"):
        assert not (machine.root / path).exists()
