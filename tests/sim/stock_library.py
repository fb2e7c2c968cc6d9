"""PySyncObj as it comes, made ready to run on virtual time and on a simulated disk.

`ollamad.raft.private` replaces globals of `pysyncobj.syncobj` for the whole process, so what runs
here is a second copy of that module, loaded from the same file under another name. Of its code
nothing is changed. What it is given:

- its clock and its random numbers, which it takes from module globals,
- no poller and no notifier, which only wait for sockets,
- its own `FileJournal` on files whose pages reach the disk as late as Linux lets them.
"""

import importlib.util
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pysyncobj.version import VERSION

from tests.sim.history import Kind

PINNED_VERSION = "0.3.17"
PAGE_SIZE = 4096
WRITE_BACK_S = 30.0  # Linux writes dirty pages back when they are that old (dirty_expire)
COMMIT_S = 5.0  # ext4 commits renames that often, with the data of the new file
CLOCK_READ_S = 2e-6  # what looking at the clock costs, and
SEND_S = 100e-6  # sending a message: loops that the library ends by the clock do end


def _load_copy(name: str) -> ModuleType:
    original = importlib.util.find_spec(f"pysyncobj.{name}")
    assert original is not None
    assert original.origin is not None
    # Within the package, for its relative imports.
    spec = importlib.util.spec_from_file_location(f"pysyncobj.stock_{name}", original.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


assert VERSION == PINNED_VERSION, f"this describes pysyncobj {PINNED_VERSION}, not {VERSION}"
syncobj: Any = _load_copy("syncobj")
journal: Any = _load_copy("journal")


class StockClock:
    """The clock of the process that runs just now. Work takes time, while the world stands."""

    def __init__(self) -> None:
        self._now: Callable[[], float] = lambda: 0.0
        self._spent_s = 0.0

    def enter(self, now: Callable[[], float]) -> None:
        """That process runs from here on."""
        self._now = now
        self._spent_s = 0.0

    def spend(self, seconds: float) -> None:
        self._spent_s += seconds

    def __call__(self) -> float:
        self._spent_s += CLOCK_READ_S
        return self._now() + self._spent_s


class _NoPoller:
    def poll(self, timeout: float) -> None:
        pass


clock = StockClock()
syncobj.monotonicTime = clock
syncobj.createPoller = lambda kind: _NoPoller()
syncobj.PIPE_NOTIFIER_ENABLED = False
syncobj.createJournal = lambda opener: opener()


def use_random(rng: random.Random) -> None:
    """Take random numbers from there."""
    syncobj.random = rng


class PageCache:
    """One host's files. A process that dies loses nothing; a power cut, what is not on disk."""

    def __init__(self, now: Callable[[], float], rng: random.Random) -> None:
        self._now = now
        self._rng = rng
        self.cached = bytearray()  # the journal as processes see it
        self._durable = bytearray()
        self._dirty_since: dict[int, float] = {}  # by page
        self.meta = b""
        self._old_metas: list[tuple[float, bytes]] = [(0.0, b"")]  # until when each was current
        self._commit_phase_s = rng.uniform(0, COMMIT_S)

    def write(self, offset: int, data: bytes) -> None:
        if (missing := offset + len(data) - len(self.cached)) > 0:
            self.cached += bytes(missing)
        for page in range(offset // PAGE_SIZE, (offset + len(data) - 1) // PAGE_SIZE + 1):
            since = self._dirty_since.setdefault(page, self._now())
            if self._now() - since > WRITE_BACK_S:
                self._write_back(page)
                self._dirty_since[page] = self._now()
        self.cached[offset : offset + len(data)] = data

    def replace_meta(self, data: bytes) -> None:
        """A new file is renamed over the old one, without a sync."""
        self._old_metas.append((self._now(), self.meta))
        self.meta = data

    def flush(self) -> None:
        """msync of the journal."""
        for page in list(self._dirty_since):
            self._write_back(page)

    def cut_power(self) -> None:
        """Each page is on disk already or not, the likelier the longer it was dirty."""
        for page, since in list(self._dirty_since.items()):
            if self._rng.random() < (self._now() - since) / WRITE_BACK_S:
                self._write_back(page)
        self._dirty_since.clear()
        self.cached = bytearray(self._durable)
        committed_at = self._now() - (self._now() + self._commit_phase_s) % COMMIT_S
        versions = [*self._old_metas, (self._now(), self.meta)]
        self.meta = next(meta for until, meta in versions if until > committed_at)
        self._old_metas = [(self._now(), self.meta)]

    def _write_back(self, page: int) -> None:
        start, end = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
        if (missing := min(end, len(self.cached)) - len(self._durable)) > 0:
            self._durable += bytes(missing)
        self._durable[start:end] = self.cached[start:end]
        self._dirty_since.pop(page, None)


class _JournalPath:
    """Stands for the journal's file name; the library appends to it."""

    def __init__(self, pages: PageCache) -> None:
        self.pages = pages

    def __add__(self, suffix: str) -> "_JournalPath":
        return self


class _CachedFile:
    """In the place of the library's `ResizableFile`."""

    def __init__(self, path: _JournalPath, defaultContent: bytes) -> None:
        self._pages = path.pages
        if not self._pages.cached:
            self._pages.write(0, defaultContent.ljust(1024, b"\0"))

    def write(self, offset: int, values: bytes) -> None:
        self._pages.write(offset, values)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._pages.cached[offset : offset + size])

    def flush(self) -> None:
        self._pages.flush()

    def _destroy(self) -> None:
        self._pages.flush()


class _CachedMeta:
    """In the place of the library's `MetaStorer`, which writes, renames and syncs nothing."""

    def __init__(self, path: _JournalPath) -> None:
        self._pages = path.pages

    def getMeta(self) -> dict[str, Any]:
        try:
            meta: dict[str, Any] = journal.loads(self._pages.meta)
        except Exception:
            meta = {}
        return meta

    def storeMeta(self, meta: dict[str, Any]) -> None:
        self._pages.replace_meta(journal.dumps(meta))


journal.ResizableFile = _CachedFile
journal.MetaStorer = _CachedMeta


class StockJournal(journal.FileJournal):  # type: ignore[misc]
    """The library's file journal, which tells what is deleted from its end."""

    def __init__(self, pages: PageCache, on_cut: Callable[[list[Any]], None]) -> None:
        self._on_cut = on_cut
        super().__init__(_JournalPath(pages))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        self._on_cut(self[entryFrom:])
        super().deleteEntriesFrom(entryFrom)


class BugInApplication(Exception):
    """Raised on purpose, by what the library calls."""


class Registers(syncobj.SyncObj):  # type: ignore[misc]
    """The replicated object: what the other simulation's state machine does, for this library."""

    def __init__(self, on_apply: Callable[[str], None], *args: Any, **kwargs: Any) -> None:
        self._on_apply = on_apply  # set before the base class is made: not in snapshots
        super().__init__(*args, **kwargs)
        self.values: dict[str, str] = {}
        self.claims: set[str] = set()
        self.applied_ids: list[str] = []

    @syncobj.replicated  # type: ignore[untyped-decorator]
    def carry_out(self, command_id: str, kind: str, key: str) -> tuple[str, bool]:
        """Returns the id back, to see whose answer it is, and the answer."""
        self._on_apply(command_id)
        self.applied_ids.append(command_id)
        answer = True
        match Kind(kind):
            case Kind.WRITE:
                self.values[key] = command_id
            case Kind.DELETE:
                answer = self.values.pop(key, None) is not None
            case Kind.CLAIM:
                answer = key not in self.claims
                self.claims.add(key)
        return command_id, answer

    @syncobj.replicated  # type: ignore[untyped-decorator]
    def explode(self, command_id: str) -> None:
        self._on_apply(command_id)
        raise BugInApplication
