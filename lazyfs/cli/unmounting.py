"""The verbs that take a mount down: umount, and detach while files are open."""

import errno
import os
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lazyfs import errors
from lazyfs.cli import waiting
from lazyfs.control import client as control_client
from lazyfs.host import mounts, open_files, process_files

NOTICE_S = 2.0
"""The daemon's last checkpoint takes milliseconds, but seconds if much was fetched just now and the disk is slow: then
say what is waited for."""

CLOSING_S = 1.0
"""How long a file may count as open that no process has open any more. A RELEASE takes milliseconds."""

LINGER_S = 3.0
"""After a detach with nothing open: the daemon ends at once, if nothing else holds the mount."""


def _mounted_at(path: str) -> mounts.Mount:
    for resolve in (os.path.abspath, os.path.realpath):  # the latter asks a daemon, which may hang
        mountpoint = resolve(path)
        mount = mounts.mount_of(mountpoint)
        if mount is not None and mount.mountpoint == mountpoint:
            return mount
    for gone in control_client.query_detached():
        if gone["mountpoint"] == os.path.realpath(path):
            raise errors.UserError(
                f"{path} is detached already; pid {gone['pid']} ends with its last open file"
            )
    raise errors.UserError(f"no lazyfs is mounted on {path}")


# -- umount


def umount(path: str) -> None:
    """Unmount, and wait until the daemon has saved everything and ended.

    Raises:
        UserError: nothing is mounted there, or it is in use.
    """
    from lazyfs.kernel import session as kernel_session

    mount = _mounted_at(path)
    _refuse_if_hung(mount)
    dead = not control_client.alive(mount)  # and has nothing to save
    pidfd = _daemon(mount)
    try:
        if dead:
            kernel_session.clear_away(mount)
        else:
            kernel_session.unmount(mount.mountpoint, lazy=False)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise errors.UserError(
                f"{mount.mountpoint} is in use; close what is open there (see fuser -vm), or lazyfs detach it"
            ) from error
        if error.errno != errno.EINVAL:  # else somebody was faster
            raise errors.UserError(
                f"cannot unmount {mount.mountpoint}: {error.strerror}"
            ) from error
    if pidfd is None:
        with suppress(OSError):  # what the dead daemon could not clear away itself
            os.unlink(mounts.socket_path(mount.mountpoint))
        return
    if not _ends(pidfd, NOTICE_S):
        print("lazyfs: saving what was fetched ...", file=sys.stderr)
        _ends(pidfd, None)
    os.close(pidfd)


def _refuse_if_hung(mount: mounts.Mount) -> None:
    """Raise UserError if the daemon is there and does not answer: unmounting would wait for it, for ever."""
    try:
        control_client.execute(mount, [("query-version", {})])
    except control_client.Hangs as error:
        raise errors.UserError(f"{error}; end it with kill -9, then unmount again") from None
    except errors.UserError:
        return  # dead, or about to end


def _daemon(mount: mounts.Mount) -> int | None:
    """Return a pidfd of who listens on the control socket; that takes no answer from it."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(mounts.socket_path(mount.mountpoint))
            return os.pidfd_open(process_files.peer_of(client))
        except (OSError, ValueError):
            return None


def _ends(pidfd: int, limit_s: float | None) -> bool:
    """Wait for a process to end; False if it has not in the time allowed."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if limit_s is None else limit_s * 1000))


# -- detach


def detach(path: str, wait: bool) -> str:
    """Unmount although files are open; return what to tell the user.

    With `wait`, first wait until every open image is whole.

    Raises:
        UserError: nothing is mounted there, or an open image is not whole; names its readers.
    """
    mount = _mounted_at(path)
    pidfd = _daemon(mount)
    while True:
        if wait:
            waiting.until_whole(lambda: _filling(mount))
        else:
            _refuse_if_filling(mount)
        try:
            status, detached = control_client.execute(mount, [("query-mount", {}), ("detach", {})])
            break
        except control_client.Refused:
            if not _filling(mount):
                raise  # for another reason than an image that was opened just now
    told = f"{mount.mountpoint} is detached: new opens get the plain files."
    if status["cache_dir"] != mount.mountpoint:
        told = (
            f"{mount.mountpoint} is detached. Its plain files lie in {status['cache_dir']}: "
            f"mount --bind {status['cache_dir']} {mount.mountpoint} gives them their paths back."
        )
    if others := open_files.other_mounts(mount.device):
        told += f" It is still mounted on {', '.join(others)}: unmount that, too."
    if detached["open_count"]:
        return f"{told} {detached['open_count']} open file(s) are served by pid {status['pid']} until they are closed."
    if pidfd is None or _ends(pidfd, LINGER_S):
        return told
    return (
        f"{told} No file is open, but something holds the mount (a mapping, or a working directory): "
        f"pid {status['pid']} ends with that."
    )


def _filling(mount: mounts.Mount) -> list[dict[str, Any]]:
    """Return the images that are open and not whole."""
    return [
        i
        for i in control_client.query(mount)["images"]
        if i["open_count"] and i["state"] != "whole"
    ]


def _refuse_if_filling(mount: mounts.Mount) -> None:
    """Raise UserError if an open image is not whole.

    The kernel tells the daemon of a close a moment later: an image that nobody has open is given that moment.
    """
    deadline = time.monotonic() + CLOSING_S
    while images := _filling(mount):
        readers = open_files.readers(mount.device, {image["inode"] for image in images})
        if readers or time.monotonic() > deadline:
            raise errors.UserError(_why_not(images, readers))
        time.sleep(0.05)


def _why_not(
    images: Sequence[dict[str, Any]], readers: Mapping[int, Sequence[open_files.Reader]]
) -> str:
    reasons = []
    for image in images:
        who = (
            ", ".join(map(str, readers.get(image["inode"], [])))
            or "a process that cannot be seen from here"
        )
        state = "was replaced before it was whole" if image.get("replaced") else "is not whole"
        reasons.append(f"{image['path']} {state} and is open in {who}")
    return f"cannot detach: {'; '.join(reasons)}; use --wait, or close it"
