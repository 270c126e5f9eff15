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

    def ask(self, limit: int) -> tuple[float, int]:
        """Return the seconds to wait; if that is 0, and how many bytes population may ask for, these are under way.

        All in one step: two threads must not see the same room. What is asked for then is told to `asked`.
        """
        with self._lock:
            now = self.clock()
            wait_s = max(self._bucket.wait(now), self._gate.wait(now))
            if wait_s > 0:
                return wait_s, 0
            most = int(min(limit, self._gate.most(now)))
            self._gate.take(now, most)
            return 0.0, most

    def asked(self, most: int, amount: int) -> None:
        """Population sends a request for `amount` bytes where it might have asked for `most`."""
        with self._lock:
            now = self.clock()
            self._bucket.take(now, amount)
            self._gate.done(now, most - amount, 0)

    def done(self, amount: int, received: int) -> None:
        """One of population's requests, for `amount` bytes, has ended, and brought `received`."""
        with self._lock:
            self._gate.done(self.clock(), amount, received)

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

    def ask(self, limit: int) -> tuple[float, int]:
        """As `SharedPace.ask`; waits are at most MAX_WAIT_S, before it must be asked again."""
        with self._lock:
            own_s = self._bucket.wait(self.clock())
        wait_s, most = (own_s, 0) if own_s > 0 else self._shared.ask(limit)
        return min(wait_s, MAX_WAIT_S), most

    def asked(self, most: int, amount: int) -> None:
        """As `SharedPace.asked`."""
        with self._lock:
            self._bucket.take(self.clock(), amount)
        self._shared.asked(most, amount)

    def done(self, amount: int, received: int) -> None:
        """As `SharedPace.done`."""
        self._shared.done(amount, received)

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
