"""The service of the package under a real systemd: `make deb`, then this.

One machine for all; each test begins with a service that runs, and leaves one.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.packaging.machines import CGROUPS, GROUP, ROOT, Machine

STOP_LIMIT_S = 10.0
EXPOSURE_LIMIT = 2.0  # what systemd-analyze calls "OK" ends at 4.9; 10 is no sandbox
WATCHDOG_S = 4
SPARE_MEMORY = 48 << 20  # bytes; no model is loaded with that little
MODEL = "smollm2:135m"


@pytest.fixture(scope="module")
def installed(machine: Machine, package: Path, smollm2_path: Path) -> Machine:
    """The machine with the package and a model."""
    shutil.copy(package, machine.root / "ollamad.deb")
    shutil.copy(smollm2_path, machine.root / "model.gguf")
    machine.call("dpkg", "--install", "/ollamad.deb")
    (machine.root / "etc/ollamad/config.yaml").write_text("")
    drop_in(machine, "")
    wait_ready(machine)
    machine.call("ollama-dist", "models", "import", "/model.gguf", "--name", MODEL)
    return machine


@pytest.fixture
def service(installed: Machine) -> Iterator[Machine]:
    """The machine with a service that runs."""
    wait_ready(installed)
    yield installed
    settings = installed.root / "etc/ollamad/config.yaml"
    if settings.read_text() or drop_in_path(installed).read_text():
        settings.write_text("")
        drop_in(installed, "")
        installed.call("systemctl", "restart", "ollamad")


def wait_ready(machine: Machine) -> None:
    machine.wait("it is ready", lambda: status(machine).startswith("leader; 1 of 1"))


def status(machine: Machine) -> str:
    """The text that it shows; empty unless it is active."""
    return machine.property("StatusText") if machine.property("ActiveState") == "active" else ""


def drop_in_path(machine: Machine) -> Path:
    return machine.root / "etc/systemd/system/ollamad.service.d/test.conf"


def drop_in(machine: Machine, settings: str) -> None:
    """Settings on top of the unit's."""
    path = drop_in_path(machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(settings)
    machine.call("systemctl", "daemon-reload")


def ask(machine: Machine, words: str = "hello", tokens: int = 8) -> str:
    return machine.call(
        *("ollama-dist", "generate", MODEL, words, "--option", f"num_predict={tokens}"), fails=True
    )


def runners(machine: Machine) -> list[str]:
    """The pids of processes of the service other than the daemon."""
    found = machine.call("ps", "-o", "pid=", "--ppid", machine.property("MainPID"), fails=True)
    return found.split()


def journal(machine: Machine, since: str = "") -> list[dict[str, str]]:
    lines = machine.call("journalctl", "-u", "ollamad", "-o", "json", "--no-pager", *since.split())
    return [json.loads(line) for line in lines.splitlines()]


def test_it_runs_as_its_own_user_with_a_model_that_answers(service: Machine) -> None:
    pid = service.property("MainPID")
    assert service.call("ps", "-o", "user=", "-p", pid).strip() == "ollamad"
    assert ask(service).strip()
    service.wait("the status names what is loaded", lambda: "; 1 models loaded" in status(service))
    assert service.call("systemctl", "is-enabled", "ollamad").strip() == "enabled"
    assert "Type=notify" in (service.root / "lib/systemd/system/ollamad.service").read_text()


def test_its_lines_in_the_journal_have_fields(service: Machine) -> None:
    (service.root / "etc/ollamad/config.yaml").write_text("api:\n  listen: 127.0.0.1:8081\n")
    service.call("systemctl", "reload", "ollamad")
    service.wait("the refusal", lambda: "needs a restart" in service.log())
    entries = [e for e in journal(service) if e.get("_SYSTEMD_UNIT") == "ollamad.service"]
    (refusal, *_) = [e for e in entries if "needs a restart" in e["MESSAGE"]]
    assert refusal["PRIORITY"] == "4"
    (ready, *_) = [e for e in entries if "is ready" in e["MESSAGE"]]
    assert ready["PRIORITY"] == "6"
    for entry in (refusal, ready):
        assert entry["SYSLOG_IDENTIFIER"] == "ollamad"
        assert not entry["MESSAGE"].startswith("<")
        assert not re.match(r"\d\d:\d\d", entry["MESSAGE"]), "the journal has the time"


def test_a_crash_is_followed_by_a_restart(service: Machine) -> None:
    ask(service)
    before, (runner, *_) = service.property("MainPID"), runners(service)
    service.call("kill", "-SIGKILL", before)
    service.wait("a new one", lambda: service.property("MainPID") not in ("0", before))
    assert service.call("ps", "-p", runner, fails=True).count("\n") == 1, "its runner is gone"
    wait_ready(service)
    assert ask(service).strip()


def test_a_loop_that_is_blocked_is_restarted(service: Machine) -> None:
    drop_in(service, f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    service.call("systemctl", "restart", "ollamad")
    wait_ready(service)
    before = service.property("MainPID")
    # Reading the settings never ends: nobody writes into a pipe.
    settings = service.root / "etc/ollamad/config.yaml"
    other = settings.with_name("node.yaml")
    other.write_text("")  # a directory of settings has a real file
    settings.unlink()
    service.call("mkfifo", "-m", "644", "/etc/ollamad/config.yaml")
    begun = time.monotonic()
    service.call("kill", "-SIGHUP", before)
    service.wait("the watchdog", lambda: service.property("Result") == "watchdog")
    took_s = time.monotonic() - begun
    for file in (settings, other):
        file.unlink()
    settings.write_text("")
    wait_ready(service)
    assert service.property("MainPID") != before
    assert took_s < WATCHDOG_S + 5


def test_a_process_that_hangs_is_restarted(service: Machine) -> None:
    drop_in(service, f"[Service]\nWatchdogSec={WATCHDOG_S}\nTimeoutStopSec=3\n")
    service.call("systemctl", "restart", "ollamad")
    wait_ready(service)
    before = service.property("MainPID")
    service.call("kill", "-SIGSTOP", before)
    service.wait("a new one", lambda: service.property("MainPID") not in ("0", before))
    wait_ready(service)


def test_a_loop_that_is_busy_is_not_restarted(service: Machine) -> None:
    drop_in(service, f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    service.call("systemctl", "restart", "ollamad")
    wait_ready(service)
    before = service.property("MainPID")
    with burning(service):
        busy_until = time.monotonic() + 3 * WATCHDOG_S
        while time.monotonic() < busy_until:
            ask(service, tokens=64)
    assert service.property("MainPID") == before
    assert service.property("NRestarts") == "0"


@contextmanager
def burning(machine: Machine) -> Iterator[None]:
    """Requests as fast as they go, and processes that take all the time there is."""
    flood = (
        "import http.client, sys\n"
        "while True:\n"
        "    c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=60)\n"
        "    for _ in range(50):\n"
        "        c.request('GET', '/api/v1/health'); c.getresponse().read()\n"
    )
    network = ("nsenter", "--net", "--target", machine.leader)
    commands = [[*network, sys.executable, "-c", flood]] * 8
    commands += [machine.command("sh", "-c", "while :; do :; done")] * 4
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield
        assert all(process.poll() is None for process in processes), "the load has failed"
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_can_be_reloaded_is_and_the_rest_is_refused(service: Machine) -> None:
    before = service.property("MainPID")
    (service.root / "etc/ollamad/config.yaml").write_text(
        "rate_limits:\n  general: 77\nlog:\n  level: debug\nmodels:\n  replicas: 1\n"
        "raft:\n  listen: 0.0.0.0:7777\n"
    )
    service.call("systemctl", "reload", "ollamad")
    for line in (
        "rate_limits.general is 77 now",
        "log.level is debug now",
        "models.replicas is 1 now",
        "raft.listen has changed, which needs a restart: it stays as it was",
    ):
        service.wait(line, lambda line=line: line in service.log())  # type: ignore[misc]
    (service.root / "etc/ollamad/config.yaml").write_text("rate_limits:\n  generl: 1\n")
    service.call("systemctl", "reload", "ollamad")
    service.wait("the mistake", lambda: "the settings stay as they are" in service.log())
    assert service.property("MainPID") == before
    assert service.property("ActiveState") == "active"


def test_it_stops_within_ten_seconds_in_the_middle_of_an_answer(service: Machine) -> None:
    question = service.command(
        *("ollama-dist", "generate", MODEL, "Count to a thousand."),
        *("--option", "num_predict=4000", "--option", "num_ctx=8192"),
    )
    with subprocess.Popen(
        question, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(1), "it does not answer"
        begun = time.monotonic()
        service.call("systemctl", "stop", "ollamad")
        took_s = time.monotonic() - begun
        asking.kill()
    assert took_s < STOP_LIMIT_S
    assert service.property("Result") == "success"
    assert not service.call("pgrep", "-u", "ollamad", fails=True).strip(), "nothing is left"
    service.call("systemctl", "start", "ollamad")


def test_a_start_that_fails_is_tried_again_more_and_more_slowly(service: Machine) -> None:
    (service.root / "etc/ollamad/config.yaml").write_text("api:\n  lisen: 1\n")
    service.call("systemctl", "--no-block", "restart", "ollamad")
    service.wait("some starts", lambda: int(service.property("NRestarts") or 0) >= 2, limit_s=30)
    told = service.log()
    assert "config.yaml" in told
    assert "lisen" in told
    failures = [e for e in journal(service) if e["MESSAGE"].startswith("ollamad: ")]
    assert failures[-1]["PRIORITY"] == "3"
    service.wait("the text", lambda: "tried again in" in service.property("StatusText"))
    (service.root / "etc/ollamad/config.yaml").write_text("")
    service.call("systemctl", "restart", "ollamad")


def test_under_memory_pressure_a_runner_dies_and_the_daemon_goes_on(service: Machine) -> None:
    pid = service.property("MainPID")
    status = service.call("cat", f"/proc/{pid}/status")
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert anonymous is not None
    limit = int(anonymous[1]) * 1024 + SPARE_MEMORY
    killed = limited_memory(service) if has_memory_groups(service) else limited_memory_v1(service)
    with killed(limit) as kills:
        refused = ask(service, tokens=64)
        service.wait("the kernel's kill", kills, limit_s=20)
    assert "rror" in refused, refused
    assert service.property("MainPID") == pid
    assert service.property("NRestarts") == "0"
    assert ask(service).strip(), "with memory it works again"


Limit = Callable[[int], AbstractContextManager[Callable[[], bool]]]  # gives: has it killed?


def has_memory_groups(machine: Machine) -> bool:
    return "memory" in machine.call("cat", "/sys/fs/cgroup/cgroup.controllers")


def limited_memory(machine: Machine) -> Limit:
    """By the service manager, as an administrator does it."""

    @contextmanager
    def limited(limit: int) -> Iterator[Callable[[], bool]]:
        ask(machine)  # what is loaded already dies, or the daemon would see that there is no room
        events = "/sys/fs/cgroup/system.slice/ollamad.service/memory.events"
        set_property = ("systemctl", "set-property", "--runtime", "ollamad")
        machine.call(*set_property, f"MemoryMax={limit}")
        try:
            yield lambda: not re.search(r"^oom_kill 0$", machine.call("cat", events), re.M)
        finally:
            machine.call(*set_property, "MemoryMax=infinity")

    return limited


def limited_memory_v1(machine: Machine) -> Limit:
    """By a control group of this host, where those of version 1 have the memory."""

    @contextmanager
    def limited(limit: int) -> Iterator[Callable[[], bool]]:
        group = CGROUPS / "memory" / GROUP
        group.mkdir()
        host_pid = str(machine.host_pid(machine.property("MainPID")))
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "cgroup.procs").write_text(host_pid)
            control = group / "memory.oom_control"
            yield lambda: not re.search(r"^oom_kill 0$", control.read_text(), re.M)
        finally:
            for pid in (group / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    (group.parent / "cgroup.procs").write_text(pid)
            group.rmdir()

    return limited


def test_a_command_can_have_the_variables_of_the_service(service: Machine) -> None:
    """As the manual says; one that is simply started by hand has not."""
    variables = service.root / "etc/default/ollamad"
    before = variables.read_text()
    variables.write_text("NODE_ID=of-the-service\n")
    config = ("ollamad", "config", "--data-dir", "/var/lib/ollamad")
    told = service.call("runuser", "-u", "ollamad", "--", *config)
    assert "of-the-service" not in told
    manual = (ROOT / "docs/operations.md").read_text()
    found = re.search(r"^    (systemd-run .+?) \\\n +(ollamad config .+)$", manual, re.M)
    assert found is not None
    told = service.call(*shlex.split(f"{found[1]} {found[2]}"))
    assert re.search(r"^node.name +of-the-service +NODE_ID$", told, re.M), told
    variables.write_text(before)


@pytest.mark.parametrize(
    ("path", "leave"),
    [
        ("/srv/models", "ReadWritePaths=/srv/models"),
        ("/home/eve/models", "ProtectHome=tmpfs\nBindPaths=/home/eve/models"),
    ],
    ids=["elsewhere", "in-a-home"],
)
def test_models_are_elsewhere_by_the_leave_that_the_log_names(
    service: Machine, path: str, leave: str
) -> None:
    (service.root / "etc/ollamad/config.yaml").write_text(f"models:\n  path: {path}\n")
    service.call("systemctl", "--no-block", "restart", "ollamad")
    service.wait("the reason", lambda: f"models.path: {path}" in service.log())
    for line in leave.splitlines():
        assert line in service.log()
    service.call("install", "-d", "-o", "ollamad", path)
    drop_in(service, f"[Service]\n{leave}\n")
    service.call("systemctl", "restart", "ollamad")
    wait_ready(service)
    assert (service.root / path[1:] / "blobs").is_dir()


def test_the_sandbox_is_strict(service: Machine) -> None:
    told = service.call("systemd-analyze", "security", "ollamad", "--no-pager")
    level = re.search(r"Overall exposure level for ollamad.service: ([\d.]+)", told)
    assert level is not None, told
    print(f"exposure {level[1]}")
    assert float(level[1]) <= EXPOSURE_LIMIT
    assert service.call("systemd-analyze", "verify", "ollamad.service") == ""


def test_it_can_do_no_harm_beyond_its_own_directories(service: Machine) -> None:
    """A script in the place of the daemon says what it can write to, see and do."""
    (service.root / "usr/local/bin/probe").write_text(PROBE)
    # Into a file: what a short process says, the journal may keep without the name of its unit.
    drop_in(
        service,
        "[Service]\nType=oneshot\nExecStart=\nExecStart=sh /usr/local/bin/probe\nRestart=no\n"
        "EnvironmentFile=\nStandardOutput=truncate:/probe.txt\nStandardError=inherit\n",
    )
    service.call("systemctl", "restart", "ollamad")  # returns at the script's end
    assert (service.root / "probe.txt").read_text() == "done\n"


PROBE = """
for path in / /etc /etc/ollamad /usr /usr/lib/ollamad /var /var/lib /home /root /boot /proc/sys; do
    if touch "$path/x"; then echo "can write to $path"; fi
done 2>/dev/null
for path in "$STATE_DIRECTORY" "$RUNTIME_DIRECTORY" "$CACHE_DIRECTORY" /tmp; do
    touch "$path/x" || echo "cannot write to $path"
done
if ls /root >/dev/null 2>&1; then echo "sees /root"; fi
if [ -e /proc/1/cmdline ]; then echo "sees other processes"; fi
if mount -t tmpfs tmpfs /tmp 2>/dev/null; then echo "can mount"; fi
if unshare --user true 2>/dev/null; then echo "can make namespaces"; fi
if chmod u+s "$STATE_DIRECTORY/x" 2>/dev/null; then echo "can make programs for others"; fi
if head -c 1 /dev/mem >/dev/null 2>&1; then echo "can read memory"; fi
rm -f "$STATE_DIRECTORY/x" "$CACHE_DIRECTORY/x"
echo done
"""
