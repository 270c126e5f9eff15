"""Keeps some room of the cache's disk for the catalog.

When the disk has no free byte, the catalog must still be written: to evict an image frees room, but
the catalog is told first. So a file of RESERVE bytes lies in the state folder. It is given up when
the catalog finds the disk full, and made again when there is room.
"""

import os
import threading
from contextlib import suppress

from lazyfs.cache.beneath import Beneath
from lazyfs.units import KiB, MiB

NAME = ".lazyfs/reserve"

RESERVE = 256 * KiB
"""Enough for the journal of twenty changes: a change writes two or three pages of 4 KiB, and SQLite
begins the journal anew after 1,000 pages."""


PLENTY = 4 * MiB
"""The reserve is made again when so much is free: an eviction frees much more."""


class Reserve:
    """Holds the reserve of one cache directory. Thread-safe."""

    def __init__(self, root: Beneath | None) -> None:
        """Do nothing yet.

        Args:
            root: the cache directory. None means that there is no reserve.
        """
        self._root = root
        self._lock = threading.Lock()
        self._taken = False

    def take(self) -> None:
        """Make the file, unless it is there, or the disk is too full for it. Blocks."""
        with self._lock:
            if self._taken or self._root is None:
                return
            with suppress(OSError):
                found = os.fstatvfs(self._root.fd)
                if found.f_blocks and found.f_bavail * found.f_frsize < PLENTY:
                    return
                fd = self._root.open(NAME, os.O_RDWR | os.O_CREAT)
                try:
                    os.posix_fallocate(fd, 0, RESERVE)
                    self._taken = True
                finally:
                    os.close(fd)

    def free(self) -> bool:
        """Give the room to whoever writes next. Blocks.

        Returns:
            Whether there was any.
        """
        with self._lock:
            self._taken = False
            if self._root is None:
                return False
            try:
                self._root.unlink(NAME)
            except OSError:
                return False
            return True

    def forget(self) -> None:
        """Do nothing any more, because the cache directory is closed."""
        with self._lock:
            self._root = None
