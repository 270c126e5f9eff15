"""Finds what another process has open, and where a path leads for it.

The file system of an open file is not asked (see `descriptors`), so a FUSE daemon that hangs or was
killed stops nobody here. Looking up a path does ask the file system.

Only a FUSE file system itself can tell whether its daemon has died, and a process that asks one
that hangs may be stuck so that not even SIGKILL ends it. So child processes ask. A child that does
not answer in time is left behind.

A path is looked up below /proc/PID/root, which is in the mount namespace of the process. But an
absolute symbolic link on the way leads to a place in our own mount namespace.

Source: proc(5).
"""

import asyncio
import errno
import json
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
"""How long file systems have to say whether they are dead. The kernel answers at once for a dead
one. The value is unmeasured."""

END_S = 1.0
"""How long a child that was killed has to end."""

_left_behind: list[asyncio.subprocess.Process] = []
"""Children that did not end. They are kept, because asyncio complains about those that are not."""

LOOK_S = 5.0
"""How long paths have to be looked up. It is unmeasured: a local file system needs microseconds."""

_ASK = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError as error:
    sys.exit(error.errno)
"""
"""The program of a child that asks a file system. Its exit code is the error number."""


def open_files(pid: int) -> list[OpenFile]:
    """Return the files that the process has open.

    Process 0 stands for one in another pid namespace. Its files cannot be seen, so there are none.

    Raises:
        UserError: the process has ended, or belongs to another user.
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
    """Return the devices that belong to a lazyfs whose daemon has died. This takes up to ASK_S.

    A device is asked only if it can be one of those: if it is not known to be alive, and either has
    the type of lazyfs or is no longer mounted in the view of the process.

    Args:
        pid: the process.
        opened: files that the process has open.
        alive: the devices that are known to have a daemon.
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
    """Return the type of the file system on which the process has opened this file.

    The type is looked up by the number of the mount, because on btrfs and overlayfs the device of a
    file is not always the device of the mount.

    Returns:
        None if the file system is not mounted in the view of the process.
    """
    with suppress(OSError, ValueError):
        number = descriptors.mount_id(pid, fd)
        return next((one.kind for one in mountinfo.read(pid) if one.mount_id == number), None)
    return None


def _seen_by(path: str, pid: int | None) -> str:
    """Return what leads us to where `path` leads the process `pid`."""
    if pid is None:
        return path
    return f"/proc/{pid}/root{path}" if path.startswith("/") else f"/proc/{pid}/cwd/{path}"


def place_of(path: str, pid: int | None = None) -> Place:
    """Return where `path` leads for process `pid`, or for us if it is None.

    A relative path begins at the current folder of the process.

    Raises:
        OSError: the path leads nowhere.
    """
    found = os.stat(_seen_by(path, pid))
    return Place(
        found.st_dev,
        found.st_ino,
        found.st_size,
        frozenset({found.st_mtime_ns, found.st_ctime_ns}),
        stat.S_ISREG(found.st_mode),
    )


_LOOK = """
import errno, json, os, stat, sys
for path in json.load(sys.stdin):
    try:
        s = os.stat(os.fsencode(path))
        found = [s.st_dev, s.st_ino, s.st_size, [s.st_mtime_ns, s.st_ctime_ns],
                 stat.S_ISREG(s.st_mode)]
    except OSError as error:
        found = error.errno
    except ValueError:  # a zero byte
        found = errno.EINVAL
    print(json.dumps(found), flush=True)
"""
"""The program of a child that looks paths up, one line for each."""


async def places_of(paths: Sequence[str], pid: int | None = None) -> list[Place | OSError]:
    """Return where paths lead, as `place_of` does, or the error for each that leads nowhere.

    A child looks them up. If a file system hangs, that child is left behind after LOOK_S, and the
    error for its path and those after it is ETIMEDOUT.
    """
    if not paths:
        return []
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _LOOK,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    found: list[Place | OSError] = []
    answered = False
    with suppress(TimeoutError, ValueError, ConnectionError):
        async with asyncio.timeout(LOOK_S):
            child.stdin.write(json.dumps([_seen_by(path, pid) for path in paths]).encode())
            child.stdin.close()
            for path in paths:
                answer = json.loads(await child.stdout.readline())
                if isinstance(answer, int):
                    found.append(OSError(answer, os.strerror(answer), path))
                else:
                    device, inode, size, times_ns, regular = answer
                    found.append(Place(device, inode, size, frozenset(times_ns), regular))
        answered = True
    # A child that has answered ends by itself. To kill one that has just ended makes asyncio print
    # that it does not know it: the call looks for its end first, and asyncio misses that then.
    if not answered:
        with suppress(ProcessLookupError):
            child.kill()
    try:
        async with asyncio.timeout(END_S):
            await child.wait()
            with suppress(ConnectionError):  # it was killed before it has read all
                await child.stdin.wait_closed()
    except TimeoutError:
        _left_behind.append(child)  # it hangs in the kernel, and ends when that lets it go
    late = [OSError(errno.ETIMEDOUT, "its file system does not answer", p) for p in paths]
    return found + late[len(found) :]


def command_line(pid: int) -> list[str]:
    """Return the words of the process's command line, or none if they cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().split("\0")
    except OSError:
        return []


def device_number(device: str) -> int:
    """Return the number that stat(2) has as st_dev for "major:minor"."""
    major, minor = map(int, device.split(":"))
    return os.makedev(major, minor)


def has_ended(pid: int) -> bool:
    """Return whether the process has ended. It may still be a zombie that nobody has reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _open_file(pid: int, fd: int, name: str) -> OpenFile:
    found = descriptors.attributes(pid, fd)
    return OpenFile(fd, found.device, found.inode, found.size, found.times_ns, name)


def _mounted_kinds(pid: int) -> dict[int, str]:
    """Return the types of the file systems that the process sees mounted, by their devices."""
    with suppress(OSError):
        return {device_number(entry.device): entry.kind for entry in mountinfo.read(pid)}
    return {}


def _ask(path: str) -> int:
    """Start a child that asks the file system of a file for its state, and return the child.

    statvfs is never answered from a cache.
    """
    nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    return os.posix_spawn(
        sys.executable, [sys.executable, "-I", "-S", "-c", _ASK, path], {}, file_actions=nowhere
    )


def _answer(child: int, end: float) -> int | None:
    """Return the error number that a child of `_ask` was given.

    Returns:
        0 if the file system is alive, and None if there is no answer by the time `end`.
    """
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
