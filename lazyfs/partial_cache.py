"""Opens and removes what there is on disk of an image."""

import errno
import logging
from contextlib import suppress

from lazyfs import errors
from lazyfs.budget import Budget
from lazyfs.core import map_file, shown_file
from lazyfs.core.block_map import BlockMap
from lazyfs.core.lifecycle import State
from lazyfs.interfaces import ImageRecord, Store, Stores
from lazyfs.units import MiB

logger = logging.getLogger(__name__)

MAX_BLOCKS = 256 * MiB
"""Blocks of one image: 16 TiB at 64 KiB. The map takes as many bytes of memory, and a stranger names the size."""


def too_large(record: ImageRecord) -> str:
    """Return why this image cannot be cached with these blocks; "" if it can."""
    size = record.size or 0
    if size <= MAX_BLOCKS * record.block_size:
        return ""
    if size > MAX_BLOCKS * shown_file.MAX_BLOCK_SIZE[record.format]:
        return "too large for lazyfs"
    option = "--block-size" if record.format == shown_file.RAW else "--cluster-size"
    return f"too large for its blocks: mount with a larger {option} and an empty cache"


def map_bytes(record: ImageRecord) -> int:
    """Return what the cache of a partial image takes of the disk before any data: its map, or a qcow2's metadata."""
    if record.format != shown_file.RAW:
        return record.shown.metadata_size
    blocks = -(-(record.size or 0) // record.block_size)
    return map_file.page_offset(-(-blocks // map_file.PAGE))


def load(stores: Stores, record: ImageRecord, budget: Budget, fresh: bool) -> tuple[Store, BlockMap, bool]:
    """Return the store, what it holds, and whether it keeps anything: without room for a map it cannot.

    What is on disk and cannot be trusted is discarded. `fresh`: nothing is there yet. Blocks.

    Raises:
        OSError, CacheCorrupt, UserError: it can be neither used nor begun anew.
    """
    assert record.size is not None
    store, room = stores.partial(record), map_bytes(record) if fresh else 0
    if not budget.reserve(room):
        return stores.unkept(), BlockMap(record.size, record.block_size), False
    budget.keep(room)  # at once: it counts from the moment that the image is partial
    try:
        try:
            return store, store.load(), True
        except errors.CacheCorrupt as error:
            logger.warning("cached part discarded: image=%s reason=%s", record.export, error)
            store.close()
            store.unfinish()
            store.remove()
            store = stores.partial(record)
            return store, store.load(), True
    except errors.NoSpace:
        logger.warning("no room to cache: image=%s; it is served from the repository", record.export)
        store.close()
        return stores.unkept(), BlockMap(record.size, record.block_size), False
    except BaseException as error:
        store.close()
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise errors.UserError(f"the cache's file system cannot hold a file of {record.file_size} bytes") from error
        raise


def remove(stores: Stores, record: ImageRecord) -> None:
    """Remove what is cached of an image. Who has it open goes on reading. Blocks.

    Raises:
        OSError.
    """
    if record.state is State.WHOLE:
        # A file that is gone, or is not what we left there, is not ours to remove.
        with suppress(errors.CacheCorrupt):
            plain = stores.whole(record)
            try:
                plain.remove()
            finally:
                plain.close()
    if record.state is not State.REMOTE:
        # Of a whole image, too: the hand-off may have been cancelled before it removed them.
        partial = stores.partial(record)
        partial.unfinish()
        partial.remove()
