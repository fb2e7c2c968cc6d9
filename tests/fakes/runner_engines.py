"""An engine over fake runners, for tests."""

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from ollamad.core.inference import Event, GenerateRequest
from ollamad.core.state import ModelDetails
from ollamad.engine.accelerators import NO_ACCELERATORS, Accelerators
from ollamad.engine.engine import Engine
from ollamad.engine.spec import EngineSettings, ModelSpec

FAKE_RUNNER = (sys.executable, "-m", "tests.fakes.fake_runner")
REAL_RUNNER = (sys.executable, "-m", "ollamad.engine.runner")
PLENTY = 64 << 30  # bytes of memory


@contextlib.asynccontextmanager
async def running_engine(
    runtime_dir: Path,
    free_memory: Callable[[], int] = lambda: PLENTY,
    accelerators: Accelerators = NO_ACCELERATORS,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """An engine that runs; by default with fake runners."""
    settings.setdefault("runner_command", FAKE_RUNNER)
    engine = Engine(EngineSettings(runtime_dir=runtime_dir, **settings), free_memory, accelerators)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


def fake_model(directory: Path, name: str = "fake:latest", **behaviour: Any) -> ModelSpec:
    """A model for the fake runner, which behaves as told (see `fake_runner.Behaviour`)."""
    path = directory / f"{name.partition(':')[0]}.json"
    path.write_bytes(msgspec.json.encode(behaviour))
    details = ModelDetails(context_length=100_000, kv_bytes_per_token=1)
    return ModelSpec(name, f"sha256:{name}", str(path), 1000, details)


async def events_of(engine: Engine, spec: ModelSpec, request: GenerateRequest) -> list[Event]:
    """All events of a generation."""
    async with engine.generate(spec, request) as events:
        return [event async for event in events]
