"""Sends the API what its OpenAPI document allows, and what it does not, with schemathesis.

    python -m tests.fuzz.api [--seconds N] [--seed N] [TARGET ...]

Targets: `fakes`, the API over fakes, where every model answers; `daemon`, a real daemon; each as
an admin and as nobody (`fakes-nobody`, `daemon-nobody`). Fails on a 500, an answer that is not as
the document says, invalid data that is accepted, a token that is not asked for, or a hang. What it
finds is printed with the request, to be made a test of.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fakes.chat_templates import TOOLS
from tests.fakes.tiny_llama import Shape, random_llama
from tests.system.harness import Cluster

ST = (sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()")
HANG_S = 20  # a request that takes longer hangs, also on a machine with other work
TARGETS = ("fakes", "fakes-nobody", "daemon", "daemon-nobody")
NO_CHECKS = (
    # Schema-valid data may break rules that no schema says: a user that exists already.
    "positive_data_acceptance",
    # `/models/x/download` is also the model `x/download`, so more methods are answered there.
    "unsupported_method",
    "allow_header_conformance",
)
# What a real daemon is not asked: it would dial hosts that are made up, or have no model for long.
NOT_ASKED = (
    "post_models$", "post_models_name_(download|push)", "post_cluster_join",
    "post_api_(create|pull|push)", "delete_(models_name|api_delete)",
)  # fmt: skip
MODEL = "smollm2:135m"  # as the document's examples name it
# An answer that nothing else bounds has ten contexts: a second's work.
SHAPE = Shape(context=64)
ENVIRONMENT = {
    "OLLAMAD_AUTH__LOOPBACK_ROLE": "none",
    "OLLAMAD_ADMIN_PASSWORD": "correct horse battery staple",
}


@contextlib.contextmanager
def fakes(log: Path) -> Iterator[tuple[str, str]]:
    """URL and token of the API over fakes, in a process of its own."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.api_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        url, token = process.stdout.readline().split()
        yield url, token
        assert process.poll() is None, "the server ended"
    finally:
        process.stdin.close()
        process.wait(20)


@contextlib.contextmanager
def daemon(log: Path) -> Iterator[tuple[str, str]]:
    """URL and token of a cluster of one, with a model that talks nonsense, and may call tools."""
    with Cluster(log.parent / "cluster", ENVIRONMENT) as cluster:
        node = cluster.found()
        llama = random_llama(shape=SHAPE)
        template = {"tokenizer.chat_template": TOOLS}
        node.import_model(llama.write(log.parent / "tiny.gguf", **template), MODEL)
        try:
            yield node.url, node.admin_token()
            assert node.running, "the daemon ended"
        finally:
            log.write_text(node.log())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.api")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    options = parser.parse_args()
    counts: dict[str, int] = {}
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.targets:
            directory = Path(scratch) / name
            directory.mkdir()
            share = options.seconds // len(options.targets)
            begun = time.monotonic()
            good, counts[name] = run(name, directory, share, options.seed)
            rate = counts[name] / (time.monotonic() - begun)
            print(f"== {name}: {counts[name]} requests, {rate:.0f}/s", flush=True)
            if not good:
                failed.append(name)
    total = sum(counts.values())
    found = f"found something in: {', '.join(failed)}" if failed else "nothing was found"
    print(f"{total} generated requests; {found}")
    return 1 if failed else 0


def run(name: str, directory: Path, seconds: int, seed: int | None) -> tuple[bool, int]:
    """Whether a target kept its word for so long, and how many requests it was sent."""
    kind, _, nobody = name.partition("-")
    log = directory / "log"
    with (fakes if kind == "fakes" else daemon)(log) as (url, token):
        document = directory / "openapi.json"
        document.write_bytes(_fetch(url, token))
        command = [*ST, "run", str(document), "--url", url]
        command += ["--max-time", str(seconds), "--request-timeout", str(HANG_S)]
        command += ["--continue-on-failure", "--no-color", "--warnings", "off"]
        command += ["--suppress-health-check", "all", "--generation-database", "none"]
        command += ["--report", "json", "--report-json-path", str(directory / "report.json")]
        command += [f"--exclude-checks={','.join(NO_CHECKS)}"]
        if not nobody:
            command += ["--header", f"Authorization: Bearer {token}"]
        if seed is not None:
            command += ["--seed", str(seed)]
        if kind == "daemon":  # the option counts once
            command += ["--exclude-operation-id-regex", f"^({'|'.join(NOT_ASKED)})"]
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "tests.fuzz.api_hooks",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
    report = json.loads((directory / "report.json").read_text())
    if done.returncode:
        print(done.stdout, done.stderr)
    traceback = "Traceback (most recent call last)" in log.read_text()
    if traceback:
        print(log.read_text())
    return not done.returncode and not traceback, int(report["test_cases"]["generated"])


def _fetch(url: str, token: str) -> bytes:
    import httpx

    answer = httpx.get(
        f"{url}/api/v1/openapi.json", headers={"Authorization": f"Bearer {token}"}, timeout=HANG_S
    )
    return answer.raise_for_status().content


if __name__ == "__main__":
    sys.exit(main())
