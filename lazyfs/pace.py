"""Population's pace, shared by all images of a mount: the rate limit, and readers first."""

import threading
from collections.abc import Callable

from lazyfs.core.pacing import DemandGate, TokenBucket


class Pace:
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

    def demand(self, change: int) -> None:
        """A demand fetch begins (1) or ends (-1)."""
        with self._lock:
            self._gate.waiting += change
