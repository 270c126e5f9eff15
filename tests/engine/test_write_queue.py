"""Tests that what waits to be written is written in order, in batches, and in every case."""

import weakref
from functools import partial

import pytest
import trio
from engine_world import run, threads
from trio.testing import wait_all_tasks_blocked

from lazyfs.engine.fetch.write_queue import MAX_WAITING, WriteQueue

pytestmark = pytest.mark.trio(run=run)


async def test_writes_are_made_in_order_and_what_comes_meanwhile_after_them(
    nursery: trio.Nursery,
) -> None:
    queue, made = WriteQueue(nursery, trio.CapacityLimiter(1)), list[int]()
    threads.delay_s = 1
    for i in range(3):
        queue.put(1, partial(made.append, i))
    await trio.sleep(0.5)
    queue.put(1, lambda: made.append(3))
    assert made == []
    await trio.sleep(1)
    assert made == [0, 1, 2]
    await trio.sleep(1)
    assert made == [0, 1, 2, 3]


async def test_it_is_full_until_what_waits_is_written(nursery: trio.Nursery) -> None:
    queue = WriteQueue(nursery, trio.CapacityLimiter(1))
    threads.delay_s = 1
    queue.put(MAX_WAITING - 1, lambda: None)
    assert not queue.full
    queue.put(1, lambda: None)
    assert queue.full
    await trio.sleep(0.5)
    assert queue.full
    await trio.sleep(1)
    assert not queue.full


async def test_a_write_that_raises_spoils_no_other(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    queue, made = WriteQueue(nursery, trio.CapacityLimiter(1)), list[int]()
    queue.put(1, lambda: 1 // 0)  # type: ignore[arg-type]
    queue.put(1, lambda: made.append(1))
    await wait_all_tasks_blocked()
    queue.put(1, lambda: made.append(2))
    await wait_all_tasks_blocked()
    assert made == [1, 2]
    assert "a bug in lazyfs" in caplog.text


async def test_what_waits_at_its_end_and_comes_after_it_is_written() -> None:
    made: list[int] = []
    threads.delay_s = 1
    async with trio.open_nursery() as nursery:
        queue = WriteQueue(nursery, trio.CapacityLimiter(1))
        queue.put(1, lambda: made.append(0))
        await trio.sleep(0.5)
        queue.put(1, lambda: made.append(1))
        nursery.cancel_scope.cancel()
    assert made == [0, 1]
    queue.put(1, lambda: made.append(2))
    assert made == [0, 1, 2]


async def test_what_was_written_is_not_kept_in_memory(nursery: trio.Nursery) -> None:
    class Data:
        def write(self) -> None:
            pass

    queue, data = WriteQueue(nursery, trio.CapacityLimiter(1)), Data()
    there = weakref.ref(data)
    queue.put(1, data.write)
    del data
    await wait_all_tasks_blocked()
    assert there() is None
