"""Finds which images are backing files of the qcow2 files below some folders, by reading headers.

The scan runs in the daemon, so it must never ask the daemon's own mount (doc/CONCURRENCY.md). For
this reason it resolves paths itself, one component after the other, and of a file at or below a
lazyfs mount it uses only the name. It does not follow symlinks below the folders. It follows
symlinks in the names of backing files, as QEMU does.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from lazyfs import errors
from lazyfs.core import overlay
from lazyfs.host import mounts

_MAX_LINKS = 40
"""The largest number of symlinks in one path, as in Linux."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
"""Errors for a name that leads nowhere. QEMU could not open it either, or it was removed during the
scan."""


class OverlayScan:
    """Finds the overlays on one host that concern one mount.

    Its method blocks, and any thread may call it.
    """

    def __init__(
        self,
        folders: Sequence[str],
        mountpoint: str,
        cache_dir: str,
        lazyfs_mounts: Callable[[], Iterable[mounts.Mount]] = mounts.lazyfs_mounts,
    ) -> None:
        """All paths are absolute and have no symlinks.

        Args:
            folders: where to look for overlays.
            mountpoint: where the mount shows the images.
            cache_dir: the folder that has the same images as plain files.
            lazyfs_mounts: returns all lazyfs mounts of the host.
        """
        self._folders = folders
        self._mountpoint = mountpoint
        self._cache_dir = cache_dir
        self._lazyfs_mounts = lazyfs_mounts

    def set_folders(self, folders: Sequence[str]) -> None:
        """Look in these folders from now on."""
        self._folders = folders

    def backing_files(self) -> frozenset[str]:
        """Return the images that overlays need, as paths relative to the mountpoint.

        Raises:
            UserError: a folder or a file cannot be read, so overlays may exist that were not found.
        """
        elsewhere = {mount.mountpoint for mount in self._lazyfs_mounts()}
        return _Scan(self._mountpoint, self._cache_dir, elsewhere).of(self._folders)


class _Scan:
    """Does one scan, and holds which files it has seen and which images it has found."""

    def __init__(self, mountpoint: str, cache_dir: str, lazyfs_mounts: set[str]) -> None:
        self._ours = dict.fromkeys([mountpoint, cache_dir])
        self._no_go = lazyfs_mounts | {mountpoint}
        self._seen: set[str] = set()
        self._found: set[str] = set()

    def of(self, folders: Sequence[str]) -> frozenset[str]:
        pending: list[str] = []
        for folder in folders:
            for path in self._files_below(folder):
                pending += self._backings_of(path, only_files=True)
        while pending:
            file = self._lead_to(pending.pop())
            if file is not None and file not in self._seen:
                self._seen.add(file)
                pending += self._backings_of(file, only_files=False)
        return frozenset(self._found)

    def _files_below(self, top: str) -> Iterator[str]:
        pending = [top]
        while pending:
            folder = pending.pop()
            if folder in self._no_go:
                continue
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = os.path.join(folder, entry.name)
                        if path in self._no_go:  # A stat or open there would ask the mount.
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(path)
                        elif entry.is_file(follow_symlinks=False):
                            yield path
            except OSError as error:
                # A folder that is gone was removed after its parent was read.
                if error.errno != errno.ENOENT or folder == top:
                    raise _unreadable(folder, error) from error

    def _backings_of(self, path: str, only_files: bool) -> list[str]:
        """Return the paths of the backing files that a file names, and note those that are images.

        The result is empty if the chain ends there, because the backing file is raw.
        """
        try:
            names, raw = _read_names(path, only_files)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise _unreadable(path, error) from error
        paths = [os.path.join(os.path.dirname(path), name) for name in names]
        for backing in paths:
            # The path as it is written counts, too: a symlink in it may have been changed.
            self._note(os.path.normpath(backing))
        if raw:  # A guest wrote the content of a raw file, so a header in it means nothing.
            for backing in paths:
                self._lead_to(backing)
            return []
        return paths

    def _lead_to(self, path: str) -> str | None:
        """Return the file that a path leads to, and note it if it is an image.

        The result is None if the file does not exist, or must not be opened.
        """
        try:
            resolved = self._resolve(path)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise _unreadable(path, error) from error
        self._note(resolved)
        return None if self._is_no_go(resolved) else resolved

    def _note(self, path: str) -> None:
        for place in self._ours:
            if path.startswith(place.rstrip("/") + "/"):
                self._found.add(path[len(place.rstrip("/")) + 1 :])

    def _resolve(self, path: str) -> str:
        """Return what realpath(3) does, but without asking anything at or below a lazyfs mount."""
        done = "/"
        parts = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        links = 0
        while parts:
            part = parts.pop()
            if part == "..":
                done = os.path.dirname(done)
                continue
            done = os.path.join(done, part)
            # There are no symlinks on a lazyfs mount.
            if self._is_no_go(done) or not stat.S_ISLNK(os.lstat(done).st_mode):
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(done)
            done = "/" if target.startswith("/") else os.path.dirname(done)
            parts += [part for part in reversed(target.split("/")) if part not in ("", ".")]
        return done

    def _is_no_go(self, path: str) -> bool:
        return any(
            path == place or path.startswith(place.rstrip("/") + "/") for place in self._no_go
        )


def _read_names(path: str, only_files: bool) -> tuple[list[str], bool]:
    """Return the names in a file's header for its backing file, and whether that file is raw.

    The result is ([], False) if the file names no backing file or is not a qcow2.

    Raises:
        OSError: the file cannot be read.
    """
    if not _has_header(os.lstat(path).st_mode, only_files):
        return [], False
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not _has_header(os.fstat(fd).st_mode, only_files):
            return [], False
        at = overlay.find_name(os.pread(fd, overlay.HEADER_SIZE, 0))
        if at is None:
            return [], False
        return overlay.paths_of(os.pread(fd, at.length, at.offset)), at.format == "raw"
    finally:
        os.close(fd)


def _has_header(mode: int, only_files: bool) -> bool:
    """Return whether the file may be opened to look for a header.

    A chain of backing files may lead to a block device. Other kinds of file are not opened, because
    opening them can have effects.
    """
    return stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and not only_files)


def _unreadable(path: str, error: OSError) -> errors.UserError:
    return errors.UserError(f"{path} cannot be read ({error.strerror}), and overlays may be there")
