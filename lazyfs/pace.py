"""Population's pace: rate limits, of the mount and of single images, and readers first."""

import threading
from collections.abc import Callable

from lazyfs.core.pacing import DemandGate, TokenBucket

MAX_WAIT_S = 0.5
"""What population waits at most before it asks again: how late a new limit may count."""


class SharedPace:
    """When population may send its next request; shared by all images of a mount, safe from any thread."""

    def __init__(self, fill_rate: int | None, clock: Callable[[], float]) -> None:
        """`fill_rate`: bytes per second for all images together, None for no limit. `clock`: as trio's."""
        self.clock = clock
        self._lock = threading.Lock()
        self._bucket = TokenBucket(fill_rate)
        self._gate = DemandGate()

    def wait(self) -> float:
        """Return the seconds to wait, 0 if the request may go."""
        with self._lock:
            now = self.clock()
            return max(self._bucket.wait(now), self._gate.wait(now))

    def take(self, amount: int) -> None:
        """Population sends a request for `amount` bytes."""
        with self._lock:
            now = self.clock()
            self._bucket.take(now, amount)
            self._gate.take(now)

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the limit, from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def demand(self, change: int) -> None:
        """A demand fetch begins (1) or ends (-1)."""
        with self._lock:
            self._gate.waiting += change


class Pace:
    """The pace of one image: its own limit, on top of what all share. Safe from any thread."""

    def __init__(self, shared: SharedPace) -> None:
        self.clock = shared.clock
        self.stopped = False
        """Population sends no more requests, from the next on."""
        self._shared = shared
        self._lock = threading.Lock()
        self._bucket = TokenBucket(None)

    def wait(self) -> float:
        """Return the seconds to wait before asking again, 0 if the request may go."""
        with self._lock:
            own = self._bucket.wait(self.clock())
        return min(max(own, self._shared.wait()), MAX_WAIT_S)

    def take(self, amount: int) -> None:
        """Population sends a request for `amount` bytes."""
        with self._lock:
            self._bucket.take(self.clock(), amount)
        self._shared.take(amount)

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the image's own limit, from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def demand(self, change: int) -> None:
        """A demand fetch begins (1) or ends (-1)."""
        self._shared.demand(change)
