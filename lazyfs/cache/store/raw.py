"""The store of a raw image that is being filled.

It has two files: `partial/<inode>.raw`, which becomes the plain file, and `partial/<inode>.map`.

A checkpoint always writes to the disk in this order: data, fdatasync, map, fdatasync. The map file
has its full length from the start, so a checkpoint never needs space that a full disk could refuse.
Only data is written, so zeroes stay holes.
"""

import os
from collections.abc import Iterable

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
from lazyfs.core import map_file
from lazyfs.core.block_map import BlockMap
from lazyfs.core.image_record import ImageRecord
from lazyfs.engine.interfaces import FileAttributes


class RawStore(PartialFile):
    """Stores a raw image that is being filled. Implements `interfaces.Store`."""

    def __init__(self, root: Beneath, record: ImageRecord, attributes: FileAttributes) -> None:
        """`root` is the cache directory, opened before anything was mounted over it."""
        super().__init__(root, record, attributes)
        self._map_name = f"{PARTIAL}/{record.inode}.map"
        self._header = map_file.MapHeader(
            record.inode, self._size, record.block_size, record.export, record.identity
        )
        self._map_fd = -1

    def load(self) -> BlockMap:
        """Open the files, or create them, and return the map.

        The data file is created first, so that there is never a map without its data.

        Raises:
            CacheCorrupt: the files are damaged, do not belong together, or are not this image's.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        with space_errors():
            self._fd = self._open_data()
            self._map_fd = self._root.open(self._map_name, OPEN_FLAGS)
            return self._load_map() if self._begun() else self._create_map()

    def inspect(self) -> BlockMap:
        """Do what `load` does, but change nothing."""
        self._fd = self._open_to_inspect(self._data_name)
        self._map_fd = self._open_to_inspect(self._map_name)
        return self._load_map() if self._begun() else BlockMap(self._size, self._record.block_size)

    def _begun(self) -> bool:
        """Return whether the files contain anything.

        Raises:
            CacheCorrupt: they do, but they do not belong together.
        """
        data, saved = os.fstat(self._fd), os.fstat(self._map_fd)
        if data.st_size == 0 or (saved.st_size == 0 and data.st_blocks == 0):
            return False
        # The file must not be emptied and used again: it may already be the plain file as well.
        if data.st_size != self._size:
            raise errors.CacheCorrupt(
                f"the cache file has {data.st_size} bytes, the image {self._size}"
            )
        if saved.st_size == 0:
            raise errors.CacheCorrupt("the map is missing")
        return True

    def _create_map(self) -> BlockMap:
        blocks = -(-self._size // self._record.block_size)
        length = map_file.page_offset(-(-blocks // map_file.PAGE))
        # An old map is emptied before the data file gets its size. Otherwise the two could be taken
        # for a pair after a power cut.
        os.ftruncate(self._map_fd, 0)
        os.fdatasync(self._map_fd)
        os.ftruncate(self._fd, self._size)
        os.posix_fallocate(self._map_fd, 0, length)
        os.fdatasync(self._map_fd)
        # The header comes last. Without it, a map of zeroes says nothing.
        write_all(self._map_fd, self._header.encode(), 0)
        os.fdatasync(self._map_fd)
        self._root.sync_folder(PARTIAL)
        return BlockMap(self._size, self._record.block_size)

    def _load_map(self) -> BlockMap:
        self._header.check(os.pread(self._map_fd, map_file.PAGE, 0))
        counters = os.pread(self._map_fd, map_file.PAGE, map_file.COUNTERS_OFFSET)
        blocks = -(-self._size // self._record.block_size)
        try:
            states = read_exactly(self._map_fd, map_file.STATES_OFFSET, blocks)
        except errors.CacheCorrupt as error:
            raise errors.CacheCorrupt("the map is cut short") from error
        return BlockMap(
            self._size, self._record.block_size, states, map_file.decode_counters(counters)
        )

    def checkpoint(self, pages: Iterable[tuple[int, bytes]], mixed_zero_bytes: int) -> None:
        """Write in this order: data, fdatasync, map, fdatasync.

        Raises:
            CacheCorrupt: data did not reach the disk.
            NoSpace: the disk is full.
            OSError: the disk failed.
        """
        self._sync_data()
        with space_errors():
            for index, content in pages:
                write_all(self._map_fd, content, map_file.page_offset(index))
            write_all(
                self._map_fd, map_file.encode_counters(mixed_zero_bytes), map_file.COUNTERS_OFFSET
            )
            os.fdatasync(self._map_fd)

    def _names(self) -> list[str]:
        return [self._map_name, self._data_name]

    def _close_fds(self) -> None:
        map_fd, self._map_fd = self._map_fd, -1
        try:
            super()._close_fds()
        finally:
            if map_fd >= 0:
                os.close(map_fd)
