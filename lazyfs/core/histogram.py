"""Counts of observations in fixed buckets: cheap enough for every read of a mount.

An observation is one binary search and two additions (0.2 us), whatever the number of buckets.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HistogramStatistics:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """The upper bound of each bucket, itself included; one more bucket takes what is above all."""
    counts: tuple[int, ...]
    """Observations in each bucket alone; one more than there are bounds."""
    total: float
    """The sum of all observations."""

    @property
    def count(self) -> int:
        """The number of all observations."""
        return sum(self.counts)


class Histogram:
    """Observations of one kind. Not thread-safe."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise strictly."""
        assert all(low < high for low, high in itertools.pairwise(bounds)), bounds
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def statistics(self) -> HistogramStatistics:
        """Return what has been observed."""
        return HistogramStatistics(self._bounds, tuple(self._counts), self._total)
