"""Opens what there is of an image that is being filled."""

import errno
import logging

from lazyfs import errors
from lazyfs.core import shown_file
from lazyfs.core.block_map import BlockMap
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


def load(stores: Stores, record: ImageRecord) -> tuple[Store, BlockMap, bool]:
    """Return the store, what it holds, and whether it keeps anything: without room for a map it cannot.

    What is on disk and cannot be trusted is discarded. Blocks.

    Raises:
        OSError, CacheCorrupt, UserError: it can be neither used nor begun anew.
    """
    assert record.size is not None
    store = stores.partial(record)
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
