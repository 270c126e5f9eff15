"""Whom to evict so that the cache keeps to its limits: decisions on numbers, nothing else.

What may still be written, against time; the cache grows from left to right:

    0                                              target   mark      limit
    |----------------------------------------------|--------|---------|
                                    evict until here  begin   nothing is kept
                                                      here    beyond

Population stops at the mark. The headroom behind it is for readers: what they fetch is kept while
eviction, which takes a moment, goes on beside them.
"""

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lazyfs.units import MiB

MAX_HEADROOM = 256 * MiB
"""What readers bring in 0.25 s at 1 GB/s, or 2 s at 1 Gbit/s: longer than it takes to read the
headers of a thousand overlays, commit two catalog transactions and unlink a file. Unmeasured beyond
that; a larger one keeps less."""

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
        """Return what has to stay free on a file system of `total` bytes; None if nothing has
        to."""
        if self.min_free_percent is not None:
            return int(total * self.min_free_percent / 100)
        return self.min_free

    def headroom(self, total: int) -> int:
        """Return the bytes between mark and limit; as many again are freed below the mark."""
        return min(
            (total if self.max_cache is None else self.max_cache) // HEADROOM_SHARE, MAX_HEADROOM
        )

    def left(self, used: int, total: int, free: int) -> int:
        """Return how many bytes the cache may still grow; less than 0 if it has to shrink."""
        room = [] if self.max_cache is None else [self.max_cache - used]
        keep_free = self.free_bytes(total)
        if keep_free is not None:
            room.append(free - keep_free)
        return min(room)


class Obstacle(enum.Enum):
    """What keeps an image from being evicted."""

    GONE = enum.auto()
    """The repository does not have it any more."""
    PINNED = enum.auto()
    BACKING = enum.auto()
    """An overlay needs it."""
    OPEN = enum.auto()
    LAST_COPY = enum.auto()
    """No fetch would bring it back: it is gone, or has changed in the repository."""
    SPARED = enum.auto()
    """It is what the room is wanted for."""
    EMPTY = enum.auto()
    """Nothing of it is cached."""


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
    gone: bool = False
    """The repository does not have it any more."""
    last_copy: bool = False
    """No fetch would bring it back."""


def obstacle(
    candidate: Candidate, among: Collection[Obstacle] = tuple(Obstacle)
) -> Obstacle | None:
    """Return the first of the obstacles `among` that keeps an image from being evicted; None if it
    may go."""
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
    """Return whom to evict, in order: least recently used first, until `wanted` bytes are freed or
    nobody is left.

    Nobody whom an obstacle keeps.
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
    """How much room is to be made. Bytes."""

    wanted: int
    """To be freed; 0 for none."""
    spare: bool
    """Nobody waits for it, and no limit is exceeded: the image that population works on is
    spared."""
    headroom: int
    left: int
    """What may still be written without evicting anything."""

    def is_in_vain(self, candidates: Iterable[Candidate]) -> bool:
        """Whether there is room but for one write, for which evicting all `candidates` would not be
        enough."""
        freed = sum(one.size for one in candidates)
        return self.left >= self.headroom and 0 < freed < self.wanted - self.headroom


def need(
    *, room: int, left: int, unmet: int, headroom: int, refused_reader: bool, reading: bool
) -> Need:
    """Return how much room to make.

    Args:
        room: what the limits leave, less than 0 if they are exceeded.
        left: what of it is neither reserved nor kept since it was counted.
        unmet: the largest amount that was refused.
        headroom: as of `Limits.headroom`.
        refused_reader: whether anything that a reader had fetched was refused.
        reading: whether anybody has an image open that is not whole.
    """
    mark = max(headroom, unmet)
    wanted = mark + headroom - left if left < mark else 0
    return Need(wanted, not ((refused_reader and reading) or room < 0), headroom, left)


class Shortage(enum.Enum):
    """Why there is no room, although something was to be evicted."""

    ALL_NEEDED = "nothing can be evicted: images are open, pinned or being filled"
    OVERLAYS = "nothing can be evicted: what is not open or pinned, overlays need"
    UNKNOWN_OVERLAYS = "nothing is evicted, as it cannot be told what overlays need"
    DETACHED = "nothing is evicted after detach"
    CANNOT_EVICT = "an image cannot be evicted"


@dataclass(frozen=True, slots=True)
class Evict:
    """These may go, in this order, until enough is free."""

    victims: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class LookAtOverlays:
    """Something may go if no overlay needs it: that has to be found out first."""


Decision = Evict | LookAtOverlays | Shortage


def decide(
    candidates: Sequence[Candidate], need: Need, *, backing_known: bool, may_evict: bool
) -> Decision:
    """Return what to do to make room.

    Args:
        candidates: all images; `backing` is right if `backing_known`, else False.
        may_evict: False once detached, when nobody sees any more who opens the plain files.
    """
    free_to_go = choose(candidates, ALL)
    if need.is_in_vain(free_to_go):
        return Evict(())  # who wanted it says so himself
    if not may_evict:
        return Shortage.DETACHED
    if not backing_known:
        return LookAtOverlays() if free_to_go else Shortage.ALL_NEEDED
    if not free_to_go:
        return Shortage.OVERLAYS if any(one.backing for one in candidates) else Shortage.ALL_NEEDED
    return Evict(tuple(free_to_go))


ALL = 1 << 62
"""More bytes than there are."""
