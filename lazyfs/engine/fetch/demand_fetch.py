"""One demand request, and how a reader's bytes are put together from several and the cache."""

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from lazyfs import errors
from lazyfs.core.block_map import BlockRun
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import ReadAround
from lazyfs.engine.interfaces import Source

ReadCache = Callable[[ByteRange], bytes]
"""Reads present blocks from the cache file. Blocks."""

KERNEL_RETRY_S = 0.05
"""A buffered read whose readahead failed is asked for again by the kernel at once (mm/filemap.c): that second
request for the same offset fails with the first, or the reader would wait for two timeouts. It comes within a
millisecond; this leaves room for a busy host."""


class Timeouts:
    """Where reads have just timed out. Times are trio's."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}

    def is_again(self, offset: int, now: float) -> bool:
        """Whether a read of `offset` is the kernel's second attempt."""
        return now < self._at.get(offset, -math.inf) + KERNEL_RETRY_S

    def note(self, offset: int, now: float) -> None:
        """A read of `offset` timed out."""
        self._at = {start: at for start, at in self._at.items() if now < at + KERNEL_RETRY_S}
        self._at[offset] = now


@dataclass(eq=False, slots=True)
class Miss:
    """When wanted blocks were asked for, and when they came."""

    began: float
    came: float = math.inf


@dataclass(eq=False, slots=True)
class DemandFetch:
    """A demand request: its blocks, and its bytes once `done` is set without an error."""

    run: BlockRun
    span: ByteRange
    parts: Sequence[ByteRange]
    data: bytearray
    began: float
    """When it was asked for; trio's clock."""
    miss: "Miss | None" = None
    """If the time is taken: of the wanted blocks themselves, or (`is_rest`) of those that this is the rest around."""
    is_rest: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    error: errors.LazyfsError | None = field(default_factory=lambda: errors.RequestFailed("a fetch", errno.ECANCELED))
    """None once the data is good: an end that nobody foresaw must not look like success."""

    @property
    def data_bytes(self) -> int:
        """How many bytes it asks for."""
        return sum(part.length for part in self.parts)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Yield where each part begins in the export, and its place in `data`."""
        view = memoryview(self.data)
        for part in self.parts:
            start = part.start - self.span.start
            yield part.start, view[start : start + part.length]


def tell(around: ReadAround, fetch: DemandFetch) -> None:
    """Tell `around` how long it took until `fetch` came, which is now."""
    miss, now = fetch.miss, trio.current_time()
    if miss is not None and not fetch.is_rest:
        miss.came = now
        around.wanted_came(now - miss.began, fetch.data_bytes)
    elif miss is not None and miss.came <= now:
        around.rest_came(miss.came - miss.began, now - miss.came)


def submit(fetch: DemandFetch, source: Source, answered: Callable[[DemandFetch], None]) -> bool:
    """Ask for all parts of `fetch` at once; return whether that could be done (`interfaces.Source.submit`).

    `answered` is called when nothing is under way any more; `fetch.error` says how it ended.
    """
    waiting = 0
    failures: list[errors.LazyfsError] = []

    def one(error: errors.LazyfsError | None) -> None:
        nonlocal waiting
        waiting -= 1
        if error is not None:
            failures.append(error)
        if not waiting:
            fetch.error = failures[0] if failures else None
            answered(fetch)

    for offset, piece in fetch.pieces():
        if source.submit(offset, piece, one):
            waiting += 1
        elif not waiting:
            return False
        else:
            failures.append(errors.ConnectionLost("the repository", "it ended between two requests"))
            break
    return waiting > 0


async def receive(fetch: DemandFetch, source: Source) -> None:
    """Fill `fetch.data`, all parts at once.

    Raises:
        RequestFailed, ExportChanged: of the first part that failed.
    """
    failures: list[errors.LazyfsError] = []

    async def one(offset: int, piece: memoryview) -> None:
        try:
            await source.pread(offset, piece)
        except errors.LazyfsError as error:
            failures.append(error)

    if len(fetch.parts) == 1:  # a nursery costs as much as half the rest
        await one(*next(fetch.pieces()))
    else:
        async with trio.open_nursery() as nursery:
            for offset, piece in fetch.pieces():
                nursery.start_soon(one, offset, piece)
    if failures:
        raise failures[0]


async def assemble(
    wanted: ByteRange,
    fetches: Sequence[DemandFetch],
    present: Callable[[ByteRange], bool],
    read_cache: ReadCache,
) -> bytes | None:
    """Put together what was fetched and what is in the cache; None if a block is neither.

    `read_cache` is called in a thread.
    """
    first = fetches[0] if len(fetches) == 1 else None
    if first is not None and first.span.start <= wanted.start and first.span.end >= wanted.end:
        start = wanted.start - first.span.start
        return bytes(memoryview(first.data)[start : start + wanted.length])
    out = bytearray(wanted.length)
    gaps = []
    position = wanted.start
    for fetch in sorted(fetches, key=lambda f: f.span):
        piece = fetch.span.clip(wanted)
        start = piece.start - fetch.span.start
        out[piece.start - wanted.start : piece.end - wanted.start] = fetch.data[start : start + piece.length]
        if piece.start > position:
            gaps.append(ByteRange(position, piece.start))
        position = piece.end
    if position < wanted.end:
        gaps.append(ByteRange(position, wanted.end))
    for gap in gaps:
        if not present(gap):
            return None
        data = await trio.to_thread.run_sync(read_cache, gap)
        out[gap.start - wanted.start : gap.end - wanted.start] = data
    return bytes(out)
