"""`lazyfs check` with real caches, damaged as disks, crashes and people damage them."""

import errno
import hashlib
import json
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import servers
from fakes import pattern

from lazyfs import errors
from lazyfs.cache import cache_check, cache_dir
from lazyfs.cache.cache_dir import CacheDir
from lazyfs.cache.check_report import Report
from lazyfs.core import map_file, qcow2_layout
from lazyfs.core.block_map import DATA, BlockRun
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import CHANGED_BY_HAND, State
from lazyfs.engine.image import partial_cache
from lazyfs.engine.interfaces import UNKNOWN, FileAttributes
from lazyfs.units import KiB

BLOCK = 4 * KiB
SIZE = 24 * BLOCK + 1000
BLOCKS = 25
LOOK = FileAttributes(0o444, os.geteuid(), os.getegid())
CONTENT = pattern(SIZE)
AT = qcow2_layout.layout(SIZE, BLOCK)


class Cache:
    """Plays a cache directory that one daemon after another uses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / ".lazyfs/partial"
        self.catalog = folder / ".lazyfs/catalog.sqlite"

    @contextmanager
    def open(self) -> Iterator[CacheDir]:
        cache = CacheDir(str(self.folder), "/mnt/somewhere", "nbd://example.com", LOOK)
        try:
            yield cache
        finally:
            cache.close()

    def image(
        self, name: str, image_format: str, filled: int, *, finish: bool = False, told: bool = False
    ) -> ImageRecord:
        """Leave an image of which the first `filled` blocks are present.

        With `finish` it is linked to its path, and with `told` the catalog says that it is whole.
        """
        path = f"team/{name}" + (".qcow2" if image_format == "qcow2" else "")
        with self.open() as opened:
            new = ImageRecord(
                0, name, path, SIZE, "v1", image_format, State.PARTIAL, "", BLOCK, created_ns=10**18
            )
            (record,) = opened.catalog.add([new])
            store = opened.partial(record)
            blocks = store.load()
            if filled:
                run = BlockRun(0, filled)
                blocks.claim(run)
                span = blocks.bytes_of(run)
                store.write(span.start, memoryview(CONTENT)[span.start : span.end])
                blocks.mark_present(run, span.length)
            store.checkpoint(blocks.take_dirty(), blocks.mixed_zero_bytes)
            if finish:
                store.finish()
            if told:
                record = replace(record, state=State.WHOLE, present_bytes=SIZE)
                opened.catalog.update([record])
                store.remove()
            store.close()
        return record

    def sql(self, *statements: str) -> None:
        db = sqlite3.connect(self.catalog)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    def check(self, repair: bool = False) -> Report:
        return cache_check.run(str(self.folder), repair)

    def tree(self) -> dict[str, object]:
        """Return every file and its content."""
        found: dict[str, object] = {}
        for path in [self.folder, *sorted(self.folder.rglob("*"))]:
            s = path.lstat()
            content = (
                hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(s.st_mode) else ""
            )
            found[str(path)] = (
                s.st_mode,
                s.st_ino,
                s.st_size,
                s.st_blocks,
                s.st_mtime_ns,
                s.st_ctime_ns,
                content,
            )
        return found

    def states(self) -> dict[str, State]:
        with self.open() as opened:
            return {record.export: record.state for record in opened.records}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def lines(report: Report) -> str:
    return "\n".join(finding.line() for finding in report.findings)


# -- nothing wrong


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_cache_with_nothing_wrong_is_left_as_it_is(cache: Cache, image_format: str) -> None:
    cache.image("begun", image_format, 0)
    cache.image("partial", image_format, 9)
    cache.image("complete", image_format, BLOCKS)
    cache.image("whole", image_format, BLOCKS, finish=True, told=True)
    (cache.folder / "lost+found").mkdir()
    before = cache.tree()
    report = cache.check()
    assert (report.findings, report.problems, report.images) == ([], 0, 4)
    assert cache.tree() == before
    assert cache.check(repair=True).findings == []
    assert cache.states() == {
        "begun": State.PARTIAL, "partial": State.PARTIAL, "complete": State.PARTIAL, "whole": State.WHOLE,
    }  # fmt: skip


def test_an_empty_cache(cache: Cache) -> None:
    with cache.open():
        pass
    assert cache.check().findings == []


def test_what_a_killed_daemon_had_not_moved_from_the_journal_is_seen_and_stays_there(
    cache: Cache,
) -> None:
    cache.image("partial", "raw", 9)
    killed = Cache(cache.folder.with_name("killed"))
    with cache.open() as opened:
        opened.catalog.add(
            [replace(opened.records[0], export="new", path="new", state=State.REMOTE)]
        )
        subprocess.run(["cp", "-a", cache.folder, killed.folder], check=True)
    assert (killed.folder / ".lazyfs/catalog.sqlite-wal").stat().st_size
    before = killed.tree()
    report = killed.check()
    assert (report.findings, report.images) == ([], 2)
    assert killed.tree() == before


# -- what is repaired


def remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


@dataclass(frozen=True)
class Damage:
    image_format: str
    filled: int
    apply: Callable[[Cache], object]
    path: str
    says: str
    state: State | None
    """The image's state afterwards, or None if its row is gone."""
    finish: bool = False
    told: bool = False
    kept: int = -1
    """The number of blocks that are present afterwards, for a partial image."""


def _l1(value: bytes) -> Callable[[Cache], object]:
    return lambda cache: overwrite(cache.partial / "2.qcow2", AT.l1_offset, value)


DAMAGES = {
    "the data is cut short": Damage("raw", 9, lambda c: os.truncate(c.partial / "2.raw", 100), "2.raw", "has 100 bytes", State.REMOTE),
    "the data is gone": Damage("raw", 9, lambda c: (c.partial / "2.raw").unlink(), "2.raw", "2.raw is missing", State.REMOTE),
    "the map is gone": Damage("raw", 9, lambda c: (c.partial / "2.map").unlink(), "2.raw", "2.map is missing", State.REMOTE),
    "the map is empty": Damage("raw", 9, lambda c: os.truncate(c.partial / "2.map", 0), "2.raw", "the map is missing", State.REMOTE),
    "the map is cut short": Damage("raw", 9, lambda c: os.truncate(c.partial / "2.map", map_file.STATES_OFFSET), "2.raw", "cut short", State.REMOTE),
    "the map is damaged": Damage("raw", 9, lambda c: overwrite(c.partial / "2.map", 40, b"\xff"), "2.raw", "header is damaged", State.REMOTE),
    "the map is another image's": Damage("raw", 9, lambda c: overwrite(c.partial / "2.map", 0, map_file.MapHeader(99, SIZE, BLOCK, "x", "").encode()), "2.raw", "another image", State.REMOTE),
    "all is gone": Damage("raw", 9, lambda c: remove(*c.partial.iterdir()), "team/disk", "nothing of it is here", State.REMOTE),
    "qcow2: no header": Damage("qcow2", 9, lambda c: overwrite(c.partial / "2.qcow2", 0, bytes(512)), "2.qcow2", "not the header", State.REMOTE),
    "qcow2: cut short": Damage("qcow2", 9, lambda c: os.truncate(c.partial / "2.qcow2", AT.file_size - 1), "2.qcow2", f"has {AT.file_size - 1} bytes", State.REMOTE),
    "qcow2: a wild L2 entry": Damage("qcow2", 9, lambda c: overwrite(c.partial / "2.qcow2", AT.l2_offset, b"\x80" + bytes(6) + b"\x42"), "2.qcow2", "L2 entry", State.REMOTE),
    "qcow2: a leak": Damage("qcow2", 9, lambda c: overwrite(c.partial / "2.qcow2", AT.refcount_blocks_offset + 2 * (AT.metadata_clusters + 20), b"\0\1\0\1"), "2.qcow2", "2 refcounts are not", State.PARTIAL, kept=9),
    "qcow2: L1": Damage("qcow2", 9, _l1(b"\xee" * 8), "2.qcow2", "the L1 table is damaged", State.PARTIAL, kept=9),
    "qcow2: the refcount table": Damage("qcow2", 9, lambda c: overwrite(c.partial / "2.qcow2", AT.refcount_table_offset, bytes(8)), "2.qcow2", "the refcount table is damaged", State.PARTIAL, kept=9),
    "qcow2: refcounts of metadata": Damage("qcow2", 9, lambda c: overwrite(c.partial / "2.qcow2", AT.refcount_blocks_offset, b"\0\7"), "2.qcow2", "refcounts of the metadata", State.PARTIAL, kept=9),
    "hand-off interrupted": Damage("raw", BLOCKS, lambda c: None, "team/disk", "hand-off was interrupted", State.WHOLE, finish=True),
    "qcow2: hand-off interrupted": Damage("qcow2", BLOCKS, lambda c: None, "team/disk.qcow2", "hand-off was interrupted", State.WHOLE, finish=True),
    "linked, and a block lost": Damage("raw", BLOCKS, lambda c: overwrite(c.partial / "2.map", map_file.STATES_OFFSET + 3, b"\0"), "team/disk", "not whole", State.PARTIAL, finish=True, kept=BLOCKS - 1),
    "linked, and the map lost": Damage("raw", BLOCKS, lambda c: (c.partial / "2.map").unlink(), "2.raw", "2.map is missing", State.REMOTE, finish=True),
    "left over from the hand-off": Damage("raw", BLOCKS, lambda c: os.link(c.folder / "team/disk", c.partial / "2.raw"), "2.raw", "left over from the hand-off", State.WHOLE, finish=True, told=True),
    "the plain file is gone": Damage("raw", BLOCKS, lambda c: (c.folder / "team/disk").unlink(), "team/disk", "its plain file is gone", State.REMOTE, finish=True, told=True),
    "the folder is gone": Damage("raw", BLOCKS, lambda c: remove(c.folder / "team/disk", c.folder / "team"), "team/disk", "its plain file is gone", State.REMOTE, finish=True, told=True),
    "marked as changed, and restored": Damage("raw", BLOCKS, lambda c: c.sql(f"UPDATE images SET state = 'failed', error = '{CHANGED_BY_HAND}', cause = 'changed-by-hand'"), "team/disk", "and it is not", State.WHOLE, finish=True, told=True),
    "an orphan": Damage("raw", 9, lambda c: (c.partial / "77.raw").write_bytes(b"x"), "77.raw", "no image needs it", State.PARTIAL, kept=9),
    "an orphan symlink": Damage("raw", 9, lambda c: (c.partial / "77.raw").symlink_to("/etc/passwd"), "77.raw", "no image needs it", State.PARTIAL, kept=9),
    "another format's file": Damage("raw", 9, lambda c: (c.partial / "2.qcow2.new").write_bytes(b"x"), "2.qcow2.new", "no image needs it", State.PARTIAL, kept=9),
    "a mode": Damage("raw", 9, lambda c: (c.folder / ".lazyfs").chmod(0o755), ".lazyfs", "its mode is 0755", State.PARTIAL, kept=9),
    "the partial folder's mode": Damage("raw", 9, lambda c: c.partial.chmod(0o777), ".lazyfs/partial", "its mode is 0777", State.PARTIAL, kept=9),
    "no size in the catalog": Damage("raw", 9, lambda c: c.sql("UPDATE images SET size = NULL"), "team/disk", "its size is None", State.REMOTE),
    "a wild state": Damage("raw", 9, lambda c: c.sql("UPDATE images SET state = 'best'"), "catalog.sqlite", "row 2 is damaged", None),
    "a wild size": Damage("raw", 9, lambda c: c.sql("UPDATE images SET size = 'big'"), "catalog.sqlite", "size is 'big'", None),
    "a path that leads out": Damage("raw", 9, lambda c: c.sql("UPDATE images SET path = '../../etc/passwd'"), "catalog.sqlite", "path is", None),
    "a path into our state": Damage("raw", 9, lambda c: c.sql("UPDATE images SET path = '.lazyfs/lock'"), "catalog.sqlite", "path is", None),
    "a blob": Damage("raw", 9, lambda c: c.sql("UPDATE images SET export = CAST(x'ff00fe' AS BLOB)"), "catalog.sqlite", "export is", None),
    "text that is none": Damage("raw", 9, lambda c: c.sql("UPDATE images SET export = CAST(x'fffe' AS TEXT)"), "catalog.sqlite", "row 2 is damaged", None),
    "a wild format": Damage("raw", 9, lambda c: c.sql("UPDATE images SET format = 'vmdk'"), "catalog.sqlite", "vmdk", None),
    "no catalog": Damage("raw", 9, lambda c: c.catalog.unlink(), "catalog.sqlite", "missing", None),
    "no database": Damage("raw", 9, lambda c: c.catalog.write_bytes(b"not a database" * 100), "catalog.sqlite", "not a database", None),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_repaired(cache: Cache, name: str) -> None:
    damage = DAMAGES[name]
    record = cache.image(
        "disk", damage.image_format, damage.filled, finish=damage.finish, told=damage.told
    )
    assert record.inode == 2
    damage.apply(cache)
    before = cache.tree()
    found = cache.check()
    assert cache.tree() == before, "a check alone changes nothing"
    assert found.problems >= 1
    (finding,) = [
        f for f in found.findings if f.path.endswith(damage.path) and damage.says in f.problem
    ]
    assert finding.repairable
    assert not finding.repaired
    assert "would be" in finding.line()
    assert found.problems == sum(not f.warning for f in found.findings)

    repaired = cache.check(repair=True)
    assert repaired.problems == 0, lines(repaired)
    assert [f for f in repaired.findings if f.path == finding.path and f.repaired]
    left = [
        f for f in repaired.findings if f.path.startswith(".lazyfs/partial/") and not f.repaired
    ]
    assert bool(left) == (name in ("no catalog", "no database")), (
        "on the word of a new catalog nothing is swept at once"
    )
    assert [f.path for f in cache.check().findings] == [f.path for f in left]

    states = cache.states()  # a daemon would start
    assert states == ({} if damage.state is None else {"disk": damage.state})
    plain = cache.folder / record.path
    assert plain.exists() == (damage.state is State.WHOLE)
    if damage.state is State.WHOLE and damage.image_format == "raw":
        assert plain.read_bytes() == CONTENT
    if damage.state is State.WHOLE:
        assert (plain.stat().st_mode & 0o777, plain.stat().st_nlink) == (0o444, 1)
    if damage.state is State.PARTIAL:
        with cache.open() as opened:
            store = opened.partial(opened.records[0])
            blocks = store.load()
            assert [blocks.state(i) for i in range(BLOCKS)].count(DATA) == damage.kept
            first = BLOCK if damage.kept == 9 else 2 * BLOCK
            assert store.read(0, first) == CONTENT[:first]
            store.close()
    else:
        assert os.listdir(cache.partial) == []


@pytest.mark.parametrize(
    "name",
    ["qcow2: a leak", "qcow2: L1", "qcow2: the refcount table", "qcow2: refcounts of metadata"],
)
def test_qemu_agrees_about_a_mended_qcow2(cache: Cache, name: str) -> None:
    servers.requires("qemu-img")
    cache.image("disk", "qcow2", 9)
    file = {"driver": "file", "filename": str(cache.partial / "2.qcow2"), "locking": "off"}
    command = [
        "qemu-img",
        "check",
        "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file}),
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    DAMAGES[name].apply(cache)
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
    assert cache.check(repair=True).problems == 0
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_whole_image_outlives_a_damaged_page_of_the_catalog(cache: Cache) -> None:
    cache.image("whole", "raw", BLOCKS, finish=True, told=True)
    with cache.open() as opened:
        opened.catalog.add(
            [
                ImageRecord(
                    0, f"e{i}" * 30, f"e{i}" * 30, None, "", "raw", State.REMOTE, "", BLOCK, 1
                )
                for i in range(500)
            ]
        )
    pages = cache.catalog.stat().st_size // 4096
    assert pages > 10
    overwrite(cache.catalog, (pages - 3) * 4096, b"\xee" * 4096)
    with pytest.raises(errors.UserError, match="damaged"), cache.open():
        pass
    before = cache.tree()
    found = cache.check()
    assert cache.tree() == before
    assert any("kept aside and made anew" in f.remedy for f in found.findings)
    assert cache.check(repair=True).problems == 0
    states = cache.states()
    assert states["whole"] is State.WHOLE
    assert len(states) > 100
    assert (cache.folder / ".lazyfs/catalog.sqlite.damaged").exists()
    with cache.open() as opened:
        assert len({record.inode for record in opened.records}) == len(opened.records)


def test_a_whole_image_whose_row_is_lost_is_taken_in(cache: Cache) -> None:
    cache.image("disk", "raw", BLOCKS, finish=True, told=True)
    (cache.folder / "notes").write_text("mine")  # it can be written to, so it is a stranger's
    cache.catalog.write_bytes(b"garbage" * 1000)
    report = cache.check(repair=True)
    assert report.problems == 1
    assert "team/disk: the catalog does not know it; taken in as a whole image" in lines(report)
    assert "notes: lazyfs did not put it there; left alone" in lines(report)
    assert (cache.folder / "team/disk").read_bytes() == CONTENT
    (cache.folder / "notes").unlink()
    assert cache.check().findings == []
    with cache.open() as opened:
        (record,) = opened.records
        assert (record.export, record.state, record.size) == ("team/disk", State.WHOLE, SIZE)
        whole = opened.whole(record)
        assert whole.read(0, SIZE) == CONTENT
        whole.close()


def test_whole_images_are_taken_in_after_a_mount_has_failed_on_a_lost_catalog(
    cache: Cache,
) -> None:
    """The mount refuses, and leaves an empty catalog behind."""
    cache.image("disk", "raw", BLOCKS, finish=True, told=True)
    cache.catalog.unlink()
    with pytest.raises(errors.UserError, match="lazyfs check --repair"), cache.open():
        pass
    found = [finding.remedy for finding in cache.check().findings]
    assert "taken in as a whole image" in found
    assert cache.check(repair=True).problems == 0
    with cache.open() as opened:
        (record,) = opened.records
        assert (record.export, record.state, record.identity) == ("team/disk", State.WHOLE, UNKNOWN)


def test_a_mount_that_fails_otherwise_leaves_no_empty_catalog_either(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.image("disk", "raw", BLOCKS, finish=True, told=True)
    cache.catalog.unlink()

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(cache_dir, "foreign_files", fails)
        with pytest.raises((OSError, errors.UserError)), cache.open():
            pass
    assert not cache.catalog.exists()
    assert "taken in as a whole image" in [f.remedy for f in cache.check().findings]


def test_a_stranger_is_not_taken_in_while_the_catalog_is_good(cache: Cache) -> None:
    cache.image("disk", "raw", 9)
    stranger = cache.folder / "stranger"
    stranger.write_text("mine")
    stranger.chmod(0o444)
    assert "stranger: lazyfs did not put it there; left alone" in lines(cache.check(repair=True))


def test_of_two_rows_for_one_image_the_whole_one_stays(cache: Cache) -> None:
    cache.image("a", "raw", 9)
    cache.image("b", "raw", BLOCKS, finish=True, told=True)
    cache.image("c", "raw", 9)
    cache.sql(
        "UPDATE images SET path = 'team/b' WHERE export = 'a'",
        "UPDATE images SET export = 'b' WHERE export = 'c'",
    )
    report = cache.check()
    assert len([f for f in report.findings if "is another one for" in f.problem]) == 2
    assert cache.check(repair=True).problems == 0
    assert cache.states() == {"b": State.WHOLE}
    assert (cache.folder / "team/b").read_bytes() == CONTENT


# -- what is left alone

STRANGE: dict[str, Callable[[Path], object]] = {
    "too short": lambda path: path.write_bytes(CONTENT[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a symlink": lambda path: path.symlink_to("/etc/passwd"),
    "a folder": lambda path: path.mkdir(),
    "a fifo": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_whole_image_of_another_size_or_kind_is_left_alone(cache: Cache, what: str) -> None:
    cache.image("disk", "raw", BLOCKS, finish=True, told=True)
    plain = cache.folder / "team/disk"
    plain.unlink()
    STRANGE[what](plain)
    before = cache.tree()
    assert cache.check().problems == 1
    assert cache.tree() == before
    for _ in range(2):
        report = cache.check(repair=True)
        assert report.problems == 1
        assert "remove it to have it fetched again" in lines(report)
        assert os.path.lexists(plain)
    plain.rmdir() if what == "a folder" else plain.unlink()
    assert cache.check(repair=True).problems == 0
    assert cache.states() == {"disk": State.REMOTE}


def test_an_evicted_file_that_a_power_cut_brought_back_is_removed(cache: Cache) -> None:
    record = cache.image("back", "raw", BLOCKS, finish=True, told=True)
    plain, kept = cache.folder / record.path, cache.folder.parent / "kept"
    kept.hardlink_to(plain)
    with cache.open() as opened:
        partial_cache.remove(
            opened, record, lambda: opened.catalog.replace(record.inode, record.successor(1))
        )
        kept.rename(plain)
    report = cache.check()
    assert "a power cut has brought it back; would be removed" in lines(report)
    assert plain.exists()
    assert "a power cut has brought it back; removed" in lines(cache.check(repair=True))
    assert not plain.exists()
    assert not cache.check().findings


@pytest.mark.parametrize(
    "path", ["stray", "team/stray", "team/disk", "a/b/c", ".lazyfs/partial/folder/x"]
)
def test_foreign_files_are_named_and_left_alone(cache: Cache, path: str) -> None:
    cache.image("disk", "raw", 9)
    foreign = cache.folder / path
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("mine")
    report = cache.check(repair=True)
    assert report.problems == 1
    assert "lazyfs did not put it there" in lines(report)
    assert foreign.read_text() == "mine"


def test_data_that_lies_in_holes_is_a_warning(cache: Cache) -> None:
    for image_format, offset in (("raw", 0), ("qcow2", AT.data_offset)):
        record = cache.image(image_format, image_format, BLOCKS)
        name = cache.partial / f"{record.inode}.{image_format}"
        for first, count in ((3, 4), (9, 1), (BLOCKS - 1, 1)):
            subprocess.run(["fallocate", "--punch-hole", "--offset", str(offset + first * BLOCK), "--length", str(count * BLOCK), name], check=True)  # fmt: skip
    report = cache.check()
    assert [(f.warning, f.problem.split(";")[0]) for f in report.findings] == [
        (True, "6 blocks are marked as data but are holes in the file")
    ] * 2
    assert report.problems == 0


# -- who may


def test_refused_while_somebody_has_the_cache(cache: Cache) -> None:
    for repair in (False, True):
        with cache.open(), pytest.raises(errors.UserError) as refusal:
            cache.check(repair)
        assert f"in use by the lazyfs on /mnt/somewhere (pid {os.getpid()})" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert cache.check().findings == []


def test_what_is_no_cache_or_a_newer_one_is_refused_and_not_touched(
    cache: Cache, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for path, says in (
        (tmp_path / "absent", "No such file"),
        (tmp_path / "folder", "no cache of lazyfs"),
    ):
        with pytest.raises(errors.UserError, match=says):
            cache_check.run(str(path), repair=True)
    assert os.listdir(tmp_path / "folder") == []
    cache.image("disk", "raw", 9)
    cache.sql("PRAGMA user_version = 99")
    for repair in (False, True):
        before = cache.catalog.read_bytes()
        with pytest.raises(errors.UserError, match="update lazyfs"):
            cache.check(repair)
        assert cache.catalog.read_bytes() == before


def test_no_room_for_the_copy_of_the_catalog_is_no_damage_of_the_catalog(cache: Cache) -> None:
    cache.image("disk", "raw", 9)
    before = cache.catalog.read_bytes()
    command = [sys.executable, "-m", "lazyfs", "check", str(cache.folder), "--repair"]
    size = len(before) // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    # Not measured: coverage's file would be too large, too.
    environment = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limit,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"lazyfs: cannot check {cache.folder}: ")
    assert cache.catalog.read_bytes() == before
    assert not list(cache.folder.glob(".lazyfs/*damaged*"))


def test_a_repair_that_fails_is_said(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.image("disk", "raw", 9)
    os.truncate(cache.partial / "2.raw", 100)
    (cache.partial / "77.raw").touch()

    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("lazyfs.cache.catalog.SqliteCatalog.update", fail)
        report = cache.check(repair=True)
    assert report.problems == 1
    assert "could not be discarded, to be fetched again: [Errno 5] Input/output error" in lines(
        report
    )
    assert not (cache.partial / "77.raw").exists(), "one that fails does not stop the others"
    assert cache.check(repair=True).problems == 0


# -- the command


def test_the_command(cache: Cache) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "lazyfs", "check", str(cache.folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    cache.image("disk", "raw", 9)
    clean = run()
    assert (clean.returncode, clean.stdout) == (0, f"{cache.folder}: 1 images, no problems\n")
    (cache.partial / "77.raw").touch()
    dirty = run()
    assert (dirty.returncode, dirty.stderr) == (1, "")
    assert dirty.stdout == (
        f".lazyfs/partial/77.raw: no image needs it; would be removed\n{cache.folder}: 1 images, 1 problems\n"
    )
    as_json = run("--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout) == {
        "cache_dir": str(cache.folder), "images": 1, "findings": [{
            "path": ".lazyfs/partial/77.raw", "problem": "no image needs it", "remedy": "removed", "repairable": True,
            "repaired": False, "warning": False, "error": "",
        }],
    }  # fmt: skip
    repaired = run("--repair")
    assert repaired.returncode == 0
    assert "no image needs it; removed\n" in repaired.stdout
    assert "1 repaired, no problems" in repaired.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "lazyfs", "check", "/proc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
