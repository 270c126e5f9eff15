"""What to fetch for a read, and which image to fill next. Pure decisions; the engine carries them
out."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.core.block_map import BlockMap, BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.units import KiB, MiB

MAX_FETCH = 1 * MiB
"""Longest single demand fetch. A reader waits for the whole of it, so it is no longer than one FUSE
read."""

READAHEAD_START = 128 * KiB
READAHEAD_MAX = 2 * MiB
"""The window doubles from START to MAX while a stream stays sequential. Unmeasured: the start
equals the kernel's own default window; the end keeps two fetches of MAX_FETCH in flight ahead of
the reader."""

STREAMS = 8
"""Sequential readers remembered for one image. Unmeasured; the VMs that boot from one image at a
time."""


class Readahead:
    """Recognises sequential streams among the reads of one image, and says how far to fetch ahead.

    A read that begins inside a stream's window, or just behind it, continues that stream: the
    kernel's own readahead makes such reads arrive slightly out of order, and only reads that miss
    come here, so the next one usually begins where the last window ended.
    """

    def __init__(self) -> None:
        self._streams: list[
            tuple[int, int]
        ] = []  # (end of the last read, window), most recent last

    def window(self, wanted: ByteRange) -> int:
        """Return the bytes worth fetching beyond `wanted`, 0 for what looks like a random read."""
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
"""A repository whose latest WAITS answers all took longer is far; one slow answer says nothing.
Measured with a booting guest at 50 MB/s and units of 1 MiB: over 1 ms they cost more than they save
(4.9 s, 4.4 s without), over 20 ms they save half (6.5 s, 13 s)."""

SMALL = 128 * KiB
"""What takes longer says little of the distance: at 50 MB/s this takes 2.6 ms by itself."""

UNIT_MAX = 1 * MiB
"""2 MiB saved nothing more, with half as many bytes again."""


class ReadAround:
    """Says in which unit to fetch from a repository that is far, where each miss is a wait.

    What lies around a miss is often read soon: a booting guest reads more than half of the units of
    1 MiB that it touches. So the rest of the unit follows the wanted blocks, in requests of its
    own. The unit doubles with each rest that comes no later behind the wanted blocks than these
    took themselves, else it halves: so the next reader, whose blocks may have to come behind that
    rest, waits for at most twice the time.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._waits: deque[float] = deque(maxlen=WAITS)
        self.unit = block_size
        """Bytes, a power of two; a block: nothing is fetched around it."""

    def wanted_came(self, waited_s: float, length: int) -> None:
        """Wanted blocks, `length` bytes, came after `waited_s`; nothing else was under way when
        they were asked for."""
        if length > SMALL:
            return
        self._waits.append(waited_s)
        far = len(self._waits) == WAITS and min(self._waits) >= FAR_S
        self.unit = max(self.unit, min(2 * self._block_size, UNIT_MAX)) if far else self._block_size

    def rest_came(self, waited_s: float, rest_s: float) -> None:
        """A rest came, `rest_s` after the wanted blocks, which took `waited_s`."""
        if self.unit > self._block_size:
            self.unit = min(2 * self.unit, UNIT_MAX) if rest_s <= waited_s else self.unit // 2


def plan_read(blocks: BlockMap, wanted: ByteRange, readahead: int) -> list[BlockRun]:
    """Return the runs of MISSING blocks to fetch for a read of `wanted`, most urgent first.

    Runs that hold wanted bytes come first and end where the wanted blocks end, so that the reader
    does not wait for readahead; a run is at most MAX_FETCH long (or one block). Claimed blocks are
    left to those who fetch them. Readahead follows only a read that has something to fetch itself:
    twenty readers of one block must not look like one who reads on.
    """
    own = blocks.blocks_of(wanted)
    runs = [*_limited(blocks, blocks.missing_runs(own))]
    if readahead and runs:
        ahead = ByteRange(wanted.end, min(wanted.end + readahead, blocks.size))
        beyond = BlockRun(own.end, max(own.end, blocks.blocks_of(ahead).end))
        runs.extend(_limited(blocks, blocks.missing_runs(beyond)))
    return runs


def plan_rest(blocks: BlockMap, wanted: ByteRange, unit: int) -> list[BlockRun]:
    """Return the runs of MISSING blocks that are left around `wanted`, up to whole units; those
    behind it first."""
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
    """Where population goes on in one image: near the last demand read, then on in file order, then
    round.

    Jumping to the reader makes population a readahead of its own; wrapping at the end leaves
    nothing out.
    """

    def __init__(self) -> None:
        self._next = 0

    def jump(self, block: int) -> None:
        """Go on from `block`: a reader needed something that ends there, or population took what
        ends there."""
        self._next = block

    def peek(self, blocks: BlockMap, limit: int = 1) -> BlockRun | None:
        """Return the next run of MISSING blocks, at most `limit` bytes (or one block), or None if
        there is none."""
        max_blocks = max(1, limit // blocks.block_size)
        return blocks.next_missing(self._next, max_blocks) or blocks.next_missing(0, max_blocks)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that population could work on now."""

    inode: int
    has_readers: bool
    waits_since: int
    """The turn, by number, in which it was last served, or first seen."""
    busy: bool = False
    """A worker has it already."""


PATIENCE = 4
"""How many turns an image without readers lets those with readers go first. Unmeasured: of five turns
one then goes to images that nobody has open, so that a prefetch always ends."""


def choose_image(candidates: Iterable[Candidate], turn: int) -> int | None:
    """Return the inode of the image to fill next, or None if there is none.

    First comes an image that has waited for more than PATIENCE turns, then one with readers. Of those
    alike, one that no worker has already comes first, and then the one that has waited longest.

    Args:
        candidates: images that may be filled now; one that its rate limit holds back is not.
        turn: the number of the turn that is about to begin.
    """

    def order(one: Candidate) -> tuple[bool, bool, bool, int, int]:
        patient = one.busy or turn - one.waits_since <= PATIENCE
        return patient, patient and not one.has_readers, one.busy, one.waits_since, one.inode

    best = min(candidates, key=order, default=None)
    return None if best is None else best.inode
