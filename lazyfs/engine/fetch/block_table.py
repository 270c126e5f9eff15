"""Knows which blocks of one image are present, being fetched, or missing.

Readers and population share it. It holds the pure table (`core/in_flight.py`), the extents and the
counters under one lock, because population's threads change them as well as the trio thread. The
lock is held for microseconds, and never across an await, a system call or a callback.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import trio

from lazyfs import errors
from lazyfs.core.block_map import BlockMap
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.extent_map import ExtentMap
from lazyfs.core.image_record import FetchCounters
from lazyfs.core.in_flight import Flight, InFlight, Plan
from lazyfs.engine import totals
from lazyfs.engine.totals import Totals


class BlockTable:
    """Holds the state of the blocks of one image. Thread-safe, unless a method says otherwise."""

    def __init__(self, blocks: BlockMap, counters: FetchCounters, totals: Totals) -> None:
        """Begin with what a store has loaded. Must be called in the trio thread.

        Args:
            blocks: the blocks that the store has loaded.
            counters: what earlier daemons have fetched of this image.
            totals: the sums of the mount, to which all fetches are added.
        """
        self.size = blocks.size
        self.block_size = blocks.block_size
        self.completed = trio.Event()
        """Set when every block is present."""
        self.dirtied = trio.Event()
        """Set when something has changed since the last checkpoint. `take_dirty` replaces it."""
        self._failure: errors.LazyfsError | None = None
        self._distrust: errors.CacheCorrupt | None = None
        self._blocks = blocks
        self._extents = ExtentMap(blocks.size)
        self._flights: InFlight[trio.Event] = InFlight(blocks)
        self._lock = threading.Lock()
        self._demand_bytes = counters.demand_bytes
        self._populated_bytes = counters.populated_bytes
        self._requests = counters.requests
        self._totals = totals
        self._zero_counted = blocks.zero_bytes
        self._token = trio.lowlevel.current_trio_token()
        if blocks.complete:
            self.completed.set()

    # -- what may be done

    @property
    def failure(self) -> errors.LazyfsError | None:
        """Why nothing more is fetched, or None. Never raise it itself: raise `failure.again()`."""
        return self._failure

    @property
    def distrust(self) -> errors.CacheCorrupt | None:
        """Why not even present blocks may be read, or None. Never raise it itself, as with
        `failure`.

        Only a restart repairs that, because it goes on from the last checkpoint.
        """
        return self._distrust

    def stop_fetching(self, reason: errors.LazyfsError) -> None:
        """Fetch nothing more. From now on a read of a missing range fails with `reason`."""
        self._failure = reason.again()

    def go_on_fetching(self) -> None:
        """Undo `stop_fetching`, unless the cache is distrusted."""
        self._failure = self._distrust

    def stop_reading(self, reason: errors.CacheCorrupt) -> None:
        """Stop both fetching and reading."""
        self._failure = self._distrust = reason.again()

    # -- what is here

    def present(self, wanted: ByteRange) -> bool:
        """Return whether `wanted` can be read from the cache file.

        Takes no lock, because blocks that are present never become missing again.
        """
        return self._blocks.is_present(wanted)

    @property
    def complete(self) -> bool:
        """True if every block is present now."""
        with self._lock:
            return self._blocks.complete

    @property
    def present_bytes(self) -> int:
        """Bytes of data in the cache."""
        return self._blocks.present_bytes

    @property
    def zero_bytes(self) -> int:
        """Bytes that are known to be zeroes."""
        return self._blocks.zero_bytes

    @property
    def may_be_filled(self) -> bool:
        """True if something is missing and may be fetched."""
        return self._failure is None and not self.completed.is_set()

    def counters(self) -> FetchCounters:
        """Return what has been fetched since the image was created, by earlier daemons as well."""
        with self._lock:
            return FetchCounters(self._demand_bytes, self._populated_bytes, self._requests)

    def runs(self) -> list[tuple[ByteRange, int]]:
        """Return the ranges of the export and the states of their blocks (`core/block_map.py`)."""
        with self._lock:
            return [(self._blocks.bytes_of(run), state) for run, state in self._blocks.runs()]

    def some_data(self, most: int, longest: int, dice: Callable[[], float]) -> list[ByteRange]:
        """Return ranges of data as `BlockMap.some_data` does."""
        with self._lock:
            return self._blocks.some_data(most, longest, dice)

    def whole_blocks(self, wanted: ByteRange) -> ByteRange:
        """Return `wanted`, widened to whole blocks."""
        return wanted.align_out(self.block_size, self.size)

    def span_of(self, flight: Flight) -> ByteRange:
        """Return the range of bytes that a flight fetches."""
        return self._blocks.bytes_of(flight.run)

    # -- extents

    def first_unknown(self, within: ByteRange) -> ByteRange | None:
        """Return the first window that touches `within` and whose extents are unknown, or None."""
        with self._lock:
            return self._extents.first_unknown(within)

    def next_unknown(self) -> ByteRange | None:
        """Return the window whose extents population must learn before it can go on.

        Returns:
            None if population knows enough, or if nothing is missing.
        """
        with self._lock:
            run = self._flights.next_missing()
            return None if run is None else self._extents.first_unknown(self._blocks.bytes_of(run))

    def missing_window(self, position: int) -> tuple[ByteRange, bool] | None:
        """Return the first window at or after byte `position` that has missing blocks.

        Returns:
            The window, and whether its extents are known; or None if there is no such window.
        """
        with self._lock:
            run = self._blocks.next_missing(-(-position // self.block_size), 1)
            if run is None:
                return None
            window = self._extents.window_of(self._blocks.bytes_of(run).start)
            return window, self._extents.first_unknown(window) is None

    def learn(self, window: ByteRange, data: Iterable[ByteRange]) -> None:
        """Note which ranges of `window` hold data. Its other blocks are present from now on."""
        with self._lock:
            self._extents.learn(window, data)
            for zeroes in self._extents.zero_ranges(window):
                self._blocks.mark_zero(self._blocks.blocks_inside(zeroes))
        self._note_progress()

    def data_ranges(self, span: ByteRange) -> list[ByteRange]:
        """Return the ranges of data inside `span`, in order. Its extents must be known."""
        with self._lock:
            return self._extents.data_ranges(span)

    # -- flights

    def plan(self, wanted: ByteRange, ahead: int, unit: int) -> Plan:
        """Plan a read as `InFlight.plan` does.

        Nothing is fetched ahead beyond the extents that are known.
        """
        with self._lock:
            known = self._extents.known_until(wanted.end, min(wanted.end + ahead, self.size))
            return self._flights.plan(wanted, known - wanted.end, unit)

    def claim(self, limit: int) -> Flight | None:
        """Claim blocks as `InFlight.claim` does."""
        with self._lock:
            return self._flights.claim(
                limit, lambda span: self._extents.known_until(span.start, span.end)
            )

    def count_requests(self, amount: int) -> None:
        """Count requests that are sent to the repository."""
        with self._lock:
            self._requests += amount

    def count_demand(self, amount: int) -> None:
        """Count bytes that were fetched because a reader needed them."""
        with self._lock:
            self._demand_bytes += amount
        self._totals.add(totals.DEMAND_BYTES, amount)

    def count_populated(self, amount: int) -> None:
        """Count bytes that population fetched."""
        with self._lock:
            self._populated_bytes += amount
        self._totals.add(totals.POPULATED_BYTES, amount)

    def settle(self, flight: Flight, kept: Mapping[int, int] | None) -> None:
        """End a flight as `InFlight.settle` does, and wake everybody who waits for it."""
        with self._lock:
            waiters = self._flights.settle(flight, kept)
        for event in waiters:
            self._in_trio(event.set)
        if kept is not None:
            self._note_progress()

    async def until_settled(self, flight: Flight) -> None:
        """Wait until `flight` has ended. Trio thread only."""
        event = trio.Event()
        with self._lock:
            if not self._flights.wait(flight, event):
                return
        try:
            await event.wait()
        finally:
            with self._lock:
                self._flights.forget(flight, event)

    def under_way(self) -> list[Flight]:
        """Return the flights under way, the oldest first."""
        with self._lock:
            return list(self._flights)

    # -- saving

    async def until_changed(self) -> None:
        """Wait for a change since the last checkpoint, or until everything is present.

        Trio thread only.
        """

        async def until(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(until, self.dirtied)
            nursery.start_soon(until, self.completed)

    def take_dirty(self) -> tuple[list[tuple[int, bytes]], int]:
        """Return what the next checkpoint must save. Trio thread only.

        Returns:
            The pages of the map that have changed since the last call, and the number of zero bytes
                in mixed blocks.
        """
        with self._lock:
            self.dirtied = trio.Event()
            return self._blocks.take_dirty(), self._blocks.mixed_zero_bytes

    def give_back(self, pages: Iterable[int]) -> None:
        """Count pages as changed again, because they could not be saved. Trio thread only."""
        with self._lock:
            self._blocks.give_back(pages)
        self.dirtied.set()

    # -- inside

    def _note_progress(self) -> None:
        with self._lock:
            zero, self._zero_counted = (
                self._blocks.zero_bytes - self._zero_counted,
                self._blocks.zero_bytes,
            )
            complete = self._blocks.complete
        self._totals.add(totals.ZERO_BYTES, zero)
        if not self.dirtied.is_set():
            self._in_trio(lambda: self.dirtied.set())  # the event that is current at that time
        if complete:
            self._in_trio(self.completed.set)

    def _in_trio(self, call: Callable[[], object]) -> None:
        # A thread may finish its last request after the daemon's loop has ended.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)
