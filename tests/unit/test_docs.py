"""What the documentation tells people to type exists, and its links lead somewhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ollama_dist.main import app as ollama_dist
from ollamad.main import app as ollamad

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, Any] = {
    "ollamad": get_command(ollamad),
    "ollama-dist": get_command(ollama_dist),
}


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of both programs in code, word by word."""
    text = re.sub(r"-[ugo] ollamad\b", "", text)  # the user of that name
    spans = re.findall(r"`([^`\n]+)`", text)
    spans += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for span in spans:
        for found in re.finditer(r"(?<![\w/.-])(ollama-dist|ollamad)((?: [!-~…]+)+)", span):
            yield [found[1], *found[2].split()]


def problem(words: list[str]) -> str:
    """Which word of a command line is unknown; empty if none is."""
    command = PROGRAMS[words[0]]
    for word in words[1:]:
        if word.startswith("--"):
            names = {name for parameter in command.params for name in parameter.opts}
            names |= {n for p in PROGRAMS[words[0]].params for n in p.opts} | {"--help"}
            if word.partition("=")[0] not in names:
                return word
        elif re.fullmatch(r"[a-z-]+", word) and hasattr(command, "commands"):
            if word not in command.commands:
                return word
            command = command.commands[word]
    return ""


# The words in what nodes sign begin with the program's name too.
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "peer-protocol.md"], ids=lambda page: page.name
)
def test_commands_are_real(page: Path) -> None:
    unknown = {
        " ".join(words): problem(words) for words in commands(page.read_text()) if problem(words)
    }
    assert unknown == {}


def test_commands_are_found() -> None:
    found = [" ".join(words) for words in commands((ROOT / "docs/operations.md").read_text())]
    assert len(found) > 30
    assert problem(["ollamad", "backup", "FILE", "--models"]) == ""
    assert problem(["ollamad", "bakup"]) == "bakup"
    assert problem(["ollamad", "start", "--jion", "T"]) == "--jion"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, target


def codes_of_errors() -> Iterator[tuple[int, str]]:
    """The statuses and codes of errors, as far as the source has them word by word."""
    for path in (ROOT / "ollamad").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if call.func.id not in ("ServiceError", "Failed"):
                continue
            given = [*call.args, *(word.value for word in call.keywords)]
            values = [each.value for each in given if isinstance(each, ast.Constant)]
            for code in values:
                if isinstance(code, str) and re.fullmatch(r"[A-Z_]{4,}", code):
                    yield next((value for value in values if isinstance(value, int)), 500), code


def test_the_table_of_errors_has_every_code() -> None:
    rows = re.findall(r"^\| ([0-9, ]+) \| (.*) \|$", (ROOT / "docs/api.md").read_text(), re.M)
    told = {
        (int(status), code)
        for statuses, codes in rows
        for status in statuses.split(", ")
        for code in re.findall(r"`([A-Z_]+)`", codes)
    }
    # MALFORMED is said between nodes; of 503 the table has "and others".
    made = {(status, code) for status, code in codes_of_errors() if status != 503}
    assert len(made) > 50
    assert made - told == {(400, "MALFORMED")}
