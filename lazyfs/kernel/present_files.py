"""Lets the keeper read what is present, and counts what it has read.

Source: memfd_create(2).
"""

import logging
import mmap
import os
import random
import struct
import threading

from lazyfs.core.block_map import BlockMap
from lazyfs.core.histogram import HistogramStatistics
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.fetch.samples import LONGEST, MOST, read_samples
from lazyfs.engine.interfaces import ImageFile, Sample, Samples
from lazyfs.engine.totals import READ_BOUNDS_S
from lazyfs.host import writeback
from lazyfs.kernel.channel import Keeper, Orphan, Shown

logger = logging.getLogger(__name__)

_COUNTERS = struct.Struct(f"={len(READ_BOUNDS_S) + 1}QQQ")
"""struct counters of kernel/keeper.h: reads by how long they took, nanoseconds, bytes."""


class PresentFiles:
    """Implements `interfaces.PresentReader` with the keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._maps: dict[int, int] = {}
        """Descriptors of the maps that are shared and not shown yet, by inode."""
        self._counters: mmap.mmap | None = None
        self.stays = False
        """True if what is shown stays so although it is closed here: another daemon goes on."""

    def share(self, inode: int, blocks: BlockMap, file: ImageFile) -> None:
        """Share a map as `PresentReader.share` describes."""
        if not blocks.blocks:
            return
        if self._keeper.mounted:
            self._take_over(inode, blocks, file)
        fd = os.memfd_create("map")
        try:
            os.ftruncate(fd, blocks.blocks)
            blocks.live_in(mmap.mmap(fd, blocks.blocks))
        except BaseException:
            os.close(fd)
            raise
        self._replace(inode, fd)

    def _take_over(self, inode: int, blocks: BlockMap, file: ImageFile) -> None:
        known = self._keeper.known_of(inode)
        if known is None:
            return
        map_fd, file_fd = known
        try:
            same = os.path.samestat(os.fstat(file_fd), os.fstat(file.fileno()))
            if writeback.has_failed(file_fd):
                logger.error(
                    "data was lost, so the map of the last checkpoint counts: inode=%d", inode
                )
            elif same and os.fstat(map_fd).st_size == blocks.blocks:
                blocks.take_over(os.pread(map_fd, blocks.blocks, 0))
        finally:
            os.close(map_fd)
            os.close(file_fd)

    def _replace(self, inode: int, fd: int | None) -> None:
        with self._lock:
            old = self._maps.pop(inode, None)
            if fd is not None:
                self._maps[inode] = fd
        if old is not None:
            os.close(old)

    def show(
        self, inode: int, shown: ShownFile, file: ImageFile | None, blocks: BlockMap | None
    ) -> None:
        """Show a file as `PresentReader.show` describes."""
        part = shown.export_part
        where = Shown(
            inode,
            shown.size,
            part.start if blocks is not None else 0,
            part.length if blocks is not None else shown.size,
            0 if blocks is None else blocks.block_size.bit_length() - 1,
        )
        self._keeper.show(where, None if file is None else file.fileno(), self._maps.get(inode))
        self._replace(inode, None)

    def orphan(self, inode: int, record: ImageRecord, may_fetch: bool) -> None:
        """Tell of an orphan as `PresentReader.orphan` describes."""
        assert record.size is not None
        self._keeper.orphan(
            Orphan(
                inode,
                record.export,
                record.size,
                record.identity,
                record.format,
                record.block_size,
                may_fetch,
            )
        )

    def keep_name(self, inode: int) -> None:
        """Undo `orphan`."""
        self._keeper.keep_name(inode)

    def withdraw(self, inode: int, *, distrusted: bool = False) -> None:
        """Withdraw a file as `PresentReader.withdraw` describes."""
        self._replace(inode, None)
        if distrusted or not self.stays:
            self._keeper.withdraw(inode)

    def samples_of(self, orphan: Orphan, shown: ShownFile) -> Samples:
        """Return what reads some of what is present of an orphan, to be compared."""

        def samples() -> list[Sample]:
            known = self._keeper.known_of(orphan.inode)
            if known is None:
                return []
            map_fd, file_fd = known
            data_offset = shown.export_part.start
            try:
                states = os.pread(map_fd, os.fstat(map_fd).st_size, 0)
                blocks = BlockMap(orphan.size, orphan.block_size, states)
                return read_samples(
                    blocks.some_data(MOST, LONGEST, random.random),
                    lambda start, length: os.pread(file_fd, length, data_offset + start),
                )
            finally:
                os.close(map_fd)
                os.close(file_fd)

        return samples

    def count_in(self, counters_fd: int) -> None:
        """Begin to read the keeper's counters."""
        self._counters = mmap.mmap(counters_fd, _COUNTERS.size, prot=mmap.PROT_READ)

    def reads(self) -> HistogramStatistics | None:
        """Return how many seconds the reads took that the keeper has answered since the mount."""
        if self._counters is None:
            return None
        *counts, time_ns, _ = _COUNTERS.unpack_from(self._counters)
        return HistogramStatistics(READ_BOUNDS_S, tuple(counts), time_ns / 1e9)
