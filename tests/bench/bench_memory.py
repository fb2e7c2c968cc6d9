"""What a runner is estimated to take, what it then takes, and what it is estimated at after that.

For both llama.cpp engines, with several contexts, slots and kinds of cache. Nothing is timed.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import psutil
import trio

from ollamad.core.inference import Failed, GenerateRequest, Options
from ollamad.core.weights import LLAMA_SERVER, XLLAMACPP
from ollamad.engine.engine import Engine
from ollamad.engine.spec import EngineSettings, ModelSpec
from ollamad.store.details import details_of, facts_of
from ollamad.store.weights import read_weights
from tests.conftest import smollm2_file
from tests.fakes.llama_program import llama_server
from tests.fakes.runner_engines import REAL_RUNNER

MIB = 1 << 20
PLENTY = 64 << 30
PROMPT = "The weather is fine today. " * 60  # fills a part of a context, as people do
HEADING = "engine        slots x context  cache  estimated  used  corrected   (MiB)"


@dataclasses.dataclass(frozen=True)
class Case:
    engine: str
    slots: int
    context: int
    cache: str


CASES = [
    Case(engine, slots, context, cache)
    for engine in (XLLAMACPP, LLAMA_SERVER)
    for slots, context, cache in (
        (1, 1024, "f16"), (4, 1024, "f16"), (4, 4096, "f16"), (4, 4096, "q8_0"), (4, 4096, "q4_0")
    )
]  # fmt: skip


def spec_of(path: Path) -> ModelSpec:
    facts = facts_of(read_weights(path))
    size = path.stat().st_size
    return ModelSpec(
        "smollm2", "sha256:0", str(path), size, details_of(facts), weights=facts.weights
    )


async def measure(case: Case, spec: ModelSpec, directory: Path) -> tuple[int, int, int]:
    """Bytes: estimated before, resident after an answer, estimated then."""
    settings = EngineSettings(
        runtime_dir=directory,
        runner_command=REAL_RUNNER,
        num_parallel=case.slots,
        cache_type=case.cache,
        llama_server=str(llama_server()) if case.engine == LLAMA_SERVER else "",
    )
    engine = Engine(settings, lambda: PLENTY)
    options = Options(num_ctx=case.context, num_predict=16)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        before = engine.estimate(spec, options)
        request = GenerateRequest(spec.name, PROMPT, options=options)
        async with engine.generate(spec, request) as events:
            async for event in events:
                assert not isinstance(event, Failed), event
        [runner] = [child for child in psutil.Process().children() if child.memory_info().rss]
        used = runner.memory_info().rss
        after = engine.estimate(spec, options)
        nursery.cancel_scope.cancel()
    return before, used, after


def main() -> int:
    spec = spec_of(smollm2_file())
    print(HEADING)
    worst = 1.0
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            before, used, after = trio.run(measure, case, spec, Path(directory))
        worst = max(worst, after / used)
        print(
            f"{case.engine:<12}  {case.slots} x {case.context:<11}  {case.cache:<5}  "
            f"{before // MIB:>9}  {used // MIB:>4}  {after // MIB:>9}   "
            f"{before / used:.2f} {after / used:.2f}",
            flush=True,
        )
        if before < used or after < used:
            print("it takes more than was estimated")
            return 1
    print(f"corrected estimates are at most {worst:.2f} of what is used")
    return 0


if __name__ == "__main__":
    sys.exit(main())
