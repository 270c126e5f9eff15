"""Tests the life of one image.

It is begun by an open, checkpointed, handed off, failed, recovered and retired.
"""

import dataclasses
from typing import Any

import pytest
import trio
from engine_world import BLOCK, World, blocks, run, seconds_to_next_wakeup, threads, until
from fakes import MemoryStore, pattern
from trio.testing import wait_all_tasks_blocked

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine.image.image import CHECKPOINT_S, ROOM_CHECK_S
from lazyfs.engine.map_memory import MapMemory
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = MiB - 512
ALL = ByteRange(0, SIZE)


def world_with_disk(holes: list[ByteRange] | None = None, **options: Any) -> World:
    world = World(**options)
    world.repository.add("disk", pattern(SIZE), holes or [])
    return world


async def test_the_first_open_makes_a_remote_image_partial_and_fetches_nothing() -> None:
    world = world_with_disk()
    async with world.daemon():
        assert world.image("disk").record.state is State.REMOTE
        assert not world.stores.partials
        image = await world.open("disk")
        assert world.catalog.load()[0].state is State.PARTIAL
        assert list(world.stores.partials) == [image.inode]
        assert world.repository.log == []


async def test_reads_end_where_the_image_ends() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        content = world.repository.exports["disk"].content
        assert await world.read(image, SIZE - 10, 4096) == content[-10:]
        assert await world.read(image, SIZE, 1) == b""
        assert await world.read(image, 10 * SIZE, 4096) == b""
        assert await world.read(image, 0, 0) == b""
        assert await world.read(image, SIZE - 1, 2) == content[-1:]


async def test_every_byte_whatever_the_borders_of_reads() -> None:
    world = world_with_disk(holes=[ByteRange(5 * BLOCK + 4096, 7 * BLOCK)])
    async with world.daemon():
        image = await world.open("disk")
        for step in (BLOCK + 4097, 511):
            for start in range(0, SIZE, step):
                await world.check(image, ByteRange(start, min(start + step, SIZE)))


# -- hand-off


async def test_a_complete_image_becomes_a_plain_file_in_this_order() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        i = image.inode
        assert world.stores.journal == [
            *(f"partial {i}", f"data {i}", f"map {i}", f"finish {i}", f"whole {i}", f"remove {i}")
        ]
        assert world.stores.plain["disk"] == world.repository.exports["disk"].content
        await world.check(image, ALL)  # on the descriptor it was opened with
        await world.close(image)
        assert not world.stores.open_files
        again = await world.open("disk")
        world.repository.down = True
        await world.check(again, ALL)
        await world.close(again)


async def test_an_empty_image_is_whole_once_it_is_opened() -> None:
    world = World()
    world.repository.add("empty", b"")
    async with world.daemon():
        image = await world.open("empty")
        assert await world.read(image, 0, 4096) == b""
        await until(lambda: image.record.state is State.WHOLE)
        assert world.stores.plain == {"empty": b""}


async def test_a_foreign_file_in_the_way_is_reported_and_not_touched() -> None:
    world = world_with_disk()
    world.stores.plain["disk"] = b"precious"
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: "in the way" in image.statistics().error)
        await trio.sleep(60)
        assert image.record.state is State.PARTIAL
        await world.check(image, ALL)
        assert world.stores.plain["disk"] == b"precious"
        del world.stores.plain["disk"]
        await until(lambda: image.record.state is State.WHOLE)
        assert image.statistics().error == ""


async def test_a_catalog_that_cannot_be_written_delays_the_hand_off() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        world.catalog.error = OSError(5, "I/O error")
        await world.check(image, ALL)
        await trio.sleep(60)
        assert image.record.state is State.PARTIAL
        assert image.inode in world.stores.partials
        world.catalog.error = None
        await until(lambda: image.record.state is State.WHOLE)


@pytest.mark.parametrize("after", ["finish", "whole"])
async def test_a_crash_in_the_middle_of_a_hand_off_is_finished_by_the_next_daemon(
    after: str,
) -> None:
    world = world_with_disk()
    async with world.daemon(crash=True):
        image = await world.open("disk")
        await world.check(image, ALL)
        if after == "finish":
            world.catalog.error = OSError(5, "I/O error")
        await until(lambda: any(line.startswith(after) for line in world.stores.journal))
    world.catalog.error = None
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        assert world.repository.bytes_read() == SIZE


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("wait_s", [0.0, 0.3, 1.5, 2.5, 3.5, 4.5, 60.0])
async def test_a_daemon_that_ends_hands_off_what_is_complete(
    image_format: str, wait_s: float
) -> None:
    """That includes bytes that were read a moment ago and are not written yet.

    Each call to the disk takes 1 s.
    """
    world = World(format=image_format)
    world.repository.add("disk", pattern(SIZE))
    async with world.daemon():
        image = await world.open("disk")
        threads.delay_s = 1.0
        await world.read(image, 0, 1 << 40)
        await trio.sleep(wait_s)
        told: list[object] = []
        world.filesystem.names.on_invalid_entry = lambda *of_name: told.append(of_name)
    assert world.catalog.load()[0].state is State.WHOLE
    assert list(world.stores.plain) == [image.record.path]
    assert not world.stores.partials
    assert not told, "no kernel listens any more"


async def test_a_daemon_s_end_waits_for_no_repository_and_tries_no_hand_off_twice() -> None:
    world = world_with_disk()
    world.repository.add("other", pattern(SIZE))
    async with world.daemon(), trio.open_nursery() as nursery:
        image, other = await world.open("disk"), await world.open("other")
        world.stores.plain["disk"] = b"precious"
        await world.check(image, ALL)
        await world.check(other, blocks(0, 2))
        world.repository.hang()
        nursery.start_soon(world.read, other, 9 * BLOCK, 1)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
        began = trio.current_time()
    assert trio.current_time() < began + 1
    assert world.stores.plain == {"disk": b"precious"}
    assert {record.state for record in world.catalog.load()} == {State.PARTIAL}
    world.repository.go_on()
    async with world.daemon():
        await world.check(await world.open("other"), blocks(0, 2))
        assert world.repository.bytes_read("other", "demand") <= 3 * BLOCK


# -- checkpoints and counters


async def test_checkpoints_come_while_something_changes_and_then_no_more() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        for i in range(10):
            await world.check(image, blocks(i))
            await trio.sleep(1)
        await trio.sleep(CHECKPOINT_S)
        assert 2 <= world.stores.checkpoints <= 4
        record = world.catalog.load()[0]
        assert record.present_bytes == image.allocated_bytes() >= 10 * BLOCK
        assert record.demand_bytes == world.repository.bytes_read()
        assert record.requests == len(world.repository.log)
        await wait_all_tasks_blocked()
        assert seconds_to_next_wakeup() == float("inf")


async def test_counters_and_blocks_survive_a_clean_restart() -> None:
    world = world_with_disk(holes=[blocks(2, 4)])
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0, 6))
        before = image.statistics()
    async with world.daemon():
        image = world.image("disk")
        after = image.statistics()
        assert (after.present_bytes, after.zero_bytes) == (before.present_bytes, before.zero_bytes)
        assert (after.demand_bytes, after.requests) == (before.demand_bytes, before.requests)
        del world.repository.log[:]
        image = await world.open("disk")
        await world.check(image, blocks(0, 6))
        assert world.repository.log == []


async def test_a_crash_costs_what_the_last_checkpoint_did_not_have() -> None:
    world = world_with_disk()
    async with world.daemon(crash=True):
        image = await world.open("disk")
        await world.check(image, blocks(0))
        await until(lambda: world.stores.checkpoints)
        await world.check(image, blocks(9))
        filling = image.filling
        assert filling is not None
        await until(lambda: filling.table.present(blocks(9)))
    del world.repository.log[:]
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        assert world.repository.log == []
        await world.check(image, blocks(9))
        assert world.repository.reads() == [blocks(9)]


async def test_a_checkpoint_that_fails_is_repeated_although_nothing_else_changes() -> None:
    world = world_with_disk()
    async with world.daemon(crash=True):
        image = await world.open("disk")
        world.stores.checkpoint_error = errors.NoSpace()
        await world.check(image, blocks(0))
        await trio.sleep(60)
        assert world.stores.checkpoints == 0
        world.stores.checkpoint_error = None
        await trio.sleep(3 * CHECKPOINT_S)
        assert world.stores.checkpoints == 1


async def test_a_catalog_that_cannot_be_written_fails_no_read() -> None:
    world = world_with_disk()
    async with world.daemon():
        world.catalog.error = errors.NoSpace()
        image = await world.open("disk")
        await world.check(image, blocks(0))
        await trio.sleep(60)
        world.catalog.error = None
        await world.check(image, blocks(5))
        await trio.sleep(60)
        assert world.catalog.load()[0].state is State.PARTIAL


async def test_a_damaged_cache_is_discarded_and_fetched_again() -> None:
    world = world_with_disk()
    async with world.daemon():
        await world.check(await world.open("disk"), blocks(0, 4))
    for disk in world.stores.partials.values():
        disk.damaged = True
        disk.data[:] = b"?" * SIZE
    async with world.daemon():
        image = await world.open("disk")
        assert image.allocated_bytes() == 0
        await world.check(image, ALL)


async def test_a_damaged_cache_whose_plain_file_the_catalog_does_not_know_is_discarded_too() -> (
    None
):
    world = world_with_disk()
    async with world.daemon(crash=True):
        image = await world.open("disk")
        world.catalog.error = OSError(5, "I/O error")
        await world.check(image, ALL)
        await until(lambda: world.stores.plain)
    world.catalog.error = None
    world.stores.partials[image.inode].damaged = True
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        assert world.stores.plain["disk"] == world.repository.exports["disk"].content


# -- a full disk


@pytest.mark.parametrize("closed", [True, False])
async def test_without_room_even_to_begin_reads_are_served_and_status_says_so(closed: bool) -> None:
    world = world_with_disk(holes=[blocks(3, 5), ByteRange(6 * BLOCK + 4096, 6 * BLOCK + 8192)])
    world.stores.full = True
    async with world.daemon():
        image = await world.open("disk")
        for _ in range(2):
            await world.check(image, ALL)
            await world.check(image, blocks(3))
            await world.check(image, blocks(4, 7))
        assert "disk is full" in image.statistics().error
        assert not image.fillable
        if closed:
            await world.close(image)
        world.stores.full = False
        if closed:
            image = await world.open("disk")
        await trio.sleep(2 * ROOM_CHECK_S)
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        await world.check(image, ALL)
        assert image.statistics().error == ""


async def test_reads_go_on_while_room_is_found() -> None:
    world = world_with_disk(holes=[blocks(3)])
    world.stores.full = True
    async with world.daemon():
        image = await world.open("disk")
        world.stores.full = False
        threads.delay_s = 0.5
        reads = 0
        while trio.current_time() < 3 * ROOM_CHECK_S:
            await world.check(image, blocks(reads % 14, reads % 14 + 2))
            await trio.sleep(0.01)
            reads += 1
        assert image.allocated_bytes() > 0
        # But for what was under way at that moment.
        assert SIZE < image.statistics().demand_bytes <= world.repository.bytes_read()


async def test_an_empty_or_all_hole_image_without_room() -> None:
    world = World()
    world.repository.add("empty", b"")
    world.repository.add("hole", bytes(SIZE), [ALL])
    world.stores.full = True
    async with world.daemon():
        assert await world.read(await world.open("empty"), 0, 10) == b""
        assert await world.read(await world.open("hole"), 5, BLOCK) == bytes(BLOCK)


async def test_a_disk_that_fills_up_is_reported_until_there_is_room() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.stores.full = True
        await world.check(image, blocks(8))
        await trio.sleep(1)
        assert "disk is full" in image.statistics().error
        await world.check(image, blocks(0))
        world.stores.full = False
        await world.check(image, blocks(8))
        await until(lambda: image.statistics().error == "")


# -- another version of the export


async def test_a_partial_image_whose_export_changed_keeps_what_it_has_and_recovers() -> None:
    world = World()
    old = world.repository.add("disk", pattern(SIZE), identity="old")
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0, 2))
        world.repository.add("disk", pattern(SIZE, seed=1), identity="new")
        with pytest.raises(errors.ExportChanged):
            await world.read(image, 9 * BLOCK, BLOCK)
        await until(lambda: image.record.state is State.FAILED)
        assert world.catalog.load()[0].state is State.FAILED
        assert image.statistics().error == "changed in the repository (was 'old', now 'new')"
        await until(lambda: world.stores.partials[image.inode].disowned)
        await world.check(image, blocks(0, 2), old.content)
        with pytest.raises(errors.ExportChanged):
            await world.read(image, BLOCK, 2 * BLOCK)
        assert not image.fillable
    world.stores.partials[image.inode].disowned = False  # killed before that
    async with world.daemon():  # and so after a restart
        image = await world.open("disk")
        assert world.stores.partials[image.inode].disowned
        await world.check(image, blocks(0, 2), old.content)
        with pytest.raises(errors.LazyfsError, match="changed in the repository"):
            await world.read(image, 9 * BLOCK, BLOCK)
        world.repository.exports["disk"] = old
        await world.filesystem.refresh()
        assert image.record.state is State.PARTIAL
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        assert image.statistics().error == ""


async def test_a_lost_write_that_is_reported_while_a_file_is_disowned_stops_its_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linux reports a lost write once, to the next caller that syncs."""
    world = world_with_disk()

    def lost(_store: MemoryStore) -> None:
        raise errors.CacheCorrupt("the cache's disk could not take the data")

    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        monkeypatch.setattr(MemoryStore, "disown", lost)
        await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("disk", "a", "b"))
        with pytest.raises(errors.CacheCorrupt):
            await world.read(image, 0, 1)


async def test_equal_sizes_alone_are_no_proof_that_the_old_version_is_back() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        world.repository.add("disk", bytes(2 * SIZE))
        await world.filesystem.refresh()
        world.repository.add(
            "disk", pattern(SIZE, seed=1)
        )  # a third version, as likely as the first
        await world.filesystem.refresh()
        assert image.record.state is State.FAILED
        with pytest.raises(errors.LazyfsError, match="changed in the repository"):
            await world.read(image, 9 * BLOCK, 1)


async def test_a_whole_image_whose_export_changed_keeps_its_bytes_and_says_so() -> None:
    world = world_with_disk()
    old = world.repository.exports["disk"]
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        world.repository.add("disk", pattern(2 * SIZE, seed=1))
        for _ in range(2):
            await world.filesystem.refresh()
        assert image.record.state is State.WHOLE
        assert (
            image.statistics().error
            == f"changed in the repository (was {SIZE} bytes, now {2 * SIZE} bytes)"
        )
        await world.check(image, ALL, old.content)
        assert world.stores.plain["disk"] == old.content
        world.repository.exports["disk"] = old
        await world.filesystem.refresh()
        assert image.statistics().error == ""


async def test_a_changed_image_that_happens_to_be_complete_is_not_handed_off() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ByteRange(0, SIZE - BLOCK))
        await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("disk", "a", "b"))
        await trio.sleep(60)
        assert world.stores.plain == {}
        await image.recover()
        await world.check(image, ALL)
        await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("disk", "a", "b"))
        await trio.sleep(60)
        assert world.stores.plain == {}
        await image.recover()
        await until(lambda: image.record.state is State.WHOLE)


async def test_a_retired_image_serves_what_it_had_until_its_last_close() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0, 2))
        await image.retire(
            errors.ExportChanged("disk", "a", "b"), lambda: world.catalog.remove([image.inode])
        )
        assert not world.stores.partials
        await world.check(image, blocks(0, 2))
        with pytest.raises(errors.ExportChanged):
            await world.read(image, 5 * BLOCK, 1)
        await world.close(image)
        assert not world.stores.open_files


async def test_retiring_a_whole_image_whose_file_is_gone() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)
        world.stores.plain.clear()
        await image.retire(
            errors.ExportChanged("disk", "a", "b"), lambda: world.catalog.remove([image.inode])
        )
        assert image.retired
        assert world.catalog.load() == []


async def test_an_open_that_fails_does_not_count() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)
        plain = world.stores.plain.pop("disk")
        with pytest.raises(errors.CacheCorrupt):
            await world.open("disk")
        assert image.open_count == 0
        world.stores.plain["disk"] = plain
        await world.check(await world.open("disk"), ALL)


async def test_statistics_tell_each_byte_from_the_others() -> None:
    world = world_with_disk(holes=[blocks(2, 4)])
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0, 4))
        await until(lambda: image.statistics().present_bytes)
        found = image.statistics()
        assert (found.name, found.path, found.size, found.state) == (
            "disk",
            "disk",
            SIZE,
            "partial",
        )
        assert (found.present_bytes, found.zero_bytes, found.open_count) == (
            2 * BLOCK,
            2 * BLOCK,
            1,
        )
        assert (found.fetched_bytes, found.populated_bytes, found.requests) == (2 * BLOCK, 0, 1)
        await world.check(image, ALL)
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)
        found = image.statistics()
        assert (found.present_bytes, found.zero_bytes, found.state) == (
            SIZE - 2 * BLOCK,
            2 * BLOCK,
            "whole",
        )
        assert found.fill_rate == 0


async def test_a_disk_that_lost_data_is_not_read_until_a_restart_from_the_last_checkpoint() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        await trio.sleep(2 * CHECKPOINT_S)  # on the autojump clock
        world.stores.checkpoint_error = errors.CacheCorrupt("the disk could not take the data")
        await world.check(image, blocks(8))
        await until(lambda: "mount anew" in image.statistics().error)
        for lost in (blocks(0), blocks(8), blocks(12)):
            with pytest.raises(errors.CacheCorrupt):
                await world.read(image, lost.start, lost.length)
        world.stores.checkpoint_error = None  # a later sync would succeed, and prove nothing
        await trio.sleep(2 * CHECKPOINT_S)
        with pytest.raises(errors.CacheCorrupt):
            await world.read(image, 0, BLOCK)
    before = world.repository.bytes_read()
    async with world.daemon():
        image = await world.open("disk")
        await world.check(image, blocks(0))
        assert world.repository.bytes_read() == before
        await world.check(image, blocks(8))
        assert world.repository.bytes_read() == before + BLOCK


async def test_that_somebody_uses_an_image_is_not_forgotten_by_a_save_under_way() -> None:
    world = world_with_disk()
    async with world.daemon():
        image = await world.open("disk")
        image.record = dataclasses.replace(image.record, meant=False)
        threads.delay_s = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.save)
            await trio.sleep(0.5)
            image.mean()
        assert image.record.meant
        await image.save()
        threads.delay_s = 0.0
        (record,) = world.catalog.load()
        assert record.meant


async def test_maps_of_giant_images_take_a_limited_amount_of_memory() -> None:
    world = world_with_disk()
    async with world.daemon():
        world.filesystem._context.map_memory._limit = 40
        world.repository.add("small", bytes(2 * BLOCK))
        world.repository.add("giant", bytes(100 * BLOCK))
        await world.filesystem.refresh()
        first = await world.open("small")
        with pytest.raises(errors.UserError, match="more than 40 B is refused"):
            await world.open("giant")
        assert "maps of images" in world.image("giant").statistics().error
        assert world.image("giant").record.state is State.REMOTE
        await world.read(first, 0, BLOCK)


async def test_maps_that_are_being_loaded_take_memory_too() -> None:
    memory = MapMemory(40)
    with memory.reserved(30 * BLOCK, BLOCK):
        with (
            pytest.raises(errors.UserError, match="more than 40 B is refused"),
            memory.reserved(20 * BLOCK, BLOCK),
        ):
            raise AssertionError("there is no room")
        with memory.reserved(10 * BLOCK, BLOCK):
            pass
    with memory.reserved(20 * BLOCK, BLOCK):
        pass
