"""Half-open ranges of bytes, `[start, end)`, and their alignment to blocks."""

from collections.abc import Iterator
from typing import NamedTuple


class ByteRange(NamedTuple):
    """The bytes from `start` up to, not including, `end`. Never negative; may be empty."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self.end - self.start

    def clip(self, other: "ByteRange") -> "ByteRange":
        """Return the part that lies inside `other`; empty (at the nearer end) if none does."""
        start = min(max(self.start, other.start), other.end)
        return ByteRange(start, max(start, min(self.end, other.end)))

    def overlaps(self, other: "ByteRange") -> bool:
        """Whether the two share at least one byte."""
        return max(self.start, other.start) < min(self.end, other.end)

    def align_out(self, block_size: int, size: int) -> "ByteRange":
        """Return the range widened to whole blocks, the last one cut at `size`."""
        return ByteRange(
            self.start - self.start % block_size, min(-(-self.end // block_size) * block_size, size)
        )

    def split(self, limit: int) -> Iterator["ByteRange"]:
        """Yield the range in pieces of at most `limit` bytes, in order."""
        for start in range(self.start, self.end, limit):
            yield ByteRange(start, min(start + limit, self.end))
