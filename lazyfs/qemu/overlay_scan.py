"""Finds which images are backing files of the qcow2 files below some folders, by reading headers.

Runs beside a mount that it must never ask (doc/CONCURRENCY.md): paths are resolved by hand, one part after the other,
and what lies at or below a lazyfs mount is taken by its name only. Symlinks below the folders are not followed; those
in the names of backing files are, as QEMU does.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from lazyfs import errors
from lazyfs.core import overlay
from lazyfs.host import mounts

_MAX_LINKS = 40
"""Symlinks in one path, as in Linux."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
"""Of a name that leads nowhere: QEMU could not open it either. Or it was removed while we looked."""


class OverlayScan:
    """The overlays of one host, as far as they concern one mount. Blocks; any thread."""

    def __init__(
        self,
        folders: Sequence[str],
        mountpoint: str,
        cache_dir: str,
        lazyfs_mounts: Callable[[], Iterable[mounts.Mount]] = mounts.lazyfs_mounts,
    ) -> None:
        """All paths absolute and without symlinks; `cache_dir` has the same images, as plain files."""
        self._folders = folders
        self._mountpoint = mountpoint
        self._cache_dir = cache_dir
        self._lazyfs_mounts = lazyfs_mounts

    def backing_files(self) -> frozenset[str]:
        """Return the images that overlays need, by their path relative to the mountpoint.

        Raises:
            UserError: a folder or a file cannot be read, so there may be more.
        """
        elsewhere = {mount.mountpoint for mount in self._lazyfs_mounts()}
        return _Scan(self._mountpoint, self._cache_dir, elsewhere).of(self._folders)


class _Scan:
    """One scan: what has been seen, and what was found."""

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
                        if path in self._no_go:  # before any question about it
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(path)
                        elif entry.is_file(follow_symlinks=False):
                            yield path
            except OSError as error:
                if (
                    error.errno != errno.ENOENT or folder == top
                ):  # or it was removed since its parent was read
                    raise _unreadable(folder, error) from error

    def _backings_of(self, path: str, only_files: bool) -> list[str]:
        """Return the paths of what a file says it lies upon, images noted and left out where that ends the chain."""
        try:
            names, raw = _read_names(path, only_files)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise _unreadable(path, error) from error
        paths = [os.path.join(os.path.dirname(path), name) for name in names]
        for backing in paths:
            self._note(
                os.path.normpath(backing)
            )  # as it reads, too: somebody may have moved a symlink
        if raw:  # what a guest wrote there is no header
            for backing in paths:
                self._lead_to(backing)
            return []
        return paths

    def _lead_to(self, path: str) -> str | None:
        """Return the file that a path leads to; note it if it is an image. None if it may not, or cannot, be opened."""
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
        """realpath(3), except that nothing at or below a lazyfs mount is asked for."""
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
    """Read what a file says its backing file is, and whether that is raw; ([], False) if it has none or is no qcow2.

    Raises:
        OSError.
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
    """A chain may lead to a block device; anything else is not even opened, as that may do something."""
    return stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and not only_files)


def _unreadable(path: str, error: OSError) -> errors.UserError:
    return errors.UserError(f"{path} cannot be read ({error.strerror}), and overlays may be there")
