"""Bakes the commit and the build time into the wheel as `ollamad/_build.py`.

An installation from source that ran no build has no such file, and `/version` then says
"unknown". SOURCE_DATE_EPOCH is honoured so that a build can be repeated byte for byte.
"""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TEMPLATE = (
    '"""Written by packaging/build_hook.py."""\n\nBUILD_TIME = {time!r}\nGIT_COMMIT = {commit!r}\n'
)


class BuildInfoHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
        target = Path(self.root) / "ollamad" / "_build.py"
        target.write_text(
            TEMPLATE.format(time=moment.strftime("%Y-%m-%dT%H:%M:%SZ"), commit=self._commit())
        )
        build_data["artifacts"].append("ollamad/_build.py")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.root) / "ollamad" / "_build.py").unlink(missing_ok=True)

    def _commit(self) -> str:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip() if done.returncode == 0 else "unknown"
