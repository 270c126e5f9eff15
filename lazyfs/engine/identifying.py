"""Compares an image of which only the plain file was left with its export.

Its record does not say of which version of the export the file is, so its bytes have to.
"""

import os
from collections.abc import Iterator
from contextlib import suppress

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine.image.handles import WholeHandle
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Source
from lazyfs.units import KiB

PLACES = 8
LONGEST = 64 * KiB
"""So much is compared as `engine.fetch.samples` compares on each new connection. Another version
that differs only elsewhere is found by `lazyfs verify --against-repository`."""


async def compare(image: Image, source: Source, io_timeout_s: float) -> None:
    """Compare some of the data of a whole image with what the repository has.

    Args:
        image: the image.
        source: reads its export.
        io_timeout_s: how long all of it may take.

    Raises:
        ContentChanged: a difference was found.
        ExportChanged: the size of the export differs.
        LazyfsError, OSError: the cache or the repository cannot be read now.
    Cancellation: nothing is left under way.
    """
    try:
        with trio.fail_after(io_timeout_s):
            handle = await image.open()
            try:
                if isinstance(handle, WholeHandle):
                    await _compare(image, handle, source)
            finally:
                await handle.aclose()
    except trio.TooSlowError:
        raise errors.TimedOut(
            f"comparing {image.record.path}", io_timeout_s, source.trouble
        ) from None
    finally:
        source.drop_connection()


async def _compare(image: Image, handle: WholeHandle, source: Source) -> None:
    places = list(_places(handle.file.fileno(), image.record.size or 0))
    for span in places:
        theirs = bytearray(span.length)
        await source.pread(span.start, memoryview(theirs))
        if theirs != await handle.read(span.start, span.length):
            raise errors.ContentChanged(image.record.export, span.start, span.end)


def _places(fd: int, size: int) -> Iterator[ByteRange]:
    """Yield ranges of data all over the file, or its beginning if it is one hole."""
    starts = {0}
    for place in range(PLACES):
        with suppress(OSError):  # there is no more data
            found = os.lseek(fd, size * place // PLACES, os.SEEK_DATA)
            starts.add(min(found, max(0, size - LONGEST)))
    for start in sorted(starts):
        yield ByteRange(start, min(start + LONGEST, size))
