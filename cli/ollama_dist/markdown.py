"""Markdown that appears while it is written.

What is complete is printed for good and scrolls away; only the last block is drawn again, so
a long answer neither flickers nor outgrows the screen.
"""

import re
from typing import TYPE_CHECKING

from ollama_dist.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
REFRESH_HZ = 12  # smooth to the eye, and cheap beside a model


def split_complete(text: str) -> int:
    """How much of `text` cannot change its look any more.

    It ends at the last blank line outside a code fence behind which a line begins at the
    margin: an indented line may still belong to the list before it.
    """
    fence = ""
    complete = position = 0
    blank = False
    for line in text.splitlines(keepends=True):
        if blank and not fence and line.strip() and not line[0].isspace():
            complete = position
        match = _FENCE.match(line)
        if match:
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        blank = not line.strip()
        position += len(line)
    return complete


class MarkdownStream:
    """A context manager that draws an answer on a terminal, piece by piece.

    Leaving it, also by an exception, leaves all that was fed on the screen.
    """

    def __init__(self, console: "Console") -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = console
        self._tail = ""
        self._begun = False
        self._spinner = Spinner("dots", style="dim")
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESH_HZ
        )

    def __enter__(self) -> "MarkdownStream":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._begun = True
        self._live.stop()

    def feed(self, piece: str) -> None:
        """Add to the answer."""
        self._begun = True
        self._tail += printable(piece)
        complete = split_complete(self._tail)
        if complete:
            head, self._tail = self._tail[:complete], self._tail[complete:]
            # A blank line parts the blocks, as it does within one rendering.
            self._console.print(self._markdown(head), "", sep="\n")

    def _render(self) -> "RenderableType":
        return self._markdown(self._tail) if self._begun else self._spinner

    def _markdown(self, text: str) -> "RenderableType":
        from rich.markdown import Markdown

        # Links are shown as text: what a model names is not to be hidden behind a word.
        return Markdown(text, hyperlinks=False, code_theme="ansi_dark")
