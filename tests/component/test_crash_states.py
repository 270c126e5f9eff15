"""What a crash, a power cut or a stranger can leave in the cache directory, and what follows
then."""

import errno
import os
import random
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from crash_lab import Event, Recorder, present_in, states_after_power_cut
from fakes import FakePresentReader, FakeRepository, pattern

from lazyfs import errors
from lazyfs.cache import cache_dir
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.cache_dir import CacheDir
from lazyfs.cache.store.raw import RawStore
from lazyfs.core import map_file
from lazyfs.core.block_map import DATA, MISSING, ZERO, BlockMap, BlockRun
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.engine.filesystem import Filesystem, Options
from lazyfs.engine.image import partial_cache
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.units import KiB

BLOCK = 4 * KiB
SIZE = 24 * BLOCK + 1000
BLOCKS = 25
LOOK = FileAttributes(0o444, os.geteuid(), os.getegid())
NEW = ImageRecord(
    0, "disk", "team/disk", SIZE, "v1", "raw", State.PARTIAL, "", BLOCK, created_ns=10**18
)
CONTENT = pattern(SIZE)


class Cache:
    """Plays a cache directory that one daemon after another opens and closes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / ".lazyfs" / "partial"

    @contextmanager
    def open(self) -> Iterator[CacheDir]:
        cache = CacheDir(str(self.folder), "/mnt/somewhere", "nbd://example.com", LOOK)
        try:
            yield cache
        finally:
            cache.close()

    def add(self, *records: ImageRecord) -> list[ImageRecord]:
        with self.open() as cache:
            return cache.catalog.add(records)

    def refused(self) -> str:
        """Return why the cache directory cannot be opened."""
        with pytest.raises(errors.UserError) as refusal:
            CacheDir(str(self.folder), "/mnt/somewhere", "nbd://example.com", LOOK)
        assert str(refusal.value).count("\n") == 0
        return str(refusal.value)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def store_of(cache: CacheDir, record: ImageRecord) -> RawStore:
    store = cache.partial(record)
    assert isinstance(store, RawStore)
    return store


def fill(store: RawStore, blocks: BlockMap, first: int, end: int) -> None:
    """Write blocks and mark them in the map, as a fetch does."""
    run = BlockRun(first, end)
    blocks.claim(run)
    span = blocks.bytes_of(run)
    store.write(span.start, memoryview(CONTENT)[span.start : span.end])
    blocks.mark_present(run, span.length)


def partial_image(cache: Cache, *runs: tuple[int, int]) -> ImageRecord:
    """Leave an image with some blocks present and checkpointed."""
    (record,) = cache.add(NEW)
    with cache.open() as opened:
        store = store_of(opened, record)
        blocks = store.load()
        for first, end in runs:
            fill(store, blocks, first, end)
        store.checkpoint(blocks.take_dirty(), blocks.mixed_zero_bytes)
        store.close()
    return record


def whole_image(cache: Cache) -> ImageRecord:
    """Leave an image that is whole, also according to the catalog."""
    record = partial_image(cache, (0, BLOCKS))
    with cache.open() as opened:
        store = store_of(opened, record)
        store.load()
        store.finish()
        record = replace(record, state=State.WHOLE, present_bytes=SIZE)
        opened.catalog.update([record])
        store.remove()
        store.close()
    return record


def check_blocks(store: RawStore, blocks: BlockMap) -> None:
    """Check that every block which the map calls present has the right bytes."""
    for run, state in blocks.runs():
        span = blocks.bytes_of(run)
        if state == DATA:
            assert store.read(span.start, span.length) == CONTENT[span.start : span.end], (
                f"wrong bytes in {run}"
            )
        elif state == ZERO:
            assert store.read(span.start, span.length) == bytes(span.length), f"no zeroes in {run}"


def present(blocks: BlockMap) -> set[int]:
    return {block for block in range(blocks.blocks) if blocks.state(block) != MISSING}


# -- the handoff, interrupted


def test_crash_after_the_link_and_before_the_catalog(cache: Cache) -> None:
    record = partial_image(cache, (0, BLOCKS))
    with cache.open() as opened:
        store = store_of(opened, record)
        store.load()
        store.finish()
        store.close()
    with cache.open() as opened:
        assert opened.records == [record]
        store = store_of(opened, record)
        blocks = store.load()
        assert blocks.complete
        check_blocks(store, blocks)
        store.finish()  # again, as the next daemon does
        store.remove()
        store.close()
    plain = cache.folder / "team" / "disk"
    assert plain.read_bytes() == CONTENT
    found = plain.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_nlink, found.st_mtime_ns) == (0o444, 1, 10**18)
    assert os.listdir(cache.partial) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_without_roots_powers_can_open_what_is_read_only_already(cache: Cache) -> None:
    """The file has its final mode, 0444, before the catalog knows that the image is whole."""
    record = partial_image(cache, (0, BLOCKS))
    nobody = 65534
    for path in [cache.folder, *cache.folder.rglob("*")]:
        os.chown(path, nobody, nobody)
    root_fd = os.open(cache.folder, os.O_RDONLY)
    os.seteuid(nobody)
    try:
        for _ in range(2):
            store = RawStore(Beneath(root_fd), record, FileAttributes(0o444, nobody, os.getegid()))
            assert store.load().complete
            store.finish()
            store.close()
    finally:
        os.seteuid(0)
        os.close(root_fd)
    assert stat.S_IMODE((cache.folder / "team" / "disk").stat().st_mode) == 0o444


def test_crash_after_the_catalog_and_before_the_partial_files_are_gone(cache: Cache) -> None:
    record = partial_image(cache, (0, BLOCKS))
    with cache.open() as opened:
        store = store_of(opened, record)
        store.load()
        store.finish()
        opened.catalog.update([replace(record, state=State.WHOLE)])
        store.close()
    assert sorted(os.listdir(cache.partial)) == [f"{record.inode}.map", f"{record.inode}.raw"]
    with cache.open() as opened:
        whole = opened.whole(opened.records[0])
        assert whole.read(0, SIZE) == CONTENT
        whole.close()
    assert os.listdir(cache.partial) == []
    assert (cache.folder / "team" / "disk").stat().st_nlink == 1


def test_a_file_in_the_way_of_the_handoff_is_kept(cache: Cache) -> None:
    record = partial_image(cache, (0, BLOCKS))
    with cache.open() as opened:
        store = store_of(opened, record)
        store.load()
        (cache.folder / "team").mkdir()
        foreign = cache.folder / "team" / "disk"
        foreign.write_text("mine")
        with pytest.raises(
            errors.UserError, match="team/disk: a file that lazyfs did not put there"
        ):
            store.finish()
        assert foreign.read_text() == "mine"
        foreign.unlink()
        store.finish()
        store.close()
    assert foreign.read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["team/disk", "team/of/disk", "a/b/c/disk"])
def test_a_file_where_a_folder_belongs_is_kept(cache: Cache, path: str) -> None:
    record = partial_image(cache, (0, BLOCKS))
    with cache.open() as opened:
        store = store_of(opened, replace(record, path=path))
        store.load()
        foreign = cache.folder / path.partition("/")[0]
        foreign.write_text("mine")
        with pytest.raises(errors.UserError, match="a file is where its folder belongs"):
            store.finish()
        assert foreign.read_text() == "mine"
        store.close()


# -- partial images, damaged


@dataclass
class Files:
    data: Path
    map: Path


Damage = Callable[[Files], object]


def _change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


DISCARDED: dict[str, Damage] = {
    "the data file is missing": lambda files: files.data.unlink(),
    "the data file is cut short": lambda files: os.truncate(files.data, SIZE // 2),
    "the data file is empty": lambda files: os.truncate(files.data, 0),
    "the data file is too long": lambda files: os.truncate(files.data, SIZE + 1),
    "the map is missing": lambda files: files.map.unlink(),
    "the map is empty": lambda files: os.truncate(files.map, 0),
    "the map's header is cut short": lambda files: os.truncate(files.map, 30),
    "the map's states are cut short": lambda files: os.truncate(files.map, map_file.STATES_OFFSET + 5),
    "the map's header is damaged": lambda files: _change(files.map, 40, b"\xff"),
    "the map is all zeroes": lambda files: files.map.write_bytes(bytes(files.map.stat().st_size)),
    "the map is of a newer version": lambda files: _change(files.map, 8, b"\x02"),
    "the map is of another inode": lambda files: _change(files.map, 0, map_file.MapHeader(99, SIZE, BLOCK, "disk", "v1").encode()),
    "the map is of another version": lambda files: _change(files.map, 0, map_file.MapHeader(2, SIZE, BLOCK, "disk", "v2").encode()),
}  # fmt: skip


def load_or_begin_anew(opened: CacheDir, record: ImageRecord) -> tuple[RawStore, BlockMap]:
    """Do what `Image` does."""
    store = store_of(opened, record)
    try:
        return store, store.load()
    except errors.CacheCorrupt:
        store.close()
        store.remove()
        store = store_of(opened, record)
        return store, store.load()


@pytest.mark.parametrize("damage", DISCARDED)
def test_what_cannot_be_trusted_is_fetched_again(cache: Cache, damage: str) -> None:
    record = partial_image(cache, (0, 9), (20, BLOCKS))
    assert record.inode == 2
    DISCARDED[damage](Files(cache.partial / "2.raw", cache.partial / "2.map"))
    for _ in range(2):
        with cache.open() as opened:
            store, blocks = load_or_begin_anew(opened, record)
            assert present(blocks) == set()
            assert store.read(0, SIZE) == bytes(SIZE), "zero blocks rely on holes"
            store.close()
    with cache.open() as opened:
        store = store_of(opened, record)
        blocks = store.load()
        fill(store, blocks, 3, 5)
        store.checkpoint(blocks.take_dirty(), 0)
        store.close()
        again = store_of(opened, record)
        assert present(again.load()) == {3, 4}
        again.close()


def test_damaged_counters_cost_the_counters_only(cache: Cache) -> None:
    record = partial_image(cache, (0, 9))
    _change(cache.partial / "2.map", map_file.COUNTERS_OFFSET + 2, b"torn")
    with cache.open() as opened:
        store = store_of(opened, record)
        blocks = store.load()
        assert present(blocks) == set(range(9))
        assert blocks.mixed_zero_bytes == 0
        check_blocks(store, blocks)
        store.close()


def test_states_nobody_wrote_count_as_missing(cache: Cache) -> None:
    record = partial_image(cache, (0, 9))
    _change(cache.partial / "2.map", map_file.STATES_OFFSET + 12, bytes([3, 4, 77, 255]))
    with cache.open() as opened:
        store = store_of(opened, record)
        blocks = store.load()
        assert present(blocks) == set(range(9))
        check_blocks(store, blocks)
        store.close()


@pytest.mark.parametrize("name", ["2.raw", "2.map"])
def test_a_symlink_in_the_place_of_a_partial_file_is_not_followed(
    cache: Cache, name: str, tmp_path: Path
) -> None:
    record = partial_image(cache, (0, 9))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (cache.partial / name).unlink()
    (cache.partial / name).symlink_to(victim)
    with cache.open() as opened:
        store = store_of(opened, record)
        with pytest.raises(OSError, match="symbolic links"):
            store.load()
        store.close()
    assert victim.read_text() == "mine"


def test_orphans_are_swept(cache: Cache) -> None:
    record = partial_image(cache, (0, 9))
    for name in ("7.raw", "7.map", "99.qcow2", "rubbish"):
        (cache.partial / name).write_text("left over")
    with cache.open() as opened:
        store = store_of(opened, record)
        assert present(store.load()) == set(range(9))
        store.close()
    assert sorted(os.listdir(cache.partial)) == ["2.map", "2.raw"]


def test_a_folder_among_the_partial_files_is_named(cache: Cache) -> None:
    cache.add(NEW)
    (cache.partial / "stray").mkdir()
    assert "partial/stray" in cache.refused()


# -- whole images


def test_a_whole_image_whose_file_was_removed_is_remote_again(cache: Cache) -> None:
    whole_image(cache)
    (cache.folder / "team" / "disk").unlink()
    repository = FakeRepository()
    repository.add("disk", CONTENT, identity="v1")
    for _ in range(2):  # also without a catalog that was told by the first
        with cache.open() as opened:
            (record,) = opened.records
            assert (record.state, record.inode, record.present_bytes) == (State.REMOTE, 2, 0)

    async def fetch_again(opened: CacheDir) -> None:
        async with trio.open_nursery() as nursery:
            options = Options(
                block_size=BLOCK, io_timeout_s=10, replace_changed=False, populate=False
            )
            filesystem = Filesystem(
                repository,
                opened,
                opened.catalog,
                opened.records,
                options,
                nursery,
                FakePresentReader(),
            )
            await filesystem.refresh()
            await filesystem.resume()
            image = filesystem.names.node_at("team/disk")
            assert isinstance(image, Image)
            handle = await filesystem.open(image)
            assert await handle.read(0, SIZE) == CONTENT
            with trio.fail_after(10):
                while image.record.state is not State.WHOLE:
                    await trio.sleep(0.01)
            await handle.aclose()
            await filesystem.aclose()
            nursery.cancel_scope.cancel()

    with cache.open() as opened:
        trio.run(fetch_again, opened)
    assert (cache.folder / "team" / "disk").read_bytes() == CONTENT
    with cache.open() as opened:
        assert [record.state for record in opened.records] == [State.WHOLE]


STRANGE: dict[str, Callable[[Path], object]] = {
    "too short": lambda path: path.write_bytes(CONTENT[:-1]),
    "too long": lambda path: path.write_bytes(CONTENT + b"!"),
    "empty": lambda path: path.write_bytes(b""),
    "a symlink": lambda path: path.symlink_to("/etc/passwd"),
    "a folder": lambda path: path.mkdir(),
    "a fifo": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_whole_image_whose_file_is_something_else(cache: Cache, what: str) -> None:
    record = whole_image(cache)
    plain = cache.folder / "team" / "disk"
    plain.unlink()
    STRANGE[what](plain)
    for _ in range(2):
        with cache.open() as opened:
            (found,) = opened.records
            assert (found.state, found.size) == (State.FAILED, SIZE)
            assert "changed by hand" in found.error
            with pytest.raises(errors.CacheCorrupt):
                opened.whole(record)
        assert os.path.lexists(plain), "not ours to remove"
    plain.rmdir() if what == "a folder" else plain.unlink()
    with cache.open() as opened:
        assert [record.state for record in opened.records] == [State.REMOTE]


# -- the directory itself


def test_the_second_holder_of_the_lock_is_told_who_has_it(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_dir, "ENDING_S", 0.3)  # no mount is known, so it waits for an end
    with cache.open():
        refusal = cache.refused()
        assert f"the lazyfs on /mnt/somewhere (pid {os.getpid()})" in refusal
        assert "--cache-dir" in refusal
    with cache.open():  # and then it is free
        pass


@pytest.mark.parametrize("foreign", ["stray", "team/stray", "team/disk", "a/b/c"])
@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink"])
def test_foreign_files_are_refused_and_not_touched(
    cache: Cache, foreign: str, kind: str, tmp_path: Path
) -> None:
    partial_image(cache, (0, 9))
    path = cache.folder / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path if kind == "symlink" else "/nowhere")
    for _ in range(2):
        assert repr(foreign) in cache.refused()
    assert os.path.lexists(path)
    path.unlink()
    with cache.open():  # nothing of the refusals stays behind, neither lock nor database
        pass


def test_empty_folders_and_lost_found_are_nobodys_business(cache: Cache) -> None:
    (cache.folder / "lost+found" / "x").mkdir(parents=True)
    (cache.folder / "team" / "empty").mkdir(parents=True)
    with cache.open() as opened:
        assert opened.records == []


@pytest.mark.parametrize(
    "name", [".lazyfs", ".lazyfs/partial", ".lazyfs/lock", ".lazyfs/catalog.sqlite"]
)
@pytest.mark.parametrize("kind", ["symlink", "file or folder"])
def test_state_that_is_not_what_it_should_be_is_refused(
    cache: Cache, name: str, kind: str, tmp_path: Path
) -> None:
    cache.add(NEW)
    path = cache.folder / name
    is_folder = path.is_dir()
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    before = elsewhere.stat()
    if kind == "symlink":
        path.symlink_to(elsewhere)
    elif is_folder:
        path.write_text("mine")
    else:
        path.mkdir()
    assert name in cache.refused()
    after = elsewhere.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def test_state_is_closed_to_others(cache: Cache) -> None:
    partial_image(cache, (0, 1))
    assert stat.S_IMODE((cache.folder / ".lazyfs").stat().st_mode) == 0o700
    for name in ("2.raw", "2.map"):
        assert stat.S_IMODE((cache.partial / name).stat().st_mode) == 0o600


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    assert "cannot use" in Cache(tmp_path / "cache").refused()


def test_a_read_only_cache(cache: Cache) -> None:
    with pytest.raises(errors.UserError, match=r"cannot (use|write)"):
        CacheDir("/proc/lazyfs", "/mnt", "nbd://example.com", LOOK)


# -- the catalog


def _catalog(cache: Cache) -> Path:
    return cache.folder / ".lazyfs" / "catalog.sqlite"


@pytest.mark.parametrize("damage", ["garbage", "cut", "page", "state", "newer"])
def test_a_damaged_catalog_is_reported_in_one_line(cache: Cache, damage: str) -> None:
    cache.add(*[replace(NEW, export=f"disk{i}", path=f"disk{i}") for i in range(300)])
    path = _catalog(cache)
    match damage:
        case "garbage":
            path.write_bytes(random.Random(1).randbytes(20_000))
        case "cut":
            os.truncate(path, 9000)
        case "page":
            _change(path, 3 * 4096, bytes(4096))
        case "state":
            with sqlite3.connect(path) as db:
                db.execute("UPDATE images SET state = 'nonsense' WHERE inode = 5")
            db.close()
        case "newer":
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version = 99")
            db.close()
    assert "catalog" in cache.refused()


def test_a_catalog_that_was_never_finished(cache: Cache) -> None:
    """A crash during the first mount: the file is there, the schema is not."""
    cache.add()
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (cache.folder / ".lazyfs" / name).unlink(missing_ok=True)
    _catalog(cache).touch()
    with cache.open() as opened:
        assert opened.records == []
        assert [record.inode for record in opened.catalog.add([NEW])] == [2]


def test_a_daemon_killed_between_transactions_loses_none(cache: Cache, tmp_path: Path) -> None:
    """Copied while it is open: what is on disk at that moment is all that a killed daemon
    leaves."""
    copy = Cache(tmp_path / "copy")
    with cache.open() as opened:
        records = opened.catalog.add([NEW])
        opened.catalog.update([replace(records[0], error="why", requests=3)])
        shutil.copytree(cache.folder, copy.folder)
    with copy.open() as opened:
        assert opened.records == [replace(records[0], error="why", requests=3)]


def test_inodes_are_never_given_twice(cache: Cache) -> None:
    with cache.open() as opened:
        first = opened.catalog.add([NEW, replace(NEW, path="b")])
        opened.catalog.remove([record.inode for record in first])
    with cache.open() as opened:
        assert [record.inode for record in opened.catalog.add([NEW])] == [4]


# -- power cuts


def check_every_power_cut(
    folder: Path, record: ImageRecord, before: dict[str, bytes], events: list[Event]
) -> list[int]:
    """Load every state and check it; return how many blocks each of them had."""
    copy = Cache(folder)
    copy.partial.mkdir(parents=True)
    root_fd = os.open(copy.folder, os.O_RDONLY)
    found = []
    seen: set[object] = set()
    for _, disk in states_after_power_cut(before, events, random.Random(3)):
        if disk.key in seen:
            continue
        seen.add(disk.key)
        disk.write(copy.folder)
        store = RawStore(Beneath(root_fd), record, LOOK)
        try:
            blocks = store.load()
        except errors.CacheCorrupt:
            found.append(0)
        else:
            check_blocks(store, blocks)
            found.append(len(present(blocks)))
        store.close()
    os.close(root_fd)
    return found


def test_power_cut_at_every_write_of_a_fill(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = cache.add(NEW)
    with cache.open() as opened, monkeypatch.context() as patch:
        recorder = Recorder(patch)
        store = store_of(opened, record)
        blocks = store.load()
        dice = random.Random(5)
        order = list(range(BLOCKS))
        dice.shuffle(order)
        blocks.mark_zero(BlockRun(order[0], order[0] + 1))
        order = [block for block in order if blocks.state(block) == MISSING]
        while order:
            for _ in range(dice.randrange(1, 4)):
                if order:
                    block = order.pop()
                    fill(store, blocks, block, block + 1)
            store.checkpoint(_slowly(store, blocks, order), blocks.mixed_zero_bytes)
        store.checkpoint(blocks.take_dirty(), blocks.mixed_zero_bytes)
        store.close()
    assert len(recorder.events) > 50
    # A zero block: what the source has there does not matter, the file must have zeroes.
    found = check_every_power_cut(tmp_path / "copy", record, {}, recorder.events)
    assert max(found) == BLOCKS
    assert len(set(found)) > 10


def _slowly(store: RawStore, blocks: BlockMap, order: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the pages of a checkpoint.

    Between the checkpoint's two syncs, another thread writes data.
    """
    pages = blocks.take_dirty()
    if order:
        block = order.pop()
        fill(store, blocks, block, block + 1)
    yield from pages


@pytest.mark.parametrize(
    "damage", [name for name in DISCARDED if "missing" in name or "empty" in name]
)
def test_power_cut_while_the_map_is_begun_anew(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The old map must be gone before the data file looks right again."""
    record = partial_image(cache, (0, 9), (20, BLOCKS))
    with cache.open() as opened:
        DISCARDED[damage](Files(cache.partial / "2.raw", cache.partial / "2.map"))
        before = present_in(cache.partial)
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            store, blocks = load_or_begin_anew(opened, record)
            fill(store, blocks, 0, 2)
            store.checkpoint(blocks.take_dirty(), 0)
            store.close()
    if "data file" not in damage:
        before = {}  # both are removed, and begun anew
    found = check_every_power_cut(tmp_path / "copy", record, before, recorder.events)
    assert max(found) == 2


def test_data_is_synced_before_its_map_and_the_map_before_the_checkpoint_ends(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = cache.add(NEW)
    with cache.open() as opened:
        store = store_of(opened, record)
        blocks = store.load()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            fill(store, blocks, 1, 3)
            store.checkpoint(blocks.take_dirty(), 0)
        store.close()
    assert [(event.kind, event.name) for event in recorder.events] == [
        ("write", "2.raw"),
        ("sync", "2.raw"),
        ("write", "2.map"),
        ("write", "2.map"),
        ("sync", "2.map"),
    ]


def test_a_failed_sync_of_the_data_is_not_a_full_disk(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reports lost data once. A second attempt would succeed without the data."""
    (record,) = cache.add(NEW)
    with cache.open() as opened:
        store = store_of(opened, record)
        store.load()

        def fail(_fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(errors.CacheCorrupt, match="could not take the data"):
                store.checkpoint([], 0)
        store.close()


@pytest.mark.parametrize("linked_only", [False, True])
def test_no_power_cut_leaves_a_plain_file_that_the_catalog_calls_evicted(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, linked_only: bool
) -> None:
    """The names are durable before the catalog says that nothing is there.

    With `linked_only` the image is not whole yet: its file has both names.
    """
    record = partial_image(cache, (0, BLOCKS)) if linked_only else whole_image(cache)
    with cache.open() as opened, monkeypatch.context() as patch:
        if linked_only:
            store = store_of(opened, record)
            store.load()
            store.finish()
            store.close()
        recorder = Recorder(patch)
        removed: list[str] = []
        unlink = os.unlink

        def noted(path: str, *, dir_fd: int) -> None:
            removed.append(
                os.path.join(os.path.basename(os.readlink(f"/proc/self/fd/{dir_fd}")), path)
            )
            unlink(path, dir_fd=dir_fd)

        patch.setattr(os, "unlink", noted)

        def take_over() -> ImageRecord:
            recorder.events.append(Event("told", "", target=str(removed)))
            return opened.catalog.replace(record.inode, record.successor(10**18 + 1))

        partial_cache.remove(opened, record, take_over)
    told = next(i for i, event in enumerate(recorder.events) if event.kind == "told")
    if linked_only:  # the unlink is durable by the sync of its folder after it
        assert "team/disk" in recorder.events[told].target
        assert Event("sync of names", "team") in recorder.events[:told]
        return
    states = list(states_after_power_cut({"team/disk": CONTENT}, recorder.events, random.Random(3)))
    assert any("team/disk" in disk.names for cut, disk in states if cut <= told)
    for cut, disk in states:
        assert cut <= told or "team/disk" not in disk.names


def test_a_sync_that_fails_undoes_the_eviction(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = whole_image(cache)
    with cache.open() as opened:
        with monkeypatch.context() as patch:
            syncs = iter([OSError(errno.EIO, "Input/output error"), None, None])
            sync = os.fsync

            def fails_once(fd: int) -> None:
                if (error := next(syncs)) is not None:
                    raise error
                sync(fd)

            patch.setattr(os, "fsync", fails_once)
            with pytest.raises(OSError, match="Input/output error"):
                partial_cache.remove(opened, record, lambda: pytest.fail("nothing was removed"))
        whole = opened.whole(record)
        assert whole.read(0, SIZE) == CONTENT
        whole.close()
    assert os.listdir(cache.partial) == []


def evicted_and_back(cache: Cache) -> Path:
    """Leave what a power cut can leave of an eviction where syncs are lies."""
    record = whole_image(cache)
    plain = cache.folder / "team" / "disk"
    kept = cache.folder.parent / "kept"
    kept.hardlink_to(plain)
    with cache.open() as opened:
        partial_cache.remove(
            opened,
            record,
            lambda: opened.catalog.replace(record.inode, record.successor(10**18 + 1)),
        )
        kept.rename(plain)
    return plain


def test_an_evicted_file_that_is_back_is_no_stranger(cache: Cache) -> None:
    plain = evicted_and_back(cache)
    with cache.open() as opened:
        assert [record.state for record in opened.records] == [State.REMOTE]
        assert not plain.exists()
        assert opened.catalog.evicted() == {}


def test_another_file_where_one_was_evicted_is_a_stranger(cache: Cache) -> None:
    plain = evicted_and_back(cache)
    os.utime(plain, ns=(5, 5))
    assert "holds 'team/disk', which lazyfs did not put there" in cache.refused()
    assert plain.read_bytes() == CONTENT


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_plain_file_that_cannot_be_opened_now_is_not_called_changed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    record = whole_image(cache)
    with cache.open() as opened, monkeypatch.context() as patch:
        real = os.open

        def fails(path: str, *arguments: int, **named: int) -> int:
            if path == os.path.basename(record.path):
                raise OSError(error, os.strerror(error))
            return real(path, *arguments, **named)

        patch.setattr(os, "open", fails)
        with pytest.raises(OSError, match=os.strerror(error)):
            opened.whole(record)
        with pytest.raises(OSError, match=os.strerror(error)):
            partial_cache.remove(opened, record, lambda: None)


def test_a_disk_that_does_not_say_how_large_it_is_is_not_full(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = partial_image(cache, (0, 3))
    with cache.open() as opened, monkeypatch.context() as patch:
        silent = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
        patch.setattr(os, "fstatvfs", lambda _fd: silent)
        assert opened.space().total == 0
        assert not opened.nearly_full()
        store = store_of(opened, record)
        fill(store, store.load(), 5, 6)
        store.close()
