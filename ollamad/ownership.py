"""Which models in a directory that an Ollama may use, too, are the cluster's own.

Only what is noted here is freed there when a copy moves away. Whatever is not, even where nobody
knows any more, counts as the Ollama's: a copy too many costs room, one too few somebody's model.
"""

from pathlib import Path

from ollamad.notes import Note


class Brought:
    """Manifests that this daemon put into the directory `root`, by name key."""

    def __init__(self, path: Path, root: Path) -> None:
        self._note = Note(path, dict[str, dict[str, str]], {})
        self._root = str(root)
        # Of each directory that there ever was: what was true of one says nothing of another.
        self._digests: dict[str, dict[str, str]] = {}

    def remember(self) -> None:
        """Read what was noted before a restart; call it before all else."""
        self._digests = self._note.read()

    def has(self, key: str, digest: str) -> bool:
        """Whether that manifest of that name came from this daemon."""
        return self._digests.get(self._root, {}).get(key) == digest

    def note(self, key: str, digest: str) -> None:
        """That manifest was written, where there was none or another one."""
        self._digests.setdefault(self._root, {})[key] = digest
        self._note.write(self._digests)

    def forget(self, key: str) -> None:
        """That name is gone from the directory, or somebody else's by now."""
        if self._digests.get(self._root, {}).pop(key, None) is not None:
            self._note.write(self._digests)
