"""Finds the processes that have files of a mount open, as far as /proc shows them.

The file system itself is never asked, so a daemon that hangs does not stop this.

Source: proc(5), maps.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from lazyfs.core.escaping import one_line
from lazyfs.host import descriptors, mountinfo


@dataclass(frozen=True, slots=True, order=True)
class Reader:
    """Describes a process that has a file open or mapped."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{one_line(self.command)} (pid {self.pid})"


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


def users(device: str) -> list[Reader]:
    """Return the processes that keep a file system from being unmounted, by their pids.

    They have something of it open or mapped, or are in one of its folders. Only root sees the
    processes of other users.
    """
    found = []
    for pid in _processes():
        used = [*_open(pid, device), *_mapped(pid, device)]
        if used or device in _folders(pid):
            found.append(Reader(pid, _command(pid)))
    return found


def _folders(pid: int) -> set[str]:
    """Return the devices of the current and the root folder of a process."""
    found = set()
    for name in ("cwd", "root"):
        with suppress(OSError):
            at = descriptors.device_of(f"/proc/{pid}/{name}")
            found.add(f"{os.major(at)}:{os.minor(at)}")
    return found


def other_mounts(device: str, mountpoint: str) -> list[str]:
    """Return where a file system is mounted besides its mountpoint, for a message.

    These are bind mounts, and mounts in the mount namespaces of other processes, without those that
    go along when `mountpoint` is unmounted.

    Args:
        device: "major:minor" of the file system.
        mountpoint: where its daemon has mounted it.
    """
    table = mountinfo.read()
    found = {
        entry.mountpoint
        for entry in table
        if entry.device == device and entry.mountpoint != mountpoint
    }
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in _processes():
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            other = mountinfo.read(pid)
            seen.add(namespace)
            for entry in other:
                if entry.device == device and not mountinfo.goes_along(
                    table, mountpoint, other, entry
                ):
                    reader = Reader(pid, _command(pid))
                    found.add(f"{entry.mountpoint} in the mount namespace of {reader}")
    return sorted(found)


def holders_without_process(mountpoint: str) -> list[str]:
    """Return what in the kernel uses files below `mountpoint`, for a message.

    These are loop devices, swap files and overlay file systems. No process has such a file open.

    Source: sysfs-block-loop (Documentation/ABI), proc(5) swaps.
    """
    inside = mountpoint.rstrip("/") + "/"
    found = []
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else []:
        with suppress(OSError):
            path = f"/sys/block/{name}/loop/backing_file"
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                backing = file.read().rstrip("\n")
            if backing.startswith(inside):
                found.append(f"the loop device /dev/{name} ({backing})")
    with suppress(OSError), open("/proc/swaps", "rb") as file:
        used = [line.split(b" ")[0] for line in file.read().split(b"\n")]
        paths = [os.fsdecode(path) for path in used]
        found += [f"the swap file {path}" for path in paths if path.startswith(inside)]
    for entry in mountinfo.read():
        layers = [place for place in entry.layers if f"{place}/".startswith(inside)]
        if layers:
            found.append(f"the overlay file system on {entry.mountpoint}")
    return found


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
    place = f"{major:02x}:{minor:02x}".encode()
    with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        # As bytes, because a name may contain what ends a line of text.
        for line in file.read().split(b"\n"):
            # 7f...-7f... r--p 00000000 00:3c 17    /mnt/debian-12
            fields = line.split(b" ", 5)
            if len(fields) > 4 and fields[3] == place and fields[4].isdigit():
                yield int(fields[4])


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"
