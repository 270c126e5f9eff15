"""Tests jobs: those of population, which pause, resume and end, and others that run in a task."""

from typing import Any

import pytest
import trio
from engine_world import BLOCK, World, blocks, check_answer, run, until
from fakes import pattern

from lazyfs import errors
from lazyfs.control.jobs import Task
from lazyfs.core import control_schema
from lazyfs.core.lifecycle import State
from lazyfs.core.qmp_wire import CommandError
from lazyfs.engine import pace
from lazyfs.engine.image.image import Image
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 4 * MiB


def world_with(*names: str, **options: Any) -> World:
    world = World(**options)
    for name in names:
        world.repository.add(name, pattern(SIZE))
    world.repository.delay_s = 0.1  # of 16 requests: filling takes a while
    return world


async def jobs(world: World) -> dict[str, str]:
    return {job["id"]: job["status"] for job in await world.command("query-jobs")}


def statuses(world: World, job: str) -> list[str]:
    """Return what clients were told about a job."""
    known = ("running", "paused", "standby", "concluded", "null")
    return [status for name, status in world.events if name == job and status in known]


async def begun(world: World, name: str = "disk") -> Image:
    image = await world.open(name)
    await until(lambda: image.statistics().populated_bytes)
    return image


async def test_an_image_that_is_populated_is_a_job_until_it_is_whole() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        assert await jobs(world) == {}
        image = await begun(world)
        (job,) = await world.command("query-jobs")
        assert (job["id"], job["type"], job["status"]) == ("disk", "populate", "running")
        assert 0 < job["current-progress"] < job["total-progress"] == SIZE
        await until(lambda: image.record.state is State.WHOLE)
        assert await jobs(world) == {}
        heard = statuses(world, "disk")
        assert (heard[0], heard[-1]) == ("running", "null")
        assert [e for e in world.events if e[1] in ("partial", "whole")] == [
            ("disk", "partial"),
            ("disk", "whole"),
        ]
        await world.close(image)


async def test_pause_stops_even_the_turn_under_way_and_resume_goes_on() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await world.command("job-pause", id="disk")
        under_way = len(world.fills())
        assert await jobs(world) == {"disk": "paused"}
        await trio.sleep(100)
        assert len(world.fills()) == under_way
        assert image.record.state is State.PARTIAL
        with pytest.raises(errors.UserError, match="paused already"):
            await world.command("job-pause", id="disk")
        await world.check(image, blocks(60, 64))  # readers get theirs
        await world.command("job-resume", id="disk")
        await until(lambda: image.record.state is State.WHOLE)
        assert statuses(world, "disk")[:3] == ["running", "paused", "running"]
        await world.close(image)


async def test_a_paused_image_that_readers_complete_is_whole() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await world.command("job-pause", id="disk")
        await world.read(image, 0, SIZE)
        await until(lambda: image.record.state is State.WHOLE)
        assert await jobs(world) == {}
        await world.close(image)


async def test_one_paused_image_leaves_the_others_their_turns() -> None:
    world = world_with("one", "two")
    async with world.daemon(populate=True):
        one = await begun(world, "one")
        await world.command("job-pause", id="one")
        two = await begun(world, "two")
        await until(lambda: two.record.state is State.WHOLE)
        assert await jobs(world) == {"one": "paused"}
        await world.close(one)
        await world.close(two)


async def test_cancel_keeps_what_is_there_and_the_next_first_open_begins_again() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await world.command("job-cancel", id="disk")
        assert await jobs(world) == {}
        await until(lambda: image.populating.waits_since is None or image.filling)
        await trio.sleep(100)
        present = image.statistics().present_bytes
        assert 0 < present < SIZE
        second = await world.open("disk")  # not the first
        await trio.sleep(100)
        assert image.statistics().present_bytes == present
        await world.close(second)
        await world.close(image)
        await world.open("disk")
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)


async def test_cancel_of_a_paused_job_then_prefetch() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await world.close(image)
        await world.command("job-pause", id="disk")
        await world.command("job-cancel", id="disk")
        assert await jobs(world) == {}
        await world.command("prefetch", path="disk")
        assert await jobs(world) == {"disk": "running"}
        await until(lambda: image.record.state is State.WHOLE)


async def test_prefetch_of_a_paused_image_leaves_it_paused() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await world.command("job-pause", id="disk")
        await world.command("prefetch", path="disk")
        assert await jobs(world) == {"disk": "paused"}
        await trio.sleep(100)
        assert image.record.state is State.PARTIAL
        await world.close(image)


async def test_standby_while_the_repository_or_room_is_missing() -> None:
    world = world_with("disk")
    world.repository.delay_s = 0.7  # several turns
    async with world.daemon(populate=True):
        image = await begun(world)
        world.repository.down = True
        await until(lambda: statuses(world, "disk")[-1] == "standby")
        (job,) = await world.command("query-jobs")
        assert "no connection" in job["error"]
        world.repository.down = False
        await until(lambda: statuses(world, "disk")[-1] == "running")
        world.stores.room_low = True
        await until(lambda: statuses(world, "disk")[-1] == "standby")
        (job,) = await world.command("query-jobs")
        assert "nearly full" in job["error"]
        world.stores.room_low = False
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)


@pytest.mark.parametrize("command", ["job-pause", "job-resume", "job-cancel", "job-dismiss"])
async def test_jobs_that_do_not_exist(command: str) -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        for job in ("disk", "", "verify:disk", "elsewhere"):
            with pytest.raises(errors.UserError, match="not found"):
                await world.command(command, id=job)


async def test_what_a_job_of_population_refuses() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        with pytest.raises(errors.UserError, match="is not paused"):
            await world.command("job-resume", id="disk")
        with pytest.raises(errors.UserError, match="has not concluded"):
            await world.command("job-dismiss", id="disk")
        await world.close(image)


# -- other work


async def test_work_that_runs_fails_and_is_dismissed() -> None:
    world = world_with("disk")
    go_on = trio.Event()

    async def work(task: Task) -> None:
        task.advance(7)
        await go_on.wait()
        raise errors.UserError("it cannot be done")

    async with world.daemon():
        world.jobs.start("a", "verify", 10, work)
        await trio.testing.wait_all_tasks_blocked()
        (job,) = await world.command("query-jobs")
        assert (job["type"], job["status"]) == ("verify", "running")
        assert (job["current-progress"], job["total-progress"]) == (7, 10)
        assert "error" not in job or "cancelled" in job["error"]
        with pytest.raises(errors.UserError, match="running already"):
            world.jobs.start("a", "verify", 10, work)
        for refused in ("job-pause", "job-resume"):
            with pytest.raises(errors.UserError, match="cannot be"):
                await world.command(refused, id="a")
        with pytest.raises(errors.UserError, match="has not concluded"):
            await world.command("job-dismiss", id="a")
        go_on.set()
        await until(lambda: statuses(world, "a") == ["running", "concluded"])
        (job,) = await world.command("query-jobs")
        assert job["error"] == "it cannot be done"
        with pytest.raises(errors.UserError, match="has concluded"):
            await world.command("job-cancel", id="a")
        await world.command("job-dismiss", id="a")
        assert await jobs(world) == {}
        assert statuses(world, "a") == ["running", "concluded", "null"]


async def test_work_that_is_cancelled_and_begun_again() -> None:
    world = world_with("disk")
    async with world.daemon():

        async def for_ever(task: Task) -> None:
            await trio.sleep_forever()

        world.jobs.start("a", "verify", 10, for_ever)
        await world.command("job-cancel", id="a")
        await until(lambda: statuses(world, "a")[-1] == "concluded")
        (job,) = await world.command("query-jobs")
        assert job["error"] == "cancelled"

        async def work(task: Task) -> None:
            await trio.lowlevel.checkpoint()

        world.jobs.start("a", "verify", 0, work)
        await until(lambda: statuses(world, "a")[-1] == "concluded")
        (job,) = await world.command("query-jobs")
        assert "error" not in job


async def test_a_bug_in_work_is_an_error_of_the_job(caplog: pytest.LogCaptureFixture) -> None:
    world = world_with("disk")

    async def work(task: Task) -> None:
        raise ZeroDivisionError

    async with world.daemon():
        world.jobs.start("a", "verify", 0, work)
        await until(lambda: statuses(world, "a")[-1] == "concluded")
        (job,) = await world.command("query-jobs")
        assert "a bug in lazyfs" in job["error"]
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_what_is_told_is_what_the_schema_says() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        image = await begun(world)
        await until(lambda: image.record.state is State.WHOLE)
        await world.close(image)
    (event,) = [event for event in control_schema.EVENTS if event.name == "JOB_STATUS_CHANGE"]
    for job, status in world.events:
        check_answer(event, {"id": job, "status": status})


# -- rates


async def test_a_rate_of_one_image_counts_from_now_on() -> None:
    world = world_with("one", "two")
    async with world.daemon(populate=True):
        await world.command("set-rate", path="one", rate=64 * KiB)
        one, two = await begun(world, "one"), await begun(world, "two")
        at = trio.current_time()
        await until(lambda: two.record.state is State.WHOLE)
        before = one.statistics().populated_bytes
        await trio.sleep(10)
        assert (
            one.statistics().populated_bytes - before
            <= 10 * 64 * KiB + 2 * world.repository.REQUEST
        )
        assert one.record.state is State.PARTIAL
        assert trio.current_time() - at < 60
        await world.command("set-rate", path="one", rate=0)
        at = trio.current_time()
        await until(lambda: one.record.state is State.WHOLE)
        assert trio.current_time() - at < 10
        await world.close(one)
        await world.close(two)


async def test_a_rate_of_all_counts_for_all_and_at_once() -> None:
    world = world_with("one", "two", fill_rate=1)
    async with world.daemon(populate=True):
        one, two = await begun(world, "one"), await world.open("two")
        await trio.sleep(60)
        assert len(world.fills()) <= 2
        assert await world.command("set-rate", path="", rate=0) == {"images": 2}
        at = trio.current_time()
        await until(lambda: one.record.state is two.record.state is State.WHOLE)
        assert trio.current_time() - at < 20 + 10 * pace.MAX_WAIT_S
        await world.close(one)
        await world.close(two)


async def test_rates_that_are_none() -> None:
    world = world_with("disk")
    async with world.daemon(populate=True):
        with pytest.raises(CommandError, match="'rate'"):
            await world.command("set-rate", path="disk", rate=-1)
        with pytest.raises(CommandError, match="no image"):
            await world.command("set-rate", path="elsewhere", rate=1)
        for rate in (2**63 - 1, 1):
            await world.command("set-rate", path="disk", rate=rate)
        image = await world.open("disk")
        await trio.sleep(10)
        await world.check(image, blocks(50))  # never of readers
        assert image.statistics().populated_bytes <= 4 * BLOCK
        await world.close(image)


async def test_population_that_is_paused_stays_so_for_later_images_and_over_a_restart() -> None:
    world = world_with("a", "b")
    async with world.daemon(populate=True):
        await world.command("population-pause")
        a = await world.open("a")
        await world.check(a, blocks(0))
        await trio.sleep(100)
        assert world.fills() == []
        (job,) = await world.command("query-jobs")
        assert job["status"] == "standby"
        assert "lazyfs resume" in job["error"]
        await world.close(a)
    async with world.daemon(populate=True):
        b = await world.open("b")
        await world.check(b, blocks(0))
        await trio.sleep(100)
        assert world.fills() == []
        await world.command("population-resume")
        await until(lambda: b.record.state is State.WHOLE)
        await until(lambda: world.image("a").record.state is State.WHOLE)
        await world.close(b)
