"""Asks whether written data of a file was lost on its way to the disk.

The kernel tells each open file of that once (errseq_t), and fsync(2) is how one is told. But fsync
also writes everything first. sync_file_range(2), of one byte, tells as well, and waits for nothing
but that byte's page.

Source: sync_file_range(2); Linux, mm/filemap.c, file_fdatawait_range.
"""

import ctypes
import os

SYNC_FILE_RANGE_WAIT_BEFORE = 1  # fs.h


def has_failed(fd: int) -> bool:
    """Return whether data was lost since `fd` was opened, or since it was last asked.

    Another descriptor that was opened by itself is told by itself. One that is shared with a
    process that has asked is not told again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    one = ctypes.c_int64
    return bool(libc.sync_file_range(fd, one(0), one(1), SYNC_FILE_RANGE_WAIT_BEFORE))


def reopen(fd: int) -> int:
    """Return a descriptor of the same file that is told of failures by itself.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
