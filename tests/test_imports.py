"""Holds the import rules: which package may know which.

They are what keeps the decisions pure (and so testable on virtual time), the parts apart, and
foreign bytes away from unpickling.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DAEMON = ROOT / "ollamad"
CLI = ROOT / "cli" / "ollama_dist"

PURE = ("core", "wire")
# Each declares the protocols that it consumes; the daemon's own modules put them together.
IO_PACKAGES = ("raft", "peers", "store", "sources", "transfer", "engine", "scheduler", "api")
# What would make a decision depend on more than its arguments.
IMPURE = {"trio", "socket", "time", "random", "secrets", "subprocess", "threading", "ssl"}
RUNNERS = {"runner.py", "legacy_runner.py"}  # what runs in child processes
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "asyncio"}


def sources(*directories: Path) -> list[Path]:
    return sorted(path for directory in directories for path in directory.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The absolute name of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            yield node.lineno, ast.unparse(node.args[0]).strip("'\"")


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    """Where one of these modules, or something of it, is imported."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path)
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def test_the_rules_read_real_files() -> None:
    assert len(sources(DAEMON)) > 50
    assert len(sources(CLI)) > 10
    assert "trio" in {name for _, name in imports(DAEMON / "daemon.py")}
    assert offences([DAEMON / "daemon.py"], {"trio"})


@pytest.mark.parametrize("package", PURE)
def test_pure_packages_decide_by_their_arguments_alone(package: str) -> None:
    others = {f"ollamad.{name}" for name in (*IO_PACKAGES, "daemon", "cluster", "library")}
    assert offences(sources(DAEMON / package), IMPURE | others) == []


def test_core_does_not_know_the_wire() -> None:
    assert offences(sources(DAEMON / "core"), {"ollamad.wire"}) == []


@pytest.mark.parametrize("package", IO_PACKAGES)
def test_io_packages_do_not_know_each_other(package: str) -> None:
    allowed = {package, *PURE}
    known_to_them = {f"ollamad.{name}" for name in IO_PACKAGES if name not in allowed}
    # Nor do they know who puts them together.
    roots = {f"ollamad.{path.stem}" for path in DAEMON.glob("*.py") if path.stem != "__init__"}
    assert offences(sources(DAEMON / package), known_to_them | roots) == []


def test_only_raft_knows_pysyncobj() -> None:
    others = [path for path in sources(DAEMON, CLI) if DAEMON / "raft" not in path.parents]
    assert offences(others, {"pysyncobj"}) == []


def test_nothing_unpickles() -> None:
    assert offences(sources(DAEMON, CLI), UNSAFE) == []


def test_only_the_runner_loads_the_engines_library() -> None:
    others = [path for path in sources(DAEMON, CLI) if path.name not in RUNNERS]
    assert offences(others, {"xllamacpp", "ctransformers"}) == []


def test_the_command_line_talks_to_the_daemon_over_rest_only() -> None:
    assert offences(sources(CLI), {"ollamad"}) == []


def test_the_daemon_does_not_know_the_command_line() -> None:
    assert offences(sources(DAEMON), {"ollama_dist"}) == []


def test_the_program_needs_nothing_of_its_tests() -> None:
    assert offences(sources(DAEMON, CLI), {"tests", "pytest"}) == []
