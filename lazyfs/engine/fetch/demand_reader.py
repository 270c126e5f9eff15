"""Reads on demand for one image: it fetches what a read misses, and joins what others already
fetch.

A fetch belongs to the mount's nursery, not to the reader who began it. So a reader that is
cancelled does not cancel what others have joined, and what was asked for is kept. A reader is
answered when its bytes have arrived; they are written to the cache file afterwards.
"""

import errno
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import Readahead, ReadAround
from lazyfs.core.in_flight import Flight, Plan, Purpose
from lazyfs.engine import totals
from lazyfs.engine.fetch import demand_fetch
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.fetch.cache_writer import CacheWriter
from lazyfs.engine.fetch.demand_fetch import UNFORESEEN, DemandFetch, Miss, ReadCache, assemble
from lazyfs.engine.fetch.extents import ExtentQuestions
from lazyfs.engine.fetch.under_way import ImageUnderWay, UnderWay
from lazyfs.engine.fetch.waiting_reads import WaitingReads
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.interfaces import Export, Source
from lazyfs.engine.pace import Pace, ReaderWait
from lazyfs.engine.totals import Read, Totals
from lazyfs.units import KiB

logger = logging.getLogger(__name__)

SMALLEST_READ = 4 * KiB
"""The unit of reads of parts of a block: what the kernel asks for at least, and what every server
must accept."""


class DemandReader:
    """Reads ranges that are missing from the cache of one image. Trio thread only."""

    def __init__(
        self,
        export: Export,
        source: Source,
        table: BlockTable,
        writer: CacheWriter,
        *,
        nursery: trio.Nursery,
        pace: Pace,
        io_timeout_s: float,
        totals: Totals,
        writes: WriteQueue,
        under_way: UnderWay,
        waiting: WaitingReads,
        on_changed: Callable[[errors.ExportChanged], None],
    ) -> None:
        """Do not connect before a read needs it.

        Args:
            export: the export to read.
            source: reads the export.
            table: the blocks of the image.
            writer: keeps what is fetched.
            nursery: runs the fetches.
            pace: told about demand fetches, so that population lets them go first.
            io_timeout_s: how long a read waits before it fails.
            totals: counts the reads.
            writes: takes the bytes that are to be written.
            under_way: limits the memory of the fetches of all images.
            waiting: limits how many reads of all images wait.
            on_changed: called when a connection finds another version of the export.
        """
        self.export = export
        self._source = source
        self._table = table
        self._writer = writer
        self._nursery = nursery
        self._pace = pace
        self._io_timeout_s = io_timeout_s
        self._totals = totals
        self._writes = writes
        self._under_way = ImageUnderWay(under_way)
        self._on_changed = on_changed
        self._questions = ExtentQuestions(source, table)
        self._fetches: dict[Flight, DemandFetch] = {}
        self._timeouts = demand_fetch.Timeouts()
        self._readahead = Readahead()
        self._read_around = ReadAround(table.block_size)
        self._ahead_until = 0
        """The byte up to which `learn_ahead` has learned the windows with missing blocks."""
        self._waiting = waiting
        self._drop_when_idle = False
        """True if the connection is to be dropped as soon as nothing is under way on it."""
        self._closed = False
        self._fetching: set[trio.CancelScope] = set()
        """Around the fetches that have a task of their own."""
        self._token = trio.lowlevel.current_trio_token()

    async def read_missing(
        self, wanted: ByteRange, read_cache: ReadCache, read: Read | None = None
    ) -> bytes | None:
        """Return the bytes of `wanted`, and fetch those that are missing.

        Args:
            wanted: the range to read.
            read_cache: reads present blocks from the cache file. Called in a thread.
            read: learns how it was served.

        Returns:
            None if all of `wanted` is in the cache now.

        Raises:
            RequestFailed: the repository refused, or gave no answer in the time allowed (TimedOut).
            LazyfsError: the image may not fetch (`BlockTable.failure`).

        Cancellation: the fetch goes on, and the bytes that come are kept.
        """
        if self._timeouts.is_again(wanted.start, trio.current_time()):
            raise self._timed_out(wanted)
        if not self._waiting.may_wait(self):
            raise errors.RequestFailed(
                f"reading {self.export.name} while too many reads wait already", errno.EAGAIN
            )
        self._drop_when_idle = False
        self._waiting.begin(self)
        try:
            with self._totals.waits(), trio.fail_at(trio.current_time() + self._io_timeout_s):
                ahead: int | None = None
                while not self._table.present(wanted):
                    if (failure := self._table.failure) is not None:
                        raise failure.again()
                    await self._learn_extents(wanted, read or Read(self._totals))
                    # Asked once, because another attempt of the same read must not look like a
                    # sequential stream.
                    if ahead is None:
                        ahead = 0 if self._writer.refused else self._readahead.window(wanted)
                    data = await self._try_missing(
                        wanted, ahead, read_cache, read or Read(self._totals)
                    )
                    if data is not None:
                        return data
        except trio.TooSlowError:
            self._timeouts.note(wanted.start, trio.current_time())
            raise self._timed_out(wanted) from None
        finally:
            self._waiting.end(self)
        return None

    async def _learn_extents(self, wanted: ByteRange, read: Read) -> None:
        while (window := self._table.first_unknown(self._table.whole_blocks(wanted))) is not None:
            read.waits(asks=not self._questions.is_asked(window))
            await self.learn(window)

    async def _try_missing(
        self, wanted: ByteRange, ahead: int, read_cache: ReadCache, read: Read
    ) -> bytes | None:
        """Make one attempt to read. What the blocks of `wanted` hold must be known.

        Returns:
            None if the state has changed meanwhile, so that the caller should try again.
        """
        kept = not self._writer.refused
        alone = not self._fetches  # beside other fetches the time says nothing about the distance
        plan = self._table.plan(
            wanted, ahead, self._read_around.unit if kept else self._table.block_size
        )
        read.waits(asks=bool(plan.new))
        begun = self._begin(plan, timed=alone and kept)
        # Looked up before anything is awaited, because fetches that end leave the table.
        joined = [
            self._fetches[flight]
            for flight in plan.joined
            if flight.purpose is not Purpose.POPULATION
        ]
        await self._send(begun)
        for flight in plan.joined:
            if flight.purpose is Purpose.POPULATION:
                # When it has ended, its bytes are in the cache file or nowhere.
                await self._table.until_settled(flight)
                return None
        own = self._table.whole_blocks(wanted)
        for fetch in joined:
            await fetch.done.wait()
            if isinstance(fetch.failure, errors.TimedOut):
                return None  # its time was up, ours may not be
            if (
                isinstance(fetch.failure, errors.RequestFailed)
                and fetch.span.clip(own) != fetch.span
            ):
                return None  # the blocks of other readers may be to blame, so ask for our own only
            if isinstance(fetch.failure, errors.RequestFailed) and fetch.failure is not UNFORESEEN:
                return await self._read_alone(wanted, fetch.failure)
            if fetch.failure is not None:
                raise fetch.failure.again()
        return await assemble(wanted, joined, self._table.present, read_cache)

    async def _read_alone(self, wanted: ByteRange, failure: errors.RequestFailed) -> bytes:
        """Read just `wanted`, because its blocks could not be fetched, and keep nothing.

        So a bad sector of the repository fails only the reads that need it.

        Raises:
            RequestFailed, ExportChanged: as for `read_missing`.
        """
        span = wanted.align_out(SMALLEST_READ, self._table.size)
        if span == self._table.whole_blocks(wanted):
            raise failure.again()
        data = bytearray(span.length)
        self._table.count_requests(1)
        self._totals.add(totals.DEMAND_REQUESTS, 1)
        await self._source.pread(span.start, memoryview(data))
        self._table.count_demand(span.length)
        return bytes(memoryview(data)[wanted.start - span.start :][: wanted.length])

    # -- fetches

    def _begin(self, plan: Plan, timed: bool) -> list[DemandFetch]:
        """Make the fetches of a plan.

        If that fails, for instance because there is no memory, none of its flights is left.
        """
        begun: list[DemandFetch] = []
        waits: list[ReaderWait] = []
        now = trio.current_time()
        miss = Miss(now) if timed else None
        try:
            for flight in plan.new:
                waits.append(wait := self._pace.reader_waits())
                span = self._table.span_of(flight)
                parts = self._table.data_ranges(span)
                fetch = DemandFetch(flight, span, parts, now, wait)
                if flight.purpose is Purpose.REST or flight is plan.new[0]:
                    fetch.miss = miss
                begun.append(fetch)
        except BaseException:
            for wait in waits:
                wait.end()
            for flight in plan.new:
                self._table.settle(flight, None)
            raise
        self._fetches.update((fetch.flight, fetch) for fetch in begun)
        requests = sum(len(fetch.parts) for fetch in begun)
        self._table.count_requests(requests)
        self._totals.add(totals.DEMAND_REQUESTS, requests)
        return begun

    async def _send(self, fetches: list[DemandFetch]) -> None:
        """Send requests, or queue them until there is memory for them. Every fetch ends.

        Cancellation: cannot be cancelled.
        """
        unsent = deque(fetches)
        try:
            while unsent:
                fetch = unsent.popleft()
                begun = self._under_way.start(fetch.span.length, partial(self._launch, fetch))
                if begun and not fetch.ended and unsent:
                    # The most urgent fetch starts first. trio would run tasks that start together
                    # in random order.
                    await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            for fetch in unsent:  # some are left after a bug
                self._end(fetch)

    def _launch(self, fetch: DemandFetch) -> None:
        """Send a request. If it cannot be sent without connecting first, it gets a task."""
        fetch.sent = True
        try:
            fetch.data = bytearray(fetch.span.length)
            if self._closed or not demand_fetch.submit(fetch, self._source, self._answered):
                self._nursery.start_soon(self._carry_out, fetch)
        except MemoryError:
            fetch.failure = errors.RequestFailed(f"reading {self.export.name}", errno.ENOMEM)
            self._end(fetch)
        except Exception:
            logger.exception("a fetch failed, a bug in lazyfs: image=%s", self.export.name)
            self._end(fetch)
        except BaseException:
            self._end(fetch)
            raise

    def _answered(self, fetch: DemandFetch) -> None:
        """Go on with `fetch`, after the connection has done what it could for it."""
        if isinstance(fetch.failure, errors.ConnectionLost) and not self._closed:
            self._nursery.start_soon(self._carry_out, fetch)
        else:
            self._end(fetch)

    async def _carry_out(self, fetch: DemandFetch) -> None:
        """Fetch with as many attempts as the time allows."""
        self._fetching.add(scope := trio.CancelScope())
        try:
            with scope, trio.fail_at(fetch.began + self._io_timeout_s):
                if not self._closed:
                    await demand_fetch.receive(fetch, self._source)
                    fetch.failure = None
        except trio.TooSlowError:
            fetch.failure = self._timed_out(fetch.span)
        except errors.LazyfsError as error:
            fetch.failure = error.again()
            if isinstance(error, errors.ExportChanged):
                self.changed(error)
        except Exception:
            logger.exception("a fetch failed, a bug in lazyfs: image=%s", self.export.name)
        finally:
            self._fetching.remove(scope)
            self._end(fetch)

    def _end(self, fetch: DemandFetch) -> None:
        """Wake the readers, and queue what they were given to be written to the cache."""
        if fetch.ended:
            return
        fetch.ended = True
        if fetch.failure is not None and self._table.failure is not None:
            fetch.failure = (
                self._table.failure.again()
            )  # which says more than that it was cancelled
        fetch.wait.end(fetch.data_bytes if fetch.failure is None else 0)
        if fetch.failure is not None:
            self._table.settle(fetch.flight, None)
            fetch.done.set()
            self._forget(fetch)
            return
        fetch.note_time(self._read_around)
        self._table.count_demand(fetch.data_bytes)
        if not self._writes.full:
            fetch.done.set()
        self._writes.put(fetch.span.length, partial(self._write, fetch))

    def _write(self, fetch: DemandFetch) -> None:
        """Write a fetch to the cache file, if that can be done. Runs in a thread."""
        kept: Mapping[int, int] | None = None
        try:
            kept = self._writer.write(fetch.pieces(), fetch.data_bytes, self._table.block_size)
        finally:
            self._table.settle(fetch.flight, kept)
            with suppress(trio.RunFinishedError):  # the daemon's loop may have ended
                self._token.run_sync_soon(self._written, fetch)

    def _written(self, fetch: DemandFetch) -> None:
        fetch.done.set()
        fetch.written.set()
        self._forget(fetch)

    def _forget(self, fetch: DemandFetch) -> None:
        del self._fetches[fetch.flight]
        if fetch.sent:
            self._under_way.end(fetch.span.length)
        self._drop_if_idle()

    def _timed_out(self, wanted: ByteRange) -> errors.TimedOut:
        what = f"reading {self.export.name} at {wanted.start}"
        why = (
            "the cache's disk does not take what came"
            if self._writes.full
            else self._source.trouble or "the repository does not answer"
        )
        return errors.TimedOut(what, self._io_timeout_s, why)

    # -- extents

    async def learn(self, window: ByteRange) -> None:
        """Learn the extents of `window`.

        Raises what `ExtentQuestions.ask` raises, and ConnectionLost if the reader is closed.
        """
        if self._closed:
            raise errors.ConnectionLost(self.export.name, "the image is closed")
        try:
            await self._questions.ask(window)
        except errors.ExportChanged as error:
            self.changed(error)
            raise
        finally:
            self._drop_if_idle()

    async def learn_next(self) -> None:
        """Learn windows from where population goes on, until one has something to fetch.

        Raises what `learn` raises.
        """
        while (window := self._table.next_unknown()) is not None:
            await self.learn(window)

    async def learn_ahead(self) -> None:
        """Learn every window that has missing blocks.

        So population never stops at a window that is not known, and the time it will take is
        estimated correctly. This goes on where an earlier call has ended. A failure ends it
        silently: whoever needs the window asks again, and reports the failure.
        """
        with suppress(errors.LazyfsError):
            while (found := self._table.missing_window(self._ahead_until)) is not None:
                window, known = found
                if not known:
                    await self.learn(window)
                self._ahead_until = window.end
                await trio.lowlevel.checkpoint()

    async def compare(self) -> None:
        """Compare samples of the cache with the repository, within the time allowed for reads.

        A difference is reported as `changed` does. If the repository does not answer, nothing is
        known.
        """
        try:
            with trio.move_on_after(self._io_timeout_s):
                await self._source.compare()
        except errors.ExportChanged as error:
            self.changed(error)
        except errors.LazyfsError as error:
            logger.debug("not compared: image=%s reason=%s", self.export.name, error)
        finally:
            self._drop_if_idle()

    # -- the connection

    def changed(self, error: errors.ExportChanged) -> None:
        """Stop fetching and report it, because a connection found another version of the export."""
        self._table.stop_fetching(error)
        self._on_changed(error.again())

    async def written(self) -> None:
        """Wait until what has arrived is written. Its readers did not wait for that."""
        while (
            fetch := next((one for one in self._fetches.values() if one.failure is None), None)
        ) is not None:
            await fetch.written.wait()

    def drop_connection_when_idle(self) -> None:
        """Drop the connection once nothing is under way on it, because nobody reads any more.

        A read that comes before keeps the connection.
        """
        self._drop_when_idle = True
        self._drop_if_idle()

    def _drop_if_idle(self) -> None:
        if self._drop_when_idle and not self._fetches and not self._questions:
            self._drop_when_idle = False
            self._source.drop_connection()

    def close(self) -> None:
        """Give up the connection for good, because nobody will read a missing range any more.

        A fetch that is under way fails, unless its bytes have arrived.
        """
        self._closed = True
        for scope in self._fetching:
            scope.cancel()
        self._source.drop_connection()
