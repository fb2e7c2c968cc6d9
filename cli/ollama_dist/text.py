"""Sizes, times and untrusted text, as a person reads them. Pure: the time is an argument."""

import re
from datetime import UTC, datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_DURATION = re.compile(r"(\d+)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
# Far beyond any keep-alive that somebody means: Ollama writes "for ever" as centuries ahead.
FOREVER_S = 10 * 365 * 86400
# C0 without tab and newline, DEL, C1: what could move the cursor or recolour the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Marks that reorder the text around them, so that a name reads as another one.
_REORDERING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """The text without what a terminal would obey; names and answers come from others."""
    return _REORDERING.sub("\ufffd", _CONTROL.sub("\ufffd", str(text)))


def one_line(text: object) -> str:
    """Printable, with runs of white space as one space."""
    return printable(" ".join(str(text).split()))


def size(count: float | None) -> str:
    """Bytes in decimal units with three significant digits: `98.1 MB`; "-" for unknown."""
    if count is None:
        return "-"
    value = float(count)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{0 if value >= 99.95 else 1}f} {unit}"


def duration(seconds: float) -> str:
    """Roughly how long, in one unit: `45 seconds`, `5 minutes`, `3 days`."""
    steps = ((86400 * 365, "year"), (86400 * 30, "month"), (86400 * 7, "week"))
    for length, unit in (*steps, (86400, "day"), (3600, "hour"), (60, "minute")):
        # A unit starts at two of it, so that 90 seconds do not read as "1 minute".
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}s"
    whole = int(seconds)
    return f"{whole} second{'' if whole == 1 else 's'}"


def clock(seconds: float | None) -> str:
    """An estimate as a clock: `0:42`, `1:05:00`; "-" for unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def parse_time(stamp: object) -> datetime | None:
    """Read an RFC 3339 time; None where it is missing or not one."""
    if not isinstance(stamp, str):
        return None
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def ago(stamp: object, now: datetime) -> str:
    """`5 minutes ago`; "-" for an unknown time."""
    moment = parse_time(stamp)
    if moment is None:
        return "-"
    seconds = (now - moment).total_seconds()
    return "just now" if seconds < 2 else f"{duration(seconds)} ago"


def until(stamp: object, now: datetime) -> str:
    """`in 4 minutes`, or `for ever` for none and for the far future."""
    if not stamp:
        return "for ever"
    moment = parse_time(stamp)
    if moment is None:
        return "-"
    seconds = (moment - now).total_seconds()
    if seconds > FOREVER_S:
        return "for ever"
    return "now" if seconds < 1 else f"in {duration(seconds)}"


def parse_duration(text: str) -> int:
    """Seconds of `90`, `90s`, `30m`, `24h` or `7d`.

    Raises:
      ValueError: it is something else, or zero.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration: write it like 90s, 30m, 24h or 7d")
    return seconds


def percent(fraction: float | None) -> str:
    """A fraction of one as `45%`; "-" for unknown."""
    return "-" if fraction is None else f"{100 * fraction:.0f}%"


def short_id(identity: object) -> str:
    """Enough of an id to tell nodes apart, and accepted wherever a node is named."""
    return printable(identity)[:10]


def plural(count: int, noun: str) -> str:
    """`1 node`, `3 nodes`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
