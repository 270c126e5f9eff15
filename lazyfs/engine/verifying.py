"""Reads the cache back and compares it with a digest or with the repository.

Without either, it only finds out whether the cache can be read.
"""

import errno
import hashlib
import os
from collections.abc import Callable

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.engine.image import image_map
from lazyfs.engine.image.handles import Handle, WholeHandle
from lazyfs.engine.image.image import Image
from lazyfs.engine.interfaces import Source
from lazyfs.units import MiB

CHUNK = 1 * MiB
"""How much is read at once. It is unmeasured: a digest takes 2 ms for it, and a disk not much
longer."""


class Differs(errors.LazyfsError):
    """What is cached is not what it should be."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"the cache is damaged: {self.what}"


class DiffersFromRepository(Differs):
    """The cache and the repository have different bytes. Either may be right."""

    def __init__(self, what: str, start: int, end: int) -> None:
        super().__init__(what)
        self.args = what, start, end
        self.start = start
        self.end = end

    def __str__(self) -> str:
        return self.what


class OtherDigest(Differs):
    """The bytes of a whole image have another digest than the one asked for."""


async def verify(
    image: Image,
    digest: str,
    source: Source | None,
    io_timeout_s: float,
    progress: Callable[[int], None],
    limiter: trio.CapacityLimiter | None = None,
) -> None:
    """Read everything that is present of an image, from the disk where that can be forced.

    Args:
        image: the image.
        digest: of the whole export, or "" for none.
        source: reads the same version of the export, for comparison. None means no comparison.
        io_timeout_s: how long a range of `source` may take.
        progress: called with the number of bytes of each chunk.
        limiter: limits the threads that look at files and compute digests. None means trio's own.

    Raises:
        Differs, CacheCorrupt: the cache is damaged, or its disk cannot read it.
        DiffersFromRepository: `source` has other bytes.
        UserError: nothing is cached, or a digest is given and the image is not whole.
        OSError, LazyfsError: the cache or the repository cannot be read now.
    """
    if image.record.state is State.REMOTE:
        raise errors.UserError(f"nothing of {image.record.path} is cached")
    handle = await image.open()
    try:
        if isinstance(handle, WholeHandle):
            os.posix_fadvise(handle.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        elif digest:
            raise errors.UserError(
                f"{image.record.path} is not whole: its digest will be compared when it is"
            )
        await _read_back(image, handle, digest, source, io_timeout_s, progress, limiter)
    finally:
        await handle.aclose()


async def _read_back(
    image: Image,
    handle: Handle,
    digest: str,
    source: Source | None,
    io_timeout_s: float,
    progress: Callable[[int], None],
    limiter: trio.CapacityLimiter | None,
) -> None:
    hasher = hashlib.new(digest.partition(":")[0]) if digest else None
    begin = image.record.shown.metadata_size
    for entry in await image_map.entries_of(image, handle, limiter):
        if not entry.present:
            continue
        for start in range(entry.start, entry.start + entry.length, CHUNK):
            span = ByteRange(start, min(start + CHUNK, entry.start + entry.length))
            data = await _read(handle, begin, span)
            if hasher is not None:
                await trio.to_thread.run_sync(hasher.update, data, limiter=limiter)
            if source is not None and not await _same(source, span, data, io_timeout_s):
                what = f"differs from the repository at bytes {span.start} to {span.end}"
                raise DiffersFromRepository(what, span.start, span.end)
            progress(span.length)
            # Let other tasks run: reading from the page cache does not wait for anything.
            await trio.lowlevel.checkpoint()
    if hasher is not None and hasher.hexdigest() != digest.partition(":")[2]:
        raise OtherDigest(f"its digest is {hasher.name}:{hasher.hexdigest()}, not {digest}")


async def _read(handle: Handle, begin: int, span: ByteRange) -> bytes:
    try:
        return await handle.read(begin + span.start, span.length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Differs(f"the disk cannot read bytes {span.start} to {span.end}") from error


async def _same(source: Source, span: ByteRange, data: bytes, limit_s: float) -> bool:
    theirs = bytearray(span.length)
    try:
        with trio.fail_after(limit_s):
            await source.pread(span.start, memoryview(theirs))
    except trio.TooSlowError:
        what = f"comparing bytes {span.start} to {span.end}"
        raise errors.TimedOut(
            what, limit_s, source.trouble or "the repository does not answer"
        ) from None
    return theirs == data
