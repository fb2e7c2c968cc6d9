"""What goes wrong in ollama-dist: one line on stderr, what to do, and the exit code."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli
from tests.fakes.fake_api import Answer, FakeApi, error

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home


def failed(result: Any, exit_code: int) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return str(line)


def test_an_unknown_model_is_5_and_names_the_nearest(cli: Cli) -> None:
    line = failed(cli("models", "show", "smolm2"), 5)
    assert line == "Error: model 'smolm2' not found. Did you mean smollm2:135m?"


def test_what_the_daemon_suggests_in_its_words_is_not_said_twice(
    cli: Cli, fake_api: FakeApi
) -> None:
    told = error(404, "no m; did you mean mm?", suggestions=["mm"])
    fake_api.answers["GET", "/models/m"] = told
    assert failed(cli("models", "show", "m"), 5) == "Error: no m; did you mean mm?"


def test_an_unknown_node_is_5(cli: Cli) -> None:
    assert failed(cli("nodes", "drain", "nobody"), 5) == "Error: node 'nobody' not found"


@pytest.mark.parametrize(
    ("answer", "exit_code", "words"),
    [
        (error(400, "bad value", field="options.top_k"), 1, "bad value (field: options.top_k)"),
        (error(400, "top_k is bad", field="top_k"), 1, "Error: top_k is bad"),
        (error(401, "authentication required"), 4, "auth login"),
        (error(403, "this needs the role operator"), 4, "the role operator. Another user may"),
        (error(404, "no such route"), 5, "no such route"),
        (error(409, "the model is in use", node="alpha"), 1, "in use (node: alpha)"),
        (error(500, "internal error", id="ab12"), 1, "internal error (id: ab12)"),
        (error(503, "no quorum", nested={"a": 1}, retry_after=3), 1, "Error: no quorum"),
        (
            Answer(429, {"error": "slow down", "code": "X", "details": {}}, {"Retry-After": "7"}),
            1,
            "slow down. Try again in 7 s.",
        ),
        (Answer(502, b"<html>Bad gateway</html>"), 1, "does not answer like ollamad (status 502)"),
        (Answer(404, b"404 page not found"), 5, "does not answer like ollamad (status 404)"),
        (Answer(500, {"message": "other"}), 1, "does not answer like ollamad (status 500)"),
        (Answer(302, b"", {"Location": "http://elsewhere/"}), 1, "status 302"),
        (Answer(200, b"<html>Welcome</html>"), 1, "does not answer like ollamad"),
        (Answer(200, b"[1]"), 1, "does not answer like ollamad"),
        (error(400, "two\nlines \x1b[31m"), 1, "Error: two lines �[31m"),
    ],
)
def test_what_the_daemon_refuses(
    cli: Cli, fake_api: FakeApi, answer: Answer, exit_code: int, words: str
) -> None:
    fake_api.answers["GET", "/models"] = answer
    assert words in failed(cli("models", "list"), exit_code)
    # The same holds when the result is for a program.
    assert words in failed(cli("models", "list", "-o", "json"), exit_code)
    fake_api.answers["POST", "/chat"] = answer
    if answer.status != 200:
        assert words in failed(cli("run", "m", "hello"), exit_code)


def test_an_answer_without_the_keys_of_the_api_is_no_traceback(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_api.answers["GET", "/models"] = Answer(200, {"modules": []})
    monkeypatch.delenv("OLLAMA_DIST_DEBUG")
    assert "this is a bug: KeyError" in failed(cli("models", "list"), 1)
    monkeypatch.setenv("OLLAMA_DIST_DEBUG", "1")
    assert isinstance(cli("models", "list").exception, KeyError)


@contextmanager
def unused_port() -> Iterator[int]:
    """A port that is bound and does not listen, so that connecting to it is refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_nobody_there_is_3(cli: Cli) -> None:
    with unused_port() as port:
        line = failed(cli.bare("--host", f"localhost:{port}", "status"), 3)
    assert f"cannot connect to http://localhost:{port}: connection refused" in line
    assert "ollamad start" in line
    assert "--host" in line


def test_a_daemon_that_hangs_up_is_3(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)

        thread = threading.Thread(target=hang_up)
        thread.start()
        line = failed(cli.bare("--host", f"127.0.0.1:{server.getsockname()[1]}", "ps"), 3)
        thread.join()
    assert "was lost" in line


def test_a_daemon_that_never_answers_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from ollama_dist.client import Api

    defaults = dict(Api.__init__.__kwdefaults__ or {})
    monkeypatch.setattr(Api.__init__, "__kwdefaults__", {**defaults, "timeout_s": 0.05})
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = failed(cli.bare("--host", f"127.0.0.1:{server.getsockname()[1]}", "ps"), 1)
    assert "did not answer in time" in line


@pytest.mark.parametrize("host", ["ftp://box", "box:port", "http://u:p@box", "a b"])
def test_a_bad_host_is_2(cli: Cli, host: str) -> None:
    assert "is not a host" in failed(cli.bare("--host", host, "status"), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("models", "show"),
        ("models", "show", "a", "b"),
        ("models", "shwo", "a"),
        ("models", "list", "--nope"),
        ("models", "list", "-o", "xml"),
        ("models", "pull", "a", "--replicas", "0"),
        ("models", "pull", "a", "--replicas", "many"),
        ("nope",),
        (),
        ("models",),
    ],
)
def test_bad_usage_is_2(cli: Cli, fake_api: FakeApi, arguments: tuple[str, ...]) -> None:
    result = cli.bare(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr
    assert not fake_api.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models", "show", ""), "'' is not a name"),
        (("models", "rm", ".."), "'..' is not a name"),
        (("nodes", "drain", "."), "'.' is not a name"),
        (("cluster", "token", "--ttl", "soon"), "--ttl: 'soon' is not a duration"),
        (("generate", "m", "hi", "--option", "top_k"), "is not KEY=VALUE"),
        (("generate", "m", "hi", "--format", "xml"), "--format: use json"),
        (("generate", "m", "hi", "--format", "[1]"), "--format: use json"),
        (("generate", "m"), "there is no prompt"),
        (("embed", "m"), "there is no text"),
        (("run", "m"), "there is no prompt"),
        (("auth", "login", "--password-stdin"), "needs --username"),
        (("auth", "login"), "--password-stdin"),
    ],
)
def test_bad_values_are_2_and_ask_nobody(
    cli: Cli, fake_api: FakeApi, arguments: tuple[str, ...], words: str
) -> None:
    assert words in failed(cli(*arguments), 2)
    assert not fake_api.requests


def test_an_option_without_its_value_is_2(cli: Cli) -> None:
    assert "'--host' requires an argument" in failed(cli.bare("--host"), 2)


def test_a_misspelt_command_names_the_right_one(cli: Cli) -> None:
    assert "Did you mean 'status'?" in cli("statsu").stderr
