"""Writes what was fetched for one image to its cache file, as far as the budget allows.

It also tells why fetched bytes cannot be kept.
"""

import errno
import logging
from collections.abc import Iterable, Mapping

from lazyfs import errors
from lazyfs.engine import totals
from lazyfs.engine.budget import LIMITED, UNKEPT, Budget
from lazyfs.engine.fetch.zeroes import without_zeroes
from lazyfs.engine.interfaces import Store
from lazyfs.engine.totals import Totals

logger = logging.getLogger(__name__)


class CacheWriter:
    """Writes to the store of one image. Thread-safe."""

    def __init__(self, name: str, store: Store, budget: Budget, totals: Totals) -> None:
        """Write to `store`.

        Args:
            name: the name of the export, for the log.
            store: the cache file.
            budget: limits what may be written.
            totals: counts the writes that fail.
        """
        self.refused = False
        """True if the latest write found the file system full, or the cache at its limit."""
        self.budget = budget
        self.store = store
        self._limited = False
        self._name = name
        self._totals = totals

    def message(self) -> str:
        """Return what an operator should know of writes that failed, or "" if writes work."""
        if not self.refused or (self._limited and not self.budget.tight):
            return ""
        return LIMITED if self._limited else UNKEPT

    def write(
        self, pieces: Iterable[tuple[int, memoryview]], size: int, block_size: int
    ) -> Mapping[int, int] | None:
        """Write what a reader has fetched, but for blocks of zeroes. Blocks.

        Args:
            pieces: the bytes, each piece with its offset in the export.
            size: the length of all pieces together.
            block_size: the size of a block.

        Returns:
            How many bytes were written to each block, or None if they could not be written.
        """
        reservation = self.budget.reserve(size)
        if reservation is None:
            self.failed(errors.OverLimit())
            return None
        with reservation:
            try:
                kept, blocks = without_zeroes(pieces, block_size)
                for offset, piece in kept:
                    self.store.write(offset, piece)
            except Exception as error:
                self.failed(error)
                return None
            reservation.shrink(blocks.total())
            reservation.keep()
        self.succeeded()
        return blocks

    def succeeded(self) -> None:
        """Note that something was written."""
        self.refused = False

    def failed(self, error: Exception) -> None:
        """Note that something could not be written."""
        if isinstance(error, OSError) and error.errno == errno.EBADF:
            return  # the file was closed meanwhile, as that of an evicted image is
        if not isinstance(error, errors.OverLimit):
            self._totals.failed(totals.WRITE)
        if not self.refused:
            logger.warning("cannot keep what is fetched: image=%s reason=%s", self._name, error)
        self._limited = isinstance(error, errors.OverLimit)
        self.refused = True
