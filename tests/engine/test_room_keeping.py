"""Tests the limits of the cache: what is evicted, what pauses, and that no reader notices."""

import math
from dataclasses import replace

import pytest
import trio
from engine_world import World, blocks, run, seconds_to_next_wakeup, threads, until
from fakes import pattern
from trio.testing import wait_all_tasks_blocked

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.eviction import Limits
from lazyfs.core.lifecycle import State
from lazyfs.engine import room
from lazyfs.engine.image.image import Image
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 4 * MiB
LIMIT = 10 * MiB


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the time of day by a counter.

    Uses are told apart by the time of day, which a jumping clock does not move.
    """
    now = iter(range(1, 1 << 60))
    monkeypatch.setattr("time.time_ns", lambda: next(now))


def world_with(
    *names: str, limits: Limits | None = None, size: int = SIZE, **options: object
) -> World:
    world = World(Limits(max_cache=LIMIT) if limits is None else limits, **options)
    for seed, name in enumerate(names):
        world.repository.add(name, pattern(size, seed))
    return world


def state(world: World, name: str) -> State:
    return world.image(name).record.state


async def is_whole(world: World, name: str) -> None:
    await until(lambda: state(world, name) is State.WHOLE)


async def fill(world: World, *names: str) -> None:
    """Use images one after the other, each until it is whole."""
    for name in names:
        image = await world.open(name)
        await is_whole(world, name)
        await world.close(image)


async def read_all(world: World, image: Image) -> None:
    for start in range(0, SIZE, 256 * KiB):
        await world.check(image, ByteRange(start, start + 256 * KiB))


def within(world: World, limit: int = LIMIT) -> bool:
    return world.stores.peak <= limit and world.room.statistics().used <= limit


# -- evicting


async def test_population_evicts_the_least_recently_used() -> None:
    world = world_with("a", "b", "c", "d")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        await world.close(await world.open("a"))  # now b was used longest ago
        await fill(world, "c")
        assert [state(world, name) for name in "abc"] == [State.WHOLE, State.REMOTE, State.WHOLE]
        await fill(world, "d")
        assert [state(world, name) for name in "abcd"] == [
            State.REMOTE,
            State.REMOTE,
            State.WHOLE,
            State.WHOLE,
        ]
        assert set(world.stores.plain) == {"c", "d"}
        assert within(world)
        assert (
            world.repository.bytes_read() == 4 * SIZE
        )  # whatever was evicted, nothing was fetched twice


async def test_an_evicted_image_is_as_one_never_used() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b", "c")
        assert state(world, "a") is State.REMOTE
        await trio.sleep(100)
        assert state(world, "a") is State.REMOTE  # and not filled again by itself
        image = await world.open("a")
        await read_all(world, image)
        await is_whole(world, "a")
        assert state(world, "b") is State.REMOTE
        assert within(world)


async def test_readers_evict_too_and_are_kept() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
    async with world.daemon(populate=False):
        image = await world.open("c")
        await read_all(world, image)
        await read_all(world, image)
        await until(lambda: state(world, "c") is State.WHOLE)
        assert [state(world, name) for name in "ab"] == [State.REMOTE, State.WHOLE]
        # Reads come as fast as this machine can: what they brought in the moment of the eviction
        # may not be kept.
        assert world.repository.bytes_read("c", "demand") <= SIZE + MiB
        assert within(world)


async def test_it_stops_at_the_mark() -> None:
    """No more images of 1 MiB are evicted than it takes to free two headrooms."""
    names = [f"{i}" for i in range(14)]
    world = world_with(*names, size=MiB)
    async with world.daemon(populate=True):
        await fill(world, *names)
        whole = [name for name in names if state(world, name) is State.WHOLE]
        assert whole == names[-len(whole) :]
        assert world.room.statistics().used == 9 * MiB
        assert within(world)


async def test_a_limit_that_is_lower_after_a_restart() -> None:
    world = world_with("a", "b", "c", limits=Limits(max_cache=100 * MiB))
    async with world.daemon(populate=True):
        await fill(world, "a", "b", "c")
    world.limits = Limits(max_cache=5 * MiB)
    async with world.daemon(populate=True):
        await until(lambda: world.room.statistics().used <= 5 * MiB)
        assert [state(world, name) for name in "abc"] == [State.REMOTE, State.REMOTE, State.WHOLE]


async def test_without_limits_nothing_is_evicted() -> None:
    world = world_with("a", "b", "c", limits=Limits())
    async with world.daemon(populate=True):
        await fill(world, "a", "b", "c")
        assert world.room.statistics().used == 3 * SIZE
        assert world.room.message == ""


async def test_min_free_counts_what_neighbours_take() -> None:
    world = world_with("a", "b", limits=Limits(min_free_percent=25))
    world.stores.disk_size = 32 * MiB
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        world.stores.neighbours = 15 * MiB
        await trio.sleep(room.WATCH_S + 1)
        assert state(world, "a") is State.WHOLE  # 9 MiB are free, and 8 have to be
        world.stores.neighbours = 18 * MiB
        await trio.sleep(room.WATCH_S + 1)
        assert [state(world, name) for name in "ab"] == [State.REMOTE, State.WHOLE]
        now = world.room.statistics()
        assert (now.total, now.free, now.min_free) == (32 * MiB, 10 * MiB, 8 * MiB)


async def test_min_free_holds_population_and_reads() -> None:
    world = world_with("a", "b", limits=Limits(min_free=26 * MiB))
    world.stores.disk_size = 32 * MiB
    async with world.daemon(populate=True):
        image = await world.open("a")
        other = await world.open("b")
        await until(lambda: world.room.message)
        await read_all(world, image)
        await read_all(world, other)
        assert world.stores.space().free >= 26 * MiB
        assert "--min-free is 26 MiB" in world.room.message
        world.stores.disk_size = 64 * MiB
        await is_whole(world, "a")
        await is_whole(world, "b")


# -- who is not evicted


async def test_never_an_open_one_whatever_its_age() -> None:
    world = world_with("a", "b", "c", "d")
    async with world.daemon(populate=True):
        old = await world.open("a")
        await is_whole(world, "a")
        await fill(world, "b", "c", "d")
        assert [state(world, name) for name in "abcd"] == [
            State.WHOLE,
            State.REMOTE,
            State.REMOTE,
            State.WHOLE,
        ]
        await read_all(world, old)
        assert not old.retired


async def test_one_that_is_opened_while_overlays_are_scanned_stays() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        opened: list[Image] = []

        def scan() -> frozenset[str]:
            if not opened:
                # What an open does before it waits for anything; the rest follows when the scan is
                # over.
                opened.append(world.image("a"))
                opened[0]._opening["an open under way"] = None
            return frozenset()

        world.backing_files = scan
        await fill(world, "c")
        assert [state(world, name) for name in "abc"] == [State.WHOLE, State.REMOTE, State.WHOLE]
        opened[0]._opening.clear()


@pytest.mark.parametrize("why", ["open", "pinned", "backing files", "overlays unreadable"])
async def test_with_nobody_to_evict_population_pauses_and_reads_go_on(why: str) -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        before = dict(world.stores.plain)
        held = [await world.open(name) for name in "ab"] if why == "open" else []
        if why == "pinned":
            for name in "ab":
                await world.image(name).annotate(lambda record: record.with_pin(True))
        elif why == "backing files":
            world.backing_files = lambda: frozenset({"a", "b"})
        elif why == "overlays unreadable":
            world.backing_files = unreadable
        image = await world.open("c")
        await until(lambda: world.population.paused)
        assert world.population.paused == world.room.message
        assert "the cache takes" in world.room.message
        assert ("/vms cannot be read" in world.room.message) == (why == "overlays unreadable")
        assert ("overlays need" in world.room.message) == (why == "backing files")
        began = trio.current_time()
        for _ in range(2):
            await read_all(world, image)
        assert trio.current_time() < began + 1  # nobody waited for an eviction
        assert "reads are served from the repository and not kept" in image.statistics().error
        fills = len(world.fills())
        await trio.sleep(600)
        assert len(world.fills()) == fills
        assert world.stores.plain == before
        assert within(world)
        # It resumes by itself.
        if why == "open":
            await world.close(held[0])
        elif why == "pinned":
            await world.operations.pin(world.image("b"), False)
        else:
            world.backing_files = lambda: frozenset({"a"})
        await is_whole(world, "c")
        assert world.population.paused == world.room.message == image.statistics().error == ""
        assert [state(world, name) for name in "ab"].count(State.REMOTE) == 1
        assert within(world)
        for image in held[1:]:
            await read_all(world, image)


def unreadable() -> frozenset[str]:
    raise errors.UserError("/vms cannot be read (Permission denied), and overlays may be there")


async def test_after_detach_nothing_is_evicted() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        world.room.may_evict = False
        await world.open("c")
        await until(lambda: world.population.paused)
        assert "nothing is evicted after detach" in world.room.message
        await trio.sleep(100)
        assert set(world.stores.plain) == {"a", "b"}


async def test_what_can_never_be_met_evicts_nobody() -> None:
    """An example is the map of a huge image, if the map alone is larger than the cache may be."""
    world = world_with("a", "b")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        for _ in range(20):
            assert not world.filesystem.budget.reserve(2 * LIMIT)
            await trio.sleep(5)
            assert world.room.message == "", "others may go on"
        assert set(world.stores.plain) == {"a", "b"}
        world.backing_files = lambda: frozenset({"a"})
        assert not world.filesystem.budget.reserve(LIMIT - SIZE + MiB)  # b alone would not do
        await trio.sleep(5)
        assert set(world.stores.plain) == {"a", "b"}


async def test_one_that_cannot_go_leaves_it_to_others(caplog: pytest.LogCaptureFixture) -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        world.stores.plain["a"] = b"mine"
        await fill(world, "c")
        assert [state(world, name) for name in "abc"] == [State.WHOLE, State.REMOTE, State.WHOLE]
        await world.operations.evict(world.image("c"))
        await world.image("c").annotate(lambda record: record.with_pin(True))
        image = await world.open("c")
        await is_whole(world, "c")
        await world.open("b")
        await until(lambda: world.room.message != "")
        assert "a cannot be evicted: a: the plain file has 4 bytes" in world.room.message
        await trio.sleep(30)
        assert caplog.text.count("cannot be evicted: image=a") == 1
        await world.close(image)


async def test_the_last_copy_of_a_whole_image_stays() -> None:
    """Its export has changed, so the next fetch would bring another version."""
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        world.repository.add("a", pattern(SIZE, 9), identity="new")
        await world.filesystem.refresh()
        assert "changed in the repository" in world.image("a").record.error
        await fill(world, "c")
        assert [state(world, name) for name in "abc"] == [State.WHOLE, State.REMOTE, State.WHOLE]


async def test_waiting_for_room_makes_no_connections() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        held = [await world.open(name) for name in "ab"]
        others = []
        for _ in range(3):
            while reservation := world.filesystem.budget.reserve(KiB):
                others.append(reservation)
            await trio.sleep(2)  # it is counted again
        image = await world.open("c")
        await world.check(image, blocks(0, 2))
        fetcher = image.filling
        await trio.sleep(100)
        assert image.filling is fetcher
        assert "not kept" in image.statistics().error
        for reservation in others:
            reservation.release()
        for one in held:
            await world.close(one)
        await is_whole(world, "c")
        assert image.filling is not fetcher


async def test_overlays_alone_are_not_scanned_all_the_time() -> None:
    world = world_with("a", "b", "c")
    scans: list[float] = []

    def scan() -> frozenset[str]:
        scans.append(trio.current_time())
        return frozenset({"a", "b"})

    world.backing_files = scan
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        await world.open("c")
        await until(lambda: world.population.paused)
        del scans[:]
        await trio.sleep(100)
        assert 5 <= len(scans) <= 100 / room.OVERLAYS_S + 1


async def test_an_image_is_not_evicted_for_its_own_rest() -> None:
    """It is prefetched without a reader, and larger than the cache.

    It stays partial. Otherwise it would be filled and evicted again and again.
    """
    world = world_with("large", "old", size=12 * MiB)
    world.repository.add("old", pattern(SIZE, 9))
    async with world.daemon(populate=True):
        await fill(world, "old")
        await world.operations.prefetch(world.image("large"), None)
        await until(lambda: world.population.paused)
        assert state(world, "old") is State.REMOTE
        await trio.sleep(600)
        assert state(world, "large") is State.PARTIAL
        assert LIMIT - LIMIT // 64 - MiB <= world.image("large").allocated_bytes() <= LIMIT
        assert world.repository.bytes_read("large") <= LIMIT
        # A reader of another is worth more than what nobody reads.
        image = await world.open("old")
        await read_all(world, image)
        await until(lambda: state(world, "large") is State.REMOTE)
        await is_whole(world, "old")
        assert within(world)


async def test_a_prefetch_is_a_use() -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a")
        await world.operations.prefetch(world.image("b"), None)
        await is_whole(world, "b")
        await fill(world, "c")
        assert [state(world, name) for name in "abc"] == [State.REMOTE, State.WHOLE, State.WHOLE]


async def test_one_larger_than_the_cache_is_read_to_its_end() -> None:
    world = world_with("large", size=24 * MiB)
    async with world.daemon(populate=True):
        image = await world.open("large")
        for start in range(0, 24 * MiB, MiB):
            await world.check(image, ByteRange(start, start + MiB))
        assert within(world)
        assert image.allocated_bytes() > LIMIT - 2 * MiB  # what fits is kept
        world.repository.hang()
        await world.check(image, blocks(0, 4))


async def test_no_room_for_the_map_of_a_new_image() -> None:
    world = world_with("a", "b", limits=Limits(max_cache=4 * MiB + 12 * KiB))
    async with world.daemon(populate=False):
        first = await world.open("a")
        await read_all(world, first)
        await until(lambda: first.record.state is State.WHOLE)
        second = await world.open("b")
        await read_all(world, second)
        assert "not kept" in second.statistics().error
        assert second.allocated_bytes() == 0
        await world.close(first)
        await trio.sleep(10)
        for _ in range(3):  # what is fetched in the moment that room is counted may not be kept
            await read_all(world, second)
            await trio.sleep(2)
        assert second.record.state is State.WHOLE
        assert within(world, 4 * MiB + 12 * KiB)


# -- trouble


async def test_an_eviction_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    world = world_with("a", "b", "c")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        image = await world.open("c")
        await until(lambda: image.record.state is State.PARTIAL)
        world.catalog.error = errors.NoSpace()
        await trio.sleep(10)
        assert "cannot be evicted" in caplog.text
        await read_all(world, image)
        world.catalog.error = None
        await is_whole(world, "c")
        assert within(world)


async def test_failed_requests_do_not_use_up_the_budget() -> None:
    world = world_with("a")
    world.repository.fail("a", ByteRange(0, SIZE))
    async with world.daemon(populate=True):
        image = await world.open("a")
        for _ in range(60):
            with pytest.raises(errors.RequestFailed):
                await world.read(image, 0, MiB)
        await trio.sleep(600)
        assert world.filesystem.budget._reserved == 0
        world.repository.heal()
        await is_whole(world, "a")
        assert world.room.message == ""


async def test_a_restart_finds_what_was_kept_within_the_limit() -> None:
    world = world_with("large", size=24 * MiB)
    async with world.daemon(populate=True):
        await world.open("large")
        await until(lambda: world.population.paused)
        kept = world.image("large").allocated_bytes()
    async with world.daemon(populate=True):
        await until(lambda: world.population.paused)
        assert world.image("large").allocated_bytes() == kept
        assert within(world)


# -- quiet


@pytest.mark.parametrize("blocked", [False, True])
async def test_limits_alone_wake_nobody(blocked: bool) -> None:
    world = world_with("a", "b")
    async with world.daemon(populate=True):
        await fill(world, "a", "b")
        if blocked:
            for name in "ab":
                await world.image(name).annotate(lambda record: record.with_pin(True))
    world.limits = replace(world.limits, max_cache=5 * MiB if blocked else LIMIT)
    async with world.daemon(populate=True):
        await trio.sleep(10)
        await wait_all_tasks_blocked()
        assert bool(world.room.message) == blocked
        assert seconds_to_next_wakeup() == math.inf


async def test_looks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is filled one and a half times.

    That takes a handful of looks for each headroom, not one for each block.
    """
    looks = 0
    real = room.Room._make_room

    async def counted(self: room.Room) -> None:
        nonlocal looks
        looks += 1
        await real(self)

    monkeypatch.setattr(room.Room, "_make_room", counted)
    names = list("abcd")
    world = world_with(*names, size=SIZE)
    async with world.daemon(populate=True):
        await fill(world, *names)
    assert looks <= 20


async def test_who_opens_in_the_moment_of_an_eviction_finds_the_new_inode() -> None:
    """After ESTALE the kernel looks a name up again, but only once.

    So ESTALE must not come before the name leads to the new inode.
    """
    world = world_with("a")
    async with world.daemon(populate=True):
        await fill(world, "a")
        old = world.image("a")
        threads.delay_s = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.filesystem.evict, old)
            await trio.sleep(0.5)
            assert world.image("a") is old
            with pytest.raises(OSError, match="Stale file handle"):
                await world.open_image(old, True)
            assert world.image("a") is not old
            threads.delay_s = 0
        await read_all(world, await world.open("a"))
