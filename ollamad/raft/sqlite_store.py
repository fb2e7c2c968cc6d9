"""Keeps a journal in one SQLite file (WAL, synchronous=FULL).

SQLite brings the torn tail: a batch is a transaction, and one that was not synced is gone whole.
Every entry carries a CRC besides, because SQLite does not notice a flipped bit in an old page.
A file of a newer format is refused. Writing happens in a worker thread of the store's own.
"""

import sqlite3
import zlib
from pathlib import Path
from typing import TypeVar

import trio

from ollamad.core.ids import NodeId
from ollamad.raft.errors import JournalFailed
from ollamad.raft.journal import Batch, Blob, LogEntry, Stored

FORMAT = 1  # PRAGMA user_version; raise it when an older daemon could not read the tables
CHECKPOINT_PAGES = 4000  # 16 MB of WAL: a checkpoint syncs twice more, so not too often
LOCK_TIMEOUT_S = 1.0  # for a predecessor that is just ending

_T = TypeVar("_T")

_SCHEMA = """
CREATE TABLE entries(idx INTEGER PRIMARY KEY, term INTEGER, crc INTEGER, command BLOB);
CREATE TABLE meta(id INTEGER PRIMARY KEY CHECK (id = 1),
                  term INTEGER, voted_for TEXT, commit_index INTEGER, hint TEXT);
CREATE TABLE snapshot(id INTEGER PRIMARY KEY CHECK (id = 1), sha256 BLOB, data BLOB);
"""


class SqliteStore:
    """A `Store` in one file, which it locks against other processes while it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._limiter = trio.CapacityLimiter(1)  # one writer, and none of the shared threads

    async def load(self) -> Stored:
        return await trio.to_thread.run_sync(self._load, limiter=self._limiter)

    async def commit(self, batch: Batch) -> None:
        await trio.to_thread.run_sync(self._commit, batch, limiter=self._limiter)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with trio.CancelScope(shield=True):  # bounded: one checkpoint of a bounded WAL
                await trio.to_thread.run_sync(connection.close, limiter=self._limiter)

    def _load(self) -> Stored:
        try:
            self._connection = connection = self._open()
            return self._read(connection)
        except sqlite3.Error as error:
            raise JournalFailed(f"{self._path}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found > FORMAT:
                raise JournalFailed(
                    f"{self._path} has format {found}, this version reads up to {FORMAT}; "
                    "start the newer version that wrote it"
                )
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            if found == 0:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, connection: sqlite3.Connection) -> Stored:
        entries: list[LogEntry] = []
        rows = connection.execute("SELECT command, idx, term, crc FROM entries ORDER BY idx")
        for command, index, term, crc in rows:
            if crc != _crc(command, index, term):
                raise JournalFailed(
                    f"{self._path}: entry {index} is corrupt; restore the data directory, or "
                    "remove it and let this node join again"
                )
            entries.append((command, index, term))
        meta = connection.execute("SELECT term, voted_for, commit_index, hint FROM meta").fetchone()
        row = connection.execute("SELECT data, sha256 FROM snapshot").fetchone()
        if meta is None:
            if entries or row:
                raise JournalFailed(f"{self._path}: the term and the vote are missing")
            return Stored()
        term, voted_for, commit_index, hint = meta
        return Stored(
            entries,
            term,
            NodeId(voted_for) if voted_for else None,
            commit_index,
            tuple(NodeId(node) for node in hint.split()),
            Blob(*row) if row else None,
        )

    def _commit(self, batch: Batch) -> None:
        connection = self._connection
        if connection is None:
            raise JournalFailed(f"{self._path} is closed")
        try:
            connection.execute("BEGIN IMMEDIATE")
            if batch.drop_from is not None:
                connection.execute("DELETE FROM entries WHERE idx >= ?", (batch.drop_from,))
            if batch.drop_below is not None:
                connection.execute("DELETE FROM entries WHERE idx < ?", (batch.drop_below,))
            connection.executemany(
                "INSERT INTO entries(command, idx, term, crc) VALUES (?, ?, ?, ?)",
                ((c, i, t, _crc(c, i, t)) for c, i, t in batch.add),
            )
            if batch.snapshot is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)",
                    (batch.snapshot.sha256, batch.snapshot.data),
                )
            connection.execute(
                "INSERT OR REPLACE INTO meta VALUES (1, ?, ?, ?, ?)",
                (batch.term, batch.voted_for, batch.commit_index, " ".join(batch.hint)),
            )
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # What a failed sync left on disk is anybody's guess: never write after it.
            connection.close()
            self._connection = None
            raise JournalFailed(f"{self._path}: {error}") from error


def _crc(command: bytes, index: int, term: int) -> int:
    return zlib.crc32(command, zlib.crc32(b"%d %d" % (index, term)))
