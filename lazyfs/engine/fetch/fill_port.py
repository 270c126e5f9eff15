"""Gives population's workers what they may fetch next of one image.

Implements `interfaces.FillWork`.
"""

from collections import Counter
from collections.abc import Callable

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.in_flight import Flight
from lazyfs.engine import totals
from lazyfs.engine.budget import Reservation
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.fetch.cache_writer import CacheWriter
from lazyfs.engine.fetch.zeroes import without_zeroes
from lazyfs.engine.interfaces import Claim, Export
from lazyfs.engine.pace import Pace, Permit
from lazyfs.engine.totals import Totals


class FillPort:
    """Gives population the next missing blocks of one image. Thread-safe."""

    def __init__(
        self,
        export: Export,
        table: BlockTable,
        writer: CacheWriter,
        pace: Pace,
        totals: Totals,
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin with no failure.

        Args:
            export: the export to fetch from.
            table: the blocks of the image.
            writer: writes to the cache file.
            pace: limits the pace.
            totals: counts the requests.
            is_open: returns whether somebody may soon read what population writes. Called from
                population's threads.
        """
        self.export = export
        self.trouble: Exception | None = None
        """The latest failure of one of population's requests, for a message. None after
        `forget_trouble`."""
        self._table = table
        self._writer = writer
        self._pace = pace
        self._totals = totals
        self._is_open = is_open

    def forget_trouble(self) -> None:
        """Forget the failure, because a new turn of population begins."""
        self.trouble = None

    def claim(self, limit: int) -> Claim | float | None:
        """Claim blocks as described for `interfaces.FillWork.claim`."""
        if self._table.failure is not None or self.trouble is not None or self._pace.stopped:
            return None
        permit = self._pace.admit(limit)
        if isinstance(permit, float):
            return permit
        claim = None
        try:
            claim = self._claim(permit)
        finally:
            if claim is None:
                permit.end()
        return claim

    def _claim(self, permit: Permit) -> "FillClaim | None":
        reservation = self._writer.budget.reserve(
            max(permit.most, self._table.block_size), background=True
        )
        if reservation is None:
            return None
        flight = None
        try:
            flight = self._table.claim(permit.most)
        finally:
            if flight is None:
                reservation.release()
        if flight is None:
            return None
        claim = FillClaim(self, flight, permit, reservation)
        try:
            claim.parts = tuple(self._table.data_ranges(self._table.span_of(flight)))
            reservation.shrink(claim.data_bytes)
            permit.sent(claim.data_bytes)
            self._table.count_requests(len(claim.parts))
            self._totals.add(totals.POPULATION_REQUESTS, len(claim.parts))
        except BaseException:  # there is no memory
            claim.drop()
            raise
        return claim


class FillClaim:
    """Holds the blocks that population fetches. Implements `interfaces.Claim`."""

    def __init__(
        self, port: FillPort, flight: Flight, permit: Permit, reservation: Reservation
    ) -> None:
        self.parts: tuple[ByteRange, ...] = ()
        self.flight = flight
        self._port = port
        self._permit = permit
        self._reservation = reservation
        self._kept: Counter[int] = Counter()
        """How many bytes were written to each block."""
        self._ended = False

    @property
    def data_bytes(self) -> int:
        """How many bytes are to be fetched."""
        return sum(part.length for part in self.parts)

    def write(self, offset: int, data: memoryview) -> None:
        """Write data as described for `interfaces.Claim.write`.

        The page cache keeps the data only if the image is open. Blocks of zeroes stay holes.
        """
        port = self._port
        kept, blocks = without_zeroes([(offset, data)], port._table.block_size)
        for start, piece in kept:
            port._writer.store.write(start, piece, keep=port._is_open())
        self._kept.update(blocks)

    def finish(self) -> None:
        """End the claim as described for `interfaces.Claim.finish`."""
        assert not self._ended
        fetched, port = self.data_bytes, self._port
        # Counted first, because whoever hears that the image is complete saves the count.
        port._table.count_populated(fetched)
        port._table.settle(self.flight, self._kept)
        self._ended = True
        self._reservation.shrink(self._kept.total())
        self._reservation.keep()
        self._permit.end(fetched)
        port._writer.succeeded()

    def drop(self, error: Exception | None = None) -> None:
        """End the claim as described for `interfaces.Claim.drop`."""
        if self._ended:
            return
        self._ended = True
        port = self._port
        if isinstance(error, errors.RequestFailed):
            # The cursor is already behind the blocks that failed. So the next turn goes on behind
            # them, and comes back to them at the end.
            port.trouble = error.again()
        elif isinstance(error, errors.NoSpace | OSError):
            port.trouble = (
                error.again() if isinstance(error, errors.LazyfsError) else OSError(*error.args)
            )
            port._writer.failed(error)
        self._permit.end()
        port._table.settle(self.flight, None)
        self._reservation.release()
