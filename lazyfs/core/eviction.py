"""Decides which images to evict, so that the cache keeps to its limits. It only looks at
numbers.

The drawing shows how much is cached; the cache grows from left to right:

    0                                              target   mark      limit
    |----------------------------------------------|--------|---------|
                                    evict until here  begin   nothing is kept
                                                      here    beyond

Population stops at the mark. The headroom behind the mark is for readers. Eviction takes a moment,
and what readers fetch in the meantime is kept there.
"""

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lazyfs.units import MiB

MAX_HEADROOM = 256 * MiB
"""What readers fetch in 0.25 s at 1 GB/s, or in 2 s at 1 Gbit/s. That is longer than it takes to
read the headers of a thousand overlays, to commit two catalog transactions and to unlink a
file. Beyond that it is unmeasured. A larger headroom would keep less in the cache."""

HEADROOM_SHARE = 64
"""The headroom is this part of a limit below 16 GiB. A cache of 1 GiB gives up 16 MiB, which is
too little to be missed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds what the user allows the cache."""

    max_cache: int | None = None
    """Allocated bytes of all images."""
    min_free: int | None = None
    """Bytes of the file system that must stay free."""
    min_free_percent: float | None = None
    """The same as a percentage of the present size of the file system."""

    def __bool__(self) -> bool:
        return self != Limits()

    def free_bytes(self, total: int) -> int | None:
        """Return how many of `total` bytes of a file system must stay free, or None."""
        if self.min_free_percent is not None:
            return int(total * self.min_free_percent / 100)
        return self.min_free

    def headroom(self, total: int) -> int:
        """Return the bytes between mark and limit.

        As many bytes again are freed below the mark.
        """
        return min(
            (total if self.max_cache is None else self.max_cache) // HEADROOM_SHARE, MAX_HEADROOM
        )

    def left(self, used: int, total: int, free: int) -> int:
        """Return by how many bytes the cache may still grow.

        If it must shrink, this is less than 0. A file system of `total` 0 does not say how much of
        it is free, so only `max_cache` counts there.
        """
        room = [] if self.max_cache is None else [self.max_cache - used]
        keep_free = self.free_bytes(total)
        if keep_free is not None and total:
            room.append(free - keep_free)
        return min(room, default=ALL)


class Obstacle(enum.Enum):
    """Names what keeps an image from being evicted."""

    GONE = enum.auto()
    """The repository does not have it any more."""
    PINNED = enum.auto()
    BACKING = enum.auto()
    """An overlay needs it."""
    OPEN = enum.auto()
    LAST_COPY = enum.auto()
    """It could not be fetched again, because it is gone or has changed in the repository."""
    SPARED = enum.auto()
    """The room is wanted for this image."""
    EMPTY = enum.auto()
    """Nothing of it is cached."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Describes an image for the purposes of eviction."""

    key: int
    size: int
    """Allocated bytes, which its eviction would free."""
    last_used_ns: int
    opened: bool = False
    pinned: bool = False
    backing: bool = False
    """True if an overlay needs it."""
    spared: bool = False
    """True if the room is wanted for this image."""
    gone: bool = False
    """True if the repository does not have it any more."""
    last_copy: bool = False
    """True if it could not be fetched again."""


def obstacle(
    candidate: Candidate, among: Collection[Obstacle] = tuple(Obstacle)
) -> Obstacle | None:
    """Return the first of the obstacles `among` that keeps an image from being evicted, or None."""
    found = {
        Obstacle.GONE: candidate.gone,
        Obstacle.PINNED: candidate.pinned,
        Obstacle.BACKING: candidate.backing,
        Obstacle.OPEN: candidate.opened,
        Obstacle.LAST_COPY: candidate.last_copy,
        Obstacle.SPARED: candidate.spared,
        Obstacle.EMPTY: candidate.size <= 0,
    }
    return next((one for one, holds in found.items() if holds and one in among), None)


def choose(candidates: Iterable[Candidate], wanted: int) -> list[Candidate]:
    """Return the images to evict, the least recently used first.

    They free `wanted` bytes, or are all that may be evicted. Images with an obstacle are left out.
    """
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.last_used_ns, c.key)):
        if wanted <= 0:
            break
        if obstacle(candidate) is None:
            chosen.append(candidate)
            wanted -= candidate.size
    return chosen


@dataclass(frozen=True, slots=True)
class Need:
    """Says how much room must be made. All numbers are bytes."""

    wanted: int
    """How many bytes must be freed, or 0."""
    spare: bool
    """True if no reader waits for the room and no limit is exceeded. Then the image that
    population works on is spared."""
    headroom: int
    left: int
    """What may still be written without evicting anything."""

    def is_in_vain(self, candidates: Iterable[Candidate]) -> bool:
        """Return whether evicting all `candidates` would not be enough for one large write.

        If so, there is room for everything else.
        """
        freed = sum(one.size for one in candidates)
        return self.left >= self.headroom and 0 < freed < self.wanted - self.headroom


def need(
    *, room: int, left: int, unmet: int, headroom: int, refused_reader: bool, reading: bool
) -> Need:
    """Return how much room to make.

    Args:
        room: the bytes that the limits leave. It is less than 0 if they are exceeded.
        left: how many of these bytes are neither reserved nor kept since they were counted.
        unmet: the largest amount that was refused.
        headroom: as `Limits.headroom` returns it.
        refused_reader: whether bytes were refused that had been fetched for a reader.
        reading: whether somebody has an image open that is not whole.
    """
    mark = max(headroom, unmet)
    wanted = mark + headroom - left if left < mark else 0
    return Need(wanted, not ((refused_reader and reading) or room < 0), headroom, left)


class Shortage(enum.Enum):
    """Says why there is no room, although something should be evicted."""

    ALL_NEEDED = "nothing can be evicted: images are open, pinned or being filled"
    OVERLAYS = "nothing can be evicted: what is not open or pinned, overlays need"
    UNKNOWN_OVERLAYS = "nothing is evicted, as it cannot be told what overlays need"
    DETACHED = "nothing is evicted after detach"
    CANNOT_EVICT = "an image cannot be evicted"


@dataclass(frozen=True, slots=True)
class Evict:
    """These images may be evicted, in this order, until enough is free."""

    victims: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class LookAtOverlays:
    """It must be found out what overlays need. Images that no overlay needs may be evicted."""


Decision = Evict | LookAtOverlays | Shortage


def decide(
    candidates: Sequence[Candidate], need: Need, *, backing_known: bool, may_evict: bool
) -> Decision:
    """Return what to do to make room.

    Args:
        candidates: all images. `backing` must be right if `backing_known` is True, and False
            otherwise.
        need: how much room to make.
        backing_known: whether it is known what overlays need.
        may_evict: False once the mount is detached, because then nobody sees who opens the plain
            files.
    """
    free_to_go = choose(candidates, ALL)
    if need.is_in_vain(free_to_go):
        return Evict(())  # whoever wanted the room reports that there is none
    if not may_evict:
        return Shortage.DETACHED
    if not backing_known:
        return LookAtOverlays() if free_to_go else Shortage.ALL_NEEDED
    if not free_to_go:
        return Shortage.OVERLAYS if any(one.backing for one in candidates) else Shortage.ALL_NEEDED
    return Evict(tuple(free_to_go))


ALL = 1 << 62
"""More bytes than there are."""
