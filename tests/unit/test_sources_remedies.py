"""Every failure of a source says what to do: a table of all places where one is raised."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollamad import sources
from ollamad.sources import base
from ollamad.sources.client import TryAgain, explain
from ollamad.store.errors import StoreFull

KINDS = {
    name
    for name, value in vars(base).items()
    if isinstance(value, type) and issubclass(value, base.SourceError)
}
REMEDY = re.compile(
    r"\b(add|allow|ask|check|choose|look for|make|pull( it)? again|push to|repair|send|set|sign in|"
    r"try again|use|write)\b|sources\.[a-z_]+",
    re.IGNORECASE,
)


def failures() -> Iterator[tuple[str, str]]:
    """Where each is raised, and the words that are written there."""
    for path in sorted(Path(sources.__file__).parent.glob("*.py")):
        text = path.read_text()
        constants = {
            target.id: ast.unparse(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.AnnAssign)
            and node.value is not None
            and isinstance(target := node.target, ast.Name)
        }
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            names = {each.id for each in ast.walk(node.exc.func) if isinstance(each, ast.Name)}
            if not names & KINDS or _is_explained(node.exc):
                continue
            words = " ".join(
                str(part.value) if isinstance(part, ast.Constant) else constants.get(part.id, "")
                for part in ast.walk(node.exc)
                if isinstance(part, ast.Constant | ast.Name)
            )
            yield f"{path.name}:{node.lineno}", words


def _is_explained(call: ast.Call) -> bool:
    match call.args:
        case [ast.Call(func=ast.Name(id="explain"))]:
            return True
    return False


FAILURES = dict(failures())


@pytest.mark.parametrize("place", FAILURES)
def test_every_failure_of_a_source_says_what_to_do(place: str) -> None:
    assert REMEDY.search(FAILURES[place]), FAILURES[place]


@pytest.mark.parametrize(
    "message",
    [
        explain("https://h/x", TryAgain("HTTP 503")),
        explain("https://h/x", TimeoutError()),
        str(StoreFull(10, 5)),
    ],
)
def test_so_do_those_that_are_made_elsewhere(message: str) -> None:
    assert re.search(r"check the network.*pull again|delete a model, or choose another", message)
