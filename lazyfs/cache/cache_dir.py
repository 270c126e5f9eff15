"""Opens the cache directory. That happens before mounting, so it stays reachable under the
mount.

    CACHE_DIR/
        debian-12            whole images, plain files
        team/ubuntu          "/" in an export name makes folders
        .lazyfs/             0700
            lock             flock: one daemon per cache; holds the pid and mountpoint of its owner
            catalog.sqlite
            partial/         images being filled

All other files in it are foreign. lazyfs neither hides nor touches what it did not put there. It
refuses to use such a directory.
"""

# Longer than 500 lines: to open a cache directory is one sequence of steps.

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.catalog_file import CATALOG, STATE, exists, open_catalog
from lazyfs.cache.reserve import NAME as RESERVE
from lazyfs.cache.reserve import Reserve
from lazyfs.cache.store.cache_file import WholeFile
from lazyfs.cache.store.qcow2 import Qcow2Store
from lazyfs.cache.store.raw import RawStore
from lazyfs.cache.store.unkept import UnkeptStore
from lazyfs.core import repository_uri, shown_file
from lazyfs.core.export_name import RESERVED, qemu_uri
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import CHANGED_BY_HAND, Cause, State
from lazyfs.engine.interfaces import FileAttributes, PlainFile, Space, Store
from lazyfs.host import mounts
from lazyfs.units import GiB, MiB

logger = logging.getLogger(__name__)

ENDING_S = 20.0
"""How long to wait for a daemon that is not mounted any more, but still writes its last
checkpoint to a slow disk."""

_DETACHED = "the lazyfs detached from"
PARTIAL = f"{STATE}/partial"
LOCK = f"{STATE}/lock"

PROVED = "proved"
"""The name under which the catalog stores that the server has proved who it is, by TLS."""

REPOSITORY = "repository"
"""The name under which the catalog stores the identity of the repository."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Holds the descriptors of a cache directory that is open and locked."""

    root_fd: int
    lock_fd: int


class CacheDir:
    """Holds an open, locked cache directory. Implements `interfaces.Stores`."""

    def __init__(
        self,
        path: str,
        mountpoint: str,
        repository: str,
        attributes: FileAttributes,
        moved: bool = False,
        trust_owner: bool = False,
        opened: Opened | None = None,
        owner_pid: int | None = None,
    ) -> None:
        """Open and lock the cache at `path`, create what is missing, and load its catalog.

        Args:
            path: the cache directory.
            mountpoint: where it will be mounted, for messages.
            repository: its URI. A qcow2 names it as its backing file while it is being filled.
            attributes: those of plain files.
            moved: the cache belongs to this repository, although it was filled from another
                address.
            trust_owner: root uses the folder although others own it, or may write to it.
            opened: what an earlier daemon of the same mount has opened and locked. The mount may
                hide the path.
            owner_pid: the process to name as the owner of the lock. None means this one.

        Raises:
            UserError: the cache cannot be used. The error says why.
        """
        self.path = path
        self._repository = repository
        self._file_attributes = attributes
        self._moved = moved
        self._owner_pid = os.getpid() if owner_pid is None else owner_pid
        try:
            root_fd = _open_root(path) if opened is None else opened.root_fd
        except OSError as error:
            raise errors.UserError(f"cannot use {path} as the cache: {error.strerror}") from error
        self.root = Beneath(root_fd)
        self.lock_fd = -1 if opened is None else opened.lock_fd
        """The file that is locked. It also serves as a plain file on the cache's file system
        that always exists."""
        self._mountpoint = mountpoint
        self.downgraded = False
        """True if images were filled over TLS, and the repository is now asked without."""
        try:
            if not trust_owner:
                self._refuse_strangers()
            self._open(mountpoint)
        except errors.NoSpace as error:
            raise errors.UserError(f"cannot use {path} as the cache: {error}") from error
        except errors.CacheCorrupt as error:
            raise errors.LastingError(
                f"cannot use {path} as the cache: {error}; "
                "move it away, or start anew with --cache-dir"
            ) from error
        except OSError as error:
            what = (
                f"{error.filename}: {error.strerror}"
                if error.filename
                else str(error.strerror or error)
            )
            raise errors.UserError(f"cannot use {path} as the cache: {what}") from error

    # -- interfaces.Stores

    def partial(self, record: ImageRecord) -> Store:
        """Return the store of an image that is being filled."""
        return partial_file(self.root, record, self._file_attributes, self._repository)

    def unkept(self) -> Store:
        """Return a store that keeps nothing."""
        return UnkeptStore()

    def whole(self, record: ImageRecord) -> PlainFile:
        """Return the plain file of a whole image."""
        return WholeFile(self.root, record)

    def nearly_full(self) -> bool:
        """Return whether less than 1 % of the file system is free for this user.

        The limit is at most 1 GiB and at least 1 MiB. That is enough for the catalog, and for other
        programs on the same disk to go on for a while. It is unmeasured.
        """
        space = self.space()
        return space.total > 0 and space.free < max(min(space.total // 100, GiB), MiB)

    def space(self) -> Space:
        """Return the size of the file system, and what an ordinary user may still write to it."""
        found = os.fstatvfs(self.root.fd)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    # -- opening

    def _open(self, mountpoint: str) -> None:
        with ExitStack() as undo:
            undo.callback(self._close_fds)
            made = self._make_state_folder()
            self._take_lock(mountpoint)
            # After the catalog was closed, and only if what follows fails.
            undo.callback(self._leave_nothing, made, exists(self.root, CATALOG))
            self._reserve = Reserve(self.root)
            self.catalog = open_catalog(self.root, self.path, self._reserve)
            undo.callback(self.catalog.close)
            self.records = [self._checked_whole(record) for record in self.catalog.load()]
            self._check_repository()
            self._remove_evicted()
            self._refuse_foreign(of_a_cache=not made)
            self._sweep()
            undo.pop_all()

    def _refuse_strangers(self) -> None:
        """Refuse a folder in which others can put files in the place of images.

        For another user than root it is enough that the state folder is theirs.

        Raises:
            LastingError: it is such a folder.
        """
        found = os.fstat(self.root.fd)
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if os.geteuid() == 0 and (found.st_uid or others):
            self._close_fds()
            whose = "is writable by others" if not found.st_uid else f"is user {found.st_uid}'s"
            raise errors.LastingError(
                f"the cache {self.path} {whose}, who could change what VMs read: give it to root "
                "(chown root, chmod go-w), or use --trust-cache-owner"
            )

    def _leave_nothing(self, made_folder: bool, had_catalog: bool) -> None:
        """Remove what this mount has made of a cache in a folder that it cannot use.

        An empty catalog would say that nothing in the folder is lazyfs's.
        """
        names = [] if had_catalog else [CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm"]
        if made_folder:
            names += [LOCK, RESERVE]
        for name in names:
            with suppress(OSError):
                self.root.unlink(name)
        if made_folder:
            for folder in (PARTIAL, STATE):
                with suppress(OSError):
                    self.root.rmdir(folder)

    def _make_state_folder(self) -> bool:
        """Make lazyfs's own folders; return whether there were none."""
        made = False
        for name in (STATE, PARTIAL):
            try:
                self.root.mkdir(name, 0o700)
                made = made or name == STATE
            except FileExistsError:
                pass
            except OSError as error:
                raise errors.UserError(
                    f"cannot write to the cache {self.path}: {error.strerror}"
                ) from error
            try:
                ours = os.fstat(self.root.keep(name)).st_uid == os.geteuid()
            except (NotADirectoryError, PermissionError):  # another file, a link, or a stranger's
                ours = False
            if not ours:
                raise errors.LastingError(
                    f"{self.path}/{name} is not a folder of this user; "
                    "remove it, or use --cache-dir"
                )
        return made

    def _take_lock(self, mountpoint: str) -> None:
        if self.lock_fd >= 0:
            return  # it is the lock of the mount, which daemons hand on
        self.lock_fd = self.root.open(LOCK, os.O_RDWR | os.O_CREAT)
        deadline = time.monotonic() + ENDING_S
        while not try_lock(self.lock_fd):
            owner = owner_of(self.lock_fd)
            detached = owner.startswith(_DETACHED)
            mounted = any(
                f"the lazyfs on {mount.mountpoint} (pid" in owner
                for mount in mounts.lazyfs_mounts()
            )
            if not mounted and not detached and time.monotonic() < deadline:
                time.sleep(0.1)  # it was unmounted a moment ago, and is saving what it has
                continue
            raise errors.UserError(
                f"the cache {self.path} is in use by {owner or 'another lazyfs'}; "
                + (
                    "close them or move QEMU with lazyfs pivot"
                    if detached
                    else "unmount that first"
                )
                + ", or give this mount its own --cache-dir"
            )
        tell_owner(self.lock_fd, f"the lazyfs on {mountpoint} (pid {self._owner_pid})")

    def more_open(self) -> int:
        """Return how many plain files more users may read than the mode for new ones allows."""
        count = 0
        for record in self.records:
            if record.state is State.WHOLE:
                with suppress(OSError):
                    mode = stat.S_IMODE(self.root.stat(record.path).st_mode)
                    count += bool(mode & ~self._file_attributes.mode & 0o444)
        return count

    def tell_detached(self) -> None:
        """Say in the lock file that open files of a detached mount keep the cache in use.

        Another daemon that wants this cache shows that in its message.
        """
        tell_owner(
            self.lock_fd,
            f"{_DETACHED} {self._mountpoint} (pid {self._owner_pid}), "
            "which serves the files still open",
        )

    def _checked_whole(self, record: ImageRecord) -> ImageRecord:
        now = whole_now(self.root, record)
        if now != record:
            if now.state is State.REMOTE:
                logger.info(
                    "the plain file was removed, so it is remote again: image=%s", record.export
                )
            self.catalog.update([now])
        return now

    def _check_repository(self) -> None:
        """Refuse a repository from which the cache was not filled, or note that it is the one.

        Images of another repository would be taken for those of the same name here, and be filled
        up with the others' bytes.

        Raises:
            UserError: the cache belongs to another repository.
        """
        uri = repository_uri.parse(self._repository)
        known, ours = self.catalog.setting(REPOSITORY), uri.identity
        cached = sum(record.state is not State.REMOTE for record in self.records)
        if known not in ("", ours):
            if cached and not self._moved:
                raise errors.LastingError(
                    f"the cache {self.path} belongs to the repository {known}, not to {ours}: "
                    f"{cached} {'image has' if cached == 1 else 'images have'} something cached; "
                    "mount with --moved if it is the same repository at another address, "
                    "or use another --cache-dir"
                )
            if not cached:  # sizes and names are the other repository's
                self.catalog.remove([record.inode for record in self.records])
                self.records = []
        if known != ours:
            self.catalog.set_setting(REPOSITORY, ours)
        proved = self.catalog.setting(PROVED) != ""
        self.downgraded = proved and bool(cached) and not uri.tls
        if uri.tls != proved and not self.downgraded:
            self.catalog.set_setting(PROVED, "yes" if uri.tls else "")

    def _remove_evicted(self) -> None:
        """Remove plain files that were evicted, and that a power cut has brought back."""
        evicted = self.catalog.evicted()
        for path in evicted_files(self.root, self.records, evicted):
            logger.warning("evicted before a power cut, and removed now: path=%s", path)
            remove_durably(self.root, path)
        if evicted:
            self.catalog.forget_evicted()

    def _refuse_foreign(self, of_a_cache: bool) -> None:
        hint = " (if it is an image of a catalog that was lost: lazyfs check --repair)"
        for path in foreign_files(self.root, self.records):
            raise errors.LastingError(
                f"{self.path} holds {path!r}, which lazyfs did not put there; "
                "move it away, or keep the cache elsewhere with --cache-dir"
                + (hint if of_a_cache else "")
            )

    def _sweep(self) -> None:
        """Remove partial files to which no record belongs.

        They are left by a crash, or by an image that has become whole.
        """
        wanted = {
            str(record.inode)
            for record in self.records
            if record.state in (State.PARTIAL, State.FAILED)
        }
        for name in self.root.listdir(PARTIAL):
            if name.partition(".")[0] not in wanted:
                self.root.unlink(f"{PARTIAL}/{name}")

    # -- closing

    def close(self) -> None:
        """Close the catalog and unlock. Nothing may be mounted over the directory any more."""
        self.catalog.close()
        self._reserve.forget()
        self._close_fds()

    def _close_fds(self) -> None:
        self.root.close()
        for fd in (self.lock_fd, self.root.fd):
            if fd >= 0:
                os.close(fd)


def _open_root(path: str) -> int:
    # The parent must exist. Otherwise a mistyped name, or a disk that is not mounted yet, could
    # fill another disk.
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


# -- what needs no `CacheDir`, only an open cache directory; `cache_check.py` uses it as well


def partial_file(
    root: Beneath, record: ImageRecord, attributes: FileAttributes, repository: str
) -> RawStore | Qcow2Store:
    """Return the store of an image that is being filled."""
    if record.format == shown_file.QCOW2:
        return Qcow2Store(root, record, attributes, qemu_uri(repository, record.export))
    return RawStore(root, record, attributes)


def try_lock(lock_fd: int) -> bool:
    """Lock the file unless another process has locked it. Closing the descriptor unlocks it."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner_of(lock_fd: int) -> str:
    """Return who has the lock, as written in the lock file, or ""."""
    return os.pread(lock_fd, 4096, 0).decode(errors="surrogateescape").strip()


def tell_owner(lock_fd: int, owner: str) -> None:
    """Write into the lock file who has the lock."""
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, owner.encode(errors="surrogateescape"), 0)


def whole_now(root: Beneath, record: ImageRecord) -> ImageRecord:
    """Return the record of an image as it is now.

    It changes if somebody has removed or changed the plain file meanwhile. If the file is gone, the
    image was evicted by hand, and is remote again. If the file has another size, it is left alone,
    and the image fails. If that file is gone later, the image is remote again as well.
    """
    if record.state is not State.WHOLE and record.cause is not Cause.CHANGED_BY_HAND:
        return record
    try:
        found = root.stat(record.path)
    except (FileNotFoundError, NotADirectoryError):
        return record.remote_again()
    if not stat.S_ISREG(found.st_mode) or found.st_size != record.file_size:
        return record.failed(Cause.CHANGED_BY_HAND, CHANGED_BY_HAND)
    return record.became_whole() if record.cause is Cause.CHANGED_BY_HAND else record


def foreign_files(root: Beneath, records: Sequence[ImageRecord]) -> Iterator[str]:
    """Yield the path of every file that does not belong to an image."""
    ours = {r.path for r in records if r.state is State.WHOLE or r.cause is Cause.CHANGED_BY_HAND}
    unfinished = {record.path: record for record in records if record.path not in ours}
    for path in _files_below(root):
        if path not in ours and not (path in unfinished and is_finished(root, unfinished[path])):
            yield path


def evicted_files(
    root: Beneath, records: Sequence[ImageRecord], evicted: Mapping[str, int]
) -> Iterator[str]:
    """Yield the paths of plain files that were evicted and are there all the same.

    A power cut can bring back a name that was removed. lazyfs gives each plain file a time of its
    own, to the nanosecond, so it recognises them.

    Args:
        root: the cache directory.
        records: the images. What belongs to one of them now is left out.
        evicted: what `SqliteCatalog.evicted` returns.
    """
    ours = {r.path for r in records if r.state is State.WHOLE or r.cause is Cause.CHANGED_BY_HAND}
    for path, created_ns in evicted.items():
        if path not in ours:
            with suppress(FileNotFoundError, NotADirectoryError):
                found = root.stat(path)
                if stat.S_ISREG(found.st_mode) and found.st_mtime_ns == created_ns:
                    yield path


def remove_durably(root: Beneath, path: str) -> None:
    """Unlink a file of the cache directory, and sync its folder."""
    root.unlink(path)
    root.sync_folder(os.path.dirname(path))


def is_finished(root: Beneath, record: ImageRecord) -> bool:
    """Return whether the image is whole but the catalog does not know it.

    A crash came between linking the file into place and telling the catalog.
    """
    try:
        ours = root.stat(f"{PARTIAL}/{record.inode}.{record.format}")
        there = root.stat(record.path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _is_of_the_disk(name: str) -> bool:
    """Return whether a name at the root is one of a file system or a desktop, not of a person.

    Quota files, what an NFS client renames when it is removed while open, snapshots, and waste
    bins.
    """
    return name in ("aquota.user", "aquota.group", ".snapshots", ".snapshot") or name.startswith(
        (".nfs", ".Trash")
    )


def _files_below(root: Beneath) -> Iterator[str]:
    """Yield every path below the cache directory that is not a folder.

    The state folder and reserved names are left out.
    """
    pending: list[Sequence[str]] = [[]]
    while pending:
        folder = pending.pop()
        for name in sorted(root.listdir("/".join(folder))):
            if not folder and (name in RESERVED or _is_of_the_disk(name)):
                continue
            path = "/".join([*folder, name])
            if stat.S_ISDIR(root.stat(path).st_mode):
                pending.append([*folder, name])
            else:
                yield path
