"""Zeroes that come as data stay holes."""

import random

import pytest
from engine_world import BLOCK, World, blocks, run, until
from fakes import pattern

from lazyfs.core.lifecycle import State
from lazyfs.engine.fetch.zeroes import is_zero, without_zeroes
from lazyfs.units import KiB


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, 64 * KiB, 200 * KiB + 7])
def test_what_is_zero(size: int) -> None:
    assert is_zero(memoryview(bytes(size)))
    for at in {0, size // 2, size - 1} & set(range(size)):
        data = bytearray(size)
        data[at] = 1
        assert not is_zero(memoryview(data))


def test_what_is_written_is_what_is_not_zero() -> None:
    dice = random.Random(1)
    for _ in range(200):
        size = dice.randrange(1, 20 * 512)
        data = bytearray(dice.randbytes(size))
        for _ in range(dice.randrange(8)):
            start = dice.randrange(size)
            data[start : start + dice.randrange(2048)] = bytes(
                len(data[start : start + dice.randrange(2048)])
            )
        offset = dice.randrange(0, 4096, 512)
        kept, counts = without_zeroes([(offset, memoryview(data))], 512)
        found = bytearray(len(data))
        for start, piece in kept:
            found[start - offset : start - offset + len(piece)] = piece
        assert found == data
        assert counts.total() == sum(len(piece) for _, piece in kept)
        for block, count in counts.items():
            inside = data[max(0, block * 512 - offset) : (block + 1) * 512 - offset]
            assert any(inside)
            assert count == len(inside)


@pytest.mark.trio(run=run)
@pytest.mark.parametrize("populate", [False, True])
async def test_blocks_of_zeroes_take_no_room(populate: bool) -> None:
    """The fake server reports no holes, as one without block status."""
    content = bytearray(pattern(16 * BLOCK))
    content[3 * BLOCK : 9 * BLOCK] = bytes(6 * BLOCK)
    content[10 * BLOCK + 5 : 11 * BLOCK] = bytes(BLOCK - 5)
    world = World(populate=populate)
    world.repository.add("disk", bytes(content))
    async with world.daemon(populate=populate):
        image = await world.open("disk")
        for i in range(16):
            await world.check(image, blocks(i))
        await until(lambda: image.record.state is State.WHOLE)
        now = image.statistics()
        assert (now.present_bytes, now.zero_bytes) == (10 * BLOCK, 6 * BLOCK)
        assert now.fetched_bytes == 16 * BLOCK
        await world.close(image)
    assert bytes(world.stores.plain["disk"]) == bytes(content)
