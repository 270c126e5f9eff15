"""Tests that thousands of operations of each kind leave memory and all that is held as before.

Failures are among these operations.
"""

import errno
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import fakes
import pytest
import trio
from engine_world import World, run, threads, until
from fakes import pattern

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import Cause, State
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine.filesystem import Options
from lazyfs.engine.image.image import Image
from lazyfs.units import KiB

pytestmark = pytest.mark.trio(run=run)

BLOCK = 4 * KiB
OPERATIONS = 10_000
CYCLES = 1_000
"""How often operations that go through the whole life of an image are repeated. Each of these is
some twenty operations."""

ALLOWED = 300_000
"""How many bytes may stay, however many operations there were. trio keeps up to a thousand
deadlines that have passed."""

Operation = Callable[[], Awaitable[object]]


class Nothing(list[Any]):
    """A list that stays empty."""

    def append(self, _one: Any) -> None:
        pass


class Soak:
    """Runs a daemon with an image for each kind of operation."""

    def __init__(self) -> None:
        self.world = World(populate=False, block_size=BLOCK)
        for name in ("open", "present", "failed", "refused", "whole", "cycle", "down"):
            self.world.repository.add(name, pattern(16 * BLOCK))
        self.world.repository.add("missing", pattern((OPERATIONS + 2000) * BLOCK))
        # What the fakes write down would look like a leak.
        self.world.repository.log = Nothing()
        self.world.repository.status_log = Nothing()
        self.world.stores.journal = self.world.catalog._journal = Nothing()
        self.world.events = Nothing()

    def held(self) -> dict[str, object]:
        """Return what is held, apart from memory."""
        world = self.world
        filesystem = world.filesystem
        return {
            "files": len(world.stores.open_files),
            "connections": world.repository.connections(),
            "images": len(list(filesystem.names.all_images())),
            "active": len(list(filesystem.active_images())),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "threads": sum(limiter.borrowed_tokens for limiter in threads.limiters),
            "reserved": filesystem.budget._reserved,
            "waiting": filesystem.totals.waiting,
            "jobs": len(world.jobs.statistics()),
            "rows": len(world.catalog.records),
            "handles": sum(len(handles) for handles in world.handles.values()),
        }

    async def check(self, operation: Operation, count: int) -> None:
        """Repeat an operation `count` times, and compare what is held before and after."""
        for _ in range(max(200, count // 10)):
            await operation()
        await trio.sleep(100)
        before = self.held()
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(count):
                await operation()
            await trio.sleep(100)
            assert self.held() == before
            gc.collect()
            kept = _kept_bytes()
        finally:
            tracemalloc.stop()
        assert kept < ALLOWED, f"{kept / count:.0f} bytes stay of each operation"


def _kept_bytes() -> int:
    """Return how many bytes were allocated since and are still held.

    What the fakes hold is left out, because their disks grow as real disks do.
    """
    only_lazyfs = [tracemalloc.Filter(inclusive=False, filename_pattern=fakes.__file__)]
    snapshot = tracemalloc.take_snapshot().filter_traces(only_lazyfs)
    return sum(trace.size for trace in snapshot.traces)


async def whole(world: World, name: str) -> Image:
    await world.command("prefetch", path=name)
    image = world.image(name)
    await until(lambda: image.record.state is State.WHOLE)
    return image


async def test_opens_and_closes() -> None:
    soak = Soak()
    async with soak.world.daemon():

        async def operation() -> None:
            await soak.world.close(await soak.world.open("open"))

        await soak.check(operation, OPERATIONS)


async def test_reads_of_what_is_present() -> None:
    soak = Soak()
    async with soak.world.daemon():
        image = await soak.world.open("present")
        await soak.world.read(image, 0, 16 * BLOCK)

        async def operation() -> None:
            await soak.world.read(image, BLOCK, 100)
            await trio.lowlevel.checkpoint()

        await soak.check(operation, OPERATIONS)
        await soak.world.close(image)


async def test_reads_of_what_is_missing() -> None:
    soak = Soak()
    blocks = iter(range(OPERATIONS + 2000))
    async with soak.world.daemon():
        image = await soak.world.open("missing")
        await soak.world.read(image, 0, 10)

        async def operation() -> None:
            await soak.world.read(image, next(blocks) * BLOCK, 100)

        await soak.check(operation, OPERATIONS)
        assert image.present_bytes > OPERATIONS * BLOCK
        await soak.world.close(image)


@pytest.mark.parametrize("kind", ["failed", "refused", "full", "timed out", "lost data"])
async def test_reads_that_fail(kind: str) -> None:
    soak = Soak()
    world = soak.world
    async with world.daemon():
        name = {"failed": "failed", "timed out": "down"}.get(kind, "refused")
        image = await world.open(name)
        await world.read(image, 0, 10)
        offset = 9 * BLOCK
        if kind == "failed":
            await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("failed", "1", "2"))
        elif kind == "refused":
            world.repository.fail(name, ByteRange(offset, offset + 1), errno.EIO)
        elif kind == "full":
            world.stores.full = True
        elif kind == "timed out":
            world.repository.down = True
        else:
            world.stores.checkpoint_error = errors.CacheCorrupt("lost")
            await trio.sleep(100)
            world.stores.checkpoint_error, offset = None, 0

        async def operation() -> None:
            if kind == "full":
                await world.read(image, offset, 10)
                return
            try:
                await world.read(image, offset, 10)
            except errors.LazyfsError:
                await trio.sleep(0.1)
            else:
                raise AssertionError("it has not failed")

        await soak.check(operation, OPERATIONS if kind != "timed out" else CYCLES)
        world.repository.down = world.stores.full = False
        await world.close(image)


@pytest.mark.parametrize("kind", ["query-map", "query-images", "pin", "touch", "uses", "refresh"])
async def test_commands(kind: str) -> None:
    soak = Soak()
    world = soak.world
    async with world.daemon(populate=True):
        image = await whole(world, "whole")
        pinned = False

        async def operation() -> None:
            nonlocal pinned
            if kind == "pin":
                pinned = not pinned
                await world.command("pin" if pinned else "unpin", path="whole")
            elif kind == "touch":
                await world.operations.touch(image, 123)
            elif kind == "uses":
                image.note_use(image.record.last_used_ns + 1)
                await world.filesystem.save_uses()
            elif kind == "refresh":
                await world.filesystem.refresh()
            elif kind == "query-map":
                await world.command("query-map", path="whole")
            else:
                await world.command("query-images")

        await soak.check(operation, OPERATIONS if kind not in ("query-images",) else CYCLES)


@pytest.mark.parametrize("kind", ["evict", "verify", "change", "come and go", "refused"])
async def test_lives(kind: str) -> None:
    soak = Soak()
    world = soak.world
    if kind == "change":
        world.options = _replacing(world)
    versions = _versions()
    async with world.daemon(populate=True):

        async def operation() -> None:
            if kind == "come and go":
                world.repository.add("new", next(versions))
                await world.filesystem.refresh()
                await world.close(await world.open("new"))
                del world.repository.exports["new"]
                await world.filesystem.refresh()
                await world.command("forget", path="new")
                return
            if kind == "refused":
                await world.command("pin", path="cycle")
                with suppress(CommandError):
                    await world.command("evict", path="cycle")
                await world.command("unpin", path="cycle")
            image = await whole(world, "cycle")
            if kind == "verify":
                answer = await world.command("verify", path="cycle")
                job = answer["id"]
                await until(
                    lambda: any(
                        one.id == job and one.status == "concluded"
                        for one in world.jobs.statistics()
                    )
                )
                await world.command("job-dismiss", id=job)
            elif kind == "change":
                await world.open_image(image, whole=True)
                world.repository.add("cycle", next(versions))
                await world.filesystem.refresh()
                await world.close(image, whole=True)
            await world.command("evict", path="cycle")

        await soak.check(operation, CYCLES)


def _replacing(world: World) -> Options:

    return replace(world.options, replace_changed=True)


def _versions() -> Iterator[bytes]:
    """Yield contents of two sizes by turns, so that each is seen to be another version."""
    contents = pattern(16 * BLOCK), pattern(17 * BLOCK)
    while True:
        yield contents[1]
        yield contents[0]
