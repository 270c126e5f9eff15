"""`lazyfs doctor`: looks at what makes mounts fail or slow, and prints a line about each.

It changes nothing. A mount that exists is asked over its control socket only.
"""

import argparse
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lazyfs import errors
from lazyfs.cli import printing
from lazyfs.control import client as control_client
from lazyfs.host import fuse_limits, mounts
from lazyfs.units import GiB, format_size

GOOD, NOTE, BAD = "ok", "note", "bad"

FEW_FILES = 4096
"""A partial image takes five descriptors, so this is enough for 800 of them."""

LITTLE_ROOM = 1 * GiB


@dataclass(frozen=True, slots=True)
class Finding:
    """Says how one thing is."""

    what: str
    verdict: str
    text: str


def run(options: argparse.Namespace) -> int:
    """Print the findings. The exit code is 1 if one of them keeps lazyfs from working."""
    findings = list(_host())
    if options.mountpoint is not None:
        findings += _mount(options.mountpoint)
    width = max(len(one.what) for one in findings)
    for one in findings:
        printing.say(f"{one.verdict:4}  {one.what:{width}}  {one.text}")
    return 1 if any(one.verdict == BAD for one in findings) else 0


def _host() -> Iterator[Finding]:
    looks: tuple[Callable[[], Finding], ...] = (
        _fuse, _rights, _kernel, _libnbd, _pyfuse3, _passthrough, _files, _request_limit, _clock,
    )  # fmt: skip
    for look in looks:
        yield look()


def _fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = "modprobe fuse, or give the container the device"
        return Finding("/dev/fuse", BAD, f"cannot be opened: {error.strerror}; {advice}")
    return Finding("/dev/fuse", GOOD, "can be opened")


def _rights() -> Finding:
    if os.geteuid() == 0:
        return Finding("rights", GOOD, "root")
    if shutil.which("fusermount3") is None:
        return Finding("rights", BAD, "not root, and fusermount3 is missing: install fuse3")
    return Finding("rights", NOTE, "not root: nobody else can use the files, and no passthrough")


def _kernel() -> Finding:
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if (major, minor) < (5, 4):
        return Finding("kernel", BAD, f"{release}; lazyfs needs Linux 5.4")
    if (major, minor) < (6, 9):
        return Finding("kernel", NOTE, f"{release}; passthrough needs Linux 6.9")
    return Finding("kernel", GOOD, release)


def _libnbd() -> Finding:
    try:
        import nbd
    except ModuleNotFoundError:
        advice = "apt-get install python3-libnbd, for /usr/bin/python3"
        return Finding("libnbd", BAD, f"its module for {sys.executable} is missing; {advice}")
    return Finding("libnbd", GOOD, str(nbd.NBD().get_version()))


def _pyfuse3() -> Finding:
    try:
        from lazyfs.kernel import passthrough  # noqa: F401  # isort: skip  # before pyfuse3
        import pyfuse3
    except ImportError as error:
        return Finding("pyfuse3", BAD, f"cannot be loaded: {error}; pip install pyfuse3")
    return Finding("pyfuse3", GOOD, str(pyfuse3.__version__))


def _passthrough() -> Finding:
    if os.geteuid() != 0:
        return Finding("passthrough", NOTE, "needs root; whole images are read through the keeper")
    return Finding("passthrough", GOOD, "root; status says if a mount has it")


def _files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return Finding("open files", NOTE, f"at most {hard}; five for each partial image")
    return Finding("open files", GOOD, "unlimited" if hard < 0 else f"at most {hard}")


def _request_limit() -> Finding:
    limit_s = fuse_limits.request_timeout_s()
    if limit_s:
        return Finding("requests", NOTE, f"/proc/sys/fs/fuse ends them after {limit_s} s")
    return Finding("requests", GOOD, "no limit of time")


def _clock() -> Finding:
    now = time.time()
    if now < os.stat(__file__).st_mtime - 86400:
        return Finding("clock", NOTE, f"{time.ctime(now)} is before lazyfs was installed")
    return Finding("clock", GOOD, time.ctime(now))


def _mount(path: str) -> Iterator[Finding]:
    mount = mounts.mount_of(os.path.abspath(path))
    if mount is None:
        yield Finding("mount", BAD, f"no lazyfs is mounted on {path}")
        return
    try:
        status = control_client.query(mounts.served(mount))
    except errors.UserError as error:
        yield Finding("mount", BAD, str(error))
        return
    yield Finding("mount", GOOD, f"{status['mountpoint']}, pid {status['pid']}")
    reached = status["connected"]
    why = "" if reached else f": {status['message']}"
    yield Finding("repository", GOOD if reached else BAD, f"{status['repository']}{why}")
    trouble = status["passthrough_trouble"]
    yield Finding("plain reads", NOTE if trouble else GOOD, trouble or "by the kernel alone")
    room = status["room"]
    little = room["total"] and room["free"] < LITTLE_ROOM
    text = f"{format_size(room['free'])} of {format_size(room['total'])} free"
    yield Finding("disk", NOTE if little or room["message"] else GOOD, room["message"] or text)
    failed = [image["path"] for image in status["images"] if image["state"] == "failed"]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        yield Finding("images", BAD, f"{failed[0]}{more} failed; lazyfs status says why")
    else:
        yield Finding("images", GOOD, f"{len(status['images'])}, none has failed")
