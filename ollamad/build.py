"""Which version this is, from which commit, for which platform, and with which engines."""

import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import ollamad
from ollamad.core.weights import CTRANSFORMERS, XLLAMACPP

ENGINES = (XLLAMACPP, CTRANSFORMERS)  # that are installed as packages
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class BuildInfo:
    version: str
    build_time: str  # RFC 3339, or "unknown" when no build was made
    git_commit: str


def build_info() -> BuildInfo:
    """What packaging/build_hook.py baked in; "unknown" for an installation from source."""
    try:
        built = importlib.import_module("ollamad._build")
    except ModuleNotFoundError:
        return BuildInfo(ollamad.__version__, UNKNOWN, UNKNOWN)
    return BuildInfo(ollamad.__version__, built.BUILD_TIME, built.GIT_COMMIT)


def platform_name() -> str:
    """The platform in the form of Go's GOOS/GOARCH, as the API shows it."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return f"{platform.system().lower()}/{machine}"


def installed_engines() -> tuple[str, ...]:
    """The engines that runners can load, without loading them."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name) is not None)


def engine_versions() -> dict[str, str]:
    """The versions of the engines that are installed, without loading them."""
    versions = {}
    for name in ENGINES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
