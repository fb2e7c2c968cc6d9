"""How much memory a runner will take: estimated before the load, corrected by what was then used.

An estimate is weights, the cache of keys and values of all slots, compute buffers, and an
overhead for the program. Of a model that ran before, the overhead is what its runner really took
beyond the other parts; this is remembered over restarts. Of layers on GPUs both the weights and
their part of the cache lie there.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ollamad.core.weights import CTRANSFORMERS
from ollamad.engine.runner import CPU_BATCH, GPU_BATCH, PROMPT_CACHE_MIB
from ollamad.engine.spec import AUTO_BATCH, ModelSpec, RunnerConfig

MIB = 1 << 20

# Measured with xllamacpp: 12 MiB for the program beside its mapped files, 24 MiB more for
# SmolLM2 at a batch of 64. With room, since too little ends in the kernel's killing a process.
PROGRAM_BYTES = 96 * MIB
LEAST_PROGRAM_BYTES = 36 * MIB  # of that, what was measured: counted whatever is seen later
# For files that do not tell their layers: a model of 4 GB with full attention keeps 0.5 MB a
# token, newer ones (grouped attention) a quarter of that.
KV_GUESS_DIVISOR = 8192
# Bytes of a number in the cache, as a fraction of f16's: blocks of 32 with a scale of 2 bytes.
CACHE_SHARES = {"f16": 1.0, "q8_0": 34 / 64, "q4_0": 18 / 64}
F32_BYTES = 4
# Tensors of a batch that are alive at once, in widths of the model: measured, rounded up.
LIVE_WIDTHS = 8
LIVE_FEED_FORWARDS = 3
SAFETY = 1.1  # on what was measured: the next use may be a little larger
# On each GPU, for the driver's context and what others allocate meanwhile. llama.cpp's own fit
# leaves 1 GiB.
GPU_RESERVE_BYTES = 512 * MIB
MAX_REMEMBERED = 512  # models


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Bytes by what they are for."""

    weights: int
    cache: int  # keys and values
    compute: int
    overhead: int
    vram: int = 0  # of the whole, on GPUs
    vram_overhead: int = 0  # of that, what was measured beyond the other parts

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.overhead + self.vram_overhead

    @property
    def ram(self) -> int:
        return self.total - self.vram


@dataclasses.dataclass(frozen=True, slots=True)
class Used:
    """What a runner was seen to take, in bytes."""

    anonymous: int  # of its own: comes free when it ends
    mapped: int = 0  # of files: the weights, as far as they were read; shared with the page cache
    vram: int = 0


UNKNOWN = Used(0)


def estimate(
    spec: ModelSpec, config: RunnerConfig, overhead: int | None = None, vram_overhead: int = 0
) -> Need:
    """What a runner will take; the overheads are the measured ones, if there are."""
    weights = spec.weights
    kv_bytes_per_token = spec.details.kv_bytes_per_token or spec.size // KV_GUESS_DIVISOR
    tokens = config.context_length * config.parallel
    cache = int(kv_bytes_per_token * tokens * CACHE_SHARES[config.cache_type])
    batch = config.batch
    if batch == AUTO_BATCH:
        batch = GPU_BATCH if config.offloaded else CPU_BATCH
    width = weights.width or spec.details.embedding_length
    widths = LIVE_WIDTHS * width + LIVE_FEED_FORWARDS * weights.feed_forward
    compute = batch * F32_BYTES * (weights.vocabulary + widths)
    prompts = 0 if config.engine == CTRANSFORMERS else PROMPT_CACHE_MIB * MIB
    if overhead is None:
        overhead = PROGRAM_BYTES + prompts
    # The cache of prompts fills up by and by; when it was measured, it may have been empty.
    overhead = max(overhead, LEAST_PROGRAM_BYTES + prompts)
    need = Need(spec.size, cache, compute, overhead)
    if not config.offloaded:
        return need
    vram = _vram(spec, need, config.offloaded) + vram_overhead
    return dataclasses.replace(need, vram=vram, vram_overhead=vram_overhead)


def fitting_layers(spec: ModelSpec, need: Need, free_vram: Sequence[int]) -> int:
    """How many layers go on GPUs with that many free bytes each; the output counts as one more.

    `need` is that of a runner with layers on GPUs. No layer is shared between two GPUs.
    """
    sizes = spec.weights.layer_bytes
    if not sizes:
        return 0
    # The overhead was measured for all GPUs together.
    taken = need.compute + GPU_RESERVE_BYTES + need.vram_overhead // max(1, len(free_vram))
    rooms = [max(0, free - taken) for free in free_vram]
    layer = max(1, max(sizes) + need.cache // len(sizes))
    layers = sum(room // layer for room in rooms)
    output = spec.size - sum(sizes)
    # The output is on one of them, beside fewer layers.
    beside = (layers - room // layer + (room - output) // layer for room in rooms if room >= output)
    if max(beside, default=0) >= len(sizes):
        return len(sizes) + 1
    return min(len(sizes), layers)


def _vram(spec: ModelSpec, need: Need, layers: int) -> int:
    sizes = spec.weights.layer_bytes
    if not sizes:
        return 0
    offloaded = min(layers, len(sizes))
    vram = _vram_weights(spec, layers) + need.cache * offloaded // len(sizes)
    return vram + need.compute


def _vram_weights(spec: ModelSpec, layers: int) -> int:
    sizes = spec.weights.layer_bytes
    if layers > len(sizes):
        return spec.size
    return sum(sizes[len(sizes) - layers :])  # llama.cpp offloads the last layers first


class Measured(msgspec.Struct):
    """What is remembered of one model under one engine."""

    overhead: int  # bytes beyond weights, cache and compute buffers, not on GPUs
    estimated: int  # bytes, at the last measurement
    used: int
    vram_overhead: int = 0  # likewise, on GPUs


class MemoryRecord:
    """The measured overheads, kept in a small file. Without a file they last as long as this."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._measured: dict[str, Measured] = {}
        self._saved: dict[str, tuple[int, int]] = {}
        if path is not None:
            # A damaged or foreign file costs the corrections, not the start.
            with contextlib.suppress(OSError, msgspec.DecodeError):
                self._measured = msgspec.json.decode(path.read_bytes(), type=dict[str, Measured])

    def estimate(self, spec: ModelSpec, config: RunnerConfig) -> Need:
        """What a runner will take, corrected if the model was measured before."""
        known = self._measured.get(_key(spec, config))
        if known is None:
            return estimate(spec, config)
        overheads = int(known.overhead * SAFETY), int(known.vram_overhead * SAFETY)
        return estimate(spec, config, *overheads)

    def learn(self, spec: ModelSpec, config: RunnerConfig, used: Used) -> None:
        """Take in what a runner takes that has answered something. The most counts."""
        need = estimate(spec, config)
        # Weights that were copied by the engine are not told apart.
        beyond = used.anonymous - need.cache - need.compute
        beyond += max(0, used.mapped - spec.size)  # the program and its libraries
        beyond_vram = 0
        if need.vram:
            beyond += need.vram - _vram_weights(spec, config.offloaded)
            beyond_vram = used.vram - need.vram
        key = _key(spec, config)
        known = self._measured.pop(key, None)
        if known is not None:
            beyond = max(beyond, known.overhead)
            beyond_vram = max(beyond_vram, known.vram_overhead)
        total = used.anonymous + used.mapped + used.vram
        self._measured[key] = Measured(max(0, beyond), need.total, total, max(0, beyond_vram))
        while len(self._measured) > MAX_REMEMBERED:
            del self._measured[next(iter(self._measured))]

    def measured(self, spec: ModelSpec, config: RunnerConfig) -> Measured | None:
        return self._measured.get(_key(spec, config))

    def save(self) -> None:
        """Write the file if something changed by a MiB or more."""
        if self._path is None:
            return
        rounded = {
            key: (value.overhead // MIB, value.vram_overhead // MIB)
            for key, value in self._measured.items()
        }
        if rounded == self._saved:
            return
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):  # it is an optimisation; a full disk shows elsewhere
            partial.write_bytes(msgspec.json.encode(self._measured))
            partial.replace(self._path)
            self._saved = rounded


def _key(spec: ModelSpec, config: RunnerConfig) -> str:
    kind = "embed" if config.embedding else "text"
    return f"{spec.digest} {config.engine} {kind} {config.offloaded > 0:d}"
