"""Uses images for a while, and disturbs one call at a time.

Every call of a thread is cancelled while it waits for its limiter, be it a reader's, an operator's
or the whole daemon's. Every call of the disk fails. In each case every claim ends, every
reservation ends, every token is given back, every file is closed, the daemon ends, and the next
daemon serves the right bytes.
"""

import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
from engine_world import BLOCK, World, blocks, run, threads
from fakes import pattern

from lazyfs import errors
from lazyfs.core.block_map import CLAIMED
from lazyfs.core.eviction import Limits
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine.image.filling import Filling
from lazyfs.engine.image.image import Image
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 16 * BLOCK


class Interruption:
    """Disturbs the call with that number."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._disk_calls = 0
        self.reached = False
        self.operation = trio.CancelScope()
        """The scope of the operation under way."""
        self.everything = trio.CancelScope()
        """The scope of the daemon's life."""
        self._operator = trio.lowlevel.current_task()

    def fail(self) -> None:
        """Let one call of the disk fail."""
        self._disk_calls += 1
        if self._disk_calls - 1 == self._number:
            self.reached = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def hold_back(self, number: int) -> None:
        """Hold one call of a thread back and cancel its caller.

        A limiter without tokens would hold the call back in the same way.
        """
        if number != self._number:
            return
        self.reached = True
        if trio.lowlevel.current_task() is self._operator:
            self.operation.cancel()
        else:
            self.everything.cancel()
        await trio.sleep(1)  # then there is a token, if the call still wants it


async def life(world: World, interruption: Interruption, seen: list[Image]) -> None:
    """Use images, one operation after the other. Each may be cancelled."""

    async def do(operation: Callable[[], Awaitable[object]]) -> None:
        interruption.operation = trio.CancelScope()
        with interruption.operation, suppress(errors.LazyfsError, OSError, CommandError):
            await operation()
        seen.extend(image for image in world.filesystem.names.all_images() if image not in seen)

    async def read(name: str, first: int, end: int) -> None:
        image = world.image(name)
        handle = await world.filesystem.open(image)
        try:
            await handle.read(first * BLOCK, (end - first) * BLOCK)
        finally:
            await handle.aclose()

    async def pause() -> None:
        await trio.sleep(20)

    await do(lambda: read("a", 0, 2))
    await do(lambda: read("a", 1, 5))
    await do(lambda: world.command("prefetch", path="b"))
    await do(pause)  # population, checkpoints, the hand-off
    await do(lambda: read("b", 0, 16))
    await do(lambda: world.command("pin", path="a"))
    await do(lambda: world.command("query-map", path="b"))
    await do(lambda: world.command("verify", path="b"))
    await do(pause)
    await do(lambda: world.command("unpin", path="a"))
    await do(lambda: world.command("evict", path="a"))
    await do(lambda: world.command("prefetch", path="a", format="qcow2"))
    await do(pause)
    await do(lambda: read("c", 3, 4))
    await do(world.filesystem.save_uses)
    await do(world.filesystem.refresh)
    await do(lambda: world.command("evict", path=""))


async def disturbed(number: int, *, disk: bool) -> bool:
    """Run `life` and disturb the call with that number. Return whether there was such a call.

    Args:
        number: the call.
        disk: let a call of the disk fail, instead of cancelling the call of a thread.
    """
    world = World(limits=Limits(max_cache=64 * MiB), populate=False)
    for name in "abc":
        world.repository.add(name, pattern(SIZE))
    interruption, seen = Interruption(number), list[Image]()
    fillings: list[Filling] = []
    threads.reset()
    with interruption.everything:
        async with world.daemon(populate=True):
            threads.calls = 0
            if disk:
                world.stores.on_call = world.catalog.on_call = interruption.fail
            else:
                threads.on_call = interruption.hold_back
            try:
                await life(world, interruption, seen)
            finally:
                fillings += [image.filling for image in seen if image.filling is not None]
    threads.on_call = None
    world.stores.on_call = world.catalog.on_call = lambda: None
    with trio.fail_after(1000):
        await trio.sleep(10)
    assert world.filesystem.budget._reserved == 0
    assert world.filesystem._context.pace._gate._waiting == 0
    assert world.filesystem._context.pace._gate._under_way == 0
    for filling in fillings:
        assert filling.table.under_way() == []
        assert all(state != CLAIMED for _, state in filling.table.runs())
    for limiter in threads.limiters:
        assert limiter.borrowed_tokens == 0
    for image in seen:
        assert not image._changing.locked()
        assert not image._opening
    await lives_on(world)
    return interruption.reached


async def lives_on(world: World) -> None:
    """Check that the next daemon finds everything in order."""
    async with world.daemon(populate=True):
        for name in "abc":
            image = await world.open(name)
            if image.record.format == "raw":
                await world.check(image, blocks(0, 16))
            await world.close(image)


async def test_any_call_may_be_cancelled_while_it_waits_for_its_limiter() -> None:
    number = 0
    while await disturbed(number, disk=False):
        number += 1
    assert number > 40, "the life has become short"


async def test_any_call_of_the_disk_may_fail() -> None:
    number = 0
    while await disturbed(number, disk=True):
        number += 1
    assert number > 60, "the life has become short"
