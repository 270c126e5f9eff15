"""Inode numbers on the mount.

Each number follows from the catalog or from a path, so any process can go on with a FUSE
connection:

    1                    the root
    2 ...                an image until it is whole; the number is its key in the catalog
    key | WHOLE_BIT      the same image once it is whole (a plain file)
    FOLDER_BIT | hash    a folder; the hash is of its path

An image gets another number when it becomes whole. The reason is that the kernel refuses to mix
reads through the daemon with reads of the plain file (passthrough) on one inode. Files that were
opened earlier keep the old number. Both numbers give the same bytes.
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
    """Return whether this is the number of a whole image."""
    return not inode & FOLDER_BIT and inode & WHOLE_BIT != 0


def key(inode: int) -> int:
    """Return an image's key in the catalog; `inode` may be either of the image's two numbers."""
    return inode & ~WHOLE_BIT if is_whole(inode) else inode
