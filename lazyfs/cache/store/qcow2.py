"""A qcow2 image being filled: `partial/<inode>.qcow2`, a valid qcow2 at every moment, and its own map.

Its backing file is the export, so QEMU could open it without lazyfs (`core/qcow2_layout.py` has the format). Order on
disk, always:

    data, fdatasync, refcounts, fdatasync, L2 entries, fdatasync

so a crash can leak a cluster (counted, not yet in a table), never corrupt one; `load` mends the leak. At the end the
finished metadata is written, synced, and then the header that names no backing file. The metadata has its room on the
disk from the start, so no checkpoint needs any that a full disk could refuse.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from lazyfs import errors
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
from lazyfs.engine.interfaces import FileAttributes, ImageRecord
from lazyfs.units import MiB

_TABLES = ("the refcount table", "the refcounts of the metadata", "the L1 table")
"""`qcow2_layout.initial_tables`, for messages."""

_CHUNK = 1 * MiB
"""Of metadata written at once: an L2 entry is made in 50 ns, so a chunk takes 7 ms."""


class Qcow2Store(PartialFile):
    """A qcow2 image being filled. Implements `interfaces.Store`; offsets are those of the virtual disk."""

    def __init__(
        self, root_fd: int, record: ImageRecord, attributes: FileAttributes, backing: str
    ) -> None:
        """`backing`: the export, as QEMU opens it, for the header of a new file."""
        super().__init__(root_fd, record, attributes)
        self._backing = backing
        self._at = qcow2_layout.layout(self._size, record.block_size)
        self._data_offset = self._at.data_offset
        self._faults: list[str] = []
        self._leaks = 0
        """Of `inspect`: refcounts that are not what the L2 tables say."""
        self._own = map_file.MapHeader(
            record.inode, self._size, record.block_size, record.export, record.identity
        )
        self._finished = False
        """The header names no backing file any more, and has no place for counters."""

    def load(self) -> BlockMap:
        """Open the file, or create it."""
        with space_errors():
            try:
                self._fd = self._open_data(OPEN_FLAGS & ~os.O_CREAT)
            except FileNotFoundError:
                self._create()
                return BlockMap(self._size, self._record.block_size)
            return self._load_map(mend=True)

    def inspect(self) -> BlockMap:
        """As `load`, but changes nothing."""
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
            # `finish` has begun, perhaps, and made DATA of some of what is ZERO: the file's holes tell them apart.
            data_bytes = max(os.fstat(self._fd).st_blocks * 512 - self._data_offset, 0)
            mixed_zero_bytes += max(blocks.present_bytes - data_bytes, 0)
            return BlockMap(self._size, self._record.block_size, states, mixed_zero_bytes)
        return blocks

    def faults(self) -> list[str]:
        """Tables that QEMU needs and lazyfs does not, and wrong refcounts: `load` mends them."""
        leaks = [f"{self._leaks} refcounts are not those of the L2 tables"] if self._leaks else []
        return self._faults + leaks

    def _create(self) -> None:
        """Under another name until it is complete: what has the name of a partial image is always a qcow2."""
        header = qcow2_layout.partial_header(self._at, self._own, self._backing, 0)
        fresh = f"{self._data_name}.new"
        fd = os.open(fresh, OPEN_FLAGS | os.O_TRUNC, 0o600, dir_fd=self._root_fd)
        try:
            os.ftruncate(fd, self._at.file_size)
            room = os.fstatvfs(fd)
            if room.f_bavail * room.f_frsize < self._at.data_offset:
                raise errors.NoSpace  # else the attempt takes from others, for a moment, all that is left
            os.posix_fallocate(fd, 0, self._at.data_offset)
            for offset, content in [*qcow2_layout.initial_tables(self._at), (0, header)]:
                write_all(fd, content, offset)
            os.fsync(fd)
            os.rename(fresh, self._data_name, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)
            self._sync_folder(PARTIAL)
        except BaseException:
            os.close(fd)
            # What took up the rest of a full disk's room is given back.
            with suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=self._root_fd)
            raise
        self._fd = fd

    def _pages(self) -> Iterator[tuple[int, int]]:
        """Yield blocks `[first, end)` for each page of the map."""
        for first in range(0, self._at.clusters, block_map.PAGE_BLOCKS):
            yield first, min(first + block_map.PAGE_BLOCKS, self._at.clusters)

    def _load_page(self, first: int, end: int, mend: bool) -> bytes:
        """Return the states of a page, and take back (if to `mend`) what a crash left counted that is in no table."""
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
        """Whether a crash or a damaged disk left something else than what follows from the rest, and it stays so."""
        differs = read_exactly(self._fd, offset, len(expected)) != expected
        if differs and mend:
            write_all(self._fd, expected, offset)
        return differs and not mend

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Data, fdatasync, refcounts, fdatasync, L2 entries, fdatasync."""
        self._sync_data()
        if self._finished:
            return
        changed = [(index * block_map.PAGE_BLOCKS, content) for index, content in pages]
        with space_errors():
            for first, states in changed:
                offset, refcounts = qcow2_layout.encode_refcounts(self._at, first, states)
                write_all(self._fd, refcounts, offset)
            # Others write data to the same file meanwhile: that it was lost may be reported here, and only here.
            self._sync_data()
            for first, states in changed:
                offset, table = qcow2_layout.encode_l2(self._at, first, states)
                write_all(self._fd, table, offset)
            write_all(
                self._fd, qcow2_layout.counters(mixed_zero_bytes), qcow2_layout.COUNTERS_OFFSET
            )
            self._sync_data()

    def disown(self) -> None:
        """Let the header name a backing file that cannot be opened. Nothing is lost if the disk refuses."""
        if not self._finished:
            for offset, content in qcow2_layout.disown():
                write_all(self._fd, content, offset)
                self._sync_data()

    def _names(self) -> list[str]:
        return [self._data_name, f"{self._data_name}.new"]

    def finish(self) -> None:
        """Write the finished metadata, cut the backing file, and put the file in its place."""
        at = self._at
        with space_errors():
            for start in range(at.cluster_size, at.data_offset, _CHUNK):
                end = min(start + _CHUNK, at.data_offset)
                write_all(self._fd, qcow2_layout.finished(at, start, end), start)
            os.fdatasync(self._fd)
            self._finished = True
            write_all(self._fd, qcow2_layout.finished(at, 0, at.cluster_size), 0)
        super().finish()
