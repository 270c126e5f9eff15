"""Whether what is fetched for one image can be kept, and what an operator hears when it cannot."""

import errno
import logging

from lazyfs import errors
from lazyfs.engine import totals
from lazyfs.engine.budget import LIMITED, UNKEPT, Budget
from lazyfs.engine.fetch.demand_fetch import DemandFetch
from lazyfs.engine.interfaces import Store
from lazyfs.engine.totals import Totals

logger = logging.getLogger(__name__)


class Keeping:
    """Of one image. From any thread."""

    def __init__(self, name: str, store: Store, budget: Budget, totals: Totals) -> None:
        """`name`: of the export, for the log."""
        self.refused = False
        """The latest write found the cache's file system full, or the cache at its limit."""
        self._limited = False
        self._name = name
        self._store = store
        self._budget = budget
        self._totals = totals

    def message(self) -> str:
        """Return what an operator should know, or ""."""
        if not self.refused or (self._limited and not self._budget.tight):
            return ""
        return LIMITED if self._limited else UNKEPT

    def write(self, fetch: DemandFetch) -> bool:
        """Write what was received to the cache file; False, with no budget taken, if that cannot be done. Blocks."""
        size = fetch.data_bytes
        if not self._budget.reserve(size):
            self.failed(errors.OverLimit())
            return False
        try:
            for offset, piece in fetch.pieces():
                self._store.write(offset, piece)
        except Exception as error:
            self._budget.give_back(size)
            self.failed(error)
            return False
        self.refused = False
        return True

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
