"""Finds the mounts of lazyfs on this host, and the control socket of each.

Sources: systemd.unit(5) for the escaping of paths, unix(7) for the length of a socket's path.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lazyfs.host import mountinfo

FS_TYPE = "fuse.lazyfs"

_DETACHED = "detached~"
"""How the name of a detached daemon's socket begins. An escaped mountpoint has no tilde there."""

_SUN_PATH_MAX = 107
"""The longest path of a socket in bytes: the size of sun_path without the NUL."""


@dataclass(frozen=True, slots=True)
class Mount:
    """Describes a mount of lazyfs."""

    mountpoint: str
    repository: str
    device: str
    """"major:minor", as sysfs names the connection and the backing device."""
    root: str = "/"
    """Which folder of the file system is mounted here. It is "/" unless a folder was bound."""
    user_id: int = 0
    """Who has mounted it."""

    @property
    def foreign(self) -> bool:
        """True if another user has mounted it, so that nothing is asked of it.

        Its daemon takes no commands from here, and can leave whoever asks the mount without an
        answer for ever.
        """
        return self.user_id != os.geteuid()


def lazyfs_mounts() -> list[Mount]:
    """Return all lazyfs mounts of this mount namespace, in the order they were made."""
    return [
        Mount(entry.mountpoint, entry.source, entry.device, entry.root, entry.user_id)
        for entry in mountinfo.read()
        if entry.kind == FS_TYPE
    ]


def mountpoints_of_users() -> list[str]:
    """Return where other users than root, and than this one, have mounted FUSE file systems.

    Whoever asks such a file system may wait for ever, or be refused although it is root.
    """
    trusted = {0, os.geteuid()}
    return [
        entry.mountpoint
        for entry in mountinfo.read()
        if entry.kind.startswith("fuse") and entry.user_id not in trusted
    ]


def devices_at(mountpoint: str) -> list[str]:
    """Return the devices of all file systems that are mounted there, of any type.

    The topmost one is last.
    """
    return [entry.device for entry in mountinfo.read() if entry.mountpoint == mountpoint]


def mount_of(path: str, among: Sequence[Mount] | None = None) -> Mount | None:
    """Return the lazyfs mount on which `path` lies, or None.

    Only the names of mountpoints are compared, so a dead mount does not block this.

    Args:
        path: the path.
        among: all mounts. None means that they are to be looked up.
    """
    absolute = os.path.abspath(path)
    best = None
    for mount in lazyfs_mounts() if among is None else among:
        inside = absolute == mount.mountpoint or absolute.startswith(
            mount.mountpoint.rstrip("/") + "/"
        )
        if inside and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    return best


def served(mount: Mount, among: Sequence[Mount] | None = None) -> Mount:
    """Return the mount that the daemon has made, if `mount` is a bind mount of it.

    It is the one for which there is a control socket. If none is found, `mount` itself is returned.

    Args:
        mount: the mount.
        among: all mounts. None means that they are to be looked up.
    """
    for one in lazyfs_mounts() if among is None else among:
        same = (one.device, one.root) == (mount.device, "/")
        if same and os.path.exists(socket_path(one.mountpoint)):
            return one
    return mount


def served_mounts() -> list[Mount]:
    """Return the mounts that daemons have made, without bind mounts of them."""
    mounts = lazyfs_mounts()
    return list(dict.fromkeys(served(mount, mounts) for mount in mounts))


def runtime_dir() -> str:
    """Return the folder of control sockets: /run/lazyfs, or the user's own."""
    if os.geteuid() == 0:
        return "/run/lazyfs"
    return os.path.join(
        os.environ.get("XDG_RUNTIME_DIR") or os.path.expanduser("~/.cache"), "lazyfs"
    )


def socket_path(mountpoint: str) -> str:
    """Return the path of the control socket of the lazyfs on `mountpoint`.

    The name is the mountpoint as systemd escapes it. If that is too long for a socket, a hash
    replaces its end.
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
    """Return the paths of all control sockets of this user.

    Some may belong to daemons that were killed.
    """
    try:
        names = sorted(os.listdir(runtime_dir()))
    except OSError:  # there is none, or $HOME is another user's
        return []
    names = [
        name
        for name in names
        if name.endswith(".sock") and (not detached_only or name.startswith(_DETACHED))
    ]
    return [f"{runtime_dir()}/{name}" for name in names]


def _escape(path: bytes) -> str:
    """Escape a path as `systemd-escape --path` does."""
    escaped = re.sub(rb"^\.|[^A-Za-z0-9:_./]", lambda m: b"\\x%02x" % m[0][0], path).replace(
        b"/", b"-"
    )
    return escaped.decode() or "-"
