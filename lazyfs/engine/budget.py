"""How much the cache may still grow, counted where it grows: before anything is written.

A counter, so that no fetch looks at other images. `room.py` sets it, after adding up what all
images take. Between two such counts it falls by what is reserved, and rises by what was reserved
and not written:

    left  =  limit - kept - reserved      reserve: left -> reserved -> keep: kept, or release: left
    again

So what is kept and what is being written never exceed the limit together, whatever threads do
meanwhile.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

UNKEPT = "the cache's disk is full: reads are served from the repository and not kept"
LIMITED = "the cache has reached its limit: reads are served from the repository and not kept"
"""What `status` says of an image while that is so."""


class Reservation:
    """Bytes that are about to be written. It ends with `keep` or `release`, or as a context
    manager. Thread-safe.

    Used in a `with` block it is released at the end of the block, unless it was kept.
    """

    __slots__ = ("_amount", "_budget")

    def __init__(self, budget: "Budget | None", amount: int) -> None:
        """`budget`: None if there was no limit when the bytes were reserved."""
        self._budget = budget
        self._amount = amount

    def shrink(self, amount: int) -> None:
        """Give back all but `amount` bytes."""
        assert 0 <= amount <= self._amount
        if self._budget is not None:
            self._budget._give_back(self._amount - amount)
        self._amount = amount

    def keep(self) -> None:
        """The bytes are in the cache now, and count as such. Nothing happens if the reservation has
        ended."""
        amount, self._amount = self._amount, 0
        if self._budget is not None:
            self._budget._keep(amount)

    def release(self) -> None:
        """The bytes are not written. Nothing happens if the reservation has ended."""
        amount, self._amount = self._amount, 0
        if self._budget is not None:
            self._budget._give_back(amount)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


class Budget:
    """The budget of one mount. Thread-safe. Without a limit every call costs next to nothing."""

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
        """Whether what was refused would be refused again: less is left than there is after
        evictions."""
        return self._left is not None and self._left < 2 * self._headroom

    def reserve(self, amount: int, background: bool = False) -> Reservation | None:
        """Reserve `amount` bytes that are about to be written; None if they may not be.

        Args:
            background: nobody waits for it, so the headroom is left to others.
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
        """What all images take is about to be added up: what is kept from here on may be in that
        sum or not."""
        with self._lock:
            self._kept = 0

    def demand(self, room: int) -> "BudgetDemand":
        """Return what is left of `room`, counted since `begin_count`, and what was refused since
        `set_left`."""
        with self._lock:
            return BudgetDemand(
                room - self._reserved - self._kept, self._unmet, self._refused_reader
            )

    def set_left(self, room: int, headroom: int) -> None:
        """Let the cache grow by `room` as counted since `begin_count`, population by `headroom`
        less."""
        with self._lock:
            self._left = room - self._reserved - self._kept
            self._headroom = headroom
            self._unmet = 0
            self._refused_reader = self._told = False


@dataclass(frozen=True, slots=True)
class BudgetDemand:
    """What is left, and what was asked for in vain. Bytes."""

    left: int
    unmet: int
    """The largest amount that was refused."""
    refused_reader: bool
    """Whether anything that a reader had fetched was refused."""
