"""The options of a mount. They are declared once, and used three times:

`lazyfs mount` takes them, `lazyfs config` takes them but for the places, and each one is a key of a
configuration file.
"""

import argparse
import os

from lazyfs.cli import values
from lazyfs.cli.arguments import OneLineParser
from lazyfs.core import config_key, export_name, shown_file


def add_to_mount(parser: OneLineParser) -> None:
    """Add the arguments of `lazyfs mount`."""
    _add_places(parser)
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="read what is not given here from /etc/lazyfs/NAME.toml, or from FILE, a path that "
        "has a / or ends in .toml; REPOSITORY and MOUNTPOINT can be there, too",
    )
    parser.add_argument(
        "--moved",
        action="store_true",
        help="take over a cache that was filled from this repository at another address",
    )
    _add_options(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    _leave_to_configuration(parser)


def add_to_config(parser: OneLineParser) -> None:
    """Add the arguments of `lazyfs config`."""
    parser.add_argument(
        "config",
        metavar="NAME|FILE",
        nargs="?",
        help="/etc/lazyfs/NAME.toml, or a path with a / or ending in .toml",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    _add_options(parser)
    _leave_to_configuration(parser)


def mount_keys() -> tuple[config_key.Key, ...]:
    """Return the keys that a configuration file can have."""
    scratch = OneLineParser(add_help=False)
    _add_places(scratch)
    _add_options(scratch)
    return config_key.keys_of(scratch.arguments)


def _add_places(parser: OneLineParser) -> None:
    repository = parser.add_argument(
        "repository",
        metavar="REPOSITORY",
        type=values.uri,
        help="NBD URI of a server, without the name of an export",
    )
    mountpoint = parser.add_argument(
        "mountpoint",
        metavar="MOUNTPOINT",
        help="an existing folder; by default it also holds the cache",
    )
    # With nargs="?", argparse would take both as not given when an option stands between them.
    repository.required = mountpoint.required = False


def _add_options(parser: OneLineParser) -> None:
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="keep the cache in this folder, made if its parent exists (default: the mountpoint)",
    )
    parser.add_argument(
        "--trust-cache-owner",
        action="store_true",
        help="as root, use a cache folder that belongs to another user, or that others may write "
        "to: they can then change what every VM reads",
    )
    parser.add_argument(
        "--format",
        choices=shown_file.FORMATS,
        default=shown_file.RAW,
        help="format of images new to this cache: raw (default), or qcow2, shown as NAME.qcow2",
    )
    parser.add_argument(
        "--block-size",
        metavar="SIZE",
        type=values.block_size,
        help="unit in which raw images are fetched, a power of two from 4K to 4M (default: 64K)",
    )
    parser.add_argument(
        "--cluster-size",
        metavar="SIZE",
        type=values.cluster_size,
        help="cluster size of qcow2 images, a power of two from 4K to 2M (default: 64K)",
    )
    parser.add_argument(
        "--no-populate",
        action="store_true",
        help="fetch only what is read, and nothing in the background",
    )
    parser.add_argument(
        "--fill-rate",
        metavar="BYTES/s",
        type=values.rate,
        help="limit population to this rate, such as 50M or 1GiB",
    )
    parser.add_argument(
        "--io-timeout",
        metavar="SECONDS",
        type=values.seconds,
        default=120.0,
        help="how long a read waits for the repository before it fails (default: 120)",
    )
    parser.add_argument(
        "--refresh",
        metavar="SECONDS",
        type=values.seconds,
        default=60.0,
        help="how often the repository is asked for its list of exports (default: 60)",
    )
    parser.add_argument(
        "--on-change",
        choices=["keep", "replace"],
        default="keep",
        help="when an export changes, keep the cached version (default) or replace it",
    )
    parser.add_argument(
        "--max-cache",
        metavar="SIZE",
        type=values.size,
        help="evict images, used longest ago first, when the cache takes more than this "
        "(default: never)",
    )
    parser.add_argument(
        "--min-free",
        metavar="SIZE|PERCENT",
        type=values.min_free,
        help="evict images, used longest ago first, when less of the cache's disk is free, "
        "such as 20G or 10%% (default: never)",
    )
    parser.add_argument(
        "--overlays",
        metavar="DIR",
        action="append",
        help="never evict backing files of the qcow2 files below this folder; "
        "can be given several times",
    )
    parser.add_argument(
        "--mode",
        metavar="OCTAL",
        type=values.mode,
        default=0o444,
        help="mode of files; write bits are shown, and writes fail all the same (default: 0444)",
    )
    parser.add_argument(
        "--uid",
        metavar="N",
        type=values.owner,
        default=os.geteuid(),
        help="owner of files (default: yours)",
    )
    parser.add_argument(
        "--gid",
        metavar="N",
        type=values.owner,
        default=os.getegid(),
        help="group of files (default: yours)",
    )
    parser.add_argument(
        "--names",
        choices=export_name.NAMES,
        default=export_name.EXPORT,
        help="names of images new to this cache: those of their exports (default), or their SHA-1",
    )
    parser.add_argument(
        "--allow-evict", action="store_true", help="let rm, or unlink(2), evict an image"
    )
    parser.add_argument(
        "--no-passthrough",
        action="store_true",
        help="read whole images through lazyfs instead of by the kernel alone",
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS:PORT",
        type=values.address,
        help="serve metrics to Prometheus; a PORT alone means 127.0.0.1 (default: nowhere)",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to stderr"
    )
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="log messages of this level and above",
    )
    parser.add_argument(
        "--log-file",
        metavar="FILE",
        help="log to this file (default: syslog; in the foreground stderr)",
    )


def _leave_to_configuration(parser: OneLineParser) -> None:
    """Keep what the user does not give out of the namespace; `configuration` adds it later.

    Each flag gets a hidden opposite, with which the user can undo the file's flag.
    """
    known = {key.dest: key for key in mount_keys()}
    for action in list(parser.arguments):
        if action.dest in known:
            action.default = argparse.SUPPRESS
            if known[action.dest].is_flag:
                name = known[action.dest].name
                opposite = name[3:] if name.startswith("no-") else f"no-{name}"
                parser.add_argument(
                    f"--{opposite}",
                    dest=action.dest,
                    action="store_false",
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )
