"""Asks an engine whether it would take a model's file, before anybody needs the model.

llama.cpp reads everything but the weights: architecture, hyperparameters, vocabulary, the names
and shapes of all tensors. That takes a second and no memory to speak of, whatever the model's
size, and finds out what a look at the header cannot: that the architecture is newer than the
engine, or that the file was made for Ollama's own copy of llama.cpp. It happens in a process of
its own, as everything that llama.cpp does.

Only a plain refusal counts. Whatever else may happen is found out when the model is loaded.
"""

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from ollamad.engine.process import explained_refusal
from ollamad.engine.runner import REFUSED

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 60.0  # the largest vocabularies take some seconds on a slow machine


# What llama.cpp says of a file, whatever else was wrong before or comes after.
_NOT_TAKEN: Final = "failed to load model"


async def refusal(command: Sequence[str], path: str, socket_path: Path) -> str:
    """Why the embedded engine does not take that file; empty if it does or cannot tell.

    `command` starts a runner; its arguments follow. The socket's path must be free and end in
    `.sock`; nobody is served there. If cancelled, the process is ended.
    """
    argv = [*command, "--check", "--model", path, "--socket", str(socket_path)]
    try:
        with trio.fail_after(TIMEOUT_S):
            done = await trio.run_process(
                argv,
                stdin=subprocess.DEVNULL,  # a runner ends when a pipe there is closed
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
    except (OSError, trio.TooSlowError) as error:
        log.info("the engine does not tell whether it takes %s: %s", path, error or "in time")
        return ""
    finally:
        socket_path.unlink(missing_ok=True)  # noqa: ASYNC240 - of a directory in memory, mostly
    output = done.stdout.decode(errors="replace")
    if done.returncode != REFUSED or _NOT_TAKEN not in output:
        return ""
    return explained_refusal(output.splitlines())
