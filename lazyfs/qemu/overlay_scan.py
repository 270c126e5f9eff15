"""Finds which images are backing files of the qcow2 files below some folders, by reading headers.

The scan runs in the daemon, so it must never ask the daemon's own mount (doc/CONCURRENCY.md). For
this reason it resolves paths itself, one component after the other, and of a file at or below a
lazyfs mount it uses only the name. It does not follow symlinks below the folders. It follows
symlinks in the names of backing files, as QEMU does.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from lazyfs import errors
from lazyfs.core import overlay
from lazyfs.host import mounts

logger = logging.getLogger(__name__)

_MAX_LINKS = 40
"""The largest number of symlinks in one path, as in Linux."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
"""Errors for a name that leads nowhere. QEMU could not open it either, or it was removed during the
scan."""

_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that say something of this process. Any other error for a backing file ends its chain,
with a warning: an overlay may belong to a tenant, who can name any file."""

_THEIRS = frozenset({errno.EAGAIN})
"""Errors that the owner of an overlay can cause for the overlay itself: a lease. It is left out,
with a warning. Errors of a file system (ETIMEDOUT, ESTALE) would hide the overlays of all."""

MAX_WARNINGS = 20

MAX_DEPTH = 64
"""How many folders deep overlays are looked for. Each takes a descriptor meanwhile."""


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        strangers: Callable[[], Iterable[str]] = mounts.mountpoints_of_users,
    ) -> None:
        """All paths are absolute and have no symlinks.

        Args:
            folders: where to look for overlays.
            mountpoint: where the mount shows the images.
            cache_dir: the folder that has the same images as plain files.
            lazyfs_mounts: returns all lazyfs mounts of the host.
            strangers: returns where other users have mounted something, which is not looked at.
        """
        self._folders = folders
        self._mountpoint = mountpoint
        self._cache_dir = cache_dir
        self._lazyfs_mounts = lazyfs_mounts
        self._strangers = strangers
        self._warned: set[str] = set()

    def set_folders(self, folders: Sequence[str]) -> None:
        """Look in these folders from now on."""
        self._folders = folders

    def backing_files(self) -> frozenset[str]:
        """Return the images that overlays need, as paths relative to the mountpoint.

        Raises:
            UserError: a folder or a file below it cannot be read, so overlays may exist that were
                not found.
        """
        no_go = {mount.mountpoint for mount in self._lazyfs_mounts()} | set(self._strangers())
        scan = _Scan(self._mountpoint, self._cache_dir, no_go)
        found = scan.of(self._folders)
        if self._folders and not found:
            scan.warnings.append(
                "--overlays protects nothing: no overlay there has an image of this mount"
            )
        if (more := len(scan.warnings) - MAX_WARNINGS) > 0:
            scan.warnings[MAX_WARNINGS:] = [f"and {more} more that could not be followed"]
        for warning in scan.warnings:
            if warning not in self._warned:
                logger.warning("%s", warning)
        # Only those of now, so that the set does not grow for ever.
        self._warned = set(scan.warnings)
        return found


class _Scan:
    """Does one scan, and holds which files it has seen and which images it has found."""

    def __init__(self, mountpoint: str, cache_dir: str, no_go: set[str]) -> None:
        self.warnings: list[str] = []
        """What should be known of paths that were not followed."""
        self._ours = dict.fromkeys([mountpoint, cache_dir])
        self._no_go = no_go | {mountpoint}
        self._seen: set[str] = set()
        self._found: set[str] = set()

    def of(self, folders: Sequence[str]) -> frozenset[str]:
        pending: list[str] = []
        for folder in folders:
            for path, folder_fd in self._files_below(folder):
                pending += self._backings_of(path, only_files=True, folder_fd=folder_fd)
        while pending:
            file = self._lead_to(pending.pop())
            if file is not None and file not in self._seen:
                self._seen.add(file)
                pending += self._backings_of(file, only_files=False)
        return frozenset(self._found)

    def _files_below(self, top: str) -> Iterator[tuple[str, int]]:
        """Yield the path of each file, and a descriptor of its folder.

        Folders are opened below each other, so that nobody can put a symbolic link in the place of
        one, and so that paths may be longer than the kernel takes.
        """
        try:
            root = os.open(top, _FOLDER)
        except OSError as error:
            raise _unreadable(top, error) from error
        open_folders = [(top, root, self._listed(top, root))]
        try:
            while open_folders:
                folder, fd, entries = open_folders[-1]
                if (entry := next(entries, None)) is None:
                    os.close(open_folders.pop()[1])
                    continue
                name, is_folder = entry
                path = os.path.join(folder, name)
                if path in self._no_go:  # A stat or open there would ask the mount.
                    continue
                if not is_folder:
                    yield path, fd
                elif len(open_folders) >= MAX_DEPTH:
                    self.warnings.append(f"{path[:200]} is too deep; overlays there are not found")
                else:
                    below = self._opened(path, name, fd)
                    if below is not None:
                        open_folders.append((path, below, self._listed(path, below)))
        finally:
            for _, fd, _ in open_folders:
                os.close(fd)

    def _opened(self, path: str, name: str, parent: int) -> int | None:
        try:
            return os.open(name, _FOLDER, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None  # it was removed, or replaced, after its parent was read
            raise _unreadable(path, error) from error

    def _listed(self, folder: str, fd: int) -> Iterator[tuple[str, bool]]:
        """Return the names of folders and files in a folder, and whether each is a folder."""
        try:
            with os.scandir(fd) as entries:
                found = [
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in entries
                    if os.path.join(folder, entry.name) not in self._no_go
                    and (
                        entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
                    )
                ]
        except OSError as error:
            raise _unreadable(folder, error) from error
        return iter(found)

    def _backings_of(self, path: str, only_files: bool, folder_fd: int | None = None) -> list[str]:
        """Return the paths of the backing files that a file names, and note those that are images.

        The result is empty if the chain ends there, because the backing file is raw.
        """
        place = path if folder_fd is None else os.path.basename(path)
        try:
            names, raw = _read_names(place, only_files, folder_fd)
        except OSError as error:
            if error.errno in _GONE or (not only_files and self._cut_off(path, error)):
                return []
            if error.errno in _THEIRS:
                self.warnings.append(f"the overlay {path} cannot be read ({error.strerror})")
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
            if error.errno in _GONE or self._cut_off(path, error):
                return None
            raise _unreadable(path, error) from error
        self._note(resolved)
        return None if self._is_no_go(resolved) else resolved

    def _cut_off(self, path: str, error: OSError) -> bool:
        """Return whether a chain of backing files ends here, with a warning."""
        if error.errno in _OURS:
            return False
        self.warnings.append(
            f"the backing file {path} of an overlay cannot be read ({error.strerror}); "
            "what lies below it is not protected"
        )
        return True

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


def _read_names(
    path: str, only_files: bool, folder_fd: int | None = None
) -> tuple[list[str], bool]:
    """Return the names in a file's header for its backing file, and whether that file is raw.

    The result is ([], False) if the file names no backing file or is not a qcow2.

    Raises:
        OSError: the file cannot be read.
    """
    found = os.stat(path, dir_fd=folder_fd, follow_symlinks=False)
    if not _has_header(found.st_mode, only_files):
        return [], False
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags, dir_fd=folder_fd)
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
