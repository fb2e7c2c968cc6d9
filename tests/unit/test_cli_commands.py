"""Every command of ollama-dist against a fake API: what it asks, and what it prints."""

import json

import pytest

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli, lines_with, ok
from tests.fakes.fake_api import ALPHA, BETA, FakeApi, model, node

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home


def test_status_shows_the_cluster_at_a_glance(cli: Cli) -> None:
    shown = ok(cli("status"))
    assert lines_with(shown, "Cluster", "healthy")
    assert lines_with(shown, "Nodes", "2 of 3 online")
    assert lines_with(shown, "Leader", "alpha")
    assert lines_with(shown, "* alpha", ALPHA[:10], "online", "45%", "67%")
    assert lines_with(shown, "beta", "draining")
    # What an offline node once used is not shown as if it were now.
    assert lines_with(shown, "gamma", "offline")
    assert "45%" not in lines_with(shown, "gamma")[0]
    assert lines_with(shown, "smollm2:135m", "98.1 MB", "134.52M", "Q4_1", "ago")
    assert "2 models, 196 MB" in shown
    assert "Versions differ" not in shown


def test_status_tells_when_versions_differ(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[1]["version"] = "0.2.0"
    assert "Versions differ: 0.1.0, 0.2.0" in ok(cli("status"))


def test_status_of_an_empty_cluster_says_what_to_do(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.models.clear()
    assert 'No models yet: try "ollama-dist models pull' in ok(cli("status"))


def test_status_as_data_holds_what_the_api_said(cli: Cli, fake_api: FakeApi) -> None:
    data = json.loads(ok(cli("-o", "json", "status")))
    assert data["cluster"] == fake_api.cluster
    assert data["nodes"] == fake_api.nodes
    assert data["models"] == fake_api.models
    assert data["version"]["version"] == "0.1.0"


@pytest.mark.parametrize(
    ("voters", "offline", "quorum", "words"),
    [
        (1, 0, True, "1 voter, it is the whole cluster"),
        (2, 0, True, "2 of 2 voters online; survives no loss, add a third node"),
        (3, 0, True, "3 of 3 voters online; survives the loss of 1"),
        (3, 1, True, "2 of 3 voters online; survives no further loss"),
        (5, 0, True, "5 of 5 voters online; survives the loss of 2"),
        (5, 1, True, "4 of 5 voters online; survives the loss of 1"),
        (2, 1, False, "lost: 1 of 2 voters online; nothing can change until 1 more is back"),
        (5, 4, False, "lost: 1 of 5 voters online; nothing can change until 2 more are back"),
    ],
)
def test_the_quorum_in_words(
    cli: Cli, fake_api: FakeApi, voters: int, offline: int, quorum: bool, words: str
) -> None:
    ids = [f"QmNode{index}" + "x" * 38 for index in range(voters)]
    fake_api.nodes = [
        node(each, f"n{index}", status="offline" if index < offline else "online")
        for index, each in enumerate(ids)
    ]
    fake_api.cluster |= {"voters": ids, "has_quorum": quorum, "leader": ids[-1] if quorum else ""}
    shown = ok(cli("status"))
    assert lines_with(shown, "Quorum", words)
    assert lines_with(shown, "Leader", f"n{voters - 1}" if quorum else "none")
    if quorum:
        assert "Missing" not in shown
    else:
        missing = [f"n{index} (last seen 20" for index in range(offline)]
        assert lines_with(shown, "Missing", missing[0])
        assert lines_with(shown, "Way out", "ollamad recover")


def test_nodes_list(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[0]["capacity"]["gpu_count"] = 1
    shown = ok(cli("nodes", "list"))
    assert lines_with(shown, "NAME", "ID", "STATUS", "ADDRESS", "CPU", "MEM", "GPU", "MODELS")
    assert lines_with(shown, "* alpha", "192.168.1.100:8080", "12%")
    assert json.loads(ok(cli("nodes", "list", "-o", "json"))) == {"nodes": fake_api.nodes}


def test_nodes_show(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[0]["gpus"] = [{"name": "H200", "memory_total": 150_000_000_000}]
    shown = ok(cli("nodes", "show", "alpha"))
    assert lines_with(shown, "Id", ALPHA)
    assert lines_with(shown, "Role", "leader")
    assert lines_with(shown, "Hardware", "8 cores, 32 GB memory, 500 GB disk, 0 GPUs")
    assert lines_with(shown, "GPU", "H200, 150 GB")
    assert lines_with(shown, "Usage", "CPU 45%, memory 68%, disk 23%, network 12.5 kB/s")
    assert lines_with(shown, "smollm2:135m", "alpha", "1.1 GB", "CPU", "4096")
    data = json.loads(ok(cli("nodes", "show", ALPHA[:8], "-o", "json")))
    assert data == {"node": fake_api.nodes[0]}
    assert "Usage" not in ok(cli("nodes", "show", "gamma"))


@pytest.mark.parametrize(
    ("action", "words"), [("drain", "is being drained"), ("undrain", "is no longer draining")]
)
def test_draining(cli: Cli, fake_api: FakeApi, action: str, words: str) -> None:
    assert ok(cli("nodes", action, "beta")) == f"Node beta {words}\n"
    assert len(fake_api.asked("POST", f"/nodes/beta/{action}")) == 1
    assert json.loads(ok(cli("nodes", action, "beta", "-o", "json")))["message"].endswith(words)


def test_a_drain_can_be_waited_for(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        {"done": False, "answers": 2, "sole_models": ["a:latest", "b:latest"]},
        {"done": False, "answers": 0, "sole_models": ["b:latest"]},
        {"done": True, "answers": 0, "sole_models": []},
    ]

    def step(seconds: float) -> None:
        fake_api.nodes[1]["drain"] = steps.pop(0)

    step(0)
    monkeypatch.setattr("ollama_dist.progress.pause", step)
    assert lines_with(
        ok(cli("nodes", "show", "beta")), "Drained", "waits for 2 answers and copies of a:latest"
    )
    result = cli("nodes", "drain", "beta", "--wait")
    assert ok(result) == "Node beta is being drained\n"
    assert result.stderr.splitlines() == [
        "beta waits for 2 answers and copies of a:latest, b:latest.",
        "beta waits for copies of b:latest.",
        "beta is drained.",
    ]
    assert lines_with(ok(cli("nodes", "show", "beta")), "Drained", "yes")
    fake_api.nodes[1]["drain"] = None
    result = cli("nodes", "drain", "beta", "--wait")
    assert result.exit_code == 1
    assert "somebody undrained it" in result.stderr


def test_ps_shows_what_is_in_memory_anywhere(cli: Cli, fake_api: FakeApi) -> None:
    on_beta = {
        "name": "big:70b",
        "size": 40_000_000_000,
        "size_vram": 10_000_000_000,
        "context_length": 8192,
        "expires_at": None,
        "busy": 2,
        "queued": 7,
    }
    fake_api.nodes[1]["loaded"] = [on_beta, {**on_beta, "name": "g", "size_vram": 40_000_000_000}]
    shown = ok(cli("ps"))
    assert lines_with(shown, "smollm2:135m", "alpha", "1.1 GB", "CPU", "4096", "for ever")
    assert lines_with(shown, "big:70b", "beta", "40.0 GB", "25% GPU", "8192", "2", "7")
    assert lines_with(shown, "g ", "beta", " GPU")
    data = json.loads(ok(cli("ps", "-o", "json")))["models"]
    assert data[1] == {**on_beta, "node_id": BETA}
    for each in fake_api.nodes:
        each["loaded"] = []
    assert ok(cli("ps")) == "No model is in memory.\n"


def test_cluster_status_and_leader(cli: Cli, fake_api: FakeApi) -> None:
    shown = ok(cli("cluster", "status"))
    assert lines_with(shown, "Voters", "alpha, beta, gamma")
    assert lines_with(shown, "Term", "7")
    assert json.loads(ok(cli("cluster", "status", "-o", "json"))) == fake_api.cluster
    assert ok(cli("cluster", "leader")) == f"{ALPHA}\n"
    assert json.loads(ok(cli("cluster", "leader", "-o", "json"))) == {"leader": ALPHA}
    fake_api.cluster["leader"] = ""
    result = cli("cluster", "leader")
    assert result.exit_code == 1
    assert "the cluster has no leader" in result.stderr


def test_cluster_token_prints_the_command_alone(cli: Cli, fake_api: FakeApi) -> None:
    result = cli("cluster", "token", "--ttl", "30m")
    assert ok(result) == "ollamad start --join T0KEN@127.0.0.1:9000\n"
    assert "2030-01-01" in result.stderr
    [packaged] = lines_with(result.stderr, "sudo -u ollamad ollamad start", "/var/lib/ollamad")
    assert packaged.endswith(" --join T0KEN@127.0.0.1:9000")
    assert fake_api.asked("POST", "/cluster/token")[0].json == {"ttl_seconds": 1800}
    assert "Only nodes on the same host reach 127.0.0.1" in result.stderr
    data = json.loads(ok(cli("cluster", "token", "-o", "json")))
    assert data["token"] == "T0KEN"
    fake_api.token_address = "192.0.2.1:9000"
    result = cli("cluster", "token")
    assert ok(result) == "ollamad start --join T0KEN@192.0.2.1:9000\n"
    assert "same host" not in result.stderr


def test_cluster_join_and_leave(cli: Cli, fake_api: FakeApi) -> None:
    assert ok(cli("cluster", "join", BETA, "10.0.0.1:9000")) == "Node joined cluster\n"
    assert fake_api.asked("POST", "/cluster/join")[0].json == {
        "node_id": BETA,
        "address": "10.0.0.1:9000",
    }
    assert ok(cli("cluster", "leave", "beta", "--yes")) == "Node left cluster\n"
    assert fake_api.asked("POST", "/cluster/leave")[0].json == {"node_id": "beta"}
    forced = ("cluster", "leave", "beta", "--yes", "--force", "--timeout", "30s")
    assert ok(cli(*forced)) == "Node left cluster\n"
    assert fake_api.asked("POST", "/cluster/leave")[1].json == {
        "node_id": "beta",
        "force": True,
        "timeout_seconds": 30,
    }
    assert cli("cluster", "leave", "beta", "-y", "--timeout", "soon").exit_code == 2
    data = json.loads(ok(cli("cluster", "leave", "beta", "-y", "-o", "json")))
    assert data == {"message": "Node left cluster"}


def test_leaving_unasked_needs_a_yes(cli: Cli, fake_api: FakeApi) -> None:
    result = cli("cluster", "leave", "beta", stdin="y\n")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert not fake_api.requests


def test_version(cli: Cli) -> None:
    own, server = ok(cli("version")).splitlines()
    assert own.startswith("ollama-dist ")
    assert server == "ollamad 0.1.0 (abc123def456, 2024-01-15T10:00:00Z, linux/amd64)"
    data = json.loads(ok(cli("version", "-o", "json")))
    assert data["server"]["git_commit"] == "abc123def456"
    # The own version needs no daemon.
    alone = cli.bare("--host", "127.0.0.1:1", "version")
    assert ok(alone).startswith("ollama-dist ")
    assert "cannot connect" in alone.stderr


def test_global_options_may_stand_anywhere(cli: Cli, fake_api: FakeApi) -> None:
    for arguments in (
        ("--host", fake_api.url, "-o", "json", "models", "list"),
        ("models", "list", "--output", "json", "--host", fake_api.url),
        ("--host", "127.0.0.1:1", "models", "list", "--host", fake_api.url, "-o", "json"),
        ("--host", f"127.0.0.1:{fake_api.port}", "-o", "yaml", "models", "list", "-o", "json"),
    ):
        assert json.loads(ok(cli.bare(*arguments))) == {"models": fake_api.models}
    cli.bare("--token", "first", "models", "list", "--token", "second", "--host", fake_api.url)
    assert fake_api.requests[-1].token == "second"


def test_the_environment_names_host_and_token(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_DIST_HOST", fake_api.url)
    monkeypatch.setenv("OLLAMA_DIST_TOKEN", "from-environment")
    ok(cli.bare("models", "list"))
    assert fake_api.requests[-1].token == "from-environment"
    # That of Ollama's own clients, where there is no other.
    monkeypatch.delenv("OLLAMA_DIST_HOST")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{fake_api.port}")
    ok(cli.bare("models", "list"))
    assert len(fake_api.asked("GET", "/models")) == 2


def test_names_of_others_cannot_steer_the_terminal(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.nodes[0]["name"] = "\x1b]0;owned\x07[red]a"
    fake_api.models = [model("\x1b[2Jm")]
    for arguments in (("status",), ("nodes", "list"), ("models", "list"), ("models", "show", "m")):
        result = cli(*arguments)
        assert "\x1b" not in result.output
    assert "[red]a" in ok(cli("nodes", "list"))


def completions(cli: Cli, line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("_OLLAMA_DIST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    result = cli.runner.invoke(cli.app, [], prog_name="ollama-dist")
    assert result.exit_code == 0
    assert result.stderr == ""
    return str(result.stdout).split()


def test_the_shell_completes_names(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"ollama-dist --host {fake_api.url}"
    assert completions(cli, f"{program} run ", monkeypatch) == [
        "smollm2:135m",
        "team/llama3.2:latest",
    ]
    assert completions(cli, f"{program} models rm te", monkeypatch) == ["team/llama3.2:latest"]
    assert completions(cli, f"{program} nodes drain ", monkeypatch) == ["alpha", "beta", "gamma"]
    assert completions(cli, f"{program} nodes show QmB", monkeypatch) == [BETA]
    assert completions(cli, f"{program} models pull x --node b", monkeypatch) == ["beta"]


def test_completion_is_silent_when_nobody_answers(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in ("ollama-dist --host 127.0.0.1:1 run ", "ollama-dist --host ftp://x run "):
        assert completions(cli, line, monkeypatch) == []
