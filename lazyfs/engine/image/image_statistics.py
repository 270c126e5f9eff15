"""Defines what is told about an image: one row of `query-images`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """Holds what `status` shows of an image."""

    name: str
    path: str
    inode: int
    size: int | None
    """The size of the export."""
    file_size: int | None
    """The size of the file shown."""
    format: str
    state: str
    present_bytes: int
    zero_bytes: int
    fetched_bytes: int
    demand_bytes: int
    populated_bytes: int
    requests: int
    sampled_bytes: int
    open_count: int
    replaced: bool
    fill_rate: float
    rate_limit: int | None
    """What `set-rate` allows this image, in bytes per second."""
    pinned: bool
    last_used_ns: int
    error: str
