"""The verbs that remove a mount: umount, and detach, which works while files are open."""

import argparse
import errno
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lazyfs import errors
from lazyfs.cli import printing, waiting
from lazyfs.control import client as control_client
from lazyfs.host import mounts, open_files, peer

NOTICE_S = 2.0
"""How long the daemon may take to end before the user is told what is waited for. The daemon's last
checkpoint takes milliseconds, but seconds if much was fetched just now and the disk is slow."""

CLOSING_S = 1.0
"""How long a file may still count as open after no process has it open. A RELEASE takes
milliseconds."""

LINGER_S = 3.0
"""How long to wait for the daemon's end after a detach with no open file. The daemon ends at once
if nothing else holds the mount."""


def _mounted_at(path: str) -> mounts.Mount:
    # realpath asks the daemon, which may hang, so it comes second.
    for resolve in (os.path.abspath, os.path.realpath):
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


def umount(options: argparse.Namespace) -> int:
    """Unmount, and wait until the daemon has saved everything and ended.

    Raises:
        UserError: no lazyfs is mounted at the mountpoint, or the mount is in use.
    """
    mount = _mounted_at(options.mountpoint)
    if mounts.served(mount).mountpoint != mount.mountpoint:
        _unmount(mount, lazy=options.lazy)  # a bind mount, which is not the daemon's
        return 0
    if mount.foreign:  # its daemon takes no questions, and root may unmount it all the same
        _unmount(mount, lazy=options.lazy)
        return 0
    _refuse_if_hung(mount)
    if not control_client.alive(mount):  # Then there is nothing to save.
        _unmount(mount, lazy=False, dead=True)
        with suppress(OSError):  # A daemon that was killed could not remove its socket.
            os.unlink(mounts.socket_path(mount.mountpoint))
        return 0
    if options.lazy:
        printing.say(_detached(mount, force=True))
        return 0
    # The kernel tells nobody that a file system is unmounted while it is still mounted elsewhere.
    if others := open_files.other_mounts(mount.device, mount.mountpoint):
        raise errors.UserError(
            f"{mount.mountpoint} is also mounted on {', '.join(others)}; "
            "unmount that first, or use --lazy"
        )
    pidfd = _daemon(mount)
    _unmount(mount, lazy=False)
    if pidfd is None:
        return 0
    if not _ends(pidfd, NOTICE_S):
        printing.complain("saving what was fetched ...")
        _ends(pidfd, None)
    os.close(pidfd)
    return 0


def _unmount(mount: mounts.Mount, lazy: bool, dead: bool = False) -> None:
    """Unmount, without waiting for the daemon.

    Raises:
        UserError: it is in use, or this user may not.
    """
    from lazyfs.kernel import session as kernel_session

    try:
        if dead:
            kernel_session.clear_away(mount)
        else:
            kernel_session.unmount(mount.mountpoint, lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            users = [
                *map(str, open_files.users(mount.device)),
                *open_files.holders_without_process(mount.mountpoint),
            ]
            by = f" by {', '.join(users)}" if users else ""
            raise errors.UserError(
                f"{mount.mountpoint} is in use{by}; close what is open there, or lazyfs detach it"
            ) from error
        if error.errno != errno.EINVAL or mount.device in mounts.devices_at(mount.mountpoint):
            raise errors.UserError(
                f"cannot unmount {mount.mountpoint}: {error.strerror}"
            ) from error
        # Another process has unmounted it meanwhile.


def _refuse_if_hung(mount: mounts.Mount) -> None:
    """Raise UserError if the daemon exists but does not answer.

    Unmounting would wait for such a daemon for ever.
    """
    try:
        control_client.execute(mount, [("query-version", {})])
    except control_client.Hangs as error:
        raise errors.UserError(f"{error}; end it with kill -9, then unmount again") from None
    except errors.UserError:
        return  # The daemon has ended, or is about to.


def _daemon(mount: mounts.Mount) -> int | None:
    """Return a pidfd of the process that listens on the control socket, or None.

    This works without an answer from that process.
    """
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(mounts.socket_path(mount.mountpoint))
            return os.pidfd_open(peer.of(client).pid)
        except (OSError, ValueError):
            return None


def _ends(pidfd: int, limit_s: float | None) -> bool:
    """Wait for a process to end; return whether it has ended within the limit."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if limit_s is None else limit_s * 1000))


# -- detach


def detach(options: argparse.Namespace) -> int:
    """Unmount although files are open.

    With --wait, first wait until every open image is whole.

    Raises:
        UserError: no lazyfs is mounted at the mountpoint, or an open image is not whole. Then the
            message names the image's readers.
    """
    printing.say(_detach(options.mountpoint, options.wait))
    return 0


def _detach(path: str, wait: bool) -> str:
    """Detach, and return what to tell the user.

    Raises:
        UserError: no lazyfs is mounted at `path`, or an open image is not whole. Then the message
            names the image's readers.
    """
    mount = _mounted_at(path)
    while True:
        if wait:
            waiting.until_whole(lambda: [_filling(mount)])
        else:
            _refuse_if_filling(mount)
        try:
            return _detached(mount, force=False)
        except control_client.Refused:
            if not _filling(mount)["images"]:
                raise  # The daemon refused for another reason than an image that was just opened.


def _detached(mount: mounts.Mount, force: bool) -> str:
    """Let the daemon unmount lazily, and return what to tell the user.

    Args:
        mount: the mount.
        force: detach even if images are open that are not whole.

    Raises:
        Refused: an open image is not whole, and `force` is not set.
    """
    pidfd = _daemon(mount)
    arguments = {"force": True} if force else {}
    status, detached = control_client.execute(mount, [("query-mount", {}), ("detach", arguments)])
    told = f"{mount.mountpoint} is detached: new opens get the plain files."
    if status["cache_dir"] != mount.mountpoint:
        told = (
            f"{mount.mountpoint} is detached. Its plain files lie in {status['cache_dir']}: "
            f"mount --bind {status['cache_dir']} {mount.mountpoint} gives them their paths back."
        )
    if others := open_files.other_mounts(mount.device, mount.mountpoint):
        told += f" It is still mounted on {', '.join(others)}: unmount that, too."
    if detached["open_count"]:
        return (
            f"{told} {detached['open_count']} open file(s) are served by pid {status['pid']} "
            "until they are closed."
        )
    if pidfd is None or others or _ends(pidfd, LINGER_S):
        return told
    holders = open_files.holders_without_process(mount.mountpoint)
    what = ", ".join(holders) or "a mapping, or a working directory"
    return (
        f"{told} No file is open, but something holds the mount ({what}): "
        f"pid {status['pid']} ends with that."
    )


def _filling(mount: mounts.Mount) -> dict[str, Any]:
    """Return the daemon's answer, with the images only that are open and not whole."""
    answer = control_client.query(mount)
    images = [i for i in answer["images"] if i["open_count"] and i["state"] != "whole"]
    return {**answer, "images": images}


def _refuse_if_filling(mount: mounts.Mount) -> None:
    """Raise UserError if an open image is not whole.

    The kernel tells the daemon a moment later that a file was closed. So an image that no process
    has open gets CLOSING_S before it counts.
    """
    deadline = time.monotonic() + CLOSING_S
    while images := _filling(mount)["images"]:
        readers = open_files.readers(mount.device, {image["inode"] for image in images})
        if readers or time.monotonic() > deadline:
            holders = open_files.holders_without_process(mount.mountpoint)
            raise errors.UserError(_why_not(images, readers, holders))
        time.sleep(0.05)


def _why_not(
    images: Sequence[dict[str, Any]],
    readers: Mapping[int, Sequence[open_files.Reader]],
    holders: Sequence[str],
) -> str:
    reasons = []
    for image in images:
        kernel = [one for one in holders if f"({image['path']})" in one]
        who = (
            ", ".join([*map(str, readers.get(image["inode"], [])), *kernel])
            or ", ".join(holders)
            or "a process that cannot be seen from here"
        )
        state = "was replaced before it was whole" if image.get("replaced") else "is not whole"
        reasons.append(f"{image['path']} {state} and is open in {who}")
    return f"cannot detach: {'; '.join(reasons)}; use --wait, or close it"
