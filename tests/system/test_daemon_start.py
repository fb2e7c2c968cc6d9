"""`ollamad start`: the first start, the signals, and starts that cannot be."""

import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.harness import (
    Cluster,
    Loopback,
    Node,
    free_ports,
    refused,
    run_daemon,
    wait_until,
)

STOP_LIMIT_S = 10.0


def one_line(error: str) -> str:
    """The single line of an error that is no traceback."""
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("ollamad: "), error
    return lines[0].removeprefix("ollamad: ")


def test_a_first_start_makes_a_cluster_of_one_and_tells_what_is_next(cluster: Cluster) -> None:
    node = cluster.found()

    status = node.get("/cluster/status")
    assert re.fullmatch(r"Qm[1-9A-HJ-NP-Za-km-z]{44}", status["node_id"])
    assert status["is_leader"]
    assert status["voters"] == [status["node_id"]]
    assert status["status"] == "healthy"
    assert node.get("/health")["status"] == "healthy"

    assert node.get(f"{node.url}/v1/models")["data"] == []
    assert node.get(f"{node.url}/api/tags") == {"models": []}

    log = node.log()
    assert f"http://127.0.0.1:{node.api_port}" in log
    assert f"127.0.0.1:{node.p2p_port}" in log
    assert f"127.0.0.1:{node.raft_port}" in log
    assert "Next: `ollama-dist models pull" in log

    soft, hard = psutil.Process(node.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard, "many clients must not use up what peers need"


def test_a_first_start_keeps_secrets_to_its_user(cluster: Cluster) -> None:
    node = cluster.found()
    wait_until("the token file is there", (node.data_dir / "cli-token").exists)

    assert stat.S_IMODE(node.data_dir.stat().st_mode) == 0o700
    private = ["cli-token", "admin-password", "raft.db", "identity/node.key"]
    for name in private:
        mode = stat.S_IMODE((node.data_dir / name).stat().st_mode)
        assert mode & 0o077 == 0, f"{name} has the mode {mode:o}"
    password = (node.data_dir / "admin-password").read_text().strip()
    assert len(password) >= 16
    assert password not in node.log(), "the log goes to many places"

    login = node.post("/auth/login", {"username": "admin", "password": password}, token="")
    assert login["user"]["role"] == "admin"
    assert node.get("/nodes", token=login["token"])["nodes"]


def test_a_warm_start_is_quick_and_keeps_everything(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    node = cluster.found()
    before = node.get("/cluster/status")
    node.post(f"/nodes/{node.id}/drain")
    node.stop()

    begun = time.monotonic()
    node.start()
    took_s = time.monotonic() - begun
    after = node.get("/cluster/status")

    record_property("warm_start_s", round(took_s, 2))
    print(f"warm start: {took_s:.2f} s")
    assert took_s < 15, "the goal is 1.5 s, on a machine that has nothing else to do"
    assert (after["node_id"], after["cluster_id"]) == (before["node_id"], before["cluster_id"])
    assert node.node(node)["draining"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_daemon_in_order(cluster: Cluster, number: signal.Signals) -> None:
    node = cluster.found()
    begun = time.monotonic()
    node.signal(number)
    code = node.wait_end()
    assert code == 0
    assert time.monotonic() - begun < STOP_LIMIT_S
    assert any("STOPPING=1" in message for message in node.notifications())
    assert "Traceback" not in node.log()


def test_a_second_signal_ends_the_daemon_at_once(cluster: Cluster) -> None:
    node = cluster.found()
    # A client that holds a request open, which an orderly stop waits for.
    with socket.create_connection(("127.0.0.1", node.api_port)) as client:
        client.sendall(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.3)
        node.signal(signal.SIGTERM)
        wait_until("the first signal is seen", lambda: "SIGTERM: stopping" in node.log())
        begun = time.monotonic()
        node.signal(signal.SIGTERM)
        assert node.wait_end() == 1, "not the end of an orderly stop"
    assert time.monotonic() - begun < 2


def test_a_client_that_holds_on_does_not_delay_the_stop(cluster: Cluster) -> None:
    node = cluster.found()
    with socket.create_connection(("127.0.0.1", node.api_port)) as client:
        client.sendall(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.3)
        begun = time.monotonic()
        assert node.stop() == 0
    assert time.monotonic() - begun < STOP_LIMIT_S


def test_the_service_manager_hears_when_it_is_ready(cluster: Cluster) -> None:
    node = cluster.found()
    assert sum("READY=1" in message for message in node.notifications()) == 1
    # Ready means ready: the very first request is served.
    assert node.get("/health")["status"] == "healthy"


# Starts that cannot be.


def listens(first: Path, **settings: str) -> dict[str, str]:
    api, p2p, raft = free_ports(3)
    return {
        "API_LISTEN": f"127.0.0.1:{api}",
        "P2P_LISTEN": f"127.0.0.1:{p2p}",
        "RAFT_BIND_ADDR": f"127.0.0.1:{raft}",
        "OLLAMAD_API__OLLAMA_LISTEN": "off",
        "OLLAMAD_DATA_DIR": str(first / "data"),
    } | settings


@pytest.mark.parametrize("variable", ["API_LISTEN", "P2P_LISTEN", "RAFT_BIND_ADDR"])
def test_a_port_in_use_is_told(tmp_path: Path, variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run_daemon(tmp_path, "start", environment=listens(tmp_path, **{variable: address}))
    assert ended.returncode == 1
    line = one_line(ended.stderr)
    assert address in line
    assert "in use" in line
    assert ended.stdout == ""


@pytest.mark.parametrize("place", ["/proc/none/data", "a file"])
def test_a_data_directory_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    if place == "a file":
        (tmp_path / "file").touch()
        place = str(tmp_path / "file" / "data")
    ended = run_daemon(tmp_path, "start", "--data-dir", place, environment=listens(tmp_path))
    assert ended.returncode == 1
    line = one_line(ended.stderr)
    assert place in line
    assert "--data-dir" in line


def test_a_data_directory_in_use_is_told(single: Cluster, tmp_path: Path) -> None:
    node = single.nodes[0]
    ended = run_daemon(
        tmp_path, "start", "--data-dir", str(node.data_dir), environment=listens(tmp_path)
    )
    assert ended.returncode == 1
    line = one_line(ended.stderr)
    assert str(node.data_dir) in line
    assert f"pid {node.pid}" in line
    assert node.get("/health")["status"] == "healthy"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("log:\n  level: loud\n", "config.yaml:2", ["log.level", "'loud'", "debug, info"]),
        ("api:\n  listn: 1\n", "config.yaml:2", ["api.listn", "did you mean api.listen"]),
        ("api: [\n", "config.yaml:2", ["YAML"]),
        ("api:\n  listen: nowhere\n", "config.yaml:2", ["api.listen", "host:port"]),
        ("\n\nraft: 3\n", "config.yaml:3", ["raft", "mapping"]),
    ],
)
def test_a_bad_setting_is_told_with_its_place(
    tmp_path: Path, text: str, place: str, words: list[str]
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(text)
    ended = run_daemon(tmp_path, "start", environment=listens(tmp_path))
    assert ended.returncode == 2
    line = one_line(ended.stderr)
    for word in [place, *words]:
        assert word in line, line


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("LOG_LEVEL", "loud", ["LOG_LEVEL", "log.level"]),
        ("OLLAMAD_API__LISTN", "x", ["OLLAMAD_API__LISTN", "api.listen"]),
        ("OLLAMA_JWT_SECRET", "short", ["OLLAMA_JWT_SECRET", "32"]),
        ("OLLAMAD_AUTH__TOKEN_TTL", "5s", ["OLLAMAD_AUTH__TOKEN_TTL", "15"]),
    ],
)
def test_a_bad_variable_is_told(
    tmp_path: Path, variable: str, value: str, words: list[str]
) -> None:
    ended = run_daemon(tmp_path, "start", environment=listens(tmp_path, **{variable: value}))
    assert ended.returncode == 2
    line = one_line(ended.stderr)
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("options", [["--join"], ["--bootstrap", "--join", "x"], ["--nonsense"]])
def test_wrong_options_are_a_usage_error(tmp_path: Path, options: list[str]) -> None:
    ended = run_daemon(tmp_path, "start", *options, environment=listens(tmp_path))
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_damaged_journal_is_told(cluster: Cluster) -> None:
    node = cluster.found()
    node.stop()
    journal = node.data_dir / "raft.db"
    for path in node.data_dir.glob("raft.db*"):
        path.unlink()
    journal.write_bytes(b"this is no database" * 500)
    node.launch()
    assert node.wait_end() == 1
    assert "raft.db" in node.tail(1)
    assert "Traceback" not in node.log()


def test_a_long_data_directory_does_not_matter_to_runners(
    cluster: Cluster, smollm2_path: Path
) -> None:
    # A Unix socket's path is limited to 107 bytes.
    node = cluster.new_node()
    node.data_dir = node.directory / ("long" * 30) / "data"
    node.start()
    node.import_model(smollm2_path, "m")
    answer = node.answer("/generate", model="m", prompt="Hi", options={"num_predict": 4})
    assert answer.status_code == 200, answer.text


def test_who_needs_no_token_is_a_setting(cluster: Cluster) -> None:
    settings = {"OLLAMAD_AUTH__LOOPBACK_ROLE": "none", "OLLAMAD_METRICS__PUBLIC": "true"}
    node = cluster.new_node(settings)
    node.start()
    refused(node.request("GET", "/nodes", token=""), 401, "UNAUTHORIZED")
    assert node.get("/health", token="")
    assert "ollamad_" in node.request("GET", f"{node.url}/metrics", token="").text


def test_dev_binds_to_loopback_and_lets_everybody_in(cluster: Cluster) -> None:
    node: Node = cluster.new_node()
    node.start("--dev")
    assert node.post(f"/nodes/{node.id}/undrain", token="")
    node.stop()
    ended = run_daemon(
        node.directory,
        "start",
        "--dev",
        "--data-dir",
        str(node.data_dir),
        environment=listens(node.directory, API_LISTEN=f"0.0.0.0:{node.api_port}"),
    )
    assert ended.returncode == 2
    assert "loopback" in one_line(ended.stderr)


def test_a_hangup_reads_the_settings_again(cluster: Cluster) -> None:
    node = cluster.new_node({"OLLAMAD_RATE_LIMITS__GENERAL": ""})
    settings = node.directory / "config" / "config.yaml"
    settings.parent.mkdir()
    settings.write_text("rate_limits:\n  general: 50\n")
    node.start()

    def limit() -> str:
        with node.client() as client:
            return str(client.get("/nodes").headers["RateLimit-Limit"])

    assert limit() == "50"
    settings.write_text("rate_limits:\n  general: 70\nlog:\n  level: debug\napi:\n  listen: ':1'\n")
    node.signal(signal.SIGHUP)
    wait_until("the limit is the new one", lambda: limit() == "70")
    log = node.log()
    assert "rate_limits.general is 70 now, after 50" in log
    assert "log.level is debug now, after info" in log
    settings.write_text("rate_limits:\n  generall: 9\n")
    node.signal(signal.SIGHUP)
    wait_until(
        "the mistake is told",
        lambda: "config.yaml:2: there is no setting 'rate_limits.generall'" in node.log(),
    )
    assert limit() == "70"
    settings.unlink()
    node.signal(signal.SIGHUP)
    wait_until("the missing file is told", lambda: "config.yaml was there at the" in node.log())
    assert limit() == "70"
    told = node.notifications()
    assert sum("RELOADING=1" in message for message in told) == 3
    assert told[-1] == "READY=1" or "STATUS=" in told[-1]
    assert node.stop() == 0


def test_settings_that_cannot_be_read_are_no_reason_for_the_defaults(cluster: Cluster) -> None:
    node = cluster.new_node({"OLLAMAD_RATE_LIMITS__GENERAL": ""})
    if os.geteuid() == 0:  # modes do not stop root; they stop this one
        node.host = Loopback(command=("setpriv", "--bounding-set=-dac_override,-dac_read_search"))
    settings = node.data_dir / "config" / "config.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("rate_limits:\n  general: 50\n")
    node.start()
    settings.parent.chmod(0)
    try:
        node.signal(signal.SIGHUP)
        told = f"{settings}: cannot be read: Permission denied; let this user read it"
        wait_until("it is told", lambda: f"the settings stay as they are: {told}" in node.log())
        with node.client() as client:
            assert client.get("/nodes").headers["RateLimit-Limit"] == "50"
        assert node.stop() == 0
        node.launch()
        assert node.wait_end() == 2
        assert node.log().splitlines()[-1].startswith(f"ollamad: {told}")
    finally:
        settings.parent.chmod(0o700)


def test_whatever_ended_a_service_the_next_start_waits(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.found()  # its ports are free; a first start that finds others is no failure
    node.stop()
    node.environment |= {"INVOCATION_ID": "1", "RUNTIME_DIRECTORY": str(tmp_path)}

    def pauses() -> list[str]:
        return [each for each in node.notifications() if "tried again in" in each]

    node.start()
    assert pauses() == []
    node.kill()
    node.start()
    assert pauses() == ["STATUS=the last start failed; tried again in 1 s"]
    node.kill()
    node.start()
    assert pauses() == ["STATUS=the last start failed; tried again in 2 s"]
    assert node.stop() == 0
    node.start()
    assert pauses() == [], "an order to stop is no failure"
    assert node.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_service_manager_is_told_how_the_daemon_is_and_that_it_lives(cluster: Cluster) -> None:
    node = cluster.new_node({"WATCHDOG_USEC": "1000000"})
    node.start()

    def fed() -> int:
        return node.notifications().count("WATCHDOG=1")

    told = node.notifications()
    assert told.index("WATCHDOG=1") < told.index("READY=1"), "a start that hangs is ended, too"
    wait_until("it is fed", lambda: fed() >= 3)
    wait_until(
        "the status is told",
        lambda: "STATUS=leader; 1 of 1 nodes online; 0 models loaded" in node.notifications(),
    )
    node.pause()  # as a loop that is blocked
    before = fed()
    time.sleep(1.5)
    assert fed() == before, "systemd would end it now"
    node.resume()
    wait_until("it is fed again", lambda: fed() > before)
