"""Writes what was fetched for one image to its cache file, within the budget, and says whether that
works."""

import errno
import logging
from collections.abc import Iterable

from lazyfs import errors
from lazyfs.engine import totals
from lazyfs.engine.budget import LIMITED, UNKEPT, Budget
from lazyfs.engine.interfaces import Store
from lazyfs.engine.totals import Totals

logger = logging.getLogger(__name__)


class CacheWriter:
    """Writes to the store of one image. Thread-safe."""

    def __init__(self, name: str, store: Store, budget: Budget, totals: Totals) -> None:
        """`name`: of the export, for the log."""
        self.refused = False
        """Whether the latest write found the cache's file system full, or the cache at its
        limit."""
        self.budget = budget
        self.store = store
        self._limited = False
        self._name = name
        self._totals = totals

    def message(self) -> str:
        """Return what an operator should know of writes that failed; "" if they work."""
        if not self.refused or (self._limited and not self.budget.tight):
            return ""
        return LIMITED if self._limited else UNKEPT

    def write(self, pieces: Iterable[tuple[int, memoryview]], size: int) -> bool:
        """Write what a reader fetched; False if that cannot be done. Blocks.

        Args:
            pieces: each with its offset in the export; `size` bytes together.
        """
        reservation = self.budget.reserve(size)
        if reservation is None:
            self.failed(errors.OverLimit())
            return False
        with reservation:
            try:
                for offset, piece in pieces:
                    self.store.write(offset, piece)
            except Exception as error:
                self.failed(error)
                return False
            reservation.keep()
        self.succeeded()
        return True

    def succeeded(self) -> None:
        """Something was written."""
        self.refused = False

    def failed(self, error: Exception) -> None:
        """Something could not be written."""
        if isinstance(error, OSError) and error.errno == errno.EBADF:
            return  # closed meanwhile, as an evicted image is
        if not isinstance(error, errors.OverLimit):
            self._totals.failed(totals.WRITE)
        if not self.refused:
            logger.warning("cannot keep what is fetched: image=%s reason=%s", self._name, error)
        self._limited = isinstance(error, errors.OverLimit)
        self.refused = True
