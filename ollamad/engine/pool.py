"""Which models are in memory: loads them, keeps them, makes room, notices when they die.

One load at a time, as in Ollama. A model that serves somebody is never evicted: who needs the
room waits; if no model is ever idle, one of them gets no new requests until it is. The pool knows
nothing of prompts and tokens.
"""

import dataclasses
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from ollamad.core.inference import Failed, InferenceError, LoadedModel
from ollamad.core.slots import Slots
from ollamad.core.weights import LLAMA_SERVER
from ollamad.engine.accelerators import NO_ACCELERATORS, Accelerators, can_offload
from ollamad.engine.memory import (
    GPU_RESERVE_BYTES,
    UNKNOWN,
    MemoryRecord,
    Need,
    Used,
    fitting_layers,
)
from ollamad.engine.process import Runner
from ollamad.engine.spec import EngineSettings, ModelSpec, RunnerConfig

MAX_SOCKET_PATH = 107  # bytes; Linux has 108 with the closing zero (sun_path)
FIRST_BACK_OFF_S = 0.5  # before the restart after a second crash in a row; the first is free
MAX_BACK_OFF_S = 30.0
# A restart that is due so soon is waited for; a later one is refused, so that another node is
# asked. Long enough for two crashes in a row.
PATIENCE_S = 2.0
ROOM_PATIENCE_S = 10.0  # for a model to become idle by itself
LEARN_INTERVAL_S = 5.0  # between two looks at what a runner takes
GIB = 1 << 30

log = logging.getLogger(__name__)


class _Key(NamedTuple):
    name: str  # lower case
    embedding: bool


@dataclasses.dataclass(eq=False, slots=True)
class Resident:
    """A model whose runner is ready. `pins` counts the requests that hold it."""

    spec: ModelSpec
    wanted: RunnerConfig  # what was asked for
    config: RunnerConfig  # what fits: perhaps fewer slots, and layers on GPUs
    runner: Runner
    need: Need
    slots: trio.Semaphore  # how many are free
    caches: Slots  # what they hold
    keep_alive_s: float
    pins: int = 0
    busy: int = 0
    queued: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    retiring: bool = False  # takes no new requests; ends when the last one is through
    used: Used = UNKNOWN
    vram: int = 0  # bytes that it takes on GPUs, as it was last asked
    learnt_at: float = -math.inf

    @property
    def expires_at(self) -> float:
        """On trio's clock; infinite while it is used or stays for ever."""
        if self.pins or self.keep_alive_s < 0:
            return math.inf
        return self.last_used + self.keep_alive_s


@dataclasses.dataclass(slots=True)
class _Crashes:
    """Of one model, as it was: another file or configuration begins anew."""

    digest: str
    config: RunnerConfig
    in_a_row: int = 0
    last: float = 0.0
    failure: Failed | None = None  # of the last load, if it was that

    def restart_at(self) -> float:
        if self.in_a_row < 2:
            return 0.0
        return self.last + min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** (self.in_a_row - 2))


@dataclasses.dataclass(eq=False, slots=True)
class _Loading:
    """A load, and how many requests wait for it. It ends with the last of them."""

    digest: str
    config: RunnerConfig
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    done: trio.Event = dataclasses.field(default_factory=trio.Event)
    waiting: int = 0
    resident: Resident | None = None  # then pinned for each that waits
    error: Exception | None = None  # for one of them; the others try again


class RunnerPool:
    """The runners of this node. `free_memory` tells the bytes that new processes may take."""

    def __init__(
        self,
        settings: EngineSettings,
        free_memory: Callable[[], int],
        accelerators: Accelerators = NO_ACCELERATORS,
    ) -> None:
        self._settings = settings
        self._most_runners = max(1, settings.max_loaded_models)
        self._free_memory = free_memory
        self._accelerators = accelerators
        self._offloads: dict[str, bool] = {}  # engine -> whether it can use the GPUs
        self.record = MemoryRecord(settings.memory_record)
        self._residents: dict[_Key, Resident] = {}
        self._crashes: dict[_Key, _Crashes] = {}
        self._loadings: dict[_Key, _Loading] = {}
        self._load_lock = trio.Lock()
        self._waiting = 0  # requests that wait for a load
        self._nursery: trio.Nursery | None = None
        self._changed = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Own the runners until cancelled; then they are killed.

        Raises:
          ValueError: the path of the runtime directory is too long for sockets.
        """
        directory = self._settings.runtime_dir
        longest = os.fsencode(_socket_path(directory))
        if len(longest) > MAX_SOCKET_PATH:
            raise ValueError(
                f"the runtime directory {directory} makes socket paths of {len(longest)} bytes; "
                f"the system allows {MAX_SOCKET_PATH}: choose a shorter one"
            )
        _prepare(directory)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await self._end_idle_runners()
                finally:
                    self._nursery = None  # at once: a load that ends with it is not begun anew
        finally:
            self._nursery = None

    async def acquire(
        self, spec: ModelSpec, config: RunnerConfig, keep_alive_s: float | None
    ) -> Resident:
        """The runner of a model, loaded if need be, pinned until `release`.

        Waits for busy models to make room. On cancellation the load ends, unless others wait for
        it, too.

        Raises:
          InferenceError: the model cannot be loaded, or too many requests wait already.
        """
        key = _key(spec, config)
        resident = self._find(key, spec, config)
        if resident is None:
            if self._waiting >= self._settings.max_queue:
                raise queue_full()
            self._waiting += 1
            try:
                while resident is None:
                    await self._back_off(key, spec, config)
                    resident = await self._loaded(key, spec, config)
            finally:
                self._waiting -= 1
        else:
            resident.pins += 1
        if keep_alive_s is not None:  # who says nothing of it takes no pin away
            resident.keep_alive_s = keep_alive_s
        return resident

    def release(self, resident: Resident) -> None:
        """Give back what `acquire` gave."""
        resident.pins -= 1
        resident.last_used = trio.current_time()
        self._notify()

    def finished_well(self, resident: Resident) -> None:
        """The runner has proved that it works: its crashes are forgotten, its size remembered."""
        self._crashes.pop(_key(resident.spec, resident.config), None)
        now = trio.current_time()
        if now - resident.learnt_at < LEARN_INTERVAL_S or resident.runner.over:
            return
        resident.learnt_at = now
        used = resident.runner.used()
        if (vram := self._ask_vram(resident)) is not None:
            used = dataclasses.replace(used, vram=vram)
        resident.used = used
        if used.anonymous:  # zero where the system does not tell
            self.record.learn(resident.spec, resident.config, used)
            self.record.save()

    async def unload(self, name: str) -> bool:
        """End a model's runners: now if they are idle, else after their last answer.

        Returns whether there was one.
        """
        residents = [r for key, r in self._residents.items() if key.name == name.lower()]
        for resident in residents:
            resident.keep_alive_s = 0.0
        for resident in residents:
            if not resident.pins:
                await self._end(resident)
        return bool(residents)

    @property
    def places(self) -> int:
        """How many runners can be started, by their number, before another one has to end."""
        return max(0, self._most_runners - len(self._residents) - self._load_lock.locked())

    def usable_vram(self, free_vram: Sequence[int]) -> int:
        """Bytes that runners can have of so many free ones on each GPU, as far as is known."""
        knows_gpus = any(self._offloads.values()) or not self._offloads
        if not knows_gpus or self._settings.gpu_layers == 0:
            return 0
        return sum(max(0, free - GPU_RESERVE_BYTES) for free in free_vram)

    def loaded(self) -> tuple[LoadedModel, ...]:
        """The models in memory.

        A model with a runner for embeddings beside the one for text is told as one, in the
        terms of the latter.
        """
        told: dict[str, LoadedModel] = {}
        for key, resident in sorted(self._residents.items(), key=lambda item: item[0].embedding):
            model = self._describe(resident)
            if (text := told.get(key.name)) is not None:
                model = msgspec.structs.replace(
                    text,
                    size=text.size + model.size,
                    size_vram=text.size_vram + model.size_vram,
                    size_used=text.size_used + model.size_used,
                    busy=text.busy + model.busy,
                    queued=text.queued + model.queued,
                )
            told[key.name] = model
        return tuple(told.values())

    def _describe(self, resident: Resident) -> LoadedModel:
        expires_at = 0.0
        if resident.keep_alive_s >= 0:
            since = trio.current_time() if resident.pins else resident.last_used
            expires_at = time.time() - trio.current_time() + since + resident.keep_alive_s
        return LoadedModel(
            name=resident.spec.name,
            digest=resident.spec.digest,
            size=resident.need.total,
            size_vram=resident.vram,
            context_length=resident.config.context_length,
            expires_at=expires_at,
            slots=resident.config.parallel,
            busy=resident.busy,
            queued=resident.queued,
            engine=resident.config.engine,
            engine_reason=resident.config.engine_reason,
            size_used=resident.used.anonymous + resident.used.mapped + resident.used.vram,
        )

    def _ask_vram(self, resident: Resident) -> int | None:
        """Bytes on GPUs as the driver tells it, and notes them; None where it does not.

        Takes up to a millisecond, so it is for what is rare: engines allocate when they load.
        """
        pid = resident.runner.pid
        if not resident.config.offloaded or pid is None:
            return 0
        told = self._accelerators.vram_used(pid)
        resident.vram = resident.need.vram if told is None else told
        return told

    def _find(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> Resident | None:
        resident = self._residents.get(key)
        if resident is None or resident.retiring or resident.runner.over:
            return None
        same = resident.wanted == config and resident.spec.digest == spec.digest
        return resident if same else None

    async def _loaded(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> Resident | None:
        """The runner, pinned, out of a load that is shared; None if it has to be tried again."""
        if self._nursery is None:
            raise InferenceError(_STOPPED)
        loading = self._loadings.get(key)
        if loading is None or (loading.digest, loading.config) != (spec.digest, config):
            loading = self._loadings[key] = _Loading(spec.digest, config)
            self._nursery.start_soon(self._load_for_all, loading, key, spec, config)
        loading.waiting += 1
        try:
            await loading.done.wait()
        except trio.Cancelled:
            if loading.waiting == 1:
                loading.scope.cancel()
                with trio.CancelScope(shield=True):  # a killed process ends soon
                    await loading.done.wait()
            if loading.resident is not None:
                self.release(loading.resident)
            raise
        finally:
            loading.waiting -= 1
        error, loading.error = loading.error, None
        if error is not None:
            raise error
        return loading.resident

    async def _load_for_all(
        self, loading: _Loading, key: _Key, spec: ModelSpec, config: RunnerConfig
    ) -> None:
        try:
            with loading.scope:
                async with self._load_lock:
                    resident = self._find(key, spec, config)
                    # It may have crashed while others had the lock; then they wait anew.
                    if resident is None and self._back_off_s(key, spec, config) <= 0:
                        resident = await self._load(key, spec, config)
                    if resident is not None:
                        resident.pins += loading.waiting
                        loading.resident = resident
        except Exception as error:
            loading.error = error
        finally:
            if self._loadings.get(key) is loading:
                del self._loadings[key]
            loading.done.set()

    async def _load(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> Resident:
        if self._nursery is None:
            raise InferenceError(_STOPPED)
        if (old := self._residents.get(key)) is not None:
            await self._end(old)
        give_up_at = trio.current_time() + self._settings.load_timeout_s
        most_layers: int | None = None
        while True:
            resident = await self._planned(spec, config, most_layers)
            failure = await self._nursery.start(self._keep, key, resident)
            if failure is None:
                self._ask_vram(resident)
                self._residents[key] = resident
                self._notify()
                return resident
            # It may have been too much for the GPUs. Layers asked for by number stay as they are.
            layers = resident.config.offloaded if config.gpu_layers < 0 else 0
            is_late = trio.current_time() >= give_up_at
            if not layers or is_late or resident.runner.refuses_file:
                self._note_crash(key, resident, failure)
                raise InferenceError(failure)
            most_layers = layers // 2
            log.info("%s is tried again with %d layers on GPUs", spec.name, most_layers)
            await resident.runner.exited.wait()  # so that what it took is free

    async def _planned(
        self, spec: ModelSpec, wanted: RunnerConfig, most_layers: int | None
    ) -> Resident:
        """A runner that is not started yet, when there is room for it."""
        config = await self._fitted(spec, wanted, most_layers)
        need = self.record.estimate(spec, config)
        await self._make_room(spec.name, need.ram)
        runner = Runner(
            spec,
            config,
            self._settings.runner_command,
            _socket_path(self._settings.runtime_dir),
            self._settings.load_timeout_s,
            self._settings.stall_timeout_s,
        )
        return Resident(
            spec=spec,
            wanted=wanted,
            config=config,
            runner=runner,
            need=need,
            slots=trio.Semaphore(config.parallel),
            caches=Slots(config.parallel),
            keep_alive_s=self._settings.keep_alive_s,
            last_used=trio.current_time(),
            loaded_at=trio.current_time(),
        )

    async def _keep(
        self, key: _Key, resident: Resident, *, task_status: trio.TaskStatus[Failed | None]
    ) -> None:
        try:
            await resident.runner.run(task_status=task_status)
        finally:
            if self._residents.get(key) is resident:
                del self._residents[key]
            self._notify()
        if resident.runner.crashed:
            self._note_crash(key, resident, None)
            log.warning(
                "the runner of %s ended by itself: %s",
                resident.spec.name,
                resident.runner.describe_end(),
            )

    async def _back_off(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> None:
        """Wait until a model that has crashed may be started again, if that is soon.

        Others may load meanwhile.

        Raises:
          InferenceError: it is not soon.
        """
        wait_s = self._back_off_s(key, spec, config)
        if wait_s <= PATIENCE_S:
            await trio.sleep(wait_s)
            return
        crashes = self._crashes[key]
        times, again = crashes.in_a_row, f"it is started again in {wait_s:.0f} s"
        retry: dict[str, str | int | float | list[str]] = {"retry_after": math.ceil(wait_s)}
        if crashes.failure is not None:
            message = f"{crashes.failure.message} ({times} times in a row; {again})"
            details = crashes.failure.details | retry
            raise InferenceError(  # 503: it may be better by then
                msgspec.structs.replace(
                    crashes.failure, message=message, status=503, details=details
                )
            )
        message = f"the runner of {spec.name} has crashed {times} times in a row; {again}"
        raise InferenceError(Failed("RUNNER_DIED", message, 503, retry))

    def _back_off_s(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> float:
        """Seconds until the model may be started."""
        crashes = self._crashes_of(key, spec, config)
        return 0.0 if crashes is None else max(0.0, crashes.restart_at() - trio.current_time())

    def _crashes_of(self, key: _Key, spec: ModelSpec, config: RunnerConfig) -> _Crashes | None:
        crashes = self._crashes.get(key)
        if crashes is None or (crashes.digest, crashes.config) != (spec.digest, config):
            return None
        return crashes

    def _note_crash(self, key: _Key, resident: Resident, failure: Failed | None) -> None:
        spec, config = resident.spec, resident.wanted
        crashes = self._crashes_of(key, spec, config)
        if crashes is None:
            crashes = self._crashes[key] = _Crashes(spec.digest, config)
        crashes.in_a_row += 1
        crashes.last = trio.current_time()
        crashes.failure = failure

    async def _fitted(
        self, spec: ModelSpec, config: RunnerConfig, most_layers: int | None
    ) -> RunnerConfig:
        """The configuration with as many layers on GPUs as fit, and no more slots than fit."""
        free_vram = self._accelerators.free_vram()
        # Of GPUs that the driver does not tell of (no NVIDIA's), llama.cpp itself takes care.
        asks = config.gpu_layers and (free_vram or config.engine == LLAMA_SERVER)
        if asks and not await self._can_offload(config):
            config = dataclasses.replace(config, gpu_layers=0)
        elif config.gpu_layers and free_vram:
            layers = config.gpu_layers
            if layers < 0:
                layers = await self._layers(spec, config)
                if most_layers is not None:
                    layers = min(layers, most_layers)
            config = dataclasses.replace(config, gpu_layers=layers, offloaded=layers)
        residents = self._residents.values()
        most = self._free_memory() + sum(one.runner.anonymous_bytes() for one in residents)
        while config.parallel > 1 and self.record.estimate(spec, config).ram > most:
            config = dataclasses.replace(config, parallel=config.parallel // 2)
            log.info("%s gets %d slots: memory is short", spec.name, config.parallel)
        return config

    async def _can_offload(self, config: RunnerConfig) -> bool:
        if config.engine not in self._offloads:
            command = [*self._settings.runner_command, "--engine", config.engine]
            command += ["--program", config.program, "--list-devices"]
            told = await can_offload(command)
            if told is None:
                return False  # it is asked again
            self._offloads[config.engine] = told
        return self._offloads[config.engine]

    async def _layers(self, spec: ModelSpec, config: RunnerConfig) -> int:
        """How many layers fit on the GPUs, when idle models there have made room."""
        while True:
            need = self.record.estimate(spec, dataclasses.replace(config, offloaded=1))
            layers = fitting_layers(spec, need, self._accelerators.free_vram())
            there = [
                one
                for one in self._residents.values()
                if one.config.offloaded and not one.pins and one.keep_alive_s >= 0
            ]
            if layers > len(spec.weights.layer_bytes) or not there:
                return layers
            victim = min(there, key=lambda one: one.last_used)
            log.info("%s makes room on the GPU for %s", victim.spec.name, spec.name)
            await self._end(victim)

    async def _make_room(self, name: str, size: int) -> None:
        """End idle models until one that takes `size` bytes fits.

        The longest unused goes first; those that are to stay for ever only when no other is left.
        """
        patient_until = trio.current_time() + ROOM_PATIENCE_S
        while True:
            changed = self._changed
            available = self._free_memory()
            residents = list(self._residents.values())
            taken = [resident.runner.anonymous_bytes() for resident in residents]
            most = available + sum(taken)
            if size > most:
                raise InferenceError(_no_memory(name, size, most))
            # The system counts mapped weights, and what was not written to yet, as free.
            promised = sum(
                max(0, resident.need.ram - bytes_taken)
                for resident, bytes_taken in zip(residents, taken, strict=True)
            )
            free = available - promised
            full = len(self._residents) >= self._most_runners
            if size <= free and not full:
                return
            idle = [resident for resident in residents if not resident.pins]
            if idle:
                victim = min(idle, key=lambda one: (one.keep_alive_s < 0, one.last_used))
                log.info("%s makes room for %s", victim.spec.name, name)
                await self._end(victim)
            elif residents:
                with trio.move_on_at(patient_until) as patience:
                    await changed.wait()
                if patience.cancelled_caught:
                    victim = min(residents, key=lambda one: (one.keep_alive_s < 0, one.loaded_at))
                    log.info("%s is never idle: it makes room for %s", victim.spec.name, name)
                    await self._end(victim)
            else:
                raise InferenceError(_no_memory(name, size, free))

    async def _end(self, resident: Resident) -> None:
        """End a runner when its last request is through; cancelled before, it stays."""
        resident.retiring = True
        try:
            while resident.pins and not resident.runner.over:
                await self._changed.wait()
        except trio.Cancelled:
            resident.retiring = False
            raise
        resident.runner.stop()
        await resident.runner.exited.wait()
        # `_keep` takes it out right after this; who waited must not see it any more.
        key = _key(resident.spec, resident.config)
        if self._residents.get(key) is resident:
            del self._residents[key]

    async def _end_idle_runners(self) -> None:
        while True:
            changed = self._changed
            now = trio.current_time()
            for resident in list(self._residents.values()):
                if resident.expires_at <= now and not resident.retiring:
                    log.info("%s is unloaded after its keep-alive", resident.spec.name)
                    await self._end(resident)
            staying = [one for one in self._residents.values() if not one.retiring]
            deadline = min((one.expires_at for one in staying), default=math.inf)
            with trio.move_on_at(deadline):
                await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def queue_full() -> InferenceError:
    """The error when too many requests wait, in Ollama's words."""
    message = "server busy, please try again.  maximum pending requests exceeded"
    return InferenceError(Failed(code="QUEUE_FULL", message=message, status=503))


_STOPPED = Failed(code="STOPPED", message="the engine of this node is not running", status=503)


def _no_memory(name: str, size: int, free: int) -> Failed:
    message = (
        f"{name} needs about {size / GIB:.1f} GiB of memory, but {free / GIB:.1f} GiB can be had; "
        "lower num_ctx or the number of parallel requests, or choose a smaller model"
    )
    details: dict[str, str | int | float | list[str]] = {"needed": size, "available": free}
    return Failed(code="INSUFFICIENT_MEMORY", message=message, status=503, details=details)


def _key(spec: ModelSpec, config: RunnerConfig) -> _Key:
    return _Key(spec.name.lower(), config.embedding)


def _socket_path(directory: Path) -> Path:
    """A new path; a socket's file that is left over would refuse a second server."""
    return directory / f"runner-{secrets.token_hex(6)}.sock"


def _prepare(directory: Path) -> None:
    """Make the directory ours alone and clear what an unclean end left there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)  # whoever reaches a socket may use the model
    for leftover in directory.glob("runner-*.sock"):
        leftover.unlink(missing_ok=True)
