"""Finds out which ranges of an image are present, for `query-map`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from lazyfs import errors
from lazyfs.core import block_map
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.lifecycle import State
from lazyfs.engine.image.handles import Handle, PartialHandle, WholeHandle
from lazyfs.engine.image.image import Image


@dataclass(frozen=True, slots=True)
class MapEntry:
    """Describes a range of the export. The fields are those of `qemu-img map --output=json`."""

    start: int
    length: int
    present: bool
    zero: bool
    data: bool


async def entries(image: Image, limiter: trio.CapacityLimiter) -> list[MapEntry]:
    """Return the map of an image, in order and without gaps.

    Raises:
        UserError: the size of the image is not known.
        CacheCorrupt, OSError: the plain file of a whole image cannot be looked at.
    """
    size = image.record.size
    if size is None:
        raise errors.UserError(f"the size of {image.record.path} is not known: open it, or ls -l")
    if image.record.state is State.WHOLE:
        handle = await image.open()
        try:
            return await entries_of(image, handle, limiter)
        finally:
            await handle.aclose()
    if image.filling is None:
        return [MapEntry(0, size, False, False, False)] if size else []
    return list(_joined(image.filling.table.runs()))


async def entries_of(
    image: Image, handle: Handle, limiter: trio.CapacityLimiter | None
) -> list[MapEntry]:
    """Return the map of an image that is open, in order and without gaps.

    Raises:
        OSError: the plain file cannot be looked at.
    """
    size = image.record.size
    assert size is not None
    if isinstance(handle, WholeHandle):
        begin = image.record.shown.metadata_size
        return await trio.to_thread.run_sync(
            _segments, handle.file.fileno(), begin, begin + size, limiter=limiter
        )
    assert isinstance(handle, PartialHandle)
    return list(_joined(handle.filling.table.runs()))


def _joined(runs: list[tuple[ByteRange, int]]) -> Iterator[MapEntry]:
    """Yield the map of an image that is not whole.

    What is being fetched counts as missing, so neighbouring runs may have to be joined.
    """
    last: MapEntry | None = None
    for span, state in runs:
        present, zero = state in (block_map.DATA, block_map.ZERO), state == block_map.ZERO
        entry = MapEntry(span.start, span.length, present, zero, state == block_map.DATA)
        if last is not None and (last.present, last.zero) == (entry.present, entry.zero):
            last = MapEntry(
                last.start, last.length + entry.length, last.present, last.zero, last.data
            )
            continue
        if last is not None:
            yield last
        last = entry
    if last is not None:
        yield last


def _segments(fd: int, begin: int, end: int) -> list[MapEntry]:
    """Return the map of a plain file, by SEEK_DATA and SEEK_HOLE of lseek(2)."""
    found = []
    position = begin
    while position < end:
        try:
            data = min(os.lseek(fd, position, os.SEEK_DATA), end)
        except OSError:  # ENXIO: only a hole is left
            data = end
        if data > position:
            found.append(MapEntry(position - begin, data - position, True, True, False))
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            found.append(MapEntry(data - begin, hole - data, True, False, True))
            data = hole
        position = data
    return found
