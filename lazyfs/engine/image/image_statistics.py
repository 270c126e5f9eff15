"""What is told about an image: the row of `query-images`."""

from dataclasses import dataclass


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
