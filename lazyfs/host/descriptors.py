"""What the kernel knows about an open file of a process. Source: proc(5), fdinfo; statx(2).

The file system of the file is never asked. So a FUSE daemon that hangs, or was killed, stops nobody
here. (AT_STATX_DONT_SYNC has this effect for FUSE since Linux 4.20.)
"""

import ctypes
import os
import struct
from dataclasses import dataclass

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TIMES_INO_SIZE = 0x40 | 0x80 | 0x100 | 0x200
_STATX = struct.Struct("=32xQQ48xqI4xqI12xII112x")
"""stx_ino, stx_size, stx_ctime and stx_mtime (seconds, nanoseconds), stx_dev_major and
stx_dev_minor of struct statx, 256 bytes."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Attributes:
    """Describes a file as the kernel remembers it."""

    device: int
    """As st_dev of stat(2)."""
    inode: int
    size: int
    times_ns: frozenset[int]
    """Its times of change: mtime and ctime."""


def attributes(pid: int, fd: int) -> Attributes:
    """Return the attributes of the file.

    Raises:
        OSError: the descriptor is closed, or the process has ended or belongs to another user.
    """
    return _attributes(_path(pid, fd))


def device_of(path: str) -> int:
    """Return the device of the file to which `path` leads, as st_dev of stat(2).

    Raises:
        OSError: the path leads nowhere.
    """
    return _attributes(path).device


def _attributes(path: str) -> Attributes:
    buffer = ctypes.create_string_buffer(_STATX.size)
    flags, wanted = _AT_STATX_DONT_SYNC, _STATX_TIMES_INO_SIZE
    if _libc.statx(_AT_FDCWD, path.encode(), flags, wanted, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    inode, size, c_s, c_ns, m_s, m_ns, major, minor = _STATX.unpack(buffer.raw)
    times_ns = frozenset({c_s * 10**9 + c_ns, m_s * 10**9 + m_ns})
    return Attributes(os.makedev(major, minor), inode, size, times_ns)


def name(pid: int, fd: int) -> str:
    """Return the name under which the file was opened, or "pipe:[...]" and the like.

    Raises:
        OSError: as `attributes`.
    """
    return os.readlink(_path(pid, fd))


def mount_id(pid: int, fd: int) -> int:
    """Return the number of the mount on which the file was opened, as mountinfo has it.

    Raises:
        OSError: as `attributes`.
        ValueError: the kernel does not say. Linux has done so since 3.15.
    """
    return int(_fdinfo(pid, fd).get("mnt_id", ""))


def inode_on(mounts: set[int], pid: int, fd: int) -> int | None:
    """Return the inode number of the file, or None if it was opened on none of these mounts.

    Raises:
        OSError: as `attributes`.
        ValueError: as `mount_id`.
    """
    fields = _fdinfo(pid, fd)
    if int(fields.get("mnt_id", "")) not in mounts:
        return None
    if "ino" in fields:  # since Linux 5.14
        return int(fields["ino"])
    return attributes(pid, fd).inode


def _path(pid: int, fd: int) -> str:
    return f"/proc/{pid}/fd/{fd}"


def _fdinfo(pid: int, fd: int) -> dict[str, str]:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
        found = (line.partition(":") for line in lines)
        return {key: value.strip() for key, _, value in found}
