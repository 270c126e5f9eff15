"""Opens and removes what there is on disk of an image."""

import errno
import logging

from lazyfs import errors
from lazyfs.budget import Budget
from lazyfs.core import map_file, shown_file
from lazyfs.core.block_map import BlockMap
from lazyfs.core.lifecycle import CHANGED_BY_HAND, State
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
        UserError: its plain file is not what lazyfs left there, so not ours to remove.
        OSError.
    """
    if record.error == CHANGED_BY_HAND:
        raise errors.UserError(f"{record.path}: {CHANGED_BY_HAND}")
    if record.state is State.WHOLE:
        try:
            plain = stores.whole(record)
        except errors.PlainFileGone:
            pass
        except errors.CacheCorrupt as error:
            raise errors.UserError(f"{record.path}: {error}; {CHANGED_BY_HAND}") from error
        else:
            plain.remove()
            plain.close()
    if record.state is not State.REMOTE:
        # Of a whole image, too: the hand-off may have been cancelled before it removed them.
        partial = stores.partial(record)
        partial.unfinish()
        partial.remove()


def as_found(stores: Stores, record: ImageRecord) -> ImageRecord:
    """Return the record as it has to be after a removal that failed half-way. Blocks."""
    if record.state is not State.WHOLE:
        return record  # what is not there any more is begun anew
    try:
        stores.whole(record).close()
    except errors.PlainFileGone:
        return record.remote_again()
    except errors.CacheCorrupt:
        pass  # as it was before
    return record


def disown(store: Store, record: ImageRecord) -> errors.CacheCorrupt | None:
    """See to it that nobody who opens a failed image's file without lazyfs reads a mixture of two versions. Blocks.

    Returns what the sync reported, if data may have been lost.
    """
    try:
        store.disown()
    except (errors.LazyfsError, OSError) as error:
        logger.warning("the file still names its export: image=%s reason=%s", record.export, error)
        return error if isinstance(error, errors.CacheCorrupt) else None
    return None
