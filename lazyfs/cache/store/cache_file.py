"""What all stores do the same way with the file of one image, from `.lazyfs/partial/` to the image's path.

    .lazyfs/partial/17.raw   ──(complete: fsync, mode, owner, times, link, fsync of folders)──>  team/debian-12
    .lazyfs/partial/17.*     removed once the catalog says whole

At every moment at least one of the two names is there, and `finish` may be repeated after a crash.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyfs import errors
from lazyfs.cache.store.write_behind import WriteBehind
from lazyfs.core import block_map
from lazyfs.core.block_map import BlockMap
from lazyfs.engine.interfaces import FileAttributes, ImageRecord
from lazyfs.units import KiB, MiB

PARTIAL = ".lazyfs/partial"
READ_AROUND = 256 * KiB
"""What a small read that waits for the disk brings into the page cache, aligned. Measured with 4 KiB at random of 1
GiB, cold, by 1 and 8 readers, in reads/s: 2,900 and 4,300 without; 4,500 and 5,900 with 64 KiB; 9,000 and 16,500 with
256 KiB; 10,600 and 22,000 with 512 KiB. A thread's turn costs 200 us of CPU. Larger would push out what others need."""

RESERVE = 1 * MiB
"""Free bytes that data leaves to the catalog and the maps: without any, the next mount could not write its catalog."""
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def space_errors() -> Iterator[None]:
    """Turn a full disk's errors into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise errors.NoSpace from error
        raise


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Return exactly `length` bytes. Raises CacheCorrupt if the file ends before."""
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
"""One read of the kernel's."""

_scratch = memoryview(bytearray(MAX_NOWAIT))
"""For `read_nowait`, which is called in the trio thread only: memory that is touched already."""


class FileReader:
    """Reads of an open cache file, partial or whole."""

    _fd: int
    _data_offset = 0
    """Where offset 0 of reads and writes lies in the file."""

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Measured: 2 us for 4 KiB from the page cache, where a thread costs 200 us more."""
        buffer = _scratch[:length] if length <= MAX_NOWAIT else memoryview(bytearray(length))
        try:
            done = os.preadv(self._fd, [buffer], self._data_offset + offset, os.RWF_NOWAIT)
        except (BlockingIOError, OSError) as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return None
            raise
        return bytes(buffer) if done == length else None

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; the kernel reads those around them as well, for the next reader."""
        position = self._data_offset + offset
        if length < READ_AROUND:
            os.posix_fadvise(
                self._fd, position - position % READ_AROUND, READ_AROUND, os.POSIX_FADV_WILLNEED
            )
        return read_exactly(self._fd, position, length)


class PartialFile(FileReader):
    """The cache file of an image that is being filled: the part of `interfaces.Store` that has nothing to do with
    its format.
    """

    def __init__(self, root_fd: int, record: ImageRecord, attributes: FileAttributes) -> None:
        """`root_fd`: the cache directory, opened before anything was mounted over it."""
        assert record.size is not None
        self._root_fd = root_fd
        self._record = record
        self._file_attributes = attributes
        self._size = record.size
        self._data_name = f"{PARTIAL}/{record.inode}.{record.format}"
        self._fd = -1
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """The kernel lets one write to a file at a time; the next would wait for it spinning, and take a CPU."""
        self._write_behind = WriteBehind()
        self._writers = 0
        self._closed = False

    def _open_data(self, flags: int = OPEN_FLAGS) -> int:
        try:
            return os.open(self._data_name, flags, 0o600, dir_fd=self._root_fd)
        except PermissionError:
            # `finish` gave it its mode, and the catalog was not told before the daemon ended.
            fd = os.open(
                self._data_name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root_fd
            )
            try:
                os.chmod(f"/proc/self/fd/{fd}", 0o600)
            finally:
                os.close(fd)
            return os.open(self._data_name, flags, 0o600, dir_fd=self._root_fd)

    def inspect(self) -> BlockMap:
        """Open what there is for reading, and return what `load` would. Changes nothing.

        Raises:
            CacheCorrupt: `load` would refuse it, or there is nothing.
            OSError.
        """
        raise NotImplementedError

    def faults(self) -> list[str]:
        """Return what `inspect` found that `load` puts right."""
        return []

    def data_in_holes(self, blocks: BlockMap) -> int:
        """Return how many blocks are DATA although the file has nothing but a hole there. After `inspect` or `load`.

        Zeroes that the repository gave as data can be such, once the file was copied; lost data is, too.
        """
        states = b"".join(bytes([state]) * (run.end - run.first) for run, state in blocks.runs())
        size, end = blocks.block_size, self._data_offset + self._size
        lost = position = 0
        while position < end:
            data = _next_data(self._fd, position, end)
            # Blocks that lie in the hole from one to the other; also the last one, which may be shorter.
            first = -(-max(position - self._data_offset, 0) // size)
            last = blocks.blocks if data == end else max(data - self._data_offset, 0) // size
            lost += states.count(block_map.DATA, first, last)
            position = end if data == end else os.lseek(self._fd, data, os.SEEK_HOLE)
        return lost

    def _open_to_inspect(self, name: str) -> int:
        try:
            return os.open(
                name,
                os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                dir_fd=self._root_fd,
            )
        except FileNotFoundError:
            raise errors.CacheCorrupt(f"{name} is missing") from None

    def write(self, offset: int, data: memoryview, keep: bool = True) -> None:
        """Write data of whole blocks, holes left out; `keep` it in the page cache."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._writers += 1
        try:
            with space_errors():
                self._leave_room(len(data))
                with self._writing:
                    write_all(self._fd, data, self._data_offset + offset)
            if not keep:
                self._write_behind.wrote(self._fd, self._data_offset + offset, len(data))
        finally:
            with self._lock:
                self._writers -= 1
                self._close_if_unused()

    def _leave_room(self, size: int) -> None:
        """Refuse data that would fill the disk to its end. Costs 1 us."""
        found = os.fstatvfs(self._root_fd)
        if found.f_bavail * found.f_frsize < size + RESERVE:
            raise errors.NoSpace

    def _sync_data(self) -> None:
        """fdatasync of what `write` wrote."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # Linux reports it once and may count the lost pages as clean: syncing again proves nothing.
            raise errors.CacheCorrupt(
                f"the cache's disk could not take the data ({error.strerror})"
            ) from error

    def disown(self) -> None:
        """Most formats name no source."""

    def finish(self) -> None:
        """Give the file its mode, owner and times, fsync it, link it into place, fsync the folders."""
        path = self._record.path
        with space_errors():
            os.fchown(self._fd, self._file_attributes.uid, self._file_attributes.gid)
            os.fchmod(self._fd, self._file_attributes.mode)
            os.utime(self._fd, ns=(self._record.created_ns, self._record.created_ns))
            os.fsync(self._fd)
            folders = _parents(path)
            try:
                for folder in folders:
                    with suppress(FileExistsError):
                        os.mkdir(folder, 0o755, dir_fd=self._root_fd)
                # A link, not a rename: it never replaces a file, and the partial name stays until the catalog is told.
                os.link(
                    self._data_name,
                    path,
                    src_dir_fd=self._root_fd,
                    dst_dir_fd=self._root_fd,
                    follow_symlinks=False,
                )
            except FileExistsError:
                if not self._is_ours(path):
                    raise errors.UserError(
                        f"cannot put the whole image at {path}: a file that lazyfs did not put there is in the way"
                    ) from None
            except NotADirectoryError:
                raise errors.UserError(
                    f"cannot put the whole image at {path}: a file is where its folder belongs"
                ) from None
            for folder in ["", *folders]:
                self._sync_folder(folder)

    def unfinish(self) -> None:
        """Unlink the plain file if it is another name of the data file."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._is_ours(self._record.path):
                os.unlink(self._record.path, dir_fd=self._root_fd)

    def _is_ours(self, path: str) -> bool:
        there = os.stat(path, dir_fd=self._root_fd, follow_symlinks=False)
        ours = os.stat(self._data_name, dir_fd=self._root_fd, follow_symlinks=False)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def remove(self) -> None:
        """Unlink the partial names; a whole image's plain file stays."""
        for name in self._names():
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._root_fd)

    def _names(self) -> list[str]:
        return [self._data_name]

    def close(self) -> None:
        """Close the files, once the writes under way have ended: by then their number could be another file's."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._writers:
            self._close_fds()

    def _close_fds(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _sync_folder(self, name: str) -> None:
        fd = os.open(name or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root_fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class WholeFile(FileReader):
    """A whole image: the plain file at its path, read-only. Implements `interfaces.PlainFile`."""

    def __init__(self, root_fd: int, record: ImageRecord) -> None:
        """Open the file.

        Raises:
            PlainFileGone: nothing is there.
            CacheCorrupt: it is not a file of the image's size, or cannot be opened.
        """
        self._root_fd = root_fd
        self._path = record.path
        self._name = record.path
        """Where it is now."""
        self._aside = f"{PARTIAL}/{record.inode}.{record.format}"
        size = record.file_size
        try:
            # O_NONBLOCK: should somebody have put a fifo there.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = os.open(record.path, flags, dir_fd=root_fd)
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
            kind = errors.PlainFileGone if gone else errors.CacheCorrupt
            raise kind(f"the plain file cannot be opened: {error.strerror}") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            os.close(self._fd)
            raise errors.CacheCorrupt(f"the plain file has {found.st_size} bytes, the image {size}")

    def fileno(self) -> int:
        """Return the open file's descriptor."""
        return self._fd

    def set_aside(self) -> None:
        """Move the plain file to where partial files are, from which a mount sweeps it if nobody removes it before."""
        with suppress(
            FileNotFoundError
        ):  # else, as another name of the same file, it would stay where it is
            os.unlink(self._aside, dir_fd=self._root_fd)
        os.rename(self._path, self._aside, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
        self._name = self._aside

    def restore(self) -> None:
        """Undo `set_aside`. Replaces nothing that was put in its place meanwhile."""
        with suppress(FileExistsError):
            os.link(self._aside, self._path, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
        os.unlink(self._aside, dir_fd=self._root_fd)
        self._name = self._path

    def remove(self) -> None:
        """Unlink the plain file; what has it open keeps it."""
        with suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._root_fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _next_data(fd: int, position: int, end: int) -> int:
    try:
        return min(os.lseek(fd, position, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # holes up to the end
            return end
        raise


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]
