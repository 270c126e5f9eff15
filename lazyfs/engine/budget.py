"""How much the cache may still grow, counted where it grows: in the fetchers, before they write.

A counter, so that no fetch looks at other images. `room.py` sets it, after adding up what all images take; between two
such looks it only falls, by what is reserved, and rises by what was reserved and came to nothing:

    left  =  limit - kept - reserved      reserve: left -> reserved -> keep: kept, or give_back: left again

So what is kept and what is being written never exceed the limit together, whatever threads do meanwhile.
"""

import threading
from collections.abc import Callable

UNKEPT = "the cache's disk is full: reads are served from the repository and not kept"
LIMITED = "the cache has reached its limit: reads are served from the repository and not kept"
"""What `status` says of an image while that is so."""


class Budget:
    """Of one mount. Safe from any thread; without a limit every call costs next to nothing."""

    def __init__(self) -> None:
        """Begin without a limit."""
        self.on_low: Callable[[], None] = lambda: None
        """It is time to look for room; called once until the next `set_left`, from any thread."""
        self._lock = threading.Lock()
        self._left: int | None = None
        self._headroom = 0
        self._reserved = 0
        self._kept = 0
        self._unmet = 0
        self._refused_reader = False
        self._told = False

    @property
    def tight(self) -> bool:
        """Whether what was refused would be refused again: less is left than there is after evictions."""
        return self._left is not None and self._left < 2 * self._headroom

    def reserve(self, amount: int, background: bool = False) -> bool:
        """Take `amount` bytes that are about to be written, to `keep` or `give_back` later; False if they may not be.

        `background`: nobody waits for it, so the headroom is left to others.
        """
        if self._left is None or amount <= 0:
            return True
        with self._lock:
            least = max(self._headroom, amount) if background else amount
            granted = self._left >= least
            if granted:
                self._left -= amount
                self._reserved += amount
            else:
                self._unmet = max(self._unmet, amount)
                self._refused_reader = self._refused_reader or not background
            tell = not self._told and (not granted or self._left < self._headroom)
            self._told = self._told or tell
        if tell:
            self.on_low()
        return granted

    def keep(self, amount: int) -> None:
        """Bytes that were reserved are in the cache, and counted as such."""
        if self._left is not None:
            with self._lock:
                self._reserved -= amount
                self._kept += amount

    def give_back(self, amount: int) -> None:
        """Bytes that were reserved are not written."""
        if self._left is not None:
            with self._lock:
                self._reserved -= amount
                self._left += amount

    # -- for room.py

    def begin_count(self) -> None:
        """What all images take is about to be added up: what is kept from here on may be in that sum or not."""
        with self._lock:
            self._kept = 0

    def after(self, room: int) -> tuple[int, int, bool]:
        """Return what is left of `room`, as it was counted since `begin_count`.

        And the largest amount refused since the latest `set_left`, and whether what a reader fetched was.
        """
        with self._lock:
            return room - self._reserved - self._kept, self._unmet, self._refused_reader

    def set_left(self, room: int, headroom: int) -> None:
        """Let the cache grow by `room` as counted since `begin_count`, population by `headroom` less."""
        with self._lock:
            self._left = room - self._reserved - self._kept
            self._headroom = headroom
            self._unmet = 0
            self._refused_reader = self._told = False
