"""What a container or a service may use of this host: Linux control groups, both versions.

The limits of a group hold for all groups in it, so those of every ancestor are looked at.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
UNLIMITED = "max"
NO_LIMIT_V1 = 1 << 60  # bytes; version 1 says the largest page-aligned number


def cpu_quota(groups: Path = CGROUPS, own: Path = OWN_GROUPS) -> float | None:
    """The cores that this process may use in the mean; None without a limit."""
    quotas = []
    for directory in _ancestors("cpu", groups, own):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (directory / "cpu.max").read_text().split()
            if quota != UNLIMITED:
                quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((directory / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                quotas.append(quota_us / int((directory / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


def free_memory(groups: Path = CGROUPS, own: Path = OWN_GROUPS) -> int | None:
    """Bytes that processes of this group may still take; None without a limit.

    Files in the page cache count as free, as in the kernel's own `MemAvailable`.
    """
    free = []
    for directory in _ancestors("memory", groups, own):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((directory / limit).read_text())  # `max` is no number
                if most < NO_LIMIT_V1:
                    used = int((directory / usage).read_text()) - _reclaimable(directory)
                    free.append(max(0, most - max(0, used)))
    return min(free, default=None)


def _reclaimable(directory: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def _ancestors(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """The directories of this process' group and of all groups around it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controller if controllers else groups
        # In a container the path may be one of the host, which is not there.
        directory = root / path.lstrip("/")
        while True:
            yield directory
            if directory == root or root not in directory.parents:
                break
            directory = directory.parent
