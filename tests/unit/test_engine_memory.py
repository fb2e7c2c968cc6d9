"""What a runner takes: the estimate, its correction, and what goes on GPUs."""

import dataclasses
from pathlib import Path

import msgspec
import pytest

from ollamad.core.inference import Options
from ollamad.core.state import ModelDetails
from ollamad.core.weights import Weights
from ollamad.engine.memory import (
    GPU_RESERVE_BYTES,
    MIB,
    MemoryRecord,
    Used,
    estimate,
    fitting_layers,
)
from ollamad.engine.spec import EngineSettings, ModelSpec, RunnerConfig, runner_config

LAYER = 100 * MIB
SPEC = ModelSpec(
    "m:latest",
    "sha256:m",
    "/m",
    1100 * MIB,  # ten layers and as much as one for the rest
    ModelDetails(context_length=8192, kv_bytes_per_token=10_240),
    weights=Weights(layer_bytes=(LAYER,) * 10, vocabulary=32_000, width=1024, feed_forward=4096),
)


def config_of(**settings: object) -> RunnerConfig:
    made = EngineSettings(runtime_dir=Path("unused"), num_parallel=2, **settings)  # type: ignore[arg-type]
    return runner_config(SPEC, Options(num_ctx=1024), made)


def test_the_parts_of_an_estimate():
    need = estimate(SPEC, config_of())
    assert need.weights == SPEC.size
    assert need.cache == 10_240 * 1024 * 2
    assert need.compute == 64 * 4 * (32_000 + 8 * 1024 + 3 * 4096)
    assert need.total == need.weights + need.cache + need.compute + need.overhead
    assert (need.vram, need.ram) == (0, need.total)


@pytest.mark.parametrize(("kind", "share"), [("f16", 1.0), ("q8_0", 0.53125), ("q4_0", 0.28125)])
def test_a_quantised_cache_is_smaller(kind: str, share: float):
    assert estimate(SPEC, config_of(cache_type=kind)).cache == int(10_240 * 1024 * 2 * share)


def test_a_larger_batch_needs_larger_buffers():
    small = config_of()
    large = dataclasses.replace(small, batch=512)
    assert estimate(SPEC, large).compute == 8 * estimate(SPEC, small).compute


@pytest.mark.parametrize(
    ("free_layers", "fit"),
    [
        ((0,), 0),
        ((3.5,), 3),
        ((10,), 10),
        ((12,), 11),
        ((2.5, 4.2), 6),
        ((1.9, 1.9), 2),
        ((5.6, 5.6), 10),
        ((5.1, 6.1), 11),
    ],
)
def test_as_many_layers_as_fit_go_on_gpus(free_layers: tuple[float, ...], fit: int):
    need = estimate(SPEC, config_of())
    layer = LAYER + need.cache // 10
    free = [int(count * layer) + need.compute + GPU_RESERVE_BYTES + 1 for count in free_layers]
    assert fitting_layers(SPEC, need, free) == fit


def test_a_gpu_without_room_gets_nothing():
    need = estimate(SPEC, config_of())
    assert fitting_layers(SPEC, need, [GPU_RESERVE_BYTES]) == 0
    untold = msgspec.structs.replace(SPEC, weights=Weights())
    assert fitting_layers(untold, need, [1 << 40]) == 0


def test_what_is_on_a_gpu_is_not_in_memory():
    base = estimate(SPEC, config_of())
    half = estimate(SPEC, dataclasses.replace(config_of(), offloaded=5))
    assert half.vram == 5 * LAYER + base.cache // 2 + half.compute
    assert half.ram == half.total - half.vram
    whole = estimate(SPEC, dataclasses.replace(config_of(), offloaded=11))
    assert whole.vram == base.weights + base.cache + whole.compute


def test_the_runners_own_batch_is_larger_with_layers_on_gpus():
    config = config_of()
    on_gpu = dataclasses.replace(config, offloaded=5)
    assert estimate(SPEC, on_gpu).compute == 8 * estimate(SPEC, config).compute
    told = dataclasses.replace(on_gpu, batch=64)
    assert estimate(SPEC, told).compute == estimate(SPEC, config).compute


def test_what_was_measured_corrects_the_estimate_for_good(tmp_path: Path):
    path, config = tmp_path / "memory.json", config_of()
    record = MemoryRecord(path)
    guess = record.estimate(SPEC, config)
    assert guess == estimate(SPEC, config)
    own = guess.cache + guess.compute
    record.learn(SPEC, config, Used(own + 300 * MIB, mapped=SPEC.size))
    better = record.estimate(SPEC, config)
    assert better.overhead == pytest.approx(330 * MIB, abs=10)
    assert better.total > guess.total
    # The most counts, also when the next runner takes less for now.
    record.learn(SPEC, config, Used(own + 20 * MIB))
    assert record.estimate(SPEC, config) == better
    record.save()
    assert MemoryRecord(path).estimate(SPEC, config) == better
    # Another context has the same overhead, and its own cache.
    wide = dataclasses.replace(config, context_length=2048)
    assert MemoryRecord(path).estimate(SPEC, wide).cache == 2 * better.cache
    assert MemoryRecord(path).estimate(SPEC, wide).overhead == better.overhead
    known = MemoryRecord(path).measured(SPEC, config)
    assert known is not None
    assert (known.estimated, known.used) == (guess.total, own + 20 * MIB)


@pytest.mark.parametrize(("engine", "least"), [("xllamacpp", 164), ("ctransformers", 36)])
def test_what_a_runner_may_still_take_is_always_counted(engine: str, least: int):
    record, config = MemoryRecord(), dataclasses.replace(config_of(), engine=engine)
    need = estimate(SPEC, config)
    # After its first answer: nothing is in its cache of prompts yet.
    record.learn(SPEC, config, Used(need.cache + need.compute + 20 * MIB, mapped=SPEC.size))
    known = record.estimate(SPEC, config)
    assert (known.overhead, known.overhead < need.overhead) == (least * MIB, True)


def test_what_was_taken_of_a_gpu_beyond_the_plan_is_left_free_the_next_time(tmp_path: Path):
    record = MemoryRecord(tmp_path / "memory.json")
    config = dataclasses.replace(config_of(), offloaded=5)
    plan = estimate(SPEC, config)
    own = plan.cache - plan.cache // 2  # what is not on the GPU
    record.learn(SPEC, config, Used(own + 200 * MIB, SPEC.size, plan.vram + 300 * MIB))
    record.save()
    known = MemoryRecord(tmp_path / "memory.json").estimate(SPEC, config)
    assert known.vram - plan.vram == known.vram_overhead == pytest.approx(330 * MIB, abs=10)
    assert known.overhead == pytest.approx(220 * MIB, abs=10)
    assert known.ram == plan.ram - plan.overhead + known.overhead
    free = [GPU_RESERVE_BYTES + plan.vram]
    assert fitting_layers(SPEC, plan, free) == 5
    assert fitting_layers(SPEC, known, free) == 1
    assert fitting_layers(SPEC, known, free * 2) == 6  # half of it on each
    # In memory alone it takes what it takes; and a driver may not tell what is on the GPU.
    assert record.estimate(SPEC, config_of()) == estimate(SPEC, config_of())
    record.learn(SPEC, config, Used(own))
    assert record.estimate(SPEC, config) == known


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path):
    path, config = tmp_path / "memory.json", config_of()
    key = f"{SPEC.digest} {config.engine} text 0"
    path.write_text(f'{{"{key}": {{"overhead": {300 * MIB}, "estimated": 1, "used": 2}}}}')
    assert MemoryRecord(path).estimate(SPEC, config).overhead == pytest.approx(330 * MIB, abs=10)


def test_it_is_remembered_for_each_model_and_engine(tmp_path: Path):
    record, config = MemoryRecord(tmp_path / "memory.json"), config_of()
    record.learn(SPEC, config, Used(1 << 40))
    other = msgspec.structs.replace(SPEC, digest="sha256:other")
    assert record.estimate(other, config) == estimate(other, config)
    embedding = dataclasses.replace(config, embedding=True)
    assert record.estimate(SPEC, embedding) == estimate(SPEC, embedding)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_damaged_record_costs_the_corrections_only(tmp_path: Path, content: bytes):
    path = tmp_path / "memory.json"
    path.write_bytes(content)
    record = MemoryRecord(path)
    assert record.estimate(SPEC, config_of()) == estimate(SPEC, config_of())
    record.learn(SPEC, config_of(), Used(1 << 33))
    record.save()
    assert MemoryRecord(path).measured(SPEC, config_of()) is not None


def test_it_is_not_written_again_for_nothing(tmp_path: Path):
    path = tmp_path / "memory.json"
    record = MemoryRecord(path)
    record.learn(SPEC, config_of(), Used(1 << 33))
    record.save()
    path.unlink()
    record.learn(SPEC, config_of(), Used((1 << 33) + 100))
    record.save()
    assert not path.exists()


def test_the_estimate_then_covers_everything_that_is_resident():
    record, config = MemoryRecord(), config_of()
    used = Used(150 * MIB, mapped=SPEC.size + 200 * MIB)
    record.learn(SPEC, config, used)
    assert record.estimate(SPEC, config).total >= used.anonymous + used.mapped
