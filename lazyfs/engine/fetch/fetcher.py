"""The in-flight table of one image: who fetches which block, and who waits for it.

A block is fetched by one request at a time, a reader's (`DemandFetch`) or population's (`Claim`); whoever else
wants it joins. `doc/CONCURRENCY.md` has the whole story; in short:

- `_lock` guards the block map, the extents, the cursor, the counters and the waiters, because population's
  threads change them. It is held for microseconds and never across an await or a system call.
- Data first, then its state: a block is DATA only after `write` returned.
- Nothing is kept of a reply that failed.
"""

# Longer than 500 lines: it is about to be split by idea.

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

from lazyfs import errors
from lazyfs.core.block_map import CLAIMED, BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import FillCursor, Readahead, ReadAround, plan_read, plan_rest
from lazyfs.core.pacing import RateMeter
from lazyfs.engine import totals
from lazyfs.engine.budget import Budget
from lazyfs.engine.fetch import demand_fetch, events
from lazyfs.engine.fetch.demand_fetch import DemandFetch, Miss, ReadCache, assemble
from lazyfs.engine.fetch.extents import Extents
from lazyfs.engine.fetch.keeping import Keeping
from lazyfs.engine.fetch.write_queue import WriteQueue
from lazyfs.engine.interfaces import Claim, Export, FetchCounters, Source, Store
from lazyfs.engine.pace import Pace
from lazyfs.engine.totals import Read, Totals


class Fetcher:
    """Reads through the cache of one image. Also what population works on (`interfaces.FillWork`)."""

    def __init__(
        self,
        export: Export,
        source: Source,
        store: Store,
        blocks: BlockMap,
        *,
        nursery: trio.Nursery,
        pace: Pace,
        io_timeout_s: float,
        counters: FetchCounters,
        totals: Totals,
        writes: WriteQueue,
        on_changed: Callable[[errors.ExportChanged], None],
        is_open: Callable[[], bool] = lambda: True,
        budget: Budget | None = None,
    ) -> None:
        """Must be made in the trio thread.

        Args:
            store: loaded; `blocks` is what it holds.
            nursery: runs the fetches, so that a cancelled reader does not take those who joined it along.
            is_open: whether somebody may read soon what population writes; called from its threads.
            on_changed: called in the trio thread when a connection finds another version of the export.
        """
        self.export = export
        self.failure: errors.LazyfsError | None = None
        """Set: missing ranges are not fetched any more, and reading one raises this."""
        self.distrust: errors.CacheCorrupt | None = None
        """Set: not even present ranges may be read; only a restart, from the last checkpoint, mends that."""
        self.trouble: Exception | None = None
        """The latest failure of a population request; None once one succeeds."""
        self.completed = trio.Event()
        """Every block is in the cache."""
        self.dirtied = trio.Event()
        """Something changed since the last checkpoint."""
        self._source = source
        self._store = store
        self._blocks = blocks
        self._nursery = nursery
        self._pace = pace
        self._io_timeout_s = io_timeout_s
        self._demand_bytes = counters.demand_bytes
        self._populated_bytes = counters.populated_bytes
        self._requests = counters.requests
        self._totals = totals
        self._writes = writes
        self._zero_counted = blocks.zero_bytes
        self._on_changed = on_changed
        self._is_open = is_open
        self._budget = budget or Budget()
        self._keeping = Keeping(export.name, store, self._budget, totals)
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._extents = Extents(source, blocks, self._lock)
        self._fetches: dict[int, DemandFetch] = {}
        self._waiters: list[tuple[int, trio.Event]] = []
        self._timeouts = demand_fetch.Timeouts()
        self._readahead = Readahead()
        self._read_around = ReadAround(blocks.block_size)
        self._cursor = FillCursor()
        self._meter = RateMeter()
        self._checkpointing = trio.Lock()
        if blocks.complete:
            self.completed.set()

    # -- what is here

    @property
    def unkept(self) -> bool:
        """The latest write found the cache's file system full, or the cache at its limit."""
        return self._keeping.refused

    @property
    def present_bytes(self) -> int:
        """Bytes of data in the cache."""
        return self._blocks.present_bytes

    @property
    def zero_bytes(self) -> int:
        """Bytes known to be zeroes."""
        return self._blocks.zero_bytes

    def counters(self) -> FetchCounters:
        """Return what has been fetched, over the image's life."""
        with self._lock:
            return FetchCounters(self._demand_bytes, self._populated_bytes, self._requests)

    def runs(self) -> list[tuple[ByteRange, int]]:
        """Return the ranges of the export and the state of their blocks (`core/block_map.py`)."""
        with self._lock:
            return [(self._blocks.bytes_of(run), state) for run, state in self._blocks.runs()]

    def message(self) -> str:
        """Return what an operator should know, or ""."""
        if self.distrust is not None:
            return f"{self.distrust}: reads fail; mount anew to go on from the last checkpoint"
        return self._keeping.message()

    def rate(self) -> float:
        """Return bytes fetched per second, lately."""
        with self._lock:
            return self._meter.rate(self._pace.clock())

    # -- readers

    def present(self, wanted: ByteRange) -> bool:
        """Whether `wanted` can be read from the cache file."""
        return self._blocks.is_present(wanted)

    async def read_missing(self, wanted: ByteRange, read_cache: ReadCache, read: Read | None = None) -> bytes | None:
        """Return the bytes of `wanted`, fetching what is missing; None if all of it is in the cache now.

        Args:
            read_cache: reads present blocks from the cache file; called in a thread.

        Raises:
            RequestFailed: the repository refused, or (TimedOut) gave no answer in the time allowed.
            LazyfsError: `failure`, if the image may not fetch.

        Cancellation: the fetch goes on and is kept; others may have joined it.
        """
        if self._timeouts.is_again(wanted.start, trio.current_time()):
            raise self._timed_out(wanted)
        self._totals.waiting += 1
        try:
            with trio.fail_after(self._io_timeout_s):
                while not self.present(wanted):
                    if self.failure is not None:
                        raise self.failure
                    data = await self._try_missing(wanted, read_cache, read or Read(self._totals))
                    if data is not None:
                        return data
        except trio.TooSlowError:
            self._timeouts.note(wanted.start, trio.current_time())
            raise self._timed_out(wanted) from None
        finally:
            self._totals.waiting -= 1
        return None

    async def _try_missing(self, wanted: ByteRange, read_cache: ReadCache, read: Read) -> bytes | None:
        """Make one attempt; None if the state has changed meanwhile and the caller should look again."""
        while (window := self._extents.first_unknown(self._whole_blocks(wanted))) is not None:
            read.waits(asks=not self._extents.is_asked(window))
            await self.learn(window)
        fetches, joined, claimed = self._plan(wanted)
        read.waits(asks=bool(fetches))
        self._totals.add(totals.DEMAND_REQUESTS, sum(len(fetch.parts) for fetch in fetches))
        for fetch in fetches:
            self._pace.reader_waits()
            if not demand_fetch.submit(fetch, self._source, self._answered):
                self._nursery.start_soon(self._carry_out, fetch)
                # Most urgent first: trio would run what starts together in random order.
                await trio.lowlevel.cancel_shielded_checkpoint()
        if claimed is not None:
            await claimed.wait()
            return None
        for fetch in joined:
            await fetch.done.wait()
            if isinstance(fetch.error, errors.TimedOut):
                return None  # its time was up, ours may not be
            only_ours = fetch.span.clip(self._whole_blocks(wanted)) == fetch.span
            if isinstance(fetch.error, errors.RequestFailed) and not only_ours:
                return None  # somebody else's, and it may have failed where we do not read: ask for our own blocks
            if fetch.error is not None:
                raise fetch.error
        return await assemble(wanted, joined, self.present, read_cache)

    def _plan(self, wanted: ByteRange) -> tuple[list[DemandFetch], list[DemandFetch], trio.Event | None]:
        """Claim what is missing; return new fetches, those the reader needs, and what else to wait for."""
        blocks, now = self._blocks, trio.current_time()
        with self._lock:
            ahead = 0 if self.unkept else self._readahead.window(wanted)
            ahead = self._extents.known_until(wanted.end, min(wanted.end + ahead, blocks.size)) - wanted.end
            own = blocks.blocks_of(wanted)
            miss = None if self._fetches else Miss(now)  # beside others the time would say nothing of the distance
            new = [self._new_fetch(run, now) for run in plan_read(blocks, wanted, ahead)]
            if new and not self.unkept:
                new[0].miss = miss
                for run in plan_rest(blocks, wanted, self._read_around.unit):
                    rest = self._new_fetch(run, now)
                    rest.miss, rest.is_rest = miss, True
                    new.append(rest)
            self._cursor.jump(own.end)
            joined = list(dict.fromkeys(self._fetches[b] for b in range(own.first, own.end) if b in self._fetches))
            claimed = next(
                (b for b in range(own.first, own.end) if b not in self._fetches and blocks.state(b) == CLAIMED), None
            )
            if claimed is None:
                return new, joined, None
            event = trio.Event()
            self._waiters.append((claimed, event))
            return new, joined, event

    def _new_fetch(self, run: BlockRun, now: float) -> DemandFetch:
        self._blocks.claim(run)
        span = self._blocks.bytes_of(run)
        fetch = DemandFetch(run, span, self._extents.data_ranges(span), bytearray(span.length), now)
        for block in range(run.first, run.end):
            self._fetches[block] = fetch
        self._requests += len(fetch.parts)
        return fetch

    def _answered(self, fetch: DemandFetch) -> None:
        """The connection has done what it could for `fetch`."""
        if isinstance(fetch.error, errors.ConnectionLost):
            self._nursery.start_soon(self._carry_out, fetch)
        else:
            self._end(fetch)

    async def _carry_out(self, fetch: DemandFetch) -> None:
        """Fetch with as many attempts as the time allows."""
        try:
            with trio.fail_at(fetch.began + self._io_timeout_s):
                await demand_fetch.receive(fetch, self._source)
            fetch.error = None
        except trio.TooSlowError:
            fetch.error = self._timed_out(fetch.span)
        except errors.ExportChanged as error:
            fetch.error = error
            self.changed(error)
        except errors.LazyfsError as error:
            fetch.error = error
        finally:
            self._end(fetch)

    def _end(self, fetch: DemandFetch) -> None:
        """Let the readers go, and keep what they were given."""
        self._pace.reader_leaves(fetch.data_bytes if fetch.error is None else 0)
        if fetch.error is not None:
            self._settle(fetch.run, None)
            fetch.done.set()
            return
        demand_fetch.tell(self._read_around, fetch)
        with self._lock:
            self._demand_bytes += fetch.data_bytes
            self._meter.add(self._pace.clock(), fetch.data_bytes)
        self._totals.add(totals.DEMAND_BYTES, fetch.data_bytes)
        if not self._writes.full:
            fetch.done.set()
        self._writes.put(fetch.span.length, partial(self._write_fetch, fetch))

    def _write_fetch(self, fetch: DemandFetch) -> None:
        """Write to the cache file, if that can be done; in a thread."""
        kept = self._keeping.write(fetch)
        self._settle(fetch.run, fetch.data_bytes if kept else None)
        if kept:
            self._budget.keep(fetch.data_bytes)
        if not fetch.done.is_set():
            self._in_trio(fetch.done.set)

    def _timed_out(self, wanted: ByteRange) -> errors.TimedOut:
        what = f"reading {self.export.name} at {wanted.start}"
        why = "the cache's disk does not take what came" if self._writes.full else "the repository does not answer"
        return errors.TimedOut(what, self._io_timeout_s, why)

    def _whole_blocks(self, wanted: ByteRange) -> ByteRange:
        return wanted.align_out(self._blocks.block_size, self._blocks.size)

    # -- extents

    async def learn(self, window: ByteRange) -> None:
        """As `Extents.ask`."""
        try:
            await self._extents.ask(window)
        except errors.ExportChanged as error:
            self.changed(error)
            raise
        self._note_progress()

    async def learn_next(self) -> None:
        """Learn windows from where population goes on, until one has something to fetch. Raises as `learn`."""
        while True:
            with self._lock:
                run = self._cursor.peek(self._blocks)
                window = None if run is None else self._extents.first_unknown(self._blocks.bytes_of(run))
            if window is None:
                return
            await self.learn(window)

    async def learn_ahead(self) -> None:
        """Learn every window with missing blocks: the fill never stops at one, and the time to go is right.

        A failure ends it silently: whoever needs the window asks again and reports it.
        """
        position = 0
        with suppress(errors.LazyfsError):
            while (run := self._blocks.next_missing(position, 1)) is not None:
                window = self._extents.window_of(self._blocks.bytes_of(run).start)
                if self._extents.first_unknown(window) is not None:
                    await self.learn(window)
                position = self._blocks.blocks_of(window).end
                await trio.lowlevel.checkpoint()

    @property
    def can_be_filled(self) -> bool:
        """Whether something is missing, and may be fetched."""
        return self.failure is None and not self.completed.is_set()

    # -- interfaces.FillWork: from population's threads

    def claim(self, limit: int) -> Claim | float | None:
        """Take the next missing blocks."""
        if self.failure is not None or self.trouble is not None or self._pace.stopped:
            return None
        wait_s, most = self._pace.ask(limit)
        if wait_s > 0:
            return wait_s
        claim = self._claim_in_budget(most)
        self._pace.asked(most, claim.data_bytes if claim is not None else 0)
        return claim

    def _claim_in_budget(self, limit: int) -> Claim | None:
        most = max(limit, self._blocks.block_size)
        if not self._budget.reserve(most, background=True):
            return None
        claim = self._claim(limit)
        self._budget.give_back(most - (claim.data_bytes if claim is not None else 0))
        return claim

    def _claim(self, limit: int) -> Claim | None:
        with self._lock:
            run = self._cursor.peek(self._blocks, limit)
            if run is None:
                return None
            span = self._blocks.bytes_of(run)
            known = self._extents.known_until(span.start, span.end)
            if known < span.end:  # windows are whole blocks
                run = BlockRun(run.first, known // self._blocks.block_size)
            if run.first == run.end:
                return None
            self._cursor.jump(run.end)
            self._blocks.claim(run)
            parts = tuple(self._extents.data_ranges(self._blocks.bytes_of(run)))
            self._requests += len(parts)
        self._totals.add(totals.POPULATION_REQUESTS, len(parts))
        return Claim(run, parts)

    def write(self, offset: int, data: memoryview) -> None:
        """Write data of a claim to the cache file; whoever has the image open may read it soon."""
        self._store.write(offset, data, keep=self._is_open())

    def keep(self, claim: Claim) -> None:
        """Count a claim as present."""
        fetched = claim.data_bytes
        self._pace.done(fetched, fetched)
        with self._lock:
            self._populated_bytes += fetched
            self._meter.add(self._pace.clock(), fetched)
        self._totals.add(totals.POPULATED_BYTES, fetched)
        self._keeping.refused = False
        self._settle(claim.run, fetched)
        self._budget.keep(fetched)

    def drop(self, claim: Claim, error: Exception | None) -> None:
        """Give a claim back."""
        if isinstance(error, errors.RequestFailed):
            # The cursor is past it: the next turn goes on behind the bad place, and comes round to it again.
            self.trouble = error
        elif isinstance(error, errors.NoSpace | OSError):
            self.trouble = error
            self._keeping.failed(error)
        self._pace.done(claim.data_bytes, 0)
        self._settle(claim.run, None)
        self._budget.give_back(claim.data_bytes)

    # -- saving

    async def until_complete(self, every_s: float, checkpoint: Callable[[], Awaitable[None]]) -> None:
        """Call `checkpoint` while something changes, at most each `every_s`, and once more when all is here."""
        while not self.completed.is_set():
            await events.first_of(self.dirtied, self.completed)
            with trio.move_on_after(every_s):
                await self.completed.wait()
            await checkpoint()

    async def checkpoint(self, limiter: trio.CapacityLimiter) -> None:
        """Make durable what is present now, in a thread of `limiter`.

        Raises:
            NoSpace, OSError: nothing is lost; the next checkpoint tries again.
            CacheCorrupt: data was lost, and present blocks are not to be trusted; nothing is read any more.
        Cancellation: takes effect before or after, not within.
        """
        async with self._checkpointing:
            if self.distrust is not None:
                raise self.distrust
            with self._lock:
                self.dirtied = trio.Event()
                pages = self._blocks.take_dirty()
                mixed = self._blocks.mixed_zero_bytes
            if not pages:
                return
            try:
                await trio.to_thread.run_sync(self._store.checkpoint, pages, mixed, limiter=limiter)
            except BaseException as error:
                if isinstance(error, errors.CacheCorrupt):
                    self.failure = self.distrust = error
                with self._lock:
                    self._blocks.give_back(index for index, _ in pages)
                self.dirtied.set()
                if isinstance(error, Exception):
                    self._totals.failed(totals.CHECKPOINT)
                raise

    def changed(self, error: errors.ExportChanged) -> None:
        """A connection found another version of the export: fetch nothing more, and report it."""
        self.failure = error
        self._on_changed(error)

    async def written(self) -> None:
        """Wait until what has arrived is written: its readers were let go before."""
        while True:
            with self._lock:
                arrived = next((block for block, fetch in self._fetches.items() if fetch.error is None), None)
                if arrived is None:
                    return
                self._waiters.append((arrived, settled := trio.Event()))
            await settled.wait()

    async def rest(self) -> bool:
        """Drop the connection if nothing is under way on it; return whether nothing was."""
        await self.written()
        if self._fetches or self._extents.asking:
            return False
        await self._source.aclose()
        return True

    async def aclose(self) -> None:
        """Drop the connection to the repository."""
        await self._source.aclose()

    # -- inside

    def _settle(self, run: BlockRun, kept_bytes: int | None) -> None:
        """End the claim on `run`, kept or not, and wake who waited for it. From any thread."""
        with self._lock:
            if kept_bytes is None:
                self._blocks.release(run)
            else:
                self._blocks.keep(run, kept_bytes)
            for block in range(run.first, run.end):
                self._fetches.pop(block, None)
            woken = [event for block, event in self._waiters if run.first <= block < run.end]
            if woken:
                self._waiters = [w for w in self._waiters if w[1] not in woken]
        for event in woken:
            self._in_trio(event.set)
        if kept_bytes is not None:
            self._note_progress()

    def _note_progress(self) -> None:
        with self._lock:
            zero, self._zero_counted = self._blocks.zero_bytes - self._zero_counted, self._blocks.zero_bytes
        self._totals.add(totals.ZERO_BYTES, zero)
        if not self.dirtied.is_set():
            self._in_trio(lambda: self.dirtied.set())  # whichever event stands there by then
        if self._blocks.complete:
            self._in_trio(self.completed.set)

    def _in_trio(self, call: Callable[[], object]) -> None:
        # A thread may finish its last request after the daemon's loop has ended.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)
