"""Half-open ranges of bytes, `[start, end)`, and their alignment to blocks."""

from collections.abc import Iterator
from typing import NamedTuple


class ByteRange(NamedTuple):
    """Names the bytes from `start` up to, but not including, `end`.

    The offsets are never negative. A range may be empty.
    """

    start: int
    end: int

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return self.end - self.start

    def clip(self, other: "ByteRange") -> "ByteRange":
        """Return the part of this range that lies inside `other`.

        If no part does, the result is an empty range at the nearer end of `other`.
        """
        start = min(max(self.start, other.start), other.end)
        return ByteRange(start, max(start, min(self.end, other.end)))

    def overlaps(self, other: "ByteRange") -> bool:
        """Return whether the two ranges share at least one byte."""
        return max(self.start, other.start) < min(self.end, other.end)

    def align_out(self, block_size: int, size: int) -> "ByteRange":
        """Return the range widened to whole blocks, with the last block cut off at `size`."""
        return ByteRange(
            self.start - self.start % block_size, min(-(-self.end // block_size) * block_size, size)
        )

    def split(self, limit: int) -> Iterator["ByteRange"]:
        """Yield the range in pieces of at most `limit` bytes, in order."""
        for start in range(self.start, self.end, limit):
            yield ByteRange(start, min(start + limit, self.end))
