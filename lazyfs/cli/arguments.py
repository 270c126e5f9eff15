"""The verbs and options of the `lazyfs` command, and the messages about wrong ones."""

# Longer than 500 lines: it is about to be split into verbs and values.

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from urllib.parse import parse_qs, urlsplit

from lazyfs import __version__, errors
from lazyfs.core import config_key, digest, export_name, shown_file
from lazyfs.core.eviction import Limits
from lazyfs.core.qcow2_layout import MIN_CLUSTER_SIZE
from lazyfs.units import KiB, MiB, parse_size

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

DATA_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")

Verb = Callable[[argparse.Namespace], int]


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise errors.UsageError(f"{message} (see {self.prog} --help)")


class _PrintDataDir(argparse.Action):
    """An option like --version, which would fold a long path."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(DATA_DIR)
        parser.exit()


def parser(runs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return the parser of the whole command; `run` of its result is the function of the chosen
    verb, from `runs`."""
    top = OneLineParser(
        prog="lazyfs", description="Show every disk image of an NBD repository as a local file."
    )
    top.add_argument("--version", action="version", version=f"lazyfs {__version__}")
    top.add_argument(
        "--data-dir",
        action=_PrintDataDir,
        help="print the folder that has the systemd unit and the bash completion",
    )
    verbs = top.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=OneLineParser
    )
    adders = {
        "mount": _add_mount, "status": _add_status, "prefetch": _add_prefetch, "pause": _add_pause,
        "resume": _add_resume, "cancel": _add_cancel, "set-rate": _add_set_rate, "evict": _add_evict, "pin": _add_pin,
        "unpin": _add_unpin, "map": _add_map, "verify": _add_verify, "forget": _add_forget, "pivot": _add_pivot,
        "detach": _add_detach, "umount": _add_umount, "check": _add_check, "config": _add_config,
    }  # fmt: skip
    assert adders.keys() == runs.keys()
    for verb, add in adders.items():
        add(verbs, runs[verb])
    return top


def _add_mount(verbs: Any, run: Verb) -> None:
    mount = verbs.add_parser(
        "mount",
        help="mount a repository",
        description="Mount a repository. Every export becomes a read-only file, fetched when it is read, and kept.",
        epilog="example: lazyfs mount nbd://images.example.com /var/lib/imagecache",
    )
    mount.set_defaults(run=run)
    _add_places(mount)
    mount.add_argument("--config", metavar="NAME|FILE",
                       help="read what is not given here from /etc/lazyfs/NAME.toml, or from FILE, a path that has a / "
                       "or ends in .toml; REPOSITORY and MOUNTPOINT can be there, too")  # fmt: skip
    _add_mount_options(mount)
    mount.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    _leave_to_configuration(mount)


def _add_places(mount: Any) -> None:
    repository = mount.add_argument(
        "repository",
        metavar="REPOSITORY",
        type=_uri,
        help="NBD URI of a server, without the name of an export",
    )
    mountpoint = mount.add_argument(
        "mountpoint",
        metavar="MOUNTPOINT",
        help="an existing folder; by default it also holds the cache",
    )
    # Not nargs="?", which argparse fills with nothing as soon as an option stands between the two.
    repository.required = mountpoint.required = False


def _add_mount_options(mount: Any) -> None:
    mount.add_argument("--cache-dir", metavar="DIR",
                       help="keep the cache in this folder, made if its parent exists "
                       "(default: the mountpoint)")  # fmt: skip
    mount.add_argument("--format", choices=shown_file.FORMATS, default=shown_file.RAW,
                       help="format of images new to this cache: "
                       "raw (default), or qcow2, shown as NAME.qcow2")  # fmt: skip
    mount.add_argument("--block-size", metavar="SIZE", type=_block_size,
                       help="unit in which raw images are fetched, "
                       "a power of two from 4K to 4M (default: 64K)")  # fmt: skip
    mount.add_argument("--cluster-size", metavar="SIZE", type=_cluster_size,
                       help="cluster size of qcow2 images, a power of two from 4K to 2M (default: 64K)")  # fmt: skip
    mount.add_argument("--no-populate", action="store_true",
                       help="fetch only what is read, and nothing in the background")  # fmt: skip
    mount.add_argument("--fill-rate", metavar="BYTES/s", type=_rate,
                       help="limit population to this rate, such as 50M or 1GiB")  # fmt: skip
    mount.add_argument("--io-timeout", metavar="SECONDS", type=_seconds, default=120.0,
                       help="how long a read waits for the repository before it fails (default: 120)")  # fmt: skip
    mount.add_argument("--refresh", metavar="SECONDS", type=_seconds, default=60.0,
                       help="how often the repository is asked for its list of exports (default: 60)")  # fmt: skip
    mount.add_argument("--on-change", choices=["keep", "replace"], default="keep",
                       help="when an export changes, keep the cached version (default) or replace it")  # fmt: skip
    mount.add_argument("--max-cache", metavar="SIZE", type=_size,
                       help="evict images, used longest ago first, "
                       "when the cache takes more than this (default: never)")  # fmt: skip
    mount.add_argument("--min-free", metavar="SIZE|PERCENT", type=_min_free,
                       help="evict images, used longest ago first, when less of the cache's disk is free, such as 20G "
                       "or 10%% (default: never)")  # fmt: skip
    mount.add_argument("--overlays", metavar="DIR", action="append",
                       help="never evict backing files of the qcow2 files below "
                       "this folder; can be given several times")  # fmt: skip
    mount.add_argument("--mode", metavar="OCTAL", type=_mode, default=0o444,
                       help="mode of files; write bits are dropped (default: 0444)")  # fmt: skip
    mount.add_argument(
        "--uid", metavar="N", type=_id, default=os.geteuid(), help="owner of files (default: yours)"
    )
    mount.add_argument(
        "--gid", metavar="N", type=_id, default=os.getegid(), help="group of files (default: yours)"
    )
    mount.add_argument("--names", choices=export_name.NAMES, default=export_name.EXPORT,
                       help="names of images new to this cache: "
                       "those of their exports (default), or their SHA-1")  # fmt: skip
    mount.add_argument(
        "--allow-evict", action="store_true", help="let rm, or unlink(2), evict an image"
    )
    mount.add_argument("--no-passthrough", action="store_true",
                       help="read whole images through the daemon, too, instead of by the kernel alone")  # fmt: skip
    mount.add_argument("--metrics", metavar="ADDRESS:PORT", type=_address,
                       help="serve metrics to Prometheus; a PORT alone means 127.0.0.1 (default: nowhere)")  # fmt: skip
    mount.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to stderr"
    )
    mount.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info",
                       help="log messages of this level and above")  # fmt: skip
    mount.add_argument(
        "--log-file",
        metavar="FILE",
        help="log to this file (default: syslog; in the foreground stderr)",
    )


def mount_keys() -> tuple[config_key.Key, ...]:
    """Return the keys of a configuration file: everything that `lazyfs mount` takes."""
    scratch = OneLineParser(add_help=False)
    _add_places(scratch)
    _add_mount_options(scratch)
    return config_key.keys_of(scratch._actions)


def _leave_to_configuration(parser: Any) -> None:
    """Leave out what is not given; `configuration` adds it. Each flag gets an opposite that undoes
    the file's flag."""
    keys = {key.dest: key for key in mount_keys()}
    for action in list(parser._actions):
        if action.dest in keys:
            action.default = argparse.SUPPRESS
            if keys[action.dest].is_flag:
                name = keys[action.dest].name
                opposite = name[3:] if name.startswith("no-") else f"no-{name}"
                parser.add_argument(f"--{opposite}", dest=action.dest, action="store_false",
                                    default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip


def _add_config(verbs: Any, run: Verb) -> None:
    config = verbs.add_parser(
        "config",
        help="show the effective configuration",
        description="Show what lazyfs mount would do with a configuration file and these options, and where each value "
        "comes from. The output is itself a configuration file.",
        epilog="example: lazyfs config main --fill-rate 50M",
    )
    config.set_defaults(run=run)
    config.add_argument("config", metavar="NAME|FILE", nargs="?",
                        help="/etc/lazyfs/NAME.toml, or a path with a / or ending in .toml")  # fmt: skip
    config.add_argument("--json", action="store_true", help="print JSON, for programs")
    _add_mount_options(config)
    _leave_to_configuration(config)


def _add_status(verbs: Any, run: Verb) -> None:
    status = verbs.add_parser(
        "status",
        help="show mounts and images",
        description="Show what is mounted, and how much of each image is cached.",
        epilog="example: lazyfs status /var/lib/imagecache/debian-12 --watch",
    )
    status.set_defaults(run=run)
    status.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        help="a mountpoint, or an image or folder on a mount (default: every mount)",
    )
    status.add_argument("--json", action="store_true", help="print JSON, for programs")
    status.add_argument(
        "--watch", action="store_true", help="redraw every second until interrupted"
    )


def _add_images(
    verbs: Any, run: Verb, name: str, summary: str, description: str, example: str
) -> Any:
    """Add a verb that takes images."""
    verb = verbs.add_parser(
        name, help=summary, description=description, epilog=f"example: lazyfs {example}"
    )
    verb.set_defaults(run=run)
    verb.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="path of an image on a mount; a folder means all images below it",
    )
    verb.add_argument("--json", action="store_true", help="print JSON, for programs")
    return verb


def _add_prefetch(verbs: Any, run: Verb) -> None:
    prefetch = _add_images(
        verbs, run, "prefetch", "fetch images now, without a reader",
        "Populate images now, without waiting for a reader. It works on a mount with --no-populate, too.",
        "prefetch /var/lib/imagecache/debian-12 --wait",
    )  # fmt: skip
    prefetch.add_argument(
        "--wait", action="store_true", help="wait until the images are whole, and show progress"
    )
    prefetch.add_argument("--format", choices=shown_file.FORMATS,
                          help="format of the file, and so of its name; only where nothing is cached")  # fmt: skip


def _add_pause(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "pause", "pause population", "Pause the population of images. What readers need is still fetched.",
        "pause /var/lib/imagecache",
    )  # fmt: skip


def _add_resume(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "resume", "resume population", "Resume the population of paused images.",
        "resume /var/lib/imagecache",
    )  # fmt: skip


def _add_cancel(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "cancel", "end population and verification",
        "End the population or verification of images, and keep what is cached. The next first open, or prefetch, "
        "begins population again.",
        "cancel /var/lib/imagecache/debian-12",
    )  # fmt: skip


def _add_set_rate(verbs: Any, run: Verb) -> None:
    set_rate = verbs.add_parser(
        "set-rate",
        help="limit population",
        description="Limit how fast images are populated. For a mountpoint, the limit is for all images together.",
        epilog="example: lazyfs set-rate 50M /var/lib/imagecache/debian-12",
    )
    set_rate.set_defaults(run=run)
    set_rate.add_argument(
        "rate", metavar="BYTES/s", type=_rate_or_none, help="such as 50M; 0 removes the limit"
    )
    set_rate.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="path of an image on a mount; a folder means each image below it",
    )
    set_rate.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_evict(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "evict", "drop what is cached",
        "Drop what is cached of images, and free the space. Processes that have an image open keep reading it. Pinned "
        "images, backing files of overlays and images that are gone from the repository stay.",
        "evict /var/lib/imagecache/debian-11",
    )  # fmt: skip


def _add_pin(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "pin", "protect from eviction",
        "Protect images from eviction, by hand or for space, until they are unpinned.",
        "pin /var/lib/imagecache/debian-12",
    )  # fmt: skip


def _add_unpin(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs,
        run,
        "unpin",
        "undo pin",
        "Let images be evicted again.",
        "unpin /var/lib/imagecache/debian-12",
    )


def _add_map(verbs: Any, run: Verb) -> None:
    image_map = verbs.add_parser(
        "map",
        help="show which ranges are cached",
        description="Show which ranges of an image are cached, are zeroes, or are missing.",
        epilog="example: lazyfs map /var/lib/imagecache/debian-12",
    )
    image_map.set_defaults(run=run)
    image_map.add_argument("image", metavar="IMAGE", help="path of an image on a mount")
    image_map.add_argument(
        "--json", action="store_true", help="print JSON, in the form of qemu-img map"
    )


def _add_verify(verbs: Any, run: Verb) -> None:
    verify = _add_images(
        verbs, run, "verify", "read back what is cached",
        "Read back what is cached of images. Without a digest and --against-repository, only what the disk cannot read "
        "is found. A damaged image is dropped, and fetched again when it is next needed.",
        "verify /var/lib/imagecache/debian-12 --digest sha256:...",
    )  # fmt: skip
    verify.add_argument(
        "--digest", metavar="DIGEST", type=_digest,
        help="digest that the export must have; kept if it is right, or to be compared before the image becomes whole",
    )  # fmt: skip
    verify.add_argument(
        "--against-repository", action="store_true", help="compare with the repository as well"
    )


def _add_forget(verbs: Any, run: Verb) -> None:
    _add_images(
        verbs, run, "forget", "drop images that are gone",
        "Drop images that are gone from the repository, with what is cached of them. Other images in a folder stay.",
        "forget /var/lib/imagecache/debian-9",
    )  # fmt: skip


def _add_pivot(verbs: Any, run: Verb) -> None:
    pivot = verbs.add_parser(
        "pivot",
        help="move running QEMUs to the plain files",
        description="Tell running QEMUs to open their backing files anew. Whole images then need no daemon, and after "
        "a detach QEMU reads the plain files. Guests are not stopped, and overlays are not written to.",
        epilog="example: lazyfs pivot /run/vm-a.qmp /run/vm-b.qmp --wait",
    )
    pivot.set_defaults(run=run)
    pivot.add_argument("sockets", metavar="QMP_SOCKET", nargs="*", help="QMP UNIX socket of a QEMU")
    pivot.add_argument("--all-in", metavar="DIR", help="also take every UNIX socket in this folder")
    pivot.add_argument("--wait", action="store_true", help="wait for images that are not whole yet")
    pivot.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and change nothing"
    )
    pivot.add_argument("--allow-hmp", action="store_true",
                       help="where all nodes have automatic names, use a debugging command of QEMU")  # fmt: skip
    pivot.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_detach(verbs: Any, run: Verb) -> None:
    detach = verbs.add_parser(
        "detach",
        help="unmount under running VMs",
        description="Unmount although files are open. Every open image must be whole. New opens get the plain files, "
        "and the daemon serves open files until they are closed.",
        epilog="example: lazyfs detach /var/lib/imagecache --wait",
    )
    detach.set_defaults(run=run)
    detach.add_argument("mountpoint", metavar="MOUNTPOINT")
    detach.add_argument(
        "--wait", action="store_true", help="populate every open image, and wait until it is whole"
    )


def _add_umount(verbs: Any, run: Verb) -> None:
    umount = verbs.add_parser(
        "umount",
        help="unmount, and wait until everything is saved",
        description="Unmount, and wait until the daemon has saved everything and ended.",
        epilog="example: lazyfs umount /var/lib/imagecache",
    )
    umount.set_defaults(run=run)
    umount.add_argument("mountpoint", metavar="MOUNTPOINT")


def _add_check(verbs: Any, run: Verb) -> None:
    check = verbs.add_parser(
        "check",
        help="check a cache that is not mounted",
        description="Check a cache directory that is not mounted: catalog, maps and files against each other. "
        "Nothing is changed without --repair. The exit code is 1 if something is wrong and not repaired.",
        epilog="example: lazyfs check /var/lib/imagecache --repair",
    )
    check.set_defaults(run=run)
    check.add_argument(
        "cache_dir", metavar="CACHE_DIR", help="the mountpoint, if the cache lies under it"
    )
    check.add_argument("--repair", action="store_true", help="finish or undo what a crash interrupted, and discard "
                       "what cannot be trusted, so that it is fetched again; whole images, and files that lazyfs did "
                       "not make, stay")  # fmt: skip
    check.add_argument("--json", action="store_true", help="print JSON, for programs")


def _uri(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an NBD URI such as nbd://HOST or nbd+unix:///?socket=PATH"
        )
    if parts.path.strip("/"):
        server = text.replace(parts.path, "/" if parts.query else "", 1)
        raise argparse.ArgumentTypeError(
            f"{text!r} names one export; give the server alone: {server}"
        )
    if parts.scheme.endswith("+unix"):
        path = parse_qs(parts.query).get("socket", [""])[0]
        if not os.path.isabs(path):
            raise argparse.ArgumentTypeError(
                f"{text!r} needs an absolute path: {parts.scheme}:///?socket=/PATH"
            )
    elif not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} names no host")
    return text


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size >= 2**63:
        raise argparse.ArgumentTypeError(f"{text:.40} is more than 8 EiB")
    return size


def _digest(text: str) -> str:
    try:
        return digest.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _min_free(text: str) -> str:
    _free_limits(text)
    return text


def _free_limits(text: str) -> Limits:
    if not text.endswith("%"):
        return Limits(min_free=_size(text))
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a percentage from 0% to less than 100%, nor a size"
        )
    return Limits(min_free_percent=percent)


def limits(options: argparse.Namespace) -> Limits:
    """Return the limits on the space that the cache takes."""
    free = Limits() if options.min_free is None else _free_limits(options.min_free)
    return replace(free, max_cache=options.max_cache)


def _rate(text: str) -> int:
    rate = _size(text.removesuffix("/s"))
    if rate < 1:
        raise argparse.ArgumentTypeError(
            "a rate is at least 1 byte per second; --no-populate turns population off"
        )
    return rate


def _rate_or_none(text: str) -> int:
    return 0 if text == "0" else _rate(text)


def _block_size(text: str) -> int:
    return _power_of_two(text, 4 * KiB, shown_file.MAX_BLOCK_SIZE[shown_file.RAW])


def _cluster_size(text: str) -> int:
    return _power_of_two(text, MIN_CLUSTER_SIZE, shown_file.MAX_BLOCK_SIZE[shown_file.QCOW2])


def _power_of_two(text: str, least: int, most: int) -> int:
    size = _size(text)
    if not least <= size <= most or size & (size - 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a power of two from {least // KiB}K to {most // MiB}M"
        )
    return size


def _id(text: str) -> int:
    # The last number means "leave it" to chown(2).
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a user or group number")
    return int(text)


def _address(text: str) -> str:
    """Return "HOST:PORT", with an IPv6 address in brackets."""
    host, _, port = text.rpartition(":") if ":" in text else ("127.0.0.1", "", text)
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ADDRESS:PORT or PORT, with a port from 0 to 65535"
        )
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(
            f"{text!r} needs brackets around an IPv6 address: [::1]:9100"
        )
    if not host.strip("[]"):
        raise argparse.ArgumentTypeError(
            f"{text!r} has no address; 0.0.0.0:{int(port)} is every one of this host"
        )
    return f"{host}:{int(port)}"


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
