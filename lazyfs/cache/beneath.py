"""Reaches files beneath one folder by their paths, and never leaves it.

A path such as "team/debian-12" is looked up part by part, and no part may be a symbolic link. So
whoever can write to a folder of the cache cannot lead lazyfs elsewhere, which runs as root.
(openat2(2) could do the same in one call, since Linux 5.6. Most paths have one part.)

Folders of our own are kept open once they have been checked: what somebody puts in their place
later is not looked at.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Beneath:
    """Holds an open folder. Its methods block, and may be called in any thread."""

    def __init__(self, fd: int) -> None:
        """Work beneath the folder that is open as `fd`. The caller closes `fd`, after `close`."""
        self.fd = fd
        self._kept: dict[str, int] = {}

    def close(self) -> None:
        """Close the folders that are kept open. No other method may be called any more."""
        while self._kept:
            os.close(self._kept.popitem()[1])

    def keep(self, folder: str) -> int:
        """Keep a folder open from now on, and return its descriptor.

        Raises:
            OSError: it is no folder, or cannot be opened.
        """
        if folder not in self._kept:
            with self._parent(folder) as (parent, name):
                self._kept[folder] = os.open(name, _FOLDER, dir_fd=parent)
        return self._kept[folder]

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open a file as open(2) does. A symbolic link is never followed (ELOOP, ENOTDIR)."""
        with self._parent(path) as (parent, name):
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=parent)

    def stat(self, path: str) -> os.stat_result:
        """Return the attributes of a file as lstat(2) does."""
        with self._parent(path) as (parent, name):
            return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def mkdir(self, path: str, mode: int) -> None:
        """Make a folder as mkdir(2) does."""
        with self._parent(path) as (parent, name):
            os.mkdir(name, mode, dir_fd=parent)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder as rmdir(2) does."""
        with self._parent(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def unlink(self, path: str) -> None:
        """Remove a name as unlink(2) does."""
        with self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def link(self, old: str, new: str) -> None:
        """Give a file another name as link(2) does."""
        with self._parent(old) as (source, name), self._parent(new) as (target, other):
            os.link(name, other, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def rename(self, old: str, new: str) -> None:
        """Change the name of a file as rename(2) does."""
        with self._parent(old) as (source, name), self._parent(new) as (target, other):
            os.rename(name, other, src_dir_fd=source, dst_dir_fd=target)

    def sync_folder(self, folder: str) -> None:
        """Make durable which names are in a folder. "" is the folder itself."""
        with self._folder(folder) as fd:
            os.fsync(fd)

    def listdir(self, folder: str) -> list[str]:
        """Return the names in a folder. "" is the folder itself."""
        with self._folder(folder) as fd:
            # Opened anew, because those who list the same open folder share a position in it.
            listed = os.open(".", _FOLDER, dir_fd=fd)
            try:
                return os.listdir(listed)
            finally:
                os.close(listed)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """Yield an open folder and the last part of `path`, which is a name in it.

        An error inside the block names the whole path.
        """
        folder, _, name = path.rpartition("/")
        _check(name, path)
        try:
            with self._folder(folder) as fd:
                yield fd, name
        except OSError as error:
            error.filename = path
            raise

    @contextmanager
    def _folder(self, folder: str) -> Iterator[int]:
        if folder in self._kept:
            yield self._kept[folder]
            return
        at = self.fd
        try:
            for part in folder.split("/") if folder else []:
                _check(part, folder)
                below = os.open(part, _FOLDER, dir_fd=at)
                if at != self.fd:
                    os.close(at)
                at = below
            yield at
        finally:
            if at != self.fd:
                os.close(at)


def _check(name: str, path: str) -> None:
    """Raise OSError if a part of a path, which may come from a damaged catalog, is no name."""
    if name in ("", ".", "..") or "\0" in name:
        raise OSError(errno.EINVAL, "it is no path in the cache", path)
