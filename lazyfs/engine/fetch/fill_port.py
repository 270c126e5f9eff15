"""Population's side of one image: what its workers may fetch next. Implements
`interfaces.FillWork`."""

from collections.abc import Callable

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.in_flight import Flight
from lazyfs.engine import totals
from lazyfs.engine.budget import Reservation
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.fetch.cache_writer import CacheWriter
from lazyfs.engine.interfaces import Claim, Export
from lazyfs.engine.pace import Pace, Permit
from lazyfs.engine.totals import Totals


class FillPort:
    """Gives population the next missing blocks of one image. Every method may be called from any
    thread."""

    def __init__(
        self,
        export: Export,
        table: BlockTable,
        writer: CacheWriter,
        pace: Pace,
        totals: Totals,
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        """`is_open`: whether somebody may soon read what population writes; called from its
        threads."""
        self.export = export
        self.trouble: Exception | None = None
        """The latest failure of a request of population, for a message; None after
        `forget_trouble`."""
        self._table = table
        self._writer = writer
        self._pace = pace
        self._totals = totals
        self._is_open = is_open

    def forget_trouble(self) -> None:
        """A new turn of population begins."""
        self.trouble = None

    def claim(self, limit: int) -> Claim | float | None:
        """As `interfaces.FillWork.claim`."""
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
        flight = self._table.claim(permit.most)
        if flight is None:
            reservation.release()
            return None
        claim = FillClaim(self, flight, permit, reservation)
        try:
            claim.parts = tuple(self._table.data_ranges(self._table.span_of(flight)))
            reservation.shrink(claim.data_bytes)
            permit.sent(claim.data_bytes)
            self._table.count_requests(len(claim.parts))
            self._totals.add(totals.POPULATION_REQUESTS, len(claim.parts))
        except BaseException:  # no memory
            claim.drop()
            raise
        return claim


class FillClaim:
    """Blocks that population fetches. Implements `interfaces.Claim`."""

    def __init__(
        self, port: FillPort, flight: Flight, permit: Permit, reservation: Reservation
    ) -> None:
        self.parts: tuple[ByteRange, ...] = ()
        self.flight = flight
        self._port = port
        self._permit = permit
        self._reservation = reservation
        self._ended = False

    @property
    def data_bytes(self) -> int:
        """As `interfaces.Claim.data_bytes`."""
        return sum(part.length for part in self.parts)

    def write(self, offset: int, data: memoryview) -> None:
        """As `interfaces.Claim.write`. The page cache keeps the data only if the image is open."""
        self._port._writer.store.write(offset, data, keep=self._port._is_open())

    def finish(self) -> None:
        """As `interfaces.Claim.finish`."""
        assert not self._ended
        fetched, port = self.data_bytes, self._port
        port._table.count_populated(
            fetched
        )  # first: whoever hears that the image is complete saves the count
        port._table.settle(self.flight, fetched)
        self._ended = True
        self._reservation.keep()
        self._permit.end(fetched)
        port._writer.succeeded()

    def drop(self, error: Exception | None = None) -> None:
        """As `interfaces.Claim.drop`."""
        if self._ended:
            return
        self._ended = True
        port = self._port
        if isinstance(error, errors.RequestFailed):
            # The cursor is past it: the next turn goes on behind the bad place, and comes round to
            # it again.
            port.trouble = error.again()
        elif isinstance(error, errors.NoSpace | OSError):
            port.trouble = (
                error.again() if isinstance(error, errors.LazyfsError) else OSError(*error.args)
            )
            port._writer.failed(error)
        self._permit.end()
        port._table.settle(self.flight, None)
        self._reservation.release()
