"""The limits of containers and services, from files as the kernel writes them."""

from pathlib import Path

import pytest

from ollamad.cgroups import cpu_quota, free_memory
from ollamad.engine.spec import usable_cores

MIB = 1 << 20


@pytest.fixture
def group(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.write_text("0::/system.slice/ollamad.service\n")
    directory = tmp_path / "fs" / "system.slice" / "ollamad.service"
    directory.mkdir(parents=True)
    return directory


def limits(group: Path) -> tuple[float | None, int | None]:
    root = group.parent.parent
    own = root.parent / "own"
    return cpu_quota(root, own), free_memory(root, own)


def test_without_limits(group: Path):
    assert limits(group) == (None, None)
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert limits(group) == (None, None)


def test_a_groups_own_limits(group: Path):
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text(f"{1000 * MIB}\n")
    (group / "memory.current").write_text(f"{700 * MIB}\n")
    (group / "memory.stat").write_text(f"anon {500 * MIB}\ninactive_file {200 * MIB}\n")
    assert limits(group) == (1.5, 500 * MIB)


def test_the_tightest_limit_of_all_groups_around_counts(group: Path):
    (group / "cpu.max").write_text("400000 100000\n")
    (group.parent / "cpu.max").write_text("50000 100000\n")
    (group.parent.parent / "memory.max").write_text("100\n")
    (group.parent.parent / "memory.current").write_text("150\n")
    assert limits(group) == (0.5, 0)


def test_version_1(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    root = tmp_path / "fs"
    (root / "cpu").mkdir(parents=True)
    (root / "memory" / "docker" / "x").mkdir(parents=True)
    (root / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (root / "memory" / "docker" / "x" / "memory.limit_in_bytes").write_text("5000\n")
    (root / "memory" / "docker" / "x" / "memory.usage_in_bytes").write_text("2000\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "memory" / "memory.usage_in_bytes").write_text("2000\n")
    assert (cpu_quota(root, own), free_memory(root, own)) == (2.0, 3000)


def test_no_groups_at_all(tmp_path: Path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None
    assert free_memory(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(("quota", "cores"), [(0.3, 1), (1.0, 1), (1.9, 1)])
def test_a_quota_bounds_the_threads(quota: float, cores: int):
    assert usable_cores(quota) == cores
    assert usable_cores(1000.0) == usable_cores()
