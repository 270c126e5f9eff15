"""Takes samples of what is cached of one image, to find an export that was rebuilt.

An export that gets other content keeps its size, and most servers give no description. Only its
bytes tell. So each new connection, and each look at the repository's list after something was
fetched, compares a few blocks of the cache with the repository before more is fetched.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.engine import totals
from lazyfs.engine.fetch.block_table import BlockTable
from lazyfs.engine.interfaces import Sample, Store
from lazyfs.engine.totals import Totals
from lazyfs.units import KiB

MOST, FEWEST = 8, 2
LONGEST = 64 * KiB
"""At most MOST samples of at most LONGEST bytes are taken, 512 KiB together. They cost one round
trip, and 10 ms at 50 MB/s. An image of which a tenth of the blocks is new is found with 47 % by six
random ones; one that was converted or installed anew differs nearly everywhere."""
PAGE = 4 * KiB
SHARE = 8
"""No more than this part of what is cached is compared, so that small images are not fetched
twice; but at least FEWEST samples."""


@dataclass(slots=True)
class Compared:
    """Counts the bytes of the samples of one image since the daemon has started."""

    bytes: int = 0


class Samples:
    """Chooses and reads the samples of one image. Thread-safe."""

    def __init__(self, table: BlockTable, store: Store, totals: Totals, compared: Compared) -> None:
        """Take samples of the blocks of `table` that `store` holds, and count them."""
        self._table = table
        self._store = store
        self._totals = totals
        self._compared = compared
        self._taken_at = -1

    @property
    def due(self) -> bool:
        """True if something was fetched since the samples were last taken."""
        return self._fetched() != self._taken_at

    def take(self) -> list[Sample]:
        """Return the first block, the last one and some at random, as far as they are data.

        Blocks. The result is empty if nothing is cached, or if it cannot be read or trusted now.
        """
        self._taken_at = self._fetched()
        if self._table.distrust is not None:
            return []
        share = self._table.present_bytes // SHARE // LONGEST
        spans = self._table.some_data(min(max(share, FEWEST), MOST), LONGEST, random.random)
        try:
            taken = read_samples(spans, self._store.read)
        except (errors.LazyfsError, OSError):
            return []  # the file was closed, or its disk fails: a read of it will say so
        amount = sum(len(sample.data) for sample in taken)
        self._compared.bytes += amount
        self._totals.add(totals.SAMPLED_BYTES, amount)
        self._totals.add(totals.SAMPLE_REQUESTS, len(taken))
        return taken

    def _fetched(self) -> int:
        counters = self._table.counters()
        return counters.fetched_bytes


def read_samples(spans: Iterable[ByteRange], read: Callable[[int, int], bytes]) -> list[Sample]:
    """Return samples of ranges of data. Blocks. Raises what `read` raises.

    Args:
        spans: the ranges of the export.
        read: returns bytes of the cache, given an offset and a length.
    """
    samples = []
    for span in spans:
        start, data = _without_zeroes(read(span.start, span.length))
        if data:
            samples.append(Sample(span.start + start, data))
    return samples


def _without_zeroes(data: bytes) -> tuple[int, bytes]:
    """Return the longest part of `data` without a page of zeroes, and where it begins.

    Zeroes may be a hole of the export, which is never read.
    """
    best = ByteRange(0, 0)
    start = 0
    for end in range(0, len(data) + PAGE, PAGE):  # one more, to end the last part
        if data[end : end + PAGE].strip(b"\0"):
            continue
        if end - start > best.length:
            best = ByteRange(start, end)
        start = end + PAGE
    return best.start, data[best.start : best.end]
