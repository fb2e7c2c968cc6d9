"""Signing in: what is stored, how it is refreshed, and which token goes where."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ollama_dist import credentials
from ollama_dist.address import parse_address
from ollama_dist.client import Api
from ollama_dist.client import path as url_path
from ollama_dist.credentials import Login
from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli
from tests.fakes.fake_api import FakeApi, error

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home

LOGIN = ("auth", "login", "-u", "admin", "--password-stdin")


@pytest.fixture
def guarded(fake_api: FakeApi) -> FakeApi:
    """An API that wants a token for everything."""
    fake_api.tokens = set()
    return fake_api


def stored(home: Path) -> dict[str, Any]:
    hosts = json.loads((home / "config/ollama-dist/credentials.json").read_text())["hosts"]
    assert isinstance(hosts, dict)
    return hosts


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def sign_in(cli: Cli) -> None:
    result = cli(*LOGIN, stdin="secret\n")
    assert result.exit_code == 0, result.output


def leave_token(home: Path, token: str, folder: str = ".local/share/ollamad") -> Path:
    file = home / folder / "cli-token"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{token}\n")
    return file


def test_login_stores_the_tokens_privately(cli: Cli, guarded: FakeApi, home: Path) -> None:
    old_umask = os.umask(0)
    try:
        result = cli(*LOGIN, stdin="secret\n")
    finally:
        os.umask(old_umask)
    assert result.exit_code == 0
    assert result.stdout == f"Signed in at {guarded.url} as admin (role admin).\n"
    assert stored(home)[guarded.url] == {
        "token": "token-1",
        "refresh_token": "refresh-1",
        "expires_at": "2999-01-01T00:00:00Z",
        "username": "admin",
    }
    folder = home / "config/ollama-dist"
    assert mode(folder) == 0o700
    assert {file.name: mode(file) for file in folder.iterdir()} == {
        "credentials.json": 0o600,
        "credentials.lock": 0o600,
    }


def test_login_as_data_keeps_the_tokens_out_of_the_output(cli: Cli, guarded: FakeApi) -> None:
    result = cli(*LOGIN, "-o", "json", stdin="secret\n")
    assert json.loads(result.stdout)["user"]["role"] == "admin"
    assert "token-1" not in result.output
    assert "refresh-1" not in result.output


def test_a_wrong_password_is_4(cli: Cli, guarded: FakeApi, home: Path) -> None:
    result = cli(*LOGIN, stdin="guess\n")
    assert result.exit_code == 4
    assert result.stderr == "Error: wrong user name or password\n"
    assert not (home / "config/ollama-dist/credentials.json").exists()


def test_login_sends_no_other_token_along(cli: Cli, guarded: FakeApi, home: Path) -> None:
    leave_token(home, "of-the-daemon")
    sign_in(cli)
    assert guarded.asked("POST", "/auth/login")[0].token is None


def test_the_stored_token_is_used_and_logout_ends_it(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    assert cli("models", "list").exit_code == 4
    sign_in(cli)
    assert cli("models", "list").exit_code == 0
    result = cli("auth", "whoami")
    assert result.stdout == f"admin (role admin) at {guarded.url}, by the stored sign-in\n"
    assert json.loads(cli("auth", "whoami", "-o", "json").stdout)["user"]["id"] == "u1"
    result = cli("auth", "logout")
    assert result.stdout == f"Signed out at {guarded.url}.\n"
    assert guarded.tokens == set()
    assert stored(home) == {}
    assert cli("models", "list").exit_code == 4
    assert cli("auth", "logout").exit_code == 1


def test_each_host_has_its_own_sign_in(cli: Cli, guarded: FakeApi, home: Path) -> None:
    sign_in(cli)
    with FakeApi() as other:
        assert cli.bare("--host", other.url, "models", "list").exit_code == 0
        assert other.requests[-1].token is None
        assert cli.bare("--host", other.url, *LOGIN, stdin="secret\n").exit_code == 0
        assert set(stored(home)) == {guarded.url, other.url}
        assert cli.bare("--host", other.url, "auth", "logout").exit_code == 0
    assert set(stored(home)) == {guarded.url}


def test_logout_without_the_daemon_forgets_the_sign_in(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    nobody = parse_address("127.0.0.1:1")
    credentials.save_login(nobody, Login("a", "b"))
    result = cli.bare("--host", "127.0.0.1:1", "auth", "logout")
    assert result.exit_code == 0
    assert "Forgotten here only" in result.stderr
    assert credentials.load_login(nobody) is None


def test_logout_of_an_expired_sign_in_forgets_it(cli: Cli, guarded: FakeApi, home: Path) -> None:
    credentials.save_login(parse_address(guarded.url), Login("dead", "dead too"))
    assert cli("auth", "logout").exit_code == 0
    assert stored(home) == {}


def test_a_refused_token_is_refreshed_once(cli: Cli, guarded: FakeApi, home: Path) -> None:
    sign_in(cli)
    guarded.tokens = set()  # as after its expiry
    assert cli("models", "list").exit_code == 0
    assert [each.token for each in guarded.asked("GET", "/models")] == ["token-1", "token-1+"]
    assert stored(home)[guarded.url]["token"] == "token-1+"
    assert stored(home)[guarded.url]["username"] == "admin"
    # The new pair works by itself the next time.
    assert cli("models", "list").exit_code == 0
    assert len(guarded.asked("POST", "/auth/refresh")) == 1


def test_an_expired_token_is_refreshed_before_it_is_sent(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    address = parse_address(guarded.url)
    guarded.refresh_tokens["r"] = "fresh"
    credentials.save_login(address, Login("old", "r", "2020-01-01T00:00:00Z"))
    assert cli("models", "list").exit_code == 0
    assert [each.token for each in guarded.asked("GET", "/models")] == ["fresh"]


def test_a_refresh_that_is_refused_says_to_sign_in(cli: Cli, guarded: FakeApi) -> None:
    credentials.save_login(parse_address(guarded.url), Login("dead", "dead too"))
    result = cli("models", "list")
    assert result.exit_code == 4
    assert "has expired" in result.stderr
    assert f"ollama-dist --host {guarded.url} auth login" in result.stderr


def test_a_refreshed_token_that_is_refused_ends_it(cli: Cli, guarded: FakeApi) -> None:
    sign_in(cli)
    guarded.tokens = None
    guarded.answers["GET", "/models"] = error(401, "no")
    assert cli("models", "list").exit_code == 4
    assert len(guarded.asked("POST", "/auth/refresh")) == 1


def test_two_runs_that_refresh_at_once_spend_one_refresh_token(
    guarded: FakeApi, home: Path
) -> None:
    address = parse_address(guarded.url)
    guarded.refresh_tokens["r"] = "fresh"
    credentials.save_login(address, Login("old", "r"))
    apis = [Api(address), Api(address)]  # both have read the old token
    problems: list[BaseException] = []

    def ask(api: Api) -> None:
        try:
            api.get(url_path("models"))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=ask, args=(api,)) for api in apis]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for api in apis:
        api.close()
    assert not problems
    assert len(guarded.asked("POST", "/auth/refresh")) == 1


def test_streams_are_refreshed_too(cli: Cli, guarded: FakeApi) -> None:
    sign_in(cli)
    guarded.tokens = set()
    assert cli("run", "m", "hi").stdout.startswith("Hello")


def test_a_given_token_is_neither_refreshed_nor_replaced(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    sign_in(cli)
    leave_token(home, "token-1")
    result = cli("models", "list", "--token", "mine")
    assert result.exit_code == 4
    assert [each.token for each in guarded.asked("GET", "/models")] == ["mine"]


def test_the_daemons_own_token_signs_in_on_this_host(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    guarded.tokens = {"of-the-daemon"}
    file = leave_token(home, "of-the-daemon")
    result = cli("auth", "whoami")
    assert result.stdout.endswith(f"by {file}\n")


def test_the_data_directory_may_be_elsewhere(
    cli: Cli, guarded: FakeApi, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.tokens = {"right"}
    leave_token(home, "wrong")
    leave_token(home, "right", "data")
    monkeypatch.setenv("OLLAMAD_DATA_DIR", str(home / "data"))
    assert cli("models", "list").exit_code == 0
    assert [each.token for each in guarded.requests] == ["right"]


def test_a_sign_in_goes_before_the_daemons_own_token(
    cli: Cli, guarded: FakeApi, home: Path
) -> None:
    leave_token(home, "of-the-daemon")
    sign_in(cli)
    assert cli("models", "list").exit_code == 0
    assert guarded.requests[-1].token == "token-1"


def test_the_daemons_own_token_never_leaves_this_host(home: Path) -> None:
    leave_token(home, "of-the-daemon")
    assert credentials.local_tokens(parse_address("127.0.0.1"))[0][0] == "of-the-daemon"
    for host in ("box", "10.0.0.1", "localhost.evil.example", "https://127.0.0.1.evil.example"):
        assert credentials.local_tokens(parse_address(host)) == []


def test_a_token_of_another_cluster_does_not_take_away_what_needs_none(
    cli: Cli, fake_api: FakeApi, home: Path
) -> None:
    leave_token(home, "stale")
    fake_api.tokens = {None}  # as `auth.loopback_role` has it
    assert cli("models", "list").exit_code == 0
    assert [each.token for each in fake_api.asked("GET", "/models")] == ["stale", None]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"two\nlines", b"x" * 20_000])
def test_what_is_no_token_file_is_passed_over(
    cli: Cli, fake_api: FakeApi, home: Path, content: bytes
) -> None:
    leave_token(home, "").write_bytes(content)
    assert cli("models", "list").exit_code == 0
    assert len(fake_api.requests[-1].token or "") <= 16 * 1024


def test_a_damaged_credentials_file_is_told(cli: Cli, home: Path) -> None:
    file = home / "config/ollama-dist/credentials.json"
    file.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"hosts": 1}', "\xff"):
        file.write_text(content)
        result = cli("models", "list")
        assert result.exit_code == 1
        assert f"Error: {file} is damaged. Delete it" in result.stderr


def test_a_write_that_fails_leaves_the_old_file(
    cli: Cli, guarded: FakeApi, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(cli)
    before = stored(home)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ollama_dist.credentials.os.fsync", full)
    result = cli(*LOGIN, stdin="secret\n")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert stored(home) == before
    assert sorted(file.name for file in (home / "config/ollama-dist").iterdir()) == [
        "credentials.json",
        "credentials.lock",
    ]


def test_the_proxies_of_the_environment_see_nothing(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert cli("models", "list").exit_code == 0
    assert fake_api.requests
