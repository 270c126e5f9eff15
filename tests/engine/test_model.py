"""Compares random operations and faults with what the bytes should be. Nothing wrong may be
served.

These tests are not asynchronous themselves, because each example is a run of its own.
"""

import errno
from dataclasses import dataclass

import pytest
import trio
from engine_world import World, run, threads, until
from fakes import pattern
from hypothesis import example, given
from hypothesis import strategies as st
from test_filesystem import tree

from lazyfs import errors
from lazyfs.core import extent_map
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.image import Image
from lazyfs.engine.sizes import NO_SIZES_S
from lazyfs.units import KiB

BLOCK = 16 * KiB
SIZES = {"a": 40 * BLOCK - 512, "b/c": 9 * BLOCK + 1}


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extent_map, "WINDOW", 16 * BLOCK)
        yield


# -- operations

names = st.sampled_from(sorted(SIZES))
seconds = st.sampled_from([0.0, 0.01, 1.0, 7.0, 100.0])


@st.composite
def ranges(draw: st.DrawFn) -> ByteRange:
    start = draw(st.integers(0, 40 * BLOCK))
    return ByteRange(
        start, start + draw(st.sampled_from([1, 512, 4096, BLOCK, 3 * BLOCK, 40 * BLOCK]))
    )


@st.composite
def grain_ranges(draw: st.DrawFn) -> ByteRange:
    start = draw(st.integers(0, 40 * 4 - 1)) * 4096
    return ByteRange(start, start + draw(st.integers(1, 40)) * 4096)


@dataclass(frozen=True)
class Read:
    """One of several reads at the same time."""

    name: str
    where: ByteRange
    start_s: float
    patience_s: float | None


reads = st.builds(
    Read, names, ranges(), st.sampled_from([0.0, 0.0, 0.5, 1.5]), st.sampled_from([None, None, 0.7])
)

operations = st.one_of(
    st.tuples(st.just("read"), st.lists(reads, min_size=1, max_size=6)),
    st.tuples(st.just("read"), st.lists(reads, min_size=1, max_size=6)),
    st.tuples(st.just("sleep"), seconds),
    st.tuples(st.just("close"), names),
    st.tuples(st.just("fail"), names, grain_ranges()),
    st.tuples(st.just("heal")),
    st.tuples(st.just("delay"), st.sampled_from([0.0, 0.3, 2.0])),
    st.tuples(st.just("thread delay"), st.sampled_from([0.0, 0.3, 2.0])),
    st.tuples(st.just("down"), st.booleans()),
    st.tuples(st.just("outage"), seconds),
    st.tuples(st.just("hang"), st.booleans()),
    st.tuples(st.just("full"), st.booleans()),
    st.tuples(st.just("unsaved"), st.booleans()),
    st.tuples(st.just("change"), names),
    st.tuples(st.just("change back"), names),
    st.tuples(st.just("refresh")),
)
lives = st.lists(
    st.tuples(
        st.lists(operations, max_size=12), st.booleans(), st.booleans()
    ),  # operations, populate, crash
    min_size=1,
    max_size=4,
)


class Model:
    """Knows what is open, what may go wrong, and what every byte should be."""

    def __init__(self, holes: dict[str, list[ByteRange]], replace_changed: bool) -> None:
        self.world = World(block_size=BLOCK, replace_changed=replace_changed, fill_rate=64 * KiB)
        self.world.may_leave_files_open = replace_changed
        self.holes = holes
        self.contents: dict[tuple[str, str], bytes] = {}
        self.open_files: dict[str, Image] = {}
        self.bad: list[tuple[str, ByteRange]] = []
        self.changed: set[str] = set()
        self.unreachable = False
        self.unreachable_at = -NO_SIZES_S
        for name in SIZES:
            self.change(name)

    def change(self, name: str) -> None:
        version = sum(1 for known, _ in self.contents if known == name)
        size = SIZES[name] + (BLOCK if version == 2 else 0)
        made = self.world.repository.add(
            name, pattern(size, version), self.holes.get(name, []), f"version {version}"
        )
        self.contents[name, made.identity] = made.content
        if version:
            self.changed.add(name)

    def change_back(self, name: str) -> None:
        first = self.contents[name, "version 0"]
        holes = self.holes.get(name, [])
        assert self.world.repository.add(name, first, holes, "version 0").content == first

    def reset(self) -> None:
        """End every fault that is not one of the disk or the export."""
        self.world.repository.down = self.world.stores.full = self.unreachable = False
        self.world.stores.checkpoint_error = None
        self.world.repository.delay_s = threads.delay_s = 0
        self.world.repository.go_on()
        self.world.repository.heal()
        self.bad.clear()

    async def live(self, todo: list[tuple[object, ...]], populate: bool, crash: bool) -> None:
        async with self.world.daemon(populate=populate, crash=crash):
            for operation in todo:
                await self.perform(*operation)
            if not crash:
                for name in list(self.open_files):
                    await self.close(name)
            self.open_files.clear()

    async def perform(self, what: object, *arguments: object) -> None:  # noqa: C901, PLR0912, PLR0915 - a table
        self.may_time_out()
        repository, stores = self.world.repository, self.world.stores
        match (what, *arguments):
            case "read", list() as wanted:
                async with trio.open_nursery() as nursery:
                    for one in wanted:
                        nursery.start_soon(self.read, one)
            case "sleep", float(time_s):
                await trio.sleep(time_s)
            case "close", str(name):
                await self.close(name)
            case "fail", str(name), ByteRange() as where:
                repository.fail(name, where)
                self.bad.append((name, where))
            case ("heal",):
                repository.heal()
                self.bad.clear()
            case "delay", float(time_s):
                repository.delay_s = time_s
            case "thread delay", float(time_s):
                threads.delay_s = time_s
            case "down", bool(on):
                repository.down = on
            case "outage", float(time_s):
                async with trio.open_nursery() as nursery:
                    repository.down = self.unreachable = True
                    for name in SIZES:
                        nursery.start_soon(
                            self.read, Read(name, ByteRange(5, 12 * BLOCK), 0.0, None)
                        )
                    await trio.sleep(time_s)
                    self.may_time_out()
                    repository.down = False
                self.unreachable = False
            case "hang", True:
                repository.hang()
            case "hang", False:
                repository.go_on()
            case "full", bool(on):
                stores.full = on
            case "unsaved", bool(on):
                stores.checkpoint_error = errors.NoSpace() if on else None
            case "change", str(name):
                self.change(name)
            case "change back", str(name):
                self.change_back(name)
            case ("refresh",):
                with trio.move_on_after(10):
                    try:
                        await self.world.filesystem.refresh()
                    except errors.ConnectionLost:
                        assert repository.down
            case _:
                raise AssertionError(what)

    def may_time_out(self) -> bool:
        repository = self.world.repository
        if self.unreachable or repository.down or not repository._running.is_set():
            self.unreachable_at = trio.current_time()
        return trio.current_time() <= self.unreachable_at + NO_SIZES_S

    async def read(self, one: Read) -> None:
        await trio.sleep(one.start_s)
        patience = trio.move_on_after(float("inf") if one.patience_s is None else one.patience_s)
        blame = f"{one} at {trio.current_time()}"
        try:
            with patience:
                image = await self.open(one.name)
                content = self.contents[one.name, image.record.identity]
                got = await self.world.read(image, one.where.start, one.where.length)
                assert got == content[one.where.start : one.where.end], blame
        except errors.TimedOut:
            assert self.may_time_out(), blame
        except errors.RequestFailed:
            whole = one.where.align_out(BLOCK, 100 * BLOCK)
            assert any(name == one.name and where.overlaps(whole) for name, where in self.bad), (
                blame
            )
        except (errors.ExportChanged, errors.UserError):  # the latter after a restart
            assert one.name in self.changed, blame

    async def open(self, name: str) -> Image:
        if name not in self.open_files:
            image = await self.open_by_name(name)
            if name in self.open_files:  # somebody was faster
                await self.world.close(image)
            else:
                self.open_files[name] = image
        return self.open_files[name]

    async def open_by_name(self, name: str) -> Image:
        """Open as the kernel does, which looks up again an inode that has just been replaced."""
        while True:
            try:
                return await self.world.open(name)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                await trio.sleep(0.1)

    async def close(self, name: str) -> None:
        if name in self.open_files:
            await self.world.close(self.open_files.pop(name))

    async def end(self) -> None:
        """End all faults, and check that every image becomes whole and that every byte is right."""
        self.reset()
        async with self.world.daemon(populate=True):
            for name in SIZES:
                if not self.world.options.replace_changed:
                    self.change_back_to_what_is_cached(name)
            await self.world.filesystem.refresh()
            for name in SIZES:
                image = await self.world.open(name)
                await until(lambda: image.record.state is State.WHOLE)  # noqa: B023 - it is awaited here
                content = self.contents[name, image.record.identity]
                assert await self.world.read(image, 0, len(content) + 1) == content
                assert self.world.stores.plain[image.record.path] == content
                await self.world.close(image)
            assert sorted(self.world.stores.plain) == sorted(tree(self.world))
            assert not self.world.stores.partials

    def change_back_to_what_is_cached(self, name: str) -> None:
        record = self.world.image(name).record
        if record.state is not State.REMOTE:
            content = self.contents[name, record.identity]
            holes = self.holes.get(name, [])
            assert (
                self.world.repository.add(name, content, holes, record.identity).content == content
            )


some_holes = st.fixed_dictionaries({name: st.lists(grain_ranges(), max_size=3) for name in SIZES})


@given(some_holes, st.booleans(), lives)
@example(
    {},
    True,
    [([("read", [Read("a", ByteRange(0, 40 * BLOCK), 0.0, None)]), ("change", "a")], True, False)],
)
def test_no_byte_is_ever_wrong(
    holes: dict[str, list[ByteRange]],
    replace_changed: bool,
    todo: list[tuple[list[tuple[object, ...]], bool, bool]],
) -> None:
    async def scenario() -> None:
        model = Model(holes, replace_changed)
        for operations, populate, crash in todo:
            await model.live(operations, populate, crash)
        await model.end()

    run(scenario)


@given(
    some_holes,
    st.lists(reads.filter(lambda r: r.patience_s is None), max_size=20),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_without_faults_each_byte_of_data_is_fetched_exactly_once(
    holes: dict[str, list[ByteRange]],
    wanted: list[Read],
    populate: bool,
    delay_s: float,
    thread_delay_s: float,
) -> None:
    async def scenario() -> None:
        model = Model(holes, replace_changed=False)
        world = model.world
        world.repository.delay_s, threads.delay_s = delay_s, thread_delay_s
        async with world.daemon(populate=populate):
            async with trio.open_nursery() as nursery:
                for one in wanted:
                    nursery.start_soon(model.read, one)
            for name in list(model.open_files):
                await model.close(name)
            await trio.sleep(10)  # what is under way is kept
        async with world.daemon(populate=True):
            for name in SIZES:
                image = await world.open(name)
                await until(lambda: image.record.state is State.WHOLE)  # noqa: B023 - it is awaited here
                data = sum(piece.length for piece in world.repository.exports[name].data)
                # What the first daemon's end cut off may be asked for again.
                assert world.repository.bytes_read(name, "demand") <= data
                if populate is False:
                    assert world.repository.bytes_read(name) == data
                now = image.statistics()
                assert now.present_bytes <= data  # a block of zeroes is kept as a hole
                assert now.present_bytes + now.zero_bytes == now.size
                await world.close(image)

    run(scenario)


# -- names

shown = st.lists(
    st.text(st.sampled_from("ab/.%\0") | st.characters(codec="utf-8"), max_size=6), max_size=12
)


@given(st.lists(shown, min_size=1, max_size=4))
def test_whatever_is_listed_each_export_has_one_path_of_its_own(lists: list[list[str]]) -> None:
    async def scenario() -> None:
        world = World()
        async with world.daemon():
            for listed in lists:
                world.repository.exports = {}
                for name in listed:
                    world.repository.add(name, b"")
                await world.filesystem.refresh()
                found = tree(world)
                assert sorted(found.values()) == sorted(set(listed))
        async with world.daemon():
            assert tree(world) == found

    run(scenario)
