"""Tests the two inode numbers of an image.

Files may be opened before it is whole, and after.
"""

import errno
from typing import Any

import pytest
import trio
from engine_world import World, run, until
from fakes import pattern

from lazyfs.core import inode_number
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.image import Image
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = MiB - 512


async def whole(world: World) -> Image:
    """Return the image `disk`, whole and closed."""
    image = await world.open("disk")
    await world.read(image, 0, SIZE)
    await until(lambda: image.record.state is State.WHOLE)
    await world.close(image)
    return image


def world_with_disk(**options: Any) -> World:
    world = World(**options)
    world.repository.add("disk", pattern(SIZE), [])
    return world


async def test_the_name_leads_to_the_second_number_and_the_kernel_is_told() -> None:
    world = world_with_disk()
    async with world.daemon():
        told: list[tuple[str, str]] = []
        world.filesystem.names.on_invalid_entry = lambda folder, name: told.append(
            (folder.path, name)
        )
        image = await world.open("disk")
        assert image.shown_inode == image.inode
        await world.read(image, 0, SIZE)
        await until(lambda: told)
        assert told == [("", "disk")]
        assert image.record.state is State.WHOLE
        assert image.shown_inode == inode_number.whole(image.inode)
        for number in (image.inode, image.shown_inode):
            assert world.filesystem.names.node(number) is image
        assert image.statistics().inode == image.shown_inode
        await world.close(image)
    async with world.daemon():
        assert world.image("disk").shown_inode == inode_number.whole(image.inode)


async def test_both_kinds_of_opens_read_the_same_side_by_side() -> None:
    world = world_with_disk()
    content = world.repository.exports["disk"].content
    async with world.daemon():
        image = await world.open("disk")
        await world.read(image, 0, SIZE)
        await until(lambda: image.record.state is State.WHOLE)
        await world.open_image(image, True)
        await world.open_image(image, True)
        assert image.open_count == 3
        for plain in (False, True):
            for offset in (0, 70_000, SIZE - 5):
                assert (
                    await world.read(image, offset, 4096, plain) == content[offset : offset + 4096]
                )
        await world.close(image, True)
        assert await world.read(image, 9, 9, whole=True) == content[9:18]
        await world.close(image, True)
        assert await world.read(image, 9, 9) == content[9:18]
        await world.close(image)
        assert not world.stores.open_files, "closed with the last open of each kind"


async def test_files_from_before_may_be_closed_first() -> None:
    world = world_with_disk()
    content = world.repository.exports["disk"].content
    async with world.daemon():
        image = await world.open("disk")
        await world.read(image, 0, SIZE)
        await until(lambda: image.record.state is State.WHOLE)
        await world.open_image(image, True)
        await world.close(image)
        assert world.filesystem.open_images() == [image]
        list(world.filesystem.active_images())
        assert await world.read(image, 0, SIZE, whole=True) == content
        await world.close(image, True)
        assert not world.stores.open_files
        assert world.filesystem.open_images() == []


@pytest.mark.parametrize("state", ["remote", "partial", "retired"])
async def test_an_open_by_the_second_number_of_what_is_not_whole_is_stale(state: str) -> None:
    world = world_with_disk(replace_changed=True)
    async with world.daemon():
        image = world.image("disk") if state == "remote" else await world.open("disk")
        if state == "retired":
            await world.read(image, 0, SIZE)
            await until(lambda: image.record.state is State.WHOLE)
            world.repository.add("disk", pattern(2 * SIZE), [])
            await world.filesystem.refresh()
            await until(lambda: image.retired)
        before = image.open_count
        with pytest.raises(OSError, match=r".") as refused:
            await world.open_image(image, True)
        assert refused.value.errno == errno.ESTALE
        assert image.open_count == before
        if before:
            await world.close(image)
    assert not world.stores.open_files


async def test_a_replaced_whole_image_is_read_until_its_last_close() -> None:
    world = world_with_disk(replace_changed=True)
    old = world.repository.exports["disk"].content
    async with world.daemon():
        image = await whole(world)
        await world.open_image(image, True)
        world.repository.add("disk", pattern(2 * SIZE), [])
        await world.filesystem.refresh()
        await until(lambda: world.image("disk") is not image)
        assert "disk" not in world.stores.plain
        assert await world.read(image, 0, SIZE, whole=True) == old
        assert world.filesystem.names.node(inode_number.whole(image.inode)) is image
        await world.close(image, True)
        assert world.filesystem.names.node(inode_number.whole(image.inode)) is None
        assert not world.stores.open_files


async def test_many_opens_at_once_share_one_file() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await whole(world)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(world.open_image, image, True)
        assert len(world.stores.open_files) == 1
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(world.close, image, True)
        assert not world.stores.open_files


async def test_a_clean_end_closes_what_is_still_open() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await whole(world)
        await world.open_image(image, True)
    assert not world.stores.open_files


async def test_resuming_an_image_that_has_become_whole_meanwhile_does_nothing() -> None:
    """A daemon that goes on opens what is open first, and that may hand it off at once."""
    world = world_with_disk()
    async with world.daemon():
        image = await whole(world)
        await image.resume()
        assert image.filling is None
        handle = await world.filesystem.open_whole(image)
        assert await handle.read(0, SIZE) == pattern(SIZE)
        await handle.aclose()
