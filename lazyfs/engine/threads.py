"""Threads for calls that wait for the disk, limited by who waits for them.

trio's default limiter is left to cold reads of cache files. With limiters of their own, nothing else waits behind
readers whom a disk that stalls holds up; nor do readers wait behind the catalog, or behind files being opened.
"""

import trio

MAX_OPENS = 8
MAX_SYNCS = 4
MAX_JOBS = 4
"""Unmeasured. A disk that queues more than four syncs gains nothing; a file is opened or unlinked in well under a
millisecond unless the disk stalls."""


class Threads:
    """The limiters of one mount."""

    def __init__(self) -> None:
        self.opens = trio.CapacityLimiter(MAX_OPENS)
        """Cache files are opened, begun and removed."""
        self.syncs = trio.CapacityLimiter(MAX_SYNCS)
        """Checkpoints, hand-offs, digests: what may take long."""
        self.catalog = trio.CapacityLimiter(1)
        """The catalog's transactions, which lock each other out anyway."""
        self.writes = trio.CapacityLimiter(1)
        """The write queue."""
        self.jobs = trio.CapacityLimiter(MAX_JOBS)
        """What an operator has asked for: maps and verification."""
