"""Tests qcow2 images: the file shown, its name and size, beside raw images of the same cache."""

from dataclasses import replace
from typing import Any

import pytest
import trio
from engine_world import BLOCK, World, blocks, run, until
from fakes import pattern
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import qcow2_layout
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.image import Image
from lazyfs.units import KiB

in_trio = pytest.mark.trio(run=run)

SIZE = 20 * BLOCK + 777


def shown(content: bytes, cluster_size: int = BLOCK) -> bytes:
    """Return the finished qcow2 of an export."""
    at = qcow2_layout.layout(len(content), cluster_size)
    return qcow2_layout.finished(at, 0, at.data_offset) + content.ljust(
        at.clusters * cluster_size, b"\0"
    )


def world_with_disk(**options: Any) -> tuple[World, bytes]:
    world = World(format="qcow2", **options)
    export = world.repository.add(
        "disk", pattern(SIZE), [blocks(3, 5), ByteRange(7 * BLOCK + 4 * KiB, 8 * BLOCK)]
    )
    return world, export.content


async def whole_file(world: World, image: Image) -> bytes:
    return await world.read(image, 0, 1 << 40)


reads = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5 * BLOCK)), max_size=5)


@given(
    st.one_of(st.integers(0, 12 * BLOCK), st.sampled_from([0, 1, 512, 777, BLOCK])),
    st.sampled_from([4 * KiB, BLOCK]),
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 60)), max_size=3),
    st.lists(st.tuples(reads, st.booleans(), st.booleans()), max_size=3),
)
def test_reads_are_those_of_the_finished_file_over_restarts_and_crashes(
    size: int,
    cluster_size: int,
    holes: list[tuple[int, int]],
    lives: list[tuple[list[tuple[float, int]], bool, bool]],
) -> None:
    async def scenario() -> None:
        world = World(format="qcow2", block_size=cluster_size)
        ranges = [ByteRange(start * 4 * KiB, (start + length) * 4 * KiB) for start, length in holes]
        ranges = [
            one
            for i, one in enumerate(sorted(ranges))
            if all(one.start >= o.end for o in sorted(ranges)[:i])
        ]
        content = world.repository.add("disk", pattern(size), ranges).content
        expected = shown(content, cluster_size)
        for wanted, populate, crash in lives:
            async with world.daemon(populate=populate, crash=crash):
                image = await world.open("disk")
                assert image.record.path == "disk.qcow2"
                assert image.record.file_size == len(expected)

                async def one(image: Image, start: int, length: int) -> None:
                    assert (
                        await world.read(image, start, length) == expected[start : start + length]
                    )

                async with trio.open_nursery() as nursery:
                    for where, length in wanted:
                        nursery.start_soon(one, image, round(where * len(expected)), length)
        async with world.daemon(populate=True):
            image = await world.open("disk")
            await until(lambda: image.record.state is State.WHOLE)
            assert await whole_file(world, image) == expected
            assert world.stores.plain == {"disk.qcow2": expected}
            await world.close(image)
            await world.open_image(image, whole=True)
            assert await world.read(image, 0, 1 << 40, whole=True) == expected
            await world.close(image, whole=True)

    run(scenario)


@in_trio
async def test_metadata_needs_no_repository() -> None:
    world, content = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        world.repository.down = True
        metadata = image.record.shown.metadata_size
        assert await world.read(image, 0, metadata) == shown(content)[:metadata]
        end = len(shown(content))
        assert await world.read(image, end - 100, 200) == bytes(100), "behind the end of the disk"
        assert world.repository.reads() == []


@in_trio
async def test_a_read_across_the_border_fetches_the_first_cluster_alone() -> None:
    world, content = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        metadata = image.record.shown.metadata_size
        assert (
            await world.read(image, metadata - 100, 200)
            == shown(content)[metadata - 100 : metadata + 100]
        )
        assert world.demand() == [blocks(0)]


@in_trio
async def test_the_metadata_counts_as_space_from_the_first_open() -> None:
    world, _ = world_with_disk()
    async with world.daemon():
        image = world.image("disk")
        assert image.allocated_bytes() == 0
        await world.open_image(image)
        metadata = image.record.shown.metadata_size
        assert image.allocated_bytes() == metadata > 0
        await world.read(image, metadata, BLOCK)
        await until(lambda: image.allocated_bytes() == metadata + BLOCK)
        await whole_file(world, image)
        await until(lambda: image.record.state is State.WHOLE)
        data = sum(piece.length for piece in world.repository.exports["disk"].data)
        assert image.allocated_bytes() == metadata + data
        found = image.statistics()
        assert (found.present_bytes, found.zero_bytes, found.size, found.format) == (
            data,
            SIZE - data,
            SIZE,
            "qcow2",
        )


@in_trio
async def test_with_no_room_at_all_it_is_served_and_cached_when_there_is_some() -> None:
    world, content = world_with_disk()
    world.stores.full = world.stores.room_low = True
    async with world.daemon(populate=True):
        image = await world.open("disk")
        assert await whole_file(world, image) == shown(content)
        assert "disk is full" in image.statistics().error
        assert image.allocated_bytes() == 0
        assert not world.stores.partials
        world.stores.full = world.stores.room_low = False
        await until(lambda: image.record.state is State.WHOLE)
        assert await whole_file(world, image) == shown(content)
        assert world.stores.plain["disk.qcow2"] == shown(content)


@in_trio
async def test_each_image_keeps_its_format_whatever_the_mount_s_default_is() -> None:
    world = World(block_size=16 * KiB)
    contents = {
        name: world.repository.add(name, pattern(SIZE, i)).content for i, name in enumerate("abc")
    }
    async with world.daemon():
        image = await world.open("a")
        await world.read(image, 0, 100)
        await whole_file(world, await world.open("b"))
        await until(lambda: world.image("b").record.state is State.WHOLE)
    world.options = replace(world.options, format="qcow2", block_size=BLOCK)
    contents["d"] = world.repository.add("d", pattern(SIZE, 7)).content
    async with world.daemon(populate=True):
        assert {i.record.path: i.record.format for i in world.filesystem.names.images()} == {
            "a": "raw", "b": "raw", "c": "raw", "d.qcow2": "qcow2"
        }  # fmt: skip
        for name in "abc":
            assert await whole_file(world, await world.open(name)) == contents[name]
        image = await world.open("d")
        assert await world.read(image, 0, 100) == shown(contents["d"])[:100]
    world.options = replace(world.options, format="raw", block_size=16 * KiB)
    async with world.daemon(populate=True):
        for name in "abcd":
            image = await world.open(name)
            await until(lambda: image.record.state is State.WHOLE)  # noqa: B023 - it is awaited here
    assert world.stores.plain == {
        "a": contents["a"], "b": contents["b"], "c": contents["c"], "d.qcow2": shown(contents["d"])
    }  # fmt: skip


@in_trio
async def test_a_replaced_version_keeps_format_and_cluster_size() -> None:
    world = World(format="qcow2", block_size=16 * KiB, replace_changed=True)
    world.repository.add("disk", pattern(SIZE))
    async with world.daemon():
        old = await world.open("disk")
        before = await world.read(old, 0, 20 * KiB)
        world.options = replace(world.options, format="raw", block_size=BLOCK)
        new = world.repository.add("disk", pattern(SIZE + BLOCK, 1)).content
        await world.filesystem.refresh()
        image = await world.open("disk")
        assert image is not old
        assert image.record.path == "disk.qcow2"
        assert await whole_file(world, image) == shown(new, 16 * KiB)
        assert await world.read(old, 0, 20 * KiB) == before
        await world.close(old)


@in_trio
async def test_two_exports_that_want_one_name_both_have_one() -> None:
    """They are the export "a" as a qcow2, "a.qcow2" as it is, and a folder of that name.

    The first one that comes gets the name.
    """
    world = World()
    world.repository.add("a.qcow2/b", b"1" * 512)
    async with world.daemon():
        pass
    world.options = replace(world.options, format="qcow2")
    world.repository.add("a", b"2" * 512)
    async with world.daemon():
        pass
    world.options = replace(world.options, format="raw")
    world.repository.add("a.qcow2", b"3" * 512)
    async with world.daemon(populate=True):
        paths = {
            image.record.export: image.record.path for image in world.filesystem.names.images()
        }
        assert paths == {"a.qcow2/b": "a.qcow2/b", "a": "%61.qcow2", "a.qcow2": "%61.qcow2%00"}
        for name, path in paths.items():
            assert world.filesystem.names.node_at(path) is world.image(name)
            await world.close(await world.open(name))
        await until(lambda: len(world.stores.plain) == 3)
        assert world.stores.plain["%61.qcow2%00"] == b"3" * 512
        assert world.stores.plain["%61.qcow2"] == shown(b"2" * 512)
