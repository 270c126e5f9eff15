"""One demand request, and how a reader's bytes are put together from several and the cache."""

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from lazyfs import errors
from lazyfs.core.byte_range import ByteRange
from lazyfs.core.fetch_plan import ReadAround
from lazyfs.core.in_flight import Flight, Purpose
from lazyfs.engine.interfaces import Source
from lazyfs.engine.pace import ReaderWait

ReadCache = Callable[[ByteRange], bytes]
"""Reads present blocks from the cache file. Blocks."""

KERNEL_RETRY_S = 0.05
"""A buffered read whose readahead failed is asked for again by the kernel at once (mm/filemap.c):
that second request for the same offset fails with the first, or the reader would wait for two
timeouts. It comes within a millisecond; this leaves room for a busy host."""


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
    """One read that missed while nothing else was under way: how long the repository takes to
    answer."""

    began: float
    """When its flights were sent; trio's clock."""
    came: float = math.inf
    """When the wanted blocks came."""

    def wanted_came(self, around: ReadAround, now: float, length: int) -> None:
        """The wanted blocks, `length` bytes of them, came."""
        self.came = now
        around.wanted_came(now - self.began, length)

    def rest_came(self, around: ReadAround, now: float) -> None:
        """A part of the rest around them came. Before the wanted blocks it says nothing."""
        if self.came <= now:
            around.rest_came(self.came - self.began, now - self.came)


@dataclass(eq=False, slots=True)
class DemandFetch:
    """A flight that fetches for readers: its bytes are good once `done` is set and `failure` is
    None."""

    flight: Flight
    span: ByteRange
    parts: Sequence[ByteRange]
    data: bytearray
    began: float
    """When it was asked for; trio's clock."""
    wait: ReaderWait
    miss: Miss | None = None
    """Of the read that began it, if that is timed."""
    done: trio.Event = field(default_factory=trio.Event)
    failure: errors.LazyfsError | None = field(
        default_factory=lambda: errors.RequestFailed("a fetch", errno.ECANCELED)
    )
    """Why there are no bytes: a fact, never raised itself. It is preset, so that an unforeseen end
    counts as one."""
    ended: bool = False
    """It has been answered, or given up."""
    written: trio.Event = field(default_factory=trio.Event)
    """Its bytes are in the cache file, or could not be written."""

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

    def note_time(self, around: ReadAround) -> None:
        """Tell `around` how long the repository took, if this fetch is timed. It has just come."""
        if self.miss is None:
            return
        if self.flight.purpose is Purpose.REST:
            self.miss.rest_came(around, trio.current_time())
        else:
            self.miss.wanted_came(around, trio.current_time(), self.data_bytes)


def submit(fetch: DemandFetch, source: Source, answered: Callable[[DemandFetch], None]) -> bool:
    """Ask for all parts of `fetch` at once; return whether that could be done
    (`interfaces.Source.submit`).

    `answered` is called when nothing is under way any more; `fetch.failure` says how it ended.
    """
    waiting = 0
    failures: list[errors.LazyfsError] = []

    def one(error: errors.LazyfsError | None) -> None:
        nonlocal waiting
        waiting -= 1
        if error is not None:
            failures.append(error.again())
        if not waiting:
            fetch.failure = failures[0] if failures else None
            answered(fetch)

    for offset, piece in fetch.pieces():
        if source.submit(offset, piece, one):
            waiting += 1
        elif not waiting:
            return False
        else:
            failures.append(
                errors.ConnectionLost("the repository", "it ended between two requests")
            )
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
            failures.append(error.again())

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
        out[piece.start - wanted.start : piece.end - wanted.start] = fetch.data[
            start : start + piece.length
        ]
        if piece.start > position:
            gaps.append(ByteRange(position, piece.start))
        position = piece.end
    if position < wanted.end:
        gaps.append(ByteRange(position, wanted.end))
    for gap in gaps:
        if not present(gap):
            return None
        data = await trio.to_thread.run_sync(read_cache, gap, abandon_on_cancel=True)
        out[gap.start - wanted.start : gap.end - wanted.start] = data
    return bytes(out)
