"""What the engine is told: about a model, about itself, and what a runner is started with.

Values only. Nothing in here starts, opens or measures anything.
"""

import dataclasses
import os
import sys
from pathlib import Path

import msgspec
import psutil

from ollamad.core.inference import Failed, InferenceError, Message, Options
from ollamad.core.state import ModelDetails
from ollamad.core.weights import (
    CTRANSFORMERS,
    ENGINES,
    LEGACY_TYPES,
    LLAMA_SERVER,
    XLLAMACPP,
    Choice,
    NoEngine,
    Weights,
    choose_engine,
)

# What this program is started again with. One that is frozen has no modules to name.
OURSELVES = (
    (sys.executable,) if getattr(sys, "frozen", False) else (sys.executable, "-m", "ollamad")
)

# Tokens of an input to embed: pooling needs them all in one batch. Ollama's batch.
EMBEDDING_BATCH = 512
AUTO_BATCH = 0  # the runner knows what suits its hardware
MIN_CONTEXT = 4  # tokens; Ollama raises smaller ones to this too
MAX_CONTEXT = 1 << 24  # tokens; far above any model, well below what overflows llama.cpp's int
MAX_BATCH = 1 << 16  # tokens; compute buffers grow with it


class ModelSpec(msgspec.Struct, frozen=True):
    """All that the engine needs to know of a model; its files are on this node."""

    name: str  # shortest form with tag
    digest: str
    gguf_path: str
    size: int  # bytes of the weights
    details: ModelDetails = ModelDetails()
    # A chat template that replaces the file's own, in Jinja or in Ollama's language. For tools and
    # thoughts only one in Jinja will do, since llama.cpp has to know it: else the file's is used.
    template: str | None = None
    system: str | None = None  # system prompt for requests that bring none
    messages: tuple[Message, ...] = ()  # said before every conversation
    options: Options = Options()  # the model's own parameters
    adapter_paths: tuple[str, ...] = ()  # LoRA adapters, GGUF; all are applied in full
    projector_path: str = ""  # GGUF (mmproj) that lets the model see or hear; empty: it cannot
    weights: Weights = Weights()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How this node runs models."""

    runtime_dir: Path  # for the runners' sockets; made with mode 0700, owned by the engine
    keep_alive_s: float = 300.0  # an idle model stays that long; negative: for ever
    num_parallel: int = 4  # requests that one model serves at the same time
    max_loaded_models: int = 3
    context_length: int = 4096  # tokens a request, where neither request nor model says
    max_queue: int = 512  # requests that wait for one model's slots, or for a load
    load_timeout_s: float = 300.0
    # A runner that owes an answer is ended when it gave no sign of life for so long.
    stall_timeout_s: float = 60.0
    threads: int = 0  # of a runner, where neither request nor model says; 0: all usable cores
    gpu_layers: int = -1  # likewise; -1: as many as fit
    cache_type: str = "f16"  # of keys and values: one of runner.CACHE_TYPES
    engines: tuple[str, ...] = (XLLAMACPP, CTRANSFORMERS)  # that this node has
    llama_server: str = ""  # path of the program; then it is preferred to the embedded one
    memory_record: Path | None = None  # file that remembers what models took
    # What starts a runner; its arguments follow.
    runner_command: tuple[str, ...] = (*OURSELVES, "runner")


@dataclasses.dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What a runner is started with. A request that needs another one causes a reload."""

    model_path: str
    context_length: int  # tokens a slot
    parallel: int
    threads: int
    batch: int = AUTO_BATCH  # tokens evaluated at once
    gpu_layers: int = -1  # -1: as many as fit
    offloaded: int = 0  # of them, those that are known to go on GPUs
    embedding: bool = False  # makes embeddings, not text
    pooling: str = ""  # how embeddings are pooled; empty: as the model's file says
    chat_template: str = ""  # Jinja; empty: the one in the file
    adapter_paths: tuple[str, ...] = ()
    projector_path: str = ""
    engine: str = XLLAMACPP
    engine_reason: str = dataclasses.field(default="", compare=False)
    cache_type: str = "f16"
    program: str = ""  # the llama-server to run
    legacy_type: str = ""  # what ctransformers calls the model

    def arguments(self) -> list[str]:
        """The command line of `ollamad runner`, without the socket."""
        arguments = ["--model", self.model_path]
        arguments += ["--ctx", str(self.context_length), "--parallel", str(self.parallel)]
        arguments += ["--threads", str(self.threads), "--batch", str(self.batch)]
        arguments += ["--gpu-layers", str(self.gpu_layers)]
        arguments += ["--engine", self.engine, "--cache-type", self.cache_type]
        if self.program:
            arguments += ["--program", self.program]
        if self.legacy_type:
            arguments += ["--legacy-type", self.legacy_type]
        if self.embedding:
            arguments.append("--embedding")
        if self.pooling:
            arguments += ["--pooling", self.pooling]
        if self.chat_template:
            arguments += ["--chat-template", self.chat_template]
        for path in self.adapter_paths:
            arguments += ["--adapter", path]
        if self.projector_path:
            arguments += ["--projector", self.projector_path]
        return arguments


def runner_config(
    spec: ModelSpec, options: Options, settings: EngineSettings, *, embedding: bool = False
) -> RunnerConfig:
    """What a runner for this model and these options (already over the model's) looks like.

    Text and embeddings have runners of their own: embeddings need batches as large as an input,
    and while a batch is evaluated no stream gets a token and no cancellation is heard. Both map
    the same file, so the second one costs no weights.

    Raises:
      InferenceError: an option is out of range.
    """
    context = settings.context_length if options.num_ctx is None else options.num_ctx
    _check_range("num_ctx", context, 1, MAX_CONTEXT)
    context = max(MIN_CONTEXT, context)
    if spec.details.context_length:
        context = min(context, spec.details.context_length)  # beyond, a model talks nonsense
    batch = AUTO_BATCH
    if options.num_batch is not None:
        batch = options.num_batch
        _check_range("num_batch", batch, 1, MAX_BATCH)
    pooling = ""
    if embedding and "completion" in spec.details.capabilities:
        # Generative models have no pooling of their own; the mean is what Ollama takes too.
        pooling = "mean"
        batch = context = min(context, batch or EMBEDDING_BATCH)
    elif embedding:
        batch = context = min(context, MAX_BATCH)
    choice = choose(spec, options, settings)
    is_legacy = choice.engine == CTRANSFORMERS
    threads = options.num_thread or settings.threads
    gpu_layers = settings.gpu_layers if options.num_gpu is None else options.num_gpu
    template = spec.template or ""
    legacy_type = "gguf"
    if spec.weights.format != "gguf":
        legacy_type = LEGACY_TYPES.get(spec.weights.architecture, spec.weights.architecture)
    return RunnerConfig(
        model_path=spec.gguf_path,
        context_length=context,
        parallel=1 if is_legacy else max(1, settings.num_parallel),
        threads=threads if threads > 0 else usable_cores(),
        batch=batch,
        gpu_layers=0 if is_legacy else max(-1, gpu_layers),
        embedding=embedding,
        engine=choice.engine,
        engine_reason=choice.reason,
        cache_type="f16" if is_legacy else settings.cache_type,
        program=settings.llama_server if choice.engine == LLAMA_SERVER else "",
        legacy_type=legacy_type if is_legacy else "",
        pooling=pooling,
        chat_template=template if "{%" in template and not embedding else "",
        adapter_paths=spec.adapter_paths,
        projector_path="" if embedding else spec.projector_path,
    )


def choose(spec: ModelSpec, options: Options, settings: EngineSettings) -> Choice:
    """The engine that runs this model here, and why.

    Raises:
      InferenceError: this node has none for it.
    """
    try:
        return choose_engine(
            spec.weights,
            wanted=options.engine or "",
            preferred=LLAMA_SERVER if settings.llama_server else XLLAMACPP,
            available=settings.engines + ((LLAMA_SERVER,) if settings.llama_server else ()),
        )
    except NoEngine as error:
        if options.engine and options.engine not in ENGINES:
            failure = Failed(code="INVALID_OPTION", message=str(error), status=400)
        else:  # another node may have it
            failure = Failed(code="LOAD_FAILED", message=f"{spec.name} cannot be run: {error}")
        raise InferenceError(failure) from None


def usable_cores(quota: float | None = None) -> int:
    """Physical cores that this process may use; hyperthreads only slow the maths down.

    `quota` is what a container or a service may use, in cores. More threads than that stand still
    together for the rest of each period.
    """
    allowed = len(os.sched_getaffinity(0))
    cores = min(psutil.cpu_count(logical=False) or allowed, allowed)
    if quota is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        message = f"the option {name} is {value}; it must be from {low} to {high}"
        raise InferenceError(Failed(code="INVALID_OPTION", message=message, status=400))
