"""Tests what must not last: objects that have left the tables, failures, and waits.

Nothing holds an object that has left the tables, a failure concerns one image, and nothing waits
for ever.
"""

import errno
import gc
import hashlib
import itertools
import logging
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import suppress

import fakes
import pytest
import trio
from engine_world import BLOCK, World, blocks, run, threads, until
from fakes import pattern

from lazyfs import errors
from lazyfs.core import extent_map
from lazyfs.core.eviction import Limits
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine import verifying
from lazyfs.engine.fetch import block_table, demand_fetch, demand_reader
from lazyfs.engine.fetch.demand_fetch import DemandFetch
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.image import filling as filling_module
from lazyfs.engine.image.image import Image
from lazyfs.engine.population import WORKERS, Population
from lazyfs.engine.supervision import Supervisor
from lazyfs.units import MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 16 * BLOCK


def world_with(*names: str, size: int = SIZE, **options: object) -> World:
    world = World(**options)  # type: ignore[arg-type]
    for name in names:
        world.repository.add(name, pattern(size))
    return world


async def whole(world: World, name: str = "a") -> Image:
    await world.command("prefetch", path=name)
    image = world.image(name)
    await until(lambda: image.record.state is State.WHOLE)
    return image


async def verified(world: World, path: str, **arguments: object) -> str:
    """Return the error of a verify job."""
    answer = await world.command("verify", path=path, **arguments)
    return await concluded(world, answer["id"])


async def concluded(world: World, job: str) -> str:
    def error() -> str | None:
        for one in world.jobs.statistics():
            if one.id == job and one.status == "concluded":
                return one.error
        return None

    await until(lambda: error() is not None)
    found = error()
    assert found is not None
    return found


# -- races with an eviction


@pytest.mark.parametrize("opened_as_whole", [False, True])
async def test_an_open_that_meets_an_eviction_leaves_nothing_behind(opened_as_whole: bool) -> None:
    world = world_with("a", limits=Limits(max_cache=64 * MiB))
    async with world.daemon(populate=True):
        image = await whole(world)
        threads.delay_s = 0.2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.operations.evict, image)
            await trio.sleep(0.1)
            with pytest.raises(OSError, match="Stale") as refused:
                await world.open_image(image, opened_as_whole)
            assert refused.value.errno == errno.ESTALE
        threads.delay_s = 0.0
        assert image not in list(world.filesystem.names.all_images())
        assert image not in world.filesystem._active.values()
        assert world.room.statistics().used == world.stores.allocated() == 0


@pytest.mark.parametrize("asked", ["query-map", "verify"])
async def test_a_command_that_meets_an_eviction_leaves_nothing_behind(asked: str) -> None:
    world = world_with("a", limits=Limits(max_cache=64 * MiB))
    async with world.daemon(populate=True):
        image = await whole(world)
        threads.delay_s = 0.2

        async def ask() -> None:
            with suppress(OSError):
                await world.command(asked, path="a")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.25)  # it has the file open
            threads.delay_s = 0.0
            await world.operations.evict(image)
        await trio.sleep(10)
        assert image not in list(world.filesystem.names.all_images())
        assert world.room.statistics().used == 0


@pytest.mark.parametrize("annotation", ["pin", "digest", "touch"])
async def test_what_an_operator_says_during_an_eviction_is_said_of_the_image_that_comes(
    annotation: str,
) -> None:
    world = world_with("a")
    async with world.daemon(populate=True):
        image = await whole(world)
        threads.delay_s = 0.5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.operations.evict, image)
            await trio.sleep(0.1)
            if annotation == "pin":
                await world.command("pin", path="a")
            elif annotation == "digest":
                await world.operations.set_digest(image, "sha256:" + "0" * 64)
            else:
                await world.operations.touch(image, 12345)
        now = world.image("a")
        assert now is not image
        record = world.catalog.records[now.inode]
        assert {
            "pin": record.pinned,
            "digest": record.digest == "sha256:" + "0" * 64,
            "touch": record.last_used_ns == 12345,
        }[annotation]


async def test_a_verification_that_begins_during_the_hand_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a")
    async with world.daemon(populate=True):
        image = await world.open("a")
        begun = trio.Event()
        become_whole = image._become_whole

        async def slow(filling: filling_module.Filling) -> bool:
            begun.set()
            await trio.sleep(5)  # checkpoint and finish of a large file on a slow disk
            return await become_whole(filling)

        monkeypatch.setattr(image, "_become_whole", slow)
        await begun.wait()
        assert not world.stores.plain
        assert await verified(world, "a") == ""
        assert world.stores.plain
        await world.close(image)


# -- failures that are kept, and what they keep


async def test_reads_of_a_failed_image_keep_nothing_in_memory() -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        await image.fail(Cause.EXPORT_CHANGED, errors.ExportChanged("a", "1", "2"))
        assert image.filling is not None

        async def reads(count: int) -> None:
            for _ in range(count):
                try:
                    await world.read(image, 0, 4096)
                except errors.ExportChanged:
                    await trio.lowlevel.checkpoint()  # trio forgets deadlines that have passed
                else:
                    raise AssertionError("it has not failed")

        await reads(2000)
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await reads(4000)
            gc.collect()
            kept = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert kept < 400_000, f"{kept / 4000} bytes for each read"
        failure = image.filling.table.failure
        assert failure is not None
        assert failure.__traceback__ is None
        assert failure.__context__ is None
        await world.close(image)


async def test_all_who_hear_of_a_failed_fetch_hear_of_it_by_an_error_of_their_own() -> None:
    world = world_with("a", populate=False)
    world.repository.fail("a", blocks(3))
    async with world.daemon():
        image = await world.open("a")
        world.repository.delay_s = 1
        heard: list[errors.RequestFailed] = []

        async def reader() -> None:
            with pytest.raises(errors.RequestFailed) as caught:
                await world.read(image, 3 * BLOCK, 10)
            heard.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert len({id(error) for error in heard}) == 5
        await world.close(image)


async def test_data_that_was_lost_is_said_once_and_the_task_of_the_image_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        world.stores.checkpoint_error = errors.CacheCorrupt("the disk could not take the data")
        await world.check(image, blocks(0))
        await trio.sleep(600)
        critical = [one for one in caplog.records if one.levelno == logging.CRITICAL]
        assert len(critical) == 1
        with pytest.raises(errors.CacheCorrupt):
            await world.read(image, 0, 10)
        assert "mount anew" in image.statistics().error
        await world.close(image)
        world.stores.checkpoint_error = None


async def test_a_hand_off_that_cannot_succeed_is_tried_again_once_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[float] = []
    finish = fakes.MemoryStore.finish

    def counted(self: fakes.MemoryStore) -> None:
        attempts.append(trio.current_time())
        finish(self)

    monkeypatch.setattr(fakes.MemoryStore, "finish", counted)
    world = world_with("a")
    async with world.daemon(populate=True):
        world.stores.plain["a"] = b"somebody else's"
        image = await world.open("a")
        await trio.sleep(3600)
        assert "in the way" in image.statistics().error
        assert 60 <= len(attempts) <= 70, "5, 10, 20, 40 s, and then each minute"
        del world.stores.plain["a"]
        await until(lambda: image.record.state is State.WHOLE)
        assert image.statistics().error == ""
        await world.close(image)


# -- connections


async def test_the_connection_goes_with_the_last_close_whatever_is_under_way() -> None:
    world = world_with("a", size=256 * BLOCK, populate=False)
    async with world.daemon():
        image = await world.open("a")
        await world.read(image, 0, 4096)
        world.repository.demand_delay_s = 2.0
        await world.read(image, BLOCK, 4096)  # its readahead is answered later
        assert image.filling is not None
        source = image.filling.reader._source
        assert image.filling.table.under_way()
        await world.close(image)
        await trio.sleep(100)
        assert image.filling.table.under_way() == []
        assert not source._connected  # type: ignore[attr-defined]
        again = await world.open("a")
        await world.check(again, blocks(100))
        await world.close(again)


async def test_population_leaves_no_connection_of_its_questions_behind() -> None:
    world = world_with("a", populate=False)
    async with world.daemon(populate=True):
        world.repository.fail("a", blocks(3))  # so that it does not become whole
        await world.command("prefetch", path="a")
        await trio.sleep(100)
        image = world.image("a")
        assert image.record.state is State.PARTIAL
        assert image.filling is not None
        assert not image.filling.reader._source._connected  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["evict", "evict while open", "replace", "whole"])
@pytest.mark.parametrize("connected", [True, False])
async def test_no_connection_is_left_of_an_image_that_has_gone(how: str, connected: bool) -> None:
    """Nor is one made anew, for a fetch that was under way and that nobody waits for."""
    world = world_with("a", size=64 * BLOCK, populate=False, replace_changed=True)
    async with world.daemon():
        image = await world.open("a")
        if connected:
            await world.read(image, 0, 4096)
            world.repository.demand_delay_s = 2.0
            await world.read(image, BLOCK, 4096)  # its readahead is answered later
        else:
            world.repository.down = True
            with trio.move_on_after(1):
                await world.read(image, 0, 4096)
        if how == "evict while open":
            await world.command("evict", path="a")
        assert connected == bool(image.filling and image.filling.table.under_way())
        await world.close(image)
        if how == "evict":
            await world.command("evict", path="a")
        elif how == "replace":
            world.repository.add("a", pattern(65 * BLOCK))
            with suppress(errors.ConnectionLost):
                await world.filesystem.refresh()
        elif how == "whole":
            world.repository.demand_delay_s = 0.0
            world.repository.down = False
            again = await world.open("a")
            await world.read(again, 0, 64 * BLOCK)
            await world.close(again)
        world.repository.down = False
        world.repository.demand_delay_s = 0.0
        await trio.sleep(100)
        assert world.repository.connections() == 0
        assert len(world.stores.open_files) <= 1


# -- background work that fails


async def test_a_catalog_that_cannot_be_written_costs_the_last_uses_and_no_mount() -> None:
    world = world_with("a")
    async with world.daemon():
        await world.close(await world.open("a"))
        world.catalog.error = errors.CacheCorrupt(
            "catalog.sqlite: database disk image is malformed"
        )
        await world.filesystem.save_uses()
        world.catalog.error = None
        await world.filesystem.save_uses()
        assert world.catalog.load()[0].last_used_ns > 0


async def test_a_file_system_that_cannot_say_how_full_it_is_pauses_population(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a", limits=Limits(min_free=MiB))
    async with world.daemon(populate=True):
        with monkeypatch.context() as patch:

            def broken(*_: object) -> bool:
                raise OSError(errno.ESTALE, "Stale file handle")

            patch.setattr(world.stores, "nearly_full", broken)
            patch.setattr(world.stores, "space", broken)
            image = await world.open("a")
            await trio.sleep(100)
            assert "cannot say how full it is: Stale file handle" in world.population.paused
            await world.check(image, blocks(0, 2))
            world.filesystem.budget.on_low()
            await trio.sleep(100)
            assert "cannot tell: Stale file handle" in world.room.message
            assert world.supervisor.message == ""
        world.room.want()
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)


class _Bug(Exception):
    pass


def _failing(
    real: Callable[..., Awaitable[object]], times: int
) -> Callable[..., Awaitable[object]]:
    async def fails(*args: object, **named: object) -> object:
        nonlocal times
        if times:
            times -= 1
            raise _Bug("a bug")
        return await real(*args, **named)

    return fails


async def test_a_bug_in_a_turn_of_population_concerns_one_image(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = world_with("bad", "good")
    real = Population._learn

    async def learn(self: Population, filling: filling_module.Filling) -> None:
        if filling.port.export.name == "bad" and broken:
            raise _Bug("a bug")
        await real(self, filling)

    broken = True
    monkeypatch.setattr(Population, "_learn", learn)
    async with world.daemon(populate=True):
        bad, good = await world.open("bad"), await world.open("good")
        await until(lambda: good.record.state is State.WHOLE)
        assert "a bug in lazyfs" in bad.statistics().error
        await world.check(bad, blocks(3))
        assert world.supervisor.message == ""
        broken = False
        await until(lambda: bad.record.state is State.WHOLE)
        assert bad.statistics().error == ""
        await world.close(bad)
        await world.close(good)
    assert "filling failed" in caplog.text


async def test_a_bug_in_the_task_of_an_image_concerns_that_image_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = world_with("bad", "good", populate=False)
    async with world.daemon():
        bad, good = await world.open("bad"), await world.open("good")
        monkeypatch.setattr(bad, "_checkpoint", _failing(bad._checkpoint, 2))
        for image in (bad, good):
            await world.check(image, blocks(0))
        await until(lambda: "a bug in lazyfs" in bad.statistics().error)
        assert not bad.fillable
        await world.check(bad, blocks(1))
        assert good.statistics().error == ""
        await until(lambda: world.catalog.records[bad.inode].present_bytes > 0)
        assert bad.statistics().error == ""
        await world.close(bad)
        await world.close(good)
    assert "attending to an image failed" in caplog.text


async def test_a_bug_in_a_fetch_fails_its_readers_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        with monkeypatch.context() as patch:
            patch.setattr(demand_fetch, "submit", lambda *_: False)
            patch.setattr(
                demand_fetch,
                "receive",
                _failing(demand_fetch.receive, 1),
            )
            with pytest.raises(errors.RequestFailed):
                await world.read(image, 0, 10)
        await world.check(image, blocks(0))
        assert image.filling is not None
        await until(lambda: image.filling is not None and not image.filling.table.under_way())
        await world.close(image)
    assert "a fetch failed, a bug in lazyfs" in caplog.text


async def test_a_task_that_fails_is_reported_and_started_again_later_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor, starts = Supervisor(), list[float]()

    async def work() -> None:
        starts.append(trio.current_time())
        if len(starts) < 5:
            raise _Bug("a bug")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.keep_running, "the work", work)
        await trio.sleep(0.5)
        assert "the work failed" in supervisor.message
    assert supervisor.message == ""
    assert [round(b - a) for a, b in itertools.pairwise(starts)] == [1, 2, 4, 8]
    assert caplog.text.count("the work failed, to be started again") == 4


# -- nothing blocks, and nobody starves


async def test_a_verification_gives_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_memory(self: fakes._MemoryReader, offset: int, length: int) -> bytes:
        return self.read(offset, length)

    monkeypatch.setattr(fakes._MemoryReader, "read_nowait", in_memory)
    world = world_with("a", size=32 * MiB)
    async with world.daemon(populate=True):
        image = await whole(world)
        turns, seen = 0, list[int]()

        async def ticker() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticker)
            await verifying.verify(image, "", None, 30, lambda size: seen.append(turns))
            nursery.cancel_scope.cancel()
        assert len(seen) == 32
        assert seen[-1] - seen[0] >= 30, "a turn for each chunk"


@pytest.mark.parametrize("limited_open", [True, False])
async def test_an_image_that_its_rate_limit_holds_back_keeps_nobody_from_being_filled(
    limited_open: bool,
) -> None:
    world = world_with("limited", "other")
    async with world.daemon(populate=True):
        await world.command("set-rate", path="limited", rate=100)
        if limited_open:
            await world.open("limited")
        else:
            await world.command("prefetch", path="limited")
        await world.command("prefetch", path="other")
        await until(lambda: world.image("other").record.state is State.WHOLE, 30)
        assert world.image("limited").record.state is State.PARTIAL


async def test_of_two_first_opens_at_once_one_is_the_first() -> None:
    world = world_with("a", size=64 * BLOCK)
    async with world.daemon(populate=True):
        image = await world.open("a")
        world.repository.delay_s = 0.2
        await trio.sleep(0.1)
        await world.command("job-cancel", id="a")
        await world.close(image)
        assert not image.populating.wanted
        threads.delay_s = 0.01
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.open, "a")
            nursery.start_soon(world.open, "a")
        assert image.populating.wanted
        await world.close(image)
        await world.close(image)


async def test_what_holds_data_is_asked_about_once_however_many_turns_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extent_map, "WINDOW", 2 * BLOCK)
    looked: list[int] = []
    real = block_table.BlockTable.missing_window

    def missing_window(self: block_table.BlockTable, position: int) -> object:
        looked.append(position)
        return real(self, position)

    monkeypatch.setattr(block_table.BlockTable, "missing_window", missing_window)
    world = world_with("a", size=64 * BLOCK)
    async with world.daemon(populate=True):
        await world.command("set-rate", path="a", rate=BLOCK // 4)
        await world.open("a")
        await trio.sleep(200)
        assert world.population._turns > 10
        assert len(world.repository.status_log) == 32
        assert len(looked) < WORKERS * 32 + 2 * world.population._turns, "it goes on where it was"


# -- claims and reservations end


async def test_without_memory_for_a_fetch_nothing_is_left_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        assert image.filling is not None
        await image.filling.reader.learn_next()
        made = 0

        def no_memory(*args: object) -> DemandFetch:
            nonlocal made
            made += 1
            if made == 2:
                raise MemoryError
            return DemandFetch(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(demand_reader, "DemandFetch", no_memory)
            patch.setattr(image.filling.reader._read_around, "unit", 4 * BLOCK)
            with pytest.raises(MemoryError):
                await world.read(image, BLOCK, 10)
        assert made == 2
        assert image.filling.table.under_way() == []
        await world.check(image, blocks(0, 4))
        await world.close(image)
        assert world.filesystem._context.pace._gate._waiting == 0


async def test_without_a_thread_what_was_fetched_is_written_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        image = await world.open("a")
        await world.check(image, blocks(5))

        async def no_thread(_number: int) -> None:
            raise RuntimeError("can't start new thread")

        threads.on_call = no_thread
        await world.check(image, blocks(0))
        await trio.sleep(1)
        threads.on_call = None
        assert image.filling is not None
        assert image.filling.table.present(blocks(0))
        await world.close(image)
    assert "no thread could be had" in caplog.text


async def test_a_batch_that_waits_for_its_thread_is_written_when_the_daemon_ends() -> None:
    done: list[str] = []
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as daemon:
        queue = WriteQueue(daemon, limiter)
        limiter.acquire_on_behalf_of_nowait("a thread that hangs")
        queue.put(10, lambda: done.append("first"))
        await trio.sleep(1)
        queue.put(10, lambda: done.append("second"))
        await trio.sleep(1)
        daemon.cancel_scope.cancel()
        limiter.release_on_behalf_of("a thread that hangs")
    queue.put(10, lambda: done.append("third"))
    assert done == ["first", "second", "third"]


# -- the end of the daemon


@pytest.mark.parametrize("how", ["plain", "digest", "against the repository"])
async def test_a_verification_under_way_ends_before_the_files_that_it_reads(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes._MemoryReader, "read_nowait", lambda self, offset, length: None)
    content = pattern(16 * MiB)
    world = world_with("a", "z", size=16 * MiB, populate=False)
    async with world.daemon(populate=True):
        image = await whole(world)
        await world.open_image(
            image, whole=True
        )  # and nobody closes it: the kernel's connection ends
        other = await world.open("z")
        await world.read(other, 0, 10)  # something to save at the end
        threads.delay_s = 0.05
        arguments: dict[str, object] = {}
        if how == "digest":
            arguments["digest"] = f"sha256:{hashlib.sha256(content).hexdigest()}"
        elif how == "against the repository":
            arguments["against_repository"] = True
            world.repository.delay_s = 1.0
        await world.command("verify", path="a", **arguments)
        await trio.sleep(0.23)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert world.catalog.load()[0].state is State.WHOLE


# -- rows and names


async def test_a_row_that_could_not_be_removed_is_removed_later() -> None:
    world = world_with("a")
    async with world.daemon():
        del world.repository.exports["a"]
        world.catalog.error = errors.NoSpace()
        with pytest.raises(errors.NoSpace):
            await world.filesystem.refresh()
        assert world.filesystem.names.node_at("a") is None
        world.catalog.error = None
        await world.filesystem.refresh()
        assert world.catalog.load() == []


@pytest.mark.parametrize("stale", ["a", "a/b/c"])
async def test_a_stale_row_is_in_nobodys_way_after_a_restart(stale: str) -> None:
    world = world_with(stale)
    async with world.daemon():
        (row,) = world.catalog.load()
    del world.repository.exports[stale]
    world.repository.add("a/b", pattern(SIZE))
    world.catalog.records.clear()
    async with world.daemon():  # as after a failure to remove the row
        pass
    world.catalog.records[row.inode] = row
    async with world.daemon():
        assert [image.record.path for image in world.filesystem.names.images()] == ["a/b"]
        await world.filesystem.refresh()
        assert [record.path for record in world.catalog.load()] == ["a/b"]


async def test_an_image_that_goes_while_it_changes_its_format_is_dropped_once() -> None:
    world = world_with("a", "b", populate=False)
    async with world.daemon():
        del world.repository.exports["a"]
        threads.delay_s = 0.2
        async with trio.open_nursery() as nursery:

            async def prefetch() -> None:
                with suppress(errors.UserError):
                    await world.operations.prefetch(world.image("a"), "qcow2")

            nursery.start_soon(prefetch)
            await trio.sleep(0.1)
            await world.filesystem.refresh()
        threads.delay_s = 0.0
        await world.filesystem.refresh()
        await world.filesystem.refresh()
        assert [record.export for record in world.catalog.load()] == ["b"]
        assert sorted(world.filesystem.names.root.entries) == ["b"]


async def test_no_two_images_get_one_path_while_both_are_on_their_way() -> None:
    world = world_with("a", populate=False)
    async with world.daemon():
        world.repository.add("a.qcow2", pattern(SIZE))
        threads.delay_s = 0.2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.filesystem.refresh)
            await trio.sleep(0.1)
            await world.operations.prefetch(world.image("a"), "qcow2")
        threads.delay_s = 0.0
        images = {
            image.record.export: image.record.path for image in world.filesystem.names.images()
        }
        assert len(set(images.values())) == 2
        for path in images.values():
            assert world.filesystem.names.node_at(path) is not None


async def test_an_image_that_is_evicted_while_it_is_resumed_is_not_begun_anew() -> None:
    world = world_with("a", "b", populate=False)
    async with world.daemon():
        for name in "ab":
            image = await world.open(name)
            await world.read(image, 0, 10)
            await trio.sleep(10)
            await world.close(image)
    async with world.daemon():
        old = world.image("b")
        await old.aclose()  # as it is before `resume` has come to it
        await world.filesystem.evict(old)
        before = dict(world.stores.partials)
        with pytest.raises(OSError, match="Stale"):
            await old.resume()
        assert old.filling is None
        assert world.stores.partials == before


@pytest.mark.parametrize("what", ["pinned", "gone"])
async def test_room_is_not_made_of_an_image_that_must_stay_meanwhile(what: str) -> None:
    world = world_with("a", "b", populate=False, limits=Limits(max_cache=4 * SIZE))
    async with world.daemon(populate=True):
        for name in "ab":
            await whole(world, name)
            await trio.sleep(1)
        kept = world.image("b")  # the last to go
        world.room._limits = Limits(max_cache=BLOCK)
        threads.delay_s = 0.1
        world.filesystem.budget.on_low()
        await until(lambda: bool(world.filesystem._replacing))
        if what == "pinned":
            await world.command("pin", path="b")
        else:
            del world.repository.exports["b"]
            await world.filesystem.refresh()
            assert kept.gone
        await trio.sleep(5)
        threads.delay_s = 0
        assert not kept.retired
        assert world.image("b") is kept


async def test_a_bug_in_one_image_at_the_end_does_not_keep_the_others_from_being_saved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = world_with("a", "b", populate=False)
    world.may_leave_files_open = True

    async def bug() -> None:
        raise AssertionError("a bug")

    async with world.daemon():
        first, second = await world.open("a"), await world.open("b")
        for image in (first, second):
            await world.read(image, 0, 10)
        monkeypatch.setattr(first, "aclose", bug)
    assert f"map {second.inode}" in world.stores.journal
    assert "not closed cleanly, a bug in lazyfs: image=a" in caplog.text
