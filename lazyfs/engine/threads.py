"""Limits the threads for calls that wait for the disk, separately for each kind of caller.

trio's default limiter is used for cold reads of cache files only. All other calls have limiters of
their own. So none of them waits behind readers that a stalled disk holds up, and readers wait
neither for the catalog nor for files that are being opened.
"""

import trio

MAX_OPENS = 8
MAX_SYNCS = 4
MAX_JOBS = 4
"""These numbers are unmeasured. A disk that queues more than four syncs gains nothing. A file is
opened or unlinked in well under a millisecond unless the disk stalls."""


class Threads:
    """Holds the limiters of one mount."""

    def __init__(self) -> None:
        self.opens = trio.CapacityLimiter(MAX_OPENS)
        """For opening, creating and removing cache files."""
        self.syncs = trio.CapacityLimiter(MAX_SYNCS)
        """For what may take long: checkpoints, hand-offs and digests."""
        self.catalog = trio.CapacityLimiter(1)
        """For the catalog's transactions, which exclude each other anyway."""
        self.writes = trio.CapacityLimiter(1)
        """For the write queue."""
        self.jobs = trio.CapacityLimiter(MAX_JOBS)
        """For what an operator has asked for: maps and verification."""
