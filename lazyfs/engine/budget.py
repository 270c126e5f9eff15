"""Counts how much the cache may still grow. The count is checked before anything is written.

It is one counter, so a fetch need not look at other images. `room.py` adds up what all images take
and sets the counter. Between two such counts it falls by what is reserved, and rises by what was
reserved but not written:

    left  =  limit - kept - reserved

    reserve: bytes move from left to reserved
    keep:    bytes move from reserved to kept
    release: bytes move from reserved back to left

So the bytes that are kept and the bytes that are being written never exceed the limit together,
whatever threads do in the meantime.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

UNKEPT = "the cache's disk is full: reads are served from the repository and not kept"
LIMITED = "the cache has reached its limit: reads are served from the repository and not kept"
"""What `status` says of an image while its reads are not kept."""


class Reservation:
    """Holds bytes of the budget that are about to be written. Thread-safe.

    It ends with `keep` or `release`. When it is used in a `with` block and was not kept, the end of
    the block releases it.
    """

    __slots__ = ("_amount", "_budget")

    def __init__(self, budget: "Budget | None", amount: int) -> None:
        """Hold `amount` bytes of `budget`.

        Args:
            budget: None if there was no limit when the bytes were reserved.
            amount: the bytes that are reserved.
        """
        self._budget = budget
        self._amount = amount

    def shrink(self, amount: int) -> None:
        """Give back all but `amount` bytes."""
        assert 0 <= amount <= self._amount
        if self._budget is not None:
            self._budget._give_back(self._amount - amount)
        self._amount = amount

    def keep(self) -> None:
        """Count the bytes as kept, because they are in the cache now.

        Does nothing if the reservation has ended.
        """
        amount, self._amount = self._amount, 0
        if self._budget is not None:
            self._budget._keep(amount)

    def release(self) -> None:
        """Give the bytes back, because they will not be written.

        Does nothing if the reservation has ended.
        """
        amount, self._amount = self._amount, 0
        if self._budget is not None:
            self._budget._give_back(amount)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


class Budget:
    """Counts the bytes that one mount may still write to its cache. Thread-safe.

    Without a limit every call costs next to nothing.
    """

    def __init__(self) -> None:
        """Begin without a limit."""
        self.on_low: Callable[[], None] = lambda: None
        """Called when it is time to look for room, from any thread. It is called once, and then not
        again before the next `set_left`."""
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
        """True if a write that was refused would be refused again.

        That is so while less is left than an eviction leaves.
        """
        return self._left is not None and self._left < 2 * self._headroom

    def reserve(self, amount: int, background: bool = False) -> Reservation | None:
        """Reserve `amount` bytes that are about to be written.

        Args:
            amount: bytes.
            background: nobody waits for these bytes, so the headroom is left to others.

        Returns:
            None if the bytes may not be written.
        """
        if self._left is None or amount <= 0:
            return Reservation(None, max(0, amount))
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
        return Reservation(self, amount) if granted else None

    # -- for Reservation

    def _keep(self, amount: int) -> None:
        with self._lock:
            self._reserved -= amount
            self._kept += amount

    def _give_back(self, amount: int) -> None:
        with self._lock:
            assert self._left is not None
            self._reserved -= amount
            self._left += amount

    # -- for room.py

    def begin_count(self) -> None:
        """Note that somebody is about to add up what all images take.

        What is kept from now on may be in that sum or not, so `demand` and `set_left` count it as
        taken.
        """
        with self._lock:
            self._kept = 0

    def demand(self, room: int) -> "BudgetDemand":
        """Return what is left of `room`, and what was refused since the last `set_left`.

        Args:
            room: bytes by which the cache may grow, as counted since `begin_count`.
        """
        with self._lock:
            return BudgetDemand(
                room - self._reserved - self._kept, self._unmet, self._refused_reader
            )

    def set_left(self, room: int, headroom: int) -> None:
        """Let the cache grow by `room` bytes, and population by `headroom` bytes less.

        Args:
            room: bytes, as counted since `begin_count`.
            headroom: bytes that are kept for readers.
        """
        with self._lock:
            self._left = room - self._reserved - self._kept
            self._headroom = headroom
            self._unmet = 0
            self._refused_reader = self._told = False


@dataclass(frozen=True, slots=True)
class BudgetDemand:
    """Describes what is left of the budget and what was refused. All numbers are bytes."""

    left: int
    unmet: int
    """The largest amount that was refused."""
    refused_reader: bool
    """True if bytes were refused that had been fetched for a reader."""
