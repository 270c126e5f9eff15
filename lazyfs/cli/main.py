"""The `lazyfs` command: arguments, printing, exit codes.

Exit 0: done; 1: it failed, with one line on stderr that says why and what to do; 2: wrong
arguments.
"""

import argparse
import errno
import io
import json
import logging
import logging.handlers
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lazyfs import errors
from lazyfs.cli import arguments as arguments_of
from lazyfs.cli import configuration, image_verbs, unmounting, waiting
from lazyfs.control import client as control_client
from lazyfs.core import shown_file
from lazyfs.host import mounts
from lazyfs.qemu import pivot
from lazyfs.units import KiB

_PIPE_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # names are any bytes; terminals speak some encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        words = sys.argv[1:] if arguments is None else arguments
        options = arguments_of.parser(_verbs()).parse_args(words)
        options.words = words
        code: int = options.run(options)
        sys.stdout.flush()
    except errors.UserError as error:
        print(f"lazyfs: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"lazyfs: {error.strerror or error}", file=sys.stderr)
        return 1
    return code


def _verbs() -> dict[str, arguments_of.Verb]:
    return {
        "mount": _mount, "status": _status, "prefetch": image_verbs.prefetch, "pause": image_verbs.pause,
        "resume": image_verbs.resume, "cancel": image_verbs.cancel, "set-rate": image_verbs.set_rate,
        "evict": image_verbs.evict, "pin": image_verbs.pin, "unpin": image_verbs.unpin, "map": image_verbs.map_image,
        "verify": image_verbs.verify, "forget": image_verbs.forget, "pivot": _pivot, "detach": _detach,
        "umount": _umount, "check": _check, "config": _config,
    }  # fmt: skip


# -- mount


def _mount(options: argparse.Namespace) -> int:
    configuration.apply(options, arguments_of.mount_keys())
    options.block_size = _block_size(options)
    mountpoint = _mountpoint(options.mountpoint)
    if os.geteuid() != 0 and (options.uid, options.gid) != (os.geteuid(), os.getegid()):
        raise errors.UsageError("only root can give files to others: leave out --uid and --gid")
    _overlays(options, mountpoint)
    if not options.foreground:
        return _serve_in_background(options, mountpoint)
    try:
        _serve(options, mountpoint)
    except errors.UserError as error:
        if options.ready_fd is None:
            raise
        _report(options.ready_fd, str(error))
        return error.exit_code
    return 0


def _mountpoint(path: str) -> str:
    """Return the folder to mount on; clear away what a killed daemon left there.

    Raises:
        UserError: it is no folder, or something is mounted there.
    """
    if not path:
        raise errors.UsageError("the mountpoint is an empty name")
    mountpoint = os.path.realpath(path)
    mounted = [mount for mount in mounts.lazyfs_mounts() if mount.mountpoint == mountpoint]
    try:
        if mounted and not control_client.alive(mounted[-1]):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        os.statvfs(mountpoint)  # unlike stat, never answered from the kernel's cache
    except FileNotFoundError:
        raise errors.UserError(
            f"the mountpoint {mountpoint} does not exist; make it with mkdir"
        ) from None
    except OSError as error:
        if not mounted:
            raise errors.UserError(f"cannot use {mountpoint}: {error.strerror}") from error
        from lazyfs.kernel import session as kernel_session

        try:
            kernel_session.clear_away(mounted[-1])  # its daemon was killed
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
        raise errors.UserError(f"the mountpoint {mountpoint} is not a folder")
    return mountpoint


def _serve(options: argparse.Namespace, mountpoint: str) -> None:
    try:
        # Here, not above: status and umount need neither pyfuse3 nor libnbd, and start in half the
        # time.
        from lazyfs import daemon
        from lazyfs.engine.filesystem import Options
        from lazyfs.engine.interfaces import FileAttributes
    except ModuleNotFoundError as error:
        raise errors.UserError(_missing_module(error)) from error
    _log_to(options)
    config = daemon.MountConfig(
        repository=options.repository,
        mountpoint=mountpoint,
        cache_dir=os.path.realpath(options.cache_dir or mountpoint),
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
        limits=arguments_of.limits(options),
        overlays=_overlays(options, mountpoint),
        metrics=options.metrics,
        passthrough=not options.no_passthrough,
        allow_evict=options.allow_evict,
    )
    try:
        daemon.serve(config, lambda: _report(options.ready_fd, "ready"))
    except errors.UserError:
        raise
    except Exception:
        logging.getLogger(__name__).exception("the daemon failed, a bug in lazyfs")
        raise errors.UserError(
            "the daemon failed, a bug in lazyfs; the log has the details"
        ) from None


def _overlays(options: argparse.Namespace, mountpoint: str) -> list[str]:
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
    """Return the block size of new images, which for a qcow2 is its cluster size."""
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
        return "Python's libnbd module is missing: apt-get install python3-libnbd (it serves /usr/bin/python3 only)"
    if error.name == "pyfuse3":
        return "pyfuse3 is missing: apt-get install libfuse3-dev gcc pkg-config python3-dev, then pip install pyfuse3"
    return f"the Python module {error.name} is missing: pip install lazyfs, or run tools/setup"


def _report(ready_fd: int | None, message: str) -> None:
    """Tell the process that waits for this daemon; once, as it listens to the first line only."""
    if ready_fd is not None:
        with suppress(OSError):
            os.write(ready_fd, message.encode() + b"\n")
            os.close(ready_fd)


def _serve_in_background(options: argparse.Namespace, mountpoint: str) -> int:
    read_fd, write_fd = os.pipe()
    # -P: not the lazyfs, or the trio, that lies in the folder where the user happens to stand.
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
    with os.fdopen(read_fd) as answer:
        said = answer.readline().strip()
    if said == "ready":
        os.stat(os.path.join(mountpoint, "."))  # it answers
        return 0
    code = child.wait()
    raise errors.UserError(
        said or f"the daemon ended with exit code {code} and left no word; try --foreground"
    )


def _log_to(options: argparse.Namespace) -> None:
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler: logging.Handler
    if options.log_file:
        try:
            handler = logging.FileHandler(options.log_file)
        except OSError as error:
            raise errors.UserError(
                f"cannot write the log {options.log_file}: {error.strerror}"
            ) from error
    elif options.ready_fd is None:
        handler = logging.StreamHandler()
    elif os.path.exists("/dev/log"):
        handler, text = (
            logging.handlers.SysLogHandler("/dev/log"),
            "lazyfs[%(process)d]: %(message)s",
        )
    else:
        handler = logging.NullHandler()
    logging.getLogger("pyfuse3").setLevel(
        logging.WARNING
    )  # its debug messages are several for each request
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler], format=text)


def _config(options: argparse.Namespace) -> int:
    print(configuration.show(options, arguments_of.mount_keys()), end="")
    return 0


# -- status


def _status(options: argparse.Namespace) -> int:
    if options.json and options.watch:
        raise errors.UsageError(
            "--watch draws for people; call status --json again and again instead"
        )
    from rich.console import Console

    from lazyfs.cli import status_view

    if options.json:
        found = _query_all(options.paths)
        json.dump({"mounts": found}, sys.stdout, indent=2)
        print()
        return _exit_code(found)
    # A pipe has no width: let lines be as long as they are.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if not options.watch:
        found = _query_all(options.paths)
        console.print(status_view.render(found, console.width))
        return _exit_code(found)
    from rich.live import Live

    from lazyfs.cli import watching

    with Live(console=console, auto_refresh=False) as live:

        def draw(found: list[dict[str, Any]]) -> None:
            picture = status_view.render(found, console.width)
            if console.is_terminal:
                live.update(picture, refresh=True)
            else:  # a log or a pipe: one picture after another
                console.print(picture)
                sys.stdout.flush()

        watching.watch(lambda: _query_all(options.paths), draw, keep=console.is_terminal)
    return 0


def _exit_code(found: Sequence[dict[str, Any]]) -> int:
    """One daemon that does not answer is a failure, whatever the others say."""
    return 1 if any("error" in one for one in found) else 0


def _query_all(paths: Sequence[str]) -> list[dict[str, Any]]:
    if not paths:
        return [
            _query_or_say_why(mount) for mount in mounts.lazyfs_mounts()
        ] + control_client.query_detached()
    found: dict[str, dict[str, Any]] = {}
    detached = {one["mountpoint"]: one for one in control_client.query_detached()}
    for path in paths:
        # The path is resolved only if it is no mount as it is written: that asks a daemon, which
        # may hang.
        if mounts.mount_of(path) is None and (gone := detached.get(os.path.realpath(path))):
            found.setdefault(f"detached {path}", gone)
            continue
        mount, inside = control_client.locate(path)
        one = _query_or_say_why(mount) if not inside else control_client.query(mount, inside)
        known = found.setdefault(mount.mountpoint, one)
        if known is not one:
            paths_known = {image["path"] for image in known["images"]}
            known["images"] += [
                image for image in one["images"] if image["path"] not in paths_known
            ]
    return list(found.values())


def _query_or_say_why(mount: mounts.Mount) -> dict[str, Any]:
    try:
        return control_client.query(mount)
    except errors.UserError as error:
        return {
            "mountpoint": mount.mountpoint, "cache_dir": None, "repository": mount.repository, "connected": False,
            "control_socket": mounts.socket_path(mount.mountpoint), "images": [], "jobs": [], "error": str(error),
        }  # fmt: skip


# -- pivot


def _pivot(options: argparse.Namespace) -> int:
    if not options.sockets and options.all_in is None:
        raise errors.UsageError(
            "name a QMP socket, or a folder of them with --all-in (see lazyfs pivot --help)"
        )
    named = set(options.sockets)
    chosen = pivot.sockets(options.sockets, options.all_in)
    if not chosen:
        print(f"lazyfs: there is no socket in {options.all_in!r}", file=sys.stderr)
    reports = pivot.run(
        chosen,
        pivot.Options(options.allow_hmp, options.dry_run),
        wait=waiting.until_whole if options.wait else None,
        tell=_tell_of_errors if options.json else _tell,
    )
    if options.json:
        json.dump({"qemus": [asdict(report) for report in reports]}, sys.stdout, indent=2)
        print()
    # In a folder, what a QEMU left behind and other programs' sockets are everyday.
    return (
        0
        if all(report.good or not (report.qemu or report.socket in named) for report in reports)
        else 1
    )


def _tell(report: pivot.Report) -> None:
    """At once, as what follows may take long, and be interrupted."""
    _tell_of_errors(report)
    for line in report.lines():
        print(line, flush=True)


def _tell_of_errors(report: pivot.Report) -> None:
    for line in report.complaints():
        print(f"lazyfs: {line}", file=sys.stderr)


# -- detach, umount


def _detach(options: argparse.Namespace) -> int:
    print(unmounting.detach(options.mountpoint, options.wait))
    return 0


def _umount(options: argparse.Namespace) -> int:
    unmounting.umount(options.mountpoint)
    return 0


# -- check


def _check(options: argparse.Namespace) -> int:
    from lazyfs.cache import cache_check

    report = cache_check.run(options.cache_dir, options.repair)
    if options.json:
        findings = [asdict(finding) for finding in report.findings]
        json.dump(
            {"cache_dir": report.cache_dir, "images": report.images, "findings": findings},
            sys.stdout,
            indent=2,
        )
        print()
    else:
        for finding in report.findings:
            print(finding.line())
        print(report.summary())
    return 1 if report.problems else 0
