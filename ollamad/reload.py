"""What SIGHUP changes while the daemon runs, and what it refuses because that needs a restart."""

import logging
from collections.abc import Callable

import msgspec

from ollamad.settings import ConfigError, Settings, walk

log = logging.getLogger(__name__)

# Keys, and sections that end with a dot, that can change in a daemon that runs.
RELOADABLE = (
    "log.level",
    "rate_limits.",
    "models.replicas",
    "distribution.lost_after",
    "distribution.hot_load",
    "distribution.hot_after",
    "distribution.cool_after",
)


class Reloader:
    """Reads the settings again and has those applied that can be.

    Args:
      settings: with which the daemon was started.
      read: reads them again, from all their sources.
      apply: takes settings of which only reloadable keys differ from those before.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        apply: Callable[[Settings], None],
    ) -> None:
        self._settings = settings
        self._read = read
        self._apply = apply

    def reload(self) -> None:
        """Change what can change, and say what was changed and what was not. Raises nothing."""
        try:
            wanted = self._read()
        except (ConfigError, OSError) as error:
            log.error("the settings stay as they are: %s", error)
            return
        before, after = dict(walk(self._settings)), dict(walk(wanted))
        changed = [key for key in after if before[key] != after[key]]
        new = self._settings
        for key in changed:
            if not key.startswith(RELOADABLE):
                log.warning("%s has changed, which needs a restart: it stays as it was", key)
                continue
            section, _, name = key.rpartition(".")
            part = msgspec.structs.replace(getattr(new, section), **{name: after[key]})
            new = msgspec.structs.replace(new, **{section: part})
            log.info("%s is %s now, after %s", key, after[key], before[key])
        self._settings = new
        self._apply(new)
        if not changed:
            log.info("the settings were read again; nothing in the files has changed")
