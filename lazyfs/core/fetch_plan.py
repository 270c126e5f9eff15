"""Decides what to fetch for a read, and which image to fill next. The engine carries this out."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.core.block_map import BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.units import KiB, MiB

MAX_FETCH = 1 * MiB
"""The longest single demand fetch. A reader waits for the whole of it, so it is no longer than
one FUSE read."""

READAHEAD_START = 128 * KiB
READAHEAD_MAX = 2 * MiB
"""The window doubles from START to MAX while a stream stays sequential. Both are unmeasured. The
start equals the kernel's own default window. The end keeps two fetches of MAX_FETCH in flight
ahead of the reader."""

STREAMS = 8
"""How many sequential readers of one image are remembered. It is unmeasured, and stands for the
VMs that boot from one image at the same time."""


class Readahead:
    """Recognises sequential streams among the reads of one image, and says how far to fetch
    ahead.

    A read that begins inside a stream's window, or just behind it, continues that stream. There are
    two reasons for this: the kernel's own readahead makes such reads arrive slightly out of order;
    and only reads that miss come here, so the next one usually begins where the last window ended.
    """

    def __init__(self) -> None:
        # (end of the last read, window) of each stream, the most recent one last.
        self._streams: list[tuple[int, int]] = []

    def window(self, wanted: ByteRange) -> int:
        """Return how many bytes to fetch beyond `wanted`.

        It is 0 for what looks like a random read.
        """
        for i, (position, window) in enumerate(self._streams):
            if position - READAHEAD_START <= wanted.start <= position + window + READAHEAD_START:
                del self._streams[i]
                grown = min(max(2 * window, READAHEAD_START), READAHEAD_MAX)
                self._streams.append((max(position, wanted.end), grown))
                return grown
        self._streams.append((wanted.end, 0))
        del self._streams[:-STREAMS]
        return 0


FAR_S = 0.005
WAITS = 8
"""A repository is far if its latest WAITS answers all took longer than FAR_S. One slow answer
says nothing. Measured with a booting guest at 50 MB/s and units of 1 MiB: over 1 ms such
units cost more than they save (4.9 s, and 4.4 s without); over 20 ms they save half (6.5 s,
and 13 s without)."""

SMALL = 128 * KiB
"""The answer to a larger request says little about the distance. At 50 MB/s this much takes 2.6
ms by itself."""

UNIT_MAX = 1 * MiB
"""The largest unit. 2 MiB saved nothing more, and fetched half as many bytes again."""


class ReadAround:
    """Says in which unit to fetch from a repository that is far, where each miss means a wait.

    What is around a miss is often read soon: a booting guest reads more than half of the units of 1
    MiB that it touches. So the rest of the unit is fetched after the wanted blocks, in requests of
    its own.

    The unit doubles after each rest that comes no later behind the wanted blocks than these took
    themselves. Otherwise it is halved. So the next reader, whose blocks may have to come behind
    that rest, waits for at most twice the time.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._waits: deque[float] = deque(maxlen=WAITS)
        self.unit = block_size
        """The unit in bytes, a power of two. If it is one block, nothing is fetched around a
        read."""

    def wanted_came(self, waited_s: float, length: int) -> None:
        """Note that wanted blocks, `length` bytes, came after `waited_s`.

        Nothing else may have been under way when they were asked for.
        """
        if length > SMALL:
            return
        self._waits.append(waited_s)
        far = len(self._waits) == WAITS and min(self._waits) >= FAR_S
        self.unit = max(self.unit, min(2 * self._block_size, UNIT_MAX)) if far else self._block_size

    def rest_came(self, waited_s: float, rest_s: float) -> None:
        """Note that a rest came `rest_s` after the wanted blocks, which took `waited_s`."""
        if self.unit > self._block_size:
            self.unit = min(2 * self.unit, UNIT_MAX) if rest_s <= waited_s else self.unit // 2


def plan_read(blocks: BlockMap, wanted: ByteRange, readahead: int) -> list[BlockRun]:
    """Return the runs of MISSING blocks to fetch for a read of `wanted`, the most urgent first.

    Runs that hold wanted bytes come first. They end where the wanted blocks end, so the reader does
    not wait for readahead. A run is at most MAX_FETCH long, or one block. Claimed blocks are left
    to those who fetch them.

    Only a read that has something to fetch itself gets readahead. Otherwise twenty readers of one
    block would look like one reader who reads on.
    """
    own = blocks.blocks_of(wanted)
    runs = [*_limited(blocks, blocks.missing_runs(own))]
    if readahead and runs:
        ahead = ByteRange(wanted.end, min(wanted.end + readahead, blocks.size))
        beyond = BlockRun(own.end, max(own.end, blocks.blocks_of(ahead).end))
        runs.extend(_limited(blocks, blocks.missing_runs(beyond)))
    return runs


def plan_rest(blocks: BlockMap, wanted: ByteRange, unit: int) -> list[BlockRun]:
    """Return the runs of MISSING blocks that are left around `wanted`, up to whole units.

    The runs behind `wanted` come first.
    """
    own = blocks.blocks_of(wanted)
    whole = blocks.blocks_of(wanted.align_out(unit, blocks.size))
    around = BlockRun(own.end, whole.end), BlockRun(whole.first, own.first)
    return [run for part in around for run in _limited(blocks, blocks.missing_runs(part))]


def _limited(blocks: BlockMap, runs: Iterable[BlockRun]) -> Iterable[BlockRun]:
    step = max(1, MAX_FETCH // blocks.block_size)
    for run in runs:
        for first in range(run.first, run.end, step):
            yield BlockRun(first, min(first + step, run.end))


class FillCursor:
    """Knows where population continues in one image.

    It starts near the last demand read, goes on in the order of the file, and then begins at the
    start again. Because it jumps to the reader, population acts as readahead. Because it begins
    again, nothing is left out.
    """

    def __init__(self) -> None:
        self._next = 0

    def jump(self, block: int) -> None:
        """Continue at `block`, where the blocks end that a reader needed or population took."""
        self._next = block

    def peek(self, blocks: BlockMap, limit: int = 1) -> BlockRun | None:
        """Return the next run of MISSING blocks, or None if there is none.

        It is at most `limit` bytes long, or one block.
        """
        max_blocks = max(1, limit // blocks.block_size)
        return blocks.next_missing(self._next, max_blocks) or blocks.next_missing(0, max_blocks)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Describes an image that population could work on now."""

    inode: int
    has_readers: bool
    waits_since: int
    """The number of the turn in which it was last served, or first seen."""
    busy: bool = False
    """True if a worker already works on it."""


PATIENCE = 4
"""For how many turns images that somebody has open go before an image that nobody has open. It
is unmeasured. Of five turns one then goes to an image that nobody has open, so a prefetch
always ends."""


def choose_image(candidates: Iterable[Candidate], turn: int) -> int | None:
    """Return the inode of the image to fill next, or None if there is none.

    An image that has waited for more than PATIENCE turns comes first, and then one with readers.
    Among equals, one on which no worker works comes first, and then the one that has waited
    longest.

    Args:
        candidates: images that may be filled now. An image that its rate limit holds back is not
            one.
        turn: the number of the turn that is about to begin.
    """

    def order(one: Candidate) -> tuple[bool, bool, bool, int, int]:
        patient = one.busy or turn - one.waits_since <= PATIENCE
        return patient, patient and not one.has_readers, one.busy, one.waits_since, one.inode

    best = min(candidates, key=order, default=None)
    return None if best is None else best.inode
