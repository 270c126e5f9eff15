"""What the repository says of an export's content: which ranges are data, which read as zeroes.

Source: the NBD protocol, "base:allocation" metadata context. Flag bit 0 is NBD_STATE_HOLE, bit 1 is
NBD_STATE_ZERO; they are independent. Only ZERO matters here: a range that reads as zeroes is never
fetched, a hole without ZERO has undefined content and is fetched like data.

Knowledge is kept by window, aligned pieces of the image that are asked about at once, because an
export of terabytes should not be asked about as a whole before its first byte is read.

    window 0          window 1          window 2
    |=====  ====    ==|not asked yet    |      (empty: |    = data ranges, kept as pairs
                                                all zero)
"""

import errno
from array import array
from bisect import bisect_right
from collections.abc import Iterable

from lazyfs.core.byte_range import ByteRange
from lazyfs.errors import RequestFailed
from lazyfs.units import KiB, MiB

STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

WINDOW = 256 * MiB
"""Bytes asked about at once. Unmeasured: a GiB takes four questions, one window's answer stays
small."""

GRAIN = 4 * KiB
"""Zero ranges are trusted in units of this, so that a fetch is never cut finer than a page."""


def parse_block_status(asked: ByteRange, entries: Iterable[int], export: str) -> list[ByteRange]:
    """Return the data ranges in `asked`, and how far the answer reaches, as judged from a server's
    reply.

    Args:
        entries: alternating lengths and flags, as libnbd passes them on.

    Returns:
        Data ranges in order, merged, inside `asked`; the last element is an empty range at the
        first byte the reply says nothing about (servers may answer for less than was asked, or for
        more).

    Raises:
        RequestFailed: an empty reply or an extent of length 0, which would make no progress.
    """
    data: list[ByteRange] = []
    position = asked.start
    pairs = iter(entries)
    for length, flags in zip(pairs, pairs, strict=False):
        if length == 0:
            raise RequestFailed(
                f"block status of {export}: the server sent an empty extent; it", errno.EPROTO
            )
        end = min(position + length, asked.end)
        if not flags & STATE_ZERO and end > position:
            if data and data[-1].end == position:
                data[-1] = ByteRange(data[-1].start, end)
            else:
                data.append(ByteRange(position, end))
        position = end
        if position == asked.end:
            break
    if position == asked.start:
        raise RequestFailed(f"block status of {export}: the server sent nothing; it", errno.EPROTO)
    data.append(ByteRange(position, position))
    return data


class ExtentMap:
    """The data ranges of one export, as far as they are known. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._windows: dict[int, array[int]] = {}

    def window_of(self, offset: int) -> ByteRange:
        """Return the window that holds `offset`."""
        start = offset - offset % WINDOW
        return ByteRange(start, min(start + WINDOW, self.size))

    def first_unknown(self, within: ByteRange) -> ByteRange | None:
        """Return the first window touching `within` that nobody has learned yet."""
        for start in range(within.start - within.start % WINDOW, within.end, WINDOW):
            if start not in self._windows:
                return self.window_of(start)
        return None

    def known_until(self, offset: int, limit: int) -> int:
        """Return the end of the known windows that follow `offset` without a gap, at most
        `limit`."""
        unknown = self.first_unknown(ByteRange(offset, limit)) if offset < limit else None
        return limit if unknown is None else max(offset, unknown.start)

    def learn(self, window: ByteRange, data: Iterable[ByteRange]) -> None:
        """Keep `data`, ordered ranges inside `window`, widened to GRAIN; the rest of the window is
        zeroes."""
        bounds: array[int] = array("Q")
        for piece in data:
            inside = piece.clip(window)
            if not inside.length:
                continue
            wide = inside.align_out(GRAIN, self.size)
            if bounds and wide.start <= bounds[-1]:
                bounds[-1] = max(bounds[-1], wide.end)
            else:
                bounds.extend(wide)
        self._windows[window.start] = bounds

    def data_ranges(self, within: ByteRange) -> list[ByteRange]:
        """Return the data inside `within`, in order. Every window it touches must be known."""
        found: list[ByteRange] = []
        for start in range(within.start - within.start % WINDOW, within.end, WINDOW):
            bounds = self._windows[start]
            # Bounds alternate start, end: an odd position lies inside a range.
            index = bisect_right(bounds, within.start)
            for i in range(index - index % 2, len(bounds), 2):
                if bounds[i] >= within.end:
                    break
                piece = ByteRange(bounds[i], bounds[i + 1]).clip(within)
                if piece.length and found and found[-1].end == piece.start:
                    found[-1] = ByteRange(found[-1].start, piece.end)
                elif piece.length:
                    found.append(piece)
        return found

    def zero_ranges(self, within: ByteRange) -> list[ByteRange]:
        """Return what lies between the data ranges of `within`, in order."""
        zeroes = []
        position = within.start
        for piece in self.data_ranges(within):
            if piece.start > position:
                zeroes.append(ByteRange(position, piece.start))
            position = piece.end
        if position < within.end:
            zeroes.append(ByteRange(position, within.end))
        return zeroes
