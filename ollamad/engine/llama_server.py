"""A `llama-server` that the user built: is it there, does it run, can it do what runners need?

Looked at once, when the daemon starts, so that a wrong path or an old program is told then and
not by the first request. Programs without a version are common (built from a shallow clone they
say `build 1`), so what counts are the options that they know.
"""

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Final

import trio

from ollamad.engine.runner import outside_environment

TIMEOUT_S: Final = 30.0  # drivers of GPUs may take seconds to wake up
MAX_SHOWN: Final = 200  # characters of the program's own words

# What `runner.server_arguments` gives it. `.sock` stands for Unix sockets, which it has since
# May 2025.
NEEDED: Final = (
    "--cache-ram",
    "--cache-type-k",
    "--cache-type-v",
    "--chat-template",
    "--context-shift",
    "--embeddings",
    "--gpu-layers",
    "--jinja",
    "--kv-unified",
    "--list-devices",
    "--log-prefix",
    "--log-timestamps",
    "--lora",
    "--metrics",
    "--mmproj",
    "--no-warmup",
    "--offline",
    "--parallel",
    "--pooling",
    "--slots",
    "--threads-batch",
    "--threads-http",
    "--ubatch-size",
    ".sock",
)
_VERSION: Final = re.compile(r"^version: (.+)$", re.MULTILINE)


class Unusable(ValueError):
    """The program cannot be used; says why, and what can be done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    path: str
    version: str  # in its own words


async def inspect(path: str) -> Program:
    """Look at a program.

    Raises:
      Unusable: it is not there, does not run, is no llama-server, or is too old.
    """
    if not Path(path).is_absolute():
        raise Unusable(f"{path!r} is no absolute path")
    try:
        os.stat(path)  # noqa: PTH116 - once, at the start
    except PermissionError:
        raise Unusable(
            f"{path} is hidden from this user, as all below /home and /root is from the service; "
            "put it below /opt or /usr/local"
        ) from None
    except OSError:
        raise Unusable(f"there is no file {path}") from None
    if os.path.isdir(path) or not os.access(path, os.X_OK):  # noqa: ASYNC240, PTH112
        raise Unusable(f"{path} is no program that may be run; see `chmod +x`")
    told = await _run(path, "--version")
    found = _VERSION.search(told)
    if found is None:
        raise Unusable(f"{path} is no llama-server: asked for its version it says {_shown(told)}")
    help_ = await _run(path, "--help")
    missing = [option for option in NEEDED if not _has(option, help_)]
    if missing:
        raise Unusable(
            f"{path} (version {found[1]}) does not know {', '.join(missing)}; "
            "build or install a newer llama.cpp"
        )
    return Program(path, found[1])


async def _run(path: str, option: str) -> str:
    try:
        with trio.fail_after(TIMEOUT_S):
            done = await trio.run_process(
                [path, option],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
                env=outside_environment(),
            )
    except OSError as error:
        raise Unusable(f"{path} cannot be run: {error}") from None
    except trio.TooSlowError:
        raise Unusable(f"{path} {option} gives no answer in {TIMEOUT_S:g} s") from None
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise Unusable(f"{path} {option} fails with {done.returncode}: {_shown(output)}")
    return output


def _has(option: str, help_: str) -> bool:
    return re.search(re.escape(option) + r"(?![\w-])", help_) is not None


def _shown(text: str) -> str:
    lines = text.strip().splitlines()
    return repr(lines[-1][:MAX_SHOWN]) if lines else "nothing"
