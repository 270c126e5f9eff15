"""Inode numbers: each follows from the catalog or from a path, so any process can go on with a connection.

    1                    the root
    2 ...                an image, by its key in the catalog, until it is whole
    key | WHOLE_BIT      the same image once it is whole: the plain file
    FOLDER_BIT | hash    a folder, by its path

An image changes its number when it becomes whole, because the kernel refuses to mix reads through the daemon and
reads of the plain file (passthrough) on one inode: files that were opened earlier stay on the old number. The
bytes are the same.
"""

import hashlib

ROOT = 1
FOLDER_BIT = 1 << 62
WHOLE_BIT = 1 << 61


def folder(path: str) -> int:
    """Return the number of the folder at `path`, relative to the mountpoint."""
    digest = hashlib.sha256(path.encode()).digest()
    return FOLDER_BIT | int.from_bytes(digest[:8], "little") >> 3


def whole(key: int) -> int:
    """Return the number that the image with this key has once it is whole."""
    return key | WHOLE_BIT


def is_whole(inode: int) -> bool:
    """Whether this is the number of a whole image."""
    return not inode & FOLDER_BIT and inode & WHOLE_BIT != 0


def key(inode: int) -> int:
    """Return an image's key in the catalog, whichever of its two numbers `inode` is."""
    return inode & ~WHOLE_BIT if is_whole(inode) else inode
