"""What another process has open, and where a path leads for it. Source: proc(5), statx(2), unix(7).

Open files are looked at without asking their file system (AT_STATX_DONT_SYNC): a FUSE daemon that hangs, or was
killed, stops nobody here. Paths are looked up, and that does ask it.

A path is looked up below /proc/PID/root, so in the process's mount namespace; an absolute symbolic link on the way is
followed in ours.
"""

import ctypes
import errno
import os
import socket
import stat
import struct
from contextlib import suppress

from lazyfs.core.pivot_choice import OpenFile, Place

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_INO = 0x100
_STATX = struct.Struct("=32xQ96xII112x")  # stx_ino, stx_dev_major, stx_dev_minor of struct statx, 256 bytes

_UCRED = struct.Struct("=iII")  # unix(7): pid, uid, gid

_libc = ctypes.CDLL(None, use_errno=True)


def peer_of(connected: socket.socket) -> int:
    """Return the process that made the listening socket; 0 if it cannot be seen from here."""
    pid, _, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid)


def open_files(pid: int, ask_none_of: set[int] | None) -> list[OpenFile]:
    """Return the files that the process has open.

    Args:
        pid: Whose files.
        ask_none_of: Devices that are known, or whose daemon hangs. A file on another one is asked whether its FUSE
            mount is dead. None: no device is asked.

    Raises:
        OSError: the process has ended, or belongs to somebody else.
    """
    found = []
    folder = f"/proc/{pid}/fd"
    for fd in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed meanwhile
            path = f"{folder}/{fd}"
            name = os.readlink(path)
            if name.startswith("/"):
                device, inode = _identity(path)
                orphan = ask_none_of is not None and device not in ask_none_of and _is_dead(path)
                found.append(OpenFile(int(fd), device, inode, name, orphan))
    return found


def place_of(path: str, pid: int | None = None) -> Place:
    """Return where `path` leads for us, or for process `pid`; a relative one from its working folder.

    Raises:
        OSError: nowhere.
    """
    if pid is not None:
        path = f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"
    found = os.stat(path)
    return Place(found.st_dev, found.st_ino, found.st_size, stat.S_ISREG(found.st_mode))


def command_line(pid: int) -> list[str]:
    """Return the words of the process's command line; none if they cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().split("\0")
    except OSError:
        return []


def device_number(device: str) -> int:
    """Return st_dev of "major:minor"."""
    major, minor = map(int, device.split(":"))
    return os.makedev(major, minor)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, be it that nobody has reaped it yet."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _identity(path: str) -> tuple[int, int]:
    """Return device and inode as the kernel remembers them."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_INO, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    inode, major, minor = _STATX.unpack(buffer.raw)
    return os.makedev(major, minor), inode


def _is_dead(path: str) -> bool:
    """Whether the file lies on a FUSE mount without a daemon; statvfs is never answered from a cache."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False
