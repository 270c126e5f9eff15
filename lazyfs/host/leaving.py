"""Tells whether a process wants to end, although it waits where the kernel does not let it go.

Source: proc(5), /proc/PID/stat and /proc/PID/status; include/linux/sched.h, PF_EXITING.
"""

import os
import signal

_EXITING = 0x4
_FLAGS = 6
"""Where the flags are in /proc/PID/stat, counted behind the name of the program."""

_ENDING = (1 << signal.SIGKILL - 1) | (1 << signal.SIGINT - 1) | (1 << signal.SIGTERM - 1)


def is_gone(pid: int) -> bool:
    """Return whether a thread has ended."""
    return not os.path.exists(f"/proc/{pid}")


def wants_to_end(pid: int) -> bool:
    """Return whether a thread is about to end, or has a signal that asks for it and waits.

    Args:
        pid: the thread. It may have ended.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[_FLAGS])
        with open(f"/proc/{pid}/status", "rb") as file:
            fields = dict(line.partition(b":")[::2] for line in file)
        waiting = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
        held_back = int(fields[b"SigBlk"], 16) | int(fields[b"SigIgn"], 16)
    except (OSError, ValueError, LookupError):
        return False
    return bool(flags & _EXITING or waiting & _ENDING & ~held_back)
