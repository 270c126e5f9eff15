"""Opens the catalog of a cache directory, and nothing else that somebody may have put there."""

import os
import stat
from contextlib import suppress

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.catalog import SqliteCatalog
from lazyfs.cache.reserve import Reserve

STATE = ".lazyfs"
"""The folder of lazyfs's own files in a cache directory."""

CATALOG = f"{STATE}/catalog.sqlite"


def exists(root: Beneath, path: str) -> bool:
    """Return whether there is something at a path of the cache."""
    try:
        root.stat(path)
    except FileNotFoundError:
        return False
    return True


def open_catalog(root: Beneath, path: str, reserve: Reserve | None = None) -> SqliteCatalog:
    """Open the catalog of the cache at `path`, which is open as `root`.

    SQLite takes a path, and follows symbolic links. So it is given the state folder by its
    descriptor, and what it has opened is compared with what is there.

    Raises:
        UserError: the catalog is no plain file, or the state folder was replaced meanwhile.
        CacheCorrupt, NoSpace, OSError: as for `SqliteCatalog`.
    """
    check_catalog_file(root, path)
    catalog = SqliteCatalog(
        f"/proc/self/fd/{root.keep(STATE)}/{os.path.basename(CATALOG)}", reserve
    )
    if not _is_open(root.stat(CATALOG)):
        catalog.close()
        raise errors.LastingError(
            f"{path}/{STATE} was replaced by somebody; look who may write there"
        )
    return catalog


def _is_open(file: os.stat_result) -> bool:
    """Return whether this process has a file open."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found = os.stat(f"/proc/self/fd/{name}")
            if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
                return True
    return False


def check_catalog_file(root: Beneath, path: str) -> None:
    """Check that the catalog is a plain file, because SQLite would follow a symbolic link.

    Raises:
        UserError: the catalog of the cache at `path` is a symbolic link or a folder.
    """
    try:
        found = root.stat(CATALOG)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise errors.UserError(
            f"{path}/{CATALOG} is not a plain file; remove it, or use --cache-dir"
        )
