"""Carries out one demand fetch, and puts a reader's bytes together.

They may come from several fetches and from the cache.
"""

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
"""When the readahead of a buffered read fails, the kernel asks again at once (mm/filemap.c). This
second request for the same offset fails together with the first, because otherwise the reader
would wait for two timeouts. It comes within a millisecond; the value leaves room for a busy
host."""


class Timeouts:
    """Remembers the reads that have just timed out. All times are trio's."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}

    def is_again(self, offset: int, now: float) -> bool:
        """Return whether a read of `offset` is the kernel's second attempt."""
        return now < self._at.get(offset, -math.inf) + KERNEL_RETRY_S

    def note(self, offset: int, now: float) -> None:
        """Note that a read of `offset` has timed out."""
        self._at = {start: at for start, at in self._at.items() if now < at + KERNEL_RETRY_S}
        self._at[offset] = now


@dataclass(eq=False, slots=True)
class Miss:
    """Measures how long the repository takes to answer one read.

    Only a read that missed while nothing else was under way is measured.
    """

    began: float
    """When its flights were sent, by trio's clock."""
    came: float = math.inf
    """When the wanted blocks came, by trio's clock."""

    def wanted_came(self, around: ReadAround, now: float, length: int) -> None:
        """Note that the wanted blocks, `length` bytes, have come."""
        self.came = now
        around.wanted_came(now - self.began, length)

    def rest_came(self, around: ReadAround, now: float) -> None:
        """Note that a part of the rest around the wanted blocks has come.

        If it comes before the wanted blocks, it says nothing about the repository.
        """
        if self.came <= now:
            around.rest_came(self.came - self.began, now - self.came)


UNFORESEEN = errors.RequestFailed("a fetch", errno.ECANCELED)
"""The failure of a fetch until it has ended. So a fetch that ends in an unforeseen way counts as
failed."""


@dataclass(eq=False, slots=True)
class DemandFetch:
    """Holds a flight that fetches for readers, and its bytes.

    The bytes are valid once `done` is set, if `failure` is None then.
    """

    flight: Flight
    span: ByteRange
    parts: Sequence[ByteRange]
    began: float
    """When the fetch was asked for, by trio's clock."""
    wait: ReaderWait
    data: bytearray = field(default_factory=bytearray)
    """The bytes of `span`. It is empty until the fetch is sent."""
    miss: Miss | None = None
    """Measures the read that began this fetch. None if that read is not measured."""
    done: trio.Event = field(default_factory=trio.Event)
    failure: errors.LazyfsError | None = UNFORESEEN
    """Why there are no bytes. Never raise it itself."""
    sent: bool = False
    """True if the fetch has memory, and has been sent."""
    ended: bool = False
    """True if the fetch has been answered, or given up."""
    written: trio.Event = field(default_factory=trio.Event)
    """Set when the bytes are in the cache file, or could not be written."""

    @property
    def data_bytes(self) -> int:
        """How many bytes the fetch asks for."""
        return sum(part.length for part in self.parts)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the offset of each part in the export, and its place in `data`."""
        view = memoryview(self.data)
        for part in self.parts:
            start = part.start - self.span.start
            yield part.start, view[start : start + part.length]

    def note_time(self, around: ReadAround) -> None:
        """Tell `around` how long the repository took, if this fetch is measured.

        Call it when the fetch has just been answered.
        """
        if self.miss is None:
            return
        if self.flight.purpose is Purpose.REST:
            self.miss.rest_came(around, trio.current_time())
        else:
            self.miss.wanted_came(around, trio.current_time(), self.data_bytes)


def submit(fetch: DemandFetch, source: Source, answered: Callable[[DemandFetch], None]) -> bool:
    """Ask for all parts of `fetch` at once, as `interfaces.Source.submit` does.

    Args:
        fetch: what to fetch.
        source: where to read.
        answered: called when nothing is under way any more. `fetch.failure` says how it ended.

    Returns:
        Whether anything could be asked for.
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
    """Fill `fetch.data`. All parts are requested at the same time.

    Raises:
        RequestFailed, ExportChanged: from the first part that failed.
    """
    failures: list[errors.LazyfsError] = []

    async def one(offset: int, piece: memoryview) -> None:
        try:
            await source.pread(offset, piece)
        except errors.LazyfsError as error:
            failures.append(error.again())

    if len(fetch.parts) == 1:  # a nursery costs half as much as everything else here
        await one(*next(fetch.pieces()))
    else:
        async with trio.open_nursery() as nursery:
            for offset, piece in fetch.pieces():
                nursery.start_soon(one, offset, piece)
    if failures:
        raise failures[0].again()


async def assemble(
    wanted: ByteRange,
    fetches: Sequence[DemandFetch],
    present: Callable[[ByteRange], bool],
    read_cache: ReadCache,
) -> bytes | None:
    """Put the bytes of `wanted` together from fetches and from the cache.

    Args:
        wanted: the range to return.
        fetches: fetches that have succeeded.
        present: returns whether a range is in the cache.
        read_cache: reads from the cache. Called in a thread.

    Returns:
        None if some block is neither fetched nor in the cache.
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
