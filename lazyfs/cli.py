"""The `lazyfs` command: arguments, printing, exit codes.

Exit 0: done; 1: it failed, with one line on stderr that says why and what to do; 2: wrong arguments.
"""

import argparse
import asyncio
import errno
import json
import logging
import logging.handlers
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

from lazyfs import __version__, errors, mounts
from lazyfs.units import KiB, MiB, parse_size

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

WATCH_S = 1.0
"""Between two pictures of `status --watch`."""

_PIPE_WIDTH = 160

CONTROL_TIMEOUT_S = 10.0
"""A daemon answers in milliseconds; one that does not in this time hangs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        options = _parser().parse_args(words)
        options.words = words
        code: int = options.run(options)
    except errors.UserError as error:
        print(f"lazyfs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


# -- arguments


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise errors.UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lazyfs", description="Shows every image of an NBD repository as a local file.")
    parser.add_argument("--version", action="version", version=f"lazyfs {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    _add_mount(verbs)
    _add_status(verbs)
    _add_umount(verbs)
    return parser


def _add_mount(verbs: Any) -> None:
    mount = verbs.add_parser(
        "mount",
        help="mount a repository",
        description="Mount a repository: every export becomes a read-only file, fetched when read, and kept.",
        epilog="example: lazyfs mount nbd://images.example.com /var/lib/imagecache",
    )
    mount.set_defaults(run=_mount)
    mount.add_argument("repository", metavar="REPOSITORY", type=_uri, help="NBD URI without an export name")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing folder; also the cache by default")
    mount.add_argument("--cache-dir", metavar="DIR", help="keep the cache here, not under the mountpoint")
    mount.add_argument("--format", choices=["raw"], default="raw", help="of cache files (default: raw)")
    mount.add_argument("--block-size", metavar="SIZE", type=_block_size, default=64 * KiB,
                       help="unit of fetching, a power of two from 4K to 4M (default: 64K)")  # fmt: skip
    mount.add_argument("--no-populate", action="store_true", help="fetch only what is read")
    mount.add_argument("--fill-rate", metavar="BYTES/s", type=_rate, help="limit population, such as 50M or 1GiB")
    mount.add_argument("--io-timeout", metavar="SECONDS", type=_seconds, default=120.0,
                       help="how long a read waits for the repository before it fails (default: 120)")  # fmt: skip
    mount.add_argument("--refresh", metavar="SECONDS", type=_seconds, default=60.0,
                       help="how often the repository is asked for its list (default: 60)")  # fmt: skip
    mount.add_argument("--on-change", choices=["keep", "replace"], default="keep",
                       help="when an export changes, keep the cached version (default) or replace it")  # fmt: skip
    mount.add_argument("--mode", metavar="OCTAL", type=_mode, default=0o444, help="of files (default: 0444)")
    mount.add_argument("--uid", metavar="N", type=int, default=os.geteuid(), help="owner of files")
    mount.add_argument("--gid", metavar="N", type=int, default=os.getegid(), help="group of files")
    mount.add_argument("--foreground", action="store_true", help="stay; log to stderr")
    mount.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    mount.add_argument("--log-file", metavar="FILE", help="log here (default: syslog; in the foreground stderr)")
    mount.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def _add_status(verbs: Any) -> None:
    status = verbs.add_parser(
        "status",
        help="show mounts and images",
        description="Show what is mounted, and how much of each image is here.",
        epilog="example: lazyfs status /var/lib/imagecache/debian-12 --watch",
    )
    status.set_defaults(run=_status)
    status.add_argument(
        "paths", metavar="PATH", nargs="*", help="a mount, or an image or folder on it (default: every mount)"
    )
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", action="store_true", help="redraw every second until interrupted")


def _add_umount(verbs: Any) -> None:
    umount = verbs.add_parser(
        "umount",
        help="unmount, and wait until everything is saved",
        description="Unmount, and wait until the daemon has saved everything and ended.",
        epilog="example: lazyfs umount /var/lib/imagecache",
    )
    umount.set_defaults(run=_umount)
    umount.add_argument("mountpoint", metavar="MOUNTPOINT")


def _uri(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not an NBD URI such as nbd://HOST or nbd+unix:///?socket=PATH")
    if parts.path.strip("/"):
        server = text.replace(parts.path, "/" if parts.query else "", 1)
        raise argparse.ArgumentTypeError(f"{text!r} names one export; give the server alone: {server}")
    if parts.scheme.endswith("+unix"):
        socket = parse_qs(parts.query).get("socket", [""])[0]
        if not os.path.isabs(socket):
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
    size = _size(text)
    if not 4 * KiB <= size <= 4 * MiB or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a power of two from 4K to 4M")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal file mode such as 0444")
    return mode & ~0o222  # the file system is read-only


# -- mount


def _mount(options: argparse.Namespace) -> int:
    mountpoint = _mountpoint(options.mountpoint)
    if os.geteuid() != 0 and (options.uid, options.gid) != (os.geteuid(), os.getegid()):
        raise errors.UsageError("only root can give files to others: leave out --uid and --gid")
    if options.foreground:
        return _serve(options, mountpoint)
    return _serve_in_background(options, mountpoint)


def _mountpoint(path: str) -> str:
    """Return the folder to mount on; clear away what a killed daemon left there.

    Raises:
        UserError: it is no folder, or something is mounted there.
    """
    mountpoint = os.path.realpath(path)
    mounted = [mount for mount in mounts.lazyfs_mounts() if mount.mountpoint == mountpoint]
    try:
        os.statvfs(mountpoint)  # unlike stat, never answered from the kernel's cache
    except FileNotFoundError:
        raise errors.UserError(f"the mountpoint {mountpoint} does not exist; make it with mkdir") from None
    except OSError as error:
        if not mounted:
            raise errors.UserError(f"cannot use {mountpoint}: {error.strerror}") from error
        from lazyfs import kernel_session

        kernel_session.unmount(mountpoint, lazy=True)  # its daemon was killed
        return _mountpoint(path)
    if mounted:
        raise errors.UserError(f"{mounted[-1].repository} is mounted on {mountpoint} already; lazyfs umount it first")
    if not os.path.isdir(mountpoint):
        raise errors.UserError(f"the mountpoint {mountpoint} is not a folder")
    return mountpoint


def _serve(options: argparse.Namespace, mountpoint: str) -> int:
    try:
        # Here, not above: status and umount need neither pyfuse3 nor libnbd, and start in half the time.
        from lazyfs import daemon
        from lazyfs.filesystem import Options
        from lazyfs.interfaces import FileLook
    except ModuleNotFoundError as error:
        raise errors.UserError(_missing_module(error)) from error
    _log_to(options)
    config = daemon.MountConfig(
        repository=options.repository,
        mountpoint=mountpoint,
        cache_dir=os.path.realpath(options.cache_dir or mountpoint),
        look=FileLook(options.mode, options.uid, options.gid),
        options=Options(
            block_size=options.block_size,
            io_timeout_s=options.io_timeout,
            replace_changed=options.on_change == "replace",
            populate=not options.no_populate,
            fill_rate=options.fill_rate,
            format=options.format,
        ),
        refresh_s=options.refresh,
    )
    try:
        daemon.serve(config, lambda: _report(options.ready_fd, "ready"))
    except errors.UserError as error:
        if options.ready_fd is None:
            raise
        _report(options.ready_fd, str(error))
        return error.exit_code
    except Exception:
        logging.getLogger(__name__).exception("the daemon failed, a bug in lazyfs")
        raise errors.UserError("the daemon failed, a bug in lazyfs; the log has the details") from None
    return 0


def _missing_module(error: ModuleNotFoundError) -> str:
    if error.name == "nbd":
        return "Python's libnbd module is missing: apt-get install python3-libnbd (it serves /usr/bin/python3 only)"
    if error.name == "pyfuse3":
        return "pyfuse3 is missing: apt-get install libfuse3-dev gcc pkg-config python3-dev, then pip install pyfuse3"
    return f"the Python module {error.name} is missing: pip install lazyfs, or run tools/setup"


def _report(ready_fd: int | None, message: str) -> None:
    if ready_fd is not None:
        os.write(ready_fd, message.encode() + b"\n")
        os.close(ready_fd)


def _serve_in_background(options: argparse.Namespace, mountpoint: str) -> int:
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "lazyfs", *options.words, "--foreground", "--ready-fd", str(write_fd)]
    with open(os.devnull, "r+b") as null:
        child = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, pass_fds=[write_fd], start_new_session=True
        )
    os.close(write_fd)
    with os.fdopen(read_fd) as answer:
        said = answer.readline().strip()
    if said == "ready":
        os.stat(os.path.join(mountpoint, "."))  # it answers
        return 0
    code = child.wait()
    raise errors.UserError(said or f"the daemon ended with exit code {code} and left no word; try --foreground")


def _log_to(options: argparse.Namespace) -> None:
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler: logging.Handler
    if options.log_file:
        try:
            handler = logging.FileHandler(options.log_file)
        except OSError as error:
            raise errors.UserError(f"cannot write the log {options.log_file}: {error.strerror}") from error
    elif options.ready_fd is None:
        handler = logging.StreamHandler()
    elif os.path.exists("/dev/log"):
        handler, text = logging.handlers.SysLogHandler("/dev/log"), "lazyfs[%(process)d]: %(message)s"
    else:
        handler = logging.NullHandler()
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)  # its debug messages are several for each request
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler], format=text)


# -- status


def _status(options: argparse.Namespace) -> int:
    if options.json and options.watch:
        raise errors.UsageError("--watch draws for people; call status --json again and again instead")
    from rich.console import Console

    from lazyfs import status_view

    if options.json:
        json.dump({"mounts": _query_all(options.paths)}, sys.stdout, indent=2)
        print()
        return 0
    # A pipe has no width: let lines be as long as they are.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if not options.watch:
        console.print(status_view.render(_query_all(options.paths)))
        return 0
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            picture = status_view.render(_query_all(options.paths))
            if console.is_terminal:
                live.update(picture, refresh=True)
            else:  # a log or a pipe: one picture after another
                console.print(picture)
                sys.stdout.flush()
            time.sleep(WATCH_S)


def _query_all(paths: Sequence[str]) -> list[dict[str, Any]]:
    if not paths:
        return [_query_or_say_why(mount) for mount in mounts.lazyfs_mounts()]
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        mount = mounts.mount_of(path) or mounts.mount_of(os.path.realpath(path))
        if mount is None:
            raise errors.UserError(f"{path} is not on a lazyfs mount; lazyfs status shows them all")
        inside = _inside(path, mount)
        one = _query_or_say_why(mount) if not inside else _query(mount, inside)
        known = found.setdefault(mount.mountpoint, one)
        if known is not one:
            paths_known = {image["path"] for image in known["images"]}
            known["images"] += [image for image in one["images"] if image["path"] not in paths_known]
    return list(found.values())


def _inside(path: str, mount: mounts.Mount) -> str:
    """Return `path` relative to the mountpoint, "" for the mountpoint itself."""
    absolute = os.path.abspath(path)
    if mounts.mount_of(absolute) is None:
        absolute = os.path.realpath(path)
    inside = os.path.relpath(absolute, mount.mountpoint)
    return "" if inside == "." else inside


def _query_or_say_why(mount: mounts.Mount) -> dict[str, Any]:
    try:
        return _query(mount, "")
    except errors.UserError as error:
        return {
            "mountpoint": mount.mountpoint, "cache_dir": None, "repository": mount.repository, "connected": False,
            "control_socket": mounts.socket_path(mount.mountpoint), "images": [], "error": str(error),
        }  # fmt: skip


def _query(mount: mounts.Mount, path: str) -> dict[str, Any]:
    """Ask the daemon of `mount` about itself and the images at `path`.

    Raises:
        UserError: it does not answer, or knows no such path.
    """
    arguments = {"path": path} if path else {}
    status, images = asyncio.run(_ask(mount, [("query-mount", {}), ("query-images", arguments)]))
    return {**status, "images": images}


async def _ask(mount: mounts.Mount, commands: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run commands on the control socket with the qemu.qmp library, as any QMP client would."""
    from qemu.qmp import ExecuteError, QMPClient, QMPError

    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("lazyfs")
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await client.connect(mounts.socket_path(mount.mountpoint))
            try:
                return [await client.execute(name, arguments) for name, arguments in commands]
            finally:
                await client.disconnect()
    except ExecuteError as error:
        raise errors.UserError(f"{mount.mountpoint}: {error}") from error
    except TimeoutError:
        raise errors.UserError(f"the daemon of {mount.mountpoint} does not answer") from None
    except (QMPError, OSError) as error:
        reason = "it was killed; mount again" if not _alive(mount) else "its control socket cannot be reached"
        raise errors.UserError(f"the daemon of {mount.mountpoint} does not answer: {reason}") from error


def _alive(mount: mounts.Mount) -> bool:
    try:
        os.statvfs(mount.mountpoint)
    except OSError:
        return False
    return True


# -- umount


def _umount(options: argparse.Namespace) -> int:
    mountpoint = os.path.abspath(options.mountpoint)
    mount = mounts.mount_of(mountpoint)
    if mount is None or mount.mountpoint != mountpoint:
        resolved = os.path.realpath(options.mountpoint)
        mount = mounts.mount_of(resolved)
        if mount is None or mount.mountpoint != resolved:
            raise errors.UserError(f"no lazyfs is mounted on {options.mountpoint}")
    from lazyfs import kernel_session

    try:
        status = asyncio.run(_ask(mount, [("query-mount", {})]))[0]
    except errors.UserError:
        status = {}  # a dead daemon has nothing to save
    pidfd = _pidfd(status.get("pid"))
    try:
        kernel_session.unmount(mount.mountpoint, lazy=not status)
    except OSError as error:
        if "pid" in status and error.errno == errno.EBUSY:
            raise errors.UserError(f"{mount.mountpoint} is in use; close what is open there (see fuser -vm)") from error
        raise errors.UserError(f"cannot unmount {mount.mountpoint}: {error.strerror}") from error
    if pidfd is not None:
        _wait_for_end(pidfd)
    else:
        with suppress(OSError):  # what the dead daemon could not clear away itself
            os.unlink(mounts.socket_path(mount.mountpoint))
    return 0


def _pidfd(pid: int | None) -> int | None:
    try:
        return None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait_for_end(pidfd: int) -> None:
    """Wait for the daemon's last checkpoint: seconds, if much was fetched just now and the disk is slow."""

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(2000):
        print("lazyfs: saving what was fetched ...", file=sys.stderr)
        poller.poll()
    os.close(pidfd)
