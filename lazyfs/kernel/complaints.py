"""Logs failures of requests, but not each one of a kind."""

import logging
import math
from collections.abc import Callable

logger = logging.getLogger(__name__)

QUIET_S = 10.0
MAX_COMPLAINTS = 1000
"""A failure of one kind of one file is logged once in QUIET_S seconds. Up to MAX_COMPLAINTS such
failures are remembered. Both are unmeasured."""


class Complaints:
    """Logs a failure that is repeated only once in a while.

    A guest that repeats a read that fails must not fill the log.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[tuple[str, int, str], tuple[float, int]] = {}
        """For each kind of failure: when it was last logged, and how often it has happened
        since."""

    def warn(self, what: str, inode: int, offset: int, error: Exception) -> None:
        """Log a failure, unless the same failure has been logged in the last QUIET_S seconds."""
        kind, now = (what, inode, type(error).__name__), self._clock()
        said_at, since = self._said.get(kind, (-math.inf, 0))
        if now < said_at + QUIET_S:
            self._said[kind] = said_at, since + 1
            return
        if len(self._said) >= MAX_COMPLAINTS:
            self._said.clear()
        self._said[kind] = now, 0
        logger.warning(
            "%s failed: inode=%d offset=%d reason=%s%s",
            what,
            inode,
            offset,
            error,
            f" (and {since} times more)" if since else "",
        )
