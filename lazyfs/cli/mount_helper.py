"""`mount.lazyfs`, which mount(8) runs for `mount -t fuse.lazyfs` and for lines of fstab.

It translates the call into a call of `lazyfs mount`:

    mount -t fuse.lazyfs SPEC DIR -o ...
        runs   /sbin/mount.fuse.lazyfs SPEC DIR [-sfnv] [-N NS] -o ... [-t TYPE]

The exit code is mount(8)'s: 1 for wrong arguments, and 32 if the mount failed.

Source: mount(8), "EXTERNAL HELPERS". With util-linux 2.38.1, mount was seen to pass the following:
"-o rw" comes first even if nobody asked for it; quotes are removed (so a value can never contain a
comma); and all options that `user` implies are included.
"""

import sys
from collections.abc import Mapping, Sequence

from lazyfs import errors
from lazyfs.cli import main as cli
from lazyfs.cli import mount_options, printing
from lazyfs.cli.arguments import OneLineParser

WRONG_ARGUMENTS = 1
MOUNT_FAILED = 32

IGNORED = frozenset(
    {
        # The mount is read-only, nosuid and nodev in any case.
        "ro", "rw", "nosuid", "nodev", "noexec", "nosymfollow",
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "users", "nouser", "owner",
        "group", "comment", "atime", "noatime", "relatime", "norelatime", "strictatime",
        "nostrictatime", "diratime", "nodiratime", "lazytime", "nolazytime", "async",
    }
)  # fmt: skip
"""Options for mount(8), systemd or any file system that make no difference to lazyfs. The module's
docstring says why "rw" is among them."""

_NOT_HERE = ("foreground",)
"""Options of `lazyfs mount` that are not accepted here: mount(8) waits for its helper to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper and return its exit code."""
    try:
        given = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
        words = ["mount", given.spec, given.folder, *translate(given.options, given.sloppy)]
    except errors.UserError as error:
        printing.complain(error, "mount.lazyfs")
        return WRONG_ARGUMENTS
    if given.verbose:
        printing.complain(f"lazyfs {' '.join(words)}", "mount.lazyfs")
    if given.fake:
        return 0
    return {0: 0, 2: WRONG_ARGUMENTS}.get(cli.main(words), MOUNT_FAILED)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="mount.lazyfs",
        description="Mount a repository for mount(8), "
        "which runs this program as /sbin/mount.fuse.lazyfs.",
        epilog="example: mount -t fuse.lazyfs "
        "nbd://images.example.com /var/lib/imagecache -o config=main",
    )
    parser.add_argument("spec", metavar="REPOSITORY", help="NBD URI without an export name")
    parser.add_argument("folder", metavar="MOUNTPOINT", help="an existing folder")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of lazyfs mount without dashes, such as config=main,fill-rate=50M",
    )
    parser.add_argument("-t", dest="type", metavar="TYPE", help="ignored")
    parser.add_argument("-n", dest="no_mtab", action="store_true", help="ignored")
    parser.add_argument(
        "-s", dest="sloppy", action="store_true", help="ignore options that are not known"
    )
    parser.add_argument(
        "-f", dest="fake", action="store_true", help="check the options, and mount nothing"
    )
    parser.add_argument("-v", dest="verbose", action="store_true", help="say what is run")
    return parser


def translate(options: Sequence[str], sloppy: bool = False) -> list[str]:
    """Return the words for `lazyfs mount` to which mount's options translate.

    Args:
        options: the texts after each -o, such as "ro,_netdev,config=main".
        sloppy: whether unknown options are left out instead of refused.

    Raises:
        UsageError: an option is not known, lacks a value, or has a value and must not.
    """
    known: dict[str, bool] = {"config": True}
    """Whether an option takes a value, by its name."""
    known |= {key.name: not key.is_flag for key in mount_options.mount_keys() if not key.required}
    words = []
    for option in filter(None, ",".join(options).split(",")):
        name, equals, _ = option.partition("=")
        if name in IGNORED or name.lower().startswith("x-"):
            continue
        if name not in known or name in _NOT_HERE:
            if sloppy:
                continue
            raise errors.UsageError(f"option {name!r} is not known{_advice(name, known)}")
        if known[name] and not equals:
            raise errors.UsageError(f"option {name} needs a value: {name}=...")
        if equals and not known[name]:
            raise errors.UsageError(f"option {name} takes no value")
        words.append(f"--{option}")
    return words


def _advice(name: str, known: Mapping[str, bool]) -> str:
    if name == "remount":
        return ": lazyfs cannot change a mount; unmount it with lazyfs umount, then mount it again"
    allowed = ", ".join(sorted(known.keys() - set(_NOT_HERE)))
    return (
        f"; there are {allowed} "
        "(a value with a comma cannot be given here: put it in a file, and say config=NAME)"
    )


if __name__ == "__main__":
    sys.exit(main())
