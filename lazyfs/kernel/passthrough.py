"""Lets the kernel read plain files by itself: it knows which backing id belongs to which open
inode.

Importing this module loads the C module. That must happen before pyfuse3 is imported, because the C
module replaces two functions of libfuse. So every module that imports pyfuse3 imports this one
first.

An inode has at most one backing id at a time. All who have the inode open share it, from the first
open to the last release. If the kernel could not give one, that is remembered for the same time,
because the kernel refuses to mix both kinds of opens.
"""

import importlib
import logging
import os
import sys

from lazyfs.kernel.channel import Connection
from lazyfs.kernel.session import PASSTHROUGH, KernelSession

logger = logging.getLogger(__name__)


def _load() -> None:
    """Load the C module in front of libfuse."""
    assert "pyfuse3" not in sys.modules, "pyfuse3 was imported first"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        importlib.import_module("lazyfs.kernel._replies")
    finally:
        sys.setdlopenflags(flags)


_load()


def connect(connection: Connection) -> None:
    """Let libfuse get its requests from the keeper. Call it before pyfuse3.init."""
    sys.modules["lazyfs.kernel._replies"].connect(connection.fuse_fd, connection.done_fd)


class Backings:
    """Holds the backing ids of one mount. Trio thread only."""

    def __init__(self, session: KernelSession, wanted: bool, probe_fd: int) -> None:
        """Find out whether passthrough works.

        Args:
            session: the mounted connection.
            wanted: False if passthrough is turned off.
            probe_fd: any plain file on the file system of the cache, to try it with.
        """
        self._session = session
        self._open: dict[int, tuple[int, int]] = {}
        """The backing id and the number of opens of each inode. The id is 0 if there is none."""
        self.opens = 0
        """How many files have been opened so that the kernel reads them by itself."""
        self.trouble = self._trouble(wanted, probe_fd)
        """Why whole images are read through the daemon. It is "" if the kernel reads them by
        itself."""

    def _trouble(self, wanted: bool, probe_fd: int) -> str:
        if not wanted:
            return "turned off"
        if not self._session.flags & PASSTHROUGH:
            return "the kernel has none: it came with Linux 6.9"
        try:
            self._session.close_backing(self._session.open_backing(probe_fd))
        except PermissionError:
            return "it needs CAP_SYS_ADMIN"
        except OSError as error:
            return f"not for files on the cache's file system: {error.strerror}"
        return ""

    def opened(self, inode: int, fd: int) -> None:
        """Let the next OPEN reply with `inode` as file handle be passthrough to `fd`, if that
        works.

        Nothing may be awaited between this and the reply.
        """
        backing_id, opens = self._open.get(inode) or (self._register(inode, fd), 0)
        self._open[inode] = backing_id, opens + 1
        if backing_id:
            self.opens += 1
            sys.modules["lazyfs.kernel._replies"].reply_with(inode, backing_id)

    def _register(self, inode: int, fd: int) -> int:
        if self.trouble:
            return 0
        try:
            return self._session.open_backing(fd)
        except OSError as error:
            logger.warning(
                "read through the daemon, passthrough failed: inode=%d reason=%s", inode, error
            )
            return 0

    def restored(self, inode: int, backing_id: int, opens: int) -> None:
        """Go on where an earlier daemon has ended: the kernel has this id for the inode."""
        self._open[inode] = backing_id, opens

    def released(self, inode: int) -> None:
        """Note that one open has ended. With the last one, the kernel forgets the backing file."""
        backing_id, opens = self._open.pop(inode)
        if opens > 1:
            self._open[inode] = backing_id, opens - 1
        elif backing_id:
            try:
                self._session.close_backing(backing_id)
            except OSError as error:
                # An earlier daemon has done it, and ended before the kernel had its answer; or the
                # connection is gone, and the id with it.
                logger.debug(
                    "a backing file could not be given back: inode=%d reason=%s", inode, error
                )
