"""The verbs of the `lazyfs` command. Each is declared once, in VERBS.

The parser, the bash completion and the tests of the documents are made from VERBS.
"""

from lazyfs.cli import (
    checking,
    configuration,
    doctor,
    image_verbs,
    mount_options,
    mounting,
    pivoting,
    status,
    unmounting,
    upgrading,
    values,
)
from lazyfs.cli.arguments import OneLineParser, Verb
from lazyfs.core import shown_file
from lazyfs.core.lifecycle import State


def _add_status(parser: OneLineParser) -> None:
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="*",
        help="a mountpoint, or an image or folder on a mount (default: every mount)",
    )
    _add_json(parser)
    parser.add_argument(
        "--watch", action="store_true", help="redraw every second until interrupted"
    )
    parser.add_argument(
        "--state",
        choices=[state.value for state in State],
        action="append",
        help="show only images in this state; can be given several times",
    )
    parser.add_argument(
        "--sort",
        choices=status.SORTS,
        help="order of images: by name (default), size, what is present, last use, or those first "
        "that are being filled or are open (default of --watch)",
    )


def _add_images(parser: OneLineParser) -> None:
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="path of an image on a mount; a folder means all images below it",
    )
    _add_json(parser)


def _add_json(parser: OneLineParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_evict(parser: OneLineParser) -> None:
    _add_images(parser)
    parser.add_argument(
        "--all", action="store_true", help="let a mountpoint stand for every image on it"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be evicted, and change nothing"
    )


def _add_prefetch(parser: OneLineParser) -> None:
    _add_images(parser)
    parser.add_argument(
        "--wait", action="store_true", help="wait until the images are whole, and show progress"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=values.seconds,
        help="with --wait: fail if they are not whole after this time",
    )
    parser.add_argument(
        "--format",
        choices=shown_file.FORMATS,
        help="format of the file, and so of its name; only where nothing is cached",
    )


def _add_set_rate(parser: OneLineParser) -> None:
    parser.add_argument(
        "rate",
        metavar="BYTES/s",
        type=values.rate_or_none,
        help="such as 50M; 0 removes the limit",
    )
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="path of an image on a mount; a folder means each image below it",
    )
    _add_json(parser)


def _add_map(parser: OneLineParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="path of an image on a mount")
    parser.add_argument(
        "--json", action="store_true", help="print JSON, in the form of qemu-img map"
    )


def _add_verify(parser: OneLineParser) -> None:
    _add_images(parser)
    parser.add_argument(
        "--digest",
        metavar="DIGEST",
        type=values.image_digest,
        help="digest that the export must have; kept if it is right, or to be compared before the "
        "image becomes whole",
    )
    parser.add_argument(
        "--against-repository", action="store_true", help="compare with the repository as well"
    )
    parser.add_argument(
        "--drop",
        action="store_true",
        help="drop what differs from the repository, unless it is pinned, open or the backing "
        "file of an overlay",
    )


def _add_pivot(parser: OneLineParser) -> None:
    parser.add_argument(
        "sockets", metavar="QMP_SOCKET", nargs="*", help="QMP UNIX socket of a QEMU"
    )
    parser.add_argument(
        "--all-in", metavar="DIR", help="also take every UNIX socket in this folder"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for images that are not whole yet"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and change nothing"
    )
    parser.add_argument(
        "--allow-hmp",
        action="store_true",
        help="where all nodes have automatic names, use a debugging command of QEMU",
    )
    _add_json(parser)


def _add_detach(parser: OneLineParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "--wait", action="store_true", help="populate every open image, and wait until it is whole"
    )


def _add_upgrade(parser: OneLineParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    parser.add_argument("--all", action="store_true", help="upgrade every mount of this user")


def _add_umount(parser: OneLineParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="unmount although it is in use; the daemon serves what is open until it is closed",
    )


def _add_doctor(parser: OneLineParser) -> None:
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="a mount to look at as well"
    )


def _add_check(parser: OneLineParser) -> None:
    parser.add_argument(
        "cache_dir", metavar="CACHE_DIR", help="the mountpoint, if the cache lies under it"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="finish or undo what a crash interrupted, and discard what cannot be trusted, so that "
        "it is fetched again; whole images, and files that lazyfs did not make, stay",
    )
    _add_json(parser)


VERBS = (
    Verb(
        "mount",
        "mount a repository",
        "Mount a repository. Every export becomes a read-only file, fetched when it is read, "
        "and kept.",
        "nbd://images.example.com /var/lib/imagecache",
        mount_options.add_to_mount,
        mounting.run,
    ),
    Verb(
        "status",
        "show mounts and images",
        "Show what is mounted, and how much of each image is cached.",
        "/var/lib/imagecache/debian-12 --watch",
        _add_status,
        status.run,
    ),
    Verb(
        "prefetch",
        "fetch images now, without a reader",
        "Populate images now, without waiting for a reader. "
        "It works on a mount with --no-populate, too.",
        "/var/lib/imagecache/debian-12 --wait",
        _add_prefetch,
        image_verbs.prefetch,
    ),
    Verb(
        "pause",
        "pause population",
        "Pause the population of images. What readers need is still fetched.",
        "/var/lib/imagecache",
        _add_images,
        image_verbs.pause,
    ),
    Verb(
        "resume",
        "resume population",
        "Resume the population of paused images.",
        "/var/lib/imagecache",
        _add_images,
        image_verbs.resume,
    ),
    Verb(
        "cancel",
        "end population and verification",
        "End the population or verification of images, and keep what is cached. "
        "The next first open, or prefetch, begins population again.",
        "/var/lib/imagecache/debian-12",
        _add_images,
        image_verbs.cancel,
    ),
    Verb(
        "set-rate",
        "limit population",
        "Limit how fast images are populated. "
        "For a mountpoint, the limit is for all images together.",
        "50M /var/lib/imagecache/debian-12",
        _add_set_rate,
        image_verbs.set_rate,
    ),
    Verb(
        "evict",
        "drop what is cached",
        "Drop what is cached of images, and free the space. Processes that have an image open keep "
        "reading it. Pinned images, backing files of overlays and images that are gone from the "
        "repository stay.",
        "/var/lib/imagecache/debian-11",
        _add_evict,
        image_verbs.evict,
    ),
    Verb(
        "pin",
        "protect from eviction",
        "Protect images from eviction, by hand or for space, until they are unpinned.",
        "/var/lib/imagecache/debian-12",
        _add_images,
        image_verbs.pin,
    ),
    Verb(
        "unpin",
        "undo pin",
        "Let images be evicted again.",
        "/var/lib/imagecache/debian-12",
        _add_images,
        image_verbs.unpin,
    ),
    Verb(
        "map",
        "show which ranges are cached",
        "Show which ranges of an image are cached, are zeroes, or are missing.",
        "/var/lib/imagecache/debian-12",
        _add_map,
        image_verbs.map_image,
    ),
    Verb(
        "verify",
        "read back what is cached",
        "Read back what is cached of images. Without a digest and --against-repository, only what "
        "the disk cannot read is found. A damaged image is dropped, and fetched again when it is "
        "next needed. An image that differs from the repository is kept, unless --drop is given.",
        "/var/lib/imagecache/debian-12 --digest sha256:...",
        _add_verify,
        image_verbs.verify,
    ),
    Verb(
        "forget",
        "drop images that are gone",
        "Drop images that are gone from the repository, with what is cached of them. "
        "Other images in a folder stay.",
        "/var/lib/imagecache/debian-9",
        _add_images,
        image_verbs.forget,
    ),
    Verb(
        "pivot",
        "move running QEMUs to the plain files",
        "Tell running QEMUs to open their backing files anew. Whole images then need no daemon, "
        "and after a detach QEMU reads the plain files. Guests are not stopped, and overlays are "
        "not written to.",
        "/run/vm-a.qmp /run/vm-b.qmp --wait",
        _add_pivot,
        pivoting.run,
    ),
    Verb(
        "detach",
        "unmount under running VMs",
        "Unmount although files are open. Every open image must be whole. "
        "New opens get the plain files, and the daemon serves open files until they are closed.",
        "/var/lib/imagecache --wait",
        _add_detach,
        unmounting.detach,
    ),
    Verb(
        "umount",
        "unmount, and wait until everything is saved",
        "Unmount, and wait until the daemon has saved everything and ended.",
        "/var/lib/imagecache",
        _add_umount,
        unmounting.umount,
    ),
    Verb(
        "upgrade",
        "let the installed version take over mounts",
        "Replace the daemon of a mount by one of the version of lazyfs that runs this command. "
        "Files that are open stay open. If the new version does not answer in 10 s, the one before "
        "it starts again.",
        "/var/lib/imagecache",
        _add_upgrade,
        upgrading.run,
    ),
    Verb(
        "check",
        "check a cache that is not mounted",
        "Check a cache directory that is not mounted: catalog, maps and files against each other. "
        "Nothing is changed without --repair. "
        "The exit code is 1 if something is wrong and not repaired.",
        "/var/lib/imagecache --repair",
        _add_check,
        checking.run,
    ),
    Verb(
        "doctor",
        "look for what makes mounts fail",
        "Look at what makes mounts fail or slow: the kernel, rights, libraries, limits, and of a "
        "mount its repository, disk and images. Prints a line about each. "
        "The exit code is 1 if something keeps lazyfs from working.",
        "/var/lib/imagecache",
        _add_doctor,
        doctor.run,
    ),
    Verb(
        "config",
        "show the effective configuration",
        "Show what lazyfs mount would do with a configuration file and these options, and where "
        "each value comes from. The output is itself a configuration file.",
        "main --fill-rate 50M",
        mount_options.add_to_config,
        configuration.run,
    ),
)
"""All verbs, in the order of `lazyfs --help`."""
