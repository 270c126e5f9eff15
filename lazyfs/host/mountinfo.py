"""Reads the table of mounts of a process.

Source: proc(5), /proc/PID/mountinfo. A line has these fields:

    36 35 0:45 / /mnt rw,nosuid shared:9 master:1 - fuse.lazyfs nbd://host rw,user_id=0
    id parent device mountpoint  ...any number...   kind        source

The kernel writes a space, tab, newline, backslash or "#" in a name as a backslash and three octal
digits. It writes all other bytes as they are, also a carriage return and bytes that are not UTF-8.
So the table is read as bytes, and only a newline ends a line.
"""

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """Describes one mount."""

    mount_id: int
    """The number of the mount, which fdinfo has as `mnt_id`."""
    device: str
    """"major:minor" of the file system."""
    mountpoint: str
    """Where it is mounted, in the view of the process whose table this is."""
    kind: str
    """The type of the file system, such as "fuse.lazyfs"."""
    source: str
    """What is mounted, such as a device. A FUSE file system can give any text."""
    root: str = "/"
    """Which folder of the file system is mounted. It is not "/" for a bind mount of a folder."""
    parent_id: int = 0
    """The number of the mount in which it is mounted."""
    propagation: frozenset[str] = frozenset()
    """How it shares what is mounted in it: "shared:9", "master:1" (mount_namespaces(7))."""
    user_id: int = 0
    """Who has mounted a FUSE file system."""
    layers: tuple[str, ...] = ()
    """The lower folders of an overlay file system."""


def read(pid: int | None = None) -> list[Entry]:
    """Return the mounts that the process sees, or this process, in the order they were made.

    Raises:
        OSError: the process has ended, or belongs to another user.
    """
    with open(f"/proc/{'self' if pid is None else pid}/mountinfo", "rb") as file:
        return parse(file.read())


def goes_along(table: list[Entry], mountpoint: str, other: list[Entry], copy: Entry) -> bool:
    """Return whether the kernel unmounts a copy of a mount together with it.

    It does if the folder in which the copy is mounted gets what happens in ours. That is so for
    most services of systemd that have a mount namespace of their own.

    Args:
        table: our mounts.
        mountpoint: what is unmounted.
        other: the mounts of another process.
        copy: one of them.
    """
    if copy.mountpoint != mountpoint:
        return False
    ours = [one for one in table if one.mountpoint == mountpoint]
    parents = [one for one in table if ours and one.mount_id == ours[-1].parent_id]
    receivers = [one for one in other if one.mount_id == copy.parent_id]
    groups = {
        tag.partition(":")[2] for one in parents for tag in one.propagation if "shared:" in tag
    }
    return any(tag.partition(":")[2] in groups for one in receivers for tag in one.propagation)


def parse(table: bytes) -> list[Entry]:
    """Return the mounts in the content of a mountinfo file.

    A line that does not parse is left out, so that it does not hide the others.
    """
    entries = (_entry(line) for line in table.split(b"\n"))
    return [entry for entry in entries if entry is not None]


def _entry(line: bytes) -> Entry | None:
    before, _, after = line.partition(b" - ")
    mount, filesystem = before.split(b" "), after.split(b" ")
    if len(mount) < 6 or len(filesystem) < 2:
        return None
    mount_id, parent_id, device, root, mountpoint, _, *optional = mount
    kind, source, *options = filesystem
    if not re.fullmatch(rb"[0-9]+ [0-9]+", mount_id + b" " + parent_id) or not re.fullmatch(
        rb"[0-9]+:[0-9]+", device
    ):
        return None
    return Entry(
        int(mount_id),
        device.decode(),
        _unescape(mountpoint),
        _unescape(kind),
        _unescape(source),
        _unescape(root),
        int(parent_id),
        frozenset(map(_unescape, optional)),
        _user_id(options[-1]) if options else 0,
        _layers(options[-1]) if kind == b"overlay" and options else (),
    )


def _user_id(options: bytes) -> int:
    """Return the user of a FUSE file system among the options of its superblock, or 0."""
    found = re.search(rb"(?:^|,)user_id=([0-9]+)(?:,|$)", options)
    return int(found[1]) if found else 0


def _layers(options: bytes) -> tuple[str, ...]:
    """Return the lower folders among the options of an overlay file system.

    An option is "lowerdir=A:B", or since Linux 6.5 also "lowerdir+=A". (A comma or colon in a name
    is written with a backslash. Such a name is not found here.)
    """
    found: list[str] = []
    for option in options.split(b","):
        key, _, value = option.partition(b"=")
        if key.startswith(b"lowerdir"):
            found += map(_unescape, filter(None, value.split(b":")))
    return tuple(found)


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), field))
