"""The store of a qcow2 image that is being filled.

The file is `partial/<inode>.qcow2`. It is a valid qcow2 at every moment, and its own map. Its
backing file is the export, so QEMU could open it without lazyfs (`core/qcow2_layout.py` has the
format). A checkpoint always writes to the disk in this order:

    data, fdatasync, refcounts, fdatasync, L2 entries, fdatasync

So a crash can leak a cluster (it is counted, but not yet in a table), but never corrupt one; `load`
repairs the leak. At the end the finished metadata is written and synced, and then the header that
names no backing file. The metadata has its space on the disk from the start, so no checkpoint needs
space that a full disk could refuse.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from lazyfs import errors
from lazyfs.cache.beneath import Beneath
from lazyfs.cache.store.cache_file import (
    OPEN_FLAGS,
    PARTIAL,
    PartialFile,
    read_exactly,
    space_errors,
    write_all,
)
from lazyfs.core import block_map, map_file, qcow2_layout
from lazyfs.core.block_map import BlockMap
from lazyfs.core.image_record import ImageRecord
from lazyfs.engine.interfaces import FileAttributes
from lazyfs.units import MiB

_TABLES = ("the refcount table", "the refcounts of the metadata", "the L1 table")
"""The names of `qcow2_layout.initial_tables`, for messages."""

_CHUNK = 1 * MiB
"""How many bytes of metadata are written at once. An L2 entry is made in 50 ns, so a chunk takes
7 ms."""


class Qcow2Store(PartialFile):
    """Stores a qcow2 image that is being filled. Implements `interfaces.Store`.

    Offsets are those of the virtual disk.
    """

    def __init__(
        self, root: Beneath, record: ImageRecord, attributes: FileAttributes, backing: str
    ) -> None:
        """`backing` is the export, as QEMU opens it, for the header of a new file."""
        super().__init__(root, record, attributes)
        self._backing = backing
        self._at = qcow2_layout.layout(self._size, record.block_size)
        self._data_offset = self._at.data_offset
        self._faults: list[str] = []
        self._leaks = 0
        """The number of refcounts, found by `inspect`, that do not agree with the L2 tables."""
        self._own = map_file.MapHeader(
            record.inode, self._size, record.block_size, record.export, record.identity
        )
        self._finished = False
        """Whether the header no longer names a backing file, and so has no place for counters."""

    def load(self) -> BlockMap:
        """Open the file, or create it, and return its map.

        Raises:
            CacheCorrupt: the file is damaged, or is not this image's.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        with space_errors():
            try:
                self._fd = self._open_data(OPEN_FLAGS & ~os.O_CREAT)
            except FileNotFoundError:
                self._create()
                return BlockMap(self._size, self._record.block_size)
            return self._load_map(mend=True)

    def inspect(self) -> BlockMap:
        """Do what `load` does, but change nothing."""
        self._fd = self._open_to_inspect(self._data_name)
        return self._load_map(mend=False)

    def _load_map(self, mend: bool) -> BlockMap:
        header = read_exactly(self._fd, 0, self._at.cluster_size)
        self._finished = qcow2_layout.is_finished_header(self._at, header)
        mixed_zero_bytes = (
            0 if self._finished else qcow2_layout.check_partial_header(self._at, self._own, header)
        )
        if (found := os.fstat(self._fd).st_size) != self._at.file_size:
            raise errors.CacheCorrupt(
                f"the cache file has {found} bytes, expected {self._at.file_size}"
            )
        for (offset, expected), name in zip(
            qcow2_layout.initial_tables(self._at), _TABLES, strict=True
        ):
            if self._differs(offset, expected, mend):
                self._faults.append(f"{name} is damaged")
        states = b"".join(self._load_page(first, end, mend) for first, end in self._pages())
        blocks = BlockMap(self._size, self._record.block_size, states, mixed_zero_bytes)
        if blocks.complete:
            # `finish` may have begun and turned some ZERO blocks into DATA. The holes of the file
            # show how many bytes are really data.
            data_bytes = max(os.fstat(self._fd).st_blocks * 512 - self._data_offset, 0)
            mixed_zero_bytes += max(blocks.present_bytes - data_bytes, 0)
            return BlockMap(self._size, self._record.block_size, states, mixed_zero_bytes)
        return blocks

    def faults(self) -> list[str]:
        """Return what `load` repairs: wrong refcounts, and damaged tables.

        QEMU needs these tables, but lazyfs does not.
        """
        leaks = [f"{self._leaks} refcounts are not those of the L2 tables"] if self._leaks else []
        return self._faults + leaks

    def _create(self) -> None:
        """Create the file under another name and rename it when it is complete.

        So a file with the name of a partial image is always a valid qcow2.
        """
        header = qcow2_layout.partial_header(self._at, self._own, self._backing, 0)
        fresh = f"{self._data_name}.new"
        fd = self._root.open(fresh, OPEN_FLAGS | os.O_TRUNC)
        try:
            os.ftruncate(fd, self._at.file_size)
            room = os.fstatvfs(fd)
            if room.f_bavail * room.f_frsize < self._at.data_offset:
                # An attempt would take all that is left of the disk from others for a moment.
                raise errors.NoSpace
            os.posix_fallocate(fd, 0, self._at.data_offset)
            for offset, content in [*qcow2_layout.initial_tables(self._at), (0, header)]:
                write_all(fd, content, offset)
            os.fsync(fd)
            self._root.rename(fresh, self._data_name)
            self._root.sync_folder(PARTIAL)
        except BaseException:
            os.close(fd)
            # On a full disk, the new file may hold the last free space. This frees it.
            with suppress(FileNotFoundError):
                self._root.unlink(fresh)
            raise
        self._fd = fd

    def _pages(self) -> Iterator[tuple[int, int]]:
        """Yield blocks `[first, end)` for each page of the map."""
        for first in range(0, self._at.clusters, block_map.PAGE_BLOCKS):
            yield first, min(first + block_map.PAGE_BLOCKS, self._at.clusters)

    def _load_page(self, first: int, end: int, mend: bool) -> bytes:
        """Return the states of a page of the map.

        A crash can leave clusters that are counted but in no table. With `mend` their refcounts are
        corrected.
        """
        table = read_exactly(self._fd, self._at.l2_offset + 8 * first, 8 * (end - first))
        states = qcow2_layout.decode_l2(self._at, first, table)
        if self._finished and states.count(block_map.DATA) != len(states):
            raise errors.CacheCorrupt("a finished qcow2 lacks clusters")
        offset, expected = qcow2_layout.encode_refcounts(self._at, first, states)
        if self._differs(offset, expected, mend):
            counted = read_exactly(self._fd, offset, len(expected))
            self._leaks += sum(
                counted[i : i + 2] != expected[i : i + 2] for i in range(0, len(expected), 2)
            )
        return states

    def _differs(self, offset: int, expected: bytes, mend: bool) -> bool:
        """Return whether the bytes on disk are not the expected ones, and remain so.

        A crash or a damaged disk can cause that. With `mend` the expected bytes are written.
        """
        differs = read_exactly(self._fd, offset, len(expected)) != expected
        if differs and mend:
            write_all(self._fd, expected, offset)
        return differs and not mend

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Write in this order: data, fdatasync, refcounts, fdatasync, L2 entries, fdatasync.

        Raises:
            CacheCorrupt: data did not reach the disk.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        self._sync_data()
        if self._finished:
            return
        changed = [(index * block_map.PAGE_BLOCKS, content) for index, content in pages]
        with space_errors():
            for first, states in changed:
                offset, refcounts = qcow2_layout.encode_refcounts(self._at, first, states)
                write_all(self._fd, refcounts, offset)
            # Other threads write data to the same file meanwhile. If that data is lost, the kernel
            # may report it to this sync and to no other.
            self._sync_data()
            for first, states in changed:
                offset, table = qcow2_layout.encode_l2(self._at, first, states)
                write_all(self._fd, table, offset)
            write_all(
                self._fd, qcow2_layout.counters(mixed_zero_bytes), qcow2_layout.COUNTERS_OFFSET
            )
            self._sync_data()

    def disown(self) -> None:
        """Make the header name a backing file that cannot be opened.

        The file loses nothing if the disk refuses.
        """
        if not self._finished:
            for offset, content in qcow2_layout.disown():
                write_all(self._fd, content, offset)
                self._sync_data()

    def _names(self) -> list[str]:
        return [self._data_name, f"{self._data_name}.new"]

    def finish(self) -> None:
        """Write the finished metadata, remove the backing file, and put the file at its path.

        Raises:
            UserError: another file is in the way.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        self.check_path()
        at = self._at
        with space_errors():
            for start in range(at.cluster_size, at.data_offset, _CHUNK):
                end = min(start + _CHUNK, at.data_offset)
                write_all(self._fd, qcow2_layout.finished(at, start, end), start)
            os.fdatasync(self._fd)
            self._finished = True
            write_all(self._fd, qcow2_layout.finished(at, 0, at.cluster_size), 0)
        super().finish()
