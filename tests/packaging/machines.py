"""Debian systems in directories, and one of them booted, for the tests of the packages.

`debian` makes a root file system once, in `.cache/`; tests work on copies. Nothing here knows what
is installed there. Whatever this host does not permit raises `NotPermitted` with the reason, and
what it only lacks `Missing`.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
RELEASE = "bookworm"
DEBOOTSTRAP_TRIES = 3  # a mirror that is interrupted once is no reason to give up
BOOT_LIMIT_S = 60.0
HALT_LIMIT_S = 30.0
CALL_LIMIT_S = 120.0
INSTALL_LIMIT_S = 600.0  # over a slow line
# What is booted, with shells and the manual to try the package's parts for them.
SYSTEMD = ("systemd-sysv", "dbus", "ca-certificates", "procps")
SYSTEMD += ("bash-completion", "zsh", "fish", "man-db")
HALT = signal.SIGRTMIN + 4  # to systemd as the first process: power off
CGROUPS = Path("/sys/fs/cgroup")
GROUP = f"ollamad-test-{os.getpid()}"  # everything in containers is in there


class NotPermitted(Exception):
    """This host cannot do what is needed, whatever is installed; says why."""


class Missing(Exception):
    """A tool that a host can have is not installed; says which."""


def run(*command: str | Path, **more: Any) -> str:
    """What a command prints; it must succeed."""
    more.setdefault("timeout", CALL_LIMIT_S)
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return str(done.stdout)


def debian(name: str, *more: str) -> Path:
    """A minimal root file system, with these packages on top of it; made once.

    Raises:
      NotPermitted: it cannot be made here: no root, the kernel refuses, or the mirror does.
      Missing: the tools are not installed.
    """
    if os.geteuid() != 0:
        raise NotPermitted("only root makes root file systems")
    for tool in ("debootstrap", "systemd-nspawn"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed")
    tried = _attempt("unshare", "--mount", "true")
    if tried.returncode:
        raise NotPermitted(f"the kernel refuses mounts here: {tried.stderr.strip()}")
    path = CACHE / f"{RELEASE}-{name}"
    if not path.exists():
        # A directory that has the name is complete; another run may be making it as well.
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{RELEASE}-", dir=CACHE) as directory:
            root = Path(directory) / "root"
            if more:
                run("cp", "-a", debian("minbase"), root)
                _add(root, more)
            else:
                _debootstrap(root)
            if not path.exists():
                root.rename(path)
    return path


def _debootstrap(root: Path) -> None:
    for left in reversed(range(DEBOOTSTRAP_TRIES)):
        done = _attempt(
            *("debootstrap", "--variant=minbase", RELEASE, root, mirror()),
            env=os.environ | _proxies(),
        )
        if done.returncode == 0:
            return
        shutil.rmtree(root, ignore_errors=True)
        last = " ".join((done.stdout + done.stderr).strip().splitlines()[-1:])
        if "noexec or nodev" in last:
            raise NotPermitted(f"no devices can be made here: {last}")
        if not left:
            raise NotPermitted(f"debootstrap from {mirror()} failed: {last}")


def _attempt(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def _add(root: Path, packages: tuple[str, ...]) -> None:
    """Install packages there, by its own apt, the way that this host gets them."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    inside = ("chroot", root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq")
    more: dict[str, Any] = {"env": os.environ | _proxies(), "timeout": INSTALL_LIMIT_S}
    run(*inside, "update", **more)
    run(*inside, "install", "--yes", "--no-install-recommends", *packages, **more)
    run(*inside, "clean")


def mirror() -> str:
    """Where this host gets its Debian packages."""
    for path in (*Path("/etc/apt/sources.list.d").glob("*"), Path("/etc/apt/sources.list")):
        # The archive's main part; its security updates alone make no system.
        if path.is_file() and (
            found := re.search(r"https?://\S+/debian/?(?=\s)", path.read_text())
        ):
            return found[0]
    return "http://deb.debian.org/debian"


def _proxies() -> dict[str, str]:
    """The proxies of this host's apt, as variables."""
    proxies = {}
    for scheme in ("http", "https"):
        told = run("apt-config", "shell", "proxy", f"Acquire::{scheme}::Proxy")
        if found := re.search(r"'(.+)'", told):
            proxies[f"{scheme}_proxy"] = found[1]
    return proxies


def container(root: Path, *arguments: str | Path) -> list[str | Path]:
    """The command that runs something in a container with this root and a network of its own.

    It leaves the host's control groups alone: it gets a hierarchy that this mounts for it where
    the host's is an old one.
    """
    group = CGROUPS / GROUP
    setup = (
        f'[ "$(stat -f -c %T {CGROUPS})" = cgroup2fs ] || mount -t cgroup2 cgroup2 {CGROUPS}; '
        f'mkdir -p {group} && echo $$ > {group}/cgroup.procs && exec "$@"'
    )
    return [
        *("unshare", "--mount", "sh", "-ec", setup, "sh"),
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network"),
        *("--link-journal=no", "--resolv-conf=off", "--timezone=off", f"--directory={root}"),
        *arguments,
    ]


def inside(root: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root in a container that is not booted: loopback, /proc, no more."""
    try:
        return subprocess.run(
            container(root, "--console=pipe", "--as-pid2", *options, "sh", "-c", script),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_LIMIT_S,
        )
    finally:
        _remove_group()


def _remove_group() -> None:
    """Remove the control groups that containers have left; the host may show them elsewhere."""
    for hierarchy in (CGROUPS, CGROUPS / "unified"):
        for group, _, _ in os.walk(hierarchy / GROUP, topdown=False):
            with contextlib.suppress(OSError):
                Path(group).rmdir()


class Machine:
    """A Debian with systemd that runs in a container."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: subprocess.Popen[str] | None = None
        self._leader = ""

    def boot(self) -> None:
        """Return when it is up.

        Raises:
          NotPermitted: containers cannot be booted here.
        """
        command = container(self.root, "--console=pipe", f"--machine={GROUP}", "--boot")
        console = self.root.with_name("console")
        with console.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        limit = time.monotonic() + BOOT_LIMIT_S
        while self.call("systemctl", "is-system-running", fails=True).strip() != "running":
            if self._process.poll() is not None:
                raise NotPermitted(f"systemd-nspawn: {console.read_text().strip()[-300:]}")
            if time.monotonic() > limit:
                failed = self.call("systemctl", "--failed", "--no-pager", fails=True)
                raise AssertionError(f"it did not boot: {failed}\n{console.read_text()}")
            time.sleep(0.2)

    @property
    def leader(self) -> str:
        """The pid of the container's first process here; empty while there is none."""
        if not self._leader and self._process is not None:
            pid = self._process.pid
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                for child in children:  # first there is one that only makes the other
                    status = Path(f"/proc/{child}/status").read_text()
                    if re.search(rf"^NSpid:\s{child}\s1$", status, re.MULTILINE):
                        self._leader = child
        return self._leader

    def command(self, *command: str) -> list[str]:
        """What runs a command inside."""
        return ["nsenter", "--all", "--target", self.leader, "--", *command]

    def call(self, *command: str, fails: bool = False) -> str:
        """Run a command inside, and give what it prints.

        Args:
          fails: it may.
        """
        if not self.leader:
            return ""
        done = subprocess.run(
            self.command(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_LIMIT_S,
        )
        assert fails or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done.stdout + done.stderr

    def wait(self, what: str, condition: Callable[[], object], limit_s: float = 60.0) -> None:
        limit = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > limit:
                raise AssertionError(f"not within {limit_s:g} s: {what}\n{self.log()}")
            time.sleep(0.1)

    def log(self) -> str:
        return self.call("journalctl", "-u", "ollamad", "--no-pager", "-n", "40", fails=True)

    def property(self, name: str) -> str:
        """A property of the service."""
        return self.call("systemctl", "show", "ollamad", f"--property={name}", "--value").strip()

    def host_pid(self, pid: str) -> int:
        """What a process of the machine is called here."""
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                told = status.read_text()
                space = (status.with_name("ns") / "pid").readlink()
            except OSError:
                continue
            if space == Path(f"/proc/{self.leader}/ns/pid").readlink() and re.search(
                rf"^NSpid:.*\s{pid}$", told, re.MULTILINE
            ):
                return int(status.parent.name)
        raise AssertionError(f"there is no process {pid}")

    def close(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None and self.leader:
            os.kill(int(self.leader), HALT)
        try:
            self._process.wait(HALT_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _remove_group()


if __name__ == "__main__":  # CI makes the systems while it builds what is tried on them
    try:
        debian("systemd", *SYSTEMD)
    except (NotPermitted, Missing) as reason:
        print(f"no Debian systems for the tests of the packages: {reason}")
