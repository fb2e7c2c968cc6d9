"""`ollama-dist doctor`: what it finds, and what it says to do."""

import json
from importlib.metadata import version

import pytest

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli, lines_with, ok
from tests.fakes.fake_api import ALPHA, BETA, GAMMA, FakeApi, error, model, node, transfer

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home
OWN_VERSION = version("ollama-distributed")


@pytest.fixture(autouse=True)
def healthy(fake_api: FakeApi) -> None:
    """Three nodes of this program's version, and nothing wrong."""
    names = zip((ALPHA, BETA, GAMMA), ("alpha", "beta", "gamma"), strict=True)
    fake_api.nodes = [node(identity, name, version=OWN_VERSION) for identity, name in names]
    fake_api.models = [model("smollm2:135m", replicas_wanted=2)]
    fake_api.version["version"] = OWN_VERSION


def test_a_healthy_cluster(cli: Cli, fake_api: FakeApi) -> None:
    shown = ok(cli("doctor"))
    assert lines_with(shown, "ok", "access", "you are admin, role admin")
    assert lines_with(shown, "ok", "quorum", "3 of 3 voters online")
    assert lines_with(shown, "ok", "nodes", "3 of 3 online")
    assert lines_with(shown, "ok", "versions", f"{OWN_VERSION} everywhere")
    assert lines_with(shown, "ok", "room", "below 95%")
    assert lines_with(shown, "ok", "models", "1 model, all copies there")
    assert lines_with(shown, "ok", "transfers", "1 running, none failed")
    assert not lines_with(shown, "!")
    data = json.loads(ok(cli("doctor", "-o", "json")))
    assert data["healthy"] is True
    assert {each["grade"] for each in data["findings"]} == {"ok"}


def test_a_node_that_is_gone_is_a_warning(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[1] |= {"status": "offline"}
    shown = ok(cli("doctor"))
    assert lines_with(shown, "!", "quorum", "survives no further loss")
    assert lines_with(shown, "!", "nodes", "1 node of 3 offline: beta")
    assert "ollama-dist cluster leave NODE" in shown
    assert lines_with(shown, "!", "models", "smollm2:135m (1 of 2)")


def test_a_lost_majority_and_a_lost_model_are_problems(cli: Cli, fake_api: FakeApi) -> None:
    for lost in fake_api.nodes[:2]:
        lost["status"] = "offline"
    fake_api.cluster |= {"has_quorum": False, "leader": ""}
    result = cli("doctor")
    assert result.exit_code == 1
    assert "Error: 2 problems found" in result.stderr
    assert lines_with(result.stdout, "x", "quorum", "lost: 1 of 3 voters online")
    assert "ollamad recover" in result.stdout
    assert lines_with(result.stdout, "x", "models", "on no node that is online: smollm2:135m")
    data = cli("doctor", "-o", "json")
    assert data.exit_code == 1
    assert json.loads(data.stdout)["healthy"] is False


def test_what_else_it_looks_at(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[0]["usage"]["disk_usage"] = 0.97
    fake_api.nodes[1]["usage"]["memory_usage"] = 0.99
    fake_api.nodes[1]["version"] = "0.0.9"
    fake_api.nodes[2]["draining"] = True
    fake_api.transfers = [[transfer("t1", status="failed", error="the origin said no")]]
    shown = ok(cli("doctor"))
    assert lines_with(shown, "!", "room", "disk nearly full: alpha 97%")
    assert lines_with(shown, "!", "room", "memory nearly full: beta 99%")
    assert lines_with(shown, "!", "versions", "nodes run 0.0.9")
    assert lines_with(shown, "!", "nodes", "takes no work: gamma")
    assert lines_with(shown, "!", "transfers", "smollm2:135m: the origin said no")


@pytest.mark.parametrize(("fault", "words"), [("disk_full", "is full"), ("disk_hangs", "answer")])
def test_a_log_that_cannot_be_written(cli: Cli, fake_api: FakeApi, fault: str, words: str) -> None:
    fake_api.consensus[fault] = True
    result = cli("doctor")
    assert result.exit_code == 1
    assert lines_with(result.stdout, "x", "log", words)


def test_many_names_are_cut(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.models = [model(f"m{index}", replicas=[]) for index in range(8)]
    result = cli("doctor")
    assert lines_with(result.stdout, "x", "models", "m0, m1, m2, m3, m4 and 3 more")


def test_nobody_answers(cli: Cli) -> None:
    result = cli("--host", "127.0.0.1:1", "doctor")
    assert result.exit_code == 3
    assert "systemctl status ollamad" in result.stderr


def test_who_may_not_look_is_told_so(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.answers["GET", "/auth/me"] = error(401, "authentication required", "UNAUTHORIZED")
    result = cli("doctor")
    assert result.exit_code == 4
    assert "authentication required" in result.stderr
