"""Settings: every source, their order, what is wrong told with its place, and what is shown."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ollamad import settings
from ollamad.main import app
from ollamad.settings import (
    ENVIRONMENT,
    SECRETS,
    ConfigError,
    Effective,
    Origin,
    Settings,
    load,
    parse_duration,
    parse_listen,
    walk,
)

SECRET = "hunter2-" + "x" * 32


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory


def value(effective: Effective, key: str) -> tuple[Any, str]:
    return dict(walk(effective.settings))[key], effective.origins[key].text


def test_defaults() -> None:
    effective = load(None, {}, {})
    assert {origin.text for origin in effective.origins.values()} == {"default"}
    assert value(effective, "api.listen") == ("0.0.0.0:8080", "default")
    assert value(effective, "p2p.listen") == ("/ip4/0.0.0.0/tcp/9000", "default")
    assert value(effective, "raft.listen") == ("0.0.0.0:7000", "default")
    assert set(effective.origins) == {key for key, _ in walk(effective.settings)}
    assert set(effective.origins) == set(settings._types())
    for key, given in walk(effective.settings):  # defaults pass their own checks
        settings._convert(key, given, Origin("default"))


def test_each_source_beats_the_weaker_ones(tmp_path: Path) -> None:
    directory = write(tmp_path, config="log:\n  level: debug\n")
    key = "log.level"
    assert value(load(directory, {}, {}), key) == ("debug", f"{tmp_path}/config.yaml:2")
    write(directory, node="\n\nlog: {level: warning}\n")
    assert value(load(directory, {}, {}), key) == ("warning", f"{tmp_path}/node.yaml:3")
    environment = {"LOG_LEVEL": "error"}
    assert value(load(directory, environment, {}), key) == ("error", "LOG_LEVEL")
    given = {key: "info", "api.listen": None}
    assert value(load(directory, environment, given), key) == ("info", "command line")
    assert value(load(directory, environment, given), "api.listen")[1] == "default"


@pytest.mark.parametrize(
    ("variable", "text", "key", "expected"),
    [
        ("OLLAMA_JWT_SECRET", SECRET, "auth.jwt_secret", SECRET),
        ("API_LISTEN", "127.0.0.1:1", "api.listen", "127.0.0.1:1"),
        ("P2P_LISTEN", "/ip4/1.2.3.4/tcp/5", "p2p.listen", "/ip4/1.2.3.4/tcp/5"),
        ("RAFT_BIND_ADDR", "1.2.3.4:5", "raft.listen", "1.2.3.4:5"),
        ("LOG_LEVEL", "debug", "log.level", "debug"),
        ("NODE_ID", "n1", "node.name", "n1"),
        ("NODE_ID", "17", "node.name", "17"),
        ("BOOTSTRAP", "true", "node.bootstrap", True),
        ("BOOTSTRAP", "1", "node.bootstrap", True),
        ("BOOTSTRAP", "false", "node.bootstrap", False),
        ("OLLAMA_MODELS", "/m", "models.path", "/m"),
        ("OLLAMA_KEEP_ALIVE", "-1", "engine.keep_alive", "-1"),
        ("OLLAMA_NUM_PARALLEL", "2", "engine.num_parallel", 2),
        ("OLLAMA_MAX_LOADED_MODELS", "2", "engine.max_loaded_models", 2),
        ("OLLAMA_MAX_QUEUE", "0", "engine.max_queue", 0),
        ("OLLAMA_CONTEXT_LENGTH", "8192", "engine.context_length", 8192),
        ("OLLAMAD_LOG__FORMAT", "json", "log.format", "json"),
        ("OLLAMAD_ENGINE__NUM_PARALLEL", "3", "engine.num_parallel", 3),
        ("OLLAMAD_DATA_DIR", "/d", "data_dir", "/d"),
        ("OLLAMAD_MODELS__REPLICAS", "3", "models.replicas", 3),
    ],
)
def test_variables(variable: str, text: str, key: str, expected: object) -> None:
    found, origin = value(load(None, {variable: text}, {}), key)
    assert (found, origin) == (expected, variable)
    assert type(found) is type(expected)


URLS = ("api.origins", "sources.hf_endpoint")


def test_every_key_has_a_variable() -> None:
    for key in settings._types():
        variable = "OLLAMAD_" + key.upper().replace(".", "__")
        default = dict(walk(load(None, {}, {}).settings))[key]
        given = str(default).lower() or ("https://a.b" if key in URLS else SECRET)
        assert value(load(None, {variable: given}, {}), key)[1] == variable
    assert set(ENVIRONMENT.values()) <= set(settings._types())


@pytest.mark.parametrize("variable", ["OLLAMA_JWT_SECRET", "LOG_LEVEL", "OLLAMA_KEEP_ALIVE"])
def test_an_empty_variable_is_not_set(variable: str) -> None:
    key = ENVIRONMENT[variable]
    assert value(load(None, {variable: ""}, {}), key)[1] == "default"


@pytest.mark.parametrize(
    "variable", ["OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_CONTEXT_LENGTH"]
)
def test_what_ollama_calls_automatic_is_the_default(variable: str) -> None:
    key = ENVIRONMENT[variable]
    assert value(load(None, {variable: "0"}, {}), key) == value(load(None, {}, {}), key)


def test_variables_of_others_are_left_alone() -> None:
    others = {
        "OLLAMA_HOST": "x",
        "OLLAMAD_ADMIN_PASSWORD": "x",
        "OLLAMAD_TEST_MODEL": "x",
        "OLLAMA_DIST_HOST": "x",
        "PATH": "x",
    }
    assert {origin.text for origin in load(None, others, {}).origins.values()} == {"default"}


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("OLLAMAD_LOG__LEVLE", "did you mean log.level?"),
        ("OLLAMAD_ENGINE__KEEPALIVE", "did you mean engine.keep_alive?"),
        ("OLLAMAD_KEEP_ALIVE", "did you mean engine.keep_alive?"),
        ("OLLAMAD_ZZZ", "there is no setting 'zzz'$"),
    ],
)
def test_unknown_variables_are_named_with_the_nearest(variable: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as caught:
        load(None, {variable: "x"}, {})
    assert str(caught.value).startswith(variable)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("api:\n  listen: x\n", 2, "api.listen cannot be 'x': use host:port"),
        ("api:\n  listen: 0.0.0.0:99999\n", 2, "0 to 65535"),
        ("api:\n\n\n  lisen: x\n", 4, "no setting 'api.lisen'; did you mean api.listen?"),
        ("apii:\n  listen: x\n", 1, "no setting 'apii'"),
        ("log: {level: loud}\n", 1, "use one of debug, info, warning, error"),
        ("log: {format: xml}\n", 1, "use one of text, json"),
        ("\nengine:\n  num_parallel: many\n", 3, "engine.num_parallel cannot be 'many'"),
        ("engine:\n  num_parallel: 0\n", 2, "1 or more"),
        ("engine:\n  num_parallel: 1.5\n", 2, "Expected `int`"),
        ("engine:\n  max_queue: -1\n", 2, "0 or more"),
        ("engine:\n  context_length: 7\n", 2, "8 or more"),
        ("engine:\n  keep_alive: soon\n", 2, "use a duration such as"),
        ("engine:\n  keep_alive: .nan\n", 2, "use a duration such as"),
        ("engine:\n  keep_alive: [1]\n", 2, "Expected `str`"),
        ("engine:\n  keep_alive:\n", 2, "Expected `str`"),
        ("models: {replicas: 0}\n", 1, "1 or more"),
        ("auth:\n  loopback_role: root\n", 2, "use one of none, viewer"),
        ("auth:\n  token_ttl: 0\n", 2, "use 15m to 1h"),
        ("auth:\n  token_ttl: -5m\n", 2, "use 15m to 1h"),
        ("node: {bootstrap: perhaps}\n", 1, "node.bootstrap cannot be 'perhaps'"),
        ("api: x\n", 1, "api must be a mapping"),
        ("api:\n  - listen\n", 2, "api must be a mapping"),
        ("- api\n", 1, "the file must be a mapping"),
        ("just text\n", 1, "the file must be a mapping"),
        ("api:\n  listen: 'x\n", 3, "not valid YAML"),
        ("api:\n\tlisten: x\n", 2, "not valid YAML"),
        ("log: {level: !!python/name:os.system x}\n", 1, "not valid YAML"),
        ("node: {name: !secret x}\n", 1, "not valid YAML"),
        ("node:\n  name: 2024-13-45\n", 2, "node.name"),
        ("node: {name: \0}\n", 1, "not valid YAML"),
        ("? [a, b]\n: c\n", 1, "there is no setting"),
        ("? {a: b}\n: c\n", 1, "there is no setting"),
        ("1: 2\n", 1, "there is no setting '1'"),
        ("log:\n  level: info\n  level: debug\n", 3, "log.level is given twice"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    directory = write(tmp_path, config=text)
    with pytest.raises(ConfigError) as caught:
        load(directory, {}, {})
    assert str(caught.value).startswith(f"{tmp_path}/config.yaml:{line}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "api: {}\n", "api:\n  # listen: x\nlog:\n"]
)
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    effective = load(write(tmp_path, config=text), {}, {})
    assert {origin.text for origin in effective.origins.values()} == {"default"}


@pytest.mark.parametrize(("text", "expected"), [("300", "300"), ("-1", "-1"), ("0.5", "0.5")])
def test_a_number_of_seconds_needs_no_quotes(tmp_path: Path, text: str, expected: str) -> None:
    effective = load(write(tmp_path, config=f"engine: {{keep_alive: {text}}}\n"), {}, {})
    assert effective.settings.engine.keep_alive == expected


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        load(tmp_path, {}, {})


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load(tmp_path / "nowhere", {}, {})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OLLAMA_NUM_PARALLEL": "two"}, "OLLAMA_NUM_PARALLEL: engine.num_parallel cannot be"),
        ({"API_LISTEN": "8080"}, "API_LISTEN: api.listen cannot be '8080'"),
        ({"BOOTSTRAP": "yes please"}, "BOOTSTRAP: node.bootstrap cannot be"),
    ],
)
def test_bad_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environment, {})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["[hunter2]", "hunter2", "{hunter2: 1}"])
def test_a_bad_secret_is_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, config=f"auth:\n  jwt_secret: {text}\n"), {}, {})
    assert "hunter2" not in str(caught.value)
    assert "***" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:8080", ("0.0.0.0", 8080)),
        ("localhost:0", ("localhost", 0)),
        (":8080", ("0.0.0.0", 8080)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]:1", ("::", 1)),
        ("/ip4/0.0.0.0/tcp/9000", ("0.0.0.0", 9000)),
        ("/ip4/10.0.0.1/tcp/1/", ("10.0.0.1", 1)),
        ("/ip6/::1/tcp/9000", ("::1", 9000)),
        ("/dns/host.lan/tcp/9000", ("host.lan", 9000)),
        ("/dns4/host.lan/tcp/9000", ("host.lan", 9000)),
    ],
)
def test_listen_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8080",
        "host",
        "host:",
        "host:x",
        "host:-1",
        "host:65536",
        "host: 1",
        "host:²",
        "/ip4/0.0.0.0/udp/9000",
        "/ip4/0.0.0.0/tcp/9000/p2p/Qm",
        "/ip4/0.0.0.0/tcp/99999",
        "/ip4//tcp/1",
        "/unix/x",
    ],
)
def test_listen_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|0 to 65535"):
        parse_listen(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("-1s", -1),
        ("-1", -1),
        ("+2m", 120),
        ("0", 0),
        ("90", 90),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1m30.5s", 90.5),
        ("250ms", 0.25),
        ("10us", 1e-5),
        ("10µs", 1e-5),
        ("7ns", 7e-9),
        (" 5m ", 300),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "m", "5 m", "5x", "5m5", "h5", "--1s", "1d", "nan", "inf", "-inf", "1e999", "1_0"]
)
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="use a duration"):
        parse_duration(text)


def test_where_state_is_kept() -> None:
    assert settings.default_data_dir({}, is_root=True) == Path("/var/lib/ollamad")
    home = settings.default_data_dir({}, is_root=False)
    assert home == Path("~/.local/share/ollamad").expanduser()
    assert settings.default_data_dir({"XDG_DATA_HOME": "/x"}, is_root=False) == Path("/x/ollamad")


def test_where_settings_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    assert settings.default_config_dir(data) in (None, Path("/etc/ollamad"))
    write(data / "config", node="")
    assert settings.default_config_dir(data) == data / "config"
    write(tmp_path / "config", config="")
    assert settings.default_config_dir(data) == Path("config")


@pytest.mark.parametrize("which", ["config", "config/node.yaml"])
def test_settings_that_somebody_else_could_have_left_there_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "config", node="")
    (tmp_path / which).chmod(0o777)
    with pytest.raises(ConfigError, match=f"{which} can be changed by others.*--config"):
        settings.default_config_dir(tmp_path / "data")
    (tmp_path / which).chmod(0o755)
    assert settings.default_config_dir(tmp_path / "data") == Path("config")
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    if stranger == 1:  # what is root's may be used by everybody
        os.chown(tmp_path / which, 2, -1)
    with pytest.raises(ConfigError, match=f"{which} can be changed by others"):
        settings.default_config_dir(tmp_path / "data")


def test_a_directory_of_settings_that_is_closed_to_us_is_told_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    write(data / "config", node="")
    write(tmp_path / "config", node="")
    close(monkeypatch, tmp_path / "config")
    with pytest.raises(ConfigError, match=r"^config/config.yaml: cannot be read: .*--config"):
        settings.default_config_dir(data)
    close(monkeypatch, tmp_path)  # whose it is, nobody knows, nor whether it is there
    assert settings.default_config_dir(data) in (None, Path("/etc/ollamad"))
    with pytest.raises(ConfigError, match="data/config: cannot be read"):
        settings.load(data / "config", {}, {})


def close(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Permit no look into a directory; for root there is none of which the modes could do it."""
    real = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if directory in path.absolute().parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", stat)


def test_secrets_that_everybody_can_read_are_told(tmp_path: Path) -> None:
    write(tmp_path, config=f"auth:\n  jwt_secret: {'s' * 32}\n", node="sources:\n  hf_token: hf\n")
    for name in settings.CONFIG_FILES:
        (tmp_path / name).chmod(0o644)
    (tmp_path / "node.yaml").chmod(0o640)
    effective = load(tmp_path, {}, {})
    assert effective.files == {tmp_path / name for name in settings.CONFIG_FILES}
    [line] = settings.list_exposed_secrets(effective)
    assert str(tmp_path / "config.yaml") in line
    assert "auth.jwt_secret" in line
    assert "s" * 32 not in line
    variable = load(None, {"OLLAMA_JWT_SECRET": "s" * 32}, {})
    assert settings.list_exposed_secrets(variable) == []


# The command.


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of the machine takes part."""
    for variable in [*ENVIRONMENT, "OLLAMAD_ADMIN_PASSWORD"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("clean")
def test_config_shows_values_and_origins_and_masks_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_JWT_SECRET", SECRET)
    directory = write(tmp_path / "c", node="node:\n  bootstrap: yes\nlog: {level: debug}\n")
    code, out, _ = run("config", "--config", str(directory), "--data-dir", "d")
    assert code == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert rows["auth.jwt_secret"] == ["********", "OLLAMA_JWT_SECRET"]
    assert "hunter2" not in out
    assert rows["node.bootstrap"] == ["true", f"{directory}/node.yaml:2"]
    assert rows["log.level"] == ["debug", f"{directory}/node.yaml:3"]
    assert rows["data_dir"] == [str(tmp_path / "d"), "command line"]
    assert rows["node.name"] == ['""', "default"]
    assert set(rows) == set(settings._types())
    assert set(rows) >= SECRETS


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("command", ["config", "start"])
def test_a_bad_setting_stops_the_program_with_one_line(tmp_path: Path, command: str) -> None:
    directory = write(tmp_path / "c", config="log: {level: loud}\n")
    code, out, err = run(command, "--config", str(directory), "--data-dir", str(tmp_path / "d"))
    assert (code, out) == (2, "")
    assert err.startswith(f"ollamad: {directory}/config.yaml:1: log.level cannot be 'loud'")
    assert err.count("\n") == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.usefixtures("clean")
def test_join_and_bootstrap_exclude_each_other() -> None:
    code, _, err = run("start", "--join", "x", "--bootstrap")
    assert (code, err) == (2, "ollamad: --join and --bootstrap exclude each other\n")


@pytest.mark.usefixtures("clean")
def test_dev_refuses_to_listen_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_LISTEN", "0.0.0.0:8080")
    code, _, err = run("start", "--dev")
    assert code == 2
    assert "API_LISTEN: api.listen is 0.0.0.0:8080, but --dev" in err


@pytest.mark.usefixtures("clean")
def test_dev_keeps_loopback_addresses_and_sets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[Any]()
    monkeypatch.setattr("ollamad.start.run", lambda *args: started.append(args))
    monkeypatch.setenv("P2P_LISTEN", "/ip4/127.0.0.2/tcp/1")
    assert run("start", "--dev", "--data-dir", str(tmp_path / "d"))[0] == 0
    [(found, directory, invitation, _)] = started
    assert found.api.listen == "127.0.0.1:8080"
    assert found.p2p.listen == "/ip4/127.0.0.2/tcp/1"
    assert found.auth.loopback_role == "admin"
    assert directory == tmp_path / "d"
    assert invitation is None


@pytest.mark.usefixtures("clean")
def test_a_daemon_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ollamad.errors import StartError

    def fail(*_: object) -> None:
        raise StartError("the port is in use")

    monkeypatch.setattr("ollamad.start.run", fail)
    code, _, err = run("start", "--data-dir", str(tmp_path / "d"))
    assert (code, err) == (1, "ollamad: the port is in use\n")


def test_version() -> None:
    code, out, _ = run("version")
    assert code == 0
    assert out.startswith("ollamad 0.")
    assert "commit" in out


@pytest.mark.parametrize("text", ["auto", "off", "127.0.0.1:11434", "0.0.0.0:11435"])
def test_where_ollamas_clients_are_listened_for(text: str) -> None:
    variable = "OLLAMAD_API__OLLAMA_LISTEN"
    assert value(load(None, {variable: text}, {}), "api.ollama_listen") == (text, variable)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OLLAMAD_API__OLLAMA_LISTEN", "on"),
        ("OLLAMAD_API__OLLAMA_LISTEN", "localhost"),
        ("OLLAMA_ORIGINS", "https://a.example,b.example"),
    ],
)
def test_bad_addresses_and_origins_are_refused(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        load(None, {variable: text}, {})


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20MB", 20e6),
        ("20 MB/s", 20e6),
        ("20MiB", 20 * 2**20),
        ("1.5GB", 1.5e9),
        ("500k", 500e3),
        ("25mb", 25e6),
        ("100Mbit", 12.5e6),
        ("100Mbps", 12.5e6),
        ("1Gbit/s", 125e6),
        ("5000", 5000.0),
        ("0", None),
        ("unlimited", None),
    ],
)
def test_rates(text: str, rate: float | None) -> None:
    assert settings.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1MB", "10XB", "1e9", "10MB/h", "1", "nan"])
def test_rates_that_are_none_say_what_to_do(text: str) -> None:
    with pytest.raises(ValueError, match="0 for no limit"):
        settings.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("off", False), ("on", True), ("No", False), ("true", True)]
)
def test_encryption_is_switched_off_in_either_spelling(
    tmp_path: Path, text: str, expected: bool
) -> None:
    (tmp_path / "config.yaml").write_text(f"transfer:\n  encryption: {text}\n")
    assert load(tmp_path, {}, {}).settings.transfer.encryption is expected
    variable = {"OLLAMAD_TRANSFER__ENCRYPTION": text}
    assert load(None, variable, {}).settings.transfer.encryption is expected


# The table in the documentation.

DOCS = Path(__file__).parent.parent.parent / "docs"


def documented(page: str) -> dict[str, tuple[str, str]]:
    """The settings of a table: variable and default by key. One line a key, each once."""
    found: dict[str, tuple[str, str]] = {}
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("| `") and re.fullmatch(r"`[a-z0-9_]+(\.[a-z0-9_]+)?`", cells[1]):
            key = cells[1].strip("`")
            assert key not in found, f"{key} is there twice"
            found[key] = (cells[2].strip("`"), cells[3].strip("`"))
    return found


def test_every_setting_is_documented_with_its_variable_and_default() -> None:
    """Those of `sources` have a page of their own."""
    table = documented("operations.md")
    variables = {key: variable for variable, key in ENVIRONMENT.items()}
    expected = {}
    for key, value in walk(Settings()):
        if not key.startswith("sources."):
            text = str(value).lower() if isinstance(value, bool) else f"{value}"
            text = f"{value:g}" if isinstance(value, float) else text
            expected[key] = (variables.get(key, ""), text)
    assert table == expected
    sources = documented("sources.md")
    assert sources.keys() == {key for key, _ in walk(Settings()) if key.startswith("sources.")}
    for key, variable in variables.items():
        if key.startswith("sources."):
            assert f"`{variable}`" in (DOCS / "sources.md").read_text()
