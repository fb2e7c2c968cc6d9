"""`ollama-dist` against a real cluster, as its user types it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gguf_files import write_gguf
from tests.system.conftest import open_cluster
from tests.system.harness import Cluster, Node, clean_environment, free_ports, run_cli, wait_until

MODEL = "smollm2"
PASSWORD = "correct horse battery staple"
QUIET = ("--option", "temperature=0", "--option", "num_thread=1", "--option", "num_predict=8")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Cluster]:
    """Two nodes, of which the first has a real model."""
    settings = {"OLLAMAD_MODELS__REPLICAS": "1", "OLLAMAD_ADMIN_PASSWORD": PASSWORD}
    for cluster in open_cluster(tmp_path_factory, **settings):
        first = cluster.found()
        cluster.grow()
        shown = succeed(first, "models", "import", str(smollm2_path), "--name", MODEL)
        assert f"ollama-dist run {MODEL}" in shown
        wait_until("both know it", lambda c=cluster: c.nodes[1].get("/models")["models"])
        yield cluster


def succeed(node: Node, *arguments: str, **more: Any) -> str:
    """What a command that must succeed prints."""
    ended = run_cli(node, *arguments, **more)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\x1b" not in ended.stdout, "no colours in a pipe"
    return ended.stdout


def data(node: Node, *arguments: str) -> Any:
    return json.loads(succeed(node, "--output", "json", *arguments))


def fail(node: Node, code: int, *arguments: str, **more: Any) -> str:
    """The one line on stderr of a command that must fail with that code."""
    ended = run_cli(node, *arguments, **more)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_status_and_nodes(two: Cluster) -> None:
    for node in two.nodes:
        shown = succeed(node, "status")
        for word in ("healthy", "2 of 2 online", "node-1", "node-2", MODEL, "Quorum"):
            assert word in shown
    assert "no loss" in shown, "two nodes survive no loss, and it says so"
    listed = data(two.nodes[1], "nodes", "list")["nodes"]
    assert [node["name"] for node in listed] == ["node-1", "node-2"]
    shown = data(two.nodes[1], "nodes", "show", "node-1")["node"]
    assert shown["id"] == two.nodes[0].id


def test_models(two: Cluster) -> None:
    node = two.nodes[1]
    assert MODEL in succeed(node, "models", "list")
    shown = succeed(node, "models", "show", MODEL)
    for word in ("llama", "Q4_1", "node-1"):
        assert word in shown
    assert data(node, "models", "show", MODEL)["model"]["details"]["family"] == "llama"


def test_a_model_goes_from_node_to_node_and_away(two: Cluster, tmp_path: Path) -> None:
    first, second = two.nodes
    file = write_gguf(tmp_path / "Tiny Model.gguf")
    assert "tiny-model" in succeed(first, "models", "import", str(file))
    wait_until("both know it", lambda: second.request("GET", "/models/tiny-model").is_success)
    succeed(second, "models", "pull", "tiny-model", "--node", "node-2")
    two.wait_replicas("tiny-model", two.nodes)
    transfers = data(first, "transfers", "list")["transfers"]
    [transfer] = [each for each in transfers if each["model_name"] == "tiny-model:latest"]
    assert transfer["status"] == "completed"
    assert "tiny-model" in succeed(first, "transfers", "list")
    assert transfer["id"] in succeed(first, "transfers", "show", transfer["id"])
    succeed(second, "models", "rm", "tiny-model")
    assert "tiny-model" not in succeed(second, "models", "list")


def test_run_generate_and_embed(two: Cluster) -> None:
    for node in two.nodes:
        said = succeed(node, "run", MODEL, "What is the capital of France?", *QUIET)
        assert said.strip()
        generated = succeed(node, "generate", MODEL, "--raw", "The capital of France is", *QUIET)
        assert "Paris" in generated
        assert "576 numbers" in succeed(node, "embed", MODEL, "Paris")
    answer = data(node, "generate", MODEL, "--raw", "The capital of France is", *QUIET)
    assert "Paris" in answer["response"]
    assert answer["eval_count"] == 8
    assert len(data(node, "embed", MODEL, "Paris")["embedding"]) == 576
    piped = succeed(node, "generate", MODEL, "--raw", *QUIET, input="The capital of France is")
    assert piped == generated


def test_ps_shows_what_is_in_memory(two: Cluster) -> None:
    succeed(two.nodes[0], "generate", MODEL, "Hi", *QUIET)
    wait_until("the other node knows", lambda: MODEL in succeed(two.nodes[1], "ps"), every_s=0.5)
    loaded = succeed(two.nodes[1], "ps")
    assert "node-1" in loaded
    assert succeed(two.nodes[1], "stop", MODEL).startswith(f"{MODEL}:latest leaves memory")
    wait_until("it is gone", lambda: "No model" in succeed(two.nodes[1], "ps"), every_s=0.5)


def test_the_doctor(two: Cluster) -> None:
    """Two nodes that are well: what is to be said of them is that there should be a third."""
    seen = data(two.nodes[1], "doctor")
    assert seen["healthy"]
    worries = {each["check"]: each["found"] for each in seen["findings"] if each["grade"] != "ok"}
    worries.pop("room", None)  # the machine that the tests run on
    worries.pop("transfers", None)  # what other tests left
    assert list(worries) == ["quorum"]
    assert "add a third node" in succeed(two.nodes[0], "doctor")


def test_a_conversation_on_a_terminal(two: Cluster) -> None:
    """Typed lines, an answer as it comes, and a history of what was typed."""
    pty = pytest.importorskip("pty")
    node = two.nodes[1]
    ours, theirs = pty.openpty()
    environment = clean_environment(node.directory) | {
        "OLLAMA_DIST_HOST": node.address,
        "OLLAMAD_DATA_DIR": str(node.data_dir),
        "TERM": "xterm",
    }
    program = "from ollama_dist.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", MODEL, *QUIET],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        screen = b""

        def until(words: bytes) -> None:
            nonlocal screen
            deadline = time.monotonic() + 90
            while words not in screen:
                assert time.monotonic() < deadline, screen
                screen += os.read(ours, 4096)

        until(b">>> ")
        os.write(ours, b"Say hello to Zebulon\n")
        until(b"Zebulon\r\n")
        screen = b""
        until(b">>> ")
        assert len(screen) > 20, "an answer came"
        os.write(ours, b"/bye\n")
        assert process.wait(20) == 0
    os.close(ours)
    history = node.directory / ".local/state/ollama-dist/history"
    assert "Say hello to Zebulon" in history.read_text()


def test_a_node_joins_drains_and_leaves(two: Cluster) -> None:
    first = two.nodes[0]
    command = succeed(first, "cluster", "token", "--ttl", "10m").split()
    assert command[:3] == ["ollamad", "start", "--join"]
    third = two.new_node()
    third.start(*command[2:])
    two.wait_whole()
    succeed(first, "nodes", "drain", "node-3")
    assert "draining" in succeed(first, "nodes", "list")
    succeed(first, "nodes", "undrain", "node-3")
    line = fail(first, 2, "cluster", "leave", "node-3")
    assert "--yes" in line
    succeed(first, "cluster", "leave", "node-3", "--yes")
    assert third.wait_end() == 0
    two.nodes.remove(third)
    assert third.destroy() == []
    assert len(data(first, "nodes", "list")["nodes"]) == 2


def test_a_waiting_node_is_taken_in(two: Cluster) -> None:
    first = two.nodes[0]
    token = data(first, "cluster", "token")["token"]
    third = two.new_node()
    third.launch("--join", token)
    wait_until("it waits", lambda: "ollama-dist cluster join" in third.log())
    line = next(line for line in third.log().splitlines() if "cluster join" in line)
    typed = line.replace("HOST", "127.0.0.1").split()
    succeed(first, *typed[1:])
    two.wait_whole()
    two.dismiss(third)


def test_signing_in_and_out(two: Cluster, tmp_path: Path) -> None:
    node = two.nodes[0]
    stranger = {"home": tmp_path}
    assert "inference" in succeed(node, "auth", "whoami", **stranger)
    line = fail(node, 4, "nodes", "drain", "node-1", **stranger)
    assert "operator" in line
    wrong = ("auth", "login", "-u", "admin", "--password-stdin")
    fail(node, 4, *wrong, input="wrong\n", **stranger)
    succeed(node, *wrong, input=f"{PASSWORD}\n", **stranger)
    assert "admin" in succeed(node, "auth", "whoami", **stranger)
    credentials = tmp_path / ".config/ollama-dist/credentials.json"
    assert credentials.stat().st_mode & 0o077 == 0
    succeed(node, "cluster", "token", **stranger)
    token = next(iter(json.loads(credentials.read_text())["hosts"].values()))["token"]
    succeed(node, "auth", "logout", **stranger)
    wait_until(
        "the session is over on the other node, too",
        lambda: two.nodes[1].request("GET", "/auth/me", token=token).status_code == 401,
        3,
    )
    assert "inference" in succeed(node, "auth", "whoami", **stranger)


def test_exit_codes(two: Cluster, tmp_path: Path) -> None:
    node = two.nodes[0]
    assert "nothing:latest" in fail(node, 5, "models", "show", "nothing")
    assert MODEL in fail(node, 5, "generate", "smollm", "Hi"), "the nearest name is told"
    fail(node, 5, "nodes", "show", "nobody")
    fail(node, 4, "status", "--token", "nonsense")
    [nowhere] = free_ports(1)
    line = fail(node, 3, "--host", f"127.0.0.1:{nowhere}", "status")
    assert str(nowhere) in line
    assert run_cli(node, "nonsense").returncode == 2
    (tmp_path / "x.gguf").write_text("no model")
    fail(node, 2, "models", "import", str(tmp_path / "x.gguf"))
    ids = data(node, "nodes", "list")["nodes"]
    assert len(ids) == 2


def test_data_is_data(two: Cluster) -> None:
    node = two.nodes[0]
    for command in (
        ("status",),
        ("nodes", "list"),
        ("models", "list"),
        ("transfers", "list"),
        ("ps",),
        ("cluster", "status"),
        ("cluster", "leader"),
        ("version",),
    ):
        assert data(node, *command)
        assert succeed(node, *command, "-o", "yaml")


def test_help_is_quick(two: Cluster) -> None:
    took = []
    for _ in range(5):
        begun = time.monotonic()
        assert "models" in succeed(two.nodes[0], "--help")
        took.append(time.monotonic() - begun)
    print(f"help: {min(took):.2f} s")
    assert min(took) < 0.6, "the goal is 0.3 s, on a machine with nothing else to do"
