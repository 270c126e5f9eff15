"""What the `lazyfs` command takes: verbs, options, and what is wrong with them."""

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

from lazyfs import __version__, errors
from lazyfs.core import shown_file
from lazyfs.core.qcow2_layout import MIN_CLUSTER_SIZE
from lazyfs.units import KiB, MiB, parse_size

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

Verb = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise errors.UsageError(f"{message} (see {self.prog} --help)")


def parser(mount: Verb, status: Verb, pivot: Verb, detach: Verb, umount: Verb) -> argparse.ArgumentParser:
    """Return the parser of the whole command; `run` of its result is the function of the chosen verb."""
    top = _Parser(prog="lazyfs", description="Shows every image of an NBD repository as a local file.")
    top.add_argument("--version", action="version", version=f"lazyfs {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    _add_mount(verbs, mount)
    _add_status(verbs, status)
    _add_pivot(verbs, pivot)
    _add_detach(verbs, detach)
    _add_umount(verbs, umount)
    return top


def _add_mount(verbs: Any, run: Verb) -> None:
    mount = verbs.add_parser(
        "mount",
        help="mount a repository",
        description="Mount a repository: every export becomes a read-only file, fetched when read, and kept.",
        epilog="example: lazyfs mount nbd://images.example.com /var/lib/imagecache",
    )
    mount.set_defaults(run=run)
    mount.add_argument("repository", metavar="REPOSITORY", type=_uri, help="NBD URI without an export name")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder; also the cache by default")
    mount.add_argument("--cache-dir", metavar="DIR", help="keep the cache in this folder, made if its parent exists")
    mount.add_argument("--format", choices=shown_file.FORMATS, default=shown_file.RAW,
                       help="of images new to this cache: raw (default), or qcow2, shown as NAME.qcow2")  # fmt: skip
    mount.add_argument("--block-size", metavar="SIZE", type=_block_size,
                       help="unit of fetching of raw images, a power of two from 4K to 4M (default: 64K)")  # fmt: skip
    mount.add_argument("--cluster-size", metavar="SIZE", type=_cluster_size,
                       help="of qcow2 images, a power of two from 4K to 2M (default: 64K)")  # fmt: skip
    mount.add_argument("--no-populate", action="store_true", help="fetch only what is read")
    mount.add_argument("--fill-rate", metavar="BYTES/s", type=_rate, help="limit population, such as 50M or 1GiB")
    mount.add_argument("--io-timeout", metavar="SECONDS", type=_seconds, default=120.0,
                       help="how long a read waits for the repository before it fails (default: 120)")  # fmt: skip
    mount.add_argument("--refresh", metavar="SECONDS", type=_seconds, default=60.0,
                       help="how often the repository is asked for its list (default: 60)")  # fmt: skip
    mount.add_argument("--on-change", choices=["keep", "replace"], default="keep",
                       help="when an export changes, keep the cached version (default) or replace it")  # fmt: skip
    mount.add_argument(
        "--mode", metavar="OCTAL", type=_mode, default=0o444, help="of files, write bits dropped (default: 0444)"
    )
    mount.add_argument("--uid", metavar="N", type=_id, default=os.geteuid(), help="owner of files")
    mount.add_argument("--gid", metavar="N", type=_id, default=os.getegid(), help="group of files")
    mount.add_argument("--no-passthrough", action="store_true",
                       help="read whole images through the daemon, too, not by the kernel alone")  # fmt: skip
    mount.add_argument("--foreground", action="store_true", help="stay; log to stderr")
    mount.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    mount.add_argument("--log-file", metavar="FILE", help="log here (default: syslog; in the foreground stderr)")
    mount.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def _add_status(verbs: Any, run: Verb) -> None:
    status = verbs.add_parser(
        "status",
        help="show mounts and images",
        description="Show what is mounted, and how much of each image is here.",
        epilog="example: lazyfs status /var/lib/imagecache/debian-12 --watch",
    )
    status.set_defaults(run=run)
    status.add_argument(
        "paths", metavar="PATH", nargs="*", help="a mount, or an image or folder on it (default: every mount)"
    )
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", action="store_true", help="redraw every second until interrupted")


def _add_pivot(verbs: Any, run: Verb) -> None:
    pivot = verbs.add_parser(
        "pivot",
        help="move running QEMUs to the plain files",
        description="Tell running QEMUs to go on with the files that the paths of their backing files name now: "
        "for images that are whole, without lazyfs. Guests run on; nothing is written.",
        epilog="example: lazyfs pivot /run/vm-a.qmp /run/vm-b.qmp --wait",
    )
    pivot.set_defaults(run=run)
    pivot.add_argument("sockets", metavar="QMP_SOCKET", nargs="*", help="QMP UNIX socket of a QEMU")
    pivot.add_argument("--all-in", metavar="DIR", help="take every UNIX socket in this folder as well")
    pivot.add_argument("--wait", action="store_true", help="wait for images that are not whole yet")
    pivot.add_argument("--dry-run", action="store_true", help="say what would be done")
    pivot.add_argument("--allow-hmp", action="store_true",
                       help="use a debugging command of QEMU where all nodes have automatic names")  # fmt: skip
    pivot.add_argument("--json", action="store_true", help="for programs")


def _add_detach(verbs: Any, run: Verb) -> None:
    detach = verbs.add_parser(
        "detach",
        help="unmount under running VMs",
        description="Unmount although files are open: once every open image is whole, new opens get the plain files, "
        "and the daemon serves what is open until it is closed.",
        epilog="example: lazyfs detach /var/lib/imagecache --wait",
    )
    detach.set_defaults(run=run)
    detach.add_argument("mountpoint", metavar="MOUNTPOINT")
    detach.add_argument("--wait", action="store_true", help="wait until every open image is whole")


def _add_umount(verbs: Any, run: Verb) -> None:
    umount = verbs.add_parser(
        "umount",
        help="unmount, and wait until everything is saved",
        description="Unmount, and wait until the daemon has saved everything and ended.",
        epilog="example: lazyfs umount /var/lib/imagecache",
    )
    umount.set_defaults(run=run)
    umount.add_argument("mountpoint", metavar="MOUNTPOINT")


def _uri(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not an NBD URI such as nbd://HOST or nbd+unix:///?socket=PATH")
    if parts.path.strip("/"):
        server = text.replace(parts.path, "/" if parts.query else "", 1)
        raise argparse.ArgumentTypeError(f"{text!r} names one export; give the server alone: {server}")
    if parts.scheme.endswith("+unix"):
        path = parse_qs(parts.query).get("socket", [""])[0]
        if not os.path.isabs(path):
            raise argparse.ArgumentTypeError(f"{text!r} needs an absolute path: {parts.scheme}:///?socket=/PATH")
    elif not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} names no host")
    return text


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rate(text: str) -> int:
    rate = _size(text.removesuffix("/s"))
    if rate < 1:
        raise argparse.ArgumentTypeError("a rate is at least 1 byte per second; --no-populate turns population off")
    return rate


def _block_size(text: str) -> int:
    return _power_of_two(text, 4 * KiB, shown_file.MAX_BLOCK_SIZE[shown_file.RAW])


def _cluster_size(text: str) -> int:
    return _power_of_two(text, MIN_CLUSTER_SIZE, shown_file.MAX_BLOCK_SIZE[shown_file.QCOW2])


def _power_of_two(text: str, least: int, most: int) -> int:
    size = _size(text)
    if not least <= size <= most or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from {least // KiB}K to {most // MiB}M")
    return size


def _id(text: str) -> int:
    # The last number means "leave it" to chown(2).
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a user or group number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, at least 0.1")
    return seconds


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal file mode such as 0444")
    return mode & ~0o222  # the file system is read-only
