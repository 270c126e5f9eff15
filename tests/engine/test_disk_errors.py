"""Tests what comes of an image when its disk fails at the worst moment."""

import errno
import os

import pytest
import trio
from engine_world import BLOCK, World, run, until
from fakes import MemoryStore, pattern

from lazyfs import errors
from lazyfs.core.lifecycle import State
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine.interfaces import Space

pytestmark = pytest.mark.trio(run=run)

SIZE = 16 * BLOCK


def world_with(*names: str, populate: bool = True) -> World:
    world = World(populate=populate)
    for name in names:
        world.repository.add(name, pattern(SIZE))
    return world


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_an_image_whose_map_cannot_be_unlinked_is_whole_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a")
    async with world.daemon(populate=True):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "remove", lambda _store: fail())
            await world.command("prefetch", path="a")
            image = world.image("a")
            await until(lambda: image.record.state is State.WHOLE)
            await trio.sleep(1)
            await world.open_image(image, whole=True)


@pytest.mark.parametrize("command", ["pin", "unpin"])
async def test_a_pin_that_is_not_in_the_catalog_is_refused(command: str) -> None:
    world = world_with("a")
    async with world.daemon(populate=True):
        await world.command("prefetch", path="a")
        image = world.image("a")
        await until(lambda: image.record.state is State.WHOLE)
        if command == "unpin":
            await world.command("pin", path="a")
        world.catalog.error = errors.NoSpace()
        with pytest.raises(CommandError, match="no space left"):
            await world.command(command, path="a")
        assert image.record.pinned == (command == "unpin")
        await world.operations.touch(image, 10**18)  # which is saved later
        world.catalog.error = None
        assert image.record.last_used_ns == 10**18


async def test_an_image_whose_file_fails_when_it_is_closed_is_dropped() -> None:
    world = world_with("a")
    async with world.daemon(populate=True):
        await world.command("prefetch", path="a")
        image = world.image("a")
        await until(lambda: image.record.state is State.WHOLE)
        await world.open_image(image, whole=True)
        await world.command("evict", path="a")
        world.stores.on_call = fail
        await world.close(image, whole=True)
        world.stores.on_call = lambda: None
        assert image not in list(world.filesystem.names.all_images())


async def test_an_eviction_whose_file_fails_when_it_is_closed_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a", populate=False)
    close = MemoryStore.close

    def close_and_fail(store: MemoryStore) -> None:
        close(store)
        fail()

    async with world.daemon():
        image = await world.open("a")
        await world.read(image, 0, 10)
        await world.close(image)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "close", close_and_fail)
            await world.command("evict", path="a")
        assert image.retired
        await world.open("a")


async def test_a_read_that_waits_while_the_disk_loses_data_fails() -> None:
    """It is answered from the cache file, in which the disk has lost a page meanwhile."""
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        await world.read(image, 0, BLOCK)
        await trio.sleep(10)
        assert image.filling is not None
        table, store = image.filling.table, image.filling.store
        assert isinstance(store, MemoryStore)
        await image.filling.reader.learn_next()
        flight = table.claim(BLOCK)  # as population does
        assert flight is not None
        outcome: list[object] = []

        async def read() -> None:
            start = table.span_of(flight).start - BLOCK
            with pytest.raises(errors.CacheCorrupt):
                outcome.append(await world.read(image, start, 2 * BLOCK))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(0.1)
            table.stop_reading(errors.CacheCorrupt("data lost"))
            span = table.span_of(flight)
            store.write(span.start, memoryview(pattern(SIZE)[span.start : span.end]))
            table.settle(flight, dict.fromkeys(range(*flight.run), BLOCK))
        assert not outcome


async def test_status_answers_when_the_disk_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with world.daemon():

        def fails() -> Space:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(world.stores, "space", fails)
        found = world.room.statistics()
        assert (found.total, found.free) == (0, 0)
        assert found.message == "the cache's file system fails: Input/output error"


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EIO, "the cache's disk fails"), (errno.EMFILE, "cannot be opened")],
)
async def test_too_few_descriptors_are_no_error_of_the_disk(number: int, reason: str) -> None:
    def fails() -> None:
        raise OSError(number, os.strerror(number))

    world = world_with("a")
    async with world.daemon(populate=True):
        world.stores.on_call = fails
        with pytest.raises(OSError, match=os.strerror(number)):
            await world.open("a")
        assert reason in world.image("a").statistics().error
        world.stores.on_call = lambda: None
