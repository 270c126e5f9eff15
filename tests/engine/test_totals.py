"""Tests what a mount counts: where reads were served from, and what was fetched.

Evicting an image takes nothing away from that.
"""

import errno

import pytest
import trio
import trio.testing
from engine_world import BLOCK, World, blocks, run, until

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine import totals
from lazyfs.engine.image.image import Image
from lazyfs.engine.totals import FAILED, FETCHED, JOINED, PRESENT, Read, Totals

pytestmark = pytest.mark.trio(run=run)


async def read(world: World, image: Image, where: ByteRange) -> None:
    """Read as the adapter does."""
    with Read(world.filesystem.totals) as one:
        await world.read(image, where.start, where.length, False, one)


def served(world: World) -> dict[str, int]:
    return {
        how: found.count
        for how, found in world.filesystem.totals.statistics().reads.items()
        if found.count
    }


async def test_one_of_eight_readers_fetches_and_the_others_join() -> None:
    world = World(populate=False)
    world.repository.add("disk", bytes([1]) * 8 * BLOCK)
    world.repository.demand_delay_s = 2.0
    async with world.daemon():
        image = await world.open("disk")
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read, world, image, blocks(3))
            await trio.testing.wait_all_tasks_blocked()
            assert world.filesystem.totals.waiting == 8
        assert world.filesystem.totals.waiting == 0
        assert served(world) == {FETCHED: 1, JOINED: 7}
        assert image.filling is not None
        await image.filling.reader.written()
        await read(world, image, blocks(3))
        assert served(world) == {PRESENT: 1, FETCHED: 1, JOINED: 7}
        found = world.filesystem.totals.statistics().reads
        assert found[PRESENT].total == 0
        assert found[FETCHED].total >= 2.0
        assert found[JOINED].total >= 14.0
        await world.close(image)


async def test_a_read_that_waits_for_population_joins() -> None:
    world = World()
    world.repository.add("disk", bytes([1]) * 8 * BLOCK)
    world.repository.delay_s = 1.0
    async with world.daemon(populate=True):
        image = await world.open("disk")
        await until(lambda: world.fills("disk"))
        before = len(world.demand("disk"))
        await read(world, image, blocks(0))
        assert len(world.demand("disk")) == before
        assert served(world) == {JOINED: 1}
        await world.close(image)


async def test_bytes_and_requests_by_kind_survive_eviction() -> None:
    world = World()
    world.repository.add("disk", bytes([1]) * 16 * BLOCK, [blocks(4, 8)])
    async with world.daemon(populate=True):
        for round_ in (1, 2):
            image = await world.open("disk")
            await read(world, image, blocks(0))
            await until(lambda: world.image("disk").record.state.value == "whole")
            await world.close(image)
            sums = world.filesystem.totals.statistics().sums
            assert sums[totals.DEMAND_BYTES] + sums[totals.POPULATED_BYTES] == round_ * 12 * BLOCK
            assert sums[totals.ZERO_BYTES] == round_ * 4 * BLOCK
            assert sums[totals.DEMAND_BYTES] == sum(r.length for r in world.demand("disk"))
            assert sums[totals.DEMAND_REQUESTS] == len(world.demand("disk"))
            await world.operations.evict(world.image("disk"))
            assert world.filesystem.totals.statistics().sums == sums


async def test_a_read_that_fails_is_counted_and_one_that_is_cancelled_is_not() -> None:
    world = World(populate=False)
    world.repository.add("disk", bytes([1]) * 8 * BLOCK)
    world.repository.demand_delay_s = 1000.0
    async with world.daemon():
        image = await world.open("disk")
        with pytest.raises(errors.TimedOut):
            await read(world, image, blocks(0))
        with trio.move_on_after(1.0):
            await read(world, image, blocks(1))
        assert served(world) == {FAILED: 1}
        assert world.filesystem.totals.waiting == 0
        world.repository.demand_delay_s = 0.0
        await world.close(image)


async def test_a_cache_that_cannot_be_written_is_counted() -> None:
    world = World(populate=False)
    world.repository.add("disk", bytes([1]) * 8 * BLOCK)
    async with world.daemon():
        image = await world.open("disk")
        world.stores.full = True
        await read(world, image, blocks(0))
        await until(lambda: world.filesystem.totals.statistics().errors[totals.WRITE])
        world.stores.full = False
        await world.close(image)


async def test_turns_that_fail_and_what_waits_for_one() -> None:
    world = World()
    for name in ("a", "b", "c", "d"):
        world.repository.add(name, bytes([1]) * 200 * BLOCK)  # a minute of population
    async with world.daemon(populate=True):
        world.repository.delay_s = 1.0
        images = [await world.open(name) for name in "abcd"]
        await until(lambda: world.population.statistics().working == 2)
        assert world.population.statistics().waiting == 2
        assert world.population.statistics().failures == 0
        world.repository.down = True
        await until(lambda: world.population.statistics().failures > 0)
        world.repository.down = False
        for image in images:
            await world.close(image)


async def test_opens() -> None:
    counted = Totals(lambda: 0.0)
    with counted.opening():
        pass
    with pytest.raises(errors.UserError), counted.opening():
        raise errors.UserError("no")
    with pytest.raises(OSError, match="stale"), counted.opening():
        raise OSError(errno.ESTALE, "stale")
    found = counted.statistics()
    assert found.opens == 1
    assert found.errors[totals.OPEN] == 1
