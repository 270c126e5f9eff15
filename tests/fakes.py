"""Implements what the engine needs in memory: a repository, stores and a catalog.

Each has a switch for every thing that can go wrong. They pass the same contract tests as the real
ones (`contracts/`). All times in them are trio's.
"""

import array
import errno
import functools
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import trio

from lazyfs import errors
from lazyfs.cache.store.unkept import UnkeptStore
from lazyfs.core.block_map import DATA, PAGE_BLOCKS, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import GRAIN
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.core.pacing import Backoff
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.interfaces import (
    Answered,
    Claim,
    Export,
    Filler,
    FillWork,
    ImageFile,
    PlainFile,
    Samples,
    Source,
    Space,
    Store,
    no_samples,
)
from lazyfs.units import KiB

POISON = 0xEE
"""What an unanswered or refused request leaves in its buffer."""

Kind = Literal["demand", "fill"]
T = TypeVar("T")


@functools.cache
def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes in which each aligned group of 8 tells its place and the seed.

    So no two groups are the same.
    """
    first = (seed + 1) << 48
    words = array.array("Q", range(first, first + size, 8))
    words.byteswap()  # this is easier to read in a dump
    return words.tobytes()[:size]


@dataclass(frozen=True, slots=True)
class FakeExport:
    """A disk of the fake repository."""

    content: bytes
    data: tuple[ByteRange, ...]
    """What block status calls data. The rest reads as zeroes."""
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Describes one read request as it reached the fake repository."""

    export: str
    offset: int
    length: int
    kind: Kind
    at: float
    """When it came, by trio's clock."""

    @property
    def range(self) -> ByteRange:
        return ByteRange(self.offset, self.offset + self.length)


class FakeRepository:
    """A repository in memory. Implements `interfaces.Repository`."""

    REQUEST = 256 * KiB
    """How many bytes its fillers claim at once."""

    def __init__(self) -> None:
        self.uri = "fake://repository"
        self.connected = False
        self.nursery: trio.Nursery | None = None
        """Runs what is submitted; without it nothing can be."""
        self.sources: weakref.WeakSet[_FakeSource] = weakref.WeakSet()
        self.exports: dict[str, FakeExport] = {}
        self.log: list[Request] = []
        self.status_log: list[tuple[str, ByteRange]] = []
        self.lists = self.describes = 0
        self.down = False
        """True if nothing can be reached, and what is under way is lost."""
        self.refused: set[str] = set()
        """Exports that are listed but cannot be opened or described."""
        self.delay_s = 0.0
        """How long every answer takes."""
        self.demand_delay_s = 0.0
        """How much longer answers to demand reads take."""
        self._answered_at = -math.inf
        self.fill_in_flight = 1
        """How many requests one filler has under way at once."""
        self.fill_connects = 0
        self._bad: list[tuple[str, ByteRange, int]] = []
        self._running = trio.Event()
        self._running.set()

    # -- switches

    def add(
        self, name: str, content: bytes, holes: Iterable[ByteRange] = (), identity: str = ""
    ) -> FakeExport:
        """Add or replace an export. Bytes inside `holes` become zero and are reported as such."""
        made, data, position = bytearray(content), [], 0
        for hole in sorted(hole.clip(ByteRange(0, len(content))) for hole in holes):
            made[hole.start : hole.end] = bytes(hole.length)
            if hole.length and hole.start > position:
                data.append(ByteRange(position, hole.start))
            position = max(position, hole.end if hole.length else 0)
        if position < len(made):
            data.append(ByteRange(position, len(made)))
        self.exports[name] = export = FakeExport(bytes(made), tuple(data), identity)
        return export

    def fail(self, name: str, where: ByteRange, code: int = errno.EIO) -> None:
        """Refuse every read of `name` that touches `where`."""
        self._bad.append((name, where, code))

    def heal(self) -> None:
        """Refuse nothing any more."""
        self._bad.clear()

    def hang(self) -> None:
        """Answer nothing until `go_on`."""
        if self._running.is_set():
            self._running = trio.Event()

    def go_on(self) -> None:
        """End `hang`."""
        self._running.set()

    # -- oracles

    def reads(self, name: str | None = None, kind: Kind | None = None) -> list[ByteRange]:
        """Return the ranges that were asked for, in order."""
        return [
            r.range
            for r in self.log
            if (name is None or r.export == name) and (kind is None or r.kind == kind)
        ]

    def bytes_read(self, name: str | None = None, kind: Kind | None = None) -> int:
        return sum(asked.length for asked in self.reads(name, kind))

    # -- interfaces.Repository

    async def list_exports(self) -> list[str]:
        self.lists += 1
        await self._answer()
        return list(self.exports)

    async def describe(self, names: Sequence[str]) -> dict[str, Export | str]:
        self.describes += 1
        await self._answer()
        return {name: self._describe(name) for name in names}

    def source(self, export: Export, samples: Samples = no_samples) -> Source:
        return _FakeSource(self, export, samples)

    def filler(self, export: Export, samples: Samples = no_samples) -> Filler:
        return _FakeFiller(self, export, samples)

    # -- inside

    async def compare(self, export: Export, samples: Samples) -> None:
        """Compare samples, as a new connection does."""
        if taken := samples():
            await self._answer()
        for sample in taken:
            content = self._check_version(export).content
            sample.check_same(export.name, content[sample.offset :][: len(sample.data)])

    def _describe(self, name: str) -> Export | str:
        found = self.exports.get(name)
        if found is None or name in self.refused:
            return "the server refuses it"
        return Export(name, len(found.content), found.identity)

    async def _answer(self) -> None:
        """Reach the server, and wait as long as it takes to answer.

        Raises:
            ConnectionLost.
        """
        await trio.lowlevel.checkpoint()
        self._check_up()
        await trio.sleep(self.delay_s)
        await self._running.wait()
        self._check_up()
        self.connected = True

    def _check_up(self) -> None:
        if self.down:
            self.connected = False
            raise errors.ConnectionLost(self.uri, "down")

    def _check_version(self, expected: Export) -> FakeExport:
        found = self._describe(expected.name)
        if isinstance(found, str):
            raise errors.ConnectionLost(self.uri, found)
        if found.size != expected.size:
            raise errors.ExportChanged(
                expected.name, f"{expected.size} bytes", f"{found.size} bytes"
            )
        if found.identity != expected.identity:
            raise errors.ExportChanged(expected.name, repr(expected.identity), repr(found.identity))
        return self.exports[expected.name]

    async def read(self, export: Export, offset: int, buffer: memoryview, kind: Kind) -> None:
        """Make one attempt to read."""
        at = self.ask(export, offset, buffer, kind)
        await self.answer(export, offset, buffer, at)

    def ask(self, export: Export, offset: int, buffer: memoryview, kind: Kind) -> float:
        """Send a read request. Return when it is answered, not counting `delay_s`."""
        buffer[:] = bytes([POISON]) * len(buffer)
        self._check_up()
        self._check_version(export)
        asked = ByteRange(offset, offset + len(buffer))
        assert 0 <= asked.start < asked.end <= export.size
        now = trio.current_time()
        self.log.append(Request(export.name, offset, len(buffer), kind, now))
        if kind == "demand" and self.demand_delay_s:
            self._answered_at = max(
                self._answered_at + 1e-6, now + self.demand_delay_s
            )  # one after the other
            return self._answered_at
        return now

    async def answer(self, export: Export, offset: int, buffer: memoryview, at: float) -> None:
        """Wait for the answer to a request."""
        asked = ByteRange(offset, offset + len(buffer))
        if at > trio.current_time():
            await trio.sleep_until(at)
        await self._answer()
        content = self._check_version(export).content
        for name, where, code in self._bad:
            if name == export.name and where.overlaps(asked):
                raise errors.RequestFailed(f"reading {name} at {offset}", code)
        buffer[:] = content[asked.start : asked.end]

    def connections(self) -> int:
        """How many sources have a connection."""
        return sum(source._connected for source in self.sources)

    async def status(self, export: Export, window: ByteRange) -> list[ByteRange]:
        """Make one attempt to ask for block status."""
        self._check_up()
        self._check_version(export)
        self.status_log.append((export.name, window))
        await self._answer()
        data = self._check_version(export).data
        return [piece.clip(window) for piece in data if piece.overlaps(window)]


class _FakeSource:
    """Reads on demand. It reconnects for ever, as the real source does."""

    def __init__(self, repository: FakeRepository, export: Export, samples: Samples) -> None:
        self._repository = repository
        self._export = export
        self._samples = samples
        self._backoff = Backoff()
        self._next_attempt = -math.inf
        self._connected = False
        self._calls = 0
        self._dropped = False
        self._drops = 0
        self.trouble = ""
        repository.sources.add(self)

    def submit(self, offset: int, buffer: memoryview, answered: Answered) -> bool:
        if self._repository.nursery is None or not self._connected:
            return False
        try:
            at = self._repository.ask(self._export, offset, buffer, "demand")
        except errors.LazyfsError:
            return False
        self._repository.nursery.start_soon(self._answer, offset, buffer, at, answered)
        return True

    async def _answer(self, offset: int, buffer: memoryview, at: float, answered: Answered) -> None:
        outcome: errors.LazyfsError | None = errors.ConnectionLost(self._repository.uri, "closed")
        drops = self._drops
        try:
            await self._repository.answer(self._export, offset, buffer, at)
            if drops == self._drops:
                outcome = None
        except errors.RequestFailed as error:
            outcome = error
        except errors.LazyfsError:  # also if it is another version: a new connection will find that
            self._connected = False
        finally:
            answered(outcome)

    async def pread(self, offset: int, buffer: memoryview) -> None:
        await self._retry(lambda: self._repository.read(self._export, offset, buffer, "demand"))

    async def compare(self) -> None:
        await self._retry(lambda: self._repository.compare(self._export, self._samples))

    async def block_status(self, window: ByteRange) -> list[ByteRange]:
        return await self._retry(lambda: self._repository.status(self._export, window))

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        self._calls += 1
        try:
            await trio.lowlevel.checkpoint()  # as the real one, which must have a connection
            while True:
                try:
                    if not self._connected:
                        await self._repository.compare(self._export, self._samples)
                    result = await attempt()
                except errors.ConnectionLost:
                    if trio.current_time() >= self._next_attempt:
                        self._next_attempt = trio.current_time() + self._backoff.next()
                    await trio.sleep_until(self._next_attempt)
                else:
                    self._backoff.reset()
                    self._connected = True
                    return result
        finally:
            self._calls -= 1
            if not self._calls and self._dropped:
                self.drop_connection()

    def drop_connection(self) -> None:
        self._connected = False
        self._drops += 1
        self._dropped = self._calls > 0


class _FakeFiller:
    """Fills with a few requests at a time. Every claim ends, whatever happens."""

    def __init__(self, repository: FakeRepository, export: Export, samples: Samples) -> None:
        self._repository = repository
        self._export = export
        self._samples = samples
        self._connected = False

    async def run(self, work: FillWork, duration_s: float) -> None:
        failures: list[errors.LazyfsError] = []
        until = trio.current_time() + duration_s

        async def worker() -> None:
            try:
                await self._work(work, until)
            except (errors.ConnectionLost, errors.ExportChanged) as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        await self._connect()
        async with trio.open_nursery() as nursery:
            for _ in range(self._repository.fill_in_flight):
                nursery.start_soon(worker)
        if failures:
            self._connected = False
            raise failures[0]

    async def _connect(self) -> None:
        if not self._connected:
            self._repository.fill_connects += 1
            await self._repository._answer()
            self._repository._check_version(self._export)
            await self._repository.compare(self._export, self._samples)
            self._connected = True

    async def _work(self, work: FillWork, until: float) -> None:
        while trio.current_time() <= until:
            claim = work.claim(self._repository.REQUEST)
            if claim is None:
                return
            if isinstance(claim, float):
                assert claim > 0
                await trio.sleep(claim)
                continue
            await self._move(claim)

    async def _move(self, claim: Claim) -> None:
        error: Exception | None = None
        try:
            for part in claim.parts:
                buffer = memoryview(bytearray(part.length))
                await self._repository.read(self._export, part.start, buffer, "fill")
                claim.write(part.start, buffer)
            claim.finish()
        except errors.ExportChanged as changed:
            error = changed
            raise
        except (errors.RequestFailed, errors.NoSpace, OSError) as failed:
            error = failed
        finally:
            claim.drop(error)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._connected = False
        await trio.lowlevel.checkpoint()


class ClaimKeeper(Protocol):
    """Hands out `BookedClaim`s and remembers what becomes of them."""

    def write(self, offset: int, data: memoryview) -> None: ...
    def keep(self, claim: "BookedClaim") -> None: ...
    def drop(self, claim: "BookedClaim", error: Exception | None) -> None: ...


class BookedClaim:
    """A claim that tells its keeper what becomes of it. Implements `interfaces.Claim`."""

    def __init__(self, keeper: ClaimKeeper, run: BlockRun, parts: tuple[ByteRange, ...]) -> None:
        self.run = run
        self.parts = parts
        self._keeper = keeper
        self._ended = False

    @property
    def data_bytes(self) -> int:
        return sum(part.length for part in self.parts)

    def write(self, offset: int, data: memoryview) -> None:
        self._keeper.write(offset, data)

    def finish(self) -> None:
        assert not self._ended, "it has ended"
        self._ended = True
        self._keeper.keep(self)

    def drop(self, error: Exception | None = None) -> None:
        if not self._ended:
            self._ended = True
            self._keeper.drop(self, error)


# -- the cache directory


class _Disk:
    """Holds the files of one partial image.

    It knows what was written, and what would survive a power cut.
    """

    def __init__(self, record: ImageRecord) -> None:
        assert record.size is not None
        self.header = (record.inode, record.size, record.block_size, record.export, record.identity)
        self.data = bytearray(record.shown.size)
        self.safe_data = bytes(self.data)
        self.states = bytes(-(-record.size // record.block_size))
        self.mixed_zero_bytes = 0
        self.damaged = False
        self.grains: set[int] = set()
        """The blocks of 4 KiB that the file system has allocated."""
        self.disowned = False
        """True if the file names no export any more."""


class FakePresentReader:
    """Notes what it is shown, and takes nothing over."""

    def __init__(self) -> None:
        self.shown: dict[int, tuple[ImageFile | None, BlockMap | None]] = {}

    def share(self, inode: int, blocks: BlockMap, file: ImageFile) -> None:
        pass

    def show(
        self, inode: int, shown: ShownFile, file: ImageFile | None, blocks: BlockMap | None
    ) -> None:
        self.shown[inode] = file, blocks

    def orphan(self, inode: int, record: ImageRecord, may_fetch: bool) -> None:
        assert inode in self.shown

    def keep_name(self, inode: int) -> None:
        assert inode in self.shown

    def withdraw(self, inode: int, *, distrusted: bool = False) -> None:
        self.shown.pop(inode, None)


class MemoryStores:
    """A cache directory in memory. Implements `interfaces.Stores`."""

    def __init__(self) -> None:
        self.partials: dict[int, _Disk] = {}
        self.plain: dict[str, bytearray | bytes] = {}
        """Plain files by path, whole images and what else a test puts there."""
        self.aside: dict[str, bytearray | bytes] = {}
        """Plain files whose image is being replaced in the catalog."""
        self.full = False
        """True if every write fails with NoSpace, and nothing new can be begun."""
        self.room_low = False
        """What `nearly_full` returns."""
        self.on_call: Callable[[], None] = lambda: None
        """Called by each call that the disk could refuse, before anything is done. It may raise
        OSError. A `close` closes all the same, as close(2) does."""
        self.checkpoint_error: Exception | None = None
        self.checkpoints = 0
        self.odd_writes: list[ByteRange] = []
        """Writes that began or ended inside a block, which no store should see."""
        self.journal: list[str] = []
        """What became durable, in order. A catalog may write to it too."""
        self.open_files: set[object] = set()
        self.disk_size = 1 << 40
        self.neighbours = 0
        """Bytes that other programs take of the disk."""
        self.peak = 0
        """The most that `allocated` has ever been."""
        self._disks: list[_Disk] = []

    def partial(self, record: ImageRecord) -> Store:
        return MemoryStore(self, record)

    def unkept(self) -> Store:
        return UnkeptStore()

    def whole(self, record: ImageRecord) -> PlainFile:
        return _MemoryPlainFile(self, record)

    def nearly_full(self) -> bool:
        return self.room_low

    def space(self) -> Space:
        return Space(self.disk_size, max(0, self.disk_size - self.neighbours - self.allocated()))

    def allocated(self) -> int:
        """What `du` says of the data of all images."""
        linked = {
            id(data)
            for data in [
                *(disk.data for disk in self.partials.values()),
                *self.plain.values(),
                *self.aside.values(),
            ]
        }
        self._disks = [disk for disk in self._disks if id(disk.data) in linked]
        return sum(len(disk.grains) for disk in self._disks) * GRAIN

    def begin(self, record: ImageRecord) -> _Disk:
        """Make the files of a partial image."""
        disk = self.partials[record.inode] = _Disk(record)
        self._disks.append(disk)
        return disk

    def sweep(self, records: Iterable[ImageRecord]) -> None:
        """Remove partial files to which no record belongs.

        Opening a real cache directory does the same.
        """
        wanted = {
            record.inode for record in records if record.state in (State.PARTIAL, State.FAILED)
        }
        self.partials = {inode: disk for inode, disk in self.partials.items() if inode in wanted}

    def crash(self) -> None:
        """Forget what no checkpoint has made durable."""
        for disk in self.partials.values():
            disk.data[:] = disk.safe_data
        self.open_files.clear()


class _MemoryReader:
    _bytes: bytearray | bytes | None = None
    _data_offset = 0
    """Where offset 0 of reads and writes is in the file."""

    def __init__(self, stores: MemoryStores) -> None:
        self._stores = stores

    def fileno(self) -> int:
        return -1

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        # The page cache has the even 64 KiB, so that both ways of reading are in use.
        return None if offset // (64 * KiB) % 2 else self.read(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        if self._bytes is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        offset += self._data_offset
        data = bytes(self._bytes[offset : offset + length])
        if len(data) != length:
            raise errors.CacheCorrupt(
                f"the cache file ends at {len(self._bytes)}, inside the image"
            )
        return data

    def close(self) -> None:
        if self in self._stores.open_files:
            self._bytes = None
            self._stores.open_files.discard(self)
            self._stores.on_call()


class MemoryStore(_MemoryReader):
    """A store in memory. Implements `interfaces.Store`.

    It checks that its caller writes the data before the map.
    """

    def __init__(self, stores: MemoryStores, record: ImageRecord) -> None:
        super().__init__(stores)
        assert record.size is not None
        self._record = record
        self._size = record.size
        self._data_offset = record.shown.metadata_size
        self._lock = threading.Lock()
        self._disk: _Disk | None = None
        self._written: set[int] = set()

    def load(self) -> BlockMap:
        record, stores = self._record, self._stores
        stores.on_call()
        disk = stores.partials.get(record.inode)
        if disk is None:
            if stores.full:
                raise errors.NoSpace
            disk = stores.begin(record)
        elif disk.damaged or disk.header != _Disk(record).header:
            raise errors.CacheCorrupt("the map belongs to another image, size or version")
        self._disk, self._bytes = disk, disk.data
        stores.open_files.add(self)
        blocks = BlockMap(self._size, record.block_size, disk.states, disk.mixed_zero_bytes)
        self._written = {block for block in range(blocks.blocks) if blocks.state(block) == DATA}
        return blocks

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        with self._lock:
            if self._disk is None or self._bytes is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self._stores.full:
                raise errors.NoSpace
            self._stores.on_call()
            end = offset + len(data)
            if (
                offset % GRAIN
                or (end % GRAIN and end != self._size)
                or end > self._size
                or not data
            ):
                self._stores.odd_writes.append(ByteRange(offset, end))
            self._disk.data[self._data_offset + offset : self._data_offset + end] = data
            self._disk.grains.update(range(offset // GRAIN, -(-end // GRAIN)))
            self._stores.peak = max(self._stores.peak, self._stores.allocated())
            self._written.update(
                range(offset // self._record.block_size, -(-end // self._record.block_size))
            )

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        if self._disk is None or self._bytes is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._stores.checkpoint_error is not None:
            raise self._stores.checkpoint_error
        self._stores.on_call()
        with self._lock:
            self._disk.safe_data = bytes(self._disk.data)
            self._stores.checkpoints += 1
            self._stores.journal.append(f"data {self._record.inode}")
            states = bytearray(self._disk.states)
            for index, content in pages:
                first = index * PAGE_BLOCKS
                assert len(content) == min(PAGE_BLOCKS, len(states) - first)
                claims = {first + i for i, state in enumerate(content) if state == DATA}
                assert claims <= self._written, "the map says DATA of a block that nobody wrote"
                assert all(
                    new >= old for new, old in zip(content, states[first:], strict=False) if old
                )
                states[first : first + len(content)] = content
            self._disk.states = bytes(states)
            self._disk.mixed_zero_bytes = mixed_zero_bytes
            self._stores.journal.append(f"map {self._record.inode}")

    def disown(self) -> None:
        assert self._disk is not None
        self._stores.on_call()
        self._disk.disowned = True
        self._stores.journal.append(f"disown {self._record.inode}")

    def finish(self) -> None:
        assert self._disk is not None
        self._stores.on_call()
        there = self._stores.plain.get(self._record.path)
        if there is not None and there is not self._disk.data:
            raise errors.UserError(
                f"cannot put the whole image at {self._record.path}: a file that lazyfs did not put there is in the way"
            )
        assert self._disk.safe_data == self._disk.data, "not checkpointed"
        for part in self._record.shown.split(ByteRange(0, self._data_offset)):
            assert isinstance(part, bytes)
            self._disk.data[: len(part)] = part
        self._disk.safe_data = bytes(self._disk.data)
        self._stores.plain[self._record.path] = self._disk.data
        self._stores.journal.append(f"finish {self._record.inode}")

    def unfinish(self) -> None:
        self._stores.on_call()
        disk = self._stores.partials.get(self._record.inode)
        if disk is not None and self._stores.plain.get(self._record.path) is disk.data:
            del self._stores.plain[self._record.path]
            self._stores.journal.append(f"unfinish {self._record.inode}")

    def remove(self) -> None:
        self._stores.on_call()
        if self._stores.partials.pop(self._record.inode, None) is not None:
            self._stores.journal.append(f"remove {self._record.inode}")


class _MemoryPlainFile(_MemoryReader):
    """A plain file in memory. Implements `interfaces.PlainFile`."""

    def __init__(self, stores: MemoryStores, record: ImageRecord) -> None:
        super().__init__(stores)
        self._path = record.path
        self._fd = -1
        stores.on_call()
        found = stores.plain.get(record.path)
        if found is None:
            raise errors.PlainFileGone("the plain file cannot be opened: No such file or directory")
        if len(found) != record.file_size:
            raise errors.CacheCorrupt(
                f"the plain file has {len(found)} bytes, the image {record.file_size}"
            )
        self._bytes = found
        stores.open_files.add(self)

    def fileno(self) -> int:
        if self._fd < 0:
            assert self._bytes is not None
            self._fd = os.memfd_create("plain")
            os.ftruncate(self._fd, len(self._bytes))
            for start in range(0, len(self._bytes), 4 * KiB):
                page = self._bytes[start : start + 4 * KiB]
                if page.count(0) != len(page):  # holes stay holes
                    os.pwrite(self._fd, page, start)
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()

    def set_aside(self) -> None:
        self._stores.on_call()
        self._stores.aside[self._path] = self._stores.plain.pop(self._path)

    def restore(self) -> None:
        self._stores.on_call()
        self._stores.plain[self._path] = self._stores.aside.pop(self._path)

    def remove(self) -> None:
        self._stores.on_call()
        self._stores.aside.pop(self._path, None)
        self._stores.plain.pop(self._path, None)


class MemoryCatalog:
    """A catalog in memory. Implements `interfaces.Catalog`."""

    def __init__(self, journal: list[str] | None = None) -> None:
        self.records: dict[int, ImageRecord] = {}
        self.error: Exception | None = None
        """Raised by every call."""
        self.on_call: Callable[[], None] = lambda: None
        """Called by each call that the disk could refuse, before anything is done."""
        self._settings: dict[str, str] = {}
        self._next = 2
        self._journal = [] if journal is None else journal

    def setting(self, name: str) -> str:
        return self._settings.get(name, "")

    def set_setting(self, name: str, value: str) -> None:
        self._check()
        self._settings[name] = value

    def load(self) -> list[ImageRecord]:
        return [self.records[inode] for inode in sorted(self.records)]

    def add(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        self._check()
        added = [replace(record, inode=self._next + i) for i, record in enumerate(records)]
        self._next += len(records)
        self.records.update((record.inode, record) for record in added)
        return added

    def update(self, records: Sequence[ImageRecord]) -> None:
        self._check()
        for record in records:
            if record.inode in self.records:
                if self.records[record.inode].state is not record.state:
                    self._journal.append(f"{record.state.value} {record.inode}")
                self.records[record.inode] = record

    def describe(self, described: Sequence[tuple[int, int, str]]) -> None:
        self._check()
        for inode, size, identity in described:
            record = self.records.get(inode)
            if record is not None and record.state is State.REMOTE:
                self.records[inode] = replace(record, size=size, identity=identity)

    def note_uses(self, uses: Sequence[tuple[int, int]]) -> None:
        self._check()
        for inode, used_ns in uses:
            if inode in self.records:
                self.records[inode] = replace(self.records[inode], last_used_ns=used_ns)

    def replace(self, inode: int, record: ImageRecord) -> ImageRecord:
        (added,) = self.add([record])
        self.records.pop(inode, None)
        return added

    def remove(self, inodes: Sequence[int]) -> None:
        self._check()
        for inode in inodes:
            self.records.pop(inode, None)

    def close(self) -> None:
        """Do nothing, because there is nothing to close."""

    def _check(self) -> None:
        self.on_call()
        if self.error is not None:
            raise self.error
