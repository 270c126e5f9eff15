"""What every Store and ImageFile promises, in memory and on disk."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import MemoryStores, pattern

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.store.cache_file import WholeFile
from lazyfs.cache.store.qcow2 import Qcow2Store
from lazyfs.cache.store.raw import RawStore
from lazyfs.core import shown_file
from lazyfs.core.block_map import DATA, PAGE_BLOCKS, ZERO, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.engine.interfaces import FileAttributes, PlainFile, Store
from lazyfs.units import KiB

BLOCK = 16 * KiB
SIZE = 40 * BLOCK - 512
RECORD = ImageRecord(
    7,
    "team/disk",
    "team/disk",
    SIZE,
    "v1",
    "raw",
    State.PARTIAL,
    "",
    BLOCK,
    1_600_000_000_000_000_000,
)
CONTENT = pattern(SIZE)
"""The content of the export."""


class Disk:
    """Plays a cache directory as stores see it."""

    def __init__(
        self,
        partial: Callable[[ImageRecord], Store],
        whole: Callable[[ImageRecord], PlainFile],
        put: Callable[[str, bytes], None],
        get: Callable[[str], bytes | None],
        files: Callable[[], int],
        image_format: str = shown_file.RAW,
    ) -> None:
        self.partial, self.whole = partial, whole
        self.put, self.get = put, get
        """Write and read plain files."""
        self.files = files
        """Returns how many partial images there are."""
        self.format = image_format
        self.record = self.of_format(RECORD)
        self.opened: list[Store] = []

    def load(self, record: ImageRecord = RECORD) -> tuple[Store, BlockMap]:
        store = self.partial(self.of_format(record))
        self.opened.append(store)
        return store, store.load()

    def of_format(self, record: ImageRecord) -> ImageRecord:
        return replace(record, format=self.format)

    def shown(self, record: ImageRecord = RECORD) -> bytes:
        """Return the plain file, which the mount shows from the first open on."""
        assert record.size is not None
        shown, content = self.of_format(record).shown, CONTENT[: record.size]
        parts = shown.split(ByteRange(0, shown.size))
        return b"".join(
            part if isinstance(part, bytes) else content[part.start : part.end] for part in parts
        )


def memory(_folder: Path, image_format: str = shown_file.RAW) -> tuple[Disk, Callable[[], None]]:
    stores = MemoryStores()

    def get(path: str) -> bytes | None:
        return bytes(stores.plain[path]) if path in stores.plain else None

    files = lambda: len(stores.partials)  # noqa: E731
    return Disk(
        stores.partial, stores.whole, stores.plain.__setitem__, get, files, image_format
    ), lambda: None


def memory_qcow2(folder: Path) -> tuple[Disk, Callable[[], None]]:
    return memory(folder, shown_file.QCOW2)


def raw(folder: Path) -> tuple[Disk, Callable[[], None]]:
    return on_disk(folder, shown_file.RAW, RawStore)


def qcow2(folder: Path) -> tuple[Disk, Callable[[], None]]:
    def make(root: Beneath, record: ImageRecord, look: FileAttributes) -> Store:
        return Qcow2Store(root, record, look, "nbd://example.com/team/disk")

    return on_disk(folder, shown_file.QCOW2, make)


def on_disk(
    folder: Path, image_format: str, make: Callable[[Beneath, ImageRecord, FileAttributes], Store]
) -> tuple[Disk, Callable[[], None]]:
    (folder / ".lazyfs/partial").mkdir(parents=True)
    root_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    look = FileAttributes(0o444, os.getuid(), os.getgid())

    def put(path: str, content: bytes) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)

    def get(path: str) -> bytes | None:
        return (folder / path).read_bytes() if (folder / path).exists() else None

    disk = Disk(
        lambda record: make(Beneath(root_fd), record, look),
        lambda record: WholeFile(Beneath(root_fd), record),
        put,
        get,
        lambda: len({path.stem for path in (folder / ".lazyfs/partial").iterdir()}),
        image_format,
    )
    return disk, lambda: os.close(root_fd)


@pytest.fixture(
    params=[memory, memory_qcow2, raw, qcow2], ids=["memory", "memory qcow2", "raw", "qcow2"]
)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    made, close = request.param(tmp_path)
    yield made
    for store in made.opened:
        store.close()
    close()


def keep(store: Store, blocks: BlockMap, first: int, end: int) -> None:
    """Write blocks and mark them in the map, as a fetcher does."""
    run = BlockRun(first, end)
    span = blocks.bytes_of(run)
    blocks.claim(run)
    store.write(span.start, memoryview(CONTENT[span.start : span.end]))
    blocks.mark_present(run, span.length)


def save(store: Store, blocks: BlockMap) -> None:
    store.checkpoint(blocks.take_dirty(), blocks.mixed_zero_bytes)


def finished(disk: Disk) -> Store:
    store, blocks = disk.load()
    keep(store, blocks, 0, 40)
    save(store, blocks)
    store.finish()
    return store


def test_a_new_store_has_nothing(disk: Disk) -> None:
    _, blocks = disk.load()
    assert (blocks.size, blocks.block_size, blocks.present_bytes, blocks.zero_bytes) == (
        SIZE,
        BLOCK,
        0,
        0,
    )
    assert not blocks.dirty


def test_what_was_written_is_read_at_once_and_the_rest_is_zeroes(disk: Disk) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 3, 5)
    assert store.read(3 * BLOCK + 5, BLOCK) == CONTENT[3 * BLOCK + 5 : 4 * BLOCK + 5]
    assert store.read(2 * BLOCK, BLOCK) == bytes(BLOCK)
    assert store.read(5 * BLOCK - 3, 6) == CONTENT[5 * BLOCK - 3 : 5 * BLOCK] + bytes(3)
    for start in range(0, SIZE, BLOCK):
        assert store.read_nowait(start, 512) in (None, store.read(start, 512))


def test_a_read_beyond_the_end_is_not_answered_short(disk: Disk) -> None:
    store, _ = disk.load()
    assert len(store.read(SIZE - 512, 512)) == 512
    end = SIZE if disk.format == shown_file.RAW else 40 * BLOCK  # a qcow2 ends with a whole cluster
    with pytest.raises(errors.CacheCorrupt):
        store.read(SIZE - 512, end - SIZE + 513)


def test_a_checkpoint_outlasts_the_store(disk: Disk) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 0, 2)
    keep(store, blocks, 39, 40)
    blocks.mark_zero(BlockRun(10, 20))
    blocks.claim(BlockRun(20, 21))
    save(store, blocks)
    keep(store, blocks, 30, 31)  # and never saved
    store.close()
    store, again = disk.load()
    assert [(tuple(run), state) for run, state in again.runs() if state] == [
        ((0, 2), DATA), ((10, 20), ZERO), ((39, 40), DATA)
    ]  # fmt: skip
    assert store.read(39 * BLOCK, BLOCK - 512) == CONTENT[39 * BLOCK :]
    keep(store, again, 20, 21)


def test_the_bytes_of_zeroes_in_mixed_blocks_outlast_the_store(disk: Disk) -> None:
    store, blocks = disk.load()
    blocks.claim(BlockRun(0, 1))
    store.write(4096, memoryview(CONTENT[4096:8192]))
    blocks.mark_present(BlockRun(0, 1), 4096)
    save(store, blocks)
    store.close()
    store, again = disk.load()
    assert (again.present_bytes, again.zero_bytes) == (4096, BLOCK - 4096)
    assert store.read(0, BLOCK) == bytes(4096) + CONTENT[4096:8192] + bytes(BLOCK - 8192)


def test_a_map_of_several_pages(disk: Disk) -> None:
    record = replace(RECORD, size=(2 * PAGE_BLOCKS + 5) * 4096, block_size=4096)
    store, blocks = disk.load(record)
    assert record.size is not None
    for block in (0, PAGE_BLOCKS, 2 * PAGE_BLOCKS + 4):
        blocks.claim(BlockRun(block, block + 1))
        store.write(block * 4096, memoryview(bytes([block % 251 + 1]) * 4096))
        blocks.mark_present(BlockRun(block, block + 1), 4096)
        save(store, blocks)
    store.close()
    store, again = disk.load(record)
    assert [run.first for run, state in again.runs() if state == DATA] == [
        0,
        PAGE_BLOCKS,
        2 * PAGE_BLOCKS + 4,
    ]
    assert store.read(record.size - 4096, 4096) == bytes([(2 * PAGE_BLOCKS + 4) % 251 + 1]) * 4096


@pytest.mark.parametrize(
    "other",
    [
        replace(RECORD, identity="v2"),
        replace(RECORD, export="other"),
        replace(RECORD, block_size=2 * BLOCK),
        replace(RECORD, size=SIZE - 512),
        replace(RECORD, size=SIZE + BLOCK),
    ],
)
def test_a_map_of_another_image_is_refused_and_can_be_removed(
    disk: Disk, other: ImageRecord
) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 0, 2)
    save(store, blocks)
    store.close()
    wrong = disk.partial(disk.of_format(other))
    with pytest.raises(errors.CacheCorrupt):
        wrong.load()
    wrong.close()
    wrong.remove()
    _, blocks = disk.load(other)
    assert blocks.present_bytes == 0


def test_images_are_kept_apart(disk: Disk) -> None:
    one, blocks = disk.load()
    two, others = disk.load(replace(RECORD, inode=8, path="other"))
    keep(one, blocks, 0, 1)
    assert two.read(0, BLOCK) == bytes(BLOCK)
    save(one, blocks)
    assert others.present_bytes == 0
    assert disk.files() == 2


def test_writes_from_several_threads_at_once(disk: Disk) -> None:
    store, blocks = disk.load()
    threads = [
        threading.Thread(target=keep_only, args=(store, first)) for first in range(0, 40, 10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks.claim(BlockRun(0, 40))
    blocks.mark_present(BlockRun(0, 40), SIZE)
    save(store, blocks)
    assert store.read(0, SIZE) == CONTENT


def keep_only(store: Store, first: int) -> None:
    for block in range(first, first + 10):
        end = min((block + 1) * BLOCK, SIZE)
        store.write(block * BLOCK, memoryview(CONTENT[block * BLOCK : end]))


def test_an_empty_image(disk: Disk) -> None:
    record = replace(disk.record, size=0)
    store, blocks = disk.load(record)
    assert blocks.complete
    store.finish()
    store.remove()
    whole = disk.shown(record)
    assert disk.get("team/disk") == whole
    plain = disk.whole(record)
    assert plain.read(0, len(whole)) == whole
    plain.close()


# -- the end of a partial image


def test_finishing_makes_the_plain_file_while_reads_go_on(disk: Disk) -> None:
    store = finished(disk)
    assert disk.get("team/disk") == disk.shown()
    assert store.read(BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]
    assert disk.files() == 1
    store.remove()
    assert disk.files() == 0
    assert disk.get("team/disk") == disk.shown()
    assert store.read(BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]


def test_finishing_may_be_repeated_also_by_a_later_process(disk: Disk) -> None:
    finished(disk).finish()
    store, blocks = disk.load()
    assert blocks.complete
    store.finish()
    assert disk.get("team/disk") == disk.shown()
    store.remove()
    store.remove()


def test_a_checkpoint_after_the_end_changes_nothing(disk: Disk) -> None:
    store = finished(disk)
    for _ in range(2):
        store.checkpoint([], 4096)
        store.close()
        assert disk.get("team/disk") == disk.shown()
        store, blocks = disk.load()
        assert blocks.complete
    store.finish()
    assert disk.get("team/disk") == disk.shown()


def test_a_foreign_file_in_the_way_is_refused_and_left_alone(disk: Disk) -> None:
    disk.put("team/disk", b"precious")
    with pytest.raises(errors.UserError, match="team/disk"):
        finished(disk)
    assert disk.get("team/disk") == b"precious"
    assert disk.files() == 1


@pytest.mark.parametrize("loaded", [True, False])
def test_an_end_of_which_the_catalog_was_never_told_can_be_undone(disk: Disk, loaded: bool) -> None:
    store = finished(disk)
    store = store if loaded else disk.partial(disk.record)
    store.unfinish()
    assert disk.get("team/disk") is None
    assert disk.files() == 1
    store.unfinish()
    store.remove()
    store.unfinish()
    assert disk.files() == 0


def test_undoing_the_end_leaves_a_foreign_file_alone(disk: Disk) -> None:
    store, _ = disk.load()
    store.unfinish()
    disk.put("team/disk", b"precious")
    store.unfinish()
    disk.partial(replace(disk.record, inode=99)).unfinish()
    assert disk.get("team/disk") == b"precious"


def test_a_file_that_is_disowned_keeps_what_it_has_and_can_be_finished(disk: Disk) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 0, 7)
    save(store, blocks)
    store.disown()
    keep(store, blocks, 7, 9)
    save(store, blocks)
    store.disown()
    store.close()
    store, blocks = disk.load()
    assert [(tuple(run), state) for run, state in blocks.runs() if state] == [((0, 9), DATA)]
    keep(store, blocks, 9, 40)
    save(store, blocks)
    store.finish()
    store.disown()
    assert disk.get("team/disk") == disk.shown()


def test_removing_before_the_end_leaves_nothing_but_what_is_open(disk: Disk) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 0, 1)
    save(store, blocks)
    store.remove()
    assert disk.files() == 0
    assert store.read(0, BLOCK) == CONTENT[:BLOCK]
    store.close()
    store.close()
    _, blocks = disk.load()
    assert blocks.present_bytes == 0


def test_removing_what_was_never_loaded(disk: Disk) -> None:
    store, blocks = disk.load()
    keep(store, blocks, 0, 1)
    save(store, blocks)
    store.close()
    disk.partial(disk.record).remove()
    assert disk.files() == 0


def test_a_write_after_the_close_fails_and_touches_nothing(disk: Disk) -> None:
    store, _ = disk.load()
    store.close()
    other, _ = disk.load(replace(RECORD, inode=8, path="other"))  # may get the same descriptors
    with pytest.raises(OSError, match="Bad file descriptor"):
        store.write(0, memoryview(CONTENT[:BLOCK]))
    assert other.read(0, BLOCK) == bytes(BLOCK)


def test_what_nobody_is_about_to_read_is_written_all_the_same(disk: Disk) -> None:
    store, _ = disk.load()
    assert RECORD.size is not None
    for start in range(0, RECORD.size, BLOCK):
        store.write(start, memoryview(CONTENT)[start : min(start + BLOCK, RECORD.size)], keep=False)
    for start in range(0, RECORD.size, BLOCK):
        length = min(BLOCK, RECORD.size - start)
        assert store.read(start, length) == CONTENT[start : start + length]


# -- whole images


def test_the_plain_file_of_a_whole_image(disk: Disk) -> None:
    store = finished(disk)
    store.remove()
    store.close()
    plain, shown = disk.whole(disk.record), disk.shown()
    assert len(shown) == disk.record.file_size
    assert plain.read(0, len(shown)) == shown
    for start in (5, len(shown) - 105):
        assert plain.read_nowait(start, 100) in (None, shown[start : start + 100])
    with pytest.raises(errors.CacheCorrupt):
        plain.read(len(shown) - 1, 2)
    path = disk.record.path
    plain.set_aside()
    assert disk.get(path) is None
    assert plain.read(0, len(shown)) == shown
    plain.restore()
    assert disk.get(path) == shown
    plain.set_aside()
    plain.remove()
    assert disk.get("team/disk") is None
    assert plain.read(0, len(shown)) == shown
    plain.remove()
    plain.close()
    plain.close()


@pytest.mark.parametrize(
    "change",
    [
        None,
        lambda shown: b"",
        lambda shown: shown[:-1],
        lambda shown: shown + b"x",
    ],
    ids=["missing", "empty", "too short", "too long"],
)
def test_a_plain_file_that_cannot_be_the_image_is_refused(
    disk: Disk, change: Callable[[bytes], bytes] | None
) -> None:
    if change is not None:
        disk.put("team/disk", change(disk.shown()))
    with pytest.raises(errors.CacheCorrupt):
        disk.whole(disk.record)


# -- on disk only


@pytest.mark.parametrize("disk", [raw, qcow2], ids=["raw", "qcow2"], indirect=True)
def test_a_close_waits_for_the_write_that_is_under_way(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the descriptor could be another file's by the time the write uses it."""
    store, _ = disk.load()
    writing, closed = threading.Event(), threading.Event()
    real_pwrite, descriptors = os.pwrite, []

    def slow_pwrite(fd: int, data: memoryview, offset: int) -> int:
        writing.set()
        assert closed.wait(20)
        descriptors.append(os.fstat(fd).st_size)
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    thread = threading.Thread(target=store.write, args=(0, memoryview(CONTENT[:BLOCK])))
    thread.start()
    assert writing.wait(20)
    store.close()
    closed.set()
    thread.join()
    assert descriptors == [disk.record.file_size]
    monkeypatch.undo()
    again, _ = disk.load()
    assert again.read(0, BLOCK) == CONTENT[:BLOCK]


@pytest.mark.parametrize("disk", [raw, qcow2], ids=["raw", "qcow2"], indirect=True)
def test_a_close_that_fails_closes_each_file_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux closes the descriptor all the same, and the next file gets its number."""
    store, _ = disk.load()
    closed: list[int] = []
    real_close = os.close

    def close(fd: int) -> None:
        real_close(fd)
        closed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match="Input/output error"):
        store.close()
    store.close()
    monkeypatch.undo()
    assert len(closed) == len(set(closed)) == (2 if disk.format == shown_file.RAW else 1)
