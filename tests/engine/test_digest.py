"""Tests that a complete image is compared with its digest before it becomes a plain file."""

import hashlib

import pytest
import trio
from engine_world import World, blocks, run, threads, until
from fakes import MemoryStore, pattern

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine.fetch import samples
from lazyfs.engine.image import digest_check
from lazyfs.engine.image.image import CHECKPOINT_S
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 4 * MiB - 512
HOLES = [blocks(3, 20), ByteRange(50 * 65536 + 4096, 51 * 65536)]


def world_with_disk(size: int = SIZE) -> tuple[World, str]:
    world = World()
    content = world.repository.add("disk", pattern(size), HOLES).content
    return world, f"sha256:{hashlib.sha256(content).hexdigest()}"


WRONG = f"sha256:{'0' * 64}"


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_the_right_digest(algorithm: str) -> None:
    world, _ = world_with_disk()
    content = world.repository.exports["disk"].content
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(
            image, f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
        )
        await world.open("disk")
        await until(lambda: image.record.state is State.WHOLE)
        assert world.stores.plain["disk"] == content


async def test_a_wrong_digest_is_never_handed_off() -> None:
    world, right = world_with_disk()
    for _ in range(2):
        async with world.daemon(populate=True):
            image = world.image("disk")
            await world.operations.set_digest(image, WRONG)
            await world.open("disk")
            await until(lambda: world.image("disk").record.state is State.FAILED)
            await trio.sleep(100)
            assert image.record.state is State.FAILED
            assert image.record.error == (
                f"its bytes do not have the digest {WRONG}: evict it to fetch it again without one, or verify --digest the right one"
            )
            assert world.stores.plain == {}
            await world.check(image, blocks(0, 30))  # who has it open is not cut off
    # What the message advises: the right digest, ...
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        await until(lambda: world.image("disk").record.state is State.WHOLE, 2 * CHECKPOINT_S)
        assert image.record.error == ""
    assert world.repository.bytes_read() == SIZE - sum(hole.length for hole in HOLES)


async def test_evicting_fetches_again() -> None:
    world, right = world_with_disk()
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, WRONG)
        await world.close(await world.open("disk"))
        await until(lambda: image.record.state is State.FAILED)
        await world.operations.evict(image)
        image = await world.open("disk")
        await world.operations.set_digest(image, right)
        await until(lambda: image.record.state is State.WHOLE)


async def test_damage_on_the_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    world, right = world_with_disk()
    async with world.daemon(populate=False):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        await world.open("disk")
        await world.check(image, blocks(0))
        await until(lambda: image.filling is not None and not image.filling.table.under_way())
    monkeypatch.setattr(samples, "FEWEST", 0)
    monkeypatch.setattr(samples, "MOST", 0)  # they would find it first
    world.stores.partials[image.inode].data[17] ^= 1
    world.stores.partials[image.inode].safe_data = bytes(world.stores.partials[image.inode].data)
    async with world.daemon(populate=True):
        image = world.image("disk")
        await until(lambda: image.record.state is State.FAILED)
        assert "do not have the digest" in image.record.error
        assert world.stores.plain == {}


async def test_a_digest_that_comes_while_another_is_compared() -> None:
    world, right = world_with_disk()
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        threads.delay_s = 1
        await world.open("disk")
        await until(lambda: image.filling is not None and image.filling.table.completed.is_set())
        await world.operations.set_digest(image, WRONG)
        await until(lambda: image.record.state is State.FAILED)
        assert world.stores.plain == {}


async def test_opens_and_closes_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_check, "PIECE", 64 * 1024)
    world, right = world_with_disk()
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        first = await world.open("disk")
        threads.delay_s = 0.5  # half a minute in all
        await until(lambda: image.filling is not None and image.filling.table.completed.is_set())
        await trio.sleep(5)
        began = trio.current_time()
        assert image.record.state is State.PARTIAL
        await world.open("disk")
        await world.check(image, blocks(0))
        await world.close(first)
        assert trio.current_time() < began + 5
        await until(lambda: image.record.state is State.WHOLE)


async def test_an_end_in_the_middle_waits_for_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_check, "PIECE", 64 * 1024)
    world, right = world_with_disk()
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        await world.open("disk")
        threads.delay_s = 10
        await until(
            lambda: image.filling is not None and image.filling.table.completed.is_set(), 10000
        )
        began = trio.current_time()
    assert trio.current_time() < began + 100
    threads.delay_s = 0
    assert world.stores.plain == {}
    async with world.daemon(populate=True):
        await until(lambda: world.image("disk").record.state is State.WHOLE)


async def test_a_disk_that_cannot_be_read_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world, right = world_with_disk()
    real, broken = MemoryStore.read, True

    def read(self: MemoryStore, offset: int, length: int) -> bytes:
        if broken:
            raise OSError(5, "Input/output error")
        return real(self, offset, length)

    monkeypatch.setattr(MemoryStore, "read", read)
    async with world.daemon(populate=True):
        image = world.image("disk")
        await world.operations.set_digest(image, right)
        await world.open("disk")
        await trio.sleep(60)
        assert image.record.state is State.PARTIAL
        broken = False
        await until(lambda: image.record.state is State.WHOLE)


async def test_another_failure_keeps_its_reason() -> None:
    world, _ = world_with_disk()
    async with world.daemon(populate=False):
        image = world.image("disk")
        await world.operations.set_digest(image, WRONG)
        await world.open("disk")
        await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("disk", "1 byte", "2 bytes"))
        await trio.sleep(60)
        assert "changed in the repository" in image.record.error
