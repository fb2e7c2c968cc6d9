"""Tables and facts for people. Everything in them is made safe for a terminal here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ollama_dist.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {
    "online": "green",
    "healthy": "green",
    "available": "green",
    "completed": "green",
    "active": "cyan",
    "downloading": "cyan",
    "draining": "yellow",
    "degraded": "yellow",
    "offline": "red",
    "unhealthy": "red",
    "failed": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title; `right` for numbers, `gives_way` when the terminal is narrow."""

    title: str
    right: bool = False
    gives_way: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> "Table":
    """A table without borders; cells that give way end in an ellipsis."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            # Rich takes width from the columns that may wrap; the cells then do not wrap.
            no_wrap=not column.gives_way,
        )
    for row in rows:
        made.add_row(
            *(
                Text(printable(cell), style=style_of(cell), no_wrap=True, overflow="ellipsis")
                for cell in row
            )
        )
    return made


def style_of(word: object) -> str:
    """The colour of a status word; none for anything else."""
    return _STYLES.get(str(word), "")


def show_table(
    console: "Console", columns: Sequence[Column], rows: Sequence[Sequence[object]], empty: str
) -> None:
    """Print the table, or the sentence that says what to do when there is nothing in it."""
    if rows:
        console.print(table(columns, rows))
    else:
        console.print(empty)


def show_facts(console: "Console", facts: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; a value may fill several lines.

    A `Text` is shown as it is: it must be of our own words.
    """
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        shown = value if isinstance(value, Text) else Text(printable(value), style_of(value))
        grid.add_row(name, shown)
    console.print(grid)
