"""What is told about an image: the row of `query-images`."""

from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.core.lifecycle import State
from lazyfs.engine.budget import UNKEPT
from lazyfs.engine.fetch.fetcher import Fetcher
from lazyfs.engine.interfaces import FetchCounters, ImageRecord


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """What `status` shows of an image."""

    name: str
    path: str
    inode: int
    size: int | None
    """Of the export."""
    file_size: int | None
    """Of the file shown."""
    format: str
    state: str
    present_bytes: int
    zero_bytes: int
    fetched_bytes: int
    demand_bytes: int
    populated_bytes: int
    requests: int
    open_count: int
    replaced: bool
    fill_rate: float
    pinned: bool
    last_used_ns: int
    error: str


def present_bytes(record: ImageRecord, fetcher: Fetcher | None) -> int:
    """Return the bytes of data in the cache file: live while it fills, else as of the last checkpoint."""
    return record.present_bytes if fetcher is None else fetcher.present_bytes


def filling_trouble(record: ImageRecord, fetcher: Fetcher | None, unkept: bool, fill_trouble: str) -> str:
    """Return what hinders an image that is being filled; "" if nothing does."""
    if record.state is not State.PARTIAL:
        return ""
    if unkept:
        return UNKEPT
    return "" if fetcher is None else fetcher.message() or fill_trouble


def of(
    record: ImageRecord,
    fetcher: Fetcher | None,
    counters: FetchCounters,
    *,
    inode: int,
    open_count: int,
    replaced: bool,
    messages: Iterable[str],
) -> ImageStatistics:
    """Put together what the record and, while the image fills, its fetcher know; `messages` may be empty ones."""
    if fetcher is not None:
        zero, rate = fetcher.zero_bytes, fetcher.rate()
    else:
        rate = 0.0
        zero = (record.size or 0) - record.present_bytes if record.state is State.WHOLE else 0
    return ImageStatistics(
        name=record.export,
        path=record.path,
        inode=inode,
        size=record.size,
        file_size=record.file_size,
        format=record.format,
        state=record.state.value,
        present_bytes=present_bytes(record, fetcher),
        zero_bytes=zero,
        fetched_bytes=counters.demand_bytes + counters.populated_bytes,
        demand_bytes=counters.demand_bytes,
        populated_bytes=counters.populated_bytes,
        requests=counters.requests,
        open_count=open_count,
        replaced=replaced,
        fill_rate=rate if record.state is State.PARTIAL and not (fetcher and fetcher.unkept) else 0.0,
        pinned=record.pinned,
        last_used_ns=record.last_used_ns,
        error="; ".join(filter(None, messages)),
    )
