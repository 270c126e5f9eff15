"""Population's pace: rate limits, of the mount and of single images, and readers first."""

import threading
from collections.abc import Callable

from lazyfs.core.pacing import BESIDE_READERS, DemandGate, TokenBucket

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
            self._gate.take(now, amount)

    def done(self, amount: int) -> None:
        """One of population's requests, for `amount` bytes, has ended."""
        with self._lock:
            self._gate.done(self.clock(), amount)

    def most(self) -> float:
        """Return how many bytes population's next request may ask for, if it need not `wait`."""
        with self._lock:
            return max(BESIDE_READERS, self._gate.most(self.clock()))

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the limit, from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def reader_waits(self) -> None:
        """A demand fetch begins."""
        with self._lock:
            self._gate.reader_waits()

    def reader_leaves(self, amount: int) -> None:
        """A demand fetch ends, with `amount` bytes."""
        with self._lock:
            self._gate.reader_leaves(self.clock(), amount)


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

    def done(self, amount: int) -> None:
        """As `SharedPace.done`."""
        self._shared.done(amount)

    def most(self) -> float:
        """As `SharedPace.most`."""
        return self._shared.most()

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the image's own limit, from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def reader_waits(self) -> None:
        """As `SharedPace.reader_waits`."""
        self._shared.reader_waits()

    def reader_leaves(self, amount: int) -> None:
        """As `SharedPace.reader_leaves`."""
        self._shared.reader_leaves(amount)
