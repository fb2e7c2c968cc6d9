"""What this host has and how busy it is: psutil, and NVML where there is an NVIDIA GPU."""

import logging
import time
from pathlib import Path
from typing import Any

import psutil

from ollamad import cgroups
from ollamad.core.presence import Gpu, Usage
from ollamad.core.state import Capacity

ASSUMED_LINK = 125_000_000  # bytes/s; one gigabit, where the interfaces do not tell

log = logging.getLogger(__name__)


class HostMonitor:
    """Samples usage. `sample` takes well under a millisecond, so it may run in the event loop.

    Args:
      models_dir: where models are kept; its file system is the disk that counts.
    """

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._nvml = _open_nvml()
        self._network = self._network_bytes()
        self._network_at = time.monotonic()
        psutil.cpu_percent(None)  # the first call only starts the measurement
        self.usage = Usage()
        self.gpus: tuple[Gpu, ...] = ()

    def capacity(self) -> Capacity:
        """What the hardware has, in bytes."""
        gpus = self._read_gpus()
        return Capacity(
            cpu_cores=psutil.cpu_count(logical=True) or 1,
            memory_bytes=psutil.virtual_memory().total,
            disk_bytes=psutil.disk_usage(str(self._models_dir)).total,
            gpu_count=len(gpus),
            gpu_memory_bytes=sum(gpu.memory_total for gpu in gpus),
        )

    def sample(self) -> Usage:
        """Measure the time since the last call; also refreshes `usage` and `gpus`."""
        memory = psutil.virtual_memory()
        mine = cgroups.free_memory()
        disk = psutil.disk_usage(str(self._models_dir))
        now, network = time.monotonic(), self._network_bytes()
        elapsed = max(now - self._network_at, 1e-3)
        bandwidth = max(0.0, (network - self._network) / elapsed)
        self._network, self._network_at = network, now
        self.gpus = self._read_gpus()
        self.usage = Usage(
            cpu=psutil.cpu_percent(None) / 100,
            memory=memory.percent / 100,
            disk=disk.percent / 100,
            gpu=max((gpu.utilisation for gpu in self.gpus), default=0.0),
            bandwidth=bandwidth,
            memory_available=min(memory.available, memory.available if mine is None else mine),
            disk_free=disk.free,
        )
        return self.usage

    def free_vram(self) -> tuple[int, ...]:
        """Free bytes of each NVIDIA GPU; empty where there is none."""
        return tuple(gpu.memory_total - gpu.memory_used for gpu in self._read_gpus())

    def vram_used(self, pid: int) -> int | None:
        """Bytes that a process has on all GPUs; None if the driver does not tell."""
        if self._nvml is None:
            return None
        nvml, used = self._nvml, 0
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid:
                        if process.usedGpuMemory is None:  # in containers, and under WSL
                            return None
                        used += int(process.usedGpuMemory)
        except nvml.NVMLError as error:
            log.warning("NVML: %s", error)
            return None
        return used

    def network_percent(self) -> float:
        """Traffic in percent of what the interfaces that are up can carry."""
        try:
            speeds = [s.speed for s in psutil.net_if_stats().values() if s.isup and s.speed]
        except OSError:
            speeds = []
        link = sum(speeds, 0) * 125_000 or ASSUMED_LINK  # Mbit/s to bytes/s
        return min(100.0, 100 * self.usage.bandwidth / link)

    def _network_bytes(self) -> int:
        try:
            counters = psutil.net_io_counters()
        except OSError:  # sandboxes hide /proc/net/dev
            return 0
        return counters.bytes_sent + counters.bytes_recv if counters else 0

    def _read_gpus(self) -> tuple[Gpu, ...]:
        if self._nvml is None:
            return ()
        nvml, gpus = self._nvml, []
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                name = nvml.nvmlDeviceGetName(handle)
                gpus.append(
                    Gpu(
                        name=name.decode() if isinstance(name, bytes) else name,
                        memory_total=int(memory.total),
                        memory_used=int(memory.used),
                        utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                        temperature_c=nvml.nvmlDeviceGetTemperature(
                            handle, nvml.NVML_TEMPERATURE_GPU
                        ),
                    )
                )
        except nvml.NVMLError as error:  # a GPU that falls off the bus must not end the daemon
            log.warning("NVML: %s", error)
        return tuple(gpus)


def _open_nvml() -> Any | None:
    """The NVML module, initialised; None where there is no NVIDIA driver."""
    try:
        import pynvml  # only here: it probes for the driver's library

        pynvml.nvmlInit()
    except Exception as error:  # whatever a missing or broken driver raises, there is no GPU
        log.debug("no NVIDIA GPU: %s", error)
        return None
    return pynvml
