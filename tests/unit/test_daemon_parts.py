"""What surrounds the daemon: its directory, log, service manager, host, start, and admission."""

import contextlib
import errno
import io
import json
import logging
import os
import pwd
import re
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
import trio
from trio.testing import MockClock

from ollamad import admission, build, logs, start, systemd
from ollamad import daemon as daemon_module
from ollamad.admission import Seeds, choose_identity, forget_cluster, parse_invitation, read_seeds
from ollamad.core.ids import NodeId
from ollamad.core.inference import GenerateRequest, LoadedModel
from ollamad.core.presence import Usage
from ollamad.daemon import Daemon, open_model_places
from ollamad.datadir import DataDir, DataDirError
from ollamad.errors import StartError
from ollamad.host import HostMonitor
from ollamad.peers import identity as identity_module
from ollamad.peers.identity import (
    CERTIFICATE_LIFETIME,
    RENEW_BEFORE,
    RENEWAL_CHECK_S,
    RENEWAL_RETRY_S,
    Identity,
    certificate_der,
    make_ca,
    write_private,
)
from ollamad.settings import (
    ModelSettings,
    NodeSettings,
    Settings,
)
from ollamad.wire.codec import encode
from ollamad.wire.join import Seed, Token, channel_binding, format_token
from tests.fakes.api_services import member, model
from tests.fakes.built_daemon import built_daemon
from tests.fakes.tls_nodes import TlsNode, utc_now

FAR = 2**40
TOKEN = Token("010203040506", b"s" * 16, b"c" * 32, FAR)


# The data directory.


def test_a_directory_is_made_for_its_owner_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with DataDir(path) as directory:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert (path / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(DataDirError, match=rf"in use by another ollamad \(pid {os.getpid()}\)"):
            DataDir(path).__enter__()
        assert directory.identity == path / "identity"
    with DataDir(path):
        pass


def test_the_lock_of_a_daemon_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999999999999999999999999999999999999999\n")
    with DataDir(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_what_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(DataDirError, match="choose another with --data-dir"):
            DataDir(path).__enter__()


def test_a_full_disk_does_not_keep_a_daemon_from_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", full)
    with DataDir(tmp_path), pytest.raises(DataDirError, match=r"pid unknown"):
        DataDir(tmp_path).__enter__()


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


# The models' directory.


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DataDir]:
    with DataDir(tmp_path / "data") as directory:
        yield directory


def models_in(path: Path | str, *, read_only: bool = False) -> Settings:
    return Settings(models=ModelSettings(path=str(path), read_only=read_only))


def test_the_models_directory_is_made(directory: DataDir, tmp_path: Path) -> None:
    assert open_model_places(Settings(), directory).own == directory.models
    adopted = tmp_path / "a" / "b"
    assert open_model_places(models_in(adopted), directory).own == adopted
    assert adopted.is_dir()
    elsewhere = tmp_path / "not-mounted-yet"
    places = open_model_places(models_in(elsewhere, read_only=True), directory)
    assert (places.own, places.shelves) == (directory.models, [elsewhere])


# By fakes, since root may do everything.
@pytest.mark.parametrize(
    ("path", "call", "number", "remedy"),
    [
        ("/srv/models", "mkdir", errno.EROFS, "ReadWritePaths=/srv/models under [Service]"),
        ("/home/eve/models", "is_dir", errno.EACCES, "tmpfs and BindPaths=/home/eve/models"),
        ("/srv/models", "mkdir", errno.EACCES, "make it for the daemon's user"),
        ("/srv/models", "mkdir", errno.ENOSPC, ""),
    ],
    ids=["read-only", "hidden", "somebody-elses", "full"],
)
def test_why_a_directory_of_models_cannot_be_used_is_told_with_the_remedy(
    directory: DataDir,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    call: str,
    number: int,
    remedy: str,
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, call, refuse)
    told = f"models.path: {path} cannot be used for models: {os.strerror(number)}"
    with pytest.raises(StartError, match=f"^{told}") as caught:
        open_model_places(models_in(path), directory)
    assert remedy in str(caught.value)


def test_a_directory_of_models_that_is_only_read_must_be_readable(
    directory: DataDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StartError, match="let that read there"):
        open_model_places(models_in(tmp_path, read_only=True), directory)


# What a daemon writes each day.


class Disk:
    """What the small private files are written to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        for module in (daemon_module, identity_module):
            monkeypatch.setattr(module, "write_private", self._write)

    def _write(self, path: Path, data: bytes) -> None:
        if self.is_full:
            full()
        write_private(path, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
async def daemon(directory: DataDir) -> AsyncIterator[Daemon]:
    """One whose certificate is to be renewed; nothing of it runs."""
    due = utc_now() - CERTIFICATE_LIFETIME + RENEW_BEFORE
    async with built_daemon(directory, certified=due) as daemon:
        yield daemon


async def test_a_full_disk_puts_a_renewal_off_and_ends_nothing(
    daemon: Daemon,
    disk: Disk,
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    identity, token = daemon._identity, daemon._directory.cli_token
    before = identity.certificate
    disk.is_full = True
    nursery.start_soon(daemon._renew_certificate)
    await trio.sleep(3 * RENEWAL_RETRY_S + 1)  # not at the moment of a try: either may come first
    daemon._write_local_token()  # as at each change of the state
    assert identity.certificate == before
    assert not token.exists()
    assert caplog.text.count("cli-token cannot be written now: No space left") == 1
    assert "cannot be renewed: No space left" in caplog.text
    disk.is_full = False
    await trio.sleep(RENEWAL_RETRY_S)
    assert identity.certificate != before
    assert token.exists()
    token.unlink()
    await trio.sleep(RENEWAL_RETRY_S)
    assert not token.exists(), "the next one is due tomorrow"
    await trio.sleep(RENEWAL_CHECK_S)
    assert token.exists()
    nursery.cancel_scope.cancel()


async def test_a_decision_makes_no_beat_and_knows_what_this_node_has_taken_on(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = daemon._identity.node_id
    daemon._machine.state.members[here] = member(here, "here")
    held = model(confirmed=(here,))
    daemon._machine.state.models[held.name] = held
    loaded = LoadedModel(held.name, held.digest, 10, 0, 4096, 0, slots=1, busy=1)
    monkeypatch.setattr(daemon._engine, "loaded", lambda: (loaded,))
    router = daemon._dispatcher.router
    monkeypatch.setattr(router, "news", lambda loaded: pytest.fail("a beat is made"))
    asked = GenerateRequest(held.name, "hello")
    [score] = daemon._dispatcher.explain(asked).scores
    assert (score.willing, score.slots, score.in_use) == (True, 1, 1)
    # Another node's request was taken on: this counts at once.
    loaded = msgspec.structs.replace(loaded, queued=1)
    assert router.room(held)[0] == 0
    with router.sending(here, held, None), router.sending(here, held, None):
        loaded = msgspec.structs.replace(loaded, busy=0, queued=0)
        assert router.room(held)[0] == 0, "sent, and not in the engine yet"
    assert router.room(held)[0] == 2


async def test_after_a_recovery_nobody_is_dialled_with_the_old_certificate(
    daemon: Daemon, disk: Disk
) -> None:
    daemon._machine.state.incarnation = 5
    disk.is_full = True
    with pytest.raises(StartError, match="recovery calls for cannot be written: No space"):
        daemon._renew_if_due()
    disk.is_full = False
    assert daemon._renew_if_due()
    assert daemon._identity.incarnation == 5


# The log.


@pytest.fixture
def root_logger() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("ollamad")
    handlers, level, own_level = root.handlers, root.level, own.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    own.setLevel(own_level)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(("to_journal", "pattern"), [(True, "<4>"), (False, r"\d\d:\d\d:\d\d ")])
def test_lines_for_people(
    capsys: pytest.CaptureFixture[str], to_journal: bool, pattern: str
) -> None:
    logs.set_up("info", "text", to_journal=to_journal)
    logging.getLogger("ollamad.peers.join").warning("hello %d", 7)
    logging.getLogger("ollamad.x").debug("hidden")
    logging.getLogger("httpx").info("hidden")
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(pattern + "WARNING peers.join: hello 7", line)


@pytest.mark.usefixtures("root_logger")
def test_lines_for_collectors(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "json", to_journal=False)
    with contextlib.suppress(ZeroDivisionError):
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            logging.getLogger("ollamad.x").exception('a "quote"\nand a line')
            raise
    [line] = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == 'a "quote"\nand a line'
    assert entry["level"] == "error"
    assert "ZeroDivisionError" in entry["exception"]
    assert entry["time"].endswith("Z")


@pytest.mark.usefixtures("root_logger")
def test_the_journal_is_told_how_bad_each_line_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "text", to_journal=True)
    log = logging.getLogger("ollamad.x")
    log.debug("d")
    log.info("two\nlines")
    log.error("e")
    log.critical("c")
    lines = capsys.readouterr().err.splitlines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<6>", "<3>", "<2>"]


def test_the_journal_is_known_by_its_stream_not_by_the_variable_alone(tmp_path: Path) -> None:
    with open(tmp_path / "stream", "w") as stream:
        status = os.fstat(stream.fileno())
        ours = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert systemd.is_journal(stream, ours)
        assert not systemd.is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:1"})
        assert not systemd.is_journal(stream, {})
    assert not systemd.is_journal(io.StringIO(), ours)


# The service manager.


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    path = f"@ollamad-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + path[1:] if abstract else path)
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": path})
        assert listener.recv(100) == b"READY=1"


def test_no_service_manager_is_no_trouble(tmp_path: Path) -> None:
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": ""})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nowhere")})


# The host.


def test_what_the_host_has_is_measured(tmp_path: Path) -> None:
    monitor = HostMonitor(tmp_path)
    capacity = monitor.capacity()
    assert capacity.cpu_cores >= 1
    assert capacity.memory_bytes > 1 << 20
    assert capacity.disk_bytes > 1 << 20
    usage = monitor.sample()
    assert usage is monitor.usage
    for fraction in (usage.cpu, usage.memory, usage.disk, usage.gpu):
        assert 0 <= fraction <= 1
    assert 0 < usage.memory_available <= capacity.memory_bytes
    assert 0 < usage.disk_free <= capacity.disk_bytes
    assert 0 <= monitor.network_percent() <= 100


class FakeNvml:
    """Two GPUs; the driver may fail in the middle."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == self.fail_at:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return type("Memory", (), {"total": 100, "used": 10 * handle})

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:
        return b"GPU 0" if handle == 0 else "GPU 1"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return type("Rates", (), {"gpu": 50 + handle})

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 40

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        of = {10: 1 + handle, 11: None}  # bytes by process; None: a container hides them
        return [type("P", (), {"pid": pid, "usedGpuMemory": used}) for pid, used in of.items()]


def test_video_memory_is_told_by_gpu_and_by_process(tmp_path: Path) -> None:
    monitor = HostMonitor(tmp_path)
    monitor._nvml = FakeNvml()
    assert monitor.free_vram() == (100, 90)
    assert monitor.vram_used(10) == 3
    assert monitor.vram_used(11) is None
    assert monitor.vram_used(12) == 0
    monitor._nvml = FakeNvml(fail_at=1)
    assert monitor.free_vram() == (100,)
    assert monitor.vram_used(10) is None
    monitor._nvml = None
    assert (monitor.free_vram(), monitor.vram_used(10)) == ((), None)


def test_gpus_are_read_and_may_fall_off_the_bus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = HostMonitor(tmp_path)
    monitor._nvml = FakeNvml()
    assert monitor.capacity().gpu_memory_bytes == 200
    assert monitor.sample().gpu == 0.51
    assert [gpu.name for gpu in monitor.gpus] == ["GPU 0", "GPU 1"]
    monitor._nvml = FakeNvml(fail_at=1)
    monitor.sample()
    assert [gpu.name for gpu in monitor.gpus] == ["GPU 0"]
    assert "GPU is lost" in caplog.text
    monitor._nvml = None
    assert monitor.sample() == monitor.usage
    assert isinstance(monitor.usage, Usage)


@pytest.mark.parametrize(
    ("machine", "shown"),
    [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64"), ("riscv64", "linux/riscv64")],
)
def test_the_platform_has_gos_form(
    machine: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert build.platform_name() == shown


def test_a_build_says_what_it_is() -> None:
    info = build.build_info()
    assert info.version
    assert info.git_commit
    assert set(build.engine_versions()) == {"xllamacpp", "ctransformers"}
    assert build.installed_engines() == ("xllamacpp", "ctransformers")


# Starting.


def test_invitations() -> None:
    text = format_token(TOKEN)
    assert parse_invitation(text).address is None
    assert parse_invitation(f"{text}@").address is None
    invitation = parse_invitation(f"{text}@[::1]:9000")
    assert (invitation.token, invitation.address) == (TOKEN, "[::1]:9000")
    old = Token(TOKEN.id, TOKEN.secret, TOKEN.ca_hash, 5)
    assert parse_invitation(format_token(old)).token == old, "who is in already does not need it"
    for bad, reason in (("x@h:1", "starts with"), (text[:-1], "damaged")):
        with pytest.raises(StartError, match=reason):
            parse_invitation(bad)


@pytest.mark.usefixtures("root_logger")
def test_a_second_daemon_in_one_directory_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    with DataDir(tmp_path), pytest.raises(StartError, match="in use by another ollamad"):
        start.run(Settings(), tmp_path, None, Settings)


@pytest.mark.usefixtures("root_logger")
def test_root_starts_no_daemon_in_the_services_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would leave there the service could not read."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)

    async def begin(*_: object) -> None:
        raise AssertionError("it starts")

    monkeypatch.setattr(start, "_run", begin)
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    owner = pwd.getpwuid(tmp_path.stat().st_uid).pw_name
    wanted = f"sudo -u {owner} ollamad … --data-dir {tmp_path}"
    with pytest.raises(StartError, match=re.escape(wanted)):
        start.run(Settings(), tmp_path, None, Settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("root_logger")
def test_a_clock_that_does_not_fit_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: 0)
    ca = make_ca(utc_now())
    TlsNode(tmp_path / "identity").enter(ca, at=utc_now().replace(year=2020))
    with pytest.raises(StartError, match="set the clock"):
        start.run(Settings(), tmp_path, None, Settings)


def test_what_ended_the_daemon_becomes_one_line_if_it_was_to_be_expected() -> None:
    with pytest.raises(StartError, match=r"^the reason$"):
        start._explain(BaseExceptionGroup("", [BaseExceptionGroup("", [StartError("the reason")])]))
    for group in (
        BaseExceptionGroup("", [KeyError("bug")]),
        BaseExceptionGroup("", [StartError("x"), BaseExceptionGroup("", [KeyError("bug")])]),
    ):
        with pytest.raises(BaseExceptionGroup) as caught:
            start._explain(group)
        assert caught.value is group


async def test_who_founds_a_cluster_joins_none(tmp_path: Path) -> None:
    settings = Settings(node=NodeSettings(bootstrap=True))
    with DataDir(tmp_path) as directory:
        invitation = parse_invitation(format_token(TOKEN))
        with pytest.raises(StartError, match="joins no other"):
            await choose_identity(settings, directory, invitation)
        await choose_identity(settings, directory, None)


def test_a_node_knows_which_cluster_it_belongs_to(tmp_path: Path) -> None:
    ca = make_ca(utc_now())
    node = TlsNode(tmp_path)
    here = Token(TOKEN.id, TOKEN.secret, channel_binding(certificate_der(ca.certificate_pem)), FAR)
    invitations = [parse_invitation(format_token(token)) for token in (here, TOKEN)]
    assert [admission.is_elsewhere(node.identity, i) for i in invitations] == [False, False]
    node.enter(ca)
    assert [admission.is_elsewhere(node.identity, i) for i in invitations] == [False, True]


def test_a_cluster_is_put_aside_whole_with_the_key_and_the_models_stay(tmp_path: Path) -> None:
    node = TlsNode(tmp_path / "identity").enter(make_ca(utc_now()))
    journal = ["raft.db", "raft.db-wal", "raft.db-shm", "raft.db-witness"]
    names = [*journal, "seeds", "cli-token", "admin-password"]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "models").mkdir()
    with DataDir(tmp_path) as directory:
        forget_cluster(directory)
        forget_cluster(directory)  # there is nothing left
    [aside] = tmp_path.glob("left-*")
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    assert {p.name for p in aside.iterdir()} == {*names, "identity"}
    assert {p.name for p in tmp_path.iterdir()} == {"lock", "models", aside.name}
    assert Identity.load_or_create(aside / "identity").node_id == node.id
    assert Identity.load_or_create(tmp_path / "identity").node_id != node.id


def test_seeds_are_read_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "seeds"
    assert read_seeds(path) == Seeds()
    seeds = Seeds((Seed(NodeId("A"), "a:1", "a:2"),), (NodeId("A"),))
    write_private(path, encode(seeds))
    assert read_seeds(path) == seeds
    path.write_bytes(b"\xff damaged")
    assert read_seeds(path) == Seeds()


def test_a_log_line_cannot_move_the_cursor() -> None:
    record = logging.LogRecord("ollamad.x", logging.INFO, "", 0, "evil \x1b[2J\r\x9b", None, None)
    shown = logs.TextFormatter(with_time=False).format(record)
    assert shown == "INFO    x: evil \ufffd[2J\ufffd\ufffd"


def test_a_log_line_cannot_make_another() -> None:
    forged = "INFO    api.audit: admin did it"
    record = logging.LogRecord(
        "ollamad.x", logging.INFO, "", 0, f"a\n{forged}\u2028{forged}", None, None
    )
    formatter = logs.TextFormatter(with_time=False)
    for shown in (formatter.format(record), logs.JournalFormatter(formatter).format(record)):
        assert not any(line.removeprefix("<6>").startswith(forged) for line in shown.split("\n"))
