"""Runs a whole engine over the fakes, on a clock that jumps, so hours of outage take
microseconds.

A mock clock knows nothing about threads, and would jump while a thread works. So `run` replaces
trio's threads by calls in the loop that behave as trio promises: other tasks run before and after a
call; a call waits for a token of its limiter, and can be cancelled while it waits; a call that has
begun is not cancelled, but may be abandoned.
"""

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import trio
from fakes import FakePresentReader, FakeRepository, MemoryCatalog, MemoryStores, Request
from trio.testing import MockClock

from lazyfs import assembly, errors
from lazyfs.control.jobs import Jobs
from lazyfs.core import control_schema, qmp_wire
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.eviction import Limits
from lazyfs.engine.fetch.demand_reader import DemandReader
from lazyfs.engine.filesystem import Filesystem, Options
from lazyfs.engine.image.handles import Handle, PartialHandle
from lazyfs.engine.image.image import Image
from lazyfs.engine.operations import Operations
from lazyfs.engine.population import Population
from lazyfs.engine.room import Room
from lazyfs.engine.supervision import Supervisor
from lazyfs.engine.totals import Read
from lazyfs.units import KiB

BLOCK = 64 * KiB
IO_TIMEOUT_S = 30.0
FIRST_LIST_S = 10.0


class InlineThreads:
    """Replaces `trio.to_thread.run_sync` during `run`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.delay_s = 0.0
        """How long every call takes, by the clock."""
        self.on_call: Callable[[int], Awaitable[None]] | None = None
        """Awaited with the number of each call before the call gets its token. It may be
        cancelled, or raise."""
        self.calls = 0
        self.limiters: set[trio.CapacityLimiter] = set()
        """The limiters that were used."""
        self._default: trio.CapacityLimiter | None = None

    async def run_sync(
        self,
        call: Callable[..., Any],
        *args: Any,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._default is None:
            self._default = trio.CapacityLimiter(40)
        limiter = limiter or self._default
        self.limiters.add(limiter)
        self.calls += 1
        if self.on_call is not None:
            await self.on_call(self.calls - 1)
        await limiter.acquire_on_behalf_of(holder := object())
        try:
            with trio.CancelScope(shield=not abandon_on_cancel):
                try:
                    await trio.sleep(self.delay_s)
                except trio.Cancelled:  # a thread that is abandoned still does its work
                    with suppress(Exception):
                        call(*args)
                    raise
            return call(*args)
        finally:
            limiter.release_on_behalf_of(holder)
            await trio.lowlevel.cancel_shielded_checkpoint()


threads = InlineThreads()


def run(
    test: Callable[[], Awaitable[Any]],
    clock: object = None,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> Any:
    """Call `trio.run` with a jumping clock, inline threads, and a fixed order of tasks."""
    assert clock is None, "this runner brings its own clock"
    real = trio.to_thread.run_sync
    threads.reset()
    # Hypothesis' trio support does the same, because there is no public way.
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio._core._run._r = random.Random(0)
    try:
        trio.to_thread.run_sync = threads.run_sync  # type: ignore[assignment]
        return trio.run(test, clock=MockClock(autojump_threshold=0), instruments=instruments)
    finally:
        trio.to_thread.run_sync = real


def blocks(first: int, end: int | None = None) -> ByteRange:
    """Return the bytes of blocks `[first, end)`, or of one block if `end` is left out."""
    return ByteRange(first * BLOCK, (first + 1 if end is None else end) * BLOCK)


class World:
    """Holds a repository, a cache directory and a catalog.

    They outlive the daemons that run over them.
    """

    def __init__(self, limits: Limits = Limits(), **options: Any) -> None:  # noqa: B008 - it is frozen
        self.limits = limits
        self.backing_files: Callable[[], frozenset[str]] = frozenset
        self.room: Room
        self.repository = FakeRepository()
        self.stores = MemoryStores()
        self.catalog = MemoryCatalog(self.stores.journal)
        self.options = replace(
            Options(
                block_size=BLOCK, io_timeout_s=IO_TIMEOUT_S, replace_changed=False, populate=True
            ),
            **options,
        )
        self.may_leave_files_open = False
        """True if a daemon may end with open files. One that ends during a replacement leaves
        the old file to the operating system."""
        self.present = FakePresentReader()
        self.filesystem: Filesystem
        self.population: Population
        self.jobs: Jobs
        self.operations: Operations
        self.supervisor: Supervisor
        self.handles: dict[tuple[int, bool], list[Handle]] = {}
        """What the tests have open, by inode and by whether it was opened as a whole image."""
        self.events: list[tuple[str, str]] = []
        """(job, status) and (path, state), as clients are told them."""

    async def _backing_files(self) -> frozenset[str]:
        return self.backing_files()

    @asynccontextmanager
    async def daemon(
        self, *, populate: bool = False, crash: bool = False
    ) -> AsyncIterator["World"]:
        """Run a daemon as `daemon.py` does.

        It ends with the block: cleanly, or with `crash` as if it was killed.
        """
        self.stores.sweep(self.catalog.load())
        self.handles.clear()
        async with trio.open_nursery() as nursery:
            self.repository.nursery = nursery
            parts = assembly.build(
                mountpoint="/mnt",
                repository=self.repository,
                stores=self.stores,
                catalog=self.catalog,
                records=self.catalog.load(),
                options=self.options,
                limits=self.limits,
                backing_files=self._backing_files,
                nursery=nursery,
                present=self.present,
            )
            self.filesystem = filesystem = parts.filesystem
            self.operations, self.room, self.population = (
                parts.operations,
                parts.room,
                parts.population,
            )
            self.jobs, self._commands, self.supervisor = (
                parts.jobs,
                parts.commands.handlers,
                parts.supervisor,
            )
            filesystem.list_trouble = "the repository does not answer"
            with trio.move_on_after(FIRST_LIST_S), suppress(errors.ConnectionLost):
                await filesystem.refresh()
            try:
                async with trio.open_nursery() as inner:
                    assembly.wire(parts, self._emit)
                    await assembly.start(parts, inner, populate=populate)
                    await filesystem.resume()
                    yield self
                    inner.cancel_scope.cancel()
            finally:
                if not crash:
                    with trio.CancelScope(shield=True):
                        await filesystem.aclose()
                nursery.cancel_scope.cancel()
        if crash:
            self.stores.crash()
        assert not self.stores.odd_writes
        assert not self.stores.open_files or self.may_leave_files_open
        self.stores.open_files.clear()

    def _emit(self, _name: str, data: dict[str, object]) -> None:
        if "id" in data:
            self.events.append((str(data["id"]), str(data["status"])))
        else:
            self.events.append((str(data["path"]), str(data["state"])))

    # -- shorthands

    async def command(self, name: str, **arguments: Any) -> Any:
        """Run a command of the control socket."""
        schema = next(one for one in control_schema.COMMANDS if one.name == name)
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        control_schema.check_arguments(schema, arguments)
        returned = {"return": await self._commands[name](arguments)}
        answer = json.loads(qmp_wire.encode(returned))["return"]
        check_answer(schema, answer)
        return answer

    def image(self, name: str) -> Image:
        """Return the image that has this export's name now."""
        return self.filesystem.names._by_export[name]

    async def open(self, name: str) -> Image:
        image = self.image(name)
        await self.open_image(image)
        return image

    async def open_image(self, image: Image, whole: bool = False, look: bool = False) -> None:
        """Open as the kernel does: by the first inode number or, with `whole`, by the second.

        With `look`, nobody means to use the image. Otherwise it counts as used at once.
        """
        opened: Handle = await (
            self.filesystem.open_whole(image) if whole else self.filesystem.open(image)
        )
        if isinstance(opened, PartialHandle) and not look:
            opened.mean()
        self.handles.setdefault((image.inode, whole), []).append(opened)

    async def close(self, image: Image, whole: bool = False) -> None:
        await self.handles[image.inode, whole].pop().aclose()

    async def read(
        self, image: Image, offset: int, length: int, whole: bool = False, read: Read | None = None
    ) -> bytes:
        return await self.handles[image.inode, whole][-1].read(offset, length, read)

    def reader(self, image: Image) -> DemandReader:
        assert image.filling is not None
        return image.filling.reader

    async def check(self, image: Image, where: ByteRange, content: bytes | None = None) -> None:
        """Read, and compare with the export, or with an older `content` of it."""
        if content is None:
            content = self.repository.exports[image.record.export].content
        got = await self.read(image, where.start, where.length)
        assert got == content[where.start : where.end], f"wrong bytes at {where}"

    def demand(self, name: str | None = None) -> list[ByteRange]:
        return self.repository.reads(name, "demand")

    def fills(self, name: str | None = None) -> list[Request]:
        return [
            r
            for r in self.repository.log
            if r.kind == "fill" and (name is None or r.export == name)
        ]


JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "number": (int, float),
    "list": list,
    "object": dict,
}


def check_answer(schema: control_schema.Command | control_schema.Event, answer: Any) -> None:
    """Compare an answer, or the data of an event, with what the schema declares."""
    if isinstance(schema, control_schema.Event):
        rows, fields = [answer], schema.data
    else:
        rows, fields = (answer if schema.returns_list else [answer]), schema.returns
    assert isinstance(rows, list)
    for row in rows:
        assert row.keys() <= {field.name for field in fields}, (schema.name, row)
        for field in fields:
            if field.name not in row:
                assert field.optional, (schema.name, field.name)
            elif row[field.name] is None:
                assert field.nullable, (schema.name, field.name)
            else:
                value = row[field.name]
                assert isinstance(value, JSON_TYPES[field.type]), (schema.name, field.name, value)
                assert isinstance(value, bool) == (field.type == "bool"), (
                    schema.name,
                    field.name,
                    value,
                )


async def until(condition: Callable[[], object], limit_s: float = 300.0) -> None:
    """Let time pass until `condition` holds."""
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.01)


def seconds_to_next_wakeup() -> float:
    """Return when the next task wakes up, or inf if none will wake up by itself."""
    return trio.lowlevel.current_statistics().seconds_to_next_deadline
