"""Opens and removes what is on disk of an image."""

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lazyfs import errors
from lazyfs.core import map_file, shown_file
from lazyfs.core.block_map import BlockMap
from lazyfs.core.image_record import ImageRecord
from lazyfs.core.lifecycle import CHANGED_BY_HAND, Cause, State
from lazyfs.engine.budget import Budget
from lazyfs.engine.interfaces import PlainFile, PresentReader, Store, Stores
from lazyfs.units import MiB

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BLOCKS = 256 * MiB
"""The most blocks that one image may have: 16 TiB at 64 KiB. The map takes as many bytes of memory,
and the size is chosen by the repository, which is not trusted."""


def too_large(record: ImageRecord) -> str:
    """Return why this image cannot be cached with its block size, or "" if it can."""
    size = record.size or 0
    if size <= MAX_BLOCKS * record.block_size:
        return ""
    if size > MAX_BLOCKS * shown_file.MAX_BLOCK_SIZE[record.format]:
        return "too large for lazyfs"
    option = "--block-size" if record.format == shown_file.RAW else "--cluster-size"
    return f"too large for its blocks: mount with a larger {option} and an empty cache"


def map_bytes(record: ImageRecord) -> int:
    """Return what the cache of a partial image takes of the disk before there is any data.

    That is its map, or the metadata of a qcow2 image.
    """
    if record.format != shown_file.RAW:
        return record.shown.metadata_size
    blocks = -(-(record.size or 0) // record.block_size)
    return map_file.page_offset(-(-blocks // map_file.PAGE))


@dataclass(frozen=True, slots=True)
class Loaded:
    """Holds the open cache file of a partial image."""

    store: Store
    blocks: BlockMap
    kept: bool
    """False if there was no room even for a map, so that the store keeps nothing."""


def load(
    stores: Stores, record: ImageRecord, budget: Budget, present: PresentReader, fresh: bool
) -> Loaded:
    """Open what is on disk of an image, or begin it. Blocks, so call it in a thread.

    What is on disk and cannot be trusted is discarded.

    Args:
        stores: makes the store.
        record: the image.
        budget: the map takes its share of it.
        present: the map is shared with it.
        fresh: nothing is there yet, so the map takes its share of the budget now.

    Raises:
        OSError, CacheCorrupt, UserError: the files can neither be used nor begun anew.
    """
    assert record.size is not None

    def unkept() -> Loaded:
        assert record.size is not None
        return Loaded(stores.unkept(), BlockMap(record.size, record.block_size), False)

    reservation = budget.reserve(map_bytes(record) if fresh else 0)
    if reservation is None:
        return unkept()
    # Kept at once, because a count of what all images take includes the map of a partial image.
    reservation.keep()
    try:
        try:
            return _opened(stores, record, present)
        except errors.CacheCorrupt as error:
            logger.warning("cached part discarded: image=%s reason=%s", record.export, error)
        damaged = stores.partial(record)
        damaged.unfinish()
        damaged.remove()
        return _opened(stores, record, present)
    except errors.NoSpace:
        logger.warning(
            "no room to cache: image=%s; it is served from the repository", record.export
        )
        return unkept()
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise errors.UserError(
                f"the cache's file system cannot hold a file of {record.file_size} bytes"
            ) from error
        raise


def _opened(stores: Stores, record: ImageRecord, present: PresentReader) -> Loaded:
    store = stores.partial(record)
    try:
        blocks = store.load()
        present.share(record.inode, blocks, store)
        return Loaded(store, blocks, True)
    except BaseException:
        store.close()
        raise


def remove(stores: Stores, record: ImageRecord, take_over: Callable[[], T]) -> T:
    """Remove what is cached of an image, and return what `take_over` returns. Blocks.

    Processes that have the image open keep reading it.

    `take_over` tells the catalog. When it is called, nothing is at the image's path any more. If it
    fails, everything is as it was. If lazyfs crashes before it, the image is fetched again. If
    lazyfs crashes after it, files are left that the next mount removes.

    Raises:
        UserError: the plain file is not what lazyfs left there, so lazyfs must not remove it.
        OSError, or what `take_over` raises: nothing was removed.
    """
    plain = _plain_file(stores, record)
    partial = stores.partial(record) if record.state is not State.REMOTE else None
    try:
        if plain is not None:
            plain.set_aside()
        elif partial is not None:
            partial.unfinish()
        try:
            taken_over = take_over()
        except BaseException:
            if plain is not None:
                plain.restore()
            raise
        try:
            if plain is not None:
                plain.remove()
            if partial is not None:
                partial.remove()
        except OSError as error:
            logger.warning(
                "its room is free after the next mount: image=%s reason=%s", record.export, error
            )
        return taken_over
    finally:
        if plain is not None:
            plain.close()


def _plain_file(stores: Stores, record: ImageRecord) -> PlainFile | None:
    if record.cause is Cause.CHANGED_BY_HAND:
        raise errors.UserError(f"{record.path}: {CHANGED_BY_HAND}")
    if record.state is not State.WHOLE:
        return None
    try:
        return stores.whole(record)
    except errors.PlainFileGone:
        return None
    except errors.CacheCorrupt as error:
        raise errors.UserError(f"{record.path}: {error}; {CHANGED_BY_HAND}") from error


def disown(store: Store, record: ImageRecord) -> errors.CacheCorrupt | None:
    """Make sure that other programs do not read a mixture of two versions of an export. Blocks.

    They might do so when they open the file of a failed image without lazyfs.

    Returns:
        What the sync reported, if data may have been lost.
    """
    try:
        store.disown()
    except (errors.LazyfsError, OSError) as error:
        logger.warning("the file still names its export: image=%s reason=%s", record.export, error)
        return error if isinstance(error, errors.CacheCorrupt) else None
    return None
