"""The daemon's settings: where they come from, what they may be, and what is wrong with them.

Order, strongest first: command line, environment, `config/node.yaml`, `config/config.yaml`,
defaults. An unknown or invalid key stops the start with the file, the line and the reason.

msgspec does both jobs here (schema and conversion): it is in the daemon anyway for the wire,
starts in milliseconds, and its errors carry the path of the bad key, which the YAML parse tree
turns into a line. pydantic-settings would add 25 MB of memory for the same.
"""

import difflib
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ollamad.api.origins import parse_origins
from ollamad.core.failover import MODES
from ollamad.core.names import check_node_name
from ollamad.core.routing import POLICIES
from ollamad.sources.policy import parse_hosts

MIN_TIMEOUT_S = 1.0  # of an engine; below, a busy machine looks like a dead runner
MIN_SECRET_BYTES = 32  # RFC 7518: an HS256 key is at least as long as its hash
MIN_TOKEN_TTL_S, MAX_TOKEN_TTL_S = 900.0, 3600.0  # short, since a stolen token works so long

MIN_RATE = 1000.0  # bytes a second; below, a piece takes a quarter of an hour

CONFIG_FILES = ("config.yaml", "node.yaml")  # weakest first


class ConfigError(Exception):
    """A setting is wrong; the message names the place (file and line, or variable) and why."""


class ApiSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """HTTP: REST for people, programs and the command line."""

    listen: str = "0.0.0.0:8080"
    # Where programs written for Ollama look. auto: 127.0.0.1:11434, unless an Ollama has it.
    ollama_listen: str = "auto"
    origins: str = ""  # of web pages that may call, with commas between; this host's always may
    # Connections, in all and from one address; 0 for any number. A connection takes some 50 kB.
    max_connections: int = 4096
    max_connections_per_address: int = 512


class P2pSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between nodes: questions, tokens, pieces, joining. `host:port` or `/ip4/…/tcp/…`."""

    listen: str = "/ip4/0.0.0.0/tcp/9000"


class RaftSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between nodes: consensus only."""

    listen: str = "0.0.0.0:7000"


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str = ""  # empty: the host's name
    advertise: str = ""  # host that others reach this node at; empty: found out
    bootstrap: bool = False  # this node founds the cluster and never joins another


class AuthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    loopback_role: str = "inference"  # what requests from this host may do without a token
    jwt_secret: str = ""  # empty: the cluster's own key; when set, the same on every node
    token_ttl: str = "30m"  # lifetime of access tokens


class RateLimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of `/api/v1`, for each caller and node; 0 switches one off."""

    general: int = 100  # requests a minute
    model_ops: int = 10  # downloads, deletions, copies, … a minute
    websocket: int = 5  # connections of one address


class EngineSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keep_alive: str = "5m"  # how long an idle model stays loaded; negative: for ever
    num_parallel: int = 4  # requests that one loaded model serves at once
    max_loaded_models: int = 3
    max_queue: int = 512  # requests that wait: in the whole cluster, and for one runner
    context_length: int = 4096  # tokens a request, unless it or the model says otherwise
    llama_server: str = ""  # path of one that was built elsewhere; then it runs what is GGUF
    threads: int = 0  # of a runner; 0: the physical cores that this process may use
    gpu_layers: int = -1  # on GPUs; -1: as many as fit
    kv_cache_type: str = "f16"  # of keys and values: f16, q8_0 or q4_0
    load_timeout: str = "5m"  # for a model to be loaded
    stall_timeout: str = "60s"  # a runner that owes an answer and shows no life is killed


class SchedulerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    failover: str = "continue"  # how answers go on when their node is lost: see core.failover
    policy: str = "prefix"  # how a node is chosen for a request: see core.routing
    # How much longer a request may wait for a node that has most of its prompt in its cache.
    prefix_bound: str = "2s"


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str = ""  # empty: `models` in the data directory
    read_only: bool = False  # of `path`: new models go to the data directory
    scrub_interval: str = "168h"  # each file is read and checked once in so long; 0: never
    scrub_rate: int = 20  # megabytes a second that this may read
    replicas: int = 2  # copies of a pulled model, if there are that many nodes


class SourceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where models come from, and what of that this node may ask. Lists have commas between."""

    registry: str = ""  # stands in for registry.ollama.ai: host, host:port or URL
    allow_http: str = ""  # hosts that are asked without TLS
    allow_private: str = ""  # hosts and networks that are not public, and asked all the same
    redirects: str = "safe"  # to other hosts: safe (where a digest says what is right) or any
    token_hosts: str = ""  # hosts that registries may send to for a token, with the password
    ca_file: str = ""  # PEM file of CAs that are trusted, too
    connections: int = 8  # at once, of one download
    local_files: str = ""  # directories that models may be taken from, with colons between
    hf_endpoint: str = ""  # a mirror of Hugging Face
    hf_token: str = ""


class DistributionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where models are kept: see docs/placement.md. The leader's are in force."""

    lost_after: str = "5m"  # a node that is away so long gives its place to others
    hot_load: float = 2.0  # requests at once per copy that call for one more
    hot_after: str = "30s"  # the mean of them is over so long,
    cool_after: str = "10m"  # and over so long before a copy goes again


class DrainSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timeout: str = "60s"  # then running answers move to other nodes


class TransferSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models between nodes. Rates: bytes a second (`20MB`), bits (`100Mbit`), or `unlimited`."""

    max_upload: str = "unlimited"  # of this node, over all transfers
    max_download: str = "unlimited"
    while_generating: str = "8MB"  # neither is faster while a model answers on this node
    # off: pieces travel in the clear to and from nodes with the same setting (a trusted LAN).
    encryption: bool = True


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: bool = False  # whether Prometheus' `/metrics` needs no token


class LogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: str = "info"  # debug, info, warning, error
    format: str = "text"  # text or json


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of a daemon."""

    data_dir: str = ""  # empty: /var/lib/ollamad for root, else ~/.local/share/ollamad
    api: ApiSettings = ApiSettings()
    p2p: P2pSettings = P2pSettings()
    raft: RaftSettings = RaftSettings()
    node: NodeSettings = NodeSettings()
    auth: AuthSettings = AuthSettings()
    rate_limits: RateLimitSettings = RateLimitSettings()
    engine: EngineSection = EngineSection()
    scheduler: SchedulerSettings = SchedulerSettings()
    models: ModelSettings = ModelSettings()
    sources: SourceSettings = SourceSettings()
    distribution: DistributionSettings = DistributionSettings()
    drain: DrainSettings = DrainSettings()
    transfer: TransferSettings = TransferSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()


SECRETS = {"auth.jwt_secret", "sources.hf_token"}  # masked when settings are shown

# The user's document and Ollama name these; every other key is OLLAMAD_<SECTION>__<KEY>.
ENVIRONMENT = {
    "OLLAMA_JWT_SECRET": "auth.jwt_secret",
    "API_LISTEN": "api.listen",
    "OLLAMA_ORIGINS": "api.origins",
    "P2P_LISTEN": "p2p.listen",
    "RAFT_BIND_ADDR": "raft.listen",
    "LOG_LEVEL": "log.level",
    "NODE_ID": "node.name",
    "BOOTSTRAP": "node.bootstrap",
    "OLLAMAD_DATA_DIR": "data_dir",
    "OLLAMA_MODELS": "models.path",
    "HF_ENDPOINT": "sources.hf_endpoint",
    "HF_TOKEN": "sources.hf_token",
    "OLLAMA_KEEP_ALIVE": "engine.keep_alive",
    "OLLAMA_NUM_PARALLEL": "engine.num_parallel",
    "OLLAMA_MAX_LOADED_MODELS": "engine.max_loaded_models",
    "OLLAMA_MAX_QUEUE": "engine.max_queue",
    "OLLAMA_CONTEXT_LENGTH": "engine.context_length",
    "OLLAMA_KV_CACHE_TYPE": "engine.kv_cache_type",
    "OLLAMA_LOAD_TIMEOUT": "engine.load_timeout",
}
# Of these Ollama takes 0 as "automatic".
ENVIRONMENT_AUTOMATIC = {
    "OLLAMA_NUM_PARALLEL",
    "OLLAMA_MAX_LOADED_MODELS",
    "OLLAMA_CONTEXT_LENGTH",
}
ENVIRONMENT_PREFIX = "OLLAMAD_"
# Variables of that prefix that are no settings. The last is read by packaging/unpack.sh.
ENVIRONMENT_OTHERS = {"OLLAMAD_ADMIN_PASSWORD", "OLLAMAD_TEST_MODEL", "OLLAMAD_UNPACK_DIR"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `default`, `command line`, a variable, or `file:line`."""

    text: str
    path: Path | None = None  # of the file


@dataclass(frozen=True, slots=True)
class Effective:
    """The settings in force and the origin of each key (`section.key`)."""

    settings: Settings
    origins: Mapping[str, Origin]

    @property
    def files(self) -> set[Path]:
        """Those that any of it came from."""
        return {origin.path for origin in self.origins.values() if origin.path is not None}


DEFAULT_ORIGIN = Origin("default")


def load(
    config_dir: Path | None,
    environment: Mapping[str, str],
    command_line: Mapping[str, Any],
) -> Effective:
    """Read and merge all sources.

    Args:
      config_dir: holds `config.yaml` and `node.yaml`, each optional; must exist if given.
      environment: such as os.environ.
      command_line: values by `section.key`; None means not given.

    Raises:
      ConfigError: the first thing that is wrong.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for key, value, origin in _all_values(config_dir, environment, command_line):
        values[key] = _convert(key, value, origin)
        origins[key] = origin
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    settings = msgspec.convert(tree, Settings)
    for key, _ in walk(settings):
        origins.setdefault(key, DEFAULT_ORIGIN)
    return Effective(settings, origins)


def default_data_dir(environment: Mapping[str, str], *, is_root: bool) -> Path:
    """Where a daemon keeps its state when nothing says otherwise."""
    if is_root:
        return Path("/var/lib/ollamad")
    base = environment.get("XDG_DATA_HOME") or Path("~/.local/share").expanduser()
    return Path(base) / "ollamad"


def default_config_dir(data_dir: Path) -> Path | None:
    """`config/` where the daemon is started, in its data directory, or in /etc; None if none.

    Raises:
      ConfigError: the one where it is started could have been put there by somebody else, or one
        is there that we may not look into.
    """
    for candidate in (Path("config"), data_dir / "config", Path("/etc/ollamad")):
        try:
            candidate.stat()
        except OSError:  # not there, or nobody knows: `sudo -u` begins in another's home
            continue
        found = list_config_files(candidate)
        if found and candidate == Path("config"):
            for path in (candidate.absolute(), *found):
                _check_trusted(path)
        if found:
            return candidate
    return None


def list_config_files(config_dir: Path) -> list[Path]:
    """Those that are there. Raises ConfigError if we may not know."""
    return [config_dir / name for name in CONFIG_FILES if is_file(config_dir / name)]


def is_file(path: Path) -> bool:
    """Whether a file of settings is there. Raises ConfigError if we may not know."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    """What is there; 0 for nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:  # with defaults in its place the node would be another one
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be read: {error.strerror}; let this user read it and its directory, or "
        "name another directory with --config"
    )


def list_exposed_secrets(effective: Effective) -> list[str]:
    """A line for each secret in a file that everybody on this host can read."""
    lines = []
    for key in sorted(SECRETS):
        path = effective.origins[key].path
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            lines.append(f"{path} holds {key}, and everybody on this host can read it: chmod o-r")
    return lines


def _check_trusted(path: Path) -> None:
    """Who starts a daemon in somebody else's directory does not mean to use what lies there."""
    facts = path.stat()
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"{path} can be changed by others than you; if these settings are meant, name them: "
            f"--config {path if path.is_dir() else path.parent}"
        )


def walk(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Every key (`section.key`) with its value."""
    for field in msgspec.structs.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, msgspec.Struct):
            for inner in msgspec.structs.fields(value):
                yield f"{field.name}.{inner.name}", getattr(value, inner.name)
        else:
            yield field.name, value


def _all_values(
    config_dir: Path | None, environment: Mapping[str, str], command_line: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Origin]]:
    """Every given value, weakest source first, with known keys only."""
    if config_dir is not None:
        if not stat.S_ISDIR(_mode(config_dir)):
            raise ConfigError(f"{config_dir}: there is no such directory of settings")
        for name in CONFIG_FILES:
            yield from _file_values(config_dir / name)
    for variable, text in environment.items():
        key = ENVIRONMENT.get(variable)
        if key is None:
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in ENVIRONMENT_OTHERS:
                continue
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            if key not in _types():
                raise ConfigError(f"{variable}: there is no setting {key!r}{_hint(key)}")
        is_automatic = text == "0" and variable in ENVIRONMENT_AUTOMATIC
        if text and not is_automatic:  # an empty one is as good as none, in unit files above all
            yield key, text, Origin(variable)
    for key, value in command_line.items():
        if value is not None:
            yield key, value, Origin("command line")


def _file_values(path: Path) -> Iterator[tuple[str, Any, Origin]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None or _is_null(root):
            return
        yield from _mapping_values(path, root, "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.reason}") from None


def _mapping_values(path: Path, node: yaml.Node, prefix: str) -> Iterator[tuple[str, Any, Origin]]:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{line}: {prefix or 'the file'} must be a mapping of keys")
    seen = set[str]()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if key in seen:
            raise ConfigError(f"{path}:{line}: {key} is given twice")
        seen.add(key)
        if key in _types():
            try:
                value = yaml.constructor.SafeConstructor().construct_object(value_node, deep=True)
            except ValueError as error:  # a date that does not exist
                raise ConfigError(f"{path}:{line}: {key}: {error}") from None
            yield key, value, Origin(f"{path}:{line}", path)
        elif any(known.startswith(f"{key}.") for known in _types()) and not prefix:
            if not _is_null(value_node):  # a section whose keys are all commented out
                yield from _mapping_values(path, value_node, key)
        else:
            raise ConfigError(f"{path}:{line}: there is no setting {key!r}{_hint(key)}")


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _convert(key: str, value: Any, origin: Origin) -> Any:
    if _types()[key] is str and type(value) in (int, float):
        value = str(value)  # `keep_alive: 300` and `name: 17` need no quotes
    if _types()[key] is bool and isinstance(value, str):
        value = {"on": True, "yes": True, "off": False, "no": False}.get(value.lower(), value)
    try:
        converted = msgspec.convert(value, _types()[key], strict=not isinstance(value, str))
        _CHECKS.get(key, lambda _: None)(converted)
    except (msgspec.ValidationError, ValueError) as error:
        shown = "***" if key in SECRETS else repr(value)
        raise ConfigError(f"{origin.text}: {key} cannot be {shown}: {error}") from None
    return converted


def _types() -> dict[str, Any]:
    types: dict[str, Any] = {}
    for field in msgspec.structs.fields(Settings):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            for inner in msgspec.structs.fields(field.type):
                types[f"{field.name}.{inner.name}"] = inner.type
        else:
            types[field.name] = field.type
    return types


def _hint(given: str) -> str:
    """The keys that somebody who typed `given` most likely meant, as the end of a message."""
    name = given.rpartition(".")[2]
    same = [known for known in _types() if known.rpartition(".")[2] == name]
    close = same or difflib.get_close_matches(given, _types(), cutoff=0.75)
    return f"; did you mean {' or '.join(close)}?" if close else ""


_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)/?")


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[v6]:port`, `:port` or `/ip4/HOST/tcp/PORT`.

    Raises:
      ValueError: it is none of these.
    """
    if text.startswith("/"):
        match = _MULTIADDR.fullmatch(text)
        if match is None:
            raise ValueError("use host:port or /ip4/HOST/tcp/PORT")
        host, port = match[2], match[3]
    else:
        host, colon, port = text.rpartition(":")
        host = host.strip("[]") or "0.0.0.0"
        if not colon or not re.fullmatch("[0-9]+", port):
            raise ValueError("use host:port, for example 0.0.0.0:8080")
    if not 0 <= int(port) <= 65535:
        raise ValueError("a port is a number from 0 to 65535")
    return host, int(port)


_RATE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([kKmMgG]?)(i?)(bps|[Bb]it|[Bb])?(?:/s|ps)?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3}


def parse_rate(text: str) -> float | None:
    """Bytes a second of `20MB`, `20MiB/s`, `100Mbit` or a bare number of bytes; None is no limit.

    Raises:
      ValueError: it is none of these.
    """
    body = text.strip()
    if body in ("0", "unlimited"):
        return None
    match = _RATE.fullmatch(body)
    if match is None:
        raise ValueError("use a rate such as 20MB, 500KB or 100Mbit (a second), or 0 for no limit")
    number, prefix, binary, unit = match.groups()
    rate = float(number) * (1024.0 if binary else 1000.0) ** _POWERS[prefix.lower()]
    if unit is not None and unit.lower() in ("bit", "bps"):
        rate /= 8
    if rate < MIN_RATE:
        raise ValueError(f"{rate:g} bytes a second is too little to be meant; use 0 for no limit")
    return rate


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"[+-]?(\d+(?:\.\d*)?|\.\d+)")
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_duration(text: str) -> float:
    """Seconds of a Go duration (`5m`, `1h30m`, `-1s`) or of a bare number of seconds.

    Raises:
      ValueError: it is neither.
    """
    body = text.strip()
    if _NUMBER.fullmatch(body):  # not all that float() takes: no nan, no inf
        return float(body)
    sign, body = (-1.0, body[1:]) if body.startswith("-") else (1.0, body.removeprefix("+"))
    parts = _DURATION_PART.findall(body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        raise ValueError("use a duration such as 30s, 5m or 1h30m")
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)


def _one_of(*allowed: str) -> Any:
    def check(value: str) -> None:
        if value not in allowed:
            raise ValueError(f"use one of {', '.join(allowed)}")

    return check


def _at_least(least: int) -> Any:
    def check(value: int) -> None:
        if value < least:
            raise ValueError(f"it must be {least} or more")

    return check


def _between(least: int, most: int) -> Any:
    def check(value: int) -> None:
        if not least <= value <= most:
            raise ValueError(f"it must be {least} to {most}")

    return check


def _check_registry(value: str) -> None:
    if value and "://" in value:
        _check_url(value)
    elif value and not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", value):
        raise ValueError("use host, host:port or a URL")


def _check_url(value: str) -> None:
    if value and not re.fullmatch(r"https?://[^/\s@]+(/\S*)?", value):
        raise ValueError("use a URL such as https://host")


def _check_node_name(value: str) -> None:
    if value:
        check_node_name(value)


def _check_bound(value: str) -> None:
    if parse_duration(value) < 0:
        raise ValueError("it must be 0s or more")


def _check_ollama_listen(value: str) -> None:
    if value not in ("auto", "off"):
        parse_listen(value)


def _check_positive_duration(value: str) -> None:
    if parse_duration(value) <= 0:
        raise ValueError("it must be more than no time")


def _check_not_negative(value: str) -> None:
    if parse_duration(value) < 0:
        raise ValueError("it must not be negative")


def _check_hot_load(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError("use a number above 0, such as 2")


def _check_secret(value: str) -> None:
    if value and len(value.encode()) < MIN_SECRET_BYTES:
        raise ValueError(f"it must have at least {MIN_SECRET_BYTES} bytes")


def _check_timeout(value: str) -> None:
    if parse_duration(value) < MIN_TIMEOUT_S:
        raise ValueError(f"it must be {MIN_TIMEOUT_S:g} s or more")


def _check_token_ttl(value: str) -> None:
    if not MIN_TOKEN_TTL_S <= parse_duration(value) <= MAX_TOKEN_TTL_S:
        raise ValueError("use 15m to 1h")


_CHECKS: dict[str, Any] = {
    "api.listen": parse_listen,
    "api.ollama_listen": _check_ollama_listen,
    "api.origins": parse_origins,
    "api.max_connections": _at_least(0),
    "api.max_connections_per_address": _at_least(0),
    "p2p.listen": parse_listen,
    "raft.listen": parse_listen,
    "auth.loopback_role": _one_of("none", "viewer", "inference", "operator", "admin"),
    "auth.jwt_secret": _check_secret,
    "auth.token_ttl": _check_token_ttl,
    "engine.keep_alive": parse_duration,
    "engine.num_parallel": _at_least(1),
    "engine.max_loaded_models": _at_least(1),
    "engine.max_queue": _at_least(0),
    "engine.context_length": _at_least(8),
    "engine.threads": _at_least(0),
    "engine.gpu_layers": _at_least(-1),
    "engine.kv_cache_type": _one_of("f16", "q8_0", "q4_0"),
    "engine.load_timeout": _check_timeout,
    "engine.stall_timeout": _check_timeout,
    "models.scrub_interval": parse_duration,
    "models.scrub_rate": _at_least(1),
    "models.replicas": _at_least(1),
    "distribution.lost_after": _check_positive_duration,
    "distribution.hot_load": _check_hot_load,
    "distribution.hot_after": _check_positive_duration,
    "distribution.cool_after": _check_positive_duration,
    "drain.timeout": _check_not_negative,
    "rate_limits.general": _at_least(0),
    "rate_limits.model_ops": _at_least(0),
    "rate_limits.websocket": _at_least(0),
    "sources.registry": _check_registry,
    "sources.allow_http": parse_hosts,
    "sources.allow_private": parse_hosts,
    "sources.redirects": _one_of("safe", "any"),
    "sources.token_hosts": parse_hosts,
    "sources.connections": _between(1, 64),
    "sources.hf_endpoint": _check_url,
    "node.name": _check_node_name,
    "transfer.max_upload": parse_rate,
    "transfer.max_download": parse_rate,
    "transfer.while_generating": parse_rate,
    "log.level": _one_of("debug", "info", "warning", "error"),
    "log.format": _one_of("text", "json"),
    "scheduler.failover": _one_of(*MODES),
    "scheduler.policy": _one_of(*POLICIES),
    "scheduler.prefix_bound": _check_bound,
}


def is_root() -> bool:
    """Whether the daemon runs as the system's own service would."""
    return os.geteuid() == 0
