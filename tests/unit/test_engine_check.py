"""Whether an engine takes a file, before anybody needs it; and when nothing can be said."""

import sys
from pathlib import Path

import msgspec
import pytest
import trio

from ollamad.core.weights import Weights
from ollamad.engine import check
from ollamad.engine.engine import Engine
from ollamad.engine.runner import REFUSED
from ollamad.engine.spec import EngineSettings, ModelSpec

REFUSAL = """\
0.00.014.906 E llama_model_load: error loading model: unknown model architecture: 'gptoss'
0.00.014.918 E llama_model_load_from_file_impl: failed to load model
"""
OLLAMAS = """\
0.00.012.424 E llama_model_load: error loading model: done_getting_tensors: wrong number of tensors
0.00.012.425 E llama_model_load_from_file_impl: failed to load model
"""


def runner(said: str, code: str) -> tuple[str, ...]:
    """A runner that says that and ends so."""
    script = f"import os, sys, time; print({said!r}, file=sys.stderr, flush=True); {code}"
    return (sys.executable, "-c", script)


def engine_of(tmp_path: Path, *command: str, engines: tuple[str, ...] = ("xllamacpp",)) -> Engine:
    settings = EngineSettings(runtime_dir=tmp_path, runner_command=command, engines=engines)
    return Engine(settings, lambda: 0)


SPEC = ModelSpec("big:latest", "sha256:x", "/big.gguf", 1, weights=Weights(architecture="gptoss"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (REFUSAL, "unknown model architecture: 'gptoss': this engine does not know"),
        (OLLAMAS, "wrong number of tensors: stock llama.cpp refuses the file; some"),
    ],
)
async def test_a_refusal_is_told_with_what_it_means(tmp_path: Path, said: str, words: str) -> None:
    engine = engine_of(tmp_path, *runner(said, f"sys.exit({REFUSED})"))
    objection = await engine.objection(SPEC)
    assert objection.startswith("big:latest cannot be run: ")
    assert words in objection


@pytest.mark.parametrize(
    "command",
    [
        runner(REFUSAL, "sys.exit(1)"),
        runner(REFUSAL, "os.abort()"),
        runner("0.00.000.001 E couldn't bind HTTP server socket", f"sys.exit({REFUSED})"),
        runner("", "sys.exit(0)"),
        ("/nonexistent/runner",),
    ],
)
async def test_whatever_else_happens_says_nothing(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert await engine_of(tmp_path, *command).objection(SPEC) == ""


async def test_an_engine_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "TIMEOUT_S", 0.2)
    with trio.fail_after(10):
        assert await engine_of(tmp_path, *runner("", "time.sleep(60)")).objection(SPEC) == ""


async def test_a_file_that_no_engine_of_this_node_reads_needs_no_process(tmp_path: Path) -> None:
    old = msgspec.structs.replace(SPEC, weights=Weights(format="ggjt", architecture="llama"))
    objection = await engine_of(tmp_path, "/nonexistent/runner").objection(old)
    assert "only ctransformers reads; install it" in objection
