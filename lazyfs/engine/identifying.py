"""Compares an image of which only the plain file was left with its export.

Its record does not say of which version of the export the file is, so its bytes have to. As much is
compared as on each new connection (`engine.fetch.samples`). Another version that differs only
elsewhere is found by `lazyfs verify --against-repository`.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.image_record import ImageRecord
from lazyfs.engine.fetch.samples import LONGEST, MOST
from lazyfs.engine.interfaces import PlainFile, Sample, Source


async def compare(
    record: ImageRecord,
    plain_file: Callable[[], PlainFile],
    source: Source,
    io_timeout_s: float,
    limiter: trio.CapacityLimiter,
) -> None:
    """Compare some of the data of a whole image with what the repository has.

    Nobody is said to have opened or used the image.

    Args:
        record: describes the image.
        plain_file: opens its plain file. Called in a thread.
        source: reads its export.
        io_timeout_s: how long all of it may take.
        limiter: limits the threads.

    Raises:
        ContentChanged: a difference was found.
        ExportChanged: the size or the identity of the export is another by now.
        LazyfsError, OSError: the cache or the repository cannot be read now.
    Cancellation: nothing is left under way.
    """
    file = await trio.to_thread.run_sync(plain_file, limiter=limiter)
    try:
        with trio.fail_after(io_timeout_s):
            await _compare(record, file, source, limiter)
    except trio.TooSlowError:
        raise errors.TimedOut(
            f"comparing {record.path}",
            io_timeout_s,
            source.trouble or "the repository does not answer",
        ) from None
    finally:
        source.drop_connection()
        file.close()


async def _compare(
    record: ImageRecord, file: PlainFile, source: Source, limiter: trio.CapacityLimiter
) -> None:
    refused: errors.RequestFailed | None = None
    compared = False
    places = partial(_places, file.fileno(), record.size or 0)
    for span in await trio.to_thread.run_sync(places, limiter=limiter):
        theirs = bytearray(span.length)
        try:
            await source.pread(span.start, memoryview(theirs))
        except errors.RequestFailed as error:
            refused = error  # the server cannot read it, which says nothing about its content
            continue
        ours = await trio.to_thread.run_sync(file.read, span.start, span.length, limiter=limiter)
        Sample(span.start, ours).check_same(record.export, theirs)
        compared = True
    if refused is not None and not compared:
        raise refused


def _places(fd: int, size: int) -> list[ByteRange]:
    """Return ranges of data all over the file, or its beginning if it is one hole. Blocks."""
    starts = {0}
    for place in range(MOST):
        with suppress(OSError):  # there is no more data
            found = os.lseek(fd, size * place // MOST, os.SEEK_DATA)
            starts.add(min(found, max(0, size - LONGEST)))
    return [ByteRange(start, min(start + LONGEST, size)) for start in sorted(starts)]
