"""Locks a plain file as QEMU locks an image that it reads, so that no QEMU tool writes to it.

A VM that reads an image through the mount locks the file on the mount, and the kernel keeps such
locks for each inode by itself: nobody sees them at the plain file. So whoever holds the plain file
open for readers of the mount takes QEMU's own locks there.

Source: QEMU, block/file-posix.c (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE) and
include/block/block-common.h (BLK_PERM_*). A reader locks a byte for each permission that it has,
and one for each that it does not grant to others.
"""

import errno
import fcntl
import struct

_PERM_BASE, _SHARED_BASE = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_BYTES = (_PERM_BASE + _CONSISTENT_READ, _SHARED_BASE + _WRITE, _SHARED_BASE + _RESIZE)

_FLOCK = struct.Struct("hhqqi4x")
"""l_type, l_whence, l_start, l_len and l_pid of struct flock (fcntl(2)) on a 64-bit system."""


def lock_as_reader(fd: int) -> bool:
    """Lock the open file as a QEMU that reads it and lets nobody write to it or resize it.

    The locks belong to the open file, not to this process: they last until its last descriptor is
    closed, in the kernel as well (passthrough).

    Returns:
        False if somebody has it open to write, or if the file system has no locks.

    Raises:
        OSError: they cannot be taken for another reason.
    """
    for byte in _BYTES:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOLCK, errno.EINVAL):
                return False
            raise
    return True
