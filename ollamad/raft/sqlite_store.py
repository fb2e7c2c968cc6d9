"""Keeps a journal in one SQLite file (WAL, synchronous=FULL), and trusts no byte that it reads.

A batch is a transaction, so one that a crash tore is gone whole. What SQLite does not notice is
found here: each entry has a CRC, and one row, the head, has a CRC over what there must be: the
ends of the log, the snapshot's hash, the term and the vote. What SQLite drops without a word,
`wal.py` and `witness.py` find. A file of a newer format is refused and left as it is; one of an
older format is brought up to date. Writing happens in a worker thread of the store's own.
"""

import errno
import os
import sqlite3
import zlib
from contextlib import suppress
from pathlib import Path

import msgspec

from ollamad.core.ids import NodeId
from ollamad.raft.errors import DiskFull, JournalFailed
from ollamad.raft.journal import JOIN_AGAIN, Batch, Blob, LogEntry, Stored
from ollamad.raft.wal import read_wal
from ollamad.raft.witness import ID_SIZE, Testimony, Witness
from ollamad.raft.worker import Worker

FORMAT = 2  # PRAGMA user_version; raise it when an older daemon could not read the tables
CHECKPOINT_PAGES = 1000  # of WAL: a checkpoint syncs twice more, so not too often
WAL_SIZE = 4 << 20  # bytes that it has from the start: as many pages, with their headers
SQLITE_MAGIC = b"SQLite format 3\0"  # at the start of page 1
USER_VERSION = slice(60, 64)  # of page 1, big-endian

_SCHEMA = """
CREATE TABLE entries(idx INTEGER PRIMARY KEY, term INTEGER, crc INTEGER, command BLOB);
CREATE TABLE snapshot(id INTEGER PRIMARY KEY CHECK (id = 1), sha256 BLOB, data BLOB);
"""
_SCHEMA_HEAD = "CREATE TABLE head(id INTEGER PRIMARY KEY CHECK (id = 1), crc INTEGER, data BLOB);"

NO_SPACE_AT_START = "no space is left on the disk; free some and start again"

# Primary result codes that speak of the surroundings rather than of the file's content.
_ENVIRONMENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}


class _Head(msgspec.Struct, frozen=True):
    """What the other tables must hold, and the small values of a `Batch`."""

    journal_id: bytes
    sequence: int = 0  # number of the transaction that wrote this
    first: int = 0  # indices of the entries; 0 and -1 if there are none
    last: int = -1
    snapshot: bytes = b""  # its sha256; empty if there is none
    term: int = 0
    voted_for: NodeId | None = None
    commit_index: int = 1
    hint: tuple[NodeId, ...] = ()

    def after(self, batch: Batch) -> "_Head":
        """The head that the batch leads to."""
        first, last = self.first, self.last
        if batch.drop_from is not None:
            last = min(last, batch.drop_from - 1)
        if batch.drop_below is not None:
            first = max(first, batch.drop_below)
        for _, index, _ in batch.add:
            if first > last:
                first = index
            elif index != last + 1:
                raise JournalFailed(f"entry {index} cannot follow entry {last}: this is a bug")
            last = index
        if first > last:
            first, last = 0, -1
        return _Head(
            self.journal_id,
            self.sequence + 1,
            first,
            last,
            batch.snapshot.sha256 if batch.snapshot is not None else self.snapshot,
            batch.term,
            batch.voted_for,
            batch.commit_index,
            batch.hint,
        )


class SqliteStore:
    """A `Store` in one file, which it locks against other processes while it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._witness: Witness | None = None
        self._head = _Head(b"")
        self._worker = Worker()

    async def load(self) -> Stored:
        return await self._worker.run(self._load)

    async def commit(self, batch: Batch) -> None:
        await self._worker.run(lambda: self._commit(batch))

    async def aclose(self) -> None:
        # A write that was abandoned comes first, and only then is the lock on the file given up.
        try:
            if self._witness is not None:
                await self._worker.run(self._close)
        finally:
            self._worker.close()

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        witness, self._witness = self._witness, None
        if witness is not None:
            witness.close()

    # Reading.

    def _load(self) -> Stored:
        try:
            return self._open_and_read()
        except BaseException as error:
            self._close()
            if isinstance(error, BlockingIOError):
                reason = "it is locked, another process uses it"
            elif isinstance(error, OSError):
                reason = NO_SPACE_AT_START if _means_full(error) else str(error.strerror)
            elif isinstance(error, sqlite3.Error):
                reason = _explain(error)
            else:
                raise
            raise JournalFailed(f"{self._path}: {reason}") from error

    def _open_and_read(self) -> Stored:
        path = self._path
        self._witness = witness = Witness(_beside(path, "-witness"))
        found = self._examine()
        testimony = witness.read()
        if found == 0 and testimony is not None:
            raise JournalFailed(f"{path} is missing or empty, but was not before; {JOIN_AGAIN}")
        self._connection = connection = self._connect()
        if found == 0:
            self._create(connection)
        self._check_structure(connection)
        if found == 1:
            self._head = self._read_format_1(connection)
        else:
            self._head = self._read_head(connection)
        head = self._head
        stored = Stored(
            self._read_entries(connection),
            head.term,
            head.voted_for,
            head.commit_index,
            head.hint,
            self._read_snapshot(connection),
        )
        if testimony is not None and (
            testimony.journal_id != head.journal_id or testimony.sequence > head.sequence
        ):
            raise JournalFailed(
                f"{path}: changes that were acknowledged are missing from it; {JOIN_AGAIN}"
            )
        if found == 1:
            self._bring_up_to_date(connection)
        witness.write(Testimony(head.journal_id, head.sequence))
        witness.sync()
        self._extend_wal(connection)
        return stored

    def _examine(self) -> int:
        """The file's format, 0 for a new one. SQLite has not touched anything yet."""
        path = self._path
        wal = read_wal(_beside(path, "-wal"))
        if wal.damage:
            raise JournalFailed(
                f"{path}-wal: {wal.damage}, and changes that were acknowledged follow; {JOIN_AGAIN}"
            )
        first_page = wal.first_page
        if first_page is None:
            try:
                with open(path, "rb") as file:
                    first_page = file.read(USER_VERSION.stop)
            except FileNotFoundError:
                return 0
        if first_page and not first_page.startswith(SQLITE_MAGIC):
            raise self._corrupt("not a journal")
        found = int.from_bytes(first_page[USER_VERSION])
        if found > FORMAT:
            raise JournalFailed(
                f"{path} has format {found}, this version reads up to {FORMAT}; "
                "start the newer version that wrote it"
            )
        return found

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=0, isolation_level=None, check_same_thread=False
        )
        # Damage can make text of bytes, which must not raise before anybody looks at it.
        connection.text_factory = lambda data: data.decode(errors="replace")
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != ("wal",):
                raise JournalFailed(f"{self._path} cannot have a write-ahead log, but {mode[0]}")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for statement in (_SCHEMA + _SCHEMA_HEAD).split(";"):
            connection.execute(statement)
        _write_head(connection, _Head(os.urandom(ID_SIZE)))
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")

    def _check_structure(self, connection: sqlite3.Connection) -> None:
        """Find damage outside the rows, which later writes would build upon."""
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._corrupt(verdict)

    def _read_head(self, connection: sqlite3.Connection) -> _Head:
        row = connection.execute("SELECT data, crc FROM head").fetchone()
        if row is None:
            raise self._corrupt("the term and the vote are missing")
        data, crc = row
        if not isinstance(data, bytes) or zlib.crc32(data) != crc:
            raise self._corrupt("the term and the vote are corrupt")
        return msgspec.msgpack.decode(data, type=_Head)

    def _read_entries(self, connection: sqlite3.Connection) -> list[LogEntry]:
        entries: list[LogEntry] = []
        expected = self._head.first
        rows = connection.execute("SELECT command, idx, term, crc FROM entries ORDER BY idx")
        for command, index, term, crc in rows:
            if index != expected:
                raise self._corrupt(f"entry {expected} is missing")
            if not isinstance(command, bytes) or not isinstance(term, int):
                raise self._corrupt(f"entry {index} is corrupt")
            if crc != _crc(command, index, term):
                raise self._corrupt(f"entry {index} is corrupt")
            entries.append((command, index, term))
            expected += 1
        if expected != self._head.last + 1:
            raise self._corrupt(f"the log should end with entry {self._head.last}")
        return entries

    def _read_snapshot(self, connection: sqlite3.Connection) -> Blob | None:
        row = connection.execute("SELECT data, sha256 FROM snapshot").fetchone()
        if row is None and not self._head.snapshot:
            return None
        # The sha256 over the data itself is checked by whoever unpacks the snapshot.
        if row is None or row[1] != self._head.snapshot or not isinstance(row[0], bytes):
            raise self._corrupt("the snapshot is missing or corrupt")
        return Blob(*row)

    def _corrupt(self, what: str) -> JournalFailed:
        return JournalFailed(f"{self._path}: {what}; {JOIN_AGAIN}")

    # Format 1 had the small values in columns, without a checksum, and no witness.

    def _read_format_1(self, connection: sqlite3.Connection) -> _Head:
        ends = connection.execute("SELECT min(idx), max(idx) FROM entries").fetchone()
        first, last = (0, -1) if ends[0] is None else ends
        snapshot = connection.execute("SELECT sha256 FROM snapshot").fetchone()
        meta = connection.execute("SELECT term, voted_for, commit_index, hint FROM meta").fetchone()
        if meta is None:
            if snapshot is not None or last != -1:
                raise self._corrupt("the term and the vote are missing")
            meta = (0, None, 1, "")
        term, voted_for, commit_index, hint = meta
        if not isinstance(term, int) or not isinstance(commit_index, int):
            raise self._corrupt("the term and the vote are corrupt")
        return _Head(
            os.urandom(ID_SIZE),
            0,
            first,
            last,
            snapshot[0] if snapshot else b"",
            term,
            NodeId(voted_for) if voted_for else None,
            commit_index,
            tuple(NodeId(node) for node in hint.split()),
        )

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_SCHEMA_HEAD)
        _write_head(connection, self._head)
        connection.execute("DROP TABLE meta")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")

    # Writing.

    def _extend_wal(self, connection: sqlite3.Connection) -> None:
        """Give the write-ahead log its full length, of zeros, which end it for whoever reads it.

        SQLite writes over it from the start after each checkpoint. A sync after which the file is
        longer must also write the file system's own journal, and takes twice as long.
        """
        try:
            connection.execute("UPDATE head SET id = id")  # else it has no header yet
            with open(_beside(self._path, "-wal"), "r+b") as wal:
                missing = WAL_SIZE - wal.seek(0, os.SEEK_END)
                if missing > 0:
                    wal.write(bytes(missing))
                    wal.flush()
                    os.fsync(wal.fileno())
        except sqlite3.Error as error:
            if not (self._is_full(error) and _rolled_back(connection)):
                raise
        except OSError as error:
            if not _means_full(error):  # it will do without
                raise

    def _commit(self, batch: Batch) -> None:
        connection, witness = self._connection, self._witness
        if connection is None or witness is None:
            raise JournalFailed(f"{self._path} is closed")
        head = self._head.after(batch)
        try:
            _write(connection, batch, head)
        except sqlite3.Error as error:
            if self._is_full(error) and _rolled_back(connection):
                raise DiskFull(f"{self._path}: no space is left on the disk") from error
            # What a failed sync left on disk is anybody's guess: never write after it.
            self._connection = None
            connection.close()
            raise JournalFailed(f"{self._path}: {error}") from error
        self._head = head
        try:
            witness.write(Testimony(head.journal_id, head.sequence))
        except OSError as error:
            if not _means_full(error):  # possible where files are copied on write
                raise JournalFailed(f"{self._path}-witness: {error.strerror}") from error

    def _is_full(self, error: sqlite3.Error) -> bool:
        """Whether writing failed for lack of space, before anything was synced."""
        if _code(error) == sqlite3.SQLITE_FULL:
            return True
        if _code(error) != sqlite3.SQLITE_IOERR_WRITE:
            return False
        # SQLite does not tell a quota that is used up from a disk that is broken.
        probe = _beside(self._path, "-probe")
        try:
            probe.write_bytes(bytes(8192))
        except OSError as found:
            return _means_full(found)
        finally:
            with suppress(OSError):
                probe.unlink()
        return False


def _write(connection: sqlite3.Connection, batch: Batch, head: _Head) -> None:
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
    _write_head(connection, head)
    connection.execute("COMMIT")


def _write_head(connection: sqlite3.Connection, head: _Head) -> None:
    data = msgspec.msgpack.encode(head)
    connection.execute("INSERT OR REPLACE INTO head VALUES (1, ?, ?)", (zlib.crc32(data), data))


def _code(error: sqlite3.Error) -> int:
    """SQLite's extended result code; 0 if the error is not SQLite's but its binding's."""
    return getattr(error, "sqlite_errorcode", 0)


def _explain(error: sqlite3.Error) -> str:
    """What to tell about an error at the start."""
    if _code(error) == sqlite3.SQLITE_FULL:
        return NO_SPACE_AT_START
    return str(error) if _code(error) & 0xFF in _ENVIRONMENT else f"{error}; {JOIN_AGAIN}"


def _rolled_back(connection: sqlite3.Connection) -> bool:
    """Make sure that the failed transaction left nothing behind; SQLite does it itself mostly."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        return False
    return True


def _means_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _crc(command: bytes, index: int, term: int) -> int:
    return zlib.crc32(command, zlib.crc32(b"%d %d" % (index, term)))
