"""Stores what the repository says about the content of an export: which ranges are data or
zeroes.

Source: the NBD protocol, "base:allocation" metadata context. Flag bit 0 is NBD_STATE_HOLE, and bit
    1 is NBD_STATE_ZERO. They are independent. Only ZERO matters here. A range that reads as zeroes
    is never fetched. A hole without ZERO has undefined content, and is fetched like data.

The answers are stored by window. Windows are aligned pieces of the image, each of which is asked
about at once. An export of terabytes should not be asked about as a whole before its first byte is
read.

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
"""How many bytes are asked about at once. It is unmeasured. A GiB takes four questions, and the
answer for one window stays small."""

GRAIN = 4 * KiB
"""Zero ranges are trusted in units of this size, so that a fetch is never cut finer than a page."""


def parse_block_status(asked: ByteRange, entries: Iterable[int], export: str) -> list[ByteRange]:
    """Return the data ranges in `asked`, and how far the answer reaches, from a server's reply.

    Args:
        asked: the range about which the server was asked.
        entries: lengths and flags by turns, as libnbd passes them on.
        export: the name of the export, for messages.

    Returns:
        Data ranges in order, merged, inside `asked`. The last element is an empty range at the
            first byte about which the reply says nothing, because servers may answer for less than
            was asked, or for more.

    Raises:
        RequestFailed: the reply is empty, or has an extent of length 0, which would make no
            progress.
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
    """Stores the data ranges of one export, as far as they are known. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._windows: dict[int, array[int]] = {}

    def window_of(self, offset: int) -> ByteRange:
        """Return the window that holds `offset`."""
        start = offset - offset % WINDOW
        return ByteRange(start, min(start + WINDOW, self.size))

    def first_unknown(self, within: ByteRange) -> ByteRange | None:
        """Return the first window touching `within` that nobody has learned yet, or None."""
        for start in range(within.start - within.start % WINDOW, within.end, WINDOW):
            if start not in self._windows:
                return self.window_of(start)
        return None

    def known_until(self, offset: int, limit: int) -> int:
        """Return the end of the known windows that follow `offset` without a gap.

        It is at most `limit`.
        """
        unknown = self.first_unknown(ByteRange(offset, limit)) if offset < limit else None
        return limit if unknown is None else max(offset, unknown.start)

    def learn(self, window: ByteRange, data: Iterable[ByteRange]) -> None:
        """Store the data ranges of a window. The rest of the window is zeroes.

        Args:
            window: the window.
            data: ordered ranges inside `window`. They are widened to GRAIN.
        """
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
        """Return the data inside `within`, in order. Every window that it touches must be known."""
        found: list[ByteRange] = []
        for start in range(within.start - within.start % WINDOW, within.end, WINDOW):
            bounds = self._windows[start]
            # Bounds are starts and ends by turns, so an odd index is inside a range.
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
        """Return what is between the data ranges of `within`, in order."""
        zeroes = []
        position = within.start
        for piece in self.data_ranges(within):
            if piece.start > position:
                zeroes.append(ByteRange(position, piece.start))
            position = piece.end
        if position < within.end:
            zeroes.append(ByteRange(position, within.end))
        return zeroes
