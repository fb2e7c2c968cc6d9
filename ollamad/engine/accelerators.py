"""The GPUs of this host as the pool sees them, and whether an engine can use them."""

import logging
import subprocess
from collections.abc import Sequence
from typing import Protocol

import trio

DEVICES_TIMEOUT_S = 30.0  # drivers may take seconds to wake up
CPU = "CPU"  # what runners call the device that everybody has

log = logging.getLogger(__name__)


class Accelerators(Protocol):
    """What the driver tells."""

    def free_vram(self) -> Sequence[int]:
        """Free bytes of each GPU; empty where there is none."""
        ...

    def vram_used(self, pid: int) -> int | None:
        """Bytes that a process has on all GPUs; None if the driver does not tell."""
        ...


class _None:
    def free_vram(self) -> Sequence[int]:
        return ()

    def vram_used(self, pid: int) -> int | None:
        return None


NO_ACCELERATORS: Accelerators = _None()


async def can_offload(command: Sequence[str]) -> bool | None:
    """Whether an engine knows other devices than the CPU; it is asked by running it.

    `command` is a runner's that lists devices, one a line. None: it did not tell.
    """
    try:
        with trio.fail_after(DEVICES_TIMEOUT_S):
            done = await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,  # a runner ends when a pipe there is closed
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
            )
    except (OSError, trio.TooSlowError) as error:
        log.warning("the engine does not tell its devices: %s", error)
        return None
    if done.returncode != 0:
        log.warning("the engine does not tell its devices: it ended with %d", done.returncode)
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    devices = [line.strip() for line in lines if line.strip()]
    # llama-server puts a headline over its list, and says `(none)` without a GPU.
    return any(
        ":" in device and not device.startswith(CPU) and not device.endswith(":")
        for device in devices
    )
