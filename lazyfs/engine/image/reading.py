"""Reads of the file shown: metadata that is made up, what the cache has, and what must be fetched."""

from collections.abc import Callable

import trio

from lazyfs.core.byte_range import ByteRange
from lazyfs.core.shown_file import ShownFile
from lazyfs.engine.fetch.fetcher import Fetcher
from lazyfs.engine.interfaces import ImageFile, Store
from lazyfs.engine.totals import Read


def read_now(
    shown: ShownFile | None, file: ImageFile | None, fetcher: Fetcher | None, offset: int, length: int
) -> bytes | None:
    """Return bytes of the file shown, if they are present and in the page cache; else None.

    The path of most reads, and so without a task's turn: 35 us less for 4 KiB than `read_partial`.

    Args:
        fetcher: of an image that is being filled; None if `file` is all of it.
    """
    if shown is None or file is None:
        return None
    wanted = ByteRange(min(offset, shown.size), min(offset + length, shown.size))
    if fetcher is not None:
        parts = shown.split(wanted)
        if len(parts) != 1 or not isinstance(part := parts[0], ByteRange):
            return None  # a qcow2's metadata
        if fetcher.distrust is not None or not fetcher.present(part):
            return None
        wanted = part
    if not wanted.length:
        return None
    try:
        return file.read_nowait(wanted.start, wanted.length)
    except OSError:
        return None  # whoever reads it in a thread says what it was


async def read_partial(
    shown: ShownFile, wanted: ByteRange, cache: Callable[[], tuple[Fetcher, Store]], read: Read | None
) -> bytes:
    """Return the bytes `wanted` of the file shown for an image that is being filled.

    Args:
        cache: returns what the image is read through now; that may change while a range is fetched.
        read: learns how it was served.

    Raises:
        RequestFailed, ExportChanged, UserError: a missing range cannot be had.
        OSError, CacheCorrupt: the cache file cannot be read.
    Cancellation: nothing is lost.
    """
    parts = [part if isinstance(part, bytes) else await _read_export(part, cache, read) for part in shown.split(wanted)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _read_export(wanted: ByteRange, cache: Callable[[], tuple[Fetcher, Store]], read: Read | None) -> bytes:
    fetcher, store = cache()
    if fetcher.distrust is not None:
        raise fetcher.distrust
    if not fetcher.present(wanted):
        data = await fetcher.read_missing(wanted, lambda part: cache()[1].read(part.start, part.length), read)
        if data is not None:
            return data
        _, store = cache()
    return await read_file(store, wanted)


async def read_file(file: ImageFile | None, wanted: ByteRange) -> bytes:
    """Return bytes of a cache file, which is open: in a thread only if the page cache does not have them."""
    assert file is not None
    if not wanted.length:
        return b""
    ready = file.read_nowait(wanted.start, wanted.length)
    return ready if ready is not None else await trio.to_thread.run_sync(file.read, wanted.start, wanted.length)
