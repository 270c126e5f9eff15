"""What another process has open, and where a path leads for it. Source: proc(5), statx(2).

Open files are looked at without asking their file system (AT_STATX_DONT_SYNC): a FUSE daemon that
hangs, or was killed, stops nobody here. Paths are looked up, and that does ask it. Whether a FUSE
mount is dead can only be learnt by asking it, and who asks one that hangs may be stuck beyond
SIGKILL: so that is done by processes that are left behind if they do not answer.

A path is looked up below /proc/PID/root, so in the process's mount namespace; an absolute symbolic
link on the way is followed in ours.
"""

import errno
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress

from lazyfs import errors
from lazyfs.core.pivot_choice import OpenFile, Place
from lazyfs.host import descriptors, mountinfo, mounts

ASK_S = 2.0
"""For file systems to say whether they are dead. The kernel answers for a dead one at once;
unmeasured."""

_ASK = "import os, sys\ntry:\n    os.statvfs(sys.argv[1])\nexcept OSError as error:\n    sys.exit(error.errno)"


def open_files(pid: int) -> list[OpenFile]:
    """Return the files that the process has open; none of process 0, which is in another pid
    namespace.

    Raises:
        UserError: the process has ended, or belongs to somebody else.
    """
    if pid == 0:
        return []
    found = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # It was closed meanwhile.
                name = descriptors.name(pid, int(fd))
                if name.startswith("/"):
                    found.append(_open_file(pid, int(fd), name))
    except FileNotFoundError:
        raise errors.UserError(f"process {pid} has ended") from None
    except OSError as error:
        raise errors.UserError(
            f"cannot look at process {pid}: {error.strerror}; try as root"
        ) from error
    return found


def dead_devices(pid: int, opened: Sequence[OpenFile], alive: Collection[int]) -> set[int]:
    """Return the devices of these files of the process on which a lazyfs has died. Takes up to
    ASK_S.

    Asked is only what can be one: a device that is not known to be `alive`, and is a lazyfs by its
    type or is mounted nowhere in the process's view (any more).
    """
    kinds = _mounted_kinds(pid)
    paths = {
        file.device: f"/proc/{pid}/fd/{file.fd}"
        for file in opened
        if file.device not in alive and kinds.get(file.device, mounts.FS_TYPE) == mounts.FS_TYPE
    }
    asked = {device: _ask(path) for device, path in paths.items()}
    end = time.monotonic() + ASK_S
    return {device for device, child in asked.items() if _answer(child, end) == errno.ENOTCONN}


def mounted_kind(pid: int, fd: int) -> str | None:
    """Return the type of the file system that the process has this file open on; None if it is not
    mounted (there).

    By the mount, as a file's device is not always that of its file system (btrfs, overlayfs).
    """
    with suppress(OSError, ValueError):
        number = descriptors.mount_id(pid, fd)
        return next((one.kind for one in mountinfo.read(pid) if one.mount_id == number), None)
    return None


def place_of(path: str, pid: int | None = None) -> Place:
    """Return where `path` leads for us, or for process `pid`; a relative one from its working
    folder.

    Raises:
        OSError: nowhere.
    """
    if pid is not None:
        path = f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"
    found = os.stat(path)
    return Place(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode)
    )


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


def _open_file(pid: int, fd: int, name: str) -> OpenFile:
    found = descriptors.attributes(pid, fd)
    return OpenFile(fd, found.device, found.inode, found.size, found.mtime_ns, name)


def _mounted_kinds(pid: int) -> dict[int, str]:
    """Return the type of each file system, by its device, that is mounted in the process's view."""
    with suppress(OSError):
        return {device_number(entry.device): entry.kind for entry in mountinfo.read(pid)}
    return {}


def _ask(path: str) -> int:
    """Start to ask the file system of a file for its state; that is never answered from a cache."""
    nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    return os.posix_spawn(
        sys.executable, [sys.executable, "-I", "-S", "-c", _ASK, path], {}, file_actions=nowhere
    )


def _answer(child: int, end: float) -> int | None:
    """Return the error number that was the answer, or None if there is none by the time `end`."""
    pidfd = os.pidfd_open(child)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if poller.poll(max(end - time.monotonic(), 0) * 1000):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return None
    finally:
        os.close(pidfd)
