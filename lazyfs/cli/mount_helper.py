"""`mount.lazyfs`: what mount(8) runs for `mount -t fuse.lazyfs` and for lines of fstab. Makes a `lazyfs mount` of it.

    mount -t fuse.lazyfs SPEC DIR -o ...   runs   /sbin/mount.fuse.lazyfs SPEC DIR [-sfnv] [-N NS] -o ... [-t TYPE]

The exit code is mount(8)'s: 1 for wrong arguments, 32 when the mount failed.

Source: mount(8), "EXTERNAL HELPERS". What mount passes was seen with util-linux 2.38.1: "-o rw" stands in front also
where nobody asked for it, quotes are gone (so a value can never hold a comma), and all that `user` implies is there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

from lazyfs import errors
from lazyfs.cli import arguments as arguments_of
from lazyfs.cli import main as cli

WRONG_ARGUMENTS = 1
MOUNT_FAILED = 32

IGNORED = frozenset(
    {
        "ro", "rw", "nosuid", "nodev", "noexec", "nosymfollow",  # it is read-only, nosuid and nodev by itself
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "users", "nouser", "owner", "group", "comment",
        "atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime",
        "lazytime", "nolazytime", "async",
    }
)  # fmt: skip
"""Options for mount(8), systemd or any file system, which make no difference here. For "rw" see above."""

_NOT_HERE = ("foreground",)
"""mount(8) waits for its helper to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper; return its exit code."""
    try:
        given = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
        words = ["mount", given.spec, given.folder, *translate(given.options, given.sloppy)]
    except errors.UserError as error:
        print(f"mount.lazyfs: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    if given.verbose:
        print(f"mount.lazyfs: lazyfs {' '.join(words)}", file=sys.stderr)
    if given.fake:
        return 0
    return {0: 0, 2: WRONG_ARGUMENTS}.get(cli.main(words), MOUNT_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = arguments_of.OneLineParser(
        prog="mount.lazyfs",
        description="Mount a repository as mount(8) has it done, which finds this as /sbin/mount.fuse.lazyfs.",
        epilog="example: mount -t fuse.lazyfs nbd://images.example.com /var/lib/imagecache -o config=main",
    )
    parser.add_argument("spec", metavar="REPOSITORY", help="NBD URI without an export name")
    parser.add_argument("folder", metavar="MOUNTPOINT", help="an existing folder")
    parser.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[],
                        help="options of lazyfs mount without dashes, such as config=main,fill-rate=50M")  # fmt: skip
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
    """Return the words for `lazyfs mount` that mount's options stand for.

    Args:
        options: each a text after -o, such as "ro,_netdev,config=main".
        sloppy: leave out those that are not known.

    Raises:
        UsageError: an option is not known, or has a value and must not, or the other way round.
    """
    known: dict[str, bool] = {"config": True}
    """Whether it takes a value."""
    known |= {key.name: not key.is_flag for key in arguments_of.mount_keys() if not key.required}
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
        return ": lazyfs cannot change a mount; lazyfs umount it and mount it again"
    allowed = ", ".join(sorted(known.keys() - set(_NOT_HERE)))
    return f"; there are {allowed} (a value with a comma cannot be given here: put it in a file, and say config=NAME)"


if __name__ == "__main__":
    sys.exit(main())
