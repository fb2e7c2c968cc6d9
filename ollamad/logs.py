"""The daemon's log on stderr: lines for people, or JSON for collectors (`log.format`)."""

import json
import logging
import sys
import time

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


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
        return super().format(record).translate(_VISIBLE)


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


def set_up(level: str, form: str, *, under_systemd: bool) -> None:
    """Send the log of everything to stderr; libraries only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else TextFormatter(with_time=not under_systemd)
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ollamad").setLevel(LEVELS[level])
