"""`generate` and `embed`: one question, one answer, plain text; and `stop`, the end of it all."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from ollama_dist.completion import model_names
from ollama_dist.errors import UsageProblem
from ollama_dist.session import Session, command
from ollama_dist.text import printable

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's name.", autocompletion=model_names)
]
PromptArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PROMPT]...", help="The words to send; piped input comes first."),
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="A model option such as temperature=0.2; repeat it."
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="The system message.")
]


def parse_value(key: str, text: str) -> Any:
    """An option's value: JSON where it is JSON, else the text; `stop` is always text."""
    if key == "stop":
        return [text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; `stop` may come several times.

    Raises:
      UsageProblem: a pair has no key or no `=`.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageProblem(f"--option: {pair!r} is not KEY=VALUE")
        value = parse_value(key, text)
        options[key] = [*options.get(key, ()), *value] if key == "stop" else value
    return options


def read_prompt(words: list[str] | None) -> str:
    """The prompt of the command line and of a pipe; empty when there is neither."""
    typed = " ".join(words or ())
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip("\n")
    return "\n".join(part for part in (piped, typed) if part)


def write_answer(pieces: Iterator[str]) -> None:
    """Write pieces of text to stdout as they come, and end the line, also after a failure."""
    safe = sys.stdout.isatty()
    ended = True
    try:
        for piece in pieces:
            if piece:
                sys.stdout.write(printable(piece) if safe else piece)
                sys.stdout.flush()
                ended = piece.endswith("\n")
    finally:
        if not ended:
            sys.stdout.write("\n")


@command
def generate(
    session: Session,
    model: ModelArgument,
    prompt: PromptArgument = None,
    system: SystemOption = None,
    option: OptionOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the prompt as it is, without a template.")
    ] = False,
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="json|SCHEMA", help="Answer in JSON, or by a schema."),
    ] = None,
) -> None:
    """One answer to one prompt."""
    from ollama_dist.client import path
    from ollama_dist.resume import resumable

    body: dict[str, Any] = {"model": model, "prompt": read_prompt(prompt)}
    if not body["prompt"]:
        raise UsageProblem("there is no prompt", hint="Type it behind the model, or pipe it in.")
    if system is not None:
        body["system"] = system
    if option:
        body["options"] = parse_options(option)
    if raw:
        body["raw"] = True
    if format_ is not None:
        body["format"] = _format(format_)
    url = path("generate")
    if session.wants_data:
        session.data(session.api.infer(url, body))
        return
    with resumable(session, url, body) as items:
        write_answer(str(item.get("response") or "") for item in items)


def _format(text: str) -> Any:
    if text == "json":
        return text
    try:
        schema = json.loads(text)
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise UsageProblem("--format: use json, or a JSON schema")
    return schema


@command
def embed(session: Session, model: ModelArgument, prompt: PromptArgument = None) -> None:
    """The embedding of a text; `-o json` gives all its numbers."""
    from ollama_dist.client import path

    text = read_prompt(prompt)
    if not text:
        raise UsageProblem("there is no text", hint="Type it behind the model, or pipe it in.")
    answer = session.api.infer(path("embeddings"), {"model": model, "prompt": text})
    if session.wants_data:
        session.data(answer)
        return
    numbers = answer["embedding"]
    length = math.sqrt(sum(number * number for number in numbers))
    first = " ".join(f"{number:.4f}" for number in numbers[:6])
    more = " …" if len(numbers) > 6 else ""
    session.say(f"{len(numbers)} numbers, length {length:.3f}: {first}{more}")


@command
def stop(session: Session, model: ModelArgument) -> None:
    """Take a model out of memory, on every node; answers that run come to their end first."""
    from ollama_dist.client import path

    # As Ollama has it: nothing to answer, and to be kept for no time.
    answer = session.api.infer(path("generate"), {"model": model, "prompt": "", "keep_alive": 0})
    if session.wants_data:
        session.data(answer)
    else:
        name = answer.get("model") or model
        session.say(f"{name} leaves memory as soon as its running answers have ended")
