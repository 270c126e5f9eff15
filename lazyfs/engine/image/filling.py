"""Holds a cache file that is being filled: the reads through it, its fetches, and its checkpoints.

An image fills at most one cache file. A handle that was opened on an earlier one keeps that until
it is closed. A checkpoint makes the data durable first, and then the map
(`interfaces.Store.checkpoint`).
"""

from collections.abc import Callable
from typing import TypeVar

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import FetchCounters
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine import totals
from lazyfs.engine.context import Context
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.fetch.cache_writer import CacheWriter
from lazyfs.engine.fetch.demand_reader import DemandReader
from lazyfs.engine.fetch.fill_port import FillPort
from lazyfs.engine.fetch.samples import Compared, Samples
from lazyfs.engine.image.partial_cache import Loaded
from lazyfs.engine.interfaces import Export, ImageFile, Store
from lazyfs.engine.pace import Pace
from lazyfs.engine.totals import Totals

ImageT = TypeVar("ImageT")


class Filling:
    """Holds the open cache file of an image that is not whole, and all that fetches for it."""

    kept = True
    """True if the store keeps what is written."""

    def __init__(
        self,
        store: Store,
        table: BlockTable,
        writer: CacheWriter,
        reader: DemandReader,
        port: FillPort,
        samples: Samples,
        totals: Totals,
    ) -> None:
        self.store = store
        self.table = table
        self.writer = writer
        self.reader = reader
        self.port = port
        self.samples = samples
        self._totals = totals
        self._checkpointing = trio.Lock()

    def message(self) -> str:
        """Return what an operator should know of this cache file, or ""."""
        if self.table.distrust is not None:
            return (
                f"{self.table.distrust}: reads fail; mount anew to go on from the last checkpoint"
            )
        return self.writer.message()

    async def checkpoint(self, limiter: trio.CapacityLimiter) -> None:
        """Make durable what is present now, in a thread of `limiter`.

        Raises:
            NoSpace, OSError: nothing is lost. The next checkpoint tries again.
            CacheCorrupt: data was lost, so present blocks cannot be trusted. Nothing is read any
                more.
        Cancellation: takes effect before or after the checkpoint, not during it.
        """
        async with self._checkpointing:
            if (distrust := self.table.distrust) is not None:
                raise distrust.again()
            pages, mixed_zero_bytes = self.table.take_dirty()
            if not pages:
                return
            saved = False
            try:
                await trio.to_thread.run_sync(
                    self.store.checkpoint, pages, mixed_zero_bytes, limiter=limiter
                )
                saved = True
            except errors.CacheCorrupt as error:
                self.table.stop_reading(error)
                self._totals.failed(totals.CHECKPOINT)
                raise
            except Exception:
                self._totals.failed(totals.CHECKPOINT)
                raise
            finally:
                if not saved:
                    self.table.give_back(index for index, _ in pages)


class Unkept(Filling):
    """Serves an image for which there was no room, not even for its map. Nothing is kept."""

    kept = False


def make_filling(
    export: Export,
    loaded: Loaded,
    context: Context[ImageT],
    *,
    pace: Pace,
    counters: FetchCounters,
    compared: Compared,
    on_changed: Callable[[errors.ExportChanged], None],
    is_open: Callable[[], bool],
) -> Filling:
    """Return what serves reads of a cache file that was opened, and fetches for it.

    It connects when it first needs to.

    Args:
        export: the export to fetch from.
        loaded: the cache file.
        context: what all images share.
        pace: the pace of the image.
        counters: what was fetched of the image before.
        compared: counts what is compared with the repository.
        on_changed: called when the export turns out to be another version.
        is_open: returns whether somebody has the image open. Called from population's threads.
    """
    totals = context.totals
    table = BlockTable(loaded.blocks, counters, totals)
    writer = CacheWriter(export.name, loaded.store, context.budget, totals)
    samples = Samples(table, loaded.store, totals, compared)
    reader = DemandReader(
        export,
        context.repository.source(export, samples.take),
        table,
        writer,
        nursery=context.nursery,
        pace=pace,
        io_timeout_s=context.io_timeout_s,
        totals=totals,
        writes=context.writes,
        under_way=context.under_way,
        waiting=context.waiting,
        on_changed=on_changed,
    )
    port = FillPort(export, table, writer, pace, totals, is_open)
    kind = Filling if loaded.kept else Unkept
    return kind(loaded.store, table, writer, reader, port, samples, totals)


def read_now(filling: Filling, shown: ShownFile, offset: int, length: int) -> bytes | None:
    """Return bytes of the file shown if they are present and in the page cache, else None.

    Does not block.
    """
    wanted = clip(shown, offset, length)
    parts = shown.split(wanted)
    if len(parts) != 1 or not isinstance(part := parts[0], ByteRange):
        return None  # a qcow2's metadata
    if filling.table.distrust is not None or not filling.table.present(part) or not part.length:
        return None
    return nowait(filling.store, part)


def clip(shown: ShownFile, offset: int, length: int) -> ByteRange:
    """Return the range of a read, cut at the end of the file shown."""
    return ByteRange(min(offset, shown.size), min(offset + length, shown.size))


def nowait(file: ImageFile, wanted: ByteRange) -> bytes | None:
    """Read as `ImageFile.read_nowait` does, but return None if it fails.

    The caller then reads in a thread, and that reports the error.
    """
    try:
        return file.read_nowait(wanted.start, wanted.length)
    except OSError:
        return None


async def read_file(file: ImageFile, wanted: ByteRange) -> bytes:
    """Return bytes of an open cache file. A thread is used only if the page cache does not have
    them.

    Cancellation: the thread goes on by itself. The file stays open until it has read.
    """
    if not wanted.length:
        return b""
    ready = file.read_nowait(wanted.start, wanted.length)
    return (
        ready
        if ready is not None
        else await trio.to_thread.run_sync(
            file.read, wanted.start, wanted.length, abandon_on_cancel=True
        )
    )
