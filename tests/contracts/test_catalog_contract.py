"""What every Catalog promises, in memory and in SQLite."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import MemoryCatalog

from lazyfs import errors
from lazyfs.cache import catalog as catalog_module
from lazyfs.cache.catalog import SqliteCatalog
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State

AnyCatalog = MemoryCatalog | SqliteCatalog

BLANK = ImageRecord(
    0, "debian-12", "debian-12", None, "", "raw", State.REMOTE, "", 65536, 1_600_000_000_123_456_789
)


class Keeper:
    """A catalog that can be closed and opened again."""

    def __init__(self, reopen: Callable[[], AnyCatalog]) -> None:
        self._reopen = reopen
        self.now = reopen()

    def reopen(self) -> AnyCatalog:
        self.now.close()
        self.now = self._reopen()
        return self.now


@pytest.fixture(params=["memory", "sqlite"])
def keeper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keeper]:
    if request.param == "memory":
        one = MemoryCatalog()
        yield Keeper(lambda: one)
        return
    made = Keeper(lambda: SqliteCatalog(str(tmp_path / "catalog.sqlite")))
    yield made
    made.now.close()


def test_a_new_catalog_is_empty(keeper: Keeper) -> None:
    assert keeper.now.load() == []
    assert keeper.reopen().load() == []


def test_added_records_come_back_with_inodes_and_nothing_else_changed(keeper: Keeper) -> None:
    records = [replace(BLANK, export=f"disk {i}", path=f"disk {i}", inode=99) for i in range(5)]
    added = keeper.now.add(records)
    assert [replace(record, inode=99) for record in added] == records
    inodes = [record.inode for record in added]
    assert inodes == sorted(set(inodes))
    assert min(inodes) >= 2  # 1 is the root
    assert keeper.now.load() == added
    assert keeper.reopen().load() == added


def test_every_field_comes_back(keeper: Keeper) -> None:
    record = ImageRecord(
        0, "tëam/\0\n'\"%", "t%00", 2**62, "id\U0001f600", "raw", State.FAILED, "why; --", 4096, 2**62,
        present_bytes=2**61, demand_bytes=1, populated_bytes=2, requests=3, last_used_ns=2**62, pinned=True,
        digest="sha256:" + "9f" * 32,
    )  # fmt: skip
    (added,) = keeper.now.add([record])
    assert replace(added, inode=0) == record
    assert keeper.reopen().load() == [added]


@pytest.mark.parametrize("state", State)
def test_every_state_comes_back(keeper: Keeper, state: State) -> None:
    (added,) = keeper.now.add([BLANK])
    keeper.now.update([replace(added, state=state)])
    (found,) = keeper.reopen().load()
    assert found.state is state


def test_what_an_operator_says_is_told_apart_from_what_nobody_said(keeper: Keeper) -> None:
    one, two = keeper.now.add([BLANK, replace(BLANK, export="b", path="b")])
    assert (one.last_used_ns, one.pinned, one.digest) == (0, False, "")
    keeper.now.update([replace(one, pinned=True), replace(two, digest="sha512:00", last_used_ns=5)])
    first, second = keeper.reopen().load()
    assert first == replace(one, pinned=True)
    assert first.pinned is True
    assert second == replace(two, digest="sha512:00", last_used_ns=5)
    assert second.pinned is False


def test_an_update_changes_its_own_record_only(keeper: Keeper) -> None:
    one, two, three = keeper.now.add(
        [BLANK, replace(BLANK, export="b", path="b"), replace(BLANK, export="c")]
    )
    changed = replace(two, size=0, error="full", requests=7, path="elsewhere")
    keeper.now.update([changed])
    assert keeper.reopen().load() == [one, changed, three]


def test_describing_changes_size_and_identity_of_remote_images_only(keeper: Keeper) -> None:
    one, two, three = keeper.now.add(
        [BLANK, replace(BLANK, export="b", path="b"), replace(BLANK, export="c")]
    )
    begun = replace(two, state=State.PARTIAL, size=7)
    keeper.now.update([begun])
    gone = three.inode
    keeper.now.remove([gone])
    keeper.now.describe([(one.inode, 2**40, "v2"), (begun.inode, 8, "v2"), (gone, 9, "v2")])
    assert keeper.reopen().load() == [replace(one, size=2**40, identity="v2"), begun]
    keeper.now.describe([])


def test_noting_a_use_changes_nothing_else(keeper: Keeper) -> None:
    one, two = keeper.now.add([BLANK, replace(BLANK, export="b", path="b")])
    whole = replace(two, state=State.WHOLE, size=7)
    keeper.now.update([whole])
    keeper.now.note_uses([(two.inode, 5), (one.inode + two.inode, 6)])
    assert keeper.reopen().load() == [one, replace(whole, last_used_ns=5)]


def test_another_record_takes_the_place_of_one(keeper: Keeper) -> None:
    one, two = keeper.now.add([BLANK, replace(BLANK, export="b", path="b")])
    new = keeper.now.replace(one.inode, replace(one, size=5, digest="sha256:00"))
    assert new == replace(one, size=5, digest="sha256:00", inode=new.inode)
    assert new.inode > two.inode
    assert keeper.reopen().load() == [two, new]


def test_an_update_of_a_record_that_is_gone_brings_nothing_back(keeper: Keeper) -> None:
    one, two = keeper.now.add([BLANK, replace(BLANK, export="b", path="b")])
    keeper.now.remove([one.inode])
    keeper.now.update([replace(one, size=5), replace(two, size=5)])
    assert keeper.now.load() == [replace(two, size=5)]


def test_an_inode_is_never_given_twice(keeper: Keeper) -> None:
    given = []
    for _ in range(3):
        added = keeper.now.add([BLANK, BLANK])
        given += [record.inode for record in added]
        keeper.now.remove([record.inode for record in added])
        keeper.reopen()
    assert len(set(given)) == 6
    assert keeper.now.load() == []


def test_two_records_of_one_export(keeper: Keeper) -> None:
    """A replaced image and the one in its place have the same export."""
    old, new = keeper.now.add([BLANK])[0], keeper.now.add([BLANK])[0]
    keeper.now.remove([old.inode])
    assert keeper.now.load() == [new]


def test_nothing_to_do_is_nothing(keeper: Keeper) -> None:
    (added,) = keeper.now.add([BLANK])
    assert keeper.now.add([]) == []
    keeper.now.update([])
    keeper.now.remove([])
    keeper.now.remove([12345])
    assert keeper.now.load() == [added]


def test_calls_from_several_threads(keeper: Keeper) -> None:
    added = keeper.now.add([replace(BLANK, export=str(i), path=str(i)) for i in range(4)])

    def work(record: ImageRecord) -> None:
        for i in range(20):
            keeper.now.update([replace(record, requests=i)])

    threads = [threading.Thread(target=work, args=(record,)) for record in added]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.requests for record in keeper.reopen().load()] == [19] * 4


# -- SQLite alone: catalogs of older versions

VERSION_1 = """
CREATE TABLE images (
    inode           INTEGER PRIMARY KEY AUTOINCREMENT,
    export          TEXT NOT NULL,
    path            TEXT NOT NULL,
    size            INTEGER,
    identity        TEXT NOT NULL,
    format          TEXT NOT NULL,
    state           TEXT NOT NULL,
    error           TEXT NOT NULL,
    block_size      INTEGER NOT NULL,
    created_ns      INTEGER NOT NULL,
    present_bytes   INTEGER NOT NULL,
    demand_bytes    INTEGER NOT NULL,
    populated_bytes INTEGER NOT NULL,
    requests        INTEGER NOT NULL
);
INSERT INTO sqlite_sequence VALUES ('images', 41);
INSERT INTO images VALUES (7, 'debian-12', 'debian-12', 1048576, 'v1', 'raw', 'whole', '', 65536, 12, 900, 1, 2, 3);
INSERT INTO images VALUES (9, 'ubuntu', 'ubuntu.qcow2', NULL, '', 'qcow2', 'remote', '', 65536, 13, 0, 0, 0, 0);
PRAGMA user_version = 1;
"""


@pytest.fixture
def version_1(tmp_path: Path) -> str:
    path = str(tmp_path / "catalog.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    return path


def test_a_catalog_of_version_1_is_brought_up_to_date(version_1: str) -> None:
    for _ in range(2):  # and once is enough
        with closing(SqliteCatalog(version_1)) as catalog:
            one, two = catalog.load()
            assert one == ImageRecord(7, "debian-12", "debian-12", 1 << 20, "v1", "raw", State.WHOLE, "", 65536, 12,
                                      900, 1, 2, 3, last_used_ns=0, pinned=False, digest="", meant=True)  # fmt: skip
            assert (two.inode, two.size, two.format, two.digest) == (9, None, "qcow2", "")
    with closing(SqliteCatalog(version_1)) as catalog:
        catalog.update([replace(one, pinned=True, last_used_ns=8, digest="sha256:12")])
        (added,) = catalog.add([BLANK])
        assert added.inode == 42, "no number is given twice"
    with closing(SqliteCatalog(version_1)) as catalog:
        assert catalog.load()[0] == replace(one, pinned=True, last_used_ns=8, digest="sha256:12")


@pytest.mark.parametrize(
    ("state", "error", "cause"),
    [
        ("partial", "", Cause.NONE),
        ("failed", "changed in the repository (was 1 bytes, now 2 bytes)", Cause.EXPORT_CHANGED),
        ("whole", "changed in the repository (was 'a', now 'b')", Cause.EXPORT_CHANGED),
        ("failed", "its bytes do not have the digest sha256:1: evict it", Cause.WRONG_DIGEST),
        ("failed", "its plain file was changed by hand; remove that", Cause.CHANGED_BY_HAND),
        (
            "partial",
            "cannot put the whole image at a: a file is where its folder belongs",
            Cause.OTHER,
        ),
    ],
)
def test_texts_of_older_versions_become_causes(
    version_1: str, state: str, error: str, cause: Cause
) -> None:
    with closing(sqlite3.connect(version_1)) as db, db:
        db.execute("UPDATE images SET state = ?, error = ? WHERE inode = 7", (state, error))
    salvaged = catalog_module.salvage(version_1)[0]
    with closing(SqliteCatalog(version_1)) as catalog:
        for record in (salvaged, catalog.load()[0]):
            assert (record.state.value, record.error, record.cause) == (state, error, cause)


def test_it_then_has_the_schema_of_a_new_one(version_1: str, tmp_path: Path) -> None:
    new = str(tmp_path / "new.sqlite")
    described = []
    for path in (version_1, new):
        SqliteCatalog(path).close()
        with closing(sqlite3.connect(path)) as db:
            columns = db.execute(
                "SELECT name, type, [notnull], dflt_value, pk FROM pragma_table_info('images')"
            )
            described.append((columns.fetchall(), db.execute("PRAGMA user_version").fetchone()))
    assert described[0] == described[1]


def test_an_upgrade_that_is_cut_off_is_repeated(
    version_1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = catalog_module._UPGRADES | {
        1: catalog_module._UPGRADES[1].strip() + "\nALTER TABLE nothing ADD COLUMN x INTEGER"
    }
    with monkeypatch.context() as patch:
        patch.setattr(catalog_module, "_UPGRADES", broken)
        with pytest.raises(OSError, match="nothing"):
            SqliteCatalog(version_1)
    with closing(SqliteCatalog(version_1)) as catalog:
        assert [record.inode for record in catalog.load()] == [7, 9]


def test_a_catalog_of_a_newer_lazyfs_is_refused_and_left_alone(version_1: str) -> None:
    with closing(sqlite3.connect(version_1)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(errors.CacheCorrupt, match="update lazyfs"):
        SqliteCatalog(version_1)
    with closing(sqlite3.connect(version_1)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)
        assert len(db.execute("SELECT * FROM images").fetchone()) == 14


class _BrokenDatabase:
    """Whose disk fails at the end of each transaction, also when it is undone."""

    in_transaction = True

    def execute(self, statement: str) -> None:
        if statement != "BEGIN IMMEDIATE":
            raise sqlite3.OperationalError(f"disk I/O error: {statement}")


def test_a_transaction_that_cannot_even_be_undone_lets_the_next_one_begin() -> None:
    lock = threading.Lock()
    for _ in range(2):
        with (
            pytest.raises((OSError, sqlite3.Error)),
            catalog_module._Transaction(_BrokenDatabase(), lock),  # type: ignore[arg-type]
        ):
            pass
        assert not lock.locked()


def test_settings_of_the_whole_cache(keeper: Keeper) -> None:
    assert keeper.now.setting("paused") == ""
    keeper.now.set_setting("paused", "yes")
    keeper.now.set_setting("other", "x")
    assert keeper.reopen().setting("paused") == "yes"
    keeper.now.set_setting("paused", "")
    assert keeper.reopen().setting("paused") == ""
    assert keeper.now.setting("other") == "x"
