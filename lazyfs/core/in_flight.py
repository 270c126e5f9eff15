"""Tracks the requests under way for one image: which fetches which block, and who waits for it.

    MISSING --plan, claim--> CLAIMED by one flight --settle--> DATA or ZERO, if it was kept
                                                           --> MISSING, if it was not kept

A *flight* is one request under way, of a reader or of population.

Invariants:

- A block is CLAIMED in the map exactly while one flight has it, so no byte is fetched twice at the
  same time.
- Every flight ends by exactly one `settle`, which returns everybody who waits for it.

The table decides and remembers. It neither waits nor fetches. It is not thread-safe: the caller
holds a lock.
"""

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from lazyfs.core.block_map import BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import FillCursor, plan_read, plan_rest

WaiterT = TypeVar("WaiterT")


class Purpose(enum.Enum):
    """Says what a flight is for."""

    DEMAND = enum.auto()
    """A reader waits for it, or it reads ahead for one."""
    REST = enum.auto()
    """It fetches the rest of the unit around what a reader waits for."""
    POPULATION = enum.auto()


@dataclass(eq=False, slots=True)
class Flight:
    """Represents a request under way.

    Two flights are never equal, and never share a block.
    """

    run: BlockRun
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Plan:
    """Says what a reader must fetch, and for what it must wait."""

    new: tuple[Flight, ...]
    """Flights that this reader must begin, the most urgent first."""
    joined: tuple[Flight, ...]
    """All flights that have a block which the reader wants, including the new ones, in the order
    of the blocks."""


class InFlight(Generic[WaiterT]):
    """Holds the flights over one block map. A `WaiterT` is any token for somebody who waits."""

    def __init__(self, blocks: BlockMap) -> None:
        """Begin with nothing under way. No block of `blocks` may be CLAIMED."""
        self._blocks = blocks
        self._at: dict[int, Flight] = {}
        self._waiters: dict[Flight, list[WaiterT]] = {}
        self._cursor = FillCursor()

    def __iter__(self) -> Iterator[Flight]:
        """Iterate over the flights under way, the oldest first."""
        return iter(tuple(self._waiters))

    def __len__(self) -> int:
        return len(self._waiters)

    def plan(self, wanted: ByteRange, ahead: int, unit: int) -> Plan:
        """Claim what is missing for a read of `wanted`, and say for what the reader must wait.

        Args:
            wanted: the range of the read.
            ahead: how many bytes behind `wanted` to fetch as well, if the read itself misses
                something.
            unit: as for `fetch_plan.plan_rest`. With the block size no rest is fetched.
        """
        new: list[Flight] = []
        try:
            for run in plan_read(self._blocks, wanted, ahead):
                new.append(self._begin(run, Purpose.DEMAND))
            if new:
                for run in plan_rest(self._blocks, wanted, unit):
                    new.append(self._begin(run, Purpose.REST))
            return self._joined(tuple(new), wanted)
        except BaseException:  # there is no memory
            for flight in new:
                self.settle(flight, None)
            raise

    def _joined(self, new: tuple[Flight, ...], wanted: ByteRange) -> Plan:
        own = self._blocks.blocks_of(wanted)
        self._cursor.jump(own.end)
        joined = dict.fromkeys(
            self._at[block] for block in range(own.first, own.end) if block in self._at
        )
        return Plan(new, tuple(joined))

    def claim(self, limit: int, known_until: Callable[[ByteRange], int]) -> Flight | None:
        """Claim the next missing blocks for population.

        Args:
            limit: the most bytes to claim. At least one block is claimed.
            known_until: returns up to which byte of a range it is known what the export holds.

        Returns:
            None if there are no blocks that may be fetched now.
        """
        run = self.next_missing(limit)
        if run is None:
            return None
        span = self._blocks.bytes_of(run)
        known = known_until(span)
        if known < span.end:  # `known` is always at the border of a block
            run = BlockRun(run.first, known // self._blocks.block_size)
        if run.first == run.end:
            return None
        self._cursor.jump(run.end)
        return self._begin(run, Purpose.POPULATION)

    def next_missing(self, limit: int = 1) -> BlockRun | None:
        """Return the run that population would fetch next, at most `limit` bytes or one block."""
        return self._cursor.peek(self._blocks, limit)

    def wait(self, flight: Flight, waiter: WaiterT) -> bool:
        """Let `settle` return `waiter` when `flight` ends.

        Returns:
            False if the flight has ended already.
        """
        waiters = self._waiters.get(flight)
        if waiters is None:
            return False
        waiters.append(waiter)
        return True

    def forget(self, flight: Flight, waiter: WaiterT) -> None:
        """Undo `wait`, because the waiter has given up. Does nothing if the flight has ended."""
        waiters = self._waiters.get(flight, [])
        if waiter in waiters:
            waiters.remove(waiter)

    def settle(self, flight: Flight, kept: Mapping[int, int] | None) -> list[WaiterT]:
        """End a flight, and return everybody who waited for it.

        Args:
            flight: the flight.
            kept: how many bytes of data are in the cache file now, by block. Blocks that are left
                out are zeroes. None means that nothing was kept.
        """
        waiters = self._waiters.pop(flight)
        if kept is None:
            self._blocks.release(flight.run)
        else:
            for has_data, blocks in groupby(
                range(flight.run.first, flight.run.end), lambda block: block in kept
            ):
                numbers = list(blocks)
                data_bytes = sum(kept[block] for block in numbers) if has_data else 0
                self._blocks.mark_present(BlockRun(numbers[0], numbers[-1] + 1), data_bytes)
        for block in range(flight.run.first, flight.run.end):
            del self._at[block]
        return waiters

    def _begin(self, run: BlockRun, purpose: Purpose) -> Flight:
        flight = Flight(run, purpose)
        self._waiters[flight] = []
        try:
            for block in range(run.first, run.end):
                self._at[block] = flight
            self._blocks.claim(run)
        except BaseException:  # there is no memory, or a bug
            del self._waiters[flight]
            for block in range(run.first, run.end):
                if self._at.get(block) is flight:
                    del self._at[block]
            raise
        return flight
