"""The program: which command is where.

Everything is imported for `--help`, so what is imported here must be cheap: neither httpx nor
rich, which the commands import when they run.
"""

import sys

import typer

from ollama_dist.commands import (
    auth,
    cluster,
    distribution,
    keys,
    models,
    nodes,
    transfers,
    users,
)
from ollama_dist.commands.chat import run
from ollama_dist.commands.doctor import doctor
from ollama_dist.commands.events import events
from ollama_dist.commands.explain import explain
from ollama_dist.commands.inference import embed, generate, stop
from ollama_dist.commands.top import top
from ollama_dist.session import root_callback

app = typer.Typer(
    name="ollama-dist",
    no_args_is_help=True,
    # Rich would draw boxes around the help, for twice the time.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.callback()(root_callback("Talk to a cluster of ollamad daemons; any node will do."))
app.command("status")(cluster.status)
app.command("top")(top)
app.command("events")(events)
app.command("run")(run)
app.command("generate")(generate)
app.command("embed")(embed)
app.command("explain")(explain)
app.command("ps")(nodes.ps)
app.command("stop")(stop)
app.add_typer(models.app, name="models")
app.add_typer(transfers.app, name="transfers")
app.add_typer(nodes.app, name="nodes")
app.add_typer(cluster.app, name="cluster")
app.add_typer(distribution.app, name="distribution")
app.add_typer(auth.app, name="auth")
app.add_typer(users.app, name="users")
app.add_typer(keys.app, name="keys")
app.command("doctor")(doctor)
app.command("version")(cluster.version)


def main() -> None:
    """The console script; leaves by SystemExit."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
