"""Asks daemons over their control sockets. All verbs that need a daemon are made of this."""

import asyncio
import errno
import logging
import os
import pwd
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lazyfs import errors
from lazyfs.host import mounts, peer, process_files
from lazyfs.units import GiB

MAX_ANSWER = 1 * GiB
"""The longest accepted answer in bytes. An answer has about 500 bytes for each image. The library's
default of 10 MiB is enough for 20,000 images only."""

TIMEOUT_S = 10.0
"""The deadline for the greeting and for each answer to a query. A daemon needs milliseconds for
both, so one that takes longer hangs. Other commands have no deadline: removing a hundred large
files takes its time."""

_KILLED = "it was killed; mount again"

Command = tuple[str, dict[str, Any]]


class Refused(errors.UserError):
    """The daemon answered a command with an error."""


class Hangs(errors.UserError):
    """The daemon exists, but did not answer in time."""


def locate(path: str) -> tuple[mounts.Mount, str]:
    """Return the mount on which `path` lies, and the path relative to its mountpoint.

    A bind mount of a lazyfs stands for the mount itself. The relative path of the mountpoint
    is "".

    Raises:
        UserError: the path lies on no lazyfs mount.
    """
    # To resolve symbolic links asks the daemon about the file, which may wait for the repository.
    for resolve in (os.path.abspath, os.path.realpath):
        absolute = resolve(path)
        mount = mounts.mount_of(absolute)
        if mount is not None:
            below = os.path.relpath(absolute, mount.mountpoint)
            inside = os.path.normpath(os.path.join(mount.root, below)).lstrip("/")
            return mounts.served(mount), "" if inside == "." else inside
    raise errors.UserError(f"{path} is not on a lazyfs mount; lazyfs status shows them all")


def query(mount: mounts.Mount, path: str = "") -> dict[str, Any]:
    """Return the answer to `query-mount`, with the images and their jobs added.

    Args:
        mount: whose daemon is asked.
        path: an image or folder, relative to the mountpoint. `images` has only the images there,
            and `jobs` only their jobs.

    Raises:
        UserError: the daemon does not answer, or there is nothing at `path`.
    """
    return _together(execute(mount, _questions(path)), path)


def _questions(path: str = "") -> list[Command]:
    return [
        ("query-mount", {}),
        ("query-images", {"path": path} if path else {}),
        ("query-jobs", {}),
    ]


def _together(answers: list[Any], path: str = "") -> dict[str, Any]:
    status, images, jobs = answers
    if path:
        shown = {
            image["path"].removeprefix(f"{status['mountpoint'].rstrip('/')}/") for image in images
        }
        jobs = [job for job in jobs if job["id"] in shown or job["id"].partition(":")[2] in shown]
    return {**status, "images": images, "jobs": jobs}


def query_detached() -> list[dict[str, Any]]:
    """Return what `query` returns, for each daemon that is detached from its mountpoint.

    Such a daemon still serves files that are open.
    """
    found = []
    for path in mounts.control_sockets(detached_only=True):
        try:
            answers = asyncio.run(ask(path, _questions()))
        except ConnectionRefusedError:
            with suppress(OSError):
                os.unlink(path)  # A killed daemon does not remove its socket.
        except (errors.UserError, OSError) as error:
            logging.getLogger(__name__).debug("no answer: socket=%s reason=%s", path, error)
        else:
            found.append(_together(answers))
    return found


def execute(mount: mounts.Mount, commands: Sequence[Command]) -> list[Any]:
    """Run commands, one after the other, and return their results.

    Raises:
        Refused: the daemon answered a command with an error. Later commands were not run.
        Hangs: the daemon exists, but does not answer.
        UserError: the daemon cannot be reached, or belongs to another user.
    """
    if mount.foreign:
        raise errors.UserError(
            f"{mount.mountpoint} was mounted by {_name(mount.user_id)}, and only that user may ask "
            "its daemon"
        )
    try:
        return asyncio.run(ask(mounts.socket_path(mount.mountpoint), commands))
    except Refused as error:
        raise Refused(f"{mount.mountpoint}: {error}") from error
    except TimeoutError:
        if _has_ended(mount):
            raise errors.UserError(
                f"the daemon of {mount.mountpoint} does not answer: {_KILLED}"
            ) from None
        raise Hangs(
            f"the daemon of {mount.mountpoint} does not answer in {TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        if mount.device not in mounts.devices_at(mount.mountpoint):
            raise errors.UserError(f"{mount.mountpoint} was unmounted") from error
        if not alive(mount):
            reason = _KILLED
        elif isinstance(error, ConnectionError):
            reason = "its control socket has as many clients as it takes (64), or refuses them"
        else:
            reason = "its control socket cannot be reached"
        raise errors.UserError(
            f"the daemon of {mount.mountpoint} does not answer: {reason}"
        ) from error


def _name(user_id: int) -> str:
    try:
        return f"{pwd.getpwuid(user_id).pw_name} (uid {user_id})"
    except KeyError:
        return f"uid {user_id}"


def alive(mount: mounts.Mount) -> bool:
    """Return whether the mount has a keeper.

    If neither the keeper nor its control socket can be found, the mount is asked, and that may
    hang.
    """
    if (ended := _has_ended(mount)) is not None:
        return not ended
    try:
        os.statvfs(mount.mountpoint)
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def _has_ended(mount: mounts.Mount) -> bool | None:
    """Return whether the keeper has ended, or None if that is not known.

    A thread of it that hangs in the kernel may still keep its files, and so the mount, open.
    """
    with socket.socket(socket.AF_UNIX) as client:
        # A daemon that hangs may have as many clients as it takes. Then connect() waits.
        client.settimeout(TIMEOUT_S)
        try:
            client.connect(mounts.socket_path(mount.mountpoint))
        except OSError:
            return None
        pid = peer.of(client).pid
        return process_files.has_ended(pid) if pid else None


async def ask(path: str, commands: Sequence[Command]) -> list[Any]:
    """Run commands on a control socket with the qemu.qmp library, and return their results.

    Raises:
        Refused: the daemon answered a command with an error. Later commands were not run.
        TimeoutError: the daemon does not answer in time.
        OSError: the daemon cannot be reached, or hung up.
    """
    from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("lazyfs", readbuflen=MAX_ANSWER)
    client.events.names = {"none"}  # otherwise it keeps every event, and nobody reads them
    try:
        async with asyncio.timeout(TIMEOUT_S) as limit:
            await client.connect(path)
            try:
                answers = []
                for name, arguments in commands:
                    quick = name.startswith("query-")
                    limit.reschedule(
                        asyncio.get_running_loop().time() + TIMEOUT_S if quick else None
                    )
                    answers.append(await client.execute(name, arguments))
                return answers
            finally:
                # disconnect() raises an error if the daemon was the first to hang up. It is after
                # a detach that leaves it nothing to serve.
                with suppress(QMPError, EOFError, OSError):
                    await client.disconnect()
    except ExecuteError as error:
        raise Refused(str(error)) from error
    except ConnectError as error:
        raise (
            error.exc if isinstance(error.exc, OSError) else ConnectionError(str(error))
        ) from error
    except QMPError as error:
        raise ConnectionError(str(error)) from error
