"""Whom to evict so that the cache keeps to its limits: decisions on numbers, nothing else.

What may still be written, against time; the cache grows from left to right:

    0                                              target   mark      limit
    |----------------------------------------------|--------|---------|
                                    evict until here  begin   nothing is kept
                                                      here    beyond

Population stops at the mark. The headroom behind it is for readers: what they fetch is kept while eviction, which takes
a moment, goes on beside them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.units import MiB

MAX_HEADROOM = 256 * MiB
"""What readers bring in 0.25 s at 1 GB/s, or 2 s at 1 Gbit/s: longer than it takes to read the headers of a thousand
overlays, commit two catalog transactions and unlink a file. Unmeasured beyond that; a larger one keeps less."""

HEADROOM_SHARE = 64
"""Of a limit below 16 GiB, this part: a cache of 1 GiB gives up 16 MiB, too little to miss."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows the cache."""

    max_cache: int | None = None
    """Allocated bytes of all images."""
    min_free: int | None = None
    """Bytes of the file system that stay free."""
    min_free_percent: float | None = None
    """The same as a part of the file system's size, as it is at the moment."""

    def __bool__(self) -> bool:
        return self != Limits()

    def free_bytes(self, total: int) -> int | None:
        """Return what has to stay free on a file system of `total` bytes; None if nothing has to."""
        if self.min_free_percent is not None:
            return int(total * self.min_free_percent / 100)
        return self.min_free

    def headroom(self, total: int) -> int:
        """Return the bytes between mark and limit; as many again are freed below the mark."""
        return min((total if self.max_cache is None else self.max_cache) // HEADROOM_SHARE, MAX_HEADROOM)

    def left(self, used: int, total: int, free: int) -> int:
        """Return how many bytes the cache may still grow; less than 0 if it has to shrink."""
        room = [] if self.max_cache is None else [self.max_cache - used]
        keep_free = self.free_bytes(total)
        if keep_free is not None:
            room.append(free - keep_free)
        return min(room)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image, as far as eviction goes."""

    key: int
    size: int
    """Allocated bytes: what its eviction frees."""
    last_used_ns: int
    opened: bool = False
    pinned: bool = False
    backing: bool = False
    """An overlay needs it."""
    spared: bool = False
    """It is what the room is wanted for."""


def choose(candidates: Iterable[Candidate], wanted: int) -> list[Candidate]:
    """Return whom to evict, in order: least recently used first, until `wanted` bytes are freed or nobody is left.

    Never one that is open, pinned, a backing file or spared, nor one that would free nothing.
    """
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.last_used_ns, c.key)):
        if wanted <= 0:
            break
        if candidate.size > 0 and not (candidate.opened or candidate.pinned or candidate.backing or candidate.spared):
            chosen.append(candidate)
            wanted -= candidate.size
    return chosen
