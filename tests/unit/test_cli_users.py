"""`ollama-dist users` and `keys`: what is asked, what is shown, and what never is."""

import json
from typing import Any

import pytest
import yaml
from typer.testing import Result

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli
from tests.fakes.fake_api import Answer, FakeApi, error
from tests.unit.test_cli_commands import completions, ok

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home

EVE = {
    "id": "eve",
    "username": "eve",
    "role": "operator",
    "created_at": "2024-01-15T10:00:00Z",
}
KEY = {
    "id": "0123456789ab",
    "name": "agent",
    "role": "inference",
    "created_at": "2024-01-15T10:00:00Z",
    "created_by": "admin",
    "expires_at": None,
    "expired": False,
    "request_quota": 100,
    "token_quota": None,
    "quota_period": "day",
    "used": {"requests": 7, "tokens": 1234},
    "resets_at": "2024-01-16T00:00:00Z",
}


@pytest.fixture(autouse=True)
def access(fake_api: FakeApi) -> None:
    done = Answer(200, {"message": "it is done"})
    fake_api.answers |= {
        ("GET", "/users"): Answer(200, {"users": [EVE]}),
        ("POST", "/users"): Answer(201, {"user": EVE}),
        ("DELETE", "/users/eve"): done,
        ("POST", "/users/eve/password"): done,
        ("POST", "/users/eve/role"): done,
        ("GET", "/keys"): Answer(200, {"keys": [KEY]}),
        ("POST", "/keys"): Answer(201, KEY | {"key": "odk_0123456789ab_secret"}),
        ("DELETE", "/keys/0123456789ab"): done,
    }


def sent(fake_api: FakeApi) -> Any:
    return fake_api.requests[-1].json


def test_users_are_listed_in_every_form(cli: Cli) -> None:
    lines = ok(cli("users", "list")).splitlines()
    assert lines[0].split() == ["NAME", "ROLE", "CREATED"]
    assert lines[1].split()[:2] == ["eve", "operator"]
    assert json.loads(ok(cli("users", "list", "-o", "json"))) == {"users": [EVE]}
    assert yaml.safe_load(ok(cli("users", "list", "-o", "yaml"))) == {"users": [EVE]}


def test_a_user_is_added_with_a_password_from_stdin(cli: Cli, fake_api: FakeApi) -> None:
    added = cli("users", "add", "eve", "--role", "operator", "--password-stdin", stdin="s3cret ü\n")
    assert ok(added) == "User eve may sign in (role operator).\n"
    assert sent(fake_api) == {"username": "eve", "password": "s3cret ü", "role": "operator"}
    assert "s3cret" not in added.output
    for stdin, words in (("", "stdin has no line"), (None, "stdin has no line")):
        empty = cli("users", "add", "eve", "--password-stdin", stdin=stdin)
        assert empty.exit_code == 2
        assert words in empty.stderr
    nobody = cli("users", "add", "eve")
    assert nobody.exit_code == 2
    assert "--password-stdin" in nobody.stderr


@pytest.mark.parametrize(
    "command", [("users", "rm", "eve"), ("keys", "rm", "0123456789ab")], ids=" ".join
)
def test_what_cannot_be_undone_is_asked(
    cli: Cli, fake_api: FakeApi, command: tuple[str, ...]
) -> None:
    unasked = cli(*command, stdin="y\n")
    assert unasked.exit_code == 2
    assert "--yes" in unasked.stderr
    assert not fake_api.requests
    assert ok(cli(*command, "--yes")) == "it is done\n"
    assert json.loads(ok(cli(*command, "-y", "-o", "json"))) == {"message": "it is done"}


def test_a_password_is_set_and_the_current_one_only_asked_for_when_needed(
    cli: Cli, fake_api: FakeApi
) -> None:
    command = ("users", "passwd", "eve", "--password-stdin")
    assert ok(cli(*command, stdin="new one\n")) == "it is done\n"
    assert sent(fake_api) == {"password": "new one"}
    fake_api.answers["POST", "/users/eve/password"] = error(
        400, "current_password is missing", "INVALID_REQUEST", field="current_password"
    )
    asked = cli(*command, stdin="new one\nold one\n")
    assert asked.exit_code == 1  # this fake never has enough
    assert sent(fake_api) == {"password": "new one", "current_password": "old one"}
    assert cli(*command, stdin="new one\n").exit_code == 2
    fake_api.answers["POST", "/users/eve/password"] = error(
        400, "password must have at least 8 characters", "INVALID_REQUEST", field="password"
    )
    assert "at least 8" in cli(*command, stdin="x\n").stderr


def test_keys_are_listed_with_what_they_used(cli: Cli) -> None:
    head, row = ok(cli("keys", "list")).splitlines()
    assert head.split() == ["ID", "NAME", "ROLE", "CREATED", "EXPIRES", "REQUESTS", "TOKENS", "PER"]
    cells = row.split()
    assert cells[:3] == ["0123456789ab", "agent", "inference"]
    assert cells[-4:] == ["never", "7/100", "1234", "day"]
    assert json.loads(ok(cli("keys", "list", "-o", "json"))) == {"keys": [KEY]}


def test_a_key_alone_is_on_stdout(cli: Cli, fake_api: FakeApi) -> None:
    options = ("--requests", "100", "--tokens", "0", "--per", "day", "--ttl", "7d")
    made: Result = cli("keys", "create", "agent", "--role", "viewer", *options)
    assert ok(made) == "odk_0123456789ab_secret\n"
    assert "not shown again" in made.stderr
    assert sent(fake_api) == {
        "name": "agent",
        "role": "viewer",
        "quota_period": "day",
        "ttl_seconds": 7 * 86400,
        "request_quota": 100,
        "token_quota": 0,
    }
    ok(cli("keys", "create", "plain"))
    assert sent(fake_api) == {"name": "plain", "role": "inference", "quota_period": "total"}
    data = json.loads(ok(cli("keys", "create", "agent", "-o", "json")))
    assert data["key"] == "odk_0123456789ab_secret"
    wrong = cli("keys", "create", "agent", "--ttl", "soon")
    assert wrong.exit_code == 2
    assert "--ttl" in wrong.stderr


def test_names_are_completed(cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"ollama-dist --host {fake_api.url}"
    for line, expected in (
        ("users rm ", ["eve"]),
        ("users passwd e", ["eve"]),
        ("keys rm 01", ["0123456789ab"]),
        ("keys create x --role v", ["viewer"]),
        ("keys create x --per m", ["minute", "month"]),
        ("users add x --role ", ["viewer", "inference", "operator", "admin"]),
    ):
        assert completions(cli, f"{program} {line}", monkeypatch) == expected, line


def test_a_role_is_changed(cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ok(cli("users", "role", "eve", "operator")) == "it is done\n"
    assert fake_api.requests[-1].path.endswith("/users/eve/role")
    assert sent(fake_api) == {"role": "operator"}
    fake_api.answers[("POST", "/users/eve/role")] = error(400, "role must be…")
    wrong = cli("users", "role", "eve", "root")
    assert (wrong.exit_code, wrong.stderr.strip()) == (1, "Error: role must be…")
    assert "operator" in completions(cli, "ollama-dist users role eve ", monkeypatch)
