"""Calculates rates and waits.

The caller reads all times from its own clock. They are in seconds, from any origin.
"""

import math

from lazyfs.units import KiB

_ROUNDING_S = 1e-6
"""A wait that is no longer than this is left over by rounding after the real wait has ended. A
clock may be too coarse to show that it passes."""


class TokenBucket:
    """Keeps to a long-term rate in bytes per second. A burst is what the rate allows in
    `burst_s`.

    A piece that is larger than the burst may start when the bucket is not in debt. The bucket is in
    debt afterwards, and the next piece waits for that.
    """

    def __init__(self, rate: float | None, burst_s: float = 0.1, full: bool = False) -> None:
        """Begin without any burst saved, or with a whole one if `full`.

        Args:
            rate: bytes per second. None means no limit.
            burst_s: seconds. It is short, so that a limit of 10 MB/s also holds within one second.
        """
        self.rate = rate
        self._burst_s = burst_s
        self._tokens = (rate or 0.0) * burst_s if full else 0.0
        self._at: float | None = None

    @property
    def limit(self) -> int | None:
        """The rate in whole bytes per second. None means no limit."""
        return None if self.rate is None else int(self.rate)

    def wait(self, now: float) -> float:
        """Return the seconds until the next piece may start, or 0 if it may start now."""
        if self.rate is None:
            return 0.0
        self._fill(now)
        wait = -self._tokens / self.rate
        return wait if wait > _ROUNDING_S else 0.0

    def take(self, now: float, amount: int) -> None:
        """Count `amount` bytes as used."""
        if self.rate is not None:
            self._fill(now)
            self._tokens -= amount

    def _fill(self, now: float) -> None:
        assert self.rate is not None
        if self._at is not None:
            self._tokens = min(
                self._tokens + (now - self._at) * self.rate, self.rate * self._burst_s
            )
        self._at = now


class Backoff:
    """Gives the waits between attempts.

    They double from `first` to `limit` seconds until `reset`.
    """

    def __init__(self, first: float = 0.05, limit: float = 2.0) -> None:
        """Begin with a wait of `first` seconds.

        The default of `first` is short, because a server that restarts is back in well under a
        second. The default of `limit` is how late a reader may notice, after a long outage, that
        the repository is back.
        """
        self._first = first
        self._limit = limit
        self._next = first

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        wait, self._next = self._next, min(2 * self._next, self._limit)
        return wait

    def reset(self) -> None:
        """Begin again with the first wait, because an attempt has succeeded."""
        self._next = self._first


class RateMeter:
    """Measures bytes per second over about the last `horizon_s` seconds, exponentially weighted."""

    def __init__(self, horizon_s: float = 3.0) -> None:
        self._horizon_s = horizon_s
        self._weight = 0.0
        self._started: float | None = None
        self._at = 0.0

    def add(self, now: float, amount: int) -> None:
        """Count `amount` bytes that arrived at `now`."""
        if self._started is None:
            self._started = self._at = now
        self._decay(now)
        self._weight += amount

    def rate(self, now: float) -> float:
        """Return the rate at `now`."""
        if self._started is None:
            return 0.0
        self._decay(now)
        # A young meter has not run for a whole horizon, so divide by what it could have seen.
        seen = self._horizon_s * (1 - math.exp(-(now - self._started) / self._horizon_s))
        return self._weight / seen if seen > 0.1 else 0.0

    def _decay(self, now: float) -> None:
        self._weight *= math.exp(-(now - self._at) / self._horizon_s)
        self._at = now


class RoundRate:
    """Measures bytes per second over a whole round, for work that is done in turns.

    Between two turns nothing moves, because others have theirs. So the rate is taken from the
    beginning of the turn before the latest one until now.
    """

    def __init__(self) -> None:
        self._before: tuple[float, int] | None = None
        self._latest: tuple[float, int] | None = None

    @property
    def begun(self) -> bool:
        """True once there was a turn."""
        return self._latest is not None

    def begin_turn(self, now: float, total: int) -> None:
        """Note that a turn begins, when `total` bytes have been moved in all."""
        self._before, self._latest = self._latest, (now, total)

    def forget(self) -> None:
        """Begin anew, because the work was held up for other reasons than the turns of others."""
        self._before = self._latest = None

    def rate(self, now: float, total: int) -> float:
        """Return the rate at `now`, when `total` bytes have been moved in all.

        It is 0 before the first turn. In the first second it is what has been moved so far, because
        a burst says little.
        """
        began = self._before or self._latest
        if began is None:
            return 0.0
        return (total - began[1]) / max(now - began[0], 1.0)


BESIDE_READERS = 128 * KiB
"""What population may always have under way. Measured with reads of 4 KiB over 50 MB/s and 1 ms,
p99: 60 ms with all of population's 2 MiB (3.9 ms without population), 4.0 ms with 128 KiB,
6.7 ms with 256 KiB, 9.7 ms with 2 x 64 KiB."""

QUEUE_S = 0.0025
"""How much later the answer to a reader may come, on a faster link, because of population. It is
what 128 KiB take at 50 MB/s."""

RETRY_S = 0.002
"""How late population notices that it may send its next request beside readers."""


class DemandGate:
    """Holds population back while readers wait.

    A link has one queue, so the answer to a reader comes behind what population has under way. A
    reader seldom comes alone. So from its request until `linger_s` after its end, population has no
    more under way than the link moves in QUEUE_S, or BESIDE_READERS if that is more.

    While a reader waits, population gets one such request through in each `trickle_s`. So readers
    who never pause do not keep an image from becoming whole.
    """

    def __init__(self, trickle_s: float = 0.05, linger_s: float = 0.1) -> None:
        """Begin with nothing under way.

        Args:
            trickle_s: unmeasured.
            linger_s: unmeasured. A booting guest is seldom busy for longer than this between two
                reads.
        """
        self._trickle_s = trickle_s
        self._linger_s = linger_s
        self._waiting = 0
        self._under_way = 0
        self._sent = self._left = -math.inf
        self._speed = RateMeter(horizon_s=1.0)

    def reader_waits(self) -> None:
        """Note that a demand fetch begins."""
        self._waiting += 1

    def reader_leaves(self, now: float, amount: int) -> None:
        """Note that a demand fetch has ended and has brought `amount` bytes."""
        self._waiting -= 1
        self._left = now
        self._speed.add(now, amount)

    def most(self, now: float) -> float:
        """Return how many bytes population's next request may ask for.

        If they are fewer than BESIDE_READERS, no request should be sent.
        """
        if not self._waiting and now >= self._left + self._linger_s:
            return math.inf
        return max(BESIDE_READERS, self._speed.rate(now) * QUEUE_S) - self._under_way

    def wait(self, now: float) -> float:
        """Return the seconds until population may look again.

        0 means that it may send its next request now.
        """
        trickle_s = self._sent + self._trickle_s - now if self._waiting else 0.0
        return max(trickle_s, RETRY_S if self.most(now) < BESIDE_READERS else 0.0)

    def take(self, now: float, amount: int) -> None:
        """Note that population sends a request for `amount` bytes."""
        self._sent = now
        self._under_way += amount

    def done(self, now: float, amount: int, received: int) -> None:
        """Note that a request for `amount` bytes has ended and has brought `received` bytes."""
        self._under_way -= amount
        self._speed.add(now, received)
