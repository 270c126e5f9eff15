"""The pace of population: rate limits, of the mount and of single images, and readers first.

A permit to send a request is an object with an end, and so is a reader's wait: nothing is balanced
by hand.
"""

import threading
from collections.abc import Callable

from lazyfs.core.pacing import DemandGate, TokenBucket

MAX_WAIT_S = 0.5
"""What population waits at most before it asks again: how late a new limit may take effect."""


class Permit:
    """Population may send one request. It must end: `end`, whatever came of the request.
    Thread-safe."""

    __slots__ = ("_own", "_shared", "_under_way", "most")

    def __init__(self, shared: "SharedPace", own: "Pace", most: int) -> None:
        self.most = most
        """How many bytes may be asked for."""
        self._shared = shared
        self._own = own
        self._under_way: int | None = most

    def sent(self, amount: int) -> None:
        """Say that the request asks for `amount` bytes, at most `most`."""
        assert self._under_way is not None
        self._own._take(amount)
        self._shared._sent(self._under_way, amount)
        self._under_way = amount

    def end(self, received: int = 0) -> None:
        """The request has ended, and brought `received` bytes. Only the first call counts."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._shared._ended(under_way, received)


class ReaderWait:
    """A demand fetch under way, for which population stands back. It must end. Thread-safe."""

    __slots__ = ("_ended", "_shared")

    def __init__(self, shared: "SharedPace") -> None:
        self._shared = shared
        self._ended = False

    def end(self, received: int = 0) -> None:
        """The fetch has ended, and brought `received` bytes. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._shared._reader_left(received)


class SharedPace:
    """When population may send its next request. Shared by all images of a mount. Thread-safe."""

    def __init__(self, fill_rate: int | None, clock: Callable[[], float]) -> None:
        """Begin with nothing under way.

        Args:
            fill_rate: bytes per second for all images together; None for no limit.
            clock: as trio's, in seconds.
        """
        self.clock = clock
        self._lock = threading.Lock()
        self._bucket = TokenBucket(fill_rate)
        self._gate = DemandGate()

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the limit, from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def reader_waits(self) -> ReaderWait:
        """A demand fetch begins."""
        with self._lock:
            self._gate.reader_waits()
        return ReaderWait(self)

    def wait_s(self) -> float:
        """Return how many seconds population has to wait for its next request; 0 if it may send it
        now."""
        with self._lock:
            now = self.clock()
            return max(self._bucket.wait(now), self._gate.wait(now))

    # -- for Pace, Permit and ReaderWait

    def _admit(self, own: "Pace", limit: int) -> Permit | float:
        """In one step: two threads must not both get what is left."""
        with self._lock:
            now = self.clock()
            wait_s = max(self._bucket.wait(now), self._gate.wait(now))
            if wait_s > 0:
                return wait_s
            most = int(min(limit, self._gate.most(now)))
            self._gate.take(now, most)
        return Permit(self, own, most)

    def _sent(self, most: int, amount: int) -> None:
        with self._lock:
            now = self.clock()
            self._bucket.take(now, amount)
            self._gate.done(now, most - amount, 0)

    def _ended(self, amount: int, received: int) -> None:
        with self._lock:
            self._gate.done(self.clock(), amount, received)

    def _reader_left(self, received: int) -> None:
        with self._lock:
            self._gate.reader_leaves(self.clock(), received)


class Pace:
    """The pace of one image: its own limit, besides the one that all images share. Thread-safe."""

    def __init__(self, shared: SharedPace) -> None:
        self.stopped = False
        """Population sends no more requests for this image."""
        self._shared = shared
        self._lock = threading.Lock()
        self._bucket = TokenBucket(None)

    def admit(self, limit: int) -> Permit | float:
        """Ask to send a request for at most `limit` bytes.

        Returns:
            A permit, or after how many seconds to ask again, at most MAX_WAIT_S.
        """
        wait_s = self.own_wait_s()
        found = wait_s if wait_s > 0 else self._shared._admit(self, limit)
        return min(found, MAX_WAIT_S) if isinstance(found, float) else found

    def own_wait_s(self) -> float:
        """Return how many seconds the image's own limit holds it back; 0 if it does not."""
        with self._lock:
            return self._bucket.wait(self._shared.clock())

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the image's own limit, in bytes per second, from the next request on; None for no
        limit."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    def reader_waits(self) -> ReaderWait:
        """A demand fetch begins."""
        return self._shared.reader_waits()

    def _take(self, amount: int) -> None:
        with self._lock:
            self._bucket.take(self._shared.clock(), amount)
