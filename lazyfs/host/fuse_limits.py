"""Reads the limits that the administrator has set for all FUSE file systems of this host.

Source: fs/fuse/sysctl.c and fs/fuse/inode.c (init_server_timeout), Linux 6.15.
"""

from contextlib import suppress

_FOLDER = "/proc/sys/fs/fuse"


def request_timeout_s(folder: str = _FOLDER) -> int:
    """Return after how many seconds the kernel aborts a connection for an unanswered request.

    Returns:
        0 if it never does.
    """
    default, most = (
        _number(f"{folder}/{name}") for name in ("default_request_timeout", "max_request_timeout")
    )
    return min(default, most) if default and most else default or most


def _number(path: str) -> int:
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return int(file.read())
    return 0
