"""Who has files of a mount open, as far as /proc shows it. Source: proc(5), maps.

Nothing here asks the file system itself: a daemon that hangs does not stop it.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from lazyfs.host import descriptors, mountinfo


@dataclass(frozen=True, slots=True, order=True)
class Reader:
    """A process that has a file open or mapped."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def readers(device: str, inodes: set[int]) -> dict[int, list[Reader]]:
    """Return, for each inode of the file system "major:minor", the processes that use it, by pid.

    Only root sees other users' processes.
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
    """Return where else the file system is mounted: bind mounts, and those of other mount
    namespaces."""
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
    """Return all processes but this one, which may have inherited a file from its shell."""
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
    """Return the mounts of the file system in the namespace of `pid`."""
    return {entry.mount_id for entry in mountinfo.read(pid) if entry.device == device}


def _mapped(pid: int, device: str) -> Iterator[int]:
    """Yield the inodes mapped in `pid`: a mapping outlives its descriptor."""
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
