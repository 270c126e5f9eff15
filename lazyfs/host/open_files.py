"""Finds the processes that have files of a mount open, as far as /proc shows them.

The file system itself is never asked, so a daemon that hangs does not stop this.

Source: proc(5), maps.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from lazyfs.host import descriptors, mountinfo


@dataclass(frozen=True, slots=True, order=True)
class Reader:
    """Describes a process that has a file open or mapped."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def readers(device: str, inodes: set[int]) -> dict[int, list[Reader]]:
    """Return the processes that use files of a file system, in the order of their pids.

    Only root sees the processes of other users.

    Args:
        device: "major:minor" of the file system.
        inodes: the files that are looked for.

    Returns:
        The processes by inode. An inode that no process uses is left out.
    """
    found: defaultdict[int, list[Reader]] = defaultdict(list)
    for pid in _processes():
        used = inodes & {*_open(pid, device), *_mapped(pid, device)}
        if used:
            reader = Reader(pid, _command(pid))
            for inode in used:
                found[inode].append(reader)
    return dict(found)


def other_mounts(device: str) -> list[str]:
    """Return where the file system "major:minor" is still mounted, for a message.

    These are bind mounts, and mounts in the mount namespaces of other processes.
    """
    found = dict.fromkeys(_places(os.getpid(), device), "")
    for pid in _processes():
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
                for place in _places(pid, device):
                    found.setdefault(
                        f"{place} in the mount namespace of {Reader(pid, _command(pid))}", ""
                    )
    return sorted(found)


def _places(pid: int, device: str) -> list[str]:
    return [entry.mountpoint for entry in mountinfo.read(pid) if entry.device == device]


def _processes() -> list[int]:
    """Return all processes except this one.

    This one may have inherited an open file from its shell, which does not count.
    """
    return sorted(
        pid for name in os.listdir("/proc") if name.isdigit() and (pid := int(name)) != os.getpid()
    )


def _open(pid: int, device: str) -> Iterator[int]:
    """Yield the inodes open in `pid`."""
    with suppress(OSError):
        mounts = _mount_ids(pid, device)
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError, ValueError):
                inode = descriptors.inode_on(mounts, pid, int(fd))
                if inode is not None:
                    yield inode


def _mount_ids(pid: int, device: str) -> set[int]:
    """Return the numbers of the file system's mounts in the mount namespace of `pid`."""
    return {entry.mount_id for entry in mountinfo.read(pid) if entry.device == device}


def _mapped(pid: int, device: str) -> Iterator[int]:
    """Yield the inodes mapped in `pid`. A mapping stays when its descriptor is closed."""
    major, minor = map(int, device.split(":"))
    with (
        suppress(OSError),
        open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines,
    ):
        for line in lines:
            # 7f...-7f... r--p 00000000 00:3c 17    /mnt/debian-12
            _, _, _, found, inode, *_ = line.split()
            if found == f"{major:02x}:{minor:02x}":
                yield int(inode)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"
