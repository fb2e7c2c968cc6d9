"""The `ollamad` command: start, backup, restore, recover, config and more, and the hidden runner.

Imports are late: a runner process needs none of the daemon, and `--help` needs nothing.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_HAS_LEFT = 78  # EX_CONFIG; the unit does not start it again after this

SYSLOG_ERROR, SYSLOG_WARNING = 3, 4

app = typer.Typer(
    name="ollamad",
    help="The daemon of Ollama Distributed: one on every host, together one big Ollama.",
    no_args_is_help=True,
    rich_markup_mode=None,  # as in ollama-dist: half the time
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="DIR", help="Directory with config.yaml and node.yaml."),
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Where this node keeps its state.")
]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.command()
def start(
    join: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN[@HOST:PORT]",
            help="Join a cluster: with HOST:PORT (a member's P2P address) at once, without it "
            "wait for `ollama-dist cluster join`.",
        ),
    ] = None,
    bootstrap: Annotated[
        bool, typer.Option("--bootstrap", help="Found a new cluster; never join another.")
    ] = False,
    dev: Annotated[
        bool,
        typer.Option(
            "--dev", help="For trying out: loopback only, and requests from it may do anything."
        ),
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in the foreground, which it always does.")
    ] = False,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    from ollamad import systemd

    systemd.pause_before_start()
    _start(join, bootstrap, dev, config, data_dir)
    systemd.forget_failures()


def _start(
    join: str | None, bootstrap: bool, dev: bool, config: Path | None, data_dir: Path | None
) -> None:
    if join is not None and bootstrap:
        _fail("--join and --bootstrap exclude each other", EXIT_USAGE)
    command_line: dict[str, Any] = {"node.bootstrap": True if bootstrap else None}
    if dev:
        command_line |= {
            "auth.loopback_role": "admin",
            "api.listen": "127.0.0.1:8080",
            "p2p.listen": "127.0.0.1:9000",
            "raft.listen": "127.0.0.1:7000",
        }
    effective, directory = _load(config, data_dir, command_line, dev=dev)
    from ollamad.errors import HasLeft, StartError
    from ollamad.settings import ConfigError, is_file, list_exposed_secrets
    from ollamad.start import run

    def reread() -> Any:
        for path in effective.files:
            if not is_file(path):  # else SIGHUP would bring the defaults, perhaps amid an edit
                raise ConfigError(f"{path} was there at the start and is gone")
        return _read(config, data_dir, command_line, dev=dev)[0].settings

    for line in list_exposed_secrets(effective):
        _say(line, SYSLOG_WARNING)
    try:
        run(effective.settings, directory, join, reread)
    except HasLeft as error:
        _fail(str(error), EXIT_HAS_LEFT)
    except StartError as error:
        _fail(str(error), EXIT_FAILURE)


@app.command()
def recover(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. What is checked stays the same.")
    ] = False,
) -> None:
    """Go on with this node alone after most voters are lost for good; its daemon must be stopped.

    Refuses while a majority can be reached. See "The majority is lost" in docs/operations.md.
    """
    _, directory = _load(config, data_dir, {}, dev=False)
    from ollamad import recover
    from ollamad.errors import StartError

    def confirm(plan: str) -> bool:
        typer.echo(plan, err=True)
        return yes or typer.confirm("Go on?", err=True)

    if not yes and not sys.stdin.isatty():
        _fail("this cannot be undone; say --yes to do it unasked", EXIT_USAGE)
    try:
        typer.echo(recover.recover(directory, confirm, _uninterrupted))
    except StartError as error:
        _fail(str(error), EXIT_FAILURE)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was changed", EXIT_FAILURE)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write; not there yet.")],
    models: Annotated[
        bool, typer.Option("--models", help="With the files of the models that this node holds.")
    ] = False,
    stale: Annotated[
        bool,
        typer.Option("--stale", help="What this node knows is good enough if there is no quorum."),
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Fail if the daemon does not run, as a timer should."),
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Write the cluster's state, with its keys, and this node's settings to one file.

    While the daemon runs, the state is what a majority confirms; else what the journal has. Run
    it as the daemon's user. See "Backup and restore" in docs/operations.md.
    """
    effective, directory = _load(config, data_dir, {}, dev=False)
    from ollamad import backup
    from ollamad.errors import StartError
    from ollamad.settings import default_config_dir

    where = config or default_config_dir(directory)
    try:
        typer.echo(
            backup.backup(file, directory, effective, where, models=models, stale=stale, live=live)
        )
    except StartError as error:
        _fail(str(error), EXIT_FAILURE)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `ollamad backup` wrote.")],
    node: Annotated[
        bool,
        typer.Option(
            "--node", help="Only the settings and models, for a node that joins its cluster again."
        ),
    ] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Make a new cluster of one node out of a backup, in the data directory of no node.

    The other nodes join it again. See "Backup and restore" in docs/operations.md.
    """
    _, directory = _load(config, data_dir, {}, dev=False)
    from ollamad import restore
    from ollamad.errors import StartError
    from ollamad.settings import ConfigError, default_config_dir

    def settings(of: Path | None) -> Any:
        return _read(of, data_dir, {}, dev=False)[0].settings

    where = config or default_config_dir(directory)
    try:
        typer.echo(restore.restore(file, directory, where, settings, node_only=node))
    except (StartError, ConfigError) as error:
        _fail(str(error), EXIT_FAILURE)


@app.command()
def renew(config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Renew the certificate of a stopped node that was off for longer than it is valid.

    A node that runs does so by itself, in time. The clock must be right.
    """
    _, directory = _load(config, data_dir, {}, dev=False)
    from ollamad import renewal
    from ollamad.errors import StartError

    try:
        typer.echo(renewal.renew(directory))
    except StartError as error:
        _fail(str(error), EXIT_FAILURE)


@app.command()
def forget(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Put aside the cluster that this stopped node was in, so that it can join another.

    For a node whose cluster is gone, or was restored from a backup without it. Models stay. A
    node of a cluster that is there is taken out with `ollama-dist cluster leave`.
    """
    _, directory = _load(config, data_dir, {}, dev=False)
    from ollamad import restore
    from ollamad.errors import StartError

    if not yes and not (
        sys.stdin.isatty()
        and typer.confirm(f"Put aside the state of the node in {directory}?", err=True)
    ):
        _fail("nothing was changed; say --yes to do it unasked", EXIT_USAGE)
    try:
        typer.echo(restore.forget(directory))
    except StartError as error:
        _fail(str(error), EXIT_FAILURE)


@app.command()
def config(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Print the settings in force and where each comes from; secrets are masked."""
    effective, directory = _load(config, data_dir, {}, dev=False)
    from ollamad.settings import SECRETS, walk

    rows = []
    for key, value in walk(effective.settings):
        if key in SECRETS and value:
            value = "********"
        if key == "data_dir":
            value = directory
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        rows.append((key, shown or '""', effective.origins[key].text))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        typer.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


@app.command(
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def runner(context: typer.Context) -> None:
    """Run one model (what the daemon starts)."""
    from ollamad.engine.runner import run_runner

    raise typer.Exit(run_runner(context.args))


@app.command()
def version() -> None:
    """Print the version, the commit and the engine's version."""
    from ollamad.build import build_info, engine_versions

    info = build_info()
    typer.echo(f"ollamad {info.version} (commit {info.git_commit}, built {info.build_time})")
    for name, number in engine_versions().items():
        typer.echo(f"{name} {number}")


def _load(
    config_dir: Path | None, data_dir: Path | None, command_line: dict[str, Any], *, dev: bool
) -> tuple[Any, Path]:
    """The effective settings and the data directory; ends the program if something is wrong."""
    from ollamad import settings

    try:
        return _read(config_dir, data_dir, command_line, dev=dev)
    except settings.ConfigError as error:
        _fail(str(error), EXIT_USAGE)


def _read(
    config_dir: Path | None, data_dir: Path | None, command_line: dict[str, Any], *, dev: bool
) -> tuple[Any, Path]:
    from ollamad import settings

    given = str(data_dir.absolute()) if data_dir else os.environ.get("OLLAMAD_DATA_DIR")
    fallback = settings.default_data_dir(os.environ, is_root=settings.is_root())
    directory = Path(given) if given else fallback
    where = config_dir or settings.default_config_dir(directory)
    if dev:  # what --dev sets gives way to what somebody set on purpose
        command_line = _unless_set(command_line, where)
    command_line = {**command_line, "data_dir": str(data_dir.absolute()) if data_dir else None}
    effective = settings.load(where, os.environ, command_line)
    return effective, Path(effective.settings.data_dir or fallback).absolute()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C, so that whoever types it is told the truth about what was done."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _unless_set(command_line: dict[str, Any], config_dir: Path | None) -> dict[str, Any]:
    """Drop the listen addresses that the files or the environment set to a loopback address."""
    from ollamad import settings

    given = settings.load(config_dir, os.environ, {})
    values = dict(settings.walk(given.settings))
    kept = dict(command_line)
    for key in ("api.listen", "p2p.listen", "raft.listen"):
        if given.origins[key] != settings.DEFAULT_ORIGIN:
            host, _ = settings.parse_listen(values[key])
            if host != "localhost" and not host.startswith("127.") and host != "::1":
                raise settings.ConfigError(
                    f"{given.origins[key].text}: {key} is {values[key]}, but --dev lets everybody "
                    "on this host do anything and so listens on loopback only"
                )
            del kept[key]
    return kept


def _fail(message: str, code: int) -> NoReturn:
    _say(message, SYSLOG_ERROR)
    raise typer.Exit(code)


def _say(message: str, priority: int) -> None:
    # A refusal may come from a stranger; it must not move the cursor of who reads it.
    shown = "".join(c if c.isprintable() else " " for c in message)
    from ollamad.systemd import is_journal

    mark = f"<{priority}>" if is_journal(sys.stderr) else ""
    typer.echo(f"{mark}ollamad: {shown}", err=True)
