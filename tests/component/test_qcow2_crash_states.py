"""What a crash, a power cut, a full or a damaged disk leave of a qcow2 that is being filled.

Every state is judged as QEMU sees it, by `qemu-img` or by `qcow2_judge`, which a test here compares
with `qemu-img`. Then a new store loads it, goes on, and ends with the same file as a store that was
never disturbed.
"""

import errno
import json
import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import qcow2_judge
import servers
from crash_lab import LUCK, FullDisk, Recorder, kill_after, states_after_power_cut, without_syncs
from fakes import pattern
from peers import Peers

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.store import qcow2
from lazyfs.cache.store.qcow2 import Qcow2Store
from lazyfs.core import export_name
from lazyfs.core.block_map import DATA, MISSING, ZERO, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.units import KiB

LOOK = FileAttributes(0o444, os.geteuid(), os.getegid())
NOWHERE = "nbd+unix:///disk?socket=/nowhere"
RECORD = ImageRecord(
    2,
    "disk",
    "team/disk.qcow2",
    40 * 4 * KiB + 1000,
    "v1",
    "qcow2",
    State.PARTIAL,
    "",
    4 * KiB,
    created_ns=10**18,
)
ZEROES = BlockRun(8, 13)
"""Ranges that are zero in every export."""


@dataclass(frozen=True)
class Image:
    """Describes an image, and what it must become."""

    record: ImageRecord = RECORD
    zeroes: tuple[BlockRun, ...] = (ZEROES,)

    @property
    def size(self) -> int:
        assert self.record.size is not None
        return self.record.size

    @property
    def clusters(self) -> int:
        return -(-self.size // self.record.block_size)

    @property
    def content(self) -> bytes:
        """Return the content of the export.

        All of it is unique but for the zeroes, which include half a cluster before its end.
        """
        made = bytearray(pattern(self.size))
        unit = self.record.block_size
        holes = [(run.first * unit, run.end * unit) for run in self.zeroes]
        for start, end in (*holes, (self.size - unit, self.size - unit // 2)):
            made[start:end] = bytes(end - start)
        return bytes(made)

    @property
    def finished(self) -> bytes:
        """Return the whole file, as the mount shows it from the first open."""
        shown, content = self.record.shown, self.content
        parts = shown.split(ByteRange(0, shown.size))
        return b"".join(
            part if isinstance(part, bytes) else content[part.start : part.end] for part in parts
        )


SMALL = Image()
TINY = Image(replace(RECORD, size=14 * 4 * KiB))
COARSE = Image(replace(RECORD, size=14 * 64 * KiB - 700, block_size=64 * KiB))
LARGE = Image(replace(RECORD, size=600 * 4 * KiB + 512))


@dataclass
class Lab:
    """Plays a cache directory with one image in it."""

    folder: Path
    image: Image = SMALL
    backing: str = NOWHERE
    content: bytes = field(init=False)
    counted: tuple[int, int] = field(init=False)
    """The bytes of data and of zeroes that the map had when `go_on` finished the image."""

    def __post_init__(self) -> None:
        self.content = self.image.content
        self.data = self.folder / ".lazyfs/partial/2.qcow2"
        self.plain = self.folder / self.image.record.path
        self.data.parent.mkdir(parents=True)

    @contextmanager
    def opened(self) -> Iterator[Qcow2Store]:
        """Return a store that is not loaded yet."""
        root_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        store = Qcow2Store(Beneath(root_fd), self.image.record, LOOK, self.backing)
        try:
            yield store
        finally:
            store.close()
            os.close(root_fd)

    def fill(self, store: Qcow2Store, blocks: BlockMap, runs: Iterable[BlockRun]) -> None:
        """Write what is missing of `runs` and mark it in the map, as a fetch does."""
        for run in runs:
            if run in self.image.zeroes:
                blocks.mark_zero(run)
            for missing in list(blocks.missing_runs(run)):
                span = blocks.bytes_of(missing)
                blocks.claim(missing)
                store.write(span.start, memoryview(self.content)[span.start : span.end])
                blocks.mark_present(missing, span.length)

    def partial_image(self, *steps: Sequence[BlockRun]) -> None:
        """Leave an image with a checkpoint after each step."""
        with self.opened() as store:
            blocks = store.load()
            for step in steps:
                self.fill(store, blocks, step)
                save(store, blocks)

    def whole_image(self) -> None:
        """Leave an image that is finished, but not whole according to the catalog."""
        self.partial_image([*self.image.zeroes, BlockRun(0, self.image.clusters)])
        with self.opened() as store:
            store.load()
            store.finish()

    def go_on(self) -> set[int]:
        """Load, check, fill the rest, finish, and compare with what it must become; return what was
        there."""
        with self.opened() as store:
            blocks = store.load()
            self.check_blocks(store, blocks)
            self.judge(leaks=False)
            found = present(blocks)
            self.fill(store, blocks, [*self.image.zeroes, BlockRun(0, blocks.blocks)])
            save(store, blocks)
            self.judge(leaks=False)
            self.counted = blocks.present_bytes, blocks.zero_bytes
            store.finish()
            assert self.data.samefile(self.plain)
            store.remove()
        self.check_plain()
        return found

    def check_plain(self) -> None:
        assert self.plain.read_bytes() == self.image.finished
        found = self.plain.stat()
        assert (found.st_mode & 0o777, found.st_nlink, found.st_mtime_ns) == (0o444, 1, 10**18)
        assert list(self.data.parent.iterdir()) == []

    def check_blocks(self, store: Qcow2Store, blocks: BlockMap) -> None:
        """Check that every block which the map calls present reads as in the export."""
        for run, state in blocks.runs():
            span = blocks.bytes_of(run)
            if state in (DATA, ZERO):
                assert store.read(span.start, span.length) == self.content[span.start : span.end], (
                    f"wrong in {run}"
                )

    def judge(self, leaks: bool = True) -> qcow2_judge.Finding:
        """Check that the file shows the export and is not corrupt, and has leaks only if
        allowed."""
        image = self.data.read_bytes()
        found = qcow2_judge.examine(image)
        assert found.corruptions == []
        assert found.leaks == 0 or leaks
        assert found.backing in (self.backing, None)
        # Without a backing file what is missing would read as zeroes.
        assert (
            qcow2_judge.differences(
                found, image, self.content, self.content if found.backing else None
            )
            == []
        )
        return found


def save(store: Qcow2Store, blocks: BlockMap) -> None:
    store.checkpoint(blocks.take_dirty(), blocks.mixed_zero_bytes)


def present(blocks: BlockMap) -> set[int]:
    return {block for block in range(blocks.blocks) if blocks.state(block) != MISSING}


def blocks_in(steps: Iterable[Iterable[BlockRun]]) -> set[int]:
    return {block for step in steps for run in step for block in range(run.first, run.end)}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "cache")


# -- qemu-img


def qemu_img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    servers.requires("qemu-img")
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def qemu_check(path: Path) -> int:
    """Return 0 for a clean file, 2 for a corrupt one, 3 for leaks, 1 if it cannot be checked."""
    return qemu_img("check", "-f", "qcow2", path).returncode


def qemu_map(path: Path, clusters: int, cluster_size: int) -> set[int]:
    """Return the clusters that are in the file itself."""
    result = qemu_img("map", "--output=json", "-f", "qcow2", path)
    assert result.returncode == 0, result.stderr
    found: set[int] = set()
    for extent in json.loads(result.stdout):
        if extent["depth"] == 0 and extent["present"]:
            first = -(-extent["start"] // cluster_size)
            found.update(range(first, -(-(extent["start"] + extent["length"]) // cluster_size)))
    return {cluster for cluster in found if cluster < clusters}


def qemu_compare(path: Path, raw: Path) -> None:
    result = qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    assert result.returncode == 0, result.stdout + result.stderr


# -- crashes

STEPS = (
    (BlockRun(3, 5), BlockRun(0, 1)),
    (BlockRun(30, 41), BlockRun(20, 21), BlockRun(22, 23)),
    (ZEROES, BlockRun(21, 22)),
    (BlockRun(0, 41),),
)
"""The clusters that are filled before each checkpoint."""


def test_killed_between_each_pair_of_writes_qemu_finds_the_export(
    tmp_path: Path, peers: Peers
) -> None:
    """From the creation to the removal of the partial name; the backing file is a real export, as
    in the header."""
    exports = tmp_path / "exports"
    exports.mkdir()
    raw = exports / "disk"
    raw.write_bytes(SMALL.content)
    server = peers.nbdkit("file", f"dir={exports}", log=False)
    backing = export_name.qemu_uri(server.uri, "disk")
    progress = mmap.mmap(-1, 2)  # shared with the child: checkpoints, finished
    calls, codes = 0, []
    while True:
        calls += 1
        progress[:] = b"\0\0"
        lab = Lab(tmp_path / f"cache{calls}", backing=backing)
        killed = kill_after(calls, lambda: live(lab, progress))  # noqa: B023 - it has run when the loop goes on
        if not killed:
            break
        if lab.data.exists():
            codes.append(check_with_qemu(lab, raw, progress[0]))
        else:
            assert progress[1] or progress[0] == 0, "the file is there until it is finished"
        if not progress[1]:
            go_on_with_qemu(lab)
        if lab.plain.exists():
            check_finished_with_qemu(lab, raw)
    lab.check_plain()
    assert calls > 50
    assert set(codes) == {0, 3}, "leaks happen, and nothing else"
    assert codes.count(3) < len(codes) / 3


def live(lab: Lab, progress: mmap.mmap) -> None:
    """Make an image from its creation to its end."""
    with lab.opened() as store:
        blocks = store.load()
        for step in STEPS:
            lab.fill(store, blocks, step)
            save(store, blocks)
            progress[0] += 1
        store.finish()
        progress[1] = 1
        store.remove()


def check_with_qemu(lab: Lab, raw: Path, checkpoints: int) -> int:
    """Let QEMU judge what a crash left; return the exit code of the check."""
    code = qemu_check(lab.data)
    assert code in (0, 3)
    qemu_compare(lab.data, raw)
    found = qemu_map(lab.data, lab.image.clusters, lab.image.record.block_size)
    assert blocks_in(STEPS[:checkpoints]) <= found <= blocks_in(STEPS[: checkpoints + 1])
    examined = lab.judge()
    assert (examined.present, examined.check_code) == (found, code), (
        "the judge of other tests agrees"
    )
    if examined.backing is not None:
        assert (examined.backing, examined.backing_format) == (lab.backing, "raw")
    return code


def go_on_with_qemu(lab: Lab) -> None:
    """Load what a crash left, and let QEMU judge it before it is filled and finished."""
    with lab.opened() as store:
        blocks = store.load()
        assert qemu_check(lab.data) == 0, "what leaked is mended"
        assert qemu_map(lab.data, lab.image.clusters, lab.image.record.block_size) == present(
            blocks
        )
    lab.go_on()


def check_finished_with_qemu(lab: Lab, raw: Path) -> None:
    assert qemu_check(lab.plain) == 0
    qemu_compare(lab.plain, raw)
    assert qemu_map(lab.plain, lab.image.clusters, lab.image.record.block_size) == set(
        range(lab.image.clusters)
    )
    assert "backing" not in qemu_img("info", "-f", "qcow2", lab.plain).stdout


@pytest.mark.parametrize("size", [0, 1, 512, 4096, 511 * 4096 + 1, 512 * 4096, 512 * 4096 + 1])
def test_sizes_at_the_borders_of_tables(tmp_path: Path, peers: Peers, size: int) -> None:
    raw = tmp_path / "disk"
    raw.write_bytes(pattern(size))
    backing = export_name.qemu_uri(peers.nbdkit("file", raw, log=False).uri, "")
    lab = Lab(tmp_path / "cache", Image(replace(RECORD, size=size)), backing)
    lab.content = pattern(size)
    with lab.opened() as store:
        blocks = store.load()
        assert qemu_check(lab.data) == 0
        for run in ([BlockRun(0, 1)], [BlockRun(0, blocks.blocks)]):
            lab.fill(store, blocks, [r for r in run if r.end <= blocks.blocks])
            save(store, blocks)
            lab.judge(leaks=False)
            assert qemu_check(lab.data) == 0
            qemu_compare(lab.data, raw)
        store.finish()
        store.remove()
    check_finished_with_qemu(lab, raw)


# -- power cuts

MUCH_LUCK = LUCK * 5


def record_a_life(
    lab: Lab, patch: pytest.MonkeyPatch, steps: int
) -> tuple[Recorder, list[int], list[set[int]]]:
    """Fill in random order and finish; return also after how many events each checkpoint ended, and
    with what."""
    recorder = Recorder(patch)
    dice = random.Random(5)
    order = [block for block in range(lab.image.clusters) if not ZEROES.first <= block < ZEROES.end]
    dice.shuffle(order)
    groups = [order[i::steps] for i in range(steps)]
    ends, promises = [], []
    with lab.opened() as store:
        blocks = store.load()
        ends.append(len(recorder.events))
        promises.append(present(blocks))
        for i, group in enumerate(groups):
            if i == 1:
                lab.fill(store, blocks, [ZEROES])
            while len(group) > 1:
                first = group.pop()
                end = first + dice.choice((1, 1, 1 + lab.image.clusters // 20))
                lab.fill(
                    store,
                    blocks,
                    [
                        BlockRun(
                            first,
                            min(end, ZEROES.first if first < ZEROES.first else lab.image.clusters),
                        )
                    ],
                )
            promises.append(present(blocks))
            store.checkpoint(
                pages_with_a_write_between(lab, store, blocks, group), blocks.mixed_zero_bytes
            )
            ends.append(len(recorder.events))
        save(store, blocks)
        store.finish()
    return recorder, ends, promises


def pages_with_a_write_between(
    lab: Lab, store: Qcow2Store, blocks: BlockMap, group: list[int]
) -> Iterator[tuple[int, bytes]]:
    """Yield the pages of a checkpoint. Meanwhile another thread writes data."""
    pages = blocks.take_dirty()
    if group:
        last = group.pop()
        lab.fill(store, blocks, [BlockRun(last, last + 1)])
    yield from pages


def judge_every_power_cut(
    lab: Lab,
    copy: Lab,
    patch: pytest.MonkeyPatch,
    steps: int,
    judge: Callable[[Lab, set[int]], None],
    lucks: tuple[str, ...],
) -> int:
    """Return how many different states were judged."""
    with patch.context() as recording:
        recorder, ends, promises = record_a_life(lab, recording, steps)
    assert lab.plain.read_bytes() == lab.image.finished
    seen = set()
    with patch.context() as copying:
        without_syncs(copying)
        for cut, disk in states_after_power_cut({}, recorder.events, random.Random(3), lucks):
            if (key := hash(disk.key)) in seen:
                continue
            seen.add(key)
            disk.write(copy.folder)
            if cut == len(recorder.events):
                assert copy.plain.exists(), "then the catalog says that it is whole"
            judge(
                copy,
                max(
                    (promises[i] for i, end in enumerate(ends) if end <= cut),
                    key=len,
                    default=set(),
                ),
            )
    return len(seen)


def check_after_power_cut(copy: Lab, promised: set[int]) -> None:
    """Every state that opens shows no wrong byte, has what was promised, and can be continued."""
    if copy.plain.exists():
        assert copy.plain.read_bytes() == copy.image.finished
    if copy.data.exists():
        assert promised <= copy.judge().present
    else:
        assert promised == set()
    assert promised <= copy.go_on()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "steps", "lucks", "least"),
    [(SMALL, 12, MUCH_LUCK, 400), (LARGE, 40, LUCK, 500), (COARSE, 3, LUCK, 50)],
    ids=["small", "large", "coarse"],
)
def test_power_cut_at_every_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Image,
    steps: int,
    lucks: tuple[str, ...],
    least: int,
) -> None:
    lab, copy = Lab(tmp_path / "cache", image), Lab(tmp_path / "copy", image)
    assert (
        judge_every_power_cut(lab, copy, monkeypatch, steps, check_after_power_cut, lucks) > least
    )


def test_power_cut_as_qemu_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peers: Peers
) -> None:
    raw = tmp_path / "disk"
    raw.write_bytes(TINY.content)
    backing = export_name.qemu_uri(peers.nbdkit("file", raw, log=False).uri, "disk")
    codes = set()

    def judge(copy: Lab, promised: set[int]) -> None:
        if copy.data.exists():
            code = qemu_check(copy.data)
            codes.add(code)
            assert code in (0, 3)
            qemu_compare(copy.data, raw)
            examined = copy.judge()
            assert examined.check_code == code, "the judge of the other tests agrees"
            assert (
                qemu_map(copy.data, copy.image.clusters, copy.image.record.block_size)
                == examined.present
            )
        check_after_power_cut(copy, promised)
        assert qemu_check(copy.plain) == 0

    lab, copy = Lab(tmp_path / "cache", TINY, backing), Lab(tmp_path / "copy", TINY, backing)
    assert judge_every_power_cut(lab, copy, monkeypatch, 3, judge, MUCH_LUCK) > 100
    assert codes == {0, 3}


def test_power_cut_while_a_file_is_disowned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header names one backing file or the other, and the rest of the file is unchanged."""
    lab, copy = Lab(tmp_path / "cache"), Lab(tmp_path / "copy")
    lab.partial_image(HALF)
    before = lab.data.read_bytes()
    with lab.opened() as store:
        store.load()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            store.disown()
    after = qcow2_judge.examine(lab.data.read_bytes()).backing
    assert after is not None
    assert after.startswith("nbd:the-export-is-not")
    seen = set()
    for cut, disk in states_after_power_cut(
        {"2.qcow2": before}, recorder.events, random.Random(3), MUCH_LUCK
    ):
        disk.write(copy.folder)
        found = qcow2_judge.examine(copy.data.read_bytes())
        assert found.backing in (NOWHERE, after)
        assert found.backing == after or cut < len(recorder.events)
        copy.backing = found.backing
        seen.add(found.backing)
        assert copy.go_on() == blocks_in([HALF])
    assert seen == {NOWHERE, after}


def test_each_kind_is_synced_before_the_next(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is data, refcounts, L2 entries."""
    at = lab.image.record.shown
    with lab.opened() as store:
        blocks = store.load()
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            lab.fill(store, blocks, [BlockRun(1, 3)])
            save(store, blocks)
    writes = [(event.kind, event.offset) for event in recorder.events]
    assert [kind for kind, _ in writes] == [
        "write",
        "sync",
        "write",
        "sync",
        "write",
        "write",
        "sync",
    ]
    # header, refcount table, refcount block, L1 table, L2 table, data
    assert writes[0][1] == at.metadata_size + 4 * KiB
    assert [offset // (4 * KiB) for kind, offset in writes[2:] if kind == "write"] == [2, 4, 0]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_sync_may_have_lost_data_whichever_it_was(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Data and metadata are in one file, so Linux may report with any sync, and only once, that
    data of other writers was lost."""
    syncs = 0

    def fail(_fd: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == failing + 1:
            raise OSError(errno.EIO, "Input/output error")

    with lab.opened() as store:
        blocks = store.load()
        lab.fill(store, blocks, [BlockRun(1, 3)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(errors.CacheCorrupt, match="could not take the data"):
                save(store, blocks)
    lab.go_on()


# -- after the end


def test_a_checkpoint_after_the_end_leaves_the_plain_file_as_it_is(lab: Lab) -> None:
    lab.whole_image()
    for again in (False, True):
        with lab.opened() as store:
            blocks = store.load()
            if again:
                store.finish()
            store.checkpoint([(0, bytes([ZERO]) * lab.image.clusters)], 4096)
            assert lab.plain.read_bytes() == lab.image.finished
    assert lab.go_on() == present(blocks) == set(range(lab.image.clusters))


def test_finishing_where_a_file_is_in_the_way_can_be_tried_again_later(lab: Lab) -> None:
    lab.plain.parent.mkdir()
    lab.plain.write_text("mine")
    with pytest.raises(errors.UserError):
        lab.whole_image()
    lab.judge(leaks=False)
    with lab.opened() as store:
        blocks = store.load()
        save(store, blocks)
    lab.plain.unlink()
    assert lab.go_on() == set(range(lab.image.clusters))


def test_killed_anywhere_in_finish_no_zeroes_count_as_data_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of zeroes are made entries of data, one table at a time, so the map is a mix of
    both."""
    monkeypatch.setattr(qcow2, "_CHUNK", 4 * KiB)
    zeroes = (BlockRun(8, 108), BlockRun(550, 590))
    image = Image(LARGE.record, zeroes)
    mixed_seen = calls = 0
    killed = True
    while killed:
        calls += 1
        lab = Lab(tmp_path / f"cache{calls}", image)
        lab.partial_image([*zeroes, BlockRun(0, image.clusters)])
        killed = kill_after(calls, lambda: finish_again(lab))  # noqa: B023 - it has run when the loop goes on
        with lab.opened() as store:
            states = {state for _, state in store.load().runs()}
        mixed_seen += lab.judge().backing is not None and 0 < zeroes_in(lab) < 140
        assert states <= {DATA, ZERO}
        assert lab.go_on() == set(range(image.clusters))
        present, zero = lab.counted
        assert present + zero == image.size
        # Less by the rest of the last block, and by what ext4 keeps of a file in many pieces
        # besides its content.
        assert 138 * 4 * KiB <= zero <= 140 * 4 * KiB
    assert mixed_seen > 0


def finish_again(lab: Lab) -> None:
    with lab.opened() as store:
        store.load()
        store.finish()


def zeroes_in(lab: Lab) -> int:
    """Return the clusters that the tables call zeroes."""
    return qcow2_judge.examine(lab.data.read_bytes()).clusters.count(qcow2_judge.ZERO)


# -- damage

HALF = (BlockRun(0, 4), ZEROES, BlockRun(20, 30))
SHOWN = SMALL.record.shown
METADATA = SHOWN.metadata_size


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int, bit: int) -> None:
    change(path, offset, bytes([path.read_bytes()[offset] ^ 1 << bit]))


def load_or_refuse(lab: Lab) -> set[int] | None:
    """Load, and check that the map shows nothing wrong. Return None if the file is refused."""
    with lab.opened() as store:
        try:
            blocks = store.load()
        except errors.CacheCorrupt:
            return None
        lab.check_blocks(store, blocks)
        return present(blocks)


def foreign(**options: object) -> Callable[[Lab], None]:
    """Put the file of another image in the place of ours."""

    def put(lab: Lab) -> None:
        record = replace(lab.image.record, **options)  # type: ignore[arg-type]
        other = Lab(lab.folder.with_name("other"), Image(record))
        with other.opened() as store:
            blocks = store.load()
            other.fill(store, blocks, [BlockRun(0, 1)])
            save(store, blocks)
        (made,) = other.data.parent.iterdir()
        lab.data.write_bytes(made.read_bytes())

    return put


def made_by_qemu(lab: Lab) -> None:
    lab.data.unlink()
    options = f"cluster_size=4096,preallocation=metadata,size={41 * 4096}"
    assert qemu_img("create", "-f", "qcow2", "-o", options, lab.data).returncode == 0


REFUSED: dict[str, Callable[[Lab], object]] = {
    "cut in the header": lambda lab: os.truncate(lab.data, 100),
    "cut in the metadata": lambda lab: os.truncate(lab.data, METADATA - 1),
    "cut in the data": lambda lab: os.truncate(lab.data, METADATA + 5 * 4096),
    "cut at the end": lambda lab: os.truncate(lab.data, SHOWN.size - 1),
    "empty": lambda lab: os.truncate(lab.data, 0),
    "too long": lambda lab: os.truncate(lab.data, SHOWN.size + 1),
    "another inode": foreign(inode=3),
    "another export": foreign(export="other"),
    "another version": foreign(identity="v2"),
    "another size": foreign(size=SMALL.size + 512),
    "another size within the same cluster": foreign(size=SMALL.size + 1),
    "another cluster size": foreign(block_size=8192),
    "garbage": lambda lab: lab.data.write_bytes(random.Random(1).randbytes(SHOWN.size)),
    "zeroes": lambda lab: lab.data.write_bytes(bytes(SHOWN.size)),
    "a raw image": lambda lab: lab.data.write_bytes(SMALL.content.ljust(SHOWN.size, b"x")),
    "a qcow2 of QEMU's": made_by_qemu,
    "finished metadata, and not the data": lambda lab: change(lab.data, 0, SMALL.finished[:4096]),
    "a shifted L2 table": lambda lab: change(lab.data, 4 * 4096, lab.data.read_bytes()[4 * 4096 + 8 : 5 * 4096]),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED)
def test_what_cannot_be_trusted_is_refused_and_begun_anew(lab: Lab, damage: str) -> None:
    lab.partial_image(HALF)
    REFUSED[damage](lab)
    with lab.opened() as store:
        with pytest.raises(errors.CacheCorrupt):
            store.load()
        store.close()
        store.remove()
    assert lab.go_on() == set()


def test_each_bit_of_the_header(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that is not refused can mislead only QEMU: lazyfs neither needs nor trusts it."""
    without_syncs(monkeypatch)
    lab.partial_image(HALF)
    intact = lab.data.read_bytes()
    name_length, own_length, counters_and_format = range(16, 20), range(108, 112), range(212, 512)
    for offset in range(512 + len(NOWHERE)):
        for bit in range(8):
            flip(lab.data, offset, bit)
            found = load_or_refuse(lab)
            if offset in (*name_length, *own_length, *counters_and_format) or offset >= 512:
                assert found == blocks_in([HALF])
            else:
                assert found is None
            change(lab.data, 0, intact[:4096])


def test_each_bit_of_the_tables(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 entries are refused if lazyfs does not write such ones.

    All else follows from them and from the size, and is repaired.
    """
    without_syncs(monkeypatch)
    lab.partial_image(HALF)
    intact = lab.data.read_bytes()
    refused: dict[str, int] = {}
    ends = {"table": 4096 + 8, "refcounts": 8192 + 2 * (5 + 41), "L1": 12288 + 8, "L2": 0}
    # cluster 1 refcount table, 2 refcounts, 3 L1 table, 4 L2 table; each with some of what follows
    # its entries
    for what, start, end in (("table", 4096, 4112), ("refcounts", 8192, 8192 + 100), ("L1", 12288, 12304), ("L2", 16384, 16384 + 344)):  # fmt: skip
        for offset in range(start, end):
            for bit in range(8):
                flip(lab.data, offset, bit)
                found = load_or_refuse(lab)
                refused[what] = refused.get(what, 0) + (found is None)
                assert found in (None, blocks_in([HALF]))
                if found is not None and offset < ends[what]:
                    lab.judge(leaks=False)
                lab.data.write_bytes(intact)
    # A flag turns data into zeroes for QEMU; lazyfs reads what is in the file.
    assert refused == {"table": 0, "refcounts": 0, "L1": 0, "L2": 41 * 64 - len(blocks_in([HALF]))}


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_of_sectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Metadata is zeroed, overwritten or swapped. It is refused, or is right and becomes as good as
    new when it is finished."""
    without_syncs(monkeypatch)
    lab = Lab(tmp_path / "cache", LARGE)
    lab.partial_image([BlockRun(0, 4), ZEROES, BlockRun(20, 300), BlockRun(500, 590)])
    intact, metadata = lab.data.read_bytes(), LARGE.record.shown.metadata_size
    dice = random.Random(seed)
    outcomes = set()
    for _ in range(25):
        one, two = (dice.randrange(metadata // 512) * 512 for _ in range(2))
        match dice.randrange(4):
            case 0:
                change(lab.data, one, bytes(512))
            case 1:
                change(lab.data, one, dice.randbytes(512))
            case 2:
                change(lab.data, one, intact[two : two + 512])
                change(lab.data, two, intact[one : one + 512])
            case 3:
                flip(lab.data, one + dice.randrange(512), dice.randrange(8))
        found = load_or_refuse(lab)
        outcomes.add(found is None)
        if found is not None:
            with lab.opened() as store:
                blocks = store.load()
                lab.fill(store, blocks, [ZEROES, BlockRun(0, blocks.blocks)])
                save(store, blocks)
                store.finish()
                store.remove()
            lab.check_plain()
            lab.plain.unlink()
        lab.data.write_bytes(intact)
        lab.data.chmod(0o600)
    assert outcomes == {True, False}


def test_damage_of_what_follows_from_the_rest_is_mended_at_once(lab: Lab) -> None:
    lab.partial_image(HALF)
    # cluster 1 refcount table, 2 refcounts, 3 L1 table
    for offset, damage in (
        (8192, bytes(4096)),
        (8192, b"\xff" * 2 * (5 + 41)),
        (4096, bytes(8)),
        (12288, bytes(8)),
    ):
        change(lab.data, offset, damage)
        with lab.opened() as store:
            store.load()
        lab.judge(leaks=False)
    assert lab.go_on() == blocks_in([HALF])


def test_a_lost_sector_of_l2_entries_is_fetched_again(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "cache", LARGE)
    lab.partial_image([BlockRun(0, 600)])
    l2 = LARGE.record.shown.metadata_size - 2 * 4096
    change(lab.data, l2 + 512, bytes(512))
    assert lab.go_on() == set(range(601)) - set(range(64, 128)) - {600}


@pytest.mark.parametrize(
    "offset", [600, 4096, 2 * 4096 + 3, 2 * 4096 + 500, 3 * 4096, 4 * 4096 + 40 * 8 + 200]
)
def test_damage_of_a_finished_file_is_mended_as_it_is_finished_again(lab: Lab, offset: int) -> None:
    """The daemon does that when the catalog was not updated."""
    lab.whole_image()
    flip(lab.data, offset, 1)
    with lab.opened() as store:
        assert store.load().complete
        store.finish()
        store.remove()
    lab.check_plain()


def test_a_finished_file_that_lacks_a_cluster_is_refused(lab: Lab) -> None:
    lab.whole_image()
    change(lab.data, 4 * 4096 + 40 * 8, bytes(8))
    assert load_or_refuse(lab) is None


def test_a_symlink_in_the_place_of_the_file_is_not_followed(lab: Lab, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("2.qcow2", "2.qcow2.new"):
        (lab.data.parent / name).symlink_to(victim)
        with lab.opened() as store, pytest.raises(OSError, match="symbolic links"):
            store.load()
        (lab.data.parent / name).unlink()
        lab.data.unlink(missing_ok=True)
    assert victim.read_text() == "mine"


def test_what_a_crash_left_of_a_creation_is_used_or_removed(lab: Lab) -> None:
    fresh = lab.data.with_name("2.qcow2.new")
    fresh.write_bytes(b"x" * 10 * SHOWN.size)
    assert load_or_refuse(lab) == set()
    assert list(lab.data.parent.iterdir()) == [lab.data]
    lab.judge(leaks=False)
    fresh.write_bytes(b"left over")
    with lab.opened() as store:
        store.remove()
    assert list(lab.data.parent.iterdir()) == []


# -- a full disk


def fail_everywhere(
    patch: pytest.MonkeyPatch, calls: tuple[str, ...], act: Callable[[], object]
) -> Iterator[int]:
    """Let `act` find the disk full at its first call, its second, and so on. Yield after each."""
    for fail_at in range(1000):
        with patch.context() as failing:
            disk = FullDisk(failing, fail_at, calls)
            try:
                act()
            except errors.NoSpace:
                assert disk.met
            else:
                assert not disk.met, "it hides that the disk is full"
                return
        yield fail_at


METADATA_CALLS = ("pwrite", "posix_fallocate", "ftruncate", "mkdir", "link", "rename")


def test_a_disk_that_is_full_at_any_step_of_the_creation(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        with lab.opened() as store:
            store.load()

    failures = 0
    for _ in fail_everywhere(monkeypatch, (*METADATA_CALLS, "fsync"), load):
        failures += 1
        if lab.data.exists():  # only the sync of its name failed
            lab.judge(leaks=False)
            lab.data.unlink()
        assert list(lab.data.parent.iterdir()) == [], "a full disk is not made fuller"
    assert failures >= 8
    assert lab.go_on() == set()


def test_a_disk_that_is_full_at_any_write_of_data(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.partial_image(HALF)
    with lab.opened() as store:
        store.load()
        for _ in range(2):
            with monkeypatch.context() as patch:
                FullDisk(patch, 0)
                with pytest.raises(errors.NoSpace):
                    store.write(5 * 4096, memoryview(lab.content)[5 * 4096 : 8 * 4096])
            lab.judge(leaks=False)
    assert lab.go_on() == blocks_in([HALF])


def test_a_disk_that_is_full_at_any_write_of_a_checkpoint(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.partial_image(HALF)
    with lab.opened() as store:
        blocks = store.load()
        lab.fill(store, blocks, [BlockRun(30, 35), ZEROES])
        pages = blocks.take_dirty()
        failures = 0
        for _ in fail_everywhere(monkeypatch, METADATA_CALLS, lambda: store.checkpoint(pages, 0)):
            failures += 1
            assert lab.judge().present >= blocks_in([HALF])
            before = lab.data.read_bytes()
            assert load_or_refuse(lab) is not None  # another daemon, which mends leaks
            lab.data.write_bytes(before)
        assert failures == 3
        lab.judge(leaks=False)
    assert lab.go_on() == blocks_in([HALF]) | set(range(30, 35))


def test_a_disk_that_is_full_at_any_step_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reopen in (False, True):
        lab = Lab(tmp_path / f"cache{reopen}")
        lab.partial_image([ZEROES, BlockRun(0, lab.image.clusters)])
        with lab.opened() as store:
            store.load()
            failures = 0
            for _ in fail_everywhere(
                monkeypatch, (*METADATA_CALLS, "fsync", "fdatasync"), store.finish
            ):
                failures += 1
                lab.judge(leaks=False)
                if lab.plain.exists():
                    assert lab.plain.read_bytes() == lab.image.finished
                if reopen:
                    assert load_or_refuse(lab) == set(range(lab.image.clusters))
                    lab.data.chmod(0o400)
            assert failures >= 6
            store.remove()
        lab.check_plain()
