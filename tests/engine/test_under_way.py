"""How many bytes demand fetches may have under way."""

from functools import partial

import pytest
import trio
from engine_world import BLOCK, World, blocks, run, until
from fakes import pattern

from lazyfs import errors
from lazyfs.engine.fetch.under_way import MOST, MOST_OF_AN_IMAGE, ImageUnderWay, UnderWay
from lazyfs.units import MiB


def test_an_image_has_its_share_and_its_order() -> None:
    image, begun = ImageUnderWay(UnderWay()), list[int]()
    for i in range(20):
        assert image.start(MiB, partial(begun.append, i)) == (i < MOST_OF_AN_IMAGE // MiB)
    assert begun == list(range(16))
    image.end(MiB)
    image.end(MiB)
    assert begun == list(range(18))


def test_each_image_may_have_one_fetch_however_many_others_wait() -> None:
    mount = UnderWay()
    hanging = [ImageUnderWay(mount) for _ in range(8)]
    for image in hanging:
        for _ in range(100):
            image.start(MiB, lambda: None)
    assert mount.total >= MOST
    begun: list[int] = []
    other = ImageUnderWay(mount)
    assert other.start(4 * MiB, lambda: begun.append(1))
    assert not other.start(1, lambda: begun.append(2))
    other.end(4 * MiB)
    assert begun == [1, 2]


def test_a_fetch_that_ends_at_once_does_not_recurse() -> None:
    image = ImageUnderWay(UnderWay())
    assert image.start(MOST_OF_AN_IMAGE, lambda: None)
    for _ in range(5000):
        image.start(MiB, lambda: image.end(MiB))
    image.end(MOST_OF_AN_IMAGE)
    assert image.start(MOST_OF_AN_IMAGE, lambda: None)


@pytest.mark.trio(run=run)
async def test_an_outage_costs_the_memory_of_what_is_under_way() -> None:
    """Each reader fails after its own time, and reads work again afterwards."""
    world = World(populate=False)
    world.repository.add("disk", pattern(64 * MiB))
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.repository.hang()
        failed = 0

        async def reads(i: int) -> None:
            nonlocal failed
            with pytest.raises(errors.TimedOut):
                await world.read(image, i * BLOCK, BLOCK)
            failed += 1

        async with trio.open_nursery() as readers:
            for i in range(2, 900):
                readers.start_soon(reads, i)
            await trio.sleep(1)
            memory = sum(len(fetch.data) for fetch in world.reader(image)._fetches.values())
            assert 0 < memory <= MOST_OF_AN_IMAGE
        assert failed == 898
        world.repository.go_on()
        assert image.filling is not None
        await until(lambda: image.filling is not None and not image.filling.table.under_way())
        assert world.filesystem._context.under_way.total == 0
        for i in (2, 500, 899):
            await world.check(image, blocks(i))
        await world.close(image)
