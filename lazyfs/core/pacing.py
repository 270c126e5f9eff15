"""Rates and waits as arithmetic on times that the caller reads from its own clock (seconds, any origin)."""

import math

_ROUNDING_S = 1e-6
"""A wait this short is what rounding left of one that is over; a clock may be too coarse to show it passing."""


class TokenBucket:
    """Keeps a long-run rate in bytes per second, with bursts of at most `burst_s` seconds' worth.

    May go into debt: a piece larger than the burst is let through when the bucket is not in debt, and paid
    for by waiting afterwards.
    """

    def __init__(self, rate: float | None, burst_s: float = 0.1) -> None:
        """`rate` None means no limit. The burst is short, so that a limit of 10 MB/s is one within a second too."""
        self.rate = rate
        self._burst_s = burst_s
        self._tokens = 0.0
        self._at: float | None = None

    def wait(self, now: float) -> float:
        """Return the seconds until the next piece may start; 0 if it may now."""
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
            self._tokens = min(self._tokens + (now - self._at) * self.rate, self.rate * self._burst_s)
        self._at = now


class DemandGate:
    """Holds population back while readers wait for the repository.

    It still gets one request through in each `trickle_s`, so that readers who never pause do not keep an
    image from ever becoming whole.
    """

    def __init__(self, trickle_s: float = 0.05) -> None:
        """At the default a busy reader shares its link with at most 256 KiB / 0.05 s = 5 MiB/s. Unmeasured."""
        self.waiting = 0
        """Demand fetches under way."""
        self._trickle_s = trickle_s
        self._last = -math.inf

    def wait(self, now: float) -> float:
        """Return the seconds until population may send its next request; 0 if it may now."""
        return max(0.0, self._last + self._trickle_s - now) if self.waiting else 0.0

    def take(self, now: float) -> None:
        """Population sends a request."""
        self._last = now


class Backoff:
    """Waits between attempts: they double from `first` to `limit` seconds until `reset`."""

    def __init__(self, first: float = 0.05, limit: float = 2.0) -> None:
        """The first retry is soon, as a restarted server is back in well under a second; the limit is how late
        after a long outage a reader may notice that the repository is back."""
        self._first = first
        self._limit = limit
        self._next = first

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        wait, self._next = self._next, min(2 * self._next, self._limit)
        return wait

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next = self._first


class RateMeter:
    """Bytes per second over about the last `horizon_s` seconds, exponentially weighted."""

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
        # Young meters have seen less than one horizon: divide by what they could have seen.
        seen = self._horizon_s * (1 - math.exp(-(now - self._started) / self._horizon_s))
        return self._weight / seen if seen > 0.1 else 0.0

    def _decay(self, now: float) -> None:
        self._weight *= math.exp(-(now - self._at) / self._horizon_s)
        self._at = now
