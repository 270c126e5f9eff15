"""`lazyfs mount`: checks the options, and becomes the keeper, in the foreground or the background.

In the background, the keeper is a new process that runs the same command with --foreground. It
writes one line to a pipe (--ready-fd): "ready", or the reason why it could not mount. The keeper's
daemons run the same command as well, and find in their environment that they are daemons.
"""

import argparse
import copy
import errno
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lazyfs import errors
from lazyfs.cli import configuration, printing, values
from lazyfs.control import client as control_client
from lazyfs.core import shown_file
from lazyfs.core.escaping import one_line
from lazyfs.core.eviction import Limits
from lazyfs.host import fd_store, mounts
from lazyfs.kernel import channel
from lazyfs.report.background_log import BackgroundLog, DescriptorHandler
from lazyfs.units import KiB

if TYPE_CHECKING:
    from lazyfs.mounted import MountConfig


def run(options: argparse.Namespace) -> int:
    """Mount a repository."""
    if channel.DESCRIPTOR in os.environ:
        return _be_daemon(options)
    _apply_configuration(options)
    left = fd_store.inherited(os.environ, os.getpid())
    if left:
        from lazyfs import keeper

        # Nothing may use the mount: nobody answers there until this process does.
        if state := keeper.state_of(left):
            return _keep(options, state["mountpoint"], state["cache_dir"], left)
        for fds in left.values():
            for fd in fds:
                os.close(fd)
    mountpoint = _mountpoint(options.mountpoint)
    if os.geteuid() != 0 and (options.uid, options.gid) != (os.geteuid(), os.getegid()):
        raise errors.UsageError("only root can give files to others: leave out --uid and --gid")
    _overlays(options, mountpoint)
    if not options.foreground:
        return _serve_in_background(options, mountpoint)
    try:
        cache_dir = os.path.realpath(options.cache_dir or mountpoint)
        return _keep(options, mountpoint, cache_dir, {}, stale=list(left))
    except errors.UserError as error:
        if options.ready_fd is None:
            raise
        _report(options.ready_fd, str(error))
        return exit_code(error)


def _apply_configuration(options: argparse.Namespace) -> None:
    given = configuration.without_folder(options)
    configuration.apply(options)
    options.given = given
    options.block_size = _block_size(options)


_IN_SERVICE = "NOTIFY_SOCKET" in os.environ
"""Whether a service manager has started this process. The variable goes when it is told of."""


def exit_code(error: errors.UserError) -> int:
    """Return the exit code for an error, in the form that the caller understands."""
    if isinstance(error, errors.LastingError) and _IN_SERVICE:
        return error.service_exit_code
    return error.exit_code


def _mountpoint(path: str) -> str:
    """Return the folder to mount on, after clearing away what a killed daemon left there.

    Raises:
        UserError: the mountpoint is no folder, or a lazyfs is mounted there.
    """
    if not path:
        raise errors.UsageError("the mountpoint is an empty name")
    # A daemon that hangs does not even answer about symbolic links, so it is asked first.
    there = os.path.abspath(path)
    _refuse_if_hung([mount for mount in mounts.lazyfs_mounts() if mount.mountpoint == there])
    mountpoint = os.path.realpath(path)
    mounted = [mount for mount in mounts.lazyfs_mounts() if mount.mountpoint == mountpoint]
    if mounted and mounted[-1].foreign:
        raise errors.UserError(
            f"user {mounted[-1].user_id} has mounted a lazyfs on {mountpoint}; "
            "it must be unmounted first"
        )
    if mountpoint != there:
        _refuse_if_hung(mounted)
    try:
        if mounted and not control_client.alive(mounted[-1]):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        os.statvfs(mountpoint)  # Unlike stat, this is never answered from the kernel's cache.
    except FileNotFoundError:
        raise errors.LastingError(
            f"the mountpoint {mountpoint} does not exist; make it with mkdir"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOTCONN or not mounted:
            raise errors.UserError(f"cannot use {mountpoint}: {error.strerror}") from error
        from lazyfs.kernel import session as kernel_session

        try:
            kernel_session.clear_away(mounted[-1])  # Its daemon was killed.
        except OSError as trouble:
            raise errors.UserError(
                f"cannot clear away the dead mount on {mountpoint}: {trouble.strerror}"
            ) from trouble
        return _mountpoint(path)
    if mounted:
        raise errors.UserError(
            f"{mounted[-1].repository} is mounted on {mountpoint} already; lazyfs umount it first"
        )
    if not os.path.isdir(mountpoint):
        raise errors.LastingError(f"the mountpoint {mountpoint} is not a folder")
    return mountpoint


def _refuse_if_hung(mounted: Sequence[mounts.Mount]) -> None:
    """Raise UserError if the daemon of the topmost of these mounts exists and does not answer."""
    if mounted:
        try:
            control_client.execute(mounted[-1], [("query-version", {})])
        except control_client.Hangs as error:
            raise errors.UserError(f"{error}; end it with kill -9, then mount again") from None
        except errors.UserError:
            return  # It has ended, or its socket is gone; the mountpoint itself is asked next.


def _keep(
    options: argparse.Namespace,
    mountpoint: str,
    cache_dir: str,
    left: Mapping[str, Sequence[int]],
    stale: Sequence[str] = (),
) -> int:
    """Be the keeper of a mount, until it ends."""
    from lazyfs import keeper

    _, reopen = _log_to(options)
    paths = [options.config or "/", options.cache_dir, options.log_file, *(options.overlays or [])]
    relative = any(path and not os.path.isabs(path) for path in [*paths, options.mountpoint])
    config = keeper.KeeperConfig(
        mountpoint=mountpoint,
        cache_dir=cache_dir,
        repository=options.repository,
        passthrough=not options.no_passthrough,
        program=[sys.executable, *_program()],
        words=options.words,
        folder=os.open(".", os.O_PATH | os.O_CLOEXEC) if relative else None,
        reopen_log=reopen,
        left=left,
        stale=stale,
    )
    with _bugs_in_one_line("keeper"):
        return keeper.keep(config, lambda notes: _report(options.ready_fd, "ready", notes))


@contextmanager
def _bugs_in_one_line(process: str) -> Iterator[None]:
    """Turn what is not for the user into a line for the user, and a traceback in the log."""
    try:
        yield
    except (errors.UserError, channel.Gone):
        raise
    except Exception:
        logging.getLogger(__name__).exception("the %s failed, a bug in lazyfs", process)
        raise errors.UserError(
            f"the {process} failed, a bug in lazyfs; the log has the details"
        ) from None


def _program() -> list[str]:
    """Return the arguments of the interpreter with which this program was started."""
    words = len(sys.argv) - 1
    started = sys.orig_argv[1 : len(sys.orig_argv) - words]
    # Without -P, Python would import a lazyfs or a trio that lies in the current folder, and look
    # for that folder by its path, which may lead into the mount.
    return ["-P", *(started if "-c" in started or "-m" in started else ["-m", "lazyfs"])]


def _be_daemon(options: argparse.Namespace) -> int:
    """Be a daemon of the keeper that has started this process."""
    end = socket.socket(fileno=int(os.environ.pop(channel.DESCRIPTOR)))
    try:
        keeper = channel.Keeper(channel.Channel(end))
    except channel.OtherVersion as error:
        printing.complain(str(error))
        return 1
    try:
        _apply_configuration(options)
        _serve(options, keeper)
    except errors.UserError as error:
        with suppress(channel.Gone):
            keeper.failed(_kind(error), str(error))
        return exit_code(error)
    except channel.Gone:
        return 1  # the keeper was killed
    return 0


def _kind(error: errors.UserError) -> str:
    if isinstance(error, errors.UsageError):
        return "usage"
    return "lasting" if isinstance(error, errors.LastingError) else "user"


def _serve(options: argparse.Namespace, keeper: "channel.Keeper") -> None:
    try:
        # These are imported here, because status and umount need neither pyfuse3 nor libnbd and
        # start in half the time without them.
        from lazyfs import daemon
    except ModuleNotFoundError as error:
        raise errors.LastingError(_missing_module(error)) from error
    log, reopen = _log_to(options)
    config = replace(
        _config(options, keeper.mountpoint, keeper.cache_dir),
        reread=None
        if options.given.config is None
        else partial(_reread, options.given, keeper.mountpoint, keeper.cache_dir),
        reopen_log=reopen,
        dropped_log_lines=lambda: log.dropped,
    )
    with _bugs_in_one_line("daemon"):
        daemon.serve(config, keeper)


def _reread(given: argparse.Namespace, mountpoint: str, cache_dir: str) -> "MountConfig":
    """Read the configuration again, and return what it says together with the options.

    Raises:
        UserError: it cannot be read, or its content is wrong.
    """
    options = copy.copy(given)
    configuration.apply(options)
    options.block_size = _block_size(options)
    return _config(options, mountpoint, cache_dir)


def _config(options: argparse.Namespace, mountpoint: str, cache_dir: str) -> "MountConfig":
    from lazyfs.engine.filesystem import Options
    from lazyfs.engine.interfaces import FileAttributes
    from lazyfs.mounted import MountConfig

    return MountConfig(
        repository=options.repository,
        mountpoint=mountpoint,
        cache_dir=cache_dir,
        file_attributes=FileAttributes(options.mode, options.uid, options.gid),
        options=Options(
            block_size=options.block_size,
            io_timeout_s=options.io_timeout,
            replace_changed=options.on_change == "replace",
            populate=not options.no_populate,
            fill_rate=options.fill_rate,
            format=options.format,
            names=options.names,
        ),
        refresh_s=options.refresh,
        limits=_limits(options),
        overlays=_overlays(options, mountpoint),
        metrics=options.metrics,
        passthrough=not options.no_passthrough,
        allow_evict=options.allow_evict,
        moved=options.moved,
        log_level=options.log_level,
        trust_cache_owner=options.trust_cache_owner,
        chosen={  # every daemon runs in the foreground, also if its command does not
            name: value for name, value in options.chosen.items() if name != "foreground"
        },
    )


def _limits(options: argparse.Namespace) -> Limits:
    """Return the limits on the space that the cache takes."""
    free = Limits() if options.min_free is None else values.free_limits(options.min_free)
    return replace(free, max_cache=options.max_cache)


def _overlays(options: argparse.Namespace, mountpoint: str) -> list[str]:
    """Return the folders of overlays, with symbolic links resolved.

    Raises:
        UserError: one of them is no folder, or the mount would hide it.
    """
    folders = [os.path.realpath(folder) for folder in options.overlays or []]
    for folder in folders:
        if os.path.commonpath([folder, mountpoint]) == mountpoint:
            raise errors.UsageError(f"--overlays {folder} would be hidden by the mount")
        if not os.path.isdir(folder):
            raise errors.UserError(
                f"--overlays {folder} is not a folder, so nobody could tell what may be evicted"
            )
    return folders


def _block_size(options: argparse.Namespace) -> int:
    """Return the block size of new images. For a qcow2 that is its cluster size."""
    if options.cluster_size and options.format != shown_file.QCOW2:
        raise errors.UsageError(
            "--cluster-size is for --format qcow2; raw images have --block-size"
        )
    if options.block_size and options.format != shown_file.RAW:
        raise errors.UsageError("--block-size is for raw images; a qcow2 has --cluster-size")
    size: int = options.block_size or options.cluster_size or 64 * KiB
    return size


def _missing_module(error: ModuleNotFoundError) -> str:
    if error.name == "nbd":
        return (
            "Python's libnbd module is missing: apt-get install python3-libnbd "
            "(it serves /usr/bin/python3 only)"
        )
    if error.name == "pyfuse3":
        return (
            "pyfuse3 is missing: apt-get install libfuse3-dev gcc pkg-config python3-dev, "
            "then pip install pyfuse3"
        )
    return f"the Python module {error.name} is missing: pip install lazyfs, or run tools/setup"


_NOTE = "note: "
"""How a line begins that the process which waits passes on to the user."""


def _report(ready_fd: int | None, message: str, notes: Sequence[str] = ()) -> None:
    """Tell the process that waits for this one, and close the pipe.

    In the foreground the log on stderr has the notes already.
    """
    if ready_fd is not None:
        lines = [*(f"{_NOTE}{one_line(note)}" for note in notes), one_line(message)]
        try:
            os.write(ready_fd, "".join(f"{line}\n" for line in lines).encode())
        except BrokenPipeError:
            signal.raise_signal(signal.SIGTERM)  # whoever asked for the mount was killed
        with suppress(OSError):
            os.close(ready_fd)


def _serve_in_background(options: argparse.Namespace, mountpoint: str) -> int:
    """Start the keeper, and wait until it has mounted. A signal that ends this ends it as well.

    Raises:
        UserError: it could not mount. The message is the keeper's.
    """
    read_fd, write_fd = os.pipe()
    # Without -P, Python would import a lazyfs or a trio that lies in the current folder.
    command = [
        sys.executable,
        "-P",
        "-m",
        "lazyfs",
        *options.words,
        "--foreground",
        "--ready-fd",
        str(write_fd),
    ]
    with open(os.devnull, "r+b") as null:
        child = subprocess.Popen(
            command,
            stdin=null,
            stdout=null,
            stderr=null,
            pass_fds=[write_fd],
            start_new_session=True,
        )
    os.close(write_fd)

    def end_both(number: int, _frame: object) -> None:
        child.send_signal(signal.SIGTERM)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_both)
    try:
        with os.fdopen(read_fd) as answer:
            said = answer.readline().strip()
            while said.startswith(_NOTE):
                printing.complain(said.removeprefix(_NOTE))
                said = answer.readline().strip()
    except KeyboardInterrupt:  # the keeper has a session of its own, so it was not interrupted
        child.terminate()
        raise
    if said == "ready":
        os.stat(os.path.join(mountpoint, "."))  # This raises OSError if the mount does not answer.
        return 0
    code = child.wait()
    raise errors.UserError(
        said or f"the daemon ended with exit code {code} and left no word; try --foreground"
    )


def _log_to(options: argparse.Namespace) -> tuple[BackgroundLog, Callable[[], None]]:
    """Have a thread write the log where the options say.

    Returns:
        What passes lines on to the thread, and a function that opens a log file again.
    """
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler: logging.Handler

    def reopen() -> None:
        return None

    if options.log_file:
        try:
            file = DescriptorHandler(_open_log(options.log_file))
        except OSError as error:
            raise errors.UserError(
                f"cannot write the log {options.log_file}: {error.strerror}"
            ) from error
        handler, reopen = file, partial(_reopen_log, file, os.path.abspath(options.log_file))
    elif options.ready_fd is None:
        handler = DescriptorHandler(sys.stderr.fileno())
    elif os.path.exists("/dev/log"):
        handler, text = (
            logging.handlers.SysLogHandler("/dev/log"),
            "lazyfs[%(process)d]: %(message)s",
        )
    else:
        handler = logging.NullHandler()
    # pyfuse3 logs several debug messages for each request.
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(text))
    log = BackgroundLog(handler)
    logging.basicConfig(level=options.log_level.upper(), handlers=[log])
    return log, reopen


def _open_log(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


def _reopen_log(handler: DescriptorHandler, path: str) -> None:
    """Write to the file that is at `path` now. If it cannot be opened, the old one is used."""
    try:
        handler.use(_open_log(path))
    except OSError as error:
        logging.getLogger(__name__).exception("cannot open the log %s: %s", path, error.strerror)
