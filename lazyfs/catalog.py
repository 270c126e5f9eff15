"""catalog.sqlite: every image of one cache, and what became of it. The one authority on names and inodes.

SQLite opens journals by path, and the cache directory's path leads into our own mount once that is up.
So the catalog is opened before mounting, in WAL mode with exclusive locking: then every later operation
goes to file descriptors that are open already (checked with strace, SQLite 3.40), until `close`, which
belongs after unmounting.

Losing the last commits in a power cut would be safe (a whole image is finished again, a new inode's files
are swept), but `synchronous=FULL` costs one fsync for what happens a few times in an image's life.
"""

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import astuple, fields, replace

from lazyfs import errors
from lazyfs.core.lifecycle import State
from lazyfs.interfaces import ImageRecord

_VERSION = 1

_SCHEMA = """
CREATE TABLE images (
    inode           INTEGER PRIMARY KEY AUTOINCREMENT,  -- st_ino on the mount; AUTOINCREMENT: never given twice
    export          TEXT NOT NULL,     -- the export's name, as the server lists it
    path            TEXT NOT NULL,     -- where it is shown, relative to the mountpoint; unique among images shown
    size            INTEGER,           -- bytes; NULL: the repository was not asked yet
    identity        TEXT NOT NULL,     -- the export's description when the cache was begun; '' if it has none
    format          TEXT NOT NULL,     -- of the cache file: 'raw'
    state           TEXT NOT NULL,     -- 'remote', 'partial', 'whole', 'failed' (core/lifecycle.py)
    error           TEXT NOT NULL,     -- why it failed, or what an operator should know; '' if nothing
    block_size      INTEGER NOT NULL,  -- bytes for each state of the map; fixed when the cache is begun
    created_ns      INTEGER NOT NULL,  -- first seen, ns since the epoch
    present_bytes   INTEGER NOT NULL,  -- data in the cache file; as of the last checkpoint
    demand_bytes    INTEGER NOT NULL,  -- fetched because a reader waited; as of the last checkpoint
    populated_bytes INTEGER NOT NULL,  -- fetched in the background; as of the last checkpoint
    requests        INTEGER NOT NULL   -- read requests sent to the repository; as of the last checkpoint
)
"""
_FIRST_INODE = 2  # 1 is the root of the mount

_COLUMNS = [field.name for field in fields(ImageRecord)]
_INSERT = f"INSERT INTO images ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_UPDATE = f"UPDATE images SET {', '.join(f'{c} = ?' for c in _COLUMNS[1:])} WHERE inode = ?"


class SqliteCatalog:
    """Implements `interfaces.Catalog`."""

    def __init__(self, path: str) -> None:
        """Open or create the catalog.

        Raises:
            CacheCorrupt: the file is damaged, or a newer lazyfs wrote it.
            NoSpace, OSError.
        """
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise _translate(error, path) from error
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA temp_store = MEMORY")
            self._create_or_check()
        except sqlite3.Error as error:
            self._db.close()
            raise _translate(error, path) from error
        except BaseException:
            self._db.close()
            raise

    def _create_or_check(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise errors.CacheCorrupt(
                f"the catalog is of format {version}; this lazyfs knows {_VERSION}: update lazyfs"
            )
        with self._transaction():
            if version == 0:
                self._db.execute(_SCHEMA)
                self._db.execute("INSERT INTO sqlite_sequence VALUES ('images', ?)", (_FIRST_INODE - 1,))
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            else:
                (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise errors.CacheCorrupt(f"the catalog is damaged: {found.splitlines()[-1]}")

    def load(self) -> list[ImageRecord]:
        """Return all records, by inode.

        Raises:
            CacheCorrupt: a row is not what lazyfs wrote.
        """
        try:
            rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM images ORDER BY inode").fetchall()
            return [_record(row) for row in rows]
        except (sqlite3.Error, ValueError) as error:
            raise errors.CacheCorrupt(f"the catalog is damaged: {error}") from error

    def add(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Insert; one transaction for all."""
        added = []
        with self._transaction():
            for record in records:
                cursor = self._db.execute(_INSERT, (None, *_row(record)[1:]))
                assert cursor.lastrowid is not None
                added.append(replace(record, inode=cursor.lastrowid))
        return added

    def update(self, records: Sequence[ImageRecord]) -> None:
        """Replace; one transaction for all."""
        with self._transaction():
            self._db.executemany(_UPDATE, [(*_row(record)[1:], record.inode) for record in records])

    def describe(self, described: Sequence[tuple[int, int, str]]) -> None:
        """Set sizes and identities of remote images; one transaction for all."""
        with self._transaction():
            self._db.executemany(
                "UPDATE images SET size = ?, identity = ? WHERE inode = ? AND state = 'remote'",
                [(size, identity, inode) for inode, size, identity in described],
            )

    def remove(self, inodes: Sequence[int]) -> None:
        """Delete; one transaction for all."""
        with self._transaction():
            self._db.executemany("DELETE FROM images WHERE inode = ?", [(inode,) for inode in inodes])

    def close(self) -> None:
        """Close the database. Touches its path: only before mounting over it, or after unmounting."""
        with self._lock:
            self._db.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._lock)


class _Transaction:
    """BEGIN, then COMMIT or ROLLBACK, under the lock; SQLite's errors become ours."""

    def __init__(self, db: sqlite3.Connection, lock: threading.Lock) -> None:
        self._db = db
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self._lock.release()
            raise _translate(error, "catalog.sqlite") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
                return
        except sqlite3.Error as failed:
            error = failed
            raise _translate(failed, "catalog.sqlite") from failed
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise _translate(error, "catalog.sqlite") from error


def _row(record: ImageRecord) -> list[object]:
    return [value.value if isinstance(value, State) else value for value in astuple(record)]


def _record(row: tuple[object, ...]) -> ImageRecord:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["state"] = State(values["state"])
    return ImageRecord(**values)  # type: ignore[arg-type]


def _translate(error: sqlite3.Error, path: str) -> Exception:
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL,):
        return errors.NoSpace()
    if isinstance(error, sqlite3.OperationalError):
        return OSError(f"{path}: {error}")
    return errors.CacheCorrupt(f"{path}: {error}")
