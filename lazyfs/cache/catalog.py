"""Stores every image of one cache, and what became of it, in catalog.sqlite.

The catalog is the only authority on names and inodes.

SQLite opens journals by path, and the path of the cache directory may lead into our own mount. So
it gets a path through a descriptor (`catalog_file`), and takes that as it is (`sqlite_paths`). In
WAL mode with exclusive locking, later operations use descriptors that are open already (checked
with strace, SQLite 3.40). Only `close` uses the path again.

It would be safe to lose the last commits in a power cut: a whole image is finished again, and the
files of a new inode are removed. But `synchronous=FULL` costs just one fsync for what happens a few
times in an image's life.
"""

import dataclasses
import functools
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from lazyfs import errors
from lazyfs.cache import sqlite_paths
from lazyfs.cache.reserve import Reserve
from lazyfs.core import shown_file
from lazyfs.core.export_name import RESERVED
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State

_VERSION = 4

_SCHEMA = """
CREATE TABLE images (
    -- st_ino on the mount. AUTOINCREMENT makes sure that it is never given twice.
    inode           INTEGER PRIMARY KEY AUTOINCREMENT,
    -- the export's name, as the server lists it
    export          TEXT NOT NULL,
    -- where it is shown, relative to the mountpoint; unique among the images that are shown
    path            TEXT NOT NULL,
    -- bytes; NULL if the repository was not asked yet
    size            INTEGER,
    -- the export's description when the cache was begun; '' if it has none
    identity        TEXT NOT NULL,
    -- the format of the cache file: 'raw' or 'qcow2'
    format          TEXT NOT NULL,
    -- 'remote', 'partial', 'whole' or 'failed' (core/lifecycle.py)
    state           TEXT NOT NULL,
    -- why it failed, or what an operator should know; '' if there is nothing
    error           TEXT NOT NULL,
    -- bytes of a block of the map, or of a qcow2's cluster; fixed when the cache is begun
    block_size      INTEGER NOT NULL,
    -- when it was first seen, in ns since the epoch
    created_ns      INTEGER NOT NULL,
    -- bytes of data in the cache file, as of the last checkpoint
    present_bytes   INTEGER NOT NULL,
    -- bytes fetched because a reader waited, as of the last checkpoint
    demand_bytes    INTEGER NOT NULL,
    -- bytes fetched in the background, as of the last checkpoint
    populated_bytes INTEGER NOT NULL,
    -- read requests sent to the repository, as of the last checkpoint
    requests        INTEGER NOT NULL,
    -- the last open or close, in ns since the epoch; 0 if there was none; may be out of date
    last_used_ns    INTEGER NOT NULL DEFAULT 0,
    -- 1 if it must not be evicted
    pinned          INTEGER NOT NULL DEFAULT 0,
    -- the digest that the bytes must have, such as 'sha256:...'; '' if it is not known
    digest          TEXT NOT NULL DEFAULT '',
    -- what `error` says, in a form for decisions (core/lifecycle.py, Cause)
    cause           TEXT NOT NULL DEFAULT '',
    -- 1 if somebody has used it, 0 if it was only looked at (core/looking.py)
    meant           INTEGER NOT NULL DEFAULT 1
)
"""
_MORE_TABLES = (
    # The plain files that were evicted, or replaced: where they were, and the time that was set for
    # them. If a power cut brings such a file back, it is recognised, and removed.
    "CREATE TABLE evicted (path TEXT PRIMARY KEY, created_ns INTEGER NOT NULL);",
    # What concerns the whole cache, by name.
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);",
)
"""The tables beside `images`."""
_CAUSE_OF_TEXT = (
    "CASE"
    " WHEN error = '' THEN ''"
    " WHEN error LIKE 'changed in the repository%' THEN 'export-changed'"
    " WHEN error LIKE 'its bytes do not have the digest %' THEN 'wrong-digest'"
    " WHEN error LIKE 'its plain file was changed by hand%' THEN 'changed-by-hand'"
    " ELSE 'other' END"
)
"""How a row of version 1 or 2 gets its cause. In these versions, decisions were made by these
words."""
_UPGRADES = {
    1: """
ALTER TABLE images ADD COLUMN last_used_ns INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN digest TEXT NOT NULL DEFAULT '';
""",
    2: f"""
ALTER TABLE images ADD COLUMN cause TEXT NOT NULL DEFAULT '';
UPDATE images SET cause = {_CAUSE_OF_TEXT};
""",
    3: "\n".join(
        [*_MORE_TABLES, "ALTER TABLE images ADD COLUMN meant INTEGER NOT NULL DEFAULT 1;"]
    ),
}
"""The statements that upgrade from each older version to the next."""
_ADDED = {"last_used_ns": "0", "pinned": "0", "digest": "''", "cause": _CAUSE_OF_TEXT, "meant": "1"}
"""The columns that rows of older versions lack, and what replaces them."""
_FIRST_INODE = 2  # 1 is the root of the mount

_COLUMNS = [field.name for field in fields(ImageRecord)]
_INSERT = f"INSERT INTO images ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_UPDATE = f"UPDATE images SET {', '.join(f'{c} = ?' for c in _COLUMNS[1:])} WHERE inode = ?"


class TooNew(errors.CacheCorrupt):
    """A newer lazyfs wrote the catalog. Nothing is wrong with it."""


P = ParamSpec("P")
T = TypeVar("T")


def _with_reserve(
    method: "Callable[Concatenate[SqliteCatalog, P], T]",
) -> "Callable[Concatenate[SqliteCatalog, P], T]":
    """Let a method that found the disk full try once more with the reserve."""

    @functools.wraps(method)
    def tried_again(self: "SqliteCatalog", /, *args: P.args, **named: P.kwargs) -> T:
        try:
            result = method(self, *args, **named)
        except errors.NoSpace:
            if not self._reserve.free():
                raise
            return method(self, *args, **named)
        self._reserve.take()
        return result

    return tried_again


class SqliteCatalog:
    """Stores the records of all images in SQLite. Implements `interfaces.Catalog`."""

    def __init__(self, path: str, reserve: Reserve | None = None) -> None:
        """Open or create the catalog.

        Args:
            path: the file.
            reserve: gives room when the disk is full, as what frees room must be written here.

        Raises:
            CacheCorrupt: the file is damaged, or a newer lazyfs wrote it.
            NoSpace, OSError.
        """
        self._reserve = reserve or Reserve(None)
        self._open(path)

    @_with_reserve
    def _open(self, path: str) -> None:
        self._lock = threading.Lock()
        try:
            sqlite_paths.register()
            self._db = sqlite3.connect(
                f"file:{quote(path)}?vfs={sqlite_paths.NAME}",
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
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
            raise TooNew(
                f"the catalog is of format {version}; this lazyfs knows {_VERSION}: update lazyfs"
            )
        # This always writes something. SQLite syncs the folder of a new journal, by its path, when
        # it first syncs the journal, and that must happen before anything is mounted over it.
        with self._transaction():
            if version == 0:
                for statement in (_SCHEMA, *_MORE_TABLES):
                    self._db.execute(statement)
                self._db.execute(
                    "INSERT INTO sqlite_sequence VALUES ('images', ?)", (_FIRST_INODE - 1,)
                )
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            else:
                self._quick_check()
                for older in range(version, _VERSION):
                    for statement in _UPGRADES[older].strip().split("\n"):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _quick_check(self) -> None:
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise errors.CacheCorrupt(f"the catalog is damaged: {found.splitlines()[-1]}")

    def load(self) -> list[ImageRecord]:
        """Return all records, ordered by inode.

        Raises:
            CacheCorrupt: a row is not what lazyfs wrote.
        """
        try:
            rows = self._db.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM images ORDER BY inode"
            ).fetchall()
            return [_record(row) for row in rows]
        except (sqlite3.Error, ValueError) as error:
            raise errors.CacheCorrupt(f"the catalog is damaged: {error}") from error

    def load_each(self) -> tuple[list[ImageRecord], dict[int, str]]:
        """Return the records that can be read, and what is wrong with the other rows, by inode."""
        return _read_each(self._db)

    @_with_reserve
    def restore(self, records: Sequence[ImageRecord]) -> None:
        """Insert records under the inodes that they have.

        This is for a catalog that is made anew.
        """
        with self._transaction():
            self._db.executemany(_INSERT, [_row(record) for record in records])

    @_with_reserve
    def add(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Insert records, all in one transaction."""
        added = []
        with self._transaction():
            for record in records:
                cursor = self._db.execute(_INSERT, (None, *_row(record)[1:]))
                assert cursor.lastrowid is not None
                added.append(dataclasses.replace(record, inode=cursor.lastrowid))
        return added

    @_with_reserve
    def update(self, records: Sequence[ImageRecord]) -> None:
        """Replace records, all in one transaction."""
        with self._transaction():
            self._db.executemany(_UPDATE, [(*_row(record)[1:], record.inode) for record in records])

    @_with_reserve
    def describe(self, described: Sequence[tuple[int, int, str]]) -> None:
        """Set sizes and identities of remote images, all in one transaction."""
        with self._transaction():
            self._db.executemany(
                "UPDATE images SET size = ?, identity = ? WHERE inode = ? AND state = 'remote'",
                [(size, identity, inode) for inode, size, identity in described],
            )

    @_with_reserve
    def note_uses(self, uses: Sequence[tuple[int, int]]) -> None:
        """Set when images were last used, all in one transaction."""
        with self._transaction():
            self._db.executemany(
                "UPDATE images SET last_used_ns = ? WHERE inode = ?",
                [(used_ns, inode) for inode, used_ns in uses],
            )

    @_with_reserve
    def remove(self, inodes: Sequence[int]) -> None:
        """Delete records, all in one transaction."""
        with self._transaction():
            self._db.executemany(
                "DELETE FROM images WHERE inode = ?", [(inode,) for inode in inodes]
            )

    @_with_reserve
    def replace(self, inode: int, record: ImageRecord) -> ImageRecord:
        """Delete one record and insert another, and note where the plain file was.

        This is one transaction, so that the image always has a row.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO evicted"
                " SELECT path, created_ns FROM images WHERE inode = ? AND state <> 'remote'",
                (inode,),
            )
            self._db.execute("DELETE FROM images WHERE inode = ?", (inode,))
            cursor = self._db.execute(_INSERT, (None, *_row(record)[1:]))
            assert cursor.lastrowid is not None
            return dataclasses.replace(record, inode=cursor.lastrowid)

    def setting(self, name: str) -> str:
        """Return what is stored under `name` for the whole cache, or "".

        Raises:
            CacheCorrupt: the catalog is damaged.
        """
        try:
            row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            raise errors.CacheCorrupt(f"the catalog is damaged: {error}") from error
        return "" if row is None else str(row[0])

    @_with_reserve
    def set_setting(self, name: str, value: str) -> None:
        """Store `value` under `name`."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def evicted(self) -> dict[str, int]:
        """Return the plain files that were evicted or replaced since `forget_evicted`.

        Returns:
            By path: the time of the file, in ns since the epoch.

        Raises:
            CacheCorrupt: the catalog is damaged.
        """
        try:
            return dict(self._db.execute("SELECT path, created_ns FROM evicted").fetchall())
        except sqlite3.Error as error:
            raise errors.CacheCorrupt(f"the catalog is damaged: {error}") from error

    @_with_reserve
    def forget_evicted(self) -> None:
        """Forget the plain files that were evicted, because none of them is there."""
        with self._transaction():
            self._db.execute("DELETE FROM evicted")

    def close(self) -> None:
        """Close the database.

        This uses its path, so it may be called only before mounting over it or after unmounting.
        """
        with self._lock:
            self._db.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._lock)


class _Transaction:
    """Makes one transaction under the lock: BEGIN, then COMMIT or ROLLBACK.

    It translates SQLite's errors into ours.
    """

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object
    ) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
                return
        except sqlite3.Error as failed:
            error = failed
            raise _translate(failed, "catalog.sqlite") from failed
        finally:
            try:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            finally:
                # This happens even if the rollback fails. Other callers must get an error too, and
                # not wait for ever.
                self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise _translate(error, "catalog.sqlite") from error


def salvage(path: str) -> list[ImageRecord]:
    """Return the records of a damaged catalog that can still be read. There may be none."""
    try:
        db = sqlite3.connect(path)
    except sqlite3.Error:
        return []
    try:
        return _read_each(db)[0]
    finally:
        db.close()


def _read_each(db: sqlite3.Connection) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read row by row, so that the other rows can be read if one is damaged."""
    records, damaged = [], {}
    there = set(_COLUMNS)
    with suppress(sqlite3.Error):
        there = {row[1] for row in db.execute("PRAGMA table_info(images)")}
    columns = [name if name in there or name not in _ADDED else _ADDED[name] for name in _COLUMNS]
    for inode in _inodes(db):
        try:
            row = db.execute(
                f"SELECT {', '.join(columns)} FROM images WHERE inode = ?", (inode,)
            ).fetchone()
            if row is None:
                raise ValueError("it is not where the index has it")
            records.append(_record(row))
        except (sqlite3.Error, ValueError) as error:
            damaged[inode] = str(error)
    return records, damaged


def _inodes(db: sqlite3.Connection) -> list[int]:
    inodes = []
    with suppress(sqlite3.Error):  # the rows before the damage are good
        for (inode,) in db.execute("SELECT inode FROM images ORDER BY inode"):
            inodes.append(inode)
    return inodes


def _row(record: ImageRecord) -> list[object]:
    return [value.value if isinstance(value, State | Cause) else value for value in astuple(record)]


def _record(row: tuple[object, ...]) -> ImageRecord:
    values = dict(zip(_COLUMNS, row, strict=True))
    for field in fields(ImageRecord):
        kinds = (
            (int, type(None))
            if field.name == "size"
            else (str,)
            if field.type in (str, State, Cause)
            else (int,)
        )
        value = values[field.name]
        if not isinstance(value, kinds) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{field.name} is {value!r}")
    values["state"] = State(values["state"])
    values["cause"] = Cause(values["cause"])
    values["pinned"], values["meant"] = bool(values["pinned"]), bool(values["meant"])
    record = ImageRecord(**values)  # type: ignore[arg-type]
    parts = record.path.split("/")
    if any(part in ("", ".", "..") for part in parts) or parts[0] in RESERVED:
        raise ValueError(f"path is {record.path!r}")
    if record.format not in shown_file.FORMATS or not record.block_size:
        raise ValueError(f"format is {record.format!r}, block_size is {record.block_size}")
    return record


def _translate(error: sqlite3.Error, path: str) -> Exception:
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL,):
        return errors.NoSpace()
    # After "no such table" or "no such column" it is a database, but not the one that lazyfs wrote.
    if isinstance(error, sqlite3.OperationalError) and not str(error).startswith("no such"):
        return OSError(f"{path}: {error}")
    return errors.CacheCorrupt(f"{path}: {error}")
