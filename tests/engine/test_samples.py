"""Which bytes of the cache are compared with the repository."""

import pytest
from engine_world import BLOCK, World, blocks, run, until
from fakes import pattern

from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine.fetch import samples
from lazyfs.engine.fetch.samples import LONGEST, MOST
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)


async def test_the_first_and_the_last_block_are_among_them_and_no_more_than_an_eighth() -> None:
    world = World(populate=False)
    content = world.repository.add("disk", pattern(16 * MiB)).content
    async with world.daemon():
        image = await world.open("disk")
        assert image.filling is not None
        assert image.filling.samples.take() == []
        for first, end in ((3, 10), (40, 200)):
            await world.check(image, blocks(first, end))
        await until(lambda: image.filling is not None and not image.filling.table.under_way())
        for _ in range(20):
            taken = image.filling.samples.take()
            assert 2 <= len(taken) <= MOST
            assert taken[0].offset == 3 * BLOCK
            assert taken[-1].offset == 199 * BLOCK
            for sample in taken:
                assert 0 < len(sample.data) <= LONGEST
                assert content[sample.offset :][: len(sample.data)] == sample.data
        assert image.statistics().sampled_bytes > 0
        await world.close(image)


async def test_little_is_compared_of_little() -> None:
    world = World(populate=False)
    world.repository.add("disk", pattern(16 * MiB))
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        await until(lambda: image.filling is not None and not image.filling.table.under_way())
        assert image.filling is not None
        assert len(image.filling.samples.take()) <= 2
        await world.close(image)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", (0, b"")),
        (bytes(9000), (0, b"")),
        (b"x" * 9000, (0, b"x" * 9000)),
        (bytes(4096) + b"x" * 100, (4096, b"x" * 100)),
        (b"x" + bytes(4095) + bytes(4096) + b"y" * 8192 + bytes(4096), (8192, b"y" * 8192)),
    ],
)
async def test_holes_are_left_out(data: bytes, part: tuple[int, bytes]) -> None:
    assert samples._without_zeroes(data) == part


@pytest.mark.parametrize("replace_changed", [False, True])
async def test_a_rebuilt_export_is_not_mixed_into_what_is_cached(replace_changed: bool) -> None:
    world = World(populate=False, replace_changed=replace_changed)
    old = world.repository.add("disk", pattern(8 * MiB)).content
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ByteRange(0, 2 * MiB), old)
        await world.close(image)
    new = world.repository.add("disk", pattern(8 * MiB, seed=1)).content
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.command("prefetch", path="disk")
        if replace_changed:
            await until(lambda: world.image("disk") is not image)
            image = await world.open("disk")
            await world.check(image, ByteRange(0, 8 * MiB), new)
            await world.close(image)
            return
        await until(lambda: image.record.state is State.FAILED)
        assert image.record.cause is Cause.CONTENT_CHANGED
        assert image.record.error.startswith("changed in the repository (bytes ")
        # The repository has the old version again: nobody can tell that all of it is.
        world.repository.add("disk", old)
        await world.filesystem.refresh()
        assert image.record.state is State.FAILED
        await world.open_image(image)
        await world.check(image, ByteRange(0, MiB), old)
        await world.close(image)
