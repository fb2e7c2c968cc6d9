"""The daemon's log on stderr: lines for people, or JSON for collectors (`log.format`)."""

import json
import logging
import sys
import time
from collections import Counter

from ollamad.core.ratelimit import RateLimit

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# Syslog's numbers for levels from there up.
PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)

# What other hosts can cause to be logged, as often as they like. The first argument of such a line
# is who caused it.
FROM_OUTSIDE = (
    "ollamad.peers.",
    "ollamad.raft.links",
    "ollamad.admission",
    "ollamad.api.refused",
    "trio.serve_listeners",
)
LINES_PER_HOST = 10  # of one kind, and
LINES_OF_A_KIND = 200  # in all, from any number of hosts
LINES_PERIOD_S = 60.0

# Texts of strangers get into log lines; none of them may move the cursor of who reads them.
_VISIBLE = dict.fromkeys((*range(32), 127, *range(128, 160)), "�")
del _VISIBLE[ord("\n")], _VISIBLE[ord("\t")]


class TextFormatter(logging.Formatter):
    """`12:00:00 WARNING peers.join: text`; without the time under systemd, which adds its own."""

    def __init__(self, *, with_time: bool) -> None:
        super().__init__(
            ("%(asctime)s " if with_time else "") + "%(levelname)-7s %(name)s: %(message)s",
            datefmt="%H:%M:%S",
        )

    def format(self, record: logging.LogRecord) -> str:
        record.name = record.name.removeprefix("ollamad.")
        # Only the first line begins at the margin: no text of a stranger's makes one of its own.
        return super().format(record).translate(_VISIBLE).replace("\n", "\n    ")


class FloodFilter(logging.Filter):
    """Holds back lines that another host causes too often; a later one says how many."""

    def __init__(self) -> None:
        super().__init__()
        self._of_host = RateLimit(LINES_PER_HOST, LINES_PERIOD_S)
        self._of_kind = RateLimit(LINES_OF_A_KIND, LINES_PERIOD_S)
        self._left_out: Counter[object] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(FROM_OUTSIDE) or not isinstance(record.args, tuple):
            return True
        now = time.monotonic()
        kind = (record.name, record.msg)
        if not (
            self._of_host.allow((kind, str(record.args[:1])), now)
            and self._of_kind.allow(kind, now)
        ):
            self._left_out[kind] += 1
            return False
        left_out = self._left_out.pop(kind, 0)
        if left_out:
            record.msg = f"{record.msg} (and %d more such lines)"
            record.args = (*record.args, left_out)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.gmtime(record.created)
        entry = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class JournalFormatter(logging.Formatter):
    """Each line of another's with its syslog priority in front, which the journal takes off."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in PRIORITIES if record.levelno >= level)
        lines = self._inner.format(record).split("\n")
        return "\n".join(f"<{priority}>{line}" for line in lines)


def set_up(level: str, form: str, *, to_journal: bool) -> None:
    """Send the log of everything to stderr; libraries only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter() if form == "json" else TextFormatter(with_time=not to_journal)
    handler.setFormatter(JournalFormatter(formatter) if to_journal else formatter)
    handler.addFilter(FloodFilter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    set_level(level)


def set_level(level: str) -> None:
    """From which level on our own lines are shown."""
    logging.getLogger("ollamad").setLevel(LEVELS[level])
