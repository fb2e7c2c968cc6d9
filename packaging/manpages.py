"""Writes the man pages of both commands from the commands themselves: manpages.py VERSION DIR

One page for each program, with a section for every subcommand. (click-man knows nothing of the
copy of click that Typer brings, and leaves all options out.)
"""

import os
import sys
from collections.abc import Iterator, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typer.main import get_command

from ollama_dist.main import app as ollama_dist
from ollamad.main import app as ollamad

ABOUT = {
    "ollamad": "the daemon of Ollama Distributed",
    "ollama-dist": "command line of Ollama Distributed",
}
FILES = {
    "ollamad": (
        ("/etc/ollamad/config.yaml, node.yaml", "The settings of the cluster and of this host."),
        ("/var/lib/ollamad", "Models, keys and state; ~/.local/share/ollamad for a user."),
    ),
    "ollama-dist": (("cli-token", "In the data directory: signs its user in on the same host."),),
}
EXIT_CODES = (
    "0 for success, 1 for a failure, 2 for wrong usage, 3 when the daemon cannot be reached, "
    "4 when it does not allow this, 5 when something is not there."
)


def page(name: str, app: Any, version: str) -> str:
    """The page of a program, as man(7) has it."""
    command = get_command(app)
    moment = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC)
    lines = [
        f'.TH {name.upper()} 1 {moment:%Y-%m-%d} "{name} {version}"',
        ".SH NAME",
        f"{escaped(name)} \\- {ABOUT[name]}",
        ".SH SYNOPSIS",
        f".B {escaped(name)}",
        "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
        ".SH OPTIONS",
        *options(command, command.make_context(name, [], resilient_parsing=True)),
        ".SH COMMANDS",
    ]
    common = {parameter.name for parameter in command.params} | {"help"}
    for words, sub, context in subcommands(command, name, None):
        lines += [f'.SS "{escaped(" ".join(words[1:]))}"', f".B {escaped(' '.join(words))}"]
        lines += [escaped(" ".join(sub.collect_usage_pieces(context))), ".PP"]
        # What every command takes stands above.
        lines += [*paragraphs(sub.help or ""), *options(sub, context, skip=common)]
    lines += [".SH EXIT STATUS", EXIT_CODES] if name == "ollama-dist" else []
    lines.append(".SH FILES")
    for path, what in FILES[name]:
        lines += [".TP", f".I {escaped(path)}", escaped(what)]
    lines += [".SH SEE ALSO", *(f".BR {escaped(other)} (1)" for other in ABOUT if other != name)]
    return "\n".join(lines) + "\n"


def subcommands(command: Any, name: str, parent: Any) -> Iterator[tuple[list[str], Any, Any]]:
    """All commands that do something and are shown: their words, themselves, their context."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    for sub_name, sub in sorted(getattr(command, "commands", {}).items()):
        if sub.hidden:
            continue
        if getattr(sub, "commands", None):
            for words, leaf, leaf_context in subcommands(sub, sub_name, context):
                yield [name, *words], leaf, leaf_context
        else:
            sub_context = sub.make_context(sub_name, [], parent=context, resilient_parsing=True)
            yield [name, sub_name], sub, sub_context


def options(command: Any, context: Any, skip: Set[str] = frozenset()) -> Iterator[str]:
    for parameter in command.get_params(context):
        if parameter.name in skip:
            continue
        record = parameter.get_help_record(context)
        if record is not None and not getattr(parameter, "hidden", False):
            yield from (".TP", f".B {escaped(record[0])}", *paragraphs(record[1]))


def paragraphs(text: str) -> Iterator[str]:
    for number, part in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield escaped(" ".join(part.split()))


def escaped(text: str) -> str:
    """Text that troff takes as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main(version: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, app in (("ollamad", ollamad), ("ollama-dist", ollama_dist)):
        (directory / f"{name}.1").write_text(page(name, app, version))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
