"""One call of the program: its settings, its REST client, its consoles, and its exit code.

`command` turns a function of a `Session` into a Typer command. It adds the global options
behind the command too, and it is the one place where a problem becomes a line on stderr and
an exit code.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_dist import errors
from ollama_dist.address import DEFAULT_HOST, Address, of_ollama, parse_address
from ollama_dist.errors import CliError, UsageProblem
from ollama_dist.text import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

    from ollama_dist.client import Api


class Output(StrEnum):
    """How results are written to stdout."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


class Session:
    """The settings of one call, and what is made from them when it is needed."""

    def __init__(
        self,
        *,
        host: str | None = None,
        token: str | None = None,
        output: Output | None = None,
        no_color: bool = False,
    ) -> None:
        self.host = host or of_ollama(os.environ.get("OLLAMA_HOST", "")) or DEFAULT_HOST
        self.token = token
        self.output = output or Output.TABLE
        self.color = not no_color and not os.environ.get("NO_COLOR")
        self._api: Api | None = None
        self._out: Console | None = None
        self._err: Console | None = None

    def overridden(
        self, host: str | None, token: str | None, output: Output | None, no_color: bool
    ) -> "Session":
        """This call's settings with those that were given behind the command."""
        return Session(
            host=host or self.host,
            token=token or self.token,
            output=output or self.output,
            no_color=no_color or not self.color,
        )

    @property
    def address(self) -> Address:
        """The daemon to talk to.

        Raises:
          UsageProblem: `--host` is not an address.
        """
        try:
            return parse_address(self.host)
        except ValueError as problem:
            raise UsageProblem(f"--host: {problem}") from None

    @property
    def api(self) -> "Api":
        """The REST client of this call; it connects with its first request."""
        if self._api is None:
            from ollama_dist.client import Api

            self._api = Api(self.address, token=self.token)
        return self._api

    @property
    def out(self) -> "Console":
        """The console for results."""
        if self._out is None:
            self._out = _console(sys.stdout, self.color)
        return self._out

    @property
    def err(self) -> "Console":
        """The console for progress and remarks; results never go there."""
        if self._err is None:
            self._err = _console(sys.stderr, self.color)
        return self._err

    @property
    def wants_data(self) -> bool:
        """Whether the result is for a program: JSON or YAML."""
        return self.output is not Output.TABLE

    def data(self, value: object) -> None:
        """Write the result as JSON or YAML to stdout, as `--output` says."""
        if self.output is Output.YAML:
            import yaml

            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        else:
            import json

            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        sys.stdout.write(text)

    def done(self, answer: dict[str, Any]) -> None:
        """Show an answer that is a message."""
        if self.wants_data:
            self.data(answer)
        else:
            self.say(answer.get("message") or "done")

    def say(self, text: object) -> None:
        """Write a line of the result, safe for a terminal, in no style."""
        typer.echo(printable(text))

    def note(self, text: object) -> None:
        """Write a remark to stderr."""
        typer.echo(printable(text), err=True)

    def close(self) -> None:
        """Close the connections, if there are any."""
        if self._api is not None:
            self._api.close()


PIPE_WIDTH = 1000  # columns of a table that no terminal cuts: nothing is shortened


def _console(file: Any, color: bool) -> "Console":
    from rich.console import Console

    width = None if file.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(
        file=file,
        color_system="auto" if color else None,
        width=width,
        # Names come from others: no markup, no emoji codes, no guessing of colours.
        markup=False,
        emoji=False,
        highlight=False,
    )


def _global_parameters(*, root: bool) -> list[inspect.Parameter]:
    """The global options as parameters; only the root ones read the environment."""

    def option(flags: tuple[str, ...], help_text: str, metavar: str, variable: str) -> Any:
        environment = variable if root and variable else None
        return typer.Option(
            *flags, help=help_text, metavar=metavar or None, envvar=environment, show_default=False
        )

    host = option(
        ("--host",), "The node to talk to: host, host:port or URL.", "HOST", "OLLAMA_DIST_HOST"
    )
    token = option(
        ("--token",), "A bearer token, instead of the stored sign-in.", "TOKEN", "OLLAMA_DIST_TOKEN"
    )
    output = option(("--output", "-o"), "table, json or yaml.", "FORMAT", "")
    no_color = option(("--no-color",), "No colours.", "", "")
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("host", kind, default=None, annotation=Annotated[str | None, host]),
        inspect.Parameter("token", kind, default=None, annotation=Annotated[str | None, token]),
        inspect.Parameter(
            "output", kind, default=None, annotation=Annotated[Output | None, output]
        ),
        inspect.Parameter("no_color", kind, default=False, annotation=Annotated[bool, no_color]),
    ]


def _present(
    wrapper: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """Give `wrapper` the signature that Typer reads, with the context in front."""
    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    everything = [context, *parameters]
    wrapper.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in everything}
    return wrapper


def root_callback(help_text: str) -> Callable[..., None]:
    """The function behind the program's own options: it makes the call's `Session`."""

    def root(
        ctx: typer.Context,
        *,
        host: str | None,
        token: str | None,
        output: Output | None,
        no_color: bool,
    ) -> None:
        ctx.obj = Session(host=host, token=token, output=output, no_color=no_color)

    root.__doc__ = help_text
    return _present(root, _global_parameters(root=True))


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command of `function(session, ...)`.

    What it raises ends the program: `CliError` with its line and its code, Ctrl-C quietly
    with 130, anything else as a bug in one line (OLLAMA_DIST_DEBUG=1 shows where).
    """

    @functools.wraps(function)
    def run(
        ctx: typer.Context,
        *arguments: Any,
        host: str | None,
        token: str | None,
        output: Output | None,
        no_color: bool,
        **values: Any,
    ) -> None:
        session = ctx.find_object(Session) or Session()
        session = session.overridden(host, token, output, no_color)
        code = errors.OK
        try:
            function(session, *arguments, **values)
        except CliError as problem:
            fail(problem)
            code = problem.exit_code
        except KeyboardInterrupt:
            code = errors.INTERRUPTED
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise
        except Exception as problem:
            if os.environ.get("OLLAMA_DIST_DEBUG"):
                raise
            fail(f"this is a bug: {type(problem).__name__}: {problem}")
            code = errors.FAILURE
        finally:
            session.close()
        if code != errors.OK:
            raise typer.Exit(code)

    own = list(inspect.signature(function).parameters.values())[1:]
    shared = _global_parameters(root=False)
    return _present(run, [*own, *shared])


def fail(problem: object) -> None:
    """Write a problem as one line to stderr."""
    typer.echo(f"Error: {one_line(problem)}", err=True)
