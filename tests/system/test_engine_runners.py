"""Runners under a daemon: which engine, what they take, who makes room, and how they end.

One node; its llama.cpp is a real llama-server, but for the models that ask for the embedded one.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ollamad.core.weights import CTRANSFORMERS, LLAMA_SERVER, XLLAMACPP
from ollamad.engine.runner import PROMPT_CACHE_MIB
from tests.fakes.llama_program import llama_server
from tests.fakes.tiny_llama import random_llama, text_of
from tests.system.conftest import MODEL, open_cluster
from tests.system.harness import Node, ok, refused, run_cli, run_daemon, wait_until
from tests.system.test_engine_conformance import PROMPT, PROMPT_IDS

STALL_S = 2
MIB = 1 << 20
ENGINES = {LLAMA_SERVER: "llama-server", XLLAMACPP: "runner", CTRANSFORMERS: "runner"}
GREEDY = {"temperature": 0, "num_predict": 24, "num_thread": 1}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Node]:
    """A node with a model for each engine, named after it, and a real one."""
    settings = {
        "OLLAMAD_ENGINE__LLAMA_SERVER": str(llama_server()),
        "OLLAMAD_ENGINE__STALL_TIMEOUT": f"{STALL_S}s",
        "OLLAMA_MAX_LOADED_MODELS": "3",
        "OLLAMA_NUM_PARALLEL": "2",
        "OLLAMA_CONTEXT_LENGTH": "1024",
    }
    files = tmp_path_factory.mktemp("files")
    for cluster in open_cluster(tmp_path_factory, **settings):
        node = cluster.found()
        new = random_llama().write(files / "new.bin", version=3)
        old = random_llama().write(files / "old.gguf", version=1)
        node.import_model(new, LLAMA_SERVER)
        node.import_model(old, CTRANSFORMERS)
        create(node, XLLAMACPP, LLAMA_SERVER, engine=XLLAMACPP)
        node.import_model(smollm2_path, MODEL)
        for name in ("b", "c", "d"):
            create(node, name, MODEL)
        yield node


@pytest.fixture(autouse=True)
def empty(node: Node) -> None:
    """Each test begins with no model in memory."""
    if not node.running:
        node.start()
    for loaded in node.loaded():
        unload(node, loaded["name"])
    wait_until("nothing is loaded", lambda: not node.loaded() and not runners(node))


def create(node: Node, name: str, base: str, **parameters: Any) -> None:
    body = {"model": name, "from": base, "parameters": parameters, "stream": False}
    with node.client() as client:
        url = str(httpx.URL(node.url).copy_with(path="/api/create"))
        ok(client.post(url, json=body))


def ask(node: Node, model: str, **fields: Any) -> Any:
    options = GREEDY | fields.pop("options", {})
    body = {"model": model, "prompt": PROMPT, "raw": True, "options": options} | fields
    return ok(node.answer("/generate", **body))


def load(node: Node, model: str, keep_alive: object = "5m") -> None:
    ok(node.answer("/generate", model=model, prompt="", keep_alive=keep_alive))


def unload(node: Node, model: str) -> None:
    ok(node.answer("/generate", model=model, prompt="", keep_alive=0))


def names(node: Node) -> set[str]:
    return {one["name"].partition(":")[0] for one in node.loaded()}


def runners(node: Node) -> list[psutil.Process]:
    """The processes that run models, whatever program they became."""
    found = []
    for process in psutil.Process(node.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if {"--socket", "--ubatch-size"} & set(process.cmdline()):
                found.append(process)
    return found


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def test_each_engine_answers_alike_and_is_told_with_the_reason(node: Node) -> None:
    expected = text_of(random_llama().greedy(PROMPT_IDS, 24)[0])
    for name in ENGINES:
        assert ask(node, name)["response"] == expected
    by_name = {one["name"].partition(":")[0]: one for one in node.loaded()}
    assert {name: one["engine"] for name, one in by_name.items()} == {n: n for n in ENGINES}
    assert "engine.llama_server is set" in by_name[LLAMA_SERVER]["engine_reason"]
    assert "parameter engine" in by_name[XLLAMACPP]["engine_reason"]
    assert "GGUF version 1" in by_name[CTRANSFORMERS]["engine_reason"]
    shown = node.get(f"/models/{CTRANSFORMERS}")["model"]
    assert shown["engine"] == {
        "name": CTRANSFORMERS,
        "reason": "the file is GGUF version 1, llama: llama.cpp reads newer ones",
    }
    listed = run_cli(node, "ps").stdout
    told = run_cli(node, "models", "show", XLLAMACPP).stdout
    assert f"{CTRANSFORMERS}, because the file is GGUF version 1" in " ".join(listed.split())
    assert "the parameter engine asks for xllamacpp" in " ".join(told.split())
    # Another one for one request, as any other option.
    ask(node, LLAMA_SERVER, options={"engine": XLLAMACPP})
    assert XLLAMACPP in [one["engine"] for one in node.loaded() if one["name"].startswith("llama")]
    refused(
        node.answer("/generate", model=XLLAMACPP, prompt="x", options={"engine": "vllm"}),
        400,
        "INVALID_OPTION",
    )


def test_runners_are_killed_for_memory_long_before_the_daemon_and_die_with_it(node: Node) -> None:
    for name in ENGINES:
        load(node, name)
    processes = runners(node)
    assert len(processes) == len(ENGINES)
    assert {score(process.pid) for process in processes} == {500}
    assert score(node.pid) <= 0
    node.kill()
    wait_until("they are gone", lambda: all(map(gone, processes)), timeout_s=5)
    node.start()


def test_the_longest_unused_model_makes_room_and_never_a_busy_one(node: Node) -> None:
    """Copies of a real model: each has a runner of its own."""
    load(node, "b", keep_alive=-1)  # asked to stay
    body = {"model": "c", "prompt": "Tell a long story.", "options": {"num_thread": 1}}
    with node.stream("/generate", **body) as stream:
        stream.next()
        load(node, MODEL)
        load(node, "d")
        # `b` and `c` are unused for longer than MODEL was; but one stays, one is busy.
        assert names(node) == {"b", "c", "d"}
        assert stream.next()["response"]
    load(node, MODEL)  # `d` goes, since `c` was used until just now
    assert names(node) == {"b", "c", MODEL.partition(":")[0]}
    load(node, "d")
    assert names(node) == {"b", "d", MODEL.partition(":")[0]}


@pytest.mark.parametrize("model", [MODEL, "b"], ids=["llama-server", "xllamacpp"])
def test_a_runner_that_hangs_is_killed(node: Node, model: str) -> None:
    if model == "b":
        create(node, "embedded", MODEL, engine=XLLAMACPP)
        model = "embedded"
    body = {"model": model, "prompt": "Tell a long story.", "options": {"num_thread": 1}}
    with node.stream("/generate", **body | {"failover": "off"}) as stream:
        stream.next()
        [runner] = runners(node)
        runner.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        *_, last = stream
        assert "it hung: no sign of life for" in last["error"]
        assert time.monotonic() - begun > STALL_S
    wait_until("it is gone", lambda: gone(runner))
    assert ok(node.answer("/generate", **body | {"options": {"num_predict": 3}}))["response"]


def test_a_runner_that_crashes_again_and_again_is_given_time_and_others_are_not(
    node: Node,
) -> None:
    crashes = 0
    while crashes < 10:
        answer = node.answer("/generate", model=XLLAMACPP, prompt="", failover="off")
        if answer.status_code == 503:
            break
        ok(answer)
        [runner] = [one for one in runners(node) if XLLAMACPP in one.cmdline()]
        runner.kill()
        crashes += 1
        wait_until("it is noticed", lambda: XLLAMACPP not in names(node))
    details = refused(answer, 503, "RUNNER_DIED")
    assert f"crashed {crashes} times in a row" in answer.json()["error"]
    assert crashes in (4, 5, 6)
    assert details["retry_after"] <= 30
    ask(node, LLAMA_SERVER)  # others load meanwhile
    wait_until(
        "it is started again",
        lambda: node.answer("/generate", model=XLLAMACPP, prompt="").status_code == 200,
        timeout_s=40,
    )
    assert ask(node, XLLAMACPP)["response"]
    assert ask(node, XLLAMACPP)["response"]


def test_what_a_model_takes_is_estimated_and_then_known(node: Node) -> None:
    create(node, "new", MODEL, engine=XLLAMACPP, top_k=7)  # has never run here
    load(node, "new")
    [guess] = node.loaded()
    assert guess["size_used"] == 0
    ask(node, "new", prompt="The weather is fine today. " * 60)
    [after] = node.loaded()
    [runner] = runners(node)
    resident = runner.memory_info().rss
    assert resident * 0.9 < after["size_used"] < resident * 1.1
    assert guess["size"] > resident, "the first estimate errs on the safe side"
    node.restart()
    load(node, "new")
    [better] = node.loaded()
    prompts = PROMPT_CACHE_MIB << 20  # of which nothing is in use yet
    assert resident <= better["size"] < resident * 1.3 + prompts
    assert better["size"] < guess["size"]
    assert better["size_vram"] == 0


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no/such/llama-server", "there is no file /no/such/llama-server"),
        ("/bin/cat", "/bin/cat is no llama-server"),
    ],
)
def test_a_llama_server_that_cannot_be_used_stops_the_start(
    tmp_path: Path, path: str, reason: str
) -> None:
    arguments = ("start", "--data-dir", str(tmp_path / "data"))
    ended = run_daemon(tmp_path, *arguments, environment={"OLLAMAD_ENGINE__LLAMA_SERVER": path})
    assert ended.returncode == 1
    assert f"engine.llama_server: {reason}" in ended.stderr
    assert "Traceback" not in ended.stderr
