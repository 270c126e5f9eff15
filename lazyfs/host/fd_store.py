"""Descriptors that a service manager keeps while a process is started again.

Source: sd_notify(3), FDSTORE=1; sd_listen_fds_with_names(3).
"""

import os
from collections.abc import MutableMapping

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


def inherited(environment: MutableMapping[str, str], pid: int) -> dict[str, list[int]]:
    """Return the descriptors that this process was given, by their names.

    They are not inherited by others. The variables are removed, so that programs which this process
    starts do not take them for theirs.
    """
    for_pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if for_pid != str(pid) or not count.isdecimal():
        return {}
    found: dict[str, list[int]] = {}
    for number, fd in enumerate(range(FIRST_FD, FIRST_FD + int(count))):
        os.set_inheritable(fd, False)
        found.setdefault(names[number] if number < len(names) else "", []).append(fd)
    return found
