"""Reads the limits that the administrator has set for all FUSE file systems of this host.

Source: fs/fuse/sysctl.c and fs/fuse/inode.c (init_server_timeout), Linux 6.15.
"""

import os
from contextlib import suppress

_FOLDER = "/proc/sys/fs/fuse"
_PARAMETERS = "/sys/module/fuse/parameters"


def request_timeout_s(folder: str = _FOLDER) -> int:
    """Return after how many seconds the kernel aborts a connection for an unanswered request.

    Returns:
        0 if it never does.
    """
    default, most = (
        _number(f"{folder}/{name}") for name in ("default_request_timeout", "max_request_timeout")
    )
    return min(default, most) if default and most else default or most


def background_requests(wanted: int, folder: str = _PARAMETERS) -> int:
    """Return how many background requests of a mount the kernel has under way.

    Source: process_init_limits() in fs/fuse/inode.c. root (CAP_SYS_ADMIN) has what it wants.
    """
    most = 0 if os.geteuid() == 0 else _number(f"{folder}/max_user_bgreq")
    return min(wanted, most) if most else wanted


def _number(path: str) -> int:
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return int(file.read())
    return 0
