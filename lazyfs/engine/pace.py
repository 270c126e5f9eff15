"""Limits the pace of population: by rates of the mount and of single images, and while readers
wait.

A permit to send a request is an object that must be ended, and so is the wait of a reader. So
callers need not balance any count.
"""

import threading
from collections.abc import Callable

from lazyfs.core.pacing import DemandGate, TokenBucket

MAX_WAIT_S = 0.5
"""How long population waits at most before it asks again. A new limit takes effect after at most
this time."""


class Permit:
    """Allows population to send one request. Thread-safe.

    Every permit must be ended by `end`, whatever became of the request.
    """

    __slots__ = ("_own", "_shared", "_under_way", "most")

    def __init__(self, shared: "SharedPace", own: "Pace", most: int) -> None:
        self.most = most
        """The most bytes that may be asked for."""
        self._shared = shared
        self._own = own
        self._under_way: int | None = most

    def sent(self, amount: int) -> None:
        """Say that the request asks for `amount` bytes, which is at most `most`."""
        assert self._under_way is not None
        self._own._take(amount)
        self._shared._sent(self._under_way, amount)
        self._under_way = amount

    def end(self, received: int = 0) -> None:
        """End the permit, because the request has ended and has brought `received` bytes.

        Only the first call counts.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._shared._ended(under_way, received)


class ReaderWait:
    """Represents a demand fetch under way, which makes population slow down. Thread-safe.

    It must be ended.
    """

    __slots__ = ("_ended", "_shared")

    def __init__(self, shared: "SharedPace") -> None:
        self._shared = shared
        self._ended = False

    def end(self, received: int = 0) -> None:
        """End the wait, because the fetch has ended and has brought `received` bytes.

        Only the first call counts.
        """
        if not self._ended:
            self._ended = True
            self._shared._reader_left(received)


class SharedPace:
    """Decides when population may send its next request. Thread-safe.

    All images of a mount share it.
    """

    def __init__(self, fill_rate: int | None, clock: Callable[[], float]) -> None:
        """Begin with no request under way.

        Args:
            fill_rate: bytes per second for all images together. None means no limit.
            clock: returns trio's time in seconds.
        """
        self.clock = clock
        self._lock = threading.Lock()
        self._bucket = TokenBucket(fill_rate)
        self._gate = DemandGate()

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the limit. It applies from the next request on."""
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    @property
    def rate_limit(self) -> int | None:
        """The limit in bytes per second. None means no limit."""
        return self._bucket.limit

    def reader_waits(self) -> ReaderWait:
        """Note that a demand fetch begins. Return the object that ends it."""
        with self._lock:
            self._gate.reader_waits()
        return ReaderWait(self)

    def wait_s(self) -> float:
        """Return how many seconds population must wait before its next request.

        It is 0 if population may send the request now.
        """
        with self._lock:
            now = self.clock()
            return max(self._bucket.wait(now), self._gate.wait(now))

    # -- for Pace, Permit and ReaderWait

    def _admit(self, own: "Pace", limit: int) -> Permit | float:
        """Check and take in one step, so that two threads do not both get what is left."""
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
    """Holds the pace of one image. Thread-safe.

    It has a limit of its own, and obeys the limit that all images share.
    """

    def __init__(self, shared: SharedPace) -> None:
        self.stopped = False
        """True if population sends no more requests for this image."""
        self._shared = shared
        self._lock = threading.Lock()
        self._bucket = TokenBucket(None)

    def admit(self, limit: int) -> Permit | float:
        """Ask to send a request for at most `limit` bytes.

        Returns:
            A permit, or the seconds after which to ask again, at most MAX_WAIT_S.
        """
        wait_s = self.own_wait_s()
        found = wait_s if wait_s > 0 else self._shared._admit(self, limit)
        return min(found, MAX_WAIT_S) if isinstance(found, float) else found

    def own_wait_s(self) -> float:
        """Return for how many seconds the image's own limit holds it back.

        It is 0 if the limit does not hold it back.
        """
        with self._lock:
            return self._bucket.wait(self._shared.clock())

    def set_rate(self, fill_rate: int | None) -> None:
        """Change the image's own limit, in bytes per second. None means no limit.

        It applies from the next request on.
        """
        with self._lock:
            self._bucket = TokenBucket(fill_rate)

    @property
    def rate_limit(self) -> int | None:
        """The image's own limit in bytes per second. None means no limit."""
        return self._bucket.limit

    def reader_waits(self) -> ReaderWait:
        """Note that a demand fetch begins. Return the object that ends it."""
        return self._shared.reader_waits()

    def _take(self, amount: int) -> None:
        with self._lock:
            self._bucket.take(self._shared.clock(), amount)
