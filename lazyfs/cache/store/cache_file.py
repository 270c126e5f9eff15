"""The part of the stores that is the same for all formats.

It leads the file of one image from `.lazyfs/partial/` to the image's path:

    .lazyfs/partial/17.raw   ──(complete: fsync, mode, owner, times, link, fsync of folders)──>
                             team/debian-12
    .lazyfs/partial/17.*     removed once the catalog says that the image is whole

At every moment at least one of the two names exists. After a crash `finish` may be repeated.
"""

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.store.write_behind import WriteBehind
from lazyfs.core import block_map
from lazyfs.core.block_map import BlockMap
from lazyfs.core.image_record import ImageRecord
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.host import image_lock
from lazyfs.units import KiB, MiB

logger = logging.getLogger(__name__)

PARTIAL = ".lazyfs/partial"
READ_AROUND = 256 * KiB
"""How many bytes, aligned, a small read that waits for the disk brings into the page cache.

Measured with random reads of 4 KiB in a cold file of 1 GiB, by 1 and by 8 readers, in reads/s:
2,900 and 4,300 without; 4,500 and 5,900 with 64 KiB; 9,000 and 16,500 with 256 KiB; 10,600 and
22,000 with 512 KiB. A thread's turn costs 200 us of CPU. A larger value would push out of the page
cache what other readers need."""

RESERVE = 1 * MiB
"""Free bytes that data leaves to the catalog and the maps. Without any free bytes, the next mount
could not write its catalog."""
OPEN_FLAGS = os.O_RDWR | os.O_CREAT

WRITE_BITS = 0o222
"""The bits of a mode that plain files never get: overlays and the catalog rely on their bytes."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def space_errors() -> Iterator[None]:
    """Turn the errors of a full disk into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise errors.NoSpace from error
        raise


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`, with as many calls as that takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Return exactly `length` bytes.

    Raises:
        CacheCorrupt: the file ends before.
    """
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise errors.CacheCorrupt(
                f"the cache file ends at {offset + len(data)}, inside the image"
            )
        data += more
    return data


MAX_NOWAIT = 1 * MiB
"""The longest read that uses `_scratch`. The kernel reads at most so much at once."""

_scratch = memoryview(bytearray(MAX_NOWAIT))
"""The buffer for `read_nowait`, which only the trio thread calls. It is kept because memory that
has been touched before is faster."""


class FileReader:
    """Reads an open cache file, partial or whole.

    `close` may be called at any moment. The descriptor is closed once the reads and writes under
    way in other threads have ended: before, another file could get the same number.
    """

    _fd = -1
    _data_offset = 0
    """The offset in the file of the data that callers read and write at offset 0."""

    def __init__(self) -> None:
        self._users_lock = threading.Lock()
        self._users = 0
        self._closed = False

    def fileno(self) -> int:
        """Return the open file's descriptor. -1 if it is closed."""
        return self._fd

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Keep the files open inside the block. Raises OSError (EBADF) if they are closed."""
        with self._users_lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield
        finally:
            with self._users_lock:
                self._users -= 1
                self._close_if_unused()

    def close(self) -> None:
        """Close the files, now or when the last read or write under way has ended."""
        with self._users_lock:
            self._closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._users:
            self._close_fds()

    def _close_fds(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Return `length` bytes if all of them are in the page cache, otherwise None.

        Only the trio thread may call this. Measured: 2 us for 4 KiB from the page cache, while a
        thread costs 200 us more.
        """
        buffer = _scratch[:length] if length <= MAX_NOWAIT else memoryview(bytearray(length))
        try:
            done = os.preadv(self._fd, [buffer], self._data_offset + offset, os.RWF_NOWAIT)
        except (BlockingIOError, OSError) as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return None
            raise
        return bytes(buffer) if done == length else None

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes.

        For a small read, the kernel is asked to read READ_AROUND bytes, for later readers.
        """
        position = self._data_offset + offset
        with self._using():
            if length < READ_AROUND:
                start = position - position % READ_AROUND
                os.posix_fadvise(self._fd, start, READ_AROUND, os.POSIX_FADV_WILLNEED)
            return read_exactly(self._fd, position, length)


class PartialFile(FileReader):
    """Holds the cache file of an image that is being filled.

    It implements the part of `interfaces.Store` that does not depend on the format.
    """

    def __init__(self, root: Beneath, record: ImageRecord, attributes: FileAttributes) -> None:
        """`root` is the cache directory, opened before anything was mounted over it."""
        assert record.size is not None
        self._root = root
        self._record = record
        self._file_attributes = attributes
        self._size = record.size
        self._data_name = f"{PARTIAL}/{record.inode}.{record.format}"
        super().__init__()
        self._writing = threading.Lock()
        """The kernel lets one thread write to a file at a time. The next one would wait for it by
        spinning, and so use a CPU."""
        self._write_behind = WriteBehind()

    def _open_data(self, flags: int = OPEN_FLAGS) -> int:
        try:
            return self._root.open(self._data_name, flags)
        except PermissionError:
            # `finish` set the file's mode, but the daemon ended before the catalog was updated.
            fd = self._root.open(self._data_name, os.O_PATH)
            try:
                os.chmod(f"/proc/self/fd/{fd}", 0o600)
            finally:
                os.close(fd)
            return self._root.open(self._data_name, flags)

    def inspect(self) -> BlockMap:
        """Open the existing files for reading, and return what `load` would. Changes nothing.

        Raises:
            CacheCorrupt: `load` would refuse the files, or there are none.
            OSError: the files cannot be read.
        """
        raise NotImplementedError

    def faults(self) -> list[str]:
        """Return the faults that `inspect` found and `load` would repair."""
        return []

    def data_in_holes(self, blocks: BlockMap) -> int:
        """Return how many blocks are DATA in the map although the file has only a hole there.

        Call this after `inspect` or `load`. Such a block can hold zeroes that the repository gave
        as data, if the file was copied since. It can also be lost data.
        """
        states = b"".join(bytes([state]) * (run.end - run.first) for run, state in blocks.runs())
        size, end = blocks.block_size, self._data_offset + self._size
        lost = position = 0
        while position < end:
            data = _next_data(self._fd, position, end)
            # The blocks that lie completely in the hole, including the last, shorter one.
            first = -(-max(position - self._data_offset, 0) // size)
            last = blocks.blocks if data == end else max(data - self._data_offset, 0) // size
            lost += states.count(block_map.DATA, first, last)
            position = end if data == end else os.lseek(self._fd, data, os.SEEK_HOLE)
        return lost

    def _open_to_inspect(self, name: str) -> int:
        try:
            return self._root.open(name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise errors.CacheCorrupt(f"{name} is missing") from None

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Write the data of whole blocks. With `keep`, the data stays in the page cache.

        Holes are not written. Several threads may call this, and `close` may be called meanwhile.

        Raises:
            NoSpace: the disk is full, but for RESERVE bytes.
            OSError: the disk failed, or the store is closed.
        """
        with self._using():
            with space_errors():
                self._leave_room(len(data))
                with self._writing:
                    write_all(self._fd, data, self._data_offset + offset)
            if not keep:
                self._write_behind.wrote(self._fd, self._data_offset + offset, len(data))

    def _leave_room(self, size: int) -> None:
        """Raise NoSpace if the data would use the disk's last RESERVE bytes. This costs 1 us."""
        found = os.fstatvfs(self._root.fd)
        if found.f_blocks and found.f_bavail * found.f_frsize < size + RESERVE:
            raise errors.NoSpace

    def _sync_data(self) -> None:
        """Make durable what `write` wrote.

        Raises:
            CacheCorrupt: data did not reach the disk.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # Linux reports a lost page once, and may count it as clean afterwards. So a second sync
            # that succeeds proves nothing.
            raise errors.CacheCorrupt(
                f"the cache's disk could not take the data ({error.strerror})"
            ) from error

    def disown(self) -> None:
        """Do nothing: the files of most formats do not name the export."""

    def finish(self) -> None:
        """Turn the complete partial file into the plain file at the image's path.

        The file gets its mode, owner and times and is synced. Then it is linked to the path, and
        the folders are synced.

        Raises:
            UserError: another file is in the way.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        self.check_path()
        path = self._record.path
        with space_errors():
            os.fchown(self._fd, self._file_attributes.uid, self._file_attributes.gid)
            os.fchmod(self._fd, self._file_attributes.mode & ~WRITE_BITS)
            os.utime(self._fd, ns=(self._record.created_ns, self._record.created_ns))
            os.fsync(self._fd)
            folders = _parents(path)
            try:
                for folder in folders:
                    with suppress(FileExistsError):
                        self._root.mkdir(folder, 0o755)
                # A link, not a rename, because a link never replaces a file, and because the
                # partial name must stay until the catalog says that the image is whole.
                self._root.link(self._data_name, path)
            except (FileExistsError, NotADirectoryError):
                self.check_path()
            for folder in ["", *folders]:
                self._root.sync_folder(folder)
        # Who has opened the image before reads this file, until they close it.
        if not image_lock.lock_as_reader(self._fd):
            logger.warning("somebody may write to the plain file: path=%s", path)

    def check_path(self) -> None:
        """Look whether the plain file could be put at the image's path, before much is written.

        Raises:
            UserError: another file is in the way.
        """
        path = self._record.path
        try:
            if self._is_ours(path):
                return
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise errors.UserError(
                f"cannot put the whole image at {path}: a file is where its folder belongs"
            ) from None
        raise errors.UserError(
            f"cannot put the whole image at {path}: "
            "a file that lazyfs did not put there is in the way"
        )

    def unfinish(self) -> None:
        """Unlink the plain file if it is another name of the data file.

        This is durable when it returns: the catalog may say next that nothing is there.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._is_ours(self._record.path):
                self._root.unlink(self._record.path)
                self._root.sync_folder(os.path.dirname(self._record.path))

    def _is_ours(self, path: str) -> bool:
        there = self._root.stat(path)
        ours = self._root.stat(self._data_name)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def remove(self) -> None:
        """Unlink the partial files. The plain file of a whole image stays."""
        for name in self._names():
            with suppress(FileNotFoundError):
                self._root.unlink(name)

    def _names(self) -> list[str]:
        return [self._data_name]


class WholeFile(FileReader):
    """Holds the plain file of a whole image, read-only. Implements `interfaces.PlainFile`."""

    def __init__(self, root: Beneath, record: ImageRecord) -> None:
        """Open the file.

        Raises:
            PlainFileGone: there is no file at the path.
            CacheCorrupt: something else is there, or it does not have the image's size.
            OSError: it cannot be opened now.
        """
        super().__init__()
        self._root = root
        self._path = record.path
        self._name = record.path
        """The name that the file has now."""
        self._aside = f"{PARTIAL}/{record.inode}.{record.format}"
        size = record.file_size
        try:
            # O_NONBLOCK is for the case that somebody has put a fifo there.
            self._fd = root.open(record.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise errors.PlainFileGone("the plain file is gone") from error
            if error.errno == errno.ELOOP:
                raise errors.CacheCorrupt("a symbolic link is where the plain file was") from error
            raise  # this says nothing about the file, only about its disk or this process
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            os.close(self._fd)
            raise errors.CacheCorrupt(f"the plain file has {found.st_size} bytes, the image {size}")
        try:
            locked = image_lock.lock_as_reader(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        if not locked:
            logger.warning("somebody may write to the plain file: path=%s", record.path)

    def set_aside(self) -> None:
        """Move the plain file to the folder of partial files.

        If it is not removed there, the next mount removes it. The move is durable when this
        returns: after a power cut, the file must not be at its path if the catalog says that
        nothing is there.

        Raises:
            OSError: it could not be moved durably. It was moved back, if that was possible.
        """
        # A name that already leads to the same file must go: rename() would do nothing then.
        with suppress(FileNotFoundError):
            self._root.unlink(self._aside)
        self._root.rename(self._path, self._aside)
        self._name = self._aside
        try:
            self._sync_folders()
        except BaseException:
            with suppress(OSError):
                self.restore()
            raise

    def restore(self) -> None:
        """Undo `set_aside`, unless another file was put at the path meanwhile."""
        with suppress(FileExistsError):
            self._root.link(self._aside, self._path)
        self._root.sync_folder(os.path.dirname(self._path))
        self._root.unlink(self._aside)
        self._name = self._path

    def remove(self) -> None:
        """Unlink the plain file. Processes that have it open keep reading it."""
        with suppress(FileNotFoundError):
            self._root.unlink(self._name)

    def _sync_folders(self) -> None:
        for folder in (PARTIAL, os.path.dirname(self._path)):
            self._root.sync_folder(folder)


def _next_data(fd: int, position: int, end: int) -> int:
    try:
        return min(os.lseek(fd, position, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # There is a hole up to the end of the file.
            return end
        raise


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
