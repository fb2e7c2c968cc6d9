"""The pure parts of ollama-dist: text, addresses, options, what a markdown answer holds."""

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from ollama_dist.address import of_ollama, parse_address
from ollama_dist.client import path
from ollama_dist.commands.inference import parse_options
from ollama_dist.errors import CliError, UsageProblem
from ollama_dist.markdown import MarkdownStream, split_complete
from ollama_dist.show import Column, table
from ollama_dist.text import (
    ago,
    clock,
    duration,
    one_line,
    parse_duration,
    percent,
    printable,
    size,
    until,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_100_000, "98.1 MB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.0 GB"),
        (3_826_793_677, "3.8 GB"),
        (5e18, "5000 PB"),
        (None, "-"),
    ],
)
def test_sizes(count: float | None, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7200, "2 hours"),
        (3 * 86400, "3 days"),
        (15 * 86400, "2 weeks"),
        (70 * 86400, "2 months"),
        (800 * 86400, "2 years"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_times_are_relative() -> None:
    assert ago("2025-12-31T23:55:00Z", NOW) == "5 minutes ago"
    assert ago("2026-01-01T00:00:05Z", NOW) == "just now"
    assert ago("2025-12-31T23:55:00", NOW) == "5 minutes ago"
    assert ago(None, NOW) == ago("yesterday", NOW) == "-"
    assert until((NOW + timedelta(minutes=4)).isoformat(), NOW) == "in 4 minutes"
    assert until((NOW - timedelta(minutes=4)).isoformat(), NOW) == "now"
    assert until(None, NOW) == until("2999-01-01T00:00:00Z", NOW) == "for ever"
    assert until("soon", NOW) == "-"


def test_clocks_and_percentages() -> None:
    assert [clock(value) for value in (None, 5, 65, 3665)] == ["-", "0:05", "1:05", "1:01:05"]
    assert [percent(value) for value in (None, 0, 0.454)] == ["-", "0%", "45%"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("24H", 86400), ("7d", 604800)]
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-1h", "1.5h", "h", "1w", "24 h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_text_of_others_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x9b2J\x07\r\x7f\tc\n") == "a�[31mb�2J���\tc\n"
    assert printable("gpj\u202e.exe") == "gpj�.exe"
    assert one_line("a\n  b\x1b") == "a b�"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("box", "http://box:8080"),
        ("box:9", "http://box:9"),
        (" box ", "http://box:8080"),
        ("BOX", "http://box:8080"),
        ("::1", "http://[::1]:8080"),
        ("[::1]", "http://[::1]:8080"),
        ("[::1]:9", "http://[::1]:9"),
        ("http://box", "http://box:80"),
        ("https://box", "https://box:443"),
        ("https://box:9/", "https://box:9"),
        ("http://box:9/api/v1/", "http://box:9"),
        ("https://box/ollama", "https://box:443/ollama"),
    ],
)
def test_hosts(text: str, url: str) -> None:
    assert parse_address(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        ":8080",
        "box:port",
        "box:99999",
        "ftp://box",
        "u:p@box",
        "box?x",
        "a b",
        "[::",
    ],
)
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        parse_address(text)


@pytest.mark.parametrize("text", ["localhost", "127.0.0.1", "127.9.9.9:1", "::1", "http://[::1]"])
def test_loopback(text: str) -> None:
    assert parse_address(text).is_loopback


@pytest.mark.parametrize(
    "text", ["box", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0"]
)
def test_not_loopback(text: str) -> None:
    assert not parse_address(text).is_loopback


def test_paths_hold_any_name() -> None:
    assert path("models", "hf.co/a/b:q4", "download") == "/models/hf.co%2Fa%2Fb%3Aq4/download"
    assert path("nodes", "a b?#%") == "/nodes/a%20b%3F%23%25"
    for climbing in ("", ".", ".."):
        with pytest.raises(UsageProblem, match="is not a name"):
            path("models", climbing)


def test_options_have_json_values() -> None:
    pairs = ["temperature=0.2", "top_k=40", "x=a=b", "flag=true", "stop=1", "stop=\n", "empty="]
    assert parse_options(pairs) == {
        "temperature": 0.2,
        "top_k": 40,
        "x": "a=b",
        "flag": True,
        "stop": ["1", "\n"],
        "empty": "",
    }


@pytest.mark.parametrize("pair", ["temperature", "=1", ""])
def test_options_need_a_key_and_a_value(pair: str) -> None:
    with pytest.raises(UsageProblem, match="is not KEY=VALUE"):
        parse_options([pair])


def test_a_hint_follows_the_message() -> None:
    assert str(CliError("no such model", hint="Pull it.")) == "no such model. Pull it."
    assert str(CliError("It ended.", hint="Look.")) == "It ended. Look."


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("", ""),
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("- a\n\n  still a", ""),
        ("one\n\n```\nx\n\ny", "one\n\n"),
        ("```\nx\n\ny\n```\n\nz", "```\nx\n\ny\n```\n\n"),
        ("````\n```\n\nx\n````\n\nz", "````\n```\n\nx\n````\n\n"),
        ("```\nx\n``` not the end\n\ny", ""),
    ],
)
def test_what_of_a_markdown_answer_is_complete(text: str, complete: str) -> None:
    assert text[: split_complete(text)] == complete


def screen(width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=10, force_terminal=True, color_system=None
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_streamed_answer_is_all_on_the_screen_in_the_end() -> None:
    text = "# Title\n\nSome **bold** words\x1b[2J.\n\n" + "".join(
        f"- item {n}\n" for n in range(40)
    )
    console = screen()
    with MarkdownStream(console) as stream:
        for start in range(0, len(text), 3):
            stream.feed(text[start : start + 3])
    shown = written(console)
    assert "Title" in shown
    assert "bold" in shown
    assert "**" not in shown
    assert "\x1b[2J" not in shown
    # More than the ten lines of the screen: all of them are there at the end.
    assert all(f"item {n}" in shown for n in range(40))


def test_a_table_fits_80_columns_by_shortening_what_gives_way() -> None:
    console = screen()
    columns = [Column("NAME", gives_way=True), Column("DIGEST"), Column("SIZE", right=True)]
    console.print(table(columns, [("n" * 200, "d" * 40, "98.1 MB"), ("[red]x", "\x1b[31m", "")]))
    lines = written(console).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "n…" in lines[1]
    assert "d" * 40 in lines[1]
    assert "98.1 MB" in lines[1]
    assert "[red]x" in lines[2]
    assert "�[31m" in lines[2]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("box", "http://box:11434"),
        ("box:8080", "http://box:8080"),
        ("http://box:8080", "http://box:8080"),
        ("https://box/", "https://box:443"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:8080", "http://[::1]:8080"),
        ('"box"', "http://box:11434"),
    ],
)
def test_the_host_of_ollamas_clients_is_understood(text: str, url: str) -> None:
    assert parse_address(of_ollama(text)).url == url


def test_no_host_of_ollamas_clients_is_none() -> None:
    assert of_ollama(" ") == ""
