"""Cuts a template's source into texts and the tokens of its actions.

White space next to a trim marker (`{{- ` and ` -}}`) is taken off here, as in Go.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ollamad.core.gotemplate.errors import TemplateError

SPACES = " \t\r\n"  # what a trim marker takes off

# A field is not split off a number or a word: `1.5` and `a.B` are caught by the order here.
_TOKEN = re.compile(
    r"""
      (?P<close> [ \t\r\n]+-\}\} | \}\} )
    | (?P<space> [ \t\r\n]+ )
    | (?P<string> "(?:[^"\\\n]|\\.)*" )
    | (?P<raw> `[^`]*` )
    | (?P<char> '(?:[^'\\\n]|\\.)+' )
    | (?P<number> [+-]? (?: 0[xX][0-9a-fA-F_]+ | 0[bB][01_]+ | 0[oO][0-7_]+
                          | (?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)? ) )
    | (?P<field> \.[^\W\d]\w* )
    | (?P<dot> \. )
    | (?P<variable> \$\w* )
    | (?P<word> [^\W\d]\w* )
    | (?P<declare> := )
    | (?P<assign> = )
    | (?P<comma> , )
    | (?P<pipe> \| )
    | (?P<left> \( )
    | (?P<right> \) )
    """,
    re.VERBOSE,
)
_OPEN = re.compile(r"\{\{(?P<trim>-(?=[ \t\r\n]))?")
_COMMENT = re.compile(r"[ \t\r\n]*/\*.*?\*/(?P<trim>[ \t\r\n]+-)?\}\}", re.DOTALL)


class Token(NamedTuple):
    """`kind` is a group of the pattern, or `text` or `end` (of the source)."""

    kind: str
    text: str
    line: int


def tokens(source: str) -> Iterator[Token]:
    """The tokens of a template; an action is what stands up to a `close`.

    Raises:
      TemplateError: an action is not closed, or has a character that begins no token.
    """
    place, trims = 0, False
    while True:
        opening = _OPEN.search(source, place)
        text = source[place : opening.start() if opening else len(source)]
        if trims:
            text = text.lstrip(SPACES)
        if opening and opening["trim"]:
            text = text.rstrip(SPACES)
        if text:
            yield Token("text", text, _line(source, place))
        if opening is None:
            yield Token("end", "", _line(source, len(source)))
            return
        place = opening.end()
        if (comment := _COMMENT.match(source, place)) is not None:
            place, trims = comment.end(), comment["trim"] is not None
            continue
        while True:
            match = _TOKEN.match(source, place)
            if match is None:
                line = _line(source, place)
                if place >= len(source):
                    raise TemplateError(f"line {line}: an action is not closed")
                raise TemplateError(f"line {line}: unexpected {source[place : place + 10]!r}")
            assert match.lastgroup is not None
            place = match.end()
            yield Token(match.lastgroup, match[0], _line(source, match.start()))
            if match.lastgroup == "close":
                trims = "-" in match[0]
                break


def _line(source: str, place: int) -> int:
    return source.count("\n", 0, place) + 1
