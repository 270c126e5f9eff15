"""Asks daemons, over their control sockets: what every verb but `mount` is made of."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lazyfs import errors
from lazyfs.host import mounts, peer, process_files
from lazyfs.units import GiB

MAX_ANSWER = 1 * GiB
"""Bytes of the longest answer: about 500 for each image; the library's default of 10 MiB ends at
20,000 images."""

TIMEOUT_S = 10.0
"""A daemon greets and answers a question in milliseconds; one that does not in this time hangs.
Other commands may take longer: a hundred large files are not removed in a moment."""

_KILLED = "it was killed; mount again"

Command = tuple[str, dict[str, Any]]


class Refused(errors.UserError):
    """The daemon answered with an error."""


class Hangs(errors.UserError):
    """The daemon is there, and did not answer in time."""


def locate(path: str) -> tuple[mounts.Mount, str]:
    """Return the mount that `path` lies on, and the path relative to its mountpoint ("" for that
    itself).

    Raises:
        UserError: it lies on no lazyfs mount.
    """
    for absolute in (os.path.abspath(path), os.path.realpath(path)):
        mount = mounts.mount_of(absolute)
        if mount is not None:
            inside = os.path.relpath(absolute, mount.mountpoint)
            return mount, "" if inside == "." else inside
    raise errors.UserError(f"{path} is not on a lazyfs mount; lazyfs status shows them all")


def query(mount: mounts.Mount, path: str = "") -> dict[str, Any]:
    """Return what the daemon of `mount` says of itself, as `images` those at `path`, relative to
    the mountpoint, and as `jobs` theirs.

    Raises:
        UserError: it does not answer, or knows no such path.
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
    """Return the same of each daemon that was detached from its mountpoint and still serves open
    files."""
    found = []
    for path in mounts.control_sockets(detached_only=True):
        try:
            answers = asyncio.run(ask(path, _questions()))
        except ConnectionRefusedError:
            with suppress(OSError):
                os.unlink(path)  # what a killed daemon left
        except (errors.UserError, OSError) as error:
            logging.getLogger(__name__).debug("no answer: socket=%s reason=%s", path, error)
        else:
            found.append(_together(answers))
    return found


def execute(mount: mounts.Mount, commands: Sequence[Command]) -> list[Any]:
    """Run commands, one after the other, and return what they returned.

    Raises:
        UserError: the daemon does not answer; Hangs if it is there.
        Refused: it answered with an error; later commands were not run.
    """
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
        if not alive(mount):
            reason = _KILLED
        elif isinstance(error, ConnectionError):
            reason = "its control socket has as many clients as it takes (64), or refuses them"
        else:
            reason = "its control socket cannot be reached"
        raise errors.UserError(
            f"the daemon of {mount.mountpoint} does not answer: {reason}"
        ) from error


def alive(mount: mounts.Mount) -> bool:
    """Whether a daemon holds the connection, be it one that hangs (then this hangs, too)."""
    if _has_ended(mount):
        return False
    try:
        os.statvfs(mount.mountpoint)
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def _has_ended(mount: mounts.Mount) -> bool:
    """Whether the daemon has died for sure, although a thread of it that hangs in the kernel may
    keep all open."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)  # of a daemon that hangs, with all the clients it takes
        try:
            client.connect(mounts.socket_path(mount.mountpoint))
        except OSError:
            return False
        pid = peer.of(client).pid
        return pid != 0 and process_files.has_ended(pid)  # 0: in a pid namespace that we do not see


async def ask(path: str, commands: Sequence[Command]) -> list[Any]:
    """Run commands on the control socket `path` with the qemu.qmp library, as any QMP client would.

    Raises:
        Refused: the daemon answered with an error.
        OSError: it does not answer; TimeoutError if it hangs.
    """
    from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("lazyfs", readbuflen=MAX_ANSWER)
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
                # It reports a peer that was faster, as a daemon is that has nothing to serve after
                # a detach.
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
