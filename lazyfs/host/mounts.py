"""Where lazyfs is mounted on this host, and where each mount's control socket is.

Sources: systemd.unit(5) for the escaping of paths, unix(7) for the length of a socket's path.
"""

import hashlib
import os
import re
from dataclasses import dataclass

from lazyfs.host import mountinfo

FS_TYPE = "fuse.lazyfs"

_DETACHED = "detached~"
"""A tilde: no escaped mountpoint begins so."""

_SUN_PATH_MAX = 107  # sizeof sun_path less the NUL


@dataclass(frozen=True, slots=True)
class Mount:
    """A lazyfs mount."""

    mountpoint: str
    repository: str
    device: str
    """"major:minor", as sysfs names the connection and the backing device."""


def lazyfs_mounts() -> list[Mount]:
    """Return all lazyfs mounts of this mount namespace, in the order they were made."""
    return [
        Mount(entry.mountpoint, entry.source, entry.device)
        for entry in mountinfo.read()
        if entry.kind == FS_TYPE
    ]


def devices_at(mountpoint: str) -> list[str]:
    """Return the devices of all file systems, of any kind, that are mounted there, the topmost
    last."""
    return [entry.device for entry in mountinfo.read() if entry.mountpoint == mountpoint]


def mount_of(path: str) -> Mount | None:
    """Return the lazyfs mount that `path` lies on. Looks at mountpoints only, so a dead mount
    cannot block it."""
    absolute = os.path.abspath(path)
    best = None
    for mount in lazyfs_mounts():
        inside = absolute == mount.mountpoint or absolute.startswith(
            mount.mountpoint.rstrip("/") + "/"
        )
        if inside and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    return best


def runtime_dir() -> str:
    """Return the folder of control sockets: /run/lazyfs, or the user's own."""
    if os.geteuid() == 0:
        return "/run/lazyfs"
    return os.path.join(
        os.environ.get("XDG_RUNTIME_DIR") or os.path.expanduser("~/.cache"), "lazyfs"
    )


def socket_path(mountpoint: str) -> str:
    """Return the path of the control socket of the lazyfs on `mountpoint`.

    The mountpoint is escaped as systemd does; if that is too long for a socket, its end is replaced
    by a hash.
    """
    path = os.fsencode(os.path.normpath(mountpoint)).strip(b"/")
    name = _escape(path)
    room = _SUN_PATH_MAX - len(os.fsencode(runtime_dir())) - len("/.sock")
    if len(name) > room:
        digest = hashlib.sha256(b"/" + path).hexdigest()[:16]
        name = f"{name[: room - len(digest) - 1]}~{digest}"
    return f"{runtime_dir()}/{name}.sock"


def detached_socket_path(pid: int) -> str:
    """Return the path of the control socket of a daemon that is detached from its mountpoint."""
    return f"{runtime_dir()}/{_DETACHED}{pid}.sock"


def control_sockets(detached_only: bool = False) -> list[str]:
    """Return the paths of all control sockets of this user; a killed daemon's may be among them."""
    try:
        names = sorted(os.listdir(runtime_dir()))
    except FileNotFoundError:
        return []
    names = [
        name
        for name in names
        if name.endswith(".sock") and (not detached_only or name.startswith(_DETACHED))
    ]
    return [f"{runtime_dir()}/{name}" for name in names]


def _escape(path: bytes) -> str:
    """As `systemd-escape --path`."""
    escaped = re.sub(rb"^\.|[^A-Za-z0-9:_./]", lambda m: b"\\x%02x" % m[0][0], path).replace(
        b"/", b"-"
    )
    return escaped.decode() or "-"
