"""`lazyfs check`: compares the catalog, the maps and the files of a cache directory.

It works without the directory's daemon. It uses the same functions and stores as the daemon, and
takes the same lock. Without `repair` it changes nothing: the catalog is read from a copy (SQLite
would recover its journal, and lazyfs would upgrade it), and stores are inspected, not loaded.

A repair does what mounting would do. What cannot be trusted is discarded, so that it is fetched
again. What a crash interrupted is finished or undone. A repair touches neither files that lazyfs
did not put there nor plain files, with one exception: if the plain name of an image that is not
whole leads to its partial file, that name is removed.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

from lazyfs import errors
from lazyfs.cache import adopting, cache_dir, catalog, catalog_file
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.cache_dir import LOCK, PARTIAL
from lazyfs.cache.catalog import SqliteCatalog
from lazyfs.cache.catalog_file import CATALOG, STATE
from lazyfs.cache.check_report import Finding, Report
from lazyfs.cache.store.qcow2 import Qcow2Store
from lazyfs.cache.store.raw import RawStore
from lazyfs.core import shown_file
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import Cause, State
from lazyfs.engine.image import partial_cache
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.engine.name_tree import NameTree, TakenNames
from lazyfs.host import mounts

LEFT_ALONE = "left alone: move it away, or keep the cache elsewhere with --cache-dir"
_MODE = 0o700


def run(path: str, repair: bool) -> Report:
    """Check the cache at `path`, and repair it if `repair` is set.

    Raises:
        UserError: the cache cannot be checked, because it is in use, is not a cache, or was made by
            a newer lazyfs.
    """
    # This comes before realpath, because a mount that hangs does not even answer about symlinks.
    _refuse_mounted(path)
    path = os.path.realpath(path)
    _refuse_mounted(path)
    with ExitStack() as stack:
        try:
            return _Check(path, repair, stack).run()
        except OSError as error:
            what = (
                f"{error.filename}: {error.strerror}"
                if error.filename
                else str(error.strerror or error)
            )
            raise errors.UserError(f"cannot check {path}: {what}") from error
        except errors.NoSpace as error:
            raise errors.UserError(
                f"cannot check {path}: {error}, or for a copy of its catalog"
            ) from error


def _refuse_mounted(path: str) -> None:
    if mount := mounts.mount_of(path):
        raise errors.UserError(
            f"the cache {path} is under the lazyfs on {mount.mountpoint}; unmount that first"
        )


class _Check:
    def __init__(self, path: str, repair: bool, stack: ExitStack) -> None:
        self._path = path
        self._repair = repair
        self._stack = stack
        self._findings: list[Finding] = []
        self._sweeping = True
        """Whether files that no image needs are removed. They are not if the catalog had to be made
        anew, because then it may lack the images that need them."""
        self._records: dict[int, ImageRecord] = {}
        self._evicted: dict[str, int] = {}
        """What `SqliteCatalog.evicted` has returned."""
        self._catalog: SqliteCatalog | None = None
        """The real catalog, when repairing."""
        self._root = Beneath(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        stack.callback(os.close, self._root.fd)
        stack.callback(self._root.close)

    def run(self) -> Report:
        self._lock()
        self._check_folders()
        self._check_catalog()
        self._check_paths()
        for record in list(self._records.values()):
            self._check_whole(record)
        for record in list(self._records.values()):
            if (
                record.state in (State.PARTIAL, State.FAILED)
                and record.cause is not Cause.CHANGED_BY_HAND
            ):
                self._check_partial(record)
        self._check_strays()
        evicted = self._check_evicted()
        if not self._sweeping:
            self._adopt_whole_images()
        for path in cache_dir.foreign_files(self._root, list(self._records.values())):
            if path in evicted:
                continue
            self._found(path, "lazyfs did not put it there", LEFT_ALONE)
        return Report(self._path, len(self._records), self._findings)

    def _adopt_whole_images(self) -> None:
        for record in adopting.lost_images(self._root, list(self._records.values())):
            self._found(
                record.path,
                "the catalog does not know it",
                "taken in as a whole image",
                partial(self._adopt, record),
            )

    def _adopt(self, record: ImageRecord) -> None:
        assert self._catalog is not None
        (added,) = self._catalog.add([record])
        self._records[added.inode] = added

    def _check_evicted(self) -> set[str]:
        """Report plain files that were evicted, and that a power cut has brought back."""
        records = list(self._records.values())
        back = set(cache_dir.evicted_files(self._root, records, self._evicted))
        for path in sorted(back):
            self._found(
                path, "evicted, but a power cut has brought it back", "removed",
                partial(cache_dir.remove_durably, self._root, path),
            )  # fmt: skip
        return back

    def _found(
        self,
        path: str,
        problem: str,
        remedy: str,
        repair: Callable[[], None] | None = None,
        warning: bool = False,
    ) -> None:
        repaired, trouble = False, ""
        if self._repair and repair is not None:
            try:
                repair()
                repaired = True
            except (errors.LazyfsError, OSError) as error:
                trouble = str(error)
        self._findings.append(
            Finding(path, problem, remedy, repair is not None, repaired, warning, trouble)
        )

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return self._root.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    # -- lazyfs's own folder

    def _lock(self) -> None:
        found = self._stat(STATE)
        if found is None or not stat.S_ISDIR(found.st_mode):
            raise errors.UserError(f"{self._path} is no cache of lazyfs: it has no folder {STATE}")
        if found.st_uid != os.geteuid():
            raise errors.UserError(
                f"the cache {self._path} is user {found.st_uid}'s; check it as that user"
            )
        flags = os.O_RDWR | (os.O_CREAT if self._repair else 0)
        try:
            lock_fd = self._root.open(LOCK, flags)
        except FileNotFoundError:
            return  # Without the file, no daemon has the lock. The next daemon makes the file.
        self._stack.callback(os.close, lock_fd)
        if not cache_dir.try_lock(lock_fd):
            owner = cache_dir.owner_of(lock_fd) or "another lazyfs"
            raise errors.UserError(f"the cache {self._path} is in use by {owner}")
        if self._repair:
            cache_dir.tell_owner(lock_fd, f"lazyfs check (pid {os.getpid()})")

    def _check_folders(self) -> None:
        for name in (STATE, PARTIAL):
            found = self._stat(name)
            if found is None:
                self._found(name, "missing", "made", partial(self._root.mkdir, name, _MODE))
            elif not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise errors.UserError(
                    f"{self._path}/{name} is not a folder of this user; remove it"
                )
            elif stat.S_IMODE(found.st_mode) != _MODE:
                mode = stat.S_IMODE(found.st_mode)
                self._found(
                    name,
                    f"its mode is {mode:04o}",
                    f"set to {_MODE:04o}",
                    partial(self._chmod, name),
                )

    def _chmod(self, name: str) -> None:
        fd = self._root.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchmod(fd, _MODE)
        finally:
            os.close(fd)

    # -- the catalog

    def _check_catalog(self) -> None:
        catalog_file.check_catalog_file(self._root, self._path)
        if self._stat(CATALOG) is None:
            self._sweeping = False
            self._found(CATALOG, "missing", "made anew, empty", lambda: self._begin_anew([]))
            self._go_on_only_with_a_catalog()
            return
        copy = self._copy_catalog()
        try:
            opened = SqliteCatalog(copy)
        except catalog.TooNew as error:
            raise errors.UserError(f"cannot check {self._path}: {error}") from error
        except errors.CacheCorrupt as error:
            self._sweeping = False
            self._take(saved := catalog.salvage(copy))
            remedy = f"kept aside and made anew, with the {len(saved)} images that could be read"
            self._found(
                CATALOG,
                str(error).replace(copy, "catalog.sqlite"),
                remedy,
                lambda: self._begin_anew(saved),
            )
            self._go_on_only_with_a_catalog()
            return
        records, damaged = opened.load_each()
        self._evicted = opened.evicted()
        opened.close()
        self._take(records)
        if self._repair:
            self._catalog = catalog_file.open_catalog(self._root, self._path)
            self._stack.callback(self._catalog.close)
        for inode, reason in damaged.items():
            self._forget(inode, f"row {inode} is damaged: {reason}")

    def _go_on_only_with_a_catalog(self) -> None:
        """Stop repairing if there is no catalog: nothing may be removed without one."""
        self._repair = self._repair and self._catalog is not None

    def _copy_catalog(self) -> str:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-check-"))
        for suffix in ("", "-wal"):
            with (
                suppress(FileNotFoundError),
                open(
                    self._root.open(CATALOG + suffix, os.O_RDONLY | os.O_NONBLOCK), "rb"
                ) as source,
                open(f"{folder}/catalog.sqlite{suffix}", "wb") as target,
            ):
                shutil.copyfileobj(source, target)
        return f"{folder}/catalog.sqlite"

    def _take(self, records: list[ImageRecord]) -> None:
        self._records = {record.inode: record for record in records}

    def _begin_anew(self, records: list[ImageRecord]) -> None:
        aside = f"{CATALOG}.damaged"
        number = 1
        while self._stat(aside) is not None:
            number += 1
            aside = f"{CATALOG}.damaged-{number}"
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._root.rename(CATALOG + suffix, aside + suffix)
        self._catalog = catalog_file.open_catalog(self._root, self._path)
        self._stack.callback(self._catalog.close)
        self._catalog.restore(records)

    def _save(self, record: ImageRecord) -> None:
        assert self._catalog is not None
        self._catalog.update([record])
        self._records[record.inode] = record

    def _forget(self, inode: int, problem: str) -> None:
        """Report a row that must go.

        The next mount finds the export anew, and partial files without a row are removed.
        """
        self._records.pop(inode, None)

        def remove() -> None:
            assert self._catalog is not None
            self._catalog.remove([inode])

        self._found(CATALOG, problem, "removed, for the image to be taken in anew", remove)

    def _check_paths(self) -> None:
        """Find images with the same export or path, of which only one can be shown.

        The image with more to lose stays: a whole one before others.
        """
        taken, exports = TakenNames(NameTree().root), set()
        by_worth = sorted(
            self._records.values(), key=lambda r: (r.state is not State.WHOLE, r.inode)
        )
        for record in by_worth:
            if record.export in exports or not taken.is_free(record.path):
                self._forget(record.inode, f"row {record.inode} is another one for {record.path}")
            else:
                exports.add(record.export)
                taken.take(record.path)

    # -- images

    def _check_whole(self, record: ImageRecord) -> None:
        now = cache_dir.whole_now(self._root, record)
        if now.state is State.FAILED and now.cause is Cause.CHANGED_BY_HAND:
            found = self._stat(record.path)
            assert found is not None
            size = f"{found.st_size} bytes, the image {record.file_size}"
            what = f"it has {size}" if stat.S_ISREG(found.st_mode) else "not a plain file"
            self._found(record.path, what, "left alone: remove it to have it fetched again")
        elif now.state is State.REMOTE and record.state is not State.REMOTE:
            self._found(
                record.path, "the catalog says whole, and its plain file is gone", "made remote",
                lambda: self._save(now),
            )  # fmt: skip
        elif now != record:
            self._found(
                record.path, "the catalog says changed by hand, and it is not", "made whole",
                lambda: self._save(now),
            )  # fmt: skip

    def _check_partial(self, record: ImageRecord) -> None:
        data = f"{PARTIAL}/{record.inode}.{record.format}"
        if record.size is None or partial_cache.too_large(record):
            what = f"the catalog says {record.state.value}, and its size is {record.size}"
            self._found(record.path, what, "made remote", lambda: self._save(record.remote_again()))
            return
        if not any(self._stat(name) for name in self._names(record)):
            self._found(
                record.path,
                f"the catalog says {record.state.value}, and nothing of it is here",
                "made remote",
                lambda: self._save(record.remote_again()),
            )
            return
        linked = cache_dir.is_finished(self._root, record)
        store = self._store(record)
        try:
            blocks = store.inspect()
            faults, holes = store.faults(), store.data_in_holes(blocks)
        except errors.CacheCorrupt as error:
            self._found(
                data, str(error), "discarded, to be fetched again", lambda: self._discard(record)
            )
            return
        except OSError as error:
            self._found(data, f"cannot be read: {error.strerror}", "left alone")
            return
        finally:
            store.close()
        if faults:
            self._found(data, "; ".join(faults), "mended", lambda: self._mend(record))
        if holes:
            self._found(
                data,
                f"{holes} blocks are marked as data but are holes in the file; "
                "they are zeroes, or lost (lazyfs verify --against-repository tells which)",
                "left alone",
                warning=True,
            )
        if linked and blocks.complete and record.state is State.PARTIAL:
            self._found(
                record.path,
                "its hand-off was interrupted",
                "finished",
                lambda: self._finish(record),
            )
        elif linked:
            self._found(
                record.path, "another name of an image that is not whole",
                "removed, the image kept", lambda: self._undo(record),
            )  # fmt: skip

    def _store(
        self, record: ImageRecord, attributes: FileAttributes | None = None
    ) -> RawStore | Qcow2Store:
        attributes = attributes or FileAttributes(0o444, os.geteuid(), os.getegid())
        # No file is created, so the address of the repository is not needed.
        return cache_dir.partial_file(self._root, record, attributes, "")

    def _names(self, record: ImageRecord) -> list[str]:
        suffixes = ("raw", "map") if record.format == shown_file.RAW else ("qcow2",)
        return [f"{PARTIAL}/{record.inode}.{suffix}" for suffix in suffixes]

    def _discard(self, record: ImageRecord) -> None:
        store = self._store(record)
        store.unfinish()
        self._save(record.remote_again())
        store.remove()

    def _mend(self, record: ImageRecord) -> None:
        store = self._store(record)
        try:
            blocks = store.load()
            # The checkpoint makes the repairs durable.
            store.checkpoint([], blocks.mixed_zero_bytes)
        finally:
            store.close()

    def _undo(self, record: ImageRecord) -> None:
        self._store(record).unfinish()

    def _finish(self, record: ImageRecord) -> None:
        found = self._stat(record.path)  # The file got its mode and owner before its name.
        assert found is not None
        store = self._store(
            record, FileAttributes(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
        )
        try:
            blocks = store.load()
            store.finish()
            self._save(replace(record.became_whole(), present_bytes=blocks.present_bytes))
            store.remove()
        finally:
            store.close()

    # -- files without an image

    def _check_strays(self) -> None:
        if self._stat(PARTIAL) is None:
            return
        records = self._records.values()
        # An image whose plain file was changed by hand is among them, but has no partial files.
        filling = [r for r in records if r.state in (State.PARTIAL, State.FAILED)]
        wanted = {name for record in filling for name in self._names(record)}
        whole = {
            (s.st_dev, s.st_ino)
            for r in records
            if r.state is State.WHOLE and (s := self._stat(r.path))
        }
        for name in sorted(self._root.listdir(PARTIAL)):
            path = f"{PARTIAL}/{name}"
            found = self._stat(path)
            if path in wanted or found is None:
                continue
            if not self._sweeping:
                what = "no image of the new catalog has it"
                self._found(path, what, "left for the next mount to remove", warning=True)
                continue
            if stat.S_ISDIR(found.st_mode):
                self._found(path, "lazyfs did not put it there", LEFT_ALONE)
                continue
            handed_off = (found.st_dev, found.st_ino) in whole
            problem = (
                "left over from the hand-off of a whole image"
                if handed_off
                else "no image needs it"
            )
            self._found(path, problem, "removed", partial(self._root.unlink, path))
