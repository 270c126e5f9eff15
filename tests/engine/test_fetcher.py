"""Tests who fetches which block, who joins a fetch, and what is remembered of failures."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from engine_world import BLOCK, IO_TIMEOUT_S, World, blocks, run, threads, until
from fakes import FakeRepository, MemoryStores, pattern
from trio.testing import wait_all_tasks_blocked

from lazyfs import errors
from lazyfs.core import extent_map, fetch_plan
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import FetchCounters, ImageRecord
from lazyfs.core.lifecycle import State
from lazyfs.engine.budget import Budget
from lazyfs.engine.fetch import waiting_reads, write_queue
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.fetch.cache_writer import CacheWriter
from lazyfs.engine.fetch.demand_fetch import KERNEL_RETRY_S
from lazyfs.engine.fetch.demand_reader import DemandReader
from lazyfs.engine.fetch.fill_port import FillClaim, FillPort
from lazyfs.engine.fetch.samples import Compared, Samples
from lazyfs.engine.fetch.under_way import UnderWay
from lazyfs.engine.fetch.waiting_reads import WaitingReads
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.image.filling import Filling
from lazyfs.engine.interfaces import Answered, Export
from lazyfs.engine.pace import Pace, SharedPace
from lazyfs.engine.totals import Totals
from lazyfs.units import KiB, MiB

pytestmark = pytest.mark.trio(run=run)

SIZE = 4 * MiB - 512


class Bench:
    """Holds a cache file that is being filled, over a fake export "disk" and a memory store."""

    def __init__(
        self,
        nursery: trio.Nursery,
        size: int = SIZE,
        holes: list[ByteRange] | None = None,
        block_size: int = BLOCK,
    ) -> None:
        self.nursery = nursery
        self.syncs = trio.CapacityLimiter(1)
        self.repository = FakeRepository()
        self.repository.nursery = nursery
        self.content = self.repository.add("disk", pattern(size), holes or []).content
        self.stores = MemoryStores()
        record = ImageRecord(2, "disk", "disk", size, "", "raw", State.PARTIAL, "", block_size, 0)
        self.store = self.stores.partial(record)
        self.blocks = self.store.load()
        self.changes: list[errors.ExportChanged] = []
        export = Export("disk", size, "")
        self.totals = Totals(trio.current_time)
        pace = Pace(SharedPace(None, trio.current_time))
        self.table = BlockTable(self.blocks, FetchCounters(0, 0, 0), self.totals)
        writer = CacheWriter("disk", self.store, Budget(), self.totals)
        self.reader = DemandReader(
            export,
            self.repository.source(export),
            self.table,
            writer,
            nursery=nursery,
            pace=pace,
            io_timeout_s=IO_TIMEOUT_S,
            totals=self.totals,
            under_way=UnderWay(),
            waiting=WaitingReads(),
            writes=WriteQueue(nursery, trio.CapacityLimiter(1)),
            on_changed=self.changes.append,
        )
        self.port = FillPort(export, self.table, writer, pace, self.totals)
        samples = Samples(self.table, self.store, self.totals, Compared())
        self.filling = Filling(
            self.store, self.table, writer, self.reader, self.port, samples, self.totals
        )

    async def read(self, where: ByteRange) -> bytes:
        """Read as `PartialHandle.read` does."""
        data = None
        if not self.table.present(where):
            data = await self.reader.read_missing(
                where, lambda gap: self.store.read(gap.start, gap.length)
            )
        return self.store.read(where.start, where.length) if data is None else data

    async def check(self, where: ByteRange) -> None:
        assert await self.read(where) == self.content[where.start : where.end]

    async def settled(self) -> None:
        """Wait until no fetch is under way."""
        await until(lambda: not self.table.under_way())

    def demand(self) -> list[ByteRange]:
        return self.repository.reads("disk", "demand")

    def nothing_kept(self) -> bool:
        return self.blocks.present_bytes == 0 and not any(self.stores.partials[2].data)


@asynccontextmanager
async def bench(**options: object) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        made = Bench(nursery, **options)  # type: ignore[arg-type]
        yield made
        assert not made.stores.odd_writes
        nursery.cancel_scope.cancel()


# -- one request for many readers


async def test_eight_readers_of_a_cold_block_cause_one_request() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        async with trio.open_nursery() as readers:
            for i in range(8):
                readers.start_soon(
                    b.check, ByteRange(5 * BLOCK + i * 8 * KiB, 5 * BLOCK + (i + 1) * 8 * KiB)
                )
        assert b.demand() == [blocks(5)]
        assert b.repository.status_log == [("disk", ByteRange(0, SIZE))]
        await b.settled()
        await b.check(blocks(5))
        assert b.demand() == [blocks(5)]
        assert b.table.counters() == FetchCounters(BLOCK, 0, 1)


async def test_overlapping_readers_fetch_each_byte_once() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        async with trio.open_nursery() as readers:
            for start, end in [(0, 3), (2, 9), (1, 2), (8, 40), (20, 63), (5, 6)]:
                readers.start_soon(b.check, ByteRange(start * BLOCK + 100, end * BLOCK - 100))
        await b.settled()
        asked = b.demand()
        assert (
            sum(r.length for r in asked)
            == len({i for r in asked for i in range(r.start, r.end, 512)}) * 512
        )
        assert b.repository.bytes_read() == b.table.present_bytes == b.table.counters().demand_bytes


async def test_a_read_of_everything_is_cut_into_fetches_that_run_together() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        await b.check(ByteRange(0, SIZE))
        assert trio.current_time() == pytest.approx(2, abs=0.1)  # block status, then all the reads
        assert sorted(b.demand()) == list(ByteRange(0, SIZE).split(MiB))
        await until(b.table.completed.is_set)


async def test_what_is_present_is_not_fetched_again_for_a_read_across_it() -> None:
    async with bench() as b:
        await b.check(blocks(10))
        await b.check(blocks(20))
        await b.settled()
        del b.repository.log[:]
        await b.check(ByteRange(5 * BLOCK + 100, 25 * BLOCK - 100))
        assert sorted(b.demand())[:3] == [blocks(5, 10), blocks(11, 20), blocks(21, 25)]


async def test_a_cancelled_reader_takes_nobody_along() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        async with trio.open_nursery() as readers:
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await b.read(blocks(7))

            readers.start_soon(impatient)
            await trio.sleep(1.5)  # the read is under way
            readers.start_soon(b.check, blocks(7))
            await wait_all_tasks_blocked()
            first.cancel()
        assert first.cancelled_caught
        assert b.demand() == [blocks(7)]


async def test_what_a_cancelled_reader_asked_for_is_kept() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        with trio.move_on_after(1.5) as scope:
            await b.read(blocks(7))
        assert scope.cancelled_caught
        await trio.sleep(1)
        assert b.table.present(blocks(7))
        await b.check(blocks(7))
        assert b.demand() == [blocks(7)]


async def test_a_reader_cancelled_while_it_learns_extents_leaves_the_question_to_the_next() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        async with trio.open_nursery() as readers:
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await b.read(blocks(7))

            readers.start_soon(impatient)
            await trio.sleep(0.5)
            readers.start_soon(b.check, blocks(8))
            await wait_all_tasks_blocked()
            first.cancel()
        assert b.demand() == [blocks(8)]


async def test_the_reader_does_not_wait_for_the_disk_and_later_readers_join_meanwhile() -> None:
    async with bench() as b:
        threads.delay_s = 5
        await b.check(blocks(0))
        assert trio.current_time() < 1
        assert not b.table.present(blocks(0))  # data first, then its state
        await b.check(blocks(0))
        assert trio.current_time() < 1
        assert b.demand() == [blocks(0)]
        await b.settled()
        assert b.table.present(blocks(0))


async def test_readers_wait_for_a_disk_that_falls_behind_and_get_what_they_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_queue, "MAX_WAITING", 2 * BLOCK)
    async with bench() as b:
        await b.check(blocks(60))
        await b.settled()
        threads.delay_s = 5
        began = trio.current_time()
        for block in (0, 10):
            await b.check(blocks(block))
        assert trio.current_time() < began + 1
        await b.check(blocks(20))
        assert trio.current_time() >= began + 5
        assert b.table.present(blocks(20))
        await b.settled()
        await b.check(blocks(30))
        assert not b.table.present(blocks(30)), "there is room again"


async def test_around_a_miss_of_a_far_repository_the_rest_of_its_unit_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch_plan, "WAITS", 1)
    async with bench() as b:
        b.repository.demand_delay_s = 0.02
        for block in (
            1,
            17,
            33,
        ):  # the unit doubles with each rest: two blocks, four, and then sixteen
            await b.check(blocks(block))
            await b.settled()
        assert b.demand() == [
            blocks(1),
            blocks(17),
            blocks(16),
            blocks(33),
            blocks(34, 36),
            blocks(32),
        ]
        await b.check(ByteRange(60 * BLOCK + 100, 60 * BLOCK + 200))
        assert b.demand()[6:] == [
            blocks(60),
            blocks(61, 64).clip(ByteRange(0, SIZE)),
            blocks(48, 60),
        ]
        await b.check(blocks(58))
        await b.settled()
        assert len(b.demand()) == 9, "it joined"
        assert b.repository.bytes_read() == b.table.present_bytes
        b.repository.demand_delay_s = 0.0  # it is near now
        for block in (8, 27):
            await b.check(blocks(block))
            await b.settled()
        assert b.demand()[-1] == blocks(27)


async def test_a_disk_that_stalls_is_named_by_the_reads_that_time_out_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_queue, "MAX_WAITING", BLOCK)
    async with bench() as b:
        await b.check(blocks(60))
        await b.settled()
        threads.delay_s = 2 * IO_TIMEOUT_S
        await b.check(blocks(0))
        with pytest.raises(errors.TimedOut, match="the cache's disk does not take what came"):
            await b.read(blocks(10))
        await b.settled()
        await b.check(blocks(10))
        assert b.demand() == [blocks(60), blocks(0), blocks(10)], (
            "what was asked for is kept in the end"
        )


# -- population's claims


def take(b: Bench, limit: int = 256 * KiB) -> FillClaim:
    claim = b.port.claim(limit)
    assert isinstance(claim, FillClaim)
    return claim


async def test_a_reader_joins_what_population_has_claimed() -> None:
    async with bench() as b:
        await b.reader.learn_next()
        claim = take(b)
        assert claim.parts == (blocks(0, 4),)
        async with trio.open_nursery() as readers:
            readers.start_soon(b.check, blocks(1))
            readers.start_soon(b.check, ByteRange(3 * BLOCK, 5 * BLOCK))
            await wait_all_tasks_blocked()
            claim.write(0, memoryview(b.content[: 4 * BLOCK]))
            claim.finish()
        assert min(b.demand()).start == 4 * BLOCK
        assert b.table.counters().populated_bytes == 4 * BLOCK


@pytest.mark.parametrize("error", [None, errors.RequestFailed("x", errno.EIO), errors.NoSpace()])
async def test_a_reader_fetches_itself_what_population_gives_back(error: Exception | None) -> None:
    async with bench() as b:
        await b.reader.learn_next()
        claim = take(b)
        async with trio.open_nursery() as readers:
            readers.start_soon(b.check, blocks(1))
            await wait_all_tasks_blocked()
            assert b.demand() == []
            claim.drop(error)
        assert blocks(1) in b.demand()
        assert str(b.port.trouble) == str(error)


async def test_a_reader_of_a_stuck_claim_times_out_alone() -> None:
    async with bench() as b:
        await b.reader.learn_next()
        claim = take(b)
        with pytest.raises(errors.TimedOut):
            await b.read(blocks(1))
        await b.check(blocks(9))
        claim.drop()
        await trio.sleep(KERNEL_RETRY_S)
        await b.check(blocks(1))


async def test_population_goes_on_where_a_reader_is_then_comes_round() -> None:
    async with bench() as b:
        await b.check(blocks(40))
        await trio.sleep(1)  # population is modest beside readers
        assert [take(b, 16 * BLOCK).flight.run for _ in range(3)] == [(41, 57), (57, 64), (0, 16)]


async def test_beside_readers_population_has_little_under_way() -> None:
    async with bench() as b:
        await b.check(blocks(40))
        first = take(b, 16 * BLOCK)
        assert first.flight.run == (41, 43)
        assert isinstance(b.port.claim(16 * BLOCK), float)
        first.drop()
        assert take(b, 16 * BLOCK).flight.run == (43, 45)
        assert isinstance(b.port.claim(16 * BLOCK), float)
        await trio.sleep(1)
        assert take(b, 16 * BLOCK).flight.run == (45, 61)


async def test_claims_stop_at_the_end_of_what_is_known_but_never_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extent_map, "WINDOW", MiB)
    async with bench() as b:
        await b.check(blocks(13))  # claims of 4 blocks now meet the window's end in their middle
        await trio.sleep(1)
        claimed: list[int] = []
        while len(claimed) < 63:
            await b.reader.learn_next()
            before = len(claimed)
            while isinstance(claim := b.port.claim(4 * BLOCK), FillClaim):
                claimed.extend(range(*claim.flight.run))
            assert len(claimed) > before, f"no progress after {claimed[-1:]}"
        assert sorted(claimed) == [i for i in range(64) if i != 13]


async def test_nothing_is_claimed_of_an_image_that_failed() -> None:
    async with bench() as b:
        await b.reader.learn_next()
        b.table.stop_fetching(errors.ExportChanged("disk", "a", "b"))
        assert b.port.claim(BLOCK) is None


# -- holes


async def test_holes_are_never_fetched() -> None:
    async with bench(holes=[blocks(0, 8), blocks(16, 64)]) as b:
        await b.check(ByteRange(0, SIZE))
        await until(b.table.completed.is_set)
        assert b.demand() == [blocks(8, 16)]
        assert (b.table.present_bytes, b.table.zero_bytes) == (8 * BLOCK, SIZE - 8 * BLOCK)


async def test_a_block_of_data_and_hole_fetches_only_the_data() -> None:
    hole = ByteRange(BLOCK + 8 * KiB, BLOCK + 40 * KiB)
    async with bench(holes=[hole]) as b:
        await b.check(blocks(1))
        assert sorted(b.demand()) == [ByteRange(BLOCK, hole.start), ByteRange(hole.end, 2 * BLOCK)]
        await b.settled()
        await b.check(blocks(1))
        assert b.table.present_bytes == BLOCK - hole.length
        assert b.table.zero_bytes == hole.length


async def test_an_image_that_is_one_hole_is_complete_once_that_is_known() -> None:
    async with bench(holes=[ByteRange(0, SIZE)]) as b:
        await b.reader.learn_next()
        await until(b.table.completed.is_set)
        assert b.demand() == []


async def test_each_window_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extent_map, "WINDOW", MiB)
    async with bench() as b:
        b.repository.delay_s = 1
        async with trio.open_nursery() as readers:
            for place in (3, 14, 20, 17, 27):
                readers.start_soon(b.check, blocks(place, place + 4))
        assert sorted(window for _, window in b.repository.status_log) == [
            ByteRange(0, MiB),
            ByteRange(MiB, 2 * MiB),
        ]


# -- failures


async def test_a_refused_request_fails_its_reader_only_and_keeps_nothing() -> None:
    async with bench() as b:
        b.repository.fail("disk", blocks(3), errno.EIO)
        with pytest.raises(errors.RequestFailed) as caught:
            await b.read(blocks(3))
        assert caught.value.code == errno.EIO
        await b.settled()
        assert b.nothing_kept()
        await b.check(blocks(2))
        await b.check(blocks(10))
        b.repository.heal()
        await b.check(blocks(3))


async def test_all_who_joined_a_refused_request_hear_of_it() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        b.repository.fail("disk", blocks(3))
        failed = []

        async def reader() -> None:
            with pytest.raises(errors.RequestFailed):
                await b.read(blocks(3))
            failed.append(1)

        async with trio.open_nursery() as readers:
            for _ in range(5):
                readers.start_soon(reader)
        assert len(failed) == 5
        assert b.demand() == [blocks(3)]


async def test_a_bad_place_in_somebody_elses_fetch_does_not_fail_a_reader_beside_it() -> None:
    async with bench() as b:
        b.repository.delay_s = 1
        b.repository.fail("disk", blocks(10))
        async with trio.open_nursery() as readers:

            async def wide() -> None:
                with pytest.raises(errors.RequestFailed):
                    await b.read(blocks(0, 16))

            readers.start_soon(wide)
            await trio.sleep(1.5)
            readers.start_soon(b.check, blocks(2))  # joins the wide fetch, which is going to fail


async def test_a_bad_place_ahead_does_not_fail_a_sequential_reader_before_it() -> None:
    async with bench() as b:
        b.repository.fail("disk", blocks(12))
        for i in range(12):
            await b.check(blocks(i))
        with pytest.raises(errors.RequestFailed):
            await b.read(blocks(12))
        for i in range(13, 20):
            await b.check(blocks(i))


async def test_one_bad_sector_fails_only_the_reads_that_need_it() -> None:
    async with bench(holes=[ByteRange(16 * KiB, 32 * KiB)]) as b:
        b.repository.fail("disk", ByteRange(60 * KiB, 60 * KiB + 512))
        with pytest.raises(errors.RequestFailed):
            await b.read(blocks(0))
        with pytest.raises(errors.RequestFailed):
            await b.read(ByteRange(60 * KiB, 64 * KiB))
        await b.check(ByteRange(0, 60 * KiB))
        await b.check(ByteRange(3000, 3100))
        await b.check(ByteRange(30 * KiB, 34 * KiB))
        await b.settled()
        # The map knows only whole blocks.
        assert not b.table.present(ByteRange(0, 4 * KiB))
        b.repository.heal()
        await b.check(blocks(0))


async def test_reads_wait_for_a_repository_that_is_down() -> None:
    async with bench() as b:
        await b.check(blocks(0))
        await b.settled()
        b.repository.down = True
        async with trio.open_nursery() as readers:
            for i in range(1, 9):
                readers.start_soon(b.check, blocks(i))
            await trio.sleep(IO_TIMEOUT_S - 5)
            await b.check(blocks(0))  # present: nobody notices
            b.repository.down = False
        assert trio.current_time() < IO_TIMEOUT_S
        await b.settled()
        assert b.table.present(blocks(0, 9))


async def test_a_short_outage_costs_many_readers_no_more_than_one() -> None:
    async with bench() as b:
        await b.reader.learn_next()
        b.repository.down = True
        async with trio.open_nursery() as readers:
            for i in range(20):
                readers.start_soon(b.check, blocks(3 * i))
            await trio.sleep(0.3)
            b.repository.down = False
        assert trio.current_time() < 0.5


@pytest.mark.parametrize("how", ["down", "hang"])
@pytest.mark.parametrize("learned", [False, True])
async def test_a_repository_that_stays_away_times_out_each_read_alone(
    how: str, learned: bool
) -> None:
    async with bench() as b:
        if learned:
            await b.reader.learn_next()
        if how == "down":
            b.repository.down = True
        else:
            b.repository.hang()
        ended = []

        async def reader(start_s: float, block: int) -> None:
            await trio.sleep(start_s)
            with pytest.raises(errors.TimedOut) as caught:
                await b.read(blocks(block))
            assert caught.value.code == errno.ETIMEDOUT
            ended.append(round(trio.current_time()))

        async with trio.open_nursery() as readers:
            readers.start_soon(reader, 0, 3)
            readers.start_soon(reader, 10, 3)  # joins; its own time counts
            readers.start_soon(reader, 20, 5)
        assert ended == [30, 40, 50]
        assert b.nothing_kept()
        b.repository.down = False
        b.repository.go_on()
        await b.check(blocks(3, 6))


async def test_the_kernels_second_try_of_a_read_that_timed_out_fails_at_once_and_nothing_else_does() -> (
    None
):
    async with bench() as b:
        await b.check(blocks(0))
        await b.settled()
        b.repository.down = True
        with pytest.raises(errors.TimedOut):
            await b.read(blocks(3))
        b.repository.down = False
        began = trio.current_time()
        with pytest.raises(errors.TimedOut):
            await b.read(ByteRange(3 * BLOCK, 3 * BLOCK + 4096))
        assert trio.current_time() == began
        await b.check(ByteRange(3 * BLOCK + 4096, 4 * BLOCK))
        await b.settled()
        await b.check(blocks(0))
        await b.check(blocks(3))


async def test_a_late_answer_after_a_timeout_is_not_mistaken_for_another() -> None:
    async with bench() as b:
        await b.reader.learn_next()
        b.repository.delay_s = IO_TIMEOUT_S + 1
        with pytest.raises(errors.TimedOut):
            await b.read(blocks(3))
        b.repository.delay_s = 0.5
        await trio.sleep(KERNEL_RETRY_S)
        await b.check(blocks(3))
        await trio.sleep(5 * IO_TIMEOUT_S)
        await b.check(blocks(3))


async def test_a_full_disk_costs_no_read() -> None:
    async with bench(holes=[blocks(5)]) as b:
        b.stores.full = True
        for _ in range(2):
            await b.check(blocks(0, 8))
            await b.settled()
        assert b.filling.writer.refused
        assert b.nothing_kept()
        assert b.repository.bytes_read() == 14 * BLOCK
        b.stores.full = False
        await b.check(blocks(0, 8))
        await b.settled()
        assert not b.filling.writer.refused
        assert b.table.present(blocks(0, 8))


async def test_a_changed_export_is_reported_and_fails_the_read() -> None:
    async with bench() as b:
        await b.check(blocks(0))
        b.repository.add("disk", pattern(SIZE, seed=1), identity="second")
        with pytest.raises(errors.ExportChanged):
            await b.read(blocks(30))
        assert [change.now for change in b.changes] == ["'second'"]
        assert b.table.present_bytes == BLOCK


async def test_a_failed_image_serves_what_it_has_and_says_why_it_serves_no_more() -> None:
    async with bench() as b:
        await b.check(blocks(0))
        await b.settled()
        b.table.stop_fetching(errors.UserError("because"))
        await b.check(blocks(0))
        for where in (blocks(1), blocks(0, 2)):
            with pytest.raises(errors.UserError, match="because"):
                await b.read(where)
        assert b.demand() == [blocks(0)]


@pytest.mark.parametrize("connected", [True, False])
async def test_an_end_in_the_middle_leaves_no_claim_behind(connected: bool) -> None:
    async with bench() as b:
        await b.reader.learn_next()
        b.repository.hang()
        async with trio.open_nursery() as fetches:
            b.reader._nursery = fetches
            b.repository.nursery = fetches if connected else None
            with trio.move_on_after(1):
                await b.read(blocks(3))
            assert b.table.under_way()
            fetches.cancel_scope.cancel()
        assert b.table.under_way() == []
        assert [state for _, state in b.blocks.runs()] == [0]


async def test_what_readers_were_given_is_written_although_the_daemon_s_tasks_have_ended() -> None:
    async with bench() as b:
        async with trio.open_nursery() as daemon:
            b.reader._writes = WriteQueue(daemon, trio.CapacityLimiter(1))
            threads.delay_s = 5
            for block in (0, 10, 20):  # the second and third wait for the first to be written
                await b.check(blocks(block))
                await trio.sleep(0.1)
            daemon.cancel_scope.cancel()
        await b.reader.written()
        await b.check(blocks(30))
        await b.reader.written()
        assert all(b.table.present(blocks(block)) for block in (0, 10, 20, 30))


async def test_parts_of_which_one_cannot_be_asked_for_are_fetched_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(holes=[ByteRange(32 * KiB, 40 * KiB)]) as b:
        await b.check(blocks(9))
        await b.settled()
        source = b.reader._source
        submit, refused = source.submit, []

        def second_refused(offset: int, buffer: memoryview, answered: Answered) -> bool:
            if offset:
                refused.append(offset)
                return False
            return submit(offset, buffer, answered)

        monkeypatch.setattr(source, "submit", second_refused)
        await b.check(blocks(0))
        await b.settled()
        assert refused == [40 * KiB]
        first, *anew = b.demand()[1:]
        assert first == ByteRange(0, 32 * KiB)
        assert sorted(anew) == [ByteRange(0, 32 * KiB), ByteRange(40 * KiB, 64 * KiB)]


# -- saving


async def test_a_checkpoint_saves_what_is_present_when_it_begins() -> None:
    async with bench() as b:
        assert not b.table.dirtied.is_set()
        await b.check(blocks(0))
        await b.settled()
        await until(b.table.dirtied.is_set)
        await b.filling.checkpoint(b.syncs)
        assert not b.table.dirtied.is_set()
        assert b.stores.journal == ["data 2", "map 2"]
        await b.filling.checkpoint(b.syncs)
        assert b.stores.checkpoints == 1  # nothing new
        await b.check(blocks(9))
        await b.settled()
        b.stores.crash()
        assert b.stores.partials[2].states == bytes([1] + 63 * [0])
        assert b.stores.partials[2].data[:BLOCK] == b.content[:BLOCK]


async def test_a_claim_under_way_is_saved_as_missing() -> None:
    async with bench() as b:
        await b.check(blocks(0))
        await b.settled()
        take(b)
        await b.filling.checkpoint(b.syncs)
        assert b.stores.partials[2].states == bytes([1] + 63 * [0])


async def test_a_checkpoint_that_failed_is_still_to_be_done() -> None:
    async with bench() as b:
        await b.check(blocks(0))
        await b.settled()
        b.stores.checkpoint_error = errors.NoSpace()
        with pytest.raises(errors.NoSpace):
            await b.filling.checkpoint(b.syncs)
        assert b.table.dirtied.is_set()
        b.stores.checkpoint_error = None
        await b.filling.checkpoint(b.syncs)
        assert b.stores.partials[2].states == bytes([1] + 63 * [0])


async def test_blocks_larger_than_a_request_and_images_smaller_than_a_block() -> None:
    async with bench(size=3 * MiB, block_size=2 * MiB) as b:
        await b.check(ByteRange(2 * MiB - 1, 2 * MiB + 1))
        assert sorted(b.demand()) == [ByteRange(0, 2 * MiB), ByteRange(2 * MiB, 3 * MiB)]
    async with bench(size=513) as b:
        await b.check(ByteRange(512, 513))
        await until(b.table.completed.is_set)
        assert b.demand() == [ByteRange(0, 513)]


async def test_a_server_that_refuses_block_status_is_read_all_the_same() -> None:
    async with bench() as b:

        async def refuses(export: Export, window: ByteRange) -> list[ByteRange]:
            raise errors.RequestFailed("block status", errno.EINVAL)

        b.repository.status = refuses  # type: ignore[method-assign]
        await b.check(blocks(3))
        await b.check(blocks(0, 2))


async def test_waiting_reads_leave_room_for_reads_of_other_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting_reads, "FEW", 2)
    world = World(block_size=BLOCK, queue=16)
    for name in ("disk", "other"):
        world.repository.add(name, pattern(16 * BLOCK))
    async with world.daemon():
        image, other = await world.open("disk"), await world.open("other")
        for one in (image, other):
            await world.read(one, 15 * BLOCK, BLOCK)
        world.repository.hang()
        async with trio.open_nursery() as nursery:
            for block in range(12):
                nursery.start_soon(world.read, image, block * BLOCK, BLOCK)
            await wait_all_tasks_blocked()
            with pytest.raises(errors.RequestFailed, match="too many reads wait already"):
                await world.read(image, 13 * BLOCK, BLOCK)
            assert await world.read(image, 15 * BLOCK, BLOCK) is not None, "it is present"
            for block in range(2):
                nursery.start_soon(world.read, other, block * BLOCK, BLOCK)
            await wait_all_tasks_blocked()
            with pytest.raises(errors.RequestFailed, match="too many reads wait already"):
                await world.read(other, 8 * BLOCK, BLOCK)
            world.repository.go_on()
        for one in (image, other):
            await world.read(one, 8 * BLOCK, BLOCK)
