"""Tests background filling.

It must be complete and fair, let readers go first, and be quiet when there is nothing to do.
"""

import math
from itertools import groupby, pairwise
from typing import Any

import pytest
import trio
from engine_world import BLOCK, World, blocks, run, seconds_to_next_wakeup, until
from fakes import pattern
from trio.testing import wait_all_tasks_blocked

from lazyfs import errors
from lazyfs.core import extent_map
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.core.looking import LOOK_S
from lazyfs.engine.image.image import Image
from lazyfs.engine.population import WORKERS
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 4 * MiB - 512


def world_with(*names: str, size: int = SIZE, **options: Any) -> World:
    world = World(**options)
    for seed, name in enumerate(names):
        world.repository.add(name, pattern(size, seed))
    return world


async def is_whole(image: Image, limit_s: float = 300) -> None:
    await until(lambda: image.record.state is State.WHOLE, limit_s)


async def test_an_opened_image_is_filled_each_byte_once_and_only_data() -> None:
    world = World()
    holes = [blocks(0, 3), blocks(20, 40), ByteRange(50 * BLOCK + 4096, 51 * BLOCK + 4096)]
    content = world.repository.add("disk", pattern(SIZE), holes).content
    world.repository.add("never opened", pattern(SIZE))
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await is_whole(image)
        assert world.stores.plain == {"disk": content}
        assert world.repository.bytes_read() == SIZE - sum(hole.length for hole in holes)
        assert image.statistics().populated_bytes == world.repository.bytes_read()
        assert world.demand() == []


async def test_holes_alone_need_no_request() -> None:
    world = World()
    world.repository.add("disk", bytes(SIZE), [ByteRange(0, SIZE)])
    async with world.daemon(populate=True):
        await is_whole(await world.open("disk"))
        assert world.repository.log == []


async def test_an_image_of_many_windows_becomes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent_map, "WINDOW", MiB)
    world = world_with("disk", size=6 * MiB)
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await world.check(image, blocks(13))
        await is_whole(image)
        assert world.repository.bytes_read() == 6 * MiB


async def test_filling_goes_on_after_the_last_close_and_after_a_restart() -> None:
    world = world_with("disk", fill_rate=BLOCK)
    async with world.daemon(populate=True):
        await world.close(await world.open("disk"))
        await trio.sleep(10)
        assert 0 < world.repository.bytes_read() < SIZE
    async with world.daemon(populate=True):
        await is_whole(world.image("disk"))
    assert world.repository.bytes_read() == SIZE
    assert not world.stores.open_files


async def test_without_population_nothing_is_fetched_ahead_of_readers() -> None:
    world = world_with("disk")
    async with world.daemon(populate=False):
        await world.open("disk")
        await trio.sleep(100)
        assert world.repository.log == []


# -- sharing


async def test_images_get_equal_turns() -> None:
    world = world_with("a", "b", "c", size=16 * MiB)
    world.repository.delay_s = 0.5
    async with world.daemon(populate=True):
        for name in "abc":
            await world.close(await world.open(name))
        await trio.sleep(24)
        shares = [world.repository.bytes_read(name) for name in "abc"]
        assert sum(shares) > 16 * MiB
        # A turn or two, and the comparisons of new connections.
        assert max(shares) - min(shares) <= 2 * 6 * world.repository.REQUEST
        world.repository.delay_s = 0
        await until(lambda: all(world.image(name).record.state is State.WHOLE for name in "abc"))


async def test_images_with_readers_come_first() -> None:
    world = world_with("a", "b", "c", fill_rate=1 * MiB)
    async with world.daemon(populate=True):
        for name in "ac":
            await world.close(await world.open(name))
        await trio.sleep(0.1)
        del world.repository.log[:]
        await is_whole(await world.open("b"))
        order = [name for name, _ in groupby(r.export for r in world.fills())]
        # Turns that were under way are finished first.
        assert world.repository.bytes_read("b", "fill") == SIZE
        assert sum(world.repository.bytes_read(name) for name in "ac") <= 3 * MiB
        assert "b" in order[: WORKERS + 2]


async def test_one_worker_helps_the_other_when_there_is_one_image() -> None:
    world = world_with("disk")
    world.repository.delay_s = 1
    async with world.daemon(populate=True):
        await is_whole(await world.open("disk"))
        starts = [r.at for r in world.fills()]
        assert max(starts.count(at) for at in starts) == WORKERS


async def test_population_lets_readers_past() -> None:
    world = world_with("disk", "other", size=64 * MiB)
    world.repository.delay_s = 0.1
    world.repository.demand_delay_s = 2
    world.repository.fill_in_flight = 4
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await world.open("other")
        await trio.sleep(1)
        assert len(world.fills()) > 40
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.check, image, ByteRange(64 * MiB - BLOCK, 64 * MiB))
            await trio.sleep(0.2)  # it has been sent
            before = len(world.fills())
            await trio.sleep(1)
            # One at a time, in 0.1 s, for all workers and images together: not none, and far from
            # what it was.
            assert 8 <= len(world.fills()) - before <= 11
        before = len(world.fills())
        await trio.sleep(1)
        assert len(world.fills()) - before > 40


async def test_population_keeps_to_its_rate() -> None:
    world = world_with("a", "b", fill_rate=200 * KiB)
    async with world.daemon(populate=True):
        await world.open("a")
        await world.open("b")
        await trio.sleep(20)
        assert world.repository.bytes_read() == pytest.approx(20 * 200 * KiB, rel=0.15)
        began = trio.current_time()
        await world.check(world.image("a"), ByteRange(SIZE - 1, SIZE))
        assert trio.current_time() == pytest.approx(began, abs=0.01)  # a reader is never limited


# -- quiet


async def test_with_nothing_to_fill_no_task_wakes_up() -> None:
    world = world_with("a", "b")
    async with world.daemon(populate=True):
        await wait_all_tasks_blocked()
        assert seconds_to_next_wakeup() == math.inf
        for name in "ab":
            image = await world.open(name)
            await is_whole(image)
            await world.close(image)
        await trio.sleep(1)
        await wait_all_tasks_blocked()
        assert seconds_to_next_wakeup() == math.inf
        assert not world.stores.open_files


async def test_waiting_for_the_last_block_of_a_reader_is_not_busy() -> None:
    world = world_with("disk", size=BLOCK)
    async with world.daemon(populate=True):
        image = world.image("disk")
        world.population.wake()
        await world.open_image(image)
        assert image.filling is not None
        await image.filling.reader.learn_next()
        world.repository.hang()
        async with trio.open_nursery() as readers:
            readers.start_soon(world.check, image, blocks(0))
            turns = world.population._turns
            await trio.sleep(20)
            assert world.population._turns - turns < 100
            world.repository.go_on()
        await is_whole(image)


# -- trouble


async def test_bad_ranges_come_last_and_are_tried_again_ever_less_often() -> None:
    world = world_with("disk")
    world.repository.fail("disk", blocks(5))
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await trio.sleep(60)
        assert image.allocated_bytes() == SIZE - 4 * BLOCK
        assert image.record.state is State.PARTIAL
        assert "failed: Input/output error" in image.statistics().error
        tries = [r.at for r in world.fills() if r.range.overlaps(blocks(5))]
        assert 3 <= len(tries) <= 12
        gaps = [after - before for before, after in pairwise(tries)]
        assert gaps[-1] > 4 * gaps[0]
        world.repository.heal()
        await is_whole(image, 130)
        assert image.statistics().error == ""


async def test_an_image_in_trouble_does_not_hold_up_another() -> None:
    world = world_with("bad", "good")
    world.repository.fail("bad", ByteRange(0, SIZE))
    async with world.daemon(populate=True):
        await world.open("bad")
        await is_whole(await world.open("good"), 10)


@pytest.mark.parametrize("how", ["not listed", "listed but refused"])
async def test_exports_that_cannot_be_opened_do_not_hold_up_others(how: str) -> None:
    names = [f"gone {i}" for i in range(2 * WORKERS)]
    world = world_with(*names, "good", size=BLOCK)
    async with world.daemon():
        for name in [*names, "good"]:
            await world.open(name)
    exports = dict(world.repository.exports)
    if how == "not listed":
        for name in names:
            del world.repository.exports[name]
    else:
        world.repository.refused.update(names)
    async with world.daemon(populate=True):
        await is_whole(world.image("good"), 60)
        assert all(world.image(name).record.state is State.PARTIAL for name in names)
        await trio.sleep(60)
        message = "not in the repository any more" if how == "not listed" else "no connection"
        assert message in world.image(names[0]).statistics().error
        world.repository.exports = exports
        world.repository.refused.clear()
        await world.filesystem.refresh()
        await until(
            lambda: all(world.image(name).record.state is State.WHOLE for name in names), 60
        )


async def test_a_lost_repository_is_tried_again_and_the_fill_goes_on() -> None:
    world = world_with("disk", fill_rate=MiB)
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await trio.sleep(2)
        world.repository.down = True
        await trio.sleep(600)
        assert image.record.state is State.PARTIAL
        assert 0 < image.allocated_bytes() < SIZE
        assert "no connection" in image.statistics().error
        world.repository.down = False
        await is_whole(image, 10)
        assert world.repository.bytes_read() <= SIZE + WORKERS * world.repository.REQUEST


async def test_a_nearly_full_disk_pauses_population_and_readers_go_on() -> None:
    world = world_with("disk")
    world.stores.room_low = True
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await trio.sleep(10)
        assert world.fills() == []
        assert world.population.paused == "the cache's disk is nearly full"
        await world.check(image, blocks(5))
        world.stores.room_low = False
        await is_whole(image, 10)
        assert world.population.paused == ""


async def test_a_full_disk_pauses_population_until_there_is_room() -> None:
    world = world_with("disk")
    world.stores.full = False
    async with world.daemon(populate=True):
        image = await world.open("disk")
        world.stores.full = True
        await trio.sleep(100)
        assert image.allocated_bytes() == 0
        assert len(world.fills()) < 30
        assert "disk is full" in image.statistics().error
        await world.check(image, blocks(0, 64))
        world.stores.full = False
        await is_whole(image, 130)


@pytest.mark.parametrize("replace", [False, True])
async def test_an_export_that_changes_during_the_fill(replace: bool) -> None:
    world = world_with("disk", fill_rate=MiB, replace_changed=replace)
    old = world.repository.exports["disk"].content
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await world.check(image, blocks(0))
        await trio.sleep(2)
        new = world.repository.add("disk", pattern(SIZE, seed=9), identity="new").content
        await trio.sleep(10)
        await world.check(image, blocks(0), old)
        with pytest.raises(errors.LazyfsError, match="changed in the repository"):
            await world.read(image, SIZE - 1, 1)
        assert world.stores.plain == {}
        if replace:
            assert image.retired
            now = await world.open("disk")
            assert now.inode != image.inode
            await is_whole(now)
            assert world.stores.plain == {"disk": new}
            await world.check(image, blocks(0), old)
        else:
            assert image.record.state is State.FAILED


async def test_an_end_gives_back_every_claim() -> None:
    world = world_with("disk")
    world.repository.fill_in_flight = 4
    async with world.daemon(populate=True):
        image = await world.open("disk")
        world.repository.delay_s = 1
        await trio.sleep(3.5)
    states = world.stores.partials[image.inode].states
    assert 0 < states.count(1) < len(states)
    async with world.daemon(populate=True):
        await is_whole(world.image("disk"))
    # Two daemons, and what the first had under way is all that was fetched twice.
    assert world.repository.bytes_read() <= SIZE + WORKERS * 4 * world.repository.REQUEST


# -- looking is no use


async def test_an_image_that_is_only_looked_at_is_neither_populated_nor_used() -> None:
    world = world_with("looked at", "read", "long", size=32 * MiB)
    async with world.daemon(populate=True):
        looked, read, long = (world.image(name) for name in ("looked at", "read", "long"))
        for image in (looked, read, long):
            await world.open_image(image, look=True)
        for offset in (0, MiB, 32 * MiB - 4096):
            await world.read(looked, offset, 4096)
        await trio.sleep(LOOK_S - 1)
        await world.close(looked)
        await world.read(read, 12 * MiB, 4096)
        await is_whole(read)
        await is_whole(long)  # after LOOK_S
        await trio.sleep(100)
        assert looked.record.state is State.PARTIAL
        assert world.fills("looked at") == []
        assert looked.record.last_used_ns == 0
        assert read.record.last_used_ns > 0
        for image in (read, long):
            await world.close(image)
        assert [job["id"] for job in await world.command("query-jobs")] == []
    async with world.daemon(populate=True):  # nor after a restart
        await trio.sleep(100)
        looked = world.image("looked at")
        assert world.fills("looked at") == []
        await world.open_image(looked, look=True)
        await world.read(looked, 12 * MiB, 1)
        await is_whole(looked)
        await world.close(looked)


async def test_what_was_used_before_a_restart_is_populated_after_it() -> None:
    world = world_with("disk", size=32 * MiB)
    async with world.daemon():
        image = await world.open("disk")
        await world.read(image, 0, 4096)
        await trio.sleep(20)  # a checkpoint
        await world.close(image)
    async with world.daemon(populate=True):
        await is_whole(world.image("disk"))
